"""The ONNX target: stock ONNX Runtime computes the reference's integers, and what cannot be said exactly is refused."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import mdsnn.export.onnx as target
from mdsnn.export.onnx import CARRIERS, FORMS, OnnxExecutor, check_model, load_onnx, save_onnx, to_onnx
from mdsnn.export.verify import kernel_executor, verify
from mdsnn.kernels.engine import Engine, Trace
from mdsnn.kernels.errors import (
    ArtifactError,
    ConfigError,
    InputError,
    LoweringError,
    MissingError,
    StorageError,
)
from mdsnn.kernels.formats import Grid, decode_table, delta, event_table, image_table, requantize_thresholds
from mdsnn.kernels.network import (
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    MaxPool,
    Node,
    Readout,
    SumPool,
)
from planted import assert_same_bits, assert_same_trace, network_cases, seeded_case

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

COMBINATIONS = [(form, carrier) for form in FORMS for carrier in CARRIERS]
GRID = Grid()
SHORT = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def reference(network: IntegerNetwork, pixels: np.ndarray) -> Trace:
    trace = Engine(network, "reference", 1).run(pixels, trace=True).trace
    assert trace is not None
    return trace


def assert_exact(network: IntegerNetwork, pixels: np.ndarray) -> None:
    """All four models give the reference's h, s, q and logits."""
    want = reference(network, pixels)
    for form, carrier in COMBINATIONS:
        got = OnnxExecutor(network, form=form, carrier=carrier).run(pixels)
        try:
            assert_same_trace(got, want)
        except AssertionError as fault:
            raise AssertionError(f"{form}, {carrier}: {fault}") from None


# ------------------------------------------------------------------------------------------- hand-made networks


def lif(name: str, source: str, bits: int = 4, **changes: Any) -> Lif:
    fields: dict[str, Any] = {
        "decode": decode_table(0.8, 0.5, bits, GRID),
        "thresholds": requantize_thresholds(0.8, bits, GRID),
        "v_th": 256,
    }
    return Lif(name, source, bits, **(fields | changes))


def network(nodes: list[Node], shape: tuple[int, int, int], steps: int = 3, coding: str = "image") -> IntegerNetwork:
    table = image_table([0.5] * shape[0], [0.25] * shape[0]) if coding == "image" else event_table(shape[0])
    return IntegerNetwork((InputTable("input", table), *nodes), InputSpec(*shape, coding), steps, GRID)


def spiking(nodes: list[Node], shape: tuple[int, int, int], steps: int = 3, events: bool = False) -> IntegerNetwork:
    """A stem of one 1x1 convolution a channel, BN and a LIF node 's' before `nodes`."""
    channels = shape[0]
    eye = np.eye(channels, dtype=np.int64)[:, :, None, None]
    stem: list[Node] = [
        Conv("stem", "input", eye, 2),
        BnAffine("bn", "stem", np.full(channels, 1024), np.zeros(channels, int), np.full(channels, 6)),
        lif("s", "bn"),
    ]
    return network([*stem, *nodes], shape, steps, "events" if events else "image")


def head(source: str, features: int, seed: int = 0, bits: int = 8) -> list[Node]:
    rng = np.random.default_rng(seed)
    top = delta(bits)
    weight = rng.integers(-top, top + 1, (4, features))
    return [Flatten("flat", source), Readout("readout", "flat", weight, bits, rng.integers(-9, 9, 4))]


def random_pixels(net: IntegerNetwork, samples: int = 3, seed: int = 1) -> np.ndarray:
    spec = net.input
    lead = (samples,) if spec.coding == "image" else (net.timesteps, samples)
    shape = (*lead, spec.channels, spec.height, spec.width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("form", "carrier"), COMBINATIONS)
@SHORT
@given(case=network_cases(max_channels=16, max_timesteps=5))
def test_onnx_is_the_reference_bit_for_bit(form: str, carrier: str, case: tuple[IntegerNetwork, np.ndarray]) -> None:
    net, pixels = case
    assert_same_trace(OnnxExecutor(net, form=form, carrier=carrier).run(pixels), reference(net, pixels))


@pytest.mark.parametrize("block", range(4))
def test_planted_networks_are_equal_in_all_four_models(block: int) -> None:
    for seed in range(1000 + 20 * block, 1020 + 20 * block):
        net, pixels = seeded_case(seed, max_channels=130 if seed % 5 == 0 else 16, max_timesteps=32)
        try:
            assert_exact(net, pixels)
        except AssertionError as fault:
            raise AssertionError(f"seed {seed}: {fault}") from None


def test_a_model_without_trace_returns_the_same_logits_for_any_batch() -> None:
    net, pixels = seeded_case(7, samples=6, events=False)
    want = Engine(net, "reference", 1).run(pixels)
    for form, carrier in COMBINATIONS:
        model = to_onnx(net, form=form, carrier=carrier)
        executor = OnnxExecutor(model)
        for part in (pixels[:1], pixels[:5], pixels):
            assert_same_bits(executor.logits(part), want.logits[: len(part)], f"{form}, {carrier}, {len(part)} samples")
        assert dict(executor.run(pixels).lifs) == {}


def test_equal_logits_go_to_the_lowest_index() -> None:
    """With equal rows the largest logit is tied, and argmax of the model's logits is the engine's prediction."""
    weight = np.tile(np.random.default_rng(3).integers(-7, 8, (1, 12)), (5, 1))
    net = spiking([Flatten("flat", "s"), Readout("readout", "flat", weight, 4, np.array([0, 3, 3, 3, 1]))], (3, 2, 2))
    pixels = random_pixels(net, 8)
    for form, carrier in COMBINATIONS:
        logits = OnnxExecutor(net, form=form, carrier=carrier).run(pixels).logits
        assert np.argmax(logits, axis=1).tolist() == [1] * 8
    assert Engine(net, "reference", 1).run(pixels).predictions.tolist() == [1] * 8


@pytest.mark.parametrize("events", [False, True], ids=["image", "events"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 1), (2, 1, 1), (4, 3, 2), (1, 2, 0)]
)
def test_pools_with_overlap_and_padding(kernel: int, stride: int, padding: int, events: bool) -> None:
    out = [(size + 2 * padding - kernel) // stride + 1 for size in (7, 6)]
    features = 3 * out[0] * out[1]
    pools = MaxPool("pool", "s", kernel, stride, padding), SumPool("pool", "s", kernel, kernel, stride, padding)
    for pool in pools:
        net = spiking([pool, *head("pool", features)], (3, 7, 6), events=events)
        assert_exact(net, random_pixels(net))


def test_a_sum_over_everything_and_one_with_padding_around_it() -> None:
    for padding, features in ((0, 3), (2, 3 * 5 * 5)):
        net = spiking([SumPool("pool", "s", 7, 6, 1, padding), *head("pool", features)], (3, 7, 6))
        assert_exact(net, random_pixels(net))


def test_counts_beyond_a_byte_are_split_into_digits() -> None:
    """Two overlapping sum-pools: counts reach 3,136, read by a convolution, a Linear and another sum-pool."""
    nodes: list[Node] = [
        SumPool("once", "s", 7, 8, 1, 3),
        SumPool("twice", "once", 8, 7, 2, 3),
        Conv("conv", "twice", np.random.default_rng(0).integers(-7, 8, (5, 2, 3, 3)), 4, 1, 1),
        BnAffine("bn2", "conv", np.full(5, 30), np.full(5, 77), np.full(5, 9)),
        lif("s2", "bn2"),
        SumPool("sum", "s2", 3, 3, 1, 1),
        Flatten("flat", "sum"),
    ]
    features = 5 * 4 * 6
    nodes += [
        Linear("linear", "flat", np.random.default_rng(1).integers(-127, 128, (6, features)), 8),
        BnAffine("bn3", "linear", np.full(6, 1), np.zeros(6, int), np.full(6, 3)),
        lif("s3", "bn3"),
        Readout("readout", "s3", np.random.default_rng(2).integers(-7, 8, (4, 6)), 4, np.zeros(4, int)),
    ]
    net = spiking(nodes, (2, 9, 12))
    assert net.proof.ranges["twice"] == (0, 3136)
    pixels = random_pixels(net)
    pixels[0] = 255
    trace = reference(net, pixels)
    assert trace.lifs["s"].s[:, 0].all()  # every neuron fires: the counts are as large as they get
    assert_exact(net, pixels)


@pytest.mark.parametrize("coding", ["image", "events"])
def test_a_readout_of_the_codes_themselves(coding: str) -> None:
    """No LIF at all: signed codes, static for images, summed over 5 steps for events."""
    net = network(head("input", 18), (2, 3, 3), 5, coding)
    pixels = random_pixels(net)
    pixels[..., 0, 0, 0], pixels[..., 1, 2, 2] = 0, 255
    assert_exact(net, pixels)


@pytest.mark.parametrize("reset", ["hard", "soft", "pre_fire"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_thresholds_anywhere_in_32_bits(reset: str, bits: int) -> None:
    """Thresholds at the ends of int32, far apart (searched) or close (a table), some on values h reaches."""
    rng = np.random.default_rng(bits)
    top = delta(bits)
    first = spiking(head("s", 12), (3, 2, 2))
    pixels = random_pixels(first)
    reached = np.unique(reference(first, pixels).lifs["s"].h).astype(np.int64)
    ends = np.array([-(2**31), 2**31 - 1, -(2**30), 2**30, 0])
    # the stem's BN saturates at +-4,096; a decode table that reaches far makes the membrane's range wide
    wide = np.linspace(-(2**29), 2**29, 2 * top + 1).astype(np.int64)
    for decode, values in (
        (first["s"].decode if bits == 4 else np.sort(rng.integers(-300, 300, 2 * top + 1)), reached),  # type: ignore[attr-defined]
        (wide, np.concatenate([reached, ends, rng.integers(-(2**29), 2**29, 20)])),
        (wide, ends[:1]),
        (wide, ends[1:2]),
    ):
        thresholds = np.sort(rng.choice(values, 2 * top))
        mode = {"quantize": "pre_fire", "q_th": 0} if reset == "pre_fire" else {"reset": reset}
        if reset == "soft":
            mode["v_soft"] = 2**30 - 1
        node = lif("s", "bn", bits, decode=decode, thresholds=thresholds, v_th=int(np.median(reached.clip(0))), **mode)
        net = IntegerNetwork(tuple(node if n.name == "s" else n for n in first.nodes), first.input, 4, GRID)
        assert_exact(net, pixels)


@pytest.mark.parametrize("quantize", ["post_reset", "pre_fire"])
@pytest.mark.parametrize("gap", [1, 2**29], ids=["table", "search"])
def test_thresholds_beside_the_ends_of_the_membrane(quantize: str, gap: int) -> None:
    """The membrane saturates at both ends, where each threshold is on it, one below or one above."""
    nodes: list[Node] = [
        Conv("conv", "input", np.array([[[[1]]], [[[-1]]]]), 2),
        BnAffine("bn", "conv", np.array([4096, 4096]), np.array([0, 0]), np.array([0, 0])),
    ]
    decode = np.sign(np.arange(-3, 4)) * (gap if gap > 1 else 0)
    low, high = -4096 + int(decode[0]), 4096 + int(decode[-1])
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    for thresholds in (  # +-4096 gives a code whose decoded value leads on to low or high
        [low, low + 1, 0, 0, high, high + 1],
        [low - 1, low, 0, 0, high - 1, high],
        [low - 1, low - 1, 0, 0, high + 1, high + 1],
        [low, low, 0, 0, high, high],
    ):
        silent = {"v_th": 2**30 - 1} if quantize == "post_reset" else {"q_th": 2}
        node = lif("s", "bn", 3, decode=decode, thresholds=thresholds, quantize=quantize, **silent)
        net = network([*nodes, node, *head("s", 512)], (1, 16, 16), 3)
        assert net.proof.membranes["s"] == (low, high)
        h = reference(net, pixels).lifs["s"].h
        assert (h.min(), h.max()) == (low, high)
        assert_exact(net, pixels)


def test_bn_products_of_64_bits_saturate_right() -> None:
    """Every product range: just inside and beyond 32 bits, whole multiples of 2**32, both signs, all shifts."""
    cases = [
        (1 << 20, 1 << 31, 0),
        (-(1 << 20), 1 << 31, 0),
        (2**31 - 1, 2**61, 24),
        (-(2**31), -(2**61), 1),
        (1, 2**32, 0),
        (1, -(2**32), 3),
        (1, 2**32 + 100, 0),
        (1, -(2**31), 0),
        (1, 2**31, 24),
        (3, 2**33 - 1, 24),
        (32, (2**24) * 4096, 24),
        (1 << 24, -(2**24) * 4096, 24),
        (37, -5, 4),
    ]
    a, b, g = (np.array(column) for column in zip(*cases, strict=True))
    nodes: list[Node] = [
        Conv("conv", "input", np.full((len(cases), 1, 1, 1), 1), 2),
        BnAffine("wide", "conv", a, b, g),
        lif("s", "wide", v_th=0),
    ]
    net = network([*nodes, *head("s", len(cases) * 256)], (1, 16, 16), 2, "image")
    assert net.proof.product_bits["wide"] == 64
    assert_exact(net, np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))  # every pixel, hence every accumulator


def test_affine_constants_at_the_limit_of_32_bits() -> None:
    """|A|*max|acc| + |B| = 2**31 - 1 in both signs: the floor shift is right where p - Mod(p, 2**g) is -2**31."""
    a = np.array([2**15 - 1, -(2**15 - 1), 1, -1, 2**15 - 1])
    b = np.sign(a) * (2**31 - 1 - np.abs(a) * 128)
    b[4] = -b[4]
    g = np.array([24, 23, 22, 1, 0])
    nodes: list[Node] = [
        Conv("conv", "input", np.full((5, 1, 1, 1), 1), 2),
        BnAffine("limit", "conv", a, b, g),
        lif("s", "limit", v_th=0),
    ]
    net = network([*nodes, *head("s", 5 * 256)], (1, 16, 16), 1)
    assert net.proof.product_bits["limit"] == 32
    assert_exact(net, np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))


def test_dense_tables_of_unlike_channels() -> None:
    weight = np.array([7, -7, 0, 1, -1]).reshape(5, 1, 1, 1)
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.integers(-4096, 4097, 255 * abs(int(w)) + 1)) for w in weight.ravel()]
    rows[1] = rows[1][::-1]
    nodes: list[Node] = [Conv("conv", "input", weight, 4), BnDense("bn", "conv", np.concatenate(rows)), lif("s", "bn")]
    net = network([*nodes, *head("s", 5 * 256)], (1, 16, 16), 2)
    assert_exact(net, np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))


# ------------------------------------------------------------------------- what the models are made of


def operators(model: bytes) -> Iterator[Any]:
    graph = onnx.load_from_string(model).graph
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from attribute.g.node


def names(model: bytes) -> list[str]:
    return [node.op_type for node in operators(model)]


def wide_linear(features_side: int, bits: int = 8) -> tuple[IntegerNetwork, np.ndarray]:
    """A Linear over signed codes, all weights of one sign, and pixels at both ends of their range."""
    features, top = features_side**2, delta(bits)
    weight = np.full((2, features), top)
    weight[1] = -top
    weight[:, 0] = [1, -1]
    nodes: list[Node] = [
        Flatten("flat", "input"),
        Linear("linear", "flat", weight, bits),
        BnAffine("bn", "linear", np.array([1, 1]), np.array([0, 0]), np.array([0, 0])),
        lif("s", "bn"),
        Readout("readout", "s", np.ones((2, 2), int), 2, np.zeros(2, int)),
    ]
    net = network(nodes, (1, features_side, features_side), 2)
    pixels = np.stack([np.full((1, features_side, features_side), p, np.uint8) for p in (0, 255, 128)])
    return net, pixels


def test_the_float_carrier_falls_back_where_float32_is_not_exact() -> None:
    """1,156 inputs of -128 times 127 are 18.8 million, over 2**24; the same with 4 bits stays below."""
    net, pixels = wide_linear(34)
    assert "MatMulInteger" in names(to_onnx(net, carrier="float"))
    assert_exact(net, pixels)
    net, pixels = wide_linear(34, 4)
    assert "MatMulInteger" not in names(to_onnx(net, carrier="float"))
    assert "MatMulInteger" in names(to_onnx(net, carrier="int"))
    assert_exact(net, pixels)


def test_a_linear_layer_too_large_for_uint8_sums_takes_int32() -> None:
    net, pixels = wide_linear(128)
    assert net.proof.channel_bounds["linear"][1][0] < 2**31
    for carrier in CARRIERS:
        assert "MatMulInteger" not in names(to_onnx(net, carrier=carrier))
    assert_exact(net, pixels)


def test_the_int_carrier_holds_no_float_and_only_uint8_products() -> None:
    """Signed 8-bit operands saturate on some processors, and int64 Clip is wrong in ONNX Runtime; neither may occur."""
    kinds = onnx.TensorProto
    seen = set()
    for seed in range(30):
        net, _ = seeded_case(seed)
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(to_onnx(net, trace=True)), data_prop=False)
        types = {t.name: t.data_type for t in model.graph.initializer}
        values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
        types |= {value.name: value.type.tensor_type.elem_type for value in values}
        assert not {kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16} & set(types.values())
        for node in model.graph.node:
            seen.add(node.op_type)
            if node.op_type in ("ConvInteger", "MatMulInteger"):
                assert [types[name] for name in node.input] == [kinds.UINT8] * 4
            if node.op_type in ("Clip", "Greater", "LessOrEqual"):
                assert types[node.input[0]] == kinds.INT32
    assert {"ConvInteger", "MatMulInteger", "Clip", "Greater"} <= seen


def test_static_nodes_stand_once() -> None:
    net = spiking([Conv("conv", "s", np.ones((2, 3, 1, 1), int), 2), BnAffine("b", "conv", [9, 9], [0, 0], [0, 0]),
                   lif("s2", "b"), *head("s2", 8)], (3, 2, 2), 5)  # fmt: skip
    unrolled, scanned = to_onnx(net), to_onnx(net, form="scan")
    assert names(unrolled).count("ConvInteger") == 1 + 5
    main = [node.op_type for node in onnx.load_from_string(scanned).graph.node]
    assert main.count("ConvInteger") == 1
    assert names(scanned).count("ConvInteger") == 2


def test_names_of_nodes_may_be_anything_printable() -> None:
    net, pixels = seeded_case(11)
    odd = ["pixels", "logits", "step", "a.h", "a", "int32", "steps", "é ✓", '"', "steps#c0", "shape"]
    renamed = {node.name: odd[place] if place < len(odd) else node.name for place, node in enumerate(net.nodes)}
    assert len(net.nodes) >= 6
    nodes = []
    for node in net.nodes:
        fields = {f: getattr(node, f) for f in vars(node)}
        fields |= {f: renamed[fields[f]] for f in ("name", "source", "other") if f in fields}
        nodes.append(type(node)(**fields))
    assert_exact(IntegerNetwork(tuple(nodes), net.input, net.timesteps, net.grid), pixels)


def test_metadata_and_signature() -> None:
    net, _ = seeded_case(3, events=True)
    net = IntegerNetwork(net.nodes, net.input, net.timesteps, net.grid, tuple(f"ä{i}" for i in range(net.classes)))
    model = onnx.load_from_string(to_onnx(net, form="scan", carrier="float", trace=True, digest="ab" * 32))
    assert model.producer_name == "mdsnn"
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "mdsnn.carrier": "float",
        "mdsnn.form": "scan",
        "mdsnn.timesteps": str(net.timesteps),
        "mdsnn.digest": "ab" * 32,
        "mdsnn.labels": "[" + ", ".join(f'"\\u00e4{i}"' for i in range(net.classes)) + "]",
    }
    assert [value.name for value in model.graph.output][:4] == ["logits", *(f"{net.lifs[0].name}.{w}" for w in "hsq")]
    sizes = [size.dim_value or size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [net.timesteps, "N", net.input.channels, net.input.height, net.input.width]


_PROCESS = """
import hashlib, sys
from planted import seeded_case
from mdsnn.export.onnx import CARRIERS, FORMS, OnnxExecutor, to_onnx
for seed in (0, 1, 2, 3):
    net, pixels = seeded_case(seed)
    for form in FORMS:
        for carrier in CARRIERS:
            print(hashlib.sha256(to_onnx(net, form=form, carrier=carrier, trace=True)).hexdigest())
            OnnxExecutor(net, form=form, carrier=carrier).run(pixels)
"""


def test_the_same_network_gives_the_same_bytes_in_every_process_and_running_says_nothing() -> None:
    def hashes(seed: str) -> list[str]:
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.split()

    here = [
        hashlib.sha256(to_onnx(seeded_case(seed)[0], form=form, carrier=carrier, trace=True)).hexdigest()
        for seed in range(4)
        for form, carrier in COMBINATIONS
    ]
    assert hashes("1") == here
    assert hashes("2") == here
    assert len(set(here)) == len(here)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("argument", [{"form": "loop"}, {"carrier": "double"}])
def test_an_unknown_form_or_carrier_lists_the_choices(argument: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"is none of (unrolled, scan|int, float)"):
        to_onnx(seeded_case(0)[0], **argument)


def test_a_convolution_too_large_for_uint8_sums_is_refused() -> None:
    channels = 15_000
    nodes: list[Node] = [
        Conv("conv", "input", np.ones((1, channels, 1, 1), int), 2),
        BnAffine("b", "conv", [1], [0], [0]),
        lif("s", "b"),
        Readout("readout", "s", np.ones((1, 1), int), 2, [0]),
    ]
    net = network(nodes, (channels, 1, 1), 2)
    with pytest.raises(LoweringError, match=r"node 'conv': 15000 inputs of \(-128, 127\).*carrier='float'"):
        to_onnx(net, carrier="int")
    pixels = np.full((1, channels, 1, 1), 255, np.uint8)
    assert_same_trace(OnnxExecutor(net, carrier="float").run(pixels), reference(net, pixels))


def test_too_many_operators_name_the_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    net = spiking(head("s", 12), (3, 2, 2), 40)
    monkeypatch.setattr(target, "MAX_OPERATORS", 100)
    with pytest.raises(LoweringError, match=r"more than 100 operators. Use form='scan'"):
        to_onnx(net)
    check_model(to_onnx(net, form="scan"))


def test_constants_beyond_the_protobuf_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "MAX_CONSTANTS", 100)
    with pytest.raises(LoweringError, match="'input/table': the constants take over 100 bytes"):
        to_onnx(seeded_case(0)[0])


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_names_the_line_that_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = seeded_case(0)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError, match=f"{package} does not import.*pip install"):
        OnnxExecutor(net)


def test_pixels_that_do_not_fit_are_refused() -> None:
    net, pixels = seeded_case(1, events=False)
    executor = OnnxExecutor(net)
    wrong = [pixels.astype(np.int32), pixels[0], pixels[:, :, :-1], pixels[:0], pixels[None]]
    for array in wrong:
        with pytest.raises(InputError, match=r"uint8 \[N, "):
            executor.run(array)
    assert_same_bits(executor.run(np.asfortranarray(pixels)).logits, executor.run(pixels).logits, "Fortran order")
    with pytest.raises(ConfigError, match="threads"):
        OnnxExecutor(net, threads=0)


# ---------------------------------------------------------------------------------------- files and foreign models


def test_save_and_load(tmp_path: Path) -> None:
    model = to_onnx(seeded_case(2)[0])
    path = tmp_path / "net.onnx"
    assert save_onnx(path, model) == len(model)
    assert load_onnx(path) == model
    with pytest.raises(StorageError, match="exists and is kept"):
        save_onnx(path, model)
    save_onnx(path, b"\xff" * 30, force=True)
    with pytest.raises(ArtifactError, match=r"net\.onnx: "):
        load_onnx(path)
    with pytest.raises(InputError, match="over the limit of 29"):
        load_onnx(path, limit=29)


def _external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


def _external_attribute(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "ConstantOfShape")
    node.attribute[0].t.external_data.add(key="location", value="../secret")


def _scan_twice(model: Any) -> None:
    model.graph.node.add().CopyFrom(next(node for node in model.graph.node if node.op_type == "Scan"))


def _scan_in_scan(model: Any) -> None:
    scan = next(node for node in model.graph.node if node.op_type == "Scan")
    inner = copy.deepcopy(scan)
    scan.attribute[0].g.node.append(inner)


TAMPERINGS: list[tuple[str, Callable[[Any], object]]] = [
    ("points to an external file", _external),
    ("points to an external file", _external_attribute),
    ("more than one Scan", _scan_twice),
    ("more than one Scan", _scan_in_scan),
    ("operator 'Loop' is not one", lambda m: setattr(m.graph.node[0], "op_type", "Loop")),
    ("operator 'Cast' is not one", lambda m: setattr(m.graph.node[0], "domain", "com.example")),
    ("attribute 'strides' is not one", lambda m: m.graph.node[0].attribute.add(name="strides", type=2, i=1)),
    ("functions or training", lambda m: m.functions.add(name="f")),
    ("functions or training", lambda m: m.training_info.add()),
    ("sparse tensors", lambda m: m.graph.sparse_initializer.add()),
    ("not opset 17", lambda m: setattr(m.opset_import[0], "version", 18)),
    ("not opset 17", lambda m: m.opset_import.add(domain="com.example", version=1)),
    ("not opset 17", lambda m: setattr(m, "ir_version", 99)),
    ("its inputs are", lambda m: setattr(m.graph.input[0], "name", "x")),
    ("its inputs are", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1)),
    ("with only N free", lambda m: m.graph.input[0].type.tensor_type.shape.dim[2].Clear()),
    ("its outputs are", lambda m: m.graph.output.add().CopyFrom(m.graph.input[0])),
    ("its outputs are", lambda m: setattr(m.graph.output[2].type.tensor_type, "elem_type", 6)),
    ("onnx.checker refuses it", lambda m: m.graph.node.pop(0)),
    ("attribute 'to' is not one", lambda m: setattr(m.graph.node[0], "op_type", "Add")),
    ("onnx.checker refuses it", lambda m: m.graph.node[0].input.append("pixels")),
]


@pytest.mark.parametrize("place", range(len(TAMPERINGS)))
def test_a_foreign_model_is_refused(place: int) -> None:
    message, tamper = TAMPERINGS[place]
    model = onnx.load_from_string(to_onnx(seeded_case(4, events=False)[0], form="scan", trace=True))
    check_model(model.SerializeToString())
    tamper(model)
    with pytest.raises(ArtifactError, match=message):
        check_model(model.SerializeToString())


def test_bytes_that_are_no_model_are_refused() -> None:
    model = to_onnx(seeded_case(4)[0])
    for content in (b"", b"\x00" * 9, b"\xff" * 100, model[:-1], model[: len(model) // 2]):
        with pytest.raises(ArtifactError):
            OnnxExecutor(content)
    with pytest.raises(ArtifactError, match=f"foreign: {len(model)} bytes are outside 1..10"):
        check_model(model, where="foreign", limit=10)


def test_no_flipped_byte_of_a_small_model_escapes_as_another_error() -> None:
    model = to_onnx(network(head("input", 1), (1, 1, 1), 1))
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(model), 300, replace=False):
        broken = bytearray(model)
        broken[place] ^= 1 << int(rng.integers(8))
        try:
            check_model(bytes(broken))
        except ArtifactError:
            refused += 1
    assert refused > 100


def test_verify_runs_the_models_and_finds_a_changed_threshold() -> None:
    net, pixels = seeded_case(21, samples=3, events=False)
    executors = {"reference": kernel_executor(net, "reference")}
    for form, carrier in COMBINATIONS:
        executors[f"{form}-{carrier}"] = OnnxExecutor(net, form=form, carrier=carrier)
    assert verify(net, executors, pixels, batch=2).agrees
    last = net.lifs[-1]
    h, s = reference(net, pixels).lifs[last.name].h, reference(net, pixels).lifs[last.name].s
    changed = {f: getattr(last, f) for f in vars(last)}
    if last.quantize == "post_reset":  # one more comparison goes wrong: the largest h that stayed silent
        changed["v_th"] = int(h[s == 0].max()) - 1
    else:  # the smallest code that h reaches counts one less
        changed["thresholds"] = np.concatenate([last.thresholds[:-1], [2**31 - 1]])
    other = IntegerNetwork(
        tuple(Lif(**changed) if n is last else n for n in net.nodes), net.input, net.timesteps, net.grid
    )
    result = verify(net, {"reference": executors["reference"], "onnx": OnnxExecutor(other)}, pixels)
    assert result.first is not None
    assert result.first.layer == last.name

"""The lowered network computes the frozen model's integers: every h, s, q and logit, whatever the composition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mdsnn.export import lower as lowering
from mdsnn.export.lower import affine_bytes, lower, tabulate
from mdsnn.freeze import freeze, frozen_trace, plan_of
from mdsnn.kernels.engine import run
from mdsnn.kernels.errors import LoweringError
from mdsnn.kernels.formats import Grid
from mdsnn.kernels.network import Add, BnAffine, BnDense, Conv, Lif, Readout, SumPool
from mdsnn.layers import (
    LIF,
    EventInput,
    Flatten,
    PixelInput,
    QuantBatchNorm2d,
    QuantConv2d,
    QuantLinear,
    SpikeMaxPool2d,
)
from mdsnn.layers import Readout as ReadoutLayer
from mdsnn.models import ms_resnet, vgg
from planted import assert_same_bits
from students import drawn_student, plant, seeded_student

TABLES = ["auto", "affine", "dense"]


def assert_lowers(frozen, x, **options):
    """Lower, run the reference, compare every integer; returns the network."""
    network = lower(frozen, **options)
    trace, logits = frozen_trace(frozen, x)
    result = run(network, x, kernels="reference", trace=True, threads=1)
    assert list(trace) == list(result.trace.lifs)
    for name, states in trace.items():
        for what, got in zip("hsq", states, strict=True):
            assert_same_bits(got, getattr(result.trace.lifs[name], what), f"{what} of {name!r} [T,N,C,H,W]")
    assert_same_bits(logits, result.logits, "logits")
    return network


def student(**options):
    bits = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8}
    generator = torch.Generator().manual_seed(1)
    return ms_resnet((1, 1), (4, 6), in_channels=1, size=(8, 8), generator=generator, **{**bits, **options})


def pixels(n=3, c=1, steps=None):
    shape = (n, c, 8, 8) if steps is None else (steps, n, c, 8, 8)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def warmed(model, x):
    """A few training batches, so that BN and alpha have seen data."""
    for _ in range(5):
        model(torch.from_numpy(x))
    return model


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_composition_with_planted_ties(data):
    model, x, size = drawn_student(data.draw)
    frozen = freeze(model, input_size=size)
    plant(frozen, x, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert_lowers(frozen, x, bn_table=data.draw(st.sampled_from(TABLES)))


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_two_hundred_seeded_compositions(start):
    fired = 0
    for seed in range(start, start + 50):
        model, x, size = seeded_student(seed)
        frozen = freeze(model, input_size=size)
        plant(frozen, x, np.random.default_rng(seed))
        network = assert_lowers(frozen, x, bn_table=TABLES[seed % 3])
        fired += any(s.any() for _, s, _ in frozen_trace(frozen, x)[0].values())
        assert len(network.lifs) >= 1
    assert fired > 35  # a silent network agrees with everything


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("membrane_bits", [2, 5, 8])
def test_ms_resnet_at_every_width(weight_bits, membrane_bits):
    model = warmed(student(weight_bits=weight_bits, membrane_bits=membrane_bits), pixels(8))
    assert_lowers(freeze(model), pixels(), bn_table=TABLES[weight_bits % 3])


@pytest.mark.parametrize(
    "options",
    [
        {"reset": "soft", "tau": 0.25},
        {"quantize": "pre_fire", "v_th": 0.3},
        {"coding": "events", "timesteps": 3},
        {"stem": "imagenet"},
        {"alpha": "dynamic", "timesteps": 1},
        {"alpha": "learned", "timesteps": 8},
        {"bn_grid": "wageubn", "shortcut_bits": 4, "stem_bits": 3},
        {"grid": Grid(12, 3), "surrogate": "rectangle"},
    ],
)
def test_ms_resnet_in_every_variant(options):
    x = pixels(8, steps=options["timesteps"] if "coding" in options else None)
    model = warmed(student(**options), x)
    for table in TABLES:
        assert_lowers(freeze(model), x, bn_table=table)


def test_vgg():
    x = pixels(8)
    model = warmed(vgg((1, 2), (4, 6), hidden=7, in_channels=1, size=8, weight_bits=3, membrane_bits=4, bn_bits=8), x)
    kinds = [type(node).__name__ for node in assert_lowers(freeze(model), x).nodes]
    assert {"MaxPool", "Flatten", "Linear"} <= set(kinds)


class Own(nn.Module):
    """A user's composition: two branches that meet, a method `add`, torch.add, a bare convolution with bias."""

    def __init__(self):
        super().__init__()
        self.pixels = PixelInput([0.3, 0.6], [0.2, 0.3])
        self.left = nn.Sequential(QuantConv2d(2, 6, 3, 1, 1, weight_bits=8), QuantBatchNorm2d(6))
        self.right = QuantConv2d(2, 6, 1, bias=True, weight_bits=5, output_grid=Grid())
        self.fire = nn.ModuleDict({"a": LIF(3, bits=3), "b": LIF(3, 0.9, 0.2, "soft", bits=6)})
        self.grouped = QuantConv2d(6, 6, 3, 1, 1, groups=3, weight_bits=2)
        self.norm = QuantBatchNorm2d(6, 6)
        self.pool, self.flat = SpikeMaxPool2d(3, 2, 1), Flatten()
        self.fc = QuantLinear(96, 9, weight_bits=3, output_grid=Grid())
        self.last = LIF(3, 0.7, bits=4)
        self.out = ReadoutLayer(9, 4)

    def forward(self, x):
        codes = self.pixels(x)
        stream = self.left(codes).add(self.right(codes))
        stream = torch.add(stream, self.norm(self.grouped(self.fire["a"](stream))))
        stream += stream
        return self.out(self.last(self.fc(self.flat(self.pool(self.fire["b"](stream))))))


def test_a_users_own_composition():
    torch.manual_seed(0)
    x = pixels(8, 2)
    model = warmed(Own(), x)
    frozen = freeze(model, input_size=(8, 8))
    network = assert_lowers(frozen, x, labels=["a", "b", "c", "d"])
    names = [node.name for node in network.nodes]
    assert names == [
        "pixels", "left.0", "left.1", "right", "right.table", "add", "fire.a", "grouped", "norm", "add2", "add3",
        "fire.b", "pool", "flat", "fc", "fc.table", "last", "out",
    ]  # fmt: skip
    assert network["add"] == Add("add", "left.1", "right.table")
    assert network["add3"].inputs == ("add2", "add2")
    assert network.labels == ("a", "b", "c", "d")


@pytest.mark.parametrize(("variance", "dtype"), [(0.0, torch.int64), (100.0, torch.int32)])
def test_products_of_33_bits_and_more_are_wide(variance, dtype):
    """A dead channel (sigma = sqrt(eps)) of 2-bit weights on full event counts: |A| is over 2**15, A*acc over 2**31."""
    conv, bn = QuantConv2d(8, 2, 5, weight_bits=2), QuantBatchNorm2d(2, output_grid=Grid())
    conv.weight.data.fill_(2.0)
    conv.weight.data[1] *= -1
    bn.running_var.fill_(variance)
    model = nn.Sequential(EventInput(8), conv, bn, LIF(2, bits=4), ReadoutLayer(2, 2)).eval()
    frozen = freeze(model, input_size=(6, 6))
    table = frozen[2].constants
    assert table.multiplier.dtype == dtype
    assert (int(table.multiplier.abs().max()) >= 2**15) == (dtype == torch.int64)
    for level in (0, 1, 90, 127):
        network = assert_lowers(frozen, np.full((2, 1, 8, 6, 6), level, np.uint8), bn_table="affine")
    assert network.proof.product_bits["2"] == (64 if dtype == torch.int64 else 32)
    full = torch.full((1, 1, 8, 6, 6), 127)
    assert int(frozen[2](frozen[1](full))[0, 0, 0, 0, 0]) == 4096  # wrapped, it would be -4096


def test_nodes_carry_the_frozen_constants():
    frozen = freeze(warmed(student(), pixels(8)))
    network = lower(frozen, bn_table="affine")
    conv, lif, readout = network["groups.1.0.conv1"], network["lif"], network.readout
    assert isinstance(conv, Conv)
    assert (conv.stride, conv.padding, conv.groups, conv.bits) == (2, 1, 1, 4)
    np.testing.assert_array_equal(conv.weight, frozen.groups[1][0].conv1.constants.weight.numpy())
    assert isinstance(lif, Lif)
    np.testing.assert_array_equal(lif.thresholds, frozen.lif.constants.thresholds.numpy())
    assert isinstance(readout, Readout)
    np.testing.assert_array_equal(readout.bias, frozen.readout.constants.bias.numpy())
    assert network["readout.pool"] == SumPool("readout.pool", "lif", 4, 4)
    for step in plan_of(frozen).steps:  # freeze and the network's own proof say the same of every value
        if step.op != "Readout":
            assert network.proof.shapes[step.name] == step.signal.shape
            assert network.proof.kinds[step.name] == step.signal.kind
            if step.op != "LIF":
                assert network.proof.ranges[step.name] == (step.signal.low, step.signal.high)


def test_auto_takes_the_dense_form_within_the_budget():
    frozen = freeze(student())
    sizes = {}
    for node in lower(frozen, bn_table="dense").nodes:
        if isinstance(node, BnDense):
            sizes[node.name] = node.table.size * 2  # C = 4096 fits int16
    budget = sorted(sizes.values())[2]
    for limit in (budget, budget - 1, 0):
        network = lower(frozen, bn_budget=limit)
        for name, size in sizes.items():
            assert isinstance(network[name], BnDense) == (size <= limit), name
    assert not any(isinstance(node, BnDense) for node in lower(frozen, bn_table="affine").nodes)
    wide = lower(freeze(student(grid=Grid(12, 64))), bn_table="dense")  # C = 262144 needs int32
    name = "groups.0.0.bn1"
    assert wide.notes[f"{name}.bytes"].endswith(f"dense {wide[name].table.size * 4}")


def test_notes_record_the_real_constants():
    frozen = freeze(warmed(student(), pixels(8)))
    network = lower(frozen)
    assert float.fromhex(network.notes["lif.alpha"]) == frozen.lif.constants.alpha
    assert float.fromhex(network.notes["stem.alpha"]) == frozen.stem.constants.alpha
    assert float.fromhex(network.notes["stem.step"]) == 2.0**-5
    assert float.fromhex(network.notes["groups.1.0.shortcut.1.step"]) == 2.0**-4
    assert float.fromhex(network.notes["readout.unit"]) == frozen.readout.constants.unit
    table = frozen.stem_bn.constants
    multiplier, t = table.multiplier.flatten().double(), table.bias
    assert float.fromhex(network.notes["stem_bn.rounding"]) == pytest.approx(
        float(((4096 + t.abs() * 512) / (2 * multiplier.abs())).max())
    )
    affine = lower(frozen, bn_table="affine")["stem_bn"]
    assert isinstance(affine, BnAffine)
    assert network.notes["stem_bn.bytes"].startswith(f"affine {affine_bytes(affine)}, dense ")
    assert affine_bytes(affine) == 4 * (2 + 4 + 1)


def test_two_exports_are_the_same_network():
    model = warmed(student(), pixels(8))
    one, two = lower(freeze(model)), lower(freeze(model))
    assert one.notes == two.notes
    for a, b in zip(one.nodes, two.nodes, strict=True):
        assert type(a) is type(b)
        for key, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, key))


def test_a_dense_table_that_differs_from_the_affine_form_is_refused(monkeypatch):
    node = BnAffine("bn", "conv", np.array([3, -5]), np.array([1, 2]), np.array([1, 0]))
    low, high = np.array([-9, -4]), np.array([7, 12])
    good = tabulate(node, low, high, Grid())
    assert good.table.size == 17 + 17
    real = lowering.dense_table
    for place in (0, 16, 17, 33):

        def broken(*constants, place=place):
            table = real(*constants)
            table[place] += 1
            return table

        monkeypatch.setattr(lowering, "dense_table", broken)
        acc = low[place // 17] + place % 17
        with pytest.raises(LoweringError, match=rf"'bn': channel {place // 17}: .* at accumulator {acc}, the affine"):
            tabulate(node, low, high, Grid())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (student, {}, "MSResNet is not frozen"),
        (lambda: freeze(student()), {"bn_table": "sparse"}, "'sparse' is not one of auto, affine, dense"),
        (lambda: freeze(student()), {"labels": ["a", "b"]}, "no valid network.*10 logits, but 2 labels"),
        (lambda: freeze(student(timesteps=257)), {}, "no valid network: timesteps = 257"),
    ],
)
def test_refused(make, options, message):
    with pytest.raises(LoweringError, match=message):
        lower(make(), **options)


def test_a_dense_table_beyond_all_bounds_is_refused(monkeypatch):
    monkeypatch.setattr(lowering, "DENSE_LIMIT", 1000)
    with pytest.raises(LoweringError, match=r"'stem_bn': its dense table takes \d+ bytes, over the limit of 1000"):
        lower(freeze(student()), bn_table="dense")


def test_a_layer_may_have_the_name_of_a_node():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = PixelInput([0.5], [0.25])
            self.conv = nn.Sequential(QuantConv2d(1, 2, 1, weight_bits=4, output_grid=Grid()))
            self.add, self.readout = LIF(2, bits=4), ReadoutLayer(2, 3)

        def forward(self, x):
            x = self.conv(self.input(x))
            return self.readout(self.add(x + x))

    network = assert_lowers(freeze(Named(), input_size=(8, 8)), pixels())
    assert [n.name for n in network.nodes] == [
        "input", "conv.0", "conv.0.table", "add2", "add", "readout.pool", "readout",
    ]  # fmt: skip

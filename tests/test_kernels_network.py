"""The prover: every refusal names its node; what it proves is exact, or at least never too small."""

import itertools
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from mdsnn.kernels import network as graph
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import NetworkError
from mdsnn.kernels.formats import Grid, decode_table, image_table, requantize_thresholds
from mdsnn.kernels.network import (
    Add,
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
    Requantize,
    SumPool,
)
from planted import network_cases, seeded_case


def lif(name: str, source: str, bits: int = 4, **options: Any) -> Lif:
    grid = Grid()
    return Lif(
        name, source, bits, decode_table(0.6, 0.5, bits, grid), requantize_thresholds(0.6, bits, grid), 255, **options
    )


def bn(name: str, source: str, channels: int) -> BnAffine:
    return BnAffine(name, source, np.full(channels, 3), np.zeros(channels, np.int64), np.zeros(channels, np.uint8))


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-7, 8, shape)


NODES: tuple[Node, ...] = (
    InputTable("input", image_table([0.5, 0.5], [0.25, 0.25])),
    Conv("conv", "input", weight(4, 2, 3, 3), 4, 1, 1, 1),
    bn("bn", "conv", 4),
    lif("lif1", "bn"),
    Conv("conv2", "lif1", weight(4, 4, 1, 1), 4),
    bn("bn2", "conv2", 4),
    Requantize("codes", "bn", 5, 8),
    Conv("shortcut", "codes", weight(4, 4, 1, 1), 4),
    bn("bn3", "shortcut", 4),
    Add("add", "bn2", "bn3"),
    lif("lif2", "add", reset="soft", v_soft=256),
    MaxPool("pool", "lif2", 2, 2),
    SumPool("sum", "pool", 2, 2, 2),
    Flatten("flat", "sum"),
    Linear("fc", "flat", weight(5, 4), 4),
    bn("bn4", "fc", 5),
    lif("lif3", "bn4", quantize="pre_fire", q_th=2),
    Readout("readout", "lif3", weight(3, 5), 4, np.zeros(3, np.int32)),
)
SPEC = InputSpec(2, 4, 4)


def build(*nodes: Node, **options: Any) -> IntegerNetwork:
    """The network above with nodes of the same names replaced."""
    new = {node.name: node for node in nodes}
    settings = {"input": SPEC, "timesteps": 2, **options}
    return IntegerNetwork(tuple(new.get(node.name, node) for node in NODES), **settings)


def swap(name: str, **changes: Any) -> Node:
    return replace(next(node for node in NODES if node.name == name), **changes)


def test_the_network_of_these_tests_is_proven():
    proof = build().proof
    assert proof.shapes == {
        "input": (2, 4, 4), "conv": (4, 4, 4), "bn": (4, 4, 4), "lif1": (4, 4, 4), "conv2": (4, 4, 4), "bn2": (4, 4, 4),
        "codes": (4, 4, 4), "shortcut": (4, 4, 4), "bn3": (4, 4, 4), "add": (4, 4, 4), "lif2": (4, 4, 4),
        "pool": (4, 2, 2), "sum": (4, 1, 1), "flat": (4, 1, 1), "fc": (5, 1, 1),
        "bn4": (5, 1, 1), "lif3": (5, 1, 1), "readout": (3, 1, 1),
    }  # fmt: skip
    assert {name for name, static in proof.static.items() if static} == {
        "input", "conv", "bn", "codes", "shortcut", "bn3",
    }  # fmt: skip
    assert proof.kinds["sum"] == proof.kinds["flat"] == "counts"
    assert proof.ranges["sum"] == (0, 4)
    assert proof.ranges["add"] == (-8192, 8192)
    assert proof.ranges["codes"] == (-127, 127)
    assert proof.dtypes["lif1"] == np.uint8
    assert proof.dtypes["add"] == np.int16
    decode = decode_table(0.6, 0.5, 4, Grid())
    assert proof.membranes["lif2"] == (-8192 + decode[0], 8192 + decode[-1])


# ---------------------------------------------------------------------------------------------------- refusals

LATE = 2**31 - 1
"""Each case: nodes to replace, then texts that the message must hold; the first is the node's name."""
REFUSED: dict[str, tuple[list[Node], list[str]]] = {
    "table of other channels": (
        [swap("input", table=np.zeros((3, 256), np.int8))],
        ["'input'", "(3, 256)", "(2, 256)"],
    ),
    "weight of 3 axes": ([swap("conv", weight=weight(4, 2, 3))], ["'conv'", "4 axes"]),
    "weight code too large": ([swap("conv", weight=np.full((4, 2, 3, 3), 8))], ["'conv'", "outside -7..7", "4 bits"]),
    "weight code too small": ([swap("conv", weight=np.full((4, 2, 3, 3), -8))], ["'conv'", "outside -7..7"]),
    "empty weight": ([swap("conv", weight=np.zeros((0, 2, 3, 3), np.int8))], ["'conv'", "empty"]),
    "weight bits": ([swap("conv", bits=9)], ["'conv'", "9 is outside 2..8"]),
    "weight bits a bool": ([swap("conv", bits=True)], ["'conv'", "True is outside 2..8"]),
    "channels of a convolution": (
        [swap("conv", weight=weight(4, 3, 3, 3))],
        ["'conv'", "does not fit 2 input channels"],
    ),
    "groups that do not divide": ([swap("conv2", groups=3)], ["'conv2'", "3 groups"]),
    "groups over channels": ([swap("conv2", groups=5)], ["'conv2'", "groups = 5 is outside 1..4"]),
    "groups of 0": ([swap("conv2", groups=0)], ["'conv2'", "groups = 0 is outside 1..4"]),
    "stride of 0": ([swap("conv", stride=0)], ["'conv'", "stride = 0 is outside 1..4096"]),
    "stride a float": ([swap("conv", stride=1.0)], ["'conv'", "stride = 1.0"]),
    "padding over the kernel": ([swap("conv", padding=3)], ["'conv'", "padding = 3 is outside 0..2"]),
    "negative padding": ([swap("conv", padding=-1)], ["'conv'", "padding = -1"]),
    "kernel over the input": (
        [swap("conv", weight=weight(4, 2, 5, 5), padding=0)],
        ["'conv'", "window of 5", "input of 4"],
    ),
    "multiplier of other channels": (
        [swap("bn", multiplier=np.ones(3, np.int32))],
        ["'bn'", "multiplier", "(3,)", "(4,)"],
    ),
    "offset of other channels": ([swap("bn", offset=np.ones(5, np.int64))], ["'bn'", "offset"]),
    "shift of other channels": ([swap("bn", shift=np.zeros(1, np.uint8))], ["'bn'", "shift"]),
    "shift of 25": ([swap("bn", shift=np.full(4, 25))], ["'bn'", "shift of 25 is over 24"]),
    "product beyond 62 bits": ([swap("bn", offset=np.full(4, 2**62))], ["'bn'", "62 bits"]),
    "negative product beyond 62 bits": ([swap("bn", offset=np.full(4, -(2**63)))], ["'bn'", "62 bits"]),
    "sum beyond 62 bits": ([swap("bn", offset=np.full(4, 2**62 - 1))], ["'bn'", "62 bits"]),
    "dense table of a wrong size": ([BnDense("bn", "conv", np.zeros(7, np.int32))], ["'bn'", "table has shape (7,)"]),
    "sources of unequal shapes": ([swap("conv2", stride=2)], ["'add'", "(4, 2, 2)", "(4, 4, 4)"]),
    "requantize shift of 0": ([swap("codes", shift=0)], ["'codes'", "shift = 0 is outside 1..24"]),
    "requantize shift of 25": ([swap("codes", shift=25)], ["'codes'", "shift = 25"]),
    "requantize bits": ([swap("codes", bits=1)], ["'codes'", "1 is outside 2..8"]),
    "LIF bits": ([swap("lif1", bits=12)], ["'lif1'", "12 is outside 2..8"]),
    "decode of other bits": (
        [swap("lif1", decode=np.zeros(13, np.int32))],
        ["'lif1'", "decode has shape (13,)", "(15,)"],
    ),
    "thresholds of other bits": ([swap("lif1", thresholds=np.zeros(15, np.int32))], ["'lif1'", "thresholds", "(14,)"]),
    "descending thresholds": ([swap("lif1", thresholds=-np.arange(14))], ["'lif1'", "thresholds descend"]),
    "thresholds whose difference wraps": (
        [swap("lif1", thresholds=np.array([0] * 12 + [LATE, -LATE]))],
        ["'lif1'", "thresholds descend"],
    ),
    "descending decode": ([swap("lif1", decode=-np.arange(15))], ["'lif1'", "decode table descends"]),
    "reset": ([swap("lif1", reset="none")], ["'lif1'", "'none' is none of hard, soft"]),
    "place of quantization": ([swap("lif1", quantize="never")], ["'lif1'", "'never' is none of post_reset, pre_fire"]),
    "pre_fire with a soft reset": ([swap("lif3", reset="soft", v_soft=1)], ["'lif3'", "only the hard reset"]),
    "negative v_th": ([swap("lif1", v_th=-1)], ["'lif1'", "v_th = -1"]),
    "v_th beyond 30 bits": ([swap("lif1", v_th=2**30)], ["'lif1'", "v_th"]),
    "v_th a bool": ([swap("lif1", v_th=True)], ["'lif1'", "v_th = True"]),
    "v_th a NumPy integer": ([swap("lif1", v_th=np.int64(4))], ["'lif1'", "v_th"]),
    "v_soft with a hard reset": ([swap("lif1", v_soft=1)], ["'lif1'", "v_soft = 1 is outside 0..0"]),
    "v_soft of 0": ([swap("lif2", v_soft=0)], ["'lif2'", "v_soft = 0 is outside 1.."]),
    "q_th without pre_fire": ([swap("lif1", q_th=1)], ["'lif1'", "q_th = 1 is outside 0..0"]),
    "q_th that never fires": ([swap("lif3", q_th=7)], ["'lif3'", "q_th = 7 is outside 0..6"]),
    "membrane beyond 31 bits": (
        [swap("lif1", decode=np.array([0] * 14 + [2**30 - 4096]))],
        ["'lif1'", "membrane reaches", "31 bits"],
    ),
    "max pool of counts": ([MaxPool("flat", "sum", 1, 1)], ["'flat'", "counts from 'sum'", "spikes are needed"]),
    "max pool padding": ([swap("pool", padding=2)], ["'pool'", "padding = 2 is outside 0..1"]),
    "max pool kernel over the input": ([swap("pool", kernel=5)], ["'pool'", "window of 5", "input of 4"]),
    "max pool kernel of 0": ([swap("pool", kernel=0)], ["'pool'", "kernel = 0"]),
    "sum pool padding": ([swap("sum", padding=2)], ["'sum'", "padding = 2 is outside 0..1"]),
    "sum pool kernel": ([swap("sum", kernel_width=4097)], ["'sum'", "kernel_width = 4097"]),
    "sum pool of the stream": ([SumPool("lif2", "add", 2, 2)], ["'lif2'", "stream from 'add'"]),
    "flatten of accumulators": ([Flatten("bn4", "fc")], ["'bn4'", "accumulators from 'fc'"]),
    "convolution of the stream": (
        [Conv("codes", "bn", weight(4, 4, 1, 1), 4)],
        ["'codes'", "stream from 'bn'", "codes"],
    ),
    "BN of a stream": ([bn("bn4", "add", 4)], ["'bn4'", "stream from 'add'", "accumulators"]),
    "LIF of accumulators": ([lif("lif1", "conv")], ["'lif1'", "accumulators from 'conv'"]),
    "requantize of spikes": ([Requantize("pool", "lif2", 5, 8)], ["'pool'", "spikes from 'lif2'"]),
    "add of accumulators": ([Add("add", "bn2", "conv")], ["'add'", "accumulators from 'conv'"]),
    "add of accumulators, first": ([Add("add", "conv", "bn2")], ["'add'", "accumulators from 'conv'"]),
    "linear of an image": ([Linear("fc", "pool", weight(5, 4), 4)], ["'fc'", "(4, 2, 2)", "put a Flatten"]),
    "linear of other inputs": ([swap("fc", weight=weight(5, 6))], ["'fc'", "(5, 6)", "(outputs, 4)"]),
    "linear of 4 axes": ([swap("fc", weight=weight(5, 4, 1, 1))], ["'fc'", "(5, 4, 1, 1)"]),
    "readout of other inputs": ([swap("readout", weight=weight(3, 6))], ["'readout'", "(3, 6)"]),
    "readout bias": ([swap("readout", bias=np.zeros(4, np.int32))], ["'readout'", "bias has shape (4,)"]),
    "logits beyond 32 bits": ([swap("readout", bias=np.array([0, LATE, 0]))], ["'readout'", "logits reach", "32 bits"]),
    "negative logits beyond 32 bits": ([swap("readout", bias=np.array([0, -LATE, 0]))], ["'readout'", "32 bits"]),
    "a source that comes later": ([swap("bn", source="conv2")], ["'bn'", "reads 'conv2', which is no node before it"]),
    "a source that is not there": ([swap("bn", source="nobody")], ["'bn'", "reads 'nobody'"]),
    "a source that is itself": ([swap("bn", source="bn")], ["'bn'", "reads 'bn'"]),
    "a source of another type": ([swap("bn", source=["conv"])], ["'bn'", "reads ['conv']"]),
    "a node nobody reads": ([swap("add", other="bn2")], ["'bn3'", "nothing reads it"]),
    "a second input": ([InputTable("codes", np.zeros((2, 256), np.int8))], ["'codes'", "must be the first"]),
    "a second readout": (
        [Readout("codes", "lif1", weight(3, 5), 4, np.zeros(3, np.int32))],
        ["'codes'", "must be the last"],
    ),
    "no readout": ([lif("readout", "bn4")], ["'readout'", "must be the last"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_each_fault_is_refused_by_a_message_that_names_the_node(what):
    nodes, texts = REFUSED[what]
    with pytest.raises(NetworkError) as caught:
        build(*nodes)
    for text in texts:
        assert text in str(caught.value)


def test_a_lif_cannot_be_called_logits_as_traces_call_the_readouts_values_so():
    nodes = [replace(node, name="logits") if node.name == "lif1" else node for node in NODES]
    nodes = [replace(node, source="logits") if node.name == "conv2" else node for node in nodes]
    with pytest.raises(NetworkError, match=r"node 'logits'.*cannot have this name"):
        IntegerNetwork(tuple(nodes), SPEC, 2)


def test_a_network_begins_with_its_input():
    with pytest.raises(NetworkError, match=r"'conv'.*must be the first"):
        IntegerNetwork(NODES[1:], SPEC, 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timesteps": 0}, "timesteps = 0 is outside 1..256"),
        ({"timesteps": 257}, "timesteps = 257"),
        ({"timesteps": True}, "timesteps = True"),
        ({"timesteps": 2.0}, "timesteps = 2.0"),
        ({"input": InputSpec(2, 4, 4, "video")}, "'video' is none of image, events"),
        ({"input": InputSpec(0, 4, 4)}, "channels = 0"),
        ({"input": InputSpec(2, 4097, 4)}, "height = 4097"),
        ({"input": InputSpec(2, 4, True)}, "width = True"),
        ({"labels": ("a", "b")}, "3 logits, but 2 labels"),
        ({"labels": ("a", "b", 3)}, "printable texts, got 3"),
        ({"labels": ("a", "b", "\ud800")}, "printable texts"),
        ({"notes": {"a\n": "b"}}, "printable texts"),
        ({"notes": {"a": "\x1b[2J"}}, "printable texts"),
        ({"notes": {"a": ["b"]}}, "printable texts"),
    ],
)
def test_each_fault_of_the_head_is_refused(options, text):
    with pytest.raises(NetworkError) as caught:
        build(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b", "x" * 201, "a\nb", "\ud800", None, 3, ("a",)])
def test_names_that_are_no_names_are_refused(name):
    with pytest.raises(NetworkError, match="is no name"):
        IntegerNetwork((NODES[0], replace(NODES[1], name=name), *NODES[2:]), SPEC, 2)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(NetworkError, match="node 2: the name 'conv' is taken"):
        IntegerNetwork((*NODES[:2], replace(NODES[2], name="conv"), *NODES[3:]), SPEC, 2)


@pytest.mark.parametrize("count", [0, 1, 4097])
def test_too_few_or_too_many_nodes_are_refused(count):
    with pytest.raises(NetworkError, match=r"nodes are outside 2\.\.4096"):
        IntegerNetwork(NODES[:1] * count, SPEC, 2)


def test_a_lying_subclass_is_no_node_no_grid_and_no_input():
    class Tame(Conv):
        @property
        def inputs(self) -> tuple[str, ...]:
            return ("lif1",)

    class Wide(Grid):
        @property
        def saturation(self) -> int:
            return 2**40

    class Small(InputSpec):
        pass

    conv = NODES[1]
    assert isinstance(conv, Conv)
    lying = Tame("conv", "input", conv.weight, 4, 1, 1, 1)
    with pytest.raises(NetworkError, match="Tame is not a node type"):
        build(lying)
    with pytest.raises(NetworkError, match="Wide"):
        build(grid=Wide())
    with pytest.raises(NetworkError, match="Small"):
        build(input=Small(2, 4, 4))
    with pytest.raises(NetworkError, match="object is not a node type"):
        IntegerNetwork((NODES[0], object(), *NODES[1:]), SPEC, 2)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.zeros((2, 256)), "integers were expected, got float64"),
        (np.zeros((2, 256), bool), "integers were expected, got bool"),
        (np.full((2, 256), 128), "128..128 does not fit int8"),
        (np.full((2, 256), -129), "-129..-129 does not fit int8"),
        (np.full((2, 256), 2**64 - 1, np.uint64), "does not fit int8"),
        ([[0] * 256, [0] * 255], "no array"),
        ([[10**30]], "integers were expected, got object"),
        (None, "integers were expected, got object"),
    ],
)
def test_arrays_of_other_values_are_refused_with_node_and_field(values, text):
    with pytest.raises(NetworkError) as caught:
        InputTable("input", values)
    assert "node 'input': table: " in str(caught.value)
    assert text in str(caught.value)


def test_arrays_are_copied_and_sealed():
    mine = np.zeros((2, 256), np.int8)
    view = mine[:]
    node = InputTable("input", mine)
    mine[0, 0] = 5
    assert node.table[0, 0] == 0
    mine.setflags(write=False)  # `view` can still write to it
    assert not np.shares_memory(InputTable("input", view).table, mine)
    with pytest.raises(ValueError, match="read-only"):
        node.table[0, 0] = 1
    with pytest.raises(FrozenInstanceError):
        node.name = "other"  # type: ignore[misc]
    fortran = InputTable("input", np.asfortranarray(np.arange(512).reshape(2, 256) % 100, np.int16))
    assert fortran.table.flags.c_contiguous
    assert fortran.table.dtype == np.int8
    assert np.array_equal(fortran.table, np.arange(512).reshape(2, 256) % 100)
    big_endian = Readout("r", "x", weight(3, 5), 4, np.array([1, 2, 3], ">i4"))
    assert big_endian.bias.tolist() == [1, 2, 3]
    assert big_endian.bias.dtype.isnative


# ------------------------------------------------------------------------------------------- limits, one inside


def test_limits_hold_at_their_very_ends():
    a = np.full(4, 3)
    lo, hi = build().proof.channel_bounds["conv"]
    reach = int(max((-lo).max(), hi.max()))
    assert build(swap("bn", multiplier=a, offset=np.full(4, 2**31 - 1 - 3 * reach))).proof.product_bits["bn"] == 32
    assert build(swap("bn", multiplier=a, offset=np.full(4, 2**31 - 3 * reach))).proof.product_bits["bn"] == 64
    assert build(swap("bn", multiplier=a, offset=np.full(4, 2**62 - 1 - 3 * reach))).proof.product_bits["bn"] == 64
    with pytest.raises(NetworkError, match="62 bits"):
        build(swap("bn", multiplier=a, offset=np.full(4, 2**62 - 3 * reach)))
    build(swap("lif1", decode=np.array([0] * 14 + [2**30 - 1 - 4096])))
    build(swap("lif1", v_th=2**30 - 1))
    top = int(np.maximum(np.asarray(NODES[-1].weight, np.int64), 0).sum(axis=1)[1]) * 2
    build(swap("readout", bias=np.array([0, LATE - top, 0])))
    with pytest.raises(NetworkError, match="logits reach"):
        build(swap("readout", bias=np.array([0, LATE - top + 1, 0])))


def test_the_running_sum_is_proven_before_the_bias_comes():
    """258**2 spikes of weight 127 over 256 steps pass 2**31; a bias of -2**30 brings them back, but it comes last."""

    def network(side: int) -> IntegerNetwork:
        nodes = (
            InputTable("input", image_table([0.5], [0.25])),
            Conv("conv", "input", np.full((1, 1, 1, 1), 1), 4),
            bn("bn", "conv", 1),
            lif("lif", "bn"),
            Flatten("flat", "lif"),
            Readout("readout", "flat", np.full((1, side**2), 127), 8, np.array([-(2**30)])),
        )
        return IntegerNetwork(nodes, InputSpec(1, side, side), 256)

    assert network(257).proof.ranges["readout"] == (-(2**30), 127 * 257**2 * 256)
    with pytest.raises(NetworkError, match=r"'readout'.*logits reach.*beyond 32 bits"):
        network(258)


def test_an_accumulator_beyond_32_bits_is_refused():
    nodes = (
        InputTable("input", image_table([0.5] * 1024, [0.25] * 1024)),
        Conv("conv", "input", np.full((1, 1024, 12, 12), 127), 8),
        bn("bn", "conv", 1),
        lif("lif", "bn"),
        Readout("readout", "lif", np.full((1, 1), 1), 8, np.array([0])),
    )
    with pytest.raises(NetworkError, match=r"'conv'.*beyond 32 bits"):
        IntegerNetwork(nodes, InputSpec(1024, 12, 12), 1)


def test_a_stream_or_a_count_beyond_32_bits_is_refused():
    adds: list[Node] = [Add("add0", "bn", "bn")]
    adds += [Add(f"add{i}", f"add{i - 1}", f"add{i - 1}") for i in range(1, 25)]  # 2**12 doubled each time
    head: list[Node] = [*NODES[:3]]
    tail: list[Node] = [
        lif("lif", "add24"),
        Flatten("flat", "lif"),
        Readout("r", "flat", weight(3, 64), 4, np.zeros(3, int)),
    ]
    with pytest.raises(NetworkError, match=r"'add18'.*beyond 32 bits"):
        IntegerNetwork((*head, *adds, *tail), SPEC, 2)
    pools: list[Node] = [
        lif("lif", "bn"),
        *(SumPool(f"p{i}", "lif" if i == 0 else f"p{i - 1}", 4095, 4095, 4095, 2047) for i in range(2)),
    ]
    zero = Conv("zero", "p1", np.zeros((1, 4, 1, 1), np.int8), 4)  # the bounds of what reads the counts say nothing
    end: list[Node] = [
        zero,
        bn("bnz", "zero", 1),
        lif("lifz", "bnz"),
        Readout("r", "lifz", weight(3, 1), 4, np.zeros(3, int)),
    ]
    with pytest.raises(NetworkError, match=r"'p1'.*counts reach.*beyond 32 bits"):
        IntegerNetwork((*head, *pools, *end), SPEC, 2)


def test_a_stream_that_only_its_half_step_takes_beyond_32_bits_is_refused():
    """Doubled to 2**30, then 2**29, 2**28 ... added: 2**31 - 2**12 in all, which 2**23 more does not leave inside."""
    nodes: list[Node] = [*NODES[:3]]
    powers = ["bn"]
    for i in range(18):
        nodes.append(Add(f"power{i}", powers[-1], powers[-1]))
        powers.append(f"power{i}")
    total = powers[-1]
    for i, power in enumerate(powers[-2::-1]):
        nodes.append(Add(f"sum{i}", total, power))
        total = f"sum{i}"
    tail = [
        Conv("conv2", "codes", weight(1, 4, 1, 1), 4),
        bn("bn2", "conv2", 1),
        lif("lif", "bn2"),
        Flatten("flat", "lif"),
        Readout("r", "flat", weight(3, 16), 4, np.zeros(3, int)),
    ]
    network = IntegerNetwork((*nodes, Requantize("codes", total, 12, 8), *tail), SPEC, 2)
    assert network.proof.ranges[total] == (-(2**31) + 2**12, 2**31 - 2**12)
    with pytest.raises(NetworkError, match=r"'codes'.*half step is beyond 32 bits"):
        IntegerNetwork((*nodes, Requantize("codes", total, 14, 8), *tail), SPEC, 2)


def test_a_readout_whose_input_outgrows_32_bits_over_time_is_refused():
    nodes = (
        *NODES[:3],
        lif("lif", "bn"),
        SumPool("sum", "lif", 4095, 4095, 4095, 2047),
        Readout("r", "sum", np.zeros((3, 4), np.int8), 4, np.zeros(3, int)),  # no weight reads it, and still
    )
    IntegerNetwork(nodes, SPEC, 128)
    with pytest.raises(NetworkError, match=r"'r'.*0\.\.16769025 over 129 steps is beyond 32 bits"):
        IntegerNetwork(nodes, SPEC, 129)


def test_what_bounds_a_loaders_memory_is_refused_beyond_its_limit(monkeypatch):
    monkeypatch.setattr(graph, "MAX_ROWS", 4 + 4 + 4 + 5 + 3)
    build()
    monkeypatch.setattr(graph, "MAX_ROWS", 4 + 4 + 4 + 5 + 2)
    with pytest.raises(NetworkError, match=r"'readout'.*to 20, over 19"):
        build()
    nodes = list(NODES[:3])
    nodes[1] = Conv("conv", "input", np.zeros((1, 2, 1, 1), np.int8), 4)
    nodes[2] = BnDense("bn", "conv", np.zeros(1, np.int32))
    tail = [lif("lif", "bn"), Flatten("flat", "lif"), Readout("r", "flat", weight(1, 16), 4, np.zeros(1, int))]
    monkeypatch.setattr(graph, "MAX_DENSE_ENTRIES", 1)
    IntegerNetwork((*nodes, *tail), SPEC, 2)
    monkeypatch.setattr(graph, "MAX_DENSE_ENTRIES", 0)
    with pytest.raises(NetworkError, match=r"'bn'.*dense entries to 1, over 0"):
        IntegerNetwork((*nodes, *tail), SPEC, 2)


def test_a_value_of_too_many_activations_is_refused():
    nodes = (
        InputTable("input", image_table([0.5], [0.25])),
        Conv("conv", "input", np.ones((17, 1, 1, 1), np.int8), 4),
        bn("bn", "conv", 17),
        lif("lif", "bn"),
        SumPool("sum", "lif", 4096, 4096),
        Readout("readout", "sum", np.ones((1, 17), np.int8), 4, np.array([0])),
    )
    with pytest.raises(NetworkError, match=r"'conv'.*over 268435456 values a step"):
        IntegerNetwork(nodes, InputSpec(1, 4096, 4096), 1)


# ------------------------------------------------------------------------------------------------ dense BN tables


def dense(rows: list[list[int]]) -> IntegerNetwork:
    """Two channels with weights +1 and -2 on one spike: accumulators 0..1 and -2..0."""
    nodes = (
        InputTable("input", image_table([0.5], [0.25])),
        Conv("conv", "input", np.ones((1, 1, 1, 1), np.int8), 4),
        bn("bn", "conv", 1),
        lif("lif", "bn"),
        Conv("conv2", "lif", np.array([1, -2]).reshape(2, 1, 1, 1), 4),
        BnDense("dense", "conv2", np.array([entry for row in rows for entry in row])),
        lif("lif2", "dense"),
        Readout("readout", "lif2", np.ones((1, 2), np.int8), 4, np.array([0])),
    )
    return IntegerNetwork(nodes, InputSpec(1, 1, 1), 1)


def test_a_dense_table_may_rise_fall_or_stay_in_each_channel():
    for first, second in itertools.product(
        [[0, 1], [1, 0], [5, 5]], [[1, 2, 2], [2, 2, -1], [4, 4, 4], [-4096, 0, 4096]]
    ):
        dense([first, second])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[0, 1], [0, 1, 0]], "not monotone in channel 1"),
        ([[0, 1], [1, 0, 1]], "not monotone in channel 1"),
        ([[0, 1], [0, 0, 4097]], "outside -4096..4096"),
        ([[0, -4097], [0, 0, 0]], "outside -4096..4096"),
        ([[0, 1], [0, 0]], "table has shape (4,), where (5,) is needed"),
        ([[0, 1], [0, 0, 0, 0]], "table has shape (6,)"),
    ],
)
def test_a_dense_table_of_another_size_range_or_order_is_refused(rows, text):
    with pytest.raises(NetworkError) as caught:
        dense(rows)
    assert "'dense'" in str(caught.value)
    assert text in str(caught.value)


# -------------------------------------------------------------------------------------------------- exact bounds


def test_channel_bounds_are_reached_by_some_input_of_a_real_layer():
    """Every one of the 2**8 spike patterns of a 2x2x2 window."""
    w = weight(3, 2, 2, 2, seed=5)
    nodes = (
        InputTable("input", image_table([0.5, 0.5], [0.25, 0.25])),
        Conv("stem", "input", np.ones((2, 1, 1, 1), np.int8), 4, 1, 0, 2),
        bn("bn", "stem", 2),
        lif("lif", "bn"),
        Conv("conv", "lif", w, 4),
        bn("bn2", "conv", 3),
        lif("lif2", "bn2"),
        Readout("readout", "lif2", weight(2, 3), 4, np.array([0, 0])),
    )
    lo, hi = IntegerNetwork(nodes, InputSpec(2, 2, 2), 1).proof.channel_bounds["conv"]
    patterns = np.array(list(itertools.product([0, 1], repeat=8)))
    every = patterns @ w.reshape(3, 8).T
    assert lo.tolist() == every.min(axis=0).tolist()
    assert hi.tolist() == every.max(axis=0).tolist()
    assert not lo.flags.writeable


@given(network_cases(max_channels=8, max_timesteps=4))
@settings(max_examples=40, deadline=None)
def test_nothing_a_network_computes_leaves_its_proof(case):
    """Values, shapes, dtypes and static of every node, at every step, on extreme pixels too."""
    network, pixels = case
    proof = network.proof
    for batch in (pixels, np.zeros_like(pixels), np.full_like(pixels, 255)):
        state: Any = Engine(network, "reference", 1)._backend.start(batch.shape[-4])
        before: dict[str, np.ndarray] = {}
        for t in range(network.timesteps):
            frame = batch if network.input.coding == "image" else batch[t]
            result = state.step(frame)
            for name, value in state.values.items():
                lo, hi = proof.ranges[name]
                assert value.shape[1:] == proof.shapes[name]
                assert lo <= value.min() <= value.max() <= hi, name
                info = np.iinfo(proof.dtypes[name])
                assert info.min <= lo <= hi <= info.max
                if proof.static[name] and name in before:
                    fresh = state.backend.value(network[name], state.values, frame)
                    assert np.array_equal(fresh, before[name])
                if name in proof.channel_bounds:
                    low, high = proof.channel_bounds[name]
                    assert np.all(value.min(axis=(0, 2, 3)) >= low)
                    assert np.all(value.max(axis=(0, 2, 3)) <= high)
            for name, trace in result.trace.lifs.items():
                lo, hi = proof.membranes[name]
                assert lo <= trace.h.min() <= trace.h.max() <= hi
            lo, hi = proof.ranges[network.readout.name]
            assert lo <= result.logits.min() <= result.logits.max() <= hi
            before = dict(state.values)


def test_static_is_false_everywhere_for_events_and_behind_any_lif():
    for seed in range(12):
        network, _ = seeded_case(seed, max_channels=8)
        behind: set[str] = set()
        for node in network.nodes:
            if isinstance(node, Lif) or network.input.coding == "events" or behind.intersection(node.inputs):
                behind.add(node.name)
            assert network.proof.static[node.name] == (node.name not in behind)


def test_lookup_by_name():
    network = build()
    assert network["conv"] is network.nodes[1]
    assert [node.name for node in network.lifs] == ["lif1", "lif2", "lif3"]
    assert (network.readout.name, network.classes) == ("readout", 3)
    with pytest.raises(KeyError):
        network["nobody"]

"""Cases that mutants of the C engine showed to be missing: planes of more than 255 pixels, counts of 32 bits at the
classifier, bands of rows that do not divide the height, and tables with each search of a membrane's code.

tests/mutate_c.py runs these together with those of test_kernels_bit_exact.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_kernels_bit_exact import ENGINES, assert_same_result, check, engine_of

from mdsnn.kernels import Engine, native, packing, plan, tables
from mdsnn.kernels.formats import Grid
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
from planted import assert_same_bits


def affine(name: str, source: str, channels: int, rng: np.random.Generator, reach: int = 40) -> BnAffine:
    """Multipliers and offsets that differ from channel to channel."""
    multiplier = rng.integers(reach // 2, reach, channels) * rng.choice([-1, 1], channels)
    return BnAffine(name, source, multiplier, rng.integers(-999, 999, channels), rng.integers(0, 4, channels))


def lif(
    name: str,
    source: str,
    rng: np.random.Generator,
    bits: int = 4,
    spread: int = 600,
    v_th: int = 200,
    **options: object,
) -> Lif:
    top = 2 ** (bits - 1) - 1
    decode = np.sort(rng.integers(-400, 400, 2 * top + 1))
    thresholds = np.sort(rng.integers(-spread, spread, 2 * top))
    return Lif(name, source, bits, decode, thresholds, v_th, **options)  # type: ignore[arg-type]


def close(nodes: list[Node], spec: InputSpec, features: int, timesteps: int, classes: int = 3) -> IntegerNetwork:
    rng = np.random.default_rng(features)
    readout = Readout(
        "readout", nodes[-1].name, rng.integers(-7, 8, (classes, features)), 4, rng.integers(-9, 9, classes)
    )
    return IntegerNetwork((*nodes, readout), spec, timesteps, Grid())


def head(channels: int, pixels: int, rng: np.random.Generator, *, dense: bool) -> list[Node]:
    """Pixels, a 1x1 stem and a LIF that always fires if `dense`."""
    table = np.full((pixels, 256), 100) if dense else rng.integers(-128, 128, (pixels, 256))
    stem = np.ones((channels, pixels, 1, 1), int) if dense else rng.integers(-7, 8, (channels, pixels, 1, 1))
    bn = BnAffine("bn", "stem", np.full(channels, 9), np.arange(channels), np.zeros(channels, int))
    return [InputTable("input", table), Conv("stem", "input", stem, 4), bn, lif("lif", "bn", rng, v_th=0)]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [5, 20, 70])
@pytest.mark.parametrize("dense", [True, False], ids=["all fire", "some fire"])
def test_planes_of_more_pixels_than_a_byte_counts(
    name: str, channels: int, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts of a channel beyond 255, and sums of 32 bits into the classifier, as they are and flattened."""
    rng = np.random.default_rng([channels, dense])
    spec = InputSpec(2, 19, 28)
    nodes = head(channels, 2, rng, dense=dense)
    pixels = rng.integers(0, 256, (2, 2, 19, 28), np.uint8)
    check(close([*nodes, SumPool("sum", "lif", 19, 28)], spec, channels, 2), pixels, name, monkeypatch)
    flat = [*nodes, SumPool("sum", "lif", 17, 25), Flatten("flat", "sum")]
    check(close(flat, spec, 3 * 4 * channels, 2), pixels, name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("height", "band"), [(5, 2), (7, 3), (4, 3), (6, 6), (3, 1)])
@pytest.mark.parametrize(("stride", "padding", "bits"), [(1, 1, 4), (2, 0, 8), (2, 2, 6)])
def test_bands_that_do_not_divide_the_height(
    name: str, height: int, band: int, stride: int, padding: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of inputs and of outputs, several rows at a time, the last band a short one."""
    rng = np.random.default_rng([height, band, stride])
    c_in, c_out, width, steps = 70, 67, 5, 2
    rows = (height - 1) * stride + 3 - 2 * padding
    spec = InputSpec(2, rows, width)
    top = 2 ** (bits - 1) - 1
    nodes = head(c_in, 2, rng, dense=False)
    nodes += [Conv("conv", "lif", rng.integers(-top, top + 1, (c_out, c_in, 3, 3)), bits, stride, padding)]
    nodes += [affine("bn2", "conv", c_out, rng, 4), lif("lif2", "bn2", rng)]
    across = (width + 2 * padding - 3) // stride + 1
    monkeypatch.setattr(plan, "_LIST_BYTES", packing.list_bytes(nodes[-3], width, steps) * band)  # type: ignore[arg-type]
    network = close([*nodes, Flatten("flat", "lif2")], spec, c_out * height * across, steps)
    check(network, rng.integers(0, 256, (2, 2, rows, width), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("membrane_bits", [4, 8])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("steps", "size"),
    [(1, 17), (2, 4), (4, 3), (4, 4), (4, 9), (5, 8), (12, 4), (16, 2), (16, 3), (19, 3), (20, 4)],
)
def test_groups_of_tiles(
    name: str, steps: int, size: int, bits: int, membrane_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that do and do not divide a tile's rows, a last pass of few steps, an odd number of groups in a row, three
    and four groups in all; a residual block whose stream is kept, weights packed or not, thresholds in buckets or in a
    table. Without a trace too.
    """
    rng = np.random.default_rng([steps, size, bits, membrane_bits])
    channels, top = 70, 2 ** (bits - 1) - 1
    nodes = head(channels, 2, rng, dense=False)
    stream = "bn"
    for block in ("a", "b"):
        weight = rng.integers(-top, top + 1, (channels, channels, 3, 3))
        nodes += [Conv(f"{block} conv", nodes[-1].name, weight, bits, 1, 1)]
        nodes += [affine(f"{block} bn", f"{block} conv", channels, rng, 4), Add(f"{block} add", f"{block} bn", stream)]
        stream = nodes[-1].name
        nodes += [lif(f"{block} lif", stream, rng, membrane_bits)]
    network = close([*nodes, Flatten("flat", "b lif")], InputSpec(2, size, size), channels * size * size, steps)
    pixels = rng.integers(0, 256, (2, 2, size, size), np.uint8)
    check(network, pixels, name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("coding", ["image", "events"])
@pytest.mark.parametrize(
    ("kernel", "channels", "stride", "padding", "size", "bits"),
    [
        ((3, 3), 3, 1, 1, (9, 18), 8),
        ((3, 3), 7, 2, 1, (8, 7), 4),
        ((4, 4), 4, 2, 2, (9, 6), 4),
        ((2, 8), 4, 1, 0, (3, 9), 8),
        ((1, 8), 8, 1, 0, (2, 11), 4),
        ((5, 5), 2, 1, 2, (6, 20), 4),
        ((5, 3), 2, 3, 2, (3, 2), 8),
        ((2, 5), 3, 1, 1, (2, 5), 8),
        ((3, 3), 1, 2, 0, (11, 8), 4),
    ],
)
def test_windows_of_few_inputs(
    name: str,
    coding: str,
    kernel: tuple[int, int],
    channels: int,
    stride: int,
    padding: int,
    size: tuple[int, int],
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 64 inputs under a window, which tiles take as one: of pixels, the same at every step or not, and of
    spikes. All kinds of sides, a kernel larger than the image, and 64 inputs. Also in three parts.
    """
    rng = np.random.default_rng([*kernel, channels, stride])
    outs, steps, top = 70, 5, 2 ** (bits - 1) - 1
    spec = InputSpec(channels, *size, coding)
    lowest = -128 if coding == "image" else 0
    nodes: list[Node] = [InputTable("input", rng.integers(lowest, 128, (channels, 256)))]
    nodes += [Conv("alone", "input", rng.integers(-7, 8, (channels, channels, 1, 1)), 4)]
    nodes += [affine("alone bn", "alone", channels, rng), lif("alone lif", "alone bn", rng, v_th=0)]
    for source in ("input", "alone lif"):
        weight = rng.integers(-top, top + 1, (outs, channels, *kernel))
        conv = Conv(f"{source} conv", source, weight, bits, stride, padding)
        assert packing.whole_windows(conv)
        nodes += [conv, affine(f"{source} bn", conv.name, outs, rng, 4)]
    nodes += [Add("add", "input bn", "alone lif bn"), lif("last", "add", rng)]
    nodes += [Flatten("flat", "last")]
    out = [(side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel, strict=True)]
    network = close(nodes, spec, outs * out[0] * out[1], steps)
    shape = (2, channels, *size) if coding == "image" else (steps, 2, channels, *size)
    pixels = rng.integers(0, 256, shape, np.uint8)
    check(network, pixels, name, monkeypatch)
    if name.startswith("native"):
        backend = engine_of(network, name, monkeypatch)._backend
        backend._parts = 3  # a small sample is one thread's otherwise
        want = Engine(network, "reference", 1).run(pixels, trace=True)
        assert_same_result(backend.run(pixels, True, 3), want)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [5, 70])
def test_codes_that_nobody_reads_are_counted(
    name: str, channels: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of a stream that changes, read by a 1x1 convolution that leaves rows and columns out."""
    rng = np.random.default_rng([channels, stride])
    size, steps = 7, 3
    weight = rng.integers(-7, 8, (channels, channels, 1, 1))
    nodes = head(channels, 2, rng, dense=False)
    nodes += [Conv("conv", "lif", weight, 4), affine("moves", "conv", channels, rng), Requantize("code", "moves", 5, 8)]
    nodes += [Conv("down", "code", weight, 4, stride), affine("bn2", "down", channels, rng), lif("lif2", "bn2", rng)]
    features = channels * (-(-size // stride)) ** 2
    network = close([*nodes, Flatten("flat", "lif2")], InputSpec(2, size, size), features, steps)
    check(network, rng.integers(0, 256, (2, 2, size, size), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("bits", "reach"), [(2, 1), (4, 7), (6, 31), (8, 127)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((1, 1), 1, 0), ((1, 1), 2, 0), ((2, 4), 2, 1), ((4, 2), 3, 1), ((5, 5), 1, 2), ((3, 7), 1, 2), ((7, 5), 2, 0)],
)
def test_windows_of_any_size_over_spikes(
    name: str,
    bits: int,
    reach: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows of more rows and columns than are taken at a time, strides beyond the window, sums at their limits."""
    rng = np.random.default_rng([*kernel, stride, bits])
    c_in, c_out, height, width, steps = 66, 17, 9, 8, 2
    spec = InputSpec(2, height, width)
    weight = rng.integers(-reach, reach + 1, (c_out, c_in, *kernel))
    weight[:3] = np.array([reach, -reach, 0])[:, None, None, None]
    weight[2, :, :, kernel[1] // 2] = reach
    for dense in (True, False):
        nodes = head(c_in, 2, rng, dense=dense)
        nodes += [Conv("conv", "lif", weight, bits, stride, padding), affine("bn2", "conv", c_out, rng, 4)]
        nodes += [lif("lif2", "bn2", rng)]
        down, across = ((size + 2 * padding - k) // stride + 1 for size, k in zip((height, width), kernel, strict=True))
        network = close([*nodes, Flatten("flat", "lif2")], spec, c_out * down * across, steps)
        check(network, rng.integers(0, 256, (1, 2, height, width), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit stream", "32-bit stream"])
@pytest.mark.parametrize("kind", ["hard", "soft", "pre_fire"])
@pytest.mark.parametrize(("bits", "spread"), [(2, 900), (5, 900), (6, 900), (8, 900), (8, 30000)])
def test_every_search_and_reset(
    name: str, wide: bool, kind: str, bits: int, spread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few and many thresholds, in a short range and in one too long for a table; steps in passes of three."""
    rng = np.random.default_rng([wide, bits, spread])
    channels, steps = 21, 7
    spec = InputSpec(3, 3, 4)
    nodes: list[Node] = [InputTable("input", rng.integers(-128, 128, (3, 256)))]
    nodes += [Conv("stem", "input", rng.integers(-7, 8, (channels, 3, 1, 1)), 4)]
    nodes += [affine("bn", "stem", channels, rng), lif("first", "bn", rng, 3, v_th=100)]
    nodes += [Conv("conv", "first", rng.integers(-7, 8, (channels, channels, 3, 3)), 4, 1, 1)]
    nodes += [affine("bn2", "conv", channels, rng, 60), Add("add", "bn2", "bn")]
    spread = spread if not wide else spread * 40
    options: dict[str, object] = {"v_th": spread // 3, "quantize": "pre_fire" if kind == "pre_fire" else "post_reset"}
    if kind == "soft":
        options.update(reset="soft", v_soft=spread // 4)
    elif kind == "pre_fire":
        options.update(q_th=2 ** (bits - 2) // 2)
    if wide:  # sums of the stream with itself, until it leaves 16 bits
        for place in range(6):
            nodes.append(Add(f"more{place}", nodes[-1].name, nodes[-1].name))
    nodes += [lif("last", nodes[-1].name, rng, bits, spread, **options)]  # type: ignore[arg-type]
    nodes += [SumPool("sum", "last", 3, 4)]
    network = close(nodes, spec, channels, steps)
    assert (network.proof.ranges["add" if not wide else "more5"][1] > 32767) == wide
    monkeypatch.setattr(plan, "_CHUNK", 3)
    check(network, rng.integers(0, 256, (2, 3, 3, 4), np.uint8), name, monkeypatch)


def residual_blocks(channels: int, bits: int, kind: str, grid: Grid, steps: int) -> IntegerNetwork:
    """Blocks of one convolution that push a third of the channels up and a third down, beyond 16 bits; then a shortcut.

    v_th and some thresholds lie as near the ends of 16 bits as tables.limit_of allows, or near 0, by turns.
    """
    rng = np.random.default_rng([channels, bits, len(kind)])
    top, c, limit = 2 ** (bits - 1) - 1, grid.saturation, 32766 - 400
    sides = np.arange(channels) % 3 - 1
    nodes = head(channels, 2, rng, dense=False)
    for i in range(9):
        weight = rng.integers(-top, top + 1, (channels, channels, 3, 3))
        push = BnAffine(
            f"bn{i}", f"conv{i}", rng.integers(1, 4, channels), sides * (4096 - 200), np.zeros(channels, int)
        )
        nodes += [Conv(f"conv{i}", f"lif{i}" if i else "lif", weight, bits, 1, 1), push]
        nodes += [Add(f"add{i}", f"add{i - 1}" if i else "bn", push.name)]
        options: dict[str, object] = {"v_th": [200, limit - 401, 3][i % 3]}
        if kind == "pre_fire":
            options.update(quantize="pre_fire", q_th=top // 2)
        elif kind == "soft":
            options.update(reset="soft", v_soft=[150, 20000, 7][i % 3])
        after = lif(f"lif{i + 1}", f"add{i}", rng, bits, **options)  # type: ignore[arg-type]
        if i % 3 == 1:
            far = np.where(np.arange(2 * top) <= top // 2, limit - 1100, 0)
            after = replace(after, thresholds=after.thresholds - far)
        nodes.append(after)
    steep = BnAffine("steep", "out", np.full(channels, c // 7), sides, np.zeros(channels, int))  # to both its ends
    nodes += [Conv("out", after.name, weight, bits, 1, 1), steep, lif("lif_out", "steep", rng, bits)]
    nodes += [Requantize("codes", "add8", 9, 8), Conv("skip", "codes", weight[:, :, :1, :1], bits, 2)]
    nodes += [affine("bn_skip", "skip", channels, rng, 4), Conv("down", "lif_out", weight, bits, 2, 1)]
    nodes += [affine("bn_down", "down", channels, rng), Add("both", "bn_down", "bn_skip"), lif("last", "both", rng)]
    readout = Readout("readout", "pool", rng.integers(-7, 8, (3, channels)), 4, rng.integers(-9, 9, 3))
    return IntegerNetwork((*nodes, SumPool("pool", "last", 2, 3), readout), InputSpec(2, 4, 6), steps, grid)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("grid", [Grid(), Grid(12), Grid(12, 32)], ids=["4096", "32768", "131072"])
@pytest.mark.parametrize("kind", ["hard", "soft", "pre_fire"])
@pytest.mark.parametrize(("channels", "bits"), [(17, 4), (64, 4), (66, 8)])
def test_streams_that_leave_16_bits_on_the_way(
    name: str, grid: Grid, kind: str, channels: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of 16 and 32 bits in one network, clamped for their LIFs where that changes nothing."""
    network = residual_blocks(channels, bits, kind, grid, 3)
    pixels = np.random.default_rng(bits).integers(0, 256, (2, 2, 4, 6), np.uint8)
    trace = Engine(network, "reference", 1).run(pixels, trace=True).trace
    assert trace is not None
    h = trace.lifs["lif9"].h
    assert h.min() < -33_000
    assert h.max() > 33_000
    check(network, pixels, name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shift", [1, 5, 14, 15, 16, 24])
@pytest.mark.parametrize("adds", [2, 6])
def test_codes_of_streams_of_either_width(name: str, shift: int, adds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturated, in between, and shifts that leave nothing; the shortcut reads one code in four, all are counted."""
    rng = np.random.default_rng(shift)
    nodes = head(40, 2, rng, dense=False)
    nodes += [Conv("conv", "lif", rng.integers(-7, 8, (40, 40, 3, 3)), 4, 1, 1)]
    nodes += [
        BnAffine("bn2", "conv", np.full(40, 300), rng.integers(-9, 9, 40), np.zeros(40, int)),
        Add("0", "bn2", "bn2"),
    ]
    nodes += [Add(f"{i}", f"{i - 1}", f"{i - 1}") for i in range(1, adds)]
    nodes += [
        Requantize("codes", nodes[-1].name, shift, 8),
        Conv("skip", "codes", rng.integers(-7, 8, (40, 40, 1, 1)), 4, 2),
    ]
    nodes += [affine("bn_s", "skip", 40, rng, 9), lif("last", "bn_s", rng), SumPool("sum", "last", 2, 2)]
    check(close(nodes, InputSpec(2, 4, 4), 40, 3), rng.integers(0, 256, (2, 2, 4, 4), np.uint8), name, monkeypatch)


def shortcuts(
    channels: int, bits: int, height: int, width: int, steps: int, *shortcuts: tuple[int, int], **options: object
) -> IntegerNetwork:
    """A residual stream, its LIF, and for each of `shortcuts` codes of it, which convolutions of 1x1 with so much
    stride and 1x1 or 3x3 with so much padding read; the first `skip` of stride 1 lies beside them if that is 0."""
    rng = np.random.default_rng([channels, bits, height, width, steps])
    top = 2 ** (bits - 1) - 1
    nodes = head(channels, 2, rng, dense=False)
    nodes += [Conv("conv", "lif", rng.integers(-top, top + 1, (channels, channels, 3, 3)), bits, 1, 1)]
    nodes += [affine("bn1", "conv", channels, rng), Add("stream", "bn1", "bn")]
    nodes += [lif("fires", "stream", rng, bits, **options), Flatten("flat", "fires")]  # type: ignore[arg-type]
    nodes += [Linear("linear", "flat", rng.integers(-top, top + 1, (9, channels * height * width)), bits)]
    nodes += [affine("bn_l", "linear", 9, rng, 4)]
    last = "bn_l"
    for i, (shift, stride) in enumerate(shortcuts):
        nodes += [Requantize(f"codes{i}", "stream", shift, 8)]
        kernel = 3 if stride < 0 else 1
        weight = rng.integers(-top, top + 1, (channels + i, channels, kernel, kernel))
        nodes += [Conv(f"skip{i}", f"codes{i}", weight, bits, abs(stride), kernel // 2)]
        nodes += [affine(f"bn_s{i}", f"skip{i}", channels + i, rng, 4), lif(f"lif_s{i}", f"bn_s{i}", rng, 4, 900)]
        size = -(-height // abs(stride)), -(-width // abs(stride))
        nodes += [SumPool(f"sum{i}", f"lif_s{i}", *size)]
        nodes += [Linear(f"short{i}", f"sum{i}", rng.integers(-7, 8, (9, channels + i)), 4)]
        nodes += [affine(f"bn_t{i}", f"short{i}", 9, rng, 9), Add(f"more{i}", last, f"bn_t{i}")]
        last = f"more{i}"
    nodes += [lif("out", last, rng)]
    return close(nodes, InputSpec(2, height, width), 9, steps)


def made_beside(network: IntegerNetwork) -> tuple[list[str], dict[str, int]]:
    """Codes that a plan for tiles makes beside their stream, and those that are packed, each with its stride."""
    made = plan.Plan(native._module(), network, "amx")
    return [step.codes.name for _, step in made.steps if isinstance(step, plan.Group) and step.codes], made.packed


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("stride", "shift"), [(1, 15), (2, 1), (2, 6), (2, 17), (3, 6), (-1, 6), (-2, 1)])
@pytest.mark.parametrize(
    ("channels", "bits", "height", "width", "steps"),
    [(64, 4, 5, 9, 4), (40, 4, 4, 6, 3), (130, 8, 3, 7, 4), (33, 8, 6, 5, 1), (64, 5, 2, 3, 16), (17, 4, 2, 8, 18)],
)
def test_codes_beside_their_stream(
    name: str,
    stride: int,
    shift: int,
    channels: int,
    bits: int,
    height: int,
    width: int,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every row and column, every second or third one, or, where a stride is below 0, all of them under 3x3."""
    network = shortcuts(channels, bits, height, width, steps, (shift, stride))
    if native.missing() is None:
        assert made_beside(network) == (["codes0"], {"codes0": max(stride, 1)})
    pixels = np.random.default_rng(shift).integers(0, 256, (2, 2, height, width), np.uint8)
    check(network, pixels, name, monkeypatch)
    if shift == 6:
        stream = engine_of(network, name, monkeypatch).stream(pixels)
        logits = [stream.step().logits for _ in range(steps)][-1]
        assert_same_bits(logits, Engine(network, "reference", 1).run(pixels).logits, "logits of a stream")


@pytest.mark.parametrize("name", ENGINES)
def test_codes_that_are_an_operation_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream with two of them, and before a LIF without a short way: packed where one stride reads them."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (2, 2, 5, 6), np.uint8)
    for options in ({"reset": "soft", "v_soft": 150}, {"quantize": "pre_fire", "q_th": 3}):
        network = shortcuts(64, 4, 5, 6, 4, (6, 2), **options)
        if native.missing() is None:
            assert made_beside(network) == ([], {"codes0": 2})
        check(network, pixels, name, monkeypatch)
    network = shortcuts(64, 4, 5, 6, 4, (6, 2), (5, 3))
    if native.missing() is None:
        assert made_beside(network) == ([], {"codes0": 2, "codes1": 3})
    check(network, pixels, name, monkeypatch)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_only_streams_that_need_32_bits_have_them() -> None:
    for grid, short in ((Grid(), 6), (Grid(12), 0)):  # 7 blocks behind the stem: 8 times 4096, one too much
        for level in native.isa_levels():
            made = plan.Plan(native._module(), residual_blocks(17, 4, "hard", grid, 3), level)
            types = [made.values[made.index[f"add{i}"]].type for i in range(9)]
            assert types == [plan._I16] * short + [plan._I32] * (9 - short)
            widths = {step.result: step.width for _, step in made.steps if isinstance(step, plan.Group)}
            assert [widths[f"add{i}"] for i in range(9)] == [plan._NARROW] * short + [plan._CLAMPED] * (9 - short)
            assert widths["steep"] == (plan._CLAMPED if grid.saturation > 32767 else plan._NARROW)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [3, 17, 66])
@pytest.mark.parametrize("height", [6, 7])
def test_pools_with_padding_before_and_after(
    name: str, channels: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that hang over all four edges of planes that are no squares, read by convolutions and a linear layer."""
    rng = np.random.default_rng(channels)
    spec = InputSpec(2, height, 9)
    nodes = head(channels, 2, rng, dense=False)
    nodes += [MaxPool("max", "lif", 3, 2, 1), SumPool("pool", "lif", 2, 3, 2, 1)]  # (3 or 4, 5), and (4, 5)
    nodes += [
        Conv("conv_a", "max", rng.integers(-7, 8, (channels, channels, height - 4, 2)), 4),
        affine("bn_a", "conv_a", channels, rng),
    ]
    nodes += [
        Conv("conv_b", "pool", rng.integers(-7, 8, (channels, channels, 3, 2)), 4),
        affine("bn_b", "conv_b", channels, rng, 9),
    ]
    nodes += [Add("add", "bn_a", "bn_b"), Requantize("codes", "add", 4, 8)]
    nodes += [
        Conv("skip", "codes", rng.integers(-7, 8, (channels, channels, 1, 1)), 4),
        affine("bn_s", "skip", channels, rng, 4),
    ]
    nodes += [Add("out", "add", "bn_s"), lif("last", "out", rng, 5, 900), Flatten("flat", "last")]
    nodes += [
        Linear("linear", "flat", rng.integers(-7, 8, (18, 2 * 4 * channels)), 4),
        affine("bn_l", "linear", 18, rng),
    ]
    nodes += [lif("lif_l", "bn_l", rng, 4)]
    network = close(nodes, spec, 18, 4)
    check(network, rng.integers(0, 256, (2, 2, height, 9), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [3, 64, 70])
def test_dense_tables_that_no_line_gives(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution that is fused, of one whose sums two tables read, and of shared sums beside an affine BN."""
    rng = np.random.default_rng(channels)
    nodes = head(channels, 2, rng, dense=False)

    def table(bn: str, conv: Conv) -> BnDense:
        rows = conv.weight.reshape(channels, -1)  # of spikes: each weight once, or not at all
        sizes = np.abs(rows).sum(axis=1, dtype=np.int64) + 1
        entries = [np.sort(rng.integers(-3000, 3000, size))[:: 1 - 2 * (c % 2)] for c, size in enumerate(sizes)]
        return BnDense(bn, conv.name, np.concatenate(entries))

    convs = [
        Conv(f"conv_{i}", "lif", rng.integers(-7, 8, (channels, channels, k, k)), 4, 1, k // 2)
        for i, k in enumerate((3, 1, 1))
    ]
    nodes += [*convs, table("bn_0", convs[0]), table("bn_1", convs[1]), table("bn_2", convs[1])]
    nodes += [table("bn_3", convs[2]), affine("bn_4", "conv_2", channels, rng)]
    for i in range(1, 5):
        nodes.append(Add(f"add_{i}", f"add_{i - 1}" if i > 1 else "bn_0", f"bn_{i}"))
    nodes += [lif("last", "add_4", rng, spread=3000), SumPool("sum", "last", 5, 4)]
    network = close(nodes, InputSpec(2, 5, 4), channels, 3)
    assert all(
        tables.affine_of(node, *network.proof.channel_bounds[node.source], network.grid.saturation) is None
        for node in network.nodes
        if isinstance(node, BnDense)
    )
    check(network, rng.integers(0, 256, (2, 2, 5, 4), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [17, 60, 64, 70])
def test_every_spike_of_a_lif_that_stands_alone(name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two LIFs on one stream, so that one is not fused: the convolution that reads it finds its lists full."""
    rng = np.random.default_rng(channels)
    spec = InputSpec(2, 4, 7)
    nodes = [*head(channels, 2, rng, dense=True), lif("alone", "bn", rng, 5, v_th=0)]
    for source in ("lif", "alone"):
        conv = Conv(f"conv_{source}", source, rng.integers(-7, 8, (channels, channels, 3, 3)), 4)
        nodes += [conv, affine(f"bn_{source}", conv.name, channels, rng, 4)]
    nodes += [Add("add", "bn_lif", "bn_alone"), lif("last", "add", rng), SumPool("sum", "last", 2, 5)]
    network = close(nodes, spec, channels, 3)
    check(network, rng.integers(0, 256, (2, 2, 4, 7), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shift", [0, 2, 3, 7, 15])
def test_batch_norms_that_leave_their_ends(name: str, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By little and by much, below and above, under a LIF and in a stream; shifts with room for rounding or not."""
    rng, channels = np.random.default_rng(shift), 70

    def steep(conv: str, reach: int) -> BnAffine:
        multiplier = np.minimum(rng.integers(reach // 2, reach, channels) << shift, 32767)
        multiplier *= rng.choice([-1, 1], channels)
        offset = rng.integers(-8, 8, channels) * 512 + rng.integers(-9, 9, channels) << shift
        return BnAffine(f"bn_{conv}", conv, multiplier, offset, np.full(channels, shift))

    nodes = head(channels, 2, rng, dense=False)
    source = "lif"
    for i, (reach, v_th) in enumerate([(60, 200), (600, 300), (60, 3800), (60, 5000)]):
        conv = Conv(f"conv_{i}", source, rng.integers(-7, 8, (channels, channels, 3, 3)), 4, padding=1)
        source, codes = f"lif_{i}", np.arange(-7, 8)
        nodes += [conv, steep(conv.name, reach), Lif(source, f"bn_conv_{i}", 4, codes * 50, codes[:-1] * 60 + 30, v_th)]
    nodes += [Conv("conv_a", "lif_0", rng.integers(-7, 8, (channels, channels, 1, 1)), 4), steep("conv_a", 99)]
    nodes += [Conv("conv_b", "lif_3", rng.integers(-7, 8, (channels, channels, 1, 1)), 4), steep("conv_b", 99)]
    nodes += [Add("add", "bn_conv_a", "bn_conv_b"), lif("last", "add", rng), SumPool("sum", "last", 5, 4)]
    network = close(nodes, InputSpec(2, 5, 4), channels, 4)
    check(network, rng.integers(0, 256, (2, 2, 5, 4), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [64, 70, 128, 200])
def test_spikes_of_a_fixed_stream_that_change_at_few_places_and_at_many(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each channel is a place where the spikes of some step change, or is beside one, or is any."""
    rng, steps = np.random.default_rng(channels), 8
    few = lif("few", "bn", rng, 2, v_th=300)
    many = Lif("many", "bn", 8, np.arange(-127, 128) * 3, np.arange(-127, 127) * 3 + 1, 150, "soft", 150)
    x = np.arange(-500, 500)
    places = [tables.pattern_changes(tables.spike_patterns(node, x, steps)[:-3], -500)[0] for node in (few, many)]
    assert 0 < len(places[0]) <= 8 < len(places[1])
    near = np.concatenate([np.array(found)[:, None] + [-1, 0, 1] for found in places]).ravel()
    offset = np.concatenate([near, rng.integers(-500, 500, channels)])[:channels]
    nodes: list[Node] = [
        InputTable("input", np.zeros((2, 256), int)),
        Conv("stem", "input", np.ones((channels, 2, 1, 1), int), 4),
        BnAffine("bn", "stem", np.ones(channels, int), offset, np.zeros(channels, int)),
        *(few, many),
    ]
    for source in ("few", "many"):
        conv = Conv(f"conv_{source}", source, rng.integers(-7, 8, (channels, channels, 1, 1)), 4)
        nodes += [conv, affine(f"bn_{source}", conv.name, channels, rng, 4)]
    nodes += [Add("add", "bn_few", "bn_many"), lif("last", "add", rng), SumPool("sum", "last", 3, 3)]
    network = close(nodes, InputSpec(2, 3, 3), channels, steps)
    check(network, rng.integers(0, 256, (2, 2, 3, 3), np.uint8), name, monkeypatch)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
@pytest.mark.skipif(native.unloaded() is not None, reason=str(native.unloaded()))
@pytest.mark.parametrize(("stride", "second", "border"), [(1, None, 1), (2, None, 0), (1, 1, 1), (1, 0, 0)])
def test_spikes_have_a_border_where_nothing_but_tiles_of_that_padding_reads_them(
    stride: int, second: int | None, border: int
) -> None:
    """The padding of the convolution is 1; `second`: that of another one that reads the same spikes."""
    rng = np.random.default_rng(7)
    weight = rng.integers(-7, 8, (64, 64, 3, 3))
    nodes = head(64, 3, rng, dense=False)
    nodes += [Conv("conv", "lif", weight, 4, stride, 1), affine("bn2", "conv", 64, rng)]
    if second is not None:
        other = Conv("other", "lif", weight if second else weight[:, :, :1, :1], 4, 1, second)
        nodes += [other, affine("bn3", "other", 64, rng), Add("add", "bn3", "bn2")]
    size = 8 // stride
    nodes += [lif("lif2", nodes[-1].name, rng), SumPool("pool", "lif2", size, size), Flatten("flat", "pool")]
    made = plan.Plan(native._module(), close(nodes, InputSpec(3, 8, 8), 64, 4), "amx")
    assert made.values[made.index["lif"]].border == border

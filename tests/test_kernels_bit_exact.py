"""Every engine equals the reference, bit for bit: h, s and q of every LIF and step, logits, and activity counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mdsnn.kernels import Engine, Result, native, plan
from mdsnn.kernels.formats import Grid, decode_table, requantize_thresholds
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
from planted import assert_same_bits, assert_same_trace, network_cases, seeded_case

LEVELS = [] if native.missing() else list(native.isa_levels())
ENGINES = [*(f"native-{level}" for level in LEVELS), "numba"]
NATIVE = ENGINES[:-1] or [pytest.param("native-base", marks=pytest.mark.skip(reason=str(native.missing())))]


def engine_of(network: IntegerNetwork, name: str, monkeypatch: pytest.MonkeyPatch, threads: int = 1) -> Engine:
    """An engine by name; native-<isa> forces the instruction set, which is read when the network loads."""
    kernels, _, level = name.partition("-")
    with monkeypatch.context() as patch:
        if level:
            patch.setenv("MDSNN_ISA", level)
        return Engine(network, kernels, threads)


def assert_same_result(got: Result, want: Result) -> None:
    assert_same_bits(got.logits, want.logits, "logits")
    assert (got.trace is None) == (want.trace is None)
    if got.trace is not None:
        assert_same_trace(got.trace, want.trace)
    for what in ("spikes_in", "spikes_out"):
        counts, right = getattr(got.activity, what), getattr(want.activity, what)
        assert list(counts) == list(right)
        for name in right:
            assert_same_bits(counts[name], right[name], f"{what} of {name!r} [T]")
    assert got.activity.samples == want.activity.samples
    assert got.activity.neurons == want.activity.neurons


def check(network: IntegerNetwork, pixels: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = Engine(network, "reference", 1).run(pixels, trace=True)
    engine = engine_of(network, name, monkeypatch)
    assert_same_result(engine.run(pixels, trace=True), want)
    plain = engine.run(pixels)  # the path without a trace is the one users run
    assert plain.trace is None
    assert_same_bits(plain.logits, want.logits, "logits without a trace")
    for what in ("spikes_in", "spikes_out"):
        for node, counts in getattr(want.activity, what).items():
            assert_same_bits(getattr(plain.activity, what)[node], counts, f"{what} of {node!r} without a trace")


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=network_cases(max_channels=8, max_timesteps=4))
def test_drawn_networks(name: str, case: tuple[IntegerNetwork, np.ndarray]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(*case, name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
def test_many_planted_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(300):
        network, pixels = seeded_case(seed)
        try:
            check(network, pixels, name, monkeypatch)
        except AssertionError as fault:
            raise AssertionError(f"seed {seed}: {fault}") from fault


def test_planted_networks_in_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(40):
        check(*seeded_case(seed), "numba", monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
def test_wide_layers_and_many_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2000, 2040):
        check(*seeded_case(seed, max_channels=130, max_timesteps=32, samples=1), name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
def test_small_bands_and_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers cut into bands of one or two rows, and steps into passes of three, as large networks are."""
    monkeypatch.setattr(plan, "_LIST_BYTES", 1 << 12)
    monkeypatch.setattr(plan, "_CHUNK", 3)
    for seed in range(3000, 3030):
        check(*seeded_case(seed, max_channels=65, samples=1), name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
def test_layers_too_large_for_a_method_take_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [("_INPUT_BYTES", 0), ("_COLUMN_BYTES", 0)]
    for count in (1, 2):  # then pairs, then the plain kernel
        for limit, value in limits[:count]:
            monkeypatch.setattr(plan, limit, value)
        for seed in range(3100, 3115):
            check(*seeded_case(seed, max_channels=65, samples=1), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_a_stream_ends_where_a_run_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100, 112):
        network, pixels = seeded_case(seed)
        whole = Engine(network, "reference", 1).run(pixels, trace=True)
        engine = engine_of(network, name, monkeypatch)
        images = network.input.coding == "image"
        stream = engine.stream(pixels) if images else engine.stream(samples=pixels.shape[1])
        reference = Engine(network, "reference", 1)
        other = reference.stream(pixels) if images else reference.stream(samples=pixels.shape[1])
        for t in range(network.timesteps):
            frame = () if images else (pixels[t],)
            step = stream.step(*frame)
            assert_same_result(step, other.step(*frame))
            assert step.trace is not None
            assert whole.trace is not None
            for lif, states in step.trace.lifs.items():
                assert_same_bits(states.q[0], whole.trace.lifs[lif].q[t], f"q of {lif!r} at step {t}")
        assert_same_bits(step.logits, whole.logits, "logits after the last step")


@pytest.mark.parametrize("name", ENGINES)
def test_the_layout_of_the_input_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels = seeded_case(7)
    engine = engine_of(network, name, monkeypatch)
    want = engine.run(pixels)
    read_only = pixels.copy()
    read_only.setflags(write=False)
    doubled = np.repeat(pixels, 2, axis=-1)
    layouts = {
        "Fortran": np.asfortranarray(pixels),
        "strided": doubled[..., ::2],
        "reversed": np.ascontiguousarray(pixels[..., ::-1])[..., ::-1],
        "read-only": read_only,
        "again": pixels,
    }
    for layout, array in layouts.items():
        assert_same_bits(engine.run(array).logits, want.logits, layout)


@pytest.mark.parametrize("name", ENGINES)
def test_threads_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (3, 5):
        network, pixels = seeded_case(seed, samples=9)
        engine = engine_of(network, name, monkeypatch)
        want = engine.run(pixels, trace=True)
        assert_same_result(engine_of(network, name, monkeypatch, threads=3).run(pixels, trace=True), want)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: engine.run(pixels, trace=True), range(8)):  # noqa: B023
                assert_same_result(got, want)


# ---------------------------------------------------------------------------------- corners the builder leaves out


def _affine(name: str, source: str, channels: int, multiplier: int = 700, shift: int = 6) -> BnAffine:
    return BnAffine(
        name, source, np.full(channels, multiplier), np.full(channels, 1 << (shift - 1)), np.full(channels, shift)
    )


def _lif(name: str, source: str, rng: np.random.Generator, bits: int = 4, spread: int = 600, **options: int) -> Lif:
    top = 2 ** (bits - 1) - 1
    thresholds = np.sort(rng.integers(-spread, spread, 2 * top))
    return Lif(name, source, bits, np.arange(-top, top + 1) * 9, thresholds, options.pop("v_th", 200), **options)


def _network(nodes: list[Node], spec: InputSpec, features: int, timesteps: int = 3) -> IntegerNetwork:
    rng = np.random.default_rng(1)
    weight, bias = rng.integers(-7, 8, (3, features)), np.array([1, -2, 3])
    readout = Readout("readout", nodes[-1].name, weight, 4, bias)
    return IntegerNetwork((*nodes, readout), spec, timesteps, Grid())


def _table(channels: int, rng: np.random.Generator) -> InputTable:
    return InputTable("input", rng.integers(-128, 128, (channels, 256)))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        ((1, 3), 1, 0, (5, 6)),
        ((3, 2), 2, 1, (5, 4)),
        ((2, 5), 3, 1, (7, 9)),
        ((3, 3), 4, 2, (9, 8)),
        ((5, 1), 2, 0, (5, 3)),
    ],
)
def test_windows_of_every_shape(
    name: str,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng([*kernel, stride])
    spec = InputSpec(2, *size)
    stem = rng.integers(-7, 8, (64, 2, 1, 1))
    nodes: list[Node] = [_table(2, rng), Conv("stem", "input", stem, 4), _affine("bn", "stem", 64)]
    nodes += [_lif("lif", "bn", rng)]
    weight = rng.integers(-7, 8, (64, 64, *kernel))
    nodes += [Conv("conv", "lif", weight, 4, stride, padding), _affine("bn2", "conv", 64), _lif("lif2", "bn2", rng)]
    out = [(side + 2 * padding - k) // stride + 1 for side, k in zip(size, kernel, strict=True)]
    nodes += [Flatten("flat", "lif2")]
    check(_network(nodes, spec, 64 * out[0] * out[1]), rng.integers(0, 256, (2, 2, *size), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_shared_accumulators_streams_and_spikes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two BN tables on one convolution, a stream added to itself, two LIFs and a shortcut on one stream."""
    rng = np.random.default_rng(11)
    weight = rng.integers(-7, 8, (8, 3, 3, 3))
    nodes: list[Node] = [_table(3, rng), Conv("stem", "input", weight, 4, 1, 1)]
    nodes += [_affine("bn_a", "stem", 8, 300), _affine("bn_b", "stem", 8, -200), Add("sum", "bn_a", "bn_b")]
    nodes += [Add("twice", "sum", "sum"), _lif("lif_a", "twice", rng), _lif("lif_b", "twice", rng, 8)]
    nodes += [Requantize("codes", "twice", 5, 8), Conv("skip", "codes", rng.integers(-7, 8, (8, 8, 1, 1)), 4)]
    nodes += [_affine("bn_s", "skip", 8, 30), Conv("conv", "lif_a", rng.integers(-7, 8, (8, 8, 3, 3)), 4, 1, 1)]
    nodes += [_affine("bn_c", "conv", 8), Add("left", "bn_c", "bn_s")]
    nodes += [Conv("conv_b", "lif_b", rng.integers(-7, 8, (8, 8, 3, 3)), 4, 1, 1)]
    nodes += [_affine("bn_d", "conv_b", 8), Add("out", "bn_d", "left"), _lif("last", "out", rng)]
    nodes += [MaxPool("max", "last", 3, 2, 1), SumPool("counts", "max", 2, 3, 1, 1), Flatten("flat", "counts")]
    spec = InputSpec(3, 6, 7)
    network = _network(nodes, spec, 8 * 4 * 4, timesteps=5)
    check(network, rng.integers(0, 256, (3, 3, 6, 7), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_counts_of_many_widths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum-pools of sum-pools: counts of 8 and 32 bits, up to the proof's limit."""
    rng = np.random.default_rng(5)
    nodes: list[Node] = [_table(2, rng), Conv("stem", "input", rng.integers(-7, 8, (5, 2, 1, 1)), 4)]
    nodes += [_affine("bn", "stem", 5), _lif("lif", "bn", rng)]
    size, source = 12, "lif"
    for place in range(6):
        nodes.append(SumPool(f"pool{place}", source, 5, 5, 1, 2))
        source = f"pool{place}"
    nodes += [Conv("conv_8", "pool0", rng.integers(-7, 8, (4, 5, 3, 3)), 4, 1, 1), _affine("bn_8", "conv_8", 4, 5)]
    nodes += [Conv("conv_32", "pool4", rng.integers(0, 2, (4, 5, 1, 1)), 2), _affine("bn_32", "conv_32", 4, 1, 16)]
    nodes += [Conv("conv_top", "pool5", rng.integers(0, 2, (4, 5, 1, 1)), 2), _affine("bn_top", "conv_top", 4, 1, 20)]
    nodes += [Add("add", "bn_8", "bn_32"), Add("all", "add", "bn_top"), _lif("last", "all", rng)]
    nodes += [Flatten("flat", "last")]
    network = _network(nodes, InputSpec(2, size, size), 4 * size * size)
    widths = {network.proof.ranges[f"pool{place}"][1].bit_length() for place in (0, 4, 5)}
    assert widths == {5, 24, 28}
    check(network, rng.integers(0, 256, (2, 2, size, size), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_counts_beyond_a_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """289 pixels whose every neuron fires at every step: no counter of 8 bits may wrap."""
    rng = np.random.default_rng(6)
    nodes: list[Node] = [InputTable("input", np.full((1, 256), 100))]
    nodes += [Conv("stem", "input", np.ones((64, 1, 1, 1), int), 2), _affine("bn", "stem", 64)]
    nodes += [_lif("lif", "bn", rng, v_th=0), SumPool("sum", "lif", 17, 17)]
    network = _network(nodes, InputSpec(1, 17, 17), 64, timesteps=2)
    pixels = np.zeros((1, 1, 17, 17), np.uint8)
    check(network, pixels, name, monkeypatch)
    counts = Engine(network, "reference", 1).run(pixels).activity.spikes_out["lif"]
    assert counts.tolist() == [64 * 289] * 2


@pytest.mark.parametrize("name", ENGINES)
def test_no_lif_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    network = _network([_table(4, rng), Flatten("flat", "input")], InputSpec(4, 2, 3), 24, timesteps=40)
    check(network, rng.integers(0, 256, (3, 4, 2, 3), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_linear_on_pixels_and_wide_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of 32 bits, thresholds too far apart for a table, a soft reset beyond 16 bits, v_th beyond reach."""
    rng = np.random.default_rng(3)
    for v_soft, v_th, spread in ((1, 3, 1 << 29), (1 << 20, 100, 1 << 18), (40000, 1 << 28, 600), (5, 0, 40)):
        nodes: list[Node] = [_table(6, rng), Linear("linear", "input", rng.integers(-127, 128, (70, 6)), 8)]
        nodes += [_affine("bn", "linear", 70)]
        nodes += [_lif("lif", "bn", rng, 8, spread, reset="soft", v_soft=v_soft, v_th=v_th)]
        network = _network(nodes, InputSpec(6, 1, 1), 70, timesteps=20)
        check(network, rng.integers(0, 256, (3, 6, 1, 1), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
def test_ties_in_a_stream_of_32_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Membranes too far apart for a table of codes: thresholds are found by bisection, and some are hit exactly."""
    rng = np.random.default_rng(8)
    for reset in ("hard", "soft"):
        nodes: list[Node] = [_table(6, rng), Linear("linear", "input", rng.integers(-127, 128, (70, 6)), 8)]
        nodes += [_affine("bn", "linear", 70, 900, 3)]
        options = {"reset": reset, "v_soft": 9000 if reset == "soft" else 0, "v_th": 100_000}
        nodes += [_lif("lif", "bn", rng, 8, 200_000, **options), SumPool("pool", "lif", 1, 1)]
        network = IntegerNetwork(
            (*nodes, Readout("readout", "pool", rng.integers(-7, 8, (3, 70)), 4, np.zeros(3, int))),
            InputSpec(6, 1, 1),
            5,
            Grid(12, 64),
        )
        pixels = rng.integers(0, 256, (8, 6, 1, 1), np.uint8)
        first = Engine(network, "reference", 1).run(pixels, trace=True).trace
        assert first is not None
        reached = np.unique(first.lifs["lif"].h)
        assert reached.max() > 1 << 17
        assert reached.min() < -(1 << 17)
        lif = network["lif"]
        assert isinstance(lif, Lif)
        low = reached[reached < 100_000]
        thresholds = np.sort(np.where(rng.random(254) < 0.5, rng.choice(low, 254), lif.thresholds))
        planted = replace(
            network, nodes=tuple(replace(n, thresholds=thresholds) if n is lif else n for n in network.nodes)
        )
        check(planted, pixels, name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("wide", [False, True], ids=["16-bit multipliers", "32-bit multipliers"])
def test_bn_at_the_proof_s_limit(name: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """|A| * max|acc| + |B| at 2**31 - 1, with both signs, and just above, where 64 bits take over."""
    rng = np.random.default_rng(4)
    weight = np.full((4, 2, 1, 1), 7)
    reach = 128 * 14
    multiplier = np.array([32767, -32767, 1, 0]) * (30 if wide else 1)
    offset = (2**31 - 1 - np.abs(multiplier) * reach) * np.array([1, -1, 1, -1]) + wide * 10
    nodes: list[Node] = [_table(2, rng), Conv("conv", "input", weight, 4)]
    nodes += [BnAffine("bn", "conv", multiplier, offset, np.array([16, 17, 24, 18])), _lif("lif", "bn", rng)]
    network = _network([*nodes, SumPool("sum", "lif", 3, 3)], InputSpec(2, 3, 3), 4)
    assert network.proof.product_bits["bn"] == (64 if wide else 32)
    pixels = rng.integers(0, 256, (4, 2, 3, 3), np.uint8)
    check(network, pixels, name, monkeypatch)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("channels", [(63, 64), (64, 65), (130, 63), (192, 128)])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_layers_about_the_width_of_a_vector(
    name: str, channels: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residual blocks of dense spikes and weights all of one sign: every accumulator at its bound."""
    first, second = channels
    rng = np.random.default_rng([first, bits])
    top = 2 ** (bits - 1) - 1
    signs = rng.choice([-top, top], (second, 1, 1, 1))
    nodes: list[Node] = [
        InputTable("input", np.full((1, 256), 100)),
        Conv("stem", "input", np.ones((first, 1, 1, 1), int), 2),
    ]
    nodes += [_affine("bn", "stem", first), _lif("lif", "bn", rng, v_th=0)]
    nodes += [
        Conv("conv", "lif", np.broadcast_to(signs, (second, first, 3, 3)), bits, 1, 1),
        _affine("bn2", "conv", second, 90),
    ]
    nodes += [
        _lif("lif2", "bn2", rng),
        Conv("conv2", "lif2", rng.integers(-top, top + 1, (first, second, 3, 3)), bits, 1, 1),
    ]
    nodes += [_affine("bn3", "conv2", first, 60), Add("add", "bn3", "bn"), _lif("lif3", "add", rng, 3, 300)]
    nodes += [Conv("conv3", "lif3", rng.integers(-top, top + 1, (8, first, 3, 3)), bits, 2, 1)]
    nodes += [_affine("bn4", "conv3", 8, 60), _lif("lif4", "bn4", rng, 8), SumPool("sum", "lif4", 3, 3)]
    network = _network(nodes, InputSpec(1, 5, 6), 8, timesteps=3)
    check(network, rng.integers(0, 256, (2, 1, 5, 6), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("alpha", [0.98, 1.0, 0.93, 0.7])
@pytest.mark.parametrize("adds", [False, True])
def test_membranes_of_8_bits_under_lines(name: str, alpha: float, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every membrane a LIF keeps, and next to it an input that just does or does not make it fire."""
    rng, grid = np.random.default_rng(int(alpha * 100)), Grid()
    decode, thresholds = decode_table(alpha, 0.5, 8, grid), requantize_thresholds(alpha, 8, grid)
    channels, side, samples, steps, low = 64, 16, 8, 4, -1750
    nodes: list[Node] = [InputTable("input", np.tile(np.minimum(np.arange(256), 127), (2, 1)))]
    nodes += [Conv("conv", "input", np.broadcast_to(np.array([[[127]], [[1]]]), (channels, 2, 1, 1)), 8)]
    ones, shift = np.ones(channels, int), np.zeros(channels, int)
    nodes += [BnAffine("bn", "conv", ones, low + np.arange(channels), shift)]
    if adds:
        nodes += [Conv("conv2", "input", np.zeros((channels, 2, 1, 1), int), 8)]
        nodes += [BnAffine("bn2", "conv2", ones, 0 * ones, shift), Add("sum", "bn2", "bn")]
    nodes += [Lif("lif", "sum" if adds else "bn", 8, decode, thresholds, v_th=256), Flatten("flat", "lif")]
    network = _network(nodes, InputSpec(2, side, side, "events"), channels * side * side, timesteps=steps)
    shape = samples, side, side
    kept = rng.integers(low, 257 - channels, (steps // 2, *shape))  # then 256 less what they decode to, or one more
    fires = 256 - decode[np.searchsorted(thresholds, kept + rng.integers(0, channels, kept.shape), side="right")]
    sums = np.stack([kept, fires - channels // 2 + rng.integers(-channels // 2, channels // 2, kept.shape)], 1)
    sums = sums.reshape(steps, *shape) - low
    check(network, np.stack([sums // 127, sums % 127], 2).astype(np.uint8), name, monkeypatch)
    level = name.removeprefix("native-")
    ops = native.NativeBackend(network, level)._plan.struct.ops
    lines = any(ops[i].fire and ops[i].fire.lines for i in range(4 if adds else 2))
    assert lines == (level in plan._PERMUTE)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("channels", "bits", "low", "high", "slabs"),
    [(330, 8, 20, 60, 1), (330, 8, -40, 50, 3), (530, 4, 7, 7, 8), (200, 8, 127, 127, None)],
    ids=["every slab", "every third slab", "4 bits", "a slab beyond 16 bits"],
)
def test_sums_that_leave_16_bits(
    name: str, channels: int, bits: int, low: int, high: int, slabs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events whose sums move to 32 bits every few slabs: every neuron fires, weights mostly of one sign."""
    rng = np.random.default_rng(channels)
    nodes: list[Node] = [InputTable("input", np.full((1, 256), 100))]
    nodes += [Conv("stem", "input", np.ones((channels, 1, 1, 1), int), 2), _affine("bn", "stem", channels)]
    nodes += [_lif("lif", "bn", rng, v_th=0)]
    nodes += [Conv("conv", "lif", rng.integers(low, high + 1, (66, channels, 3, 3)), bits, 1, 1)]
    nodes += [_affine("bn2", "conv", 66, 3, 9), _lif("lif2", "bn2", rng, 8), SumPool("sum", "lif2", 3, 4)]
    network = _network(nodes, InputSpec(1, 3, 4), 66)
    conv = network["conv"]
    assert isinstance(conv, Conv)
    assert plan._widen(network, conv) == slabs
    check(network, rng.integers(0, 256, (1, 1, 3, 4), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("ins", "outs", "groups", "stride"),
    [(70, 70, 70, 1), (70, 140, 70, 2), (130, 70, 10, 2), (60, 84, 12, 1), (130, 130, 2, 1), (96, 200, 4, 2)],
)
def test_groups(
    name: str, bits: int, ins: int, outs: int, groups: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of one input (depthwise) to more than a block of 64; of spikes, and of codes, whose sums leave 16 bits."""
    rng = np.random.default_rng([ins, bits])
    top = 2 ** (bits - 1) - 1
    nodes: list[Node] = [_table(2, rng), Conv("stem", "input", rng.integers(-7, 8, (ins, 2, 1, 1)), 4)]
    nodes += [_affine("bn", "stem", ins)]
    weight = rng.integers(-top, top + 1, (outs, ins // groups, 3, 2))
    for read in (_lif("read", "bn", rng), Requantize("read", "bn", 1, 8)):
        after = [read, Conv("conv", "read", weight, bits, stride, 1, groups), _affine("bn2", "conv", outs, 90, 9)]
        after += [_lif("lif2", "bn2", rng), Flatten("flat", "lif2")]
        network = _network([*nodes, *after], InputSpec(2, 5, 4), outs * (25 if stride == 1 else 9))
        check(network, rng.integers(0, 256, (2, 2, 5, 4), np.uint8), name, monkeypatch)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("code", [-128, 127, 0])
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_products_of_bytes_at_their_bounds(name: str, code: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes all at an end of their range, or 0 (all drawn), and weights too; inputs no multiple of four."""
    rng = np.random.default_rng([bits, code + 128])
    top = 2 ** (bits - 1) - 1
    table = np.full((13, 256), code) if code else rng.integers(-128, 128, (13, 256))
    weight = rng.choice([-top, top], (70, 1, 1, 1)) * np.ones((70, 13, 3, 3), int)
    nodes: list[Node] = [InputTable("input", table), Conv("conv", "input", weight, bits, 1, 1)]
    nodes += [_affine("bn", "conv", 70, 3, 7), _lif("lif", "bn", rng, v_th=0), SumPool("counts", "lif", 2, 2)]
    nodes += [Conv("conv2", "counts", rng.choice([-127, 127], (66, 1, 2, 2)) * np.ones((66, 70, 2, 2), int), 8)]
    nodes += [_affine("bn2", "conv2", 66, 3, 9), _lif("lif2", "bn2", rng), SumPool("sum", "lif2", 2, 3)]
    check(_network(nodes, InputSpec(13, 4, 5), 66), rng.integers(0, 256, (2, 13, 4, 5), np.uint8), name, monkeypatch)


def test_the_planted_networks_hold_every_kind_of_node() -> None:
    kinds = {type(node) for seed in range(40) for node in seeded_case(seed)[0].nodes}
    assert {BnAffine, BnDense, Add, MaxPool, SumPool, Linear, Requantize} <= kinds

"""What drives the crossbars, and what they make of it, by slow definitions: counts, averages, expectations, sums.

The inputs of every layer come from the reference's kernels as they are called, not from hwsim; counts and column sums
are then added up position by position and cell by cell.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

from mdsnn.hwsim.activity import load_of, measure, uniform
from mdsnn.hwsim.config import load_chip
from mdsnn.hwsim.crossbar import (
    CrossbarNetwork,
    Devices,
    _as_slice,
    _student_t,
    accumulate,
    adc_accuracy,
    analog_accuracy,
    analog_grid,
    lossless_check,
    program,
)
from mdsnn.hwsim.mapping import Layer, StreamOp, Workload, from_network, row_tiles
from mdsnn.kernels import Engine, reference
from mdsnn.kernels.engine import NodeBackend
from mdsnn.kernels.errors import ConfigError, InputError
from mdsnn.kernels.network import Conv, Linear, Readout
from planted import covering

CHIP = load_chip("fefet32")
SCHEMES = ("kernel-split", "im2col")


WANTED = {"Add", "Requantize", "SumPool", "MaxPool", "Linear", "groups", "stride", "image", "events", "padding"}
CASES = covering(
    WANTED | {"codes of a stream that moves"}, 400, least_timesteps=2, samples=3, max_channels=8, max_timesteps=3
)
"""Small networks with every node between them, images and events, 2 to 3 steps."""


class Recorder:
    """The reference's kernels, noting what every weight layer and pool is called with."""

    def __init__(self) -> None:
        self.inputs: dict[int, list[np.ndarray]] = {}
        self.pooled: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def conv2d(self, x: np.ndarray, weight: np.ndarray, *rest: Any) -> np.ndarray:
        self.inputs.setdefault(id(weight), []).append(x)
        return reference.conv2d(x, weight, *rest)

    def linear(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        self.inputs.setdefault(id(weight), []).append(x)
        return reference.linear(x, weight)

    def readout(self, total: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        self.inputs[id(weight)] = [total]  # called every step with the sum so far; the last is the sum over time
        return reference.readout(total, weight, bias)

    def max_pool(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        self.pooled.append(("maxpool", np.count_nonzero(x)))
        return reference.max_pool(x, *rest)

    def sum_pool(self, x: np.ndarray, *rest: Any) -> np.ndarray:
        self.pooled.append(("sumpool", np.count_nonzero(x)))
        return reference.sum_pool(x, *rest)


def bits_of(value: int, planes: int) -> list[int]:
    """Two's complement, least significant first; a single plane says whether the value is not 0."""
    return [int(value != 0)] if planes == 1 else [value >> plane & 1 for plane in range(planes)]


def driven(layer: Layer, x: np.ndarray, y: int, z: int) -> dict[tuple[int, int, int], list[int]]:
    """Bits of the inputs under the window of output position (y, z) of one sample, without padding."""
    found = {}
    for channel, ky, kx in itertools.product(range(layer.c_in), *map(range, layer.kernel)):
        row, column = y * layer.stride + ky - layer.padding, z * layer.stride + kx - layer.padding
        if 0 <= row < layer.size_in[0] and 0 <= column < layer.size_in[1]:
            found[channel, ky, kx] = bits_of(int(x[channel, row, column]), layer.planes)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_measured_counts_are_those_of_what_the_kernels_are_called_with(case: int, scheme: str) -> None:
    network, pixels = CASES[case]
    kernels = Recorder()
    trace = NodeBackend(network, cast(ModuleType, kernels), "recording").run(pixels, True).trace
    assert trace is not None
    rows = 3
    measured = measure(network, pixels, rows=rows, scheme=scheme, kernels="reference", batch=2)
    workload = from_network(network)
    load = load_of(measured, workload)
    nodes = {node.name: node for node in network.nodes}
    for layer in workload.layers:
        node = nodes[layer.name]
        assert isinstance(node, Conv | Linear | Readout)
        tile, used = row_tiles(layer, rows, scheme)
        inputs, row_counts = np.zeros(layer.steps), np.zeros((layer.c_in, *layer.kernel))
        visits, patches = np.zeros((2, layer.steps, len(used)))
        sites = np.zeros(layer.steps)
        steps = kernels.inputs[id(node.weight)]
        assert len(steps) == layer.steps
        for t, batch in enumerate(steps):
            for x, y, z in itertools.product(batch, *map(range, layer.size_out)):
                window = driven(layer, x, y, z)
                sites[t] += any(any(bits) for bits in window.values())
                for plane in range(layer.planes):
                    active = [place for place, bits in window.items() if bits[plane]]
                    met, positions = set(), set()
                    for channel, ky, kx in active:
                        row_counts[channel, ky, kx] += 1
                        place = ky * layer.kernel[1] + kx
                        met.add(int(tile[channel, place]))
                        positions.add((int(tile[channel, place]), place if scheme == "kernel-split" else 0))
                    for block in met:
                        patches[t, block] += 1
                    for block, _ in positions:
                        visits[t, block] += 1
            inputs[t] += sum(int(value) != 0 for value in batch.reshape(-1))
        got, mean = measured.layers[layer.name], load.layers[layer.name]
        for what, want in (
            ("inputs", inputs), ("rows", row_counts), ("visits", visits), ("patches", patches), ("sites", sites)
        ):  # fmt: skip
            np.testing.assert_array_equal(getattr(got, what), want, f"{layer.name} {what}")
            np.testing.assert_allclose(getattr(mean, what), want / 3, rtol=1e-14)
    for name, lif in trace.lifs.items():
        spikes = [int(step.sum()) for step in lif.s]
        np.testing.assert_array_equal(measured.spikes[name], spikes)
        np.testing.assert_allclose(load.spikes[name], np.array(spikes) / 3)
    pools = [op.name for op in workload.stream_ops if op.kind in ("maxpool", "sumpool")]
    assert list(measured.pools) == pools
    kinds = {op.name: op.kind for op in workload.stream_ops}
    by_kind = Counter[str]()
    for kind, count in kernels.pooled:
        by_kind[kind] += int(count)
    mine = Counter[str]()
    for name, count in measured.pools.items():
        mine[kinds[name]] += count
        assert load.pools[name] == pytest.approx(count / 3)
    assert +mine == +by_kind
    assert (load.measured, load.samples, load.rows, load.scheme) == (True, 3, rows, scheme)


LAYER = Layer("l", "conv", 6, 8, 1, (3, 2), 2, 1, (7, 6), (4, 4), 4, 1, 0, 1, 3, (), "affine", 424, 0, None)
SHAPES = [
    {},
    {"c_in": 12, "groups": 2},
    {"planes": 8, "low": -128, "high": 127},
    {"planes": 3, "high": 5},
    {"planes": 2, "high": 2},
    {"kernel": (1, 1), "padding": 0, "stride": 1, "size_in": (4, 4)},
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("over", SHAPES, ids=range(len(SHAPES)))
def test_expected_counts_position_by_position(over: dict[str, Any], density: float, scheme: str) -> None:
    """Every bit of an input comes alone; where a tile spans kernel positions, the mean share of them inside counts."""
    layer = replace(LAYER, **over)
    pool = StreamOp("pool", "sumpool", 5, 3, 4, 0, "lif", 20)
    other = StreamOp("add", "add", 5, 3, 1, 16, "l", 5)
    workload = Workload("w", (layer,), (), (pool, other), 3, (6, 7, 6), "events", 0, "")
    load = uniform(workload, density, rows=4, scheme=scheme)
    got = load.layers["l"]
    if layer.planes == 1:
        value = bit = density
    else:  # signed codes are never all 0 where there is input
        value = (1.0 if density else 0.0) if layer.low < 0 else density
        bit = value / 2
    used = row_tiles(layer, 4, scheme)[1]
    read = [
        (y, z, ky, kx)
        for y, z, ky, kx in itertools.product(range(4), range(4), *map(range, layer.kernel))
        if 0 <= y * layer.stride + ky - layer.padding < layer.size_in[0]
        and 0 <= z * layer.stride + kx - layer.padding < layer.size_in[1]
    ]
    positions = Counter((ky, kx) for _, _, ky, kx in read)
    share = len(read) / (16 * layer.taps)
    taps = layer.taps * share if scheme == "kernel-split" else share
    for channel, ky, kx in itertools.product(range(layer.c_in), *map(range, layer.kernel)):
        assert got.rows[channel, ky, kx] == pytest.approx(3 * layer.planes * bit * positions[ky, kx])
    for t, (tile, rows) in itertools.product(range(3), enumerate(used)):
        patch = layer.planes * 16 * (1 - (1 - bit) ** (rows * taps))
        visit = layer.planes * len(read) * (1 - (1 - bit) ** rows) if scheme == "kernel-split" else patch
        assert got.patches[t, tile] == pytest.approx(patch)
        assert got.visits[t, tile] == pytest.approx(visit)
        assert got.inputs[t] == pytest.approx(value * layer.c_in * math.prod(layer.size_in))
        assert got.sites[t] == pytest.approx(16 * (1 - (1 - value) ** (layer.c_in * layer.taps * share)))
    assert dict(load.pools) == {"pool": pytest.approx(density * 20 * 3)}
    assert (load.measured, load.samples) == (False, 0)


def test_rows_and_batches_have_their_limits() -> None:
    network, pixels = CASES[0]
    for rows in (1, 4096):
        assert measure(network, pixels, rows=rows).rows == rows
    for wrong in (0, 4097):
        with pytest.raises(ConfigError, match=f"rows = {wrong} is outside 1..4096"):
            measure(network, pixels, rows=wrong)
    with pytest.raises(ConfigError, match="batch = 0"):
        measure(network, pixels, batch=0)


# ------------------------------------------------------------------------------------------------- partial sums


def slow_sums(programmed: Any, x: np.ndarray, adc_bits: int, transfer: str) -> np.ndarray:
    """Column by column: drive the rows of a crossbar by one bit plane, convert, shift, add; then the offset."""
    layer = programmed.layer
    per_out = layer.c_out // layer.groups
    out = np.zeros((len(x), layer.c_out, *layer.size_out))
    top = 2**adc_bits - 1
    for n, y, z in itertools.product(range(len(x)), *map(range, layer.size_out)):
        window = driven(layer, x[n], y, z)
        by_row = {(ky * layer.kernel[1] + kx) * layer.c_in + c: bits for (c, ky, kx), bits in window.items()}
        for group, at, g in programmed.cells:
            full = len(at) * programmed.top_level
            step = full / top if transfer == "scale" and full > top else 1.0
            for plane in range(layer.planes):
                active = [row for row, place in enumerate(at) if by_row.get(int(place), [0] * layer.planes)[plane]]
                sums = g[active].sum(axis=0, dtype=np.float64)
                read = [step * min(max(round(float(s) / step), 0), top) for s in sums]
                weight = -(2**plane) if layer.low < 0 and plane == layer.planes - 1 else 2**plane
                for column, level in enumerate(read):
                    number, channel = divmod(column, per_out)
                    out[n, group * per_out + channel, y, z] += weight * int(programmed.factors[number]) * level
        per_in = layer.c_in // layer.groups
        for channel in range(layer.c_out):
            group = channel // per_out
            total = 0
            for c, ky, kx in itertools.product(range(group * per_in, (group + 1) * per_in), *map(range, layer.kernel)):
                row, column = y * layer.stride + ky - layer.padding, z * layer.stride + kx - layer.padding
                if 0 <= row < layer.size_in[0] and 0 <= column < layer.size_in[1]:
                    total += int(x[n, c, row, column])
            out[n, channel, y, z] -= programmed.offset * total
    return out


@pytest.mark.parametrize("coding", ["offset", "differential"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("devices", "adc_bits"), [(Devices(), 3), (Devices(), 6), (Devices(sigma=0.2), 3), (Devices(sigma=0.2), 9)]
)
@pytest.mark.parametrize("transfer", ["clip", "scale"])
def test_accumulators_column_by_column(
    coding: str, scheme: str, devices: Devices, adc_bits: int, transfer: str
) -> None:
    chip = CHIP.replaced({"mapping.coding": coding, "mapping.scheme": scheme, "crossbar.rows": 4, "cell.bits": 2})
    rng = np.random.default_rng(3)
    codes = rng.integers(-7, 8, (4, 3, 3, 2)).astype(np.int8)
    for low, high, planes in ((0, 1, 1), (-4, 3, 3), (0, 3, 2)):
        layer = replace(
            LAYER,
            c_in=6,
            c_out=4,
            groups=2,
            codes=codes,
            low=low,
            high=high,
            planes=planes,
            size_in=(4, 3),
            size_out=(2, 2),
        )
        x = rng.integers(low, high + 1, (2, 6, 4, 3))
        programmed = program(layer, chip, devices=devices, rng=np.random.default_rng(1))
        got = accumulate(programmed, x, adc_bits, transfer)
        np.testing.assert_allclose(got, slow_sums(programmed, x, adc_bits, transfer), rtol=0, atol=1e-4)
        assert programmed.exact == (devices == Devices())
        assert programmed.top_level == 3
        assert {g.dtype for _, _, g in programmed.cells} == {np.dtype(programmed.dtype)}
        assert programmed.dtype is (np.float32 if devices == Devices() else np.float64)


def test_an_adc_of_as_many_bits_as_the_scale_needs_one_more() -> None:
    """A column that reaches 2**bits is clipped to 2**bits - 1; one below is not."""
    chip = CHIP.replaced({"crossbar.rows": 4, "cell.bits": 1})
    layer = Layer("l", "conv", 4, 1, 1, (1, 1), 1, 0, (1, 1), (1, 1), 2, 1, 0, 1, 1, (), "", 0, 0,
                  np.ones((1, 4, 1, 1), np.int8))  # fmt: skip
    # codes of 1 are stored as 2 = 10b: the high slice sums to 4 levels, less the offset of 1 for each input
    ones = np.ones((1, 4, 1, 1), np.int64)
    assert accumulate(program(layer, chip), ones, 3, "clip").item() == 4
    assert accumulate(program(layer, chip), ones, 2, "clip").item() == 2 * 3 - 4


@pytest.mark.parametrize(
    "devices", [Devices(sigma=0.3), Devices(stuck_low=0.3, stuck_high=0.2), Devices(0.3, 0.2, 0.3)]
)
def test_cells_are_programmed_block_by_block(devices: Devices) -> None:
    """Stuck cells drawn first, then the variation; row tiles in order, in each its kernel positions."""
    chip = CHIP.replaced({"crossbar.rows": 2})
    codes = np.random.default_rng(0).integers(-7, 8, (3, 4, 2, 1)).astype(np.int8)
    layer = replace(LAYER, c_in=4, c_out=3, kernel=(2, 1), codes=codes)
    programmed = program(layer, chip, devices=devices, rng=np.random.default_rng(9))
    rng = np.random.default_rng(9)
    assert len(programmed.cells) == 2 * 2
    for (group, at, g), (tile, place) in zip(programmed.cells, itertools.product(range(2), range(2)), strict=True):
        channels = [2 * tile, 2 * tile + 1]
        assert (group, at.tolist()) == (0, [4 * place + channel for channel in channels])
        level = np.array([[int(codes[out, channel, place, 0]) + 7 for out in range(3)] for channel in channels])
        if devices.stuck_low or devices.stuck_high:
            draw = rng.random(level.shape)
            level = np.where(draw < devices.stuck_low, 0, np.where(draw > 1 - devices.stuck_high, 15, level))
        siemens = 5e-6 + 3e-6 * level
        if devices.sigma:
            siemens = siemens * np.maximum(rng.normal(1.0, devices.sigma, level.shape), 0)
        np.testing.assert_allclose(g, (siemens - 5e-6) / 3e-6, atol=1e-8)


def test_what_is_random_and_what_is_refused() -> None:
    assert not Devices().random
    assert not Devices(ir_drop=True).random
    assert Devices(sigma=0.5).random
    assert Devices(stuck_low=0.5).random
    assert Devices(stuck_high=0.5).random
    assert Devices(2.0, 1.0, 0.0).random
    assert Devices(2.0, 0.0, 1.0).random
    for wrong, text in (
        ({"sigma": 2.1}, "sigma = 2.1 is outside 0..2"),
        ({"stuck_low": 1.5}, "stuck_low = 1.5 is outside 0..1"),
        ({"stuck_high": -0.5}, "stuck_high = -0.5 is outside 0..1"),
        ({"stuck_low": 0.5, "stuck_high": 0.75}, "stuck_low . stuck_high = 1.25 is above 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            Devices(**wrong)


def test_the_limits_of_a_grid() -> None:
    network, pixels = CASES[0]
    labels = np.zeros(3, np.int64)
    ideal = CrossbarNetwork(network, CHIP)

    rng = np.random.default_rng(0)

    def grid(**over: Any) -> Any:
        given: dict[str, Any] = {"trials": 1, "devices": [Devices()], "adc_bits": [16], **over}
        return analog_grid(network, pixels, labels, CHIP, rng=rng, **given)

    for bits in (1, 32):
        assert ideal.with_adc(bits).run(pixels).shape[0] == 3
        assert grid(adc_bits=[bits])[0].bits == bits
    for bits in (0, 33):
        with pytest.raises(ConfigError, match=f"adc_bits = {bits} is outside 1..32"):
            ideal.with_adc(bits)
        with pytest.raises(ConfigError, match=f"adc_bits = {bits} is outside 1..32"):
            grid(adc_bits=[bits])
    assert len(grid(trials=10000)[0].accuracies) == 1  # nothing is random
    for over in ({"trials": 0}, {"trials": 10001}, {"trials": 1.0}):
        with pytest.raises(ConfigError, match="trials = "):
            grid(**over)
    for over in ({"devices": []}, {"adc_bits": []}):
        with pytest.raises(ConfigError, match="nothing to try"):
            grid(**over)
    with pytest.raises(ConfigError, match="transfer"):
        grid(transfer="fold")
    state = rng.bit_generator.state
    with pytest.raises(ConfigError, match="adc_bits = 33"):
        grid(adc_bits=[16, 33])
    assert rng.bit_generator.state == state  # refused before anything is drawn
    with pytest.raises(InputError, match="one each was expected"):
        analog_grid(network, pixels, labels[:2], CHIP, trials=1, rng=np.random.default_rng(0), devices=[Devices()],
                    adc_bits=[8])  # fmt: skip


def test_trials_share_their_draws_and_adcs_their_cells() -> None:
    """Trial k is one programming with seed k, whatever else is tried beside it."""
    network, pixels = next(case for case in CASES if case[0].input.coding == "events")
    labels = Engine(network, "reference", 1).run(pixels).predictions
    kinds, adcs = [Devices(sigma=1.0), Devices(), Devices(stuck_low=0.5)], [6, 12]
    found = analog_grid(
        network, pixels, labels, CHIP, trials=4, rng=np.random.default_rng(2), devices=kinds, adc_bits=adcs
    )
    assert [(each.devices, each.bits) for each in found] == list(itertools.product(kinds, adcs))
    seeds = np.random.default_rng(2).integers(0, 1 << 63, (4, 2))
    for each in found:
        wanted = []
        for seed in seeds if each.devices.random else seeds[:1]:
            rng = np.random.default_rng(tuple(map(int, seed)))
            logits = CrossbarNetwork(network, CHIP, adc_bits=each.bits, devices=each.devices, rng=rng).run(pixels)
            wanted.append(float(np.mean(logits.argmax(axis=1) == labels)))
        assert each.accuracies == tuple(wanted)
        assert each.samples == 3
    assert len(set(found[0].accuracies)) > 1
    (one,) = found[2].accuracies
    ideal = analog_accuracy(network, pixels, labels, CHIP, trials=4, rng=np.random.default_rng(2), devices=Devices())
    assert (ideal.bits, found[3].bits, found[3].mean, one) == (4, 12, 1.0, found[2].mean)
    same = {"trials": 4, "adc_bits": 12, "devices": kinds[0]}
    assert analog_accuracy(network, pixels, labels, CHIP, rng=np.random.default_rng(2), **same) == found[1]


def test_two_trials_have_an_interval() -> None:
    network, pixels = CASES[0]
    (one,) = analog_grid(
        network, pixels, np.zeros(3, np.int64), CHIP, trials=1, rng=np.random.default_rng(0), devices=[Devices()],
        adc_bits=[8],
    )  # fmt: skip
    half = 12.706 * np.std([0.5, 0.51], ddof=1) / 2**0.5
    assert replace(one, accuracies=(0.5, 0.51)).interval == pytest.approx((0.505 - half, 0.505 + half))


@pytest.mark.parametrize(("rows", "enough"), [(64, 10), (68, 10), (69, 11), (73, 11), (4, 6)])
def test_the_adcs_that_are_tried(rows: int, enough: int) -> None:
    """The chip's, clipping and scaling, and the lossless one: rows x 15 levels and 0 told apart."""
    network, pixels = CASES[0]
    labels = np.zeros(3, np.int64)
    chip = CHIP.replaced({"crossbar.rows": rows})

    def tried(chip: Any, **over: Any) -> list[tuple[int, str]]:
        return [(each.bits, each.transfer) for each in adc_accuracy(network, pixels, labels, chip, **over)]

    assert tried(chip) == [(4, "clip"), (4, "scale"), (enough, "clip")]
    assert tried(chip.replaced({"adc.bits": enough})) == [(enough, "clip")]
    assert tried(chip, bits=(enough, 2)) == [(enough, "clip"), (2, "clip"), (2, "scale")]
    with pytest.raises(InputError, match="one each was expected"):
        adc_accuracy(network, pixels, labels[:2], chip)


@pytest.mark.parametrize("coding", ["offset", "differential"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cell_bits", [1, 2, 4])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_the_largest_sum_of_any_column(bits: int, cell_bits: int, scheme: str, coding: str) -> None:
    """Crossbar by crossbar, column by column: what the stored cells sum to with all rows driven."""
    chip = CHIP.replaced(
        {"mapping.coding": coding, "mapping.scheme": scheme, "crossbar.rows": 5, "cell.bits": cell_bits, "adc.bits": 5}
    )
    delta = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(-delta, delta + 1, (4, 7, 1, 3)).astype(np.int8)
    layer = replace(LAYER, c_in=14, c_out=4, groups=2, kernel=(1, 3), bits=bits, codes=codes)
    workload = Workload("w", (layer,), (), (), 3, (14, 7, 6), "events", 0, "")
    check = lossless_check(workload, chip)["l"]
    tile, _ = row_tiles(layer, 5, scheme)
    largest, most_rows = 0, 0
    for group, out, sign, digit in itertools.product(range(2), range(2), (1, -1), range(8)):
        if coding == "offset" and sign < 0:
            continue
        sums, rows = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        for local, place in itertools.product(range(7), range(3)):
            code = int(codes[2 * group + out, local, 0, place])
            value = code + delta if coding == "offset" else max(sign * code, 0)
            crossbar = int(tile[7 * group + local, place]), place if scheme == "kernel-split" else 0
            sums[crossbar] += value >> (digit * cell_bits) & (2**cell_bits - 1)
            rows[crossbar] += 1
        largest, most_rows = max(largest, *sums.values()), max(most_rows, *rows.values())
    assert (check.rows, check.stored_scale, check.bits) == (most_rows, largest, 5)
    assert check.full_scale == most_rows * (2**cell_bits - 1)
    assert lossless_check(workload, chip, 7)["l"].bits == 7
    assert lossless_check(replace(workload, layers=(replace(layer, codes=None),)), chip)["l"].stored_scale is None


def test_places_in_a_row_are_a_slice() -> None:
    assert _as_slice(np.array([3, 4, 5])) == slice(3, 6)
    assert _as_slice(np.array([2])) == slice(2, 3)
    for places in ([3, 5, 6], [3, 5, 4, 6], [3, 4, 4, 6], [6, 5, 4], [0, 1, 2, 4]):
        assert isinstance(_as_slice(np.array(places)), np.ndarray)


def test_quantiles_of_student() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 200):
        assert _student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4 if freedom < 30 else 3e-3)

"""Crossbars at work: a network run through sliced cells, partial sums and ADCs.

Every weight layer is stored once as conductances (with device variation, if any); at run time each input bit plane
drives the rows, each crossbar's column sums go through the ADC, and the digital side shifts, adds and takes the offset
off. With ideal devices and a lossless ADC the result equals the integer engine bit for bit, which the tests hold.
Device variation, stuck cells and IR drop are drawn or solved once, when a network is programmed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from mdsnn.export import artifact
from mdsnn.kernels import reference
from mdsnn.kernels.engine import NodeBackend, check_pixels
from mdsnn.kernels.errors import ConfigError, InputError
from mdsnn.kernels.formats import Array, delta
from mdsnn.kernels.network import Conv, IntegerNetwork, Linear, Readout

from .cells import conductance, levels, slice_factors, vary
from .config import Chip
from .converters import AdcCheck, adc_step, check_adc, convert, lossless_bits
from .mapping import Layer, Workload, from_network, row_tiles
from .processes import run_tasks
from .wires import effective_conductance


@dataclass(frozen=True, eq=False)
class ProgrammedLayer:
    """A layer's cells as programmed.

    cells    for each block of crossbar rows: its group; the inputs it reads, as flat indices into (kh*kw, C_in); and
             its conductances in levels above level 0, (rows, columns*C_out/groups), slice by slice, float32 if exact,
             else float64 on a grid of 2**-30
    exact    the cells hold whole levels, so that column sums are whole numbers (exact in float32: below 2**24)
    factors  what each column of a weight counts, see cells.slice_factors
    offset   taken off for every unit of input: delta with offset coding, 0 differential
    """

    layer: Layer
    cells: tuple[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]], ...]
    factors: npt.NDArray[np.int64]
    offset: int
    top_level: int
    exact: bool

    @property
    def dtype(self) -> type[np.floating[Any]]:
        """What column sums are computed in."""
        return np.float32 if self.exact else np.float64


@dataclass(frozen=True)
class Devices:
    """What keeps cells and wires from being ideal; the default is ideal.

    sigma       sigma/mu of the conductances, see cells.vary
    stuck_low   share of cells stuck at level 0       stuck_high  share stuck at the top level
    ir_drop     whether the chip's wires have their resistance, see wires.effective_conductance
    raises      ConfigError  for a share outside 0..1, together above 1, or a sigma outside 0..2
    """

    sigma: float = 0.0
    stuck_low: float = 0.0
    stuck_high: float = 0.0
    ir_drop: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma <= 2.0:
            raise ConfigError(f"sigma = {self.sigma!r} is outside 0..2")
        for what, share in (("stuck_low", self.stuck_low), ("stuck_high", self.stuck_high)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{what} = {share!r} is outside 0..1")
        if self.stuck_low + self.stuck_high > 1.0:
            raise ConfigError(f"stuck_low + stuck_high = {self.stuck_low + self.stuck_high:g} is above 1")

    @property
    def random(self) -> bool:
        """Whether programming draws random numbers."""
        return self.sigma > 0 or self.stuck_low > 0 or self.stuck_high > 0


IDEAL = Devices()

_GRAIN: Final = float(1 << 30)
"""Conductances are rounded to 2**-30 of a level, so that sums of up to 4096 of them are exact in float64 in any order:
accuracies do not depend on threads, processes or the BLAS library."""


def _cells(
    level: npt.NDArray[np.uint8], chip: Chip, devices: Devices, rng: np.random.Generator | None
) -> npt.NDArray[np.floating[Any]]:
    """Conductances of one crossbar's cells as they act, in levels above level 0: (rows, columns)."""
    if devices == IDEAL:
        return level.astype(np.float32)
    cell_bits, g_min, g_max = chip.integer("cell.bits"), chip["cell.g_min"], chip["cell.g_max"]
    top = (1 << cell_bits) - 1
    if rng is not None and (devices.stuck_low or devices.stuck_high):
        draw = rng.random(level.shape)
        level = np.where(draw < devices.stuck_low, 0, level)
        level = np.where(draw >= 1.0 - devices.stuck_high, top, level)
    g = conductance(level, g_min, g_max, cell_bits)
    if rng is not None and devices.sigma:
        g = vary(g, devices.sigma, rng)
    if devices.ir_drop:
        columns = chip.integer("crossbar.columns")
        row, column = chip["wire.row_resistance"], chip["wire.column_resistance"]
        blocks = [g[:, at : at + columns] for at in range(0, g.shape[1], columns)]
        g = np.concatenate([effective_conductance(block, row, column) for block in blocks], axis=1)
    return np.rint((g - g_min) * (top / (g_max - g_min) * _GRAIN)) / _GRAIN


def program(
    layer: Layer, chip: Chip, *, devices: Devices = IDEAL, rng: np.random.Generator | None = None
) -> ProgrammedLayer:
    """Store the codes of `layer` in cells, once.

    rng     needed where the devices are random
    raises  ConfigError  for a layer without codes, or random devices without a generator
    """
    if layer.codes is None:
        raise ConfigError(f"layer {layer.name!r}: has no weight codes to program")
    if devices.random and rng is None:
        raise ConfigError("device variation needs a random generator: pass rng=numpy.random.default_rng(seed)")
    cell_bits, coding = chip.integer("cell.bits"), chip.choice("mapping.coding")
    scheme, rows = chip.choice("mapping.scheme"), chip.integer("crossbar.rows")
    stored = levels(layer.codes, layer.bits, cell_bits, coding)  # columns, C_out, C_in/groups, kh, kw
    columns = len(stored)
    per_in, per_out = layer.c_in // layer.groups, layer.c_out // layer.groups
    tile, _ = row_tiles(layer, rows, scheme)
    cells: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]] = []
    for group in range(layer.groups):
        own = stored[:, group * per_out : (group + 1) * per_out].reshape(columns, per_out, per_in * layer.taps)
        ids = tile[group * per_in : (group + 1) * per_in].copy()
        if scheme == "kernel-split":  # a block of rows for each kernel position
            ids = ids * layer.taps + np.arange(layer.taps)[None, :]
        flat = ids.ravel()
        for block in np.unique(flat):
            at = np.flatnonzero(flat == block)
            level = own[:, :, at].transpose(2, 0, 1).reshape(len(at), columns * per_out)
            channel, place = group * per_in + at // layer.taps, at % layer.taps
            cells.append((group, place * layer.c_in + channel, _cells(level, chip, devices, rng)))
    offset = delta(layer.bits) if coding == "offset" else 0
    return ProgrammedLayer(
        layer,
        tuple(cells),
        slice_factors(layer.bits, cell_bits, coding),
        offset,
        (1 << cell_bits) - 1,
        devices == IDEAL,
    )


def accumulate(programmed: ProgrammedLayer, x: Array, adc_bits: int, transfer: str) -> npt.NDArray[np.float64]:
    """Accumulators of a layer through its crossbars.

    x         (N, C_in, H, W) integers in the layer's range
    adc_bits  1..32             transfer  "clip" or "scale", see converters
    returns   (N, C_out, H_out, W_out) float64; integers where every conversion is exact
    """
    layer = programmed.layer
    pad, (kh, kw), stride = layer.padding, layer.kernel, layer.stride
    height, width = layer.size_out
    last = np.pad(x.astype(np.int32).transpose(0, 2, 3, 1), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    n = len(last)
    windows = np.empty((n, height, width, layer.taps, layer.c_in), np.int32)
    for ky in range(kh):
        for kx in range(kw):
            rows, columns = (
                slice(ky, ky + stride * (height - 1) + 1, stride),
                slice(kx, kx + stride * (width - 1) + 1, stride),
            )
            windows[:, :, :, ky * kw + kx] = last[:, rows, columns]
    flat = windows.reshape(n * height * width, layer.taps * layer.c_in)
    per_out, factors = layer.c_out // layer.groups, [int(factor) for factor in programmed.factors]
    out = np.zeros((len(flat), layer.groups, per_out))
    for plane in range(layer.planes):
        bits = (flat if layer.planes == 1 else (flat >> plane) & 1).astype(programmed.dtype)
        weight = -(1 << plane) if layer.low < 0 and plane == layer.planes - 1 else 1 << plane
        for group, at, g in programmed.cells:
            sums = bits[:, _as_slice(at)] @ g
            full_scale = len(at) * programmed.top_level
            if not programmed.exact or full_scale >= 1 << adc_bits:  # else the conversion changes nothing
                sums = convert(sums, full_scale, adc_bits, transfer)
            for number, factor in enumerate(factors):  # the columns lie slice by slice
                out[:, group] += sums[:, number * per_out : (number + 1) * per_out] * (weight * factor)
    if programmed.offset:
        per_in = layer.c_in // layer.groups
        totals = flat.reshape(len(flat), layer.taps, layer.groups, per_in).sum(axis=(1, 3), dtype=np.int64)
        out -= programmed.offset * totals[:, :, None]
    return out.reshape(n, height, width, layer.c_out).transpose(0, 3, 1, 2)


def _as_slice(at: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """The same places as a slice where they follow each other, so that taking them copies nothing."""
    first, last = int(at[0]), int(at[-1])
    return slice(first, last + 1) if last - first == len(at) - 1 and np.all(np.diff(at) == 1) else at


class _Kernels:
    """The reference kernels with weight layers replaced by crossbars; layers are told apart by their weight arrays."""

    def __init__(self, by_weight: dict[int, ProgrammedLayer], adc_bits: int, transfer: str) -> None:
        self._by_weight, self._adc_bits, self._transfer = by_weight, adc_bits, transfer

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def _run(self, x: Array, weight: Array) -> Array:
        sums = accumulate(self._by_weight[id(weight)], x, self._adc_bits, self._transfer)
        return np.rint(sums).astype(np.int64)

    def conv2d(self, x: Array, weight: Array, stride: int, padding: int, groups: int) -> Array:
        return self._run(x, weight)

    def linear(self, x: Array, weight: Array) -> Array:
        return self._run(x, weight)

    def readout(self, total: Array, weight: Array, bias: Array) -> Array:
        logits: Array = self._run(total, weight)[:, :, 0, 0] + bias.astype(np.int64)
        return logits

    def bn_dense(self, acc: Array, table: Array, lo: Array, hi: Array) -> Array:
        """A dense table holds reachable accumulators only; analog errors may leave them, and then the edge is read."""
        low, high = (bound[None, :, None, None] for bound in (lo, hi))
        return reference.bn_dense(np.clip(acc, low, high), table, lo, hi)


class CrossbarNetwork:
    """A network programmed into crossbars once; `run` gives logits.

    chip      model physical
    adc_bits  1..32; None: the chip's
    transfer  "clip" or "scale"
    devices   ideal by default      rng  needed where they are random
    raises    ConfigError  for random devices without a generator
    """

    def __init__(
        self,
        network: IntegerNetwork,
        chip: Chip,
        *,
        adc_bits: int | None = None,
        transfer: str = "clip",
        devices: Devices = IDEAL,
        rng: np.random.Generator | None = None,
    ) -> None:
        chip.require("physical")
        bits = chip.integer("adc.bits") if adc_bits is None else adc_bits
        self.network = network
        nodes = {node.name: node for node in network.nodes}
        by_weight: dict[int, ProgrammedLayer] = {}
        for layer in from_network(network).layers:
            node = nodes[layer.name]
            assert isinstance(node, Conv | Linear | Readout)  # that is what a workload's layers are made of
            by_weight[id(node.weight)] = program(layer, chip, devices=devices, rng=rng)
        self._by_weight = by_weight
        self._read_by(bits, transfer)

    def _read_by(self, bits: int, transfer: str) -> None:
        if not 1 <= bits <= 32:
            raise ConfigError(f"adc_bits = {bits} is outside 1..32")
        kernels = cast(ModuleType, _Kernels(self._by_weight, bits, transfer))
        self._backend = NodeBackend(self.network, kernels, "crossbar")

    def with_adc(self, bits: int, transfer: str = "clip") -> CrossbarNetwork:
        """The same programmed cells, read by another ADC.

        bits  1..32        transfer  "clip" or "scale"        raises  ConfigError  for bits out of range
        """
        other = copy.copy(self)
        other._read_by(bits, transfer)
        return other

    def run(self, pixels: npt.ArrayLike, *, batch: int = 64) -> npt.NDArray[np.int32]:
        """Logits (N, classes) int32 of uint8 pixels, as Engine.run takes them."""
        array = check_pixels(self.network, pixels)
        axis = array.ndim - 4
        parts = [
            self._backend.run(np.ascontiguousarray(array[(slice(None),) * axis + (slice(at, at + batch),)]), False)
            for at in range(0, array.shape[axis], batch)
        ]
        return np.concatenate([part.logits for part in parts])


@dataclass(frozen=True)
class AdcAccuracy:
    """Accuracy of a network under one ADC. agreement: share of samples with the integer engine's prediction."""

    bits: int
    transfer: str
    accuracy: float
    agreement: float
    exact: bool
    samples: int


def adc_accuracy(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    labels: npt.ArrayLike,
    chip: Chip,
    *,
    bits: Sequence[int] | None = None,
) -> tuple[AdcAccuracy, ...]:
    """Accuracy with ideal devices under the chip's ADC, clipping and scaling, and under a lossless one.

    labels   (N,) integers
    bits     None: the chip's resolution and the lossless one
    raises   InputError  if labels and pixels differ in number
    """
    array = check_pixels(network, pixels)
    truth = np.asarray(labels)
    if truth.shape != (array.shape[-4],):
        raise InputError(f"{truth.shape} labels for {array.shape[-4]} samples; one each was expected")
    exact_logits = NodeBackend(network, reference, "reference").run(array, False).logits
    expected = exact_logits.argmax(axis=1)
    full = chip.integer("crossbar.rows") * ((1 << chip.integer("cell.bits")) - 1)
    own, enough = chip.integer("adc.bits"), lossless_bits(full)
    cases = [(b, t) for b in (bits or (own,)) for t in (("clip", "scale") if b < enough else ("clip",))]
    if bits is None and own < enough:
        cases.append((enough, "clip"))
    results: list[AdcAccuracy] = []
    for b, transfer in cases:
        logits = CrossbarNetwork(network, chip, adc_bits=b, transfer=transfer).run(array)
        guess = logits.argmax(axis=1)
        results.append(
            AdcAccuracy(
                b,
                transfer,
                float(np.mean(guess == truth)),
                float(np.mean(guess == expected)),
                bool(np.array_equal(logits, exact_logits)),
                len(truth),
            )
        )
    return tuple(results)


@dataclass(frozen=True)
class AnalogAccuracy:
    """Accuracy over trials, each programmed anew.

    accuracies     one a trial; one in all where nothing is random, for every programming is the same
    interval       of the mean, 95 % confidence, over programmings of these samples
    """

    devices: Devices
    bits: int
    transfer: str
    samples: int
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean(self.accuracies))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean over programmings, Student's t, cut to 0..1.

        One trial of random devices tells nothing: 0..1. Where nothing is random it is the mean itself.
        """
        n = len(self.accuracies)
        if n < 2:
            return (0.0, 1.0) if self.devices.random else (self.mean, self.mean)
        half = _student_t(n - 1) * float(np.std(self.accuracies, ddof=1)) / np.sqrt(n)
        return max(0.0, self.mean - half), min(1.0, self.mean + half)


def _student_t(freedom: int) -> float:
    """97.5 % quantile of Student's t; tabulated where it differs from the normal by more than 1 %."""
    table: tuple[float, ...]
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
    table += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.4 / freedom


@functools.lru_cache(maxsize=2)
def network_of(content: bytes) -> IntegerNetwork:
    """A network of its artifact's bytes, kept between the tasks of a process."""
    return artifact.from_bytes(content)


def _analog_trial(
    place: int,
    content: bytes,
    pixels: npt.NDArray[np.uint8],
    truth: Array,
    chip: Chip,
    devices: Devices,
    seed: tuple[int, ...],
    bits: tuple[int, ...],
    transfer: str,
) -> tuple[int, list[float]]:
    """`place`, and the accuracy of one programming under each ADC."""
    programmed = CrossbarNetwork(network_of(content), chip, devices=devices, rng=np.random.default_rng(seed))
    return place, [
        float(np.mean(programmed.with_adc(each, transfer).run(pixels).argmax(axis=1) == truth)) for each in bits
    ]


def analog_grid(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    labels: npt.ArrayLike,
    chip: Chip,
    *,
    trials: int,
    rng: np.random.Generator,
    devices: Sequence[Devices],
    adc_bits: Sequence[int],
    transfer: str = "clip",
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[AnalogAccuracy, ...]:
    """Accuracy of the artifact on crossbars of non-ideal devices, by Monte Carlo over programmings.

    labels    (N,) integers          trials  1..10000
    rng       seeds the trials; the result does not depend on `jobs`. Trial k draws the same numbers for all devices,
              and one programming is read by all ADCs, so that differences between them are not chance
    devices   what to try; one trial where nothing is random
    adc_bits  1..32 each             transfer  "clip" or "scale"
    jobs      processes (joblib); 1 stays in this one
    progress  called with (programmings done, programmings)
    returns   for each of `devices`, in order, one for each of `adc_bits`
    raises    InputError    if labels and pixels differ in number
              ConfigError   for trials, jobs or bits out of range, or nothing to try
              MissingError  if jobs > 1 and joblib is not installed, or for IR drop without scipy
    """
    if type(trials) is not int or not 1 <= trials <= 10000:
        raise ConfigError(f"trials = {trials!r} is outside 1..10000")
    for each in adc_bits:
        if not 1 <= each <= 32:
            raise ConfigError(f"adc_bits = {each} is outside 1..32")
    if not devices or not adc_bits:
        raise ConfigError("there is nothing to try: give at least one kind of devices and one ADC")
    adc_step(1, 1, transfer)  # refuse a bad name now
    chip.require("physical")
    array = check_pixels(network, pixels)
    truth = np.asarray(labels)
    if truth.shape != (array.shape[-4],):
        raise InputError(f"{truth.shape} labels for {array.shape[-4]} samples; one each was expected")
    seeds = [tuple(map(int, row)) for row in rng.integers(0, 1 << 63, (trials, 2))]
    content = artifact.to_bytes(network)
    tasks: list[tuple[Any, ...]] = []
    spans: list[range] = []
    for kind in devices:
        chosen = seeds if kind.random else seeds[:1]
        spans.append(range(len(tasks), len(tasks) + len(chosen)))
        for seed in chosen:
            tasks.append((len(tasks), content, array, truth, chip, kind, seed, tuple(adc_bits), transfer))
    found: dict[int, list[float]] = {}
    for place, accuracies in run_tasks(_analog_trial, tasks, jobs=jobs):
        found[place] = accuracies
        if progress is not None:
            progress(len(found), len(tasks))
    return tuple(
        AnalogAccuracy(kind, each, transfer, len(truth), tuple(found[place][number] for place in span))
        for kind, span in zip(devices, spans, strict=True)
        for number, each in enumerate(adc_bits)
    )


def analog_accuracy(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    labels: npt.ArrayLike,
    chip: Chip,
    *,
    trials: int,
    rng: np.random.Generator,
    devices: Devices | None = None,
    adc_bits: int | None = None,
    transfer: str = "clip",
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> AnalogAccuracy:
    """`analog_grid` for one kind of devices and one ADC.

    devices   None: the chip's cell.sigma, no stuck cells, ideal wires
    adc_bits  None: the chip's
    """
    drawn = Devices(sigma=chip["cell.sigma"]) if devices is None else devices
    bits = chip.integer("adc.bits") if adc_bits is None else adc_bits
    return analog_grid(
        network,
        pixels,
        labels,
        chip,
        trials=trials,
        rng=rng,
        devices=(drawn,),
        adc_bits=(bits,),
        transfer=transfer,
        jobs=jobs,
        progress=progress,
    )[0]


def lossless_check(workload: Workload, chip: Chip, bits: int | None = None) -> dict[str, AdcCheck]:
    """The lossless check of every layer, with the largest column sum its stored codes can reach.

    bits  None: the chip's ADC, if it states one
    """
    cell_bits, coding = chip.integer("cell.bits"), chip.choice("mapping.coding")
    rows, scheme = chip.integer("crossbar.rows"), chip.choice("mapping.scheme")
    adc_bits = chip.integer("adc.bits") if bits is None and "adc.bits" in chip.constants else bits
    checks: dict[str, AdcCheck] = {}
    for layer in workload.layers:
        tile, used = row_tiles(layer, rows, scheme)
        checks[layer.name] = check_adc(
            int(used.max()),
            (1 << cell_bits) - 1,
            None if layer.codes is None else _stored_scale(layer, tile, cell_bits, coding, scheme),
            adc_bits,
        )
    return checks


def _stored_scale(layer: Layer, tile: Array, cell_bits: int, coding: str, scheme: str) -> int:
    """Largest column sum of any crossbar of the layer with all its rows active, in levels."""
    assert layer.codes is not None  # the caller's case
    per_in = layer.c_in // layer.groups
    local = tile[:per_in]  # every group falls into tiles in the same way
    c_out = layer.c_out
    # uint8 levels summed tile by tile: one reduceat along channels (kernel-split) or along flat rows (im2col)
    best = 0
    offset = delta(layer.bits)
    single = coding == "offset" and -(-layer.bits // cell_bits) == 1
    planes = [layer.codes] if single else list(levels(layer.codes, layer.bits, cell_bits, coding))
    for plane in planes:
        if scheme == "kernel-split":
            starts = np.unique(local[:, 0], return_index=True)[1]
            sums = np.add.reduceat(plane, starts, axis=1, dtype=np.int32)
            counts = np.diff(starts, append=per_in)[None, :, None, None]
        else:
            starts = np.unique(local, return_index=True)[1]
            sums = np.add.reduceat(plane.reshape(c_out, local.size), starts, axis=1, dtype=np.int32)
            counts = np.diff(starts, append=local.size)[None, :]
        best = max(best, int((sums + offset * counts).max() if single else sums.max()))
    return best

"""Activity: what the spikes of real data make a crossbar do, counted exactly.

`measure` runs a network on samples, and counts for every weight layer and step how many inputs were not 0, how often
each row was driven, how many row tiles had anything to do, and at how many output positions; and for every neuron
population how many spikes it sent. An input of several bits is applied bit plane by bit plane (two's complement), and
every plane counts. The counts carry the artifact's digest, so that they cannot be used for another network.
`uniform` gives the expected counts of independent inputs of one density instead, for exploring without a network.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mdsnn.kernels import reference
from mdsnn.kernels.engine import Engine, LifTrace, NodeBackend, check_pixels
from mdsnn.kernels.errors import ConfigError, InputError
from mdsnn.kernels.files import read_bounded, write_bytes
from mdsnn.kernels.formats import Array, delta
from mdsnn.kernels.network import IntegerNetwork, Lif, Readout

from .mapping import Layer, Workload, from_network, row_tiles

SCHEMA: Final = "mdsnn.activity/2"
MAX_FILE: Final = 256 * 1024 * 1024
MAX_MEMBERS: Final = 50_000
_COUNTS: Final = ("inputs", "rows", "visits", "patches", "sites")

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LayerActivity:
    """Counts of one weight layer, summed over the samples; S = steps of the layer.

    inputs   (S,)            input values that are not 0
    rows     (C_in, kh, kw)  times the row of a channel at a kernel position was driven, over all steps and planes
    visits   (S, tiles)      times a row tile (one crossbar's rows) had an active row; kernel-split: over all positions
    patches  (S, tiles)      times a row tile had an active row anywhere in the kernel window
    sites    (S,)            output positions with any active row
    """

    inputs: Counts
    rows: Counts
    visits: Counts
    patches: Counts
    sites: Counts


@dataclass(frozen=True, eq=False)
class Activity:
    """Counts over `samples` samples. layers by node name; spikes: LIF name -> (T,); pools: pool name -> inputs not 0.

    digest          of the network they were measured on (export.artifact.digest)
    rows, scheme    crossbar rows and mapping scheme that the tiles were counted for
    source          what the samples were, for the report
    """

    digest: str
    samples: int
    timesteps: int
    rows: int
    scheme: str
    source: str
    layers: Mapping[str, LayerActivity]
    spikes: Mapping[str, Counts]
    pools: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class LayerLoad:
    """Averages of one layer for one sample; arrays as in LayerActivity, float64."""

    inputs: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64]
    visits: npt.NDArray[np.float64]
    patches: npt.NDArray[np.float64]
    sites: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Load:
    """What one average sample makes the chip do, measured or assumed (`measured` says which)."""

    layers: Mapping[str, LayerLoad]
    spikes: Mapping[str, npt.NDArray[np.float64]]
    pools: Mapping[str, float]
    rows: int
    scheme: str
    source: str
    measured: bool
    samples: int


# ------------------------------------------------------------------------------------------------------ counting


def count_windows(
    active: npt.NDArray[np.bool_], layer: Layer, rows: int, scheme: str, planes: int = 1
) -> tuple[Counts, Counts, Counts, int]:
    """Count what a layer's sliding windows meet.

    active   (planes*M, C_in, H, W) bool, plane by plane
    returns  rows (C_in, kh, kw), visits (tiles,), patches (tiles,), sites; see LayerActivity
    """
    tile, used = row_tiles(layer, rows, scheme)
    (kh, kw), stride, pad = layer.kernel, layer.stride, layer.padding
    height, width = layer.size_out
    padded = np.pad(active, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    sums = padded.sum(axis=0, dtype=np.int64)
    taps = [(ky, kx) for ky in range(kh) for kx in range(kw)]

    def view(array: Array, ky: int, kx: int) -> Array:
        part: Array = array[
            ..., ky : ky + stride * (height - 1) + 1 : stride, kx : kx + stride * (width - 1) + 1 : stride
        ]
        return part

    driven = np.empty((layer.c_in, kh, kw), np.int64)
    for ky, kx in taps:
        driven[:, ky, kx] = view(sums, ky, kx).sum(axis=(1, 2))
    patch = np.zeros((len(active), len(used), height, width), np.bool_)
    if scheme == "kernel-split":
        starts = np.unique(tile[:, 0], return_index=True)[1]
        any_row = np.logical_or.reduceat(padded, starts, axis=1)
        visits = np.zeros(len(used), np.int64)
        for ky, kx in taps:
            seen = view(any_row, ky, kx)
            visits += seen.sum(axis=(0, 2, 3), dtype=np.int64)
            patch |= seen
    else:
        for place, (ky, kx) in enumerate(taps):
            ids = tile[:, place]
            starts = np.unique(ids, return_index=True)[1]
            patch[:, ids[starts]] |= np.logical_or.reduceat(view(padded, ky, kx), starts, axis=1)
        visits = patch.sum(axis=(0, 2, 3), dtype=np.int64)
    patches = patch.sum(axis=(0, 2, 3), dtype=np.int64)
    any_tile = patch.any(axis=1)
    sites = int(any_tile.reshape(planes, len(active) // planes, height, width).any(axis=0).sum())
    return driven, visits, patches, sites


def _planes(values: Array, planes: int) -> npt.NDArray[np.bool_]:
    """Bit planes of integer values, two's complement, least significant first, joined along the first axis."""
    if planes == 1:
        ones: npt.NDArray[np.bool_] = values != 0
        return ones
    return np.concatenate([((values >> plane) & 1).astype(np.bool_) for plane in range(planes)])


class _Values:
    """Values of any node at any step, from a trace: spikes come from it, the rest is recomputed by the reference."""

    def __init__(self, network: IntegerNetwork, pixels: npt.NDArray[np.uint8], lifs: Mapping[str, LifTrace]) -> None:
        self.network, self.pixels, self.lifs = network, pixels, lifs
        self.nodes = {node.name: node for node in network.nodes}
        self.backend = NodeBackend(network, reference, "reference")
        self.by_source = {lif.source: lif for lif in network.lifs}
        self.static: dict[str, Array] = {}
        self.t: int | None = None
        self.now: dict[str, Array] = {}

    def at(self, name: str, t: int) -> Array:
        """The value of a node at step t, [N, C, H, W]."""
        if t != self.t:
            self.t, self.now = t, {}
        store = self.static if self.network.proof.static[name] else self.now
        if name not in store:
            store[name] = self._compute(name, t)
        return store[name]

    def _compute(self, name: str, t: int) -> Array:
        node = self.nodes[name]
        if isinstance(node, Lif):
            spikes: Array = self.lifs[name].s[t]
            return spikes
        if name in self.by_source:  # the stream a LIF reads is h less what it kept
            lif = self.by_source[name]
            trace = self.lifs[lif.name]
            q = trace.q[t - 1] if t else np.zeros_like(trace.q[0])
            stream: Array = trace.h[t] - lif.decode[q.astype(np.int64) + delta(lif.bits)].astype(np.int64)
            return stream
        frame = self.pixels if self.pixels.ndim == 4 else self.pixels[t]
        return self.backend.value(node, {source: self.at(source, t) for source in node.inputs}, frame)


def measure(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    *,
    rows: int = 64,
    scheme: str = "kernel-split",
    source: str = "measured",
    kernels: str | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Activity:
    """Run `network` on real samples and count what its layers do on crossbars.

    pixels    uint8 [N, C, H, W] images or [T, N, C, H, W] event counts
    rows      crossbar rows of the chip, 1..4096        scheme  its mapping: kernel-split or im2col
    kernels   engine, see kernels.engine.Engine         batch   samples at a time (bounds memory)
    progress  called with (samples done, samples)
    raises    InputError   if the pixels do not fit the network
              ConfigError  for a scheme or rows that are not known
    """
    if type(rows) is not int or not 1 <= rows <= 4096:
        raise ConfigError(f"rows = {rows!r} is outside 1..4096")
    if type(batch) is not int or batch < 1:
        raise ConfigError(f"batch = {batch!r} is below 1")
    array = check_pixels(network, pixels)
    workload = from_network(network)
    nodes = {node.name: node for node in network.nodes}
    sources = {layer.name: nodes[layer.name].inputs[0] for layer in workload.layers}
    engine = Engine(network, kernels)
    axis = array.ndim - 4
    samples = array.shape[axis]
    layers: dict[str, LayerActivity] = {}
    for layer in workload.layers:
        tiles = len(row_tiles(layer, rows, scheme)[1])
        layers[layer.name] = LayerActivity(
            np.zeros(layer.steps, np.int64),
            np.zeros((layer.c_in, *layer.kernel), np.int64),
            np.zeros((layer.steps, tiles), np.int64),
            np.zeros((layer.steps, tiles), np.int64),
            np.zeros(layer.steps, np.int64),
        )
    spikes = {entry.name: np.zeros(network.timesteps, np.int64) for entry in workload.populations}
    pools = {op.name: 0 for op in workload.stream_ops if op.kind in ("maxpool", "sumpool")}
    for at in range(0, samples, batch):
        part = np.ascontiguousarray(array[(slice(None),) * axis + (slice(at, at + batch),)])
        trace = engine.run(part, trace=True).trace
        assert trace is not None  # asked for
        values = _Values(network, part, trace.lifs)
        totals: dict[str, Array] = {}
        for t in range(network.timesteps):
            for layer in workload.layers:
                x = values.at(sources[layer.name], t)
                if isinstance(nodes[layer.name], Readout):
                    totals[layer.name] = x.astype(np.int64) + totals.get(layer.name, 0)
                elif t < layer.steps:
                    _count(layers[layer.name], t, x, layer, rows, scheme)
            for op in workload.stream_ops:
                if op.name in pools:
                    pools[op.name] += int(np.count_nonzero(values.at(op.source, t)))
        for layer in workload.layers:
            if layer.name in totals:
                _count(layers[layer.name], 0, totals[layer.name], layer, rows, scheme)
        for name, counts in spikes.items():
            counts += trace.lifs[name].s.sum(axis=(1, 2, 3, 4), dtype=np.int64)
        if progress is not None:
            progress(min(at + batch, samples), samples)
    return Activity(workload.digest, samples, network.timesteps, rows, scheme, source, layers, spikes, pools)


def _count(into: LayerActivity, step: int, x: Array, layer: Layer, rows: int, scheme: str) -> None:
    driven, visits, patches, sites = count_windows(_planes(x, layer.planes), layer, rows, scheme, layer.planes)
    into.inputs[step] += np.count_nonzero(x)
    into.rows[...] += driven
    into.visits[step] += visits
    into.patches[step] += patches
    into.sites[step] += sites


# --------------------------------------------------------------------------------------------------------- loads


def load_of(activity: Activity, workload: Workload) -> Load:
    """Averages a sample of measured counts, for the network they were measured on.

    raises  ConfigError  if they belong to another network
    """
    if activity.digest != workload.digest:
        raise ConfigError(
            f"activity was measured on network {activity.digest[:12]}, not on {workload.name} "
            f"({workload.digest[:12] or 'a workload without weights'}); measure it again"
        )
    n = float(activity.samples)
    layers = {
        name: LayerLoad(entry.inputs / n, entry.rows / n, entry.visits / n, entry.patches / n, entry.sites / n)
        for name, entry in activity.layers.items()
    }
    return Load(
        layers,
        {name: counts / n for name, counts in activity.spikes.items()},
        {name: count / n for name, count in activity.pools.items()},
        activity.rows,
        activity.scheme,
        f"{activity.source}, {activity.samples} samples",
        True,
        activity.samples,
    )


def uniform(workload: Workload, density: float, *, rows: int = 64, scheme: str = "kernel-split") -> Load:
    """Expected counts if every spike comes independently with probability `density`, 0..1.

    Values of several bits: image and shortcut codes have every bit set half the time; event counts and pooled counts
    are not 0 with probability `density`, and then every bit half the time. Density 0 means no input at all.
    raises  ConfigError  for a density outside 0..1
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 <= density <= 1.0:
        raise ConfigError(f"density = {density!r} is outside 0..1")
    p = float(density)
    layers: dict[str, LayerLoad] = {}
    for layer in workload.layers:
        used = row_tiles(layer, rows, scheme)[1]
        value = 1.0 if layer.low < 0 and p > 0 else p
        bit = value * 0.5 if layer.planes > 1 else value
        valid = np.array([[_inside(layer, ky, kx) for kx in range(layer.kernel[1])] for ky in range(layer.kernel[0])])
        driven = np.broadcast_to(bit * layer.planes * valid, (layer.c_in, *layer.kernel)).astype(np.float64)
        share = float(valid.sum()) / (layer.taps * layer.sites)  # of a window inside the image
        passes = layer.planes * layer.sites
        if scheme == "kernel-split":
            visits = layer.planes * float(valid.sum()) * (1.0 - (1.0 - bit) ** used)
            patches = passes * (1.0 - (1.0 - bit) ** (used * layer.taps * share))
        else:
            visits = patches = passes * (1.0 - (1.0 - bit) ** (used * share))
        sites = layer.sites * (1.0 - (1.0 - value) ** (layer.c_in * layer.taps * share))
        ones = np.ones(layer.steps)
        layers[layer.name] = LayerLoad(
            ones * value * layer.values_in,
            driven * layer.steps,
            np.outer(ones, visits),
            np.outer(ones, patches),
            ones * sites,
        )
    spikes = {entry.name: np.full(workload.timesteps, p * entry.neurons) for entry in workload.populations}
    pools = {op.name: p * op.values_in * op.steps for op in workload.stream_ops if op.kind in ("maxpool", "sumpool")}
    return Load(layers, spikes, pools, rows, scheme, f"assumed: uniform density {p:g}", False, 0)


def _inside(layer: Layer, ky: int, kx: int) -> int:
    """Output positions at which the kernel position (ky, kx) reads a real input, not padding."""
    counts = []
    for size_in, size_out, k in zip(layer.size_in, layer.size_out, (ky, kx), strict=True):
        at = np.arange(size_out) * layer.stride + k - layer.padding
        counts.append(int(np.count_nonzero((at >= 0) & (at < size_in))))
    return counts[0] * counts[1]


# --------------------------------------------------------------------------------------------------------- files


def save_activity(path: str | Path, activity: Activity, *, force: bool = False) -> None:
    """Write counts as .npz (uncompressed, int64 arrays and one JSON header); see `load_activity`."""
    arrays: dict[str, Array] = {}
    names = list(activity.layers)
    for place, name in enumerate(names):
        for what in _COUNTS:
            arrays[f"layer{place}.{what}"] = getattr(activity.layers[name], what)
    populations = list(activity.spikes)
    for place, name in enumerate(populations):
        arrays[f"spikes{place}"] = activity.spikes[name]
    head = {
        "schema": SCHEMA,
        "digest": activity.digest,
        "samples": activity.samples,
        "timesteps": activity.timesteps,
        "rows": activity.rows,
        "scheme": activity.scheme,
        "source": activity.source,
        "layers": names,
        "populations": populations,
        "pools": [[name, count] for name, count in activity.pools.items()],
    }
    arrays["head"] = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue(), force=force)


def load_activity(path: str | Path, network: IntegerNetwork) -> Activity:
    """Read counts and check them against the network: digest, names, shapes, integers, 0 <= count <= what is possible.

    raises  InputError  for anything else, naming the file and the fault; nothing is unpickled, and the sizes of all
                        members are checked before one is inflated
    """
    content = read_bounded(path, MAX_FILE, what="file of activity")
    where = str(path)
    arrays = _read_npz(content, where)
    head = _head(arrays.pop("head", None), where)
    workload = from_network(network)
    if head["digest"] != workload.digest:
        raise InputError(
            f"{where}: was measured on network {head['digest'][:12]}, not on this one ({workload.digest[:12]}); "
            "measure it again"
        )
    samples, rows, scheme = head["samples"], head["rows"], head["scheme"]
    expected = [layer.name for layer in workload.layers]
    if (
        head["layers"] != expected
        or head["populations"] != [entry.name for entry in workload.populations]
        or head["timesteps"] != workload.timesteps
    ):
        raise InputError(f"{where}: its layers, populations or timesteps are not the network's")
    layers: dict[str, LayerActivity] = {}
    for place, layer in enumerate(workload.layers):
        tiles = len(row_tiles(layer, rows, scheme)[1])
        positions = layer.taps if scheme == "kernel-split" else 1
        runs = samples * layer.planes * layer.sites
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "inputs": ((layer.steps,), samples * layer.values_in),
            "rows": ((layer.c_in, *layer.kernel), runs * layer.steps),
            "visits": ((layer.steps, tiles), runs * positions),
            "patches": ((layer.steps, tiles), runs),
            "sites": ((layer.steps,), samples * layer.sites),
        }
        parts = {
            what: _counts(arrays, f"layer{place}.{what}", shape, most, f"{where}: layer {layer.name!r}: {what}")
            for what, (shape, most) in shapes.items()
        }
        layers[layer.name] = LayerActivity(**parts)
    spikes = {
        entry.name: _counts(
            arrays,
            f"spikes{place}",
            (workload.timesteps,),
            samples * entry.neurons,
            f"{where}: population {entry.name!r}: spikes",
        )
        for place, entry in enumerate(workload.populations)
    }
    most_in = {
        op.name: samples * op.steps * op.values_in for op in workload.stream_ops if op.kind in ("maxpool", "sumpool")
    }
    pools = dict(head["pools"])
    if list(pools) != list(most_in) or any(not 0 <= pools[name] <= most for name, most in most_in.items()):
        raise InputError(f"{where}: its pool counts are not the network's, or out of range")
    if arrays:
        raise InputError(f"{where}: holds {len(arrays)} unknown members, the first {min(arrays)!r:.60}")
    return Activity(workload.digest, samples, workload.timesteps, rows, scheme, head["source"], layers, spikes, pools)


def _read_npz(content: bytes, where: str) -> dict[str, Array]:
    """Members of an .npz by name, checked for size before they are read."""
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_MEMBERS:
                raise InputError(f"{where}: holds {len(entries)} members, over the limit of {MAX_MEMBERS}")
            total = sum(entry.file_size for entry in entries)
            if total > MAX_FILE:
                raise InputError(f"{where}: would inflate to {total} bytes, over the limit of {MAX_FILE}")
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in arrays or name == entry.filename:
                    raise InputError(f"{where}: member {entry.filename!r:.80} is no .npy, or is there twice")
                with archive.open(entry) as stream:
                    raw = stream.read(entry.file_size + 1)
                if len(raw) != entry.file_size:
                    raise InputError(f"{where}: member {name!r:.80} is not as long as the file says")
                arrays[name] = _read_npy(raw, f"{where}: member {name!r:.80}")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, zlib.error) as fault:
        raise InputError(f"{where}: not a readable .npz: {fault!s:.200}") from fault
    return arrays


def _read_npy(raw: bytes, where: str) -> Array:
    stream = io.BytesIO(raw)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise InputError(f"{where}: .npy version {version} is not (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=4096)
    if dtype not in (np.dtype("<i8"), np.dtype("u1")) or fortran:
        raise InputError(
            f"{where}: is {dtype}{' in Fortran order' if fortran else ''}; little-endian int64 was expected"
        )
    body = raw[stream.tell() :]
    count = 1
    for side in shape:
        count *= side
    if count * dtype.itemsize != len(body):
        raise InputError(f"{where}: its shape {shape} does not fit its {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape)


def _head(raw: Array | None, where: str) -> dict[str, Any]:
    fault = InputError(f"{where}: has no header of schema {SCHEMA}; it is no activity file")
    if raw is None or raw.dtype != np.uint8 or raw.ndim != 1:
        raise fault
    try:
        head = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as error:
        raise fault from error
    kinds: dict[str, type] = {
        "digest": str,
        "samples": int,
        "timesteps": int,
        "rows": int,
        "scheme": str,
        "source": str,
        "layers": list,
        "populations": list,
        "pools": list,
    }
    if type(head) is not dict or set(head) != {*kinds, "schema"}:
        raise fault
    if head["schema"] != SCHEMA:
        raise InputError(f"{where}: is of schema {head['schema']!r:.60}; {SCHEMA} was expected; measure it again")
    for key, kind in kinds.items():
        if type(head[key]) is not kind:
            raise InputError(f"{where}: header {key} = {head[key]!r:.60} is no {kind.__name__}")
    if not 1 <= head["samples"] <= 1 << 31 or not 1 <= head["rows"] <= 4096:
        raise InputError(f"{where}: samples = {head['samples']} or rows = {head['rows']} is out of range")
    if head["scheme"] not in ("kernel-split", "im2col"):
        raise InputError(f"{where}: mapping scheme {head['scheme']!r:.60} is none of kernel-split, im2col")
    if len(head["source"]) > 500 or not head["source"].isprintable():
        raise InputError(f"{where}: its source is no printable text of at most 500 characters")
    for pair in head["pools"]:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not int:
            raise InputError(f"{where}: a pool count is no pair of name and integer")
    return head


def _counts(arrays: dict[str, Array], name: str, shape: tuple[int, ...], most: int, where: str) -> Counts:
    array = arrays.pop(name, None)
    if array is None:
        raise InputError(f"{where}: missing")
    if array.dtype != np.dtype("<i8") or array.shape != shape:
        raise InputError(f"{where}: is {array.dtype} {array.shape}; int64 {shape} was expected")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > most:
        raise InputError(f"{where}: a count of {low if low < 0 else high} is outside 0..{most}")
    return array.astype(np.int64)

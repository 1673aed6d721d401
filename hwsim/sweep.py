"""Exploration: one workload over a grid of chip settings, and the settings that nothing beats.

    axes = {name: parse_axis(name, text) for name, text in {"rows": "32,64,128", "adc-bits": "4..10"}.items()}
    rows = sweep(workload, chip, axes, uniform_loads(workload, 0.1))

Every point is a plain dict, so that it goes to JSON Lines or CSV as it is. `PointFile` keeps points on disk while a
sweep runs; points already there are taken from `done`, which makes a sweep resumable. A point's `basis` is a digest of
all that it was computed from besides its settings, so that points of another sweep are not taken for its own.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mdsnn.export import artifact
from mdsnn.kernels.engine import check_pixels
from mdsnn.kernels.errors import ConfigError, InputError
from mdsnn.kernels.files import check_writable, read_bounded, write_text
from mdsnn.kernels.formats import Array
from mdsnn.kernels.network import IntegerNetwork

from .activity import Load, load_of, measure, uniform
from .config import KEYS, Chip
from .converters import lossless_bits
from .cost import physical_cost, prepare
from .crossbar import analog_accuracy, network_of
from .mapping import Layer, Workload
from .processes import run_tasks

AXES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "rows": ("crossbar.rows", "crossbar.columns"),
        "columns": ("crossbar.columns",),
        "adc-bits": ("adc.bits",),
        "adc-share": ("adc.share",),
        "cell-bits": ("cell.bits",),
        "scheme": ("mapping.scheme",),
        "coding": ("mapping.coding",),
        "pes": ("tile.pes",),
    }
)
"""What a sweep can vary, and the constants each sets; `rows` makes square crossbars unless `columns` is varied too."""
MAX_POINTS: Final = 100_000
MAX_FILE: Final = 256 * 1024 * 1024
METRICS: Final = ("energy_uJ", "latency_ms", "area_mm2")
"""What the Pareto front compares; less is better. Analog accuracy joins them where it was asked for; more is better."""
TOTALS: Final = (*METRICS, "TOPS_per_W", "TOPS_per_mm2", "EDAP_mJ_ms_mm2", "tiles", "adc_bits_needed")
"""adc_bits_needed: for a lossless ADC, whatever the codes; see converters.lossless_bits."""
ACCURACY: Final = ("accuracy", "accuracy_low", "accuracy_high")
CHUNK: Final = 25
"""Points a task computes where no analog accuracy is asked for; about a millisecond each."""

Value = int | str
Loads = Callable[[int, str], Load]
"""Gives the load for a number of crossbar rows and a mapping scheme."""


def parse_axis(name: str, text: str) -> tuple[Value, ...]:
    """Values of an axis from text: "32,64,128", "4..10", or names of choices; in order, none twice.

    raises  ConfigError  for an unknown axis, no value, or one that is out of range
    """
    if name not in AXES:
        raise ConfigError(f"sweep axis {name!r:.60} is none of {', '.join(AXES)}")
    entry = KEYS[AXES[name][0]]
    values: list[Value] = []
    for part in text.split(","):
        word = part.strip()
        low, dots, high = word.partition("..")
        if entry.choices:
            values.append(word)
        elif dots and low.isdecimal() and high.isdecimal() and len(low) < 8 and len(high) < 8:
            if int(high) - int(low) >= MAX_POINTS:
                raise ConfigError(f"sweep axis {name}: {word} is over {MAX_POINTS} values")
            values += range(int(low), int(high) + 1)
        elif word.isdecimal() and len(word) < 8:
            values.append(int(word))
        else:
            raise ConfigError(f"sweep axis {name}: {word!r:.60} is neither a whole number nor a range such as 4..10")
    for value in values:
        if value not in entry.choices if isinstance(value, str) else not entry.lo <= value <= entry.hi:
            limit = ", ".join(entry.choices) or f"{entry.lo:g}..{entry.hi:g}"
            raise ConfigError(f"sweep axis {name}: {value!r} is outside {limit}")
    if not values:
        raise ConfigError(f"sweep axis {name}: {text!r:.60} has no value")
    return tuple(dict.fromkeys(values))


def uniform_loads(workload: Workload, density: float) -> Loads:
    """Loads of independent spikes of one density, for `sweep`."""
    uniform(workload, density)  # refuse a bad density now
    return functools.cache(lambda rows, scheme: uniform(workload, density, rows=rows, scheme=scheme))


def measured_loads(network: IntegerNetwork, workload: Workload, pixels: npt.ArrayLike, source: str) -> Loads:
    """Loads measured on real samples, once for every number of rows and scheme, for `sweep`."""

    @functools.cache
    def load(rows: int, scheme: str) -> Load:
        return load_of(measure(network, pixels, rows=rows, scheme=scheme, source=source), workload)

    return load


@dataclass(frozen=True, eq=False)
class Analog:
    """Analog accuracy of every point: an artifact's bytes, samples, labels, programmings a point, and their seed.

    Devices are the chip's (cell.sigma), its ADC clips; see crossbar.analog_accuracy. Trials draw the same numbers at
    every point.
    """

    content: bytes
    pixels: npt.NDArray[np.uint8]
    labels: Array
    trials: int
    seed: int

    @staticmethod
    def of(network: IntegerNetwork, pixels: npt.ArrayLike, labels: npt.ArrayLike, *, trials: int, seed: int) -> Analog:
        """Check and pack.

        labels  (N,) integers          trials  1..10000          seed  at least 0
        raises  InputError, ConfigError
        """
        array, truth = check_pixels(network, pixels), np.asarray(labels)
        if truth.shape != (array.shape[-4],):
            raise InputError(f"{truth.shape} labels for {array.shape[-4]} samples; one each was expected")
        if type(trials) is not int or not 1 <= trials <= 10000:
            raise ConfigError(f"trials = {trials!r} is outside 1..10000")
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"seed = {seed!r} is below 0")
        return Analog(artifact.to_bytes(network), array, truth, trials, seed)


def columns(axes: Iterable[str], *, analog: bool = False) -> tuple[str, ...]:
    """Keys of a point, in order: the axes, the totals, analog accuracy if any, error, pareto, basis."""
    return (*axes, *TOTALS, *(ACCURACY if analog else ()), "error", "pareto", "basis")


def _points(
    workload: Workload,
    chip: Chip,
    load: Load,
    analog: Analog | None,
    basis: str,
    group: Sequence[Mapping[str, Value]],
) -> list[dict[str, Any]]:
    """Points of one load, each with its metrics or its error; pareto is not known yet."""
    return [_point(workload, chip, load, analog, basis, settings) for settings in group]


def _point(
    workload: Workload, chip: Chip, load: Load, analog: Analog | None, basis: str, settings: Mapping[str, Value]
) -> dict[str, Any]:
    point: dict[str, Any] = dict.fromkeys(columns(settings, analog=analog is not None))
    point.update(settings, basis=basis)
    try:
        the_chip = _chip_at(chip, settings)
        cost = physical_cost(prepare(workload, load, the_chip), the_chip)
    except ConfigError as fault:
        return {**point, "error": str(fault)}
    totals = cost.totals
    values = (totals.energy * 1e6, totals.delay * 1e3, totals.area * 1e6, totals.tops_per_w, totals.tops_per_mm2)
    top = (1 << the_chip.integer("cell.bits")) - 1
    needed = max(lossless_bits(int(mapped.used_rows.max()) * top) for mapped in cost.prepared.mapped)
    point.update(zip(TOTALS, (*values, totals.edap, len(cost.prepared.plan.tiles), needed), strict=True))
    if analog is not None:
        found = analog_accuracy(
            network_of(analog.content),
            analog.pixels,
            analog.labels,
            the_chip,
            trials=analog.trials,
            rng=np.random.default_rng(analog.seed),
        )
        point.update(zip(ACCURACY, (found.mean, *found.interval), strict=True))
    return point


def _chip_at(chip: Chip, settings: Mapping[str, Value]) -> Chip:
    order = sorted(settings, key=lambda name: len(AXES[name]), reverse=True)  # columns after rows
    return chip.replaced({key: settings[name] for name in order for key in AXES[name]})


def _basis(workload: Workload, chip: Chip, load: Load, analog: Analog | None) -> str:
    """16 hex digits over all that a point is computed from besides its settings."""
    digest = hashlib.sha256(b"mdsnn.sweep/1")

    def plain(value: Any) -> Any:
        return value.tobytes().hex() if isinstance(value, np.ndarray) else value

    layers = [[plain(getattr(layer, entry.name)) for entry in fields(Layer)] for layer in workload.layers]
    others = [repr(each) for each in (*workload.populations, *workload.stream_ops)]
    head = [workload.digest, workload.timesteps, workload.coding, workload.input_table_bits, layers, others]
    constants = {key: constant.value for key, constant in sorted(chip.constants.items())}
    digest.update(json.dumps([head, constants]).encode())
    for name, counts in load.layers.items():
        digest.update(name.encode())
        for array in (counts.inputs, counts.rows, counts.visits, counts.patches, counts.sites):
            digest.update(np.ascontiguousarray(array).tobytes())
    for name, spikes in load.spikes.items():
        digest.update(name.encode() + np.ascontiguousarray(spikes).tobytes())
    digest.update(json.dumps(dict(load.pools)).encode())
    if analog is not None:
        digest.update(hashlib.sha256(analog.content).digest() + analog.pixels.tobytes() + analog.labels.tobytes())
        digest.update(json.dumps([analog.trials, analog.seed]).encode())
    return digest.hexdigest()[:16]


def grid_of(axes: Mapping[str, Sequence[Value]]) -> list[dict[str, Value]]:
    """All combinations of `axes`, the last one fastest.

    raises  ConfigError  for an empty sweep, an unknown axis or over 100,000 points
    """
    if not axes or not all(len(values) for values in axes.values()):
        raise ConfigError("the sweep is empty: give at least one axis with at least one value")
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ConfigError(f"sweep axis {unknown[0]!r:.60} is none of {', '.join(AXES)}")
    count = math.prod(len(values) for values in axes.values())
    if count > MAX_POINTS:
        raise ConfigError(f"the sweep has {count} points, over the limit of {MAX_POINTS}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep(
    workload: Workload,
    chip: Chip,
    axes: Mapping[str, Sequence[Value]],
    loads: Loads,
    *,
    analog: Analog | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    done: Iterable[Mapping[str, Any]] = (),
    keep: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Price a workload at every combination of `axes` (model physical).

    axes       name -> values, see AXES and parse_axis
    loads      uniform_loads or measured_loads
    analog     adds the accuracy on non-ideal devices to every point, with its 95 % confidence interval
    jobs       processes (joblib); 1 stays in this one
    scheduler  address of a Dask scheduler whose workers compute instead, see processes.run_tasks
    done       points of an earlier, unfinished sweep over the same axes; they are kept, not computed again
    keep       called with new points as they come, see PointFile
    progress   called with (points done, points)
    returns    one dict a point, in the order of the grid, with the keys of `columns`: error is None or says why this
               combination is impossible, pareto whether nothing beats it
    raises     ConfigError       for an empty sweep, an unknown axis, over 100,000 points, or `done` of another sweep
               MissingError      if joblib (jobs > 1) or dask (scheduler) is not installed
               EnvironmentFault  see processes.run_tasks
    """
    chip.require("physical")
    grid = grid_of(axes)

    def crossbar(settings: Mapping[str, Value]) -> tuple[int, str]:
        rows = int(settings.get("rows", chip.integer("crossbar.rows")))
        return rows, str(settings.get("scheme", chip.choice("mapping.scheme")))

    taken = {which: loads(*which) for which in dict.fromkeys(map(crossbar, grid))}
    bases = {which: _basis(workload, chip, load, analog) for which, load in taken.items()}
    places = {tuple(settings.values()): settings for settings in grid}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in done:
        key = tuple(row.get(name) for name in axes)
        if key not in places:
            raise ConfigError(f"the sweep has no point {dict(zip(axes, key, strict=True))}, but it was done already")
        if row.get("basis") != bases[crossbar(places[key])]:
            raise ConfigError(
                "the points that were done already are of another network, chip, activity or analog setting; "
                "start over, or name another file"
            )
        known[key] = dict(row)
    groups: dict[tuple[int, str], list[dict[str, Value]]] = {}
    for key, settings in places.items():
        if key not in known:
            groups.setdefault(crossbar(settings), []).append(settings)
    size = CHUNK if analog is None else 1
    tasks = [
        (workload, chip, taken[which], analog, bases[which], members[at : at + size])
        for which, members in groups.items()
        for at in range(0, len(members), size)
    ]
    if known and progress is not None:
        progress(len(known), len(grid))
    for points in run_tasks(_points, tasks, jobs=jobs, scheduler=scheduler) if tasks else ():
        for point in points:
            known[tuple(point[name] for name in axes)] = point
        if keep is not None:
            keep(points)
        if progress is not None:
            progress(len(known), len(grid))
    rows = [{**known[key], "pareto": False} for key in places]
    for place in pareto(rows):
        rows[place]["pareto"] = True
    return rows


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the rows that no other row beats: none is at most as large in all METRICS and smaller in one.

    With analog accuracy in the rows, none is at least as accurate too.
    """
    places = [place for place, row in enumerate(rows) if row.get("error") is None]
    if not places:
        return []
    values = np.array(
        [[rows[p][m] for m in METRICS] + ([-rows[p]["accuracy"]] if "accuracy" in rows[p] else []) for p in places],
        np.float64,
    )
    front = np.empty((0, values.shape[1]))
    found: list[int] = []
    for number in np.lexsort(values.T[::-1]):  # whatever beats a point sorts before it
        point = values[number]
        beaten = (front <= point).all(axis=1) & (front < point).any(axis=1)
        if not beaten.any():
            front = np.concatenate([front, point[None]])
            found.append(places[number])
    return sorted(found)


# ----------------------------------------------------------------------------------------------------------- files


def to_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def sweep_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The points as CSV, header first."""
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()


FORMATS: Final = (".csv", ".jsonl")


def write_points(path: str | Path, rows: Sequence[Mapping[str, Any]], *, force: bool = False) -> None:
    """Write points as CSV or JSON Lines, as the name says."""
    write_text(path, _text_of(path, rows), force=force)


def _text_of(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> str:
    return (sweep_csv if str(path).endswith(".csv") else to_json_lines)(rows)


def read_points(path: str | Path, axes: Mapping[str, Sequence[Value]], *, analog: bool = False) -> list[dict[str, Any]]:
    """Points that `write_points` wrote, checked.

    axes    those of the sweep; a point must have exactly their keys, and those of `columns`
    raises  InputError  naming file and line, for anything else: a torn line, other columns, a point that stands twice
    """
    where, names = str(path), columns(axes, analog=analog)
    try:
        text = read_bounded(path, MAX_FILE, what="file of points").decode("utf-8")
    except UnicodeDecodeError as fault:
        raise InputError(f"{where}: not UTF-8 at byte {fault.start}") from fault
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[Any, ...], int] = {}
    for line, raw in _raw_csv(text, where, names) if where.endswith(".csv") else _raw_lines(text, where):
        row = _checked(raw, names, axes, f"{where}: line {line}")
        key = tuple(row[name] for name in axes)
        if key in seen:
            raise InputError(f"{where}: line {line}: is the point of line {seen[key]} again")
        seen[key] = line
        rows.append(row)
    return rows


def _raw_lines(text: str, where: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{where}: line {number}: is no JSON; is the file torn?") from fault


def _raw_csv(text: str, where: str, names: tuple[str, ...]) -> Iterable[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        head = next(reader, [])
        if tuple(head) != names:
            raise InputError(f"{where}: its columns are not those of this sweep: {', '.join(names)}")
        for cells in reader:
            if len(cells) != len(names):
                raise InputError(f"{where}: line {reader.line_num}: has {len(cells)} cells, its head {len(names)}")
            yield reader.line_num, {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
    except (csv.Error, ValueError) as fault:
        raise InputError(f"{where}: line {reader.line_num}: is no CSV of points: {fault!s:.80}") from fault


def _cell(name: str, text: str) -> Any:
    """A cell of a CSV file as the value it was; floats are written so that they come back exactly."""
    if text == "":
        return None
    if name in ("error", "basis"):
        return text
    if name == "pareto":
        return {"True": True, "False": False}.get(text, text)
    if name in AXES or name in ("tiles", "adc_bits_needed"):
        return int(text) if text.isdecimal() and len(text) < 16 else text
    return float(text)


def _checked(row: Any, names: tuple[str, ...], axes: Mapping[str, Sequence[Value]], where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or tuple(row) != names:
        raise InputError(f"{where}: is no point of this sweep; one has {', '.join(names)}")
    for name, values in axes.items():
        if type(row[name]) not in (int, str) or row[name] not in values:
            raise InputError(f"{where}: {name} = {row[name]!r:.60} is no value of this sweep")
    for name in names[len(axes) : names.index("error")]:
        value = row[name]
        good = value is None if row["error"] is not None else type(value) in (int, float) and 0 <= value < math.inf
        if not good:
            raise InputError(f"{where}: {name} = {value!r:.60} is no result")
    if not isinstance(row["error"], str | None) or type(row["pareto"]) not in (bool, type(None)):
        raise InputError(f"{where}: its error or pareto is of another kind")
    if not isinstance(row["basis"], str):
        raise InputError(f"{where}: has no basis")
    return row


class PointFile:
    """The points of a sweep on disk: written whole now and then while it runs, so that a killed one can go on.

    path    ends in .csv or .jsonl        resume  take the points that are there        force  replace the file
    done    what was there
    raises  ConfigError   for another name
            StorageError  if the file is there (unless resume or force), or cannot be written
            InputError    if it holds no points of this sweep
    """

    def __init__(
        self,
        path: str | Path,
        axes: Mapping[str, Sequence[Value]],
        *,
        analog: bool = False,
        resume: bool = False,
        force: bool = False,
        seconds: float = 2.0,
    ) -> None:
        if not str(path).endswith(FORMATS):
            raise ConfigError(f"{path}: points are written as {' or '.join(FORMATS)}; this name ends in neither")
        self.path, self._seconds = Path(path), seconds
        resuming = resume and self.path.exists()
        check_writable(path, force=force or resuming)
        self.done = read_points(path, axes, analog=analog) if resuming else []
        self._rows: list[Mapping[str, Any]] = [*self.done]
        self._force, self._dirty = force or resuming, False
        self._due = time.monotonic() + seconds

    @property
    def count(self) -> int:
        """Points so far."""
        return len(self._rows)

    def keep(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Take new points; write all if the last time is `seconds` ago, or 20 times what writing takes."""
        self._rows += points
        self._dirty = self._dirty or bool(points)
        if time.monotonic() >= self._due:
            self.save()

    def save(self) -> None:
        """Write all points so far, unless they are on disk."""
        if not self._dirty:
            return
        start = time.monotonic()
        self._write(self._rows)
        self._due = time.monotonic() + max(self._seconds, 20 * (time.monotonic() - start))

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the finished sweep: in order, and with the Pareto front."""
        self._write(rows)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            write_points(self.path, rows, force=self._force)
            self._force, self._dirty = True, False
        except BaseException:
            # an interrupt may come when the file is in place already: then it is ours to replace
            with contextlib.suppress(OSError):
                self._force = self._force or self.path.read_bytes() == _text_of(self.path, rows).encode()
            raise

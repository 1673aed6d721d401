"""Exploration: one workload over a grid of chip settings, and the settings that nothing beats.

    axes = {name: parse_axis(name, text) for name, text in {"rows": "32,64,128", "adc-bits": "4..10"}.items()}
    rows = sweep(workload, chip, axes, uniform_loads(workload, 0.1))

Every point is a plain dict, so that it goes to JSON Lines or CSV as it is. Points already computed are taken from
`done`, which makes a sweep resumable.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy.typing as npt

from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.network import IntegerNetwork

from .activity import Load, load_of, measure, uniform
from .config import KEYS, Chip
from .cost import physical_cost, prepare
from .mapping import Workload

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
METRICS: Final = ("energy_uJ", "latency_ms", "area_mm2")
"""What the Pareto front compares; less is better."""

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


def _point(workload: Workload, chip: Chip, settings: Mapping[str, Value], load: Load) -> dict[str, Any]:
    """One point, or its error."""
    empty: dict[str, Any] = dict.fromkeys((*METRICS, "TOPS_per_W", "TOPS_per_mm2", "EDAP_mJ_ms_mm2", "tiles"))
    try:
        the_chip = _chip_at(chip, settings)
        cost = physical_cost(prepare(workload, load, the_chip), the_chip)
    except ConfigError as fault:
        return {**settings, **empty, "error": str(fault)}
    totals = cost.totals
    values = (totals.energy * 1e6, totals.delay * 1e3, totals.area * 1e6, totals.tops_per_w, totals.tops_per_mm2)
    row = dict(zip(empty, (*values, totals.edap, len(cost.prepared.plan.tiles)), strict=True))
    return {**settings, **row, "error": None}


def _chip_at(chip: Chip, settings: Mapping[str, Value]) -> Chip:
    order = sorted(settings, key=lambda name: len(AXES[name]), reverse=True)  # columns after rows
    return chip.replaced({key: settings[name] for name in order for key in AXES[name]})


def sweep(
    workload: Workload,
    chip: Chip,
    axes: Mapping[str, Sequence[Value]],
    loads: Loads,
    *,
    jobs: int = 1,
    done: Iterable[Mapping[str, Any]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Price a workload at every combination of `axes` (model physical).

    axes      name -> values, see AXES and parse_axis
    loads     uniform_loads or measured_loads
    jobs      processes (joblib); 1 stays in this one
    done      points of an earlier, unfinished sweep over the same axes; they are kept, not computed again
    progress  called with (points done, points)
    returns   one dict a point, in the order of the grid: the settings, metrics, tiles, error (None or why this
              combination is impossible), pareto (nothing is better in energy, latency and area)
    raises    ConfigError   for an empty sweep, an unknown axis or over 100,000 points
              MissingError  if jobs > 1 and joblib is not installed
    """
    chip.require("physical")
    if not axes or not all(len(values) for values in axes.values()):
        raise ConfigError("the sweep is empty: give at least one axis with at least one value")
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ConfigError(f"sweep axis {unknown[0]!r:.60} is none of {', '.join(AXES)}")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MAX_POINTS:
        raise ConfigError(f"the sweep has {count} points, over the limit of {MAX_POINTS}")
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    known = {tuple(row.get(name) for name in axes): dict(row) for row in done}
    todo = [settings for settings in grid if tuple(settings.values()) not in known]
    finished = count - len(todo)

    def work() -> Iterable[tuple[dict[str, Value], Load]]:
        for settings in todo:
            rows = int(settings.get("rows", chip.integer("crossbar.rows")))
            yield settings, loads(rows, str(settings.get("scheme", chip.choice("mapping.scheme"))))

    results: Iterable[dict[str, Any]]
    if jobs == 1:
        results = (_point(workload, chip, settings, load) for settings, load in work())
    else:
        try:
            import joblib
        except ImportError as fault:
            raise MissingError("a sweep with jobs > 1 needs joblib: pip install joblib") from fault
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator")
        results = pool(joblib.delayed(_point)(workload, chip, settings, load) for settings, load in work())
    for settings, row in zip(todo, results, strict=True):
        known[tuple(settings.values())] = row
        finished += 1
        if progress is not None:
            progress(finished, count)
    rows = [{**known[tuple(settings.values())], "pareto": False} for settings in grid]
    for place in pareto(rows):
        rows[place]["pareto"] = True
    return rows


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of the rows that no other row beats: none is at most as large in all METRICS and smaller in one."""
    points = [(tuple(row[m] for m in METRICS), place) for place, row in enumerate(rows) if row.get("error") is None]
    front: list[tuple[tuple[float, ...], int]] = []
    for values, place in sorted(points):  # whatever beats a point sorts before it
        if not any(all(a <= b for a, b in zip(other, values, strict=True)) and other != values for other, _ in front):
            front.append((values, place))
    return sorted(place for _, place in front)


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

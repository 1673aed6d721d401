"""Chips: TOML files in which every constant carries its value, unit, source and confidence.

A chip names its model (`spikesim` or `physical`, see cost.py) and may inherit from a chip that ships with the package.
Reading one checks everything first and reports all faults of the file at once. Units are checked by kind: a file may
say pJ or fJ where an energy is due, never mW. Values are held in SI units; `Constant.given` and `Constant.unit` keep
what the file says.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from mdsnn.kernels.errors import ConfigError, InputError, MissingError
from mdsnn.kernels.files import read_bounded

MAX_CHIP_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 8
MODELS: Final = ("spikesim", "physical")
CONFIDENCES: Final = ("high", "medium", "low")
UNSOURCED: Final = "unsourced estimate"
"""A source that starts with these words says that nobody has sourced the value."""

_UNITS: Final[Mapping[str, Mapping[str, float]]] = {
    "energy": {"fJ": 1e-15, "pJ": 1e-12, "nJ": 1e-9},
    "energy per bit and length": {"fJ/bit/mm": 1e-12, "pJ/bit/mm": 1e-9},
    "area": {"um2": 1e-12, "mm2": 1e-6},
    "time": {"ps": 1e-12, "ns": 1e-9, "us": 1e-6},
    "frequency": {"MHz": 1e6, "GHz": 1e9},
    "conductance": {"nS": 1e-9, "uS": 1e-6, "mS": 1e-3},
    "resistance": {"ohm": 1.0, "kohm": 1e3},
    "voltage": {"mV": 1e-3, "V": 1.0},
    "length": {"nm": 1e-9, "um": 1e-6},
    "power per area": {"uW/mm2": 1.0, "mW/mm2": 1e3, "W/mm2": 1e6},
    "bits": {"bit": 1},
    "count": {"1": 1},
    "number": {"1": 1.0},
    "choice": {"choice": 1},
}


@dataclass(frozen=True)
class Key:
    """What a chip file may say under one key: kind of its unit, range (in `unit`) or choices, and meaning."""

    kind: str
    unit: str
    lo: float
    hi: float
    meaning: str
    models: tuple[str, ...]
    choices: tuple[str, ...] = ()


_BOTH, _SPIKESIM, _PHYSICAL = MODELS, ("spikesim",), ("physical",)


def _energy(meaning: str, models: tuple[str, ...], hi: float = 1e6) -> Key:
    return Key("energy", "pJ", 0.0, hi, meaning, models)


def _area(meaning: str, models: tuple[str, ...]) -> Key:
    return Key("area", "um2", 0.0, 1e8, meaning, models)


KEYS: Final[Mapping[str, Key]] = MappingProxyType(
    {
        "crossbar.rows": Key("count", "1", 1, 4096, "rows of a crossbar, R", _BOTH),
        "crossbar.columns": Key("count", "1", 1, 4096, "columns of a crossbar, X", _BOTH),
        "crossbar.energy": _energy("one read of the columns that share their ADCs' turn (E_xbar)", _SPIKESIM),
        "crossbar.area": _area("one crossbar (A_xbar)", _SPIKESIM),
        "tile.pes": Key("count", "1", 1, 4096, "processing elements in a tile", _BOTH),
        "tile.crossbars_per_pe": Key("count", "1", 1, 4096, "crossbars in a processing element", _PHYSICAL),
        "tile.limit": Key("count", "1", 1, 10**7, "most tiles the chip may have", _PHYSICAL),
        "tile.buffer_energy": _energy("tile buffer, one PE cycle (E_Tile)", _SPIKESIM),
        "tile.buffer_area": _area("tile buffer (A_TileBuf)", _BOTH),
        "tile.temp_energy": _energy("temporary buffer, one PE cycle (E_Temp)", _SPIKESIM),
        "tile.temp_area": _area("temporary buffer (A_Temp)", _BOTH),
        "tile.htree_energy": _energy("H-tree, one PE cycle (Htree)", _SPIKESIM),
        "tile.htree_area": _area("H-tree of a tile (A_Htree)", _BOTH),
        "clock.frequency": Key("frequency", "MHz", 1e-3, 1e5, "clock", _BOTH),
        "clock.pe_cycles": Key("count", "1", 1, 10**6, "clock cycles of a PE cycle", _BOTH),
        "latency.overlap": Key("number", "1", 0.0, 1.0, "share of a layer done before the next starts", _BOTH),
        "latency.schedule": Key(
            "choice",
            "choice",
            0,
            0,
            "latency behind the headline figures",
            _PHYSICAL,
            ("sequential", "overlapped", "pipelined"),
        ),
        "adc.share": Key("count", "1", 1, 4096, "columns that take turns at one ADC", _BOTH),
        "adc.energy": _energy("one conversion (E_ADC)", _SPIKESIM),
        "adc.area": _area("one ADC (A_ADC)", _SPIKESIM),
        "adc.bits": Key("bits", "bit", 1, 12, "resolution", _PHYSICAL),
        **{f"adc.energy_{b}": _energy(f"one conversion at {b} bits", _PHYSICAL) for b in range(4, 9)},
        **{f"adc.area_{b}": _area(f"one ADC of {b} bits", _PHYSICAL) for b in range(4, 9)},
        "adc.growth": Key("number", "1", 1.0, 4.0, "energy and area of one bit more, from 8 bits on", _PHYSICAL),
        "mux.energy": _energy("column multiplexer, one conversion (E_MUX)", _BOTH),
        "mux.area": _area("column multiplexer (A_MUX)", _BOTH),
        "diff.energy": _energy("subtractor, one use (E_Sub; physical: offset removal, one output of a visit)", _BOTH),
        "diff.area": _area("subtractor (A_Sub)", _BOTH),
        "fetch.energy": _energy("memory fetch, one PE cycle (mem_fetch)", _SPIKESIM),
        "memory.bit_area": _area("one bit of SRAM", _BOTH),
        "memory.element_bits": Key("bits", "bit", 1, 64, "bits stored an element", _SPIKESIM),
        "memory.bit_energy": _energy("one bit read or written", _PHYSICAL),
        "neuron.energy": _energy("neuron unit, one PE cycle (neuron)", _SPIKESIM),
        "neuron.leak_energy": _energy("leak of an 8-bit membrane", _PHYSICAL),
        "neuron.add_energy": _energy("input added to an 8-bit membrane", _PHYSICAL),
        "neuron.compare_energy": _energy("threshold compare of an 8-bit membrane", _PHYSICAL),
        "neuron.reset_energy": _energy("reset, one spike", _PHYSICAL),
        "digital.shift_add_energy": _energy("shift and add, one conversion", _PHYSICAL),
        "digital.bn_energy": _energy("affine BN (multiply, add, shift), one output", _PHYSICAL),
        "digital.add_energy": _energy("residual add or requantization, one element of 16 bits", _PHYSICAL),
        "cell.bits": Key("bits", "bit", 1, 8, "bits of a cell", _PHYSICAL),
        "cell.g_min": Key("conductance", "uS", 1e-6, 1e6, "conductance of level 0", _PHYSICAL),
        "cell.g_max": Key("conductance", "uS", 1e-6, 1e6, "conductance of the top level", _PHYSICAL),
        "cell.v_read": Key("voltage", "V", 1e-3, 10.0, "read voltage", _PHYSICAL),
        "cell.t_read": Key("time", "ns", 1e-3, 1e6, "read pulse", _PHYSICAL),
        "cell.sigma": Key("number", "1", 0.0, 2.0, "sigma/mu of a programmed conductance", _PHYSICAL),
        "cell.feature": Key("length", "nm", 1.0, 1000.0, "feature size F", _PHYSICAL),
        "cell.area_f2": Key("number", "1", 1.0, 1e4, "cell area in F squared", _PHYSICAL),
        "wire.row_resistance": Key("resistance", "ohm", 0.0, 1e6, "row wire, one cell", _PHYSICAL),
        "wire.column_resistance": Key("resistance", "ohm", 0.0, 1e6, "column wire, one cell", _PHYSICAL),
        "mapping.scheme": Key(
            "choice", "choice", 0, 0, "how kernels lie on crossbars", _PHYSICAL, ("kernel-split", "im2col")
        ),
        "mapping.coding": Key(
            "choice", "choice", 0, 0, "how signed codes become levels", _PHYSICAL, ("offset", "differential")
        ),
        "noc.mode": Key("choice", "choice", 0, 0, "what is sent: events or bitmaps", _PHYSICAL, ("event", "dense")),
        "noc.distance": Key("choice", "choice", 0, 0, "where hops come from", _PHYSICAL, ("floorplan", "fixed")),
        "noc.fixed_hops": Key("number", "1", 0.0, 1e6, "hops of every transfer where noc.distance is fixed", _PHYSICAL),
        "noc.hop_energy": _energy("one spike over one hop", _PHYSICAL),
        "noc.bit_mm_energy": Key(
            "energy per bit and length", "pJ/bit/mm", 0.0, 1e3, "one bit over one millimetre", _PHYSICAL
        ),
        "leakage.density": Key("power per area", "mW/mm2", 0.0, 1e5, "standby power of powered silicon", _PHYSICAL),
    }
)
"""Every key a chip file may hold, as table.key."""

_MAY_BE_ZERO: Final = frozenset(
    {
        "cell.sigma",
        "wire.row_resistance",
        "wire.column_resistance",
        "leakage.density",
        "latency.overlap",
        "noc.fixed_hops",
        "neuron.reset_energy",
        "noc.hop_energy",
        "noc.bit_mm_energy",
    }
)


@dataclass(frozen=True)
class Constant:
    """One value of a chip.

    value       SI units (J, m2, s, Hz, S, ohm, V, m, W/m2), or an int, or the name of a choice
    given, unit what the chip file says
    source      where it is from; UNSOURCED at the start where nobody has sourced it
    confidence  high, medium or low
    chip        the chip file that states it
    """

    key: str
    value: float | int | str
    given: float | int | str
    unit: str
    source: str
    confidence: str
    chip: str

    @property
    def unsourced(self) -> bool:
        """Whether the value is an estimate without a source."""
        return self.source.startswith(UNSOURCED)

    @property
    def weak(self) -> bool:
        """Whether the value is unsourced or of low confidence."""
        return self.unsourced or self.confidence == "low"


@dataclass(frozen=True)
class Chip:
    """A checked chip: its name, its model and its constants by dotted key."""

    name: str
    model: str
    description: str
    constants: Mapping[str, Constant]

    def __getitem__(self, key: str) -> float:
        """The numeric value of `key` in SI units; raises ConfigError if this chip does not state it."""
        value = self._constant(key).value
        if isinstance(value, str):
            raise ConfigError(f"chip {self.name}: {key} is a choice ({value}), not a number")
        return float(value)

    def integer(self, key: str) -> int:
        """The value of a count or a number of bits."""
        return int(self[key])

    def choice(self, key: str) -> str:
        """The value of a choice."""
        return str(self._constant(key).value)

    def _constant(self, key: str) -> Constant:
        if key not in self.constants:
            raise ConfigError(
                f"chip {self.name}: has no {key}, which model {', '.join(KEYS[key].models)} needs. "
                f"Add it with value, unit, source and confidence, or choose a chip of that model"
            )
        return self.constants[key]

    def require(self, model: str) -> None:
        """Raise ConfigError unless every constant of `model` is stated; names some that are missing."""
        if model not in MODELS:
            raise ConfigError(f"model {model!r} is none of {', '.join(MODELS)}")
        missing = [key for key, entry in KEYS.items() if model in entry.models and key not in self.constants]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ConfigError(
                f"chip {self.name} is of model {self.model} and does not state what model {model} needs: {named}. "
                f"Choose a chip of that model, or inherit from one"
            )

    def replaced(self, values: Mapping[str, float | int | str]) -> Chip:
        """A copy with other values (in the key's own unit, as KEYS states it), checked, marked as an override.

        raises  ConfigError  for an unknown key or a value out of range; all faults at once
        """
        constants = dict(self.constants)
        faults: list[str] = []
        for key, value in values.items():
            if key not in KEYS:
                faults.append(f"override: unknown key {key!r}{nearest(key, KEYS)}")
                continue
            entry = KEYS[key]
            fault = _range_fault(key, value, entry.unit)
            if fault:
                faults.append(f"override: {key} = {value!r} {fault}")
                continue
            old = constants.get(key)
            constants[key] = Constant(
                key,
                _si(entry, value, entry.unit),
                value,
                entry.unit,
                "set by the user for this run",
                "low" if old is None or old.weak else old.confidence,
                self.name,
            )
        if faults:
            raise ConfigError("\n".join(faults))
        chip = replace(self, constants=MappingProxyType(constants))
        cross = _cross_faults(chip)
        if cross:
            raise ConfigError("\n".join(f"override: {fault}" for fault in cross))
        return chip

    def scaled(self, key: str, factor: float) -> Chip:
        """A copy in which the real-valued constant `key` is multiplied by `factor`; ranges are not checked."""
        old = self.constants[key]
        assert isinstance(old.value, float)  # callers pick from `scalable`
        constants = dict(self.constants)
        constants[key] = replace(old, value=old.value * factor)
        return replace(self, constants=MappingProxyType(constants))

    def scalable(self, model: str) -> tuple[str, ...]:
        """Keys of `model` with real values, which a sensitivity analysis may scale."""
        return tuple(
            key
            for key, constant in self.constants.items()
            if model in KEYS[key].models and isinstance(constant.value, float)
        )


# ------------------------------------------------------------------------------------------------ shipped chips


def shipped_chips() -> tuple[str, ...]:
    """Names of the chips that ship with the package, sorted."""
    folder = resources.files("mdsnn.hwsim") / "chips"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_chip(chip: str | Path) -> Chip:
    """Read a chip: the name of a shipped one, or the path of a TOML file (at most 64 KiB, nested at most 8 deep).

    raises  ConfigError   for anything wrong in the file, all faults at once, each as `file: [table] key: what`
            MissingError  if pydantic is not installed
    """
    text = str(chip)
    shipped = shipped_chips()
    if text in shipped:
        return _load_shipped(text)
    if not text.endswith(".toml"):
        raise ConfigError(
            f"chip {text!r} is none of {', '.join(shipped)} and no path of a .toml file{nearest(text, shipped)}"
        )
    try:
        content = read_bounded(chip, MAX_CHIP_BYTES, what="chip file")
    except InputError as fault:
        raise ConfigError(str(fault)) from fault
    return parse_chip(content, where=text, name=Path(text).stem)


def _load_shipped(name: str) -> Chip:
    entry = resources.files("mdsnn.hwsim") / "chips" / f"{name}.toml"
    return parse_chip(entry.read_bytes(), where=f"chips/{name}.toml", name=name)


def parse_chip(content: bytes, *, where: str, name: str) -> Chip:
    """Check and build a chip from the bytes of a TOML file; `where` names it in messages."""
    if len(content) > MAX_CHIP_BYTES:
        raise ConfigError(f"{where}: {len(content)} bytes, over the limit of {MAX_CHIP_BYTES} for a chip file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{where}: not UTF-8 at byte {fault.start}") from fault
    depth = _depth(text)
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: keys or brackets nest {depth} deep, over the limit of {MAX_DEPTH}")
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as fault:
        raise ConfigError(f"{where}: not TOML: {fault}") from fault
    faults: list[str] = []
    model, base, description = _head(raw, where, faults)
    constants: dict[str, Constant] = dict(base.constants) if base else {}
    tables = {key.split(".")[0] for key in KEYS}
    for table, entries in raw.items():
        if table in ("model", "inherits", "description"):
            continue
        if table not in tables:
            faults.append(f"{where}: unknown key {table!r}{nearest(table, [*tables, 'model', 'inherits'])}")
        elif not isinstance(entries, dict):
            faults.append(f"{where}: [{table}] must be a table of constants, got {type(entries).__name__}")
        else:
            for short, leaf in entries.items():
                key = f"{table}.{short}"
                if key not in KEYS:
                    near = nearest(short, [k.split(".")[1] for k in KEYS if k.startswith(f"{table}.")])
                    faults.append(f"{where}: [{table}] unknown key {short!r}{near}")
                    continue
                constant = _leaf(key, leaf, where, name, faults)
                if constant is not None:
                    constants[key] = constant
    chip = Chip(name, model, description, MappingProxyType(constants))
    if not faults:
        faults += [f"{where}: {fault}" for fault in _cross_faults(chip)]
        missing = [key for key, entry in KEYS.items() if model in entry.models and key not in constants]
        faults += [
            f"{where}: [{k.split('.')[0]}] {k.split('.')[1]} is missing; model {model} needs it" for k in missing
        ]
    if faults:
        raise ConfigError("\n".join(faults))
    return chip


def _head(raw: Mapping[str, Any], where: str, faults: list[str]) -> tuple[str, Chip | None, str]:
    base: Chip | None = None
    inherits = raw.get("inherits")
    if inherits is not None:
        shipped = shipped_chips()
        if not isinstance(inherits, str) or inherits not in shipped:
            near = nearest(str(inherits), shipped)
            faults.append(f"{where}: inherits = {inherits!r:.60} is none of {', '.join(shipped)}{near}")
        elif where == f"chips/{inherits}.toml":
            faults.append(f"{where}: inherits from itself")
        else:
            base = _load_shipped(inherits)
    model = raw.get("model", base.model if base else None)
    if model not in MODELS:
        if inherits is None or model is not None:  # else the base, which is none, would have named it
            faults.append(f"{where}: model = {model!r:.60} is none of {', '.join(MODELS)}")
        model = MODELS[0]
    description = raw.get("description", base.description if base else "")
    if not isinstance(description, str) or len(description) > 2000:
        faults.append(f"{where}: description must be a text of at most 2000 characters")
        description = ""
    return str(model), base, description


def _leaf(key: str, leaf: Any, where: str, chip: str, faults: list[str]) -> Constant | None:
    table, short = key.split(".")
    place = f"{where}: [{table}] {short}"
    try:
        checked = _leaf_model().model_validate(leaf)
    except MissingError:
        raise
    except Exception as fault:  # pydantic's error type is imported late with it
        errors = getattr(fault, "errors", None)
        if errors is None:
            raise
        found = {error["loc"][:1]: error for error in errors()}  # the union of value reports every branch
        for at, error in found.items():
            part = f" {at[0]!r:.40}" if at else ""
            what = _LEAF_FAULTS.get(error["type"], "is no text").format_map(error.get("ctx", {}))
            if at == ("value",) and error["type"] != "missing":
                what = "is neither number nor text"
            faults.append(f"{place}:{part} {what}; a constant is {{value, unit, source, confidence}}")
        return None
    entry = KEYS[key]
    units = _UNITS[entry.kind]
    if checked.unit not in units:
        faults.append(
            f"{place} has unit {checked.unit!r:.40}, but is {_article(entry.kind)}; give it in {' or '.join(units)}"
        )
        return None
    fault_text = _range_fault(key, checked.value, checked.unit)
    if fault_text:
        faults.append(f"{place} = {checked.value!r:.60} {fault_text}")
        return None
    return Constant(
        key,
        _si(entry, checked.value, checked.unit),
        checked.value,
        checked.unit,
        checked.source,
        checked.confidence,
        chip,
    )


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


_LEAF: list[Any] = []
_LEAF_FAULTS: Final = MappingProxyType(
    {
        "missing": "is missing",
        "extra_forbidden": "is no part of a constant",
        "model_type": "is no table",
        "string_too_short": "is empty",
        "string_pattern_mismatch": "is empty",
        "string_too_long": "is over {max_length} characters",
        "literal_error": "is none of {expected}",
    }
)
"""What is wrong with a part of a constant, by pydantic's name of the fault."""


def _leaf_model() -> Any:
    """The pydantic model of a constant: strict, frozen, closed. Built on first use, so that importing stays light."""
    if not _LEAF:
        try:
            import pydantic
        except ImportError as fault:
            raise MissingError("chip files need pydantic: pip install 'mdsnn[report]'") from fault

        class Leaf(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(strict=True, frozen=True, extra="forbid")
            value: int | float | str
            unit: str = pydantic.Field(min_length=1, max_length=20)
            source: str = pydantic.Field(min_length=1, max_length=600, pattern=r"\S")
            confidence: Literal["high", "medium", "low"]

        _LEAF.append(Leaf)
    return _LEAF[0]


def chip_schema() -> dict[str, Any]:
    """JSON Schema of a chip file (draft 2020-12)."""
    tables: dict[str, Any] = {}
    leaf = _leaf_model().model_json_schema()
    for key, entry in KEYS.items():
        table, short = key.split(".")
        value: dict[str, Any] = (
            {"enum": list(entry.choices)}
            if entry.choices
            else {"type": "integer" if entry.kind in ("bits", "count") else "number"}
        )
        this = {
            **leaf,
            "title": key,
            "description": entry.meaning,
            "properties": {**leaf["properties"], "value": value, "unit": {"enum": list(_UNITS[entry.kind])}},
        }
        block = tables.setdefault(table, {"type": "object", "additionalProperties": False, "properties": {}})
        block["properties"][short] = this
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mdsnn chip",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "model": {"enum": list(MODELS)},
            "inherits": {"enum": list(shipped_chips())},
            "description": {"type": "string", "maxLength": 2000},
            **tables,
        },
    }


def _si(entry: Key, value: float | int | str, unit: str) -> float | int | str:
    if isinstance(value, str) or entry.kind in ("bits", "count"):
        return value
    return float(value) * _UNITS[entry.kind][unit]


def _range_fault(key: str, value: Any, unit: str) -> str | None:
    """What is wrong with a value of `key` given in `unit`, or None."""
    entry = KEYS[key]
    if entry.choices:
        if value not in entry.choices:
            return f"is none of {', '.join(entry.choices)}"
        return None
    if entry.kind in ("bits", "count"):
        if type(value) is not int:
            return "is no integer"
        return None if entry.lo <= value <= entry.hi else f"is outside {int(entry.lo)}..{int(entry.hi)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is no number"
    if isinstance(value, int) and abs(value) > 10**300:
        return f"is outside {entry.lo:g}..{entry.hi:g} {entry.unit}"
    if not math.isfinite(value):
        return "is not finite"
    in_unit = float(value) * _UNITS[entry.kind][unit] / _UNITS[entry.kind][entry.unit]
    if in_unit == 0.0 and key not in _MAY_BE_ZERO:
        return "is zero; it must be positive"
    if not entry.lo <= in_unit <= entry.hi:
        return f"is outside {entry.lo:g}..{entry.hi:g} {entry.unit}"
    return None


def _cross_faults(chip: Chip) -> list[str]:
    """Faults between constants of one chip."""
    faults: list[str] = []
    stated = chip.constants
    if "cell.g_min" in stated and "cell.g_max" in stated and chip["cell.g_min"] >= chip["cell.g_max"]:
        faults.append("[cell] g_min is not below g_max")
    if "adc.share" in stated and "crossbar.columns" in stated:
        columns, share = chip.integer("crossbar.columns"), chip.integer("adc.share")
        if chip.model == "physical" and columns % share:
            faults.append(f"[adc] share = {share} does not divide the {columns} columns of a crossbar")
    return faults


def nearest(word: str, words: Iterator[str] | Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """The hint "; did you mean 'x'?" where one of `words` is close to `word`, else nothing."""
    near = difflib.get_close_matches(word[:200], list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _depth(text: str) -> int:
    """Deepest nesting of brackets plus dotted keys in a TOML text, without parsing it; strings and comments skipped."""
    deepest = brackets = dots = 0
    place, size = 0, len(text)
    while place < size:
        char = text[place]
        if char == "#":
            end = text.find("\n", place)
            place = size if end < 0 else end
            continue
        if char in "\"'":
            quote = char * 3 if text.startswith(char * 3, place) else char
            place += len(quote)
            while place < size and not text.startswith(quote, place):
                if len(quote) == 1 and text[place] == "\n":
                    break
                place += 2 if quote[0] == '"' and text[place] == "\\" else 1
            place += len(quote)
            continue
        if char in "[{":
            brackets += 1
        elif char in "]}":
            brackets = max(0, brackets - 1)
        elif char == ".":
            dots += 1
        if char in "\n,=":
            dots = 0
        deepest = max(deepest, brackets + dots)
        place += 1
    return deepest

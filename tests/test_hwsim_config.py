"""Chip files: what ships, what is refused and in which words, units, inheritance."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdsnn.hwsim import config, report
from mdsnn.hwsim.config import (
    KEYS,
    MAX_CHIP_BYTES,
    MAX_DEPTH,
    _depth,
    chip_schema,
    load_chip,
    parse_chip,
    shipped_chips,
)
from mdsnn.kernels.errors import ConfigError, MdsnnError, MissingError


def leaf(value: object, unit: str = "1", source: str = "a test", confidence: str = "low") -> str:
    texts = (json.dumps(text) for text in (value, unit, source, confidence))
    return "{{ value = {}, unit = {}, source = {}, confidence = {} }}".format(*texts)


def parse(text: str) -> object:
    return parse_chip(text.encode(), where="my.toml", name="my")


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value).splitlines()


def test_the_shipped_chips_load_and_name_their_models() -> None:
    assert {name: load_chip(name).model for name in shipped_chips()} == {
        "fefet32": "physical",
        "spikesim65": "spikesim",
        "spikesim65-sram": "spikesim",
    }


@pytest.mark.parametrize("name", shipped_chips())
def test_every_constant_of_a_shipped_chip_has_a_source(name: str) -> None:
    for key, constant in load_chip(name).constants.items():
        assert len(constant.source) > 5, key
        assert constant.confidence in ("high", "medium", "low"), key
        assert not (constant.unsourced and constant.confidence != "low"), key


def test_table_iii_and_the_derived_cell() -> None:
    chip = load_chip("fefet32")
    step = (chip["cell.g_max"] - chip["cell.g_min"]) / 15
    assert step == pytest.approx(3e-6)
    energy = chip["cell.v_read"] ** 2 * chip["cell.t_read"]
    assert (energy * chip["cell.g_min"] * 1e15, energy * step * 1e15) == (pytest.approx(0.5), pytest.approx(0.3))
    assert chip["cell.area_f2"] * chip["cell.feature"] ** 2 * 1e12 == pytest.approx(0.0492, abs=5e-5)
    assert chip["adc.energy_4"] * 1e12 == pytest.approx(0.67)
    assert 1 / chip["cell.g_max"] == pytest.approx(20e3)
    assert chip["cell.g_max"] / chip["cell.g_min"] == pytest.approx(10)


def test_inheritance_overrides_one_constant_and_says_who_stated_it() -> None:
    chip = parse_chip(f'inherits = "fefet32"\n[adc]\nbits = {leaf(6, "bit")}\n'.encode(), where="my.toml", name="my")
    assert chip.integer("adc.bits") == 6
    assert (chip.constants["adc.bits"].chip, chip.constants["adc.share"].chip) == ("my", "fefet32")
    assert chip.model == "physical"


@pytest.mark.parametrize(("value", "unit"), [(2000.0, "fJ"), (2.0, "pJ"), (0.002, "nJ")])
def test_units_of_one_kind_are_equal(value: float, unit: str) -> None:
    chip = parse_chip(f'inherits = "fefet32"\n[mux]\nenergy = {leaf(value, unit)}'.encode(), where="m.toml", name="m")
    assert chip["mux.energy"] == pytest.approx(2e-12, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[adc]\nbits = {leaf(14, 'bit')}", "my.toml: [adc] bits = 14 is outside 1..12"),
        (f"[adc]\nbits = {leaf(4.0, 'bit')}", "my.toml: [adc] bits = 4.0 is no integer"),
        (f"[mux]\nenergy = {leaf(-1.0, 'pJ')}", "my.toml: [mux] energy = -1.0 is outside 0..1e+06 pJ"),
        (f"[mux]\nenergy = {leaf(0.0, 'pJ')}", "my.toml: [mux] energy = 0.0 is zero; it must be positive"),
        ("[mux]\nenergy = { value = nan, unit = 'pJ', source = 's', confidence = 'low' }", "is not finite"),
        ("[mux]\nenergy = { value = inf, unit = 'pJ', source = 's', confidence = 'low' }", "is not finite"),
        (f"[mux]\nenergy = {leaf(1.0, 'mW')}", "has unit 'mW', but is an energy; give it in fJ or pJ or nJ"),
        (f"[mux]\nenergi = {leaf(1.0, 'pJ')}", "my.toml: [mux] unknown key 'energi'; did you mean 'energy'?"),
        (f"[mixer]\nenergy = {leaf(1.0, 'pJ')}", "my.toml: unknown key 'mixer'"),
        ("[mux]\nenergy = 1.0", "my.toml: [mux] energy: is no table; a constant is"),
        ("mux = 3", "[mux] must be a table of constants, got int"),
        (
            "[mux]\nenergy = { value = 1.0, unit = 'pJ', confidence = 'low' }",
            "[mux] energy: 'source' is missing; a constant is",
        ),
        (
            f"[mux]\nenergy = {leaf(1.0, 'pJ', '')}",
            "my.toml: [mux] energy: 'source' is empty; a constant is {value, unit,",
        ),
        (f"[mux]\nenergy = {leaf(1.0, 'pJ', ' ')}", "[mux] energy: 'source' is empty"),
        (f"[mux]\nenergy = {leaf(1.0, 'pJ', 's' * 601)}", "[mux] energy: 'source' is over 600 characters"),
        ("[mux]\nenergy = { value = 1.0, unit = 'pJ', source = 3, confidence = 'low' }", "energy: 'source' is no text"),
        (
            f"[mux]\nenergy = {leaf(1.0, 'pJ', 's', 'sure')}",
            "energy: 'confidence' is none of 'high', 'medium' or 'low'",
        ),
        (f"[mux]\nenergy = {leaf(True, 'pJ')}", "[mux] energy: 'value' is neither number nor text"),
        ("[mux]\nenergy = { unit = 'pJ', source = 's', confidence = 'low' }", "[mux] energy: 'value' is missing"),
        (
            "[mux]\nenergy = { value = 1.0, unit = 'pJ', source = 's', confidence = 'low', mean = 2 }",
            "energy: 'mean' is no",
        ),
        (f"[mux]\nenergy = {leaf('1.0', 'pJ')}", "is no number"),
        (f"[mapping]\nscheme = {leaf('im3col', 'choice')}", "is none of kernel-split, im2col"),
        (f"[cell]\ng_min = {leaf(50.0, 'uS')}", "[cell] g_min is not below g_max"),
        (f"[adc]\nshare = {leaf(7)}", "[adc] share = 7 does not divide the 64 columns"),
        ("model = 'magic'", "model = 'magic' is none of spikesim, physical"),
    ],
)
def test_a_fault_is_one_clear_line(text: str, expected: str) -> None:
    (line,) = faults('inherits = "fefet32"\n' + text)
    assert expected in line


def test_all_faults_of_a_file_come_at_once() -> None:
    text = (
        f'inherits = "fefet32"\n[adc]\nbits = {leaf(0, "bit")}\nshar = {leaf(8)}\n[mux]\narea = {leaf(1.0, "pJ")}\n'
        f"[cell]\nbits = {leaf(9, 'bit')}"
    )
    assert len(faults(text)) == 4


def test_inheriting_is_from_shipped_chips_only() -> None:
    assert "is none of fefet32" in faults("inherits = '../secret.toml'")[0]
    (line,) = faults("inherits = 'fefet33'")
    assert "did you mean 'fefet32'" in line


def test_a_chip_without_a_base_must_state_everything() -> None:
    lines = faults("model = 'physical'")
    assert len(lines) == sum("physical" in entry.models for entry in KEYS.values())


def test_unknown_chips_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fefet32'"):
        load_chip("fefet23")
    with pytest.raises(ConfigError, match="no such file"):
        load_chip(tmp_path / "none.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_CHIP_BYTES + 1))
    with pytest.raises(ConfigError, match="over the limit of 65536"):
        load_chip(large)
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_chip(tmp_path / "bad.toml")
    (tmp_path / "syntax.toml").write_text("[adc\n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_chip(tmp_path / "syntax.toml")


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("a = 1", 0),
        ("a.b.c = 1", 2),
        ("[a.b.c]", 3),
        ("x = [[[[1]]]]", 4),
        ('x = "[[[[[[" # ]]][[[[[[[[[', 0),
        ("x = '''\n[[[\n'''\ny = [1]", 1),
        ("x = {a = {b = {c = 1}}}", 3),
        ("a = 1.5\nb = 2.5", 1),
    ],
)
def test_nesting_is_measured_without_parsing(text: str, depth: int) -> None:
    assert _depth(text) == depth


def test_deep_files_are_refused_before_they_are_parsed() -> None:
    for text in (".".join("a" * 20000) + " = 1", "x = " + "[" * 20000, "[" + ".".join(["a"] * 12) + "]"):
        assert faults(text)[0].startswith("my.toml: keys or brackets nest")
        assert faults(text)[0].endswith(f"over the limit of {MAX_DEPTH}")


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300) | st.text(alphabet="[]{}=.\"'#\n abadcmux0123456789-+_einf,", max_size=300).map(str.encode)
)
def test_any_bytes_are_a_chip_or_a_typed_error(content: bytes) -> None:
    with pytest.raises(MdsnnError, match="f: "):  # a whole chip by chance would be a wonder
        parse_chip(content, where="f", name="f")


def test_overrides_are_checked_and_marked() -> None:
    chip = load_chip("fefet32")
    other = chip.replaced({"crossbar.rows": 128, "cell.g_max": 60.0})
    assert other["cell.g_max"] == pytest.approx(60e-6)
    assert other.constants["crossbar.rows"].source == "set by the user for this run"
    with pytest.raises(ConfigError) as caught:
        chip.replaced({"crossbar.rows": 0, "cell.gmax": 1.0, "cell.g_min": 70.0})
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ConfigError, match="g_min is not below"):
        chip.replaced({"cell.g_min": 70.0})


def test_a_chip_says_what_a_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"model physical needs: tile\.crossbars_per_pe, .* and 38 more"):
        load_chip("spikesim65").require("physical")
    load_chip("fefet32").require("spikesim")


def test_the_schema_is_closed_and_knows_every_key() -> None:
    schema = chip_schema()
    assert schema["additionalProperties"] is False
    stated = {
        f"{table}.{key}"
        for table, block in schema["properties"].items()
        for key in block.get("properties", {})
        if table not in ("model", "inherits", "description")
    }
    assert stated == set(KEYS)


def test_a_missing_extra_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.setattr(config, "_LEAF", [])
    with pytest.raises(MissingError, match=r"pip install 'mdsnn\[report\]'"):
        load_chip("fefet32")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    report._template.cache_clear()
    with pytest.raises(MissingError, match=r"pip install 'mdsnn\[report\]'"):
        report._template()

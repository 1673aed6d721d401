"""The mutation score's own tests: which changes are made, where, and that a mutant is judged rightly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from c_mutants import Mutation, mutations_of

from mdsnn.kernels import build_native

HERE = Path(__file__).resolve().parent
SOURCE = Path(build_native.__file__).resolve().parent / "src"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


def afters(text: str, kind: str | None = None) -> set[str]:
    """The changed lines of every mutation of `text`."""
    return {m.shown(text)[2] for m in mutations_of("a.c", text) if kind in (None, m.kind)}


def test_operators_constants_and_names() -> None:
    text = "int f(int x, int y)\n{\n    return x <= 3 && y;\n}\n"
    assert afters(text) == {
        "return x < 3 && y;",
        "return x > 3 && y;",
        "return x <= 3 || y;",
        "return x <= 4 && y;",
        "return x <= 2 && y;",
        "return y <= 3 && y;",
        "return x <= 3 && x;",
    }


def test_statements_conditions_and_arms() -> None:
    text = "void f(int *a)\n{\n    int b = g();\n    if (b)\n        a[b] = c ? d : e;\n    h(b);\n    return;\n}\n"
    assert afters(text, "statement removed") == {";"}
    removed = [m.shown(text)[1] for m in mutations_of("a.c", text) if m.kind == "statement removed"]
    assert removed == ["a[b] = c ? d : e;", "h(b);"]
    assert afters(text, "condition negated") == {"if (!(b))"}
    assert afters(text, "arms exchanged") == {"a[b] = c ? e : d;"}
    assert {m.function for m in mutations_of("a.c", text)} == {"f"}


def test_conditionals_inside_conditionals() -> None:
    text = "void f(void)\n{\n    a = b ? c ? d : e : g ? h : i;\n}\n"
    assert afters(text, "arms exchanged") == {
        "a = b ? g ? h : i : c ? d : e;",
        "a = b ? c ? e : d : g ? h : i;",
        "a = b ? c ? d : e : g ? i : h;",
    }


def test_what_is_left_alone() -> None:
    text = "/* a < b */\n#include <x.h>\n#if A < 3\n#endif\n// 1 + 1\nstruct s { int a[4]; };\n"
    text += 'char *f(char *p)\n{\n    return "1 < 2";\n}\n'
    assert afters(text) == set()


def test_a_pointer_is_no_product() -> None:
    text = "void f(int *a, int b)\n{\n    *a = *a * b;\n    g(&b, a & b);\n}\n"
    assert afters(text, "operator") == {"*a = *a + b;", "g(&b, a | b);"}


def test_a_choice_between_the_compared_has_no_boundary() -> None:
    text = "int f(int v)\n{\n    v = v < -top ? -top : v;\n    return (int8_t)(v > top ? top : v);\n}\n"
    assert afters(text, "operator") == {
        "v = v >= -top ? -top : v;",
        "v = v < top ? -top : v;",
        "v = v < -top ? top : v;",
        "return (int8_t)(v <= top ? top : v);",
    }


def test_the_bodies_of_macros_are_code() -> None:
    text = "#define F(TYPE, y) \\\n    static void TYPE(void) \\\n    {  \\\n        a = y + 1; \\\n    }\n"
    found = mutations_of("a.c", text)
    assert {(m.shown(text)[0], m.shown(text)[2]) for m in found} >= {(4, "a = y - 1;"), (4, "a = y + 2;")}
    assert all(text.index("{") < m.start for m in found)


@pytest.mark.parametrize("path", sorted(SOURCE.iterdir()), ids=lambda path: path.name)
def test_mutants_of_the_engine_s_sources_differ(path: Path) -> None:
    text = path.read_text()
    found = mutations_of(path.name, text)
    for mutation in found:
        changed = mutation.apply(text)
        assert changed != text
        assert changed[: mutation.start] == text[: mutation.start]
        assert changed.endswith(text[mutation.end :])
        assert "/*" not in text[mutation.start : mutation.end] or mutation.kind in (
            "statement removed",
            "arms exchanged",
        )
    assert len({mutation.apply(text) for mutation in found}) == len(found)
    assert found or path.suffix == ".c" or path.name == "mdsnn.h"


def fates(tmp_path: Path, build: str, *changes: tuple[str, str, str]) -> tuple[int, list[tuple[str, str]]]:
    """Exit status of the script for mutants made by hand, and what became of each."""
    target = tmp_path / "score.json"
    command = [sys.executable, str(HERE / "mutate_c.py"), "--cases", "3", "--workers", "1", "--build", build]
    for change in changes:
        command += ["--replace", *change]
    done = subprocess.run([*command, "--json", str(target)], capture_output=True, text=True, timeout=500)
    assert target.exists(), done.stderr
    rows = json.loads(target.read_text())["mutants"]
    return done.returncode, [(row["status"], row["how"]) for row in rows]


@needs_gcc
def test_a_mutant_s_fate(tmp_path: Path) -> None:
    code, found = fates(
        tmp_path,
        "base",
        ("lif.h", "(h > k->v_th)", "(h >= k->v_th)"),
        ("lif.h", "from = middle + 1;", "for (;;);"),
        ("lif.h", "(from + to) / 2", "from + (to - from) / 2"),
        ("lif.h", "(from + to) / 2", "(to + from) / 2"),
        ("lif.h", "(from + to) / 2", "(from + nonsense) / 2"),
        ("readout.h", "logits[k] = sum", "logits[f->plan->classes] = logits[k] = sum"),
        ("pairs.h", "a[2 * i + 1] * b[2 * i + 1]", "a[2 * i + 1] * b[2 * i]"),
    )
    assert found == [
        ("killed", "differs"),
        ("killed", "hangs"),
        ("survived", ""),  # the same function, other machine code
        ("same", "-O1"),
        ("killed", "writes elsewhere"),
        ("same", "-O1"),  # not compiled where there is SSE2
    ]
    assert code == 1  # 75 % is under 90 %


@needs_gcc
def test_the_portable_code_is_built_and_judged(tmp_path: Path) -> None:
    change = ("pairs.h", "a[2 * i + 1] * b[2 * i + 1]", "a[2 * i + 1] * b[2 * i]")
    assert fates(tmp_path, "portable", change) == (0, [("killed", "differs")])


def test_every_mutant_called_equivalent_has_its_reason() -> None:
    """Whether its line is still there is said by the script, so that a change of the C code breaks no test here."""
    for entry in json.loads((HERE / "mutation" / "equivalent.json").read_text()):
        assert set(entry) == {"file", "function", "before", "after", "reason"}
        assert (SOURCE / entry["file"]).exists()
        assert entry["before"] != entry["after"]
        assert len(entry["reason"]) > 20


def test_a_mutation_says_where_it_is() -> None:
    text = "a\n  b = c; \\\n  d\n"
    assert Mutation("a.c", text.index("c"), text.index("c") + 1, "e", "", "").shown(text) == (2, "b = c;", "b = e;")

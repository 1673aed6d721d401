"""The README's example runs as it stands, and its commands and files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mdsnn.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_example_is_short_and_its_names_exist() -> None:
    code = _example()
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 25
    imports = "\n".join(line for line in lines if line.startswith(("from ", "import ")))
    exec(compile(imports, "README.md", "exec"), {})
    compile(code, "README.md", "exec")


def test_every_command_it_shows_is_there() -> None:
    shown = set(re.findall(r"`mdsnn ([a-z]+)", README))
    assert shown <= set(COMMANDS)
    assert shown >= set(COMMANDS) - {"demo"}


def test_every_file_it_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _example()], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "True" in lines
    assert (tmp_path / "student.mdsnn").is_file()

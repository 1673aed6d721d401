"""The script that trains CIFAR-10 on a GPU, shortened on the CPU; and its table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import ENVIRONMENT

ROOT = Path(__file__).parent.parent
SCRIPT, TABLE = ROOT / "benchmarks" / "cifar10_gpu.sh", ROOT / "benchmarks" / "runs_table.py"


def script(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, words)],
        env={**ENVIRONMENT, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_the_script_explains_itself_and_refuses_what_it_does_not_know() -> None:
    done = script("--help")
    assert done.returncode == 0
    told = {word.replace("_", "-") for word in done.stdout.split()}
    assert set(re.findall(r"^ +(--[a-z-]+)\)", SCRIPT.read_text(), re.MULTILINE)) <= told
    done = script("--dta", "x")
    assert (done.returncode, done.stderr.count("unknown option --dta")) == (2, 1)


@pytest.mark.slow
def test_the_shortened_script_stops_goes_on_and_ends_with_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for half, count in (("train", 70), ("test", 20)):
        for label in range(3):
            folder = tmp_path / "images" / half / str(label)
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 100, (32, 32, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{n}.png")
    out = tmp_path / "runs"
    source = ("--data", "imagefolder", "--data_path", tmp_path / "images", "--save_path", out)
    words = (*source, "--device", "cpu", "--shortened")
    stopped = script(*words, "--max-minutes", 0.0001)
    assert stopped.returncode == 0, stopped.stderr
    assert "the same command goes on" in stopped.stderr
    assert sorted(os.listdir(out)) == ["teacher"]
    done = script(*words)
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "table.json").read_text())
    assert set(document["runs"]) == {"teacher", "baseline", "mdsnn"}
    assert document["runs"]["teacher"]["frozen_accuracy"] is None
    assert document["runs"]["mdsnn"]["frozen_accuracy"] is not None
    assert (document["verify"]["samples"], document["verify"]["differing"]) == (50, 0)
    assert done.stdout.endswith((out / "table.md").read_text())
    table = subprocess.run(
        [sys.executable, str(TABLE), str(out)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert table.stdout == (out / "table.md").read_text()
    assert table.stdout.count("\n| ") == 4  # a rule and three networks

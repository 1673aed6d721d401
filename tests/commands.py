"""Calling the command line as its user does, in this process or in one of its own, and one tiny trained student."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mdsnn.cli import main

TINY = ("--blocks", "1,1", "--widths", "4,8", "--time-window", "2", "--threads", "1")
"""Train options of a network that learns nothing and takes a second."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MDSNN_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a call came to: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong, without their prefix."""
        prefix = "mdsnn: error: "
        return [line.removeprefix(prefix) for line in self.err.splitlines() if line.startswith(prefix)]


def call(*words: object) -> Outcome:
    """`mdsnn WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


def command(*words: object) -> list[str]:
    """The same as an argument list for a process of its own."""
    return [sys.executable, "-m", "mdsnn", *map(str, words)]


def spawn(*words: object, prelude: str = "", **keywords: object) -> Outcome:
    """`mdsnn WORDS` in a process of its own; `prelude` is Python that runs there first."""
    if prelude:
        start = f"{prelude}\nimport sys\nfrom mdsnn.cli import main\nsys.exit(main(sys.argv[1:]))"
        arguments = [sys.executable, "-c", start, *map(str, words)]
    else:
        arguments = command(*words)
    options = {"capture_output": True, "timeout": 120, "env": ENVIRONMENT, **keywords}
    done = subprocess.run(arguments, check=False, **options)  # type: ignore[call-overload]
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_one_line(outcome: Outcome, code: int, *parts: str) -> None:
    """The call failed with `code`, said one line that holds all `parts`, no traceback, and gave no result."""
    assert outcome.code == code, outcome
    assert len(outcome.errors) == 1, outcome
    assert not outcome.out, outcome
    assert "Traceback" not in outcome.err, outcome
    assert "internal error" not in outcome.err, outcome
    missing = [part for part in parts if part not in outcome.errors[0]]
    assert not missing, (missing, outcome.errors[0])


@dataclass(frozen=True)
class Files:
    """Files that tests read and never change."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return {
            "teacher": self.folder / "teacher" / "model.ckpt",
            "student": self.folder / "student" / "model.ckpt",
            "artifact": self.folder / "student.mdsnn",
            "affine": self.folder / "affine.mdsnn",
            "onnx": self.folder / "student.onnx",
            "npy": self.folder / "pixels.npy",
            "png": self.folder / "image.png",
            "big_png": self.folder / "big.png",
        }[name]


@functools.cache
def files() -> Files:
    """A teacher, a student it guided, their artifacts and some images, made once for all tests by the commands."""
    folder = Path(tempfile.mkdtemp(prefix="mdsnn-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = Files(folder)
    qamd = ("--paper_setting", "qamd", "--bits", "4", "--teacher_path", made.teacher, "--set", "epochs=1")
    for words in (
        ("train", *TINY, "--set", "epochs=1", "--save-path", folder / "teacher"),
        ("train", *qamd, *TINY, "--save-path", folder / "student"),
        ("export", made.student, "-o", made.artifact, "--onnx", made.onnx),
        ("export", made.student, "-o", made.affine, "--bn-table", "affine"),
    ):
        outcome = call(*words)
        assert outcome.code == 0, outcome
    from mdsnn.data import digits

    pixels = digits().test_x[:24]
    np.save(made.npy, pixels)
    Image.fromarray(pixels[0, 0]).save(made.png)
    Image.fromarray(np.kron(pixels[0, 0], np.ones((3, 3), np.uint8))).save(made.big_png)
    return made


def names(folder: Path) -> list[str]:
    """All files under a folder, relative, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

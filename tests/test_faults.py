"""Every system call of every command that writes, failed in turn; and disks that are full.

A command that cannot write says so in one line with exit code 3, and leaves under the names it was to write either
nothing or the whole file. An error is never success: exit code 0 means that every output is there and whole.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from commands import TINY, Outcome, call, files, names, spawn
from mdsnn import data
from mdsnn.export import artifact

CALLS = ("open", "fsync", "link", "replace", "rename", "unlink", "mkdir", "listdir")
"""What kernels/files.py asks of the system by a Python name; writing itself is cut short by RLIMIT_FSIZE below."""
FAULTS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def writers(folder: Path) -> dict[str, tuple[object, ...]]:
    """Each writing command, with all its outputs in `folder`."""
    made = files()
    return {
        "info": ("info", made.artifact, "--json", folder / "x.json"),
        "run": ("run", made.artifact, made.npy, "--json", folder / "x.json"),
        "verify": (
            *("verify", made.artifact, "--data", made.npy, "--executors", "reference,native", "--limit", "2"),
            *("--json", folder / "x.json"),
        ),
        "export": (
            *("export", made.student, "-o", folder / "x.mdsnn", "--onnx", folder / "x.onnx"),
            *("--json", folder / "x.json"),
        ),
        "report": (
            *("report", made.artifact, "--data", made.npy, "--limit", "4", "-o", folder / "x.html"),
            *("--csv", folder / "x.csv", "--save-activity", folder / "x.npz", "--json", folder / "x.json"),
        ),
        "train": ("train", *TINY, "--epochs", "1", "--save-path", folder / "run"),
    }


class Faults:
    """Fails the n-th system call that touches a path or descriptor in a folder; counts them all."""

    def __init__(self, folder: Path, nth: int, code: int) -> None:
        self.folder, self.nth, self.code = str(folder), nth, code
        self.count = 0
        self.hit = ""

    def inside(self, arguments: tuple[object, ...]) -> bool:
        for argument in arguments:
            if isinstance(argument, str | os.PathLike) and os.fspath(argument).startswith(self.folder):
                return True
            if type(argument) is int and argument > 2:
                try:
                    return os.readlink(f"/proc/self/fd/{argument}").startswith(self.folder)
                except OSError:
                    return False
        return False

    def wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def failing(*arguments: object, **keywords: object) -> object:
            if self.inside(arguments):
                if self.count == self.nth:
                    self.hit = name
                    self.count += 1
                    raise OSError(self.code, os.strerror(self.code), *arguments[:1])
                self.count += 1
            return real(*arguments, **keywords)

        return failing


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits cut down to what one step takes."""
    whole = data.digits()
    few = replace(
        whole,
        train_x=whole.train_x[:32],
        train_y=whole.train_y[:32],
        test_x=whole.test_x[:8],
        test_y=whole.test_y[:8],
    )
    monkeypatch.setitem(data.DATASETS, "digits", lambda _path: few)


def run(words: tuple[object, ...], faults: Faults | None) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        if faults is not None:
            for name in CALLS:
                patch.setattr(os, name, faults.wrap(name, getattr(os, name)))
        return call(*words)


def whole_outputs(name: str, folder: Path) -> dict[str, bytes]:
    """What the command writes if nothing fails."""
    folder.mkdir()
    outcome = run(writers(folder)[name], None)
    assert outcome.code == 0, outcome
    return {file: (folder / file).read_bytes() for file in names(folder)}


def assert_whole(name: str, folder: Path, whole: dict[str, bytes], where: str) -> None:
    """Everything that stands under a final name is what a command that did not fail would have written there."""
    for file in names(folder):
        assert "mdsnn-tmp" not in file or "unlink" in where, f"{where}: left {file}"
        if "mdsnn-tmp" in file or file == "run/recipe.json" or file.endswith(".json"):
            continue  # these tell times and paths
        content = (folder / file).read_bytes()
        if file.startswith("run/metrics."):  # written after each epoch, and again with the accuracies
            assert content.count(b"\n") == whole[file].count(b"\n"), f"{where}: {file} is torn"
            assert content.endswith(b"\n"), f"{where}: {file} is torn"
        else:
            assert content == whole[file], f"{where}: {file} is torn"


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", ["info", "run", "verify", "export", "report", "train"])
def test_every_system_call_fails_in_turn(name: str, tmp_path: Path) -> None:
    whole = whole_outputs(name, tmp_path / "whole")
    nth, hits = 0, set()
    while True:
        folder = tmp_path / "out"
        folder.mkdir()
        faults = Faults(folder, nth, FAULTS[nth % len(FAULTS)])
        outcome = run(writers(folder)[name], faults)
        where = f"{name}, call {nth} ({faults.hit}, {errno.errorcode[faults.code]})"
        if not faults.hit:
            assert outcome.code == 0, where
            break
        hits.add(faults.hit)
        if outcome.code == 0:  # the call was one that may fail: then nothing may be missing
            assert faults.hit in ("unlink", "rename"), where
            assert sorted(whole) == [file for file in names(folder) if "mdsnn-tmp" not in file], where
        else:
            assert outcome.code == 3, (where, outcome)
            assert len(outcome.errors) == 1, (where, outcome)
            assert str(folder) in outcome.errors[0], (where, outcome)
            assert "internal error" not in outcome.err, (where, outcome)
        assert_whole(name, folder, whole, where)
        shutil.rmtree(folder)
        nth += 1
    assert hits >= {"open", "fsync"}, hits


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
"""


@pytest.mark.parametrize("name", ["info", "run", "verify", "export", "report", "train"])
def test_no_room_for_a_whole_file(name: str, tmp_path: Path) -> None:
    """Writing stops after 700 bytes of a file: real writes, really cut short."""
    outcome = spawn(*writers(tmp_path)[name], prelude=LIMITED.format(bytes=700))
    if name == "run" and outcome.code == 0:
        pytest.skip("its output fits")
    assert outcome.code == 3, outcome
    assert len(outcome.errors) == 1, outcome
    assert str(tmp_path) in outcome.errors[0]
    assert "Traceback" not in outcome.err
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB, where the system lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", place):
        pytest.skip("no file system can be mounted here")
    yield place
    mount("umount", place)


def mount(*words: object) -> bool:
    """Run a mount command; whether it worked."""
    if shutil.which(str(words[0])) is None:
        return False
    return subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode == 0


def test_a_full_disk(small_disk: Path) -> None:
    outcome = call("export", files().student, "-o", small_disk / "x.mdsnn")
    assert outcome.code == 3
    assert len(outcome.errors) == 1
    assert "No space left on device" in outcome.errors[0]
    assert names(small_disk) == []
    kept = small_disk / "kept.json"
    assert call("chips", "--json", kept).code == 0
    before = kept.read_bytes()
    outcome = call("info", files().artifact, "--json", kept, "--force")
    if outcome.code == 3:
        assert kept.read_bytes() == before
    artifact.load(files().artifact)


def test_a_read_only_disk(small_disk: Path) -> None:
    assert mount("mount", "-o", "remount,ro", small_disk)
    for words in writers(small_disk).values():
        outcome = call(*words)
        assert outcome.code == 3, outcome
        assert len(outcome.errors) == 1, outcome
        assert str(small_disk) in outcome.errors[0]


def test_the_limit_is_felt(tmp_path: Path) -> None:
    """What these tests set is what the system enforces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == hard or soft > 1 << 20
    outcome = spawn("info", files().artifact, "--json", tmp_path / "x.json", prelude=LIMITED.format(bytes=1 << 20))
    assert outcome.code == 0

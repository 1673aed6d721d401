"""Writing: whole or not at all, under every failing system call, a full disk, Ctrl-C and kill -9. Reading: bounded."""

import contextlib
import errno
import io
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mdsnn.kernels import files
from mdsnn.kernels.errors import InputError, StorageError

OLD, NEW = b"old content", b"new content, and longer than the old"


class Broken:
    """Stands in for a function: lets `after` calls through and then raises."""

    def __init__(self, real: Callable[..., Any], fault: BaseException, after: int = 0) -> None:
        self.real, self.fault, self.left = real, fault, after
        self.struck = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.left:
            self.left -= 1
            return self.real(*arguments, **options)
        self.struck = True
        raise self.fault


FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]
CALLS = [
    *(("open", 0), ("open", 1), ("fsync", 0), ("fsync", 1), ("replace", 0)),
    *(("link", 0), ("unlink", 0), ("listdir", 0), ("fdopen", 0)),
]


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("call", "after"), CALLS)
@pytest.mark.parametrize("force", [False, True])
def test_each_failing_system_call_is_a_storage_error_and_tears_nothing(monkeypatch, tmp_path, call, after, code, force):
    target = tmp_path / "file"
    if force:
        target.write_bytes(OLD)
    broken = Broken(getattr(os, call), OSError(code, os.strerror(code)), after)
    caught: StorageError | None = None
    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        try:
            files.write_bytes(target, NEW, force=force)
        except StorageError as fault:
            caught = fault
    assert broken.struck == (caught is not None), "a failed call became a success, or the reverse"
    if caught is None:
        assert target.read_bytes() == NEW
    else:
        assert caught.exit_code == 3
        assert str(target) in str(caught)
        assert os.strerror(code) in str(caught)
        if (call, after) in (("open", 1), ("fsync", 1), ("unlink", 0)):  # after the file got its name
            assert target.read_bytes() == NEW
        else:
            assert (target.read_bytes() if target.exists() else None) == (OLD if force else None)
    left = [name for name in os.listdir(tmp_path) if name != "file"]
    if broken.struck and call == "unlink":  # it could not clean up; the name says whose it was
        left = [name for name in left if not name.endswith(".mdsnn-tmp")]
    assert left == []


class FailingRaw(io.RawIOBase):
    """A raw file that takes `room` bytes and then fails, in short writes."""

    def __init__(self, descriptor: int, room: int, fault: BaseException | None) -> None:
        super().__init__()
        self.descriptor, self.room, self.fault = descriptor, room, fault

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        if self.fault is not None and not self.room:
            raise self.fault
        size = min(len(data), 7 if self.fault is None else min(7, self.room))
        self.room -= size if self.fault is not None else 0
        return os.write(self.descriptor, bytes(data[:size]))

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


@pytest.mark.parametrize("room", [0, 1, 7, 20, len(NEW) - 1])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("force", [False, True])
def test_a_write_that_fails_midway_leaves_the_old_content(monkeypatch, tmp_path, room, code, force):
    target = tmp_path / "file"
    if force:
        target.write_bytes(OLD)
    fault = OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "fdopen", lambda fd, mode: io.BufferedWriter(FailingRaw(fd, room, fault), 8))
    with pytest.raises(StorageError, match=os.strerror(code)):
        files.write_bytes(target, NEW, force=force)
    assert os.listdir(tmp_path) == (["file"] if force else [])
    assert not force or target.read_bytes() == OLD


def test_short_writes_are_completed(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fdopen", lambda fd, mode: io.BufferedWriter(FailingRaw(fd, 0, None), 8))
    files.write_bytes(tmp_path / "file", NEW * 100)
    assert (tmp_path / "file").read_bytes() == NEW * 100


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(1), ValueError("the caller's own"), MemoryError()])
@pytest.mark.parametrize("force", [False, True])
def test_ctrl_c_and_the_callers_own_errors_pass_and_leave_nothing(tmp_path, fault, force):
    target = tmp_path / "file"
    if force:
        target.write_bytes(OLD)

    def write() -> None:
        with files.atomic_write(target, force=force) as stream:
            stream.write(NEW)
            stream.flush()
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert os.listdir(tmp_path) == (["file"] if force else [])
    assert not force or target.read_bytes() == OLD


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_ctrl_c_inside_a_system_call_leaves_nothing(monkeypatch, tmp_path, call):
    for force in (False, True):
        target = tmp_path / "file"
        if force:
            target.write_bytes(OLD)
        broken = Broken(getattr(os, call), KeyboardInterrupt())
        monkeypatch.setattr(os, call, broken)
        with contextlib.suppress(KeyboardInterrupt):
            files.write_bytes(target, NEW, force=force)
        monkeypatch.undo()
        assert target.exists() == (force or not broken.struck)
        if target.exists():
            assert target.read_bytes() == (OLD if broken.struck else NEW)
        assert os.listdir(tmp_path) in ([], ["file"])
        target.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- real full disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "mdsnn-test", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_the_old_file(tiny_disk):
    target = tiny_disk / "file"
    files.write_bytes(target, OLD * 1000)
    with pytest.raises(StorageError, match=os.strerror(errno.ENOSPC)):
        files.write_bytes(target, NEW * 10_000, force=True)
    assert target.read_bytes() == OLD * 1000
    assert os.listdir(tiny_disk) == ["file"]
    files.write_bytes(tiny_disk / "other", b"there is room for this")


_LIMITED = """
import resource, signal, sys
from mdsnn.kernels import files
from mdsnn.kernels.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    files.write_bytes(sys.argv[1], b"n" * 200_000, force=True)
except StorageError as fault:
    print(fault)
    sys.exit(fault.exit_code)
"""


def test_a_limit_of_the_file_size_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(OLD)
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(target)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert os.strerror(errno.EFBIG) in done.stdout
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


_WRITER = """
import sys
from mdsnn.kernels import files
print("go", flush=True)
number = 0
while True:
    number += 1
    files.write_bytes(sys.argv[1], b"%08d" % number * 20_000, force=True)
"""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda way: way.name)
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path, way):
    target = tmp_path / "file"
    for kill in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.01 + 0.007 * kill)
        writer.send_signal(way)
        writer.wait()
        writer.stdout.close()
        if target.exists():  # it may have died before its first file was whole
            content = target.read_bytes()
            assert len(content) == 160_000
            assert content == content[:8] * 20_000, "torn"
        elif kill:
            raise AssertionError("the file of an earlier writer is gone")
        else:
            files.write_bytes(target, b"00000000" * 20_000)
    left = [name for name in os.listdir(tmp_path) if name != "file"]
    if way == signal.SIGINT:
        assert left == []
    files.write_bytes(tmp_path / "other", b"x")  # sweeps what the dead left
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


# ------------------------------------------------------------------------------------------ leftovers and names


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_dead_processes_are_swept_and_nothing_else(tmp_path):
    dead = dead_pid()
    gone = [f".net.mdsnn.{dead}.0123abcd.mdsnn-tmp", f".x.{10**30}.00000000.mdsnn-tmp"]
    kept = [
        f".net.mdsnn.{os.getpid()}.0123abcd.mdsnn-tmp",  # alive
        f".net.mdsnn.{dead}.0123abc.mdsnn-tmp",  # seven digits: not ours
        f"net.mdsnn.{dead}.0123abcd.mdsnn-tmp",
        f".net.mdsnn.{dead}.0123abcd.tmp",
        "file",
    ]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"x")
    folder = f".folder.{dead}.0123abcd.mdsnn-tmp"
    (tmp_path / folder).mkdir()
    assert files.sweep(tmp_path) == len(gone)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, folder])


def test_a_process_of_another_user_is_alive(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "kill", Broken(os.kill, PermissionError()))
    (tmp_path / ".x.1.00000000.mdsnn-tmp").write_bytes(b"x")
    assert files.sweep(tmp_path) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "is a folder"),
        ("none/file", "does not exist; create it first"),
        ("a" * 300, "cannot be written"),
        ("a\0b", "NUL"),
        ("\udfff", "cannot be written"),
        ("there/file", "cannot be written|does not exist"),
    ],
)
def test_names_that_cannot_be_written_are_storage_errors_before_any_work(tmp_path, name, text):
    (tmp_path / "there").write_bytes(b"a file, not a folder")
    for check in (
        files.check_writable,
        lambda path: files.write_bytes(path, b"x"),
        lambda path: files.write_bytes(path, b"x", force=True),
    ):
        with pytest.raises(StorageError, match=text):
            check(tmp_path / name if name else tmp_path)
    assert os.listdir(tmp_path) == ["there"]


def test_a_folder_that_may_not_be_written_is_a_storage_error(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="no permission to write"):
        files.write_bytes(tmp_path / "file", b"x")


def test_a_file_that_exists_is_kept_unless_forced(tmp_path):
    target = tmp_path / "file"
    files.write_bytes(target, OLD)
    for attempt in (lambda: files.write_bytes(target, NEW), lambda: files.check_writable(target)):
        with pytest.raises(StorageError, match=r"exists and is kept; pass --force"):
            attempt()
    assert target.read_bytes() == OLD
    assert files.check_writable(target, force=True) == target
    files.write_bytes(target, NEW, force=True)
    assert target.read_bytes() == NEW


def write_while_another_does(target: Path) -> None:
    with files.atomic_write(target) as stream:
        stream.write(NEW)
        target.write_bytes(OLD)


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "file"
    with pytest.raises(StorageError, match="exists and is kept"):
        write_while_another_does(target)
    assert target.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_still_keeps_what_exists(monkeypatch, tmp_path, code):
    monkeypatch.setattr(os, "link", Broken(os.link, OSError(code, "no links")))
    target = tmp_path / "file"
    with pytest.raises(StorageError, match="exists and is kept"):
        write_while_another_does(target)
    assert target.read_bytes() == OLD
    files.write_bytes(tmp_path / "other", NEW)
    assert (tmp_path / "other").read_bytes() == NEW
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_no_failure(monkeypatch, tmp_path, code):
    monkeypatch.setattr(os, "fsync", Broken(os.fsync, OSError(code, "no"), after=1))
    files.write_bytes(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_links_are_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(OLD)
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(StorageError, match="exists and is kept"):
            files.write_bytes(tmp_path / name, NEW)
        files.write_bytes(tmp_path / name, NEW, force=True)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "precious").read_bytes() == OLD
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_pipe_or_a_socket_is_never_replaced(tmp_path, force):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name in ("pipe", "socket"):
        with pytest.raises(StorageError, match="is a device or a pipe; name a file"):
            files.write_bytes(tmp_path / name, NEW, force=force)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "socket").is_socket()


def test_the_content_is_synced_before_it_gets_its_name(monkeypatch, tmp_path):
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            what = name
            if name == "fsync":
                what += " folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else " file"
            calls.append(what)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, spy(name))
    files.write_bytes(tmp_path / "file", NEW)
    files.write_bytes(tmp_path / "file", NEW, force=True)
    assert calls == ["fsync file", "link", "fsync folder", "fsync file", "replace", "fsync folder"]


def test_text_is_utf_8_and_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "file", "spannung µV")
    finally:
        os.umask(old)
    assert (tmp_path / "file").read_bytes() == "spannung µV".encode()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_folders_are_made_with_their_parents(tmp_path):
    assert files.make_folder(tmp_path / "a/b") == tmp_path / "a/b"
    files.make_folder(tmp_path / "a/b")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="cannot be created"):
        files.make_folder(tmp_path / "file/c")


# ------------------------------------------------------------------------------------------------------- reading


def test_reading_is_bounded_exactly_at_its_limit(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"x" * 100)
    assert files.read_bounded(target, 100) == b"x" * 100
    with pytest.raises(InputError, match="100 bytes, over the limit of 99 for a chip"):
        files.read_bounded(target, 99, what="chip")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none", "no such file; a net was"),
        ("there/none", "no such file"),
        ("", "is a folder"),
        ("empty", "empty; a net was"),
        ("pipe", "not a regular file"),
    ],
)
def test_what_is_not_a_file_of_content_is_an_input_error(tmp_path, name, text):
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it: opening it must not wait
    with pytest.raises(InputError, match=text):
        files.read_bounded(tmp_path / name if name else tmp_path, 10, what="net")


def test_devices_are_not_read():
    with pytest.raises(InputError, match="not a regular file"):
        files.read_bounded("/dev/zero", 1 << 40)


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "\udfff"])
def test_names_that_cannot_be_opened_are_storage_errors(tmp_path, name):
    with pytest.raises(StorageError, match="cannot be read"):
        files.read_bounded(tmp_path / name, 10)


def test_a_read_error_is_a_storage_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    caught: StorageError | None = None
    with monkeypatch.context() as patch:  # and not a line longer: pytest reads files too
        patch.setattr(os, "fstat", Broken(os.fstat, OSError(errno.EIO, os.strerror(errno.EIO))))
        try:
            files.read_bounded(tmp_path / "file", 10)
        except StorageError as fault:
            caught = fault
    assert os.strerror(errno.EIO) in str(caught)


@pytest.mark.parametrize("size", [1, 99, 101, 1000])
def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch, tmp_path, size):
    target = tmp_path / "file"
    target.write_bytes(b"x" * 100)
    real = os.fstat

    def race(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        target.write_bytes(b"y" * size)
        return found

    caught: InputError | None = None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", race)
        try:
            files.read_bounded(target, 10_000)
        except InputError as fault:
            caught = fault
    assert "changed its size of 100 bytes" in str(caught)


def test_a_large_limit_allocates_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), hard))
    try:
        assert len(files.read_bounded(tmp_path / "file", 1 << 40)) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""Reading and writing files so that nothing half-written ever carries a final name.

`atomic_write` writes a temporary file in the target's folder, syncs it, renames it and syncs the folder. Errors are
never success, and temporary files that a dead process left are swept by the next write to the same folder.
`read_bounded` refuses a file over a stated size before it reads a byte of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, StorageError

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<pid>[0-9]+)\.[0-9a-f]{8}\.mdsnn-tmp$")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: a number that no process can have
        return False
    except PermissionError:
        return True
    return True


def sweep(folder: Path) -> int:
    """Remove temporary files in `folder` whose writing process is dead; returns how many went."""
    removed = 0
    for entry in os.listdir(folder):
        match = _LEFTOVER.match(entry)
        if match and not _alive(int(match["pid"])):
            with contextlib.suppress(OSError):
                os.unlink(folder / entry)
                removed += 1
    return removed


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as fault:  # some file systems cannot sync a folder; that is not a failed write
        if fault.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _rename_new(temporary: Path, target: Path) -> None:
    """Rename, but never over a file that another process made meanwhile."""
    try:
        os.link(temporary, target)
    except OSError as fault:
        if fault.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        if target.exists():  # a file system without hard links: the window stays open for an instant
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from fault
        os.rename(temporary, target)
    else:
        os.unlink(temporary)


def check_writable(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Fail early: raise what `atomic_write` would raise for `path`, before long work is spent on its content."""
    target = Path(path)
    folder = target.parent
    try:
        if b"\0" in os.fsencode(target):
            raise ValueError("its name holds a NUL")
        if target.is_dir():
            raise StorageError(f"{target}: is a folder; name a file")
        if target.exists() and not target.is_file():  # to rename over a device or a pipe would destroy it
            raise StorageError(f"{target}: is a device or a pipe; name a file")
        if os.path.lexists(target) and not force:
            raise StorageError(f"{target}: exists and is kept; pass --force (force=True) to replace it")
        if not folder.is_dir():
            raise StorageError(f"{target}: its folder {folder} does not exist; create it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(f"{target}: no permission to write in {folder}")
    except (OSError, ValueError) as fault:  # a name that is too long or cannot be encoded, a folder not to be searched
        raise StorageError(f"{target}: cannot be written: {getattr(fault, 'strerror', None) or fault}") from fault
    return target


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that appears under `path`, whole and synced, only if the block ends without an error.

    path    the final name; its folder must exist
    force   replace a file that exists; without it such a file is kept and `StorageError` is raised
    raises  StorageError  if the file cannot be written whole (disk full, permission, a folder in the way)
    """
    target = check_writable(path, force=force)
    folder = target.parent
    temporary = folder / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.mdsnn-tmp"
    try:  # all of it: an interrupt between two lines must not leave the temporary file either
        try:
            sweep(folder)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            if force:
                os.replace(temporary, target)
            else:
                _rename_new(temporary, target)
            _sync_folder(folder)
        except FileExistsError as fault:
            raise StorageError(f"{target}: exists and is kept; pass --force (force=True) to replace it") from fault
        except OSError as fault:
            raise StorageError(f"{target}: cannot be written: {fault.strerror or fault}") from fault
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes, *, force: bool = False) -> None:
    """Write `content` to `path` through `atomic_write`."""
    with atomic_write(path, force=force) as stream:
        stream.write(content)


def write_text(path: str | os.PathLike[str], content: str, *, force: bool = False) -> None:
    """Write `content` as UTF-8 to `path` through `atomic_write`."""
    write_bytes(path, content.encode("utf-8"), force=force)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder (and its parents) unless it is there; raises StorageError if that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name, or one that cannot be encoded
        raise StorageError(f"{folder}: cannot be created: {getattr(fault, 'strerror', None) or fault}") from fault
    return folder


def read_bounded(path: str | os.PathLike[str], limit: int, *, what: str = "file") -> bytes:
    """Read a regular file of at most `limit` bytes, whole.

    raises  InputError    if it is missing, empty, not a regular file, or over the limit
            StorageError  if the operating system refuses to read it
    """
    expected = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    try:
        # O_NONBLOCK: to open a pipe that nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{path}: not a regular file; {expected} was expected")
            if status.st_size == 0:
                raise InputError(f"{path}: empty; {expected} was expected")
            if status.st_size > limit:
                raise InputError(f"{path}: {status.st_size} bytes, over the limit of {limit} for {expected}")
            content = stream.read(status.st_size + 1)  # the size, not the limit: read() allocates what it is asked for
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise InputError(f"{path}: no such file; {expected} was expected") from fault
    except IsADirectoryError as fault:
        raise InputError(f"{path}: is a folder; {expected} was expected") from fault
    except (OSError, ValueError) as fault:  # ValueError: a NUL byte in the name
        raise StorageError(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from fault
    if len(content) != status.st_size:
        raise InputError(f"{path}: changed its size of {status.st_size} bytes while it was read")
    return content

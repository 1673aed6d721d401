"""CIFAR-10 and CIFAR-100 from the python archives their authors publish: fetched, unpacked, read. Needs no torch.

The archives hold pickles, and a pickle is a program. `plain_pickle` therefore runs none: it steps through the opcodes
and knows only dict, list, tuple, text, bytes, whole numbers and NumPy arrays of uint8, which it makes itself from their
bytes. Every other opcode or name is refused before anything happens.

Source of the format: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import logging
import math
import os
import pickletools
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import InputError, MissingError
from mdsnn.kernels.files import atomic_write, make_folder, read_bounded

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
log = logging.getLogger(__name__)

MAX_BATCH = 1 << 28
"""Bytes of one pickle; the largest real one, CIFAR-100's train, has 155,249,918."""
MAX_UNPACKED = 1 << 29
"""Bytes an archive may unpack to; the real ones take 186 MB."""
MAX_MEMBERS = 1024
MAX_OPCODES = 1 << 22
"""Steps of one pickle; CIFAR-100's train takes about 350,000. An empty list costs one byte there and 56 here."""
MAX_KEYS = 1024
"""Entries of one dict; the real ones have at most five."""
BLOCK = 1 << 20
SIDE = 32


@dataclass(frozen=True)
class Archive:
    """Where a data set's archive comes from, and what lies in it.

    sha256, size  of the file behind `url`, in hexadecimal and in bytes
    folder        in the archive, and of the extracted files       train, test  its batches   meta  its names' file
    label_key     of a batch's labels                              names_key    of the classes' names in `meta`
    """

    name: str
    url: str
    sha256: str
    size: int
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: str
    names_key: str

    @property
    def file(self) -> str:
        """Name of the archive's file."""
        return self.url.rsplit("/", 1)[-1]


CIFAR10 = Archive(
    "cifar10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    170_498_071,
    "cifar-10-batches-py",
    tuple(f"data_batch_{n}" for n in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    "labels",
    "label_names",
)
CIFAR100 = Archive(
    "cifar100",
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    169_001_437,
    "cifar-100-python",
    ("train",),
    ("test",),
    "meta",
    "fine_labels",
    "fine_label_names",
)


def read_cifar(
    archive: Archive,
    data_path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pixels, Labels, Pixels, Labels, tuple[str, ...]]:
    """Training and test images of CIFAR-10 or CIFAR-100, their labels, and the classes' names.

    data_path  a folder that holds the extracted folder or the archive, either of these themselves, or a folder to
               download into (made if it is not there)
    progress   called with (bytes so far, bytes in all) during a download
    returns    pixels [N, 3, 32, 32] uint8 (RGB) and labels [N] int64 in range(classes), train then test; names
    raises     InputError    for a file that is not what its name says
               MissingError  if nothing is there and the archive cannot be downloaded: says what to put where
               StorageError  for a file that the system refuses to read or write
    """
    root = Path(data_path)
    wanted = (*archive.train, *archive.test, archive.meta)
    folders = [folder for folder in (root / archive.folder, root) if (folder / archive.meta).is_file()]
    if folders:
        where = folders[0]
        contents = {name: read_bounded(where / name, MAX_BATCH, what=f"{archive.name} batch") for name in wanted}
    else:
        where = root if root.is_file() or root.name == archive.file else root / archive.file
        if not where.exists():
            download(archive.url, where, archive.sha256, archive.size, progress=progress)
        contents = unpack(where, archive.folder, wanted)
    meta = plain_pickle(contents.pop(archive.meta), f"{where}: {archive.meta}")
    names = meta.get(archive.names_key)
    if type(names) is not list or not names or not all(type(name) is str for name in names):
        raise InputError(f"{where}: {archive.meta}: holds no list of texts called {archive.names_key!r}")
    halves: list[tuple[Pixels, Labels]] = []
    for members in (archive.train, archive.test):
        batches = [
            _batch(contents.pop(name), f"{where}: {name}", archive.label_key, len(names))  # pop: frees each in turn
            for name in members
        ]
        halves.append((np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])))
    (train_x, train_y), (test_x, test_y) = halves
    return train_x, train_y, test_x, test_y, tuple(names)


def _batch(content: bytes, where: str, label_key: str, classes: int) -> tuple[Pixels, Labels]:
    fields = plain_pickle(content, where)
    data, labels = fields.get("data"), fields.get(label_key)
    width = 3 * SIDE * SIDE
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != width or data.shape[0] == 0:
        found = list(data.shape) if isinstance(data, np.ndarray) else type(data).__name__
        raise InputError(f"{where}: 'data' is {found}, not an array of [N, {width}] uint8")
    if type(labels) is not list or len(labels) != len(data):
        raise InputError(f"{where}: {label_key!r} is no list of {len(data)} labels")
    bad = next((n for n, label in enumerate(labels) if type(label) is not int or not 0 <= label < classes), None)
    if bad is not None:
        raise InputError(f"{where}: label {bad} is no whole number in 0..{classes - 1}")
    return np.ascontiguousarray(data).reshape(-1, 3, SIDE, SIDE), np.array(labels, np.int64)


# ------------------------------------------------------------------------------------------- fetching and unpacking


def download(
    url: str,
    path: str | os.PathLike[str],
    sha256: str,
    size: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 30.0,
) -> None:
    """Fetch `url` into `path`, which appears only once all of it is there and has the right sum.

    sha256, size  that the file must have: hexadecimal, bytes       timeout  seconds without an answer
    progress      called with (bytes so far, size)
    raises        MissingError  if the network gives nothing;  InputError  if it gives another file;  StorageError
    """
    path = Path(path)
    remedy = f"Download {url} by other means and put the file at {path}"
    make_folder(path.parent)
    log.warning("downloading %d MB from %s to %s", size // 1_000_000, url, path)  # a user should know, unasked
    state, done = hashlib.sha256(), 0
    with atomic_write(path) as stream:
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                while block := response.read(BLOCK):
                    done += len(block)
                    if done > size:
                        break
                    state.update(block)
                    _write(stream, block)
                    if progress is not None:
                        progress(done, size)
        except _WriteFault as fault:
            raise fault.fault from fault
        except (OSError, http.client.HTTPException, ValueError) as fault:
            reason = getattr(fault, "reason", None) or fault
            raise MissingError(f"{path}: not there, and cannot be downloaded ({reason!s:.120}). {remedy}") from fault
        if done != size or state.hexdigest() != sha256:
            found = f"more than {size} bytes" if done > size else f"{done} bytes with sha256 {state.hexdigest()}"
            raise InputError(
                f"{url}: {found}; {size} bytes with sha256 {sha256} are expected. Nothing was kept. {remedy}"
            )


class _WriteFault(Exception):
    """Carries an error of the disk past the handler of the network's errors."""

    def __init__(self, fault: OSError) -> None:
        super().__init__(str(fault))
        self.fault = fault


def _write(stream: IO[bytes], block: bytes) -> None:
    try:
        stream.write(block)
    except OSError as fault:
        raise _WriteFault(fault) from fault


class _Bounded:
    """A decompressed stream that refuses to grow past a limit."""

    def __init__(self, stream: gzip.GzipFile, where: str) -> None:
        self.stream, self.where, self.read_so_far = stream, where, 0

    def read(self, count: int) -> bytes:
        block = self.stream.read(min(count, BLOCK))
        self.read_so_far += len(block)
        if self.read_so_far > MAX_UNPACKED:
            raise InputError(f"{self.where}: unpacks to more than {MAX_UNPACKED} bytes; this is another archive")
        return block


def unpack(path: str | os.PathLike[str], folder: str, members: tuple[str, ...]) -> dict[str, bytes]:
    """The content of FOLDER/MEMBER for each of `members`, out of a .tar.gz; nothing is written to the disk.

    raises  InputError  if it is no such archive, is damaged, lacks a member, or unpacks to more than MAX_UNPACKED
    """
    where, wanted = str(path), {f"{folder}/{name}": name for name in members}
    packed = read_bounded(path, MAX_UNPACKED, what="tar.gz archive")
    found: dict[str, bytes] = {}
    try:
        with gzip.open(io.BytesIO(packed)) as stream:
            bounded: Any = _Bounded(stream, where)
            with tarfile.open(fileobj=bounded, mode="r|") as tar:
                for count, entry in enumerate(tar):
                    if count == MAX_MEMBERS:
                        raise InputError(f"{where}: holds more than {MAX_MEMBERS} files; this is another archive")
                    name = wanted.get(entry.name.removeprefix("./"))
                    if name is None:
                        continue
                    if not entry.isreg() or entry.issparse() or entry.size > MAX_BATCH or name in found:
                        raise InputError(f"{where}: {entry.name} stands twice, is over {MAX_BATCH} bytes, or no file")
                    member = tar.extractfile(entry)
                    found[name] = b"" if member is None else member.read()
            while bounded.read(BLOCK):
                pass  # to the end, where gzip keeps its sum
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, RecursionError) as fault:
        raise InputError(f"{where}: not a whole .tar.gz archive ({fault!s:.120}). Truncated?") from fault
    missing = [name for name in members if name not in found]
    if missing:
        raise InputError(f"{where}: holds no {folder}/{missing[0]}; this is another archive")
    return found


# --------------------------------------------------------------------------------------------------- plain pickles


class _Name:
    """A global name that a pickle may mention; it stands for itself and is never looked up."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Array:
    """A NumPy array between `_reconstruct` and its state."""

    value: Pixels | None = None


class _Dtype:
    """The dtype uint8, the only one known."""


_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # how Python 3 writes bytes in protocols 0 to 2
    "__builtin__ bytes": "bytes",  # and empty ones
}
_TEXT = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_WHOLE = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def plain_pickle(content: bytes, where: str) -> dict[str, Any]:
    """The dict in a pickle (protocols 0 to 4) of plain values; keys become text, a Python 2 text is read as Latin-1.

    Values are dict, list, tuple, str, bytes, int, bool, None, and NumPy arrays of uint8 (read-only).
    raises  InputError  for anything else: what it is and at which byte it stands
    """
    machine = _Machine()
    position = 0
    try:
        for count, (opcode, argument, found_at) in enumerate(pickletools.genops(content)):
            position = found_at or 0
            if count == MAX_OPCODES:
                raise _RefusedError(f"more than {MAX_OPCODES} steps")
            machine.step(opcode.name, argument)
        result = machine.result
        if type(result) is not dict:
            raise _RefusedError(f"holds a {type(result).__name__}, not a dict")
        keys = [key.decode("latin-1") if type(key) is bytes else key for key in result]
        values = [_finished(value) for value in result.values()]
    except _RefusedError as fault:
        raise InputError(f"{where}: byte {position}: {fault}; only plain values and uint8 arrays are read") from fault
    except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError) as fault:
        raise InputError(f"{where}: byte {position}: no pickle, or a damaged one ({fault!s:.80})") from fault
    return {key: value for key, value in zip(keys, values, strict=True) if type(key) is str}


class _RefusedError(Exception):
    """What a pickle asks for is none of the plain things."""


def _finished(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise _RefusedError("an array without content")
        return value.value
    return value


class _Machine:
    """The stack machine of pickle, without its power to import and to call."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _TEXT or name in _WHOLE or name in _BYTES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            self.result = self._pop()
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE", "LIST"):
            items = self._items()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = self._items()
            stack.append({})
            self._set(items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack.append(tuple(reversed([self._pop() for _ in range(count)])))
        elif name in ("APPEND", "APPENDS"):
            items = [self._pop()] if name == "APPEND" else self._items()
            if type(stack[-1]) is not list:
                raise _RefusedError("an item is added to what is no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set([self._pop(), self._pop()][::-1] if name == "SETITEM" else self._items())
        elif name == "GLOBAL":
            self._name(argument)
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            if type(module) is not str or type(attribute) is not str:
                raise _RefusedError("a name that is no text")
            self._name(f"{module} {attribute}")
        elif name == "REDUCE":
            arguments, called = self._pop(), self._pop()
            stack.append(self._made(called, arguments))
        elif name == "BUILD":
            self._build(self._pop(), stack[-1])
        else:
            raise _RefusedError(f"opcode {name}")

    def _pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("a mark in the way")
        return self.stack.pop()

    def _items(self) -> list[Any]:
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _RefusedError("a key is set in what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bytes, int):
                raise _RefusedError(f"a key of type {type(key).__name__}")
            target[key] = value
            if len(target) > MAX_KEYS:
                raise _RefusedError(f"a dict of more than {MAX_KEYS} entries")

    def _name(self, name: str) -> None:
        if name not in _NAMES:
            raise _RefusedError(f"the name {name!r:.80}")
        self.stack.append(_Name(_NAMES[name]))

    def _made(self, called: Any, arguments: Any) -> Any:
        kind = called.name if isinstance(called, _Name) else None
        if kind == "encode" and type(arguments) is tuple and arguments[1:] in (("latin1",), ("latin-1",)):
            return arguments[0].encode("latin-1") if type(arguments[0]) is str else self._no(kind)
        if kind == "bytes" and arguments == ():
            return b""
        if kind == "reconstruct" and type(arguments) is tuple and len(arguments) == 3:
            return _Array() if isinstance(arguments[0], _Name) and arguments[0].name == "ndarray" else self._no(kind)
        if kind == "dtype" and type(arguments) is tuple and arguments and arguments[0] in ("u1", b"u1"):
            return _Dtype()
        return self._no(kind)

    @staticmethod
    def _no(kind: str | None) -> Any:
        raise _RefusedError(f"a call of {kind or 'something unknown'} with arguments that no uint8 array has")

    def _build(self, state: Any, target: Any) -> None:
        if isinstance(target, _Dtype):
            return  # byte order, fields and flags: uint8 has none that matter
        if not isinstance(target, _Array) or type(state) is not tuple or len(state) != 5:
            raise _RefusedError("a state for what is no array")
        _version, shape, dtype, fortran, data = state
        if type(data) is str:  # a Python 2 text is bytes
            data = data.encode("latin-1")
        sizes = type(shape) is tuple and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
        if not (sizes and isinstance(dtype, _Dtype) and type(data) is bytes and math.prod(shape) == len(data)):
            raise _RefusedError("an array whose shape, dtype uint8 and bytes do not fit each other")
        target.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")

"""The strict container of artifacts and checkpoints: a safetensors file with one document and one digest.

Layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes. The header's `__metadata__` holds
exactly one key, whose text is the canonical JSON of the document with a field `sha256`. Any safetensors reader opens
the file; this one is stricter, so that one content has one spelling and no flipped bit goes unnoticed:

1. header and document equal their own canonical JSON byte for byte (sorted keys, no spaces, ASCII, no NaN);
2. the tensors tile the data exactly, ordered by element size (widest first) and then by name;
3. sha256 covers the header, with the digest's own field empty, and the data. It is always checked.

The digest detects damage. It is no signature: whoever can write a file can also write its digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import ArtifactError, MdsnnError
from .formats import Array

MAX_HEADER = 1 << 20
MAX_FILE = 1 << 31
MAX_AXES = 8
MAX_DEPTH = 32
"""Deepest nesting of a document."""
DIGEST = "sha256"
_METADATA = "__metadata__"
_DIGEST_FIELD = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_DTYPES = {"I8": "i1", "U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, no NaN or infinity."""
    return _CANONICAL.encode(value)


def _shallow(value: Any) -> bool:
    """Whether `value` nests at most MAX_DEPTH deep. Level by level: no recursion, so no recursion error."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return True
    return False


def _order(item: tuple[str, np.dtype[Any]]) -> tuple[int, str]:
    name, dtype = item
    return -dtype.itemsize, name


def _header(entries: Mapping[str, Any], document: Mapping[str, Any], key: str) -> bytes:
    text = canonical_json({**entries, _METADATA: {key: canonical_json(document)}})
    return (text + " " * (-len(text) % 8)).encode("ascii")


def pack(tensors: Mapping[str, Array], document: Mapping[str, Any], key: str) -> bytes:
    """Serialize tensors and a JSON document; the same content gives the same bytes, in every process.

    tensors   name -> int8, uint8, int16, int32, int64, float32 or float64 array
    document  JSON values; must not hold the key `sha256`
    key       what kind of file it is, the one metadata key
    raises    ArtifactError  for a dtype or a size the container does not hold
    """
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), order="C") for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype not in _NAMES or name == _METADATA or array.ndim > MAX_AXES:
            raise ArtifactError(f"tensor {name!r}: {array.dtype} with {array.ndim} axes cannot be stored")
    entries: dict[str, Any] = {}
    chunks: list[bytes] = []
    end = 0
    for name, dtype in sorted(((name, array.dtype) for name, array in arrays.items()), key=_order):
        begin, end = end, end + arrays[name].nbytes
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
        chunks.append(arrays[name].tobytes())
    data = b"".join(chunks)
    digest = hashlib.sha256(_header(entries, {**document, DIGEST: ""}, key))
    digest.update(data)
    header = _header(entries, {**document, DIGEST: digest.hexdigest()}, key)
    if len(header) > MAX_HEADER or 8 + len(header) + len(data) > MAX_FILE:
        raise ArtifactError(
            f"{len(header)} bytes of header and {len(data)} of tensors are over {MAX_HEADER} and {MAX_FILE}"
        )
    return len(header).to_bytes(8, "little") + header + data


class _Reader:
    """One unpacking: every check raises `error` with the file's name and the place in front."""

    def __init__(self, content: bytes, key: str, where: str, error: type[MdsnnError]) -> None:
        self.content, self.key, self.where, self.error = content, key, where, error

    def fail(self, what: str) -> MdsnnError:
        return self.error(f"{self.where}: {what}")

    def json(self, text: str, place: str) -> Any:
        def refuse(constant: str) -> Any:
            raise ValueError(constant)

        try:
            value = json.loads(text, parse_constant=refuse)
            if not _shallow(value):
                raise self.fail(f"{place}: nested deeper than {MAX_DEPTH}")
            again = canonical_json(value)
        except (ValueError, RecursionError) as fault:
            raise self.fail(f"{place}: not JSON ({type(fault).__name__}). Damaged, or not a file of ours?") from None
        if again != text:
            raise self.fail(f"{place}: not in canonical form. Was it edited or written by another program?")
        return value

    def split(self) -> tuple[bytes, memoryview]:
        size = len(self.content)
        if size < 16:
            raise self.fail(f"header: {size} bytes are too few for a header. Truncated?")
        length = int.from_bytes(self.content[:8], "little")
        if not 8 <= length <= MAX_HEADER or length % 8:
            raise self.fail(
                f"header: its length says {length}, no multiple of 8 in 8..{MAX_HEADER}. Not a file of ours?"
            )
        if 8 + length > size:
            raise self.fail(f"header: {length} bytes announced, but the file ends after {size - 8}. Truncated?")
        return self.content[8 : 8 + length], memoryview(self.content)[8 + length :]

    def read(self) -> tuple[dict[str, Any], dict[str, Array]]:
        raw, data = self.split()
        checked = self.digest(raw, data)
        try:
            padded = raw.decode("ascii")
        except UnicodeDecodeError:
            raise self.fail("header: not ASCII. Damaged, or not a file of ours?") from None
        text = padded.rstrip(" ")
        if len(text) + (-len(text) % 8) != len(padded):
            raise self.fail("header: its padding is not the least that aligns it to 8 bytes")
        header = self.json(text, "header")
        if type(header) is not dict or type(header.get(_METADATA)) is not dict:
            raise self.fail(f"header: no {_METADATA} table. Not a file of ours?")
        metadata = header.pop(_METADATA)
        if list(metadata) != [self.key] or type(metadata[self.key]) is not str:
            raise self.fail(f"header: {_METADATA} must hold {self.key!r} alone, it holds {sorted(metadata)[:4]}")
        document = self.json(metadata[self.key], "document")
        if type(document) is not dict or type(document.get(DIGEST)) is not str:
            raise self.fail(f"document: no {DIGEST}")
        stated = document.pop(DIGEST)
        if stated != checked:
            self.compare(stated, _header(header, {**document, DIGEST: ""}, self.key), data)
        return document, self.tensors(header, data)

    def compare(self, stated: str, header: bytes, data: memoryview) -> None:
        digest = hashlib.sha256(header)
        digest.update(data)
        if stated != digest.hexdigest():
            raise self.fail(f"{DIGEST} says {stated[:16]!r}..., the content {digest.hexdigest()[:16]!r}... Damaged?")

    def digest(self, raw: bytes, data: memoryview) -> str | None:
        """Check the digest before anything is parsed, if it stands in one place alone; else None, for `read` to do it.

        A text in the document may look like the digest's field. Then only the parsed document can tell them apart.
        """
        found = list(_DIGEST_FIELD.finditer(raw))
        if len(found) != 1:
            return None
        start, end = found[0].span(1)
        header = (raw[:start] + raw[end:]).rstrip(b" ")
        stated = raw[start:end].decode("ascii")
        self.compare(stated, header + b" " * (-len(header) % 8), data)
        return stated

    def tensors(self, header: dict[str, Any], data: memoryview) -> dict[str, Array]:
        described: list[tuple[str, np.dtype[Any], tuple[int, ...], int, int]] = []
        for name, entry in header.items():
            described.append((name, *self.entry(name, entry)))
        described.sort(key=lambda item: _order(item[:2]))
        tensors: dict[str, Array] = {}
        end = 0
        for name, dtype, shape, begin, stop in described:
            if begin != end:
                raise self.fail(f"tensor {name!r}: starts at byte {begin}, where {end} is due (gaps and overlaps)")
            if stop > len(data):
                raise self.fail(f"tensor {name!r}: ends at byte {stop}, but the file holds {len(data)}. Truncated?")
            tensors[name] = np.frombuffer(data[begin:stop], dtype).reshape(shape)
            end = stop
        if end != len(data):
            raise self.fail(f"{len(data) - end} bytes follow the last tensor")
        return tensors

    def entry(self, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
        if type(entry) is not dict or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            raise self.fail(f"tensor {name!r}: must have data_offsets, dtype and shape, and nothing else")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(code) is not str or code not in _DTYPES:
            raise self.fail(f"tensor {name!r}: dtype {code!r} is none of {', '.join(_DTYPES)}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if type(numbers) is not list or any(type(n) is not int or not 0 <= n <= MAX_FILE for n in numbers):
                raise self.fail(f"tensor {name!r}: {what} must be a list of integers in 0..{MAX_FILE}")
        if len(shape) > MAX_AXES or len(offsets) != 2:
            raise self.fail(f"tensor {name!r}: {len(shape)} axes and {len(offsets)} offsets")
        dtype = np.dtype(_DTYPES[code])
        size = math.prod(shape) * dtype.itemsize
        if math.prod(axis or 1 for axis in shape) > MAX_FILE:  # (0, 2**31, 2**31, 2**31): no bytes, and no array either
            raise self.fail(f"tensor {name!r}: its shape {tuple(shape)} is over {MAX_FILE} elements")
        if offsets[1] - offsets[0] != size:
            raise self.fail(
                f"tensor {name!r}: {tuple(shape)} {code} = {size} bytes, but the file holds {offsets[1] - offsets[0]}"
            )
        return dtype, tuple(shape), offsets[0], offsets[1]


def unpack(
    content: bytes, key: str, where: str, *, error: type[MdsnnError] = ArtifactError
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Inverse of `pack`: the document (without its digest) and the tensors, as read-only views of `content`.

    where   the file's name, for messages
    raises  `error`  if a byte is not exactly as `pack` would have written it
    """
    return _Reader(content, key, where, error).read()

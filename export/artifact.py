"""The artifact: one file that the exporter writes, every engine runs and the hardware model maps.

A strict safetensors container (kernels/container.py) under the metadata key `mdsnn.artifact`. Its document holds the
graph and every scale, width and bound as integers and texts; its tensors hold codes and tables, each at its narrowest
width, and weights of at most 4 bits two a byte. docs/artifact.md describes it byte by byte.

What a file says about itself is never believed: reading builds an `IntegerNetwork`, which recomputes every shape, range
and bound from the codes, and compares the outcome with the file's claims. A file that is short, long, damaged, newer,
inconsistent or hostile is an `ArtifactError` that names the place.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

import numpy as np

from mdsnn.kernels.container import MAX_FILE, canonical_json, pack, unpack
from mdsnn.kernels.errors import ArtifactError, FormatError, InputError, NetworkError
from mdsnn.kernels.files import read_bounded, write_bytes
from mdsnn.kernels.formats import Array, Grid, check_bits, narrowest, pack_nibbles, unpack_nibbles
from mdsnn.kernels.network import NODE_TYPES, InputSpec, IntegerNetwork, Node, Proof

FORMAT_VERSION = 1
KEY = "mdsnn.artifact"
BUILTIN = "builtin:"
"""Prefix of the artifacts that ship in the package: builtin:digits."""
_PACKED_BITS = 4


def _claims(proof: Proof, name: str) -> dict[str, Any]:
    """What the file states about a node's value; a reader recomputes it and refuses a difference."""
    claims: dict[str, Any] = {
        "kind": proof.kinds[name],
        "shape": list(proof.shapes[name]),
        "range": list(proof.ranges[name]),
        "dtype": proof.dtypes[name].name,
        "static": int(proof.static[name]),
    }
    if name in proof.product_bits:
        claims["product_bits"] = proof.product_bits[name]
    if name in proof.membranes:
        claims["membrane"] = list(proof.membranes[name])
    return claims


def _scalars(kind: type[Node]) -> list[tuple[str, type]]:
    """Fields of a node type that stand in the document, with their JSON type."""
    return [(f.name, int if f.type == "int" else str) for f in fields(kind) if f.name not in kind.ARRAYS]


def _store(node: Node, attribute: str, array: Array) -> Array:
    if attribute == "weight" and getattr(node, "bits") <= _PACKED_BITS:  # noqa: B009 - only some nodes have bits
        return pack_nibbles(array)
    return array.astype(narrowest(int(array.min()), int(array.max())) if array.dtype != np.uint8 else np.uint8)


def _tensors(node: Node) -> dict[str, Array]:
    return {f"{node.name}/{attribute}": _store(node, attribute, getattr(node, attribute)) for attribute in node.ARRAYS}


def _document(network: IntegerNetwork) -> dict[str, Any]:
    nodes = []
    for node in network.nodes:
        entry: dict[str, Any] = {"type": type(node).__name__, "claims": _claims(network.proof, node.name)}
        entry.update({name: getattr(node, name) for name, _ in _scalars(type(node))})
        if "weight" in node.ARRAYS:
            entry["weight_shape"] = list(node.weight.shape)  # type: ignore[attr-defined]
        nodes.append(entry)
    spec = network.input
    return {
        "format_version": FORMAT_VERSION,
        "grid": {"frac_bits": network.grid.frac_bits, "clip": network.grid.clip},
        "input": {
            "channels": spec.channels,
            "height": spec.height,
            "width": spec.width,
            "coding": spec.coding,
        },
        "timesteps": network.timesteps,
        "labels": list(network.labels),
        "notes": dict(network.notes),
        "nodes": nodes,
    }


def to_bytes(network: IntegerNetwork) -> bytes:
    """The artifact of `network`: the same network gives the same bytes, in every process."""
    tensors: dict[str, Array] = {}
    for node in network.nodes:
        tensors.update(_tensors(node))
    return pack(tensors, _document(network), KEY)


def digest(network: IntegerNetwork) -> str:
    """sha256 of the artifact's bytes, in hex: the network's identity, carried by activity records and reports."""
    return hashlib.sha256(to_bytes(network)).hexdigest()


@dataclass(frozen=True)
class LayerSize:
    """Bytes of one node in the artifact: codes, tables and constants apart, and the same weights as float32."""

    name: str
    type: str
    bits: int
    parameters: int
    weight_bytes: int
    table_bytes: int

    @property
    def float_bytes(self) -> int:
        """What the weights take in float32."""
        return 4 * self.parameters


def layer_sizes(network: IntegerNetwork) -> list[LayerSize]:
    """Sizes of the nodes that store anything, in order."""
    sizes = []
    for node in network.nodes:
        stored = {name.rpartition("/")[2]: tensor.nbytes for name, tensor in _tensors(node).items()}
        if stored:
            weights = stored.pop("weight", 0)
            count = int(node.weight.size) if weights else 0  # type: ignore[attr-defined]
            bits = getattr(node, "bits", 0)
            sizes.append(LayerSize(node.name, type(node).__name__, bits, count, weights, sum(stored.values())))
    return sizes


def save(network: IntegerNetwork, path: str | os.PathLike[str], *, force: bool = False) -> int:
    """Write the artifact whole or not at all; returns its size in bytes.

    force   replace a file that exists
    raises  StorageError  if it cannot be written, or exists and `force` is not set
    """
    content = to_bytes(network)
    write_bytes(path, content, force=force)
    return len(content)


# --------------------------------------------------------------------------------------------------- reading


class _Reader:
    """One reading: every fault is an ArtifactError with the file and the place in front."""

    def __init__(self, content: bytes, where: str) -> None:
        self.where = where
        self.document, self.tensors = unpack(content, KEY, where)
        packed = sum(tensor.nbytes for tensor in self.tensors.values() if tensor.dtype == np.uint8)
        self.copied = 2 * packed > len(content)  # views of a file whose weights are unpacked would keep all of it

    def fail(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.where}: {what}")

    def table(self, value: dict[str, Any], keys: dict[str, type], place: str) -> dict[str, Any]:
        """`value` if it has exactly `keys`, each of exactly its type."""
        for key in value:
            if key not in keys:
                raise self.fail(f"{place}: unknown key {key!r:.60}")
        for key, kind in keys.items():
            if key not in value:
                raise self.fail(f"{place}: key {key!r} is missing")
            if type(value[key]) is not kind:
                raise self.fail(f"{place}: {key} must be {kind.__name__}, got {type(value[key]).__name__}")
        return value

    def read(self) -> IntegerNetwork:
        version = self.document.get("format_version")
        if type(version) is not int or version < 1:
            raise self.fail("document: no format_version. Not an artifact?")
        if version > FORMAT_VERSION:
            raise self.fail(
                f"document: format version {version} is newer than {FORMAT_VERSION}, the newest this mdsnn reads."
                " Upgrade mdsnn"
            )
        keys = {"format_version": int, "grid": dict, "input": dict, "timesteps": int}
        document = self.table(self.document, {**keys, "labels": list, "notes": dict, "nodes": list}, "document")
        grid = self.table(document["grid"], {"frac_bits": int, "clip": int}, "grid")
        spec = self.table(document["input"], {"channels": int, "height": int, "width": int, "coding": str}, "input")
        try:
            nodes = tuple(self.node(entry, place) for place, entry in enumerate(document["nodes"]))
            if self.tensors:
                raise self.fail(f"tensor {next(iter(self.tensors))!r} belongs to no node")
            network = IntegerNetwork(
                nodes,
                InputSpec(**spec),
                document["timesteps"],
                Grid(**grid),
                tuple(document["labels"]),
                document["notes"],
            )
        except (NetworkError, FormatError) as fault:
            raise self.fail(str(fault)) from None
        for node, entry in zip(network.nodes, document["nodes"], strict=True):
            claims = _claims(network.proof, node.name)
            self.table(
                entry["claims"], {key: type(claim) for key, claim in claims.items()}, f"node {node.name!r}: claims"
            )
            if canonical_json(entry["claims"]) == canonical_json(claims):  # in JSON, where True and 1.0 are not 1
                continue
            for key, claim in claims.items():
                stated = canonical_json(entry["claims"][key])
                if stated != canonical_json(claim):
                    raise self.fail(f"node {node.name!r}: it claims {key} = {stated:.60}, but its codes give {claim}")
        return network

    def node(self, entry: Any, place: int) -> Node:
        where = f"node {place}"
        if type(entry) is not dict or type(entry.get("type")) is not str or entry["type"] not in NODE_TYPES:
            raise self.fail(f"{where}: its type is none of {', '.join(NODE_TYPES)}")
        kind = NODE_TYPES[entry["type"]]
        scalars = dict(_scalars(kind))
        keys = {"type": str, "claims": dict, **scalars}
        if "weight" in kind.ARRAYS:
            keys["weight_shape"] = list
        self.table(entry, keys, where)
        arrays = {attribute: self.tensor(entry, attribute, where) for attribute in kind.ARRAYS}
        values: dict[str, Any] = {**{name: entry[name] for name in scalars}, **arrays}
        return kind(**values)

    def tensor(self, entry: dict[str, Any], attribute: str, where: str) -> Array:
        name = f"{entry['name']}/{attribute}"
        stored = self.tensors.pop(name, None)
        if stored is None:
            raise self.fail(f"{where}: tensor {name!r:.200} is missing")
        if attribute == "weight":
            shape = entry["weight_shape"]
            if len(shape) not in (2, 4) or any(type(n) is not int or not 0 < n <= MAX_FILE for n in shape):
                raise self.fail(f"{where}: weight_shape {shape!r:.60} is no shape of 2 or 4 positive integers")
            count = 1
            for axis in shape:
                count *= axis
            try:
                packed = check_bits(entry["bits"]) <= _PACKED_BITS
            except FormatError as fault:
                raise self.fail(f"{where}: {fault}") from None
            if stored.dtype != (np.uint8 if packed else np.int8) or stored.ndim != (1 if packed else len(shape)):
                raise self.fail(
                    f"{where}: tensor {name!r} is {stored.dtype} {stored.shape}, not {entry['bits']}-bit codes"
                )
            if packed:
                if (count + 1) // 2 != stored.size:
                    raise self.fail(
                        f"{where}: {tuple(shape)} of 4-bit codes do not fit {stored.size} bytes. Truncated?"
                    )
                try:
                    codes = unpack_nibbles(stored, count)
                except FormatError as fault:
                    raise self.fail(f"{where}: tensor {name!r}: {fault}") from None
                codes.setflags(write=False)
                return codes.reshape(shape)
            if list(stored.shape) != shape:
                raise self.fail(f"{where}: tensor {name!r} has shape {stored.shape}, weight_shape says {tuple(shape)}")
            return self.kept(stored)
        if stored.size == 0 or stored.dtype.kind not in "iu":
            raise self.fail(f"{where}: tensor {name!r} is {stored.dtype} {stored.shape}, not a table of integers")
        unsigned = NODE_TYPES[entry["type"]].ARRAYS[attribute] is np.uint8
        due = np.dtype(np.uint8) if unsigned else narrowest(int(stored.min()), int(stored.max()))
        if stored.dtype != due:
            raise self.fail(f"{where}: tensor {name!r} is stored as {stored.dtype}; its values need {due}")
        return self.kept(stored)

    def kept(self, stored: Array) -> Array:
        """`stored`, which is a view of the file, or a copy if the file is not to be kept for it."""
        if self.copied:
            stored = stored.copy()
            stored.setflags(write=False)
        return stored


def from_bytes(content: bytes, where: str = "artifact") -> IntegerNetwork:
    """Read an artifact from memory; `where` is its name in messages. Raises ArtifactError as `load` does."""
    return _Reader(content, where).read()


def load(path: str | os.PathLike[str]) -> IntegerNetwork:
    """Read and prove an artifact.

    path    a file, or "builtin:digits" for the one that ships in the package
    raises  ArtifactError  if the file is not exactly what an exporter of this format writes
            InputError     if there is no such file
    """
    text = os.fspath(path)
    if text.startswith(BUILTIN):
        return from_bytes(builtin(text.removeprefix(BUILTIN), ".mdsnn"), text)
    return from_bytes(read_bounded(path, MAX_FILE, what="artifact (.mdsnn)"), text)


def builtins(suffix: str) -> list[str]:
    """What ships in the package with files of this ending: "builtin:digits"."""
    folder = resources.files("mdsnn").joinpath("assets")
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return [BUILTIN + name.removesuffix(suffix) for name in there if name.endswith(suffix)]


def builtin(name: str, suffix: str) -> bytes:
    """Bytes of a file that ships in the package; raises InputError listing what there is."""
    there = builtins(suffix)
    if BUILTIN + name not in there:
        raise InputError(f"{BUILTIN}{name}: no such built-in; there is {', '.join(there) or 'none'}")
    return resources.files("mdsnn").joinpath("assets", name + suffix).read_bytes()


__all__ = [
    "BUILTIN",
    "FORMAT_VERSION",
    "LayerSize",
    "builtin",
    "builtins",
    "digest",
    "from_bytes",
    "layer_sizes",
    "load",
    "save",
    "to_bytes",
]

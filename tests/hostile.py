"""Hostile artifacts: mutants of good ones, raw or signed again, and what a reader must do with each.

A reader either refuses a file by one `ArtifactError` or reads a network that writes the very same bytes again; nothing
else may happen. Raw mutants test the container. A digest hides everything behind it from them, so signed mutants change
the document or the tensors and are packed anew, with or without claims that fit the change.

The tests run a few thousand. For volume: python tests/hostile.py --raw 100000 --signed 50000 [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from mdsnn.export import artifact
from mdsnn.kernels.container import canonical_json, pack, unpack
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import ArtifactError, MdsnnError
from mdsnn.kernels.formats import Grid
from mdsnn.kernels.network import InputSpec, IntegerNetwork
from planted import SeededChoices, draw_pixels, seeded_case

Document = dict[str, Any]
Tensors = dict[str, np.ndarray]
Path = tuple[Any, ...]

ODD_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 127, 128, 255, 4096, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64, 10**40),
    *(True, False, None, 0.0, 1.0, -0.0, 0.5, 1e300),
    *("", "x", "hard", "soft", "pre_fire", "image", "events", "Lif", "Conv", "input", "logits"),
    *("\ud800", "\x00", "a/b", "x" * 300),
    *([], [1], [1, 1, 1], [[]], {}, {"x": 1}),
)
"""What a leaf of a document is replaced by."""

ODD_INTEGERS = (
    0,
    1,
    -1,
    7,
    8,
    -7,
    -8,
    127,
    -128,
    128,
    255,
    256,
    2**15,
    2**24,
    2**30,
    2**31 - 1,
    -(2**31),
    2**62,
    -(2**63),
)
"""What an element of a tensor is replaced by, clipped to its dtype."""


def take_apart(content: bytes) -> tuple[Document, Tensors]:
    """Document and tensors of a good artifact, free to change."""
    document, tensors = unpack(content, artifact.KEY, "good")
    return document, {name: tensor.copy() for name, tensor in tensors.items()}


def sign(document: Any, tensors: Tensors, key: str = artifact.KEY) -> bytes:
    """Pack with a digest that fits."""
    return pack(tensors, document, key)


def forge(header: str, data: bytes = b"") -> bytes:
    """A file of this header text, padded as it must be, and these bytes behind it."""
    text = header.encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def signed_header(entries: dict[str, Any], document: Any, key: str, data: bytes = b"") -> bytes:
    """A file whose digest fits its header, however odd the header's entries are."""

    def header(digest: str) -> str:
        return canonical_json({**entries, "__metadata__": {key: canonical_json({**document, "sha256": digest})}})

    def padded(text: str) -> bytes:
        return (text + " " * (-len(text) % 8)).encode("ascii")

    return forge(header(hashlib.sha256(padded(header("")) + data).hexdigest()), data)


def signed_text(text: str, data: bytes) -> bytes:
    """A file of a header in any spelling, with the digest in it made to fit the text as it is written."""
    blank = re.sub(r'(\\"sha256\\":\\")[0-9a-f]*(\\")', r"\1\2", text)
    padded = blank.rstrip(" ").encode("ascii")
    padded += b" " * (-len(padded) % 8)
    digest = hashlib.sha256(padded + data).hexdigest()
    return forge(re.sub(r'(\\"sha256\\":\\")(\\")', rf"\g<1>{digest}\g<2>", blank), data)


# ------------------------------------------------------------------------------------------------------ mutants


def leaves(value: Any, path: Path = ()) -> list[Path]:
    """Paths of all leaves of a JSON value, and of its empty lists and objects."""
    if isinstance(value, dict) and value:
        return [found for key, child in value.items() for found in leaves(child, (*path, key))]
    if isinstance(value, list) and value:
        return [found for index, child in enumerate(value) for found in leaves(child, (*path, index))]
    return [path]


def branches(value: Any, path: Path = ()) -> list[Path]:
    """Paths of all lists and objects."""
    if not isinstance(value, dict | list):
        return []
    children = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(found for key, child in children for found in branches(child, (*path, key)))]


def at(value: Any, path: Path) -> Any:
    """The part of a JSON value under a path."""
    for step in path:
        value = value[step]
    return value


def put(value: Any, path: Path, new: Any) -> Any:
    """A copy of a JSON value with the part under `path` replaced, or a key added."""
    if not path:
        return new
    result = dict(value) if isinstance(value, dict) else list(value)
    result[path[0]] = put(value[path[0]], path[1:], new) if path[1:] else new
    return result


def clone(value: Any) -> Any:
    """A copy of a JSON value, lists and objects and all."""
    return json.loads(json.dumps(value))


class Mutator:
    """Draws mutants from a NumPy generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def raw(self, content: bytes) -> bytes:
        """One to three changes of bytes: flips, overwrites, cuts, repeats, another header length."""
        changed = bytearray(content)
        for _ in range(int(self.rng.integers(1, 4))):
            place = int(self.rng.integers(len(changed))) if changed else 0
            length = int(self.rng.integers(1, 17))
            match self.pick(
                ["flip", "flip", "byte", "cut", "insert", "repeat", "truncate", "extend", "length", "swap"]
            ):
                case "flip" if changed:
                    changed[place] ^= 1 << int(self.rng.integers(8))
                case "byte" if changed:
                    changed[place] = self.pick([0, 0x20, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0x7D, 0x7F, 0x80, 0xFF])
                case "cut":
                    del changed[place : place + length]
                case "insert":
                    changed[place:place] = self.rng.bytes(length)
                case "repeat":
                    changed[place:place] = changed[place : place + length]
                case "truncate":
                    del changed[place:]
                case "extend":
                    changed += self.pick([b"\0", b" ", self.rng.bytes(length)])
                case "length":
                    changed[:8] = int(
                        self.pick([0, 1, 2, 8, len(changed), 2**20, 2**20 + 8, 2**63, 2**64 - 1])
                    ).to_bytes(8, "little")
                case "swap" if changed:
                    other = int(self.rng.integers(len(changed)))
                    changed[place], changed[other] = changed[other], changed[place]
        return bytes(changed)

    def document(self, document: Document) -> Document:
        """One change of the document: a value, a key, an element, a node."""
        rng, changed = self.rng, clone(document)
        match self.pick(
            ["value", "value", "near", "near", "delete", "add", "rename", "swap", "repeat", "graft", "node"]
        ):
            case "value":
                return put(changed, self.pick(leaves(changed)), clone(self.pick(ODD_VALUES)))  # type: ignore[no-any-return]
            case "near":
                numbers = [path for path in leaves(changed) if type(at(changed, path)) is int]
                if numbers:
                    path = self.pick(numbers)
                    return put(changed, path, at(changed, path) + int(self.pick([-1, 1, -2, 2, 64])))  # type: ignore[no-any-return]
            case "node":
                order = rng.permutation(len(changed["nodes"])) if rng.random() < 0.3 else None
                if order is not None:
                    changed["nodes"] = [changed["nodes"][i] for i in order]
                else:
                    one, other = self.pick(changed["nodes"]), self.pick(changed["nodes"])
                    key = self.pick([k for k in one if k != "claims"])
                    if key in other:
                        one[key] = clone(other[key])
            case what:
                parent = at(changed, self.pick(branches(changed)))
                keys: list[Any] = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
                key = self.pick(keys) if keys else None
                match what:
                    case "delete" if keys:
                        del parent[key]
                    case "add" if isinstance(parent, dict):
                        parent[self.pick(["x", "", "static", "bits", "weight", "__class__"])] = clone(
                            self.pick(ODD_VALUES)
                        )
                    case "add":
                        parent.append(clone(self.pick(ODD_VALUES)))
                    case "rename" if keys and isinstance(parent, dict):
                        parent[str(key) + "_"] = parent.pop(key)
                    case "swap" if keys:
                        other = self.pick(keys)
                        parent[key], parent[other] = parent[other], parent[key]
                    case "repeat" if keys and isinstance(parent, list):
                        parent.insert(int(rng.integers(len(parent) + 1)), clone(parent[key]))
                    case "graft" if keys:
                        parent[key] = clone(at(document, self.pick(branches(document))))
        return changed

    def tensors(self, tensors: Tensors) -> Tensors:
        """One change of the tensors: elements, dtype, shape, size, name."""
        changed, name = dict(tensors), str(self.pick(sorted(tensors)))
        array = changed[name]
        match self.pick(
            [
                "element",
                "element",
                "element",
                "shift",
                "dtype",
                "shape",
                "short",
                "long",
                "delete",
                "rename",
                "swap",
                "sort",
            ]
        ):
            case "element" if array.size:
                info = np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.iinfo(np.int8)
                array = array.copy()
                for _ in range(int(self.rng.integers(1, 4))):
                    value = min(max(self.pick(ODD_INTEGERS), int(info.min)), int(info.max))
                    array.reshape(-1)[int(self.rng.integers(array.size))] = value
                changed[name] = array
            case "shift":
                changed[name] = np.roll(array, 1)
            case "sort":
                changed[name] = np.sort(array.reshape(-1))[:: self.pick([1, -1])].reshape(array.shape)
            case "dtype":
                with np.errstate(invalid="ignore"):
                    changed[name] = array.astype(self.pick(["i1", "u1", "i2", "i4", "i8", "f4", "f8"]))
                if changed[name].dtype.kind == "f" and changed[name].size and self.rng.random() < 0.5:
                    changed[name].reshape(-1)[0] = self.pick([np.nan, np.inf, 0.5])
            case "shape":
                changed[name] = array.reshape(
                    self.pick([(-1,), (1, -1), (-1, 1), array.shape[::-1], (1, *array.shape)])
                )
            case "short":
                changed[name] = array.reshape(-1)[: int(self.rng.integers(array.size + 1))]
            case "long":
                changed[name] = np.concatenate([array, array])
            case "delete":
                del changed[name]
            case "rename":
                changed[self.pick([name + "x", "x", "", name.replace("/", "")])] = changed.pop(name)
            case "swap":
                other = self.pick(sorted(tensors))
                changed[name], changed[other] = changed[other], changed[name]
        return changed

    def signed(self, content: bytes) -> bytes:
        """One to three changes behind a digest that fits; half of them with claims that fit as well."""
        document, tensors = take_apart(content)
        for _ in range(int(self.rng.integers(1, 4))):
            if self.rng.random() < 0.5 or not tensors:
                document = self.document(document)
            else:
                tensors = self.tensors(tensors)
            if not isinstance(document, dict) or not isinstance(document.get("nodes"), list) or not document["nodes"]:
                break
            if not all(isinstance(node, dict) and node for node in document["nodes"]):
                break
        if not isinstance(document, dict):
            document = {"document": document}
        if self.rng.random() < 0.5:
            document = with_true_claims(document, tensors)
        return sign(document, tensors)


def with_true_claims(document: Document, tensors: Tensors) -> Document:
    """The document with its claims replaced by what its codes prove, if they prove anything."""
    try:
        reader = artifact._Reader(sign(document, tensors), "mutant")
        nodes = tuple(reader.node(entry, place) for place, entry in enumerate(document["nodes"]))
        head = document["timesteps"], Grid(**document["grid"]), tuple(document["labels"]), document["notes"]
        network = IntegerNetwork(nodes, InputSpec(**document["input"]), *head)
    except (MdsnnError, TypeError, KeyError, AttributeError, ValueError):
        return document
    repaired = clone(document)
    for entry in repaired["nodes"]:
        entry["claims"] = artifact._claims(network.proof, entry["name"])
    return repaired


# ------------------------------------------------------------------------------------------------------ verdicts


def judge(content: bytes, *, run: bool = True) -> IntegerNetwork | str:
    """The network, or the message of the ArtifactError. Anything else the reader does is an error here as well."""
    try:
        network = artifact.from_bytes(content, "mutant")
    except ArtifactError as fault:
        message = str(fault)
        message.encode("utf-8")  # printable: no lone surrogate
        if not message.startswith("mutant: ") or "\n" in message or len(message) > 600:
            raise AssertionError(f"no one-line message that names the file: {message!r:.1000}") from fault
        return message
    again = artifact.to_bytes(network)
    if again != content:
        raise AssertionError(f"read, but written differently: {len(content)} bytes, then {len(again)}")
    work = sum(math.prod(shape) for shape in network.proof.shapes.values()) * network.timesteps
    if run and work < 1 << 16:
        Engine(network, "reference", 1).run(draw_pixels(network, 1, SeededChoices(0)), trace=True)
    return network


def small_artifacts(limit: int, count: int) -> list[bytes]:
    """Artifacts of planted networks of at most `limit` bytes each."""
    found: list[bytes] = []
    seed = 0
    while len(found) < count:
        content = artifact.to_bytes(seeded_case(seed, max_channels=8)[0])
        if len(content) <= limit:
            found.append(content)
        seed += 1
    return found


def hunt(kind: str, count: int, seed: int, sources: list[bytes]) -> Counter[str]:
    """Judge `count` mutants of one kind, "raw" or "signed"; how many were refused, read, or came out unchanged."""
    mutator, outcomes = Mutator(np.random.default_rng(seed)), Counter[str]()
    for number in range(count):
        source = sources[number % len(sources)]
        content = mutator.raw(source) if kind == "raw" else mutator.signed(source)
        try:
            verdict = judge(content)
        except Exception as fault:
            raise AssertionError(f"{kind} mutant {number} of seed {seed}: {type(fault).__name__}: {fault}") from fault
        if content == source:
            outcomes["unchanged"] += 1
        else:
            outcomes["refused" if isinstance(verdict, str) else "read"] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge many mutants of artifacts; exit 1 at the first misbehaviour.")
    parser.add_argument("--raw", type=int, default=10_000)
    parser.add_argument("--signed", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources = small_artifacts(16_000, 40)
    for kind, count in (("raw", options.raw), ("signed", options.signed)):
        start = time.perf_counter()
        outcomes = hunt(kind, count, options.seed, sources)
        print(f"{kind}: {dict(outcomes)} in {time.perf_counter() - start:.1f} s")
        if kind == "raw" and outcomes["read"]:
            print("a raw mutant was read", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

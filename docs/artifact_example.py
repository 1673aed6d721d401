"""Writes the example of docs/artifact.md: a tiny network, its document, and its bytes with what they mean.

Usage: python docs/artifact_example.py          prints the example
       python docs/artifact_example.py --write  puts it into docs/artifact.md, between its two marks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mdsnn.export import artifact
from mdsnn.kernels.container import unpack
from mdsnn.kernels.files import write_text
from mdsnn.kernels.formats import (
    Grid,
    affine_constants,
    decode_table,
    image_table,
    requantize_thresholds,
    threshold_code,
)
from mdsnn.kernels.network import BnAffine, Conv, InputSpec, InputTable, IntegerNetwork, Lif, Readout

PAGE = Path(__file__).with_name("artifact.md")
BEGIN, END = "<!-- begin example -->\n", "<!-- end example -->\n"
_ROW = 16


def example() -> IntegerNetwork:
    """One grey pixel through a 1x1 convolution of 3 channels, a LIF of 2 bits, and a readout of 2 classes."""
    grid = Grid()
    weight = np.array([7, -3, 0], np.int8).reshape(3, 1, 1, 1)
    acc = weight.reshape(3).astype(np.int64)
    low, high = np.minimum(acc * 127, acc * -128), np.maximum(acc * 127, acc * -128)
    bn = affine_constants([0.002, 0.002, 0.002], [0.1, 0.5, -0.1], low, high, grid)
    return IntegerNetwork(
        (
            InputTable("input", image_table([0.5], [0.25])),
            Conv("conv", "input", weight, 4),
            BnAffine("bn", "conv", bn.multiplier, bn.offset, bn.shift),
            Lif(
                "lif",
                "bn",
                2,
                decode_table(0.8, 0.5, 2, grid),
                requantize_thresholds(0.8, 2, grid),
                threshold_code(0.5, grid),
            ),
            Readout("fc", "lif", np.array([[1, -2, 3], [0, 7, -7]]), 4, np.array([10, -10])),
        ),
        InputSpec(1, 1, 1),
        timesteps=2,
        grid=grid,
        labels=("dark", "light"),
        notes={"made by": "docs/artifact_example.py"},
    )


def _rows(data: bytes) -> list[str]:
    rows = [data[at : at + _ROW].hex(" ") for at in range(0, len(data), _ROW)]
    return rows if len(rows) <= 2 else [rows[0], f"... {len(data) - 2 * _ROW} bytes more ...", rows[-1]]


def render() -> str:
    """The example as Markdown."""
    content = artifact.to_bytes(example())
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode("ascii")
    text = header.rstrip(" ")
    entries = json.loads(text)
    metadata = entries.pop("__metadata__")
    document, tensors = unpack(content, artifact.KEY, "example")
    lines: list[tuple[int, str, str]] = [(0, content[:8].hex(" "), f"length of the header: {length}")]
    padding = f", then {len(header) - len(text)} spaces" if len(header) > len(text) else ""
    lines.append((8, content[8:24].hex(" "), f"{len(text)} characters of JSON, from {text[:16]!r} on{padding}"))
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        values = tensors[name].reshape(-1).tolist()
        shown = f" = {values}" if len(values) <= 6 else ""
        for number, row in enumerate(_rows(content[begin:end])):
            what = f"{name}: {entry['dtype']} {entry['shape']}{shown}" if number == 0 else ""
            lines.append((begin if number == 0 else -1, row, what))
    dump = [f"{offset if offset >= 0 else '':<6}  {data:<48} {what}".rstrip() for offset, data, what in lines]
    sha = json.loads(metadata[artifact.KEY])["sha256"]
    return "\n".join(
        [
            f"`docs/artifact_example.py` writes this example, an artifact of {len(content)} bytes.",
            "Offsets are decimal, bytes hexadecimal.",
            "",
            "```text",
            *dump,
            "```",
            "",
            f"Its digest is `{sha}`,",
            f"the sha256 of the whole file `{artifact.digest(example())}`.",
            "The document, with line breaks and spaces that the file does not have, and without `sha256`:",
            "",
            "```json",
            _pretty(document),
            "```",
            "",
        ]
    )


def _pretty(document: dict[str, object]) -> str:
    """The document with one line a node."""
    rest = {key: value for key, value in document.items() if key != "nodes"}
    nodes = ",\n".join("  " + json.dumps(node, sort_keys=True) for node in document["nodes"])  # type: ignore[attr-defined]
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(rest.items()))
    return "{" + head + ',\n"nodes": [\n' + nodes + "\n]}"


def page(text: str) -> str:
    """The page with its example replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write_text(PAGE, page(PAGE.read_text("utf-8")), force=True)
    else:
        print(render())

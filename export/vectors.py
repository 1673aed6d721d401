"""Test vectors: what a hardware team needs to check a design against the integers of a network.

One folder: every weight and table, and for a few samples each layer's input at each step, each LIF's h, s and q, and
the logits; as .npy and as hex text (one two's-complement word a line, C order, `$readmemh` reads it), with a manifest
of names, shapes, dtypes, word widths and sha256 sums. The manifest is written last: a folder without one is incomplete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.engine import check_pixels, node_values
from mdsnn.kernels.errors import StorageError
from mdsnn.kernels.files import make_folder, write_bytes, write_text
from mdsnn.kernels.formats import Array
from mdsnn.kernels.network import Conv, IntegerNetwork, Lif, Linear, Readout

from .artifact import digest

MANIFEST = "manifest.json"


def hex_words(array: Array) -> str:
    """An integer array as hex text: one word a line, C order, two's complement at the dtype's width."""
    unsigned = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(-1)
    digits = 2 * array.dtype.itemsize
    return "".join(f"{int(word):0{digits}x}\n" for word in unsigned)


def write_vectors(
    network: IntegerNetwork,
    pixels: npt.ArrayLike,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the vectors of a few samples; returns how many arrays.

    pixels   uint8 [N, C, H, W] or [T, N, C, H, W]: all of them are recorded, so pass a few
    folder   created if missing; one that holds anything is refused unless `force`
    raises   InputError, StorageError
    """
    array = check_pixels(network, pixels)
    target = make_folder(folder)
    if any(target.iterdir()) and not force:
        raise StorageError(f"{target}: holds files and is kept; name an empty folder, or pass --force (force=True)")
    (target / MANIFEST).unlink(missing_ok=True)
    trace, values = node_values(network, array)
    arrays: dict[str, tuple[Array, str, str]] = {"pixels": (array, "input", "pixels")}
    for node in network.nodes:
        for field in node.ARRAYS:
            arrays[f"constants/{node.name}.{field}"] = (getattr(node, field), "constant", field)
        if isinstance(node, Conv | Linear | Readout):
            dtype = network.proof.dtypes[node.source]
            arrays[f"samples/{node.name}.input"] = (values[node.source].astype(dtype), "per step", "input")
        if isinstance(node, Lif):
            for field in "hsq":
                arrays[f"samples/{node.name}.{field}"] = (getattr(trace.lifs[node.name], field), "per step", field)
    arrays["samples/logits"] = (trace.logits, "output", "logits")
    entries: list[dict[str, Any]] = []
    for name in ("constants", "samples"):
        make_folder(target / name)
    for done, (name, (tensor, role, field)) in enumerate(arrays.items()):
        entries.append(_write(target, name, tensor, role, field))
        if progress is not None:
            progress(done + 1, len(arrays))
    manifest = {
        "schema": "mdsnn.vectors/1",
        "artifact_sha256": digest(network),
        "timesteps": network.timesteps,
        "samples": int(array.shape[array.ndim - 4]),
        "axes": "per-step arrays are [T, N, C, H, W]; logits [N, classes]; hex words in C order, two's complement",
        "scalars": _scalars(network),
        "arrays": entries,
    }
    write_text(target / MANIFEST, json.dumps(manifest, indent=1) + "\n", force=True)
    return len(entries)


def _write(target: Path, name: str, tensor: Array, role: str, field: str) -> dict[str, Any]:
    stream = io.BytesIO()
    np.save(stream, tensor, allow_pickle=False)
    text = hex_words(tensor)
    write_bytes(target / f"{name}.npy", stream.getvalue(), force=True)
    write_text(target / f"{name}.hex", text, force=True)
    return {
        "name": name,
        "role": role,
        "field": field,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype.name,
        "word_bits": 8 * tensor.dtype.itemsize,
        "npy_sha256": hashlib.sha256(stream.getvalue()).hexdigest(),
        "hex_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _scalars(network: IntegerNetwork) -> list[dict[str, Any]]:
    """The nodes with what stands in no array: strides, thresholds, shifts, sources."""
    return [
        {"type": type(node).__name__, **{k: v for k, v in vars(node).items() if k not in node.ARRAYS}}
        for node in network.nodes
    ]

"""Checkpoints of other PyTorch programs (.pth): read without running them, and brought to the names of our networks.

`load` reads the tensors in a process of its own. `fit` finds for each the tensor of a full-precision network that it
is, by its name: what a table of the user's says first, then names that are ours already, then what most programs call
the parts of these networks.

    theirs, for example                                        ours
    conv1, bn1; conv1.0, conv1.1; stem.conv, stem.bn           stem, stem_bn
    layer1.0.conv1, conv2_x.0.residual_function.1              groups.0.0.conv1
    layer1.0.shortcut.0, layer1.0.downsample.1                 groups.0.0.shortcut.1, groups.0.0.shortcut.2
    fc, linear, classifier                                     readout
    features.0, features.1, features.3, ... (a VGG)            its convolutions, BN layers and linear layers, in turn

So a group is a number, a block another one behind it. Within a block and outside of all, the n-th convolution, BN or
linear layer is our n-th, if their names differ in numbers only (2 comes before 10); a block's part called shortcut,
downsample or the like is its shortcut. Parts that wrap one layer (module, layer, bn) are seen through. Whatever finds
no place, or leaves one empty, is an error that names it: nothing is matched by its shape.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdsnn.kernels.container import MAX_FILE, pack, unpack
from mdsnn.kernels.errors import CheckpointError, FormatError, InputError
from mdsnn.kernels.files import read_bounded

from .checkpoint import Array, apply, as_numpy

if TYPE_CHECKING:
    import torch

SUFFIXES = (".pth", ".pt", ".tar")
"""Of such files' names."""
_KEY = "mdsnn.foreign"
_MAX_TABLE = 1 << 20
_IGNORED = "num_batches_tracked"
"""A counter of PyTorch's BN that nothing here reads."""
_WRAPPERS = frozenset({"module", "layer", "bn", "conv", "norm"})
_SHORTCUTS = frozenset({"shortcut", "downsample", "identity", "skip"})
_BLOCK = re.compile(r"(?P<group>(?:.*?\D)?\d+)(?:_x)?\.(?P<block>\d+)\.(?P<rest>.+)")
_LEAVES = frozenset({"weight", "bias", "running_mean", "running_var"})

# ------------------------------------------------------------------------------------------------------ the names


def fit(
    model: torch.nn.Module, tensors: Mapping[str, Array], where: str, names: Mapping[str, str | None] | None = None
) -> None:
    """Copy foreign tensors into a full-precision model of ours; every parameter must get one, and none be left over.

    names   of the user's: "theirs" -> "ours", whole names or what they begin with, up to a dot; None leaves one out
    A convolution's bias goes into the mean of the BN layer behind it. A classifier without a bias gets 0; scales of
    membranes stay as they are, a full-precision network uses none.
    raises  CheckpointError  naming what finds no place, twice the same, or does not fit; the model is then unchanged
    """
    state = model.state_dict()
    placed: dict[str, Array] = {}
    named = _by_table(tensors, names or {}, where)
    named = {name: x for name, x in named.items() if not name.endswith(_IGNORED)}
    for name, ours in _conventional(state, named).items():
        if ours in placed:
            raise CheckpointError(f"{where}: {name} is a second tensor for {ours}. {_REMEDY}")
        placed[ours] = named[name]
    _fold_biases(state, placed)
    for name, value in state.items():
        if name.rpartition(".")[2] not in _LEAVES:
            placed.setdefault(name, as_numpy(value))
        elif name == "readout.bias":
            placed.setdefault(name, np.zeros_like(as_numpy(value)))
    try:
        apply(model, placed, where)
    except CheckpointError as fault:
        raise CheckpointError(f"{fault}. {_REMEDY}") from fault


_REMEDY = "Check depth or blocks and widths, or say what is called how by a table of names (--teacher-names)"


def read_names(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """A table for `fit`: a JSON object of texts, or null for what is left out; raises InputError for anything else."""
    content = read_bounded(path, _MAX_TABLE, what="table of names (JSON)")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as fault:
        raise InputError(f"{path}: no JSON: {fault!s:.120}") from fault
    if not isinstance(found, dict) or not all(x is None or isinstance(x, str) for x in found.values()):
        raise InputError(f'{path}: a table of names is a JSON object such as {{"backbone.conv1": "stem", "aux": null}}')
    return found


def _by_table(tensors: Mapping[str, Array], names: Mapping[str, str | None], where: str) -> dict[str, Array]:
    """`tensors` under what a user calls them; the longest beginning that the table knows decides."""
    out: dict[str, Array] = {}
    used: set[str] = set()
    for name, value in tensors.items():
        parts = name.split(".")
        begins = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        key = next((begin for begin in begins if begin in names), None)
        ours: str | None = name
        if key is not None:
            used.add(key)
            ours = names[key]
        if ours is None:
            continue
        new = ours if key is None else ours + name[len(key) :]
        if new in out:
            raise CheckpointError(f"{where}: the table of names has two tensors for {new}")
        out[new] = value
    if unused := sorted(names.keys() - used):
        raise CheckpointError(f"{where}: the table of names has {unused[0]!r}, but no tensor is called so")
    return out


def _conventional(state: Mapping[str, torch.Tensor], tensors: Mapping[str, Array]) -> dict[str, str]:
    """The name in `state` of every tensor; its own where none is found."""
    ours, theirs = _layers(state), _layers({name: x for name, x in tensors.items() if name not in state})
    taken = {name.rpartition(".")[0] for name in tensors if name in state}
    found = _places(_numbered(theirs), _natural)
    flat = all(group < 0 for group, *_ in found)
    order = list(ours).index
    free = {path: kind for path, kind in ours.items() if path not in taken}
    places = _places(free, order, flat=flat)
    module = {path: places[place] for place, path in found.items() if place in places}
    out = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        out[name] = f"{module[path]}.{leaf}" if path in module and name not in state else name
    return out


def _numbered(layers: Mapping[str, str]) -> dict[str, str]:
    """The layers whose order their names tell: beside no other of their kind that is called otherwise."""
    found = _places(layers, _natural)
    called: dict[tuple[int, int, str], set[str]] = {}
    for (group, block, kind, _), path in found.items():
        called.setdefault((group, block, kind), set()).add(re.sub(r"\d+", "0", _unwrapped(path)))
    return {path: layers[path] for place, path in found.items() if len(called[place[:3]]) == 1}


def _layers(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Kind ("conv", "linear", "bn") of every layer that holds a weight of it, by its path."""
    kinds = {1: "bn", 2: "linear", 4: "conv"}
    weights = {name.removesuffix(".weight"): x for name, x in tensors.items() if name.endswith(".weight")}
    return {path: kinds[x.ndim] for path, x in weights.items() if x.ndim in kinds}


def _places(
    layers: Mapping[str, str], order: Callable[[str], Any], *, flat: bool = False
) -> dict[tuple[int, int, str, int], str]:
    """(group, block, kind, which) of every layer; group and block are -1 outside of blocks, and for all if `flat`.

    order   what to sort the paths by that are of one kind and in one place: `which` counts them
    """
    parts: dict[tuple[str, int, str], list[str]] = {}
    for path, kind in layers.items():
        block = None if flat else _BLOCK.fullmatch(_unwrapped(path))
        if block is None:
            key = ("", -1, kind)
        else:
            beside = "shortcut's " if block["rest"].split(".")[0] in _SHORTCUTS else ""
            key = (block["group"], int(block["block"]), beside + kind)
        parts.setdefault(key, []).append(path)
    groups = sorted({group for group, _, _ in parts if group}, key=_natural)
    number = {"": -1} | {group: n for n, group in enumerate(groups)}
    return {
        (number[group], block, kind, which): path
        for (group, block, kind), paths in parts.items()
        for which, path in enumerate(sorted(paths, key=order))
    }


def _unwrapped(path: str) -> str:
    """Without the parts of a name that wrap one layer: module and layer anywhere, bn, conv or norm behind another."""
    parts = [part for part in path.lower().split(".") if part not in ("module", "layer")] or [path]
    if len(parts) > 1 and parts[-1] in _WRAPPERS and (parts[-2].isdigit() or parts[-1] in parts[-2]):
        parts.pop()
    return ".".join(parts)


def _natural(text: str) -> list[Any]:
    """A key to sort by in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _fold_biases(state: Mapping[str, torch.Tensor], placed: dict[str, Array]) -> None:
    """Take biases that our layers do not have into the mean of the BN layer that follows: BN(x + b) has mean m - b."""
    for layer, following in pairwise(_layers(state)):
        bias, mean = f"{layer}.bias", f"{following}.running_mean"
        if bias in placed and bias not in state and mean in placed and placed[bias].shape == placed[mean].shape:
            placed[mean] = placed[mean] - placed.pop(bias)


# ------------------------------------------------------------------------------------------------------- the file


def load(path: str | os.PathLike[str], *, timeout_s: float = 120.0, megabytes: int = 1024) -> dict[str, Array]:
    """Read the tensors of another program's PyTorch checkpoint (.pth, .pt), in a process of its own.

    The process calls `torch.load(weights_only=True)` with no fallback, bounded by `timeout_s` and, where the system
    can, by `megabytes` + four times the file in memory. The state dictionary is the file itself, or its entry
    `state_dict`, `model_state_dict`, `model` or `net`; a prefix `module.` that all names share is dropped. Half
    precision widens to float32.

    returns  name -> array, under the names of the file; `fit` gives them those of a model
    raises   InputError       if the file is missing, empty or too large
             CheckpointError  if it cannot be read under these terms: wants to run code, is damaged, has no tensors
    """
    file = Path(path)
    try:
        size = file.stat().st_size
    except OSError as fault:
        raise InputError(f"{path}: no such file, or not readable; a PyTorch checkpoint was expected") from fault
    if not file.is_file() or not 0 < size <= MAX_FILE:
        raise InputError(f"{path}: not a regular file of 1..{MAX_FILE} bytes; a PyTorch checkpoint was expected")
    limit = (megabytes << 20) + 4 * size
    command = [sys.executable, "-P", "-c", "from mdsnn.foreign import _child; _child()"]
    try:
        done = subprocess.run(
            [*command, str(file.resolve()), str(limit)], capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as fault:
        raise CheckpointError(f"{path}: was not read within {timeout_s:g} s and was given up") from fault
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = said[-1][:300] if said else f"the reading process ended with {done.returncode}"
        raise CheckpointError(f"{path}: not a PyTorch checkpoint of plain tensors: {why}")
    return unpack(done.stdout, _KEY, str(path), error=CheckpointError)[1]


def _child() -> None:
    """The child of `load`: arguments path and memory limit; a container on stdout, or one line on stderr."""
    import torch

    path, limit = sys.argv[1], int(sys.argv[2])
    try:
        _limit_memory(limit)
        tensors = _tensors(torch.load(path, map_location="cpu", weights_only=True))
        sys.stdout.buffer.write(pack(tensors, {}, _KEY))
        sys.stdout.buffer.flush()
    except Exception as fault:  # the process ends here; the parent turns the line into a CheckpointError
        text = str(fault).strip().splitlines() or [""]
        sys.stderr.write(f"{type(fault).__name__}: {text[0][:250]}\n")
        raise SystemExit(1) from None


def _limit_memory(limit: int) -> None:
    """Cap this process's address space at what it has already plus `limit` bytes; nothing where that is not known."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
    except (ImportError, OSError, ValueError):
        return


def _tensors(content: Any) -> dict[str, Array]:
    import torch

    state = content
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise FormatError("no state dictionary in it")
    wrapped = all(str(name).startswith("module.") for name in state)
    tensors: dict[str, Array] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise FormatError(
                f"entry {str(name)!r} is no plain tensor; entries are {', '.join(map(str, list(state)[:6]))}"
            )
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        elif value.dtype == torch.bool:
            value = value.to(torch.uint8)
        tensors[str(name)[len("module.") :] if wrapped else str(name)] = as_numpy(value)
    return tensors

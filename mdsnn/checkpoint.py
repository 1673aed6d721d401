"""Checkpoints: the tensors of a model and its optimizer, random states and one JSON document; no pickle.

The file is the strict container of `mdsnn.kernels.container`. Tensors are named `model/<name>`,
`optimizer/<parameter>/<slot>` and `generator/<name>`; the document holds the model's configuration (what
`mdsnn.models.build` takes), the epoch, the resolved recipe and the history. A PyTorch checkpoint of another program
(.pth) is read by `mdsnn.foreign`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.container import MAX_FILE, MAX_HEADER, canonical_json, pack, unpack
from mdsnn.kernels.errors import ArtifactError, CheckpointError, MdsnnError
from mdsnn.kernels.files import read_bounded, write_bytes

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

KEY = "mdsnn.checkpoint"
FORMAT = "mdsnn.checkpoint/1"
_FIELDS: dict[str, type] = {
    "config": dict,
    "epoch": int,
    "format": str,
    "history": list,
    "labels": list,
    "optimizer": dict,
    "recipe": dict,
}
_MAX_SIZE = 1 << 16
"""No width, side or count of classes is larger."""
_SHOWN = 3
"""How many tensor names a message quotes."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    document  `format`; `config` of the model; `epoch`, the number finished; `recipe`, `history` and `labels` of the
              training; `optimizer`, the part of its state that is no tensor
    tensors   name -> array, read-only
    where     the file's name, for messages
    """

    document: dict[str, Any]
    tensors: dict[str, Array]
    where: str

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds the model."""
        config: dict[str, Any] = self.document["config"]
        return config

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return int(self.document["epoch"])

    def group(self, prefix: str) -> dict[str, Array]:
        """The tensors under `prefix/`, without it."""
        return {name[len(prefix) + 1 :]: x for name, x in self.tensors.items() if name.startswith(f"{prefix}/")}


def save(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    generators: Mapping[str, torch.Generator] | None = None,
    recipe: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    labels: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Write a checkpoint, whole or not at all; the same state gives the same bytes.

    model    must carry `config`, what `mdsnn.models.build` rebuilds it from
    force    replace a file that exists
    raises   CheckpointError  for a NaN or infinity, a model without `config`, or a tensor the file cannot hold
             StorageError     if the file cannot be written
    """
    config = getattr(model, "config", None)
    if type(config) is not dict:
        raise CheckpointError(f"{path}: the model has no `config` dictionary, so that no file could rebuild it")
    tensors = {f"model/{name}": as_numpy(value) for name, value in model.state_dict().items()}
    state: dict[str, Any] = {}
    if optimizer is not None:
        slots, state = _split_optimizer(optimizer.state_dict())
        tensors |= slots
    for name, generator in (generators or {}).items():
        tensors[f"generator/{name}"] = as_numpy(generator.get_state())
    _check_finite(str(path), tensors)
    document = {
        "config": config,
        "epoch": epoch,
        "format": FORMAT,
        "history": [dict(row) for row in history],
        "labels": list(labels),
        "optimizer": state,
        "recipe": dict(recipe or {}),
    }
    try:
        canonical_json(document)
        content = pack(tensors, document, KEY)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"{path}: config, recipe or history is not plain JSON: {fault}") from fault
    except ArtifactError as fault:
        raise CheckpointError(f"{path}: {fault}") from fault
    write_bytes(path, content, force=force)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and check a checkpoint of ours.

    raises  InputError       if the file is missing, empty or no regular file
            CheckpointError  if it is damaged, of a newer format, of another kind, or holds NaN or infinity
    """
    where = str(path)
    content = read_bounded(path, MAX_FILE, what="checkpoint")
    if content[:1] in (b"P", b"\x80") and int.from_bytes(content[:8], "little") > MAX_HEADER:
        raise CheckpointError(
            f"{where}: this looks like a PyTorch checkpoint, not one of mdsnn; read it with mdsnn.foreign.load"
        )
    document, tensors = unpack(content, KEY, where, error=CheckpointError)
    found = document.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{where}: format {found!r}; this version reads {FORMAT!r}. Update mdsnn, or save it again"
        )
    if set(document) != set(_FIELDS):
        odd = sorted(set(document) ^ set(_FIELDS))
        raise CheckpointError(f"{where}: document: missing or unknown fields {', '.join(odd[:_SHOWN])}")
    for name, kind in _FIELDS.items():
        if type(document[name]) is not kind:
            raise CheckpointError(
                f"{where}: document: {name} must be a {kind.__name__}, not {type(document[name]).__name__}"
            )
    if document["epoch"] < 0:
        raise CheckpointError(f"{where}: document: epoch = {document['epoch']} is below 0")
    if any(type(label) is not str for label in document["labels"]):
        raise CheckpointError(f"{where}: document: a label is no text")
    if any(type(row) is not dict for row in document["history"]):
        raise CheckpointError(f"{where}: document: a row of the history is no table")
    _check_finite(where, tensors)
    return Checkpoint(document, tensors, where)


def build_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """Rebuild the model of a checkpoint, with its tensors, in evaluation mode.

    raises  CheckpointError  if the configuration builds no model, or one that the tensors do not fit
    """
    import torch

    from .models import build

    where, tensors = checkpoint.where, checkpoint.group("model")
    try:
        _check_config(where, checkpoint)
        with torch.device("meta"):  # shapes without memory: a hostile config allocates nothing
            _compare(build(checkpoint.config).state_dict(), tensors, where)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn and then overwritten
            model: torch.nn.Module = build(checkpoint.config)
    except CheckpointError:
        raise
    except MdsnnError as fault:
        raise CheckpointError(f"{where}: its config builds no model: {fault}") from fault
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as fault:
        raise CheckpointError(f"{where}: its config builds no model: {type(fault).__name__}: {fault}") from fault
    apply(model, tensors, where)
    return model.eval()


def load_model(path: str | os.PathLike[str]) -> torch.nn.Module:
    """The model of a checkpoint file, in evaluation mode: `build_model(load(path))`, with their errors."""
    return build_model(load(path))


def apply(model: torch.nn.Module, tensors: Mapping[str, Array], where: str) -> None:
    """Copy tensors into a model by name; every one must be there, and fit, and none be left over.

    raises  CheckpointError  naming the first tensors that do not; the model is then unchanged
    """
    import torch

    state = model.state_dict()
    _compare(state, tensors, where)
    _check_finite(where, tensors)
    model.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in state})


def _compare(state: Mapping[str, torch.Tensor], tensors: Mapping[str, Array], where: str) -> None:
    faults = []
    for what, names in (("missing", state.keys() - tensors.keys()), ("unknown", tensors.keys() - state.keys())):
        if names:
            faults.append(f"{len(names)} {what}, such as {', '.join(sorted(names)[:_SHOWN])}")
    shared = [name for name in state if name in tensors]
    unfit = [name for name in shared if tuple(state[name].shape) != tensors[name].shape]
    if unfit:
        some = (f"{name} {list(tensors[name].shape)} for {list(state[name].shape)}" for name in unfit[:_SHOWN])
        faults.append(f"{len(unfit)} misshapen, such as {', '.join(some)}")
    mixed = [name for name in shared if state[name].is_floating_point() != (tensors[name].dtype.kind == "f")]
    if mixed:
        faults.append(f"{len(mixed)} of another kind of number, such as {', '.join(mixed[:_SHOWN])}")
    if faults:
        raise CheckpointError(f"{where}: tensors of another architecture: {'; '.join(faults)}")


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Give an optimizer of the same parameters the state it had when the checkpoint was saved.

    raises  CheckpointError  if the checkpoint holds no such state, or one of another optimizer
    """
    import torch

    where, saved = checkpoint.where, checkpoint.document["optimizer"]
    current = optimizer.state_dict()
    try:
        state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in saved["state"].items()}
        for name, array in checkpoint.group("optimizer").items():
            index, slot = name.split("/")
            state.setdefault(int(index), {})[slot] = torch.from_numpy(np.array(array))
        groups = [dict(group) for group in saved["groups"]]
        same = [group["params"] for group in groups] == [group["params"] for group in current["param_groups"]]
        keys = [set(group) for group in groups] == [set(group) for group in current["param_groups"]]
        shapes = all(
            slot.ndim == 0 or slot.shape == parameter.shape
            for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"])
            for slot in state.get(index, {}).values()
            if isinstance(slot, torch.Tensor)
        )
        if not (same and keys and shapes):
            raise ValueError("its parameters or options differ")
        for group in groups:
            if "betas" in group:
                group["betas"] = tuple(group["betas"])
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as fault:
        kind = type(optimizer).__name__
        raise CheckpointError(f"{where}: holds no state for this {kind} optimizer: {fault}") from fault


def restore_generators(generators: Mapping[str, torch.Generator], checkpoint: Checkpoint) -> None:
    """Set random generators to their saved states; raises CheckpointError if one is missing or damaged."""
    import torch

    saved = checkpoint.group("generator")
    for name, generator in generators.items():
        if name not in saved:
            raise CheckpointError(f"{checkpoint.where}: holds no random state {name!r}; it cannot be resumed exactly")
        try:
            generator.set_state(torch.from_numpy(np.array(saved[name])))
        except (TypeError, RuntimeError) as fault:
            raise CheckpointError(f"{checkpoint.where}: random state {name!r}: {fault}") from fault


def as_numpy(tensor: torch.Tensor) -> Array:
    """The tensor's values, off its device and its graph."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors: dict[str, Array] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        rest[str(index)] = {}
        for slot, value in slots.items():
            if hasattr(value, "detach"):
                tensors[f"optimizer/{index}/{slot}"] = as_numpy(value)
            else:
                rest[str(index)][slot] = value
    return tensors, {"state": rest, "groups": [dict(group) for group in state["param_groups"]]}


def _check_finite(where: str, tensors: Mapping[str, Array]) -> None:
    bad = [name for name, x in tensors.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise CheckpointError(f"{where}: NaN or infinity in {', '.join(sorted(bad)[:_SHOWN])}{more}")


def _check_config(where: str, checkpoint: Checkpoint) -> None:
    """Bound what building takes in time and memory by the file: no more blocks than tensors, no number out of sight."""
    blocks = checkpoint.config.get("blocks")
    if type(blocks) is list and sum(n for n in blocks if type(n) is int) > len(checkpoint.tensors):
        raise CheckpointError(f"{where}: config: blocks = {blocks} are more than its {len(checkpoint.tensors)} tensors")
    numbers = list(checkpoint.config.items())
    while numbers:
        name, value = numbers.pop()
        if type(value) in (list, dict):
            numbers.extend((name, item) for item in (value.values() if type(value) is dict else value))
        elif type(value) is int and abs(value) > _MAX_SIZE:
            raise CheckpointError(f"{where}: config: {name} holds {value}, over the limit of {_MAX_SIZE}")

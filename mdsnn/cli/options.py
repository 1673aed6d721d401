"""Options that several commands share, and what stands behind them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mdsnn.kernels.errors import InputError, MissingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mdsnn.kernels.network import IntegerNetwork

F = TypeVar("F", bound=Callable[..., Any])

EXECUTORS = ("reference", "numba", "native", "torch", "onnx")
"""The five executors, the baseline first."""


class JsonCommand(click.Command):
    """A command with `--json [FILE]`: bare for stdout, or with a file that ends in .json.

    Its option names may be written with dashes or underscores: --save_path is --save-path.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        keywords["context_settings"] = {
            "token_normalize_func": lambda token: token.replace("_", "-"),
            **keywords.get("context_settings", {}),
        }
        super().__init__(*args, **keywords)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                words += [word, *rest]
                break
            if word == "--json":
                named = bool(rest) and (rest[0].lower().endswith(".json") or rest[0] == "-")
                word = f"--json={rest.pop(0) if named else '-'}"
            words.append(word)
        return super().parse_args(ctx, words)


def _json_file(_ctx: click.Context, _option: click.Parameter, name: str | None) -> str | None:
    if name is not None and name != "-" and not name.lower().endswith(".json"):
        raise click.BadParameter(f"{name!r} does not end in .json")
    return name


def json_option(function: F) -> F:
    """`--json [FILE]`: the result as JSON, on stdout or in FILE (which must end in .json)."""
    return click.option(
        "--json",
        "json_file",
        metavar="[FILE.json]",
        callback=_json_file,
        help="The result as JSON, on stdout or into FILE.json.",
    )(function)


def not_empty(_ctx: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """A click callback that refuses an empty text: as a path it would silently mean the folder one is in."""
    if text == "":
        raise click.BadParameter("is empty; '.' means this folder")
    return text


def force_option(function: F) -> F:
    """`--force`: replace outputs that exist."""
    return click.option("--force", is_flag=True, help="Replace outputs that exist.")(function)


def extra(name: str, module: str) -> ModuleType:
    """Import `module`; if a library it needs is not installed, say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        if fault.name is None or fault.name.split(".")[0] == "mdsnn":
            raise
        raise MissingError(
            f"this needs {fault.name}, which is not installed: pip install -c constraints.txt -e '.[{name}]'"
        ) from fault


def write_json(document: dict[str, Any], json_file: str | None, *, force: bool = False) -> bool:
    """Write `document` where `--json` says; True if it went to stdout, so that nothing else should."""
    if json_file is None:
        return False
    text = json.dumps(document, indent=2, allow_nan=False, default=_plain) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
        return True
    from mdsnn.kernels.files import write_text

    write_text(json_file, text, force=force)
    return False


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__iter__"):
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def check_outputs(
    paths: Sequence[str | os.PathLike[str] | None],
    *,
    force: bool,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
) -> None:
    """Fail before long work if an output cannot be written or exists (see kernels/files.py), or is named twice.

    inputs  files that are read: none of them may be an output too, not even with `force`
    raises  StorageError, InputError
    """
    from mdsnn.kernels.files import check_writable

    taken = {os.path.realpath(path): "is read as an input" for path in inputs if path and "\0" not in str(path)}
    for path in paths:
        if path is None or str(path) == "-":
            continue
        check_writable(path, force=force)  # first: realpath knows no name with a NUL
        real = os.path.realpath(path)
        if real in taken:
            raise InputError(f"{path}: {taken[real]}, so it cannot be an output too; name another file")
        taken[real] = "is named as an output already"


def check_folder(path: str | os.PathLike[str], *, force: bool) -> None:
    """Fail before long work if a folder that is to be filled holds anything already, or is a file."""
    from mdsnn.kernels.errors import StorageError

    try:
        held = os.listdir(path)
    except FileNotFoundError:
        return
    except OSError as fault:
        raise StorageError(f"{path}: no folder that can be written: {fault.strerror or fault}") from fault
    if held and not force:
        raise StorageError(f"{path}: holds files and is kept; name an empty folder, or pass --force")


def check_environment() -> None:
    """Refuse an MDSNN_ENGINE, MDSNN_THREADS or MDSNN_ISA that means nothing here, even where options override it.

    raises  ConfigError, MissingError
    """
    from mdsnn.kernels import engine, native

    engine.choose()
    engine.thread_count()
    if native.missing() is None:
        native.isa()


def read_data(
    network: IntegerNetwork, data: str, data_path: str | None = None, limit: int | None = None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
    """Pixels that `network` takes, and their labels where the source has them.

    data   builtin:digits (64 test digits in the package), a data set (`mdsnn.data.load`), or an .npy file
    limit  at most so many samples
    """
    import numpy as np

    from mdsnn.export import artifact

    spec = network.input
    labels: npt.NDArray[np.int64] | None = None
    if data.startswith(artifact.BUILTIN):
        import io

        name = data.removeprefix(artifact.BUILTIN)
        pixels = np.load(io.BytesIO(artifact.builtin(name, "_pixels.npy")), allow_pickle=False)
        labels = np.load(io.BytesIO(artifact.builtin(name, "_labels.npy")), allow_pickle=False).astype(np.int64)
    elif data.endswith(".npy"):
        from mdsnn.images import load_pixels

        coding: Any = spec.coding
        pixels, _ = load_pixels([data], spec.channels, spec.height, spec.width, coding, network.timesteps)
    else:
        datasets = extra("train", "mdsnn.data")
        dataset = datasets.load(datasets.check_name(data, [*artifact.builtins("_pixels.npy"), "FILE.npy"]), data_path)
        pixels, labels = dataset.test_x, dataset.test_y
    sample = (spec.channels, spec.height, spec.width)
    if tuple(pixels.shape[-3:]) != sample:
        raise InputError(f"{data}: its samples are {tuple(pixels.shape[-3:])}, this network takes {sample}")
    if pixels.ndim == 5 and not data.endswith(".npy"):
        pixels = pixels[: network.timesteps]  # a network of fewer steps sees the first frames, as it was trained
    if limit is not None:
        pixels = pixels[:, :limit] if pixels.ndim == 5 else pixels[:limit]
        labels = None if labels is None else labels[:limit]
    return pixels, labels

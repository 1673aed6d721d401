"""`mdsnn verify`: do all executors agree on every integer?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdsnn.kernels.errors import StorageError

from .options import (
    EXECUTORS,
    JsonCommand,
    check_environment,
    check_outputs,
    extra,
    force_option,
    json_option,
    not_empty,
    read_data,
    write_json,
)
from .terminal import Tick, progress, say, table, tell

if TYPE_CHECKING:
    from mdsnn.export.verify import Executor, Verification
    from mdsnn.kernels.network import IntegerNetwork


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--checkpoint", help="The student the artifact was exported from; the executor 'torch' runs it, frozen.")
@click.option("--onnx", help="Check this ONNX file: its logits, and its h, s and q if it has these outputs.")
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="A data set as in `mdsnn train`, builtin:digits, or an .npy file.",
)
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option("--limit", type=click.IntRange(1), help="At most so many samples; default: all.")
@click.option(
    "--executors",
    default=",".join(EXECUTORS),
    show_default=True,
    help="Comma-separated, the baseline first. All must run: one that is missing is exit code 3.",
)
@click.option("--batch-size", default=50, show_default=True, type=click.IntRange(1, 4096), help="Samples a comparison.")
@click.option(
    "--save-dir",
    default=".",
    show_default=True,
    callback=not_empty,
    help="Where a divergence is saved, with a script; created if missing.",
)
@json_option
@force_option
def command(
    artifact: str,
    checkpoint: str | None,
    onnx: str | None,
    data: str,
    data_path: str | None,
    limit: int | None,
    executors: str,
    batch_size: int,
    save_dir: str,
    json_file: str | None,
    force: bool,
) -> None:
    """Run ARTIFACT in every executor on real data and compare every h, s, q and logit.

    Exit code 0 if all agree, 1 if anything differs or an executor failed: then the first divergence (layer, step,
    index, both values) is named, and saved with a script that reproduces it. Without torch or a checkpoint, choose
    the executors.

    \b
    Examples:
      mdsnn verify student.mdsnn --checkpoint student/model.ckpt --data digits
      mdsnn verify builtin:digits --data builtin:digits --executors reference,native
    """
    check_outputs([json_file], force=force, inputs=[artifact, checkpoint, onnx])
    if Path(save_dir).exists() and not Path(save_dir).is_dir():
        raise StorageError(f"{save_dir}: is no folder; --save-dir names one")
    document = check(
        artifact,
        checkpoint=checkpoint,
        onnx=onnx,
        data=data,
        data_path=data_path,
        limit=limit,
        executors=tuple(executors.split(",")),
        batch_size=batch_size,
        save_dir=save_dir,
    )
    if not write_json(document, json_file, force=force):
        show(document)
    if not document["agrees"] or document["constants"]:
        if "save_error" in document:
            raise StorageError(f"the divergence was not saved: {document['save_error']}")
        raise click.exceptions.Exit(1)


def torch_executor(checkpoint: str) -> Executor:
    """Frozen PyTorch on a student checkpoint."""
    from .export import frozen_student

    model, _ = frozen_student(checkpoint)
    executor: Executor = extra("train", "mdsnn.export.lower").torch_executor(model)
    return executor


def make_executors(
    network: IntegerNetwork, names: tuple[str, ...], checkpoint: str | None, onnx: str | None
) -> dict[str, Executor]:
    """The executors by name, in order. Raises MissingError if one is not there, ConfigError if it is unknown."""
    from mdsnn.export.verify import kernel_executor
    from mdsnn.kernels.engine import KERNELS
    from mdsnn.kernels.errors import ConfigError, InputError

    made: dict[str, Executor] = {}
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"executors {','.join(names)!r}: name at least two, each once, of {', '.join(EXECUTORS)}")
    for name in names:
        if name in KERNELS:
            made[name] = kernel_executor(network, name)
        elif name == "torch":
            if checkpoint is None:
                raise InputError(
                    "the executor 'torch' needs --checkpoint, the student this artifact was exported from;"
                    " or choose others: --executors reference,numba,native,onnx"
                )
            made[name] = torch_executor(checkpoint)
        elif name == "onnx":
            made[name] = _onnx_executor(network, onnx)
        else:
            raise ConfigError(f"executor {name!r} is none of {', '.join(EXECUTORS)}")
    return made


def _onnx_executor(network: IntegerNetwork, path: str | None) -> Executor:
    """ONNX Runtime on a model with trace outputs, made from the artifact; with `path`, its logits are that file's."""
    from mdsnn.kernels.engine import Trace

    module = extra("train", "mdsnn.export.onnx")
    traced = module.OnnxExecutor(network)
    run: Executor = traced.run
    if path is None:
        return run
    file = module.OnnxExecutor(module.load_onnx(path))

    def execute(pixels: Any) -> Trace:
        trace: Trace = file.run(pixels)
        return trace if trace.lifs else Trace(traced.run(pixels).lifs, trace.logits)

    return execute


def check(
    path: str,
    *,
    checkpoint: str | None = None,
    onnx: str | None = None,
    data: str = "digits",
    data_path: str | None = None,
    limit: int | None = None,
    executors: tuple[str, ...] = EXECUTORS,
    batch_size: int = 50,
    save_dir: str = ".",
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Verify an artifact (schema mdsnn.verify/1, with accuracies where the data has labels)."""
    from mdsnn.export import artifact
    from mdsnn.export.verify import compare_constants, match_bn_forms, save_divergence, verify
    from mdsnn.kernels.files import make_folder

    check_environment()
    network = artifact.load(path)
    made = make_executors(network, executors, checkpoint, onnx)
    pixels, labels = read_data(network, data, data_path, limit)
    if tick is not None:
        outcome = verify(network, made, pixels, batch=batch_size, progress=tick)
    else:
        with progress("verifying") as own:
            outcome = verify(network, made, pixels, batch=batch_size, progress=own)
    document: dict[str, Any] = {**outcome.to_dict(), "artifact": path, "data": data}
    document["accuracy"] = {} if labels is None else _accuracies(outcome, labels)
    document["constants"] = []
    if checkpoint is not None:
        from .export import lower_checkpoint

        fresh = match_bn_forms(lower_checkpoint(checkpoint, bn_table="affine"), network)
        document["constants"] = [str(found) for found in compare_constants(network, fresh)]
    if outcome.first is not None:
        document["divergence"] = str(outcome.first)
        place = path if path.startswith(artifact.BUILTIN) else os.path.abspath(path)
        try:
            saved = save_divergence(outcome.first, pixels, place, make_folder(save_dir))
            document["saved"] = [str(file) for file in saved]
        except StorageError as fault:  # the finding is told first, and then that it was not kept
            document["save_error"] = str(fault)
    return document


def _accuracies(outcome: Verification, labels: Any) -> dict[str, float | None]:
    return {name: comparison.accuracy(labels) for name, comparison in outcome.comparisons.items()}


def show(document: dict[str, Any]) -> None:
    """Print what was compared, what differs, and where first."""
    rows = []
    for name, executor in document["executors"].items():
        accuracy = document["accuracy"].get(name)
        counts = [
            f"{executor['differing'][quantity]} of {executor['compared'][quantity]}"
            for quantity in ("h", "s", "q", "logits")
        ]
        state = "baseline" if name == document["baseline"] else "agrees" if executor["agrees"] else "DIFFERS"
        if executor["failure"]:
            state = "FAILED"
        rows.append([name, state, *counts, "" if accuracy is None else f"{100 * accuracy:.2f}%"])
    table(["executor", "state", "h differ", "s differ", "q differ", "logits differ", "accuracy"], rows)
    for name, executor in document["executors"].items():
        if executor["failure"]:
            say(f"{name} failed: {executor['failure']}")
    tell(f"{document['compared']} integers compared over {document['samples']} samples, {document['differing']} differ")
    if "divergence" in document:
        tell(f"first divergence: {document['divergence']}")
        if "saved" in document:
            tell(f"saved: {', '.join(document['saved'])}  (run the script to see it again)")
    for text in document["constants"]:
        tell(f"artifact and checkpoint differ: {text}")

"""`mdsnn quantize`: a full-precision network becomes a quantized student by calibration alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdsnn.kernels.errors import CheckpointError, ConfigError

from .options import JsonCommand, check_outputs, extra, force_option, json_option, write_json
from .terminal import progress, say, table, tell
from .train import whole_numbers

if TYPE_CHECKING:
    from mdsnn.data import Dataset

SHAPE = ("model", "depth", "blocks", "widths", "timesteps", "stem", "norm", "teacher_names")
"""Options that only a foreign checkpoint needs: it does not say of what network it is."""
BITS = click.IntRange(2, 8)


@click.command(cls=JsonCommand)
@click.argument("checkpoint", metavar="CKPT")
@click.option("-o", "--output", required=True, metavar="STUDENT.ckpt", help="The student, for `mdsnn export`.")
@click.option("--data", default="digits", show_default=True, help="A data set, as in `mdsnn train`.")
@click.option("--data-path", help="Where its files lie.")
@click.option(
    "--images", default=512, show_default=True, type=click.IntRange(2), help="Training images to calibrate on, at most."
)
@click.option("--limit", type=click.IntRange(1), help="Test images to measure on, at most; default: all.")
@click.option("--weight-bits", default=4, show_default=True, type=BITS, help="Of convolutions and hidden layers.")
@click.option("--membrane-bits", default=4, show_default=True, type=BITS, help="Of membranes.")
@click.option("--bn-bits", default=8, show_default=True, type=BITS, help="Of gamma and beta.")
@click.option("--stem-bits", default=8, show_default=True, type=BITS, help="Of the first convolution and classifier.")
@click.option("--shortcut-bits", default=8, show_default=True, type=BITS, help="Of what a 1x1 shortcut reads.")
@click.option("--model", help="For a .pth file: ms_resnet or vgg.")
@click.option("--model-depth", "depth", type=int, help="For a .pth file: 18 or 34.")
@click.option("--blocks", callback=whole_numbers, help="For a .pth file: blocks a group, such as 1,1,1.")
@click.option("--widths", callback=whole_numbers, help="For a .pth file: channels a group, such as 16,32,64.")
@click.option("--time-window", "timesteps", type=int, help="For a .pth file: timesteps T.")
@click.option("--stem", help="For a .pth file: cifar or imagenet.")
@click.option("--norm", help="For a .pth file: bn or tdbn.")
@click.option("--teacher-names", help="For a .pth file: a JSON table of its tensors' names (docs/training.md).")
@json_option
@force_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    checkpoint: str,
    output: str,
    data: str,
    data_path: str | None,
    images: int,
    limit: int | None,
    json_file: str | None,
    force: bool,
    **options: Any,
) -> None:
    """Quantize the full-precision network in CKPT without training, and print its accuracy before and after.

    The student runs beside its teacher on some training images; its weight codes, BN statistics and membrane scales are
    chosen so that every layer does what the teacher's does. Training may go on from it.

    \b
    Examples:
      mdsnn quantize runs/teacher/model.ckpt -o student.ckpt
      mdsnn quantize resnet18.pth --model-depth 18 --data CIFAR10 --data-path data --weight-bits 8 -o student.ckpt
      mdsnn export student.ckpt -o student.mdsnn
    """
    check_outputs([output, json_file], force=force, inputs=[checkpoint])
    bits = {name: value for name, value in options.items() if name.endswith("_bits")}
    shape = {name: options[name] for name in SHAPE if options[name] is not None}
    document = quantize(
        checkpoint,
        output,
        data=data,
        data_path=data_path,
        images=images,
        limit=limit,
        bits=bits,
        shape=shape,
        force=force,
    )
    if not write_json(document, json_file, force=force):
        show(document)


def quantize(
    path: str,
    output: str,
    *,
    data: str = "digits",
    data_path: str | None = None,
    images: int = 512,
    limit: int | None = None,
    bits: dict[str, int] | None = None,
    shape: dict[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Calibrate the network in `path` on `images` training images and save the student (schema mdsnn.quantize/1).

    limit   test images to measure on; None: all. Both are taken evenly over the whole set
    bits    see calibrate.convert       shape  fields of a recipe, for a PyTorch file
    raises  CheckpointError  for a network that is quantized already, or made for other data
    """
    import numpy as np

    calibration = extra("train", "mdsnn.calibrate")
    freezing, training = extra("train", "mdsnn.freeze"), extra("train", "mdsnn.train")
    dataset = extra("train", "mdsnn.data").load(data, data_path)
    teacher = full_precision(path, data, dataset, shape or {})
    steps = teacher.config["timesteps"]
    axis = 0 if dataset.coding == "image" else 1

    def some(x: Any, y: Any, count: int | None) -> tuple[Any, Any]:
        kept = np.unique(np.linspace(0, len(y) - 1, min(count or len(y), len(y))).astype(np.int64))
        return np.take(x if axis == 0 else x[:steps], kept, axis=axis), y[kept]

    pixels, _ = some(dataset.train_x, dataset.train_y, images)
    test_x, test_y = some(dataset.test_x, dataset.test_y, limit)
    chosen = {**calibration.BITS, **(bits or {})}
    try:
        before = calibration.convert(teacher, **chosen)
    except CheckpointError as fault:
        raise CheckpointError(f"{path}: {fault}") from fault
    with progress("calibrating") as tick:
        student = calibration.calibrate(teacher, pixels, progress=tick, **chosen)
    accuracy = {
        "teacher": training.accuracy(teacher, test_x, test_y),
        "before": training.accuracy(freezing.freeze(before), test_x, test_y),
        "after": training.accuracy(freezing.freeze(student), test_x, test_y),
    }
    made = {
        "setting": "calibrated",
        "data": dataset.name,
        "images": pixels.shape[axis],
        "teacher_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    }
    extra("train", "mdsnn.checkpoint").save(output, student, recipe=made, labels=dataset.labels, force=force)
    return {
        "schema": "mdsnn.quantize/1",
        "checkpoint": output,
        **made,
        "test_images": len(test_y),
        "bits": chosen,
        "accuracy": accuracy,
    }


def full_precision(path: str, data: str, dataset: Dataset, shape: dict[str, Any]) -> Any:
    """The network of a checkpoint, ours or PyTorch's, made for `dataset`, which is called `data`."""
    checkpoints, training = extra("train", "mdsnn.checkpoint"), extra("train", "mdsnn.train")
    if Path(path).suffix.lower() in extra("train", "mdsnn.foreign").SUFFIXES:
        recipe = training.recipe(data, "student", teacher_path=path, **shape)
        teacher, _ = training.load_teacher(recipe, dataset)
        return teacher
    if shape:
        raise ConfigError(
            f"{path}: says itself of what network it is; --model, --blocks and the like are for .pth files"
        )
    teacher = checkpoints.load_model(path)
    own = {
        "classes": len(dataset.labels),
        "in_channels": dataset.channels,
        "size": list(dataset.size),
        "coding": dataset.coding,
    }
    odd = [
        f"{name} {teacher.config[name]!r} against {value!r}"
        for name, value in own.items()
        if teacher.config[name] != value
    ]
    if odd:
        raise CheckpointError(f"{path}: was made for other data than {dataset.name}: {', '.join(odd)}")
    return teacher


def show(document: dict[str, Any]) -> None:
    """Print the accuracies before and after."""
    accuracy, bits = document["accuracy"], document["bits"]
    name = f"W{bits['weight_bits']}U{bits['membrane_bits']}"
    rows = [
        ["teacher, full precision", f"{100 * accuracy['teacher']:.2f}%"],
        [f"{name}, quantized as it stands", f"{100 * accuracy['before']:.2f}%"],
        [f"{name}, calibrated", f"{100 * accuracy['after']:.2f}%"],
    ]
    table(["network", "test accuracy"], rows)
    tell(
        f"{document['test_images']} test images of {document['data']}; students frozen, in integers; calibrated on"
        f" {document['images']} training images"
    )
    say(f"wrote {document['checkpoint']}")

"""`mdsnn train`: teachers, quantized students and distilled students."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields
from typing import Any

import click

from .options import JsonCommand, check_outputs, extra, force_option, json_option, not_empty, write_json
from .terminal import progress, say, table, tell


def whole_numbers(_ctx: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Callback of an option: numbers parted by commas."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 2,2,2,2")
    return tuple(int(part) for part in parts)


def _three(_ctx: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1,3,1") from None


@click.command(cls=JsonCommand)
@click.option(
    "--paper-setting",
    type=click.Choice(["original", "student", "qamd"]),
    default="original",
    show_default=True,
    help="original: the full-precision teacher; student: quantized alone; qamd: distilled from --teacher-path.",
)
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, digits-events, imagefolder, CIFAR10, CIFAR100, TinyImagenet or ncaltech101.",
)
@click.option(
    "--data-path", help="Where its files lie (imagefolder: train/CLASS/*, test/CLASS/*; others: docs/data.md)."
)
@click.option("--teacher-path", help="The teacher's checkpoint, for qamd; ours, or a PyTorch .pth.")
@click.option(
    "--teacher-names", help="A JSON table of its tensors' names, for a .pth that is not understood (docs/training.md)."
)
@click.option("--save-path", callback=not_empty, help="The run's folder. Default: runs/DATA-SETTING.")
@click.option("--model", help="ms_resnet or vgg. Default: the teacher's, else ms_resnet.")
@click.option(
    "--model-depth", "depth", type=int, help="18 or 34 (MS-ResNet), 9 or 16 (VGG); or give --blocks and --widths."
)
@click.option("--blocks", callback=whole_numbers, help="Blocks a group, such as 1,1,1.")
@click.option("--widths", callback=whole_numbers, help="Channels a group, such as 16,32,64.")
@click.option("--time-window", "timesteps", type=int, help="Timesteps T.")
@click.option("--bits", type=int, help="Bits of weights and membranes, 2..8.")
@click.option("--weight-bits", type=int, help="Bits of weights alone; 32: full precision, an ablation.")
@click.option("--membrane-bits", type=int, help="Bits of membranes alone; 32: full precision, an ablation.")
@click.option("--bn-bits", type=int, help="Bits of the BN parameters; 32: full precision, an ablation.")
@click.option("--quantizer", help="tanh (the paper's Eq. 3) or mint (one learned scale, the paper's baseline).")
@click.option("--norm", help="bn, or tdbn: batch normalization over T and N together, scaled by the threshold.")
@click.option("--stem", help="Of MS-ResNet: cifar (3x3, stride 1) or imagenet (7x7, stride 2).")
@click.option("--loss", help="CLK: cross-entropy + logits + membrane KL; CLM: MSE for KL; CL: no membranes.")
@click.option("--loss-weights", callback=_three, help="Of cross-entropy, logits and membranes, such as 1,3,1.")
@click.option("--temperature", type=float, help="Of the softmax of membranes, and of logits.")
@click.option("--logit-temperature", type=float, help="Of the softmax of logits, where it is another.")
@click.option(
    "--kl-direction", "--direction", "direction", help="forward: KL(teacher || student); literal: as printed."
)
@click.option("--distill", "taps", help="Where membranes are compared: conv, block or group.")
@click.option("--start", help="A student's first weights: teacher (where there is one), or scratch.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--freeze-last-epochs", "freeze_epochs", type=int, help="Of these, with fixed BN statistics and scales.")
@click.option("--batch-size", type=int, help="Images an update, over all processes.")
@click.option("--lr", type=float, help="Highest learning rate.")
@click.option("--warmup-epochs", type=float, help="Epochs of linear rise to it.")
@click.option("--grad-clip", type=float, help="Largest norm of the gradient; 0: any.")
@click.option("--seed", type=int, help="Of weights, order and augmentation.")
@click.option("--threads", type=int, help="CPU threads; 0: as torch has them.")
@click.option(
    "--device", help="cpu or cuda. Default: cuda where torch sees a GPU, for all data but the digits; else cpu."
)
@click.option("--precision", help="float32, or bf16: convolutions of the live network by autocast.")
@click.option("--amp", "precision", flag_value="bf16", help="The same as --precision bf16.")
@click.option("--compile/--no-compile", default=None, help="By torch.compile; takes minutes to start.")
@click.option("--checkpoint-activations/--keep-activations", default=None, help="Less memory for more time.")
@click.option(
    "--local-rank",
    "--local_rank",
    type=int,
    hidden=True,
    expose_value=False,
    help="A launcher gives it; LOCAL_RANK is used.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other field of the recipe; repeatable."
)
@click.option(
    "--max-minutes",
    type=float,
    help="Wall clock: past it, save the step it is at and stop (exit code 0); --resume goes on exactly.",
)
@click.option("--tensorboard", is_flag=True, help="Event files too, in RUN/tensorboard.")
@click.option("--resume", is_flag=True, help="Go on where an earlier run of the same recipe stopped.")
@json_option
@force_option
def command(
    paper_setting: str,
    data: str,
    settings: tuple[str, ...],
    max_minutes: float | None,
    tensorboard: bool,
    resume: bool,
    json_file: str | None,
    force: bool,
    **chosen: Any,
) -> None:
    """Train a network. What is not given comes from the data set's recipe (digits: about a minute on two cores).

    \b
    A teacher, then a W4/U4 student that it guides:
      mdsnn train --data digits --save-path runs/teacher
      mdsnn train --paper-setting qamd --bits 4 --teacher-path runs/teacher/model.ckpt --save-path runs/student

    A run folder holds recipe.json, metrics.csv, last.ckpt (to resume from) and model.ckpt. Stop with Ctrl-C at any
    time; --resume goes on exactly. The accuracy of a student is that of its frozen, integer forward.

    \b
    On two GPUs (or, with --device cpu, in two processes):
      torchrun --nproc_per_node=2 -m mdsnn train --data CIFAR10 --data-path data --batch-size 256
    """
    check_outputs([json_file], force=force)
    first = extra("train", "mdsnn.parallel").leads()
    changes = {name: value for name, value in chosen.items() if value is not None}
    changes.setdefault("save_path", f"runs/{data}-{paper_setting}")
    changes.update(recipe_fields(settings))
    if "device" not in changes and not data.lower().startswith("digits"):
        changes["device"] = "cuda" if extra("train", "torch").cuda.is_available() else "cpu"
    options: dict[str, Any] = {"max_minutes": max_minutes, "tensorboard": tensorboard, "resume": resume, "force": force}
    document = run(paper_setting, data, changes, quiet=not first, **options)
    if first and not write_json(document, json_file, force=force):
        show(document)


_OPTION_OF = {"setting": "--paper-setting", "data": "--data", "save_path": "--save-path"}
"""Fields of the recipe that --set leaves alone."""


def recipe_fields(texts: tuple[str, ...]) -> dict[str, Any]:
    """What --set says: KEY=VALUE pairs; VALUE is JSON, or else a text."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
        option = _OPTION_OF.get(key.replace("-", "_"))
        if option is not None:
            raise click.BadParameter(f"{key!r} has an option of its own: {option}", param_hint="--set")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        found[key.replace("-", "_")] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


def _silent(_done: int, _total: int) -> None:
    """Progress that nobody sees."""


def run(
    setting: str,
    data: str,
    changes: dict[str, Any],
    *,
    label: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train as the recipe of `data` and `setting` with `changes` says (schema mdsnn.train/1).

    quiet    show no progress      options  of `mdsnn.train.train`
    """
    training = extra("train", "mdsnn.train")
    config = training.recipe(data, setting, **changes)
    with contextlib.nullcontext(_silent) if quiet else progress(label or f"training {setting}") as tick:

        def report(at: Any) -> None:
            tick(at.epoch * at.steps + (0 if at.metrics else at.step), at.epochs * at.steps)

        result = training.train(config, progress=report, **options)
    return {
        "schema": "mdsnn.train/1",
        "setting": setting,
        "finished": result.finished,
        "checkpoint": str(result.checkpoint),
        "epochs": len(result.history),
        "live_accuracy": result.live_accuracy,
        "frozen_accuracy": result.frozen_accuracy,
        "spike_rates": dict(result.spike_rates),
        "seconds_per_step": result.seconds_per_step,
        "recipe": {field.name: getattr(config, field.name) for field in fields(config)},
    }


def show(document: dict[str, Any]) -> None:
    """Print accuracies and spike rates, or how far an unfinished run came."""
    if not document["finished"]:
        done = f"{document['epochs']} of {document['recipe']['epochs']} epochs and the steps since"
        say(f"stopped at --max-minutes: {done} are saved in {document['checkpoint']}")
        say("the same command with --resume goes on exactly")
        return
    rows = [[name, f"{100 * rate:.2f}%"] for name, rate in document["spike_rates"].items()]
    table(["LIF layer", "neuron-steps that fire"], rows)
    frozen = document["frozen_accuracy"]
    if frozen is None:
        why = "full precision" if document["setting"] == "original" else "live; what stays at 32 bits has no integers"
        tell(f"test accuracy {100 * document['live_accuracy']:.2f} % ({why})")
    else:
        tell(f"test accuracy {100 * frozen:.2f} % (frozen, integer); live {100 * document['live_accuracy']:.2f} %")
    say(f"wrote {document['checkpoint']}")

"""`mdsnn demo`: the whole road on real digits. It only calls what the other commands call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .options import EXECUTORS, JsonCommand, check_outputs, extra, json_option, not_empty, write_json
from .terminal import human_bytes, say, table

DATA = "digits"
CHIP = "fefet32"
SUMMARY = "summary.json"


@click.command(cls=JsonCommand)
@click.option("--out", default="runs/demo", show_default=True, callback=not_empty, help="The folder to fill.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, (1 << 63) - 1),
    help="Of weights, order and augmentation.",
)
@click.option("--force", is_flag=True, help="Start over in a folder that holds a demo, finished or not.")
@json_option
def command(out: str, seed: int, force: bool, json_file: str | None) -> None:
    """From 1,797 real images to a verified integer network and a crossbar report, in a few minutes on two cores.

    Stopped half-way (Ctrl-C, power), the same command goes on. Each step is a command of its own, named as it runs.

    Example: mdsnn demo --out runs/demo
    """
    check_outputs([json_file], force=force)
    document = demo(Path(out), seed=seed, force=force)
    if not write_json(document, json_file, force=force):
        click.echo("")
        table(document["table"]["headers"], document["table"]["rows"])
    say(f"\nAll of it: {Path(out) / SUMMARY}; the crossbar report: {Path(out) / 'report.html'}")
    if not document["agrees"]:
        raise click.exceptions.Exit(1)


class _Steps:
    """Numbers the steps, says what each does, and keeps their seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        say(f"\n[{len(self.seconds) + 1}/{self.total}] {text}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def demo(out: Path, *, seed: int = 0, force: bool = False, say_line: Callable[[str], None] = say) -> dict[str, Any]:
    """Fill `out` and return what summary.json holds (schema mdsnn.demo/1).

    raises  StorageError  if `out` holds a finished demo and `force` is not set
    """
    import json

    from mdsnn.kernels.errors import StorageError
    from mdsnn.kernels.files import make_folder, write_text

    extra("train", "mdsnn.train")  # fail before any work if an extra is missing
    extra("report", "mdsnn.hwsim.report")
    out = make_folder(out)
    if force:
        (out / SUMMARY).unlink(missing_ok=True)
        for folder in ("teacher", "student", "plain"):
            for name in ("last.ckpt", "model.ckpt"):  # without them a run starts over
                (out / folder / name).unlink(missing_ok=True)
    elif (out / SUMMARY).exists():
        raise StorageError(f"{out / SUMMARY}: a finished demo is kept; pass --force, or another --out")
    try:
        document = _fill(out, seed, say_line)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on with what {out} holds") from None
    write_text(out / SUMMARY, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _fill(out: Path, seed: int, say_line: Callable[[str], None]) -> dict[str, Any]:
    from mdsnn.export import artifact

    from . import bench, export, report, train, verify

    steps = _Steps(6)
    model, onnx = out / "student.mdsnn", out / "student.onnx"
    checkpoint = str(out / "student" / "model.ckpt")
    teacher_path = str(out / "teacher" / "model.ckpt")

    def training(name: str, setting: str, **changes: Any) -> dict[str, Any]:
        # one thread: the tensors are small, and the run does not depend on how many cores there are
        settings = {"seed": seed, "threads": 1, "save_path": str(out / name), **changes}
        return train.run(setting, DATA, settings, resume=True, label=name)

    with steps.step("teacher", "Training a full-precision MS-ResNet teacher (T = 4, direct coding)  [mdsnn train]"):
        teacher = training("teacher", "original")
        say_line(f"teacher: {_percent(teacher['live_accuracy'])} on 450 test images it never saw")
    with steps.step(
        "students",
        "Distilling a W4/U4 student (cross-entropy + logits + membrane KL, group-wise, 1/3/1,"
        " BN 8 bit), and training the same student alone  [mdsnn train]",
    ):
        student = training("student", "qamd", bits=4, loss="CLK", teacher_path=teacher_path)
        plain = training("plain", "student", bits=4, teacher_path=teacher_path)
        say_line(
            f"distilled {_percent(student['frozen_accuracy'])}, alone {_percent(plain['frozen_accuracy'])}"
            " (frozen: the integers that ship)"
        )
    with steps.step("export", "Freezing, lowering to integers, proving every width  [mdsnn export]"):
        network = export.lower_checkpoint(checkpoint)
        sizes = {"student.mdsnn": artifact.save(network, model, force=True)}
        sizes["student.onnx"] = export.write_onnx(network, onnx, force=True)
        sizes["teacher_float32"] = _float_bytes(teacher_path)
        say_line(
            f"student.mdsnn {human_bytes(sizes['student.mdsnn'])}, student.onnx {human_bytes(sizes['student.onnx'])}"
        )
    with steps.step(
        "verify",
        "Comparing every membrane, spike, code and logit of the 450 test images in"
        f" {len(EXECUTORS)} executors  [mdsnn verify]",
    ):
        verified = verify.check(str(model), checkpoint=checkpoint, onnx=str(onnx), data=DATA, save_dir=str(out))
        say_line(f"{verified['compared']} integers compared, {verified['differing']} differ")
    with steps.step("bench", "Timing the executors, equal logits checked first  [mdsnn bench]"):
        speed = bench.measure(str(model), checkpoint=checkpoint, data=DATA, threads=1)
    with steps.step(
        "report", f"Mapping onto 64x64 crossbars of 4-bit FeFETs with the measured spikes  [mdsnn report --chip {CHIP}]"
    ):
        hardware = report.make(str(model), chip=CHIP, data=DATA, limit=None)
        for suffix in ("html", "json", "csv"):
            report.write(hardware, str(out / f"report.{suffix}"), force=True)
    return _summary(seed, steps.seconds, teacher, student, plain, sizes, verified, speed, report.totals(hardware))


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _float_bytes(checkpoint: str) -> int:
    """Bytes of a checkpoint's parameters in float32."""
    return sum(
        tensor.size * 4 for tensor in extra("train", "mdsnn.checkpoint").load(checkpoint).group("model").values()
    )


def _summary(
    seed: int,
    seconds: dict[str, float],
    teacher: dict[str, Any],
    student: dict[str, Any],
    plain: dict[str, Any],
    sizes: dict[str, int],
    verified: dict[str, Any],
    speed: dict[str, Any],
    hardware: dict[str, dict[str, float]],
) -> dict[str, Any]:
    from mdsnn.machine import peak_rss

    from . import report
    from .doctor import machine

    peak = peak_rss()
    rows: list[list[str]] = [
        ["accuracy", "teacher (FP32)", _percent(teacher["live_accuracy"])],
        ["accuracy", "W4/U4 student alone, frozen", _percent(plain["frozen_accuracy"])],
        ["accuracy", "W4/U4 student distilled, live", _percent(student["live_accuracy"])],
        ["accuracy", "W4/U4 student distilled, frozen", _percent(student["frozen_accuracy"])],
    ]
    for name, executor in verified["executors"].items():
        accuracy = verified["accuracy"].get(name)
        rows.append(["accuracy", f"  executor {name}", "failed" if accuracy is None else _percent(accuracy)])
        if name != verified["baseline"]:
            differing, compared = sum(executor["differing"].values()), sum(executor["compared"].values())
            rows.append(["mismatches", f"  {name} against {verified['baseline']}", f"{differing} of {compared}"])
    rows += [
        ["size", "teacher, float32 parameters", f"{sizes['teacher_float32']} B"],
        ["size", "student.mdsnn", f"{sizes['student.mdsnn']} B"],
        ["size", "student.onnx", f"{sizes['student.onnx']} B"],
    ]
    for row in speed["rows"]:
        rows.append(["speed", f"{row['executor']}, batch {row['batch']}", f"{row['images_per_s']:.0f} images/s"])
    rows += [["spikes", a["layer"], f"{100 * a['density']:.1f} % of neuron-steps"] for a in speed["activity"]]
    for precision, totals in hardware.items():
        values = [f"{value:.4g} {report.UNITS[metric]}" for metric, value in totals.items()]
        rows.append(["crossbars", precision, ", ".join(values)])
    return {
        "schema": "mdsnn.demo/1",
        "seed": seed,
        "agrees": verified["agrees"] and not verified["constants"],
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_memory_MB": None if peak is None else peak / 1e6,
        "machine": machine(),
        "accuracy": {
            "teacher": teacher["live_accuracy"],
            "student_alone_frozen": plain["frozen_accuracy"],
            "student_live": student["live_accuracy"],
            "student_frozen": student["frozen_accuracy"],
            "executors": verified["accuracy"],
        },
        "verify": {key: verified[key] for key in ("samples", "compared", "differing", "executors")},
        "bytes": sizes,
        "speed": speed["rows"],
        "spike_density": {a["layer"]: a["density"] for a in speed["activity"]},
        "hardware": hardware,
        "table": {"headers": ["what", "of", "value"], "rows": rows},
    }

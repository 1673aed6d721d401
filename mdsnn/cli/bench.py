"""`mdsnn bench`: how fast each executor is, after checking that their integers are equal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .options import (
    EXECUTORS,
    JsonCommand,
    check_environment,
    check_outputs,
    extra,
    force_option,
    json_option,
    read_data,
    write_json,
)
from .terminal import progress, say, table, tell

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mdsnn.kernels.network import IntegerNetwork

ONNX_FLOAT = "onnx-float"
"""ONNX Runtime again, with float32 carriers, which are exact here and which it runs faster."""
TIMED = (*EXECUTORS, ONNX_FLOAT)

Runner = Callable[["npt.NDArray[np.uint8]"], "npt.NDArray[np.int32]"]


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="ARTIFACT")
@click.option("--checkpoint", help="Time frozen PyTorch too, from this student checkpoint.")
@click.option(
    "--data",
    default="auto",
    show_default=True,
    help="builtin:digits, a data set or an .npy file; auto: the built-in digits if they fit, else random pixels.",
)
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option("--executors", help=f"Comma-separated, of {', '.join(TIMED)}; default: all that are there.")
@click.option("--batch-size", default="1,64", show_default=True, help="Images a call, comma-separated.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 1024), help="CPU threads.")
@click.option(
    "--repeats",
    default=7,
    show_default=True,
    type=click.IntRange(3, 10_000),
    help="Rounds; the median counts.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Instead: where the C engine's time goes, by operation and stage, beside what this processor can do at most.",
)
@click.option("--picture", metavar="FILE", help="With --profile: draw it to FILE, as SVG.")
@json_option
@force_option
def command(
    artifact: str,
    checkpoint: str | None,
    data: str,
    data_path: str | None,
    executors: str | None,
    batch_size: str,
    threads: int,
    repeats: int,
    profile: bool,
    picture: str | None,
    json_file: str | None,
    force: bool,
) -> None:
    """Time the executors of ARTIFACT on real data, interleaved, medians of REPEATS rounds.

    What is timed is first checked: any logit that differs from the NumPy reference stops the benchmark (exit 1).

    \b
    Examples:
      mdsnn bench builtin:digits
      mdsnn bench student.mdsnn --checkpoint student/model.ckpt --data digits --executors native,torch
      mdsnn bench student.mdsnn --profile --picture profile.svg
    """
    check_outputs([json_file, picture], force=force, inputs=[artifact, checkpoint])
    sizes = _sizes(batch_size)
    if picture is not None and not profile:
        raise click.UsageError("--picture draws a profile: add --profile")
    if profile:
        if executors is not None or checkpoint is not None or threads != 1:
            raise click.UsageError("--profile is of the C engine on one thread: leave out --executors, --threads, ...")
        measured = measure_profile(artifact, data=data, data_path=data_path)
        if picture is not None:
            from mdsnn.kernels.files import write_text

            from . import roofline

            write_text(picture, roofline.picture(measured), force=force)
        if not write_json(measured, json_file, force=force):
            show_profile(measured)
        return
    names = None if executors is None else tuple(executors.split(","))
    document = measure(
        artifact,
        checkpoint=checkpoint,
        data=data,
        data_path=data_path,
        executors=names,
        batch_sizes=sizes,
        threads=threads,
        repeats=repeats,
    )
    if not write_json(document, json_file, force=force):
        show(document)
    if not document["equal"]:
        raise click.exceptions.Exit(1)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:7]) <= 4096 for part in parts):
        raise click.BadParameter(f"{text!r} is no list of batch sizes in 1..4096, such as 1,64")
    return tuple(int(part) for part in parts)


def show(document: dict[str, Any]) -> None:
    """Print the measurements, and the activity behind them; or who differs, and then nothing was timed."""
    for name, reason in document["left_out"].items():
        say(f"left out: {name}: {reason}")
    if not document["equal"]:
        tell(
            f"logits differ from the NumPy reference: {', '.join(document['differs'])}; nothing was timed."
            " `mdsnn verify` says where"
        )
        return
    rows = [
        [
            r["executor"],
            r["batch"],
            f"{r['ms_per_image']:.4f}",
            f"{r['images_per_s']:.0f}",
            f"{r['spread_percent']:.0f}%",
        ]
        for r in document["rows"]
    ]
    title = f"{document['threads']} thread(s), median of {document['repeats']}, logits checked equal first"
    table(["executor", "batch", "ms/image", "images/s", "spread"], rows, title)
    rows = [[a["layer"], a["neurons"], f"{100 * a['density']:.2f}%"] for a in document["activity"]]
    table(["LIF layer", "neurons", "neuron-steps that fire"], rows)


def measure_profile(path: str, *, data: str = "auto", data_path: str | None = None) -> dict[str, Any]:
    """Time of every operation of the C engine, a sample at a time on one thread (schema mdsnn.profile/1)."""
    from dataclasses import asdict

    from mdsnn.export import artifact
    from mdsnn.kernels import profile

    from .doctor import machine

    network = artifact.load(path)
    pixels = _pixels(network, data, data_path)
    found = profile.profile(network, pixels[..., :1, :, :, :])
    layers = []
    for layer in found.layers:
        row: dict[str, Any] = {"name": layer.name, "method": layer.method}
        row |= {f"{stage}_ms": ms for stage, ms in zip(profile.STAGES, layer.ms, strict=True)}
        row |= {"total_ms": layer.total_ms, "ceiling_ms": layer.ceiling_ms}
        row["ceiling_share"] = layer.ceiling_ms / layer.total_ms if layer.total_ms else 0.0
        row |= {"bound": layer.bound, "work": layer.work, "weight_bytes": layer.weight_bytes}
        layers.append(row)
    return {
        "schema": "mdsnn.profile/1",
        "artifact": path,
        "machine": machine(),
        "isa": found.isa,
        "run_ms": found.run_ms,
        "ceiling_ms": found.ceiling_ms,
        "ceilings_per_s": asdict(found.ceilings),
        "stages": list(profile.STAGES),
        "layers": layers,
    }


def show_profile(document: dict[str, Any]) -> None:
    """Print a profile: an operation a row, and what bounds those that add or multiply."""
    stages = document["stages"]
    rows = []
    for layer in document["layers"]:
        times = [f"{layer[f'{stage}_ms']:.4f}" for stage in stages] + [f"{layer['total_ms']:.4f}"]
        limit = [f"{layer['ceiling_ms']:.4f}", f"{layer['ceiling_share']:.0%}", layer["bound"]]
        rows.append([layer["name"], layer["method"], *times, *(limit if layer["ceiling_ms"] else ["", "", ""])])
    sums = [sum(layer[f"{stage}_ms"] for layer in document["layers"]) for stage in stages]
    total = sum(sums)
    last = [f"{value:.4f}" for value in (*sums, total, document["ceiling_ms"])]
    rows.append(["all", "", *last, f"{document['ceiling_ms'] / total:.0%}", ""])
    title = (
        f"one sample, one thread, {document['isa']}: {document['run_ms']:.3f} ms with Python's share; ms by operation,"
        " the least of each"
    )
    table(["operation", "method", *stages, "total", "ceiling", "share", "bound by"], rows, title)
    rates = document["ceilings_per_s"]
    units = {"byte_adds": "G byte adds/s", "pair_products": "G products/s in pairs", "tile_products": "G/s in tiles"}
    known = [f"{rates[name] / 1e9:.0f} {unit}" for name, unit in units.items() if rates[name]]
    tell(f"measured here at most: {', '.join(known)}, {rates['weight_reads'] / 1e9:.1f} GB/s of weights")


def prepare(
    network: IntegerNetwork, names: tuple[str, ...] | None, checkpoint: str | None, threads: int
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Runners by executor name, and why the others were left out. A chosen one that is missing is an error."""
    from mdsnn.kernels import Engine, engine
    from mdsnn.kernels.errors import ConfigError, InputError, MdsnnError

    for name in names or ():
        if name not in TIMED:
            raise ConfigError(f"executor {name!r} is none of {', '.join(TIMED)}")
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"executors {','.join(names)!r}: name each once")

    def make(name: str) -> Runner:
        if name in engine.KERNELS:
            runner = Engine(network, name, threads)
            return lambda pixels: runner.run(pixels).logits
        if name in ("onnx", ONNX_FLOAT):
            module = extra("train", "mdsnn.export.onnx")
            model = module.to_onnx(network, carrier="int" if name == "onnx" else "float")
            logits: Runner = module.OnnxExecutor(model, threads=threads).logits
            return logits
        if checkpoint is None:
            raise InputError("the executor 'torch' needs --checkpoint, the student this artifact was exported from")
        return _torch(checkpoint, threads)

    runners: dict[str, Runner] = {}
    left_out: dict[str, str] = {}
    for name in names or TIMED:
        try:
            runners[name] = make(name)
        except MdsnnError as fault:
            if names is not None:
                raise
            left_out[name] = str(fault)
    return runners, left_out


def _torch(checkpoint: str, threads: int) -> Runner:
    """Frozen PyTorch on a student checkpoint, logits only."""
    from .export import frozen_student

    torch = extra("train", "torch")
    torch.set_num_threads(threads)
    model, _ = frozen_student(checkpoint)

    def run(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        with torch.no_grad():
            logits: npt.NDArray[np.int32] = model(torch.from_numpy(pixels)).numpy()
        return logits

    return run


def measure(
    path: str,
    *,
    checkpoint: str | None = None,
    data: str = "auto",
    data_path: str | None = None,
    executors: tuple[str, ...] | None = None,
    batch_sizes: tuple[int, ...] = (1, 64),
    threads: int = 1,
    repeats: int = 7,
) -> dict[str, Any]:
    """Check equal logits, then time every executor, interleaved (schema mdsnn.bench/1)."""
    import numpy as np

    from mdsnn.export import artifact
    from mdsnn.kernels import Engine

    from .doctor import machine

    check_environment()
    network = artifact.load(path)
    pixels = _pixels(network, data, data_path)
    axis = pixels.ndim - 4
    runners, left_out = prepare(network, executors, checkpoint, threads)
    result = Engine(network, "reference", 1).run(pixels)
    equal = {name: bool(np.array_equal(run(pixels), result.logits)) for name, run in runners.items()}
    rows: list[dict[str, Any]] = []
    if all(equal.values()):
        with progress("timing") as tick:
            for place, size in enumerate(batch_sizes):
                count = pixels.shape[axis]
                batch = np.ascontiguousarray(np.take(pixels, np.arange(size) % count, axis=axis))
                times: dict[str, list[float]] = {name: [] for name in runners}
                for repeat in range(repeats):
                    for name, run in runners.items():
                        times[name].append(_time(run, batch))
                    tick(place * repeats + repeat + 1, len(batch_sizes) * repeats)
                for name, seconds in times.items():
                    median = statistics.median(seconds)
                    rows.append(
                        {
                            "executor": name,
                            "batch": size,
                            "ms_per_image": 1e3 * median / size,
                            "images_per_s": size / median,
                            "spread_percent": 100 * (max(seconds) - min(seconds)) / median,
                        }
                    )
    activity = [
        {"layer": lif.name, "neurons": result.activity.neurons[lif.name], "density": result.activity.density(lif.name)}
        for lif in network.lifs
    ]
    return {
        "schema": "mdsnn.bench/1",
        "artifact": path,
        "samples_checked": int(pixels.shape[axis]),
        "equal": all(equal.values()),
        "differs": [name for name, same in equal.items() if not same],
        "threads": threads,
        "repeats": repeats,
        "machine": machine(),
        "rows": rows,
        "left_out": left_out,
        "activity": activity,
    }


def _pixels(network: IntegerNetwork, data: str, data_path: str | None) -> npt.NDArray[np.uint8]:
    import numpy as np

    spec = network.input
    if data == "auto":
        if spec.coding == "image" and (spec.channels, spec.height, spec.width) == (1, 8, 8):
            return read_data(network, "builtin:digits")[0]
        say("no data named (--data): timing on random pixels, whose sparsity is not that of real data")
        shape: tuple[int, ...] = (16, spec.channels, spec.height, spec.width)
        if spec.coding == "events":
            shape = (network.timesteps, *shape)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels, _ = read_data(network, data, data_path, limit=64)
    return pixels


def _time(run: Runner, batch: npt.NDArray[np.uint8]) -> float:
    """Seconds of one run, repeated until 5 ms have passed so that the clock's grain does not show."""
    calls, start = 0, time.perf_counter()
    while True:
        run(batch)
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= 5e-3:
            return elapsed / calls

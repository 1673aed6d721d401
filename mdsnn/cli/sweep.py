"""`mdsnn sweep`: energy, delay and area over a grid of chip settings, and the settings that nothing beats."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mdsnn.kernels.errors import ConfigError, EnvironmentFault, InputError, MdsnnError

from .options import (
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
from .workload import Described, described, workload_options

if TYPE_CHECKING:
    from mdsnn.hwsim.sweep import PointFile

F = TypeVar("F", bound=Callable[..., Any])

AXES = {
    "rows": "Crossbar rows, and columns unless --columns is varied too.",
    "columns": "Crossbar columns.",
    "adc-bits": "ADC resolution.",
    "adc-share": "Columns that take turns at one ADC.",
    "cell-bits": "Bits of a cell.",
    "scheme": "kernel-split, im2col or both.",
    "coding": "offset, differential or both.",
    "pes": "Processing elements a tile.",
}
"""The axes of hwsim.sweep and what they mean."""
METRICS = ("energy_uJ", "latency_ms", "area_mm2", "EDAP_mJ_ms_mm2")
MANY = 500
"""From so many cheap points on, processes are worth their start."""
SHOWN = 20


def _axis_options(function: F) -> F:
    for name, text in reversed(AXES.items()):
        example = "A,B" if name in ("scheme", "coding") else "4,8 or 4..8"
        function = click.option(f"--{name}", metavar=f"[{example}]", help=text)(function)
    return function


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="[ARTIFACT]", required=False)
@click.option("--chip", default="fefet32", show_default=True, help="A chip of model physical, or your own .toml file.")
@_axis_options
@click.option("-o", "--output", metavar="FILE.csv|.jsonl", help="All points; written now and then while it runs.")
@click.option("--resume", is_flag=True, help="Go on with the points that FILE holds.")
@click.option("--data", default="builtin:digits", show_default=True, help="Whose spikes: a data set or an .npy file.")
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option("--limit", default=256, show_default=True, type=click.IntRange(1), help="At most so many samples.")
@click.option(
    "--analog",
    metavar="TRIALS",
    type=click.IntRange(1, 10_000),
    help="Also the accuracy on the chip's devices, over so many programmings a point.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the programmings.")
@workload_options
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes; default: all cores where that pays.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Compute on the workers of this Dask scheduler instead.")
@json_option
@force_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    artifact: str | None,
    chip: str,
    output: str | None,
    resume: bool,
    data: str,
    data_path: str | None,
    limit: int,
    analog: int | None,
    seed: int,
    jobs: int | None,
    scheduler: str | None,
    json_file: str | None,
    force: bool,
    **axes: Any,
) -> None:
    """Price ARTIFACT, or a built-in workload, at every combination of chip settings, and mark the Pareto front.

    An axis takes values (32,64,128) or a range (4..10); without any the sweep is empty. A stopped sweep goes on with
    --resume. The front is what nothing beats in energy, latency and area (and accuracy, with --analog).

    \b
    Examples:
      mdsnn sweep --workload ms-resnet18 --input 2x48x48 --T 10 --rows 32,64,128 --adc-bits 4..10 -o points.csv
      mdsnn sweep builtin:digits --rows 32,64 --adc-bits 4..10 --analog 5 -o points.jsonl
      mdsnn sweep student.mdsnn --cell-bits 1,2,4 -o points.jsonl --scheduler tcp://192.168.0.10:8786
    """
    inputs = [artifact, chip, data if data.endswith(".npy") else None]
    check_outputs([output, json_file], force=force or resume, inputs=inputs)
    check_outputs([json_file], force=force)
    if resume and output is None:
        raise click.UsageError("--resume goes on with the points of -o FILE; name it", ctx)
    subject = described(ctx, only_with_artifact=("data", "data_path", "limit", "analog", "seed"))
    texts = {name: axes[name.replace("-", "_")] for name in AXES if axes[name.replace("-", "_")] is not None}
    if scheduler is not None:
        extra("report", "mdsnn.hwsim.processes").check_address(scheduler)
    document = run(
        str(artifact) if subject is None else subject,
        texts,
        chip=chip,
        output=output,
        resume=resume,
        data=data,
        data_path=data_path,
        limit=limit,
        analog=analog,
        seed=seed,
        jobs=jobs,
        scheduler=scheduler,
        force=force,
    )
    if output is not None:
        say(f"wrote {output}")
    if document["possible"] == 0:
        raise ConfigError(f"none of the {len(document['points'])} points is possible; {document['points'][0]['error']}")
    if not write_json(document, json_file, force=force):
        show(document)


def run(
    subject: str | Described,
    texts: Mapping[str, str],
    *,
    chip: str = "fefet32",
    output: str | None = None,
    resume: bool = False,
    data: str = "builtin:digits",
    data_path: str | None = None,
    limit: int | None = 256,
    analog: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    scheduler: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Sweep an artifact (its path) or a built-in workload over axes given as text (schema mdsnn.sweep/1)."""
    sweeping = extra("report", "mdsnn.hwsim.sweep")
    the_chip = extra("report", "mdsnn.hwsim.config").load_chip(chip)
    the_chip.require("physical")
    axes = {name: sweeping.parse_axis(name, text) for name, text in texts.items()}
    if not axes:
        raise ConfigError("the sweep is empty: give at least one axis, such as --rows 32,64,128 or --adc-bits 4..10")
    count = len(sweeping.grid_of(axes))
    plan = None
    if isinstance(subject, Described):
        workload, loads = subject.workload, sweeping.uniform_loads(subject.workload, subject.density)
    else:
        from mdsnn.export import artifact

        check_environment()
        network = artifact.load(subject)
        pixels, labels = read_data(network, data, data_path, limit)
        workload = extra("report", "mdsnn.hwsim.mapping").from_network(network, os.path.basename(subject))
        say(f"measuring activity on {data} for every crossbar")
        loads = sweeping.measured_loads(network, workload, pixels, data)
        if analog is not None:
            if labels is None:
                raise InputError(f"{data}: holds no labels, so that nothing can be called accurate; name a data set")
            plan = sweeping.Analog.of(network, pixels, labels, trials=analog, seed=seed)
    if jobs is None:
        many = plan is not None or count >= MANY
        jobs = extra("report", "mdsnn.hwsim.processes").cores() if many else 1
    file: PointFile | None = None
    if output is not None:
        file = sweeping.PointFile(output, axes, analog=plan is not None, resume=resume, force=force)
    reached = 0

    def advance(done: int, total: int) -> None:
        nonlocal reached
        reached = done
        tick(done, total)

    try:
        with progress("sweeping") as tick:
            points = sweeping.sweep(
                workload,
                the_chip,
                axes,
                loads,
                analog=plan,
                jobs=jobs,
                scheduler=scheduler,
                done=file.done if file else (),
                keep=file.keep if file else None,
                progress=advance,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_kept(file, reached, count)}") from None
    except EnvironmentFault as fault:
        raise type(fault)(f"{fault}{_kept(file, reached, count)}") from fault
    if file is not None:
        file.finish(points)
    return {
        "schema": "mdsnn.sweep/1",
        "workload": workload.name,
        "chip": the_chip.name,
        "axes": {name: list(values) for name, values in axes.items()},
        "possible": sum(point["error"] is None for point in points),
        "points": points,
    }


def _kept(file: PointFile | None, reached: int, count: int) -> str:
    """Write what is done, and say how to go on."""
    if not (reached if file is None else file.count):
        return ""
    if file is None:
        return f"; {reached} of {count} points were done and are lost, for no -o FILE was named"
    try:
        file.save()
    except MdsnnError as fault:
        return f"; the points that were done are not kept: {fault}"
    return f"; {file.path} holds {file.count} of {count} points, and --resume goes on"


def show(document: dict[str, Any]) -> None:
    """Print the Pareto front, least EDAP first, and what was impossible."""
    points: Sequence[dict[str, Any]] = document["points"]
    front = sorted((p for p in points if p["pareto"]), key=lambda p: p["EDAP_mJ_ms_mm2"])
    axes = list(document["axes"])
    analog = bool(front) and "accuracy" in front[0]
    rows = []
    for point in front[:SHOWN]:
        row = [point[name] for name in axes] + [f"{point[name]:.4g}" for name in METRICS] + [point["adc_bits_needed"]]
        if analog:
            low, high = 100 * point["accuracy_low"], 100 * point["accuracy_high"]
            row.append(f"{100 * point['accuracy']:.1f} [{low:.1f}, {high:.1f}]")
        rows.append(row)
    heads = [*axes, "uJ", "ms", "mm2", "EDAP mJ ms mm2", "lossless ADC", *(["accuracy %"] if analog else [])]
    table(heads, rows, title=f"Pareto front of {document['workload']} on {document['chip']}, least EDAP first")
    left = f", {len(front) - SHOWN} of the front not shown" if len(front) > SHOWN else ""
    tell(f"{len(points)} points, {len(front)} on the front, {len(points) - document['possible']} impossible{left}")
    impossible = next((p["error"] for p in points if p["error"] is not None), None)
    if impossible is not None and document["possible"]:
        tell(f"the first impossible one: {impossible}")

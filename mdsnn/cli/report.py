"""`mdsnn report`: energy, latency and area of an artifact on a crossbar chip."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from mdsnn.kernels.errors import ConfigError

from .options import JsonCommand, check_outputs, extra, force_option, json_option, read_data, write_json
from .terminal import progress, say
from .workload import Described, described, workload_options

if TYPE_CHECKING:
    from mdsnn.hwsim.report import Report

UNITS = {
    "energy_uJ": "uJ/image",
    "latency_ms": "ms/image",
    "area_mm2": "mm2",
    "TOPS_per_W": "TOPS/W",
    "TOPS_per_mm2": "TOPS/mm2",
    "EDAP_mJ_ms_mm2": "mJ ms mm2 EDAP",
}
"""Totals that a summary shows, and how it writes their units."""

MEASURE = "data"
"""The --activity that measures."""


@click.command(cls=JsonCommand)
@click.argument("artifact", metavar="[ARTIFACT]", required=False)
@click.option(
    "--chip", default="fefet32", show_default=True, help="A shipped chip (mdsnn chips) or your own .toml file."
)
@click.option(
    "--model", type=click.Choice(["physical", "spikesim"]), help="Cost model; default: the one the chip names."
)
@click.option("-o", "--output", metavar="FILE.html", help="The report as one self-contained page.")
@click.option("--csv", "csv_file", metavar="FILE.csv", help="The per-layer table.")
@click.option("--data", default="builtin:digits", show_default=True, help="Whose spikes: a data set or an .npy file.")
@click.option("--data-path", help="Where the data set lies, for those that need it.")
@click.option("--limit", default=256, show_default=True, type=click.IntRange(1), help="At most so many samples.")
@click.option(
    "--activity",
    default="data",
    show_default=True,
    metavar="data|FILE.npz",
    help="Measure on --data, or take activity that --save-activity kept.",
)
@click.option("--save-activity", metavar="FILE.npz", help="Keep the measured activity for later reports.")
@click.option(
    "--compare",
    multiple=True,
    metavar="OTHER.mdsnn",
    help="Set another artifact beside this one, always measured on --data; may be repeated.",
)
@workload_options
@json_option
@force_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    artifact: str | None,
    chip: str,
    model: str | None,
    output: str | None,
    csv_file: str | None,
    data: str,
    data_path: str | None,
    limit: int,
    activity: str,
    save_activity: str | None,
    compare: tuple[str, ...],
    json_file: str | None,
    force: bool,
    **_workload: object,
) -> None:
    """Map ARTIFACT onto the crossbars of a chip and say what it costs, with spikes measured on real data.

    Without -o it prints one screen. Every constant in the report carries its source. Without an artifact, --workload
    explores a chip before any training, with spikes of an assumed density.

    \b
    Examples:
      mdsnn report builtin:digits --chip fefet32
      mdsnn report student.mdsnn --data digits -o report.html --csv layers.csv --json report.json
      mdsnn report w4.mdsnn --compare w8.mdsnn --data digits
      mdsnn report --workload ms-resnet18 --input 2x48x48 --T 10 --weight-bits 4 --membrane-bits 4 --density 0.1
    """
    inputs = [artifact, chip, *compare, data if data.endswith(".npy") else None]
    check_outputs(
        [output, csv_file, save_activity, json_file],
        force=force,
        inputs=[*inputs, None if activity == MEASURE else activity],
    )
    for path, endings in ((output, (".html", ".json", ".csv")), (csv_file, (".csv",))):
        if path is not None and not path.endswith(endings):
            raise ConfigError(f"{path}: a report is written as {', '.join(endings)}; this name ends in none of them")
    subject = described(ctx, only_with_artifact=("data", "data_path", "limit", "activity", "save_activity", "compare"))
    if subject is not None:
        report = explore(subject, chip=chip, model=model)
    else:
        report = make(
            str(artifact),
            chip=chip,
            model=model,
            data=data,
            data_path=data_path,
            limit=limit,
            activity=None if activity == MEASURE else activity,
            save_activity=save_activity,
            compare=compare,
            force=force,
        )
    for path in (output, csv_file):
        if path is not None:
            write(report, path, force=force)
            say(f"wrote {path}")
    if not write_json(report.to_dict(), json_file, force=force):
        click.echo(extra("report", "mdsnn.hwsim.report").summary(report))


def explore(subject: Described, *, chip: str = "fefet32", model: str | None = None) -> Report:
    """The report of a built-in workload, with spikes of an assumed density."""
    the_chip = extra("report", "mdsnn.hwsim.config").load_chip(chip)
    reporting = extra("report", "mdsnn.hwsim.report")
    rows, scheme = _mapping(the_chip)
    load = extra("report", "mdsnn.hwsim.activity").uniform(subject.workload, subject.density, rows=rows, scheme=scheme)
    report: Report = reporting.build_report(subject.workload, load, the_chip, model=model)
    return report


def make(
    path: str,
    *,
    chip: str = "fefet32",
    model: str | None = None,
    data: str = "builtin:digits",
    data_path: str | None = None,
    limit: int | None = 256,
    activity: str | None = None,
    save_activity: str | None = None,
    compare: tuple[str, ...] = (),
    force: bool = False,
) -> Report:
    """The report of an artifact, with activity measured on `data` or read from a file.

    compare  other artifacts to set beside it, always measured on `data`; the report notes it if that is not what the
             activity file was measured on
    """
    from mdsnn.export import artifact

    config = extra("report", "mdsnn.hwsim.config")
    measuring = extra("report", "mdsnn.hwsim.activity")
    reporting = extra("report", "mdsnn.hwsim.report")
    network = artifact.load(path)
    the_chip = config.load_chip(chip)
    others = [(other, artifact.load(other)) for other in compare]
    if others and (model or the_chip.model) != "physical":
        raise ConfigError("--compare needs model physical; model spikesim knows no precision")
    accuracies: Any = ()
    rows, scheme = _mapping(the_chip)
    if activity is not None:
        measured = measuring.load_activity(activity, network)
    else:
        pixels, labels = read_data(network, data, data_path, limit)
        with progress("measuring activity") as tick:
            measured = measuring.measure(network, pixels, rows=rows, scheme=scheme, source=data, progress=tick)
        if labels is not None and (model or the_chip.model) == "physical":
            accuracies = extra("report", "mdsnn.hwsim.crossbar").adc_accuracy(network, pixels, labels, the_chip)
    if save_activity is not None:
        measuring.save_activity(save_activity, measured, force=force)
    beside = []
    for name, other in others:
        pixels, _ = read_data(other, data, data_path, limit)
        with progress(f"measuring {name}") as tick:
            theirs = measuring.measure(other, pixels, rows=rows, scheme=scheme, source=data, progress=tick)
        beside.append((name, other, theirs))
    workload = extra("report", "mdsnn.hwsim.mapping").from_network(network, os.path.basename(path))
    report: Report = reporting.build_report(workload, measured, the_chip, model=model, adc=accuracies, compare=beside)
    for note in reporting.unlike_activity(report.precisions):
        say(note)
    return report


def _mapping(chip: Any) -> tuple[int, str]:
    """Rows and scheme that activity is counted for: the chip's, or SpikeSim's."""
    scheme = chip.choice("mapping.scheme") if "mapping.scheme" in chip.constants else "kernel-split"
    return chip.integer("crossbar.rows"), scheme


def write(report: Report, path: str, *, force: bool = False) -> None:
    """Write the report as .html, .json or .csv, as the name says."""
    from mdsnn.kernels.files import write_text

    reporting = extra("report", "mdsnn.hwsim.report")
    if path.endswith(".html"):
        text = reporting.render_html(report)
    elif path.endswith(".json"):
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    elif path.endswith(".csv"):
        text = reporting.to_csv(report)
    else:
        raise ConfigError(f"{path}: a report is written as .html, .json or .csv")
    write_text(path, text, force=force)


def totals(report: Report) -> dict[str, dict[str, float]]:
    """The six totals by precision, the network's own first: precision -> metric -> value."""
    rows = report.precisions or [{"name": "this network", "basis": "own", **report.totals}]
    return {
        row["name"] + (" (projected)" if row["basis"] == "projected" else ""): {key: row[key] for key in UNITS}
        for row in rows
    }

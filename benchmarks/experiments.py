"""The ablations of MD-SNN's Tables IV and V, over seeds: what each part of the distillation brings, at each T.

    python benchmarks/experiments.py --table V --data digits --json benchmarks/results/experiments.json
    python benchmarks/report.py --experiments benchmarks/results/experiments.json

For each seed one full-precision teacher of T timesteps guides the students of every t <= T (section IV-C, the versatile
teacher). The students of a seed differ only in what Eq. 7 adds to the cross-entropy:

    quantized              nothing                   logits + membranes, KL    Eqs. 9 and 6
    logits                 Eq. 9                     logits + membranes, MSE   Eq. 9 and Table IV's baseline, at T only

All start from the teacher's weights, the one without distillation too, and take as many epochs, so that a difference is
the loss's. Accuracy is the frozen, integer network's, of the last epoch, run by the engine from the lowered file;
spikes are counted in the same run. `--table IV` trains KL and MSE at T only; `--table V` trains all and prints both.
Resumable: a training that is finished is kept, one that was stopped goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click

from mdsnn.cli import export, train
from mdsnn.cli.doctor import machine
from mdsnn.cli.options import extra
from mdsnn.cli.terminal import say, table
from mdsnn.kernels import Engine
from mdsnn.kernels.errors import MdsnnError
from mdsnn.kernels.files import check_writable, make_folder, write_text

SCHEMA = "mdsnn.experiments/1"
KL, MSE = "logits + membranes, KL", "logits + membranes, MSE"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantized": ("student", {"start": "teacher"}),
    "logits": ("qamd", {"loss": "CL"}),
    KL: ("qamd", {"loss": "CLK"}),
    MSE: ("qamd", {"loss": "CLM"}),
}
"""Setting and recipe fields of each kind of student."""


def cells(tables: Sequence[str], window: int) -> list[tuple[str, int]]:
    """(method, t) of every student that the tables need, for a teacher of `window` timesteps; the longest first."""
    found = [(KL, window), (MSE, window)]
    if "V" in tables:
        found += [
            (name, t) for t in range(window, 0, -1) for name in METHODS if name != MSE and (name, t) != (KL, window)
        ]
    return found


def train_teacher(seed: int, common: dict[str, Any], out: str) -> dict[str, Any]:
    """The teacher of a seed: {"checkpoint", "accuracy"}."""
    changes = {**common, "seed": seed, "save_path": str(Path(out) / f"seed-{seed}" / "teacher")}
    done = train.run("original", changes.pop("data"), changes, resume=True, label=f"seed {seed}, teacher")
    return {"checkpoint": done["checkpoint"], "accuracy": done["live_accuracy"]}


def train_student(seed: int, method: str, t: int, teacher: str, common: dict[str, Any], out: str) -> dict[str, Any]:
    """One student, trained, frozen, lowered and run by the engine on all test images."""
    from mdsnn import data as datasets

    setting, fields = METHODS[method]
    folder = Path(out) / f"seed-{seed}" / f"{method.replace(' + ', '-').replace(', ', '-').lower()}-t{t}"
    changes = {**common, **fields, "seed": seed, "timesteps": t, "teacher_path": teacher, "save_path": str(folder)}
    name = changes.pop("data")
    done = train.run(setting, name, changes, resume=True, label=f"seed {seed}, {method}, t = {t}")
    network = export.lower_checkpoint(done["checkpoint"])
    data = datasets.load(name, changes.get("data_path"))
    pixels = data.test_x if data.coding == "image" else data.test_x[:t]
    result = Engine(network, threads=1).run(pixels)
    activity = result.activity
    spikes = sum(int(counts.sum()) for counts in activity.spikes_out.values())
    return {
        "method": method,
        "t": t,
        "frozen": float((result.predictions == data.test_y).mean()),
        "torch_frozen": done["frozen_accuracy"],
        "spikes_per_neuron": spikes / (activity.samples * sum(activity.neurons.values())),
        "samples": activity.samples,
    }


def _parallel(function: Any, calls: list[tuple[Any, ...]], processes: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(arguments, result) of each call as it comes; Ctrl-C drops what has not begun."""
    with ProcessPoolExecutor(processes) as pool:
        pending = {pool.submit(function, *call): call for call in calls}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds (0 for one seed, which has none)."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def summarize(document: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The tables of a result document: title -> (heads, rows), mean and standard error over seeds in percent."""
    seeds = document["seeds"]

    def over(method: str, t: int, what: str) -> tuple[float, float]:
        return mean_and_error(
            [
                student[what]
                for seed in seeds
                for student in seed["students"]
                if (student["method"], student["t"]) == (method, t)
            ]
        )

    def share(pair: tuple[float, float]) -> str:
        return f"{100 * pair[0]:.2f} ± {100 * pair[1]:.2f} %"

    window, bits = document["timesteps"], document["bits"]
    known = {(student["method"], student["t"]) for student in seeds[0]["students"]}
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    steps = sorted({t for method, t in known if method == "quantized"})
    if steps:
        rows = [[name, *(share(over(name, t, "frozen")) for t in steps)] for name in METHODS if name != MSE]
        tables[f"Table V: frozen W{bits}U{bits} accuracy by what is distilled"] = (
            ["student", *(f"T = {t}" for t in steps)],
            rows,
        )
    rows = []
    for name in (KL, MSE):
        spikes = over(name, window, "spikes_per_neuron")
        rows.append([name, share(over(name, window, "frozen")), f"{spikes[0]:.3f} ± {spikes[1]:.3f}"])
    tables[f"Table IV: KL against MSE, T = {window}"] = (["student", "frozen accuracy", "spikes a neuron"], rows)
    return tables


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--table", "tables", multiple=True, type=click.Choice(["IV", "V"]), default=["V"], show_default=True)
@click.option("--data", default="digits", show_default=True, help="A data set, as of mdsnn train.")
@click.option("--data-path", help="Where its files lie.")
@click.option(
    "--time-window", "window", default=4, show_default=True, type=click.IntRange(1, 64), help="The teacher's T."
)
@click.option("--bits", default=4, show_default=True, type=click.IntRange(2, 8), help="Of weights and membranes.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="A recipe field for every training; repeatable."
)
@click.option("--out", default="runs/experiments", show_default=True, help="Where the trainings lie.")
@click.option("--json", "json_file", default="runs/experiments/result.json", show_default=True, help="The results.")
@click.option("--processes", default=2, show_default=True, type=click.IntRange(1, 64), help="One thread each.")
@click.option("--force", is_flag=True, help="Replace the results file.")
def main(
    tables: tuple[str, ...],
    data: str,
    data_path: str | None,
    window: int,
    bits: int,
    seeds: int,
    changes: tuple[str, ...],
    out: str,
    json_file: str,
    processes: int,
    force: bool,
) -> None:
    """Train every teacher and student of the tables, then print and write them; exit 1 if executors differ."""
    extra("train", "mdsnn.train")
    make_folder(Path(json_file).parent)
    check_writable(json_file, force=force)
    common = {"data": data, "data_path": data_path, "threads": 1, **train.recipe_fields(changes)}
    teachers: dict[int, dict[str, Any]] = {}
    calls: list[tuple[Any, ...]] = [(seed, {**common, "timesteps": window}, out) for seed in range(seeds)]
    for call, teacher in _parallel(train_teacher, calls, processes):
        teachers[call[0]] = teacher
        say(f"teacher of seed {call[0]}: {100 * teacher['accuracy']:.2f} % ({len(teachers)} of {seeds})")
    wanted = cells(tables, window)
    calls = [
        (seed, method, t, teachers[seed]["checkpoint"], {**common, "bits": bits}, out)
        for method, t in wanted
        for seed in range(seeds)
    ]
    students: dict[int, list[dict[str, Any]]] = {seed: [] for seed in range(seeds)}
    for count, (call, student) in enumerate(_parallel(train_student, calls, processes), 1):
        students[call[0]].append(student)
        say(f"[{count}/{len(calls)}] seed {call[0]}, {call[1]}, t = {call[2]}: {100 * student['frozen']:.2f} % frozen")
    document = {
        "schema": SCHEMA,
        "data": data,
        "bits": bits,
        "timesteps": window,
        "settings": list(changes),
        "machine": machine(),
        "seeds": [
            {
                "seed": seed,
                "teacher": teachers[seed]["accuracy"],
                "students": sorted(students[seed], key=lambda row: (list(METHODS).index(row["method"]), row["t"])),
            }
            for seed in range(seeds)
        ],
    }
    write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n", force=force)
    for title, (heads, rows) in summarize(document).items():
        table(heads, rows, f"\n{title}")
    say(f"\nwrote {json_file}")
    differ = [row for rows in students.values() for row in rows if row["frozen"] != row["torch_frozen"]]
    if differ:
        say(f"the engine and frozen PyTorch differ for {len(differ)} students; run mdsnn verify on them")
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except MdsnnError as fault:
        click.echo(f"experiments: error: {fault}", err=True)
        sys.exit(fault.exit_code)

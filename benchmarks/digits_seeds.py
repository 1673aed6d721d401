"""Five seeds on the digits: accuracy, firing rates, and mismatches between all executors, at W4/U4 and W8/U8.

    python benchmarks/digits_seeds.py --out runs/seeds --json benchmarks/results/digits_seeds.json
    python benchmarks/report.py --seeds benchmarks/results/digits_seeds.json

For each seed a teacher, a distilled W4/U4 and W8/U8 student, and the W4/U4 student without distillation, by the demo's
recipes; the students are exported and verified on all 450 test images in five executors. Networks are those of
the last epoch; nothing is chosen by test accuracy. Resumable: finished trainings in --out are kept.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click

from mdsnn.cli import export, train, verify
from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import say
from mdsnn.export import artifact
from mdsnn.kernels.files import check_writable, make_folder, write_text

SCHEMA = "mdsnn.digits-seeds/1"
STUDENTS = {"W4U4": ("qamd", 4), "W8U8": ("qamd", 8), "W4U4 alone": ("student", 4)}


def one_seed(seed: int, out: str) -> dict[str, Any]:
    """Train, export and verify the networks of one seed."""
    folder = make_folder(Path(out) / str(seed))

    def run(name: str, setting: str, **changes: Any) -> dict[str, Any]:
        settings = {"seed": seed, "threads": 1, "save_path": str(folder / name), **changes}
        return train.run(setting, "digits", settings, resume=True, label=f"seed {seed}, {name}")

    teacher = run("teacher", "original")
    result: dict[str, Any] = {"seed": seed, "teacher": teacher["live_accuracy"], "students": {}}
    for name, (setting, bits) in STUDENTS.items():
        student = run(name.replace(" ", "-"), setting, bits=bits, teacher_path=teacher["checkpoint"])
        path = str(folder / f"{name.replace(' ', '-')}.mdsnn")
        artifact.save(export.lower_checkpoint(student["checkpoint"]), path, force=True)
        checked = verify.check(path, checkpoint=student["checkpoint"], save_dir=str(folder))
        result["students"][name] = {
            "live": student["live_accuracy"],
            "frozen": student["frozen_accuracy"],
            "executors": checked["accuracy"],
            "compared": checked["compared"],
            "differing": checked["differing"],
            "agrees": checked["agrees"] and not checked["constants"],
            "spike_rates": student["spike_rates"],
        }
    return result


@click.command()
@click.option("--out", default="runs/seeds", show_default=True, help="Where the trainings lie.")
@click.option("--json", "json_file", required=True, help="The results.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option("--processes", default=2, show_default=True, type=click.IntRange(1, 64))
@click.option("--force", is_flag=True, help="Replace the results file.")
def main(out: str, json_file: str, seeds: int, processes: int, force: bool) -> None:
    """Run every seed and write the results; exit code 1 if executors disagree."""
    make_folder(Path(json_file).parent)
    check_writable(json_file, force=force)
    with ProcessPoolExecutor(processes) as pool:
        results = list(pool.map(one_seed, range(seeds), [out] * seeds))
    document = {"schema": SCHEMA, "machine": machine(), "samples": 450, "seeds": results}
    write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n", force=force)
    agree = all(student["agrees"] for result in results for student in result["students"].values())
    say(f"wrote {json_file}: executors {'agree' if agree else 'DISAGREE'}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()

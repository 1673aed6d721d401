"""The table of a teacher and its students, from what their runs left in a folder: DIR/table.json and DIR/table.md.

    python benchmarks/runs_table.py DIR

DIR/teacher, DIR/baseline (quantized alone; may be missing) and DIR/mdsnn are the folders of `mdsnn train`;
DIR/verify.json is the result of `mdsnn verify` for the last. benchmarks/report.py puts the table into the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdsnn.kernels.files import read_bounded, write_text

RUNS = {"teacher": "teacher (FP32)", "baseline": "W4U4, no distillation", "mdsnn": "W4U4, MD-SNN"}
SCHEMA = "mdsnn.runs/1"
LARGEST = 1 << 24


def collect(folder: Path) -> dict[str, Any]:
    """The figures of all runs, the machine they ran on, and what verify found (schema mdsnn.runs/1)."""
    runs: dict[str, Any] = {}
    for name in RUNS:
        if name == "baseline" and not (folder / name).exists():
            continue
        document = json.loads(read_bounded(folder / name / "recipe.json", LARGEST, what="recipe"))
        runs[name] = {
            "epochs": document["recipe"]["epochs"],
            "live_accuracy": document["results"]["live_accuracy"],
            "frozen_accuracy": document["results"]["frozen_accuracy"],
            "minutes": document["seconds"] / 60,
            "threads": document["threads"],
            "seconds_per_step": document["seconds_per_step"],
            "spike_rate": _mean(document["results"]["spike_rates"].values()),
        }
    verified = json.loads(read_bounded(folder / "verify.json", LARGEST, what="verification"))
    return {
        "schema": SCHEMA,
        "data": document["recipe"]["data"],
        "machine": document["machine"],
        "versions": document["versions"],
        "precision": document["recipe"].get("precision", "float32"),
        "runs": runs,
        "verify": {key: verified[key] for key in ("samples", "compared", "differing", "agrees")},
    }


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found))


def markdown(document: dict[str, Any]) -> str:
    """The same as a Markdown table."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:.2f} %"

    lines = [
        "| network | epochs | minutes | live | frozen, integer | neuron-steps that fire | ms a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, run in document["runs"].items():
        seconds = run["seconds_per_step"]
        cells = [
            RUNS[name],
            run["epochs"],
            f"{run['minutes']:.1f}",
            percent(run["live_accuracy"]),
            percent(run["frozen_accuracy"]),
        ]
        cells += [percent(run["spike_rate"]), "" if seconds is None else f"{1000 * seconds:.1f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    found, machine = document["verify"], document["machine"]
    threads = max(run["threads"] for run in document["runs"].values())
    on = machine["gpu"] or f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    lines += [
        "",
        f"{found['differing']} of {found['compared']:,} integers differ between executors on {found['samples']:,} test"
        f" images. {document['data']}; {on}; torch {document['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main(folder: str) -> None:
    """Write both files, and print the table."""
    document = collect(Path(folder))
    write_text(Path(folder) / "table.json", json.dumps(document, indent=2) + "\n", force=True)
    write_text(Path(folder) / "table.md", markdown(document), force=True)
    print(markdown(document), end="")


if __name__ == "__main__":
    main(sys.argv[1])

"""The table of cifar10_gpu.sh, from what its runs left in their folder: DIR/cifar10.json and DIR/cifar10.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdsnn.kernels.files import read_bounded, write_text

RUNS = {"teacher": "teacher (FP32)", "baseline": "W4U4, no distillation", "mdsnn": "W4U4, MD-SNN"}
LARGEST = 1 << 24


def collect(folder: Path) -> dict[str, Any]:
    """The figures of all runs, the machine they ran on, and what verify found (schema mdsnn.cifar10/1)."""
    runs: dict[str, Any] = {}
    for name in RUNS:
        document = json.loads(read_bounded(folder / name / "recipe.json", LARGEST, what="recipe"))
        runs[name] = {
            "epochs": document["recipe"]["epochs"],
            "live_accuracy": document["results"]["live_accuracy"],
            "frozen_accuracy": document["results"]["frozen_accuracy"],
            "seconds_per_step": document["seconds_per_step"],
            "spike_rate": _mean(document["results"]["spike_rates"].values()),
        }
    verified = json.loads(read_bounded(folder / "verify.json", LARGEST, what="verification"))
    return {
        "schema": "mdsnn.cifar10/1",
        "data": document["recipe"]["data"],
        "machine": document["machine"],
        "versions": document["versions"],
        "precision": document["recipe"]["precision"],
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
        "| network | epochs | live | frozen, integer | neuron-steps that fire | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in RUNS.items():
        run = document["runs"][name]
        seconds = run["seconds_per_step"]
        cells = [label, run["epochs"], percent(run["live_accuracy"]), percent(run["frozen_accuracy"])]
        cells += [percent(run["spike_rate"]), "" if seconds is None else f"{1000 * seconds:.1f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    found, machine = document["verify"], document["machine"]
    lines += [
        "",
        f"{found['differing']} of {found['compared']} integers differ between engines, {found['samples']} images",
    ]
    lines += [
        "",
        f"{document['data']}; {machine['gpu'] or machine['processor']}; torch {document['versions']['torch']}",
    ]
    return "\n".join(lines) + "\n"


def main(folder: str) -> None:
    """Write both files, and print the table."""
    document = collect(Path(folder))
    write_text(Path(folder) / "cifar10.json", json.dumps(document, indent=2) + "\n", force=True)
    write_text(Path(folder) / "cifar10.md", markdown(document), force=True)
    print(markdown(document), end="")


if __name__ == "__main__":
    main(sys.argv[1])

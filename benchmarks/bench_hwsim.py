"""How long do a report, a sweep and analog trials take?

    python benchmarks/bench_hwsim.py --json benchmarks/results/hwsim.json

What is timed is first checked: a sweep in processes gives the points of one process, and crossbars of ideal devices
under a lossless ADC give the integer engine's logits. Prints the machine and the median of the rounds beside the limit
that the project holds itself to. `--quick` runs a small network and a few points once: no figures.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import say, table
from mdsnn.export import artifact
from mdsnn.hwsim import CrossbarNetwork, Devices, analog_accuracy, load_chip, ms_resnet
from mdsnn.hwsim.processes import cores
from mdsnn.hwsim.sweep import parse_axis, sweep, uniform_loads
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.files import check_writable, make_folder, write_text

SCHEMA = "mdsnn.bench-hwsim/1"
LIMITS = {"report": 1.0, "sweep": 60.0, "analog": 60.0}
"""Seconds: the full report of ResNet-18 from a loaded artifact, a 1,000-point sweep, 20 trials over 450 images."""
_REPORT = """
import json, sys, time
import numpy as np
from mdsnn.export import artifact
from mdsnn.hwsim import build_report, load_activity, render_html, to_csv
network = artifact.load(sys.argv[1])
activity = load_activity(sys.argv[2], network)
seconds = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    report = build_report(network, activity)
    page, lines, text = render_html(report), to_csv(report), report.to_json()
    seconds.append(time.perf_counter() - start)
found = {"seconds": seconds, "torch": "torch" in sys.modules, "page_bytes": len(page), "layers": len(report.layers)}
print(json.dumps(found))
"""


def time_report(rounds: int, quick: bool) -> dict[str, Any]:
    """The report (numbers, page, CSV, JSON) of a random ResNet-18 at 32x32, T = 4, in a process without torch."""
    try:
        import networks
    except ImportError as fault:
        raise MissingError(f"{fault}: pip install 'mdsnn[train]'") from fault
    from mdsnn.hwsim import measure, save_activity

    shape = networks.SMALL if quick else networks.RESNET18
    network = networks.integer_network(shape, 4, 0.15, seed=0, images=4)
    pixels = networks.random_images(2, shape, np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        where = [str(Path(folder) / name) for name in ("network.mdsnn", "activity.npz")]
        artifact.save(network, where[0])
        save_activity(where[1], measure(network, pixels, source="random images"))
        command = [sys.executable, "-c", _REPORT, *where, str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if found["torch"]:
        raise ConfigError("the report imported torch")
    return {**found, "what": f"report of {found['layers']} layers from a loaded artifact, first one included"}


def time_sweep(rounds: int, quick: bool, jobs: int) -> dict[str, Any]:
    """A sweep of ResNet-18, 2x48x48, T = 10, over 1,008 points."""
    workload, chip = ms_resnet(18, (2, 48, 48), 10), load_chip("fefet32")
    texts = {"rows": "32,64,128", "adc-bits": "4..10", "cell-bits": "1,2,4", "scheme": "kernel-split,im2col"}
    texts |= {"coding": "offset,differential", "pes": "8" if quick else "8,16,32,64"}
    axes = {name: parse_axis(name, text) for name, text in texts.items()}
    loads = uniform_loads(workload, 0.1)
    want = sweep(workload, chip, axes, loads)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        rows = sweep(workload, chip, axes, loads, jobs=jobs)
        seconds.append(time.perf_counter() - start)
        if rows != want:
            raise ConfigError("the points of several processes are not those of one")
    return {"seconds": seconds, "points": len(want), "what": f"sweep of {len(want)} points, {jobs} processes"}


def time_analog(rounds: int, quick: bool, jobs: int) -> dict[str, Any]:
    """20 trials of the digits student over the 450 test images, sigma and ADC of the chip."""
    network, chip = artifact.load("builtin:digits"), load_chip("fefet32")
    try:
        from mdsnn.data import digits
    except ImportError as fault:
        raise MissingError(f"{fault}: pip install 'mdsnn[train]'") from fault
    pixels, labels = digits().test_x, digits().test_y
    trials = 20
    if quick:
        pixels, labels, trials = pixels[:8], labels[:8], 2
    exact = CrossbarNetwork(network, chip, adc_bits=10, devices=Devices()).run(pixels)
    if not np.array_equal(exact, Engine(network).run(pixels).logits):
        raise ConfigError("ideal crossbars under a lossless ADC are not the integer engine")
    seconds, found = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        again = analog_accuracy(
            network, pixels, labels, chip, trials=trials, rng=np.random.default_rng(0), adc_bits=10, jobs=jobs
        )
        seconds.append(time.perf_counter() - start)
        if found is not None and again != found:
            raise ConfigError("the same seed gave another accuracy")
        found = again
    return {
        "seconds": seconds,
        "trials": trials,
        "samples": len(labels),
        "what": f"{trials} analog trials over {len(labels)} digits, {jobs} processes",
    }


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 100), help="The median counts.")
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes; default: all cores.")
@click.option("--quick", is_flag=True, help="A small network and a few points, once: does everything run?")
@click.option("--json", "json_file", metavar="FILE.json", help="Write the result.")
@click.option("--force", is_flag=True, help="Replace FILE.json.")
def main(rounds: int, jobs: int | None, quick: bool, json_file: str | None, force: bool) -> None:
    """Time hwsim: a report, a sweep, analog trials."""
    if json_file is not None:
        make_folder(Path(json_file).parent)
        check_writable(json_file, force=force)
    jobs, rounds = jobs or cores(), 1 if quick else rounds
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "report": lambda: time_report(rounds, quick),
        "sweep": lambda: time_sweep(rounds, quick, jobs),
        "analog": lambda: time_analog(rounds, quick, jobs),
    }
    results = {}
    for name, run in parts.items():
        say(f"timing: {name}")
        found = run()
        results[name] = {**found, "median_s": statistics.median(found["seconds"]), "limit_s": LIMITS[name]}
    document = {
        "schema": SCHEMA,
        "quick": quick,
        "rounds": rounds,
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("mdsnn", "numpy", "joblib")},
        "results": results,
    }
    for key, value in document["machine"].items():
        click.echo(f"{key:>11}  {value}")
    rows = [[r["what"], f"{r['median_s']:.3f}", f"{min(r['seconds']):.3f}", r["limit_s"]] for r in results.values()]
    table(["what", "median s", "min s", "limit s"], rows)
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n", force=force)


if __name__ == "__main__":
    main()

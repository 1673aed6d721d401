"""Is any shape of network slow for its size? Time per dense-equivalent multiply-add, at every instruction set.

    python benchmarks/bench_shapes.py --levels avx2,amx --json benchmarks/results/shapes.json

Every network has random weights and is calibrated so that its LIF layers fire at one density (networks.py). Its
integers are compared with another executor's before it is timed: the NumPy reference's trace, or Numba's logits where
the reference would take minutes. One thread; the processor time of the process, the least of several runs.

A multiply-add is counted as if the network were dense: once for each weight under each output and step, the stem and
other fixed layers once a sample. "per MAC" is a whole network's time over that number, and `ratio` is that over the
best shape's at the same instruction set and bits. LIMIT is held by the shapes the engine is for: MS-ResNet and VGG of
at least 64 channels on 16x16 pixels and more. What is below is printed too, and marked: there the neurons, the weights
that are read for a handful of outputs, and the call itself cost more than the products.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from networks import calibrate

from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import say, table
from mdsnn.export.lower import lower
from mdsnn.freeze import freeze
from mdsnn.kernels import native
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import ConfigError, EnvironmentFault
from mdsnn.kernels.files import check_writable, make_folder, write_text
from mdsnn.kernels.network import IntegerNetwork
from mdsnn.models.ms_resnet import ms_resnet, ms_resnet18, ms_resnet34
from mdsnn.models.vgg import vgg

SCHEMA = "mdsnn.bench-shapes/1"
LIMIT = 2.5
"""Largest ratio of a shape's time per MAC to the best shape's."""
REFERENCE_MACS = 150_000_000
"""Beyond, a run is compared with Numba's logits and not with the reference's trace."""
EVENT_RATE = 0.1
"""Share of the pixels of an event frame that hold an event."""


@dataclass(frozen=True)
class Case:
    """A network to time: `make` returns the live model; `batch` samples a call.

    held  whether LIMIT is asked of it
    """

    name: str
    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    bits: int = 4
    held: bool = True

    def build(self, density: float, seed: int) -> tuple[IntegerNetwork, npt.NDArray[np.uint8]]:
        """The calibrated network and the pixels of a call."""
        options = {"timesteps": 4, "size": (32, 32), "classes": 100, **self.options}
        generator = torch.Generator().manual_seed(seed)
        model = self.make(weight_bits=self.bits, membrane_bits=self.bits, bn_bits=8, generator=generator, **options)
        rng = np.random.default_rng([seed, 1])
        few = max(2, min(8, 16_384 // (options["size"][0] ** 2 * options["timesteps"] // 4)))  # images to calibrate on
        calibrate(model, _pixels(options, few, rng), density, seed=seed)
        network = lower(freeze(model))
        return network, _pixels(options, self.batch, rng)


def _pixels(options: dict[str, Any], samples: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    frame = (options.get("in_channels", 3), *options["size"])
    if options.get("coding") != "events":
        return rng.integers(0, 256, (samples, *frame), dtype=np.uint8)
    shape = (options["timesteps"], samples, *frame)
    counts: npt.NDArray[np.uint8] = (rng.integers(1, 8, shape) * (rng.random(shape) < EVENT_RATE)).astype(np.uint8)
    return counts


def _events(size: int) -> dict[str, Any]:
    return {"coding": "events", "in_channels": 2, "size": (size, size), "timesteps": 10, "classes": 101}


SMALL = {"size": (8, 8), "in_channels": 1, "classes": 10}
DIGITS = partial(ms_resnet, (1, 1), (16, 32))
VGG9 = partial(vgg, (2, 2, 3), (64, 128, 256), hidden=512)
VGG16 = partial(vgg, (2, 2, 3, 3, 3), (64, 128, 256, 512, 512), hidden=512)

CASES = (
    Case("resnet18 32x32 T=4", ms_resnet18),
    *(Case(f"resnet18 32x32 T={t}", ms_resnet18, {"timesteps": t}) for t in (1, 2, 3, 8, 10, 32)),
    *(Case(f"resnet18 32x32 T=4, batch {n}", ms_resnet18, batch=n) for n in (2, 16, 64)),
    *(Case(f"resnet18 {s}x{s} T=4", ms_resnet18, {"size": (s, s)}, held=s > 8) for s in (8, 16, 24, 64, 128)),
    *(Case(f"resnet18 events {s}x{s} T=10", ms_resnet18, _events(s)) for s in (48, 128)),
    Case("resnet34 32x32 T=4", ms_resnet34),
    Case("resnet34 64x64 T=4 imagenet stem", partial(ms_resnet34, stem="imagenet"), {"size": (64, 64)}),
    Case("resnet 8 blocks a group (32-bit stream)", partial(ms_resnet, (8, 8), (64, 128))),
    Case("resnet18 soft reset", ms_resnet18, {"reset": "soft"}),
    Case("resnet18 pre_fire", ms_resnet18, {"quantize": "pre_fire"}),
    Case("resnet18 W8U8", ms_resnet18, bits=8),
    Case("resnet 8 blocks a group W8U8", partial(ms_resnet, (8, 8), (64, 128)), bits=8),
    Case("vgg9 32x32 T=4", VGG9),
    Case("vgg16 32x32 T=4", VGG16),
    Case("vgg16 64x64 T=4", VGG16, {"size": (64, 64)}),
    *(
        Case(f"resnet18 widths {w} to {8 * w}", partial(ms_resnet18, widths=(w, 2 * w, 4 * w, 8 * w)))
        for w in (65, 72, 80, 96, 100, 130)
    ),
    *(
        Case(f"resnet18 widths {w} to {8 * w}", partial(ms_resnet18, widths=(w, 2 * w, 4 * w, 8 * w)), held=False)
        for w in (8, 16, 24, 32, 48)
    ),
    *(Case(f"digits student 8x8, batch {n}", DIGITS, SMALL, batch=n, held=False) for n in (1, 1024)),
)
QUICK = (
    Case("quick", partial(ms_resnet, (1, 1), (16, 32)), {"size": (8, 8), "classes": 10}, batch=3),
    Case("quick events", partial(vgg, (1, 1), (20, 16), hidden=24), {**_events(8), "timesteps": 3}),
)


def check(network: IntegerNetwork, pixels: npt.NDArray[np.uint8], level: str) -> str:
    """Compare the C engine with another executor; the name of that one. Raises EnvironmentFault where they differ."""
    few = pixels[..., :1, :, :, :]
    ours = Engine(network, "native", 1)
    if network.macs <= REFERENCE_MACS:
        name = "reference"
        got, want = (engine.run(few, trace=True).trace for engine in (ours, Engine(network, name, 1)))
        if got is None or want is None:
            raise EnvironmentFault("an engine returned no trace")
        arrays = [(got.logits, want.logits)]
        for lif in want.lifs:
            arrays += [(getattr(got.lifs[lif], part), getattr(want.lifs[lif], part)) for part in "hsq"]
    else:
        name = "numba"
        arrays = [(ours.run(few).logits, Engine(network, name, 1).run(few).logits)]
    for found, expected in arrays:
        if not np.array_equal(found, expected):
            raise EnvironmentFault(f"MDSNN_ISA={level}: other integers than {name}")
    return name


def least(engine: Engine, pixels: npt.NDArray[np.uint8], repeats: int, seconds: float) -> float:
    """Seconds of processor time of one run: the least of `repeats`, or of as many as begin within `seconds`."""
    engine.run(pixels)
    best, begin, done = float("inf"), time.perf_counter(), 0
    while done < 2 or (done < repeats and time.perf_counter() - begin < seconds):
        start = time.process_time()
        engine.run(pixels)
        best = min(best, time.process_time() - start)
        done += 1
    return best


def measure(
    case: Case, levels: tuple[str, ...], density: float, seed: int, repeats: int, seconds: float, compare: bool = True
) -> dict[str, Any]:
    """Time one case at every level; see `main` for the fields."""
    network, pixels = case.build(density, seed)
    total = network.macs
    found: dict[str, Any] = {"name": case.name, "bits": case.bits, "batch": case.batch, "held": case.held}
    found.update(timesteps=network.timesteps, macs=total, levels={})
    for level in levels:
        os.environ["MDSNN_ISA"] = level
        against = check(network, pixels, level) if compare else "nothing"
        spent = least(Engine(network, "native", 1), pixels, repeats, seconds)
        found["levels"][level] = {"ms": 1e3 * spent, "ps_per_mac": 1e12 * spent / (total * case.batch)}
        found["checked_against"] = against
    return found


def ratios(cases: list[dict[str, Any]]) -> None:
    """Adds to each level of each case the ratio of its time per MAC to the least of the cases of the same bits."""
    for case in cases:
        for level, figures in case["levels"].items():
            same = [other["levels"][level]["ps_per_mac"] for other in cases if other["bits"] == case["bits"]]
            figures["ratio"] = figures["ps_per_mac"] / min(same)


@click.command()
@click.option("--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.17, show_default=True)
@click.option("--levels", help="Instruction sets, separated by commas; default: all that this machine has.")
@click.option("--only", default="", help="Only shapes whose name holds this text.")
@click.option("--repeats", type=click.IntRange(2), default=20, show_default=True)
@click.option("--seconds", type=float, default=0.4, show_default=True, help="Longest time for one shape and level.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Two tiny networks: no figures.")
@click.option("--json", "json_file", help="Write the figures there too.")
@click.option("--force", is_flag=True, help="Overwrite that file.")
def main(
    density: float,
    levels: str | None,
    only: str,
    repeats: int,
    seconds: float,
    seed: int,
    quick: bool,
    json_file: str | None,
    force: bool,
) -> None:
    """Time the C engine on many shapes of network."""
    there = native.isa_levels()
    chosen = tuple(levels.split(",")) if levels else there
    unknown = [level for level in chosen if level not in there]
    if unknown:
        raise ConfigError(f"--levels {','.join(unknown)}: this machine runs {', '.join(there)}")
    if json_file:
        make_folder(Path(json_file).parent)
        check_writable(json_file, force=force)
    cases = [case for case in (QUICK if quick else CASES) if only in case.name]
    if not cases:
        raise ConfigError(f"--only {only}: no shape's name holds this")
    torch.set_num_threads(1)
    done = []
    for case in cases:
        say(f"timing: {case.name}")
        done.append(measure(case, chosen, density, seed, repeats, seconds))
    ratios(done)
    rows = []
    for case in done:
        row = [case["name"] + ("" if case["held"] else " *"), f"{case['macs'] / 1e6:,.0f}"]
        for level in chosen:
            figures = case["levels"][level]
            row += [f"{figures['ms']:.2f}", f"{figures['ratio']:.2f}"]
        rows.append(row)
    table(["shape", "MMAC", *(text for level in chosen for text in (f"{level} ms", "ratio"))], rows)
    slow = [
        f"{case['name']} at {level}: {figures['ratio']:.2f}"
        for case in done
        for level, figures in case["levels"].items()
        if case["held"] and figures["ratio"] > LIMIT
    ]
    say("\n".join([f"beyond {LIMIT} times the best:", *slow]) if slow else f"no shape beyond {LIMIT} times the best")
    say("* the limit is not asked of it: see the head of this file")
    if json_file:
        document = {"schema": SCHEMA, "machine": machine(), "density": density, "limit": LIMIT, "cases": done}
        write_text(json_file, json.dumps(document, indent=1) + "\n", force=force)


if __name__ == "__main__":
    main()

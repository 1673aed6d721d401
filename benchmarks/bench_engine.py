"""How fast is this engine, beside the others? Equal bits first, then interleaved timing.

    python benchmarks/bench_engine.py --json benchmarks/results/engine.json
    python benchmarks/report.py --engine benchmarks/results/engine.json

Without a choice of its own it runs all of `full_plan`, on MS-ResNet-18 (3x32x32, T = 4) and the digits student, and
prints the ratios of GOALS. comparators.py has the contenders.

Every contender runs in a process of its own, so that thread pools, allocators and instruction-set caps of one do not
reach another, and its peak memory can be told. All processes live at the same time; the parent lets them run one after
the other, in rounds whose order is shuffled, so that a slow minute of the machine falls on all of them.

What is timed is checked first: h, s, q and logits of every integer contender against the NumPy reference on a few
images, and its logits on every image that is timed. What others compute is the network's float twin: their logits are
correlated with its own in float32.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from comparators import CONTENDERS, LEVELS, Logits, Pixels, Runner, Workload

from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import progress, say, table
from mdsnn.export import artifact
from mdsnn.export.verify import Executor, verify
from mdsnn.kernels.engine import Engine, Trace
from mdsnn.kernels.errors import ConfigError, EnvironmentFault, MdsnnError, MissingError
from mdsnn.kernels.files import check_writable, make_folder, write_text
from mdsnn.kernels.network import IntegerNetwork
from mdsnn.machine import peak_rss

if TYPE_CHECKING:
    from networks import Shape

SCHEMA = "mdsnn.bench-engine/3"
PAUSE = 0.05
"""Seconds between two contenders, in which the first one's idle threads stop spinning."""
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FLAGS = (
    *("sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vbmi2"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "i8mm", "sve", "sve2"),
)
"""Processor flags that matter here, in the names of /proc/cpuinfo."""
CLOSE = {"float32": 0.98, "bf16": 0.3, "int8": 0.3, "ann": 0.9}
"""Least correlation of a comparator's logits with its twin's in float32. A spike flipped by rounding flips others."""
DIGITS = "builtin:digits"
WITHOUT = ("native", "reference", "ort-our-int", "ort-our-float")
EVERYTHING = tuple(name for name in CONTENDERS if name not in WITHOUT)
CAPPED = (*LEVELS[:3], "openvino-int8", "openvino-int8-avx512", "openvino-int8-avx2-vnni", "openvino-int8-avx2")
UNCAPPED = tuple(name for name in EVERYTHING if not name.startswith("openvino-int8-"))
BASELINE = "reference"


@dataclass(frozen=True)
class Goal:
    """A ratio to show: how many times faster `ours` is than `theirs` on the workload W`bits`U`bits` at 17 %."""

    title: str
    ours: str
    theirs: str
    floor: float
    target: float
    moonshot: float
    bits: int = 4
    threads: int = 1
    batch: int = 1


GOALS = (
    Goal("AMX, against OpenVINO int8", "amx", "openvino-int8", 2.2, 2.7, 3.5),
    Goal("both capped at AVX2", "avx2", "openvino-int8-avx2", 4, 5, 5.5),
    Goal("both capped at AVX2-VNNI", "avx2", "openvino-int8-avx2-vnni", 2.2, 2.8, 3),
    Goal("both capped at AVX512-VNNI", "avx512", "openvino-int8-avx512", 1.8, 2.3, 3),
    Goal("against the int8 ANN at T = 1 in OpenVINO", "amx", "ann-openvino-int8", 0.75, 1, 1.2),
    Goal("batch 16, 2 threads, against OpenVINO int8", "amx", "openvino-int8", 2.2, 2.6, 3.5, 4, 2, 16),
    Goal("Numba against PyTorch float32", "numba", "pytorch", 2, 3, 5),
    Goal("W8U8, AMX, against OpenVINO int8", "amx", "openvino-int8", 2, 2.5, 3, 8),
    Goal("W8U8, both capped at AVX2", "avx2", "openvino-int8-avx2", 2.5, 3, 4, 8),
)
"""One thread, batch 1 where they do not say otherwise."""
GOAL_DENSITY = 0.17


# ----------------------------------------------------------------------------------------------------- processes


def clock(run: Callable[[Pixels], Logits], pixels: Pixels, seconds: float) -> float:
    """Seconds of one call: the median of the calls of one visit.

    The first call warms the caches and counts only if it took longer than `seconds` by itself; then calls go on until
    `seconds` have passed.
    """
    start = time.perf_counter()
    run(pixels)
    first = time.perf_counter() - start
    if first >= seconds:
        return first
    calls: list[float] = []
    spent = 0.0
    while spent < seconds:
        start = time.perf_counter()
        run(pixels)
        calls.append(time.perf_counter() - start)
        spent += calls[-1]
    return statistics.median(calls)


def forget_peak() -> None:
    """Start the measurement of `peak_rss` anew, where the system lets us."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")


def _serve(pipe: Connection, name: str, given: Any, threads: int) -> None:
    """What a contender's process does: make it, then obey until the pipe closes. Faults go to the parent."""
    runner: Runner | None = None
    start = peak_rss()
    orders: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            if runner is None:
                runner = CONTENDERS[name].make(given, threads)
                del given
                run, traced = runner.logits, runner.trace
                orders = {"logits": run, "peak": peak_rss, "forget": forget_peak, "start": lambda: start}
                orders["time"] = functools.partial(clock, run)
                if traced is not None:
                    orders["trace"] = traced
                gc.collect()
                answer: tuple[bool, Any] = (True, None)
            else:
                order, *arguments = pipe.recv()
                answer = (True, orders[order](*arguments))
        except (EOFError, KeyboardInterrupt):
            return
        except MdsnnError as fault:
            answer = (False, fault)
        except Exception as fault:  # whatever a library raises has to reach the parent, which names the contender
            answer = (False, EnvironmentFault(f"contender {name!r}: {type(fault).__name__}: {fault}"))
        pipe.send(answer)
        if runner is None:
            return


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that a process started inside the block inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Process:
    """A contender in a process of its own.

    raises  MdsnnError  what building it raised there, such as MissingError where a library is not installed
    """

    def __init__(self, name: str, workload: Workload, batches: Sequence[int], threads: int) -> None:
        self.name, contender = name, CONTENDERS[name]
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        pools = dict.fromkeys(POOLS, str(threads))
        given = contender.prepare(workload, batches)
        self._process = context.Process(target=_serve, args=(theirs, name, given, threads), daemon=True)
        with _environment({**pools, **contender.environment}):
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except (EOFError, OSError):
            raise self._died() from None

    def ask(self, order: str, *arguments: Any) -> Any:
        """Have it do "trace", "logits" or "time" on pixels, or tell its memory: "peak", "forget", "start".

        raises  what the contender raised; EnvironmentFault if its process died, as when memory runs out
        """
        try:
            self._pipe.send((order, *arguments))
            return self._answer()
        except (EOFError, OSError):  # OSError: the pipe broke or was reset
            raise self._died() from None

    def _answer(self) -> Any:
        fine, value = self._pipe.recv()
        if not fine:
            raise value
        return value

    def _died(self) -> EnvironmentFault:
        self._process.join(10)
        return EnvironmentFault(f"contender {self.name!r}: its process died (exit code {self._process.exitcode})")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _start(workload: Workload, threads: int, settings: Settings, left_out: dict[str, str]) -> dict[str, Process]:
    """Processes by contender. One that is missing is left out, with its reason, unless it was chosen by name."""
    running: dict[str, Process] = {}
    flags = processor_flags()
    parts = sorted({size for batch in settings.batches for size in (batch, batch // threads) if size})
    try:
        for name in settings.contenders:
            if name in left_out:
                continue
            try:
                if CONTENDERS[name].flag not in ("", *flags):
                    raise MissingError(f"the processor has no {CONTENDERS[name].flag}")
                running[name] = Process(name, workload, parts, threads)
            except MissingError as fault:
                if settings.chosen:
                    raise
                left_out[name] = str(fault)
    except BaseException:
        for process in running.values():
            process.close()
        raise
    return running


# ----------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Settings:
    """What to measure: `rounds` visits of `seconds` each, on random images drawn from `seed`.

    chosen  the contenders were named by the user: one that is missing is an error
    check   images whose traces are compared
    """

    contenders: tuple[str, ...] = EVERYTHING
    chosen: bool = False
    threads: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (1, 16)
    rounds: int = 9
    seconds: float = 0.2
    check: int = 2
    seed: int = 0


Task = tuple[Callable[[], Workload], Settings]
"""A workload, made when its turn comes, and what to measure of it."""


def make_workload(shape: Shape, bits: int, density: float, images: int, seed: int) -> Workload:
    """The calibrated random network of `shape`, its twins, and `images` random images."""
    import networks

    say(f"calibrating W{bits}U{bits} to {density:.0%}")
    network = networks.integer_network(shape, bits, density, seed=seed)
    name = (
        f"MS-ResNet-{2 * sum(shape.blocks) + 2}, 3x{shape.size}x{shape.size}, widths "
        f"{'/'.join(map(str, shape.widths))}, T = {shape.timesteps}, W{bits}U{bits}, {density:.0%} density"
    )
    pixels = networks.random_images(images, shape, np.random.default_rng([seed, 2]))
    return _workload(name, bits, density, network, pixels, seed)


def digits_workload(images: int, seed: int) -> Workload:
    """The trained student that ships with the package, on test images of its own."""
    from mdsnn.cli.options import read_data

    network = artifact.load(DIGITS)
    pixels = read_data(network, DIGITS)[0]
    return _workload("the trained digits student", network.lifs[0].bits, None, network, pixels[:images], seed)


def _workload(
    name: str, bits: int, density: float | None, network: IntegerNetwork, pixels: Pixels, seed: int
) -> Workload:
    import networks

    spec = network.input
    shape = (16, spec.channels, spec.height, spec.width)
    calibration = np.random.default_rng([seed, 1]).integers(0, 256, shape, dtype=np.uint8)
    if density is None:
        calibration = pixels  # random pixels are not what a trained network reads
    twin = networks.float_twin(network, calibration)
    ann = networks.relu_twin(twin, calibration)
    return Workload(name, bits, density, artifact.to_bytes(network), twin, ann, pixels)


def measure(workload: Workload, settings: Settings, left_out: dict[str, str]) -> dict[str, Any]:
    """Check one workload's contenders, then time them. Stops before timing if anything differs."""
    import networks

    network = artifact.from_bytes(workload.network)
    pixels = workload.pixels[: max(*settings.batches, settings.check)]
    count = len(pixels)
    reference, results = Engine(network, "reference", 1), []
    with progress("reference") as tick:
        for at in range(count):  # one by one, for its int64 tensors are large
            results.append(reference.run(pixels[at : at + 1]))
            tick(at + 1, count)
    want = {"integers": np.concatenate([result.logits for result in results])}
    want["float32"] = want["int8"] = want["bf16"] = networks.float_logits(workload.twin, pixels)
    want["ann"] = networks.float_logits(workload.ann, pixels)
    document: dict[str, Any] = {
        "name": workload.name,
        "weight_bits": workload.bits,
        "membrane_bits": workload.bits,
        "density_wanted": workload.density,
        "twin_correlation": correlation(want["float32"], want["integers"]),
        "macs": network.macs,
        "artifact_bytes": len(workload.network),
        "layers": [
            {
                "layer": lif.name,
                "neurons": results[0].activity.neurons[lif.name],
                "density": statistics.fmean(result.activity.density(lif.name) for result in results),
            }
            for lif in network.lifs
        ],
        "check": None,
        "rows": [],
    }
    for threads in settings.threads:
        running = _start(workload, threads, settings, left_out)
        try:
            if document["check"] is None:
                document["check"] = _check(network, reference, running, pixels[: settings.check])
            document["check"]["logits"] += _check_logits(running, pixels, settings.batches, want)
            if not document["check"]["agrees"] or any(not c["equal"] for c in document["check"]["logits"]):
                document["check"]["agrees"] = False
                break
            document["rows"] += _time(running, pixels, threads, settings)
        finally:
            for process in running.values():
                process.close()
    return document


def _check(
    network: IntegerNetwork, reference: Engine, running: Mapping[str, Process], pixels: Pixels
) -> dict[str, Any]:
    """Traces of the integer contenders against the reference's, every h, s, q and logit."""
    images = len(pixels)

    def baseline(part: Pixels) -> Trace:
        found = reference.run(part, trace=True).trace
        if found is None:
            raise ConfigError("the reference returned no trace")
        return found

    def asking(process: Process) -> Executor:
        return lambda part: process.ask("trace", part)

    executors: dict[str, Executor] = {f"{BASELINE} (baseline)": baseline}
    executors |= {name: asking(process) for name, process in running.items() if CONTENDERS[name].computes == "integers"}
    if len(executors) == 1:
        return {"images": images, "agrees": True, "compared": 0, "differing": 0, "faults": [], "logits": []}
    say(f"checking h, s, q and logits on {images} images: {', '.join(executors)}")
    found = verify(network, executors, pixels, batch=1)
    faults = [f"{name}: {c.failure or c.first}" for name, c in found.comparisons.items() if not c.agrees]
    return {
        "images": images,
        "agrees": found.agrees,
        "compared": found.compared,
        "differing": found.differing,
        "faults": faults,
        "logits": [],
    }


def _check_logits(
    running: Mapping[str, Process], pixels: Pixels, batches: Sequence[int], want: Mapping[str, Logits]
) -> list[dict[str, Any]]:
    """The logits of what is timed, at every batch size: equal to the reference's, or close to their twin's."""
    rows: list[dict[str, Any]] = []
    for name, process in running.items():
        for batch in batches:
            computes = CONTENDERS[name].computes
            got, due = process.ask("logits", pixels[:batch]), want[computes][:batch]
            row: dict[str, Any] = {"contender": name, "batch": batch, "computes": computes}
            if computes == "integers":
                row["equal"] = bool(got.dtype == due.dtype and np.array_equal(got, due))
            else:
                row["correlation"] = correlation(got, due)
                row["equal"] = row["correlation"] >= CLOSE[computes]
            rows.append(row)
    return rows


def correlation(a: Logits, b: Logits) -> float:
    """Pearson's r of all logits; -1 if shapes differ or a value is not finite."""
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return -1.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _time(running: Mapping[str, Process], pixels: Pixels, threads: int, settings: Settings) -> list[dict[str, Any]]:
    """Interleaved visits, an order drawn anew each round."""
    rows: list[dict[str, Any]] = []
    order = random.Random(settings.seed)
    for batch in settings.batches:
        visits: dict[str, list[float]] = {name: [] for name in running}
        for process in running.values():
            process.ask("logits", pixels[:batch])  # graphs of fixed shape are compiled here
            process.ask("forget")
        with progress(f"{threads} thread(s), batch {batch}") as tick:
            for turn in range(settings.rounds):
                names = list(running)
                order.shuffle(names)
                for name in names:
                    time.sleep(PAUSE)
                    seconds = running[name].ask("time", pixels[:batch], settings.seconds)
                    visits[name].append(1e3 * seconds / batch)
                tick(turn + 1, settings.rounds)
        for name, times in visits.items():
            rows.append({"contender": name, "threads": threads, "batch": batch, **summary(times)})
            rows[-1]["peak_rss_bytes"] = running[name].ask("peak")
            rows[-1]["start_rss_bytes"] = running[name].ask("start")
    return rows


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and spread of the visits' ms an image."""
    median = statistics.median(times)
    return {
        "ms_per_image": median,
        "min_ms_per_image": min(times),
        "images_per_s": 1e3 / median,
        "spread_percent": 100 * (max(times) - min(times)) / median,
        "visits_ms_per_image": list(times),
    }


# --------------------------------------------------------------------------------------------- where it was run


def processor_flags() -> list[str]:
    """The flags of FLAGS that this processor has; empty where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith(("flags", "Features")):
                have = set(line.partition(":")[2].split())
                return [flag for flag in FLAGS if flag in have]
    return []


def commit() -> str:
    """The commit of the source tree, with "+changes" if a tracked file differs from it; "unknown" outside git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python and the libraries that contend."""
    found = {"python": platform.python_version()}
    for name in ("mdsnn", "numpy", "numba", "torch", "onnx", "onnxruntime", "openvino", "spikingjelly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def plan(shape: Shape, base: Settings, bits: Sequence[int], densities: Sequence[float]) -> list[Task]:
    """The workloads of the given bits and densities, each with all of `base`."""

    def task(width: int, density: float) -> Task:
        images = max(*base.batches, base.check)
        return lambda: make_workload(shape, width, density, images, base.seed), base

    return [task(width, density) for width in bits for density in densities]


def full_plan(shape: Shape, base: Settings) -> list[Task]:
    """All that the README shows: everything at 17 %, the capped engines on W8U8 and at other densities, the digits."""
    alone = replace(base, contenders=CAPPED, threads=(1,), batches=(1,))
    tasks = plan(shape, base, (4,), (GOAL_DENSITY,))
    tasks += plan(shape, alone, (8,), (GOAL_DENSITY,)) + plan(shape, alone, (4,), (0.05, 0.1, 0.2, 0.5))
    digits = replace(base, contenders=tuple(name for name in base.contenders if name in UNCAPPED))
    return [*tasks, (lambda: digits_workload(max(*base.batches, base.check), base.seed), digits)]


def ratios(workloads: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """GOALS with what was measured, of medians; those whose two rows are both there.

    "least" is the quotient of both contenders' least visits: what else ran on the machine weighs least in it.
    """
    found = []
    for goal in GOALS:
        for workload in workloads:
            if (workload["weight_bits"], workload["density_wanted"]) != (goal.bits, GOAL_DENSITY):
                continue
            rows = {
                row["contender"]: row
                for row in workload["rows"]
                if (row["threads"], row["batch"]) == (goal.threads, goal.batch)
            }
            if goal.ours in rows and goal.theirs in rows:
                times = {"measured": "ms_per_image", "least": "min_ms_per_image"}
                ours, theirs = rows[goal.ours], rows[goal.theirs]
                found.append({**vars(goal), **{name: theirs[ms] / ours[ms] for name, ms in times.items()}})
    return found


def benchmark(tasks: Sequence[Task], *, quick: bool = False) -> dict[str, Any]:
    """Everything, as JSON values (schema mdsnn.bench-engine/3)."""
    names = list(dict.fromkeys(name for _, settings in tasks for name in settings.contenders))
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError(f"contender {name!r} is none of {', '.join(CONTENDERS)}")
    left_out: dict[str, str] = {}
    workloads = [measure(make(), settings, left_out) for make, settings in tasks]
    settings = tasks[0][1]
    return {
        "schema": SCHEMA,
        "quick": quick,
        "agrees": all(workload["check"]["agrees"] for workload in workloads),
        "ratios": ratios(workloads),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "processor_flags": processor_flags(),
        "environment": {
            name: os.environ[name]
            for name in ("MDSNN_ISA", "ONEDNN_MAX_CPU_ISA", "OMP_WAIT_POLICY")
            if name in os.environ
        },
        "versions": versions(),
        "rounds": settings.rounds,
        "visit_seconds": settings.seconds,
        "seed": settings.seed,
        "contenders": {
            name: {"title": CONTENDERS[name].title, "computes": CONTENDERS[name].computes}
            for name in names
            if name not in left_out
        },
        "left_out": left_out,
        "workloads": workloads,
    }


def show(document: dict[str, Any]) -> None:
    """Print a result: the machine, then for each workload its densities, its check and its times."""
    for key, value in (*document["machine"].items(), *document["versions"].items()):
        click.echo(f"{key:>12}  {value}")
    click.echo(f"{'flags':>12}  {' '.join(document['processor_flags']) or 'unknown'}")
    click.echo(f"{'commit':>12}  {document['commit']}")
    for name, reason in document["left_out"].items():
        say(f"left out: {name}: {reason}")
    for workload in document["workloads"]:
        click.echo("")
        check = workload["check"]
        rows = [[a["layer"], a["neurons"], f"{100 * a['density']:.1f}%"] for a in workload["layers"]]
        table(["LIF layer", "neurons", "neuron-steps that fire"], rows, f"{workload['name']}, {workload['macs']} MACs")
        click.echo(f"{check['compared']} integers compared, {check['differing']} differ")
        for fault in check["faults"]:
            click.echo(f"differs: {fault}")
        for row in check["logits"]:
            if not row["equal"]:
                found = f", correlation {row['correlation']:.3f}" if "correlation" in row else ""
                click.echo(f"differs: {row['contender']}: logits at batch {row['batch']}{found}")
        timed = [
            [
                row["contender"],
                document["contenders"][row["contender"]]["computes"],
                row["threads"],
                row["batch"],
                f"{row['ms_per_image']:.3f}",
                f"{row['min_ms_per_image']:.3f}",
                f"{row['spread_percent']:.0f}%",
                f"{row['images_per_s']:.1f}",
                "-" if row["peak_rss_bytes"] is None else row["peak_rss_bytes"] >> 20,
            ]
            for row in workload["rows"]
        ]
        headers = ["contender", "computes", "threads", "batch", "ms/image", "min", "spread", "images/s", "peak MiB"]
        table(headers, timed, f"median of {document['rounds']} interleaved visits")
    if document["ratios"]:
        click.echo("")
        heads = ["how many times faster", "measured", "least visits", "floor", "target", "moonshot"]
        shown = [
            [r["title"], f"{r['measured']:.2f}", f"{r['least']:.2f}", r["floor"], r["target"], r["moonshot"]]
            for r in document["ratios"]
        ]
        table(heads, shown)


# -------------------------------------------------------------------------------------------------- command line


def _numbers(low: float, high: float) -> Callable[[Any, Any, str | None], tuple[float, ...] | None]:
    def read(_: Any, __: Any, text: str | None) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or not all(low <= value <= high for value in values):
            raise click.BadParameter(f"{text!r} is no list of numbers in {low:g}..{high:g}, such as {low:g},{high:g}")
        return values

    return read


def _integers(low: int, high: int) -> Callable[[Any, Any, str | None], tuple[int, ...] | None]:
    def read(_: Any, __: Any, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        parts = text.split(",")
        if not all(part.isascii() and part.isdigit() and low <= int(part[:9]) <= high for part in parts):
            raise click.BadParameter(f"{text!r} is no list of whole numbers in {low}..{high}, such as {low},{high}")
        return tuple(int(part) for part in parts)

    return read


@click.command()
@click.option("--bits", callback=_integers(2, 8), help="Of weights and membranes, such as 4,8.")
@click.option("--density", callback=_numbers(1, 60), help="Per cent that fire, such as 5,10,20,50.")
@click.option("--threads", callback=_integers(1, 1024), help="Such as 1,2.")
@click.option("--batch", callback=_integers(1, 1024), help="Images a call, such as 1,16.")
@click.option("--contenders", help=f"Of {', '.join(CONTENDERS)}.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1, 1000), help="Visits of each contender.")
@click.option(
    "--check", default=2, show_default=True, type=click.IntRange(1, 64), help="Images whose traces are compared."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--quick", is_flag=True, help="A tiny network and two short rounds: does everything run? No figures.")
@click.option("--json", "json_file", metavar="FILE", help="Write the result, with every visit, to FILE.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def main(
    bits: tuple[int, ...] | None,
    density: tuple[float, ...] | None,
    threads: tuple[int, ...] | None,
    batch: tuple[int, ...] | None,
    contenders: str | None,
    rounds: int,
    check: int,
    seed: int,
    quick: bool,
    json_file: str | None,
    force: bool,
) -> None:
    """Time the engines and their comparators.

    Without --bits, --density, --threads, --batch and --contenders: everything that the README shows. With any of them:
    a random MS-ResNet-18 (W4U4, 17 %, threads 1 and 2, batch 1 and 16 where they do not say otherwise).

    Exit code 1 if any integer differs from the reference's; nothing is timed then.
    """
    import networks

    if json_file is not None:
        make_folder(Path(json_file).parent)
        check_writable(json_file, force=force)
    settings = Settings(rounds=rounds, check=check, seed=seed)
    shape = networks.RESNET18
    if quick:
        shape, settings = networks.SMALL, replace(settings, rounds=2, seconds=0.01)
    if contenders is not None:
        settings = replace(settings, contenders=tuple(contenders.split(",")), chosen=True)
    settings = replace(settings, threads=threads or settings.threads, batches=batch or settings.batches)
    if any(choice is not None for choice in (bits, density, threads, batch, contenders)):
        densities = [percent / 100 for percent in density] if density else [GOAL_DENSITY]
        tasks = plan(shape, settings, bits or (4,), densities)
    else:
        tasks = full_plan(shape, settings)
    document = benchmark(tasks, quick=quick)
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n", force=force)
    show(document)
    if not document["agrees"]:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except MdsnnError as fault:
        click.echo(f"bench_engine: error: {fault}", err=True)
        sys.exit(fault.exit_code)

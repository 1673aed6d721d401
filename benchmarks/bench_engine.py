"""How fast is an engine on MS-ResNet-18 (3x32x32, T = 4)? Equal bits first, then interleaved timing.

    python benchmarks/bench_engine.py --json benchmarks/results/engine.json
    python benchmarks/report.py --engine benchmarks/results/engine.json

Every contender runs in a process of its own, so that thread pools, allocators and instruction-set caps of one do not
reach another, and its peak memory can be told. All processes live at the same time; the parent lets them run one after
the other, in rounds whose order is shuffled, so that a slow minute of the machine falls on all of them.

What is timed is checked first: h, s, q and logits of every integer contender against the NumPy reference on a few
images, and its logits on every image that is timed. The float32 contenders are the same architecture with float weights
and membranes, calibrated to the same density: not the same integers.
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
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import progress, say, table
from mdsnn.export import artifact
from mdsnn.export.verify import Executor, verify
from mdsnn.kernels.engine import Engine, Trace
from mdsnn.kernels.errors import ConfigError, EnvironmentFault, MdsnnError, MissingError
from mdsnn.kernels.files import check_writable, make_folder, write_text
from mdsnn.kernels.network import IntegerNetwork

if TYPE_CHECKING:
    from networks import Shape

SCHEMA = "mdsnn.bench-engine/1"
PAUSE = 0.05
"""Seconds between two contenders, in which the first one's idle threads stop spinning."""
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FLAGS = (
    *("sse4_1", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vbmi2"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("neon", "asimd", "asimddp", "i8mm", "sve", "sve2"),
)
"""Processor flags that matter here, in the names of /proc/cpuinfo."""

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[Any]


@dataclass(frozen=True)
class Workload:
    """A network and how it was made: the bytes of its artifact, and the configuration and state of its float twin.

    Plain values, so that a process that needs no torch can receive one without importing it.
    """

    name: str
    bits: int
    density: float
    network: bytes
    config: dict[str, Any]
    state: dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Runner:
    """A contender made ready. `trace` is there if it computes the network's integers."""

    logits: Callable[[Pixels], Logits]
    trace: Callable[[Pixels], Trace] | None = None


@dataclass(frozen=True)
class Contender:
    """title: what it is, in words. make: (workload, threads) to a Runner, in the contender's own process."""

    title: str
    integers: bool
    make: Callable[[Workload, int], Runner]
    environment: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- contenders


def _kernels(name: str) -> Callable[[Workload, int], Runner]:
    def make(workload: Workload, threads: int) -> Runner:
        engine = Engine(artifact.from_bytes(workload.network), name, threads)

        def trace(pixels: Pixels) -> Trace:
            found = engine.run(pixels, trace=True).trace
            if found is None:
                raise ConfigError(f"engine {name!r} returned no trace")
            return found

        return Runner(lambda pixels: engine.run(pixels).logits, trace)

    return make


def _onnx(carrier: str) -> Callable[[Workload, int], Runner]:
    def make(workload: Workload, threads: int) -> Runner:
        try:
            from mdsnn.export import onnx
        except ImportError as fault:
            raise MissingError(f"{fault}: pip install 'mdsnn[train]'") from fault
        network = artifact.from_bytes(workload.network)
        timed = onnx.OnnxExecutor(onnx.to_onnx(network, form="unrolled", carrier=carrier), threads=threads)

        def trace(pixels: Pixels) -> Trace:
            model = onnx.to_onnx(network, form="unrolled", carrier=carrier, trace=True)
            return onnx.OnnxExecutor(model, threads=threads).run(pixels)

        return Runner(timed.logits, trace)

    return make


def _torch(spikingjelly: bool) -> Callable[[Workload, int], Runner]:
    def make(workload: Workload, threads: int) -> Runner:
        try:
            import torch
            from networks import FloatTwin, spikingjelly_twin

            twin = FloatTwin(workload.config, workload.state)
            model = spikingjelly_twin(twin) if spikingjelly else twin.build()
        except ImportError as fault:
            raise MissingError(f"{fault}: pip install 'mdsnn[train]'") from fault
        torch.set_num_threads(threads)

        def logits(pixels: Pixels) -> Logits:
            with torch.inference_mode():
                out: Logits = model(torch.from_numpy(pixels)).numpy()
            return out

        return Runner(logits)

    return make


CONTENDERS: Mapping[str, Contender] = {
    "native": Contender("mdsnn, C", True, _kernels("native")),
    "numba": Contender("mdsnn, Numba", True, _kernels("numba")),
    "reference": Contender("mdsnn, NumPy reference", True, _kernels("reference")),
    "ort-int": Contender("ONNX Runtime, our integer graph, ConvInteger", True, _onnx("int")),
    "ort-float": Contender("ONNX Runtime, our integer graph, float32 carrier", True, _onnx("float")),
    "pytorch": Contender("PyTorch eager float32, T folded into the batch", False, _torch(False)),
    "spikingjelly": Contender("SpikingJelly float32, multi-step", False, _torch(True)),
}
DEFAULT = tuple(name for name in CONTENDERS if name != "reference")
BASELINE = "reference"


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


def peak_rss() -> int | None:
    """Largest resident memory since `forget_peak`, in bytes; None where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def forget_peak() -> None:
    """Start the measurement of `peak_rss` anew, where the system lets us."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")


def _serve(pipe: Connection, name: str, workload: Workload, threads: int) -> None:
    """What a contender's process does: make it, then obey until the pipe closes. Faults go to the parent."""
    runner: Runner | None = None
    orders: dict[str, Callable[..., Any]] = {}
    while True:
        try:
            if runner is None:
                runner = CONTENDERS[name].make(workload, threads)
                run, traced = runner.logits, runner.trace
                orders = {"logits": run, "peak": peak_rss, "forget": forget_peak}
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

    def __init__(self, name: str, workload: Workload, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        pools = dict.fromkeys(POOLS, str(threads))
        if CONTENDERS[name].integers:
            workload = replace(workload, config={}, state={})
        self._process = context.Process(target=_serve, args=(theirs, name, workload, threads), daemon=True)
        with _environment({**pools, **CONTENDERS[name].environment}):
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except (EOFError, OSError):
            raise self._died() from None

    def ask(self, order: str, *arguments: Any) -> Any:
        """Have it do "trace", "logits" or "time" on pixels, tell its "peak" of memory, or "forget" that.

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


def _start(
    names: Sequence[str], workload: Workload, threads: int, chosen: bool, left_out: dict[str, str]
) -> dict[str, Process]:
    """Processes by contender. One that is missing is left out, with its reason, unless it was chosen by name."""
    running: dict[str, Process] = {}
    try:
        for name in names:
            if name in left_out:
                continue
            try:
                running[name] = Process(name, workload, threads)
            except MissingError as fault:
                if chosen:
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

    contenders: tuple[str, ...] = DEFAULT
    chosen: bool = False
    threads: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (1, 16)
    rounds: int = 9
    seconds: float = 0.2
    check: int = 2
    seed: int = 0


def make_workload(shape: Shape, bits: int, density: float, seed: int) -> Workload:
    """The calibrated random network of `shape`, and its float twin."""
    import networks

    network = networks.integer_network(shape, bits, density, seed=seed)
    twin = networks.float_twin(shape, density, seed=seed)
    return Workload(
        f"MS-ResNet-{2 * sum(shape.blocks) + 2}, 3x{shape.size}x{shape.size}, widths "
        f"{'/'.join(map(str, shape.widths))}, T = {shape.timesteps}, W{bits}U{bits}, {density:.0%} density",
        bits,
        density,
        artifact.to_bytes(network),
        twin.config,
        twin.state,
    )


def measure(workload: Workload, settings: Settings, left_out: dict[str, str]) -> dict[str, Any]:
    """Check one workload's contenders, then time them. Stops before timing if anything differs."""
    import networks

    network = artifact.from_bytes(workload.network)
    spec = network.input
    count = max(*settings.batches, settings.check)
    shape = (count, spec.channels, spec.height, spec.width)
    pixels = np.random.default_rng([settings.seed, 2]).integers(0, 256, shape, dtype=np.uint8)
    reference, results = Engine(network, "reference", 1), []
    with progress("reference") as tick:
        for at in range(count):  # one by one, for its int64 tensors are large
            results.append(reference.run(pixels[at : at + 1]))
            tick(at + 1, count)
    want = np.concatenate([result.logits for result in results])
    document: dict[str, Any] = {
        "name": workload.name,
        "weight_bits": workload.bits,
        "membrane_bits": workload.bits,
        "density_wanted": workload.density,
        "macs": networks.macs(network),
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
        running = _start(settings.contenders, workload, threads, settings.chosen, left_out)
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
    executors |= {name: asking(process) for name, process in running.items() if CONTENDERS[name].integers}
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
    running: Mapping[str, Process], pixels: Pixels, batches: Sequence[int], want: Logits
) -> list[dict[str, Any]]:
    """The logits of what is timed, at every batch size: equal to the reference's, or finite where they are floats."""
    rows: list[dict[str, Any]] = []
    for name, process in running.items():
        for batch in batches:
            got, due = process.ask("logits", pixels[:batch]), want[:batch]
            if CONTENDERS[name].integers:
                equal = got.dtype == due.dtype and np.array_equal(got, due)
            else:
                equal = got.shape == due.shape and bool(np.isfinite(got).all())
            rows.append(
                {"contender": name, "batch": batch, "integers": CONTENDERS[name].integers, "equal": bool(equal)}
            )
    return rows


def _time(running: Mapping[str, Process], pixels: Pixels, threads: int, settings: Settings) -> list[dict[str, Any]]:
    """Interleaved visits, an order drawn anew each round."""
    rows: list[dict[str, Any]] = []
    order = random.Random(settings.seed)
    for batch in settings.batches:
        visits: dict[str, list[float]] = {name: [] for name in running}
        for process in running.values():
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
    for name in ("mdsnn", "numpy", "numba", "torch", "onnx", "onnxruntime", "spikingjelly"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def benchmark(
    shape: Shape, bits: Sequence[int], densities: Sequence[float], settings: Settings, *, quick: bool = False
) -> dict[str, Any]:
    """Everything, as JSON values (schema mdsnn.bench-engine/1)."""
    for name in settings.contenders:
        if name not in CONTENDERS:
            raise ConfigError(f"contender {name!r} is none of {', '.join(CONTENDERS)}")
    left_out: dict[str, str] = {}
    workloads = []
    for width in bits:
        for density in densities:
            say(f"calibrating W{width}U{width} to {density:.0%}")
            workload = make_workload(shape, width, density, settings.seed)
            workloads.append(measure(workload, settings, left_out))
    return {
        "schema": SCHEMA,
        "quick": quick,
        "agrees": all(workload["check"]["agrees"] for workload in workloads),
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
            name: {"title": CONTENDERS[name].title, "integers": CONTENDERS[name].integers}
            for name in settings.contenders
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
                click.echo(f"differs: {row['contender']}: logits at batch {row['batch']}")
        timed = [
            [
                row["contender"],
                "integers" if document["contenders"][row["contender"]]["integers"] else "float32",
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


# -------------------------------------------------------------------------------------------------- command line


def _numbers(low: float, high: float) -> Callable[[Any, Any, str], tuple[float, ...]]:
    def read(_: Any, __: Any, text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or not all(low <= value <= high for value in values):
            raise click.BadParameter(f"{text!r} is no list of numbers in {low:g}..{high:g}, such as {low:g},{high:g}")
        return values

    return read


def _integers(low: int, high: int) -> Callable[[Any, Any, str], tuple[int, ...]]:
    def read(_: Any, __: Any, text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if not all(part.isascii() and part.isdigit() and low <= int(part[:9]) <= high for part in parts):
            raise click.BadParameter(f"{text!r} is no list of whole numbers in {low}..{high}, such as {low},{high}")
        return tuple(int(part) for part in parts)

    return read


@click.command()
@click.option("--bits", default="4", show_default=True, callback=_integers(2, 8), help="Of weights and membranes.")
@click.option("--density", default="17", show_default=True, callback=_numbers(1, 60), help="Per cent that fire.")
@click.option("--threads", default="1,2", show_default=True, callback=_integers(1, 1024))
@click.option("--batch", default="1,16", show_default=True, callback=_integers(1, 1024), help="Images a call.")
@click.option("--contenders", help=f"Of {', '.join(CONTENDERS)}; default: all that are there but the reference.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1, 1000), help="Visits of each contender.")
@click.option(
    "--check", default=2, show_default=True, type=click.IntRange(1, 64), help="Images whose traces are compared."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option("--quick", is_flag=True, help="A tiny network and two short rounds: does everything run? No figures.")
@click.option("--json", "json_file", metavar="FILE", help="Write the result, with every visit, to FILE.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def main(
    bits: tuple[int, ...],
    density: tuple[float, ...],
    threads: tuple[int, ...],
    batch: tuple[int, ...],
    contenders: str | None,
    rounds: int,
    check: int,
    seed: int,
    quick: bool,
    json_file: str | None,
    force: bool,
) -> None:
    """Time the engines and their comparators on a calibrated random MS-ResNet-18.

    Exit code 1 if any integer differs from the reference's; nothing is timed then.
    """
    import networks

    if json_file is not None:
        make_folder(Path(json_file).parent)
        check_writable(json_file, force=force)
    names = tuple(contenders.split(",")) if contenders else DEFAULT
    settings = Settings(names, contenders is not None, threads, batch, rounds, check=check, seed=seed)
    shape = networks.RESNET18
    if quick:
        shape = networks.SMALL
        settings = Settings(names, contenders is not None, threads, batch, 2, 0.01, check, seed)
    document = benchmark(shape, bits, [percent / 100 for percent in density], settings, quick=quick)
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

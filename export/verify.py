"""Do all executors agree on every integer? And where they part, where first?

An executor is a callable from pixels to a `Trace` (h, s and q of every LIF node and step, and the logits). `verify`
runs all of them on the same data and compares each with the first one, integer by integer. An executor that fails to
run counts as a failure, never as agreement. The first divergence is the earliest in time and then in the order of the
graph, so that what it names is where the difference arose and not what it spread to.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.engine import Engine, Trace, check_pixels
from mdsnn.kernels.errors import ConfigError, MdsnnError
from mdsnn.kernels.files import write_bytes, write_text
from mdsnn.kernels.formats import Array, dense_table
from mdsnn.kernels.network import LOGITS, BnAffine, BnDense, IntegerNetwork, Lif, Node

Executor = Callable[[npt.NDArray[np.uint8]], Trace]

QUANTITIES = ("h", "s", "q", "logits")


@dataclass(frozen=True)
class Divergence:
    """The first integer on which an executor and the baseline differ.

    executor, baseline  their names             got, want  their values
    layer               the LIF node, or "logits"
    segment             the nodes between the layers that still agreed and this one: the fault is in one of them
    quantity            h, s, q or logits       step       timestep, from 0 (the last one for logits)
    sample              index in the data       index      (C, H, W) in the layer, or (class,)
    """

    executor: str
    baseline: str
    layer: str
    segment: tuple[str, ...]
    quantity: str
    step: int
    sample: int
    index: tuple[int, ...]
    got: int
    want: int

    def __str__(self) -> str:
        return (
            f"{self.executor} parts from {self.baseline} at layer {self.layer!r}, step {self.step}, {self.quantity} of"
            f" sample {self.sample} at {self.index}: {self.got}, where {self.baseline} has {self.want}."
            f" Between the layers that agree and this one: {' -> '.join(self.segment)}"
        )


@dataclass
class Comparison:
    """What one executor's run amounted to. `compared` and `differing` count integers per quantity (h, s, q, logits)."""

    executor: str
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0))
    differing: dict[str, int] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0))
    predictions: list[npt.NDArray[np.int64]] = field(default_factory=list)
    first: Divergence | None = None
    failure: str | None = None

    @property
    def agrees(self) -> bool:
        """It ran, something was compared, and nothing differed."""
        return self.failure is None and sum(self.compared.values()) > 0 and not any(self.differing.values())

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """Predicted class of each sample it ran."""
        return np.concatenate(self.predictions) if self.predictions else np.zeros(0, np.int64)

    def accuracy(self, labels: Array) -> float | None:
        """Share of samples classified right, or None if it did not run to the end."""
        if self.failure is not None or len(self.classes) != len(labels):
            return None
        return float(np.mean(self.classes == labels))


@dataclass
class Verification:
    """The outcome of `verify`: one Comparison an executor, the baseline first."""

    baseline: str
    samples: int
    comparisons: dict[str, Comparison]

    @property
    def agrees(self) -> bool:
        """At least two executors, and all of them agree."""
        return len(self.comparisons) > 1 and all(comparison.agrees for comparison in self.comparisons.values())

    @property
    def compared(self) -> int:
        """Integers compared, over all executors but the baseline."""
        return sum(sum(c.compared.values()) for name, c in self.comparisons.items() if name != self.baseline)

    @property
    def differing(self) -> int:
        """Integers that differed."""
        return sum(sum(c.differing.values()) for c in self.comparisons.values())

    @property
    def first(self) -> Divergence | None:
        """The first divergence of the first executor that has one."""
        return next((c.first for c in self.comparisons.values() if c.first is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values, schema mdsnn.verify/1."""
        return {
            "schema": "mdsnn.verify/1",
            "baseline": self.baseline,
            "samples": self.samples,
            "agrees": self.agrees,
            "compared": self.compared,
            "differing": self.differing,
            "executors": {
                name: {
                    "agrees": c.agrees,
                    "failure": c.failure,
                    "compared": c.compared,
                    "differing": c.differing,
                    "first": None if c.first is None else {**c.first.__dict__},
                }
                for name, c in self.comparisons.items()
            },
        }


def segments(network: IntegerNetwork) -> dict[str, tuple[str, ...]]:
    """For each LIF node and "logits": itself and the nodes it depends on that no LIF before it has shown to agree.

    A LIF whose h agrees has read the same current, so the node it reads agrees too. Nodes further up may still differ
    where rounding or saturation hid it, so they stay in the segments of later layers. If all earlier layers agree at
    a step, a difference at a layer arose in one of its segment's nodes.
    """
    agreed: set[str] = set()
    result: dict[str, tuple[str, ...]] = {}
    for node in network.nodes:
        if not isinstance(node, Lif) and node is not network.readout:
            continue
        stack, found = list(node.inputs), {node.name}
        while stack:
            name = stack.pop()
            if name not in agreed and name not in found:
                found.add(name)
                stack.extend(network[name].inputs)
        agreed.update((node.name, *node.inputs))
        result[LOGITS if node is network.readout else node.name] = tuple(
            other.name for other in network.nodes if other.name in found
        )
    return result


def kernel_executor(network: IntegerNetwork, kernels: str) -> Executor:
    """An executor over the engine: kernels "native", "numba" or "reference". Raises MissingError if not there."""
    engine = Engine(network, kernels)

    def execute(pixels: npt.NDArray[np.uint8]) -> Trace:
        trace = engine.run(pixels, trace=True).trace
        if trace is None:
            raise MdsnnError(f"{kernels}: the engine returned no trace")
        return trace

    return execute


def _misfit(network: IntegerNetwork, got: object, samples: int) -> str | None:
    """Why a value is no trace of `network`: its type, layers, shapes or dtypes."""
    if not isinstance(got, Trace):
        return f"it returned {type(got).__name__}, where a Trace is needed"
    names = [lif.name for lif in network.lifs]
    if sorted(got.lifs) != sorted(names):
        return f"its layers differ from the network's: {', '.join(sorted(set(got.lifs) ^ set(names))[:4])}"
    due: list[tuple[str, object, str, tuple[int, ...]]] = [("logits", got.logits, "int32", (samples, network.classes))]
    for name in names:
        full = (network.timesteps, samples, *network.proof.shapes[name])
        for quantity, form in (("h", "int32"), ("s", "uint8"), ("q", "int8")):
            due.append((f"{quantity} of {name!r}", getattr(got.lifs[name], quantity), form, full))
    for what, array, dtype, shape in due:
        if not isinstance(array, np.ndarray):
            return f"{what} is a {type(array).__name__}, where an array is needed"
        if array.shape != shape or array.dtype != dtype:
            return f"{what} is {array.dtype} {array.shape}, where {dtype} {shape} is needed"
    return None


def _first(network: IntegerNetwork, got: Trace, want: Trace, names: tuple[str, str], offset: int) -> Divergence | None:
    """The earliest difference: by step, then layer, then h, s, q, then sample and index."""
    segment = segments(network)
    for step in range(network.timesteps):
        for name in (lif.name for lif in network.lifs):
            for quantity in "hsq":
                a, b = getattr(got.lifs[name], quantity)[step], getattr(want.lifs[name], quantity)[step]
                where = np.argwhere(a != b)
                if len(where):
                    at = tuple(int(i) for i in where[0])
                    return Divergence(
                        *names, name, segment[name], quantity, step, offset + at[0], at[1:], int(a[at]), int(b[at])
                    )
    where = np.argwhere(got.logits != want.logits)
    if len(where):
        at = tuple(int(i) for i in where[0])
        values = int(got.logits[at]), int(want.logits[at])
        last = network.timesteps - 1
        return Divergence(*names, "logits", segment["logits"], "logits", last, offset + at[0], at[1:], *values)
    return None


def verify(
    network: IntegerNetwork,
    executors: Mapping[str, Executor],
    pixels: npt.ArrayLike,
    *,
    batch: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Run every executor on `pixels` and compare all integers with the first executor's.

    network    the network the executors claim to run; it orders the layers
    executors  name -> callable; the first is the baseline
    pixels     uint8 [N, C, H, W] or [T, N, C, H, W]
    batch      samples a comparison; memory is a few traces of this many
    progress   called with (samples done, samples)
    raises     InputError   for pixels that do not fit. What an executor raises becomes its Comparison's `failure`.
               ConfigError  without executors, or with a batch below 1
    """
    if not executors or batch < 1:
        raise ConfigError(f"{len(executors)} executors and a batch of {batch}: there must be at least 1 of each")
    array = check_pixels(network, pixels)
    axis = array.ndim - 4
    samples = array.shape[axis]
    baseline = next(iter(executors))
    result = Verification(baseline, samples, {name: Comparison(name) for name in executors})
    for at in range(0, samples, batch):
        part = np.ascontiguousarray(array[(slice(None),) * axis + (slice(at, at + batch),)])
        want: Trace | None = None
        for name, execute in executors.items():
            comparison = result.comparisons[name]
            if comparison.failure is not None:
                continue
            try:
                got = execute(part.copy())  # its own copy: whatever it does to it, the others see the same pixels
                comparison.failure = _misfit(network, got, part.shape[axis])
            except Exception as fault:  # an executor of any kind may fail in any way; that is the finding
                comparison.failure = f"{type(fault).__name__}: {fault}"
            if comparison.failure is not None:
                continue
            if name == baseline:
                want = got
            if want is None:
                comparison.failure = f"the baseline {baseline!r} did not run"
                continue
            _compare(network, comparison, got, want, baseline, at)
        if progress is not None:
            progress(min(at + batch, samples), samples)
    return result


def _compare(
    network: IntegerNetwork, comparison: Comparison, got: Trace, want: Trace, baseline: str, offset: int
) -> None:
    for quantity in QUANTITIES:
        if quantity == "logits":
            pairs = [(got.logits, want.logits)]
        else:
            pairs = [(getattr(got.lifs[name], quantity), getattr(lif, quantity)) for name, lif in want.lifs.items()]
        comparison.compared[quantity] += sum(a.size for a, _ in pairs)
        comparison.differing[quantity] += sum(int(np.count_nonzero(a != b)) for a, b in pairs)
    comparison.predictions.append(np.argmax(got.logits, axis=1))
    if comparison.first is None and any(comparison.differing.values()):
        comparison.first = _first(network, got, want, (comparison.executor, baseline), offset)


# ------------------------------------------------------------------------------ constants, and reproducing a find


@dataclass(frozen=True)
class ConstantDifference:
    """A constant in which two networks differ: node, field, flat count, first index and both values."""

    node: str
    field: str
    differing: int
    index: tuple[int, ...]
    got: object
    want: object

    def __str__(self) -> str:
        place = f"{self.field}{list(self.index)}" if self.index else self.field
        return f"node {self.node!r}: {place} is {self.got}, not {self.want} ({self.differing} values differ)"


def compare_constants(got: IntegerNetwork, want: IntegerNetwork) -> list[ConstantDifference]:
    """Every field in which the nodes of two networks differ, in graph order; empty if they compute the same."""
    found: list[ConstantDifference] = []

    def scalar(node: str, name: str, a: object, b: object) -> None:
        if a != b:
            found.append(ConstantDifference(node, name, 1, (), a, b))

    for name in ("input", "timesteps", "grid"):
        scalar("network", name, getattr(got, name), getattr(want, name))
    scalar("network", "nodes", [n.name for n in got.nodes], [n.name for n in want.nodes])
    if found:
        return found
    for a, b in zip(got.nodes, want.nodes, strict=True):
        scalar(a.name, "type", type(a).__name__, type(b).__name__)
        if type(a) is not type(b):
            continue
        for attribute in vars(a):
            x, y = getattr(a, attribute), getattr(b, attribute)
            if attribute not in type(a).ARRAYS:
                scalar(a.name, attribute, x, y)
            elif x.shape != y.shape:
                scalar(a.name, f"{attribute} shape", x.shape, y.shape)
            elif (x != y).any():
                at = tuple(int(i) for i in np.argwhere(x != y)[0])
                found.append(
                    ConstantDifference(a.name, attribute, int(np.count_nonzero(x != y)), at, int(x[at]), int(y[at]))
                )
    return found


def match_bn_forms(network: IntegerNetwork, like: IntegerNetwork) -> IntegerNetwork:
    """`network` with its affine BN tables made dense where the node of that name is dense in `like`."""
    dense = {node.name for node in like.nodes if isinstance(node, BnDense)}
    nodes: list[Node] = []
    for node in network.nodes:
        if isinstance(node, BnAffine) and node.name in dense:
            bounds = network.proof.channel_bounds[node.source]
            table = dense_table(node.multiplier, node.offset, node.shift, *bounds, network.grid)
            node = BnDense(node.name, node.source, table)
        nodes.append(node)
    return replace(network, nodes=tuple(nodes))


_SCRIPT = '''"""Reproduces a divergence: {summary}

Usage: python {script} [ARTIFACT]
"""

import sys
from pathlib import Path

import numpy as np

from mdsnn.export import artifact
from mdsnn.kernels import Engine

record = np.load(Path(__file__).with_name({record!r}), allow_pickle=False)
network = artifact.load(sys.argv[1] if len(sys.argv) > 1 else {artifact!r})
print("recorded:", {got_name!r}, int(record["got"]), "|", {want_name!r}, int(record["want"]))
for kernels in ("reference", "numba", "native"):
    try:
        trace = Engine(network, kernels, 1).run(record["pixels"], trace=True).trace
    except Exception as fault:
        print(kernels, "did not run:", fault)
        continue
    index = tuple(int(i) for i in record["index"])
    if {layer!r} == "logits":
        value = trace.logits[(0, *index)]
    else:
        value = getattr(trace.lifs[{layer!r}], {quantity!r})[({step}, 0, *index)]
    print(kernels, "has", int(value))
'''


def save_divergence(
    divergence: Divergence, pixels: npt.ArrayLike, artifact: str, folder: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Write the diverging sample and both values as .npz, and a short script that runs the engines on it again.

    Files of earlier finds are kept: the new ones take the next free number.

    pixels    the data that was verified (the whole array)
    artifact  the path the script loads unless it is given another
    returns   paths of the .npz and the script
    """
    array = np.asarray(pixels)
    axis = array.ndim - 4
    sample = array[(slice(None),) * axis + (slice(divergence.sample, divergence.sample + 1),)]
    number = 1
    while (Path(folder) / f"divergence-{number}.npz").exists() or (Path(folder) / f"reproduce-{number}.py").exists():
        number += 1
    record, script = Path(folder) / f"divergence-{number}.npz", Path(folder) / f"reproduce-{number}.py"
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        pixels=sample,
        index=np.array(divergence.index, np.int64),
        got=np.int64(divergence.got),
        want=np.int64(divergence.want),
    )
    text = _SCRIPT.format(
        summary=str(divergence).replace("\\", "/").replace('"""', "'''"),
        script=script.name,
        record=record.name,
        artifact=artifact,
        got_name=divergence.executor,
        want_name=divergence.baseline,
        layer=divergence.layer,
        quantity=divergence.quantity,
        step=divergence.step,
    )
    write_bytes(record, stream.getvalue())
    write_text(script, text)
    return record, script

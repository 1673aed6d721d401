"""How long does a training step take, and how much memory?

    python benchmarks/bench_training.py --json benchmarks/results/training.json

MS-ResNet-18 on 32x32 images, T = 4, batch 32, float32, channels_last: forward and backward, then the optimizer. All
contenders have the same weights and images and take turns in one process; peak memory is of a process each. What is
timed is first checked, on a small network: SpikingJelly's logits and gradients are ours but for the order of sums. (In
18 layers a sum rounded otherwise flips a spike somewhere, and the two drift apart.) `--quick` runs the small network
once: no figures.

Ratios are medians over rounds of the quotient of two turns of the same round. Processor time stands beside wall time:
where other programs run, it is the steadier of the two.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from mdsnn.cli.doctor import machine
from mdsnn.cli.terminal import say, table
from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.files import check_writable, make_folder, write_text
from mdsnn.machine import peak_rss

try:
    import networks
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    from mdsnn import distill
    from mdsnn.layers import LIF, taps
    from mdsnn.models import ms_resnet
except ImportError as fault:
    raise MissingError(f"{fault}: pip install 'mdsnn[train]'") from fault

SCHEMA = "mdsnn.bench-training/1"
W4U4 = {"weight_bits": 4, "membrane_bits": 4, "bn_bits": 8}
LIMITS = {
    ("spikingjelly", "teacher"): "at least 1.15, target 1.3",
    ("student", "teacher"): "at most 1.6",
    ("distill-group", "distill-none"): "at most 1.15",
}
"""Quotients of step times that the project holds itself to."""
_TOLERANCE = 0.01
Step = Callable[[], Tensor]
"""Forward and backward; the loss."""


class _Relu(nn.Module):
    """In a LIF's place: the ceiling, a network whose neurons cost next to nothing."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x if x.shape[0] == self.timesteps else x.expand(self.timesteps, *x.shape[1:]))


class Workload:
    """The weights, images and labels that all contenders share."""

    def __init__(self, quick: bool, batch: int) -> None:
        self.shape = networks.SMALL if quick else networks.RESNET18
        self.batch = batch
        generator = torch.Generator().manual_seed(0)
        self.options = {
            "size": self.shape.size,
            "timesteps": self.shape.timesteps,
            "classes": self.shape.classes,
        }
        self.weights = ms_resnet(self.shape.blocks, self.shape.widths, generator=generator, **self.options)
        size = (batch, 3, self.shape.size, self.shape.size)
        self.x = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        self.y = torch.randint(0, self.shape.classes, (batch,), generator=generator)

    def ours(self, **options: Any) -> nn.Module:
        """Our network with the shared weights."""
        model = ms_resnet(self.shape.blocks, self.shape.widths, **self.options, **options)
        model.load_state_dict(self.weights.state_dict())
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def spikingjelly(self) -> nn.Module:
        """The same network of SpikingJelly's multi-step modules, with the same surrogate."""
        from spikingjelly.activation_based import neuron, surrogate

        state = {name: value.numpy() for name, value in self.weights.state_dict().items()}
        net = networks.spikingjelly_twin(networks.FloatTwin(self.weights.config, state))
        for module in net.modules():
            if isinstance(module, neuron.LIFNode):
                module.surrogate_function = surrogate.PiecewiseQuadratic(alpha=1.0)
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _plain(work: Workload, model: nn.Module) -> tuple[nn.Module, Step]:
    def step() -> Tensor:
        loss = functional.cross_entropy(model(work.x), work.y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return model, step


def _ceiling(work: Workload) -> tuple[nn.Module, Step]:
    model = work.ours()
    for path, module in list(model.named_modules()):
        if isinstance(module, LIF):
            model.set_submodule(path, _Relu(module.timesteps))
    return _plain(work, model)


def _timestep_loop(work: Workload) -> tuple[nn.Module, Step]:
    """One timestep through the whole network after the other, as single-step modules are used."""
    from spikingjelly.activation_based import functional as reset

    net: Any = work.spikingjelly()
    reset.set_step_mode(net, "s")

    def step() -> Tensor:
        reset.reset_net(net)
        x = net.input(work.x)[0]
        rates = torch.zeros(())
        for _ in range(work.shape.timesteps):
            rates = rates + net.lif(net.groups(net.stem_bn(net.stem(x)))).mean((2, 3))
        loss = functional.cross_entropy(net.readout(rates / work.shape.timesteps), work.y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return net, step


def _distilled(work: Workload, where: str | None) -> tuple[nn.Module, Step]:
    """A student under Eq. 7: cross-entropy and logits, and the membranes of the taps `where`."""
    teacher, student = work.ours().eval(), work.ours(**W4U4)
    theirs, ours = ([], []) if where is None else (taps(teacher, where), taps(student, where))
    for lif in (*theirs, *ours):
        lif.tap = True

    def step() -> Tensor:
        z = student(work.x)
        with torch.no_grad():
            teacher_z = teacher(work.x)
        membranes = [[lif.last_h for lif in lifs if lif.last_h is not None] for lifs in (theirs, ours)]
        loss = distill.total_loss("CL" if where is None else "CLK", z, work.y, teacher_z, *membranes).total
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return student, step


CONTENDERS: dict[str, tuple[str, Callable[[Workload], tuple[nn.Module, Step]]]] = {
    "teacher": ("teacher, float32", lambda work: _plain(work, work.ours())),
    "student": ("student, W4U4", lambda work: _plain(work, work.ours(**W4U4))),
    "distill-none": ("student, logits of a teacher", lambda work: _distilled(work, None)),
    "distill-group": ("... and membranes of groups", lambda work: _distilled(work, "group")),
    "distill-block": ("... and membranes of blocks", lambda work: _distilled(work, "block")),
    "distill-conv": ("... and membranes of convolutions", lambda work: _distilled(work, "conv")),
    "recompute": (
        "student, --checkpoint-activations",
        lambda work: _plain(work, work.ours(**W4U4, checkpoint_activations=True)),
    ),
    "spikingjelly": ("SpikingJelly, multi-step", lambda work: _plain(work, work.spikingjelly())),
    "loop": ("SpikingJelly, one timestep after the other", _timestep_loop),
    "ceiling": ("ours, every LIF a ReLU", _ceiling),
}


def check(work: Workload) -> float:
    """Mean distance of SpikingJelly's logits and stem gradient from ours, relative to their spread.

    raises  ConfigError  if one is above 1 %
    """
    found = []
    for model in (work.ours(), work.spikingjelly()):
        z = model.train()(work.x)
        functional.cross_entropy(z, work.y).backward()  # type: ignore[no-untyped-call]
        found.append((z.detach(), model.get_parameter("stem.weight").grad))
    distances = []
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None  # backward filled it
        assert theirs is not None
        distances.append(float((ours - theirs).abs().mean() / ours.std()))
    if max(distances) > _TOLERANCE:
        raise ConfigError(f"SpikingJelly's logits and gradient differ from ours by {distances} of their spread")
    return max(distances)


def _turn(model: nn.Module, step: Step, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    optimizer.zero_grad(set_to_none=True)
    wall, processor = time.perf_counter(), time.process_time()
    step()
    row = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - processor}
    optimizer.step()
    return row | {"with_optimizer_s": time.perf_counter() - wall}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Of rate 0: the work of an update, but weights and firing rates stay as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, nesterov=True)


def measure(work: Workload, names: list[str], rounds: int) -> dict[str, list[dict[str, float]]]:
    """`rounds` turns of each contender, in turn, after one to warm up."""
    built = {}
    for name in names:
        model, step = CONTENDERS[name][1](work)
        built[name] = model.train(), step, _optimizer(model)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for place in range(rounds + 1):
        say(f"round {place} of {rounds}" if place else "warming up")
        for name, contender in built.items():
            row = _turn(*contender)
            turns[name] += [row] if place else []
    return turns


def peak_memory(name: str, quick: bool, batch: int) -> int:
    """Bytes by which two steps raise a process's peak above what it holds with its libraries and data loaded."""
    command = [sys.executable, __file__, "--batch", str(batch), "--peak", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{name}: its process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return int(done.stdout.split()[-1])


def _peak(name: str, work: Workload) -> int:
    model, step = CONTENDERS[name][1](work)
    optimizer = _optimizer(model.train())
    before = _high_water()
    for _ in range(2):
        _turn(model, step, optimizer)
    return _high_water() - before


def _high_water() -> int:
    peak = peak_rss()
    if peak is None:
        raise ConfigError("/proc/self/status names no VmHWM: peak memory is measured on Linux only")
    return peak


def quotient(turns: dict[str, list[dict[str, float]]], over: str, under: str, what: str) -> float:
    """Median over rounds of the quotient of two contenders' times."""
    return statistics.median(a[what] / b[what] for a, b in zip(turns[over], turns[under], strict=True))


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1, 100), help="The median counts.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1, 4096))
@click.option("--only", default=",".join(CONTENDERS), show_default=True, help="Contenders, separated by commas.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of torch; default: its own choice.")
@click.option("--quick", is_flag=True, help="A small network, once: does everything run?")
@click.option("--peak", hidden=True, type=click.Choice(list(CONTENDERS)), help="Print one contender's peak memory.")
@click.option("--json", "json_file", metavar="FILE.json", help="Write the result.")
@click.option("--force", is_flag=True, help="Replace FILE.json.")
def main(
    rounds: int,
    batch: int,
    only: str,
    threads: int | None,
    quick: bool,
    peak: str | None,
    json_file: str | None,
    force: bool,
) -> None:
    """Time a training step of each contender."""
    if json_file is not None:
        make_folder(Path(json_file).parent)
        check_writable(json_file, force=force)
    names = only.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise click.BadParameter(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    if threads is not None:
        torch.set_num_threads(threads)
    rounds, batch = (1, min(batch, 4)) if quick else (rounds, batch)
    work = Workload(quick, batch)
    if peak is not None:
        click.echo(_peak(peak, work))
        return
    distance = check(Workload(True, 4))
    turns = measure(work, names, rounds)
    say("peak memory")
    memory = {name: peak_memory(name, quick, batch) for name in names}
    pairs = [pair for pair in LIMITS if set(pair) <= set(names)]
    pairs += [(name, "teacher") for name in names if name != "teacher" and "teacher" in names]
    pairs += [(f"distill-{where}", "distill-none") for where in ("block", "conv")]
    pairs = [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(names)]
    document = {
        "schema": SCHEMA,
        "quick": quick,
        "rounds": rounds,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("mdsnn", "torch", "numba", "spikingjelly")},
        "network": {"blocks": work.shape.blocks, "widths": work.shape.widths, **work.options},
        "distance_from_spikingjelly": distance,
        "turns": turns,
        "peak_bytes": memory,
        "medians": {
            name: {what: statistics.median(row[what] for row in rows) for what in rows[0]}
            for name, rows in turns.items()
        },
        "quotients": [
            {
                "of": over,
                "to": under,
                **{what: quotient(turns, over, under, what) for what in ("wall_s", "cpu_s")},
                "limit": LIMITS.get((over, under), ""),
            }
            for over, under in pairs
        ],
    }
    for key, value in document["machine"].items():
        click.echo(f"{key:>11}  {value}")
    rows = [
        [CONTENDERS[name][0], *(f"{x:.3f}" for x in document["medians"][name].values()), f"{memory[name] / 1e6:.0f}"]
        for name in names
    ]
    table(["contender", "step s", "processor s", "with optimizer s", "peak MB"], rows)
    found = document["quotients"]
    table(
        ["step of", "to", "wall", "processor", "limit"],
        [[q["of"], q["to"], f"{q['wall_s']:.3f}", f"{q['cpu_s']:.3f}", q["limit"]] for q in found],
    )
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n", force=force)


if __name__ == "__main__":
    main()

"""Random integer networks that hold the cases where engines go wrong: planted ties and range extremes.

Comparing engines on plain random networks misses off-by-one comparisons, because a membrane rarely lands on a
threshold. Here the reference runs once, and then v_th and a quarter of each LIF's thresholds are set to values that
were reached, or one beside. Weights, BN constants, channel counts and steps are drawn with their extremes.

The same builder serves hypothesis (which shrinks) and plain seeded loops (for volume): both are a `Choices`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from hypothesis import strategies as st

from mdsnn.kernels.engine import Engine
from mdsnn.kernels.formats import (
    Grid,
    accumulator_bounds,
    affine_constants,
    decode_table,
    delta,
    dense_table,
    event_table,
    image_table,
    pre_fire_code,
    requantize_thresholds,
    shortcut_shift,
    soft_reset_code,
    threshold_code,
)
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    MaxPool,
    Node,
    Readout,
    Requantize,
    SumPool,
)


class Choices(Protocol):
    def integer(self, lo: int, hi: int) -> int: ...
    def pick(self, options: list[Any]) -> Any: ...
    def rng(self) -> np.random.Generator: ...


class SeededChoices:
    """Choices from a NumPy generator, for plain loops."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def integer(self, lo: int, hi: int) -> int:
        return int(self._rng.integers(lo, hi + 1))

    def pick(self, options: list[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def rng(self) -> np.random.Generator:
        return self._rng


class DrawnChoices:
    """Choices drawn by hypothesis; the first option of a list is what it shrinks to."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw
        self._rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def integer(self, lo: int, hi: int) -> int:
        return int(self._draw(st.integers(lo, hi)))

    def pick(self, options: list[Any]) -> Any:
        return self._draw(st.sampled_from(options))

    def rng(self) -> np.random.Generator:
        return self._rng


class _Builder:
    def __init__(self, choices: Choices, *, max_channels: int, max_timesteps: int, events: bool | None) -> None:
        self.choices, self.rng = choices, choices.rng()
        self.nodes: list[Node] = []
        self.coding = "events" if (choices.pick([False, False, True]) if events is None else events) else "image"
        self.grid = Grid(choices.pick([9, 5, 7, 8, 12]), choices.pick([8, 1, 3]))
        self.widths = [w for w in (4, 1, 3, 8, 16, 31, 63, 64, 65, 130) if w <= max_channels]
        self.timesteps = choices.pick([t for t in (2, 1, 3, 4, 5, 8, 9, 32) if t <= max_timesteps])
        self.spec = InputSpec(choices.pick([1, 2, 3]), choices.integer(4, 9), choices.integer(4, 9), self.coding)
        self.tau = choices.pick([0.5, 0.25, 1.0, 0.9, 1 / 3])
        self.v_th = choices.pick([0.5, 1.0, 0.3, 0.05])

    def add(self, node: Node) -> str:
        self.nodes.append(node)
        return node.name

    def name(self, kind: str) -> str:
        return f"{kind}{len(self.nodes)}"

    def weight(self, shape: tuple[int, ...], bits: int) -> np.ndarray:
        top = delta(bits)
        match self.choices.pick(["random", "random", "aligned", "sparse", "zero_channel"]):
            case "aligned":
                sign = self.rng.choice([-1, 1], (shape[0],) + (1,) * (len(shape) - 1))
                return np.broadcast_to(sign * top, shape).astype(np.int8)
            case "sparse":
                return self.rng.integers(-top, top + 1, shape) * (self.rng.random(shape) < 0.1)
            case "zero_channel":
                weight = self.rng.integers(-top, top + 1, shape)
                weight[0] = 0
                return weight
        return self.rng.integers(-top, top + 1, shape)

    def bn(self, source: str, weight: np.ndarray, span: tuple[int, int]) -> str:
        lo, hi = accumulator_bounds(weight, *span)
        channels = len(lo)
        fan_in = max(1.0, float(np.abs(weight.astype(np.int64)).sum() / channels * max(span[1], 1)))
        scale = self.rng.normal(0, 1, channels) / np.sqrt(fan_in)
        bias = self.rng.normal(0, 0.3, channels)
        match self.choices.pick(["plain", "plain", "large", "tiny", "dead", "wide"]):
            case "large":
                scale *= 64
            case "tiny":
                scale *= 1e-4
            case "dead":
                scale[0] = 0.0
                bias[-1] = 100.0
            case "wide":  # a product beyond 32 bits
                scale[0] = 2.0**20 / self.grid.one
                bias[0] = 2.0**22
        affine = affine_constants(scale, bias, lo, hi, self.grid)
        if self.choices.pick([False, True]) and int((hi - lo + 1).sum()) <= 1 << 15:
            table = dense_table(affine.multiplier, affine.offset, affine.shift, lo, hi, self.grid)
            return self.add(BnDense(self.name("bn"), source, table))
        return self.add(BnAffine(self.name("bn"), source, affine.multiplier, affine.offset, affine.shift))

    def conv(self, source: str, shape: tuple[int, int, int], span: tuple[int, int], **fixed: int) -> tuple[str, Any]:
        c_in, height, width = shape
        k = fixed.get("kernel") or self.choices.pick([kernel for kernel in (3, 1, 2) if kernel <= min(height, width)])
        c_out = fixed.get("c_out") or self.choices.pick(self.widths)
        stride = fixed.get("stride") or self.choices.pick([1, 1, 2])
        padding = self.choices.integer(0, k - 1) if "padding" not in fixed else fixed["padding"]
        divisors = [g for g in range(1, c_in + 1) if c_in % g == 0 and c_out % g == 0]
        groups = self.choices.pick([1, 1, divisors[-1], divisors[len(divisors) // 2]])
        bits = self.choices.integer(2, 8)
        weight = self.weight((c_out, c_in // groups, k, k), bits)
        conv = self.add(Conv(self.name("conv"), source, weight, bits, stride, padding, groups))
        out = (height + 2 * padding - k) // stride + 1, (width + 2 * padding - k) // stride + 1
        return self.bn(conv, weight, span), (c_out, *out)

    def lif(self, source: str) -> str:
        bits = self.choices.integer(2, 8)
        alpha = float(self.rng.uniform(0.1, 1.0))
        quantize = self.choices.pick(["post_reset", "post_reset", "pre_fire"])
        reset = "hard" if quantize == "pre_fire" else self.choices.pick(["hard", "soft"])
        v_th, q_th = threshold_code(self.v_th, self.grid, inclusive=self.choices.pick([False, True])), 0
        if quantize == "pre_fire":
            alpha = min(1.0, 1.5 * min(self.v_th, 0.6))
            q_th = pre_fire_code(min(self.v_th, 0.6), alpha, bits, self.grid)
        return self.add(
            Lif(
                self.name("lif"),
                source,
                bits,
                decode_table(alpha, self.tau, bits, self.grid),
                requantize_thresholds(alpha, bits, self.grid),
                v_th,
                reset,
                soft_reset_code(self.v_th, self.grid) if reset == "soft" else 0,
                quantize,
                q_th,
            )
        )

    def block(self, x: str, shape: tuple[int, int, int]) -> tuple[str, tuple[int, int, int]]:
        kinds = ["plain", "residual", "pooled"]
        if min(shape[1:]) >= 3:
            kinds.append("down")
        kind = self.choices.pick(kinds)
        spikes = self.lif(x)
        if kind == "plain":
            return self.conv(spikes, shape, (0, 1))
        if kind == "pooled":
            if self.choices.pick([True, False]):
                pooled, hi = self.add(MaxPool(self.name("max_pool"), spikes, 2, 2, 0)), 1
            else:
                pooled, hi = self.add(SumPool(self.name("sum_pool"), spikes, 2, 2, 2, 0)), 4
            return self.conv(pooled, (shape[0], shape[1] // 2, shape[2] // 2), (0, hi), kernel=1, stride=1)
        if kind == "residual":
            y, mid = self.conv(spikes, shape, (0, 1), kernel=3, stride=1, padding=1)
            y, _ = self.conv(self.lif(y), mid, (0, 1), kernel=3, stride=1, padding=1, c_out=shape[0])
            return self.add(Add(self.name("add"), y, x)), shape
        y, out = self.conv(spikes, shape, (0, 1), kernel=3, stride=2, padding=1)
        bits = self.choices.pick([8, 4, 2])
        codes = self.add(Requantize(self.name("requantize"), x, shortcut_shift(bits, self.grid), bits))
        span = (-delta(bits), delta(bits))
        skip, _ = self.conv(codes, shape, span, kernel=1, stride=2, padding=0, c_out=out[0])
        return self.add(Add(self.name("add"), y, skip)), out

    def build(self) -> IntegerNetwork:
        spec = self.spec
        if self.coding == "image":
            mean, std = self.rng.uniform(0.2, 0.7, spec.channels), self.rng.uniform(0.1, 0.4, spec.channels)
            table, span = image_table(mean, std), (-128, 127)
        else:
            table, span = event_table(spec.channels), (0, 127)
        codes = self.add(InputTable("input", table))
        x, shape = self.conv(codes, (spec.channels, spec.height, spec.width), span)
        for _ in range(self.choices.integer(0, 2)):
            if min(shape[1:]) >= 2:
                x, shape = self.block(x, shape)
        x, hi = self.lif(x), 1
        if self.choices.pick([True, False]):
            x = self.add(SumPool(self.name("sum_pool"), x, shape[1], shape[2], 1, 0))
            hi, features = shape[1] * shape[2], shape[0]
        else:
            x = self.add(Flatten(self.name("flatten"), x))
            features = shape[0] * shape[1] * shape[2]
        if self.choices.pick([False, True]):
            bits, width = self.choices.integer(2, 8), self.choices.pick(self.widths)
            weight = self.weight((width, features), bits)
            x = self.add(Linear(self.name("linear"), x, weight, bits))
            x, features = self.lif(self.bn(x, weight, (0, hi))), width
        bits, classes = self.choices.integer(2, 8), self.choices.pick([3, 1, 10])
        weight = self.weight((classes, features), bits)
        if classes > 1 and self.choices.pick([False, True]):
            weight[1] = weight[0]  # equal logits: the lowest index must win
        bias = np.zeros(classes, np.int64) if self.choices.pick([True, False]) else self.rng.integers(-99, 99, classes)
        self.add(Readout("readout", x, weight, bits, bias))
        return IntegerNetwork(tuple(self.nodes), spec, self.timesteps, self.grid)


def draw_pixels(network: IntegerNetwork, samples: int, choices: Choices) -> np.ndarray:
    """Pixels that fit `network`: random, all 0, all 255, or rare events."""
    spec = network.input
    shape: tuple[int, ...] = (samples, spec.channels, spec.height, spec.width)
    if spec.coding == "events":
        shape = (network.timesteps, *shape)
    rng = choices.rng()
    match choices.pick(["random", "random", "ones", "zeros", "rare"]):
        case "ones":
            return np.full(shape, 255, np.uint8)
        case "zeros":
            return np.zeros(shape, np.uint8)
        case "rare":
            return (rng.integers(0, 256, shape) * (rng.random(shape) < 0.1)).astype(np.uint8)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def plant_ties(network: IntegerNetwork, pixels: np.ndarray, rng: np.random.Generator) -> IntegerNetwork:
    """Move v_th and a quarter of the thresholds of every LIF onto values its h and u reach, or one beside."""
    trace = Engine(network, "reference", 1).run(pixels, trace=True).trace
    assert trace is not None
    nodes: list[Node] = []
    for node in network.nodes:
        if isinstance(node, Lif):
            reached = np.unique(trace.lifs[node.name].h)
            near = reached[np.abs(reached) < 1 << 14]
            if near.size:
                thresholds = node.thresholds.astype(np.int64)
                places = rng.random(thresholds.size) < 0.25
                thresholds[places] = rng.choice(near, int(places.sum())) + rng.integers(-1, 2, int(places.sum()))
                positive = near[near > 0]
                v_th = int(rng.choice(positive)) + int(rng.integers(-1, 1)) if positive.size else node.v_th
                node = replace(node, thresholds=np.sort(thresholds), v_th=v_th)
        nodes.append(node)
    return replace(network, nodes=tuple(nodes))


def build_case(
    choices: Choices, *, samples: int = 2, max_channels: int = 16, max_timesteps: int = 8, events: bool | None = None
) -> tuple[IntegerNetwork, np.ndarray]:
    """A planted network and pixels for it."""
    builder = _Builder(choices, max_channels=max_channels, max_timesteps=max_timesteps, events=events)
    network = builder.build()
    pixels = draw_pixels(network, samples, choices)
    return plant_ties(network, pixels, builder.rng), pixels


def seeded_case(seed: int, **limits: Any) -> tuple[IntegerNetwork, np.ndarray]:
    """Case number `seed` of the plain loop."""
    return build_case(SeededChoices(seed), **limits)


@st.composite
def network_cases(draw: Any, **limits: Any) -> tuple[IntegerNetwork, np.ndarray]:
    """Hypothesis strategy: (network, pixels)."""
    return build_case(DrawnChoices(draw), **limits)


def assert_same_bits(got: Any, want: Any, what: str) -> None:
    """Equal dtype, shape and every element; the message names the first difference."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {got.shape}, want {want.shape}"
    differs = np.argwhere(got != want)
    if len(differs):
        at = tuple(int(i) for i in differs[0])
        raise AssertionError(
            f"{what}: {len(differs)} of {got.size} differ; first at {at}: got {got[at]}, want {want[at]}"
        )


def assert_same_trace(got: Any, want: Any) -> None:
    """Equal h, s and q of every LIF node and step, and equal logits."""
    assert list(got.lifs) == list(want.lifs)
    for name, lif in want.lifs.items():
        for what in ("h", "s", "q"):
            assert_same_bits(getattr(got.lifs[name], what), getattr(lif, what), f"{what} of {name!r} [T,N,C,H,W]")
    assert_same_bits(got.logits, want.logits, "logits")


def covering(
    wanted: set[str], seeds: int, *, least_timesteps: int = 1, **limits: int
) -> list[tuple[IntegerNetwork, np.ndarray]]:
    """Seeded cases whose pixels are not all 0 and that have `wanted` between them, each bringing something new.

    wanted  of the names of node types, "image", "events", and what `_traits` names
    """
    missing, cases = set(wanted), []
    for seed in range(seeds):
        network, pixels = seeded_case(seed, **limits)
        kinds = {type(node).__name__ for node in network.nodes} | {network.input.coding} | _traits(network)
        if kinds & missing and pixels.any() and network.timesteps >= least_timesteps:
            missing -= kinds
            cases.append((network, pixels))
    assert not missing
    return cases


def _traits(network: IntegerNetwork) -> set[str]:
    found = set()
    for node in network.nodes:
        if isinstance(node, Conv):
            named = {"groups": node.groups > 1, "stride": node.stride > 1, "padding": node.padding > 0}
            found |= {name for name, there in named.items() if there}
        if isinstance(node, Requantize) and not network.proof.static[node.name] and network.timesteps > 2:
            found.add("codes of a stream that moves")
    return found

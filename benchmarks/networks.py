"""The benchmark's networks: MS-ResNets with random weights in which every LIF layer fires at a wanted density, and what
the comparators run in their place.

Speed depends on shapes and on how many neurons fire, not on what a network has learned. `calibrate` walks a random
network in order of execution: each BN takes the statistics of the calibration images, and the beta of the last BN
before each LIF layer is bisected until that layer fires at the wanted density. Densities are equal in all layers, which
those of a trained network are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from mdsnn import models
from mdsnn.export.lower import lower
from mdsnn.freeze import freeze
from mdsnn.kernels.errors import ConfigError
from mdsnn.kernels.formats import IMAGE_FRAC_BITS, Array
from mdsnn.kernels.network import BnAffine, BnDense, Conv, InputTable, IntegerNetwork, Lif, Node, Requantize
from mdsnn.layers import LIF, QuantBatchNorm2d, ShortcutQuant, trace
from mdsnn.models.ms_resnet import MSResNet, ms_resnet

GAMMA = 0.5
"""Of every BN: large enough to reach densities of 50 %, small enough for 5 % where the residual stream has grown."""
BETA_SPREAD = 0.1
"""Standard deviation of a channel's beta around its layer's: channels fire unequally."""
_REACH = 2.0
"""Betas are sought within +-_REACH; tanh, which Eq. 4 takes of them, is 0.96 there."""
_HALVINGS = 9  # to steps of 1/128, Eq. 4's own
BN_EPS = 1e-5
"""What every BN layer adds to its variance."""
_TOLERANCE = 0.1
"""Largest relative distance of a calibrated density from the wanted one."""


@dataclass(frozen=True)
class Shape:
    """An MS-ResNet of basic blocks on images of size x size: blocks[i] blocks of widths[i] channels."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    size: int = 32
    timesteps: int = 4
    classes: int = 100


RESNET18 = Shape()
SMALL = Shape((1, 1), (8, 16), size=12, classes=10)
"""What --quick runs: seconds, and no measure of speed."""


@dataclass(frozen=True)
class FloatTwin:
    """An integer network in float32: its weights are the codes, its tables straight lines, its membranes not rounded.

    config  for mdsnn.models.build      state  the state dict as arrays
    neuron  "lif", or "relu" at T = 1: the ANN of the same shape
    ranges  largest |value| on the calibration images: of each BN layer, and of what each LIF or ReLU reads, by name
    """

    config: dict[str, Any]
    state: dict[str, npt.NDArray[Any]]
    neuron: str = "lif"
    ranges: Mapping[str, float] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, in evaluation mode."""
        model = models.build(self.config)
        model.load_state_dict(self.tensors())
        if self.neuron == "relu":
            _replace_lifs(model)
        return model.eval()

    def tensors(self) -> dict[str, Tensor]:
        """The state dict, copied."""
        return {name: torch.from_numpy(np.array(array)) for name, array in self.state.items()}


def random_images(count: int, shape: Shape, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """uint8 [count, 3, size, size], every pixel uniform in 0..255."""
    return rng.integers(0, 256, (count, 3, shape.size, shape.size), dtype=np.uint8)


def integer_network(shape: Shape, bits: int, density: float, *, seed: int, images: int = 16) -> IntegerNetwork:
    """A student of random weights, calibrated, frozen and lowered.

    bits     of weights and membranes (W4U4: 4); BN, stem, shortcut codes and classifier have 8
    density  share of neuron-steps that fire, wanted in every LIF layer, 0..1
    images   random images to calibrate on
    raises   ConfigError  naming a LIF layer that cannot be brought within a tenth of `density`
    """
    model = _random(shape, seed, weight_bits=bits, membrane_bits=bits, bn_bits=8)
    calibrate(model, random_images(images, shape, np.random.default_rng([seed, 1])), density, seed=seed)
    return lower(freeze(model))


def _random(shape: Shape, seed: int, **bits: Any) -> MSResNet:
    return ms_resnet(
        shape.blocks,
        shape.widths,
        size=shape.size,
        classes=shape.classes,
        timesteps=shape.timesteps,
        generator=torch.Generator().manual_seed(seed),
        **bits,
    )


# --------------------------------------------------------------------------------------------------- calibrating


def calibrate(model: nn.Module, pixels: npt.NDArray[np.uint8], density: float, *, seed: int) -> dict[str, float]:
    """Set BN statistics and betas and membrane alphas so that every LIF layer fires at `density` on `pixels`.

    model    live, quantized or not; changed in place and left in evaluation mode. A BN layer must stand between any two
             LIF layers, in order of execution, and its output must reach the second.
    returns  LIF layer -> the density reached on `pixels`
    raises   ConfigError  naming a layer whose density stays off by more than a tenth
    """
    if not 0.0 < density < 1.0:
        raise ConfigError(f"density = {density} is outside 0..1")
    model.eval()
    walk = _Calibration(model, density, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        walk.run(torch.from_numpy(pixels))
    return walk.reached


class _Calibration(fx.Interpreter):
    """Runs the model once, node by node, and fixes each BN and LIF layer before going on."""

    def __init__(self, model: nn.Module, density: float, generator: torch.Generator) -> None:
        super().__init__(fx.GraphModule(model, trace(model)), garbage_collect_values=False)
        self.extra_traceback = False
        self.density, self.generator = density, generator
        self.nodes = list(self.graph.nodes)
        self.reached: dict[str, float] = {}

    def layer(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def run_node(self, n: fx.Node) -> Any:
        layer = self.layer(n)
        if isinstance(layer, QuantBatchNorm2d):
            x = self.env[n.all_input_nodes[0]]
            layer.running_mean.copy_(x.mean(dim=(0, 1, 3, 4)))
            layer.running_var.copy_(x.var(dim=(0, 1, 3, 4), correction=0))
            layer.weight.fill_(GAMMA)
            layer.bias.copy_(BETA_SPREAD * torch.randn(layer.channels, generator=self.generator))
        elif isinstance(layer, LIF):
            self._bisect(n, layer)
        return super().run_node(n)

    def _bisect(self, n: fx.Node, lif: LIF) -> None:
        """Shift the betas of the last BN before `lif` until it fires at the wanted density."""
        before = self.nodes[: self.nodes.index(n)]
        at = max((i for i, node in enumerate(before) if isinstance(self.layer(node), QuantBatchNorm2d)), default=-1)
        bn = self.layer(before[at]) if at >= 0 else None
        if not isinstance(bn, QuantBatchNorm2d) or any(isinstance(self.layer(node), LIF) for node in before[at:]):
            raise ConfigError(f"layer '{n.target}': no BN layer stands between it and the LIF layer before it")
        base = bn.bias.detach().clone()

        def fire(shift: float) -> float:
            bn.bias.copy_(base + shift)
            for node in before[at:]:
                self.env[node] = super(_Calibration, self).run_node(node)
            spikes = lif(self.env[n.all_input_nodes[0]])
            return float(spikes.mean(dtype=torch.float64))

        lif.train()  # so that it measures its alpha
        fire(0.0)
        lif.eval()
        low, high = -_REACH, _REACH
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if fire(middle) < self.density:
                low = middle
            else:
                high = middle
        reached = fire(high)
        self.reached[str(n.target)] = reached
        if abs(reached - self.density) > _TOLERANCE * self.density:
            raise ConfigError(
                f"layer '{n.target}': fires in {reached:.1%} of its neuron-steps at best, where {self.density:.1%} was "
                "wanted; ask for another density, or calibrate on more images"
            )
        for node in before:
            if node in self.env and all(user in before for user in node.users):
                del self.env[node]  # nothing reads it any more


# --------------------------------------------------------------------------------------------------------- twins


class _Relu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def _replace_lifs(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LIF):
            model.set_submodule(name, _Relu())


def float_twin(network: IntegerNetwork, pixels: npt.NDArray[np.uint8]) -> FloatTwin:
    """An MS-ResNet of this package as float libraries run it; its logits are the integers over T * pooled pixels.

    pixels  calibration images, for `ranges`
    raises  ConfigError  if the network is no MS-ResNet that this package exported, with hard resets
    """
    nodes = {node.name: node for node in network.nodes}
    places = [tuple(map(int, name.split(".")[1:3])) for name in nodes if name.endswith(".conv1")]
    lif, stem = nodes.get("lif"), nodes.get("stem")
    tau = network.notes.get("lif.tau")
    if not (places and isinstance(lif, Lif) and lif.reset == "hard" and isinstance(stem, Conv) and tau):
        raise ConfigError("only an MS-ResNet of this package with hard resets has a float twin here")
    blocks = [sum(place[0] == group for place in places) for group in range(places[-1][0] + 1)]
    step = 2.0**-network.grid.frac_bits
    mean, std = _normalization(network.nodes[0])
    readout = network.readout
    pooled = network.timesteps * math.prod(network.proof.shapes[lif.name][1:])
    state: dict[str, npt.NDArray[Any]] = {
        "readout.weight": readout.weight.reshape(network.classes, -1).astype(np.float32),
        "readout.bias": (readout.bias / pooled).astype(np.float32),
    }
    for node in network.nodes:
        if isinstance(node, Conv):
            state[f"{node.name}.weight"] = node.weight.astype(np.float32)
        elif isinstance(node, BnAffine | BnDense):
            unit = _input_step(network, nodes[nodes[node.source].inputs[0]])
            slope, intercept = _line(network, node)
            state[f"{node.name}.weight"] = (slope * step / unit).astype(np.float32)
            state[f"{node.name}.bias"] = (intercept * step).astype(np.float32)
            state[f"{node.name}.running_mean"] = np.zeros(len(slope), np.float32)
            state[f"{node.name}.running_var"] = np.full(len(slope), 1.0 - BN_EPS, np.float32)
        elif isinstance(node, Lif):
            state[f"{node.name}.alpha"] = np.array(1.0, np.float32)
            state[f"{node.name}.alpha_batches"] = np.array(1, np.int64)
    model = ms_resnet(
        blocks,
        [len(state[f"groups.{group}.0.conv1.weight"]) for group in range(len(blocks))],
        size=(network.input.height, network.input.width),
        in_channels=network.input.channels,
        classes=network.classes,
        timesteps=network.timesteps,
        mean=mean,
        std=std,
        v_th=lif.v_th * step,
        tau=float.fromhex(tau),
    )
    twin = FloatTwin(model.config, state)
    return replace(twin, ranges=_ranges(twin.build(), pixels))


def relu_twin(twin: FloatTwin, pixels: npt.NDArray[np.uint8]) -> FloatTwin:
    """The ANN of the same shape and weights: ReLU for LIF, T = 1, BN statistics of its own."""
    ann = replace(twin, config={**twin.config, "timesteps": 1}, neuron="relu")
    model = ann.build()
    with torch.no_grad():
        _Calibration(model, 0.0, torch.Generator().manual_seed(0)).run(torch.from_numpy(pixels))
    found = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return replace(ann, state={**ann.state, **found}, ranges=_ranges(model, pixels))


def float_logits(twin: FloatTwin, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Logits [N, classes] of `twin`, an image at a time."""
    model = twin.build()
    with torch.inference_mode():
        logits = torch.cat([model(image[None]) for image in torch.from_numpy(pixels)])
    found: npt.NDArray[np.float32] = logits.numpy()
    return found


def _input_step(network: IntegerNetwork, source: Node) -> float:
    """Real value of one code of what a convolution reads."""
    if isinstance(source, InputTable):
        return 2.0**-IMAGE_FRAC_BITS
    return 2.0 ** (source.shift - network.grid.frac_bits) if isinstance(source, Requantize) else 1.0


def _line(network: IntegerNetwork, node: BnAffine | BnDense) -> tuple[Array, Array]:
    """Slope and intercept of a BN table's rows, in codes of the stream, where they do not saturate."""
    if isinstance(node, BnAffine):
        scale = 2.0 ** node.shift.astype(np.float64)
        return node.multiplier / scale, node.offset / scale - 0.5  # the floor is a rounding: 0.5 is in the offset
    lo, hi = network.proof.channel_bounds[node.source]
    ends = np.cumsum(hi - lo + 1)
    lines = []
    for row, first in zip(np.split(node.table, ends[:-1]), lo, strict=True):
        inside = np.flatnonzero(np.abs(row) < network.grid.saturation)
        places = inside[[0, -1]] if len(inside) > 1 else np.array([0, len(row) - 1])
        (x0, x1), (y0, y1) = places + int(first), row[places]
        slope = (y1 - y0) / max(x1 - x0, 1)
        lines.append((slope, y0 - slope * x0))
    slopes, intercepts = np.array(lines).T
    return slopes, intercepts


def _normalization(table: Node) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that make an input table, or nearly."""
    assert isinstance(table, InputTable)
    lines = []
    for row in table.table:
        inside = (row > -128) & (row < 127)  # the rest saturates
        lines.append(np.polyfit(np.arange(256)[inside] / 255, row[inside] * 2.0**-IMAGE_FRAC_BITS, 1))
    return [float(-intercept / slope) for slope, intercept in lines], [float(1 / slope) for slope, _ in lines]


def _ranges(model: nn.Module, pixels: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Largest |value| that leaves a BN layer or enters a LIF, a ReLU or a shortcut, by the layer's name."""
    found: dict[str, float] = {}

    def watch(name: str, x: Tensor) -> None:
        found[name] = float(x.abs().amax())

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantBatchNorm2d):
            hooks.append(layer.register_forward_hook(lambda _, __, y, name=name: watch(name, y)))
        elif isinstance(layer, LIF | _Relu | ShortcutQuant):
            hooks.append(layer.register_forward_pre_hook(lambda _, xs, name=name: watch(name, xs[0])))
    with torch.no_grad():
        model(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    return found


class Folded(nn.Module):
    """`twin` in plain PyTorch: T folded into the batch, BN folded into the convolutions; uint8 [N, C, H, W] to logits.

    Written for torch.compile: one graph without breaks.
    """

    def __init__(self, twin: FloatTwin) -> None:
        super().__init__()
        config = twin.config
        self.timesteps, self.tau, self.v_th = config["timesteps"], config["tau"], config["v_th"]
        self.input = twin.build().get_submodule("input")
        state = twin.tensors()

        def conv(name: str, bn: str, stride: int) -> nn.Conv2d:
            deviation = torch.sqrt(state[f"{bn}.running_var"] + BN_EPS)
            gain = state[f"{bn}.weight"] / deviation
            weight = state[f"{name}.weight"] * gain[:, None, None, None]
            c_out, c_in, size, _ = weight.shape
            made = nn.Conv2d(c_in, c_out, size, stride, size // 2)
            made.load_state_dict({"weight": weight, "bias": state[f"{bn}.bias"] - gain * state[f"{bn}.running_mean"]})
            return made

        self.stem = conv("stem", "stem_bn", 1)
        self.blocks = nn.ModuleList()
        channels = config["widths"][0]
        for group, (depth, width) in enumerate(zip(config["blocks"], config["widths"], strict=True)):
            for i in range(depth):
                name, stride = f"groups.{group}.{i}", 2 if group and not i else 1
                block = [conv(f"{name}.conv1", f"{name}.bn1", stride), conv(f"{name}.conv2", f"{name}.bn2", 1)]
                if stride != 1 or channels != width:
                    block.append(conv(f"{name}.shortcut.1", f"{name}.shortcut.2", stride))
                self.blocks.append(nn.ModuleList(block))
                channels = width
        self.readout = nn.Linear(channels, config["classes"])
        self.readout.load_state_dict({part: state[f"readout.{part}"] for part in ("weight", "bias")})
        self.eval()

    def fire(self, x: Tensor) -> Tensor:
        """Spikes of [T*N, C, H, W]."""
        spikes: list[Tensor] = []
        u: Tensor | None = None
        for current in x.chunk(self.timesteps):
            h = current if u is None else torch.add(current, u, alpha=self.tau)
            spikes.append(h > self.v_th)
            u = h.masked_fill(spikes[-1], 0.0)
        return torch.cat(spikes).to(x.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(self.input(pixels)[0]).repeat(self.timesteps, 1, 1, 1)
        for block in self.blocks:
            layers = list(block)  # type: ignore[arg-type]
            r = layers[1](self.fire(layers[0](self.fire(x))))
            x = r + (layers[2](x) if len(layers) > 2 else x)
        rates = self.fire(x).mean(dim=(2, 3)).unflatten(0, (self.timesteps, -1)).mean(0)
        logits: Tensor = self.readout(rates)
        return logits


# -------------------------------------------------------------------------------------------------- SpikingJelly


def spikingjelly_twin(twin: FloatTwin) -> nn.Module:
    """`twin` composed of SpikingJelly's multi-step layers, with the same weights; uint8 [N, 3, H, W] to logits.

    Direct coding as its own networks do it: the stem runs once an image, and its output is repeated T times. It fires
    at v >= v_th, where ours needs v > v_th.
    """
    from spikingjelly.activation_based import functional, layer, neuron

    config, source = twin.config, twin.build()

    def lif() -> nn.Module:
        tau = 1.0 / (1.0 - config["tau"])  # its leak is 1 - 1/tau
        node: nn.Module = neuron.LIFNode(tau=tau, decay_input=False, v_threshold=config["v_th"], step_mode="m")
        return node

    def conv(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Module:
        made: nn.Module = layer.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False, step_mode="m")
        return made

    def bn(channels: int) -> nn.Module:
        made: nn.Module = layer.BatchNorm2d(channels, step_mode="m")
        return made

    class Basic(nn.Module):
        def __init__(self, c_in: int, c_out: int, stride: int) -> None:
            super().__init__()
            self.lif1, self.conv1, self.bn1 = lif(), conv(c_in, c_out, 3, stride), bn(c_out)
            self.lif2, self.conv2, self.bn2 = lif(), conv(c_out, c_out, 3, 1), bn(c_out)
            self.shortcut = nn.Sequential()
            if stride != 1 or c_in != c_out:
                self.shortcut = nn.Sequential(nn.Identity(), conv(c_in, c_out, 1, stride), bn(c_out))

        def forward(self, x: Tensor) -> Tensor:
            r = self.bn2(self.conv2(self.lif2(self.bn1(self.conv1(self.lif1(x))))))
            out: Tensor = r + self.shortcut(x)
            return out

    class Net(nn.Module):
        def __init__(self, blocks: Sequence[int], widths: Sequence[int]) -> None:
            super().__init__()
            self.input = source.get_submodule("input")  # the same input codes
            self.stem, self.stem_bn = conv(config["in_channels"], widths[0], 3, 1), bn(widths[0])
            groups, channels = [], widths[0]
            for place, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
                group = []
                for i in range(depth):
                    group.append(Basic(channels, width, 2 if place and not i else 1))
                    channels = width
                groups.append(nn.Sequential(*group))
            self.groups = nn.Sequential(*groups)
            self.lif = lif()
            self.readout = nn.Linear(channels, config["classes"])

        def forward(self, pixels: Tensor) -> Tensor:
            functional.reset_net(self)
            x = self.stem_bn(self.stem(self.input(pixels)))
            spikes = self.lif(self.groups(x.repeat(config["timesteps"], 1, 1, 1, 1)))
            logits: Tensor = self.readout(spikes.mean(dim=(0, 3, 4)))
            return logits

    net = Net(config["blocks"], config["widths"])
    missing, unread = net.load_state_dict(twin.tensors(), strict=False)
    lost = [name for name in missing if not name.endswith("num_batches_tracked")]
    lost += [name for name in unread if not name.endswith((".alpha", ".alpha_batches"))]
    if lost:
        raise ConfigError(f"SpikingJelly's twin has other parameters: {', '.join(lost)}")
    return net.eval()

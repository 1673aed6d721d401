"""What a training run does: one frozen dataclass, checked as a whole, and the defaults of each data set."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from mdsnn.kernels.errors import ConfigError, FormatError
from mdsnn.kernels.formats import MAX_BITS, MIN_BITS, Grid

from . import data as datasets
from . import distill
from .layers import ALPHAS
from .models import MODELS
from .models.ms_resnet import STEMS
from .neurons import QUANTIZE, RESETS
from .quantizers import BN_GRIDS, FULL_PRECISION
from .surrogate import SURROGATES

FAMILY = "ms_resnet"
"""The model of a network that nothing else decides."""
PATHS = ("data_path", "save_path", "teacher_path", "teacher_names")
"""Fields that say where things lie on one machine: kept in recipe.json, but in no checkpoint."""
NETWORK: dict[str, Any] = {
    "stem": "cifar",
    "norm": "bn",
    "tau": 0.5,
    "v_th": 0.5,
    "reset": "hard",
    "surrogate": "triangle",
}
"""Fields that a student takes from its teacher unless its recipe names them, and what they are without a teacher."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "setting": ("original", "student", "qamd"),
    "model": tuple(MODELS),
    "start": ("teacher", "scratch"),
    "stem": STEMS,
    "bn_grid": BN_GRIDS,
    "reset": RESETS,
    "surrogate": tuple(SURROGATES),
    "quantize": QUANTIZE,
    "alpha": ALPHAS,
    "loss": get_args(distill.Loss),
    "direction": get_args(distill.Direction),
    "taps": ("conv", "block", "group"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "constant"),
    "device": ("cpu", "cuda"),
    "quantizer": ("tanh", "mint"),
    "norm": ("bn", "tdbn"),
    "precision": ("float32", "bf16"),
}
_WHOLE: dict[str, tuple[int, int]] = {
    "timesteps": (1, 1024),
    "bits": (MIN_BITS, MAX_BITS),
    "weight_bits": (MIN_BITS, MAX_BITS),  # or 32: see _faults
    "membrane_bits": (MIN_BITS, MAX_BITS),
    "bn_bits": (MIN_BITS, MAX_BITS),
    "stem_bits": (MIN_BITS, MAX_BITS),
    "shortcut_bits": (MIN_BITS, MAX_BITS),
    "epochs": (1, 100_000),
    "batch_size": (2, 1 << 20),
    "seed": (0, (1 << 63) - 1),
    "threads": (0, 1024),
    "shift": (0, 64),
    "cutout": (0, 1024),
    "freeze_epochs": (0, 100_000),
}
_REAL: dict[str, tuple[float, float]] = {  # open at the lower end where that is no value: see _faults
    "tau": (0.0, 1.0),
    "v_th": (0.0, 64.0),
    "temperature": (0.0, 1000.0),
    "logit_temperature": (0.0, 1000.0),
    "lr": (0.0, 100.0),
    "weight_decay": (0.0, 10.0),
    "momentum": (0.0, 1.0),
    "grad_clip": (0.0, 1e9),
    "warmup_epochs": (0.0, 1e5),
    "label_smoothing": (0.0, 1.0),
}
_ABOVE_0 = frozenset({"tau", "v_th", "temperature", "logit_temperature", "lr"})


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Every fault in it is reported at once, by one ConfigError. `recipe` gives the defaults of a data set.

    setting        "original" | "student" | "qamd", see above
    data           name of a data set (`mdsnn.data.load`); data_path: where its files are
    save_path      the run's folder         teacher_path: a teacher's checkpoint, ours or a PyTorch .pth
    teacher_names  of a .pth: a JSON table of what is called how, see mdsnn.foreign.fit
    start          "teacher" copies its weights into the student first; default where there is a teacher, else "scratch"
    model          "ms_resnet" | "vgg"; default: the teacher's, else ms_resnet
    depth          18 or 34 (VGG: 9 or 16), or give blocks and widths, one number a group; default: the teacher's
    bits           of weights and membranes, 2..8; weight_bits and membrane_bits override it. Unused by "original"
    *_bits         2..8; 32 leaves weights, membranes or BN at full precision: an ablation, which has no integer form
                   and a live accuracy alone
    tau, v_th, reset, surrogate, stem, norm ("bn" | "tdbn")   as mdsnn.models.ms_resnet; default: the teacher's, else
                   those of NETWORK
    quantize, alpha, *_bits, frac_bits, clip   as mdsnn.models.ms_resnet
    loss           "CLK" | "CLM" | "CL", weighted by loss_weights (alpha, beta, gamma of Eq. 7)
    temperature    of Eq. 6 for membranes; logit_temperature for logits, None: the same; direction: see distill
    taps           where membranes are compared: "conv" | "block" | "group"
    lr             of the first step after warmup_epochs of linear rise; schedule "cosine" lets it fall to 0
    weight_decay   on convolution and classifier weights only       momentum: of SGD
    grad_clip      largest norm of the whole gradient; 0: unlimited
    shift, flip, cutout   augmentation on uint8, see mdsnn.data.Augmentation
    freeze_epochs  so many last epochs train under fixed BN statistics and EMA scales, those that freezing takes
    quantizer      of weights and membranes: "tanh" (Eq. 3) or "mint" (one learned scale)
    precision      "bf16": convolutions and matrix products of the live network by autocast; never of the frozen one
    compile        by torch.compile, not with checkpoint_activations (less memory, more time)
    seed           of weights, order and augmentation     threads: of torch; 0: as they are     device: "cpu" | "cuda"
    """

    setting: Literal["original", "student", "qamd"] = "original"
    data: str = "digits"
    data_path: str | None = None
    save_path: str = "runs/train"
    teacher_path: str | None = None
    teacher_names: str | None = None
    start: Literal["teacher", "scratch"] | None = None
    model: str | None = None
    depth: int | None = None
    blocks: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    stem: str | None = None
    timesteps: int = 4
    bits: int = 4
    weight_bits: int | None = None
    membrane_bits: int | None = None
    bn_bits: int = 8
    bn_grid: str = "eq4"
    stem_bits: int = 8
    shortcut_bits: int = 8
    frac_bits: int = 9
    clip: int = 8
    tau: float | None = None
    v_th: float | None = None
    reset: str | None = None
    surrogate: str | None = None
    quantize: str = "post_reset"
    alpha: str = "ema"
    loss: distill.Loss = "CLK"
    loss_weights: tuple[float, float, float] = (1.0, 3.0, 1.0)
    temperature: float = 4.0
    logit_temperature: float | None = None
    direction: distill.Direction = "forward"
    taps: str = "group"
    label_smoothing: float = 0.0
    epochs: int = 200
    batch_size: int = 256
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup_epochs: float = 5.0
    grad_clip: float = 0.0
    shift: int = 4
    flip: bool = False
    cutout: int = 0
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    quantizer: str = "tanh"
    norm: str | None = None
    freeze_epochs: int = 0
    precision: str = "float32"
    compile: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("blocks", "widths", "loss_weights"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in PATHS:
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        faults = _faults(self)
        if faults:
            raise ConfigError("recipe: " + "\nrecipe: ".join(faults))

    @property
    def resolved_bits(self) -> tuple[int, int, int]:
        """(weight, membrane, BN) bits; 32 is full precision."""
        if self.setting == "original":
            return FULL_PRECISION, FULL_PRECISION, FULL_PRECISION
        weight = self.bits if self.weight_bits is None else self.weight_bits
        return weight, self.bits if self.membrane_bits is None else self.membrane_bits, self.bn_bits

    def document(self) -> dict[str, Any]:
        """The recipe as JSON values, all fields."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def _faults(config: TrainConfig) -> list[str]:
    """Everything wrong with a recipe, a line each."""
    found: list[str] = []
    value: Any
    for name, choices in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices and not (name in ("start", "model", *NETWORK) and value is None):
            found.append(f"{name} = {value!r} is none of {', '.join(choices)}")
    for name, (low, high) in _WHOLE.items():
        value = getattr(config, name)
        if value is None and name in ("weight_bits", "membrane_bits"):
            continue
        if type(value) is int and value == FULL_PRECISION and name in ("weight_bits", "membrane_bits", "bn_bits"):
            continue
        if type(value) is not int or not low <= value <= high:
            or_full = ", or 32" if name in ("weight_bits", "membrane_bits", "bn_bits") else ""
            found.append(f"{name} = {value!r} is no whole number in {low}..{high}{or_full}")
    for name, (least, most) in _REAL.items():
        value = getattr(config, name)
        if value is None and name in ("logit_temperature", *NETWORK):
            continue
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or not least <= value <= most or (name in _ABOVE_0 and value == 0):
            found.append(f"{name} = {value!r} is no number in {'(' if name in _ABOVE_0 else '['}{least:g}, {most:g}]")
    for name in ("flip", "checkpoint_activations", "compile"):
        value = getattr(config, name)
        if type(value) is not bool:
            found.append(f"{name} = {value!r} is neither true nor false")
    weights = config.loss_weights
    if (
        type(weights) is not tuple
        or len(weights) != 3
        or any(type(w) not in (int, float) or not (math.isfinite(w) and w >= 0.0) for w in weights)
    ):
        found.append(f"loss_weights = {weights!r} are not three numbers of at least 0")
    for name, limit in (("blocks", 1000), ("widths", 65_536)):
        value = getattr(config, name)
        if value is None:
            continue
        if type(value) is not tuple or not value or any(type(n) is not int or not 1 <= n <= limit for n in value):
            found.append(f"{name} = {value!r} are not one or more whole numbers in 1..{limit}")
    depths = _depths(config.model or FAMILY)
    if config.depth is not None and (type(config.depth) is not int or config.depth not in depths):
        found.append(
            f"depth = {config.depth!r} is none of {', '.join(map(str, depths))} ({config.model or FAMILY});"
            " for others give blocks and widths"
        )
    if config.depth is not None and config.blocks is not None:
        found.append("depth and blocks are both given; they say the same thing")
    if type(config.blocks) is type(config.widths) is tuple and len(config.blocks) != len(config.widths):
        found.append(f"{len(config.blocks)} groups of blocks and {len(config.widths)} of widths")
    if config.compile is True and config.checkpoint_activations is True:
        found.append("compile and checkpoint_activations exclude each other: a compiled network decides what it keeps")
    if (config.quantize, config.reset) == ("pre_fire", "soft"):
        found.append("quantize 'pre_fire' goes with reset 'hard' only")
    try:
        Grid(config.frac_bits, config.clip)
    except FormatError as fault:
        found.append(str(fault))
    try:
        datasets.check_name(config.data)
    except ConfigError as fault:
        found.append(str(fault))
    if config.setting == "qamd" and config.teacher_path is None:
        found.append("setting 'qamd' needs teacher_path (--teacher-path), the checkpoint of a teacher")
    if config.setting == "original" and config.teacher_path is not None:
        found.append("setting 'original' trains a teacher and takes no teacher_path")
    if config.teacher_names is not None and config.teacher_path is None:
        found.append("teacher_names says how the tensors of teacher_path are called; give it too")
    if config.start == "teacher" and config.teacher_path is None:
        found.append("start = 'teacher' needs teacher_path, the checkpoint to start from")
    for name in PATHS:
        value = getattr(config, name)
        if not isinstance(value, str) and not (value is None and name != "save_path"):
            found.append(f"{name} = {value!r} is no path")
    return found


def _depths(model: str) -> list[int]:
    """The depths that have a network of their own: N where MODELS holds f"{model}N"."""
    ends = (name.removeprefix(model) for name in MODELS if name.startswith(model))
    return sorted(int(end) for end in ends if end.isdigit())


def recipe(data: str = "digits", setting: str = "original", **changes: Any) -> TrainConfig:
    """The default recipe of a data set and setting, with `changes` (fields of TrainConfig) applied.

    "digits" and "digits-events" train in about a minute on two cores; everything else starts from MS-ResNet-18 and 200
    epochs (MD-SNN section V; its optimizer is not published, ours is SGD with a cosine). Event sets get as many
    timesteps as they have frames. The paper's four sets are shifted and mirrored; an image folder is shifted only, as
    nobody knows what it shows.
    raises  ConfigError  for an unknown field, with the nearest name, or a value out of range
    """
    known = [entry.name for entry in fields(TrainConfig)]
    for name in changes:
        if name not in known:
            raise ConfigError(datasets.unknown("recipe field", name, known))
    values: dict[str, Any] = {}
    name = datasets.check_name(data)
    if name in ("digits", "digits-events"):
        values = {**DIGITS, **(DIGITS_TAUGHT if changes.get("teacher_path") is not None else {})}
        if changes.get("depth") is not None:
            values = {field: value for field, value in values.items() if field not in ("blocks", "widths")}
    if name in datasets.EVENT_SETS:
        values = {**values, "timesteps": datasets.EVENT_SETS[name]}
    if name in FLIPPED:
        values = {**values, "flip": True}
    return TrainConfig(**{**values, "data": data, "setting": setting, **changes})


FLIPPED = ("cifar10", "cifar100", "tinyimagenet", "ncaltech101")
"""Sets that `recipe` mirrors: what they show has no left and right."""
DIGITS: dict[str, Any] = {
    "blocks": (1, 1, 1),
    "widths": (16, 32, 64),
    "epochs": 30,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 4e-3,
    "weight_decay": 1e-2,
    "warmup_epochs": 2.0,
    "shift": 1,
}
"""What `recipe` sets for the digits."""
DIGITS_TAUGHT: dict[str, Any] = {"epochs": 15, "lr": 2e-3, "blocks": None, "widths": None}
"""And for students that have a teacher: they take its shape and, unless told otherwise, start from its weights."""


def digits_recipe(setting: str = "original", **changes: Any) -> TrainConfig:
    """`recipe("digits", setting, **changes)`."""
    return recipe("digits", setting, **changes)

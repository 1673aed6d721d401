"""The training loop: a full-precision teacher, a quantized student, or a student that a teacher guides.

    setting      network                      loss
    "original"   full precision (a teacher)   cross-entropy
    "student"    quantized                    cross-entropy
    "qamd"       quantized                    MD-SNN Eq. 7: cross-entropy + logits + membranes of a teacher

A run is a folder. After every epoch it holds `last.ckpt` (all that going on takes), `metrics.csv` and `metrics.jsonl`;
at the end also `model.ckpt`, the weights after the last epoch. No checkpoint is chosen by its accuracy on the test
images: the number of epochs is part of the recipe. `recipe.json` says what ran, on what, and how fast. Every file
appears whole or not at all, so a run can be stopped at any instant; resumed on the same machine's CPU with as many
threads, it ends with the same bits as if it had never been stopped. A run that stops by itself at a limit of time saves
its last step, within an epoch too; one that is killed goes on from its last whole epoch.

Started by torchrun, several processes train one network: each takes its share of every batch of `batch_size`, draws the
same random numbers, and ends with the same weights (mdsnn.parallel). The first alone writes and measures.

Accuracy is what the frozen, integer network reaches on the test images; the live figure stands beside it. A student
whose weights, membranes or BN stay at 32 bits, an ablation, has no integers: it has the live figure alone.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdsnn.kernels.container import MAX_FILE
from mdsnn.kernels.errors import CheckpointError, ConfigError, FormatError, MissingError, TrainingError
from mdsnn.kernels.files import check_writable, make_folder, read_bounded, write_text
from mdsnn.kernels.formats import Grid

from . import checkpoint as checkpoints
from . import data as datasets
from . import distill, foreign
from .board import Board
from .layers import LIF, QuantBatchNorm2d, taps
from .machine import processor
from .models import build
from .parallel import Team, team
from .quantizers import FULL_PRECISION
from .recipe import FAMILY, NETWORK, PATHS, TrainConfig, digits_recipe, recipe

__all__ = [
    "Progress",
    "TrainConfig",
    "TrainResult",
    "accuracy",
    "digits_recipe",
    "learning_rate",
    "load_teacher",
    "predict",
    "recipe",
    "spike_rates",
    "train",
]

LAST, FINAL, RECIPE, METRICS = "last.ckpt", "model.ckpt", "recipe.json", "metrics"
_LOSSES = ("loss", "cross_entropy", "logit", "membrane")
_SUMS = (*_LOSSES, "train_accuracy")
COLUMNS = ("epoch", *_SUMS, "lr", "live_accuracy", "frozen_accuracy")
"""Of metrics.csv; a row an epoch. Losses are means over the epoch; the last two stand in the last row only."""

# --------------------------------------------------------------------------------------------- measuring a model


@torch.no_grad()
def predict(model: nn.Module, x: npt.NDArray[np.uint8], *, batch_size: int = 256) -> npt.NDArray[Any]:
    """Logits [N, classes] of a live or frozen model for [N, C, H, W] or [T, N, C, H, W] uint8, in evaluation mode."""
    was_training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    coding: Literal["image", "events"] = "image" if x.ndim == 4 else "events"
    count = x.shape[0 if coding == "image" else 1]
    out = []
    for begin in range(0, count, batch_size):
        batch = np.ascontiguousarray(datasets.take(x, slice(begin, begin + batch_size), coding))
        out.append(model(torch.from_numpy(batch).to(device)).cpu().numpy())
    model.train(was_training)
    return np.concatenate(out)


def accuracy(model: nn.Module, x: npt.NDArray[np.uint8], y: npt.NDArray[np.int64]) -> float:
    """Share of samples whose largest logit, the first of equals, is their label; 0..1."""
    return float(np.mean(np.argmax(predict(model, x), axis=1) == y))


def spike_rates(model: nn.Module, x: npt.NDArray[np.uint8], *, batch_size: int = 256) -> dict[str, float]:
    """Share of neuron-steps that fire, for every LIF by its module path, over all samples and timesteps; 0..1."""
    with _firing(model) as rates:
        predict(model, x, batch_size=batch_size)
    return rates()


@contextmanager
def _firing(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """While open, count the spikes of every LIF; what it gives returns their rates."""
    fired: dict[str, float] = {}
    seen: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, spikes: Tensor) -> None:
            fired[name] = fired.get(name, 0.0) + float(spikes.sum(dtype=torch.float64))
            seen[name] = seen.get(name, 0) + spikes.numel()

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, LIF)]
    try:
        yield lambda: {name: fired[name] / seen[name] for name in fired}
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Progress:
    """What the progress callback gets after every step, and after every epoch (`step` = `steps`, `metrics` filled)."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    checkpoint       path of model.ckpt; of last.ckpt where the limit of time came first
    history          a row an epoch, as in metrics.csv
    live_accuracy    of the live network on the test images, 0..1; None if unfinished: nothing was measured
    frozen_accuracy  of the integer network, THE accuracy; None for full precision, which has none
    spike_rates      share of neuron-steps that fire, by LIF (of the frozen network where there is one)
    seconds_per_step median over this process's steps, 0 if it made none
    finished         False if `max_minutes` ended the run before its last epoch; `resume` goes on
    """

    checkpoint: Path
    history: tuple[Mapping[str, Any], ...]
    live_accuracy: float | None
    frozen_accuracy: float | None
    spike_rates: Mapping[str, float]
    seconds_per_step: float
    finished: bool = True


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    max_minutes: float | None = None,
    tensorboard: bool = False,
    progress: Callable[[Progress], None] | None = None,
    data: datasets.Dataset | None = None,
) -> TrainResult:
    """Train as `config` says, into the folder `config.save_path`.

    resume   go on from its last.ckpt (from the start if there is none yet); the recipe must be the same
    force    overwrite an earlier run in the folder
    max_minutes  wall clock of this call: past it the run saves the step it is at and stops. It shortens no schedule:
             resumed, the run goes on as if it had never stopped. At least one step is made
    tensorboard  write event files too (mdsnn.board); needs the package tensorboard
    progress     is called in the first of several processes only; the result is the same in all
    data     a data set of your own instead of `mdsnn.data.load(config.data, config.data_path)`
    raises   ConfigError, CheckpointError (a teacher, or a run to resume, that does not fit), StorageError (the folder
             holds a run already, or cannot be written), TrainingError (a loss that is not finite);
             KeyboardInterrupt  with a message that says how to go on
    """
    deadline = math.inf if max_minutes is None else time.monotonic() + 60.0 * max_minutes
    if max_minutes is not None and not (math.isfinite(max_minutes) and max_minutes > 0.0):
        raise ConfigError(f"max_minutes = {max_minutes!r} is no time above 0")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise MissingError("device 'cuda': torch sees no GPU here; leave device at 'cpu', or install a CUDA torch")
    with team(config.device) as processes, _threads(config.threads):
        with processes.in_turn():
            run = _Run(config, data, processes, resume=resume, force=force)
            if tensorboard and processes.leads:
                run.board = Board(run.folder, run.history)
        try:
            run.gather()
            finished = run.loop(progress if processes.leads else None, deadline)
            result = (run.finish() if finished else run.pause()) if processes.leads else None
            return cast(TrainResult, processes.tell(result))
        except KeyboardInterrupt:
            done = f"{run.epoch} of {config.epochs} epochs are saved in {run.folder}"
            message = f"interrupted; {done}. Go on with resume (mdsnn train ... --resume)"
            raise KeyboardInterrupt(message) from None
        finally:
            if run.board is not None:
                run.board.close()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One run in one process: what changes while it trains, and its folder."""

    def __init__(
        self, config: TrainConfig, data: datasets.Dataset | None, processes: Team, *, resume: bool, force: bool
    ) -> None:
        if config.batch_size < 2 * processes.size:
            raise ConfigError(
                f"batch_size = {config.batch_size} leaves {processes.size} processes fewer than 2 samples each, too few"
                f" for batch normalization. Raise it to {2 * processes.size}, or start fewer processes"
            )
        self.team = processes
        self.board: Board | None = None
        self.device = processes.device(config.device)
        self.folder = make_folder(config.save_path)
        if config.teacher_path is not None and Path(config.teacher_path).resolve().parent == self.folder.resolve():
            raise ConfigError(f"{config.teacher_path}: the teacher lies in save_path, where this run would replace it")
        resume = resume and (self.folder / LAST).exists()
        for name in (LAST, FINAL):
            if processes.leads:
                check_writable(self.folder / name, force=resume or force)
        self.data = datasets.load(config.data, config.data_path) if data is None else data
        if self.data.coding == "events" and config.timesteps > len(self.data.train_x):
            raise ConfigError(
                f"timesteps = {config.timesteps}: the recordings of '{self.data.name}' are {len(self.data.train_x)}"
                " frames long. Lower timesteps (--time-window)"
            )
        self.generator = torch.Generator().manual_seed(config.seed)
        teacher, teacher_digest = load_teacher(config, self.data)
        self.config = _resolve(config, teacher)
        self.model = _network(self.config, self.data, self.generator, None if teacher is None else _config(teacher))
        built = _config(self.model)
        shape: dict[str, Any] = {"blocks": tuple(built["blocks"]), "widths": tuple(built["widths"])}
        self.config = dataclasses.replace(self.config, model=built["model"], **shape)
        if teacher is not None and self.config.start == "teacher":
            _start_from(teacher, self.model, str(config.teacher_path))
        self.teacher: nn.Module | None = None
        if teacher is not None and config.setting == "qamd":
            self.teacher = _check_teacher(teacher, self.model, str(config.teacher_path))
        for model in (self.model, self.teacher):
            if model is not None and self.device.type == "cpu":
                model.to(self.device)
            elif model is not None:
                model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = _optimizer(self.model, self.config)
        self.document = {name: x for name, x in self.config.document().items() if name not in PATHS}
        self.document |= {"data": self.data.name, "data_sha256": self.data.digest(), "teacher_sha256": teacher_digest}
        self.samples = self.data.train_x.shape[0 if self.data.coding == "image" else 1]
        self.steps = math.ceil(self.samples / config.batch_size)
        self.late = False
        self.epoch = 0  # epochs that are whole
        self.step = 0  # steps of the next one that are made
        self.sums = dict.fromkeys(_SUMS, 0.0)  # over those steps
        self.begin = torch.Generator()  # as `generator` was when that epoch began: draws its order again
        self.history: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        if resume:
            self._restore()
        elif processes.leads:
            for name in (LAST, FINAL):  # a forced run starts clean: an old last.ckpt must not outlive its recipe
                (self.folder / name).unlink(missing_ok=True)
        self.augmentation = datasets.Augmentation(config.shift, config.flip and self.data.flips, config.cutout)
        # the whole set as uint8 on the device: a step moves indices, not images
        self.train_x, self.train_y = (
            torch.from_numpy(np.require(x, requirements=["C", "W"])).to(self.device)
            for x in (self.data.train_x, self.data.train_y)
        )
        self.student_taps: list[LIF] = []
        self.teacher_taps: list[LIF] = []
        if self.teacher is not None and distill.MEMBRANE[config.loss] is not None:
            self.student_taps, self.teacher_taps = taps(self.model, config.taps), taps(self.teacher, config.taps)
            for lif in (*self.student_taps, *self.teacher_taps):
                lif.tap = True
        self.forward, self.teacher_forward = self.model, self.teacher
        if processes.leads:
            self._write_recipe()

    def gather(self) -> None:
        """Join the other processes: check that they do the same, and put the networks where training calls them."""
        state = {"epoch": self.epoch, "step": self.step, "recipe": self.document}
        self.team.check_same("data, teacher, recipe or last.ckpt", json.dumps(state, sort_keys=True))
        late = self.config.alpha == "learned" or self.config.quantizer == "mint"  # scales that the first batch starts
        self.forward = self.team.wrap(self.model, self.device, unused=late)
        if self.config.compile:
            self.forward = cast(nn.Module, torch.compile(self.forward))
            self.teacher_forward = None if self.teacher is None else cast(nn.Module, torch.compile(self.teacher))
        # what is neither a constant nor trained by a gradient in every step
        self.statistics = [x for x in self.model.buffers() if x.is_floating_point()]
        self.statistics += [x for x in self.model.parameters() if x.ndim == 0]

    # -- the loop

    def loop(self, progress: Callable[[Progress], None] | None, deadline: float) -> bool:
        """Train to the last epoch, or past `deadline` of the monotonic clock; whether all epochs are done."""
        while self.epoch < self.config.epochs:
            row = self._one_epoch(progress, deadline)
            spoilt = [name for name, x in self.model.state_dict().items() if not bool(x.isfinite().all())]
            if spoilt:
                raise TrainingError(f"epoch {self.epoch + 1}: NaN or infinity in '{spoilt[0]}'. {_REMEDY}")
            if row is not None:
                self.history.append(row)
                self.epoch, self.step, self.sums = self.epoch + 1, 0, dict.fromkeys(_SUMS, 0.0)
            if self.team.leads:
                self._save(LAST)
                self._write_metrics()
            if self.board is not None and row is not None:
                self.board.add(row)
            if progress is not None and row is not None:
                progress(Progress(self.epoch, self.config.epochs, self.steps, self.steps, row["loss"], row))
            if self.late and self.epoch < self.config.epochs:
                return False
        return True

    def _one_epoch(self, progress: Callable[[Progress], None] | None, deadline: float) -> dict[str, Any] | None:
        """The rest of the epoch, and its row; None if `deadline` came before its last step."""
        self.model.train()
        if self.epoch >= self.config.epochs - self.config.freeze_epochs:
            for module in self.model.modules():  # weights go on under the statistics and scales that freezing will take
                if isinstance(module, QuantBatchNorm2d | LIF):
                    module.eval()
        rate = 0.0
        for step, index in enumerate(self._order()):
            if step < self.step:
                continue
            started = time.perf_counter()
            rate = learning_rate(self.config, self.epoch * self.steps + step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            share = self.team.share(len(index))
            x, y = self._batch(index[share], share, len(index))
            losses, correct, self.late = self._step(x, y, len(index), deadline)
            for name, part in zip(_LOSSES, losses, strict=True):
                self.sums[name] += part * (len(index) / self.samples)
            self.sums["train_accuracy"] += correct / self.samples
            self.step = step + 1
            self.step_seconds.append(time.perf_counter() - started)
            if self.step < self.steps:
                if progress is not None:
                    progress(Progress(self.epoch, self.config.epochs, self.step, self.steps, losses[0]))
                if self.late:
                    return None
        return {"epoch": self.epoch + 1, **self.sums, "lr": rate}

    def _order(self) -> tuple[Tensor, ...]:
        """Indices of the samples of each step of this epoch; how many they are differs by at most one."""
        if self.step:  # this epoch began in an earlier process
            generator = self.begin.clone_state()
        else:
            self.begin.set_state(self.generator.get_state())
            generator = self.generator
        order = torch.randperm(self.samples, generator=generator)
        return torch.tensor_split(order, self.steps)

    def _batch(self, index: Tensor, share: slice, count: int) -> tuple[Tensor, Tensor]:
        """Samples and labels of this process's share of a batch of `count`, augmented on the device."""
        index = index.to(self.device)
        x = self.train_x.index_select(0 if self.data.coding == "image" else 1, index)
        x = datasets.augment(x, self.augmentation, self.generator, part=(share, count))
        return x, self.train_y.index_select(0, index)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[distill.Losses, Tensor]:
        """The parts of the loss of a batch, and its logits."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            z = self.forward(self._window(x, self.model)).float()
            if self.teacher is not None and self.teacher_forward is not None:
                with torch.no_grad():
                    teacher_z = self.teacher_forward(self._window(x, self.teacher)).float()
        if self.teacher is None:
            loss = functional.cross_entropy(z, y, label_smoothing=config.label_smoothing)
            return distill.Losses(loss, loss, z.new_zeros(()), z.new_zeros(())), z
        parts = distill.total_loss(
            config.loss,
            z,
            y,
            teacher_z,
            _membranes(self.teacher_taps),
            _membranes(self.student_taps),
            weights=config.loss_weights,
            tau=config.temperature,
            logit_tau=config.logit_temperature,
            direction=config.direction,
            label_smoothing=config.label_smoothing,
        )
        return parts, z

    def _step(self, x: Tensor, y: Tensor, count: int, deadline: float) -> tuple[list[float], float, bool]:
        """One update by a batch of `count` samples, of which x and y are this process's.

        returns  (loss, cross-entropy, logit, membrane), how many of the batch are right, and whether it is too late
        """
        try:
            parts, z = self._losses(x, y)
        except FormatError as fault:  # a quantizer met a NaN
            raise self._not_finite(x, "the forward pass is not finite", str(fault)) from fault
        self.optimizer.zero_grad(set_to_none=True)
        share = len(y) / count  # of the batch; the gradients of the processes are averaged
        loss = parts.total if self.team.size == 1 else parts.total * (share * self.team.size)
        with self.team.together():
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        values = [parts.total, parts.cross_entropy, parts.logit, parts.membrane, (z.argmax(1) == y).sum(), norm]
        *losses, right, length = torch.stack([value.detach().double() for value in values]).tolist()  # the device waits
        if not math.isfinite(losses[0]):
            raise self._not_finite(x, f"the loss is {losses[0]}", "the loss itself")
        if not math.isfinite(length):  # a spike hides a NaN from the loss, not from the gradient
            bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
            raise self._not_finite(
                x, "the gradient is not finite", f"the gradient of '{bad[-1]}'" if bad else "their norm"
            )
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, norm)
        self.optimizer.step()
        late = time.monotonic() >= deadline
        if self.team.size == 1:
            return losses, right, late
        mine = [*(part * share for part in losses), right, float(late and self.team.leads)]
        extra = torch.tensor(mine, dtype=torch.float64, device=self.device)
        *losses, right, first_is_late = self.team.mean(self.statistics, extra).tolist()
        return losses, right, first_is_late > 0.0

    def _not_finite(self, x: Tensor, what: str, otherwise: str) -> TrainingError:
        place = _first_not_finite(self.model, self._window(x, self.model)) or otherwise
        return TrainingError(f"epoch {self.epoch + 1}: {what}; this begins in {place}. {_REMEDY}")

    def _window(self, x: Tensor, model: nn.Module) -> Tensor:
        """Event frames of a model's own time window: its first steps."""
        return x if self.data.coding == "image" else x[: _config(model)["timesteps"]]

    def finish(self) -> TrainResult:
        """Measure the network of the last epoch, frozen where it is quantized, and write the final checkpoint."""
        from .freeze import freeze

        test_x, test_y = self.data.test_x, self.data.test_y
        if self.data.coding == "events":
            test_x = test_x[: self.config.timesteps]
        with _firing(self.model) as firing:
            live = accuracy(self.model, test_x, test_y)
        frozen: float | None = None
        self.model.cpu().eval()
        if FULL_PRECISION not in self.config.resolved_bits:
            measured = freeze(self.model)
            with _firing(measured) as firing:
                frozen = accuracy(measured, test_x, test_y)
        rates = firing()
        self.history[-1] |= {"live_accuracy": live, "frozen_accuracy": frozen}
        self._save(FINAL)
        self._write_metrics()
        if self.board is not None:
            self.board.add({name: x for name, x in self.history[-1].items() if name not in (*_SUMS, "lr")})
        self._write_recipe({"live_accuracy": live, "frozen_accuracy": frozen, "spike_rates": rates})
        median = statistics.median(self.step_seconds) if self.step_seconds else 0.0
        return TrainResult(self.folder / FINAL, tuple(self.history), live, frozen, rates, median)

    def pause(self) -> TrainResult:
        """Leave the run to be resumed."""
        self._write_recipe()
        median = statistics.median(self.step_seconds) if self.step_seconds else 0.0
        return TrainResult(self.folder / LAST, tuple(self.history), None, None, {}, median, finished=False)

    # -- the folder

    def _save(self, name: str) -> None:
        going_on = name == LAST
        within = [{"epoch": self.epoch + 1, "step": self.step, **self.sums}] if self.step else []
        checkpoints.save(
            self.folder / name,
            self.model,
            optimizer=self.optimizer if going_on else None,
            epoch=self.epoch,
            generators=self._generators() if going_on else None,
            recipe=self.document,
            history=[*self.history, *within],
            labels=self.data.labels,
            force=True,
        )

    def _generators(self) -> dict[str, torch.Generator]:
        return {"train": self.generator, "begin": self.begin} if self.step else {"train": self.generator}

    def _restore(self) -> None:
        saved = checkpoints.load(self.folder / LAST)
        earlier, now = saved.document["recipe"], json.loads(json.dumps(self.document))
        changed = [name for name in sorted(earlier.keys() | now.keys()) if earlier.get(name) != now.get(name)]
        if changed:
            was = ", ".join(f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}" for name in changed[:3])
            raise ConfigError(
                f"{saved.where}: not the same recipe: {was}. Resume with the old one, or start afresh (force)"
            )
        checkpoints.apply(self.model, saved.group("model"), saved.where)
        checkpoints.restore_optimizer(self.optimizer, saved)
        self.epoch, self.history = saved.epoch, [dict(row) for row in saved.document["history"]]
        if self.history and "step" in self.history[-1]:  # it stopped within an epoch
            row = self.history.pop()
            self.step, self.sums = row["step"], {name: cast(float, row.get(name)) for name in _SUMS}
            numbers = all(type(value) is float for value in self.sums.values())
            within = type(self.step) is int and 1 <= self.step < self.steps
            fits = numbers and within and 0 <= self.epoch < self.config.epochs
        else:
            fits = 1 <= self.epoch <= self.config.epochs
        if not fits or len(self.history) != self.epoch:
            raise CheckpointError(
                f"{saved.where}: epoch {saved.epoch} of {self.config.epochs} does not fit its history"
            )
        checkpoints.restore_generators(self._generators(), saved)

    def _write_metrics(self) -> None:
        """metrics.csv and metrics.jsonl, whole, from the history: a resumed run leaves no row twice."""
        rows = [{name: row[name] for name in COLUMNS if name in row} for row in self.history]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / f"{METRICS}.csv", text.getvalue(), force=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(self.folder / f"{METRICS}.jsonl", lines, force=True)

    def _write_recipe(self, results: Mapping[str, Any] | None = None) -> None:
        weight, membrane, bn = self.config.resolved_bits
        document = {
            "schema": "mdsnn.recipe/1",
            "recipe": {**self.config.document(), "data": self.data.name},
            "bits": {"weight": weight, "membrane": membrane, "bn": bn},
            "data_sha256": self.document["data_sha256"],
            "teacher_sha256": self.document["teacher_sha256"],
            "seed": self.config.seed,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "versions": versions(),
            "machine": machine(),
            "processes": self.team.size,
            "threads": torch.get_num_threads(),
            "steps_timed": len(self.step_seconds),
            "seconds_per_step": statistics.median(self.step_seconds) if self.step_seconds else None,
            "seconds": sum(self.step_seconds),
            "results": dict(results or {}),
        }
        write_text(self.folder / RECIPE, json.dumps(document, indent=2, sort_keys=True) + "\n", force=True)


_REMEDY = "Lower lr, set grad_clip, or start from a teacher; what was saved before is whole"


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of update `step`, counted from 0 over all epochs of `steps` each: linear rise, then the schedule."""
    rise = config.warmup_epochs * steps
    if step < rise:
        return config.lr * (step + 1) / (rise + 1)
    if config.schedule == "constant":
        return config.lr
    total = max(config.epochs * steps - rise, 1.0)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min((step - rise) / total, 1.0)))


def versions() -> dict[str, str]:
    """Versions of what computes here."""
    from importlib import metadata

    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    try:
        found["mdsnn"] = metadata.version("mdsnn")
    except metadata.PackageNotFoundError:
        found["mdsnn"] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What the run's times are of: processor, cores, system. No names of host or user."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
    }


# ------------------------------------------------------------------------------------------- teacher and network


def _membranes(lifs: list[LIF]) -> list[Tensor]:
    return [cast(Tensor, lif.last_h) for lif in lifs]


def _config(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], model.config)


def load_teacher(config: TrainConfig, data: datasets.Dataset) -> tuple[nn.Module | None, str | None]:
    """The teacher of a recipe, live and in evaluation mode, and sha256 of what it was read from; None without one.

    A PyTorch file (`mdsnn.foreign`) does not say of what network it is: it is a full-precision one of the recipe's
    shape, for `data`, its tensors found by name.
    raises  InputError, CheckpointError  for a file that holds no such teacher
    """
    if config.teacher_path is None:
        return None, None
    path = Path(config.teacher_path)
    sources = [path]
    if path.suffix.lower() in foreign.SUFFIXES:
        names = None if config.teacher_names is None else foreign.read_names(config.teacher_names)
        sources += [] if config.teacher_names is None else [Path(config.teacher_names)]
        alone: dict[str, Any] = dict.fromkeys(("teacher_path", "teacher_names", "start"))
        full = _resolve(dataclasses.replace(config, setting="original", quantizer="tanh", **alone), None)
        teacher = _network(full, data, torch.Generator().manual_seed(0)).eval()
        foreign.fit(teacher, foreign.load(path), str(path), names)
    elif config.teacher_names is not None:
        raise ConfigError(f"{path}: names its tensors as we do; teacher_names (--teacher-names) is for PyTorch files")
    else:
        teacher = checkpoints.build_model(checkpoints.load(path))
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    digest = hashlib.sha256(b"".join(read_bounded(source, MAX_FILE, what="teacher") for source in sources))
    return teacher, digest.hexdigest()


def _resolve(config: TrainConfig, teacher: nn.Module | None) -> TrainConfig:
    """Fill in the shape of the network and its neurons, and where a student starts from."""
    taught = {} if teacher is None else _config(teacher)
    name = config.model or taught.get("model", FAMILY)
    blocks, widths = config.blocks, config.widths
    if config.depth is not None:
        name = f"{name}{config.depth}"
    elif name == taught.get("model"):
        blocks, widths = blocks or tuple(taught["blocks"]), widths or tuple(taught["widths"])
    if blocks and widths and len(blocks) != len(widths):
        raise ConfigError(f"recipe: {len(blocks)} groups of blocks and {len(widths)} of widths; give both")
    start = config.start or ("scratch" if teacher is None else "teacher")
    same = {
        field: taught.get(field, usual) if getattr(config, field) is None else getattr(config, field)
        for field, usual in NETWORK.items()
    }
    return dataclasses.replace(config, model=name, depth=None, blocks=blocks, widths=widths, start=start, **same)


def _network(
    config: TrainConfig, data: datasets.Dataset, generator: torch.Generator, taught: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network of a resolved recipe; `taught`, the configuration of its teacher, decides what no recipe names."""
    weight, membrane, bn = config.resolved_bits
    options: dict[str, Any] = {
        "model": config.model,
        "classes": len(data.labels),
        "in_channels": data.channels,
        "size": list(data.size),
        "mean": list(data.mean),
        "std": list(data.std),
        "coding": data.coding,
        "weight_bits": weight,
        "membrane_bits": membrane,
        "bn_bits": bn,
        "grid": Grid(config.frac_bits, config.clip),
        "generator": generator,
    }
    same = (
        "timesteps",
        "stem_bits",
        "shortcut_bits",
        "tau",
        "v_th",
        "reset",
        "surrogate",
        "quantize",
        "alpha",
        "bn_grid",
    )
    options |= {name: getattr(config, name) for name in same}
    for name, shape in (("blocks", config.blocks), ("widths", config.widths)):
        if shape:
            options[name] = list(shape)
    if taught is not None and taught["model"] == config.model:
        options |= {name: taught[name] for name in ("hidden", "pool") if name in taught}
    for name, usual in (("quantizer", "tanh"), ("norm", "bn"), ("checkpoint_activations", False)):
        if getattr(config, name) != usual:
            options[name] = getattr(config, name)
    if str(config.model).startswith(FAMILY):
        options["stem"] = config.stem
    return build(options)


def _check_teacher(teacher: nn.Module, student: nn.Module, path: str) -> nn.Module:
    """Return the teacher if it can guide the student: same task, and at least as many timesteps."""
    theirs, ours = _config(teacher), _config(student)
    odd = [name for name in ("classes", "in_channels", "size", "coding") if theirs[name] != ours[name]]
    if odd:
        said = ", ".join(f"{name} {theirs[name]!r} against {ours[name]!r}" for name in odd)
        raise CheckpointError(f"{path}: this teacher does another task than its student: {said}")
    if theirs["timesteps"] < ours["timesteps"]:
        raise ConfigError(
            f"{path}: a teacher of {theirs['timesteps']} timesteps cannot guide a student of {ours['timesteps']}."
            " Train the teacher with as many, or lower timesteps"
        )
    return teacher


def _start_from(teacher: nn.Module, student: nn.Module, path: str) -> None:
    """Copy weights and BN statistics by name; the scales of membranes stay fresh, a teacher has none."""
    theirs, ours = teacher.state_dict(), student.state_dict()
    wanted = [name for name in ours if name.rsplit(".", 1)[-1] not in ("alpha", "alpha_batches")]
    unfit = [name for name in wanted if name not in theirs or theirs[name].shape != ours[name].shape]
    if unfit:
        raise CheckpointError(
            f"{path}: this teacher is of another shape than its student, first at {unfit[0]}."
            " Give the student the teacher's blocks and widths, or start = 'scratch' (--start scratch)"
        )
    student.load_state_dict({name: theirs[name] if name in wanted else ours[name] for name in ours})


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay falls on kernels and matrices only: not on BN, biases and membrane scales."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0.0)


def _first_not_finite(model: nn.Module, x: Tensor) -> str | None:
    """Where NaN or infinity begins: a parameter, else the first layer to run whose output holds one."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"parameter '{name}'"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(x)
    except FormatError:
        pass  # a quantizer refused; the layer before it is in `found`
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of layer '{found[0]}'" if found else None

"""Several processes that train one network on parts of every batch, as torchrun starts them.

torchrun (or `python -m torch.distributed.launch`) gives each process RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; nothing else is read. Tensors on the CPU travel by gloo, those on a GPU by nccl. A process alone forms no
group, and computes what it would compute without this file.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, distributed, nn

from mdsnn.kernels.errors import ConfigError, TrainingError

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: the first one reads the data, and at the end measures, alone."""
PAUSE = 0.5
"""Seconds in which gloo's threads let go of what they hold, before Python ends."""


@dataclass(frozen=True)
class Team:
    """The processes of one run, seen from one of them: its rank in 0..size-1, and its rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files, talks, and measures the final network."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """The device of this process: the CPU, or the GPU of its local rank.

        raises  ConfigError  if there are fewer GPUs than processes
        """
        if kind == "cpu":
            return torch.device("cpu")
        found = torch.cuda.device_count()
        if self.local_rank >= found:
            raise ConfigError(
                f"process {self.local_rank} of this machine has no GPU: torch sees {found}. Start as many"
                " (--nproc_per_node), or use device 'cpu'"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def share(self, count: int) -> slice:
        """The samples of a batch of `count` that are this process's; the shares differ by at most one."""
        least, more = divmod(count, self.size)
        begin = self.rank * least + min(self.rank, more)
        return slice(begin, begin + least + (self.rank < more))

    def wrap(self, model: nn.Module, device: torch.device, *, unused: bool) -> nn.Module:
        """The model with gradients averaged over the processes while backward runs; alone, the model itself.

        All start with the weights of the first. `unused`: a step may leave a parameter without gradient.
        """
        if self.size == 1:
            return model
        kind = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(kind).parameters  # the later name of the same switch
        options: dict[str, Any] = {
            "forward_sync_buffers" if new else "broadcast_buffers": False,  # `mean` does more: all samples count
            "device_ids": None if device.type == "cpu" else [device.index],
            "gradient_as_bucket_view": True,
            "find_unused_parameters": unused,
        }
        with self.together():
            return kind(model, **options)

    def sum(self, values: Tensor) -> Tensor:
        """`values`, summed over the processes; the same bits in all of them."""
        if self.size > 1:
            with self.together():
                distributed.all_reduce(values)
        return values

    def mean(self, tensors: Sequence[Tensor], extra: Tensor) -> Tensor:
        """Replace each of `tensors` by its mean over the processes; returns `extra`, a float64 vector, summed."""
        if self.size == 1:
            return extra
        flat = self.sum(torch.cat([extra, *(tensor.detach().reshape(-1).double() for tensor in tensors)]))
        parts = torch.split(flat[len(extra) :] / self.size, [tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.reshape(tensor.shape))
        return flat[: len(extra)]

    def tell(self, value: Any) -> Any:
        """What the first process gives; the others' `value` is not looked at."""
        if self.size == 1:
            return value
        values = [value]
        with self.together():
            distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def check_same(self, what: str, value: str) -> None:
        """Raise TrainingError unless `value` is the same in all processes."""
        first = cast(str, self.tell(value))
        if float(self.sum(torch.tensor([float(first != value)]))):
            raise TrainingError(
                f"process {self.rank} of {self.size}: the processes do not see the same {what}."
                " All of these must lie where each process can read them"
            )

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the body before all others: it downloads, checks, and complains once."""
        if not self.leads:
            self.tell(None)
        yield
        if self.leads:
            self.tell(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A place where the processes talk: the end of one of them becomes a TrainingError of the others."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as fault:
            if self.size == 1:
                raise
            raise TrainingError(
                f"process {self.rank} of {self.size}: another process of this run ended ({_first_line(fault)}). Its own"
                " message says why; what was saved before is whole, go on with resume"
            ) from fault


def _first_line(fault: BaseException) -> str:
    return str(fault).split("\n", 1)[0][:200]


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise ConfigError(f"environment: {name} = {text!r} is no whole number; torchrun sets it")
    return int(text)


def leads() -> bool:
    """Whether this process is the first of its run, or alone; known before any other is met."""
    return _number("RANK", 0) == 0


@contextlib.contextmanager
def team(device: str = "cpu") -> Iterator[Team]:
    """The processes that torchrun started, joined; or this one alone.

    A process group that is there already is used. One that is made here stays for later runs, to the end of the
    process: made a second time, a fast process would meet what the first one of a slow process left at its port.
    raises  ConfigError    for a rank that is none, or fewer GPUs than processes
            TrainingError  if the others do not come
    """
    size, rank, local = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("LOCAL_RANK", 0)
    if size <= 1:
        yield Team()
        return
    if rank >= size:
        raise ConfigError(f"environment: RANK = {rank} of WORLD_SIZE = {size} processes; start them with torchrun")
    found = Team(rank, size, local)
    found.device(device)
    if not distributed.is_initialized():
        with found.together():
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            distributed.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(_leave)
    try:
        yield found
    except BaseException:  # the others may be gone, and cannot take leave
        atexit.unregister(_leave)
        raise


def _leave() -> None:
    """Leave the group, and let gloo's threads end: one that still lets go of a tensor while Python ends aborts it.

    They are waited for where the group goes with the last that holds it. Behind a `DistributedDataParallel` torch keeps
    it; then a pause has to do, in which whichever waits for Python's lock gets it.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # what DistributedDataParallel holds in cycles holds the group too
        time.sleep(PAUSE)


def end(code: int) -> NoReturn:
    """End this process with `code`; one that has joined others does so without taking Python down.

    After a failure gloo's threads cannot be waited for, since the others may be gone; Python must not end under them.
    """
    if not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)

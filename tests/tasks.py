"""Tasks for other processes: a module of its own, because a worker imports what it is told to run by name."""

from __future__ import annotations

import os
import signal
import time

from mdsnn.kernels.errors import ConfigError


def nap(number: int) -> int:
    time.sleep(0.05)
    return number


def fail(number: int) -> int:
    if number == 2:
        raise ConfigError("two")
    return number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number

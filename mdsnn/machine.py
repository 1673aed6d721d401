"""The machine that figures are of. Needs no torch."""

from __future__ import annotations

import contextlib
import platform


def processor() -> str:
    """The processor's name, or what the system calls its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def peak_rss() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell.

    Unlike getrusage's, it does not begin with that of the process's parent.
    """
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None

"""The machine that figures are of. Needs no torch."""

from __future__ import annotations

import platform


def processor() -> str:
    """The processor's name, or what the system calls its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown"

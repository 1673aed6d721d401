"""`mdsnn doctor`: what this machine has, what it lacks, and the line that cures it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import click

from mdsnn.machine import processor

from .options import JsonCommand, check_environment, check_outputs, force_option, json_option, write_json
from .terminal import human_bytes, table, tell

REQUIRED = ("numpy", "cffi", "click", "pillow")
EXTRAS = {
    "report": ("jinja2", "pydantic", "scipy", "rich"),
    "train": ("torch", "spikingjelly", "scikit-learn", "numba", "onnx", "onnxruntime"),
    "all": ("joblib", "dask", "distributed"),
}
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
"""Import names that differ from the distribution's."""


@click.command(cls=JsonCommand)
@json_option
@force_option
def command(json_file: str | None, force: bool) -> None:
    """Check the machine, the libraries and the engines; every lack comes with the line that cures it.

    Exit code 0 if the light install (info, run, bench) works, 3 if something it needs is broken.

    Example: mdsnn doctor --json doctor.json
    """
    check_outputs([json_file], force=force)
    document = examine()
    to_stdout = write_json(document, json_file, force=force)
    if not to_stdout:
        for key, value in document["machine"].items():
            tell(f"{key:>11}  {value}")
        rows = [[c["part"], "ok" if c["ok"] else "LACKS", c["found"], c["cure"]] for c in document["checks"]]
        table(["part", "state", "found", "cure"], rows)
    if not document["ok"]:
        raise click.exceptions.Exit(3)


def _library(name: str) -> tuple[bool, str]:
    """Version of a distribution if its module imports, else the reason. Imports in a process of its own."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False, "not installed"
    module = MODULES.get(name, name)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        return False, f"{version} is installed, but to import it failed: {fault!s:.120}"
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return False, f"{version} is installed but does not import: {last:.120}"
    return True, version


def _compiler() -> tuple[bool, str]:
    for name in (*os.environ.get("CC", "").split()[:1], "cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            return True, path
    return False, "no cc, gcc or clang"


def _broken_torchvision() -> tuple[bool, str] | None:
    """Whether a torchvision beside torch imports; None if there is none. SpikingJelly's data sets need it."""
    found, text = _library("torchvision")
    return None if text == "not installed" else (found, text)


def examine() -> dict[str, Any]:
    """Everything `mdsnn doctor` says, as JSON values (schema mdsnn.doctor/1)."""
    from mdsnn.kernels import engine

    checks: list[dict[str, Any]] = []

    def check(part: str, ok: bool, found: str, cure: str) -> bool:
        checks.append({"part": part, "ok": ok, "found": found, "cure": "" if ok else cure})
        return ok

    fine = check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")
    for name in REQUIRED:
        fine &= check(name, *_library(name), "pip install -c constraints.txt -e .")
    for extra, names in EXTRAS.items():
        for name in names:
            check(f"{name} [{extra}]", *_library(name), f"pip install -c constraints.txt -e '.[{extra}]'")
    vision = _broken_torchvision()
    if vision is not None:
        check("torchvision", *vision, "nothing of mdsnn needs it; `pip uninstall torchvision` quiets SpikingJelly")
    check("C compiler", *_compiler(), "install gcc (Debian: apt-get install gcc python3-dev), then reinstall mdsnn")
    for name in engine.KERNELS:
        reason = engine.missing(name)
        check(f"engine {name}", reason is None, reason or "runs", "see the reason")
    for level, fault in _self_tests():
        words = "passes its self-test" if fault is None else f"fails its self-test: {fault}"
        check(f"instruction set {level}", fault is None, words, "it is left alone; report it with this table")
    for variable in ("MDSNN_ENGINE", "MDSNN_ISA", "MDSNN_THREADS"):
        checks.append({"part": variable, "ok": True, "found": os.environ.get(variable, "not set"), "cure": ""})
    fine &= _environment(check)
    try:
        free = shutil.disk_usage(".").free
        check("disk", free > 1 << 30, f"{human_bytes(free)} free here", "free 1 GiB for runs and reports")
    except OSError as fault:
        check("disk", False, f"this folder cannot be read: {fault.strerror}", "change to another folder")
    return {"schema": "mdsnn.doctor/1", "ok": fine, "machine": machine(), "checks": checks}


def _self_tests() -> list[tuple[str, str | None]]:
    """What the self-test of each instruction set of this machine finds; empty without the C engine."""
    from mdsnn.kernels import native

    return [] if native.unloaded() else [(level, native.fault(level)) for level in native.isa_levels()]


def _environment(check: Any) -> bool:
    from mdsnn.kernels import engine
    from mdsnn.kernels.errors import MdsnnError

    try:
        found = f"{engine.choose()}, {engine.thread_count()} threads"
        check_environment()
    except MdsnnError as fault:
        return bool(check("engine in use", False, str(fault), "unset or correct the variable"))
    return bool(check("engine in use", True, found, ""))


def machine() -> dict[str, str]:
    """System, processor, cores, memory and instruction sets, in words."""
    found = {
        "mdsnn": metadata.version("mdsnn"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = human_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    from mdsnn.kernels import native
    from mdsnn.kernels.errors import MdsnnError

    if native.missing() is None:
        try:
            used = f"in use: {native.isa()}"
        except MdsnnError as fault:
            used = str(fault)
        found["C levels"] = f"{', '.join(native.isa_levels())} ({used})"
    return found

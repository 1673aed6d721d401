"""Random command lines, drawn from the commands' own specification: no traceback, and a stated exit code.

Usage: python tests/fuzz_commands.py [COUNT] [SEED]

Training, the demo's steps, timing and the doctor's probes are replaced by nothing, so that what is tried is the reading
of words, the checks, the readers and the writers. It works in a temporary folder that holds a few real files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from unittest import mock

import click
import numpy as np

from commands import Outcome, call, files
from mdsnn.cli import COMMANDS, bench, cli, demo, doctor
from mdsnn.kernels.errors import TrainingError

CODES = {0, 1, 2, 3, 130}
WORDS = (
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "--force",
        "-o",
        "-h",
        "--=",
        "=",
        "=x",
        "a=",
        "\u00e4\u03b8\U0001f9e0",
        "\udcff",
        "\x1b[31m",
    ),
    *("\n", "a\tb", "%s%n{0}", "$(touch x)", "'\"`", "*", "~", ".", "..", "nul\0", "x" * 300, "x" * 5000, "None"),
    *("0", "1", "2", "8", "-1", "1e3", "0x10", "1_0", "007", "9" * 30, "9" * 5000, "1.5", "nan", "inf", "-inf"),
    *("1,1", "4,8", ",", "1,,1", "0,0", "1," * 200, "reference,native", "native", "reference,reference", "torch,onnx"),
    *("digits", "digts", "imagefolder", "builtin:digits", "builtin:", "builtin:../x", "fefet32", "spikesim65", "show"),
    *(
        "student.mdsnn",
        "model.ckpt",
        "teacher.ckpt",
        "pixels.npy",
        "image.png",
        "big.png",
        "empty",
        "folder",
        "torn.mdsnn",
    ),
    *(
        "missing",
        "missing/x",
        "folder/x",
        "student.mdsnn/x",
        "pipe",
        "/proc/1/x",
        "out.json",
        "out.html",
        "out.csv",
    ),
    *(
        "epochs=1",
        "epochs=[[[[",
        "tau=NaN",
        "blocks=[1,1]",
        "blocks={}",
        "widths=[-1]",
        "loss=null",
        "loss_weights=[1]",
    ),
    *(
        "seed=true",
        "taps=3",
        "save_path=1",
        "teacher_path=2",
        "data_path=[]",
        "[" * 5000,
        "x=" + "[" * 5000,
        "alpha=fixed",
    ),
)
"""Values for any option: plausible, wrong, huge, empty, unicode, option-like, and files that are there."""


def words_of(rng: np.random.Generator) -> list[str]:
    """One random command line."""

    def pick(options: object) -> str:
        choices = list(options)  # type: ignore[call-overload]
        return str(choices[int(rng.integers(len(choices)))])

    def value(kind: click.ParamType) -> str:
        if isinstance(kind, click.Choice) and rng.random() < 0.8:
            return pick(kind.choices)
        if isinstance(kind, click.types.IntParamType | click.types.FloatParamType) and rng.random() < 0.7:
            return str(int(rng.integers(-2, 12)))
        return pick(WORDS)

    name = pick(COMMANDS)
    if rng.random() < 0.03:
        return [pick(WORDS), name]
    subcommand = cli.get_command(click.Context(cli), name)
    assert subcommand is not None
    line: list[str] = []
    likely = {"artifact": ["student.mdsnn"], "checkpoint": ["model.ckpt"], "images": ["image.png", "pixels.npy"]}
    for parameter in subcommand.params:
        if isinstance(parameter, click.Argument):
            good = likely.get(str(parameter.name), ["show"])
            count = 1 if parameter.nargs == 1 else int(rng.integers(0, 4))
            if parameter.required or rng.random() < 0.5:
                line += [pick(good) if rng.random() < 0.75 else pick(WORDS) for _ in range(count)]
        elif isinstance(parameter, click.Option) and rng.random() < (0.9 if parameter.required else 0.15):
            option = pick(parameter.opts)
            if rng.random() < 0.1:
                option = option.replace("-", "_").replace("__", "--", 1)
            if parameter.is_flag:
                line.append(option)
            elif option.startswith("--") and rng.random() < 0.5:
                line.append(f"{option}={value(parameter.type)}")
            else:
                line += [option, value(parameter.type)]
    if rng.random() < 0.2:
        line.insert(int(rng.integers(len(line) + 1)), pick(WORDS))
    if rng.random() < 0.1:
        rng.shuffle(line)
    return [name, *line]


@contextmanager
def playground() -> Iterator[Path]:
    """A temporary current folder with the files that WORDS names, and nothing that takes long."""
    made = files()

    def refuse(*_: object, **__: object) -> object:
        raise TrainingError("not trained here")

    from mdsnn import train

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdsnn-fuzz-")))
        stack.enter_context(chdir(folder))
        stack.enter_context(mock.patch.object(train, "train", refuse))
        stack.enter_context(mock.patch.object(demo, "_fill", refuse))
        stack.enter_context(mock.patch.object(doctor, "_library", return_value=(True, "1")))
        stack.enter_context(mock.patch.object(bench, "_time", return_value=1.0))
        for name, source in (
            ("student.mdsnn", made.artifact),
            ("model.ckpt", made.student),
            ("teacher.ckpt", made.teacher),
            ("pixels.npy", made.npy),
            ("image.png", made.png),
            ("big.png", made.big_png),
        ):
            shutil.copy(source, folder / name)
        (folder / "empty").touch()
        (folder / "torn.mdsnn").write_bytes(made.artifact.read_bytes()[:5000])
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        yield folder


def fault_of(line: list[str], outcome: Outcome) -> str | None:
    """What breaks the rules of the command line, or None."""
    if outcome.code not in CODES:
        return f"exit code {outcome.code}"
    if "Traceback" in outcome.err or "internal error" in outcome.err:
        return outcome.err[-500:]
    if outcome.code in (2, 3) and not outcome.errors and line[0] != "doctor":
        return "no line says what is wrong"
    if any(not character.isprintable() for character in outcome.err.replace("\n", "")):
        return "control characters on stderr"
    if "--json" in line and outcome.code == 0 and outcome.out.startswith("{"):
        json.loads(outcome.out)
    return None


def fuzz(count: int, seed: int) -> tuple[Counter[tuple[str, int]], list[str]]:
    """Run `count` random command lines; returns (command, exit code) counts, and the faults found."""
    rng = np.random.default_rng(seed)
    seen: Counter[tuple[str, int]] = Counter()
    found: list[str] = []
    protected = {name: Path(name).read_bytes() for name in ("pixels.npy", "image.png", "student.mdsnn", "model.ckpt")}
    for number in range(count):
        line = words_of(rng)
        outcome = call(*line)
        seen[line[0] if line[0] in COMMANDS else "?", outcome.code] += 1
        fault = fault_of(line, outcome)
        if fault is not None:
            found.append(f"case {number}: {line!r:.600}: {fault}")
        for name, content in protected.items():
            if Path(name).read_bytes() != content and "--force" not in line:
                found.append(f"case {number}: {line!r:.600}: overwrote {name} without --force")
            Path(name).write_bytes(content)
        for path in Path().iterdir():  # outputs would turn later cases into "exists and is kept"
            if path.name.startswith("out."):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return seen, found


def main(count: int, seed: int) -> int:
    """Fuzz and print what came of it; 1 if anything broke the rules."""
    start = time.perf_counter()
    with playground():
        seen, found = fuzz(count, seed)
    for (name, code), number in sorted(seen.items()):
        print(f"{name:>8} exit {code:<3} {number}")
    print(f"{count} command lines, seed {seed}, {time.perf_counter() - start:.0f} s, {len(found)} faults")
    for fault in found:
        print(fault.encode("utf-8", "backslashreplace").decode())
    return bool(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    numbers = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*numbers, *(500, 0)[len(numbers) :]))

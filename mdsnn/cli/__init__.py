"""The `mdsnn` command: a thin shell in which each command is one public function.

One file a command, imported only when it is called, so that `mdsnn --help` imports no NumPy. Results go to stdout,
talk and progress to stderr. Exit codes: 0 ok, 1 differs, 2 usage or bad input, 3 environment (disk, permission, memory,
a missing extra or executor), 130 Ctrl-C. Errors are one line without a traceback; `--debug` shows it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from mdsnn.kernels.errors import EnvironmentFault, MdsnnError

COMMANDS = {
    "demo": "Everything in one go, on real digits: train, export, verify, time, report.",
    "train": "Train a teacher, a quantized student, or a distilled student.",
    "quantize": "A full-precision network to a quantized student, by calibration alone.",
    "export": "Lower a trained student to one integer artifact, to ONNX and to test vectors.",
    "info": "What is inside an artifact: graph, bits, tables, bounds, bytes.",
    "run": "Classes and scores for image files or an .npy batch.",
    "verify": "Do all executors agree on every integer? If not, where first?",
    "bench": "Images a second of each executor, after checking equal bits.",
    "report": "The crossbar report: energy, latency, area of an artifact on a chip.",
    "analog": "Accuracy on crossbars with device variation, stuck cells, IR drop and few ADC bits.",
    "sweep": "Energy, delay and area over a grid of chip settings, and the Pareto front.",
    "chips": "The chips there are, and their constants with sources.",
    "doctor": "What this machine has, what it lacks, and how to cure it.",
}
"""Command -> its one line; command NAME is `command` in NAME.py beside this file."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        command: click.Command = module.command
        command.short_help = COMMANDS[cmd_name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" The commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"mdsnn {version('mdsnn')}")
        ctx.exit()


@click.command(
    cls=_Commands,
    epilog="Exit codes: 0 ok, 1 differs, 2 usage or bad input, 3 environment, 130 Ctrl-C. Any command takes --debug.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option(
    "--local-rank",
    "--local_rank",
    type=int,
    hidden=True,
    expose_value=False,
    help="A launcher gives it; LOCAL_RANK is used.",
)
def cli() -> None:
    """Quantized spiking neural networks from PyTorch to hardware, bit for bit.

    Start with `mdsnn demo`, or look at the network that ships inside: `mdsnn info builtin:digits`.
    """


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped; line ends are kept."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


_LONGEST = 2000
"""Characters of an error line; only what a user typed can make one longer."""


def _fail(message: str, code: int) -> int:
    for line in printable(message).split("\n"):
        if line.strip():
            click.echo(f"mdsnn: error: {line if len(line) <= _LONGEST else line[:_LONGEST] + ' ...'}", err=True)
    return code


def _invoke(words: list[str]) -> int:
    try:
        with cli.make_context("mdsnn", words) as ctx:
            cli.invoke(ctx)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0


def _leave_stdout() -> bool:
    """Whether stdout takes no more; if so what is left for it goes nowhere, so that the end of Python stays silent."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _explain(fault: BaseException) -> int:
    """Say what went wrong in one line, or one a fault, and return the exit code."""
    if isinstance(fault, click.UsageError):
        path = fault.ctx.command_path if fault.ctx else "mdsnn"
        return _fail(f"{fault.format_message()}  (`{path} --help` explains)", 2)
    if isinstance(fault, click.ClickException):
        return _fail(fault.format_message(), 2)
    if isinstance(fault, click.Abort | KeyboardInterrupt):
        return _fail(str(fault) or "stopped by Ctrl-C; every file that was written is whole", 130)
    if isinstance(fault, MdsnnError):
        return _fail(str(fault), fault.exit_code)
    if isinstance(fault, MemoryError):
        return _fail("out of memory: lower --batch-size or --limit, or close other programs", 3)
    if isinstance(fault, BrokenPipeError):
        _leave_stdout()
        return 0  # the reader has what it wanted, as in `mdsnn info FILE | head -1`
    if isinstance(fault, OSError):
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # our files name themselves
        where = f"{fault.filename}: " if fault.filename else "standard output: " if _leave_stdout() or full else ""
        return _fail(f"{where}{fault.strerror or fault}", EnvironmentFault.exit_code)
    text = str(fault).split("\n", 1)[0]
    return _fail(f"internal error, {type(fault).__name__}: {text} (this is a bug; --debug shows where)", 3)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1, 2, 3 or 130."""
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    if not words:
        with contextlib.redirect_stdout(sys.stderr):
            _invoke(["--help"])
        return 2
    try:
        return _invoke(words)
    except (Exception, KeyboardInterrupt) as fault:
        if debug:
            import traceback

            traceback.print_exc()
        return _explain(fault)


def program() -> NoReturn:
    """Run the command line as a program of its own: the end of `main` is the end of the process."""
    code = main()
    parallel = sys.modules.get("mdsnn.parallel")  # only `train` imports it, and torch
    if parallel is not None:
        parallel.end(code)
    sys.exit(code)

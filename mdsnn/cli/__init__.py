"""The `mdsnn` command: a thin shell in which each command is one public function.

One file a command, imported only when it is called, so that `mdsnn --help` imports no NumPy. Results go to stdout,
talk and progress to stderr. Exit codes: 0 ok, 1 differs, 2 usage or bad input, 3 environment (disk, permission, memory,
a missing extra or executor), 130 Ctrl-C. Errors are one line without a traceback; `--debug` shows it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from mdsnn.kernels.errors import EnvironmentFault, MdsnnError

COMMANDS = {
    "demo": "Everything in one go, on real digits: train, export, verify, time, report.",
    "train": "Train a teacher, a quantized student, or a distilled student.",
    "export": "Lower a trained student to one integer artifact, to ONNX and to test vectors.",
    "info": "What is inside an artifact: graph, bits, tables, bounds, bytes.",
    "run": "Classes and scores for image files or an .npy batch.",
    "verify": "Do all executors agree on every integer? If not, where first?",
    "bench": "Images a second of each executor, after checking equal bits.",
    "report": "The crossbar report: energy, latency, area of an artifact on a chip.",
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
def cli() -> None:
    """Quantized spiking neural networks from PyTorch to hardware, bit for bit.

    Start with `mdsnn demo`, or look at the network that ships inside: `mdsnn info builtin:digits`.
    """


def _fail(message: str, code: int) -> int:
    click.echo(f"mdsnn: error: {message}", err=True)
    return code


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1, 2, 3 or 130."""
    words = list(sys.argv[1:] if args is None else args)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if debug:
        return int(cli.main(words, prog_name="mdsnn", standalone_mode=False) or 0)
    try:
        return int(cli.main(words, prog_name="mdsnn", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as fault:
        click.echo(fault.format_message(), err=True)
        return 2
    except click.UsageError as fault:
        path = fault.ctx.command_path if fault.ctx else "mdsnn"
        return _fail(f"{fault.format_message()}  (`{path} --help` explains)", 2)
    except click.ClickException as fault:
        return _fail(fault.format_message(), 2)
    except (click.Abort, KeyboardInterrupt) as fault:
        return _fail(str(fault) or "stopped by Ctrl-C; every file that was written is whole", 130)
    except MdsnnError as fault:
        return _fail(str(fault), fault.exit_code)
    except MemoryError:
        return _fail("out of memory: lower --batch-size or --limit, or close other programs", 3)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nobody to tell
        return 0
    except OSError as fault:
        where = f"{fault.filename}: " if fault.filename else ""
        return _fail(f"{where}{fault.strerror or fault}", EnvironmentFault.exit_code)
    except Exception as fault:
        text = str(fault).splitlines()[0] if str(fault) else ""
        return _fail(f"internal error, {type(fault).__name__}: {text} (this is a bug; --debug shows where)", 3)

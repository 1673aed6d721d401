"""Tables and progress: rich on a terminal, plain aligned lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from . import printable

Tick = Callable[[int, int], None]
"""Called with (done, total)."""


def say(text: str) -> None:
    """Talk, on stderr."""
    click.echo(printable(text), err=True)


def tell(text: str) -> None:
    """A line of the result, on stdout."""
    click.echo(printable(text))


def _rich(stream: Any) -> Any:
    """rich.console if it is installed and `stream` is a terminal."""
    if stream is None or not stream.isatty():
        return None
    try:
        import rich.console
    except ImportError:
        return None
    return rich.console


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table on stdout: numbers right, words left."""
    cells = [[("" if value is None else printable(str(value)).replace("\n", "\\n")) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))]
    widths = [max(len(header), *(len(row[i]) for row in cells), 0) for i, header in enumerate(headers)]
    if title:
        click.echo(title)
    console = _rich(sys.stdout)
    if console is not None and sum(widths) + 3 * len(widths) <= console.Console().width:  # else rich would cut words
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        grid = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        for header, right in zip(headers, numeric, strict=True):
            grid.add_column(header, justify="right" if right else "left")
        for row in cells:
            grid.add_row(*map(Text, row))
        console.Console().print(grid)
        return
    for row in [list(headers), *cells]:
        line = "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        click.echo(line.rstrip())


def _is_number(text: str) -> bool:
    head = text.split(" ")[0].rstrip("x%").replace(",", "")
    try:
        float(head or "0")
    except ValueError:
        return text in ("-", "")
    return True


@contextlib.contextmanager
def progress(label: str) -> Iterator[Tick]:
    """A progress bar on stderr: a live one on a terminal, a line every few seconds otherwise."""
    console = _rich(sys.stderr)
    if console is not None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console.Console(stderr=True), transient=False) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= 5.0:
            last = now
            filled = 20 * done // max(total, 1)
            say(f"{label} [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}")

    yield tick


def human_bytes(count: int) -> str:
    """1536 -> '1.5 KiB'."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} GiB"

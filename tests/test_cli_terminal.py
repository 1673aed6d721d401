"""What a person at a terminal sees: whole words in tables at any width, a progress bar, a cursor after Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import subprocess
import time
from collections.abc import Callable

import pytest

from commands import ENVIRONMENT, call, command, files
from mdsnn.cli.terminal import human_bytes, table

pytest.importorskip("rich")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")


def at_terminal(columns: int, *words: object, when: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Exit code and screen of `mdsnn WORDS` with both outputs on a terminal; Ctrl-C as soon as `when()` holds."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(command(*words), stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    screen = b""
    os.set_blocking(master, False)
    limit = time.monotonic() + 60
    while True:
        try:
            part = os.read(master, 65536)
        except BlockingIOError:
            part = b"-"  # nothing yet
            time.sleep(0.01)
        except OSError:  # the other end is closed
            break
        else:
            screen += part
        if not part or time.monotonic() > limit:
            break
        if when is not None and when():
            process.send_signal(signal.SIGINT)
            when = None
    code = process.wait(timeout=60)
    os.close(master)
    return code, screen.decode()


def plain(screen: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)


@pytest.mark.parametrize("columns", [40, 200])
def test_tables_keep_their_words_at_any_width(columns: int) -> None:
    code, screen = at_terminal(columns, "info", files().artifact)
    assert code == 0
    text = plain(screen)
    for line in call("info", files().artifact).out.splitlines()[2:]:
        for word in line.split():
            assert word in text
    assert ("─" in text) == (columns == 200)


def test_ctrl_c_at_a_progress_bar_leaves_one_line_and_the_cursor() -> None:
    start = time.monotonic()
    words = ("bench", files().artifact, "--data", files().npy, "--executors", "reference", "--repeats", "9999")
    code, screen = at_terminal(100, *words, when=lambda: time.monotonic() - start > 2.0)
    assert code == 130
    assert plain(screen).count("mdsnn: error: stopped by Ctrl-C") == 1
    assert "Traceback" not in screen
    assert "timing" in screen
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")  # the cursor is shown again


def test_numbers_stand_right_and_words_left(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["a", 5, "1.50%"], ["long name", 12345, None], ["x\ny\x1b[1m", -3, "20%"]]
    table(["name", "count", "share"], rows, "Title")
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name         count  share",
        "a                5  1.50%",
        "long name    12345",
        "x\\ny\\x1b[1m     -3    20%",
    ]
    table(["empty"], [])
    assert capsys.readouterr().out == "empty\n"


def test_bytes_in_words() -> None:
    words = [human_bytes(n) for n in (0, 1023, 1024, 1536, 1 << 20, 1 << 30, 5 << 40)]
    assert words == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "5120.0 GiB"]

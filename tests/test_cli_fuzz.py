"""A few hundred random command lines (tests/fuzz_commands.py makes any number): stated exit codes, no traceback."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz_commands import fault_of, fuzz, playground, words_of

from commands import Outcome
from mdsnn.cli import COMMANDS


def test_random_command_lines_keep_the_rules() -> None:
    with playground():
        seen, found = fuzz(300, 20251204)
    assert not found, "\n".join(found)
    assert {name for name, _ in seen} >= set(COMMANDS)
    assert {code for _, code in seen} >= {0, 2, 3}


def test_the_same_seed_draws_the_same_lines() -> None:
    one, two = ([words_of(np.random.default_rng(7)) for _ in range(5)] for _ in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(4, "", "mdsnn: error: x\n"), "exit code 4"),
        (Outcome(2, "", "Traceback (most recent call last):\n"), "Traceback"),
        (Outcome(3, "", "mdsnn: error: internal error, X: y\n"), "internal error"),
        (Outcome(2, "", ""), "no line"),
        (Outcome(2, "", "mdsnn: error: \x1b[2J\n"), "control characters"),
    ],
)
def test_the_fuzzer_sees_what_it_is_for(outcome: Outcome, fault: str) -> None:
    found = fault_of(["info"], outcome)
    assert found is not None
    assert fault in found
    assert fault_of(["info"], Outcome(2, "", "mdsnn: error: x\n")) is None

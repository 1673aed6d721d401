"""The C engine reads and writes only where its plan says: guards around arrays and values, fences after weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from red_zones import Watched, strayed, values_apart

from mdsnn.kernels import Engine, native
from planted import assert_same_trace, seeded_case

LEVELS = [] if native.missing() else list(native.isa_levels())
WIDE = {"max_channels": 130, "max_timesteps": 32, "samples": 1}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("limits", [{}, WIDE], ids=["small", "wide"])
def test_no_operation_leaves_its_own_value(level: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(native, "np", watched)
    monkeypatch.setattr(native, "arena", watched.arena)
    monkeypatch.setenv("MDSNN_ISA", level)
    for seed in range(4000, 4060 if not limits else 4030):
        network, pixels = seeded_case(seed, **limits)
        want = Engine(network, "reference", 1).run(pixels, trace=True).trace
        with values_apart():
            engine = Engine(network, "native", 1)
        got = engine.run(pixels, trace=True).trace
        assert_same_trace(got, want)
        assert not strayed(engine), f"seed {seed}: an operation wrote outside its values"
        stream = engine.stream(pixels) if pixels.ndim == 4 else engine.stream(samples=pixels.shape[1])
        for t in range(network.timesteps):
            stream.step(*(() if pixels.ndim == 4 else (pixels[t],)))
            assert not strayed(engine), f"seed {seed}: step {t} wrote outside its values"
        assert not watched.touched(), f"seed {seed}: a call wrote outside its arrays"


def test_the_guards_see_what_they_should() -> None:
    watched = Watched()
    array = watched.empty((3, 5), np.int32)
    assert array.shape == (3, 5)
    assert (array.view(np.uint8) == 0xA5).all()
    assert not watched.touched()
    for beyond in (-1, 15):
        array = watched.zeros(15, np.int32)
        block = array.base
        while block.base is not None:
            block = block.base
        first = (array.ctypes.data - block.ctypes.data) // 4
        block.view(np.uint8)[4 * (first + beyond)] = 1
        assert watched.touched()
        assert not watched.touched()


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_a_read_beyond_a_fence_ends_the_process(size: int) -> None:
    code = (
        "import ctypes, sys, numpy as np\nfrom red_zones import fenced\n"
        f"array = fenced(np.arange({size}, dtype=np.int32))\nassert array[-1] == {size - 1}\n"
        "print('inside', flush=True)\nctypes.string_at(array.ctypes.data + array.nbytes, 1)\nprint('beyond')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout == "inside\n", done.stderr
    assert done.returncode < 0

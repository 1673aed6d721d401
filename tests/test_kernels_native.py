"""The C engine as a part: when it is missing, instruction sets by name, the layout it promises, scratch it keeps."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mdsnn.export import artifact
from mdsnn.kernels import Engine, engine, native, packing, plan, tables
from mdsnn.kernels.errors import ConfigError, MissingError
from mdsnn.kernels.formats import (
    Grid,
    affine_constants,
    decode_table,
    dense_table,
    requantize_thresholds,
    threshold_code,
)
from mdsnn.kernels.network import BnAffine, BnDense, Conv, InputSpec, InputTable, IntegerNetwork, Lif, Readout
from mdsnn.kernels.reference import lif_step
from planted import assert_same_bits, seeded_case

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had not been compiled."""
    monkeypatch.setattr(native, "_load", lambda: (None, "the compiled extension does not import: install a C compiler"))
    engine._fallback.cache_clear()


def test_without_the_extension_another_engine_takes_over_with_one_warning(
    without_native: None, caplog: pytest.LogCaptureFixture
) -> None:
    network, pixels = seeded_case(1)
    with caplog.at_level(logging.WARNING):
        first, second = Engine(network, threads=1), Engine(network, threads=1)
    assert first.kernels == second.kernels == "numba"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C compiler" in caplog.text
    want = Engine(network, "reference", 1).run(pixels)
    assert_same_bits(first.run(pixels).logits, want.logits, "logits")


def test_a_chosen_engine_that_is_missing_is_an_error(without_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = seeded_case(1)
    with pytest.raises(MissingError, match="C compiler"):
        Engine(network, "native")
    monkeypatch.setenv("MDSNN_ENGINE", "native")
    with pytest.raises(MissingError, match="MDSNN_ENGINE=native"):
        Engine(network)
    with pytest.raises(MissingError, match="C compiler"):
        native.isa()


@pytest.mark.parametrize("name", ["reference", "numba", "native"])
def test_the_environment_chooses_the_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "native" and native.missing():
        pytest.skip(str(native.missing()))
    monkeypatch.setenv("MDSNN_ENGINE", name)
    assert Engine(seeded_case(1)[0]).kernels == name


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDSNN_ENGINE", "fortran")
    with pytest.raises(ConfigError, match="native, numba, reference"):
        Engine(seeded_case(1)[0])


@needs_native
def test_every_machine_runs_the_base_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MDSNN_ISA", raising=False)
    levels = native.isa_levels()
    assert levels[0] == "base"
    assert native.isa() == levels[-1]
    assert list(levels) == [level for level in native.ISA_LEVELS if level in levels]


@needs_native
def test_the_environment_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = seeded_case(1)
    for level in native.isa_levels():
        monkeypatch.setenv("MDSNN_ISA", level)
        assert native.isa() == level
        assert native.NativeBackend(network).isa == level
    monkeypatch.setenv("MDSNN_ISA", "sse9")
    with pytest.raises(ConfigError, match="base, avx2, avx512, amx"):
        Engine(network, "native")
    monkeypatch.setattr(native, "isa_levels", lambda: ("base",))
    monkeypatch.setenv("MDSNN_ISA", "amx")
    with pytest.raises(MissingError, match="this machine runs base"):
        native.isa()


@needs_native
def test_an_extension_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_CONTRACT", native._CONTRACT + 1)
    native._load.cache_clear()
    try:
        assert "another version" in str(native.missing())
        assert "pip install --force-reinstall --no-deps . (-e . if it was installed so)" in str(native.missing())
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
    assert native.missing() is None


@needs_native
def test_constants_that_stand_in_python_and_in_c_are_equal() -> None:
    source = Path(native.__file__).parent / "src"
    lib = native._module().lib
    limit = re.search(r"#define MDSNN_MAX_COMPARED (\d+)", (source / "kernels.h").read_text())
    assert limit is not None
    assert int(limit.group(1)) == plan._COMPARED
    assert lib.MDSNN_BUCKETS == tables.BUCKETS
    assert [getattr(lib, f"MDSNN_{level.upper()}") for level in native.ISA_LEVELS] == list(range(4))
    assert [getattr(lib, f"MDSNN_{name}") for name in ("I8", "I16", "I32")] == [plan._I8, plan._I16, plan._I32]


@needs_native
def test_values_that_are_alive_together_do_not_share_bytes() -> None:
    for seed in range(30):
        made = plan.Plan(native._module(), seeded_case(seed)[0], "base")
        spans = [(v.offset, v.offset + v.size(made.chunk), v.first, v.last, v.keep) for v in made.values]
        for i, (start, end, first, last, kept) in enumerate(spans):
            assert end <= (made.state_bytes if kept else made.scratch_bytes)
            for j, (other_start, other_end, other_first, other_last, other_kept) in enumerate(spans[:i]):
                together = kept == other_kept and (kept or (first <= other_last and other_first <= last))
                in_place = made.values[i].over is made.values[j] and (start, end) == (other_start, other_end)
                assert not together or end <= other_start or other_end <= start or (in_place and first == other_last)


@needs_native
def test_scratch_is_kept_between_runs_and_leaves_nothing_behind() -> None:
    network, pixels = seeded_case(3)
    ready = Engine(network, "native", 1)
    backend = ready._backend
    assert isinstance(backend, native.NativeBackend)
    want = Engine(network, "reference", 1).run(pixels).logits
    assert_same_bits(ready.run(pixels).logits, want, "logits")
    assert len(backend._scratch) == 1
    backend._scratch[0].arena[:] = 0xA5  # a run must not read what an earlier one left
    assert_same_bits(ready.run(pixels).logits, want, "logits after the scratch was spoilt")
    assert len(backend._scratch) == 1


@needs_native
def test_a_call_that_is_kept_points_to_nothing_of_another_kind_of_call() -> None:
    network, pixels = seeded_case(1)
    backend = native.NativeBackend(network, "base")
    want = backend.run(pixels, False)
    backend.run(pixels, True)
    backend.timed(pixels)
    backend._parts = 3
    backend.run(pixels, False, 3)
    backend.start(pixels.shape[-4]).step(pixels if pixels.ndim == 4 else pixels[0])
    null = backend._plan.ffi.NULL
    for room in backend._scratch:
        call, own = room.call, room.arena.ctypes.data
        assert [call.trace_h, call.trace_s, call.trace_q, call.times, call.team] == [null] * 5
        assert (call.state_pitch, call.fresh) == (0, 1)
        state = int(backend._plan.ffi.cast("uintptr_t", call.state))
        assert state == own + backend._plan.scratch_bytes
    assert_same_bits(backend.run(pixels, False).logits, want.logits, "logits")


def test_the_extension_needs_no_torch_and_no_numba() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, numba=None, onnx=None)\n"
        "from mdsnn.kernels import native; print(native.missing(), native.isa_levels()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "base"]


def test_the_declarations_stand_once() -> None:
    """What cffi reads is the header, and it has no other copy."""
    from mdsnn.kernels import build_native

    source = Path(native.__file__).parent / "src"
    declarations = build_native.contract((source / "mdsnn.h").read_text())
    assert "mdsnn_run" in declarations
    assert "#" not in declarations
    assert "/*" not in declarations


def test_no_source_asks_for_this_machine_s_own_instructions() -> None:
    folder = Path(native.__file__).parent
    text = "".join(path.read_text() for path in [*(folder / "src").iterdir(), folder / "build_native.py"])
    assert "march" not in text
    assert "malloc" not in text


@given(
    st.lists(st.integers(-300, 300), min_size=14, max_size=14).map(sorted), st.integers(-300, 0), st.integers(0, 300)
)
def test_a_cell_and_one_comparison_decode_every_membrane(thresholds: list[int], low: int, high: int) -> None:
    """As src/mdsnn.h puts it, in Python, against the definition: the code is the number of thresholds that are <= u."""
    lif = Lif("lif", "x", 4, np.arange(15) * np.arange(15), np.array(thresholds), v_th=high)
    reach = tables.Reach.of(lif, (low, high))
    cells = tables.find_cells(reach, lif)
    if cells is None:
        return
    base, span, factor, threshold, decode = cells
    assert 0 < factor < 2**15
    assert len(threshold) == len(decode) == 16
    for u in range(reach.lo, reach.hi + 1):
        cell = min(max(u - base, 0), span) * factor >> 16
        assert decode[cell + (u >= threshold[cell])] == lif.decode[np.searchsorted(lif.thresholds, u, side="right")]


@given(
    st.lists(st.integers(-300, 300) | st.integers(-33_000, 33_000), min_size=2, max_size=2).map(sorted),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(["hard", "soft", "pre_fire"]),
    st.tuples(*[st.integers(-2, 2)] * 3),
    st.integers(1, 33_000),
    st.tuples(st.integers(30_000, 70_000), st.integers(30_000, 70_000)),
    st.integers(0, 2**32),
)
@example([-5, 20_000], (False, True), "hard", (-2, 2, 0), 1, (30_000, 30_000), 0)
@settings(max_examples=600, deadline=None)
def test_a_clamped_stream_has_the_same_spikes_and_codes(
    decode: list[int],
    far: tuple[bool, bool],
    kind: str,
    beside: tuple[int, int, int],
    v_soft: int,
    stream: tuple[int, int],
    seed: int,
) -> None:
    """From each code, for streams about every bound: what limit_of says changes nothing, and h and u fit 16 bits.

    far, beside  whether v_th and the last thresholds, and the first ones, lie about what a limit allows, and how near
    """
    rng = np.random.default_rng(seed)
    steps = np.sort(np.append(decode, rng.integers(decode[0], decode[1] + 1, 5)))
    low, high = min(steps[0], 0), max(steps[-1], 0)
    near = 32_766 - max(high, -low)
    v_th = max(0, near + low - 1 + beside[0] if far[0] else high - near + beside[0])
    thresholds = rng.integers(-300, 300, 6) + max(0, high - near + 302)
    if far[1]:
        thresholds[:2] = high - near + 1 + beside[1] + np.array([0, 40])
    if far[0]:
        thresholds[4:] = near + low - (v_soft if kind == "soft" else 0) + beside[2] - np.array([0, 40])
    soft = {"reset": "soft", "v_soft": v_soft} if kind == "soft" else {}
    codes = {"quantize": "pre_fire", "q_th": 1} if kind == "pre_fire" else {}
    lif = Lif("lif", "x", 3, steps, np.sort(thresholds), v_th, **soft, **codes)  # type: ignore[arg-type]
    limit = tables.limit_of(lif, (-stream[0], stream[1]))
    if limit is None:
        return
    places = np.concatenate([thresholds, [-stream[0], stream[1], -limit, limit, v_th, v_th + v_soft, 0]])
    places = np.add.outer(np.concatenate([places, *np.subtract.outer(places, steps)]), [-2, -1, 0, 1, 2, 100])
    x = np.unique(np.clip(places.ravel(), -stream[0], stream[1]))
    options = (lif.bits, lif.v_th, lif.reset, lif.v_soft, lif.quantize, lif.q_th)
    for q in range(-3, 4):
        before = np.full(len(x), q)
        _, s, after = lif_step(x, before, steps, lif.thresholds, *options)
        h, s_clamped, clamped = lif_step(np.clip(x, -limit, limit), before, steps, lif.thresholds, *options)
        assert_same_bits(s_clamped, s, "spikes")
        assert_same_bits(clamped, after, "codes")
        u = np.where(s, h - v_soft, h) if kind == "soft" else h
        assert min(h.min(), u.min()) >= -32_767
        assert h.max() <= 32_766


def test_thresholds_of_tanh_lie_in_cells() -> None:
    """What a membrane of 4 bits has, at the largest alpha: the short way must not be lost on it."""
    steps = np.arctanh((np.arange(14) - 6.5) / 7)
    lif = Lif("lif", "x", 4, np.arange(15), np.round(256 * steps).astype(int), v_th=128)
    assert tables.find_cells(tables.Reach.of(lif, (-2000, 2000)), lif) is not None


def _tanh_lif(bits: int, alpha: float, tau: float, v_th: float, grid: Grid) -> Lif:
    tables_of_it = decode_table(alpha, tau, bits, grid), requantize_thresholds(alpha, bits, grid)
    return Lif("lif", "x", bits, *tables_of_it, v_th=threshold_code(v_th, grid))


def _assert_lines_decode(lif: Lif, membrane: tuple[int, int]) -> bool:
    """As src/mdsnn.h puts it, in Python, for every u there can be; False if there are no lines."""
    reach = tables.Reach.of(lif, membrane)
    k = tables.find_lines(reach, lif, membrane)
    if k is None:
        return False
    assert len(k.slope) == len(k.offset) == tables.LINES
    assert min(k.bias, k.slope.min(), k.offset.min()) >= 0
    assert max(k.each, k.factor, k.slope.max(), k.offset.max(), k.mask | k.rest) < 2**16
    assert k.bias + membrane[0] >= 0
    assert k.bias + membrane[1] < 2**16
    for u in range(reach.lo, reach.hi + 1):
        x = max(u, k.base) + k.bias
        assert 0 <= x < 2**16
        cell = (x * k.each >> 16) % 64
        y = (((x << k.shift) % 2**16 * int(k.slope[cell]) >> 16) + int(k.offset[cell])) % 2**16
        code = np.searchsorted(lif.thresholds, u, side="right")
        assert ((y >> k.fraction & k.mask | k.rest) * k.factor >> 16) - k.bias == lif.decode[code]
    return True


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(5, 8),
    alpha=st.floats(0.01, 1),
    tau=st.sampled_from([0.5, 0.25, 0.9, 1.0, 1 / 3]),
    v_th=st.sampled_from([0.5, 1.0, 0.05]),
    frac_bits=st.sampled_from([9, 7, 10, 12]),
    reach=st.tuples(st.integers(-16000, 0), st.integers(0, 16000)),
    moved=st.lists(st.integers(0, 253), max_size=2),
)
def test_lines_decode_every_membrane(
    bits: int, alpha: float, tau: float, v_th: float, frac_bits: int, reach: tuple[int, int], moved: list[int]
) -> None:
    lif = _tanh_lif(bits, alpha, tau, v_th, Grid(frac_bits))
    thresholds = lif.thresholds.copy()
    for place in moved:
        thresholds[place % len(thresholds)] += 1
    _assert_lines_decode(replace(lif, thresholds=np.sort(thresholds)), reach)


@pytest.mark.parametrize(("tau", "v_th"), [(0.5, 0.5), (0.25, 0.5), (0.5, 1.0)])
def test_thresholds_of_8_bits_lie_under_lines(tau: float, v_th: float) -> None:
    """What a membrane of 8 bits has, at alphas that training ends with: the short way must not be lost on it."""
    alphas = np.linspace(0.8, 1, 20)
    assert sum(_assert_lines_decode(_tanh_lif(8, a, tau, v_th, Grid()), (-8448, 8448)) for a in alphas) >= 19


def test_a_lif_that_no_line_fits_has_none() -> None:
    lif = _tanh_lif(8, 0.98, 0.5, 0.5, Grid())
    reach = tables.Reach.of(lif, (-8448, 8448))
    bent = lif.decode.copy()
    bent[100] -= 1
    for other in (
        replace(lif, decode=bent),
        replace(lif, decode=lif.decode[::-1].copy()),
        replace(lif, thresholds=np.sort(np.random.default_rng(0).integers(-900, 250, 254)).astype(np.int32)),
        replace(lif, reset="soft", v_soft=256),
        replace(lif, quantize="pre_fire", q_th=60),
    ):
        assert tables.find_lines(tables.Reach.of(other, (-8448, 8448)), other, (-8448, 8448)) is None
    assert tables.find_lines(reach, lif, (-40000, 40000)) is None


def _same_table(table: np.ndarray, lo: np.ndarray, hi: np.ndarray, grid: Grid) -> bool:
    """Whether the affine form found for a dense table gives all of it; False if none is found."""
    found = tables.affine_of(BnDense("bn", "conv", table), lo, hi, grid.saturation)
    if found is None:
        return False
    assert_same_bits(dense_table(found.multiplier, found.offset, found.shift, lo, hi, grid), table, "table")
    reach = np.abs(found.multiplier.astype(np.int64)) * np.maximum(-lo, hi) + np.abs(found.offset)
    assert reach.max() < 2**31
    assert np.abs(found.multiplier).max() < 2**15
    return True


@settings(deadline=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-4, 4), st.floats(-9, 9), st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=9
    ),
    scale=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_a_dense_table_of_an_affine_bn_is_found_to_be_one(
    data: list[tuple[float, float, int, int]], scale: float
) -> None:
    grid = Grid()
    slopes, biases, below, above = (np.array(column) for column in zip(*data, strict=True))
    lo, hi = -below.astype(np.int64), above.astype(np.int64)
    form = affine_constants(slopes * scale, biases, lo, hi, grid)
    assert _same_table(dense_table(form.multiplier, form.offset, form.shift, lo, hi, grid), lo, hi, grid)


def test_another_dense_table_stays_one() -> None:
    lo, hi, grid = np.array([-20, -20]), np.array([20, 20]), Grid()
    line = (np.arange(-20, 21) * 7).astype(np.int32)
    assert _same_table(np.concatenate([line, -line]), lo, hi, grid)
    for at in (0, 20, 40):
        bent = line.copy()
        bent[at:] += 2
        bent[: at + 1] -= 2
        assert not _same_table(np.concatenate([line, bent]), lo, hi, grid)
    assert not _same_table(np.concatenate([line, np.sort(line**3 // 500)]), lo, hi, grid)


@settings(deadline=None)
@given(st.integers(1, 127), st.integers(1, 193), st.integers(0, 2**32))
def test_as_many_entries_fit_8_bits_as_the_largest_codes_allow(top: int, entries: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slabs = rng.integers(-top, top + 1, (2, entries, 5)).astype(np.int8)
    largest = [-np.sort(-np.maximum(sign * slabs.astype(int), 0), axis=1).cumsum(axis=1) for sign in (1, -1)]
    right = min(int((sums <= limit).sum(axis=1).min()) for sums, limit in zip(largest, (127, 128), strict=True))
    found = packing.safe_entries(slabs, entries)
    assert found == right if top <= 16 else found <= right
    assert packing.safe_entries(slabs, found // 2) == found // 2


def test_a_file_of_packed_weights_is_not_kept() -> None:
    rng = np.random.default_rng(1)
    nodes = (
        InputTable("input", rng.integers(-9, 9, (1, 256))),
        Conv("conv", "input", rng.integers(-7, 8, (500, 1, 16, 16)), 4),
        BnAffine("bn", "conv", np.full(500, 3), np.zeros(500, int), np.full(500, 4)),
        Lif("lif", "bn", 2, np.array([-9, 0, 9]), np.array([-4, 5]), 40),
        Readout("readout", "lif", rng.integers(-7, 8, (3, 500)), 8, np.zeros(3, int)),
    )
    network = artifact.from_bytes(artifact.to_bytes(IntegerNetwork(nodes, InputSpec(1, 16, 16), 2)))
    for node in network.nodes:
        for attribute in node.ARRAYS:
            owner = getattr(node, attribute)
            while isinstance(owner, np.ndarray):
                owner = owner.base
            assert owner is None, f"{node.name}: {attribute}"


@needs_native
def test_a_level_that_is_none_of_the_machine() -> None:
    network = seeded_case(1)[0]
    with pytest.raises(MissingError, match=r"this machine runs .*base.*, not sparc"):
        native.NativeBackend(network, "sparc")

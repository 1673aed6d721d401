"""The Numba engine where its plan takes its rarer ways, and the vectors it is written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install numba")

from numba import njit

from mdsnn.kernels import Engine, jit, vectors
from mdsnn.kernels.formats import Grid
from mdsnn.kernels.network import BnAffine, Conv, InputSpec, InputTable, IntegerNetwork, Lif, Node, Readout, SumPool
from planted import assert_same_bits, assert_same_trace, seeded_case


def check(network: IntegerNetwork, pixels: np.ndarray, what: str) -> jit.JitBackend:
    """Trace, counts and logits are the reference's, with and without a trace; returns the backend."""
    want = Engine(network, "reference", 1).run(pixels, trace=True)
    backend = jit.JitBackend(network)
    got, plain = backend.run(pixels, True), backend.run(pixels, False)
    assert got.trace is not None
    assert want.trace is not None
    assert_same_trace(got.trace, want.trace)
    for result in (got, plain):
        assert_same_bits(result.logits, want.logits, f"logits, {what}")
        for counts in ("spikes_in", "spikes_out"):
            there, right = getattr(result.activity, counts), getattr(want.activity, counts)
            assert list(there) == list(right)
            for name in right:
                assert_same_bits(there[name], right[name], f"{counts} of {name!r} [T], {what}")
    return backend


@pytest.mark.parametrize(
    ("limit", "value"),
    [("_VALUES", 1), ("_VALUES", 1500), ("_GROUP", 1), ("_LIST", 1), ("_TABLE", 1)],
    ids=["a step at a time", "a few steps at a time", "a sample at a time", "a line at a time", "no table of leaks"],
)
def test_limits_do_not_matter(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, limit, value)
    taken = set()
    for seed in range(200, 225):
        backend = check(*seeded_case(seed, max_timesteps=5), f"seed {seed}, {limit} = {value}")
        taken.add((backend._steps < backend.network.timesteps, backend._steps > 1))
    if limit == "_VALUES":
        assert taken >= ({(True, False)} if value == 1 else {(True, True), (False, True)})


def test_wide_layers_and_many_steps() -> None:
    for seed in range(2000, 2012):
        check(*seeded_case(seed, max_channels=130, max_timesteps=32, samples=1), f"seed {seed}")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("code", [-128, 127])
def test_products_at_the_ends_of_their_lanes(bits: int, code: int) -> None:
    """Every input at its end and every weight at its: 70 of them, so that every lane sums as many terms as it may."""
    top = 2 ** (bits - 1) - 1
    for sign in (-1, 1):
        nodes: list[Node] = [InputTable("input", np.full((70, 256), code))]
        nodes += [Conv("conv", "input", np.full((65, 70, 1, 1), sign * top), bits)]
        nodes += [BnAffine("bn", "conv", np.full(65, 3), np.zeros(65, int), np.full(65, 9))]
        nodes += [Lif("lif", "bn", 2, np.array([-9, 0, 9]), np.array([-1, 1]), 100)]
        nodes += [SumPool("sum", "lif", 2, 2), Readout("readout", "sum", np.ones((2, 65), int), 2, np.zeros(2, int))]
        network = IntegerNetwork(tuple(nodes), InputSpec(70, 2, 2), 2, Grid())
        check(network, np.zeros((1, 70, 2, 2), np.uint8), f"{bits} bits, {sign * top} * {code}")


@pytest.mark.parametrize("bits", range(2, 9))
def test_rows_at_the_ends_of_their_lanes(bits: int) -> None:
    """Every neuron fires, and every weight of an output is at the same end."""
    top = 2 ** (bits - 1) - 1
    nodes: list[Node] = [InputTable("input", np.full((1, 256), 100))]
    nodes += [Conv("stem", "input", np.ones((70, 1, 1, 1), int), 2)]
    nodes += [BnAffine("bn", "stem", np.full(70, 9), np.zeros(70, int), np.zeros(70, int))]
    nodes += [Lif("lif", "bn", 2, np.array([-9, 0, 9]), np.array([-1, 1]), 0)]
    signs = np.where(np.arange(65) % 2, -top, top)
    nodes += [Conv("conv", "lif", np.broadcast_to(signs[:, None, None, None], (65, 70, 3, 3)), bits, 1, 1)]
    nodes += [BnAffine("bn2", "conv", np.full(65, 1), np.zeros(65, int), np.full(65, 5))]
    nodes += [Lif("lif2", "bn2", 2, np.array([-9, 0, 9]), np.array([-1, 1]), 100)]
    nodes += [SumPool("sum", "lif2", 3, 3), Readout("readout", "sum", np.ones((2, 65), int), 2, np.zeros(2, int))]
    network = IntegerNetwork(tuple(nodes), InputSpec(1, 3, 3), 2, Grid())
    check(network, np.zeros((1, 1, 3, 3), np.uint8), f"{bits} bits")


def test_a_line_longer_than_the_list_of_events() -> None:
    """The list grows to the longest line, for codes and for spikes."""
    rng = np.random.default_rng(3)
    channels, width = 96, 240  # 69,120 events of a line, where 65,536 are usual
    nodes: list[Node] = [InputTable("input", np.full((1, 256), 100))]
    nodes += [Conv("stem", "input", np.ones((channels, 1, 1, 1), int), 2)]
    nodes += [BnAffine("bn", "stem", np.full(channels, 90), np.zeros(channels, int), np.zeros(channels, int))]
    nodes += [Lif("lif", "bn", 2, np.array([-9, 0, 9]), np.array([-1, 1]), 0)]
    nodes += [Conv("conv", "lif", rng.integers(-1, 2, (3, channels, 3, 3)), 2, 1, 1)]
    nodes += [BnAffine("bn2", "conv", np.full(3, 90), np.zeros(3, int), np.zeros(3, int))]
    nodes += [Lif("lif2", "bn2", 2, np.array([-9, 0, 9]), np.array([-1, 1]), 100)]
    nodes += [SumPool("sum", "lif2", 3, width), Readout("readout", "sum", np.eye(3, dtype=int), 2, np.zeros(3, int))]
    network = IntegerNetwork(tuple(nodes), InputSpec(1, 3, width), 2, Grid())
    backend = check(network, np.zeros((1, 1, 3, width), np.uint8), "a long line")
    assert backend._sizes["rows"] > jit._LIST
    assert backend._sizes["factors"] == backend._sizes["rows"]


# -------------------------------------------------------------------------------------------------------- vectors


@pytest.fixture(scope="module")
def numbers() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-(2**31), 2**31, (2, 16), np.int64).astype(np.int32)
    b[:4] = a[:4]
    return a, b


def wrapped(values: Any) -> np.ndarray:
    return np.asarray(values).astype(np.int64).astype(np.int32)


@pytest.mark.parametrize(
    ("operation", "meaning"),
    [
        (vectors.add, lambda a, b: a + b),
        (vectors.multiply, lambda a, b: a * b),
        (vectors.greater, lambda a, b: a > b),
        (vectors.differs, lambda a, b: a != b),
        (vectors.accumulate, lambda a, b: a + b),
    ],
    ids=["add", "multiply", "greater", "differs", "accumulate"],
)
def test_lanes_are_those_of_numpy(
    operation: Any, meaning: Callable[..., Any], numbers: tuple[np.ndarray, np.ndarray]
) -> None:
    @njit
    def run(a: Any, b: Any, out: Any) -> None:
        vectors.store(out, 0, operation(vectors.load(a, 0, 16), vectors.load(b, 0, 16)))

    a, b = numbers
    out = np.empty(16, np.int32)
    run(a, b, out)
    assert_same_bits(out, wrapped(meaning(a.astype(np.int64), b.astype(np.int64))), "lanes")


def test_integers_masks_and_widths(numbers: tuple[np.ndarray, np.ndarray]) -> None:
    @njit
    def run(a: Any, b: Any, small: Any, out: Any, wide: Any) -> Any:
        x, y = vectors.load(a, 0, 16), vectors.load(b, 0, 16)
        where = vectors.greater(x, 7)
        vectors.store(out, 0, vectors.choose(where, -5, y))
        vectors.store(out, 16, vectors.shift_right(x, 5))
        vectors.store(out, 32, vectors.clamp(x, -1000, 2000))
        vectors.store(out, 48, vectors.scaled(a, 0, 16, 3))
        vectors.store(out, 64, vectors.zeros(a, 16))
        vectors.store(small, 0, x)
        vectors.store(small, 16, where)
        vectors.store(wide, 0, vectors.accumulate(vectors.zeros(wide, 8), vectors.load(small, 3, 8)))
        return vectors.bits(where), vectors.count_ones(vectors.bits(where))

    a, b = numbers
    out, small, wide = np.full(80, 9, np.int32), np.empty(32, np.int8), np.empty(8, np.int32)
    word, ones = run(a, b, small, out, wide)
    long = a.astype(np.int64)
    right = [np.where(a > 7, -5, b), a >> 5, np.clip(a, -1000, 2000), 3 * long, 0 * a]
    assert_same_bits(out, wrapped(np.concatenate(right)), "integers")
    assert_same_bits(small, np.concatenate([a.astype(np.int8), (a > 7).astype(np.int8)]), "narrow stores")
    assert_same_bits(wide, small[3:11].astype(np.int32), "wide sums")
    assert (word, ones) == (sum(1 << i for i in np.flatnonzero(a > 7)), np.count_nonzero(a > 7))


def test_sums_of_rows() -> None:
    @njit
    def run(table: Any, rows: Any, out: Any) -> None:
        vectors.store(out, 0, vectors.sum_rows(table, -2, rows, 1, 3, 4))

    table = np.arange(40, dtype=np.int16)
    out = np.empty(4, np.int16)
    run(table, np.array([99, 4, 11, 2], np.int32), out)
    assert_same_bits(out, table.reshape(10, 4)[[2, 9, 0]].sum(axis=0).astype(np.int16), "rows 2, 9 and 0")

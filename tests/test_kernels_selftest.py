"""The C engine's self-test: its answers are the reference's, it sees a fault, and a level that fails is left alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mdsnn.kernels import Engine, engine, native, plan, selftest
from mdsnn.kernels.errors import MissingError
from mdsnn.kernels.network import Conv, Lif
from planted import assert_same_bits, seeded_case

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LEVELS = [] if native.missing() else list(native.isa_levels())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Levels put into this set give a wrong logit in 1 of 64 networks."""
    levels: set[str] = set()
    run = native.NativeBackend.run

    def wrong(self: Any, pixels: Any, trace: bool, threads: int = 1) -> Any:
        result = run(self, pixels, trace, threads)
        weights = [network.nodes[-1].weight for network in (self.network, selftest.network(41)[0])]
        if self.isa in levels and np.array_equal(*weights):
            result.logits[0, 0] += 1
        return result

    monkeypatch.setattr(native.NativeBackend, "run", wrong)
    for name in ("MDSNN_ISA", "MDSNN_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    caches = (native.fault, native._fallback, engine._fallback)
    for cache in caches:
        cache.cache_clear()
    yield levels
    for cache in caches:
        cache.cache_clear()


def test_the_answers_are_the_reference_s() -> None:
    assert selftest.reference_answers() == selftest.ANSWERS


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine_passes(level: str) -> None:
    native.fault.cache_clear()
    assert native.fault(level) is None


def test_the_networks_are_planted() -> None:
    """Membranes meet thresholds exactly, and both sides of every threshold's neighbourhood."""
    ties = sides = layers = 0
    for number in range(0, selftest.NETWORKS, 4):
        network, pixels = selftest.network(number)
        trace = Engine(network, "reference", 1).run(pixels, trace=True).trace
        assert trace is not None
        for lif in network.lifs:
            h = np.unique(trace.lifs[lif.name].h)
            layers += 1
            ties += bool(np.isin(lif.thresholds, h).any())
            sides += bool((h <= lif.v_th).any() and (h > lif.v_th).any())
    assert ties >= 0.8 * layers
    assert sides >= 0.8 * layers


def test_the_networks_hold_what_the_engine_tells_apart() -> None:
    made = [selftest.network(number)[0] for number in range(selftest.NETWORKS)]
    nodes = [node for network in made for node in network.nodes]
    kinds = {type(node).__name__ for node in nodes}
    assert kinds >= {"BnAffine", "BnDense", "Add", "Requantize", "MaxPool", "SumPool", "Flatten", "Linear", "Readout"}
    lifs = [node for node in nodes if isinstance(node, Lif)]
    assert {lif.bits for lif in lifs} == set(range(2, 9))
    assert {(lif.reset, lif.quantize) for lif in lifs} == {
        ("hard", "post_reset"),
        ("soft", "post_reset"),
        ("hard", "pre_fire"),
    }
    assert {network.input.coding for network in made} == {"image", "events"}
    assert any(node.groups > 1 for node in nodes if isinstance(node, Conv))
    assert {
        network.proof.product_bits[node.name]
        for network in made
        for node in network.nodes
        if type(node).__name__ == "BnAffine"
    } == {32, 64}
    assert {plan._narrow_stream(network) for network in made} == {True, False}


@needs_native
def test_a_level_that_fails_leaves_the_work_to_the_next(broken: set[str], caplog: pytest.LogCaptureFixture) -> None:
    levels = native.isa_levels()
    broken.add(levels[-1])
    network, pixels = seeded_case(1)
    with caplog.at_level(logging.WARNING):
        engines = [Engine(network, threads=1) for _ in range(2)]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"{levels[-1]!r} fails its self-test (network 41 of 64: the logits are" in warnings[0]
    if len(levels) > 1:
        assert [ready._backend.isa for ready in engines] == [levels[-2]] * 2  # type: ignore[attr-defined]
    want = Engine(network, "reference", 1).run(pixels)
    assert_same_bits(engines[0].run(pixels).logits, want.logits, "logits")


@needs_native
def test_a_level_asked_for_by_name_is_not_replaced(broken: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken.add("base")
    monkeypatch.setenv("MDSNN_ISA", "base")
    with pytest.raises(MissingError, match=r"MDSNN_ISA=base: it fails its self-test \(network 41 of 64"):
        Engine(seeded_case(1)[0], "native")


@needs_native
def test_where_every_level_fails_another_engine_takes_over(broken: set[str], caplog: pytest.LogCaptureFixture) -> None:
    broken.update(native.ISA_LEVELS)
    network, _ = seeded_case(1)
    with caplog.at_level(logging.WARNING):
        assert Engine(network, threads=1).kernels in ("numba", "reference")
    assert "no instruction set passes its self-test" in caplog.text
    with pytest.raises(MissingError, match="no instruction set passes its self-test"):
        Engine(network, "native")


@needs_native
def test_a_fault_inside_is_told_by_layer_step_and_index() -> None:
    def spoil(network: Any, pixels: Any) -> Any:
        result = native.NativeBackend(network, "base").run(pixels, True)
        last = network.lifs[-1].name
        result.trace.lifs[last].q[-1, 0, 0, 0, 0] ^= 1
        return result

    found = selftest.first_fault(spoil)
    assert found is not None
    network, _ = selftest.network(0)
    assert found.startswith(f"network 0 of 64: q of '{network.lifs[-1].name}' at ({network.timesteps - 1}, 0, 0, 0, 0)")


@needs_native
def test_doctor_shows_what_each_level_s_self_test_found(broken: set[str]) -> None:
    from mdsnn.cli import doctor

    levels = native.isa_levels()
    broken.add(levels[-1])
    found = dict(doctor._self_tests())
    assert list(found) == list(levels)
    assert str(found.pop(levels[-1])).startswith("network 41 of 64: the logits are")
    assert set(found.values()) <= {None}

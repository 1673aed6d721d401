"""The C engine's self-test: its answers are the reference's, it sees a fault, and a level that fails is left alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mdsnn.kernels import Engine, engine, native, plan, reference, selftest
from mdsnn.kernels.engine import NodeBackend
from mdsnn.kernels.errors import MissingError
from mdsnn.kernels.network import BnAffine, BnDense, Conv, IntegerNetwork, Lif, Linear, Node
from planted import assert_same_bits, seeded_case

needs_native = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
LEVELS = [] if native.missing() else list(native.isa_levels())
BROKEN = 9


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Levels put into this set give a wrong logit in 1 of the networks."""
    levels: set[str] = set()
    run = native.NativeBackend.run

    def wrong(self: Any, pixels: Any, trace: bool, threads: int = 1) -> Any:
        result = run(self, pixels, trace, threads)
        weights = [network.nodes[-1].weight for network in (self.network, selftest.network(BROKEN)[0])]
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
    assert len(selftest.PLANTED) == selftest.NETWORKS


@pytest.mark.parametrize("number", range(selftest.NETWORKS))
def test_what_is_planted_is_what_the_reference_meets(number: int) -> None:
    assert selftest.plant(number) == selftest.PLANTED[number]


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine_passes(level: str) -> None:
    native.fault.cache_clear()
    assert native.fault(level) is None


def test_the_networks_are_planted() -> None:
    """Membranes meet v_th and a threshold below it, and lie on both sides."""
    on_v_th = on_threshold = sides = layers = 0
    for number in range(selftest.NETWORKS):
        network, pixels = selftest.network(number)
        trace = Engine(network, "reference", 1).run(pixels, trace=True).trace
        assert trace is not None
        for lif in network.lifs:
            h = np.unique(trace.lifs[lif.name].h)
            layers += 1
            on_v_th += lif.v_th in h
            on_threshold += bool(np.isin(lif.thresholds[lif.thresholds <= lif.v_th], h).any())
            sides += bool((h < lif.v_th).any() and (h > lif.v_th).any())
    assert on_v_th >= 0.95 * layers
    assert on_threshold == layers
    assert sides >= 0.95 * layers


def faults(node: Node) -> Iterator[tuple[str, Node]]:
    """What a kernel might do wrong, as the node that does it right."""
    match node:
        case Lif():
            yield "thresholds", replace(node, thresholds=node.thresholds + 1)
            yield "decode", replace(node, decode=node.decode + 1)
            if node.quantize == "pre_fire":
                if node.q_th:
                    yield "fires", replace(node, q_th=node.q_th - 1)
            else:
                yield "fires", replace(node, v_th=node.v_th - 1)
                soft = node.reset == "soft"
                yield "reset", replace(node, reset="hard" if soft else "soft", v_soft=0 if soft else node.v_th + 1)
        case BnAffine():
            yield "shift", replace(node, shift=node.shift + np.uint8(1))
            yield "rounding", replace(node, offset=node.offset + (1 << node.shift.astype(np.int64) - 1))
        case BnDense():
            yield "entry", replace(node, table=np.clip(node.table + 1, -4096, 4096))
        case Conv() | Linear():  # the last output's last two inputs, or taps, exchanged: its accumulator's bounds stay
            weight = node.weight.copy()
            axis = 1 if weight.shape[1] > 1 else -1
            row = np.moveaxis(weight[-1:], axis, 0)
            if len(row) > 1 and not np.array_equal(row[-1], row[-2]):
                row[[-2, -1]] = row[[-1, -2]]
                yield "inputs", replace(node, weight=weight)


def paths(made: IntegerNetwork, level: str) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The code that a level's plan has each node run, in words."""
    ready = plan.Plan(native._module(), made, level)

    def quantizer(op: Any, width: int) -> tuple[object, ...]:
        kind = ("compared", "table", "bisected")[op.search]
        return width, kind, bool(op.buckets), bool(op.cells), bool(op.soft), bool(op.pre_fire)

    def form(op: Any, width: int) -> tuple[object, ...]:
        affine = op.kind == ready.lib.MDSNN_BN_AFFINE
        return (width, affine, *((op.wide, op.short_product) if affine else ()))

    for at, (_, step) in enumerate(ready.steps):
        op = ready.struct.ops[at]
        if isinstance(step, plan.Group):
            method = native.METHODS[op.method]
            yield step.conv.name, (method, op.nibbles, min(op.widen, 2), step.conv.weight.shape[2], op.stride)
            yield step.bn.name, (method, *form(op.bn, op.width))
            if step.fire is not None:
                yield step.fire.name, (method, *quantizer(op.fire, op.width))
        elif isinstance(step, Lif):
            yield step.name, ("alone", op.pattern != ready.ffi.NULL, *quantizer(op, ready.values[op.source].type))
        elif isinstance(step, BnAffine | BnDense):
            yield step.name, ("alone", *form(op, ready.values[op.out].type))
        elif isinstance(step, Conv | Linear):
            yield step.name, ("plain",)


@pytest.fixture(scope="module")
def noticed() -> dict[tuple[int, str, str], bool]:
    """For each network, node and fault: whether the checksum tells."""
    found = {}
    for number in range(selftest.NETWORKS):
        made, pixels = selftest.network(number)
        for at, node in enumerate(made.nodes):
            for what, wrong in faults(node):
                nodes = (*made.nodes[:at], wrong, *made.nodes[at + 1 :])
                other = IntegerNetwork(nodes, made.input, made.timesteps, made.grid)
                result = NodeBackend(other, reference, "reference").run(pixels, True)
                found[number, node.name, what] = selftest.checksum(result) != selftest.ANSWERS[number]
    return found


def test_faults_of_a_node_are_noticed(noticed: dict[tuple[int, str, str], bool]) -> None:
    assert len(noticed) > 400
    assert sum(noticed.values()) >= 0.97 * len(noticed)
    assert all(seen for (_, _, what), seen in noticed.items() if what in ("thresholds", "decode", "shift", "entry"))


@needs_native
@pytest.mark.parametrize("level", native.ISA_LEVELS)
def test_faults_of_whatever_code_a_level_runs_are_noticed(
    level: str, noticed: dict[tuple[int, str, str], bool]
) -> None:
    seen: dict[tuple[tuple[object, ...], str], bool] = {}
    words: set[object] = set()
    for number in range(selftest.NETWORKS):
        for name, path in paths(selftest.network(number)[0], level):
            words.update(path)
            for what in ("thresholds", "decode", "fires", "reset", "shift", "rounding", "entry", "inputs"):
                if (number, name, what) in noticed:
                    seen[path, what] = seen.get((path, what), False) or noticed[number, name, what]
    methods = {"base": {"pairs"}, "amx": {"tiles"}}.get(level, {"pairs", "bytes"})
    assert words >= {"events, 8 bits", "events, 16 bits", "grouped", "plain", "alone", *methods}
    assert words >= {"compared", "table", "bisected"}
    assert len(seen) > 120
    assert sum(seen.values()) >= 0.97 * len(seen), [key for key, one in seen.items() if not one]


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
    if native.missing() is None:
        # with a trace, what is clamped runs as what has 32 bits everywhere
        plans = [plan.Plan(native._module(), network, "base") for network in made]
        assert {step.width for ready in plans for _, step in ready.steps if isinstance(step, plan.Group)} >= {0, 1}


@needs_native
def test_a_level_that_fails_leaves_the_work_to_the_next(broken: set[str], caplog: pytest.LogCaptureFixture) -> None:
    levels = native.isa_levels()
    broken.add(levels[-1])
    network, pixels = seeded_case(1)
    with caplog.at_level(logging.WARNING):
        engines = [Engine(network, threads=1) for _ in range(2)]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"{levels[-1]!r} fails its self-test (network {BROKEN} of 16: the logits are" in warnings[0]
    if len(levels) > 1:
        assert [ready._backend.isa for ready in engines] == [levels[-2]] * 2  # type: ignore[attr-defined]
    want = Engine(network, "reference", 1).run(pixels)
    assert_same_bits(engines[0].run(pixels).logits, want.logits, "logits")


@needs_native
def test_a_level_asked_for_by_name_is_not_replaced(broken: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken.add("base")
    monkeypatch.setenv("MDSNN_ISA", "base")
    with pytest.raises(MissingError, match=rf"MDSNN_ISA=base: it fails its self-test \(network {BROKEN} of 16"):
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
    class Spoilt(native.NativeBackend):
        def run(self, pixels: Any, trace: bool, threads: int = 1) -> Any:
            result = super().run(pixels, trace, threads)
            assert result.trace is not None
            result.trace.lifs[self.network.lifs[-1].name].q[-1, 0, 0, 0, 0] ^= 1
            return result

    found = selftest.first_fault(lambda network: Spoilt(network, "base"))
    assert found is not None
    network, _ = selftest.network(0)
    assert found.startswith(f"network 0 of 16: q of '{network.lifs[-1].name}' at ({network.timesteps - 1}, 0, 0, 0, 0)")


@needs_native
@pytest.mark.parametrize("what", ["spikes", "logits"])
def test_a_fault_of_runs_without_a_trace_is_told(what: str) -> None:
    class Spoilt(native.NativeBackend):
        def run(self, pixels: Any, trace: bool, threads: int = 1) -> Any:
            result = super().run(pixels, trace, threads)
            if not trace and what == "logits":
                result.logits[0, 0] += 1
            elif not trace:
                result.activity.spikes_out[self.network.lifs[-1].name][-1] += 1
            return result

    found = selftest.first_fault(lambda network: Spoilt(network, "base"))
    assert found is not None
    last = selftest.network(0)[0].lifs[-1].name
    assert found.startswith(f"network 0 of 16, without a trace: {'the logits are' if what == 'logits' else repr(last)}")


@needs_native
def test_doctor_shows_what_each_level_s_self_test_found(broken: set[str]) -> None:
    from mdsnn.cli import doctor

    levels = native.isa_levels()
    broken.add(levels[-1])
    found = dict(doctor._self_tests())
    assert list(found) == list(levels)
    assert str(found.pop(levels[-1])).startswith(f"network {BROKEN} of 16: the logits are")
    assert set(found.values()) <= {None}

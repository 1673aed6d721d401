"""Verification finds what was broken, names where, counts right, and takes nothing that failed for agreement."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mdsnn.export import artifact
from mdsnn.export.verify import (
    Divergence,
    Verification,
    compare_constants,
    kernel_executor,
    match_bn_forms,
    save_divergence,
    segments,
    verify,
)
from mdsnn.kernels.engine import LifTrace, Trace, run
from mdsnn.kernels.errors import ConfigError, InputError, NetworkError
from mdsnn.kernels.formats import Grid, decode_table, delta, dense_table, image_table, requantize_thresholds
from mdsnn.kernels.network import (
    Add,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    Node,
    Readout,
    Requantize,
)
from planted import network_cases, seeded_case

LIMITS: dict[str, Any] = {"max_channels": 6, "max_timesteps": 3, "samples": 3}


def reference(network: IntegerNetwork) -> Callable[[Any], Trace]:
    return kernel_executor(network, "reference")


def compare(network: IntegerNetwork, other: IntegerNetwork, pixels: np.ndarray, **options: Any) -> Verification:
    """`other` in the role of an executor that claims to run `network`."""
    return verify(network, {"good": reference(network), "broken": reference(other)}, pixels, **options)


def with_node(network: IntegerNetwork, node: Node) -> IntegerNetwork:
    return replace(network, nodes=tuple(node if old.name == node.name else old for old in network.nodes))


def changed(array: np.ndarray, rng: np.random.Generator, lo: int, hi: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """A copy with one element moved to another value in lo..hi, and its index."""
    copy = array.astype(np.int64)
    at = tuple(int(rng.integers(n)) for n in array.shape)
    copy[at] = rng.choice([value for value in range(lo, hi + 1) if value != copy[at]])
    return copy, at


def break_node(node: Node, rng: np.random.Generator) -> tuple[Node, str, tuple[int, ...]] | None:
    """The node with one constant changed at random, the field and the index; None if it has none to change."""
    match node:
        case Conv() | Linear() | Readout() if rng.random() < 0.8 or not isinstance(node, Readout):
            weight, at = changed(node.weight, rng, -delta(node.bits), delta(node.bits))
            return replace(node, weight=weight), "weight", at
        case Readout():
            bias, at = changed(node.bias, rng, -200, 200)
            return replace(node, bias=bias), "bias", at
        case BnAffine():
            field = str(rng.choice(["multiplier", "offset"]))
            values = getattr(node, field).astype(np.int64)
            at = (int(rng.integers(values.size)),)
            values[at] += int(rng.choice([-1, 1])) * max(1, abs(int(values[at])) // 2)
            return replace(node, **{field: values}), field, at
        case BnDense():
            at = (int(rng.integers(node.table.size)),)
            values = node.table.astype(np.int64)
            values[at] = values[at[0] - 1] if at[0] and values[at] != values[at[0] - 1] else values[at] + 1
            return replace(node, table=values), "table", at
        case Lif():
            match rng.choice(["v_th", "threshold", "decode", "q_th"]):
                case "v_th" if node.quantize == "post_reset":
                    return (
                        replace(node, v_th=max(0, node.v_th + int(rng.choice([-1, 1])) * (1 + node.v_th // 4))),
                        "v_th",
                        (),
                    )
                case "q_th" if node.quantize == "pre_fire":
                    return replace(node, q_th=node.q_th + (1 if node.q_th < delta(node.bits) - 1 else -1)), "q_th", ()
                case "threshold":
                    values = node.thresholds.astype(np.int64)
                    at = (int(rng.integers(values.size)),)
                    values[at] = values[at[0] - 1] if at[0] else values[0] - 40
                    return replace(node, thresholds=values), "thresholds", at
                case "decode":
                    values = node.decode.astype(np.int64)
                    values[-1] += 30
                    return replace(node, decode=values), "decode", (values.size - 1,)
        case InputTable():
            table, at = changed(node.table, rng, 0, 127)
            return replace(node, table=table), "table", at
        case Requantize():
            return replace(node, shift=node.shift + 1), "shift", ()
    return None


@given(network_cases(**LIMITS), st.integers(0, 2**32 - 1))
@settings(max_examples=120, deadline=None)
def test_one_broken_constant_is_found_and_its_node_is_in_the_segment_named(case, seed):
    network, pixels = case
    rng = np.random.default_rng(seed)
    victim = network.nodes[int(rng.integers(len(network.nodes)))]
    broken = break_node(victim, rng)
    assume(broken is not None)
    assert broken is not None
    node, field, index = broken
    try:
        other = with_node(network, node)
    except NetworkError:
        assume(False)
    difference = compare_constants(other, network)
    if getattr(node, field) is not getattr(victim, field) and np.array_equal(
        getattr(node, field), getattr(victim, field)
    ):
        assert difference == []
        return
    assert [(d.node, d.field, d.index, d.differing) for d in difference] == [(victim.name, field, index, 1)]
    outcome = compare(network, other, pixels)
    good, bad = (run(n, pixels, kernels="reference", trace=True, threads=1).trace for n in (network, other))
    same = all(np.array_equal(getattr(good.lifs[n], x), getattr(bad.lifs[n], x)) for n in good.lifs for x in "hsq")
    if same and np.array_equal(good.logits, bad.logits):
        assert outcome.agrees  # a change that changes nothing on these pixels
        return
    assert not outcome.agrees
    first = outcome.first
    assert first is not None
    assert victim.name in first.segment, f"{victim.name} was broken, {first}"
    assert repr(first.layer) in str(first)


def test_breaking_each_constant_that_matters_is_found_in_a_network_of_every_type():
    """One of each kind of change must be seen to be found: a weight, a threshold, a comparison."""
    found: set[str] = set()
    wanted = {"weight", "thresholds", "v_th", "decode", "multiplier", "offset", "table", "bias", "q_th", "shift"}
    rng = np.random.default_rng(0)
    for seed in range(400):
        network, pixels = seeded_case(seed, **LIMITS)
        for victim in network.nodes:
            broken = break_node(victim, rng)
            if broken is None or broken[1] in found:
                continue
            try:
                outcome = compare(network, with_node(network, broken[0]), pixels)
            except NetworkError:
                continue
            if not outcome.agrees:
                assert outcome.first is not None
                assert victim.name in outcome.first.segment
                found.add(broken[1])
        if found == wanted:
            break
    assert found == wanted


# ----------------------------------------------------------------------------------------- the first divergence


@given(network_cases(**LIMITS), st.data())
@settings(max_examples=60, deadline=None)
def test_the_first_divergence_is_the_earliest_of_those_planted_in_a_trace(case, data):
    """By step, then layer in the graph's order, then h, s, q, then sample and index; logits last."""
    network, pixels = case
    good = reference(network)(pixels)
    traces = {n: {x: getattr(lif, x).copy() for x in "hsq"} for n, lif in good.lifs.items()}
    names = [lif.name for lif in network.lifs]
    planted = []
    for _ in range(data.draw(st.integers(1, 4))):
        layer = data.draw(st.integers(0, len(names) - 1))
        quantity = data.draw(st.integers(0, 2))
        array = traces[names[layer]]["hsq"[quantity]]
        at = tuple(data.draw(st.integers(0, n - 1)) for n in array.shape)
        array[at] = good_value(good, names[layer], "hsq"[quantity], at) ^ 1
        planted.append(((at[0], layer, quantity, *at[1:]), names[layer], "hsq"[quantity], at))
    # a dictionary in another order must not matter
    lifs = {name: LifTrace(**traces[name]) for name in reversed(names)}
    fake = Trace(lifs, good.logits + 1)
    outcome = verify(network, {"good": lambda _: good, "fake": lambda _: fake}, pixels)
    _, layer, quantity, at = min(planted)
    first = outcome.first
    assert first is not None
    assert (first.layer, first.quantity, first.step, (first.sample, *first.index)) == (layer, quantity, at[0], at[1:])
    want = good_value(good, layer, quantity, at)
    assert (first.got, first.want) == (want ^ 1, want)
    assert (first.executor, first.baseline) == ("fake", "good")


def good_value(trace: Trace, layer: str, quantity: str, at: tuple[int, ...]) -> int:
    return int(getattr(trace.lifs[layer], quantity)[at])


def test_a_difference_in_logits_alone_is_named_so():
    network, pixels = seeded_case(3, **LIMITS)
    good = reference(network)(pixels)
    logits = good.logits.copy()
    logits[2, -1] += 5
    first = verify(network, {"a": lambda _: good, "b": lambda _: Trace(good.lifs, logits)}, pixels).first
    assert first is not None
    assert (first.layer, first.quantity, first.sample, first.index) == ("logits", "logits", 2, (network.classes - 1,))
    assert first.step == network.timesteps - 1
    assert first.got - first.want == 5
    assert first.segment[-1] == network.readout.name


@pytest.mark.parametrize("coding", ["image", "events"])
@pytest.mark.parametrize("batch", [1, 2, 5, 50])
@pytest.mark.parametrize("of_logits", [True, False])
def test_the_sample_is_its_index_in_the_data_whatever_the_batch(coding, batch, of_logits):
    seed = next(s for s in range(99) if seeded_case(s, **LIMITS)[0].input.coding == coding)
    network, pixels = seeded_case(seed, max_channels=6, max_timesteps=3, samples=5)
    shape = pixels.shape
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    good = reference(network)(pixels)
    calls = [0]

    def off_at_sample_3(part: np.ndarray) -> Trace:
        trace = reference(network)(part)
        start, calls[0] = calls[0], calls[0] + part.shape[-4]
        lifs, logits = dict(trace.lifs), trace.logits.copy()
        if start <= 3 < calls[0] and where == "logits":
            logits[3 - start] += 1
        elif start <= 3 < calls[0]:
            h = trace.lifs[where].h.copy()
            h[-1, 3 - start] += 1
            lifs[where] = replace(trace.lifs[where], h=h)
        return Trace(lifs, logits)

    where = "logits" if of_logits else network.lifs[0].name
    ticks: list[tuple[int, int]] = []
    outcome = verify(
        network,
        {"good": reference(network), "off": off_at_sample_3},
        pixels,
        batch=batch,
        progress=lambda done, of: ticks.append((done, of)),
    )
    assert outcome.first is not None
    assert outcome.first.sample == 3
    assert outcome.first.layer == where
    size = network.classes if of_logits else int(np.prod(network.proof.shapes[where]))
    assert outcome.differing == size
    assert ticks == [(min(at + batch, 5), 5) for at in range(0, 5, batch)]
    assert outcome.comparisons["good"].classes.tolist() == np.argmax(good.logits, axis=1).tolist()
    sizes = sum(getattr(lif, x).size for lif in good.lifs.values() for x in "hsq") + good.logits.size
    assert outcome.compared == sizes


# -------------------------------------------------------------------------------------------------------- counts


@given(network_cases(**LIMITS))
@settings(max_examples=20, deadline=None)
def test_counts_are_the_integers_compared_and_differing(case):
    network, pixels = case
    good = reference(network)(pixels)
    name = network.lifs[-1].name
    lif = good.lifs[name]
    fake = Trace({**good.lifs, name: LifTrace(lif.h + 1, 1 - lif.s, lif.q)}, good.logits)
    outcome = verify(network, {"a": lambda _: good, "b": lambda _: fake, "c": lambda _: good}, pixels)
    per_quantity = {x: sum(getattr(lif, x).size for lif in good.lifs.values()) for x in "hsq"}
    for comparison in outcome.comparisons.values():
        assert comparison.compared == {**per_quantity, "logits": good.logits.size}
    size = lif.h.size
    assert outcome.comparisons["b"].differing == {"h": size, "s": size, "q": 0, "logits": 0}
    assert outcome.comparisons["c"].differing == dict.fromkeys(("h", "s", "q", "logits"), 0)
    assert outcome.compared == 2 * (sum(per_quantity.values()) + good.logits.size)  # the baseline counts for nothing
    assert outcome.differing == 2 * size
    assert [outcome.comparisons[x].agrees for x in "abc"] == [True, False, True]
    assert not outcome.agrees


def test_agreement_and_accuracy():
    network, pixels = seeded_case(3, **LIMITS)
    outcome = verify(network, {"a": reference(network), "b": reference(network)}, pixels)
    assert outcome.agrees
    assert outcome.first is None
    classes = outcome.comparisons["b"].classes
    assert outcome.comparisons["b"].accuracy(classes) == 1.0
    assert outcome.comparisons["b"].accuracy(np.concatenate([classes[:-1], classes[-1:] + 1])) == pytest.approx(2 / 3)
    assert outcome.comparisons["b"].accuracy(classes[:-1]) is None
    document = outcome.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert (document["schema"], document["agrees"], document["samples"]) == ("mdsnn.verify/1", True, 3)


def test_one_executor_alone_agrees_with_nobody():
    network, pixels = seeded_case(3, **LIMITS)
    assert not verify(network, {"a": reference(network)}, pixels).agrees


# ------------------------------------------------------------------------------------- executors that misbehave


def bad_traces() -> dict[str, tuple[Callable[[Trace], Any], str]]:
    def lif(trace: Trace, **arrays: Any) -> Trace:
        name = next(iter(trace.lifs))
        return Trace({**trace.lifs, name: replace(trace.lifs[name], **arrays)}, trace.logits)

    def first(trace: Trace) -> LifTrace:
        return next(iter(trace.lifs.values()))

    return {
        "None": (lambda t: None, "NoneType"),
        "logits alone": (lambda t: t.logits, "ndarray"),
        "no layers": (lambda t: Trace({}, t.logits), "layers differ"),
        "one layer too many": (
            lambda t: Trace({**t.lifs, "x": first(t)}, t.logits),
            "layers differ from the network's: x",
        ),
        "a step too few": (lambda t: lif(t, h=first(t).h[:-1]), "h of"),
        "a sample too few": (lambda t: lif(t, s=first(t).s[:, :-1]), "s of"),
        "other axes": (lambda t: lif(t, q=first(t).q[..., None]), "q of"),
        "other dtype of h": (lambda t: lif(t, h=first(t).h.astype(np.int64)), "int64"),
        "spikes as bool": (lambda t: lif(t, s=first(t).s.astype(bool)), "bool"),
        "codes as float": (lambda t: lif(t, q=first(t).q.astype(np.float32)), "float32"),
        "a list": (lambda t: lif(t, q=first(t).q.tolist()), "q of .* is a list"),
        "no array": (lambda t: lif(t, h=None), "NoneType"),
        "a layer that is none": (lambda t: Trace(dict.fromkeys(t.lifs), t.logits), "AttributeError"),
        "layers that are none": (lambda t: Trace(None, t.logits), "TypeError"),
        "logits of other classes": (lambda t: Trace(t.lifs, t.logits[:, :-1]), "logits is int32"),
        "logits of other dtype": (lambda t: Trace(t.lifs, t.logits.astype(np.float64)), "float64"),
        "an error of ours": (lambda t: (_ for _ in ()).throw(InputError("no, thanks")), "InputError: no, thanks"),
        "an error of anybody": (lambda t: 1 // 0, "ZeroDivisionError"),
        "an assertion": (lambda t: (_ for _ in ()).throw(AssertionError("x")), "AssertionError: x"),
        "no memory": (lambda t: (_ for _ in ()).throw(MemoryError()), "MemoryError"),
    }


@pytest.mark.parametrize("what", bad_traces())
@pytest.mark.parametrize("baseline", [False, True], ids=["beside", "as the baseline"])
def test_an_executor_that_raises_or_returns_another_form_is_a_failure_not_agreement(what, baseline):
    spoil, text = bad_traces()[what]
    network, pixels = seeded_case(3, **LIMITS)
    assert network.classes > 1

    def bad(part: np.ndarray) -> Any:
        return spoil(reference(network)(part))

    executors = {"bad": bad, "good": reference(network)} if baseline else {"good": reference(network), "bad": bad}
    outcome = verify(network, executors, pixels, batch=2)
    assert not outcome.agrees
    failure = outcome.comparisons["bad"].failure
    assert failure is not None
    assert re.search(text, failure), failure
    assert outcome.comparisons["bad"].accuracy(np.zeros(3)) is None
    assert sum(outcome.comparisons["bad"].compared.values()) == 0
    if baseline:
        assert outcome.comparisons["good"].failure == "the baseline 'bad' did not run"
    else:
        assert outcome.comparisons["good"].agrees
    assert outcome.to_dict()["executors"]["bad"]["failure"] == failure


def test_an_executor_that_fails_later_fails_though_it_agreed_before():
    network, pixels = seeded_case(3, **LIMITS)
    calls: list[int] = []

    def tired(part: np.ndarray) -> Trace:
        calls.append(len(part))
        if len(calls) == 2:
            raise OSError("gone")
        return reference(network)(part)

    outcome = verify(network, {"good": reference(network), "tired": tired}, pixels, batch=1)
    assert outcome.comparisons["tired"].failure == "OSError: gone"
    assert not outcome.comparisons["tired"].agrees
    assert len(calls) == 2, "it is not asked again"


def test_ctrl_c_in_an_executor_is_no_failure_of_it():
    network, pixels = seeded_case(3, **LIMITS)

    def interrupted(part: np.ndarray) -> Trace:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(network, {"a": interrupted}, pixels)


@pytest.mark.parametrize("coding", ["image", "events"])
def test_an_executor_that_writes_to_its_pixels_spoils_nothing(coding):
    for seed in range(200):
        network, pixels = seeded_case(seed, **LIMITS)
        blank = reference(network)(np.zeros_like(pixels)).lifs
        seen = reference(network)(pixels).lifs
        if network.input.coding == coding and any(not np.array_equal(blank[n].h, seen[n].h) for n in seen):
            break
    else:
        raise AssertionError("no network looks at its pixels")
    before = pixels.copy()

    def vandal(part: np.ndarray) -> Trace:
        trace = reference(network)(part)
        part[:] = 0
        return trace

    assert verify(network, {"a": vandal, "b": reference(network), "c": vandal}, pixels).agrees
    assert np.array_equal(pixels, before)


def test_misuse_is_refused():
    network, pixels = seeded_case(3, **LIMITS)
    with pytest.raises(InputError):
        verify(network, {"a": reference(network)}, pixels[..., :-1])
    for executors, batch in (({}, 50), ({"a": reference(network)}, 0)):
        with pytest.raises(ConfigError, match="at least 1 of each"):
            verify(network, executors, pixels, batch=batch)


# ------------------------------------------------------------------------------------------------------ segments


@given(network_cases(max_channels=4, max_timesteps=2))
@settings(max_examples=40, deadline=None)
def test_every_node_is_in_a_segment_and_every_layer_has_one(case):
    network, _ = case
    found = segments(network)
    assert list(found) == [*(lif.name for lif in network.lifs), "logits"]
    assert {name for segment in found.values() for name in segment} == {node.name for node in network.nodes}
    order = {node.name: place for place, node in enumerate(network.nodes)}
    for name, segment in found.items():
        assert segment[-1] == (network.readout.name if name == "logits" else name)
        assert list(segment) == sorted(segment, key=order.__getitem__)


def test_a_node_whose_fault_an_earlier_layer_hides_is_still_named_by_the_later_one():
    """One convolution read through a BN table of zeros and through another: the first LIF sees nothing of it."""

    def bn(name: str, a: int) -> BnAffine:
        return BnAffine(name, "conv", np.full(2, a), np.zeros(2, np.int64), np.zeros(2, np.uint8))

    def lif(name: str, source: str) -> Lif:
        return Lif(name, source, 4, decode_table(0.6, 0.5, 4, Grid()), requantize_thresholds(0.6, 4, Grid()), 20)

    nodes = (
        InputTable("input", image_table([0.5], [0.25])),
        Conv("conv", "input", np.ones((2, 1, 1, 1), np.int8), 4),
        bn("blind", 0),
        lif("lif1", "blind"),
        Conv("conv2", "lif1", np.ones((2, 2, 1, 1), np.int8), 4),
        BnAffine("bn2", "conv2", np.ones(2, np.int32), np.zeros(2, np.int64), np.zeros(2, np.uint8)),
        bn("seeing", 1),
        Add("add", "bn2", "seeing"),
        lif("lif2", "add"),
        Flatten("flat", "lif2"),
        Readout("readout", "flat", np.ones((2, 8), np.int8), 4, np.zeros(2, np.int32)),
    )
    network = IntegerNetwork(nodes, InputSpec(1, 2, 2), 2)
    conv = network["conv"]
    assert isinstance(conv, Conv)
    other = with_node(network, replace(conv, weight=conv.weight + 1))
    first = compare(network, other, np.full((1, 1, 2, 2), 200, np.uint8)).first
    assert first is not None
    assert first.layer == "lif2"
    assert "conv" in first.segment


# ------------------------------------------------------------------------------------------------------ constants


def test_constants_of_equal_networks_do_not_differ():
    for seed in range(5):
        network, _ = seeded_case(seed, **LIMITS)
        assert compare_constants(artifact.from_bytes(artifact.to_bytes(network)), network) == []


def test_every_other_difference_is_named_too():
    network, _ = seeded_case(3, **LIMITS)
    longer = replace(network, timesteps=network.timesteps + 1)
    assert [(d.node, d.field, d.got) for d in compare_constants(longer, network)] == [
        ("network", "timesteps", longer.timesteps)
    ]
    other, _ = seeded_case(4, **LIMITS)
    assert "nodes" in {d.field for d in compare_constants(other, network)}
    readout = network.readout
    bigger = with_node(
        network, replace(readout, weight=np.repeat(readout.weight, 2, 0), bias=np.repeat(readout.bias, 2))
    )
    assert [(d.field, d.want) for d in compare_constants(bigger, network)] == [
        ("weight shape", readout.weight.shape),
        ("bias shape", readout.bias.shape),
    ]
    many = with_node(network, replace(readout, bias=readout.bias + 1))
    (difference,) = compare_constants(many, network)
    assert (difference.differing, difference.index) == (network.classes, (0,))
    assert str(difference) == (
        f"node 'readout': bias[0] is {readout.bias[0] + 1}, not {readout.bias[0]} ({network.classes} values differ)"
    )


def test_bn_forms_are_matched_before_they_are_compared():
    tried = 0
    for seed in range(60):
        network, pixels = seeded_case(seed, **LIMITS)
        affine = [node for node in network.nodes if isinstance(node, BnAffine)]
        if not affine:
            continue
        node = affine[0]
        bounds = network.proof.channel_bounds[node.source]
        if int((bounds[1] - bounds[0] + 1).sum()) > 1 << 16:
            continue
        table = dense_table(node.multiplier, node.offset, node.shift, *bounds, network.grid)
        dense = with_node(network, BnDense(node.name, node.source, table))
        (difference,) = compare_constants(dense, network)
        assert (difference.node, difference.field, difference.got) == (node.name, "type", "BnDense")
        assert compare_constants(dense, match_bn_forms(network, dense)) == []
        assert compare(network, dense, pixels).agrees
        tried += 1
    assert tried > 5


# -------------------------------------------------------------------------------------------- saving a divergence


def without_numba(*words: Path) -> subprocess.CompletedProcess[str]:
    """Run a script where Numba is missing: it need not compile, and the script must get by."""
    code = "import runpy, sys; sys.modules['numba'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)


def test_a_saved_divergence_runs_and_prints_both_values(tmp_path):
    for seed in range(50):
        network, pixels = seeded_case(seed, **LIMITS)
        lif = network.lifs[0]
        other = with_node(network, replace(lif, v_th=lif.v_th // 2))
        first = compare(network, other, pixels).first
        if first is not None and first.sample > 0:
            break
    assert first is not None
    artifact.save(network, tmp_path / "net's.mdsnn")
    record, script = save_divergence(first, pixels, str(tmp_path / "net's.mdsnn"), tmp_path)
    assert {record.suffix, script.suffix} == {".npz", ".py"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd="/", env={**os.environ, "MDSNN_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"recorded: broken {first.got} | good {first.want}"
    assert f"reference has {first.want}" in lines
    again = save_divergence(first, pixels, "x", tmp_path)
    assert not {record, script} & set(again), "an earlier find is kept"
    with np.load(record, allow_pickle=False) as data:
        axis = pixels.ndim - 4
        assert np.array_equal(data["pixels"], pixels.take([first.sample], axis=axis))
    # of the network that was broken, the same script has the other value
    artifact.save(other, tmp_path / "other.mdsnn")
    done = without_numba(script, tmp_path / "other.mdsnn")
    assert "numba did not run" in done.stdout
    assert f"reference has {first.got}" in done.stdout.splitlines()


def test_a_saved_divergence_of_logits_runs_too_whatever_the_names(tmp_path):
    network, pixels = seeded_case(3, **LIMITS)
    nodes = tuple(replace(node, name='a"""\\"') if isinstance(node, Readout) else node for node in network.nodes)
    network = replace(network, nodes=nodes)
    good = reference(network)(pixels)
    fake = Trace(good.lifs, good.logits - 7)
    first = verify(network, {'"""; import os': lambda _: good, "{x}\\": lambda _: fake}, pixels).first
    assert first is not None
    artifact.save(network, tmp_path / "net.mdsnn")
    _, script = save_divergence(first, pixels, str(tmp_path / "net.mdsnn"), tmp_path)
    done = without_numba(script)
    assert done.returncode == 0, done.stderr
    assert f'{{x}}\\ {first.got} | """; import os {first.want}' in done.stdout
    assert f"reference has {first.want}" in done.stdout


def test_a_divergence_is_a_value():
    first = Divergence("a", "b", "lif", ("conv", "lif"), "h", 1, 2, (0, 0, 3), 5, 4)
    with pytest.raises(FrozenInstanceError):
        first.step = 3  # type: ignore[misc]
    assert str(first) == (
        "a parts from b at layer 'lif', step 1, h of sample 2 at (0, 0, 3): 5, where b has 4."
        " Between the layers that agree and this one: conv -> lif"
    )

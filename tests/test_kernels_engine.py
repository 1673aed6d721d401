"""The engine over the NumPy kernels: what goes in, what comes out, what is counted, and what it never touches."""

import logging
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from mdsnn.export import artifact
from mdsnn.kernels import engine, reference
from mdsnn.kernels.engine import Engine, Result, run, thread_count
from mdsnn.kernels.errors import ConfigError, InputError, MissingError
from mdsnn.kernels.network import Conv, IntegerNetwork, Lif, Linear, MaxPool, Readout, SumPool
from planted import assert_same_bits, assert_same_trace, network_cases, seeded_case


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("MDSNN_ENGINE", "MDSNN_THREADS", "MDSNN_ISA"):
        monkeypatch.delenv(name, raising=False)


def case(coding: str, seed: int = 0, **limits: Any) -> tuple[IntegerNetwork, np.ndarray]:
    """A planted network with at least two LIF nodes that fires."""
    limits = {"max_channels": 8, "max_timesteps": 4, "samples": 5, **limits}
    while True:
        network, pixels = seeded_case(seed, events=coding == "events", **limits)
        if len(network.lifs) > 1 and network.timesteps > 1:
            activity = run(network, pixels, kernels="reference", threads=1).activity
            if all(0 < activity.density(lif.name) < 1 for lif in network.lifs):
                return network, pixels
        seed += 1


CODINGS = ["image", "events"]


def assert_same_result(got: Result, want: Result) -> None:
    assert_same_bits(got.logits, want.logits, "logits")
    assert_same_bits(got.predictions, want.predictions, "predictions")
    assert (got.activity.samples, got.activity.neurons) == (want.activity.samples, want.activity.neurons)
    for which in ("spikes_in", "spikes_out"):
        got_counts, want_counts = getattr(got.activity, which), getattr(want.activity, which)
        assert list(got_counts) == list(want_counts)
        for name, counts in want_counts.items():
            assert_same_bits(got_counts[name], counts, f"{which} of {name}")
    assert (got.trace is None) == (want.trace is None)
    if want.trace is not None:
        assert_same_trace(got.trace, want.trace)


# --------------------------------------------------------------------------------------------- the whole, by hand


def slow_run(network: IntegerNetwork, pixels: np.ndarray) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """One sample at a time and one step after another, by the definition: logits, and spikes of each LIF and step."""
    logits, spikes = [], {lif.name: [[0] for _ in range(network.timesteps)] for lif in network.lifs}
    for n in range(pixels.shape[-4]):
        q: dict[str, Any] = {}
        total: Any = 0
        for t in range(network.timesteps):
            frame = (pixels if pixels.ndim == 4 else pixels[t])[n : n + 1]
            values: dict[str, Any] = {}
            for node in network.nodes:
                x = values[node.inputs[0]] if node.inputs else None
                match type(node).__name__, node:
                    case "InputTable", _:
                        y = reference.input_table(frame, node.table)
                    case "Conv", Conv():
                        y = reference.conv2d(x, node.weight, node.stride, node.padding, node.groups)
                    case "Linear", Linear():
                        y = reference.linear(x, node.weight)
                    case "BnAffine", _:
                        y = reference.bn_affine(x, node.multiplier, node.offset, node.shift, network.grid.saturation)
                    case "BnDense", _:
                        y = reference.bn_dense(x, node.table, *network.proof.channel_bounds[node.source])
                    case "Add", _:
                        y = x + values[node.other]
                    case "Requantize", _:
                        y = reference.requantize(x, node.shift, node.bits)
                    case "MaxPool", MaxPool():
                        y = reference.max_pool(x, node.kernel, node.stride, node.padding)
                    case "SumPool", SumPool():
                        y = reference.sum_pool(x, node.kernel_height, node.kernel_width, node.stride, node.padding)
                    case "Flatten", _:
                        y = x.reshape(1, -1, 1, 1)
                    case "Lif", Lif():
                        before = q.get(node.name, np.zeros_like(x))
                        options = node.bits, node.v_th, node.reset, node.v_soft, node.quantize, node.q_th
                        _, y, q[node.name] = reference.lif_step(x, before, node.decode, node.thresholds, *options)
                        spikes[node.name][t][0] += int(y.sum())
                    case "Readout", Readout():
                        total = total + x
                        y = reference.readout(total, node.weight, node.bias)
                    case kind, _:
                        raise AssertionError(kind)
                values[node.name] = y
        logits.append(y[0].tolist())
    return logits, spikes


@given(network_cases(max_channels=8, max_timesteps=4))
@settings(max_examples=40, deadline=None)
def test_run_is_the_definition_sample_by_sample_and_step_by_step(case):
    network, pixels = case
    result = run(network, pixels, kernels="reference", threads=1)
    logits, spikes = slow_run(network, pixels)
    assert result.logits.tolist() == logits
    assert {name: counts.tolist() for name, counts in result.activity.spikes_out.items()} == {
        name: [count for (count,) in counts] for name, counts in spikes.items()
    }


@given(network_cases(max_channels=8, max_timesteps=4))
@settings(max_examples=30, deadline=None)
def test_activity_counts_are_those_of_the_trace(case):
    network, pixels = case
    result = run(network, pixels, kernels="reference", trace=True, threads=1)
    activity, trace = result.activity, result.trace
    assert trace is not None
    assert activity.samples == pixels.shape[-4]
    for lif in network.lifs:
        s = trace.lifs[lif.name].s
        assert activity.spikes_out[lif.name].tolist() == s.sum(axis=(1, 2, 3, 4), dtype=int).tolist()
        assert activity.neurons[lif.name] == int(np.prod(s.shape[2:]))
        assert activity.density(lif.name) == s.mean()
        for node in network.nodes:  # who reads a LIF at once reads its spikes
            if isinstance(node, Conv | Linear | Readout) and node.source == lif.name:
                assert activity.spikes_in[node.name].tolist() == activity.spikes_out[lif.name].tolist()
    readers = [node.name for node in network.nodes if isinstance(node, Conv | Linear | Readout)]
    assert list(activity.spikes_in) == readers
    for counts in (*activity.spikes_in.values(), *activity.spikes_out.values()):
        assert counts.dtype == np.int64
        assert counts.shape == (network.timesteps,)


def test_a_trace_has_the_shapes_and_dtypes_it_says():
    network, pixels = case("image")
    result = run(network, pixels, kernels="reference", trace=True)
    assert result.trace is not None
    for name, lif in result.trace.lifs.items():
        shape = (network.timesteps, 5, *network.proof.shapes[name])
        assert (lif.h.dtype, lif.s.dtype, lif.q.dtype) == (np.int32, np.uint8, np.int8)
        assert lif.h.shape == lif.s.shape == lif.q.shape == shape
    assert result.logits.dtype == np.int32
    assert result.logits.shape == (5, network.classes)
    assert run(network, pixels, kernels="reference").trace is None


@pytest.mark.parametrize("coding", CODINGS)
def test_what_is_the_same_at_every_step_is_computed_once(monkeypatch, coding):
    network, pixels = case(coding)
    calls: list[np.ndarray] = []
    real = reference.conv2d

    def count(x: Any, weight: Any, *options: Any) -> Any:
        calls.append(weight)
        return real(x, weight, *options)

    monkeypatch.setattr(reference, "conv2d", count)
    run(network, pixels, kernels="reference", threads=1)
    for node in network.nodes:
        if isinstance(node, Conv):
            once = 1 if network.proof.static[node.name] else network.timesteps
            assert sum(weight is node.weight for weight in calls) == once
    assert calls


def test_ties_of_logits_go_to_the_lowest_class():
    activity = engine.Activity(3, {}, {}, {})
    logits = np.array([[5, 5, 5], [1, 7, 7], [-3, -9, -3]], np.int32)
    assert Result(logits, activity).predictions.tolist() == [0, 1, 0]
    network, pixels = case("image")
    readout = network.readout
    same = replace(
        readout, weight=np.repeat(readout.weight[:1], network.classes, 0), bias=np.zeros(network.classes, int)
    )
    network = replace(network, nodes=(*network.nodes[:-1], same))
    assert run(network, pixels, kernels="reference").predictions.tolist() == [0] * 5


# -------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize("coding", CODINGS)
def test_any_memory_layout_gives_equal_results(coding):
    network, pixels = case(coding)
    want = run(network, pixels, kernels="reference", trace=True)
    wide = np.zeros((*pixels.shape[:-1], 2 * pixels.shape[-1]), np.uint8)
    wide[..., ::2] = pixels
    backwards = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]
    axes = tuple(range(pixels.ndim))[::-1]
    transposed = np.ascontiguousarray(pixels.transpose(axes)).transpose(axes)
    unaligned = np.frombuffer(b"x" + pixels.tobytes(), np.uint8, offset=1).reshape(pixels.shape)  # read-only too
    big_endian = pixels.astype(">u1")
    subclass = pixels.view(np.matrix) if pixels.ndim == 2 else np.ma.masked_array(pixels)
    for name, layout in {
        "fortran": np.asfortranarray(pixels), "strided": wide[..., ::2], "backwards": backwards,
        "transposed": transposed,
        "read-only": unaligned, "big-endian": big_endian, "masked": subclass,
    }.items():  # fmt: skip
        before = layout.tobytes()
        assert_same_result(run(network, layout, kernels="reference", trace=True), want)
        assert layout.tobytes() == before, f"{name}: the input was written to"


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.astype(np.int8), lambda p: p.astype(np.float32) / 255, lambda p: p > 3,
        lambda p: p.astype(np.int64),
        lambda p: p.astype(object), lambda p: p.tolist(), lambda p: p[..., :-1], lambda p: p[..., None], lambda p: p[0],
        lambda p: p[:0], lambda p: np.concatenate([p, p], axis=-3), lambda p: p.swapaxes(-4, -3), lambda p: None,
        lambda p: "pixels", lambda p: [[1], [1, 2]], lambda p: 7, lambda p: np.zeros((2**20, 0), np.uint8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("coding", CODINGS)
def test_pixels_that_do_not_fit_are_an_input_error_that_says_what_was_expected(coding, change):
    network, pixels = case(coding)
    with pytest.raises(InputError, match=r"uint8 \[.*\] was expected|no array"):
        Engine(network, "reference").run(change(pixels))


def test_events_of_other_timesteps_are_refused():
    network, pixels = case("events")
    with pytest.raises(InputError, match=r"have shape .* was expected"):
        run(network, pixels[:-1], kernels="reference")
    with pytest.raises(InputError, match=r"have shape .* was expected"):
        run(network, pixels[0], kernels="reference")


# ------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_of_t_steps_is_a_run(coding, seed):
    network, pixels = case(coding, 40 * seed)
    want = run(network, pixels, kernels="reference", trace=True)
    assert want.trace is not None
    stream = (
        Engine(network, "reference").stream(pixels)
        if coding == "image"
        else Engine(network, "reference").stream(samples=5)
    )
    for t in range(network.timesteps):
        step = stream.step() if coding == "image" else stream.step(pixels[t])
        assert stream.t == t + 1
        assert step.trace is not None
        for lif in network.lifs:
            for quantity in "hsq":
                got = getattr(step.trace.lifs[lif.name], quantity)
                assert_same_bits(
                    got, getattr(want.trace.lifs[lif.name], quantity)[t : t + 1], f"{quantity} of {lif.name}"
                )
            assert step.activity.spikes_out[lif.name].tolist() == want.activity.spikes_out[lif.name][t : t + 1].tolist()
    assert_same_bits(step.logits, want.logits, "logits")
    with pytest.raises(InputError, match=f"step {network.timesteps + 1} is beyond the network's {network.timesteps}"):
        stream.step()


def test_streams_keep_their_own_state_and_runs_keep_none():
    network, pixels = case("events")
    machine = Engine(network, "reference")
    want = machine.run(pixels)
    one, other = machine.stream(samples=5), machine.stream(samples=5)
    for t in range(network.timesteps):
        last = one.step(pixels[t])
        other.step(255 - pixels[t])
        machine.run(255 - pixels)
    assert_same_bits(last.logits, want.logits, "logits")
    assert_same_result(machine.run(pixels), want)


def test_a_stream_used_wrongly_is_an_input_error():
    network, pixels = case("image")
    with pytest.raises(InputError, match="needs the images at the start"):
        Engine(network, "reference").stream()
    with pytest.raises(InputError, match="leave the frame out"):
        Engine(network, "reference").stream(pixels).step(pixels)
    network, pixels = case("events")
    machine = Engine(network, "reference")
    with pytest.raises(InputError, match="takes its frames one by one"):
        machine.stream(pixels)
    for samples in (0, -1, True, 2.0):
        with pytest.raises(InputError, match="samples = "):
            machine.stream(samples=samples)  # type: ignore[arg-type]
    stream = machine.stream(samples=5)
    for frame in (None, pixels, pixels[0, :4], pixels[0].astype(float), [[1], [1, 2]]):
        with pytest.raises(InputError, match=r"frame is|no array"):
            stream.step(frame)
    assert stream.t == 0


# ------------------------------------------------------------------------------------------ threads, environment


@pytest.mark.parametrize("coding", CODINGS)
def test_results_do_not_depend_on_threads_or_chunks(monkeypatch, coding):
    network, pixels = case(coding, samples=7)
    want = run(network, pixels, kernels="reference", trace=True, threads=1)
    for threads in (2, 3, 8, 64):
        assert_same_result(run(network, pixels, kernels="reference", trace=True, threads=threads), want)
    monkeypatch.setattr(engine, "_CHUNK", 2)
    for threads in (1, 3):
        assert_same_result(run(network, pixels, kernels="reference", trace=True, threads=threads), want)
    alone = [run(network, pixels[..., n : n + 1, :, :, :], kernels="reference").logits for n in range(7)]
    assert_same_bits(np.concatenate(alone), want.logits, "logits of single samples")


def test_one_engine_serves_many_threads_at_once():
    network, pixels = case("image")
    machine = Engine(network, "reference", 2)
    want = machine.run(pixels)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            if not np.array_equal(machine.run(pixels).logits, want.logits):
                wrong.append("logits")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_number_of_threads(monkeypatch):
    assert thread_count(3) == 3
    assert thread_count() >= 1
    monkeypatch.setenv("MDSNN_THREADS", "5")
    assert thread_count() == 5
    assert thread_count(2) == 2
    monkeypatch.setenv("MDSNN_THREADS", "")
    assert thread_count() >= 1
    for bad in (0, -1, 1025, 2.0, True, "2"):
        with pytest.raises(ConfigError, match=r"outside 1\.\.1024"):
            thread_count(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["0", "-1", "two", "2.0", " 2", "1025", "9" * 5000, "00001" + "9" * 5000, "²", "٣", "1e3"]
)
def test_a_bad_number_of_threads_in_the_environment_is_a_config_error(monkeypatch, text):
    monkeypatch.setenv("MDSNN_THREADS", text)
    with pytest.raises(ConfigError, match=r"MDSNN_THREADS=.* is no number in 1\.\.1024"):
        thread_count()
    network, pixels = case("image")
    with pytest.raises(ConfigError):
        Engine(network, "reference")
    assert len(Engine(network, "reference", 1).run(pixels).logits) == 5


# ------------------------------------------------------------------------------------------- choosing an engine


@pytest.fixture
def there(monkeypatch):
    """Pretends that only some engines are there."""

    def only(*names: str) -> None:
        monkeypatch.setattr(engine, "missing", lambda name: None if name in names else f"{name} was not built")
        engine._fallback.cache_clear()

    yield only
    engine._fallback.cache_clear()


def test_the_fastest_engine_there_is_is_chosen(there):
    there("native", "numba", "reference")
    assert engine.choose() == "native"


@pytest.mark.parametrize(("names", "chosen"), [(("numba", "reference"), "numba"), (("reference",), "reference")])
def test_without_c_the_next_engine_takes_over_with_one_warning(there, caplog, names, chosen):
    there(*names)
    network, _ = case("image")
    with caplog.at_level(logging.WARNING):
        assert [engine.choose() for _ in range(5)] == [chosen] * 5
        if chosen == "reference":
            assert [Engine(network).kernels for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "native was not built" in message
    assert repr(chosen) in message
    assert "same integers" in message


def test_a_warning_is_given_only_where_c_is_missing(there, caplog):
    there("native", "reference")
    with caplog.at_level(logging.WARNING):
        engine.choose()
    assert caplog.records == []


def test_the_environment_chooses_and_its_mistakes_are_errors(there, monkeypatch, caplog):
    there("numba", "reference")
    monkeypatch.setenv("MDSNN_ENGINE", "reference")
    with caplog.at_level(logging.WARNING):
        assert engine.choose() == "reference"
    assert caplog.records == [], "what was chosen needs no warning"
    monkeypatch.setenv("MDSNN_ENGINE", "native")
    with pytest.raises(MissingError, match="MDSNN_ENGINE=native: native was not built") as caught:
        engine.choose()
    assert caught.value.exit_code == 3
    for text in ("cuda", "Reference", "reference ", "0"):
        monkeypatch.setenv("MDSNN_ENGINE", text)
        with pytest.raises(ConfigError, match="is none of native, numba, reference"):
            engine.choose()
    monkeypatch.setenv("MDSNN_ENGINE", "")
    assert engine.choose() == "numba"


def test_an_engine_asked_for_by_name_that_is_not_there_is_an_error(there):
    network, _ = case("image")
    there("reference")
    for name in ("native", "numba"):
        with pytest.raises(MissingError, match=f"engine {name!r}: {name} was not built"):
            Engine(network, name)


def test_an_unknown_engine_is_an_error_that_lists_the_engines():
    network, _ = case("image")
    with pytest.raises(MissingError, match=r"'cuda': unknown: the engines are native, numba, reference"):
        Engine(network, "cuda")


def test_a_numba_that_does_not_import_is_missing_with_its_cure(monkeypatch):
    broken = types.ModuleType("numba")
    monkeypatch.setitem(sys.modules, "numba", None)
    reason = engine.missing("numba")
    assert reason is not None
    assert "pip install numba" in reason
    monkeypatch.setitem(sys.modules, "numba", broken)
    assert engine.missing("numba") is None
    assert engine.missing("reference") is None


# ----------------------------------------------------------------------------- what the inference path never does


_PATH = """
import sys
events, opened = [], []
def hook(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] in ("torch", "onnx", "onnxruntime", "sklearn", "pickle"):
        events.append(f"import {arguments[0]}")
    if event in ("pickle.find_class", "marshal.loads", "exec", "subprocess.Popen", "os.system", "socket.connect"):
        events.append(event)
    if event == "open" and armed and type(arguments[0]) is not int:  # a descriptor was opened by a name before
        opened.append(str(arguments[0]))
armed = False
import numpy as np
from mdsnn.export import artifact
from mdsnn.kernels import Engine
pixels = np.load(sys.argv[2], allow_pickle=False)
import mdsnn.kernels.engine, mdsnn.kernels.reference, concurrent.futures.thread
sys.addaudithook(hook)
armed = True
network = artifact.load(sys.argv[1])
result = Engine(network, "reference", 2).run(pixels, trace=True)
armed = False
print(sorted(set(opened)))
print(sorted(set(events)))
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "onnx", "onnxruntime", "sklearn", "numba"}))
print(result.logits.tolist(), {k: v.tolist() for k, v in result.activity.spikes_out.items()})
"""


def test_the_inference_path_imports_no_torch_unpickles_nothing_and_opens_only_the_artifact(tmp_path):
    network, pixels = case("image")
    path = tmp_path / "net.mdsnn"
    artifact.save(network, path)
    np.save(tmp_path / "pixels.npy", pixels)
    want = run(network, pixels, kernels="reference")
    counts = {name: count.tolist() for name, count in want.activity.spikes_out.items()}
    for variables in (
        {"LC_ALL": "C", "MDSNN_ENGINE": "native", "LANG": "tr_TR.UTF-8"},
        {
            "LC_ALL": "de_DE.UTF-8",
            "PYTHONHASHSEED": "7",
            "OMP_NUM_THREADS": "3",
            "MDSNN_THREADS": "7",
            "PYTHONUTF8": "0",
        },
        {"MDSNN_ISA": "base", "PYTHONOPTIMIZE": "2", "TZ": "Asia/Kathmandu", "NPY_DISABLE_CPU_FEATURES": ""},
    ):
        done = subprocess.run(
            [sys.executable, "-c", _PATH, str(path), str(tmp_path / "pixels.npy")],
            env={**os.environ, **variables}, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        opened, events, modules, result = done.stdout.splitlines()
        assert opened == str([str(path)])
        assert events == "[]"
        assert modules == "[]"
        assert result == f"{want.logits.tolist()} {counts}"


def test_no_value_of_the_inference_path_is_a_float(monkeypatch):
    network, pixels = case("image")
    seen: list[np.dtype[Any]] = []

    def spy(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            seen.extend(
                array.dtype
                for array in (*arguments, *(result if isinstance(result, tuple) else (result,)))
                if isinstance(array, np.ndarray)
            )
            return result

        return call

    for name in (
        "input_table",
        "conv2d",
        "linear",
        "bn_affine",
        "bn_dense",
        "residual_add",
        "requantize",
        "lif_step",
        "readout",
    ):
        monkeypatch.setattr(reference, name, spy(getattr(reference, name)))
    run(network, pixels, kernels="reference", threads=1)
    assert len(seen) > 20
    assert {dtype.kind for dtype in seen} <= {"i", "u"}

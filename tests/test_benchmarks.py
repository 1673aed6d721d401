"""The benchmark's network, its checks and its tables; speed itself is not tested."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mdsnn.export import artifact
from mdsnn.kernels.engine import Engine, Trace
from mdsnn.kernels.errors import ConfigError, EnvironmentFault, InputError, MissingError
from mdsnn.layers import QuantBatchNorm2d

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def _module(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # as for a script there; a contender's process inherits it
    return importlib.import_module(name)


networks = _module("networks")
bench = _module("bench_engine")
comparators = _module("comparators")
report = _module("report")


# ----------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("density", [0.05, 0.17, 0.5])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_lif_layer_fires_at_the_wanted_density_on_images_it_was_not_calibrated_on(
    bits: int, density: float
) -> None:
    network = networks.integer_network(networks.SMALL, bits, density, seed=3)
    pixels = networks.random_images(8, networks.SMALL, np.random.default_rng(99))
    activity = Engine(network, "reference", 1).run(pixels).activity
    reached = {lif.name: activity.density(lif.name) for lif in network.lifs}
    assert len(reached) == 5
    assert {name: d for name, d in reached.items() if not 0.75 * density < d < 1.25 * density} == {}
    assert {lif.bits for lif in network.lifs} == {bits}


def test_a_seed_makes_one_network() -> None:
    first, again, other = (networks.integer_network(networks.SMALL, 4, 0.17, seed=seed, images=4) for seed in (1, 1, 2))
    assert artifact.to_bytes(first) == artifact.to_bytes(again)
    assert not np.array_equal(first["stem"].weight, other["stem"].weight)


def test_batch_norm_takes_the_statistics_of_the_calibration_images() -> None:
    pixels = networks.random_images(8, networks.SMALL, np.random.default_rng([7, 1]))
    network = networks.integer_network(networks.SMALL, 4, 0.17, seed=7, images=8)
    twin = networks.relu_twin(networks.float_twin(network, pixels), pixels)
    model, seen = twin.build(), []

    def measure(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        channels = inputs[0].double().transpose(0, 2).flatten(1)
        seen.append((layer, channels.mean(1), channels.var(1, correction=0)))

    layers = [layer for layer in model.modules() if isinstance(layer, QuantBatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(measure)
    with torch.no_grad():
        model(torch.from_numpy(pixels))
    assert len(seen) == len(layers) == 6
    for bn, mean, var in seen:
        torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-4, atol=1e-5)


def test_a_density_out_of_reach_is_refused_by_layer() -> None:
    with pytest.raises(ConfigError, match=r"^layer 'groups\.0\.0\.lif1': fires in [0-9.]+% .* where 99\.9% was wanted"):
        networks.integer_network(networks.SMALL, 4, 0.999, seed=0)
    with pytest.raises(ConfigError, match="density = 0"):
        networks.integer_network(networks.SMALL, 4, 0.0, seed=0)


def test_macs_are_the_products_of_a_dense_run() -> None:
    """Counted by hand for one block of 2 channels on 6x6, and a projecting one."""
    shape = networks.Shape((1, 1), (2, 3), size=6, timesteps=2, classes=4)
    network = networks.integer_network(shape, 4, 0.2, seed=0)
    stem = 3 * 9 * 2 * 36  # once: the same at every step
    shortcut = 2 * 3 * 9  # of the stream, which is not the same at every step
    assert network.macs == stem + 2 * (2 * (2 * 9 * 2 * 36) + 2 * 9 * 3 * 9 + 3 * 9 * 3 * 9 + shortcut)


@pytest.fixture(scope="module")
def workload() -> Any:
    return bench.make_workload(networks.SMALL, 4, 0.17, images=3, seed=0)


@pytest.fixture(scope="module")
def digits() -> Any:
    return bench.digits_workload(images=32, seed=0)


@pytest.mark.parametrize("which", ["workload", "digits"])
def test_the_float_twin_is_the_integer_network_but_for_rounded_membranes(
    which: str, request: pytest.FixtureRequest
) -> None:
    load = request.getfixturevalue(which)
    network = artifact.from_bytes(load.network)
    run = Engine(network, "reference", 1).run(load.pixels)
    pooled = network.timesteps * np.prod(network.proof.shapes["lif"][1:])
    found = networks.float_logits(load.twin, load.pixels)
    assert bench.correlation(found, run.logits) > 0.97
    assert abs(np.polyfit(run.logits.ravel() / pooled, found.ravel(), 1)[0] - 1) < 0.05
    if which == "digits":
        assert float((found.argmax(1) == run.predictions).mean()) > 0.9


def test_a_dense_bn_table_is_read_as_the_line_it_rounds() -> None:
    network = artifact.load("builtin:digits")
    node = network["groups.1.0.bn1"]
    lo, hi = network.proof.channel_bounds[node.source]
    slopes, intercepts = networks._line(network, node)
    rows = np.split(node.table, np.cumsum(hi - lo + 1)[:-1])
    for row, first, slope, intercept in zip(rows, lo, slopes, intercepts, strict=True):
        line = slope * (first + np.arange(len(row))) + intercept
        inside = np.abs(row) < network.grid.saturation
        assert np.abs(line - row)[inside].max() <= 1.5


@pytest.mark.parametrize("which", ["spikingjelly", "folded"])
def test_the_torch_comparators_run_the_float_twin(which: str, workload: Any) -> None:
    model = {"spikingjelly": networks.spikingjelly_twin, "folded": networks.Folded}[which](workload.twin)
    pixels = torch.from_numpy(workload.pixels)
    with torch.inference_mode():
        want, got, again = workload.twin.build()(pixels), model(pixels), model(pixels)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)  # floats: nearly the same sums, no spike flips here
    assert torch.equal(got, again)  # no state is left over
    assert float(want.std()) > 1.0


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("ort-fp32", 0.9999),
        ("ort-int8", 0.7),
        ("ann-ort-int8", 0.98),
        ("openvino-fp32", 0.9999),
        ("openvino-int8", 0.7),
        ("ann-openvino-int8", 0.98),
    ],
)
def test_a_graph_computes_its_twin(name: str, least: float, digits: Any) -> None:
    if "openvino" in name:
        pytest.importorskip("openvino", reason="openvino is a benchmark extra: pip install 'mdsnn[bench]'")
    contender = bench.CONTENDERS[name]
    runner = contender.make(contender.prepare(digits, (2, 16)), 1)
    want = networks.float_logits(digits.ann if contender.computes == "ann" else digits.twin, digits.pixels)
    assert bench.correlation(runner.logits(digits.pixels[:16]), want[:16]) > least
    np.testing.assert_allclose(runner.logits(digits.pixels[:2]), runner.logits(digits.pixels[:2].copy()))


def test_int8_graphs_multiply_codes_and_float_graphs_do_not(workload: Any) -> None:
    onnx = pytest.importorskip("onnx")
    for form, quantized in (("float32", False), ("openvino-int8", True), ("ort-int8", True)):
        graph = onnx.load_from_string(comparators.float_graph(workload.twin, 2, form)).graph
        makers = {node.output[0]: node.op_type for node in graph.node}
        kernels = {makers.get(node.input[1]) for node in graph.node if node.op_type == "Conv"}
        assert kernels == ({"DequantizeLinear"} if quantized else {None})
        stored = {t.data_type for t in graph.initializer if len(t.dims) == 4}
        assert stored == ({onnx.TensorProto.INT8} if quantized else {onnx.TensorProto.FLOAT})


# ---------------------------------------------------------------------------------------------------- measuring


class _InProcess:
    """A contender without a process; `flip` changes the least bit of one logit, `flip_h` of one membrane."""

    absent: tuple[str, ...] = ()
    flip = flip_h = ""
    replaced: ClassVar[dict[str, Any]] = {}
    timed = 0

    def __init__(self, name: str, workload: Any, batches: Any, threads: int) -> None:
        if name in self.absent:
            raise MissingError(f"{name} is not installed")
        contender, workload = bench.CONTENDERS[name], self.replaced.get(name, workload)
        self.name, self.runner = name, contender.make(contender.prepare(workload, batches), threads)

    def ask(self, order: str, *arguments: Any) -> Any:
        if order == "trace":
            trace = self.runner.trace(*arguments)
            if self.name == self.flip_h:
                lifs = copy.deepcopy(dict(trace.lifs))
                lifs["groups.1.0.lif1"].h[1, 0, 3, 2, 1] ^= 1
                return Trace(lifs, trace.logits)
            return trace
        if order == "logits":
            logits = self.runner.logits(*arguments)
            if self.name == self.flip and len(logits) > 1:
                logits[-1, -1] ^= 1
            return logits
        if order == "time":
            type(self).timed += 1
            return bench.clock(self.runner.logits, *arguments)
        return None

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[_InProcess]:
    class Fresh(_InProcess):
        pass

    monkeypatch.setattr(bench, "Process", Fresh)
    monkeypatch.setattr(bench, "PAUSE", 0.0)
    return Fresh


SETTINGS: dict[str, Any] = {"threads": (1,), "batches": (1, 3), "rounds": 3, "seconds": 0.0, "check": 1}


def test_every_contender_is_checked_and_then_timed_at_every_batch(in_process: type[_InProcess], workload: Any) -> None:
    left_out: dict[str, str] = {}
    names = ("reference", "ort-our-int", "pytorch")
    found = bench.measure(workload, bench.Settings(names, **SETTINGS), left_out)
    network = artifact.from_bytes(workload.network)
    states = sum(int(np.prod(network.proof.shapes[lif.name])) for lif in network.lifs) * network.timesteps
    assert found["check"]["agrees"]
    assert found["check"]["compared"] == 2 * (3 * states + network.classes)  # two integer contenders, h, s and q
    assert [(r["contender"], r["threads"], r["batch"]) for r in found["rows"]] == [
        (name, 1, batch) for batch in (1, 3) for name in names
    ]
    assert in_process.timed == 3 * 3 * 2
    assert all(len(row["visits_ms_per_image"]) == 3 and row["ms_per_image"] > 0 for row in found["rows"])
    assert left_out == {}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("wrong", ["flip", "flip_h"])
def test_one_wrong_bit_stops_the_benchmark_before_any_timing(
    in_process: type[_InProcess], workload: Any, wrong: str
) -> None:
    setattr(in_process, wrong, "ort-our-float")
    found = bench.measure(workload, bench.Settings(("reference", "ort-our-float"), **SETTINGS), {})
    assert not found["check"]["agrees"]
    assert found["rows"] == []
    assert in_process.timed == 0
    if wrong == "flip_h":
        assert found["check"]["differing"] == 1
        (fault,) = found["check"]["faults"]
        assert "'groups.1.0.lif1', step 1, h of sample 0 at (3, 2, 1)" in fault
    else:
        assert [(r["contender"], r["batch"]) for r in found["check"]["logits"] if not r["equal"]] == [
            ("ort-our-float", 3)
        ]


def test_a_missing_contender_is_left_out_unless_it_was_chosen(in_process: type[_InProcess], workload: Any) -> None:
    in_process.absent = ("numba",)
    left_out: dict[str, str] = {}
    found = bench.measure(workload, bench.Settings(("reference", "numba"), **SETTINGS), left_out)
    assert {row["contender"] for row in found["rows"]} == {"reference"}
    assert left_out == {"numba": "numba is not installed"}
    with pytest.raises(MissingError, match="numba is not installed"):
        bench.measure(workload, bench.Settings(("reference", "numba"), True, **SETTINGS), {})


def test_a_contender_whose_instructions_are_not_there_is_left_out(
    in_process: type[_InProcess], workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "processor_flags", list)
    left_out: dict[str, str] = {}
    bench.measure(workload, bench.Settings(("reference", "openvino-int8-avx2"), **SETTINGS), left_out)
    assert left_out == {"openvino-int8-avx2": "the processor has no avx2"}


def test_a_missing_openvino_is_left_out_with_the_line_that_installs_it(
    in_process: type[_InProcess], workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    left_out: dict[str, str] = {}
    bench.measure(workload, bench.Settings(("reference", "openvino-int8"), **SETTINGS), left_out)
    assert left_out == {"openvino-int8": "openvino is not installed: pip install 'mdsnn[bench]'"}


def test_a_comparator_that_computes_another_network_stops_the_benchmark(
    in_process: type[_InProcess], workload: Any
) -> None:
    other = bench.make_workload(networks.SMALL, 4, 0.5, images=3, seed=1)
    in_process.replaced = {"ort-fp32": other}
    found = bench.measure(workload, bench.Settings(("reference", "ort-fp32"), **SETTINGS), {})
    (row, *_) = [row for row in found["check"]["logits"] if row["contender"] == "ort-fp32"]
    assert not row["equal"]
    assert row["correlation"] < 0.98
    assert found["rows"] == []


def test_ratios_are_of_medians_and_of_the_workload_they_name() -> None:
    def rows(**ms: float) -> list[dict[str, Any]]:
        named = {name.replace("_", "-"): value for name, value in ms.items()}
        row = {"threads": 1, "batch": 1}
        return [
            {**row, "contender": name, "ms_per_image": value, "min_ms_per_image": value - 0.5}
            for name, value in named.items()
        ]

    w4 = {"weight_bits": 4, "density_wanted": 0.17, "rows": rows(amx=2.0, openvino_int8=3.0, avx2=5.0)}
    w8 = {"weight_bits": 8, "density_wanted": 0.17, "rows": rows(amx=2.0, openvino_int8=4.5)}
    sparse = {"weight_bits": 4, "density_wanted": 0.05, "rows": rows(amx=1.0, openvino_int8=9.0)}
    found = bench.ratios([w4, w8, sparse])
    assert [(r["title"], r["measured"]) for r in found] == [
        ("AMX, against OpenVINO int8", 1.5),
        ("W8U8, AMX, against OpenVINO int8", 2.25),
    ]
    assert [r["least"] for r in found] == [2.5 / 1.5, 4 / 1.5]
    assert (found[0]["floor"], found[0]["target"], found[0]["moonshot"]) == (2.2, 2.7, 3.5)


def test_the_full_plan_times_every_row_that_a_goal_needs() -> None:
    tasks = bench.full_plan(networks.SMALL, bench.Settings())
    assert len(tasks) == 7
    main, eight = tasks[0][1], tasks[1][1]
    for goal in bench.GOALS:
        settings = main if goal.bits == 4 else eight
        assert {goal.ours, goal.theirs} <= set(settings.contenders)
        assert goal.threads in settings.threads
        assert goal.batch in settings.batches


def test_an_unknown_contender_is_refused() -> None:
    with pytest.raises(ConfigError, match="contender 'tensorrt' is none of native, amx"):
        bench.benchmark(bench.plan(networks.SMALL, bench.Settings(("tensorrt",)), [4], [0.17]))


def test_a_contender_that_fails_or_dies_is_named(workload: Any) -> None:
    process = bench.Process("reference", workload, (1,), 1)
    try:
        with pytest.raises(InputError, match="uint8"):
            process.ask("logits", np.zeros((1, 3, 12, 12), np.float32))
        with pytest.raises(EnvironmentFault, match="contender 'reference': KeyError"):
            process.ask("sing")
        assert process.ask("logits", np.zeros((2, 3, 12, 12), np.uint8)).shape == (2, 10)
        process._process.kill()
        with pytest.raises(EnvironmentFault, match="contender 'reference': its process died"):
            process.ask("peak")
    finally:
        process.close()


def test_a_visit_warms_up_unless_one_call_is_long() -> None:
    calls: list[int] = []

    def run(pixels: Any) -> Any:
        calls.append(1)
        return pixels

    assert 0 < bench.clock(run, np.zeros(1, np.uint8), 0.005) < 0.005
    assert len(calls) > 2
    calls.clear()
    bench.clock(run, np.zeros(1, np.uint8), 0.0)
    assert len(calls) == 1


def test_a_summary_is_median_minimum_and_range() -> None:
    found = bench.summary([4.0, 2.0, 3.0])
    assert found["ms_per_image"] == 3.0
    assert found["min_ms_per_image"] == 2.0
    assert found["spread_percent"] == pytest.approx(200 / 3)
    assert found["images_per_s"] == pytest.approx(1000 / 3)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script itself, with real processes, as a user runs it."""
    path: Path = tmp_path_factory.mktemp("bench") / "results" / "engine.json"
    contenders = "reference,ort-int8,spikingjelly"
    options = ["--quick", "--threads", "1", "--batch", "1,2", "--contenders", contenders, "--json", str(path)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "bench_engine.py"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 differ" in done.stdout
    assert "[####################] 2/2" in done.stderr
    assert "[###" not in done.stdout
    return path


def test_the_script_measures_and_its_result_becomes_a_table(quick: Path) -> None:
    document = json.loads(quick.read_text())
    assert document["agrees"] is True
    assert {"processor_flags", "versions", "commit", "machine", "date"} <= set(document)
    assert {(r["contender"], r["batch"]) for r in document["workloads"][0]["rows"]} == {
        (name, batch) for name in ("reference", "ort-int8", "spikingjelly") for batch in (1, 2)
    }
    with pytest.raises(InputError, match="--quick run"):
        report.engine_tables(document)
    text = report.engine_tables({**document, "quick": False, "rounds": 3})
    assert text.count("\n| ") == 5  # head, rule and three contenders
    assert "| SpikingJelly float32, multi-step | float32 |" in text
    assert "correlates with the twin's" in text


# ------------------------------------------------------------------------------------------------------- report


def _result(**changes: Any) -> dict[str, Any]:
    row = {"contender": "native", "threads": 1, "batch": 1, "ms_per_image": 1.2345, "spread_percent": 4.4}
    slow = {"contender": "pytorch", "threads": 1, "batch": 1, "ms_per_image": 41.27, "spread_percent": 10.0}
    return {
        "schema": report.ENGINE_SCHEMA,
        "quick": False,
        "agrees": True,
        "date": "2030-01-02",
        "commit": "0123456789abcdef+changes",
        "machine": {"processor": "A | B", "cores": "2", "memory": "8.0 GiB"},
        "processor_flags": ["avx2"],
        "environment": {},
        "versions": {"python": "3.11.7", "mdsnn": "0.1.0"},
        "rounds": 9,
        "ratios": [{"title": "A | B", "measured": 1.256, "least": 1.3, "floor": 2.2, "target": 2.7, "moonshot": 3.5}],
        "contenders": {
            "native": {"title": "mdsnn, C", "computes": "integers"},
            "pytorch": {"title": "PyTorch | eager", "computes": "float32"},
        },
        "left_out": {"numba": "not installed"},
        "workloads": [
            {
                "name": "MS-ResNet-18",
                "macs": 2216361984,
                "layers": [{"layer": "a", "density": 0.171}, {"layer": "b", "density": 0.155}],
                "check": {"compared": 12345, "differing": 0},
                "rows": [
                    {**row, "peak_rss_bytes": 40 << 20},
                    {**row, "batch": 16, "threads": 2, "ms_per_image": 123.4, "peak_rss_bytes": 41 << 20},
                    {**slow, "peak_rss_bytes": None},
                    {**slow, "batch": 16, "threads": 2, "ms_per_image": 9.0, "peak_rss_bytes": None},
                ],
            }
        ],
        **changes,
    }


def test_the_engine_table_shows_what_was_measured() -> None:
    head, _, rest = report.engine_tables(_result()).partition("\n\n**")
    ratios, _, note = head.partition("\n\n")
    assert note.startswith("Measured: ")
    assert ratios.splitlines() == [
        "| times faster (batch 1 on one thread if not said) | measured | least visits | floor | target | moonshot |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| A \\| B | **1.26** | 1.30 | 2.2 | 2.7 | 3.5 |",
    ]
    lines = f"**{rest}".splitlines()
    assert lines[0].startswith("**MS-ResNet-18** (2.216 G dense-equivalent MACs an image).")
    assert lines[2:6] == [
        "|  | computes | batch 1, 1 thread | batch 16, 2 threads | MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| mdsnn, C | integers | 1.23 (4%) | 123 (4%) | 41 |",
        "| PyTorch \\| eager | float32 | 41.3 (10%) | 9.00 (10%) | ? |",
    ]
    assert "15.5 to 17.1 %" in lines[7]
    assert "12,345 integers" in lines[7]
    assert "commit `0123456789ab+changes`" in lines[9]
    assert lines[-1] == "Left out: numba: not installed."


def test_workloads_timed_in_one_way_only_share_a_table() -> None:
    first = _result()["workloads"][0]
    alone = {**first, "rows": first["rows"][:1]}
    other = {**alone, "name": "MS-ResNet-18, W8U8", "rows": [{**alone["rows"][0], "ms_per_image": 2.5}]}
    text = report.engine_tables(_result(workloads=[first, alone, other]))
    assert "| batch 1, 1 thread | MS-ResNet-18 | MS-ResNet-18, W8U8 |" in text
    assert "| mdsnn, C | 1.23 (4%) | 2.50 (4%) |" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "mdsnn.bench/1"}, "schema 'mdsnn.bench/1' is not"),
        ({"agrees": False}, "integers differed"),
        ({"quick": True}, "--quick run"),
        ({"rounds": 2}, "it has 2 rounds, of which no median"),
        ({"workloads": None}, "lacks or misuses"),
        ({"machine": {}}, "lacks or misuses 'processor'"),
    ],
)
def test_a_result_that_is_none_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        report.engine_tables(_result(**changes))


def test_only_what_stands_between_the_markers_changes() -> None:
    text = "a\n<!-- demo -->\nold\n<!-- /demo -->\nz <!-- other -->\n"
    new = report.replace_between(text, "demo", "new\nlines")
    assert new == "a\n<!-- demo -->\nnew\nlines\n<!-- /demo -->\nz <!-- other -->\n"
    assert report.replace_between(new, "demo", "new\nlines") == new


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- demo -->",
        "<!-- /demo -->",
        "<!-- /demo --> <!-- demo -->",
        "<!-- demo --> <!-- demo --> <!-- /demo -->",
        "<!-- demo --> <!-- /demo --> <!-- /demo -->",
    ],
)
def test_missing_doubled_or_swapped_markers_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must each stand once, in this order"):
        report.replace_between(text, "demo", "body")


def test_the_demo_table_takes_rows_with_and_without_a_head() -> None:
    headed = report.demo_table({"table": {"headers": ["what", "of", "value"], "rows": [["accuracy", "teacher", 0.95]]}})
    assert headed == "| what | of | value |\n| --- | ---: | ---: |\n| accuracy | teacher | 0.95 |"
    plain = report.demo_table({"table": [["accuracy", 1, 2], ["size\nof", "a|b"]]})
    assert plain.splitlines()[2:] == ["| accuracy | 1 | 2 |", "| size of | a\\|b |  |"]


@pytest.mark.parametrize(
    "table",
    [None, [], "text", [1, 2], {"headers": ["a"]}, {"headers": ["a"], "rows": []}, {"headers": [], "rows": [[]]}, [[]]],
)
def test_a_demo_without_a_table_is_refused(table: Any) -> None:
    with pytest.raises(InputError, match="'table' is missing or empty"):
        report.demo_table({"table": table})


def test_a_ragged_row_under_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="has 1 cells, its head 2"):
        report.demo_table({"table": {"headers": ["a", "b"], "rows": [["x"]]}})


def test_the_report_writes_checks_and_refuses(tmp_path: Path) -> None:
    readme, engine, demo = tmp_path / "README.md", tmp_path / "engine.json", tmp_path / "summary.json"
    empty = "# T\n<!-- bench:engine -->\n<!-- /bench:engine -->\n<!-- demo -->\n<!-- /demo -->\nend\n"
    readme.write_text(empty)
    engine.write_text(json.dumps(_result()))
    demo.write_text(json.dumps({"table": [["accuracy", 0.5]]}))
    words = ["--engine", str(engine), "--demo", str(demo), "--readme", str(readme)]

    def run(*more: str) -> Any:
        return CliRunner().invoke(report.main, [*words, *more])

    assert run("--check").exit_code == 1
    assert readme.read_text() == empty
    assert run().exit_code == 0
    written = readme.read_text()
    assert "| accuracy | 0.5 |" in written
    assert "| mdsnn, C | integers |" in written
    assert written.endswith("<!-- /demo -->\nend\n")
    assert run("--check").exit_code == 0
    assert run().exit_code == 0
    assert readme.read_text() == written
    readme.write_text("no markers")
    assert isinstance(run().exception, ConfigError)
    assert str(readme) in str(run().exception)
    engine.write_text("{")
    assert isinstance(run().exception, InputError)
    assert readme.read_text() == "no markers"
    assert CliRunner().invoke(report.main, ["--readme", str(readme)]).exit_code == 2

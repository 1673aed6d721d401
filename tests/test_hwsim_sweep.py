"""Sweeps: axes, the grid, the Pareto front, files of points, resuming, processes, a Dask cluster losing a worker."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdsnn.export import artifact
from mdsnn.hwsim import processes
from mdsnn.hwsim import sweep as sweeping
from mdsnn.hwsim.activity import load_of, measure, uniform
from mdsnn.hwsim.config import load_chip
from mdsnn.hwsim.cost import physical_cost, prepare
from mdsnn.hwsim.crossbar import analog_accuracy
from mdsnn.hwsim.mapping import from_network, ms_resnet
from mdsnn.hwsim.processes import run_tasks
from mdsnn.hwsim.sweep import (
    METRICS,
    Analog,
    PointFile,
    columns,
    measured_loads,
    pareto,
    parse_axis,
    read_points,
    sweep,
    sweep_csv,
    to_json_lines,
    uniform_loads,
    write_points,
)
from mdsnn.kernels.errors import ConfigError, EnvironmentFault, InputError, StorageError
from planted import seeded_case
from tasks import die, fail, nap

CHIP = load_chip("fefet32")
WORKLOAD = ms_resnet(18, (2, 16, 16), 2)
AXES: dict[str, Any] = {"rows": (32, 64), "adc-bits": (4, 8), "scheme": ("kernel-split", "im2col")}


def test_axes_from_text() -> None:
    assert parse_axis("rows", "32, 64,128,64") == (32, 64, 128)
    assert parse_axis("adc-bits", "4..6,9") == (4, 5, 6, 9)
    assert parse_axis("scheme", "im2col") == ("im2col",)
    for name, text in (("row", "1"), ("rows", ""), ("rows", "1.5"), ("rows", "-4"), ("adc-bits", "4..13"),
                       ("adc-bits", "9..4"), ("scheme", "zigzag"), ("rows", "0"), ("rows", "1..9999999")):  # fmt: skip
        with pytest.raises(ConfigError, match="sweep axis"):
            parse_axis(name, text)


def test_every_point_is_what_the_model_says() -> None:
    rows = sweep(WORKLOAD, CHIP, AXES, uniform_loads(WORKLOAD, 0.1))
    assert len(rows) == 8
    for row in rows:
        n = row["rows"]
        chip = CHIP.replaced(
            {"crossbar.rows": n, "crossbar.columns": n, "adc.bits": row["adc-bits"], "mapping.scheme": row["scheme"]}
        )
        load = uniform(WORKLOAD, 0.1, rows=n, scheme=row["scheme"])
        totals = physical_cost(prepare(WORKLOAD, load, chip), chip).totals
        assert (row["energy_uJ"], row["EDAP_mJ_ms_mm2"]) == (totals.energy * 1e6, totals.edap)
    assert any(row["pareto"] for row in rows)


def test_columns_apart_from_rows_and_impossible_points() -> None:
    rows = sweep(WORKLOAD, CHIP, {"rows": (32,), "columns": (64, 12)}, uniform_loads(WORKLOAD, 0.1))
    assert rows[0]["error"] is None
    assert "does not divide the 12 columns" in rows[1]["error"]
    assert rows[1]["energy_uJ"] is None
    assert rows[1]["pareto"] is False
    tiny = CHIP.replaced({"tile.limit": 1})
    assert "tile.limit" in sweep(WORKLOAD, tiny, {"rows": (64,)}, uniform_loads(WORKLOAD, 0.1))[0]["error"]


def test_a_sweep_resumes_and_processes_change_nothing() -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    whole = sweep(WORKLOAD, CHIP, AXES, loads)
    done = [json.loads(line) for line in to_json_lines(whole[:5]).splitlines()]
    done[0]["energy_uJ"] = -1.0  # kept as it is, so it was not computed again
    seen: list[tuple[int, int]] = []
    rest = sweep(WORKLOAD, CHIP, AXES, loads, done=done, progress=lambda at, of: seen.append((at, of)))
    assert seen == [(5, 8), (7, 8), (8, 8)]  # a task for each crossbar
    assert rest[0]["energy_uJ"] == -1.0
    assert [{**row, "pareto": None} for row in rest[1:]] == [{**row, "pareto": None} for row in whole[1:]]
    assert sweep(WORKLOAD, CHIP, AXES, loads, jobs=2) == whole


def test_a_measured_sweep_counts_for_each_crossbar() -> None:
    network, pixels = seeded_case(3, max_channels=16, max_timesteps=3)
    workload = from_network(network)
    rows = sweep(workload, CHIP, {"rows": (8, 64)}, measured_loads(network, workload, pixels, "planted"))
    chip = CHIP.replaced({"crossbar.rows": 8, "crossbar.columns": 8})
    load = load_of(measure(network, pixels, rows=8), workload)
    assert rows[0]["energy_uJ"] == physical_cost(prepare(workload, load, chip), chip).totals.energy * 1e6


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=25))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, int]]) -> None:
    rows = [{**dict(zip(METRICS, point, strict=True)), "error": None} for point in points]
    array = np.array(points).reshape(-1, 3)
    want = [at for at, p in enumerate(array) if not ((array <= p).all(axis=1) & (array < p).any(axis=1)).any()]
    assert pareto(rows) == want


def test_refusals_and_tables() -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    for axes in ({}, {"rows": ()}):
        with pytest.raises(ConfigError, match="empty"):
            sweep(WORKLOAD, CHIP, axes, loads)
    with pytest.raises(ConfigError, match="none of"):
        sweep(WORKLOAD, CHIP, {"colour": (1,)}, loads)
    with pytest.raises(ConfigError, match="over the limit"):
        sweep(WORKLOAD, CHIP, {"rows": range(1, 400), "columns": range(1, 400)}, loads)
    with pytest.raises(ConfigError, match="density"):
        uniform_loads(WORKLOAD, 2.0)
    rows = sweep(WORKLOAD, CHIP, {"adc-bits": (4, 5)}, loads)
    read = list(csv.DictReader(io.StringIO(sweep_csv(rows))))
    assert [float(row["energy_uJ"]) for row in read] == [row["energy_uJ"] for row in rows]


# ----------------------------------------------------------------------------------------------- files of points


ENDINGS = pytest.mark.parametrize("ending", [".csv", ".jsonl"])
BIG = CHIP.replaced({"tile.limit": 60})


@ENDINGS
def test_points_come_back_from_their_file_as_they_were(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"points{ending}"
    rows = sweep(ms_resnet(18, (2, 48, 48), 2), BIG, AXES, uniform_loads(ms_resnet(18, (2, 48, 48), 2), 0.1))
    assert {row["error"] is None for row in rows} == {True, False}
    write_points(path, rows)
    assert read_points(path, AXES) == rows
    assert [type(value) for value in read_points(path, AXES)[-1].values()] == [type(v) for v in rows[-1].values()]
    write_points(path, [{**row, "pareto": None} for row in rows], force=True)  # as while a sweep runs
    assert read_points(path, AXES)[0]["pareto"] is None


@ENDINGS
def test_a_damaged_file_of_points_is_refused_by_line(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"points{ending}"
    rows = sweep(WORKLOAD, CHIP, AXES, uniform_loads(WORKLOAD, 0.1))
    head = 1 if ending == ".csv" else 0
    for change, what in (
        ({"rows": 48}, "rows = 48 is no value of this sweep"),
        ({"rows": 32.0}, "rows = "),
        ({"scheme": "im3col"}, "scheme = 'im3col'"),
        ({"energy_uJ": -1.0}, "energy_uJ = -1.0 is no result"),
        ({"energy_uJ": None}, "energy_uJ = None is no result"),
        ({"energy_uJ": "x"}, ""),
        ({"tiles": "many"}, "tiles = 'many'"),
        ({"error": "why"}, "is no result"),
        ({"pareto": "perhaps"}, "pareto"),
        ({"basis": None}, "basis"),
    ):
        write_points(path, [rows[0], {**rows[1], **change}], force=True)
        with pytest.raises(InputError, match=f"points{ending}: line {2 + head}: .*{what}"):
            read_points(path, AXES)
    write_points(path, [rows[0], rows[1], rows[0]], force=True)
    with pytest.raises(InputError, match=f"line {3 + head}: is the point of line {1 + head} again"):
        read_points(path, AXES)
    write_points(path, rows, force=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=f"line {8 + head}"):
        read_points(path, AXES)
    path.write_bytes(whole + b"\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_points(path, AXES)
    path.write_bytes(whole)
    for axes in ({"rows": (32, 64)}, {**AXES, "pes": (8,)}):
        with pytest.raises(InputError, match="this sweep"):
            read_points(path, axes)
    with pytest.raises(InputError, match="this sweep"):
        read_points(path, AXES, analog=True)


def test_a_point_file_keeps_replaces_and_resumes(tmp_path: Path) -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    whole = sweep(WORKLOAD, CHIP, AXES, loads)
    path = tmp_path / "points.jsonl"
    file = PointFile(path, AXES, resume=True, seconds=0.0)  # nothing to resume: a new file
    assert file.done == []
    file.save()
    assert not path.exists()
    file.keep(whole[:3])
    assert [row["energy_uJ"] for row in read_points(path, AXES)] == [row["energy_uJ"] for row in whole[:3]]
    file.keep(whole[3:5])
    assert file.count == 5
    with pytest.raises(StorageError, match="exists and is kept"):
        PointFile(path, AXES)
    again = PointFile(path, AXES, resume=True)
    rows = sweep(WORKLOAD, CHIP, AXES, loads, done=again.done, keep=again.keep)
    again.finish(rows)
    assert read_points(path, AXES) == whole
    slow = PointFile(path, AXES, force=True, seconds=1000.0)
    slow.keep(whole[:1])
    assert len(read_points(path, AXES)) == 8  # not yet
    slow.save()
    assert len(read_points(path, AXES)) == 1
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        PointFile(tmp_path / "points.xls", AXES)


@ENDINGS
def test_an_interrupt_in_a_write_leaves_a_file_that_can_be_written_again(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sweep(WORKLOAD, CHIP, AXES, uniform_loads(WORKLOAD, 0.1))
    write = sweeping.write_text
    for late in (False, True):
        path = tmp_path / f"{late}{ending}"
        file = PointFile(path, AXES, seconds=1000.0)
        file.keep(rows[:2])

        def interrupted(*arguments: Any, late: bool = late, **keywords: Any) -> None:
            if late:
                write(*arguments, **keywords)
            raise KeyboardInterrupt

        monkeypatch.setattr(sweeping, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.save()
        monkeypatch.setattr(sweeping, "write_text", write)
        assert path.exists() == late
        file.keep(rows[2:3])
        file.save()
        assert len(read_points(path, AXES)) == 3
    other = PointFile(tmp_path / f"other{ending}", AXES, seconds=1000.0)
    other.keep(rows[:2])
    (tmp_path / f"other{ending}").write_text("of somebody else, made meanwhile")
    for _ in range(2):
        with pytest.raises(StorageError, match="exists and is kept"):
            other.save()


def test_points_of_another_sweep_are_not_taken() -> None:
    loads = uniform_loads(WORKLOAD, 0.1)
    done = sweep(WORKLOAD, CHIP, AXES, loads)[:2]
    other = ms_resnet(18, (2, 16, 16), 3)
    dearer = CHIP.replaced({"mux.energy": 1.0})
    for workload, chip, density in ((WORKLOAD, CHIP, 0.2), (other, CHIP, 0.1), (WORKLOAD, dearer, 0.1)):
        with pytest.raises(ConfigError, match="another network, chip, activity"):
            sweep(workload, chip, AXES, uniform_loads(workload, density), done=done)
    with pytest.raises(ConfigError, match="has no point"):
        sweep(WORKLOAD, CHIP, {**AXES, "rows": (64,)}, loads, done=done)


# ------------------------------------------------------------------------------------ analog accuracy, and clusters


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Analog]:
    network = artifact.load("builtin:digits")
    pixels, labels = (
        np.load(io.BytesIO(artifact.builtin("digits", f"_{what}.npy")))[:12] for what in ("pixels", "labels")
    )
    return network, Analog.of(network, pixels, labels, trials=2, seed=3)


def test_a_sweep_with_analog_accuracy(digits: tuple[Any, Analog]) -> None:
    network, analog = digits
    workload = from_network(network)
    axes: dict[str, Any] = {"adc-bits": (5, 10), "rows": (7, 64)}
    loads = uniform_loads(workload, 0.3)
    rows = sweep(workload, CHIP, axes, loads, analog=analog)
    assert tuple(rows[0]) == columns(axes, analog=True)
    assert [row["error"] is None for row in rows] == [False, True, False, True]
    assert rows[0]["accuracy"] is None
    for row in (rows[1], rows[3]):
        want = analog_accuracy(
            network,
            analog.pixels,
            analog.labels,
            CHIP,
            trials=2,
            rng=np.random.default_rng(3),
            adc_bits=row["adc-bits"],
        )
        assert (row["accuracy"], row["accuracy_low"], row["accuracy_high"]) == (want.mean, *want.interval)
    assert sweep(workload, CHIP, axes, loads, analog=analog, jobs=2) == rows
    assert pareto([rows[1], {**rows[1], "accuracy": 2.0, "energy_uJ": 1e9}, {**rows[1], "energy_uJ": 1e9}]) == [0, 1]
    for wrong in ({"trials": 0}, {"seed": -1}, {"labels": analog.labels[:1]}):
        with pytest.raises((ConfigError, InputError)):
            Analog.of(network, analog.pixels, **{"labels": analog.labels, "trials": 1, "seed": 0, **wrong})


class Cluster:
    """A Dask scheduler and two workers without nannies, each a process of its own on this machine."""

    def __init__(self, stack: contextlib.ExitStack, workers: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        port = self.address.rsplit(":", 1)[1]
        self._stack = stack
        here = ("--host", "127.0.0.1", "--no-dashboard")
        self.scheduler = self._start("dask_scheduler", "--port", port, *here)
        self.workers = [
            self._start("dask_worker", self.address, *here, "--no-nanny", "--nthreads", "1") for _ in range(workers)
        ]

    def _start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def wait(self, workers: int) -> None:
        from dask.distributed import Client

        connect: Any = Client
        with connect(self.address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=60)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with contextlib.ExitStack() as stack:
        yield Cluster(stack)


def test_a_dask_cluster_that_loses_a_worker_loses_and_doubles_nothing(
    cluster: Cluster, digits: tuple[Any, Analog], tmp_path: Path
) -> None:
    network, analog = digits
    workload = from_network(network)
    axes: dict[str, Any] = {"rows": (16, 32, 64), "adc-bits": (6, 8, 10), "coding": ("offset", "differential")}
    loads = uniform_loads(workload, 0.3)
    want = sweep(workload, CHIP, axes, loads, analog=analog)
    cluster.wait(2)
    kept: list[Any] = []
    counts: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == 18
        counts.append(done)
        if done == 7:
            cluster.workers[0].send_signal(signal.SIGKILL)

    path = tmp_path / "points.csv"
    file = PointFile(path, axes, analog=True, seconds=0.0)

    def keep(points: Any) -> None:
        kept.extend(points)
        file.keep(points)

    rows = sweep(workload, CHIP, axes, loads, analog=analog, scheduler=cluster.address, keep=keep, progress=progress)
    assert cluster.workers[0].wait(10) == -signal.SIGKILL
    assert cluster.workers[1].poll() is None
    assert rows == want
    assert counts == list(range(1, 19))
    assert sorted(map(str, kept)) == sorted(str({**row, "pareto": None}) for row in want)
    file.save()
    assert read_points(path, axes, analog=True) == kept


def test_a_cluster_that_goes_away_is_one_clear_fault(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GONE_SECONDS", 2.0)
    cluster.wait(2)
    results = run_tasks(time.sleep, [(0.05,) for _ in range(200)], scheduler=cluster.address)
    assert next(results) is None
    for worker in cluster.workers:
        worker.kill()
    with pytest.raises(EnvironmentFault, match=r"has had no worker for 2 s"):
        list(results)
    monkeypatch.setattr(processes, "WORKERS_SECONDS", 1)
    with pytest.raises(EnvironmentFault, match="has no worker after 1 s"):
        list(run_tasks(time.sleep, [(0.0,)], scheduler=cluster.address))
    cluster.scheduler.kill()
    cluster.scheduler.wait()
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 1)
    with pytest.raises(EnvironmentFault, match="no Dask scheduler answered within 1 s"):
        list(run_tasks(time.sleep, [(0.0,)], scheduler=cluster.address))


def test_a_cluster_of_one_core_computes_on_its_worker() -> None:
    pytest.importorskip("distributed")
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, workers=1)
        cluster.wait(1)
        found = set(run_tasks(os.getppid, [() for _ in range(3)], scheduler=cluster.address))
        assert found == {os.getpid()}  # its parent is this process


def test_processes_return_every_result_once_and_faults_come_through() -> None:
    assert sorted(run_tasks(fail, [(n,) for n in (0, 1, 3, 4)], jobs=2)) == [0, 1, 3, 4]
    for jobs in (1, 2):
        with pytest.raises(ConfigError, match=r"^two$"):
            list(run_tasks(fail, [(n,) for n in range(6)], jobs=jobs))
    with pytest.raises(EnvironmentFault, match="killed"):
        list(run_tasks(die, [(n,) for n in range(6)], jobs=2))
    assert sorted(run_tasks(fail, [(0,), (1,)], jobs=2)) == [0, 1]  # a pool made anew
    before = signal.getsignal(signal.SIGINT)
    results = run_tasks(nap, [(n,) for n in range(50)], jobs=2)
    next(results)
    results.close()  # type: ignore[attr-defined]  # a generator
    assert signal.getsignal(signal.SIGINT) is before
    for jobs in (0, -1, True):
        with pytest.raises(ConfigError, match="jobs"):
            run_tasks(nap, [(1,)], jobs=jobs)
    for address in ("", "localhost", "tcp://", "tcp://h", "tcp://h:0", "tcp://h:65536", "http://h:1", "tcp://h:1/x"):
        with pytest.raises(ConfigError, match="scheduler"):
            run_tasks(nap, [(1,)], scheduler=address)

"""Training in two gloo processes: the same weights in both, what one process would compute, and clean ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import ENVIRONMENT, TINY, call, files
from mdsnn import checkpoint, train
from mdsnn.data import Augmentation, augment, digits
from mdsnn.kernels.errors import ConfigError, TrainingError
from mdsnn.parallel import Team, team
from mdsnn.recipe import recipe

SGD = {"optimizer": "sgd", "lr": 0.1}  # AdamW would forgive a gradient of the wrong length
EXACT = {"blocks": (1, 1), "widths": (4, 6), "timesteps": 2, "epochs": 2, "batch_size": 23, "shift": 1, **SGD}
"""With every epoch frozen, BN takes no statistics from a batch: what is left of a batch is a mean over its samples."""

WORKER = """
import dataclasses, hashlib, json, os, sys, torch
from torch import distributed
torch.set_num_threads(1)
from mdsnn import train
from mdsnn.data import digits
from mdsnn.kernels.errors import TrainingError
from mdsnn.recipe import recipe
rank = int(os.environ["RANK"])
data = dataclasses.replace(digits(), train_x=digits().train_x[:61], train_y=digits().train_y[:61])
loop = train._Run.loop
weights = {}
def watched(run, *rest):
    done = loop(run, *rest)
    state = b"".join(x.numpy().tobytes() for x in run.model.state_dict().values())
    weights[run.folder.name] = hashlib.sha256(state).hexdigest()
    return done
train._Run.loop = watched
def run(name, setting="original", **changes):
    config = recipe("digits", setting, save_path=sys.argv[1] + "/" + name, **changes)
    return train.train(config, data=data, progress=PROGRESS)
PROGRESS = None
"""


PATIENCE = 1200
"""Seconds that two processes may take; half a minute where nobody else computes."""


def free_port() -> int:
    """A port below those that systems give away unasked, so that it is still free when the processes come to it."""
    for port in range(15_000 + os.getpid() % 15_000, 32_000):
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port below 32000")


def start(script: str, *words: object) -> list[subprocess.Popen[str]]:
    """Two processes of one run, as torchrun would start them, without its hand over them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group = {**ENVIRONMENT, **address, "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, words)],
            env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def wait(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        told = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, told, strict=True)]


GUIDED = {"timesteps": 2, "batch_size": 600, "bits": 4, "loss": "CLK", "seed": 1234, "epochs": 2, "threads": 1}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Several runs, one after the other, in the same two processes: their folder, and what each process says."""
    script = f"""{WORKER}
EXACT, GUIDED, teacher = {EXACT!r}, {GUIDED!r}, {str(files().teacher)!r}
results = dict(
    plain=run("plain", **EXACT, freeze_epochs=2),
    learned=run("learned", "student", **EXACT, alpha="learned", grad_clip=1.0),
    taught=run("taught", "qamd", **dict(EXACT, blocks=None, widths=None), teacher_path=teacher, taps="block"),
)
data = None
results["whole"] = run("whole", "qamd", **GUIDED, teacher_path=teacher)
make = train._network
def poisoned(*arguments):
    model = make(*arguments)
    if rank:
        model.stem_bn.register_forward_hook(lambda m, i, o: o * float("nan"))
    return model
train._network = poisoned
try:
    run("poisoned", **EXACT)
except TrainingError as fault:
    print(fault, file=sys.stderr)
assert distributed.is_initialized()  # one group for all runs
results = {{name: dataclasses.asdict(result) for name, result in results.items()}}
print(json.dumps(dict(weights=weights, results=results), default=str))
"""
    folder = tmp_path_factory.mktemp("both")
    ends = wait(start(script, folder))
    assert [code for code, _, _ in ends] == [0, 0], ends
    return folder, [{**json.loads(out), "err": err} for _, out, err in ends]


def test_two_processes_end_with_the_same_weights_and_results(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, second) = both
    assert set(first["weights"]) == {"plain", "learned", "taught", "whole"}
    assert first["weights"] == second["weights"]
    assert first["results"] == second["results"]
    assert first["results"]["taught"]["history"][1]["membrane"] > 0.0
    made = sorted(os.listdir(folder / "plain"))
    assert made == ["last.ckpt", "metrics.csv", "metrics.jsonl", "model.ckpt", "recipe.json"]
    assert json.loads((folder / "plain" / "recipe.json").read_text())["processes"] == 2


def test_a_nan_in_one_process_stops_both_with_its_place(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, told = both
    for words, process in zip(("the gradient is not finite", "this begins in the output of"), told, strict=True):
        assert words in process["err"]
    assert not (folder / "poisoned" / "last.ckpt").exists()


def test_two_processes_compute_what_one_would(both: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    folder, (first, _) = both
    whole = digits()
    data = dataclasses.replace(whole, train_x=whole.train_x[:61], train_y=whole.train_y[:61])
    alone = train.train(recipe(save_path=tmp_path, **EXACT, freeze_epochs=2), data=data)
    theirs = checkpoint.load(folder / "plain" / "model.ckpt").group("model")
    for name, array in checkpoint.load(alone.checkpoint).group("model").items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    for ours, row in zip(alone.history, first["results"]["plain"]["history"], strict=True):
        for name in ("loss", "cross_entropy", "train_accuracy"):
            assert row[name] == pytest.approx(ours[name], rel=1e-4), name


def launched(launcher: str, *words: object) -> subprocess.CompletedProcess[str]:
    own = ("--nproc_per_node=2", f"--master_port={free_port()}")
    command = [str(word) for word in (sys.executable, "-m", launcher, *own, "-m", "mdsnn", *words)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_references_commands_run_stop_and_go_on_to_the_same_bits(both: Any, tmp_path: Path) -> None:
    """Options as the reference writes them; stopped within an epoch in one launcher, resumed in the other."""
    words: tuple[object, ...] = (
        *("train", "--data", "Digits", "--paper_setting", "qamd", "--time_window", 2, "--batch_size", 600),
        *("--bits", 4, "--loss", "CLK", "--seed", 1234, "--data_path", tmp_path, "--epochs", 2, "--threads", 1),
        *("--teacher_path", files().teacher, "--save_path", tmp_path),
    )
    cut = launched("torch.distributed.launch", *words, "--max_minutes", 1e-9)
    assert cut.returncode == 0, cut.stderr
    assert cut.stderr.count("--resume goes on exactly") == 1  # the first process alone talks
    assert not (tmp_path / "model.ckpt").exists()
    resumed = launched("torch.distributed.run", *words, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["epochs"] == 2
    assert resumed.stderr.count("] 6/6") == 1
    for name in ("model.ckpt", "last.ckpt", "metrics.csv"):
        assert (tmp_path / name).read_bytes() == (both[0] / "whole" / name).read_bytes(), name


COMMAND = (
    WORKER
    + """
from mdsnn.cli import program
SMALL = ["--blocks", "1", "--widths", "4", "--time-window", "2", "--epochs", "50", "--batch-size", "128"]
step = train._Run._step
def told(run, *rest):
    done = step(run, *rest)
    if run.epoch == 2 and run.step == 1:
        HOW
    return done
train._Run._step = told
sys.argv = ["mdsnn", "train", *SMALL, "--save-path", sys.argv[1]]
program()
"""
)


@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("os._exit(7) if rank else None", [2, 7], r"process 0 of 2: another process of this run ended \(.*resume"),
        pytest.param(
            "os.kill(os.getpid(), 2)",
            [130, 130],
            r"interrupted; 2 of 50 epochs are saved in .*--resume",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a dead process", "Ctrl-C"],
)
def test_a_run_of_two_processes_ends_with_one_clear_line_each(tmp_path, how, codes, said) -> None:
    ends = wait(start(COMMAND.replace("HOW", how), tmp_path))
    assert [code for code, _, _ in ends] == codes, ends
    errors = [line for line in ends[0][2].splitlines() if line.startswith("mdsnn: error:")]
    assert len(errors) == 1
    assert re.search(said, errors[0]), errors
    assert "Traceback" not in "".join(err for _, _, err in ends)
    assert checkpoint.load(tmp_path / "last.ckpt").epoch == 2
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.slow
def test_a_fault_that_all_processes_share_is_told_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_text("kept")
    script = COMMAND.replace("HOW", "pass")
    ends = wait(start(script, tmp_path))
    assert ends[0][0] == 3
    assert "exists and is kept" in ends[0][2]
    assert "exists and is kept" not in ends[1][2]
    assert (tmp_path / "model.ckpt").read_text() == "kept"


# ------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (256, 2), (5, 4)])
def test_shares_tile_a_batch_and_differ_by_at_most_one(count: int, size: int) -> None:
    shares = [list(range(count))[Team(rank, size).share(count)] for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(count))
    assert {len(share) for share in shares} <= {count // size, count // size + 1}


@pytest.mark.parametrize(
    "changes", [{"shift": 2}, {"flip": True}, {"cutout": 3}, {"shift": 1, "flip": True, "cutout": 2}]
)
def test_a_share_is_augmented_as_in_the_whole_batch(changes: dict[str, int]) -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 11, 3, 6, 5), np.uint8))
    whole = augment(x, Augmentation(**changes), torch.Generator().manual_seed(5))
    assert not torch.equal(whole, x)
    for rank in range(3):
        share, generator = Team(rank, 3).share(11), torch.Generator().manual_seed(5)
        part = augment(x[:, share], Augmentation(**changes), generator, part=(share, 11))
        assert torch.equal(part, whole[:, share])


BUSY = """
import os, sys, time
import torch
from torch import distributed
from mdsnn import parallel
class Held:
    pass
try:
    with parallel.team() as found:
        cycle = Held()
        cycle.me, cycle.model = cycle, found.wrap(torch.nn.Linear(1, 1), torch.device("cpu"), unused=False)
        del cycle
        if found.rank:
            time.sleep(1)
        work = distributed.all_reduce(torch.ones(3), async_op=True)
        if found.rank:
            work.wait()
            time.sleep(3)
        else:  # Python runs on while gloo ends the work: its thread waits to let go of the tensor
            del work
            sys.setswitchinterval(1000.0)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                pass
        if sys.argv[1] == "fails":
            raise ValueError
except ValueError:
    pass
if sys.argv[2] == "program":
    parallel.end(5)
sys.exit(5)
"""


@pytest.mark.parametrize("words", [("ends", "script"), ("ends", "program"), ("fails", "program")], ids=" ".join)
def test_the_end_of_python_does_not_cut_gloo_short(words: tuple[str, str]) -> None:
    ends = wait(start(BUSY, *words))
    assert [(code, out, err) for code, out, err in ends] == [(5, "", "")] * 2


def test_a_process_alone_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("", "1"):
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with team() as found:
            assert found == Team()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' is no whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK = 2 of WORLD_SIZE = 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, environment, words) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words), team():
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"process 1 of this machine has no GPU: torch sees 1"):
        Team(1, 2, 1).device("cuda")


def test_a_fault_of_its_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="mine"), Team().together():
        raise RuntimeError("mine")
    with pytest.raises(torch.OutOfMemoryError), Team(0, 2).together():
        raise torch.OutOfMemoryError("memory")
    with pytest.raises(TrainingError, match=r"process 0 of 2: another process .*\(gone\)"), Team(0, 2).together():
        raise RuntimeError("gone\nmore")


def test_local_rank_is_taken_and_ignored(tmp_path: Path) -> None:
    for place in (("--local_rank=0", "train"), ("train", "--local-rank", "0")):
        outcome = call(*place, *TINY, "--epochs", 1, "--save_path", tmp_path / place[0])
        assert outcome.code == 0, outcome

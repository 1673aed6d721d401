"""An artifact that differs from its checkpoint: `verify` finds it, names the place, and keeps what reproduces it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from commands import ENVIRONMENT, Outcome, assert_one_line, call, files, names
from mdsnn.export import artifact
from mdsnn.kernels import Engine
from mdsnn.kernels.network import BnAffine, Conv, IntegerNetwork, Lif, Readout


def changed(network: IntegerNetwork, name: str, **fields: object) -> IntegerNetwork:
    """The network with one node changed, proven again."""
    nodes = tuple(replace(n, **fields) if n.name == name else n for n in network.nodes)  # type: ignore[arg-type]
    return replace(network, nodes=nodes)


def one_weight(network: IntegerNetwork) -> tuple[IntegerNetwork, str]:
    node = network["groups.1.0.conv1"]
    assert isinstance(node, Conv)
    weight = node.weight.copy()
    place = np.unravel_index(np.argmax(np.abs(weight)), weight.shape)
    weight[place] = -weight[place]
    return changed(network, node.name, weight=weight), "weight"


def one_threshold(network: IntegerNetwork) -> tuple[IntegerNetwork, str]:
    """Move a threshold from just below a membrane that is reached to just above it: one code differs by one."""
    node = network["groups.0.0.lif2"]
    assert isinstance(node, Lif)
    trace = Engine(network, "reference").run(np.load(files().npy), trace=True).trace
    assert trace is not None
    lif = trace.lifs[node.name]
    for h in np.unique(lif.h[lif.s == 0]):
        below = int(np.searchsorted(node.thresholds, h, side="right")) - 1
        if below >= 0 and (below + 1 == node.thresholds.size or node.thresholds[below + 1] > h):
            thresholds = node.thresholds.copy()
            thresholds[below] = h + 1
            return changed(network, node.name, thresholds=thresholds), "thresholds"
    raise AssertionError("no membrane between two thresholds")


def one_v_th(network: IntegerNetwork) -> tuple[IntegerNetwork, str]:
    """Raise v_th by what turns `h > v_th` into `h > h_reached`: the comparison changes for one membrane."""
    node = network["lif"]
    assert isinstance(node, Lif)
    trace = Engine(network, "reference").run(np.load(files().npy), trace=True).trace
    assert trace is not None
    lif = trace.lifs[node.name]
    return changed(network, node.name, v_th=int(lif.h[lif.s == 1].min())), "v_th"


def one_offset(network: IntegerNetwork) -> tuple[IntegerNetwork, str]:
    node = network["groups.0.0.bn1"]
    assert isinstance(node, BnAffine)
    offset = node.offset.copy()
    offset[0] += 1 << int(node.shift[0])
    return changed(network, node.name, offset=offset), "offset"


def one_bias(network: IntegerNetwork) -> tuple[IntegerNetwork, str]:
    assert isinstance(network.readout, Readout)
    bias = network.readout.bias.copy()
    bias[3] += 1
    return changed(network, "readout", bias=bias), "bias"


CASES = {
    one_weight: ("groups.1.0.conv1", "groups.1.0.lif2"),
    one_threshold: ("groups.0.0.lif2", "groups.0.0.lif2"),
    one_v_th: ("lif", "lif"),
    one_offset: ("groups.0.0.bn1", "groups.0.0.lif2"),
    one_bias: ("readout", "logits"),
}
"""What is broken -> (the node it is in, the layer where it shows first)."""


def verify(path: Path, *words: object) -> Outcome:
    return call("verify", path, "--checkpoint", files().student, "--data", files().npy, *words)


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_one_changed_constant_is_found_and_named(
    change: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, layer = CASES[change]  # type: ignore[index]
    network, field = change(artifact.load(files().affine))  # type: ignore[operator]
    artifact.save(network, tmp_path / "changed.mdsnn")
    monkeypatch.chdir(tmp_path)  # the script must find the artifact from anywhere
    outcome = verify(Path("changed.mdsnn"), "--executors", "torch,reference,native", "--save-dir", "found")
    assert outcome.code == 1, outcome
    assert not outcome.errors
    states = dict(line.split()[:2] for line in outcome.out.splitlines()[1:4])
    assert states == {"torch": "baseline", "reference": "DIFFERS", "native": "DIFFERS"}

    first = next(line for line in outcome.out.splitlines() if line.startswith("first divergence: "))
    assert f"reference parts from torch at layer {layer!r}" in first
    segment = first.partition("this one: ")[2].split(" -> ")
    assert node in segment

    constants = [line for line in outcome.out.splitlines() if line.startswith("artifact and checkpoint differ: ")]
    assert len(constants) == 1, outcome.out
    assert f"node {node!r}: {field}" in constants[0]
    assert "(1 values differ)" in constants[0]

    assert names(tmp_path / "found") == ["divergence-1.npz", "reproduce-1.py"]
    with np.load(tmp_path / "found" / "divergence-1.npz", allow_pickle=False) as record:
        got, want = int(record["got"]), int(record["want"])
        assert record["pixels"].shape == (1, 1, 8, 8)
    assert got != want
    assert f": {got}, where torch has {want}" in first
    if change not in (one_threshold, one_bias):  # a membrane's and a logit's; each run costs the start of Numba
        return
    script = tmp_path / "found" / "reproduce-1.py"
    run = subprocess.run([sys.executable, script], capture_output=True, cwd="/", check=True, text=True, env=ENVIRONMENT)
    assert f"recorded: reference {got} | torch {want}" in run.stdout
    assert f"reference has {got}\n" in run.stdout
    assert f"native has {got}\n" in run.stdout


def test_an_executor_that_differs_is_found_among_those_that_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison broken in one executor only: the artifact is right, and only that executor differs."""
    from mdsnn.cli import verify as module
    from mdsnn.export.verify import kernel_executor

    network = artifact.load(files().affine)
    wrong, _ = one_v_th(network)
    whole = module.make_executors

    def make(network: IntegerNetwork, names: tuple[str, ...], *rest: object) -> dict[str, object]:
        made: dict[str, object] = dict(whole(network, names, *rest))  # type: ignore[arg-type]
        return made | {"numba": kernel_executor(wrong, "reference")}

    monkeypatch.setattr(module, "make_executors", make)
    outcome = verify(files().affine, "--executors", "reference,numba,native", "--save-dir", tmp_path, "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert found["agrees"] is False
    assert {name: e["agrees"] for name, e in found["executors"].items()} == {
        "reference": True,
        "numba": False,
        "native": True,
    }
    assert found["executors"]["numba"]["first"]["layer"] == "lif"
    assert found["constants"] == []
    assert len(found["saved"]) == 2


def test_an_executor_that_fails_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdsnn.cli import verify as module

    def fail(_pixels: object) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(module, "torch_executor", lambda _checkpoint: fail)
    outcome = verify(files().affine, "--executors", "reference,torch")
    assert outcome.code == 1
    assert re.search(r"^torch +FAILED", outcome.out, re.MULTILINE)
    assert "torch failed: ZeroDivisionError: broken" in outcome.err


def test_the_finding_is_told_even_if_it_cannot_be_kept(tmp_path: Path) -> None:
    network, _ = one_bias(artifact.load(files().affine))
    path = tmp_path / "changed.mdsnn"
    artifact.save(network, path)
    outcome = verify(path, "--executors", "torch,reference", "--save-dir", "/proc/1/found")
    assert outcome.code == 3
    assert "first divergence: reference parts from torch at layer 'logits'" in outcome.out
    assert len(outcome.errors) == 1
    assert "not saved: /proc/1/found" in outcome.errors[0]
    (tmp_path / "file").write_text("mine")
    early = verify(path, "--executors", "torch,reference", "--save-dir", tmp_path / "file")
    assert_one_line(early, 3, "file", "is no folder")


def test_an_onnx_file_of_another_network_is_found(tmp_path: Path) -> None:
    network, _ = one_bias(artifact.load(files().artifact))
    path = tmp_path / "changed.mdsnn"
    artifact.save(network, path)
    words = ("--onnx", files().onnx, "--executors", "reference,onnx", "--limit", "2", "--save-dir", tmp_path)
    outcome = call("verify", path, *words)
    assert outcome.code == 1, outcome
    assert "onnx parts from reference at layer 'logits'" in outcome.out

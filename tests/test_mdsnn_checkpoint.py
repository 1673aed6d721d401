"""Checkpoints: exact round trips, one clear error for any other file, and no code run from a foreign one."""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdsnn import checkpoint
from mdsnn.kernels.container import pack, unpack
from mdsnn.kernels.errors import CheckpointError, InputError, MdsnnError, StorageError
from mdsnn.models import ms_resnet, vgg


def tiny(seed: int = 0, **options) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return ms_resnet((1, 1), (4, 6), classes=3, in_channels=1, size=8, timesteps=2, generator=generator, **options)


def student(seed: int = 0, **options) -> torch.nn.Module:
    return tiny(seed, weight_bits=4, membrane_bits=4, bn_bits=8, **options)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) and x[name].dtype == y[name].dtype for name in x)


@pytest.mark.parametrize("model", [tiny(1), student(2, alpha="learned"), vgg((1,), (4,), hidden=5, size=8)])
def test_a_model_comes_back_exactly(tmp_path, model):
    path = tmp_path / "x.ckpt"
    recipe, history = {"lr": 0.1, "blocks": [1, 1]}, [{"epoch": 1, "loss": 1 / 3}]
    checkpoint.save(path, model, epoch=1, recipe=recipe, history=history, labels=("a", "b", "c"))
    found = checkpoint.load(path)
    rebuilt = checkpoint.build_model(found)
    assert same(rebuilt, model)
    assert rebuilt.config == model.config == found.config
    assert not rebuilt.training
    assert (found.epoch, found.document["recipe"], found.document["history"]) == (1, recipe, history)
    assert found.document["labels"] == ["a", "b", "c"]


def test_the_same_state_gives_the_same_bytes_and_drawing_weights_moves_no_global_state(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in ("a", "b"):
        checkpoint.save(tmp_path / name, tiny(3))
        checkpoint.build_model(checkpoint.load(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_length_of_header_looks_like_another_kind_of_file(tmp_path):
    seen = set()
    for size in range(0, 2048, 8):
        content = pack({}, {**valid_document(), "labels": ["x" * size]}, checkpoint.KEY)
        (tmp_path / "x").write_bytes(content)
        assert checkpoint.load(tmp_path / "x").document["labels"] == ["x" * size]
        seen.add(content[0])
    assert seen == set(range(0, 256, 8))


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    checkpoint.save(tmp_path / "x", tiny(0))
    kept = (tmp_path / "x").read_bytes()
    with pytest.raises(StorageError, match="exists and is kept"):
        checkpoint.save(tmp_path / "x", tiny(1))
    assert (tmp_path / "x").read_bytes() == kept
    checkpoint.save(tmp_path / "x", tiny(1), force=True)
    assert (tmp_path / "x").read_bytes() != kept
    assert os.listdir(tmp_path) == ["x"]


def steps(model, optimizer, generator, count):
    model.train()
    for _ in range(count):
        x = torch.randint(0, 256, (4, 1, 8, 8), generator=generator, dtype=torch.uint8)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimizer_and_random_states_go_on_as_if_never_saved(tmp_path, kind):
    def fresh():
        model = student(0)
        groups = [{"params": [p], "weight_decay": 0.01 * (p.ndim > 1)} for p in model.parameters()]
        if kind == "adamw":
            return model, torch.optim.AdamW(groups, lr=1e-2), torch.Generator().manual_seed(1)
        return model, torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True), torch.Generator().manual_seed(1)

    model, optimizer, generator = fresh()
    steps(model, optimizer, generator, 2)
    checkpoint.save(tmp_path / "x", model, optimizer=optimizer, generators={"g": generator}, epoch=1)
    steps(model, optimizer, generator, 2)
    other, optimizer, generator = fresh()
    saved = checkpoint.load(tmp_path / "x")
    checkpoint.apply(other, saved.group("model"), "x")
    checkpoint.restore_optimizer(optimizer, saved)
    checkpoint.restore_generators({"g": generator}, saved)
    steps(other, optimizer, generator, 2)
    assert same(other, model)


def test_an_optimizer_of_another_kind_or_no_state_is_refused(tmp_path):
    model = tiny()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path / "x", model, optimizer=sgd)
    saved = checkpoint.load(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no state for this AdamW optimizer"):
        checkpoint.restore_optimizer(torch.optim.AdamW(model.parameters()), saved)
    with pytest.raises(CheckpointError, match="no random state 'g'"):
        checkpoint.restore_generators({"g": torch.Generator()}, saved)
    checkpoint.save(tmp_path / "y", model)
    with pytest.raises(CheckpointError, match="no state for this SGD"):
        checkpoint.restore_optimizer(sgd, checkpoint.load(tmp_path / "y"))


def test_nan_is_refused_in_both_directions(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"x: NaN or infinity in model/stem.weight"):
        checkpoint.save(tmp_path / "x", model)
    assert not (tmp_path / "x").exists()
    checkpoint.save(tmp_path / "x", tiny())
    document, tensors = unpack((tmp_path / "x").read_bytes(), checkpoint.KEY, "x")
    for name in ("model/stem_bn.running_var", "model/readout.bias", "model/stem.weight", "model/readout.weight"):
        tensors[name] = np.full_like(tensors[name], np.inf)
    (tmp_path / "y").write_bytes(pack(tensors, document, checkpoint.KEY))
    with pytest.raises(CheckpointError, match=r"y: NaN or infinity in model/readout.bias, .* and 1 more"):
        checkpoint.load(tmp_path / "y")


def test_another_architecture_is_named_by_its_first_tensors():
    tensors = {name: value.numpy() for name, value in tiny().state_dict().items()}
    wider = ms_resnet((1, 1), (4, 8), classes=3, in_channels=1, size=8)
    with pytest.raises(
        CheckpointError, match=r"x: tensors of another architecture: \d+ misshapen, such as groups.1.0.conv1"
    ):
        checkpoint.apply(wider, tensors, "x")
    deeper = ms_resnet((1, 2), (4, 6), classes=3, in_channels=1, size=8)
    before = deeper.stem.weight.clone()
    with pytest.raises(CheckpointError, match=r"\d+ missing, such as groups.1.1.bn1.bias"):
        checkpoint.apply(deeper, tensors, "x")
    assert torch.equal(deeper.stem.weight, before)
    with pytest.raises(CheckpointError, match=r"1 unknown, such as extra"):
        checkpoint.apply(tiny(), {**tensors, "extra": np.zeros(1, np.float32)}, "x")
    with pytest.raises(CheckpointError, match=r"1 of another kind of number, such as readout.bias"):
        checkpoint.apply(tiny(), {**tensors, "readout.bias": np.zeros(3, np.int64)}, "x")


def rewritten(path, change):
    """A checkpoint with a changed document and a right digest."""
    document, tensors = unpack(path.read_bytes(), checkpoint.KEY, "x")
    change(document)
    path.write_bytes(pack(tensors, document, checkpoint.KEY))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="mdsnn.checkpoint/2"), "format 'mdsnn.checkpoint/2'; this version reads"),
        (lambda d: d.update(extra=1), "missing or unknown fields extra"),
        (lambda d: d.pop("recipe"), "missing or unknown fields recipe"),
        (lambda d: d.update(epoch=True), "epoch must be a int, not bool"),
        (lambda d: d.update(epoch=-1), "epoch = -1"),
        (lambda d: d.update(labels=[1]), "a label is no text"),
        (lambda d: d.update(history=[1]), "a row of the history"),
    ],
)
def test_a_document_that_is_not_ours_is_refused(tmp_path, change, words):
    checkpoint.save(tmp_path / "x", tiny())
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(rewritten(tmp_path / "x", change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "resnet"}, "builds no model: model 'resnet'"),
        ({"blocks": [1 << 15, 1]}, "are more than its"),
        ({"blocks": "11"}, "builds no model"),
        ({"blocks": [1.0, 1]}, "builds no model"),
        ({"widths": [4, 1 << 15]}, "misshapen"),
        ({"widths": [4, 1 << 30]}, "widths holds 1073741824, over the limit"),
        ({"classes": 1 << 16}, "misshapen"),
        ({"tau": "0.5"}, "builds no model"),
        ({"mean": [0.1, 0.2]}, "builds no model|misshapen"),
        ({"unheard": 1}, "builds no model: unknown model options: unheard"),
        ({"weight_bits": 9}, "builds no model"),
        ({"grid": {"frac_bits": 99}}, "builds no model"),
    ],
)
def test_a_hostile_config_builds_nothing(tmp_path, change, words):
    checkpoint.save(tmp_path / "x", tiny())
    found = checkpoint.load(rewritten(tmp_path / "x", lambda d: d["config"].update(change)))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.build_model(found)


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(InputError, match="no such file"):
        checkpoint.load(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        checkpoint.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="looks like a PyTorch checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pack({}, {"format": checkpoint.FORMAT}, "mdsnn.artifact"))
    with pytest.raises(CheckpointError, match=r"mdsnn.checkpoint"):
        checkpoint.load(path)
    checkpoint.save(tmp_path / "y", tiny())
    path.write_bytes((tmp_path / "y").read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="no `config`"):
        checkpoint.save(tmp_path / "z", torch.nn.Linear(2, 2))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_changed_bit_is_refused(tmp_path, data):
    content = bytearray(pack({"model/w": np.arange(6, dtype=np.float32)}, valid_document(), checkpoint.KEY))
    place = data.draw(st.integers(0, len(content) * 8 - 1))
    content[place // 8] ^= 1 << place % 8
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(MdsnnError):
        checkpoint.load(tmp_path / "x")


def valid_document():
    empty = {"config": {}, "history": [], "labels": [], "optimizer": {}, "recipe": {}}
    return {"format": checkpoint.FORMAT, "epoch": 0, **empty}


def test_the_document_that_the_bits_were_flipped_in_is_valid(tmp_path):
    (tmp_path / "x").write_bytes(pack({"model/w": np.ones(2, np.float32)}, valid_document(), checkpoint.KEY))
    assert checkpoint.load(tmp_path / "x").group("model")["w"].tolist() == [1.0, 1.0]

"""Each fault of a file, an option or the machine: one clear line, and exit code 2 (input) or 3 (environment)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import ENVIRONMENT, TINY, assert_one_line, call, files, names, spawn
from mdsnn.kernels.container import pack, unpack


def readers(path: Path, kind: str) -> list[tuple[object, ...]]:
    """The calls that read a file of a kind."""
    made = files()
    if kind == "artifact":
        return [
            ("info", path),
            ("run", path, made.png),
            ("verify", path, "--executors", "reference,native"),
            ("bench", path, "--data", made.npy),
            ("report", path, "--data", made.npy),
        ]
    if kind == "checkpoint":
        out = path.parent / "out.mdsnn"
        return [
            ("export", path, "-o", out),
            ("verify", made.artifact, "--checkpoint", path),
            ("bench", made.artifact, "--checkpoint", path, "--executors", "torch", "--data", made.npy),
            ("train", "--paper-setting", "qamd", "--teacher-path", path, *TINY, "--save-path", path.parent / "run"),
        ]
    if kind == "image":
        return [("run", made.artifact, path)]
    assert kind == "npy"
    return [
        ("run", made.artifact, path),
        ("verify", made.artifact, "--data", path, "--executors", "reference,native"),
        ("bench", made.artifact, "--data", path),
        ("report", made.artifact, "--data", path),
        ("export", made.student, "-o", path.parent / "out.mdsnn", "--vectors", path.parent / "v", "--data", path),
    ]


SOURCE = {"artifact": "artifact", "checkpoint": "student", "image": "png", "npy": "npy"}
SUFFIX = {"artifact": ".mdsnn", "checkpoint": ".ckpt", "image": ".png", "npy": ".npy"}


def content_of(kind: str) -> bytes:
    content: bytes = getattr(files(), SOURCE[kind]).read_bytes()
    return content


def refuse(path: Path, kind: str, *parts: str, code: int = 2) -> None:
    """Every command that reads `path` refuses it in one line, and writes nothing."""
    for words in readers(path, kind):
        assert_one_line(call(*words), code, str(path), *parts)
        left = [name for name in names(path.parent) if name != path.name]
        assert left in ([], ["run/recipe.json"]), (words, left)


@pytest.mark.parametrize("kind", SOURCE)
def test_missing_empty_or_no_file(tmp_path: Path, kind: str) -> None:
    refuse(tmp_path / f"none{SUFFIX[kind]}", kind, "no such file")
    empty = tmp_path / f"empty{SUFFIX[kind]}"
    empty.touch()
    refuse(empty, kind, "empty")
    empty.unlink()
    folder = tmp_path / f"folder{SUFFIX[kind]}"
    folder.mkdir()
    refuse(folder, kind, "expected")


@pytest.mark.parametrize("kind", SOURCE)
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    content = content_of(kind)
    path = tmp_path / f"short{SUFFIX[kind]}"
    for length in (1, 7, 8, len(content) // 2, len(content) - (40 if kind == "image" else 1)):
        path.write_bytes(content[:length])
        refuse(path, kind)


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_flipped_bits(tmp_path: Path, kind: str) -> None:
    content = content_of(kind)
    path = tmp_path / f"flipped{SUFFIX[kind]}"
    rng = np.random.default_rng(0)
    places = [3, 12, *rng.integers(8, 8 * len(content), 4).tolist(), 8 * len(content) - 1]
    for bit in places:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refuse(path, kind)


def test_newer_versions(tmp_path: Path) -> None:
    document, tensors = unpack(content_of("artifact"), "mdsnn.artifact", "a")
    path = tmp_path / "newer.mdsnn"
    path.write_bytes(pack(tensors, {**document, "format_version": 2}, "mdsnn.artifact"))
    refuse(path, "artifact", "version 2 is newer", "Upgrade mdsnn")
    path.unlink()
    document, tensors = unpack(content_of("checkpoint"), "mdsnn.checkpoint", "c")
    path = tmp_path / "newer.ckpt"
    path.write_bytes(pack(tensors, {**document, "format": "mdsnn.checkpoint/2"}, "mdsnn.checkpoint"))
    refuse(path, "checkpoint", "mdsnn.checkpoint/2", "Update mdsnn")


def test_an_artifact_whose_bounds_lie(tmp_path: Path) -> None:
    document, tensors = unpack(content_of("artifact"), "mdsnn.artifact", "a")
    node = next(node for node in document["nodes"] if node["name"] == "groups.0.0.conv1")
    node["claims"]["range"][1] += 1
    path = tmp_path / "lies.mdsnn"
    path.write_bytes(pack(tensors, document, "mdsnn.artifact"))
    refuse(path, "artifact", "'groups.0.0.conv1'", "claims range")


def test_one_kind_of_file_given_for_another(tmp_path: Path) -> None:
    made = files()
    for word in (made.student, made.onnx, made.png, made.npy):
        assert_one_line(call("info", word), 2, str(word))
    for word in (made.artifact, made.onnx, made.png):
        assert_one_line(call("export", word, "-o", tmp_path / "x"), 2, str(word))
    assert_one_line(call("run", made.artifact, made.artifact), 2, str(made.artifact), "not a readable image")
    assert_one_line(call("run", made.artifact, "builtin:digits", made.png), 2, "comes alone")
    assert_one_line(call("run", "builtin:nothing", made.png), 2, "no such built-in")
    words = ("--onnx", made.npy, "--limit", "2", "--executors", "reference,onnx")
    assert_one_line(call("verify", made.artifact, *words), 2, str(made.npy))
    assert names(tmp_path) == []


def test_a_teacher_is_no_student(tmp_path: Path) -> None:
    made = files()
    said = ("full precision", str(made.teacher))
    assert_one_line(call("export", made.teacher, "-o", tmp_path / "x"), 2, *said)
    assert_one_line(call("verify", made.artifact, "--checkpoint", made.teacher), 2, *said)
    assert names(tmp_path) == []


def test_images_of_another_size_or_number_of_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((5, 1, 9, 8), (5, 3, 8, 8), (8,), (0, 1, 8, 8)):
        path = tmp_path / "wrong.npy"
        np.save(path, rng.integers(0, 256, shape, dtype=np.uint8))
        refuse(path, "npy", "[N, 1, 8, 8] is expected")
    np.save(path, rng.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8))
    refuse(path, "npy", "channels are last")
    np.save(path, rng.random((5, 1, 8, 8), np.float32))
    refuse(path, "npy", "uint8", "float32")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refuse(path, "npy", "objects")
    path.unlink()
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    refuse(deep, "image", "deeper than 8 bits")
    assert_one_line(call("run", files().artifact, files().big_png), 2, "24 x 24", "8 x 8", "--resize")


def change(checkpoint: bytes, **config: object) -> bytes:
    """A checkpoint whose configuration says something else, signed again."""
    document, tensors = unpack(checkpoint, "mdsnn.checkpoint", "c")
    return pack(tensors, {**document, "config": {**document["config"], **config}}, "mdsnn.checkpoint")


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    content = content_of("checkpoint")
    for config in ({"widths": [4, 12]}, {"blocks": [1, 2]}, {"classes": 9}):
        path.write_bytes(change(content, **config))
        refuse(path, "checkpoint", "another architecture")
    for config in ({"blocks": [10**9]}, {"widths": "x"}, {"nonsense": 1}, {"timesteps": 0}, {"widths": []}):
        path.write_bytes(change(content, **config))
        refuse(path, "checkpoint", "config")


def test_a_checkpoint_with_nan_or_infinity(tmp_path: Path) -> None:
    document, tensors = unpack(content_of("checkpoint"), "mdsnn.checkpoint", "c")
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    path = tmp_path / "nan.ckpt"
    for value in (np.nan, np.inf):
        broken = tensors[name].copy()
        broken.flat[3] = value
        path.write_bytes(pack({**tensors, name: broken}, document, "mdsnn.checkpoint"))
        refuse(path, "checkpoint", "NaN or infinity", name)


def test_a_foreign_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    """A pickle as a teacher is read by a process of its own that refuses to run it."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "boom"),)

    path = tmp_path / "teacher.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    words = ("--paper-setting", "qamd", "--teacher-path", path, *TINY, "--save-path", tmp_path / "run")
    assert_one_line(call("train", *words), 2, str(path))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("option", ["--bits", "--weight-bits", "--membrane-bits", "--bn-bits"])
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 10**30])
def test_bits_outside_2_to_8(tmp_path: Path, option: str, bits: int) -> None:
    words = ("train", "--paper-setting", "student", option, bits, "--save-path", tmp_path / "run")
    assert_one_line(call(*words), 2, f"= {bits} is no whole number in 2..8")
    assert names(tmp_path) == []


def test_an_unknown_chip_or_a_broken_one(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    made = files()
    assert_one_line(call("report", made.artifact, "--chip", "fefet23", "--data", made.npy), 2, "fefet23", "fefet32")
    assert_one_line(call("chips", "show", "fefet23"), 2, "fefet23", "fefet32")
    path = tmp_path / "mine.toml"
    path.write_text("[adc\n")
    assert_one_line(call("chips", "show", path), 2, str(path))
    path.write_bytes(b"\xff\xfe" * 40_000)
    assert_one_line(call("report", made.artifact, "--chip", path, "--data", made.npy), 2, str(path))


def outputs(place: Path) -> list[tuple[object, ...]]:
    """Every way to name an output file, with the other arguments in order."""
    made = files()
    report = ("report", made.artifact, "--data", made.npy)
    export = ("export", made.student, "-o")
    return [
        ("info", made.artifact, "--json", place / "x.json"),
        ("run", made.artifact, made.png, "--json", place / "x.json"),
        (*export, place / "x.mdsnn"),
        (*export, place.parent / "kept.mdsnn", "--onnx", place / "x.onnx"),
        (*export, place.parent / "kept.mdsnn", "--vectors", place / "vectors"),
        ("train", *TINY, "--save-path", place / "run"),
        (*report, "-o", place / "x.html"),
        (*report, "--csv", place / "x.csv"),
        (*report, "--save-activity", place / "x.npz"),
        ("demo", "--out", place / "demo"),
    ]


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    """Also for root: a file, a folder of the kernel and a missing folder stand where a folder should be."""
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", Path("/proc/1")):
        for words in outputs(place):
            if place.parts[1] == "proc" and words[0] == "export" and ("--onnx" in words or "--vectors" in words):
                continue  # the artifact beside it would be written into /proc too
            outcome = call(*words)
            assert outcome.code == 3, (words, outcome)
            assert len(outcome.errors) == 1, (words, outcome)
            assert str(place) in outcome.errors[0]
            assert names(tmp_path) == ["file"]
    for words in outputs(tmp_path / "missing")[:4]:
        assert_one_line(call(*words), 3, "does not exist; create it first")
    assert_one_line(call("info", files().artifact, f"--json={tmp_path / ('n' * 300)}.json"), 3, "too long")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_device_or_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    outcome = call("export", files().student, "-o", pipe, "--force")
    assert_one_line(outcome, 3, str(pipe), "device or a pipe")
    assert pipe.is_fifo()
    assert_one_line(call("info", pipe), 2, str(pipe), "not a regular file")


# ------------------------------------------------------------------------------------ what the machine does not have


def without(*modules: str) -> str:
    """A prelude that makes imports of these modules fail as if they were not installed."""
    return (
        "import sys\nclass Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {modules!r} or name in {modules!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())"
    )


def test_a_missing_extra_names_the_line_that_installs_it(tmp_path: Path) -> None:
    made = files()
    nothing = without("torch", "onnx", "onnxruntime", "numba", "sklearn", "jinja2", "pydantic", "scipy", "rich")
    for words, extra in (
        (("train", "--save-path", tmp_path / "run"), "train"),
        (("export", made.student, "-o", tmp_path / "x"), "train"),
        (("verify", made.artifact, "--checkpoint", made.student), ""),
        (("verify", made.artifact, "--executors", "reference,onnx"), "train"),
        (("verify", made.artifact, "--executors", "reference,native", "--data", "digits"), "train"),
        (("bench", made.artifact, "--executors", "onnx", "--data", made.npy), "train"),
        (("chips",), "report"),
        (("report", made.artifact), "report"),
        (("demo", "--out", tmp_path / "demo"), "train"),
    ):
        outcome = spawn(*words, prelude=nothing)
        assert_one_line(outcome, 3, "pip install", f"[{extra}]" if extra else "numba")
        assert any(f" {name}" in f" {outcome.errors[0]}" for name in ("torch", "onnx", "numba", "pydantic", "jinja2"))
    assert names(tmp_path) == []
    for words in (
        ("info", made.artifact),
        ("run", made.artifact, made.png),
        ("bench", made.artifact, "--data", made.npy, "--repeats", "3"),
        ("verify", made.artifact, "--data", made.npy, "--executors", "reference,native"),
    ):
        outcome = spawn(*words, prelude=nothing)
        assert outcome.code == 0, (words, outcome)
        assert outcome.out


def test_a_missing_engine_is_an_error_if_it_was_chosen_and_a_warning_if_not() -> None:
    made = files()
    no_c = without("mdsnn.kernels._native", "numba")
    run = ("run", made.artifact, made.png, "--json")
    fallback = spawn(*run, prelude=no_c)
    assert fallback.code == 0
    assert '"engine": "reference"' in fallback.out
    assert len(fallback.err.splitlines()) == 1, fallback.err
    for name in ("native", "numba"):
        assert_one_line(spawn(*run, "--engine", name, prelude=no_c), 3, name)
        assert_one_line(spawn(*run, prelude=no_c, env={**ENVIRONMENT, "MDSNN_ENGINE": name}), 3, f"MDSNN_ENGINE={name}")
    words = ("verify", made.artifact, "--data", made.npy, "--executors", "reference,native")
    outcome = spawn(*words, prelude=no_c)
    assert outcome.code == 3
    assert len(outcome.errors) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MDSNN_ENGINE", "cuda"),
        ("MDSNN_ENGINE", "Native"),
        ("MDSNN_THREADS", "0"),
        ("MDSNN_THREADS", "-1"),
        ("MDSNN_THREADS", "1e3"),
        ("MDSNN_THREADS", "9" * 30),
        ("MDSNN_ISA", "sse9"),
    ],
)
def test_nonsense_in_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    made = files()
    monkeypatch.setenv(variable, value)
    for words in (
        ("run", made.artifact, made.png),
        ("bench", made.artifact, "--data", made.npy, "--executors", "reference", "--repeats", "3"),
        ("verify", made.artifact, "--data", made.npy, "--executors", "reference,native"),
    ):
        assert_one_line(call(*words), 2, variable)
    assert call("info", made.artifact).code == 0

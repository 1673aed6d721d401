"""Every command as its user calls it: results, talk, JSON, exit codes, help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import click
import numpy as np
import pytest

from commands import ENVIRONMENT, TINY, assert_one_line, call, command, files, names, spawn
from mdsnn.cli import COMMANDS, cli
from mdsnn.cli import run as run_command
from mdsnn.cli import verify as verify_command
from mdsnn.kernels import native
from mdsnn.kernels.errors import MissingError

LIFS = 5
"""LIF layers of the tiny student."""
FIVE = ("reference", "numba", "native", "torch", "onnx")


def document(text: str, schema: str) -> dict:
    found = json.loads(text)
    assert found["schema"] == schema
    return found


# --------------------------------------------------------------------------------------------- the commands, in order


def test_train_fills_a_run_folder_and_reports_the_frozen_accuracy(tmp_path: Path) -> None:
    words = ("--paper-setting", "student", "--bits", "3", "--set", "epochs=1", *TINY, "--save_path", tmp_path / "run")
    outcome = call("train", *words, "--json")
    assert outcome.code == 0
    found = document(outcome.out, "mdsnn.train/1")
    assert found["frozen_accuracy"] is not None
    assert found["recipe"]["bits"] == 3
    assert len(found["spike_rates"]) == LIFS
    assert names(tmp_path / "run") == ["last.ckpt", "metrics.csv", "metrics.jsonl", "model.ckpt", "recipe.json"]
    again = call("train", *words)
    assert_one_line(again, 3, "last.ckpt", "exists and is kept", "--force")
    other = call("train", *words, "--resume", "--lr", "0.5")
    assert_one_line(other, 2, "not the same recipe", "lr was")


def test_train_shows_layers_and_accuracy_on_stdout_and_where_it_wrote_on_stderr(tmp_path: Path) -> None:
    outcome = call("train", "--set", "epochs=1", *TINY, "--save-path", tmp_path / "run")
    assert outcome.code == 0
    assert "full precision" in outcome.out.splitlines()[-1]
    assert len(outcome.out.splitlines()) == 1 + LIFS + 1
    assert f"wrote {tmp_path / 'run' / 'model.ckpt'}" in outcome.err
    assert "wrote" not in outcome.out


def test_export_writes_artifact_onnx_and_vectors(tmp_path: Path) -> None:
    made = [tmp_path / name for name in ("a.mdsnn", "a.onnx", "vectors", "a.json")]
    words = ("-o", made[0], "--onnx", made[1], "--vectors", made[2], "--vector-samples", "1", "--json", made[3])
    outcome = call("export", *words, files().student)
    assert outcome.code == 0
    assert made[0].read_bytes() == files().artifact.read_bytes()  # two exports of one student are the same bytes
    assert "proven range" in outcome.out
    found = document(made[3].read_text(), "mdsnn.export/1")
    assert found["written"]["artifact"]["bytes"] == made[0].stat().st_size
    manifest = json.loads((made[2] / "manifest.json").read_text())
    assert manifest["artifact_sha256"] == found["sha256"]
    assert len(manifest["arrays"]) == found["written"]["vectors"]["arrays"]
    for entry in manifest["arrays"]:
        array = np.load(made[2] / f"{entry['name']}.npy", allow_pickle=False)
        words_in_hex = (made[2] / f"{entry['name']}.hex").read_text().split()
        read = np.array([int(word, 16) for word in words_in_hex], f"u{entry['word_bits'] // 8}")
        assert np.array_equal(read.view(entry["dtype"]).reshape(entry["shape"]), array)


def test_export_checks_every_output_before_it_writes_the_first(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "mine.txt").write_text("mine")
    outcome = call("export", files().student, "-o", tmp_path / "a.mdsnn", "--vectors", tmp_path / "vectors")
    assert_one_line(outcome, 3, "vectors", "holds files", "--force")
    assert names(tmp_path) == ["vectors/mine.txt"]
    outcome = call(
        "export", files().student, "-o", tmp_path / "a.mdsnn", "--vectors", tmp_path / "v", "--data", "digts"
    )
    assert_one_line(outcome, 2, "digts", "Did you mean 'digits'?")
    assert names(tmp_path) == ["vectors/mine.txt"]


def test_data_that_is_unknown_lists_what_the_option_takes() -> None:
    outcome = call("verify", files().artifact, "--data", "nosuch", "--executors", "reference,native")
    choices = "choose from builtin:digits, FILE.npy, cifar10, cifar100, digits, digits-events, imagefolder"
    assert_one_line(outcome, 2, "unknown data 'nosuch'", choices)


def test_info_tells_what_is_inside() -> None:
    outcome = call("info", files().artifact)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    found = document(call("info", files().artifact, "--json").out, "mdsnn.info/1")
    assert found["network"]["bytes"] == files().artifact.stat().st_size
    assert f"sha256 {found['network']['sha256']}" in lines[0]
    assert len(lines) == 2 + 1 + len(found["nodes"]) + 1
    assert sum(node["type"] == "Lif" for node in found["nodes"]) == LIFS
    assert "note" not in outcome.out
    assert "note" in call("info", files().artifact, "--notes").out
    assert not outcome.err


def test_run_reads_images_and_batches_alike() -> None:
    made = files()
    batch = document(call("run", made.artifact, made.npy, "--json").out, "mdsnn.run/1")
    assert [sample["name"] for sample in batch["samples"][:2]] == [f"{made.npy}[0]", f"{made.npy}[1]"]
    single = document(call("run", made.artifact, made.png, "--json").out, "mdsnn.run/1")
    assert single["samples"][0]["top"] == batch["samples"][0]["top"]
    assert single["samples"][0]["top"][0]["label"] == str(single["samples"][0]["class"])
    assert_one_line(call("run", made.artifact, made.big_png), 2, str(made.big_png), "24 x 24", "8 x 8", "--resize")
    assert call("run", made.artifact, made.big_png, "--resize").code == 0
    table = call("run", made.artifact, made.png, made.png, "--top", "1")
    assert table.code == 0
    assert len(table.out.splitlines()) == 3
    results = [run_command.classify(str(made.artifact), (str(made.npy),), engine=e) for e in FIVE[:3]]
    assert results[0]["samples"] == results[1]["samples"] == results[2]["samples"]


def test_verify_compares_all_five_executors(tmp_path: Path) -> None:
    made = files()
    words = ("verify", made.artifact, "--checkpoint", made.student, "--onnx", made.onnx, "--limit", "6")
    outcome = call(*words, "--save-dir", tmp_path, "--json", tmp_path / "v.json")
    assert outcome.code == 0, outcome
    found = document((tmp_path / "v.json").read_text(), "mdsnn.verify/1")
    assert list(found["executors"]) == list(FIVE)
    assert found["agrees"] is True
    assert found["differing"] == 0
    assert found["samples"] == 6
    assert found["compared"] == 4 * sum(found["executors"]["torch"]["compared"].values()) > 0
    assert f"{found['compared']} integers compared over 6 samples, 0 differ" in outcome.out
    assert set(found["accuracy"]) == set(FIVE)
    assert names(tmp_path) == ["v.json"]


def test_verify_uses_all_five_unless_told_otherwise() -> None:
    outcome = call("verify", files().artifact, "--limit", "2")
    assert_one_line(outcome, 2, "'torch' needs --checkpoint", "--executors reference,numba,native,onnx")
    for few in ("reference", "native,native", ""):
        assert_one_line(call("verify", files().artifact, "--executors", few), 2, "at least two")
    assert_one_line(call("verify", files().artifact, "--executors", "reference,nativ"), 2, "nativ", "none of")


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_bench_profiles_and_draws(tmp_path: Path) -> None:
    drawing, words = tmp_path / "p.svg", ("bench", files().artifact, "--profile", "--data", files().npy)
    assert call(*words, "--json", tmp_path / "p.json", "--picture", drawing).code == 0
    found = document((tmp_path / "p.json").read_text(), "mdsnn.profile/1")
    convs = [layer for layer in found["layers"] if layer["ceiling_ms"]]
    assert convs
    for layer in found["layers"]:
        assert layer["total_ms"] == pytest.approx(sum(layer[f"{stage}_ms"] for stage in found["stages"]))
    root = ElementTree.parse(drawing).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}line")
    assert len(lines) == len(convs)  # a mark for each ceiling
    names = {text.text for text in root.findall("{http://www.w3.org/2000/svg}text")}
    assert {layer["name"] for layer in found["layers"]} <= names
    shown = call(*words)
    assert shown.code == 0
    assert "measured here at most" in shown.out
    assert_one_line(call("bench", files().artifact, "--picture", "x.svg"), 2, "--profile")
    assert_one_line(call(*words, "--threads", "2"), 2, "one thread")


def test_bench_checks_then_times(tmp_path: Path) -> None:
    words = ("bench", files().artifact, "--data", files().npy, "--executors", "native,reference")
    outcome = call(*words, "--repeats", "3", "--batch-size", "1,8", "--json", tmp_path / "b.json")
    assert outcome.code == 0
    found = document((tmp_path / "b.json").read_text(), "mdsnn.bench/1")
    assert found["equal"] is True
    assert [(row["executor"], row["batch"]) for row in found["rows"]] == [
        ("native", 1),
        ("reference", 1),
        ("native", 8),
        ("reference", 8),
    ]
    assert all(row["ms_per_image"] > 0 for row in found["rows"])
    assert all(0 < layer["density"] < 1 for layer in found["activity"])
    assert_one_line(call("bench", files().artifact, "--executors", "torch", "--data", "digits"), 2, "--checkpoint")
    assert_one_line(
        call("bench", files().artifact, "--data", files().npy, "--executors", "native,native"), 2, "each once"
    )
    assert_one_line(call("bench", files().artifact, "--data", files().npy, "--executors", "nativ"), 2, "none of")
    assert_one_line(call("bench", files().artifact, "--batch-size", "0"), 2, "1..4096")


def test_bench_times_nothing_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdsnn.cli import bench

    def prepare(*_: object) -> object:
        return {"native": lambda pixels: np.zeros((len(pixels), 10), np.int32)}, {}

    monkeypatch.setattr(bench, "prepare", prepare)
    outcome = call("bench", files().artifact, "--data", files().npy)
    assert outcome.code == 1
    assert "differ from the NumPy reference: native; nothing was timed" in outcome.out
    assert "ms/image" not in outcome.out
    found = document(call("bench", files().artifact, "--data", files().npy, "--json").out, "mdsnn.bench/1")
    assert found["rows"] == []
    assert found["differs"] == ["native"]


def test_report_and_chips(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    page, table, activity = tmp_path / "r.html", tmp_path / "r.csv", tmp_path / "a.npz"
    words = ("report", files().artifact, "--data", files().npy, "-o", page, "--csv", table, "--save-activity", activity)
    outcome = call(*words, "--json")
    assert outcome.code == 0, outcome
    document(outcome.out, "mdsnn.report/1")
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    assert len(table.read_text().splitlines()) > LIFS
    again = call("report", files().artifact, "--activity", activity, "--json")
    assert again.code == 0
    assert call("chips").out.count("\n") >= 2
    chip = document(call("chips", "show", "fefet32", "--json").out, "mdsnn.chip/1")
    assert all(constant["source"] for constant in chip["constants"])
    assert_one_line(call("chips", "show"), 2, "name a chip")
    assert_one_line(call("chips", "list", "fefet32"), 2, "mdsnn chips show fefet32")
    assert_one_line(call("report", files().artifact, "-o", tmp_path / "r.pdf"), 2, "r.pdf", ".html")


def test_doctor_names_every_lack_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from mdsnn.cli import doctor

    monkeypatch.setattr(doctor, "_library", lambda name: (name != "torch", "not installed" if name == "torch" else "1"))
    outcome = call("doctor", "--json")
    assert outcome.code == 0
    lacks = [check for check in document(outcome.out, "mdsnn.doctor/1")["checks"] if not check["ok"]]
    assert any(check["part"] == "torch [train]" and ".[train]" in check["cure"] for check in lacks)
    assert all(check["cure"] for check in lacks)
    monkeypatch.setattr(doctor, "_library", lambda name: (False, "not installed"))
    assert call("doctor").code == 3
    monkeypatch.setattr(doctor, "_library", lambda _name: (True, "1"))
    monkeypatch.setenv("MDSNN_ISA", "mmx")
    outcome = call("doctor")
    assert outcome.code == 3
    assert "MDSNN_ISA='mmx' is none of" in outcome.out


def test_the_network_that_ships_needs_nothing_but_itself() -> None:
    info = document(call("info", "builtin:digits", "--json").out, "mdsnn.info/1")
    assert info["network"]["classes"] == 10
    run = document(call("run", "builtin:digits", "builtin:digits", "--json").out, "mdsnn.run/1")
    assert len(run["samples"]) == 64
    outcome = call("verify", "builtin:digits", "--data", "builtin:digits", "--executors", "reference,native", "--json")
    assert outcome.code == 0
    assert document(outcome.out, "mdsnn.verify/1")["accuracy"]["native"] >= 0.9
    bench = call("bench", "builtin:digits", "--executors", "native", "--repeats", "3", "--json")
    assert document(bench.out, "mdsnn.bench/1")["samples_checked"] == 64


# ------------------------------------------------------------------------------------------------- what all share


@pytest.mark.parametrize("place", range(4))
def test_json_stands_anywhere_and_takes_only_a_json_file(tmp_path: Path, place: int) -> None:
    outputs = {}
    for name in ("bare", "file", "equals"):
        target = tmp_path / f"{name}.json"
        option = {"bare": ["--json"], "file": ["--json", str(target)], "equals": [f"--json={target}"]}[name]
        words = ["run", str(files().artifact), str(files().png), "--top=1"]
        outcome = call(*words[: place + 1], *option, *words[place + 1 :])
        assert outcome.code == 0, outcome
        outputs[name] = outcome.out if name == "bare" else target.read_text()
        if name != "bare":
            assert "class (logit)" in outcome.out
    assert len(set(outputs.values())) == 1
    document(outputs["bare"], "mdsnn.run/1")


def test_an_output_that_exists_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("mine")
    made = files()
    for words in (
        ("info", made.artifact),
        ("run", made.artifact, made.png),
        ("bench", made.artifact, "--data", made.npy),
        ("verify", made.artifact, "--executors", "reference,native"),
        ("export", made.student, "-o", tmp_path / "x.mdsnn"),
        ("train", "--save-path", tmp_path / "run"),
        ("doctor",),
        ("chips",),
        ("report", made.artifact),
        ("demo", "--out", tmp_path / "demo"),
    ):
        assert_one_line(call(*words, "--json", target), 3, str(target), "exists and is kept", "--force")
        assert target.read_text() == "mine"
        assert names(tmp_path) == ["out.json"]
    assert call("info", made.artifact, "--json", target, "--force").code == 0
    document(target.read_text(), "mdsnn.info/1")


def test_an_output_is_no_input_and_no_other_output_even_with_force(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(files().student.read_bytes())
    outcome = call("export", checkpoint, "-o", checkpoint, "--force")
    assert_one_line(outcome, 2, str(checkpoint), "is read as an input")
    outcome = call("export", checkpoint, "-o", tmp_path / "a", "--onnx", tmp_path / "." / "a")
    assert_one_line(outcome, 2, "is named as an output already")
    assert checkpoint.read_bytes() == files().student.read_bytes()
    assert names(tmp_path) == ["model.ckpt"]


def test_unknown_words_get_a_suggestion() -> None:
    assert_one_line(call("trian"), 2, "'trian'", "Did you mean 'train'?", "`mdsnn --help`")
    assert_one_line(call("xyzzy"), 2, "The commands are demo, train")
    assert_one_line(call("verify", "a", "--chekpoint", "b"), 2, "Did you mean '--checkpoint'?", "`mdsnn verify --help`")
    assert_one_line(call("train", "--paper_seting", "qamd"), 2, "Did you mean '--paper-setting'?")
    assert_one_line(call("train", "--set", "epoch=3"), 2, "epoch", "Did you mean 'epochs'?")
    assert_one_line(call("train", "--data", "digit"), 2, "Did you mean 'digits'?")
    assert_one_line(call("train", "--set", "data=digits"), 2, "--data")
    endless = call("train", "--set", "taps=" + "[" * 100_000)
    assert_one_line(endless, 2, "taps")
    assert len(endless.err) < 3000
    assert_one_line(call("info", "a", "--json=out.txt"), 2, "'out.txt' does not end in .json")


def test_nothing_at_all_is_help_and_an_error() -> None:
    outcome = call()
    assert outcome.code == 2
    assert not outcome.out
    assert "Commands:" in outcome.err


def test_every_command_teaches_by_example() -> None:
    assert call("--version").out.startswith("mdsnn ")
    top = call("--help")
    assert top.code == 0
    assert not top.err
    context = click.Context(cli)
    for name, line in COMMANDS.items():
        assert line.split()[0] in top.out
        outcome = call(name, "--help")
        assert outcome.code == 0
        assert f"mdsnn {name}" in outcome.out.split("Options:")[0].partition("\n")[2], f"{name}: no example"
        assert "--json" in outcome.out
        assert call(name, "-h").out == outcome.out
        subcommand = cli.get_command(context, name)
        assert subcommand is not None
        for option in subcommand.params:
            assert not isinstance(option, click.Option) or option.help, f"{name}: --{option.name} has no help"


def test_several_faults_are_one_line_each() -> None:
    outcome = call("train", "--bits", "9", "--lr", "nan", "--loss", "CLX")
    assert outcome.code == 2
    assert len(outcome.errors) == len(outcome.err.splitlines()) == 3
    assert all(error.startswith("recipe: ") for error in outcome.errors)


def test_debug_shows_the_traceback_and_keeps_the_exit_code() -> None:
    quiet, loud = call("info", "/nowhere"), call("info", "--debug", "/nowhere")
    assert quiet.code == loud.code == 2
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert loud.errors == quiet.errors
    assert "--debug: no such file" in call("info", "--", "--debug").err


def test_names_cannot_send_control_characters_to_the_terminal() -> None:
    outcome = call("info", "a\x1b[2Jb\udcff")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert "a\\x1b[2Jb\\udcff: no such file" in outcome.err


def test_internal_errors_are_one_line_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(run_command, "classify", broken)
    outcome = call("run", "a", "b")
    assert outcome.code == 3
    assert outcome.err == (
        "mdsnn: error: internal error, ZeroDivisionError: first (this is a bug; --debug shows where)\n"
    )


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (MemoryError(), 3, "out of memory"),
        (OSError(28, "No space left on device"), 3, "standard output: No space left"),
        (PermissionError(13, "Permission denied", "/x/y"), 3, "/x/y: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (KeyboardInterrupt("go on with --resume"), 130, "go on with --resume"),
        (MissingError("no such engine"), 3, "no such engine"),
    ],
)
def test_faults_of_the_machine_have_their_codes(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: int, said: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(verify_command, "check", broken)
    assert_one_line(call("verify", "a"), code, said)


def test_stdout_that_fails_or_closes(tmp_path: Path) -> None:
    words = command("info", files().artifact)
    first = subprocess.run(
        f"{subprocess.list2cmdline(words)} | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert (first.returncode, first.stderr, first.stdout.count(b"\n")) == (0, b"", 1)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False, env=ENVIRONMENT)
    assert done.returncode == 3
    assert done.stderr.decode().splitlines() == ["mdsnn: error: standard output: No space left on device"]
    closed = subprocess.run(
        [*words],
        capture_output=False,
        close_fds=True,
        check=False,
        stdout=None,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: __import__("os").close(1),
    )
    assert closed.returncode == 0


# --------------------------------------------------------------------------------------------------- what it imports


def test_help_imports_no_numpy_and_no_more_than_click() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom mdsnn.cli import main\ncode = main(sys.argv[1:])\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(code, sorted(new - {'mdsnn', 'click'}), file=sys.stderr)"
    )
    for words in (["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=True, text=True)
        assert done.stderr == "0 []\n", (words, done.stderr)


AUDIT = """
import atexit, sys
seen = []
def hook(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] in ("torch", "onnx", "onnxruntime", "sklearn", "numba"):
        seen.append(arguments[0])
    elif event == "pickle.find_class":
        seen.append(event)
sys.addaudithook(hook)
atexit.register(lambda: seen and sys.stderr.write(f"AUDIT {seen}"))
"""


def test_running_imports_no_torch_and_unpickles_nothing() -> None:
    made = files()
    for network, data in ((made.artifact, made.npy), ("builtin:digits", "builtin:digits")):
        for words in (
            ("info", network, "--json"),
            ("run", network, data, "--json"),
            ("verify", network, "--data", data, "--executors", "native,reference"),
            ("bench", network, "--executors", "native,reference", "--repeats", "3", "--data", data, "--json"),
        ):
            outcome = spawn(*words, prelude=AUDIT)
            assert outcome.code == 0, outcome
            assert "AUDIT" not in outcome.err, outcome.err
    caught = spawn("verify", made.artifact, "--executors", "reference,onnx", "--limit", "1", prelude=AUDIT)
    assert "AUDIT" in caught.err  # the hook sees what it is there to see

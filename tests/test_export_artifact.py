"""The artifact: it comes back bit for bit, and what is not exactly one is refused by a message that names the place."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from hostile import ODD_VALUES, at, branches, hunt, judge, leaves, put, sign, small_artifacts, take_apart
from mdsnn.export import artifact
from mdsnn.export.verify import compare_constants
from mdsnn.kernels.container import canonical_json
from mdsnn.kernels.engine import Engine
from mdsnn.kernels.errors import ArtifactError, InputError, NetworkError, StorageError
from mdsnn.kernels.formats import Grid, decode_table, image_table, requantize_thresholds, unpack_nibbles
from mdsnn.kernels.network import (
    NODE_TYPES,
    BnAffine,
    BnDense,
    Conv,
    Flatten,
    InputSpec,
    InputTable,
    IntegerNetwork,
    Lif,
    Linear,
    Readout,
)
from planted import assert_same_bits, network_cases, seeded_case


def refused(content: bytes, *texts: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        artifact.from_bytes(content, "net.mdsnn")
    message = str(caught.value)
    assert message.startswith("net.mdsnn: ")
    assert "\n" not in message
    for text in texts:
        assert text in message
    return message


@pytest.fixture(scope="module")
def every_type() -> bytes:
    """One artifact that holds all node types."""
    for seed in range(3000):
        network, _ = seeded_case(seed, max_channels=4, max_timesteps=2)
        if {type(node).__name__ for node in network.nodes} >= set(NODE_TYPES) - {"Flatten", "MaxPool", "SumPool"}:
            kinds = {type(node).__name__ for node in network.nodes}
            if "Flatten" in kinds and kinds & {"MaxPool", "SumPool"} and network.classes > 1:
                break
    else:
        raise AssertionError("no planted network holds them")
    labels = tuple(f"class {i}" for i in range(network.classes))
    return artifact.to_bytes(replace(network, labels=labels, notes={"made by": "a test", "ünï": "cödé"}))


@pytest.fixture(scope="module")
def small() -> bytes:
    """An artifact of at most 4 kB."""
    return small_artifacts(4096, 1)[0]


@pytest.fixture(scope="module")
def shipped() -> bytes:
    """The artifact that ships in the package; while there is none, a planted one of about its size."""
    try:
        return artifact.builtin("digits", ".mdsnn")
    except InputError:
        sizes = ((abs(len(content) - 100_000), content) for content in map(planted_bytes, range(60)))
        return min(sizes)[1]


def planted_bytes(seed: int) -> bytes:
    return artifact.to_bytes(seeded_case(seed, max_channels=130)[0])


# --------------------------------------------------------------------------------------------------- round trip


@given(network_cases(max_channels=64, max_timesteps=4))
@settings(max_examples=60, deadline=None)
def test_a_network_comes_back_with_every_field_and_bit(case):
    network, pixels = case
    network = replace(network, labels=tuple(f"label {i}" for i in range(network.classes)), notes={"b": "1", "a": "é"})
    content = artifact.to_bytes(network)
    again = artifact.from_bytes(content)
    assert compare_constants(again, network) == []
    assert (again.labels, dict(again.notes)) == (network.labels, dict(network.notes))
    for got, want in zip(again.nodes, network.nodes, strict=True):
        for attribute in type(want).ARRAYS:
            assert_same_bits(getattr(got, attribute), getattr(want, attribute), f"{want.name}.{attribute}")
    assert artifact.to_bytes(again) == content
    got, want = (Engine(n, "reference", 1).run(pixels).logits for n in (again, network))
    assert_same_bits(got, want, "logits")


def test_stock_safetensors_reads_the_tensors_an_artifact_is_made_of():
    for seed in range(20):
        network, _ = seeded_case(seed, max_channels=16)
        stock = safetensors.numpy.load(artifact.to_bytes(network))
        assert set(stock) == {f"{node.name}/{attribute}" for node in network.nodes for attribute in node.ARRAYS}
        for node in network.nodes:
            for attribute in node.ARRAYS:
                stored, array = stock[f"{node.name}/{attribute}"], getattr(node, attribute)
                if attribute == "weight" and node.bits <= 4:
                    stored = unpack_nibbles(stored, array.size).reshape(array.shape)
                assert np.array_equal(stored, array)
                assert stored.dtype.itemsize <= array.dtype.itemsize


_AGAIN = """
import hashlib, sys
from dataclasses import replace
from mdsnn.export import artifact
network = artifact.load(sys.argv[1])
words = {"note %d" % i for i in range(50)}  # a set: its order changes with the seed
print(list(words)[:3])
content = artifact.to_bytes(replace(network, notes={word: word for word in words}))
print(hashlib.sha256(content).hexdigest())
"""


def test_the_same_network_is_the_same_bytes_in_every_process(every_type, tmp_path):
    path = tmp_path / "net.mdsnn"
    path.write_bytes(every_type)
    runs = [
        subprocess.run(
            [sys.executable, "-c", _AGAIN, str(path)],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "LC_ALL": locale},
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        for seed, locale in (("0", "C"), ("1", "C.UTF-8"), ("2", "C"), ("12345", "tr_TR.UTF-8"), ("4294967295", "C"))
    ]  # fmt: skip
    assert len({order for order, _ in runs}) > 1, "the order never changed: this test shows nothing"
    assert len({digest for _, digest in runs}) == 1


def test_the_digest_is_the_files(every_type):
    assert artifact.digest(artifact.from_bytes(every_type)) == hashlib.sha256(every_type).hexdigest()


def test_layer_sizes_add_up_to_the_data_of_the_file(every_type):
    network = artifact.from_bytes(every_type)
    sizes = artifact.layer_sizes(network)
    length = int.from_bytes(every_type[:8], "little")
    assert sum(size.weight_bytes + size.table_bytes for size in sizes) == len(every_type) - 8 - length
    for size in sizes:
        node: Any = network[size.name]
        if "weight" in node.ARRAYS:
            count = int(np.prod(node.weight.shape))
            assert (size.parameters, size.float_bytes, size.bits) == (count, 4 * count, node.bits)
            assert size.weight_bytes == ((count + 1) // 2 if node.bits <= 4 else count)


def test_saving_is_whole_and_never_overwrites_unasked(small, tmp_path):
    path = tmp_path / "net.mdsnn"
    network = artifact.from_bytes(small)
    assert artifact.save(network, path) == len(small)
    assert path.read_bytes() == small
    with pytest.raises(StorageError, match="exists and is kept"):
        artifact.save(network, path)
    artifact.save(network, path, force=True)
    assert artifact.to_bytes(artifact.load(path)) == small
    assert os.listdir(tmp_path) == ["net.mdsnn"]


def test_a_file_that_is_not_there_or_empty_or_a_folder_is_an_input_error(tmp_path):
    (tmp_path / "empty.mdsnn").touch()
    for name, text in (("none.mdsnn", "no such file"), ("empty.mdsnn", "empty"), ("", "folder")):
        with pytest.raises(InputError, match=text):
            artifact.load(tmp_path / name)


@pytest.mark.parametrize("name", ["nothing", "", "../mdsnn/__init__", "digits.mdsnn", "/etc/passwd", "x\0"])
def test_a_builtin_that_is_not_there_is_an_input_error_and_no_path(name):
    with pytest.raises(InputError, match="no such built-in; there is"):
        artifact.load("builtin:" + name)


# ------------------------------------------------------------------------------------------------ damaged files


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit >> 3] ^= 1 << (bit & 7)
    return bytes(changed)


def test_every_single_bit_flip_of_a_small_artifact_is_refused(small):
    assert len(small) <= 4096
    for bit in range(8 * len(small)):
        with pytest.raises(ArtifactError):
            artifact.from_bytes(flipped(small, bit), f"bit {bit}")


def test_every_header_bit_of_the_shipped_artifact_is_refused(shipped):
    for bit in range(8 * (8 + int.from_bytes(shipped[:8], "little"))):
        with pytest.raises(ArtifactError):
            artifact.from_bytes(flipped(shipped, bit), f"bit {bit}")


def test_20000_random_bits_of_the_shipped_artifact_are_refused(shipped):
    for bit in np.random.default_rng(0).choice(8 * len(shipped), 20_000, replace=False).tolist():
        with pytest.raises(ArtifactError):
            artifact.from_bytes(flipped(shipped, bit), f"bit {bit}")


def test_a_small_artifact_cut_at_every_length_is_refused(small):
    for length in range(len(small)):
        with pytest.raises(ArtifactError):
            artifact.from_bytes(small[:length], f"length {length}")


def test_an_artifact_with_anything_behind_it_is_refused(small):
    for tail in (b"\0", b" ", b"\n", b"\0" * 8, b"\xff" * 100, small):
        refused(small + tail)


def test_2000_raw_mutants_are_refused():
    outcomes = hunt("raw", 2000, 1, small_artifacts(8000, 10))
    assert outcomes["read"] == 0
    assert outcomes["refused"] > 1900


def test_2000_signed_mutants_are_refused_or_written_the_same_again():
    outcomes = hunt("signed", 2000, 2, small_artifacts(5000, 20))
    assert outcomes["refused"] > 1000
    assert outcomes["read"] > 50, "mutants that pass the reader are needed, or its deeper checks were never tried"


# ------------------------------------------------------------------------------------------- documents that lie


def test_a_newer_format_version_says_so(small):
    document, tensors = take_apart(small)
    refused(sign({**document, "format_version": 2}, tensors), "format version 2 is newer than 1", "Upgrade mdsnn")
    # even when nothing else in it can be understood
    refused(sign({"format_version": 3, "layers": [1.5]}, {}), "format version 3 is newer than 1")


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_a_format_version_that_is_none_is_refused(small, version):
    document, tensors = take_apart(small)
    refused(sign({**document, "format_version": version}, tensors), "format_version")


def test_an_empty_document_is_refused():
    refused(sign({}, {}), "no format_version")


def test_every_claim_that_lies_is_refused_by_node_and_claim(every_type):
    document, tensors = take_apart(every_type)
    lies = 0
    for place, node in enumerate(document["nodes"]):
        for path in leaves(node["claims"]):
            truth = at(node["claims"], path)
            for lie in [truth + 1, truth - 1] if type(truth) is int else ["stream" if truth != "stream" else "codes"]:
                changed = put(document, ("nodes", place, "claims", *path), lie)
                refused(sign(changed, tensors), f"node {node['name']!r}: it claims {path[0]} = ")
                lies += 1
        for claim in node["claims"]:
            changed = put(document, ("nodes", place, "claims"), {k: v for k, v in node["claims"].items() if k != claim})
            refused(sign(changed, tensors), f"node {node['name']!r}: claims: key {claim!r} is missing")
        changed = put(document, ("nodes", place, "claims", "acc_bits"), 16)
        refused(sign(changed, tensors), f"node {node['name']!r}: claims: unknown key 'acc_bits'")
    assert lies > 150


def test_claims_of_a_wider_or_narrower_accumulator_are_lies(every_type):
    document, tensors = take_apart(every_type)
    for place, node in enumerate(document["nodes"]):
        if node["type"] in ("Conv", "Linear"):
            low, high = node["claims"]["range"]
            for lie in (
                [low, high + 1],
                [low - 1, high],
                [0, 0],
                [high, low],
                [-(2**40), 2**40],
                [low],
                [low, high, 0],
            ):
                if lie != [low, high]:
                    changed = put(document, ("nodes", place, "claims", "range"), lie)
                    refused(sign(changed, tensors), "it claims range")


def test_every_leaf_replaced_by_another_type_is_refused(every_type):
    """Booleans and floats that equal their integer too; texts of labels and notes may be other texts."""
    document, tensors = take_apart(every_type)
    tried = 0
    for path in leaves(document):
        was = at(document, path)
        odd = [value for value in ODD_VALUES if type(value) is not type(was)]
        if type(was) is int:
            odd += [float(was), bool(was), str(was), [was]]
        for value in odd[tried % 13 :: 13] + odd[-4:]:
            refused(sign(put(document, path, value), tensors))
            tried += 1
    assert tried > 1000


def test_every_leaf_replaced_by_an_odd_value_is_refused_or_written_the_same_again(every_type):
    document, tensors = take_apart(every_type)
    for number, path in enumerate(leaves(document)):
        for value in ODD_VALUES[number % 9 :: 9]:
            if type(value) is type(at(document, path)):
                judge(sign(put(document, path, value), tensors), run=False)


def test_every_unknown_or_missing_key_is_refused(every_type):
    document, tensors = take_apart(every_type)
    for path in branches(document):
        here = at(document, path)
        if path == ("notes",):
            continue
        if isinstance(here, dict):
            refused(sign(put(document, path, {**here, "x": 1}), tensors), "unknown key 'x'")
            for key in here:
                refused(sign(put(document, path, {k: v for k, v in here.items() if k != key}), tensors))
        elif here:
            refused(sign(put(document, path, here[:-1]), tensors))
            refused(sign(put(document, path, [*here, here[0]]), tensors))


def test_every_tensor_missing_or_left_over_is_refused(every_type):
    document, tensors = take_apart(every_type)
    for name in tensors:
        refused(sign(document, {k: v for k, v in tensors.items() if k != name}), "is missing", name)
    for name in ("x", "", "input/extra", "__metadata__x"):
        refused(sign(document, {**tensors, name: np.zeros(3, np.int8)}), "belongs to no node")


def test_every_tensor_of_another_dtype_or_shape_is_refused(every_type):
    document, tensors = take_apart(every_type)
    for name, tensor in tensors.items():
        others = [tensor.astype(code) for code in ("i1", "u1", "i2", "i4", "i8", "f4", "f8") if tensor.dtype != code]
        others = [other for other in others if np.array_equal(other, tensor)]
        with_nan = tensor.astype("f4")
        with_nan.reshape(-1)[0] = np.nan
        shapes = [tensor.reshape(-1)[:-1], np.append(tensor.reshape(-1), tensor.reshape(-1)[-1:]), tensor[None]]
        empty = [tensor.reshape(-1)[:0], tensor.reshape(-1)[0].reshape(())]
        for other in [*others, with_nan, *shapes, *empty]:
            assert "node " in refused(sign(document, {**tensors, name: other}))


def test_a_dirty_nibble_behind_an_odd_count_is_refused():
    nodes = _wide(4, 9, 3)
    document, tensors = take_apart(artifact.to_bytes(nodes))
    assert tensors["fc/weight"].size == 14
    tensors["fc/weight"][-1] |= 0x10
    refused(sign(document, tensors), "node 5", "fc/weight", "padding nibble")


def test_a_code_of_4_bits_outside_its_range_is_refused():
    document, tensors = take_apart(artifact.to_bytes(_wide(4, 9, 3)))
    tensors["fc/weight"][0] = 0x08  # -8 in the low nibble
    refused(sign(document, tensors), "node 'fc'", "outside -7..7")


def test_a_weight_shape_of_the_same_size_is_refused_by_what_it_feeds(every_type):
    document, tensors = take_apart(every_type)
    for place, node in enumerate(document["nodes"]):
        shape = node.get("weight_shape")
        if shape and len(set(shape)) > 1:
            refused(sign(put(document, ("nodes", place, "weight_shape"), shape[::-1]), tensors), "node ")


@pytest.mark.parametrize("names", [["\ud800"], ["a\x00b"], ["a\nb"]])
def test_texts_that_cannot_be_printed_are_refused(small, names):
    document, tensors = take_apart(small)
    refused(sign({**document, "notes": {names[0]: "x"}}, tensors), "printable")
    refused(sign({**document, "notes": {"x": names[0]}}, tensors), "printable")
    refused(sign({**document, "labels": names * 3}, tensors), "printable")
    changed = put(document, ("nodes", 0, "name"), names[0])
    changed["nodes"][1]["source"] = names[0]
    moved = {names[0] + "/table": tensors["input/table"], **{k: v for k, v in tensors.items() if k != "input/table"}}
    refused(sign(changed, moved), "is no name")


@pytest.mark.parametrize("value", [2**63, -(2**70), 10**400, 2**31])
def test_huge_integers_are_refused_at_every_integer(every_type, value):
    document, tensors = take_apart(every_type)
    for path in leaves(document)[:: 1 if value == 2**63 else 7]:
        if type(at(document, path)) is int:
            refused(sign(put(document, path, value), tensors))


def test_nothing_in_a_file_is_followed_or_run(small, monkeypatch):
    opened: list[str] = []
    document, tensors = take_apart(small)
    changed = put(document, ("nodes", 0, "name"), "file:///etc/passwd")
    changed["notes"] = {"path": "/etc/passwd", "url": "http://localhost/"}
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in (
            "open",
            "exec",
            "compile",
            "import",
            "socket.connect",
            "pickle.find_class",
            "os.system",
        ):
            opened.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    try:
        with pytest.raises(ArtifactError):
            artifact.from_bytes(sign(changed, tensors))
        artifact.from_bytes(sign({**document, "notes": changed["notes"]}, tensors))
    finally:
        active = False
    assert opened == []


# ---------------------------------------------------------------------------------------------- memory and time


def _lif(name: str, source: str) -> Lif:
    return Lif(name, source, 4, decode_table(0.6, 0.5, 4, Grid()), requantize_thresholds(0.6, 4, Grid()), 255)


def _bn(name: str, source: str, channels: int) -> BnAffine:
    return BnAffine(name, source, np.full(channels, 3), np.zeros(channels, np.int64), np.zeros(channels, np.uint8))


def _wide(bits: int, inputs: int, outputs: int, dense_entries: int = 0) -> IntegerNetwork:
    """A square image of `inputs` pixels through a Linear of `outputs` rows."""
    side = int(inputs**0.5)
    weight = np.random.default_rng(0).integers(-1, 2, (outputs, inputs), dtype=np.int8)
    bn: BnAffine | BnDense = _bn("bn2", "fc", outputs)
    if dense_entries:
        weight[:] = 0
        weight[0, : (dense_entries - outputs) // 127] = 127
        bn = BnDense("bn2", "fc", np.zeros(outputs + (dense_entries - outputs) // 127 * 127, np.int32))
    nodes = (
        InputTable("input", image_table([0.5], [0.25])),
        Conv("conv", "input", np.ones((1, 1, 1, 1), np.int8), 4),
        _bn("bn", "conv", 1),
        _lif("lif", "bn"),
        Flatten("flat", "lif"),
        Linear("fc", "flat", weight, bits),
        bn,
        _lif("lif2", "bn2"),
        Readout("readout", "lif2", np.ones((1, outputs), np.int8), 8, np.array([0])),
    )
    return IntegerNetwork(nodes, InputSpec(1, side, side), 1)


def assert_bounded(content: bytes) -> None:
    """What the design promises: 3 times the file and 64 MiB, the file itself counted."""
    tracemalloc.start()
    try:
        with contextlib.suppress(ArtifactError):
            artifact.from_bytes(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + len(content) <= 3 * len(content) + (64 << 20)


@pytest.mark.parametrize(
    ("bits", "inputs", "outputs", "dense_entries"),
    [(4, 4096, 4096, 0), (8, 4096, 4096, 0), (8, 400**2, 1, 2**24 - 200), (2, 1, 2**18 - 2, 0)],
    ids=["packed weights", "8-bit weights", "a dense table at its limit", "rows at their limit"],
)
def test_loading_takes_at_most_3_times_the_file_and_64_mib(bits, inputs, outputs, dense_entries):
    content = artifact.to_bytes(_wide(bits, inputs, outputs, dense_entries))
    assert len(content) > 1 << 20
    assert_bounded(content)


@pytest.mark.parametrize("element", ["{}", "[]", '"ab"', "1", '{"a":1}', "[[]]", '{"a":"b","c":{}}', "1.5", "10000"])
def test_a_document_of_many_small_things_takes_little_memory_and_time(element):
    count = 500_000 // (len(element) + 1)
    value = [json.loads(element)] * count
    for key in ("labels", "nodes", "x"):
        document = {"format_version": 1, key: value}
        try:
            content = sign(document, {})
        except ArtifactError:  # over a header's limit with its escapes
            content = sign({"format_version": 1, key: value[: count // 3]}, {})
        start = time.process_time()
        refused(content)
        assert time.process_time() - start < 5.0
    assert_bounded(content)


_LIMITED = """
import resource, sys
from mdsnn.export import artifact
from mdsnn.kernels.errors import ArtifactError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 3 * int(sys.argv[2]) + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
artifact.load(sys.argv[1])
print("read")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_a_file_loads_under_a_hard_limit_of_address_space(tmp_path):
    path = tmp_path / "net.mdsnn"
    size = artifact.save(_wide(4, 4096, 8192), path)
    command = [sys.executable, "-c", _LIMITED, str(path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY or done.returncode == 0


def test_a_file_whose_header_promises_gigabytes_is_refused_without_allocating_them():
    document, _ = take_apart(artifact.to_bytes(_wide(4, 9, 3)))
    document = put(document, ("nodes", 5, "weight_shape"), [2**31, 2**31])
    content = sign(document, {"fc/weight": np.zeros(14, np.uint8)})
    assert_bounded(content)
    refused(content)


def test_claims_are_compared_as_json():
    """True == 1 == 1.0 in Python, but not in a file."""
    assert canonical_json(True) != canonical_json(1) != canonical_json(1.0)
    with pytest.raises(NetworkError):
        InputTable("x", np.array([[1.0]]))


# ------------------------------------------------------------------------------------------------------ the page

_spec = importlib.util.spec_from_file_location(
    "artifact_example", Path(__file__).parent.parent / "docs/artifact_example.py"
)
assert _spec is not None
assert _spec.loader is not None
artifact_example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(artifact_example)


def test_the_example_of_the_page_is_what_its_script_writes():
    text = artifact_example.PAGE.read_text("utf-8")
    assert artifact_example.page(text) == text


def test_the_example_of_the_page_is_an_artifact_byte_by_byte():
    """The dump's rows are where it says they are in the file it describes, and the document is that file's."""
    text = artifact_example.PAGE.read_text("utf-8")
    content = artifact.to_bytes(artifact_example.example())
    assert f"an artifact of {len(content)} bytes" in text
    rows = re.findall(r"^(\d+) +((?:[0-9a-f]{2} ?)+)", text[text.index("```text") :], re.MULTILINE)
    assert len(rows) == 11
    for offset, data in rows:
        at = int(offset)
        assert content[at : at + len(bytes.fromhex(data))] == bytes.fromhex(data)
    shown = json.loads(text[text.index("```json") + 7 : text.rindex("```")])
    document, _ = take_apart(content)
    assert canonical_json(shown) == canonical_json(document)
    assert hashlib.sha256(content).hexdigest() in text


def test_the_page_names_every_node_type_key_and_claim(every_type):
    text = artifact_example.PAGE.read_text("utf-8")
    document, tensors = take_apart(every_type)
    words = {key for node in document["nodes"] for key in (*node, *node["claims"])} | set(document) | set(NODE_TYPES)
    words |= {name.rpartition("/")[2] for name in tensors} | set(document["grid"]) | set(document["input"])
    assert {word for word in words if f"`{word}`" not in text} == set()

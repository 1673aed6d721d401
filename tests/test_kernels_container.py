"""The strict container: one content has one spelling, and every other spelling is refused by name."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hostile import forge, signed_header, signed_text
from mdsnn.kernels import container
from mdsnn.kernels.container import canonical_json, pack, unpack
from mdsnn.kernels.errors import ArtifactError, CheckpointError

KEY = "mdsnn.test"
DTYPES = ["i1", "u1", "<i2", "<i4", "<i8", "<f4", "<f8"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text().filter(lambda k: k != "sha256"), inner, max_size=4)
    ),
    max_leaves=10,
)
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")


def refused(content: bytes, *texts: str, key: str = KEY) -> None:
    with pytest.raises(ArtifactError) as caught:
        unpack(content, key, "file.x")
    assert str(caught.value).startswith("file.x: ")
    for text in texts:
        assert text in str(caught.value)


@given(st.dictionaries(NAMES, ARRAYS, max_size=5), st.dictionaries(st.just("d"), JSON))
@settings(max_examples=100)
def test_documents_and_tensors_come_back_and_are_packed_the_same_again(tensors, document):
    content = pack(tensors, document, KEY)
    again, arrays = unpack(content, KEY, "x")
    assert canonical_json(again) == canonical_json(document)
    assert set(arrays) == set(tensors)
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (tensors[name].dtype, tensors[name].shape)
        assert array.tobytes() == tensors[name].tobytes()
        assert not array.flags.writeable
        assert array.flags.aligned
    assert pack(arrays, again, KEY) == content


@given(st.dictionaries(NAMES.filter(bool), ARRAYS, max_size=5))
@settings(max_examples=60)
def test_stock_safetensors_reads_the_same_tensors(tensors):
    stock = safetensors.numpy.load(pack(tensors, {"n": 1}, KEY))
    assert set(stock) == set(tensors)
    for name, array in stock.items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            tensors[name].dtype,
            tensors[name].shape,
            tensors[name].tobytes(),
        )


def test_the_bytes_are_where_the_layout_says():
    content = pack(
        {"b": np.array([1, 2], np.int8), "a": np.array([3], np.int8), "c": np.array([4], np.int64)}, {"z": 1}, KEY
    )
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert content[8 + length :] == (4).to_bytes(8, "little") + bytes([3, 1, 2])  # widest first, then by name
    header = json.loads(content[8 : 8 + length])
    assert header["a"] == {"dtype": "I8", "shape": [1], "data_offsets": [8, 9]}
    document = json.loads(header["__metadata__"][KEY])
    stated = document["sha256"]
    empty = content[8 : 8 + length].replace(stated.encode(), b"")
    empty = empty.rstrip(b" ") + b" " * (-len(empty.rstrip(b" ")) % 8)
    assert hashlib.sha256(empty + content[8 + length :]).hexdigest() == stated


def test_memory_order_and_byte_order_of_the_source_do_not_matter():
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    want = pack({"a": array}, {}, KEY)
    for same in (np.asfortranarray(array), array.astype(">i4"), array[:, :, ::-1][:, :, ::-1], array.tolist()):
        assert pack({"a": np.asarray(same, dtype=getattr(same, "dtype", np.int32))}, {}, KEY) == want


@pytest.mark.parametrize(
    "array", [np.zeros(2, bool), np.zeros(2, np.uint16), np.zeros(2, complex), np.zeros((1,) * 9, np.int8)]
)
def test_what_the_container_does_not_hold_is_not_packed(array):
    with pytest.raises(ArtifactError, match=r"'a'.*cannot be stored"):
        pack({"a": array}, {}, KEY)
    with pytest.raises(ArtifactError, match="__metadata__"):
        pack({"__metadata__": np.zeros(2, np.int8)}, {}, KEY)


def test_a_header_over_its_limit_is_neither_written_nor_read():
    with pytest.raises(ArtifactError, match="over 1048576"):
        pack({}, {"text": "x" * (1 << 20)}, KEY)
    refused((2**20 + 8).to_bytes(8, "little") + b" " * (2**20 + 8), "no multiple of 8 in 8..1048576")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_has_no_nan(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"a": value})


GOOD = pack({"a": np.array([1, 2, 3], np.int8)}, {"n": 1}, KEY)
HEADER = GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")].decode().rstrip()
DATA = b"\1\2\3"


def test_the_good_file_of_these_tests_is_read_and_forging_it_gives_it_again():
    assert unpack(GOOD, KEY, "x")[0] == {"n": 1}
    assert forge(HEADER, DATA) == GOOD
    assert signed_header({"a": {"data_offsets": [0, 3], "dtype": "I8", "shape": [3]}}, {"n": 1}, KEY, DATA) == GOOD


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_a_file_cut_at_any_byte_is_refused(length):
    refused(GOOD[:length])


@pytest.mark.parametrize("tail", [b"\0", b" ", b"\n", b"\0" * 8, GOOD])
def test_a_file_with_a_tail_is_refused(tail):
    refused(GOOD + tail)


def test_every_flipped_bit_is_refused():
    for bit in range(8 * len(GOOD)):
        changed = bytearray(GOOD)
        changed[bit // 8] ^= 1 << bit % 8
        refused(bytes(changed))


@pytest.mark.parametrize("length", [0, 1, 3, 7, 9, 2**32, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_refused(length):
    refused(length.to_bytes(8, "little") + GOOD[8:], "header: its length says", "no multiple of 8 in 8..1048576")


@pytest.mark.parametrize(
    "text",
    [
        HEADER.replace('"dtype":"I8"', '"dtype": "I8"'),
        HEADER.replace('"dtype":"I8"', '"dtype":"I8","dtype":"I8"'),
        HEADER.replace('"dtype":"I8"', '"dtype":"\\u00498"'),
        HEADER.replace("[0,3]", "[0,3.0]"),
        HEADER.replace("[0,3]", "[0,3e0]"),
        HEADER.replace("[0,3]", "[-0,3]"),
        HEADER.replace('"data_offsets":[0,3],"dtype":"I8"', '"dtype":"I8","data_offsets":[0,3]'),
        HEADER.replace('\\"n\\":1', '\\"n\\": 1'),
        HEADER.replace('\\"n\\":1', '\\"n\\":1,\\"n\\":1'),
        HEADER.replace('\\"n\\":1', '\\"n\\":1e0'),
        HEADER.replace("{", " {", 1),
        HEADER + "\t",
        HEADER + "\n       ",
    ],
)
def test_another_spelling_of_the_same_content_is_refused(text):
    assert text != HEADER
    with pytest.raises(ArtifactError, match=r"canonical|padding|sha256"):
        unpack(forge(text, DATA), KEY, "x")
    with pytest.raises(ArtifactError, match=r"canonical|padding|not JSON|a list of integers"):  # though its digest fits
        unpack(signed_text(text, DATA), KEY, "x")


def test_a_second_key_of_metadata_is_refused_though_signed():
    refused(
        signed_text(HEADER.replace('"__metadata__":{', '"__metadata__":{"a":"b",'), DATA),
        "must hold 'mdsnn.test' alone",
    )
    assert signed_text(HEADER, DATA) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "{", "{}x", "NaN", "[NaN]", "Infinity", "1e400", "[1e400]", '{"a":-Infinity}', "9" * 5000,
        "[" * 100_000, "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, '"\\ud800"', "\x7f", "\x00",
    ],
)  # fmt: skip
def test_a_header_that_is_no_table_is_refused(text):
    refused(forge(text), "header: ")


@pytest.mark.parametrize("depth", range(20, 1100, 27))
@pytest.mark.parametrize(("open_", "shut"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused_at_any_depth_without_a_recursion_error(depth, open_, shut):
    value = json.loads(open_ * min(depth, 900) + "1" + shut * min(depth, 900))
    if depth <= container.MAX_DEPTH - 1:  # the document itself is one level
        content = signed_header({}, {"d": value}, KEY)
        assert unpack(content, KEY, "x")[0] == {"d": value}
    else:
        text = open_ * depth + "1" + shut * depth
        document = '{"d":' + text + ',"sha256":"' + "x" * 64 + '"}'  # no digest: the text is read
        refused(forge('{"__metadata__":{' + json.dumps(KEY) + ":" + json.dumps(document) + "}}"), "document: ")


def test_bytes_beyond_ascii_are_refused():
    refused(GOOD[:20] + b"\xc3" + GOOD[21:])
    text = '{"__metadata__":{"mdsnn.test":"\xc3"}}'.encode("latin-1")
    text += b" " * (-len(text) % 8)
    refused(len(text).to_bytes(8, "little") + text, "not ASCII")


def test_padding_beyond_the_next_multiple_of_8_is_refused():
    text = canonical_json({"__metadata__": {KEY: "{}"}}).encode()
    text += b" " * (-len(text) % 8 + 8)
    refused(len(text).to_bytes(8, "little") + text, "padding is not the least")
    signed = HEADER.encode() + b" " * (-len(HEADER) % 8 + 8)
    refused(len(signed).to_bytes(8, "little") + signed + DATA)


LOOKALIKES = [
    {"notes": {"sha256": "0" * 64}},
    {"a": {"sha256": "f" * 64}, "z": {"sha256": "e" * 64}},
    {"a": '"sha256":"' + "0" * 64 + '"'},
    {"a": [{"sha256": "0" * 64}] * 50},
    {"sha": "sha256", "t": '\\"sha256\\":\\"' + "a" * 64 + '\\"'},
]


@pytest.mark.parametrize("document", LOOKALIKES)
def test_texts_that_look_like_the_digest_neither_pass_for_it_nor_stop_it(document):
    tensors = {"a": np.array([1, 2, 3], np.int8)}
    good = pack(tensors, document, KEY)
    assert unpack(good, KEY, "x")[0] == document
    for bit in range(0, 8 * len(good), 7):
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        refused(bytes(changed))


def test_a_digest_that_fits_another_field_is_no_digest():
    """The one lookalike is right for the file without it, but the document's own digest is missing or wrong."""
    for outer in ({}, {"sha256": "x" * 64}, {"sha256": 1}):

        def header(digest: str, outer: dict[str, object] = outer) -> str:
            return canonical_json({"__metadata__": {KEY: canonical_json({"notes": {"sha256": digest}, **outer})}})

        blank = header("").encode()
        digest = hashlib.sha256(blank + b" " * (-len(blank) % 8)).hexdigest()
        refused(forge(header(digest)), "sha256")


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "I8", "shape": [3], "data_offsets": [0, 3], **changes}


BIG = 2**31
BAD_ENTRIES: dict[str, tuple[dict[str, object], str]] = {
    "no metadata, but a list": ({"a": []}, "must have data_offsets, dtype and shape"),
    "another key": ({"a": entry(x=1)}, "must have data_offsets, dtype and shape"),
    "a missing key": ({"a": {"dtype": "I8", "shape": [3]}}, "must have data_offsets, dtype and shape"),
    "an unknown dtype": ({"a": entry(dtype="BF16")}, "dtype 'BF16' is none of I8, U8"),
    "a dtype that is no text": ({"a": entry(dtype=["I8"])}, "is none of I8, U8"),
    "a negative axis": ({"a": entry(shape=[-3])}, "shape must be a list of integers in 0..2147483648"),
    "a bool axis": ({"a": entry(shape=[True, 3])}, "shape must be a list of integers"),
    "a float axis": ({"a": entry(shape=[3.0])}, "shape must be a list of integers"),
    "a huge axis": ({"a": entry(shape=[BIG + 1])}, "shape must be a list of integers"),
    "a shape that is no list": ({"a": entry(shape=3)}, "shape must be a list of integers"),
    "a shape of another size": ({"a": entry(shape=[4])}, "(4,) I8 = 4 bytes, but the file holds 3"),
    "a product that wraps 64 bits": ({"a": entry(shape=[BIG, BIG, 4])}, "over 2147483648 elements"),
    "an empty array that is none": (
        {"a": entry(shape=[0, BIG, BIG, BIG], data_offsets=[0, 0])},
        "over 2147483648 elements",
    ),
    "nine axes": ({"a": entry(shape=[3, 1, 1, 1, 1, 1, 1, 1, 1])}, "9 axes"),
    "one offset": ({"a": entry(data_offsets=[0])}, "1 offsets"),
    "three offsets": ({"a": entry(data_offsets=[0, 3, 3])}, "3 offsets"),
    "offsets reversed": ({"a": entry(data_offsets=[3, 0])}, "but the file holds -3"),
    "bool offsets": ({"a": entry(shape=[1], data_offsets=[False, True])}, "data_offsets must be a list of integers"),
    "a gap at the start": ({"a": entry(shape=[2], data_offsets=[1, 3])}, "starts at byte 1, where 0 is due"),
    "a gap at the end": ({"a": entry(shape=[2], data_offsets=[0, 2])}, "1 bytes follow the last tensor"),
    "beyond the end": ({"a": entry(shape=[4], data_offsets=[0, 4])}, "ends at byte 4, but the file holds 3"),
    "an overlap": (
        {"a": entry(shape=[2], data_offsets=[0, 2]), "b": entry(shape=[2], data_offsets=[1, 3])},
        "tensor 'b': starts at byte 1, where 2 is due",
    ),
    "another order": (
        {"a": entry(shape=[1], data_offsets=[2, 3]), "b": entry(shape=[2], data_offsets=[0, 2])},
        "tensor 'a': starts at byte 2, where 0 is due",
    ),
}


@pytest.mark.parametrize("what", BAD_ENTRIES)
def test_tensors_that_do_not_tile_the_data_are_refused_though_signed(what):
    entries, text = BAD_ENTRIES[what]
    refused(signed_header(entries, {"n": 1}, KEY, DATA), text)


@pytest.mark.parametrize(
    "metadata",
    [
        {}, {"other": "{}"}, {KEY: "{}", "x": "y"}, {KEY: {}}, {KEY: None}, {KEY: "[]"}, {KEY: "1"}, {KEY: "{}"},
        {KEY: '{"sha256":1}'}, {KEY: '{"sha256":""}'}, {KEY: '{"sha256":"' + "0" * 64 + '"}'}, {KEY: "{"},
        {KEY: "\ud800"}, [], "x", None, 1,
    ],
)  # fmt: skip
def test_metadata_that_is_not_one_signed_document_is_refused(metadata):
    refused(forge(canonical_json({"__metadata__": metadata})))


def test_the_right_key_is_part_of_the_right_file():
    refused(GOOD, "must hold 'other' alone", key="other")


def test_the_callers_error_is_raised():
    with pytest.raises(CheckpointError, match=r"^run\.ckpt: "):
        unpack(GOOD[:-1], KEY, "run.ckpt", error=CheckpointError)

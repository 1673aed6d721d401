"""CIFAR's python archives and TinyImageNet's folders, in files made here in their true formats; and hostile ones."""

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdsnn import archives, data
from mdsnn.kernels.errors import ConfigError, InputError, MissingError

RNG = np.random.default_rng(0)
NAMES = [f"class {n}" for n in range(10)]
PIXELS = {name: RNG.integers(0, 256, (2, 3072), np.uint8) for name in (*archives.CIFAR10.train, *archives.CIFAR10.test)}
LABELS = {name: [n, 9 - n] for n, name in enumerate(PIXELS)}


def py2_text(text: bytes) -> bytes:
    """A Python 2 str: SHORT_BINSTRING or BINSTRING."""
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def py2_batch(pixels: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """A batch as Python 2 wrote it: protocol 2, an array by numpy.core.multiarray._reconstruct, memo entries."""
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05U\x01b\x87q\x06Rq\x07"
    shape = b"".join(b"M" + struct.pack("<H", n) for n in pixels.shape) + b"\x86q\x08"
    dtype = (
        b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87q\x0aRq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array += b"(K\x01" + shape + dtype + b"\x89" + py2_text(pixels.tobytes()) + b"tb"
    listed = b"]q\x0c(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    batch = py2_text(b"batch_label") + py2_text(b"batch 1 of 5")
    return b"\x80\x02}q\x01(" + py2_text(b"data") + array + py2_text(key) + listed + batch + b"u."


def py2_meta(names: list[str], key: bytes = b"label_names") -> bytes:
    listed = b"".join(py2_text(name.encode()) for name in names)
    return b"\x80\x02}q\x01(" + py2_text(key) + b"](" + listed + b"e" + py2_text(b"num_vis") + b"M\x00\x0cu."


def members10() -> dict[str, bytes]:
    return {**{n: py2_batch(PIXELS[n], LABELS[n]) for n in PIXELS}, "batches.meta": py2_meta(NAMES)}


def packed(folder: str, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in {"readme.html": b"<html>", **members}.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def check_cifar10(found: data.Dataset) -> None:
    np.testing.assert_array_equal(
        found.train_x.reshape(10, 3072), np.concatenate([PIXELS[name] for name in archives.CIFAR10.train])
    )
    np.testing.assert_array_equal(found.test_x[1], PIXELS["test_batch"][1].reshape(3, 32, 32))
    assert found.train_y.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert found.test_y.tolist() == [5, 4]
    assert (found.labels, found.coding, found.name, found.flips) == (tuple(NAMES), "image", "cifar10", True)


def test_cifar10_is_read_packed_or_not_from_the_folder_or_by_its_own_name(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(packed("cifar-10-batches-py", members10()))
    check_cifar10(data.load("CIFAR10", tmp_path))
    check_cifar10(data.load("cifar10", tmp_path / "cifar-10-python.tar.gz"))
    folder = tmp_path / "other" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in members10().items():
        (folder / name).write_bytes(content)
    check_cifar10(data.load("cifar-10", tmp_path / "other"))
    check_cifar10(data.load("CIFAR10", folder))


def test_cifar100_has_its_fine_labels(tmp_path):
    names = [f"n{n}" for n in range(100)]
    batch = {half: py2_batch(PIXELS["test_batch"], [99, n], b"fine_labels") for n, half in enumerate(("train", "test"))}
    content = packed("cifar-100-python", {**batch, "meta": py2_meta(names, b"fine_label_names")})
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(content)
    found = data.load("CIFAR100", tmp_path)
    assert (found.train_y.tolist(), found.test_y.tolist(), found.labels) == ([99, 0], [99, 1], tuple(names))
    np.testing.assert_array_equal(found.test_x.reshape(2, 3072), PIXELS["test_batch"])


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_plain_pickle_is_what_pickle_makes_of_it(protocol, order):
    value = {
        "data": np.array(PIXELS["test_batch"], order=order),
        "l": [0, 255, 256, 70_000, -1, 1 << 40, True, None],
        "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": []}),
        "s": ["", "\u00fc", "x" * 300, b"", b"\xff\x00"],
    }
    value["again"] = value["l"]
    found = archives.plain_pickle(pickle.dumps(value, protocol), "x")
    np.testing.assert_array_equal(found.pop("data"), value.pop("data"))
    assert found == value
    assert [type(v) for v in found["l"]] == [type(v) for v in value["l"]]


class Program:
    """What a hostile pickle does: call something."""

    def __init__(self, path: object) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(5))
def test_no_pickle_runs_anything(tmp_path, protocol):
    hostile = pickle.dumps({"data": Program(tmp_path / "proof"), "labels": []}, protocol)
    assert pickle.loads(hostile)["data"].close() is None  # it would, for pickle
    (tmp_path / "proof").unlink()
    with pytest.raises(InputError, match=r"^x: byte \d+: the name '_?io open'"):
        archives.plain_pickle(hostile, "x")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no pickle"),
        (b"\x80\x02}", "no pickle"),
        (b"].", "holds a list, not a dict"),
        (b"}cos\nsystem\n.", "the name 'os system'"),
        (b"cnumpy\nndarray\n(I9\ntR.", "a call of ndarray"),
        (b"cnumpy\ndtype\nU\x01O\x85R.", "a call of dtype"),
        (b"}G\x00\x00\x00\x00\x00\x00\x00\x00.", "opcode BINFLOAT"),
        (b"}U\x01aP0\n.", "opcode PERSID"),
        (b"}}K\x01s.", "a key of type dict"),
        (b"]K\x01K\x02s.", "no dict"),
        (b"}K\x01a.", "no list"),
        (b"h\x05.", "no pickle"),
        (b"}U\x01ac_codecs\nencode\nU\x01xU\x06utf-16\x86Rs.", "a call of encode"),
        (b"}(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(1025)) + b"u.", "more than 1024 entries"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(content, words):
    with pytest.raises(InputError, match=words):
        archives.plain_pickle(content, "x")


def test_an_array_must_fit_its_bytes():
    good = py2_batch(PIXELS["test_batch"], [1, 2])
    for old, new in ((b"M\x02\x00M\x00\x0c", b"M\xff\xffM\xff\xff"), (b"U\x02u1", b"U\x02f4")):
        assert good.count(old) == 1
        with pytest.raises(InputError, match=r"do not fit each other|a call of dtype"):
            archives.plain_pickle(good.replace(old, new), "x")
    bare = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    with pytest.raises(InputError, match="an array without content"):
        archives.plain_pickle(b"}U\x04data" + bare + b"s.", "x")


SMALL = py2_batch(np.zeros((1, 6), np.uint8), [3])


@settings(deadline=None, max_examples=300)
@given(
    at=st.integers(0, len(SMALL) - 1), byte=st.integers(0, 255), cut=st.integers(0, len(SMALL)), cutting=st.booleans()
)
def test_a_damaged_pickle_is_read_or_refused_never_more(at, byte, cut, cutting):
    content = SMALL[:cut] if cutting else SMALL[:at] + bytes([byte]) + SMALL[at + 1 :]
    try:
        found = archives.plain_pickle(content, "x")
    except InputError:
        return
    assert type(found) is dict
    assert not cutting or cut == len(SMALL)


def test_a_pickle_may_not_make_more_than_it_needs(monkeypatch):
    monkeypatch.setattr(archives, "MAX_OPCODES", 50)
    lists = b"}U\x01l](" + b"]" * 43 + b"es."
    with pytest.raises(InputError, match="byte 52: more than 50 steps"):
        archives.plain_pickle(lists.replace(b"(]]", b"(]]]]]"), "x")
    assert len(archives.plain_pickle(lists, "x")["l"]) == 43


def test_nested_values_do_not_exhaust_the_stack():
    deep = b"}U\x04data" + b"N" + b"\x85" * 200_000 + b"s."
    assert type(archives.plain_pickle(deep, "x")["data"]) is tuple
    nested = b"}(" + py2_text(b"labels") + b"](N" + b"\x85" * 200_000 + b"e"
    nested += SMALL[SMALL.index(b"U\x04data") : SMALL.index(b"U\x06labels")].replace(b"M\x06\x00", b"M\x00\x0c")
    nested = nested.replace(b"U\x06" + bytes(6), b"T" + struct.pack("<i", 3072) + bytes(3072)) + b"u."
    with pytest.raises(InputError, match=r"label 0 is no whole number in 0..9"):
        archives._batch(nested, "x", "labels", 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"data_batch_3": py2_batch(PIXELS["test_batch"], [1, 10])},
            r"data_batch_3: label 1 is no whole number in 0..9",
        ),
        ({"data_batch_3": py2_batch(PIXELS["test_batch"], [1])}, "data_batch_3: 'labels' is no list of 2 labels"),
        ({"test_batch": py2_batch(PIXELS["test_batch"][:, :3071], [1, 2])}, r"'data' is \[2, 3071\]"),
        ({"test_batch": py2_meta(NAMES)}, "'data' is NoneType"),
        ({"batches.meta": py2_meta([])}, "no list of texts called 'label_names'"),
        ({"data_batch_5": None}, "holds no cifar-10-batches-py/data_batch_5"),
    ],
)
def test_an_archive_says_which_member_is_wrong(tmp_path, change, words):
    members = {name: content for name, content in {**members10(), **change}.items() if content is not None}
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(packed("cifar-10-batches-py", members))
    with pytest.raises(InputError, match=words):
        data.load("CIFAR10", tmp_path)


def test_a_damaged_or_boundless_archive_is_refused(tmp_path, monkeypatch):
    whole = packed("cifar-10-batches-py", members10())
    path = tmp_path / "a.tar.gz"
    members = ("test_batch",)
    for content in (whole[:-4], whole[: len(whole) // 2], whole[:-6] + bytes(6), b"no archive", whole[:10] + b"x" * 99):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a whole"):
            archives.unpack(path, "cifar-10-batches-py", members)
    path.write_bytes(whole)
    assert archives.unpack(path, "cifar-10-batches-py", members)["test_batch"] == members10()["test_batch"]
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(InputError, match="more than 3 files"):
        archives.unpack(path, "cifar-10-batches-py", members)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 1024)
    monkeypatch.setattr(archives, "MAX_UNPACKED", len(whole))
    with pytest.raises(InputError, match=f"more than {len(whole)} bytes"):
        archives.unpack(path, "cifar-10-batches-py", members)


@pytest.mark.parametrize("kind", ["twice", "link"])
def test_a_member_is_one_plain_file(tmp_path, kind):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for _ in range(2):
            entry = tarfile.TarInfo("f/m")
            if kind == "link":
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(entry, io.BytesIO())
    with pytest.raises(InputError, match="stands twice"):
        archives.unpack(path, "f", ("m",))


@pytest.fixture
def server():
    """Serves /file and counts what it was asked for."""
    content = {"file": packed("cifar-10-batches-py", members10())}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = content.get(self.path.rsplit("/", 1)[-1])
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(found or b"")))
            self.end_headers()
            self.wfile.write((found or b"")[: content.get("cut")])

        def log_message(self, *_):
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", content
    listening.shutdown()
    listening.server_close()


def test_a_download_appears_whole_and_checked_or_not_at_all(tmp_path, server):
    url, content = server
    whole, seen = content["file"], []
    digest, size = hashlib.sha256(whole).hexdigest(), len(whole)
    target = tmp_path / "new" / "file"
    archives.download(f"{url}/file", target, digest, size, progress=lambda *at: seen.append(at))
    assert target.read_bytes() == whole
    assert seen[-1] == (size, size)
    for sha256, expected, words in ((digest[::-1], size, "Nothing was kept"), (digest, size - 1, "more than")):
        with pytest.raises(InputError, match=words):
            archives.download(f"{url}/file", tmp_path / "bad", sha256, expected)
    content["cut"] = -9
    with pytest.raises((InputError, MissingError), match="by other means and put the file at"):
        archives.download(f"{url}/file", tmp_path / "bad", digest, size)
    with pytest.raises(MissingError, match=rf"Not Found.*Download {url}/none by other means.*{tmp_path}/bad"):
        archives.download(f"{url}/none", tmp_path / "bad", digest, size)
    with pytest.raises(MissingError, match="cannot be downloaded"):
        archives.download("http://127.0.0.1:9/file", tmp_path / "bad", digest, size)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_is_not_there_is_fetched_and_then_stays(tmp_path, server):
    import dataclasses

    url, content = server
    where = f"{url}/cifar-10-python.tar.gz"
    whole = content["cifar-10-python.tar.gz"] = content.pop("file")
    archive = dataclasses.replace(
        archives.CIFAR10, url=where, sha256=hashlib.sha256(whole).hexdigest(), size=len(whole)
    )
    check_cifar10(data.cifar(archive, tmp_path))
    content.clear()
    check_cifar10(data.cifar(archive, tmp_path))


def test_sets_with_files_ask_for_their_path():
    for name in ("CIFAR10", "CIFAR100", "TinyImagenet", "ncaltech101"):
        with pytest.raises(ConfigError, match=f"data '{name.lower()}' needs data_path"):
            data.load(name)


# ---------------------------------------------------------------------------------------------------- TinyImageNet


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for n, wnid in enumerate(("n02", "n01")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for k in range(2):
            picture = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8), "RGB")
            picture = picture.convert("L") if k else picture  # some of the real ones are grey
            picture.save(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG")
        picture.save(root / "val" / "images" / f"val_{n}.JPEG")
        lines.append(f"val_{n}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tinyimagenet_takes_its_classes_from_folders_and_its_test_labels_from_the_list(tiny):
    found = data.load("TinyImagenet", tiny.parent)
    assert (found.labels, found.name, found.flips) == (("n01", "n02"), "tinyimagenet", True)
    assert (found.train_y.tolist(), found.test_y.tolist()) == ([0, 0, 1, 1], [1, 0])
    with Image.open(tiny / "train" / "n02" / "images" / "n02_0.JPEG") as picture:
        np.testing.assert_array_equal(found.train_x[2], np.asarray(picture).transpose(2, 0, 1))
    np.testing.assert_array_equal(found.test_x[0], found.train_x[3])
    np.testing.assert_array_equal(found.train_x[3][0], found.train_x[3][2])
    assert data.tinyimagenet(tiny).digest() == found.digest()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("../../train/n01/images/n01_0.JPEG\tn01\t0\n", "line 1: .* is no file name"),
        ("val_0.JPEG\tn03\t0\n", "line 1: class 'n03' is no folder of train/"),
        ("val_0.JPEG\tn01\t0\n\nval_0.JPEG\tn01\t0\n", "line 3: 'val_0.JPEG' is no file name, or stands twice"),
        ("val_7.JPEG\tn01\t0\n", "val_7.JPEG: no such file"),
        ("\n", "names no image"),
    ],
)
def test_tinyimagenet_says_what_is_wrong(tiny, lines, words):
    (tiny / "val" / "val_annotations.txt").write_text(lines)
    with pytest.raises(InputError, match=words):
        data.tinyimagenet(tiny)


def test_tinyimagenet_needs_its_folders(tmp_path):
    with pytest.raises(InputError, match=r"Get http://cs231n.stanford.edu/tiny-imagenet-200.zip"):
        data.load("tinyimagenet", tmp_path)

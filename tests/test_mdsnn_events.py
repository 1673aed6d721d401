"""Events: their 40 bits, the frames SpikingJelly makes of them, N-Caltech101's trees, and events made of digits."""

import importlib.util
import io
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import call
from mdsnn import data, events
from mdsnn.kernels.errors import ConfigError, InputError


def drawn(rng: np.random.Generator, count: int, height: int, width: int) -> events.Events:
    t = np.sort(rng.integers(0, 1 << 23, count))
    return events.Events(t, rng.integers(0, width, count), rng.integers(0, height, count), rng.integers(0, 2, count))


@pytest.fixture(scope="module")
def spikingjelly():
    """SpikingJelly's datasets/utils.py itself. It imports torchvision for pictures only; a stub stands in for it."""
    pytest.importorskip("matplotlib")
    found = importlib.util.find_spec("spikingjelly")
    if found is None or found.origin is None:
        pytest.skip("needs spikingjelly")
    path = found.origin.replace("__init__.py", "datasets/utils.py")
    spec = importlib.util.spec_from_file_location("spikingjelly.datasets.utils", path)
    module = importlib.util.module_from_spec(spec)
    before = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.transforms")}
    stub = types.ModuleType("torchvision")
    stub.transforms = types.ModuleType("torchvision.transforms")
    sys.modules |= {"torchvision": stub, "torchvision.transforms": stub.transforms}
    try:
        spec.loader.exec_module(module)
    finally:
        for name, was in before.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was
    return module


def test_an_event_is_40_bits():
    content = bytes([239, 179, 0b1000_0001, 0x02, 0x03, 7, 0, 0b0111_1111, 0xFF, 0xFE])
    found = events.decode_events(content)
    assert (found.x.tolist(), found.y.tolist(), found.p.tolist()) == ([239, 7], [179, 0], [1, 0])
    assert found.t.tolist() == [0x010203, 0x7FFFFE]
    assert events.encode_events(found) == content
    with pytest.raises(InputError, match=r"a.bin: 9 bytes are no whole number of 5-byte events"):
        events.decode_events(content[:9], "a.bin")
    one = np.array([0, 1])
    with pytest.raises(InputError, match=r"event 1 has t = 8388608, outside 0..8388607"):
        events.encode_events(events.Events(one << 23, one, one, one))
    with pytest.raises(InputError, match="one length"):
        events.Events(one, one, one, one[:1])


def test_frames_are_these():
    x, y, p = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 1]), np.array([0, 1, 0, 1, 1])
    found = events.integrate(events.Events(np.arange(5), x, y, p), 2, 2, 2)
    want = [[[[1, 0], [0, 0]], [[0, 1], [0, 0]]], [[[0, 0], [1, 0]], [[0, 0], [0, 2]]]]
    assert found.dtype == np.uint8
    assert found.tolist() == want  # 5 events: 2, and the 3 that remain
    with pytest.raises(ConfigError, match="at least 1"):
        events.integrate(events.Events(x, x, y, p), 0, 2, 2)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 400), frames=st.integers(1, 12))
def test_frames_are_spikingjellys_saturated(spikingjelly, tmp_path_factory, seed, count, frames):
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(1, 4)), int(rng.integers(1, 4))  # few pixels: counts go beyond 127
    ours = drawn(rng, count, height, width)
    path = tmp_path_factory.mktemp("bin") / "a.bin"
    path.write_bytes(events.encode_events(ours))
    theirs = spikingjelly.load_ATIS_bin(path)
    for name in "txyp":
        np.testing.assert_array_equal(theirs[name], getattr(ours, name))
    want = spikingjelly.integrate_events_by_fixed_frames_number(theirs, "number", frames, height, width)
    found = events.integrate(events.decode_events(path.read_bytes()), frames, height, width)
    np.testing.assert_array_equal(found, np.minimum(want, 127))


def test_counts_saturate_and_never_wrap():
    zero = np.zeros(300, np.int64)
    assert events.integrate(events.Events(zero, zero, zero, zero), 1, 1, 1).tolist() == [[[[127]], [[0]]]]


@pytest.mark.parametrize(("axis", "value"), [("x", 240), ("y", 180), ("x", -1), ("y", -1), ("p", 2)])
def test_an_event_off_the_sensor_is_named(axis, value):
    fields = vars(drawn(np.random.default_rng(0), 9, *events.SENSOR))
    fields = {name: values.copy() for name, values in fields.items()}
    fields[axis][5] = value
    with pytest.raises(InputError, match=rf"a.bin: event 5 is off the sensor: .*{axis} = {value}.* 240 columns, 180"):
        events.integrate(events.Events(**fields), 10, *events.SENSOR, where="a.bin")


@pytest.mark.parametrize("size", [(48, 48), (5, 7), (200, 300)])
def test_resizing_is_torchs_nearest(size):
    frames = np.random.default_rng(0).integers(0, 128, (2, 2, *events.SENSOR), np.uint8)
    want = torch.nn.functional.interpolate(torch.from_numpy(frames), size, mode="nearest").numpy()
    np.testing.assert_array_equal(events.resize_nearest(frames, size), want)


# ----------------------------------------------------------------------------------------------------- frame files


def npz(frames: np.ndarray, save=np.savez_compressed, name: str = "frames") -> bytes:
    out = io.BytesIO()
    save(out, **{name: frames})
    return out.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", "<f2", "u1", "<i4", ">u2", "i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_frame_file_is_read_whatever_its_dtype(tmp_path, dtype, order, save):
    counts = np.random.default_rng(0).integers(0, 128, (3, 2, 4, 5))
    counts[0, 0, 0, 0], want = (counts[0, 0, 0, 0] if dtype == "i1" else 200), counts.copy()
    (tmp_path / "a.npz").write_bytes(npz(np.array(counts, dtype, order=order), save))
    found = events.read_frames(tmp_path / "a.npz", 3, 4, 5)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.minimum(want, 127) if dtype == "i1" else np.minimum(counts, 127))


BAD = np.ones((2, 2, 2, 2))


def with_value(value: float) -> np.ndarray:
    frames = BAD.copy()
    frames[1, 0, 1, 0] = value
    return frames


def forged(claim: tuple[int, ...], data_bytes: int) -> bytes:
    """An .npz whose array claims another size than it has."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {claim}, }}".encode().ljust(117) + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", b"\x93NUMPY\x01\x00" + bytes([118, 0]) + header + bytes(data_bytes))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz(with_value(1.5)), r"holds 1.5 at \[1, 0, 1, 0\]; a count is a whole number from 0"),
        (npz(with_value(-1)), r"holds -1.0 at \[1, 0, 1, 0\]"),
        (npz(with_value(np.nan)), r"holds nan at"),
        (npz(with_value(np.inf)), r"holds inf at"),
        (npz(with_value(-3).astype(np.int16)), r"holds -3 at"),
        (npz(BAD[:1]), r"'frames' is \[1, 2, 2, 2\], but \[2, 2, 2, 2\] is expected"),
        (npz(BAD, name="x"), "holds 0 arrays called 'frames'"),
        (npz(BAD.astype(complex)), "complex128 in .* no counts"),
        (npz(np.full((2, 2, 2, 2), None)), "holds structured data, text or objects"),
        (npz(BAD)[:-8], "no .npz file, or a damaged one"),
        (b"no zip", "no .npz file, or a damaged one"),
        (forged((2, 2, 2, 2), 127), r"'frames' is float64 in 255 bytes"),
        (forged((2, 2, 2, 2), 129), r"'frames' is float64 in 257 bytes"),
        (forged((2, 2, 2, 2), 1 << 27), r"over the limit"),
    ],
)
def test_a_frame_file_that_is_something_else_is_refused(tmp_path, content, words):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=words):
        events.read_frames(tmp_path / "a.npz", 2, 2, 2)


GOOD = npz(BAD)


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_the_same_frames_or_a_refusal(tmp_path_factory, at, bit):
    content = bytearray(GOOD)
    content[at] ^= 1 << bit
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content)
    try:
        found = events.read_frames(path, 2, 2, 2)
    except InputError:
        return
    np.testing.assert_array_equal(found, BAD)


# ---------------------------------------------------------------------------------------------------- N-Caltech101


@pytest.fixture
def recordings(tmp_path):
    """Two classes of 11 and 3 recordings in the set's own form."""
    rng = np.random.default_rng(1)
    for name, count in (("BACKGROUND_Google", 11), ("yin_yang", 3)):
        (tmp_path / "extract" / "Caltech101" / name).mkdir(parents=True)
        for n in range(1, count + 1):
            content = events.encode_events(drawn(rng, 3000, *events.SENSOR))
            (tmp_path / "extract" / "Caltech101" / name / f"image_{n:04}.bin").write_bytes(content)
    return tmp_path


def test_ncaltech101_is_the_same_from_recordings_and_from_spikingjellys_frames(recordings, spikingjelly):
    found = data.load("ncaltech101", recordings)
    assert (found.coding, found.labels) == ("events", ("BACKGROUND_Google", "yin_yang"))
    assert (found.train_x.shape, found.test_x.shape) == ((10, 12, 2, 48, 48), (10, 2, 2, 48, 48))
    assert (found.train_y.tolist(), found.test_y.tolist()) == ([0] * 10 + [1] * 2, [0, 1])
    tree = recordings / "frames_number_10_split_by_number"
    for path in sorted((recordings / "extract" / "Caltech101").glob("*/*.bin")):
        (tree / path.parent.name).mkdir(parents=True, exist_ok=True)
        theirs = spikingjelly.integrate_events_by_fixed_frames_number(
            spikingjelly.load_ATIS_bin(path), "number", 10, *events.SENSOR
        )
        np.savez_compressed(tree / path.parent.name / f"{path.stem}.npz", frames=theirs)
    (path.parent / "image_0001.bin").write_bytes(b"now only the frames can be read")
    again = data.load("N-Caltech101", recordings)
    assert again.digest() == found.digest()
    np.testing.assert_array_equal(again.test_x, found.test_x)
    assert events.read_ncaltech101(tree)[4] == found.labels
    (recordings / "root").mkdir()
    (recordings / "root" / "N-Caltech101").symlink_to(recordings)  # as the reference's commands name the place
    assert data.load("ncaltech101", recordings / "root").digest() == found.digest()
    one = events.read_frames(tree / "yin_yang" / "image_0003.npz", 10, *events.SENSOR)
    np.testing.assert_array_equal(found.test_x[:, 1], one[..., np.arange(48)[:, None] * 15 // 4, np.arange(48) * 5])


def test_ncaltech101_says_what_is_wrong(recordings, tmp_path):
    with pytest.raises(InputError, match=r"holds neither frames_number_10_split_by_number/CLASS/\*.npz nor Caltech101"):
        data.load("ncaltech101", tmp_path / "nowhere")
    folder = recordings / "extract" / "Caltech101" / "yin_yang"
    content = (folder / "image_0002.bin").read_bytes()
    (folder / "image_0002.bin").write_bytes(content[:500] + b"\xf0" + content[501:])
    with pytest.raises(InputError, match=r"image_0002.bin: event 100 is off the sensor: x = 240"):
        data.load("ncaltech101", recordings)
    for n in (2, 3):
        (folder / f"image_000{n}.bin").unlink()
    with pytest.raises(InputError, match=r"class 'yin_yang' holds fewer than 2 .bin files"):
        data.load("ncaltech101", recordings)


# ----------------------------------------------------------------------------------------------------- made events


def test_a_saccade_sees_an_edge_brighten_and_darken():
    image = np.zeros((8, 8), np.uint8)
    image[:, 4:] = 255
    found = events.saccades(image, np.random.default_rng(0), amplitude=1.0, noise=0)
    assert (np.diff(found.t) >= 0).all()
    assert (found.t.min() >= 0, found.t.max() < 300_000) == (True, True)
    first = found.t < 100_000  # right and down: the bright half, and the black beyond it, move left and up
    assert set(found.x[first & (found.p == 1)]) == {3}
    darker = first & (found.p == 0)
    assert set(found.x[darker & (found.y < 7)]) == {7}
    assert set(found.x[darker & (found.y == 7)]) == {3, 4, 5, 6, 7}  # 3 has just brightened
    back = (found.t >= 100_000) & (found.t < 200_000)  # left, back over the edge
    inner = back & (found.y < 7)
    assert (set(found.x[inner & (found.p == 0)]), set(found.x[inner & (found.p == 1)])) == ({3, 4}, {7})
    still = events.saccades(np.zeros((8, 8), np.uint8), np.random.default_rng(0), noise=0)
    assert len(still.t) == 0
    noisy = events.saccades(np.zeros((8, 8), np.uint8), np.random.default_rng(0), noise=50)
    assert len(noisy.t) == 50
    assert events.decode_events(events.encode_events(found)).t.tolist() == found.t.tolist()


def test_digits_events_are_made_from_the_digits_and_their_seed(monkeypatch, caplog):
    source = data.digits()
    fields = dict(vars(source))
    for half, count in (("train", 12), ("test", 5)):
        fields |= {f"{half}_x": fields[f"{half}_x"][:count], f"{half}_y": fields[f"{half}_y"][:count]}
    monkeypatch.setattr(data, "digits", lambda: data.Dataset(**fields))
    with caplog.at_level("INFO", "mdsnn.data"):
        found = data.load("Digits-Events")
    assert "no camera recorded them" in caplog.text
    assert (found.coding, found.name, found.flips) == ("events", "digits-events", False)
    assert (found.train_x.shape, found.test_x.shape) == ((6, 12, 2, 10, 10), (6, 5, 2, 10, 10))
    np.testing.assert_array_equal(found.train_y, source.train_y[:12])
    assert found.train_x.sum(axis=(2, 3, 4)).min() > 10  # every frame of every sample holds events
    assert data.digits_events(0).digest() == found.digest()
    assert data.digits_events(1).digest() != found.digest()
    made = events.saccades(np.pad(source.train_x[2, 0], 1), np.random.default_rng([0, 0, 2]))
    np.testing.assert_array_equal(found.train_x[:, 2], events.integrate(made, 6, 10, 10))


def test_events_train_export_and_verify(tmp_path, monkeypatch):
    whole = data.digits_events()
    fields = dict(vars(whole)) | {"train_x": whole.train_x[:, :64], "train_y": whole.train_y[:64]}
    fields |= {"test_x": whole.test_x[:, :40], "test_y": whole.test_y[:40]}
    monkeypatch.setitem(data.DATASETS, "digits-events", lambda _path: data.Dataset(**fields))

    def mdsnn(*words, code=0):
        outcome = call(*words)
        assert outcome.code == code, outcome.err
        return outcome.out + outcome.err

    small = ("--data", "Digits_Events", "--blocks", "1", "--widths", "4", "--epochs", "1", "--threads", "1")
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    mdsnn("train", *small, "--save-path", teacher)
    taught = ("--paper-setting", "qamd", "--teacher-path", teacher / "model.ckpt", "--time-window", "3")
    mdsnn("train", *small, *taught, "--save-path", student)
    artifact = tmp_path / "student.mdsnn"
    mdsnn("export", student / "model.ckpt", "-o", artifact)
    verify = ("verify", artifact, "--data", "digits-events", "--executors", "reference,native,torch")
    said = mdsnn(*verify, "--checkpoint", student / "model.ckpt")
    assert "over 40 samples, 0 differ" in said
    np.save(tmp_path / "batch.npy", whole.test_x[:3, :2])
    assert f"{tmp_path / 'batch.npy'}[1]" in mdsnn("run", artifact, tmp_path / "batch.npy")
    said = mdsnn("train", *small, "--time-window", "7", "--save-path", tmp_path / "long", code=2)
    assert "the recordings of 'digits-events' are 6 frames long. Lower timesteps" in said


def test_event_recipes_have_as_many_steps_as_frames():
    from mdsnn.recipe import recipe

    assert recipe("ncaltech101", data_path="x").timesteps == 10
    assert recipe("digits-events").timesteps == 6
    assert recipe("digits-events").epochs == recipe("digits").epochs
    assert recipe("digits-events", timesteps=2).timesteps == 2
    assert recipe("CIFAR10").timesteps == 4

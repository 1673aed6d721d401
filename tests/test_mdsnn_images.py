"""Pixels from files: equal arrays however they were stored, and one clear error for everything else."""

import io
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mdsnn.images import load_pixels, read_image, read_npy
from mdsnn.kernels.errors import InputError, MdsnnError

RNG = np.random.default_rng(0)
BATCH = RNG.integers(0, 256, (5, 1, 6, 4), np.uint8)


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_image_files_come_back_pixel_for_pixel(tmp_path):
    grey, colour = RNG.integers(0, 256, (6, 4), np.uint8), RNG.integers(0, 256, (6, 4, 3), np.uint8)
    Image.fromarray(grey).save(tmp_path / "g.png")
    Image.fromarray(grey).save(tmp_path / "g.bmp")
    Image.fromarray(colour).save(tmp_path / "c.png")
    pixels, names = load_pixels([tmp_path / "g.png", tmp_path / "g.bmp"], 1, 6, 4)
    np.testing.assert_array_equal(pixels, np.stack([grey, grey])[:, None])
    assert pixels.dtype == np.uint8
    assert names == [str(tmp_path / "g.png"), str(tmp_path / "g.bmp")]
    np.testing.assert_array_equal(load_pixels([tmp_path / "c.png"], 3, 6, 4)[0][0], colour.transpose(2, 0, 1))
    # the other way round: grey to RGB repeats, RGB to grey is Pillow's luma
    np.testing.assert_array_equal(load_pixels([tmp_path / "g.png"], 3, 6, 4)[0][0], np.stack([grey] * 3))
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(load_pixels([tmp_path / "c.png"], 1, 6, 4)[0][0, 0], expected)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_other_8_bit_modes_are_converted(tmp_path, mode):
    picture = Image.fromarray(RNG.integers(0, 256, (6, 4, 3), np.uint8)).convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    picture.save(path)
    np.testing.assert_array_equal(read_image(path, 1)[0], np.asarray(picture.convert("L")))


def test_wrong_size_is_an_error_that_says_what_was_expected_and_resize_cures_it(tmp_path):
    Image.fromarray(np.full((7, 9), 200, np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x.png: 7 x 9 pixels \(height x width\), but 6 x 4 are expected.*--resize"):
        load_pixels([tmp_path / "x.png"], 1, 6, 4)
    np.testing.assert_array_equal(
        load_pixels([tmp_path / "x.png"], 1, 6, 4, resize=True)[0], np.full((1, 1, 6, 4), 200)
    )


@pytest.mark.parametrize(
    "array",
    [
        BATCH,
        np.asfortranarray(BATCH),
        np.ascontiguousarray(BATCH[::-1])[::-1],
        BATCH.astype(">u1"),
        np.ascontiguousarray(BATCH.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0),
        BATCH[:, 0],
    ],
    ids=["C", "Fortran", "strided", "big-endian", "transposed", "NHW"],
)
def test_npy_batches_of_any_layout_are_equal(tmp_path, array):
    path = tmp_path / "x.npy"
    np.save(path, array)
    path.chmod(0o400)
    pixels, names = load_pixels([path], 1, 6, 4)
    np.testing.assert_array_equal(pixels, BATCH)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert names == [f"{path}[{n}]" for n in range(5)]


def test_npy_versions_1_and_2_and_one_sample(tmp_path):
    colour = RNG.integers(0, 256, (3, 6, 4), np.uint8)
    with open(tmp_path / "x.npy", "wb") as stream:
        np.lib.format.write_array(stream, colour, version=(2, 0))
    np.testing.assert_array_equal(load_pixels([tmp_path / "x.npy"], 3, 6, 4)[0], colour[None])


def test_event_counts_keep_their_timesteps_first(tmp_path):
    counts = RNG.integers(0, 9, (3, 2, 2, 6, 4), np.uint8)
    np.save(tmp_path / "x.npy", counts)
    pixels, names = load_pixels([tmp_path / "x.npy"], 2, 6, 4, "events", 3)
    np.testing.assert_array_equal(pixels, counts)
    assert len(names) == 2
    with pytest.raises(InputError, match=r"event counts \[4, N, 2, 6, 4\] are expected"):
        load_pixels([tmp_path / "x.npy"], 2, 6, 4, "events", 4)
    Image.new("L", (4, 6)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="takes event counts"):
        load_pixels([tmp_path / "x.png"], 2, 6, 4, "events", 3)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (BATCH.astype(np.int64), r"found int64 with values in 0..255; save it with .astype\('uint8'\)"),
        (BATCH.astype(">i2") - 300, r"found int16 with values in -300\.\.-52"),
        (BATCH / 255.0, "found float64; scale to 0..255"),
        (BATCH > 9, "found bool"),
        (BATCH[:, :, :5], r"shape \[5, 1, 5, 4\], but \[N, 1, 6, 4\] is expected"),
        (np.zeros((5, 6, 4, 1), np.uint8), r"channels are last: save array.transpose\(0, 3, 1, 2\)"),
        (BATCH[:0], "is expected"),
        (np.array([None]), "structured data, text or objects"),
        (np.array(["a"]), "structured data, text or objects"),
        (np.zeros(3, [("a", "u1")]), "structured data, text or objects"),
    ],
)
def test_npy_of_another_kind_is_refused_with_a_remedy(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=words):
        load_pixels([tmp_path / "x.npy"], 1, 6, 4)


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }"


def with_header(text: str, data: bytes = b"abcdef") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def test_the_plain_header_of_these_tests_is_valid(tmp_path):
    (tmp_path / "x.npy").write_bytes(with_header(HEADER))
    assert read_npy(tmp_path / "x.npy").tolist() == [list(b"abc"), list(b"def")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"PK\x03\x04", "not an .npy file"),
        (npy(BATCH)[:-1], "but the file holds 119. Truncated"),
        (npy(BATCH) + b"x", "Too long"),
        (npy(BATCH)[:40], "cut off|not readable"),
        (npy(BATCH)[:9], "cut off"),
        (with_header(HEADER.replace("2, 3", "2, 10**9")), "not readable"),
        (with_header(HEADER.replace("2, 3", "99999999999, 99999999999")), "but the file holds 6"),
        (with_header(HEADER.replace("2, 3", "-2, -3")), "no shape of whole numbers"),
        (with_header(HEADER.replace("2, 3", "True, 6")), "no shape of whole numbers"),
        (with_header(HEADER.replace("(2, 3)", "6")), "no shape of whole numbers"),
        (with_header(HEADER.replace("2, 3", "1," * 9)), "9 axes"),
        (with_header(HEADER.replace("|u1", "|O")), "objects"),
        (with_header(HEADER.replace("|u1", "zz")), "no dtype"),
        (with_header(HEADER.replace("'|u1'", "[('a','u1')]")), "structured"),
        (with_header("(" * 3000), "not readable"),
        (with_header("-" * 4000 + "1"), "not readable|not of descr"),
        (with_header("__import__('os')"), "not readable"),
        (with_header("[]"), "not of descr"),
        (with_header(HEADER + " " * 5000), "over the limit of 4096"),
        (b"\x93NUMPY\x03\x00" + b"\x00" * 8, "format version"),
    ],
)
def test_hostile_npy_headers_are_refused(tmp_path, content, words):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_npy(tmp_path / "x.npy")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 10))
def test_no_byte_of_an_npy_makes_anything_but_pixels_or_a_typed_error(tmp_path, place, byte, cut):
    content = bytearray(npy(BATCH))
    content[place] = byte
    (tmp_path / "x.npy").write_bytes(content[: len(content) - cut])
    try:
        found = read_npy(tmp_path / "x.npy")
    except MdsnnError:
        return
    assert found.size == 120
    assert cut == 0


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def test_bad_image_files_are_refused_in_words(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(InputError, match="no such file"):
        read_image(path, 1)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        read_image(path, 1)
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match="not a readable image"):
        read_image(path, 1)
    path.write_bytes(png_header(30_000, 30_000))
    with pytest.raises(InputError, match=r"not a readable image .*bomb|over the limit of 89478485"):
        read_image(path, 1)
    path.write_bytes(png_header(10_000, 9_000))  # between Pillow's warning and its error
    with pytest.raises(InputError, match="10000 x 9000 pixels are over the limit of 89478485"):
        read_image(path, 1)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 6\n")
    with pytest.raises(InputError, match="not a readable image"):
        read_image(path, 1)
    Image.fromarray(np.full((6, 4), 60000, np.uint16)).save(path)
    with pytest.raises(InputError, match="deeper than 8 bits"):
        read_image(path, 1)
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (60, 40, 3), np.uint8)).save(stream, "PNG")
    path.write_bytes(stream.getvalue()[:2000])
    with pytest.raises(InputError, match=r"damaged image .*Truncated"):
        read_image(path, 3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP"]), place=st.integers(0, 400), byte=st.integers(0, 255))
def test_no_byte_of_an_image_makes_anything_but_pixels_or_a_typed_error(tmp_path, kind, place, byte):
    stream = io.BytesIO()
    Image.fromarray(BATCH[0, 0]).save(stream, kind)
    content = bytearray(stream.getvalue())
    content[place % len(content)] = byte
    (tmp_path / "x").write_bytes(content)
    try:
        found = read_image(tmp_path / "x", 1, (6, 4))
    except MdsnnError:
        return
    assert found.shape == (1, 6, 4)


def test_what_is_no_regular_file_or_does_not_fit_together(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(InputError, match="not a regular file"):
        read_npy(tmp_path / "x.npy")
    with pytest.raises(InputError, match="no such file"):
        read_npy(tmp_path / "y.npy")
    with pytest.raises(InputError, match="no image file given"):
        load_pixels([], 1, 6, 4)
    with pytest.raises(InputError, match="comes alone"):
        load_pixels([tmp_path / "x.npy", tmp_path / "x.png"], 1, 6, 4)
    with pytest.raises(InputError, match="takes 2 channels"):
        load_pixels([tmp_path / "x.png"], 2, 6, 4)


def test_reading_pixels_needs_no_torch():
    code = "import sys, mdsnn.images; raise SystemExit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

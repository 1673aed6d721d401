"""Pixels from files: image files or one .npy batch, as the uint8 array a network takes. Needs no torch.

Pillow is imported only when an image file is read. A file is trusted in nothing: its size, shape and format are checked
before its content is decoded, and whatever is wrong with it comes out as one `InputError` that names it.
"""

from __future__ import annotations

import ast
import io
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import InputError, MissingError, StorageError
from mdsnn.kernels.files import read_bounded

Pixels = npt.NDArray[np.uint8]
Coding = Literal["image", "events"]

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Formats that Pillow decodes by itself; others (EPS, for one) start programs and are refused."""
MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
"""Pillow modes of at most 8 bits a channel; deeper ones would be clipped, not scaled, on the way to uint8."""
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: a warning there, an error here."""
MAX_IMAGE_BYTES = 1 << 28
MAX_HEADER_BYTES = 4096
"""An .npy header of a plain array takes about 100 bytes."""


def load_pixels(
    paths: Sequence[str | os.PathLike[str]],
    channels: int,
    height: int,
    width: int,
    coding: Coding = "image",
    timesteps: int | None = None,
    *,
    resize: bool = False,
) -> tuple[Pixels, list[str]]:
    """Read image files, or one .npy batch, into the array a network takes.

    paths      image files (PNG, JPEG, BMP, GIF, PPM, TIFF, WebP), converted to 1 (grey) or 3 (RGB) channels; alpha is
               dropped, an EXIF rotation ignored, and of an animation the first picture is read. Or one .npy file
    coding     "image"   returns [N, C, H, W]; an .npy may be [N, C, H, W], [C, H, W], or [N, H, W] if C = 1
               "events"  returns [T, N, C, H, W]: event counts, from an .npy of that shape only
    timesteps  T that an event batch must have; None takes any T >= 1
    resize     bring images of another size to [H, W] (bilinear); without it they are refused. Never applies to .npy
    returns    uint8, C-contiguous, writable; and one name a sample
    raises     InputError    whatever is wrong with a file, in words that name it and what was expected
               StorageError  a file that the system refuses to read;  MissingError  Pillow is not installed
    """
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("no image file given")
    arrays = [path for path in files if path.suffix.lower() == ".npy"]
    if arrays:
        if len(files) > 1:
            raise InputError(f"{arrays[0]}: an .npy batch comes alone, but {len(files)} files were given")
        return _batch(arrays[0], channels, height, width, coding, timesteps)
    if coding == "events":
        raise InputError(f"{files[0]}: this network takes event counts: pass one .npy of [T, N, C, H, W] uint8")
    if channels not in (1, 3):
        raise InputError(
            f"{files[0]}: this network takes {channels} channels; image files have 1 or 3, so pass an .npy"
        )
    pixels = np.empty((len(files), channels, height, width), np.uint8)
    for row, path in zip(pixels, files, strict=True):
        row[...] = read_image(path, channels, (height, width), resize=resize)
    return pixels, [str(path) for path in files]


def read_image(
    path: str | os.PathLike[str], channels: int, size: tuple[int, int] | None = None, *, resize: bool = False
) -> Pixels:
    """Read one image file as [C, H, W] uint8, C = 1 or 3.

    size     (H, W) it must have, or is brought to with `resize`; None takes any size
    raises   InputError, StorageError, MissingError as `load_pixels`
    """
    try:
        import PIL.Image  # noqa: F401  (only asked whether it is there)
    except ImportError as fault:
        raise MissingError("reading image files needs Pillow: pip install pillow") from fault
    content = read_bounded(path, MAX_IMAGE_BYTES, what="image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is refused below, or does not touch the pixels
        pixels = _decode(path, content, channels, size, resize)
    if pixels.ndim == 2:
        return pixels[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode(
    path: str | os.PathLike[str], content: bytes, channels: int, size: tuple[int, int] | None, resize: bool
) -> Pixels:
    """[H, W] or [H, W, 3] of an image's bytes; the checks stand before the decoding."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as fault:  # on hostile bytes Pillow raises nearly any type; all of them mean the same here
        known = ", ".join(FORMATS)
        raise InputError(f"{path}: not a readable image ({_kind(fault)}); known formats are {known}") from fault
    with image:
        found_w, found_h = image.size
        if found_w * found_h > MAX_PIXELS:
            raise InputError(f"{path}: {found_w} x {found_h} pixels are over the limit of {MAX_PIXELS}")
        if size is not None and (found_h, found_w) != size and not resize:
            raise InputError(
                f"{path}: {found_h} x {found_w} pixels (height x width), but {size[0]} x {size[1]} are expected."
                " Resize it, or pass --resize (resize=True)"
            )
        if image.mode not in MODES:
            raise InputError(f"{path}: pixels of mode {image.mode} are deeper than 8 bits; make it an 8-bit image")
        try:
            picture = image.convert("L" if channels == 1 else "RGB")
            if size is not None and (found_h, found_w) != size:
                picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.array(picture, np.uint8)
        except Exception as fault:  # see above: a fault in the compressed data shows only here
            raise InputError(f"{path}: damaged image ({_kind(fault)}). Truncated?") from fault


# -------------------------------------------------------------------------------------------------- .npy batches


def read_npy(path: str | os.PathLike[str]) -> Pixels:
    """Read an .npy file of uint8, in C or Fortran order; the header is checked against the file's size before a load.

    returns  uint8, C-contiguous, writable
    raises   InputError  if it is no .npy, holds another dtype (objects are never unpickled), or is too short or long
             StorageError  if the system refuses to read it
    """
    try:
        status = os.stat(path)  # before open, which would wait on a named pipe
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file; an .npy file was expected")
        with open(path, "rb") as stream:
            dtype, fortran, shape, start = npy_header(path, stream)
            count = 1
            for length in shape:
                count *= length
            held = os.fstat(stream.fileno()).st_size - start
            if held != count * dtype.itemsize:
                raise InputError(
                    f"{path}: the header says {list(shape)} {dtype.name} = {count * dtype.itemsize} bytes,"
                    f" but the file holds {held}. {'Truncated?' if held < count * dtype.itemsize else 'Too long.'}"
                )
            if dtype != np.uint8:
                raise InputError(_wrong_dtype(path, dtype, stream))
            content = bytearray(held)
            if stream.readinto(content) != held:
                raise InputError(f"{path}: changed while it was read")
    except FileNotFoundError as fault:
        raise InputError(f"{path}: no such file; an .npy file was expected") from fault
    except (OSError, ValueError) as fault:  # ValueError: a NUL byte in the name
        raise StorageError(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from fault
    except MemoryError as fault:
        raise StorageError(f"{path}: {held} bytes do not fit in memory") from fault
    array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array)


def npy_header(path: str | os.PathLike[str], stream: BinaryIO) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """An .npy header (format 1.0 or 2.0): dtype, Fortran order, shape, and where the data starts. Else InputError."""
    lead = stream.read(8)
    if not lead:
        raise InputError(f"{path}: empty; an .npy file was expected")
    if lead[:6] != b"\x93NUMPY":
        raise InputError(f"{path}: not an .npy file (its first bytes are not \\x93NUMPY)")
    version = lead[6:]
    if version not in (b"\x01\x00", b"\x02\x00"):
        raise InputError(f"{path}: .npy format version {list(version)}; a plain array has 1.0 or 2.0")
    width = 2 if version == b"\x01\x00" else 4
    length_bytes = stream.read(width)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) != width or length > MAX_HEADER_BYTES:
        raise InputError(
            f"{path}: an .npy header of {length} bytes is over the limit of {MAX_HEADER_BYTES}, or cut off"
        )
    text = stream.read(length)
    try:
        fields = ast.literal_eval(text.decode("latin1").strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as fault:
        raise InputError(f"{path}: its .npy header is not readable ({_kind(fault)})") from fault
    if len(text) != length or type(fields) is not dict or set(fields) != {"descr", "fortran_order", "shape"}:
        raise InputError(f"{path}: its .npy header is cut off, or not of descr, fortran_order and shape")
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if type(fortran) is not bool or type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
        raise InputError(f"{path}: its .npy header holds no shape of whole numbers, or no order")
    if len(shape) > 8:
        raise InputError(f"{path}: {len(shape)} axes; at most 5 make sense here")
    try:
        dtype = np.dtype(descr) if type(descr) is str else None
    except (TypeError, ValueError, SyntaxError) as fault:
        raise InputError(f"{path}: its .npy header names no dtype") from fault
    if dtype is None or dtype.hasobject or dtype.kind not in "biufc":
        raise InputError(f"{path}: holds structured data, text or objects; pixels are uint8")
    return dtype, fortran, shape, 8 + width + length


def _wrong_dtype(path: str | os.PathLike[str], dtype: np.dtype[Any], stream: BinaryIO) -> str:
    """Say what to do about an array of another dtype; of integers, look whether a cast would keep the values."""
    if dtype.kind in "iu":
        ends: list[int] = []
        while block := stream.read(dtype.itemsize << 16):
            values = np.frombuffer(block, dtype)
            ends += [int(values.min()), int(values.max())]
        low, high = min(ends, default=0), max(ends, default=0)
        if low >= 0 and high <= 255:
            return (
                f"{path}: pixels must be uint8, found {dtype.name} with values in 0..255; save it with .astype('uint8')"
            )
        return f"{path}: pixels must be uint8 (0..255), found {dtype.name} with values in {low}..{high}"
    return f"{path}: pixels must be uint8 (0..255), found {dtype.name}; scale to 0..255, round, and save as uint8"


def _batch(
    path: Path, channels: int, height: int, width: int, coding: Coding, timesteps: int | None
) -> tuple[Pixels, list[str]]:
    array = read_npy(path)
    found, sample = array.shape, (channels, height, width)
    if coding == "events":
        steps = "T" if timesteps is None else str(timesteps)
        if len(found) != 5 or found[2:] != sample or found[0] != (timesteps or found[0]) or 0 in found:
            wanted = f"[{steps}, N, {channels}, {height}, {width}]"
            raise InputError(f"{path}: shape {list(found)}, but event counts {wanted} are expected")
        return array, [f"{path}[{n}]" for n in range(found[1])]
    if found == sample:
        array = array[None]
    elif channels == 1 and len(found) == 3 and found[1:] == sample[1:]:
        array = array[:, None]
    if array.shape[1:] != sample or 0 in array.shape:
        hint = ""
        if len(found) == 4 and found[1:] == (height, width, channels):
            hint = "; the channels are last: save array.transpose(0, 3, 1, 2)"
        raise InputError(f"{path}: shape {list(found)}, but [N, {channels}, {height}, {width}] is expected{hint}")
    return array, [f"{path}[{n}]" for n in range(array.shape[0])]


def _kind(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}"[:120].replace("\n", " ")

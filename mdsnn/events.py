"""Event cameras: 40-bit event files, frames of counts, N-Caltech101's folders, and events made from still images.

An event is (t, x, y, p): at microsecond t the pixel (x, y) saw its light rise (p = 1) or fall (p = 0). A network takes
frames, [T, 2, H, W] uint8: how many events of each polarity (channel 0 falls, 1 rises) a pixel had in each of T parts
of the recording. Counts saturate at 127, the largest an input code holds (docs/arithmetic.md). Needs no torch.

Sources: G. Orchard et al., "Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades",
Frontiers in Neuroscience 9:437 (2015), for the files and the saccades; SpikingJelly 2.0, `datasets/utils.py`, for the
frames (`integrate_events_by_fixed_frames_number`, split by "number").
"""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from mdsnn.kernels.errors import ConfigError, InputError
from mdsnn.kernels.files import read_bounded

from .images import npy_header

Counts = npt.NDArray[np.uint8]
Whole = npt.NDArray[np.int64]

MAX_COUNT = 127
SENSOR = (180, 240)
"""(H, W) of N-Caltech101's recordings."""
FRAMES = 10
SIZE = (48, 48)
"""(H, W) that N-Caltech101's frames are brought to."""
TRAIN_SHARE = 0.9
"""The set has no split of its own: of each class, in the order of file names, the first nine tenths, rounded up."""
FRAMES_FOLDER = f"frames_number_{FRAMES}_split_by_number"
EVENT_BYTES = 5
MAX_EVENTS_FILE = 1 << 26
"""Bytes of an event file or an .npz; a frame file of 180 x 240 in float64 has 6.9 MB."""
MAX_FRAMES = 1 << 26
"""Bytes that frames may inflate to."""


@dataclass(frozen=True)
class Events:
    """One recording, its events in the order of the file: four arrays [E] of int64.

    t  microseconds     x  column from the left     y  row from the top     p  0: darker, 1: brighter
    """

    t: Whole
    x: Whole
    y: Whole
    p: Whole

    def __post_init__(self) -> None:
        if self.t.ndim != 1 or not self.t.shape == self.x.shape == self.y.shape == self.p.shape:
            raise InputError("events: t, x, y and p must be four arrays of one length")


def decode_events(content: bytes, where: str = "events") -> Events:
    """Events of 40 bits each: x (8), y (8), polarity (1), microseconds (23), the highest bit first.

    raises  InputError  if the last event is cut off
    """
    if len(content) % EVENT_BYTES:
        raise InputError(f"{where}: {len(content)} bytes are no whole number of {EVENT_BYTES}-byte events. Truncated?")
    raw = np.frombuffer(content, np.uint8).reshape(-1, EVENT_BYTES).astype(np.int64)
    t = (raw[:, 2] & 127) << 16 | raw[:, 3] << 8 | raw[:, 4]
    return Events(t, raw[:, 0], raw[:, 1], raw[:, 2] >> 7)


def encode_events(events: Events) -> bytes:
    """The bytes that `decode_events` reads back; raises InputError for a value that does not fit its bits."""
    for name, values, limit in (
        ("x", events.x, 1 << 8),
        ("y", events.y, 1 << 8),
        ("p", events.p, 2),
        ("t", events.t, 1 << 23),
    ):
        bad = np.flatnonzero((values < 0) | (values >= limit))
        if bad.size:
            raise InputError(f"events: event {bad[0]} has {name} = {values[bad[0]]}, outside 0..{limit - 1}")
    parts = (events.x, events.y, events.p << 7 | events.t >> 16, events.t >> 8 & 255, events.t & 255)
    return np.stack(parts, axis=1).astype(np.uint8).tobytes()


def integrate(events: Events, frames: int, height: int, width: int, where: str = "events") -> Counts:
    """Frames of equally many events: with E events, frame i counts i·(E // T) up to (i + 1)·(E // T), the last all
    that remain.

    returns  [T, 2, H, W] uint8, T = `frames`; counts saturate at 127
    raises   InputError  for an event off the sensor, naming its index;  ConfigError  if `frames` < 1
    """
    if frames < 1:
        raise ConfigError(f"frames = {frames!r} must be at least 1")
    off = (events.x < 0) | (events.x >= width) | (events.y < 0) | (events.y >= height) | (events.p < 0) | (events.p > 1)
    if off.any():
        n = int(off.argmax())
        raise InputError(
            f"{where}: event {n} is off the sensor: x = {events.x[n]}, y = {events.y[n]}, p = {events.p[n]}, but the"
            f" sensor has {width} columns, {height} rows and polarities 0 and 1"
        )
    share = len(events.t) // frames
    frame = np.minimum(np.arange(len(events.t)) // share, frames - 1) if share else np.full(len(events.t), frames - 1)
    place = ((frame * 2 + events.p) * height + events.y) * width + events.x
    counts = np.bincount(place, minlength=frames * 2 * height * width)
    return np.minimum(counts, MAX_COUNT).astype(np.uint8).reshape(frames, 2, height, width)


def resize_nearest(frames: Counts, size: tuple[int, int]) -> Counts:
    """[..., H, W] brought to `size`: row i takes row floor(i·H / h), columns likewise (as torch's "nearest")."""
    height, width = frames.shape[-2:]
    rows, columns = np.arange(size[0]) * height // size[0], np.arange(size[1]) * width // size[1]
    return np.ascontiguousarray(frames[..., rows[:, None], columns])


def read_frames(path: str | os.PathLike[str], frames: int, height: int, width: int) -> Counts:
    """The array `frames` of an .npz, [T, 2, H, W] of whole numbers of at least 0 in any integer or float dtype.

    The sizes in the file are checked before anything is inflated, and no object is ever unpickled.
    returns  [T, 2, H, W] uint8; counts saturate at 127
    raises   InputError, StorageError
    """
    where = str(path)
    content = read_bounded(path, MAX_EVENTS_FILE, what="frame file (.npz)")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename == "frames.npy"]
            if len(entries) != 1:
                raise InputError(f"{where}: holds {len(entries)} arrays called 'frames'; one is expected")
            if entries[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{where}: 'frames' is compressed in a way that no .npz is")
            if entries[0].file_size > MAX_FRAMES:
                raise InputError(f"{where}: 'frames' takes {entries[0].file_size} bytes, over the limit {MAX_FRAMES}")
            with archive.open(entries[0]) as stream:
                dtype, fortran, shape, start = npy_header(path, cast(BinaryIO, stream))
                wanted = (frames, 2, height, width)
                if shape != wanted:
                    raise InputError(f"{where}: 'frames' is {list(shape)}, but {list(wanted)} is expected")
                if dtype.kind not in "uif" or start + math.prod(shape) * dtype.itemsize != entries[0].file_size:
                    raise InputError(f"{where}: 'frames' is {dtype.name} in {entries[0].file_size} bytes: no counts")
                data = stream.read()  # to the end, where zip keeps its sum
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError) as fault:
        raise InputError(f"{where}: no .npz file, or a damaged one ({fault!s:.120})") from fault
    values: npt.NDArray[Any] = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    counts = values if dtype.kind != "f" else np.where(np.isfinite(values), values, -1.0)
    if counts.min() < 0 or (dtype.kind == "f" and bool((counts != np.trunc(counts)).any())):
        bad = (counts < 0) | (counts != np.trunc(counts))
        first = tuple(int(n) for n in np.argwhere(bad)[0])
        raise InputError(f"{where}: 'frames' holds {values[first]} at {list(first)}; a count is a whole number from 0")
    return np.ascontiguousarray(np.minimum(counts, MAX_COUNT).astype(np.uint8))


def read_ncaltech101(
    data_path: str | os.PathLike[str], frames: int = FRAMES, size: tuple[int, int] = SIZE
) -> tuple[Counts, Whole, Counts, Whole, tuple[str, ...]]:
    """N-Caltech101 as frames, resized by nearest, from a tree of SpikingJelly's or the recordings themselves.

    data_path  holds frames_number_10_split_by_number/CLASS/*.npz, or else Caltech101/CLASS/*.bin (also in extract/),
               or is one of these folders
    returns    train_x, train_y, test_x, test_y, labels: counts [T, N, 2, h, w] uint8 and classes [N] int64, in the
               order of class and file names; of each class the first 90 %, rounded up, are to train on, as
               SpikingJelly's split_to_train_test_set(0.9)
    raises     InputError   for a missing folder, a class too small to split, or a file that is not what it should be
    """
    root = Path(data_path)
    tree, suffix = _tree(root)
    classes = {
        folder.name: sorted(path for path in folder.iterdir() if path.suffix == suffix)
        for folder in sorted(tree.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    small = [name for name, files in classes.items() if len(files) < 2]
    if not classes or small:
        said = f"class {small[0]!r} holds fewer than 2 {suffix} files" if small else "holds no class folder"
        raise InputError(f"{tree}: {said}; one to train on and one to test on are the least")
    halves: tuple[list[tuple[int, Path]], list[tuple[int, Path]]] = ([], [])
    for label, files in enumerate(classes.values()):
        cut = min(math.ceil(len(files) * TRAIN_SHARE), len(files) - 1)  # SpikingJelly leaves a class of 9 no test
        for n, path in enumerate(files):
            halves[n >= cut].append((label, path))
    out: list[Any] = []
    for half in halves:
        x = np.empty((frames, len(half), 2, *size), np.uint8)
        for n, (_, path) in enumerate(half):
            x[:, n] = resize_nearest(_recording(path, frames), size)
        out += [x, np.array([label for label, _ in half], np.int64)]
    return out[0], out[1], out[2], out[3], tuple(classes)


def _recording(path: Path, frames: int) -> Counts:
    if path.suffix == ".npz":
        return read_frames(path, frames, *SENSOR)
    content = read_bounded(path, MAX_EVENTS_FILE, what="recording (.bin)")
    return integrate(decode_events(content, str(path)), frames, *SENSOR, where=str(path))


def _tree(root: Path) -> tuple[Path, str]:
    """The folder that holds the classes, and the suffix of its files."""
    for folder in (root / FRAMES_FOLDER, root / "Caltech101", root / "extract" / "Caltech101", root):
        try:
            found = [child for child in sorted(folder.iterdir()) if child.is_dir()] if folder.is_dir() else []
            for suffix in (".npz", ".bin"):
                if any(path.suffix == suffix for child in found for path in child.iterdir()):
                    return folder, suffix
        except OSError as fault:
            raise InputError(f"{folder}: cannot be read: {fault.strerror or fault}") from fault
    raise InputError(
        f"{root}: holds neither {FRAMES_FOLDER}/CLASS/*.npz nor Caltech101/CLASS/*.bin. Get Caltech101.zip from"
        f" https://www.garrickorchard.com/datasets/n-caltech101 and unpack it as {root / 'Caltech101'}"
    )


# ------------------------------------------------------------------------------------------ events made from images

STEP_US = 10_000
SACCADE_STEPS = 10
"""Steps of one saccade; three take 0.3 s, as in N-MNIST."""
TRIANGLE = ((0.0, 0.0), (1.0, 0.5), (1.0, -0.5), (0.0, 0.0))
"""Corners of the camera's path, (dy, dx) in units of the amplitude: three straight saccades back to the start."""


def saccades(
    image: Counts, generator: np.random.Generator, *, amplitude: float = 2.0, threshold: float = 0.25, noise: int = 4
) -> Events:
    """The events a camera would see if it moved along N-MNIST's triangle before a still image. Made, not recorded.

    image       [H, W] uint8; what lies beyond its border is black
    generator   draws each pixel's threshold (10 % spread), the microseconds within a step, and the noise
    amplitude   of the path in pixels      threshold  change of log(1/8 + v/255) that makes an event
    noise       events anywhere at any time, besides
    returns     events in the order of time, x < W, y < H, in 0.3 s
    """
    height, width = image.shape
    margin = math.ceil(abs(amplitude)) + 1
    light = np.pad(image.astype(np.float64) / 255.0, margin)
    limit = threshold * np.clip(1.0 + 0.1 * generator.standard_normal(image.shape), 0.5, 1.5)
    level = np.log(0.125 + _moved(light, 0.0, 0.0, margin, image.shape))
    ys, xs = np.indices(image.shape)
    parts: list[npt.NDArray[np.int64]] = []
    for step in range(3 * SACCADE_STEPS):
        saccade, part = divmod(step, SACCADE_STEPS)
        (y0, x0), (y1, x1) = TRIANGLE[saccade], TRIANGLE[saccade + 1]
        way = (part + 1) / SACCADE_STEPS
        dy, dx = amplitude * (y0 + (y1 - y0) * way), amplitude * (x0 + (x1 - x0) * way)
        now = np.log(0.125 + _moved(light, dy, dx, margin, image.shape))
        crossed = np.trunc((now - level) / limit).astype(np.int64)
        level = level + crossed * limit  # a pixel remembers where it last fired
        times = np.abs(crossed).ravel()
        t = step * STEP_US + generator.integers(0, STEP_US, int(times.sum()))
        p = np.repeat((crossed > 0).astype(np.int64).ravel(), times)
        parts.append(np.stack([t, np.repeat(xs.ravel(), times), np.repeat(ys.ravel(), times), p]))
    ends = (3 * SACCADE_STEPS * STEP_US, width, height, 2)
    parts.append(np.stack([generator.integers(0, end, noise) for end in ends]))
    together = np.concatenate(parts, axis=1)
    t, x, y, p = together[:, np.argsort(together[0], kind="stable")]
    return Events(t, x, y, p)


def _moved(light: npt.NDArray[np.float64], dy: float, dx: float, margin: int, shape: tuple[int, ...]) -> Any:
    """The part of a padded image that a camera moved by (dy, dx) pixels sees, between pixels linearly."""
    y, x = math.floor(dy), math.floor(dx)
    fy, fx = dy - y, dx - x
    rows, columns = slice(margin + y, margin + y + shape[0] + 1), slice(margin + x, margin + x + shape[1] + 1)
    seen = light[rows, columns]
    seen = seen[:-1] * (1.0 - fy) + seen[1:] * fy
    return seen[:, :-1] * (1.0 - fx) + seen[:, 1:] * fx

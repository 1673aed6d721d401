"""Data sets: real pixels as uint8, their splits, and augmentation that stays on uint8.

A set is whole in memory: [N, C, H, W] for images, [T, N, C, H, W] for event frames. Pixels stay uint8 until the
network's input table (docs/arithmetic.md), so that training, freezing and every engine read the same codes.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdsnn.kernels.errors import ConfigError, InputError, MissingError
from mdsnn.kernels.files import read_bounded

from . import archives, events
from .images import Coding, read_image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
log = logging.getLogger(__name__)

DIGITS_TEST = 450
DIGITS_SPLIT = 20251204
"""Random state of the digits' split: fixed, so that an accuracy always speaks of the same 450 images."""
DIGITS_EVENTS = (10, 6)
"""Side of the made recordings' sensor, in pixels, and how many frames they become: two a saccade."""
EVENT_SETS = {"ncaltech101": events.FRAMES, "digits-events": DIGITS_EVENTS[1]}
"""Timesteps that each event set has frames for."""
TINY_SIDE = 64
MAX_LISTING = 1 << 24
"""Bytes of TinyImageNet's val_annotations.txt; the real one has 250 kB."""


@dataclass(frozen=True)
class Dataset:
    """A data set with its split, as uint8.

    train_x, test_x  images [N, C, H, W], or event counts [T, N, C, H, W]
    train_y, test_y  [N] int64, in range(len(labels))
    mean, std        (C,) of the training pixels / 255: what the input table subtracts and divides by
    labels           the name of each class     coding  "image" or "events"     name  what `load` calls it
    flips            whether a mirrored sample keeps its label (digits do not)
    """

    train_x: Pixels
    train_y: Labels
    test_x: Pixels
    test_y: Labels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    coding: Coding
    name: str
    flips: bool = False

    def __post_init__(self) -> None:
        axes, batch = (4, 0) if self.coding == "image" else (5, 1)
        for what, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dtype != np.uint8 or x.ndim != axes or x.size == 0:
                raise InputError(
                    f"data set '{self.name}': {what} pixels are {list(x.shape)} {x.dtype}, not {axes} axes of uint8"
                )
            if y.dtype != np.int64 or y.shape != (x.shape[batch],):
                raise InputError(
                    f"data set '{self.name}': {x.shape[batch]} {what} samples, labels {list(y.shape)} {y.dtype}"
                )
            if y.min() < 0 or y.max() >= len(self.labels):
                raise InputError(f"data set '{self.name}': a {what} label is outside 0..{len(self.labels) - 1}")
        if self.train_x.shape[-3:] != self.test_x.shape[-3:]:
            raise InputError(
                f"data set '{self.name}': train {self.train_x.shape[-3:]} and test {self.test_x.shape[-3:]} differ"
            )
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0.0:
            raise InputError(f"data set '{self.name}': mean and std must be one value a channel, std above 0")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.train_x.shape[-3])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return int(self.train_x.shape[-2]), int(self.train_x.shape[-1])

    def digest(self) -> str:
        """sha256 over the training samples and labels: a resumed run must see the same ones."""
        state = hashlib.sha256(repr((self.train_x.shape, self.mean, self.std)).encode())
        state.update(np.ascontiguousarray(self.train_x).reshape(-1).data)
        state.update(np.ascontiguousarray(self.train_y).reshape(-1).data)
        return state.hexdigest()


def moments(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of [..., C, H, W] uint8, divided by 255, rounded to 4 digits.

    A channel of one value only gets std 1, so that the input table stays finite.
    """
    samples = pixels.reshape(-1, *pixels.shape[-3:])
    seen = np.zeros((samples.shape[1], 256), np.int64)
    for begin in range(0, len(samples), 4096):  # a histogram in parts: a large set in float64 would not fit in memory
        for channel, counts in enumerate(seen):
            counts += np.bincount(samples[begin : begin + 4096, channel].ravel(), minlength=256)
    value = np.arange(256) / 255.0
    share = seen / seen.sum(axis=1, keepdims=True)
    mean = share @ value
    std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) or 1.0 for s in std)


# ------------------------------------------------------------------------------------------------------ the sets


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 scanned 8x8 images, stratified into 1,347 to train on and 450 to test on.

    Pixels 0..16 become round(v * 255 / 16). Source: UCI "Optical Recognition of Handwritten Digits", test part.
    raises  MissingError  if scikit-learn is not installed
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as fault:
        raise MissingError("the digits come with scikit-learn: pip install 'mdsnn[train]'") from fault
    source = load_digits()
    pixels = np.rint(source.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_TEST, stratify=source.target, random_state=DIGITS_SPLIT
    )
    y = source.target.astype(np.int64)
    mean, std = moments(pixels[train])
    names = tuple(str(name) for name in source.target_names)
    return Dataset(pixels[train], y[train], pixels[test], y[test], mean, std, names, "image", "digits")


def imagefolder(data_path: str | os.PathLike[str]) -> Dataset:
    """Image files in DATA_PATH/train/CLASS/* and DATA_PATH/test/CLASS/*; classes in the order of their names.

    All images must have the size of the first; they are grey (C = 1) if all of them are, else RGB.
    raises  InputError  for a missing folder, unequal classes, a class without images, or an unreadable image
    """
    root = Path(data_path)
    listing = {split: _classes(root / split) for split in ("train", "test")}
    labels = tuple(listing["train"])
    if labels != tuple(listing["test"]):
        odd = sorted(set(listing["train"]) ^ set(listing["test"]))
        raise InputError(f"{root}: train and test hold different classes: {', '.join(odd[:5])}")
    files = [(split, label, path) for split in listing for label, paths in listing[split].items() for path in paths]
    channels = 1 if all(_grey(path) for _, _, path in files) else 3
    size = read_image(files[0][2], channels).shape[1:]
    pixels: dict[str, list[Pixels]] = {"train": [], "test": []}
    targets: dict[str, list[int]] = {"train": [], "test": []}
    for split, label, path in files:
        pixels[split].append(read_image(path, channels, (size[0], size[1])))
        targets[split].append(labels.index(label))
    train_x, test_x = np.stack(pixels["train"]), np.stack(pixels["test"])
    mean, std = moments(train_x)
    y = {split: np.array(targets[split], np.int64) for split in targets}
    return Dataset(train_x, y["train"], test_x, y["test"], mean, std, labels, "image", "imagefolder", flips=True)


def _classes(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; an image folder holds train/CLASS/* and test/CLASS/*")
    found = {
        child.name: sorted(path for path in child.iterdir() if path.is_file() and not path.name.startswith("."))
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    empty = [name for name, paths in found.items() if not paths]
    if not found or empty:
        raise InputError(f"{folder}: {f'class {empty[0]!r} holds no image' if empty else 'holds no class folder'}")
    return found


def _grey(path: Path) -> bool:
    pixels = read_image(path, 3)
    return bool(np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2]))


def cifar(
    archive: archives.Archive,
    data_path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """CIFAR-10 or CIFAR-100 (`archives.CIFAR10`, `archives.CIFAR100`): 3 x 32 x 32, 50,000 and 10,000 images.

    data_path, progress, raises   see `archives.read_cifar`: what is not there is downloaded
    """
    train_x, train_y, test_x, test_y, labels = archives.read_cifar(archive, data_path, progress=progress)
    mean, std = moments(train_x)
    return Dataset(train_x, train_y, test_x, test_y, mean, std, labels, "image", archive.name, flips=True)


def tinyimagenet(data_path: str | os.PathLike[str]) -> Dataset:
    """TinyImageNet's folders: 3 x 64 x 64, 200 classes of 500 images, and its validation images as the test half.

    data_path  holds tiny-imagenet-200/, or train/WNID/images/* and val/images/* with val/val_annotations.txt itself;
               classes are in the order of their WordNet numbers, which are their names too; grey images become RGB
    raises     InputError  for a missing folder, an image named in val_annotations.txt that is not there or has an
               unknown class, an image of another size, or an unreadable one
    """
    root = Path(data_path)
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (root / "train").is_dir():
        raise InputError(
            f"{root}: holds no train/ folder. Get http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it here"
        )
    labels = tuple(sorted(child.name for child in (root / "train").iterdir() if (child / "images").is_dir()))
    train: list[tuple[int, Path]] = []
    for label, wnid in enumerate(labels):
        folder = root / "train" / wnid / "images"
        train += [(label, path) for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if not train:
        raise InputError(f"{root / 'train'}: holds no WNID/images/ folder with images")
    test = _annotated(root / "val", labels)
    halves = []
    for half in (train, test):
        pixels = np.empty((len(half), 3, TINY_SIDE, TINY_SIDE), np.uint8)
        for row, (_, path) in zip(pixels, half, strict=True):
            row[...] = read_image(path, 3, (TINY_SIDE, TINY_SIDE))
        halves.append((pixels, np.array([label for label, _ in half], np.int64)))
    (train_x, train_y), (test_x, test_y) = halves
    mean, std = moments(train_x)
    return Dataset(train_x, train_y, test_x, test_y, mean, std, labels, "image", "tinyimagenet", flips=True)


def _annotated(folder: Path, labels: tuple[str, ...]) -> list[tuple[int, Path]]:
    """(label, image) of each line `FILE<tab>WNID<tab>box` of val_annotations.txt."""
    where = folder / "val_annotations.txt"
    text = read_bounded(where, MAX_LISTING, what="list of validation images").decode("utf-8", errors="replace")
    number = {wnid: label for label, wnid in enumerate(labels)}
    found: dict[str, int] = {}
    for n, line in enumerate(text.splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not line.strip():
            continue
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or name in found:
            raise InputError(f"{where}: line {n}: {name!r:.80} is no file name, or stands twice")
        if wnid not in number:
            raise InputError(f"{where}: line {n}: class {wnid!r:.40} is no folder of train/")
        found[name] = number[wnid]
    if not found:
        raise InputError(f"{where}: names no image")
    return [(label, folder / "images" / name) for name, label in sorted(found.items())]


def ncaltech101(data_path: str | os.PathLike[str]) -> Dataset:
    """N-Caltech101 as 10 frames of 2 x 48 x 48 event counts; see `events.read_ncaltech101`.

    data_path  the set's folder, or the one that holds it as N-Caltech101/, as the reference's commands name it
    """
    root = Path(data_path)
    root = root / "N-Caltech101" if (root / "N-Caltech101").is_dir() else root
    train_x, train_y, test_x, test_y, labels = events.read_ncaltech101(root)
    mean, std = moments(train_x)
    return Dataset(train_x, train_y, test_x, test_y, mean, std, labels, "events", "ncaltech101", flips=True)


def digits_events(seed: int = 0) -> Dataset:
    """MADE events, which no camera recorded: the digits, each moved along N-MNIST's three saccades.

    The split is that of `digits`. Each image, with a black pixel around it, goes through `events.saccades`, and its
    events become 6 frames, two a saccade: [6, N, 2, 10, 10].
    seed     of the thresholds and the noise; sample n of the source has a generator of its own
    raises   MissingError  if scikit-learn is not installed
    """
    log.info("digits-events: made from scikit-learn's digits by simulated saccades; no camera recorded them")
    source = digits()
    side, frames = DIGITS_EVENTS
    halves = []
    for half, pixels in enumerate((source.train_x, source.test_x)):
        out = np.empty((frames, len(pixels), 2, side, side), np.uint8)
        border = (side - pixels.shape[-1]) // 2
        for n, image in enumerate(np.pad(pixels[:, 0], ((0, 0), (border, border), (border, border)))):
            made = events.saccades(image, np.random.default_rng([seed, half, n]))
            out[:, n] = events.integrate(made, frames, side, side)
        halves.append(out)
    mean, std = moments(halves[0])
    return Dataset(
        halves[0], source.train_y, halves[1], source.test_y, mean, std, source.labels, "events", "digits-events"
    )


def _digits(data_path: str | os.PathLike[str] | None) -> Dataset:
    return digits()


def _digits_events(data_path: str | os.PathLike[str] | None) -> Dataset:
    return digits_events()


def _needs_path(
    name: str, reader: Callable[[str | os.PathLike[str]], Dataset], what: str
) -> Callable[[str | os.PathLike[str] | None], Dataset]:
    def read(data_path: str | os.PathLike[str] | None) -> Dataset:
        if data_path is None:
            raise ConfigError(f"data '{name}' needs data_path (--data-path), {what}")
        return reader(data_path)

    return read


_ARCHIVE = "the folder that holds the python archive, packed or not, or that it is downloaded into"
DATASETS: dict[str, Callable[[str | os.PathLike[str] | None], Dataset]] = {
    "digits": _digits,
    "digits-events": _digits_events,
    "imagefolder": _needs_path("imagefolder", imagefolder, "the folder that holds train/ and test/"),
    "cifar10": _needs_path("cifar10", lambda path: cifar(archives.CIFAR10, path), _ARCHIVE),
    "cifar100": _needs_path("cifar100", lambda path: cifar(archives.CIFAR100, path), _ARCHIVE),
    "tinyimagenet": _needs_path("tinyimagenet", tinyimagenet, "the folder that holds tiny-imagenet-200/"),
    "ncaltech101": _needs_path(
        "ncaltech101", ncaltech101, f"the folder that holds {events.FRAMES_FOLDER}/ or Caltech101/"
    ),
}
"""Readers by name; each takes data_path or None. A set of your own is one entry more."""


def unknown(what: str, name: str, choices: Collection[str]) -> str:
    """The message for a name that is none of `choices`: lists them, and asks for the nearest."""
    near = difflib.get_close_matches(name.lower(), list(choices), n=1)
    return f"unknown {what} {name!r}; choose from {', '.join(choices)}{f'. Did you mean {near[0]!r}?' if near else ''}"


def check_name(name: str, others: Collection[str] = ()) -> str:
    """The key of `DATASETS` that `name` means, whatever its case, dashes or underscores; else ConfigError.

    others  what else the caller takes, for the message
    """
    plain = {key.replace("-", ""): key for key in DATASETS}
    key = plain.get(str(name).lower().replace("-", "").replace("_", ""))
    if key is None:
        raise ConfigError(unknown("data", str(name).lower(), [*others, *sorted(DATASETS)]))
    return key


def load(name: str, data_path: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set called `name`, a key of `DATASETS`; "digits" and "digits-events" need no files (docs/data.md).

    raises  ConfigError for an unknown name, or no data_path where one is needed; what the reader raises (InputError,
            MissingError, StorageError)
    """
    return DATASETS[check_name(name)](data_path)


# -------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a batch: shift by up to `shift` pixels, mirror half of it, blank a `cutout`-sized square."""

    shift: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} = {value!r} must be a whole number of at least 0"
            for name, value in (("shift", self.shift), ("cutout", self.cutout))
            if type(value) is not int or value < 0
        ]
        if type(self.flip) is not bool:
            faults.append(f"flip = {self.flip!r} must be true or false")
        if faults:
            raise ConfigError("augmentation: " + "; ".join(faults))


def augment(
    x: Tensor, augmentation: Augmentation, generator: torch.Generator, *, part: tuple[slice, int] | None = None
) -> Tensor:
    """Change a batch of uint8 samples at random, on the device it is on; every timestep of a sample changes alike.

    x        [N, C, H, W] or [T, N, C, H, W] uint8
    part     (where, of): x are the samples `where` of a batch of `of`; the numbers of the whole batch are drawn, so
             that each sample changes as if the batch were whole
    returns  the same shape, uint8: shifted (a random crop of the zero-padded sample), mirrored left to right with
             probability 1/2, and with one square of zeros, clipped at the border, centred anywhere
    """
    count, height, width = x.shape[-4], x.shape[-2], x.shape[-1]
    mine, of = (slice(0, count), count) if part is None else part
    if augmentation.shift:
        pad = augmentation.shift
        dy, dx = torch.randint(0, 2 * pad + 1, (2, of), generator=generator)[:, mine].to(x.device)
        padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
        rows = (dy[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
        columns = (dx[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
        sample = torch.arange(count, device=x.device)[:, None, None, None]
        channel = torch.arange(x.shape[-3], device=x.device)[None, :, None, None]
        x = padded[..., sample, channel, rows, columns]
    if augmentation.flip:
        chosen = (torch.rand(of, generator=generator) < 0.5)[mine].to(x.device)
        x = torch.where(chosen[:, None, None, None], x.flip(-1), x)
    if augmentation.cutout:
        cy = torch.randint(0, height, (of,), generator=generator)[mine].to(x.device)
        cx = torch.randint(0, width, (of,), generator=generator)[mine].to(x.device)
        half = augmentation.cutout // 2
        y, z = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside_y = (y >= (cy - half)[:, None]) & (y < (cy - half + augmentation.cutout)[:, None])
        inside_x = (z >= (cx - half)[:, None]) & (z < (cx - half + augmentation.cutout)[:, None])
        hidden = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
        x = x.masked_fill(hidden, 0)
    return x


def take(x: Pixels, index: npt.NDArray[np.int64] | slice, coding: Literal["image", "events"]) -> Pixels:
    """The samples `index` of a set: along axis 0 of images, along axis 1 of event frames."""
    return x[index] if coding == "image" else x[:, index]

"""Data sets as uint8: the fixed split, the readers' messages, and augmentation that moves pixels and makes none up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdsnn import data
from mdsnn.kernels.errors import ConfigError, InputError


def test_digits_are_the_1797_real_images_in_one_fixed_stratified_split():
    digits = data.digits()
    assert digits.train_x.shape == (1347, 1, 8, 8)
    assert digits.test_x.shape == (450, 1, 8, 8)
    assert digits.train_x.dtype == digits.test_x.dtype == np.uint8
    assert set(np.unique(digits.train_x)) == {int(np.rint(v * 255 / 16)) for v in range(17)}
    whole = np.bincount(np.concatenate([digits.train_y, digits.test_y]), minlength=10)
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(np.bincount(digits.test_y) - whole * 450 / 1797).max() < 1.0
    # the split itself: a change of it would make accuracies incomparable
    assert digits.digest() == "dbea5dd6125940cce9c53cfdac38660795e94eb6a42da1145ef27ecfb7f78462"
    assert digits.test_y[:12].tolist() == [1, 7, 9, 6, 9, 5, 1, 9, 2, 6, 5, 8]


def test_digits_train_and_test_hold_the_source_once_each():
    from sklearn.datasets import load_digits

    digits = data.digits()
    ours = np.concatenate([digits.train_x, digits.test_x])[:, 0].reshape(1797, -1)
    source = np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, source))


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    choices = "cifar10, cifar100, digits, digits-events, imagefolder, ncaltech101, tinyimagenet"
    with pytest.raises(ConfigError, match=f"unknown data 'digitz'; choose from {choices}. Did you mean 'digits'"):
        data.load("digitz")
    with pytest.raises(ConfigError, match="data 'cifar10' needs data_path"):
        data.load("CIFAR10")
    with pytest.raises(ConfigError, match="needs data_path"):
        data.load("imagefolder")
    assert data.check_name("Digits") == "digits"
    for name in ("CIFAR10", "CIFAR100", "TinyImagenet", "ncaltech101", "digits-events", "digits_events"):
        assert data.check_name(name) == name.lower().replace("_", "-")


def test_moments_are_per_channel_and_never_0():
    pixels = np.stack([np.full((6, 2, 2), 51), np.tile([0, 255], 12).reshape(6, 2, 2)], axis=1).astype(np.uint8)
    assert data.moments(pixels) == ((0.2, 0.5), (1.0, 0.5))


def test_a_data_set_that_is_inconsistent_is_refused():
    digits = data.digits()
    fields = dict(vars(digits))
    for change, words in [
        ({"train_x": digits.train_x.astype(np.int16)}, "int16"),
        ({"test_y": digits.test_y[:-1]}, "450 test samples, labels"),
        ({"labels": ("0", "1")}, "label is outside 0..1"),
        ({"std": (0.0,)}, "std above 0"),
        ({"test_x": digits.test_x[..., :7]}, "differ"),
    ]:
        with pytest.raises(InputError, match=words):
            data.Dataset(**{**fields, **change})


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for n in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8), "RGB")
                picture.save(tmp_path / split / label / f"{n}.png")
    return tmp_path


def test_imagefolder_reads_files_in_the_order_of_their_names(folder):
    found = data.load("imagefolder", folder)
    assert (found.train_x.shape, found.test_x.shape) == ((6, 3, 6, 5), (4, 3, 6, 5))
    assert (found.labels, found.channels, found.size) == (("ant", "bee"), 3, (6, 5))
    assert found.test_y.tolist() == [0, 0, 1, 1]
    with Image.open(folder / "test" / "bee" / "1.png") as picture:
        np.testing.assert_array_equal(found.test_x[3], np.asarray(picture).transpose(2, 0, 1))


def test_imagefolder_says_what_is_wrong(folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        data.imagefolder(tmp_path / "nowhere")
    (folder / "test" / "cat").mkdir()
    with pytest.raises(InputError, match="class 'cat' holds no image"):
        data.imagefolder(folder)
    Image.new("RGB", (5, 6)).save(folder / "test" / "cat" / "0.png")
    with pytest.raises(InputError, match="different classes: cat"):
        data.imagefolder(folder)
    (folder / "train" / "cat").mkdir()
    Image.new("RGB", (4, 6)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(InputError, match="6 x 4 pixels"):
        data.imagefolder(folder)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), shift=st.integers(0, 3), events=st.booleans())
def test_a_shift_moves_pixels_and_fills_with_0(seed, shift, events):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2, 5, 4) if events else (3, 2, 5, 4)
    x = torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)
    out = data.augment(x, data.Augmentation(shift=shift), generator)
    assert out.shape == x.shape
    assert out.dtype == torch.uint8
    for n in range(3):
        padded = torch.nn.functional.pad(x[..., n, :, :, :], (shift,) * 4)
        windows = [padded[..., dy : dy + 5, dx : dx + 4] for dy in range(2 * shift + 1) for dx in range(2 * shift + 1)]
        assert any(torch.equal(out[..., n, :, :, :], window) for window in windows)


def test_shifts_reach_every_offset_and_are_the_generators():
    x = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    x[:, :, 1, 1] = 9
    draw = lambda seed: data.augment(x, data.Augmentation(shift=1), torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(3).flatten(1).argmax(1).unique().tolist() == list(range(9))
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_flips_mirror_about_half_and_cutout_blanks_a_square():
    x = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4).repeat(200, 1, 1, 1)
    flipped = data.augment(x, data.Augmentation(flip=True), torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert torch.equal(~mirrored, (flipped == x).flatten(1).all(1))
    assert 70 < int(mirrored.sum()) < 130
    cut = data.augment(x, data.Augmentation(cutout=2), torch.Generator().manual_seed(0))
    hidden = (cut == 0).flatten(1).sum(1)
    assert set(hidden.tolist()) <= {1, 2, 4}
    assert torch.equal(torch.where(cut == 0, x, cut), x)


def test_augmentation_refuses_nonsense():
    with pytest.raises(ConfigError, match=r"shift = -1 .*; cutout = 1.5"):
        data.Augmentation(shift=-1, cutout=1.5)


def test_take_picks_samples_on_their_axis():
    x = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 1, 2, 2)
    np.testing.assert_array_equal(data.take(x, np.array([2, 0]), "events"), x[:, [2, 0]])
    np.testing.assert_array_equal(data.take(x, slice(1, 2), "image"), x[1:2])

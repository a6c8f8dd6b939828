"""Augmentations and small image sets."""

import io

import numpy as np
import pytest
from PIL import Image

from zoo.data import augmentation
from zoo.data.augmentation import OPERATIONS, Recipe, evaluation_batches, train_batches
from zoo.data.images import LabelledImages, handwritten_digits, sign_digits


def noise(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_type(name):
    image = Image.fromarray(noise())
    changed = [np.asarray(OPERATIONS[name](image, strength, generator())) for strength in (0.0, 0.5, 1.0)]
    assert all(x.shape == (24, 32, 3) and x.dtype == np.uint8 for x in changed)
    assert any((x != noise()).any() for x in changed[1:]) or name in ("auto_contrast", "equalize")
    if name.startswith(("shear", "translate", "rotate", "colour", "contrast", "brightness", "sharpness")):
        np.testing.assert_array_equal(changed[0], noise())


def test_crops_have_the_size_asked_for():
    for seed in range(20):
        assert augmentation.random_resized_crop(generator(seed), noise(10, 90), (8, 12)).shape == (8, 12, 3)
    assert augmentation.centre_crop(noise(50, 40), (16, 16)).shape == (16, 16, 3)


def test_erasing_replaces_one_rectangle():
    image = np.full((20, 20, 3), 7.0, np.float32)
    erased = augmentation.random_erasing(generator(1), image, 1.0)
    changed = (erased != 7).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert 0.01 < changed.mean() < 0.4 and (image == 7).all()
    assert augmentation.random_erasing(generator(1), image, 0.0) is image


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_labels_are_mixed_as_much_as_images(mixup, cutmix):
    # Image i is of the constant value i, and of class i: the mean of an image is what its label expects.
    images = np.arange(4.0, dtype=np.float32)[:, None, None, None] * np.ones((1, 16, 16, 3), np.float32)
    for seed in range(6):
        mixed, labels = augmentation.mix(generator(seed), images, np.arange(4), 4, mixup, cutmix, smoothing=0.0)
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), labels @ np.arange(4.0), atol=1e-5)
    _, smooth = augmentation.mix(generator(), images, np.arange(4), 4, 0.0, 0.0, smoothing=0.2)
    np.testing.assert_allclose(smooth[0], [0.85, 0.05, 0.05, 0.05], atol=1e-6)


def test_repeated_augmentation_sees_each_image_three_times():
    source = LabelledImages(np.zeros((300, 4, 4, 3), np.uint8), np.arange(300))
    recipe = Recipe(repeats=3, mixup=0, cutmix=0, smoothing=0)
    dataset = train_batches(source, (4, 4), 256, 300, recipe, seed=0)
    epochs = [dataset[index]["labels"].argmax(1) for index in (0, 1)]
    for labels in epochs:
        assert sorted(np.unique(labels, return_counts=True)[1])[-85:] == [3] * 85
    assert set(epochs[0]) != set(epochs[1])


def test_the_same_seed_gives_the_same_batches():
    source = LabelledImages(np.stack([noise(seed=i) for i in range(8)]), np.arange(8))
    first, same, other = (train_batches(source, (16, 16), 4, 8, Recipe(), seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["images"], same["images"])
    assert (first["images"] != other["images"]).any() and first["images"].shape == (4, 16, 16, 3)
    with pytest.raises(ValueError, match="between 1 and the 8 items, got 9"):
        train_batches(source, (16, 16), 9, 8, Recipe(), 0)


def test_evaluation_sees_everything_once():
    source = LabelledImages(np.stack([noise(seed=i) for i in range(5)]), np.arange(5))
    batches = list(evaluation_batches(source, (24, 32), 2))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    np.testing.assert_allclose(batches[0]["images"][0], augmentation.standardise(noise(seed=0)))


def test_digits_are_there():
    data = handwritten_digits(16)
    assert data.train.images.shape == (1397, 16, 16, 3) and len(data.test) == 400
    assert set(data.test.labels) == set(range(10)) and data.train.images.max() > 200


def test_sign_digits_are_read_from_their_file(tmp_path):
    files = []
    for seed in range(3):
        buffer = io.BytesIO()
        Image.fromarray(noise(64, 64, seed)).save(buffer, "JPEG", quality=95)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.concatenate(files), "offsets": offsets, "label": np.arange(3), "split": np.array([0, 1, 0])}
    np.savez(tmp_path / "sign_digits.npz", **arrays)
    data = sign_digits(tmp_path)
    assert list(data.train.labels) == [0, 2] and data.test[0]["image"].shape == (64, 64, 3)
    with pytest.raises(FileNotFoundError, match=r"sign_digits\.npz"):
        sign_digits(tmp_path / "elsewhere")
    np.savez(tmp_path / "sign_digits.npz", label=np.arange(3))
    with pytest.raises(ValueError, match="lacks"):
        sign_digits(tmp_path)


def test_recipes_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"flip must be a probability, got 1\.5"):
        Recipe(flip=1.5)
    with pytest.raises(ValueError, match="repeats at least 1"):
        Recipe(repeats=0)

"""Pictures of several labels and where they are."""

import numpy as np
import pytest

from zoo.data.bccd import LabelledBoxes
from zoo.data.images import LabelledImages, handwritten_digits
from zoo.data.multilabel import MultilabelImages, cell_windows, digit_canvases, mosaics, points_at


def test_canvases_hold_what_their_labels_say():
    digits = handwritten_digits(16).train
    data = digit_canvases(digits, 300, seed=0, noise=0.0)
    assert data.images.shape == (300, 48, 48, 3) and data[0]["label"].shape == (10,)
    numbers = data.labels.sum(1)
    assert numbers.min() == 1 and numbers.max() == 4
    np.testing.assert_array_equal(data.places.any((2, 3)), data.labels > 0)
    drawn = data.images.reshape(300, 3, 16, 3, 16, 3).max((2, 4, 5)) > 0
    np.testing.assert_array_equal(drawn, data.places.any(1))
    together = lambda a, b: (data.labels[:, a] * data.labels[:, b]).mean()  # noqa: E731
    assert together(3, 8) > 1.5 * together(3, 5) and together(1, 7) > 1.5 * together(1, 8)
    with pytest.raises(ValueError, match="digits must not be larger than a cell of 8 pixels, got 16"):
        digit_canvases(digits, 1, seed=0, cell=8)


def test_windows_are_labelled_by_middles():
    boxes = np.array([[[10, 10, 30, 30], [90, 0, 130, 20], [0, 0, 0, 0]]], np.float32)
    data = LabelledBoxes(np.zeros((1, 96, 120, 3), np.uint8), boxes, np.array([[1, 2, -1]]))
    found = cell_windows(data, 40, seed=0, size=96, grid=12)
    assert found.images.shape == (40, 96, 96, 3) and not found.labels[:, 0].any()
    assert 0 < found.labels[:, 1].mean() <= 1
    shown = found.labels[:, 1] > 0
    assert found.places[shown, 1].any((1, 2)).all() and not found.places[~shown, 1].any()
    with pytest.raises(ValueError, match="size must be at most 96 and a multiple of grid 12, got 100"):
        cell_windows(data, 1, seed=0, size=100)


def test_mosaics_and_pointing():
    source = LabelledImages(
        np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 4, 4, 3), np.uint8), np.arange(3)
    )
    data = mosaics(source, 3, 20, seed=0)
    assert data.images.shape == (20, 8, 8, 3)
    corners = data.images[:, ::4, ::4, 0]
    np.testing.assert_array_equal(data.places, corners[:, None] == np.arange(3)[:, None, None])
    exact = np.repeat(np.repeat(np.moveaxis(data.places, 1, -1), 2, 1), 2, 2).astype(float)
    assert points_at(exact, data).all() and len(points_at(exact, data)) == data.labels.sum()
    one = MultilabelImages(data.images[:1], np.eye(3, dtype=np.float32)[:1], np.zeros((1, 3, 2, 2), bool))
    assert not points_at(exact[:1], one).any()
    with pytest.raises(ValueError, match=r"heat must be of \(20, 3\) pictures and labels"):
        points_at(exact[:2], data)

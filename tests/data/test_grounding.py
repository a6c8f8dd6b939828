"""Questions about cells and digits, and sentences as vectors."""

import numpy as np
import pytest

from zoo.data.bccd import LabelledBoxes
from zoo.data.grounding import (
    CELL_QUESTIONS,
    HELD_OUT,
    cell_questions,
    digit_questions,
    ellipses,
    hashed_sentences,
)


def test_sentences_that_share_words_are_near():
    a, b, c = hashed_sentences(["where are the platelets?", "Where are the platelets", "show every seven"])
    np.testing.assert_array_equal(a, b)
    assert np.linalg.norm(a) == pytest.approx(1) and a @ c < 0.3
    questions = [hashed_sentences(phrasings) for phrasings in CELL_QUESTIONS.values()]
    for index, own in enumerate(questions):  # a held-out phrasing is nearest to one of its own
        for vector in own[-HELD_OUT:]:
            near = [(known[:-HELD_OUT] @ vector).max() for known in questions]
            assert int(np.argmax(near)) == index
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        hashed_sentences(["a"], 0)


def test_ellipses_touch_their_box():
    mask = ellipses(np.array([[2.0, 1, 8, 5], [0, 0, 0, 0]]), 8, 10)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 4, 2, 7) and not mask[1, 2]
    assert mask.sum() == pytest.approx(np.pi * 3 * 2, rel=0.1)


def test_cells_that_are_there_are_asked_for():
    boxes = np.array([[[0, 0, 10, 10], [20, 10, 30, 20], [0, 0, 0, 0]], [[5, 5, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]]])
    labels = np.array([[0, 2, -1], [1, -1, -1]])
    data = LabelledBoxes(np.zeros((2, 20, 40, 3), np.uint8), boxes.astype(np.float32), labels)
    questions = cell_questions(data, (10, 20), slice(None, -HELD_OUT))
    assert list(questions.owner) == [0, 0, 1] and list(questions.kind) == [0, 2, 1]
    item = questions[1]
    assert item["image"].shape == (10, 20, 3) and item["text"].shape == (3, 384)
    assert item["mask"][7, 12] and not item["mask"][2, 2]


@pytest.mark.parametrize("relational", [False, True])
def test_digits_on_canvases(relational):
    questions = digit_questions(20, slice(0, 1), 0, size=48, relational=relational)
    assert questions.images.shape == (20, 48, 48, 3) and questions.masks.sum((1, 2)).tolist() == [144] * 20
    again = digit_questions(20, slice(0, 1), 0, size=48, relational=relational)
    np.testing.assert_array_equal(questions.images, again.images)
    # Something is drawn on the evidence.
    assert all(image[mask].max() > 100 for image, mask in zip(questions.images, questions.masks, strict=True))
    with pytest.raises(ValueError, match="size must be a multiple of 3"):
        digit_questions(1, slice(0, 1), 0, size=50)
    with pytest.raises(ValueError, match="part must be 'train' or 'test', got 'validation'"):
        digit_questions(1, slice(0, 1), 0, part="validation")

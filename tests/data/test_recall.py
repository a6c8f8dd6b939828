import numpy as np
import pytest

from zoo.data.recall import IGNORED, mqar


def test_every_question_has_its_answer_in_the_row():
    task = mqar(0, 50, 32, 6, vocab_size=64)
    assert task.tokens.shape == task.labels.shape == (50, 32)
    for tokens, labels in zip(task.tokens, task.labels, strict=True):
        known = dict(zip(tokens[0:12:2].tolist(), tokens[1:12:2].tolist(), strict=True))
        assert len(known) == 6 and all(1 <= key < 32 <= value < 64 for key, value in known.items())
        asked = np.flatnonzero(labels != IGNORED)
        assert len(asked) == 6 and asked.min() >= 12 and (asked % 2 == 0).all()
        assert [known[key] for key in tokens[asked].tolist()] == labels[asked].tolist()
        assert (np.delete(tokens[12:], asked - 12) == 0).all()


def test_small_powers_ask_soon():
    near, far = (np.mean(np.argwhere(mqar(0, 400, 64, 4, 128, power).labels != IGNORED)[:, 1]) for power in (0.01, 1.0))
    assert near < far - 5


def test_blanks_may_be_random():
    plain, filled = mqar(3, 20, 32, 4, 64), mqar(3, 20, 32, 4, 64, random_blanks=True)
    np.testing.assert_array_equal(plain.labels, filled.labels)
    same = plain.tokens == filled.tokens
    assert same[plain.tokens != 0].all() and not same[plain.tokens == 0].all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 5, 31, 4, 64), "length must be even and at least 4 pairs = 16, got 31"),
        ((0, 5, 12, 4, 64), "at least 4 pairs = 16, got 12"),
        ((0, 5, 64, 4, 64), "vocab_size must be more than length = 64"),
        ((0, 0, 32, 4, 64), "must be positive"),
    ],
)
def test_wrong_numbers_say_so(arguments, message):
    with pytest.raises(ValueError, match=message):
        mqar(*arguments)

import numpy as np
import pytest

from zoo.data.recall import IGNORED, copying, induction, mqar, needle
from zoo.data.text import read_text


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


def test_the_needle_asked_for_is_in_the_haystack():
    task = needle(0, 60, 26, needles=4, vocab_size=64)
    for tokens, labels in zip(task.tokens, task.labels, strict=True):
        marks = np.flatnonzero(tokens == 0)
        assert len(marks) == 4 and (np.diff(marks) >= 3).all() and marks[-1] + 2 < 24
        known = dict(zip(tokens[marks + 1].tolist(), tokens[marks + 2].tolist(), strict=True))
        assert len(known) == 4 and all(2 <= key < 16 <= value < 32 for key, value in known.items())
        hay = np.delete(tokens[:24], (marks[:, None] + np.arange(3)).ravel())
        assert (hay >= 32).all()
        assert tokens[-2] == 1 and known[tokens[-1]] == labels[-1] and (labels[:-1] == IGNORED).all()


def test_induction_asks_what_came_after_the_mark():
    task = induction(0, 60, 12, vocab_size=9)
    for tokens, labels in zip(task.tokens, task.labels, strict=True):
        first, last = np.flatnonzero(tokens == 0)
        assert last == 11 and labels[-1] == tokens[first + 1] != 0 and (labels[:-1] == IGNORED).all()


def test_copying_asks_for_the_text_again():
    task = copying(0, 5, 12, vocab_size=9)
    np.testing.assert_array_equal(task.labels[:, 6:], task.tokens[:, :6])
    np.testing.assert_array_equal(task.tokens[:, 7:], task.tokens[:, :5])
    assert (task.tokens[:, 6] == 0).all() and (task.labels[:, :6] == IGNORED).all() and task.tokens[:, :6].min() > 0


def test_seeds_decide():
    for task in (needle, induction, copying):
        np.testing.assert_array_equal(task(1, 3, 20).tokens, task(1, 3, 20).tokens)
        assert (task(1, 3, 20).tokens != task(2, 3, 20).tokens).any()


def test_text_is_real_and_read_in_order(tmp_path):
    text = bytes(read_text())
    assert len(text) > 300_000 and b"The standard" in text and max(text) < 256
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "README.md").write_text("not text")
    assert bytes(read_text(tmp_path)) == b"first\nsecond"
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        read_text(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: needle(0, 1, 17, needles=4), r"length must be at least 4 needles \+ 2"),
        (lambda: needle(0, 1, 60, needles=9, vocab_size=40), r"a quarter of vocab_size at least needles \+ 2"),
        (lambda: induction(0, 1, 2), "length and vocab_size must be at least 3, got 2"),
        (lambda: copying(0, 1, 7), "length must be even"),
    ],
)
def test_wrong_sizes_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

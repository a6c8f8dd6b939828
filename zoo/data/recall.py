"""Tasks that ask for what came before: associative recall, needles in a haystack, induction, copying."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED = -100  # the label of a position at which nothing is asked


class Recall(NamedTuple):
    """Examples of the task."""

    tokens: np.ndarray  # int32 (examples, length)
    labels: np.ndarray  # int32 (examples, length): the value asked for, or IGNORED


def mqar(
    seed: int,
    examples: int,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_blanks: bool = False,
) -> Recall:
    """Multi-query associative recall (Arora et al. 2023, "Zoology"): which value came with this key?

    k_1 v_1 ... k_n v_n, then at the gap g that each key draws from p(g) ~ g^(power - 1) the key again.

    Bit by bit what the published generator gives for the same seed (numpy's legacy generator; keys, values, gaps, each
    row by row). With `random_blanks` the published code draws from another library's unseeded generator; so do we, from
    our own.

    Args:
      seed: of all draws.
      examples: rows.
      length: tokens of a row, even, at least 4 pairs.
      pairs: keys with their values; keys are of 1 .. vocab_size / 2 - 1, values of the other half, none twice in a row.
      vocab_size: more than `length`.
      power: the smaller, the nearer most questions; 1 is uniform.
      random_blanks: tokens at which nothing happens are random and not 0.

    Raises:
      ValueError: a number is out of range.
    """
    if length % 2 or pairs < 1 or 4 * pairs > length:
        raise ValueError(f"length must be even and at least 4 pairs = {4 * pairs}, got {length}")
    if vocab_size <= length or vocab_size // 2 <= pairs:
        raise ValueError(f"vocab_size must be more than length = {length} and 2 pairs, got {vocab_size}")
    if not power > 0 or examples < 1:
        raise ValueError(f"power and examples must be positive, got {power} and {examples}")
    random = np.random.RandomState(seed)
    half, context = vocab_size // 2, 2 * pairs
    slots = (length - context) // 2
    chance = power * np.arange(1, slots + 1) ** (power - 1)
    chance /= chance.sum()

    def draw(choices: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
        return np.stack([random.choice(choices, size=pairs, replace=False, p=p) for _ in range(examples)])

    keys, values = draw(np.arange(1, half)), draw(np.arange(half, vocab_size))
    gaps = draw(np.arange(slots), chance)
    tokens = np.zeros((examples, length), np.int32)
    labels = np.full((examples, length), IGNORED, np.int32)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    np.put_along_axis(tokens, context + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, context + 2 * gaps, values, axis=1)
    if random_blanks:
        blank = tokens == 0
        tokens[blank] = np.random.default_rng(seed).integers(0, vocab_size, blank.sum())
    return Recall(tokens, labels)


def needle(seed: int, examples: int, length: int, needles: int = 4, vocab_size: int = 256) -> Recall:
    """Pairs hidden in a haystack, of which one is asked for at the end: ... 0 k v ... 0 k' v' ... 1 k -> v.

    Args:
      seed: of all draws.
      examples: rows.
      length: tokens of a row, at least 4 needles + 2.
      needles: pairs, each behind the mark 0, at random places.
      vocab_size: keys are of 2 .. V / 4 - 1, none twice in a row, values of V / 4 .. V / 2 - 1, hay of V / 2 .. V - 1.

    Raises:
      ValueError: a number is out of range.
    """
    if needles < 1 or length < 4 * needles + 2 or vocab_size // 4 < needles + 2 or examples < 1:
        raise ValueError(
            f"length must be at least 4 needles + 2 and a quarter of vocab_size at least needles + 2, got length "
            f"{length}, {needles} needles, vocab_size {vocab_size}, {examples} examples"
        )
    random = np.random.default_rng(seed)
    quarter, half = vocab_size // 4, vocab_size // 2
    tokens = random.integers(half, vocab_size, (examples, length))
    keys = 2 + np.argsort(random.random((examples, quarter - 2)), axis=1)[:, :needles]
    values = random.integers(quarter, half, (examples, needles))
    # Places in a row without the needles' other two tokens: sorted, they do not overlap once those are put back.
    room = length - 2 - 2 * needles
    places = np.sort(np.argsort(random.random((examples, room)), axis=1)[:, :needles], axis=1) + 2 * np.arange(needles)
    for offset, part in enumerate((np.zeros_like(keys), keys, values)):
        np.put_along_axis(tokens, places + offset, part, axis=1)
    row, asked = np.arange(examples), random.integers(0, needles, examples)
    tokens[:, -2], tokens[:, -1] = 1, keys[row, asked]
    labels = np.full((examples, length), IGNORED)
    labels[:, -1] = values[row, asked]
    return Recall(tokens.astype(np.int32), labels.astype(np.int32))


def induction(seed: int, examples: int, length: int, vocab_size: int = 16) -> Recall:
    """A mark 0 once among random tokens, and again at the end: what came after it (Gu and Dao 2023, "Mamba").

    Args:
      seed: of all draws.
      examples: rows.
      length: tokens of a row, at least 3.
      vocab_size: random tokens are of 1 .. vocab_size - 1.

    Raises:
      ValueError: a number is out of range.
    """
    if length < 3 or vocab_size < 3 or examples < 1:
        raise ValueError(
            f"length and vocab_size must be at least 3, got {length} and {vocab_size} ({examples} examples)"
        )
    random = np.random.default_rng(seed)
    tokens = random.integers(1, vocab_size, (examples, length))
    row, place = np.arange(examples), random.integers(0, length - 2, examples)
    tokens[row, place] = tokens[:, -1] = 0
    labels = np.full((examples, length), IGNORED)
    labels[:, -1] = tokens[row, place + 1]
    return Recall(tokens.astype(np.int32), labels.astype(np.int32))


def copying(seed: int, examples: int, length: int, vocab_size: int = 16) -> Recall:
    """x_1 ... x_n 0 x_1 ... x_(n-1), n = length / 2: from the mark 0 on, each next token is asked for.

    Args:
      seed: of all draws.
      examples: rows.
      length: tokens of a row, even.
      vocab_size: tokens are of 1 .. vocab_size - 1.

    Raises:
      ValueError: a number is out of range.
    """
    if length < 2 or length % 2 or vocab_size < 3 or examples < 1:
        raise ValueError(
            f"length must be even, vocab_size at least 3, got {length} and {vocab_size} ({examples} examples)"
        )
    half = length // 2
    text = np.random.default_rng(seed).integers(1, vocab_size, (examples, half))
    tokens = np.concatenate([text, np.zeros((examples, 1), int), text[:, :-1]], axis=1)
    labels = np.concatenate([np.full((examples, half), IGNORED), text], axis=1)
    return Recall(tokens.astype(np.int32), labels.astype(np.int32))


def text_needles(seed: int, examples: int, length: int, text: np.ndarray, facts: int = 4, gap: int = 0) -> Recall:
    """Facts "key=dddd" planted in real text, of which one is asked for at the end: ... "? key=" -> dddd (S-NIAH).

    The digits of the answer stand in the row, each is asked for at the byte before it.

    Args:
      seed: of all draws.
      examples: rows.
      length: bytes of a row.
      text: uint8 (bytes,), longer than a row, what the facts are hidden in.
      facts: their number; keys are three letters, none twice in a row.
      gap: the asked fact ends at least this many bytes before the question.

    Raises:
      ValueError: the row or the text is too short, or a number out of range.
    """
    size, question = 11, 10  # " key=dddd. " and "? key=" with the digits
    room = length - question - gap
    if examples < 1 or facts < 1 or gap < 0 or room < 2 * size * facts:
        raise ValueError(
            f"length must be at least {question} + gap + {2 * size} facts = {question + gap + 2 * size * facts}, got "
            f"{length} ({examples} examples, {facts} facts, gap {gap})"
        )
    if len(text) <= length:
        raise ValueError(f"the text must be longer than a row of {length} bytes, got {len(text)}")
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(text) - length, examples)
    tokens = text[starts[:, None] + np.arange(length)].astype(np.int32)
    labels = np.full((examples, length), IGNORED, np.int32)
    for row in range(examples):
        # Distinct numbers in base 26 are distinct keys.
        codes = random.choice(26**3, size=facts, replace=False)
        keys = [bytes(97 + code // 26**power % 26 for power in range(3)) for code in codes]
        values = [f"{number:04d}".encode() for number in random.integers(0, 10_000, facts)]
        places = np.sort(random.choice(room - size * facts, size=facts, replace=False)) + size * np.arange(facts)
        for place, key, value in zip(places, keys, values, strict=True):
            tokens[row, place : place + size] = np.frombuffer(b" " + key + b"=" + value + b". ", np.uint8)
        asked = random.integers(facts)
        tokens[row, -question:] = np.frombuffer(b"? " + keys[asked] + b"=" + values[asked], np.uint8)
        labels[row, -5:-1] = tokens[row, -4:]
    return Recall(tokens, labels)

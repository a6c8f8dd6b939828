"""Multi-query associative recall (Arora et al. 2023, "Zoology"): which value came with this key?"""

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
    """k_1 v_1 ... k_n v_n, then at the gap g that each key draws from p(g) ~ g^(power - 1) the key again.

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

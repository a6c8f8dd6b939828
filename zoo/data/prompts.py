"""Prompts as bytes: `Task<argument> [answer]`, rows of them to learn from, and answers read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

TASK_END = ord(">")
ANSWER_END = ord("]")


def encode(text: str) -> list[int]:
    """Bytes. Raises ValueError for characters beyond ASCII."""
    if not text.isascii():
        raise ValueError(f"prompts are ASCII, got {text!r}")
    return list(text.encode())


def decode(tokens: Sequence[int] | np.ndarray) -> str:
    """Text of bytes up to the first padding (0)."""
    values = [int(token) for token in tokens]
    end = values.index(0) if 0 in values else len(values)
    return bytes(values[:end]).decode("latin-1")


def numbers(values: Sequence[float] | np.ndarray) -> str:
    """As text with two digits: 0.48,0.00,0.52."""
    return ",".join(f"{value:.2f}" for value in values)


def rows(texts: Sequence[str], width: int, whole: str = "") -> dict[str, Any]:
    """Tokens of prompts with answers, padded with 0, and which of them are learned: the answer, its end included.

    Args:
      texts: prompts with answers.
      width: of the rows.
      whole: the task whose texts are learned from their beginning, if any.

    Returns:
      "tokens", int32 (texts, width), and "weights", float32 of that shape.

    Raises:
      ValueError: a text is longer than a row.
    """
    tokens = np.zeros((len(texts), width), np.int32)
    weights = np.zeros((len(texts), width), np.float32)
    for row, text in enumerate(texts):
        ids = encode(text)
        if len(ids) > width:
            raise ValueError(f"{text!r} is longer than {width}")
        first = 0 if whole and text.startswith(whole + "<") else text.index(">") + 1
        tokens[row, : len(ids)] = ids
        weights[row, first : len(ids)] = 1
    return {"tokens": tokens, "weights": weights}


_ANSWER = re.compile(r"> \[([^\[\]]*)\]")


def answer(text: str) -> str | None:
    """What stands in the brackets behind a question, or None where there is no whole answer."""
    match = _ANSWER.search(text)
    return None if match is None else match[1]


def parse_numbers(text: str, count: int) -> np.ndarray | None:
    """The answer's numbers, or None where they are not `count` numbers."""
    found = answer(text)
    if found is None:
        return None
    try:
        values = np.array([float(part) for part in found.split(",")])
    except ValueError:
        return None
    return values if len(values) == count and np.isfinite(values).all() else None

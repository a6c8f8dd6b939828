"""Errors that say what was wrong and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, known: Iterable[str], hint: str = "") -> ValueError:
    """The error for a name that is not among those known: suggests near ones, or lists all where they are few.

    Args:
      kind: what the name stands for, e.g. "model".
      name: what was asked for.
      known: the names there are.
      hint: a clause on where to find them all.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    message = f"unknown {kind} {name!r}"
    if near:
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    elif len(names) <= 40:
        message += f"; known: {', '.join(names) or 'none'}"
    return ValueError(f"{message}; {hint}" if hint else message)

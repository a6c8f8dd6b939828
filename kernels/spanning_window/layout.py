"""How a map is cut into groups of tokens that attend to one another."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Pattern = Literal["close", "remote"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is known at trace time (hashable)."""

    scale: float
    window: int
    patterns: tuple[Pattern, ...]


def group(pattern: Pattern, coordinate: Any, windows: Any, window: int) -> Any:
    """The group of a token along one axis, whose `windows` groups have `window` tokens each.

    Close: neighbours. Remote: tokens that lie `windows` apart.
    """
    return coordinate // window if pattern == "close" else coordinate % windows


def member(pattern: Pattern, group: Any, number: Any, windows: Any, window: int) -> Any:
    """The coordinate of a group's token `number`: the inverse of `group`."""
    return group * window + number if pattern == "close" else number * windows + group

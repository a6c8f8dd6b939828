"""Sequence mixers: a kernel with its projections, every one a drop-in for every other."""

from zoo.mixers import softmax  # noqa: F401  registers
from zoo.mixers.base import Mixer, State, create, names, options, register, token_positions

__all__ = ["Mixer", "State", "create", "names", "options", "register", "token_positions"]

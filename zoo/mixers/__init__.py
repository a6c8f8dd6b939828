"""Sequence mixers: a kernel with its projections, every one a drop-in for every other."""

from zoo.mixers import (  # noqa: F401  registers
    convolution,
    deconstructed,
    delta_rule,
    dynamical,
    gated_linear_attention,
    linear_attention,
    miras,
    momentum,
    pavlovian,
    retention,
    selective_scan,
    softmax,
    sparse_topl,
    state_space,
    titans,
)
from zoo.mixers.base import Mixer, State, create, names, options, register, state_bytes, token_positions

__all__ = ["Mixer", "State", "create", "names", "options", "register", "state_bytes", "token_positions"]

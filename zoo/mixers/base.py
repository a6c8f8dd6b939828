"""The protocol of sequence mixers, and their registry.

A mixer mixes the tokens of a sequence: attention, a recurrence, a convolution, a memory. Any network of
`zoo.backbones` takes any mixer by name. To add one: subclass `Mixer`, write `__call__` and `init_state`, decorate with
`register`, import the module in `zoo/mixers/__init__.py` and give its options to the table of `tests/mixers/cases.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.errors import unknown

State = Any  # a pytree; the leading axis of every leaf is the batch, shapes and dtypes never change
_REGISTRY: dict[str, type[Mixer]] = {}
_M = TypeVar("_M", bound="type[Mixer]")


class Mixer(nn.Module):
    """What every mixer has in common.

    Parameters never depend on the length of a sequence. The parallel form, a prefill in any pieces and token by token
    give the same numbers. A token's position is the number of valid tokens before it.

    Fields:
      features: width of input and output.
      causal: a token depends on no later one. A mixer without a form for the other case raises ValueError.
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
      kernel_init: of the projections in.
      out_init: of the projection out, which the residual stream adds up.
    """

    features: int
    causal: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_init: Callable = nn.initializers.lecun_normal()

    def __call__(
        self,
        x: jax.Array,
        state: State | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, State | None]:
        """Mixes the tokens.

        Args:
          x: float (batch, time, features).
          state: the past, from `init_state` or an earlier call; None is the parallel form from the empty past.
          valid: bool (batch, time), False for padding, which neither attends nor is attended to, does not count as a
            position, and comes out as zeros. Anywhere in the sequence; None is all True.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          y like x, and the state after these tokens (None if `state` was None).

        Raises:
          ValueError, TypeError: an argument's shape or dtype is wrong, or a mixer that is not causal was given a state.
        """
        raise NotImplementedError

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> State:
        """The empty past of `batch_size` sequences of up to `length` tokens; needs no parameters."""
        raise NotImplementedError

    @property
    def state_dtype(self) -> Any:
        """Dtype in which a state keeps what was computed from tokens."""
        return self.param_dtype if self.dtype is None else self.dtype

    @nn.nowrap
    def check(self, x: jax.Array, state: State | None, valid: jax.Array | None) -> None:
        """Raises what `__call__` promises; every mixer calls it first."""
        if x.ndim != 3 or x.shape[-1] != self.features or 0 in x.shape:
            raise ValueError(f"x must be (batch, time, features = {self.features}) and not empty, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point, got {x.dtype}")
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != jnp.bool_):
            raise ValueError(f"valid must be bool (batch, time) = {x.shape[:2]}, got {valid.dtype} {valid.shape}")
        if state is not None:
            if not self.causal:
                raise ValueError(f"{type(self).__name__} with causal=False has no state: its tokens see later ones")
            batches = {leaf.shape[0] for leaf in jax.tree.leaves(state)}
            if batches != {x.shape[0]}:
                raise ValueError(f"x has a batch of {x.shape[0]}, its state one of {sorted(batches)}")


def token_positions(
    shape: tuple[int, ...], valid: jax.Array | None = None, start: jax.Array | None = None
) -> jax.Array:
    """int32 (batch or 1, time): the number of valid tokens before each, or -1 for padding.

    Args:
      shape: (batch, time).
      valid: bool (batch, time); None is all True.
      start: int32 (batch,), valid tokens in the past; None is 0.
    """
    if valid is None:
        positions = jnp.arange(shape[1], dtype=jnp.int32)[None]
        return positions if start is None else positions + start[:, None]
    positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    if start is not None:
        positions += start[:, None]
    return jnp.where(valid, positions, -1)


def state_bytes(model: Any, length: int) -> int:
    """Bytes of one sequence's past of `length` tokens, of a mixer or of any network with its `init_state`."""
    state = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def register(name: str) -> Callable[[_M], _M]:
    """A class decorator that makes a mixer known by name."""

    def decorate(mixer: _M) -> _M:
        if name in _REGISTRY:
            raise ValueError(f"the mixer {name!r} is registered already, as {_REGISTRY[name].__qualname__}")
        _REGISTRY[name] = mixer
        return mixer

    return decorate


def names() -> list[str]:
    """The registered mixers."""
    return sorted(_REGISTRY)


def options(name: str) -> list[str]:
    """The options of a mixer beside `features`. Raises ValueError if the name is unknown."""
    return [field.name for field in _fields(name) if field.name not in ("features", "parent", "name")]


def create(name: str, /, *, features: int, defaults: Mapping[str, Any] | None = None, **chosen: Any) -> Mixer:
    """A mixer by name.

    Args:
      name: one of `names()`.
      features: width of input and output.
      defaults: options for those mixers that have them (the heads of a backbone, say); others ignore them.
      **chosen: options that the mixer must have, and Flax's `name` and `parent`.

    Raises:
      ValueError: the name is unknown, an option's value is wrong.
      TypeError: the mixer has no such option.
    """
    known = {field.name for field in _fields(name)}
    for option in chosen:
        if option not in known:
            raise TypeError(f"the mixer {name!r} has no option {option!r}; its options: {', '.join(options(name))}")
    offered = {option: value for option, value in (defaults or {}).items() if option in known}
    return _REGISTRY[name](features=features, **(offered | chosen))


def _fields(name: str) -> tuple[dataclasses.Field, ...]:
    if name not in _REGISTRY:
        raise unknown("mixer", name, _REGISTRY)
    return dataclasses.fields(_REGISTRY[name])

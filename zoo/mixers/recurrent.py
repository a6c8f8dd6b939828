"""What mixers with a recurrent state share: padding, heads, decays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.linear_attention import LinearAttentionState
from zoo.layers.partitioning import dense
from zoo.layers.short_convolution import ShortConvolution
from zoo.mixers.base import Mixer, State


class RecurrentMixer(Mixer):
    """A mixer that reads tokens in their order and need not know of padding.

    A subclass writes `mix`. Valid tokens are brought to the front, in their order, so that neither a convolution nor a
    recurrence meets padding between them; `mix` is told how many there are.
    """

    BIDIRECTIONAL: ClassVar[bool] = False  # whether there is a form that is not causal

    def __call__(self, x, state=None, *, valid=None, deterministic=True, **more):
        """See `Mixer`; `more` are further arguments of `mix`."""
        self.check(x, state, valid)
        if not (self.causal or self.BIDIRECTIONAL):
            raise ValueError(f"{type(self).__name__} is causal: it has no form for causal=False")
        if valid is None:
            return self.mix(x, state, None, **more)
        order = jnp.argsort(~valid, axis=1, stable=True)
        count = valid.sum(axis=1, dtype=jnp.int32)
        y, state = self.mix(jnp.take_along_axis(x, order[..., None], axis=1), state, count, **more)
        y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], axis=1)
        return jnp.where(valid[..., None], y, 0), state

    def mix(self, x: jax.Array, state: State | None, count: jax.Array | None) -> tuple[jax.Array, State | None]:
        """Mixes tokens, of which the first `count` exist (int32 (batch,), None is all); others leave the state alone.

        Outputs of those that do not exist are ignored.
        """
        raise NotImplementedError

    @nn.nowrap
    def split_heads(self, x: jax.Array) -> jax.Array:
        """(batch, time, heads * width) to (batch, time, heads, width)."""
        return x.reshape(*x.shape[:2], self.heads, -1)  # type: ignore[attr-defined]

    @nn.nowrap
    def head_width(self, name: str, width: float) -> int:
        """A head's part of all heads' `width`. Raises ValueError, naming the width, where it is no whole number."""
        heads: int = self.heads  # type: ignore[attr-defined]
        if heads < 1 or width < heads or width % heads:
            raise ValueError(f"{name} ({width:g}) must be a multiple of heads ({heads})")
        return int(width) // heads

    @nn.nowrap
    def expanded_widths(self) -> tuple[int, int]:
        """Of a head's keys and values, where all heads' are `expand_key` and `expand_value` times features."""
        widths = {name: self.features * getattr(self, name) for name in ("expand_key", "expand_value")}
        key, value = (self.head_width(f"features * {name}", width) for name, width in widths.items())
        return key, value

    @nn.nowrap
    def project(self, features: int, name: str, axis: str | None = "heads", **options: Any) -> nn.Dense:
        """A projection in, without a bias unless `options` say otherwise."""
        chosen: dict[str, Any] = {"use_bias": False, "kernel_init": self.kernel_init} | options
        return dense(features, ("embed", axis), dtype=self.dtype, param_dtype=self.param_dtype, name=name, **chosen)

    @nn.nowrap
    def project_out(self, **options: Any) -> nn.Dense:
        """The projection out, without a bias unless `options` say otherwise."""
        chosen: dict[str, Any] = {"use_bias": False, "kernel_init": self.out_init} | options
        return dense(
            self.features, ("heads", "embed"), dtype=self.dtype, param_dtype=self.param_dtype, name="out", **chosen
        )

    @nn.nowrap
    def convolution(self, features: int, name: str, **options: Any) -> ShortConvolution:
        """A short convolution of the mixer's dtypes."""
        return ShortConvolution(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **options)

    @nn.nowrap
    def empty_convolution(self, batch_size: int, kernel_size: int, features: int) -> jax.Array:
        """The past of a short convolution that has seen nothing."""
        return jnp.zeros((batch_size, kernel_size - 1, features), self.state_dtype)


def exists(x: jax.Array, count: jax.Array | None) -> jax.Array | None:
    """bool (batch, time): which tokens of x (batch, time, ...) exist, the first `count`; None is all."""
    return None if count is None else jnp.arange(x.shape[1]) < count[:, None]


def zero_where_missing(x: jax.Array, count: jax.Array | None) -> jax.Array:
    """x (batch, time, ...) with zeros for tokens that do not exist."""
    there = exists(x, count)
    return x if there is None else jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 2)), x, 0)


def seen_tokens(length: jax.Array, x: jax.Array, count: jax.Array | None) -> jax.Array:
    """int32 (batch,): tokens seen after these, of which `length` (batch,) were seen before."""
    return length + (x.shape[1] if count is None else count)


def empty_memory(batch_size: int, heads: int, width: int, value_width: int) -> LinearAttentionState:
    """The state of `kernels.linear_attention` that has seen nothing.

    Raises:
      ValueError: the batch size is not positive.
    """
    check_batch_size(batch_size)
    shape = (batch_size, heads, width, value_width)
    return LinearAttentionState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:3], jnp.float32))


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError for a batch size that is not positive."""
    if batch_size < 1:
        raise ValueError(f"a state needs a positive batch size, got {batch_size}")


def time_step_bias_init(low: float = 1e-3, high: float = 0.1, least: float = 1e-4) -> Callable:
    """Biases b with softplus(b) log-uniform in low .. high, and no less than `least` (Gu and Dao 2023, section 3.6)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))
        step = jnp.maximum(step, least)
        return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)  # the inverse of softplus

    return init


def log_uniform_rate_init(low: float, high: float) -> Callable:
    """Logarithms of rates uniform in low .. high (Mamba-2: 1 .. 16; Gated DeltaNet: 0 .. 16)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, minval=max(low, 1e-6), maxval=high)).astype(dtype)

    return init


def unit_length(x: jax.Array) -> jax.Array:
    """x at length 1, along the last axis."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

"""Attention within groups of a map for NVIDIA GPUs in Pallas-Triton.

One program has one group of one head: its tokens are gathered from the map by index, their logits are one tile, and
all patterns run in one launch. Each writes its own part of the result, which XLA adds up where the result is read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.attention.gpu import dot, index_range, program
from kernels.spanning_window import chunked
from kernels.spanning_window.layout import Options, member

_MOST_TOKENS = {2: 128, 4: 64}  # of a group, by bytes of an element: its logits lie in registers
_WIDEST = 256


def supports(query: jax.Array, value: jax.Array, options: Options) -> bool:
    """Whether a group's arrays fit a core."""
    most = _MOST_TOKENS.get(query.dtype.itemsize, 0)
    return options.window**2 <= most and max(query.shape[-1], value.shape[-1]) <= _WIDEST


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, options: Options, interpret: bool) -> jax.Array:
    """See `reference.forward`."""
    if not supports(query, value, options):
        return chunked.forward(query, key, value, options=options)
    parts = _call(_forward_kernel, "forward", (query, key, value), (value,), options, interpret)
    return parts[0]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, *, options: Options, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `chunked.backward`."""
    if not supports(query, value, options):
        return chunked.backward(query, key, value, d_out, options=options)
    arrays = (query, key, value)
    return _call(_backward_kernel, "backward", (*arrays, d_out), arrays, options, interpret)


def _call(
    kernel: Any,
    name: str,
    arrays: tuple[jax.Array, ...],
    like: tuple[jax.Array, ...],
    options: Options,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Results like `like`, of which each pattern gives a part."""
    batch, height, width, heads, _ = arrays[0].shape
    patterns = len(options.patterns)
    groups = (height // options.window) * (width // options.window)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(batch, height * width, heads, -1)

    parts = pl.pallas_call(
        partial(kernel, options=options, height=height, width=width),
        grid=(math.prod((patterns, batch, heads, groups)),),
        out_shape=tuple(jax.ShapeDtypeStruct((patterns, *flat(x).shape), x.dtype) for x in like),
        compiler_params=plgpu.CompilerParams(num_warps=4 if options.window**2 <= 64 else 8, num_stages=1),
        interpret=interpret,
        name=f"spanning_window_gpu_{name}",
    )(*(flat(x) for x in arrays))
    return tuple(
        part.sum(0, dtype=jnp.float32).astype(x.dtype).reshape(x.shape) for part, x in zip(parts, like, strict=True)
    )


class _Group(NamedTuple):
    """The tokens of this program: where they lie in the map, and which are more than a tile's padding."""

    pattern: jax.Array
    batch: jax.Array
    head: jax.Array
    tokens: jax.Array  # (size,)
    real: jax.Array  # (size,)

    def _place(self, ref: Any, leading: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        padded = max(pl.next_power_of_2(ref.shape[-1]), 16)
        columns = index_range(0, padded)[None]
        inside = self.real[:, None] & (columns < ref.shape[-1])
        return ref.at[(*leading, self.tokens[:, None], self.head, columns)], inside

    def load(self, ref: Any) -> jax.Array:
        """(size, width padded) of (B, tokens, heads, width), zero in the padding."""
        place, inside = self._place(ref, (self.batch,))
        return plgpu.load(place, mask=inside, other=0.0)

    def store(self, ref: Any, value: jax.Array) -> None:
        """Writes to (patterns, B, tokens, heads, width)."""
        place, inside = self._place(ref, (self.pattern, self.batch))
        plgpu.store(place, value.astype(ref.dtype), mask=inside)


def _group(ref: Any, options: Options, height: int, width: int) -> _Group:
    window = options.window
    rows, columns = height // window, width // window
    pattern, batch, head, row, column = program(len(options.patterns), *ref.shape[::2], rows, columns)
    number = index_range(0, max(pl.next_power_of_2(window**2), 16))
    y, x = jax.lax.div(number, window), jax.lax.rem(number, window)
    tokens = jnp.zeros_like(number)
    for index, name in enumerate(options.patterns):
        here = member(name, row, y, rows, window) * width + member(name, column, x, columns, window)
        tokens = jnp.where(pattern == index, here, tokens)
    real = number < window**2
    return _Group(pattern, batch, head, jnp.where(real, tokens, height * width), real)


def _weights(query: jax.Array, key: jax.Array, group: _Group, options: Options) -> jax.Array:
    logits = jnp.where(group.real[None], dot(query, key, (1, 1)) * (options.scale / math.log(2)), -jnp.inf)
    weights = jnp.exp2(logits - logits.max(axis=1)[:, None])
    return weights / weights.sum(axis=1)[:, None]


def _forward_kernel(
    query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any, *, options: Options, height: int, width: int
) -> None:
    group = _group(query_ref, options, height, width)
    value = group.load(value_ref)
    weights = _weights(group.load(query_ref), group.load(key_ref), group, options)
    group.store(out_ref, dot(weights.astype(value.dtype), value))


def _backward_kernel(
    query_ref: Any, key_ref: Any, value_ref: Any, d_out_ref: Any, d_query_ref: Any, d_key_ref: Any, d_value_ref: Any,
    *, options: Options, height: int, width: int,
) -> None:  # fmt: skip
    group = _group(query_ref, options, height, width)
    query, key, value, d_out = (group.load(ref) for ref in (query_ref, key_ref, value_ref, d_out_ref))
    weights = _weights(query, key, group, options)
    group.store(d_value_ref, dot(weights.astype(d_out.dtype), d_out, (0, 0)))
    d_weights = dot(d_out, value, (1, 1))
    d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=1)[:, None])
    d_logits = (options.scale * d_logits).astype(query.dtype)
    group.store(d_query_ref, dot(d_logits, key))
    group.store(d_key_ref, dot(d_logits, query, (0, 0)))

"""Softmax attention: softmax(scale * query key^T + bias) value, and everything the papers ask of it.

Layout (batch, time, heads, dim) as in `jax.nn.dot_product_attention`. Inputs of any float dtype; logits, softmax and
sums are float32. A row in which every key is masked gives zeros (and a log-sum-exp of -inf).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import chunked, gpu, reference, tpu
from kernels.attention.operands import OUT_AXES, Operands, Options, axes, check, number_heads
from kernels.common import Implementation, by_platform, check_implementation, head_shards, repeat_for_shards

_FORWARD: Mapping[str, Callable[..., Any]] = {"chunked": chunked.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD: Mapping[str, Callable[..., Any]] = {"chunked": chunked.backward, "tpu": tpu.backward, "gpu": gpu.backward}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    sinks: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    prefix_lengths: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    return_logsumexp: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
      query: (batch, queries, heads, dim).
      key: (batch, keys, key_heads, dim); `heads` is a multiple of `key_heads`, consecutive query heads share one.
      value: (batch, keys, key_heads, value_dim).
      bias: float, broadcasts to (batch, heads, queries, keys); added to the scaled, capped logits. Differentiable.
      causal: a query sees keys at positions up to its own.
      window: a query at position p sees keys at p - left .. p + right; an int w means (w, w), so with `causal` the w
        previous tokens and itself. None on a side: unbounded.
      scale: factor of the logits, default dim ** -0.5.
      logit_softcap: c caps logits to c tanh(logits / c) (Gemma 2).
      sinks: (heads,) float32, a logit per head that joins the softmax's denominator only. Differentiable.
      query_positions, key_positions: int32 (batch or 1, length), default 0, 1, 2, ... What `causal`, `window` and
        `prefix_lengths` compare.
      query_segment_ids, key_segment_ids: int32 (batch or 1, length); tokens attend within equal ids only.
      prefix_lengths: (batch,) int32; with `causal`, keys at positions below it are visible to every query (prefix LM).
      key_lengths: (batch,) int32; keys at indices from it on are ignored (the free slots of a cache).
      dropout_rate: probability in [0, 1) of dropping an attention weight, scaled by 1 / (1 - rate) otherwise.
      dropout_rng: a PRNG key, needed if dropout_rate > 0. Every implementation draws the same mask from it.
      return_logsumexp: also return the logarithm of the softmax's denominator. Differentiable.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      (batch, queries, heads, value_dim) in the inputs' dtype; with `return_logsumexp` also float32
      (batch, heads, queries).

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    if isinstance(window, int):
        window = (window, window)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim else 1.0
    options = Options(float(scale), bool(causal), window, logit_softcap, float(dropout_rate))
    seed = head_numbers = None
    if dropout_rate > 0 and dropout_rng is not None:
        seed = jax.random.bits(dropout_rng, dtype=jnp.uint32)
        head_numbers = number_heads(query)
    operands = Operands(
        query, key, value, bias, sinks, query_positions, key_positions, query_segment_ids, key_segment_ids,
        prefix_lengths, key_lengths, seed, head_numbers,
    )  # fmt: skip
    out, logsumexp = attention_of(operands, options, implementation)
    return (out, logsumexp) if return_logsumexp else out


def attention_of(
    operands: Operands, options: Options, implementation: Implementation | None
) -> tuple[jax.Array, jax.Array]:
    """`attention` for other cores, with its arguments sorted: output and log-sum-exp."""
    check(operands, options)
    if implementation == "reference":  # the definition is differentiated by JAX itself
        return reference.forward(operands, options)
    heads, shards = operands.query.shape[2], head_shards(operands)
    key, value = (repeat_for_shards(array, heads, shards) for array in (operands.key, operands.value))
    return _jitted(operands._replace(key=key, value=value), options, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(
    operands: Operands, options: Options, implementation: Implementation | None
) -> tuple[jax.Array, jax.Array]:
    return by_platform(
        {name: partial(function, options=options) for name, function in _FORWARD.items()},
        implementation, operands, axes=(axes(operands),), out_axes=OUT_AXES,
    )  # fmt: skip


def _forward(
    operands: Operands, options: Options, implementation: Implementation | None
) -> tuple[tuple[jax.Array, jax.Array], tuple[Operands, jax.Array, jax.Array]]:
    out, logsumexp = _attention(operands, options, implementation)
    return (out, logsumexp), (operands, out, logsumexp)


def _backward(
    options: Options,
    implementation: Implementation | None,
    residuals: tuple[Operands, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Operands]:
    # One custom VJP around the choice of platform: the residuals are the same arrays for every implementation, so no
    # platform pays for what another one would have kept.
    operands, out, logsumexp = residuals
    gradients = by_platform(
        {name: partial(function, options=options) for name, function in _BACKWARD.items()},
        implementation, operands, out, logsumexp, *cotangents,
        axes=(axes(operands), *OUT_AXES, *OUT_AXES), out_axes=axes(operands, gradients=True),
    )  # fmt: skip
    # Integer operands have no gradient: None stands for zero.
    return (gradients,)


_attention.defvjp(_forward, _backward)
# Within a program too: a network's layers then trace every platform's kernel once, not each.
_jitted = jax.jit(_attention, static_argnums=(1, 2))

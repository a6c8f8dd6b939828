"""ProbSparse attention (Zhou et al. 2021, "Informer", arXiv 2012.07436, section 3): only the queries whose scores vary
most over a random sample of keys attend; every other query gets the mean (or cumulative sum) of the values.

What the paper's own code computes, which is not quite the paper's formula: for query l and its sampled keys s(l, j),

    M_l = max_j q_l k_s(l,j) - (1 / L_K) sum_j q_l k_s(l,j)        (unscaled scores; the divisor is L_K, not U)

and the u queries of largest M attend to all keys. The measure M is what has four implementations; the softmax of the u
active rows is `kernels.attention`. With U and u of order ln L, operations grow as L ln L and memory as L
(`tpu.py` says where the TPU kernel differs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention_of
from kernels.attention.operands import Operands, Options, number_heads
from kernels.common import (
    NEGATIVE_INFINITY,
    Implementation,
    by_platform,
    check_heads,
    check_implementation,
    on_each_device,
)
from kernels.prob_sparse import chunked, gpu, reference, tpu

_MEASURE: Mapping[str, Callable[..., jax.Array]] = {
    "reference": reference.measure,
    "chunked": chunked.measure,
    "tpu": tpu.measure,
    "gpu": gpu.measure,
}


class ProbSparseOutput(NamedTuple):
    """What `prob_sparse_attention` returns; only `out` and `logsumexp` carry gradients."""

    out: jax.Array  # (B, L_Q, H, E_V) in the inputs' dtype
    measure: jax.Array  # (B, H, L_Q) float32, the sparsity measure M
    top: jax.Array  # (B, H, u) int32, the active queries, largest M first
    logsumexp: jax.Array  # (B, H, u) float32, log of the softmax's denominator of each active query


def sample_size(factor: int, length: int) -> int:
    """min(factor * ceil(ln length), length), at least 1: the keys sampled a query, from the number of keys."""
    if factor < 1 or length < 1:
        raise ValueError(f"factor and length must be at least 1, got {factor} and {length}")
    return max(1, min(factor * math.ceil(math.log(length)), length))


def active_queries(factor: int, length: int) -> int:
    """The number u of queries that attend, from the number of queries: the formula of `sample_size`."""
    return sample_size(factor, length)


def sample_keys(rng: jax.Array, queries: int, keys: int, samples: int) -> jax.Array:
    """Draws the table s of sampled keys, uniform with replacement: int32 (queries, samples) in [0, keys)."""
    return jax.random.randint(rng, (queries, samples), 0, keys, jnp.int32)


def prob_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sample_indices: jax.Array,
    *,
    queries: int,
    causal: bool = False,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> ProbSparseOutput:
    """Attention of the `queries` most peaked queries; the others get the mean, or with `causal` the sum, of values.

    The measure and the selection are constants to differentiation (as in the published code, where indices cut the
    graph): gradients flow through the active rows' softmax and the context of the others. M ignores causality, as
    published. The transformers library's variant multiplies M by `scale`, which selects the same queries.

    Args:
      query: (batch, L_Q, heads, dim), any float dtype; scores and sums are float32.
      key: (batch, L_K, heads, dim).
      value: (batch, L_K, heads, value_dim).
      sample_indices: integers in [0, L_K). (L_Q, U): the keys sampled for each query, shared by batch and heads
        (`sample_keys`). (U,): one sample for all queries (transformers), whose cost is L_Q U.
      queries: the number u of queries that attend, 1 .. L_Q (`active_queries`).
      causal: active query l sees keys 0 .. l, and the context is the cumulative sum of the values, not their
        cumulative mean (the layer norm that follows absorbs the scale). Needs L_Q = L_K.
      scale: factor of the active rows' logits, default dim ** -0.5.
      dropout_rate, dropout_rng: dropout of the active rows' attention weights, as in `kernels.attention`.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      ProbSparseOutput(out, measure, top, logsumexp).

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    _check(query, key, value, sample_indices, queries, causal)
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    keys, width = key.shape[1], key.shape[3]
    if scale is None:
        scale = width**-0.5

    # An index out of range cannot raise inside a program; clipping keeps the kernels' reads inside the keys.
    sample_indices = jnp.clip(sample_indices, 0, keys - 1).astype(jnp.int32)
    options = Options(float(scale), bool(causal), dropout_rate=float(dropout_rate))
    seed = head_numbers = None
    if dropout_rate > 0 and dropout_rng is not None:
        seed, head_numbers = jax.random.bits(dropout_rng, dtype=jnp.uint32), number_heads(query)
    operands = (query, key, value, sample_indices, seed, head_numbers)
    return _jitted(operands, queries, options, implementation)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _jitted(operands: Any, queries: int, options: Options, implementation: Implementation | None) -> ProbSparseOutput:
    # Cut over a mesh as a whole: once heads are batch items, batch and heads cut apart would have to move.
    table, seed = operands[3:5]
    axes = ("b.h.", "b.h.", "b.h.", "." * table.ndim, *((None, None) if seed is None else ("", "bh")))
    function = partial(_prob_sparse, queries=queries, options=options, implementation=implementation)
    return ProbSparseOutput(*on_each_device(function, operands, axes, ("b.h.", "bh.", "bh.", "bh.")))


def _prob_sparse(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sample_indices: jax.Array,
    seed: jax.Array | None,
    head_numbers: jax.Array | None,
    *,
    queries: int,
    options: Options,
    implementation: Implementation | None,
) -> tuple[jax.Array, ...]:
    """The fields of ProbSparseOutput."""
    batch, length, heads, _ = query.shape
    operands = jax.lax.stop_gradient((query, key))
    if sample_indices.ndim == 1:  # a matrix product: XLA's own on every platform
        measure = chunked.measure_shared(*operands, sample_indices)
    else:
        measure = by_platform(
            _MEASURE, implementation, *operands, sample_indices, axes=("b.h.", "b.h.", ".."), out_axes="bh."
        )
    top = jax.lax.top_k(measure, queries)[1]

    # Each head has its own active queries, but attention's positions are per batch item: heads become batch items.
    def head_major(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], 1, x.shape[3])

    positions = top.reshape(batch * heads, queries)
    rows = jnp.take_along_axis(head_major(query), positions[:, :, None, None], axis=1, mode="promise_in_bounds")
    active_operands = Operands(
        rows, head_major(key), head_major(value), query_positions=positions if options.causal else None,
        dropout_seed=seed, dropout_heads=None if head_numbers is None else head_numbers.reshape(-1, 1),
    )  # fmt: skip
    active, logsumexp = attention_of(active_operands, options, implementation)
    out = _overwrite_context(value, active.reshape(batch, heads, queries, -1), top, length, options.causal)
    return out, measure, top, logsumexp.reshape(batch, heads, queries)


def _rows(top: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the active queries lie in an array (B, L_Q, H, ...): indices that broadcast to (B, H, u)."""
    batch, heads, _ = top.shape
    return jnp.arange(batch)[:, None, None], top, jnp.arange(heads)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _overwrite_context(value: jax.Array, active: jax.Array, top: jax.Array, length: int, causal: bool) -> jax.Array:
    """The mean (or cumulative sum) of the values in every row, the active rows (B, H, u, E) overwritten."""
    context = value.astype(jnp.float32)
    context = jnp.cumsum(context, axis=1) if causal else context.mean(axis=1, keepdims=True)
    context = jnp.broadcast_to(context.astype(value.dtype), (value.shape[0], length, *value.shape[2:]))
    return context.at[_rows(top)].set(active, mode="promise_in_bounds", unique_indices=True)


def _overwrite_context_forward(value, active, top, length, causal):
    return _overwrite_context(value, active, top, length, causal), (top, value.shape[1])


def _overwrite_context_backward(length, causal, residuals, d_out):
    # Written out because JAX would sum a bfloat16 cotangent over time in bfloat16.
    top, keys = residuals
    d_active = d_out.at[_rows(top)].get(mode="promise_in_bounds", unique_indices=True)
    if causal:
        d_context = d_out.at[_rows(top)].set(0, mode="promise_in_bounds", unique_indices=True)
        d_value = jax.lax.cumsum(d_context.astype(jnp.float32), axis=1, reverse=True)
    else:
        d_mean = d_out.sum(1, dtype=jnp.float32) - d_active.sum(2, dtype=jnp.float32)
        d_value = jnp.broadcast_to(d_mean[:, None] / keys, (d_out.shape[0], keys, *d_out.shape[2:]))
    return d_value.astype(d_out.dtype), d_active, None


_overwrite_context.defvjp(_overwrite_context_forward, _overwrite_context_backward)


def attention_map(
    query: jax.Array, key: jax.Array, top: jax.Array, *, causal: bool = False, scale: float | None = None
) -> jax.Array:
    """The attention weights that the published code reports: 1 / L_K everywhere, softmax in the active rows.

    For looking at, not for training: it is of size L_Q x L_K. With `causal`, the lazy rows of the map are not what
    makes the output (a cumulative sum); that is how it is published.

    Args:
      query: (batch, L_Q, heads, dim).
      key: (batch, L_K, heads, dim).
      top: (batch, heads, u), `ProbSparseOutput.top`.
      causal, scale: as in `prob_sparse_attention`.

    Returns:
      float32 (batch, heads, L_Q, L_K); rows sum to 1.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    batch, length, heads, _ = query.shape
    rows = jnp.take_along_axis(query.swapaxes(1, 2), top[..., None], axis=2)
    logits = scale * jnp.einsum("bhue,bmhe->bhum", rows, key, preferred_element_type=jnp.float32)
    if causal:
        logits = jnp.where(jnp.arange(key.shape[1]) <= top[..., None], logits, NEGATIVE_INFINITY)
    lazy = jnp.full((batch, heads, length, key.shape[1]), 1 / key.shape[1], jnp.float32)
    item, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    return lazy.at[item, head, top].set(jax.nn.softmax(logits))


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, sample_indices: jax.Array, queries: int, causal: bool
) -> None:
    """Raises what `attention` would not, since it sees the active rows only."""
    check_heads(query, key, value)
    batch, length, heads, width = query.shape
    keys = key.shape[1]
    if key.shape != (batch, keys, heads, width):
        raise ValueError(f"key must be (batch, keys, heads, dim) = ({batch}, keys, {heads}, {width}), got {key.shape}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"key and value must have the same batch, length and heads, got {key.shape}, {value.shape}")
    if causal and length != keys:
        raise ValueError(f"causal=True needs as many queries as keys, got {length} and {keys}")
    if not jnp.issubdtype(sample_indices.dtype, jnp.integer):
        raise TypeError(f"sample_indices must be integers, got {sample_indices.dtype}")
    if sample_indices.ndim not in (1, 2) or 0 in sample_indices.shape:
        raise ValueError(f"sample_indices must be (L_Q, U) or (U,), got shape {sample_indices.shape}")
    if sample_indices.ndim == 2 and sample_indices.shape[0] != length:
        raise ValueError(f"sample_indices must have a row for each of the {length} queries, got {sample_indices.shape}")
    if not isinstance(sample_indices, jax.core.Tracer):
        table = np.asarray(sample_indices)  # known values, also where a trace has closed over them
        if table.min() < 0 or table.max() >= keys:
            raise ValueError(f"sample_indices must be in [0, {keys}), got {table.min()} .. {table.max()}")
    if not 1 <= queries <= length:
        raise ValueError(f"queries must be in 1 .. {length} (the number of queries), got {queries}")

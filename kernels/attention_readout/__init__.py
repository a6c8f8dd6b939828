"""What analyses read off an attention map A = softmax(scale * query key^T + bias), which is never made whole.

`attention` itself gives products A V: the mass that each query sends to chosen keys is one with `value` their
indicator. Here are the other ways through the map: A^T W (`attention_received`), the largest entries of each row
(`attention_top_k`), chosen rows and columns (`attention_entries`), and outputs of an edited map
(`calibrated_attention`). Masks, positions, grouped heads, bias, soft cap and sinks are those of `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp

from kernels.attention import attention_of
from kernels.attention.operands import Operands, Options, axes, check
from kernels.attention_readout import chunked, gpu, reference, tpu
from kernels.attention_readout.entries import entry_logits
from kernels.common import (
    Implementation,
    by_platform,
    check_implementation,
    head_shards,
    on_each_device,
    repeat_for_shards,
)

_RECEIVED: Mapping[str, Callable[..., Any]] = {"chunked": chunked.received, "tpu": tpu.received, "gpu": gpu.received}
_TOP_K: Mapping[str, Callable[..., Any]] = {"chunked": chunked.top_k, "tpu": tpu.top_k, "gpu": gpu.top_k}


class Logits(TypedDict, total=False):
    """Keyword arguments of `kernels.attention.attention` that say what the map is, with their meaning there."""

    bias: jax.Array | None
    causal: bool
    window: int | tuple[int | None, int | None] | None
    scale: float | None
    logit_softcap: float | None
    sinks: jax.Array | None
    query_positions: jax.Array | None
    key_positions: jax.Array | None
    query_segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    prefix_lengths: jax.Array | None
    key_lengths: jax.Array | None


def attention_received(
    query: jax.Array,
    key: jax.Array,
    weights: jax.Array | None = None,
    *,
    logsumexp: jax.Array | None = None,
    implementation: Implementation | None = None,
    **logits: Unpack[Logits],
) -> jax.Array:
    """A^T W: the attention that each key receives, summed over the queries with weights.

    Weights of one are column sums; the indicators of ranges of queries give sums over each range; 1 / n on the n tokens
    of a phrase gives the phrase's mean row of the map.

    The gradient by weights G is attention with value G, and that by query and key its gradient: the same kernels.

    Args:
      query: (batch, queries, heads, dim).
      key: (batch, keys, key_heads, dim).
      weights: float (batch or 1, queries, heads or 1, sums); None is one sum of all queries. The products are in the
        dtype of query, sums are float32.
      logsumexp: float32 (batch, heads, queries), what `attention` returned for the same arguments: spares a pass. If
        it is not a constant to differentiation, gradients flow on through it.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.
      **logits: as of `attention`.

    Returns:
      float32 (batch, keys, heads, sums).

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    operands, options = _sort(query, key, logsumexp, implementation, logits)
    batch, queries, heads = query.shape[:3]
    if weights is None:
        weights = jnp.ones((1, queries, 1, 1), query.dtype)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    full = (batch, queries, heads)
    if weights.ndim != 4 or weights.shape[:3] not in {(b, queries, h) for b in (1, batch) for h in (1, heads)}:
        raise ValueError(
            f"weights must be (batch or 1, queries, heads or 1, sums) for (batch, queries, heads) = {full}, "
            f"got shape {weights.shape}"
        )
    weights = jnp.broadcast_to(weights, (*full, weights.shape[3])).astype(query.dtype)
    if implementation == "reference":
        return reference.received(operands, weights, options)
    return _received_jitted(_repeat_for_shards(operands), weights, logsumexp, options, implementation)


def attention_top_k(
    query: jax.Array,
    key: jax.Array,
    k: int,
    *,
    logsumexp: jax.Array | None = None,
    implementation: Implementation | None = None,
    **logits: Unpack[Logits],
) -> tuple[jax.Array, jax.Array]:
    """The k keys of largest weight of each query, the largest first; of equal ones the earlier key.

    Args:
      query: (batch, queries, heads, dim).
      key: (batch, keys, key_heads, dim).
      k: 1 .. keys.
      logsumexp: as of `attention_received`.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.
      **logits: as of `attention`.

    Returns:
      Weights, float32 (batch, heads, queries, k), differentiable, and the keys' indices, int32. Where fewer than k keys
      have a weight above 0, the rest have weight 0 and index -1.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    operands, options = _sort(query, key, logsumexp, implementation, logits)
    if not 1 <= k <= key.shape[1]:
        raise ValueError(f"k must be in 1 .. {key.shape[1]} (the number of keys), got {k}")
    if implementation == "reference":
        return reference.top_k(operands, k, options)
    return _top_k_jitted(_repeat_for_shards(operands), logsumexp, k, options, implementation)


def attention_entries(
    query: jax.Array,
    key: jax.Array,
    *,
    rows: jax.Array | None = None,
    columns: jax.Array | None = None,
    logsumexp: jax.Array | None = None,
    implementation: Implementation | None = None,
    **logits: Unpack[Logits],
) -> jax.Array:
    """Chosen rows and columns of the map, A[rows][:, columns].

    In XLA's operations on every platform, for the result is as large as anything computed on the way: a product of the
    chosen queries and keys, on whose values all else acts one by one. What is made in tiles is the log-sum-exp, by
    the platform's `attention`, of the chosen rows only.

    Args:
      query: (batch, queries, heads, dim).
      key: (batch, keys, key_heads, dim).
      rows: int32 (batch or 1, R), indices of queries; None is all.
      columns: int32 (batch or 1, C), indices of keys; None is all.
      logsumexp: as of `attention_received`, of all queries.
      implementation: of the log-sum-exp's pass; "reference" makes the whole map.
      **logits: as of `attention`.

    Returns:
      float32 (batch, heads, R, C), differentiable.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    operands, options = _sort(query, key, logsumexp, implementation, logits)
    for name, indices in (("rows", rows), ("columns", columns)):
        if indices is None:
            continue
        if indices.ndim != 2 or indices.shape[0] not in (1, query.shape[0]):
            raise ValueError(f"{name} must be ({query.shape[0]} or 1, number), got shape {indices.shape}")
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {indices.dtype}")
    if implementation == "reference":
        return reference.entries(operands, rows, columns, options)
    if rows is not None:
        operands = _take_rows(operands, rows)
        if logsumexp is not None:
            logsumexp = jnp.take_along_axis(logsumexp, rows[:, None], axis=2)
    if logsumexp is None:
        logsumexp = _logsumexp(operands, options, implementation)
    chosen = entry_logits(operands, columns, options)
    return jnp.exp(chosen - _finite(logsumexp)[..., None])


def calibrated_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scaled_keys: jax.Array,
    *,
    factor: float | jax.Array = 0.4,
    implementation: Implementation | None = None,
    **logits: Unpack[Logits],
) -> jax.Array:
    """Attention whose weights on some keys are scaled, what they lose going to the other keys in proportion.

    The attention calibration technique (Yu et al. 2024, arXiv 2406.15765), exactly: with S the scaled keys and a_i =
    sum_{s in S} A_is, row i becomes factor A_is on S and A_ij (1 - factor a_i) / (1 - a_i) elsewhere. A row that sees
    only S stays as it is. Computed as two attentions, over the keys of S and over the others, each by a logit a key of
    0 or -inf, and mixed by their log-sum-exps: nothing is subtracted that could cancel.

    Args:
      query: (batch, queries, heads, dim).
      key: (batch, keys, key_heads, dim).
      value: (batch, keys, key_heads, value_dim).
      scaled_keys: bool (batch or 1, heads or 1, keys), S. All False in a head: attention as ever.
      factor: beta, in [0, 1]; may be traced.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.
      **logits: as of `attention`, without `sinks` (which would count in both parts).

    Returns:
      (batch, queries, heads, value_dim) in the inputs' dtype.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    if logits.get("sinks") is not None:
        raise ValueError("calibrated_attention takes no sinks")
    if not isinstance(factor, jax.core.Tracer) and not 0 <= factor <= 1:
        raise ValueError(f"factor must be in [0, 1], got {factor}")
    operands, options = _sort(query, key, None, implementation, logits, value)
    batch, _, heads, _ = query.shape
    keys = key.shape[1]
    if scaled_keys.dtype != bool:
        raise TypeError(f"scaled_keys must be bool, got {scaled_keys.dtype}")
    shape = scaled_keys.shape
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != keys:
        raise ValueError(f"scaled_keys must be ({batch} or 1, {heads} or 1, {keys}), got shape {shape}")

    def over(these: jax.Array) -> tuple[jax.Array, jax.Array]:
        only = jnp.where(these[:, :, None], 0.0, -jnp.inf)
        bias = only if operands.bias is None else operands.bias.astype(jnp.float32) + only
        return attention_of(operands._replace(bias=bias), options, implementation)

    (scaled, scaled_mass), (others, other_mass) = over(scaled_keys), over(~scaled_keys)
    nothing_else = jnp.isneginf(other_mass)
    # The share of S: a sigmoid of the difference, which is inf - inf in rows that see nothing.
    difference = jnp.where(nothing_else | jnp.isneginf(scaled_mass), 0.0, scaled_mass - other_mass)
    share = jnp.where(jnp.isneginf(scaled_mass), 0.0, factor * jax.nn.sigmoid(difference))
    share = jnp.where(nothing_else, 1.0, share).swapaxes(1, 2)[..., None]
    return (share * scaled + (1 - share) * others).astype(query.dtype)


# ------------------------------------------------------------------------------------------------- arguments, sorted


def _sort(
    query: jax.Array,
    key: jax.Array,
    logsumexp: jax.Array | None,
    implementation: Implementation | None,
    logits: Logits,
    value: jax.Array | None = None,
) -> tuple[Operands, Options]:
    """Checked arguments of attention, by default with a value of width 1, for it needs one."""
    check_implementation(implementation)
    arguments: dict[str, Any] = dict(logits)
    unknown = sorted(set(arguments) - set(Logits.__annotations__))
    if unknown:
        raise TypeError(f"unknown arguments {unknown}; those of the logits are {sorted(Logits.__annotations__)}")
    scale, window = arguments.pop("scale", None), arguments.pop("window", None)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim else 1.0
    options = Options(
        float(scale), bool(arguments.pop("causal", False)), (window, window) if isinstance(window, int) else window,
        arguments.pop("logit_softcap", None),
    )  # fmt: skip
    if value is None:
        value = jnp.zeros((*key.shape[:-1], 1), key.dtype)
    operands = Operands(query, key, value, **arguments)
    check(operands, options)
    rows = (query.shape[0], query.shape[2], query.shape[1])
    if logsumexp is not None and logsumexp.shape != rows:
        raise ValueError(f"logsumexp must be (batch, heads, queries) = {rows}, got shape {logsumexp.shape}")
    return operands, options


def _repeat_for_shards(operands: Operands) -> Operands:
    heads, shards = operands.query.shape[2], head_shards(operands)
    key, value = (repeat_for_shards(array, heads, shards) for array in (operands.key, operands.value))
    return operands._replace(key=key, value=value)


def _take_rows(operands: Operands, rows: jax.Array) -> Operands:
    """Of chosen queries: indices become positions."""
    batch = operands.query.shape[0]

    def take(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        count = max(array.shape[0], rows.shape[0])
        array = jnp.broadcast_to(array, (count, *array.shape[1:]))
        return jnp.take_along_axis(array, jnp.broadcast_to(rows, (count, rows.shape[1])), axis=1)

    bias = operands.bias
    if bias is not None and bias.shape[2] > 1:
        bias = jnp.broadcast_to(bias, (max(bias.shape[0], rows.shape[0]), *bias.shape[1:]))
        bias = jnp.take_along_axis(bias, rows[:, None, :, None], axis=2)
    return operands._replace(
        query=jnp.take_along_axis(operands.query, jnp.broadcast_to(rows, (batch, rows.shape[1]))[..., None, None], 1),
        bias=bias,
        query_positions=rows if operands.query_positions is None else take(operands.query_positions),
        query_segment_ids=take(operands.query_segment_ids),
    )


def _finite(logsumexp: jax.Array) -> jax.Array:
    """For differences with logits that are all hugely negative where a row sees nothing."""
    return jnp.where(jnp.isneginf(logsumexp), 0, logsumexp)


def _logsumexp(operands: Operands, options: Options, implementation: Implementation | None) -> jax.Array:
    # One query against a cache: attention reads that without a copy where the value is of a key's width.
    value = operands.key if operands.query.shape[1] == 1 else operands.value
    return attention_of(operands._replace(value=value), options, implementation)[1]


# -------------------------------------------------------------------------------------------------- attention received


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _received(
    operands: Operands,
    weights: jax.Array,
    logsumexp: jax.Array | None,
    options: Options,
    implementation: Implementation | None,
) -> jax.Array:
    if logsumexp is None:
        logsumexp = _logsumexp(operands, options, implementation)
    return by_platform(
        {name: partial(function, options=options) for name, function in _RECEIVED.items()},
        implementation, operands, weights, logsumexp, axes=(axes(operands), "b.h.", "bh."), out_axes="b.h.",
    )  # fmt: skip


def _received_forward(operands, weights, logsumexp, options, implementation):
    return _received(operands, weights, logsumexp, options, implementation), (operands, weights, logsumexp)


def _received_backward(options, implementation, residuals, d_out):
    """<A^T W, G> = <W, A G>: attention with value G, and its gradient for a cotangent W."""
    operands, weights, logsumexp = residuals
    heads, key_heads = operands.query.shape[2], operands.key.shape[2]

    def product(floats: Operands) -> tuple[jax.Array, jax.Array]:
        # Each query head has its own values here, so each needs its own keys.
        key = jnp.repeat(floats.key, heads // key_heads, axis=2)
        every = operands._replace(query=floats.query, bias=floats.bias, sinks=floats.sinks)
        return attention_of(every._replace(key=key, value=d_out.astype(key.dtype)), options, implementation)

    floats = Operands(operands.query, operands.key, operands.value, operands.bias, operands.sinks)
    (d_weights, _), transpose = jax.vjp(product, floats)
    # A given log-sum-exp is a variable of its own: what flows through it inside attention is taken back out.
    flow = jnp.einsum("bthr,bthr->bht", weights.astype(jnp.float32), d_weights.astype(jnp.float32))
    given = logsumexp is not None
    (d_operands,) = transpose((weights, flow if given else jnp.zeros_like(flow)))
    return d_operands, d_weights, -flow if given else None


_received.defvjp(_received_forward, _received_backward)
_received_jitted = jax.jit(_received, static_argnums=(3, 4))


# -------------------------------------------------------------------------------------------------------------- top k


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _top_k(
    operands: Operands,
    logsumexp: jax.Array | None,
    k: int,
    options: Options,
    implementation: Implementation | None,
) -> tuple[jax.Array, jax.Array]:
    if logsumexp is None:
        logsumexp = _logsumexp(operands, options, implementation)
    logits, indices = by_platform(
        {name: partial(function, options=options, k=k) for name, function in _TOP_K.items()},
        implementation, operands, axes=(axes(operands),), out_axes=("bh..", "bh.."),
    )  # fmt: skip
    weights = jnp.exp(logits - _finite(logsumexp)[..., None])
    return weights, jnp.where(weights > 0, indices, -1)


def _top_k_forward(operands, logsumexp, k, options, implementation):
    weights, indices = _top_k(operands, logsumexp, k, options, implementation)
    return (weights, indices), (operands, logsumexp, weights, indices)


def _top_k_backward(k, options, implementation, residuals, cotangents):
    """Of exp(chosen logits - logsumexp): the chosen keys are gathered, the log-sum-exp's gradient is attention's."""
    operands, logsumexp, weights, indices = residuals
    d_logits = cotangents[0] * weights
    d_logsumexp = -d_logits.sum(-1)
    floats = Operands(operands.query, operands.key, operands.value, operands.bias, operands.sinks)

    def chosen(floats: Operands) -> jax.Array:
        every = operands._replace(**_present(floats))
        logits = partial(chunked.chosen_logits, options=options)
        return on_each_device(logits, (every, indices), (axes(every), "bh.."), "bh..")

    (d_operands,) = jax.vjp(chosen, floats)[1](d_logits)
    if logsumexp is not None:
        return d_operands, d_logsumexp

    def normaliser(floats: Operands) -> jax.Array:
        return _logsumexp(operands._replace(**_present(floats)), options, implementation)

    (d_more,) = jax.vjp(normaliser, floats)[1](d_logsumexp)
    return jax.tree.map(jnp.add, d_operands, d_more), None


def _present(floats: Operands) -> dict[str, jax.Array]:
    return {name: array for name, array in floats._asdict().items() if array is not None}


_top_k.defvjp(_top_k_forward, _top_k_backward)
_top_k_jitted = jax.jit(_top_k, static_argnums=(2, 3, 4))

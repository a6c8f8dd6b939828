"""Attention within groups of a map for TPUs: a Pallas kernel for Mosaic.

A program has one image, whole in VMEM: (rows, columns in whole registers, heads x width in lanes). A pattern's
groups are rows of tokens that lie `window` side by side or far apart, all columns of them: rows are addressed for free,
and columns never move. A product of such a band with itself is masked to each group's columns; it computes X / window
times what is needed, in tiles of 128 lanes that would be filled with padding otherwise (a 14 x 14 map: none at all).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu.plan import LANES, VMEM_SHARE, device
from kernels.attention.tpu.tile import product
from kernels.common import NEGATIVE_INFINITY, round_up
from kernels.spanning_window import chunked
from kernels.spanning_window.layout import Options, group, member

_QUERY_TOKENS = 256  # of a band whose logits are made at once, if a row has no more


def forward(query: jax.Array, key: jax.Array, value: jax.Array, *, options: Options, interpret: bool) -> jax.Array:
    """See `reference.forward`."""
    arrays = [_flat(x) for x in (query, key, value)]
    if not _fits(arrays, [arrays[2]], []):
        return chunked.forward(query, key, value, options=options)
    (out,) = _call(_forward_kernel, "forward", arrays, [arrays[2]], [], query.shape, options, interpret)
    return _restore(out, value)


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, *, options: Options, interpret: bool
) -> tuple[jax.Array, ...]:
    """See `chunked.backward`."""
    arrays = [_flat(x) for x in (query, key, value, d_out)]
    if not _fits(arrays, arrays[:3], arrays[:3]):
        return chunked.backward(query, key, value, d_out, options=options)
    gradients = _call(_backward_kernel, "backward", arrays, arrays[:3], arrays[:3], query.shape, options, interpret)
    return tuple(_restore(x, like) for x, like in zip(gradients, (query, key, value), strict=True))


def _flat(x: jax.Array) -> jax.Array:
    """(B, Y, X, H, D) to (B, Y, X, H D) in a dtype that the hardware has."""
    x = x.reshape(*x.shape[:3], -1)
    return x if x.dtype in (jnp.bfloat16, jnp.float32) else x.astype(jnp.float32)


def _restore(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape(like.shape).astype(like.dtype)


def _columns(x: jax.Array) -> int:
    """Columns of an image in VMEM, whole registers."""
    return round_up(x.shape[2], 8 * 4 // x.dtype.itemsize)


def _bytes(x: jax.Array, itemsize: int) -> int:
    """Of one image in VMEM."""
    return x.shape[1] * _columns(x) * round_up(x.shape[3], LANES) * itemsize


def _vmem(arrays: Sequence[jax.Array], outputs: Sequence[jax.Array], sums: Sequence[jax.Array]) -> int:
    blocks = sum(2 * _bytes(x, x.dtype.itemsize) for x in (*arrays, *outputs)) + sum(_bytes(x, 4) for x in sums)
    return blocks + (24 << 20)  # masks, logits, and what the registers do not hold


def _fits(arrays: Sequence[jax.Array], outputs: Sequence[jax.Array], sums: Sequence[jax.Array]) -> bool:
    return _vmem(arrays, outputs, sums) < VMEM_SHARE * device().vmem_capacity_bytes


def _call(
    kernel: Any, name: str, arrays: Sequence[jax.Array], outputs: Sequence[jax.Array], sums: Sequence[jax.Array],
    shape: tuple[int, ...], options: Options, interpret: bool,
) -> list[jax.Array]:  # fmt: skip
    batch, height, width, heads, _ = shape
    columns = _columns(arrays[0])
    rows = next(
        n for n in range(options.window, 0, -1) if (options.window % n == 0 and n * columns <= _QUERY_TOKENS) or n == 1
    )
    masks = _masks(options, rows, width, columns)

    def image(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((pl.Squeezed(), height, columns, x.shape[3]), lambda b: (b, 0, 0, 0))

    pairs = batch * len(options.patterns) * height * columns * options.window * columns
    widths = sum(x.shape[3] for x in arrays[1:]) * (1 if not sums else 2)
    return pl.pallas_call(
        partial(kernel, options=options, heads=heads, rows=rows, size=(height // options.window, width)),
        grid=(batch,),
        in_specs=[*map(image, arrays), pl.BlockSpec(masks.shape, lambda b: (0, 0, 0))],
        out_specs=[image(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_shapes=[pltpu.VMEM((height, columns, x.shape[3]), jnp.float32) for x in sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_vmem(arrays, outputs, sums)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * widths,
            transcendentals=pairs * heads,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)) + masks.nbytes,
        ),
        interpret=interpret,
        name=f"spanning_window_{name}",
    )(*arrays, masks)


def _masks(options: Options, rows: int, width: int, columns: int) -> np.ndarray:
    """float32 (patterns, rows x columns, window x columns): 0 where columns share a group, else hugely negative."""
    x = np.arange(columns)
    masks = []
    for pattern in options.patterns:
        groups = group(pattern, x, width // options.window, options.window)
        together = (groups[:, None] == groups) & (x < width)
        masks.append(np.tile(np.where(together, 0, NEGATIVE_INFINITY), (rows, options.window)))
    return np.stack(masks).astype(np.float32)


def _over_bands(body: Any, options: Options, rows: int, windows: int) -> None:
    """Runs body(pattern's number, rows of the queries, rows of the keys) for every band and part of its queries."""
    parts = options.window // rows
    for number, pattern in enumerate(options.patterns):

        def step(index: Any, _: None, number: int = number, pattern: Any = pattern) -> None:
            band, part = jax.lax.div(index, parts), jax.lax.rem(index, parts)
            places = [member(pattern, band, n, windows, options.window) for n in range(options.window)]
            queries = [member(pattern, band, part * rows + n, windows, options.window) for n in range(rows)]
            body(number, queries, places)

        jax.lax.fori_loop(0, windows * parts, step, None)


def _take(ref: Any, places: Sequence[Any], width: int) -> jax.Array:
    """Rows of an image, one below the other: (tokens, lanes), zero beyond its `width`, where anything may lie."""
    shape = ref.shape[1:]
    if shape[0] == width:
        return jnp.concatenate([ref[place] for place in places], axis=0)
    inside = jax.lax.broadcasted_iota(jnp.int32, shape, 0) < width
    rows = [jnp.where(inside, ref[place].astype(jnp.float32), 0).astype(ref.dtype) for place in places]
    return jnp.concatenate(rows, axis=0)


def _add(ref: Any, places: Sequence[Any], value: jax.Array, first: bool = False) -> None:
    columns = ref.shape[1]
    for number, place in enumerate(places):
        part = value[number * columns : (number + 1) * columns]
        ref[place] = (part if first else ref[place].astype(jnp.float32) + part).astype(ref.dtype)


def _head(x: jax.Array, head: int, heads: int) -> jax.Array:
    width = x.shape[1] // heads
    return x[:, head * width : (head + 1) * width]


def _weights(query: jax.Array, key: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    logits = product(query, key, transposed=True) * scale + mask
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _forward_kernel(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    mask_ref: Any,
    out_ref: Any,
    *,
    options: Options,
    heads: int,
    rows: int,
    size: tuple[int, int],
) -> None:
    def band(number: int, queries: Sequence[Any], places: Sequence[Any]) -> None:
        query = _take(query_ref, queries, size[1])
        key, value = (_take(ref, places, size[1]) for ref in (key_ref, value_ref))
        outs = []
        for head in range(heads):
            q, k, v = (_head(x, head, heads) for x in (query, key, value))
            outs.append(product(_weights(q, k, mask_ref[number], options.scale).astype(v.dtype), v))
        _add(out_ref, queries, jnp.concatenate(outs, axis=1), first=number == 0)

    _over_bands(band, options, rows, size[0])


def _backward_kernel(
    query_ref: Any, key_ref: Any, value_ref: Any, d_out_ref: Any, mask_ref: Any, d_query_ref: Any, d_key_ref: Any,
    d_value_ref: Any, query_sum: Any, key_sum: Any, value_sum: Any, *,
    options: Options, heads: int, rows: int, size: tuple[int, int],
) -> None:  # fmt: skip
    for ref in (query_sum, key_sum, value_sum):
        ref[...] = jnp.zeros_like(ref)

    def band(number: int, queries: Sequence[Any], places: Sequence[Any]) -> None:
        query, d_out = (_take(ref, queries, size[1]) for ref in (query_ref, d_out_ref))
        key, value = (_take(ref, places, size[1]) for ref in (key_ref, value_ref))
        d_queries, d_keys, d_values = [], [], []
        for head in range(heads):
            q, k, v, d = (_head(x, head, heads) for x in (query, key, value, d_out))
            weights = _weights(q, k, mask_ref[number], options.scale)
            d_weights = product(d, v, transposed=True)
            d_logits = weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True))
            d_logits = d_logits * options.scale
            d_queries.append(product(d_logits.astype(k.dtype), k))
            d_keys.append(product(d_logits.T.astype(q.dtype), q))
            d_values.append(product(weights.T.astype(d.dtype), d))
        for ref, where, parts in (
            (query_sum, queries, d_queries), (key_sum, places, d_keys), (value_sum, places, d_values)
        ):  # fmt: skip
            _add(ref, where, jnp.concatenate(parts, axis=1))

    _over_bands(band, options, rows, size[0])
    for ref, total in ((d_query_ref, query_sum), (d_key_ref, key_sum), (d_value_ref, value_sum)):
        ref[...] = total[...].astype(ref.dtype)

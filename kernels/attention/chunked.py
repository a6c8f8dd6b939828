"""Softmax attention in linear memory with XLA's own operations: what a CPU runs, and any backend without a kernel.

A loop over (batch, key head), in it over blocks of queries. A block sees all of its keys at once, so its softmax is
the ordinary one; blocks shrink as rows grow, so that a tile of logits stays in the cache. Where positions are the
default ones, a block's range of keys is cut to what causality and the window let it see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.operands import Operands, Options, visible
from kernels.attention.reference import softmax
from kernels.common import NEGATIVE_INFINITY, hash_uniform

_TILE_ELEMENTS = 2**20  # logits in a tile: 4 MiB, what two cores' level-2 caches hold
_MOST_ROWS = 512  # of a tile
_MOST_BOUNDED_ROWS = 256  # where positions bound the keys; more make the tiles at the bound wasteful
_LEAST_ROWS = 64  # of a tile; fewer make matrix products slow
_MOST_SPANS = 8  # into which causal queries are cut; each is compiled apart
_MOST_UNROLLED = 8  # sequences of a decoding step whose products are compiled apart


class Span(NamedTuple):
    """Consecutive blocks of queries whose tiles of logits have one shape."""

    start: int  # the first query
    block: int  # queries in a block
    blocks: int
    low: int  # the keys that the span may see
    high: int
    left: int  # how far before its first query a block looks, if width < high - low
    width: int  # keys in a tile


def spans_of(operands: Operands, options: Options) -> list[Span]:
    """Cuts the queries so that tiles hold few keys that default positions exclude."""
    queries, heads = operands.query.shape[1:3]
    keys, key_heads = operands.key.shape[1:3]
    left, right = options.window or (None, None)
    if options.causal and operands.prefix_lengths is None:
        right = 0
    if operands.query_positions is not None or operands.key_positions is not None:
        left = right = None

    one_sided = (left is None) != (right is None)
    most_rows = _MOST_ROWS if left is None and right is None else _MOST_BOUNDED_ROWS
    length = max(-(-queries // (_MOST_SPANS if one_sided else 1)), min(queries, most_rows))
    spans = []
    for first in range(0, queries, length):
        start, stop = first, min(first + length, queries)
        while start < stop:  # a second round takes the remainder of the blocks
            low = 0 if left is None else min(max(start - left, 0), keys - 1)
            high = keys if right is None else min(max(stop + right, low + 1), keys)
            rows = min(max(_TILE_ELEMENTS // (high - low), _LEAST_ROWS), most_rows)
            block = min(max(rows * key_heads // heads, 1), stop - start)
            width = high - low if left is None or right is None else min(high - low, left + block + right)
            spans.append(Span(start, block, (stop - start) // block, low, high, left or 0, width))
            start += block * spans[-1].blocks
    return spans


class Tile(NamedTuple):
    """Where a tile of logits lies: a batch index, a key head, a block of queries and a range of keys.

    Its rows are the queries of the block, each in the heads that share the key head: row r is query r // group.
    """

    batch: jax.Array
    key_head: jax.Array
    group: int
    query_start: jax.Array | int
    block: int
    key_start: jax.Array
    width: int

    def queries(self, array: jax.Array) -> jax.Array:
        """(T, group, ...) -> (rows, ...)."""
        part = jax.lax.dynamic_slice_in_dim(array, self.query_start, self.block)
        return part.reshape(-1, *array.shape[2:])

    def rows(self, array: jax.Array) -> jax.Array:
        """(T,) -> (rows, 1)."""
        part = jax.lax.dynamic_slice_in_dim(array, self.query_start, self.block)
        return jnp.repeat(part, self.group)[:, None]

    def keys(self, array: jax.Array) -> jax.Array:
        """(S, ...) -> (width, ...)."""
        return jax.lax.dynamic_slice_in_dim(array, self.key_start, self.width)

    def heads(self, array: jax.Array) -> jax.Array:
        """(H,) -> (rows, 1)."""
        part = jax.lax.dynamic_slice_in_dim(array, self.key_head * self.group, self.group)
        return jnp.tile(part, self.block)[:, None]

    def row_index(self) -> jax.Array:
        """The queries' indices, (rows, 1)."""
        return (self.query_start + jnp.arange(self.block * self.group) // self.group)[:, None]

    def key_index(self) -> jax.Array:
        """The keys' indices, (width,)."""
        return self.key_start + jnp.arange(self.width)

    def bias_window(self, shape: tuple[int, ...]) -> tuple[list[Any], list[int]]:
        """Starts and sizes of the tile's part of a bias that broadcasts to (B, H, T, S)."""
        starts = (self.batch, self.key_head * self.group, self.query_start, self.key_start)
        sizes = (1, self.group, self.block, self.width)
        return (
            [0 if full == 1 else start for full, start in zip(shape, starts, strict=True)],
            [min(full, size) for full, size in zip(shape, sizes, strict=True)],
        )


def tile_of(span: Span, index: jax.Array, block: jax.Array | int, operands: Operands) -> Tile:
    """Tile number `block` of the span, for batch and key head number `index`."""
    heads, key_heads = operands.query.shape[2], operands.key.shape[2]
    query_start = span.start + block * span.block
    key_start = jnp.clip(query_start - span.left, span.low, span.high - span.width)
    batch, key_head = index // key_heads, index % key_heads
    return Tile(batch, key_head, heads // key_heads, query_start, span.block, key_start, span.width)


def scan_blocks(function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, count: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over 0 .. count - 1, without a loop around a single step."""
    if count > 1:
        return jax.lax.scan(function, carry, jnp.arange(count))
    carry, out = function(carry, 0)
    return carry, jax.tree.map(lambda x: x[None], out)


def head_of(array: jax.Array, tile_batch: jax.Array, key_head: jax.Array, key_heads: int) -> jax.Array:
    """(B, T, H, D) -> float32 (T, H // key_heads, D): the heads that share a key head."""
    group = array.shape[2] // key_heads
    sizes = (1, array.shape[1], group, array.shape[3])
    return jax.lax.dynamic_slice(array, (tile_batch, 0, key_head * group, 0), sizes)[0].astype(jnp.float32)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A matrix product: two axes at most on either side, for XLA's products with batch axes are slow on a CPU."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision="highest", preferred_element_type=jnp.float32)


def tile_logits(
    query: jax.Array, key: jax.Array, tile: Tile, operands: Operands, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Logits (rows, width), NEGATIVE_INFINITY where masked, and the capped products before the bias.

    Args:
      query: (rows, D), scaled.
      key: (width, D).
      tile: where they lie.
      operands: for all that acts on the logits.
      options: static options.
    """
    capped = _dot(query, key, (1, 1))
    if options.logit_softcap is not None:
        capped = options.logit_softcap * jnp.tanh(capped / options.logit_softcap)
    logits = capped
    if operands.bias is not None:
        bias = jax.lax.dynamic_slice(operands.bias, *tile.bias_window(operands.bias.shape))[0].swapaxes(0, 1)
        bias = jnp.broadcast_to(bias, (tile.block, tile.group, bias.shape[-1]))
        logits += bias.reshape(-1, bias.shape[-1]).astype(jnp.float32)

    def of_batch(array: jax.Array) -> jax.Array:
        return array[0] if array.shape[0] == 1 else array[tile.batch]

    def part(function: Callable[[jax.Array], jax.Array], array: jax.Array | None) -> Any:
        return None if array is None else function(of_batch(array))

    mask = visible(
        options,
        tile.row_index() if operands.query_positions is None else part(tile.rows, operands.query_positions),
        tile.key_index() if operands.key_positions is None else part(tile.keys, operands.key_positions),
        part(tile.rows, operands.query_segment_ids),
        part(tile.keys, operands.key_segment_ids),
        part(jnp.asarray, operands.prefix_lengths),
        tile.key_index(),
        part(jnp.asarray, operands.key_lengths),
    )
    return (logits if mask is None else jnp.where(mask, logits, NEGATIVE_INFINITY)), capped


def _dropout(weights: jax.Array, tile: Tile, operands: Operands, options: Options) -> jax.Array:
    """Drops weights (rows, width) and scales what is kept."""
    if options.dropout_rate == 0 or operands.dropout_seed is None or operands.dropout_heads is None:
        return weights
    head = tile.heads(operands.dropout_heads[tile.batch])
    uniform = hash_uniform(operands.dropout_seed, head, tile.row_index(), tile.key_index())
    return jnp.where(uniform >= options.dropout_rate, weights / (1 - options.dropout_rate), 0)


def forward(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """As `reference.forward`, in memory linear in the lengths."""
    batch, queries, heads, _ = operands.query.shape
    key_heads, value_width = operands.value.shape[2:]
    if queries == 1:
        return _one_query(operands, options)
    group = heads // key_heads
    spans = spans_of(operands, options)

    def one_head(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch_index, key_head = index // key_heads, index % key_heads
        query = options.scale * head_of(operands.query, batch_index, key_head, key_heads)
        key = head_of(operands.key, batch_index, key_head, key_heads)[:, 0]
        value = head_of(operands.value, batch_index, key_head, key_heads)[:, 0]

        def one_block(span: Span, _: None, block: jax.Array | int) -> tuple[None, tuple[jax.Array, jax.Array]]:
            tile = tile_of(span, index, block, operands)
            logits = tile_logits(tile.queries(query), tile.keys(key), tile, operands, options)[0]
            maximum = jnp.max(logits, axis=-1, keepdims=True)
            if operands.sinks is not None:
                sinks = tile.heads(operands.sinks.astype(jnp.float32))
                maximum = jnp.maximum(maximum, sinks)
            weights = jnp.exp(logits - maximum)
            denominator = weights.sum(axis=-1, keepdims=True)
            if operands.sinks is not None:
                denominator += jnp.exp(sinks - maximum)
            empty = maximum <= NEGATIVE_INFINITY
            out = _dot(_dropout(weights, tile, operands, options), tile.keys(value), (1, 0))
            out = jnp.where(empty, 0, out / denominator).astype(operands.query.dtype)
            return None, (out, jnp.where(empty, -jnp.inf, maximum + jnp.log(denominator)))

        parts = []
        for span in spans:
            _, (out, logsumexp) = scan_blocks(partial(one_block, span), None, span.blocks)
            parts.append((out.reshape(-1, group, value_width), logsumexp.reshape(-1, group)))
        outs, logsumexps = zip(*parts, strict=True)
        return jnp.concatenate(outs), jnp.concatenate(logsumexps)

    out, logsumexp = jax.lax.map(one_head, jnp.arange(batch * key_heads))
    out = out.reshape(batch, key_heads, queries, group, value_width).swapaxes(1, 2)
    logsumexp = jnp.moveaxis(logsumexp.reshape(batch, key_heads, queries, group), 2, 3)
    return out.reshape(batch, queries, heads, value_width), logsumexp.reshape(batch, heads, queries)


def _one_query(operands: Operands, options: Options) -> tuple[jax.Array, jax.Array]:
    """A step of decoding, as by definition, but for how the cache is read.

    One head's keys lie scattered in (S, G, D), and copying them costs more than all arithmetic. So all heads at once
    multiply the cache as it lies, a matrix (S, G D), with their queries on the diagonal of zeros (G D, H).
    """
    batch, _, heads, width = operands.query.shape
    keys, key_heads, value_width = operands.value.shape[1:]
    group = heads // key_heads
    diagonal = jnp.eye(key_heads)
    query = options.scale * operands.query.astype(jnp.float32).reshape(batch, key_heads, group, width)
    spread = jnp.einsum("bgrd,gk->bgrkd", query, diagonal, precision="highest").reshape(batch, heads, -1)
    cache = operands.key.reshape(batch, keys, -1).astype(jnp.float32)
    logits = _dot_each(spread, cache, (1, 1))
    weights, logsumexp = softmax(logits[:, :, None], operands, options)
    cache = operands.value.reshape(batch, keys, -1).astype(jnp.float32)
    out = _dot_each(weights[:, :, 0], cache, (1, 0))
    out = out.reshape(batch, key_heads, group, key_heads, value_width)
    out = jnp.einsum("bgrkd,gk->bgrd", out, diagonal, precision="highest")
    return out.reshape(batch, 1, heads, value_width).astype(operands.query.dtype), logsumexp


def _dot_each(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """`_dot` for each index of a leading axis; a loop where there are many, so that the program does not grow."""
    if len(x) > _MOST_UNROLLED:
        return jax.lax.map(lambda pair: _dot(pair[0], pair[1], contract), (x, y))
    return jnp.stack([_dot(a, b, contract) for a, b in zip(x, y, strict=True)])


def backward(
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    d_out: jax.Array,
    d_logsumexp: jax.Array,
    *,
    options: Options,
) -> Operands:
    """Gradients of the float operands, in memory linear in the lengths (and the bias's own size).

    Args:
      operands: of the forward pass.
      out, logsumexp: what it gave.
      d_out, d_logsumexp: their cotangents.
      options: static options.
    """
    batch, queries, heads, width = operands.query.shape
    keys, key_heads, value_width = operands.value.shape[1:]
    group = heads // key_heads
    spans = spans_of(operands, options)

    # With p = exp(logits - logsumexp) and d p = dropped(d_out . value): d logits = p (d p - sum(p d p) + d_logsumexp).
    # The sum is also that of out d_out, but `out` is rounded to its dtype, and the tile holds whole rows.
    del out
    finite = jnp.where(jnp.isneginf(logsumexp), 0, logsumexp)  # an empty row's logits are all -inf
    by_key_head = (batch, key_heads, group, queries)
    d_logsumexp, finite = d_logsumexp.reshape(by_key_head), finite.reshape(by_key_head)

    def one_head(d_bias: jax.Array | None, index: jax.Array) -> tuple[Any, Any]:
        batch_index, key_head = index // key_heads, index % key_heads
        query = options.scale * head_of(operands.query, batch_index, key_head, key_heads)
        key = head_of(operands.key, batch_index, key_head, key_heads)[:, 0]
        value = head_of(operands.value, batch_index, key_head, key_heads)[:, 0]
        d_head = head_of(d_out, batch_index, key_head, key_heads)
        d_row, row_logsumexp = (x[batch_index, key_head].T for x in (d_logsumexp, finite))

        def one_block(span: Span, carry: Any, block: jax.Array | int) -> tuple[Any, Any]:
            d_key, d_value, d_bias = carry
            tile = tile_of(span, index, block, operands)
            query_block, key_range, d_block = tile.queries(query), tile.keys(key), tile.queries(d_head)
            logits, capped = tile_logits(query_block, key_range, tile, operands, options)
            weights = jnp.exp(logits - tile.queries(row_logsumexp)[:, None])
            d_weights = _dropout(_dot(d_block, tile.keys(value), (1, 1)), tile, operands, options)
            delta = jnp.sum(weights * d_weights, axis=-1) - tile.queries(d_row)
            d_logits = weights * (d_weights - delta[:, None])
            dropped = _dropout(weights, tile, operands, options)
            d_value = _add(d_value, _dot(d_block, dropped, (0, 0)), [0, tile.key_start])
            if d_bias is not None:
                starts, sizes = tile.bias_window(d_bias.shape)
                part = d_logits.reshape(1, tile.block, group, tile.width).swapaxes(1, 2)
                summed = [axis for axis, size in enumerate(sizes) if size == 1]
                d_bias = _add(d_bias, part.sum(axis=summed, keepdims=True), starts)
            if options.logit_softcap is not None:
                d_logits *= 1 - (capped / options.logit_softcap) ** 2
            d_query = (options.scale * _dot(d_logits, key_range, (1, 0))).astype(operands.query.dtype)
            d_key = _add(d_key, _dot(query_block, d_logits, (0, 0)), [0, tile.key_start])
            return (d_key, d_value, d_bias), (d_query, delta)

        # Sums with the keys last: a product whose large factor were read down its columns is twice as slow.
        carry = (jnp.zeros((width, keys)), jnp.zeros((value_width, keys)), d_bias)
        parts = []
        for span in spans:
            carry, (d_query, delta) = scan_blocks(partial(one_block, span), carry, span.blocks)
            parts.append((d_query.reshape(-1, group, width), delta.reshape(-1, group)))
        d_key, d_value, d_bias = carry
        d_queries, deltas = map(jnp.concatenate, zip(*parts, strict=True))
        dtype = operands.key.dtype
        return d_bias, (d_queries, d_key.astype(dtype), d_value.astype(dtype), deltas)

    d_bias = None if operands.bias is None else jnp.zeros(operands.bias.shape)
    d_bias, (d_query, d_key, d_value, delta) = jax.lax.scan(one_head, d_bias, jnp.arange(batch * key_heads))
    d_query = d_query.reshape(batch, key_heads, queries, group, width).swapaxes(1, 2)
    d_key = jnp.moveaxis(d_key.reshape(batch, key_heads, width, keys), 3, 1)
    d_value = jnp.moveaxis(d_value.reshape(batch, key_heads, value_width, keys), 3, 1)
    if operands.bias is not None and d_bias is not None:
        d_bias = d_bias.astype(operands.bias.dtype)
    d_sinks = None
    if operands.sinks is not None:
        share = jnp.exp(operands.sinks.astype(jnp.float32)[:, None] - logsumexp)
        delta = jnp.moveaxis(delta.reshape(batch, key_heads, queries, group), 2, 3).reshape(logsumexp.shape)
        d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(operands.sinks.dtype)
    gradients = Operands(d_query.reshape(operands.query.shape), d_key, d_value)
    return gradients._replace(bias=d_bias, sinks=d_sinks)


def _add(total: jax.Array, part: jax.Array, starts: list[Any]) -> jax.Array:
    """`total` with `part` added at `starts`."""
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, starts, part.shape) + part, starts)

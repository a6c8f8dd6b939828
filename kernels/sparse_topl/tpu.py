"""TPU kernels: a query's threshold, then attention over all blocks of keys masked by it.

Arrays lie as (batch, heads, width, time), tiles as (keys, queries): what is one number a query is a row. Codes in
common are counted by the matrix unit, as the product of one-hot codes; a threshold is found in two passes over them,
one that counts the keys of each score and one that finds the last tie taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import round_up
from kernels.sparse_topl.selection import Options, level, threshold

LANES = 128
SUBLANES = 8
BLOCK_Q, BLOCK_K = 256, 512
VMEM_BYTES = 64 << 20


def _product(a: jax.Array, b: jax.Array, contracting: tuple[int, int]) -> jax.Array:
    """A product over these axes, summed in float32; exact to float32 for float32."""
    return jax.lax.dot_general(
        a, b, (((contracting[0],), (contracting[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, preferred_element_type=jnp.float32,
    )  # fmt: skip


class _Layout:
    """Sizes and block specifications of a call."""

    def __init__(self, query: jax.Array, key: jax.Array, value: jax.Array, subspaces: int, options: Options):
        self.batch, self.time, self.heads, self.width = query.shape
        self.keys, self.key_heads, self.value_width = key.shape[1], key.shape[2], value.shape[3]
        self.options, self.subspaces = options, subspaces
        self.group = self.heads // self.key_heads
        self.block_q = min(BLOCK_Q, round_up(self.time, LANES))
        self.block_k = min(BLOCK_K, round_up(self.keys, LANES))
        self.padded_time = round_up(self.time, self.block_q)
        self.padded_keys = round_up(self.keys, self.block_k)
        self.query_blocks, self.key_blocks = self.padded_time // self.block_q, self.padded_keys // self.block_k
        self.code_rows = round_up(subspaces, SUBLANES)
        self.code_lanes = round_up(subspaces * options.codewords, LANES)

    def last_position(self, query_block: Any) -> Any:
        return (query_block + 1) * self.block_q - 1 + self.keys - self.time

    def end_of_keys(self, query_block: Any) -> Any:
        """The first block of keys that these queries do not see."""
        return jnp.minimum(jax.lax.div(self.last_position(query_block), self.block_k) + 1, self.key_blocks)

    def first_queries(self, key_block: Any) -> Any:
        """The first block of queries that sees these keys."""
        first = jnp.maximum(key_block * self.block_k - (self.keys - self.time), 0)
        return jax.lax.div(first, self.block_q)

    def lay_out(self, array: jax.Array, time: int, fill: float = 0.0) -> jax.Array:
        """(B, T, H, X) -> (B, H, X, time)."""
        array = array.transpose(0, 2, 3, 1)
        return jnp.pad(array, ((0, 0),) * 3 + ((0, time - array.shape[3]),), constant_values=fill)

    def codes(self, codes: jax.Array, time: int) -> jax.Array:
        """Codes as float32 (B, H, rows, time), -1 where there are none."""
        codes = jnp.pad(codes, ((0, 0),) * 3 + ((0, self.code_rows - self.subspaces),), constant_values=-1)
        return self.lay_out(codes.astype(jnp.float32), time, -1.0)

    def row(self, array: jax.Array) -> jax.Array:
        """(B, T, H) -> (B, H, 1, padded time)."""
        return self.lay_out(array[..., None], self.padded_time)

    def tables(self) -> tuple[jax.Array, jax.Array]:
        """A 0/1 matrix that gives each lane its subspace's code, and the codeword that each lane stands for."""
        lane = jnp.arange(self.code_lanes)
        spread = (lane[:, None] // self.options.codewords == jnp.arange(self.code_rows)) & (
            lane[:, None] < self.subspaces * self.options.codewords
        )
        words = jnp.where(spread.any(1), lane % self.options.codewords, -2)
        return spread.astype(jnp.bfloat16), words[:, None].astype(jnp.float32)

    def index(self, key_block: Any) -> jax.Array:
        """Positions of a tile's keys, float32 (block_k, block_q)."""
        shape = (self.block_k, self.block_q)
        return (key_block * self.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)

    def visible(self, query_block: Any, index: jax.Array) -> jax.Array:
        first = query_block * self.block_q + self.keys - self.time
        return index <= (first + jax.lax.broadcasted_iota(jnp.int32, (1, self.block_q), 1)).astype(jnp.float32)


def _matches(query_codes: jax.Array, key_codes: jax.Array, spread: jax.Array, words: jax.Array) -> jax.Array:
    """Codes in common, float32 (keys, queries)."""

    def one_hot(codes: jax.Array) -> jax.Array:
        own = _product(spread, codes.astype(jnp.bfloat16), (1, 0))
        return jnp.where(own == words, 1.0, 0.0).astype(jnp.bfloat16)

    return _product(one_hot(key_codes), one_hot(query_codes), (0, 0))


def _thresholds_kernel(
    spread_ref: Any, words_ref: Any, query_codes_ref: Any, key_codes_ref: Any, out_ref: Any, *, layout: _Layout
) -> None:
    keep, block_k, block_q = layout.options.keep, layout.block_k, layout.block_q
    query_block = pl.program_id(2)
    spread, words, query_codes = spread_ref[...], words_ref[...], query_codes_ref[...]

    def scores_of(block: Any) -> tuple[jax.Array, jax.Array]:
        keys = key_codes_ref[:, pl.ds(pl.multiple_of(block * block_k, LANES), block_k)]
        index = layout.index(block)
        scores = _matches(query_codes, keys, spread, words)
        return jnp.where(layout.visible(query_block, index), scores, -1.0), index

    def count(block: Any, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        scores, _ = scores_of(block)
        parts = [jnp.where(scores >= m + 1, 1.0, 0.0) for m in range(layout.subspaces)]
        return tuple(
            total + part.reshape(-1, SUBLANES, block_q).sum(0) for total, part in zip(counts, parts, strict=True)
        )

    end = layout.end_of_keys(query_block)
    zeros = (jnp.zeros((SUBLANES, block_q), jnp.float32),) * layout.subspaces
    counts = [total.sum(0, keepdims=True) for total in jax.lax.fori_loop(0, end, count, zeros)]
    tau, ties = level(counts, keep)
    shape = (block_k, block_k)
    before = jax.lax.broadcasted_iota(jnp.int32, shape, 1) <= jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    up_to = jnp.where(before, 1.0, 0.0).astype(jnp.bfloat16)

    def last_tie(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen, cut = carry
        scores, index = scores_of(block)
        tie = jnp.where(scores == tau, 1.0, 0.0)
        number = seen + _product(up_to, tie.astype(jnp.bfloat16), (1, 0))
        taken = jnp.where((tie > 0) & (number <= ties), index, -1.0)
        return number[block_k - 1 :], jnp.maximum(cut, taken.max(0, keepdims=True))

    start = jnp.zeros((1, block_q), jnp.float32), jnp.full((1, block_q), -1.0, jnp.float32)
    _, cut = jax.lax.fori_loop(0, end, last_tie, start)
    position = layout.keys - layout.time + query_block * block_q
    position += jax.lax.broadcasted_iota(jnp.int32, (1, block_q), 1)
    out_ref[...] = jnp.where(position < keep, 0.0, threshold(tau, cut, layout.padded_keys))


def _tile(refs: dict[str, Any], layout: _Layout, query_block: Any, key_block: Any) -> tuple[jax.Array, jax.Array]:
    """Weights before their division by the sum, and where logits are within the clamp; (keys, queries)."""
    options = layout.options
    index = layout.index(key_block)
    scores = _matches(refs["query_codes"][...], refs["key_codes"][...], refs["spread"][...], refs["words"][...])
    order = scores * layout.padded_keys + (layout.padded_keys - 1 - index)
    selected = (order >= refs["thresholds"][...]) & layout.visible(query_block, index)
    logits = options.scale * _product(refs["key"][...], refs["query"][...], (0, 0))
    weights = jnp.exp(jnp.clip(logits, -options.clamp, options.clamp))
    return jnp.where(selected, weights, 0.0), jnp.abs(logits) < options.clamp


def _forward_kernel(refs: dict[str, Any], layout: _Layout) -> None:
    query_block, key_block = pl.program_id(2), pl.program_id(3)

    @pl.when(key_block == 0)
    def _start() -> None:
        refs["out"][...] = jnp.zeros_like(refs["out"])
        refs["sums"][...] = jnp.zeros_like(refs["sums"])

    @pl.when(key_block < layout.end_of_keys(query_block))
    def _add() -> None:
        weights, _ = _tile(refs, layout, query_block, key_block)
        refs["sums"][...] += weights.sum(0, keepdims=True)
        refs["out"][...] += _product(refs["value"][...], weights.astype(refs["value"].dtype), (1, 0))

    @pl.when(key_block == layout.key_blocks - 1)
    def _divide() -> None:
        sums = jnp.maximum(refs["sums"][...], 1e-9)
        refs["sums"][...] = sums
        refs["out"][...] /= sums


def _d_logits(refs: dict[str, Any], layout: _Layout, query_block: Any, key_block: Any) -> tuple[jax.Array, jax.Array]:
    """Weights and the gradient of query . key, (keys, queries)."""
    weights, inside = _tile(refs, layout, query_block, key_block)
    weights = weights / jnp.maximum(refs["sums"][...], 1e-9)
    d_weights = _product(refs["value"][...], refs["d_out"][...], (0, 0))
    d_logits = weights * (d_weights - refs["delta"][...]) * layout.options.scale
    return weights, jnp.where(inside, d_logits, 0.0)


def _d_query_kernel(refs: dict[str, Any], layout: _Layout) -> None:
    query_block, key_block = pl.program_id(2), pl.program_id(3)

    @pl.when(key_block == 0)
    def _start() -> None:
        refs["d_query"][...] = jnp.zeros_like(refs["d_query"])

    @pl.when(key_block < layout.end_of_keys(query_block))
    def _add() -> None:
        _, d_logits = _d_logits(refs, layout, query_block, key_block)
        refs["d_query"][...] += _product(refs["key"][...], d_logits.astype(refs["key"].dtype), (1, 0))


def _d_key_value_kernel(refs: dict[str, Any], layout: _Layout) -> None:
    key_block, query_block = pl.program_id(2), pl.program_id(3)

    @pl.when(query_block == 0)
    def _start() -> None:
        refs["d_key"][...] = jnp.zeros_like(refs["d_key"])
        refs["d_value"][...] = jnp.zeros_like(refs["d_value"])

    @pl.when(query_block >= layout.first_queries(key_block))
    def _add() -> None:
        weights, d_logits = _d_logits(refs, layout, query_block, key_block)
        refs["d_value"][...] += _product(refs["d_out"][...], weights.astype(refs["d_out"].dtype), (1, 1))
        refs["d_key"][...] += _product(refs["query"][...], d_logits.astype(refs["query"].dtype), (1, 1))


def _call(
    name: str,
    kernel: Callable[[dict[str, Any], _Layout], None],
    layout: _Layout,
    queries: dict[str, jax.Array],
    keys: dict[str, jax.Array],
    outputs: dict[str, tuple[str, int]],
    keys_outside: bool,
    products: int,
    interpret: bool,
) -> list[jax.Array]:
    """A kernel over tiles: `queries` are (B, H, X, time), `keys` (B, G, X, keys), outputs (side, X) of each head."""
    spread, words = layout.tables()
    group, block_q, block_k = layout.group, layout.block_q, layout.block_k

    def query_block(outer: Any, inner: Any) -> Any:
        # What a tile without pairs would read is not read: the block stays where it was.
        return jnp.maximum(inner, layout.first_queries(outer)) if keys_outside else outer

    def key_block(outer: Any, inner: Any) -> Any:
        return outer if keys_outside else jnp.minimum(inner, layout.end_of_keys(outer) - 1)

    def spec_of(side: str, width: int, per_key_head: bool = False) -> pl.BlockSpec:
        if side == "query":
            return pl.BlockSpec((None, None, width, block_q), lambda b, h, o, i: (b, h, 0, query_block(o, i)))
        if per_key_head:
            return pl.BlockSpec(
                (None, None, width, block_k), lambda b, h, o, i: (b, jax.lax.div(h, group), 0, key_block(o, i))
            )
        return pl.BlockSpec((None, None, width, block_k), lambda b, h, o, i: (b, h, 0, key_block(o, i)))

    def whole(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    lengths = {"query": layout.padded_time, "key": layout.padded_keys}
    out_shapes = [
        jax.ShapeDtypeStruct((layout.batch, layout.heads, width, lengths[side]), jnp.float32)
        for side, width in outputs.values()
    ]
    blocks = (layout.query_blocks, layout.key_blocks)
    names = ["spread", "words", *queries, *keys, *outputs]
    pairs = layout.batch * layout.heads * layout.time * layout.keys // 2
    inputs = [*queries.values(), *keys.values()]
    return pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True)), layout),
        grid=(layout.batch, layout.heads, *(blocks[::-1] if keys_outside else blocks)),
        in_specs=[
            whole(spread), whole(words),
            *(spec_of("query", x.shape[2]) for x in queries.values()),
            *(spec_of("key", x.shape[2], per_key_head=True) for x in keys.values()),
        ],
        out_specs=[spec_of(side, width) for side, width in outputs.values()],
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (products * max(layout.width, layout.value_width) + layout.code_lanes),
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in inputs) + sum(x.size * 4 for x in out_shapes),
        ),
        interpret=interpret,
        name=name,
    )(spread, words, *inputs)  # fmt: skip


def _thresholds(layout: _Layout, query_codes: jax.Array, key_codes: jax.Array, interpret: bool) -> jax.Array:
    """Float32 (B, H, 1, padded time), of orders among the padded keys."""
    spread, words = layout.tables()
    rows, group = layout.code_rows, layout.group
    pairs = layout.batch * layout.heads * layout.time * layout.keys // 2
    shape = jax.ShapeDtypeStruct((layout.batch, layout.heads, 1, layout.padded_time), jnp.float32)
    return pl.pallas_call(
        partial(_thresholds_kernel, layout=layout),
        grid=(layout.batch, layout.heads, layout.query_blocks),
        in_specs=[
            pl.BlockSpec(spread.shape, lambda *_: (0, 0)),
            pl.BlockSpec(words.shape, lambda *_: (0, 0)),
            pl.BlockSpec((None, None, rows, layout.block_q), lambda b, h, i: (b, h, 0, i)),
            pl.BlockSpec((None, None, rows, layout.padded_keys), lambda b, h, i: (b, jax.lax.div(h, group), 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, 1, layout.block_q), lambda b, h, i: (b, h, 0, i)),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * layout.code_lanes,
            transcendentals=0,
            bytes_accessed=4 * (query_codes.size + key_codes.size + shape.size),
        ),
        interpret=interpret,
        name="sparse_topl_thresholds",
    )(spread, words, query_codes, key_codes)


def _operands(
    layout: _Layout, query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    dtype = query.dtype if query.dtype in (jnp.bfloat16, jnp.float32) else jnp.float32
    queries = {
        "query": layout.lay_out(query.astype(dtype), layout.padded_time),
        "query_codes": layout.codes(query_codes, layout.padded_time),
    }
    keys = {
        "key": layout.lay_out(key.astype(dtype), layout.padded_keys),
        "value": layout.lay_out(value.astype(dtype), layout.padded_keys),
        "key_codes": layout.codes(key_codes, layout.padded_keys),
    }
    return queries, keys


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array,
    *, options: Options, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See `chunked.forward`; thresholds are float32, among the padded keys."""
    layout = _Layout(query, key, value, key_codes.shape[-1], options)
    queries, keys = _operands(layout, query, key, value, query_codes, key_codes)
    queries["thresholds"] = _thresholds(layout, queries["query_codes"], keys["key_codes"], interpret)
    outputs = {"out": ("query", layout.value_width), "sums": ("query", 1)}
    out, sums = _call("sparse_topl_forward", _forward_kernel, layout, queries, keys, outputs, False, 2, interpret)
    out, thresholds, sums = (x[..., : layout.time].transpose(0, 3, 1, 2) for x in (out, queries["thresholds"], sums))
    return out, thresholds[..., 0].astype(jnp.int32), sums[..., 0]


def backward(
    query: jax.Array, key: jax.Array, value: jax.Array, query_codes: jax.Array, key_codes: jax.Array,
    thresholds: jax.Array, sums: jax.Array, delta: jax.Array, d_out: jax.Array, *, options: Options, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See `chunked.backward`; thresholds are those of this module's `forward`."""
    layout = _Layout(query, key, value, key_codes.shape[-1], options)
    queries, keys = _operands(layout, query, key, value, query_codes, key_codes)
    queries |= {"thresholds": layout.row(thresholds.astype(jnp.float32)), "sums": layout.row(sums)}
    queries |= {
        "delta": layout.row(delta),
        "d_out": layout.lay_out(d_out.astype(keys["key"].dtype), layout.padded_time),
    }
    (d_query,) = _call(
        "sparse_topl_d_query", _d_query_kernel, layout, queries, keys, {"d_query": ("query", layout.width)}, False, 3,
        interpret,
    )  # fmt: skip
    outputs = {"d_key": ("key", layout.width), "d_value": ("key", layout.value_width)}
    d_key, d_value = _call(
        "sparse_topl_d_key_value", _d_key_value_kernel, layout, queries, keys, outputs, True, 4, interpret
    )
    d_query = d_query[..., : layout.time].transpose(0, 3, 1, 2)

    def of_key_heads(x: jax.Array) -> jax.Array:
        x = x.reshape(layout.batch, layout.key_heads, layout.group, *x.shape[2:]).sum(2)
        return x[..., : layout.keys].transpose(0, 3, 1, 2)

    return d_query, of_key_heads(d_key), of_key_heads(d_value)

"""Temporary memory of every core against the length of a sequence, as XLA plans it for this CPU: nothing is run.

    python -m benchmarks.memory                       # every core, T = 1024 .. 65536, some minutes
    python -m benchmarks.memory attention delta_rule  # some

One sequence, one head of 64 channels, float32, the chunked form; what a gradient needs beyond arguments and results
(`attention_top_k` and `attention_entries` have none, and are measured forward). `edge_attention` is not here: its
arguments are themselves a number for each pair of vertices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import attention
from kernels.attention_readout import attention_entries, attention_received, attention_top_k, calibrated_attention
from kernels.contextual_attention import contextual_attention
from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from kernels.neural_memory import neural_memory, retained_memory
from kernels.prob_sparse import prob_sparse_attention, sample_size
from kernels.routed_ffn import grouped_product
from kernels.selective_scan import selective_scan
from kernels.spanning_window import spanning_window_attention
from kernels.sparse_topl import sparse_attention

LENGTHS = (1024, 4096, 16384, 65536)
WIDTH = 64
Arrays = tuple[Any, ...]


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _rows(length: int, count: int = 3, width: int = WIDTH) -> Arrays:
    """Queries, keys, values."""
    return (_shape(1, length, 1, width),) * count


def _recurrent(function: Callable[..., Any], length: int, *more: Any, width: int = WIDTH, **options: Any) -> Any:
    query, key, value = *_rows(length, 2, width), *_rows(length, 1)
    return partial(_first, function, **options), (query, key, value, *more)


def _first(function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    return function(*arrays, **options)[0]


def _gla(query: Any, key: Any, value: Any, decay: Any, **options: Any) -> Any:
    return linear_attention(query, key, value, decay=decay, **options)


def _neural_memory(length: int, channels: bool = False) -> Any:
    hidden = 4 * WIDTH
    weights = (_shape(1, hidden, WIDTH), _shape(1, WIDTH, hidden))
    of_layers = (_shape(1, length, 1, hidden), _shape(1, length, 1, WIDTH))
    gate = of_layers if channels else _shape(1, length, 1, 2)
    norm = (_shape(1, WIDTH), _shape(1, WIDTH))

    def run(query: Any, key: Any, value: Any, gate: Any, weights: Any, norm: Any, **options: Any) -> Any:
        return neural_memory(query, key, value, gate, gate, gate, weights, norm=norm, **options)[0]

    return run, (*_rows(length), gate, weights, norm)


def _retained_memory(length: int) -> Any:
    hidden = 4 * WIDTH
    weights, norm = (_shape(1, hidden, WIDTH), _shape(1, WIDTH, hidden)), (_shape(1, WIDTH), _shape(1, WIDTH))
    return partial(_first, retained_memory), (*_rows(length, 5), weights, norm)


def _prob_sparse(length: int) -> Any:
    size = sample_size(5, length)
    run = partial(_first, prob_sparse_attention, queries=size)
    return run, (*_rows(length), _shape(length, size, dtype=jnp.int32))


def _selective_scan(length: int) -> Any:
    rows, narrow = _shape(1, length, 1, WIDTH), _shape(1, length, 1, 16)
    return partial(_first, selective_scan, softplus=True), (rows, rows, _shape(1, WIDTH, 16), narrow, narrow)


def _spanning_window(length: int) -> Any:
    side = math.isqrt(length)  # windows of 8 x 8 divide it
    return partial(spanning_window_attention, window=8), (_shape(1, side, side, 1, WIDTH),) * 3


def _contextual(length: int) -> Any:
    arrays = (_shape(1, length, WIDTH), _shape(1, WIDTH, WIDTH), _shape(1, 1, 1, WIDTH), _shape(1, WIDTH))
    return partial(_first, contextual_attention), arrays


def _entries(query: Any, key: Any, rows: Any, **options: Any) -> Any:
    return attention_entries(query, key, rows=rows, causal=True, **options)


# By name: from a length to a function, which takes `implementation`, and the shapes of its arrays.
PROGRAMS: dict[str, Callable[[int], tuple[Callable[..., Any], Arrays]]] = {
    "attention": lambda length: (partial(attention, causal=True), _rows(length)),
    "prob_sparse_attention": _prob_sparse,
    "linear_attention": lambda length: _recurrent(linear_attention, length),
    "linear_attention, Based": lambda length: _recurrent(
        linear_attention, length, width=16, feature_map="taylor", normalize=True
    ),
    "linear_attention, GLA": lambda length: _recurrent(_gla, length, _shape(1, length, 1, WIDTH)),
    "delta_rule": lambda length: _recurrent(delta_rule, length, _shape(1, length, 1)),
    "selective_scan": _selective_scan,
    "neural_memory": _neural_memory,
    "neural_memory, channels": partial(_neural_memory, channels=True),
    "retained_memory": _retained_memory,
    "attention_received": lambda length: (partial(attention_received, causal=True), _rows(length, 2)),
    "attention_top_k": lambda length: (partial(attention_top_k, k=16, causal=True), _rows(length, 2)),
    "attention_entries": lambda length: (_entries, (*_rows(length, 2), _shape(1, 16, dtype=jnp.int32))),
    "calibrated_attention": lambda length: (
        partial(calibrated_attention, causal=True), (*_rows(length), _shape(1, 1, length, dtype=jnp.bool_))
    ),
    "sparse_attention": lambda length: (
        partial(sparse_attention, keep=128, codewords=16),
        (*_rows(length), *(_shape(1, length, 1, 8, dtype=jnp.int32),) * 2),
    ),
    "grouped_product": lambda length: (
        grouped_product, (_shape(length, WIDTH), _shape(4, WIDTH, 4 * WIDTH), _shape(4, dtype=jnp.int32))
    ),
    "spanning_window_attention": _spanning_window,
    "contextual_attention": _contextual,
}  # fmt: skip
_FORWARD = ("attention_top_k", "attention_entries")


def temporary_bytes(name: str, length: int) -> int:
    """What the program of one core holds beside arguments and results."""
    function, arrays = PROGRAMS[name](length)
    if name in _FORWARD:
        program: Callable[..., Any] = partial(function, implementation="chunked")
    else:
        floating = tuple(
            i for i, x in enumerate(arrays) if all(jnp.issubdtype(y.dtype, jnp.floating) for y in jax.tree.leaves(x))
        )

        def loss(*arrays: Any) -> jax.Array:
            return function(*arrays, implementation="chunked").astype(jnp.float32).sum()

        program = jax.value_and_grad(loss, argnums=floating)
    return jax.jit(program).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def table(names: Iterable[str]) -> Iterable[str]:
    """Lines in Markdown: MiB of temporaries."""
    yield f"| core, MiB at T = | {' | '.join(map(str, LENGTHS))} |"
    yield "| --- |" + " --- |" * len(LENGTHS)
    for name in names:
        yield f"| {name} | " + " | ".join(f"{temporary_bytes(name, n) / 2**20:.1f}" for n in LENGTHS) + " |"


if __name__ == "__main__":
    for line in table(sys.argv[1:] or PROGRAMS):
        print(line, flush=True)

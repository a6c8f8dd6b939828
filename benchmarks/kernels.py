"""Schedules of the TPU kernels, as the compiler leaves them: `make bench-kernels`, or python -m benchmarks.kernels.

A line a kernel of a case: bundles (cycles of its largest inner loop body, stalls aside), the share of issue slots of
the matrix units and of the vector ALUs used there, registers spilled and filled there; the same of the whole kernel
(the pass of its grid loop); and bytes of HBM that the program moves, over its arguments and results once. Scheduled
for a chip that is not here, never measured. Shares are of the target's slots.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from kernels.attention import tpu
from kernels.attention.operands import Operands, Options
from zoo.compilation import Compiled, Loop, compile_for, tpu_schedules


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at a size that somebody published."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]  # pytrees of jax.ShapeDtypeStruct


def _attention(
    name: str,
    batch: int = 1,
    queries: int = 4096,
    keys: int | None = None,
    heads: int = 8,
    key_heads: int | None = None,
    width: int = 128,
    dtype: str = "bfloat16",
    **options: Any,
) -> list[Case]:
    """Forward and backward. Arrays come and go as the kernels take them, (batch, heads, width, time), which is how XLA
    lays out the projections around them: at the edge of a program of their own, copies would be counted, too."""
    keys, key_heads = keys or queries, key_heads or heads
    static = Options(width**-0.5, **options)

    def struct(*shape: int, kind: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    def outside(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 3, 1)

    def inside(x: jax.Array) -> jax.Array:
        return x.transpose(0, 3, 1, 2)

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, logsumexp = tpu.forward(Operands(inside(query), inside(key), inside(value)), static, interpret=False)
        return outside(out), logsumexp

    def backward(
        query: jax.Array, key: jax.Array, value: jax.Array, out: jax.Array, logsumexp: jax.Array, d_out: jax.Array,
        d_logsumexp: jax.Array,
    ) -> tuple[jax.Array, ...]:  # fmt: skip
        operands = Operands(inside(query), inside(key), inside(value))
        gradients = tpu.backward(operands, inside(out), logsumexp, inside(d_out), d_logsumexp, static, interpret=False)
        return tuple(outside(x) for x in (gradients.query, gradients.key, gradients.value))

    query, key = struct(batch, heads, width, queries), struct(batch, key_heads, width, keys)
    rows = struct(batch, heads, queries, kind="float32")
    return [
        Case(f"{name} forward", forward, (query, key, key)),
        Case(f"{name} backward", backward, (query, key, key, query, rows, query, rows)),
    ]


def _decode(name: str, batch: int, keys: int, heads: int, key_heads: int, width: int) -> Case:
    """One token against a cache."""

    def decode(query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array) -> jax.Array:
        operands = Operands(query, key, value, key_lengths=key_lengths)
        return tpu.forward(operands, Options(width**-0.5), interpret=False)[0]

    cache = jax.ShapeDtypeStruct((batch, keys, key_heads, width), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((batch, 1, heads, width), jnp.bfloat16)
    return Case(name, decode, (query, cache, cache, jax.ShapeDtypeStruct((batch,), jnp.int32)))


CASES = [
    *_attention("attention, T 4096, width 128", causal=True),
    *_attention("GPT-2", batch=8, queries=1024, heads=12, width=64, causal=True),
    *_attention("ViT-B", batch=32, queries=197, heads=12, width=64),
    *_attention("Llama 8B, T 8192", queries=8192, heads=32, key_heads=8, causal=True),
    *_attention("Llama 8B, T 32768", queries=32768, heads=32, key_heads=8, causal=True),
    *_attention("Mistral, T 32768", queries=32768, heads=32, key_heads=8, causal=True, window=(4096, 0)),
    *_attention("float32, T 4096", heads=4, dtype="float32", causal=True),
    _decode("Llama 8B, one token", 8, 32768, heads=32, key_heads=8, width=128),
    _decode("one token, width 64", 8, 32768, heads=32, key_heads=8, width=64),
]


def largest_body(loops: list[Loop]) -> Loop:
    """The inner loop that most bundles belong to, or the grid's own where there is no other."""
    inner = [loop for loop in loops if loop.depth > 1]
    return max(inner or loops, key=lambda loop: loop.bundles)


def rows(case: Case, compiled: Compiled) -> list[tuple[str, ...]]:
    """The table's rows of one compiled case."""
    least = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(case.shapes))
    least += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(case.function, *case.shapes)))
    cost: Any = compiled.executable.cost_analysis()
    moved = cost["bytes accessed"]
    found: list[tuple[str, ...]] = []
    for kernel in compiled.kernels:
        loops = [loop for loop in tpu_schedules(compiled) if loop.kernel == kernel]
        if not loops:
            continue
        body, whole = largest_body(loops), loops[0]
        found.append(
            (
                case.name, kernel,
                f"{body.bundles}", f"{body.mxu:.2f}", f"{body.vector_alu:.2f}", f"{body.spills}",
                f"{whole.bundles}", f"{whole.mxu:.2f}", f"{whole.spills}",
                f"{moved / 1e6:.1f}", f"{moved / least:.2f}",
            )
        )  # fmt: skip
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="tpu-v5e", help="a TPU in zoo.compilation.TARGETS")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    table = Table(title=f"TPU kernels as scheduled for {arguments.target}")
    for heading in ("case", "kernel"):
        table.add_column(heading)
    for heading in ("bundles", "MXU", "VALU", "spills", "(all) bundles", "MXU", "spills", "HBM MB", "of minimum"):
        table.add_column(heading, justify="right")
    for case in CASES:
        if arguments.only in case.name:
            for row in rows(case, compile_for(arguments.target, case.function, *case.shapes)):
                table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()

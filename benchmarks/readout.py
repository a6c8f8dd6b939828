"""Readouts of attention maps and spanning window attention in numbers.

    python -m benchmarks.readout cpu     # beside the naive forms in eager PyTorch (zoo[bench])
    python -m benchmarks.readout tpu     # as scheduled for a TPU, never measured
    python -m benchmarks.readout memory  # temporary memory from T = 1k to 64k

On the CPU the two take turns in one process; figures are process CPU time, the best of several runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from kernels import attention_received, attention_top_k, spanning_window_attention
from zoo.compilation import compile_for, report, tpu_schedules

LENGTH, HEADS, WIDTH = 2048, 4, 64
STAGE_3 = (8, 14, 14, 5, 32, 128, 7)  # EMOv2-5M at 224 pixels: batch, height, width, heads, widths, window


def naive_map(query: Any, key: Any) -> Any:
    """The causal map of PyTorch tensors (B, H, T, D)."""
    import torch

    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    length = logits.shape[-1]
    return logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def naive_windows(query: Any, key: Any, value: Any, window: int) -> Any:
    """Close and remote windows of PyTorch tensors (B, H, Y, X, D), by views and copies."""
    batch, heads, height, width, _ = query.shape
    rows, columns = height // window, width // window
    out = 0
    for close in (True, False):
        cut = (rows, window, columns, window) if close else (window, rows, window, columns)
        order = (0, 1, 2, 4, 3, 5, 6) if close else (0, 1, 3, 5, 2, 4, 6)

        def groups(x: Any, cut: Any = cut, order: Any = order) -> Any:
            return x.reshape(batch, heads, *cut, -1).permute(order).reshape(batch, heads, -1, window**2, x.shape[-1])

        q, k, v = map(groups, (query, key, value))
        part = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        part = part.reshape(batch, heads, rows, columns, window, window, -1)
        inverse = [order.index(axis) for axis in range(7)]
        out = out + part.permute(inverse).reshape(batch, heads, height, width, -1)
    return out


def cpu(repeats: int = 7) -> None:
    """Ours beside PyTorch, the same numbers, CPU milliseconds."""
    import torch

    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    table = Table("CPU ms, float32", "", "torch", "ours", "ratio")

    def compare(name: str, ours: Any, theirs: Any, arrays: list[np.ndarray], tensors: list[np.ndarray]) -> None:
        held = [jax.device_put(x) for x in arrays]
        for backward in (False, True):
            leaves = [torch.from_numpy(x.copy()).requires_grad_(backward) for x in tensors]
            numbers = tuple(range(len(arrays)))
            derived: Any = jax.grad(lambda *a: jnp.sum(ours(*a) ** 2), numbers) if backward else ours
            function = jax.jit(derived)

            def run_theirs(leaves: Any = leaves, backward: bool = backward) -> None:
                out = theirs(*leaves)
                if backward:
                    torch.autograd.grad((out**2).sum(), leaves)

            def run_ours(function: Any = function) -> None:
                jax.block_until_ready(function(*held))

            runs: tuple[Callable[[], None], ...] = (run_theirs, run_ours)
            best = [float("inf")] * 2
            for repeat in range(repeats + 1):
                for place, run in enumerate(runs):
                    start = time.process_time()
                    run()
                    if repeat:  # the first is for compilation
                        best[place] = min(best[place], 1e3 * (time.process_time() - start))
            kind = "forward + backward" if backward else "forward"
            table.add_row(name, kind, f"{best[0]:.1f}", f"{best[1]:.1f}", f"{best[1] / best[0]:.2f}")

    flat = [rng.standard_normal((1, LENGTH, HEADS, WIDTH), dtype=np.float32) for _ in range(2)]
    turned = [x.swapaxes(1, 2) for x in flat]
    received: Callable[..., Any] = partial(attention_received, causal=True)
    compare(f"column sums, T {LENGTH}", received, lambda q, k: naive_map(q, k).sum(2), flat, turned)
    best: Callable[..., Any] = lambda q, k: attention_top_k(q, k, 8, causal=True)[0]  # noqa: E731
    compare(f"8 best keys, T {LENGTH}", best, lambda q, k: naive_map(q, k).topk(8)[0], flat, turned)
    *size, dim, value_dim, window = STAGE_3
    maps = [rng.standard_normal((*size, n), dtype=np.float32) for n in (dim, dim, value_dim)]
    turned = [np.moveaxis(x, 3, 1) for x in maps]
    spanning: Callable[..., Any] = partial(spanning_window_attention, window=window)
    compare("EMOv2-5M, stage 3, batch 8", spanning, partial(naive_windows, window=window), maps, turned)
    Console().print(table)


def _programs() -> dict[str, tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]:
    """By name: Llama-2-7B's maps at 4096 tokens, and EMOv2-5M's stage 3.

    Arrays come and go as XLA lays out the projections around them, time or heads and widths last: at the edge of a
    program of their own, copies would be counted, too.
    """
    struct = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    long, rows = struct((1, 32, 128, 4096)), jax.ShapeDtypeStruct((1, 32, 4096), jnp.float32)
    *size, heads, dim, value_dim, window = STAGE_3
    maps = [struct((*size, heads * n)) for n in (dim, dim, value_dim)]

    def received(query: jax.Array, key: jax.Array, logsumexp: jax.Array) -> jax.Array:
        query, key = (x.transpose(0, 3, 1, 2) for x in (query, key))
        return attention_received(query, key, logsumexp=logsumexp, causal=True)[..., 0].swapaxes(1, 2)

    def best(query: jax.Array, key: jax.Array, logsumexp: jax.Array) -> Any:
        query, key = (x.transpose(0, 3, 1, 2) for x in (query, key))
        found = attention_top_k(query, key, 8, logsumexp=logsumexp, causal=True)
        return tuple(x.swapaxes(2, 3) for x in found)

    def spanning(*arrays: jax.Array) -> jax.Array:
        query, key, value = (x.reshape(*size, heads, -1) for x in arrays)
        return spanning_window_attention(query, key, value, window=window).reshape(*size, -1)

    def backward(*arrays: jax.Array) -> Any:
        return jax.vjp(spanning, *arrays[:3])[1](arrays[3])

    return {
        "column sums": (received, [long, long, rows]),
        "8 best keys": (best, [long, long, rows]),
        "spanning window forward": (spanning, maps),
        "spanning window backward": (backward, [*maps, maps[2]]),
    }


def tpu() -> None:
    """Loops of the kernels as scheduled for a v5e, and the bytes that the program moves over those of its arrays."""
    for name, (function, shapes) in _programs().items():
        compiled = compile_for("tpu-v5e", function, *shapes)
        cost: Any = compiled.executable.cost_analysis()
        least = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes, jax.eval_shape(function, *shapes))))
        print(
            f"{name}: {cost['bytes accessed'] / 1e6:.1f} MB moved, {cost['bytes accessed'] / least:.2f} of the minimum"
        )
        for loop in tpu_schedules(compiled):
            print(f"    {loop}")


def memory() -> None:
    """Temporary MiB of readouts and their gradients by length: linear."""
    lengths = (1024, 4096, 16384, 65536)
    table = Table("temporary MiB, H100, 8 heads of 64, bfloat16", *(f"T {n // 1024}k" for n in lengths))
    functions: dict[str, Callable[..., Any]] = {
        "column sums": partial(attention_received, causal=True),
        "8 best keys": lambda q, k: attention_top_k(q, k, 8, causal=True)[0],
    }
    for name, function in functions.items():
        for gradient in (False, True):
            derived: Any = jax.grad(lambda *a, f=function: f(*a).sum(), (0, 1)) if gradient else function
            cells = []
            for length in lengths:
                arrays = [jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)] * 2
                cells.append(f"{report(compile_for('h100', derived, *arrays)).temporary_bytes / 2**20:.1f}")
            table.add_row(f"{name}{', gradient' if gradient else ''}", *cells)
    Console().print(table)


if __name__ == "__main__":
    parts = {"cpu": cpu, "tpu": tpu, "memory": memory}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        sys.exit(f"unknown part {', '.join(sorted(unknown))}: expected {', '.join(parts)}")
    for part in chosen:
        parts[part]()

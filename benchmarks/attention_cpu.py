"""Softmax attention on the CPU beside PyTorch's scaled_dot_product_attention: `python -m benchmarks.attention_cpu`.

The two take turns in one process on the same two threads, so that what else the machine does falls on both. PyTorch
gets its own layout, (batch, heads, time, dim), contiguous; ours is (batch, time, heads, dim).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from kernels import attention

try:
    import torch
except ImportError:
    raise SystemExit("torch missing: install zoo[bench]") from None


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one comparison, float32."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    causal: bool


CASES = (
    Case("causal, T 2048", 1, 8, 2048, 2048, 64, True),
    Case("bidirectional, B 4, T 512", 4, 8, 512, 512, 64, False),
    Case("one token against 8192", 1, 8, 1, 8192, 64, False),
)


def functions(case: Case, backward: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """PyTorch's call and ours, on the same numbers; with `backward`, the gradients of all inputs too."""
    rng = np.random.default_rng(0)
    shapes = [(case.batch, length, case.heads, case.width) for length in (case.queries, case.keys, case.keys)]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    d_out = rng.standard_normal(shapes[0], dtype=np.float32)
    tensors = [torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_(backward) for x in arrays]
    d_out_tensor = torch.from_numpy(d_out.swapaxes(1, 2).copy())

    def theirs() -> object:
        query, key, value = tensors
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=case.causal)
        return torch.autograd.grad(out, tensors, d_out_tensor) if backward else out

    def call(query, key, value):
        return attention(query, key, value, causal=case.causal, implementation="chunked")

    @jax.jit
    def compiled(query, key, value, d_out):
        if not backward:
            return call(query, key, value)
        out, transposed = jax.vjp(call, query, key, value)
        return out, transposed(d_out)

    on_device = [jax.device_put(x) for x in (*arrays, d_out)]
    return theirs, lambda: jax.block_until_ready(compiled(*on_device))


def alternate(one: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of `repeats` calls of each, taking turns, after one call to warm up."""
    times = np.zeros((2, repeats))
    for function in (one, other):
        function()
    for repeat in range(repeats):
        for row, function in enumerate((one, other)):
            start = time.perf_counter()
            function()
            times[row, repeat] = 1e3 * (time.perf_counter() - start)
    return times[0], times[1]


def main(repeats: int = 20) -> None:
    """Prints the medians and their ratios, and the ratio of the fastest calls, which other load disturbs least."""
    torch.set_num_threads(2)
    table = Table("attention, float32", "", "torch ms", "ours ms", "ratio", "ratio of the fastest")
    for case in CASES:
        for backward in (False, True) if case.queries > 1 else (False,):
            theirs, ours = alternate(*functions(case, backward), repeats)
            table.add_row(
                case.name,
                "forward + backward" if backward else "forward",
                f"{np.median(theirs):.2f}",
                f"{np.median(ours):.2f}",
                f"{np.median(ours) / np.median(theirs):.2f}",
                f"{ours.min() / theirs.min():.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    tyro.cli(main)

"""ProbSparse attention in numbers: growth with length, time against the published computation, compiled size.

    python -m benchmarks.prob_sparse            # all three
    python -m benchmarks.prob_sparse growth     # or: published, compiled

Times are this machine's CPU, the best of several runs. Compiled figures are the compiler's, not measured on a device.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts

import jax
import jax.numpy as jnp

from kernels.prob_sparse import prob_sparse_attention, sample_keys, sample_size
from zoo.compilation import compile_for, gpu_resources, report, tpu_schedules

FACTOR = 5
GROWTH = (1024, 4096, 16384, 65536)
PUBLISHED = (720, 336, 96, 48)  # lengths of the published tables, at batch 32, 8 heads of 64
BATCH, HEADS, WIDTH = 32, 8, 64


def best_seconds(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter, seconds: float = 1.0
) -> float:
    """The shortest of at least three runs, and of as many as fit into `seconds`, by `clock`."""
    function()
    best, start, runs = math.inf, time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - start < seconds:
        before = clock()
        function()
        best = min(best, clock() - before)
        runs += 1
    return best


def forward(length: int, query, key, value, table) -> jax.Array:
    """The output at the published factor."""
    return prob_sparse_attention(query, key, value, table, queries=sample_size(FACTOR, length)).out


def forward_and_backward(length: int, query, key, value, table):
    """The output's sum and its gradients."""
    loss = lambda *arrays: forward(length, *arrays, table).sum()  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


def _run(compiled, arrays):
    return jax.block_until_ready(compiled(*arrays))


def inputs(batch: int, length: int, heads: int):
    """Query, key, value and a table of samples."""
    rngs = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(rng, (batch, length, heads, WIDTH)) for rng in rngs[:3]]
    return *arrays, sample_keys(rngs[3], length, length, sample_size(FACTOR, length))


def growth() -> None:
    """Time and memory from 1k to 64k; a power of length near 1 is L log L, 2 would be quadratic."""
    print(
        "B 1, H 2, E 64, float32: CPU milliseconds of all threads, temporary MiB, and the power of L between neighbours"
    )
    print(f"{'L':>6} {'U':>3} {'forward':>9} {'power':>6} {'fwd+bwd':>9} {'power':>6} {'MiB':>8} {'power':>6}")
    before: tuple[float, ...] | None = None
    for length in GROWTH:
        arrays = inputs(1, length, 2)
        figures = []
        for function in (forward, forward_and_backward):
            compiled = jax.jit(functools.partial(function, length)).lower(*arrays).compile()
            figures.append(1e3 * best_seconds(functools.partial(_run, compiled, arrays), time.process_time))
        figures.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        powers = [
            "" if before is None else f"{math.log(now / then, 4):.2f}"
            for now, then in zip(figures, before or figures, strict=True)
        ]
        cells = " ".join(f"{x:9.1f} {p:>6}" for x, p in zip(figures, powers, strict=True))
        print(f"{length:6} {sample_size(FACTOR, length):3} {cells}")
        before = tuple(figures)


def published_in_torch(query, key, value, table, active: int):
    """The published computation, in eager PyTorch, (B, H, L, E): gathers keys of size (B, H, L_Q, U, E)."""
    import torch

    batch, heads, length, width = query.shape
    sampled = (query.unsqueeze(-2) @ key[:, :, table].transpose(-2, -1)).squeeze(-2)
    measure = sampled.amax(-1) - sampled.sum(-1) / key.shape[2]
    top = measure.topk(active, sorted=False)[1]
    item, head = torch.arange(batch)[:, None, None], torch.arange(heads)[None, :, None]
    weights = torch.softmax(query[item, head, top] @ key.transpose(-2, -1) / math.sqrt(width), dim=-1)
    context = value.mean(-2, keepdim=True).expand(batch, heads, length, -1).clone()
    context[item, head, top] = weights @ value
    return context


def published() -> None:
    """Against the published computation in eager PyTorch, the same inputs, the same run, the same cores."""
    import numpy as np
    import torch

    print(f"\nB {BATCH}, H {HEADS}, E {WIDTH}, float32, CPU: milliseconds, ours | the published form in eager torch")
    print(
        f"{'L':>4} {'U':>3} {'forward':>19} {'ratio':>6} {'forward+backward':>19} {'ratio':>6} {'gathered keys GB':>17}"
    )
    for length in PUBLISHED:
        arrays = inputs(BATCH, length, HEADS)
        active = sample_size(FACTOR, length)
        tensors = [torch.tensor(np.asarray(x).swapaxes(1, 2)).contiguous() for x in arrays[:3]]
        table = torch.tensor(np.asarray(arrays[3]), dtype=torch.long)

        def torch_forward(tensors=tensors, table=table, active=active):
            with torch.no_grad():
                return published_in_torch(*tensors, table, active)

        def torch_backward(tensors=tensors, table=table, active=active):
            leaves = [x.clone().requires_grad_() for x in tensors]
            published_in_torch(*leaves, table, active).sum().backward()

        cells = []
        for function, theirs in ((forward, torch_forward), (forward_and_backward, torch_backward)):
            compiled = jax.jit(functools.partial(function, length)).lower(*arrays).compile()
            ours = best_seconds(functools.partial(_run, compiled, arrays))
            other = best_seconds(theirs)
            cells.append(f"{1e3 * ours:8.1f} | {1e3 * other:8.1f} {ours / other:6.2f}")
        gathered = BATCH * HEADS * length * active * WIDTH * 4 / 1e9
        print(f"{length:4} {active:3} {cells[0]} {cells[1]} {gathered:17.2f}")


def compiled() -> None:
    """What the compilers of TPUs and GPUs make of it."""
    print(f"\nB {BATCH}, H {HEADS}, E {WIDTH}, forward: bytes accessed (in brackets the published form's gathered keys")
    print("alone) and temporary memory, by the compilers; scheduled or allocated, not measured")
    for target in ("tpu-v5e", "tpu-v6e", "h100"):
        for length in PUBLISHED:
            for dtype in ("float32", "bfloat16"):
                active = sample_size(FACTOR, length)
                array = jax.ShapeDtypeStruct((BATCH, length, HEADS, WIDTH), dtype)
                table = jax.ShapeDtypeStruct((length, active), jnp.int32)
                program = compile_for(target, functools.partial(forward, length), array, array, array, table)
                size = report(program)
                accessed = "" if size.bytes_accessed is None else f"{size.bytes_accessed / 1e9:6.3f} GB"
                gathered = BATCH * HEADS * length * active * WIDTH * array.dtype.itemsize / 1e9
                print(
                    f"{target:8} L {length:4} {dtype:9} {accessed:>9} ({gathered:5.2f} GB) "
                    f"temporary {size.temporary_bytes / 2**20:7.1f} MiB"
                )
                if length == max(PUBLISHED) and program.target.platform == "tpu":
                    for loop in tpu_schedules(program):
                        if loop.kernel == "prob_sparse_measure":
                            print(f"         {loop}")
                elif length == max(PUBLISHED):
                    print(f"         {[r for r in gpu_resources(program) if r.kernel == 'prob_sparse_measure']}")


if __name__ == "__main__":
    parts = {"growth": growth, "published": published, "compiled": compiled}
    chosen = sys.argv[1:] or list(parts)
    if unknown := set(chosen) - set(parts):
        sys.exit(f"unknown part {', '.join(sorted(unknown))}: expected {', '.join(parts)}")
    for name in chosen:
        parts[name]()

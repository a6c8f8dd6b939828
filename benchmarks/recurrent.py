"""Recurrent cores: chunks against token by token on this CPU, decoding, and what the TPU compiler schedules.

    python -m benchmarks.recurrent            # all of it, a few minutes
    python -m benchmarks.recurrent cpu        # or: scan, decode, tpu, memory

CPU: T = 2048, batch 1, 4 heads of 64, float32, the median of several runs; PyTorch eager, one step a token, as the
operator is defined. TPU: published sizes of the 1.3B models in bfloat16, scheduled, not measured.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from kernels.selective_scan import selective_scan

CORES: dict[str, tuple[Callable[..., Any], dict[str, Any], str | None]] = {  # function, options, decay
    "linear": (linear_attention, {}, None),
    "retnet, ssd": (linear_attention, {}, "scalar"),
    "gla": (linear_attention, {}, "channel"),
    "based": (linear_attention, {"feature_map": "taylor", "normalize": True}, None),
    "delta": (delta_rule, {}, None),
    "gated delta": (delta_rule, {}, "scalar"),
}
# Heads, width and value width of the published 1.3B models.
PUBLISHED = {
    "linear": (16, 128, 128), "retnet, ssd": (8, 256, 512), "gla": (4, 256, 512), "based": (16, 16, 64),
    "delta": (16, 128, 128), "gated delta": (16, 128, 128),
}  # fmt: skip


def arrays(name: str, batch: int, length: int, heads: int, width: int, value_width: int) -> dict[str, np.ndarray]:
    """Inputs of a core by name, float32."""
    function, _, decay = CORES[name]
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((batch, length, heads, *shape), np.float32)

    inputs = {"query": normal(width), "key": normal(width), "value": normal(value_width)}
    inputs["key"] /= np.linalg.norm(inputs["key"], axis=-1, keepdims=True)
    if function is delta_rule:
        inputs["beta"] = 1 / (1 + np.exp(-normal()))
    if decay is not None:
        inputs["decay"] = -np.exp(normal(*([width] if decay == "channel" else [])) - 2)
    return inputs


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median of several runs, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def torch_token_by_token(name: str, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The operator as a few lines of PyTorch."""
    import torch

    query, key, value = (torch.from_numpy(inputs[n]) for n in ("query", "key", "value"))
    beta, decay = (torch.from_numpy(inputs[n]) if n in inputs else None for n in ("beta", "decay"))
    normalize = name == "based"
    if normalize:
        width = query.shape[-1]

        def features(x: torch.Tensor) -> torch.Tensor:
            x = x / width**0.25
            squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
            return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)

        query, key = features(query), features(key)
    if decay is not None and decay.ndim == 3:
        decay = decay[..., None]

    def run() -> torch.Tensor:
        state = torch.zeros(*query.shape[::2], query.shape[-1], value.shape[-1])
        key_sum = torch.zeros(state.shape[:-1])
        outs = []
        for t in range(query.shape[1]):
            if decay is not None:
                state = state * decay[:, t, ..., None].exp()
            new = value[:, t]
            if beta is not None:
                new = beta[:, t, :, None] * (new - (key[:, t, :, None] @ state)[..., 0, :])
            state = state + key[:, t, ..., None] * new[..., None, :]
            out = (query[:, t, :, None] @ state)[..., 0, :]
            if normalize:
                key_sum = key_sum + key[:, t]
                out = out / ((query[:, t] * key_sum).sum(-1, keepdim=True) + 1e-6)
            outs.append(out)
        return torch.stack(outs, 1)

    return run


def cpu(length: int = 2048) -> Iterable[str]:
    """Forward, and forward with backward, against the scan over tokens; forward against PyTorch."""
    yield f"{'T = ' + str(length):14}{'chunked':>10}{'tokens':>10}{'ratio':>8}{'torch':>10}{'ratio':>8}" + (
        f"{'grad':>10}{'tokens':>10}{'ratio':>8}"
    )
    for name, (function, options, _) in CORES.items():
        inputs = arrays(name, 1, length, 4, 16 if name == "based" else 64, 64)
        on_device = jax.tree.map(jnp.asarray, inputs)

        times = {}
        for implementation in ("chunked", "reference"):
            run = partial(_first_output, function, options | {"implementation": implementation})
            grad = jax.grad(lambda named, run=run: run(named).sum())
            times[implementation] = _run_seconds(run, on_device, 7), _run_seconds(grad, on_device, 5)
        torch_time = seconds(torch_token_by_token(name, inputs), 3)
        (fast, fast_grad), (slow, slow_grad) = times["chunked"], times["reference"]
        yield (
            f"{name:14}{1e3 * fast:>8.1f}ms{1e3 * slow:>8.1f}ms{slow / fast:>7.1f}x"
            f"{1e3 * torch_time:>8.0f}ms{torch_time / fast:>7.0f}x"
            f"{1e3 * fast_grad:>8.1f}ms{1e3 * slow_grad:>8.1f}ms{slow_grad / fast_grad:>7.1f}x"
        )


def _first_output(function: Callable[..., Any], options: dict[str, Any], named: dict[str, jax.Array]) -> jax.Array:
    return function(**named, **options)[0]


def _run_seconds(function: Callable[..., Any], named: dict[str, jax.Array], repeats: int) -> float:
    compiled = jax.jit(function)
    return seconds(lambda: jax.block_until_ready(compiled(named)), repeats)


def decode() -> Iterable[str]:
    """Microseconds of one more token after a past of some length: the state has one size, and so has the step."""
    pasts = (1024, 4096, 16384)
    yield f"{'one token after':18}" + "".join(f"{past:>10}" for past in pasts)
    for name, (function, options, _) in CORES.items():
        width = 16 if name == "based" else 64
        token = jax.tree.map(jnp.asarray, arrays(name, 1, 1, 4, width, 64))
        step = jax.jit(lambda named, state, f=function, o=options: f(**named, **o, state=state))
        row = []
        for past in pasts:
            named = jax.tree.map(jnp.asarray, arrays(name, 1, past, 4, width, 64))
            _, state = jax.jit(lambda named, f=function, o=options: f(**named, **o))(named)
            row.append(seconds(lambda s=step, t=token, x=state: jax.block_until_ready(s(t, x)), 101))
        yield f"{name:18}" + "".join(f"{1e6 * x:>8.0f}us" for x in row)


def _scan_arrays(length: int, channels: int, size: int) -> dict[str, np.ndarray]:
    """Inputs of the selective scan of one sequence, float32."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    rows, narrow = (1, length, 1, channels), (1, length, 1, size)
    return {
        "x": normal(*rows), "delta": normal(*rows), "a": -np.exp(normal(1, channels, size)), "b": normal(*narrow),
        "c": normal(*narrow), "skip": normal(1, channels), "gate": normal(*rows), "delta_bias": normal(1, channels),
    }  # fmt: skip


def torch_selective_scan(inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The selective scan as a few lines of PyTorch."""
    import torch

    arrays = {name: torch.from_numpy(x) for name, x in inputs.items()}
    a, skip, bias = (arrays[name][0] for name in ("a", "skip", "delta_bias"))
    x, raw, b, c, gate = (arrays[name][:, :, 0] for name in ("x", "delta", "b", "c", "gate"))

    def run() -> Any:
        delta = torch.nn.functional.softplus(raw + bias)
        decay, driven = (delta[..., None] * a).exp(), (delta * x)[..., None] * b[:, :, None]
        state, outs = torch.zeros(x.shape[0], *a.shape), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + driven[:, t]
            outs.append((state @ c[:, t, :, None])[..., 0])
        return (torch.stack(outs, 1) + skip * x) * torch.nn.functional.silu(gate)

    return run


def scan(length: int = 2048) -> Iterable[str]:
    """The selective scan and its gradients, against the scan over tokens; forward (the same scan) against PyTorch."""
    yield f"{'T = ' + str(length):18}{'':10}{'chunked':>10}{'tokens':>10}{'ratio':>8}{'torch':>10}{'ratio':>8}"
    for channels, size in ((64, 16), (1536, 16)):
        inputs = _scan_arrays(length, channels, size)
        on_device = jax.tree.map(jnp.asarray, inputs)
        for what in ("forward", "gradient"):
            times = []
            for implementation in ("chunked", "reference"):
                run = partial(_first_output, selective_scan, {"softplus": True, "implementation": implementation})
                grad: Callable[..., Any] = jax.grad(partial(_sum_of, run))
                times.append(_run_seconds(run if what == "forward" else grad, on_device, 5))
            fast, slow = times
            line = f"{f'{channels} x {size}':18}{what:10}{1e3 * fast:>8.1f}ms{1e3 * slow:>8.1f}ms{slow / fast:>7.1f}x"
            if what == "forward":
                torch_time = seconds(torch_selective_scan(inputs), 3)
                line += f"{1e3 * torch_time:>8.0f}ms{torch_time / fast:>7.1f}x"
            yield line


def _sum_of(run: Callable[..., Any], named: dict[str, jax.Array]) -> jax.Array:
    return run(named).sum()


def _published_step(name: str, length: int) -> tuple[Callable[..., Any], dict[str, jax.ShapeDtypeStruct]]:
    """A core between projections: arrays (batch, time, heads x width) in and out, as a layer has them."""
    function, options, _ = CORES[name]
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays(name, 8, 1, *PUBLISHED[name])))
    flat = {}
    for n, x in shapes.items():
        dtype = jnp.float32 if n in ("beta", "decay") else jnp.bfloat16
        flat[n] = jax.ShapeDtypeStruct((8, length, int(np.prod(x.shape[2:]))), dtype)

    def run(named: dict[str, jax.Array]) -> Any:
        full = {n: x.reshape(*x.shape[:2], *shapes[n].shape[2:]) for n, x in named.items()}
        out, state = function(**full, **options)
        return out.reshape(*out.shape[:2], -1), state

    return run, flat


def tpu(target: str = "tpu-v5e") -> Iterable[str]:
    """Bundles of the main loops, and HBM bytes of the program against each input and output once."""
    from zoo.compilation import compile_for, report, tpu_schedules

    yield f"{target}, B = 8, T = 2048: bundles a chunk of 128 tokens, matrix units' and vector ALUs' share, spills"
    for name in CORES:
        run, flat = _published_step(name, 2048)

        def loss(named: Any, run=run) -> jax.Array:
            return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(run(named)))

        for what, function in (("forward", run), ("gradient", jax.grad(loss))):
            compiled = compile_for(target, function, flat)
            found = report(compiled)
            least = found.argument_bytes + found.output_bytes
            yield f"{name:14}{what:10}{found.bytes_accessed / least:>6.2f}x the least HBM bytes ({least >> 20} MiB)"
            for loop in tpu_schedules(compiled):
                if loop.depth == 1:
                    yield (
                        f"{'':16}{loop.kernel:34}{loop.bundles:>6} bundles x {loop.iterations}, "
                        f"MXU {loop.mxu:.0%}, VALU {loop.vector_alu:.0%}, {loop.spills} spills and fills"
                    )


def memory(target: str = "tpu-v5e") -> Iterable[str]:
    """MiB of temporaries of a gradient, batch 1."""
    from zoo.compilation import compile_for, report

    lengths = (1024, 4096, 16384, 65536)
    yield f"{'MiB at T =':14}" + "".join(f"{length:>9}" for length in lengths)
    for name in CORES:
        row = []
        for length in lengths:
            run, flat = _published_step(name, length)
            one = {n: x.update(shape=(1, *x.shape[1:])) for n, x in flat.items()}
            grad = jax.grad(lambda named, run=run: jnp.sum(run(named)[0].astype(jnp.float32)))
            row.append(report(compile_for(target, grad, one)).temporary_bytes)
        yield f"{name:14}" + "".join(f"{x / 2**20:>9.0f}" for x in row)


if __name__ == "__main__":
    parts = {"cpu": cpu, "scan": scan, "decode": decode, "tpu": tpu, "memory": memory}
    for part in sys.argv[1:] or parts:
        for line in parts[part]():
            print(line, flush=True)

"""The selective scan's kernels compile for TPUs and GPUs at published sizes, in memory linear in time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kernels.selective_scan import selective_scan
from tests.kernels.compile import shape
from zoo.compilation import compile_for, gpu_resources, report

# (groups, channels, N, whether gated, from the last token)
SIZES = {
    "mamba_130m": (1, 1536, 16, True, False),
    "dsf_s6": (1, 512, 256, False, False),
    "srma_mamba": (4, 96, 1, False, True),
}


def step(name, batch=8, time=2048, dtype=jnp.bfloat16):
    """(outputs and gradients, their arguments)."""
    groups, channels, size, gated, reverse = SIZES[name]
    rows, vector = shape(batch, time, groups, channels, dtype=dtype), shape(groups, channels, dtype=jnp.float32)
    narrow = shape(batch, time, groups, size, dtype=dtype)
    named = {
        "x": rows, "delta": rows.update(dtype=jnp.float32), "b": narrow, "c": narrow, "skip": vector,
        "a": shape(groups, channels, size, dtype=jnp.float32), "delta_bias": vector,
    } | ({"gate": rows} if gated else {})  # fmt: skip

    def loss(named):
        out, state = selective_scan(**named, softplus=True, reverse=reverse)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state), (out, state)

    return jax.value_and_grad(loss, has_aux=True), named


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(name, target, marks=() if name == "mamba_130m" and target != "tpu-v6e" else pytest.mark.slow)
        for name in SIZES
        for target in ("tpu-v5e", "tpu-v6e", "h100")
    ],
)
def test_forward_and_backward_are_kernels(name, target):
    compiled = compile_for(target, *step(name))
    platform = "gpu" if target == "h100" else "tpu"
    for kernel in ("forward", "states", "backward"):
        assert f"selective_scan_{platform}_{kernel}" in compiled.kernels
    if platform == "gpu":  # the forward pass stays in registers
        assert all(r.spill_bytes == 0 for r in gpu_resources(compiled) if "backward" not in r.kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_memory_is_linear_in_time(target):
    """And a published volume's length holds no array of its tokens' states."""
    short, long = (report(compile_for(target, *step("srma_mamba", 1, t))).temporary_bytes for t in (16384, 65536))
    assert long <= 4 * (short + (128 << 20))  # that much may live in VMEM, and is not counted

"""The recurrent cores' kernels compile for TPUs and GPUs at published sizes, in memory linear in time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from zoo.compilation import compile_for, gpu_resources, report


def arrays(batch, time, heads, width, value_width, decay=None, beta=False, dtype=jnp.bfloat16):
    wide = jax.ShapeDtypeStruct((batch, time, heads, width), dtype)
    named = {"query": wide, "key": wide, "value": wide.update(shape=(*wide.shape[:3], value_width))}
    if decay is not None:
        shape = wide.shape[:3] if decay == "scalar" else wide.shape
        named["decay"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if beta:
        named["beta"] = jax.ShapeDtypeStruct(wide.shape[:3], jnp.float32)
    return named


# Of the 1.3B models.
SIZES = {
    "retnet": ("linear_attention", {}, (8, 256, 512, "scalar")),
    "gla": ("linear_attention", {}, (4, 256, 512, "channel")),
    "linear": ("linear_attention", {"feature_map": "elu", "normalize": True}, (16, 128, 128)),
    "based": ("linear_attention", {"feature_map": "taylor", "normalize": True}, (16, 16, 64)),
    "delta": ("delta_rule", {}, (16, 128, 128, None, True)),
    "gated_delta": ("delta_rule", {}, (16, 128, 128, "scalar", True)),
}


def step(name, batch=8, time=2048, dtype=jnp.bfloat16):
    """(outputs and gradients, their arguments)."""
    core, options, size = SIZES[name]
    function = {"linear_attention": linear_attention, "delta_rule": delta_rule}[core]

    def loss(named):
        out, state = function(**named, **options)
        total = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves((out, state)))
        return total, (out, state)

    return jax.value_and_grad(loss, has_aux=True), arrays(batch, time, *size, dtype=dtype)


# Of each core the one that asks most of a compiler; the others are variations on it.
QUICK = [(name, target) for name in ("based", "gated_delta") for target in ("tpu-v5e", "h100")]


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(name, target, marks=() if (name, target) in QUICK else pytest.mark.slow)
        for name in SIZES
        for target in ("tpu-v5e", "tpu-v6e", "h100")
    ],
)
def test_forward_and_backward_are_kernels(name, target):
    compiled = compile_for(target, *step(name))
    platform = "gpu" if target == "h100" else "tpu"
    for kernel in ("forward", "states", "backward"):
        assert f"{SIZES[name][0]}_{platform}_{kernel}" in compiled.kernels
    if platform == "gpu":  # the forward pass stays in registers
        assert all(r.spill_bytes == 0 for r in gpu_resources(compiled) if "backward" not in r.kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_float32_compiles(target):
    assert "delta_rule" in " ".join(compile_for(target, *step("gated_delta", dtype=jnp.float32)).kernels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gla", "based", "gated_delta"])
def test_memory_is_linear_in_time(name):
    short, long = (report(compile_for("tpu-v5e", *step(name, 8, time))).temporary_bytes for time in (2048, 8192))
    assert long <= 4 * (short + (128 << 20))  # that much may live in VMEM, and is not counted

"""The neural memory's kernels compile for TPUs and GPUs, at the published sizes of Titans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from kernels.neural_memory import neural_memory
from zoo.compilation import compile_for


def step(time, heads, width, implementation=None, batch=1):
    """(value and gradients of the memory of Titans, their arguments)."""
    tokens = jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((batch, time, heads, 2), jnp.float32)
    norm = jax.ShapeDtypeStruct((heads, width), jnp.float32)
    weights = tuple(
        jax.ShapeDtypeStruct((heads, *shape), jnp.float32) for shape in ((4 * width, width), (width, 4 * width))
    )

    def loss(query, key, value, alpha, eta, theta, weights, scale, bias):
        out, _ = neural_memory(
            query, key, value, alpha, eta, theta, weights, norm=(scale, bias), implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32))

    return jax.value_and_grad(loss, argnums=tuple(range(9))), (*[tokens] * 3, *[gate] * 3, weights, norm, norm)


# The 170M, 340M, 760M and 1.3B models have heads of 48, 64, 96 and 256 channels.
@pytest.mark.parametrize(
    ("target", "heads", "width"),
    [
        ("tpu-v5e", 16, 64),
        pytest.param("tpu-v6e", 16, 64, marks=pytest.mark.slow),
        *(pytest.param("tpu-v5e", *size, marks=pytest.mark.slow) for size in ((16, 48), (16, 96), (8, 256))),
        pytest.param("tpu-v6e", 8, 256, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_are_tpu_kernels(target, heads, width):
    function, arguments = step(512, heads, width)
    kernels = compile_for(target, function, *arguments).kernels
    for kernel in ("forward", "states", "backward"):
        assert f"neural_memory_tpu_{kernel}" in kernels


@pytest.mark.parametrize(
    ("width", "implementation", "held"),
    [
        pytest.param(64, None, False, marks=pytest.mark.slow),
        pytest.param(16, None, True, marks=pytest.mark.slow),
        pytest.param(32, "gpu", True, marks=pytest.mark.slow),
    ],
)
def test_a_gpu_program_holds_the_kernel_where_its_registers_do(width, implementation, held):
    function, arguments = step(64, 4, width, implementation)
    kernels = " ".join(compile_for("h100", function, *arguments).kernels)
    for kernel in ("forward", "states", "backward"):
        assert (f"neural_memory_gpu_{kernel}" in kernels) == held

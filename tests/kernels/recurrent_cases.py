"""What the recurrent cores are tested on, for every implementation: the comparison with the definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.kernels.attention_cases import TOLERANCES

Arrays = dict[str, Any]
Call = Callable[[Arrays, str | None], Any]  # the core, of arrays by name and an implementation


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@partial(jax.jit, static_argnums=(0, 2, 3))
def outputs_and_gradients(call: Call, arrays: Arrays, implementation: str, dtype: str) -> tuple[Any, Arrays]:
    """Outputs, and the gradients of their product with random cotangents, with respect to every array."""

    def loss(arrays: Arrays) -> tuple[jax.Array, Any]:
        outputs = call(arrays, implementation)
        rng = np.random.default_rng(2)
        total = 0.0
        for x in jax.tree.leaves(outputs):
            # The same cotangents in bfloat16 and in float32: else their rounding would count as an error.
            weights = jnp.asarray(rng.standard_normal(x.shape), dtype).astype(jnp.float32)
            total += jnp.sum(x.astype(jnp.float32) * weights)
        return total, outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(arrays)
    return outputs, gradients


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float, dtype: str, name: str) -> None:
    """Errors are at most `tolerance` of the root mean square of what is expected.

    One rounding of each entry to the inputs' dtype is not counted: a rare bfloat16 entry of ten times the root mean
    square loses 2% of it by being written down, or by being the product of a rounded factor.
    """
    half_unit = float(jnp.finfo(dtype).eps) / 2
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(expected).all(), f"{name}: the reference is not finite"
    size = np.sqrt(np.mean(expected**2))
    error = (np.abs(actual - expected) - half_unit * np.abs(expected)).max()
    assert error <= tolerance * size, f"{name}: error {error:.3g} of {size:.3g}, allowed {tolerance:g} of it"


def assert_equals_reference(call: Call, arrays: Arrays, implementation: str, dtype: str = "float32") -> None:
    """Outputs and gradients of `implementation` are those of the definition in float32.

    Args:
      call: the core; hashable.
      arrays: float32; "query", "key" and "value" are rounded to `dtype` first.
      implementation: to be tested.
      dtype: of the inputs.
    """
    arrays = arrays | {name: arrays[name].astype(dtype) for name in ("query", "key", "value")}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    outputs, gradients = outputs_and_gradients(call, arrays, implementation, dtype)
    expected_outputs, expected_gradients = outputs_and_gradients(call, exact, "reference", dtype)
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    for (path, expected), got in zip(
        jax.tree.leaves_with_path(expected_outputs), jax.tree.leaves(outputs), strict=True
    ):
        assert_close(got, expected, tolerance, dtype, jax.tree_util.keystr(path))
    for (path, expected), got in zip(
        jax.tree.leaves_with_path(expected_gradients), jax.tree.leaves(gradients), strict=True
    ):
        assert_close(got, expected, gradient_tolerance, dtype, f"gradient of {jax.tree_util.keystr(path)}")
    jax.tree.map(lambda gradient, array: _same_dtype(gradient, array), gradients, arrays)
    assert outputs[0].dtype == dtype


def _same_dtype(gradient: jax.Array, array: jax.Array) -> None:
    assert gradient.dtype == array.dtype

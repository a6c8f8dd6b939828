"""What the readouts of an attention map are tested on: attention's own cases, values and gradients against the map."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention_readout import attention_received, attention_top_k
from tests.kernels import attention_cases
from tests.kernels.attention_cases import TOLERANCES, Case, assert_close


def arrays(case: Case) -> tuple[dict[str, jax.Array], dict]:
    """Differentiable arguments, without a value but with weights of two sums, and the rest."""
    floats = attention_cases.differentiable(case)
    del floats["value"]
    rng = np.random.default_rng(5)
    shape = (case.batch, case.queries, case.heads, 2)
    floats["weights"] = jnp.asarray(rng.standard_normal(shape), case.dtype)
    options = {"causal": case.causal, "window": case.window, "logit_softcap": case.logit_softcap}
    return floats, attention_cases.integers(case) | options


@partial(jax.jit, static_argnums=(0, 2, 3))
def received(case: Case, floats: dict[str, jax.Array], implementation: str, differentiated: bool = True):
    """The sums, and gradients of their product with a random cotangent."""
    options = arrays(case)[1]
    rng = np.random.default_rng(6)
    # The same cotangent in bfloat16 and in float32: else its rounding would count as an error.
    d_out = jnp.asarray(rng.standard_normal((case.batch, case.keys, case.heads, 2)), case.dtype).astype(jnp.float32)

    def loss(floats):
        out = attention_received(**floats, **options, implementation=implementation)
        return jnp.sum(out * d_out), out

    if not differentiated:
        return loss(floats)[1], {}
    gradients, out = jax.grad(loss, has_aux=True)(floats)
    return out, gradients


@partial(jax.jit, static_argnums=(0, 2, 3))
def top_k(case: Case, floats: dict[str, jax.Array], implementation: str, k: int):
    """Weights, indices, and gradients of the weights' product with a random cotangent."""
    options = arrays(case)[1]
    d_out = np.random.default_rng(7).standard_normal((case.batch, case.heads, case.queries, k))
    floats = {name: array for name, array in floats.items() if name != "weights"}

    def loss(floats):
        weights, indices = attention_top_k(**floats, **options, k=k, implementation=implementation)
        return jnp.sum(weights * d_out), (weights, indices)

    gradients, (weights, indices) = jax.grad(loss, has_aux=True)(floats)
    return weights, indices, gradients


def assert_equals_reference(case: Case, implementation: str, k: int = 3) -> None:
    """Sums, largest weights, where they are, and all gradients are those of the float32 map."""
    floats, _ = arrays(case)
    exact = {name: array.astype(jnp.float32) for name, array in floats.items()}
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    out, gradients = received(case, floats, implementation)
    expected, expected_gradients = received(case, exact, "reference")
    assert out.dtype == jnp.float32
    assert_close(out, expected, value_tolerance, "received")
    for name, array in expected_gradients.items():
        assert gradients[name].dtype == floats[name].dtype
        assert_close(gradients[name], array, gradient_tolerance, f"gradient of received by {name}")

    weights, indices, gradients = top_k(case, floats, implementation, k)
    expected, expected_indices, expected_gradients = top_k(case, exact, "reference", k)
    assert_close(weights, expected, value_tolerance, "weights")
    if case.dtype == "float32":
        np.testing.assert_array_equal(indices, expected_indices)
        for name, array in expected_gradients.items():
            assert_close(gradients[name], array, gradient_tolerance, f"gradient of top k by {name}")
    else:  # rounding swaps near equals
        assert np.mean(np.asarray(indices) == np.asarray(expected_indices)) > 0.9

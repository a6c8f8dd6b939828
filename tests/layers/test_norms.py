"""Norms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.norms import norm


def by_definition(kind, x, epsilon):
    x = np.asarray(x, np.float64)
    if kind == "layer":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_equals_the_formula(kind, epsilon):
    x = jax.random.normal(jax.random.key(0), (3, 8))
    y, _ = norm(kind, epsilon=epsilon).init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y, by_definition(kind, x, epsilon), atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_an_entry_thousands_of_times_the_spread_does_no_harm(kind):
    """Trained residual streams have such entries, above all at the first token."""
    x = jax.random.normal(jax.random.key(0), (1, 64)) + 1e4
    y, _ = norm(kind, epsilon=1e-6).init_with_output(jax.random.key(1), x)
    np.testing.assert_allclose(y, by_definition(kind, x, 1e-6), atol=2e-3)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_statistics_are_float32_for_half_precision(kind):
    x = jax.random.normal(jax.random.key(0), (2, 512)).astype(jnp.float16) * 60  # squares overflow float16
    y, _ = norm(kind, epsilon=1e-6, dtype=jnp.float16).init_with_output(jax.random.key(1), x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), by_definition(kind, x, 1e-6), atol=5e-3)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown norm 'batch'; known: layer, rms"):
        norm("batch", epsilon=1e-5)

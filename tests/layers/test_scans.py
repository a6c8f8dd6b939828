import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.scans import leaky_sum


@pytest.mark.parametrize("per_token", [False, True])
def test_leaky_sum_is_the_recurrence(per_token):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3))
    decay = jax.random.uniform(jax.random.key(1), (2, 7, 1)) if per_token else jnp.asarray(0.7)
    y = initial = jax.random.normal(jax.random.key(2), (2, 3))
    expected = []
    for step in range(7):
        y = jnp.broadcast_to(decay, x.shape)[:, step] * y + x[:, step]
        expected.append(y)
    np.testing.assert_allclose(leaky_sum(x, decay, initial), np.stack(expected, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(leaky_sum(x, 1.0), jnp.cumsum(x, 1), rtol=1e-5, atol=1e-6)

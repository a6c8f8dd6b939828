import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.dropout import Dropout


def drop(x, rate=0.25, seed=0, train=True):
    return Dropout(rate).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("shape", [(40_000,), (200, 200), (8, 50, 100)])
def test_kept_share_and_mean(shape):
    y = np.asarray(drop(jnp.ones(shape)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    # Four standard deviations of the mean of 40,000 draws.
    assert abs(y.mean() - 1) < 4 * (0.25 / 0.75 / 40_000) ** 0.5


def test_elements_are_dropped_independently_along_every_axis():
    kept = np.asarray(drop(jnp.ones((64, 64, 64)))) > 0
    for axis in range(3):
        a, b = np.take(kept, range(63), axis), np.take(kept, range(1, 64), axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


def test_keys_decide_and_evaluation_keeps_all():
    x = jnp.ones((100, 100))
    np.testing.assert_array_equal(drop(x, seed=1), drop(x, seed=1))
    assert (drop(x, seed=1) != drop(x, seed=2)).mean() > 0.2
    np.testing.assert_array_equal(drop(x, train=False), x)


def test_rates_outside_zero_and_one_are_refused():
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1.0"):
        drop(jnp.ones(3), rate=1.0)

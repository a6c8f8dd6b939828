"""Patch embedding and stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.drop_path import DropPath
from zoo.layers.patches import PatchEmbedding


def test_patch_embedding_is_a_matrix_product_with_each_patch():
    images = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))
    model = PatchEmbedding(5, (2, 4))
    variables = nn.meta.unbox(model.init(jax.random.key(1), images))
    weights = variables["params"]["projection"]
    y = model.apply(variables, images)
    assert y.shape == (2, 3, 2, 5)
    for row in range(3):
        for column in range(2):
            patch = images[:, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4].reshape(2, -1)
            expected = patch @ weights["kernel"].reshape(-1, 5) + weights["bias"]
            np.testing.assert_allclose(y[:, row, column], expected, atol=1e-5)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="9 x 8 pixels do not divide"):
        PatchEmbedding(5, (2, 4)).init(jax.random.key(1), jnp.zeros((1, 9, 8, 3)))


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 3, 2))
    y = DropPath(0.25).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    per_example = np.asarray(y.reshape(4000, -1))
    np.testing.assert_allclose(per_example, np.broadcast_to(per_example[:, :1], per_example.shape))
    assert set(np.unique(per_example).round(4)) == {0.0, np.float32(1 / 0.75).round(4)}
    assert float(y.mean()) == pytest.approx(1.0, abs=0.03)


def test_drop_path_is_the_identity_when_deterministic_or_without_a_rate():
    x = jnp.ones((4, 3))
    np.testing.assert_array_equal(DropPath(0.5).apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(DropPath(0.0).apply({}, x, deterministic=False), x)

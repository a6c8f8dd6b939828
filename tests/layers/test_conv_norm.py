"""Batch norm as PyTorch's, and networks folded for inference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.conv_norm import ConvNorm, LayerScale, fold
from zoo.layers.convolution import Conv


def test_training_normalises_by_the_batch_and_remembers_its_unbiased_variance():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    model = BatchNorm(momentum=0.2)
    variables = nn.unbox(model.init(jax.random.key(1), x, True))
    assert (variables["batch_stats"]["mean"] == 0).all() and (variables["batch_stats"]["var"] == 1).all()
    y, changed = model.apply(variables, x, True, mutable=["batch_stats"])
    values = np.asarray(x, np.float64).reshape(-1, 4)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 4), expected, atol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.2 * values.mean(0), atol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.8 + 0.2 * values.var(0, ddof=1), atol=1e-5)


def test_evaluation_normalises_by_the_running_statistics():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    params = {"scale": jnp.array([1.0, 2, 3]), "bias": jnp.array([0.0, 1, 2])}
    stats = {"mean": jnp.array([0.5, 0, -1]), "var": jnp.array([4.0, 1, 0.25])}
    y = BatchNorm(epsilon=0.1).apply({"params": params, "batch_stats": stats}, x, False)
    expected = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 0.1) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_statistics_are_float32_for_half_precision():
    x = (jax.random.normal(jax.random.key(0), (512, 2)) * 60).astype(jnp.float16)  # squares overflow float16
    model = BatchNorm(dtype=jnp.float16)
    y, _ = model.apply(model.init(jax.random.key(0), x, False), x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32).std(0), 1, atol=1e-2)


def test_one_value_a_channel_cannot_be_trained_on():
    with pytest.raises(ValueError, match="more than one value a channel, got x of shape"):
        BatchNorm().init(jax.random.key(0), jnp.zeros((1, 4)), True)


class Network(nn.Module):
    """Everything that folds, and neighbours that do not."""

    @nn.compact
    def __call__(self, x, train=False):
        y = ConvNorm(6, 3, stride=2, name="stem")(x, train)
        y = ConvNorm(6, 3, groups=6, use_bias=False, name="depthwise")(nn.relu(y), train)
        y = y + ConvNorm(6, layer_scale=0.1, epsilon=1e-5, name="branch")(y, train)
        y = y + ConvNorm(6, norm=False, layer_scale=0.1, name="bare")(y, train)
        y = y + ConvNorm(6, norm=False, use_bias=False, layer_scale=0.1, name="barer")(y, train)
        y = y + LayerScale(0.5, name="layer_scale")(y)
        return BatchNorm(name="norm")(Conv(4, name="last")(y), train)


def test_a_folded_network_is_the_same_function():
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    model = Network()
    variables = random_parameters(model, x)
    stats = jax.tree.map_with_path(
        lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key == "var" else leaf, variables["batch_stats"]
    )
    variables = {"params": variables["params"], "batch_stats": stats}
    folded = jax.jit(fold)(variables)
    assert set(folded["params"]["stem"]) == {"conv"} and set(folded["batch_stats"]) == {"norm"}
    assert folded["params"]["depthwise"]["conv"]["bias"].shape == (6,)
    assert "bias" not in folded["params"]["barer"]["conv"] and "layer_scale" in folded["params"]
    expected = model.apply(variables, x, False)
    np.testing.assert_allclose(model.apply(folded, x, False), expected, atol=1e-5 * float(jnp.std(expected)))
    with pytest.raises(ValueError, match="stem was folded for inference and cannot train"):
        model.apply(folded, x, True, mutable=["batch_stats"])


def test_folding_twice_is_folding_once():
    x = jnp.ones((1, 8, 8, 3))
    once = fold(Network().init(jax.random.key(0), x, False))
    jax.tree.map(np.testing.assert_array_equal, fold(once), once)


def test_layer_norms_behind_a_convolution_stay():
    class Patches(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(name="norm")(Conv(4, name="conv")(x))

    variables = nn.unbox(Patches().init(jax.random.key(0), jnp.ones((1, 2, 2, 3))))
    jax.tree.map(np.testing.assert_array_equal, fold(variables), variables)

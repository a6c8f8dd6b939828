"""Adapters are what they say, and where they are; routed networks equal their definition by masks."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.layers.lora import LoRA, adapted, merge
from zoo.layers.mlp import MLP
from zoo.layers.routed_mlp import RoutedMLP


class Net(nn.Module):
    """An embedding and a projection."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(5, name="out")(nn.Embed(7, 4, name="embed")(tokens))


TOKENS = jnp.asarray([[1, 2, 6]])


def _adapted_variables(net, x, lora, seed=1):
    with adapted(lora):
        variables = nn.meta.unbox(net.init(jax.random.key(0), x))
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    drawn = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), variables["lora"])
    return {**variables, "lora": drawn}


def test_an_adapter_adds_its_product_and_merging_keeps_the_outputs():
    lora, net = LoRA(2, scale=0.5), Net()
    variables = _adapted_variables(net, TOKENS, lora)
    with adapted(lora):
        found = net.apply(variables, TOKENS)
    params, adapters = variables["params"], variables["lora"]
    embedding = params["embed"]["embedding"] + 0.5 * adapters["embed"]["left"] @ adapters["embed"]["right"].T
    kernel = params["out"]["kernel"] + 0.5 * adapters["out"]["left"] @ adapters["out"]["right"].T
    np.testing.assert_allclose(found, embedding[TOKENS] @ kernel + params["out"]["bias"], rtol=1e-5, atol=1e-5)
    merged = merge(variables, lora)
    assert "lora" not in merged
    np.testing.assert_allclose(net.apply(merged, TOKENS), found, rtol=1e-5, atol=1e-5)


def test_new_adapters_change_nothing_and_targets_choose():
    net, lora = Net(), LoRA(3, targets="out")
    with adapted(lora):
        variables = net.init(jax.random.key(0), TOKENS)
        assert set(variables["lora"]) == {"out"}
        found = net.apply(variables, TOKENS)
    np.testing.assert_array_equal(found, net.apply({"params": variables["params"]}, TOKENS))


def test_dropout_is_for_training_alone():
    lora, net = LoRA(2, dropout=0.5), Net()
    variables = _adapted_variables(net, TOKENS, lora)
    with adapted(lora):
        still = [net.apply(variables, TOKENS) for _ in range(2)]
        trained = net.apply(variables, TOKENS, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_array_equal(*still)
    assert not np.allclose(still[0], trained)


def test_bad_input_is_named():
    variables = Net().init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="no adapter for embed"), adapted(LoRA(2)):
        Net().apply(variables, TOKENS)
    with pytest.raises(ValueError, match="rank must be positive"):
        LoRA(0)
    x = jnp.ones((3, 4))
    with pytest.raises(ValueError, match="blocks must divide"):
        RoutedMLP(6, blocks=4).init(jax.random.key(0), x)
    lora = LoRA(2, targets="^(?!router)")
    routed = _adapted_variables(RoutedMLP(8), x, lora)
    with pytest.raises(ValueError, match="its router scales the kernel alone"):
        merge(routed, lora)


@pytest.mark.parametrize(("kind", "scaled"), [("relu", True), ("swiglu", True), ("gelu", False)])
def test_a_routed_network_is_the_plain_one_masked_and_scaled(kind, scaled):
    x = jax.random.normal(jax.random.key(2), (2, 9, 6))
    routed = RoutedMLP(16, kind, blocks=4, active=2, scaled=scaled)
    variables = random_parameters(routed, x)
    params = variables["params"]
    probabilities = jax.nn.sigmoid(x @ params["router"]["kernel"] + params["router"]["bias"])
    chosen = jax.nn.one_hot(jax.lax.top_k(probabilities, 2)[1], 4).sum(-2)
    factor = jnp.repeat(chosen * (2 * probabilities if scaled else 1), 4, axis=-1)

    def into(name):
        return factor * (x @ params[name]["kernel"] + params[name]["bias"])

    activation = {"relu": jax.nn.relu, "gelu": lambda h: jax.nn.gelu(h, approximate=False)}
    hidden = jax.nn.silu(into("gate")) * into("up") if kind == "swiglu" else activation[kind](into("up"))
    expected = (factor * hidden) @ params["down"]["kernel"] + params["down"]["bias"]
    np.testing.assert_allclose(routed.apply(variables, x), expected, rtol=2e-5, atol=2e-5)
    plain = jax.eval_shape(MLP(16, kind).init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, nn.meta.unbox(plain)) == {
        name: jax.tree.map(jnp.shape, leaf) for name, leaf in params.items() if name != "router"
    }

"""The MLP's kinds against their definitions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.mlp import GATED, MLP, PLAIN

DEFINITIONS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}
DEFINITIONS |= {
    "swiglu": DEFINITIONS["silu"],
    "geglu": DEFINITIONS["gelu"],
    "geglu_tanh": DEFINITIONS["gelu_tanh"],
    "reglu": DEFINITIONS["relu"],
}


@pytest.mark.parametrize("kind", sorted(PLAIN | GATED))
def test_equals_the_definition(kind):
    x = jax.random.normal(jax.random.key(0), (5, 4))
    model = MLP(6, kind)
    variables = nn.meta.unbox(model.init(jax.random.key(1), x))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    weights = jax.tree.map(np.asarray, variables["params"])

    def project(name, x):
        return np.asarray(x) @ weights[name]["kernel"] + weights[name]["bias"]

    activation = np.vectorize(DEFINITIONS[kind])
    up = project("up", x)
    hidden = activation(project("gate", x)) * up if kind in GATED else activation(up)
    np.testing.assert_allclose(model.apply(variables, x), project("down", hidden), atol=1e-5)


def test_biases_can_be_left_away():
    variables = nn.meta.unbox(MLP(6, "swiglu", use_bias=False).init(jax.random.key(1), jnp.zeros((1, 4))))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {"up": {"kernel": (4, 6)}, "gate": {"kernel": (4, 6)}, "down": {"kernel": (6, 4)}}


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown MLP 'swigl'; did you mean 'swiglu'"):
        MLP(6, "swigl").init(jax.random.key(0), jnp.zeros((1, 4)))

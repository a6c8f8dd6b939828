"""A network takes any mixer by name: here one that knows nothing of heads, windows or positions."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM, ViT, ViTConfig
from zoo.layers.partitioning import dense
from zoo.mixers import Mixer, base


class Sums(NamedTuple):
    total: jax.Array  # (batch, features)
    count: jax.Array  # (batch,)


class RunningMean(Mixer):
    """A projection of the mean of all tokens seen; `power` is an option of its own."""

    power: float = 1.0

    @nn.compact
    def __call__(self, x, state=None, *, valid=None, deterministic=True):
        self.check(x, state, valid)
        present = jnp.ones(x.shape[:2], x.dtype) if valid is None else valid.astype(x.dtype)
        past = self.init_state(x.shape[0], x.shape[1]) if state is None else state
        accumulate = (lambda y: jnp.cumsum(y, axis=1)) if self.causal else (lambda y: y.sum(axis=1, keepdims=True))
        total = past.total[:, None] + accumulate(x * present[..., None])
        count = past.count[:, None] + accumulate(present)
        mean = total / jnp.maximum(count, 1.0)[..., None] ** self.power
        y = dense(self.features, ("embed", "embed"), kernel_init=self.out_init, name="out")(mean)
        return y * present[..., None], None if state is None else Sums(total[:, -1], count[:, -1])

    @nn.nowrap
    def init_state(self, batch_size, length):
        return Sums(jnp.zeros((batch_size, self.features)), jnp.zeros(batch_size))


@pytest.fixture(autouse=True)
def running_mean(monkeypatch):
    monkeypatch.setitem(base._REGISTRY, "running_mean", RunningMean)


TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)


@pytest.mark.parametrize("mixer", ["running_mean", ("running_mean", "softmax")])
def test_a_decoder_of_any_mixers_decodes_as_it_trains(mixer):
    options = {"power": 0.5} if isinstance(mixer, str) else ({"power": 0.5}, {"sinks": True})
    model = DecoderLM(
        DecoderConfig(vocab_size=11, features=8, layers=3, heads=2, window=2, mixer=mixer, mixer_options=options)
    )
    variables = random_parameters(model, TOKENS)
    parallel, _ = jax.jit(model.apply)(variables, TOKENS)
    state, step, outputs = model.init_state(2, 6), jax.jit(model.apply), []
    for t in range(6):
        logits, state = step(variables, TOKENS[:, t : t + 1], state)
        outputs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), parallel, atol=1e-4)


def test_a_vision_transformer_of_any_mixer_is_bidirectional():
    model = ViT(ViTConfig(features=8, layers=1, heads=2, mixer="running_mean", image_size=(8, 8), patch=(4, 4)))
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    variables = random_parameters(model, images)
    before = model.apply(variables, images)
    after = model.apply(variables, images.at[:, -1, -1].add(1.0))
    assert float(jnp.abs(before - after).max()) > 1e-4  # the class token, the first, sees the last patch


def test_options_are_checked_against_the_layers_own_mixer():
    sizes = {"vocab_size": 11, "features": 8, "layers": 2, "heads": 2}
    with pytest.raises(TypeError, match=r"'running_mean' has no option 'sinks'; its options: .*power"):
        DecoderConfig(**sizes, mixer=("softmax", "running_mean"), mixer_options={"sinks": True})

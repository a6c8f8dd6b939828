import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parameters import random_parameters
from zoo.layers.short_convolution import ShortConvolution


def make(**options):
    model = ShortConvolution(6, **options)
    x = jax.random.normal(jax.random.key(1), (2, 9, 6))
    return model, random_parameters(model, x), x


def test_equals_a_padded_depthwise_convolution():
    model, variables, x = make(use_bias=True)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    y = torch.nn.functional.conv1d(
        torch.from_numpy(np.array(x)).mT, torch.from_numpy(kernel.T[:, None].copy()), torch.from_numpy(bias.copy()),
        padding=3, groups=6,
    )[..., :9]  # fmt: skip
    np.testing.assert_allclose(model.apply(variables, x)[0], torch.nn.functional.silu(y).mT, atol=1e-6)


@pytest.mark.parametrize("pieces", [(1,) * 9, (2, 7), (5, 4)])
def test_pieces_give_what_the_whole_gives(pieces):
    model, variables, x = make()
    state, parts = model.init_state(2), []
    for part in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        y, state = model.apply(variables, jnp.asarray(part), state)
        parts.append(y)
    whole, last = model.apply(variables, x)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-6)
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize("with_state", [False, True])
def test_padding_is_skipped_wherever_it_stands(with_state):
    model, variables, x = make()
    state = jax.random.normal(jax.random.key(2), (2, 3, 6)) if with_state else None
    valid = np.array([[0, 1, 1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 1]], bool)
    y, last = model.apply(variables, x, state, valid=jnp.asarray(valid))
    for item in range(2):
        tokens = x[item, valid[item]][None]
        past = None if state is None else state[item : item + 1]
        expected, expected_last = model.apply(variables, tokens, past)
        np.testing.assert_allclose(y[item, valid[item]], expected[0], atol=1e-6)
        np.testing.assert_allclose(last[item], expected_last[0], atol=1e-6)
    assert np.isfinite(y).all()


def test_wrong_shapes_say_so():
    model, variables, x = make()
    with pytest.raises(ValueError, match=r"x must be \(batch, time, features = 6\)"):
        model.apply(variables, x[..., :5])
    with pytest.raises(ValueError, match=r"state must be \(batch, width - 1, features\) = \(2, 3, 6\)"):
        model.apply(variables, x, jnp.zeros((2, 4, 6)))


def test_initial_kernels_are_drawn_as_pytorch_does():
    kernel = np.asarray(ShortConvolution(500).init(jax.random.key(0), jnp.zeros((1, 1, 500)))["params"]["kernel"].value)
    np.testing.assert_allclose(np.abs(kernel).max(), 0.5, rtol=0.01)  # 1 / sqrt(width)

"""Convolutions against XLA's own, on every form that a platform may choose."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.convolution import Conv, average_pool, convolve

CASES = [  # image, kernel, stride, padding
    ((2, 7, 9, 6), (3, 3, 1, 6), 1, 1),  # depthwise
    ((2, 8, 7, 6), (5, 5, 1, 6), 2, 2),
    ((1, 14, 13, 4), (7, 7, 1, 4), 4, 3),
    ((2, 8, 11, 3), (3, 3, 3, 5), 2, 1),  # few channels
    ((2, 6, 7, 3), (3, 3, 3, 5), 1, 1),
    ((1, 9, 12, 3), (4, 4, 3, 5), 4, 0),
    ((1, 11, 12, 2), (3, 5, 2, 5), 3, 2),
    ((2, 5, 6, 4), (1, 1, 4, 3), 2, 0),  # pointwise
    ((2, 5, 6, 12), (3, 3, 12, 4), 1, 1),  # dense
    ((2, 5, 6, 12), (3, 3, 4, 6), 2, 1),  # grouped
]


def by_xla(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2], precision="highest",
    )  # fmt: skip


@pytest.mark.parametrize("image, kernel, stride, padding", CASES)
def test_value_and_gradients_are_those_of_a_convolution(image, kernel, stride, padding):
    x, kernel = jax.random.normal(jax.random.key(0), image), jax.random.normal(jax.random.key(1), kernel)

    def both(function):
        out, transpose = jax.vjp(function, x, kernel)
        return out, transpose(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    got = jax.jit(lambda: both(lambda x, kernel: convolve(x, kernel, stride=stride, padding=padding)))()
    expected = jax.jit(lambda: both(lambda x, kernel: by_xla(x, kernel, stride, padding)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), got, expected)


@pytest.mark.parametrize("image, kernel, stride, padding", [CASES[0], CASES[3]])
def test_the_platform_compiled_for_decides(image, kernel, stride, padding):
    shapes = (jax.ShapeDtypeStruct(image, "float32"), jax.ShapeDtypeStruct(kernel, "float32"))
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, stride=stride, padding=padding)).trace(*shapes)
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == (platform != "cpu"), platform


def test_depthwise_in_half_precision_sums_in_float32():
    x, kernel = jnp.ones((1, 9, 9, 2), jnp.bfloat16), jnp.full((7, 7, 1, 2), 1.0078125, jnp.bfloat16)
    out = convolve(x, kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 49 * 1.0078125, rtol=4e-3)


@pytest.mark.parametrize("size", [3, 5])
def test_pooling_does_not_count_what_is_outside(size):
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    expected = lambda x: nn.avg_pool(x, (size, size), padding="SAME", count_include_pad=False)  # noqa: E731
    np.testing.assert_allclose(average_pool(x, size), expected(x), atol=1e-6)
    gradient, other = (
        jax.grad(lambda x, f=f: jnp.vdot(f(x), weight))(x) for f in (lambda x: average_pool(x, size), expected)
    )
    np.testing.assert_allclose(gradient, other, atol=1e-5)


def test_a_convolution_of_size_1_takes_tokens_and_images():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    variables = nn.unbox(Conv(6).init(jax.random.key(1), x))
    assert variables["params"]["kernel"].shape == (5, 6)
    image, tokens = Conv(6).apply(variables, x), Conv(6).apply(variables, x.reshape(2, 12, 5))
    np.testing.assert_allclose(image.reshape(2, 12, 6), tokens, atol=1e-6)


def test_initial_values_are_pytorch_s():
    variables = nn.unbox(Conv(64, 3, groups=4).init(jax.random.key(0), jnp.zeros((1, 5, 5, 32))))
    for leaf in jax.tree.leaves(variables):
        bound = (3 * 3 * 8) ** -0.5
        assert 0.9 * bound < jnp.abs(leaf).max() <= bound and abs(leaf.mean()) < 0.3 * bound


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: convolve(jnp.zeros((1, 4, 4, 6)), jnp.zeros((3, 3, 4, 6))), "does not fit 6 channels"),
        (lambda: convolve(jnp.zeros((1, 2, 4, 3)), jnp.zeros((5, 5, 3, 6)), padding=1), "smaller than a kernel"),
        (lambda: convolve(jnp.zeros((4, 4, 6)), jnp.zeros((3, 3, 6, 6))), "expected .batch, height"),
        (lambda: average_pool(jnp.zeros((1, 4, 4, 6)), 2), "size must be odd, got 2"),
        (lambda: Conv(6, 3, groups=4).init(jax.random.key(0), jnp.zeros((1, 4, 4, 6))), "4 groups do not divide"),
    ],
)
def test_wrong_shapes_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Rotary, sinusoidal and learned positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.positions import resize_grid, sinusoid_grid, sinusoids
from zoo.layers.rotary import LinearScaling, Llama3Scaling, Rotary, rotate


def heads(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 5, 3, 8))


POSITIONS = jnp.array([[0, 1, 2, 3, 40], [7, 7, 8, 0, 1000]])


def as_complex(x, interleaved):
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    return x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved):
    rotary = Rotary(theta=100.0, interleaved=interleaved)
    frequencies = 100.0 ** (-np.arange(4) / 4)
    turn = np.exp(1j * np.asarray(POSITIONS)[:, :, None, None] * frequencies)
    actual = as_complex(rotate(heads(), POSITIONS, rotary), interleaved)
    np.testing.assert_allclose(actual, as_complex(heads(), interleaved) * turn, atol=1e-4)


def test_products_of_rotated_vectors_depend_on_distance_only():
    rotary = Rotary()
    query, key = heads(0)[:1, :1, :1], heads(1)[:1, :1, :1]

    def product(query_position, key_position):
        turned = rotate(query, jnp.array([[query_position]]), rotary), rotate(key, jnp.array([[key_position]]), rotary)
        return float((turned[0] * turned[1]).sum())

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-3)


def test_partial_rotation_leaves_the_other_features_alone():
    rotary = Rotary(features=4)
    turned = rotate(heads(), POSITIONS, rotary)
    np.testing.assert_array_equal(turned[..., 4:], heads()[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rotate(heads()[..., :4], POSITIONS, Rotary()), atol=1e-6)


def test_half_precision_is_rotated_in_float32():
    turned = rotate(heads().astype(jnp.bfloat16), POSITIONS, Rotary())
    expected = rotate(heads().astype(jnp.bfloat16).astype(jnp.float32), POSITIONS, Rotary())
    np.testing.assert_array_equal(turned, expected.astype(jnp.bfloat16))


def test_linear_scaling_divides_positions():
    scaled = rotate(heads(), 4 * POSITIONS, Rotary(scaling=LinearScaling(4.0)))
    np.testing.assert_allclose(scaled, rotate(heads(), POSITIONS, Rotary()), atol=2e-3)


def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_joins_them_smoothly():
    scaling = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192)
    plain = Rotary(theta=500_000.0).frequencies(128).astype(np.float64)
    scaled = Rotary(theta=500_000.0, scaling=scaling).frequencies(128)
    for frequency, result in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192 / 1:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert result == pytest.approx(expected, rel=1e-6)
    assert scaled[0] == plain[0] and scaled[-1] == pytest.approx(plain[-1] / 8, rel=1e-6)


@pytest.mark.parametrize("features", [0, 3, 10])
def test_wrong_rotary_features_are_refused(features):
    with pytest.raises(ValueError, match=f"even and in 2 .. head_dim = 8, got {features}"):
        rotate(heads(), POSITIONS, Rotary(features=features))


def test_sinusoids_are_those_of_the_formula():
    table = sinusoids(7, 6)
    assert (table.shape, table.dtype) == ((7, 6), np.float32)
    for t in range(7):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_grid_of_sinusoids_is_one_dimensional_along_each_axis():
    table = sinusoid_grid(3, 5, 8).reshape(3, 5, 8)
    line = sinusoids(5, 4)  # interleaved; the grid keeps sines and cosines apart
    for row in range(3):
        for column in range(5):
            expected = [*line[column, 0::2], *line[column, 1::2], *line[row, 0::2], *line[row, 1::2]]
            np.testing.assert_allclose(table[row, column], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("even number of features, got 5", lambda: sinusoids(3, 5)),
        ("multiple of 4 features, got 6", lambda: sinusoid_grid(3, 3, 6)),
    ],
)
def test_wrong_features_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_resizing_to_the_same_grid_is_the_identity():
    table = jax.random.normal(jax.random.key(0), (1, 12, 5))
    assert resize_grid(table, (3, 4), (3, 4)) is table


def test_resizing_keeps_constants_and_straight_lines():
    rows, columns = np.divmod(np.arange(8 * 8), 8)
    table = jnp.stack([jnp.ones(64), rows + 0.5, columns + 0.5], axis=-1)[None].astype(jnp.float32)
    resized = np.asarray(resize_grid(table, (8, 8), (16, 12))).reshape(16, 12, 3)
    np.testing.assert_allclose(resized[..., 0], 1.0, atol=1e-5)
    middle = resized[6:10, 5:7]  # far from the border
    np.testing.assert_allclose(middle[..., 1], np.broadcast_to(np.arange(6.5, 10)[:, None] / 2, (4, 2)), atol=1e-4)
    np.testing.assert_allclose(middle[..., 2], np.broadcast_to(np.arange(5.5, 7) * 8 / 12, (4, 2)), atol=1e-4)

"""Contextual attention: every implementation against the definition, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.contextual_attention import contextual_attention
from tests.kernels.compile import assert_compiles, gradient, shape


def arrays(time=37, width=12, heads=3, hidden=20, per_token=False, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, time, width), (heads, width, hidden), (2, time if per_token else 1, heads, hidden), (heads, hidden))
    return [jnp.asarray(rng.standard_normal(sizes), dtype) for sizes in shapes]


def mask(time):
    return jnp.arange(time)[None] >= jnp.array([[5], [time - 2]])  # padded on the left


def both(operands, implementation, valid):
    """Outputs and the gradients of a sum over them with fixed weights."""

    def total(*operands):
        pooled, weights = contextual_attention(*operands, valid=valid, temperature=0.7, implementation=implementation)
        value = jnp.sum(pooled * jnp.cos(jnp.arange(pooled.size)).reshape(pooled.shape))
        return value + jnp.sum(weights * jnp.sin(jnp.arange(weights.size)).reshape(weights.shape)), (pooled, weights)

    (_, outputs), slopes = jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True)(*operands)
    return outputs, slopes


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
@pytest.mark.parametrize("per_token, time, masked", [(False, 300, True), (True, 37, False), (False, 1, False)])
def test_implementations_equal_the_definition(implementation, per_token, time, masked):
    operands = arrays(time, per_token=per_token)
    valid = mask(time) if masked else None
    outputs, slopes = both(operands, implementation, valid)
    wanted, wanted_slopes = both(operands, "reference", valid)
    for got, want in zip(outputs, wanted, strict=True):
        assert np.abs(got - want).max() <= 1e-5 * max(float(np.std(want)), 1e-2)
    for got, want in zip(slopes, wanted_slopes, strict=True):
        assert np.abs(got - want).max() <= 1e-4 * max(float(np.std(want)), 1e-2)


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
def test_bfloat16(implementation):
    operands = arrays(dtype=jnp.bfloat16)
    got, _ = contextual_attention(*operands, implementation=implementation)
    want, _ = contextual_attention(*(x.astype(jnp.float32) for x in operands), implementation="reference")
    assert got.dtype == jnp.bfloat16
    assert np.abs(got.astype(jnp.float32) - want).max() <= 2e-2 * float(np.std(want)) + 4e-3 * float(np.abs(want).max())


@pytest.mark.parametrize("implementation", ["reference", "chunked", "tpu", "gpu"])
def test_masked_tokens_change_nothing_and_none_gives_zero(implementation):
    tokens, *rest = arrays(20)
    valid = jnp.stack([jnp.arange(20) >= 4, jnp.zeros(20, bool)])
    pooled, weights = contextual_attention(tokens, *rest, valid=valid, implementation=implementation)
    other, _ = contextual_attention(tokens.at[0, :4].add(9), *rest, valid=valid, implementation=implementation)
    np.testing.assert_allclose(pooled, other, rtol=1e-6)
    np.testing.assert_allclose(weights[0].sum(0), 1, rtol=1e-5)
    assert not pooled[1].any() and not weights[1].any()


def test_the_order_of_tokens_changes_nothing():
    tokens, *rest = arrays(20)
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(
        contextual_attention(tokens, *rest)[0], contextual_attention(tokens[:, order], *rest)[0], atol=1e-5
    )


@pytest.mark.parametrize(
    "index, replacement, message",
    [
        (0, jnp.ones((2, 3)), r"tokens must be \(batch, time, width\)"),
        (1, jnp.ones((3, 5, 20)), r"weight must be \(3, 12, 20\)"),
        (2, jnp.ones((2, 2, 3, 20)), "context must be"),
        (3, jnp.ones((3, 20), jnp.int32), "weight must be|score must be|floating"),
    ],
)
def test_wrong_arrays_are_refused(index, replacement, message):
    operands = arrays()
    operands[index] = replacement
    if index == 3:
        operands[0] = operands[0].astype(jnp.int32)
    with pytest.raises((ValueError, TypeError), match=message):
        contextual_attention(*operands)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_kernels_compile_at_the_published_size(target):
    def pooled(*operands):
        return contextual_attention(*operands)[0]

    for width in (16, 64):
        shapes = [shape(64, 560, width), shape(4, width, 64), shape(64, 1, 4, 64), shape(4, 64)]
        for dtype in (jnp.float32, jnp.bfloat16):
            typed = [jax.ShapeDtypeStruct(each.shape, dtype) for each in shapes]
            compiled = assert_compiles(pooled, typed, [target])[target]
            assert any(name.startswith("contextual_attention") for name in compiled.kernels), compiled.kernels
    assert_compiles(gradient(pooled), shapes, [target])

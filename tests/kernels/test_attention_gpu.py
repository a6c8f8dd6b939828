"""The GPU kernels, interpreted, against the definition. That they compile for a GPU is test_attention_compile's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels.attention import attention
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case, assert_equals_reference

# Float32 tiles are 32 x 32, bfloat16 ones up to 128 x 64: each case has several tiles, cut at the edges.
CASES = {
    "causal": Case(batch=1, queries=80, keys=80, causal=True, bias=(False, True, True, True)),
    "window": Case(batch=1, queries=90, keys=150, causal=True, window=9, sinks=True, logit_softcap=1.5),
    "prefix": Case(queries=90, keys=70, causal=True, prefix=True, lengths=True, bias=(True, False, False, True)),
    "segments": Case(
        batch=1, queries=90, keys=70, heads=3, key_heads=1, segments=True, bias=(False, True, True, False)
    ),
    "positions": Case(batch=1, queries=70, keys=90, causal=True, window=(6, None), positions=True, dropout_rate=0.3),
    "bfloat16": Case(batch=1, queries=150, keys=150, width=20, value_width=40, dtype="bfloat16", causal=True),
    "bias shared by all": Case(heads=2, queries=40, keys=40, bias=(False, False, False, False)),
    "one token": Case(queries=1, keys=300, causal=True, positions=True, lengths=True, sinks=True),
    "few tokens": Case(queries=3, keys=200, bias=(True, True, True, True), dropout_rate=0.2, segments=True),
    "few tokens, shared bias": Case(queries=3, keys=100, bias=(False, False, True, True), logit_softcap=1.5),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name):
    assert_equals_reference(CASES[name], "gpu")


@settings(max_examples=4)
@given(attention_cases.cases())
def test_kernel_equals_reference_in_drawn_cases(case):
    assert_equals_reference(case, "gpu")


@pytest.mark.parametrize("queries", [8, 100])
def test_excluded_keys_are_never_loaded(queries):
    # A key that is loaded and then masked would spread its NaN: 0 x NaN is NaN.
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, n, 2, 16)), jnp.float32) for n in (queries, 256, 256))
    poisoned = [jnp.where(jnp.arange(256)[None, :, None, None] < 128, x, jnp.nan) for x in (key, value)]

    @jax.jit
    def gradients(key, value):
        return jax.value_and_grad(lambda *a: attention(*a, causal=True, implementation="gpu").sum(), argnums=(0, 1, 2))(
            query, key, value
        )

    got, expected = gradients(*poisoned), gradients(key, value)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_widths_beyond_the_tiles_are_the_chunked_form():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((1, 9, 1, 513)), jnp.float32) for _ in range(3))

    def gradients(implementation):
        return jax.grad(lambda *a: jnp.square(attention(*a, implementation=implementation)).sum(), argnums=(0, 1, 2))(
            query, key, value
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients("gpu"), gradients("reference"))


def test_odd_dtypes_are_computed_in_float32():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, 20, 2, 16)), jnp.float8_e4m3fn) for _ in range(3)]
    out = attention(*arrays, implementation="gpu")
    expected = attention(*(array.astype(jnp.float32) for array in arrays), implementation="reference")
    assert out.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-4, atol=2**-9)

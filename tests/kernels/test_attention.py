"""Softmax attention: the reference against its mathematics, the chunked form against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from kernels import attention as eager_attention
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case, assert_close

IMPLEMENTATIONS = ("reference", "chunked")
STATIC = ("causal", "window", "scale", "logit_softcap", "dropout_rate", "return_logsumexp", "implementation")
attention = jax.jit(eager_attention, static_argnames=STATIC)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(queries: int, keys: int, heads: int = 4, key_heads: int = 2, width: int = 16) -> tuple[jax.Array, ...]:
    return (
        random(2, queries, heads, width, seed=1),
        random(2, keys, key_heads, width, seed=2),
        random(2, keys, key_heads, width, seed=3),
    )


@given(attention_cases.cases())
def test_chunked_equals_reference(case: Case):
    attention_cases.assert_equals_reference(case, "chunked")


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, queries=1100, keys=1100, causal=True),  # several spans, the last one shorter
        Case(batch=1, queries=700, keys=1300, causal=True, window=(90, None)),  # ranges that slide
        Case(batch=9, queries=1, keys=5),  # steps of more sequences than are compiled apart
        Case(batch=1, queries=700, keys=300, window=(None, 20), sinks=True),  # rows that see no key
        Case(batch=1, queries=1300, keys=700, window=40, bias=(False, True, True, True), dropout_rate=0.1),
        Case(batch=1, queries=2500, keys=2500, heads=2, key_heads=1, causal=True, dtype="bfloat16"),
    ],
)
def test_blocks_of_queries_make_no_difference(case: Case):
    attention_cases.assert_equals_reference(case, "chunked")


def test_reference_equals_jax_nn():
    query, key, value = inputs(20, 20)
    expected = jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(6, 0))
    assert_close(attention(query, key, value, causal=True, window=6, implementation="reference"), expected, 1e-5, "out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_rows_are_zero_and_have_no_gradient(implementation):
    query, key, value = inputs(5, 9)

    def loss(query, key, value):
        out, logsumexp = attention(
            query, key, value, key_lengths=jnp.array([0, 3]), return_logsumexp=True, implementation=implementation
        )
        return jnp.sum(out**2), (out, logsumexp)

    gradients, (out, logsumexp) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    assert not out[0].any() and np.isneginf(logsumexp[0]).all() and np.isfinite(logsumexp[1]).all()
    for gradient in gradients:
        assert not gradient[0].any() and np.isfinite(gradient[1]).all()
    assert not gradients[1][1, 3:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_of_minus_infinity_is_a_mask(implementation):
    query, key, value = inputs(6, 8)
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (1, 1, 6, 8)).at[..., 2, :].set(False)

    def loss(query, bias):
        return jnp.sum(attention(query, key, value, bias=bias, implementation=implementation) ** 2)

    d_query, d_bias = jax.jit(jax.grad(loss, (0, 1)))(query, jnp.where(mask, 0.0, -jnp.inf))
    assert np.isfinite(d_query).all() and np.isfinite(d_bias).all()
    assert not d_query[:, 2].any() and not d_bias[~mask].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_logsumexp_is_the_softmax_of_the_logits(implementation):
    query, key, value = inputs(7, 11)
    bias = random(2, 4, 7, 11, seed=4)

    def total(bias):
        call = attention(query, key, value, bias=bias, return_logsumexp=True, implementation=implementation)
        return call[1].sum()

    logits = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, 2, axis=2)) / 4 + bias
    assert_close(jax.grad(total)(bias), jax.nn.softmax(logits), 1e-5, "softmax")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logsumexp_joins_two_halves_of_the_keys(implementation):
    query, key, value = inputs(7, 12)

    def of(part: slice):
        return attention(query, key[:, part], value[:, part], return_logsumexp=True, implementation=implementation)

    (whole, total), (left, left_sum), (right, right_sum) = of(slice(None)), of(slice(0, 5)), of(slice(5, None))
    assert_close(jnp.logaddexp(left_sum, right_sum), total, 1e-5, "logsumexp")
    share = jnp.exp(left_sum - total).swapaxes(1, 2)[..., None]
    assert_close(share * left + (1 - share) * right, whole, 1e-5, "out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_permuting_keys_changes_nothing(implementation):
    query, key, value = inputs(21, 33)
    order = jax.random.permutation(jax.random.key(5), 33)
    positions = jnp.arange(33)[None]
    expected = attention(query, key, value, causal=True, window=9, implementation=implementation)
    permuted = attention(
        query, key[:, order], value[:, order], key_positions=positions[:, order],
        causal=True, window=9, implementation=implementation,
    )  # fmt: skip
    assert_close(permuted, expected, 1e-5, "out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_ahead_does_not_matter_when_causal(implementation):
    query, key, value = inputs(600, 600)
    for seen in (1, 255, 256, 400):
        changed = key.at[:, seen:].add(1.0), value.at[:, seen:].multiply(-2.0)
        before = attention(query, key, value, causal=True, implementation=implementation)
        after = attention(query, *changed, causal=True, implementation=implementation)
        np.testing.assert_array_equal(before[:, :seen], after[:, :seen])
        assert (before[:, seen:] != after[:, seen:]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoding_a_token_equals_the_last_row(implementation):
    query, key, value = inputs(40, 40)
    full = attention(query, key, value, causal=True, implementation=implementation)
    spare = [(0, 0), (0, 24), (0, 0), (0, 0)]  # a cache longer than what it holds
    one = attention(
        query[:, -1:], jnp.pad(key, spare, constant_values=7.0), jnp.pad(value, spare, constant_values=7.0),
        key_lengths=jnp.array([40, 40]), implementation=implementation,
    )  # fmt: skip
    assert_close(one, full[:, -1:], 1e-5, "out")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefix_is_seen_by_every_query(implementation):
    query, key, value = inputs(9, 9)
    prefix = jnp.array([4, 0])
    out = attention(query, key, value, causal=True, prefix_lengths=prefix, implementation=implementation)
    full = attention(query[:, :4], key[:, :4], value[:, :4], implementation=implementation)
    causal = attention(query, key, value, causal=True, implementation=implementation)
    assert_close(out[0, :4], full[0], 1e-5, "within the prefix")
    assert_close(out[0, 4:], causal[0, 4:], 1e-5, "after the prefix")
    assert_close(out[1], causal[1], 1e-5, "without a prefix")


def test_dropout_keeps_the_expected_share():
    query, key, value = inputs(64, 64)
    out = attention(
        query, key, jnp.ones_like(value), dropout_rate=0.3, dropout_rng=jax.random.key(0), implementation="reference"
    )
    assert abs(float(out.mean()) - 1) < 0.01  # inverted dropout is unbiased
    assert float(out.std()) > 0.01


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window": 128}], ids=str)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["forward", "backward"])
def test_memory_is_linear_in_the_length(options, with_gradients):
    def call(query, key, value):
        return attention(query, key, value, implementation="chunked", **options).sum()

    def temporary_bytes(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        function = jax.grad(call, (0, 1, 2)) if with_gradients else call
        return jax.jit(function).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    sizes = {length: temporary_bytes(length) for length in (1024, 4096, 16384, 65536)}
    # Linear, from a tile's fixed size upward: 4 times the length is at most 4 times the memory.
    for length in (1024, 4096, 16384):
        assert sizes[4 * length] <= 4.2 * sizes[length], sizes
    assert sizes[65536] < 65536**2 / 16, sizes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.ones((2, 5, 3, 16))}, ValueError, "multiple of key/value heads"),
        ({"query": jnp.ones((5, 4, 16))}, ValueError, "query must be"),
        ({"query": jnp.ones((2, 5, 4, 16), jnp.int32)}, TypeError, "floating point"),
        ({"key": jnp.ones((2, 9, 2, 8))}, ValueError, "same width"),
        ({"value": jnp.ones((2, 8, 2, 16))}, ValueError, "same length"),
        ({"key": jnp.ones((2, 9, 2, 16), jnp.bfloat16)}, TypeError, "share a dtype"),
        ({"bias": jnp.ones((2, 4, 5, 8))}, ValueError, "bias must broadcast"),
        ({"bias": jnp.ones((1, 1, 5, 9), bool)}, TypeError, "bias must be floating point"),
        ({"sinks": jnp.ones(3)}, ValueError, "sinks must have shape"),
        ({"key_lengths": jnp.ones(2)}, TypeError, "key_lengths must be integers"),
        ({"query_segment_ids": jnp.ones((2, 5), jnp.int32)}, ValueError, "given together"),
        ({"prefix_lengths": jnp.ones(2, jnp.int32)}, ValueError, "causal=True"),
        ({"window": -1}, ValueError, "window sides"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap"),
        ({"dropout_rate": 1.0}, ValueError, "dropout_rate"),
        ({"dropout_rate": 0.5}, ValueError, "dropout needs dropout_rng"),
        ({"implementation": "fast"}, ValueError, "implementation must be"),
    ],
)
def test_wrong_calls_say_what_was_expected(change, error, message):
    query, key, value = inputs(5, 9)
    with pytest.raises(error, match=message):
        eager_attention(**({"query": query, "key": key, "value": value} | change))

"""The rules of learning against their definition, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.mixers.learning_rules import RULES, empty_memory, learning_rule

BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM = 2, 21, 2, 8, 6


def token_by_token(rule, query, key, value, beta, gamma, state, trace_decay=0.8, threshold_rate=0.2):
    """The table of `learning_rule`, as it is written there."""

    def step(carry, token):
        memory, average, trace = carry  # S (dv, dk), a (dv,), e (dk,)
        q, k, v, b, g = token
        if rule in ("hebb_decay", "gated_delta", "gated_oja"):
            memory = g * memory
        if rule in ("hebb", "hebb_decay"):
            memory = memory + b * jnp.outer(v, k)
        elif rule in ("delta", "gated_delta"):
            memory = memory + b * jnp.outer(v - memory @ k, k)
        elif rule in ("oja", "gated_oja"):
            memory = memory + b * jnp.outer(v, k - memory.T @ v)
        elif rule == "bcm":
            memory = memory + b * jnp.outer(v * (v - average), k)
            average = (1 - threshold_rate) * average + threshold_rate * v**2
        elif rule == "trace":
            trace = trace_decay * trace + k
            memory = memory + b * jnp.outer(v, trace)
        return (memory, average, trace), memory @ q

    def sequence(memory, average, trace, *tokens):
        carry, y = jax.lax.scan(step, (memory.T, average, trace), tokens)
        return y, carry[0].T, carry[1], carry[2]

    over_heads = jax.vmap(sequence, in_axes=(0, 0, 0, 1, 1, 1, 1, 1), out_axes=(1, 0, 0, 0))
    y, *final = jax.vmap(over_heads)(*state, query, key, value, beta, gamma)
    return y, type(state)(*final)


def operands(seed=0):
    rngs = jax.random.split(jax.random.key(seed), 8)
    query, key = (jax.random.normal(rng, (BATCH, TIME, HEADS, KEY_DIM)) for rng in rngs[:2])
    query, key = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    value = jax.random.normal(rngs[2], (BATCH, TIME, HEADS, VALUE_DIM)) * VALUE_DIM**-0.5
    beta = jax.random.uniform(rngs[3], (BATCH, TIME, HEADS))
    gamma = jax.random.uniform(rngs[4], (BATCH, TIME, HEADS), minval=0.5)
    empty = empty_memory(BATCH, HEADS, KEY_DIM, VALUE_DIM)
    state = type(empty)(*(jax.random.normal(rng, part.shape) for rng, part in zip(rngs[5:], empty, strict=True)))
    return query, key, value, beta, gamma, state


@pytest.mark.parametrize("rule", RULES)
def test_parallel_form_and_gradients_are_the_recurrence(rule):
    arguments = operands()

    def weighted(function):
        def total(arguments):
            y, state = function(rule, *arguments)
            weights = jax.random.normal(jax.random.key(1), y.shape)
            return jnp.sum(weights * y) + sum(jnp.sum(jnp.sin(part)) for part in state), (y, state)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(arguments)

    (_, ours), gradients = weighted(learning_rule)
    (_, definition), expected = weighted(token_by_token)
    for mine, theirs, bound in ((ours, definition, 1e-5), (gradients, expected, 1e-4)):
        for got, want in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=bound * float(jnp.sqrt(jnp.mean(want**2))) + 1e-12)


@pytest.mark.parametrize("rule", ["oja", "bcm", "trace"])
def test_bfloat16_keeps_its_state_in_float32(rule):
    *arrays, state = operands()
    y, exact = learning_rule(rule, *arrays, state)
    low = [x.astype(jnp.bfloat16) for x in arrays]
    y_low, rounded = learning_rule(rule, *low, state)
    assert y_low.dtype == jnp.bfloat16 and {part.dtype for part in rounded} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y_low.astype(jnp.float32), y, atol=5e-2 * float(jnp.std(y)) + 1e-2)
    np.testing.assert_allclose(rounded.memory, exact.memory, atol=5e-2 * float(jnp.std(exact.memory)))


def test_wrong_rules_and_missing_retention_say_so():
    query, key, value, beta, _, _ = operands()
    with pytest.raises(ValueError, match="unknown learning rule 'hebbian'"):
        learning_rule("hebbian", query, key, value, beta)
    with pytest.raises(ValueError, match=r"'gated_delta' needs gamma \(batch, time, heads\) = \(2, 21, 2\)"):
        learning_rule("gated_delta", query, key, value, beta)

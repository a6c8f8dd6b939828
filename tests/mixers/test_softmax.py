"""Softmax attention against its definition, written out here once more with whole matrices, and its cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mixers.cases import CASES, FEATURES, LENGTH
from tests.mixers.test_common import assert_close, parallel, parameters, tokens
from zoo import mixers
from zoo.layers.rotary import Rotary, rotate

softmax_cases = pytest.mark.parametrize("case", [c for c in CASES if c.mixer == "softmax"], ids=str)


def attention_by_definition(variables, x, model):
    """One query head after the other, one row of logits after the other."""
    weights = variables["params"]

    def project(name, heads):
        y = x @ weights[name]["kernel"] + weights[name].get("bias", 0.0)
        return y.reshape(*x.shape[:2], heads, -1)

    key_heads = model.key_heads or model.heads
    query, key, value = project("query", model.heads), project("key", key_heads), project("value", key_heads)
    if model.qk_norm == "rms":
        query, key = (
            y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + model.qk_norm_epsilon) * weights[name]["scale"]
            for y, name in ((query, "query_norm"), (key, "key_norm"))
        )
    if model.rotary is not None:
        positions = jnp.arange(x.shape[1])[None]
        query, key = rotate(query, positions, model.rotary), rotate(key, positions, model.rotary)
    scale = model.scale or query.shape[-1] ** -0.5
    distance = np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1]))
    visible = distance >= 0 if model.causal else np.ones_like(distance, bool)
    if model.window is not None:
        visible &= np.abs(distance) < model.window
    outputs = []
    for head in range(model.heads):
        shared = head // (model.heads // key_heads)
        logits = scale * query[:, :, head] @ key[:, :, shared].swapaxes(1, 2)
        if model.softcap is not None:
            logits = model.softcap * jnp.tanh(logits / model.softcap)
        weight = jnp.where(visible, jnp.exp(logits), 0.0)
        denominator = weight.sum(axis=-1, keepdims=True)
        if model.sinks:
            denominator += jnp.exp(weights["sinks"][head])
        outputs.append(weight / denominator @ value[:, :, shared])
    return jnp.concatenate(outputs, axis=-1) @ weights["out"]["kernel"] + weights["out"].get("bias", 0.0)


@softmax_cases
@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(case, causal):
    model = mixers.create("softmax", features=FEATURES, causal=causal, **case.options)
    y = parallel(case, tokens()) if causal else parallel(case, tokens(), causal=False)
    assert_close(y, attention_by_definition(parameters(case), tokens(), model))


def test_a_window_counts_the_token_itself():
    model = mixers.create("softmax", features=FEATURES, heads=2, window=1)
    x = tokens()
    variables = nn.meta.unbox(model.init(jax.random.key(0), x))
    weights = variables["params"]
    assert_close(model.apply(variables, x)[0], x @ weights["value"]["kernel"] @ weights["out"]["kernel"])


def test_a_windowed_cache_is_a_ring_of_the_windows_size():
    model = mixers.create("softmax", features=FEATURES, heads=4, key_heads=2, window=5)
    assert model.init_state(3, 100).key.shape == (3, 5, 2, 4)
    assert model.init_state(3, 4).key.shape == (3, 4, 2, 4)


def test_a_cache_is_kept_in_the_computations_dtype():
    model = mixers.create("softmax", features=FEATURES, heads=4, dtype=jnp.bfloat16)
    assert model.init_state(1, 2).key.dtype == jnp.bfloat16


def test_padding_needs_no_slots():
    model = mixers.create("softmax", features=FEATURES, heads=4)
    x = tokens()
    variables = model.init(jax.random.key(0), x)
    state = model.init_state(2, 10)
    for start in (0, 6):  # 12 tokens, 9 of them valid
        valid = jnp.array([[False, True, True, True, start == 0, True]] * 2)
        _, state = model.apply(variables, x[:, start : start + 6], state, valid=valid)
    np.testing.assert_array_equal(state.length, 9)


def test_overfilling_a_cache_is_an_error_where_it_is_known():
    model = mixers.create("softmax", features=FEATURES, heads=4)
    x = tokens()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="holds 5 tokens, so a call takes at most as many, got 12"):
        jax.jit(model.apply)(variables, x, model.init_state(2, 5))
    _, state = model.apply(variables, x[:, :4], model.init_state(2, 5))
    with pytest.raises(ValueError, match="holds 5 tokens; with these there are 6"):
        model.apply(variables, x[:, 4:6], state)


def test_dropout_needs_a_key_and_changes_with_it():
    model = mixers.create("softmax", features=FEATURES, heads=4, dropout=0.5)
    x = tokens()
    variables = model.init(jax.random.key(0), x)

    def apply(seed):
        return model.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})[0]

    np.testing.assert_array_equal(apply(0), apply(0))
    assert float(jnp.abs(apply(0) - apply(1)).max()) > 1e-3
    assert_close(model.apply(variables, x)[0], model.clone(dropout=0.0).apply(variables, x)[0])


def test_interception_reads_projections_and_replaces_heads():
    model = mixers.create("softmax", features=FEATURES, heads=4)
    x = tokens()
    variables = model.init(jax.random.key(0), x)
    seen = {}

    def read(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        seen[f"{context.module.name}.{context.method_name}"] = y
        if context.method_name == "attend":
            return y.at[:, :, 1].set(0.0)
        return y

    with nn.intercept_methods(read):
        y, _ = model.apply(variables, x)
    assert {"query.__call__", "key.__call__", "value.__call__", "None.attend", "out.__call__"} <= set(seen)
    weights = nn.meta.unbox(variables)["params"]["out"]["kernel"].at[4:8].set(0.0)
    assert_close(y, seen["None.attend"].reshape(2, LENGTH, FEATURES) @ weights)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"features \(16\) must be a multiple of heads \(3\)", {"heads": 3}),
        (r"heads \(4\) must be a multiple of key_heads \(3\)", {"heads": 4, "key_heads": 3}),
        ("window must be None or positive, got 0", {"heads": 4, "window": 0}),
        ("rotary features must be even and in 2 .. head_dim = 4, got 6", {"heads": 4, "rotary": Rotary(features=6)}),
    ],
)
def test_wrong_options_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        mixers.create("softmax", features=FEATURES, **options)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_an_empty_state_is_refused(batch, length):
    with pytest.raises(ValueError, match="positive batch size and length"):
        mixers.create("softmax", features=FEATURES, heads=4).init_state(batch, length)

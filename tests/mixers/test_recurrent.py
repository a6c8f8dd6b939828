"""Recurrent mixers against their equations, written out here once more in numpy, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mixers.cases import CASES, FEATURES, LENGTH
from tests.mixers.test_common import assert_close, parallel, parameters, tokens
from zoo import mixers


def case_of(mixer, label="plain"):
    return next(case for case in CASES if (case.mixer, case.label) == (mixer, label))


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, epsilon=1e-5):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


class Weights:
    """A case's parameters in float64, and its input."""

    def __init__(self, case):
        self.x = np.asarray(tokens(), np.float64)
        self.model = mixers.create(case.mixer, features=FEATURES, **case.options)
        self.params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(parameters(case)["params"]))

    def project(self, name, x=None):
        x = self.x if x is None else x
        return x @ self.params[name]["kernel"] + self.params[name].get("bias", 0.0)

    def heads(self, name):
        return self.split(self.project(name))

    def split(self, x):
        return x.reshape(*x.shape[:2], self.model.heads, -1)

    def convolve(self, name, x):
        kernel = self.params[name]["kernel"]
        past = np.concatenate([np.zeros((len(x), len(kernel) - 1, x.shape[-1])), x], axis=1)
        y = sum(past[:, tap : tap + x.shape[1]] * kernel[tap] for tap in range(len(kernel)))
        return y + self.params[name].get("bias", 0.0)

    def out(self, y):
        return self.project("out", y.reshape(*y.shape[:2], -1))


def recurrence(query, key, value, update):
    """o_t = S_t^T q_t, with S_t = update(S, t) of each sequence and head."""
    out = np.zeros(value.shape)
    for row in range(value.shape[0]):
        for head in range(value.shape[2]):
            state = np.zeros((query.shape[-1], value.shape[-1]))
            for t in range(value.shape[1]):
                at = (row, t, head)
                state = update(state, key[at], value[at], at)
                out[at] = query[at] @ state
    return out


def test_taylor_attention():
    case = case_of("based")
    w = Weights(case)
    query, key, value = w.heads("query"), w.heads("key"), w.heads("value")
    s = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
    a = np.tril(1 + s + s**2 / 2)
    y = np.einsum("bhts,bshe->bthe", a / a.sum(-1, keepdims=True), value)
    assert_close(parallel(case, tokens()), w.out(y))
    whole = 1 + s + s**2 / 2
    y = np.einsum("bhts,bshe->bthe", whole / whole.sum(-1, keepdims=True), value)
    assert_close(parallel(case, tokens(), causal=False), w.out(y))


@pytest.mark.parametrize("feature_map", ["identity", "elu", "relu", "square", "performer", "cosformer", "taylor"])
def test_feature_maps_stand_for_their_kernels(feature_map):
    """Of two tokens, the second's output is that of the weights a_ts, whatever the state's form."""
    normalize = feature_map not in ("identity", "square")
    model = mixers.create(
        "linear_attention", features=4, heads=1, feature_map=feature_map, normalize=normalize, max_length=8, epsilon=0.0
    )
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 2, 4)).astype(np.float32)
    identity = {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value", "out")}
    y, _ = jax.jit(model.apply)({"params": identity}, x)
    (k, q), root = x[0].astype(np.float64), 2.0

    def weight(q, k, distance):
        s = q @ k / root
        if feature_map == "performer":
            rows = mixers.linear_attention._orthogonal_rows(4).astype(np.float64)
            phi = [np.exp(rows @ (z / root**0.5) - (z / root**0.5) @ (z / root**0.5) / 2) for z in (q, k)]
            return phi[0] @ phi[1]
        cosine = np.cos(np.pi / 2 * distance / 8)
        return {
            "identity": s,
            "elu": np.where(q > 0, q + 1, np.exp(q)) @ np.where(k > 0, k + 1, np.exp(k)),
            "relu": np.maximum(q, 0) @ np.maximum(k, 0),
            "square": 1 + s + np.sum(q**2 * k**2) / (2 * root**2),
            "cosformer": np.maximum(q, 0) @ np.maximum(k, 0) * cosine,
            "taylor": 1 + s + s**2 / 2,
        }[feature_map]

    first, second = weight(q, k, 1), weight(q, q, 0)
    divisor = first + second if normalize else 1.0
    np.testing.assert_allclose(y[0, 1], (first * k + second * q) / divisor, rtol=2e-5)


def test_performer_features_estimate_the_softmax_kernel():
    rows = mixers.linear_attention._orthogonal_rows(64)
    np.testing.assert_allclose((rows @ rows.T)[~np.eye(64, dtype=bool)], 0, atol=1e-4)
    assert abs(np.mean(rows**2) - 1) < 0.1


def test_retention():
    case = case_of("retnet")
    w = Weights(case)
    query, key, value = w.heads("query"), w.heads("key"), w.heads("value")
    width = query.shape[-1]
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 2)
    rotation = np.exp(1j * np.arange(LENGTH)[:, None, None] * frequencies)
    turned = [(array[..., 0::2] + 1j * array[..., 1::2]) * rotation for array in (query, key)]
    scores = np.einsum("bthd,bshd->bhts", turned[0], turned[1].conj()).real / np.sqrt(width)
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    for head in range(2):
        scores[:, head] *= np.where(distance >= 0, (1 - 2.0 ** (-5 - head)) ** np.maximum(distance, 0), 0)
    out = np.einsum("bhts,bshe->bthe", scores, value)
    assert_close(parallel(case, tokens()), w.out(rms(out, 1e-6) * silu(w.heads("gate"))))


def test_gated_linear_attention():
    case = case_of("gla")
    w = Weights(case)
    query, key, value = w.heads("query"), w.heads("key"), w.heads("value")
    alpha = w.split(sigmoid(w.project("forget_up", w.project("forget_down"))) ** (1 / 2.0))
    out = recurrence(
        query / np.sqrt(query.shape[-1]), key, value, lambda s, k, v, at: alpha[at][:, None] * s + np.outer(k, v)
    )
    scale = w.params["norm"]["norm"]["scale"]
    assert_close(parallel(case, tokens()), w.out(rms(out) * scale * silu(w.heads("gate"))))


def test_state_space_duality():
    case = case_of("ssd")
    w = Weights(case)
    channels = silu(w.convolve("convolution", w.project("channels")))
    inner, b, c = np.split(channels, [32, 40], axis=-1)
    inner = w.split(inner)
    b, c = (np.repeat(array[:, :, None], 4, axis=2) for array in (b, c))
    step = softplus(w.project("step") + w.params["step_bias"])
    decay = np.exp(-np.exp(w.params["log_rate"]) * step)
    out = recurrence(c, b, inner, lambda s, k, v, at: decay[at] * s + step[at] * np.outer(k, v))
    out = (out + w.params["skip"][:, None] * inner).reshape(2, LENGTH, -1) * silu(w.project("gate"))
    assert_close(parallel(case, tokens()), w.out(rms(out) * w.params["norm"]["norm"]["scale"]))


@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltanet"])
def test_delta_rule(mixer):
    case = case_of(mixer)
    w = Weights(case)
    query, key, value = (
        w.split(silu(w.convolve(f"{name}_convolution", w.project(name)))) for name in ("query", "key", "value")
    )
    query, key = (array / np.sqrt(np.sum(array**2, axis=-1, keepdims=True) + 1e-6) for array in (query, key))
    beta = sigmoid(w.project("beta"))
    decay = np.ones(beta.shape)
    if mixer == "gated_deltanet":
        decay = np.exp(-np.exp(w.params["log_rate"]) * softplus(w.project("step") + w.params["step_bias"]))

    def update(state, k, v, at):
        state = decay[at] * state
        return state + beta[at] * np.outer(k, v - k @ state)

    out = rms(recurrence(query / np.sqrt(query.shape[-1]), key, value, update))
    if mixer == "gated_deltanet":
        out = out * w.params["norm"]["norm"]["scale"] * silu(w.heads("gate"))
    else:
        out = out * w.params["norm"]["scale"]
    assert_close(parallel(case, tokens()), w.out(out))


def test_convolutions():
    w = Weights(case_of("gated_convolution"))
    y = silu(w.convolve("convolution", w.project("in"))) * w.project("gate")
    assert_close(parallel(case_of("gated_convolution"), tokens()), w.out(y))
    w = Weights(case_of("base_convolution"))
    y = w.convolve("convolution", w.x) * w.project("projection") + w.x
    assert_close(parallel(case_of("base_convolution"), tokens()), y)


def test_states_are_as_long_as_no_sequence():
    caches = ("softmax", "momentum", "sparse_topl", "fixed_map")
    for case in CASES:
        model = mixers.create(case.mixer, features=FEATURES, **case.options)
        grows = mixers.state_bytes(model, 16) > mixers.state_bytes(model, 8)
        assert grows == (case.mixer in caches and getattr(model, "window", None) is None), case
    # One head of 8 features a key, 16 values: S, z (float32) and a length.
    model = mixers.create("based", features=16, heads=1, feature_dim=8)
    assert mixers.state_bytes(model, 5) == 4 * (45 * 17 + 1)


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("linear_attention", {"feature_map": "tailor"}, "unknown feature map 'tailor'; did you mean 'taylor'"),
        ("linear_attention", {"heads": 3}, r"features \(16\) must be a multiple of heads \(3\)"),
        ("retnet", {"heads": 16}, "the width of a head's keys must be even, got 1"),
        ("gla", {"heads": 3}, r"features \* expand_key \(8\) must be a multiple of heads \(3\)"),
        ("ssd", {"heads": 4, "groups": 3}, r"heads \(4\) must be a multiple of groups \(3\)"),
        ("gated_deltanet", {"heads": 8}, r"features \* expand_key \(12\) must be a multiple of heads \(8\)"),
    ],
)
def test_wrong_options_are_refused(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.create(mixer, features=FEATURES, **options)


def test_empty_states_are_refused():
    for mixer in ("based", "deltanet", "ssd", "gated_convolution"):
        with pytest.raises(ValueError, match="positive batch size"):
            mixers.create(mixer, features=FEATURES).init_state(0, 4)


def test_a_decay_starts_where_it_is_published_to():
    model = mixers.create("ssd", features=16, heads=8, state_size=4)
    params = jax.jit(model.init)(jax.random.key(0), tokens())["params"]
    step = jax.nn.softplus(params["step_bias"].unbox())
    assert float(step.min()) >= 9e-4 and float(step.max()) <= 0.101
    rate = jnp.exp(params["log_rate"].unbox())
    assert float(rate.min()) >= 1 and float(rate.max()) <= 16

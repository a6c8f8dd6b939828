import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.papers import cloudformer
from zoo.papers.cloudformer import CloudFormer, CloudFormerConfig, pack_lengths, segment_mean

SMALL = CloudFormerConfig(
    features=5, d_model=8, heads=2, ff=12, temporal_layers=1, system_layers=1, segments=4, hidden=6, seconds=12
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((4, 12, 5)).astype(np.float32)
LENGTH = np.array([12, 3, 7, 5], np.int32)


@pytest.fixture(scope="module")
def network():
    model = CloudFormer(SMALL)
    variables = random_parameters(model, X, LENGTH)
    return model, variables, jax.jit(model.apply)


@pytest.mark.parametrize("length, segments", [(7, 3), (3, 5), (12, 12), (1, 4)])
def test_segments_are_means_of_their_steps(length, segments):
    found = segment_mean(jnp.asarray(X[:1]), jnp.array([length]), segments)[0]
    for s in range(segments):
        part = X[0, s * length // segments : -(-(s + 1) * length // segments)]
        np.testing.assert_allclose(found[s], part.mean(0), atol=1e-6)


def test_padding_changes_nothing_even_where_it_is_nan(network):
    _, variables, apply = network
    spoilt = X.copy()
    spoilt[np.arange(12) >= LENGTH[:, None]] = np.nan
    clean, other = apply(variables, X, LENGTH), apply(variables, spoilt, LENGTH)
    for name in clean:
        np.testing.assert_array_equal(clean[name], other[name])
    alone = jax.jit(CloudFormer(SMALL).apply)(variables, X[1:2, :3], LENGTH[1:2])
    np.testing.assert_allclose(alone["performance"], clean["performance"][1:2], atol=1e-6)


def test_packing_changes_nothing(network):
    _, variables, apply = network
    packing = pack_lengths(LENGTH, 12, rows=4)
    assert (packing.sample[3] == -1).all()  # 12, 7 + 5 and 3 fill three rows
    want = apply(variables, X, LENGTH)
    for name, value in apply(variables, X, LENGTH, packing).items():
        np.testing.assert_allclose(value, want[name], atol=1e-5)
    with pytest.raises(ValueError, match="4 series of 27 steps need 3 rows, got 2"):
        pack_lengths(LENGTH, 12, rows=2)
    with pytest.raises(ValueError, match=r"lengths must be in 1 \.\. capacity = 4"):
        pack_lengths(LENGTH, 4)


def test_a_stream_sees_its_last_seconds(network):
    model, variables, apply = network
    stream = cloudformer.predict_stream(model, variables, X[0], 4, at_once=5)
    assert stream.shape == (12,)
    seconds = np.array([0, 2, 7, 11])
    windows = np.zeros_like(X)
    for row, second in zip(windows, seconds, strict=True):
        part = X[0, max(second - 3, 0) : second + 1]
        row[: len(part)] = part
    want = apply(variables, windows, np.minimum(seconds + 1, 4).astype(np.int32))["performance"]
    np.testing.assert_allclose(stream[seconds], want, atol=1e-5)
    with pytest.raises(ValueError, match="a positive window"):
        cloudformer.predict_stream(model, variables, X[0], 0)


def test_explanations_add_up(network):
    model, variables, apply = network
    found = cloudformer.explain(model, variables, X, LENGTH)
    np.testing.assert_allclose(found.seconds.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(found.metrics.sum(1), 1, atol=1e-5)
    assert not found.seconds[1, 3:].any()
    without = apply(variables, np.where(np.arange(5) == 2, 0, X).astype(np.float32), LENGTH)["performance"]
    change = without - apply(variables, X, LENGTH)["performance"]
    np.testing.assert_allclose(found.occlusion[:, 2], change, atol=1e-6)


@pytest.mark.parametrize("branch", ["temporal", "system"])
def test_one_branch_alone(branch):
    shapes = jax.eval_shape(lambda: CloudFormer(dataclasses.replace(SMALL, branches=(branch,))).init_with_output(
        jax.random.key(0), X, LENGTH
    ))  # fmt: skip
    out, variables = shapes
    assert set(out) == {"performance", "logit", branch}
    assert variables["params"]["head_hidden"]["kernel"].value.shape == (8, 6)


def test_losses():
    class Given:
        config = SMALL

        def apply(self, *args, **kwargs):
            return {"performance": jnp.array([0.5, 0.9])}

    batch = {"x": X, "length": LENGTH, "performance": jnp.array([0.45, 0.5])}
    for kind, want in (("mse", 0.08125), ("mae", 0.225), ("huber", (0.00125 + 0.035) / 2)):
        given = Given()
        given.config = dataclasses.replace(SMALL, loss=kind)
        assert float(cloudformer.loss(given)({}, {}, batch, {}, False)[0]) == pytest.approx(want, rel=1e-4)


def test_statistics_are_of_valid_seconds():
    scale = cloudformer.Standardizer.fit(X, LENGTH)
    rows = np.concatenate([row[:n] for row, n in zip(X, LENGTH, strict=True)])
    np.testing.assert_allclose(scale(rows).mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scale(rows).std(0), 1, atol=1e-5)


def test_the_lstm_reads_valid_seconds_alone():
    model = cloudformer.LSTMBaseline(SMALL)
    variables = random_parameters(model, X, LENGTH)
    spoilt = np.where((np.arange(12) < LENGTH[:, None])[..., None], X, 9).astype(np.float32)
    a, b = (model.apply(variables, x, LENGTH)["logit"] for x in (X, spoilt))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 9}, r"d_model must be even and a multiple of heads \(2\), got 9"),
        ({"branches": ()}, "branches must be one or both of"),
        ({"loss": "l2"}, "loss must be one of .* got 'l2'"),
        ({"segments": 0}, "segments must be at least 1, got 0"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_inputs_say_so(network):
    model, variables, _ = network
    with pytest.raises(ValueError, match=r"x must be \(batch, seconds, 5\), got shape \(4, 12, 4\)"):
        model.apply(variables, X[..., :4], LENGTH)
    with pytest.raises(ValueError, match=r"length must be 4 integers, got float32 of shape \(4,\)"):
        model.apply(variables, X, LENGTH.astype(np.float32))

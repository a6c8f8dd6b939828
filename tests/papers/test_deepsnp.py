import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo.papers import deepsnp
from zoo.papers.deepsnp import DeepSNP, DeepSNPConfig, model

SMALL = DeepSNPConfig(
    window=200, margin=50, growth=2, layers_per_block=1, blocks=2, filters=3, gru_units=4, attention="full"
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((3, 2, 200, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    net = DeepSNP(SMALL)
    variables = random_parameters(net, X)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return net, variables, jax.jit(net.apply)(variables, X)


@pytest.mark.parametrize(
    "id, window, margin, wanted",
    [("v1", 40_000, 10_000, 156), ("v2", 40_000, 10_000, 31), ("v1", 2000, 500, 61), ("v2", 10_000, 2500, 31)],
)
def test_steps_of_a_window_are_the_published_ones(id, window, margin, wanted):
    net = zoo.create(f"deepsnp_{id}_final_att", window=window, margin=margin)
    assert deepsnp.steps(net.config, window) == wanted
    out, _ = jax.eval_shape(partial(net.init_with_output, jax.random.key(0)), np.zeros((1, 2, window, 1), np.float32))
    assert out["localization"].shape == out["attention"].shape == (1, wanted, 2)


def test_counts_with_statistics_are_the_published_ones():
    for name, wanted in (("no", 1_154_610), ("final", 1_155_636), ("full", 1_155_941)):
        shapes = jax.eval_shape(
            lambda name=name: zoo.create(f"deepsnp_v2_{name}_att", window=4000).init(
                jax.random.key(0), np.zeros((1, 2, 4000, 1), np.float32)
            )
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == wanted


@pytest.mark.parametrize("slide", [model.Slide(3, 2, 1, True), model.Slide(2, 2, 1, True), model.Slide(4, 1, 3, False)])
def test_products_are_convolutions_padded_as_in_keras(slide):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 21, 3)).astype(np.float32), rng.normal(size=(slide.places, 3, 4)).astype(np.float32)
    want = jax.lax.conv_general_dilated(
        x, kernel, (slide.stride,), "SAME" if slide.same else "VALID", rhs_dilation=(slide.dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    np.testing.assert_allclose(model.slide_product(jnp.asarray(x), jnp.asarray(kernel), slide), want, atol=1e-5)


def test_rows_do_not_mix_before_the_heads(network):
    _, variables, _ = network
    trunk = model.Trunk(SMALL)
    of_trunk = {name: tree["trunk"] for name, tree in variables.items()}
    run = jax.jit(lambda x: trunk.apply(of_trunk, model.rows_of(x), False))
    swapped = run(X[:, ::-1])
    np.testing.assert_allclose(
        swapped.reshape(3, 2, *swapped.shape[1:])[:, ::-1].reshape(swapped.shape), run(X), atol=1e-6
    )


def test_each_step_sees_its_receptive_field_alone():
    config = dataclasses.replace(SMALL, stem="strided", blocks=3)
    trunk = model.Trunk(config)
    x = X[:1, 0]
    variables = random_parameters(trunk, x)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    run = jax.jit(lambda x: trunk.apply(variables, x, False))
    field = deepsnp.receptive_field(config, 200)
    before = run(x)
    for probe in (0, 57, 130, 199):
        changed = x.copy()
        changed[:, probe] += 100
        touched = np.abs(run(changed) - before).max((0, 2)) > 0
        inside = (field[:, 0] <= probe) & (probe <= field[:, 1])
        assert not (touched & ~inside).any() and touched.any() == inside.any()


def test_the_recurrence_is_that_of_keras_2():
    units, rng = 3, np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2)).astype(np.float32)
    net = deepsnp.GatedBiGRU(units)
    params = random_parameters(net, x)
    halves = []
    for direction, order in (("forward", slice(None)), ("backward", slice(None, None, -1))):
        outputs = []
        for name, act in (("value", lambda v: v), ("gate", lambda v: 1 / (1 + np.exp(-v)))):
            w, u, b = (
                np.asarray(params["params"][f"{name}_{direction}"][key]) for key in ("input", "recurrent", "bias")
            )
            h, states = np.zeros(units), []
            for step in x[0, order]:
                gates = step @ w + b
                z, r = (np.clip(0.2 * (gates[k : k + units] + h @ u[:, k : k + units]) + 0.5, 0, 1) for k in (0, units))
                h = z * h + (1 - z) * act(gates[2 * units :] + (r * h) @ u[:, 2 * units :])
                states.append(h)
            outputs.append(np.array(states)[order])
        halves.append(outputs[0] * outputs[1])
    np.testing.assert_allclose(net.apply(params, x)[0], np.concatenate(halves, axis=-1), atol=1e-5)


def test_pooling_is_class_by_class(network):
    _, _, out = network
    p, a = out["localization"], np.clip(out["attention"], 1e-7, 1)
    np.testing.assert_allclose(out["probs"], (p * a).sum(1) / a.sum(1), atol=1e-6)
    assert np.abs(out["probs"].sum(-1) - 1).max() > 1e-4
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
    silent = deepsnp.attention_pool(jnp.asarray(p), jnp.zeros_like(p))
    np.testing.assert_allclose(silent, p.mean(1), atol=1e-5)  # clipped, not divided by zero


def test_the_loss_scales_outputs_and_adds_squares():
    params = {
        "trunk": {
            "stem": {"kernel": jnp.full((1, 1, 1), 2.0), "bias": jnp.array([3.0])},
            "stem_norm": {"scale": jnp.array([1.0]), "bias": jnp.array([5.0])},
        },
        "gru": {"kernel": jnp.array([[7.0]])},
    }

    class Given:
        config = SMALL

        def apply(self, *args, **kwargs):
            return {"probs": jnp.array([[0.2, 0.6], [0.3, 0.1]])}, {}

    batch = {"window": X[:2], "label": jnp.array([1, 1])}
    for stem, squares in (("dilated", 4 + 9 + 1 + 25), ("strided", 4 + 1 + 25)):
        given = Given()
        given.config = dataclasses.replace(SMALL, stem=stem)
        value, (_, metrics) = deepsnp.loss(given)(params, {}, batch, {}, False)
        assert float(value) == pytest.approx(-np.log([0.75, 0.25]).mean() + 1e-4 * squares, rel=1e-5)
        assert float(metrics["accuracy"]) == 0.5


@pytest.mark.parametrize("kind", ["vgg", "densenet", "dil_densenet", "lstm_densenet"])
def test_baselines_end_in_probabilities(kind):
    config = deepsnp.BaselineConfig(
        kind=kind, trunk=dataclasses.replace(SMALL, attention="none"), width=0.1, lstm_units=3
    )
    net = deepsnp.Baseline(config)
    shapes, _ = jax.eval_shape(partial(net.init_with_output, jax.random.key(0)), X)
    assert shapes["probs"].shape == (3, 2)


def test_steps_are_taken_back_to_probes():
    track = deepsnp.to_probes(np.arange(4.0), 11)
    np.testing.assert_array_equal(track, [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3])
    with pytest.raises(ValueError, match=r"a track of 1 \.\. 3 steps"):
        deepsnp.to_probes(np.arange(4.0), 3)


def test_a_sequence_is_read_in_windows_and_padded():
    seen = []

    def apply(x):
        seen.append(x)
        p = np.zeros((len(x), 5, 2))
        p[:, 3:, 1] = 0.9
        probs = np.stack([1 - x[:, 1, 0, 0], x[:, 1, 0, 0]], -1)
        return {"probs": probs, "localization": p}

    lrr = np.zeros(25, np.float32)
    lrr[10:20] = 1
    found = deepsnp.predict_sequence(apply, lrr, 2 * lrr, 10, at_once=2)
    assert len(seen) == 2 and seen[0].shape == (2, 2, 10, 1)
    assert (seen[1][0, :, 5:] == -2).all() and (seen[0][1, 0] == 2).all()
    np.testing.assert_array_equal(found.windows, [0, 1, 0])
    assert found.probability.shape == (25,) and found.probability[6] == 0.9 and found.probability[5] == 0
    np.testing.assert_array_equal(found.breakpoints, [15])
    with pytest.raises(ValueError, match="two tracks of the same length"):
        deepsnp.predict_sequence(apply, lrr, lrr[1:], 10)


def test_metrics_of_windows():
    found = deepsnp.window_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    assert found["f1_binary"] == pytest.approx(0.8) and found["accuracy"] == found["f1_micro"] == 0.75
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == 1


def test_the_published_rate_decays_a_tenth_a_step():
    assert deepsnp.published_rate(0) == 1e-3 and deepsnp.published_rate(10) == 5e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 40}, "a window of 40 probes is too short"),
        ({"stem": "wide"}, "stem must be one of .* got 'wide'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"growth": 0}, "growth must be at least 1, got 0"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_windows_say_so(network):
    net, variables, _ = network
    with pytest.raises(ValueError, match=r"windows must be \(batch, 2 rows: .*, got shape \(3, 1, 200, 1\)"):
        net.apply(variables, X[:, :1])
    with pytest.raises(TypeError, match="windows must be floating point, got int32"):
        net.apply(variables, X.astype(np.int32))

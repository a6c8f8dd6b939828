import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.papers import tscan
from zoo.papers.tscan import TSCAN, TSCANConfig

SMALL = TSCANConfig(
    input_dim=9, feature_dim=6, hours=8, segment=4, embed_dim=32, num_heads=2, ff_dim=8, dropout=0.0
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((5, 8, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return random_parameters(TSCAN(SMALL), X)


def run(config, variables, x=X):
    return jax.jit(partial(TSCAN(config).apply, return_attention=True))(variables, x)


@pytest.fixture(scope="module")
def out(variables):
    return run(dataclasses.replace(SMALL, fold=False), variables)


@pytest.mark.parametrize("change", [{"fold": True}, {"patients_per_tile": 3, "fold": False}])
def test_folding_and_packing_change_nothing(variables, out, change):
    other = run(dataclasses.replace(SMALL, **change), variables)
    for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(out), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.std(theirs)))


def test_gradients_through_folded_products_are_the_same():
    config = dataclasses.replace(SMALL, fold=False)
    x = jnp.asarray(X[:, :4, :6])
    model = tscan.ShortAttention(config, True)
    params = random_parameters(model, x, x)

    def gradient(**changes):
        model = tscan.ShortAttention(dataclasses.replace(config, **changes), True)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, x, x[::-1])[0]))))(params)

    want = gradient()
    for got in (gradient(fold=True), gradient(patients_per_tile=2)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # The keys' bias cancels in the softmax: its gradient is rounding, hence the absolute part.
            np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.std(b)) + 1e-5)


def test_cross_attention_is_masked_too(out):
    for stream, n in (("time", 4), ("feature", 6)):
        first, second = out["attention"][stream]
        assert set(first) == {"self"} and second["cross"].shape == (5, 2, n, n)
        assert (first["self"] > 0).all()  # the encoder sees everything
        for weights in second.values():
            assert not np.triu(weights, 1).any()
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_only_the_first_channels_are_read(variables, out):
    changed = X.copy()
    changed[:, :, 6:] += 1
    np.testing.assert_array_equal(
        run(dataclasses.replace(SMALL, fold=False), variables, changed)["logits"], out["logits"]
    )


def test_chains_are_joined_along_time_and_averaged(variables, out):
    assert out["features"].shape == (5, 8, 6)
    kernel, bias = (variables["params"]["head"]["dense"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(out["logits"], out["features"].mean(1) @ kernel + bias, atol=1e-4)
    for index, stream in enumerate(("time", "feature")):
        alone = {name: leaf for name, leaf in variables["params"].items() if name.startswith((stream, "head"))}
        one = run(dataclasses.replace(SMALL, fold=False, streams=(stream,)), {"params": alone})
        np.testing.assert_allclose(one["features"], out["features"][:, 4 * index : 4 * index + 4], atol=1e-4)


@pytest.mark.parametrize("length, width", [(12, 59), (59, 12), (5, 1)])
def test_positions_are_sines_then_cosines(length, width):
    table = tscan.positions(length, width)
    assert table.shape == (length, width)
    half = -(-width // 2)
    assert not table[0, :half].any() and (table[0, half:] == 1).all()
    if width > 2:
        np.testing.assert_allclose(table[:, 1], np.sin(np.arange(length) / 10_000 ** (2 / width)), atol=1e-5)


def test_without_masks_the_variables_order_is_that_of_the_positions_only(variables):
    from experiments.tscan import reordered

    order = np.random.default_rng(1).permutation(6)
    moved = reordered(X, order, 4, True)
    alone = {"params": {name: leaf for name, leaf in variables["params"].items() if not name.startswith("time")}}
    changes = []
    for causal in ((), ("feature",)):
        config = dataclasses.replace(SMALL, streams=("feature",), causal=causal)
        before, after = (run(config, alone, x)["features"] for x in (X, moved))
        changes.append(float(jnp.abs(after - before[:, :, order]).max()))
    assert changes[0] < 1e-4 and changes[1] > 1e-2


@pytest.mark.parametrize(
    "task, outputs, y",
    [
        ("ihm", 1, np.ones((5, 1), np.float32)),
        ("ph", 3, np.ones((5, 3), np.float32)),
        ("los", 4, np.arange(5, dtype=np.int32) % 4),
        ("los", 1, np.ones((5, 1), np.float32)),
    ],
)
def test_heads_and_losses_of_all_tasks(task, outputs, y):
    config = dataclasses.replace(SMALL, task=task, num_outputs=outputs)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, outputs)), jnp.float32)
    found = tscan.probabilities(logits, config)

    class Given:
        def __init__(self):
            self.config = config

        def apply(self, *args, **kwargs):
            return {"logits": logits}

    loss, _ = tscan.loss(Given())({}, {}, {"x": X, "y": y}, {}, False)
    if task != "los":
        expected = -jnp.log(found).mean()
    elif outputs > 1:
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
        expected = -jnp.log(found[jnp.arange(5), y]).mean()
    else:
        assert (found >= 0).all()
        expected = ((found - 1) ** 2).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_metrics_of_all_tasks():
    y, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    assert tscan.clinical_metrics("ihm", y, p) == pytest.approx({"auroc": 0.75, "auprc": 0.8333}, abs=1e-4)
    assert tscan.clinical_metrics("los", np.array([0, 1, 2]), np.eye(3)) == {"kappa": 1.0, "mad": 0.0}
    found = tscan.clinical_metrics("ph", np.stack([y, 1 - y], 1), np.stack([p, p], 1))
    assert found["auroc_macro"] == pytest.approx(0.5)
    assert np.isnan(tscan.clinical_metrics("decomp", np.zeros(4), p)["auroc"])
    with pytest.raises(ValueError, match="do not fit"):
        tscan.clinical_metrics("ihm", y, p[:3])


def test_uniform_attention_points_nowhere():
    uniform = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    plain = np.full((6, 6), 1 / 6)
    blocks = [{"self": plain[None, None]}, {"self": uniform[None, None], "cross": uniform[None, None]}]
    np.testing.assert_allclose(tscan.key_hours(blocks), np.ones(12))
    focused = plain.copy()
    focused[:, 2] += 0.5
    ranked = tscan.key_indicators([{"self": focused[None, None]}], list("abcdef"), causal=False)
    assert ranked[0][0] == "c"
    with pytest.raises(ValueError, match="2 names for 6 variables"):
        tscan.key_indicators(blocks, ["a", "b"])


@pytest.mark.parametrize("baseline", [tscan.TransformerBaseline, tscan.GRUBaseline])
def test_baselines_read_the_same_hours(baseline):
    out = jax.eval_shape(lambda: baseline(SMALL).init_with_output(jax.random.key(0), X)[0])
    assert out["prob"].shape == (5, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segment": 3}, "segments of 3 do not cut 8 hours evenly"),
        ({"feature_dim": 10}, r"feature_dim must be in 1 \.\. input_dim = 9, got 10"),
        ({"num_heads": 3}, r"embed_dim \(32\) must be a multiple of num_heads \(3\)"),
        ({"task": "death"}, "task must be one of .* got 'death'"),
        ({"streams": ()}, "streams not empty"),
        ({"blocks": 3}, r"blocks must be in 1 \.\. 2 segments, got 3"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_inputs_say_so():
    with pytest.raises(ValueError, match=r"x must be \(batch, 8 hours, 9 channels\), got shape \(5, 7, 9\)"):
        TSCAN(SMALL).init(jax.random.key(0), X[:, :7])
    with pytest.raises(TypeError, match="floating point and standardised, got int32"):
        TSCAN(SMALL).init(jax.random.key(0), X.astype(np.int32))

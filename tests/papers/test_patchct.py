"""PatchCT, a reconstruction: transport both ways, its streaming form, towers, losses, measures, baselines."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.kernels.compile import assert_holds_kernel
from tests.parameters import random_parameters
from zoo import registry
from zoo.papers import patchct
from zoo.papers.patchct import PatchCT, PatchCTConfig, QueryDecoder, conditional_transport
from zoo.weights import names

SMALL = PatchCTConfig(
    image_size=(32, 32), patch_size=8, vision_width=16, vision_layers=2, vision_heads=2, text_width=12, text_layers=1,
    text_heads=2, context_length=6, vocab_size=20, embed_dim=8, resolution=(32, 32), labels=5,
)  # fmt: skip


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


SETS = normal(3, 7, 6), normal(5, 6, seed=1), jnp.array([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
WEIGHTS = jnp.asarray(np.random.default_rng(2).uniform(size=(3, 7)), jnp.float32).at[0, 2].set(0)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["uniform", "weighted"])
def test_streaming_equals_the_definition_forward_and_backward(weights):
    patches, labels, y = SETS

    def value(implementation, patches, labels, tau):
        costs = conditional_transport(patches, labels, y, tau, weights, implementation=implementation)
        return jnp.vdot(costs, normal(3, 2, seed=3)), costs

    both = {
        name: jax.jit(jax.value_and_grad(partial(value, name), (0, 1, 2), has_aux=True))(patches, labels, 0.3)
        for name in ("streaming", "dense")
    }
    (_, costs), gradients = both["streaming"]
    (_, expected), expected_gradients = both["dense"]
    np.testing.assert_allclose(costs, expected, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), gradients, expected_gradients)
    np.testing.assert_array_equal(costs[2], 0)  # an image without a label
    assert all(np.isfinite(x).all() for x in gradients)
    for implementation in both:
        few = jax.jit(partial(conditional_transport, most=2, implementation=implementation))
        np.testing.assert_allclose(few(patches, labels, y, 0.3, weights), expected, atol=1e-5)


def test_plans_are_distributions_and_absent_labels_get_nothing():
    patches, labels, y = SETS
    forward, backward = patchct.plans(patches, labels, y, 0.3, WEIGHTS)
    np.testing.assert_allclose(forward[:2].sum(2), 1, rtol=1e-5)
    np.testing.assert_allclose(backward.sum(1), 1, rtol=1e-5)
    assert not forward[0, :, [1, 3, 4]].any() and not forward[2].any() and not backward[0, 2].any()
    np.testing.assert_allclose(forward[1, :, 3], 1)  # one label: every patch goes there
    cost = 1 - patchct._unit(patches)[1] @ patchct._unit(labels)[3]
    np.testing.assert_allclose(conditional_transport(patches, labels, y, 0.3)[1, 0], cost.mean(), rtol=1e-5)


def test_lengths_of_vectors_do_not_matter():
    patches, labels, y = SETS
    expected = conditional_transport(patches, labels, y)
    np.testing.assert_allclose(conditional_transport(3 * patches, labels * 0.1, y), expected, atol=1e-5)
    zero = conditional_transport(patches.at[0, 0].set(0), labels, y)
    assert np.isfinite(zero).all()
    half = patches.astype(jnp.bfloat16)
    close = conditional_transport(half.astype(jnp.float32), labels, y)
    np.testing.assert_allclose(conditional_transport(half, labels, y), close, atol=1e-5)  # float32 inside
    assert float(patchct.ct_loss(patches, labels, y)) == pytest.approx(float(expected.sum(1).mean()), rel=1e-5)


def test_many_iterations_of_sinkhorn_keep_the_masses():
    patches, labels, y = SETS
    costs = patchct.sinkhorn_transport(patches, labels, y, 0.5, iterations=200)
    ot = pytest.importorskip("ot")
    unit = [np.asarray(patchct._unit(x), np.float64) for x in (patches, labels)]
    for image, there in enumerate(([0, 2], [3])):
        cost = 1 - unit[0][image] @ unit[1][there].T
        plan = ot.sinkhorn(np.full(7, 1 / 7), np.full(len(there), 1 / len(there)), cost, 0.5, numItermax=2000)
        assert float(costs[image]) == pytest.approx((plan * cost).sum(), rel=1e-3)
    assert costs[2] == 0
    gradient = jax.grad(lambda x: patchct.sinkhorn_transport(x, labels, y).sum())(patches)
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def small():
    model = PatchCT(SMALL)
    inputs = {name: jnp.asarray(x) for name, x in patchct.example_inputs(SMALL, 2).items()}
    return model, inputs, random_parameters(model, inputs["images"], inputs["tokens"])


def test_predictions_need_no_transport_and_go_through_the_adaptive_layer(small):
    model, inputs, variables = small
    y = jnp.zeros((2, 5)).at[:, 1].set(1)
    call = jax.jit(model.apply)
    with_costs, without = call(variables, **inputs, y=y), call(variables, **inputs)
    np.testing.assert_allclose(with_costs.logits, without.logits, rtol=1e-5)
    assert without.costs is None and with_costs.costs.shape == (2, 1, 2)

    def parts(model, images, tokens):
        return model.features(images)[-1][:, 0], model.label_vectors(tokens)[-1]

    token, labels = jax.jit(partial(model.apply, method=parts))(variables, **inputs)
    params = variables["params"]
    first, second = params["adaptive_0"], params["adaptive_1"]
    adapted = token + nn.relu(token @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
    expected = jnp.exp(params["logit_scale"]) * patchct._unit(adapted) @ patchct._unit(labels).T
    np.testing.assert_allclose(without.logits, expected, rtol=1e-4)
    np.testing.assert_allclose(model.apply(variables, token, labels, method="classify"), without.logits, rtol=1e-5)


def test_several_layers_are_aligned(small):
    _, inputs, variables = small
    config = dataclasses.replace(SMALL, ct_layers=(1, 2), learn_tau=True)
    model = PatchCT(config)
    variables = {"params": {**variables["params"], "log_tau": jnp.log(0.07)}}
    found = jax.jit(model.apply)(variables, **inputs, y=jnp.ones((2, 5)))
    last = jax.jit(PatchCT(SMALL).apply)(variables, **inputs, y=jnp.ones((2, 5)))
    assert found.costs.shape == (2, 2, 2) and config.aligned == ((1, 2), (1, 1))
    np.testing.assert_allclose(found.costs[:, 1], last.costs[:, 0], rtol=1e-4)


def test_the_temperature_can_be_learned():
    patches, labels, y = SETS
    slope = jax.jit(jax.grad(lambda tau: patchct.ct_loss(patches, labels, y, tau)))(0.3)
    higher, lower = (float(patchct.ct_loss(patches, labels, y, 0.3 + step)) for step in (1e-2, -1e-2))
    assert float(slope) == pytest.approx((higher - lower) / 2e-2, rel=1e-2)


def test_texts_end_at_their_highest_token_and_see_no_later_one(small):
    model, inputs, variables = small
    tokens = inputs["tokens"].at[:, 3].set(19).at[:, 4:].set(0)
    vectors = jax.jit(partial(model.apply, method="label_vectors"))
    expected = vectors(variables, tokens)[-1]
    np.testing.assert_array_equal(vectors(variables, tokens.at[:, 4:].set(7))[-1], expected)
    assert np.abs(vectors(variables, tokens.at[:, 2].set(8))[-1] - expected).max() > 1e-3


def test_other_sizes_and_heat_maps(small):
    model, _, variables = small
    images, tokens = jnp.zeros((1, 48, 40, 3)), jnp.zeros((5, 6), int)
    found = jax.eval_shape(partial(model.apply, method="label_heatmap"), variables, images, tokens)
    assert found.shape == (1, 6, 5, 5)
    assert zoo.example_inputs("patchct_clip_b16", 1)["images"].shape == (1, 448, 448, 3)


def test_the_baseline_s_queries_are_labels(small):
    _, inputs, _ = small
    model = QueryDecoder(SMALL, heads=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    found = jax.eval_shape(model.apply, shapes, **inputs)
    assert found.logits.shape == (2, 5) and found.costs is None
    assert shapes["params"]["weights"].value.shape == (5, 8)


def test_the_loss_trains(small):
    model, inputs, variables = small
    batch = inputs | {"labels": jnp.asarray(patchct.example_targets(SMALL, 2)["labels"]).at[0, 0].set(1)}
    loss = jax.jit(lambda params: patchct.loss(model)(params, {}, batch, {}, True))
    value, (_, metrics) = loss(variables["params"])
    assert float(value) == pytest.approx(float(metrics["asymmetric"] + metrics["transport"]), rel=1e-5)
    assert metrics["transport"] > 0


def test_asymmetric_loss_without_focus_is_cross_entropy():
    logits, y = normal(4, 3), jnp.asarray(np.random.default_rng(1).integers(0, 2, (4, 3)))
    value = patchct.asymmetric_loss(logits, y, 0, 0, 0)
    np.testing.assert_allclose(
        value, -(y * nn.log_sigmoid(logits) + (1 - y) * nn.log_sigmoid(-logits)).sum(), rtol=1e-4
    )
    # A sure negative, shifted, costs nothing.
    assert patchct.asymmetric_loss(jnp.full((1, 1), -4.0), jnp.zeros((1, 1))) == 0
    with pytest.raises(ValueError, match=r"y must be \(4, 3\), got \(4,\)"):
        patchct.asymmetric_loss(logits, y[:, 0])


def test_measures():
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    scores = np.array([[0.9, 0.6, 0.1], [0.4, 0.8, 0.2], [0.7, 0.3, 0.1]])
    found = patchct.multilabel_metrics(scores, y)
    assert found.mean_average_precision == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)
    assert found.class_precision == pytest.approx((1 / 2 + 1 / 2 + 0) / 3) == found.class_recall
    assert found.overall_precision == pytest.approx(2 / 4) == found.overall_recall == found.overall_f1
    assert patchct.multilabel_metrics(scores, y, top_k=1).overall_precision == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"top_k must be in 1 \.\. 3, got 4"):
        patchct.multilabel_metrics(scores, y, top_k=4)


def test_published_names_go_in_and_out():
    model = zoo.create("patchct_tiny")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **zoo.example_inputs("patchct_tiny", 1)))
    table = registry.model("patchct_tiny").weight_rules(model.config)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nn.unbox(shapes))
    published = names.to_published(variables, table)
    assert published["visual.transformer.resblocks.2.attn.in_proj_weight"].shape == (192, 64)
    assert published["positional_embedding"].shape == (12, 48)
    # The files of OpenAI hold three numbers more.
    extra = published | {"context_length": np.array(12), "input_resolution": np.array(64), "vocab_size": np.array(50)}
    assert jax.tree.structure(names.convert(extra, table, shapes)) == jax.tree.structure(variables)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ct_layers": (3,)}, r"ct_layers must be among 1 \.\. 2, got \(3,\)"),
        ({"tau": 0.0}, "tau must be positive, got 0"),
        ({"transport": "fast"}, "transport must be 'streaming' or 'dense', got 'fast'"),
        ({"transport_weight": -1.0}, "transport_weight must not be negative"),
        ({"adapter_reduction": 9}, "adapter_reduction must leave a unit of 8, got 9"),
        ({"image_size": (30, 32)}, "image_size must be two multiples of patch_size 8"),
        ({"vision_heads": 3}, "vision_heads must divide vision_width, got 3 heads and a width of 16"),
        ({"labels": 0}, "labels must be at least 1, got 0"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_input_says_so():
    patches, labels, y = SETS
    with pytest.raises(ValueError, match=r"y must be \(3, 5\), got \(3, 4\)"):
        conditional_transport(patches, labels, y[:, :4])
    with pytest.raises(ValueError, match=r"patches must be \(B, N, D\) and labels \(M, D\)"):
        conditional_transport(patches, labels[:, :4], y)
    with pytest.raises(ValueError, match=r"patch_weights must be \(3, 7\)"):
        conditional_transport(patches, labels, y, patch_weights=jnp.ones((3, 6)))
    with pytest.raises(ValueError, match="implementation must be 'streaming' or 'dense', got 'fast'"):
        conditional_transport(patches, labels, y, implementation="fast")
    init = partial(jax.eval_shape, PatchCT(SMALL).init, jax.random.key(0))
    with pytest.raises(TypeError, match="images must be floating point and normalised, got uint8"):
        init(jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.zeros((5, 6), int))
    with pytest.raises(ValueError, match="a text has 1 to 6 tokens, got 7"):
        init(jnp.zeros((1, 32, 32, 3)), jnp.zeros((5, 7), int))
    with pytest.raises(TypeError, match=r"tokens must be integers \(texts, tokens\), got float32"):
        init(jnp.zeros((1, 32, 32, 3)), jnp.zeros((5, 6)))


@pytest.mark.slow
def test_the_programs_for_a_tpu_and_a_gpu_hold_the_kernel():
    sets = [jax.ShapeDtypeStruct(size, jnp.float32) for size in ((2, 784, 512), (80, 512), (2, 80))]
    kernels = {"tpu-v5e": "attention_forward", "h100": "attention_gpu_forward"}
    assert_holds_kernel(conditional_transport, sets, kernels)

"""Sentence attention: gates, norms, padding, the decoder, many questions, other backbones, losses, measures, names."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import registry
from zoo.backbones.efficientnet import EfficientNetConfig, pad_same
from zoo.data.grounding import hashed_sentences
from zoo.layers.convolution import convolve
from zoo.papers import sentence_attention
from zoo.papers.mobilevig import MobileViGConfig, MobileViGFeatures
from zoo.papers.sentence_attention import InputNorm, Merge, SentenceAttentionConfig, SentenceAttentionModel
from zoo.weights import names

SMALL = SentenceAttentionConfig(EfficientNetConfig(0.25, 0.2), encode_dim=12, image_size=(33, 47))


@functools.cache
def shapes_of(id):
    model, inputs = zoo.create(id), zoo.example_inputs(id, 1)
    return model, nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_variables(model, *arguments):
    variables = random_parameters(model, *arguments)
    positive = lambda path, x: jnp.abs(x) + 0.5 if path[-1].key == "var" else x  # noqa: E731
    return {**variables, "batch_stats": jax.tree.map_with_path(positive, variables["batch_stats"])}


@pytest.fixture(scope="module")
def small():
    model = SentenceAttentionModel(SMALL)
    images, text = sentence_attention.example_inputs(SMALL, 2).values()
    return model, jnp.asarray(images), jnp.asarray(text), random_variables(model, images, text)


def test_backbones_have_the_published_sizes():
    published = {"b0": 3_595_388, "b3": 10_103_336}  # of the whole networks the registry's test counts all
    for size, expected in published.items():
        tree = shapes_of(f"sentence_attention_{size}")[1]["params"]["backbone"]
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == expected


def test_maps_have_the_published_channels():
    widths = {"b1": (16, 24, 40, 112, 320), "b2": (16, 24, 48, 120, 352), "b6": (32, 40, 72, 200, 576)}
    for size, expected in widths.items():
        assert registry.model(f"sentence_attention_{size}").variant.config.backbone.widths == expected


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 70)])
def test_maps_of_any_image_are_rounded_up(size):
    model = SentenceAttentionModel(SMALL)
    inputs = {"images": jnp.zeros((1, *size, 3)), "text": jnp.zeros((1, 12))}
    variables = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    maps = jax.eval_shape(partial(model.apply, method="features"), variables, inputs["images"])
    assert [x.shape[1:3] for x in maps] == [tuple(-(-s // stride) for s in size) for stride in (2, 4, 8, 16, 32)]
    assert jax.eval_shape(model.apply, variables, **inputs).shape == (1, *size, 2)


@pytest.mark.parametrize("size, kernel, stride", [((7, 8), 3, 2), ((5, 6), 5, 2), ((4, 9), 5, 1)])
def test_same_padding_is_tensorflow_s(size, kernel, stride):
    x, weights = normal(1, *size, 3), normal(kernel, kernel, 1, 3, seed=1)
    expected = jax.lax.conv_general_dilated(
        x, weights, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    np.testing.assert_allclose(convolve(pad_same(x, kernel, stride), weights, stride=stride), expected, atol=1e-5)


def test_a_gate_s_weights_sum_to_one_and_depend_on_the_sentence_alone():
    gate = sentence_attention.SentenceAttention(6)
    x, text = normal(2, 3, 4, 6), normal(2, 12, seed=1)
    variables = random_parameters(gate, x, text)
    weights = gate.apply(variables, text, method="weights")
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(gate.apply(variables, x, text), x * weights[:, None, None], rtol=1e-5)
    assert variables["params"]["hidden"]["kernel"].shape == (12, 48)
    other = gate.clone(gate="sigmoid", gate_norm=False, hidden_ratio=0.5)
    params = random_parameters(other, x, text)["params"]
    assert "norm" not in params and params["hidden"]["kernel"].shape == (12, 6)


def test_images_are_normalised_by_themselves_in_training_and_by_running_statistics_after_it():
    x = 40 * normal(3, 5, 4, 2) + 100
    model = InputNorm()
    stats = {"batch_stats": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 9.0])}}
    np.testing.assert_allclose(model.apply(stats, x, False), (x - jnp.array([1.0, 2])) / jnp.array([2.0, 3]), rtol=1e-5)
    y, state = model.apply(stats, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((1, 2)), np.zeros((3, 2)), atol=1e-5)
    np.testing.assert_allclose(y.std((1, 2)), np.ones((3, 2)), rtol=1e-4)
    expected = 0.9 * stats["batch_stats"]["var"] + 0.1 * jnp.var(x, axis=(1, 2), ddof=1).mean(0)
    np.testing.assert_allclose(state["batch_stats"]["var"], expected, rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], jnp.array([0.9, 1.8]) + 0.1 * x.mean((0, 1, 2)), rtol=1e-5)


def test_the_decoder_resizes_what_is_convolved_and_normalised():
    high, low = normal(1, 4, 6, 3), normal(1, 2, 3, 5, seed=1)
    merge = Merge(3)
    variables = random_variables(merge, high, low)
    conv, bn = variables["params"]["low"]["conv"]["kernel"], variables["params"]["low"]["norm"]
    stats = variables["batch_stats"]["low"]["norm"]
    y = (low @ conv - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * bn["scale"] + bn["bias"]
    halves = jnp.stack([y[:, :, 0], 0.75 * y[:, :, 0] + 0.25 * y[:, :, 1], 0.25 * y[:, :, 0] + 0.75 * y[:, :, 1]], 2)
    got = merge.apply(variables, jnp.zeros_like(high), low)
    np.testing.assert_allclose(got[:, 0, :3], nn.relu(halves)[:, 0], atol=1e-5)  # half-pixel centres
    np.testing.assert_allclose(merge.apply(variables, high - 1e3, low), 0)


def test_many_questions_are_as_many_calls(small):
    model, images, text, variables = small
    texts = jnp.stack([text, text[::-1], 0.5 * text], axis=1)
    together = jax.jit(partial(model.apply, method="ground_many"))(variables, images, texts)
    call = jax.jit(model.apply)
    for question in range(3):
        expected = call(variables, images, texts[:, question])
        np.testing.assert_allclose(together[:, question], expected, atol=1e-4 * float(jnp.std(expected)))
    weights = model.apply(variables, text, method="channel_weights")
    assert [w.shape for w in weights] == [(2, c) for c in SMALL.backbone.widths]


def test_questions_are_asked_in_words(small):
    model, images, _, variables = small
    ask = partial(sentence_attention.ground, model, encode=partial(hashed_sentences, features=12))
    found = jax.eval_shape(lambda variables, images: ask(variables, images, ["where?", "what?"]), variables, images)
    assert found.shape == (2, 33, 47)
    with pytest.raises(ValueError, match="expected a question for each of 2 images, got 1"):
        ask(variables, images, ["where?"])


def test_folding_changes_nothing(small):
    model, images, text, variables = small
    folded = sentence_attention.fold(variables)
    assert set(folded["batch_stats"]) == {"init_norm"}
    call = jax.jit(model.apply)
    expected = call(variables, images, text)
    np.testing.assert_allclose(call(folded, images, text), expected, atol=1e-4 * float(jnp.std(expected)))


def test_another_backbone():
    body = MobileViGFeatures(MobileViGConfig((1, 0, 1), (8, 8, 16), 1, 16, 16))
    model = SentenceAttentionModel(SMALL, pyramid=body, channels=(8, 8, 16, 16))
    images, text = jnp.zeros((2, 64, 64, 3)), jnp.zeros((2, 12))
    variables = jax.eval_shape(model.init, jax.random.key(0), images, text)
    parts = {f"gate_{i}" for i in range(4)} | {f"merge_{i}" for i in range(3)}
    assert set(variables["params"]) == {"pyramid", "classifier"} | parts
    assert jax.eval_shape(model.apply, variables, images, text).shape == (2, 64, 64, 2)
    with pytest.raises(ValueError, match="pyramid and channels are given both or neither"):
        jax.eval_shape(model.clone(channels=None).init, jax.random.key(0), images, text)


def test_fewer_gates_and_a_sentence_beside_the_map():
    model = SentenceAttentionModel(dataclasses.replace(SMALL, scales=(4,), tile_text=True))
    images, text = sentence_attention.example_inputs(SMALL, 1).values()
    params = jax.eval_shape(model.init, jax.random.key(0), images, text)["params"]
    assert "gate_4" in params and "gate_0" not in params
    assert params["mix"]["conv"]["kernel"].value.shape == (SMALL.backbone.widths[-1] + 12, SMALL.backbone.widths[-1])
    with pytest.raises(ValueError, match=r"scales must be among 0 \.\. 4, got \(5,\)"):
        jax.eval_shape(
            SentenceAttentionModel(dataclasses.replace(SMALL, scales=(5,))).init, jax.random.key(0), images, text
        )


def test_published_names_go_in_and_out():
    model, shapes = shapes_of("sentence_attention_b0")
    table = sentence_attention.rules(model.config)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    published = names.to_published(variables, table)
    assert published["backbone._blocks.0._se_reduce.weight"].shape == (8, 32, 1, 1)
    assert jax.tree.structure(names.convert(published, table, shapes)) == jax.tree.structure(variables)
    with pytest.raises(names.NameMapError, match="surprise"):
        names.convert(published | {"backbone.surprise": np.zeros(1)}, table, shapes)


def test_ignored_pixels_do_not_count():
    logits, labels = normal(2, 4, 5, 2), jnp.zeros((2, 4, 5), int).at[0, :2].set(1).at[1].set(2)
    few = sentence_attention.grounding_loss(logits[:1], labels[:1])
    np.testing.assert_allclose(sentence_attention.grounding_loss(logits, labels), few, rtol=1e-5)
    np.testing.assert_array_equal(
        sentence_attention.iou(logits, labels), sentence_attention.iou(logits[:1], labels[:1])
    )
    weighted = sentence_attention.grounding_loss(logits, labels, jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(weighted, -jax.nn.log_softmax(logits)[0, :2, :, 1].mean(), rtol=1e-5)


def test_intersections_over_the_set_and_image_by_image():
    labels = jnp.array([[[0, 0, 1, 1]], [[0, 0, 0, 1]]])
    found = jnp.array([[[0, 1, 1, 1]], [[0, 0, 0, 1]]])
    logits = jax.nn.one_hot(found, 2)
    np.testing.assert_allclose(sentence_attention.iou(logits, labels), [4 / 5, 3 / 4])
    np.testing.assert_allclose(sentence_attention.per_image_iou(logits, labels), [3 / 4, 5 / 6], rtol=1e-6)


def test_region_mutual_information_is_the_published_formula():
    logits, labels = normal(1, 6, 7, 2), jnp.asarray(np.random.default_rng(1).integers(0, 2, (1, 6, 7)))
    y, p = np.eye(2)[labels[0]], 1 / (1 + np.exp(-np.asarray(logits[0], np.float64)))
    total = 0.0
    for k in range(2):
        vectors = [np.stack([x[i : i + 4, j : j + 5, k].ravel() for i in range(3) for j in range(3)]) for x in (y, p)]
        a, b = (v - v.mean(1, keepdims=True) for v in vectors)
        rest = a @ a.T - a @ b.T @ np.linalg.inv(b @ b.T + 5e-4 * np.eye(9)) @ b @ a.T + 5e-4 * np.eye(9)
        total += 0.5 * np.linalg.slogdet(rest)[1] / 9
    base = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    np.testing.assert_allclose(sentence_attention.rmi_loss(logits, labels), (base + total) / 2, rtol=1e-3)
    gradient = jax.grad(lambda x: sentence_attention.rmi_loss(x, labels))(20 * logits)
    assert np.isfinite(gradient).all()


def test_the_loss_trains():
    model = SentenceAttentionModel(SMALL)
    batch = sentence_attention.example_inputs(SMALL, 2) | sentence_attention.example_targets(SMALL, 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch["images"], batch["text"])
    for kind in ("ce", "rmi"):
        loss = sentence_attention.loss(model, (0.1, 1.0), kind)
        state = {"batch_stats": variables["batch_stats"]}
        run = lambda params, state, loss=loss: loss(params, state, batch, {"dropout": jax.random.key(0)}, True)  # noqa: E731
        value, (_, metrics) = jax.eval_shape(run, variables["params"], state)
        assert value.shape == metrics["accuracy"].shape == ()
    with pytest.raises(ValueError, match="kind must be 'ce' or 'rmi', got 'dice'"):
        sentence_attention.loss(model, kind="dice")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gate": "tanh"}, "gate must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"hidden_ratio": 0.01}, "hidden_ratio must leave a hidden unit"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_input_says_so():
    init = partial(jax.eval_shape, SentenceAttentionModel(SMALL).init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\), got \(2, 64, 64\)"):
        init(jnp.zeros((2, 64, 64)), jnp.zeros((2, 12)))
    with pytest.raises(TypeError, match="pixels from 0 to 255, got uint8"):
        init(jnp.zeros((2, 64, 64, 3), jnp.uint8), jnp.zeros((2, 12)))
    with pytest.raises(ValueError, match=r"text must be \(2, 12\), got \(2, 13\)"):
        init(jnp.zeros((2, 64, 64, 3)), jnp.zeros((2, 13)))

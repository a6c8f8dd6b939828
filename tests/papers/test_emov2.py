"""EMOv2 and EMO: sizes, names, folding, heads, losses, boxes, DEMO. The published numbers are in the golden cases."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels import attention
from tests.kernels.compile import assert_holds_kernel
from tests.parameters import random_parameters
from zoo import registry, weights
from zoo.backbones import mask_rcnn
from zoo.backbones import segmentation as heads
from zoo.layers import boxes
from zoo.layers.resizing import adaptive_average_pool
from zoo.papers import emov2
from zoo.papers.emov2 import detection, generation, segmentation
from zoo.weights import names

TINY = emov2.EMOv2Config(
    depths=(1, 1, 2, 2), widths=(8, 12, 16, 24), expansions=(2, 2, 3, 3.5), head_dims=(4, 4, 8, 12), window=3,
    num_classes=5, image_size=(64, 64),
)  # fmt: skip
SHALLOW = dataclasses.replace(TINY, depths=(1, 1, 1, 1))


def parameters(id):
    model = zoo.create(id)
    inputs = zoo.example_inputs(id, 1)
    if "images" in inputs:  # parameters do not depend on the size
        inputs["images"] = inputs["images"][:, :64, :64]
    return jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_variables(model, *arguments):
    """Random parameters and running statistics, the variances positive."""
    variables = random_parameters(model, *arguments)
    if "batch_stats" in variables:
        positive = lambda path, x: jnp.abs(x) + 0.5 if path[-1].key == "var" else x  # noqa: E731
        variables["batch_stats"] = jax.tree.map_with_path(positive, variables["batch_stats"])
    return variables


# In millions; without DeepLabv3's and PSPNet's auxiliary head.
DENSE = {
    "retinanet": (10.60, 11.56, 14.46, 29.83), "ssdlite": (2.41, 3.35, 6.09, 21.21),
    "semantic_fpn": (5.37, 6.29, 8.99, 24.00), "deeplabv3": (5.61, 6.66, 9.97, 26.06),
    "pspnet": (4.28, 5.25, 8.20, 23.64), "segformer": (1.50, 2.68, 5.38, 20.40),
}  # fmt: skip


@pytest.mark.parametrize("head", DENSE)
@pytest.mark.parametrize("size", ["1m", pytest.param("20m", marks=pytest.mark.slow)])
def test_dense_networks_have_the_published_sizes(head, size):
    found = parameters(f"{head}_emov2_{size}")
    found = {name: child for name, child in found.items() if name != "auxiliary"}
    published = DENSE[head][["1m", "2m", "5m", "20m"].index(size)]
    assert round(count(found) / 1e6, 2) == pytest.approx(published, abs=0.0051)


def test_sizes_that_share_parameters_differ_in_their_window():
    for id in ("emov2_1m_256", "emov2_1m_512", "emov2_5m_256"):
        assert zoo.create(id).config.window == 8
    assert zoo.create("retinanet_emov2_5m").config.backbone.window == 10


def published_names(id, **overrides):
    """Shapes of the published state dict, by our rules read backwards, and the rules."""
    entry = registry.model(id)
    module = entry.build(overrides)
    inputs = {name: x[:1, :64, :64] if name == "images" else x for name, x in zoo.example_inputs(id, 1).items()}
    variables = jax.eval_shape(partial(module.init, jax.random.key(0)), **inputs)
    return module, inputs, entry.weight_rules(module.config), variables


@pytest.mark.parametrize(
    "id", ["emo_1m", "emov2_1m", "retinanet_emov2_1m", "ssdlite_emov2_1m", "demo_s_2"]
    + [f"{head}_emov2_1m" for head in segmentation.HEADS],
)  # fmt: skip
def test_the_published_names_convert_there_and_back(id):
    _, _, rules, shapes = published_names(id)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nn.meta.unbox(shapes))
    published = weights.to_published(variables, rules)
    back = names.convert(published, rules, shapes)
    assert jax.tree.structure(nn.meta.unbox(back)) == jax.tree.structure(variables)
    if id == "emov2_1m":
        assert published["stage3.1.eops.0.qk.conv.weight"].shape == (160, 80, 1, 1)
        assert published["stage3.1.ls.gamma"].shape == (1, 80, 1, 1)
        assert {"stage0.2.conv.weight", "stage4.0.norm.norm.bias", "norm.norm.weight", "head.bias"} < set(published)


@pytest.fixture(scope="module")
def tiny():
    model = emov2.EMOv2(TINY)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 56, 3)), jnp.float32)
    variables = random_variables(model, images)
    return model, variables, images


def test_folding_changes_nothing(tiny):
    model, variables, images = tiny
    folded = emov2.fold(variables)
    assert count(folded) < count(variables) and "layer_scale" not in folded["params"]["stage_1_block_0"]["project"]
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(folded, images), apply(variables, images), rtol=2e-4, atol=2e-5)
    with pytest.raises(ValueError, match="was folded for inference"):
        model.apply(folded, images, train=True)


@pytest.mark.slow
def test_a_backbone_inside_a_detector_is_folded_and_the_head_is_not():
    model = detection.SSDLite(emov2.DetectorConfig(SHALLOW, num_classes=3))
    images = jnp.ones((1, 64, 64, 3))
    variables = random_variables(model, images)
    folded = emov2.fold(variables)
    assert "norm" not in folded["params"]["backbone"]["stem_0"] and "norm" in folded["params"]["class_0_depthwise"]
    apply = jax.jit(model.apply)
    for one, other in zip(apply(folded, images).logits, apply(variables, images).logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_one_window_for_the_whole_map_is_attention():
    module = emov2.SpanningAttention(24, 4, window=0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 8)), jnp.float32)
    variables = random_variables(module, x)
    whole = module.apply(variables, x)
    by_kernel = emov2.SpanningAttention(24, 4, window=5).apply(variables, x[:, :3, :3])
    exact = emov2.SpanningAttention(24, 4, window=3).apply(variables, x[:, :3, :3])
    np.testing.assert_allclose(
        module.apply(variables, x[:, :3, :3]), exact, rtol=1e-5, atol=1e-5
    )  # where a window is the map, both are the same
    assert whole.shape == (2, 3, 5, 24) and not np.allclose(by_kernel, exact, atol=1e-3)


def test_padding_takes_part_as_zeros_before_the_projections():
    module = emov2.SpanningAttention(24, 4, window=4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 6, 8)), jnp.float32)
    variables = random_variables(module, x)
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 2), (0, 0)))
    np.testing.assert_allclose(
        module.apply(variables, x), module.apply(variables, padded)[:, :5, :6], rtol=1e-5, atol=1e-6
    )


def test_a_block_without_a_skip_scales_its_layer_too():
    x = jnp.ones((1, 4, 4, 8))
    block = emov2.IRMB(8, 2, operators=("convolution",), skip=False, layer_scale=0.0)
    variables = random_variables(block, x)
    variables["params"]["project"]["layer_scale"]["scale"] = jnp.zeros(8)
    assert not np.asarray(block.apply(variables, x, False)).any()


def test_parts_of_the_block_can_be_taken_away():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 8)), jnp.float32)
    block = emov2.IRMB(8, 2, operators=("convolution",))
    variables = random_variables(block, x)
    assert not np.allclose(block.apply(variables, x), block.clone(inner_skip=False).apply(variables, x))
    bare = emov2.IRMB(8, 2, operators=("convolution",), skip=False, scale_everywhere=False)
    assert "layer_scale" not in random_variables(bare, x)["params"]["project"]


def test_several_operators_are_added():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 8)), jnp.float32)
    both = emov2.IRMB(8, 2, operators=("remote", "close"), head_dim=4, window=2)
    variables = random_variables(both, x)
    assert {"attention_0", "attention_1"} <= set(variables["params"])
    assert both.apply(variables, x, False).shape == x.shape


def test_distillation_and_smoothing_are_the_published_formulas():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.standard_normal((4, 7)), jnp.float32) for _ in range(2))
    p, q = (np.asarray(jax.nn.softmax(x)) for x in (teacher, student))
    np.testing.assert_allclose(emov2.kd_loss(student, teacher), (p * np.log(p / q)).sum() / 4, rtol=1e-5)

    class Fixed(nn.Module):
        def __call__(self, images, train):
            return student

    labels = jnp.array([1, 0, 6, 3])
    log = np.log(q)
    expected = 0.9 * -log[np.arange(4), labels].mean() + 0.1 * -log.mean()
    batch = {"images": student, "labels": labels}
    value = emov2.loss(Fixed())({}, {}, batch, {}, False)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value = emov2.loss(Fixed())({}, {}, batch | {"teacher": teacher}, {}, False)[0]
    np.testing.assert_allclose(value, expected + 5 * (p * np.log(p / q)).sum() / 4, rtol=1e-5)


def test_the_teacher_sees_pixels_between_0_and_1():
    pixels = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    student = (pixels - np.float32(emov2.model.IMAGENET_MEAN)) / np.float32(emov2.model.IMAGENET_STD)
    np.testing.assert_allclose(emov2.teacher_images(student, 8), pixels, atol=1e-6)
    assert emov2.teacher_images(jnp.asarray(student), 16).shape == (2, 16, 16, 3)


# --------------------------------------------------------------------------------------------------------------- boxes


def test_coding_has_an_inverse():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (20, 2))
    found, anchors = (
        jnp.asarray(np.concatenate([corner, corner + rng.uniform(4, 40, (20, 2))], 1), jnp.float32) for _ in range(2)
    )
    coder = boxes.BoxCoder((0.1, 0.1, 0.2, 0.2))
    np.testing.assert_allclose(coder.decode(anchors, coder.encode(anchors, found), 200, 200), found, atol=1e-3)
    assert (coder.decode(anchors, coder.encode(anchors, found), 20, 30) <= jnp.array([30, 20, 30, 20])).all()


def test_assignment():
    truth = jnp.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 1, 1]])
    anchors = jnp.array([[0.0, 0, 10, 10], [0, 0, 10, 22], [0, 0, 10, 40], [20, 20, 30, 60], [20, 20, 30, 60]])
    labels = jnp.array([4, 2, -1])
    chosen = boxes.assign(anchors, truth, labels, 0.5, 0.4, every_best=True)
    # A match, one between the thresholds, none, and the best there are, though they overlap by a quarter.
    np.testing.assert_array_equal(chosen, [0, boxes.IGNORED, boxes.NEGATIVE, 1, 1])
    first = boxes.assign(anchors, truth, labels, 0.5, 0.5, every_best=False)
    np.testing.assert_array_equal(first, [0, boxes.NEGATIVE, boxes.NEGATIVE, 1, boxes.NEGATIVE])


def test_suppression_is_greedy_and_by_class():
    found = jnp.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    kept, valid = boxes.batched_nms(
        found, jnp.array([0.5, 0.9, 0.8, -jnp.inf]), jnp.array([0, 0, 1, 0]), threshold=0.5, most=4
    )
    np.testing.assert_array_equal(kept[:2], [1, 2])
    np.testing.assert_array_equal(valid, [True, True, False, False])


def test_average_precision():
    truth = [np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]), np.zeros((0, 4))]
    good, other, wrong = [0, 0, 10, 11.0], [21, 20, 31, 30.0], [60, 60, 70, 70.0]
    found = [(np.array([good, other, good]), np.array([0.9, 0.5, 0.8])), (np.array([wrong]), np.array([0.7]))]
    # Right, a second one of the same, wrong, right: precisions 1 and 1/2.
    assert boxes.average_precision(found, truth) == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    assert np.isnan(boxes.average_precision(found, [np.zeros((0, 4))] * 2))


def test_anchors_are_the_published_ones():
    retina = boxes.grid_anchors(boxes.retina_anchors(8), 2, 3, 8)
    assert retina.shape == (54, 4)
    np.testing.assert_allclose(retina[3], [-16, -16, 16, 16])  # ratio 1 after three sizes of ratio 1/2
    np.testing.assert_allclose(retina[9 + 3], [-8, -16, 24, 16])
    ssd = boxes.ssd_anchors(16, 48, 100)
    sizes = np.stack([ssd[:, 2] - ssd[:, 0], ssd[:, 3] - ssd[:, 1]], 1)
    np.testing.assert_allclose(sizes[:2], [[48, 48], [4800**0.5] * 2])
    np.testing.assert_allclose(sizes[:, 1] / sizes[:, 0], [1, 1, 1 / 2, 2, 1 / 3, 3])
    np.testing.assert_allclose((ssd[:, :2] + ssd[:, 2:]) / 2, 8)


def test_focal_loss_of_gamma_zero_is_cross_entropy():
    logits, targets = jnp.linspace(-3, 3, 7), jnp.array([1.0, 0, 1, 0, 1, 0, 1])
    plain = -(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits))
    np.testing.assert_allclose(boxes.focal_loss(logits, targets, 0.5, 0.0), plain / 2, rtol=1e-5)
    assert boxes.focal_loss(jnp.array(4.0), 1.0) < 1e-3 * boxes.focal_loss(jnp.array(-4.0), 1.0)


@pytest.mark.parametrize("kind", [detection.RetinaNet, pytest.param(detection.SSDLite, marks=pytest.mark.slow)])
def test_a_detector_detects(kind):
    model = kind(emov2.DetectorConfig(SHALLOW, num_classes=3, channels=8))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 64, 3)), jnp.float32)
    variables = random_variables(model, images)
    found = jax.jit(lambda v, x: model.detect(model.apply(v, x), 64, 64))(variables, images)
    assert found.boxes.shape[2] == 4 and ((found.boxes >= 0) & (found.boxes <= 64)).all()
    assert (jnp.diff(found.scores, axis=1) <= 0).all() and (found.classes < 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [detection.RetinaNet, detection.SSDLite])
def test_a_detector_learns(kind):
    config = emov2.DetectorConfig(SHALLOW, num_classes=3, channels=8, image_size=(64, 64))
    model = kind(config)
    batch = detection.example_inputs(config, 2) | detection.example_targets(config, 2)
    variables = random_variables(model, batch["images"])
    loss = detection.loss(model)

    @jax.jit
    def step(variables):
        def total(params):
            state = {"batch_stats": variables["batch_stats"]}
            value, (state, _) = loss(params, state, batch, {"dropout": jax.random.key(0)}, True)
            return value, state

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (value, state), gradients = step(variables)
    assert np.isfinite(value)
    backbone = gradients["backbone"]
    frozen = kind is detection.RetinaNet
    assert all(bool(np.any(x)) != frozen for x in jax.tree.leaves(backbone["stage_1_block_0"]["project"]["conv"]))
    assert np.any(backbone["stage_4_block_0"]["project"]["conv"]["kernel"])
    unchanged = jax.tree.map(np.array_equal, state["batch_stats"]["backbone"], variables["batch_stats"]["backbone"])
    assert all(jax.tree.leaves(unchanged))


# -------------------------------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("head", segmentation.HEADS)
def test_a_segmenter_gives_logits_and_a_loss(head):
    config = emov2.SegmenterConfig(SHALLOW, head, num_classes=3, channels=8, image_size=(64, 96))
    model = emov2.Segmenter(config)
    batch = heads.example_inputs(config, 2) | heads.example_targets(config, 2)
    batch["labels"][0, :10] = heads.IGNORED
    variables = random_variables(model, batch["images"])
    state = {"batch_stats": variables["batch_stats"]}
    loss = jax.jit(partial(heads.loss(model), train=False))
    value, (_, metrics) = loss(variables["params"], state, batch, {})
    assert np.isfinite(value) and 0 <= metrics["accuracy"] <= 1
    found = jax.eval_shape(model.apply, variables, batch["images"])
    small = head in segmentation.WITH_AUXILIARY
    assert found.logits.shape == (2, *((2, 3) if small else (16, 24)), 3)
    assert (found.auxiliary is not None) == small


def test_adaptive_pooling_is_pytorchs():
    x = jnp.arange(5.0).reshape(1, 5, 1, 1)
    np.testing.assert_allclose(adaptive_average_pool(x, 3)[0, :, 0, 0], [0.5, 2, 3.5])
    np.testing.assert_allclose(adaptive_average_pool(x, 6)[0, ::5, 0, 0], [0, 4])


# ---------------------------------------------------------------------------------------------------------------- DEMO


DEMO = generation.DemoConfig(32, 1, 2, latent_size=8, window=2, num_classes=3)


def test_the_loss_of_demo():
    model = generation.Demo(DEMO)
    batch = generation.example_inputs(DEMO, 2)
    variables = random_variables(model, *batch.values())
    rngs = {"noise": jax.random.key(0), "dropout": jax.random.key(1)}
    loss = generation.loss(model)

    state = {"batch_stats": variables["batch_stats"]}
    value, (_, metrics) = jax.jit(partial(loss, train=True))(variables["params"], state, batch, rngs)
    np.testing.assert_allclose(value, metrics["mse"] + metrics["bound"], rtol=1e-6)
    assert np.isfinite(value) and metrics["bound"] > 0


def test_sampling_gives_back_what_a_perfect_model_knows():
    # A model that knows the noise of one clean image: all steps back lead to it.
    clean = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4)), jnp.float32)

    class Perfect:
        config = DEMO

        def apply(self, variables, x, t, y):
            kept = jnp.asarray(generation._KEPT, jnp.float32)[t.astype(jnp.int32)][:, None, None, None]
            noise = (x - jnp.sqrt(kept) * clean) / jnp.sqrt(1 - kept)
            return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)

    for guidance in (1.0, 4.0):
        drawn = generation.sample(Perfect(), {}, jax.random.key(0), jnp.array([1]), steps=20, guidance=guidance)
        np.testing.assert_allclose(drawn, clean, atol=1e-3)


def test_noise_is_added_by_the_schedule():
    ones = jnp.ones((2, 2, 2, 1))
    noisy = generation.add_noise(ones, 0 * ones, jnp.array([0, 999]))
    np.testing.assert_allclose(noisy[:, 0, 0, 0], [0.99995, 0.00635], atol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dataclasses.replace(TINY, depths=(1, 1, 1)), "depths must have one entry a stage, four"),
        (lambda: dataclasses.replace(TINY, widths=(7, 8, 16, 24)), "the first width even"),
        (lambda: dataclasses.replace(TINY, operators=("far",)), "operators must be of"),
        (lambda: dataclasses.replace(TINY, kernels=(4, 5, 5, 5)), "kernels must be odd"),
        (lambda: dataclasses.replace(TINY, head_dims=(4, 4, 5, 12)), "16 channels of stage 3 are no whole heads of 5"),
        (lambda: dataclasses.replace(TINY, drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\)"),
        (lambda: dataclasses.replace(TINY, stem_stride=3), "stem_stride must be 1 or 2, got 3"),
        (lambda: emov2.EMOv2(TINY).init(jax.random.key(0), jnp.ones((1, 64, 64))), r"images must be \(batch, height"),
        (lambda: emov2.SegmenterConfig(TINY, "unet"), "head must be one of"),
        (lambda: dataclasses.replace(DEMO, hidden_size=30), "hidden_size must be a multiple of 4"),
        (
            lambda: generation.Demo(DEMO).init(
                jax.random.key(0), jnp.ones((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros(1, int)
            ),
            r"latent must be \(batch, 8, 8, 4\)",
        ),
        (lambda: generation.sample(generation.Demo(DEMO), {}, None, jnp.zeros(1, int), steps=0), "steps must be in"),
        (lambda: zoo.create("emov2_6m"), "emov2_5m"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_the_programs_for_a_tpu_and_a_gpu_hold_the_kernel():
    model = emov2.EMOv2(dataclasses.replace(TINY, depths=(1, 1, 2, 1)))
    images = jax.ShapeDtypeStruct((2, 96, 96, 3), jnp.float32)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    kernels = {"tpu-v5e": "spanning_window_forward", "h100": "spanning_window_gpu_forward"}
    assert_holds_kernel(model.apply, [variables, images], kernels)


def test_a_kernel_does_the_attention():
    # The network's attention is the core's: two patterns of one window are twice attention.
    module = emov2.SpanningAttention(16, 4, window=3, activation="relu")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 3, 8)), jnp.float32)
    variables = random_variables(module, x)
    p = variables["params"]
    q, k = (y.reshape(1, 9, 2, 4) for y in jnp.split(x @ p["qk"]["kernel"] + p["qk"]["bias"], 2, axis=-1))
    v = jax.nn.relu(x @ p["value"]["kernel"] + p["value"]["bias"]).reshape(1, 9, 2, 8)
    expected = 2 * attention(q, k, v).reshape(1, 3, 3, 16)
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
def test_mask_rcnn_leaves_the_first_stage_and_the_statistics_if_pretrained(pretrained):
    design = dataclasses.replace(mask_rcnn.MASK_RCNN, proposals=16, sampled_anchors=16, sampled_regions=16)
    config = mask_rcnn.FrozenConfig(SHALLOW, 3, 8, design, pretrained=pretrained)
    model = detection.EMOv2MaskRCNN(config)
    batch = mask_rcnn.example_inputs(config, 1) | mask_rcnn.example_targets(config, 1)
    variables = random_variables(model, batch["images"], batch["regions"])
    loss = mask_rcnn.loss(model)

    @jax.jit
    def gradients(params):
        state = {"batch_stats": variables["batch_stats"]}
        return jax.grad(lambda p: loss(p, state, batch, {"dropout": jax.random.key(0)}, True), has_aux=True)(params)

    gradient, (state, _) = gradients(variables["params"])
    backbone = gradient["detector"]["backbone"]
    for name in ("stem_0", "stage_1_block_0"):
        assert any(bool(np.any(x)) for x in jax.tree.leaves(backbone[name])) != pretrained
    assert np.any(backbone["stage_2_block_0"]["project"]["conv"]["kernel"])
    same = jax.tree.map(np.array_equal, nn.meta.unbox(state["batch_stats"]), variables["batch_stats"])
    assert all(jax.tree.leaves(same)) == pretrained

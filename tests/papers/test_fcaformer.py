"""FcaFormer: sizes, names, one softmax over two sources, cross tokens, windows, folding, groups of layers."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from kernels import attention
from tests.kernels.compile import assert_holds_kernel
from tests.parameters import random_parameters
from zoo import registry, train
from zoo.papers import fcaformer
from zoo.papers.fcaformer.dense import DenseConfig
from zoo.papers.fcaformer.model import _join, _partition
from zoo.weights import names

SMALL = fcaformer.FcaFormerConfig(
    (1, 0, 2, 2), (8, 12, 16, 24), (2, 3), num_classes=5, image_size=(80, 80), layer_scale=0.5
)
PLAIN = fcaformer.PlainConfig(depth=2, width=16, heads=2, patch=8, num_classes=5, image_size=(40, 40), layer_scale=0.5)
SHALLOW = DenseConfig(
    (1, 1, 2, 1), (8, 12, 16, 24), (2, 3), windows=(3, 2), out_widths=(8, 8, 12, 16), drop_path_rate=0.0
)


@functools.cache
def shapes_of(id):
    model, inputs = zoo.create(id), zoo.example_inputs(id, 1)
    return model, inputs, nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_variables(model, *arguments):
    variables = random_parameters(model, *arguments)
    positive = lambda path, x: jnp.abs(x) + 0.5 if path[-1].key == "var" else x  # noqa: E731
    return {**variables, "batch_stats": jax.tree.map_with_path(positive, variables["batch_stats"])}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def small():
    model = fcaformer.FcaFormer(SMALL)
    images = normal(2, 80, 80, 3)
    return model, images, random_variables(model, images)


def test_the_plain_network_has_about_the_published_number_of_parameters():
    assert round(count(shapes_of("fcaformer_l0")[2]["params"]) / 1e6, 1) == 5.9


def test_dense_networks_have_the_published_sizes():
    shapes = shapes_of("upernet_fcaformer_l2")[2]["params"]
    found = [round(count(shapes[name]) / 1e6, 2) for name in ("backbone", "head", "auxiliary")]
    assert found == [16.33, 31.50, 0.92]


_SLOW = pytest.mark.slow


@pytest.mark.parametrize("id", ["fcaformer_l1", "mask_rcnn_fcaformer_l2", "upernet_fcaformer_l2"])
def test_published_names_go_in_and_out(id):
    model, _, shapes = shapes_of(id)
    table = registry.model(id).weight_rules(model.config)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    published = names.to_published(variables, table)
    back = names.convert(published, table, shapes)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    prefix = "" if id == "fcaformer_l1" else "backbone."
    heads, length = (6, 80) if id == "fcaformer_l1" else (10, 80)
    assert published[f"{prefix}layer_2.blocks.5.s_token_bias"].shape == (1, heads, 1, length)
    with pytest.raises(names.NameMapError, match="surprise"):
        names.convert(published | {f"{prefix}layer_2.surprise": np.zeros(1)}, table, shapes)


def test_two_sources_are_one_softmax_over_both():
    query, key, value = (normal(2, 6, 3, 4, seed=i) for i in range(3))
    cross_key, cross_value = (normal(2, 5, 3, 4, seed=i) for i in (3, 4))
    bias, cross_bias = normal(3, 6, 6, seed=5), normal(3, 5, seed=6)

    def whole(query, key, value, cross_key, cross_value, bias, cross_bias):
        both = jnp.concatenate([bias, jnp.broadcast_to(cross_bias[:, None], (3, 6, 5))], axis=-1)
        keys, values = jnp.concatenate([key, cross_key], 1), jnp.concatenate([value, cross_value], 1)
        return attention(query, keys, values, bias=both[None], implementation="reference")

    operands = (query, key, value, cross_key, cross_value, bias, cross_bias)
    weigh = normal(2, 6, 3, 4, seed=7)
    found, shares = fcaformer.two_source_attention(*operands)
    np.testing.assert_allclose(found, whole(*operands), atol=1e-5)
    assert shares.shape == (2, 3, 6) and shares.min() > 0 and shares.max() < 1
    ours = jax.grad(lambda x: jnp.vdot(fcaformer.two_source_attention(*x)[0], weigh))(operands)
    expected = jax.grad(lambda x: jnp.vdot(whole(*x), weigh))(operands)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, expected)


def test_a_factor_s_sign_alone_matters_and_behind_the_norm_its_size_too():
    block = fcaformer.FcaBlock(2, (4, 4), sources=2)
    x, cross = normal(1, 4, 4, 8), 100 * normal(1, 2, 8, seed=1)  # so large that the norm's epsilon is nothing
    variables = random_variables(block, x, cross)
    run = {after: jax.jit(block.clone(factors_after_norm=after).apply) for after in (False, True)}

    def out(factor, after=False):
        params = {**variables["params"], "factors": jnp.array([factor, 1.0])}
        return run[after]({**variables, "params": params}, x, cross)[0]

    np.testing.assert_allclose(out(3.0), out(1.0), atol=1e-4)
    assert np.abs(out(-1.0) - out(1.0)).max() > 1e-2
    assert np.abs(out(3.0, after=True) - out(1.0, after=True)).max() > 1e-2


def test_cross_tokens_are_of_the_stage_the_oldest_first_and_at_most_so_many():
    params = shapes_of("fcaformer_l3")[2]["params"]["trunk"]
    lengths = [params["stage_2"][f"block_{i}"].get("factors", jnp.zeros(0)).shape[0] for i in range(12)]
    assert lengths == [16 * i for i in range(12)]
    assert [params["stage_3"][f"block_{i}"].get("factors", jnp.zeros(0)).shape[0] for i in range(3)] == [0, 4, 8]
    assert "merge" not in params["stage_2"]["block_11"] and "merge" in params["stage_2"]["block_10"]
    config = dataclasses.replace(SMALL, cross_depth=1)
    stage = fcaformer.FcaStage(3, 2, (5, 5), config)
    x = normal(1, 5, 5, 16)
    variables = random_variables(stage, x)
    block = fcaformer.FcaBlock(2, (5, 5), layer_scale=0.5)
    part = lambda i: {name: tree[f"block_{i}"] for name, tree in variables.items()}  # noqa: E731
    y, first = jax.jit(block.apply)(part(0), x)
    later = jax.jit(block.clone(sources=1).apply)
    y, second = later(part(1), y, first)
    y, last = jax.jit(block.clone(sources=1, emit=False).apply)(part(2), y, second)  # the newest, not the first
    assert last is None and second.shape == (1, 4, 16)
    np.testing.assert_allclose(jax.jit(stage.apply)(variables, x), y, atol=1e-5)


def test_cross_tokens_are_taken_before_the_enhancement_which_has_no_skip():
    block = fcaformer.FcaBlock(2, (4, 4))
    x = normal(1, 4, 4, 8)
    variables = random_variables(block, x)
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    params["enhance"]["conv"]["kernel"] *= 0
    apply = jax.jit(block.apply)
    other, left = apply({**variables, "params": params}, x)
    np.testing.assert_array_equal(left, apply(variables, x)[1])
    # What is left does not depend on x: all places are alike.
    np.testing.assert_allclose(other, jnp.broadcast_to(other[:, :1, :1], other.shape), atol=1e-6)


def test_parts_can_be_taken_away():
    config = dataclasses.replace(SMALL, cross_depth=0, enhance=False)
    params = jax.eval_shape(fcaformer.FcaFormer(config).init, jax.random.key(0), jnp.zeros((1, 80, 80, 3)))["params"]
    block = set(params["trunk"]["stage_2"]["block_1"])
    assert not block & {"merge", "enhance", "factors", "cross_bias", "cross_norm"} and "bias" in block


def test_windows_are_put_back():
    x = normal(2, 5, 7, 3)
    for first in (True, False):
        windows, (top, left) = _partition(x, 4, first)
        assert windows.shape == (8, 4, 4, 3)
        np.testing.assert_array_equal(_join(windows, x.shape, top, left), x)
    # The padding is before: a window's corner holds nothing.
    assert not _partition(x, 4, True)[0][0, 0, 0].any() and _partition(x, 4, False)[0][0, 0, 0].any()


def test_one_window_is_the_whole_map():
    x = normal(1, 4, 4, 16)
    stage = fcaformer.FcaStage(2, 2, (4, 4), SMALL)
    variables = random_variables(stage, x)
    windowed, whole = (jax.jit(network.apply)(variables, x) for network in (stage.clone(window=4), stage))
    np.testing.assert_allclose(windowed, whole, atol=1e-5)


@pytest.mark.parametrize("config", [pytest.param(SMALL, marks=_SLOW), PLAIN], ids=["hybrid", "plain"])
def test_folding_changes_nothing(config):
    kind = fcaformer.FcaFormer if config is SMALL else fcaformer.PlainFcaFormer
    model, images = kind(config), normal(2, *config.image_size, 3)
    variables = random_variables(model, images)
    folded = fcaformer.fold(variables, config)
    assert "batch_stats" not in folded
    paths = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(folded)}
    assert "matrix" in paths and "table" not in paths
    forward = jax.jit(model.apply)
    expected = forward(variables, images)
    np.testing.assert_allclose(forward(folded, images), expected, atol=2e-5 * float(jnp.std(expected)))
    with pytest.raises(ValueError, match="use the original variables"):
        jax.eval_shape(model.apply, folded, jnp.zeros((1, 120, 120, 3)))


def test_any_image_size(small):
    model, _, variables = small
    for size in ((64, 64), (65, 100), (31, 130)):
        images = jax.ShapeDtypeStruct((1, *size, 3), "float32")
        maps = jax.eval_shape(partial(model.apply, method="features"), variables, images)
        assert [x.shape[1:3] for x in maps] == [tuple(-(-s // stride) for s in size) for stride in (4, 8, 16, 32)]


def test_shares_and_factors_are_found(small):
    model, images, variables = small
    shares = jax.eval_shape(partial(fcaformer.cross_shares, model), variables, images)
    assert set(shares) == {"trunk/stage_2/block_1", "trunk/stage_3/block_1"}
    assert shares["trunk/stage_2/block_1"].shape == (2, 2, 25)
    found = fcaformer.factors(variables)
    assert set(found) == set(shares) and found["trunk/stage_2/block_1"].shape == (4,)


def test_the_loss_trains_and_the_dense_networks_learn_in_windows():
    model = fcaformer.FcaFormerDense(SHALLOW)
    images = normal(1, 40, 56, 3)
    variables = random_variables(model, images)
    maps, _ = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
    assert [x.shape for x in maps] == [(1, 10, 14, 8), (1, 5, 7, 8), (1, 3, 4, 12), (1, 2, 2, 16)]
    assert all(np.isfinite(x).all() for x in maps)


def test_groups_of_layers_and_their_steps():
    params = shapes_of("fcaformer_l2_dense")[2]["params"]
    groups = fcaformer.layer_groups(params)
    trunk = groups["trunk"]
    assert trunk["stem_0"]["conv"]["kernel"] == 0 and trunk["stage_1_block_1"]["expand"]["bias"] == 2
    assert [trunk["stage_2"][f"block_{b}"]["query"]["kernel"] for b in range(7)] == [3, 3, 3, 4, 4, 4, 5]
    assert trunk["stage_2"]["block_6"]["factors"] == trunk["stage_3"]["block_1"]["cross_bias"] == 0
    assert trunk["stage_3"]["block_0"]["bias"]["table"] == 6 and groups["out_3"]["kernel"] == 7
    assert [trunk[f"down_{i}"]["conv_1"]["conv"]["kernel"] for i in range(3)] == [0, 2, 3]
    stages = fcaformer.layer_groups(params, by="stage")
    assert stages["trunk"]["stage_2"]["block_6"]["query"]["kernel"] == 3 and stages["norm_0"]["bias"] == 7
    with pytest.raises(ValueError, match="by must be 'layer' or 'stage', got 'block'"):
        fcaformer.layer_groups(params, by="block")
    step = optax.chain(optax.sgd(1.0), train.layerwise_decay({"a": 5, "b": 7}, 0.5))
    ones = {"a": jnp.ones(2), "b": jnp.ones(3)}
    updates, _ = step.update(ones, step.init(ones), ones)
    assert updates["a"][0] == -0.25 and updates["b"][0] == -1
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 0"):
        train.layerwise_decay(groups, 0)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (SMALL, {"widths": (7, 8, 8, 9)}, "the first even"),
        (SMALL, {"depths": (1, 1)}, "depths must have one number a stage"),
        (SMALL, {"heads": (3, 3)}, "heads must divide their stage's width, got 3 heads and 16 channels"),
        (SMALL, {"stem_stride": 3}, "stem_stride must be 2 or 4, got 3"),
        (SMALL, {"cross_depth": -1}, "cross_depth must be None or not negative"),
        (SMALL, {"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        (PLAIN, {"image_size": (41, 40)}, "image_size must be a multiple of the patch, 8"),
        (SHALLOW, {"windows": (0, 7)}, "windows must be two positive sides"),
    ],
)
def test_wrong_configs_say_so(config, options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **options)


def test_wrong_input_says_so():
    init = partial(jax.eval_shape, fcaformer.FcaFormer(SMALL).init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\), got \(2, 64, 64\)"):
        init(jnp.zeros((2, 64, 64)))
    with pytest.raises(TypeError, match="floating point and normalised, got uint8"):
        init(jnp.zeros((2, 64, 64, 3), jnp.uint8))
    block = fcaformer.FcaBlock(2, (4, 4), sources=2)
    with pytest.raises(ValueError, match="expected 2 cross tokens of 2 blocks on a map of 4 x 4, got 3"):
        jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 3, 8)))


@_SLOW
def test_the_programs_for_a_tpu_and_a_gpu_hold_the_kernel():
    block = fcaformer.FcaBlock(10, (14, 14), sources=3)
    x, cross = (jax.ShapeDtypeStruct(size, jnp.float32) for size in ((2, 14, 14, 320), (2, 48, 320)))
    variables = nn.unbox(jax.eval_shape(block.init, jax.random.key(0), x, cross))
    kernels = {"tpu-v5e": "attention_forward", "h100": "attention_gpu_forward"}
    assert_holds_kernel(block.apply, [variables, x, cross], kernels)

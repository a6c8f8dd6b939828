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
from zoo.layers.conv_norm import fold
from zoo.layers.regions import roi_align
from zoo.papers import mobilevig
from zoo.papers.mobilevig import MobileViG, MobileViGConfig, MobileViGFeatures, svga_aggregate
from zoo.papers.mobilevig.weights import rules
from zoo.weights import names

SMALL = MobileViGConfig((1, 0, 1), (8, 8, 16), 2, 16, 16, num_classes=5, image_size=(96, 96))


@functools.cache
def shapes_of(id):
    entry = registry.model(id)
    model = zoo.create(id)
    inputs = entry.example_inputs(model.config, 1)
    return model, inputs, nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)))


@pytest.fixture(scope="module")
def small():
    model = MobileViG(SMALL)
    images = mobilevig.model.example_inputs(SMALL, 2)["images"]
    variables = random_parameters(model, images)
    stats = jax.tree.map_with_path(
        lambda path, leaf: 0.5 + jnp.abs(leaf) if path[-1].key == "var" else leaf, variables["batch_stats"]
    )
    return model, images, {**variables, "batch_stats": stats}


@pytest.mark.parametrize("id", [*(f"mobilevig_{size}" for size in ("ti", "s", "m", "b")), "mask_rcnn_mobilevig_m"])
def test_parameter_counts_are_the_published_ones(id):
    _, _, shapes = shapes_of(id)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == registry.model(id).variant.parameters


def test_the_dense_backbone_is_the_classifier_s_body():
    _, _, shapes = shapes_of("mobilevig_ti_dense")
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == registry.model("mobilevig_ti_dense").variant.parameters


@pytest.mark.parametrize(
    "shape, hop, dtype",
    [
        ((7, 7), 2, "float32"),
        ((12, 9), 3, "bfloat16"),
        ((8, 12), 2, "float32"),
        ((25, 10), 3, "float32"),
        ((5, 1), 1, "float32"),
        ((3, 4), 5, "float32"),
    ],
)
def test_minima_give_the_loop_s_bits_forward_and_backward(shape, hop, dtype):
    random = np.random.default_rng(0)
    # No two pixels of a channel are equal (whose share of the gradient would be a matter of taste), and gradients are
    # small integers, so that sums are exact in any order.
    values = np.stack([random.permutation(256)[: shape[0] * shape[1]] for _ in range(4)], -1) - 128
    scale = 1 if dtype == "bfloat16" else 0.1
    x = jnp.asarray(values.reshape(1, *shape, 4) * scale, dtype)
    d_out = jnp.asarray(random.integers(-1, 2, x.shape), dtype)

    @partial(jax.jit, static_argnums=1)
    def both(x, implementation):
        out, transpose = jax.vjp(partial(svga_aggregate, hop=hop, implementation=implementation), x)
        return out, transpose(d_out)[0]

    for ours, theirs in zip(both(x, "min"), both(x, "loop"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_map_rolls_down_and_right():
    x = jnp.zeros((1, 7, 7, 1)).at[0, 3, 3, 0].set(-1.0)
    linked = svga_aggregate(x, 2)[0, :, :, 0] > 0
    for row in range(7):
        for column in range(7):
            expected = mobilevig.neighbours_of(row, column, 7, 7, 2)[3, 3] and (row, column) != (3, 3)
            assert linked[row, column] == expected
    assert linked[5, 3] and linked[0, 3] and not linked[1, 3]  # 2 rows below, and 4 and 6 around the edge
    offset = mobilevig.where_most_differs(x, 2)[0, :, :, 0]
    assert tuple(offset[5, 3]) == (-2, 0) and tuple(offset[3, 5]) == (0, -2) and tuple(offset[3, 3]) == (0, 0)


def test_nearest_neighbours_are_found_by_direction():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    nodes = x.reshape(2, 12, 5)
    unit = nodes / np.linalg.norm(nodes, axis=-1, keepdims=True)
    nearest = np.argsort(-(unit @ unit.swapaxes(1, 2)), -1)[..., :3]
    expected = np.stack([(nodes[b][nearest[b]] - nodes[b][:, None]).max(1) for b in range(2)])
    np.testing.assert_allclose(mobilevig.knn_aggregate(jnp.asarray(x), 3), expected.reshape(x.shape), atol=1e-6)
    with pytest.raises(ValueError, match=r"neighbours must be in 1 \.\. 12 pixels, got 13"):
        mobilevig.knn_aggregate(jnp.asarray(x), 13)


def test_folding_changes_nothing(small):
    model, images, variables = small
    forward = jax.jit(model.apply)
    expected, folded = forward(variables, images), forward(fold(variables), images)
    assert "batch_stats" not in fold(variables)
    np.testing.assert_allclose(folded, expected, atol=1e-5 * float(jnp.std(expected)))


def test_evaluation_averages_both_heads_and_training_returns_them(small):
    model, images, variables = small
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 16))
    both = model.apply(variables, x, method="classify")
    each = []
    for kept in ("head", "dist_head"):
        params = {**variables["params"], "head": variables["params"][kept]}
        single = MobileViG(dataclasses.replace(SMALL, distillation=False))
        params.pop("dist_head")
        each.append(single.apply({**variables, "params": params}, x, method="classify"))
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, atol=1e-5)
    train = partial(model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    (head, dist_head), _ = jax.eval_shape(train, variables, images)
    assert head.shape == dist_head.shape == (2, 5)


def test_any_image_size(small):
    model, _, variables = small
    for size in ((64, 64), (65, 100), (31, 32), (1, 1)):
        images = jax.ShapeDtypeStruct((1, *size, 3), "float32")
        maps = jax.eval_shape(partial(model.apply, method="features"), variables, images)
        assert [x.shape[1:3] for x in maps] == [tuple(-(-s // stride) for s in size) for stride in (4, 8, 16, 32)]


def test_frozen_norms_keep_their_statistics(small):
    _, images, variables = small
    inside = {name: tree["body"] for name, tree in variables.items()}
    model = MobileViGFeatures(dataclasses.replace(SMALL, drop_path_rate=0.0), frozen=True)
    maps, state = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(inside, images)
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], dict(inside["batch_stats"]))
    expected = jax.jit(model.apply)(inside, images)
    np.testing.assert_allclose(maps[-1], expected[-1], atol=1e-5 * float(jnp.std(expected[-1])))


def test_published_names_go_in_and_out(small):
    _, _, variables = small
    table = rules(SMALL)
    published = names.to_published(variables, table)
    assert published["local_backbone.0.layer_scale_2"].shape == (8, 1, 1)
    back = names.convert(published, table, variables)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    with pytest.raises(names.NameMapError, match="surprise"):
        names.convert(published | {"backbone.0.2.surprise": np.zeros(1)}, table, variables)


def test_kaiming_initialisation():
    kernel = jax.jit(MobileViGFeatures(SMALL).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    block = nn.unbox(kernel)["local_0"]
    assert float(block["depthwise"]["conv"]["kernel"].std()) == pytest.approx((2 / 9) ** 0.5, rel=0.15)
    assert not block["project"]["conv"]["bias"].any() and (block["project"]["layer_scale"]["scale"] == 1e-5).all()


def test_regions_are_averages_of_bilinear_samples():
    """A map that rises linearly has each bin's middle as its average, whatever the number of samples."""
    y, x = jnp.meshgrid(jnp.arange(32.0), jnp.arange(40.0), indexing="ij")
    maps = [jnp.stack([y, x], -1)] + [jnp.zeros((32 >> i, 40 >> i, 2)) for i in (1, 2, 3)]
    region = jnp.array([[20.0, 10.0, 90.0, 66.0]])
    got = jax.jit(partial(roi_align, size=7))(maps, region)[0]
    middles = [(low + (np.arange(7) + 0.5) * (high - low) / 7) / 4 - 0.5 for low, high in ((10, 66), (20, 90))]
    np.testing.assert_allclose(got[:, :, 0], np.broadcast_to(middles[0][:, None], (7, 7)), atol=1e-4)
    np.testing.assert_allclose(got[:, :, 1], np.broadcast_to(middles[1], (7, 7)), atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"widths": (7, 8, 8)}, "the first even"),
        ({"depths": (1, 1)}, "depths must have one number a local stage"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"hop": 0}, "hop must be at least 1, got 0"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_images_say_so():
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\), got \(2, 64, 64\)"):
        MobileViG(SMALL).init(jax.random.key(0), jnp.zeros((2, 64, 64)))
    with pytest.raises(TypeError, match="floating point and normalised, got uint8"):
        MobileViG(SMALL).init(jax.random.key(0), jnp.zeros((2, 64, 64, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"a map must be \(batch, height, width, channels\), got \(3, 3\)"):
        svga_aggregate(jnp.zeros((3, 3)), 2)

"""The encoder and the vision Transformer."""

import dataclasses
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.backbones import Encoder, EncoderConfig, ViT, ViTConfig
from zoo.layers.positions import resize_grid, sinusoid_grid

_SMALL = {"features": 16, "layers": 2, "heads": 4, "mlp_features": 24}
ENCODERS = {
    "pre": EncoderConfig(**_SMALL),
    "post": EncoderConfig(**_SMALL, norm_position="post", norm_epsilon=1e-12),
    "rotary": EncoderConfig(**_SMALL, positions="rotary", window=3, norm="rms", mlp="geglu"),
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)
VIT = ViTConfig(**_SMALL, image_size=(8, 12), patch=(4, 2), classes=5)


def features(seed: int = 0, length: int = 7) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def images(height: int = 8, width: int = 12) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, height, width, 3))


@cache
def encoder_parameters(name: str):
    return random_parameters(Encoder(ENCODERS[name]), features())


@cache
def encode(name: str):
    return jax.jit(Encoder(ENCODERS[name]).apply)


def vit(images: jax.Array, **changes) -> tuple[dict, jax.Array]:
    model = ViT(dataclasses.replace(VIT, **changes))
    variables = random_parameters(model, jnp.zeros((1, 8, 12, 3)))
    return variables, jax.jit(model.apply)(variables, images)


def layer_norm(x, weights, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * weights["scale"] + weights["bias"]


@pytest.mark.parametrize("name", ["pre", "post"])
def test_equals_the_blocks_formula(name):
    config, weights = ENCODERS[name], encoder_parameters(name)["params"]
    x = features()
    for layer in range(2):
        block = weights[f"layer_{layer}"]
        mixer, mlp = config.make_mixer(layer), block["mlp"]

        def mix(x, mixer=mixer, block=block):
            return mixer.apply({"params": block["mixer"]}, x)[0]

        def feed_forward(x, mlp=mlp):
            hidden = jax.nn.gelu(x @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
            return hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]

        def norm(x, number, block=block):
            return layer_norm(x, block[f"norm{number}"], config.norm_epsilon)

        if name == "pre":
            x = x + mix(norm(x, 1))
            x = x + feed_forward(norm(x, 2))
        else:
            x = norm(x + mix(x), 1)
            x = norm(x + feed_forward(x), 2)
    if name == "pre":
        x = layer_norm(x, weights["norm"], config.norm_epsilon)
    np.testing.assert_allclose(encode(name)(encoder_parameters(name), features()), x, atol=5e-5)


@every_encoder
def test_every_token_sees_both_sides(name):
    before = encode(name)(encoder_parameters(name), features())
    after = encode(name)(encoder_parameters(name), features().at[:, 3, 0].add(1.0))
    assert float(jnp.abs(before - after).max(axis=(0, 2))[jnp.array([1, 2, 4, 5])].min()) > 1e-4


@every_encoder
def test_padding_changes_nothing(name):
    valid = jnp.arange(7)[None] < jnp.array([[7], [4]])
    y = encode(name)(encoder_parameters(name), features(), valid=valid)
    assert bool(jnp.isfinite(y).all())
    alone = encode(name)(encoder_parameters(name), features()[:, :4])
    np.testing.assert_allclose(y[1, :4], alone[1], atol=5e-5)


def test_without_positions_a_permutation_of_tokens_permutes_the_output():
    order = jnp.array([3, 0, 6, 2, 1, 5, 4])
    y = encode("pre")(encoder_parameters("pre"), features())
    permuted = encode("pre")(encoder_parameters("pre"), features()[:, order])
    np.testing.assert_allclose(permuted, y[:, order], atol=5e-5)


def test_drop_path_drops_the_branches_of_whole_examples():
    model = Encoder(dataclasses.replace(ENCODERS["post"], drop_path=0.9))
    variables = encoder_parameters("post")
    x = jnp.tile(features()[:1], (64, 1, 1))
    y = model.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    outcomes = np.unique(np.asarray(y[:, 0, 0]).round(4))
    assert 2 <= len(outcomes) <= 4  # the last block has two branches, the first has a rate of zero


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (ValueError, r"features = 16\), got \(2, 7, 8\)", jnp.zeros((2, 7, 8))),
        (ValueError, r"got \(7, 16\)", jnp.zeros((7, 16))),
        (TypeError, "floating point, got int32", jnp.zeros((2, 7, 16), jnp.int32)),
    ],
)
def test_wrong_features_are_refused(error, message, x):
    with pytest.raises(error, match=message):
        Encoder(ENCODERS["pre"]).apply(encoder_parameters("pre"), x)


@pytest.mark.parametrize(
    ("preset", "count"),
    [("vit_ti16", 5_717_416), ("vit_s16", 22_050_664), ("vit_b16", 86_567_656), ("vit_l16", 304_326_632)],
)
def test_published_sizes(preset, count):
    config = ViTConfig.preset(preset)
    variables = jax.eval_shape(ViT(config).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count
    width, patches = config.features, 14 * 14  # the formula of the module's docstring
    blocks = config.layers * (12 * width**2 + 13 * width)
    assert count == blocks + (3 * 16**2 + 1) * width + (patches + 2) * width + 2 * width + (width + 1) * 1000


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sinusoid", "rotary", "none"])
def test_equals_its_parts(pool, positions):
    variables, logits = vit(images(), pool=pool, positions=positions)
    weights = variables["params"]
    patches = images().reshape(2, 2, 4, 6, 2, 3).swapaxes(2, 3).reshape(2, 12, 24)
    projection = weights["patch_embed"]["projection"]
    x = patches @ projection["kernel"].reshape(24, 16) + projection["bias"]
    if positions == "sinusoid":
        x = x + sinusoid_grid(2, 6, 16)
    if pool == "class":
        x = jnp.concatenate([jnp.tile(weights["class_token"], (2, 1, 1)), x], axis=1)
    if positions == "learned":
        x = x + weights["positions"]
    encoder = Encoder(dataclasses.replace(VIT, pool=pool, positions=positions))
    x = jax.jit(encoder.apply)({"params": weights["encoder"]}, x)
    x = x[:, 0] if pool == "class" else x.mean(axis=1)
    np.testing.assert_allclose(logits, x @ weights["head"]["kernel"] + weights["head"]["bias"], atol=5e-5)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_other_resolutions_interpolate_the_positions_of_patches(pool):
    model = ViT(dataclasses.replace(VIT, pool=pool))
    variables = random_parameters(model, images())
    special = int(pool == "class")
    table = variables["params"]["positions"]
    resized = jnp.concatenate([table[:, :special], resize_grid(table[:, special:], (2, 6), (4, 4))], axis=1)
    other = ViT(dataclasses.replace(VIT, pool=pool, image_size=(16, 8)))
    moved = {"params": variables["params"] | {"positions": resized}}
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, images(16, 8)), jax.jit(other.apply)(moved, images(16, 8)), rtol=0, atol=1e-5
    )


def test_without_classes_the_pooled_features_come_out():
    variables, pooled = vit(images(), classes=None)
    assert "head" not in variables["params"]
    hidden = ViT(dataclasses.replace(VIT, classes=None)).apply(variables, images(), method="hidden")
    assert hidden.shape == (2, 13, 16)
    np.testing.assert_allclose(pooled, hidden[:, 0], atol=1e-5)


def test_initial_logits_are_zero():
    logits, _ = jax.jit(ViT(VIT).init_with_output)(jax.random.key(0), images())
    np.testing.assert_array_equal(logits, 0)


def test_gradients_are_finite_and_reach_every_parameter():
    model = ViT(dataclasses.replace(VIT, remat=True, qkv_bias=False))
    variables = random_parameters(model, images())
    gradients = jax.jit(jax.grad(lambda v: -jax.nn.log_softmax(model.apply(v, images()))[:, 0].mean()))(variables)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert bool(jnp.isfinite(gradient).all()) and float(jnp.abs(gradient).max()) > 1e-8, jax.tree_util.keystr(path)


def test_every_parameter_has_logical_axis_names():
    boxes = jax.tree.leaves(
        jax.eval_shape(ViT(VIT).init, jax.random.key(0), images()),
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("unknown choice of pool 'max'; known: class, mean", {"pool": "max"}),
        (r"image_size \(8, 13\) does not divide into patches of \(4, 2\)", {"image_size": (8, 13)}),
        ("multiple of 4, got 18", {"features": 18, "heads": 2, "positions": "sinusoid"}),
        ("classes must be positive, got 0", {"classes": 0}),
        ("unknown mixer 'basd'", {"mixer": "basd"}),
        ("unknown choice of positions 'learnt'; did you mean 'learned'", {"positions": "learnt"}),
    ],
)
def test_wrong_configs_are_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VIT, **changes)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="unknown preset of ViTConfig 'vit_b_16'; did you mean 'vit_b16'"):
        ViTConfig.preset("vit_b_16")


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (ValueError, r"images must be \(batch, height, width, 3\), got \(8, 12, 3\)", jnp.zeros((8, 12, 3))),
        (ValueError, r"got \(2, 3, 8, 12\)", jnp.zeros((2, 3, 8, 12))),
        (TypeError, "floating point and normalised, got uint8", jnp.zeros((2, 8, 12, 3), jnp.uint8)),
        (ValueError, "9 x 12 pixels do not divide", jnp.zeros((2, 9, 12, 3))),
    ],
)
def test_wrong_images_are_refused(error, message, x):
    with pytest.raises(error, match=message):
        ViT(VIT).init(jax.random.key(0), x)

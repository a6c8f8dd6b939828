import dataclasses
import functools
import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import zoo
from tests.parameters import random_parameters
from zoo import registry
from zoo.layers.conv_norm import fold
from zoo.layers.offset_bias import OffsetBias, offset_index
from zoo.layers.resizing import resize_bicubic
from zoo.papers import efficientformer
from zoo.papers.efficientformer import EfficientFormer, EfficientFormerConfig, search
from zoo.papers.efficientformer.weights import rules
from zoo.weights import names

SMALL = EfficientFormerConfig(
    depths=(1, 1, 1, 2), widths=(8, 8, 16, 16), image_size=(64, 64), num_classes=5, heads=2, key_dim=4, value_dim=16
)  # fmt: skip


def shapes_of(model, batch=1):
    inputs = registry.model("efficientformer_l1").example_inputs(model.config, batch)
    return inputs, nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)))


def positive(variables):
    """Random variables with running variances that are positive."""
    stats = jax.tree.map_with_path(
        lambda path, leaf: 0.5 + jnp.abs(leaf) if path[-1].key == "var" else leaf, variables["batch_stats"]
    )
    return {**variables, "batch_stats": stats}


@pytest.fixture(scope="module")
def small():
    model = EfficientFormer(SMALL)
    images = efficientformer.example_inputs(SMALL, 2)["images"]
    return model, images, positive(random_parameters(model, images))


@pytest.mark.parametrize("id", zoo.list_models("efficientformer*"))
def test_parameter_counts_are_the_published_ones(id):
    _, shapes = shapes_of(zoo.create(id))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == (registry.model(id).variant.parameters or count)


def test_stages_end_as_published():
    """L7's whole last stage is on tokens; published entries are numbered past the flattening."""
    config = zoo.create("efficientformer_l7").config
    published = {rule.published for rule in rules(config)}
    assert r"network\.6\.1\.token_mixer\.qkv\.weight" in published
    assert not any(isinstance(name, str) and name.startswith(r"network\.6\.0\.") for name in published)
    config = zoo.create("efficientformer_l1").config
    published = {rule.published for rule in rules(config)}
    assert r"network\.6\.2\.mlp\.fc1\.weight" in published and r"network\.6\.4\.token_mixer\.qkv\.weight" in published


def test_one_reshape_in_the_network():
    model = EfficientFormer(dataclasses.replace(SMALL, vit_num=2))
    inputs, shapes = shapes_of(model)
    jaxpr = jax.make_jaxpr(lambda variables: model.apply(variables, inputs["images"], method="features"))(shapes).jaxpr
    reshapes = [e.invars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "reshape"]
    assert [shape for shape in reshapes if shape == (1, 2, 2, 16)] == [(1, 2, 2, 16)]


def test_evaluation_averages_both_heads_and_training_returns_them(small):
    model, images, variables = small
    params = variables["params"]
    features = jax.jit(partial(model.apply, method="features"))(variables, images)[-1]
    x = nn.LayerNorm(epsilon=1e-5).apply({"params": params["norm"]}, features).mean(1)
    each = [x @ params[name]["kernel"] + params[name]["bias"] for name in ("head", "dist_head")]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), sum(each) / 2, atol=1e-5)
    train = partial(model.apply, train=True, mutable=["batch_stats"])
    (head, dist_head), _ = jax.eval_shape(train, variables, images)
    assert head.shape == dist_head.shape == (2, 5)
    _, shapes = shapes_of(EfficientFormer(dataclasses.replace(SMALL, distillation=False)))
    assert "dist_head" not in shapes["params"]


@pytest.mark.parametrize(
    "model",
    [
        EfficientFormer(SMALL),
        efficientformer.EfficientFormerDense(
            efficientformer.DenseConfig(**{**dataclasses.asdict(SMALL), "image_size": (96, 96)})
        ),
    ],
    ids=["classifier", "dense"],
)
def test_folding_changes_nothing(model):
    images = efficientformer.example_inputs(SMALL, 2)["images"]
    variables = positive(random_parameters(model, images))
    forward = jax.jit(model.apply)
    expected, folded = forward(variables, images), forward(fold(variables), images)
    assert "batch_stats" not in fold(variables)
    scale = max(float(jnp.std(leaf)) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), folded, expected)


def test_any_image_size(small):
    model, _, variables = small
    for size in ((64, 64), (65, 100), (31, 32), (1, 1)):
        images = jax.ShapeDtypeStruct((1, *size, 3), "float32")
        maps = jax.eval_shape(partial(model.apply, method="features"), variables, images)
        assert [x.shape[1:3] for x in maps[:3]] == [tuple(-(-s // stride) for s in size) for stride in (4, 8, 16)]
    images = jax.random.normal(jax.random.key(0), (1, 65, 100, 3))
    assert jnp.isfinite(jax.jit(model.apply)(variables, images)).all()


def test_biases_belong_to_distances():
    table = jax.random.normal(jax.random.key(0), (3 * 4, 2))
    bias = OffsetBias(2, (3, 4)).apply({"params": {"table": table}}, (3, 4))
    for first in range(12):
        for second in range(12):
            dy, dx = abs(first // 4 - second // 4), abs(first % 4 - second % 4)
            assert (bias[:, first, second] == table[dy * 4 + dx]).all()
    # The published order, of first occurrence over row-major pairs, is the same.
    seen = list(dict.fromkeys(map(int, offset_index((3, 4)).ravel())))
    assert seen == list(range(12))


def test_biases_on_a_finer_grid_lie_between_those_of_the_table():
    table = jnp.arange(4.0).reshape(4, 1) * jnp.ones((1, 2))  # the bias of dx on a grid of one row
    bias = OffsetBias(2, (1, 4)).apply({"params": {"table": table}}, (1, 8))
    np.testing.assert_allclose(bias[0, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3], atol=1e-6)


@pytest.mark.parametrize("size", [7, 12, 18])
def test_bicubic_resizing_is_pytorch_s(size):
    x = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
    images = torch.from_numpy(x.swapaxes(1, 2)[..., None].copy())
    expected = torch.nn.functional.interpolate(images, (size, 1), mode="bicubic")[..., 0].numpy().swapaxes(1, 2)
    np.testing.assert_allclose(resize_bicubic(jnp.asarray(x), size, 1), expected, atol=1e-5)


def test_published_names_go_in_and_out():
    dense = efficientformer.DenseConfig(**dataclasses.asdict(SMALL))
    for model in (EfficientFormer(SMALL), efficientformer.EfficientFormerDense(dense)):
        _, shapes = shapes_of(model)
        variables = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype("f4"), shapes)
        table = rules(model.config)
        published = names.to_published(variables, table)
        back = names.convert(published, table, variables)
        jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
        buffers = {"network.6.2.token_mixer.attention_bias_idxs": np.zeros((4, 4), np.int64)}
        names.convert(published | buffers, table, variables)
        with pytest.raises(names.NameMapError, match="surprise"):
            names.convert(published | {"network.6.2.surprise": np.zeros(1)}, table, variables)


def test_every_parameter_learns():
    model = EfficientFormer(dataclasses.replace(SMALL, depths=(1, 0, 0, 1), drop_path_rate=0.1))
    batch = {**efficientformer.example_inputs(SMALL, 2), **efficientformer.example_targets(SMALL, 2)}
    variables = positive(random_parameters(model, batch["images"]))
    loss, state = efficientformer.loss(model), {"batch_stats": variables["batch_stats"]}

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: loss(p, state, batch, {"dropout": jax.random.key(0)}, True)[0])(params)

    for path, leaf in jax.tree.leaves_with_path(gradients(variables["params"])):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(leaf).all(), name
        is_taken_off_again = name.endswith("['conv']['bias']")  # by the batch norm behind
        assert jnp.abs(leaf).max() > 0 or is_taken_off_again, name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vit_num": 3}, r"vit_num must be in 0 \.\. 2, got 3"),
        ({"widths": (7, 8, 8, 8)}, "the first even"),
        ({"depths": (1, 1, 1)}, "depths must have one number a stage"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_wrong_images_say_so():
    model = EfficientFormer(SMALL)
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\), got \(2, 64, 64\)"):
        model.init(jax.random.key(0), jnp.zeros((2, 64, 64)))
    with pytest.raises(TypeError, match="floating point and normalised, got uint8"):
        model.init(jax.random.key(0), jnp.zeros((2, 64, 64, 3), jnp.uint8))


class TestSearch:
    CONFIG = dataclasses.replace(SMALL, depths=(1, 1, 2, 2), widths=(16, 16, 32, 32), distillation=False)
    STAGE = search.stage_of_blocks(CONFIG)
    TABLE = search.LatencyTable(
        {(s, p, w): (1 + p) * w / 16 for s in range(4) for p in (search.MB4D, search.MB3D) for w in (16, 32)}
    )

    @functools.cached_property
    def supernet(self):
        model = search.Supernet(self.CONFIG)
        images = efficientformer.example_inputs(self.CONFIG, 2)["images"]
        variables = positive(random_parameters(model, images))
        variables["params"]["alpha"] = jnp.abs(variables["params"]["alpha"])
        return model, images, variables

    def test_a_choice_of_paths_is_the_network_of_its_own(self):
        """With one path a block, the supernet computes what the found network does with the same parameters."""
        model, images, variables = self.supernet
        network = search.SubNetwork((0, 2, 0, 2, 0, 1), self.CONFIG.widths)
        config = network.config(self.CONFIG)
        assert config.depths == (1, 0, 1, 2) and config.vit_num == 1
        expected = jax.jit(model.apply)(variables, images, network.weights())
        kept = {"stage_0_block_0": "stage_0_block_0_4d", "stage_2_block_0": "stage_2_block_0_4d",
                "stage_3_block_0": "stage_3_block_0_4d", "stage_3_block_1": "stage_3_block_1_3d"}  # fmt: skip

        def renamed(collection, heads):
            tree = variables[collection]
            trunk = {ours: tree[theirs] for ours, theirs in kept.items() if theirs in tree}
            trunk |= {name: tree[name] for name in tree if name.startswith(("stem", "down"))}
            return {"trunk": trunk} | {name: tree[name] for name in heads}

        own = {"params": renamed("params", ("norm", "head")), "batch_stats": renamed("batch_stats", ())}
        got = jax.jit(EfficientFormer(config).apply)(own, images)
        np.testing.assert_allclose(got, expected, atol=1e-4)

    def test_channels_that_are_narrowed_away_are_zero(self):
        model, images, variables = self.supernet
        widths = np.array([16, 16, 16, 16])
        forward = jax.jit(model.apply)
        expected = forward(variables, images, None, widths)
        changed = jax.tree.map(lambda x: x, variables)
        kernel = changed["params"]["down_2"]["conv"]["kernel"]
        changed["params"]["down_2"]["conv"]["kernel"] = kernel.at[:, :, 16:].add(1.0)  # reads what is not there
        np.testing.assert_allclose(forward(changed, images, None, widths), expected, atol=1e-5)

    def test_the_mixture_is_drawn_anew_in_training(self):
        model = search.Supernet(dataclasses.replace(self.CONFIG, depths=(1, 0, 0, 1)))
        batch = {**efficientformer.example_inputs(self.CONFIG, 2), "labels": np.array([0, 1])}
        variables = positive(random_parameters(model, batch["images"]))
        loss, state = search.supernet_loss(model), {"batch_stats": variables["batch_stats"]}

        @jax.jit
        def gradient(params, key):
            return jax.grad(lambda p: loss(p, state, batch, {"sample": key}, True)[0])(params)["alpha"]

        first, second = (gradient(variables["params"], jax.random.key(seed)) for seed in (0, 1))
        assert (first != second).any()
        assert (first[0, search.MB3D] == 0) and (jnp.abs(first[1]) > 0).all()

    def test_blocks_on_tokens_come_last(self):
        alpha = np.ones((6, 3), np.float32)
        alpha[:, search.IDENTITY] = 0.5
        alpha[3, search.MB3D], alpha[4, search.MB4D] = 2, 3
        assert search.first_network(alpha, self.CONFIG).paths == (0, 0, 0, 0, 0, 1)
        alpha[5, search.IDENTITY] = 5
        assert search.first_network(alpha, self.CONFIG).paths[5] == search.IDENTITY

    def test_slimming_reaches_the_target_by_the_cheapest_actions(self):
        alpha = np.ones((6, 3), np.float32) + np.arange(6)[:, None] / 10
        alpha[:, search.IDENTITY] = 1

        # Accuracy depends on the blocks of stage 3 alone: all else is free to go.
        def evaluate(network):
            return sum(path != search.IDENTITY for path in network.paths[4:]) / 2

        start = self.TABLE.total(search.first_network(alpha, self.CONFIG), self.CONFIG)
        steps = search.slim(self.CONFIG, alpha, self.TABLE, evaluate, target=0.5 * start)
        assert steps[0].action is None and steps[-1].seconds <= 0.5 * start < steps[-2].seconds
        assert steps[-1].accuracy == 1.0
        assert all(before.seconds > after.seconds for before, after in itertools.pairwise(steps))
        with pytest.raises(ValueError, match="out of reach"):
            search.slim(self.CONFIG, alpha, self.TABLE, evaluate, target=-1.0)

    def test_the_table_holds_every_block(self):
        config = dataclasses.replace(self.CONFIG, widths=(16, 16, 16, 16), image_size=(32, 32))
        table = search.latency_table(config, repeats=2)
        assert set(table.seconds) == {(s, p, 16) for s in range(4) for p in ((0, 1) if s > 1 else (0,))}
        assert min(table.seconds.values()) > 0
        with pytest.raises(ValueError, match="multiples of 16"):
            search.latency_table(dataclasses.replace(config, widths=(16, 24, 16, 16)))

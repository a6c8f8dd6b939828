"""Design of molecules: the U-Net and its condition, the decoder and its caches, the encoder, names, scores."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo import registry
from zoo.data.molecular_properties import REFRACTIVITY, MoleculeTable, Scaler, refractivity
from zoo.papers import des_design
from zoo.papers.des_design import (
    InverseTransformer,
    InverseTransformerConfig,
    PropertyEncoder,
    PropertyEncoderConfig,
    QMDiffusion,
    QMDiffusionConfig,
)
from zoo.papers.des_design.unet import _fold, _unfold
from zoo.weights.names import convert, to_published

UNET = QMDiffusion(
    QMDiffusionConfig(
        length=8, features=3, channels=32, patch=2, multipliers=(1, 1), factors=(2,), blocks=(1,), attentions=(1,),
        pre_transformer=1, heads=2, head_features=4, conditions=5, condition_features=6, position_features=4,
    )
)  # fmt: skip
# Without attention, where that is not what is tested.
PLAIN = QMDiffusion(dataclasses.replace(UNET.config, attentions=(0,), pre_transformer=0))
DECODER = InverseTransformerConfig(
    tokens=9, features=16, depth=2, heads=2, head_features=4, mlp_ratio=2, conditions=5, condition_features=6
)
ENCODER = PropertyEncoderConfig(
    tokens=9, length=7, properties=3, features=16, depth=2, heads=2, embedding=6, dropout=0.2
)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 8, 3)).astype(np.float32)
CONDITION = RANDOM.uniform(-1, 1, (2, 5)).astype(np.float32)
TOKENS = RANDOM.integers(1, 9, (2, 7)).astype(np.int32)
SIGMA = jnp.array([0.3, 2.0])


@pytest.fixture(scope="module")
def unet():
    return random_parameters(UNET, X, SIGMA, CONDITION)


@pytest.fixture(scope="module")
def plain():
    return random_parameters(PLAIN, X, SIGMA, CONDITION)


def decoder(kind):
    options = {"shared": {}, "separate": {"embedding": 6, "shared": False},
               "all heads": {"shared": False, "one_key_head": False}}[kind]  # fmt: skip
    model = InverseTransformer(dataclasses.replace(DECODER, **options))
    return model, random_parameters(model, TOKENS, CONDITION)


@pytest.mark.parametrize(
    ("id", "parameters"),
    [
        ("qm_diffusion_forward", 18_322_684),
        ("qm_diffusion_inverse", 90_965_554),
        ("qm_transformer_forward", 3_162_496),
        ("qm_transformer_inverse", 2_407_712),
    ],
)
def test_published_numbers_of_parameters(id, parameters):
    """That networks have as many is a test of all registered ones."""
    assert registry.model(id).variant.parameters == parameters


# --------------------------------------------------------------------------------------------------------- diffusion


def test_patches_lie_side_by_side_in_each_channel():
    x = np.arange(12.0).reshape(1, 6, 2)
    np.testing.assert_array_equal(_fold(x, 3)[0, 0], [0, 2, 4, 1, 3, 5])
    np.testing.assert_array_equal(_unfold(_fold(x, 3), 3), x)


def test_one_doubled_batch_is_the_pass_with_the_condition_and_the_one_without(unet):
    evaluate = jax.jit(partial(UNET.apply, unet, method="evaluate"))
    context = partial(UNET.apply, unet, method="context")
    twice, every, none = (
        evaluate(jnp.concatenate([X, X]), jnp.tile(SIGMA, 2), found)
        for found in (
            context(CONDITION, guided=True),
            context(jnp.concatenate([CONDITION, CONDITION])),
            context(jnp.concatenate([CONDITION, CONDITION]), jnp.ones(4, bool)),
        )
    )
    np.testing.assert_allclose(twice, jnp.concatenate([every[:2], none[2:]]), atol=2e-5)
    assert float(jnp.abs(every - none).max()) > 0.01


def test_the_null_condition_is_a_table_by_place(unet):
    dropped = jnp.array([True, False])
    mixed, own, other = (
        UNET.apply(unet, c, d, method="context")
        for c, d in ((CONDITION, dropped), (CONDITION, None), (CONDITION + 1, dropped))
    )
    for x, y, z in zip(*map(jax.tree.leaves, (mixed, own, other)), strict=True):
        np.testing.assert_array_equal(x[0], z[0])
        np.testing.assert_array_equal(x[1], y[1])
        assert float(jnp.abs(x[0] - y[0]).max()) > 0
        assert float(jnp.abs(x[0, 0] - x[0, 1]).max()) > 0


def test_what_is_clipped_has_no_gradient(plain):
    context = PLAIN.apply(plain, CONDITION, method="context")

    def total(shift):
        # At a low level, x hat is nearly the noisy sequence itself.
        return des_design.denoise(PLAIN, plain, 0 * X + shift, jnp.full(2, 0.01), context).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(3.0)
    assert (float(value), float(gradient)) == (X.size, 0)


def test_the_loss_needs_no_rng_where_noise_and_levels_are_given(plain):
    x, noise = jnp.tanh(X), jnp.asarray(X[::-1])

    @jax.jit
    def both(x):
        context = PLAIN.apply(plain, CONDITION, method="context")
        denoised = des_design.denoise(PLAIN, plain, x + SIGMA[:, None, None] * noise, SIGMA, context)
        return denoised, des_design.diffusion_loss(PLAIN, plain, x, CONDITION, sigma=SIGMA, noise=noise)

    denoised, given = both(x)
    errors = np.square(denoised - x).mean((1, 2)) * (SIGMA**2 + 0.01) / (SIGMA * 0.1) ** 2
    assert float(given) == pytest.approx(float(errors.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="needs an rng"):
        des_design.diffusion_loss(PLAIN, plain, X, CONDITION)


def test_sampling_is_between_the_last_level_and_the_clip(plain):
    found = des_design.sample(PLAIN, plain, CONDITION, steps=3, scale=2.0, rng=jax.random.key(0))
    assert found.shape == X.shape and float(jnp.abs(found).max()) < 1 + 0.01
    again = des_design.sample(PLAIN, plain, CONDITION, steps=3, scale=2.0, rng=jax.random.key(0))
    np.testing.assert_array_equal(found, again)


def test_inpainting_keeps_positions(plain):
    keep = np.broadcast_to(np.arange(8) < 3, (2, 8))
    found = des_design.inpaint(PLAIN, plain, CONDITION, X, keep, steps=3, rng=jax.random.key(0))
    np.testing.assert_array_equal(found[:, :3], X[:, :3])


def test_a_level_without_attention_has_one_block_fewer_on_the_way_up():
    config = dataclasses.replace(PLAIN.config, factors=(1,))
    shapes = jax.eval_shape(lambda: QMDiffusion(config).init(jax.random.key(0), X, SIGMA, CONDITION))
    up = shapes["params"]["unet"]["up_0"]
    assert set(up) == {"blocks_0", "lengthen"} and nn.meta.unbox(up)["lengthen"]["kernel"].shape[0] == 3


def test_one_hot_sequences_and_targets():
    np.testing.assert_array_equal(des_design.one_hot(np.array([[0, 2]]), 3), [[[1, -1, -1], [-1, -1, 1]]])
    np.testing.assert_array_equal(des_design.forward_target(np.ones((1, 2)), 4)[0, :, 0], [1, 1, 0, 0])
    with pytest.raises(ValueError, match="do not fit"):
        des_design.forward_target(np.ones((1, 5)), 4)


# ----------------------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("kind", ["shared", "separate", "all heads"])
def test_caches_change_nothing(kind):
    model, variables = decoder(kind)
    dropped = jnp.array([False, True])
    whole = jax.jit(model.apply)(variables, TOKENS, CONDITION, dropped)
    context = model.apply(variables, CONDITION, method="context")
    past = model.apply(variables, 2, 7, method="start")
    step = jax.jit(partial(model.apply, variables, method="step"))
    for place in range(7):
        logits, past = step(TOKENS[:, place], context, past, place, dropped)
        np.testing.assert_allclose(logits, whole[:, place], atol=2e-5)


def test_guided_generation_is_that_of_whole_sequences():
    model, variables = decoder("shared")
    found = des_design.generate(model, variables, CONDITION, TOKENS[:, :2], 4, scale=3.0, greedy=True)
    logits = jax.jit(partial(des_design.inverse_logits, model), static_argnums=3)(variables, found, CONDITION, 3.0)
    np.testing.assert_array_equal(found[:, 2:], logits[:, 1:-1].argmax(-1))
    np.testing.assert_array_equal(found[:, :2], TOKENS[:, :2])


def test_later_tokens_change_nothing_and_a_dropped_condition_neither():
    model, variables = decoder("shared")
    apply = jax.jit(model.apply)
    own = apply(variables, TOKENS, CONDITION)
    np.testing.assert_array_equal(own[:, :3], apply(variables, np.where(np.arange(7) < 3, TOKENS, 1), CONDITION)[:, :3])
    hidden = jnp.ones(2, bool)
    null = apply(variables, TOKENS, CONDITION, hidden)
    np.testing.assert_array_equal(null, apply(variables, TOKENS, CONDITION + 1, hidden))
    assert float(jnp.abs(own - null).max()) > 0.01


def test_a_key_is_its_own_value():
    """With one projection for both, the only key that is left gives itself."""
    model, variables = decoder("shared")
    names = to_published(variables, des_design.inverse_rules(model.config))
    assert {"layers.0.0.null_kv", "layers.0.1.to_kv.1.weight"} <= set(names)
    assert not any("to_v" in name or "null_v" in name for name in names)


def test_sampling_draws_among_the_likeliest():
    model, variables = decoder("shared")
    options = {"scale": 1.0, "rng": jax.random.key(0)}
    one = des_design.generate(model, variables, CONDITION, TOKENS[:, :1], 5, top_k=1, **options)
    np.testing.assert_array_equal(
        one, des_design.generate(model, variables, CONDITION, TOKENS[:, :1], 5, scale=1.0, greedy=True)
    )
    many = des_design.generate(model, variables, CONDITION, TOKENS[:, :1], 5, top_k=9, **options)
    assert (many != one).any()


# ----------------------------------------------------------------------------------------------------------- encoder


def test_padding_is_no_key_and_enters_the_map_over_time():
    model = PropertyEncoder(ENCODER)
    tokens = np.where(np.arange(7) < 4, TOKENS, 0)
    variables = random_parameters(model, tokens)

    def gradient(params):
        return jax.grad(lambda params: model.apply({"params": params}, tokens).sum())(params)

    params = variables["params"]
    assert float(jnp.abs(jax.jit(gradient)(params)["embed"]["embedding"][0]).max()) > 0
    kernel = params["over_time"]["kernel"].at[4:].set(0)
    found = jax.jit(gradient)(params | {"over_time": {"kernel": kernel}})
    assert float(jnp.abs(found["embed"]["embedding"][0]).max()) == 0


def test_dropout_is_of_training():
    model = PropertyEncoder(ENCODER)
    variables = random_parameters(model, TOKENS)
    apply = jax.jit(model.apply, static_argnums=2)
    own = apply(variables, TOKENS)
    assert own.shape == (2, 1, 3)
    trained = apply(variables, TOKENS, True, rngs={"dropout": jax.random.key(0)})
    assert float(jnp.abs(own - trained).max()) > 0


# ------------------------------------------------------------------------------------------------ names and designs


@pytest.mark.parametrize(
    ("model", "arguments", "rules"),
    [
        (UNET, (X, SIGMA, CONDITION), des_design.diffusion_rules),
        (InverseTransformer(DECODER), (TOKENS, CONDITION), des_design.inverse_rules),
        (decoder("separate")[0], (TOKENS, CONDITION), des_design.inverse_rules),
        (PropertyEncoder(ENCODER), (TOKENS,), des_design.encoder_rules),
    ],
)
def test_published_names_lead_there_and_back(model, arguments, rules):
    variables = random_parameters(model, *arguments)
    table = rules(model.config)
    back = convert(to_published(variables, table), table, jax.eval_shape(lambda: variables))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_prompts_ask_and_answer():
    assert des_design.example("solubility", "CCO", [-0.771]) == "Solubility<CCO> [-0.77]"
    assert des_design.example("design", "CCO", [0.5, -1]) == "Design<0.50,-1.00> [CCO]"
    assert des_design.prompt("properties", smiles="C") == "Properties<C>"
    with pytest.raises(ValueError, match="asks about values"):
        des_design.prompt("design", smiles="C")
    with pytest.raises(ValueError, match="task"):
        des_design.prompt("melting", smiles="C")


def test_designs_that_are_asked_for_have_no_error():
    smiles = ["CCO", "CCCN", "CC(C)C"]
    values = np.array([[refractivity(text), float(len(text))] for text in smiles])
    table = MoleculeTable("three", smiles, (REFRACTIVITY, "characters"), values)
    scaler = Scaler.of(values)

    def judge(found):
        return scaler.scale(np.array([[refractivity(text), float(len(text))] for text in found]))

    report = des_design.design_report(smiles, scaler.scale(values), table, scaler, judge)
    assert (report.validity, report.uniqueness, report.novelty) == (1, 1, 0)
    assert report.refractivity_error == pytest.approx(0, abs=1e-9) and report.judged_r2 == pytest.approx(1)
    broken = des_design.design_report(["C(", "CCCCC", "CCO"], scaler.scale(values), table, scaler, judge)
    assert broken.validity == pytest.approx(2 / 3) and broken.novelty == 0.5 and broken.refractivity_error > 1
    nothing = des_design.design_report(["C("], scaler.scale(values[:1]), table, scaler, judge)
    assert nothing.validity == 0 and np.isnan(nothing.judged_error)
    with pytest.raises(ValueError, match="needs targets"):
        des_design.design_report(smiles, values[:1], table, scaler, judge)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 30}, "length must be a multiple"),
        ({"channels": 22}, "multiples of groups"),
        ({"channels": 24}, "multiples of 32"),
        ({"factors": (4,)}, "one fewer"),
        ({"add_positions": True, "position_features": 32}, "as wide"),
        ({"drop_condition": 1.0}, "drop_condition"),
    ],
)
def test_wrong_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QMDiffusionConfig(**options)


def test_wrong_inputs_are_refused(plain):
    with pytest.raises(ValueError, match="x must be"):
        PLAIN.apply(plain, X[:, :4], SIGMA, CONDITION)
    with pytest.raises(ValueError, match="condition must be"):
        des_design.sample(PLAIN, plain, CONDITION[0], rng=jax.random.key(0))
    with pytest.raises(ValueError, match="expected sequences"):
        des_design.inpaint(PLAIN, plain, CONDITION, X[:, :4], X > 0, rng=jax.random.key(0))
    with pytest.raises(ValueError, match="needs an rng"):
        des_design.sample(PLAIN, plain, CONDITION)
    model, variables = decoder("shared")
    with pytest.raises(ValueError, match="integer prompt"):
        des_design.generate(model, variables, CONDITION, TOKENS[:, :0], 3, greedy=True)
    with pytest.raises(ValueError, match="as many conditions"):
        des_design.generate(model, variables, CONDITION[:1], TOKENS, 3, greedy=True)
    with pytest.raises(ValueError, match="padded to 7"):
        PropertyEncoder(ENCODER).init(jax.random.key(0), TOKENS[:, :5])
    with pytest.raises(ValueError, match="one_key_head"):
        InverseTransformerConfig(one_key_head=False)

"""SPT: what each stage adds and keeps, what is trained, and what is saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.kernels.compile import shape
from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.compilation import compile_for
from zoo.layers.mlp import MLP
from zoo.layers.routed_mlp import RoutedMLP
from zoo.papers import spt
from zoo.train import MeshConfig, OptimizerConfig, build_optimizer, init_sharded, make_mesh, make_train_step
from zoo.weights import convert
from zoo.weights.names import flatten, to_published

TOKENS = np.random.default_rng(0).integers(0, 50, (2, 25), dtype=np.int32)


def _decoder(**changes):
    config = DecoderConfig.preset(
        "smollm2_135m", vocab_size=50, features=16, layers=2, heads=2, key_heads=1, mlp_features=32, **changes
    )
    return config, random_parameters(DecoderLM(config), TOKENS)


@pytest.fixture(scope="module")
def upgraded():
    config, variables = _decoder()
    return {stage: spt.upgrade(config, variables, stage, jax.random.key(1), rank=2) for stage in spt.STAGES}


def test_every_stage_keeps_what_was_learnt(upgraded):
    _, base = _decoder()
    for _, variables in upgraded.values():
        leaves = flatten(variables)
        for path, leaf in flatten(base).items():
            np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    # Stage by stage comes to the same as at once.
    config, variables = upgraded["lora"]
    config, variables = spt.upgrade(config, variables, "mha_v2", jax.random.key(2), rank=2)
    assert config == upgraded["mha_v2"][0]
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, upgraded["mha_v2"][1])


def test_new_adapters_and_codebooks_change_nothing_until_attention_is_sparse(upgraded):
    config, base = _decoder()
    expected = DecoderLM(config).apply(base, TOKENS)[0]
    found = {stage: spt.SptLM(config).apply(variables, TOKENS)[0] for stage, (config, variables) in upgraded.items()}
    np.testing.assert_allclose(found["lora"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["mha_v1"], found["ffn"], rtol=1e-5, atol=1e-5)
    assert not np.allclose(found["mha_v2"], found["mha_v1"], atol=1e-3)


def test_a_network_with_adapters_merges_into_one_without(upgraded):
    config, variables = upgraded["lora"]
    variables = random_parameters(spt.SptLM(config), TOKENS)
    merged_config, merged = spt.merge(config, variables)
    expected = spt.SptLM(config).apply(variables, TOKENS)[0]
    np.testing.assert_allclose(spt.SptLM(merged_config).apply(merged, TOKENS)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="its router scales"):
        spt.merge(*upgraded["ffn"])


def test_a_step_trains_adapters_norms_routers_and_codebooks_alone(upgraded):
    config, variables = upgraded["mha_v2"]
    model, optimizer = spt.SptLM(config), build_optimizer(OptimizerConfig(learning_rate=1e-2), 10)
    state = init_sharded(lambda _: spt.trained(variables), optimizer, jax.random.key(0), make_mesh(MeshConfig(data=1)))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    trainable, frozen = spt.split(variables)
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    before = jax.tree.map(np.asarray, (trainable, frozen))
    after, metrics = make_train_step(spt.loss(model), optimizer, state)(state, {"tokens": TOKENS})
    assert np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, after.model_state["frozen"], before[1])
    changed = jax.tree.map(lambda new, old: bool((np.asarray(new) != old).any()), after.params, before[0])
    # B is zero at first, so that A has no gradient yet; all else moves.
    still = {path for path, moved in flatten(changed).items() if not moved}
    assert all(path.endswith("left") for path in still), still


def test_quantisation_reaches_the_loss_where_it_is_asked_for(upgraded):
    config, variables = upgraded["mha_v2"]
    model = spt.SptLM(config)
    entropy, quantisation = spt.losses(model, variables, TOKENS)
    without = spt.losses(model, variables, TOKENS, quantise=False)
    assert float(quantisation) > 0 and float(without[1]) == 0
    np.testing.assert_allclose(entropy, without[0], rtol=1e-6)


@pytest.mark.parametrize("base", ["spt_opt_tiny", "spt_llama_tiny"])
def test_published_names_and_those_of_transformers(base):
    model = zoo.create(base)
    variables = random_parameters(model, zoo.example_inputs(base)["tokens"])
    rules = spt.weight_rules(model.config)
    published = to_published(variables, rules)
    assert "decoders.0.mha.attn_fn.quantizer.weight" in published and "lm_output.lora.left.weight" in published
    jax.tree.map(np.testing.assert_array_equal, convert(published, rules, variables), variables)

    # A dense checkpoint by the names of the transformers library: the network to upgrade.
    plain = zoo.create(base, mixer="softmax", mlp_blocks=1, mlp_active=1, lora_rank=None)
    dense = random_parameters(plain, zoo.example_inputs(base)["tokens"])
    theirs = to_published(dense, spt.transformers_rules(model.config))
    assert any("self_attn" in name for name in theirs)
    jax.tree.map(np.testing.assert_array_equal, convert(theirs, rules, dense), dense)


@pytest.mark.slow
def test_half_of_the_feed_forward_network_is_not_computed():
    x = shape(16 * 512, 2048)
    flops = {}
    for name, network in (("dense", MLP(8192, "relu")), ("routed", RoutedMLP(8192, "relu"))):
        variables = jax.eval_shape(network.init, jax.random.key(0), x)
        compiled = compile_for("tpu-v5e", network.apply, variables, x)
        flops[name] = compiled.executable.cost_analysis()["flops"]
    assert flops["routed"] < 0.55 * flops["dense"]


def test_bad_input_is_named(upgraded):
    config, variables = _decoder()
    with pytest.raises(ValueError, match="unknown stage 'mha'"):
        spt.upgrade(config, variables, "mha", jax.random.key(0))
    windowed, variables = _decoder(window=4)
    with pytest.raises(ValueError, match="no window"):
        spt.upgrade(windowed, variables, "lora", jax.random.key(0))


@pytest.mark.slow
def test_the_real_model_is_upgraded_and_answers():
    model, variables, tokenizer = zoo.backbones.load_smollm2()
    config, upgraded = spt.upgrade(model.config, variables, "mha_v2", jax.random.key(0))
    tokens = jnp.asarray(tokenizer.encode("Gravity is the force that"), jnp.int32)[None]
    out = zoo.backbones.generate(spt.SptLM(config), upgraded, tokens, 4)
    assert out.tokens.shape == (1, 4)

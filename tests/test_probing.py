"""Probes of a small Llama and a small GPT-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import probing
from zoo.backbones import DecoderConfig, DecoderLM

_SMALL = {"vocab_size": 31, "features": 24, "layers": 2, "heads": 4, "mlp_features": 40, "max_length": 16}
MODELS = {
    "llama": DecoderLM(DecoderConfig.preset("smollm2_135m", **_SMALL, key_heads=2)),
    "gpt2": DecoderLM(DecoderConfig.preset("gpt2", **_SMALL)),
}
TOKENS, OTHER = (jax.random.randint(jax.random.key(seed), (2, 9), 0, 31) for seed in (0, 1))
every_family = pytest.mark.parametrize("family", MODELS)
_VARIABLES = {name: random_parameters(model, TOKENS) for name, model in MODELS.items()}


def run(family, read=(), patch=None, **inputs):
    return zoo.probe(MODELS[family], _VARIABLES[family], {"tokens": TOKENS} | inputs, read, patch)


@every_family
def test_reading_everything_changes_nothing(family):
    names = probing.sites(MODELS[family])
    seen = jax.jit(lambda: run(family, names))()
    assert set(seen.sites) == set(names) and len(names) == 2 * 16 + 2
    np.testing.assert_allclose(seen.logits, run(family).logits, atol=2e-5)
    sites = seen.sites
    np.testing.assert_array_equal(sites["resid_post.0"], sites["resid_pre.1"])
    np.testing.assert_allclose(sites["resid_pre.1"] + sites["attn_out.1"], sites["resid_mid.1"], atol=1e-5)
    np.testing.assert_allclose(sites["resid_mid.1"] + sites["mlp_out.1"], sites["resid_post.1"], atol=1e-5)
    np.testing.assert_array_equal(sites["logits"], seen.logits)
    causal = jnp.tril(jnp.ones((9, 9), bool))
    weights = jax.nn.softmax(jnp.where(causal, sites["scores.1"], -jnp.inf))
    np.testing.assert_allclose(sites["pattern.1"], weights, atol=1e-5)
    values = jnp.repeat(sites["v.1"], 4 // sites["v.1"].shape[2], axis=2)
    np.testing.assert_allclose(jnp.einsum("bhts,bshd->bthd", weights, values), sites["z.1"], atol=1e-5)
    assert sites["mlp_pre.0"].shape == sites["mlp_post.0"].shape == (2, 9, 40)
    if family == "gpt2":  # no rotation
        np.testing.assert_array_equal(sites["q_pre_rope.0"], sites["q.0"])
        np.testing.assert_allclose(jax.nn.gelu(sites["mlp_pre.0"]), sites["mlp_post.0"], atol=1e-5)


@every_family
@pytest.mark.parametrize("site", ["resid_pre", "attn_norm", "q_pre_rope", "q", "k", "v", "z", "mlp_pre", "mlp_post"])
def test_a_patch_with_what_is_there_changes_not_a_bit(family, site):
    plain = run(family, [f"{site}.1"])
    patched = run(family, [f"{site}.1"], {f"{site}.1": lambda x: x})
    np.testing.assert_array_equal(patched.logits, plain.logits)
    stored = run(family, patch={f"{site}.1": plain.sites[f"{site}.1"]})
    np.testing.assert_array_equal(stored.logits, plain.logits)


@every_family
def test_patching_all_of_a_layer_gives_the_other_run(family):
    other = run(family, ["resid_post.0", "pattern.1", "logits"], tokens=OTHER)
    moved = run(family, patch={"resid_post.0": other.sites["resid_post.0"]})
    np.testing.assert_allclose(moved.logits, other.logits, atol=1e-5)
    assert jnp.abs(run(family).logits - other.logits).max() > 0.1
    # A pattern can be replaced, too: with its own value nothing changes.
    own = run(family, ["pattern.1"])
    np.testing.assert_allclose(run(family, patch={"pattern.1": own.sites["pattern.1"]}).logits, own.logits, atol=2e-5)
    assert jnp.abs(run(family, patch={"pattern.1": other.sites["pattern.1"]}).logits - own.logits).max() > 1e-3


@every_family
def test_ablating_heads_is_zeroing_their_rows_of_the_output(family):
    model, variables = MODELS[family], _VARIABLES[family]
    without = probing.ablate_heads(model, variables, {"tokens": TOKENS}, [(1, 0), (1, 3), (0, 2)]).logits
    changed = jax.tree.map(lambda leaf: leaf, variables)
    for layer, heads in ((1, (0, 3)), (0, (2,))):
        out = changed["params"][f"layer_{layer}"]["mixer"]["out"]
        for head in heads:
            out["kernel"] = out["kernel"].at[head * 6 : head * 6 + 6].set(0)
    np.testing.assert_allclose(without, model.apply(changed, TOKENS)[0], atol=1e-5)
    uniform = probing.ablate_heads(model, variables, {"tokens": TOKENS}, [(1, 1)], "uniform", ["pattern.1"])
    np.testing.assert_allclose(uniform.sites["pattern.1"][:, 1, 4, :5], 0.2, atol=1e-6)
    mean = probing.ablate_heads(model, variables, {"tokens": TOKENS}, [(1, 1)], "mean", ["z.1"]).sites["z.1"]
    np.testing.assert_allclose(mean[:, :, 1], jnp.broadcast_to(mean[0, 0, 1], (2, 9, 6)), atol=1e-6)


@every_family
def test_the_lens_ends_with_the_models_own_logits(family):
    model, variables = MODELS[family], _VARIABLES[family]
    lens = probing.logit_lens(model, variables, {"tokens": TOKENS})
    assert lens.shape == (2, 2, 9, 31)
    np.testing.assert_allclose(lens[-1], model.apply(variables, TOKENS)[0], atol=1e-5)


@every_family
def test_attribution_adds_up_to_what_the_heads_write(family):
    """A direction's logit is that of embeddings, biases, MLPs and, with the norm's scale frozen, each head's."""
    model, variables = MODELS[family], _VARIABLES[family]
    direction = jax.random.normal(jax.random.key(5), (24,))
    parts = probing.direct_logit_attribution(model, variables, {"tokens": TOKENS}, direction)
    assert parts.shape == (2, 4, 2, 9)
    of_each = probing.direct_logit_attribution(model, variables, {"tokens": TOKENS}, jnp.stack([direction, -direction]))
    np.testing.assert_allclose(of_each, parts * jnp.array([1, -1])[:, None], atol=1e-5)
    seen = run(family, ["z.0", "resid_post.1"])
    wrote = jnp.einsum("bthd,hdf->btf", seen.sites["z.0"],
                       variables["params"]["layer_0"]["mixer"]["out"]["kernel"].reshape(4, 6, 24))  # fmt: skip

    def final(x):
        return model.apply(variables, x, method=lambda module, x: module.norm(x)) @ direction

    # The norm is homogeneous of degree 0, so its derivative along what is written has the frozen scale in it.
    x = seen.sites["resid_post.1"]
    scale_free = jax.jvp(final, (x,), (wrote,))[1]
    along = jax.jvp(final, (x,), (x,))[1]
    assert jnp.abs(along).max() < 1e-3
    frozen = parts[0].sum(0)
    centred = x - x.mean(-1, keepdims=True) if family == "gpt2" else x
    shrink = jnp.sum(centred * wrote, -1) / (jnp.sum(centred**2, -1) + 24 * model.config.norm_epsilon)
    gained = probing_gain(model, variables, x, direction)
    np.testing.assert_allclose(frozen - shrink * gained, scale_free, atol=1e-3)


def probing_gain(model, variables, x, direction):
    """The norm's output along a direction, less its bias."""
    bias = variables["params"]["norm"].get("bias", jnp.zeros(24))
    return (model.apply(variables, x, method=lambda m, x: m.norm(x)) - bias) @ direction


@every_family
def test_paths_from_all_heads_to_the_end_are_what_patching_them_does(family):
    model, variables = MODELS[family], _VARIABLES[family]
    every_head = [(layer, head) for layer in range(2) for head in range(4)]
    arguments = (model, variables, {"tokens": TOKENS}, {"tokens": OTHER})
    other = run(family, ["z.0", "z.1"], tokens=OTHER)
    np.testing.assert_allclose(
        probing.path_patch(*arguments, every_head), run(family, patch=dict(other.sites)).logits, atol=1e-5
    )
    np.testing.assert_allclose(probing.path_patch(*arguments, []), run(family).logits, atol=1e-5)
    # A head of the last layer reaches no query of an earlier one.
    nothing = probing.path_patch(*arguments, [(1, 0)], ["q.0", "q.1"])
    np.testing.assert_allclose(nothing, run(family).logits, atol=1e-5)
    something = probing.path_patch(*arguments, [(0, 0)], ["q.1"])
    assert jnp.abs(something - run(family).logits).max() > 1e-4


def test_gradients_flow_through_a_patch():
    def total(scale):
        return run("llama", patch={"z.0": lambda z: z * scale}).logits.sum()

    slope = jax.grad(total)(1.0)
    np.testing.assert_allclose(slope, (total(1.01) - total(0.99)) / 0.02, rtol=2e-2)


def test_a_probe_of_one_token_with_its_past_equals_that_of_the_whole():
    model, variables = MODELS["llama"], _VARIABLES["llama"]
    state = model.init_state(2, 9)
    _, state = model.apply(variables, TOKENS[:, :8], state)
    seen = zoo.probe(model, variables, {"tokens": TOKENS[:, 8:], "state": state}, ["pattern.1", "z.1"])
    whole = run("llama", ["pattern.1", "z.1"]).sites
    np.testing.assert_allclose(seen.sites["pattern.1"][:, :, 0], whole["pattern.1"][:, :, 8], atol=1e-5)
    np.testing.assert_allclose(seen.sites["z.1"][:, 0], whole["z.1"][:, 8], atol=1e-5)


def test_setting_positions_leaves_the_others():
    seen = run("llama", ["resid_mid.0"], {"resid_mid.0": probing.set_positions([2], 7.0)}).sites["resid_mid.0"]
    plain = run("llama", ["resid_mid.0"]).sites["resid_mid.0"]
    assert (seen[:, 2] == 7).all()
    np.testing.assert_array_equal(jnp.delete(seen, 2, axis=1), jnp.delete(plain, 2, axis=1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run("llama", ["resid_prr.0"]), "unknown site 'resid_prr.0'.* did you mean 'resid_pre.0'"),
        (lambda: run("llama", ["z.2"]), "unknown site 'z.2'"),
        (lambda: run("llama", patch={"scores.0": 0.0}), "scores.0 can be read only"),
        (lambda: run("llama", patch={"z.0": lambda z: z[:1]}), r"must keep its shape \(2, 9, 4, 6\)"),
        (lambda: run("llama", patch={"z.0": probing.set_heads([4], 0.0)}), "head 4 does not exist: there are 4"),
        (lambda: run("llama", patch={"z.0": probing.set_positions([9], 0.0)}), "position 9 does not exist"),
        (
            lambda: probing.ablate_heads(MODELS["llama"], _VARIABLES["llama"], {"tokens": TOKENS}, [(2, 0)]),
            "layer 2 does not exist: there are 2",
        ),
        (
            lambda: probing.ablate_heads(MODELS["llama"], _VARIABLES["llama"], {"tokens": TOKENS}, [(0, 0)], "median"),
            "unknown mode 'median'",
        ),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

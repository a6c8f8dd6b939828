"""Deconstructed attention against its equations, written out in numpy, and what must hold of every variant."""

from functools import cache
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import mixers, registry
from zoo.backbones.generation import generate
from zoo.mixers.deconstructed import nonapprox_attention, shared_map_attention, taylor_attention
from zoo.papers import deconstructing_attention as paper
from zoo.weights import to_published

VARIANTS = get_args(paper.AttentionVariant)
FIXED = tuple(range(20, 36))
# Simple, standard, simple: the second stream passes through a layer of each kind.
SMALL = {
    "standard_layers": "even", "vocab_size": 40, "dim": 16, "mlp_dim": 20, "num_layers": 3, "num_heads": 4,
    "num_kv_heads": 2, "max_len": 12, "fixed_tokens": FIXED, "tie_embeddings": False,
}  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 20)


def small(variant, **overrides):
    return zoo.create("deconattn_500m", variant=variant, **{**SMALL, **overrides})


@cache
def parameters(variant, **overrides):
    return random_parameters(small(variant, **overrides), TOKENS)


@cache
def compiled(variant):
    return jax.jit(small(variant).apply)


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(params, x):
    return (silu(x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])) @ params["down"]["kernel"]


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotated(x):
    angle = np.arange(x.shape[1])[:, None, None] * 1e6 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    first, second = np.split(x, 2, -1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def attend(kind, params, of, values):
    """Queries and keys of `of`, values of `values`, both normed (batch, time, features)."""

    def heads(x, name, number):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        return x.reshape(*x.shape[:2], number, 4)

    query, key, value = heads(of, "query", 4), heads(of, "key", 2), heads(values, "value", 2)
    key, value = key.repeat(2, 2), value.repeat(2, 2)
    if kind == "nonapprox":
        logits = np.einsum("bshd,bshd->bhs", silu(query), key)[:, :, None] / 2 + np.zeros((key.shape[1], 1))
    else:
        logits = np.einsum("bthd,bshd->bhts", rotated(query), rotated(key)) / 2
    weights = 1 + logits + logits**2 / 2 if kind == "approx" else np.exp(logits)
    weights = np.tril(weights)
    weights = weights / weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", np.broadcast_to(weights, (len(value), *weights.shape[1:])), value)
    return out.reshape(*out.shape[:2], -1) @ params["out"]["kernel"]


def definition(variant, variables, tokens):
    """Logits in float64, two streams side by side, layer by layer."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["decoder"])
    embedding, length = params["embed"]["embedding"], tokens.shape[1]
    x = static = embedding[np.asarray(tokens)]
    other = embedding[list(FIXED)][None, :length]
    if variant == "rndemb":
        other = np.asarray(0.02 * jax.random.normal(jax.random.key(0), (12, 16)), np.float64)[None, :length]
    for index in range(3):
        block = params[f"layer_{index}"]
        scale, mixer = block["norm1"]["scale"], block["mixer"]
        normed, normed_other = rms(x, scale), rms(other, scale)
        kind = "standard" if index == 1 else variant
        if kind == "mlp":
            x, other = x + swiglu(mixer["mlp"], normed), other
        else:
            of = {"rndemb": normed_other, "fixedseq": normed_other, "static": rms(static, scale)}.get(kind, normed)
            x = x + attend(kind, mixer, of, normed)
            other = other + attend("standard", mixer, normed_other, normed_other)
        x, other = (y + swiglu(block["mlp"], rms(y, block["norm2"]["scale"])) for y in (x, other))
    return rms(x, params["norm"]["scale"]) @ params["head"]["kernel"]


@pytest.mark.parametrize("variant", [pytest.param("standard", marks=pytest.mark.slow), *VARIANTS[1:]])
def test_network_is_its_definition_whole_and_token_by_token(variant):
    """Goes on from a padded prompt with every variant's cache, which holds maps computed once where there are any."""
    model, variables = small(variant), parameters(variant)
    expected = definition(variant, variables, TOKENS)
    scale = expected.std()
    whole = compiled(variant)(variables, TOKENS)[0]
    np.testing.assert_allclose(whole / scale, expected / scale, atol=1e-4)

    if variant in ("rndemb", "fixedseq"):
        variables = paper.precompute_maps(model, variables, 12)
    step = compiled(variant)
    spread = jnp.zeros((2, 7), jnp.int32).at[0, 3:].set(TOKENS[0, :4]).at[1, :4].set(TOKENS[1, :4])
    valid = jnp.zeros((2, 7), bool).at[0, 3:].set(True).at[1, :4].set(True)
    logits, state = step(variables, spread, model.init_state(2, 12), valid=valid)
    for row, last in enumerate((6, 3)):
        np.testing.assert_allclose(logits[row, last] / scale, expected[row, 3] / scale, atol=1e-4)
    for t in range(4, 9):
        logits, state = step(variables, TOKENS[:, t : t + 1], state)
        np.testing.assert_allclose(logits[:, 0] / scale, expected[:, t] / scale, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant):
    forward = compiled(variant)
    before = forward(parameters(variant), TOKENS)[0]
    after = forward(parameters(variant), TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 20))[0]
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    moved = np.abs(after - before).max((0, 2))
    assert (moved[5:] > 1e-4).all()


@pytest.mark.slow
def test_generation_with_kept_maps_is_that_without():
    model, variables = small("fixedseq"), parameters("fixedseq")
    kept = paper.precompute_maps(model, variables, 12)
    np.testing.assert_array_equal(generate(model, variables, TOKENS, 3).tokens, generate(model, kept, TOKENS, 3).tokens)


def maps_of(variant):
    return jax.jit(lambda variables: paper.attention_maps(small(variant), variables, TOKENS)[1])(parameters(variant))


def test_second_stream_is_one_sequence_and_trains_the_embedding_of_its_tokens():
    def loss(params):
        logits = small("fixedseq").apply({"params": params}, TOKENS)[0]
        return jnp.sum(logits[..., :5] ** 2)

    gradient = jax.jit(jax.grad(loss))(parameters("fixedseq")["params"])
    rows = jnp.abs(gradient["decoder"]["embed"]["embedding"][20:28]).max(axis=1)  # no tokens of the text
    assert bool((rows > 0).all())
    assert set(parameters("rndemb")) == {"params"}  # the vectors are no parameter, and no state
    maps = small("rndemb").apply(parameters("rndemb"), 9, method=paper.DeconLM.maps)
    assert [None if pair is None else pair[0].shape for pair in maps] == [(1, 9, 4, 4), None, (1, 9, 4, 4)]
    found = maps_of("rndemb")
    assert [found[index].weights.shape[0] for index in range(3)] == [1, 2, 1]


def test_a_shared_map_is_computed_once_for_all_sequences():
    """No exponential of the program has an axis for the batch beside two for time."""
    model = small("rndemb", standard_layers=())
    variables = random_parameters(model, jnp.zeros((5, 11), jnp.int32))
    program = str(jax.make_jaxpr(model.apply)(variables, jnp.zeros((5, 11), jnp.int32)))
    maps = [line for line in program.splitlines() if " exp " in line and "11,11]" in line]
    assert maps and not any("[5," in line for line in maps)


def test_key_only_attention_is_softmax_over_the_past_at_any_size_of_scores():
    rng = np.random.default_rng(0)
    query, key = 40 * rng.normal(size=(2, 2, 50, 3, 8))
    value = rng.normal(size=(2, 50, 3, 8))
    scores = np.einsum("bthd,bthd->bth", query, key) / 8**0.5
    assert np.abs(scores).max() > 1e3
    expected = np.zeros_like(value)
    for t in range(50):
        weights = np.exp(scores[:, : t + 1] - scores[:, : t + 1].max(1, keepdims=True))
        expected[:, t] = np.einsum("bsh,bshd->bhd", weights / weights.sum(1, keepdims=True), value[:, : t + 1])
    arrays = [jnp.asarray(array, jnp.float32) for array in (query, key, value)]
    out, state = nonapprox_attention(*arrays)
    np.testing.assert_allclose(out, expected, atol=2e-3)  # float32 keeps scores of thousands to 1e-4
    np.testing.assert_allclose(state.largest, scores.max(1), rtol=1e-5)
    first, state = nonapprox_attention(*(array[:, :30] for array in arrays))
    rest, _ = nonapprox_attention(*(array[:, 30:] for array in arrays), state=state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), out, atol=1e-5)


@pytest.mark.parametrize("form", ["taylor", "appendix"])
def test_approximate_attention_applies_its_map(form):
    query, key = jax.random.uniform(jax.random.key(0), (2, 1, 20, 2, 6))  # positive: divisors stay away from zero
    value = jax.random.normal(jax.random.key(1), (1, 20, 2, 6))
    mixer = mixers.create("approximate", features=12, heads=2, form=form)
    weights = mixer.weights(query, key)
    out, _ = taylor_attention(query, key, value, form=form)
    np.testing.assert_allclose(out, jnp.einsum("bhts,bshd->bthd", weights, value), atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1 if form == "taylor" else 3, rtol=1e-5)
    product = np.einsum("td,sd->ts", query[0, :, 0], key[0, :, 0])
    rows = np.tril(1 + product / 6**0.5 + product**2 / 12)
    if form == "appendix":
        squares = np.einsum("td,sd->ts", query[0, :, 0] ** 2 / 2**0.5, key[0, :, 0] ** 2 / 2**0.5)
        parts = [np.tril(part) for part in (np.ones_like(product), product, squares)]
        rows = sum(part / part.sum(-1, keepdims=True) for part in parts) / 3
    np.testing.assert_allclose(
        weights[0, 0] / weights[0, 0].sum(-1, keepdims=True), rows / rows.sum(-1, keepdims=True), atol=1e-5
    )


def test_a_shared_map_serves_groups_of_heads():
    weights = jax.random.uniform(jax.random.key(0), (4, 5, 5))
    value = jax.random.normal(jax.random.key(1), (3, 5, 2, 6))
    expected = jnp.einsum("hts,bshd->bthd", weights, jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(shared_map_attention(weights, value), expected, atol=1e-5)


def test_hybrids_of_24_layers_are_those_of_the_table():
    published = {
        "even": range(2, 25, 2), "odd": range(1, 24, 2), "top": range(1, 13), "bottom": range(13, 25),
        "middle": (*range(1, 7), *range(19, 25)), "quarter": (4, 8, 12, 16, 20, 24), "first": (1,), "last": (24,),
        "bilateral": (1, 24),
    }  # fmt: skip
    assert published.keys() == paper.HYBRIDS.keys()
    for name, numbers in published.items():
        config = paper.DeconConfig("mlp", name)
        assert [index + 1 for index, standard in enumerate(config.is_standard) if standard] == list(numbers)
        kinds = [config.decoder.make_mixer(index, parent=None).__class__.__name__ for index in range(24)]
        assert kinds.count("SoftmaxAttention") == len(numbers)


@pytest.mark.parametrize("variant", [pytest.param("mlp", marks=pytest.mark.slow), "rndemb"])
def test_skipping_leaves_the_standard_layers(variant):
    variables = parameters(variant)
    skipped = jax.jit(small(variant, skip=True).apply)(variables, TOKENS)[0]
    decoder = variables["params"]["decoder"]
    one = {name: leaf for name, leaf in decoder.items() if "layer" not in name} | {"layer_0": decoder["layer_1"]}
    alone = small("standard", num_layers=1, standard_layers=())
    np.testing.assert_allclose(skipped, alone.apply({"params": {"decoder": one}}, TOKENS)[0], atol=1e-5)
    published = to_published(variables, paper.weight_rules(small(variant).config))
    loaded = zoo.load_weights("deconattn_500m", published, variant=variant, **SMALL, skip=True)
    assert set(loaded["params"]["decoder"]) == {"embed", "layer_1", "norm", "head"}


def count(id, **overrides):
    model = zoo.create(id, **overrides)
    inputs = zoo.example_inputs(id, 1, **overrides)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_variants_have_the_published_number_of_parameters():
    for id, tied, untied in (
        ("deconattn_70m", 50.9, 76.7),
        ("deconattn_160m", 151.9, 190.6),
        ("deconattn_500m", 436.0, 481.1),
    ):
        variant = registry.model(id).variant  # whose number is tested for all models together
        assert round(variant.parameters / 1e6, 1) == tied
        assert round((variant.parameters + variant.config.vocab_size * variant.config.dim) / 1e6, 1) == untied
    standard = count("deconattn_500m", num_layers=1)
    for variant in VARIANTS:
        assert abs(count("deconattn_500m", variant=variant, num_layers=1) / standard - 1) < 1e-3, variant
    assert count("deconattn_500m", tie_embeddings=False, num_layers=1) - standard == 50304 * 896


@pytest.mark.parametrize("variant, qk_norm", [("standard", False), ("approx", True), ("mlp", True)])
def test_published_names_come_and_go(variant, qk_norm):
    options = SMALL | {"variant": variant, "qk_norm": qk_norm, "standard_layers": ()}
    variables = random_parameters(zoo.create("deconattn_500m", **options), TOKENS)
    published = to_published(variables, paper.weight_rules(paper.DeconConfig(**options)))
    names = {name.removeprefix("model.layers.0.self_attn.") for name in published if "layers.0.self_attn" in name}
    if variant == "mlp":
        assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    else:
        kinds = {f"{letter}_proj.weight" for letter in "qkvo"}
        more = {"q_norm.weight", "k_norm.weight"} if qk_norm else {f"{letter}_proj.bias" for letter in "qkv"}
        assert names == kinds | more
    jax.tree.map(np.testing.assert_array_equal, zoo.load_weights("deconattn_500m", published, **options), variables)


def test_indicators_of_maps_that_can_be_counted():
    own, even = np.broadcast_to(np.eye(5), (2, 3, 5, 5)), np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    found = paper.attention_indicators(jnp.asarray(own))
    assert all(value.shape == (2,) for value in found.values()) and len(found) == 8
    for name, value in {"entropy": 0, "concentration": 5**0.5, "head_diversity": 0, "sink": 0.2}.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    np.testing.assert_allclose(found["local_focus_0"], 1)
    np.testing.assert_allclose(found["local_focus_1"], 0)
    found = paper.attention_indicators(jnp.asarray(np.stack([np.eye(5), even])))
    np.testing.assert_allclose(found["entropy"], np.log(np.arange(1, 6)).sum() / 2, rtol=1e-6)
    np.testing.assert_allclose(found["head_diversity"], np.tril(np.abs(np.eye(5) - even) / 2).sum() / 15, rtol=1e-6)
    np.testing.assert_allclose(found["local_focus_3"], (1 / 4 + 1 / 5) / 4, rtol=1e-6)
    np.testing.assert_array_equal(paper.normalised([3, 1, 2]), [1, 0, 0.5])
    np.testing.assert_array_equal(paper.normalised([2, 2]), [0, 0])


def test_logits_that_are_traced_are_those_that_the_map_has():
    found = maps_of("nonapprox")[0]
    # Two weights of a row differ by no more than twice the largest logit allows.
    rows = np.log(np.asarray(found.weights, np.float64)[:, :, -1])
    assert (rows.max(-1) - rows.min(-1)).max() <= 2 * float(found.largest_logit) + 1e-4
    assert set(maps_of("mlp")) == {1}


def test_costs_are_the_papers_and_caches_those_of_states():
    batch, length, dim, heads = 3, 12, 16, 4
    table = {variant: paper.cost_table(variant, batch, length, dim, heads) for variant in VARIANTS}
    assert table["standard"] == (4 * 3 * 144 * 16 + 6 * 3 * 12 * 256, 6 * 3 * 256 + 4 * 3 * 12 * 16, 4 * 3 * 12 * 16)
    assert table["approx"] == (14 * 3 * 12 * 256, 10 * 3 * 256, 6 * 3 * 16 + 4 * 3 * 256 // 4)
    assert table["nonapprox"] == (6 * 3 * 12 * 256, 6 * 3 * 256, 2 * 3 * 16 + 4 * 3 * 4)
    assert table["mlp"][:2] == table["nonapprox"][:2]
    assert table["rndemb"].prefill_flops == 2 * 144 * 16 + 2 * 3 * 144 * 16 + 6 * 3 * 12 * 256

    def numbers(name, **options):
        return sum(
            leaf[0].size
            for leaf in jax.tree.leaves(mixers.create(name, features=dim, heads=heads, **options).init_state(1, length))
        )

    assert numbers("softmax") - 1 == 2 * length * dim  # less the length itself; two bytes a number
    assert numbers("fixed_map") - 1 == length * dim  # values only
    assert numbers("key_only") == dim + 2 * heads  # 2 d + 4 h bytes
    assert numbers("approximate", form="appendix") - 1 == 3 * (dim**2 // heads + dim)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paper.DeconConfig("approxx"), "unknown variant 'approxx'; did you mean 'approx'"),
        (lambda: paper.DeconConfig("mlp", "evn"), "unknown choice of standard_layers 'evn'; did you mean 'even'"),
        (lambda: paper.DeconConfig("mlp", (0, 25)), r"standard_layers must be in 1 \.\. 24, got \(0, 25\)"),
        (lambda: paper.DeconConfig(fixed_tokens=(50304,)), r"fixed_tokens must be in 0 \.\. 50303, got 50304"),
        (lambda: paper.DeconConfig("approx", approx_form="other"), "unknown form of approximate attention 'other'"),
        (lambda: small("approx").apply(parameters("approx"), 4, method=paper.DeconLM.maps), "only rndemb and fixedseq"),
        (
            lambda: paper.precompute_maps(small("rndemb"), parameters("rndemb"), 13),
            "13 tokens are more than max_len 12",
        ),
        (
            lambda: small("rndemb").apply(parameters("rndemb"), TOKENS, stream=jnp.zeros((8, 16))),
            r"the stream must be \('at least 9', 16\), got \(8, 16\)",
        ),
        (
            lambda: small("rndemb").apply(paper.precompute_maps(small("rndemb"), parameters("rndemb"), 5), TOKENS),
            r"query_key must be of \(1, at least 9\) positions, got \(1, 5\)",
        ),
        (lambda: small("mlp").apply(parameters("mlp"), jnp.zeros((1, 13), jnp.int32)), "more than max_length 12"),
        (lambda: paper.attention_indicators(jnp.zeros((2, 3, 3))), "at least 4 tokens, got"),
        (lambda: paper.cost_table("linear", 1, 1, 1, 1), "unknown variant 'linear'"),
        (lambda: mixers.create("fixed_map", features=8, heads=2).init_state(1, 4096), "max_length = 2048"),
    ],
)  # fmt: skip
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The protein transformer: flash and dense graphs, caches, causality, losses, prompts."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo.backbones.graph_gpt.language import largest
from zoo.papers import protein_gpt
from zoo.papers.protein_gpt import Graph, GraphGPT, GraphGPTConfig, graph_attention, prompts
from zoo.weights.names import to_published

SMALL = GraphGPTConfig(
    features=16, depth=2, heads=2, head_features=8, mlp_ratio=2, embedding=6, position_features=6, tokens=128,
    logits=128, graph_layers=2,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 128, (2, 14)).astype(np.int32)
KINDS = {
    "graph": {},
    "identity": {"graph_identity": True},
    "thresholds": {"graph_identity": True, "graph_clamp": False, "threshold_min": 0.05, "threshold_max": 0.8},
    "null key": {"graph_layers": 0, "null_key": True, "one_kv_head": True},
}


def built(**changes):
    model = GraphGPT(dataclasses.replace(SMALL, **changes))
    return model, random_parameters(model, TOKENS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"graph_identity": True}, {"graph_identity": True, "graph_clamp": False},
     {"threshold_min": 0.05, "threshold_max": 0.6}],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hops_by_attention_equal_the_map(changes, masked):
    config = dataclasses.replace(SMALL, **changes)
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 150, 2, 8)), jnp.float32) for _ in range(3))
    graph = Graph(config)
    variables = nn.unbox(graph.init(jax.random.key(0), value, lambda _, x: x, False))
    segments = None
    if masked:
        hidden = jnp.arange(150)[None] % 7 == jnp.array([[3], [4]])
        segments = {"query_segment_ids": jnp.zeros((2, 150), jnp.int32), "key_segment_ids": hidden.astype(jnp.int32)}

    @jax.jit
    def both(query):
        def total(query, dense):
            bound = graph.bind(variables)
            out = graph_attention(
                query, key, value, bound, bound.message(0, value), config, segments=segments, dense=dense
            )
            return jnp.sum(jnp.sin(out)), out

        return [jax.value_and_grad(total, has_aux=True)(query, dense) for dense in (True, False)]

    ((_, want), want_slope), ((_, got), got_slope) = both(query)
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.std(want)))
    np.testing.assert_allclose(got_slope, want_slope, atol=1e-3 * float(jnp.std(want_slope)))


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[pytest.mark.slow] if kind in ("graph", "identity") else []) for kind in KINDS
])  # fmt: skip
def test_decoding_with_caches_equals_the_whole(kind):
    model, variables = built(**KINDS[kind])
    whole = jax.jit(model.apply)(variables, TOKENS)
    step = jax.jit(lambda token, place, caches: protein_gpt.decode_step(model, variables, token, place, caches))
    caches, rows = model.init_cache(2, 14), []
    for place in range(14):
        logits, caches = step(TOKENS[:, place], place, caches)
        rows.append(logits)
    np.testing.assert_allclose(np.stack(rows, 1), whole, atol=2e-4 * float(np.std(whole)))


def test_prompts_of_several_lengths_are_continued_as_alone():
    model, variables = built()
    together = protein_gpt.generate(model, variables, [TOKENS[0, :9], TOKENS[1, :5]], 6, greedy=True)
    apply = jax.jit(model.apply)
    for row, length in zip(together, (9, 5), strict=True):
        assert len(row) == length + 6
        for place in range(length, len(row)):
            padded = np.zeros((1, 16), np.int32)
            padded[0, :place] = row[:place]
            assert row[place] == np.argmax(apply(variables, padded)[0, place - 1])
    end = int(together[0][10])
    cut = protein_gpt.generate(model, variables, [TOKENS[0, :9], TOKENS[1, :5]], 6, greedy=True, eos=end, pad=7)
    place = 9 + int(np.flatnonzero(together[0][9:] == end)[0])
    assert cut[0][place] == end and (cut[0][place + 1 :] == 7).all()


@pytest.mark.parametrize("kind", ["identity", "thresholds"])
def test_the_gradient_of_a_logit_by_later_tokens_is_zero(kind):
    """Positions of the embedding stand for tokens: one row of it each."""
    model, variables = built(**KINDS[kind])
    tokens = jnp.arange(14)[None]

    def logit(table):
        params = {**variables["params"], "embed": {"embedding": table}}
        return model.apply({"params": params}, tokens)[0, 6].sum()

    slope = jax.jit(jax.grad(logit))(variables["params"]["embed"]["embedding"])
    reach = np.abs(slope).max(axis=1)
    assert not reach[7:].any() and (reach[:7] > 0).all()


def test_masks_of_the_loss():
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 14)), jnp.float32)
    chosen = largest(noise, 0.3)
    assert (chosen.sum(axis=1) == 4).all() and not chosen[:, 0].any()
    assert float(jnp.where(chosen, noise, jnp.inf).min()) >= float(jnp.where(chosen, -jnp.inf, noise)[:, 1:].min())
    model, variables = built()
    with pytest.raises(ValueError, match="masking keys needs noise or rng"):
        protein_gpt.lm_loss(model, variables, TOKENS, mask_prob=0.2)


def test_graphs_are_rows_of_shares():
    model, variables = built()
    links, degrees = protein_gpt.graphs(model, variables, TOKENS)
    assert links.shape == (2, 2, 2, 14, 14) and degrees.shape == (2, 2, 2, 14)
    np.testing.assert_allclose(links.sum(-1), 1, rtol=1e-5)
    assert not np.triu(links, 1).any()


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_a_convolved_network_is_causal_and_has_published_names(gated):
    changes = {"mlp_kernel": 3, "mlp_inner_kernel": 2, "mlp_gated": gated}
    model, variables = built(**changes)
    own, other = (
        model.apply(variables, tokens) for tokens in (TOKENS, np.concatenate([TOKENS[:, :9], TOKENS[:, 4:9]], 1))
    )
    np.testing.assert_allclose(own[:, :9], other[:, :9], atol=1e-5)
    names = to_published(variables, protein_gpt.weight_rules(model.config))
    assert "layers.0.1.resnetblock2.2.ds_conv.weight" in names
    assert ("layers.1.1.project_in.proj.weight" in names) == gated
    with pytest.raises(ValueError, match="there are no convolutions"):
        model.init_cache(1, 4)


@pytest.mark.parametrize("task", prompts.TASKS)
def test_every_task_has_a_prompt_and_an_answer(task):
    classes = prompts.TASKS[task].classes
    structure = (classes * 5)[:10] if classes else ""
    text = prompts.example(task, "ACDEFGHIKL", structure=structure, value=1)
    assert text.startswith(prompts.TASKS[task].name + "<") and prompts.decode(prompts.encode(text)) == text
    if prompts.TASKS[task].inverse:
        assert prompts.parse_sequence(text) == "ACDEFGHIKL"
    elif task == "sequence":
        assert prompts.answer(text) == ""
    elif task.startswith("residues"):
        assert prompts.answer(text) == structure
    else:
        assert prompts.parse_numbers(text, max(len(classes), 1)) is not None


@pytest.mark.parametrize(
    "text", ["Task<A> [0.5,0.5", "Task<A> [0.5,x,0.1]", "Task<A> [0.5,0.1]", "Task<A> [nan,0,0]", ""]
)
def test_answers_that_are_no_numbers(text):
    assert prompts.parse_numbers(text, 3) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"null_key": True}, "one value a token and head"),
        ({"position_features": 8}, "as wide as the embedding"),
        ({"threshold_min": 0.7, "threshold_max": 0.5}, "thresholds must be ordered"),
        ({"heads": 0}, "heads must be at least 1"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_wrong_inputs_are_refused():
    model = GraphGPT(SMALL)
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="prompts of at least one token"):
        protein_gpt.generate(model, {}, [[]], 3, greedy=True)
    with pytest.raises(ValueError, match="sampling needs an rng"):
        protein_gpt.generate(model, {}, [[1]], 3)
    with pytest.raises(ValueError, match="needs a structure of 2"):
        prompts.example("content3", "AC", structure="H")


def test_the_published_network_has_9_597_984_parameters():
    shapes = jax.eval_shape(
        lambda: zoo.create("protein_gpt_v4031").init(jax.random.key(0), **zoo.example_inputs("protein_gpt_v4031"))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 9_597_984

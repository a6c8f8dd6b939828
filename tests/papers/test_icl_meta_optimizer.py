import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import mixers
from zoo.papers import icl_meta_optimizer as icl
from zoo.weights import to_published

_SMALL = {"vocab_size": 31, "features": 24, "layers": 2, "heads": 4, "mlp_features": 40, "embedding_scale": 24**0.5}
MODEL = zoo.create("icl_gpt_125m", **_SMALL)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 31)


@pytest.fixture(scope="module")
def variables():
    return random_parameters(MODEL, TOKENS)


@pytest.mark.parametrize("learned", [False, True])
def test_momentum_attention_is_attention_and_a_sum_of_past_values(learned):
    options = {"features": 12, "heads": 3, "out_bias": True}
    mixer = mixers.create("momentum", momentum=0.7, learned=learned, **options)
    x = jax.random.normal(jax.random.key(1), (2, 6, 12))
    variables = random_parameters(mixer, x)
    params = variables["params"]
    plain_params = {name: leaf for name, leaf in params.items() if name != "momentum_logit"}
    plain, _ = mixers.create("softmax", **options).apply({"params": plain_params}, x)
    momentum = jax.nn.sigmoid(params["momentum_logit"]) if learned else jnp.full(3, 0.7)
    value = (x @ params["value"]["kernel"]).reshape(2, 6, 3, 4)
    distance = jnp.arange(6)[:, None] - jnp.arange(6)
    weights = jnp.where(distance > 0, momentum[:, None, None] ** jnp.maximum(distance, 1), 0)  # (heads, t, i)
    past = jnp.einsum("hti,bihd->bthd", weights, value).reshape(2, 6, 12)
    np.testing.assert_allclose(mixer.apply(variables, x)[0], plain + past @ params["out"]["kernel"], atol=1e-5)


def test_records_are_of_the_last_token(variables):
    found = icl.records(MODEL, variables, TOKENS)
    assert found.attention_out.shape == (2, 2, 24) and found.attention_map.shape == (2, 2, 4, 9)
    shorter = icl.records(MODEL, variables, TOKENS[:, :5])
    seen = zoo.probe(MODEL, variables, {"tokens": TOKENS}, ["attn_out.1", "scores.1", "q.1"]).sites
    np.testing.assert_allclose(shorter.attention_out[:, 1], seen["attn_out.1"][:, 4], atol=1e-5)
    np.testing.assert_allclose(found.attention_map[:, 1], seen["scores.1"][:, :, 8], atol=1e-5)
    np.testing.assert_allclose(found.query[:, 1], seen["q.1"][:, 8].reshape(2, -1) * 6**-0.5, atol=1e-6)


def test_finetuning_steps_on_keys_and_values_only(variables):
    sequences = [[1, 2, 3, 4], [5, 6, 7]]
    found = icl.kv_finetune(MODEL, variables, sequences, 0.1)
    changed = jax.tree.map(lambda a, b: bool(jnp.abs(a - b).max() > 0), found.variables, dict(variables))
    for path, moved in jax.tree.leaves_with_path(changed):
        trained = any(getattr(part, "key", None) in ("key", "value") for part in path)
        name = jax.tree_util.keystr(path)
        assert moved <= trained, name  # a key's bias has no gradient: it shifts a row's scores alike
        assert moved or not trained or name.endswith("['key']['bias']"), name
    assert found.queries.shape == (2, 7, 24)

    def loss(variables, sequence):
        logits = MODEL.apply(variables, jnp.array([sequence]))[0][0, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.array(sequence)[1:, None], axis=1))

    np.testing.assert_allclose(found.losses[0], loss(variables, sequences[0]), rtol=1e-5)
    once = icl.kv_finetune(MODEL, variables, sequences[:1], 0.1, pad_to=6).variables
    np.testing.assert_allclose(found.losses[1], loss(once, sequences[1]), rtol=1e-5)
    slope = jax.grad(loss)(variables, sequences[0])["params"]["layer_1"]["mixer"]["value"]["kernel"]
    step = variables["params"]["layer_1"]["mixer"]["value"]["kernel"] - 0.1 * slope
    np.testing.assert_allclose(once["params"]["layer_1"]["mixer"]["value"]["kernel"], step, atol=1e-6)


def test_metrics_on_cases_that_can_be_counted():
    zero, tuned, context, gold = np.array([[0, 0, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    assert icl.rec2ftp(zero, tuned, context, gold) == 50
    assert np.isnan(icl.rec2ftp(gold, tuned, context, gold))
    states = np.random.default_rng(0).normal(size=(3, 5, 2, 8))
    np.testing.assert_allclose(icl.simaou(states[0], states[1], states[1]), 1, atol=1e-12)
    np.testing.assert_allclose(icl.simaou(states[0], 5 * states[1], states[1]), 1, atol=1e-12)  # length is taken off
    maps = np.random.default_rng(1).normal(size=(2, 4, 2, 3, 6))
    lengths = np.array([6, 3, 1, 4])
    cut = np.where(np.arange(6) >= 6 - lengths[:, None, None, None], maps, 7.0)  # what is before does not count
    np.testing.assert_allclose(icl.simam(*maps, lengths), icl.simam(*cut, lengths))
    np.testing.assert_allclose(icl.simam(maps[0], maps[0], lengths), 1)


def test_equal_attention_has_full_agreement():
    rng = np.random.default_rng(0)
    queries, query = rng.normal(size=(2, 12, 8)), rng.normal(size=(3, 2, 8))
    own = np.einsum("ltd,nld->nlt", queries, query)
    found = icl.training_attention(own, queries, query, [3, 4, 5], top_tokens=4, top_examples=2)
    for values in found:
        np.testing.assert_allclose(values, 1)
    found = icl.training_attention(-own, queries, query, [3, 4, 5], top_tokens=4)
    np.testing.assert_allclose(found.kendall_token, -1)


def test_gradient_descent_is_linear_attention():
    rngs = jax.random.split(jax.random.key(0), 4)
    shapes = ((3, 5), (7, 5), (7, 3), (2, 5))
    weight, inputs, targets, queries = (jax.random.normal(rng, shape) for rng, shape in zip(rngs, shapes, strict=True))
    found = icl.dual_form(weight, inputs, targets, queries, 0.1)
    trained = weight
    for x, y in zip(inputs, targets, strict=True):
        trained = trained - 0.1 * jax.grad(lambda w, x=x, y=y: jnp.sum((w @ x - y) ** 2) / 2)(trained)
    np.testing.assert_allclose(found.output, queries @ trained.T, atol=1e-5)
    np.testing.assert_allclose(found.update, trained - weight, atol=1e-5)
    key, value = jax.random.normal(rngs[0], (4, 5)), jax.random.normal(rngs[1], (6, 5))
    attended = sum(value @ x * ((key @ x) @ jnp.arange(4.0)) for x in inputs)
    np.testing.assert_allclose(icl.implicit_update(key, value, inputs) @ jnp.arange(4.0), attended, atol=1e-4)


def test_prompts_leave_out_what_does_not_fit():
    def encode(text):
        return list(map(ord, text))

    shown = [icl.demonstration("mr", "fine", 1), icl.demonstration("mr", "dull", 0)]
    assert shown[0] == "Review: fine Sentiment: Positive"
    query = icl.demonstration("mr", "so so")
    whole = icl.icl_prompt(encode, shown, query)
    assert whole == [0, *encode(shown[0]), 2, *encode(shown[1]), 2, *encode(query)]
    assert icl.icl_prompt(encode, shown, query, max_length=70) == [0, *encode(shown[1]), 2, *encode(query)]
    with pytest.raises(ValueError, match="the query has"):
        icl.icl_prompt(encode, shown, query, max_length=5)
    with pytest.raises(ValueError, match="unknown task 'imdb'"):
        icl.demonstration("imdb", "x")
    with pytest.raises(ValueError, match=r"mr has labels 0 \.\. 1, got 2"):
        icl.demonstration("mr", "x", 2)


def test_classification_takes_the_likeliest_candidate_a_token(variables):
    prompt, candidates = [1, 2, 3], [[4], [5, 6, 7]]
    logits = jax.nn.log_softmax(MODEL.apply(variables, jnp.array([[1, 2, 3, 5, 6, 7]]))[0][0])
    scores = [float(logits[2, 4]), float((logits[2, 5] + logits[3, 6] + logits[4, 7]) / 3)]
    assert icl.classify(MODEL, variables, prompt, candidates) == int(np.argmax(scores))


def test_both_published_name_schemes_load(variables):
    published = to_published(variables, icl.weight_rules(MODEL.config))
    assert "decoder.layers.1.fc1.weight" in published
    as_xglm = {name.replace("decoder.", "model.", 1): array for name, array in published.items()}
    as_xglm["lm_head.weight"] = published["decoder.embed_tokens.weight"]
    for names in (published, as_xglm):
        loaded = zoo.load_weights("icl_gpt_125m", names, **_SMALL)
        jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mixers.create("momentum", features=8, heads=2, momentum=1.0), r"momentum must be in \(0, 1\)"),
        (lambda: mixers.create("momentum", features=8, heads=2, causal=False), "no form for causal=False"),
        (lambda: icl.kv_finetune(MODEL, {}, [[1]], 0.1), "at least two tokens"),
        (lambda: icl.kv_finetune(MODEL, {}, [[1, 2, 3]], 0.1, pad_to=2), "more than pad_to = 2"),
        (
            lambda: icl.training_attention(np.zeros((1, 1, 4)), np.zeros((1, 4, 2)), np.zeros((1, 1, 2)), [3]),
            "example_lengths add up to 3",
        ),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

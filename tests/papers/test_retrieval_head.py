import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import lm_backbone
from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM, generate
from zoo.papers import retrieval_head
from zoo.papers.retrieval_head import HeadScores, Needle
from zoo.probing import probe, set_heads

_SMALL = {"vocab_size": 31, "features": 24, "layers": 2, "heads": 4, "mlp_features": 40, "max_length": 32}
MODELS = {
    "llama": DecoderLM(DecoderConfig.preset("smollm2_135m", **_SMALL, key_heads=2)),
    "gpt2": DecoderLM(DecoderConfig.preset("gpt2", **_SMALL)),
    "mistral": DecoderLM(DecoderConfig.preset("mistral_7b", **_SMALL | {"key_heads": 2, "window": 6})),
}
PROMPTS = jax.random.randint(jax.random.key(0), (2, 9), 0, 31)


@pytest.mark.parametrize("family", MODELS)
def test_answers_and_best_keys_are_those_of_whole_passes(family):
    model = MODELS[family]
    variables = random_parameters(model, PROMPTS)
    found = retrieval_head.retrieve(model, variables, PROMPTS, steps=4)
    np.testing.assert_array_equal(found.tokens, generate(model, variables, PROMPTS, 4).tokens)
    assert found.lengths.tolist() == [4, 4]
    if family == "mistral":
        return  # a ring of the window's slots has no row of the whole past
    text = jnp.concatenate([PROMPTS, found.tokens], axis=1)[:, :-1]
    names = [f"pattern.{layer}" for layer in range(2)]
    whole = probe(model, variables, {"tokens": text}, names).sites
    rows = jnp.stack([whole[name][:, :, 8:] for name in names], axis=1)  # (batch, layers, heads, steps, keys)
    np.testing.assert_array_equal(found.best_key, rows.argmax(-1).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(found.best_weight, rows.max(-1).transpose(0, 3, 1, 2), atol=1e-5)


def test_masked_heads_attend_to_everything_alike_and_only_while_answering():
    model = MODELS["llama"]
    variables = random_parameters(model, PROMPTS)
    masked = retrieval_head.head_mask([(0, 1), (1, 2)], (2, 4))
    found = retrieval_head.retrieve(model, variables, PROMPTS, steps=1, masked=jnp.asarray(masked))
    np.testing.assert_allclose(found.best_weight[:, 0, 0, 1], 1 / 9, rtol=1e-5)
    assert (found.best_weight[:, 0, 0, jnp.array([0, 2, 3])] > 1 / 9 + 1e-3).all()
    # The text is read without a mask, its last token with it.
    state = model.init_state(2, 10)
    _, state = model.apply(variables, PROMPTS[:, :-1], state)
    patch = {"q.0": set_heads([1], 0.0), "q.1": set_heads([2], 0.0)}
    expected = probe(model, variables, {"tokens": PROMPTS[:, -1:], "state": state}, patch=patch).logits[:, 0]
    np.testing.assert_allclose(found.first_logits, expected, atol=1e-5)


def test_an_answer_ends_with_its_stop_token():
    model = MODELS["llama"]
    variables = random_parameters(model, PROMPTS)
    plain = retrieval_head.retrieve(model, variables, PROMPTS, steps=4)
    stop = int(plain.tokens[0, 2])
    found = retrieval_head.retrieve(model, variables, PROMPTS, steps=4, stop_token=stop)
    first = plain.tokens[0].tolist().index(stop)
    assert int(found.lengths[0]) == first and (found.tokens[0, first:] == 0).all()


def test_scores_count_copied_tokens_of_the_needle():
    prompt, span = [5, 6, 7, 8, 9], (1, 4)
    best = np.array([[[1, 2], [3, 0]], [[2, 2], [5, 3]]])  # (2 steps, 2 layers, 2 heads)
    # Step 0 says 6: key 1 is 6. Step 1 says 7: key 2 is 7; key 5 is a generated token.
    score = retrieval_head.retrieval_score(best, np.array([6, 7]), prompt, span)
    np.testing.assert_allclose(score, np.array([[2, 1], [0, 0]]) / 3)


def test_needles_lie_behind_the_end_of_a_sentence():
    haystack = [1, 2, 0, 3, 4, 0, 5, 6, 7, 8]  # 0 is a period
    put = retrieval_head.insert_needle(haystack, [9, 9], 12, 50, [0], buffer=0)
    assert put == [1, 2, 0, 9, 9, 3, 4, 0, 5, 6, 7, 8]
    assert retrieval_head.insert_needle(haystack, [9], 9, 100, [0], buffer=0) == [*haystack[:8], 9]
    assert retrieval_head.insert_needle(haystack, [9], 9, 0, [0], buffer=0) == [9, *haystack[:8]]
    assert retrieval_head.insert_needle(haystack, [9], 9, 20, [0], buffer=0)[0] == 9  # no sentence before


@pytest.mark.parametrize("retokenize", [False, True])
def test_prompts_hold_needle_question_and_span(retokenize):
    tokenizer = lm_backbone.tiny().tokenizer
    needle = Needle("What is it?", "It is a red stone.", "a red stone")
    haystack = tokenizer.encode("One. Two words. Three more words. " * 10)
    prompt = retrieval_head.needle_prompt(
        tokenizer, haystack, needle, 120, 50, style="base", buffer=20, retokenize=retokenize
    )
    text = tokenizer.decode(prompt.tokens)
    assert ". It is a red stone." in text and text.endswith("Question: What is it?\nAnswer:")
    start, end = prompt.span
    assert "a red ston" in tokenizer.decode(prompt.tokens[start : end + 2])


def test_published_records_survive(tmp_path):
    scores = HeadScores(np.random.default_rng(0).uniform(size=(5, 2, 3)).astype(np.float32))
    scores.save(tmp_path / "heads.json")
    np.testing.assert_array_equal(HeadScores.load(tmp_path / "heads.json").scores, scores.scores)
    (tmp_path / "other.json").write_text('{"a": [1]}')
    with pytest.raises(ValueError, match="does not hold scores of heads"):
        HeadScores.load(tmp_path / "other.json")


def test_random_heads_are_drawn_outside_the_strongest():
    mean = np.arange(40.0).reshape(4, 10)
    drawn = retrieval_head.random_heads(mean, 30, np.random.default_rng(0), exclude=10)
    assert len(set(drawn)) == 30 and not set(drawn) & set(retrieval_head.top_heads(mean, 10))
    assert retrieval_head.top_heads(mean, 2) == [(3, 9), (3, 8)]


def test_recall_is_of_stemmed_words():
    assert retrieval_head.rouge1_recall("eat a sandwich", "He eats sandwiches, a lot") == 100
    assert retrieval_head.rouge1_recall("eat a sandwich", "eat") == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: retrieval_head.needle_span([1], []), "at least one token"),
        (lambda: retrieval_head.insert_needle([1], [2], 10, 0, [0], 0), "the haystack has 1"),
        (lambda: retrieval_head.insert_needle([1] * 9, [2], 10, 101, [0], 0), "depth must be in 0 .. 100"),
        (lambda: retrieval_head.head_mask([(2, 0)], (2, 4)), r"head \(2, 0\) does not exist"),
        (lambda: retrieval_head.random_heads(np.zeros((2, 2)), 5, np.random.default_rng(0)), "5 heads cannot be drawn"),
        (lambda: retrieval_head.similarity(np.zeros(2), np.zeros(3)), "must have one shape"),
        (lambda: retrieval_head.retrieval_score(np.zeros((1, 1, 1)), [1], [1], (0, 2)), "span must lie within"),
        (
            lambda: retrieval_head.retrieve(MODELS["llama"], {}, PROMPTS, masked=jnp.zeros((2, 3), bool)),
            r"masked must be bool \(layers, heads\) = \(2, 4\)",
        ),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

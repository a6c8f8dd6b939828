import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM, Sampling, generate, generation, score, stream
from zoo.weights import Int8, dequantize, int8, quantize_int8

CONFIG = DecoderConfig.preset(
    "smollm2_135m", vocab_size=61, features=24, layers=2, heads=4, key_heads=2, mlp_features=40, max_length=64
)
MODEL = DecoderLM(CONFIG)
PROMPT = jax.random.randint(jax.random.key(3), (2, 5), 0, 61)
GREEDY_LENGTH = 6


@pytest.fixture(scope="module")
def variables():
    return random_parameters(MODEL, PROMPT)


@pytest.fixture(scope="module")
def greedy(variables):
    return generate(MODEL, variables, PROMPT, GREEDY_LENGTH)


def test_each_token_is_the_likeliest_of_the_whole_forward_pass(variables, greedy):
    text = jnp.concatenate([PROMPT, greedy.tokens], axis=1)
    logits = jax.jit(MODEL.apply)(variables, text)[0][:, PROMPT.shape[1] - 1 : -1]
    np.testing.assert_array_equal(greedy.tokens, logits.argmax(-1))
    likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits), greedy.tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(greedy.log_probabilities, likelihoods, atol=1e-4)
    assert greedy.lengths.tolist() == [GREEDY_LENGTH] * 2


def test_a_sequence_ends_with_its_stop_token_and_others_go_on(variables, greedy):
    first = greedy.tokens[0].tolist()
    stop = next(token for token in first if token not in greedy.tokens[1].tolist())
    end = first.index(stop) + 1
    out = generate(MODEL, variables, PROMPT, GREEDY_LENGTH, stop_tokens=(stop,), pad=60)
    assert out.tokens[0].tolist() == first[:end] + [60] * (GREEDY_LENGTH - end)
    np.testing.assert_array_equal(out.tokens[1], greedy.tokens[1])
    assert out.lengths.tolist() == [end, GREEDY_LENGTH]
    assert (out.log_probabilities[0, end:] == 0).all()


def test_streaming_gives_the_same_text_and_compiles_once_for_all_tokens(variables, greedy):
    with jax.log_compiles(False):
        before = generation._stream_step._cache_size()
    for row, expected in zip(PROMPT, greedy.tokens, strict=True):
        assert list(stream(MODEL, variables, row.tolist(), GREEDY_LENGTH)) == expected.tolist()
    assert list(stream(MODEL, variables, PROMPT[0, :3].tolist(), 3))  # another length: the same programs
    assert generation._stream_step._cache_size() == before + 1
    stop = greedy.tokens[0, 2].item()
    expected = greedy.tokens[0].tolist()
    streamed = list(stream(MODEL, variables, PROMPT[0].tolist(), GREEDY_LENGTH, stop_tokens=(stop,)))
    assert streamed == expected[: expected.index(stop)]


def test_sampling_is_reproducible_and_follows_its_options(variables):
    options = {"sampling": Sampling(temperature=1.0, top_k=5), "rng": jax.random.key(1)}
    first, second = (generate(MODEL, variables, PROMPT, 3, **options).tokens for _ in range(2))
    np.testing.assert_array_equal(first, second)
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    draws = jax.random.split(jax.random.key(0), 500)

    def drawn(**options):
        sampling = Sampling(**options)
        return np.asarray(jax.vmap(lambda rng: sampling.choose(logits[None], None, rng)[0])(draws))

    np.testing.assert_allclose(np.bincount(drawn()) / 500, jnp.exp(logits), atol=0.06)
    assert set(drawn(top_k=1)) == set(drawn(top_p=1e-6)) == {1} == set(drawn(temperature=0.0))
    assert set(drawn(top_k=2)) == {1, 3} and set(drawn(top_p=0.75)) == {1, 2, 3} and set(drawn(top_k=9)) == {0, 1, 2, 3}
    assert set(drawn(top_p=0.69)) == {1, 3}  # 0.4 + 0.3 are enough
    assert set(drawn(min_p=0.7)) == {1, 3}


def test_a_penalty_is_for_tokens_that_have_occurred():
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    logits = jnp.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -3.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    assert sampling.choose(logits, seen, jax.random.key(0)).tolist() == [1, 1]


def test_a_penalty_reaches_generated_tokens(variables):
    out = generate(MODEL, variables, PROMPT, 12, sampling=Sampling(temperature=0.0, repetition_penalty=1e6)).tokens
    for row, prompt in zip(out.tolist(), PROMPT.tolist(), strict=True):
        assert len(set(row)) == 12 and not set(row) & set(prompt)


def test_scores_are_the_likelihoods_of_whole_texts(variables):
    prefix, continuations = [3, 1, 4], [[1, 5], [9, 2, 6, 5], [3]]
    sums, means = score(MODEL, variables, prefix, continuations)
    for total, mean, continuation in zip(sums, means, continuations, strict=True):
        text = jnp.array([prefix + continuation])
        log_probabilities = jax.nn.log_softmax(MODEL.apply(variables, text)[0][0])
        expected = sum(log_probabilities[2 + i, token] for i, token in enumerate(continuation))
        np.testing.assert_allclose([total, mean], [expected, expected / len(continuation)], rtol=1e-4)


def test_int8_weights_are_a_quarter_and_near(variables):
    small = quantize_int8(variables)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (small, variables)]
    assert sizes[0] < 0.4 * sizes[1]
    kernel, exact = (
        small["params"]["layer_0"]["mlp"]["up"]["kernel"],
        variables["params"]["layer_0"]["mlp"]["up"]["kernel"],
    )
    assert isinstance(kernel, Int8) and kernel.values.dtype == jnp.int8
    np.testing.assert_allclose(dequantize(kernel), exact, atol=float(jnp.abs(exact).max()) / 254 * 1.01)
    logits = MODEL.apply(dequantize(small), PROMPT)[0]
    assert jnp.corrcoef(logits.ravel(), MODEL.apply(variables, PROMPT)[0].ravel())[0, 1] > 0.995
    np.testing.assert_allclose(int8.apply(MODEL, small, PROMPT)[0], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(generate(MODEL, small, PROMPT, 2).tokens[:, 0], logits[:, -1].argmax(-1))


def test_int8_weights_are_never_all_floats_at_once():
    """A float copy of one matrix's part at a time, in the compiler's plan of a step of generation."""
    config = dataclasses.replace(CONFIG, vocab_size=500, features=128, layers=6, mlp_features=384)
    model = DecoderLM(config)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), PROMPT))
    small = jax.eval_shape(quantize_int8, variables)
    state, token = model.init_state(1, 8), jnp.zeros(1, jnp.int32)

    def temporaries(variables):
        plan = jax.jit(partial(generation._step, model)).lower(variables, token, state).compile().memory_analysis()
        return plan.temp_size_in_bytes

    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(variables))
    assert temporaries(small) < temporaries(variables) + 0.1 * weights


@pytest.mark.parametrize("shape", [(24, 40), (24, 7), (1, 1)])
def test_a_product_with_int8_is_that_with_floats(shape, monkeypatch):
    monkeypatch.setattr(int8, "_BLOCK", 24 * 9)  # 40 columns are no multiple of 9
    kernel = quantize_int8({"kernel": jax.random.normal(jax.random.key(0), shape)})["kernel"]
    table = quantize_int8({"embedding": jax.random.normal(jax.random.key(1), shape[::-1])})["embedding"]
    x = jax.random.normal(jax.random.key(2), (2, 3, shape[0]))
    np.testing.assert_allclose(int8.product(x, kernel), x @ dequantize(kernel), rtol=1e-5, atol=1e-5)
    found = jax.jit(partial(int8.product, transposed=True))(x, table)
    np.testing.assert_allclose(found, x @ dequantize(table).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v: Sampling(top_k=0), "top_k must be at least 1, got 0"),
        (lambda v: Sampling(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (lambda v: Sampling(temperature=-1.0), "temperature must be not negative"),
        (lambda v: Sampling(repetition_penalty=0.0), "repetition_penalty must be positive"),
        (lambda v: generate(MODEL, v, PROMPT, 0), "length must be at least 1, got 0"),
        (lambda v: generate(MODEL, v, PROMPT[0], 1), r"prompt must be \(batch, tokens\)"),
        (lambda v: generate(MODEL, v, PROMPT, 1, sampling=Sampling()), "needs an rng"),
        (lambda v: generate(MODEL, v, PROMPT, 60), "longer than max_length 64"),
        (lambda v: next(stream(MODEL, v, [1] * 60, 5)), "60 tokens and 5 new ones do not fit: .* at most 64"),
        (lambda v: score(MODEL, v, [1], [[]]), "every continuation need at least one token"),
    ],
)
def test_wrong_calls_say_so(call, message, variables):
    with pytest.raises(ValueError, match=message):
        call(variables)

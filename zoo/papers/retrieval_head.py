"""Retrieval heads: the few attention heads that copy from a long context into the answer.

"Retrieval Head Mechanistically Explains Long-Context Factuality", Wenhao Wu, Yizhong Wang, Guangxuan Xiao, Hao Peng,
Yao Fu, ICLR 2025, arXiv 2404.15574. Code: github.com/nightdessert/Retrieval_Head (no licence). An analysis, with no
network of its own; it runs on every `DecoderLM` with softmax attention.

A sentence (the needle) is hidden in a long text, and the model asked for it. A head scores at a step of the answer if
the key it attends to most lies in the needle and is the token that this step predicts; its score is the share of the
needle that it copies so. Heads above 0.1 are retrieval heads. The paper says they are universal, sparse, intrinsic
(fine-tuned models share them), dynamically activated, and causal: answering fails without them and not without as many
others.

What the published code does and is therefore done here:
- the row that counts is that of the step which predicts a token, over all keys, generated ones included;
- only answers with a ROUGE-1 recall above 50 are counted;
- the span of a needle is the first window whose *set* of tokens covers more than 90 % of the needle's, so it may start
  a little early;
- a masked head's query is zero (it attends to everything alike), in the answer's steps only, not while the text is
  read. (Their other code path zeroes scores before the softmax, which while reading would show the future.)

The needle is put in at the level of tokens; `retokenize=True` decodes and tokenises the whole as published.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.decoder_lm import DecoderLM
from zoo.data.tokenizers import ByteLevelTokenizer
from zoo.errors import unknown
from zoo.files import atomic
from zoo.probing import probe
from zoo.registry import Paper, register_analysis

PAPER = Paper(
    slug="retrieval_head",
    title="Retrieval Head Mechanistically Explains Long-Context Factuality",
    authors="Wenhao Wu et al.",
    venue="ICLR",
    year=2025,
    arxiv="2404.15574",
    claim="A few attention heads, the same in all settings, copy facts from long contexts; without them models invent.",
    code="https://github.com/nightdessert/Retrieval_Head",
    remarks="An analysis of language models; score maps of seven large ones are published, no weights.",
)
register_analysis(PAPER)

RETRIEVAL = 0.1  # the mean score from which a head is called a retrieval head
SUCCESS = 50.0  # the ROUGE-1 recall above which an answer counts


class Needle(NamedTuple):
    """A fact to hide and to ask for."""

    question: str
    sentence: str  # what is put into the text
    answer: str  # the part of the sentence that the answer should repeat


class NeedlePrompt(NamedTuple):
    """A prompt with a needle in it."""

    tokens: list[int]
    span: tuple[int, int]  # of the answer's tokens in the prompt; (-1, -1) if it was not found


def needle_span(prompt: Sequence[int], needle: Sequence[int]) -> tuple[int, int]:
    """The first window of len(needle) tokens whose set covers more than 90 % of the needle's set; (-1, -1) if none.

    Raises ValueError for an empty needle.
    """
    if not len(needle):
        raise ValueError("a needle has at least one token")
    wanted = set(map(int, needle))
    for start in range(len(prompt) - len(needle) + 1):
        window = set(map(int, prompt[start : start + len(needle)]))
        if len(window & wanted) > 0.9 * len(wanted):
            return start, start + len(needle)
    return -1, -1


def insert_needle(
    haystack: Sequence[int], needle: Sequence[int], length: int, depth: float, periods: Iterable[int], buffer: int = 200
) -> list[int]:
    """Tokens of a text of `length` - `buffer` with the needle at `depth` per cent, after the end of a sentence.

    Args:
      haystack: tokens of the text, at least as many as are needed.
      needle: tokens to put in.
      length: of the whole prompt that is aimed at, `buffer` tokens of it for the question and the answer.
      depth: 0 (the beginning) .. 100 (the end).
      periods: tokens that end a sentence; the place moves left to the next one.
      buffer: see there.

    Raises:
      ValueError: a number is out of range, or the haystack too short.
    """
    room = length - buffer - len(needle)
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must be in 0 .. 100 per cent, got {depth}")
    if room < 0 or len(haystack) < room:
        raise ValueError(
            f"a prompt of {length} tokens has {room} for the text beside a needle of {len(needle)} and a buffer of "
            f"{buffer}; the haystack has {len(haystack)}"
        )
    text, ends = list(haystack[:room]), set(periods)
    if depth == 100:
        return [*text, *needle]
    place = int(room * depth / 100)
    while place > 0 and text[place - 1] not in ends:
        place -= 1
    return [*text[:place], *needle, *text[place:]]


def needle_prompt(
    tokenizer: ByteLevelTokenizer,
    haystack: Sequence[int],
    needle: Needle,
    length: int,
    depth: float,
    *,
    style: Literal["chat", "base"] = "chat",
    buffer: int = 200,
    retokenize: bool = False,
) -> NeedlePrompt:
    """A text with a needle, and the question behind it.

    Args:
      tokenizer: of the model.
      haystack, length, depth, buffer: as of `insert_needle`.
      needle: what to hide.
      style: "chat" puts text and question into a user's turn, "base" one behind the other.
      retokenize: decode and tokenise the whole prompt, as published.

    Raises:
      ValueError: the style is unknown; and as `insert_needle`.
    """
    periods = [ids[0] for ids in map(tokenizer.encode, (".", " .")) if len(ids) == 1]
    text = insert_needle(haystack, tokenizer.encode(f" {needle.sentence}"), length, depth, periods, buffer)
    question = f"\nBased on the content of the book, Question: {needle.question}\nAnswer:"
    if style == "chat":
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        turn = tokenizer.chat([{"role": "user", "content": f"<book>{mark}</book>{question}"}])
        before, after = turn.split(mark)
    elif style == "base":
        before, after = "", question
    else:
        raise unknown("style", style, ("chat", "base"))
    tokens = [*tokenizer.encode(before), *text, *tokenizer.encode(after)]
    if retokenize:
        tokens = tokenizer.encode(before + tokenizer.decode(text) + after)
    for answer in (f" {needle.answer}", needle.answer):
        span = needle_span(tokens, tokenizer.encode(answer))
        if span[0] >= 0:
            return NeedlePrompt(tokens, span)
    return NeedlePrompt(tokens, (-1, -1))


class Retrieval(NamedTuple):
    """Greedy answers to a batch of prompts, and where heads looked for each token. Steps after the end are zeros."""

    tokens: jax.Array  # int32 (batch, steps)
    lengths: jax.Array  # int32 (batch,), the stop token not counted
    best_key: jax.Array  # int32 (batch, steps, layers, heads), the key of largest weight of the step that predicts
    best_weight: jax.Array  # float32, likewise
    first_logits: jax.Array  # float32 (batch, vocabulary), of the first step


def prefill(model: DecoderLM, variables: Mapping[str, Any], prompts: jax.Array, steps: int) -> Any:
    """The state after all but the last token of prompts (batch, tokens) of one length, with room for `steps` more.

    One state serves every choice of masked heads: they are masked while answering only.
    """
    return _prefill(model, steps, variables, prompts)


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(model, steps, variables, prompts):
    state = model.init_state(prompts.shape[0], prompts.shape[1] + steps)
    return model.apply(variables, prompts[:, :-1], state, method=DecoderLM.hidden)[1]


def retrieve(
    model: DecoderLM,
    variables: Mapping[str, Any],
    prompts: jax.Array,
    *,
    steps: int = 50,
    masked: jax.Array | None = None,
    stop_token: int | None = None,
    state: Any = None,
) -> Retrieval:
    """Greedy answers with the key that each head attends to most; memory as of plain decoding.

    Args:
      model: a decoder with softmax attention in every layer.
      variables: of the model.
      prompts: int32 (batch, tokens), of one length, at least 2.
      steps: the most tokens of an answer.
      masked: bool (layers, heads), True for heads whose query is zero in every step; None is none.
      stop_token: ends an answer, or None.
      state: of `prefill` for these prompts and steps; None computes it.

    Raises:
      ValueError: a shape is wrong.
    """
    config = model.config
    shape = (config.layers, config.heads)
    if prompts.ndim != 2 or prompts.shape[1] < 2 or steps < 1:
        raise ValueError(f"prompts must be (batch, at least 2 tokens) and steps positive, got {prompts.shape}, {steps}")
    masked = jnp.zeros(shape, bool) if masked is None else jnp.asarray(masked)
    if masked.shape != shape or masked.dtype != jnp.bool_:
        raise ValueError(f"masked must be bool (layers, heads) = {shape}, got {masked.dtype} {masked.shape}")
    state = prefill(model, variables, prompts, steps) if state is None else state
    return _retrieve(model, steps, stop_token, variables, prompts[:, -1], state, masked)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _retrieve(model, steps, stop_token, variables, last, state, masked):
    batch, layers, heads = last.shape[0], model.config.layers, model.config.heads
    names = [f"pattern.{layer}" for layer in range(layers)]

    def silence(layer: int) -> Callable[[jax.Array], jax.Array]:
        return lambda query: jnp.where(masked[layer][:, None], 0, query)

    patch = {f"q.{layer}": silence(layer) for layer in range(layers)}

    def unfinished(carry):
        step, done, *_ = carry
        return (step < steps) & ~done.all()

    def answer(carry):
        step, done, token, state, first, found = carry
        seen = probe(model, variables, {"tokens": token[:, None], "state": state}, names, patch)
        logits = seen.logits[:, 0]
        weights = jnp.stack([seen.sites[name][:, :, 0] for name in names], axis=1)  # (batch, layers, heads, keys)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if stop_token is not None:
            done = done | (token == stop_token)
        rows = (token, jnp.argmax(weights, axis=-1).astype(jnp.int32), weights.max(axis=-1))

        def put(whole: jax.Array, row: jax.Array) -> jax.Array:
            return whole.at[:, step].set(jnp.where(done.reshape(-1, *(1,) * (row.ndim - 1)), 0, row))

        found = (*map(put, found[:3], rows), found[3] + ~done)
        return step + 1, done, token, seen.state, jnp.where(step == 0, logits, first), found

    empty = (
        jnp.zeros((batch, steps), jnp.int32),
        jnp.zeros((batch, steps, layers, heads), jnp.int32),
        jnp.zeros((batch, steps, layers, heads), jnp.float32),
        jnp.zeros(batch, jnp.int32),
    )
    first = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
    start = (0, jnp.zeros(batch, bool), last.astype(jnp.int32), state, first, empty)
    _, _, _, _, first, (tokens, keys, weights, lengths) = jax.lax.while_loop(unfinished, answer, start)
    return Retrieval(tokens, lengths, keys, weights, first)


def retrieval_score(
    best_key: np.ndarray, generated: np.ndarray, prompt: Sequence[int], span: tuple[int, int]
) -> np.ndarray:
    """Each head's share of the needle that it copies: (layers, heads), float32.

    Args:
      best_key: int (steps, layers, heads), the key of largest weight of the step that predicts `generated`.
      generated: int (steps,).
      prompt: tokens.
      span: of the needle in the prompt, end excluded.

    Raises:
      ValueError: the span is empty or not in the prompt, or the steps differ.
    """
    start, end = (int(side) for side in span)
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"span must lie within the prompt of {len(prompt)} tokens, got {(start, end)}")
    if len(best_key) != len(generated):
        raise ValueError(f"{len(best_key)} steps of keys and {len(generated)} tokens")
    inside = (best_key >= start) & (best_key < end)
    copied = inside & (np.asarray(prompt)[np.where(inside, best_key, 0)] == np.asarray(generated)[:, None, None])
    return (copied.sum(0) / (end - start)).astype(np.float32)


def rouge1_recall(reference: str, response: str) -> float:
    """Per cent of the reference's stemmed words that the response has (ROUGE-1 recall).

    Raises ModuleNotFoundError where the rouge-score package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise ModuleNotFoundError("ROUGE needs the rouge-score package: pip install 'zoo[language]'") from None
    return 100 * RougeScorer(["rouge1"], use_stemmer=True).score(reference, response)["rouge1"].recall


class HeadScores(NamedTuple):
    """Scores of heads over successful answers."""

    scores: np.ndarray  # float32 (samples, layers, heads)

    @property
    def mean(self) -> np.ndarray:
        """(layers, heads); zeros where nothing succeeded."""
        return self.scores.mean(0) if len(self.scores) else np.zeros(self.scores.shape[1:], np.float32)

    @property
    def frequency(self) -> np.ndarray:
        """Share of samples with a score above 0, (layers, heads)."""
        return (self.scores > 0).mean(0) if len(self.scores) else np.zeros(self.scores.shape[1:])

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the published format: {"layer-head": [score of each sample, ...]}."""
        _, layers, heads = self.scores.shape
        record = {
            f"{layer}-{head}": self.scores[:, layer, head].astype(float).tolist()
            for layer in range(layers)
            for head in range(heads)
        }
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(record))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> HeadScores:
        """Reads the published format. Raises ValueError where the file is no such record."""
        try:
            record = json.loads(pathlib.Path(path).read_text())
            places = [tuple(map(int, name.split("-"))) for name in record]
            layers, heads = (max(place[axis] for place in places) + 1 for axis in (0, 1))
            rows = np.array([record[f"{layer}-{head}"] for layer in range(layers) for head in range(heads)], np.float32)
            return cls(rows.T.reshape(-1, layers, heads))
        except (json.JSONDecodeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold scores of heads: {error!r}") from None


class Summary(NamedTuple):
    """How scores are spread over heads."""

    retrieval: float  # share of heads with a mean of at least 0.1
    weak: float  # share in (0, 0.1)
    zero: float  # share of exactly 0
    strong: int  # number of at least 0.5
    always: int  # number active in every sample


def summarize(mean: np.ndarray, frequency: np.ndarray) -> Summary:
    """The summary of score maps (layers, heads). Raises ValueError where their shapes differ."""
    if mean.shape != frequency.shape:
        raise ValueError(f"mean and frequency must have one shape, got {mean.shape} and {frequency.shape}")
    return Summary(
        float((mean >= RETRIEVAL).mean()),
        float(((mean > 0) & (mean < RETRIEVAL)).mean()),
        float((mean == 0).mean()),
        int((mean >= 0.5).sum()),
        int((frequency == 1).sum()),
    )


def top_heads(mean: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(layer, head) of the largest scores, the largest first; of equal ones the earlier head."""
    order = np.argsort(-mean.ravel(), kind="stable")[:count]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, mean.shape), strict=True)]


def head_mask(heads: Iterable[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    """bool (layers, heads), True for the heads given. Raises ValueError for one that does not exist."""
    mask = np.zeros(shape, bool)
    for layer, head in heads:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ValueError(f"head {(layer, head)} does not exist: there are {shape[0]} layers of {shape[1]}")
        mask[layer, head] = True
    return mask


def random_heads(
    mean: np.ndarray, count: int, rng: np.random.Generator, exclude: int | None = None
) -> list[tuple[int, int]]:
    """Heads drawn uniformly from outside the strongest.

    Args:
      exclude: number of the strongest that are not drawn; None is the published 100 of 1,024 heads, in proportion 15 %.

    Raises:
      ValueError: fewer heads are left than asked for.
    """
    exclude = round(0.15 * mean.size) if exclude is None else exclude
    weakest = top_heads(mean, mean.size)[exclude:]
    if not 0 <= count <= len(weakest):
        raise ValueError(f"{count} heads cannot be drawn from {len(weakest)}")
    return [weakest[index] for index in rng.permutation(len(weakest))[:count]]


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two score maps (layers, heads). Raises ValueError where their shapes differ."""
    if first.shape != second.shape:
        raise ValueError(f"score maps must have one shape, got {first.shape} and {second.shape}")
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])

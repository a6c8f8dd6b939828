"""Text from a language model, token by token, in one compiled program; and how likely a text is to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.weights import int8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Fields:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only.
      top_p: and among the fewest that together have this probability (Holtzman et al. 2020).
      min_p: and among those with at least this share of the likeliest one's probability (Nguyen et al. 2024).
      repetition_penalty: divides positive logits of tokens that have occurred, and multiplies negative ones, by this
        (Keskar et al. 2019); 1 is none. The prompt's tokens have occurred.

    Raises:
      ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("temperature", self.temperature >= 0, "not negative"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def choose(self, logits: jax.Array, seen: jax.Array | None, rng: jax.Array) -> jax.Array:
        """int32 (batch,) from logits (batch, vocabulary); `seen`, bool of the same shape, where there is a penalty."""
        if seen is not None:
            penalized = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalized, logits)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = jnp.where(logits < jax.lax.top_k(logits, self.top_k)[0][..., -1:], -jnp.inf, logits)
        if self.top_p is not None:
            falling = jnp.sort(logits, axis=-1)[..., ::-1]
            probability = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(probability, axis=-1) - probability
            least = jnp.min(jnp.where(before < self.top_p, falling, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.min_p is not None and self.min_p > 0:
            logits = jnp.where(logits < logits.max(-1, keepdims=True) + np.log(self.min_p), -jnp.inf, logits)
        return jax.random.categorical(rng, logits).astype(jnp.int32)


GREEDY = Sampling(temperature=0.0)


class Generated(NamedTuple):
    """What was generated."""

    tokens: jax.Array  # int32 (batch, length); what follows a stop token is `pad`
    lengths: jax.Array  # int32 (batch,), the stop token counts
    log_probabilities: jax.Array  # float32 (batch, length), of each token under the model, before any sampling option


def generate(
    model: Any,
    variables: Any,
    prompt: jax.Array,
    length: int,
    *,
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
    valid: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    pad: int = 0,
) -> Generated:
    """Continues a batch of prompts, all of it in one compiled program.

    Args:
      model: a network with `init_state(batch, length)`, (tokens, state, valid=) -> (logits, state), and its two halves
        `hidden` and `logits`: `DecoderLM`.
      variables: of the model, also int8 (`zoo.weights.quantize_int8`).
      prompt: int (batch, tokens).
      length: the most tokens to add; generation ends when all sequences have stopped.
      sampling: how tokens are chosen.
      rng: a PRNG key, needed where sampling.temperature is not 0; the same key gives the same text.
      valid: bool (batch, tokens), False for padding of the prompt, on any side; every prompt has a token.
      stop_tokens: a sequence ends with the first of these.
      pad: what follows a sequence's end.

    Returns:
      Tokens, their number, and their log-probabilities.

    Raises:
      ValueError: a number is out of range, or there is no rng to sample with.
    """
    prompt = jnp.asarray(prompt)
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(f"prompt must be (batch, tokens) and not empty, got {prompt.shape}")
    if sampling.temperature > 0 and rng is None:
        raise ValueError("sampling with a temperature needs an rng; temperature=0 takes the likeliest token")
    rng = jax.random.key(0) if rng is None else rng
    return _generate(model, sampling, length, tuple(stop_tokens), pad, variables, prompt, valid, rng)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _generate(model, sampling, length, stop_tokens, pad, variables, prompt, valid, rng):
    batch = prompt.shape[0]
    logits, state, seen = _prefill(model, sampling, prompt.shape[1] + length, variables, prompt, valid)
    tokens = jnp.full((batch, length), pad, jnp.int32)
    likelihoods = jnp.zeros((batch, length), jnp.float32)
    done = jnp.zeros(batch, bool)

    def unfinished(carry):
        step, done, *_ = carry
        return (step < length) & ~done.all()

    def add(carry):
        step, done, tokens, likelihoods, lengths, logits, state, seen, rng = carry
        rng, key = jax.random.split(rng)
        token = sampling.choose(logits, seen, key)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        token = jnp.where(done, pad, token)
        tokens = tokens.at[:, step].set(token)
        likelihoods = likelihoods.at[:, step].set(jnp.where(done, 0, likelihood))
        lengths = lengths + ~done
        if seen is not None:
            seen = seen.at[jnp.arange(batch), token].set(True)
        done = done | jnp.isin(token, jnp.array(stop_tokens, jnp.int32)) if stop_tokens else done
        logits, state = _step(model, variables, token, state)
        return step + 1, done, tokens, likelihoods, lengths, logits, state, seen, rng

    start = (0, done, tokens, likelihoods, jnp.zeros(batch, jnp.int32), logits, state, seen, rng)
    _, _, tokens, likelihoods, lengths, *_ = jax.lax.while_loop(unfinished, add, start)
    return Generated(tokens, lengths, likelihoods)


def _prefill(model, sampling, slots, variables, prompt, valid):
    """Logits after the prompt, the state, and which tokens occurred (None where nobody asks)."""
    state = model.init_state(prompt.shape[0], slots)
    hidden, state = int8.apply(model, variables, prompt, state, valid=valid, method=type(model).hidden)
    rows = jnp.arange(prompt.shape[0])
    last = -1 if valid is None else prompt.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    logits = int8.apply(model, variables, hidden[rows, last], method=type(model).logits)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[rows[:, None], prompt].max(jnp.ones(prompt.shape, bool) if valid is None else valid)
    return logits, state, seen


def _step(model, variables, token, state):
    logits, state = int8.apply(model, variables, token[:, None], state)
    return logits[:, 0], state


def stream(
    model: Any,
    variables: Any,
    prompt: Sequence[int],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """The tokens that continue one prompt, each as soon as it is there; a stop token ends them and is not given.

    Two programs are compiled, one for the prompt and one for a token. The prompt is padded to a power of 2 and the
    state to a multiple of 128, so that prompts of like lengths share them.

    Args and Raises: as of `generate`; also ValueError where prompt and length are more than the model's max_length.
    """
    if sampling.temperature > 0 and rng is None:
        raise ValueError("sampling with a temperature needs an rng; temperature=0 takes the likeliest token")
    count = len(prompt)
    limit = getattr(model.config, "max_length", None)
    if count < 1 or length < 1 or (limit is not None and count + length > limit):
        raise ValueError(f"{count} tokens and {length} new ones do not fit: at least 1 each, together at most {limit}")
    padded = max(16, 1 << (count - 1).bit_length())
    slots = -(-max(padded, count + length) // 128) * 128
    if limit is not None:
        padded, slots = min(padded, limit), min(slots, limit)
    row = np.zeros((1, padded), np.int32)
    row[0, padded - count :] = prompt
    rng = jax.random.key(0) if rng is None else rng
    token, state, seen, rng = _stream_prefill(
        model, sampling, slots, variables, jnp.asarray(row), jnp.asarray(np.arange(padded) >= padded - count)[None], rng
    )
    for produced in range(1, length + 1):
        if int(token[0]) in stop_tokens:
            return
        yield int(token[0])
        if produced < length:
            token, state, seen, rng = _stream_step(model, sampling, variables, token, state, seen, rng)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _stream_prefill(model, sampling, slots, variables, prompt, valid, rng):
    logits, state, seen = _prefill(model, sampling, slots, variables, prompt, valid)
    return _chosen(sampling, logits, state, seen, rng)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 5))
def _stream_step(model, sampling, variables, token, state, seen, rng):
    logits, state = _step(model, variables, token, state)
    return _chosen(sampling, logits, state, seen, rng)


def _chosen(sampling, logits, state, seen, rng):
    rng, key = jax.random.split(rng)
    token = sampling.choose(logits, seen, key)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return token, state, seen, rng


def score(
    model: Any, variables: Any, prefix: Sequence[int], continuations: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of continuations of one prefix, which is read once.

    Args:
      model, variables: as of `generate`.
      prefix: tokens, at least one.
      continuations: tokens of each, at least one.

    Returns:
      Sums and means over a continuation's tokens, float32 (continuations,).

    Raises:
      ValueError: the prefix or a continuation is empty.
    """
    if not len(prefix) or not continuations or not all(map(len, continuations)):
        raise ValueError("the prefix and every continuation need at least one token")
    lengths = np.array([len(row) for row in continuations])
    rows = np.zeros((len(continuations), lengths.max()), np.int32)
    for row, tokens in zip(rows, continuations, strict=True):
        row[: len(tokens)] = tokens
    sums = _score(model, variables, jnp.asarray(prefix, jnp.int32)[None], jnp.asarray(rows), jnp.asarray(lengths))
    return np.asarray(sums), np.asarray(sums) / lengths


@partial(jax.jit, static_argnums=0)
def _score(model, variables, prefix, rows, lengths):
    logits, state, _ = _prefill(model, GREEDY, prefix.shape[1] + rows.shape[1], variables, prefix, None)
    state = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(rows), axis=0), state)
    valid = jnp.arange(rows.shape[1]) < lengths[:, None]
    after, _ = int8.apply(model, variables, rows, state, valid=valid)
    logits = jnp.concatenate([jnp.repeat(logits[:, None], len(rows), axis=0), after[:, :-1]], axis=1)
    likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[..., None], axis=2)[..., 0]
    return jnp.sum(jnp.where(valid, likelihoods, 0), axis=1)

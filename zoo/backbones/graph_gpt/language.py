"""Losses and generation of the byte-level language model, and its attention's graphs as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.backbones.graph_gpt.model import Cache, GraphGPT, attention_map, link
from zoo.data import prompts

MASK_TOKEN = 95  # "_"


def largest(noise: jax.Array, share: float) -> jax.Array:
    """bool (B, L): the int(L share) places of largest noise in each row, never the first."""
    length = noise.shape[1]
    count = min(int(length * share), length - 1)
    if count == 0:
        return jnp.zeros(noise.shape, bool)
    noise = noise.at[:, 0].set(-jnp.inf)
    places = jax.lax.top_k(noise, count)[1]
    return jnp.zeros(noise.shape, bool).at[jnp.arange(len(noise))[:, None], places].set(True)


def lm_loss(
    model: GraphGPT,
    variables: Any,
    tokens: jax.Array,
    *,
    task_end_token: int | None = None,
    ignore_padding: bool = False,
    mask_token_prob: float = 0.0,
    mask_prob: float = 0.0,
    noise: Mapping[str, jax.Array] | None = None,
    rng: jax.Array | None = None,
    train: bool = False,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Mean cross-entropy of next tokens.

    Args:
      model, variables: the network.
      tokens: integers (B, L).
      task_end_token: labels before its first occurrence do not count (it does; without it none counts), so that the
        answer alone is learned.
      ignore_padding: labels that are 0 do not count.
      mask_token_prob: share of tokens that the network sees as `MASK_TOKEN`; the labels stay.
      mask_prob: share of keys that no query of any layer sees.
      noise: standard normal (B, L) under "tokens" and "keys", what is masked being where it is largest; None draws it.
      rng: for the noise, and for dropout in training.
      train: dropout.
      weights: float (B, L) of each token as a label; None is 1.

    Raises:
      ValueError: a share is not in [0, 1), or noise is needed and there is neither noise nor rng.
    """
    for name, share in (("mask_token_prob", mask_token_prob), ("mask_prob", mask_prob)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} must be in [0, 1), got {share}")
    given = dict(noise or {})
    keys = None if rng is None else jax.random.split(rng, 3)
    for index, (name, share) in enumerate((("tokens", mask_token_prob), ("keys", mask_prob))):
        if share and name not in given:
            if keys is None:
                raise ValueError(f"masking {name} needs noise or rng")
            given[name] = jax.random.normal(keys[index], tokens.shape)
    seen = jnp.where(largest(given["tokens"], mask_token_prob), MASK_TOKEN, tokens) if mask_token_prob else tokens
    hidden = largest(given["keys"], mask_prob) if mask_prob else None
    rngs = {} if keys is None else {"dropout": keys[2]}
    apply: Callable[..., Any] = model.apply
    logits = apply(variables, seen, hidden, train=train, rngs=rngs)[:, :-1]
    labels = tokens[:, 1:]
    counted = jnp.ones(labels.shape, jnp.float32) if weights is None else weights[:, 1:].astype(jnp.float32)
    if task_end_token is not None:
        counted = counted * (jnp.cumsum(labels == task_end_token, axis=1) > 0)
    if ignore_padding:
        counted = counted * (labels != 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


def loss(model: GraphGPT) -> Callable:
    """For `zoo.train`: the batch holds "tokens" (B, L), padded with 0, and perhaps "weights" of labels (B, L)."""

    def loss_function(params, model_state, batch, rngs, train):
        value = lm_loss(
            model, {"params": params}, batch["tokens"], ignore_padding=True, rng=rngs.get("dropout") if train else None,
            train=train, weights=batch.get("weights"),
        )  # fmt: skip
        return value, (model_state, {})

    return loss_function


def decode_step(
    model: GraphGPT, variables: Any, tokens: jax.Array, place: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Logits (B, logits) after one more token (B,) at `place`, and the caches: O(place) work, graph states kept."""
    apply: Callable[..., Any] = model.apply
    logits, caches = apply(variables, tokens[:, None], past=(caches, place))
    return logits[:, 0], caches


@partial(jax.jit, static_argnames=("model", "steps", "greedy", "count"))
def _generate(model, variables, tokens, lengths, rng, temperature, *, steps, greedy, count):
    batch, width = tokens.shape
    total = width + steps

    def body(carry, place):
        token, caches, rng = carry
        logits, caches = decode_step(model, variables, token, place, caches)
        rng, own = jax.random.split(rng)
        if greedy:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            least = jax.lax.top_k(logits, count)[0][:, -1:]
            kept = jnp.where(logits < least, -jnp.inf, logits)
            chosen = jax.random.categorical(own, kept / temperature)  # by Gumbel noise
        following = jnp.minimum(place + 1, width - 1)
        token = jnp.where(place + 1 < lengths, tokens[:, following], chosen.astype(jnp.int32))
        return (token, caches, rng), token

    start = (tokens[:, 0], model.init_cache(batch, total), rng)
    _, rest = jax.lax.scan(body, start, jnp.arange(total - 1))
    return jnp.concatenate([tokens[:, :1], rest.T], axis=1)


def generate(
    model: GraphGPT,
    variables: Any,
    starts: Sequence[Sequence[int]] | np.ndarray,
    steps: int,
    *,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_k_fraction: float = 0.1,
    greedy: bool = False,
    eos: int | None = None,
    pad: int = 0,
) -> list[np.ndarray]:
    """Continues prompts by `steps` tokens each, one token a step through the caches.

    Args:
      model, variables: the network.
      starts: tokens of each prompt, perhaps of several lengths, none empty.
      steps: new tokens.
      rng: for sampling; not needed if greedy.
      temperature: divides the logits.
      top_k_fraction: share of the logits that are sampled among, at least one.
      greedy: the likeliest token instead.
      eos: what follows its first occurrence behind the prompt becomes `pad`. The published code does so only once all
        sequences of a batch have ended.
      pad: see there.

    Returns:
      For each prompt its tokens and the new ones, int32 (prompt + steps,).

    Raises:
      ValueError: an empty prompt, steps below 1, no rng for sampling, or a temperature or fraction out of range.
    """
    if not len(starts) or min(map(len, starts)) < 1 or steps < 1:
        raise ValueError("generation needs prompts of at least one token, and at least one step")
    if not greedy and (rng is None or temperature <= 0 or not 0 < top_k_fraction <= 1):
        raise ValueError("sampling needs an rng, a positive temperature and top_k_fraction in (0, 1]")
    lengths = np.array([len(prompt) for prompt in starts])
    tokens = np.zeros((len(starts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, starts, strict=True):
        row[: len(prompt)] = prompt
    found = np.array(
        _generate(
            model, variables, jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(0) if rng is None else rng,
            temperature, steps=steps, greedy=greedy, count=max(int(top_k_fraction * model.config.logits), 1),
        )
    )  # fmt: skip
    rows = []
    for row, length in zip(found, lengths, strict=True):
        own = row[: length + steps]
        if eos is not None:
            ends = np.flatnonzero(own[length:] == eos)
            if len(ends):
                own[length + ends[0] + 1 :] = pad
        rows.append(own)
    return rows


def ask(
    model: GraphGPT, variables: Any, questions: Sequence[str], steps: int, rng: jax.Array | None = None
) -> list[str]:
    """Questions (`zoo.data.prompts`) with the network's answers of up to `steps` bytes: sampled, or the likeliest."""
    encoded = [prompts.encode(question + " [") for question in questions]
    found = generate(model, variables, encoded, steps, rng=rng, greedy=rng is None, eos=prompts.ANSWER_END)
    return [prompts.decode(row) for row in found]


def graphs(model: GraphGPT, variables: Any, tokens: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The graphs of every layer and head, for looking at: links, and how much each node is listened to.

    Args:
      model, variables: the network, with a graph.
      tokens: integers (B, L).

    Returns:
      float32 (layers, B, H, L, L), links from row to column, and (layers, B, H, L), the sums of columns.
    """
    config = model.config
    if not config.graph_layers:
        raise ValueError("a network without graph layers has no graphs")
    names = {f"attention_{index}": index for index in range(config.depth)}

    def keep(module: Any, method: str) -> bool:
        return module.name in ("query", "key") and method == "__call__"

    _, seen = model.apply(variables, tokens, capture_intermediates=keep, mutable=["intermediates"])
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    maps = []
    for name in names:
        query, key = (
            seen["intermediates"][name][part]["__call__"][0].reshape(*tokens.shape, config.heads, -1)
            for part in ("query", "key")
        )
        weights = jnp.where(causal, attention_map(query * config.head_features**-0.5, key, causal), 0)
        maps.append(np.asarray(link(weights, jnp.eye(length, dtype=bool), config)))
    links = np.stack(maps)
    return links, links.sum(axis=-2)

"""Text from a language model, token by token, in one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def generate(
    model: Any,
    variables: Any,
    prompt: jax.Array,
    length: int,
    *,
    rng: jax.Array | None = None,
    valid: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Continues prompts.

    Args:
      model: a network with `init_state(batch, length)` and (tokens, state, valid=) -> (logits, state): `DecoderLM`.
      variables: of the model.
      prompt: int (batch, tokens).
      length: tokens to add.
      rng: a PRNG key to sample with; None takes the likeliest token.
      valid: bool (batch, tokens), False for padding of the prompt, on any side.
      temperature: divides the logits; 0 is None for rng.
      top_k: sample among the k likeliest tokens only.
      top_p: and among the fewest that together have this probability (Holtzman et al. 2020).

    Returns:
      int32 (batch, length).

    Raises:
      ValueError: a number is out of range.
    """
    if length < 1 or temperature < 0:
        raise ValueError(f"length must be positive and temperature not negative, got {length} and {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k must be positive and top_p in (0, 1], got {top_k} and {top_p}")
    greedy = rng is None or temperature == 0
    choose = partial(_choose, temperature=None if greedy else temperature, top_k=top_k, top_p=top_p)
    rng = jax.random.key(0) if rng is None else rng
    return _generate(model, choose, length, variables, jnp.asarray(prompt), valid, rng)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, choose, length, variables, prompt, valid, rng):
    state = model.init_state(prompt.shape[0], prompt.shape[1] + length)
    logits, state = model.apply(variables, prompt, state, valid=valid)
    last = -1 if valid is None else prompt.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    logits = logits[jnp.arange(prompt.shape[0]), last]

    def step(carry, rng):
        logits, state = carry
        token = choose(logits, rng)
        logits, state = model.apply(variables, token[:, None], state)
        return (logits[:, 0], state), token

    # The last token is chosen but not read: nothing follows it.
    keys = jax.random.split(rng, length)
    (logits, _), tokens = jax.lax.scan(step, (logits, state), keys[:-1])
    return jnp.concatenate([tokens.T, choose(logits, keys[-1])[:, None]], axis=1).astype(jnp.int32)


def _choose(
    logits: jax.Array, rng: jax.Array, *, temperature: float | None, top_k: int | None, top_p: float | None
) -> jax.Array:
    if temperature is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
    if top_p is not None:
        falling = jnp.sort(logits, axis=-1)[..., ::-1]
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1) - jax.nn.softmax(falling, axis=-1)
        least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(rng, logits)

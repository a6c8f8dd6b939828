"""The diffusion models' denoiser, loss, and sampling, of sequences one-hot in {-1, 1} or of properties."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.diffusion import EDM, adpm2_inpaint, adpm2_sample, guided_batch, karras_schedule
from zoo.papers.des_design.unet import QMDiffusion

SIGMA_MIN, SIGMA_MAX, RHO = 0.001, 9.0, 3.0  # of sampling, as published


def levels(steps: int) -> np.ndarray:
    """float32 (steps + 1,): the published schedule, with the 0 at its end that sampling never reaches."""
    return karras_schedule(steps, SIGMA_MIN, SIGMA_MAX, RHO)


def denoise(
    model: QMDiffusion, variables: Any, noisy: jax.Array, sigma: jax.Array, context: Any, scale: float = 1.0
) -> jax.Array:
    """x hat, clipped to [-1, 1] in training as well, so that what is clipped has no gradient.

    Args:
      model, variables: the network.
      noisy: (B, L, C), x + sigma noise.
      sigma: (B,).
      context: of the condition, from the method `context`; `guided` unless the scale is 1.
      scale: of guidance.
    """
    apply: Callable[..., jax.Array] = partial(model.apply, variables, method="evaluate")  # type: ignore[assignment]

    def network(x: jax.Array, time: jax.Array) -> jax.Array:
        if scale == 1:
            return apply(x, time, context)
        return guided_batch(lambda both: apply(both, jnp.tile(time, 2), context), x, scale)

    return jnp.clip(EDM(model.config.sigma_data).denoise(network, noisy, sigma), -1, 1)


def diffusion_loss(
    model: QMDiffusion, variables: Any, x: jax.Array, condition: jax.Array, *, rng: jax.Array | None = None,
    sigma: jax.Array | None = None, noise: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The weighted squared error of the denoised sequence (Karras et al. 2022, eq. 8).

    Args:
      model, variables: the network.
      x: (B, L, C).
      condition: (B, K).
      rng: for levels, noise, and which conditions are dropped.
      sigma, noise: (B,) and as x, in place of drawn ones; with both no condition is dropped and no rng needed.

    Raises:
      ValueError: there is neither an rng nor both of the others.
    """
    edm, dropped = EDM(model.config.sigma_data), None
    if sigma is None or noise is None:
        if rng is None:
            raise ValueError("the loss needs an rng, or sigma and noise")
        keys = jax.random.split(rng, 3)
        sigma = edm.draw_sigma(keys[0], len(x)) if sigma is None else sigma
        noise = jax.random.normal(keys[1], x.shape) if noise is None else noise
        if model.config.drop_condition:
            dropped = jax.random.uniform(keys[2], x.shape[:1]) < model.config.drop_condition
    context = model.apply(variables, condition, dropped, method="context")
    return edm.loss(denoise(model, variables, x + sigma[:, None, None] * noise, sigma, context), x, sigma)


def loss(model: QMDiffusion) -> Callable:
    """For `zoo.train`: the batch holds "x" (B, L, C) and "condition" (B, K)."""

    def loss_function(params, model_state, batch, rngs, train):
        value = diffusion_loss(model, {"params": params}, batch["x"], batch["condition"], rng=rngs["dropout"])
        return value, (model_state, {})

    return loss_function


def _check(model: QMDiffusion, condition: Any, shape: tuple[int, ...] | None, scale: float) -> None:
    config = model.config
    if np.ndim(condition) != 2:
        raise ValueError(f"condition must be (batch, numbers), got {np.shape(condition)}")
    expected = (len(condition), config.length, config.features)
    if shape is not None and shape != expected:
        raise ValueError(f"expected sequences {expected}, got {shape}")
    if not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def sample(
    model: QMDiffusion, variables: Any, condition: jax.Array | np.ndarray, *, steps: int = 100, scale: float = 1.0,
    rng: jax.Array | None = None, start: jax.Array | None = None, noise: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Sequences for conditions, by steps - 1 updates of two passes each (four with guidance, in batches of twice).

    Args:
      model, variables: the network.
      condition: (B, K).
      steps: levels of noise.
      scale: of guidance; 1 is none.
      rng: for start and noise.
      start, noise: standard normal (B, L, C) and (steps - 1, B, L, C), in place of the rng's.

    Returns:
      float32 (B, L, C).

    Raises:
      ValueError: a shape is wrong, steps are below 2, or there is neither rng nor noise.
    """
    _check(model, condition, None if start is None else start.shape, scale)
    start, noise = _noise(model, len(condition), rng, start, noise)
    return _sample(model, variables, jnp.asarray(condition), start, noise, steps=steps, scale=float(scale))


def _noise(
    model: QMDiffusion, batch: int, rng: jax.Array | None, start: jax.Array | None, noise: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    if (start is None or noise is None) and rng is None:
        raise ValueError("sampling needs an rng, or start and noise")
    first, second = (None, None) if rng is None else jax.random.split(rng)
    if start is None:
        start = jax.random.normal(first, (batch, model.config.length, model.config.features))  # type: ignore[arg-type]
    return jnp.asarray(start), second if noise is None else noise  # type: ignore[return-value]


def _denoiser(model: QMDiffusion, variables: Any, condition: jax.Array, scale: float) -> Callable[..., jax.Array]:
    """For sampling: the condition's keys and values are computed once."""
    context = model.apply(variables, condition, guided=scale != 1, method="context")
    return lambda noisy, sigma: denoise(model, variables, noisy, sigma, context, scale)


@partial(jax.jit, static_argnames=("model", "steps", "scale"))
def _sample(model, variables, condition, start, noise, *, steps, scale):
    return adpm2_sample(_denoiser(model, variables, condition, scale), start, levels(steps)[:-1], noise)


def inpaint(
    model: QMDiffusion, variables: Any, condition: jax.Array | np.ndarray, source: jax.Array | np.ndarray,
    keep: jax.Array | np.ndarray, *, steps: int = 25, resamples: int = 2, scale: float = 1.0,
    rng: jax.Array | None = None, start: jax.Array | None = None, noise: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Sequences for conditions of which some positions are given, and come back unchanged.

    Args:
      model, variables: the network.
      condition: (B, K).
      source: (B, L, C).
      keep: bool (B, L), or (B, L, C): what is given.
      steps, scale, rng: as of `sample`.
      resamples: see `zoo.diffusion.adpm2_inpaint`.
      start, noise: standard normal (B, L, C) and (steps - 1, 2 resamples, B, L, C), in place of the rng's.

    Returns:
      float32 (B, L, C).

    Raises:
      ValueError: a shape is wrong, steps are below 2, resamples below 1, or there is neither rng nor noise.
    """
    source, keep = jnp.asarray(source, jnp.float32), jnp.asarray(keep)
    _check(model, condition, source.shape, scale)
    keep = jnp.broadcast_to(keep[..., None] if keep.ndim == 2 else keep, source.shape)
    start, noise = _noise(model, len(condition), rng, start, noise)
    return _inpaint(
        model, variables, jnp.asarray(condition), source, keep, start, noise,
        steps=steps, scale=float(scale), resamples=resamples,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("model", "steps", "scale", "resamples"))
def _inpaint(model, variables, condition, source, keep, start, noise, *, steps, scale, resamples):
    return adpm2_inpaint(
        _denoiser(model, variables, condition, scale), source, keep, start, levels(steps)[:-1], noise, resamples
    )


def predict(
    model: QMDiffusion, variables: Any, tokens: np.ndarray, properties: int, *, characters: int, rng: jax.Array,
    steps: int = 100,
) -> np.ndarray:  # fmt: skip
    """Properties by the forward model: the first numbers of a sample that a sequence's tokens condition.

    Args:
      model, variables: a network of one feature.
      tokens: integers (B, K).
      properties: how many numbers.
      characters: of the language; a token's condition is its number over this (21 for QM9).
      rng, steps: as of `sample`.

    Returns:
      float32 (B, properties), scaled as in training.
    """
    found = sample(model, variables, forward_condition(tokens, characters), rng=rng, steps=steps)
    return np.asarray(found)[:, :properties, 0]


def forward_condition(tokens: np.ndarray, characters: int) -> np.ndarray:
    """Tokens as the forward model sees them, float32 in [0, 1]."""
    return np.asarray(tokens, np.float32) / characters


def forward_target(properties: np.ndarray, length: int) -> np.ndarray:
    """Scaled properties (B, P) as the forward model's sequence: float32 (B, length, 1), zeros behind them.

    Raises ValueError for more properties than the length.
    """
    if properties.shape[1] > length:
        raise ValueError(f"{properties.shape[1]} properties do not fit a length of {length}")
    return np.pad(properties.astype(np.float32), ((0, 0), (0, length - properties.shape[1])))[..., None]


def one_hot(tokens: np.ndarray, features: int) -> np.ndarray:
    """Tokens (B, L) as the inverse model's sequences: float32 (B, L, features) of -1 and 1."""
    return 2 * np.eye(features, dtype=np.float32)[tokens] - 1

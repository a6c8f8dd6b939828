"""Diffusion by noise levels (Karras et al. 2022, "EDM"): preconditioning, loss, schedule, samplers.

A noisy example is x + sigma n. A denoiser is a function (noisy, sigma) -> x hat, of arrays (B, ...) and of levels (B,).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class EDM:
    """Preconditioning, loss and training levels (Karras et al. 2022, table 1).

    Attributes:
      sigma_data: standard deviation of the data.
      log_mean, log_std: of the logarithm of the levels in training.
    """

    sigma_data: float = 0.5
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or self.log_std < 0:
            raise ValueError(
                f"sigma_data must be positive and log_std not negative, got {self.sigma_data}, {self.log_std}"
            )

    def denoise(self, network: Denoiser, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
        """c_skip noisy + c_out network(c_in noisy, c_noise), eq. 7, with c_noise = ln(sigma) / 4.

        Args:
          network: (scaled input, c_noise (B,)) -> array of the input's shape.
          noisy: (B, ...).
          sigma: (B,), positive.
        """
        level = sigma.reshape(-1, *(1,) * (noisy.ndim - 1))
        total = level**2 + self.sigma_data**2
        out = network(noisy * jax.lax.rsqrt(total), jnp.log(sigma) / 4)
        return self.sigma_data**2 / total * noisy + level * self.sigma_data * jax.lax.rsqrt(total) * out

    def loss(self, denoised: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
        """Mean over the batch of mean squared errors times (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
        errors = jnp.mean(jnp.square(denoised - x).reshape(len(x), -1), axis=1)
        return jnp.mean(errors * (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2)

    def draw_sigma(self, rng: jax.Array, batch: int) -> jax.Array:
        """Levels of training, float32 (batch,), log-normal."""
        return jnp.exp(self.log_mean + self.log_std * jax.random.normal(rng, (batch,)))


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """float32 (steps + 1,): levels from sigma_max down to sigma_min, equally spaced in sigma^(1/rho), and 0 (eq. 5).

    Raises ValueError for fewer than 2 steps, or levels that are not 0 < sigma_min < sigma_max.
    """
    if steps < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(f"needs 2 steps and 0 < sigma_min < sigma_max, got {steps}, {sigma_min}, {sigma_max}")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return np.append(np.linspace(*ends, steps) ** rho, 0).astype(np.float32)


def guided(conditional: jax.Array, null: jax.Array, scale: float) -> jax.Array:
    """null + scale (conditional - null), classifier-free guidance (Ho and Salimans 2022)."""
    return null + scale * (conditional - null)


def guided_batch(network: Callable[[jax.Array], jax.Array], x: jax.Array, scale: float) -> jax.Array:
    """Guidance by one pass of twice the batch: `network` answers x with conditions, then x again without."""
    conditional, null = jnp.split(network(jnp.concatenate([x, x])), 2)
    return guided(conditional, null, scale)


def _draw(source: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal numbers: of a key, or given ones."""
    return jax.random.normal(source, shape) if jnp.issubdtype(source.dtype, jax.dtypes.prng_key) else source


def _sources(noise: jax.Array, shape: tuple[int, ...], x: tuple[int, ...]) -> jax.Array:
    """Keys or arrays of noise by step. Raises ValueError for arrays of another shape."""
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        return jax.random.split(noise, shape)
    if noise.shape != (*shape, *x):
        raise ValueError(f"noise must be a key or {(*shape, *x)}, got {noise.shape}")
    return noise


def _check_levels(levels: np.ndarray) -> None:
    if levels.ndim != 1 or len(levels) < 2 or not np.all(np.diff(levels) < 0) or levels[-2] <= 0:
        raise ValueError(f"levels must fall, from a positive one on, got {levels}")


def adpm2_step(denoise: Denoiser, x: jax.Array, sigma: jax.Array, following: jax.Array, noise: jax.Array) -> jax.Array:
    """From one level to the next by an ancestral step of second order, with the midpoint (sigma + down) / 2.

    The sampler is k-diffusion's DPM2 ancestral with rho 1.

    Args:
      denoise: see the module.
      x: (B, ...) at level `sigma`.
      sigma, following: scalars, the second one smaller.
      noise: standard normal, as x.
    """
    up = jnp.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
    down = jnp.sqrt(jnp.maximum(following**2 - up**2, 0))
    middle = (sigma + down) / 2

    def half(point: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        level, target = inputs
        slope = (point - denoise(point, jnp.full(len(point), level))) / level
        return x + slope * (target - sigma), None

    # A loop of two: the program holds one network, and compiles in half the time.
    levels, targets = jnp.stack([sigma, middle]), jnp.stack([middle, down])
    return jax.lax.scan(half, x, (levels, targets))[0] + up * noise


def adpm2_sample(denoise: Denoiser, start: jax.Array, levels: np.ndarray, noise: jax.Array) -> jax.Array:
    """Samples by `adpm2_step` from level to level.

    Args:
      denoise: see the module.
      start: standard normal (B, ...), scaled by the first level here.
      levels: (n,), falling.
      noise: a key; or standard normal numbers (n - 1, B, ...), of each step.

    Returns:
      (B, ...) at the last level.

    Raises:
      ValueError: levels do not fall, or noise has another shape.
    """
    levels = np.asarray(levels, np.float32)
    _check_levels(levels)
    sources = _sources(noise, (len(levels) - 1,), start.shape)

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        sigma, following, source = inputs
        return adpm2_step(denoise, x, sigma, following, _draw(source, x.shape)), None

    return jax.lax.scan(step, levels[0] * start, (levels[:-1], levels[1:], sources))[0]


def adpm2_inpaint(
    denoise: Denoiser, source: jax.Array, keep: jax.Array, start: jax.Array, levels: np.ndarray, noise: jax.Array,
    resamples: int = 1,
) -> jax.Array:  # fmt: skip
    """Samples of which a part is given (Lugmayr et al. 2022, "RePaint"): at each level, that part is noised anew.

    Args:
      denoise: see the module.
      source: (B, ...), what is given.
      keep: bool, as source: where it is.
      start: standard normal, as source.
      levels: (n,), falling.
      noise: a key; or standard normal numbers (n - 1, 2 resamples, B, ...): of each level, that of the source, then of
        each step in turn with that of going back up before the next one.
      resamples: steps from each level to the next, with noise back up in between.

    Returns:
      (B, ...), where kept exactly the source.

    Raises:
      ValueError: shapes differ, levels do not fall, or resamples is below 1.
    """
    levels = np.asarray(levels, np.float32)
    _check_levels(levels)
    if resamples < 1 or keep.shape != source.shape or start.shape != source.shape or keep.dtype != jnp.bool_:
        raise ValueError(
            f"needs a resample, and bool keep and start as the source {source.shape}; got {resamples}, {keep.dtype} "
            f"{keep.shape}, {start.shape}"
        )
    sources = _sources(noise, (len(levels) - 1, 2 * resamples), source.shape)
    again = np.arange(resamples) < resamples - 1

    def level(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        sigma, following, own = inputs
        given = source + sigma * _draw(own[0], source.shape)
        back = jnp.sqrt(sigma**2 - following**2)

        def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            stepping, renoising, goes_back = inputs
            x = adpm2_step(denoise, jnp.where(keep, given, x), sigma, following, _draw(stepping, x.shape))
            return x + jnp.where(goes_back, back, 0) * _draw(renoising, x.shape), None

        # The last step has no way back up: any source will do.
        renoising = jnp.concatenate([own[2::2], own[:1]])
        return jax.lax.scan(step, x, (own[1::2], renoising, again))[0], None

    x = jax.lax.scan(level, levels[0] * start, (levels[:-1], levels[1:], sources))[0]
    return jnp.where(keep, source, x)

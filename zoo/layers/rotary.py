"""Rotary position embeddings (Su et al. 2021) and the ways in which published models stretch them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`."""

    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Frequencies in radians a position, scaled."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths are divided by `factor`, short ones kept, those between blended.

    A wavelength counts as long above original_length / low_frequency_factor and as short below original_length /
    high_frequency_factor.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Frequencies in radians a position, scaled."""
        periods = self.original_length * frequencies / (2 * np.pi)  # in the original length
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((periods - low) / (high - low), 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How queries and keys turn with their position.

    Fields:
      theta: base of the geometric series of frequencies theta^(-2i / features).
      features: how many features of a head turn, the first ones; None is all (even).
      interleaved: feature 2i turns with 2i + 1 (RoFormer, GPT-J) instead of i with i + features / 2 (GPT-NeoX, Llama).
      scaling: a function of the frequencies, or None.
    """

    theta: float = 10_000.0
    features: int | None = None
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 (features / 2,), radians a position, for heads of this width.

        Raises:
          ValueError: `features` is odd, or more than the head has.
        """
        features = head_dim if self.features is None else self.features
        if features % 2 or not 0 < features <= head_dim:
            raise ValueError(f"rotary features must be even and in 2 .. head_dim = {head_dim}, got {features}")
        frequencies = float(self.theta) ** (-np.arange(0, features, 2) / features)
        return (frequencies if self.scaling is None else self.scaling(frequencies)).astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns each pair of features by its frequency times the position; angles and products are float32.

    Args:
      x: (batch, time, heads, head_dim).
      positions: int32 (batch or 1, time).
      rotary: frequencies and layout.

    Returns:
      Like x.
    """
    frequencies = rotary.frequencies(x.shape[-1])
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned, rest = x[..., : 2 * len(frequencies)].astype(jnp.float32), x[..., 2 * len(frequencies) :]
    if rotary.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if rotary.interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)

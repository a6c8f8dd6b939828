"""Convolutions of periodic fields in Fourier space, with few modes kept, as matrix products.

Of a field's n modes a Fourier layer (Li et al. 2021, FNO) keeps a dozen, so that two thin matrices of cosines and sines
do what two FFTs would, exactly up to rounding, on any device's matrix unit. Complex numbers are pairs (re, im) of
floats on an axis of their own, in the parameters too: optimizers, sharding and bfloat16 need not know of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.partitioning import partitioned


def _forward(points: int, modes: np.ndarray) -> np.ndarray:
    """exp(-2 pi i k x / n) as (points, modes, 2)."""
    angle = 2 * np.pi * np.outer(np.arange(points), modes) / points
    return np.stack([np.cos(angle), -np.sin(angle)], -1)


def _complex_product(matrix: np.ndarray) -> np.ndarray:
    """A complex matrix (a, b, 2) as a real one on pairs, (a, 2, b, 2)."""
    real, imaginary = matrix[..., 0], matrix[..., 1]
    return np.stack([np.stack([real, imaginary], -1), np.stack([-imaginary, real], -1)], 1)


def _half_inverse(points: int, modes: int) -> np.ndarray:
    """From modes 0 .. modes - 1 of a real field, as pairs, to its points: (modes, 2, points)."""
    kept = np.arange(modes)
    # A real field's other half is the conjugate; mode 0 and the highest of an even length have none.
    times = np.where((kept == 0) | (2 * kept == points), 1.0, 2.0) / points
    angle = 2 * np.pi * np.outer(kept, np.arange(points)) / points
    return np.stack([np.cos(angle), -np.sin(angle)], 1) * times[:, None, None]


def kept_rows(points: int, modes: int) -> np.ndarray:
    """The first axis' modes of a layer on a plane: low positive ones, and the negative ones, which win if they meet.

    With 2 modes > points both blocks claim rows; the second is written last in the published layers.
    """
    return np.concatenate([np.arange(min(modes, points - modes)), np.arange(points - modes, points)])


class SpectralConv(nn.Module):
    """out_k = x_k W_k for the low modes k of the Fourier transform, zero for the others; back in space.

    Parameter `kernel`: on a line (modes, in, features, 2); on a plane (2, modes, modes, in, features, 2), whose first
    axis are the blocks of positive and of negative modes along the first direction. Its initial values are U(0, 1) /
    (in features), real and imaginary part.

    Fields:
      features: channels of the output.
      modes: kept along each direction.
      axes: logical names of the input's and the output's channels.
    """

    features: int
    modes: tuple[int, ...]
    axes: tuple[str | None, str | None] = (None, "embed")
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, n, C) or (B, n, m, C) to the same with `features` channels.

        Raises ValueError where the field has other directions than `modes`, or fewer modes than are kept.
        """
        *points, channels = x.shape[1:]
        if len(points) != len(self.modes):
            raise ValueError(f"modes {self.modes} are of {len(self.modes)} directions, the field {x.shape} has others")
        most = (*points[:-1], points[-1] // 2 + 1)
        if any(kept > there for kept, there in zip(self.modes, most, strict=True)):
            raise ValueError(f"a field of {tuple(points)} points has {most} modes, fewer than {self.modes}")

        def init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(rng, shape, dtype) / (channels * self.features)

        blocks = () if len(points) == 1 else (2,)
        shape = (*blocks, *self.modes, channels, self.features, 2)
        names = (None,) * (len(shape) - 3) + (*self.axes, None)
        kernel = self.param("kernel", partitioned(init, *names), shape, self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        last = self.modes[-1]
        half = jnp.asarray(_forward(points[-1], np.arange(last)), x.dtype)
        inverse = jnp.asarray(_half_inverse(points[-1], last), x.dtype)
        if len(points) == 1:
            spectrum = exact("bni,nkc->kbci", x, half)
            mixed = _mix(spectrum, kernel)
            return exact("kbco,kcn->bno", mixed, inverse)
        rows = kept_rows(points[0], self.modes[0])
        low = len(rows) - self.modes[0]
        kernel = jnp.concatenate([kernel[0, :low], kernel[1]])
        along = jnp.asarray(_complex_product(_forward(points[0], rows)), x.dtype)
        back = jnp.asarray(_complex_product(_forward(points[0], -rows).swapaxes(0, 1) / points[0]), x.dtype)
        spectrum = exact("bnmi,mlc->bnlci", x, half)
        spectrum = exact("bnlci,nckd->klbdi", spectrum, along)
        mixed = _mix(spectrum, kernel)
        mixed = exact("klbco,kcnd->bnldo", mixed, back)
        return exact("bnldo,ldm->bnmo", mixed, inverse)


def _mix(spectrum: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., B, 2, in) times (..., in, out, 2), complex: (..., B, 2, out)."""
    real, imaginary = kernel[..., 0], kernel[..., 1]
    # One real product of twice the width: [re, im] [[Wr, Wi], [-Wi, Wr]].
    both = jnp.concatenate([jnp.concatenate([real, imaginary], -1), jnp.concatenate([-imaginary, real], -1)], axis=-2)
    flat = spectrum.reshape(*spectrum.shape[:-2], -1)
    return (flat @ both).reshape(*spectrum.shape[:-1], kernel.shape[-2])

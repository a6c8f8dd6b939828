"""Feature pyramids of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.convolution import Conv


def resize_nearest(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """(B, Y, X, C) to (B, rows, columns, C), each the pixel at floor(i Y / rows), as PyTorch."""
    y, z = (np.arange(new) * old // new for new, old in ((rows, x.shape[1]), (columns, x.shape[2])))
    return x[:, y][:, :, z]


class FeaturePyramid(nn.Module):
    """A feature pyramid network (Lin et al. 2017): 1 x 1 laterals, sums from the top down, 3 x 3 outputs.

    Children: `lateral_{i}`, `output_{i}`. Further outputs beyond the maps are 3 x 3 convolutions of stride 2 of the
    last map, then of the output before.
    """

    channels: int
    outputs: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps, finest first, to `outputs` maps of `channels`."""
        convolution = partial(Conv, self.channels, dtype=self.dtype, param_dtype=self.param_dtype)
        laterals = [convolution(axes=("embed", "mlp"), name=f"lateral_{i}")(x) for i, x in enumerate(maps)]
        for i in reversed(range(len(maps) - 1)):
            laterals[i] = laterals[i] + resize_nearest(laterals[i + 1], *laterals[i].shape[1:3])
        outs = [convolution(3, axes=("mlp", "embed"), name=f"output_{i}")(x) for i, x in enumerate(laterals)]
        x = maps[-1]
        for i in range(len(maps), self.outputs):
            x = convolution(3, stride=2, name=f"output_{i}")(x)
            outs.append(x)
        return outs

"""Images to tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.partitioning import partitioned


class PatchEmbedding(nn.Module):
    """A linear map of each patch of an image (Dosovitskiy et al. 2021, eq. 1): a convolution with stride = kernel.

    Fields:
      features: width of a token.
      patch: height and width of a patch in pixels.
      use_bias: of the map.
    """

    features: int
    patch: tuple[int, int]
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, height, width, channels) to (batch, rows, columns, features).

        Raises:
          ValueError: the image's sides are not multiples of the patch's.
        """
        height, width = images.shape[1:3]
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {self.patch}")
        return nn.Conv(
            self.features,
            self.patch,
            strides=self.patch,
            padding="VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=partitioned(self.kernel_init, None, None, None, "embed"),
            bias_init=partitioned(nn.initializers.zeros_init(), "embed"),
            name="projection",
        )(images)

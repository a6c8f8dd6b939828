"""A Transformer on features: the stack of blocks alone, bidirectional unless its config says otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.transformer import TransformerConfig, make_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(TransformerConfig):
    """A Transformer encoder, pre- or post-norm, with any mixer; the fields are those of `TransformerConfig`."""


class Encoder(nn.Module):
    """The blocks `layer_{i}`, and `norm` after the last if they norm their inputs.

    Fields:
      config: see `EncoderConfig`.
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
    """

    config: EncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: see the class's docstring."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.layer = make_blocks(self.config, **options)
        if self.config.norm_position == "pre":
            self.norm = self.config.make_norm(**options)

    def __call__(self, x: jax.Array, *, valid: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """Features in the context of all tokens.

        Args:
          x: float (batch, time, features), positions added already.
          valid: bool (batch, time), False for padding; what comes out there means nothing, but is finite.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          Like x.

        Raises:
          ValueError, TypeError: an argument's shape or dtype is wrong.
        """
        features = self.config.features
        if x.ndim != 3 or x.shape[-1] != features:
            raise ValueError(f"x must be (batch, time, features = {features}), got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point, got {x.dtype}")
        for block in self.layer:
            x, _ = block(x, None, valid, deterministic)
        return self.norm(x) if self.config.norm_position == "pre" else x

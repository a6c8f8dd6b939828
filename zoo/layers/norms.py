"""Normalisation over features, by name, with float32 statistics whatever the input's dtype."""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from zoo.errors import unknown
from zoo.layers.partitioning import partitioned

NormKind = Literal["layer", "rms"]


def norm(
    kind: NormKind,
    *,
    epsilon: float,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    axis: str | None = "embed",
    name: str | None = None,
) -> nn.LayerNorm | nn.RMSNorm:
    """A normalisation of the last axis.

    "layer": (x - mean) / sqrt(variance + epsilon) * scale + bias (Ba et al. 2016); "rms": x / sqrt(mean(x^2) + epsilon)
    * scale (Zhang and Sennrich 2019). The variance is the mean of squared deviations, not a difference of means:
    residual streams of trained language models hold entries thousands of times their spread.

    Args:
      kind: "layer" or "rms".
      epsilon: added to the variance or mean square.
      dtype: of the output; None infers it from input and parameters.
      param_dtype: of the parameters.
      axis: logical name of the normalised axis.
      name: the module's name.

    Raises:
      ValueError: `kind` is unknown.
    """
    scale_init = partitioned(nn.initializers.ones_init(), axis)
    if kind == "layer":
        return nn.LayerNorm(
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            scale_init=scale_init,
            bias_init=partitioned(nn.initializers.zeros_init(), axis),
            use_fast_variance=False,
            name=name,
        )
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, scale_init=scale_init, name=name)
    raise unknown("norm", kind, get_args(NormKind))

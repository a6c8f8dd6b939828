"""Normalisation over features, by name, with float32 statistics whatever the input's dtype."""

from __future__ import annotations

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
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
    use_bias: bool = True,
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
      use_bias: whether "layer" has a bias; "rms" never has.
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
            use_bias=use_bias,
            use_fast_variance=False,
            name=name,
        )
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, scale_init=scale_init, name=name)
    raise unknown("norm", kind, get_args(NormKind))


class GatedRMSNorm(nn.Module):
    """rms_norm(x) * silu(gate); with `gate_first` rms_norm(x * silu(gate)), as in Mamba-2. Float32 inside.

    Fields:
      epsilon: added to the mean square.
      gate_first: see there.
      use_scale: whether the norm has a learned scale.
      axis: logical name of the normalised axis.
    """

    epsilon: float = 1e-5
    gate_first: bool = False
    use_scale: bool = True
    axis: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Both (..., features) to the same, in `dtype`, or the gate's dtype."""
        dtype = gate.dtype if self.dtype is None else self.dtype
        x, gate = x.astype(jnp.float32), nn.silu(gate.astype(jnp.float32))
        norm = nn.RMSNorm(
            epsilon=self.epsilon, dtype=jnp.float32, param_dtype=self.param_dtype, use_scale=self.use_scale,
            scale_init=partitioned(nn.initializers.ones_init(), self.axis), name="norm",
        )  # fmt: skip
        return (norm(x * gate) if self.gate_first else norm(x) * gate).astype(dtype)

"""Convolution, batch norm and layer scale, which are one convolution once training is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.batch_norm import BatchNorm
from zoo.layers.convolution import Conv, torch_kernel_init
from zoo.layers.partitioning import partitioned


class LayerScale(nn.Module):
    """x times a number a channel that starts small (Touvron et al. 2021, CaiT). Parameter: `scale`."""

    initial: float
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., channels) to the same shape."""
        init = partitioned(nn.initializers.constant(self.initial), self.axis)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        x, scale = nn.dtypes.promote_dtype(x, scale, dtype=self.dtype)
        return x * scale


class ConvNorm(nn.Module):
    """layer_scale(batch_norm(conv(x))), children `conv`, `norm` and `layer_scale`.

    Applied with variables that went through `fold`, it is a convolution alone: what was folded is left out.

    Fields beside those of `Conv` and `BatchNorm`:
      norm: whether there is a batch norm.
      layer_scale: initial value of the layer scale, or None for none.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    padding: int | None = None
    use_bias: bool = True
    norm: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.1
    layer_scale: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = torch_kernel_init
    bias_init: nn.initializers.Initializer | None = None
    axes: tuple[str | None, str | None] = (None, "embed")
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """As `Conv`. Raises ValueError for training with folded variables."""
        has_norm = self.norm and self._has("norm")
        if train and self.norm and not has_norm:
            raise ValueError(
                f"{'/'.join(self.path)} was folded for inference and cannot train: use the original variables"
            )
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Conv(
            self.features, self.kernel_size, self.stride, self.groups, self.padding,
            self.use_bias or (self.norm and not has_norm), kernel_init=self.kernel_init, bias_init=self.bias_init,
            axes=self.axes, dilation=self.dilation, **options, name="conv",
        )(x)  # fmt: skip
        if has_norm:
            x = BatchNorm(self.epsilon, self.momentum, axis=self.axes[1], **options, name="norm")(x, train)
        if self.layer_scale is not None and self._has("layer_scale"):
            x = LayerScale(self.layer_scale, axis=self.axes[1], **options, name="layer_scale")(x)
        return x

    def _has(self, child: str) -> bool:
        return self.is_initializing() or self.has_variable("params", child)


def fold(variables: Mapping[str, Any], *, epsilon: float = 1e-5) -> dict[str, Any]:
    """Variables of the same network with every batch norm and layer scale behind a convolution folded into it.

    With gain g = scale / sqrt(var + epsilon), norm(conv(x)) = conv(x) with kernel g kernel and bias g (bias - mean) +
    the norm's bias; a layer scale multiplies both. All `ConvNorm`s are found by their children's names, `conv`, `norm`
    and `layer_scale`; nothing else is changed. The network is applied as before, with train=False:

        logits = model.apply(fold(variables), images)

    Args:
      variables: {"params": ..., "batch_stats": ...} of trained networks.
      epsilon: of the batch norms.

    Returns:
      Variables without logical axis names, and without the statistics that are folded.
    """
    variables = dict(nn.meta.unbox(variables))
    params, stats = _fold(variables.pop("params"), variables.pop("batch_stats", {}), epsilon)
    return {"params": params, **({"batch_stats": stats} if stats else {}), **variables}


def _fold(params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float) -> tuple[dict[str, Any], dict[str, Any]]:
    params, stats = dict(params), dict(stats)
    norm = stats.get("norm", {})
    if "conv" in params and ("norm" not in params or "mean" in norm):
        conv = dict(params["conv"])
        gain, shift = jnp.ones(()), None
        if "norm" in params:
            scale, bias = params["norm"]["scale"], params["norm"]["bias"]
            gain = scale * jax.lax.rsqrt(norm["var"] + epsilon)
            shift = bias - norm["mean"] * gain
            del params["norm"], stats["norm"]
        if "layer_scale" in params:
            layer_scale = params.pop("layer_scale")["scale"]
            gain, shift = gain * layer_scale, None if shift is None else shift * layer_scale
        conv["kernel"] = conv["kernel"] * gain
        if "bias" in conv or shift is not None:
            conv["bias"] = conv.get("bias", 0.0) * gain + (0.0 if shift is None else shift)
        params["conv"] = conv
    for name, child in params.items():
        if isinstance(child, Mapping):
            params[name], rest = _fold(child, stats.get(name, {}), epsilon)
            stats.pop(name, None)
            if rest:
                stats[name] = rest
    return params, stats

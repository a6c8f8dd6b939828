"""A feed-forward network cut into blocks, of which each token runs through a few (Gui et al. 2023, "SPT")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.routed_ffn import combine, grouped_product, route
from zoo.layers import lora
from zoo.layers.mlp import GATED, PLAIN, check_mlp
from zoo.layers.partitioning import dense, partitioned


class _Projection(nn.Module):
    """The parameters of a projection, as `nn.Dense` has them, and its adapter where there is one."""

    features: int
    axes: tuple[str, str]
    use_bias: bool
    kernel_init: Callable
    param_dtype: Any

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array | None, lora.Factors | None]:
        """Kernel (inputs, features), bias (features,), adapter."""
        kernel = self.param(
            "kernel", partitioned(self.kernel_init, *self.axes), (inputs, self.features), self.param_dtype
        )
        bias = None
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), self.axes[1])
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        return kernel, bias, lora.factors(self, inputs, self.features)


class RoutedMLP(nn.Module):
    """`zoo.layers.mlp.MLP` with the same parameters, its hidden units in blocks of equal size, and a router.

    With p = sigmoid(router(x)) a token runs through the `active` blocks of largest p. Published:

        h_g = activation(c (W1_g x + b1_g) + adapter),  y = sum_g c W2_g h_g + adapter,  + b2,  c = 2 p_g

    so the router learns through c, which scales the frozen kernels and not the adapters (`zoo.layers.lora`). Gated
    kinds have c on both projections in.

    Fields beside those of `MLP`:
      blocks: G, a divisor of `hidden`.
      active: blocks of a token.
      scaled: whether c is 2 p, or 1 (the published layers without adapters).
    """

    hidden: int
    kind: str = "gelu"
    use_bias: bool = True
    blocks: int = 4
    active: int = 2
    scaled: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., features) to (..., features).

        Raises:
          ValueError: `kind` is unknown, blocks do not divide `hidden`, or fewer than `active`.
        """
        check_mlp(self.kind)
        check_blocks(self.hidden, self.blocks, self.active)
        features, width = x.shape[-1], self.hidden // self.blocks
        router = dense(
            self.blocks, ("embed", None), dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=self.kernel_init, name="router",
        )  # fmt: skip
        tokens = x.reshape(-1, features)
        probabilities = nn.sigmoid(router(tokens).astype(jnp.float32))
        scores, choices = jax.lax.top_k(probabilities, self.active)
        routing = route(choices, self.blocks)
        kernel_in, kernel_out = self.kernel_init, self.out_init

        def projection(name: str) -> tuple[Any, Any, Any]:
            inside = name != "down"
            axes = ("embed", "mlp") if inside else ("mlp", "embed")
            sizes = (self.hidden, features) if inside else (features, self.hidden)
            made = _Projection(
                sizes[0], axes, self.use_bias, kernel_in if inside else kernel_out, self.param_dtype, name=name
            )
            return made(sizes[1])

        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        tokens = tokens.astype(dtype)
        rows = tokens[routing.tokens]
        scale = 2 * scores.reshape(-1)[routing.slots, None].astype(dtype) if self.scaled else jnp.ones((), dtype)

        def into(name: str) -> jax.Array:
            kernel, bias, adapter = projection(name)
            blocks = kernel.astype(dtype).reshape(features, self.blocks, width).swapaxes(0, 1)
            out = grouped_product(rows, blocks, routing.sizes)
            if bias is not None:
                out += bias.astype(dtype).reshape(self.blocks, width)[routing.blocks]
            out = scale * out
            if adapter is not None:
                low = (tokens @ adapter.left.astype(dtype))[routing.tokens]
                right = adapter.right.astype(dtype).reshape(self.blocks, width, -1).swapaxes(1, 2)
                out += adapter.scale * grouped_product(low, right, routing.sizes)
            return out

        up = into("up")
        hidden = GATED[self.kind](into("gate")) * up if self.kind in GATED else PLAIN[self.kind](up)
        kernel, bias, adapter = projection("down")
        blocks = kernel.astype(dtype).reshape(self.blocks, width, features)
        y = combine(scale * grouped_product(hidden, blocks, routing.sizes), routing, self.active)
        if adapter is not None:
            left = adapter.left.astype(dtype).reshape(self.blocks, width, -1)
            low = combine(grouped_product(hidden, left, routing.sizes), routing, self.active)
            y += adapter.scale * low @ adapter.right.astype(dtype).T
        if bias is not None:
            y += bias.astype(dtype)
        return y.reshape(x.shape)


def check_blocks(hidden: int, blocks: int, active: int) -> None:
    """Raises ValueError unless `blocks` divide `hidden` and `active` are among them."""
    if blocks < 1 or hidden % blocks or not 1 <= active <= blocks:
        raise ValueError(
            f"blocks must divide the {hidden} hidden units and 1 to all of them be active, got {blocks} and {active}"
        )

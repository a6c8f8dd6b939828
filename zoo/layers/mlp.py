"""Position-wise networks of Transformer blocks, plain, gated or with two norms, and activations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.errors import unknown
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP."""
    return x * nn.sigmoid(1.702 * x)


PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}
GATED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": nn.silu,
    "geglu": PLAIN["gelu"],
    "geglu_tanh": PLAIN["gelu_tanh"],
    "reglu": nn.relu,
}


def check_mlp(kind: str) -> None:
    """Raises ValueError for a name that is no kind of MLP."""
    if kind not in PLAIN | GATED:
        raise unknown("MLP", kind, PLAIN | GATED)


class MLP(nn.Module):
    """down(activation(up(x))), or gated (Shazeer 2020) down(activation(gate(x)) * up(x)).

    Fields:
      hidden: width between the two projections.
      kind: a plain activation ("gelu" is the exact one, "gelu_tanh" its tanh form, "quick_gelu", "relu", "silu") or a
        gated one ("swiglu", "geglu", "geglu_tanh", "reglu").
      use_bias: of all projections.
      kernel_init, out_init: initialisers of the projections in and of the one out.
    """

    hidden: int
    kind: str = "gelu"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    out_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., features) to (..., features). Raises ValueError if `kind` is unknown."""
        check_mlp(self.kind)
        project = partial(dense, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        up = project(self.hidden, ("embed", "mlp"), kernel_init=self.kernel_init, name="up")(x)
        if self.kind in GATED:
            gate = project(self.hidden, ("embed", "mlp"), kernel_init=self.kernel_init, name="gate")(x)
            hidden = GATED[self.kind](gate) * up
        else:
            hidden = PLAIN[self.kind](up)
        return project(x.shape[-1], ("mlp", "embed"), kernel_init=self.out_init, name="down")(hidden)


class NormedMLP(nn.Module):
    """down(norm(gelu(up(norm(x))))) with the exact gelu, norms that have a gain only, and no bias.

    Fields:
      hidden: width between the two projections.
      kernel_init: of both.
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., features) to the same shape."""
        options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        project: Callable[..., nn.Dense] = partial(dense, kernel_init=self.kernel_init, **options)
        y = norm("layer", epsilon=1e-5, **options, name="norm")(x)
        y = PLAIN["gelu"](project(self.hidden, ("embed", "mlp"), name="up")(y))
        y = norm("layer", epsilon=1e-5, axis="mlp", **options, name="hidden_norm")(y)
        return project(x.shape[-1], ("mlp", "embed"), name="down")(y)

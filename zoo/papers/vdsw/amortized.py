"""Networks that look at two clouds and predict the direction along which they differ most.

B pairs, m points, d coordinates.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.partitioning import partitioned
from zoo.papers.vdsw.sliced import Reduction, check_clouds, sliced_wasserstein, unit
from zoo.papers.vdsw.von_mises_fisher import VonMisesFisher

Kind = Literal["linear", "glinear", "nonlinear", "attn", "eff_attn", "lin_attn"]


@dataclasses.dataclass(frozen=True)
class AmortizedConfig:
    """A network that predicts a direction, and the cost it is trained for.

    Attributes:
      kind: a linear map over the points, one behind or before a small network, or attention: full, efficient, linear.
      points: m, to which the linear maps are tied.
      dim: d.
      key_dim: of queries and keys.
      proj_dim: points to which `lin_attn` projects keys and values.
      sharing: whether `lin_attn` projects both by the same map.
      kappa: concentration around the prediction; None takes the prediction alone (max-sliced).
      directions: drawn around it.
    """

    kind: Kind = "lin_attn"
    points: int = 2048
    dim: int = 3
    key_dim: int = 64
    proj_dim: int = 64
    sharing: bool = False
    kappa: float | None = 1.0
    directions: int = 100

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        for name in ("points", "key_dim", "proj_dim", "directions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}")
        if self.kappa is not None and self.kappa <= 0:
            raise ValueError(f"kappa must be None or positive, got {self.kappa}")


class _Affine(nn.Module):
    """The parameters of a linear layer, kernel (inputs, outputs) and bias, as PyTorch draws them."""

    inputs: int
    outputs: int
    kernel_init: nn.initializers.Initializer = torch_kernel_init
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        shape = (self.inputs, self.outputs)
        kernel = self.param("kernel", partitioned(self.kernel_init, None, None), shape, self.param_dtype)
        bias = self.param("bias", partitioned(torch_bias_init(self.inputs), None), shape[1:], self.param_dtype)
        return kernel.astype(dtype), bias.astype(dtype)


class _CloudAttention(nn.Module):
    """The mean over a cloud's points of what each attends to: (B, m, d) to (B, d)."""

    config: AmortizedConfig
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The layers' parameters, shared by both clouds."""
        config, d = self.config, self.config.dim
        own = {"param_dtype": self.param_dtype}
        self.queries = _Affine(d, config.key_dim, **own)
        self.keys = _Affine(d, config.key_dim, **own)
        self.values = _Affine(d, d, **own)
        if config.kind == "lin_attn":
            own["kernel_init"] = nn.initializers.xavier_normal()
            self.project_keys = _Affine(config.points, config.proj_dim, **own)
            if not config.sharing:
                self.project_values = _Affine(config.points, config.proj_dim, **own)

    def __call__(self, x: jax.Array) -> jax.Array:
        layers = [layer(x.dtype) for layer in (self.queries, self.keys, self.values)]
        query = x @ layers[0][0] + layers[0][1]
        if self.config.kind == "lin_attn":
            maps = [self.project_keys(x.dtype)]
            maps.append(maps[0] if self.config.sharing else self.project_values(x.dtype))
            key, value = (_projected(x, *map_, *layer) for map_, layer in zip(maps, layers[1:], strict=True))
        else:
            key, value = (x @ kernel + bias for kernel, bias in layers[1:])
        if self.config.kind == "eff_attn":
            # The mean over the queries commutes with the product by the context.
            context = jnp.einsum("bmk,bmd->bkd", jax.nn.softmax(key, 1), value)
            return jnp.einsum("bk,bkd->bd", jax.nn.softmax(query, -1).mean(1), context)
        found = attention(*(array[:, :, None] for array in (query, key, value)))
        return jnp.asarray(found)[:, :, 0].mean(1)


def _projected(x: jax.Array, along: jax.Array, offset: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Features of points, projected along the points: P (X W + b) + c, as (P X) W + (P 1) b + c, of few products."""
    few = jnp.einsum("bmd,ml->bld", x, along) @ kernel
    return few + along.sum(0)[:, None] * bias + offset[:, None]


class AmortizedDirection(nn.Module):
    """The direction, a unit vector, along which two clouds should differ most.

    With attention it does not change when the clouds change places, nor, but for `lin_attn`, whose projections count
    the points, with their order.
    """

    config: AmortizedConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """(B, m, d) and (B, m, d) to (B, d).

        Raises ValueError where the clouds are of another size than the linear maps.
        """
        config = self.config
        check_clouds(x, y)
        if x.shape[2] != config.dim:
            raise ValueError(f"clouds must have {config.dim} coordinates, got {x.shape}")
        if config.kind not in ("attn", "eff_attn") and not x.shape[1] == y.shape[1] == config.points:
            raise ValueError(f"{config.kind} takes clouds of {config.points} points, got {x.shape} and {y.shape}")
        x, y = nn.dtypes.promote_dtype(x, y, dtype=self.dtype)
        if config.kind in ("attn", "eff_attn", "lin_attn"):
            look = _CloudAttention(config, self.param_dtype, name="attention")
            return unit(look(x) + look(y))
        both = jnp.concatenate([x, y], axis=1)
        if config.kind == "glinear":
            both = self._pointwise(both, "before")
        kernel, bias = _Affine(2 * config.points, 1, param_dtype=self.param_dtype, name="along")(both.dtype)
        a = jnp.einsum("bmd,mo->bd", both, kernel) + bias
        return unit(self._pointwise(a, "after") if config.kind == "nonlinear" else a)

    def _pointwise(self, x: jax.Array, name: str) -> jax.Array:
        d = self.config.dim
        for index in range(2):
            kernel, bias = _Affine(d, d, param_dtype=self.param_dtype, name=f"{name}_{index}")(x.dtype)
            x = x @ kernel + bias
            x = nn.sigmoid(x) if index == 0 else x
        return x


def directions(location: Any, key: jax.Array, config: AmortizedConfig) -> jax.Array:
    """Unit vectors (B, L, d) around the locations (B, d), or these alone, (B, 1, d), where kappa is None."""
    if config.kappa is None:
        return location[:, None]
    return jnp.moveaxis(VonMisesFisher(location, config.kappa).sample(key, config.directions), 0, 1)


class PlayersLosses(NamedTuple):
    """What both players descend."""

    direction: jax.Array  # minus the mean cost, with gradients to the direction's parameters only
    cloud: jax.Array  # the mean cost, with gradients to the clouds only
    location: jax.Array  # (B, d)


def amortized_loss(
    model: AmortizedDirection,
    params: Any,
    x: jax.Array,
    y: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    *,
    reduction: Reduction = "sum",
    squared: bool = True,
) -> PlayersLosses:
    """Both players' losses at the same parameters; in training the directions move first (`two_player_step`).

    Args:
      model, params: the network that predicts directions.
      x, y: clouds (B, m, d), the data and the reconstruction, say.
      keys: of each player's own draw of directions.
      reduction, squared: as of `sliced_wasserstein`.
    """
    fixed = jax.lax.stop_gradient((x, y))
    location: Any = model.apply({"params": params}, *fixed)
    search = sliced_wasserstein(*fixed, directions(location, keys[0], model.config), 2, reduction, squared=squared)
    held = jax.lax.stop_gradient(location)
    cost = sliced_wasserstein(x, y, directions(held, keys[1], model.config), 2, reduction, squared=squared)
    return PlayersLosses(-search.mean(), cost.mean(), held)


def example_inputs(config: AmortizedConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Two random clouds."""
    rng = np.random.default_rng(0)
    shape = (batch_size, config.points, config.dim)
    return {name: rng.standard_normal(shape, np.float32) for name in ("x", "y")}


def loss(model: Any) -> Any:
    """The direction's loss, for `zoo.train`: minus the mean cost of the batch's clouds `x` and `y`."""

    def loss_function(params, model_state, batch, rngs, train):
        key = rngs["dropout"]
        found = amortized_loss(model, params, batch["x"], batch["y"], (key, key))
        return found.direction, (model_state, {})

    return loss_function

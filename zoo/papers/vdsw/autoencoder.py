"""Autoencoders of point clouds: PointNet's, and one of capsules with folding decoders.

B clouds, m points in space.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.batch_norm import BatchNorm
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.partitioning import dense, partitioned
from zoo.papers.vdsw.sliced import sliced_wasserstein, uniform_directions, unit


def _check_cloud(x: jax.Array) -> None:
    if x.ndim != 3 or x.shape[-1] != 3:
        raise ValueError(f"clouds must be (batch, points, 3), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"clouds must be floating point, got {x.dtype}")


def _pointwise(features: int, inputs: int, own: dict[str, Any], name: str | None = None) -> nn.Dense:
    """A convolution of size 1 with PyTorch's default initialisation."""
    return dense(
        features, (None, "embed"), kernel_init=torch_kernel_init, bias_init=torch_bias_init(inputs), name=name, **own
    )


@dataclasses.dataclass(frozen=True)
class PointNetConfig:
    """PointNet's autoencoder.

    Attributes:
      points: of the reconstruction; the encoder takes any number.
      code: size of the code, of unit length.
      widths: of the encoder's layers.
      hidden: of the decoder's two layers.
    """

    points: int = 2048
    code: int = 256
    widths: tuple[int, ...] = (64, 64, 64, 128, 1024)
    hidden: int = 1024

    def __post_init__(self) -> None:
        for name in ("points", "code", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive and at least one, got {self.widths}")


class PointNetAE(nn.Module):
    """Points one by one through five layers, the maximum over them, a code of unit length; two layers and tanh back."""

    config: PointNetConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The layers of both halves."""
        config = self.config
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        xavier: dict[str, Any] = {
            **own, "kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.constant(0.01),
        }  # fmt: skip
        inputs = (3, *config.widths[:-1])
        self.layers = [_pointwise(width, before, own) for width, before in zip(config.widths, inputs, strict=True)]
        self.norms = [BatchNorm(**own) for _ in config.widths]
        self.to_code = dense(config.code, ("embed", None), **xavier)
        self.fc = [dense(config.hidden, (None, "mlp"), **xavier), dense(config.hidden, ("mlp", "embed"), **xavier)]
        self.fc_norms = [BatchNorm(**own) for _ in range(2)]
        self.to_points = dense(3 * config.points, ("embed", None), **xavier)

    def encode(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, m, 3) to the code (B, code)."""
        _check_cloud(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.relu(norm(layer(x), train))
        return unit(self.to_code(x.max(1)))

    def decode(self, code: jax.Array, train: bool = False) -> jax.Array:
        """(B, code) to (B, points, 3) in (-1, 1)."""
        x = code
        for layer, norm in zip(self.fc, self.fc_norms, strict=True):
            x = nn.relu(norm(layer(x), train))
        return jnp.tanh(self.to_points(x)).reshape(-1, self.config.points, 3)

    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """(B, m, 3) to the code (B, code) and the reconstruction (B, points, 3)."""
        code = self.encode(x, train)
        return code, self.decode(code, train)


@dataclasses.dataclass(frozen=True)
class CapsuleConfig:
    """The autoencoder of capsules.

    Attributes:
      points: of the reconstruction, a multiple of `latent`.
      primary, primary_size: capsules that routing starts from, and each one's size.
      latent, latent_size: capsules that are the code.
      rounds: of routing.
    """

    points: int = 2048
    primary: int = 1024
    primary_size: int = 16
    latent: int = 64
    latent_size: int = 64
    rounds: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if self.points % self.latent:
            raise ValueError(f"points must be a multiple of latent, got {self.points} and {self.latent}")


def squash(x: jax.Array) -> jax.Array:
    """x |x| / (1 + |x|^2) over the last axis: lengths below 1."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * jnp.sqrt(square + 1e-12) / (1 + square)


class _Fold(nn.Module):
    """A small network from a point of a square and a capsule to a point in space."""

    own: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        for index, features in enumerate((width, width // 2, width // 4)):
            x = _pointwise(features, x.shape[-1], self.own, f"layer_{index}")(x)
            x = nn.relu(BatchNorm(**self.own, name=f"norm_{index}")(x, train))
        return jnp.tanh(_pointwise(3, x.shape[-1], self.own, "leave")(x))


class PCNCapsAE(nn.Module):
    """Primary capsules from points by a maximum each, latent ones by routing, and many folded squares as the cloud.

    As in "3D Point Capsule Networks" (Zhao, Birdal, Deng, Tombari 2019, arXiv 1812.10775), which the paper's second
    autoencoder is; a reconstruction from that paper, checked against no published numbers.
    """

    config: CapsuleConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """(B, m, 3) to the capsules (B, latent, latent size) and the reconstruction (B, points, 3).

        In training the squares' points are drawn anew from the rng "dropout", if there is one.
        """
        config = self.config
        _check_cloud(x)
        own: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for index, width in enumerate((64, 128)):
            x = _pointwise(width, x.shape[-1], own, f"layer_{index}")(x)
            x = nn.relu(BatchNorm(**own, name=f"norm_{index}")(x, train))
        primary = _pointwise(config.primary * config.primary_size, 128, own, "capsules")(x)
        primary = BatchNorm(**own, name="capsules_norm")(primary, train).max(1)
        primary = squash(primary.reshape(-1, config.primary_size, config.primary).swapaxes(1, 2))
        capsules = self._route(primary)
        copies = config.points // config.latent
        fixed = not (train and self.has_rng("dropout"))
        key = jax.random.key(0) if fixed else self.make_rng("dropout")
        square = jax.random.uniform(key, (copies, 1, config.latent, 2), capsules.dtype)
        square = jnp.broadcast_to(square, (copies, len(capsules), config.latent, 2))
        inputs = jnp.concatenate([square, jnp.broadcast_to(capsules, (copies, *capsules.shape))], -1)
        folds = nn.vmap(
            _Fold,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=(0, None),
            metadata_params={nn.PARTITION_NAME: None},
        )(own, name="folds")(inputs, train)
        return capsules, jnp.moveaxis(folds, 0, 1).reshape(-1, config.points, 3)

    def _route(self, primary: jax.Array) -> jax.Array:
        config = self.config
        shape = (config.latent, config.primary, config.primary_size, config.latent_size)
        init = partitioned(nn.initializers.normal(0.01), "embed", None, None, None)
        weight = self.param("routing", init, shape, self.param_dtype).astype(primary.dtype)
        votes = jnp.einsum("bpi,lpio->blpo", primary, weight)
        logits = jnp.zeros(votes.shape[:3], votes.dtype)
        held = jax.lax.stop_gradient(votes)  # gradients flow through the last round only
        for _ in range(config.rounds - 1):
            capsules = squash(jnp.einsum("blp,blpo->blo", jax.nn.softmax(logits, 1), held))
            logits = logits + jnp.einsum("blpo,blo->blp", held, capsules)
        return squash(jnp.einsum("blp,blpo->blo", jax.nn.softmax(logits, 1), votes))


def example_inputs(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """Random clouds in the unit ball."""
    x = np.random.default_rng(0).standard_normal((batch_size, config.points, 3), np.float32)
    return {"x": x / np.linalg.norm(x, axis=-1).max()}


def loss(model: Any, directions: int = 100) -> Any:
    """The reconstruction's sliced cost, for `zoo.train`; the batch holds clouds `x` (B, points, 3)."""

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        found, model_state = model.apply(variables, batch["x"], train=train, rngs=rngs, mutable=list(model_state))
        theta = uniform_directions(rngs["dropout"], len(batch["x"]), directions, 3)
        return sliced_wasserstein(batch["x"], found[1], theta).mean(), (model_state, {})

    return loss_function

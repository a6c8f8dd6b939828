"""The vision Transformer (Dosovitskiy et al. 2021; DeiT's sizes, Touvron et al. 2021), with any mixer.

Width D, L layers, N patches of P x P pixels, C classes: L (12 D^2 + 13 D) parameters of blocks, (3 P^2 + 1) D of patch
embedding, (N + 2) D of positions and class token, 2 D of the last norm and (D + 1) C of the head, as in timm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.encoder import Encoder, EncoderConfig
from zoo.backbones.transformer import check_positive
from zoo.errors import unknown
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.patches import PatchEmbedding
from zoo.layers.positions import resize_grid, sinusoid_grid

Pool = Literal["class", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """A vision Transformer; `ViTConfig.preset("vit_b16", mixer=...)` for the published ones.

    Fields beside those of `TransformerConfig`:
      image_size: height and width in pixels for which a learned table of positions is made; others interpolate it.
      patch: height and width of a patch in pixels.
      channels: of the images.
      classes: number of logits; None leaves the head away.
      pool: what the head sees after the last norm, a "class" token or the "mean" of all patches.
      positions: "learned" (also for the class token), "sinusoid" (two-dimensional, not for the class token), "rotary"
        (one-dimensional, row by row) or "none".
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("learned", "sinusoid", "rotary", "none")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vit_ti16": {"layers": 12, "features": 192, "heads": 3, "mlp_features": 768},
        "vit_s16": {"layers": 12, "features": 384, "heads": 6, "mlp_features": 1536},
        "vit_b16": {"layers": 12, "features": 768, "heads": 12, "mlp_features": 3072},
        "vit_l16": {"layers": 24, "features": 1024, "heads": 16, "mlp_features": 4096},
    }

    image_size: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    channels: int = 3
    classes: int | None = 1000
    pool: Pool = "class"
    positions: str = "learned"

    def __post_init__(self):
        super().__post_init__()
        if self.pool not in get_args(Pool):
            raise unknown("choice of pool", self.pool, get_args(Pool))
        if min(self.patch) < 1 or self.image_size[0] % self.patch[0] or self.image_size[1] % self.patch[1]:
            raise ValueError(f"image_size {self.image_size} does not divide into patches of {self.patch}")
        if self.positions == "sinusoid" and self.features % 4:
            raise ValueError(f"sinusoid positions need features that are a multiple of 4, got {self.features}")
        check_positive(self, "classes", "channels")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch[0], self.image_size[1] // self.patch[1]


class ViT(nn.Module):
    """A vision Transformer.

    model = ViT(ViTConfig.preset("vit_s16", mixer="softmax", classes=10))

    Parameters: `patch_embed`, `class_token` if that is pooled, `positions` if learned (its row for the class token
    first), `encoder/layer_{i}/{norm1,mixer,norm2,mlp}`, `encoder/norm`, `head`.

    Fields:
      config: see `ViTConfig`.
      dtype: of the computation; None infers it from images and parameters.
      param_dtype: of the parameters.
    """

    config: ViTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: see the class's docstring."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embed = PatchEmbedding(config.features, config.patch, kernel_init=config.kernel_init, **options)
        init = partitioned(config.kernel_init, None, None, "embed")
        special = config.pool == "class"
        if special:
            self.class_token = self.param("class_token", init, (1, 1, config.features), self.param_dtype)
        if config.positions == "learned":
            rows = config.grid[0] * config.grid[1] + special
            self.position_table = self.param("positions", init, (1, rows, config.features), self.param_dtype)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config, **options)
        if config.classes is not None:
            self.head = dense(config.classes, ("embed", None), kernel_init=nn.initializers.zeros_init(), **options)

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits of classes.

        Args:
          images: float (batch, height, width, channels), normalised as the weights expect; sides multiples of `patch`.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          (batch, classes), or the pooled (batch, features) if the config has no classes.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        x = self.hidden(images, deterministic=deterministic)
        x = x[:, 0] if self.config.pool == "class" else x.mean(axis=1)
        return x if self.config.classes is None else self.head(x)

    def hidden(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """All tokens after the last norm: (batch, class token if there is one + rows * columns, features)."""
        config = self.config
        if images.ndim != 4 or images.shape[-1] != config.channels or 0 in images.shape:
            raise ValueError(f"images must be (batch, height, width, {config.channels}), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
        x = self.patch_embed(images)
        batch, grid = x.shape[0], x.shape[1:3]
        x = x.reshape(batch, grid[0] * grid[1], config.features)
        special = int(config.pool == "class")
        if config.positions == "learned":
            x = x + resize_grid(self.position_table[:, special:], config.grid, grid).astype(x.dtype)
        elif config.positions == "sinusoid":
            x = x + jnp.asarray(sinusoid_grid(grid[0], grid[1], config.features), x.dtype)
        if special:
            token = self.class_token
            if config.positions == "learned":
                token = token + self.position_table[:, :1]
            token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, config.features))
            x = jnp.concatenate([token, x], axis=1)
        return self.encoder(self.dropout(x, train=not deterministic), deterministic=deterministic)

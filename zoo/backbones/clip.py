"""CLIP (Radford et al. 2021): a tower for images and one for texts, whose outputs share a space.

B images, N = rows * columns patches, M texts, T tokens, D width of the shared space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.encoder import EncoderConfig
from zoo.backbones.transformer import make_blocks
from zoo.errors import unknown
from zoo.layers.partitioning import partitioned
from zoo.layers.patches import PatchEmbedding
from zoo.layers.resizing import resize_bicubic
from zoo.weights.names import Rule, layer, under


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A CLIP; `CLIPConfig.preset("b16")` for those of OpenAI, b32, b16 and l14.

    Attributes:
      image_size: height and width in pixels that the table of positions is made for; other sizes interpolate it.
      patch_size: side of a patch in pixels.
      vision_width, vision_layers, vision_heads: of the image tower.
      text_width, text_layers, text_heads: of the text tower.
      context_length: rows of the text tower's table of positions, the most tokens of a text.
      vocab_size: token ids.
      embed_dim: D.
      channels: of the images.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "b32": {"patch_size": 32},
        "b16": {},
        "l14": {
            "patch_size": 14, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "text_width": 768,
            "text_heads": 12, "embed_dim": 768,
        },
    }  # fmt: skip

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    embed_dim: int = 512
    channels: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if len(self.image_size) != 2 or any(size < 1 or size % self.patch_size for size in self.image_size):
            raise ValueError(f"image_size must be two multiples of patch_size {self.patch_size}, got {self.image_size}")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_heads must divide {tower}_width, got {heads} heads and a width of {width}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The published config of this name, with some fields changed. Raises ValueError for an unknown name."""
        if name not in cls.PRESETS:
            raise unknown(f"preset of {cls.__name__}", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name], **changes})

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def encoder(self, tower: str) -> EncoderConfig:
        """The blocks of a tower, "vision" or "text"."""
        return EncoderConfig(
            features=getattr(self, f"{tower}_width"), layers=getattr(self, f"{tower}_layers"),
            heads=getattr(self, f"{tower}_heads"), mlp="quick_gelu", norm_epsilon=1e-5, causal=tower == "text",
        )  # fmt: skip


class ImageTower(nn.Module):
    """A vision Transformer with a norm before its blocks too.

    Children and parameters: `patch_embed`, `class_token`, `positions` (the class token's first), `norm_before`,
    `layer_{i}`, `norm`, `projection`.
    """

    config: CLIPConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = config.encoder("vision")
        width, init = config.vision_width, encoder.kernel_init
        self.patch_embed = PatchEmbedding(
            width, (config.patch_size, config.patch_size), use_bias=False, kernel_init=init, **options
        )  # fmt: skip
        self.class_token = self.param("class_token", partitioned(init, "embed"), (width,), self.param_dtype)
        rows = 1 + config.grid[0] * config.grid[1]
        self.positions = self.param("positions", partitioned(init, None, "embed"), (rows, width), self.param_dtype)
        self.norm_before = encoder.make_norm(**options)
        self.layer = make_blocks(encoder, **options)
        self.norm = encoder.make_norm(**options)
        shape = (width, config.embed_dim)
        self.projection = self.param("projection", partitioned(init, "embed", None), shape, self.param_dtype)

    def __call__(self, images: jax.Array, layers: Sequence[int] | None = None) -> list[jax.Array]:
        """All tokens, the class token's first, behind chosen layers, normalised and projected.

        Args:
          images: float (B, height, width, channels), standardised; sides are multiples of the patch's.
          layers: numbers of blocks, from 1, in any order; None is the last alone. The final norm and projection are
            applied to each.

        Returns:
          (B, 1 + N, D) for each of the layers.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        config = self.config
        if images.ndim != 4 or images.shape[-1] != config.channels or 0 in images.shape:
            raise ValueError(f"images must be (batch, height, width, {config.channels}), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
        x = self.patch_embed(images)
        grid, width = (x.shape[1], x.shape[2]), config.vision_width
        places = self.positions[1:].reshape(*config.grid, width)
        for axis in (0, 1):
            places = resize_bicubic(places, grid[axis], axis)
        x = x.reshape(x.shape[0], -1, width) + places.reshape(-1, width).astype(x.dtype)
        first = jnp.broadcast_to((self.class_token + self.positions[0]).astype(x.dtype), (x.shape[0], 1, width))
        x = self.norm_before(jnp.concatenate([first, x], axis=1))
        return _behind(x, self.layer, layers, lambda x: self.norm(x) @ self.projection.astype(x.dtype))


class TextTower(nn.Module):
    """A causal Transformer. Children and parameters: `embed`, `positions`, `layer_{i}`, `norm`, `projection`."""

    config: CLIPConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        encoder = config.encoder("text")
        width, init = config.text_width, encoder.kernel_init
        self.embed = nn.Embed(
            config.vocab_size, width, embedding_init=partitioned(init, "vocab", "embed"), **options
        )  # fmt: skip
        table = partitioned(nn.initializers.normal(0.01), None, "embed")
        self.positions = self.param("positions", table, (config.context_length, width), self.param_dtype)
        self.layer = make_blocks(encoder, **options)
        self.norm = encoder.make_norm(**options)
        shape = (width, config.embed_dim)
        self.projection = self.param("projection", partitioned(init, "embed", None), shape, self.param_dtype)

    def __call__(self, tokens: jax.Array, layers: Sequence[int] | None = None) -> list[jax.Array]:
        """The end's token of each text, behind chosen layers, normalised and projected.

        Args:
          tokens: int (M, T), T at most `context_length`; the text ends at the largest id (of "<|endoftext|>").
          layers: as of `ImageTower`.

        Returns:
          (M, D) for each of the layers.

        Raises:
          ValueError, TypeError: the tokens' shape or dtype is wrong.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers (texts, tokens), got {tokens.dtype} {tokens.shape}")
        length = self.config.context_length
        if not 0 < tokens.shape[1] <= length:
            raise ValueError(f"a text has 1 to {length} tokens, got {tokens.shape[1]}")
        x = self.embed(tokens)
        x = x + self.positions[: tokens.shape[1]].astype(x.dtype)
        end = jnp.argmax(tokens, axis=1)[:, None, None]

        def finish(x: jax.Array) -> jax.Array:
            chosen = jnp.take_along_axis(x, end, axis=1)[:, 0]
            return self.norm(chosen) @ self.projection.astype(x.dtype)

        return _behind(x, self.layer, layers, finish)


def _behind(x: jax.Array, blocks: list[Any], layers: Sequence[int] | None, finish: Any) -> list[jax.Array]:
    layers = [len(blocks)] if layers is None else list(layers)
    if not set(layers) <= set(range(1, len(blocks) + 1)):
        raise ValueError(f"layers must be among 1 .. {len(blocks)}, got {layers}")
    found = {}
    for number, block in enumerate(blocks, start=1):
        x, _ = block(x, None, None, True)
        if number in layers:
            found[number] = finish(x)
    return [found[number] for number in layers]


def _tower(blocks: str, path: str) -> list[Rule]:
    names = ("query", "key", "value")
    block = [
        *layer("norm", r"ln_(1|2)", "norm{0}"),
        Rule(r"attn\.in_proj_weight", tuple(f"params/mixer/{name}/kernel" for name in names), "linear", axis=-1),
        Rule(r"attn\.in_proj_bias", tuple(f"params/mixer/{name}/bias" for name in names), axis=-1),
        *layer("linear", r"attn\.out_proj", "mixer/out"),
        *layer("linear", r"mlp\.c_fc", "mlp/up"),
        *layer("linear", r"mlp\.c_proj", "mlp/down"),
    ]
    return under(rf"{blocks}\.resblocks\.(\d+)", path + "/layer_{0}", block)


def weight_rules(image: str, text: str) -> list[Rule]:
    """OpenAI's names, of an `ImageTower` and a `TextTower` at these paths."""
    return [
        *layer("conv2d", r"visual\.conv1", f"{image}/patch_embed/projection"),
        Rule(r"visual\.class_embedding", f"params/{image}/class_token"),
        Rule(r"visual\.positional_embedding", f"params/{image}/positions"),
        *layer("norm", r"visual\.ln_pre", f"{image}/norm_before"),
        *_tower(r"visual\.transformer", image),
        *layer("norm", r"visual\.ln_post", f"{image}/norm"),
        Rule(r"visual\.proj", f"params/{image}/projection"),
        *layer("embedding", "token_embedding", f"{text}/embed"),
        Rule("positional_embedding", f"params/{text}/positions"),
        *_tower("transformer", text),
        *layer("norm", "ln_final", f"{text}/norm"),
        Rule("text_projection", f"params/{text}/projection"),
        Rule("(?:input_resolution|context_length|vocab_size)", None),  # in the files of OpenAI
    ]

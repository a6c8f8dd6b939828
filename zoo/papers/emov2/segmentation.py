"""Semantic segmentation on an EMO: SegFormer's head, Semantic FPN, DeepLabv3, PSPNet."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.segmentation import ASPPHead, FCNHead, PSPHead, SegFormerHead, Segmentation, SemanticFPN
from zoo.papers.emov2.model import EMOv2Config, EMOv2Features

Head = Literal["segformer", "semantic_fpn", "deeplabv3", "pspnet"]


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """A network for semantic segmentation.

    Attributes:
      backbone: its window is 10 in all published ones.
      head: see the modules of that name.
      num_classes: logits.
      channels: of the head.
      dropout: of whole channels, before the classifier.
      image_size: height and width in pixels of example inputs; any others do.
    """

    backbone: EMOv2Config
    head: Head
    num_classes: int = 150
    channels: int = 256
    dropout: float = 0.1
    image_size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {tuple(HEADS)}, got {self.head!r}")
        if self.num_classes < 1 or self.channels < 1:
            raise ValueError(f"num_classes and channels must be positive, got {self.num_classes}, {self.channels}")


HEADS: dict[str, type[nn.Module]] = {
    "segformer": SegFormerHead, "semantic_fpn": SemanticFPN, "deeplabv3": ASPPHead, "pspnet": PSPHead,
}  # fmt: skip
WITH_AUXILIARY = ("deeplabv3", "pspnet")


class Segmenter(nn.Module):
    """Backbone and head. Children: `backbone`, `head`, and for DeepLabv3 and PSPNet `auxiliary`."""

    config: SegmenterConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Segmentation:
        """float (B, height, width, channels), standardised, to logits of the head's size, before the last resizing."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = EMOv2Features(config.backbone, **options, name="backbone")(images, train)
        logits = HEADS[config.head](config, **options, name="head")(maps, train)
        auxiliary = None
        if config.head in WITH_AUXILIARY:
            auxiliary = FCNHead(dataclasses.replace(config, channels=256), **options, name="auxiliary")(maps, train)
        return Segmentation(logits, auxiliary)

"""FcaFormer as a backbone: blocks in windows, maps for detection and segmentation, and the networks on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.mask_rcnn import Detector, DetectorConfig
from zoo.backbones.segmentation import FCNHead, Segmentation, UPerHead
from zoo.layers.convolution import Conv
from zoo.layers.norms import norm
from zoo.papers.fcaformer.model import _INIT, FcaFormerConfig, Trunk


@dataclasses.dataclass(frozen=True)
class DenseConfig(FcaFormerConfig):
    """The backbone of detection and segmentation; as published, of L2's depths and widths.

    Attributes:
      windows: sides of the windows in the last two stages.
      out_widths: channels of the four maps.
    """

    depths: tuple[int, int, int, int] = (2, 2, 7, 2)
    widths: tuple[int, int, int, int] = (96, 192, 320, 480)
    heads: tuple[int, int] = (10, 15)
    cross_depth: int | None = None
    image_size: tuple[int, int] = (64, 64)  # of example inputs
    layer_scale: float = 1.0
    drop_path_rate: float = 0.1
    windows: tuple[int, int] = (14, 7)
    out_widths: tuple[int, int, int, int] = (96, 192, 384, 768)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.windows) != 2 or min(self.windows) < 1:
            raise ValueError(f"windows must be two positive sides, got {self.windows}")
        if len(self.out_widths) != 4 or min(self.out_widths) < 1:
            raise ValueError(f"out_widths must be four positive numbers, got {self.out_widths}")


class FcaFormerDense(nn.Module):
    """The backbone. Children: `trunk`, `out_{s}` and `norm_{s}` of the four maps."""

    config: DenseConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """float (B, height, width, channels) of any size to maps [c1, c2, c3, c4] at strides 4, 8, 16 and 32.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = Trunk(config, config.windows, **options, name="trunk")(images, train)
        for stage, width in enumerate(config.out_widths):
            x = Conv(width, use_bias=False, kernel_init=_INIT["kernel_init"], **options, name=f"out_{stage}")(
                maps[stage]
            )
            maps[stage] = norm("layer", epsilon=1e-6, **options, name=f"norm_{stage}")(x)
        return maps


class FcaFormerMaskRCNN(Detector):
    """`zoo.backbones.mask_rcnn.MaskRCNN`, or its cascade, on `FcaFormerDense`."""

    config: DetectorConfig

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """See the class."""
        return FcaFormerDense(self.config.backbone, **options)


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """A UPerNet on an FcaFormer.

    Attributes:
      backbone: of any size.
      num_classes: logits.
      channels, auxiliary_channels: of the head and of the auxiliary head.
      dropout: of whole channels, before the classifiers.
      image_size: height and width in pixels of example inputs; any others do.
    """

    backbone: DenseConfig = DenseConfig()
    num_classes: int = 150
    channels: int = 512
    auxiliary_channels: int = 256
    dropout: float = 0.1
    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels", "auxiliary_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class FcaFormerUPerNet(nn.Module):
    """Semantic segmentation. Children: `backbone`, `head` and `auxiliary`."""

    config: SegmenterConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Segmentation:
        """float (B, height, width, channels), standardised, to logits of c1's and c3's size."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = FcaFormerDense(config.backbone, **options, name="backbone")(images, train)
        narrow = dataclasses.replace(config, channels=config.auxiliary_channels)
        return Segmentation(
            UPerHead(config, **options, name="head")(maps, train),
            FCNHead(narrow, **options, name="auxiliary")(maps, train),
        )


def layer_groups(params: Mapping[str, Any], by: Literal["layer", "stage"] = "layer") -> Any:
    """The group of each parameter of an `FcaFormerDense` for `zoo.train.layerwise_decay`: integers, like params.

    By "layer", as published for detection: 0 the stem, the first patch merging and all factors and biases of cross
    tokens; 1 and 2 the first two stages' blocks; 3 + b // 3 block b of the third stage; 6 the last stage; 7 the rest.
    The second patch merging is in group 2 and the third in group 3. By "stage", as for segmentation: s + 1 the blocks
    of stage s, 0 the stem, all patch merging and what belongs to cross tokens, 7 the rest.
    """
    if by not in ("layer", "stage"):
        raise ValueError(f"by must be 'layer' or 'stage', got {by!r}")

    def group(path: Any, _: Any) -> int:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        kind, _, number = names[1].partition("_") if names[0] == "trunk" else ("", "", "")
        if kind == "stem" or names[-1] in ("factors", "cross_bias"):
            return 0
        if kind == "down":
            return (0, 2, 3)[int(number)] if by == "layer" else 0
        if kind != "stage":
            return 7
        stage = int(number[0])
        if by == "stage" or stage < 2:
            return stage + 1
        return 6 if stage == 3 else 3 + int(names[2].removeprefix("block_")) // 3

    return jax.tree_util.tree_map_with_path(group, nn.meta.unbox(params))

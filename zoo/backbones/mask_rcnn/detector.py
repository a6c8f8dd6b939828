"""A paper's backbone in a `MaskRCNN`: config, module, loss, MMDetection's names, example inputs and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.mask_rcnn.model import Found, Losses, MaskRCNN
from zoo.backbones.mask_rcnn.regions import MASK_RCNN, Design, Proposals, Regions
from zoo.layers import boxes as box
from zoo.weights.names import Rule, Transform, layer, under


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """A Mask R-CNN on the backbone of a paper.

    Attributes:
      backbone: its config.
      num_classes: without the background.
      channels: of the pyramid and the heads.
      design: `MASK_RCNN` or `CASCADE_MASK_RCNN`.
      image_size: height and width in pixels of example inputs; any other will do.
    """

    backbone: Any
    num_classes: int = 80
    channels: int = 256
    design: Design = MASK_RCNN
    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.channels < 1:
            raise ValueError(f"num_classes and channels must be positive, got {self.num_classes}, {self.channels}")


@dataclasses.dataclass(frozen=True)
class FrozenConfig(DetectorConfig):
    """And one that its paper trains with a part of the backbone frozen.

    Attributes:
      pretrained: whether that part is; not so where a backbone starts from nothing.
    """

    pretrained: bool = True


class Detector(nn.Module):
    """A `MaskRCNN`, which is the child `detector`, as its config says. A paper's own says what its backbone is."""

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def backbone(self, **options: Any) -> nn.Module:
        """The backbone of `MaskRCNN`."""
        raise NotImplementedError

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.detector = MaskRCNN(
            self.backbone(**options), config.num_classes, config.channels, config.design, **options
        )

    def __call__(self, images: jax.Array, regions: jax.Array, train: bool = False) -> tuple[Proposals | Regions, ...]:
        """float (B, height, width, channels), standardised, and regions (B, R, 4) in pixels, to all stages' words."""
        return self.detector(images, regions, train)

    def losses(self, *arguments: Any, **options: Any) -> Losses:
        """As of `MaskRCNN`."""
        return self.detector.losses(*arguments, **options)

    def detect(self, images: jax.Array) -> Found:
        """As of `MaskRCNN`."""
        return self.detector.detect(images)


def loss(model: Detector | MaskRCNN) -> Callable:
    """The loss of `zoo.train`, all of `Losses` summed.

    The batch holds `images`, `boxes` (B, G, 4) in pixels, `labels` int (B, G), below 0 for padding, and, where there
    are any, `masks` (B, G, height, width). Metrics: the sums over the stages, by the names of `Losses` and "_loss".
    """

    def loss_function(params, model_state, batch, rngs, train):
        losses, model_state = model.apply(
            {"params": params, **model_state}, batch["images"], batch["boxes"], batch["labels"], batch.get("masks"),
            jax.random.fold_in(rngs["dropout"], 1), train, rngs=rngs, mutable=list(model_state), method="losses",
        )  # fmt: skip
        parts = {f"{name}_loss": part.sum() for name, part in losses._asdict().items()}
        return sum(parts.values()), (model_state, parts)

    return loss_function


_PIXELS = 7 * 7  # that a region is read at, channels first in the published linear layer


def _region_forward(array: np.ndarray) -> np.ndarray:
    out, inputs = array.shape
    return array.reshape(out, inputs // _PIXELS, _PIXELS).transpose(2, 1, 0).reshape(inputs, out)


def _region_inverse(array: np.ndarray) -> np.ndarray:
    inputs, out = array.shape
    return array.reshape(_PIXELS, inputs // _PIXELS, out).transpose(2, 1, 0).reshape(out, inputs)


_BOX_HEAD = [
    Rule(r"shared_fcs\.0\.weight", "params/box_fc_0/kernel", Transform(_region_forward, _region_inverse, 2)),
    Rule(r"shared_fcs\.0\.bias", "params/box_fc_0/bias"),
    *layer("linear", r"shared_fcs\.1", "box_fc_1"),
    *layer("linear", "fc_cls", "box_score"),
    *layer("linear", "fc_reg", "box_delta"),
]
_MASK_HEAD = [
    *layer("conv2d", r"convs\.(\d+)\.conv", "mask_{0}"),
    *layer("conv_transpose2d", "upsample", "mask_upsample"),
    *layer("pointwise2d", "conv_logits", "mask_out"),
]


def weight_rules(config: DetectorConfig, backbone: Sequence[Rule]) -> list[Rule]:
    """MMDetection's names of a `Detector` whose backbone has the names that are given."""
    path = "detector"
    # Only of a cascade are the stages numbered.
    number, heads = (r"\.(\d+)", "heads_{0}") if len(config.design.stages) > 1 else ("", "heads_0")
    return [
        *under("backbone", path + "/backbone", backbone),
        *layer("pointwise2d", r"neck\.lateral_convs\.(\d+)\.conv", path + "/neck/lateral_{0}"),
        *layer("conv2d", r"neck\.fpn_convs\.(\d+)\.conv", path + "/neck/output_{0}"),
        *layer("conv2d", r"rpn_head\.rpn_conv", path + "/rpn_conv"),
        *layer("pointwise2d", r"rpn_head\.rpn_cls", path + "/rpn_score"),
        *layer("pointwise2d", r"rpn_head\.rpn_reg", path + "/rpn_delta"),
        *under(r"roi_head\.bbox_head" + number, f"{path}/{heads}", _BOX_HEAD),
        *under(r"roi_head\.mask_head" + number, f"{path}/{heads}", _MASK_HEAD),
    ]


def example_inputs(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values, and two `regions` an image."""
    height, width = config.image_size
    regions = np.array([[0, 0, width / 2, height / 2], [width / 4, height / 4, width, height]], np.float32)
    rng = np.random.default_rng(0)
    shape = (batch_size, height, width, config.backbone.channels)
    return {
        "images": rng.standard_normal(shape, dtype=np.float32),
        "regions": np.repeat(regions[None], batch_size, axis=0),
    }


def example_targets(config: DetectorConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`boxes` (B, 3, 4) float32, `labels` (B, 3) int32, the last padding, and as `masks` (B, 3, ...) bool the boxes."""
    height, width = config.image_size
    targets = box.example_targets(height, width, config.num_classes, batch_size)
    x0, y0, x1, y1 = np.moveaxis(targets["boxes"], -1, 0)[..., None, None]
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    return targets | {"masks": (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)}

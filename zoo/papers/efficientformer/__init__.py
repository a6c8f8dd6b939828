"""EfficientFormer: a Transformer as fast as a MobileNet, found by slimming a supernet by measured latency.

"EfficientFormer: Vision Transformers at MobileNet Speed", Yanyu Li, Geng Yuan, Yang Wen, Ju Hu, Georgios Evangelidis,
Sergey Tulyakov, Yanzhi Wang, Jian Ren, NeurIPS 2022, arXiv 2206.01191. Code: github.com/snap-research/EfficientFormer.

Blocks run on maps (four axes, convolutions with batch norm, pooling as the mixer) and only at the end on tokens (three
axes, layer norm, attention), with one reshape between them: on a phone, reshapes and layer norms of maps are what makes
vision Transformers slow. Widths, depths and the number of blocks on tokens come from a supernet that is shrunk greedily
by accuracy lost per millisecond saved (`zoo.papers.efficientformer.search`).

What the published code does and the paper does not say, and what is therefore done here:
- there is no norm before the pooling, and the pooling does not count what is outside the image;
- in evaluation the two heads' logits are averaged;
- the dense backbone makes a new table of attention biases for 25 x 25 tokens (zero at first, not interpolated from the
  classifier's), gathers its (N, N) matrix and resizes that as an image, to the number of tokens there are.

The published classifier takes 224 pixels only. Here other sizes interpolate the table of biases by distance. The code
of the search was not published; `search` is written from the paper's equations.
"""

from __future__ import annotations

from zoo.backbones import mask_rcnn
from zoo.papers.efficientformer.model import (
    DenseConfig,
    EfficientFormer,
    EfficientFormerConfig,
    EfficientFormerDense,
    EfficientFormerMaskRCNN,
    Meta3D,
    Meta4D,
    example_inputs,
)
from zoo.papers.efficientformer.weights import detector_rules, rules
from zoo.registry import Paper, Variant, register
from zoo.train.classification import distilled_loss as loss
from zoo.train.classification import distilled_targets as example_targets

__all__ = [
    "DenseConfig",
    "EfficientFormer",
    "EfficientFormerConfig",
    "EfficientFormerDense",
    "EfficientFormerMaskRCNN",
    "Meta3D",
    "Meta4D",
    "loss",
]

PAPER = Paper(
    slug="efficientformer",
    title="EfficientFormer: Vision Transformers at MobileNet Speed",
    authors="Yanyu Li et al.",
    venue="NeurIPS",
    year=2022,
    arxiv="2206.01191",
    claim="A Transformer on maps, with attention at its end only and slimmed by latency, is as fast as a MobileNet.",
    code="https://github.com/snap-research/EfficientFormer",
    code_license="Snap Inc. (MIT-style), parts Apache-2.0",
    remarks="The supernet search was not published: ours follows the paper's equations.",
)

_SIZES: dict[str, dict] = {
    "l1": {"depths": (3, 2, 6, 4), "widths": (48, 96, 224, 448), "vit_num": 1},
    "l3": {"depths": (4, 4, 12, 6), "widths": (64, 128, 320, 512), "vit_num": 4},
    "l7": {"depths": (6, 6, 18, 8), "widths": (96, 192, 384, 768), "vit_num": 8},
}
_COUNTS = {"l1": 12_289_928, "l3": 31_406_000, "l7": 82_229_328}
_DENSE_COUNTS = {"l1": 11_397_272, "l3": 30_399_456, "l7": None}

register(
    PAPER,
    *(
        Variant(f"efficientformer_{name}", EfficientFormerConfig(**sizes), _COUNTS[name])
        for name, sizes in _SIZES.items()
    ),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(EfficientFormer)
register(
    PAPER,
    *(
        Variant(f"efficientformer_{name}_dense", DenseConfig(**sizes), _DENSE_COUNTS[name])
        for name, sizes in _SIZES.items()
    ),
    example_inputs=example_inputs,
    weight_rules=rules,
)(EfficientFormerDense)
register(
    PAPER,
    *(
        Variant(f"mask_rcnn_efficientformer_{name}", mask_rcnn.DetectorConfig(DenseConfig(**sizes)))
        for name, sizes in _SIZES.items()
    ),
    example_inputs=mask_rcnn.example_inputs,
    weight_rules=detector_rules,
    loss=mask_rcnn.loss,
    example_targets=mask_rcnn.example_targets,
)(EfficientFormerMaskRCNN)

"""FcaFormer: every block also attends to a few tokens that earlier blocks left behind.

"Fcaformer: Forward Cross Attention in Hybrid Vision Transformer", Haokui Zhang, Wenze Hu, Xiaoyu Wang, ICCV 2023, arXiv
2211.07198. Code: github.com/hkzhang-git/FcaFormer.

Others make attention sparser; this paper makes it denser, across depth. After its attention a block merges the map by a
large convolution of large stride into cross tokens, which stay as further keys and values of the stage's later blocks,
scaled by a learned factor each ("learnable scale factors"), and enhances the map by a small convolution ("token merge
and enhancement"). ConvNeXt blocks work on the two larger maps.

What the published code does and the paper does not say, and what is therefore done here:
- the factors come before a layer norm, which undoes all of a factor but its sign; `factors_after_norm` is what was
  presumably meant;
- the enhanced map takes the map's place, there is no skip around the convolution;
- there are two layer norms in a row before the feed-forward network;
- detectors drop twice as many paths. Of the cascade, MMDetection's box heads are here; the published configuration
  replaces them by four convolutions and a layer, trained by the boxes' overlap;
- dense prediction works in windows and pads maps by turns before and behind, which shifts windows against each other,
  while cross tokens stay with the window of their number; what is padded counts as tokens.

L0, DeiT-Ti with both parts, is in the paper and not in the code: `PlainFcaFormer` is a reconstruction, whose number of
parameters agrees with the published 5.9M. The published networks take images of one size; here biases and factors are
interpolated for others.
"""

from __future__ import annotations

import dataclasses

from zoo.backbones import mask_rcnn, segmentation
from zoo.papers.fcaformer.dense import (
    DenseConfig,
    FcaFormerDense,
    FcaFormerMaskRCNN,
    FcaFormerUPerNet,
    SegmenterConfig,
    layer_groups,
)
from zoo.papers.fcaformer.model import (
    ConvNeXtBlock,
    FcaBlock,
    FcaFormer,
    FcaFormerConfig,
    FcaStage,
    PatchMerging,
    PlainConfig,
    PlainFcaFormer,
    cross_shares,
    example_inputs,
    example_targets,
    factors,
    fold,
    two_source_attention,
)
from zoo.papers.fcaformer.weights import dense_rules, detector_rules, rules, segmenter_rules
from zoo.registry import Paper, Variant, register
from zoo.train.classification import distilled_loss as loss

__all__ = [
    "ConvNeXtBlock",
    "DenseConfig",
    "FcaBlock",
    "FcaFormer",
    "FcaFormerConfig",
    "FcaFormerDense",
    "FcaFormerMaskRCNN",
    "FcaFormerUPerNet",
    "FcaStage",
    "PatchMerging",
    "PlainConfig",
    "PlainFcaFormer",
    "SegmenterConfig",
    "cross_shares",
    "factors",
    "fold",
    "layer_groups",
    "loss",
    "two_source_attention",
]

PAPER = Paper(
    slug="fcaformer",
    title="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
    authors="Haokui Zhang et al.",
    venue="ICCV",
    year=2023,
    arxiv="2211.07198",
    claim="A few tokens kept from earlier blocks as keys and values make a Transformer better at almost no cost.",
    code="https://github.com/hkzhang-git/FcaFormer",
    code_license=None,
    remarks="L0, the plain network, is not in the published code: ours is a reconstruction.",
)

_L1 = FcaFormerConfig()
_L2 = dataclasses.replace(
    _L1, depths=(2, 2, 7, 2), widths=(96, 192, 320, 480), heads=(10, 15), drop_path_rate=0.1
)  # fmt: skip
_L3 = dataclasses.replace(
    _L1, depths=(3, 6, 12, 3), widths=(96, 192, 320, 512), heads=(10, 16), drop_path_rate=0.2
)  # fmt: skip
_L4 = dataclasses.replace(_L3, widths=(128, 256, 512, 768), heads=(16, 24), drop_path_rate=0.4)

register(
    PAPER,
    Variant("fcaformer_l1", _L1, 6_187_560),
    Variant("fcaformer_l2", _L2, 16_275_870),
    Variant("fcaformer_l3", _L3, 27_894_484),
    Variant("fcaformer_l4", _L4, 65_638_204),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(FcaFormer)
register(
    PAPER,
    Variant("fcaformer_l0", PlainConfig()),
    example_inputs=example_inputs,
    loss=loss,
    example_targets=example_targets,
)(PlainFcaFormer)
register(
    PAPER,
    Variant("fcaformer_l2_dense", DenseConfig(), 16_334_390),
    example_inputs=example_inputs,
    weight_rules=dense_rules,
)(FcaFormerDense)
_DETECTOR = DenseConfig(drop_path_rate=0.2)
register(
    PAPER,
    Variant("mask_rcnn_fcaformer_l2", mask_rcnn.DetectorConfig(_DETECTOR)),
    Variant("cascade_mask_rcnn_fcaformer_l2", mask_rcnn.DetectorConfig(_DETECTOR, design=mask_rcnn.CASCADE_MASK_RCNN)),
    example_inputs=mask_rcnn.example_inputs,
    weight_rules=detector_rules,
    loss=mask_rcnn.loss,
    example_targets=mask_rcnn.example_targets,
)(FcaFormerMaskRCNN)
register(
    PAPER,
    Variant("upernet_fcaformer_l2", SegmenterConfig()),
    example_inputs=segmentation.example_inputs,
    weight_rules=segmenter_rules,
    loss=segmentation.loss,
    example_targets=segmentation.example_targets,
)(FcaFormerUPerNet)

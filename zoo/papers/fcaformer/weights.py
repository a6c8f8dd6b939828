"""Published parameter names of FcaFormer, and MMDetection's and MMSegmentation's of the networks on it."""

from __future__ import annotations

from zoo.backbones import mask_rcnn, segmentation
from zoo.papers.fcaformer.dense import DenseConfig, SegmenterConfig
from zoo.papers.fcaformer.model import FcaFormerConfig
from zoo.weights.names import Rule, Transform, layer, under, vector


def _conv_norm(kind: str, published: str, path: str) -> list[Rule]:
    return [
        *layer(kind, rf"{published}\.c", f"{path}/conv"),
        *layer("batch_norm", rf"{published}\.bn", f"{path}/norm"),
    ]


_TOKEN_BIAS = Transform(lambda array: array[0, :, 0], lambda array: array[None, :, None], 4)
_CONVNEXT = [
    Rule("gamma", "params/project/layer_scale/scale"),
    *layer("conv2d", "dwconv", "depthwise"),
    *layer("norm", "norm", "norm"),
    *layer("linear", "pwconv1", "expand"),
    *layer("linear", "pwconv2", "project/conv"),
]
BLOCK = [
    Rule("gamma_1", "params/out/layer_scale/scale"),
    Rule("gamma_2", "params/project/layer_scale/scale"),
    Rule("attention_biases", "params/bias/table", "linear"),
    Rule("attention_bias_idxs", None),
    Rule("s_token_bias", "params/cross_bias", _TOKEN_BIAS),
    Rule("s_scale_factors", "params/factors", vector(3, 1)),
    *layer("norm", "s_norm", "cross_norm"),
    *layer("norm", "(norm1|norm2)", "{0}"),
    Rule(r"qkv\.weight", ("params/query/kernel", "params/key_value/kernel"), "linear", axis=-1, sections=(1, 2)),
    Rule(r"qkv\.bias", ("params/query/bias", "params/key_value/bias"), axis=-1, sections=(1, 2)),
    *layer("linear", "proj", "out/conv"),
    *layer("conv2d", "dw_conv", "merge"),
    *_conv_norm("conv2d", "local_conv", "enhance"),
    *layer("norm", r"mlp\.norm", "mlp_norm"),
    *layer("linear", r"mlp\.fc1", "expand"),
    *layer("linear", r"mlp\.fc2", "project/conv"),
]
MERGING = [
    *_conv_norm("pointwise2d", "conv1", "conv_0"),
    *_conv_norm("conv2d", "conv2", "conv_1"),
    *_conv_norm("pointwise2d", "conv3", "conv_2"),
]


def _trunk() -> list[Rule]:
    return [
        *_conv_norm("conv2d", r"patch_embed\.seq\.0", "trunk/stem_0"),
        *_conv_norm("conv2d", r"patch_embed\.seq\.2", "trunk/stem_1"),
        *under(r"layer_([01])\.blocks\.(\d+)", "trunk/stage_{0}_block_{1}", _CONVNEXT),
        *under(r"layer_([23])\.blocks\.(\d+)", "trunk/stage_{0}/block_{1}", BLOCK),
        *under(r"layer_(\d)\.downsample", "trunk/down_{0}", MERGING),
    ]


def rules(config: FcaFormerConfig) -> list[Rule]:
    """The names of `hkzhang-git/FcaFormer`, of the classifiers."""
    return [*_trunk(), *layer("norm", "norm_head", "head/norm"), *layer("linear", "head", "head/linear")]


def dense_rules(config: DenseConfig) -> list[Rule]:
    """And of the backbone of detection and segmentation."""
    return [*_trunk(), *layer("pointwise2d", r"head(\d)", "out_{0}"), *layer("norm", r"norm(\d)", "norm_{0}")]


def detector_rules(config: mask_rcnn.DetectorConfig) -> list[Rule]:
    """MMDetection's names of a Mask R-CNN or its cascade."""
    return mask_rcnn.weight_rules(config, dense_rules(config.backbone))


def segmenter_rules(config: SegmenterConfig) -> list[Rule]:
    """MMSegmentation's names of a UPerNet with an auxiliary head."""
    return [
        *under("backbone", "backbone", dense_rules(config.backbone)),
        *segmentation.upernet_rules("head"),
        *segmentation.auxiliary_rules("auxiliary"),
    ]

"""Published parameter names of EMO and EMOv2, of the networks built on them, and of DEMO."""

from __future__ import annotations

from zoo.backbones import mask_rcnn
from zoo.backbones.segmentation import auxiliary_rules
from zoo.papers.emov2.detection import DetectorConfig
from zoo.papers.emov2.generation import DemoConfig
from zoo.papers.emov2.model import EMOv2Config
from zoo.papers.emov2.segmentation import SegmenterConfig
from zoo.weights.names import Rule, layer, under, vector

ATTENTION = [*layer("pointwise2d", r"qk\.conv", "qk"), *layer("pointwise2d", r"v\.conv", "value")]
_SCALE = Rule(r"ls\.gamma", "params/project/layer_scale/scale", vector(4, 1))


def _block(norm: str) -> list[Rule]:
    return [
        *(layer("batch_norm", "norm", "norm") if norm == "batch" else layer("norm", r"norm\.norm", "norm")),
        *layer("pointwise2d", r"eops\.0\.net\.conv", "expand/conv"),
        *under(r"eops\.(\d+)", "attention_{0}", ATTENTION),
        *layer("conv2d", r"conv_local\.conv", "local/conv"),
        *layer("batch_norm", r"conv_local\.norm", "local/norm"),
        *layer("pointwise2d", r"proj\.conv", "project/conv"),
        _SCALE,
    ]


def feature_rules(config: EMOv2Config) -> list[Rule]:
    """Stem and stages."""
    rules = []
    for index in range(3):
        rules += layer("pointwise2d" if index == 2 else "conv2d", rf"stage0\.{index}\.conv", f"stem_{index}/conv")
        rules += layer("batch_norm", rf"stage0\.{index}\.norm", f"stem_{index}/norm")
    for stage, norm in enumerate(config.norms):
        rules += under(rf"stage{stage + 1}\.(\d+)", f"stage_{stage + 1}_block_{{0}}", _block(norm))
    return rules


def classifier_rules(config: EMOv2Config) -> list[Rule]:
    """The names of the published classifiers."""
    return [*feature_rules(config), *layer("norm", r"norm\.norm", "norm"), *layer("linear", "head", "head")]


def _detector(config: DetectorConfig) -> list[Rule]:
    return under("backbone", "backbone", feature_rules(config.backbone))


def _pyramid(path: str = "neck") -> list[Rule]:
    return [
        *layer("pointwise2d", r"neck\.lateral_convs\.(\d+)\.conv", path + "/lateral_{0}"),
        *layer("conv2d", r"neck\.fpn_convs\.(\d+)\.conv", path + "/output_{0}"),
    ]


def retinanet_rules(config: DetectorConfig) -> list[Rule]:
    """MMDetection's names of a RetinaNet."""
    return [
        *_detector(config),
        *_pyramid(),
        *layer("conv2d", r"bbox_head\.cls_convs\.(\d+)\.conv", "class_{0}"),
        *layer("conv2d", r"bbox_head\.reg_convs\.(\d+)\.conv", "box_{0}"),
        *layer("conv2d", r"bbox_head\.retina_cls", "class_out"),
        *layer("conv2d", r"bbox_head\.retina_reg", "box_out"),
    ]


def mask_rcnn_rules(config: mask_rcnn.DetectorConfig) -> list[Rule]:
    """MMDetection's names of a Mask R-CNN."""
    return mask_rcnn.weight_rules(config, feature_rules(config.backbone))


def _conv_norm(kind: str, published: str, path: str) -> list[Rule]:
    return [
        *layer(kind, rf"{published}\.conv", f"{path}/conv"),
        *layer("batch_norm", rf"{published}\.bn", f"{path}/norm"),
    ]


def ssdlite_rules(config: DetectorConfig) -> list[Rule]:
    """MMDetection's names of an SSDLite."""
    rules = [
        *_detector(config),
        *_conv_norm("pointwise2d", r"neck\.extra_layers\.(\d+)\.0", "extra_{0}_reduce"),
        *_conv_norm("conv2d", r"neck\.extra_layers\.(\d+)\.1\.depthwise_conv", "extra_{0}_depthwise"),
        *_conv_norm("pointwise2d", r"neck\.extra_layers\.(\d+)\.1\.pointwise_conv", "extra_{0}_pointwise"),
    ]
    for published, ours in (("cls", "class"), ("reg", "box")):
        rules += _conv_norm("conv2d", rf"bbox_head\.{published}_convs\.(\d+)\.0", ours + "_{0}_depthwise")
        rules += layer("pointwise2d", rf"bbox_head\.{published}_convs\.(\d+)\.1", ours + "_{0}_out")
    return rules


def segmenter_rules(config: SegmenterConfig) -> list[Rule]:
    """MMSegmentation's names."""
    head, prefix = "head", r"decode_head\."
    own = {
        "segformer": [
            *_conv_norm("pointwise2d", rf"{prefix}convs\.(\d+)", f"{head}/level_{{0}}"),
            *_conv_norm("pointwise2d", rf"{prefix}fusion_conv", f"{head}/fusion"),
        ],
        "semantic_fpn": [
            *_pyramid(f"{head}/neck"),
            *_conv_norm("conv2d", rf"{prefix}scale_heads\.0\.0", f"{head}/level_0_0"),
            # Resizings are entries of their own between the convolutions.
            *(
                rule
                for level in (1, 2, 3)
                for step in range(level)
                for rule in _conv_norm(
                    "conv2d", rf"{prefix}scale_heads\.{level}\.{2 * step}", f"{head}/level_{level}_{step}"
                )
            ),
        ],
        "deeplabv3": [
            *_conv_norm("pointwise2d", rf"{prefix}image_pool\.1", f"{head}/pooled"),
            *_conv_norm("pointwise2d", rf"{prefix}aspp_modules\.0", f"{head}/dilated_0"),
            *_conv_norm("conv2d", rf"{prefix}aspp_modules\.(\d+)", f"{head}/dilated_{{0}}"),
            *_conv_norm("conv2d", rf"{prefix}bottleneck", f"{head}/bottleneck"),
        ],
        "pspnet": [
            *_conv_norm("pointwise2d", rf"{prefix}psp_modules\.(\d+)\.1", f"{head}/scale_{{0}}"),
            *_conv_norm("conv2d", rf"{prefix}bottleneck", f"{head}/bottleneck"),
        ],
    }[config.head]
    return [
        *under("backbone", "backbone", feature_rules(config.backbone)),
        *own,
        *layer("pointwise2d", rf"{prefix}conv_seg", f"{head}/classifier/out"),
        *auxiliary_rules("auxiliary"),
    ]


def demo_rules(config: DemoConfig) -> list[Rule]:
    """DiT's names, and those of the backbone's blocks inside."""
    block = [
        *layer("norm", "norm", "norm"),
        *under("attn", "attention", ATTENTION),
        *layer("conv2d", r"conv_local\.conv", "local/conv"),
        *layer("batch_norm", r"conv_local\.norm", "local/norm"),
        *layer("pointwise2d", r"proj\.conv", "project/conv"),
        *layer("linear", r"adaLN_modulation\.1", "condition"),
    ]
    return [
        *layer("conv2d", r"x_embedder\.proj", "patches"),
        *layer("linear", r"t_embedder\.mlp\.0", "time_0"),
        *layer("linear", r"t_embedder\.mlp\.2", "time_1"),
        *layer("embedding", r"y_embedder\.embedding_table", "classes"),
        Rule("pos_embed", None),
        *under(r"blocks\.(\d+)", "block_{0}", block),
        *layer("norm", r"final_layer\.norm_final", "final_norm"),
        *layer("linear", r"final_layer\.linear", "final"),
        *layer("linear", r"final_layer\.adaLN_modulation\.1", "final_condition"),
    ]

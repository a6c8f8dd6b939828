"""EMOv2: a mobile backbone of one block with one residual, whose expansion is attention in near and far windows.

"EMOv2: Pushing 5M Vision Model Frontier", Jiangning Zhang, Teng Hu, Haoyang He, Zhucun Xue, Yabiao Wang, Chengjie Wang,
Yong Liu, Xiangtai Li, Dacheng Tao, TPAMI 2025, arXiv 2412.06674. Code: github.com/zhangzjn/EMOv2 (no licence). It
extends EMO, "Rethinking Mobile Block for Efficient Attention-based Models", ICCV 2023, arXiv 2301.01146.

The meta mobile block expands, does something, and shrinks inside a single residual; with a convolution in it, it is an
inverted residual, with attention a Transformer's. Here the attention's values are the expanded features, and a
depthwise convolution follows. Spanning attention sums attention in windows of neighbours and in windows of tokens far
apart, which share queries, keys and values: long range for no parameter (`kernels.spanning_window`).

What the published code does and the paper does not say, and what is therefore done here:
- maps are padded to whole windows with zeros before the projections, and the padding takes part as keys;
- both attentions' outputs are summed, not averaged;
- the layer scale is there also where there is no residual;
- every norm has an epsilon of 1e-6; the depthwise convolution has a batch norm and SiLU also in the stages of layer
  norms and GELU;
- in detection and segmentation the window is 10; RetinaNet and Mask R-CNN leave the stem and the first stage as they
  are, and all detectors the batch norms' statistics.

Not here: an option of the published block that attends before it makes values (its code puts the close windows back
with the far ones' permutation; no network uses it); the video network and DEMO's code, which were not
published (DEMO is put together from its logs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from zoo.backbones import mask_rcnn
from zoo.backbones.segmentation import example_inputs as segmenter_inputs
from zoo.backbones.segmentation import example_targets as segmenter_targets
from zoo.backbones.segmentation import loss as segmenter_loss
from zoo.papers.emov2 import detection, generation, segmentation
from zoo.papers.emov2.detection import DetectorConfig, EMOv2MaskRCNN, RetinaNet, SSDLite
from zoo.papers.emov2.generation import Demo, DemoConfig, sample
from zoo.papers.emov2.model import (
    IRMB,
    EMOv2,
    EMOv2Config,
    EMOv2Features,
    SpanningAttention,
    example_inputs,
    example_targets,
    fold,
    kd_loss,
    loss,
    teacher_images,
)
from zoo.papers.emov2.segmentation import Segmenter, SegmenterConfig
from zoo.papers.emov2.weights import (
    classifier_rules,
    demo_rules,
    mask_rcnn_rules,
    retinanet_rules,
    segmenter_rules,
    ssdlite_rules,
)
from zoo.registry import Paper, Variant, register

__all__ = [
    "IRMB",
    "Demo",
    "DemoConfig",
    "DetectorConfig",
    "EMOv2",
    "EMOv2Config",
    "EMOv2Features",
    "EMOv2MaskRCNN",
    "RetinaNet",
    "SSDLite",
    "Segmenter",
    "SegmenterConfig",
    "SpanningAttention",
    "detection",
    "fold",
    "generation",
    "kd_loss",
    "loss",
    "sample",
    "segmentation",
    "teacher_images",
]

PAPER = Paper(
    slug="emov2",
    title="EMOv2: Pushing 5M Vision Model Frontier",
    authors="Jiangning Zhang et al.",
    venue="TPAMI",
    year=2025,
    arxiv="2412.06674",
    claim="Attention in near and far windows that share queries, keys and values sees far for no further parameter.",
    code="https://github.com/zhangzjn/EMOv2",
    code_license=None,
    remarks="DEMO, the image generator, is put together from the parameter counts of published logs.",
)

_MEDIUM: dict[str, Any] = {"expansions": (2.0, 2.5, 3.0, 3.5), "head_dims": (16, 16, 20, 20)}
_WIDE: dict[str, Any] = {"expansions": (2.0, 3.0, 4.0, 4.0), "head_dims": (16, 32, 32, 32)}
SIZES = {
    "1m": EMOv2Config((2, 2, 8, 3), (32, 48, 80, 180), drop_path_rate=0.04036, **_MEDIUM),
    "2m": EMOv2Config((3, 3, 9, 3), (32, 48, 120, 200), drop_path_rate=0.05, **_MEDIUM),
    "5m": EMOv2Config(drop_path_rate=0.05),
    "20m": EMOv2Config((3, 3, 13, 3), (64, 128, 320, 448), drop_path_rate=0.1, **_WIDE),
    "50m": EMOv2Config((5, 8, 20, 7), (64, 128, 384, 512), drop_path_rate=0.2, **_WIDE),
}
_COUNTS = {"1m": 1_460_844, "2m": 2_384_312, "5m": 5_126_440, "20m": 20_195_208, "50m": 49_815_560}
_FIRST_COUNTS = {"1m": 1_454_316, "2m": 2_374_840, "5m": 5_110_312, "20m": 20_170_632}


def _variants() -> list[Variant]:
    found = []
    for name, config in SIZES.items():
        found.append(Variant(f"emov2_{name}", config, _COUNTS[name]))
        for pixels in (256, 512) if name in ("1m", "2m", "5m") else (256,):
            larger = dataclasses.replace(config, window=8, image_size=(pixels, pixels))
            found.append(Variant(f"emov2_{name}_{pixels}", larger, _COUNTS[name]))
        if name in _FIRST_COUNTS:
            first = dataclasses.replace(config, operators=("remote",), kernels=(3, 3, 5, 5))
            found.append(Variant(f"emo_{name}", first, _FIRST_COUNTS[name]))
    return found


register(
    PAPER, *_variants(), example_inputs=example_inputs, weight_rules=classifier_rules, loss=loss,
    example_targets=example_targets,
)(EMOv2)  # fmt: skip

# Published sizes in millions; the last digits are those of the heads as defined.
_DENSE = {name: dataclasses.replace(SIZES[name], window=10) for name in ("1m", "2m", "5m", "20m")}
# Name, module, config, names, and where the loss and the examples are.
_DETECTORS: tuple[tuple[str, type, Any, Any, Any], ...] = (
    ("retinanet", RetinaNet, DetectorConfig, retinanet_rules, detection),
    ("ssdlite", SSDLite, DetectorConfig, ssdlite_rules, detection),
    ("mask_rcnn", EMOv2MaskRCNN, mask_rcnn.FrozenConfig, mask_rcnn_rules, mask_rcnn),
)
for _name, _module, _config, _rules, _parts in _DETECTORS:
    register(
        PAPER,
        *(Variant(f"{_name}_emov2_{size}", _config(backbone)) for size, backbone in _DENSE.items()),
        example_inputs=_parts.example_inputs,
        weight_rules=_rules,
        loss=_parts.loss,
        example_targets=_parts.example_targets,
    )(_module)


def _segmenter(head: Any, size: str, backbone: EMOv2Config) -> SegmenterConfig:
    channels = {"segformer": 180 if size == "1m" else 288, "semantic_fpn": 128}.get(head, 256)
    return SegmenterConfig(backbone, head, channels=channels)


register(
    PAPER,
    *(
        Variant(f"{head}_emov2_{size}", _segmenter(head, size, backbone))
        for head in segmentation.HEADS
        for size, backbone in _DENSE.items()
    ),
    example_inputs=segmenter_inputs,
    weight_rules=segmenter_rules,
    loss=segmenter_loss,
    example_targets=segmenter_targets,
)(Segmenter)

# The logs count the fixed table of positions, 256 D, as well. Without it:
register(
    PAPER,
    Variant("demo_s_2", DemoConfig(384, 12, 6), 24_596_000 - 256 * 384),
    Variant("demo_b_2", DemoConfig(768, 12, 12)),
    Variant("demo_l_2", DemoConfig(1024, 24, 16), 334_831_648 - 256 * 1024),
    Variant("demo_xl_2", DemoConfig(1152, 28, 16), 492_692_000 - 256 * 1152),
    example_inputs=generation.example_inputs,
    weight_rules=demo_rules,
    loss=generation.loss,
)(Demo)

"""Published parameter names of MobileViG, and MMDetection's of the Mask R-CNN on it."""

from __future__ import annotations

from zoo.backbones import mask_rcnn
from zoo.papers.mobilevig.model import MobileViGConfig
from zoo.weights.names import Rule, layer, under, vector


def _conv_norm(conv: str, norm: str, path: str, kind: str = "pointwise2d") -> list[Rule]:
    return [*layer(kind, conv, f"{path}/conv"), *layer("batch_norm", norm, f"{path}/norm")]


INVERTED_RESIDUAL = [
    *_conv_norm(r"mlp\.fc1", r"mlp\.norm1", "expand"),
    *_conv_norm(r"mlp\.mid", r"mlp\.mid_norm", "depthwise", "conv2d"),
    *_conv_norm(r"mlp\.fc2", r"mlp\.norm2", "project"),
    Rule("layer_scale_2", "params/project/layer_scale/scale", vector(3, 0)),
]
GRAPHER = [
    *_conv_norm(r"fc1\.0", r"fc1\.1", "enter"),
    *_conv_norm(r"graph_conv\.nn\.0", r"graph_conv\.nn\.1", "graph"),
    *_conv_norm(r"fc2\.0", r"fc2\.1", "leave"),
]
_FEED_FORWARD = [*_conv_norm(r"fc1\.0", r"fc1\.1", "expand"), *_conv_norm(r"fc2\.0", r"fc2\.1", "project")]


def _body(path: str = "") -> list[Rule]:
    return [
        *_conv_norm(r"stem\.stem\.0", r"stem\.stem\.1", f"{path}stem_0", "conv2d"),
        *_conv_norm(r"stem\.stem\.3", r"stem\.stem\.4", f"{path}stem_1", "conv2d"),
        *under(r"local_backbone\.(\d+)", path + "local_{0}", INVERTED_RESIDUAL),
        *_conv_norm(
            r"local_backbone\.(\d+)\.conv\.0", r"local_backbone\.(\d+)\.conv\.1", path + "local_{0}", "conv2d"
        ),
        *under(r"backbone\.(\d+)\.0", path + "graph_{0}", GRAPHER),
        *under(r"backbone\.(\d+)\.1", path + "ffn_{0}", _FEED_FORWARD),
    ]  # fmt: skip


def rules(config: MobileViGConfig) -> list[Rule]:
    """The names of `SLDGroup/MobileViG`'s classifiers."""
    table = _body("body/")
    table += _conv_norm(r"prediction\.1", r"prediction\.2", "embed") + layer("pointwise2d", "head", "head")
    return table + (layer("pointwise2d", "dist_head", "dist_head") if config.distillation else [])


def feature_rules(config: MobileViGConfig) -> list[Rule]:
    """The names of the body alone, as published for detection."""
    return _body()


def detector_rules(config: mask_rcnn.DetectorConfig) -> list[Rule]:
    """MMDetection's names of a Mask R-CNN."""
    return mask_rcnn.weight_rules(config, _body())

"""Mask R-CNN (He et al. 2017) with a feature pyramid, and its cascade (Cai & Vasconcelos 2018), as in MMDetection.

On any backbone of four maps. Regions are proposed (`Proposals`), then judged by one stage of heads, or by several, each
of which refines the regions for the next. B batch, N anchors, R regions, S stages, K classes without the background, G
boxes an image; boxes are (x0, y0, x1, y1) in pixels. All shapes are static: what is not there is padding, labelled -1.
"""

from __future__ import annotations

from zoo.backbones.mask_rcnn.detector import (
    Detector,
    DetectorConfig,
    FrozenConfig,
    example_inputs,
    example_targets,
    loss,
    weight_rules,
)
from zoo.backbones.mask_rcnn.model import Found, Losses, MaskRCNN, RegionHeads
from zoo.backbones.mask_rcnn.regions import CASCADE_MASK_RCNN, MASK_RCNN, Design, Proposals, Regions, Sampled, Stage

__all__ = [
    "CASCADE_MASK_RCNN",
    "MASK_RCNN",
    "Design",
    "Detector",
    "DetectorConfig",
    "Found",
    "FrozenConfig",
    "Losses",
    "MaskRCNN",
    "Proposals",
    "RegionHeads",
    "Regions",
    "Sampled",
    "Stage",
    "example_inputs",
    "example_targets",
    "loss",
    "weight_rules",
]

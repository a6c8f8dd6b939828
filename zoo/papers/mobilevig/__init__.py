"""MobileViG: a graph of pixels that is the same for every image, whose neighbours are reached by rolling the map.

"MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications", Mustafa Munir, William Avery, Radu Marculescu,
CVPR Workshops 2023, arXiv 2307.00395. Code: github.com/SLDGroup/MobileViG (Apache-2.0).

Vision graph networks search each image's nearest neighbours, which is expensive, and gathers and reshapes are slow on
phones. Sparse vision graph attention (SVGA) links every pixel to each K-th pixel of its row and its column instead, so
that neighbours come by circular shifts, and takes the largest difference to them. Inverted residuals work on the three
larger maps; graphs only on the last.

What the published code does and the paper does not say, and what is therefore done here:
- a pixel is compared with itself too, so that differences are never negative;
- the differences follow the features in the concatenation, behind which a convolution keeps both halves' channels;
- there is a layer scale in the inverted residuals, none in the graphs and feed-forward networks;
- in evaluation the two heads' logits are averaged;
- in detection the hop stays 2, so that a larger map has more neighbours, and batch norms stay those of evaluation.
"""

from __future__ import annotations

from zoo.backbones import mask_rcnn
from zoo.papers.mobilevig.graph import knn_aggregate, neighbours_of, svga_aggregate, where_most_differs
from zoo.papers.mobilevig.model import (
    FeedForward,
    Grapher,
    InvertedResidual,
    KNNGrapher,
    MobileViG,
    MobileViGConfig,
    MobileViGFeatures,
    MobileViGMaskRCNN,
    example_inputs,
)
from zoo.papers.mobilevig.weights import detector_rules, feature_rules, rules
from zoo.registry import Paper, Variant, register
from zoo.train.classification import distilled_loss as loss
from zoo.train.classification import distilled_targets as example_targets

__all__ = [
    "FeedForward",
    "Grapher",
    "InvertedResidual",
    "KNNGrapher",
    "MobileViG",
    "MobileViGConfig",
    "MobileViGFeatures",
    "MobileViGMaskRCNN",
    "knn_aggregate",
    "loss",
    "neighbours_of",
    "svga_aggregate",
    "where_most_differs",
]

PAPER = Paper(
    slug="mobilevig",
    title="MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications",
    authors="Mustafa Munir et al.",
    venue="CVPR Workshops",
    year=2023,
    arxiv="2307.00395",
    claim="A graph of pixels that is the same for every image is as good as one of nearest neighbours, and far faster.",
    code="https://github.com/SLDGroup/MobileViG",
    code_license="Apache-2.0",
)

SIZES: dict[str, MobileViGConfig] = {
    "ti": MobileViGConfig(),
    "s": MobileViGConfig((3, 3, 9), (42, 84, 176), 3, 256, 512),
    "m": MobileViGConfig((3, 3, 9), (42, 84, 224), 3, 400, 768),
    "b": MobileViGConfig((5, 5, 15), (42, 84, 240), 5, 464, 768),
}
_COUNTS = {"ti": 5_271_074, "s": 7_276_538, "m": 14_075_786, "b": 26_868_506}


def _without_heads(config: MobileViGConfig, count: int) -> int:
    """Parameters of the body: less the embedding, its norm, and both heads."""
    embedding = (config.global_width + 3) * config.embedding
    return count - embedding - 2 * (config.embedding + 1) * config.num_classes


register(
    PAPER,
    *(Variant(f"mobilevig_{name}", config, _COUNTS[name]) for name, config in SIZES.items()),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(MobileViG)
register(
    PAPER,
    *(
        Variant(f"mobilevig_{name}_dense", config, _without_heads(config, _COUNTS[name]))
        for name, config in SIZES.items()
    ),
    example_inputs=example_inputs,
    weight_rules=feature_rules,
)(MobileViGFeatures)
register(
    PAPER,
    *(
        Variant(f"mask_rcnn_mobilevig_{name}", mask_rcnn.FrozenConfig(config), 32_325_546 if name == "m" else None)
        for name, config in SIZES.items()
    ),
    example_inputs=mask_rcnn.example_inputs,
    weight_rules=detector_rules,
    loss=mask_rcnn.loss,
    example_targets=mask_rcnn.example_targets,
)(MobileViGMaskRCNN)

"""v-DSW: costs between point clouds along directions around a predicted one, and networks that predict it.

"Self-Attention Amortized Distributional Projection Optimization for Sliced Wasserstein Point-Cloud Reconstruction",
Khai Nguyen, Dang Nguyen, Nhat Ho, ICML 2023, arXiv 2301.04791. Code: github.com/hsgser/Self-Amortized-DSW (MIT).

The sliced Wasserstein distance averages over all directions, the max-sliced one climbs to the worst, in many steps for
each pair of clouds. A network that predicts the worst direction spares the steps, but where it is wrong the result is
no metric. Here directions are drawn around the prediction, from a von Mises-Fisher distribution, which keeps the metric
for any concentration; and the network looks by attention, so that neither the order of the clouds nor, mostly, that of
their points counts. Autoencoder and network descend and ascend the same cost in turns.

What the published code does and the paper does not say, and what is therefore done here:
- costs are sums over the points, not means, and not rooted;
- the linear attention's projections count the points: it is not invariant to their order, and the others are;
- a small network of sigmoids comes before the map over the points in `glinear` and after it in `nonlinear`;
- Max-SW's optimizer moves an unconstrained vector that is projected after each step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from zoo.papers.vdsw import amortized, autoencoder
from zoo.papers.vdsw.amortized import (
    AmortizedConfig,
    AmortizedDirection,
    Kind,
    PlayersLosses,
    amortized_loss,
    directions,
)
from zoo.papers.vdsw.autoencoder import CapsuleConfig, PCNCapsAE, PointNetAE, PointNetConfig
from zoo.papers.vdsw.scores import chamfer, emd_exact, generation_scores
from zoo.papers.vdsw.sliced import (
    Ascent,
    adaptive_sw,
    dsw,
    max_sliced_wasserstein,
    sliced_costs,
    sliced_wasserstein,
    sorted_values,
    uniform_directions,
    unit,
    v_dsw,
)
from zoo.papers.vdsw.training import direction_optimizer, two_player_step, two_players
from zoo.papers.vdsw.von_mises_fisher import VonMisesFisher
from zoo.papers.vdsw.weights import autoencoder_rules, direction_rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "AmortizedConfig",
    "AmortizedDirection",
    "Ascent",
    "CapsuleConfig",
    "Kind",
    "PCNCapsAE",
    "PlayersLosses",
    "PointNetAE",
    "PointNetConfig",
    "VonMisesFisher",
    "adaptive_sw",
    "amortized_loss",
    "autoencoder_rules",
    "chamfer",
    "direction_optimizer",
    "direction_rules",
    "directions",
    "dsw",
    "emd_exact",
    "generation_scores",
    "max_sliced_wasserstein",
    "sliced_costs",
    "sliced_wasserstein",
    "sorted_values",
    "two_player_step",
    "two_players",
    "uniform_directions",
    "unit",
    "v_dsw",
]

PAPER = Paper(
    slug="vdsw",
    title="Self-Attention Amortized Distributional Projection Optimization for Point-Cloud Reconstruction",
    authors="Khai Nguyen et al.",
    venue="ICML",
    year=2023,
    arxiv="2301.04791",
    claim="Directions drawn around one that attention predicts reconstruct clouds better than uniform ones, as fast.",
    code="https://github.com/hsgser/Self-Amortized-DSW",
    code_license="MIT",
    remarks="No checkpoints are published. The capsule autoencoder is a reconstruction from its own paper.",
)

_BASE = AmortizedConfig()
register(
    PAPER,
    *(Variant(f"amortized_vsw_{kind}", replace(_BASE, kind=kind)) for kind in get_args(Kind)),
    *(Variant(f"amortized_msw_{kind}", replace(_BASE, kind=kind, kappa=None, directions=1)) for kind in get_args(Kind)),
    example_inputs=amortized.example_inputs,
    weight_rules=direction_rules,
    loss=amortized.loss,
)(AmortizedDirection)
register(
    PAPER,
    Variant("pointnet_ae", PointNetConfig(), 8_028_544),
    example_inputs=autoencoder.example_inputs,
    weight_rules=autoencoder_rules,
    loss=autoencoder.loss,
)(PointNetAE)
register(
    PAPER,
    Variant("pcn_caps_ae", CapsuleConfig()),
    example_inputs=autoencoder.example_inputs,
    loss=autoencoder.loss,
)(PCNCapsAE)

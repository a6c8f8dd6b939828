"""CAPE: neural PDE solvers that are told the equation's parameters, channel by channel.

"Learning Neural PDE Solvers with Parameter-Guided Channel Attention", Makoto Takamoto, Francesco Alesiani, Mathias
Niepert, ICML 2023, arXiv 2304.14118.

A small block before the solver reads the field and the parameters and gives an intermediate field, meant to look like
the next step. Inside, pointwise, depthwise and spectral convolutions act as learned stencils, and what each channel of
each kind counts is computed from the parameters ("channel attention": gates with no softmax and no bound). A curriculum
moves the border between auto-regressive steps, early in time, and teacher-forced ones from epoch to epoch.

Written from the paper and a description of what the authors trained, without their code, whose licence is not a free
one. What that description says beyond the paper, and is therefore done here:
- on a line the block adds to the field and reads raw parameters; on a plane it multiplies, and reads p / (1 + p);
- on a plane the spectral path's two blocks of modes overlap on the averaged field, and the second wins;
- the block's norm has a scale and a bias for each cell, which ties a network to its grid;
- the loss adds the running sum of the intermediate losses at every step, so that early steps count most;
- the published PINO baseline's residual of Burgers' equation has the wrong sign and lacks 1 / pi (`as_published`).
"""

from __future__ import annotations

from dataclasses import replace

from zoo.papers.cape.losses import (
    RollOutLoss,
    Scores,
    curriculum_steps,
    example_targets,
    gradient_penalty,
    loss,
    pde_metrics,
    pino_residual,
    relative_l2,
    rollout,
    rollout_loss,
)
from zoo.papers.cape.model import (
    FNO,
    GATES,
    CAPEBlock,
    CAPEConfig,
    CAPEModel,
    UNet,
    cell_centres,
    example_inputs,
)
from zoo.papers.cape.weights import block_rules, rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "FNO",
    "GATES",
    "CAPEBlock",
    "CAPEConfig",
    "CAPEModel",
    "RollOutLoss",
    "Scores",
    "UNet",
    "block_rules",
    "cell_centres",
    "curriculum_steps",
    "gradient_penalty",
    "loss",
    "pde_metrics",
    "pino_residual",
    "relative_l2",
    "rollout",
    "rollout_loss",
    "rules",
]

PAPER = Paper(
    slug="cape",
    title="Learning Neural PDE Solvers with Parameter-Guided Channel Attention",
    authors="Makoto Takamoto et al.",
    venue="ICML",
    year=2023,
    arxiv="2304.14118",
    claim="Channels weighed by the PDE's parameters, and a curriculum of roll-outs, carry over to unseen parameters.",
    code="https://github.com/nec-research/CAPE-ML4Sci",
    code_license="non-commercial, for academic use",
    remarks="Written from the paper and a description, without the published code, whose licence claims derivatives. "
    "Its golden cases are not part of the project.",
)

LINE = CAPEConfig()
PLANE = CAPEConfig(grid=(64, 64), channels=4, parameters=3, modes=(12, 12), block_modes=(9, 9))

# Parameters with real and imaginary parts counted; the paper's tables count complex numbers once.
register(
    PAPER,
    Variant("cape_fno_1d", LINE, 120_198),
    Variant("fno_1d", replace(LINE, conditioning="none", width=36), 134_717),
    Variant("conditional_fno_1d", replace(LINE, conditioning="concatenate", width=36)),
    Variant("cape_unet_1d", replace(LINE, core="unet", width=32), 2_752_262 + 32_768),
    Variant("unet_1d", replace(LINE, core="unet", width=32, conditioning="none"), 2_707_809),
    Variant("conditional_unet_1d", replace(LINE, core="unet", width=32, conditioning="concatenate")),
    Variant("cape_fno_2d", PLANE, 1_615_004),
    Variant("fno_2d", replace(PLANE, conditioning="none", width=28), 1_814_008),
    Variant("conditional_fno_2d", replace(PLANE, conditioning="concatenate", width=28)),
    Variant("cape_unet_2d", replace(PLANE, core="unet", width=32), 8_120_720 + 331_776),
    Variant("unet_2d", replace(PLANE, core="unet", width=32, conditioning="none"), 7_763_428),
    Variant("conditional_unet_2d", replace(PLANE, core="unet", width=32, conditioning="concatenate")),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(CAPEModel)

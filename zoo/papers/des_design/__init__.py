"""Design of molecules by diffusion and by transformers, both ways between SMILES and properties.

"Generative Discovery of Novel Chemical Designs using Diffusion Modeling and Transformer Deep Neural Networks with
Application to Deep Eutectic Solvents", Rachel K. Luu, Marcin Wysokowski, Markus J. Buehler, Appl. Phys. Lett. 122,
234103, 2023, arXiv 2304.12400. Code: github.com/lamm-mit/MoleculeDiffusionTransformer (Apache-2.0).

Five models. Forward, SMILES to properties: a diffusion model, whose sample is the properties (`predict`), and an
encoder (`PropertyEncoder`). Inverse, properties to SMILES: a diffusion model of one-hot characters (`sample`,
`inpaint`), and a decoder with guidance (`InverseTransformer`, `generate`). Both ways and more tasks: a language model
of prompts (`GraphGPT` of `zoo.backbones.graph_gpt`, without graphs). The paper finds the last one best.

What the published code does and is therefore done here:
- the denoised sequence is clipped to [-1, 1] in the training's loss too;
- sampling stops at the schedule's last positive level, after one update fewer than it has levels;
- transformers inside the U-Net have nothing around them, and their MLPs no norm; what the transformers at a level's
  beginning leave for the way up is never taken;
- the null condition of the diffusion models is never trained (`drop_condition` is 0), guidance with it is noise;
- the forward encoder does not hide padding from its map over positions;
- a start vector is in the decoder's checkpoints though nothing uses it.

Keys and values of a condition are computed once a sequence, and not once a pass of the network.
"""

from __future__ import annotations

from zoo.backbones import graph_gpt
from zoo.backbones.graph_gpt import GraphGPT, GraphGPTConfig
from zoo.papers.des_design.designs import TASKS, DesignReport, design_report, example, prompt
from zoo.papers.des_design.diffusion import (
    denoise,
    diffusion_loss,
    forward_condition,
    forward_target,
    inpaint,
    levels,
    loss,
    one_hot,
    predict,
    sample,
)
from zoo.papers.des_design.transformers import (
    InverseTransformer,
    InverseTransformerConfig,
    PropertyEncoder,
    PropertyEncoderConfig,
    encoder_example_inputs,
    encoder_example_targets,
    encoder_loss,
    generate,
    inverse_example_inputs,
    inverse_logits,
    inverse_loss,
)
from zoo.papers.des_design.unet import QMDiffusion, QMDiffusionConfig, UNet1d, example_inputs
from zoo.papers.des_design.weights import diffusion_rules, encoder_rules, inverse_rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "TASKS",
    "DesignReport",
    "GraphGPT",
    "GraphGPTConfig",
    "InverseTransformer",
    "InverseTransformerConfig",
    "PropertyEncoder",
    "PropertyEncoderConfig",
    "QMDiffusion",
    "QMDiffusionConfig",
    "UNet1d",
    "denoise",
    "design_report",
    "diffusion_loss",
    "encoder_loss",
    "example",
    "forward_condition",
    "forward_target",
    "generate",
    "inpaint",
    "inverse_logits",
    "inverse_loss",
    "levels",
    "loss",
    "one_hot",
    "predict",
    "prompt",
    "sample",
]

PAPER = Paper(
    slug="des_design",
    title="Generative Discovery of Novel Chemical Designs using Diffusion Modeling and Transformer Deep Neural "
    "Networks with Application to Deep Eutectic Solvents",
    authors="Rachel K. Luu et al.",
    venue="Appl. Phys. Lett.",
    year=2023,
    arxiv="2304.12400",
    claim="One toolbox goes from SMILES to properties and back, by diffusion and by transformers; one language model "
    "of prompts for all tasks is best.",
    code="https://github.com/lamm-mit/MoleculeDiffusionTransformer",
    code_license="Apache-2.0",
    remarks="Checkpoints of the models of QM9 are published, neither the eutectic data nor the language model's "
    "weights.",
)

register(
    PAPER,
    Variant(
        "qm_diffusion_forward",
        QMDiffusionConfig(length=64, features=1, channels=64, patch=4, attentions=(2, 2), pre_transformer=0,
                          conditions=64),
        18_322_684,
    ),
    Variant("qm_diffusion_inverse", QMDiffusionConfig(), 90_965_554),
    example_inputs=example_inputs,
    weight_rules=diffusion_rules,
    loss=loss,
)(QMDiffusion)  # fmt: skip

register(
    PAPER,
    Variant("qm_transformer_forward", PropertyEncoderConfig(), 3_162_496),
    example_inputs=encoder_example_inputs,
    weight_rules=encoder_rules,
    loss=encoder_loss,
    example_targets=encoder_example_targets,
)(PropertyEncoder)

register(
    PAPER,
    Variant("qm_transformer_inverse", InverseTransformerConfig(), 2_407_712),
    Variant("qm_transformer_internal", InverseTransformerConfig(embedding=16, shared=False)),
    example_inputs=inverse_example_inputs,
    weight_rules=inverse_rules,
    loss=inverse_loss,
)(InverseTransformer)

register(
    PAPER,
    Variant(
        "des_multitask_gpt",
        GraphGPTConfig(heads=16, head_features=16, mlp_ratio=2, embedding=8, position_features=8, null_key=True,
                       graph_layers=0),
    ),
    example_inputs=graph_gpt.example_inputs,
    weight_rules=graph_gpt.weight_rules,
    loss=graph_gpt.loss,
)(GraphGPT)  # fmt: skip

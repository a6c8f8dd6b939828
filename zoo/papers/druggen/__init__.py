"""DrugGEN: molecules for a target, edited in one shot by a graph transformer that plays against a critic.

"Target Specific De Novo Design of Drug Candidate Molecules with Graph Transformer-based Generative Adversarial
Networks", Atabey Unlu, Elif Cevrim, Ahmet Rifaioglu, Tunca Dogan et al., 2023, arXiv 2302.07868. Code:
github.com/HUBioDataLab/DrugGEN (GPL-3.0), of which facts were used here, and no line.

The generator's input is no noise but a real drug-like molecule, whose atoms and bonds it changes; the critic compares
with known inhibitors of a protein (AKT1, CDK2), or, "NoTarget", with drug-like molecules themselves. Attention has a
softmax a channel, its scores are modulated by the bonds' features, and are the new bonds' features.

What the published code (2025) does, and what is therefore done here:
- there is one pair of networks; the first preprint (2023) had two in sequence, the second with protein features in a
  transformer decoder, and its code is not public any more;
- scores are not summed over channels, so that the number of heads only sets their scale; nothing is masked, padding
  takes part everywhere;
- a block's residual starts from the normalised nodes, and edges are not normalised before attention;
- the generator's logits go to the critic raw, without a softmax, and not symmetrised;
- decoding reads the bonds of the lower triangle only;
- the critic reads nodes only: what its last block would do to edges has parameters and no gradient.
"""

from __future__ import annotations

from zoo.papers.druggen.model import (
    ACTIVATIONS,
    Block,
    DrugGENConfig,
    DrugGENCritic,
    DrugGENGenerator,
    EdgeAttention,
    GraphTransformer,
    SimpleCritic,
    example_inputs,
)
from zoo.papers.druggen.training import (
    Graphs,
    Penalty,
    attention_of_pairs,
    build_optimizer,
    critic_loss,
    cyclic_pairs,
    fit_gan,
    generate,
    generator_loss,
    gradient_penalty,
    interpolation_factors,
    make_gan_step,
)
from zoo.papers.druggen.weights import ATTENTION, critic_rules, generator_rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "ACTIVATIONS",
    "ATTENTION",
    "Block",
    "DrugGENConfig",
    "DrugGENCritic",
    "DrugGENGenerator",
    "EdgeAttention",
    "GraphTransformer",
    "Graphs",
    "Penalty",
    "SimpleCritic",
    "attention_of_pairs",
    "build_optimizer",
    "critic_loss",
    "critic_rules",
    "cyclic_pairs",
    "fit_gan",
    "generate",
    "generator_loss",
    "generator_rules",
    "gradient_penalty",
    "interpolation_factors",
    "make_gan_step",
]

PAPER = Paper(
    slug="druggen",
    title="Target Specific De Novo Design of Drug Candidate Molecules with Graph Transformer-based GANs",
    authors="Atabey Unlu et al.",
    venue="arXiv",
    year=2023,
    arxiv="2302.07868",
    claim="A graph transformer that edits real molecules against a critic of known inhibitors makes inhibitors.",
    code="https://github.com/HUBioDataLab/DrugGEN",
    code_license="GPL-3.0",
    remarks="After the published code, which has one GAN; the first preprint's second GAN, conditioned on protein "
    "features, has no public code.",
)
# The published targets share one network; its sizes follow from each one's molecules, here 45 atoms of 8 elements.
_TARGETS = ("akt1", "cdk2", "notarget")
register(
    PAPER,
    *(Variant(f"druggen_{target}", DrugGENConfig(), 317_454) for target in _TARGETS),
    example_inputs=example_inputs,
    weight_rules=generator_rules,
)(DrugGENGenerator)
register(
    PAPER,
    *(Variant(f"druggen_{target}_critic", DrugGENConfig(), 686_977) for target in _TARGETS),
    example_inputs=example_inputs,
    weight_rules=critic_rules,
)(DrugGENCritic)

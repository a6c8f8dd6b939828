"""Multimodal attention for the sensitivity of cancer cell lines to compounds (PaccMann).

"Towards Explainable Anticancer Compound Sensitivity Prediction via Multimodal Attention-based Convolutional Encoders",
Matteo Manica, Ali Oskooei, Jannis Born et al., Molecular Pharmaceutics 16 (12), 2019, arXiv 1904.11223. Code:
github.com/drugilsberg/paccmann (the paper's, TensorFlow) and github.com/PaccMann/paccmann_predictor (PyTorch), both
MIT.

A compound's SMILES string goes through an embedding and convolutions of three widths; heads of additive attention,
whose query is the cell line's gene expression (gated by an attention over genes), pool each of the four streams. What
the heads look at, atoms and genes, is read as an explanation.

What the published code does and is therefore done here:
- padding tokens are embedded, convolved and attended to like all others (`mask_padding` says otherwise);
- behind a convolution come activation, dropout and batch norm, in the dense layers batch norm, activation and dropout;
- with `gene_to_dense` the genes join ungated;
- the PyTorch model has one gate over genes, the TensorFlow original one a stream, trained padding of the convolutions,
  and no sigmoid. It was transcribed, not run.
A batch of one pair works here, and streams may differ in heads; in the published code neither does.
"""

from __future__ import annotations

from zoo.papers.mca_drug.analysis import (
    Confidence,
    Enrichment,
    atom_attention,
    attention_distances,
    augment_confidence,
    gene_enrichment,
    log_micromolar,
    loss,
    mc_dropout,
    pearson,
    predict_matrix,
    propagate,
    random_sequence,
    regression_loss,
    select_genes,
)
from zoo.papers.mca_drug.baselines import BaselineConfig, FingerprintDNN, SmilesBaseline, fingerprint_inputs
from zoo.papers.mca_drug.model import MCA, MCATF, MCAConfig, PaccMannV2, example_inputs, example_targets
from zoo.papers.mca_drug.weights import rules, tf_rules, v2_rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "MCA",
    "MCATF",
    "BaselineConfig",
    "Confidence",
    "Enrichment",
    "FingerprintDNN",
    "MCAConfig",
    "PaccMannV2",
    "SmilesBaseline",
    "atom_attention",
    "attention_distances",
    "augment_confidence",
    "gene_enrichment",
    "log_micromolar",
    "loss",
    "mc_dropout",
    "pearson",
    "predict_matrix",
    "propagate",
    "random_sequence",
    "regression_loss",
    "select_genes",
]

PAPER = Paper(
    slug="mca_drug",
    title="Towards Explainable Anticancer Compound Sensitivity Prediction via Multimodal Attention-based "
    "Convolutional Encoders",
    authors="Matteo Manica et al.",
    venue="Molecular Pharmaceutics",
    year=2019,
    arxiv="1904.11223",
    claim="Convolutions of SMILES pooled by attention in the context of genes predict drug sensitivity better than "
    "fingerprints, and show which atoms and genes decide.",
    code="https://github.com/PaccMann/paccmann_predictor",
    code_license="MIT",
    remarks="mca_tf is a transcription of the TensorFlow original; the baselines' sizes are ours.",
)

register(
    PAPER,
    Variant("mca_torch", MCAConfig(), 8_169_425),
    Variant("mca_contextual", MCAConfig(kernels=(), filters=(), heads=(16,), gene_heads=(0,))),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(MCA)
register(
    PAPER,
    Variant("paccmann_v2", MCAConfig(length=512), 45_102_017),
    example_inputs=example_inputs,
    weight_rules=v2_rules,
    loss=loss,
    example_targets=example_targets,
)(PaccMannV2)
register(
    PAPER,
    Variant("mca_tf", MCAConfig(dense=(512, 128, 64, 16), dropout=0.3, sigmoid=False), 20_882_561),
    example_inputs=example_inputs,
    weight_rules=tf_rules,
    loss=loss,
    example_targets=example_targets,
)(MCATF)
register(
    PAPER,
    Variant("mca_dnn", BaselineConfig()),
    example_inputs=fingerprint_inputs,
    loss=loss,
    example_targets=example_targets,
)(FingerprintDNN)
register(
    PAPER,
    Variant("mca_scnn", BaselineConfig(encoder="cnn")),
    Variant("mca_rnn", BaselineConfig(encoder="rnn")),
    Variant("mca_sa", BaselineConfig(encoder="self_attention")),
    example_inputs=example_inputs,
    loss=loss,
    example_targets=example_targets,
)(SmilesBaseline)

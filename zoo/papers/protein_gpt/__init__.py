"""The protein transformer whose attention maps are graphs (MaterioFormer).

"Generative Pretrained Autoregressive Transformer Graph Neural Network applied to the Analysis and Discovery of Novel
Proteins", Markus J. Buehler, J. Appl. Phys. 134, 084902, 2023, arXiv 2305.04934. Code:
github.com/lamm-mit/MateriomicTransformer (MIT). The checkpoint named there could not be read; its training data and
prompts are not published, so the names of some tasks are ours.

A byte-level causal language model answers prompts about proteins: sequencing, secondary structure, a property, and
their inverse. In each layer every head's attention map is also the weighted adjacency of a small graph convolution
network on the values, shared by the heads, whose result is added to the attention's.

What the published code does and is therefore done here:
- norms have a gain and no bias; there is one behind the attention's output, and one inside the feed-forward network;
- rows of an adjacency are divided by their sum again in each graph layer (one without links, NaN there, gives 0);
- a linear map and null keys are in checkpoints though nothing uses them.

Since a row of the map adds up to 1, a hop along it is attention with other values: no map is kept, and only thresholds
need its entries. Decoding keeps each graph layer's messages beside keys and values.
"""

from __future__ import annotations

from zoo.backbones.graph_gpt import (
    Graph,
    GraphGPT,
    GraphGPTConfig,
    decode_step,
    example_inputs,
    generate,
    graph_attention,
    graph_rules,
    graphs,
    lm_loss,
    loss,
    weight_rules,
)
from zoo.papers.protein_gpt import prompts
from zoo.registry import Paper, Variant, register

__all__ = [
    "Graph",
    "GraphGPT",
    "GraphGPTConfig",
    "decode_step",
    "generate",
    "graph_attention",
    "graph_rules",
    "graphs",
    "lm_loss",
    "loss",
    "prompts",
    "weight_rules",
]

PAPER = Paper(
    slug="protein_gpt",
    title="Generative Pretrained Autoregressive Transformer Graph Neural Network applied to the Analysis and Discovery "
    "of Novel Proteins",
    authors="Markus J. Buehler",
    venue="J. Appl. Phys.",
    year=2023,
    arxiv="2305.04934",
    claim="Attention maps that serve as graphs of the values, and more tasks at once, make a language model of "
    "proteins better at each.",
    code="https://github.com/lamm-mit/MateriomicTransformer",
    code_license="MIT",
    remarks="The published checkpoint could not be read; prompts are after its README, some names of tasks are ours.",
)


register(
    PAPER,
    Variant("protein_gpt_v4031", GraphGPTConfig(), 9_597_984),
    Variant("protein_gpt_plain", GraphGPTConfig(graph_layers=0)),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
)(GraphGPT)

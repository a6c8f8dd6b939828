"""POGAT: attention inside the smallest complete pieces of a heterogeneous graph, trained to tell true from false ones.

"Perturbation Ontology based Graph Attention Networks", Yichen Wang, Jie Wang, Fulin Wang, Xiang Li, Hao Yin, Bhiksha
Raj, 2024, arXiv 2411.18520.

THIS IS A RECONSTRUCTION. No code or checkpoint was published, and only the abstract and public summaries were at hand.
They say: embeddings without hand-made meta-paths; the network's schema ("ontology"), instantiated as small subgraphs,
is the minimal complete context; a graph transformer layer works inside; subgraphs whose nodes were replaced by others
of the same type are hard negatives, at the node's and at the subgraph's level; node classification and link prediction.
All else was decided here, and is kept in one config:

- a schema is a tree of slots, a type may fill several; up to 16 instances a node, all or by uniform walks; a learned
  "missing" node (a feature row of its own) where a neighbourhood lacks a type;
- a linear projection a type, post-norm layers with exact GELU, attention along the schema's links only, and a bias a
  relation, direction and head; width 64, 4 heads, 2 layers, feed-forward width 128;
- a node's embedding is a softmax-weighted sum (HAN's additive attention, width 32) over all places that it fills, in
  whatever slot of its type; zero for a node in no subgraph;
- a slot is replaced with chance 0.3, at least one, never all; by the one of 8 random nodes of its type that is most
  alike (cosine of features) and linked to no unchanged neighbour;
- a two-layer discriminator on each slot, another on the slots' mean; both losses count half;
- links are scored by z_u^T R z_v, R the identity at first; Xavier-uniform weights, zero biases.
"""

from __future__ import annotations

from zoo.papers.pogat.baselines import GAT, HAN, RGCN, BaselineConfig
from zoo.papers.pogat.losses import (
    Losses,
    detection_losses,
    example_targets,
    loss,
    pogat_loss,
    task_loss,
)
from zoo.papers.pogat.model import (
    POGAT,
    Output,
    POGATConfig,
    SubgraphLayer,
    example_inputs,
    places,
    relation_bias,
    schema_attention,
    segment_softmax,
)
from zoo.registry import Paper, Variant, register
from zoo.weights import Rule, layer, under

__all__ = [
    "GAT",
    "HAN",
    "POGAT",
    "RGCN",
    "BaselineConfig",
    "Losses",
    "Output",
    "POGATConfig",
    "SubgraphLayer",
    "detection_losses",
    "loss",
    "places",
    "pogat_loss",
    "relation_bias",
    "schema_attention",
    "segment_softmax",
    "task_loss",
]

PAPER = Paper(
    slug="pogat",
    title="Perturbation Ontology based Graph Attention Networks",
    authors="Yichen Wang et al.",
    venue="arXiv",
    year=2024,
    arxiv="2411.18520",
    claim="Subgraphs of the ontology, told from perturbed ones, embed heterogeneous graphs better than meta-paths.",
    fidelity="reconstruction",
    remarks="No code was published and the full text was not at hand: a reconstruction, every decision in its config.",
)

_LAYER = [
    *(rule for theirs, ours in {"q": "query", "k": "key", "v": "value", "o": "out"}.items()
      for rule in layer("linear", theirs, ours)),
    *layer("norm", "norm1", "norm_1"),
    *layer("norm", "norm2", "norm_2"),
    *layer("linear", r"ffn\.0", "mlp/up"),
    *layer("linear", r"ffn\.2", "mlp/down"),
    Rule("rel_bias", "params/relation_bias"),
]  # fmt: skip


def weight_rules(config: POGATConfig) -> list[Rule]:
    """Of the reference of this reconstruction."""
    rules = layer("linear", r"proj\.(\d+)", "project_{0}") + under(r"layers\.(\d+)", "layers_{0}", _LAYER)
    rules += layer("linear", "inter_w", "merge_hidden") + layer("linear", "cls", "classify")
    rules.append(Rule(r"inter_q\.weight", "params/merge_query/kernel", "linear"))
    for name in ("node_disc", "graph_disc"):
        rules += layer("linear", rf"{name}\.0", f"{name}_0") + layer("linear", rf"{name}\.2", f"{name}_1")
    return rules


register(
    PAPER,
    Variant("pogat_base", POGATConfig()),
    Variant("pogat_no_perturb", POGATConfig(perturbed="none")),
    Variant("pogat_easy", POGATConfig(perturbed="easy")),
    Variant("pogat_no_graph_level", POGATConfig(graph_weight=0.0)),
    Variant("pogat_mean_merge", POGATConfig(merge="mean")),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
    example_targets=example_targets,
)(POGAT)

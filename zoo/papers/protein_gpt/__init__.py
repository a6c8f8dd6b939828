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

from zoo.papers.protein_gpt import prompts
from zoo.papers.protein_gpt.language import decode_step, generate, graphs, lm_loss, loss
from zoo.papers.protein_gpt.model import Graph, ProteinGPT, ProteinGPTConfig, example_inputs, graph_attention
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

__all__ = [
    "Graph",
    "ProteinGPT",
    "ProteinGPTConfig",
    "decode_step",
    "generate",
    "graph_attention",
    "graphs",
    "lm_loss",
    "loss",
    "prompts",
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


def graph_rules() -> list[Rule]:
    """Of `Graph` alone."""
    return [*layer("linear", r"layers\.(\d+)\.projection", "layer_{0}"), *layer("linear", "lin", "out")]


def weight_rules(config: ProteinGPTConfig) -> list[Rule]:
    """Names of the published package."""
    attention = [
        Rule(r"norm\.gamma", "params/norm/scale"),
        *(rule for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
          for rule in layer("linear", rf"to_{theirs}\.1", ours)),
        *layer("linear", r"to_out\.1", "out"),
        Rule(r"to_out\.2\.gamma", "params/out_norm/scale"),
        Rule("null_k", "params/null_key"),
        Rule("null_v", "params/null_value"),
        *under("GNN_net", "graph", graph_rules()),
    ]  # fmt: skip
    mlp = [
        Rule(r"0\.gamma", "params/norm/scale"),
        *layer("linear", r"1", "up"),
        Rule(r"3\.gamma", "params/hidden_norm/scale"),
        *layer("linear", r"4", "down"),
    ]
    if config.mlp_kernel or config.mlp_inner_kernel:
        convolutions = (("resnetblock1", "before"), ("inner_conv_resnetblock1", "inside"), ("resnetblock2", "after"))
        mlp = [
            *layer("linear", r"project_in\.proj" if config.mlp_gated else r"project_in\.0", "up"),
            *layer("linear", r"ff\.2", "down"),
            *(
                Rule(rf"{theirs}\.{place}\.ds_conv\.weight", f"params/{ours}_{number}/kernel", "conv1d")
                for theirs, ours in convolutions
                for number, place in enumerate((0, 2))
            ),
        ]
    return [
        *layer("embedding", "token_embed", "embed"),
        *layer("linear", "to_dim", "widen"),
        Rule(r"fc1\.weight", "params/unused_kernel", "linear"),
        Rule(r"fc1\.bias", "params/unused_bias"),
        Rule(r"init_norm\.gamma", "params/norm_in/scale"),
        *under(r"layers\.(\d+)\.0", "attention_{0}", attention),
        *under(r"layers\.(\d+)\.1", "mlp_{0}", mlp),
        Rule(r"final_norm\.gamma", "params/norm_out/scale"),
        *layer("linear", "to_logits", "head"),
        Rule(r"(.+)\.beta", None),
        Rule(r"p_enc_1d_graph\.inv_freq", None),
    ]


register(
    PAPER,
    Variant("protein_gpt_v4031", ProteinGPTConfig(), 9_597_984),
    Variant("protein_gpt_plain", ProteinGPTConfig(graph_layers=0)),
    Variant(
        "des_multitask_gpt",
        ProteinGPTConfig(heads=16, head_features=16, mlp_ratio=2, embedding=8, position_features=8, null_key=True,
                         graph_layers=0),
    ),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
)(ProteinGPT)  # fmt: skip

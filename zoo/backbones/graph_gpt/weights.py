"""Names of the published packages of the decoder of bytes."""

from __future__ import annotations

from zoo.backbones.graph_gpt.model import GraphGPTConfig
from zoo.weights.names import Rule, layer, under


def graph_rules() -> list[Rule]:
    """Of `Graph` alone."""
    return [*layer("linear", r"layers\.(\d+)\.projection", "layer_{0}"), *layer("linear", "lin", "out")]


def weight_rules(config: GraphGPTConfig) -> list[Rule]:
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

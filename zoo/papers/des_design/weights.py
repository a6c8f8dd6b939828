"""Names of the published package's parameters."""

from __future__ import annotations

from zoo.papers.des_design.transformers import InverseTransformerConfig, PropertyEncoderConfig
from zoo.papers.des_design.unet import QMDiffusionConfig
from zoo.weights.names import Rule, layer, under

_RESIDUAL = [
    *layer("norm", r"block(1|2)\.groupnorm", "norm_{0}"),
    *layer("conv1d", r"block(1|2)\.project", "conv_{0}"),
    *layer("linear", r"to_scale_shift\.to_scale_shift\.1", "modulation"),
    *layer("pointwise1d", "to_out", "skip"),
]
_ATTENTION = [
    *layer("norm", r"(norm|norm_context)", "{0}"),
    *layer("linear", "to_q", "query"),
    Rule(r"to_kv\.weight", ("params/key/kernel", "params/value/kernel"), "linear"),
    *layer("linear", r"attention\.to_out", "out"),
]
_STACK = [
    *layer("norm", r"to_in\.0", "norm"),
    *layer("pointwise1d", r"to_in\.1", "project_in"),
    *layer("pointwise1d", r"to_out\.1", "project_out"),
    *under(r"blocks\.(\d+)\.(attention|cross_attention)", "layers_{0}/{1}", _ATTENTION),
    *layer("linear", r"blocks\.(\d+)\.feed_forward\.0", "layers_{0}/mlp/up"),
    *layer("linear", r"blocks\.(\d+)\.feed_forward\.2", "layers_{0}/mlp/down"),
]
_LEVEL = [
    *under(r"blocks\.(\d+)", "blocks_{0}", _RESIDUAL),
    *under("pre_transformer_block", "pre_transformer", _STACK),
    *under("transformer", "transformer", _STACK),
]
# Buffers: the norms' zero biases, and tables of positions.
_BUFFERS = [Rule(r"(.+)\.beta", None), Rule(r"(.+)\.inv_freq", None)]


def diffusion_rules(config: QMDiffusionConfig) -> list[Rule]:
    """Of both diffusion models; the copies of all names under `diffusion.` are left out."""
    levels = len(config.factors)
    ups = []
    for index, factor in enumerate(config.factors):
        # Published in the order of use, from the shortest on.
        theirs, ours = rf"upsamples\.{levels - 1 - index}", f"up_{index}"
        ups += under(theirs, ours, _LEVEL)
        ups += layer("conv1d" if factor == 1 else "conv_transpose1d", rf"{theirs}\.upsample", f"{ours}/lengthen")
    unet = [
        *layer("linear", r"to_mapping\.0", "map_1"),
        *layer("linear", r"to_mapping\.2", "map_2"),
        Rule(r"to_time\.0\.0\.weights", "params/frequencies"),
        *layer("linear", r"to_time\.0\.1", "time_in"),
        *under(r"to_in\.block", "patch_in", _RESIDUAL),
        *under(r"to_out\.block", "patch_out", _RESIDUAL),
        *under(r"downsamples\.(\d+)", "down_{0}", _LEVEL),
        *layer("conv1d", r"downsamples\.(\d+)\.downsample", "down_{0}/shorten"),
        *under(r"bottleneck\.pre_block", "middle/before", _RESIDUAL),
        *under(r"bottleneck\.transformer", "middle/transformer", _STACK),
        *under(r"bottleneck\.post_block", "middle/after", _RESIDUAL),
        *ups,
    ]
    return [
        Rule(r"diffusion\.(.+)", None),
        Rule(r"unet\.fixed_embedding\.embedding\.weight", "params/null"),
        *layer("linear", "fc1", "embed"),
        *under("unet", "unet", unet),
        *_BUFFERS,
    ]


_MLP = [
    Rule(r"0\.gamma", "params/norm/scale"),
    *layer("linear", "1", "up"),
    Rule(r"3\.gamma", "params/hidden_norm/scale"),
    *layer("linear", "4", "down"),
]


def inverse_rules(config: InverseTransformerConfig) -> list[Rule]:
    """Of the inverse transformer, with keys that are values or with both."""
    sides = [("kv", "key")] if config.shared else [("k", "key"), ("v", "value")]
    attention = [
        Rule(r"norm\.gamma", "params/norm/scale"),
        *layer("linear", r"to_q\.1", "query"),
        *(rule for theirs, ours in sides for rule in layer("linear", rf"to_{theirs}\.1", f"sides_{ours}")),
        *(Rule(f"null_{theirs}", f"params/null_{ours}") for theirs, ours in sides),
        *layer("linear", r"to_out\.1", "out"),
        Rule(r"to_out\.2\.gamma", "params/out_norm/scale"),
    ]
    return [
        *layer("embedding", "token_embed", "embed"),
        *layer("linear", "to_dim", "widen"),
        Rule("start_token", "params/unused_start"),
        *layer("linear", "fc1", "embed_condition"),
        Rule(r"init_norm\.gamma", "params/norm_in/scale"),
        *under(r"layers\.(\d+)\.0", "layers_{0}/attention", attention),
        *under(r"layers\.(\d+)\.1", "layers_{0}/cross_attention", attention),
        *under(r"layers\.(\d+)\.2", "layers_{0}/mlp", _MLP),
        Rule(r"final_norm\.gamma", "params/norm_out/scale"),
        *layer("linear", "to_logits", "head"),
        *_BUFFERS,
    ]


def encoder_rules(config: PropertyEncoderConfig) -> list[Rule]:
    """Of the forward transformer."""
    attention = [
        Rule(r"in_proj_weight", tuple(f"params/{name}/kernel" for name in ("query", "key", "value")), "linear"),
        Rule(r"in_proj_bias", tuple(f"params/{name}/bias" for name in ("query", "key", "value"))),
        *layer("linear", "out_proj", "out"),
    ]
    return [
        *layer("embedding", "token_embed", "embed"),
        *layer("linear", "to_dim", "widen"),
        Rule(r"init_norm\.gamma", "params/norm_in/scale"),
        *under(r"layers\.(\d+)\.0", "layers_{0}", attention),
        *under(r"layers\.(\d+)\.1", "layers_{0}/mlp", _MLP),
        Rule(r"final_norm\.gamma", "params/norm_out/scale"),
        *layer("linear", "to_logits", "head"),
        *layer("linear", "to_logits_dim_length", "over_time"),
        *_BUFFERS,
    ]

"""Published parameter names of both Informers."""

from __future__ import annotations

from zoo.papers.informer.config import ForecasterConfig, InformerConfig
from zoo.weights.names import Rule, layer, under

_CALENDAR = "(month|day|weekday|hour|minute)"
_EMBEDDING = [
    *layer("conv1d", r"value_embedding\.tokenConv", "value"),
    Rule(r"position_embedding\.pe", None),
    *layer("linear", r"temporal_embedding\.embed", "time"),
    Rule(rf"temporal_embedding\.{_CALENDAR}_embed\.weight", "params/{0}"),
    Rule(rf"temporal_embedding\.{_CALENDAR}_embed\.emb\.weight", None),  # fixed sinusoids
]
_FEED_FORWARD = [
    *layer("pointwise1d", "conv1", "feed_forward/hidden"),
    *layer("pointwise1d", "conv2", "feed_forward/out"),
]
_DISTIL = [*layer("conv1d", "downConv", "conv"), *layer("batch_norm", "norm", "norm")]


def _attention(published: str, path: str) -> list[Rule]:
    return [
        *layer("linear", rf"{published}\.(query|key|value)_projection", path + "/{0}"),
        *layer("linear", rf"{published}\.out_projection", f"{path}/out"),
    ]


_ENCODER = [
    *under(
        r"attn_layers\.(\d+)",
        "layer_{0}",
        [*_attention("attention", "attention"), *_FEED_FORWARD, *layer("norm", "(norm1|norm2)", "{0}")],
    ),
    *under(r"conv_layers\.(\d+)", "distil_{0}", _DISTIL),
    *layer("norm", "norm", "norm"),
]
_DECODER = [
    *under(
        r"decoder\.layers\.(\d+)",
        "decoder_{0}",
        [
            *_attention("self_attention", "self_attention"),
            *_attention("cross_attention", "cross_attention"),
            *_FEED_FORWARD,
            *layer("norm", "(norm1|norm2|norm3)", "{0}"),
        ],
    ),
    *layer("norm", r"decoder\.norm", "decoder_norm"),
    *layer("linear", "projection", "projection"),
]
_EMBEDDINGS = under("(enc|dec)_embedding", "{0}_embedding", _EMBEDDING)


def informer_rules(config: InformerConfig) -> list[Rule]:
    """The names of the published `Informer`."""
    return [*_EMBEDDINGS, *under("encoder", "encoder", _ENCODER), *_DECODER]


def stack_rules(config: InformerConfig) -> list[Rule]:
    """The names of the published `InformerStack`."""
    return [*_EMBEDDINGS, *under(r"encoder\.encoders\.(\d+)", "encoder_{0}", _ENCODER), *_DECODER]


def _library_attention(published: str, path: str) -> list[Rule]:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    return [rule for name, ours in names.items() for rule in layer("linear", rf"{published}\.{name}", f"{path}/{ours}")]


_LIBRARY_FEED_FORWARD = [*layer("linear", "fc1", "feed_forward/hidden"), *layer("linear", "fc2", "feed_forward/out")]
_LIBRARY_SIDE = [
    Rule(r"embed_positions\.weight", None),
    Rule(r"value_embedding\.value_projection\.weight", "params/value/kernel", "linear"),
    *layer("norm", "layernorm_embedding", "embedding_norm"),
]
_LIBRARY_ENCODER_LAYER = [
    *_library_attention("self_attn", "attention"),
    *_LIBRARY_FEED_FORWARD,
    *layer("norm", "self_attn_layer_norm", "norm1"),
    *layer("norm", "final_layer_norm", "norm2"),
]
_LIBRARY_DECODER_LAYER = [
    *_library_attention("self_attn", "self_attention"),
    *_library_attention("encoder_attn", "cross_attention"),
    *_LIBRARY_FEED_FORWARD,
    *layer("norm", "self_attn_layer_norm", "norm1"),
    *layer("norm", "encoder_attn_layer_norm", "norm2"),
    *layer("norm", "final_layer_norm", "norm3"),
]


def forecaster_rules(config: ForecasterConfig) -> list[Rule]:
    """The names of the transformers library's `InformerForPrediction`."""
    heads = [
        rule
        for index, name in enumerate(config.distribution_parameters)
        for rule in layer("linear", rf"parameter_projection\.proj\.{index}", f"heads_{name}")
    ]
    return [
        *layer("embedding", r"model\.embedder\.embedders\.(\d+)", "tables_{0}"),
        *under(r"model\.(encoder|decoder)", "{0}", _LIBRARY_SIDE),
        *under(r"model\.encoder\.layers\.(\d+)", "encoder/layer_{0}", _LIBRARY_ENCODER_LAYER),
        *under(r"model\.encoder\.conv_layers\.(\d+)", "encoder/distil_{0}", _DISTIL),
        *under(r"model\.decoder\.layers\.(\d+)", "decoder/layer_{0}", _LIBRARY_DECODER_LAYER),
        *heads,
    ]

"""Pooling and attention: which design makes an embedding model of a language model (Tang and Yang 2024).

"Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", Yixuan Tang, Yi Yang, 2024, arXiv
2409.02727. Code: github.com/yixuantt/PoolingAndAttn. One base model, one data set, LoRA, one contrastive loss, and five
designs that differ in attention (causal or bidirectional) and in pooling: the last token; a trainable pooling network
on it; on the last tokens of all layers; on all tokens of the last layer; on the mean tokens of all layers.

    model = zoo.create("embedder_5_smollm2_135m")
    variables = adapt(model, decoder_variables, jax.random.key(0))          # new adapters, new pooling network
    embedding = model.apply(variables, tokens, valid)                       # (batch, 576), rows of length 1
    state = init_sharded(lambda _: trained(variables), optimizer, key, mesh)         # of `zoo.train`
    step = make_train_step(contrastive_loss(model), optimizer, state)

What the published code does differently, and is not followed:

- Its latents attend to padding in design 4 (`mask_padding=False` does), so that a text's vector depends on its batch.
- Its Qwen2 stays causal but for one attention kernel; here the mask does not depend on the kernel.
- Designs 2 and 3 read the last place, which is padding where a tokenizer pads on the right; here it is the last token.
- Design 2's queries and keys, 537 of 1,278 million parameters of its pooling network, can have no effect: with one
  vector the softmax is 1. They are kept, so that checkpoints load, and not computed.
- Pooling costs 1,175 GFLOP a text there, 267 here, for the same numbers: see `LatentPooling`.

The paper's tables were not at hand: no number of its is claimed here.
"""

from __future__ import annotations

from zoo.papers.pooling_attention.model import (
    DESIGNS,
    Embedder,
    EmbedderConfig,
    example_inputs,
    example_vectors,
    layer_vectors,
    pooling_rules,
    reduced,
    weight_rules,
)
from zoo.papers.pooling_attention.pooling import LatentPooling, PoolingConfig, unit
from zoo.papers.pooling_attention.training import (
    adapt,
    contrastive_loss,
    hard_negative_nll,
    in_chunks,
    join,
    load_adapter,
    trained,
)
from zoo.registry import Paper, Variant, register

__all__ = [
    "DESIGNS",
    "Embedder",
    "EmbedderConfig",
    "LatentPooling",
    "PoolingConfig",
    "adapt",
    "contrastive_loss",
    "hard_negative_nll",
    "in_chunks",
    "join",
    "layer_vectors",
    "load_adapter",
    "reduced",
    "trained",
    "unit",
]

PAPER = Paper(
    slug="pooling_attention",
    title="Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?",
    authors="Yixuan Tang, Yi Yang",
    venue="arXiv",
    year=2024,
    arxiv="2409.02727",
    claim="Bidirectional attention with trainable pooling over all layers is best for similarity and retrieval, and no "
    "design is for everything.",
    code="https://github.com/yixuantt/PoolingAndAttn",
    fidelity="official code",
    remarks="Padding is left out of design 4's pooling, which the published code pools; `mask_padding=False` does.",
)
# The decoders without a head.
_DECODERS = {"mistral_7b": 7_110_660_096, "qwen2_0_5b": 494_032_768, "smollm2_135m": 134_515_008}
# The pooling networks of one layer, and of all.
_POOLING = {
    "mistral_7b": (1_278_275_584, 1_278_406_656),
    "qwen2_0_5b": (245_216_384, 245_245_056),
    "smollm2_135m": (4_588_992, 4_606_272),
}


def _parameters(name: str) -> int:
    _, number, backbone = name.split("_", 2)
    last, every = _POOLING[backbone]
    return _DECODERS[backbone] + {1: 0, 2: last, 3: every, 4: last, 5: every}[int(number)]


register(
    PAPER,
    *(Variant(name, EmbedderConfig.preset(name), _parameters(name)) for name in EmbedderConfig.PRESETS),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
)(Embedder)
register(
    PAPER,
    Variant("last_layer_pooling", PoolingConfig(), 1_278_275_584),
    Variant("multi_layer_pooling", PoolingConfig(layers=32), 1_278_406_656),
    example_inputs=example_vectors,
    weight_rules=pooling_rules,
)(LatentPooling)

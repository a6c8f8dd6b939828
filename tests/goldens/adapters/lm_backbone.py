"""Golden cases of the language models' backbone: families in small, real checkpoints, tokenizers, quantised blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from kernels.attention_readout import attention_entries
from tests.goldens.pretrained import smollm2
from tests.goldens.runner import Prefix, Suffix
from zoo.backbones import generate
from zoo.backbones.checkpoints import MINILM_L6_V2
from zoo.data.tokenizers import WordPieceTokenizer
from zoo.layers.rotary import LinearScaling, Llama3Scaling, Rotary
from zoo.probing import probe
from zoo.weights.gguf_file import GGUFTensor

# The zoo's model that a family's config starts from.
_BASES = {"gpt2": "gpt2", "llama": "llama2_7b", "mistral": "mistral_7b", "qwen2": "qwen2_0_5b"}
# Our names of the cases' config fields, of every adapter on this backbone.
FIELDS = {
    "vocab_size": "vocab_size",
    "max_positions": "max_length",
    "hidden_size": "features",
    "intermediate_size": "mlp_features",
    "layers": "layers",
    "heads": "heads",
    "kv_heads": "key_heads",
    "head_dim": "head_dim",
    "rms_eps": "norm_epsilon",
    "sliding_window": "window",
    "qkv_bias": "qkv_bias",
    "tie_embeddings": "tie_embeddings",
}
_GENERATED = 24  # tokens that are generated; a case holds some of the first


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "gguf_dequantize":
        return _dequantized(inputs)
    if variant == "minilm_l6_v2":
        return _sentences(inputs)
    if variant == "smollm2_135m" and not state_dict:
        return _smollm2(inputs)
    return _family(variant, overrides, inputs, state_dict)


def model_options(variant: str, overrides: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The zoo's id and config fields of a case's variant (a family, or a published model) and overrides."""
    base = _BASES.get(variant, variant)
    options = {ours: overrides[name] for name, ours in FIELDS.items() if name in overrides}
    if "hidden_size" in overrides and "intermediate_size" not in overrides:
        options["mlp_features"] = 4 * overrides["hidden_size"]
    if "heads" in overrides:
        options.setdefault("key_heads", None)
    if "rope_theta" in overrides or "rope_scaling" in overrides:
        scaling = dict(overrides.get("rope_scaling") or {})
        kind = scaling.pop("type", scaling.pop("rope_type", None))
        if kind == "linear":
            made = LinearScaling(scaling["factor"])
        elif kind == "llama3":
            made = Llama3Scaling(
                scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"],
                scaling["original_max_positions"],
            )  # fmt: skip
        elif kind in (None, "default"):
            made = None
        else:
            raise ValueError(f"unknown rope_scaling {kind!r}")
        theta = overrides.get("rope_theta", zoo.create(base).config.rotary.theta)
        options["rotary"] = Rotary(theta=theta, scaling=made)
    return base, options


def _family(variant, overrides, inputs, state_dict) -> dict[str, Any]:
    base, options = model_options(variant, overrides)
    model = zoo.create(base, **options)
    variables = zoo.load_weights(base, dict(state_dict), **options)
    layers = model.config.layers
    tokens = jnp.asarray(inputs["input_ids"], jnp.int32)
    valid = inputs["attention_mask"] != 0 if "attention_mask" in inputs else None
    names = [f"resid_pre.{layer}" for layer in range(layers)]
    names += ["norm_final", f"pattern.{layers - 1}"]

    @jax.jit
    def run(variables, tokens, valid):
        return probe(model, variables, {"tokens": tokens, "valid": valid}, names)

    found = run(variables, tokens, valid)
    outputs = {"logits": found.logits, "hidden_last": found.sites["norm_final"]}
    outputs |= {f"hidden_{layer}": found.sites[f"resid_pre.{layer}"] for layer in range(layers)}
    pattern = found.sites[f"pattern.{layers - 1}"]
    if valid is not None:  # the cases hold zeros at padding
        outputs = {name: jnp.where(valid[..., None], value, 0) for name, value in outputs.items()}
        pattern = jnp.where(valid[:, None, :, None], pattern, 0)
    outputs["attn_last"] = pattern
    outputs = {name: np.asarray(value) for name, value in outputs.items()}
    return outputs | {"generated": Prefix(_generated(model, variables, tokens, valid), axis=1)}


def _generated(model, variables, tokens, valid, length: int = _GENERATED) -> np.ndarray:
    """Greedy tokens, as many as the table of positions has room for."""
    room = (model.config.max_length or tokens.shape[1] + length) - tokens.shape[1]
    if room < 1:
        return np.zeros((len(tokens), 0), np.int32)
    return np.asarray(generate(model, variables, tokens, min(length, room), valid=valid).tokens)


def _smollm2(inputs) -> dict[str, Any]:
    model, variables, tokenizer = smollm2()
    outputs: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.startswith("text_"):
            outputs["ids_" + name.removeprefix("text_")] = np.array(tokenizer.encode(bytes(value).decode()))
        elif name.startswith("ids_"):
            outputs |= _likelihoods(model, variables, jnp.asarray(value, jnp.int32), name.removeprefix("ids_"))
    if "input_ids" in inputs:
        outputs |= _inside(model, variables, jnp.asarray(inputs["input_ids"], jnp.int32), inputs)
    return outputs


def _losses(logits: jax.Array, tokens: jax.Array) -> np.ndarray:
    """Of each next token of the first sequence, nats."""
    log_probabilities = jax.nn.log_softmax(logits[0, :-1])
    return np.asarray(-jnp.take_along_axis(log_probabilities, tokens[0, 1:, None], axis=1)[:, 0])


def _likelihoods(model, variables, tokens, text: str) -> dict[str, np.ndarray]:
    """Losses of a text, and each head's mean attention to the first token over the later queries (from 256 on)."""
    layers = range(model.config.layers)
    first = min(256, tokens.shape[1] // 4)

    @jax.jit
    def run(variables, tokens):
        names = [f"{name}.{layer}" for layer in layers for name in ("q", "k")]
        found = probe(model, variables, {"tokens": tokens}, names)
        column = jnp.zeros((1, 1), jnp.int32)

        def to_first(layer: int) -> jax.Array:
            query, key = (found.sites[f"{name}.{layer}"] for name in ("q", "k"))
            entries = attention_entries(query, key, columns=column, causal=True)  # (1, heads, queries, 1)
            return entries[0, :, first:, 0].mean(axis=1)

        return found.logits, jnp.stack([to_first(layer) for layer in layers])

    logits, attention = run(variables, tokens)
    return {f"nll_{text}": _losses(logits, tokens), f"attn_token0_{text}": np.asarray(attention)}


def _inside(model, variables, tokens, inputs) -> dict[str, Any]:
    """Logits, residual streams after every block, and attention of the last query in every layer."""
    layers = range(model.config.layers)

    @jax.jit
    def run(variables, tokens):
        names = [f"{name}.{layer}" for layer in layers for name in ("resid_post", "pattern")]
        return probe(model, variables, {"tokens": tokens}, names)

    found = run(variables, tokens)
    logits = np.asarray(found.logits)
    outputs: dict[str, Any] = {"logits_last": logits[0, -1], "nll": _losses(found.logits, tokens)}
    if "vocab_subset" in inputs:
        outputs["logits_sub"] = logits[0][:, inputs["vocab_subset"].astype(int)]
    for layer in layers:
        # A case holds all tokens of a residual stream, or the last ones.
        outputs[f"resid_after_block_{layer}"] = Suffix(np.asarray(found.sites[f"resid_post.{layer}"][0]), axis=0)
        outputs[f"attn_l{layer}_last_query"] = np.asarray(found.sites[f"pattern.{layer}"][0, :, -1])
    outputs["generated"] = Prefix(_generated(model, variables, tokens, None, 32)[0], axis=0)
    return outputs


def _sentences(inputs) -> dict[str, Any]:
    texts = [bytes(inputs[f"text_{index}"]).decode() for index in range(len(inputs)) if f"text_{index}" in inputs]
    batch = WordPieceTokenizer(MINILM_L6_V2.path().parent / "tokenizer.json").encode(texts)
    model, variables = zoo.create("minilm_l6_v2"), zoo.load_weights("minilm_l6_v2")
    embedding, hidden = jax.jit(model.apply)(variables, batch["tokens"], batch["valid"])
    return {
        "input_ids": batch["tokens"],
        "attention_mask": batch["valid"],
        "embedding": np.asarray(embedding),
        "hidden_last": Prefix(np.asarray(hidden), axis=1),
        "similarity": np.asarray(embedding @ embedding.T),
    }


def _dequantized(inputs) -> dict[str, np.ndarray]:
    block = {"f32": (1, 4), "f16": (1, 2), "bf16": (1, 2)}
    outputs = {}
    for name, data in inputs.items():
        kind = name.upper()
        if name in block:
            values, size = block[name]
        else:
            import gguf

            values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        shape = (data.size // size * values,)
        outputs[name] = GGUFTensor(kind, shape, np.ascontiguousarray(data, np.uint8)).dequantize().astype(np.float32)
    return outputs

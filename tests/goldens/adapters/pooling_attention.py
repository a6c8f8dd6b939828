"""Golden cases of the embedding designs: pooling networks, the loss, whole embedders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from tests.goldens.adapters.lm_backbone import FIELDS
from zoo.backbones import DecoderLM
from zoo.layers import lora
from zoo.layers.rotary import Rotary
from zoo.papers.pooling_attention import hard_negative_nll, layer_vectors

_FIELDS = FIELDS | {
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "pool_heads": "pool_heads",
    "pool_head_dim": "pool_head_dim",
    "pool_latents": "pool_latents",
    "pool_layers": "pool_layers",
}


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "hard_negative_nll":
        return _loss(inputs, overrides.get("scale", 20.0))
    if variant in ("last_layer_pooling", "multi_layer_pooling"):
        return _pooling(variant, overrides, inputs, state_dict)
    return _embedder(variant, overrides, inputs, state_dict)


def _loss(inputs, scale) -> dict[str, Any]:
    names = ("query", "positive", "negative")
    vectors = [jnp.asarray(inputs[name]) for name in names]
    loss = jax.value_and_grad(lambda *v: hard_negative_nll(*v, scale=scale), (0, 1, 2))
    value, gradients = jax.jit(loss)(*vectors)
    return {
        "loss": value[None],
        "loss_scale_50": hard_negative_nll(*vectors, scale=50.0)[None],
        "loss_no_negatives": hard_negative_nll(*vectors[:2], scale=scale)[None],
        **{f"grad_{name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


def _pooling(variant, overrides, inputs, state_dict) -> dict[str, Any]:
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    mask = jnp.asarray(inputs["mask"]) != 0 if "mask" in inputs else None

    def call(variables, hidden):
        return model.apply(variables, hidden, mask)

    @jax.jit
    def run(variables, hidden, cotangent):
        embedding, pullback = jax.vjp(call, variables, hidden)
        return embedding, pullback(cotangent)

    hidden, cotangent = jnp.asarray(inputs["hidden"]), jnp.asarray(inputs["cotangent"])
    embedding, (gradients, grad_hidden) = run(variables, hidden, cotangent)
    return {"embedding": embedding, "grad_hidden": grad_hidden, "grad_latents": gradients["params"]["latents"]}


def _embedder(variant, overrides, inputs, state_dict) -> dict[str, Any]:
    base = variant if variant in zoo.list_models() else f"{variant}_mistral_7b"
    options = {ours: overrides[name] for name, ours in _FIELDS.items() if name in overrides}
    if base.startswith("embedder_1"):
        options["pool_latents"] = None
        state_dict = {name: array for name, array in state_dict.items() if not name.startswith("attn_pool.")}
    elif "layers" in overrides:
        options.setdefault("pool_layers", None)
    if "rope_theta" in overrides:
        options["rotary"] = Rotary(theta=overrides["rope_theta"])
    model: Any = zoo.create(base, **options)
    variables = zoo.load_weights(base, dict(state_dict), **options)
    tokens, valid = jnp.asarray(inputs["input_ids"], jnp.int32), jnp.asarray(inputs["attention_mask"]) != 0
    outputs = {"embedding": jax.jit(model.apply)(variables, tokens, valid)}
    if model.config.pooled == "tokens":
        official: Any = zoo.create(base, **options, mask_padding=False)
        outputs["embedding_unmasked"] = jax.jit(official.apply)(variables, tokens, valid)
    # The adapted decoder alone, its adapters merged.
    merged = lora.merge(variables, model.config.adapters)["params"]["decoder"]
    read = jax.jit(partial(layer_vectors, DecoderLM(model.config), pooled=("last", "mean")))
    found = read({"params": merged}, tokens, valid)
    outputs["hidden_last_token"] = found["last"][:, -1]
    for layer in range(1, model.config.layers):
        outputs[f"hidden_layer_{layer}_mean"] = found["mean"][:, layer]
    return {name: np.asarray(value) for name, value in outputs.items()}

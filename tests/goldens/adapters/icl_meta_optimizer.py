"""Golden cases: recordings, momentum attention, finetuning of keys and values, metrics, the dual form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import icl_meta_optimizer as icl

_FIELDS = {"vocab_size": "vocab_size", "num_layers": "layers", "num_heads": "heads", "mlp_dim": "mlp_features"}


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "icl_similarity":
        return _similarity(inputs)
    if variant == "icl_training_attention":
        return _training_attention(overrides, inputs)
    if variant == "icl_dual_form":
        return _dual_form(overrides, inputs)
    base = variant if variant.startswith(("icl_gpt", "icl_moattn")) else "icl_gpt_1_3b"
    options = {ours: overrides[name] for name, ours in _FIELDS.items() if name in overrides}
    if "dim" in overrides:
        options |= {"features": overrides["dim"], "embedding_scale": overrides["dim"] ** 0.5}
        options.setdefault("mlp_features", 4 * overrides["dim"])
    if "momentum" in overrides:
        options |= {"mixer": "momentum", "mixer_options": {"momentum": overrides["momentum"]}}
    model = zoo.create(base, **options)
    variables = zoo.load_weights(base, dict(state_dict), **options)
    if variant == "icl_kv_finetune":
        return _finetuned(model, variables, overrides, inputs)
    found = jax.jit(lambda variables, tokens: icl.records(model, variables, tokens))(
        variables, jnp.asarray(inputs["tokens"], jnp.int32)
    )
    return {
        "logits": np.asarray(found.logits),
        "attn_out_last": np.asarray(found.attention_out),
        "attn_map_last": np.asarray(found.attention_map),
        "attn_q_last": np.asarray(found.query),
    }


def _finetuned(model, variables, overrides, inputs) -> dict[str, np.ndarray]:
    rows = [row[row >= 0].astype(int).tolist() for row in inputs["train_tokens"]]
    query = jnp.asarray(inputs["query_tokens"], jnp.int32)
    found = icl.kv_finetune(model, variables, rows, overrides.get("lr", 0.05))
    forward = jax.jit(model.apply)
    outputs = {
        "losses": found.losses,
        "grad_norms": found.gradient_norms,
        "train_queries": found.queries,
        "zs_logits": forward(variables, query)[0],
        "ft_logits": forward(found.variables, query)[0],
    }
    for index in range(model.config.layers):
        mixer = found.variables["params"][f"layer_{index}"]["mixer"]
        for name, ours in (("k_proj", "key"), ("v_proj", "value")):
            outputs[f"{name}{index}"] = mixer[ours]["kernel"].T
    return {name: np.asarray(value) for name, value in outputs.items()}


def _similarity(inputs) -> dict[str, np.ndarray]:
    lengths = inputs["lengths"].astype(int)
    labels = [inputs[name].astype(int) for name in ("pred_zs", "pred_ft", "pred_icl", "gold")]
    return {
        "rec2ftp": np.array([icl.rec2ftp(*labels)]),
        "simaou": icl.simaou(inputs["h_zs"], inputs["h_ft"], inputs["h_icl"]),
        "simam_before": icl.simam(inputs["m_zs"], inputs["m_icl"], lengths),
        "simam_after": icl.simam(inputs["m_ft"], inputs["m_icl"], lengths),
    }


def _training_attention(overrides, inputs) -> dict[str, np.ndarray]:
    found = icl.training_attention(inputs["icl_map"], inputs["ft_q"], inputs["query_q"], overrides["example_lengths"])
    return {
        "kendall_token": found.kendall_token,
        "kendall_example": found.kendall_example,
        "recall_top5_example": found.recall_example,
        "recall_top100_token": found.recall_token,
    }


def _dual_form(overrides, inputs) -> dict[str, np.ndarray]:
    weight = jnp.asarray(inputs["w0"]) / inputs["w0"].shape[1] ** 0.5
    found = icl.dual_form(
        weight, *(jnp.asarray(inputs[name]) for name in ("x", "y", "query")), overrides.get("lr", 0.05)
    )
    return {
        "errors": np.asarray(found.errors),
        "delta_w": np.asarray(found.update),
        "output": np.asarray(found.output),
    }

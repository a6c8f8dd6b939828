"""Golden cases of Informer: the published models, ProbSparse attention alone, and the transformers library's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from kernels import prob_sparse
from zoo.papers import informer


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    tables = [inputs[f"sample_idx_{index}"] for index in range(sum(name.startswith("sample_idx_") for name in inputs))]
    if variant == "prob_sparse_attention":
        return _core(overrides, inputs)
    if variant == "informer_hf":
        return _forecaster(variant, overrides, inputs, state_dict, tables)
    return _informer(variant, overrides, inputs, state_dict, tables)


def _core(overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = jax.jit(prob_sparse.prob_sparse_attention, static_argnames=("queries", "causal"))(
        *(jnp.asarray(inputs[name]) for name in ("q", "k", "v", "sample_idx")),
        queries=prob_sparse.active_queries(overrides.get("factor", 5), inputs["q"].shape[1]),
        causal=bool(overrides.get("mask_flag", False)),
    )
    return {
        "out": np.asarray(out.out),
        "sparsity_m": np.asarray(out.measure),
        "top_sorted": np.sort(np.asarray(out.top), axis=-1).astype(np.float32),
    }


def _informer(variant, overrides, inputs, state_dict, tables) -> dict[str, np.ndarray]:
    # The sizes that the arrays themselves show, for cases that do not spell them out.
    shown = {
        "seq_len": inputs["x_enc"].shape[1],
        "enc_in": inputs["x_enc"].shape[2],
        "dec_in": inputs["x_dec"].shape[2],
        "c_out": state_dict["projection.weight"].shape[0],
        "freq": "t" if inputs["x_mark_enc"].shape[2] == 5 else "h",
    }
    base = zoo.create(variant).config
    if "pred_len" not in overrides:
        label_len = overrides.get("label_len", base.label_len)
        shown["pred_len"] = inputs["x_dec"].shape[1] - label_len
    if "features" not in overrides:
        widths = (shown["enc_in"], shown["dec_in"], shown["c_out"])
        shown["features"] = "S" if widths == (1, 1, 1) else "MS" if widths[0] > widths[2] == 1 else "M"
    options = shown | dict(overrides)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    forward = jax.jit(model.apply, static_argnames=("return_maps",))
    arrays = [inputs[name] for name in ("x_enc", "x_mark_enc", "x_dec", "x_mark_dec")]
    forecast, maps = forward(variables, *arrays, sample_keys=tables, return_maps=True)
    outputs = {"pred": np.asarray(forecast)}
    for name, attention in maps.items():
        kind, index = name.split("_")
        # As the cases keep them: the first batch item, heads 0 and 1.
        outputs[{"encoder": "enc_attn_", "decoder": "dec_attn_", "cross": "cross_attn_"}[kind] + index] = np.asarray(
            attention.weights[:1, :2]
        )
    return outputs


def _forecaster(variant, overrides, inputs, state_dict, tables) -> dict[str, np.ndarray]:
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    known = (
        "past_values", "past_time_features", "future_values", "future_time_features", "past_observed_mask",
        "static_categorical_features", "static_real_features",
    )  # fmt: skip
    arrays = {name: inputs[name] for name in known if name in inputs}
    for part in ("past", "future"):  # without time features, a case may leave the empty arrays out
        arrays.setdefault(f"{part}_time_features", np.zeros((*inputs[f"{part}_values"].shape[:2], 0), np.float32))
    forecast = jax.jit(model.apply)(variables, **arrays, sample_keys=tables)
    kind = model.config.distribution_output
    loss = informer.forecast_loss(kind, forecast, inputs["future_values"], inputs.get("future_observed_mask"))
    parameters = dict(forecast.parameters)
    if kind == "negative_binomial":
        # The library scales the logits in place when it computes the loss, so that is what it returns.
        parameters["logits"] = parameters["logits"] + jnp.log(forecast.scale)
    outputs = {name: value for name, value in parameters.items() if name not in ("loc", "scale")}
    outputs |= {f"{name}_param": value for name, value in parameters.items()}
    outputs |= {
        "loss": loss.reshape(1),
        "loc": forecast.loc,
        "scale": forecast.scale,
        "encoder_last_hidden_state": forecast.encoder_state,
        "static_features": forecast.static_features,
    }
    return {name: np.asarray(value) for name, value in outputs.items()}

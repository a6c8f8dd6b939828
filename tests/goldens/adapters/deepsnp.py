"""Golden cases of DeepSNP: networks, the gated recurrence alone, and what turns labels and steps into breakpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import zoo
from zoo.data.snp_array import breakpoints_from_copy_number, savitzky_golay_slope
from zoo.papers import deepsnp
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "deepsnp_ops":
        return _operations(inputs)
    if variant == "gated_bgru":
        return _recurrence(overrides, inputs["x"], state_dict)
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    out = jax.jit(model.apply)(variables, inputs["window"])
    return {name: np.asarray(value) for name, value in out.items()}


def _operations(inputs: Arrays) -> dict[str, np.ndarray]:
    found = {}
    if "copy_number" in inputs:
        found["delta"] = np.abs(savitzky_golay_slope(inputs["copy_number"]))
        found["breakpoints"] = breakpoints_from_copy_number(inputs["copy_number"]).astype(np.float32)
    if "soft" in inputs and "sigm" in inputs:
        found["pooled"] = np.asarray(deepsnp.attention_pool(inputs["soft"], inputs["sigm"]))
    if "p" in inputs:
        found["localization_delta"] = deepsnp.localization_delta(inputs["p"])
    return found


def _recurrence(overrides: Mapping[str, Any], x: np.ndarray, state_dict: Arrays) -> dict[str, np.ndarray]:
    units = overrides.get("units", state_dict["gru_value.forward.weight_hh"].shape[1])
    model = deepsnp.GatedBiGRU(units)
    rows = x.reshape(-1, *x.shape[2:])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), rows))
    variables = names.convert(state_dict, deepsnp.GRU_RULES, shapes)
    y = jax.jit(model.apply)(variables, rows)
    return {"y": np.asarray(y).reshape(*x.shape[:-1], -1)}

"""Golden cases of Titans: the functional core, language models, and the community's neural memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from kernels.neural_memory import neural_memory
from zoo.mixers.recurrent import unit_length


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "titans_memory_core":
        return _core(inputs, **overrides)
    if variant.startswith("titans_mac"):  # the reference numbers a shorter last segment's positions without gaps
        overrides = {"pack_last_segment": True, **overrides}
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    if variant == "titans_neural_memory_community":
        retrieved, state = jax.jit(model.apply)(variables, inputs["x"])
        outputs = {"retrieved": retrieved, "final_norm.gamma": _rows(state.scale)}
        outputs |= {f"final_model.weights.{layer}": _rows(weight) for layer, weight in enumerate(state.weights)}
        return {name: np.asarray(value) for name, value in outputs.items()}
    logits, _ = jax.jit(model.apply)(variables, inputs["tokens"])
    return {"logits": np.asarray(logits)}


def _rows(array: jax.Array) -> jax.Array:
    """(batch, heads, ...) to (batch * heads, ...)."""
    return array.reshape(-1, *array.shape[2:])


def _core(
    inputs: Mapping[str, np.ndarray], chunk_size: int = 1, depth: int = 1, residual_norm: bool = False
) -> dict[str, np.ndarray]:
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
    weights = tuple(arrays[f"w{layer}"] / np.sqrt(arrays[f"w{layer}"].shape[-1]) for layer in range(1, depth + 1))
    norm = (1 + 0.1 * arrays["ln_weight"], 0.1 * arrays["ln_bias"]) if residual_norm else None
    out, state = jax.jit(neural_memory, static_argnames=("chunk_size",))(
        unit_length(arrays["q"]),
        unit_length(arrays["k"]),
        arrays["v"],
        jax.nn.sigmoid(arrays["alpha_logit"] - 4),
        jax.nn.sigmoid(arrays["eta_logit"]),
        0.1 * jax.nn.sigmoid(arrays["theta_logit"]),
        weights,
        norm=norm,
        chunk_size=chunk_size,
    )
    outputs = {"y": out}
    for layer in range(depth):
        outputs |= {f"w{layer + 1}_final": state.weights[layer], f"s{layer + 1}_final": state.momentum[layer]}
    return {name: np.asarray(value) for name, value in outputs.items()}

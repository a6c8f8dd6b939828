"""Golden cases of Based: language models, Taylor attention alone, the recall task and its model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from kernels.linear_attention import linear_attention, taylor_features
from zoo.data.recall import mqar
from zoo.papers import based
from zoo.train.recall import recall_metrics


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "mqar":
        return _task(**overrides)
    if variant == "based_taylor_attention":
        return _core(overrides, *(jnp.asarray(inputs[name]) for name in ("q", "k", "v")))
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    logits, _ = jax.jit(model.apply)(variables, inputs["tokens"])
    outputs = {"logits": np.asarray(logits)}
    if "labels" in inputs:
        metrics = recall_metrics(logits, inputs["labels"])
        outputs |= {name: np.asarray(value).reshape(1) for name, value in metrics.items()}
    return outputs


def _task(
    seed: int,
    num_examples: int,
    input_seq_len: int,
    num_kv_pairs: int = 8,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> dict[str, np.ndarray]:
    task = mqar(seed, num_examples, input_seq_len, num_kv_pairs, vocab_size, power_a, random_non_queries)
    return {"inputs": task.tokens, "labels": task.labels}


def _core(overrides: Mapping[str, Any], query: jax.Array, key: jax.Array, value: jax.Array) -> dict[str, np.ndarray]:
    width = query.shape[-1]
    attend = jax.jit(
        partial(linear_attention, feature_map="taylor", epsilon=overrides.get("eps", 1e-6)),
        static_argnames=("normalize",),
    )
    out, state = attend(query, key, value, normalize=True)
    sums, _ = attend(query, key, value, normalize=False)
    published = based.published_state(state, width)
    return {
        "y": np.asarray(out),
        "y_unnormalised": np.asarray(sums),
        "phi_q": np.asarray(taylor_features(query * width**-0.25, packed=False)),
        "phi_k": np.asarray(taylor_features(key * width**-0.25, packed=False)),
        "kv_state": np.asarray(published.kv_state),
        "k_state": np.asarray(published.k_state),
    }

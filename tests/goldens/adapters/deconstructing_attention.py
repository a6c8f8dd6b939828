"""Golden cases of deconstructed attention: language models of every variant, and the indicators of a map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import deconstructing_attention as paper


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "deconattn_indicators":
        return _indicators(jnp.asarray(inputs["scores"]))
    options = dict(overrides)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    tokens = jnp.asarray(inputs["tokens"], jnp.int32)
    stream = None
    if options.get("variant") == "rndemb":
        stream = 0.5 * jnp.asarray(inputs["random_embedding"])
    elif options.get("variant") == "fixedseq":
        others = [array for name, array in inputs.items() if name != "tokens"]
        stream = jnp.asarray(others[0], jnp.int32).reshape(-1) if others else None
    run = jax.jit(lambda variables, tokens: paper.attention_maps(model, variables, tokens, stream))
    logits, maps = run(variables, tokens)
    outputs = {"logits": np.asarray(logits)}
    for index, found in maps.items():
        outputs[f"attention_layer{index + 1}"] = np.asarray(found.weights[0])
    return outputs


def _indicators(scores: jax.Array) -> dict[str, np.ndarray]:
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, 2 * scores, -jnp.inf), axis=-1)
    return {name: np.asarray(value).reshape(1) for name, value in paper.attention_indicators(weights).items()}

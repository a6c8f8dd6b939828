"""Golden cases of circuits: path patching, forced attention and attributions of small GPT-2s, and the real model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import zoo
from tests.goldens.adapters.lm_backbone import model_options
from tests.goldens.pretrained import smollm2
from zoo.papers import circuit_reuse
from zoo.papers.circuit_reuse import Pairs, final_stream
from zoo.probing import direct_logit_attribution

# Output: receivers (None is the last residual stream), component, position, frozen MLPs.
_RUNS: dict[str, tuple[list | None, str, int, bool]] = {
    "effect_logits": (None, "z", -1, False),
    "effect_logits_frozen_mlps": (None, "z", -1, True),
    "effect_q": ([(3, 1), (3, 2)], "q", -1, False),
    "effect_v_last": ([(2, 0)], "v", -1, False),
    "effect_q_two_layers": ([(2, 3), (3, 0)], "q", -1, False),
    "effect_v_pos6": ([(3, 0), (3, 1)], "v", 6, False),
    "effect_k_pos5": ([(2, 2)], "k", 5, False),
    "effect_mid_resid": (["resid_post.1"], "z", -1, False),
}


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    if state_dict:
        base, options = model_options(variant, overrides)
        model, variables = zoo.create(base, **options), zoo.load_weights(base, dict(state_dict), **options)
    else:
        model, variables, _ = smollm2()
    if "targets" in inputs:
        return _interventions(model, variables, inputs)
    if "lengths" in inputs:
        return _real(model, variables, inputs)
    return _patched(model, variables, inputs)


def _pairs(inputs, clean: str) -> Pairs:
    tokens = jnp.asarray(inputs[clean], jnp.int32)
    lengths = jnp.asarray(inputs.get("lengths", np.full(len(tokens), tokens.shape[1])))
    corrupted, answers = jnp.asarray(inputs["corrupted_ids"], jnp.int32), jnp.asarray(inputs["answer_ids"], jnp.int32)
    return Pairs(tokens, corrupted, answers, lengths, lengths)


def _patched(model, variables, inputs) -> dict[str, np.ndarray]:
    pairs = _pairs(inputs, "source_ids")
    outputs = {}
    for name, (receivers, component, position, frozen) in _RUNS.items():
        receivers = final_stream(model) if receivers is None else receivers
        heads = [receiver for receiver in receivers if not isinstance(receiver, str)]
        if position >= pairs.clean.shape[1] or any(
            layer >= model.config.layers or head >= model.config.heads for layer, head in heads
        ):
            continue  # this case's network or prompts are too small for that run
        found = circuit_reuse.path_patch(
            model, variables, pairs, receivers, component, position=position, freeze_mlps=frozen
        )
        outputs[name] = found.effect
        outputs["logit_diff_clean"] = found.clean.mean(keepdims=True)
        outputs["logit_diff_corrupted"] = found.corrupted.mean(keepdims=True)
    return outputs


def _real(model, variables, inputs) -> dict[str, np.ndarray]:
    pairs = _pairs(inputs, "clean_ids")
    found = circuit_reuse.path_patch(model, variables, pairs, final_stream(model))
    frozen = circuit_reuse.path_patch(model, variables, pairs, final_stream(model), freeze_mlps=True)
    return {
        "effect": found.effect,
        "effect_frozen_mlps": frozen.effect,
        "logit_diff_clean": found.clean,
        "logit_diff_flipped": found.corrupted,
    }


def _interventions(model, variables, inputs) -> dict[str, Any]:
    tokens, targets = jnp.asarray(inputs["input_ids"], jnp.int32), inputs["targets"]
    rows = np.zeros(tokens.shape, np.float32)
    np.add.at(rows, (np.arange(len(rows))[:, None], targets), 1 / targets.shape[1])
    reading = circuit_reuse.read(model, variables, tokens)
    forced = {(int(layer), int(head)): jnp.asarray(rows) for layer, head in inputs["heads"]}
    embedding = nn.unbox(variables)["params"]["embed"]["embedding"]
    right, wrong = np.asarray(inputs["answer_ids"]).T
    parts = direct_logit_attribution(model, variables, {"tokens": tokens}, embedding[right] - embedding[wrong])
    plain = circuit_reuse.at_end(model, variables, reading)
    return {
        "logits_last": np.asarray(plain.logits),
        "logits_last_forced": np.asarray(circuit_reuse.at_end(model, variables, reading, forced).logits),
        "pattern_last_query": np.asarray(plain.attention),
        "direct_logit_attribution": np.asarray(parts[..., -1].transpose(2, 0, 1)),
        "copying_top5": circuit_reuse.ov_copying(model, variables, 5),
    }

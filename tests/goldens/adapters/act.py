"""Golden cases of attention calibration: the rule on maps, and the real model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.goldens.pretrained import smollm2
from tests.goldens.runner import Prefix
from zoo.backbones import DecoderLM
from zoo.papers import act


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    options = {name: overrides[name] for name in ("beta", "threshold") if name in overrides}
    if variant == "act_calibrate":
        heads = [int(head) for head in inputs["heads"]]
        changed, mean, sinks = act.calibrate_attention(jnp.asarray(inputs["attention"]), heads, **options)
        return {"calibrated": np.asarray(changed), "column_mean": np.asarray(mean), "sinks": np.asarray(sinks)}
    return _real(inputs, options)


def _real(inputs, options) -> dict[str, Any]:
    model, variables, _ = smollm2()
    tokens = jnp.asarray(inputs["input_ids"], jnp.int32)
    heads = np.zeros((model.config.layers, 1, model.config.heads), bool)
    for layer, head in inputs["heads"].astype(int):
        heads[layer, 0, head] = True

    @jax.jit
    def run(variables, tokens):
        statistics = act.sink_statistics(model, variables, tokens, threshold=options.get("threshold", act.THRESHOLD))
        plain = model.apply(variables, tokens)[0][0, -1]
        hidden = act.calibrated(model, variables, tokens, act.Calibration(jnp.asarray(heads), **options))
        return statistics, plain, model.apply(variables, hidden[:, -1], method=DecoderLM.logits)[0]

    statistics, plain, changed = (jax.tree.map(np.asarray, part) for part in run(variables, tokens))
    labels = inputs["label_ids"].astype(int)
    return {
        "column_mean": statistics.column_mean[:, 0],
        "sinks": statistics.sinks[:, 0],
        "label_logits": plain[labels],
        "label_logits_act": changed[labels],
        "logits_act_first512": changed[:512],
        "logits_act": Prefix(changed, axis=0),
    }

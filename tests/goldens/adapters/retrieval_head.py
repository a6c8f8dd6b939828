"""Golden cases of retrieval heads: scores, spans, the published models' summaries, and the real model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.goldens.pretrained import smollm2
from tests.goldens.runner import Prefix
from zoo.papers import retrieval_head

_STEPS = 30  # tokens of the real model's answers
_END = 2


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    return {
        "retrieval_score": _score,
        "needle_span": _spans,
        "head_score_summary": _summaries,
        "smollm2_135m": _real,
    }[variant](inputs)


def _score(inputs) -> dict[str, np.ndarray]:
    best_key = inputs["attention"].argmax(-1)
    span = tuple(int(side) for side in inputs["needle_span"])
    return {"score": retrieval_head.retrieval_score(best_key, inputs["generated"], inputs["prompt_ids"], span)}


def _spans(inputs) -> dict[str, np.ndarray]:
    indices = [name.removeprefix("prompt_") for name in inputs if name.startswith("prompt_")]
    return {
        f"span_{index}": np.array(retrieval_head.needle_span(inputs[f"prompt_{index}"], inputs[f"needle_{index}"]))
        for index in indices
    }


def _summaries(inputs) -> dict[str, np.ndarray]:
    outputs = {}
    for name, mean in inputs.items():
        if name.startswith("mean_score_"):
            model = name.removeprefix("mean_score_")
            summary = retrieval_head.summarize(mean, inputs[f"activation_frequency_{model}"])
            outputs[f"summary_{model}"] = np.array(summary)
            outputs[f"top10_{model}"] = np.array(retrieval_head.top_heads(mean, 10))
    return outputs


def _real(inputs) -> dict[str, Any]:
    model, variables, _ = smollm2()
    prompt = jnp.asarray(inputs["prompt_ids"], jnp.int32)[None]
    state = retrieval_head.prefill(model, variables, prompt, _STEPS)
    shape = (model.config.layers, model.config.heads)

    def answered(heads) -> retrieval_head.Retrieval:
        masked = retrieval_head.head_mask([tuple(map(int, head)) for head in heads], shape)
        return retrieval_head.retrieve(
            model, variables, prompt, steps=_STEPS, masked=masked, stop_token=_END, state=state
        )

    plain = answered([])
    length = int(plain.lengths[0])
    outputs = {
        "generated": np.asarray(plain.tokens[0, :length]),
        "argmax_weight_first6": np.asarray(plain.best_weight[0, :6]),
        "logits_first": np.asarray(plain.first_logits[0, ::64]),
        "score": retrieval_head.retrieval_score(
            np.asarray(plain.best_key[0, :length]), np.asarray(plain.tokens[0, :length]), inputs["prompt_ids"],
            tuple(int(side) for side in inputs["needle_span"]),
        ),
    }  # fmt: skip
    for name, heads in inputs.items():
        if name.startswith("heads_"):
            masked = answered(heads)
            tokens = np.asarray(masked.tokens[0, : int(masked.lengths[0])])
            outputs["generated_" + name.removeprefix("heads_")] = Prefix(tokens, axis=0)
    return outputs

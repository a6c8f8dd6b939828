"""Golden cases of sentence attention: networks, a gate, a training step, intersection over union."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import sentence_attention
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "algorithm.segmentation_iou":
        return _iou(overrides, inputs)
    if variant == "sentence_attention.block":
        return _block(overrides, inputs, state_dict)
    options = dict(overrides)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    if "labels" in inputs:
        return _train_step(model, variables, inputs)
    return {"logits": np.asarray(jax.jit(model.apply)(variables, inputs["image"], inputs["text"]))}


def _iou(overrides: Mapping[str, Any], inputs: Arrays) -> dict[str, np.ndarray]:
    logits, labels = inputs["logits"], np.asarray(inputs["labels"])
    classes = overrides.get("num_classes", logits.shape[-1])
    labels = np.where(labels == overrides.get("ignore_index", classes), classes, labels)
    return {
        "iou": np.asarray(sentence_attention.iou(logits, labels)),
        "per_image_iou": np.asarray(sentence_attention.per_image_iou(logits, labels)),
    }


def _block(overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    x, text = inputs["x"], inputs["text"]
    if text.shape[-1] != overrides.get("in_dim", text.shape[-1]):
        raise ValueError(f"text has {text.shape[-1]} features, not {overrides['in_dim']}")
    model = sentence_attention.SentenceAttention(overrides.get("out_dim", x.shape[-1]))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, text))
    variables = names.convert(state_dict, sentence_attention.GATE, shapes)
    return {
        "y": np.asarray(jax.jit(model.apply)(variables, x, text)),
        "weights": np.asarray(model.apply(variables, text, method="weights")),
    }


def _train_step(model: Any, variables: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    @jax.jit
    def step(params):
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            logits, state = model.apply(
                given, inputs["image"], inputs["text"], True, mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )  # fmt: skip
            value = sentence_attention.grounding_loss(logits, jnp.asarray(inputs["labels"]))
            return value, (value, logits, state["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    gradient, (value, logits, stats) = step(variables["params"])
    groups = ("backbone", "gate_", "merge_", "classifier")
    norms = [
        math.sqrt(
            sum(
                float(jnp.vdot(leaf, leaf))
                for name, tree in gradient.items() if name.startswith(group)
                for leaf in jax.tree.leaves(tree)
            )
        )
        for group in groups
    ]  # fmt: skip
    return {
        "logits": np.asarray(logits),
        "loss": np.asarray(value).reshape(1),
        "grad_norms": np.asarray(norms, np.float32),
        "running_mean": np.asarray(stats["init_norm"]["mean"]),
        "running_var": np.asarray(stats["init_norm"]["var"]),
        "bn_running_var": np.asarray(stats["backbone"]["stem"]["norm"]["var"]),
    }

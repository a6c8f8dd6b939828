"""Cases of PatchCT, a reconstruction: conditional transport, networks, the asymmetric loss, measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import patchct

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "algorithm.conditional_transport":
        return _transport(overrides, inputs)
    if variant == "algorithm.asymmetric_loss":
        return _asymmetric_loss(overrides, inputs)
    if variant == "algorithm.multilabel_metrics":
        scores, y = inputs["scores"], inputs["y"]
        return {
            "threshold_0.5": np.asarray(patchct.multilabel_metrics(scores, y), np.float32),
            "top3": np.asarray(patchct.multilabel_metrics(scores, y, top_k=3), np.float32),
        }
    return _network(variant, overrides, inputs, state_dict)


def _transport(overrides: Mapping[str, Any], inputs: Arrays) -> dict[str, np.ndarray]:
    patches, labels, y, weights = (inputs.get(name) for name in ("patches", "labels", "y", "patch_weights"))
    tau = overrides.get("tau", 0.07)

    @jax.jit
    def both(patches, labels):
        def value(patches, labels):
            costs = patchct.conditional_transport(patches, labels, y, tau, weights)
            return costs.sum(axis=1).mean(), costs

        return jax.value_and_grad(value, (0, 1), has_aux=True)(patches, labels)

    (_, costs), (d_patches, d_labels) = both(patches, labels)
    found = patchct.plans(patches, labels, y, tau, weights)
    outputs = {"costs": costs, "grad_patches": d_patches, "grad_labels": d_labels, **found._asdict()}
    return {name: np.asarray(value) for name, value in outputs.items()}


def _asymmetric_loss(overrides: Mapping[str, Any], inputs: Arrays) -> dict[str, np.ndarray]:
    ours = {"gamma_neg": "negative_focus", "gamma_pos": "positive_focus", "clip": "shift"}
    options = {ours[name]: value for name, value in overrides.items()}
    logits, y = inputs["logits"], inputs["y"]
    value, gradient = jax.value_and_grad(lambda x: patchct.asymmetric_loss(x, y, **options))(jnp.asarray(logits))
    second = patchct.asymmetric_loss(logits, y, positive_focus=0, negative_focus=2, shift=0)
    return {
        "loss": np.asarray(value).reshape(1),
        "grad": np.asarray(gradient),
        "loss_gn2_gp0_noclip": np.asarray(second).reshape(1),
    }


def _network(
    variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays
) -> dict[str, np.ndarray]:  # fmt: skip
    options = dict(overrides)
    if "image_size" in options:
        size = options["image_size"]
        options["image_size"] = tuple(size) if isinstance(size, list | tuple) else (size, size)
        options["resolution"] = options["image_size"]
    options["labels"] = len(inputs["tokens"])
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    images, tokens, y = inputs["image"], inputs["tokens"], inputs["y"]
    found = jax.jit(model.apply)(variables, images, tokens, y)

    def plan(model):
        x, labels = model.features(images)[-2][:, 1:], model.label_vectors(tokens)[-2]
        return patchct.plans(x, labels, jnp.asarray(y), model.temperature())

    navigators = jax.jit(lambda variables: model.apply(variables, method=plan))(variables)
    return {
        "logits": np.asarray(found.logits),
        "forward_cost": np.asarray(found.costs[..., 0]),
        "backward_cost": np.asarray(found.costs[..., 1]),
        "backward_plan": np.asarray(navigators.patch_given_label),
        "forward_plan": np.asarray(navigators.label_given_patch),
    }

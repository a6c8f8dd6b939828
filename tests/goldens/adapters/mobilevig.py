"""Golden cases of MobileViG: classifiers, feature maps, the grapher, the aggregation, a training step, Mask R-CNN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import mobilevig
from zoo.papers.mobilevig.weights import GRAPHER
from zoo.train.classification import hard_distillation, smooth_labels
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]
_OURS = {"K": "hop", "drop_path": "drop_path_rate"}


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "algorithm.svga_aggregate":
        return {"y": np.asarray(jax.jit(lambda x: mobilevig.svga_aggregate(x, overrides.get("K", 2)))(inputs["x"]))}
    if variant == "mobilevig.grapher":
        return _grapher(overrides, inputs["x"], state_dict)
    options = {_OURS.get(name, name): value for name, value in overrides.items()}
    if variant.startswith("mask_rcnn"):
        return _mask_rcnn(variant, options, inputs, state_dict)
    if "head.weight" not in state_dict:
        model = zoo.create(f"{variant}_dense", **options)
        variables = zoo.load_weights(f"{variant}_dense", dict(state_dict), **options)
        return _named(jax.jit(model.apply)(variables, inputs["image"]))
    options.setdefault("num_classes", state_dict["head.weight"].shape[0])
    options.setdefault("distillation", "dist_head.weight" in state_dict)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    if "teacher_logits" in inputs:
        return _train_step(model, variables, inputs)
    maps = jax.jit(lambda variables, x: model.apply(variables, x, method="features"))(variables, inputs["image"])
    logits = jax.jit(lambda variables, x: model.apply(variables, x, method="classify"))(variables, maps[-1])
    return {"logits": np.asarray(logits), **_named(maps)}


def _named(maps: list[jax.Array]) -> dict[str, np.ndarray]:
    return {f"c{stage + 1}": np.asarray(x) for stage, x in enumerate(maps)}


def _grapher(overrides: Mapping[str, Any], x: np.ndarray, state_dict: Arrays) -> dict[str, np.ndarray]:
    channels = overrides.get("channels", x.shape[-1])
    if x.shape[-1] != channels:
        raise ValueError(f"x has {x.shape[-1]} channels, not {channels}")
    model = mobilevig.Grapher(hop=overrides.get("K", 2))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    variables = names.convert(state_dict, GRAPHER, shapes)
    return {"y": np.asarray(jax.jit(model.apply)(variables, x))}


def _train_step(model: Any, variables: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    targets = inputs["targets"] if "targets" in inputs else inputs["labels"]
    if targets.ndim == 1:
        targets = smooth_labels(jnp.asarray(targets), model.config.num_classes, 0.1)

    @jax.jit
    def step(params):
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            rngs = {"dropout": jax.random.key(0)}
            logits, state = model.apply(given, inputs["image"], train=True, mutable=["batch_stats"], rngs=rngs)
            parts = hard_distillation(*logits, targets, inputs["teacher_logits"])
            return parts.total, (parts, logits, state)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (parts, logits, state) = step(variables["params"])

    def body(*prefixes: str) -> dict[str, Any]:
        return {name: value for name, value in gradient["body"].items() if name.startswith(prefixes)}

    groups = [body("stem_"), body("local_"), body("graph_", "ffn_")]
    groups += [gradient[name] for name in ("embed", "head", "dist_head")]
    norms = [math.sqrt(sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(group))) for group in groups]
    return {
        "head": np.asarray(logits[0]),
        "dist_head": np.asarray(logits[1]),
        "loss": np.asarray(parts.total).reshape(1),
        "loss_base": np.asarray(parts.base).reshape(1),
        "loss_distill": np.asarray(parts.distillation).reshape(1),
        "grad_norms": np.asarray(norms, np.float32),
        "running_var": np.asarray(state["batch_stats"]["embed"]["norm"]["var"]),
    }


def _mask_rcnn(variant: str, options: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    images, regions = inputs["image"], inputs["proposals"]
    if regions.ndim == 2:  # of the only image
        regions = regions[None]
    proposals, found = jax.jit(model.apply)(variables, images, regions)
    flat = {"cls_scores": found[0], "box_deltas": found[1], "mask_logits": found[2]}
    return {
        "rpn_scores": np.asarray(proposals[0]),
        "rpn_deltas": np.asarray(proposals[1]),
        **{name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in flat.items()},
    }

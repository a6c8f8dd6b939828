"""Golden cases of EfficientFormer: classifiers, the dense backbone, single blocks, a training step, and algorithms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import efficientformer
from zoo.papers.efficientformer import search
from zoo.papers.efficientformer.weights import META4D, meta3d
from zoo.train.classification import hard_distillation
from zoo.train.optimizer import adaptive_clip
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant.startswith("algorithm."):
        return _ALGORITHMS[variant](inputs, **overrides)
    if variant in _BLOCKS:
        return _block(variant, overrides, inputs["x"], state_dict)
    return _network(variant, overrides, inputs, state_dict)


def _network(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    images = inputs["image"]
    options = dict(overrides)
    model: Any = zoo.create(variant, **options)
    if isinstance(model, efficientformer.EfficientFormer):  # what the arrays show, where a case does not spell it out
        options.setdefault("num_classes", state_dict["head.weight"].shape[0])
        options.setdefault("distillation", "dist_head.weight" in state_dict)
        if any(name.endswith("attention_biases") for name in state_dict):
            cells = next(array for name, array in state_dict.items() if name.endswith("attention_biases")).shape[1]
            if math.prod(model.config.grid(3)) != cells:
                options.setdefault("image_size", images.shape[1:3])
        model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    if isinstance(model, efficientformer.EfficientFormerDense):
        maps = jax.jit(model.apply)(variables, images)
        return {f"c{stage + 1}": np.asarray(x) for stage, x in enumerate(maps)}
    if "targets" in inputs or "teacher_logits" in inputs:
        return _train_step(model, variables, inputs)
    return {"logits": np.asarray(jax.jit(model.apply)(variables, images))}


def _train_step(model: efficientformer.EfficientFormer, variables: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    params = variables["params"]

    @jax.jit
    def step(params):
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            rngs = {"dropout": jax.random.key(0)}
            logits, state = model.apply(given, inputs["image"], train=True, mutable=["batch_stats"], rngs=rngs)
            parts = hard_distillation(*logits, inputs["targets"], inputs["teacher_logits"])
            return parts.total, (parts, logits, state)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (parts, logits, state) = step(params)

    def trunk(prefix: str) -> dict[str, Any]:
        return {name: value for name, value in gradient["trunk"].items() if name.startswith(prefix)}

    groups = [trunk("stem")]
    for stage in range(4):
        groups += [trunk(f"stage_{stage}_"), trunk(f"down_{stage}")] if stage < 3 else [trunk("stage_3_")]
    groups += [gradient[name] for name in ("norm", "head", "dist_head")]
    norms = [math.sqrt(sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(group))) for group in groups]
    return {
        "head": np.asarray(logits[0]),
        "dist_head": np.asarray(logits[1]),
        "loss": np.asarray(parts.total).reshape(1),
        "loss_base": np.asarray(parts.base).reshape(1),
        "loss_distill": np.asarray(parts.distillation).reshape(1),
        "grad_norms": np.asarray(norms, np.float32),
        "running_var": np.asarray(state["batch_stats"]["trunk"]["stem"]["conv_0"]["norm"]["var"]),
    }


_BLOCKS = ("efficientformer.meta3d", "efficientformer.meta4d")


def _block(variant: str, overrides: Mapping[str, Any], x: np.ndarray, state_dict: Arrays) -> dict[str, np.ndarray]:
    on_tokens = variant.endswith("meta3d")
    sizes: dict[str, Any] = {}
    if on_tokens:
        heads, cells = state_dict["token_mixer.attention_biases"].shape
        value_dim = state_dict["token_mixer.proj.weight"].shape[1] // heads
        sizes = {"heads": heads, "value_dim": value_dim}
        sizes["key_dim"] = (state_dict["token_mixer.qkv.weight"].shape[0] // heads - value_dim) // 2
    sizes["mlp_ratio"] = state_dict["mlp.fc1.weight"].shape[0] // x.shape[-1]
    config = efficientformer.EfficientFormerConfig(**sizes)
    if on_tokens:
        grid = (math.isqrt(cells), cells // math.isqrt(cells))
        model: Any = efficientformer.Meta3D(config, grid)
        arguments: tuple[Any, ...] = (x, grid, False)
    else:
        model, arguments = efficientformer.Meta4D(config), (x, False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments))
    variables = names.convert(state_dict, meta3d() if on_tokens else META4D, shapes)
    return {"y": np.asarray(jax.jit(lambda variables: model.apply(variables, *arguments))(variables))}


def _clip(inputs: Arrays, clip_factor: float = 0.01, eps: float = 1e-3) -> dict[str, np.ndarray]:
    # The cases' arrays have the output axis first, as in PyTorch; ours have it last.
    params = {name: np.moveaxis(x, 0, -1) for name, x in inputs.items() if not name.startswith("g_")}
    gradients = {name: np.moveaxis(inputs[f"g_{name}"], 0, -1) for name in params}
    transformation = adaptive_clip(clip_factor, eps)
    clipped, _ = transformation.update(gradients, transformation.init(params), params)
    return {f"g_{name}": np.moveaxis(np.asarray(x), -1, 0) for name, x in clipped.items()}


def _slimming_step(inputs: Arrays, tau: float = 1.0) -> dict[str, np.ndarray]:
    alpha, stage = inputs["alpha"], inputs["stage"]
    blocks = search.block_importance(alpha, stage)
    stages = search.stage_importance(blocks, stage)
    action = search.best_action(inputs["accuracy_drop"], inputs["latency_saved"])
    return {
        "mix_weights": np.asarray(search.mixing_weights(alpha, inputs["noise"], stage, tau)),
        "block_importance": blocks,
        "stage_importance": stages,
        "least_block": np.array([np.argmin(blocks)], np.float32),
        "least_stage": np.array([np.argmin(stages)], np.float32),
        "action": np.array([action], np.float32),
    }


_ALGORITHMS: dict[str, Any] = {
    "algorithm.adaptive_gradient_clip": _clip,
    "algorithm.latency_slimming_step": _slimming_step,
}

"""Golden cases of EMOv2: classifiers, attention alone, a training step, detectors, segmentation, DEMO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo import registry, weights
from zoo.papers import emov2
from zoo.papers.emov2.weights import ATTENTION

_OPERATORS = {0: "convolution", 1: "remote", 2: "close", 3: "spanning"}
_NORMS = {"bn_2d": "batch", "bn": "batch", "ln_2d": "layer", "ln": "layer"}
_NAMES = {  # the published code's, and ours
    "window_size": "window", "window_sizes": "window", "drop_path": "drop_path_rate", "embed_dims": "widths",
    "exp_ratios": "expansions", "dim_heads": "head_dims", "dw_kss": "kernels", "ls_value": "layer_scale",
    "ls_values": "layer_scale", "hybrid_eops": "operators", "norm_layers": "norms", "act_layers": "activations",
    "img_size": "image_size", "dim_in": "channels", "in_channels": "channels",
}  # fmt: skip


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant.endswith("_attention"):
        return _attention(variant, overrides, inputs, state_dict)
    if variant.startswith("fpn_"):
        variant = f"semantic_{variant}"
    if variant.startswith("demo_"):
        return _demo(variant, overrides, inputs, state_dict)
    image = jnp.asarray(inputs["image"])
    kind = variant.split("_")[0]
    config = registry.model(variant).variant.config
    if kind in ("emo", "emov2"):
        return _classifier(variant, _backbone(config, overrides), inputs, state_dict)
    own = {name: value for name, value in overrides.items() if name in {f.name for f in dataclasses.fields(config)}}
    rest = {name: value for name, value in overrides.items() if name not in own}
    options = own | {"backbone": dataclasses.replace(config.backbone, **_backbone(config.backbone, rest))}
    model, variables = zoo.create(variant, **options), zoo.load_weights(variant, dict(state_dict), **options)
    found = jax.jit(model.apply)(variables, image)
    if isinstance(model, emov2.Segmenter):
        auxiliary = {} if found.auxiliary is None else {"aux_logits": np.asarray(found.auxiliary)}
        return {"logits": np.asarray(found.logits), **auxiliary}
    outputs = {
        "cls_scores": np.concatenate(found.logits, axis=1),
        "bbox_deltas": np.concatenate(found.deltas, axis=1),
        "boxes": np.asarray(
            model.coder.decode(jnp.concatenate(found.anchors), jnp.concatenate(found.deltas, 1), *image.shape[1:3])
        ),
    }
    if "gt_boxes" in inputs:
        losses = jax.jit(model.losses)(found, jnp.asarray(inputs["gt_boxes"]), jnp.asarray(inputs["gt_labels"]))
        outputs |= {"loss_cls": np.asarray(losses[0]), "loss_bbox": np.asarray(losses[1])}
    return outputs


def _backbone(config: emov2.EMOv2Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in overrides.items():
        name = _NAMES.get(name, name)
        many = isinstance(value, list | tuple)
        if name == "window" and many:
            value = value[-1]
        elif name == "layer_scale" and many:
            value = value[0]
        elif name == "operators":
            value = [_OPERATORS[number] for number in (value if many else [value])]
        elif name == "norms":
            value = [_NORMS.get(kind, kind) for kind in value]
        elif name == "image_size" and not many:
            value = (value, value)
        options[name] = tuple(value) if isinstance(value, list) else value
    return options


def _classifier(variant, options, inputs, state_dict) -> dict[str, np.ndarray]:
    model, variables = zoo.create(variant, **options), zoo.load_weights(variant, dict(state_dict), **options)
    image = jnp.asarray(inputs["image"])
    if "labels" in inputs:
        return _training_step(model, variables, image, jnp.asarray(inputs["labels"]))
    maps = jax.jit(lambda v, x: (model.apply(v, x), model.apply(v, x, method="features")))(variables, image)
    return {"logits": np.asarray(maps[0])} | {f"c{i + 1}": np.asarray(x) for i, x in enumerate(maps[1])}


def _training_step(model, variables, image, labels) -> dict[str, np.ndarray]:
    loss = emov2.loss(model)

    @jax.jit
    def step(params, stats):
        def total(params):
            value, (state, _) = loss(
                params, {"batch_stats": stats}, {"image": image, "images": image, "labels": labels},
                {"dropout": jax.random.key(0)}, True,
            )  # fmt: skip
            return value, state["batch_stats"]

        (value, after), gradients = jax.value_and_grad(total, has_aux=True)(params)
        logits = model.apply(
            {"params": params, "batch_stats": stats}, image, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )[0]  # fmt: skip
        return value, after, gradients, logits

    value, after, gradients, logits = step(variables["params"], variables["batch_stats"])
    groups = ["stem", "stage_1", "stage_2", "stage_3", "stage_4", "norm", "head"]
    norms = [
        np.sqrt(sum(float(jnp.sum(leaf**2)) for key in gradients if key.startswith(group)
                    for leaf in jax.tree.leaves(gradients[key])))
        for group in groups
    ]  # fmt: skip
    first = after["stem_0"]["norm"]
    last = after["stage_4_block_0"]["local"]["norm"]
    return {
        "loss": np.asarray(value)[None], "logits": np.asarray(logits), "grad_norms": np.array(norms, np.float32),
        "running_mean": np.asarray(first["mean"]), "running_var": np.asarray(first["var"]),
        "running_mean_s4": np.asarray(last["mean"]), "running_var_s4": np.asarray(last["var"]),
    }  # fmt: skip


def _attention(variant, overrides, inputs, state_dict) -> dict[str, np.ndarray]:
    x = jnp.asarray(inputs["x"])
    operator = variant.split(".")[-1].removesuffix("_attention")
    module = emov2.SpanningAttention(
        overrides.get("dim_mid", state_dict["v.conv.weight"].shape[0]), overrides["dim_head"], overrides["window_size"],
        operator, overrides.get("act", "gelu"), bool(overrides.get("qkv_bias", True)),
    )  # fmt: skip
    return {"y": np.asarray(jax.jit(module.apply)(weights.load(module, {"x": x}, ATTENTION, dict(state_dict)), x))}


def _demo(variant, overrides, inputs, state_dict) -> dict[str, np.ndarray]:
    options = {"window" if name == "window_size" else name: value for name, value in overrides.items()}
    model, variables = zoo.create(variant, **options), zoo.load_weights(variant, dict(state_dict), **options)
    arrays = [jnp.asarray(inputs[name]) for name in ("latent", "t", "y")]
    return {"out": np.asarray(jax.jit(model.apply)(variables, *arrays))}

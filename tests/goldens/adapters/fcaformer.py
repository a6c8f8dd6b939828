"""Golden cases of FcaFormer: classifiers, a stage, the dense backbone, a training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers.fcaformer import FcaFormerConfig, FcaStage, PatchMerging
from zoo.papers.fcaformer.weights import BLOCK, MERGING
from zoo.train.classification import cross_entropy, smooth_labels
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]
_OURS = {"cab_max_d": "cross_depth", "layer_scale_init_value": "layer_scale", "lsf_after_norm": "factors_after_norm"}


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "fcaformer.stage":
        return _stage(overrides, inputs["x"], state_dict)
    options = {_OURS.get(name, name): value for name, value in overrides.items()}
    if "img_size" in options:
        size = options.pop("img_size")
        options["image_size"] = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if "head.weight" in state_dict:
        options.setdefault("num_classes", state_dict["head.weight"].shape[0])
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    if "labels" in inputs:
        return _train_step(model, variables, inputs)
    if "head.weight" in state_dict:
        return {"logits": np.asarray(jax.jit(model.apply)(variables, inputs["image"]))}
    maps = jax.jit(model.apply)(variables, inputs["image"])
    return {f"c{stage + 1}": np.asarray(x) for stage, x in enumerate(maps)}


class _Stage(nn.Module):
    stage: FcaStage
    down: PatchMerging | None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stage(x)
        return x if self.down is None else self.down(x)


def _stage(overrides: Mapping[str, Any], x: np.ndarray, state_dict: Arrays) -> dict[str, np.ndarray]:
    side = overrides["resolution"]
    grid = tuple(side) if isinstance(side, list | tuple) else (side, side)
    config = FcaFormerConfig(
        cross_depth=overrides.get("cab_max_d", 12), factors_after_norm=overrides.get("lsf_after_norm", False)
    )
    if x.shape[-1] != overrides["dim"]:
        raise ValueError(f"x has {x.shape[-1]} channels, not {overrides['dim']}")
    out = overrides.get("out_dim", 0)
    model = _Stage(
        FcaStage(overrides["depth"], overrides["num_heads"], grid, config), PatchMerging(out) if out else None
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    rules = names.under(r"blocks\.(\d+)", "stage/block_{0}", BLOCK) + names.under("downsample", "down", MERGING)
    variables = names.convert(state_dict, rules, shapes)
    return {"y": np.asarray(jax.jit(model.apply)(variables, x))}


def _train_step(model: Any, variables: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    targets = smooth_labels(jnp.asarray(inputs["labels"]), model.config.num_classes, 0.1)

    @jax.jit
    def step(params):
        def loss(params):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            rngs = {"dropout": jax.random.key(0)}
            logits, state = model.apply(given, inputs["image"], train=True, mutable=["batch_stats"], rngs=rngs)
            value = cross_entropy(logits, targets)
            return value, (value, logits, state)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (value, logits, state) = step(variables["params"])
    trunk, head = gradient["trunk"], gradient["head"]

    def body(*prefixes: str) -> dict[str, Any]:
        return {name: value for name, value in trunk.items() if name.startswith(prefixes)}

    def leaves(name: str) -> list[Any]:
        flat = jax.tree_util.tree_leaves_with_path(trunk)
        return [leaf for path, leaf in flat if path[-1].key == name]

    groups = [body("stem_"), *(body(f"stage_{s}", f"down_{s}") for s in range(4)), head["norm"], head["linear"]]
    groups += [leaves(name) for name in ("factors", "cross_bias", "table")]
    norms = [math.sqrt(sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(group))) for group in groups]
    return {
        "logits": np.asarray(logits),
        "loss": np.asarray(value).reshape(1),
        "grad_norms": np.asarray(norms, np.float32),
        "running_var": np.asarray(state["batch_stats"]["trunk"]["stage_2"]["block_0"]["enhance"]["norm"]["var"]),
    }

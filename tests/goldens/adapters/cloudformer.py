"""Golden cases of CloudFormer, a reconstruction: whole networks, a training loss, pooling by segments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import zoo
from zoo.papers import cloudformer

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "cloudformer_segment_mean":
        pool = jax.jit(cloudformer.segment_mean, static_argnums=2)
        return {"segments": np.asarray(pool(inputs["x"], inputs["length"], overrides["segments"]))}
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    length = inputs.get("length")
    out = jax.jit(model.apply)(variables, inputs["x"], length)
    named = {name: np.asarray(value) for name, value in out.items()}
    if "target" in inputs:
        batch = {
            "x": inputs["x"],
            "length": np.full(len(inputs["x"]), inputs["x"].shape[1], np.int32) if length is None else length,
            "performance": inputs["target"],
        }
        function = cloudformer.loss(model)
        value, gradient = jax.jit(
            jax.value_and_grad(lambda params: function(params, {}, batch, {}, train=False)[0])
        )(variables["params"])  # fmt: skip
        groups: dict[str, list[jax.Array]] = {}
        for name, tree in gradient.items():
            groups.setdefault("head" if name.startswith("head") else name, []).extend(jax.tree.leaves(tree))
        norms = [math.sqrt(sum(float((leaf**2).sum()) for leaf in groups[name])) for name in sorted(groups)]
        named |= {"loss": np.asarray(value).reshape(1), "grad_norms": np.asarray(norms, np.float32)}
    return named

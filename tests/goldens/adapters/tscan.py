"""Golden cases of TSCAN: networks of both chains or one, and tables of positions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

import zoo
from zoo.papers import tscan

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "tscan_positional":
        tables = {width: tscan.positions(200, width) for width in range(1, 201)}
        return {f"pe_{length}_{width}": table[:length] for width, table in tables.items() for length in range(1, 201)}
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    out = jax.jit(partial(model.apply, return_attention=True))(variables, inputs["x"])
    named = {name: np.asarray(out[name]) for name in ("features", "logits", "prob")}
    for stream, blocks in out["attention"].items():
        for index, block in enumerate(blocks):
            # The published number of a decoder; 0 is the encoder, which has no cross-attention.
            named[f"{stream}_attention_{index}"] = np.asarray(block.get("cross", block["self"]))
            named[f"{stream}_self_attention_{index}"] = np.asarray(block["self"])
    return named

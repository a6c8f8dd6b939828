"""Golden cases of POGAT, of this project's reconstruction: the network with its losses, and hard replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoo
from zoo.data.hetero_graphs import hard_replace
from zoo.papers import pogat

Arrays = Mapping[str, np.ndarray]
_OURS = {"d": "features", "ff": "mlp_features", "att": "merge_features", "in_dims": "in_features",
         "lam_node": "node_weight", "lam_graph": "graph_weight"}  # fmt: skip
_GROUPS = ("classify", "graph_disc", "merge_query", "merge_hidden", "layers", "node_disc", "project")


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "pogat_hard_replace":
        arrays = (inputs["pool"], inputs["feat"], inputs["forbidden"])
        return {"neg": hard_replace(inputs["sub"], int(overrides["slot"]), *arrays)}
    options = {_OURS.get(name, name): value for name, value in overrides.items()}
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    features = tuple(inputs[f"feat_{kind}"] for kind in range(len(model.config.in_features)))
    graph = {"features": features, "sub": inputs["sub"], "relation": inputs["relation"]}
    out = jax.jit(lambda variables: model.apply(variables, **graph, maps=True))(variables)
    found = {
        "subgraph_nodes": out.slots,
        "embedding": out.embedding,
        "inter_weight": out.merge_weights,
        "logits": out.logits,
        "node_logit": out.node_logits,
        "graph_logit": out.graph_logits,
        **{f"attention_{layer}": weights for layer, weights in enumerate(out.attention)},
    }
    if "neg" in inputs:
        found |= _losses(model, variables, graph, inputs)
    return {name: np.asarray(value) for name, value in found.items()}


def _losses(model: Any, variables: Any, graph: dict[str, Any], inputs: Arrays) -> dict[str, Any]:
    batch = {**graph, **{name: jnp.asarray(inputs[name]) for name in ("neg", "labels", "train_index")}}
    batch["changed"] = inputs["changed"].astype(bool) if "changed" in inputs else inputs["neg"] != inputs["sub"]

    @jax.jit
    def run(params: Any) -> Any:
        def total(params: Any) -> Any:
            found = pogat.pogat_loss(model, params, batch, {}, train=False)
            return found.total, found

        return jax.grad(total, has_aux=True)(params)

    gradient, losses = run(nn.meta.unbox(variables["params"]))
    groups = [[part for name, part in gradient.items() if name.startswith(group)] for group in _GROUPS]
    return {"losses": jnp.stack(losses), "grad_norms": jnp.stack([optax.global_norm(group) for group in groups])}

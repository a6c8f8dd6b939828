"""Golden cases of DrugGEN: generator, critic, attention alone, and the losses of WGAN-GP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoo
from zoo.papers import druggen
from zoo.papers.druggen import DrugGENConfig, Graphs
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]
_OURS = {"act": "activation", "vertexes": "vertices", "nodes": "node_types", "edges": "edge_types", "dim": "features"}


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    options = {_OURS.get(name, name): value for name, value in overrides.items()}
    # Weight of the penalty, no property of a network.
    penalty = float(options.pop("lambda_gp", 10.0))
    if variant == "druggen_attention":
        return _attention(options, inputs, state_dict)
    if variant == "druggen_generator":
        variables = zoo.load_weights("druggen_akt1", dict(state_dict), **options)
        model = zoo.create("druggen_akt1", **options)
        nodes, edges = jax.jit(model.apply)(variables, inputs["node"], inputs["edge"])
        return {"node_sample": np.asarray(nodes), "edge_sample": np.asarray(edges)}
    if variant != "druggen_discriminator":
        raise ValueError(f"unknown variant {variant!r}")
    model = zoo.create("druggen_akt1_critic", **options)
    variables = zoo.load_weights("druggen_akt1_critic", dict(state_dict), **options)
    judge = jax.jit(model.apply)
    found = {}
    for name, prefixes in {"logit_real": ("", "real_"), "logit_fake": ("fake_",)}.items():
        for prefix in prefixes:
            if f"{prefix}node" in inputs:
                found[name] = np.asarray(judge(variables, inputs[f"{prefix}node"], inputs[f"{prefix}edge"]))
    if "eps_node" in inputs:
        found |= _losses(model, variables, inputs, penalty)
    return found


def _attention(options: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, np.ndarray]:
    width = options.get("features", inputs["node"].shape[-1])
    model = druggen.EdgeAttention(DrugGENConfig(features=width, heads=options.get("heads", 8)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs["node"], inputs["edge"]))
    variables = names.convert(state_dict, druggen.ATTENTION, shapes)
    nodes, edges = jax.jit(model.apply)(variables, inputs["node"], inputs["edge"])
    return {"node_out": np.asarray(nodes), "edge_out": np.asarray(edges)}


def _losses(model: Any, variables: Any, inputs: Arrays, penalty: float) -> dict[str, np.ndarray]:
    real, fake = (
        Graphs(jnp.asarray(inputs[f"{kind}_node"]), jnp.asarray(inputs[f"{kind}_edge"])) for kind in ("real", "fake")
    )
    factors = jnp.asarray(inputs["eps_node"]), jnp.asarray(inputs["eps_edge"])

    def judge(params: Any) -> Any:
        return lambda nodes, edges: model.apply({"params": params}, nodes, edges)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            return druggen.critic_loss(judge(params), real, fake, factors, penalty)

        return jax.value_and_grad(loss, has_aux=True)(params), druggen.generator_loss(judge(params), fake)

    ((d_loss, parts), gradient), g_loss = run(nn.meta.unbox(variables["params"]))
    published = names.to_published({"params": gradient}, druggen.critic_rules(model.config))
    return {
        "d_loss": np.reshape(d_loss, 1),
        "g_loss": np.reshape(g_loss, 1),
        "gradient_penalty": np.reshape(parts["gradient_penalty"], 1),
        "grad_norm": np.reshape(optax.global_norm(gradient), 1),
        **{f"grad_{name.replace('.', '_')}": value for name, value in published.items()},
    }

"""Golden cases: logits and greedy continuations, losses with injected noise, graph layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoo
from tests.goldens.runner import Prefix
from zoo.backbones.graph_gpt.model import Graph, GraphGPTConfig, spread
from zoo.papers import protein_gpt
from zoo.weights.names import convert

_FIELDS = {
    "dim": "features", "depth": "depth", "heads": "heads", "dim_head": "head_features", "ff_mult": "mlp_ratio",
    "embed_dim": "embedding", "max_tokens": "tokens", "logits_dim": "logits", "GNN_layers": "graph_layers",
    "GNN_have_skip": "graph_skip", "GNN_add_identity": "graph_identity", "GNN_clamp_att_after_identity": "graph_clamp",
    "GNN_att_threshold_min": "threshold_min", "GNN_att_threshold_max": "threshold_max", "dropout": "dropout",
    "use_null_kv": "null_key", "one_kv_head": "one_kv_head", "concat_pos_encoding": "concat_positions",
    "FF_conv_kernel": "mlp_kernel", "FF_inner_conv_kernel": "mlp_inner_kernel", "FF_glu": "mlp_gated",
}  # fmt: skip
_MODULES = ("attn", "ff", "final_norm", "gnn", "init_norm", "to_dim", "to_logits", "token_embed")
_PLACES = {"norm_out": "final_norm", "norm_in": "init_norm", "widen": "to_dim", "head": "to_logits",
           "embed": "token_embed"}  # fmt: skip
_STEPS, _PROMPT = 12, 16  # of the greedy continuation
_TASK_END, _SHARE = 62, 0.15  # of the losses


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "protein_gpt_graph_layers":
        return _graph_layers(overrides, inputs, state_dict)
    options = {ours: overrides[name] for name, ours in _FIELDS.items() if name in overrides}
    wide = "pos_fourier_graph_dim" if overrides.get("concat_pos_encoding") else "embed_dim"
    if wide in overrides:
        options["position_features"] = overrides[wide]
    base = variant if variant in zoo.list_models() else "protein_gpt_v4031"
    model = zoo.create(base, **options)
    variables = zoo.load_weights(base, dict(state_dict), **options)
    tokens = jnp.asarray(inputs["tokens"], jnp.int32)
    if "noise_token_mask" in inputs:
        return _losses(model, variables, tokens, overrides, inputs)
    outputs: dict[str, Any] = {"logits": np.asarray(jax.jit(model.apply)(variables, tokens))}
    if not (model.config.mlp_kernel or model.config.mlp_inner_kernel):
        rows = protein_gpt.generate(model, variables, np.asarray(tokens)[:, :_PROMPT], 2 * _STEPS, greedy=True)
        outputs["greedy"] = Prefix(np.stack(rows), 1)
    return outputs


def _losses(model, variables, tokens, overrides, inputs) -> dict[str, np.ndarray]:
    end = overrides.get("task_end_token", _TASK_END)
    noise = {"tokens": jnp.asarray(inputs["noise_token_mask"]), "keys": jnp.asarray(inputs["noise_key_mask"])}

    @jax.jit
    def plain(variables):
        def value(**options):
            return protein_gpt.lm_loss(model, variables, tokens, **options)

        return value(), value(task_end_token=end), value(task_end_token=end, ignore_padding=True)

    @jax.jit
    def masked(variables):
        return jax.value_and_grad(
            lambda variables: protein_gpt.lm_loss(
                model, variables, tokens, task_end_token=end, mask_token_prob=_SHARE, mask_prob=_SHARE, noise=noise
            )
        )(variables)

    every, task_end, padded = plain(variables)
    value, gradient = masked(variables)
    groups: dict[str, list[Any]] = {name: [] for name in _MODULES}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["params"]):
        names = [key.key for key in path]
        if names[0].startswith("attention_"):
            group = "gnn" if names[1] == "graph" else "attn"
        else:
            group = "ff" if names[0].startswith("mlp_") else _PLACES.get(names[0], "unused")
        groups.setdefault(group, []).append(leaf)
    return {
        "loss_all": np.asarray(every)[None],
        "loss_task_end": np.asarray(task_end)[None],
        "loss_task_end_ignore_pad": np.asarray(padded)[None],
        "loss_masked": np.asarray(value)[None],
        "grad_norms": np.asarray([optax.global_norm(groups[name]) for name in _MODULES]),
    }


def _graph_layers(overrides, inputs, state_dict) -> dict[str, np.ndarray]:
    """The batch's heads are its batch here."""
    value, links = jnp.asarray(inputs["v"])[:, :, None], jnp.asarray(inputs["adjacency"])[:, None]
    config = GraphGPTConfig(
        head_features=value.shape[-1], graph_layers=overrides.get("layers", 3), graph_skip=overrides.get("skip", True)
    )
    graph = Graph(config)

    def hop(_, nodes):
        return spread(links, nodes)

    target = jax.eval_shape(lambda key: graph.init(key, value, hop, False), jax.random.key(0))
    variables = convert(state_dict, protein_gpt.graph_rules(), target)
    return {"out": np.asarray(graph.apply(variables, value, hop, False))[:, :, 0]}

"""Golden cases of Miras: the framework's pairs, earlier models as instances of it, and language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.mixers.recurrent import unit_length
from zoo.papers.miras import framework_scan, miras_instance

# As the shared cases list them.
PAIRS = (
    *((bias, "l2", "gd") for bias in ("dot", "huber_coord", "huber_l2", "huber_mix", "l2", "lp", "robust")),
    *(("l2", name, "gd") for name in ("none", "lq", "kl", "elastic", "elastic_ftrl", "bregman_sigmoid")),
    ("l2", "l2", "mom"),
    ("huber_mix", "kl", "mom"),
)


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "miras_framework":
        return _framework(inputs, **overrides)
    if variant == "miras_instances":
        return _instances(inputs)
    model = zoo.create(variant, **overrides)
    variables = zoo.load_weights(variant, dict(state_dict), **overrides)
    logits, _ = jax.jit(model.apply)(variables, inputs["tokens"])
    return {"logits": np.asarray(logits)}


def _framework(inputs: Mapping[str, np.ndarray], mu: float = 0.5, **options: float) -> dict[str, np.ndarray]:
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
    query, key = unit_length(arrays["q"]), unit_length(arrays["k"])
    eta, alpha = 0.1 * jax.nn.sigmoid(arrays["eta_logit"]), jax.nn.sigmoid(arrays["alpha_logit"] + 3)
    weights = arrays["w0"] / np.sqrt(key.shape[-1])

    def run(bias: str, retention: str, algorithm: str) -> tuple[jax.Array, jax.Array]:
        first = {"kl": jax.nn.softmax, "f_divergence": jax.nn.softmax, "bregman_sigmoid": jax.nn.sigmoid}
        memory = first.get(retention, lambda w: w)(weights)
        momentum = mu if algorithm == "mom" else None
        return framework_scan(
            bias, retention, query, key, arrays["v"], eta, alpha, memory, momentum=momentum, **options
        )

    found = {}
    for pair in PAIRS:
        y, w = run(*pair)
        found |= {f"y.{'.'.join(pair)}": y, f"w.{'.'.join(pair)}": w}
    return {name: np.asarray(value) for name, value in found.items()}


def _instances(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name: jnp.asarray(array) for name, array in inputs.items()}
    query, key = unit_length(arrays["q"]), unit_length(arrays["k"])
    batch, _, heads, width = query.shape

    def rows(x: jax.Array) -> jax.Array:
        """(batch, time, heads, ...) to (batch * heads, time, ...)."""
        x = x.swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def run(name: str, **gates: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, w = miras_instance(name)(rows(query) * width**-0.5, rows(key), rows(arrays["v"]), **gates)
        y = y.reshape(batch, heads, *y.shape[1:]).swapaxes(1, 2)
        return y, w.reshape(batch, heads, *w.shape[1:]).swapaxes(2, 3)

    beta = rows(jax.nn.sigmoid(arrays["beta_logit"]))
    keep = rows(jax.nn.sigmoid(arrays["g_logit"] + 2))
    found = {
        "delta": run("deltanet", eta=beta),
        "gated_delta": run("gated_deltanet", eta=beta, alpha=keep),
        "scalar_gate": run("mamba2", alpha=keep),
        "linear_attention": run("linear_attention"),
        "retnet": run("retnet", alpha=jnp.tile(1 - 2.0 ** (-5 - jnp.arange(heads)), batch)),
    }
    outputs = {f"{name}.y": y for name, (y, _) in found.items()} | {f"{name}.s": s for name, (_, s) in found.items()}
    return {name: np.asarray(value) for name, value in outputs.items()}

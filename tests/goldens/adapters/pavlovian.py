"""Golden cases of the rules of learning, conditioning, capacity and reliability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.papers import pavlovian


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    return {
        "pavlovian_rules": _rules,
        "pavlovian_conditioning": _conditioning,
        "pavlovian_capacity": _capacity,
        "pavlovian_reliability": _reliability,
    }[variant](dict(overrides), inputs)


def _unit(x: np.ndarray) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-6)


def _rules(overrides, inputs) -> dict[str, np.ndarray]:
    query, key = (_unit(inputs[name])[:, :, None] for name in ("q", "k"))
    value = inputs["v"][:, :, None] / inputs["v"].shape[-1] ** 0.5
    beta = jax.nn.sigmoid(inputs["beta_logit"])[..., None]
    gamma = jax.nn.sigmoid(inputs["gamma_logit"] + 3)[..., None]
    options = {
        "trace_decay": overrides.get("trace_lambda", 0.8),
        "threshold_rate": overrides.get("bcm_tau", 0.2),
    }
    outputs = {}
    for rule in pavlovian.RULES:
        y, state = pavlovian.learning_rule(rule, query, key, value, beta, gamma, **options)
        outputs[f"{rule}.y"] = np.asarray(y[:, :, 0])
        outputs[f"{rule}.s"] = np.asarray(state.memory[:, 0].swapaxes(1, 2))
    return outputs


def _conditioning(overrides, inputs) -> dict[str, np.ndarray]:
    stimuli, outcome = np.asarray(inputs["cs"]), np.asarray(inputs["us"])
    if overrides.get("orthogonal_cs", False):
        stimuli = np.linalg.qr(stimuli.T)[0].T
    else:
        stimuli = stimuli / np.linalg.norm(stimuli, axis=1, keepdims=True)
    outcome = outcome / np.linalg.norm(outcome)
    options = {name: overrides[name] for name in ("beta", "gamma", "trials_per_phase") if name in overrides}
    return {
        f"{protocol}.{rule}": np.asarray(curve)
        for rule in pavlovian.RULES
        for protocol, curve in pavlovian.run_protocols(
            rule, jnp.asarray(stimuli), jnp.asarray(outcome), **options
        ).items()
    }


def _capacity(overrides, inputs) -> dict[str, np.ndarray]:
    curve = pavlovian.capacity_curve(jnp.asarray(inputs["k"]), jnp.asarray(inputs["v"]), overrides["sizes"])
    return {name: np.asarray(values) for name, values in curve._asdict().items()}


def _reliability(overrides, inputs) -> dict[str, np.ndarray]:
    layers, heads, failure = (overrides[name] for name in ("layers", "heads", "p"))
    outputs = {mode: pavlovian.reliability(layers, heads, failure, mode) for mode in ("single", "any_head", "majority")}
    outputs["heads_needed"] = pavlovian.heads_needed(layers, failure, overrides["delta"])
    return {name: np.array([value]) for name, value in outputs.items()}

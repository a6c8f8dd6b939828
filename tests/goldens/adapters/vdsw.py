"""Golden cases of v-DSW: sliced costs, the distribution, the directions, the ascent, both players, the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from zoo.papers import vdsw
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    run = {
        "sliced_wasserstein": _sliced,
        "von_mises_fisher": _distribution,
        "amortized_models": _directions,
        "max_sliced_wasserstein": _ascent,
        "amortized_vdsw": _players,
        "pointnet_ae": _autoencoder,
    }[variant]
    found = run(overrides, arrays, state_dict)
    return {name: np.asarray(value) for name, value in found.items()}


def _sliced(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    x, y, p = inputs["x"], inputs["y"], overrides.get("p", 2)
    theta = vdsw.unit(inputs["theta"])
    costs = vdsw.sliced_costs(x, y, theta, p)
    gradients = jax.jit(
        jax.grad(lambda x, y, theta: vdsw.sliced_wasserstein(x, y, theta, p).mean(), argnums=(0, 1, 2))
    )(x, y, theta)
    outputs = {
        "sw_sum": costs.mean(1),
        "second_moment": jnp.square(costs).mean(1),
        "pot_mean": vdsw.sliced_wasserstein(x, y, theta, p, "mean"),
        **dict(zip(("grad_x", "grad_y", "grad_theta"), gradients, strict=True)),
    }
    if "z" in inputs:
        outputs["pot_uneven_mean"] = vdsw.sliced_wasserstein(x, inputs["z"], theta, p, "mean")
    return outputs


def _distribution(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    loc, points = vdsw.unit(inputs["loc"]), vdsw.unit(inputs["pts"])
    kappa = float(overrides["kappa"])
    found = vdsw.VonMisesFisher(loc, kappa)
    outputs = {"log_prob": found.log_prob(points), "mean": found.mean(), "entropy": found.entropy()}
    if loc.shape[-1] == 3:

        def samples(loc: jax.Array) -> jax.Array:
            return vdsw.VonMisesFisher(loc, kappa).from_noise(inputs["u"], inputs["v"])

        outputs["samples"] = samples(loc)
        outputs["grad_loc"] = jax.grad(lambda loc: jnp.sum(inputs["g"] * samples(loc)))(loc)
    return outputs


def _config(kind: Any, overrides: Mapping[str, Any], x: jax.Array, **options: Any) -> vdsw.AmortizedConfig:
    return vdsw.AmortizedConfig(
        kind=kind,
        points=x.shape[1],
        dim=x.shape[2],
        key_dim=overrides.get("key_dim", 64),
        proj_dim=overrides.get("proj_dim", 64),
        sharing=overrides.get("sharing", False),
        **options,
    )


def _load(config: vdsw.AmortizedConfig, x: jax.Array, y: jax.Array, state: Arrays) -> tuple[Any, Any]:
    model = vdsw.AmortizedDirection(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, y))
    return model, names.convert(state, vdsw.direction_rules(config), shapes)


def _directions(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    x, y, outputs = inputs["x"], inputs["y"], {}
    for kind in sorted({name.split(".", 1)[0] for name in state}):
        own = {name.split(".", 1)[1]: value for name, value in state.items() if name.split(".", 1)[0] == kind}
        model, variables = _load(_config(kind, overrides, x), x, y, own)
        outputs[kind] = jax.jit(model.apply)(variables, x, y)
    return outputs


def _ascent(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    found = vdsw.max_sliced_wasserstein(
        inputs["x"], inputs["y"], start=inputs["theta"][:, 0], steps=overrides.get("steps", 50),
        lr=overrides.get("lr", 1e-4), optimizer=overrides.get("optimizer", "adam"),
    )  # fmt: skip
    return {"loss": found.cost, "theta": found.theta, "trace": found.trace}


def _players(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    x, y, kappa = inputs["x"], inputs["y"], float(overrides.get("kappa", 1.0))
    config = _config(overrides.get("model", "lin_attn"), overrides, x, kappa=kappa)
    model, variables = _load(config, x, y, state)

    def cost(params: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        location = model.apply({"params": params}, x, jax.lax.stop_gradient(y))
        return along(location, y), location

    def along(location: jax.Array, y: jax.Array) -> jax.Array:
        theta = vdsw.VonMisesFisher(location, kappa).from_noise(inputs["u"], inputs["v"])
        return vdsw.sliced_wasserstein(x, y, jnp.moveaxis(theta, 0, 1)).mean()

    (value, location), gradient = jax.value_and_grad(cost, has_aux=True)(variables["params"], y)
    published = names.to_published({"params": gradient}, vdsw.direction_rules(config))
    order = [name for name in state if name in published]
    return {
        "loss": value.reshape(1),
        "loc": location,
        "grad_y": jax.grad(lambda y: along(location, y))(y),
        "grad_norms": np.array([np.linalg.norm(published[name]) for name in order], np.float32),
    }


def _autoencoder(overrides: Mapping[str, Any], inputs: dict[str, jax.Array], state: Arrays) -> dict[str, Any]:
    points = state["decoder.fc3.weight"].shape[0] // 3
    widths = tuple(
        value.shape[0] for name, value in state.items() if name.startswith("encoder.mlp") and value.ndim == 3
    )
    options = {
        "points": points, "code": state["encoder.fc_mu.weight"].shape[0], "widths": widths,
        "hidden": state["decoder.fc1.weight"].shape[0],
    }  # fmt: skip
    model = zoo.create("pointnet_ae", **options)
    variables = zoo.load_weights("pointnet_ae", dict(state), **options)
    code, cloud = jax.jit(model.apply)(variables, inputs["x"])
    return {"latent": code, "reconstruction": cloud}

"""Golden cases of CAPE: block, networks, curriculum, training loss, scores, and the solvers of the equations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from tests.goldens.runner import Prefix
from zoo.data import pde
from zoo.papers import cape
from zoo.weights import names

Arrays = Mapping[str, np.ndarray]


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "cape_curriculum":
        return _curriculum(overrides, inputs["epoch"])
    if variant == "cape_metrics":
        return _metrics(inputs)
    if variant == "pde_advection":
        return _advection(overrides, inputs)
    if variant == "pde_burgers":
        return _burgers(overrides, inputs)
    if variant == "pde_ns2d":
        return _ns2d(overrides, inputs["initial"])
    if variant.startswith("cape_block"):
        return _block(inputs, state_dict, int(overrides.get("kernel_size", 5)))
    return _model(variant, overrides, inputs, state_dict)


def _block_options(state: Arrays, grid: tuple[int, ...], kernel_size: int) -> dict[str, Any]:
    return {
        "grid": grid,
        "kernel_size": kernel_size,
        "widening": state["CNN_1.weight"].shape[0],
        "channels": state["CNN_0.weight"].shape[1],
        "embeddings": state["CNN_2.weight"].shape[0] // state["CNN_0.weight"].shape[1],
        "parameters": state["fc0a.weight"].shape[1],
        "block_modes": tuple(state["CNN_SC.weights1"].shape[2 : 2 + len(grid)]),
    }


def _block(inputs: Arrays, state: Arrays, kernel_size: int) -> dict[str, Any]:
    grid = inputs["u"].shape[1:-1]
    config = cape.CAPEConfig(**_block_options(state, grid, kernel_size), modes=(1,) * len(grid))
    block = cape.CAPEBlock(config)
    arguments = jnp.asarray(inputs["u"]), jnp.asarray(inputs["params"])
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), *arguments))
    variables = names.convert(state, cape.block_rules(config), shapes)
    return {"y": np.asarray(jax.jit(block.apply)(variables, *arguments))}


def _options(overrides: Mapping[str, Any], inputs: Arrays, state: Arrays, width: int) -> dict[str, Any]:
    """The config's fields, from the shapes of what the case brings."""
    frame = inputs["u"] if "u" in inputs else inputs["solution"][:, 0]
    grid = frame.shape[1:-1]
    options: dict[str, Any] = {"grid": grid, "channels": frame.shape[-1], "parameters": inputs["params"].shape[-1]}
    block = {key.removeprefix("PrmEmb_Pre.0."): value for key, value in state.items() if key.startswith("PrmEmb_Pre")}
    if block:
        options |= _block_options(block, grid, int(overrides.get("kernel_size", 5)))
    core = {key.removeprefix("model."): value for key, value in state.items()}
    if "fc0.weight" in core:
        options["width"] = core["fc0.weight"].shape[0]
        options["modes"] = tuple(core["conv0.weights1"].shape[2 : 2 + len(grid)])
    else:
        options["width"] = core["encoder1.enc1conv1.weight"].shape[0] if core else overrides.get("width", width)
    return options


def _model(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state: Arrays) -> dict[str, Any]:
    options = _options(overrides, inputs, state, 32)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state), **options)
    parameters = jnp.asarray(inputs["params"])
    if "solution" in inputs:
        return _training(model, variables, overrides, jnp.asarray(inputs["solution"]), parameters)
    grid = jnp.asarray(inputs["grid"]) if "grid" in inputs else None
    following, intermediate = jax.jit(model.apply)(variables, inputs["u"], parameters, grid)
    outputs = {"next": following, "intermediate": intermediate}
    return {name: np.asarray(value) for name, value in outputs.items() if value is not None}


def _training(model, variables, overrides: Mapping[str, Any], solution, parameters) -> dict[str, Any]:
    solution = solution[:, : overrides.get("t_train", solution.shape[1])]
    epochs, warmup = overrides.get("epochs", 100), overrides.get("warmup", 3)
    border = int(cape.curriculum_steps(overrides["epoch"], epochs, warmup, solution.shape[1]))
    state = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def step(params):
        def loss(params):
            found = cape.rollout_loss(
                model, params, state, solution, parameters, border,
                coefficient=overrides.get("embed_coef"), noise=0.0, train=bool(state),
            )  # fmt: skip
            return found.total, found

        return jax.grad(loss, has_aux=True)(params)

    gradient, found = step(variables["params"])
    table = cape.rules(model.config)
    published = names.to_published(
        {"params": gradient}, [rule for rule in table if "batch_stats" not in str(rule.path)]
    )
    groups: dict[str, float] = {}
    for name, value in published.items():
        group = name if name.startswith("mix_emb") else name.rsplit(".", 1)[0]
        groups[group] = groups.get(group, 0.0) + float(np.sum(np.square(value, dtype=np.float64)))
    norms = [math.sqrt(groups[group]) for group in sorted(groups)]
    return {
        "loss": np.asarray(found.total).reshape(1),
        "embed_loss": np.asarray(found.intermediate).reshape(1),
        "full_l2": np.asarray(cape.relative_l2(found.prediction, solution)).reshape(1),
        "pred": np.asarray(found.prediction),
        "grad_norms": np.asarray(norms, np.float32),
    }


def _curriculum(overrides: Mapping[str, Any], epoch: np.ndarray) -> dict[str, Any]:
    options = {"slope": overrides["slope"]} if "slope" in overrides else {}
    return {
        f"t_ar_{frames}": cape.curriculum_steps(
            epoch, overrides.get("epochs", 100), overrides.get("warmup", 3), frames, **options
        ).astype(np.float32)
        for frames in range(2, 202)
    }


def _metrics(inputs: Arrays) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for suffix, ours in (("", "scores_1d"), ("2d", "scores_2d")):
        if f"pred{suffix}" in inputs:
            pair = (jnp.moveaxis(inputs[f"{name}{suffix}"], -2, 1) for name in ("pred", "target"))
            outputs[ours] = np.stack([np.asarray(score) for score in jax.tree.leaves(cape.pde_metrics(*pair))])
    if "u" in inputs:
        for equation in ("advection", "burgers"):
            value = cape.pino_residual(jnp.asarray(inputs["u"]), inputs["params"], equation, as_published=True)
            outputs[f"pino_{equation}"] = np.asarray(value).reshape(1)
    return outputs


def _frames(overrides: Mapping[str, Any], duration: float = 2.0) -> int:
    return round(duration / overrides["dt_save"])


def _substeps(overrides: Mapping[str, Any], sample: int) -> int:
    given = overrides["substeps"]
    return int(given if np.ndim(given) == 0 else given[sample])


def _waves(inputs: Arrays) -> pde.Waves:
    mode, amplitude, phase = (np.asarray(inputs[name], np.float64) for name in ("mode", "amp", "phase"))
    if "mean" in inputs:  # as a wave of wavenumber 0
        mean = np.asarray(inputs["mean"], np.float64)[:, None]
        mode, amplitude, phase = (
            np.concatenate([array, column], 1)
            for array, column in ((mode, 0 * mean), (amplitude, mean), (phase, 0 * mean + np.pi / 2))
        )
    return pde.Waves(2 * np.pi * mode, amplitude, phase)


def _advection(overrides: Mapping[str, Any], inputs: Arrays) -> dict[str, Any]:
    waves, beta = _waves(inputs), np.asarray(inputs["beta"])
    x, frames, interval = pde.centres(overrides["nx"]), _frames(overrides), overrides["dt_save"]
    u0 = jnp.asarray(waves(x), jnp.float32)
    found = [
        pde.solve_advection(
            u0[index : index + 1], beta[index : index + 1], frames=frames, interval=interval,
            substeps=_substeps(overrides, index),
        )
        for index in range(len(beta))
    ]  # fmt: skip
    exact = pde.advection_exact(waves, beta, x, interval * np.arange(frames + 1))
    return {"exact": Prefix(exact, axis=1), "muscl": Prefix(np.concatenate(found), axis=1)}


def _burgers(overrides: Mapping[str, Any], inputs: Arrays) -> dict[str, Any]:
    waves, nu = _waves(inputs), np.asarray(inputs["nu"])
    x, frames, interval = pde.centres(overrides["nx"]), _frames(overrides), overrides["dt_save"]
    u0 = jnp.asarray(waves(x), jnp.float32)
    found = [
        pde.solve_burgers(
            u0[index : index + 1], nu[index : index + 1], frames=frames, interval=interval,
            substeps=_substeps(overrides, index),
        )
        for index in range(len(nu))
    ]  # fmt: skip
    exact = pde.burgers_cole_hopf(waves, nu, x, interval * np.arange(frames + 1))
    return {"exact": Prefix(exact, axis=1), "muscl": Prefix(np.concatenate(found), axis=1)}


def _ns2d(overrides: Mapping[str, Any], initial: np.ndarray) -> dict[str, Any]:
    # A case with a side of its own is the vortex: one frame at t = 2, and its translation. Others are from 0 on.
    length, interval = float(overrides.get("length", 1.0)), overrides["dt_save"]
    vortex = "length" in overrides
    fields = pde.solve_ns2d(
        jnp.asarray(initial)[None], overrides.get("eta", 0.0), overrides.get("zeta", 0.0),
        frames=_frames(overrides, 2.0 if vortex else 20 * interval), interval=interval,
        substeps=_substeps(overrides, 0), length=length, viscous_substeps=overrides.get("visc_substeps", 1),
        gamma=float(Fraction(str(overrides.get("gamma", "5/3")))),
    )[0]  # fmt: skip
    if not vortex:
        return {"solution": Prefix(np.asarray(fields), axis=0)}
    flow = np.asarray(initial, np.float64)[..., 1:3].mean((0, 1))
    exact = pde.translated(np.asarray(initial, np.float64), 2.0 * flow, length)
    return {"solution": np.asarray(fields[-1]), "exact": exact}

"""Solvers that are told the equation's parameters beside those that are not, the curriculum, and what it all costs.

    python -m experiments.cape --preset cpu
    python -m experiments.cape --preset paper --data-dir DIR_OF_PDEBENCH_FILES

Guidance: Fourier operators (and U-Nets) with the block, with the parameters as constant channels, without them, and
with the equation's residual in the loss, at the same number of parameters, on advection; roll-outs at seen and unseen
speeds. Curriculum: the same solver under teacher forcing, auto-regression and the curriculum, on Burgers' equation.
Plane: compressible flow. Cost: parameters, time a step, and the numerical solver's time.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import zoo
from experiments import command_line
from zoo import registry, reports, timing, train
from zoo.data import pde
from zoo.papers import cape

ClaimName = Literal["guidance", "curriculum", "plane", "cost"]
Schedule = Literal["curriculum", "teacher forcing", "auto-regressive"]
FILES = {
    "advection": "1D_Advection_Sols_beta{0:g}.hdf5",
    "burgers": "1D_Burgers_Sols_Nu{0:g}.hdf5",
    "flow": "2D_CFD_Rand_M{0:g}_Eta{1:g}_Zeta{2:g}_periodic_128_Train.hdf5",
}
# Twins of the models at (nearly) the same number of parameters, as published: wider without the block.
TWINS = {
    "CAPE": "cape_{core}_{dims}d", "conditional": "conditional_{core}_{dims}d", "plain": "{core}_{dims}d",
    "PINO": "{core}_{dims}d",
}  # fmt: skip
_TWIN_CELLS = 128  # on which they are twins within a ninth; on fewer the block is smaller


@dataclasses.dataclass(frozen=True)
class Training:
    """How solvers are trained, every one alike."""

    # Passes over the trajectories, of which the first ones warm the block up (solvers without it train in them too).
    epochs: int = 100
    warmup: int = 3
    # Trajectories an update.
    batch_size: int = 50
    # Of Adam, halved each `decay_epochs` after the warm-up; weight decay is added to the gradient.
    learning_rate: float = 3e-3
    decay_epochs: int = 20
    weight_decay: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """Which claims to measure, and how."""

    # The folder of PDEBench's files; None solves the equations here.
    data_dir: pathlib.Path | None = None
    claims: tuple[ClaimName, ...] = get_args(ClaimName)
    seeds: tuple[int, ...] = (0, 1, 2)
    cores: tuple[cape.model.Core, ...] = ("fno",)
    training: Training = Training()
    # Cells on the line.
    cells: int = 128
    # Frames of advection and the time between two; trajectories of each speed, of which a tenth is for tests.
    frames: int = 21
    interval: float = 0.1
    samples: int = 200
    speeds: tuple[float, ...] = (0.2, 0.4, 0.7, 2.0, 4.0)
    unseen_speeds: tuple[float, ...] = (0.1, 1.0, 7.0)
    # Weight of the mean squared residual in PINO's loss.
    residual_weight: float = 1e-4
    # The same of Burgers' equation.
    burgers_frames: int = 21
    burgers_interval: float = 0.1
    viscosities: tuple[float, ...] = (0.002, 0.02, 0.2, 2.0)
    # Cells of a side, frames, trajectories of each flow, Mach numbers and viscosities, and epochs.
    plane_cells: int = 64
    plane_frames: int = 21
    plane_samples: int = 50
    machs: tuple[float, ...] = (0.1, 1.0)
    plane_viscosities: tuple[float, ...] = (1e-3, 0.01, 0.1)
    plane_epochs: int = 100
    # Cells and repetitions of the numerical solver that is timed.
    cost_cells: int = 1024
    repetitions: int = 20

    def __post_init__(self) -> None:
        if not self.seeds or not self.claims:
            raise ValueError("there must be a seed and a claim")
        if self.training.epochs <= self.training.warmup or self.plane_epochs <= self.training.warmup:
            raise ValueError(f"there must be more epochs than the {self.training.warmup} of the warm-up")
        if min(self.frames, self.burgers_frames, self.plane_frames) < 3:
            raise ValueError("a trajectory must have at least 3 frames")
        if self.samples < 10 or self.plane_samples < 1:
            raise ValueError(f"samples must be at least 10, a tenth of which is for tests, got {self.samples}")
        if min((*self.viscosities, *self.machs, *self.plane_viscosities)) <= 0:
            raise ValueError("viscosities and Mach numbers must be positive")
        both = set(self.speeds) & set(self.unseen_speeds)
        if both:
            raise ValueError(f"unseen speeds are among the seen ones: {sorted(both)}")


PRESETS = {
    "cpu": Config(
        training=Training(epochs=24, warmup=2, batch_size=20, decay_epochs=6), cells=64, frames=9, samples=40,
        burgers_frames=11, viscosities=(0.002, 0.02, 0.2, 2.0), plane_cells=32, plane_frames=6, plane_samples=8,
        plane_viscosities=(0.01,), plane_epochs=6,
    ),
    "smoke": Config(
        seeds=(0,), training=Training(epochs=2, warmup=1, batch_size=5), cells=32, frames=3, samples=10,
        speeds=(0.5, 1.0), unseen_speeds=(0.7,), burgers_frames=3, viscosities=(0.2,), plane_cells=16, plane_frames=3,
        plane_samples=5, machs=(0.1,), plane_viscosities=(0.01,), plane_epochs=2, cost_cells=64, repetitions=1,
    ),
    "paper": Config(
        cores=("fno", "unet"), frames=41, interval=0.05, samples=10_000, burgers_frames=41, burgers_interval=0.05,
        viscosities=(0.002, 0.007, 0.02, 0.04, 0.2, 0.4, 2.0), plane_samples=1000,
        plane_viscosities=(1e-8, 1e-3, 4e-3, 0.01, 0.04, 0.1),
    ),
}  # fmt: skip


class Trajectories(NamedTuple):
    """Of one equation at several parameters."""

    solution: np.ndarray  # (N, T, *grid, C)
    parameters: np.ndarray  # (N, P)

    def split(self) -> tuple[Trajectories, Trajectories]:
        """Pooled and shuffled: the first tenth for tests, as published, the rest for training."""
        order = np.random.default_rng(0).permutation(len(self.solution))
        cut = max(len(order) // 10, 1)
        test, kept = order[:cut], order[cut:]
        return Trajectories(self.solution[kept], self.parameters[kept]), Trajectories(
            self.solution[test], self.parameters[test]
        )


def read(
    config: Config, kind: str, values: Sequence[tuple[float, ...]], frames: int, samples: int, cells: int
) -> Trajectories:
    """PDEBench's files of these parameters, thinned out to the cells and frames asked for."""
    assert config.data_dir is not None
    parts, columns = [], []
    for value in values:
        path = config.data_dir / FILES[kind].format(*value)
        whole = pde.read_pdebench(path, samples=1)
        strides = {
            "space_stride": max(whole.solution.shape[2] // cells, 1),
            "time_stride": max((whole.solution.shape[1] - 1) // (frames - 1), 1),
        }
        found = pde.read_pdebench(path, samples=samples, **strides)
        parts.append(found.solution[:, :frames])
        # The parameters by their value, whatever the order of the file's attributes.
        columns.append(np.tile(np.asarray(value, np.float32), (len(found.solution), 1)))
    return Trajectories(np.concatenate(parts), np.concatenate(columns))


def advection(config: Config, speeds: Sequence[float], samples: int, seed: int) -> Trajectories:
    """Exact trajectories at each speed."""
    if config.data_dir is not None:
        return read(config, "advection", [(speed,) for speed in speeds], config.frames, samples, config.cells)
    beta = np.repeat(np.asarray(speeds), samples)
    waves = pde.pdebench_initial_conditions(seed, len(beta))
    times = config.interval * np.arange(config.frames)
    fields = pde.advection_exact(waves, beta, pde.centres(config.cells), times)
    return Trajectories(fields[..., None].astype(np.float32), beta[:, None].astype(np.float32))


def burgers(config: Config, samples: int, seed: int) -> Trajectories:
    """Trajectories at each viscosity, solved on a grid four times as fine."""
    frames, interval = config.burgers_frames, config.burgers_interval
    if config.data_dir is not None:
        return read(config, "burgers", [(nu,) for nu in config.viscosities], frames, samples, config.cells)
    fine, parts = 4 * config.cells, []
    for index, nu in enumerate(config.viscosities):
        u0 = pde.pdebench_initial_conditions(seed + index, samples)(pde.centres(fine))
        spectral = nu >= 0.2
        substeps = pde.burgers_substeps(np.abs(u0).max(), 0.0 if spectral else nu, fine, interval)
        fields = pde.solve_burgers(
            jnp.asarray(u0, jnp.float32), nu, frames=frames - 1, interval=interval, substeps=substeps,
            diffusion="spectral" if spectral else "explicit",
        )  # fmt: skip
        parts.append(np.asarray(fields).reshape(samples, frames, config.cells, 4).mean(-1))  # cells' averages
    column = np.repeat(np.asarray(config.viscosities, np.float32), samples)[:, None]
    return Trajectories(np.concatenate(parts)[..., None], column)


def flow(config: Config, seed: int) -> Trajectories:
    """Compressible flow on a plane at each Mach number and viscosity, eta = zeta, solved on a grid twice as fine."""
    samples, frames = config.plane_samples, config.plane_frames
    values = [(mach, eta, eta) for mach in config.machs for eta in config.plane_viscosities]
    if config.data_dir is not None:
        return read(config, "flow", values, frames, samples, config.plane_cells)
    parts = []
    for index, (mach, eta, zeta) in enumerate(values):
        initial = pde.ns2d_initial_conditions(seed + index, samples, 2 * config.plane_cells, mach)
        # Twice the steps that the initial field asks for: waves steepen.
        substeps = 2 * pde.ns2d_substeps(initial, 0.05, eta=eta, zeta=zeta)
        fields = pde.solve_ns2d(
            jnp.asarray(initial), eta, zeta, frames=frames - 1, interval=0.05, substeps=substeps
        )  # fmt: skip
        side = config.plane_cells
        means = np.asarray(fields).reshape(samples, frames, side, 2, side, 2, 4).mean((3, 5))
        parts.append(means[..., [0, 3, 1, 2]])  # density, pressure and the velocities, as in PDEBench's networks
    columns = np.repeat(np.asarray(values, np.float32), samples, axis=0)
    found = Trajectories(np.concatenate(parts), columns)
    if not np.isfinite(found.solution).all():
        raise ValueError("the numerical solver was not stable; its steps are too long")
    # Temperatures differ a hundredfold between samples: each channel is divided by its spread in the first frame.
    scale = np.std(found.solution[:, 0], axis=(1, 2), keepdims=True)[:, None] + 1e-3
    return Trajectories(found.solution / scale, found.parameters)


def solver(name: str, core: str, grid: tuple[int, ...], like: Trajectories) -> cape.CAPEModel:
    """A registered solver on this grid, with as many modes as it has."""
    id = TWINS[name].format(core=core, dims=len(grid))
    most = min(side // 2 for side in grid)
    defaults = registry.model(id).variant.config
    model: Any = zoo.create(
        id,
        grid=grid,
        channels=like.solution.shape[-1],
        parameters=like.parameters.shape[-1],
        modes=tuple(min(modes, most) for modes in defaults.modes),
        block_modes=tuple(min(modes, most // 4) for modes in defaults.block_modes),
    )
    return model


def border_of(schedule: Schedule, epoch: int, epochs: int, warmup: int, frames: int) -> int:
    """How many steps are auto-regressive in an epoch."""
    if schedule == "teacher forcing":
        return 1
    return frames if schedule == "auto-regressive" else int(cape.curriculum_steps(epoch, epochs, warmup, frames))


def block_alone(learning_rate: float) -> train.Optimizer:
    """Adam for the block, and nothing for the rest of the solver."""
    rate = optax.constant_schedule(learning_rate)
    transformation = optax.multi_transform(
        {"block": optax.adam(rate), "rest": optax.set_to_zero()},
        lambda params: {name: "block" if name == "block" else "rest" for name in params},
    )
    return train.Optimizer(transformation, rate)


def fit(
    model: cape.CAPEModel,
    data: Trajectories,
    training: Training,
    run_below: Callable[[str], train.Run],
    seed: int,
    *,
    schedule: Schedule = "curriculum",
    **options: Any,
) -> Any:
    """Trains a solver; the block is warmed up alone first, with the intermediate loss and an Adam of its own.

    Args:
      model: the solver.
      data: for training.
      training: epochs and rates.
      run_below: opens the run's folder of each of the two parts.
      seed: of parameters, order and noise.
      schedule: which steps are auto-regressive.
      **options: of `cape.loss`.

    Returns:
      The trained variables.
    """
    batch_size = min(training.batch_size, len(data.solution))
    per_epoch = len(data.solution) // batch_size
    warms = model.config.conditioning == "cape" and training.warmup > 0
    frames = data.solution.shape[1]

    def batch(step: int, first_epoch: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, first_epoch + epoch]).permutation(len(data.solution))
        chosen = order[place * batch_size :][:batch_size]
        border = border_of(schedule, first_epoch + epoch, training.epochs, training.warmup, frames)
        return {
            "solution": data.solution[chosen],
            "parameters": data.parameters[chosen],
            "border": np.full(batch_size, border, np.int32),
        }

    mesh = train.make_mesh(train.MeshConfig(data=1))
    example = jnp.asarray(data.solution[:1, 0]), jnp.asarray(data.parameters[:1])

    def phase(name: str, first_epoch: int, epochs: int, optimizer: train.Optimizer, init: Callable, **loss: Any) -> Any:
        state = train.init_sharded(init, optimizer, jax.random.key(seed), mesh)
        step = train.make_train_step(cape.loss(model, **loss, **options), optimizer, state)
        steps = epochs * per_epoch
        source = grain.MapDataset.range(steps + 1).map(lambda index: batch(index, first_epoch))
        found = train.fit(step, state, source, train.FitConfig(steps=steps), run_below(name), mesh=mesh)
        return nn.meta.unbox(found.state.evaluation_variables)

    def init(rng: jax.Array) -> Any:
        return model.init(rng, *example)

    begin = 0
    if warms:
        variables = phase(
            "warmup", 0, training.warmup, block_alone(training.learning_rate), init, intermediate_only=True
        )  # fmt: skip
        begin, init = training.warmup, lambda rng: variables
    epochs = training.epochs - begin
    drop = training.decay_epochs * per_epoch
    rates = optax.exponential_decay(training.learning_rate, drop, 0.5, staircase=True)
    whole = optax.chain(
        optax.add_decayed_weights(training.weight_decay), optax.scale_by_adam(), optax.scale_by_learning_rate(rates)
    )
    return phase("training", begin, epochs, train.Optimizer(whole, rates), init)


def scores(model: cape.CAPEModel, variables: Any, data: Trajectories) -> tuple[dict[str, float], np.ndarray]:
    """The eight scores of full roll-outs from the first frame, and the roll-outs."""
    steps = data.solution.shape[1] - 1
    roll = jax.jit(partial(cape.rollout, model, steps=steps))
    fields = roll(variables, jnp.asarray(data.solution[:, 0]), jnp.asarray(data.parameters))
    found = cape.pde_metrics(fields[:, 1:], jnp.asarray(data.solution[:, 1:]))
    # A roll-out that left every bound has no number in JSON; a large one stands for it.
    return {
        name: float(np.nan_to_num(value, nan=1e30, posinf=1e30)) for name, value in dataclasses.asdict(found).items()
    }, np.asarray(fields)


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _advection_residual(config: Config, fields: jax.Array, parameters: jax.Array) -> jax.Array:
    duration = config.interval * (config.frames - 1)
    return config.residual_weight * cape.pino_residual(fields[..., 0], parameters, "advection", duration=duration)


def guidance(config: Config, run_below: Callable[[str], train.Run]) -> tuple[reports.Claim, dict[str, Figure]]:
    """CAPE, conditional, plain and PINO on advection, at seen and unseen speeds."""
    data, test = advection(config, config.speeds, config.samples, 0).split()
    unseen = {
        speed: advection(config, [speed], max(config.samples // 10, 4), 100 + index)
        for index, speed in enumerate(config.unseen_speeds)
    }
    grid = data.solution.shape[2:-1]
    table: dict[str, dict[str, list[float]]] = {}
    measured: dict[str, Any] = {}
    rolled: dict[str, np.ndarray] = {}
    curves: dict[str, dict[float, list[float]]] = {}
    analysed: tuple[cape.CAPEModel, Any] | None = None
    for core in config.cores:
        for name in TWINS:
            label = f"{name} {core}"
            model = solver(name, core, grid, data)
            residual = partial(_advection_residual, config) if name == "PINO" else None
            for seed in config.seeds:
                below = lambda part: run_below(f"guidance_{core}_{name}_seed{seed}_{part}")  # noqa: B023, E731
                variables = fit(model, data, config.training, below, seed, residual=residual)
                seen, fields = scores(model, variables, test)
                rolled.setdefault(label, fields)
                rows = table.setdefault(label, {"seen": [], "unseen": []})
                rows["seen"].append(seen["nrmse"])
                for score, value in seen.items():
                    measured.setdefault(f"{label}, seen speeds, {score}", []).append(value)
                by_speed = {speed: scores(model, variables, one)[0]["nrmse"] for speed, one in unseen.items()}
                for speed in config.speeds:
                    chosen = test.parameters[:, 0] == np.float32(speed)
                    if chosen.any():
                        one = Trajectories(test.solution[chosen], test.parameters[chosen])
                        by_speed[speed] = scores(model, variables, one)[0]["nrmse"]
                for speed, value in by_speed.items():
                    curves.setdefault(label, {}).setdefault(speed, []).append(value)
                rows["unseen"].append(float(np.mean([by_speed[speed] for speed in unseen])))
                if name == "CAPE" and analysed is None:
                    analysed = model, variables
            for speed in unseen:
                measured[f"{label}, unseen speed {speed:g}, nrmse"] = curves[label][speed]
    assert analysed is not None
    inside = [speed for speed in unseen if min(config.speeds) < speed < max(config.speeds)]
    better = [
        all(np.mean(curves[f"CAPE {core}"][speed]) < np.mean(curves[f"conditional {core}"][speed]) for speed in inside)
        for core in config.cores
    ]
    told = [np.mean(table[f"CAPE {core}"]["seen"]) < np.mean(table[f"plain {core}"]["seen"]) for core in config.cores]
    verdict: reports.Verdict = "not tested"
    if config.training.epochs >= 10:
        verdict = "reproduced" if all(better) and all(told) else "partly reproduced" if any(told) else "not reproduced"
    counts = {
        f"{name} {core}": _parameters(solver(name, core, grid, data), data)
        for core in config.cores
        for name in TWINS
    }  # fmt: skip
    claim = reports.Claim(
        statement="Guidance by the equation's parameters pays at an equal number of them, at unseen ones too.",
        verdict=verdict,
        measured={f"{label}, parameters": count for label, count in counts.items()}
        | {name: _round(values) for name, values in measured.items() if name.startswith("CAPE")},
        baselines={name: _round(values) for name, values in measured.items() if not name.startswith("CAPE")},
        seeds=config.seeds,
        remark="Advection, roll-outs from the first frame. Seen speeds "
        f"{', '.join(f'{speed:g}' for speed in config.speeds)}; reproduced if at unseen speeds between them "
        f"({', '.join(f'{speed:g}' for speed in inside)}) CAPE's nrmse is below the conditional solver's in the mean, "
        "and at seen ones below the plain solver's. The paper's numbers could not be read and are not quoted. "
        f"{config.training.epochs} epochs of {len(data.solution)} trajectories of {config.frames} frames. "
        f"Widths as published: the networks are of one size on {_TWIN_CELLS} cells, on fewer CAPE's is smaller.",
    )
    return claim, {
        "guidance": _curve_figure(curves, config),
        "rollouts": _rollout_figure(test, rolled),
        "gates": gate_figure(*analysed, np.linspace(min(config.speeds), max(config.speeds), 50)),
    }


def _parameters(model: cape.CAPEModel, like: Trajectories) -> int:
    example = like.solution[:1, 0], like.parameters[:1]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *map(jnp.asarray, example)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def _curve_figure(curves: dict[str, dict[float, list[float]]], config: Config) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, by_speed in curves.items():
        speeds = sorted(by_speed)
        axes.plot(speeds, [np.mean(by_speed[speed]) for speed in speeds], "o-", label=label)
    for speed in config.unseen_speeds:
        axes.axvline(speed, color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="speed (dotted: unseen)", ylabel="nrmse of the roll-out")
    axes.legend()
    return figure


def _rollout_figure(test: Trajectories, rolled: dict[str, np.ndarray]) -> Figure:
    sample = int(np.argmax(test.parameters[:, 0]))
    fields = {"solution": test.solution[sample, ..., 0]} | {name: one[sample, ..., 0] for name, one in rolled.items()}
    bound = float(np.abs(fields["solution"]).max())
    figure = Figure(figsize=(2.2 * len(fields), 3), layout="constrained")
    for axes, (name, field) in zip(figure.subplots(1, len(fields)), fields.items(), strict=True):
        axes.imshow(field, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound, origin="lower")
        axes.set(title=name, xlabel="cell", ylabel="frame")
    return figure


def gate_figure(model: cape.CAPEModel, variables: Any, values: np.ndarray) -> Figure:
    """What each channel of each path counts, over the parameter; and the gated depthwise stencils at both ends."""
    gates = np.asarray(model.apply(variables, jnp.asarray(values[:, None], jnp.float32), method="condition"))
    kernel = np.asarray(variables["params"]["block"]["depthwise"])  # (places, W)
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    for index, name in enumerate(cape.GATES):
        axes[index].plot(values, gates[:, index], linewidth=0.7)
        axes[index].set(title=f"{name} gates", xlabel="parameter")
    strongest = np.argsort(-np.abs(gates[:, 2]).mean(0))[:4]
    for channel in strongest:
        for end, style in ((0, "-"), (-1, "--")):
            label = f"channel {channel}, parameter {values[end]:.2g}"
            axes[3].plot(kernel[:, channel] * gates[end, 2, channel], style, label=label)
    axes[3].set(title="depthwise stencils", xlabel="place")
    axes[3].legend(fontsize=5)
    return figure


def curriculum(config: Config, run_below: Callable[[str], train.Run]) -> tuple[reports.Claim, dict[str, Figure]]:
    """The three schedules on Burgers' equation."""
    data, test = burgers(config, config.samples, 0).split()
    core = config.cores[0]
    model = solver("CAPE", core, data.solution.shape[2:-1], data)
    measured: dict[str, list[float]] = {}
    late: dict[str, list[float]] = {}
    growth: dict[str, np.ndarray] = {}
    for schedule in get_args(Schedule):
        for seed in config.seeds:
            name = schedule.replace(" ", "_")
            below = lambda part: run_below(f"curriculum_{name}_seed{seed}_{part}")  # noqa: B023, E731
            variables = fit(model, data, config.training, below, seed, schedule=schedule)
            found, fields = scores(model, variables, test)
            measured.setdefault(f"{schedule}, nrmse", []).append(found["nrmse"])
            error = np.sqrt(np.mean((fields - test.solution) ** 2, (2, 3)) / np.mean(test.solution**2, (2, 3)))
            growth.setdefault(schedule, error.mean(0))
            late.setdefault(schedule, []).append(float(np.nan_to_num(error[:, -1].mean(), nan=1e30, posinf=1e30)))
    means = {schedule: np.mean(values) for schedule, values in late.items()}
    verdict: reports.Verdict = "not tested"
    if config.training.epochs >= 10:
        best = means["curriculum"] <= min(means.values())
        verdict = "reproduced" if best else (
            "partly reproduced" if means["curriculum"] < means["teacher forcing"] else "not reproduced"
        )  # fmt: skip
    time = config.burgers_interval * (config.burgers_frames - 1)
    claim = reports.Claim(
        statement="The curriculum beats teacher forcing and training by auto-regression from the start.",
        verdict=verdict,
        measured={"curriculum, nrmse": _round(measured["curriculum, nrmse"]),
                  f"curriculum, at t = {time:g}": _round(late["curriculum"])},
        baselines={name: _round(values) for name, values in measured.items() if not name.startswith("curriculum")}
        | {f"{name}, at t = {time:g}": _round(values) for name, values in late.items() if name != "curriculum"},
        seeds=config.seeds,
        remark=f"CAPE with {core}, Burgers' equation at nu {', '.join(f'{nu:g}' for nu in config.viscosities)}, "
        "the same number of updates; judged by the last frame.",
    )  # fmt: skip
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for schedule, row in growth.items():
        axes.plot(config.burgers_interval * np.arange(len(row)), row, "o-", label=schedule)
    axes.set(yscale="log", xlabel="time", ylabel="nrmse")
    axes.legend()
    return claim, {"curriculum": figure}


def plane(config: Config, run_below: Callable[[str], train.Run]) -> tuple[reports.Claim, dict[str, Figure]]:
    """CAPE beside the plain solver on compressible flow."""
    data, test = flow(config, 0).split()
    training = dataclasses.replace(
        config.training, epochs=config.plane_epochs, batch_size=min(config.training.batch_size, 8)
    )
    found: dict[str, list[float]] = {}
    rolled: dict[str, np.ndarray] = {}
    for name in ("CAPE", "conditional", "plain"):
        model = solver(name, config.cores[0], data.solution.shape[2:-1], data)
        seed = config.seeds[0]
        below = lambda part: run_below(f"plane_{name}_seed{seed}_{part}")  # noqa: B023, E731
        variables = fit(model, data, training, below, seed, checkpoint=True)
        values, rolled[name] = scores(model, variables, test)
        found[name] = [values["nrmse"]]
    verdict: reports.Verdict = "not tested"
    if training.epochs >= 20:
        verdict = "reproduced" if found["CAPE"] < min(found["conditional"], found["plain"]) else "not reproduced"
    claim = reports.Claim(
        statement="On a plane, too, guidance by the parameters lowers the error of roll-outs.",
        verdict=verdict,
        measured={"CAPE, nrmse": _round(found["CAPE"])},
        baselines={f"{name}, nrmse": _round(values) for name, values in found.items() if name != "CAPE"},
        seeds=config.seeds[:1],
        remark=f"Compressible flow, {config.plane_cells} cells a side, {training.epochs} epochs; judged from 20 on.",
    )
    fields = {"solution": test.solution[0, -1, ..., 0]} | {name: one[0, -1, ..., 0] for name, one in rolled.items()}
    figure = Figure(figsize=(3 * len(fields), 3), layout="constrained")
    for axes, (name, field) in zip(figure.subplots(1, len(fields)), fields.items(), strict=True):
        axes.imshow(field.T, origin="lower")
        axes.set(title=f"density, {name}")
    return claim, {"plane": figure}


def cost(config: Config, run_below: Callable[[str], train.Run]) -> tuple[reports.Claim, dict[str, Figure]]:
    """Time of a step of each solver, of a training step, and of the numerical solver."""
    like = Trajectories(np.zeros((1, 3, _TWIN_CELLS, 1), np.float32), np.ones((1, 1), np.float32))
    measured: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name in ("CAPE", "plain"):
        model = solver(name, "fno", (_TWIN_CELLS,), like)
        inputs = cape.model.example_inputs(model.config, 50)
        variables = jax.jit(model.init)(jax.random.key(0), **inputs)
        condition = model.apply(variables, inputs["parameters"], method="condition")
        step = jax.jit(partial(model.apply, method="step"))
        seconds[name] = timing.median_seconds(partial(step, variables, inputs["u"], condition), config.repetitions)
        measured[f"{name}: parameters"] = _parameters(model, like)
        measured[f"{name}: milliseconds a step of 50 fields"] = round(1e3 * seconds[name], 3)
    u0 = jnp.asarray(pde.pdebench_initial_conditions(0, 50)(pde.centres(config.cost_cells)), jnp.float32)
    substeps = pde.advection_substeps(4.0, config.cost_cells, config.interval)
    solve = partial(pde.solve_advection, u0, 4.0, frames=1, interval=config.interval, substeps=substeps)
    numerical = timing.median_seconds(solve, max(config.repetitions // 5, 1))
    measured[f"numerical solver, {config.cost_cells} cells: milliseconds for 50 fields"] = round(1e3 * numerical, 3)
    slower = seconds["CAPE"] / seconds["plain"] - 1
    measured["CAPE slower by"] = round(slower, 3)
    verdict: reports.Verdict = "not tested"
    if config.repetitions >= 5:
        verdict = "reproduced" if slower < 0.1 else "not reproduced"
    claim = reports.Claim(
        statement="At an equal number of parameters the block costs less than a tenth of a step's time.",
        verdict=verdict,
        measured=measured,
        remark=f"{_TWIN_CELLS} cells, forward, jitted, gates computed once a roll-out; one step is {config.interval:g} "
        "time units.",
    )
    return claim, {}


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims; solvers are trained below `runs/`, figures lie in `figures/`, numbers in result.json.

    Raises:
      FileNotFoundError: one of PDEBench's files is missing.
    """
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise FileNotFoundError(f"no folder {config.data_dir}")
    folder = train.open_run(workdir, config, resume=resume, force=force)
    (folder.path / "figures").mkdir(exist_ok=True)

    def run_below(name: str) -> train.Run:
        return train.open_run(folder.path / "runs" / name, config, resume=resume, force=force)

    claims: list[reports.Claim] = []
    for name in config.claims:
        claim, figures = {"guidance": guidance, "curriculum": curriculum, "plane": plane, "cost": cost}[name](
            config, run_below
        )
        claims.append(claim)
        reports.show(claim)
        for title, figure in figures.items():
            figure.savefig(folder.path / "figures" / f"{title}.png", dpi=120)
    data = "PDEBench" if config.data_dir is not None else "equations solved here, fields drawn as in PDEBench"
    result = reports.Result("cape", command_line.preset_name(config, PRESETS), data, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("cape", PRESETS, run)

"""Equations of fluids on periodic grids: solvers, exact solutions, random initial fields, and PDEBench's files.

Three equations of PDEBench (Takamoto et al. 2022): advection, Burgers' equation, and the compressible Navier-Stokes
equations on a plane. Finite volumes of second order: slopes limited after van Leer, upwind fluxes, the midpoint rule.
Steps between two saved frames are fixed in number, so that a whole batch is one `lax.scan`. Fields lie at cells'
centres ((i + 1/2) length / n); B samples, T frames (the first is the initial field), n cells.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GAMMA = 5 / 3


def centres(cells: int, length: float = 1.0) -> np.ndarray:
    """The cells' centres, (cells,) float64."""
    return (np.arange(cells) + 0.5) * (length / cells)


def limited_slopes(u: jax.Array, axis: int) -> jax.Array:
    """Van Leer's monotonised central differences between cells: zero at extrema, never twice the smaller difference."""
    back, ahead = u - jnp.roll(u, 1, axis), jnp.roll(u, -1, axis) - u
    central = (back + ahead) / 2
    size = jnp.minimum(jnp.minimum(2 * jnp.abs(back), 2 * jnp.abs(ahead)), jnp.abs(central))
    return jnp.where(back * ahead > 0, jnp.sign(central) * size, 0)


def _faces(u: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The field on both sides of the face behind each cell."""
    half = limited_slopes(u, axis) / 2
    return u + half, jnp.roll(u - half, -1, axis)


def _check_substeps(substeps: int, frames: int) -> None:
    if substeps < 1 or frames < 1:
        raise ValueError(f"there must be a step between two frames, and a frame, got {substeps} and {frames}")


def _march(step: Callable, u0: jax.Array, frames: int, substeps: int) -> jax.Array:
    """u0 and the field after each `substeps` steps, (frames + 1, *u0.shape)."""

    def frame(u: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        u = jax.lax.fori_loop(0, substeps, lambda _, u: step(u), u)
        return u, u

    _, fields = jax.lax.scan(frame, u0, None, length=frames)
    return jnp.concatenate([u0[None], fields])


def _scalar(u0: jax.Array, coefficient: jax.Array) -> tuple[jax.Array, jax.Array]:
    if u0.ndim != 2 or u0.shape[1] < 3:
        raise ValueError(f"u0 must be (batch, at least 3 cells), got {u0.shape}")
    coefficient = jnp.asarray(coefficient, u0.dtype)
    if coefficient.shape not in ((), u0.shape[:1]):
        raise ValueError(f"there must be one coefficient, or one for each of {u0.shape[0]}, got {coefficient.shape}")
    return u0, coefficient.reshape(-1, 1)


def advection_substeps(beta: float, cells: int, interval: float, length: float = 1.0, cfl: float = 0.4) -> int:
    """Steps in `interval` at which the flow crosses at most `cfl` of a cell in each."""
    return math.floor(interval * abs(beta) / (cfl * length / cells)) + 1


@partial(jax.jit, static_argnames=("frames", "interval", "substeps", "length"))
def solve_advection(
    u0: jax.Array, beta: jax.Array, *, frames: int, interval: float, substeps: int, length: float = 1.0
) -> jax.Array:
    """u_t + beta u_x = 0 by upwind fluxes.

    Args:
      u0: (B, n) cells' values.
      beta: speed, one or (B,).
      frames: to save after the first, each `interval` later.
      interval: see there.
      substeps: steps in it; `advection_substeps` gives a stable number.
      length: of the line.

    Returns:
      (B, frames + 1, n).
    """
    _check_substeps(substeps, frames)
    u0, beta = _scalar(u0, beta)
    dx, dt = length / u0.shape[1], interval / substeps

    def rate(u: jax.Array) -> jax.Array:
        left, right = _faces(u, 1)
        flux = 0.5 * (beta * (left + right) - jnp.abs(beta) * (right - left))
        return (jnp.roll(flux, 1, 1) - flux) / dx

    fields = _march(lambda u: u + dt * rate(u + dt / 2 * rate(u)), u0, frames, substeps)
    return jnp.moveaxis(fields, 0, 1)


def burgers_substeps(u_max: float, nu: float, cells: int, interval: float, length: float = 1.0) -> int:
    """Steps in `interval` of explicit convection and diffusion: dt = min(dx / max|u|, dx^2 pi / (2 nu)) / 4."""
    dx = length / cells
    return math.floor(interval / (0.25 * min(dx / max(u_max, 1e-12), dx**2 * math.pi / (2 * max(nu, 1e-12))))) + 1


@partial(jax.jit, static_argnames=("frames", "interval", "substeps", "length", "diffusion"))
def solve_burgers(
    u0: jax.Array,
    nu: jax.Array,
    *,
    frames: int,
    interval: float,
    substeps: int,
    length: float = 1.0,
    diffusion: Literal["explicit", "spectral"] = "explicit",
) -> jax.Array:
    """u_t + (u^2 / 2)_x = (nu / pi) u_xx.

    Args:
      u0: (B, n) cells' values.
      nu: viscosity times pi, one or (B,).
      frames, interval, substeps, length: as of `solve_advection`; see `burgers_substeps`.
      diffusion: "explicit" as a part of the flux; "spectral" exactly in Fourier space, half a step before and half
        after each step of convection (Strang 1968), which spares the thousands of steps that large viscosities take.

    Returns:
      (B, frames + 1, n).
    """
    _check_substeps(substeps, frames)
    if diffusion not in ("explicit", "spectral"):
        raise ValueError(f"diffusion must be 'explicit' or 'spectral', got {diffusion!r}")
    u0, nu = _scalar(u0, nu)
    cells = u0.shape[1]
    dx, dt, kappa = length / cells, interval / substeps, nu / jnp.pi
    explicit = kappa if diffusion == "explicit" else 0.0

    def rate(u: jax.Array) -> jax.Array:
        left, right = _faces(u, 1)
        flux = 0.5 * (left**2 / 2 + right**2 / 2 - 0.5 * jnp.abs(left + right) * (right - left))
        flux = flux - explicit * (jnp.roll(u, -1, 1) - u) / dx
        return (jnp.roll(flux, 1, 1) - flux) / dx

    wave = 2 * np.pi * np.arange(cells // 2 + 1) / length
    decay = jnp.exp(-kappa * jnp.asarray(wave**2, u0.dtype) * dt / 2)

    def diffuse(u: jax.Array) -> jax.Array:
        return jnp.fft.irfft(decay * jnp.fft.rfft(u, axis=1), cells, axis=1)

    def step(u: jax.Array) -> jax.Array:
        u = diffuse(u) if diffusion == "spectral" else u
        u = u + dt * rate(u + dt / 2 * rate(u))
        return diffuse(u) if diffusion == "spectral" else u

    return jnp.moveaxis(_march(step, u0, frames, substeps), 0, 1)


class Waves(NamedTuple):
    """Sums of sines on a line, as `Waves(...)(x)`: sum_k amplitude_k sin(wavenumber_k x + phase_k), then altered.

    Every field has an axis of samples first; the last three are those of PDEBench and may be left out.
    """

    wavenumber: np.ndarray  # (B, K), radians a unit of x
    amplitude: np.ndarray
    phase: np.ndarray
    absolute: np.ndarray | None = None  # (B,) bool
    sign: np.ndarray | None = None  # (B,) +-1
    window: np.ndarray | None = None  # (B, 2) edges, NaN without

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """At places x, (n,) or (B, n): (B, n) float64. Places are taken modulo 1."""
        x = np.broadcast_to(np.mod(x, 1.0), (len(self.phase), np.shape(x)[-1]))
        u = np.zeros(x.shape)
        for k in range(self.phase.shape[1]):
            u += self.amplitude[:, k : k + 1] * np.sin(self.wavenumber[:, k : k + 1] * x + self.phase[:, k : k + 1])
        if self.absolute is not None:
            u = np.where(self.absolute[:, None], np.abs(u), u)
        if self.sign is not None:
            u = u * self.sign[:, None]
        if self.window is not None:
            left, right = self.window[:, :1], self.window[:, 1:]
            shape = 0.5 * (np.tanh((x - left) / 0.01) - np.tanh((x - right) / 0.01))
            u = np.where(np.isnan(left), u, u * shape)
        return u


def pdebench_initial_conditions(seed: int, count: int, span: float = 1.0) -> Waves:
    """Random fields on the unit line as PDEBench draws them.

    Two of the modes 1 .. 4 are drawn, with replacement; one drawn c times has wavenumber 2 pi c k / span. Amplitudes
    are U(0, 1) and phases U(0, 2 pi) of all four: a mode that was not drawn has wavenumber 0, a constant, so that means
    are not zero. With probability 0.1 the field's absolute value is taken; its sign is random; with probability 0.1 a
    smooth window cuts it out.

    Args:
      seed: of the draw.
      count: of fields.
      span: 1, the period; PDEBench's own is that from the first cell's centre to the last's, which makes a small jump.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 4, (count, 2))
    times = (drawn[:, :, None] == np.arange(4)).sum(1)
    window = np.stack([rng.uniform(0.1, 0.45, count), rng.uniform(0.55, 0.9, count)], -1)
    amplitude, phase = rng.uniform(0, 1, (count, 4)), rng.uniform(0, 2 * np.pi, (count, 4))
    absolute, sign = rng.random(count) < 0.1, rng.choice([-1.0, 1.0], count)
    window[rng.random(count) >= 0.1] = np.nan
    return Waves(2 * np.pi * times * np.arange(1, 5) / span, amplitude, phase, absolute, sign, window)


def advection_exact(
    u0: Callable[[np.ndarray], np.ndarray] | Waves, beta: np.ndarray, x: np.ndarray, times: Sequence[float] | np.ndarray
) -> np.ndarray:
    """u0(x - beta t) on the unit line.

    Args:
      u0: a function such as `Waves`, of places (B, n).
      beta: speed, (B,).
      x: places, (n,).
      times: of the frames.

    Returns:
      float64 (B, T, n).
    """
    beta = np.asarray(beta, np.float64)[:, None]
    return np.stack([u0(x[None] - beta * time) for time in times], axis=1)


def burgers_cole_hopf(
    waves: Waves, nu: np.ndarray, x: np.ndarray, times: Sequence[float] | np.ndarray, points: int = 20_000
) -> np.ndarray:
    """Burgers' equation exactly, from plain sums of sines, by the transform of Cole and Hopf.

        v(x, t) = int (s / t) exp(-E) ds / int exp(-E) ds,    E = [Phi(x - s) + s^2 / (2 t)] / (2 kappa),

    with kappa = nu / pi, u = m + v(x - m t, t) for the mean m, and Phi the primitive of v(., 0). The integrals are sums
    over `points` places, in float64, of exponentials whose largest is 1.

    Args:
      waves: unaltered; waves of wavenumber 0 are part of the mean.
      nu: (B,).
      x: places, (n,).
      times: of the frames, not negative.
      points: of the integrals.

    Returns:
      float64 (B, T, n).

    Raises:
      ValueError: `waves` were altered, or nu is not positive.
    """
    if waves.absolute is not None or waves.sign is not None or waves.window is not None:
        raise ValueError("the primitive is known of plain sums of sines only, without absolute, sign or window")
    nu = np.asarray(nu, np.float64)
    if not (nu > 0).all():
        raise ValueError(f"nu must be positive, got {nu}")
    out = np.empty((len(nu), len(times), len(x)))
    out[:] = waves(x)[:, None]
    for sample, kappa in enumerate(nu / np.pi):
        wave, amplitude, phase = (field[sample].astype(np.float64) for field in waves[:3])
        moving = wave != 0
        mean = np.sum(amplitude[~moving] * np.sin(phase[~moving]))
        wave, amplitude, phase = wave[moving], amplitude[moving], phase[moving]
        for frame, time in enumerate(times):
            if time == 0:
                continue
            reach = 12 * math.sqrt(2 * kappa * time) + 2 * time * np.abs(amplitude).sum()
            s = np.linspace(-reach, reach, points)
            # cos(a - k s) = cos a cos k s + sin a sin k s: one small product instead of a cosine for each x and s.
            angle = wave * (x[:, None] - mean * time) + phase
            primitive = (-amplitude / wave * np.cos(angle)) @ np.cos(np.outer(wave, s))
            primitive += (-amplitude / wave * np.sin(angle)) @ np.sin(np.outer(wave, s))
            exponent = (primitive + s**2 / (2 * time)) / (2 * kappa)
            weight = np.exp(exponent.min(1, keepdims=True) - exponent)
            out[sample, frame] = mean + (weight @ s) / (time * weight.sum(1))
    return out


def _hllc(left: jax.Array, right: jax.Array, gamma: float) -> jax.Array:
    """Flux of (density, normal momentum, transverse momentum, energy) between two states (Toro, Spruce, Speares 1994).

    States are (..., 4): density, normal and transverse velocity, pressure. Waves run at min u - max c, max u + max c.
    """

    def parts(state: jax.Array) -> tuple:
        density, normal, transverse, pressure = (state[..., index] for index in range(4))
        energy = pressure / (gamma - 1) + 0.5 * density * (normal**2 + transverse**2)
        conserved = jnp.stack([density, density * normal, density * transverse, energy], -1)
        zero = jnp.zeros_like(pressure)
        flux = normal[..., None] * conserved + jnp.stack([zero, pressure, zero, pressure * normal], -1)
        return density, normal, transverse, pressure, energy, conserved, flux

    density_l, normal_l, _, pressure_l, _, _, flux_l = a = parts(left)
    density_r, normal_r, _, pressure_r, _, _, flux_r = b = parts(right)
    sound = jnp.maximum(jnp.sqrt(gamma * pressure_l / density_l), jnp.sqrt(gamma * pressure_r / density_r))
    slow, fast = jnp.minimum(normal_l, normal_r) - sound, jnp.maximum(normal_l, normal_r) + sound
    push_l, push_r = density_l * (slow - normal_l), density_r * (fast - normal_r)
    middle = (pressure_r - pressure_l + push_l * normal_l - push_r * normal_r) / (push_l - push_r)

    def star(side: tuple, speed: jax.Array, push: jax.Array) -> jax.Array:
        density, normal, transverse, pressure, energy, conserved, flux = side
        compressed = push / (speed - middle)
        energy = energy / density + (middle - normal) * (middle + pressure / push)
        inside = compressed[..., None] * jnp.stack([jnp.ones_like(middle), middle, transverse, energy], -1)
        return flux + speed[..., None] * (inside - conserved)

    subsonic = jnp.where((middle >= 0)[..., None], star(a, slow, push_l), star(b, fast, push_r))
    return jnp.where((slow >= 0)[..., None], flux_l, jnp.where((fast <= 0)[..., None], flux_r, subsonic))


def _exchange(fields: jax.Array, axis: int) -> jax.Array:
    """The two velocities exchanged where the direction is y, so that the normal one comes first."""
    return fields if axis == 1 else fields[..., jnp.array([0, 2, 1, 3])]


def ns2d_substeps(initial: np.ndarray, interval: float, length: float = 1.0, cfl: float = 0.3, eta: float = 0.0,
                  zeta: float = 0.0, gamma: float = GAMMA) -> int:  # fmt: skip
    """Steps in `interval` for fields like the initial (B, n, n, 4): sound crosses at most `cfl` of a cell in each."""
    density, vx, vy, pressure = np.moveaxis(np.asarray(initial, np.float64), -1, 0)
    sound = np.sqrt(gamma * pressure / density)
    dx = length / initial.shape[1]
    dt = cfl * dx / np.max(np.maximum(np.abs(vx), np.abs(vy)) + sound)
    dt = min(dt, 0.25 * dx**2 / max(zeta + 4 / 3 * eta, 1e-12))
    return math.floor(interval / dt) + 1


@partial(jax.jit, static_argnames=("frames", "interval", "substeps", "length", "viscous_substeps", "gamma"))
def solve_ns2d(
    initial: jax.Array,
    eta: jax.Array | float = 0.0,
    zeta: jax.Array | float = 0.0,
    *,
    frames: int,
    interval: float,
    substeps: int,
    length: float = 1.0,
    viscous_substeps: int = 1,
    gamma: float = GAMMA,
) -> jax.Array:
    """The compressible Navier-Stokes equations on a periodic square.

    Limited slopes of the primitive fields, HLLC fluxes along both directions at once, the midpoint rule; then a step of
    viscosity along both, without the derivatives across, as PDEBench simplifies it.

    Args:
      initial: (B, n, n, 4), density, velocities along x and y, pressure.
      eta, zeta: shear and bulk viscosity over density, one or (B,).
      frames, interval, substeps: as of `solve_advection`; see `ns2d_substeps`.
      length: of the square's side.
      viscous_substeps: steps of viscosity in each step.
      gamma: ratio of specific heats.

    Returns:
      (B, frames + 1, n, n, 4).
    """
    _check_substeps(substeps, frames)
    if initial.ndim != 4 or initial.shape[-1] != 4 or initial.shape[1] != initial.shape[2]:
        raise ValueError(f"initial must be (batch, n, n, 4), got {initial.shape}")
    dx, dt = length / initial.shape[1], interval / substeps
    shear, bulk = (
        jnp.broadcast_to(jnp.asarray(value, initial.dtype), initial.shape[:1])[:, None, None] for value in (eta, zeta)
    )
    along = bulk + 4 / 3 * shear

    def conserved(w: jax.Array) -> jax.Array:
        density, vx, vy, pressure = (w[..., index] for index in range(4))
        energy = pressure / (gamma - 1) + 0.5 * density * (vx**2 + vy**2)
        return jnp.stack([density, density * vx, density * vy, energy], -1)

    def primitive(q: jax.Array) -> jax.Array:
        density, px, py, energy = (q[..., index] for index in range(4))
        pressure = (gamma - 1) * (energy - 0.5 * (px**2 + py**2) / density)
        return jnp.stack([density, px / density, py / density, pressure], -1)

    def rate(w: jax.Array) -> jax.Array:
        total = jnp.zeros_like(w)
        for axis in (1, 2):
            left, right = (_exchange(side, axis) for side in _faces(w, axis))
            flux = _exchange(_hllc(left, right, gamma), axis)
            total += (jnp.roll(flux, 1, axis) - flux) / dx
        return total

    def viscous(q: jax.Array) -> jax.Array:
        w, total = primitive(q), jnp.zeros_like(q)
        for axis in (1, 2):
            ahead = jnp.roll(w, -1, axis)
            density = (w[..., 0] + ahead[..., 0]) / 2 / dx
            zero = jnp.zeros_like(density)
            stress, work = [], zero
            for component in (1, 2):
                strength = along if component == axis else shear
                stress.append(strength * density * (ahead[..., component] - w[..., component]))
                work += 0.5 * strength * density * (ahead[..., component] ** 2 - w[..., component] ** 2)
            flux = jnp.stack([zero, *stress, work], -1)
            total += (flux - jnp.roll(flux, 1, axis)) / dx
        return q + dt / viscous_substeps * total

    def step(w: jax.Array) -> jax.Array:
        q = conserved(w)
        q = q + dt * rate(primitive(q + dt / 2 * rate(w)))
        for _ in range(viscous_substeps):
            q = viscous(q)
        return primitive(q)

    return jnp.moveaxis(_march(step, initial, frames, substeps), 0, 1)


def ns2d_initial_conditions(
    seed: int, count: int, cells: int, mach: float, *, gamma: float = GAMMA, windowed: float = 0.5
) -> np.ndarray:
    """Random fields on the unit square as PDEBench draws them: float32 (count, cells, cells, 4).

    Each variable is a sum over wave vectors |i|, |j| <= 4, i j != 0, of |k|^(-1/2) sin(k x + phase). Velocities are
    scaled to the mean speed mach sqrt(gamma T0); density and pressure are their means times 1 + delta field /
    mean|field|, with delta U(0.01, 0.2), density U(0.1, 10), T0 U(0.1, 10), pressure density T0. A share `windowed` of
    the samples is that only within a smooth square, and at rest outside it.
    """
    if mach <= 0:
        raise ValueError(f"mach must be positive, got {mach}")
    rng = np.random.default_rng(seed)
    x = centres(cells)
    waves = [(i, j) for i in range(-4, 5) for j in range(-4, 5) if i * j]
    fields = np.zeros((count, 4, cells, cells))
    for i, j in waves:
        phase = rng.uniform(0, 2 * np.pi, (count, 4, 1, 1))
        size = (2 * np.pi * math.hypot(i, j)) ** -0.5
        fields += size * np.sin(2 * np.pi * (i * x[:, None] + j * x[None]) + phase)
    density, temperature = (rng.uniform(0.1, 10, (count, 1, 1)) for _ in range(2))
    delta = rng.uniform(0.01, 0.2, (count, 2, 1, 1))
    speed = np.sqrt(fields[:, 1] ** 2 + fields[:, 2] ** 2).mean((1, 2), keepdims=True)
    velocity = fields[:, 1:3] * (mach * np.sqrt(gamma * temperature) / speed)[:, None]
    rough = fields[:, [0, 3]] / np.abs(fields[:, [0, 3]]).mean((2, 3), keepdims=True) * delta
    low, high = rng.uniform(0.1, 0.45, (count, 2, 1)), rng.uniform(0.55, 0.9, (count, 2, 1))
    edges = 0.5 * (np.tanh((x - low) / 0.01) - np.tanh((x - high) / 0.01))
    window = edges[:, 0, :, None] * edges[:, 1, None, :]
    window = np.where((rng.random(count) < windowed)[:, None, None], window, 1.0)
    # A perturbation beyond the mean itself would make a density negative.
    rough = np.maximum(rough * window[:, None], -0.9)
    w = [density * (1 + rough[:, 0]), *np.moveaxis(velocity * window[:, None], 1, 0)]
    return np.stack([*w, density * temperature * (1 + rough[:, 1])], -1).astype(np.float32)


def isentropic_vortex(cells: int, length: float = 10.0, strength: float = 5.0, flow: tuple[float, float] = (1.0, 1.0),
                      gamma: float = GAMMA) -> np.ndarray:  # fmt: skip
    """A vortex that the flow without viscosity only carries along: float64 (cells, cells, 4) (Shu 1998)."""
    x = centres(cells, length) - length / 2
    x, y = np.meshgrid(x, x, indexing="ij")
    square = x**2 + y**2
    swirl = strength / (2 * np.pi) * np.exp((1 - square) / 2)
    temperature = 1 - (gamma - 1) * strength**2 / (8 * gamma * np.pi**2) * np.exp(1 - square)
    density = temperature ** (1 / (gamma - 1))
    return np.stack([density, flow[0] - swirl * y, flow[1] + swirl * x, density**gamma], -1)


def translated(fields: np.ndarray, shift: Sequence[float], length: float = 1.0) -> np.ndarray:
    """Periodic fields (n, n, C) moved by a distance along each direction, by their Fourier series."""
    spectrum = np.fft.fft2(fields, axes=(0, 1))
    waves = [2 * np.pi * np.fft.fftfreq(n, length / n) for n in fields.shape[:2]]
    turn = np.exp(-1j * (waves[0][:, None] * shift[0] + waves[1][None] * shift[1]))
    return np.fft.ifft2(spectrum * turn[..., None], axes=(0, 1)).real


class Solutions(NamedTuple):
    """Frames of several samples of one equation with the same parameters."""

    solution: np.ndarray  # float32 (N, T, nx[, ny], C)
    parameters: np.ndarray  # float32 (P,)
    times: np.ndarray  # (T,)


def read_pdebench(
    path: str | pathlib.Path, *, space_stride: int = 1, time_stride: int = 1, samples: int | None = None
) -> Solutions:
    """Reads one of PDEBench's HDF5 files; the parameters are its numeric attributes, in the order stored.

    Scalar equations: `tensor` (sample, time, x); the published recipe takes each 8th of 1024 cells and each 5th of 201
    frames. Compressible flow: `density`, `pressure`, `Vx`, `Vy` (sample, time, x[, y[, z]]), here in the order density,
    pressure, Vx, Vy (without Vy on a line).

    Args:
      path: of the file.
      space_stride, time_stride: which cells and frames are kept, from the first on.
      samples: how many are read; None is all.

    Raises:
      ModuleNotFoundError: h5py is not installed.
      FileNotFoundError: there is no such file.
      ValueError: the file is no such file, or holds no parameter.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading PDEBench's files needs h5py: pip install 'zoo[hdf5]'") from None
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if min(space_stride, time_stride) < 1:
        raise ValueError(f"strides must be at least 1, got {space_stride}, {time_stride}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is damaged, or not an HDF5 file: {error}") from None
    with file:
        if "tensor" in file:
            names = ["tensor"]
        else:
            names = [name for name in ("density", "pressure", "Vx", "Vy", "Vz") if name in file]
            if names[:3] != ["density", "pressure", "Vx"]:
                raise ValueError(
                    f"{path} holds neither tensor nor density, pressure, Vx: {', '.join(file) or 'nothing'}"
                )
        dims = file[names[0]].ndim - 2
        kept = (slice(samples), slice(None, None, time_stride), *(slice(None, None, space_stride),) * dims)
        solution = np.stack([file[name][kept] for name in names], -1).astype(np.float32)
        values = [np.ravel(value) for value in file.attrs.values() if np.issubdtype(np.asarray(value).dtype, np.number)]
        if not values:
            raise ValueError(f"{path} has no numeric attribute, from which the equation's parameters are read")
        frames = file[names[0]].shape[1]
        times = file["t-coordinate"][:frames:time_stride] if "t-coordinate" in file else np.arange(solution.shape[1])
    return Solutions(solution, np.concatenate(values).astype(np.float32), np.asarray(times, np.float64))

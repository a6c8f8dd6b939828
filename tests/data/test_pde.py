import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.data import pde

WAVES = pde.Waves(
    2 * np.pi * np.array([[1, 2], [3, 1]]), np.array([[0.7, 0.3], [0.4, 0.5]]), np.array([[0.2, 4], [1, 2]])
)


def relative(ours, exact):
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def orders(errors):
    """Of convergence, from the errors of grids each twice as fine as the last."""
    return [np.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def test_advection_converges_to_the_translated_field():
    beta, errors = np.array([1.0, -0.7]), []
    for cells in (64, 128, 256):
        x = pde.centres(cells)
        substeps = pde.advection_substeps(1.0, cells, 0.5)
        ours = pde.solve_advection(jnp.asarray(WAVES(x)), beta, frames=2, interval=0.5, substeps=substeps)
        exact = pde.advection_exact(WAVES, beta, x, (0.0, 0.5, 1.0))
        np.testing.assert_allclose(ours.sum(2), exact.sum(2), atol=1e-3)  # nothing is lost
        errors.append(relative(ours[:, 2], exact[:, 2]))
    # The limiter clips extrema, which costs a little of the second order.
    assert min(orders(errors)) > 1.5 and errors[1] < 0.03, errors


@pytest.mark.parametrize("nu", [0.02, 0.1])
def test_burgers_converges_to_cole_and_hopf(nu):
    waves = WAVES._replace(wavenumber=2 * np.pi * np.array([[1, 0], [2, 1]]))  # one with a mean
    errors = []
    for cells in (32, 64, 128):
        x = pde.centres(cells)
        substeps = pde.burgers_substeps(1.0, nu, cells, 0.25)
        ours = pde.solve_burgers(jnp.asarray(waves(x)), nu, frames=2, interval=0.25, substeps=substeps)
        exact = pde.burgers_cole_hopf(waves, np.full(2, nu), x, (0, 0.25, 0.5), points=8000)
        errors.append(relative(ours[:, 2], exact[:, 2]))
    assert min(orders(errors)) > 1.5 and errors[2] < 0.01, errors


def test_exact_diffusion_takes_fewer_steps_to_the_same_field():
    x, nu = pde.centres(128), np.array([0.4, 2.0])
    exact = pde.burgers_cole_hopf(WAVES, nu, x, (0.0, 0.1))
    ours = pde.solve_burgers(jnp.asarray(WAVES(x)), nu, frames=1, interval=0.1, substeps=60, diffusion="spectral")
    assert pde.burgers_substeps(1.0, 2.0, 128, 0.1) > 4000
    assert relative(ours[:, 1], exact[:, 1]) < 0.01


def test_cole_and_hopf_solve_the_equation():
    x, nu, dt = pde.centres(64), np.array([0.5]), 1e-3
    waves = pde.Waves(*(field[:1] for field in WAVES[:3]))
    before, u, after = pde.burgers_cole_hopf(waves, nu, x, (0.05 - dt, 0.05, 0.05 + dt))[0]
    wave = 2j * np.pi * np.fft.rfftfreq(64, 1 / 64)
    slope, curvature = (np.fft.irfft(wave**power * np.fft.rfft(u)) for power in (1, 2))
    np.testing.assert_allclose((after - before) / (2 * dt), -u * slope + nu / np.pi * curvature, atol=2e-3)


def test_a_vortex_is_carried_along():
    errors = []
    for cells in (32, 64):
        start = pde.isentropic_vortex(cells)
        substeps = pde.ns2d_substeps(start[None], 0.5, length=10.0)
        ours = pde.solve_ns2d(
            jnp.asarray(start[None], jnp.float32), frames=1, interval=0.5, substeps=substeps, length=10.0
        )[0, 1]
        exact = pde.translated(start, (0.5, 0.5), 10.0)
        np.testing.assert_allclose(ours[..., 0].mean(), start[..., 0].mean(), rtol=1e-5)  # mass
        errors.append(float(np.sqrt(np.mean((np.asarray(ours) - exact) ** 2))))
    assert orders(errors)[0] > 1.7, errors


def test_a_sound_pulse_runs_likewise_along_both_axes():
    start = np.ones((1, 16, 16, 4), np.float32)
    start[..., 1:3] = 0.2
    start[0, 5, :, 3] = start[0, 5, :, 0] = 1.2
    solve = lambda fields: pde.solve_ns2d(fields, 0.05, 0.02, frames=1, interval=0.05, substeps=8)[0, 1]  # noqa: E731
    along_x, along_y = solve(jnp.asarray(start)), solve(jnp.asarray(start.swapaxes(1, 2)))
    np.testing.assert_allclose(along_x, along_y.swapaxes(0, 1)[..., jnp.array([0, 2, 1, 3])], atol=1e-5)


def test_viscosity_damps_shear_at_its_rate():
    cells, eta, time = 32, 0.02, 0.1
    x = pde.centres(cells)
    start = np.ones((1, cells, cells, 4), np.float32) * np.array([1, 0, 0, 50.0], np.float32)
    start[0, ..., 1] = 0.01 * np.sin(2 * np.pi * x)[None]  # velocity along x that varies along y
    ours = pde.solve_ns2d(jnp.asarray(start), eta, 0.0, frames=1, interval=time, substeps=120)[0, 1]
    decay = np.abs(ours[..., 1]).max() / 0.01
    assert decay == pytest.approx(np.exp(-eta * (2 * np.pi) ** 2 * time), rel=0.01)


def test_initial_fields_are_drawn_as_in_pdebench():
    waves = pde.pdebench_initial_conditions(0, 4000)
    still = (waves.wavenumber == 0).sum(1)
    assert set(still) == {2, 3}  # two modes drawn, or one twice; the others are constants
    assert np.mean(still == 3) == pytest.approx(0.25, abs=0.03)
    assert waves.wavenumber.max() == pytest.approx(2 * 4 * 2 * np.pi)
    assert waves.absolute.mean() == pytest.approx(0.1, abs=0.02)
    assert np.isfinite(waves.window[:, 0]).mean() == pytest.approx(0.1, abs=0.02)
    assert abs(waves.sign.mean()) < 0.06
    x = pde.centres(64)
    u = waves(x)
    assert np.abs(u.mean(1)).mean() > 0.2
    cut = np.isfinite(waves.window[:, 0])
    assert np.abs(u[cut][:, [0, 1, -2, -1]]).max() < 0.01  # nothing is left at the ends
    plain = waves._replace(absolute=None, sign=None, window=None)
    chosen = waves.absolute & ~cut
    np.testing.assert_allclose(u[chosen], waves.sign[chosen, None] * np.abs(plain(x)[chosen]))


def test_initial_flows_have_their_mach_number():
    fields = pde.ns2d_initial_conditions(0, 6, 32, 0.3, windowed=0.0)
    density, vx, vy, pressure = np.moveaxis(fields, -1, 0)
    assert fields.shape == (6, 32, 32, 4) and density.min() > 0 and pressure.min() > 0
    sound = np.sqrt(pde.GAMMA * pressure.mean((1, 2)) / density.mean((1, 2)))
    np.testing.assert_allclose(np.hypot(vx, vy).mean((1, 2)) / sound, 0.3, rtol=0.02)
    windowed = pde.ns2d_initial_conditions(0, 4, 32, 0.3, windowed=1.0)
    assert np.abs(windowed[:, 0, :, 1:3]).max() < 1e-3 * np.abs(windowed[..., 1:3]).max()


def test_pdebench_files_are_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    field = rng.normal(size=(3, 11, 32)).astype(np.float32)
    with h5py.File(tmp_path / "line.hdf5", "w") as file:
        file["tensor"], file["t-coordinate"] = field, np.arange(12) / 10
        file.attrs["beta"] = 0.4
    found = pde.read_pdebench(tmp_path / "line.hdf5", space_stride=8, time_stride=5, samples=2)
    np.testing.assert_array_equal(found.solution[..., 0], field[:2, ::5, ::8])
    np.testing.assert_allclose(found.times, [0, 0.5, 1.0])
    assert found.parameters == pytest.approx([0.4])
    flow = rng.normal(size=(4, 2, 3, 8, 8)).astype(np.float32)
    with h5py.File(tmp_path / "plane.hdf5", "w") as file:
        for name, values in zip(("density", "pressure", "Vx", "Vy"), flow, strict=True):
            file[name] = values
        file.attrs.update({"M": 0.1, "eta": 0.01, "zeta": 0.02})
    found = pde.read_pdebench(tmp_path / "plane.hdf5")
    np.testing.assert_array_equal(found.solution, np.moveaxis(flow, 0, -1))
    assert sorted(found.parameters) == pytest.approx([0.01, 0.02, 0.1])
    (tmp_path / "bad.hdf5").write_bytes(b"no such format")
    with pytest.raises(ValueError, match="damaged, or not an HDF5 file"):
        pde.read_pdebench(tmp_path / "bad.hdf5")
    with pytest.raises(FileNotFoundError, match="no such file"):
        pde.read_pdebench(tmp_path / "none.hdf5")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["velocity"] = np.zeros(3)
    with pytest.raises(ValueError, match="neither tensor nor density, pressure, Vx: velocity"):
        pde.read_pdebench(tmp_path / "other.hdf5")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pde.solve_advection(jnp.zeros(8), 1.0, frames=1, interval=1.0, substeps=1), "u0 must be"),
        (lambda: pde.solve_advection(jnp.zeros((2, 8)), np.zeros(3), frames=1, interval=1.0, substeps=1), "each of 2"),
        (lambda: pde.solve_burgers(jnp.zeros((2, 8)), 1.0, frames=1, interval=1.0, substeps=0), "step between two"),
        (lambda: pde.solve_ns2d(jnp.zeros((1, 8, 4, 4)), frames=1, interval=1.0, substeps=1), r"\(batch, n, n, 4\)"),
        (lambda: pde.burgers_cole_hopf(WAVES, np.array([0.0, 1]), pde.centres(8), (0, 1)), "nu must be positive"),
        (lambda: pde.ns2d_initial_conditions(0, 1, 8, 0.0), "mach must be positive"),
        (lambda: pde.burgers_cole_hopf(pde.pdebench_initial_conditions(0, 1), np.ones(1), np.ones(8), (0,)), "plain"),
    ],
)  # fmt: skip
def test_wrong_input_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

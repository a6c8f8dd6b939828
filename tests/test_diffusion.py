"""Diffusion by noise levels: what is known in closed form for Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.diffusion import EDM, adpm2_inpaint, adpm2_sample, adpm2_step, guided_batch, karras_schedule

SIGMA_DATA = 0.4


def ideal(x, sigma):
    """The posterior mean of x ~ N(0, SIGMA_DATA^2)."""
    return SIGMA_DATA**2 / (SIGMA_DATA**2 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2) * x


def test_a_silent_network_is_the_ideal_denoiser_of_gaussian_data():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    sigma = jnp.array([0.1, 1.0, 7.0])
    found = EDM(SIGMA_DATA).denoise(lambda x, _: jnp.zeros_like(x), x, sigma)
    np.testing.assert_allclose(found, ideal(x, sigma), rtol=1e-6)


def test_the_networks_input_has_unit_variance_and_a_quarter_of_the_logarithm():
    seen = {}
    sigma = jnp.full(4, 2.0)
    x = SIGMA_DATA * jax.random.normal(jax.random.key(0), (4, 4000))
    noisy = x + 2 * jax.random.normal(jax.random.key(1), x.shape)
    EDM(SIGMA_DATA).denoise(lambda x, time: seen.update(x=x, time=time) or x, noisy, sigma)
    assert float(jnp.std(seen["x"])) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(seen["time"], np.log(2) / 4, rtol=1e-6)


@pytest.mark.parametrize("level", [0.05, 3.0])
def test_weighted_losses_of_a_silent_network_are_one_at_every_level(level):
    edm, sigma = EDM(SIGMA_DATA), jnp.full(50, level)
    x = SIGMA_DATA * jax.random.normal(jax.random.key(0), (50, 400))
    noisy = x + level * jax.random.normal(jax.random.key(1), x.shape)
    assert float(edm.loss(ideal(noisy, sigma), x, sigma)) == pytest.approx(1, abs=0.03)


def test_training_levels_are_log_normal():
    logs = np.log(EDM(0.5, -1.2, 0.7).draw_sigma(jax.random.key(0), 5000))
    assert logs.mean() == pytest.approx(-1.2, abs=0.05)
    assert logs.std() == pytest.approx(0.7, abs=0.03)


def test_the_schedule_is_linear_in_the_root_and_ends_with_zero():
    levels = karras_schedule(6, 0.001, 9.0, 3.0)
    assert len(levels) == 7 and levels[-1] == 0
    np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 3)), (0.1 - 9 ** (1 / 3)) / 5, rtol=1e-4)
    with pytest.raises(ValueError, match="2 steps"):
        karras_schedule(1, 0.001, 9.0)


def test_samples_have_the_datas_spread():
    levels = karras_schedule(40, 0.001, 9.0, 3.0)[:-1]
    found = jax.jit(lambda x, key: adpm2_sample(ideal, x, levels, key))(
        jax.random.normal(jax.random.key(0), (1, 20_000)), jax.random.key(1)
    )
    assert float(jnp.std(found)) == pytest.approx(SIGMA_DATA, rel=0.03)


def test_a_steps_parts_add_up_to_the_next_level():
    """Denoised to 0, a Gaussian of spread sigma becomes one of the next: down^2 + up^2 = next^2."""
    x = 2.0 * jax.random.normal(jax.random.key(0), (1, 50_000))
    found = adpm2_step(lambda x, _: jnp.zeros_like(x), x, 2.0, 1.5, jax.random.normal(jax.random.key(1), x.shape))
    assert float(jnp.std(found)) == pytest.approx(1.5, rel=0.02)


def test_sampling_stops_at_the_last_level():
    levels = np.array([5.0, 1.0, 0.1])
    calls = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: calls.append(float(s[0])), sigma)
        return jnp.zeros_like(x)

    found = adpm2_sample(denoise, jnp.ones((1, 2)), levels, jnp.zeros((2, 1, 2)))
    jax.effects_barrier()
    assert len(calls) == 4 and min(calls) > 0.05
    assert float(jnp.abs(found).max()) < 0.1


def test_inpainting_of_nothing_is_sampling():
    levels = karras_schedule(4, 0.01, 5.0)[:-1]
    noise = jax.random.normal(jax.random.key(0), (3, 2, 2, 6))
    start = jax.random.normal(jax.random.key(1), (2, 6))
    found = adpm2_inpaint(ideal, jnp.zeros((2, 6)), jnp.zeros((2, 6), bool), start, levels, noise)
    np.testing.assert_allclose(found, adpm2_sample(ideal, start, levels, noise[:, 1]), rtol=1e-6)


@pytest.mark.parametrize("resamples", [1, 3])
def test_what_is_kept_comes_back_unchanged(resamples):
    levels = karras_schedule(5, 0.01, 5.0)[:-1]
    source = jax.random.normal(jax.random.key(0), (2, 6))
    keep = jnp.arange(6)[None] < jnp.array([[2], [5]])
    found = adpm2_inpaint(ideal, source, keep, source[::-1], levels, jax.random.key(2), resamples)
    np.testing.assert_array_equal(np.where(keep, found, 0), np.where(keep, source, 0))
    assert float(jnp.abs(jnp.where(keep, 1, found - source)).min()) > 0


def test_guidance_by_one_pass_is_that_of_two():
    def network(x):
        return x * jnp.concatenate([jnp.full((2, 1), 3.0), jnp.full((2, 1), 5.0)])

    x = jnp.ones((2, 4))
    np.testing.assert_allclose(guided_batch(network, x, 2.0), 5 + 2 * (3 - 5))


@pytest.mark.parametrize(
    ("levels", "noise"), [(np.array([1.0, 2.0]), jnp.zeros((1, 1, 2))), (np.array([2.0, 1.0]), jnp.zeros((2, 1, 2)))]
)
def test_wrong_levels_and_noise_are_refused(levels, noise):
    with pytest.raises(ValueError, match="must"):
        adpm2_sample(ideal, jnp.zeros((1, 2)), levels, noise)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="sigma_data"):
        EDM(0.0)
    with pytest.raises(ValueError, match="resample"):
        adpm2_inpaint(ideal, jnp.zeros((1, 2)), jnp.zeros((1, 2), bool), jnp.zeros((1, 2)), np.array([2.0, 1.0]),
                      jax.random.key(0), 0)  # fmt: skip

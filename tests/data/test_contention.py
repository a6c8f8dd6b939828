import numpy as np
import pytest

from zoo.data import contention


@pytest.fixture(scope="module")
def runs():
    return contention.simulate_contention(200)


def test_runs_are_what_the_sheet_of_the_simulator_says(runs):
    assert runs.x.shape == (200, 120, 206) and np.isfinite(runs.x).all()
    assert (runs.performance > 0).all() and (runs.performance <= 1).all() and runs.performance.std() > 0.1
    assert runs.length.min() >= 40 and not runs.x[np.arange(120) >= runs.length[:, None]].any()
    again = contention.simulate_contention(200)
    np.testing.assert_array_equal(again.x, runs.x)


def test_machines_alone_are_not_slowed():
    latents, performance, valid, _ = contention._simulate(200, np.random.default_rng(0), np.ones(200, bool))
    neighbours = latents[..., contention.LATENTS.index("neighbours")]
    # A cache demand beyond the host's 20 MB is the only thing left that slows a machine of its own.
    alone = ~(neighbours * valid).any(1) & (latents[..., contention.LATENTS.index("cache demand")].max(1) < 20)
    assert alone.sum() > 10
    np.testing.assert_allclose(performance[alone], 1)
    assert performance[~alone].mean() < 0.95


def test_static_neighbours_stay():
    latents, _, _, _ = contention._simulate(50, np.random.default_rng(0), np.zeros(50, bool))
    count = latents[..., contention.LATENTS.index("neighbours")]
    assert (count == count[:, :1]).all()


def test_whole_applications_are_held_out(runs):
    seen, unseen = contention.hold_out(runs)
    assert not set(runs.application[seen]) & set(runs.application[unseen])
    assert len(seen) + len(unseen) == 200 and len(set(runs.application[unseen])) == 6
    with pytest.raises(ValueError, match=r"unseen must be in 1 \.\. 23"):
        contention.hold_out(runs, 24)


def test_coarser_keeps_means_and_shuffling_keeps_distributions(runs):
    coarse, mixed = contention.coarser(runs, 10), contention.shuffled(runs)
    length = runs.length[0]
    np.testing.assert_allclose(coarse.x[0, :length].mean(0), runs.x[0, :length].mean(0), atol=1e-4)
    assert (coarse.x[0, :10] == coarse.x[0, 0]).all()
    np.testing.assert_array_equal(np.sort(mixed.x[0], 0), np.sort(runs.x[0], 0))
    assert (mixed.x[0, :length] != runs.x[0, :length]).any()


def test_statistics_leave_padding_out(runs):
    found = contention.summary_statistics(runs.x[:2], runs.length[:2])
    assert found.shape == (2, 618)
    np.testing.assert_allclose(found[1, :206], runs.x[1, : runs.length[1]].mean(0), rtol=1e-5)


def test_wrong_calls_say_so():
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        contention.simulate_contention(0)
    with pytest.raises(ValueError, match=r"scenario must be one of .* got 'still'"):
        contention.simulate_contention(1, scenario="still")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import mixers
from zoo.papers import pavlovian


@pytest.fixture(scope="module")
def indices():
    """Phenomena of five rules, for orthogonal stimuli."""
    stimuli, outcome = jnp.eye(3, 8), jnp.eye(1, 4)[0]
    rules = ("hebb", "hebb_decay", "delta", "gated_delta", "oja")
    return {rule: pavlovian.phenomena(pavlovian.run_protocols(rule, stimuli, outcome)) for rule in rules}


def test_error_correction_shows_what_rescorla_and_wagner_predict(indices):
    delta = indices["delta"]
    learned = 1 - 0.8**20  # of the asymptote, after 20 trials with step 0.2
    assert delta["acquisition"] == pytest.approx(learned, abs=1e-5)
    assert delta["extinction"] == pytest.approx(learned, abs=1e-5)
    assert delta["blocking"] > 0.95
    assert delta["overshadowing"] == pytest.approx(0.5, abs=0.01)
    assert delta["conditioned_inhibition"] > 0.5
    assert delta["overexpectation"] == pytest.approx(0.5, abs=0.02)
    assert delta["latent_inhibition"] == pytest.approx(0, abs=1e-5) and abs(delta["savings"]) < 0.01


def test_contiguity_shows_none_of_it(indices):
    hebb = indices["hebb"]
    for name in ("extinction", "blocking", "overshadowing", "conditioned_inhibition", "latent_inhibition"):
        assert hebb[name] == pytest.approx(0, abs=1e-5), name
    assert hebb["overexpectation"] < 0  # weights only grow
    # Decay alone forgets, whatever is presented: less than a tenth of what unlearning takes away.
    assert 0.3 < indices["hebb_decay"]["extinction"] < 0.4 < indices["gated_delta"]["extinction"]


def test_conditioning_reaches_across_a_gap_with_a_trace_only():
    """A stimulus g trials before its outcome: an association of strength trace_decay^g."""
    gap, decay = 3, 0.7
    key = jnp.zeros((1, gap + 1, 1, 4)).at[0, 0, 0, 0].set(1)
    value = jnp.zeros((1, gap + 1, 1, 2)).at[0, gap, 0, 0].set(1)
    query = jnp.broadcast_to(key[:, :1], key.shape)
    for rule, strength in (("trace", decay**gap), ("hebb", 0.0), ("delta", 0.0)):
        y, _ = pavlovian.learning_rule(rule, query, key, value, jnp.ones((1, gap + 1, 1)), trace_decay=decay)
        np.testing.assert_allclose(y[0, -1, 0], [strength, 0], atol=1e-6)


def test_repeated_presentation_stores_as_many_pairs_as_keys_have_dimensions():
    width, times = 8, 300
    keys, values = (jax.random.normal(rng, (width, width)) for rng in jax.random.split(jax.random.key(2)))
    keys /= jnp.linalg.norm(keys, axis=1, keepdims=True)
    key, value = (jnp.tile(x, (times, 1))[None, :, None] for x in (keys, values))
    _, state = pavlovian.learning_rule("delta", key, key, value, jnp.full(key.shape[:3], 0.9))
    np.testing.assert_allclose(keys @ state.memory[0, 0], values, atol=1e-3)


def test_capacity_is_what_counting_gives():
    keys, values = jnp.array([[2.0, 0], [1, 1], [0, 3]]), jnp.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    curve = pavlovian.capacity_curve(keys, values, [2, 3])
    half = 0.5**0.5  # overlap of neighbouring keys
    np.testing.assert_allclose(curve.coherence, [half, half], rtol=1e-6)
    np.testing.assert_allclose(curve.max_interference, [half, 1], rtol=1e-6)
    np.testing.assert_allclose(curve.aligned_interference, [half, 2 * half], rtol=1e-6)
    np.testing.assert_allclose(curve.signal_to_noise, [2, 1.5], rtol=1e-5)
    np.testing.assert_allclose(curve.accuracy, [1, 1])


def test_bounds_are_of_the_stated_orders():
    small, large = (pavlovian.capacity_bounds(width, 0.5) for width in (256, 256 * 64))
    assert 4 < large.worst_case / small.worst_case < 8  # sqrt(64), bent by the logarithm
    assert large.mean / small.mean == pytest.approx(64, rel=0.02)
    assert large.delta == 256 * 64


def test_reliability_is_what_chance_does():
    layers, heads, failure = 3, 5, 0.3
    broken = np.random.default_rng(0).uniform(size=(200_000, layers, heads)) < failure
    exact = {mode: pavlovian.reliability(layers, heads, failure, mode) for mode in ("single", "any_head", "majority")}
    measured = {
        "single": (~broken[..., 0]).all(1).mean(),
        "any_head": (~broken.all(2)).all(1).mean(),
        "majority": ((~broken).sum(2) > heads / 2).all(1).mean(),
    }
    for mode, value in exact.items():
        assert measured[mode] == pytest.approx(value, abs=4 * (value * (1 - value) / 200_000) ** 0.5)
    needed = pavlovian.heads_needed(12, 0.2, 0.01)
    assert (1 - 0.2**needed) ** 12 == pytest.approx(0.99)
    assert pavlovian.heads_needed(24, 0.2, 0.01) - needed == pytest.approx(np.log(2) / np.log(5), rel=0.01)


def test_a_layer_as_conditioning_answers_with_its_memory():
    mixer = mixers.create("pavlovian", features=8, heads=2, rule="delta")
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    variables = random_parameters(mixer, x)
    seen = pavlovian.as_conditioning(mixer, variables, x)
    assert seen.test.shape == seen.conditional.shape == seen.unconditional.shape == (1, 5, 2, 4)
    np.testing.assert_allclose(jnp.linalg.norm(seen.conditional, axis=-1), 1, rtol=1e-4)
    _, state = mixer.apply(variables, x, mixer.init_state(1, 5))
    np.testing.assert_allclose(seen.memory, state.rules.memory.swapaxes(2, 3), atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pavlovian.schedule("pavlov", 3), "unknown protocol 'pavlov'"),
        (lambda: pavlovian.schedule("blocking", 0), "trials_per_phase must be at least 1, got 0"),
        (lambda: pavlovian.run_protocols("delta", jnp.ones((2, 4)), jnp.ones(3)), r"stimuli must be \(3, Dk\)"),
        (lambda: pavlovian.phenomena({}), "responses lack the protocols acquisition, blocking"),
        (lambda: pavlovian.capacity_curve(jnp.ones((3, 2)), jnp.ones((3, 2)), [4]), r"sizes must be in 2 \.\. 3"),
        (lambda: pavlovian.reliability(1, 1, 0.5, "most"), "unknown mode 'most'"),
        (lambda: pavlovian.heads_needed(1, 0.0, 0.5), r"failure and delta in \(0, 1\)"),
        (lambda: zoo.create("pavlovian_lm_tiny", mixer_options={"rule": "hebbian"}), "unknown learning rule"),
        (lambda: zoo.create("pavlovian_lm_tiny", mixer_options={"rule": ("delta",)}), "one for each of 4 heads"),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

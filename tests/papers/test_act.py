import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parameters import random_parameters
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.papers import act
from zoo.probing import probe

_SMALL = {"vocab_size": 31, "features": 24, "layers": 3, "heads": 4, "mlp_features": 40, "max_length": 32}
MODELS = {
    "llama": DecoderLM(DecoderConfig.preset("smollm2_135m", **_SMALL, key_heads=2)),
    "gpt2": DecoderLM(DecoderConfig.preset("gpt2", **_SMALL)),
    "mistral": DecoderLM(DecoderConfig.preset("mistral_7b", **_SMALL | {"key_heads": 2, "window": 5})),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 31)
every_family = pytest.mark.parametrize("family", MODELS)
_VARIABLES = {name: random_parameters(model, TOKENS) for name, model in MODELS.items()}


def every_head(model, layers=None):
    heads = jnp.zeros((model.config.layers, 1, model.config.heads), bool)
    return heads.at[jnp.arange(model.config.layers) if layers is None else jnp.asarray(layers)].set(True)


@every_family
def test_column_means_are_those_of_the_map(family):
    model, variables = MODELS[family], _VARIABLES[family]
    names = [f"pattern.{layer}" for layer in range(3)]
    maps = probe(model, variables, {"tokens": TOKENS}, names).sites
    found = act.sink_statistics(model, variables, TOKENS, threshold=0.2)
    for layer, name in enumerate(names):
        expected = maps[name].sum(2) / (11 - jnp.arange(11))
        np.testing.assert_allclose(found.column_mean[layer], expected, atol=1e-5)
    np.testing.assert_array_equal(found.sinks, found.column_mean > 0.2)
    assert (found.first_sink == jnp.where(found.sinks.any(-1), found.sinks.argmax(-1), -1)).all()


@every_family
@pytest.mark.parametrize("spare", [True, False])
def test_the_fused_rule_is_the_rule_on_the_map(family, spare):
    """One layer calibrated: its heads' outputs are the edited map times the values."""
    model, variables = MODELS[family], _VARIABLES[family]
    seen = probe(model, variables, {"tokens": TOKENS}, ["pattern.1", "v.1"]).sites
    changed, _, sinks = act.calibrate_attention(seen["pattern.1"], [0, 2], beta=0.3, threshold=0.15, spare=spare)
    np.testing.assert_allclose(changed.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(changed[:, 1], seen["pattern.1"][:, 1])
    assert sinks[:, :, 1:].any() and jnp.abs(changed - seen["pattern.1"]).max() > 0.01
    values = jnp.repeat(seen["v.1"], 4 // seen["v.1"].shape[2], axis=2)
    expected = probe(
        model, variables, {"tokens": TOKENS}, ["norm_final"],
        {"z.1": jnp.einsum("bhts,bshd->bthd", changed, values)},
    ).sites["norm_final"]  # fmt: skip
    heads = jnp.zeros((3, 1, 4), bool).at[1, 0, jnp.array([0, 2])].set(True)
    ours = act.calibrated(model, variables, TOKENS, act.Calibration(heads, 0.3, 0.15, spare_first=spare))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@every_family
def test_padding_changes_nothing(family):
    model, variables = MODELS[family], _VARIABLES[family]
    calibration = act.Calibration(every_head(model), 0.3, 0.15)
    alone = act.calibrated(model, variables, TOKENS[:1, :7], calibration)
    valid = jnp.array([[True] * 7 + [False] * 4, [True] * 11])
    together = act.calibrated(model, variables, TOKENS, calibration, valid)
    np.testing.assert_allclose(together[:1, :7], alone, atol=1e-4)
    statistics = act.sink_statistics(model, variables, TOKENS, valid)
    np.testing.assert_allclose(
        statistics.column_mean[:, :1, :, :7],
        act.sink_statistics(model, variables, TOKENS[:1, :7]).column_mean,
        atol=1e-5,
    )
    assert not statistics.sinks[:, 0, :, 7:].any()


def test_nothing_changes_without_heads_sinks_or_with_beta_one():
    model, variables = MODELS["llama"], _VARIABLES["llama"]
    plain = model.apply(variables, TOKENS, method=DecoderLM.hidden)[0]
    for calibration in (
        act.Calibration(jnp.zeros((3, 1, 4), bool)),
        act.Calibration(every_head(model), threshold=1.1),
        act.Calibration(every_head(model), beta=1.0, threshold=0.1),
    ):
        np.testing.assert_allclose(act.calibrated(model, variables, TOKENS, calibration), plain, atol=2e-5)


def test_the_first_sink_is_spared_whichever_it_is():
    sinks = jnp.array([[1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    expected = [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(act.spare_first(sinks), np.array(expected, bool))
    means = jnp.array([0.3, 0.2, 0.12, 0.38])
    assert act.sinks_of(means, threshold=0.15).tolist() == [True, True, False, True]
    assert act.sinks_of(means, threshold=1.0, relative=True).tolist() == [True, False, False, True]  # above 1 / 4
    valid = jnp.array([True, True, True, False])
    assert act.sinks_of(means, valid, threshold=0.75, relative=True).tolist() == [True, False, False, False]


def test_the_search_with_stored_residuals_is_brute_force():
    model, variables = MODELS["llama"], _VARIABLES["llama"]
    prompts, answers, labels = [np.asarray(TOKENS[0]), np.asarray(TOKENS[1, :8])], [0, 2], [3, 7, 11]
    found = act.search_heads(model, variables, prompts, answers, labels, beta=0.2, threshold=0.12, layers=[1, 2])
    assert (found.margin_gain[0] == 0).all() and np.abs(found.margin_gain[1:]).max() > 1e-3

    def margin(prompt, answer, heads):
        hidden = act.calibrated(model, variables, jnp.asarray(prompt)[None], act.Calibration(heads, 0.2, 0.12))
        logits = model.apply(variables, hidden[:, -1], method=DecoderLM.logits)[0, jnp.array(labels)]
        return float(logits[answer] - jnp.delete(logits, answer).max())

    for layer, head in ((1, 0), (1, 3), (2, 2)):
        only = jnp.zeros((3, 1, 4), bool).at[layer, 0, head].set(True)
        gains = [
            margin(prompt, answer, only) - margin(prompt, answer, jnp.zeros((3, 1, 4), bool))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        np.testing.assert_allclose(found.margin_gain[layer, head], np.mean(gains), atol=2e-4)
    assert found.best(1)[0] == tuple(np.unravel_index(found.margin_gain.argmax(), (3, 4)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: act.calibrate_attention(jnp.ones((1, 2, 3, 4))),
            r"attention must be \(batch, heads, tokens, tokens\)",
        ),
        (lambda: act.calibrate_attention(jnp.ones((1, 2, 3, 3)), [2]), "head 2 does not exist: there are 2"),
        (
            lambda: act.calibrated(
                MODELS["llama"], _VARIABLES["llama"], TOKENS, act.Calibration(jnp.zeros((3, 4), bool))
            ),
            r"heads must be bool \(3, 2 or 1, 4\)",
        ),
        (lambda: act.search_heads(MODELS["llama"], {}, [], [], [1]), "at least one: got 0 and 0"),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

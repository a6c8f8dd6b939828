import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import zoo
from zoo import registry
from zoo.data.time_series import Scaler, Series
from zoo.layers.dropout import Dropout
from zoo.papers import informer
from zoo.papers.informer import Informer, InformerConfig, InformerForecaster, InformerStack, config
from zoo.papers.informer.forecaster import lagged, sample, scaler
from zoo.papers.informer.layers import Distil, MultiHeadAttention, circular_convolution, sampling_sizes
from zoo.papers.informer.model import layer_config
from zoo.weights import names

SMALL = InformerConfig(seq_len=16, label_len=8, pred_len=4, d_model=16, n_heads=2, d_ff=32, factor=1)
FORECASTER = informer.ForecasterConfig(
    prediction_length=4, context_length=8, lags_sequence=(1, 3), num_time_features=2, d_model=16,
    num_static_categorical_features=1, cardinality=(3,), num_static_real_features=1, num_parallel_samples=5,
)  # fmt: skip


def made(model):
    """A small network's inputs and initial variables."""
    examples = informer.forecaster_example_inputs if isinstance(model, InformerForecaster) else informer.example_inputs
    inputs = examples(model.config, 3)
    return inputs, nn.unbox(jax.jit(model.init)(jax.random.key(0), **inputs))


@pytest.fixture(scope="module")
def small():
    model = Informer(SMALL)
    return model, *made(model)


def keys_of(model, seed=0):
    rng = np.random.default_rng(seed)
    tables = informer.sample_tables(model.config, stack=isinstance(model, InformerStack))
    lengths = [table[0] for table in tables]
    return [rng.integers(0, length, table).astype(np.int32) for length, table in zip(lengths, tables, strict=True)]


@functools.cache
def parameter_count(model):
    inputs = registry.models()["informer_etth1_m24"].example_inputs
    if isinstance(model, InformerForecaster):
        inputs = informer.forecaster_example_inputs
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs(model.config, 1)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("id", zoo.list_models("informer*"))
def test_parameter_counts_are_the_published_ones(id):
    model = zoo.create(id)
    if isinstance(model, Informer):  # the lengths have no parameters: most ids share one count
        model = zoo.create(id, seq_len=16, label_len=8, pred_len=4, factor=1)
    assert parameter_count(model) == registry.model(id).variant.parameters


def test_sample_sizes_are_the_published_ones():
    assert informer.sample_tables(zoo.create("informer_etth1_m24").config) == [(48, 12), (24, 12), (72, 15)]
    stack = dataclasses.replace(SMALL, seq_len=96, label_len=48, pred_len=48, d_layers=2, factor=5)
    lengths = [96, 48, 24, 48, 24, 24, 96, 96]
    assert [table[0] for table in informer.sample_tables(stack, stack=True)] == lengths
    assert sampling_sizes("shared", 2, 24, 24) == ((24,), 8)


def test_all_queries_active_is_canonical_attention(small):
    _, inputs, variables = small
    everything = Informer(dataclasses.replace(SMALL, factor=100))
    canonical = Informer(dataclasses.replace(SMALL, attn="full"))
    expected = jax.jit(canonical.apply)(variables, **inputs)
    got = jax.jit(everything.apply)(variables, **inputs, rngs={"sample": jax.random.key(1)})
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_keys_are_drawn_anew_in_evaluation_and_can_be_given(small):
    model, inputs, variables = small
    forward = jax.jit(model.apply)
    first, same, other = (forward(variables, **inputs, rngs={"sample": jax.random.key(s)}) for s in (1, 1, 2))
    assert (first == same).all() and (first != other).any()
    given = [forward(variables, **inputs, sample_keys=keys_of(model, seed)) for seed in (0, 0, 1)]
    assert (given[0] == given[1]).all() and (given[0] != given[2]).any()


def test_computing_the_last_steps_only_changes_nothing(small):
    model, inputs, variables = small
    short = jax.jit(model.apply)(variables, **inputs, sample_keys=keys_of(model))
    whole, maps = jax.jit(lambda: model.apply(variables, **inputs, sample_keys=keys_of(model), return_maps=True))()
    np.testing.assert_allclose(short, whole, atol=1e-5)
    assert maps["encoder_0"].weights.shape == (3, 2, 16, 16) and maps["encoder_0"].active.shape == (3, 2, 3)
    assert maps["cross_0"].weights.shape == (3, 2, 12, 8) and maps["cross_0"].active is None
    for attention_map in maps.values():
        np.testing.assert_allclose(attention_map.weights.sum(-1), 1, atol=1e-5)
    assert (np.triu(maps["decoder_0"].weights[0, 0], 1)[maps["decoder_0"].active[0, 0]] == 0).all()


def test_mix_reads_heads_by_time_memory_as_time_by_features():
    layer = dataclasses.replace(layer_config(SMALL), sampling=None)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    plain, mixed = MultiHeadAttention(layer), MultiHeadAttention(layer, mix=True)
    variables = nn.unbox(plain.init(jax.random.key(1), x, x, None, False))
    identity = variables["params"] | {"out": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    core, _ = plain.apply({"params": identity}, x, x, None, False)
    scrambled, _ = mixed.apply({"params": identity}, x, x, None, False)
    expected = np.ascontiguousarray(np.asarray(core).reshape(2, 6, 2, 8).transpose(0, 2, 1, 3)).reshape(2, 6, 16)
    np.testing.assert_allclose(scrambled, expected, atol=1e-6)


def test_circular_convolution_wraps_time():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 7, 3)), jax.random.normal(jax.random.key(1), (3, 3, 5))
    wrapped = jnp.concatenate([x[:, -1:], x, x[:, :1]], axis=1)
    expected = jax.lax.conv_general_dilated(wrapped, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    np.testing.assert_allclose(circular_convolution(x, kernel, jnp.ones(5)), expected + 1, atol=1e-5)


@pytest.mark.parametrize("length", [1, 6, 7])
def test_distilling_is_convolution_norm_elu_and_max_pooling(length):
    x = jax.random.normal(jax.random.key(0), (2, length, 4))
    variables = nn.unbox(Distil().init(jax.random.key(1), x, False))
    out, changed = Distil().apply(variables, x, True, mutable=["batch_stats"])
    y = np.asarray(circular_convolution(x, **variables["params"]["conv"]))
    mean, variance = y.mean((0, 1)), y.var((0, 1))
    elu = nn.elu((y - mean) / np.sqrt(variance + 1e-5))
    expected = nn.max_pool(elu, (3,), (2,), ((1, 1),))
    assert out.shape[1] == -(-length // 2)
    np.testing.assert_allclose(out, expected, atol=2e-3 if length == 1 else 1e-4)
    np.testing.assert_allclose(changed["batch_stats"]["norm"]["mean"], 0.1 * mean, atol=1e-5)
    unbiased = y.var((0, 1), ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["norm"]["var"], 0.9 + 0.1 * unbiased, atol=1e-5)


def test_the_stack_sees_suffixes():
    model = InformerStack(dataclasses.replace(SMALL, stack_layers=(2, 1)))
    inputs, variables = made(model)
    encode = jax.jit(lambda x: model.apply(variables, x, inputs["x_mark_enc"], keys_of(model)[:-1], method="encode")[0])
    memory = encode(inputs["x_enc"])
    assert memory.shape == (3, 8 + 8, 16)
    # Its second encoder does not see the first half; the last convolved step wraps around to the start.
    changed = encode(np.concatenate([inputs["x_enc"][:, :3] + 1, inputs["x_enc"][:, 3:]], axis=1))
    assert (memory[:, :8] != changed[:, :8]).any()
    np.testing.assert_allclose(memory[:, 8:-1], changed[:, 8:-1], atol=2e-1)


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "full", "distil": False, "mix": False, "embed": "fixed"},
        {"features": "MS", "c_out": 1, "padding": 1, "embed": "learned", "freq": "t"},
        {"features": "S", "enc_in": 1, "dec_in": 1, "c_out": 1, "d_layers": 2, "activation": "relu", "freq": "d"},
    ],
)
def test_every_task_and_embedding_trains(options):
    model = Informer(dataclasses.replace(SMALL, **options))
    inputs, variables = made(model)
    batch = inputs | informer.example_targets(model.config, 3)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    rngs = {"dropout": jax.random.key(1), "sample": jax.random.key(2)}
    gradient = jax.jit(jax.grad(lambda params: informer.loss(model)(params, state, batch, rngs, True)[0]))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert jnp.isfinite(leaf).all(), path
        # A bias of keys shifts all logits of a query alike; a bias before batch norm is taken off again.
        if not any(name in jax.tree_util.keystr(path) for name in ("'key'", "'conv'")):
            assert jnp.abs(leaf).max() > 0 or "embedding" in jax.tree_util.keystr(path), path


def test_loss_in_the_units_of_the_data(small):
    model, inputs, variables = small
    batch = inputs | informer.example_targets(SMALL, 3)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
    rngs = {"sample": jax.random.key(1)}
    mean, std = np.arange(7, dtype=np.float32), np.full(7, 3, np.float32)
    plain = informer.loss(model)(params, state, batch, rngs, False)[0]
    scaled = informer.loss(model, mean, std)(params, state, batch | {"y": batch["y"] * std + mean}, rngs, False)[0]
    np.testing.assert_allclose(scaled, 9 * plain, rtol=1e-4)


def test_decoder_input_holds_known_steps_and_placeholders():
    known = np.arange(2 * 16 * 7, dtype=np.float32).reshape(2, 16, 7)
    out = informer.decoder_input(known, dataclasses.replace(SMALL, padding=1))
    assert isinstance(out, np.ndarray) and out.shape == (2, 12, 7)
    assert (out[:, :8] == known[:, 8:]).all() and (out[:, 8:] == 1).all()


def test_forecast_goes_on_where_the_series_ends(small):
    model, _, variables = small
    dates = np.datetime64("2020-01-01T00", "s") + np.arange(20) * np.timedelta64(1, "h")
    values = np.random.default_rng(0).normal(5, 2, (20, 7))
    series = Series(dates, values, tuple("abcdefg"))
    ahead, forecast = informer.forecast(model, variables, jax.random.key(0), series, Scaler.fit(values))
    assert ahead[0] - dates[-1] == np.timedelta64(1, "h") and ahead.shape == (4,) and forecast.shape == (4, 7)


def test_published_names_go_in_and_out():
    for model in (Informer(SMALL), InformerStack(SMALL), InformerForecaster(FORECASTER)):
        _, variables = made(model)
        entry = next(e for e in registry.models().values() if e.module is type(model))
        rules = entry.weight_rules(model.config)
        published = names.to_published(variables, rules)
        back = names.convert(published, rules, variables)
        jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    extra = {"model.encoder.embed_positions.weight": np.zeros((3, 16))}
    names.convert(published | extra, rules, variables)
    with pytest.raises(names.NameMapError, match=r"decoder\.surprise"):
        names.convert(published | {"model.decoder.surprise": np.zeros(1)}, rules, variables)


def test_dropout_keeps_a_share_and_the_mean():
    x = jnp.ones((40, 50, 60))
    out = Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(out) > 0
    assert abs(kept.mean() - 0.7) < 0.005 and abs(out.mean() - 1) < 0.01
    for axis in range(3):  # neighbours along every axis are independent
        a, b = np.take(kept, range(kept.shape[axis] - 1), axis), np.take(kept, range(1, kept.shape[axis]), axis)
        assert abs((a & b).mean() - 0.49) < 0.01
    assert (Dropout(0.3).apply({}, x, False) == x).all()
    assert (out != Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(1)})).any()


class TestForecaster:
    @pytest.mark.slow
    def test_step_by_step_equals_teacher_forcing(self):
        # With canonical attention a step's distribution depends on the steps before it only.
        model = InformerForecaster(dataclasses.replace(FORECASTER, attention_type="full", scaling="std"))
        inputs, variables = made(model)
        expected = jax.jit(model.apply)(variables, **inputs).parameters
        past = {name: x for name, x in inputs.items() if not name.startswith("future")}
        memory, loc, scale, static = model.apply(variables, **past, method="encode")
        series = (np.concatenate([inputs["past_values"], inputs["future_values"]], axis=1) - loc) / scale
        for step in range(4):
            history, time = series[:, : model.config.past_length + step], inputs["future_time_features"][:, : step + 1]
            got = model.apply(variables, history, memory, static, time, method="decode")
            for name in expected:
                np.testing.assert_allclose(got[name][:, 0], expected[name][:, step], atol=1e-5)

    @pytest.mark.parametrize("channels", [1, 2])
    def test_paths_have_the_shape_asked_for(self, channels):
        model = InformerForecaster(dataclasses.replace(FORECASTER, input_size=channels))
        inputs, variables = made(model)
        inputs.pop("future_values")
        paths = jax.jit(lambda rng: informer.sample_paths(model, variables, rng, **inputs))(jax.random.key(0))
        assert paths.shape == (3, 5, 4) + (() if channels == 1 else (2,)) and jnp.isfinite(paths).all()
        assert len(np.unique(np.asarray(paths)[0].reshape(5, -1)[:, 0])) == 5

    @pytest.mark.parametrize("kind", ["student_t", "normal", "negative_binomial"])
    def test_likelihood_and_samples_are_the_distribution_s(self, kind):
        rng = np.random.default_rng(0)
        draw = lambda: rng.uniform(1, 3, (2, 4)).astype(np.float32)  # noqa: E731
        loc, scale = np.full((2, 1), 0.5, np.float32), np.full((2, 1), 2.0, np.float32)
        values = rng.integers(0, 9, (2, 4)).astype(np.float32)
        parameters = {name: draw() for name in config.DISTRIBUTIONS[kind]}
        if kind == "negative_binomial":
            success = 1 / (1 + np.exp(parameters["logits"] + np.log(scale)))
            expected = scipy.stats.nbinom(parameters["total_count"], success)
            density = expected.logpmf(values)
        else:
            family = {"student_t": scipy.stats.t, "normal": scipy.stats.norm}[kind]
            if kind == "student_t":
                parameters["df"] += 4
            exact = {name: x.astype(np.float64) for name, x in parameters.items()}
            exact |= {"loc": exact["loc"] * scale + loc, "scale": exact["scale"] * scale}
            expected = family(**exact)
            density = expected.logpdf(values)
        forecast = informer.Forecast(parameters, loc, scale, None, None)
        np.testing.assert_allclose(informer.negative_log_likelihood(kind, forecast, values), -density, rtol=2e-4)
        draws = jax.vmap(lambda rng: sample(kind, rng, parameters, loc, scale))(
            jax.random.split(jax.random.key(0), 4000)
        )
        np.testing.assert_allclose(draws.mean(0), expected.mean(), atol=5 * expected.std().max() / 4000**0.5)

    def test_loss_counts_observed_steps_only(self):
        loc, scale = jnp.zeros((1, 1)), jnp.ones((1, 1))
        forecast = informer.Forecast({"loc": jnp.zeros((1, 3)), "scale": jnp.ones((1, 3))}, loc, scale, None, None)
        values = jnp.array([[0.0, 1.0, jnp.nan]])
        observed = jnp.array([[1.0, 1.0, 0.0]])
        expected = -scipy.stats.norm.logpdf([0.0, 1.0]).mean()
        np.testing.assert_allclose(informer.forecast_loss("normal", forecast, values, observed), expected, rtol=1e-6)

    def test_scaling_of_the_observed_context(self):
        context, observed = jnp.array([[1.0, -3.0, 100.0], [7.0, 7.0, 7.0]]), jnp.array([[1.0, 1, 0], [0, 0, 0]])
        np.testing.assert_allclose(scaler("mean", context, observed)[1], [[2.0], [2.0]])
        loc, scale = scaler("std", context, observed)
        np.testing.assert_allclose(loc, [[-1.0], [0.0]])
        np.testing.assert_allclose(scale, [[np.sqrt(4 + 1e-5)], [np.sqrt(1e-5)]], rtol=1e-6)
        assert (scaler(None, context, observed)[1] == 1).all()

    def test_lags_look_back(self):
        sequence = jnp.arange(10.0)[None]
        np.testing.assert_array_equal(lagged(sequence, (1, 3), 2)[0], [[7, 5], [8, 6]])
        with pytest.raises(ValueError, match="lag 9 of 2 steps reaches beyond the 10 steps"):
            lagged(sequence, (9,), 2)

    @pytest.mark.slow
    def test_trains_with_all_its_dropouts(self):
        model = InformerForecaster(dataclasses.replace(FORECASTER, encoder_layerdrop=0.5, decoder_layerdrop=0.5))
        inputs, variables = made(model)
        params, state = variables["params"], {"batch_stats": variables["batch_stats"]}
        loss = informer.forecaster_loss(model)
        losses = jax.vmap(
            lambda rng: loss(params, state, inputs, {"dropout": rng, "sample": rng}, True)[0]
        )(jax.random.split(jax.random.key(0), 4))  # fmt: skip
        assert jnp.isfinite(losses).all() and len(set(losses.tolist())) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attn": "sparse"}, r"attn must be one of \('prob', 'full'\), got 'sparse'"),
        ({"d_model": 15}, r"d_model must be even and a multiple of n_heads \(2\), got 15"),
        ({"label_len": 17}, r"label_len \(17\) must not exceed seq_len \(16\)"),
        ({"features": "MS"}, "c_out must be 1, got 7"),
        ({"features": "S"}, r"enc_in, dec_in and c_out must be 1, got \(7, 7, 7\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"factor": 0}, "factor must be an integer of at least 1, got 0"),
        ({"padding": 2}, r"padding must be one of \(0, 1\), got 2"),
        ({"embed": "fixed", "freq": "d"}, "embed='fixed' needs the fields of freq 'h' or 't', got 'd'"),
        ({"stack_layers": (3, 2, 1, 1, 1, 1)}, "stack_layers must be positive layer counts"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lags_sequence": (0, 1)}, r"lags_sequence must be positive lags, got \(0, 1\)"),
        ({"cardinality": ()}, r"cardinality must have 1 entries"),
        ({"embedding_dimension": (2, 2)}, r"embedding_dimension must have 1 entries, got \(2, 2\)"),
        ({"distribution_output": "poisson"}, "distribution_output must be one of"),
        ({"scaling": "max"}, "scaling must be one of"),
        ({"d_model": 63}, "d_model must be even and a multiple of the heads"),
    ],
)
def test_wrong_forecasters_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FORECASTER, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_enc": np.zeros((3, 15, 7))}, r"x_enc must be \(batch, 16, 7\), got shape \(3, 15, 7\)"),
        ({"x_dec": np.zeros((3, 12, 6))}, r"x_dec must be \(batch, 12, 7\), got shape \(3, 12, 6\)"),
        ({"x_mark_dec": np.zeros((2, 12, 4))}, r"x_mark_dec must be \(batch, 12, 4\), got shape \(2, 12, 4\)"),
        ({"sample_keys": [np.zeros((16, 3), int)]}, "sample_keys must be 3 tables of shapes"),
        ({}, "ProbSparse attention draws keys: give rngs"),
    ],
)
def test_wrong_inputs_say_so(small, change, message):
    model, inputs, variables = small
    with pytest.raises(ValueError, match=message):
        model.apply(variables, **(inputs | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"past_values": np.zeros((3, 10))}, r"past_values must have shape \(batch, 11\), got \(3, 10\)"),
        ({"future_values": np.zeros((3, 5))}, r"future_values must have shape \(batch, 4\), got \(3, 5\)"),
        ({"static_real_features": None}, "static_real_features: the config has 1, got None"),
        ({"sample_keys": [np.zeros(3, int)]}, "sample_keys must have shapes"),
    ],
)
def test_wrong_forecaster_inputs_say_so(change, message):
    model = InformerForecaster(FORECASTER)
    inputs = informer.forecaster_example_inputs(FORECASTER, 3)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), **(inputs | change)))

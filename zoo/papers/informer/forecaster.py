"""The probabilistic Informer of the transformers library: distributions of the next values, one step after the other.

It differs from the published model: a step's input is its lagged values beside static and time features; one sample of
keys serves all queries; there is no `mix`; the head gives a distribution, and paths are sampled step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.dropout import Dropout
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import sinusoids
from zoo.papers.informer.config import ForecasterConfig
from zoo.papers.informer.layers import DecoderLayer, Distil, EncoderLayer, LayerConfig, sampling_sizes


class Forecast(NamedTuple):
    """What `InformerForecaster` returns. C channels are absent where input_size is 1."""

    parameters: dict[str, jax.Array]  # the distribution's, each (B, T[, C]), in units of the scaled series
    loc: jax.Array  # (B, 1[, C]), what was subtracted
    scale: jax.Array  # (B, 1[, C]), what was divided by
    encoder_state: jax.Array  # (B, M, d_model)
    static_features: jax.Array  # (B, F)


def layer_config(config: ForecasterConfig, side: str) -> LayerConfig:
    """The layers of the "encoder" or the "decoder"."""
    return LayerConfig(
        features=config.d_model,
        heads=getattr(config, f"{side}_attention_heads"),
        hidden=getattr(config, f"{side}_ffn_dim"),
        sampling="shared" if config.attention_type == "prob" else None,
        factor=config.sampling_factor,
        mix=False,
        dropout=config.dropout,
        hidden_dropout=config.activation_dropout,
        attention_dropout=config.attention_dropout,
        sparse_dropout=config.attention_dropout,
        activation=config.activation_function,
        init_std=config.init_std,
    )


def scaler(kind: str | None, context: jax.Array, observed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Location and scale of the observed context.

    Args:
      kind: "mean": 0 and the mean absolute value (where nothing is observed, that of the batch), at least 1e-10; "std":
        mean and sqrt(variance + 1e-5); None: 0 and 1.
      context: (B, L[, C]).
      observed: the same shape, 1 where a value was observed and 0 where not.

    Returns:
      loc and scale, (B, 1[, C]).
    """
    count = observed.sum(axis=1, keepdims=True)
    if kind == "mean":
        total = jnp.abs(context * observed).sum(axis=1, keepdims=True)
        of_batch = total.sum(axis=0) / jnp.maximum(count.sum(axis=0), 1)
        scale = jnp.where(count > 0, total / jnp.maximum(count, 1), of_batch)
        return jnp.zeros_like(scale), jnp.maximum(scale, 1e-10)
    if kind == "std":
        loc = (context * observed).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
        variance = (((context - loc) * observed) ** 2).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
        return loc, jnp.sqrt(variance + 1e-5)
    return jnp.zeros_like(count), jnp.ones_like(count)


def lagged(sequence: jax.Array, lags: Sequence[int], length: int) -> jax.Array:
    """The values `lag` steps before each of the last `length` steps: (B, L[, C]) -> (B, length, [C *] lags)."""
    if max(lags) + length > sequence.shape[1]:
        raise ValueError(f"lag {max(lags)} of {length} steps reaches beyond the {sequence.shape[1]} steps of history")
    end = sequence.shape[1]
    stacked = jnp.stack([sequence[:, end - lag - length : end - lag] for lag in lags], axis=-1)
    return stacked.reshape(*stacked.shape[:2], -1)


class _Side(nn.Module):
    """What encoder and decoder share: value embedding without bias, positions, norm, dropout, and LayerDrop."""

    config: ForecasterConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def embed(self, x: jax.Array, start: int, train: bool) -> jax.Array:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(self.config.init_std)
        value = dense(
            self.config.d_model, (None, "embed"), use_bias=False, kernel_init=init, **options, name="value"
        )(x)  # fmt: skip
        table = sinusoids(start + x.shape[1], self.config.d_model)[start:]
        # The library keeps sines in the first half of the features, cosines in the second.
        position = jnp.asarray(np.concatenate([table[:, 0::2], table[:, 1::2]], axis=-1), self.dtype)
        x = norm("layer", epsilon=1e-5, **options, name="embedding_norm")(value + position)
        return Dropout(self.config.dropout)(x, train)

    def drop_layer(self, before: jax.Array, after: jax.Array, rate: float, train: bool) -> jax.Array:
        """LayerDrop (Fan et al. 2020): with probability `rate` a layer is skipped, for the whole batch."""
        if not train or not rate:
            return after
        return jnp.where(jax.random.bernoulli(self.make_rng("dropout"), rate), before, after)


class ForecasterEncoder(_Side):
    """Encoder layers with distilling between them. LayerDrop skips a layer, never a distilling that fixes lengths."""

    @nn.compact
    def __call__(self, x: jax.Array, samples: Iterator[jax.Array | None], train: bool) -> jax.Array:
        """(B, context, feature_size) -> (B, M, d_model)."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self.embed(x, 0, train)
        for index in range(config.encoder_layers):
            layer = EncoderLayer(layer_config(config, "encoder"), **options, name=f"layer_{index}")
            y, _ = layer(x, next(samples), train)
            x = self.drop_layer(x, y, config.encoder_layerdrop, train)
            if config.distil and index < config.encoder_layers - 1:
                x = Distil(config.init_std, **options, name=f"distil_{index}")(x, train)
        return x


class ForecasterDecoder(_Side):
    """Decoder layers; positions continue the context's."""

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, samples: Iterator[jax.Array | None], train: bool) -> jax.Array:
        """(B, T, feature_size) and (B, M, d_model) -> (B, T, d_model)."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self.embed(x, config.context, train)
        for index in range(config.decoder_layers):
            layer = DecoderLayer(layer_config(config, "decoder"), **options, name=f"layer_{index}")
            y, _, _ = layer(x, memory, next(samples), train)
            x = self.drop_layer(x, y, config.decoder_layerdrop, train)
        return x


class InformerForecaster(nn.Module):
    """Forecasts distributions (`InformerForPrediction` of the transformers library).

    Randomness as in `Informer`: rng collections "sample" at every call, "dropout" in training.
    """

    config: ForecasterConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Embeddings, both sides and the heads."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = ForecasterEncoder(config, **options)
        self.decoder = ForecasterDecoder(config, **options)
        init = nn.initializers.normal(config.init_std)
        self.heads = {
            name: dense(config.input_size, ("embed", None), kernel_init=init, **options)
            for name in config.distribution_parameters
        }
        self.tables = [
            nn.Embed(count, width, embedding_init=partitioned(init, None, None), **options)
            for count, width in zip(config.cardinality, config.embedding_widths, strict=False)
        ]

    def __call__(
        self,
        past_values: jax.Array,
        past_time_features: jax.Array,
        future_values: jax.Array,
        future_time_features: jax.Array,
        past_observed_mask: jax.Array | None = None,
        static_categorical_features: jax.Array | None = None,
        static_real_features: jax.Array | None = None,
        sample_keys: Sequence[jax.Array] | None = None,
        train: bool = False,
    ) -> Forecast:
        """The distribution of every future value given those before it (teacher forcing).

        Args:
          past_values: (B, past_length) or, for input_size C > 1, (B, past_length, C); zeros where not observed.
          past_time_features: (B, past_length, F).
          future_values: (B, T) or (B, T, C), T = prediction_length.
          future_time_features: (B, T, F).
          past_observed_mask: shape of past_values, 1 observed and 0 missing; default all observed.
          static_categorical_features: (B, n) integers.
          static_real_features: (B, m).
          sample_keys: one integer vector (U,) a ProbSparse call in order: encoder layers, then decoder layers.
          train: use dropout, LayerDrop and the batch's statistics.

        Raises:
          ValueError: a shape that does not fit the config.
        """
        config = self.config
        self._check(past_values, past_time_features, past_observed_mask)
        self._check_static(static_categorical_features, static_real_features, past_values.shape[0])
        _check_shape("future_values", future_values, (None, config.prediction_length, *_channels(config)))
        _check_shape(
            "future_time_features", future_time_features, (None, config.prediction_length, config.real_time_features)
        )
        shapes = forecaster_sample_tables(config)
        if sample_keys is not None and [tuple(keys.shape) for keys in sample_keys] != shapes:
            raise ValueError(f"sample_keys must have shapes {shapes}, got {[tuple(k.shape) for k in sample_keys]}")
        samples = iter(sample_keys) if sample_keys else _draw_for_ever()

        loc, scale, static = self._statistics(
            past_values, past_observed_mask, static_categorical_features, static_real_features
        )
        series = (jnp.concatenate([past_values, future_values], axis=1) - loc) / scale
        time = jnp.concatenate([past_time_features[:, -config.context :], future_time_features], axis=1)
        length = config.context + config.prediction_length
        inputs = _inputs(lagged(series, config.lags_sequence, length), static, time)
        memory = self.encoder(inputs[:, : config.context], samples, train)
        state = self.decoder(inputs[:, config.context :], memory, samples, train)
        return Forecast(self._parameters(state), loc, scale, memory, static)

    def encode(
        self,
        past_values: jax.Array,
        past_time_features: jax.Array,
        past_observed_mask: jax.Array | None = None,
        static_categorical_features: jax.Array | None = None,
        static_real_features: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """What the decoder needs of the past: encoder state, loc, scale, static features. Arguments as for a call."""
        config = self.config
        self._check(past_values, past_time_features, past_observed_mask)
        self._check_static(static_categorical_features, static_real_features, past_values.shape[0])
        loc, scale, static = self._statistics(
            past_values, past_observed_mask, static_categorical_features, static_real_features
        )
        lags = lagged((past_values - loc) / scale, config.lags_sequence, config.context)
        inputs = _inputs(lags, static, past_time_features[:, -config.context :])
        return self.encoder(inputs, _draw_for_ever(), False), loc, scale, static

    def decode(self, history: jax.Array, memory: jax.Array, static: jax.Array, time: jax.Array) -> dict[str, jax.Array]:
        """The distribution's parameters of the step after `history`, (B, 1[, C]) each.

        Args:
          history: (B, L[, C]), scaled values up to the last known or sampled step.
          memory, static: of `encode`.
          time: (B, k, F), features of the k steps decoded so far, the next one included.
        """
        # A step's lag 1 is the last value known, where in a call with the future it would be one step further back.
        lags = [lag - 1 for lag in self.config.lags_sequence]
        inputs = _inputs(lagged(history, lags, time.shape[1]), static, time)
        return self._parameters(self.decoder(inputs, memory, _draw_for_ever(), False)[:, -1:])

    def _statistics(
        self,
        values: jax.Array,
        observed: jax.Array | None,
        categorical: jax.Array | None,
        real: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        observed = jnp.ones_like(values) if observed is None else observed.astype(values.dtype)
        loc, scale = scaler(config.scaling, values[:, -config.context :], observed[:, -config.context :])
        batch = values.shape[0]
        static = [table(jnp.asarray(categorical)[:, index]) for index, table in enumerate(self.tables)]
        if config.num_static_real_features:
            static.append(real)
        static += [jnp.log1p(jnp.abs(loc)).reshape(batch, -1), jnp.log(scale).reshape(batch, -1)]
        return loc, scale, jnp.concatenate(static, axis=-1)

    def _parameters(self, state: jax.Array) -> dict[str, jax.Array]:
        outputs = {name: head(state) for name, head in self.heads.items()}
        for name in ("scale", "total_count", "df"):  # positive ones
            if name in outputs:
                x = outputs[name]
                outputs[name] = (x + jnp.sqrt(x**2 + 4)) / 2
        if "df" in outputs:
            outputs["df"] = outputs["df"] + 2  # a finite variance
        if "scale" in outputs:
            outputs["scale"] = jnp.maximum(outputs["scale"], jnp.finfo(jnp.float32).eps)
        if self.config.input_size == 1:
            outputs = {name: x[..., 0] for name, x in outputs.items()}
        return outputs

    def _check(self, values: jax.Array, time: jax.Array, observed: jax.Array | None) -> None:
        config = self.config
        _check_shape("past_values", values, (None, config.past_length, *_channels(config)))
        _check_shape("past_time_features", time, (values.shape[0], config.past_length, config.real_time_features))
        if observed is not None:
            _check_shape("past_observed_mask", observed, values.shape)

    def _check_static(self, categorical: jax.Array | None, real: jax.Array | None, batch: int) -> None:
        for name, array, count in (
            ("static_categorical_features", categorical, self.config.num_static_categorical_features),
            ("static_real_features", real, self.config.num_static_real_features),
        ):
            if (array is None) != (count == 0):
                raise ValueError(f"{name}: the config has {count}, got {None if array is None else array.shape}")
            if array is not None:
                _check_shape(name, array, (batch, count))


def negative_log_likelihood(distribution: str, forecast: Forecast, values: jax.Array) -> jax.Array:
    """-log p(values) under the forecast, (B, T): channels are independent given the past and summed.

    Args:
      distribution: the config's distribution_output.
      forecast: of a call.
      values: (B, T[, C]), in the units of the data.
    """
    parameters, loc, scale = forecast.parameters, forecast.loc, forecast.scale
    if distribution == "negative_binomial":
        # Counts cannot be scaled; the distribution's mean is, through its logits.
        count, logits = parameters["total_count"], parameters["logits"] + jnp.log(scale)
        lgamma = jax.scipy.special.gammaln
        log_likelihood = count * jax.nn.log_sigmoid(-logits) + values * jax.nn.log_sigmoid(logits)
        log_likelihood += lgamma(count + values) - lgamma(1 + values) - lgamma(count)
    else:
        standard = ((values - loc) / scale - parameters["loc"]) / parameters["scale"]
        width = jnp.log(parameters["scale"]) + jnp.log(scale)
        if distribution == "normal":
            log_likelihood = -0.5 * standard**2 - 0.5 * math.log(2 * math.pi) - width
        else:
            df = parameters["df"]
            lgamma = jax.scipy.special.gammaln
            norm = lgamma((df + 1) / 2) - lgamma(df / 2) - 0.5 * jnp.log(df * math.pi)
            log_likelihood = norm - (df + 1) / 2 * jnp.log1p(standard**2 / df) - width
    return -(log_likelihood.sum(axis=-1) if log_likelihood.ndim == 3 else log_likelihood)


def forecast_loss(
    distribution: str, forecast: Forecast, values: jax.Array, observed: jax.Array | None = None
) -> jax.Array:
    """Mean negative log likelihood over the steps where every channel is observed.

    Args:
      distribution, forecast, values: as for `negative_log_likelihood`.
      observed: shape of values, 1 observed and 0 missing; default all observed.
    """
    losses = negative_log_likelihood(distribution, forecast, values)
    if observed is None:
        return losses.mean()
    weights = observed.min(axis=-1) if observed.ndim == 3 else observed
    return jnp.where(weights != 0, losses * weights, 0).sum() / jnp.maximum(weights.sum(), 1)


def sample(
    distribution: str, rng: jax.Array, parameters: Mapping[str, jax.Array], loc: jax.Array, scale: jax.Array
) -> jax.Array:
    """Draws values, in the units of the data, of the parameters' shape."""
    if distribution == "negative_binomial":
        gamma_rng, poisson_rng = jax.random.split(rng)
        rate = jax.random.gamma(gamma_rng, parameters["total_count"]) * jnp.exp(parameters["logits"]) * scale
        return jax.random.poisson(poisson_rng, rate).astype(rate.dtype)
    shape = parameters["loc"].shape
    if distribution == "normal":
        standard = jax.random.normal(rng, shape)
    else:
        standard = jax.random.t(rng, parameters["df"], shape)
    return (parameters["loc"] + parameters["scale"] * standard) * scale + loc


def sample_paths(
    model: InformerForecaster,
    variables: Mapping[str, Any],
    rng: jax.Array,
    past_values: jax.Array,
    past_time_features: jax.Array,
    future_time_features: jax.Array,
    **static_and_mask: Any,
) -> jax.Array:
    """Draws paths of the future, each value from its distribution given the path so far.

    The decoder is run again on the whole path at every step, as in the library: ProbSparse attention depends on the
    length and draws keys anew, so nothing can be cached. Under `jax.jit` this is one program of prediction_length
    decoders.

    Args:
      model, variables: the forecaster and its variables.
      rng: a PRNG key.
      past_values, past_time_features, future_time_features: as for a call.
      **static_and_mask: past_observed_mask, static_categorical_features, static_real_features as for a call.

    Returns:
      (B, num_parallel_samples, prediction_length[, C]), in the units of the data.

    Raises:
      ValueError: a shape that does not fit the config.
    """
    config = model.config
    paths = config.num_parallel_samples
    batch = past_values.shape[0]
    _check_shape(
        "future_time_features", future_time_features, (batch, config.prediction_length, config.real_time_features)
    )
    encoder_rng, *step_rngs = jax.random.split(rng, 1 + config.prediction_length)
    encoded = model.apply(
        variables, past_values, past_time_features, **static_and_mask, rngs={"sample": encoder_rng},
        method=InformerForecaster.encode,
    )  # fmt: skip
    memory, loc, scale, static, history, time = (
        jnp.repeat(x, paths, axis=0) for x in (*encoded, past_values, future_time_features)
    )
    history = (history - loc) / scale
    values = []
    for step, step_rng in enumerate(step_rngs, start=1):
        keys_rng, draw_rng = jax.random.split(step_rng)
        parameters: Any = model.apply(
            variables, history, memory, static, time[:, :step], rngs={"sample": keys_rng},
            method=InformerForecaster.decode,
        )  # fmt: skip
        values.append(sample(config.distribution_output, draw_rng, parameters, loc, scale))
        history = jnp.concatenate([history, (values[-1] - loc) / scale], axis=1)
    future = jnp.concatenate(values, axis=1)
    return future.reshape(batch, paths, *future.shape[1:])


def forecaster_sample_tables(config: ForecasterConfig) -> list[tuple[int, ...]]:
    """Shapes (U,) of the key samples of a call, in order: encoder layers, decoder layers."""
    if config.attention_type == "full":
        return []
    lengths, length = [], config.context
    for _ in range(config.encoder_layers):
        lengths.append(length)
        length = -(-length // 2) if config.distil else length
    lengths += [config.prediction_length] * config.decoder_layers
    return [sampling_sizes("shared", config.sampling_factor, length, length).table for length in lengths]


def forecaster_example_inputs(config: ForecasterConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Arrays of the right shapes for `InformerForecaster.__call__`: counts with a daily rhythm."""
    rng = np.random.default_rng(0)
    steps = np.arange(config.past_length + config.prediction_length)
    shape = (batch_size, len(steps), *_channels(config))
    rate = (2 + np.sin(2 * np.pi * steps / 24)).reshape(1, -1, *[1] * (len(shape) - 2))
    values = rng.poisson(np.broadcast_to(10 * rate, shape)).astype(np.float32)
    time = rng.standard_normal((batch_size, len(steps), config.real_time_features), dtype=np.float32)
    inputs = {
        "past_values": values[:, : config.past_length],
        "past_time_features": time[:, : config.past_length],
        "future_values": values[:, config.past_length :],
        "future_time_features": time[:, config.past_length :],
    }
    if config.num_static_categorical_features:
        columns = [rng.integers(0, count, batch_size) for count in config.cardinality]
        inputs["static_categorical_features"] = np.stack(columns, axis=-1).astype(np.int32)
    if config.num_static_real_features:
        shape = (batch_size, config.num_static_real_features)
        inputs["static_real_features"] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def forecaster_loss(model: InformerForecaster) -> Callable:
    """The loss of `zoo.train`: mean negative log likelihood of batch["future_values"]."""

    def loss(params, model_state, batch, rngs, train):
        values = batch["future_values"]
        inputs = {name: batch[name] for name in batch if name != "future_observed_mask"}
        variables = {"params": params, **model_state}
        forecast, model_state = model.apply(variables, **inputs, train=train, rngs=rngs, mutable=list(model_state))
        value = forecast_loss(model.config.distribution_output, forecast, values, batch.get("future_observed_mask"))
        return value, (model_state, {"nll": value})

    return loss


def _inputs(lags: jax.Array, static: jax.Array, time: jax.Array) -> jax.Array:
    static = jnp.broadcast_to(static[:, None], (*lags.shape[:2], static.shape[-1]))
    return jnp.concatenate([lags, static, time], axis=-1)


def _draw_for_ever() -> Iterator[None]:
    return iter(lambda: None, 0)


def _channels(config: ForecasterConfig) -> tuple[int, ...]:
    return () if config.input_size == 1 else (config.input_size,)


def _check_shape(name: str, array: jax.Array, expected: tuple[int | None, ...]) -> None:
    fits = array.ndim == len(expected) and all(e is None or e == a for e, a in zip(expected, array.shape, strict=True))
    if not fits:
        readable = tuple("batch" if size is None else size for size in expected)
        raise ValueError(f"{name} must have shape {readable}, got {array.shape}".replace("'batch'", "batch"))

"""Informer and InformerStack: forecasts of a whole horizon in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.time_series import Scaler, Series, future_window
from zoo.layers.norms import norm
from zoo.papers.informer.config import InformerConfig
from zoo.papers.informer.layers import (
    AttentionMap,
    DecoderLayer,
    Distil,
    Embedding,
    EncoderLayer,
    LayerConfig,
    linear,
    sampling_sizes,
)


def layer_config(config: InformerConfig) -> LayerConfig:
    """The layers of a published configuration."""
    return LayerConfig(
        features=config.d_model,
        heads=config.n_heads,
        hidden=config.d_ff,
        sampling="per_query" if config.attn == "prob" else None,
        factor=config.factor,
        mix=config.mix,
        dropout=config.dropout,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        sparse_dropout=0.0,  # the published core builds a dropout and never calls it
        activation=config.activation,
    )


class Encoder(nn.Module):
    """Encoder layers with a distilling layer after each but the last, and a final norm."""

    config: InformerConfig
    layers: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, keys: Iterator[jax.Array | None], train: bool, return_maps: bool
    ) -> tuple[jax.Array, list[AttentionMap | None]]:
        """(B, L, d_model) -> (B, ceil(L / 2**(layers - 1)), d_model), a map a layer."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        maps = []
        for index in range(self.layers):
            layer = EncoderLayer(layer_config(self.config), **options, name=f"layer_{index}")
            x, attention_map = layer(x, next(keys), train, return_maps)
            maps.append(attention_map)
            if self.config.distil and index < self.layers - 1:
                x = Distil(**options, name=f"distil_{index}")(x, train)
        return norm("layer", epsilon=1e-5, **options, name="norm")(x), maps


class Informer(nn.Module):
    """Encoder-decoder that forecasts all pred_len steps at once (Zhou et al. 2021).

    Randomness: ProbSparse draws its keys from the rng collection "sample" at every call, in evaluation too, as
    published; training also needs "dropout". `sample_keys` replaces the draws.
    """

    config: InformerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Embeddings, encoder, decoder and projection."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.enc_embedding = Embedding(config.d_model, config.embed, config.dropout, **options)
        self.dec_embedding = Embedding(config.d_model, config.embed, config.dropout, **options)
        self.encoder = self._encoder()
        self.decoder = [DecoderLayer(layer_config(config), **options) for _ in range(config.d_layers)]
        self.decoder_norm = norm("layer", epsilon=1e-5, **options)
        self.projection = linear(config.c_out, config.d_model, ("embed", None), **options)

    def __call__(
        self,
        x_enc: jax.Array,
        x_mark_enc: jax.Array,
        x_dec: jax.Array,
        x_mark_dec: jax.Array,
        sample_keys: Sequence[jax.Array] | None = None,
        train: bool = False,
        return_maps: bool = False,
    ) -> jax.Array | tuple[jax.Array, dict[str, AttentionMap | None]]:
        """Forecasts.

        Args:
          x_enc: (B, seq_len, enc_in), standardised values.
          x_mark_enc: (B, seq_len, m), its time features.
          x_dec: (B, label_len + pred_len, dec_in), `decoder_input` of the known steps.
          x_mark_dec: (B, label_len + pred_len, m).
          sample_keys: one integer table (L_Q, U) a ProbSparse call in order of the calls (encoder layers, then the
            decoder's self-attentions), see `sample_tables`.
          train: use dropout and the batch's statistics (needs mutable "batch_stats").
          return_maps: also return the attention maps by name, `encoder_0`, ..., `decoder_0`, ..., `cross_0`, ...

        Returns:
          (B, pred_len, c_out), and the maps if asked.

        Raises:
          ValueError: a shape that does not fit the config, or a missing rng.
        """
        config = self.config
        decoder_steps = config.label_len + config.pred_len
        for name, array, steps, channels in (
            ("x_enc", x_enc, config.seq_len, config.enc_in),
            ("x_mark_enc", x_mark_enc, config.seq_len, config.time_features),
            ("x_dec", x_dec, decoder_steps, config.dec_in),
            ("x_mark_dec", x_mark_dec, decoder_steps, config.time_features),
        ):
            if array.ndim != 3 or array.shape[1:] != (steps, channels) or array.shape[0] != x_enc.shape[0]:
                raise ValueError(f"{name} must be (batch, {steps}, {channels}), got shape {array.shape}")
        shapes = sample_tables(config, stack=isinstance(self, InformerStack))
        if sample_keys is None:
            if shapes and not (self.has_rng("sample") or self.has_rng("params")):
                raise ValueError("ProbSparse attention draws keys: give rngs={'sample': key} or sample_keys")
        elif [tuple(table.shape) for table in sample_keys] != shapes:
            raise ValueError(
                f"sample_keys must be {len(shapes)} tables of shapes {shapes}, "
                f"got {[tuple(table.shape) for table in sample_keys]}"
            )
        encoder_keys = sample_keys[: -config.d_layers] if sample_keys else None
        decoder_keys = sample_keys[-config.d_layers :] if sample_keys else None
        memory, maps = self.encode(x_enc, x_mark_enc, encoder_keys, train, return_maps)
        forecast, more = self.decode(memory, x_dec, x_mark_dec, decoder_keys, train, return_maps)
        return (forecast, maps | more) if return_maps else forecast

    def encode(
        self,
        x_enc: jax.Array,
        x_mark_enc: jax.Array,
        sample_keys: Sequence[jax.Array] | None = None,
        train: bool = False,
        return_maps: bool = False,
    ) -> tuple[jax.Array, dict[str, AttentionMap | None]]:
        """The encoder's output (B, M, d_model), and its maps by name; arguments as of a call."""
        x = self.enc_embedding(x_enc, x_mark_enc, train)
        memory, maps = self._encode(x, _keys(sample_keys), train, return_maps)
        return memory, {f"encoder_{index}": attention_map for index, attention_map in enumerate(maps)}

    def decode(
        self,
        memory: jax.Array,
        x_dec: jax.Array,
        x_mark_dec: jax.Array,
        sample_keys: Sequence[jax.Array] | None = None,
        train: bool = False,
        return_maps: bool = False,
    ) -> tuple[jax.Array, dict[str, AttentionMap | None]]:
        """The forecast (B, pred_len, c_out) and the decoder's maps; `memory` is of `encode`, the rest as of a call."""
        config, keys, maps = self.config, _keys(sample_keys), {}
        x = self.dec_embedding(x_dec, x_mark_dec, train)
        for index, layer in enumerate(self.decoder):
            # The forecast reads the last pred_len steps only; whole maps need all of them.
            steps = config.pred_len if index == config.d_layers - 1 and not return_maps else None
            x, maps[f"decoder_{index}"], maps[f"cross_{index}"] = layer(
                x, memory, next(keys), train, return_maps, steps
            )
        return self.projection(self.decoder_norm(x[:, -config.pred_len :])), maps

    def _encoder(self) -> Any:
        return Encoder(self.config, self.config.e_layers, self.dtype, self.param_dtype)

    def _encode(
        self, x: jax.Array, keys: Iterator[jax.Array | None], train: bool, return_maps: bool
    ) -> tuple[jax.Array, list[AttentionMap | None]]:
        return self.encoder(x, keys, train, return_maps)


class InformerStack(Informer):
    """Informer with the paper's pyramid: encoder i sees the last seq_len // 2**i steps, outputs join along time."""

    def _encoder(self) -> Any:
        return [Encoder(self.config, layers, self.dtype, self.param_dtype) for layers in self.config.stack_layers]

    def _encode(
        self, x: jax.Array, keys: Iterator[jax.Array | None], train: bool, return_maps: bool
    ) -> tuple[jax.Array, list[AttentionMap | None]]:
        outputs, maps = [], []
        for index, encoder in enumerate(self.encoder):
            output, more = encoder(x[:, -(x.shape[1] // 2**index) :], keys, train, return_maps)
            outputs.append(output)
            maps += more
        return jnp.concatenate(outputs, axis=1), maps


def _keys(sample_keys: Sequence[jax.Array] | None) -> Iterator[jax.Array | None]:
    """One table a call; None for ever where keys are drawn, or none are needed."""
    return iter(sample_keys) if sample_keys else iter(lambda: None, 0)


def sample_tables(config: InformerConfig, stack: bool = False) -> list[tuple[int, ...]]:
    """Shapes (L_Q, U) of the key samples of a forward pass, in order of the calls.

    Args:
      config: the model's.
      stack: for `InformerStack`, whose encoders are config.stack_layers.
    """
    if config.attn == "full":
        return []
    lengths = []
    for index, layers in enumerate(config.stack_layers if stack else (config.e_layers,)):
        length = config.seq_len // 2**index
        for _ in range(layers):
            lengths.append(length)
            length = -(-length // 2) if config.distil else length
    lengths += [config.label_len + config.pred_len] * config.d_layers
    return [sampling_sizes("per_query", config.factor, length, length).table for length in lengths]


def decoder_input(known: jax.Array | np.ndarray, config: InformerConfig) -> jax.Array | np.ndarray:
    """The decoder's input: the last label_len known steps, then pred_len placeholders of `config.padding`.

    Args:
      known: (B, at least label_len, dec_in), values up to the last known step; numpy arrays give numpy arrays.
      config: the model's.

    Returns:
      (B, label_len + pred_len, dec_in).
    """
    if known.ndim != 3 or known.shape[1] < config.label_len or known.shape[2] != config.dec_in:
        raise ValueError(
            f"known must be (batch, at least {config.label_len}, {config.dec_in}), got shape {known.shape}"
        )
    shape = (known.shape[0], config.pred_len, config.dec_in)
    library = np if isinstance(known, np.ndarray) else jnp
    placeholders = library.full(shape, config.padding, known.dtype)
    return library.concatenate([known[:, known.shape[1] - config.label_len :], placeholders], axis=1)


def forecast(
    model: Informer,
    variables: Mapping[str, Any],
    rng: jax.Array,
    history: Series,
    scaler: Scaler,
    target: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Forecasts the steps that follow a series.

    Args:
      model, variables: a trained network.
      rng: a PRNG key, for the keys that ProbSparse samples.
      history: at least seq_len rows, the columns of the training data.
      scaler: the one the network was trained with.
      target: the column to forecast where features is "S" or "MS", default the last.

    Returns:
      The (pred_len,) dates and the (pred_len, c_out) values in the series' units.
    """
    config = model.config
    window = future_window(
        history, scaler, seq_len=config.seq_len, label_len=config.label_len, pred_len=config.pred_len,
        features=config.features, target=target, marks="continuous" if config.embed == "timeF" else "categorical",
    )  # fmt: skip
    x_dec = decoder_input(window.x[None], config)
    out = model.apply(
        variables, window.x[None], window.x_mark[None], x_dec, window.y_mark[None], rngs={"sample": rng}
    )  # fmt: skip
    return window.dates, scaler.inverse(np.asarray(out[0]))


def targets(future: jax.Array | np.ndarray, config: InformerConfig) -> jax.Array | np.ndarray:
    """The channels to forecast of (B, pred_len, channels): all, or the last one for features "MS"."""
    return future[..., -1:] if config.features == "MS" else future


def example_inputs(config: InformerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Arrays of the right shapes for `Informer.__call__`: normal values, marks of one time step after the other."""
    rng = np.random.default_rng(0)
    steps = np.arange(config.seq_len + config.pred_len)
    if config.embed == "timeF":
        marks = np.stack([(steps % 24 / 23 - 0.5) / (1 + index) for index in range(config.time_features)], axis=-1)
    else:
        marks = np.stack([1 + 0 * steps, 1 + steps // 24 % 28, steps // 24 % 7, steps % 24, 0 * steps], axis=-1)
        marks = marks[:, : config.time_features]
    marks = np.broadcast_to(marks.astype(np.float32), (batch_size, *marks.shape))
    x_enc = rng.standard_normal((batch_size, config.seq_len, config.enc_in), dtype=np.float32)
    known = x_enc if config.dec_in == config.enc_in else x_enc[..., : config.dec_in]
    x_dec = np.full((batch_size, config.label_len + config.pred_len, config.dec_in), config.padding, np.float32)
    x_dec[:, : config.label_len] = known[:, config.seq_len - config.label_len :]
    return {
        "x_enc": x_enc,
        "x_mark_enc": marks[:, : config.seq_len],
        "x_dec": x_dec,
        "x_mark_dec": marks[:, config.seq_len - config.label_len :],
    }


def example_targets(config: InformerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """What the loss reads beside the inputs: `y`, (B, pred_len, c_out)."""
    rng = np.random.default_rng(1)
    return {"y": rng.standard_normal((batch_size, config.pred_len, config.c_out), dtype=np.float32)}


def loss(model: Informer, mean: np.ndarray | float = 0.0, std: np.ndarray | float = 1.0) -> Callable:
    """The loss of `zoo.train`: mean squared error of the forecast against batch["y"].

    The batch holds the arguments of `Informer.__call__` and `y` (B, pred_len, c_out); the rng collections are
    "dropout" and "sample". Metrics: "mae". With a `mean` and `std` of each channel the forecast is taken back to the
    data's units first, in which `y` is then expected (`inverse` of the published code).
    """

    def loss_function(params, model_state, batch, rngs, train):
        inputs = {name: batch[name] for name in ("x_enc", "x_mark_enc", "x_dec", "x_mark_dec")}
        variables = {"params": params, **model_state}
        forecast, model_state = model.apply(variables, **inputs, train=train, rngs=rngs, mutable=list(model_state))
        error = forecast * std + mean - batch["y"]
        return jnp.mean(error**2), (model_state, {"mae": jnp.mean(jnp.abs(error))})

    return loss_function

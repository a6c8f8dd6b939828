"""Configurations of Informer as published, and their checks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

# Time features a step at each frequency: hourly, 15-minute (or minute), secondly, daily, business-daily, weekly,
# monthly, annual.
TIME_FEATURES = {"h": 4, "t": 5, "s": 6, "d": 3, "b": 3, "w": 2, "m": 1, "a": 1}
ACTIVATIONS = ("gelu", "relu")
DISTRIBUTIONS = {
    "student_t": ("df", "loc", "scale"),
    "normal": ("loc", "scale"),
    "negative_binomial": ("total_count", "logits"),
}


def check_choice(owner: Any, name: str, choices: tuple) -> None:
    """Raises ValueError if a config's field is not one of the choices."""
    if getattr(owner, name) not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {getattr(owner, name)!r}")


def check_positive(owner: Any, *names: str, least: int = 1) -> None:
    """Raises ValueError if a config's field is not an integer of at least `least`."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_rate(owner: Any, *names: str) -> None:
    """Raises ValueError if a config's field is not a probability below 1."""
    for name in names:
        if not 0.0 <= getattr(owner, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(owner, name)!r}")


@dataclasses.dataclass(frozen=True)
class InformerConfig:
    """Informer and InformerStack, with the published code's names and defaults.

    Attributes:
      seq_len, label_len, pred_len: steps the encoder sees, the last known steps that the decoder starts from, steps it
        forecasts.
      features: "M" many series to the same series, "S" one to one, "MS" many to the last one.
      enc_in, dec_in, c_out: channels of the encoder's input, the decoder's input and the forecast.
      d_model, n_heads, d_ff: widths of the model, its number of heads, and the width of the feed-forward layer.
      e_layers, d_layers: layers of the encoder (of `Informer`) and of the decoder.
      stack_layers: layers of each encoder of `InformerStack`; encoder i sees the last seq_len // 2**i steps.
      factor: c of u = c ceil(ln L): active queries and sampled keys.
      attn: "prob" for ProbSparse self-attention, "full" for the canonical one.
      distil: convolution and max-pooling that halve the time between the encoder's layers.
      mix: the decoder's self-attention reads its (batch, heads, time, dim) output as (batch, time, heads * dim).
      embed: "timeF": a linear map of real-valued time features; "fixed" or "learned": tables of calendar fields.
      freq: the series' frequency, which decides how many time features there are.
      dropout: rate everywhere except on ProbSparse's own probabilities, where the published code applies none.
      activation: "gelu" (exact) or "relu".
      padding: what stands in the decoder's input for the steps to forecast, 0 or 1.
    """

    seq_len: int = 96
    label_len: int = 48
    pred_len: int = 24
    features: Literal["M", "S", "MS"] = "M"
    enc_in: int = 7
    dec_in: int = 7
    c_out: int = 7
    d_model: int = 512
    n_heads: int = 8
    d_ff: int = 2048
    e_layers: int = 2
    d_layers: int = 1
    stack_layers: tuple[int, ...] = (3, 2, 1)
    factor: int = 5
    attn: Literal["prob", "full"] = "prob"
    distil: bool = True
    mix: bool = True
    embed: Literal["timeF", "fixed", "learned"] = "timeF"
    freq: Literal["h", "t", "s", "d", "b", "w", "m", "a"] = "h"
    dropout: float = 0.05
    activation: Literal["gelu", "relu"] = "gelu"
    padding: int = 0

    def __post_init__(self):
        check_positive(
            self, "seq_len", "pred_len", "enc_in", "dec_in", "c_out", "d_model", "n_heads", "d_ff", "e_layers",
            "d_layers", "factor",
        )  # fmt: skip
        check_positive(self, "label_len", least=0)
        check_choice(self, "features", ("M", "S", "MS"))
        check_choice(self, "attn", ("prob", "full"))
        check_choice(self, "embed", ("timeF", "fixed", "learned"))
        check_choice(self, "freq", tuple(TIME_FEATURES))
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "padding", (0, 1))
        check_rate(self, "dropout")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of n_heads ({self.n_heads}), got {self.d_model}")
        if self.label_len > self.seq_len:
            raise ValueError(f"label_len ({self.label_len}) must not exceed seq_len ({self.seq_len})")
        if self.features == "MS" and self.c_out != 1:
            raise ValueError(f"features='MS' forecasts one series: c_out must be 1, got {self.c_out}")
        if self.features == "S" and (self.enc_in, self.dec_in, self.c_out) != (1, 1, 1):
            raise ValueError(
                f"features='S' has one series: enc_in, dec_in and c_out must be 1, got "
                f"{(self.enc_in, self.dec_in, self.c_out)}"
            )
        if self.embed != "timeF" and self.freq not in ("h", "t"):
            raise ValueError(f"embed={self.embed!r} needs the fields of freq 'h' or 't', got {self.freq!r}")
        shortest = self.seq_len // 2 ** max(len(self.stack_layers) - 1, 0)
        if not self.stack_layers or min(self.stack_layers) < 1 or shortest < 1:
            raise ValueError(
                f"stack_layers must be positive layer counts with seq_len // 2**(encoders - 1) >= 1, got "
                f"{self.stack_layers} at seq_len {self.seq_len}"
            )

    @property
    def time_features(self) -> int:
        """Channels of the time marks: real features, or month, day, weekday, hour and (freq "t") quarter of an hour."""
        return TIME_FEATURES[self.freq]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads


@dataclasses.dataclass(frozen=True)
class ForecasterConfig:
    """The probabilistic Informer of the transformers library, with its names and defaults.

    Attributes:
      prediction_length: steps to forecast.
      context_length: steps the encoder sees; None for prediction_length.
      distribution_output: the head's distribution.
      input_size: series forecast together.
      lags_sequence: the past values, so many steps back, that are a step's input beside its features.
      scaling: "mean" divides by the context's mean absolute value, "std" standardises by it, None leaves as is.
      num_dynamic_real_features, num_time_features: channels of the time features, counted together.
      num_static_real_features, num_static_categorical_features: features that do not change with time.
      cardinality, embedding_dimension: values and embedding width of each static categorical feature.
      d_model: width; encoder_*, decoder_*: layers, heads, feed-forward widths and LayerDrop rates of each side.
      attention_type: "prob" or "full"; sampling_factor: ProbSparse's c; distil: halve time between encoder layers.
      dropout, attention_dropout, activation_dropout: rates on sums, attention weights and hidden features.
      num_parallel_samples: paths drawn by `sample_paths`.
      init_std: standard deviation of initial weights.
    """

    prediction_length: int = 24
    context_length: int | None = None
    distribution_output: Literal["student_t", "normal", "negative_binomial"] = "student_t"
    input_size: int = 1
    lags_sequence: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    scaling: Literal["mean", "std"] | None = "mean"
    num_dynamic_real_features: int = 0
    num_static_real_features: int = 0
    num_static_categorical_features: int = 0
    num_time_features: int = 0
    cardinality: tuple[int, ...] = ()
    embedding_dimension: tuple[int, ...] | None = None
    d_model: int = 64
    encoder_layers: int = 2
    decoder_layers: int = 2
    encoder_attention_heads: int = 2
    decoder_attention_heads: int = 2
    encoder_ffn_dim: int = 32
    decoder_ffn_dim: int = 32
    encoder_layerdrop: float = 0.1
    decoder_layerdrop: float = 0.1
    activation_function: Literal["gelu", "relu"] = "gelu"
    dropout: float = 0.05
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_type: Literal["prob", "full"] = "prob"
    sampling_factor: int = 5
    distil: bool = True
    num_parallel_samples: int = 100
    init_std: float = 0.02

    def __post_init__(self):
        if self.scaling is True or self.scaling is False:  # the library's older spellings
            object.__setattr__(self, "scaling", "mean" if self.scaling else None)
        check_positive(
            self, "prediction_length", "input_size", "d_model", "encoder_layers", "decoder_layers",
            "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim",
            "sampling_factor", "num_parallel_samples",
        )  # fmt: skip
        check_positive(
            self, "num_dynamic_real_features", "num_static_real_features", "num_static_categorical_features",
            "num_time_features", least=0,
        )  # fmt: skip
        check_choice(self, "distribution_output", tuple(DISTRIBUTIONS))
        check_choice(self, "scaling", ("mean", "std", None))
        check_choice(self, "activation_function", ACTIVATIONS)
        check_choice(self, "attention_type", ("prob", "full"))
        check_rate(self, "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
        for heads in (self.encoder_attention_heads, self.decoder_attention_heads):
            if self.d_model % heads or self.d_model % 2:
                raise ValueError(f"d_model must be even and a multiple of the heads ({heads}), got {self.d_model}")
        if not self.lags_sequence or min(self.lags_sequence) < 1:
            raise ValueError(f"lags_sequence must be positive lags, got {self.lags_sequence}")
        if self.context_length is not None:
            check_positive(self, "context_length")
        categories = self.num_static_categorical_features
        if categories and len(self.cardinality) != categories:
            raise ValueError(f"cardinality must have {categories} entries (one a feature), got {self.cardinality}")
        if categories and self.embedding_dimension is not None and len(self.embedding_dimension) != categories:
            raise ValueError(f"embedding_dimension must have {categories} entries, got {self.embedding_dimension}")

    @property
    def context(self) -> int:
        """Steps the encoder sees."""
        return self.prediction_length if self.context_length is None else self.context_length

    @property
    def past_length(self) -> int:
        """Steps of history a call needs: the context and the longest lag before it."""
        return self.context + max(self.lags_sequence)

    @property
    def embedding_widths(self) -> tuple[int, ...]:
        """Width of each static categorical feature's embedding, by default half its cardinality and at most 50."""
        if not self.num_static_categorical_features:
            return ()
        return self.embedding_dimension or tuple(min(50, (count + 1) // 2) for count in self.cardinality)

    @property
    def distribution_parameters(self) -> tuple[str, ...]:
        """Names of the head's outputs, in the published order."""
        return DISTRIBUTIONS[self.distribution_output]

    @property
    def real_time_features(self) -> int:
        """Channels of past_time_features and future_time_features."""
        return self.num_time_features + self.num_dynamic_real_features

    @property
    def feature_size(self) -> int:
        """Channels of a step's input: lags, static features, logarithms of location and scale, time features."""
        static = sum(self.embedding_widths) + self.num_static_real_features + 2 * self.input_size
        return self.input_size * len(self.lags_sequence) + static + self.real_time_features

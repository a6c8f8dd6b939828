"""CloudFormer: a virtual machine's performance from outside, by attention over seconds and attention over metrics.

"CloudFormer: An Attention-based Performance Prediction for Public Clouds with Unknown Workload", Amirhossein
Shahbazinia, Darong Huang, Luis Costero, David Atienza, 2025, arXiv 2509.03394.

A RECONSTRUCTION: neither code nor data nor weights were found. What is known of the paper: 206 metrics of the host a
second, a series of any length, two Transformer branches whose tokens are seconds ("temporal") and metrics ("system"),
their summaries fused to the performance ratio P = ideal / actual in (0, 1]. Everything else is our decision, all of it
in `CloudFormerConfig`: widths and depths, the compression of a series to `segments` means before the system branch,
mean pooling, the learned embedding of metrics, the head. Golden cases check against a reference of the same
reconstruction, and no number here is the authors'.

B batch, T seconds, F metrics, S segments, d d_model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels.attention import attention
from kernels.attention_readout import attention_entries
from zoo.layers.dropout import Dropout
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import sinusoids
from zoo.registry import Paper, Variant, register
from zoo.weights import Rule, Transform, layer, under

PAPER = Paper(
    slug="cloudformer",
    title="CloudFormer: An Attention-based Performance Prediction for Public Clouds with Unknown Workload",
    authors="Amirhossein Shahbazinia et al.",
    venue="arXiv",
    year=2025,
    arxiv="2509.03394",
    claim="Attention over seconds beside attention over metrics predicts a virtual machine's slowdown in workloads "
    "never seen, at least 28 % better than methods before.",
    fidelity="reconstruction",
    remarks="A reconstruction: no code, data or weights are published, and details of the architecture are ours.",
)

Branch = Literal["temporal", "system"]
LossKind = Literal["mse", "mae", "huber"]


@dataclasses.dataclass(frozen=True)
class CloudFormerConfig:
    """A CloudFormer; a reconstruction, see the module.

    Attributes:
      features: F, metrics of a second.
      d_model, heads, ff: features, heads and hidden features of both encoders.
      temporal_layers, system_layers: of the two encoders.
      segments: S, means that a metric's series is compressed to for the system branch.
      hidden: of the head.
      dropout: of attention weights, behind branches and activations.
      branches: "temporal", "system" or both.
      loss: "mse", "mae" or "huber" (with a bend at 0.1).
      seconds: length of example inputs; any other will do.
    """

    features: int = 206
    d_model: int = 128
    heads: int = 8
    ff: int = 256
    temporal_layers: int = 2
    system_layers: int = 2
    segments: int = 64
    hidden: int = 128
    dropout: float = 0.1
    branches: tuple[Branch, ...] = ("temporal", "system")
    loss: LossKind = "mse"
    seconds: int = 90

    def __post_init__(self) -> None:
        for name in ("features", "d_model", "heads", "ff", "segments", "hidden", "seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.temporal_layers, self.system_layers) < 0:
            raise ValueError(f"layers must not be negative, got {self.temporal_layers} and {self.system_layers}")
        if self.d_model % self.heads or self.d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of heads ({self.heads}), got {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.branches or not set(self.branches) <= set(get_args(Branch)):
            raise ValueError(f"branches must be one or both of {get_args(Branch)}, got {self.branches}")
        if self.loss not in get_args(LossKind):
            raise ValueError(f"loss must be one of {get_args(LossKind)}, got {self.loss!r}")


def segment_mean(x: jax.Array, length: jax.Array, segments: int) -> jax.Array:
    """Adaptive average pooling of each series over its own length.

    Segment s of n steps is the mean of the steps floor(s n / S) .. ceil((s + 1) n / S) - 1, so that every segment has a
    step, and fewer steps than segments repeat.

    Args:
      x: (B, T, F); what lies behind a series' length is not read.
      length: int (B,), in 1 .. T.
      segments: S.

    Returns:
      (B, S, F).

    Raises:
      ValueError: shapes do not fit, or segments is not positive.
    """
    _check_series(x, length)
    if segments < 1:
        raise ValueError(f"segments must be at least 1, got {segments}")
    s, n = jnp.arange(segments)[None], length[:, None]
    start, end = s * n // segments, -(-(s + 1) * n // segments)
    step = jnp.arange(x.shape[1])
    inside = (step >= start[..., None]) & (step < end[..., None])  # (B, S, T)
    weights = inside / (end - start)[..., None]
    valid = step < length[:, None]
    # A product with a padding of NaN would be NaN, so padding is taken out first.
    return jnp.einsum("bst,btf->bsf", weights.astype(x.dtype), jnp.where(valid[..., None], x, 0))


class Packing(NamedTuple):
    """Where the tokens of ragged series lie in rows without padding between them.

    Attributes:
      sample: int32 (R, C), the series a token is of, -1 where a row is not full.
      time: int32 (R, C), its second.
    """

    sample: np.ndarray
    time: np.ndarray


def pack_lengths(lengths: Sequence[int] | np.ndarray, capacity: int, rows: int | None = None) -> Packing:
    """Series put into as few rows as first fit, the longest first, finds.

    Args:
      lengths: of the series, each in 1 .. capacity.
      capacity: C, tokens of a row.
      rows: R, where a program for one shape is wanted; None: as many as are needed.

    Raises:
      ValueError: a length is out of range, or there are too few rows.
    """
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or not len(sizes) or sizes.min() < 1 or sizes.max() > capacity:
        raise ValueError(f"lengths must be in 1 .. capacity = {capacity}, got {list(map(int, sizes.ravel()))}")
    filled: list[int] = []
    places = {}
    for index in np.argsort(-sizes, kind="stable"):
        row = next((row for row, used in enumerate(filled) if used + sizes[index] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        places[int(index)] = row, filled[row]
        filled[row] += int(sizes[index])
    if rows is not None and len(filled) > rows:
        raise ValueError(f"{len(sizes)} series of {int(sizes.sum())} steps need {len(filled)} rows, got {rows}")
    shape = (rows or len(filled), capacity)
    sample, time = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    for index, (row, start) in places.items():
        sample[row, start : start + sizes[index]] = index
        time[row, start : start + sizes[index]] = np.arange(sizes[index])
    return Packing(sample, time)


def _uniform(fan_in: int) -> Callable:
    """PyTorch's default: uniform in +-1 / sqrt(fan in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _linear(features: int, fan_in: int, axes: tuple[str | None, str | None], **options: Any) -> nn.Dense:
    return dense(features, axes, kernel_init=_uniform(fan_in), bias_init=_uniform(fan_in), **options)


class EncoderLayer(nn.Module):
    """norm1(x + attention(x)), norm2(x + ff(x)) with one packed projection, as PyTorch's encoder layer."""

    config: CloudFormerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, train: bool, return_attention: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """(B, n, d), tokens of equal ids (B, n) seeing each other, to (B, n, d) and the weights (B, heads, n, n)."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, heads = config.d_model, config.heads
        # Xavier's fan of the packed kernel: d in, 3 d out.
        packed = dense(
            3 * width, ("embed", "heads"), kernel_init=nn.initializers.xavier_uniform(), **options, name="in"
        )(x)  # fmt: skip
        query, key, value = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(packed, 3, axis=-1))
        ids: dict[str, Any] = (
            {} if segment_ids is None else {"query_segment_ids": segment_ids, "key_segment_ids": segment_ids}
        )
        rate = config.dropout if train else 0.0
        rng = self.make_rng("dropout") if rate else None
        y: Any = attention(query, key, value, dropout_rate=rate, dropout_rng=rng, **ids)
        y = y.reshape(x.shape)
        weights = attention_entries(query, key, **ids) if return_attention else None
        drop = Dropout(config.dropout)
        y = dense(width, ("heads", "embed"), kernel_init=_uniform(width), **options, name="out")(y)
        x = norm("layer", epsilon=1e-5, **options, name="norm1")(x + drop(y, train))
        y = nn.relu(_linear(config.ff, width, ("embed", "mlp"), **options, name="up")(x))
        y = _linear(width, config.ff, ("mlp", "embed"), **options, name="down")(drop(y, train))
        return norm("layer", epsilon=1e-5, **options, name="norm2")(x + drop(y, train)), weights


class Encoder(nn.Module):
    """The layers of a branch."""

    config: CloudFormerConfig
    layers: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, train: bool, return_attention: bool
    ) -> tuple[jax.Array, list[jax.Array | None]]:
        """As of `EncoderLayer`, with the weights of each layer."""
        maps = []
        for index in range(self.layers):
            layer = EncoderLayer(self.config, self.dtype, self.param_dtype, name=f"layer_{index}")
            x, weights = layer(x, segment_ids, train, return_attention)
            maps.append(weights)
        return x, maps


class CloudFormer(nn.Module):
    """Two branches, over seconds and over metrics, and a head on their summaries."""

    config: CloudFormerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        packing: Packing | None = None,
        train: bool = False,
        return_attention: bool = False,
    ) -> dict[str, Any]:
        """Performance ratios.

        Args:
          x: float (B, T, F), standardised; what lies behind a series' length changes nothing, were it NaN.
          length: int (B,), in 1 .. T; None: all T.
          packing: of these lengths, from `pack_lengths`: the temporal branch then computes no padding between series.
          train: use dropout, of the rng collection "dropout".
          return_attention: also return each layer's weights.

        Returns:
          "performance" and "logit" (B,); "temporal" and "system" (B, d) of the branches there are; if asked
          "attention", for each branch a list of float32 (B, heads, tokens, tokens), with a packing (R, heads, C, C).

        Raises:
          ValueError, TypeError: a shape or dtype is wrong.
        """
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if length is None:
            length = jnp.full(x.shape[:1], x.shape[1] if x.ndim == 3 else 0, jnp.int32)
        _check_series(x, length, config.features)
        if packing is not None and (packing.sample.ndim != 2 or packing.sample.shape != packing.time.shape):
            raise ValueError(
                f"a packing's sample and time must both be (rows, capacity), got {packing.sample.shape} and "
                f"{packing.time.shape}"
            )
        x = jnp.where((jnp.arange(x.shape[1]) < length[:, None])[..., None], x, 0)
        summaries: dict[str, jax.Array] = {}
        maps: dict[str, list[jax.Array | None]] = {}
        if "temporal" in config.branches:
            sample, time = _unpacked(x, length) if packing is None else map(jnp.asarray, packing)
            tokens = x if packing is None else x[sample, time]
            tokens = _linear(config.d_model, config.features, (None, "embed"), **options, name="temporal_in")(tokens)
            tokens = tokens + jnp.asarray(sinusoids(x.shape[1], config.d_model), tokens.dtype)[time]
            encoder = Encoder(config, config.temporal_layers, **options, name="temporal")
            tokens, maps["temporal"] = encoder(tokens, sample, train, return_attention)
            # A sum by series: tokens of no series go to the one behind the last, which is dropped.
            where = jnp.where(sample < 0, len(x), sample).reshape(-1)
            total = jax.ops.segment_sum(tokens.reshape(-1, tokens.shape[-1]), where, len(x) + 1)[:-1]
            summaries["temporal"] = total / length[:, None].astype(total.dtype)
        if "system" in config.branches:
            means = segment_mean(x, length, config.segments).swapaxes(1, 2)
            tokens = _linear(config.d_model, config.segments, (None, "embed"), **options, name="system_in")(means)
            embedding = self.param(
                "metric_embed", partitioned(nn.initializers.zeros_init(), None, "embed"),
                (config.features, config.d_model), self.param_dtype,
            )  # fmt: skip
            tokens = tokens + embedding.astype(tokens.dtype)
            encoder = Encoder(config, config.system_layers, **options, name="system")
            tokens, maps["system"] = encoder(tokens, None, train, return_attention)
            summaries["system"] = tokens.mean(axis=1)
        joined = jnp.concatenate(list(summaries.values()), axis=-1)
        hidden = nn.relu(
            _linear(config.hidden, joined.shape[-1], ("embed", "mlp"), **options, name="head_hidden")(joined)
        )
        logit = _linear(1, config.hidden, ("mlp", None), **options, name="head_out")(hidden)[:, 0]
        out = {"performance": nn.sigmoid(logit), "logit": logit, **summaries}
        return {**out, "attention": maps} if return_attention else out


def _unpacked(x: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The packing that leaves every series in its row."""
    time = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return jnp.where(time < length[:, None], jnp.arange(len(x), dtype=jnp.int32)[:, None], -1), time


def _check_series(x: jax.Array, length: jax.Array, features: int | None = None) -> None:
    if x.ndim != 3 or (features is not None and x.shape[2] != features):
        raise ValueError(f"x must be (batch, seconds, {features or 'metrics'}), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point and standardised, got {x.dtype}")
    if length.shape != x.shape[:1] or not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"length must be {x.shape[0]} integers, got {length.dtype} of shape {length.shape}")


def loss(model: Any) -> Callable:
    """The loss of `zoo.train`, of a network with a config, on "x", "length", "performance"; metrics "mae"."""

    def loss_function(params, model_state, batch, rngs, train):
        inputs = {name: batch[name] for name in ("x", "length")}
        found = model.apply({"params": params}, **inputs, train=train, rngs=rngs)["performance"]
        error = found - batch["performance"]
        mae = jnp.mean(jnp.abs(error))
        kinds = {
            "mse": lambda: jnp.mean(error**2),
            "mae": lambda: mae,
            "huber": lambda: jnp.mean(optax.huber_loss(error, delta=0.1)),
        }
        return kinds[model.config.loss](), (model_state, {"mae": mae})

    return loss_function


def example_inputs(config: CloudFormerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Normal values of different lengths for `CloudFormer.__call__`."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, config.seconds, config.features), dtype=np.float32)
    return {"x": x, "length": (config.seconds - np.arange(batch_size) % config.seconds).astype(np.int32)}


def example_targets(config: CloudFormerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """What the loss reads beside the inputs."""
    return {"performance": np.random.default_rng(1).uniform(0.3, 1, batch_size).astype(np.float32)}


_EMBEDDING = Transform(lambda array: array[0], lambda array: array[None], 3)  # published with a unit axis in front
_LAYER = [
    Rule(r"self_attn\.in_proj_weight", "params/in/kernel", "linear"),
    Rule(r"self_attn\.in_proj_bias", "params/in/bias"),
    *layer("linear", r"self_attn\.out_proj", "out"),
    *layer("linear", "linear1", "up"),
    *layer("linear", "linear2", "down"),
    *layer("norm", "(norm1|norm2)", "{0}"),
]


def weight_rules(config: CloudFormerConfig) -> list[Rule]:
    """Names of the reference of this reconstruction, in PyTorch's layout."""
    return [
        *layer("linear", "(temporal_in|system_in)", "{0}"),
        Rule("metric_embed", "params/metric_embed", _EMBEDDING),
        *under(r"(temporal|system)\.layers\.(\d+)", "{0}/layer_{1}", _LAYER),
        *layer("linear", r"head\.0", "head_hidden"),
        *layer("linear", r"head\.2", "head_out"),
    ]


register(
    PAPER,
    Variant("cloudformer_base", CloudFormerConfig(), 624_129),
    Variant("cloudformer_temporal", CloudFormerConfig(branches=("temporal",))),
    Variant("cloudformer_system", CloudFormerConfig(branches=("system",))),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
    example_targets=example_targets,
)(CloudFormer)


class LSTMBaseline(nn.Module):
    """The recurrent baseline: an LSTM of d_model units over the seconds, its last valid state to a ratio."""

    config: CloudFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array, length: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """(B, T, F) and (B,) to "performance" and "logit" (B,)."""
        _check_series(x, length, self.config.features)
        x = jnp.where((jnp.arange(x.shape[1]) < length[:, None])[..., None], x, 0)
        states: Any = nn.RNN(nn.OptimizedLSTMCell(self.config.d_model), name="lstm")(x, seq_lengths=length)
        last = jnp.take_along_axis(states, (length - 1)[:, None, None], axis=1)[:, 0]
        logit = nn.Dense(1, name="head")(Dropout(self.config.dropout)(last, train))[:, 0]
        return {"performance": nn.sigmoid(logit), "logit": logit}


class Standardizer(NamedTuple):
    """Mean and standard deviation of each metric, float32 (F,)."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, length: np.ndarray) -> Standardizer:
        """Statistics of all valid seconds of series (N, T, F) of these lengths (N,): give training runs only."""
        rows = x[np.arange(x.shape[1]) < np.asarray(length)[:, None]].astype(np.float64)
        std = rows.std(axis=0)
        return cls(rows.mean(axis=0).astype(np.float32), np.where(std > 0, std, 1).astype(np.float32))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Standardised values of any (..., F)."""
        return (x - self.mean) / self.std


def predict_stream(
    model: Any, variables: Mapping[str, Any], x: np.ndarray, window: int, *, at_once: int = 64
) -> np.ndarray:
    """A running machine's ratio after every second, from the last `window` seconds.

    Args:
      model, variables: a trained `CloudFormer`.
      x: (T, F), standardised.
      window: seconds that are read, fewer in the beginning.
      at_once: windows in one batch.

    Returns:
      float32 (T,).

    Raises:
      ValueError: the series or the window is wrong.
    """
    if x.ndim != 2 or not len(x) or window < 1:
        raise ValueError(f"expected a series (seconds, metrics) and a positive window, got {x.shape} and {window}")
    run = jax.jit(lambda x, length: model.apply(variables, x, length)["performance"])
    found = []
    for first in range(0, len(x), at_once):
        ends = np.minimum(np.arange(first, first + at_once), len(x) - 1) + 1
        length = np.minimum(ends, window).astype(np.int32)
        index = np.minimum((ends - length)[:, None] + np.arange(window), len(x) - 1)
        found.append(np.asarray(run(x[index], length)))
    return np.concatenate(found)[: len(x)]


class Explanation(NamedTuple):
    """What a prediction looks at: rollouts (B, T) and (B, F), each row summing to one, and occlusion (B, F)."""

    seconds: np.ndarray | None
    metrics: np.ndarray | None
    occlusion: np.ndarray


def explain(model: Any, variables: Mapping[str, Any], x: np.ndarray, length: np.ndarray) -> Explanation:
    """Attention over seconds and over metrics, and how a ratio changes without a metric.

    Attention is rolled out through the layers (Abnar and Zuidema 2020): the product of (A + I) / 2, A averaged over
    heads, and its mean over the tokens that are averaged. Occluding sets a metric to its mean; the change is that of P.

    Args:
      model, variables: a trained `CloudFormer`.
      x: (B, T, F), standardised.
      length: int (B,).
    """
    config = model.config
    out = jax.jit(lambda x, length: model.apply(variables, x, length, return_attention=True))(x, length)

    def rollout(maps: Sequence[jax.Array], valid: np.ndarray) -> np.ndarray:
        tokens = valid.shape[1]
        total = np.broadcast_to(np.eye(tokens), (len(valid), tokens, tokens))
        for weights in maps:
            total = (np.asarray(weights, np.float64).mean(1) + np.eye(tokens)) / 2 @ total
        return (total * valid[:, :, None]).sum(1) / valid.sum(1, keepdims=True)

    maps = out["attention"]
    seconds = np.arange(x.shape[1]) < np.asarray(length)[:, None]
    metrics = np.ones((len(x), config.features), bool)

    @jax.jit
    def without(metric: jax.Array) -> jax.Array:
        return model.apply(variables, jnp.asarray(x).at[:, :, metric].set(0), length)["performance"]

    changes = [np.asarray(without(jnp.int32(metric)) - out["performance"]) for metric in range(config.features)]
    return Explanation(
        rollout(maps["temporal"], seconds) if "temporal" in maps else None,
        rollout(maps["system"], metrics) if "system" in maps else None,
        np.stack(changes, axis=1),
    )

"""TSCAN: two days of intensive care read in quarters, over hours and over variables at once.

"Temporal-spatial Correlation Attention Network for Clinical Data Analysis in Intensive Care Unit", Weizhi Nie, Yuhe Yu,
Chen Zhang et al. 2023, arXiv 2306.01970. Code: github.com/yuyuheintju/TSCAN (no licence, models only: no data pipeline,
no weights). The paper's text was not at hand; this module follows the published models.

48 hourly rows are cut into four segments of 12. An encoder layer reads the first; three decoder layers read the others
in turn, each attending to the previous block's output. One such chain has hours as tokens and variables as features,
another ("spatial") variables as tokens and hours as features. Their outputs are joined in time, averaged, classified.

What the published models do and is therefore done here:
- heads live in `embed_dim` features, however narrow the tokens are (12 hours, say);
- a decoder layer has one norm for both of its attentions, and its cross-attention has the causal mask of its
  self-attention, over the order of the variables too (`causal` = ("time",) or () lifts it);
- positions are a table of sines, then cosines, that starts anew in each segment;
- only the first `feature_dim` channels are read: the values without their masks of missingness.

The published file with both chains names a layer before the classifier that it does not build; the files with one chain
have none, and neither has this one.

B batch, D feature_dim, w the width of a chain's tokens, n their number.
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

from kernels import attention
from kernels.attention_readout import attention_entries
from zoo.backbones.encoder import Encoder, EncoderConfig
from zoo.layers.dropout import Dropout
from zoo.layers.mlp import MLP
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.registry import Paper, Variant, register
from zoo.weights import Rule, layer, under

PAPER = Paper(
    slug="tscan",
    title="Temporal-spatial Correlation Attention Network for Clinical Data Analysis in Intensive Care Unit",
    authors="Weizhi Nie et al.",
    venue="arXiv",
    year=2023,
    arxiv="2306.01970",
    claim="Attention over hours and over variables, handed on from quarter to quarter, predicts outcomes of intensive "
    "care better than either alone, and points at key hours and indicators.",
    code="https://github.com/yuyuheintju/TSCAN",
    remarks="The published code has models only: no data pipeline, no weights, no numbers of trained models.",
)

Task = Literal["ihm", "decomp", "los", "ph"]
Stream = Literal["time", "feature"]


@dataclasses.dataclass(frozen=True)
class TSCANConfig:
    """A TSCAN.

    Attributes:
      input_dim: channels of the input.
      feature_dim: D, how many of them are read, the first ones.
      hours, segment: length of the input, and of the pieces it is cut into.
      blocks: segments that are read, the first ones; None: all.
      embed_dim, num_heads: features of the attentions, and their heads.
      ff_dim: hidden features of the feed-forward networks.
      layers: of each block.
      dropout: behind attentions, feed-forward networks, and before the classifier.
      task: "ihm" (mortality), "decomp" (decompensation), "ph" (phenotypes): each output a sigmoid; "los" (length of
        stay): a softmax over bins, or, with one output, a positive number.
      num_outputs: of the classifier.
      streams: the chains, "time", "feature" or both.
      causal: the chains whose decoders are masked.
      fold: whether query and key, and value and output projections are multiplied first (see `folded`); None: where
        tokens are narrower than a head.
      patients_per_tile: patients whose tokens share one sequence of the attention kernel, cut by segment ids.
    """

    input_dim: int = 76
    feature_dim: int = 59
    hours: int = 48
    segment: int = 12
    blocks: int | None = None
    embed_dim: int = 512
    num_heads: int = 8
    ff_dim: int = 512
    layers: int = 1
    dropout: float = 0.3
    task: Task = "ihm"
    num_outputs: int = 1
    streams: tuple[Stream, ...] = ("time", "feature")
    causal: tuple[Stream, ...] = ("time", "feature")
    fold: bool | None = None
    patients_per_tile: int = 1

    def __post_init__(self) -> None:
        for name in ("hours", "segment", "embed_dim", "num_heads", "ff_dim", "layers", "num_outputs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.feature_dim <= self.input_dim:
            raise ValueError(f"feature_dim must be in 1 .. input_dim = {self.input_dim}, got {self.feature_dim}")
        if self.hours % self.segment:
            raise ValueError(f"segments of {self.segment} do not cut {self.hours} hours evenly")
        if self.blocks is not None and not 1 <= self.blocks <= self.hours // self.segment:
            raise ValueError(f"blocks must be in 1 .. {self.hours // self.segment} segments, got {self.blocks}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.task not in get_args(Task):
            raise ValueError(f"task must be one of {get_args(Task)}, got {self.task!r}")
        if not self.streams or not set(self.streams) | set(self.causal) <= set(get_args(Stream)):
            raise ValueError(
                f"streams and causal must be of {get_args(Stream)}, streams not empty; got {self.streams}, "
                f"{self.causal}"
            )
        if self.patients_per_tile < 1:
            raise ValueError(f"patients_per_tile must be at least 1, got {self.patients_per_tile}")

    @property
    def segments(self) -> int:
        """How many segments are read."""
        return self.hours // self.segment if self.blocks is None else self.blocks


def positions(length: int, width: int) -> np.ndarray:
    """float32 (length, width): sines of the angles of even columns, then cosines of those of odd ones.

    Column i has the angles t / 10000^(2 floor(i / 2) / width). Any width: 59 is 30 sines and 29 cosines.
    """
    columns = np.arange(width)
    angles = np.arange(length)[:, None] / 10_000.0 ** (2 * (columns // 2) / width)
    return np.concatenate([np.sin(angles[:, ::2]), np.cos(angles[:, 1::2])], axis=-1).astype(np.float32)


class Folded(NamedTuple):
    """Products of projections: `scores` (heads, w + 1, w + 1) and `values` (heads, w + 1, w)."""

    scores: jax.Array
    values: jax.Array


def folded(projections: Mapping[str, tuple[jax.Array, jax.Array]], heads: int) -> Folded:
    """Query times key, and value times output projections, biases as the row of an input that is always one.

    With x' = [x, 1]: (x W_q + b_q)(m W_k + b_k)^T = x' [W_q; b_q] [W_k; b_k]^T m'^T, of inner width w + 1 in place of a
    head's; and sum_h A_h (m W_v + b_v) W_o = sum_h A_h m' [W_v; b_v] W_o, for the rows of A sum to one. So all heads
    share m' as their key and their value.

    Args:
      projections: kernel and bias of "query", "key", "value" (w, E), (E,) and "out" (E, w), (w,).
      heads: number of heads.
    """
    query, key, value = (
        jnp.concatenate([kernel, bias[None]]).reshape(kernel.shape[0] + 1, heads, -1)
        for kernel, bias in (projections[name] for name in ("query", "key", "value"))
    )
    out = projections["out"][0].reshape(heads, -1, projections["out"][0].shape[-1])
    return Folded(jnp.einsum("whd,vhd->hwv", query, key), jnp.einsum("whd,hdv->hwv", value, out))


def _tiles(x: jax.Array, patients: int) -> jax.Array:
    """(B, n, ...) to (ceil(B / patients), patients * n, ...), zeros behind the last patient."""
    x = jnp.pad(x, [(0, -x.shape[0] % patients)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, patients * x.shape[1], *x.shape[2:])


class ShortAttention(nn.Module):
    """Multi-head attention whose heads are `embed_dim` / `num_heads` wide whatever the tokens' width is."""

    config: TSCANConfig
    causal: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, return_attention: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """x and memory (B, n, w) to (B, n, w), and the weights (B, heads, n, n) if asked."""
        config, width = self.config, x.shape[-1]
        heads, head_dim = config.num_heads, config.embed_dim // config.num_heads
        projections = {
            name: Projection(shape, axes, self.param_dtype, name=name)()
            for name, shape, axes in (
                ("query", (width, config.embed_dim), ("embed", "heads")),
                ("key", (width, config.embed_dim), ("embed", "heads")),
                ("value", (width, config.embed_dim), ("embed", "heads")),
                ("out", (config.embed_dim, width), ("heads", "embed")),
            )
        }
        x, memory, *flat = nn.dtypes.promote_dtype(x, memory, *jax.tree.leaves(projections), dtype=self.dtype)
        projections = jax.tree.unflatten(jax.tree.structure(projections), flat)
        x, memory, *flat = nn.dtypes.promote_dtype(x, memory, *jax.tree.leaves(projections), dtype=self.dtype)
        projections = jax.tree.unflatten(jax.tree.structure(projections), flat)
        fold = width + 1 < head_dim if config.fold is None else config.fold
        if fold:
            x, memory = (jnp.pad(tokens, [(0, 0), (0, 0), (0, 1)], constant_values=1) for tokens in (x, memory))
            scores, values = folded(projections, heads)
            query, key = jnp.einsum("bnw,hwv->bnhv", x, scores), memory[:, :, None]
            value = key
        else:
            query, key, value = (
                (tokens @ projections[name][0] + projections[name][1]).reshape(*tokens.shape[:2], heads, head_dim)
                for name, tokens in (("query", x), ("key", memory), ("value", memory))
            )
        y: Any = self._attend(query, key, value, head_dim**-0.5)
        if fold:
            y = jnp.einsum("bnhw,hwv->bnv", y, values) + projections["out"][1]
        else:
            y = y.reshape(*y.shape[:2], -1) @ projections["out"][0] + projections["out"][1]
        weights = None
        if return_attention:
            weights = attention_entries(query, key, causal=self.causal, scale=head_dim**-0.5)
        return y, weights

    @nn.nowrap
    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> Any:
        batch, length = query.shape[:2]
        patients = min(self.config.patients_per_tile, batch)
        if patients == 1:
            return attention(query, key, value, causal=self.causal, scale=scale)
        ids = jnp.repeat(jnp.arange(patients, dtype=jnp.int32), length)[None]
        query, key, value = (_tiles(array, patients) for array in (query, key, value))
        y: Any = attention(
            query, key, value, causal=self.causal, scale=scale, query_segment_ids=ids, key_segment_ids=ids
        )  # fmt: skip
        return y.reshape(-1, length, *y.shape[2:])[:batch]


class Projection(nn.Module):
    """Kernel and bias of a dense layer, for products that do not follow its own order."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Kernel (in, out) and bias (out,)."""
        kernel_init = partitioned(nn.initializers.glorot_uniform(), *self.axes)
        bias_init = partitioned(nn.initializers.zeros_init(), self.axes[1])
        kernel = self.param("kernel", kernel_init, self.shape, self.param_dtype)
        return kernel, self.param("bias", bias_init, self.shape[1:], self.param_dtype)


class Layer(nn.Module):
    """norm1(x + attention(x)); in decoders norm1(x + cross-attention) again, the same norm; norm2(x + mlp(x))."""

    config: TSCANConfig
    decoder: bool
    causal: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None, train: bool, return_attention: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, n, w), and the previous block's output in decoders, to (B, n, w) and the weights by name."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop, maps = Dropout(config.dropout), {}
        norm1 = norm("layer", epsilon=1e-6, **options, name="norm1")
        for name, source in (("self", x), ("cross", memory))[: 1 + self.decoder]:
            attend = ShortAttention(config, self.causal, **options, name=f"{name}_attention")
            y, weights = attend(x, x if source is None or name == "self" else source, return_attention)
            x = norm1(x + drop(y, train))
            if weights is not None:
                maps[name] = weights
        glorot = nn.initializers.glorot_uniform()
        y = MLP(config.ff_dim, "relu", kernel_init=glorot, out_init=glorot, **options, name="mlp")(x)
        return norm("layer", epsilon=1e-6, **options, name="norm2")(x + drop(y, train)), maps


class Block(nn.Module):
    """Positions, then layers; a decoder's layers all attend to the previous block's output."""

    config: TSCANConfig
    decoder: bool
    causal: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None, train: bool, return_attention: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, n, w) to (B, n, w), and the last layer's weights by name."""
        x = Dropout(self.config.dropout)(x + positions(*x.shape[1:]), train)
        maps: dict[str, jax.Array] = {}
        for index in range(self.config.layers):
            options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": f"layer_{index}"}
            x, maps = Layer(self.config, self.decoder, self.causal, **options)(x, memory, train, return_attention)
        return x, maps


class TSCAN(nn.Module):
    """One or two chains of an encoder and decoders, and a classifier on their mean."""

    config: TSCANConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, return_attention: bool = False) -> dict[str, Any]:
        """Predictions of a task.

        Args:
          x: float (B, hours, input_dim), standardised and without gaps; channels behind feature_dim are not read.
          train: use dropout, of the rng collection "dropout".
          return_attention: also return the attentions' weights.

        Returns:
          "logits" and "prob" (B, num_outputs); "features" (B, segment times the number of chains, D), what is averaged;
          if asked "attention": for each chain a list with a dict for each block, "self" and, in decoders, "cross",
          float32 (B, heads, n, n).

        Raises:
          ValueError, TypeError: the input's shape or dtype is wrong.
        """
        config = self.config
        check_hours(x, config)
        x = x[..., : config.feature_dim]
        outputs: list[jax.Array] = []
        maps: dict[str, list[dict[str, jax.Array]]] = {}
        for stream in config.streams:
            tokens = x if stream == "time" else x.swapaxes(1, 2)
            axis = 1 if stream == "time" else 2
            y, maps[stream] = None, []
            for index in range(config.segments):
                decoder = index > 0
                block = Block(
                    config, decoder, causal=decoder and stream in config.causal, dtype=self.dtype,
                    param_dtype=self.param_dtype, name=f"{stream}_decoder_{index}" if decoder else f"{stream}_encoder",
                )  # fmt: skip
                segment = jax.lax.slice_in_dim(tokens, index * config.segment, (index + 1) * config.segment, axis=axis)
                y, weights = block(segment, y, train, return_attention)
                maps[stream].append(weights)
            assert y is not None
            outputs.append(y if stream == "time" else y.swapaxes(1, 2))
        features = jnp.concatenate(outputs, axis=1)
        logits = Head(config, self.dtype, self.param_dtype, name="head")(features.mean(axis=1), train)
        out = {"logits": logits, "prob": probabilities(logits, config), "features": features}
        return {**out, "attention": maps} if return_attention else out


class Head(nn.Module):
    """Dropout and a dense layer."""

    config: TSCANConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, features) to (B, num_outputs)."""
        x = Dropout(self.config.dropout)(x, train)
        return dense(
            self.config.num_outputs, ("embed", None), kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype, param_dtype=self.param_dtype, name="dense",
        )(x)  # fmt: skip


class TransformerBaseline(nn.Module):
    """The plain baseline: a bidirectional encoder over all hours, averaged, with the widths of the config."""

    config: TSCANConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """(B, hours, input_dim) to "logits" and "prob" (B, num_outputs); arguments and errors as of `TSCAN`."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_hours(x, config)
        x = dense(config.embed_dim, (None, "embed"), **options, name="embed")(x[..., : config.feature_dim])
        encoder = EncoderConfig(
            features=config.embed_dim, layers=config.layers, heads=config.num_heads, mlp_features=config.ff_dim,
            mlp="relu", norm="layer", norm_position="post", dropout=config.dropout, causal=False,
        )  # fmt: skip
        x = Encoder(encoder, **options, name="encoder")(x + positions(*x.shape[1:]), deterministic=not train)
        logits = Head(config, **options, name="head")(x.mean(axis=1), train)
        return {"logits": logits, "prob": probabilities(logits, config)}


class GRUBaseline(nn.Module):
    """The recurrent baseline: a GRU of embed_dim units over all hours, its last state classified."""

    config: TSCANConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """(B, hours, input_dim) to "logits" and "prob" (B, num_outputs); arguments and errors as of `TSCAN`."""
        check_hours(x, self.config)
        states: Any = nn.RNN(nn.GRUCell(self.config.embed_dim), name="gru")(x[..., : self.config.feature_dim])
        logits = Head(self.config, name="head")(states[:, -1], train)
        return {"logits": logits, "prob": probabilities(logits, self.config)}


def check_hours(x: jax.Array, config: TSCANConfig) -> None:
    """Raises ValueError or TypeError unless x is float (B, hours, input_dim)."""
    if x.ndim != 3 or x.shape[1:] != (config.hours, config.input_dim):
        raise ValueError(f"x must be (batch, {config.hours} hours, {config.input_dim} channels), got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating point and standardised, got {x.dtype}")


def probabilities(logits: jax.Array, config: TSCANConfig) -> jax.Array:
    """The task's activation: sigmoids, a softmax over bins, or a ReLU where length of stay is one number."""
    if config.task != "los":
        return nn.sigmoid(logits)
    return nn.softmax(logits) if config.num_outputs > 1 else nn.relu(logits)


def loss(model: nn.Module) -> Callable:
    """The loss of `zoo.train` on batches of "x" and "y".

    Binary cross-entropy, y float (B, num_outputs); for "los" categorical cross-entropy, y int (B,), or with one output
    the squared error, y float (B, 1).
    """
    config = model.config

    def loss_function(params, model_state, batch, rngs, train):
        logits = model.apply({"params": params}, batch["x"], train=train, rngs=rngs)["logits"]
        if config.task != "los":
            losses = optax.sigmoid_binary_cross_entropy(logits, batch["y"])
        elif config.num_outputs > 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        else:
            losses = (nn.relu(logits) - batch["y"]) ** 2
        return losses.mean(), (model_state, {})

    return loss_function


def example_inputs(config: TSCANConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Normal values for `TSCAN.__call__`."""
    shape = (batch_size, config.hours, config.input_dim)
    return {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}


def example_targets(config: TSCANConfig, batch_size: int) -> dict[str, np.ndarray]:
    """What the loss reads beside the inputs."""
    rng = np.random.default_rng(1)
    if config.task == "los" and config.num_outputs > 1:
        return {"y": rng.integers(0, config.num_outputs, batch_size).astype(np.int32)}
    return {"y": rng.integers(0, 2, (batch_size, config.num_outputs)).astype(np.float32)}


def _attention_rules(published: str, path: str) -> list[Rule]:
    return [
        *layer("linear", rf"{published}\.(query|key|value)_dense", path + "/{0}"),
        *layer("linear", rf"{published}\.combine_heads", f"{path}/out"),
    ]


_MLP = [*layer("linear", r"ffn\.0", "mlp/up"), *layer("linear", r"ffn\.1", "mlp/down")]
_ENCODER = [
    *_attention_rules("att", "self_attention"),
    *_MLP,
    *layer("norm", "layernorm1", "norm1"),
    *layer("norm", "layernorm3", "norm2"),
]
_DECODER = [
    *_attention_rules("sel_att", "self_attention"),
    *_attention_rules("att", "cross_attention"),
    *_MLP,
    *layer("norm", "layernorm(1|2)", "norm{0}"),
]


def weight_rules(config: TSCANConfig) -> list[Rule]:
    """The published attribute paths (kernels as in torch)."""
    rules = layer("linear", "Dense", "head/dense")
    for stream, letter in (("time", ""), ("feature", "f")):
        rules += under(rf"decoder\.encoder{letter}\.encode_layer\.(\d+)", f"{stream}_encoder/layer_{{0}}", _ENCODER)
        rules += under(
            rf"decoder\.decoder{letter}(\d+)\.decoder_layer\.(\d+)", f"{stream}_decoder_{{0}}/layer_{{1}}", _DECODER
        )
    return rules


_MIMIC4: dict[str, Any] = {"input_dim": 352, "feature_dim": 197}
register(
    PAPER,
    Variant("tscan_tandf", TSCANConfig(), 1_336_249),
    Variant("tscan_t", TSCANConfig(**_MIMIC4, streams=("time",)), 3_649_421),
    Variant("tscan_f", TSCANConfig(**_MIMIC4, streams=("feature",))),
    Variant("tscan_tandf_mimic4", TSCANConfig(**_MIMIC4)),
    Variant("tscan_transformer", TSCANConfig(**_MIMIC4, streams=("time",), blocks=2)),
    Variant("tscan_split24", TSCANConfig(hours=24)),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
    example_targets=example_targets,
)(TSCAN)


def _received(weights: np.ndarray, causal: bool) -> np.ndarray:
    """(..., n, n) to (n,): mean weight of each key, over that under uniform attention with the same mask."""
    n = weights.shape[-1]
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None] if causal else np.full((n, n), 1 / n)
    return np.asarray(weights, np.float64).reshape(-1, n, n).mean(0).sum(0) / uniform.sum(0)


def key_hours(attention: Sequence[Mapping[str, Any]], causal: bool = True) -> np.ndarray:
    """How much each hour is attended to, relative to uniform attention: float (hours that are read,).

    The mean of what hours receive in their own block's self-attention and in the next block's cross-attention, over
    patients, heads and queries. Relative, for under a causal mask early hours receive more from any attention.

    Args:
      attention: the blocks of the chain over time, as `TSCAN` returns them.
      causal: whether its decoders are masked.
    """
    hours = []
    for index, block in enumerate(attention):
        seen = [_received(block["self"], causal and index > 0)]
        if index + 1 < len(attention):
            seen.append(_received(attention[index + 1]["cross"], causal))
        hours.append(np.mean(seen, axis=0))
    return np.concatenate(hours)


def key_indicators(
    attention: Sequence[Mapping[str, Any]], names: Sequence[str], causal: bool = True
) -> list[tuple[str, float]]:
    """Variables and how much they are attended to, relative to uniform attention, the most first.

    Args:
      attention: the blocks of the chain over variables, as `TSCAN` returns them.
      names: of the variables, in their order.
      causal: whether its decoders are masked.

    Raises:
      ValueError: there are not as many names as variables.
    """
    maps = [(weights, causal and index > 0) for index, block in enumerate(attention) for weights in block.values()]
    received = np.mean([_received(weights, masked) for weights, masked in maps], axis=0)
    if len(names) != len(received):
        raise ValueError(f"{len(names)} names for {len(received)} variables")
    return sorted(zip(names, received.tolist(), strict=True), key=lambda pair: -pair[1])


def clinical_metrics(task: Task, y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """The clinical benchmark's metrics (Harutyunyan et al. 2019), by scikit-learn.

    Args:
      task: "ihm" and "decomp": "auroc" and "auprc"; "ph": "auroc_macro", "auroc_micro"; "los": "kappa" (Cohen's, with
        linear weights) and "mad" (mean absolute difference, in bins).
      y: labels 0 or 1 (N,) or (N, 1), for "ph" (N, P); for "los" bins, int (N,).
      p: probabilities of the same shape; for "los" (N, bins).

    Returns:
      Numbers by name; NaN where only one class is there.

    Raises:
      ValueError: the task is unknown, or shapes do not fit.
      ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn import metrics

    y, p = np.asarray(y), np.asarray(p)
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {get_args(Task)}, got {task!r}")
    if task == "los":
        if p.ndim != 2 or y.shape != p.shape[:1]:
            raise ValueError(f"bins (N,) and their probabilities (N, bins) do not fit: {y.shape}, {p.shape}")
        found = p.argmax(1)
        kappa = metrics.cohen_kappa_score(y, found, labels=list(range(p.shape[1])), weights="linear")
        return {"kappa": float(kappa), "mad": float(np.abs(found - y).mean())}
    if y.size != p.size or len(y) != len(p):
        raise ValueError(f"labels {y.shape} and probabilities {p.shape} do not fit")
    if task == "ph":
        y = y.reshape(p.shape)
        each = [_binary(metrics.roc_auc_score, y[:, column], p[:, column]) for column in range(p.shape[-1])]
        return {"auroc_macro": float(np.mean(each)), "auroc_micro": _binary(metrics.roc_auc_score, y, p)}
    return {
        "auroc": _binary(metrics.roc_auc_score, y, p),
        "auprc": _binary(metrics.average_precision_score, y, p),
    }


def _binary(metric: Callable[..., float], y: np.ndarray, p: np.ndarray) -> float:
    y, p = y.reshape(-1), p.reshape(-1)
    return float(metric(y, p)) if 0 < y.sum() < len(y) else float("nan")

"""Layers of both Informers: attention with its two cores, encoder and decoder layers, distilling, embeddings.

B batch, L time, H heads, E = d_model / H. All blocks are post-norm, all linear layers have biases.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import attention, prob_sparse
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.dropout import Dropout
from zoo.layers.mlp import PLAIN
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import sinusoids

_TABLE_SIZES = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}  # in the order of the marks


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What an encoder or decoder layer is made of.

    Attributes:
      features, heads, hidden: d_model, H, and the width of the feed-forward layer.
      sampling: None for canonical self-attention, else how ProbSparse samples keys (see `sampling_sizes`).
      factor: ProbSparse's c.
      mix: the decoder's self-attention output is reinterpreted, see `MultiHeadAttention`.
      dropout, hidden_dropout: rates on the branches and behind the activation.
      attention_dropout, sparse_dropout: rates on the weights of canonical attention and of ProbSparse's active rows.
      activation: "gelu" or "relu".
      init_std: standard deviation of normal initial weights with zero biases; None for the uniform default of PyTorch.
    """

    features: int
    heads: int
    hidden: int
    sampling: Literal["per_query", "shared"] | None
    factor: int
    mix: bool
    dropout: float
    hidden_dropout: float
    attention_dropout: float
    sparse_dropout: float
    activation: Literal["gelu", "relu"]
    init_std: float | None = None


class AttentionMap(NamedTuple):
    """What a self-attention did: its weights (B, H, L_Q, L_K) and its active queries (B, H, u), None if all are."""

    weights: jax.Array
    active: jax.Array | None


class SamplingSizes(NamedTuple):
    """Sizes of one ProbSparse call: the table of sampled keys, and the number of active queries."""

    table: tuple[int, ...]
    active: int


def sampling_sizes(rule: Literal["per_query", "shared"], factor: int, queries: int, keys: int) -> SamplingSizes:
    """U_part and u of a ProbSparse call.

    Args:
      rule: "per_query" (published code): min(c ceil(ln L_K), L_K) keys for each query and min(c ceil(ln L_Q), L_Q)
        active queries. "shared" (transformers library): min(c L_Q ceil(ln(1 + L_K)), L_K) keys for all queries, and
        ln(1 + L_Q) for ln L_Q.
      factor: c.
      queries, keys: L_Q and L_K.
    """
    if rule == "per_query":
        return SamplingSizes(
            (queries, prob_sparse.sample_size(factor, keys)), prob_sparse.active_queries(factor, queries)
        )
    samples = min(factor * queries * math.ceil(math.log1p(keys)), keys)
    return SamplingSizes((samples,), min(factor * math.ceil(math.log1p(queries)), queries))


def linear(
    features: int, fan_in: int, axes: tuple[str | None, str | None], init_std: float | None = None, **options: Any
) -> nn.Dense:
    """A dense layer initialised as PyTorch does (uniform in +-1/sqrt(fan_in)), or normal with zero bias."""
    if init_std is not None:
        return dense(features, axes, kernel_init=nn.initializers.normal(init_std), **options)
    bound = _uniform(fan_in**-0.5)
    return dense(features, axes, kernel_init=bound, bias_init=bound, **options)


def circular_convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolution of width 3 along time with circular padding, as one product with the shifted copies side by side.

    Args:
      x: (B, L, c).
      kernel: (3, c, d); kernel[1] meets the step itself, kernel[0] the one before.
      bias: (d,).

    Returns:
      (B, L, d).
    """
    shifted = jnp.concatenate([jnp.roll(x, 1, axis=1), x, jnp.roll(x, -1, axis=1)], axis=-1)
    return shifted @ kernel.reshape(-1, kernel.shape[-1]) + bias


class CircularConv(nn.Module):
    """`circular_convolution` with its parameters."""

    features: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, L, c) -> (B, L, features)."""
        shape = (3, x.shape[-1], self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, None, None, "embed"), shape, self.param_dtype)
        bias = self.param("bias", partitioned(self.bias_init, "embed"), shape[-1:], self.param_dtype)
        return circular_convolution(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


class Embedding(nn.Module):
    """Value + position + time, then dropout: every step's vector.

    Value: circular convolution of width 3, Kaiming-normal weights. Position: fixed sinusoids. Time: a linear map of
    real-valued marks ("timeF"), or the sum of tables of calendar fields, fixed sinusoids or learned.
    """

    features: int
    kind: Literal["timeF", "fixed", "learned"]
    dropout: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, marks: jax.Array, train: bool) -> jax.Array:
        """(B, L, c) values and (B, L, m) marks -> (B, L, features)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # PyTorch's "leaky_relu" gain at slope 0 is sqrt(2), that is variance 2 / fan_in, of a normal not truncated.
        kaiming = nn.initializers.normal(math.sqrt(2 / (3 * x.shape[-1])))
        bias_init = _uniform((3 * x.shape[-1]) ** -0.5)
        value = CircularConv(self.features, kaiming, bias_init, **options, name="value")(x)
        position = jnp.asarray(sinusoids(x.shape[1], self.features), self.dtype)
        if self.kind == "timeF":
            time = linear(self.features, marks.shape[-1], (None, "embed"), **options, name="time")(marks)
        else:
            fields = marks.astype(jnp.int32)
            time = sum(
                self._table(name, size)[fields[..., index]]
                for index, (name, size) in enumerate(_TABLE_SIZES.items())
                if index < marks.shape[-1]
            )
        return Dropout(self.dropout)(value + position + time, train)

    def _table(self, name: str, size: int) -> jax.Array:
        if self.kind == "fixed":
            return jnp.asarray(sinusoids(size, self.features), self.dtype)
        init = partitioned(nn.initializers.normal(1.0), None, "embed")
        return self.param(name, init, (size, self.features), self.param_dtype).astype(self.dtype)


class MultiHeadAttention(nn.Module):
    """Projections around canonical or ProbSparse attention.

    With `mix`, the core's (B, L, H, E) output is transposed to (B, H, L, E) and that memory is read as (B, L, H E):
    it scrambles time and heads, and the published results have it.
    """

    config: LayerConfig
    sampling: Literal["per_query", "shared"] | None = None
    causal: bool = False
    mix: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        sample_keys: jax.Array | None,
        train: bool,
        return_map: bool = False,
        steps: int | None = None,
    ) -> tuple[jax.Array, AttentionMap | None]:
        """Attends from x (B, L_Q, d_model) to memory (B, L_K, d_model); gives the last `steps` steps, all if None.

        `sample_keys` are the keys ProbSparse samples, drawn from the rng collection "sample" where None.
        """
        batch, queries, features = x.shape
        keys, heads = memory.shape[1], self.config.heads
        options = {"init_std": self.config.init_std, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, source: jax.Array) -> jax.Array:
            projected = linear(features, features, ("embed", "heads"), **options, name=name)(source)
            return projected.reshape(batch, -1, heads, features // heads)

        query, key, value = project("query", x), project("key", memory), project("value", memory)
        rate = self.config.sparse_dropout if self.sampling else self.config.attention_dropout
        rate = rate if train else 0.0
        dropout_rng = self.make_rng("dropout") if rate else None
        out: Any
        active = None
        if self.sampling is None:
            out = attention(query, key, value, causal=self.causal, dropout_rate=rate, dropout_rng=dropout_rng)
        else:
            sizes = sampling_sizes(self.sampling, self.config.factor, queries, keys)
            if sample_keys is None:
                sample_keys = jax.random.randint(self.make_rng("sample"), sizes.table, 0, keys, jnp.int32)
            elif sample_keys.shape != sizes.table:
                raise ValueError(
                    f"sample_keys of {'/'.join(self.path)} must have shape {sizes.table}, got {sample_keys.shape}"
                )
            out, _, active, _ = prob_sparse.prob_sparse_attention(
                query, key, value, sample_keys, queries=sizes.active, causal=self.causal, dropout_rate=rate,
                dropout_rng=dropout_rng,
            )  # fmt: skip
        attention_map = None
        if return_map:
            # Canonical attention is ProbSparse with every query active.
            top = jnp.broadcast_to(jnp.arange(queries), (batch, heads, queries)) if active is None else active
            attention_map = AttentionMap(prob_sparse.attention_map(query, key, top, causal=self.causal), active)
        if self.mix:
            out = out.swapaxes(1, 2)
        out = out.reshape(batch, queries, features)[:, queries - (steps or queries) :]
        return linear(features, features, ("heads", "embed"), **options, name="out")(out), attention_map


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them and after them."""

    config: LayerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, L, d_model) -> (B, L, d_model)."""
        config = self.config
        options = {"init_std": config.init_std, "dtype": self.dtype, "param_dtype": self.param_dtype}
        y = linear(config.hidden, config.features, ("embed", "mlp"), **options, name="hidden")(x)
        y = Dropout(config.hidden_dropout)(PLAIN[config.activation](y), train)
        y = linear(config.features, config.hidden, ("mlp", "embed"), **options, name="out")(y)
        return Dropout(config.dropout)(y, train)


class EncoderLayer(nn.Module):
    """x = norm(x + dropout(attention(x))); norm(x + feed_forward(x))."""

    config: LayerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, sample_keys: jax.Array | None, train: bool, return_map: bool = False
    ) -> tuple[jax.Array, AttentionMap | None]:
        """(B, L, d_model) -> (B, L, d_model) and what the attention did."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = MultiHeadAttention(self.config, self.config.sampling, **options, name="attention")
        y, attention_map = attend(x, x, sample_keys, train, return_map)
        x = norm("layer", epsilon=1e-5, **options, name="norm1")(x + Dropout(self.config.dropout)(y, train))
        y = FeedForward(self.config, **options, name="feed_forward")(x, train)
        return norm("layer", epsilon=1e-5, **options, name="norm2")(x + y), attention_map


class DecoderLayer(nn.Module):
    """Causal self-attention, canonical attention to the encoder's output, feed-forward; a norm after each."""

    config: LayerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        sample_keys: jax.Array | None,
        train: bool,
        return_map: bool = False,
        steps: int | None = None,
    ) -> tuple[jax.Array, AttentionMap | None, AttentionMap | None]:
        """(B, L, d_model), encoder output (B, M, d_model) -> (B, steps, d_model), what self- and cross-attention did.

        Only the last `steps` are computed behind the self-attention (all if None): nothing else mixes the decoder's
        time steps, so a last layer need not compute what is thrown away.
        """
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = MultiHeadAttention(
            config, config.sampling, causal=True, mix=config.mix, **options, name="self_attention"
        )
        y, self_map = attend(x, x, sample_keys, train, return_map, steps)
        x = x[:, x.shape[1] - y.shape[1] :]
        x = norm("layer", epsilon=1e-5, **options, name="norm1")(x + Dropout(config.dropout)(y, train))
        attend = MultiHeadAttention(config, **options, name="cross_attention")
        y, cross_map = attend(x, memory, None, train, return_map)
        x = norm("layer", epsilon=1e-5, **options, name="norm2")(x + Dropout(config.dropout)(y, train))
        y = FeedForward(config, **options, name="feed_forward")(x, train)
        return norm("layer", epsilon=1e-5, **options, name="norm3")(x + y), self_map, cross_map


class Distil(nn.Module):
    """Halves the time axis: circular convolution, batch norm, ELU, max-pooling of width 3 and stride 2.

    The paper has no batch norm, its code does.
    """

    init_std: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, L, d_model) -> (B, ceil(L / 2), d_model)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        bound = _uniform((3 * x.shape[-1]) ** -0.5)
        kernel_init = bound if self.init_std is None else nn.initializers.normal(self.init_std)
        bias_init = bound if self.init_std is None else nn.initializers.zeros_init()
        x = CircularConv(x.shape[-1], kernel_init, bias_init, **options, name="conv")(x)
        x = BatchNorm(**options, name="norm")(x, train)
        x = jnp.pad(nn.elu(x), ((0, 0), (1, 1), (0, 0)), constant_values=-jnp.inf)
        # Three strided slices: a windowed maximum's gradient is slow on a CPU.
        length = x.shape[1] - 2
        return jnp.maximum(jnp.maximum(x[:, 0:length:2], x[:, 1 : length + 1 : 2]), x[:, 2 : length + 2 : 2])


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)

"""A decoder of bytes whose attention maps may be graphs of the values, with a cache that holds graph states.

B sequences, L tokens, H heads, e channels a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from zoo.layers import norms
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.dropout import Dropout
from zoo.layers.mlp import NormedMLP
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import half_sinusoids

_gelu = partial(nn.gelu, approximate=False)
_ROWS = 128  # of the map that are whole at a time, where thresholds need its entries


@dataclasses.dataclass(frozen=True)
class GraphGPTConfig:
    """A decoder of bytes, with or without graphs.

    Attributes:
      features: width of the residual stream.
      depth: layers.
      heads, head_features: attention heads and e.
      mlp_ratio: hidden features of the feed-forward network over `features`.
      embedding: width of the embedding of tokens, before the map to `features`.
      position_features: width of the sinusoids; the embedding's where they are added.
      tokens, logits: numbers of input tokens and of logits.
      graph_layers: convolutions on the attention's graph in each layer; 0 is a plain transformer.
      graph_skip: whether a node keeps its own state in each of them.
      graph_identity: whether 1 is added to a node's link to itself.
      graph_clamp: whether links are clamped to [0, 1] then, which makes that one 1.
      threshold_min, threshold_max: links below the one become 0, above the other 1.
      dropout: before each projection of the attention, and behind the graph.
      null_key: whether a learned key and value is in front; not with the graph.
      one_kv_head: whether heads share one key and value; not with the graph.
      concat_positions: whether sinusoids are appended to the embedding, and not added.
      mlp_kernel, mlp_inner_kernel: sizes of the feed-forward network's causal depthwise convolutions around it and
        inside; with neither it is the published one with two norms.
      mlp_gated: whether a network with convolutions is gated.
    """

    features: int = 256
    depth: int = 12
    heads: int = 8
    head_features: int = 32
    mlp_ratio: int = 4
    embedding: int = 32
    position_features: int = 32
    tokens: int = 256
    logits: int = 256
    graph_layers: int = 3
    graph_skip: bool = True
    graph_identity: bool = False
    graph_clamp: bool = True
    threshold_min: float = 0.0
    threshold_max: float = 1.0
    dropout: float = 0.1
    null_key: bool = False
    one_kv_head: bool = False
    concat_positions: bool = False
    mlp_kernel: int = 0
    mlp_inner_kernel: int = 0
    mlp_gated: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "depth", "heads", "head_features", "mlp_ratio", "embedding", "tokens", "logits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.graph_layers, self.mlp_kernel, self.mlp_inner_kernel) < 0:
            raise ValueError("graph_layers, mlp_kernel and mlp_inner_kernel must not be negative")
        if self.graph_layers and (self.null_key or self.one_kv_head):
            raise ValueError("a graph needs one value a token and head: not null_key, not one_kv_head")
        if self.position_features % 2 or self.position_features < 2:
            raise ValueError(f"position_features must be even and positive, got {self.position_features}")
        if not self.concat_positions and self.position_features != self.embedding:
            raise ValueError(
                f"added positions are as wide as the embedding, got {self.position_features} and {self.embedding}"
            )
        if not 0 <= self.threshold_min <= self.threshold_max <= 1:
            raise ValueError(f"thresholds must be ordered in [0, 1], got {self.threshold_min}, {self.threshold_max}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def thresholds(self) -> bool:
        """Whether links are changed by their size."""
        return self.threshold_min > 0 or self.threshold_max < 1


def example_inputs(config: GraphGPTConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 64."""
    return {"tokens": np.random.default_rng(0).integers(0, config.tokens, (batch_size, 64), dtype=np.int32)}


# ------------------------------------------------------------------------------------------------------------ graph


def link(weights: jax.Array, own: jax.Array, config: GraphGPTConfig) -> jax.Array:
    """Attention weights (..., queries, keys) as links; `own`, bool, says which key is the query itself."""
    if config.graph_identity:
        weights = weights + own
        if config.graph_clamp:
            weights = jnp.clip(weights, 0, 1)
    if config.thresholds:
        weights = jnp.where(weights < config.threshold_min, 0, weights)
        weights = jnp.where(weights > config.threshold_max, 1, weights)
    return weights


def spread(links: jax.Array, nodes: jax.Array) -> jax.Array:
    """The mean of the neighbours: links (B, H, queries, keys), nodes (B, keys, H, e); no link gives 0."""
    total = links.sum(axis=-1)
    mean = jnp.einsum("bhqk,bkhe->bqhe", links, nodes.astype(jnp.float32))
    return mean / jnp.where(total > 0, total, 1).swapaxes(1, 2)[..., None]


class Graph(nn.Module):
    """Convolutions on a graph of tokens, the same for all heads: z <- gelu(mean of neighbours' (W z + b) + skip z).

    The first one's messages, W v + b, are asked for ahead (`message`), so that the attention's own pass spreads them.
    """

    config: GraphGPTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The layers."""
        width = self.config.head_features
        make: Callable[..., nn.Dense] = partial(
            dense, width, (None, None), kernel_init=torch_kernel_init, bias_init=torch_bias_init(width),
            dtype=self.dtype, param_dtype=self.param_dtype,
        )  # fmt: skip
        self.layers = [make(name=f"layer_{index}") for index in range(self.config.graph_layers)]
        self.out = make()
        self.drop = Dropout(self.config.dropout)

    def message(self, layer: int, nodes: jax.Array) -> jax.Array:
        """(..., e) to the same."""
        return self.layers[layer](nodes)

    def __call__(
        self, value: jax.Array, hop: Callable[[int, jax.Array], jax.Array], train: bool, first: jax.Array | None = None
    ) -> jax.Array:
        """Values (B, L, H, e) to the same, after all layers.

        Args:
          value: z of the start.
          hop: (layer, messages) to the means of neighbours' messages.
          train: dropout.
          first: the means of the first layer, where they are known.
        """
        nodes = value
        for layer in range(self.config.graph_layers):
            if layer == 0 and first is not None:
                means = first
            else:
                means = hop(layer, self.layers[layer](nodes))
            nodes = _gelu(means.astype(nodes.dtype) + (nodes if self.config.graph_skip else 0))
        return self.out(self.drop(nodes, train))


class Hops(NamedTuple):
    """Functions that spread values along causal attention, and along its graph."""

    attend: Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # (B, L, H, any) to the same, and logsumexp (B, H, L)
    hop: Callable[[int, jax.Array], jax.Array]  # (layer, messages (B, L, H, e)) to means of neighbours
    from_attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (messages, what `attend` gave) to means


def graph_hops(query: jax.Array, key: jax.Array, config: GraphGPTConfig, segments: Mapping[str, Any]) -> Hops:
    """The functions of `Hops`, none of which makes the map whole.

    Attention's rows add up to 1, so a hop along it is attention with other values. A clamped link to oneself is 1 in
    the place of A_ii = exp(q_i . k_i - logsumexp_i), and the row adds up to 2 - A_ii. Thresholds need the map's
    entries: it is made some rows at a time.

    Args:
      query, key: (B, L, H, e), the query scaled.
      config: of the network.
      segments: of `attention`, where keys are hidden.
    """
    attend = partial(_attend, query, key, segments)

    def own_weight(logsumexp: jax.Array) -> jax.Array:
        logits = jnp.sum(query.astype(jnp.float32) * key, axis=-1)
        weight = jnp.exp(logits - logsumexp.swapaxes(1, 2))
        if "key_segment_ids" in segments:  # a hidden key is not attended to; 1 is added to its link all the same
            weight = jnp.where(segments["key_segment_ids"][:, :, None] == 0, weight, 0)
        return weight[..., None]

    def hop(layer: int, messages: jax.Array) -> jax.Array:
        if config.thresholds:
            return _thresholded(query, key, messages, config, segments)
        return from_attention(messages, *attend(messages))

    def from_attention(messages: jax.Array, means: jax.Array, logsumexp: jax.Array) -> jax.Array:
        if not config.graph_identity:
            return means
        if not config.graph_clamp:
            return (means + messages) / 2
        own = own_weight(logsumexp)
        return (means + (1 - own) * messages) / (2 - own)

    return Hops(attend, hop, from_attention)


def _attend(
    query: jax.Array, key: jax.Array, segments: Mapping[str, Any], value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    out: Any = attention(query, key, value, causal=True, scale=1.0, return_logsumexp=True, **segments)
    return out


def _thresholded(
    query: jax.Array, key: jax.Array, messages: jax.Array, config: GraphGPTConfig, segments: Mapping[str, Any]
) -> jax.Array:
    """Some rows of the map at a time, made again for the gradient."""
    batch, length, heads, _ = query.shape
    size = min(_ROWS, length)
    blocks = -(-length // size)
    padded = jnp.pad(query, ((0, 0), (0, blocks * size - length), (0, 0), (0, 0)))
    visible = segments["key_segment_ids"] == 0 if segments else jnp.ones((1, length), bool)

    @jax.checkpoint
    def rows(block: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, block * size, size, axis=1)
        place = block * size + jnp.arange(size)
        seen = (place[:, None] >= jnp.arange(length))[None, None] & visible[:, None, None]
        weights = attention_map(part, key, seen)
        return spread(link(weights, place[:, None] == jnp.arange(length), config), messages)

    found = jnp.moveaxis(jax.lax.map(rows, jnp.arange(blocks)), 0, 1)
    return found.reshape(batch, blocks * size, heads, -1)[:, :length]


def attention_map(query: jax.Array, key: jax.Array, seen: jax.Array) -> jax.Array:
    """float32 (B, H, queries, keys) of a scaled query; key heads may be one. For few rows, and for reading graphs."""
    key = jnp.broadcast_to(key, (*key.shape[:2], query.shape[2], key.shape[3]))
    logits = jnp.einsum("bqhe,bkhe->bhqk", query, key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(jnp.float32).min))


def graph_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, graph: Callable[..., jax.Array], messages: jax.Array,
    config: GraphGPTConfig, *, segments: Mapping[str, Any] | None = None, dense: bool = False,
    train: bool = False,
) -> jax.Array:  # fmt: skip
    """A v + graph(A, v) for causal A = softmax(q k^T).

    Args:
      query, key, value: (B, L, H, e), the query scaled.
      graph: a bound `Graph`.
      messages: its first layer's, of `value`.
      config: of the network.
      segments: of `kernels.attention.attention`, where keys are hidden.
      dense: whether the map is made whole: the definition, for tests.
      train: dropout of the graph.
    """
    segments = segments or {}
    if dense:
        length = query.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if segments:
            seen = seen & (segments["key_segment_ids"] == 0)[:, None, None]
        weights = jnp.where(seen, attention_map(query, key, seen), 0)
        links = link(weights, jnp.eye(length, dtype=bool), config)
        return _plain_mean(weights, value) + graph(value, lambda _, nodes: spread(links, nodes), train)
    attend, hop, from_attention = graph_hops(query, key, config, segments)
    if config.thresholds:
        return attend(value)[0] + graph(value, hop, train)
    # The first hop shares the pass of the attention itself.
    together, logsumexp = attend(jnp.concatenate([value, messages], axis=-1))
    out, means = jnp.split(together, 2, axis=-1)
    return out + graph(value, hop, train, from_attention(messages, means, logsumexp))


# ---------------------------------------------------------------------------------------------------------- network


class Cache(NamedTuple):
    """The past of one layer. Slots from the number of tokens seen on are free."""

    key: jax.Array  # (B, slots, key heads, e)
    values: jax.Array  # (1 + graph layers, B, slots, key heads, e): v, then the messages of each graph layer


class GraphAttention(nn.Module):
    """norm(W_o (A v + graph(A, v))), of a normed input."""

    config: GraphGPTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool, hidden: jax.Array | None, past: tuple[Cache, jax.Array] | None
    ) -> tuple[jax.Array, Cache | None]:
        """(B, L, features), keys to hide, bool (B, L); or one token (B, 1, features) with cache and its place."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads, width = config.heads, config.head_features
        key_heads = 1 if config.one_kv_head else heads
        y = norm(self, "norm")(x)

        def project(name: str, count: int) -> jax.Array:
            layer = dense(
                count * width, ("embed", "heads" if count > 1 else "kv_heads"), use_bias=False,
                kernel_init=torch_kernel_init, **options, name=name,
            )  # fmt: skip
            z = layer(Dropout(config.dropout)(y, train))
            return z.reshape(*z.shape[:2], count, width)

        query, key, value = (
            project("query", heads) * width**-0.5,
            project("key", key_heads),
            project("value", key_heads),
        )
        null = [
            self.param(name, partitioned(nn.initializers.normal(1.0), None), (key_heads * width,), self.param_dtype)
            for name in ("null_key", "null_value")
        ]
        graph = Graph(config, **options, name="graph") if config.graph_layers else None
        if past is None:
            mixed, cache = self._parallel(query, key, value, null, graph, hidden, train), None
        else:
            mixed, cache = self._step(query, key, value, null, graph, *past)
        merged = mixed.astype(x.dtype).reshape(*x.shape[:2], heads * width)
        out = dense(
            x.shape[-1], ("heads", "embed"), use_bias=False, kernel_init=torch_kernel_init, **options, name="out"
        )(merged)  # fmt: skip
        return norm(self, "out_norm")(out), cache

    @nn.nowrap
    def _parallel(
        self, query: jax.Array, key: jax.Array, value: jax.Array, null: list[jax.Array], graph: Graph | None,
        hidden: jax.Array | None, train: bool,
    ) -> jax.Array:  # fmt: skip
        config = self.config
        segments: dict[str, Any] = {}
        if hidden is not None:
            segments = {
                "query_segment_ids": jnp.zeros_like(hidden, jnp.int32),
                "key_segment_ids": hidden.astype(jnp.int32),
            }
        if graph is None:
            if config.null_key:
                key, value = (self._with_null(x, row) for x, row in zip((key, value), null, strict=True))
                place = jnp.arange(key.shape[1])[None]
                segments |= {"query_positions": place[:, 1:], "key_positions": place}
                if hidden is not None:
                    segments["key_segment_ids"] = jnp.pad(segments["key_segment_ids"], ((0, 0), (1, 0)))
            return _attend(query, key, segments, value)[0]
        return graph_attention(
            query, key, value, graph, graph.message(0, value), config, segments=segments, train=train
        )

    @nn.nowrap
    def _with_null(self, x: jax.Array, row: jax.Array) -> jax.Array:
        null = row.reshape(1, 1, *x.shape[2:]).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(null, (x.shape[0], 1, *x.shape[2:])), x], axis=1)

    @nn.nowrap
    def _step(
        self, query: jax.Array, key: jax.Array, value: jax.Array, null: list[jax.Array], graph: Graph | None,
        cache: Cache, place: jax.Array,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """One row of the map serves the attention and every hop."""
        config = self.config
        keys = jax.lax.dynamic_update_slice_in_dim(cache.key, key.astype(cache.key.dtype), place, axis=1)
        values = cache.values

        def put(values: jax.Array, index: int, row: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(values, row[None].astype(values.dtype), (index, 0, place, 0, 0))

        values = put(values, 0, value)
        slots = jnp.arange(keys.shape[1])
        seen = slots <= place
        if config.null_key:
            keys, own = (self._with_null(x, row) for x, row in zip((keys, values[0]), null, strict=True))
            row = attention_map(query, keys, jnp.pad(seen, (1, 0), constant_values=True))
            return _plain_mean(row, own), Cache(keys[:, 1:], values)
        row = attention_map(query, keys, seen)
        out = _plain_mean(row, values[0])
        if graph is not None:
            links = link(row, slots == place, config)
            kept = [values]

            def hop(layer: int, messages: jax.Array) -> jax.Array:
                kept[0] = put(kept[0], 1 + layer, messages)
                return spread(links, kept[0][1 + layer])

            out = out + graph(value, hop, False)
            values = kept[0]
        return out, Cache(keys, values)


def _plain_mean(row: jax.Array, values: jax.Array) -> jax.Array:
    values = jnp.broadcast_to(values, (*values.shape[:2], row.shape[1], values.shape[3]))
    return jnp.einsum("bhqk,bkhe->bqhe", row, values.astype(jnp.float32))


def norm(module: Any, name: str) -> Any:
    """A layer norm with a gain and no bias, of a module's dtypes."""
    return norms.norm(
        "layer", epsilon=1e-5, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype, name=name
    )


class ConvolvedMLP(nn.Module):
    """up, gelu (or gated), down, without norms, and causal depthwise convolutions before, inside and after."""

    config: GraphGPTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, L, features) to the same."""
        config = self.config
        width = config.mlp_ratio * x.shape[-1]
        make: Callable[..., nn.Dense] = partial(
            dense, kernel_init=torch_kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )
        y = self._convolved(x, config.mlp_kernel, "before")
        wide = 2 * width if config.mlp_gated else width
        y = make(wide, ("embed", "mlp"), bias_init=torch_bias_init(x.shape[-1]), name="up")(y)
        if config.mlp_gated:
            first, gate = jnp.split(y, 2, axis=-1)
            y = first * _gelu(gate)
        else:
            y = _gelu(y)
        y = Dropout(config.dropout)(self._convolved(y, config.mlp_inner_kernel, "inside"), train)
        y = make(x.shape[-1], ("mlp", "embed"), bias_init=torch_bias_init(width), name="down")(y)
        return self._convolved(y, config.mlp_kernel, "after")

    @nn.nowrap
    def _convolved(self, x: jax.Array, size: int, name: str) -> jax.Array:
        """x + D(gelu(D(x))), D causal and depthwise; size 0 is x."""
        if not size:
            return x
        width = x.shape[-1]

        def convolution(x: jax.Array, name: str) -> jax.Array:
            layer = nn.Conv(
                width, (size,), padding=[(size - 1, 0)], feature_group_count=width, use_bias=False, dtype=self.dtype,
                param_dtype=self.param_dtype, kernel_init=partitioned(torch_kernel_init, None, None, "mlp"), name=name,
            )  # fmt: skip
            return layer(x)

        return x + convolution(_gelu(convolution(x, f"{name}_0")), f"{name}_1")


class GraphGPT(nn.Module):
    """The network."""

    config: GraphGPTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> tuple[Cache, ...]:
        """An empty past for `batch` sequences of up to `length` tokens.

        Raises ValueError for convolutions in the feed-forward network, whose past is not kept.
        """
        config = self.config
        if config.mlp_kernel or config.mlp_inner_kernel:
            raise ValueError("token by token there are no convolutions: mlp_kernel and mlp_inner_kernel must be 0")
        heads = 1 if config.one_kv_head else config.heads
        shape = (batch, length, heads, config.head_features)
        dtype = self.dtype or jnp.float32
        one = Cache(jnp.zeros(shape, dtype), jnp.zeros((1 + config.graph_layers, *shape), dtype))
        return (one,) * config.depth

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        hidden: jax.Array | None = None,
        train: bool = False,
        past: tuple[tuple[Cache, ...], jax.Array] | None = None,
    ) -> Any:
        """Logits of next tokens.

        Args:
          tokens: integers (B, L); with a past (B, 1).
          hidden: bool (B, L), keys that no query sees; the first token's must be False.
          train: dropout.
          past: caches of the layers, and the place of the token, an int32 scalar.

        Returns:
          float32 (B, L, logits); with a past also the caches after the token.

        Raises:
          ValueError: a shape or dtype is wrong.
        """
        config = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers (batch, length), got {tokens.dtype} {tokens.shape}")
        if hidden is not None and (hidden.shape != tokens.shape or hidden.dtype != jnp.bool_):
            raise ValueError(f"hidden must be bool {tokens.shape}, got {hidden.dtype} {hidden.shape}")
        if past is not None and (tokens.shape[1] != 1 or hidden is not None or train):
            raise ValueError("with a past there is one token, nothing is hidden, and nothing trains")
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(
            config.tokens, config.embedding, **options, name="embed",
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", None),
        )(tokens)  # fmt: skip
        first = 0 if past is None else past[1]
        place = jnp.broadcast_to(
            half_sinusoids(tokens.shape[1], config.position_features, first).astype(x.dtype),
            (*tokens.shape, config.position_features),
        )
        x = jnp.concatenate([x, place], axis=-1) if config.concat_positions else x + place
        make: Callable[..., nn.Dense] = partial(dense, use_bias=False, kernel_init=torch_kernel_init, **options)
        # Published checkpoints hold a linear map that nothing uses.
        self.param("unused_kernel", partitioned(torch_kernel_init, None, None), (1, 16), self.param_dtype)
        self.param("unused_bias", partitioned(torch_bias_init(1), None), (16,), self.param_dtype)
        x = norm(self, "norm_in")(make(config.features, (None, "embed"), name="widen")(x))
        caches = []
        for index in range(config.depth):
            mixer = GraphAttention(config, **options, name=f"attention_{index}")
            mixed, cache = mixer(x, train, hidden, None if past is None else (past[0][index], past[1]))
            caches.append(cache)
            x = x + mixed
            x = x + self._mlp(f"mlp_{index}")(x, train)
        logits = make(config.logits, ("embed", "vocab"), name="head")(norm(self, "norm_out")(x)).astype(jnp.float32)
        return logits if past is None else (logits, tuple(caches))

    @nn.nowrap
    def _mlp(self, name: str) -> Callable[[jax.Array, bool], jax.Array]:
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype, "name": name}
        if config.mlp_kernel or config.mlp_inner_kernel:
            return ConvolvedMLP(config, **options)
        plain = NormedMLP(config.mlp_ratio * config.features, kernel_init=torch_kernel_init, **options)
        return lambda x, train: plain(x)

"""POGAT's network: attention inside small subgraphs, and a node's subgraphs merged.

M subgraphs of k slots, H heads, D features; n nodes of the target's type, P places in which one of them occurs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from zoo.errors import unknown
from zoo.layers.dropout import Dropout
from zoo.layers.mlp import MLP
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned

Perturbed = Literal["hard", "easy", "features", "none"]
_XAVIER = nn.initializers.xavier_uniform()
_TILE = 128  # tokens of the packed subgraphs that attend together


@dataclasses.dataclass(frozen=True)
class POGATConfig:
    """A network for one schema. All of it is this project's reconstruction.

    Attributes:
      in_features: width of each node type's features.
      slot_types: node type of each slot.
      target_type: node type that is classified.
      relations: 1 + 2 x links of the schema.
      classes: of the target's nodes.
      multi_label: whether a node may have several classes.
      features: D.
      heads: H.
      mlp_features: of the feed-forward networks.
      layers: inside subgraphs.
      merge_features: width of the attention that merges.
      merge: "attention", or "mean" of a node's places.
      dropout: of features and attention.
      perturbed: what false subgraphs are: "hard" or "easy" replacements of the same type, nodes with masked
        "features" (the missing node), or "none" at all.
      node_weight, graph_weight: of the two losses that detect them.
      instances: most subgraphs a node.
      link_type: the node type whose links with the target's are scored; None: no such head.
    """

    in_features: tuple[int, ...] = (64, 64, 64)
    slot_types: tuple[int, ...] = (0, 1, 2)
    target_type: int = 0
    relations: int = 5
    classes: int = 8
    multi_label: bool = False
    features: int = 64
    heads: int = 4
    mlp_features: int = 128
    layers: int = 2
    merge_features: int = 32
    merge: Literal["attention", "mean"] = "attention"
    dropout: float = 0.3
    perturbed: Perturbed = "hard"
    node_weight: float = 0.5
    graph_weight: float = 0.5
    instances: int = 16
    link_type: int | None = None

    def __post_init__(self) -> None:
        for name in ("relations", "classes", "features", "heads", "mlp_features", "layers", "merge_features",
                     "instances"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.features % self.heads:
            raise ValueError(f"features ({self.features}) must be a multiple of heads ({self.heads})")
        if not self.slot_types or not all(0 <= kind < len(self.in_features) for kind in self.slot_types):
            raise ValueError(f"slot_types must be in 0 .. {len(self.in_features) - 1}, got {self.slot_types}")
        for name in ("target_type", "link_type"):
            if getattr(self, name) is not None and getattr(self, name) not in self.slot_types:
                raise ValueError(f"{name} {getattr(self, name)} fills no slot of {self.slot_types}")
        if self.merge not in ("attention", "mean"):
            raise unknown("merge", self.merge, ("attention", "mean"))
        if self.perturbed not in get_args(Perturbed):
            raise unknown("perturbation", self.perturbed, get_args(Perturbed))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Output(NamedTuple):
    """What the network says."""

    logits: jax.Array  # (n, classes)
    embedding: jax.Array  # (n, D), zero for a node in no subgraph
    slots: jax.Array  # (M, k, D)
    merge_weights: jax.Array  # (P,), place by place as `places` lists them
    node_logits: jax.Array  # (M, k), that a slot's node was replaced
    graph_logits: jax.Array  # (M,), that something was replaced
    attention: tuple[jax.Array, ...]  # (M, H, k, k) a layer; empty unless asked for


def segment_softmax(logits: jax.Array, segments: jax.Array, count: int) -> jax.Array:
    """Softmax within segments: exp(l_i) over the sum of exp(l_j) with segments_j = segments_i.

    Deterministic on every platform where the segments are sorted, and to rounding where they are not.

    Args:
      logits: (P,) or (P, ...).
      segments: integers (P,) in [0, count).
      count: number of segments; empty ones are no matter.
    """
    largest = jax.lax.stop_gradient(jax.ops.segment_max(logits, segments, count))
    weights = jnp.exp(logits - largest[segments])
    return weights / jax.ops.segment_sum(weights, segments, count)[segments]


def relation_bias(table: jax.Array, relation: np.ndarray | jax.Array) -> jax.Array:
    """(relations, H) as a bias of attention (1, H, k, k), -infinity where the schema has no link."""
    bias = jnp.where((relation >= 0)[..., None], table[jnp.maximum(relation, 0)], -jnp.inf)
    return jnp.moveaxis(bias, -1, 0)[None]


def schema_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    pack: int | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(dim) + bias) v inside each subgraph.

    Subgraphs have 3 to 6 slots, and a tile of a matrix unit 128 tokens: `pack` subgraphs attend as one sequence with
    a bias that is block-diagonal, the same numbers.

    Args:
      query, key, value: (M, k, H, dim).
      bias: (1, H, k, k), -inf where a slot does not see another.
      pack: subgraphs a sequence; None fills a tile on TPU and GPU, and is 1 elsewhere.
      dropout_rate, dropout_rng: of the weights.

    Returns:
      Like value.
    """
    count, slots = query.shape[:2]

    def packed(pack: int, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        missing = -count % pack
        rows = [
            jnp.pad(x, ((0, missing), *((0, 0),) * 3)).reshape(-1, pack * slots, *x.shape[2:])
            for x in (query, key, value)
        ]
        same = np.eye(pack, dtype=bool).repeat(slots, 0).repeat(slots, 1)
        wide = jnp.where(same, jnp.tile(bias, (1, 1, pack, pack)), -jnp.inf)
        out: Any = attention(*rows, bias=wide, dropout_rate=dropout_rate, dropout_rng=dropout_rng)
        return out.reshape(-1, *value.shape[1:])[:count]

    operands = (query, key, value, bias)
    if pack is not None:
        return packed(pack, *operands)
    full = partial(packed, max(1, _TILE // slots))
    return jax.lax.platform_dependent(*operands, tpu=full, cuda=full, default=partial(packed, 1))


class _Part(nn.Module):
    config: POGATConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32


class SubgraphLayer(_Part):
    """Attention along the schema's links, with a bias a relation and head, and a feed-forward network, post-norm."""

    def setup(self) -> None:
        """Makes the parts."""
        width = self.config.features
        self.query, self.key, self.value = (
            dense(width, ("embed", "heads"), kernel_init=_XAVIER, dtype=self.dtype, param_dtype=self.param_dtype)
            for _ in range(3)
        )
        self.out = dense(width, ("heads", "embed"), kernel_init=_XAVIER, dtype=self.dtype, param_dtype=self.param_dtype)
        options: Any = {"epsilon": 1e-5, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.norm_1, self.norm_2 = norm("layer", **options), norm("layer", **options)
        self.mlp = MLP(
            self.config.mlp_features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_XAVIER,
            out_init=_XAVIER,
        )
        shape = (self.config.relations, self.config.heads)
        self.relation_bias = self.param(
            "relation_bias", partitioned(nn.initializers.zeros_init(), None, None), shape, self.param_dtype
        )

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of any tokens (..., D)."""
        return self.query(x), self.key(x), self.value(x)

    def __call__(
        self, x: jax.Array, projected: tuple[jax.Array, ...], relation: jax.Array, train: bool, maps: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Tokens (M, k, D) and their queries, keys and values to new tokens and, if asked, the map of attention."""
        config = self.config
        bias = relation_bias(self.relation_bias, relation)
        query, key, value = (y.reshape(*y.shape[:2], config.heads, -1) for y in projected)
        rate = config.dropout if train else 0.0
        rng = self.make_rng("dropout") if rate else None
        found = schema_attention(query, key, value, bias, dropout_rate=rate, dropout_rng=rng)
        x = self.norm_1(x + self.out(found.reshape(x.shape)))
        x = self.norm_2(x + self.mlp(x))
        if not maps:
            return x, None
        logits = jnp.einsum("mihd,mjhd->mhij", query, key) * query.shape[-1] ** -0.5 + bias
        return x, jax.nn.softmax(logits)


def places(config: POGATConfig, kind: int) -> tuple[int, ...]:
    """The slots that nodes of a type fill."""
    return tuple(slot for slot, each in enumerate(config.slot_types) if each == kind)


class POGAT(_Part):
    """The network.

    Fields:
      share_projections: whether the first layer's queries, keys and values are made once a node, and gathered: k times
        fewer operations and more, the same numbers.
    """

    share_projections: bool = True

    def setup(self) -> None:
        """Makes the parts."""
        config = self.config
        width = config.features
        options: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear: Any = partial(dense, kernel_init=_XAVIER, **options)
        self.project = [linear(width, (None, "embed")) for _ in config.in_features]
        self.layers = [SubgraphLayer(config, **options) for _ in range(config.layers)]
        self.merge_hidden = linear(config.merge_features, ("embed", "mlp"))
        self.merge_query = linear(1, ("mlp", None), use_bias=False)
        self.node_disc = [linear(width, ("embed", "mlp")), linear(1, ("mlp", None))]
        self.graph_disc = [linear(width, ("embed", "mlp")), linear(1, ("mlp", None))]
        self.classify = linear(config.classes, ("embed", None))
        self.drop = Dropout(config.dropout)
        if config.link_type is not None:
            identity = partitioned(lambda rng, shape, dtype: jnp.eye(shape[0], dtype=dtype), "embed", "mlp")
            self.link = self.param("link", identity, (width, width), self.param_dtype)

    def __call__(
        self,
        features: tuple[jax.Array, ...],
        sub: jax.Array,
        relation: jax.Array,
        train: bool = False,
        maps: bool = False,
    ) -> Output:
        """Reads all subgraphs.

        Args:
          features: of each type's nodes, (count, in_features).
          sub: integers (M, k), numbers within each slot's type; out of range they are clipped.
          relation: integers (k, k), see `zoo.data.hetero_graphs.Schema.relation`.
          train: whether to drop.
          maps: whether to return the maps of attention.

        Raises:
          ValueError: a shape is wrong.
        """
        config = self.config
        slots, maps_seen = self.read(features, sub, relation, train, maps)
        embedding, weights = self.merge(slots, sub, config.target_type, features[config.target_type].shape[0])
        node_logits, graph_logits = self.detect(slots)
        return Output(self.classify(embedding), embedding, slots, weights, node_logits, graph_logits, maps_seen)

    def read(
        self,
        features: tuple[jax.Array, ...],
        sub: jax.Array,
        relation: jax.Array,
        train: bool = False,
        maps: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """All slots (M, k, D), and maps if asked for."""
        config = self.config
        self._check(features, sub, relation)
        nodes = [self.drop(project(x), train) for project, x in zip(self.project, features, strict=True)]
        starts = np.cumsum([0, *(x.shape[0] for x in nodes)])
        table = jnp.concatenate(nodes)
        places = jnp.clip(sub, 0, np.array([x.shape[0] for x in nodes])[list(config.slot_types)] - 1)
        places = places + starts[list(config.slot_types)]
        x = table[places]
        seen: list[Any] = []
        for number, layer in enumerate(self.layers):
            if number == 0 and self.share_projections:
                projected = tuple(y[places] for y in layer.project(table))
            else:
                projected = layer.project(x)
            x, weights = layer(x, projected, relation, train, maps)
            seen.append(weights)
        return x, tuple(seen) if maps else ()

    def merge(self, slots: jax.Array, sub: jax.Array, kind: int, count: int) -> tuple[jax.Array, jax.Array]:
        """Embeddings (count, D) of a type's nodes from all places they fill, and the places' weights (P,).

        Places are listed slot by slot, and subgraph by subgraph within.
        """
        chosen = list(places(self.config, kind))
        x = slots[:, chosen].swapaxes(0, 1).reshape(-1, slots.shape[-1])
        nodes = jnp.clip(sub[:, chosen].T.reshape(-1), 0, count - 1)
        if self.config.merge == "mean":
            logits = jnp.zeros(nodes.shape, x.dtype)
            if self.is_initializing():
                self.merge_query(jnp.tanh(self.merge_hidden(x)))  # the same parameters
        else:
            logits = self.merge_query(jnp.tanh(self.merge_hidden(x)))[:, 0]
        weights = segment_softmax(logits, nodes, count)
        return jax.ops.segment_sum(weights[:, None] * x, nodes, count), weights

    def detect(self, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits that each node (M, k), and that something in each subgraph (M,), was replaced."""

        def two(layers: list[nn.Dense], x: jax.Array) -> jax.Array:
            return layers[1](nn.relu(layers[0](x)))[..., 0]

        return two(self.node_disc, slots), two(self.graph_disc, slots.mean(axis=1))

    def score_links(
        self,
        features: tuple[jax.Array, ...],
        sub: jax.Array,
        relation: jax.Array,
        pairs: jax.Array,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits (L,) that the target's nodes and those of `link_type` in pairs (L, 2) are linked: z_u^T R z_v.

        Returns them and the slots. Raises ValueError without a link_type.
        """
        config = self.config
        if config.link_type is None:
            raise ValueError("links are scored with a link_type in the config")
        slots, _ = self.read(features, sub, relation, train)
        first, _ = self.merge(slots, sub, config.target_type, features[config.target_type].shape[0])
        second, _ = self.merge(slots, sub, config.link_type, features[config.link_type].shape[0])
        if self.is_initializing():
            self.detect(slots), self.classify(first)
        return jnp.sum(first[pairs[:, 0]] @ self.link * second[pairs[:, 1]], axis=-1), slots

    @nn.nowrap
    def _check(self, features: tuple[jax.Array, ...], sub: jax.Array, relation: jax.Array) -> None:
        config = self.config
        widths = tuple(x.shape[-1] for x in features)
        if widths != config.in_features or any(x.ndim != 2 for x in features):
            raise ValueError(
                f"features must be (count, width) of widths {config.in_features}, got {[x.shape for x in features]}"
            )
        slots = len(config.slot_types)
        if sub.ndim != 2 or sub.shape[1] != slots or relation.shape != (slots, slots):
            raise ValueError(
                f"sub must be (M, {slots}) and relation ({slots}, {slots}), got {sub.shape}, {relation.shape}"
            )


def example_inputs(config: POGATConfig, batch_size: int) -> dict[str, Any]:
    """A star of `batch_size` subgraphs over 5 nodes a type."""
    random = np.random.default_rng(0)
    slots = len(config.slot_types)
    relation = np.full((slots, slots), -1, np.int32)
    np.fill_diagonal(relation, 0)
    for link in range(min(slots - 1, (config.relations - 1) // 2)):
        relation[0, link + 1], relation[link + 1, 0] = 1 + 2 * link, 2 + 2 * link
    return {
        "features": tuple(random.normal(size=(5, width)).astype(np.float32) for width in config.in_features),
        "sub": random.integers(0, 5, (batch_size, slots)).astype(np.int32),
        "relation": relation,
    }

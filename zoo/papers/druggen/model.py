"""DrugGEN's graph transformer, the generator and the critic.

B batch, N vertices of the padded graphs, A atom types, K bond types (class 0 is padding, and no bond), C features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.edge_attention import edge_attention
from zoo.errors import unknown
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.dropout import Dropout
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "leaky": partial(nn.leaky_relu, negative_slope=0.01),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
}
Scores = Literal["published", "unmodulated", "summed"]
_EMBEDDING = 64  # hidden width of the two embeddings
_HEAD = (64, 32, 16)
# (e + 1) e is 1 for this e: scores without modulation by edges are a case of those with.
_UNMODULATED = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True)
class DrugGENConfig:
    """A generator, or a critic.

    Attributes:
      vertices: N, atoms of the largest molecule.
      node_types, edge_types: widths of the two inputs: classes, class 0 being padding and no bond (and, for nodes,
        further features).
      features: C.
      depth: blocks.
      heads: they set the scores' scale, (C / heads)^-1/2, and nothing else.
      mlp_ratio: hidden width of the blocks' MLPs over C.
      activation: of embeddings and the critic's head: "relu", "leaky" (slope 0.01), "tanh" or "sigmoid".
      dropout: behind embeddings and MLPs.
      scores: "published"; for ablations "unmodulated", q k without (E + 1) E, and "summed", ordinary attention, whose
        scores are summed over a head's channels and have a bias a head from the edges.
      edge_update: whether blocks change the edges.
    """

    vertices: int = 45
    node_types: int = 9
    edge_types: int = 5
    features: int = 128
    depth: int = 1
    heads: int = 8
    mlp_ratio: int = 3
    activation: str = "relu"
    dropout: float = 0.0
    scores: Scores = "published"
    edge_update: bool = True

    def __post_init__(self) -> None:
        for name in ("vertices", "node_types", "edge_types", "features", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.features % self.heads:
            raise ValueError(f"features ({self.features}) must be a multiple of heads ({self.heads})")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.scores not in get_args(Scores):
            raise unknown("scores", self.scores, get_args(Scores))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class _Part(nn.Module):
    """What all modules here share."""

    config: DrugGENConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def linear(
        self, x: jax.Array, width: int, name: str, axes: tuple[str | None, str | None] = ("embed", "mlp")
    ) -> jax.Array:
        """A linear layer with PyTorch's initial values."""
        layer = dense(
            width, axes, kernel_init=torch_kernel_init, bias_init=torch_bias_init(x.shape[-1]), dtype=self.dtype,
            param_dtype=self.param_dtype, name=name,
        )  # fmt: skip
        return layer(x)

    @nn.nowrap
    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """A layer norm."""
        return norm("layer", epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

    @nn.nowrap
    def part(self, kind: Any, name: str, **options: Any) -> Any:
        """A part of the same config and dtypes."""
        return kind(self.config, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **options)


class Affine(nn.Module):
    """A linear layer's kernel (width, width) and bias, for a function that applies them itself."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """The two parameters."""
        shape = (self.width, self.width)
        kernel = self.param("kernel", partitioned(torch_kernel_init, "embed", "heads"), shape, self.param_dtype)
        bias = self.param("bias", partitioned(torch_bias_init(self.width), "heads"), shape[1:], self.param_dtype)
        return kernel, bias


class EdgeAttention(_Part):
    """Attention of nodes with a softmax a channel, whose scores edges modulate and become the new edges.

        s_ijc = q_ic k_jc (E_ijc + 1) E_ijc / sqrt(C / heads)

    Fields:
      change_edges: whether the new edges are wanted; their parameters are there in any case.
    """

    change_edges: bool = True

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Nodes (B, N, C) and edges (B, N, N, C) to the same; None for edges that are not wanted."""
        config, width = self.config, nodes.shape[-1]
        query, key, value = (self.linear(nodes, width, name, ("embed", "heads")) for name in ("query", "key", "value"))
        edge = Affine(width, self.param_dtype, name="edge")()
        out_edge = Affine(width, self.param_dtype, name="out_edge")()
        parameters = [x.astype(edges.dtype) for x in (*edge, *out_edge)]
        if config.scores == "summed":
            found, changed = self._summed(query, key, value, edges, *parameters)
        else:
            if config.scores == "unmodulated":
                parameters[0] = jnp.zeros_like(parameters[0])
                parameters[1] = jnp.full_like(parameters[1], _UNMODULATED)
            scale = (width // config.heads) ** -0.5
            wanted = parameters if self.change_edges else parameters[:2]
            if self.is_mutable_collection("intermediates"):  # somebody looks
                e = edges @ parameters[0] + parameters[1]
                weights = jax.nn.softmax(scale * query[:, :, None] * key[:, None] * (e + 1) * e, axis=2)
                self.sow("intermediates", "weights", weights.mean(axis=-1))
            found, changed = edge_attention(query, key, value, edges, *wanted, scale=scale)
        return self.linear(found, width, "out_node", ("heads", "embed")), changed

    @nn.nowrap
    def _summed(self, query, key, value, edges, edge_kernel, edge_bias, out_kernel, out_bias):
        """Ordinary attention, a head's mean edge feature being its scores' bias; new edges are a function of edges."""
        heads = self.config.heads
        split = [x.reshape(*x.shape[:-1], heads, -1) for x in (query, key, value)]
        e = edges @ edge_kernel + edge_bias
        bias = jnp.moveaxis(e.reshape(*e.shape[:-1], heads, -1).mean(-1), -1, 1)
        # Written out, for a gradient penalty takes a second derivative, which the kernel of attention does not have.
        query_, key_, value_ = split
        weights = jax.nn.softmax(jnp.einsum("bihc,bjhc->bhij", query_, key_) * query_.shape[-1] ** -0.5 + bias)
        found = jnp.einsum("bhij,bjhc->bihc", weights, value_).reshape(query.shape)
        return found, e @ out_kernel + out_bias if self.change_edges else None


class FeedForward(_Part):
    """project(relu(expand(x))), with dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(..., C) to the same shape."""
        width = x.shape[-1]
        hidden = nn.relu(self.linear(x, self.config.mlp_ratio * width, "expand"))
        return Dropout(self.config.dropout)(self.linear(hidden, width, "project", ("mlp", "embed")), train)


class Block(_Part):
    """Attention and two MLPs; the nodes' residual starts from the normalised nodes, and edges are not normalised first.

    Fields:
      change_edges: whether edges are of use to anybody; without, they cost nothing, and their parameters are there.
    """

    change_edges: bool = True

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Nodes (B, N, C) and edges (B, N, N, C) to the same."""
        normalised = self.norm(nodes, "norm_1")
        found, changed = self.part(EdgeAttention, "attention", change_edges=self.change_edges)(normalised, edges)
        nodes = self.norm(normalised + found, "norm_3")
        nodes = self.norm(nodes + self.part(FeedForward, "mlp")(nodes, train), "norm_5")
        # Of no edges where none are wanted: parameters are made, and nothing is computed.
        updated = edges[:0] if changed is None else edges + changed
        updated = self.norm(updated, "norm_4")
        updated = self.norm(updated + self.part(FeedForward, "edge_mlp")(updated, train), "norm_6")
        return nodes, edges if changed is None else updated


class GraphTransformer(_Part):
    """Embeddings of atoms and bonds, and blocks.

    Fields:
      edges_are_read: whether the edges of the last block are of use.
    """

    edges_are_read: bool = True

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """(B, N, A) and (B, N, N, K) to (B, N, C) and (B, N, N, C)."""
        config = self.config
        act = ACTIVATIONS[config.activation]

        def embed(x: jax.Array, name: str) -> jax.Array:
            hidden = act(self.linear(x, _EMBEDDING, f"{name}_0", (None, "mlp")))
            return Dropout(config.dropout)(act(self.linear(hidden, config.features, f"{name}_1")), train)

        nodes, edges = embed(nodes, "embed_nodes"), embed(edges, "embed_edges")
        edges = (edges + edges.swapaxes(1, 2)) / 2
        for index in range(config.depth):
            wanted = config.edge_update and (self.edges_are_read or index < config.depth - 1)
            nodes, edges = self.part(Block, f"block_{index}", change_edges=wanted)(nodes, edges, train)
        return nodes, edges


def check_graphs(config: DrugGENConfig, nodes: jax.Array, edges: jax.Array) -> None:
    """Raises ValueError unless nodes are (B, N, A) and edges (B, N, N, K) of one N."""
    if nodes.ndim != 3 or nodes.shape[-1] != config.node_types:
        raise ValueError(f"nodes must be (batch, vertices, {config.node_types}), got {nodes.shape}")
    expected = (*nodes.shape[:2], nodes.shape[1], config.edge_types)
    if edges.shape != expected:
        raise ValueError(f"edges must be {expected} with these nodes, got {edges.shape}")


class DrugGENGenerator(_Part):
    """Edits a molecule: graphs to logits of graphs, raw and, as published, not symmetrised."""

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Atoms (B, N, A) and bonds (B, N, N, K), one-hot, to logits of the same shapes. Any N.

        Raises ValueError for other shapes.
        """
        check_graphs(self.config, nodes, edges)
        nodes, edges = self.part(GraphTransformer, "body")(nodes, edges, train)
        return (
            self.linear(nodes, self.config.node_types, "read_nodes", ("embed", None)),
            self.linear(edges, self.config.edge_types, "read_edges", ("embed", None)),
        )


class DrugGENCritic(_Part):
    """Scores a graph, one-hot or logits, by all its nodes in order. The last block's edges are never computed."""

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, train: bool = False) -> jax.Array:
        """Atoms (B, N, A) and bonds (B, N, N, K) with N the config's vertices, to (B, 1).

        Raises ValueError for other shapes.
        """
        config = self.config
        check_graphs(config, nodes, edges)
        if nodes.shape[1] != config.vertices:
            raise ValueError(f"the critic takes graphs of {config.vertices} vertices, got {nodes.shape[1]}")
        nodes, _ = self.part(GraphTransformer, "body", edges_are_read=False)(nodes, edges, train)
        return self._head(nodes.reshape(nodes.shape[0], -1), _HEAD)

    @nn.nowrap
    def _head(self, x: jax.Array, widths: tuple[int, ...]) -> jax.Array:
        for index, width in enumerate(widths):
            x = ACTIVATIONS[self.config.activation](self.linear(x, width, f"head_{index}"))
        return self.linear(x, 1, f"head_{len(widths)}", ("embed", None))


class SimpleCritic(DrugGENCritic):
    """An MLP on the flattened graph; defined by the published code, and not used by its training."""

    @nn.compact
    def __call__(self, nodes: jax.Array, edges: jax.Array, train: bool = False) -> jax.Array:
        """As of `DrugGENCritic`."""
        check_graphs(self.config, nodes, edges)
        batch = nodes.shape[0]
        flat = jnp.concatenate([edges.reshape(batch, -1), nodes.reshape(batch, -1)], axis=1)
        return self._head(flat, (256, 128, *_HEAD))


def example_inputs(config: DrugGENConfig, batch_size: int) -> dict[str, Any]:
    """Random graphs: symmetric bonds, none from an atom to itself."""
    random = np.random.default_rng(0)
    vertices = config.vertices
    atoms = random.integers(0, config.node_types, (batch_size, vertices))
    bonds = np.tril(random.integers(0, config.edge_types, (batch_size, vertices, vertices)), -1)
    bonds = bonds + bonds.swapaxes(1, 2)
    return {
        "nodes": np.eye(config.node_types, dtype=np.float32)[atoms],
        "edges": np.eye(config.edge_types, dtype=np.float32)[bonds],
    }

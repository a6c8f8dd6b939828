"""Three networks of the kind that papers on heterogeneous graphs compare with, on lists of links.

All of them first project each type's features, as POGAT does, and end in a classifier of the target's nodes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense
from zoo.papers.pogat.model import segment_softmax

Links = tuple[jax.Array, jax.Array]  # sources and destinations, integers (E,) each


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """A baseline.

    Attributes:
      classes: of the target's nodes, which are the first type.
      features: width.
      heads: of attention.
      layers: of message passing.
      dropout: of features.
    """

    classes: int
    features: int = 64
    heads: int = 4
    layers: int = 2
    dropout: float = 0.3


class _Baseline(nn.Module):
    config: BaselineConfig

    @nn.nowrap
    def linear(self, width: int, name: str) -> nn.Dense:
        return dense(width, ("embed", "mlp"), kernel_init=nn.initializers.xavier_uniform(), name=name)

    @nn.nowrap
    def project(self, features: tuple[jax.Array, ...], train: bool) -> list[jax.Array]:
        """Nodes of each type, (count, D)."""
        width = self.config.features
        return [
            Dropout(self.config.dropout)(self.linear(width, f"project_{kind}")(x), train)
            for kind, x in enumerate(features)
        ]

    @nn.nowrap
    def attend(self, nodes: jax.Array, links: Links, name: str) -> jax.Array:
        """One layer of graph attention (Velickovic et al. 2018): leaky(a . [x_i, x_j]), softmax over the sources."""
        heads, count = self.config.heads, nodes.shape[0]
        x = self.linear(nodes.shape[-1], name)(nodes).reshape(count, heads, -1)
        init = nn.initializers.xavier_uniform()
        own, other = (self.param(f"{name}_{part}", init, x.shape[1:]) for part in ("own", "other"))
        source, destination = links
        logits = nn.leaky_relu(jnp.sum(x * own, -1)[destination] + jnp.sum(x * other, -1)[source], 0.2)
        weights = segment_softmax(logits, destination, count)
        return jax.ops.segment_sum(weights[..., None] * x[source], destination, count).reshape(nodes.shape)

    @nn.nowrap
    def classify(self, x: jax.Array) -> jax.Array:
        return self.linear(self.config.classes, "classify")(x)


class GAT(_Baseline):
    """Graph attention on the graph without its types (Velickovic et al. 2018)."""

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], links: Links, train: bool = False) -> jax.Array:
        """Features of each type, links among all nodes (numbered type after type, loops included), to (n, classes)."""
        count = features[0].shape[0]
        x = jnp.concatenate(self.project(features, train))
        for layer in range(self.config.layers):
            x = x + nn.elu(self.attend(x, links, f"attention_{layer}"))
        return self.classify(x[:count])


class RGCN(_Baseline):
    """Relational graph convolution (Schlichtkrull et al. 2018): a mean over each relation's neighbours."""

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], links: tuple[Links, ...], train: bool = False) -> jax.Array:
        """Features of each type, links of each relation and direction among all nodes, to (n, classes)."""
        count = features[0].shape[0]
        x = jnp.concatenate(self.project(features, train))
        for layer in range(self.config.layers):
            total = self.linear(self.config.features, f"self_{layer}")(x)
            for relation, (source, destination) in enumerate(links):
                summed = jax.ops.segment_sum(x[source], destination, len(x))
                number = jax.ops.segment_sum(jnp.ones(destination.shape), destination, len(x))
                mean = summed / jnp.maximum(number, 1)[:, None]
                total += self.linear(self.config.features, f"relation_{layer}_{relation}")(mean)
            x = nn.relu(total)
        return self.classify(x[:count])


class HAN(_Baseline):
    """Attention along meta-paths and among them (Wang et al. 2019)."""

    @nn.compact
    def __call__(self, features: tuple[jax.Array, ...], paths: tuple[Links, ...], train: bool = False) -> jax.Array:
        """Features of each type, of which the first is read; links of each meta-path (loops included); (n, classes)."""
        x = self.project(features[:1], train)[0]
        found = jnp.stack([nn.elu(self.attend(x, links, f"path_{number}")) for number, links in enumerate(paths)])
        scores = self.linear(1, "semantic_query")(jnp.tanh(self.linear(self.config.features, "semantic")(found)))
        weights: Any = jax.nn.softmax(scores.mean(axis=1), axis=0)
        return self.classify(jnp.sum(weights[:, None] * found, axis=0))

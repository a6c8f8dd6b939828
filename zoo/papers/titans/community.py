"""The community's neural memory (lucidrains/titans-pytorch, MIT), which differs from the paper's.

A pre-norm; the mean and not the sum of squares; steps for each token, but momentum and decay for each chunk, from its
mean or an attention pooling; gradients at the weights of the last border of `batch_size` tokens (None: at the start),
so that the paper's chunk is its `batch_size`; a token is answered by the weights after the chunks before it that are
complete; the memory's norm has no bias, its gain is an inner weight, and gelu is the exact one. Its "memory as context"
transformer is another network than the paper's and is not here.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.partitioning import dense, partitioned
from zoo.papers.titans.model import PAPER
from zoo.registry import Variant, register
from zoo.weights.names import Rule, Transform, layer

_HEADS = Transform(lambda array: array[:, 0], lambda array: array[:, None], 3)  # (heads, 1, width) -> (heads, width)
_EPSILON = float(np.finfo(np.float32).eps)  # PyTorch's for an RMSNorm without one


@dataclasses.dataclass(frozen=True)
class CommunityMemoryConfig:
    """A neural memory of the community's package.

    Fields:
      dim: of tokens.
      dim_head: of a head; None is dim.
      heads: their number; more than one are gated and combined.
      chunk_size: tokens that share momentum and decay.
      batch_size: tokens between the borders at which gradients are taken, a multiple of chunk_size; None is no border.
      depth, expansion: layers of the memory's network, and its hidden width in widths of a head.
      max_lr: the largest step.
      momentum: whether there is any.
      attn_pool_chunks: a chunk is pooled by attention and not by its mean.
      pre_rmsnorm, qk_rmsnorm, post_rmsnorm: norms of tokens, of queries and keys, and of what is retrieved.
      per_parameter_lr_modulation: a factor of the step for each chunk and array of weights.

    Raises:
      ValueError: a value is out of range.
    """

    dim: int = 384
    dim_head: int | None = None
    heads: int = 1
    chunk_size: int = 64
    batch_size: int | None = None
    depth: int = 2
    expansion: float = 4.0
    max_lr: float = 1.0
    momentum: bool = True
    attn_pool_chunks: bool = False
    pre_rmsnorm: bool = True
    qk_rmsnorm: bool = False
    post_rmsnorm: bool = False
    per_parameter_lr_modulation: bool = False

    def __post_init__(self):
        for name in ("dim", "dim_head", "heads", "chunk_size", "batch_size", "depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.heads == 1 and self.width != self.dim:
            raise ValueError(f"one head has the width of a token, {self.dim}, got dim_head {self.dim_head}")
        if self.batch_size is not None and self.batch_size % self.chunk_size:
            raise ValueError(f"batch_size must be a multiple of chunk_size ({self.chunk_size}), got {self.batch_size}")
        if self.attn_pool_chunks and self.chunk_size == 1:
            raise ValueError("attn_pool_chunks needs a chunk_size of more than 1")

    @property
    def width(self) -> int:
        """Of a head."""
        return self.dim if self.dim_head is None else self.dim_head


class CommunityWeights(NamedTuple):
    """What is trained inside, each (batch, heads, ...)."""

    scale: jax.Array  # (..., width), around 0
    weights: tuple[jax.Array, ...]  # of each layer (..., in, out)


def _rms(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)


def _read(memory: CommunityWeights, x: jax.Array) -> jax.Array:
    """x + LN(MLP(x)) (scale + 1) of (tokens, width)."""
    y = x
    for index, weight in enumerate(memory.weights):
        y = jnp.dot(jax.nn.gelu(y, approximate=False) if index else y, weight, precision="highest")
    y = y - y.mean(axis=-1, keepdims=True)
    return x + y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5) * (memory.scale + 1)


class CommunityNeuralMemory(nn.Module):
    """Writes every token into a network's weights and reads it: (batch, time, dim) to the same.

    Fields:
      config: see `CommunityMemoryConfig`.
      dtype, param_dtype: of projections and parameters; the inner training is float32.
    """

    config: CommunityMemoryConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, CommunityWeights]:
        """What is retrieved, and the weights after the last complete chunk.

        Raises:
          ValueError, TypeError: x has another shape or dtype.
        """
        config = self.config
        if x.ndim != 3 or x.shape[2] != config.dim or 0 in x.shape:
            raise ValueError(f"x must be (batch, time, dim = {config.dim}) and not empty, got {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point, got {x.dtype}")
        batch, time, _ = x.shape
        chunks = time // config.chunk_size
        retrieve, store = self._norm("retrieve_norm", x), self._norm("store_norm", x)[:, : chunks * config.chunk_size]
        query = self._head_norm("q_norm", self._split(self._dense("to_queries", config.heads * config.width)(retrieve)),
                                config.qk_rmsnorm)  # fmt: skip
        first = self._initial(batch)
        key, value = (
            self._split(self._dense(name, config.heads * config.width)(store)) for name in ("to_keys", "to_values")
        )
        key = self._head_norm("k_norm", key, config.qk_rmsnorm)
        rate = config.max_lr * nn.sigmoid(self._dense("to_adaptive_step", config.heads, use_bias=True)(store))
        pooled = self._pool(store.reshape(batch, chunks, config.chunk_size, config.dim))
        after = self._train(first, key, value, rate, pooled)  # (chunks + 1, batch, heads, ...)

        # A token is answered by the weights after floor((t + 1) / chunk_size) chunks.
        index = (jnp.arange(time) + 1) // config.chunk_size
        used = jax.tree.map(lambda array: array[index], after)
        read = jax.vmap(jax.vmap(jax.vmap(lambda memory, q: _read(memory, q[None])[0])))  # time, batch, heads
        out = read(used, query.astype(jnp.float32).swapaxes(0, 1)).swapaxes(0, 1)
        out = self._head_norm("multihead_rmsnorm", out, config.post_rmsnorm)
        if config.heads > 1:
            out = out * nn.sigmoid(self._dense("retrieve_gate", config.heads)(retrieve))[..., None]
        out = out.astype(x.dtype).reshape(batch, time, -1)
        if config.heads > 1:
            out = self._dense("combine_heads", config.dim, axes=("heads", "embed"))(out)
        return out, jax.tree.map(lambda array: array[-1], after)

    def _train(
        self, first: CommunityWeights, key: jax.Array, value: jax.Array, rate: jax.Array, pooled: jax.Array
    ) -> CommunityWeights:
        """The weights at first and after each chunk, (chunks + 1, batch, heads, ...)."""
        config = self.config
        batch, chunks = pooled.shape[:2]
        arrays = len(first.weights) + 1
        keep = 1 - nn.sigmoid(self._dense("to_decay_factor", config.heads, use_bias=True)(pooled))
        push = (
            nn.sigmoid(self._dense("to_momentum", config.heads, use_bias=True)(pooled))
            if config.momentum
            else jnp.zeros_like(keep)
        )
        factor = jnp.ones((batch, chunks, config.heads, arrays), jnp.float32)
        if config.per_parameter_lr_modulation:
            modulation = self._dense("to_layer_modulation", config.heads * arrays, use_bias=True)(pooled)
            factor = nn.sigmoid(modulation).reshape(factor.shape)

        def cut(array: jax.Array) -> jax.Array:
            """(batch, chunks * size, heads, ...) -> (chunks, batch, heads, size, ...)."""
            array = array.astype(jnp.float32).reshape(batch, chunks, config.chunk_size, *array.shape[2:])
            return jnp.moveaxis(jnp.moveaxis(array, 1, 0), 2, 3)

        def loss(memory: CommunityWeights, key: jax.Array, value: jax.Array, rate: jax.Array) -> jax.Array:
            return jnp.sum(rate * jnp.mean((_read(memory, key) - value) ** 2, axis=-1))

        gradient = jax.vmap(jax.vmap(jax.grad(loss)))
        borders = 0 if config.batch_size is None else config.batch_size // config.chunk_size

        def step(carry, now):
            weights, momentum, border = carry
            number, key, value, rate, keep, push, factor = now

            def of_head(gate, array):
                return gate.reshape(*gate.shape, *(1,) * (array.ndim - 2))

            steps = jax.tree.leaves(gradient(border, key, value, rate))
            momentum = [
                of_head(push, step) * old - of_head(factor[..., index], step) * step
                for index, (old, step) in enumerate(zip(momentum, steps, strict=True))
            ]
            weights = jax.tree.map(
                lambda weight, push: of_head(keep, weight) * weight + push, weights, treedef.unflatten(momentum)
            )
            if borders:
                at = (number + 1) % borders == 0
                border = jax.tree.map(lambda new, old: jnp.where(at, new, old), weights, border)
            return (weights, momentum, border), weights

        per_chunk = (jnp.moveaxis(gate.astype(jnp.float32), 1, 0) for gate in (keep, push, factor))
        leaves, treedef = jax.tree.flatten(first)
        zeros = list(map(jnp.zeros_like, leaves))
        _, after = jax.lax.scan(
            step, (first, zeros, first), (jnp.arange(chunks), cut(key), cut(value), cut(rate), *per_chunk)
        )
        return jax.tree.map(lambda one, rest: jnp.concatenate([one[None], rest]), first, after)

    def _initial(self, batch: int) -> CommunityWeights:
        config = self.config
        hidden = int(config.width * config.expansion)
        widths = [config.width, *[hidden] * (config.depth - 1), config.width]
        zeros, xavier = nn.initializers.zeros_init(), nn.initializers.xavier_uniform(batch_axis=(0,))
        scale = self.param(
            "memory_scale", partitioned(zeros, "heads", None), (config.heads, config.width), self.param_dtype
        )
        weights = tuple(
            self.param(
                f"memory_weights_{index}", partitioned(xavier, "heads", None, None), (config.heads, *shape),
                self.param_dtype,
            )
            for index, shape in enumerate(itertools.pairwise(widths))
        )  # fmt: skip
        return jax.tree.map(
            lambda array: jnp.broadcast_to(array.astype(jnp.float32), (batch, *array.shape)),
            CommunityWeights(scale, weights),
        )

    def _pool(self, chunked: jax.Array) -> jax.Array:
        """(batch, chunks, size, dim) to (batch, chunks, dim)."""
        if not self.config.attn_pool_chunks:
            return chunked.mean(axis=2)
        zeros = nn.initializers.zeros_init()
        weight = nn.softmax(self._dense("pool", self.config.dim, use_bias=True, kernel_init=zeros)(chunked), axis=2)
        return jnp.sum(chunked * weight, axis=2)

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.heads, -1)

    def _dense(
        self, name: str, features: int, axes: tuple[str, str] = ("embed", "heads"), use_bias: bool = False,
        **options: Any,
    ) -> nn.Dense:  # fmt: skip
        return dense(
            features, axes, use_bias=use_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name, **options
        )

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        if not self.config.pre_rmsnorm:
            return x
        init = partitioned(nn.initializers.ones_init(), "embed")
        scale = self.param(f"{name}_scale", init, (self.config.dim,), self.param_dtype)
        return (_rms(x.astype(jnp.float32)) * scale).astype(x.dtype)

    def _head_norm(self, name: str, x: jax.Array, wanted: bool) -> jax.Array:
        """Of (batch, time, heads, width)."""
        if not wanted:
            return x
        init = partitioned(nn.initializers.zeros_init(), "heads", None)
        scale = self.param(f"{name}_scale", init, x.shape[2:], self.param_dtype)
        return (_rms(x.astype(jnp.float32)) * (scale + 1)).astype(x.dtype)


def example_inputs(config: CommunityMemoryConfig, batch_size: int) -> dict[str, Any]:
    """Two chunks and a bit."""
    return {"x": np.zeros((batch_size, 2 * config.chunk_size + 1, config.dim), np.float32)}


def weight_rules(config: CommunityMemoryConfig) -> list[Rule]:
    """The names of the community's package."""
    return [
        Rule(r"memory_model\..*", None),  # templates that the forward pass does not use
        Rule(r"memory_model_parameters\.0", "params/memory_scale"),
        *(
            Rule(rf"memory_model_parameters\.{index + 1}", f"params/memory_weights_{index}")
            for index in range(config.depth)
        ),
        Rule(r"(retrieve_norm|store_norm)\.weight", "params/{0}_scale"),
        Rule(r"(multihead_rmsnorm|q_norm|k_norm)\.gamma", "params/{0}_scale", _HEADS),
        *layer("linear", "(to_queries|to_keys|to_values|combine_heads)", "{0}"),
        *layer("linear", r"(to_adaptive_step|to_momentum|to_decay_factor|to_layer_modulation|retrieve_gate)\.0", "{0}"),
        *layer("linear", r"reduce_to_chunk_rep\.to_attn_logits", "pool"),
    ]


register(
    PAPER,
    Variant("titans_neural_memory_community", CommunityMemoryConfig()),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
)(CommunityNeuralMemory)

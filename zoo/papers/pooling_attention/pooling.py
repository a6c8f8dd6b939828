"""The trainable pooling network: learned latents that attend to one vector a token, or one a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import attention
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.mlp import GATED
from zoo.layers.norms import norm
from zoo.layers.partitioning import partitioned

_ACTIVATIONS = 2**25  # numbers of the hidden layer that exist at once; 128 MiB of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """The sizes of a pooling network; the defaults are the published ones, on Mistral-7B.

    Fields:
      dim: width of the vectors pooled, of the latents, and of the embedding.
      heads, head_dim: of the cross attention.
      latents: how many.
      layers: rows of the matrix that is added to the vectors, one a layer; None is no matrix (one layer's tokens).
    """

    dim: int = 4096
    heads: int = 32
    head_dim: int = 2048
    latents: int = 768
    layers: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} must be positive, got {value}")


class _Projection(nn.Module):
    """The arrays of a linear layer, for what is more than one product with them."""

    inputs: int
    outputs: int
    axes: tuple[str | None, str | None]
    use_bias: bool = False
    param_dtype: Any = jnp.float32

    def setup(self):
        kernel_init, bias_init = torch_kernel_init, torch_bias_init(self.inputs)
        shape = (self.inputs, self.outputs)
        self.kernel = self.param("kernel", partitioned(kernel_init, *self.axes), shape, self.param_dtype)
        if self.use_bias:
            self.bias = self.param("bias", partitioned(bias_init, self.axes[1]), shape[1:], self.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel.astype(x.dtype)
        return y + self.bias.astype(x.dtype) if self.use_bias else y


class LatentPooling(nn.Module):
    """Vectors (batch, count, dim) to one unit vector each, section 3.2 of the paper.

        h = vectors (+ W_layer, row by row);  c = LayerNorm(h)
        x = Z + softmax(LayerNorm'(Z) W_q (c W_k)^T / sqrt(head_dim)) c W_v W_o      Z the latents
        y = x + W_2 (a gelu(g)) + b_2,   [a | g] = LayerNorm''(x) W_1 + b_1
        mean of y over the latents, divided by its length

    `plain` is this, and what it costs at the published size is 1,175 GFLOP a text of 32 vectors. A call gives the same
    by exact rewrites, in 267: queries depend on no text; with few vectors the attention-weighted sum is taken of
    c W_v W_o, head by head, and not of c W_v; the mean over latents goes through W_2. Of a single vector the softmax is
    1, so that queries and keys are not computed (nor ever get a gradient); and what attention adds is then the same for
    all latents, so that W_1 is applied to it once and to the latents once, not to each sum: 1.3 GFLOP a text. The
    hidden layer exists for some latents at a time.

    Fields:
      config: see `PoolingConfig`.
      dtype: of the computation; None is float32.
      param_dtype: of the parameters.
    """

    config: PoolingConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters; the published initialisation (PyTorch's, normal for latents and layers)."""
        config = self.config
        dim, inner = config.dim, config.heads * config.head_dim
        normal = partitioned(nn.initializers.normal(1.0), None, "embed")
        self.latents = self.param("latents", normal, (config.latents, dim), self.param_dtype)
        if config.layers is not None:
            self.layer_weights = self.param("layer_weights", normal, (config.layers, dim), self.param_dtype)

        def linear(inputs: int, outputs: int, *axes: str | None, use_bias: bool = False) -> _Projection:
            return _Projection(inputs, outputs, axes, use_bias, self.param_dtype)  # type: ignore[arg-type]

        self.norm_inputs, self.norm_latents, self.norm_mlp = (
            norm("layer", epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype) for _ in range(3)
        )
        self.query, self.key, self.value = (linear(dim, inner, "embed", "heads") for _ in range(3))
        self.out = linear(inner, dim, "heads", "embed")
        self.up, self.gate = (linear(dim, 4 * dim, "embed", "mlp", use_bias=True) for _ in range(2))
        self.down = linear(4 * dim, dim, "mlp", "embed", use_bias=True)

    def __call__(
        self, vectors: jax.Array, mask: jax.Array | None = None, *, folded: jax.Array | None = None
    ) -> jax.Array:
        """The embedding.

        Args:
          vectors: (batch, count, dim); with a matrix of layers at most as many as it has rows.
          mask: bool (batch, count), False for vectors that are left out; None is all True.
          folded: what `fold` gave for these parameters: no keys are then formed. For inference; None computes queries.

        Returns:
          (batch, dim), rows of length 1.

        Raises:
          ValueError, TypeError: a shape or dtype is wrong.
        """
        if self.is_initializing():  # all parameters, also those that a single vector leaves unused
            return self.plain(vectors, mask)
        h = self._positioned(vectors, mask)
        latents = self.latents.astype(h.dtype)
        c = self.norm_inputs(h)
        if c.shape[1] == 1:
            update = self.out(self.value(c))
            update = update if mask is None else jnp.where(mask[..., None], update, 0)
            hidden = self._mean_hidden_of_sums(latents, update[:, 0])
        else:
            update = self._attend(c, mask, folded)
            hidden = self._mean_hidden(self.norm_mlp(latents + update))
        return unit(latents.mean(axis=0) + update.mean(axis=1) + self.down(hidden))

    def plain(self, vectors: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The definition: the same, step by step as published."""
        h = self._positioned(vectors, mask)
        latents = jnp.broadcast_to(self.latents.astype(h.dtype), (len(h), *self.latents.shape))
        c = self.norm_inputs(h)
        query = self._split(self.query(self.norm_latents(latents)))
        weights = self._weights(jnp.einsum("brhd,bnhd->bhrn", query, self._split(self.key(c))), mask)
        mixed = jnp.einsum("bhrn,bnhd->brhd", weights, self._split(self.value(c)))
        x = latents + self.out(mixed.reshape(*mixed.shape[:2], -1))
        normed = self.norm_mlp(x)
        y = x + self.down(self.up(normed) * GATED["geglu"](self.gate(normed)))
        return unit(y.mean(axis=1))

    def fold(self) -> jax.Array:
        """Queries times each head's keys' kernel, (heads, latents, dim): scores are its product with normed vectors."""
        kernel = self._split(self.key.kernel)
        return jnp.einsum("rhd,ehd->hre", self._queries(), kernel) * self.config.head_dim**-0.5

    def _queries(self) -> jax.Array:
        """(latents, heads, head_dim), without any text."""
        return self._split(self.query(self.norm_latents(self.latents.astype(self.dtype or jnp.float32))))

    def _positioned(self, vectors: jax.Array, mask: jax.Array | None) -> jax.Array:
        """The vectors, checked and in the computation's dtype, with the layers' rows added."""
        config = self.config
        if vectors.ndim != 3 or vectors.shape[-1] != config.dim or 0 in vectors.shape:
            raise ValueError(f"vectors must be (batch, count, {config.dim}) and not empty, got shape {vectors.shape}")
        if not jnp.issubdtype(vectors.dtype, jnp.floating):
            raise TypeError(f"vectors must be floating point, got {vectors.dtype}")
        if mask is not None and (mask.shape != vectors.shape[:2] or mask.dtype != jnp.bool_):
            raise ValueError(f"mask must be bool {vectors.shape[:2]}, got {mask.dtype} {mask.shape}")
        count = vectors.shape[1]
        h = vectors.astype(self.dtype or jnp.float32)
        if config.layers is None:
            return h
        if count > config.layers:
            raise ValueError(f"there are {count} vectors, but the matrix of layers has {config.layers} rows")
        return h + self.layer_weights[:count].astype(h.dtype)

    def _attend(self, c: jax.Array, mask: jax.Array | None, folded: jax.Array | None) -> jax.Array:
        """What attention adds to the latents: (batch, latents, dim)."""
        config = self.config
        value = self._split(self.value(c))
        if folded is None and not self._few(c.shape[1]):
            query = self._queries()
            query = jnp.broadcast_to(query, (len(c), *query.shape))
            segments: dict[str, Any] = {}
            if mask is not None:
                ones = jnp.ones(query.shape[:2], jnp.int32)
                segments = {"query_segment_ids": ones, "key_segment_ids": mask.astype(jnp.int32)}
            mixed = cast(jax.Array, attention(query, self._split(self.key(c)), value, **segments))
            return self.out(mixed.reshape(*mixed.shape[:2], -1))
        if folded is None:
            scores = jnp.einsum("rhd,bnhd->bhrn", self._queries(), self._split(self.key(c)))
            weights = self._weights(scores, mask)
        else:
            weights = self._weights(jnp.einsum("hre,bne->bhrn", folded.astype(c.dtype), c), mask, scale=1.0)
        if not self._few(c.shape[1]):
            mixed = jnp.einsum("bhrn,bnhd->brhd", weights, value)
            return self.out(mixed.reshape(*mixed.shape[:2], -1))
        kernel = self.out.kernel.astype(c.dtype).reshape(config.heads, config.head_dim, config.dim)
        return jnp.einsum("bhrn,bnhe->bre", weights, jnp.einsum("bnhd,hde->bnhe", value, kernel))

    def _few(self, count: int) -> bool:
        """Whether W_o on each head's values costs less than on each latent's sum of them."""
        config = self.config
        inner = config.heads * config.head_dim
        on_values = count * inner * config.dim + config.latents * count * config.heads * config.dim
        on_sums = config.latents * count * inner + config.latents * inner * config.dim
        return on_values < on_sums

    def _weights(self, scores: jax.Array, mask: jax.Array | None, scale: float | None = None) -> jax.Array:
        """The softmax over (batch, heads, latents, count) in float32; zeros where all is left out."""
        scores = scores.astype(jnp.float32) * (self.config.head_dim**-0.5 if scale is None else scale)
        if mask is None:
            return jax.nn.softmax(scores).astype(self.dtype or jnp.float32)
        kept = mask[:, None, None]
        weights = jax.nn.softmax(jnp.where(kept, scores, jnp.finfo(scores.dtype).min))
        return jnp.where(kept, weights, 0).astype(self.dtype or jnp.float32)

    def _mean_hidden(self, x: jax.Array) -> jax.Array:
        """The mean over latents of a gelu(g): (batch, latents, dim) after the norm to (batch, 4 dim)."""
        arrays = [(p.kernel.astype(x.dtype), p.bias.astype(x.dtype)) for p in (self.up, self.gate)]

        def total(x: jax.Array) -> jax.Array:
            up, gate = (x @ kernel + bias for kernel, bias in arrays)
            return jnp.sum(up * GATED["geglu"](gate), axis=0)

        return self._mean_over_latents(total, x.swapaxes(0, 1), len(x))

    def _mean_hidden_of_sums(self, latents: jax.Array, update: jax.Array) -> jax.Array:
        """`_mean_hidden` of the norm of all sums of a latent (latents, dim) and a text's update (batch, dim).

        A norm is linear but for its division, so that the product with W_1 is one of latents and one of updates.
        """
        learned = nn.meta.unbox(self.norm_mlp.variables["params"])
        scale, shift = (learned[name].astype(update.dtype) for name in ("scale", "bias"))
        latents, update = (x - x.mean(axis=-1, keepdims=True) for x in (latents, update))
        variance = jnp.mean(jnp.square(latents[:, None] + update), axis=-1)
        spread = jax.lax.rsqrt(variance + self.norm_mlp.epsilon)  # (latents, batch)
        parts, fixed = [], []
        for projection in (self.up, self.gate):
            kernel = projection.kernel.astype(update.dtype)
            scaled = scale[:, None] * kernel
            parts.append(latents @ scaled)
            fixed.append((update @ scaled, shift @ kernel + projection.bias.astype(update.dtype)))

        def total(part: tuple[list[jax.Array], jax.Array]) -> jax.Array:
            of_latents, spread = part
            up, gate = (
                (of_latent[:, None] + of_update) * spread[..., None] + bias
                for of_latent, (of_update, bias) in zip(of_latents, fixed, strict=True)
            )
            return jnp.sum(up * GATED["geglu"](gate), axis=0)

        return self._mean_over_latents(total, (parts, spread), len(update))

    def _mean_over_latents(self, total: Callable[[Any], jax.Array], parts: Any, batch: int) -> jax.Array:
        """`total` of a pytree of (latents, ...) divided by their number, for as many at a time as memory allows."""
        latents, hidden = self.config.latents, 8 * self.config.dim
        most = max(_ACTIVATIONS // (batch * hidden), 1)
        chunk = next(size for size in range(min(most, latents), 0, -1) if latents % size == 0)
        if chunk == latents:
            return total(parts) / latents
        chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), parts)
        first = jax.eval_shape(total, jax.tree.map(lambda x: x[0], chunks))
        start = jnp.zeros(first.shape, first.dtype)
        sums, _ = jax.lax.scan(lambda carry, part: (carry + jax.checkpoint(total)(part), None), start, chunks)
        return sums / latents

    def _split(self, x: jax.Array) -> jax.Array:
        """(..., heads head_dim) to (..., heads, head_dim)."""
        return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_dim)


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis divided by their length (by 1e-12 where that is less)."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))

"""The two transformers: properties to SMILES, token by token, and SMILES to properties.

B sequences, L tokens, K numbers of a condition, H heads, e features of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kernels.attention import attention
from zoo.backbones.generation import Sampling
from zoo.diffusion import guided
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.mlp import NormedMLP
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.positions import half_sinusoids

_gelu = partial(nn.gelu, approximate=False)


def _gain_norm(module: Any) -> Any:
    return norm("layer", epsilon=1e-5, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype)


def _linear(module: Any, width: int, axes: tuple[Any, Any] = ("embed", "mlp"), bias: int = 0) -> nn.Dense:
    """A linear layer, with a bias where its fan-in is given."""
    return dense(
        width, axes, use_bias=bias > 0, kernel_init=torch_kernel_init, bias_init=torch_bias_init(max(bias, 1)),
        dtype=module.dtype, param_dtype=module.param_dtype,
    )  # fmt: skip


def _check_tokens(tokens: jax.Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers (batch, length), got {tokens.dtype} {tokens.shape}")


def _check_sizes(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


# ---------------------------------------------------------------------------------------------------------- inverse


@dataclasses.dataclass(frozen=True)
class InverseTransformerConfig:
    """A decoder of tokens that attends to a condition's numbers.

    Attributes:
      tokens: number of tokens, and of logits.
      features: width of the residual stream.
      depth: layers.
      heads, head_features: H and e, of queries; keys and values have one head.
      mlp_ratio: hidden features of the MLPs over `features`.
      embedding: width of the tokens' embedding where a linear map widens it to `features`; None has no such map.
      shared: whether a key is its own value.
      one_key_head: whether all heads share a key; not without it where `shared`.
      conditions: the most numbers of a condition, K.
      condition_features: width of a number's embedding.
      drop_condition: share of training examples that see no condition.
    """

    tokens: int = 24
    features: int = 128
    depth: int = 12
    heads: int = 8
    head_features: int = 16
    mlp_ratio: int = 4
    embedding: int | None = None
    shared: bool = True
    one_key_head: bool = True
    conditions: int = 12
    condition_features: int = 16
    drop_condition: float = 0.25

    def __post_init__(self) -> None:
        _check_sizes(self, "tokens", "features", "depth", "heads", "head_features", "mlp_ratio", "conditions")
        for name in ("embedding_features", "condition_features"):
            if getattr(self, name) < 2 or getattr(self, name) % 2:
                raise ValueError(f"{name} must be even and positive, got {getattr(self, name)}")
        if self.shared and not self.one_key_head:
            raise ValueError("a key that is its value is one for all heads: one_key_head must be True where shared is")
        if not 0 <= self.drop_condition < 1:
            raise ValueError(f"drop_condition must be in [0, 1), got {self.drop_condition}")

    @property
    def embedding_features(self) -> int:
        """Width of the tokens' embedding."""
        return self.features if self.embedding is None else self.embedding


def inverse_example_inputs(config: InverseTransformerConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 32, and conditions."""
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, config.tokens, (batch_size, 32), dtype=np.int32),
        "condition": random.uniform(-1, 1, (batch_size, config.conditions)).astype(np.float32),
    }


Keys = tuple[jax.Array, jax.Array | None]  # (B, 1 + T, 1 or H, e): a null key in front; None is the key itself


class NullAttention(nn.Module):
    """Attention whose heads share keys, with a learned key and value in front that are always visible.

    Fields:
      config: of the network.
      width: of the context, which is not normalised here; None is self-attention, causal, of the normed input.
    """

    config: InverseTransformerConfig
    width: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        config = self.config
        heads = 1 if config.one_key_head else config.heads
        self.norm = _gain_norm(self)
        self.query = _linear(self, config.heads * config.head_features, ("embed", "heads"))
        names = ("key",) if config.shared else ("key", "value")
        self.sides = {name: _linear(self, heads * config.head_features, (None, "kv_heads")) for name in names}
        self.null = {
            name: self.param(
                f"null_{name}", partitioned(nn.initializers.normal(1.0), None), (heads * config.head_features,),
                self.param_dtype,
            )
            for name in names
        }  # fmt: skip
        self.out, self.out_norm = _linear(self, config.features, ("heads", "embed")), _gain_norm(self)

    @nn.nowrap
    def split(self, x: jax.Array) -> jax.Array:
        """(B, T, heads * e) to (B, T, heads, e)."""
        return x.reshape(*x.shape[:2], -1, self.config.head_features)

    def project(self, context: jax.Array) -> Keys:
        """(B, T, width) to keys and values without the null ones."""
        key = self.split(self.sides["key"](context))
        return key, None if self.config.shared else self.split(self.sides["value"](context))

    def keys(self, context: jax.Array) -> Keys:
        """(B, T, width) to keys and values with the null ones in front."""
        return self.with_null(*self.project(context))

    @nn.nowrap
    def with_null(self, key: jax.Array, value: jax.Array | None) -> Keys:
        """The same with the null key and value in front."""

        def join(x: jax.Array, name: str) -> jax.Array:
            null = self.null[name].reshape(1, 1, -1, self.config.head_features).astype(x.dtype)
            return jnp.concatenate([jnp.broadcast_to(null, (len(x), 1, *x.shape[2:])), x], axis=1)

        return join(key, "key"), None if value is None else join(value, "value")

    @nn.nowrap
    def attend(self, x: jax.Array, y: jax.Array, keys: Keys, **options: Any) -> jax.Array:
        """`x` is the normed input, `y` gives the shape of the result."""
        key, value = keys
        found: Any = attention(self.split(self.query(x)), key, key if value is None else value, **options)
        return self.out_norm(self.out(found.reshape(*y.shape[:2], -1)))

    def across(self, x: jax.Array, keys: Keys, dropped: jax.Array | None) -> jax.Array:
        """(B, L, features) with keys of a context; `dropped`, bool (B,), sees the null key alone."""
        options = {}
        if dropped is not None:
            hidden = jnp.broadcast_to(dropped[:, None], (len(x), keys[0].shape[1] - 1))
            options = {
                "query_segment_ids": jnp.zeros(x.shape[:2], jnp.int32),
                "key_segment_ids": jnp.pad(hidden.astype(jnp.int32), ((0, 0), (1, 0))),
            }
        return self.attend(self.norm(x), x, keys, **options)

    def causal(self, x: jax.Array) -> jax.Array:
        """(B, L, features) to itself: the null key stands before the first token."""
        y = self.norm(x)
        place = jnp.arange(x.shape[1] + 1)[None]
        return self.attend(y, x, self.keys(y), causal=True, query_positions=place[:, 1:], key_positions=place)

    def step(self, x: jax.Array, past: Keys, place: jax.Array) -> tuple[jax.Array, Keys]:
        """One token (B, 1, features), its place, and the keys so far, the null one and free slots among them."""
        y = self.norm(x)
        past = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place + 1, axis=1),
            past,
            self.project(y),
        )
        return self.attend(y, x, past, key_lengths=jnp.full(len(x), place + 2, jnp.int32)), past


class InverseLayer(nn.Module):
    """Causal self-attention, attention to the condition, MLP; each behind a norm and added to what came."""

    config: InverseTransformerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.attention = NullAttention(config, **options)
        self.cross_attention = NullAttention(config, config.condition_features, **options)
        self.mlp = NormedMLP(config.mlp_ratio * config.features, kernel_init=torch_kernel_init, **options)

    def keys(self, context: jax.Array) -> Keys:
        """Of the cross-attention."""
        return self.cross_attention.keys(context)

    def start(self, batch: int, length: int) -> Keys:
        """An empty past of the self-attention, but for the null key."""
        config = self.config
        heads = 1 if config.one_key_head else config.heads
        free = jnp.zeros((batch, length, heads, config.head_features), self.dtype or jnp.float32)
        return self.attention.with_null(free, None if config.shared else free)

    def __call__(self, x: jax.Array, keys: Keys, dropped: jax.Array | None) -> jax.Array:
        """(B, L, features) to the same."""
        x = self.attention.causal(x) + x
        x = self.cross_attention.across(x, keys, dropped) + x
        return self.mlp(x) + x

    def step(
        self, x: jax.Array, keys: Keys, dropped: jax.Array | None, past: Keys, place: jax.Array
    ) -> tuple[jax.Array, Keys]:
        """The same for one token."""
        found, past = self.attention.step(x, past, place)
        x = found + x
        x = self.cross_attention.across(x, keys, dropped) + x
        return self.mlp(x) + x, past


class InverseTransformer(nn.Module):
    """SMILES for properties."""

    config: InverseTransformerConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed = nn.Embed(
            config.tokens, config.embedding_features, **options,
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", None),
        )  # fmt: skip
        if config.embedding is not None:
            self.widen = _linear(self, config.features, (None, "embed"))
        # Published checkpoints hold a start that nothing uses.
        self.unused_start = self.param(
            "unused_start", partitioned(nn.initializers.normal(1.0), "embed"), (config.features,), self.param_dtype
        )
        self.embed_condition = _linear(self, config.condition_features, (None, None), bias=1)
        self.norm_in, self.norm_out = _gain_norm(self), _gain_norm(self)
        self.layers = [InverseLayer(config, **options) for _ in range(config.depth)]
        self.head = _linear(self, config.tokens, ("embed", "vocab"))

    def context(self, condition: jax.Array) -> tuple[Keys, ...]:
        """Keys and values of the condition (B, K) for each layer. Raises ValueError for another shape."""
        config = self.config
        if condition.ndim != 2 or not 0 < condition.shape[1] <= config.conditions:
            raise ValueError(f"condition must be (batch, 1 to {config.conditions}), got {condition.shape}")
        x = _gelu(self.embed_condition(condition[..., None]))
        x = x + half_sinusoids(condition.shape[1], config.condition_features).astype(x.dtype)
        return tuple(layer.keys(x) for layer in self.layers)

    def start(self, batch: int, length: int) -> tuple[Keys, ...]:
        """An empty past of `batch` sequences of up to `length` tokens."""
        return tuple(layer.start(batch, length) for layer in self.layers)

    @nn.nowrap
    def enter(self, tokens: jax.Array, first: jax.Array | int) -> jax.Array:
        """Tokens (B, L), the first of which is at a place, to (B, L, features)."""
        x = self.embed(tokens)
        x = x + half_sinusoids(tokens.shape[1], x.shape[-1], first).astype(x.dtype)
        return self.norm_in(x if self.config.embedding is None else self.widen(x))

    @nn.nowrap
    def leave(self, x: jax.Array) -> jax.Array:
        """(B, L, features) to float32 logits."""
        return self.head(self.norm_out(x)).astype(jnp.float32)

    def step(
        self, tokens: jax.Array, context: tuple[Keys, ...], past: tuple[Keys, ...], place: jax.Array,
        dropped: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Keys, ...]]:  # fmt: skip
        """Logits (B, tokens) after one more token (B,) at `place`, and the past with it."""
        x, new = self.enter(tokens[:, None], place), []
        for layer, keys, own in zip(self.layers, context, past, strict=True):
            x, own = layer.step(x, keys, dropped, own, place)
            new.append(own)
        return self.leave(x)[:, 0], tuple(new)

    def __call__(self, tokens: jax.Array, condition: jax.Array, dropped: jax.Array | None = None) -> jax.Array:
        """Logits of next tokens.

        Args:
          tokens: integers (B, L).
          condition: (B, K).
          dropped: bool (B,), which sequences see no condition; None is none of them.

        Returns:
          float32 (B, L, tokens).

        Raises:
          ValueError: a shape or dtype is wrong.
        """
        _check_tokens(tokens)
        if condition.shape[:1] != tokens.shape[:1]:
            raise ValueError(f"{len(tokens)} sequences need as many conditions, got {condition.shape}")
        x = self.enter(tokens, 0)
        for layer, keys in zip(self.layers, self.context(condition), strict=True):
            x = layer(x, keys, dropped)
        return self.leave(x)


def inverse_logits(
    model: InverseTransformer, variables: Any, tokens: jax.Array, condition: jax.Array, scale: float
) -> jax.Array:
    """Logits under guidance, by one pass of twice the batch: float32 (B, L, tokens)."""
    twice = [jnp.concatenate([x, x]) for x in (tokens, condition)]
    both: Any = model.apply(variables, *twice, _second_half(len(tokens)))
    conditional, null = jnp.split(both, 2)
    return guided(conditional, null, scale)


def _second_half(batch: int) -> jax.Array:
    return jnp.arange(2 * batch) >= batch


def inverse_loss(model: InverseTransformer) -> Callable:
    """For `zoo.train`: next tokens of "tokens" (B, L), all of them, padding too, under "condition" (B, K)."""

    def loss_function(params, model_state, batch, rngs, train):
        tokens, dropped = batch["tokens"], None
        if train and model.config.drop_condition:
            dropped = jax.random.uniform(rngs["dropout"], tokens.shape[:1]) < model.config.drop_condition
        logits = model.apply({"params": params}, tokens, batch["condition"], dropped)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), (model_state, {})

    return loss_function


def generate(
    model: InverseTransformer, variables: Any, condition: jax.Array | np.ndarray, prompt: jax.Array | np.ndarray,
    steps: int, *, scale: float = 3.0, top_k: int | None = None, temperature: float = 1.0, greedy: bool = False,
    rng: jax.Array | None = None,
) -> np.ndarray:  # fmt: skip
    """Continues prompts under conditions, one token a step through caches.

    Args:
      model, variables: the network.
      condition: (B, K).
      prompt: integers (B, P), at least a start.
      steps: new tokens.
      scale: of guidance. The published method samples with 3, whatever it is asked for.
      top_k: how many of the likeliest tokens are sampled among; None is the published (1 - 0.9) of all, at least one.
      temperature: divides the logits.
      greedy: the likeliest token instead.
      rng: for sampling; not needed if greedy.

    Returns:
      int32 (B, P + steps), the prompt first.

    Raises:
      ValueError: a shape is wrong, or a number is out of range.
    """
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not np.issubdtype(prompt.dtype, np.integer) or steps < 1:
        raise ValueError(f"needs an integer prompt (batch, 1 or more) and a step, got {prompt.shape}, {steps}")
    if np.shape(condition)[:1] != prompt.shape[:1]:
        raise ValueError(f"{len(prompt)} prompts need as many conditions, got {np.shape(condition)}")
    if not greedy and (rng is None or temperature <= 0):
        raise ValueError("sampling needs an rng and a positive temperature")
    count = max(int((1 - 0.9) * model.config.tokens), 1) if top_k is None else top_k
    sampling = Sampling(temperature=0.0 if greedy else float(temperature), top_k=count)
    return np.asarray(
        _generate(
            model, variables, jnp.asarray(condition), jnp.asarray(prompt, jnp.int32),
            jax.random.key(0) if rng is None else rng, steps=steps, scale=float(scale), sampling=sampling,
        )
    )  # fmt: skip


@partial(jax.jit, static_argnames=("model", "steps", "scale", "sampling"))
def _generate(model, variables, condition, prompt, rng, *, steps, scale, sampling):
    batch, width = prompt.shape
    copies, dropped = (1, None) if scale == 1 else (2, _second_half(batch))
    context = model.apply(variables, jnp.tile(condition, (copies, 1)), method="context")

    def body(carry, place):
        token, past, rng = carry
        logits, past = model.apply(variables, jnp.tile(token, copies), context, past, place, dropped, method="step")
        if copies == 2:
            conditional, null = jnp.split(logits, 2)
            logits = guided(conditional, null, scale)
        rng, own = jax.random.split(rng)
        given = prompt[:, jnp.minimum(place + 1, width - 1)]
        token = jnp.where(place + 1 < width, given, sampling.choose(logits, None, own))
        return (token, past, rng), token

    past = model.apply(variables, copies * batch, width + steps, method="start")
    _, rest = jax.lax.scan(body, (prompt[:, 0], past, rng), jnp.arange(width + steps - 1))
    return jnp.concatenate([prompt[:, :1], rest.T], axis=1)


# ---------------------------------------------------------------------------------------------------------- forward


@dataclasses.dataclass(frozen=True)
class PropertyEncoderConfig:
    """An encoder of tokens that tells properties.

    Attributes:
      tokens: number of tokens; 0 is padding.
      length: L of all sequences.
      properties: how many numbers are told.
      channels: how many times; the published one tells them once.
      features: width of the residual stream.
      depth: layers.
      heads: of the attention, over all features.
      mlp_ratio: hidden features of the MLPs over `features`.
      embedding: width of the tokens' embedding.
      dropout: of attention weights.
    """

    tokens: int = 24
    length: int = 64
    properties: int = 12
    channels: int = 1
    features: int = 256
    depth: int = 6
    heads: int = 16
    mlp_ratio: int = 2
    embedding: int = 16
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_sizes(self, "tokens", "length", "properties", "channels", "features", "depth", "heads", "mlp_ratio")
        if self.features % self.heads:
            raise ValueError(f"features ({self.features}) must be a multiple of heads ({self.heads})")
        if self.embedding < 2 or self.embedding % 2:
            raise ValueError(f"embedding must be even and positive, got {self.embedding}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def encoder_example_inputs(config: PropertyEncoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens, the last third of them padding."""
    tokens = np.random.default_rng(0).integers(1, max(config.tokens, 2), (batch_size, config.length), dtype=np.int32)
    tokens[:, config.length - config.length // 3 :] = 0
    return {"tokens": tokens}


def encoder_example_targets(config: PropertyEncoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Scaled properties."""
    random = np.random.default_rng(1)
    return {"properties": random.uniform(-1, 1, (batch_size, config.properties)).astype(np.float32)}


class EncoderLayer(nn.Module):
    """Attention that no norm precedes, and an MLP; both are added to what came."""

    config: PropertyEncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, padding: jax.Array, train: bool) -> jax.Array:
        """(B, L, features) and bool (B, L), which keys nobody sees, to (B, L, features)."""
        config, width = self.config, self.config.features

        def linear(name: str, axes: tuple[str, str]) -> nn.Dense:
            return dense(
                width, axes, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype,
                param_dtype=self.param_dtype, name=name,
            )  # fmt: skip

        query, key, value = (
            linear(name, ("embed", "heads"))(x).reshape(*x.shape[:2], config.heads, -1)
            for name in ("query", "key", "value")
        )
        dropout: dict[str, Any] = {}
        if train and config.dropout:
            dropout = {"dropout_rate": config.dropout, "dropout_rng": self.make_rng("dropout")}
        found: Any = attention(
            query, key, value, query_segment_ids=jnp.zeros(padding.shape, jnp.int32),
            key_segment_ids=padding.astype(jnp.int32), **dropout,
        )  # fmt: skip
        x = linear("out", ("heads", "embed"))(found.reshape(x.shape)) + x
        mlp = NormedMLP(
            config.mlp_ratio * width, kernel_init=torch_kernel_init, dtype=self.dtype, param_dtype=self.param_dtype,
            name="mlp",
        )  # fmt: skip
        return mlp(x) + x


class PropertyEncoder(nn.Module):
    """Properties of SMILES: an encoder, a number a position, and a linear map over positions, padding included."""

    config: PropertyEncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Its parts."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed = nn.Embed(
            config.tokens, config.embedding, **options,
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", None),
        )  # fmt: skip
        self.widen = _linear(self, config.features, (None, "embed"))
        self.norm_in, self.norm_out = _gain_norm(self), _gain_norm(self)
        self.layers = [EncoderLayer(config, **options) for _ in range(config.depth)]
        self.head = _linear(self, config.channels, ("embed", None))
        self.over_time = _linear(self, config.properties, (None, None))

    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Integers (B, L) to float32 (B, channels, properties).

        Raises ValueError for another shape or dtype.
        """
        config = self.config
        _check_tokens(tokens)
        if tokens.shape[1] != config.length:
            raise ValueError(f"sequences must be padded to {config.length} tokens, got {tokens.shape}")
        x = self.embed(tokens)
        x = self.norm_in(self.widen(x + half_sinusoids(config.length, config.embedding).astype(x.dtype)))
        for layer in self.layers:
            x = layer(x, tokens == 0, train)
        return self.over_time(self.head(self.norm_out(x)).swapaxes(1, 2)).astype(jnp.float32)


def encoder_loss(model: PropertyEncoder) -> Callable:
    """For `zoo.train`: the mean squared error of "properties" (B, P), told of "tokens" (B, L)."""

    def loss_function(params, model_state, batch, rngs, train):
        told = model.apply({"params": params}, batch["tokens"], train, rngs=rngs if train else {})[:, 0]
        return jnp.mean((told - batch["properties"]) ** 2), (model_state, {})

    return loss_function

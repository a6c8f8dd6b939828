"""Linear attention and its feature maps, with Based's among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import ClassVar, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.linear_attention import LinearAttentionState, feature_size, linear_attention
from zoo.errors import unknown
from zoo.mixers.base import register, token_positions
from zoo.mixers.recurrent import RecurrentMixer, empty_memory, exists, seen_tokens, zero_where_missing

FeatureMap = Literal["identity", "elu", "relu", "square", "performer", "cosformer", "taylor"]


class LinearState(NamedTuple):
    """The past of a linear attention."""

    memory: LinearAttentionState
    length: jax.Array  # int32 (batch,), tokens seen


@register("linear_attention")
class LinearAttention(RecurrentMixer):
    """o_t = sum_{s<=t} phi(q_t).phi(k_s) v_s / sum_{s<=t} phi(q_t).phi(k_s) (Katharopoulos et al. 2020).

    Fields beside those of `Mixer`:
      heads: their number.
      head_dim: width of a head's values; None is features / heads.
      feature_dim: width of its queries and keys before phi; None is head_dim.
      feature_map: phi; s stands for q . k / sqrt(feature_dim).
        "identity", phi(q) . phi(k) = s; "elu", elu(x) + 1; "relu" (Kasai et al. 2021);
        "square", [1, x, x^2 / sqrt(2)] of each feature by itself: Taylor's map without its cross terms;
        "performer", exp(w x - |x|^2 / 2) / sqrt(m), m = feature_dim fixed orthogonal rows w (Choromanski 2021);
        "cosformer", relu(x) [cos, sin] of pi t / (2 max_length) at position t (Qin et al. 2022);
        "taylor", phi(q) . phi(k) = 1 + s + s^2 / 2 (Arora et al. 2024, "Based").
      normalize: whether to divide; phi must then be positive, which "identity" and "square" are not.
      epsilon: added to the divisor.
      qkv_bias, out_bias: whether the projections have biases.
      max_length: of "cosformer", whose weights are positive up to this distance.
    """

    BIDIRECTIONAL: ClassVar[bool] = True

    heads: int = 8
    head_dim: int | None = None
    feature_dim: int | None = None
    feature_map: FeatureMap = "elu"
    normalize: bool = True
    epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    max_length: int = 2048

    def __post_init__(self):
        super().__post_init__()
        if self.feature_map not in get_args(FeatureMap):
            raise unknown("feature map", self.feature_map, get_args(FeatureMap))
        if self.head_dim is None:
            self.head_width("features", self.features)

    @property
    def _widths(self) -> tuple[int, int]:
        """Of a head's queries and values."""
        value = self.features // self.heads if self.head_dim is None else self.head_dim
        return (value if self.feature_dim is None else self.feature_dim), value

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        width, value_width = self._widths
        query = self.split_heads(self.project(self.heads * width, "query", use_bias=self.qkv_bias)(x))
        key = self.split_heads(self.project(self.heads * width, "key", use_bias=self.qkv_bias)(x))
        value = self.split_heads(self.project(self.heads * value_width, "value", use_bias=self.qkv_bias)(x))
        there = exists(x, count)
        positions = token_positions(x.shape[:2], there, None if state is None else state.length)
        query, key = self._map(query, positions), self._map(key, positions)
        key, value = zero_where_missing(key, count), zero_where_missing(value, count)
        if self.causal:
            out, memory = self._attend(query, key, value, None if state is None else state.memory, self.normalize)
            if count is not None and self.feature_map == "taylor":  # phi(0) is not 0: its 1 counts missing tokens
                missing = (x.shape[1] - count).astype(jnp.float32)
                memory = memory._replace(key_sum=memory.key_sum.at[:, :, 0].add(-missing[:, None]))
        else:
            out = self._attend_both_ways(query, key, value, there)
        y = self.project_out(use_bias=self.out_bias)(out.reshape(*x.shape[:2], -1))
        return y, None if state is None else LinearState(memory, seen_tokens(state.length, x, count))

    def _attend(self, query, key, value, state, normalize):
        taylor = self.feature_map == "taylor"
        return linear_attention(
            query, key, value, state=state, feature_map="taylor" if taylor else "identity", normalize=normalize,
            epsilon=self.epsilon, scale=None if taylor else 1.0,
        )  # fmt: skip

    def _attend_both_ways(self, query, key, value, there):
        """The tokens before and those after, less the token itself, which both count; v = 1 gives the divisor."""
        ones = jnp.ones((*value.shape[:3], 1), value.dtype) if there is None else there[:, :, None, None]
        value = jnp.concatenate([value, jnp.broadcast_to(ones, (*value.shape[:3], 1)).astype(value.dtype)], axis=-1)
        before, _ = self._attend(query, key, value, None, False)
        after, _ = self._attend(*(x[:, ::-1] for x in (query, key, value)), None, False)
        own = jnp.einsum("bthd,bthd->bth", query, key, preferred_element_type=jnp.float32)
        if self.feature_map == "taylor":
            own = own * query.shape[-1] ** -0.5
            own = 1 + own + own**2 / 2
        sums = (before + after[:, ::-1]).astype(jnp.float32) - own[..., None] * value
        out = sums[..., :-1] / (sums[..., -1:] + self.epsilon) if self.normalize else sums[..., :-1]
        return out.astype(value.dtype)

    def _map(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """phi of (batch, time, heads, width); "taylor" is left to the kernel."""
        if self.feature_map == "taylor":
            return x
        if self.feature_map == "identity":
            return x * x.shape[-1] ** -0.25
        if self.feature_map == "elu":
            return jax.nn.elu(x) + 1
        if self.feature_map == "relu":
            return jax.nn.relu(x)
        if self.feature_map == "square":
            x = x * x.shape[-1] ** -0.25
            return jnp.concatenate([jnp.ones_like(x[..., :1]), x, x**2 * math.sqrt(0.5)], axis=-1)
        if self.feature_map == "performer":
            wide = x.astype(jnp.float32) * x.shape[-1] ** -0.25
            rows = _orthogonal_rows(x.shape[-1])
            exponent = wide @ rows.T - jnp.sum(wide**2, axis=-1, keepdims=True) / 2
            return (jnp.exp(exponent) * len(rows) ** -0.5).astype(x.dtype)
        angle = (jnp.pi / 2 / self.max_length) * positions[:, :, None, None].astype(jnp.float32)
        x = jax.nn.relu(x)
        return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).astype(x.dtype)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        width, value_width = self._widths
        sizes: dict[str, Callable[[int], int]] = {
            "taylor": lambda d: feature_size("taylor", d),
            "square": lambda d: 1 + 2 * d,
            "cosformer": lambda d: 2 * d,
        }
        size = sizes.get(self.feature_map, lambda d: d)(width)
        return LinearState(empty_memory(batch_size, self.heads, size, value_width), jnp.zeros(batch_size, jnp.int32))


@cache
def _orthogonal_rows(width: int) -> np.ndarray:
    """(width, width) orthogonal rows of the lengths of Gaussian vectors: fixed, not learned, the same everywhere."""
    random = np.random.default_rng(0)
    rows = np.linalg.qr(random.normal(size=(width, width)))[0].T
    lengths = np.linalg.norm(random.normal(size=(width, width)), axis=1, keepdims=True)
    return (lengths * rows).astype(np.float32)


@register("based")
class TaylorAttention(LinearAttention):
    """The global layer of Based (Arora et al. 2024): linear attention with Taylor's map of few features.

    o_t = sum_s a_ts v_s / sum_s a_ts, a_ts = 1 + s + s^2 / 2, s = q_t . k_s / sqrt(feature_dim). No positions: the
    network around it has short convolutions and windowed attention (`gated_convolution`, `softmax` with a window).

    Fields: those of `LinearAttention`.
    """

    feature_map: FeatureMap = "taylor"
    feature_dim: int | None = 16

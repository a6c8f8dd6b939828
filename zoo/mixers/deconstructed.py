"""Attentions with one of their principles taken away (Xue et al. 2025, "Deconstructing Attention").

- `pointwise`: tokens are not mixed.
- `approximate`: the softmax is its Taylor expansion of second order.
- `key_only`: a key's score does not depend on the query.
- `fixed_map`: queries and keys do not depend on the sequence.

Where queries and keys belong to another layer (their "static" attention), it is `softmax` with its argument
`query_key`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import attention
from kernels.attention_readout import attention_entries
from kernels.common import NEGATIVE_INFINITY
from kernels.linear_attention import LinearAttentionState, feature_size, linear_attention
from zoo.errors import unknown
from zoo.layers.mlp import MLP
from zoo.mixers import cache
from zoo.mixers.base import register, token_positions
from zoo.mixers.heads import ProjectedHeads
from zoo.mixers.recurrent import (
    RecurrentMixer,
    check_batch_size,
    empty_memory,
    exists,
    seen_tokens,
    zero_where_missing,
)

ApproximateForm = Literal["taylor", "appendix"]
_TINY = 1e-30  # keeps the divisors of rows that see nothing from zero; no other sum notices it


@register("pointwise")
class Pointwise(RecurrentMixer):
    """down(silu(gate(x)) up(x)): a mixer that mixes nothing, with the parameters of one that does.

    Fields beside those of `Mixer`:
      hidden: width between the projections; None is 4/3 features, rounded: the parameters of four square projections.
    """

    hidden: int | None = None

    def setup(self):
        """The network, without biases."""
        self.mlp = MLP(
            round(4 * self.features / 3) if self.hidden is None else self.hidden, "swiglu", False, self.dtype,
            self.param_dtype, self.kernel_init, self.out_init,
        )  # fmt: skip

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        return self.mlp(x), None if state is None else seen_tokens(state, x, count)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """int32 (batch,), the tokens seen, which nothing depends on."""
        check_batch_size(batch_size)
        return jnp.zeros(batch_size, jnp.int32)


class ApproximateState(NamedTuple):
    """The past of an approximate attention."""

    memory: LinearAttentionState
    length: jax.Array  # int32 (batch,), tokens seen


def taylor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    form: ApproximateForm = "taylor",
    state: LinearAttentionState | None = None,
    count: jax.Array | None = None,
) -> tuple[jax.Array, LinearAttentionState]:
    """Causal attention whose exponential is expanded to second order, in linear time.

    "taylor": weights 1 + s + s^2 / 2 of s = q . k / sqrt(dim), over their sum; always positive (the paper's section 3).
    "appendix": the sum of three attentions of weights 1, q . k and q^2 . k^2, with squares of each feature by itself,
    each over its own sum (its appendix I). The sums of q . k may vanish: rounding is then amplified without bound.

    Args:
      query: (batch, time, heads, dim).
      key, value: (batch, time, key_heads, dim); `heads` is a multiple of `key_heads`.
      form: see there.
      state: what an earlier call returned; None is an empty past.
      count: int32 (batch,), the tokens that exist, the first ones; None is all.

    Returns:
      (batch, time, heads, dim), and the state: of 3 heads' number of heads in the appendix' form.
    """
    key, value = zero_where_missing(key, count), zero_where_missing(value, count)
    if form == "taylor":
        out, state = linear_attention(
            query, key, value, feature_map="taylor", normalize=True, epsilon=_TINY, state=state
        )
        if count is not None:  # a missing token's first feature is 1, not 0
            missing = (query.shape[1] - count).astype(jnp.float32)
            state = state._replace(key_sum=state.key_sum.at[:, :, 0].add(-missing[:, None]))
        return out, state
    there = zero_where_missing(jnp.ones_like(key), count)
    out, state = linear_attention(
        jnp.concatenate([jnp.ones_like(query), query, query**2], axis=2),
        jnp.concatenate([there, key, key**2], axis=2),
        jnp.concatenate([value] * 3, axis=2),
        normalize=True, epsilon=_TINY, state=state,
    )  # fmt: skip
    return out.reshape(*out.shape[:2], 3, *query.shape[2:3], -1).sum(axis=2), state


@register("approximate")
class ApproximateAttention(RecurrentMixer, ProjectedHeads):
    """`taylor_attention` of several heads between linear projections.

    Fields beside those of `ProjectedHeads`:
      form: "taylor", or "appendix", for which prefill, decoding and the parallel form agree only as far as its divisors
        are away from zero.
    """

    form: ApproximateForm = "taylor"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in get_args(ApproximateForm):
            raise unknown("form of approximate attention", self.form, get_args(ApproximateForm))

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        start = None if state is None else state.length
        positions = token_positions(x.shape[:2], exists(x, count), start)
        query, key = self.query_key(x, positions)
        out, memory = taylor_attention(
            query, key, self.split_values(x), form=self.form, state=None if state is None else state.memory, count=count
        )
        y = self.out(out.reshape(*x.shape[:2], -1))
        return y, None if state is None else ApproximateState(memory, seen_tokens(state.length, x, count))

    def weights(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """The whole map, float32 (batch, heads, time, time), of queries and keys as they are compared."""
        products = _products(query, key)
        if self.form == "taylor":
            scaled = products * query.shape[-1] ** -0.5
            return _over_row_sums(1 + scaled + scaled**2 / 2)
        parts = (jnp.ones_like(products), products, _products(query**2, key**2))
        return sum(map(_over_row_sums, parts), start=jnp.float32(0))

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        heads, width = self.heads, self.width_of_query
        if self.form == "taylor":
            width = feature_size("taylor", width)
        else:
            heads = 3 * heads
        memory = empty_memory(batch_size, heads, width, self.width_of_head)
        return ApproximateState(memory, jnp.zeros(batch_size, jnp.int32))


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)


def _over_row_sums(weights: jax.Array) -> jax.Array:
    weights = jnp.tril(weights)
    return weights / weights.sum(axis=-1, keepdims=True)


class KeyOnlyState(NamedTuple):
    """Sums of exp(score - largest) and of these times values, and the largest score of the past."""

    sums: LinearAttentionState  # (batch, heads, 1, width) and (batch, heads, 1)
    largest: jax.Array  # float32 (batch, heads)


def key_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """float32 (batch, time, heads): each token's own q . k / sqrt(dim)."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("bthd,bthd->bth", query, key, preferred_element_type=jnp.float32)
    return scores * query.shape[-1] ** -0.5


def nonapprox_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    state: KeyOnlyState | None = None,
    count: jax.Array | None = None,
) -> tuple[jax.Array, KeyOnlyState]:
    """out_i = sum_{j<=i} exp(r_j) v_j / sum_{j<=i} exp(r_j), r_j = q_j . k_j / sqrt(dim), in linear time and stable.

    It is linear attention of one feature, exp(r_j - m_j), whose state decays by exp(m_{j-1} - m_j) where the running
    maximum m of the scores grows.

    Args:
      query: (batch, time, heads, dim).
      key, value: (batch, time, key_heads, dim); `heads` is a multiple of `key_heads`.
      state: what an earlier call returned; None is an empty past.
      count: int32 (batch,), the tokens that exist, the first ones; None is all.

    Returns:
      (batch, time, heads, dim), and the state.
    """
    scores, there = key_scores(query, key), exists(query, count)
    if there is not None:
        scores = jnp.where(there[..., None], scores, NEGATIVE_INFINITY)
    before = jnp.full(scores[:, 0].shape, NEGATIVE_INFINITY) if state is None else state.largest
    # The result does not depend on the maximum, so nor does its gradient.
    history = jax.lax.stop_gradient(jnp.concatenate([before[:, None], scores], axis=1))
    largest = jax.lax.cummax(history, axis=1)
    weight = zero_where_missing(jnp.exp(scores - largest[:, 1:]), count)[..., None].astype(value.dtype)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    out, sums = linear_attention(
        jnp.ones_like(weight), weight, zero_where_missing(value, count), decay=largest[:, :-1] - largest[:, 1:],
        normalize=True, epsilon=_TINY, scale=1.0, state=None if state is None else state.sums,
    )  # fmt: skip
    return out, KeyOnlyState(sums, largest[:, -1])


@register("key_only")
class KeyOnlyAttention(RecurrentMixer, ProjectedHeads):
    """`nonapprox_attention` of several heads between linear projections; queries pass through SiLU.

    Fields: those of `ProjectedHeads`. A rotation has no effect, as a token's query and key turn alike.
    """

    def query_key(self, x, positions):
        """See `ProjectedHeads`."""
        query, key = self.unrotated(x)
        return nn.silu(query), key

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        query, key = self.query_key(x, None)
        out, next_state = nonapprox_attention(query, key, self.split_values(x), state=state, count=count)
        return self.out(out.reshape(*x.shape[:2], -1)), None if state is None else next_state

    def weights(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """The whole map, float32 (batch, heads, time, time), of queries and keys as they are compared."""
        scores = key_scores(query, key).swapaxes(1, 2)[:, :, None]
        seen = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        sums = empty_memory(batch_size, self.heads, 1, self.width_of_head)
        return KeyOnlyState(sums, jnp.full((batch_size, self.heads), NEGATIVE_INFINITY, jnp.float32))


def shared_map_attention(weights: jax.Array, value: jax.Array) -> jax.Array:
    """One map for all sequences: out_bth = sum_s weights_hts v_bsh, a single product of matrices for each head.

    Args:
      weights: (heads, time, keys).
      value: (batch, keys, key_heads, dim); `heads` is a multiple of `key_heads`.

    Returns:
      (batch, time, heads, dim), in value's dtype.
    """
    heads, time, keys = weights.shape
    grouped = weights.astype(value.dtype).reshape(value.shape[2], -1, time, keys)
    out = jnp.einsum("grts,bsgd->btgrd", grouped, value, preferred_element_type=jnp.float32)
    return out.reshape(len(value), time, heads, -1).astype(value.dtype)


@register("fixed_map")
class FixedMapAttention(RecurrentMixer, ProjectedHeads):
    """Softmax attention whose queries and keys depend on positions alone: its map is computed once for all sequences.

    By itself it projects them from a fixed random vector for each position. In a network they come from a stream of its
    own, through `query_key`.

    Its state keeps values only; queries and keys are given, or computed, anew with each call.

    Fields beside those of `ProjectedHeads`:
      max_length: positions that have a random vector.
      deviation: standard deviation of the random vectors.
      seed: of the random vectors.
    """

    max_length: int = 2048
    deviation: float = 0.02
    seed: int = 0

    def mix(self, x, state, count, query_key=None):
        """See `RecurrentMixer`.

        Args:
          query_key: queries (1, length, heads, width) and keys (1, length, key heads, width) of all positions; None
            projects the random vectors.
        """
        length = x.shape[1] if state is None else state.key.shape[1]
        query, key = self._of_random_vectors(length) if query_key is None else (part[:, :length] for part in query_key)
        value = self.split_values(x)
        if query.shape[0] != 1 or query.shape[1] < length:
            raise ValueError(f"query_key must be of (1, at least {length}) positions, got {query.shape[:2]}")
        if state is None:
            out = shared_map_attention(self.weights(query, key)[0], value)
        else:
            positions = token_positions(x.shape[:2], exists(x, count), state.length)
            state, _, cached, mask = cache.append(state, value[..., :0], value, positions, None)
            key = jnp.broadcast_to(key.astype(cached.dtype), (x.shape[0], *key.shape[1:]))
            rows = query[0].astype(cached.dtype)[jnp.maximum(positions, 0)]
            out = attention(rows, key, cached, causal=True, **mask).astype(value.dtype)
        return self.out(out.reshape(*x.shape[:2], -1)), state

    def weights(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """The map: float32 (batch, heads, time, time)."""
        return attention_entries(query, key, causal=True)

    def _of_random_vectors(self, length: int) -> tuple[jax.Array, jax.Array]:
        self._check_length(length)
        vectors = random_vectors(self.seed, self.max_length, self.features, self.deviation)[None, :length]
        return self.query_key(vectors, jnp.arange(length)[None])

    @nn.nowrap
    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(f"{length} tokens are more than max_length = {self.max_length} random vectors")

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        self._check_length(length)
        # Keys are shared: those of a sequence have no width.
        return cache.empty(batch_size, length, None, self.key_head_count, 0, self.width_of_head, self.state_dtype)


def random_vectors(seed: int, count: int, features: int, deviation: float) -> jax.Array:
    """float32 (count, features) of independent normal numbers: not learned, a function of the seed."""
    return deviation * jax.random.normal(jax.random.key(seed), (count, features))

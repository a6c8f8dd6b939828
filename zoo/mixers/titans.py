"""Titans (Behrouz et al. 2024): a memory that trains while it reads, alone and beside attention.

No code was published; where the paper is silent or contradicts itself, what is done here is said with each mixer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention
from kernels.neural_memory import Gate, MemoryState, Weights, initial_state, neural_memory, read_memory
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.rotary import Rotary
from zoo.mixers import cache
from zoo.mixers.base import register, token_positions
from zoo.mixers.memory import MemoryMixer, MemoryMixerState, Pasts, memory_shapes, where_rows
from zoo.mixers.recurrent import RecurrentMixer, check_batch_size, exists
from zoo.mixers.softmax import SoftmaxAttention

Granularity = Literal["head", "channel"]


@register("titans_lmm")
class TitansLMM(MemoryMixer):
    """The long-term memory module (sections 3.1 and 3.3): surprise with momentum, and forgetting.

    The gates alpha, eta and theta of `kernels.neural_memory` are sigmoids of projections of the token, theta's times
    `rate_max`: one a head and layer of the memory, or one for each output channel of each layer, which is the paper's
    form ("channel-wise", printed for a memory that is a matrix), its projections of low rank.

    As it starts (alpha 0.02) the inner training amplifies rounding: on text, a kernel's float32 outputs have errors of
    3e-5 of their size at 128 tokens, 4e-3 at 512 and 0.4 at 1024, and of 8e-3 there once training has halved alpha, in
    parallel as token by token (README of `kernels`).

    Fields beside those of `MemoryMixer`:
      momentum, decay: without, eta or alpha is 0 and has no parameters.
      gate_granularity: "head" or "channel".
      gate_rank: of the gates of channels; XLA runs their memory on every platform.
    """

    momentum: bool = True
    decay: bool = True
    gate_granularity: Granularity = "head"
    gate_rank: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.gate_granularity not in get_args(Granularity):
            raise ValueError(f"gate_granularity must be one of {get_args(Granularity)}, got {self.gate_granularity!r}")
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {self.gate_rank}")

    @property
    def _gate_widths(self) -> list[int]:
        """Gates of a head, layer by layer."""
        channels = [shape[1] for shape in memory_shapes(*self._memory_sizes)]
        return channels if self.gate_granularity == "channel" else [1] * self.memory_depth

    def setup(self):
        """See `MemoryMixer`, and the gates."""
        super().setup()
        project = partial(dense, kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)
        each = self.heads * sum(self._gate_widths)
        biases = {"alpha": -4.0, "eta": 0.0, "theta": 0.0}  # remember
        for name in (("alpha",) if self.decay else ()) + (("eta",) if self.momentum else ()) + ("theta",):
            fan_in = "embed"
            if self.gate_granularity == "channel":
                setattr(self, f"{name}_down", project(self.gate_rank, ("embed", None), use_bias=False))
                fan_in = None
            setattr(self, name, project(each, (fan_in, "heads"), bias_init=nn.initializers.constant(biases[name])))

    @nn.nowrap
    def start(self, weights, batch_size):
        """See `MemoryMixer`."""
        return initial_state(weights, batch_size, momentum=self.momentum)

    def write(self, x, query, key, value, memory, count):
        """See `MemoryMixer`."""
        theta = jax.tree.map(lambda gate: self.rate_max * gate, self._gate("theta", x))
        alpha = self._gate("alpha", x) if self.decay else jax.tree.map(jnp.zeros_like, theta)
        eta = self._gate("eta", x) if self.momentum else None
        return self.train(query, key, value, alpha, eta, theta, memory, count)

    def train(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        alpha: Gate,
        eta: Gate | None,
        theta: Gate,
        memory: Weights | MemoryState,
        count: jax.Array | None,
    ) -> tuple[jax.Array, MemoryState]:
        """`kernels.neural_memory.neural_memory` of this mixer's norm and chunks: where probes see what it is given."""
        return neural_memory(
            query, key, value, alpha, eta, theta, memory, norm=self.memory()[1], chunk_size=self.chunk_size,
            lengths=count,
        )  # fmt: skip

    def recall(self, query: jax.Array, weights: Weights) -> jax.Array:
        """Reads a memory (batch, heads, out, in) without changing it."""
        return read_memory(query, weights, self.memory()[1])

    def _gate(self, name: str, x: jax.Array) -> Gate:
        low = getattr(self, f"{name}_down")(x) if self.gate_granularity == "channel" else x
        gate = jax.nn.sigmoid(getattr(self, name)(low).astype(jnp.float32))
        gate = gate.reshape(*x.shape[:2], self.heads, -1)
        if self.gate_granularity == "head":
            return gate
        return tuple(jnp.split(gate, np.cumsum(self._gate_widths)[:-1], axis=3))


class PersistentAttention(SoftmaxAttention):
    """Softmax attention over a window, and over a prefix that every token sees whatever the window."""

    def __call__(self, x, state=None, *, prefix=None, valid=None, deterministic=True):
        """See `Mixer`.

        Args beside:
          prefix: (batch or 1, N, features), which stands before the first token: its positions are -N .. -1. None is
            no prefix.
        """
        if prefix is None:
            return super().__call__(x, state, valid=valid, deterministic=deterministic)
        shape, before = x.shape[:2], prefix.shape[1]
        positions = token_positions(shape, valid, None if state is None else state.length)
        query, key, value = self.query_key_value(x, positions)
        dtype = query.dtype
        _, prefix_key, prefix_value = self.query_key_value(prefix, jnp.arange(-before, 0, dtype=jnp.int32)[None])
        to_batch = (shape[0], *prefix_key.shape[1:])
        prefix_key, prefix_value = (jnp.broadcast_to(array, to_batch) for array in (prefix_key, prefix_value))
        of_prefix, prefix_weight = attention(query, prefix_key, prefix_value, return_logsumexp=True)
        state, key, value, mask = self.remember(state, key, value, positions, valid)
        query = query.astype(key.dtype)
        heads, weight = attention(query, key, value, return_logsumexp=True, **self.logits(mask))
        # One softmax over both: each part weighs what its sum of exponentials does.
        share = jax.nn.sigmoid(weight - prefix_weight).swapaxes(1, 2)[..., None]
        heads = share * heads.astype(jnp.float32) + (1 - share) * of_prefix.astype(jnp.float32)
        y = self.out(heads.astype(dtype).reshape(*shape, -1))
        return (y if valid is None else jnp.where(valid[..., None], y, 0)), state


class TitansHybrid(RecurrentMixer):
    """What the three hybrids share: persistent memory, a long-term memory and attention.

    Fields beside those of `Mixer`:
      heads: of attention.
      memory_heads: of the long-term memory; None is `heads`.
      num_persistent_tokens: learned tokens that stand before the sequence, the same in every sequence.
      rotary: of attention, or None.
      memory_depth, memory_expansion, chunk_size, rate_max, kernel_size, momentum, decay, gate_granularity,
        gate_rank: of the memory, see `TitansLMM`.
      norm_epsilon: of all norms.
    """

    heads: int = 4
    memory_heads: int | None = None
    num_persistent_tokens: int = 16
    rotary: Rotary | None = Rotary()
    memory_depth: int = 2
    memory_expansion: int = 4
    chunk_size: int = 16
    rate_max: float = 0.1
    kernel_size: int = 4
    momentum: bool = True
    decay: bool = True
    gate_granularity: Granularity = "head"
    gate_rank: int = 32
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens must not be negative, got {self.num_persistent_tokens}")
        self._make_memory(parent=None)
        self._make_attention(parent=None)

    @nn.nowrap
    def _make_memory(self, **more: Any) -> TitansLMM:
        names = (
            "features", "memory_depth", "memory_expansion", "chunk_size", "rate_max", "kernel_size", "momentum",
            "decay", "gate_granularity", "gate_rank", "norm_epsilon", "dtype", "param_dtype", "kernel_init", "out_init",
        )  # fmt: skip
        heads = self.heads if self.memory_heads is None else self.memory_heads
        return TitansLMM(heads=heads, **{name: getattr(self, name) for name in names}, **more)

    @nn.nowrap
    def _make_attention(self, **more: Any) -> PersistentAttention:
        names = ("features", "heads", "rotary", "dtype", "param_dtype", "kernel_init", "out_init")
        return PersistentAttention(**{name: getattr(self, name) for name in names}, **more)

    def setup(self):
        """Parameters: `persistent`, `memory`, `attention`, and of gated hybrids `attention_norm`, `memory_norm`."""
        self.memory = self._make_memory()
        self.attention = self._make_attention()
        if self.num_persistent_tokens:
            init = partitioned(nn.initializers.normal(0.02), None, "embed")
            shape = (self.num_persistent_tokens, self.features)
            self.persistent = self.param("persistent", init, shape, self.param_dtype)

    def _make_gate_norms(self) -> tuple[nn.Module, nn.Module]:
        of = partial(norm, "rms", epsilon=self.norm_epsilon, dtype=self.dtype, param_dtype=self.param_dtype)
        return of(), of()

    def prefix(self, dtype: Any) -> jax.Array | None:
        """The persistent tokens (1, N, features), or None."""
        return self.persistent[None].astype(dtype) if self.num_persistent_tokens else None


class WindowedState(NamedTuple):
    """The past of a memory beside or below attention over a window."""

    memory: MemoryMixerState
    attention: cache.KeyValueCache
    prefix: jax.Array  # (batch, N, features): what the memory gave for the persistent tokens


class WindowedHybrid(TitansHybrid):
    """A memory that reads the persistent tokens and the sequence, and attention over a window.

    Fields beside those of `TitansHybrid`:
      window: tokens that attention sees, itself the last, beside the persistent ones.
    """

    window: int = 64

    @nn.nowrap
    def _make_attention(self, **more):
        return super()._make_attention(window=self.window, **more)

    def remembered(
        self, x: jax.Array, state: WindowedState | None, count: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, MemoryMixerState | None]:
        """The memory's outputs for the tokens and for the persistent ones, and its next state."""
        before, prefix = self.num_persistent_tokens, self.prefix(x.dtype)
        if prefix is None:
            m, after = self.memory.mix(x, None if state is None else state.memory, count)
            return m, None, after
        if state is None:
            whole = jnp.concatenate([jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:])), x], axis=1)
            m, _ = self.memory.mix(whole, None, None if count is None else count + before)
            return m[:, before:], m[:, :before], None
        # All sequences start with the same tokens: they are read once, when there is a sequence that starts.
        first = state.memory.length == 0

        def start(self: WindowedHybrid) -> tuple[jax.Array, MemoryMixerState]:
            m, memory = self.memory.mix(prefix, self.memory.init_state(1, before), None)
            return m.astype(state.prefix.dtype), memory

        def skip(self: WindowedHybrid) -> tuple[jax.Array, MemoryMixerState]:
            return state.prefix[:1], jax.tree.map(lambda array: array[:1], state.memory)

        started = nn.cond(first.any(), start, skip, self)
        seen = exists(x, count)
        starts = first if seen is None else first & seen.any(axis=1)
        of_prefix, memory = jax.tree.map(
            lambda new, old: where_rows(starts, new, old), started, (state.prefix, state.memory)
        )
        m, memory = self.memory.mix(x, memory, count)
        return m, of_prefix, memory

    def attended(
        self, x: jax.Array, prefix: jax.Array | None, state: WindowedState | None, count: jax.Array | None
    ) -> tuple[jax.Array, cache.KeyValueCache | None]:
        """Attention over the window of the tokens x and over the prefix, and its next state."""
        past = None if state is None else state.attention
        return self.attention(x, past, prefix=prefix, valid=exists(x, count))

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        prefix = jnp.zeros((batch_size, self.num_persistent_tokens, self.features), self.state_dtype)
        return WindowedState(
            self._make_memory(parent=None).init_state(batch_size, length),
            self._make_attention(parent=None).init_state(batch_size, length),
            prefix,
        )


@register("titans_mag")
class TitansMAG(WindowedHybrid):
    """Memory as a gate: y = rms_norm(attention(x)) sigmoid(rms_norm(memory(x))) (section 4.2, equations 26 to 28).

    The paper says "a non-linearity"; that it is a sigmoid, and of the memory, is a choice made here.
    """

    def setup(self):
        """See `TitansHybrid`."""
        super().setup()
        self.attention_norm, self.memory_norm = self._make_gate_norms()

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        m, of_prefix, memory = self.remembered(x, state, count)
        y, past = self.attended(x, self.prefix(x.dtype), state, count)
        y = self.attention_norm(y) * nn.sigmoid(self.memory_norm(m))
        if state is None:
            return y, None
        return y, WindowedState(memory, past, state.prefix if of_prefix is None else of_prefix)


@register("titans_mal")
class TitansMAL(WindowedHybrid):
    """Memory as a layer: attention over a window of what the memory gives (section 4.3, equations 29 to 31)."""

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        m, of_prefix, memory = self.remembered(x, state, count)
        y, past = self.attended(m, of_prefix, state, count)
        if state is None:
            return y, None
        return y, WindowedState(memory, past, state.prefix if of_prefix is None else of_prefix)


class MACState(NamedTuple):
    """The past of memory as context."""

    length: jax.Array  # int32 (batch,), tokens seen
    memory: MemoryState
    read: Weights  # the weights after the last full segment, which the next one reads
    pasts: Pasts  # of the convolutions that the memory learns from; empty where a segment starts
    read_past: jax.Array  # of the convolution of the queries that it is asked first
    key: jax.Array  # (batch, context and segment, heads, width): of the segment so far, what was read first
    value: jax.Array


@register("titans_mac")
class TitansMAC(TitansHybrid):
    """Memory as context: attention over what was read of the past beside the segment (section 4.1, equations 21 to 25).

    Segment by segment: h = what the memory, as it was after the last segment, answers to the segment's tokens;
    y = attention over persistent tokens, h and the segment; the memory learns from y and is read with it, m; the output
    is rms_norm(y) sigmoid(rms_norm(m)).

    As printed, a token sees what later tokens of its segment read, and is read after them: it leaks the future. Here
    token i sees h_j for j <= i only, and reads the memory after token i. With `causal=False` it is as printed, for
    classification. Convolutions start anew with each segment, and so does the memory's grid of chunks.

    Fields beside those of `TitansHybrid`:
      segment_len: tokens of a segment.
      num_memory_tokens: of the context: h is averaged over segment_len / num_memory_tokens neighbours, and tokens after
        these see the average. None is all of h.
      pack_last_segment: in a last segment that is shorter, rotary positions go on behind its own context, not behind a
        full one. Positions then depend on where the sequence ends, so that there is no state.
    """

    BIDIRECTIONAL: ClassVar[bool] = True
    segment_len: int = 64
    num_memory_tokens: int | None = None
    pack_last_segment: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.segment_len < 1:
            raise ValueError(f"segment_len must be at least 1, got {self.segment_len}")
        if self.num_memory_tokens is not None and (
            self.num_memory_tokens < 1 or self.segment_len % self.num_memory_tokens
        ):
            raise ValueError(
                f"num_memory_tokens must divide segment_len ({self.segment_len}), got {self.num_memory_tokens}"
            )

    @property
    def _context(self) -> int:
        return self.segment_len if self.num_memory_tokens is None else self.num_memory_tokens

    def setup(self):
        """See `TitansHybrid`."""
        super().setup()
        self.attention_norm, self.memory_norm = self._make_gate_norms()

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        batch, time, _ = x.shape
        if state is not None and self.pack_last_segment:
            raise ValueError("pack_last_segment has no state: positions depend on where the sequence ends")
        weights, _ = self.memory.memory()
        now = self.init_state(batch, time) if state is None else state
        memory = self.memory.begin(now.length, now.memory)
        read = jax.tree.map(
            lambda new, old: where_rows(now.length == 0, jnp.broadcast_to(new, old.shape), old), weights, now.read
        )
        now = now._replace(memory=memory, read=read)
        prefix = None
        if self.num_persistent_tokens:
            positions = jnp.arange(self.num_persistent_tokens, dtype=jnp.int32)[None]
            _, key, value = self.attention.query_key_value(self.prefix(x.dtype), positions)
            prefix = (key, value)
        if state is not None and time == 1:
            y, now = self._segment(now, x, count, prefix)
            return y, now
        size = min(self.segment_len, time)
        total = jnp.full(batch, time, jnp.int32) if count is None else count
        # Of a segment a call may have the end, or the beginning: `offset` tokens of the first were seen before.
        offset = now.length % self.segment_len
        segments = -(-(time if state is None else time + self.segment_len - 1) // self.segment_len)
        start = jnp.maximum(jnp.arange(segments)[:, None] * self.segment_len - offset, 0)
        stop = jnp.minimum((jnp.arange(segments)[:, None] + 1) * self.segment_len - offset, total)
        counts = jnp.maximum(stop - start, 0)
        place = jnp.minimum(start, time)[..., None] + jnp.arange(size)  # (segments, batch, size)
        padded = jnp.pad(x, ((0, 0), (0, size), (0, 0)))
        pieces = jax.vmap(lambda place: jnp.take_along_axis(padded, place[..., None], axis=1))(place)

        def step(self: TitansMAC, now: MACState, piece: tuple[jax.Array, jax.Array]) -> tuple[MACState, jax.Array]:
            y, now = self._segment(now, *piece, prefix)
            return now, y

        if segments == 1:
            now, y = step(self, now, (pieces[0], counts[0]))
            y = y[None]
        else:
            scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
            now, y = scan(self, now, (pieces, counts))
        # Back to one row of tokens; what a piece does not have is dropped.
        place = jnp.where(jnp.arange(size) < counts[..., None], place, time)
        rows = jnp.arange(batch)[None, :, None]
        out = jnp.zeros((batch, time, self.features), y.dtype).at[rows, place].set(y, mode="drop")
        return out, None if state is None else now

    def _segment(
        self, state: MACState, x: jax.Array, count: jax.Array | None, prefix: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, MACState]:
        """Tokens of one segment, of which the first `count` exist: (batch, time, features) to the same."""
        batch, time, _ = x.shape
        slot = state.length[:, None] % self.segment_len + jnp.arange(time, dtype=jnp.int32)
        live = exists(x, count)
        # The memory of the segments before is asked.
        query, read_past = self.memory.queries(x, state.read_past, count)
        context = self.memory.finish(x, self.memory.recall(query, state.read))
        # Attention over persistent tokens, context and segment.
        group = self.segment_len // self._context
        first = self.num_persistent_tokens
        seen = state.length % self.segment_len + self._number(x, count)
        behind = -(-seen[:, None] // group) if self.pack_last_segment else self._context
        query, key, value = self.attention.query_key_value(x, first + behind + slot)
        _, context_key, context_value = self.attention.query_key_value(context, first + slot // group)
        stored = []
        for past, of_context, of_segment in (
            (state.key, context_key, key), (state.value, context_value, value)
        ):  # fmt: skip
            rows = jnp.arange(batch)[:, None]
            nowhere = past.shape[1]
            place = slot // group if live is None else jnp.where(live, slot // group, nowhere)
            # A mean over the group, token by token: projections and rotations are linear.
            past = past.at[rows, place].add((of_context / group).astype(past.dtype), mode="drop")
            place = self._context + slot if live is None else jnp.where(live, self._context + slot, nowhere)
            stored.append(past.at[rows, place].set(of_segment.astype(past.dtype), mode="drop"))
        y = self._attend(query, stored[0], stored[1], slot, seen, prefix)
        y = y if live is None else jnp.where(live[..., None], y, 0)
        # The memory learns from what attention found, and is read with it.
        query, past = self.memory.queries(y, state.pasts.query, count)
        out, memory, pasts = self.memory.learn(y, query, state.memory, state.pasts, count)
        if not self.causal:
            out = self.memory.recall(query, memory.weights)
        m = self.memory.finish(y, out)
        y = self.attention_norm(y) * nn.sigmoid(self.memory_norm(m))

        length = state.length + self._number(x, count)
        ends = (self._number(x, count) > 0) & (length % self.segment_len == 0)
        border = tuple(where_rows(ends, new, old) for new, old in zip(memory.weights, memory.border, strict=True))
        tokens = jnp.where(ends, 0, memory.tokens)
        read = tuple(where_rows(ends, new, old) for new, old in zip(memory.weights, state.read, strict=True))

        def anew(array: jax.Array) -> jax.Array:
            return where_rows(ends, jnp.zeros_like(array), array)

        return y, MACState(
            length,
            memory._replace(border=border, tokens=tokens),
            read,
            jax.tree.map(anew, pasts._replace(query=past)),
            anew(read_past),
            *(anew(array) for array in stored),
        )

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, slot: jax.Array, seen: jax.Array,
        prefix: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:  # fmt: skip
        batch, context, group = query.shape[0], self._context, self.segment_len // self._context
        index = jnp.arange(context, dtype=jnp.int32)[None]
        if not self.causal:
            # As printed: all of what was read.
            context_places = jnp.where(index * group < seen[:, None], -1, self.segment_len)
        else:
            context_places = jnp.broadcast_to(index if group == 1 else (index + 1) * group, (batch, context))
        segment_places = jnp.arange(key.shape[1] - context, dtype=jnp.int32)[None]
        places = [context_places, jnp.broadcast_to(segment_places, (batch, segment_places.shape[1]))]
        if prefix is not None:
            first = prefix[0].shape[1]
            prefix_key, prefix_value = (
                jnp.broadcast_to(array, (batch, *array.shape[1:])).astype(key.dtype) for array in prefix
            )
            key, value = jnp.concatenate([prefix_key, key], 1), jnp.concatenate([prefix_value, value], 1)
            places.insert(0, jnp.full((batch, first), -1, jnp.int32))
        positions: dict[str, Any] = {"query_positions": slot, "key_positions": jnp.concatenate(places, axis=1)}
        out = cast(jax.Array, attention(query.astype(key.dtype), key, value, causal=True, **positions))
        return self.attention.out(out.reshape(*out.shape[:2], -1).astype(query.dtype))

    @nn.nowrap
    def _number(self, x: jax.Array, count: jax.Array | None) -> jax.Array:
        return jnp.full(x.shape[0], x.shape[1], jnp.int32) if count is None else count

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        memory = self._make_memory(parent=None)
        shape = (batch_size, self._context + self.segment_len, self.heads, self.features // self.heads)
        empty = memory.empty_memory(batch_size)
        return MACState(
            jnp.zeros(batch_size, jnp.int32),
            empty,
            tuple(map(jnp.copy, empty.weights)),
            memory.empty_pasts(batch_size),
            memory.empty_pasts(batch_size).query,
            jnp.zeros(shape, self.state_dtype),
            jnp.zeros(shape, self.state_dtype),
        )

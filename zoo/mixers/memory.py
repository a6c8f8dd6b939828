"""What mixers share whose state is a network that is trained on each token: Titans' and Miras'."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.neural_memory import Weights
from zoo.layers.norms import GatedRMSNorm
from zoo.layers.partitioning import dense, partitioned
from zoo.layers.short_convolution import ShortConvolution
from zoo.mixers.recurrent import RecurrentMixer, check_batch_size, seen_tokens, unit_length

Norm = tuple[jax.Array, jax.Array]


class InitialMemory(nn.Module):
    """The memory that every sequence starts with, one a head: what the outer training learns.

    Fields:
      heads, width: number of heads, channels of each.
      layers: of the memory's network; a single one is a matrix, more have a norm and a residual.
      hidden: width between layers.
    """

    heads: int
    width: int
    layers: int
    hidden: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Weights, Norm | None]:
        """Weights of each layer (heads, out, in), and the norm's scale and bias (heads, width)."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=(0,))
        weights = tuple(
            self.param(f"weights_{layer}", partitioned(init, "heads", None, None), shape, self.param_dtype)
            for layer, shape in enumerate(memory_shapes(self.heads, self.width, self.layers, self.hidden))
        )
        if self.layers == 1:
            return weights, None
        shape = (self.heads, self.width)
        scale = self.param("scale", partitioned(nn.initializers.ones_init(), "heads", None), shape, self.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "heads", None), shape, self.param_dtype)
        return weights, (scale, bias)


def memory_shapes(heads: int, width: int, layers: int, hidden: int) -> list[tuple[int, int, int]]:
    """(heads, out, in) of each layer of a memory from `width` to `width` channels."""
    widths = [width, *[hidden] * (layers - 1), width]
    return [(heads, fan_out, fan_in) for fan_in, fan_out in itertools.pairwise(widths)]


class Pasts(NamedTuple):
    """The pasts of a memory's convolutions, each (batch, kernel_size - 1, features), or None: nothing was seen."""

    query: jax.Array | None
    key: jax.Array | None
    value: jax.Array | None


class MemoryMixerState(NamedTuple):
    """The past of a memory."""

    length: jax.Array  # int32 (batch,), tokens seen; before the first the memory is not yet the parameters'
    memory: Any  # of the kernel
    pasts: Pasts


def where_rows(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows (batch,) of `new` where true, else of `old`, both (batch, ...) of the old one's dtype."""
    return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new.astype(old.dtype), old)


class MemoryMixer(RecurrentMixer):
    """y = out(rms_norm(M_t(q_t)) silu(gate)), M_t a network trained on each token so that it answers k_t with v_t.

    Queries, keys and values pass a short convolution and silu; queries and keys are then normalised to length 1. A
    subclass says how the memory starts (`start`, `empty_memory`) and how it is trained (`write`).

    Fields beside those of `Mixer`:
      heads: their number, each with a memory of features / heads channels.
      memory_depth: layers of a memory; 1 is a matrix, without norm and residual.
      memory_expansion: hidden widths, as a multiple of a head's channels.
      chunk_size: tokens whose gradients are taken at the same weights: part of the model, 1 is the online rule.
      rate_max: the largest step of the inner training.
      kernel_size: of the convolutions; 0 is none.
      norm_epsilon: of each head's norm.
    """

    heads: int = 4
    memory_depth: int = 2
    memory_expansion: int = 4
    chunk_size: int = 16
    rate_max: float = 0.1
    kernel_size: int = 4
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self.head_width("features", self.features)  # raises where heads do not divide them
        for name, least in (("memory_depth", 1), ("memory_expansion", 1), ("chunk_size", 1), ("kernel_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.rate_max > 0:
            raise ValueError(f"rate_max must be positive, got {self.rate_max}")

    @property
    def _memory_sizes(self) -> tuple[int, int, int, int]:
        """Heads, channels of each, layers, hidden width."""
        width = self.features // self.heads
        return self.heads, width, self.memory_depth, self.memory_expansion * width

    def setup(self):
        """Projections, their convolutions, gates, and the memory that every sequence starts with."""
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        project = partial(dense, use_bias=False, kernel_init=self.kernel_init, **options)
        self.query, self.key, self.value, self.gate = (project(self.features, ("embed", "heads")) for _ in range(4))
        if self.kernel_size:
            convolve = partial(ShortConvolution, self.features, self.kernel_size, **options)
            self.query_convolution, self.key_convolution, self.value_convolution = (convolve() for _ in range(3))
        self.memory = InitialMemory(*self._memory_sizes, param_dtype=self.param_dtype)
        self.norm = GatedRMSNorm(self.norm_epsilon, **options)
        self.out = dense(self.features, ("heads", "embed"), use_bias=False, kernel_init=self.out_init, **options)

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        weights, _norm = self.memory()
        empty = Pasts(None, None, None)
        query, past = self.queries(x, empty.query if state is None else state.pasts.query, count)
        memory = weights if state is None else self.begin(state.length, state.memory)
        out, memory, pasts = self.learn(x, query, memory, empty if state is None else state.pasts, count)
        y = self.finish(x, out)
        if state is None:
            return y, None
        return y, MemoryMixerState(seen_tokens(state.length, x, count), memory, pasts._replace(query=past))

    def begin(self, length: jax.Array, memory: Any) -> Any:
        """A state's memory; where no token was seen, the parameters'."""
        first = self.start(self.memory()[0], length.shape[0])
        return jax.tree.map(lambda new, old: where_rows(length == 0, new, old), first, memory)

    def queries(
        self, x: jax.Array, past: jax.Array | None, count: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the memory is asked: (batch, time, heads, width), and the convolution's next past."""
        query, past = self._convolved("query", x, past, count)
        return unit_length(query), past

    def learn(
        self,
        x: jax.Array,
        query: jax.Array,
        memory: Any,
        pasts: Pasts,
        count: jax.Array | None,
    ) -> tuple[jax.Array, Any, Pasts]:
        """Trains the memory on tokens x and reads it after each.

        Returns:
          What was read, (batch, time, heads, width); the memory after the tokens; and the convolutions' pasts.
        """
        key, key_past = self._convolved("key", x, pasts.key, count)
        value, value_past = self._convolved("value", x, pasts.value, count)
        out, memory = self.write(x, query, unit_length(key), value, memory, count)
        return out, memory, pasts._replace(key=key_past, value=value_past)

    @nn.nowrap
    def start(self, weights: Weights, batch_size: int) -> Any:
        """The kernel's state before the first token, of initial weights (heads, out, in)."""
        raise NotImplementedError

    def write(
        self, x: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array, memory: Any, count: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Trains the memory (initial weights, or a state of the kernel) with gates from the tokens x, and reads it.

        Returns:
          What was read, (batch, time, heads, width), and the kernel's next state.
        """
        raise NotImplementedError

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """From what was read, (batch, time, heads, width), to the output, gated by the tokens x that asked."""
        gated = self.norm(out, self.split_heads(self.gate(x)))
        return self.out(gated.reshape(*x.shape[:2], -1))

    def _convolved(
        self, name: str, x: jax.Array, past: jax.Array | None, count: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        x = getattr(self, name)(x)
        if self.kernel_size:
            x, past = getattr(self, f"{name}_convolution")(x, past, count)
        else:
            x = nn.silu(x)
        return self.split_heads(x), past

    @nn.nowrap
    def empty_memory(self, batch_size: int) -> Any:
        """A memory that `begin` replaces."""
        zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in memory_shapes(*self._memory_sizes))
        return self.start(zeros, batch_size)

    @nn.nowrap
    def empty_pasts(self, batch_size: int) -> Pasts:
        """Convolutions that have seen nothing."""
        return Pasts(*(self.empty_convolution(batch_size, max(self.kernel_size, 1), self.features) for _ in range(3)))

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        return MemoryMixerState(
            jnp.zeros(batch_size, jnp.int32), self.empty_memory(batch_size), self.empty_pasts(batch_size)
        )

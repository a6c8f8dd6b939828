"""A neural memory: a network whose weights are the recurrent state, trained on each token that it reads.

`neural_memory` is Titans' (momentum, any depth; a gate for each head and layer on all platforms, or one for each output
channel in XLA); `retained_memory` has the losses and the retentions of Miras, and a gate for each channel, in XLA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import recurrent
from kernels.common import Implementation, check_heads, check_implementation, computing_dtype, round_up
from kernels.neural_memory import reference
from kernels.neural_memory.bias import attentional_bias, smooth_absolute, smooth_sign
from kernels.neural_memory.chunked import Chunk
from kernels.neural_memory.retained import RetainedState, initial_retained, retained_memory

__all__ = [
    "Gate",
    "MemoryState",
    "RetainedState",
    "Weights",
    "attentional_bias",
    "initial_retained",
    "initial_state",
    "neural_memory",
    "read_memory",
    "retained_memory",
    "smooth_absolute",
    "smooth_sign",
]

Weights = tuple[jax.Array, ...]
Gate = jax.Array | tuple[jax.Array, ...]  # a number a layer, or an array of each layer: a number an output channel
_LEAST_IN_KERNEL = 16


class MemoryState(NamedTuple):
    """The memory after some tokens; arrays of each layer (batch, heads, out, in), float32 or float64."""

    weights: Weights
    momentum: Weights  # empty without momentum
    border: Weights  # the weights after the last full chunk, at which gradients are taken
    tokens: jax.Array  # int32 (batch,): read since that border, 0 .. chunk_size - 1


def initial_state(weights: Weights, batch_size: int, *, momentum: bool = True) -> MemoryState:
    """The memory before the first token: weights (heads, out, in) of each layer, no momentum."""
    first = tuple(jnp.broadcast_to(w.astype(computing_dtype(w.dtype)), (batch_size, *w.shape)) for w in weights)
    zeros = tuple(map(jnp.zeros_like, first)) if momentum else ()
    return MemoryState(first, zeros, first, jnp.zeros(batch_size, jnp.int32))


def neural_memory(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: Gate,
    eta: Gate | None,
    theta: Gate,
    memory: Weights | MemoryState,
    *,
    norm: tuple[jax.Array, jax.Array] | None = None,
    chunk_size: int = 16,
    lengths: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, MemoryState]:
    """Trains a network M on |M(k_t) - v_t|^2, token by token, and reads it after each.

        S_t = eta_t S_{t-1} - theta_t grad_W |M(k_t) - v_t|^2      (sum over channels)
        W_t = (1 - alpha_t) W_{t-1} + S_t,    out_t = M_{W_t}(q_t)

    M(x) = W_L gelu(... gelu(W_1 x)), with `norm` x + LN of it (epsilon 1e-6); gelu in its tanh form. Gradients are
    taken at the weights of the last border, every `chunk_size` tokens: the chunk size is part of the model, 1 the
    online rule (Behrouz et al. 2024, equations 8 to 15). Differentiable, through
    the inner training, in everything but `lengths`; the gradient keeps the weights and momentum at borders, computed
    again. With `norm` and an alpha of 0.02 rounding grows tenfold every hundred tokens or less, in any implementation
    (README of `kernels`).

    Args:
      query, key, value: (batch, time, heads, D), of one dtype. Float64 is computed in float64, all else in float32.
      alpha: (batch, time, heads, layers), float in [0, 1]: what is forgotten of each layer's weights. Or, with a gate
        for each output channel (a row of the weights), a tuple of (batch, time, heads, out) of each layer.
      eta: likewise, what remains of the momentum; None is none, and no momentum in the state.
      theta: likewise, >= 0: the step.
      memory: either initial weights of each layer, (heads, out, in), from D to D; or the state that an earlier call
        returned. With initial weights the sequence starts at a border, and the gradient needs less memory.
      norm: scale and bias (heads, D) of the layer norm; None for no norm and no residual.
      chunk_size: tokens between borders.
      lengths: int (batch,), tokens of each sequence that exist, first ones first; the outputs of others mean nothing.
        None is all of them.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for. The Pallas kernels
        take chunk sizes that are powers of 2 of at least 16; with others None is "chunked" everywhere. On a GPU None
        is "chunked" also where a head's weights and momentum are more than the 4096 numbers that fit the registers (two
        layers of 16 channels, 64 hidden, fit): the kernel runs there if named, but spills. Gates of channels have no
        kernel, and None is "chunked".

    Returns:
      out (batch, time, heads, D) in the inputs' dtype, and the state after the last token.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    _check(query, key, value, alpha, eta, theta, memory, norm, chunk_size, lengths)
    channels = isinstance(theta, tuple)
    implementation = _choose(chunk_size, query.dtype, channels, implementation)
    batch, compute = query.shape[0], computing_dtype(query.dtype)
    gates = {
        name: tuple(x.astype(compute) for x in (gate if isinstance(gate, tuple) else jnp.unstack(gate, axis=3)))
        for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta))
        if gate is not None
    }
    aligned = not isinstance(memory, MemoryState) and lengths is None
    if not isinstance(memory, MemoryState):
        memory = initial_state(memory, batch, momentum=eta is not None)
    weights, momentum, border = (tuple(x.astype(compute) for x in group) for group in memory[:3])
    memory = MemoryState(weights, momentum, border, memory.tokens)
    if norm is not None:
        norm = (norm[0].astype(compute), norm[1].astype(compute))
    if implementation == "reference":  # the definition is differentiated by JAX itself
        gates = gates if channels else jax.tree.map(lambda gate: gate[..., None], gates)
        return _reference(query, key, value, gates, memory, norm, chunk_size, lengths)
    inputs = {"query": query, "key": key, "value": value}
    for name, gate in gates.items():
        inputs |= {f"{name}_{layer}": x for layer, x in enumerate(gate)}
    run = _Run(norm, query.shape[3], chunk_size, channels, implementation)
    return run.aligned(inputs, memory) if aligned else run.anywhere(inputs, memory, lengths)


def read_memory(query: jax.Array, weights: Weights, norm: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """Reads a memory that does not change: M(q_t) for each query, as `neural_memory` reads after its last token.

    Args:
      query: (batch, time, heads, D).
      weights: of each layer (batch, heads, out, in), of a `MemoryState`.
      norm: as of `neural_memory`.

    Returns:
      (batch, time, heads, D) in the query's dtype.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong.
    """
    if query.ndim != 4 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"query must be floating point (batch, time, heads, D), got {query.dtype} {query.shape}")
    _check_weights(weights, (query.shape[0], query.shape[2]), query.shape[3])
    compute = computing_dtype(query.dtype)
    x = y = query.astype(compute)
    for layer, weight in enumerate(weights):
        y = jax.nn.gelu(y, approximate=True) if layer else y
        y = jnp.einsum("bthi,bhoi->btho", y, weight.astype(compute), precision="highest")
    if norm is not None:
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + reference.NORM_EPSILON)
        y = x + y * norm[0] + norm[1]
    return y.astype(query.dtype)


def _choose(
    chunk_size: int, dtype: Any, channels: bool, implementation: Implementation | None
) -> Implementation | None:
    if channels:
        if implementation in ("tpu", "gpu"):
            raise ValueError(
                f"gates of channels have no Pallas kernel ({implementation!r}): what remains between two tokens of a "
                "chunk is then a vector, which the kernels' two-dimensional tiles do not hold; None and 'chunked' run "
                "on every platform"
            )
        return implementation or "chunked"
    if dtype == jnp.float64:
        if implementation in ("tpu", "gpu"):
            raise ValueError(
                f"implementation {implementation!r} computes in float32; float64 has reference and chunked"
            )
        return implementation or "chunked"
    in_kernel = chunk_size >= _LEAST_IN_KERNEL and not chunk_size & (chunk_size - 1)
    if implementation in ("tpu", "gpu") and not in_kernel:
        raise ValueError(
            f"implementation {implementation!r} takes a chunk_size that is a power of 2 and at least "
            f"{_LEAST_IN_KERNEL}, got {chunk_size}"
        )
    return implementation if implementation or in_kernel else "chunked"


def _positions(time: int, memory: MemoryState, chunk_size: int, lengths: jax.Array | None) -> tuple[jax.Array, ...]:
    """(batch, time): whether a token exists, whether a chunk ends with it; (batch,): tokens since a border."""
    lengths = jnp.full(memory.tokens.shape, time, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    index = jnp.arange(time, dtype=jnp.int32)[None]
    live = index < lengths[:, None]
    complete = live & ((memory.tokens[:, None] + index + 1) % chunk_size == 0)
    return live, complete, (memory.tokens + lengths) % chunk_size


def _reference(
    query: jax.Array, key: jax.Array, value: jax.Array, gates: dict[str, Weights], memory: MemoryState, norm: Any,
    chunk_size: int, lengths: jax.Array | None,
) -> tuple[jax.Array, MemoryState]:  # fmt: skip
    live, complete, tokens = _positions(query.shape[1], memory, chunk_size, lengths)
    out, states = reference.forward(
        query, key, value, gates["alpha"], gates.get("eta"), gates["theta"], live, complete, memory.weights,
        memory.momentum, memory.border, norm,
    )  # fmt: skip
    return out, MemoryState(*states, tokens)


class _Run(NamedTuple):
    """The loop over chunks."""

    norm: tuple[jax.Array, jax.Array] | None
    width: int
    chunk_size: int
    channels: bool
    implementation: Implementation | None

    def aligned(self, inputs: recurrent.Inputs, memory: MemoryState) -> tuple[jax.Array, MemoryState]:
        """From a border on. Full chunks first: the weights after them are the border's of what remains."""
        time = inputs["query"].shape[1]
        full = time // self.chunk_size * self.chunk_size
        outs, border = [], memory.weights
        if full:
            out, memory = self._loop({name: x[:, :full] for name, x in inputs.items()}, memory, aligned=True)
            outs, border = [out], memory.weights
        if full < time:
            out, memory = self._loop({name: x[:, full:] for name, x in inputs.items()}, memory, aligned=True)
            outs.append(out)
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs, 1), memory._replace(
            border=border, tokens=jnp.full_like(memory.tokens, time - full)
        )

    def anywhere(
        self, inputs: recurrent.Inputs, memory: MemoryState, lengths: jax.Array | None
    ) -> tuple[jax.Array, MemoryState]:
        """From any token on, each sequence from its own: tokens move to where chunks of the loop end at borders."""
        time = inputs["query"].shape[1]
        live, complete, tokens = _positions(time, memory, self.chunk_size, lengths)
        inputs = inputs | {
            name: x.astype(jnp.float32)[..., None] for name, x in (("live", live), ("complete", complete))
        }
        if time > 1:
            place = jnp.arange(round_up(time + self.chunk_size - 1, self.chunk_size))[None] - memory.tokens[:, None]
            inputs = {name: _take(x, place) for name, x in inputs.items()}
        out, memory = self._loop(inputs, memory, aligned=False)
        if time > 1:
            out = _take(out, jnp.arange(time)[None] + memory.tokens[:, None])
        return out, memory._replace(tokens=tokens)

    def _loop(self, inputs: recurrent.Inputs, memory: MemoryState, *, aligned: bool) -> tuple[jax.Array, MemoryState]:
        layers, heads, batch = len(memory.weights), inputs["query"].shape[2], inputs["query"].shape[0]
        # Parameters that a chunk reads and leaves as they are, beside the state that it changes.
        norm = tuple(jnp.broadcast_to(x[None, :, None], (batch, heads, 1, self.width)) for x in self.norm or ())
        chunk = Chunk(layers, self.width, bool(memory.momentum), bool(norm), aligned, self.channels)
        state = (*memory.weights, *memory.momentum, *norm, *(() if aligned else memory.border))
        out, after = recurrent.run(inputs, state, chunk, self.chunk_size, self.implementation)
        momentum = after[layers : layers + len(memory.momentum)]
        border = memory.border if aligned else after[-layers:]
        return out, MemoryState(after[:layers], momentum, border, memory.tokens)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, T, ...) at times `index` (B, N), zeros where there is no such time."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0, wrap_negative_indices=False))(array, index)


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, alpha: Gate, eta: Gate | None, theta: Gate,
    memory: Weights | MemoryState, norm: tuple[jax.Array, jax.Array] | None, chunk_size: int,
    lengths: jax.Array | None,
) -> None:  # fmt: skip
    check_heads(query, key, value)
    if not query.shape == key.shape == value.shape:
        raise ValueError(f"query, key and value must have one shape, got {query.shape}, {key.shape}, {value.shape}")
    batch, time, heads, width = query.shape
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer and at least 1, got {chunk_size!r}")
    weights = memory.weights if isinstance(memory, MemoryState) else memory
    _check_weights(weights, (batch, heads) if isinstance(memory, MemoryState) else (heads,), width)
    if isinstance(memory, MemoryState):
        if bool(memory.momentum) != (eta is not None):
            raise ValueError("a state has momentum if and only if eta is given")
        for name, group in (("momentum", memory.momentum or weights), ("border", memory.border)):
            for layer, (array, weight) in enumerate(zip(group, weights, strict=True)):
                recurrent.check_array(f"{name} of layer {layer}", array, weight.shape)
        if memory.tokens.shape != (batch,):
            raise ValueError(f"tokens of the state must have shape {(batch,)}, got {memory.tokens.shape}")
    given = {name: gate for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)) if gate is not None}
    if len({isinstance(gate, tuple) for gate in given.values()}) > 1:
        raise TypeError(f"{', '.join(given)} must all be arrays, or all be tuples of an array a layer")
    for name, gate in given.items():
        if not isinstance(gate, tuple):
            recurrent.check_array(name, gate, (batch, time, heads, len(weights)))
            continue
        if len(gate) != len(weights):
            raise ValueError(f"{name} must have an array for each of {len(weights)} layers, got {len(gate)}")
        for layer, (array, weight) in enumerate(zip(gate, weights, strict=True)):
            recurrent.check_array(f"{name} of layer {layer}", array, (batch, time, heads, weight.shape[-2]))
    for name, array in zip(("norm scale", "norm bias"), norm or (), strict=False):
        recurrent.check_array(name, array, (heads, width))
    if lengths is not None and (lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"lengths must be integers ({batch},), got {lengths.dtype} {lengths.shape}")


def _check_weights(weights: Weights, leading: tuple[int, ...], width: int) -> None:
    if not weights:
        raise ValueError("memory must have at least one layer")
    fan_in = width
    for layer, weight in enumerate(weights):
        fan_out = width if layer == len(weights) - 1 else weight.shape[-2]
        recurrent.check_array(f"weights of layer {layer}", weight, (*leading, fan_out, fan_in))
        fan_in = fan_out

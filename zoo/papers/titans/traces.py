"""What a memory did: surprise, gates, read-outs, and the mask of what attention sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.neural_memory import Gate, Weights, initial_state, neural_memory, read_memory
from zoo.mixers.titans import TitansLMM
from zoo.papers.titans.model import TitansConfig


class MemoryInputs(NamedTuple):
    """What the kernel of one layer was given; see `kernels.neural_memory.neural_memory`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    alpha: Gate
    eta: Gate | None
    theta: Gate
    memory: Weights
    norm: tuple[jax.Array, jax.Array] | None


class MemoryTrace(NamedTuple):
    """What happened at each token."""

    surprise: jax.Array  # (batch, time, heads, layers): norm of the gradient by each layer's weights
    loss: jax.Array  # (batch, time, heads): |M(k) - v|^2 at the border's weights
    before: jax.Array  # (batch, time, heads, width): M(q) with the border's weights
    after: jax.Array  # with the weights after the token


def memory_inputs(model: nn.Module, variables: Any, tokens: jax.Array) -> list[MemoryInputs]:
    """Keys, values and gates (the gate traces) of every layer's memory, for a model of kind "lmm", "mag" or "mal".

    Args:
      model: a `Titans`.
      variables: its parameters.
      tokens: int (batch, time).

    Returns:
      One record a layer; times count persistent tokens, which stand first.

    Raises:
      ValueError: the model is of kind "mac", whose memory is called once a segment.
    """
    if model.config.kind == "mac":
        raise ValueError("memory_inputs needs a model whose memory reads a sequence at once: lmm, mag or mal, got mac")
    found: list[MemoryInputs] = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, TitansLMM) and context.method_name == "train":
            *arrays, memory, _ = args
            found.append(MemoryInputs(*arrays, memory, context.module.memory()[1]))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(variables, tokens)
    return found


def trace_memory(inputs: MemoryInputs, chunk_size: int) -> MemoryTrace:
    """Follows one layer's memory chunk by chunk.

    Args:
      inputs: from `memory_inputs`, or made by hand.
      chunk_size: of the model.
    """
    query, key, value = (array.astype(jnp.float32) for array in inputs[:3])
    batch, time = query.shape[:2]
    padded = -time % chunk_size

    def cut(array: jax.Array) -> jax.Array:
        array = jnp.pad(array, ((0, 0), (0, padded), *[(0, 0)] * (array.ndim - 2)))
        return jnp.moveaxis(array.reshape(batch, -1, chunk_size, *array.shape[2:]), 1, 0)

    def loss(weights: Weights, key: jax.Array, value: jax.Array, norm: Any) -> jax.Array:
        """Of one head and token."""
        batched = tuple(weight[None, None] for weight in weights)
        read = read_memory(
            key[None, None, None], batched, None if norm is None else jax.tree.map(lambda x: x[None], norm)
        )
        return jnp.sum((read[0, 0, 0] - value) ** 2)

    of_token = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0, None))
    of_head = jax.vmap(of_token, in_axes=(0, 1, 1, 0), out_axes=1)
    of_batch = jax.vmap(of_head, in_axes=(0, 0, 0, None))

    def chunk(memory, now):
        query, key, value, alpha, eta, theta = now
        before = read_memory(query, memory.weights, inputs.norm)
        losses, gradients = of_batch(memory.weights, key, value, inputs.norm)
        norms = [jnp.sqrt(jnp.sum(gradient**2, axis=(-2, -1))) for gradient in gradients]
        after, memory = neural_memory(
            query, key, value, alpha, eta, theta, memory, norm=inputs.norm, chunk_size=chunk_size
        )
        return memory, MemoryTrace(jnp.stack(norms, axis=-1), losses, before, after)

    gates = jax.tree.map(cut, inputs[3:6])
    memory = initial_state(inputs.memory, batch, momentum=inputs.eta is not None)
    _, trace = jax.lax.scan(chunk, memory, (cut(query), cut(key), cut(value), *gates))

    def join(array: jax.Array) -> jax.Array:
        array = jnp.moveaxis(array, 0, 1)
        return array.reshape(batch, -1, *array.shape[3:])[:, :time]

    return jax.tree.map(join, trace)


def attention_mask(config: TitansConfig, length: int) -> np.ndarray:
    """What attention of one layer sees, as a matrix of booleans.

    Args:
      config: of kind "mac", "mag" or "mal".
      length: tokens of the sequence; in MAC of a segment, at most segment_len.

    Returns:
      (length, keys): rows are tokens; columns are persistent tokens, in MAC the context that was read, and tokens.

    Raises:
      ValueError: the model has no attention, or the segment is longer than segment_len.
    """
    if config.kind == "lmm":
        raise ValueError("a memory alone has no attention to make a mask of")
    row, column = np.arange(length)[:, None], np.arange(length)[None]
    persistent = np.ones((length, config.num_persistent_tokens), bool)
    causal = column <= row
    if config.kind != "mac":
        return np.concatenate([persistent, causal & (column > row - config.window)], axis=1)
    if length > config.segment_len:
        raise ValueError(f"a segment has at most {config.segment_len} tokens, got {length}")
    context = min(config.num_memory_tokens or config.segment_len, config.segment_len)
    group = config.segment_len // context
    index = np.arange(context)[None]
    if config.causal:
        seen = index <= row if group == 1 else (index + 1) * group <= row
    else:
        seen = np.broadcast_to(index * group < length, (length, context))
    return np.concatenate([persistent, seen, causal], axis=1)

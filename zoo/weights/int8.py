"""Weights of 8 bits: a matrix is kept as integers with a scale for each output feature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

_BLOCK = 2**18  # integers that are multiplied out at a time on a CPU: as floats they stay in its cache


@flax.struct.dataclass
class Int8:
    """values * scale, in place of a float array."""

    values: jax.Array  # int8
    scale: jax.Array  # float32, 1 in all axes but the scales'
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)

    def astype(self, dtype: Any) -> jax.Array:
        """The float array."""
        return (self.values * self.scale).astype(dtype)


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def quantize_int8(variables: Any) -> Any:
    """Variables with every matrix (two axes or more) as `Int8`, at a quarter of float32's memory.

    A program that computes with them by `apply` needs no float copy of the network either.

    A kernel has one scale for each output feature, an embedding one for each row: the largest magnitude is 127.
    """

    def quantize(path: tuple, leaf: jax.Array) -> Any:
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        axes = (leaf.ndim - 1,) if getattr(path[-1], "key", None) == "embedding" else tuple(range(leaf.ndim - 1))
        wide = leaf.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / 127
        values = jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
        return Int8(values, scale, leaf.dtype)

    return jax.tree.map_with_path(quantize, nn.meta.unbox(variables))


def dequantize(variables: Any) -> Any:
    """Variables with every `Int8` as a float array again; what is none stays as it is."""
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype) if _is_int8(leaf) else leaf, variables, is_leaf=_is_int8)


def apply(model: nn.Module, variables: Any, *arguments: Any, **options: Any) -> Any:
    """`model.apply(variables, ...)`, of variables that may be `Int8`.

    The matrices of `nn.Dense` and `nn.Embed` are read as integers, a part at a time; those of other modules are
    multiplied out first.
    """
    if not any(map(_is_int8, jax.tree.leaves(variables, is_leaf=_is_int8))):
        return model.apply(variables, *arguments, **options)
    read: set[tuple[str, ...]] = set()

    def note(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, nn.Dense | nn.Embed):
            read.add(context.module.path)
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.apply(dequantize(variables), *arguments, **options))

    def prepare(path: tuple, leaf: Any) -> Any:
        names = tuple(key.key for key in path)
        # A tied head reads the embedding without a call of its module.
        keep = names[0] == "params" and (names[1:-1] in read or names[-1] == "embedding")
        return leaf if keep else dequantize(leaf)

    with nn.intercept_methods(_intercept):
        return model.apply(jax.tree.map_with_path(prepare, variables, is_leaf=_is_int8), *arguments, **options)


def _intercept(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
    module = context.module
    if context.method_name == "__call__" and isinstance(module, nn.Dense):
        kernel: Any = module.get_variable("params", "kernel")
        if _is_int8(kernel):
            (x,) = arguments
            dtype = module.dtype or jnp.promote_types(x.dtype, kernel.dtype)
            y = product(x.astype(dtype), kernel, precision=module.precision, dot_general=module.dot_general)
            return y + module.get_variable("params", "bias").astype(y.dtype) if module.use_bias else y
    if context.method_name == "__call__" and isinstance(module, nn.Embed):
        table: Any = module.get_variable("params", "embedding")
        if _is_int8(table):
            (tokens,) = arguments
            return (table.values[tokens] * table.scale[tokens]).astype(module.dtype or table.dtype)
    return call(*arguments, **options)


def product(
    x: jax.Array, weights: Int8, *, transposed: bool = False, precision: Any = None, dot_general: Callable | None = None
) -> jax.Array:
    """x W, or x W^T for an embedding: (..., inputs) to (..., outputs), without all of W as floats.

    XLA's compiler for CPUs multiplies all matrices of a program out at its beginning, whatever reads them and when, so
    there a loop reads a block of outputs at a time. That for TPUs converts within the product, that for GPUs before it,
    one matrix at a time.

    Args:
      x: floating point; it is the dtype that products are computed in.
      weights: of two axes, (inputs, outputs), or (outputs, inputs) where `transposed`, with a scale for each output.
      precision: as of `jax.lax.dot_general`.
      dot_general: in its place; None is that.
    """
    axis = 0 if transposed else 1
    outputs, inputs = weights.values.shape[axis], weights.values.shape[1 - axis]
    contract = (((x.ndim - 1,), (1 - axis,)), ((), ()))

    def multiply(part: jax.Array) -> jax.Array:
        return (dot_general or jax.lax.dot_general)(x, part.astype(x.dtype), contract, precision=precision)

    def blockwise(values: jax.Array) -> jax.Array:
        # At least two blocks, where there is something to cut: XLA takes a loop of one for no loop.
        size = min(-(-outputs // 2), max(1, _BLOCK // inputs))

        def fill(block: jax.Array, y: jax.Array) -> jax.Array:
            start = jnp.minimum(block * size, outputs - size)  # the last overlaps the one before
            part = jax.lax.dynamic_slice_in_dim(values, start, size, axis)
            return jax.lax.dynamic_update_slice_in_dim(y, multiply(part), start, y.ndim - 1)

        shape = jax.eval_shape(multiply, values)
        return jax.lax.fori_loop(0, -(-outputs // size), fill, jnp.zeros(shape.shape, shape.dtype))

    y = jax.lax.platform_dependent(weights.values, cpu=blockwise, default=multiply)
    return (y * weights.scale.reshape(-1)).astype(y.dtype)

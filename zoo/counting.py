"""Multiply-adds of a function, counted in what JAX traces of it: products of matrices and convolutions.

    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    multiply_adds(model.apply, shapes, images)                   # of the batch

This is what papers on vision networks call MACs, or FLOPs. A compiler's own count has about two FLOP for each, adds
element-wise work, and follows the form that it gave a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of `function(*arguments)`, of which nothing is computed.

    A matrix product of M x K and K x N counts M K N. A convolution counts a kernel for each output, the places beyond
    an image's edge included, as is usual. Of branches (of a condition, or of a choice by platform) the one that counts
    most stands for all, so that a form made of shifted copies or a kernel of Pallas, which count nothing, gives way to
    the matrix product or convolution that it is another form of. A loop of unknown length counts once,
    and what no result needs counts too.

    Args:
      function: traceable by JAX.
      *arguments: pytrees of arrays or jax.ShapeDtypeStruct.
    """
    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def count(jaxpr: core.Jaxpr) -> int:
    """The same of a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        operands: list[Any] = [variable.aval for variable in equation.invars]
        result: Any = equation.outvars[0].aval if equation.outvars else None
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += result.size * math.prod(operands[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            features = operands[1].shape[params["dimension_numbers"].rhs_spec[0]]
            # Of an image spread out by zeros (a transposed convolution) the zeros do not count.
            total += result.size * (operands[1].size // features) // math.prod(params["lhs_dilation"])
        elif name == "cond":
            total += max(count(branch.jaxpr) for branch in params["branches"])
        elif name != "pallas_call":
            repeats = params["length"] if name == "scan" else _parts(params) if name == "shard_map" else 1
            for inner in jax.tree.leaves(params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    total += repeats * count(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)
    return total


def _parts(params: dict[str, Any]) -> int:
    """Into how many parts a mesh cuts the work."""
    axes = [axis for spec in params["in_specs"] for axis in spec if axis is not None]
    names = {name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis)}
    return math.prod(params["mesh"].shape[name] for name in names)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.ClosedJaxpr | core.Jaxpr)

"""Multiply-adds of a network, counted in its jaxpr: products of matrices and convolutions, no elementwise work."""

import math

import jax
from jax.extend import core


def count(function, *arguments):
    """Multiply-adds of one call on arrays or shapes; of the branches of a choice of platform, the largest."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [variable.aval for variable in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += equation.outvars[0].aval.size * math.prod(operands[0].shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            total += equation.outvars[0].aval.size * math.prod(operands[1].shape[:3])
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        elif name != "pallas_call":
            repeats = equation.params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    total += repeats * _count(getattr(inner, "jaxpr", inner))
    return total


def _is_jaxpr(x):
    return isinstance(x, core.ClosedJaxpr | core.Jaxpr)

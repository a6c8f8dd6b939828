"""The mathematics of one chunk, on matrices of at most two axes: what XLA, Mosaic and Triton can all compile.

Time runs down the rows of a matrix (time, width); a number a token is a row (1, time). The number of tokens is a power
of 2. No slices, no reshapes and no gathers: parts of a matrix are named by masks, moved by products.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.common import computing_dtype

_STRONGEST_DECAY = -120.0  # exp(-120) is 0 in float32; stands for any log decay below it, -inf included


class Arithmetic(NamedTuple):
    """How a platform multiplies matrices. Sums are float32, of float64 factors float64."""

    dtype: Any  # of the factors
    precision: Any = jax.lax.Precision.DEFAULT  # of float32 factors
    fine: bool = False  # narrow factors in two parts each, three products: 16 bits of a factor count


FLOAT32 = Arithmetic(jnp.float32, jax.lax.Precision.HIGHEST)
FLOAT64 = Arithmetic(jnp.float64, jax.lax.Precision.HIGHEST)
BFLOAT16 = Arithmetic(jnp.bfloat16)


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], arithmetic: Arithmetic) -> jax.Array:
    if arithmetic.fine:
        return _fine_product(a, b, axes, arithmetic._replace(fine=False))
    return jax.lax.dot_general(
        a.astype(arithmetic.dtype), b.astype(arithmetic.dtype), (((axes[0],), (axes[1],)), ((), ())),
        precision=arithmetic.precision, preferred_element_type=computing_dtype(arithmetic.dtype),
    )  # fmt: skip


def _halves(x: jax.Array, arithmetic: Arithmetic) -> tuple[jax.Array, jax.Array]:
    high = x.astype(arithmetic.dtype)
    return high, (x - high.astype(jnp.float32)).astype(arithmetic.dtype)


def _fine_product(a: jax.Array, b: jax.Array, axes: tuple[int, int], arithmetic: Arithmetic) -> jax.Array:
    """The product to 16 bits or better, of the narrower factors that the matrix units are made for."""
    if arithmetic.dtype == jnp.float32:
        return _product(a, b, axes, arithmetic)
    (a_high, a_low), (b_high, b_low) = _halves(a, arithmetic), _halves(b, arithmetic)
    out = _product(a_high, b_low, axes, arithmetic) + _product(a_low, b_high, axes, arithmetic)
    return out + _product(a_high, b_high, axes, arithmetic)


def _select(mask: jax.Array, x: jax.Array, axes: tuple[int, int], arithmetic: Arithmetic) -> jax.Array:
    """`_fine_product` where the first factor's numbers are 0 and 1."""
    if arithmetic.dtype == jnp.float32:
        return _product(mask, x, axes, arithmetic)
    high, low = _halves(x, arithmetic)
    return _product(mask, high, axes, arithmetic) + _product(mask, low, axes, arithmetic)


# Below, rules of derivatives call the plain functions: a `custom_vjp` inside them would outlive the differentiation,
# and Triton has no lowering for it.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], arithmetic: Arithmetic) -> jax.Array:
    """The matrix product over axis `axes[0]` of `a` and `axes[1]` of `b`: factors rounded, sums float32.

    Its derivative rounds its factors likewise, so that bfloat16 meets bfloat16 in the matrix units.
    """
    return _product(a, b, axes, arithmetic)


def _product_forward(a: jax.Array, b: jax.Array, axes: tuple[int, int], arithmetic: Arithmetic) -> Any:
    return _product(a, b, axes, arithmetic), (a, b)


def _product_backward(
    axes: tuple[int, int], arithmetic: Arithmetic, factors: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> Any:
    a, b = factors
    a_free, b_free = 1 - axes[0], 1 - axes[1]
    d_a = _product(d_out, b, (1, b_free), arithmetic) if axes[0] == 1 else _product(b, d_out, (b_free, 1), arithmetic)
    d_b = _product(a, d_out, (a_free, 0), arithmetic) if axes[1] == 0 else _product(d_out, a, (0, a_free), arithmetic)
    return d_a, d_b


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def select(mask: jax.Array, x: jax.Array, axis: int, arithmetic: Arithmetic) -> jax.Array:
    """Sums of rows of x: contracts `axis` of a matrix of 0 and 1 with them. Keeps 16 bits of x's mantissa or all."""
    return _select(mask, x, (axis, 0), arithmetic)


def _select_forward(mask: jax.Array, x: jax.Array, axis: int, arithmetic: Arithmetic) -> Any:
    return _select(mask, x, (axis, 0), arithmetic), mask


def _select_backward(axis: int, arithmetic: Arithmetic, mask: jax.Array, d_out: jax.Array) -> Any:
    return jnp.zeros_like(mask), _select(mask, d_out, (1 - axis, 0), arithmetic)


select.defvjp(_select_forward, _select_backward)


@jax.custom_vjp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """a (rows, columns) / b (rows, 1). JAX's own derivative takes a negative power, whose cost Pallas cannot tell."""
    return a / b


def _quotient_forward(a: jax.Array, b: jax.Array) -> Any:
    return a / b, (a / b, b)


def _quotient_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> Any:
    out, b = saved
    return d_out / b, -jnp.sum(d_out * out, axis=1, keepdims=True) / b


quotient.defvjp(_quotient_forward, _quotient_backward)


def places(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) indices of a matrix, int32."""
    return (
        jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0),
        jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1),
    )


def as_column(row: jax.Array) -> jax.Array:
    """(1, time) -> (time, 1)."""
    i, j = places(row.shape[1], row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def bounded(decay: jax.Array | None) -> jax.Array | None:
    """Log decays that can be summed: what is as good as -inf becomes finite."""
    return None if decay is None else jnp.maximum(decay, _STRONGEST_DECAY)


def _halvings(length: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """The binary tree over a chunk, leaves first: its levels part the pairs i > j, each to the node where they part.

    Yields (pairs, upper, half) of shape (length, length): `pairs` is true where row i lies in the second half and
    column j in the first half of one node, `upper` where row i lies in a second half, `half` where both lie in one.
    """
    i, j = places(length, length)
    shift = 0
    while 1 << shift < length:
        upper = ((i >> shift) & 1) == 1
        pairs = ((i >> (shift + 1)) == (j >> (shift + 1))) & upper & (((j >> shift) & 1) == 0)
        yield pairs, upper, (i >> shift) == (j >> shift)
        shift += 1


def decayed_products(query: jax.Array, key: jax.Array, decay: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """(time, time) of sum_c query_ic key_jc exp(sum_{j<t<=i} decay_tc) for i >= j, zero above the diagonal.

    For each node of the binary tree, what parts i from j is cut at the node's middle m: exp(sum_{m<=t<=i}) goes to the
    query and exp(sum_{j<t<m}) to the key. Both exponents are sums of log decays, not differences of such sums: they
    cannot overflow, and lose nothing where a decay is strong.

    Args:
      query, key, decay: (time, width) float32; decay <= 0.
      arithmetic: of the products.
    """
    length = query.shape[0]
    i, j = places(length, length)
    products = jnp.where(i == j, jnp.sum(query * key, axis=1, keepdims=True), 0.0)
    for pairs, upper, half in _halvings(length):
        between = half & ((upper & (j <= i)) | (jnp.logical_not(upper) & (j > i)))
        remains = jnp.exp(select(between.astype(jnp.float32), decay, 1, arithmetic))
        products += jnp.where(pairs, product(query * remains, key * remains, (1, 1), arithmetic), 0.0)
    return products


def decay_between(decay: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """(time, time) of exp(sum_{j<t<=i} decay_t), 1 on and above the diagonal, for a row of log decays (1, time)."""
    i, j = places(decay.shape[1], decay.shape[1])
    # Row j of what is summed holds decay_t for t > j: sums as they stand, not differences of cumulative sums.
    return jnp.exp(select((i >= j).astype(jnp.float32), jnp.where(i > j, as_column(decay), 0.0), 1, arithmetic))


def decay_since_start(decay: jax.Array) -> jax.Array:
    """(time, 1) of exp(sum_{t<=i} decay_t) for a row of log decays."""
    i, j = places(decay.shape[1], decay.shape[1])
    return jnp.exp(jnp.sum(jnp.where(j <= i, decay, 0.0), axis=1, keepdims=True))


def decay_until_end(decay: jax.Array) -> jax.Array:
    """(time, 1) of exp(sum_{t>i} decay_t) for a row of log decays."""
    i, j = places(decay.shape[1], decay.shape[1])
    return jnp.exp(jnp.sum(jnp.where(j > i, decay, 0.0), axis=1, keepdims=True))


def _unit_triangular_inverse(lower: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    i, j = places(*lower.shape)
    inverse = (i == j).astype(jnp.float32)
    for level, (pairs, _, _) in enumerate(_halvings(lower.shape[0])):
        corner = jnp.where(pairs, lower, 0.0)
        if level:
            corner = _fine_product(_fine_product(inverse, corner, (1, 0), arithmetic), inverse, (1, 0), arithmetic)
        inverse -= corner
    return inverse


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_triangular_inverse(lower: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """(1 + lower)^-1 for a strictly lower triangular matrix, by products alone.

    Blocks of twice the size from blocks of the size: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], all nodes
    of a level at once. Block substitution, and as stable: a power series in `lower` would be shorter and overflow.
    """
    return _unit_triangular_inverse(lower, arithmetic)


def _inverse_forward(lower: jax.Array, arithmetic: Arithmetic) -> Any:
    inverse = _unit_triangular_inverse(lower, arithmetic)
    return inverse, inverse


def _inverse_backward(arithmetic: Arithmetic, inverse: jax.Array, d_inverse: jax.Array) -> Any:
    d_lower = _fine_product(inverse, d_inverse, (0, 0), arithmetic)
    return (-_fine_product(d_lower, inverse, (1, 1), arithmetic),)


unit_triangular_inverse.defvjp(_inverse_forward, _inverse_backward)

"""The mathematics of one chunk, on matrices of at most two axes: what XLA, Mosaic and Triton can all compile.

Time runs down the rows of a matrix (time, width); a number a token is a row (1, time). The number of tokens is a power
of 2. No slices, no reshapes and no gathers: parts of a matrix are named by masks, moved by products.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

STRONGEST_DECAY = -120.0  # exp(-120) is 0 in float32; stands for any log decay below it, -inf included


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """The matrix product over axis `axes[0]` of `a` and `axes[1]` of `b`: factors rounded to `dtype`, sums float32.

    Its derivative rounds its factors likewise, so that bfloat16 meets bfloat16 in the matrix units.
    """
    return _contract(a.astype(dtype), b.astype(dtype), axes)


def _product_forward(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any):
    return product(a, b, axes, dtype), (a, b)


def _product_backward(axes: tuple[int, int], dtype: Any, factors: tuple[jax.Array, jax.Array], d_out: jax.Array):
    a, b = factors
    a_free, b_free = 1 - axes[0], 1 - axes[1]
    d_a = product(d_out, b, (1, b_free), dtype) if axes[0] == 1 else product(b, d_out, (b_free, 1), dtype)
    d_b = product(a, d_out, (a_free, 0), dtype) if axes[1] == 0 else product(d_out, a, (0, a_free), dtype)
    return d_a, d_b


product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def select(mask: jax.Array, x: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """Sums of rows of x: contracts `axis` of a matrix of 0 and 1 with them. Keeps 16 bits of x's mantissa or all."""
    mask = mask.astype(dtype)
    if dtype == jnp.float32:
        return _contract(mask, x, (axis, 0))
    high = x.astype(dtype)
    low = (x - high.astype(jnp.float32)).astype(dtype)
    return _contract(mask, high, (axis, 0)) + _contract(mask, low, (axis, 0))


def _select_forward(mask: jax.Array, x: jax.Array, axis: int, dtype: Any):
    return select(mask, x, axis, dtype), mask


def _select_backward(axis: int, dtype: Any, mask: jax.Array, d_out: jax.Array):
    return jnp.zeros_like(mask), select(mask, d_out, 1 - axis, dtype)


select.defvjp(_select_forward, _select_backward)


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


def _halvings(length: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """The binary tree over a chunk, leaves first: its levels part the pairs i > j, each to the node where they part.

    Yields (pairs, upper, half) of shape (length, length): `pairs` is true where row i lies in the second half and
    column j in the first half of one node; `upper` where row i lies in a second half; `half` where both lie in one half.
    """
    i, j = places(length, length)
    shift = 0
    while 1 << shift < length:
        upper = ((i >> shift) & 1) == 1
        pairs = ((i >> (shift + 1)) == (j >> (shift + 1))) & upper & (((j >> shift) & 1) == 0)
        yield pairs, upper, (i >> shift) == (j >> shift)
        shift += 1


def decayed_products(query: jax.Array, key: jax.Array, decay: jax.Array, dtype: Any) -> jax.Array:
    """(time, time) of sum_c query_ic key_jc exp(sum_{j<t<=i} decay_tc) for i >= j, zero above the diagonal.

    For each node of the binary tree, what parts i from j is cut at the node's middle m: exp(sum_{m<=t<=i}) goes to the
    query and exp(sum_{j<t<m}) to the key. Both exponents are sums of log decays, not differences of such sums: they
    cannot overflow, and lose nothing where a decay is strong.

    Args:
      query, key, decay: (time, width) float32; decay <= 0.
      dtype: of the factors of the products.
    """
    length = query.shape[0]
    i, j = places(length, length)
    products = jnp.where(i == j, jnp.sum(query * key, axis=1, keepdims=True), 0.0)
    for pairs, upper, half in _halvings(length):
        between = half & ((upper & (j <= i)) | (jnp.logical_not(upper) & (j > i)))
        remains = jnp.exp(select(between.astype(jnp.float32), decay, 1, dtype))
        products += jnp.where(pairs, product(query * remains, key * remains, (1, 1), dtype), 0.0)
    return products


def decay_between(decay: jax.Array) -> jax.Array:
    """(time, time) of exp(sum_{j<t<=i} decay_t), 1 on and above the diagonal, for a row of log decays (1, time)."""
    i, j = places(decay.shape[1], decay.shape[1])
    # A product of two masks, one weighted: sums as they stand, no differences of cumulative sums.
    after = (i > j).astype(jnp.float32)
    return jnp.exp(_contract(jnp.where(i >= j, decay, 0.0), after, (1, 0)))


def decay_since_start(decay: jax.Array) -> jax.Array:
    """(time, 1) of exp(sum_{t<=i} decay_t) for a row of log decays."""
    i, j = places(decay.shape[1], decay.shape[1])
    return jnp.exp(jnp.sum(jnp.where(j <= i, decay, 0.0), axis=1, keepdims=True))


def decay_until_end(decay: jax.Array) -> jax.Array:
    """(time, 1) of exp(sum_{t>i} decay_t) for a row of log decays."""
    i, j = places(decay.shape[1], decay.shape[1])
    return jnp.exp(jnp.sum(jnp.where(j > i, decay, 0.0), axis=1, keepdims=True))


@jax.custom_vjp
def unit_triangular_inverse(lower: jax.Array) -> jax.Array:
    """(1 + lower)^-1 for a strictly lower triangular matrix, by products alone.

    Blocks of twice the size from blocks of the size: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], all nodes
    of a level at once. Block substitution, and as stable: a power series in `lower` would be shorter and overflow.
    """
    i, j = places(*lower.shape)
    inverse = (i == j).astype(jnp.float32)
    for level, (pairs, _, _) in enumerate(_halvings(lower.shape[0])):
        corner = jnp.where(pairs, lower, 0.0)
        if level:
            corner = _contract(_contract(inverse, corner, (1, 0)), inverse, (1, 0))
        inverse -= corner
    return inverse


def _inverse_forward(lower: jax.Array):
    inverse = unit_triangular_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: jax.Array, d_inverse: jax.Array):
    return (-_contract(_contract(inverse, d_inverse, (0, 0)), inverse, (1, 1)),)


unit_triangular_inverse.defvjp(_inverse_forward, _inverse_backward)

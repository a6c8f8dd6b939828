"""Feed-forward networks that send each token to a few of their blocks: rows sorted by block, and a matrix product in
which each row meets the weight of its own block (the routed FFN of Gui et al. 2023, "SPT", arXiv 2312.10365).

    routing = route(choices, groups=4)              # choices (tokens, active): the blocks of each token
    rows = x[routing.tokens]                        # (tokens * active, features), block after block
    y = combine(grouped_product(rows, weight, routing.sizes), routing, active)

No token is dropped and no block is padded to another's size: the work is that of the rows there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_implementation
from kernels.routed_ffn import chunked, reference


class Routing(NamedTuple):
    """Where the rows of a routed network come from. R is tokens times active blocks."""

    slots: jax.Array  # int32 (R,), the place of each row among the flattened choices; sorted by block
    tokens: jax.Array  # int32 (R,), the token of each row
    blocks: jax.Array  # int32 (R,), its block, ascending
    sizes: jax.Array  # int32 (groups,), rows of each block


def route(choices: jax.Array, groups: int) -> Routing:
    """Sorts the tokens by the blocks they go to.

    Args:
      choices: integers (tokens, active) in 0 .. groups - 1; a token's are different.
      groups: the number of blocks.

    Raises:
      ValueError: choices are not two-dimensional, or more than there are blocks.
    """
    if choices.ndim != 2 or not 1 <= choices.shape[1] <= groups:
        raise ValueError(f"choices must be (tokens, 1 to {groups} blocks), got shape {choices.shape}")
    flat = choices.reshape(-1).astype(jnp.int32)
    slots = jnp.argsort(flat, stable=True).astype(jnp.int32)
    blocks = flat[slots]
    return Routing(slots, slots // choices.shape[1], blocks, jnp.bincount(flat, length=groups).astype(jnp.int32))


def combine(rows: jax.Array, routing: Routing, active: int) -> jax.Array:
    """The sum of each token's `active` rows: (R, features) to (tokens, features)."""
    unsorted = jnp.zeros_like(rows).at[routing.slots].set(rows, unique_indices=True)
    return unsorted.reshape(-1, active, rows.shape[1]).sum(1)


def _ragged(rows: jax.Array, weight: jax.Array, sizes: jax.Array, *, interpret: bool) -> jax.Array:
    del interpret  # XLA's own operation, which on a TPU is a kernel
    return jax.lax.ragged_dot(rows, weight, sizes)


def _tiles(rows: jax.Array, weight: jax.Array, sizes: jax.Array, *, interpret: bool) -> jax.Array:
    # XLA's ragged product multiplies every row with every weight on a GPU.
    del interpret
    return chunked.product(rows, weight, sizes, tile=256)


_PRODUCT: dict[str, Callable[..., Any]] = {
    "reference": reference.product, "chunked": chunked.product, "tpu": _ragged, "gpu": _tiles,
}  # fmt: skip
_WEIGHT_GRADIENT: dict[str, Callable[..., Any]] = {
    "reference": reference.weight_gradient,
    "chunked": chunked.weight_gradient,
    # On a TPU, too, XLA's ragged product is dense where the weight is what is asked for.
    "tpu": lambda *operands, interpret: chunked.weight_gradient(*operands, tile=256),
    "gpu": lambda *operands, interpret: chunked.weight_gradient(*operands, tile=256),
}


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows, weight, sizes, implementation):
    return by_platform(_PRODUCT, implementation, rows, weight, sizes, axes=("..", "...", "."), out_axes="..")


def _forward(rows, weight, sizes, implementation):
    return _product(rows, weight, sizes, implementation), (rows, weight, sizes)


def _backward(implementation, residuals, cotangent):
    rows, weight, sizes = residuals
    d_rows = _product(cotangent.astype(rows.dtype), weight.swapaxes(1, 2), sizes, implementation)
    d_weight = by_platform(
        _WEIGHT_GRADIENT, implementation, rows, cotangent, sizes, axes=("..", "..", "."), out_axes="..."
    )
    return d_rows, d_weight.astype(weight.dtype), None


_product.defvjp(_forward, _backward)
_jitted = jax.jit(_product, static_argnums=3)


def grouped_product(
    rows: jax.Array, weight: jax.Array, sizes: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """Each row times the weight of its group; the groups' rows lie one after the other.

    Args:
      rows: (R, D).
      weight: (groups, D, F), of the rows' dtype.
      sizes: int32 (groups,), rows of each group, R in all.
      implementation: "reference" multiplies with every weight, "chunked" tile by tile with one; "tpu" is XLA's
        `ragged_dot`, "gpu" larger tiles. None is the one for the platform compiled for.

    Returns:
      (R, F) in the rows' dtype, summed in float32.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_implementation(implementation)
    if rows.ndim != 2 or weight.ndim != 3 or rows.shape[1] != weight.shape[1] or 0 in (*rows.shape, *weight.shape):
        raise ValueError(f"rows must be (R, D) and weight (groups, D, F), got shapes {rows.shape} and {weight.shape}")
    if sizes.shape != weight.shape[:1]:
        raise ValueError(f"sizes must be one a group, ({weight.shape[0]},), got shape {sizes.shape}")
    if rows.dtype != weight.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise TypeError(f"rows and weight must share a floating dtype, got {rows.dtype} and {weight.dtype}")
    return _jitted(rows, weight, sizes, implementation)

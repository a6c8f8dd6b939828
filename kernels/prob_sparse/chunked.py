"""The query sparsity measure in XLA operations: a block of queries at a time, so memory is linear.

A block's sampled scores come from whichever is cheaper. Gathering the sampled keys costs U E a query, which gives
L U E = O(L log L) over all; a matrix product with all keys costs L_K E a query, but at the speed of a matrix product.
The choice keeps L_K <= GATHER_COST U where the product is taken, so that both are O(L log L).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.common import round_up

# A sampled score by gathering costs about as much as this many scores of a matrix product (x86 CPU, E = 64).
GATHER_COST = 12
GATHER_BLOCK = 32  # queries whose gathered keys (32 U E floats) stay in the second-level cache
PRODUCT_BLOCK = 128
CACHE_BYTES = 2**20  # a head's keys beyond this come from memory: then one fetch should bring the row of all heads


def measure(query: jax.Array, key: jax.Array, sample_indices: jax.Array) -> jax.Array:
    """See `reference.measure`."""
    batch, queries, heads, width = query.shape
    keys, samples = key.shape[1], sample_indices.shape[1]
    gather = keys > GATHER_COST * samples
    all_heads = gather and keys * width * 4 > CACHE_BYTES
    block = min(GATHER_BLOCK if gather else PRODUCT_BLOCK, queries)
    padding = round_up(queries, block) - queries
    table = jnp.pad(sample_indices, ((0, padding), (0, 0))).reshape(-1, block, samples)

    def sampled_scores(query: jax.Array, key: jax.Array, table: jax.Array) -> jax.Array:
        """(block, U) or, for `all_heads`, (block, U, H)."""
        if not gather:
            return jnp.take_along_axis(
                jnp.matmul(query, key.T, precision="highest"), table, axis=1, mode="promise_in_bounds"
            )
        sampled = key.at[table].get(mode="promise_in_bounds")
        if all_heads:
            return (query[:, None] * sampled).sum(-1)
        return jnp.einsum("le,lue->lu", query, sampled, precision="highest")

    def of_item(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, key = (x.astype(jnp.float32) for x in operands)
        blocks = jnp.pad(query, ((0, padding), *((0, 0),) * (query.ndim - 1))).reshape(-1, block, *query.shape[1:])

        def of_block(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
            scores = sampled_scores(operands[0], key, operands[1])
            return scores.max(1) - scores.sum(1) / keys

        out = jax.lax.map(of_block, (blocks, table))
        return out.reshape(-1, *out.shape[2:])[:queries]

    if all_heads:
        return jax.lax.map(of_item, (query, key)).swapaxes(1, 2)
    head_major = (query.swapaxes(1, 2).reshape(-1, queries, width), key.swapaxes(1, 2).reshape(-1, keys, width))
    return jax.lax.map(of_item, head_major).reshape(batch, heads, queries)


def measure_shared(query: jax.Array, key: jax.Array, sample_indices: jax.Array) -> jax.Array:
    """The measure where one sample (U,) serves all queries: a matrix product and its row maxima and sums."""
    queries, keys = query.shape[1], key.shape[1]
    block = min(PRODUCT_BLOCK, queries)
    padding = round_up(queries, block) - queries
    blocks = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(query.shape[0], -1, block, *query.shape[2:]).swapaxes(0, 1)
    sampled = key.at[:, sample_indices].get(mode="promise_in_bounds")

    def of_block(query: jax.Array) -> jax.Array:
        scores = jnp.einsum("blhe,buhe->bhlu", query, sampled, precision="highest", preferred_element_type=jnp.float32)
        return scores.max(-1) - scores.sum(-1) / keys

    out = jax.lax.map(of_block, blocks)  # (blocks, B, H, block)
    return jnp.moveaxis(out, 0, 2).reshape(*out.shape[1:3], -1)[..., :queries]

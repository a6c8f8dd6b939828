"""Attention over the keys whose product-quantised codes agree most with a query's (Gui et al. 2023, "SPT", arXiv
2312.10365): `encode` gives codes, `lookup` the keys of each query, `sparse_attention` the softmax over those alone.

A vector is cut into M parts; part m's code is the nearest (in L1) of the E codewords of subspace m. A key's score is
the number of its codes that equal the query's. The selection is a constant to differentiation: codebooks learn from
`quantisation_loss`. There are the definition and XLA's form over blocks of queries; no Pallas kernel yet.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from kernels.common import by_platform, check_heads
from kernels.sparse_topl import chunked, reference

Implementation = Literal["reference", "chunked"]
_LOOKUP = {"reference": reference.lookup, "chunked": chunked.lookup}


def _distances(vectors: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    if codebook.ndim != 3 or vectors.shape[-1] != codebook.shape[0] * codebook.shape[2]:
        raise ValueError(
            f"codebook must be (subspaces, codewords, width) with subspaces * width = {vectors.shape[-1]}, "
            f"the vectors' last axis; got shape {codebook.shape}"
        )
    parts = vectors.reshape(*vectors.shape[:-1], codebook.shape[0], codebook.shape[2]).astype(jnp.float32)
    return parts, jnp.abs(parts[..., None, :] - codebook.astype(jnp.float32)).sum(-1)


def encode(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    """Codes int32 (..., M) of vectors (..., M d) for a codebook (M, E, d); of equally near codewords, the first."""
    return jnp.argmin(_distances(vectors, codebook)[1], axis=-1).astype(jnp.int32)


def quantisation_loss(vectors: jax.Array, codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The quantised vectors (..., M d) and mse(z_w, z_q) + mse(z, z_q), z_w weighted by inverse distance; float32.

    Gradients reach vectors and codebook through every term, as in the published code.
    """
    parts, distances = _distances(vectors, codebook)
    codewords = codebook.astype(jnp.float32)
    weights = jax.nn.softmax(-jnp.log(jnp.maximum(distances, 1e-5)), axis=-1)
    weighted = jnp.einsum("...me,med->...md", weights, codewords, precision="highest")
    nearest = codewords[jnp.arange(codebook.shape[0]), jnp.argmin(distances, axis=-1)]
    loss = jnp.mean((weighted - nearest) ** 2) + jnp.mean((parts - nearest) ** 2)
    return nearest.reshape(vectors.shape), loss


def lookup(
    query_codes: jax.Array,
    key_codes: jax.Array,
    *,
    keep: int,
    mode: Literal["exact", "prototype"] = "exact",
    implementation: Implementation = "chunked",
) -> jax.Array:
    """The `keep` keys, none later than the query, with the most codes in common.

    Args:
      query_codes: integers (B, T, H, M); the queries are the last T of the keys' positions.
      key_codes: integers (B, S, G, M), G a divisor of H.
      keep: L, at most S. Published: S // 8.
      mode: "exact" gives ties to the earliest key and -1 to unused slots. "prototype" is the published CUDA kernel:
        four workers, each with the keys of one j mod 4, four coarse scores, and key 0 in unused slots.

    Returns:
      int32 (B, T, H, L), in no promised order.

    Raises:
      ValueError: shapes that do not fit, an unknown mode, a `keep` out of range.
    """
    if query_codes.ndim != 4 or key_codes.ndim != 4 or query_codes.shape[::3] != key_codes.shape[::3]:
        raise ValueError(
            "codes must be (batch, time, heads, subspaces) of one batch and subspaces, "
            f"got shapes {query_codes.shape} and {key_codes.shape}"
        )
    (time, heads, subspaces), (keys, key_heads) = query_codes.shape[1:], key_codes.shape[1:3]
    if heads % key_heads or time > keys:
        raise ValueError(f"got {time} queries of {heads} heads, {keys} keys of {key_heads}: keys must be no fewer than "
                         "queries, their heads a divisor")  # fmt: skip
    if not 1 <= keep <= keys:
        raise ValueError(f"keep must be from 1 to the {keys} keys, got {keep}")
    if mode not in ("exact", "prototype"):
        raise ValueError(f"mode must be 'exact' or 'prototype', got {mode!r}")
    if mode == "prototype" and (keep % 4 or keys % 16 or subspaces < 4):
        raise ValueError("mode 'prototype' needs keep a multiple of 4, keys of 16 and at least 4 subspaces; got "
                         f"{keep}, {keys} and {subspaces}")  # fmt: skip
    if implementation not in _LOOKUP:
        raise ValueError(f"implementation must be one of {tuple(_LOOKUP)}, got {implementation!r}")
    functions = {name: partial(f, keep=keep, prototype=mode == "prototype") for name, f in _LOOKUP.items()}
    return by_platform(functions, implementation, query_codes, key_codes, axes=("b.h.", "b.h."), out_axes="b.h.")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(query, key, value, indices, scale, clamp):
    return chunked.attention(query, key, value, indices, scale=scale, clamp=clamp)


def _chunked_forward(query, key, value, indices, scale, clamp):
    return _chunked(query, key, value, indices, scale, clamp), (query, key, value, indices)


def _chunked_backward(scale, clamp, residuals, cotangent):
    return (*chunked.attention_gradient(*residuals, cotangent, scale=scale, clamp=clamp), None)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    *,
    scale: float | None = None,
    clamp: float = 10.0,
    implementation: Implementation = "chunked",
) -> jax.Array:
    """Softmax attention of each query over its own list of keys.

    Args:
      query: (B, T, H, D). key, value: (B, S, G, D) and (B, S, G, E), G a divisor of H.
      indices: integers (B, T, H, L) from `lookup`; -1 is no key, one that stands twice counts twice.
      scale: of the scores; None is D ** -0.5.
      clamp: scores are cut to [-clamp, clamp] (published: 10), their gradient is 0 beyond.

    Returns:
      (B, T, H, E) in the query's dtype; accumulated in float32. A query without keys gets 0.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_heads(query, key, value)
    if key.shape[:3] != value.shape[:3] or query.shape[::3] != key.shape[::3] or query.shape[2] % key.shape[2]:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit together")
    if indices.ndim != 4 or indices.shape[:3] != query.shape[:3]:
        raise ValueError(f"indices must be {query.shape[:3]} and the keys of a query, got shape {indices.shape}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if implementation not in _LOOKUP:
        raise ValueError(f"implementation must be one of {tuple(_LOOKUP)}, got {implementation!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    functions = {
        "reference": partial(reference.attention, scale=scale, clamp=clamp),
        "chunked": lambda *operands: _chunked(*operands, scale, clamp),
    }
    return by_platform(
        functions, implementation, query, key, value, indices, axes=("b.h.",) * 4, out_axes="b.h."
    )  # fmt: skip

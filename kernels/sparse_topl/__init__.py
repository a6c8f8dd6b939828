"""Attention over the keys whose product-quantised codes agree most with a query's (Gui et al. 2023, "SPT", arXiv
2312.10365): `encode` gives codes, `sparse_attention` the softmax over each query's best keys alone. Apart, `lookup`
lists the keys of each query and `listed_attention` attends to lists, for selections of other kinds.

A vector is cut into M parts; part m's code is the nearest (in L1) of the E codewords of subspace m. A key's score is
the number of its codes that equal the query's. The selection is a constant to differentiation: codebooks learn from
`quantisation_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_heads, check_implementation
from kernels.sparse_topl import chunked, gpu, lists, reference, tpu
from kernels.sparse_topl.selection import Options

ListImplementation = Literal["reference", "chunked"]
_VECTORS = 4096  # whose distances to all codewords exist at a time
_LOOKUP = {"reference": reference.lookup, "chunked": lists.lookup}
_FORWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD: dict[str, Callable[..., Any]] = {"chunked": chunked.backward, "tpu": tpu.backward, "gpu": gpu.backward}


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
    codewords = codebook.astype(jnp.float32)

    @jax.checkpoint
    def of_one(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts, distances = _distances(vector, codebook)
        weights = jax.nn.softmax(-jnp.log(jnp.maximum(distances, 1e-5)), axis=-1)
        weighted = jnp.einsum("me,med->md", weights, codewords, precision="highest")
        nearest = codewords[jnp.arange(codebook.shape[0]), jnp.argmin(distances, axis=-1)]
        return nearest, jnp.sum((weighted - nearest) ** 2 + (parts - nearest) ** 2)

    # A vector's distances are E times as large as it is: they are made for some at a time, and again for the gradient.
    nearest, losses = jax.lax.map(of_one, vectors.reshape(-1, vectors.shape[-1]), batch_size=_VECTORS)
    loss = losses.sum() / vectors.size
    return nearest.reshape(vectors.shape), loss


def lookup(
    query_codes: jax.Array,
    key_codes: jax.Array,
    *,
    keep: int,
    mode: Literal["exact", "prototype"] = "exact",
    codebook: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    implementation: ListImplementation = "chunked",
) -> jax.Array:
    """The `keep` keys, none later than the query, with the most codes in common.

    Args:
      query_codes: integers (B, T, H, M).
      key_codes: integers (B, S, G, M), G a divisor of H.
      keep: L, at most S. Published: S // 8.
      mode: "exact" gives ties to the earliest key and -1 to unused slots. "prototype" is the published CUDA kernel:
        four workers, each with the keys of one j mod 4, four coarse scores, and key 0 in unused slots.
      codebook: (M, E, d); where it is given a key's score is the inner product of its codewords with the query's, and
        position 0 and the query's own are always kept. Not published.
      query_positions, key_positions: int32 (B, T) and (B, S); a query sees the keys at its position and before. By
        default 0 to S - 1, the queries the last T of them.
      implementation: "reference" or "chunked", XLA's form for every platform.

    Returns:
      int32 (B, T, H, L), indices of keys in no promised order.

    Raises:
      ValueError: shapes that do not fit, an unknown mode, a `keep` out of range.
    """
    _check_lookup(query_codes, key_codes, keep)
    batch, time = query_codes.shape[:2]
    keys, subspaces = key_codes.shape[1], key_codes.shape[3]
    if mode not in ("exact", "prototype"):
        raise ValueError(f"mode must be 'exact' or 'prototype', got {mode!r}")
    if mode == "prototype" and (keep % 4 or keys % 16 or subspaces < 4):
        raise ValueError("mode 'prototype' needs keep a multiple of 4, keys of 16 and at least 4 subspaces; got "
                         f"{keep}, {keys} and {subspaces}")  # fmt: skip
    if mode == "prototype" and codebook is not None:
        raise ValueError("mode 'prototype' counts codes in common: it takes no codebook")
    if codebook is not None and (codebook.ndim != 3 or codebook.shape[0] != subspaces):
        raise ValueError(f"codebook must be ({subspaces} subspaces, codewords, width), got shape {codebook.shape}")
    if implementation not in _LOOKUP:
        raise ValueError(f"implementation must be one of {tuple(_LOOKUP)}, got {implementation!r}")
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(keys - time, keys, dtype=jnp.int32), (batch, time))
    if key_positions is None:
        key_positions = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
    if query_positions.shape != (batch, time) or key_positions.shape != (batch, keys):
        raise ValueError(f"positions must be {(batch, time)} and {(batch, keys)}, got shapes {query_positions.shape} "
                         f"and {key_positions.shape}")  # fmt: skip
    functions = {name: partial(f, keep=keep, prototype=mode == "prototype") for name, f in _LOOKUP.items()}
    operands = query_codes, key_codes, query_positions, key_positions, codebook
    return by_platform(
        functions, implementation, *operands,
        axes=("b.h.", "b.h.", "b.", "b.", None if codebook is None else "..."), out_axes="b.h.",
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _listed(query, key, value, indices, scale, clamp):
    return lists.attention(query, key, value, indices, scale=scale, clamp=clamp)


def _listed_forward(query, key, value, indices, scale, clamp):
    return _listed(query, key, value, indices, scale, clamp), (query, key, value, indices)


def _listed_backward(scale, clamp, residuals, cotangent):
    return (*lists.attention_gradient(*residuals, cotangent, scale=scale, clamp=clamp), None)


_listed.defvjp(_listed_forward, _listed_backward)


def listed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    *,
    scale: float | None = None,
    clamp: float = 10.0,
    implementation: ListImplementation = "chunked",
) -> jax.Array:
    """Softmax attention of each query over its own list of keys, however it was made.

    Args:
      query: (B, T, H, D). key, value: (B, S, G, D) and (B, S, G, E), G a divisor of H.
      indices: integers (B, T, H, L), of `lookup`, say; -1 is no key, one that stands twice counts twice.
      scale: of the logits; None is D ** -0.5.
      clamp: logits are cut to [-clamp, clamp] (published: 10), their gradient is 0 beyond.
      implementation: "reference" or "chunked", XLA's form for every platform.

    Returns:
      (B, T, H, E) in the query's dtype; accumulated in float32. A query without keys gets 0.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    _check(query, key, value)
    if indices.ndim != 4 or indices.shape[:3] != query.shape[:3]:
        raise ValueError(f"indices must be {query.shape[:3]} and the keys of a query, got shape {indices.shape}")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if implementation not in _LOOKUP:
        raise ValueError(f"implementation must be one of {tuple(_LOOKUP)}, got {implementation!r}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    functions: dict[str, Callable[..., Any]] = {
        "reference": partial(reference.attention, scale=scale, clamp=clamp),
        "chunked": lambda *operands: _listed(*operands, scale, clamp),
    }
    return by_platform(
        functions, implementation, query, key, value, indices, axes=("b.h.",) * 4, out_axes="b.h."
    )  # fmt: skip


_OPERANDS = ("b.h.",) * 5
_OUTPUTS = ("b.h.", "b.h", "b.h")


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_codes: jax.Array,
    key_codes: jax.Array,
    *,
    keep: int,
    codewords: int,
    scale: float | None = None,
    clamp: float = 10.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention of each query over the `keep` keys, none later, that share most codes with it.

    It is `listed_attention` over `lookup(mode="exact")`, without the lists: a query keeps one number, the threshold
    that its last key passes, and keys are masked by it, block by block. The gradient takes the selection as given.

    Args:
      query: (B, T, H, D), the last T of S positions. key, value: (B, S, G, D) and (B, S, G, E), G a divisor of H.
      query_codes, key_codes: integers (B, T, H, M), (B, S, G, M) in 0 .. codewords - 1, from `encode`.
      keep: L, at most S. Published: S // 8.
      codewords: E of the codebook, at most 128.
      scale: of the logits; None is D ** -0.5.
      clamp: logits are cut to [-clamp, clamp] (published: 10), their gradient is 0 beyond.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for. A single query is
        always attended by its list: it is S comparisons.

    Returns:
      (B, T, H, E) in the query's dtype; accumulated in float32.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, `keep` or `codewords` out of range.
    """
    check_implementation(implementation)
    _check(query, key, value)
    _check_lookup(query_codes, key_codes, keep)
    if query_codes.shape[:3] != query.shape[:3] or key_codes.shape[:3] != key.shape[:3]:
        raise ValueError(f"codes {query_codes.shape}, {key_codes.shape} are not those of query {query.shape} and key "
                         f"{key.shape}")  # fmt: skip
    if not 1 <= codewords <= 128:
        raise ValueError(f"codewords must be from 1 to 128, got {codewords}")
    if (query_codes.shape[-1] + 1) * (key.shape[1] + tpu.BLOCK_K) >= 2**24:
        raise ValueError(f"{key.shape[1]} keys of {query_codes.shape[-1]} codes have orders beyond float32's integers")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "reference" or query.shape[1] == 1:
        name: ListImplementation = "reference" if implementation == "reference" else "chunked"
        indices = lookup(query_codes, key_codes, keep=keep, implementation=name)
        return listed_attention(query, key, value, indices, scale=scale, clamp=clamp, implementation=name)
    return _jitted(query, key, value, query_codes, key_codes, Options(keep, codewords, scale, clamp), implementation)


def _run(operands: tuple[jax.Array, ...], options: Options, implementation: Implementation | None) -> Any:
    functions = {name: partial(function, options=options) for name, function in _FORWARD.items()}
    return by_platform(functions, implementation, *operands, axes=_OPERANDS, out_axes=_OUTPUTS)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, query_codes, key_codes, options, implementation):
    return _run((query, key, value, query_codes, key_codes), options, implementation)[0].astype(query.dtype)


def _forward(query, key, value, query_codes, key_codes, options, implementation):
    operands = (query, key, value, query_codes, key_codes)
    out, thresholds, sums = _run(operands, options, implementation)
    # The output is kept as it was summed: rounded to bfloat16 it would leave rows of few keys a wrong gradient.
    return out.astype(query.dtype), (operands, out, thresholds, sums)


def _backward(options, implementation, residuals, d_out):
    operands, out, thresholds, sums = residuals
    delta = jnp.sum(out * d_out.astype(jnp.float32), axis=-1)
    functions = {name: partial(function, options=options) for name, function in _BACKWARD.items()}
    gradients = by_platform(
        functions, implementation, *operands, thresholds, sums, delta, d_out,
        axes=(*_OPERANDS, "b.h", "b.h", "b.h", "b.h."), out_axes=("b.h.",) * 3,
    )  # fmt: skip
    return (*(g.astype(x.dtype) for g, x in zip(gradients, operands[:3], strict=True)), None, None)


_attend.defvjp(_forward, _backward)
_jitted = jax.jit(_attend, static_argnums=(5, 6))


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    check_heads(query, key, value)
    if key.shape[:3] != value.shape[:3] or query.shape[::3] != key.shape[::3] or query.shape[2] % key.shape[2]:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit together")


def _check_lookup(query_codes: jax.Array, key_codes: jax.Array, keep: int) -> None:
    if query_codes.ndim != 4 or key_codes.ndim != 4 or query_codes.shape[::3] != key_codes.shape[::3]:
        raise ValueError(
            "codes must be (batch, time, heads, subspaces) of one batch and subspaces, "
            f"got shapes {query_codes.shape} and {key_codes.shape}"
        )
    (time, heads), (keys, key_heads) = query_codes.shape[1:3], key_codes.shape[1:3]
    if heads % key_heads or time > keys:
        raise ValueError(f"got {time} queries of {heads} heads, {keys} keys of {key_heads}: keys must be no fewer than "
                         "queries, their heads a divisor")  # fmt: skip
    if not 1 <= keep <= keys:
        raise ValueError(f"keep must be from 1 to the {keys} keys, got {keep}")

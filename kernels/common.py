"""What every core shares: choosing an implementation, cutting it over a mesh, dropout that all of them agree on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

Implementation = Literal["reference", "chunked", "tpu", "gpu"]
# Axes of a mesh that cut a core's work, by name (those of `zoo.train`). Along any other each device does all of it.
BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)
NEGATIVE_INFINITY = float(jnp.finfo(jnp.float32).min) * 0.5  # finite, so that differences of two are 0 and not NaN


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that is not an implementation."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be None or one of {get_args(Implementation)}, got {implementation!r}")


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises ValueError or TypeError unless all three are (batch, time, heads, dim) of one float dtype, not empty."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be (batch, time, heads, dim), got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
        if 0 in array.shape:
            raise ValueError(f"{name} has an empty axis: {array.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")


def computing_dtype(dtype: Any) -> Any:
    """What a core computes in for inputs of a dtype: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def by_platform(
    implementations: Mapping[str, Callable[..., Any]],
    implementation: Implementation | None,
    *operands: Any,
    axes: tuple[Any, ...],
    out_axes: Any,
) -> Any:
    """Calls the implementation named, or the one that belongs to the platform being compiled for.

    Args:
      implementations: functions of the same operands and outputs. "tpu" and "gpu" take a keyword `interpret`.
      implementation: a name insists; a Pallas kernel named on a foreign platform is interpreted there. None chooses
        at lowering, never by the host's devices: a program compiled ahead of time for a TPU holds the TPU kernel.
      *operands: pytrees of arrays.
      axes: for each operand the same pytree, an array replaced by a letter an axis: "b" batch, "h" heads, "." another.
        What the functions compute must be independent along b and h, but for outputs without them, which are sums. On
        a mesh each device computes its part of both.
      out_axes: likewise of the outputs.
    """

    def choose(*operands: Any) -> Any:
        if implementation is None:
            return jax.lax.platform_dependent(
                *operands,
                tpu=partial(implementations["tpu"], interpret=False),
                cuda=partial(implementations["gpu"], interpret=False),
                default=implementations["chunked"],
            )
        function = implementations[implementation]
        if implementation in ("reference", "chunked"):
            return function(*operands)
        platform = "tpu" if implementation == "tpu" else "cuda"
        return jax.lax.platform_dependent(
            *operands, **{platform: partial(function, interpret=False)}, default=partial(function, interpret=True)
        )

    return on_each_device(choose, operands, axes, out_axes)


# XLA's partitioner cannot cut a Pallas kernel, nor a loop over heads: it gathers their operands, or gives up. So a core
# is cut here, by shard_map. The mesh is in the operands' types; how XLA will lay them out on it is not known while
# tracing, and is prescribed by the axes' names. `custom_partitioning` would follow XLA's choice whatever the names, but
# libtpu knows it on real chips only, not ahead of time, and its programs' keys in the persistent compilation cache are
# addresses: never found again, or found for another function.


def auto_mesh(*operands: Any) -> AbstractMesh | None:
    """The mesh that the operands (pytrees of arrays) live on, if it has axes along which work is yet to be cut."""
    meshes = [jax.typeof(array).sharding.mesh for array in jax.tree.leaves(operands)]
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        if any(size > 1 for size in auto_axes(mesh).values()):
            return mesh
    return None


def head_shards(*operands: Any) -> int:
    """The number of parts into which a mesh would cut the heads."""
    mesh = auto_mesh(*operands)
    return 1 if mesh is None else math.prod(auto_axes(mesh).get(axis, 1) for axis in HEAD_AXES)


def repeat_for_shards(array: jax.Array, heads: int, shards: int) -> jax.Array:
    """(B, S, G, ...) of key heads; where `shards` parts of `heads` heads outnumber them, each part's own, repeated."""
    key_heads = array.shape[2]
    few = 1 < key_heads < shards and shards % key_heads == 0 and heads % shards == 0
    return jnp.repeat(array, shards // key_heads, axis=2) if few else array


def auto_axes(mesh: AbstractMesh) -> dict[str, int]:
    """Sizes of a mesh's axes along which XLA's partitioner cuts, by name."""
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def on_each_device(function: Callable[..., Any], operands: tuple[Any, ...], axes: Any, out_axes: Any) -> Any:
    """`function(*operands)`, on a mesh every device with its part of the operands; axes as of `by_platform`.

    Outputs have the operands' cut. One without an axis b or h is summed over the devices that cut it (in float32).
    """
    mesh = auto_mesh(operands)
    if mesh is None:
        return function(*operands)
    sizes = auto_axes(mesh)
    lengths: dict[str, list[int]] = {".": [], "b": [], "h": []}
    for array, letters in zip(jax.tree.leaves(operands), jax.tree.leaves(axes), strict=True):
        for length, letter in zip(array.shape, letters, strict=True):
            lengths[letter].append(length)
    cuts: dict[str, tuple[str, ...]] = {".": (), "b": (), "h": ()}
    # An axis that does not divide the heads cuts the batch, if it can: better than the same work on every device.
    for letter, names in (("h", HEAD_AXES), ("b", (*BATCH_AXES, *HEAD_AXES))):
        for name in names:
            parts = math.prod(sizes[cut] for cut in cuts[letter]) * sizes.get(name, 1)
            free = name in sizes and name not in cuts["h"]
            if free and lengths[letter] and all(length % parts == 0 for length in lengths[letter]):
                cuts[letter] += (name,)

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(cuts[letter] or None for letter in letters))

    def local(*operands: Any) -> Any:
        def total(letters: str, part: jax.Array) -> jax.Array:
            summed = tuple(name for letter, names in cuts.items() if letter not in letters for name in names)
            return jax.lax.psum(part.astype(jnp.float32), summed).astype(part.dtype) if summed else part

        return jax.tree.map(total, out_axes, function(*operands))

    return jax.shard_map(
        local, mesh=mesh, in_specs=jax.tree.map(spec, axes), out_specs=jax.tree.map(spec, out_axes),
        axis_names=frozenset(sizes), check_vma=False,
    )(*operands)  # fmt: skip


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def hash_uniform(seed: jax.Array, *coordinates: jax.Array) -> jax.Array:
    """Uniform float32 in [0, 1) as a pure function of integer coordinates: the same in every implementation.

    A counter-based hash (the finaliser of MurmurHash3, once a coordinate) of uint32 words, so that a kernel can make
    any tile of a dropout mask in registers and its backward pass can make it again.

    Args:
      seed: uint32 scalar.
      *coordinates: integer arrays that broadcast together. For attention: the head (batch and head counted as one), the
        query and the key.
    """

    def mix(word: jax.Array) -> jax.Array:
        word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
        word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
        return word ^ (word >> 16)

    word = mix(jnp.asarray(seed, jnp.uint32) + jnp.uint32(0x9E3779B9))
    for coordinate in coordinates:
        word = mix(word ^ (coordinate.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    # 24 bits through int32: TPU and Triton convert signed integers only.
    return (word >> 8).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)

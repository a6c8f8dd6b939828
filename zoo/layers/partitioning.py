"""Logical axis names of parameters, so that one table of rules shards any model (`zoo.train.sharding`).

The names: "embed" (a block's input and output features), "mlp" (a hidden layer's features), "heads" and "kv_heads"
(all heads' features of a projection, flattened), "vocab", and None for what is never sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from kernels.common import BATCH_AXES, auto_axes, auto_mesh


def partitioned(initializer: Callable, *axes: str | None) -> Callable:
    """An initialiser whose parameter carries these logical axis names, one an array axis."""
    return nn.with_logical_partitioning(initializer, axes)


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    *,
    use_bias: bool = True,
    kernel_init: Callable = nn.initializers.lecun_normal(),
    bias_init: Callable = nn.initializers.zeros_init(),
    **options: Any,
) -> nn.Dense:
    """`nn.Dense` with logical axis names (input axis, output axis); other options as of `nn.Dense`."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=partitioned(kernel_init, *axes),
        bias_init=partitioned(bias_init, axes[1]),
        **options,
    )


def keep_batch_cut(x: jax.Array) -> jax.Array:
    """`x` itself, whose first axis, the batch, stays cut along a mesh's batch axes; no effect without a mesh.

    FSDP cuts parameters along the devices that cut the batch. Left alone, XLA may then rather cut features, and gather
    the batch: of a language model's logits, hundreds of GiB.
    """
    mesh = auto_mesh(x)
    if mesh is None:
        return x
    sizes = auto_axes(mesh)
    axes = tuple(axis for axis in BATCH_AXES if axis in sizes)
    if not axes or x.shape[0] % math.prod(sizes[axis] for axis in axes):
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes, *rest)))

"""Logical axis names of parameters, so that one table of rules shards any model (`zoo.train.sharding`).

The names: "embed" (a block's input and output features), "mlp" (a hidden layer's features), "heads" and "kv_heads"
(all heads' features of a projection, flattened), "vocab", and None for what is never sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn


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

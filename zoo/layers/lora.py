"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of any network, without changing it.

    with adapted(LoRA(rank=16)):
        variables = model.init(key, tokens)              # "params" as ever, and a collection "lora" beside it
        logits, _ = model.apply(variables, tokens)

While the context holds, each projection and embedding of the network adds scale * (x A) B^T to its output (of an
embedding: scale * A[x] B^T). A is `left` (inputs, rank), B `right` (outputs, rank), found in the collection "lora"
under the projection's own path. So what is trained and what is frozen are two trees.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from zoo.layers.partitioning import partitioned

COLLECTION = "lora"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """How a network is adapted. Hashable.

    Fields:
      rank: of each product A B^T.
      scale: its factor; LoRA's alpha / rank.
      dropout: of the adapters' inputs, wherever an rng "dropout" is given.
      targets: a regular expression that is found in the paths ("layer_3/mixer/query") of what is adapted; all by
        default.
      left_init: initialiser of A; B is zero at first.
    """

    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    targets: str = ""
    left_init: Callable = nn.initializers.normal(1.0)

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be positive and dropout in [0, 1), got {self.rank} and {self.dropout}")


_ACTIVE: contextvars.ContextVar[LoRA | None] = contextvars.ContextVar("lora", default=None)


@contextlib.contextmanager
def adapted(lora: LoRA) -> Iterator[None]:
    """Adapts the networks that are initialised, applied or traced inside."""
    token = _ACTIVE.set(lora)
    try:
        with nn.intercept_methods(_intercept):
            yield
    finally:
        _ACTIVE.reset(token)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of one projection."""

    left: jax.Array  # (inputs, rank)
    right: jax.Array  # (outputs, rank)
    scale: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """What it adds to the projection of x, (..., inputs) to (..., outputs)."""
        return self.scale * (x @ self.left.astype(x.dtype)) @ self.right.astype(x.dtype).T


def factors(module: nn.Module, inputs: int, outputs: int) -> Factors | None:
    """The adapter of a module that has parameters of its own but is no projection by type; None where none is due.

    Raises:
      ValueError: the variables have no adapter for it.
    """
    lora = _ACTIVE.get()
    path = "/".join(module.path)
    if lora is None or re.search(lora.targets, path) is None:
        return None
    scope = module.scope
    assert scope is not None
    if not module.is_initializing() and not scope.has_variable(COLLECTION, "left"):
        raise ValueError(f"no adapter for {path}: initialise the network within `adapted` to make the collection "
                         f"{COLLECTION!r}")  # fmt: skip

    def variable(name: str, initializer: Callable, size: int) -> jax.Array:
        def make() -> Any:
            key = module.make_rng("params")
            return partitioned(initializer, None, None)(key, (size, lora.rank), module.param_dtype)  # type: ignore

        return scope.variable(COLLECTION, name, make).value

    left = variable("left", lora.left_init, inputs)
    return Factors(left, variable("right", nn.initializers.zeros_init(), outputs), lora.scale)


def dropped(module: nn.Module, x: jax.Array) -> jax.Array:
    """The adapter's input."""
    lora = _ACTIVE.get()
    if lora is None or lora.dropout == 0 or not module.has_rng("dropout"):
        return x
    kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - lora.dropout, x.shape)
    return jnp.where(kept, x / (1 - lora.dropout), 0)


def _intercept(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
    module, out = context.module, call(*arguments, **options)
    if context.method_name != "__call__":
        return out
    if isinstance(module, nn.Dense):
        (x,) = arguments
        found = factors(module, x.shape[-1], module.features)
        return out if found is None else out + found(dropped(module, x).astype(out.dtype))
    if isinstance(module, nn.Embed):
        found = factors(module, module.num_embeddings, module.features)
        if found is None:
            return out
        rows = jnp.take(found.left, arguments[0], axis=0).astype(out.dtype)
        return out + found.scale * rows @ found.right.astype(out.dtype).T
    return out


def merge(variables: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """The variables of the network as it is without adapters, theirs added to its kernels and embeddings.

    Raises:
      ValueError: an adapter belongs to no kernel or embedding, or to a routed network, whose router scales the frozen
        kernels but not the adapters: no single kernel is both.
    """
    params = traverse_util.flatten_dict(dict(variables["params"]))
    adapters = traverse_util.flatten_dict(dict(variables[COLLECTION]))
    for path in {path[:-1] for path in adapters}:
        left, right = adapters[*path, "left"], adapters[*path, "right"]
        name = next((name for name in ("kernel", "embedding") if (*path, name) in params), None)
        if name is None or (*path[:-1], "router", "kernel") in params:
            reason = "it has no kernel" if name is None else "its router scales the kernel alone"
            raise ValueError(f"the adapter of {'/'.join(path)} cannot be merged: {reason}")
        kernel = params[*path, name]
        params[*path, name] = kernel + (lora.scale * left @ right.T).astype(kernel.dtype)
    rest = {name: value for name, value in variables.items() if name not in ("params", COLLECTION)}
    return {"params": traverse_util.unflatten_dict(params), **rest}

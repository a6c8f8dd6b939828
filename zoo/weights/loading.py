"""Variables of a model out of a checkpoint, and files of the zoo's own."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from zoo.files import atomic
from zoo.weights.names import Rule, convert, flatten, unflatten
from zoo.weights.readers import Source, open_tensors

COLLECTIONS = ("params", "batch_stats", "lora")
_SAVED = (Rule("(.+)", "{0}"),)  # our own files hold our own paths


def abstract_variables(model: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of a model's parameters, batch statistics and adapters, without computing anything.

    Args:
      model: a Flax module.
      example_inputs: its keyword arguments: arrays or `jax.ShapeDtypeStruct`s, and static values.

    Returns:
      {"params": ..., "batch_stats": ...} (those there are) of `jax.ShapeDtypeStruct`, still with logical axis names.
    """

    def is_array(value: Any) -> bool:
        return all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))

    arrays = {name: value for name, value in example_inputs.items() if is_array(value)}
    static = {name: value for name, value in example_inputs.items() if name not in arrays}
    variables = jax.eval_shape(lambda key, given: model.init(key, **given, **static), jax.random.key(0), arrays)
    return {name: variables[name] for name in COLLECTIONS if name in variables}


def load(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    rules: Iterable[Rule],
    source: Source,
    *,
    key: str | None = None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """The variables of a model from a published checkpoint, or from a file that `save` wrote.

    Args:
      model, example_inputs: as for `abstract_variables`.
      rules: the map from published names, see `zoo.weights.names`.
      source, key, sha256: see `zoo.weights.readers.read`.

    Returns:
      {"params": ..., "batch_stats": ...} of JAX arrays, with the model's own dtypes.

    Raises:
      NameMapError: names left over on either side or shapes that differ, all listed.
      And what `read` raises.
    """
    published = open_tensors(source, key=key, sha256=sha256)
    ours = all(name.split("/")[0] in COLLECTIONS for name in published)
    target = abstract_variables(model, example_inputs)
    arrays = flatten(convert(published, _SAVED if ours else rules, target))
    del published  # and below each array in turn: no two copies of a checkpoint need be in memory
    return unflatten({path: jnp.asarray(arrays.pop(path)) for path in list(arrays)})


def save(variables: Mapping[str, Any], path: str | pathlib.Path) -> pathlib.Path:
    """Writes variables to a .safetensors file, each under its path ("params/encoder/layer_0/kernel").

    The file appears whole or not at all. Returns its path. Raises ValueError for another suffix.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"variables are saved as .safetensors, got {path.name!r}")
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(variables).items()}
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    with atomic(path) as unfinished:
        save_file(arrays, unfinished, metadata={"format": "zoo"})
    return path

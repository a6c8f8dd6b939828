"""Papers about attention, in JAX: every model by name, every attention-like operator behind one interface.

import jax, zoo

model = zoo.create("informer_etth1_m24")
inputs = zoo.example_inputs("informer_etth1_m24")
variables = model.init(jax.random.key(0), **inputs)
forecast = model.apply(variables, **inputs, rngs={"sample": jax.random.key(1)})
"""

from typing import Any

from zoo.registry import create, example_inputs, list_models, load_weights, paper

__all__ = ["create", "example_inputs", "list_models", "load_weights", "paper", "probe"]


def __getattr__(name: str) -> Any:
    if name == "probe":  # Flax and the networks load when it is asked for: `import zoo` is cheap
        from zoo.probing import probe

        return probe
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")

"""Parameters for tests, without compiling an initialiser."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(model: nn.Module, *arguments, seed: int = 0):
    """Variables for `model.apply`, random everywhere: initial biases and gains would hide mistakes.

    Kernels have a gain of one, vectors a spread of 0.3 around zero, or around one for the scales of norms.
    """
    random = np.random.default_rng(seed)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *arguments))

    def draw(path, leaf):
        spread = 0.3 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        mean = 1.0 if path[-1].key == "scale" else 0.0
        with jax.ensure_compile_time_eval():  # tests keep parameters, and may ask for them first within a trace
            return jnp.asarray(mean + spread * random.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)

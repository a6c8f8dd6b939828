"""One-line proofs that a kernel compiles for the devices it was written for, and is in the program that they get.

compiled = assert_compiles(attention, [shape(8, 1024, 12, 64)] * 3)
assert_holds_kernel(attention, shapes, {"tpu-v5e": "attention_forward", "h100": "attention_gpu_forward"})
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from zoo.compilation import Compiled, compile_for

TARGETS = ("tpu-v5e", "tpu-v6e", "h100")
_PALLAS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def gradient(function: Callable[..., jax.Array], count: int | None = None) -> Callable[..., Any]:
    """Value and gradients of the sum of `function` by its first `count` arguments (all of them by default)."""

    def both(*arguments: Any) -> Any:
        argnums = tuple(range(len(arguments) if count is None else count))
        return jax.value_and_grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32)), argnums)(*arguments)

    return both


def assert_compiles(
    function: Callable[..., Any], shapes: Sequence[Any], targets: Sequence[str] = TARGETS
) -> dict[str, Compiled]:
    """Compiles for every target; a kernel that breaks a rule of the target's compiler raises here."""
    return {target: compile_for(target, function, *shapes) for target in targets}


def assert_holds_kernel(function: Callable[..., Any], shapes: Sequence[Any], kernels: Mapping[str, str]) -> None:
    """The program for each target holds the kernel named for it, and no program another platform's; a CPU's holds none.

    Args:
      function: calls a core with implementation=None.
      shapes: its arguments.
      kernels: the start of the kernel's name for each target.
    """
    programs = {"cpu": jax.jit(function).lower(*shapes).compile().as_text()}
    platforms = {"cpu": "cpu"}
    for target, compiled in assert_compiles(function, shapes, tuple(kernels)).items():
        programs[target], platforms[target] = compiled.executable.as_text(), compiled.target.platform
        names = list(compiled.kernels)
        assert any(name.startswith(kernels[target]) for name in names), f"{target} holds {names}, not {kernels[target]}"
    for target, program in programs.items():
        for platform, call in _PALLAS.items():
            present = f'custom_call_target="{call}"' in program
            assert present == (platform == platforms[target]), f"a {platform} kernel in the program for {target}"

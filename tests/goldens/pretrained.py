"""Real checkpoints, loaded once for all adapters."""

from functools import cache

from zoo.backbones import PretrainedLM, load_smollm2


@cache
def smollm2() -> PretrainedLM:
    """SmolLM2-135M-Instruct in float32."""
    return load_smollm2()

"""Moneta, Yaad and Memora (Behrouz et al. 2025, "It's All Connected"): other losses and retentions of a memory.

No code was published; where the paper is silent, what is done here is said with each mixer.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.neural_memory import initial_retained, retained_memory
from kernels.neural_memory.retained import Retention
from zoo.layers.partitioning import dense
from zoo.mixers.base import register
from zoo.mixers.memory import MemoryMixer


class MirasMixer(MemoryMixer):
    """A memory of two layers with a gate for each channel of a head, made by two projections of low rank (section 5.3).

    What is retained is a sigmoid, that starts near one, and so is the step, times `rate_max`. A head's gate acts on the
    axis of its channels in each matrix: columns of the first, rows of the second.

    Fields beside those of `MemoryMixer`:
      gate_rank: of the gates' projections.
    """

    BIAS: ClassVar[str] = "l2"
    RETENTION: ClassVar[Retention] = "l2"
    gate_rank: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.memory_depth != 2:
            raise ValueError(f"{type(self).__name__} has a memory of two layers, got memory_depth {self.memory_depth}")
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {self.gate_rank}")

    def setup(self):
        """See `MemoryMixer`, and the gates."""
        super().setup()
        project = partial(dense, kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype)
        self.alpha_down = project(self.gate_rank, ("embed", None), use_bias=False)
        self.alpha_up = project(self.features, (None, "heads"), bias_init=nn.initializers.constant(4.0))
        self.eta_down = project(self.gate_rank, ("embed", None), use_bias=False)
        self.eta_up = project(self.features, (None, "heads"))

    @property
    def exponents(self) -> dict[str, float]:
        """p and q of the kernel, where they matter."""
        return {}

    def threshold(self, x: jax.Array) -> jax.Array | None:
        """delta of the kernel, (batch, time, heads), or None."""
        return None

    @nn.nowrap
    def start(self, weights, batch_size):
        """See `MemoryMixer`."""
        options = {name: value for name, value in self.exponents.items() if name == "q"}
        return initial_retained(weights, batch_size, self.RETENTION, **options)

    def write(self, x, query, key, value, memory, count):
        """See `MemoryMixer`."""

        def gate(name: str) -> jax.Array:
            projected: Any = getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(x))
            return self.split_heads(jax.nn.sigmoid(projected.astype(jnp.float32)))

        _, norm = self.memory()
        return retained_memory(
            query, key, value, gate("alpha"), self.rate_max * gate("eta"), memory, norm, bias=self.BIAS,
            retention=self.RETENTION, delta=self.threshold(x), chunk_size=self.chunk_size, lengths=count,
            **self.exponents,
        )  # fmt: skip


@register("moneta")
class Moneta(MirasMixer):
    """The residual's p-norm as loss, and a q-norm as retention: the memory is divided by |A|_q^(q - 2) at borders.

    Fields beside those of `MirasMixer`:
      p, q: real exponents, at least 1 and 2.
    """

    BIAS = "lp"
    RETENTION: ClassVar[Retention] = "lq"
    p: float = 3.0
    q: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        if not (self.p >= 1 and self.q >= 2):
            raise ValueError(f"p must be at least 1 and q at least 2, got {self.p} and {self.q}")

    @property
    def exponents(self):
        """See `MirasMixer`."""
        return {"p": self.p, "q": self.q}


@register("yaad")
class Yaad(MirasMixer):
    """Huber's loss, whose threshold on the residual's length is a softplus of each token, one a head."""

    BIAS = "huber_mix"

    def setup(self):
        """See `MirasMixer`, and the threshold."""
        super().setup()
        self.delta = dense(
            self.heads, ("embed", None), kernel_init=self.kernel_init, dtype=self.dtype, param_dtype=self.param_dtype
        )

    def threshold(self, x):
        """See `MirasMixer`."""
        return jax.nn.softplus(self.delta(x).astype(jnp.float32))


@register("memora")
class Memora(MirasMixer):
    """Squares as loss, and the Kullback-Leibler divergence as retention: weights are a softmax over inputs."""

    RETENTION: ClassVar[Retention] = "kl"

"""What the paper holds its network against: fingerprints, and other encoders of SMILES.

The paper gives no sizes of them; those here are ours. Its contextual attention without convolutions is `MCA` with none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.contextual_attention import contextual_attention
from zoo.errors import unknown
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import partitioned
from zoo.papers.mca_drug.model import MCAConfig, Regressor, check_inputs, linear

Encoder = Literal["cnn", "rnn", "self_attention"]


@dataclasses.dataclass(frozen=True)
class BaselineConfig(MCAConfig):
    """A baseline: the fields of `MCAConfig` that it has, and its own.

    Attributes:
      encoder: "cnn" (stacked convolutions of `kernels` and `filters`, mean of the tokens), "rnn" (a bidirectional GRU
        of `hidden` numbers a direction, both last states) or "self_attention" (additive scores without a context).
      fingerprint_bits: of `FingerprintDNN`.
    """

    encoder: Encoder = "cnn"
    fingerprint_bits: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in get_args(Encoder):
            raise unknown("encoder", self.encoder, get_args(Encoder))
        if self.fingerprint_bits < 1:
            raise ValueError(f"fingerprint_bits must be at least 1, got {self.fingerprint_bits}")


def fingerprint_inputs(config: BaselineConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`fingerprint`, float32 (B, bits) of zeros and ones, and `gep`, float32 (B, G)."""
    rng = np.random.default_rng(0)
    return {
        "fingerprint": rng.integers(0, 2, (batch_size, config.fingerprint_bits)).astype(np.float32),
        "gep": rng.standard_normal((batch_size, config.genes), dtype=np.float32),
    }


class FingerprintDNN(nn.Module):
    """Dense layers on Morgan bits and genes."""

    config: BaselineConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, fingerprint: jax.Array, gep: jax.Array, train: bool = False, noisy: bool | None = None
    ) -> dict[str, jax.Array]:
        """(B, bits) and (B, G) to "ic50" (B, 1). Raises ValueError for other shapes."""
        wanted = (fingerprint.shape[0], self.config.fingerprint_bits)
        if fingerprint.shape != wanted or gep.shape != (wanted[0], self.config.genes):
            raise ValueError(f"expected {wanted} and {(wanted[0], self.config.genes)}, got {fingerprint.shape}, "
                             f"{gep.shape}")  # fmt: skip
        noisy = train if noisy is None else noisy
        x = jnp.concatenate([fingerprint, gep], axis=-1)
        regressor = Regressor(self.config, dtype=self.dtype, param_dtype=self.param_dtype, name="regressor")
        return {"ic50": regressor(x, train, noisy)}


class SmilesBaseline(nn.Module):
    """An encoder of SMILES that sees no genes; genes join before the dense layers."""

    config: BaselineConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, smiles: jax.Array, gep: jax.Array, train: bool = False, noisy: bool | None = None
    ) -> dict[str, jax.Array]:
        """As of `MCA`: "ic50" (B, 1). Padding takes no part."""
        config = self.config
        check_inputs(config, smiles, gep)
        noisy = train if noisy is None else noisy
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(
            config.vocabulary, config.embedding, **options, name="embed",
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
        )(smiles)  # fmt: skip
        valid = smiles != 0
        vector = getattr(self, f"_{config.encoder}")(x, valid, train, noisy, options)
        together = jnp.concatenate([vector, gep.astype(vector.dtype)], axis=-1)
        return {"ic50": Regressor(config, **options, name="regressor")(together, train, noisy)}

    @nn.nowrap
    def _cnn(self, x: jax.Array, valid: jax.Array, train: bool, noisy: bool, options: dict[str, Any]) -> jax.Array:
        for index, (features, size) in enumerate(zip(self.config.filters, self.config.kernels, strict=True)):
            x = nn.Conv(features, (size,), padding=[(size // 2, size // 2)], **options, name=f"convolution_{index}")(x)
            x = BatchNorm(**options, name=f"batch_norm_{index}")(Dropout(self.config.dropout)(nn.relu(x), noisy), train)
        count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
        return jnp.sum(jnp.where(valid[..., None], x, 0), axis=1) / count

    @nn.nowrap
    def _rnn(self, x: jax.Array, valid: jax.Array, train: bool, noisy: bool, options: dict[str, Any]) -> jax.Array:
        # Padded on the left: read from the right, sequences are followed by padding, whose states are not read.
        x = jnp.flip(x, axis=1)
        lengths = valid.sum(axis=1)

        def last(reverse: bool, name: str) -> jax.Array:
            cell = nn.GRUCell(self.config.hidden, **options, name=name)
            carry, _ = nn.RNN(cell, reverse=reverse, keep_order=True, return_carry=True)(x, seq_lengths=lengths)
            return carry

        return jnp.concatenate([last(False, "backward"), last(True, "forward")], axis=-1)

    @nn.nowrap
    def _self_attention(
        self, x: jax.Array, valid: jax.Array, train: bool, noisy: bool, options: dict[str, Any]
    ) -> jax.Array:
        heads, hidden, width = self.config.heads[0], self.config.hidden, x.shape[-1]
        weight = self.param("weight", partitioned(nn.initializers.normal(width**-0.5), "heads", "embed", None),
                            (heads, width, hidden), self.param_dtype)  # fmt: skip
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), "heads", None), (heads, hidden))
        score = self.param("score", partitioned(nn.initializers.normal(hidden**-0.5), "heads", None), (heads, hidden))
        context = jnp.broadcast_to(bias, (x.shape[0], 1, heads, hidden))
        arrays = (array.astype(x.dtype) for array in (weight, context, score))
        pooled, _ = contextual_attention(x, *arrays, valid=valid)
        return linear(
            self.config.hidden, heads * width, ("embed", "mlp"), "project", **options
        )(pooled.reshape(x.shape[0], -1))  # fmt: skip

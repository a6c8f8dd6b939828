"""The definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.common import NEGATIVE_INFINITY
from kernels.contextual_attention.operands import Operands


def forward(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Pooled tokens (batch, heads, width), and logits, float32 (batch, time, heads)."""
    tokens, weight, context, score = (array.astype(jnp.float32) for array in operands[:4])
    hidden = jnp.tanh(jnp.einsum("btw,hwa->btha", tokens, weight) + context)
    valid = operands.valid[:, :, None]
    logits = jnp.where(valid, jnp.einsum("btha,ha->bth", hidden, score), NEGATIVE_INFINITY)
    weights = jnp.where(valid, jax.nn.softmax(logits, axis=1), 0)
    return jnp.einsum("bth,btw->bhw", weights, tokens).astype(operands.tokens.dtype), logits

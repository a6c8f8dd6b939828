"""Attention without softmax as a memory that a rule of learning writes and the query reads.

Read as conditioning (Qiao 2025): the key is the conditional stimulus, the value the unconditional one, the query the
stimulus of a test; each rule is one of 60 years of animal learning, and each is exact in parallel form.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from kernels.common import Implementation
from kernels.delta_rule import delta_rule
from kernels.linear_attention import LinearAttentionState, linear_attention
from zoo.errors import unknown
from zoo.layers.scans import leaky_sum

Rule = Literal["hebb", "hebb_decay", "delta", "gated_delta", "oja", "gated_oja", "bcm", "trace"]
RULES: tuple[Rule, ...] = get_args(Rule)
FORGETTING: tuple[Rule, ...] = ("hebb_decay", "gated_delta", "gated_oja")  # need gamma


class RuleState(NamedTuple):
    """What the past leaves, float32."""

    memory: jax.Array  # (B, H, Dk, Dv), S^T
    average: jax.Array  # (B, H, Dv): the sliding threshold of "bcm", else zeros
    trace: jax.Array  # (B, H, Dk): the eligibility trace of "trace", else zeros


def empty_memory(batch: int, heads: int, key_dim: int, value_dim: int) -> RuleState:
    """The state before anything was learned."""
    return RuleState(
        jnp.zeros((batch, heads, key_dim, value_dim)),
        jnp.zeros((batch, heads, value_dim)),
        jnp.zeros((batch, heads, key_dim)),
    )


def learning_rule(
    rule: Rule,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    gamma: jax.Array | None = None,
    state: RuleState | None = None,
    *,
    trace_decay: float = 0.8,
    threshold_rate: float = 0.2,
    valid: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, RuleState]:
    """y_t = S_t q_t, read after the rule has written (k_t, v_t) into S (Dv x Dk) with step b and retention g.

    | rule | S_t | reading |
    | --- | --- | --- |
    | hebb | S + b v k^T | contiguity: linear attention |
    | hebb_decay | g S + b v k^T | forgetting: RetNet, Mamba-2 |
    | delta | S + b (v - S k) k^T | Rescorla and Wagner's error correction: DeltaNet |
    | gated_delta | the same from g S | with forgetting: Gated DeltaNet |
    | oja | S + b v (k - S^T v)^T | Oja's subspace, bounded weights |
    | gated_oja | the same from g S | |
    | bcm | S + b (v (v - a)) k^T; then a = (1 - r) a + r v^2 | Bienenstock, Cooper and Munro's sliding threshold |
    | trace | e = c e + k; S + b v e^T | eligibility trace: learning across a gap |

    All are linear in S and run on two kernels. "bcm" and "trace" change the value or key by a scan beforehand. "oja" is
    the delta rule of the exchanged pair (v, k), whose corrected keys linear attention then reads.

    Args:
      rule: see the table.
      query, key: (batch, time, heads, Dk), as they come; the paper's have length 1.
      value: (batch, time, heads, Dv).
      beta: b, float (batch, time, heads). "delta" is stable where b |k|^2 <= 2, "oja" where b |v|^2 <= 2.
      gamma: g in (0, 1], float (batch, time, heads); needed by "hebb_decay" and the gated rules, unused by the others.
      state: what an earlier call returned; None is an empty past. Differentiable.
      trace_decay: c.
      threshold_rate: r.
      valid: bool (batch, time), False for tokens that leave the state as it is; None is all True.
      implementation: of the kernels.

    Returns:
      y (batch, time, heads, Dv) in the value's dtype, and the state after the last token.

    Raises:
      ValueError: the rule is unknown, an argument's shape is wrong, or gamma is missing.
    """
    if rule not in RULES:
        raise unknown("learning rule", rule, RULES)
    batch, time, heads, key_dim = query.shape
    if rule not in FORGETTING:
        gamma = None
    elif gamma is None:
        raise ValueError(f"the rule {rule!r} needs gamma (batch, time, heads) = {(batch, time, heads)}")
    state = empty_memory(batch, heads, key_dim, value.shape[3]) if state is None else state
    memory, average, trace = state
    beta = beta.astype(jnp.float32)
    decay = None if gamma is None else jnp.log(gamma.astype(jnp.float32))
    if valid is not None:
        beta = jnp.where(valid[..., None], beta, 0)
        decay = decay if decay is None else jnp.where(valid[..., None], decay, 0)
    options: Any = {"decay": decay, "scale": 1.0, "implementation": implementation}

    if rule in ("delta", "gated_delta"):
        y, memory = delta_rule(query, key, value, beta, state=memory, **options)
        return y, RuleState(memory, average, trace)

    dtype = value.dtype
    if rule in ("oja", "gated_oja"):
        # What the memory makes of the next value, S_t^T v_{t+1}; the first one meets the memory of the past.
        upcoming = jnp.roll(value, -1, axis=1)
        expected, _ = delta_rule(upcoming, value, key, beta, state=memory.swapaxes(2, 3), **options)
        first = jnp.einsum("bhkv,bhv->bhk", memory, value[:, 0].astype(jnp.float32))
        expected = jnp.roll(expected.astype(jnp.float32), 1, axis=1).at[:, 0].set(first)
        if gamma is not None:
            expected = expected * gamma[..., None].astype(jnp.float32)
        key = (key - expected).astype(key.dtype)
    elif rule in ("bcm", "trace"):
        seen = jnp.ones(()) if valid is None else valid[..., None, None].astype(jnp.float32)
        wide = value.astype(jnp.float32)
        if rule == "bcm":
            keep = 1 - threshold_rate * seen
            averages = leaky_sum(threshold_rate * seen * wide**2, keep, average)
            before = jnp.roll(averages, 1, axis=1).at[:, 0].set(average)
            value, average = wide * (wide - before), averages[:, -1]
        else:
            traces = leaky_sum(key.astype(jnp.float32) * seen, 1 - (1 - trace_decay) * seen, trace)
            key, trace = traces.astype(key.dtype), traces[:, -1]
    value = (value * beta[..., None]).astype(dtype)
    past = LinearAttentionState(memory, jnp.zeros(memory.shape[:3]))
    y, (memory, _) = linear_attention(query, key, value, state=past, **options)
    return y, RuleState(memory, average, trace)

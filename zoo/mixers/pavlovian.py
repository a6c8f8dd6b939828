"""Attention whose memory is written by a rule of learning, one or several of them side by side (Qiao 2025)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import unknown
from zoo.layers.norms import norm
from zoo.mixers.base import register
from zoo.mixers.learning_rules import FORGETTING, RULES, Rule, RuleState, empty_memory, learning_rule
from zoo.mixers.recurrent import RecurrentMixer, check_batch_size, exists, unit_length


class PavlovianState(NamedTuple):
    """The past of a batch of sequences."""

    query: jax.Array  # (B, 3, heads * Dk): what the short convolutions still see
    key: jax.Array
    value: jax.Array
    rules: RuleState


@register("pavlovian")
class PavlovianAttention(RecurrentMixer):
    """Queries, keys and values by projection and short convolution; unit queries and keys; a rule; a norm per head.

    beta = sigmoid(W x + b) is the step of learning and, if a rule forgets, gamma = sigmoid(W x + b + 3) the retention,
    one each for a head and token.

    Fields beside those of `Mixer`:
      heads: of equal width features / heads.
      rule: a name of `zoo.mixers.learning_rules.RULES` for all heads, or a tuple with one for each.
      trace_decay, threshold_rate: see `zoo.mixers.learning_rules.learning_rule`.
      norm_epsilon: of the norm of each head's output.
    """

    heads: int = 4
    rule: Rule | tuple[Rule, ...] = "delta"
    trace_decay: float = 0.8
    threshold_rate: float = 0.2
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        self.head_width("features", self.features)
        if isinstance(self.rule, tuple) and len(self.rule) != self.heads:
            raise ValueError(f"rule as a tuple needs one for each of {self.heads} heads, got {len(self.rule)}")
        for rule in self.rules:
            if rule not in RULES:
                raise unknown("learning rule", rule, RULES)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rule of each head."""
        return self.rule if isinstance(self.rule, tuple) else (self.rule,) * self.heads

    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        *_, y, next_state = self.associate(x, state, count)
        return y, None if state is None else next_state

    def stimuli(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, RuleState]:
        """Queries, keys (both of length 1) and values (batch, time, heads, width), and the memory after them."""
        self.check(x, None, None)
        query, key, value, _, state = self.associate(x, None, None)
        return query, key, value, state.rules

    @nn.compact
    def associate(
        self, x: jax.Array, state: PavlovianState | None, count: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, PavlovianState]:
        """Queries, keys and values (batch, time, heads, width), the mixer's output, and the next state."""
        if state is None:
            state = self.init_state(x.shape[0], x.shape[1])

        def convolved(name: str, past: jax.Array) -> tuple[jax.Array, jax.Array]:
            part = self.project(self.features, name)(x)
            part, past = self.convolution(self.features, f"{name}_convolution")(part, past, count)
            return self.split_heads(part), past

        query, query_past = convolved("query", state.query)
        key, key_past = convolved("key", state.key)
        value, value_past = convolved("value", state.value)
        query, key = unit_length(query), unit_length(key)
        beta = nn.sigmoid(self.project(self.heads, "step", None, use_bias=True)(x).astype(jnp.float32))
        gamma = jnp.ones_like(beta)
        if set(self.rules) & set(FORGETTING):
            gamma = nn.sigmoid(self.project(self.heads, "retention", None, use_bias=True)(x).astype(jnp.float32) + 3)

        answers, memories, heads = [], [], []
        for rule in dict.fromkeys(self.rules):
            own = np.array([head for head, other in enumerate(self.rules) if other == rule])
            out, memory = learning_rule(
                rule, query[:, :, own], key[:, :, own], value[:, :, own], beta[:, :, own], gamma[:, :, own],
                jax.tree.map(lambda part, own=own: part[:, own], state.rules), trace_decay=self.trace_decay,
                threshold_rate=self.threshold_rate, valid=exists(x, count),
            )  # fmt: skip
            answers.append(out)
            memories.append(memory)
            heads.append(own)
        order = np.argsort(np.concatenate(heads))
        out = jnp.concatenate(answers, axis=2)[:, :, order]
        rules = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1)[:, order], *memories)
        out_norm = norm(
            "rms", epsilon=self.norm_epsilon, axis=None, dtype=self.dtype, param_dtype=self.param_dtype, name="norm"
        )
        y = self.project_out()(out_norm(out).reshape(*x.shape[:2], -1))
        return query, key, value, y, PavlovianState(query_past, key_past, value_past, rules)

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> PavlovianState:
        """See `Mixer`."""
        check_batch_size(batch_size)
        width = self.features // self.heads
        past = self.empty_convolution(batch_size, 4, self.features)
        return PavlovianState(past, past, past, empty_memory(batch_size, self.heads, width, width))

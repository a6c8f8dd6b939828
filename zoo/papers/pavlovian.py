"""Attention as Pavlovian conditioning: keys are conditional stimuli, values unconditional ones, queries tests.

"Understanding Transformers through the Lens of Pavlovian Conditioning", Mu Qiao, 2025, arXiv 2508.08289; retitled
"Attention as Conditioning: What Classical Learning Theory Predicts About Linear Transformers". No code is published.

What the abstracts state: attention in its linearised form is a Hebbian memory S = sum v k^T that a query probes; a head
of width d_k holds O(sqrt d_k) associations without error and O(d_k) in the mean; depth, width and redundant heads trade
off; better rules of learning are upgrades of attention (DeltaNet is Rescorla and Wagner's error correction, decays are
stimulus traces), so that phenomena of conditioning become predictions of what a network does in context.

What is reconstructed here, since only abstracts and summaries could be read: the derivations behind `capacity_bounds`
and `reliability`, the protocols' schedules, the eight rules as one table (`zoo.mixers.learning_rules`), and the
language model, which is a Llama-like decoder with the mixer "pavlovian".

Known limits of Rescorla and Wagner's rule: it explains neither latent inhibition nor spontaneous recovery; a learned
gate may.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM
from zoo.errors import unknown
from zoo.mixers.learning_rules import RULES, Rule, learning_rule
from zoo.mixers.pavlovian import PavlovianAttention
from zoo.registry import Paper, Variant, register

__all__ = [
    "PHENOMENA",
    "PROTOCOLS",
    "RULES",
    "CapacityBounds",
    "CapacityCurve",
    "PavlovianAttention",
    "Protocol",
    "capacity_bounds",
    "capacity_curve",
    "heads_needed",
    "learning_rule",
    "phenomena",
    "reliability",
    "retrieval_failure",
    "run_protocols",
]

PAPER = Paper(
    slug="pavlovian",
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    authors="Mu Qiao",
    venue="arXiv",
    year=2025,
    arxiv="2508.08289",
    claim="Attention is conditioning: its capacity, its redundancy and better rules follow from theories of learning.",
    fidelity="reconstruction",
    remarks="No code is published and only abstracts could be read: derivations and protocols are reconstructed.",
)


def _config(features: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        features=features, layers=layers, heads=heads, vocab_size=256, mixer="pavlovian",
        mixer_options=FrozenDict(rule="delta"), positions="none", norm="rms", norm_epsilon=1e-6, mlp="swiglu",
        mlp_bias=False, mlp_features=256 * math.ceil(8 * features / 3 / 256), tie_embeddings=True,
    )  # fmt: skip


def example_inputs(config: DecoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Bytes of a sequence of 128."""
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, config.vocab_size, (batch_size, 128), dtype=np.int32)}


register(
    PAPER,
    Variant("pavlovian_lm_tiny", _config(64, 2, 4)),
    Variant("pavlovian_lm_small", _config(256, 6, 8)),
    example_inputs=example_inputs,
)(DecoderLM)


# Conditioning

A, B, X = 0, 1, 2  # the conditional stimuli


class Phase(NamedTuple):
    """Trials in a row: the compounds of conditional stimuli that take turns, and the unconditional one with each."""

    compounds: tuple[tuple[int, ...], ...]
    outcomes: tuple[float, ...]


Protocol = tuple[Phase, ...]
_A_PLUS, _A_MINUS = Phase(((A,),), (1.0,)), Phase(((A,),), (0.0,))
_B_PLUS, _AB_PLUS = Phase(((B,),), (1.0,)), Phase(((A, B),), (1.0,))
PROTOCOLS: Mapping[str, Protocol] = {
    "acquisition": (_A_PLUS,),
    "extinction": (_A_PLUS, _A_MINUS),
    "blocking": (_A_PLUS, _AB_PLUS),
    "overshadowing": (_AB_PLUS,),
    "conditioned_inhibition": (Phase(((A,), (A, X)), (1.0, 0.0)),),
    "overexpectation": (_A_PLUS, _B_PLUS, _AB_PLUS),
    "latent_inhibition": (_A_MINUS, _A_PLUS),
    "reacquisition": (_A_PLUS, _A_MINUS, _A_PLUS),
}


def schedule(protocol: str, trials_per_phase: int) -> tuple[np.ndarray, np.ndarray]:
    """Which stimuli each trial presents, float32 (trials, 3) for A, B and X, and its outcome, float32 (trials,).

    In a phase whose compounds take turns each of them gets `trials_per_phase` trials.

    Raises:
      ValueError: the protocol is unknown, or there is no trial.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if trials_per_phase < 1:
        raise ValueError(f"trials_per_phase must be at least 1, got {trials_per_phase}")
    presented, outcomes = [], []
    for phase in PROTOCOLS[protocol]:
        rows = np.zeros((len(phase.compounds), 3), np.float32)
        for row, compound in zip(rows, phase.compounds, strict=True):
            row[list(compound)] = 1
        presented.append(np.tile(rows, (trials_per_phase, 1)))
        outcomes.append(np.tile(np.array(phase.outcomes, np.float32), trials_per_phase))
    return np.concatenate(presented), np.concatenate(outcomes)


def run_protocols(
    rule: Rule,
    stimuli: jax.Array,
    outcome: jax.Array,
    *,
    beta: float = 0.2,
    gamma: float = 0.98,
    trials_per_phase: int = 20,
    trace_decay: float = 0.8,
    threshold_rate: float = 0.2,
) -> dict[str, jax.Array]:
    """Response u . S k_c to each stimulus c after every trial, by protocol.

    Args:
      rule: of learning.
      stimuli: conditional stimuli A, B and X, float (3, Dk); a compound is the sum of its parts.
      outcome: the unconditional stimulus u, float (Dv,) of length 1; absent in trials without.
      beta: step of learning.
      gamma: retention from trial to trial, of the rules that forget.
      trials_per_phase: of each compound in each phase.
      trace_decay, threshold_rate: see `learning_rule`.

    Returns:
      For each of `PROTOCOLS` float32 (trials, 3).

    Raises:
      ValueError: the rule is unknown or a shape wrong.
    """
    if stimuli.ndim != 2 or stimuli.shape[0] != 3 or outcome.ndim != 1:
        raise ValueError(f"stimuli must be (3, Dk) and outcome (Dv,), got {stimuli.shape} and {outcome.shape}")
    schedules = {protocol: schedule(protocol, trials_per_phase) for protocol in PROTOCOLS}
    longest = max(len(outcomes) for _, outcomes in schedules.values())
    presented = jnp.zeros((len(schedules), longest, 3))
    reinforced = jnp.zeros((len(schedules), longest))
    for index, (compounds, outcomes) in enumerate(schedules.values()):  # what comes after the last trial is not read
        presented = presented.at[index, : len(outcomes)].set(compounds)
        reinforced = reinforced.at[index, : len(outcomes)].set(outcomes)

    def of_all(x: jax.Array) -> jax.Array:
        """The same trials for the tests of all three stimuli: one batch of protocols times tests, one head."""
        return jnp.repeat(x, 3, axis=0)[:, :, None]

    keys, values = of_all(presented @ stimuli), of_all(reinforced[..., None] * outcome)
    tests = jnp.broadcast_to(jnp.tile(stimuli, (len(schedules), 1))[:, None, None], keys.shape)
    y, _ = learning_rule(
        rule, tests, keys, values, jnp.full(keys.shape[:3], beta), jnp.full(keys.shape[:3], gamma),
        trace_decay=trace_decay, threshold_rate=threshold_rate,
    )  # fmt: skip
    responses = (y[:, :, 0] @ outcome).reshape(len(schedules), 3, longest).swapaxes(1, 2)
    return {
        protocol: curve[: len(outcomes)]
        for curve, (protocol, (_, outcomes)) in zip(responses, schedules.items(), strict=True)
    }


# For each phenomenon: the protocols it needs, and what a rule shows that has it.
PHENOMENA: Mapping[str, str] = {
    "acquisition": "response to A after A+",
    "extinction": "share of the response to A that A- takes away",
    "blocking": "1 - response to B after A+, AB+ over that after AB+ alone",
    "overshadowing": "1 - response to A after AB+ over that after A+ alone",
    "conditioned_inhibition": "- response to X",
    "overexpectation": "share of the response to A that AB+ takes away after A+, B+",
    "latent_inhibition": "1 - response to A after A-, A+ over that after A+ alone",
    "savings": "response to A after the first trial of relearning, less that after the first of learning",
}


def phenomena(responses: Mapping[str, np.ndarray], trials_per_phase: int = 20) -> dict[str, float]:
    """One index a phenomenon, as `PHENOMENA` defines them; 0 is its absence.

    Args:
      responses: what `run_protocols` gave (trials, 3) by protocol.
      trials_per_phase: as there.

    Raises:
      ValueError: a protocol is missing.
    """
    missing = PROTOCOLS.keys() - responses.keys()
    if missing:
        raise ValueError(f"responses lack the protocols {', '.join(sorted(missing))}")
    n = trials_per_phase
    learned = float(responses["acquisition"][-1, A])
    together = responses["overshadowing"]
    after = {name: np.asarray(curve) for name, curve in responses.items()}
    return {
        "acquisition": learned,
        "extinction": 1 - float(after["extinction"][-1, A]) / learned,
        "blocking": 1 - float(after["blocking"][-1, B]) / float(together[-1, B]),
        "overshadowing": 1 - float(together[-1, A]) / learned,
        "conditioned_inhibition": -float(after["conditioned_inhibition"][-1, X]),
        "overexpectation": 1 - float(after["overexpectation"][-1, A]) / float(after["overexpectation"][2 * n - 1, A]),
        "latent_inhibition": 1 - float(after["latent_inhibition"][-1, A]) / learned,
        "savings": float(after["reacquisition"][2 * n, A] - after["reacquisition"][2 * n - 1, A])
        - float(after["reacquisition"][0, A]),
    }


# Capacity


class CapacityCurve(NamedTuple):
    """How well a Hebbian memory gives back n stored pairs; float32, one entry for each n."""

    signal_to_noise: jax.Array  # 1 / mean |S k_j - v_j|^2
    cosine: jax.Array  # mean cosine of S k_j and v_j
    accuracy: jax.Array  # share of S k_j that are nearest to their own v_j
    coherence: jax.Array  # largest |k_i . k_j|
    max_interference: jax.Array  # largest |S k_j - v_j|
    aligned_interference: jax.Array  # largest sum_{l != j} |k_l . k_j|: the worst that values can make of the keys


def capacity_curve(keys: jax.Array, values: jax.Array, sizes: Sequence[int]) -> CapacityCurve:
    """Retrieval from S = sum_{j < n} v_j k_j^T for every n of `sizes`.

    Args:
      keys: float (N, Dk); they are scaled to length 1.
      values: float (N, Dv); the same.
      sizes: numbers of stored pairs, 2 to N.

    Raises:
      ValueError: a size is out of range or a shape wrong.
    """
    if keys.ndim != 2 or values.ndim != 2 or len(keys) != len(values):
        raise ValueError(f"keys and values must be (N, Dk) and (N, Dv), got {keys.shape} and {values.shape}")
    if not sizes or min(sizes) < 2 or max(sizes) > len(keys):
        raise ValueError(f"sizes must be in 2 .. {len(keys)}, got {list(sizes)}")
    keys, values = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (keys, values))
    return jax.tree.map(lambda *points: jnp.stack(points), *(_capacity(keys[:n], values[:n]) for n in sizes))


def _capacity(keys: jax.Array, values: jax.Array) -> CapacityCurve:
    overlap = keys @ keys.T
    others = jnp.abs(overlap) * (1 - jnp.eye(len(keys)))
    retrieved = overlap @ values
    noise = jnp.linalg.norm(retrieved - values, axis=1)
    cosine = jnp.sum(retrieved * values, axis=1) / jnp.linalg.norm(retrieved, axis=1)
    nearest = jnp.argmax(retrieved @ values.T, axis=1)
    return CapacityCurve(
        1 / jnp.mean(noise**2),
        jnp.mean(cosine),
        jnp.mean(nearest == jnp.arange(len(keys))),
        jnp.max(others),
        jnp.max(noise),
        jnp.max(jnp.sum(others, axis=1)),
    )


class CapacityBounds(NamedTuple):
    """Numbers of pairs; real."""

    worst_case: float  # interference below epsilon for all pairs, whatever the values: O(epsilon sqrt(Dk / log n))
    mean: float  # mean noise power below epsilon^2: 1 + epsilon^2 Dk
    delta: float  # of the delta rule with repeated presentation: Dk, exactly


def capacity_bounds(key_dim: int, epsilon: float) -> CapacityBounds:
    """How many pairs a memory of random keys holds with interference below `epsilon` (reconstructed).

    The overlap of two of n random unit keys has variance 1 / Dk, and the largest of the n^2 / 2 is about
    mu = sqrt(2 ln(n^2 / 2) / Dk). The worst case solves (n - 1) mu = epsilon.

    Raises:
      ValueError: an argument is not positive.
    """
    if key_dim < 1 or not epsilon > 0:
        raise ValueError(f"key_dim and epsilon must be positive, got {key_dim} and {epsilon}")

    def interference(n: float) -> float:
        return (n - 1) * math.sqrt(2 * max(math.log(n * n / 2), 0.0) / key_dim)

    low, high = math.sqrt(2), 2.0 + epsilon * key_dim  # no interference at sqrt 2, where the estimate begins
    while interference(high) < epsilon:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if interference(middle) < epsilon else (low, middle)
    return CapacityBounds(low, 1 + epsilon**2 * key_dim, float(key_dim))


# Reliability

Redundancy = Literal["single", "any_head", "majority"]


def reliability(layers: int, heads: int, failure: float, mode: Redundancy) -> float:
    """Probability that a chain of `layers` retrievals succeeds, each by `heads` heads that fail independently.

    "single": (1 - p)^L; "any_head": one of H suffices, (1 - p^H)^L; "majority": more than H / 2 must succeed.

    Raises:
      ValueError: an argument is out of range or the mode unknown.
    """
    if layers < 1 or heads < 1 or not 0 <= failure <= 1:
        raise ValueError(f"layers and heads must be positive and failure in [0, 1], got {layers}, {heads}, {failure}")
    if mode == "single":
        return (1 - failure) ** layers
    if mode == "any_head":
        return (1 - failure**heads) ** layers
    if mode == "majority":
        success = sum(
            math.comb(heads, right) * (1 - failure) ** right * failure ** (heads - right)
            for right in range(heads // 2 + 1, heads + 1)
        )
        return success**layers
    raise unknown("mode", mode, get_args(Redundancy))


def heads_needed(layers: int, failure: float, delta: float) -> float:
    """H (real) with (1 - p^H)^L = 1 - delta, about ln(L / delta) / ln(1 / p): heads grow with the log of depth.

    Raises:
      ValueError: a probability is not strictly between 0 and 1, or layers not positive.
    """
    if layers < 1 or not 0 < failure < 1 or not 0 < delta < 1:
        raise ValueError(f"layers must be positive, failure and delta in (0, 1), got {layers}, {failure}, {delta}")
    return math.log(-math.expm1(math.log1p(-delta) / layers)) / math.log(failure)


def retrieval_failure(pairs: int, key_dim: int, threshold: float) -> float:
    """p of one retrieval from n pairs: the chance that the noise along its own value exceeds `threshold`.

    The noise in one direction is a sum of n - 1 overlaps with random values, normal with variance (n - 1) / (Dk Dv)
    for values of Dv dimensions; with one-dimensional values, the worst case used here, (n - 1) / Dk.

    Raises:
      ValueError: an argument is not positive.
    """
    if pairs < 1 or key_dim < 1 or not threshold > 0:
        raise ValueError(f"pairs, key_dim and threshold must be positive, got {pairs}, {key_dim}, {threshold}")
    if pairs == 1:
        return 0.0
    return math.erfc(threshold / math.sqrt(2 * (pairs - 1) / key_dim))


class Conditioning(NamedTuple):
    """A trained layer's tokens as stimuli."""

    test: Any  # queries (B, T, H, Dk)
    conditional: Any  # keys (B, T, H, Dk)
    unconditional: Any  # values (B, T, H, Dv)
    memory: Any  # S after the last token (B, H, Dv, Dk)


def as_conditioning(mixer: PavlovianAttention, variables: Mapping[str, Any], x: jax.Array) -> Conditioning:
    """What a trained layer makes of its input (batch, time, features), in the words of conditioning."""
    stimuli: Any = mixer.apply(variables, x, method=PavlovianAttention.stimuli)
    query, key, value, state = stimuli
    return Conditioning(query, key, value, state.memory.swapaxes(2, 3))

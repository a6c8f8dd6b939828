"""What softmax attention is tested on, for every implementation: cases that hypothesis draws, and the comparison.

@given(attention_cases.cases())
def test_chunked_equals_reference(case):
    attention_cases.assert_equals_reference(case, "chunked")
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from kernels.attention import attention
from kernels.common import Implementation

# Greatest error, as a share of the size of what is compared: (values, gradients).
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `attention`, arrays apart."""

    batch: int = 2
    queries: int = 37
    keys: int = 53
    heads: int = 4
    key_heads: int = 2
    width: int = 16
    value_width: int = 24
    dtype: str = "float32"
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    logit_softcap: float | None = None
    dropout_rate: float = 0.0
    bias: tuple[bool, bool, bool, bool] | None = None  # which of (batch, heads, queries, keys) it has
    sinks: bool = False
    positions: bool = False  # own positions, not in order
    segments: bool = False  # some rows then see no key at all
    prefix: bool = False  # prefix_lengths, with causal only
    lengths: bool = False  # key_lengths, one of them 0: all rows of that batch element are empty
    shared: bool = False  # positions and segment ids have one row for the whole batch


def cases(
    sizes: tuple[tuple[int, int], ...] = ((37, 53), (64, 64), (1, 70), (50, 21)),
    heads: tuple[tuple[int, int], ...] = ((2, 2), (4, 2), (3, 1)),
    widths: tuple[tuple[int, int], ...] = ((16, 16), (8, 24)),
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> st.SearchStrategy[Case]:
    """Cases over all options.

    Args:
      sizes: (queries, keys) to draw from.
      heads: (heads, key_heads).
      widths: (width, value_width).
      dtypes: of query, key and value.
    """

    @st.composite
    def draw_case(draw) -> Case:
        queries, keys = draw(st.sampled_from(sizes))
        head_count, key_heads = draw(st.sampled_from(heads))
        width, value_width = draw(st.sampled_from(widths))
        causal = draw(st.booleans())
        return Case(
            queries=queries,
            keys=keys,
            heads=head_count,
            key_heads=key_heads,
            width=width,
            value_width=value_width,
            dtype=draw(st.sampled_from(dtypes)),
            causal=causal,
            window=draw(st.sampled_from((None, 9, (4, None), (None, 3), (0, 6)))),
            logit_softcap=draw(st.sampled_from((None, 1.5))),
            dropout_rate=draw(st.sampled_from((0.0, 0.3))),
            bias=draw(st.none() | st.tuples(*[st.booleans()] * 4)),
            sinks=draw(st.booleans()),
            positions=draw(st.booleans()),
            segments=draw(st.booleans()),
            prefix=causal and draw(st.booleans()),
            lengths=draw(st.booleans()),
            shared=draw(st.booleans()),
        )

    return draw_case()


def differentiable(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """The arguments that have gradients."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, dtype: str = case.dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = {
        "query": normal(case.batch, case.queries, case.heads, case.width),
        "key": normal(case.batch, case.keys, case.key_heads, case.width),
        "value": normal(case.batch, case.keys, case.key_heads, case.value_width),
    }
    if case.bias is not None:
        full = (case.batch, case.heads, case.queries, case.keys)
        arrays["bias"] = normal(*(size if has else 1 for size, has in zip(full, case.bias, strict=True)))
    if case.sinks:
        arrays["sinks"] = normal(case.heads, dtype="float32")
    return arrays


def integers(case: Case, seed: int = 1) -> dict[str, jax.Array]:
    """The integer arguments and the dropout's key."""
    rng = np.random.default_rng(seed)
    rows = 1 if case.shared else case.batch

    def draw(low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(low, high, shape), jnp.int32)

    arrays = {}
    if case.positions:
        arrays["query_positions"] = draw(0, case.keys, rows, case.queries)
        arrays["key_positions"] = draw(2, case.keys + 2, rows, case.keys)  # position 0 and 1 see nothing if causal
    if case.segments:
        arrays["query_segment_ids"] = jnp.sort(draw(0, 4, rows, case.queries))
        arrays["key_segment_ids"] = jnp.sort(draw(1, 5, rows, case.keys))
    if case.prefix:
        arrays["prefix_lengths"] = draw(0, case.keys, case.batch)
    if case.lengths:
        arrays["key_lengths"] = draw(1, case.keys + 1, case.batch).at[0].set(0)
    if case.dropout_rate:
        arrays["dropout_rng"] = jax.random.key(seed)
    return arrays


def call(
    case: Case, floats: dict[str, jax.Array], others: dict[str, jax.Array], implementation: Implementation | None
) -> tuple[jax.Array, jax.Array]:
    """`attention` of the case: (out, logsumexp)."""
    return attention(
        **floats,
        **others,
        causal=case.causal,
        window=case.window,
        logit_softcap=case.logit_softcap,
        dropout_rate=case.dropout_rate,
        return_logsumexp=True,
        implementation=implementation,
    )


@partial(jax.jit, static_argnums=(0, 3))
def values_and_gradients(
    case: Case, floats: dict[str, jax.Array], others: dict[str, jax.Array], implementation: Implementation | None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Outputs by name, and the gradients of their products with random cotangents (of both outputs)."""

    def loss(floats: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        out, logsumexp = call(case, floats, others, implementation)
        finite = jnp.where(jnp.isneginf(logsumexp), 0, logsumexp)
        rng = np.random.default_rng(2)
        # The same cotangents in bfloat16 and in float32: else their rounding would count as an error.
        weights = jnp.asarray(rng.standard_normal(out.shape), case.dtype).astype(jnp.float32)
        row_weights = rng.standard_normal(logsumexp.shape)
        return jnp.sum(out * weights) + jnp.sum(finite * row_weights), {"out": out, "logsumexp": logsumexp}

    gradients, outputs = jax.grad(loss, has_aux=True)(floats)
    return outputs, gradients


def assert_close(actual: Any, expected: Any, tolerance: float, name: str) -> None:
    """Errors are at most `tolerance` of the root mean square of what is expected; infinities are equal.

    The rounding of the result to its own dtype is not counted: a rare bfloat16 entry of five times the root mean
    square loses 2% of it by being written down.
    """
    half_unit = float(jnp.finfo(actual.dtype).eps) / 2
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    infinite = np.isneginf(expected)
    np.testing.assert_array_equal(np.isneginf(actual), infinite, err_msg=f"{name}: which entries are -inf")
    actual, expected = np.where(infinite, 0, actual), np.where(infinite, 0, expected)
    assert np.isfinite(expected).all(), f"{name}: the reference is not finite"
    size = np.sqrt(np.mean(expected**2))
    error = (np.abs(actual - expected) - half_unit * np.abs(expected)).max()
    assert error <= tolerance * size, f"{name}: error {error:.3g} of {size:.3g}, allowed {tolerance:g} of it"


def assert_equals_reference(case: Case, implementation: Implementation) -> None:
    """Values and gradients of `implementation` are those of the reference in float32, within TOLERANCES."""
    floats, others = differentiable(case), integers(case)
    outputs, gradients = values_and_gradients(case, floats, others, implementation)
    exact = {name: array.astype(jnp.float32) for name, array in floats.items()}
    expected_outputs, expected_gradients = values_and_gradients(case, exact, others, "reference")
    assert outputs["out"].dtype == case.dtype and outputs["logsumexp"].dtype == jnp.float32
    value_tolerance, gradient_tolerance = TOLERANCES[case.dtype]
    for name, expected in expected_outputs.items():
        assert_close(outputs[name], expected, value_tolerance, name)
    for name, expected in expected_gradients.items():
        assert gradients[name].dtype == floats[name].dtype
        assert_close(gradients[name], expected, gradient_tolerance, f"gradient of {name}")

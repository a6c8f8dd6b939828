"""Rows meet the weight of their own block, in every implementation, whatever the blocks' sizes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.routed_ffn import combine, grouped_product, route
from tests.kernels.attention_cases import TOLERANCES
from tests.kernels.compile import shape
from tests.kernels.recurrent_cases import assert_close
from zoo.compilation import compile_for

ROWS = 200


@partial(jax.jit, static_argnums=4)
def _result(rows, weight, cotangent, sizes, implementation):
    def loss(rows, weight):
        out = grouped_product(rows, weight, sizes, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(rows, weight)
    return out, *gradients


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(cuts=st.lists(st.integers(0, ROWS), min_size=3, max_size=3))
@settings(max_examples=5)
def test_every_form_is_the_definition(implementation, dtype, cuts):
    sizes = jnp.diff(jnp.asarray([0, *sorted(cuts), ROWS]))
    rng = np.random.default_rng(sum(cuts))
    rows, weight, cotangent = (
        jnp.asarray(rng.standard_normal(size), dtype) for size in ((ROWS, 8), (4, 8, 6), (ROWS, 6))
    )
    found = _result(rows, weight, cotangent.astype(jnp.float32), sizes, implementation)
    definition = _result(*(x.astype(jnp.float32) for x in (rows, weight, cotangent)), sizes, "reference")
    tolerances = TOLERANCES[jnp.dtype(dtype).name]
    for number, (got, expected) in enumerate(zip(found, definition, strict=True)):
        assert_close(got, expected, tolerances[number > 0], jnp.dtype(dtype).name, f"result {number}")


def test_routing_is_a_sort_and_its_way_back():
    choices = jnp.asarray([[2, 0], [1, 2], [0, 3], [2, 3]])
    routing = route(choices, 4)
    np.testing.assert_array_equal(routing.blocks, [0, 0, 1, 2, 2, 2, 3, 3])
    np.testing.assert_array_equal(routing.sizes, [2, 1, 3, 2])
    np.testing.assert_array_equal(choices.reshape(-1)[routing.slots], routing.blocks)
    x = jnp.arange(4.0)[:, None]
    np.testing.assert_array_equal(combine(x[routing.tokens], routing, 2), 2 * x)


def test_a_tpu_multiplies_with_one_weight_a_row():
    rows, weight, sizes = shape(4096, 256), shape(4, 256, 512), shape(4, dtype=jnp.int32)
    compiled = compile_for("tpu-v5e", grouped_product, rows, weight, sizes)
    assert compiled.executable.cost_analysis()["flops"] < 1.1 * 2 * 4096 * 256 * 512


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="choices must be"):
        route(jnp.zeros((4, 3), jnp.int32), 2)
    with pytest.raises(ValueError, match="sizes must be one a group"):
        grouped_product(jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="rows must be"):
        grouped_product(jnp.zeros((4, 3)), jnp.zeros((2, 4, 5)), jnp.zeros(2, jnp.int32))

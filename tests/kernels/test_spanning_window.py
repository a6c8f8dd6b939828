"""Spanning window attention: implementations against the definition, the definition against the published layout."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import attention
from kernels.spanning_window import spanning_window_attention
from tests.kernels.attention_cases import TOLERANCES, assert_close
from tests.kernels.compile import TARGETS, assert_compiles, assert_holds_kernel, gradient, shape
from zoo.compilation import gpu_resources


def inputs(height, width, heads=2, dim=8, value_dim=12, batch=2, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(batch, height, width, heads, n) for n in (dim, dim, value_dim)] + [(heads, dim), (heads, value_dim)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@partial(jax.jit, static_argnames=("implementation", "window", "patterns"))
def values_and_gradients(query, key, value, pad_key, pad_value, **options):
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(value.shape), jnp.bfloat16).astype(jnp.float32)

    def loss(query, key, value, pad_key, pad_value):
        out = spanning_window_attention(query, key, value, padding=(pad_key, pad_value), **options)
        return jnp.sum(out * d_out), out

    gradients, out = jax.grad(loss, tuple(range(5)), has_aux=True)(query, key, value, pad_key, pad_value)
    return out, gradients


BOTH = ("close", "remote")
CASES = {
    "padded": ((10, 17), 4, BOTH),
    "one window": ((5, 5), 5, BOTH),
    "close": ((6, 9), 3, ("close",)),
    "remote": ((9, 6), 3, ("remote",)),
    "smaller than a window": ((2, 7), 3, ("remote", "close")),
}


def assert_equals_reference(case, implementation, dtype="float32", **sizes):
    size, window, patterns = CASES[case]
    arrays = inputs(*size, dtype=dtype, **sizes)
    options = dict(window=window, patterns=patterns)
    out, gradients = values_and_gradients(*arrays, implementation=implementation, **options)
    exact = [x.astype(jnp.float32) for x in arrays]
    expected, expected_gradients = values_and_gradients(*exact, implementation="reference", **options)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert out.dtype == dtype
    assert_close(out, expected, value_tolerance, "out")
    padded = any(n % window for n in size)
    names = ("query", "key", "value", "pad_key", "pad_value")
    for name, one, other in zip(names, gradients, expected_gradients, strict=True):
        if padded or not name.startswith("pad"):
            assert_close(one, other, gradient_tolerance, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES)
def test_chunked_equals_reference(case):
    assert_equals_reference(case, "chunked")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_kernels_equal_reference(implementation, dtype):
    assert_equals_reference("padded", implementation, dtype, batch=1, dim=20, value_dim=30)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("case", set(CASES) - {"padded"})
def test_kernels_equal_reference_in_every_case(implementation, case):
    assert_equals_reference(case, implementation)


def test_bfloat16_on_a_cpu():
    assert_equals_reference("padded", "chunked", "bfloat16")


def test_groups_are_the_published_ones():
    # The published layout, by its own words: y = n1 w + h1 in close windows, y = h1 N1 + n1 in remote ones.
    query, key, value = inputs(6, 4)[:3]
    expected = jnp.zeros_like(value)
    for pattern in BOTH:
        for row in range(3):
            for column in range(2):
                ys, xs = (
                    [n * 2 + h for h in range(2)] if pattern == "close" else [h * count + n for h in range(2)]
                    for n, count in ((row, 3), (column, 2))
                )  # fmt: skip
                at = (slice(None), *np.ix_(ys, xs))
                q, k, v = (x[at].reshape(2, 4, 2, -1) for x in (query, key, value))
                out = attention(q, k, v, implementation="reference").reshape(2, 2, 2, 2, -1)
                expected = expected.at[at].add(out)
    assert_close(spanning_window_attention(query, key, value, window=2), expected, 1e-5, "out")


def test_one_window_is_attention_twice():
    query, key, value = inputs(4, 4)[:3]
    once = attention(*(x.reshape(2, 16, 2, -1) for x in (query, key, value)), implementation="reference")
    twice = spanning_window_attention(query, key, value, window=4)
    assert_close(twice, 2 * once.reshape(value.shape), 1e-5, "out")


# EMOv2-5M: stage 3 at 224 pixels; at the 800 x 1344 of detection, with windows of 10; EMOv2-1M's narrow values.
PUBLISHED = {
    "classification": ((8, 14, 14), 5, 32, 128, 7),
    "detection": ((1, 50, 90), 5, 32, 128, 10),
    "1M": ((8, 14, 14), 4, 20, 60, 7),
}


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(name, target, marks=() if name == "classification" else pytest.mark.slow)
        for name in PUBLISHED
        for target in TARGETS
    ],
)
def test_forward_and_backward_compile(name, target):
    size, heads, dim, value_dim, window = PUBLISHED[name]
    arrays = [shape(*size, heads, n) for n in (dim, dim, value_dim)]
    compiled = assert_compiles(gradient(partial(spanning_window_attention, window=window)), arrays, [target])[target]
    assert sum("spanning_window" in kernel for kernel in compiled.kernels) == 2, compiled.kernels
    if target == "h100":
        assert all(kernel.spill_bytes == 0 for kernel in gpu_resources(compiled))


def test_each_platform_gets_its_own_kernel():
    arrays = [shape(1, 8, 8, 2, 16)] * 3
    function = partial(spanning_window_attention, window=4)
    assert_holds_kernel(function, arrays, {"tpu-v5e": "spanning_window_forward", "h100": "spanning_window_gpu_forward"})


QUERY, KEY, VALUE, *PADDING = inputs(6, 6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": QUERY[0]}, ValueError, r"query must be \(batch, height, width, heads, dim\)"),
        ({"key": KEY[:, :3]}, ValueError, "maps differ"),
        ({"value": VALUE.astype(jnp.bfloat16)}, TypeError, "must share a dtype"),
        ({"value": VALUE.astype(int)}, TypeError, "value must be floating point"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 4}, ValueError, "a map of 6 x 6 is no multiple of the window 4"),
        ({"window": 4, "padding": PADDING[::-1]}, ValueError, r"the padding's key must be \(2, 8\), got shape"),
        ({"patterns": ("near",)}, ValueError, "patterns must be one or more of"),
        ({"patterns": ()}, ValueError, "patterns must be one or more of"),
        ({"scale": 0.0}, ValueError, "scale must be positive, got 0.0"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "window": 3} | change
    with pytest.raises(error, match=message):
        spanning_window_attention(**arguments)

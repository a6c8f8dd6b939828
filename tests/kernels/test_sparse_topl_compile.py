"""SPT's kernels compile for TPUs and GPUs at the sizes of its published blocks, and keep no T x T array."""

import jax.numpy as jnp
import pytest

from kernels.sparse_topl import sparse_attention
from tests.kernels.compile import TARGETS, assert_compiles, gradient, shape
from zoo.compilation import gpu_resources, report


def attend(query, key, value, query_codes, key_codes):
    return sparse_attention(query, key, value, query_codes, key_codes, keep=query.shape[1] // 8, codewords=16)


def shapes(batch, time, heads, width, dtype=jnp.bfloat16):
    codes = shape(batch, time, heads, width // 8, dtype=jnp.int32)
    return [*[shape(batch, time, heads, width, dtype=dtype)] * 3, codes, codes]


@pytest.mark.parametrize("target", TARGETS)
def test_forward_and_backward_of_opt_2048_are_kernels(target):
    compiled = assert_compiles(gradient(attend, 3), shapes(1, 4096, 32, 64), [target])[target]
    for kernel in ("thresholds", "forward", "d_query", "d_key_value"):
        assert any(name.startswith("sparse_topl") and kernel in name for name in compiled.kernels), compiled.kernels
    assert report(compiled).temporary_bytes < 512 << 20  # the weights of all heads are 2 GiB
    if target == "h100":
        assert all(kernel.spill_bytes < 64 for kernel in gpu_resources(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "width"), [(32, 80), (20, 128), (40, 128)])
def test_the_other_published_blocks_compile(target, heads, width):
    assert_compiles(gradient(attend, 3), shapes(16, 512, heads, width), [target])

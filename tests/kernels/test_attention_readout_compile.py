"""The readouts' kernels compile for TPUs and GPUs at the sizes of the models whose maps are read."""

from functools import partial

import jax.numpy as jnp
import pytest

from kernels.attention_readout import attention_received, attention_top_k
from tests.kernels.compile import TARGETS, assert_compiles, gradient, shape
from zoo.compilation import compile_for, gpu_resources, report


def received(query, key, weights):
    return attention_received(query, key, weights, causal=True)


LLAMA = [shape(1, 4096, 32, 128), shape(1, 4096, 32, 128)]
SMOLLM2 = [shape(1, 4096, 9, 64), shape(1, 4096, 3, 64)]


@pytest.mark.parametrize("target", TARGETS)
def test_column_sums_and_best_keys_of_llama_are_kernels(target):
    def both(query, key, weights):
        return received(query, key, weights), attention_top_k(query, key, 8, causal=True)

    compiled = assert_compiles(both, [*LLAMA, shape(1, 4096, 1, 1)], [target])[target]
    for kernel in ("attention_received", "attention_top_k"):
        assert any(name.startswith(kernel) for name in compiled.kernels), compiled.kernels
    assert report(compiled).temporary_bytes < 64 << 20  # one head's map alone is as much in float32
    if target == "h100":
        assert all(kernel.spill_bytes < 64 for kernel in gpu_resources(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_compile(target, dtype):
    shapes = [shape(*x.shape, dtype=dtype) for x in (*SMOLLM2, shape(1, 4096, 9, 3))]
    compiled = assert_compiles(gradient(received), shapes, [target])[target]
    assert any("backward" in name for name in compiled.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_a_step_of_decoding_reads_the_cache_where_it_lies(target):
    def step(query, key, positions, lengths):
        return attention_top_k(query, key, 1, causal=True, query_positions=positions, key_lengths=lengths)

    ids = [shape(1, 1, dtype=jnp.int32), shape(1, dtype=jnp.int32)]
    compiled = compile_for(target, step, shape(1, 1, 32, 128), shape(1, 50000, 32, 128), *ids)
    assert report(compiled).temporary_bytes < 32 << 20  # the cache is 390 MiB


@pytest.mark.slow
@pytest.mark.parametrize("function", [attention_received, partial(attention_top_k, k=8)])
def test_memory_is_linear_in_length(function):
    def temporaries(length):
        arrays = [shape(1, length, 8, 64, dtype=jnp.float32)] * 2
        return report(compile_for("h100", partial(function, causal=True), *arrays)).temporary_bytes

    assert temporaries(16384) <= 4.2 * temporaries(4096)

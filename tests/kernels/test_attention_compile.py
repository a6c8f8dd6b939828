"""`attention` compiled by the real compilers of TPUs and GPUs, at the sizes of models people run."""

from functools import partial

import jax.numpy as jnp
import pytest

from kernels.attention import attention
from tests.kernels.compile import assert_compiles, assert_holds_kernel, gradient, shape
from zoo.compilation import compile_for, gpu_resources, report


def qkv(batch, length, heads, width, key_heads=None, keys=None):
    key = shape(batch, keys or length, key_heads or heads, width)
    return [shape(batch, length, heads, width), key, key]


MODELS = {
    "GPT-2": (qkv(8, 1024, 12, 64), True),
    "ViT-B": (qkv(32, 197, 12, 64), False),
    "Llama-8B, 8k": (qkv(1, 8192, 32, 128, 8), True),
    "Llama-8B, 32k": (qkv(1, 32768, 32, 128, 8), True),
}


@pytest.mark.parametrize("model", MODELS)
def test_forward_and_backward_compile(model):
    shapes, causal = MODELS[model]
    function = partial(attention, causal=causal)
    for kind, compiled in (("forward", function), ("backward", gradient(function))):
        for target, program in assert_compiles(compiled, shapes).items():
            assert any(kind in kernel for kernel in program.kernels), f"{target}: {program.kernels}"
            assert report(program).fits
            if target == "h100":
                assert all(kernel.spill_bytes == 0 for kernel in gpu_resources(program))


def everything(query, key, value, bias, sinks, positions, segments, lengths, **options):
    return attention(
        query, key, value, bias=bias, sinks=sinks, causal=True, window=200, logit_softcap=30.0,
        query_positions=positions, key_positions=positions, query_segment_ids=segments, key_segment_ids=segments,
        prefix_lengths=lengths, key_lengths=lengths, **options,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [(2, 4, 300, 300), (1, 4, 300, 300), (2, 1, 1, 300), (2, 4, 300, 1)], ids=str)
def test_all_options_together_compile(bias):
    ids, lengths = shape(2, 300, dtype=jnp.int32), shape(2, dtype=jnp.int32)
    shapes = [*qkv(2, 300, 4, 80, 2), shape(*bias), shape(4, dtype=jnp.float32), ids, ids, lengths]
    assert_compiles(gradient(everything, count=5), shapes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16], ids=["float32", "float16"])
def test_dtypes_compile(dtype):
    shapes = [shape(2, 200, 4, 64, dtype=dtype)] * 3
    assert_compiles(gradient(partial(attention, causal=True)), shapes)


@pytest.mark.parametrize("width, value_width", [(20, 20), (64, 128), (192, 128), (256, 256), (512, 512)])
def test_widths_compile(width, value_width):
    shapes = [shape(1, 300, 2, size) for size in (width, width, value_width)]
    assert_compiles(gradient(attention), shapes)


@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding_against_a_long_cache_compiles(tokens):
    def decode(query, key, value, positions, lengths):
        return attention(query, key, value, causal=True, query_positions=positions, key_lengths=lengths)

    shapes = [*qkv(1, tokens, 32, 128, 8, keys=32768), shape(1, tokens, dtype=jnp.int32), shape(1, dtype=jnp.int32)]
    for target, program in assert_compiles(decode, shapes).items():
        assert program.kernels, f"{target} decodes without a kernel"
        # The cache is read where it lies: a copy of it would be 64 MiB.
        assert report(program).temporary_bytes < 4 << 20


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_each_platform_gets_its_own_kernel(differentiated):
    function = partial(attention, causal=True)
    kind = "backward" if differentiated else "forward"
    assert_holds_kernel(
        gradient(function) if differentiated else function,
        qkv(1, 256, 2, 64),
        {"tpu-v5e": f"attention_{kind}", "tpu-v6e": f"attention_{kind}", "h100": f"attention_gpu_{kind}"},
    )


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_memory_of_a_gradient_is_linear_in_length(target):
    lengths = (4096, 8192, 16384)
    sizes = []
    for length in lengths:
        compiled = compile_for(target, gradient(partial(attention, causal=True)), *qkv(1, length, 8, 64))
        sizes.append(report(compiled).temporary_bytes)
    for longer, shorter in zip(sizes[1:], sizes, strict=False):
        assert longer <= 2.1 * shorter
    assert sizes[-1] < 8 * 16384 * 4096  # and far below one byte for each of the logits, 8 x 16384 x 16384

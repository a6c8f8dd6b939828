"""`attention` compiled by the real compilers of TPUs and GPUs, at the sizes of models people run."""

from functools import partial

import jax.numpy as jnp
import pytest

from kernels.attention import attention
from tests.kernels.compile import TARGETS, assert_compiles, assert_holds_kernel, gradient, shape
from zoo.compilation import compile_for, gpu_resources, report


def qkv(batch, length, heads, width, key_heads=None, keys=None):
    key = shape(batch, keys or length, key_heads or heads, width)
    return [shape(batch, length, heads, width), key, key]


MODELS = {
    "GPT-2": (qkv(8, 1024, 12, 64), True),
    "ViT-B": (qkv(32, 197, 12, 64), False),
    "Llama-8B, 32k": (qkv(1, 32768, 32, 128, 8), True),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", MODELS)
def test_forward_and_backward_compile(model, target):
    shapes, causal = MODELS[model]
    compiled = assert_compiles(gradient(partial(attention, causal=causal)), shapes, [target])[target]
    for kind in ("forward", "backward"):
        assert any(kind in kernel for kernel in compiled.kernels), compiled.kernels
    assert report(compiled).fits
    if target == "h100":
        assert [kernel for kernel in gpu_resources(compiled) if kernel.spill_bytes] == []


def everything(query, key, value, bias, sinks, positions, segments, lengths):
    return attention(
        query, key, value, bias=bias, sinks=sinks, causal=True, window=200, logit_softcap=30.0,
        query_positions=positions, key_positions=positions, query_segment_ids=segments, key_segment_ids=segments,
        prefix_lengths=lengths, key_lengths=lengths,
    )  # fmt: skip


# The gradients of a full, a shared, a key's and a row's bias take four ways through the kernels.
@pytest.mark.parametrize(
    "bias, targets",
    [((1, 4, 300, 300), TARGETS), ((2, 1, 1, 300), ["h100"]), ((2, 4, 300, 1), ["h100"]), ((1, 1, 1, 1), ["tpu-v5e"])],
    ids=str,
)
def test_all_options_together_compile(bias, targets):
    ids, lengths = shape(2, 300, dtype=jnp.int32), shape(2, dtype=jnp.int32)
    shapes = [*qkv(2, 300, 4, 80, 2), shape(*bias), shape(4, dtype=jnp.float32), ids, ids, lengths]
    assert_compiles(gradient(everything, count=5), shapes, targets)


@pytest.mark.parametrize(
    "width, value_width, dtype",
    [(20, 20, jnp.bfloat16), (64, 128, jnp.float32), (192, 128, jnp.float16), (512, 512, jnp.bfloat16)],
)
def test_widths_and_dtypes_compile(width, value_width, dtype):
    shapes = [shape(1, 300, 2, size, dtype=dtype) for size in (width, width, value_width)]
    assert_compiles(gradient(attention), shapes, ["tpu-v5e", "h100"])


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_decoding_against_a_long_cache_compiles(target):
    def decode(query, key, value, positions, lengths):
        return attention(query, key, value, causal=True, query_positions=positions, key_lengths=lengths)

    shapes = [*qkv(1, 1, 32, 128, 8, keys=32768), shape(1, 1, dtype=jnp.int32), shape(1, dtype=jnp.int32)]
    compiled = assert_compiles(decode, shapes, [target])[target]
    assert compiled.kernels
    assert report(compiled).temporary_bytes < 4 << 20  # the cache is read where it lies: a copy would be 64 MiB


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "backward"])
def test_each_platform_gets_its_own_kernel(differentiated):
    function = partial(attention, causal=True)
    kind = "backward" if differentiated else "forward"
    assert_holds_kernel(
        gradient(function) if differentiated else function,
        qkv(1, 256, 2, 64),
        {"tpu-v5e": f"attention_{kind}", "h100": f"attention_gpu_{kind}"},
    )


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_memory_of_a_gradient_is_linear_in_length(target):
    def temporaries(length):
        compiled = compile_for(target, gradient(partial(attention, causal=True)), *qkv(1, length, 8, 64))
        return report(compiled).temporary_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long <= 4.2 * short
    assert long < 8 * 16384 * 16384 / 2  # a matrix of logits would be four bytes each

"""The TPU kernels of softmax attention: interpreted against the reference, and compiled for chips nobody has here."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import attention, tpu
from kernels.attention.operands import Operands, Options, visible
from kernels.attention.tpu import plan
from kernels.attention.tpu.plan import EMPTY, FULL, Blocks, block_states, make_plan
from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case
from zoo.compilation import compile_for, tpu_schedules


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks so small that tiny arrays have several, and chunks of one block."""
    blocks = Blocks(256, 128, 128)
    monkeypatch.setattr(plan, "BLOCKS", {pltpu.ChipVersion.TPU_V5E: (blocks, blocks)})
    monkeypatch.setattr(plan, "VMEM_SHARE", 1e-9)


SEVERAL = Case(queries=300, keys=260, heads=2, key_heads=1)  # blocks in each direction, the last ones in part


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(causal=True, dtype="bfloat16"), id="causal"),
        pytest.param(Case(heads=6, key_heads=6, sinks=True, lengths=True), id="heads-together"),
        pytest.param(dataclasses.replace(SEVERAL, causal=True, window=(30, None)), id="window"),
        pytest.param(dataclasses.replace(SEVERAL, segments=True, sinks=True), id="segments"),
        pytest.param(dataclasses.replace(SEVERAL, positions=True, causal=True, prefix=True, lengths=True), id="prefix"),
        pytest.param(dataclasses.replace(SEVERAL, bias=(False, True, True, True), logit_softcap=1.5), id="bias"),
        pytest.param(dataclasses.replace(SEVERAL, bias=(True, False, False, True), dropout_rate=0.3), id="dropout"),
        pytest.param(dataclasses.replace(SEVERAL, bias=(False, False, True, False), window=9), id="bias-of-queries"),
    ],
)
def test_kernel_equals_reference(case: Case):
    attention_cases.assert_equals_reference(case, "tpu")


_FEW = {"heads": ((2, 1), (2, 2)), "widths": ((16, 24),)}
# In bfloat16 one block of keys: in several, rounding a single large weight can take 2% of all others' size.
DRAWN = st.one_of(
    attention_cases.cases(sizes=((150, 140), (300, 270)), dtypes=("float32",), **_FEW),
    attention_cases.cases(sizes=((150, 120),), dtypes=("bfloat16",), **_FEW),
)


@given(DRAWN)
@settings(max_examples=4)
def test_kernel_equals_reference_in_drawn_cases(case):
    attention_cases.assert_equals_reference(case, "tpu")


@pytest.mark.slow
@given(DRAWN)
@settings(max_examples=16)
def test_kernel_equals_reference_in_many_drawn_cases(case):
    attention_cases.assert_equals_reference(case, "tpu")


@pytest.mark.slow
@pytest.mark.usefixtures("real_blocks")
@pytest.mark.parametrize("queries", [300, 1024])
@pytest.mark.parametrize("width", [16, 64])
def test_gradients_in_bfloat16_do_not_suffer_from_rows_of_few_keys(queries, width):
    case = Case(
        batch=1, queries=queries, keys=queries, heads=2, key_heads=1, width=width, value_width=width, causal=True,
        dtype="bfloat16",
    )  # fmt: skip
    attention_cases.assert_equals_reference(case, "tpu")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(queries=1, keys=70, sinks=True, lengths=True), id="grouped"),
        pytest.param(
            Case(queries=3, keys=130, width=128, value_width=128, sinks=True, lengths=True, logit_softcap=1.5),
            id="interleaved",
        ),
        pytest.param(
            Case(queries=2, keys=192, width=128, value_width=256, causal=True, positions=True, window=(40, None),
                 dtype="bfloat16"),
            id="interleaved-positions",
        ),
        pytest.param(
            Case(queries=2, keys=50, heads=3, key_heads=3, width=128, value_width=128, causal=True, prefix=True),
            id="three-heads",
        ),
    ],
)  # fmt: skip
def test_decoding_equals_reference(case: Case):
    floats, others = attention_cases.differentiable(case), attention_cases.integers(case)
    call = jax.jit(attention_cases.call, static_argnums=(0, 3))
    out, logsumexp = call(case, floats, others, "tpu")
    exact = {name: array.astype(jnp.float32) for name, array in floats.items()}
    expected_out, expected_logsumexp = call(case, exact, others, "reference")
    tolerance, _ = attention_cases.TOLERANCES[case.dtype]
    attention_cases.assert_close(out, expected_out, tolerance, "out")
    attention_cases.assert_close(logsumexp, expected_logsumexp, tolerance, "logsumexp")


def test_decoding_ignores_what_free_cache_slots_hold():
    case = Case(queries=1, keys=300, width=128, value_width=128)
    floats = attention_cases.differentiable(case)
    lengths = jnp.array([7, 150])
    call = jax.jit(attention_cases.call, static_argnums=(0, 3))
    expected, _ = call(case, floats, {"key_lengths": lengths}, "tpu")
    free = (jnp.arange(case.keys)[None] >= lengths[:, None])[..., None, None]
    for name in ("key", "value"):
        floats[name] = jnp.where(free, jnp.nan, floats[name])
    out, _ = call(case, floats, {"key_lengths": lengths}, "tpu")
    np.testing.assert_array_equal(out, expected)


@given(
    causal=st.booleans(),
    window=st.sampled_from((None, (100, None), (None, 20), (0, 0), (200, 150))),
    positions=st.booleans(),
    segments=st.booleans(),
    prefix=st.booleans(),
    lengths=st.booleans(),
    sizes=st.sampled_from(((600, 700), (512, 512), (130, 900))),
)
@settings(max_examples=10)
@example(True, None, False, False, False, False, (512, 512))
def test_blocks_agree_with_mask(causal, window, positions, segments, prefix, lengths, sizes):
    case = Case(queries=sizes[0], keys=sizes[1], positions=positions, segments=segments, prefix=prefix, lengths=lengths)
    arrays = attention_cases.integers(case)
    if positions:  # random ones leave no block alone
        arrays |= {name: jnp.sort(arrays[name]) for name in ("query_positions", "key_positions")}
    if not causal:
        arrays.pop("prefix_lengths", None)
    operands = Operands(
        jnp.zeros((2, sizes[0], 1, 8)), jnp.zeros((2, sizes[1], 1, 8)), jnp.zeros((2, sizes[1], 1, 8)), **arrays
    )
    options = Options(1.0, causal, window)
    shape = make_plan(operands, options)
    states, bounds = (np.asarray(x) for x in block_states(operands, options, shape))

    query_index, key_index = np.arange(sizes[0])[None, :, None], np.arange(sizes[1])[None, None]
    query_position = query_index if not positions else operands.query_positions[:, :, None]
    key_position = key_index if not positions else operands.key_positions[:, None]
    query_segment = operands.query_segment_ids[:, :, None] if segments else None
    key_segment = operands.key_segment_ids[:, None] if segments else None
    prefixes = None if operands.prefix_lengths is None else operands.prefix_lengths[:, None, None]
    key_lengths = operands.key_lengths[:, None, None] if lengths else None
    mask = visible(options, query_position, key_position, query_segment, key_segment, prefixes, key_index, key_lengths)
    mask = np.ones((1, *sizes), bool) if mask is None else np.broadcast_to(mask, (len(states), *sizes))
    for batch, block_q, _, block_k in np.ndindex(states.shape):
        block = mask[
            batch,
            block_q * shape.block_q : (block_q + 1) * shape.block_q,
            block_k * shape.block_k : (block_k + 1) * shape.block_k,
        ]
        state = states[batch, block_q, 0, block_k]
        if state == EMPTY:
            assert not block.any()
        else:
            assert bounds[batch, block_q, 0] <= block_k < bounds[batch, block_q, 1]
        if state == FULL:
            assert block.shape == (shape.block_q, shape.block_k) and block.all()
    if causal and not (positions or segments or prefix or lengths or window) and sizes == (512, 512):
        assert states[0, :, 0].tolist() == [[1, 1, 0, 0], [2, 2, 1, 1]]


def test_kernels_have_no_races_and_read_within_bounds():
    """On simulated memories, where what was not written is NaN."""
    case = Case(batch=1, queries=140, keys=150, heads=2, key_heads=1, causal=True)
    floats = attention_cases.differentiable(case)
    operands, options = Operands(floats["query"], floats["key"], floats["value"]), Options(0.25, causal=True)
    interpret = pltpu.InterpretParams(detect_races=True)
    out, logsumexp = tpu.forward(operands, options, interpret=interpret)
    gradients = tpu.backward(operands, out, logsumexp, out, logsumexp, options, interpret=interpret)
    expected = tpu.forward(operands, options, interpret=True)
    expected_gradients = tpu.backward(operands, *expected, *expected, options, interpret=True)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), (out, gradients), (expected[0], expected_gradients)
    )


# ------------------------------------------------------------------------------------------------------- compilation


def _shapes(batch=1, queries=1024, keys=None, heads=8, key_heads=None, width=64, value_width=None, dtype="bfloat16"):
    keys, key_heads, value_width = keys or queries, key_heads or heads, value_width or width
    return tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (
            (batch, queries, heads, width),
            (batch, keys, key_heads, width),
            (batch, keys, key_heads, value_width),
        )
    )


GPT2 = _shapes(8, 1024, heads=12)
VIT_B = _shapes(32, 197, heads=12)
LLAMA = {length: _shapes(1, length, heads=32, key_heads=8, width=128) for length in (8192, 32768)}
SMALL = _shapes(2, 600, heads=4, key_heads=2, width=96, value_width=80)


@pytest.fixture
def real_blocks(small_blocks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()


def _integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


COMPILED = {
    "gpt2": (GPT2, {"causal": True}, {}),
    "vit-b": (VIT_B, {}, {}),
    "llama-8k": (LLAMA[8192], {"causal": True}, {}),
    "llama-32k": (LLAMA[32768], {"causal": True}, {}),
    "mistral": (LLAMA[32768], {"causal": True, "window": 4096}, {}),
    "gemma-2": (_shapes(1, 4096, heads=8, key_heads=4, width=256), {"causal": True, "logit_softcap": 50.0}, {}),
    "latent": (_shapes(1, 4096, heads=16, width=192, value_width=128), {"causal": True}, {}),
    "float32": (_shapes(1, 4096, heads=4, width=128, dtype="float32"), {"causal": True}, {}),
    "float16": (_shapes(1, 300, heads=3, dtype="float16"), {}, {}),
    "width-20": (_shapes(1, 50, heads=3, width=20, dtype="float32"), {}, {}),
    "bias": (SMALL, {}, {"bias": jax.ShapeDtypeStruct((1, 4, 600, 600), jnp.float32)}),
    "bias-of-keys": (SMALL, {}, {"bias": jax.ShapeDtypeStruct((2, 1, 1, 600), jnp.bfloat16)}),
    "bias-of-queries": (SMALL, {}, {"bias": jax.ShapeDtypeStruct((2, 1, 600, 1), jnp.float32)}),
    "segments": (SMALL, {"causal": True}, {f"{x}_segment_ids": _integers(2, 600) for x in ("query", "key")}),
    "positions": (
        SMALL,
        {"causal": True, "window": (50, None)},
        {f"{x}_positions": _integers(2, 600) for x in ("query", "key")} | {"prefix_lengths": _integers(2)},
    ),
    "dropout": (SMALL, {"causal": True, "dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}, {}),
    "sinks": (SMALL, {"causal": True}, {"sinks": jax.ShapeDtypeStruct((4,), jnp.float32)}),
}
QUICK = ("gpt2", "llama-32k")


@pytest.mark.usefixtures("real_blocks")
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED]
)
def test_forward_and_backward_compile(name, target):
    shapes, static, others = COMPILED[name]
    floats = {key: value for key, value in others.items() if key in ("bias", "sinks")}

    def run(floats, others, query, key, value):
        def loss(query, key, value, floats):
            out = attention(query, key, value, **floats, **others, **static, implementation="tpu")
            return out.astype(jnp.float32).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(query, key, value, floats)

    rest = {key: value for key, value in others.items() if key not in floats}
    compiled = compile_for(target, run, floats, rest, *shapes)
    assert {"attention_forward", "attention_backward"} <= compiled.kernels.keys()
    assert ("attention_bias_gradient" in compiled.kernels) == ("bias" in floats)


@pytest.mark.usefixtures("real_blocks")
@pytest.mark.parametrize("target", ["tpu-v5e", "tpu-v6e"])
@pytest.mark.parametrize(
    ("width", "kernel"), [(128, "attention_decode"), (64, "attention_forward")]
)  # fmt: skip
def test_decoding_moves_the_cache_once(width, kernel, target):
    query, key, value = _shapes(8, 1, 32768, heads=32, key_heads=8, width=width)

    def decode(query, key, value, positions, key_lengths):
        return attention(query, key, value, causal=True, query_positions=positions, key_lengths=key_lengths,
                         implementation="tpu")  # fmt: skip

    compiled = compile_for(target, decode, query, key, value, _integers(8, 1), _integers(8))
    assert kernel in compiled.kernels
    cache = 2 * key.size * key.dtype.itemsize
    assert compiled.executable.cost_analysis()["bytes accessed"] < 1.05 * cache
    assert compiled.executable.memory_analysis().temp_size_in_bytes < 0.01 * cache


@pytest.mark.usefixtures("real_blocks")
def test_main_loop_keeps_the_matrix_units_busy():
    shapes = _shapes(1, 4096, heads=8, width=128)
    compiled = compile_for("tpu-v5e", partial(attention, causal=True, implementation="tpu"), *shapes)
    grid = tpu_schedules(compiled)[0]
    assert grid.depth == 1 and grid.mxu > 0.57 and grid.spills <= 1155  # with both bodies, start and end of a block
    inner = max(tpu_schedules(compiled)[1:], key=lambda loop: loop.bundles)
    assert inner.mxu > 0.75

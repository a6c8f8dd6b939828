"""Contextual attention for TPUs: blocks of tokens pass by one sequence's sums in VMEM."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.common import round_up
from kernels.contextual_attention.operands import Operands, flat
from kernels.contextual_attention.tile import State, advance, start

_BLOCK = 256  # tokens; the hidden layer of four heads of 64 takes 256 KiB


def forward(operands: Operands, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward`."""
    batch, time, width = operands.tokens.shape
    heads = operands.score.shape[0]
    weight, context, score = flat(operands)
    size = min(_BLOCK, round_up(time, 16))
    length = round_up(time, size)
    pad = ((0, 0), (0, length - time), (0, 0))
    one = context.shape[1] == 1
    if not one or time == 1:
        context, one = jnp.pad(context, pad), False
    blocks = length // size
    hidden = weight.shape[1]
    pooled, logits = pl.pallas_call(
        partial(_kernel, blocks=blocks),
        grid=(batch, blocks),
        in_specs=[
            pl.BlockSpec((None, size, width), lambda b, t: (b, t, 0)),
            pl.BlockSpec((width, hidden), lambda b, t: (0, 0)),
            pl.BlockSpec((None, 1 if one else size, hidden), lambda b, t: (b, 0 if one else t, 0)),
            pl.BlockSpec((hidden, heads), lambda b, t: (0, 0)),
            pl.BlockSpec((None, size, 1), lambda b, t: (b, t, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, width, heads), lambda b, t: (b, 0, 0)),
            pl.BlockSpec((None, size, heads), lambda b, t: (b, t, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, width, heads), jnp.float32),
            jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, heads), jnp.float32),
            pltpu.VMEM((1, heads), jnp.float32),
            pltpu.VMEM((width, heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="contextual_attention_tpu",
    )(
        jnp.pad(operands.tokens, pad), weight, context, score,
        jnp.pad(operands.valid[:, :, None].astype(jnp.float32), pad),
    )  # fmt: skip
    return pooled.swapaxes(1, 2).astype(operands.tokens.dtype), logits[:, :time]


def _kernel(
    tokens_ref: Any, weight_ref: Any, context_ref: Any, score_ref: Any, valid_ref: Any, pooled_ref: Any,
    logits_ref: Any, most_ref: Any, total_ref: Any, sum_ref: Any, *, blocks: int,
) -> None:  # fmt: skip
    refs = (most_ref, total_ref, sum_ref)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref, value in zip(refs, start(*sum_ref.shape), strict=True):
            ref[...] = value

    state, logits = advance(
        State(*(ref[...] for ref in refs)),
        tokens_ref[...], weight_ref[...], context_ref[...], score_ref[...], valid_ref[...],
    )  # fmt: skip
    logits_ref[...] = logits
    for ref, value in zip(refs, state, strict=True):
        ref[...] = value

    @pl.when(pl.program_id(1) == blocks - 1)
    def _() -> None:
        pooled_ref[...] = state.pooled / jnp.maximum(state.total, 1.0)

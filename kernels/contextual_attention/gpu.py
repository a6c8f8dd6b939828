"""Contextual attention for NVIDIA GPUs in Pallas-Triton: a program takes one sequence, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.common import round_up
from kernels.contextual_attention import chunked
from kernels.contextual_attention.operands import Operands, flat
from kernels.contextual_attention.tile import State, advance, start

_BLOCK = 32
_MOST_NUMBERS = 64 * 512  # of the weight, which stays in registers or shared memory


def forward(operands: Operands, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward`. Sides of tiles are powers of two, at least 16: the wrapper pads with zeros."""
    batch, time, width = operands.tokens.shape
    heads = operands.score.shape[0]
    weight, context, score = flat(operands)
    sides = [max(pl.next_power_of_2(side), 16) for side in (width, weight.shape[1], heads)]
    if sides[0] * sides[1] > _MOST_NUMBERS:
        return chunked.forward(operands)
    length = round_up(time, _BLOCK)
    after = length - time
    wide, hidden, columns = (side - own for side, own in zip(sides, (width, weight.shape[1], heads), strict=True))
    one = context.shape[1] == 1 < time
    pooled, logits = pl.pallas_call(
        partial(_kernel, blocks=length // _BLOCK, one=one),
        grid=(batch,),
        out_shape=[
            jax.ShapeDtypeStruct((batch, sides[0], sides[2]), jnp.float32),
            jax.ShapeDtypeStruct((batch, length, sides[2]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="contextual_attention_gpu",
    )(
        jnp.pad(operands.tokens, ((0, 0), (0, after), (0, wide))),
        jnp.pad(weight, ((0, wide), (0, hidden))),
        jnp.pad(context, ((0, 0), (0, 0 if one else after), (0, hidden))),
        jnp.pad(score, ((0, hidden), (0, columns))),
        jnp.pad(operands.valid.astype(jnp.float32), ((0, 0), (0, after))),
    )
    return pooled[:, :width, :heads].swapaxes(1, 2).astype(operands.tokens.dtype), logits[:, :time, :heads]


def _kernel(
    tokens_ref: Any, weight_ref: Any, context_ref: Any, score_ref: Any, valid_ref: Any, pooled_ref: Any,
    logits_ref: Any, *, blocks: int, one: bool,
) -> None:  # fmt: skip
    batch = pl.program_id(0)
    weight, score = weight_ref[...], score_ref[...]

    def body(block: jax.Array, state: State) -> State:
        places = pl.ds(block * _BLOCK, _BLOCK)
        context = context_ref[batch, 0, :][None] if one else context_ref[batch, places, :]
        state, logits = advance(
            state, tokens_ref[batch, places, :], weight, context, score, valid_ref[batch, places][:, None]
        )
        logits_ref[batch, places, :] = logits
        return state

    state = jax.lax.fori_loop(0, blocks, body, start(weight.shape[0], score.shape[1]))
    pooled_ref[batch, :, :] = state.pooled / jnp.maximum(state.total, 1.0)

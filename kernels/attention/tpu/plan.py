"""How softmax attention is cut into blocks for a TPU: sizes as data, and which blocks the mask leaves over."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.operands import Operands, Options
from kernels.common import round_up

LANES = 128
EMPTY, PARTIAL, FULL = 0, 1, 2  # a block of (query, key) pairs: none attends, some may, all do


class Blocks(NamedTuple):
    """Sizes in tokens."""

    queries: int
    keys: int
    rows: int  # queries whose softmax is one piece of straight code, scheduled between its neighbours' products


# (forward, backward) by generation; chosen by the schedules that `make bench-kernels` prints.
BLOCKS: dict[Any, tuple[Blocks, Blocks]] = {
    pltpu.ChipVersion.TPU_V5E: (Blocks(512, 512, 256), Blocks(512, 512, 512)),
    pltpu.ChipVersion.TPU_V6E: (Blocks(512, 512, 512), Blocks(512, 512, 512)),
}
# Of a core's VMEM, what blocks and scratch may take. The rest is the compiler's, for what the registers do not hold.
VMEM_SHARE = 0.88
SHORT = 2048  # queries of several heads that one grid step takes together where each head is a single block
DECODE_QUERIES, DECODE_ROWS = 8, 128  # most queries, and queries times heads, that are decoded against a cache
DECODE_CHUNK = 4096  # keys of all heads that are fetched at once when decoding


def device() -> pltpu.TpuInfo:
    """Of the device traced for: the context's mesh, else the process's default device.

    Where that is no TPU, the program may be for any: a v5e with no more VMEM than a v5p has.
    """
    try:
        return pltpu.get_tpu_info()
    except ValueError:
        any_chip, least = (
            pltpu.get_tpu_info_for_chip(chip, 1) for chip in (pltpu.ChipVersion.TPU_V5E, pltpu.ChipVersion.TPU_V5P)
        )
        return dataclasses.replace(any_chip, vmem_capacity_bytes=least.vmem_capacity_bytes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shape of one kernel: B batch, T queries, S keys, H query heads, `group` of them a key head."""

    batch: int
    queries: int
    keys: int
    heads: int
    group: int
    width: int
    value_width: int
    block_q: int
    block_k: int
    rows: int
    chunk: int  # keys that lie in VMEM at once, a multiple of block_k
    interleaved: int  # 0, or how many key heads lie in one sequence, token by token (decoding)
    heads_per_step: int
    vmem_bytes: int
    masked: bool  # some pair of tokens may not attend
    scalars: tuple[str, ...]  # which of prefix_lengths and key_lengths there are

    @property
    def query_blocks(self) -> int:
        """Blocks that cover the queries, the last one in part."""
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        """Blocks that cover the keys, the last one in part."""
        return -(-self.keys // self.block_k)

    @property
    def chunks(self) -> int:
        """Chunks that cover the keys."""
        return -(-self.keys // self.chunk)

    @property
    def blocks_per_chunk(self) -> int:
        """Key blocks of one chunk."""
        return self.chunk // self.block_k

    @property
    def ragged_queries(self) -> bool:
        """The last query block reaches beyond the array: what it reads there is undefined."""
        return self.queries % self.block_q != 0

    @property
    def ragged_keys(self) -> bool:
        """The last key block reaches beyond the array."""
        return self.keys % self.block_k != 0


def make_plan(operands: Operands, options: Options, *, backward: bool = False, interleaved: int = 0) -> Plan:
    """Chooses block sizes; `operands` as the kernel gets them, `interleaved` as in the Plan."""
    decode = interleaved > 0
    info = device()
    blocks = BLOCKS.get(info.chip_version, BLOCKS[pltpu.ChipVersion.TPU_V5E])[backward]
    batch, queries, heads, width = operands.query.shape
    keys, key_heads = operands.key.shape[1:3]
    value_width = operands.value.shape[3]
    block_q = queries if decode else min(blocks.queries, round_up(queries, LANES))
    block_k = min(blocks.keys, round_up(keys, LANES))
    rows = next(rows for rows in (blocks.rows, LANES, block_q) if block_q % rows == 0)

    # Bytes of VMEM a key takes: keys and values, read ahead (twice); in the backward pass their gradients, too, and
    # these in float32 once; a column of the bias.
    itemsize = operands.query.dtype.itemsize
    widths = round_up(width, LANES) + round_up(value_width, LANES) if decode else width + value_width
    per_key = widths * (4 * itemsize + 4 if backward else 2 * itemsize)
    if operands.bias is not None and operands.bias.shape[3] > 1:
        per_key += 2 * max(8, min(operands.bias.shape[2], block_q)) * operands.bias.dtype.itemsize
    # Scores, weights and their bfloat16 copies, a block each and generously; inputs, outputs and sums of the queries.
    fixed = 5 * block_q * block_k * 4 + 6 * block_q * (round_up(width, LANES) + round_up(value_width, LANES)) * 4
    most = max(block_k, int(info.vmem_capacity_bytes * VMEM_SHARE - fixed) // per_key // block_k * block_k)
    chunks = -(-keys // (min(most, DECODE_CHUNK) if decode else most))
    chunk = round_up(-(-keys // chunks), block_k)

    heads_per_step = 1
    if queries <= block_q and keys <= block_k and heads == key_heads and operands.bias is None and not decode:
        heads_per_step = max(n for n in range(1, heads + 1) if heads % n == 0 and n * block_q <= max(SHORT, block_q))
    taken = fixed + per_key * chunk * heads_per_step
    plan = Plan(
        batch, queries, keys, heads, heads // key_heads, width, value_width, block_q, block_k, rows, chunk, interleaved,
        heads_per_step, vmem_bytes=min(info.vmem_capacity_bytes, int(taken / VMEM_SHARE) + (8 << 20)), masked=False,
        scalars=tuple(name for name in ("prefix_lengths", "key_lengths") if getattr(operands, name) is not None),
    )  # fmt: skip
    masked = options.causal or options.window is not None or operands.key_lengths is not None
    masked |= operands.query_segment_ids is not None or interleaved > 1 or plan.ragged_queries or plan.ragged_keys
    return dataclasses.replace(plan, masked=masked)


def block_states(operands: Operands, options: Options, plan: Plan) -> tuple[Any, Any]:
    """What `visible` says of whole blocks, by intervals of positions and segment ids.

    NumPy arrays where the mask depends on shapes only, so that the compiler sees constants.

    Returns:
      int32 (B or 1, query blocks, 1, key blocks) of EMPTY, PARTIAL, FULL, and (B or 1, query blocks, 2): the first
      block that is not EMPTY and the end of the last one (0, 0 if there is none).
    """
    query_low, query_high = _intervals(operands.query_positions, plan.queries, plan.block_q)
    key_low, key_high = _intervals(operands.key_positions, plan.keys, plan.block_k)
    if plan.interleaved and operands.key_positions is None:
        key_low, key_high = key_low // plan.interleaved, key_high // plan.interleaved
    query_low, query_high = query_low[:, :, None], query_high[:, :, None]
    key_low, key_high = key_low[:, None, :], key_high[:, None, :]
    first_index = np.arange(plan.key_blocks)[None, None] * plan.block_k
    end_index = first_index + plan.block_k

    some: Any = np.ones((1, plan.query_blocks, plan.key_blocks), bool)
    every: Any = (end_index <= plan.keys) & (plan.interleaved <= 1)
    every = every & ((np.arange(plan.query_blocks)[None, :, None] + 1) * plan.block_q <= plan.queries)
    if options.causal:
        seen, all_seen = key_low <= query_high, key_high <= query_low
        if operands.prefix_lengths is not None:
            prefix = operands.prefix_lengths[:, None, None]
            seen, all_seen = seen | (key_low < prefix), all_seen | (key_high < prefix)
        some, every = some & seen, every & all_seen
    left, right = options.window or (None, None)
    if left is not None:
        some, every = some & (key_high >= query_low - left), every & (key_low >= query_high - left)
    if right is not None:
        some, every = some & (key_low <= query_high + right), every & (key_high <= query_low + right)
    if operands.query_segment_ids is not None:
        low, high = _intervals(operands.query_segment_ids, plan.queries, plan.block_q)
        low, high = low[:, :, None], high[:, :, None]
        other_low, other_high = _intervals(operands.key_segment_ids, plan.keys, plan.block_k)
        other_low, other_high = other_low[:, None, :], other_high[:, None, :]
        some = some & (low <= other_high) & (other_low <= high)
        every = every & (low == other_high) & (other_low == high) & (low == high)
    if operands.key_lengths is not None:
        length = operands.key_lengths[:, None, None]
        some, every = some & (first_index < length), every & (end_index <= length)

    numpy: Any = np if isinstance(some, np.ndarray) and isinstance(every, np.ndarray) else jnp
    states = numpy.where(some, numpy.where(every, FULL, PARTIAL), EMPTY).astype(np.int32)
    index = np.arange(plan.key_blocks, dtype=np.int32)
    first = numpy.where(states != EMPTY, index, plan.key_blocks).min(-1)
    end = numpy.where(states != EMPTY, index + 1, 0).max(-1)
    bounds = numpy.stack([numpy.minimum(first, end), end], -1).astype(np.int32)
    return states[:, :, None, :], bounds


def _intervals(values: jax.Array | None, length: int, block: int) -> tuple[Any, Any]:
    """Least and greatest value of each block, (B or 1, blocks); None stands for 0, 1, 2, ..."""
    count = -(-length // block)
    if values is None:
        low = np.arange(count)[None] * block
        return low, np.minimum(low + block, length) - 1
    padded = jnp.pad(values, ((0, 0), (0, count * block - length)), mode="edge").reshape(-1, count, block)
    return padded.min(-1), padded.max(-1)

"""Attention-like operators as pure functions on arrays: one folder a core, four implementations each.

`reference` is the definition, `chunked` the XLA form with linear memory, `tpu` and `gpu` the Pallas kernels.
`implementation=None` chooses by the platform a program is compiled for.
"""

from kernels.attention import attention
from kernels.attention_readout import (
    attention_entries,
    attention_received,
    attention_top_k,
    calibrated_attention,
)
from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from kernels.prob_sparse import prob_sparse_attention
from kernels.selective_scan import selective_scan
from kernels.spanning_window import spanning_window_attention

__all__ = [
    "attention",
    "attention_entries",
    "attention_received",
    "attention_top_k",
    "calibrated_attention",
    "delta_rule",
    "linear_attention",
    "prob_sparse_attention",
    "selective_scan",
    "spanning_window_attention",
]

"""Miras: sequence layers as associative memories, by architecture, attentional bias, retention gate and algorithm.

"It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online Optimization",
Ali Behrouz, Meisam Razaviyayn, Peilin Zhong, Vahab Mirrokni, ICLR 2026, arXiv 2504.13173. No code and no checkpoints
were published; everything here is a reconstruction from the text.

A layer solves, token by token, W_t = argmin loss(W; k_t, v_t) + retention(W, W_(t-1)). `framework` has the losses and
retentions on a matrix memory, any pair of them, and the earlier models that are such pairs (table 1); `model` the three
new models with deep memories: Moneta (p-norm loss, q-norm retention), Yaad (Huber's loss, l2), Memora (l2, softmax).

Where the paper is silent or ambiguous:
- the sharpness of the smooth sign, tanh(10 x), is ours; |x| = sqrt(x^2 + 1e-6) is the paper's;
- the exact inverse mirror map of |.|_q^2 / 2 raises entries to a power; the paper prints the normalisation only, which
  is the default here (`link="exact"` in `framework` is the other);
- softmax retention is over the inputs of each output ("per slice");
- a head's channel gates act on the axis of its channels in each matrix of the memory;
- Yaad's threshold is a softplus of a projection;
- Memora recurs in logarithms also inside a chunk, where the paper's linear approximation may turn weights negative;
- layers and width of the 1.3B size are Titans'.
"""

from zoo.papers.miras.framework import (
    INSTANCES,
    RETENTIONS,
    Instance,
    framework_scan,
    miras_instance,
    retention,
)
from zoo.papers.miras.model import PAPER, Kind, Miras, MirasConfig

__all__ = [
    "INSTANCES",
    "PAPER",
    "RETENTIONS",
    "Instance",
    "Kind",
    "Miras",
    "MirasConfig",
    "framework_scan",
    "miras_instance",
    "retention",
]

"""Titans: a memory that learns at test time, alone and beside attention.

"Titans: Learning to Memorize at Test Time", Ali Behrouz, Peilin Zhong, Vahab Mirrokni, NeurIPS 2025, arXiv 2501.00663.
No code and no checkpoints were published; two community implementations differ from the paper (`community` has the
better known one). The networks here are a reconstruction from the text.

A recurrent layer's state is the weights of a small network, which is trained while it reads: its gradient is the
surprise of a token, momentum carries surprise on, weight decay forgets. Everything else is trained through this inner
training. Three ways to add attention: as context of the segment (MAC), as a gate (MAG), as a layer (MAL).

Where the paper is silent or contradicts itself:
- MAC as printed (equations 21 to 25) leaks the future: a token of a segment sees what later ones read, and is read with
  a memory that has seen them. Causal is the default here, `causal=False` is as printed;
- gates are one scalar a token, head and memory layer, alpha from sigmoid(-4) on, theta at most 0.1. The paper's are
  channel-wise for linear memories, and each layer's own: `gate_granularity="channel"` has one for each output channel
  of each memory layer, of projections of rank 32 (the paper gives no rank);
- a memory's layer norm belongs to the outer training; gelu in its tanh form;
- MAG and MAC multiply by a sigmoid of the memory's branch ("a non-linearity");
- embeddings are tied, and each layer has persistent tokens of its own;
- the sizes' names (170M to 1.3B) cannot be met by what is published of them: true counts are the variants';
- the text gives a learning rate of 4e-4, its table 5 peaks between 7e-4 and 3e-3.
"""

from zoo.papers.titans.community import CommunityMemoryConfig, CommunityNeuralMemory
from zoo.papers.titans.model import PAPER, Kind, Titans, TitansConfig
from zoo.papers.titans.traces import MemoryTrace, attention_mask, memory_inputs, trace_memory

__all__ = [
    "PAPER",
    "CommunityMemoryConfig",
    "CommunityNeuralMemory",
    "Kind",
    "MemoryTrace",
    "Titans",
    "TitansConfig",
    "attention_mask",
    "memory_inputs",
    "trace_memory",
]

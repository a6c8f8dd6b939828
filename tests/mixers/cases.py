"""The options under which every registered mixer is tested: the table to extend with a new mixer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from zoo.layers.rotary import Llama3Scaling, Rotary

FEATURES = 16
LENGTH = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A mixer, options for features = FEATURES, and whether it has a form that is not causal.

    A slow case is left to `make test-all`: every mixer needs one that is not. One that does not mix tokens has no past.
    """

    mixer: str
    label: str
    options: Mapping[str, Any]
    bidirectional: bool = True
    slow: bool = False
    mixes: bool = True
    tolerance: float = 2e-5  # of what must be equal, in standard deviations
    bfloat16_tolerance: float = 2e-2  # likewise, of bfloat16's root mean square error

    def __hash__(self) -> int:
        return hash((self.mixer, self.label))

    def __str__(self) -> str:
        return f"{self.mixer}-{self.label}"


# Softmax has biases only where keys rotate: a key bias alone adds the same to all of a row's logits, so that its
# gradient is zero.
CASES = [
    Case("softmax", "plain", {"heads": 4}),
    Case("softmax", "grouped", {"heads": 4, "key_heads": 2, "head_dim": 6, "rotary": Rotary()}),
    Case("softmax", "windowed", {"heads": 2, "window": 4, "qkv_bias": True, "out_bias": True, "rotary": Rotary()}),
    Case(
        "softmax",
        "all_options",
        {
            "heads": 4,
            "key_heads": 1,
            "head_dim": 8,
            "window": 5,
            "rotary": Rotary(theta=100.0, features=4, interleaved=True, scaling=Llama3Scaling(original_length=8)),
            "qk_norm": "rms",
            "qkv_bias": True,
            "out_bias": True,
            "softcap": 5.0,
            "sinks": True,
            "scale": 0.3,
        },
    ),
    Case(
        "sparse_topl",
        "exact",
        {"heads": 2, "key_heads": 1, "rotary": Rotary(), "keep": 4, "codewords": 3, "codeword_dim": 4},
        bidirectional=False,
    ),
    Case(
        "sparse_topl",
        "inner_product",
        {"heads": 2, "keep": 5, "codewords": 4, "codeword_dim": 2, "score": "inner_product"},
        bidirectional=False,
        slow=True,
    ),
    Case("sparse_topl", "dense", {"heads": 2, "sparse": False}, bidirectional=False, slow=True),
    Case("linear_attention", "elu", {"heads": 2}),
    Case("linear_attention", "relu", {"heads": 2, "feature_map": "relu", "feature_dim": 12, "head_dim": 6}, slow=True),
    Case("linear_attention", "identity", {"heads": 2, "feature_map": "identity", "normalize": False}, slow=True),
    Case("linear_attention", "performer", {"heads": 2, "feature_map": "performer"}, slow=True),
    Case("linear_attention", "cosformer", {"heads": 2, "feature_map": "cosformer", "max_length": 32}, slow=True),
    Case("based", "plain", {"heads": 2, "feature_dim": 4}),
    Case("retnet", "plain", {"heads": 2}, bidirectional=False),
    Case("gla", "plain", {"heads": 2, "gate_rank": 4, "gate_normalizer": 2.0}, bidirectional=False),
    Case("ssd", "plain", {"heads": 4, "state_size": 8}, bidirectional=False),
    Case(
        "ssd", "grouped", {"heads": 4, "state_size": 4, "groups": 2, "kernel_size": 3}, bidirectional=False, slow=True
    ),
    Case("s6", "plain", {"state_size": 4}, bidirectional=False),
    Case("deltanet", "plain", {"heads": 2}, bidirectional=False),
    Case("gated_deltanet", "plain", {"heads": 2}, bidirectional=False),
    Case("gated_convolution", "plain", {}, bidirectional=False),
    Case("base_convolution", "plain", {}, bidirectional=False),
    Case("pavlovian", "hebb", {"heads": 2, "rule": "hebb"}, bidirectional=False),
    Case(
        "pavlovian",
        "every_rule",
        {"heads": 8, "rule": ("hebb", "oja", "trace", "bcm", "hebb_decay", "gated_delta", "delta", "gated_oja")},
        bidirectional=False,
    ),
    Case(
        "momentum",
        "learned",
        {"heads": 4, "key_heads": 2, "rotary": Rotary(), "qkv_bias": True, "out_bias": True, "learned": True},
        bidirectional=False,
    ),
    Case("pointwise", "plain", {}, bidirectional=False, mixes=False),
    Case(
        "approximate",
        "grouped",
        {"heads": 4, "key_heads": 2, "qk_norm": "rms", "qkv_bias": True, "rotary": Rotary()},
        bidirectional=False,
    ),
    Case("key_only", "grouped", {"heads": 4, "key_heads": 2, "qkv_bias": True}, bidirectional=False),
    Case(
        "fixed_map",
        "grouped",
        {"heads": 4, "key_heads": 2, "rotary": Rotary(), "deviation": 1.0, "max_length": 16},
        bidirectional=False,
    ),
    Case(
        "softmax",
        "narrow_queries",
        {"heads": 2, "key_heads": 1, "query_dim": 4, "qkv_bias": True, "rotary": Rotary()},
        slow=True,
    ),
    Case(
        "normalized_attention",
        "grouped",
        {"heads": 4, "key_heads": 2, "query_dim": 6, "qkv_bias": True},
        bidirectional=False,
    ),
    Case("plain_s6", "own_rates", {"state_size": 4}, bidirectional=False),
    Case("plain_s6", "one_rate", {"state_size": 4, "scalar": True}, bidirectional=False, slow=True),
    Case("qlstm", "reversed", {"reversed": True}, bidirectional=False),
    Case("qlstm", "plain", {}, bidirectional=False, slow=True),
    # Training inside the sequence amplifies rounding.
    Case("titans_lmm", "chunks", {"heads": 2, "chunk_size": 4}, bidirectional=False, tolerance=3e-4),
    Case(
        "titans_lmm", "plain_matrix",
        {"heads": 2, "chunk_size": 1, "memory_depth": 1, "kernel_size": 0, "momentum": False, "decay": False},
        bidirectional=False, slow=True, tolerance=3e-4,
    ),
    Case(
        # Parameters moved by bfloat16's last place move its float32 outputs by 3e-2 (those of "chunks" by 1.6e-2).
        "titans_lmm", "channels",
        {"heads": 2, "chunk_size": 4, "memory_expansion": 2, "gate_granularity": "channel", "gate_rank": 4},
        bidirectional=False, slow=True, tolerance=3e-4, bfloat16_tolerance=6e-2,
    ),
    *(
        Case(
            f"titans_{kind}", "matrix" if depth == 1 else "deep",
            {
                "heads": 2, "memory_heads": 1, "memory_depth": depth, "chunk_size": 4, "window": 3,
                "num_persistent_tokens": 3,
            },
            bidirectional=False, slow=depth > 1, tolerance=3e-4,
        )
        for kind in ("mag", "mal")
        for depth in (1, 2)
    ),
    Case(
        "titans_mac", "matrix",
        {
            "heads": 2, "memory_heads": 1, "memory_depth": 1, "chunk_size": 2, "segment_len": 4,
            "num_persistent_tokens": 3,
        },
        tolerance=3e-4,
    ),
    Case(
        "titans_mac", "averaged",
        {"heads": 2, "chunk_size": 2, "segment_len": 6, "num_memory_tokens": 3, "num_persistent_tokens": 0}, slow=True,
        tolerance=3e-4,
    ),
    Case(
        # The gradient of a cubed residual amplifies what bfloat16 rounds, border after border.
        "moneta", "cubes", {"heads": 2, "chunk_size": 4, "gate_rank": 4, "rate_max": 0.01}, bidirectional=False,
        tolerance=3e-4, bfloat16_tolerance=6e-2,
    ),
    Case(
        "yaad", "huber", {"heads": 2, "chunk_size": 4, "gate_rank": 4, "rate_max": 0.01}, bidirectional=False,
        tolerance=3e-4,
    ),
    Case(
        "memora", "softmax", {"heads": 2, "chunk_size": 4, "gate_rank": 4, "rate_max": 0.001}, bidirectional=False,
        tolerance=2e-3,
    ),
]  # fmt: skip

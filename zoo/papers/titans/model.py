"""The language models of Titans."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from zoo.backbones.decoder_lm import DecoderConfig, PaperDecoder, next_token_loss
from zoo.errors import unknown
from zoo.layers.rotary import Rotary
from zoo.mixers.titans import Granularity
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="titans",
    title="Titans: Learning to Memorize at Test Time",
    authors="Ali Behrouz et al.",
    venue="NeurIPS",
    year=2025,
    arxiv="2501.00663",
    claim="A memory that is trained on each token it reads, with momentum and forgetting, recalls at lengths where "
    "attention over a window and linear recurrences do not.",
    fidelity="reconstruction",
    remarks="No official code. The printed MAC leaks the future; the causal form is the default, the literal one "
    "causal=False.",
)

Kind = Literal["lmm", "mac", "mag", "mal"]


@dataclasses.dataclass(frozen=True)
class TitansConfig:
    """A Titans language model.

    Fields:
      kind: "lmm" (the memory alone), "mac", "mag" or "mal" (memory as context, gate or layer of attention).
      vocab_size: token ids.
      dim: width of the residual stream.
      num_layers: number of blocks.
      num_heads: of attention.
      memory_heads: of the memory; None is num_heads.
      mlp_dim: hidden width of the MLP; None is 8 / 3 dim, rounded up to a multiple of 256.
      memory_depth, memory_expansion: layers of a memory (1 is a matrix), its hidden width in widths of a head.
      memory_lr_max: the largest step of the inner training.
      chunk_size: tokens whose gradients are taken at the same weights.
      window: tokens that attention sees in MAG and MAL.
      segment_len: tokens of a segment of MAC.
      num_persistent_tokens: of each layer, in MAC, MAG and MAL.
      num_memory_tokens: of a segment's context in MAC; None, or as many as segment_len or more, is segment_len.
      conv_size: taps of the memory's convolutions; 0 is none.
      momentum, decay: the two parts of the inner training that the ablation takes away.
      gate_granularity: "head", gates of a head and memory layer, or "channel", of each of its output channels.
      gate_rank: of the projections to gates of channels.
      causal: False is MAC as printed.
      pack_last_segment: of MAC, see `zoo.mixers.titans.TitansMAC`; what the shared golden cases do.
      remat: recompute a block in the backward pass instead of keeping its intermediates.

    Raises:
      ValueError: a value is out of range.
    """

    kind: Kind = "lmm"
    vocab_size: int = 32000
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 16
    memory_heads: int | None = None
    mlp_dim: int | None = None
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_lr_max: float = 0.1
    chunk_size: int = 16
    window: int = 2048
    segment_len: int = 512
    num_persistent_tokens: int = 128
    num_memory_tokens: int | None = None
    conv_size: int = 4
    momentum: bool = True
    decay: bool = True
    gate_granularity: Granularity = "head"
    gate_rank: int = 32
    causal: bool = True
    pack_last_segment: bool = False
    remat: bool = False

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise unknown("kind", self.kind, get_args(Kind))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "memory_heads", "mlp_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.causal and self.kind != "mac":
            raise ValueError(f"causal=False is a form of kind 'mac' only, got {self.kind!r}")
        self.decoder  # noqa: B018  raises what is wrong with the rest

    @property
    def decoder(self) -> DecoderConfig:
        """The backbone."""
        options: dict[str, Any] = {
            "memory_depth": self.memory_depth, "memory_expansion": self.memory_expansion,
            "rate_max": self.memory_lr_max, "chunk_size": self.chunk_size, "kernel_size": self.conv_size,
            "momentum": self.momentum, "decay": self.decay, "gate_granularity": self.gate_granularity,
            "gate_rank": self.gate_rank, "causal": self.causal,
        }  # fmt: skip
        if self.kind == "lmm":
            options["heads"] = self.num_heads if self.memory_heads is None else self.memory_heads
        else:
            options |= {"memory_heads": self.memory_heads, "num_persistent_tokens": self.num_persistent_tokens}
        if self.kind == "mac":
            fewer = self.num_memory_tokens is not None and self.num_memory_tokens < self.segment_len
            options |= {
                "segment_len": self.segment_len, "num_memory_tokens": self.num_memory_tokens if fewer else None,
                "pack_last_segment": self.pack_last_segment,
            }  # fmt: skip
        hidden = 256 * -(-8 * self.dim // 768) if self.mlp_dim is None else self.mlp_dim
        return DecoderConfig(
            vocab_size=self.vocab_size, features=self.dim, layers=self.num_layers, heads=self.num_heads,
            mlp="swiglu", mlp_features=hidden, mlp_bias=False, norm="rms", norm_epsilon=1e-6, positions="rotary",
            rotary=Rotary(), qkv_bias=False, out_bias=False, tie_embeddings=True,
            window=self.window if self.kind in ("mag", "mal") else None, mixer=f"titans_{self.kind}",
            mixer_options=options, remat=self.remat,
        )  # fmt: skip


class Titans(PaperDecoder):
    """A language model: `DecoderLM` with a mixer of Titans. All its parameters are under `decoder`.

    Its state is constant in length, but for the window of attention. Memories go on learning at test time; persistent
    tokens do not.
    """

    config: TitansConfig


def example_inputs(config: TitansConfig, batch_size: int) -> dict[str, Any]:
    """Sequences of the published training length."""
    return {"tokens": np.zeros((batch_size, 4096), np.int32)}


def memory_rules() -> list[Rule]:
    """The names of a memory's parameters in the shared golden cases."""
    pairs = {"q": "query", "k": "key", "v": "value"}
    return [
        *(rule for short, ours in (*pairs.items(), ("g", "gate"), ("o", "out"))
          for rule in layer("linear", f"{short}_proj", ours)),
        *(Rule(rf"{short}_conv\.weight", f"params/{ours}_convolution/kernel", "depthwise1d")
          for short, ours in pairs.items()),
        *(rule for name in ("alpha", "eta", "theta") for rule in layer("linear", f"{name}_proj", name)),
        *(rule for name in ("alpha", "eta", "theta") for rule in layer("linear", f"{name}_down", f"{name}_down")),
        Rule(r"memory_weights\.(\d+)", "params/memory/weights_{0}"),
        Rule(r"memory_norm_weight", "params/memory/scale"),
        Rule(r"memory_norm_bias", "params/memory/bias"),
        *layer("norm", "o_norm", "norm/norm"),
    ]  # fmt: skip


def weight_rules(config: TitansConfig) -> list[Rule]:
    """The names of the shared golden cases; no checkpoint was published."""
    mixer = [
        Rule(r"persistent", "params/persistent"),
        *(rule for short, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
          for rule in layer("linear", rf"attn\.{short}_proj", f"attention/{ours}")),
        *layer("norm", "attn_gate_norm", "attention_norm"),
        *layer("norm", "memory_gate_norm", "memory_norm"),
        *under("memory", "memory", memory_rules()),
    ]  # fmt: skip
    if config.kind == "lmm":
        mixer = [dataclasses.replace(rule, published=rf"memory\.{rule.published}") for rule in memory_rules()]
    return [
        Rule(r"embed\.weight", "params/decoder/embed/embedding"),
        *under(
            r"layers\.(\d+)",
            "decoder/layer_{0}",
            [
                *layer("norm", "(norm1|norm2)", "{0}"),
                *layer("linear", r"mlp\.(gate|up|down)_proj", "mlp/{0}"),
                *under("mixer", "mixer", mixer),
            ],
        ),
        *layer("norm", "norm", "decoder/norm"),
    ]


_SIZES: dict[str, dict[str, Any]] = {
    "170m": {"num_layers": 12, "dim": 768, "num_heads": 16},
    "340m": {"num_layers": 24, "dim": 1024, "num_heads": 16},
    "760m": {"num_layers": 24, "dim": 1536, "num_heads": 16},
    "1_3b": {"num_layers": 18, "dim": 2048, "num_heads": 8},
}
_PARAMETERS = {  # of these networks: no published code to count in
    ("lmm", "170m"): 121_162_176,
    ("lmm", "340m"): 381_555_456,
    ("lmm", "760m"): 817_698_816,
    ("lmm", "1_3b"): 1_143_741_792,
    ("mac", "170m"): 150_671_808,
    ("mac", "340m"): 485_413_632,
    ("mac", "760m"): 1_048_983_552,
    ("mac", "1_3b"): 1_450_524_000,
    ("mag", "170m"): 150_671_808,
    ("mag", "340m"): 485_413_632,
    ("mag", "760m"): 1_048_983_552,
    ("mag", "1_3b"): 1_450_524_000,
    ("mal", "170m"): 150_653_376,
    ("mal", "340m"): 485_364_480,
    ("mal", "760m"): 1_048_909_824,
    ("mal", "1_3b"): 1_450_450_272,
}
_KINDS: tuple[Kind, ...] = ("lmm", "mac", "mag", "mal")

register(
    PAPER,
    *(
        Variant(
            f"titans_{kind}_{size}",
            TitansConfig(kind=kind, num_memory_tokens=256 if kind == "mac" else None, **fields),
            _PARAMETERS[kind, size],
        )
        for kind in _KINDS
        for size, fields in _SIZES.items()
    ),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=next_token_loss,
)(Titans)

"""The language models of Miras: Moneta, Yaad, Memora, and their hybrids with attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from zoo.backbones.decoder_lm import DecoderConfig, PaperDecoder, next_token_loss
from zoo.errors import unknown
from zoo.layers.rotary import Rotary
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="miras",
    title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
    "Optimization",
    authors="Ali Behrouz et al.",
    venue="ICLR",
    year=2026,
    arxiv="2504.13173",
    claim="Losses and retentions other than l2 (p-norms, Huber's, softmax) make memories that resist outliers and "
    "recall longer.",
    fidelity="reconstruction",
    remarks="No official code.",
)

Kind = Literal["moneta", "yaad", "memora"]


@dataclasses.dataclass(frozen=True)
class MirasConfig:
    """A Miras language model.

    Fields:
      kind: "moneta", "yaad" or "memora".
      vocab_size: token ids.
      dim: width of the residual stream.
      num_layers: blocks; in a hybrid each has attention and a second MLP too.
      num_heads: of memories and of attention.
      mlp_dim: hidden width of MLPs; None is 8 / 3 dim, rounded up to a multiple of 256.
      memory_expansion: hidden width of a memory, in widths of a head.
      chunk_size: tokens between the borders of a memory.
      gate_rank: of the channel gates' projections.
      p, q: exponents of Moneta's loss and retention.
      eta_max: the largest step.
      hybrid: whether there is attention over a window.
      window: tokens that it sees.
      conv_size: taps of the memory's convolutions; 0 is none.
      remat: recompute a block in the backward pass instead of keeping its intermediates.

    Raises:
      ValueError: a value is out of range.
    """

    kind: Kind = "moneta"
    vocab_size: int = 32000
    dim: int = 768
    num_layers: int = 12
    num_heads: int = 16
    mlp_dim: int | None = None
    memory_expansion: int = 4
    chunk_size: int = 16
    gate_rank: int = 32
    p: float = 3.0
    q: float = 4.0
    eta_max: float = 0.1
    hybrid: bool = False
    window: int = 2048
    conv_size: int = 4
    remat: bool = False

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise unknown("kind", self.kind, get_args(Kind))
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "mlp_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.decoder  # noqa: B018  raises what is wrong with the rest

    @property
    def decoder(self) -> DecoderConfig:
        """The backbone. A hybrid's block is two of it: memory and MLP, attention and MLP."""
        options: dict[str, Any] = {
            "memory_expansion": self.memory_expansion, "chunk_size": self.chunk_size, "gate_rank": self.gate_rank,
            "rate_max": self.eta_max, "kernel_size": self.conv_size,
        }  # fmt: skip
        if self.kind == "moneta":
            options |= {"p": self.p, "q": self.q}
        hidden = 256 * -(-8 * self.dim // 768) if self.mlp_dim is None else self.mlp_dim
        return DecoderConfig(
            vocab_size=self.vocab_size, features=self.dim, layers=self.num_layers * (1 + self.hybrid),
            heads=self.num_heads, mlp="swiglu", mlp_features=hidden, mlp_bias=False, norm="rms", norm_epsilon=1e-6,
            positions="rotary", rotary=Rotary(), qkv_bias=False, out_bias=False, tie_embeddings=True,
            window=self.window if self.hybrid else None, mixer=(self.kind, "softmax") if self.hybrid else self.kind,
            mixer_options=(options, {}) if self.hybrid else options, remat=self.remat,
        )  # fmt: skip


class Miras(PaperDecoder):
    """A language model: `DecoderLM` with a mixer of Miras. All its parameters are under `decoder`.

    Its state is constant in length, but for a hybrid's window. Memories go on learning at test time.
    """

    config: MirasConfig


def example_inputs(config: MirasConfig, batch_size: int) -> dict[str, Any]:
    """Sequences of the published training length."""
    return {"tokens": np.zeros((batch_size, 4096), np.int32)}


def weight_rules(config: MirasConfig) -> list[Rule]:
    """The names of the shared golden cases; no checkpoint was published."""
    names = {"q": "query", "k": "key", "v": "value"}
    mixer = [
        *(rule for short, ours in (*names.items(), ("g", "gate"), ("o", "out"))
          for rule in layer("linear", f"{short}_proj", ours)),
        *(Rule(rf"{short}_conv\.weight", f"params/{ours}_convolution/kernel", "depthwise1d")
          for short, ours in names.items()),
        *layer("linear", r"(alpha|eta)_proj\.(down|up)", "{0}_{1}"),
        *layer("linear", "delta_proj", "delta"),
        Rule(r"memory_weights\.(\d+)", "params/memory/weights_{0}"),
        Rule(r"memory_norm_weight", "params/memory/scale"),
        Rule(r"memory_norm_bias", "params/memory/bias"),
        *layer("norm", "o_norm", "norm/norm"),
    ]  # fmt: skip
    attention = [
        rule
        for short, ours in (*names.items(), ("o", "out"))
        for rule in layer("linear", rf"attn\.{short}_proj", f"mixer/{ours}")
    ]
    rules = [Rule(r"embed\.weight", "params/decoder/embed/embedding"), *layer("norm", "norm", "decoder/norm")]
    for index in range(config.num_layers):
        block = index * (1 + config.hybrid)
        rules += under(
            rf"layers\.{index}",
            f"decoder/layer_{block}",
            [
                *layer("norm", "(norm1|norm2)", "{0}"),
                *under("mixer", "mixer", mixer),
                *layer("linear", r"mlp\.(gate|up|down)_proj", "mlp/{0}"),
            ],
        )
        if config.hybrid:
            rules += under(
                rf"layers\.{index}",
                f"decoder/layer_{block + 1}",
                [
                    *layer("norm", "norm3", "norm1"),
                    *layer("norm", "norm4", "norm2"),
                    *attention,
                    *layer("linear", r"mlp2\.(gate|up|down)_proj", "mlp/{0}"),
                ],
            )
    return rules


_SIZES: dict[str, dict[str, Any]] = {
    "170m": {"num_layers": 12, "dim": 768, "num_heads": 16},
    "340m": {"num_layers": 24, "dim": 1024, "num_heads": 16},
    "780m": {"num_layers": 24, "dim": 1536, "num_heads": 16},
    "1_3b": {"num_layers": 18, "dim": 2048, "num_heads": 8},
}
_KINDS: tuple[Kind, ...] = ("moneta", "yaad", "memora")

register(
    PAPER,
    *(
        Variant(f"miras_{kind}_{size}{'_h' if hybrid else ''}", MirasConfig(kind=kind, hybrid=hybrid, **fields))
        for kind in _KINDS
        for size, fields in _SIZES.items()
        for hybrid in (False, True)
    ),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=next_token_loss,
)(Miras)

"""Based: linear attention over everything, exact attention over little, and short convolutions between.

"Simple linear attention language models balance the recall-throughput tradeoff", Simran Arora, Sabri Eyuboglu, Michael
Zhang, Aman Timalsina, Silas Alberti, Dylan Zinsley, James Zou, Atri Rudra, Christopher Re, ICML 2024, arXiv 2402.18668.
Code: github.com/HazyResearch/based (language models, kernels) and github.com/HazyResearch/zoology (associative recall),
both Apache-2.0.

What a recurrent model can recall is bounded by the size of its state. Based has two dials on it: the features of a
linear attention whose map is the second-order Taylor expansion of exp(q . k / sqrt(d)), and the window of a softmax
attention; gated short convolutions do the local work. Recall against state size is measured by multi-query associative
recall (`zoo.data.recall`).

What the published code does and the paper does not say, and what is therefore done here:
- a window of `window_size` is window_size / 2 previous tokens and the token itself: 129 keys where 256 is said;
- rotary positions are in the window layers only, over the whole head; the other layers have none;
- the first half of the MLP's first projection is the value, the second the gate; hidden widths are rounded up to 256;
- the convolution's kernel has 3 taps whatever `kernel_sizes` says, and no bias;
- `special_initializer` and `fixed_decay` of the published configs have no effect;
- the published prefill of the fused kernels stores states of keys that were not mapped; here prefill, decoding and the
  parallel form are the same numbers;
- in the recall model the state mixer is an identity that passes the second norm on: x + norm2(x), not x;
- a state holds 1 + d + d (d + 1) / 2 features a key, where the published one holds every product twice
  (`published_state` writes it out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from kernels.linear_attention import LinearAttentionState
from zoo import mixers
from zoo.backbones import DecoderConfig
from zoo.backbones.decoder_lm import PaperDecoder, next_token_loss
from zoo.errors import unknown
from zoo.layers.norms import norm
from zoo.layers.partitioning import partitioned
from zoo.layers.rotary import Rotary
from zoo.mixers import Mixer
from zoo.registry import Paper, Variant, register
from zoo.train.recall import recall_loss
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="based",
    title="Simple linear attention language models balance the recall-throughput tradeoff",
    authors="Simran Arora et al.",
    venue="ICML",
    year=2024,
    arxiv="2402.18668",
    claim="Taylor linear attention, small windows and short convolutions recall nearly as attention does, at a small "
    "state.",
    code="https://github.com/HazyResearch/based",
    code_license="Apache-2.0",
    remarks="A published window_size w means w / 2 previous tokens and the token itself.",
)


# ------------------------------------------------------------------------------------------------- language models


@dataclasses.dataclass(frozen=True)
class BasedConfig:
    """A Based language model, or the attention model it is held against.

    Fields:
      vocab_size: token ids; the embedding has as many rows, rounded up to `vocab_multiple`.
      dim: width of the residual stream.
      num_layers, num_heads: their numbers.
      feature_dim: width of a head's queries and keys in linear attention.
      window_size: twice the previous tokens that a window layer sees.
      mlp_dim: hidden width of the MLP, rounded up to a multiple of 256; None is 8 / 3 dim.
      linear_layers, window_layers: indices from 0; the two are disjoint.
      other_layers: what all other layers are, "convolution" or "attention" (over everything).
      rotary_fraction: part of a head that turns, in window layers and attention.

    Raises:
      ValueError: a value is out of range.
    """

    vocab_size: int = 50257
    vocab_multiple: int = 8
    dim: int = 1024
    num_layers: int = 27
    num_heads: int = 16
    feature_dim: int = 16
    window_size: int = 256
    mlp_dim: int | None = 2048
    linear_layers: tuple[int, ...] = (1, 6, 11, 16, 21)
    window_layers: tuple[int, ...] = (2, 7, 12, 17, 22)
    other_layers: Literal["convolution", "attention"] = "convolution"
    rotary_fraction: float = 1.0

    def __post_init__(self):
        for name in ("vocab_size", "vocab_multiple", "dim", "num_layers", "num_heads", "feature_dim", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.window_size < 2 or self.window_size % 2:
            raise ValueError(f"window_size must be even and at least 2, got {self.window_size}")
        listed = (*self.linear_layers, *self.window_layers)
        if len(set(listed)) != len(listed) or not all(0 <= index < self.num_layers for index in listed):
            raise ValueError(
                f"linear_layers and window_layers must be disjoint indices below {self.num_layers}, "
                f"got {self.linear_layers} and {self.window_layers}"
            )
        if self.other_layers not in ("convolution", "attention"):
            raise unknown("kind of other_layers", self.other_layers, ("convolution", "attention"))
        self.decoder  # noqa: B018  raises what is wrong with the rest

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, and logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def decoder(self) -> DecoderConfig:
        """The backbone."""
        hidden = 8 * self.dim // 3 if self.mlp_dim is None else self.mlp_dim
        others = {"convolution": "gated_convolution", "attention": "softmax"}[self.other_layers]

        def of_layer(index: int) -> tuple[str, dict[str, Any]]:
            if index in self.linear_layers:
                return "based", {"feature_dim": self.feature_dim}
            if index in self.window_layers:
                return "softmax", {"window": self.window_size // 2 + 1}
            return others, {}

        names, options = zip(*map(of_layer, range(self.num_layers)), strict=True)
        return DecoderConfig(
            vocab_size=self.padded_vocab_size, features=self.dim, layers=self.num_layers, heads=self.num_heads,
            mlp="swiglu", mlp_features=-(-hidden // 256) * 256, mlp_bias=False, norm="rms", norm_epsilon=1e-5,
            positions="rotary", rotary=Rotary(features=round(self.rotary_fraction * self.dim / self.num_heads)),
            qkv_bias=False, out_bias=False, tie_embeddings=True, float32_residual=True,
            mixer=names, mixer_options=options,
        )  # fmt: skip


class Based(PaperDecoder):
    """A language model: `DecoderLM` with Based's layers. All its parameters are under `decoder`.

    Fields:
      config: see `BasedConfig`.
      dtype: of the computation, published bfloat16; the residual stream is float32 in any case.
      param_dtype: of the parameters.
    """

    config: BasedConfig


def example_inputs(config: BasedConfig, batch_size: int) -> dict[str, Any]:
    """Sequences of the published training length."""
    return {"tokens": np.zeros((batch_size, 2048), np.int32)}


class PublishedState(NamedTuple):
    """The state of a linear attention as the published code keeps it, every product of two features written out."""

    kv_state: jax.Array  # (batch, heads, value width, 1 + d + d^2)
    k_state: jax.Array  # (batch, heads, 1 + d + d^2)


def published_state(state: LinearAttentionState, feature_dim: int) -> PublishedState:
    """Unpacks a state of `kernels.linear_attention` with Taylor's map of d = `feature_dim` channels."""
    first, second = np.triu_indices(feature_dim)
    packed = np.zeros((feature_dim, feature_dim), np.int32)
    packed[first, second] = packed[second, first] = np.arange(len(first))
    index = np.concatenate([np.arange(1 + feature_dim), 1 + feature_dim + packed.reshape(-1)])
    # A packed product of two different channels stands for two.
    twice = ~np.eye(feature_dim, dtype=bool).reshape(-1)
    weight = np.concatenate([np.ones(1 + feature_dim), np.where(twice, 0.5**0.5, 1.0)]).astype(np.float32)
    return PublishedState(state.memory[:, :, index].swapaxes(2, 3) * weight, state.key_sum[..., index] * weight)


def _linear_attention_rules(out: str) -> list[Rule]:
    pairs = {"proj_q": "query", "proj_k": "key", "proj_v": "value", out: "out"}
    return [rule for published, ours in pairs.items() for rule in layer("linear", published, ours)]


_SOFTMAX_RULES = [
    Rule(r"Wqkv\.weight", ("params/query/kernel", "params/key/kernel", "params/value/kernel"), "linear"),
    Rule(r"Wqkv\.bias", ("params/query/bias", "params/key/bias", "params/value/bias")),
    *layer("linear", "out_proj", "out"),
]
_CONVOLUTION_RULES = [
    Rule(r"in_proj\.weight", ("params/in/kernel", "params/gate/kernel"), "linear"),
    Rule(r"in_proj\.bias", ("params/in/bias", "params/gate/bias")),
    Rule(r"conv\.conv\.weight", "params/convolution/kernel", "depthwise1d"),
    *layer("linear", "out_proj", "out"),
]
_BLOCK_RULES = [
    *layer("norm", "(norm1|norm2)", "{0}"),
    Rule(r"mlp\.fc1\.weight", ("params/mlp/up/kernel", "params/mlp/gate/kernel"), "linear"),
    Rule(r"mlp\.fc2\.weight", "params/mlp/down/kernel", "linear"),
]


def weight_rules(config: BasedConfig) -> list[Rule]:
    """The names of the published language models; files of the hub put "model." before them and metrics beside them."""
    root = r"(?:model\.)?transformer"
    of_kind = {"based": _linear_attention_rules("out_proj"), "softmax": _SOFTMAX_RULES}
    names = config.decoder.mixer
    return [
        Rule(r".*metrics.*", None),
        Rule(r"(model\.)?lm_head\.weight", None),  # the embedding
        Rule(rf"{root}\.embeddings\.word_embeddings\.weight", "params/decoder/embed/embedding"),
        *under(rf"{root}\.layers\.(\d+)", "decoder/layer_{0}", _BLOCK_RULES),
        *(
            rule
            for index, name in enumerate(names)
            for rule in under(
                rf"{root}\.layers\.{index}\.mixer",
                f"decoder/layer_{index}/mixer",
                of_kind.get(name, _CONVOLUTION_RULES),
            )
        ),
        *layer("norm", rf"{root}\.ln_f", "decoder/norm"),
    ]


_1B = BasedConfig(
    dim=1792, num_layers=36, mlp_dim=3584, linear_layers=(1, 6, 11, 16, 21, 27, 33),
    window_layers=(2, 7, 12, 17, 22, 28, 34),
)  # fmt: skip
_ATTENTION = BasedConfig(
    num_layers=24, mlp_dim=None, linear_layers=(), window_layers=(), other_layers="attention", rotary_fraction=0.5,
    vocab_multiple=16,
)  # fmt: skip


def _hub(name: str) -> str:
    return f"hf://hazyresearch/{name}/pytorch_model.bin"


register(
    PAPER,
    Variant("based_360m", BasedConfig(), 362_620_928, checkpoint=_hub("based-360m")),
    Variant("based_1b", _1B, 1_349_453_056, checkpoint=_hub("based-1b")),
    Variant("based_1b_50b", _1B, 1_349_453_056, checkpoint=_hub("based-1b-50b")),
    Variant("attn_360m", _ATTENTION, checkpoint=_hub("attn-360m")),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=next_token_loss,
)(Based)


# ------------------------------------------------------------------------------------------------ associative recall

PublishedMixer = Literal["BaseConv", "Based", "SlidingAttn", "MHA"]


@dataclasses.dataclass(frozen=True)
class MQARConfig:
    """The small network of the recall study.

    Fields:
      vocab_size: token ids.
      d_model: width of the residual stream.
      n_layers: number of blocks.
      mixers: of the layers, in turn: published names ("BaseConv"; "Based"; "SlidingAttn", "MHA": softmax attention over
        a window or over everything), or names of `zoo.mixers`.
      num_heads: of mixers that have heads.
      feature_dim: of "Based".
      kernel_size: of "BaseConv".
      block_size: previous tokens that "SlidingAttn" sees beside the token itself.
      max_position_embeddings: rows of a learned table of positions; 0 is no positions.
      mixer_options: of the mixers that are not published ones.

    Raises:
      ValueError, TypeError: a value is out of range, a name or an option unknown.
    """

    vocab_size: int = 8192
    d_model: int = 64
    n_layers: int = 2
    mixers: tuple[str, ...] = ("BaseConv", "Based")
    num_heads: int = 1
    feature_dim: int = 16
    kernel_size: int = 3
    block_size: int = 64
    max_position_embeddings: int = 0
    mixer_options: Mapping[str, Any] = FrozenDict()

    def __post_init__(self):
        object.__setattr__(self, "mixer_options", FrozenDict(self.mixer_options))
        for name in ("vocab_size", "d_model", "n_layers", "num_heads", "feature_dim", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block_size < 0 or self.max_position_embeddings < 0 or not self.mixers:
            raise ValueError("block_size and max_position_embeddings must not be negative, nor mixers empty")
        for index in range(self.n_layers):
            self.make_mixer(index, parent=None)

    def make_mixer(self, index: int, **options: Any) -> Mixer:
        """The mixer of a layer; `options` are more of `zoo.mixers.create`."""
        name = self.mixers[index % len(self.mixers)]
        init = nn.initializers.normal(0.02)
        options |= {"features": self.d_model, "kernel_init": init, "out_init": init}
        attention = {
            "heads": self.num_heads, "qkv_bias": True, "out_bias": True,
            "out_init": nn.initializers.normal(0.02 / (2 * self.n_layers) ** 0.5),
        }  # fmt: skip
        published: dict[str, tuple[str, dict[str, Any]]] = {
            "BaseConv": ("base_convolution", {"kernel_size": self.kernel_size}),
            "Based": ("based", {"heads": self.num_heads, "feature_dim": self.feature_dim, "epsilon": 1e-12}),
            "SlidingAttn": ("softmax", attention | {"window": self.block_size + 1}),
            "MHA": ("softmax", attention),
        }
        if name not in published and name not in mixers.names():
            raise unknown("mixer", name, (*get_args(PublishedMixer), *mixers.names()))
        name, own = published.get(name, (name, dict(self.mixer_options)))
        return mixers.create(name, defaults={"heads": self.num_heads}, **(options | own))


class MQARState(NamedTuple):
    """The past of a batch of sequences."""

    length: jax.Array  # int32 (batch,)
    layers: tuple[mixers.State, ...]


class BasedMQAR(nn.Module):
    """x + mixer(norm1(x)), then x + norm2(x), layer by layer; the head is the embedding.

    Parameters: `embed`, `positions` if there are any, `layer_{i}_{norm1,mixer,norm2}`, `norm`.
    """

    config: MQARConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: see the class's docstring."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)
        embed = partial(nn.Embed, features=config.d_model, **options)
        self.embed = embed(num_embeddings=config.vocab_size, embedding_init=partitioned(init, "vocab", "embed"))
        if config.max_position_embeddings:
            rows = config.max_position_embeddings
            self.positions = embed(num_embeddings=rows, embedding_init=partitioned(init, None, "embed"))
        layer_norm = partial(norm, "layer", epsilon=1e-5, **options)
        self.norm1 = [layer_norm(name=f"layer_{index}_norm1") for index in range(config.n_layers)]
        self.mixer = [
            config.make_mixer(index, name=f"layer_{index}_mixer", **options) for index in range(config.n_layers)
        ]
        self.norm2 = [layer_norm(name=f"layer_{index}_norm2") for index in range(config.n_layers)]
        self.norm = layer_norm()

    def __call__(
        self, tokens: jax.Array, state: MQARState | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, MQARState | None]:
        """Logits (batch, time, vocab_size) at each of the tokens (batch, time), and the next state.

        Raises:
          ValueError, TypeError: the tokens' shape or dtype is wrong, or there are more than positions.
        """
        x, state = self.hidden(tokens, state, deterministic=deterministic)
        return self.logits(x), state

    def hidden(
        self, tokens: jax.Array, state: MQARState | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, MQARState | None]:
        """What the head sees: (batch, time, d_model), and the next state; see `__call__`."""
        config = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers (batch, time), got {tokens.dtype} {tokens.shape}")
        if 0 < config.max_position_embeddings < tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the {config.max_position_embeddings} positions")
        x = self.embed(tokens)
        length = jnp.zeros(tokens.shape[0], jnp.int32) if state is None else state.length
        if config.max_position_embeddings:
            x = x + self.positions(length[:, None] + jnp.arange(tokens.shape[1]))
        states = []
        for index in range(config.n_layers):
            past = None if state is None else state.layers[index]
            y, past = self.mixer[index](self.norm1[index](x), past, deterministic=deterministic)
            x = x + y
            x = x + self.norm2[index](x)
            states.append(past)
        return self.norm(x), None if state is None else MQARState(length + tokens.shape[1], tuple(states))

    def logits(self, x: jax.Array) -> jax.Array:
        """The head: (..., d_model) to float32 (..., vocab_size)."""
        embedding = self.embed.embedding.astype(x.dtype)
        return jnp.einsum("...f,vf->...v", x, embedding, preferred_element_type=jnp.float32)

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> MQARState:
        """The empty past of `batch_size` sequences of up to `length` tokens."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "parent": None}
        stack = [self.config.make_mixer(index, **options) for index in range(self.config.n_layers)]
        return MQARState(
            jnp.zeros(batch_size, jnp.int32), tuple(mixer.init_state(batch_size, length) for mixer in stack)
        )


def mqar_example_inputs(config: MQARConfig, batch_size: int) -> dict[str, Any]:
    """Sequences of the shortest published length."""
    return {"tokens": np.zeros((batch_size, 64), np.int32)}


def mqar_example_targets(config: MQARConfig, batch_size: int) -> dict[str, Any]:
    """Labels of the same shape."""
    return {"labels": np.zeros((batch_size, 64), np.int32)}


def mqar_weight_rules(config: MQARConfig) -> list[Rule]:
    """The names of the published recall models."""
    of_kind = {
        "BaseConv": [
            *layer("linear", "projection", "projection"),
            Rule(r"conv\.conv\.weight", "params/convolution/kernel", "depthwise1d"),
            Rule(r"conv\.conv\.bias", "params/convolution/bias"),
        ],
        "Based": _linear_attention_rules("proj_o"),
        "SlidingAttn": _SOFTMAX_RULES,
        "MHA": _SOFTMAX_RULES,
    }
    names = [config.mixers[index % len(config.mixers)] for index in range(config.n_layers)]
    return [
        Rule(r"lm_head\.weight", None),  # the embedding
        Rule(r"backbone\.embeddings\.word_embeddings\.weight", "params/embed/embedding"),
        Rule(r"backbone\.embeddings\.position_embeddings\.weight", "params/positions/embedding"),
        *layer("norm", r"backbone\.layers\.(\d+)\.(norm1|norm2)", "layer_{0}_{1}"),
        *(
            rule
            for index, name in enumerate(names)
            for rule in under(
                rf"backbone\.layers\.{index}\.sequence_mixer\.mixer", f"layer_{index}_mixer", of_kind.get(name, [])
            )
        ),
        *layer("norm", r"backbone\.ln_f", "norm"),
    ]


register(
    PAPER,
    Variant("based_mqar", MQARConfig()),
    *(
        Variant(f"based_mqar_d{width}_f{features}", MQARConfig(d_model=width, feature_dim=features))
        for width in (48, 64, 128)
        for features in (8, 16, 24)
    ),
    example_inputs=mqar_example_inputs,
    weight_rules=mqar_weight_rules,
    loss=recall_loss,
    example_targets=mqar_example_targets,
)(BasedMQAR)

"""The decoder-only language model that GPT-2, OPT, Llama, Mistral and Qwen2 share, with any mixer.

    x = embedding of tokens (+ of positions)
    x = x + mixer(norm1(x));  x = x + mlp(norm2(x))        layer by layer
    logits = norm(x) E^T, or norm(x) W where embeddings are not tied

Parameters: `embed`, `positions` if learned, `layer_{i}/{norm1,mixer,norm2,mlp}`, `norm`, `head` if not tied. With
`flax.linen.intercept_methods` the residual stream is what `layer_{i}` takes and gives, its middle what `norm2` takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import mixers
from zoo.backbones.transformer import TransformerConfig, check_positive, make_blocks
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense, keep_batch_cut, partitioned
from zoo.layers.positions import fairseq_sinusoids
from zoo.layers.rotary import Rotary
from zoo.weights import int8

_GPT2 = {
    "vocab_size": 50257, "max_length": 1024, "mlp": "gelu_tanh", "norm": "layer", "norm_epsilon": 1e-5,
    "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
_LLAMA = {
    "mlp": "swiglu", "norm": "rms", "norm_epsilon": 1e-5, "positions": "rotary", "qkv_bias": False, "out_bias": False,
    "mlp_bias": False, "tie_embeddings": False,
}  # fmt: skip
_LLAMA2 = _LLAMA | {"vocab_size": 32000, "max_length": 4096}
_SMOLLM2 = _LLAMA | {"vocab_size": 49152, "max_length": 8192, "tie_embeddings": True, "rotary": Rotary(theta=100_000.0)}


def _size(layers: int, features: int, heads: int, mlp_features: int, key_heads: int | None = None) -> dict[str, Any]:
    return {
        "layers": layers, "features": features, "heads": heads, "key_heads": key_heads, "mlp_features": mlp_features,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(TransformerConfig):
    """A decoder-only language model; `DecoderConfig.preset("llama3_8b", mixer=...)` for the published ones.

    Fields beside those of `TransformerConfig`:
      vocab_size: number of token ids.
      max_length: the most tokens of a sequence, past included, and the rows of a learned table of positions; None is
        no bound.
      positions: "learned", "sinusoidal" (fairseq's: `zoo.layers.positions.fairseq_sinusoids`), "rotary" or "none".
      position_offset: rows of the learned table before that of position 0 (OPT: 2).
      tie_embeddings: the head's matrix is the embedding's.
      embedding_scale: factor of the embeddings (Gemma: sqrt(features)).
      logit_softcap: c caps the vocabulary's logits to c tanh(logits / c) (Gemma 2), or None.
      float32_residual: the residual stream is float32 also where the computation is not.
      embedding_dropout: of the embeddings; None is `dropout`.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("learned", "sinusoidal", "rotary", "none")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2": _GPT2 | _size(12, 768, 12, 3072),
        "gpt2_medium": _GPT2 | _size(24, 1024, 16, 4096),
        "gpt2_large": _GPT2 | _size(36, 1280, 20, 5120),
        "gpt2_xl": _GPT2 | _size(48, 1600, 25, 6400),
        "llama2_7b": _LLAMA2 | _size(32, 4096, 32, 11008),
        "llama2_13b": _LLAMA2 | _size(40, 5120, 40, 13824),
        "llama3_8b": _LLAMA
        | _size(32, 4096, 32, 14336, key_heads=8)
        | {"vocab_size": 128256, "max_length": 8192, "rotary": Rotary(theta=500_000.0)},
        "mistral_7b": _LLAMA
        | _size(32, 4096, 32, 14336, key_heads=8)
        | {"vocab_size": 32000, "max_length": 32768, "window": 4096},
        "qwen2_0_5b": _LLAMA
        | _size(24, 896, 14, 4864, key_heads=2)
        | {
            "vocab_size": 151936, "max_length": 32768, "rotary": Rotary(theta=1_000_000.0), "norm_epsilon": 1e-6,
            "qkv_bias": True, "tie_embeddings": True,
        },
        "smollm2_135m": _SMOLLM2 | _size(30, 576, 9, 1536, key_heads=3),
        "smollm2_360m": _SMOLLM2 | _size(32, 960, 15, 2560, key_heads=5),
        "smollm2_1_7b": _SMOLLM2 | _size(24, 2048, 32, 8192) | {"rotary": Rotary(theta=130_000.0)},
    }  # fmt: skip

    vocab_size: int
    max_length: int | None = None
    norm_epsilon: float = 1e-5
    positions: str = "rotary"
    position_offset: int = 0
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    float32_residual: bool = False
    embedding_dropout: float | None = None
    causal: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "vocab_size", "max_length", "logit_softcap")
        if self.embedding_dropout is not None and not 0.0 <= self.embedding_dropout < 1.0:
            raise ValueError(f"embedding_dropout must be None or in [0, 1), got {self.embedding_dropout}")
        if self.positions == "learned" and self.max_length is None:
            raise ValueError("learned positions need max_length, the rows of their table")

    @property
    def out_init(self) -> Callable:
        """Smaller by sqrt(2 layers), the number of branches that add up (Radford et al. 2019, section 2.3)."""
        return nn.initializers.normal(self.init_std / (2 * self.layers) ** 0.5)


class DecoderState(NamedTuple):
    """The past of a batch of sequences."""

    length: jax.Array  # int32 (batch,), valid tokens seen so far
    layers: tuple[mixers.State, ...]


class DecoderLM(nn.Module):
    """A decoder-only language model.

    config = DecoderConfig.preset("gpt2", mixer="softmax", window=256)
    model = DecoderLM(config, dtype=jnp.bfloat16)

    Fields:
      config: see `DecoderConfig`.
      dtype: of the computation; None is float32 or the parameters' dtype. Statistics of norms, softmax and logits are
        float32 in any case.
      param_dtype: of the parameters.
    """

    config: DecoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: see the module's docstring."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=config.features, **options)
        self.embed = embed(config.vocab_size, embedding_init=partitioned(config.kernel_init, "vocab", "embed"))
        if config.positions == "learned":
            rows = config.max_length + config.position_offset
            self.positions = embed(rows, embedding_init=partitioned(config.kernel_init, None, "embed"))
        self.dropout = Dropout(config.dropout if config.embedding_dropout is None else config.embedding_dropout)
        self.layer = make_blocks(config, **options)
        if config.norm_position == "pre":
            self.norm = config.make_norm(**options)
        if not config.tie_embeddings:
            self.head = dense(
                config.vocab_size, ("embed", "vocab"), use_bias=False, kernel_init=config.kernel_init,
                dot_general=partial(jax.lax.dot_general, preferred_element_type=jnp.float32), **options,
            )  # fmt: skip

    def __call__(
        self,
        tokens: jax.Array,
        state: DecoderState | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, DecoderState | None]:
        """Logits of the token after each.

        Args:
          tokens: integers (batch, time) below vocab_size.
          state: the past, from `init_state` or an earlier call; None is the empty past in parallel form.
          valid: bool (batch, time), False for padding (on any side); its logits mean nothing, but are finite.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          float32 (batch, time, vocab_size), and the state after these tokens (None if `state` was None).

        Raises:
          ValueError, TypeError: an argument's shape or dtype is wrong, or more than max_length tokens. Outside of
            `jit`, where values are known, also: a token is not in 0 .. vocab_size - 1, the past and the new tokens are
            more than max_length. Within `jit` logits are then NaN (learned positions) or those of an untrained
            position.
        """
        x, state = self.hidden(tokens, state, valid=valid, deterministic=deterministic)
        return self.logits(x), state

    def hidden(
        self,
        tokens: jax.Array,
        state: DecoderState | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
        mixer_arguments: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> tuple[jax.Array, DecoderState | None]:
        """What the head sees: (batch, time, features) after the last norm, and the next state.

        Args:
          tokens, state, valid, deterministic: see `__call__`.
          mixer_arguments: further arguments of each layer's mixer, None for a layer that is left out; None is none.
        """
        config = self.config
        _check(config, tokens, state, valid)
        positions = mixers.token_positions(tokens.shape, valid, None if state is None else state.length)
        length = positions.max(axis=1) + 1
        if state is not None:
            length = jnp.maximum(state.length, length)
        _check_length(config, length)

        x = self.embed(tokens) * config.embedding_scale
        if config.float32_residual:
            x = x.astype(jnp.float32)
        if config.positions == "learned":
            x = x + self.positions(jnp.maximum(positions, 0) + config.position_offset)
        elif config.positions == "sinusoidal":
            x = x + fairseq_sinusoids(jnp.maximum(positions, 0), config.features).astype(x.dtype)
        x = self.dropout(x, train=not deterministic)
        states = []
        for layer, block in enumerate(self.layer):
            past = None if state is None else state.layers[layer]
            more = {} if mixer_arguments is None else mixer_arguments[layer]
            if more is not None:
                x, past = block(x, past, valid, deterministic, **more)
            states.append(past)
        if config.norm_position == "pre":
            x = self.norm(x)
        return x, None if state is None else DecoderState(length, tuple(states))

    def logits(self, x: jax.Array) -> jax.Array:
        """The head: (..., features) from `hidden` to float32 (..., vocab_size)."""
        if self.config.tie_embeddings:
            embedding = self.embed.embedding
            dot_general = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
            if isinstance(embedding, int8.Int8):
                logits = int8.product(x, embedding, transposed=True, dot_general=dot_general)
            else:
                logits = jnp.einsum("...f,vf->...v", x, embedding.astype(x.dtype), preferred_element_type=jnp.float32)
        else:
            logits = self.head(x)
        logits = keep_batch_cut(logits.astype(jnp.float32))
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
        return logits

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> DecoderState:
        """The empty past of `batch_size` sequences of up to `length` tokens; needs no parameters.

        Raises:
          ValueError: `length` is more than max_length, or a size not positive.
        """
        config = self.config
        if config.max_length is not None and length > config.max_length:
            raise ValueError(f"a state of {length} tokens is longer than max_length {config.max_length}")
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "parent": None}
        stack = [config.make_mixer(layer, **options) for layer in range(config.layers)]
        return DecoderState(
            jnp.zeros(batch_size, jnp.int32), tuple(mixer.init_state(batch_size, length) for mixer in stack)
        )


class PaperDecoder(nn.Module):
    """A paper's language model: the `DecoderLM` that its config's property `decoder` describes, under `decoder`.

    Fields: those of `DecoderLM`; a subclass annotates `config` with its own type.
    """

    config: Any
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """The backbone."""
        self.decoder = DecoderLM(self.config.decoder, self.dtype, self.param_dtype)

    def __call__(
        self,
        tokens: jax.Array,
        state: DecoderState | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, DecoderState | None]:
        """Logits (batch, time, vocabulary) of the token after each, and the next state; see `DecoderLM`."""
        return self.decoder(tokens, state, valid=valid, deterministic=deterministic)

    def hidden(
        self, tokens: jax.Array, state: DecoderState | None = None, *, valid: jax.Array | None = None
    ) -> tuple[jax.Array, DecoderState | None]:
        """What the head sees, (batch, time, features), and the next state; see `DecoderLM`."""
        return self.decoder.hidden(tokens, state, valid=valid)

    def logits(self, x: jax.Array) -> jax.Array:
        """The head: (..., features) from `hidden` to float32 (..., vocabulary)."""
        return self.decoder.logits(x)

    @nn.nowrap
    def init_state(self, batch_size: int, length: int) -> DecoderState:
        """The empty past of `batch_size` sequences of up to `length` tokens; see `DecoderLM`."""
        return DecoderLM(self.config.decoder, self.dtype, self.param_dtype, parent=None).init_state(batch_size, length)


def next_token_loss(model: nn.Module) -> Callable:
    """The training loss: mean cross entropy of batch["tokens"] (batch, time) but the first, for `zoo.train`."""

    def loss(params, model_state, batch, rngs, train):
        tokens = batch["tokens"]
        logits, _ = model.apply({"params": params, **model_state}, tokens, deterministic=not train, rngs=rngs)
        value = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
        return value, (model_state, {"perplexity": jnp.exp(value)})

    return loss


def _check(config: DecoderConfig, tokens: jax.Array, state: DecoderState | None, valid: jax.Array | None) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be (batch, time) and not empty, got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if config.max_length is not None and tokens.shape[1] > config.max_length:
        raise ValueError(f"{tokens.shape[1]} tokens are more than max_length {config.max_length}")
    if valid is not None and (valid.shape != tokens.shape or valid.dtype != jnp.bool_):
        raise ValueError(f"valid must be bool (batch, time) = {tokens.shape}, got {valid.dtype} {valid.shape}")
    if state is not None:
        if not isinstance(state, DecoderState) or len(state.layers) != config.layers:
            raise TypeError(f"state must be a DecoderState of {config.layers} layers, from init_state")
        if state.length.shape != tokens.shape[:1]:
            raise ValueError(f"tokens have a batch of {tokens.shape[0]}, the state one of {state.length.shape[0]}")
    if not isinstance(tokens, jax.core.Tracer):
        values = np.asarray(tokens)  # known, also where a trace has closed over them
        low, high = values.min(), values.max()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"tokens must be in 0 .. {config.vocab_size - 1}, got {low} .. {high}")


def _check_length(config: DecoderConfig, length: jax.Array) -> None:
    if config.max_length is None or isinstance(length, jax.core.Tracer):
        return
    if int(length.max()) > config.max_length:
        raise ValueError(f"{int(length.max())} tokens, past included, are more than max_length {config.max_length}")

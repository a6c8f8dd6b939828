"""BERT's encoder (Devlin et al. 2019) with a mean over its tokens: sentences as vectors (Reimers and Gurevych 2019)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.backbones.encoder import Encoder, EncoderConfig
from zoo.layers.dropout import Dropout
from zoo.layers.norms import norm
from zoo.layers.partitioning import partitioned
from zoo.weights.names import Rule, layer, under


@dataclasses.dataclass(frozen=True)
class SentenceEncoderConfig:
    """A BERT encoder of sentences.

    Fields:
      encoder: its blocks.
      vocab_size: number of token ids.
      max_length: rows of the table of positions, the most tokens of a sentence.
      token_types: rows of the table of token types, of which sentences use the first.
    """

    encoder: EncoderConfig = EncoderConfig(
        features=384, layers=6, heads=12, mlp_features=1536, norm_epsilon=1e-12, norm_position="post"
    )
    vocab_size: int = 30522
    max_length: int = 512
    token_types: int = 2


class SentenceEncoder(nn.Module):
    """Embeddings of tokens, positions and token type, their norm, the blocks, and the mean of the valid tokens.

    Fields:
      config: see `SentenceEncoderConfig`.
      dtype: of the computation; None is float32 or the parameters' dtype.
      param_dtype: of the parameters.
    """

    config: SentenceEncoderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters."""
        config = self.config.encoder
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = partial(nn.Embed, features=config.features, **options)
        self.embed = embed(
            self.config.vocab_size, embedding_init=partitioned(config.kernel_init, "vocab", "embed")
        )  # fmt: skip
        table = partitioned(config.kernel_init, None, "embed")
        self.positions = embed(self.config.max_length, embedding_init=table)
        self.types = embed(self.config.token_types, embedding_init=table)
        self.norm = norm("layer", epsilon=config.norm_epsilon, **options)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config, **options)

    def __call__(
        self, tokens: jax.Array, valid: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Sentences as vectors.

        Args:
          tokens: int32 (batch, time), with [CLS] and [SEP].
          valid: bool (batch, time), False for padding on the right; None is all True.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          (batch, features) of length 1, and the tokens' features (batch, time, features).

        Raises:
          ValueError, TypeError: a shape or dtype is wrong, or more than max_length tokens.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers (batch, time), got {tokens.dtype} {tokens.shape}")
        time = tokens.shape[1]
        if not 0 < time <= self.config.max_length:
            raise ValueError(f"a sentence has 1 to {self.config.max_length} tokens, got {time}")
        valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid)
        x = self.embed(tokens) + self.positions(jnp.arange(time)) + self.types(jnp.zeros((), jnp.int32))
        x = self.dropout(self.norm(x), not deterministic)
        x = self.encoder(x, valid=valid, deterministic=deterministic)
        weights = valid[..., None].astype(jnp.float32)
        mean = jnp.sum(x * weights, axis=1) / jnp.maximum(weights.sum(axis=1), 1)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12), x


def sentence_encoder_rules(config: SentenceEncoderConfig) -> list[Rule]:
    """Names of BERT checkpoints of the transformers library, with or without their prefix "bert."."""
    prefix = r"(?:bert\.)?"
    block = [
        *layer("linear", r"attention\.self\.(query|key|value)", "mixer/{0}"),
        *layer("linear", r"attention\.output\.dense", "mixer/out"),
        *layer("norm", r"attention\.output\.LayerNorm", "norm1"),
        *layer("linear", r"intermediate\.dense", "mlp/up"),
        *layer("linear", r"output\.dense", "mlp/down"),
        *layer("norm", r"output\.LayerNorm", "norm2"),
    ]
    return [
        *layer("embedding", prefix + r"embeddings\.word_embeddings", "embed"),
        *layer("embedding", prefix + r"embeddings\.position_embeddings", "positions"),
        *layer("embedding", prefix + r"embeddings\.token_type_embeddings", "types"),
        *layer("norm", prefix + r"embeddings\.LayerNorm", "norm"),
        Rule(prefix + r"embeddings\.position_ids", None),
        *under(prefix + r"encoder\.layer\.(\d+)", "encoder/layer_{0}", block),
        Rule(prefix + r"pooler\.dense\.(weight|bias)", None),  # of next-sentence prediction
    ]

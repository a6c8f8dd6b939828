"""Five designs of an embedding model in one config, read off the layers of a decoder; and published names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.checkpoints import decoder_rules
from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM
from zoo.backbones.transformer import Block
from zoo.errors import unknown
from zoo.layers import lora
from zoo.layers.convolution import torch_kernel_init
from zoo.mixers import token_positions
from zoo.mixers.softmax import SoftmaxAttention
from zoo.papers.pooling_attention.pooling import LatentPooling, PoolingConfig, unit
from zoo.weights.names import Rule, layer

Pooled = Literal["last", "mean", "weighted_mean", "mean_without_first", "tokens"]
_T = TypeVar("_T")

# What sets the paper's designs apart; all else is the same.
DESIGNS: Mapping[int, Mapping[str, Any]] = {
    1: {"causal": True, "pooled": "last", "pooled_layers": "last", "pool_latents": None},
    2: {"causal": True, "pooled": "last", "pooled_layers": "last"},
    3: {"causal": True, "pooled": "last", "pooled_layers": "all"},
    4: {"causal": False, "pooled": "tokens", "pooled_layers": "last"},
    5: {"causal": False, "pooled": "mean", "pooled_layers": "all"},
}
_BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "mistral_7b": {"pool_layers": 32},
    "qwen2_0_5b": {"pool_layers": 32},  # of which its 24 layers use the first
    "smollm2_135m": {"pool_layers": 30, "pool_heads": 4, "pool_head_dim": 64, "pool_latents": 16},
}


def _presets() -> dict[str, Mapping[str, Any]]:
    return {
        f"embedder_{number}_{backbone}": {**DecoderConfig.PRESETS[backbone], **sizes, **design}
        for backbone, sizes in _BACKBONES.items()
        for number, design in DESIGNS.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedderConfig(DecoderConfig):
    """A decoder and what is made of its layers; `EmbedderConfig.preset("embedder_5_mistral_7b")`, or `DESIGNS`.

    Fields beside those of `DecoderConfig` (of which `causal` is the design's, and `tie_embeddings` means nothing):
      pooled: of a layer's token vectors, what is pooled further: the last valid token's, the mean of the valid ones,
        their mean with weights 1, 2, 3, ..., their mean without the first (where there is more than one), or all.
      pooled_layers: of the last layer (after the final norm), or of all but the embedding.
      pool_latents, pool_heads, pool_head_dim: of the pooling network; latents None is none, the vector is only divided
        by its length.
      pool_layers: rows of the matrix of layers (for pooled_layers "all"); None is `layers`.
      mask_padding: False is design 4 as published: padding is no key within the decoder, but queries there, and is
        pooled, so that a text's embedding depends on what else is in its batch.
      lora_rank, lora_alpha, lora_dropout: of the adapters of all projections; rank None is none.

    Raises:
      ValueError: see `DecoderConfig`; all layers or tokens without a pooling network; tokens of all layers; fewer rows
        than layers; mask_padding False but for tokens.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = _presets()

    pooled: Pooled = "last"
    pooled_layers: Literal["last", "all"] = "last"
    pool_latents: int | None = 768
    pool_heads: int = 32
    pool_head_dim: int = 2048
    pool_layers: int | None = None
    mask_padding: bool = True
    lora_rank: int | None = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("pooled", get_args(Pooled)), ("pooled_layers", ("last", "all"))):
            if getattr(self, name) not in known:
                raise unknown(f"choice of {name}", getattr(self, name), known)
        whole = self.pooled_layers == "all"
        if self.pool_latents is None and (whole or self.pooled == "tokens"):
            raise ValueError(f"{'all layers' if whole else 'tokens'} need a pooling network: pool_latents is None")
        if whole and self.pooled == "tokens":
            raise ValueError("tokens are pooled of the last layer, or all layers of one vector each")
        if whole and self.pool_layers is not None and self.pool_layers < self.layers:
            raise ValueError(f"pool_layers = {self.pool_layers} rows are fewer than {self.layers} layers")
        if not self.mask_padding and self.pooled != "tokens":
            raise ValueError(f"mask_padding = False is for pooled = 'tokens', got {self.pooled!r}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be None or positive, got {self.lora_rank}")
        _ = self.pooling, self.adapters  # which refuse wrong sizes

    @property
    def pooling(self) -> PoolingConfig | None:
        """The pooling network's sizes."""
        if self.pool_latents is None:
            return None
        rows = (self.pool_layers or self.layers) if self.pooled_layers == "all" else None
        return PoolingConfig(
            dim=self.features, heads=self.pool_heads, head_dim=self.pool_head_dim, latents=self.pool_latents,
            layers=rows,
        )  # fmt: skip

    @property
    def adapters(self) -> lora.LoRA | None:
        """The adapters of the decoder's projections."""
        if self.lora_rank is None:
            return None
        return lora.LoRA(
            self.lora_rank, self.lora_alpha / self.lora_rank, self.lora_dropout, r"layer_\d+/(mixer|mlp)/",
            left_init=torch_kernel_init,
        )  # fmt: skip


class Embedder(nn.Module):
    """Texts as unit vectors: a decoder, adapted and causal or not, and a pooling network or none.

    With causal=False every token sees every other (with a window W those at |i - j| < W), whatever kernel runs.

    Fields:
      config: see `EmbedderConfig`.
      dtype: of the decoder's computation; None is float32 or the parameters' dtype. Pooling is float32.
      param_dtype: of the decoder's parameters and adapters. Those of pooling are float32.
    """

    config: EmbedderConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: decoder, pooling."""
        self.decoder = DecoderLM(self.config, self.dtype, self.param_dtype)
        if self.config.pooling is not None:
            self.pooling = LatentPooling(self.config.pooling)

    def __call__(self, tokens: jax.Array, valid: jax.Array | None = None, *, deterministic: bool = True) -> jax.Array:
        """Embeddings.

        Args:
          tokens: integers (batch, time), each text's last one its end-of-text token.
          valid: bool (batch, time), False for padding, on any side; None is all True.
          deterministic: no dropout. Otherwise the rng collection "dropout" is needed.

        Returns:
          float32 (batch, features), rows of length 1.

        Raises:
          ValueError, TypeError: see `DecoderLM`; or dropout without its rng.
        """
        return self.pool(*self.vectors(tokens, valid, deterministic=deterministic))

    def vectors(
        self, tokens: jax.Array, valid: jax.Array | None = None, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """What is pooled, float32 (batch, count, features): a vector, one a layer, or one a token with its mask."""
        config = self.config
        adapters = config.adapters
        if adapters is not None and deterministic:
            adapters = dataclasses.replace(adapters, dropout=0.0)
        elif adapters is not None and adapters.dropout and not self.has_rng("dropout"):
            raise ValueError("dropout needs rngs={'dropout': key}; deterministic=True is without")
        seen = valid if config.mask_padding else None

        def reduce(x: jax.Array) -> jax.Array:
            return x.astype(jnp.float32) if config.pooled == "tokens" else reduced(x, config.pooled, valid)[:, None]

        with contextlib.ExitStack() as contexts:
            if adapters is not None:
                contexts.enter_context(lora.adapted(adapters))
            if seen is None and valid is not None:
                contexts.enter_context(nn.intercept_methods(_hide_keys(jnp.asarray(valid))))
            if config.pooled_layers == "all":
                layers = _residuals(self.decoder, tokens, seen, reduce, deterministic)[1:]
                return jnp.concatenate(layers, axis=1), None
            x, _ = self.decoder.hidden(tokens, valid=seen, deterministic=deterministic)
        return reduce(x), seen if config.pooled == "tokens" else None

    def pool(self, vectors: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """From `vectors` to the embeddings."""
        return unit(vectors[:, 0]) if self.config.pooling is None else self.pooling(vectors, mask)


def reduced(x: jax.Array, pooled: str, valid: jax.Array | None = None) -> jax.Array:
    """One vector of each text's tokens, float32.

    Args:
      x: (batch, time, features).
      pooled: "last", "mean", "weighted_mean" or "mean_without_first", see `EmbedderConfig`.
      valid: bool (batch, time), False for padding; None is all True.

    Returns:
      (batch, features).

    Raises:
      ValueError: another name.
    """
    place = jnp.broadcast_to(token_positions(x.shape[:2], valid), x.shape[:2])  # -1 for padding
    last = place.max(axis=1, keepdims=True)
    weights = {
        "last": place == last,
        "mean": place >= 0,
        "weighted_mean": place + 1,
        "mean_without_first": place >= jnp.minimum(last, 1),
    }
    if pooled not in weights:
        raise unknown("way to pool tokens", pooled, weights)
    weight = weights[pooled].astype(jnp.float32)
    weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bt,btf->bf", weight, x.astype(jnp.float32))


def layer_vectors(
    model: DecoderLM, variables: Mapping[str, Any], tokens: jax.Array, valid: jax.Array | None = None,
    *, pooled: Sequence[str] = ("last",),
) -> dict[str, jax.Array]:  # fmt: skip
    """Vectors of all layers at once, for the analysis of layers: (batch, layers + 1, features) float32 by way to pool.

    The first is the embedding's, which the paper does not pool; the last is after the final norm. Token vectors are
    reduced layer by layer, and never kept.

    Args:
      model: a decoder; causal or not as its config says.
      variables: of the model.
      tokens, valid: as of `Embedder`.
      pooled: ways, as of `reduced`.

    Raises:
      ValueError: the decoder is rematerialised.
    """

    def read(decoder: DecoderLM) -> list[dict[str, jax.Array]]:
        return _residuals(decoder, tokens, valid, lambda x: {name: reduced(x, name, valid) for name in pooled}, True)

    found: Any = model.apply(variables, method=read)
    return {name: jnp.stack([one[name] for one in found], axis=1) for name in pooled}


def _residuals(
    decoder: DecoderLM, tokens: jax.Array, valid: jax.Array | None, reduce: Callable[[jax.Array], _T],
    deterministic: bool,
) -> list[_T]:  # fmt: skip
    """`reduce` of the embedding, of every block's output, and of the last's after the final norm."""
    if decoder.config.remat:
        raise ValueError("layers are read between blocks, which remat = True hides; `in_chunks` saves memory too")
    found: list[_T] = []

    def keep(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Block) and context.method_name == "__call__":
            found.append(reduce(arguments[0]))
        return call(*arguments, **options)

    with nn.intercept_methods(keep):
        x, _ = decoder.hidden(tokens, valid=valid, deterministic=deterministic)
    return [*found, reduce(x)]


def _hide_keys(valid: jax.Array) -> Callable:
    """An interceptor by which no token attends to padding, but padding attends to tokens, as published."""

    def intercept(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "attend" or not isinstance(context.module, SoftmaxAttention):
            return call(*arguments, **options)
        query, key, value, mask = arguments
        segments = valid.astype(jnp.int32)
        hidden = {"query_segment_ids": jnp.ones_like(segments), "key_segment_ids": segments}
        return call(query, key, value, {**mask, **hidden}, **options)

    return intercept


def pooling_rules(config: PoolingConfig | None = None) -> list[Rule]:
    """Names of the published pooling network (`attn_pool.pt`), in a whole embedder's with the prefix "attn_pool."."""
    attend, feed = (rf"(?:attn_pool\.)?cross_attend_blocks\.{block}\." for block in (0, 1))
    both = tuple(f"params/{name}" for name in ("up", "gate"))
    return [
        Rule(r"(?:attn_pool\.)?latents", "params/latents"),
        Rule(r"(?:attn_pool\.)?pos_emb\.weight", "params/layer_weights"),
        *layer("norm", attend + "norm", "norm_inputs"),
        *layer("norm", attend + "norm_context", "norm_latents"),
        Rule(attend + r"fn\.to_q\.weight", "params/query/kernel", "linear"),
        Rule(attend + r"fn\.to_kv\.weight", ("params/key/kernel", "params/value/kernel"), "linear"),
        Rule(attend + r"fn\.to_out\.weight", "params/out/kernel", "linear"),
        *layer("norm", feed + "norm", "norm_mlp"),
        Rule(feed + r"fn\.net\.0\.weight", tuple(f"{path}/kernel" for path in both), "linear"),
        Rule(feed + r"fn\.net\.0\.bias", tuple(f"{path}/bias" for path in both)),
        *layer("linear", feed + r"fn\.net\.2", "down"),
    ]


_PROJECTIONS = {
    **{f"self_attn.{name}_proj": f"mixer/{ours}" for name, ours in zip("qkvo", ("query", "key", "value", "out"),
                                                                         strict=True)},
    **{f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")},
}  # fmt: skip


def adapter_rules() -> list[Rule]:
    """Names of the published adapters (PEFT's), and of the pooling network."""
    block = r"base_model\.model\.(?:model\.)?layers\.(\d+)\."
    rules = []
    for published, ours in _PROJECTIONS.items():
        name, path = block + published.replace(".", r"\."), f"lora/decoder/layer_{{0}}/{ours}"
        rules.append(Rule(name + r"\.lora_A(?:\.default)?\.weight", f"{path}/left", "linear"))
        rules.append(Rule(name + r"\.lora_B(?:\.default)?\.weight", f"{path}/right"))
    return [*rules, *(_inside("pooling", rule) for rule in pooling_rules())]


def weight_rules(config: EmbedderConfig) -> list[Rule]:
    """Names of the base model (with or without "model.", and GGUF's), its head left out, and of what is trained."""
    headless = dataclasses.replace(config, tie_embeddings=True)
    base = [_inside("decoder", rule) for rule in decoder_rules(headless)]
    prefix = r"model\."
    bare = [
        dataclasses.replace(rule, published=rule.published.removeprefix(prefix))
        for rule in base
        if isinstance(rule.published, str) and rule.published.startswith(prefix)
    ]
    return [*base, *bare, *adapter_rules()]


def _inside(module: str, rule: Rule) -> Rule:
    """The rule of a part of the network."""
    paths = tuple(path.replace("/", f"/{module}/", 1) for path in rule.paths)
    return dataclasses.replace(rule, path=None if not paths else paths[0] if isinstance(rule.path, str) else paths)


def example_inputs(config: EmbedderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of texts of 32, none padded."""
    length = min(32, config.max_length or 32)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch_size, length), dtype=np.int32)
    return {"tokens": tokens, "valid": np.ones(tokens.shape, bool)}


def example_vectors(config: PoolingConfig, batch_size: int) -> dict[str, np.ndarray]:
    """One vector a layer, or of 16 tokens."""
    shape = (batch_size, config.layers or 16, config.dim)
    return {"vectors": np.random.default_rng(0).normal(size=shape).astype(np.float32)}

"""Deconstructing attention: language models whose attention lacks one of its principles, in all layers or in some.

"Deconstructing Attention: Investigating Design Principles for Effective Language Modeling", Huiyin Xue, Nafise Sadat
Moosavi, Nikolaos Aletras, 2025, arXiv 2510.11602. The paper names github.com/HUIYINXUE/DeconAttn as its code, which was
not to be had, and there are no checkpoints: what follows is a reconstruction from the text on Qwen2.5's network, which
is checked against the transformers library.

Taken away, at the same number of parameters: the mixing of tokens ("mlp"), the form of the softmax ("approx"), the
dependence of a key's score on the query ("nonapprox"), that of queries and keys on the sequence ("rndemb", "fixedseq"),
or on the layer ("static"). Mixing turns out to be indispensable; the others are not in half of the layers, also where
they are in all of them.

What the paper leaves open, and what is therefore ours:
- "approx" is the Taylor expansion of the main text, sum and all; its appendix and its table of caches describe another
  form, `approx_form="appendix"`, whose divisors may vanish. Which was trained is not said;
- the standard deviation of "rndemb", 0.02; "static" embeddings pass through the layer's own norm; the head is tied;
- with `qk_norm`, "nonapprox" applies SiLU to the normed query;
- layers 1-12 are simple in "bottom" (table 11; the text says 1-6);
- FineWeb's first tokens, of "fixedseq", are not bundled: `fixed_tokens`, or tokens drawn from a seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo import mixers
from zoo.backbones import DecoderConfig
from zoo.backbones.checkpoints import decoder_rules
from zoo.backbones.decoder_lm import DecoderState, PaperDecoder, next_token_loss
from zoo.errors import unknown
from zoo.layers.rotary import Rotary
from zoo.mixers.deconstructed import ApproximateForm, KeyOnlyAttention, key_scores, random_vectors
from zoo.mixers.heads import ProjectedHeads
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="deconstructing_attention",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    authors="Huiyin Xue et al.",
    venue="arXiv",
    year=2025,
    arxiv="2510.11602",
    claim="Mixing tokens is indispensable; attention's form and its dependence on the sequence are not, in half of the "
    "layers.",
    code="https://github.com/HUIYINXUE/DeconAttn",
    fidelity="reconstruction",
    remarks="The code was not to be had. The standard variant is Qwen2's network.",
)

AttentionVariant = Literal["standard", "mlp", "approx", "nonapprox", "rndemb", "fixedseq", "static"]
_MIXERS: Mapping[str, str] = {
    "standard": "softmax",
    "mlp": "pointwise",
    "approx": "approximate",
    "nonapprox": "key_only",
    "rndemb": "fixed_map",
    "fixedseq": "fixed_map",
    "static": "softmax",
}
# The standard layers of a network of n, from 1 (table 11).
HYBRIDS: Mapping[str, Callable[[int], range | tuple[int, ...]]] = {
    "even": lambda n: range(2, n + 1, 2),
    "odd": lambda n: range(1, n + 1, 2),
    "top": lambda n: range(1, n // 2 + 1),
    "middle": lambda n: (*range(1, n // 4 + 1), *range(n - n // 4 + 1, n + 1)),
    "bottom": lambda n: range(n // 2 + 1, n + 1),
    "quarter": lambda n: range(4, n + 1, 4),
    "first": lambda n: (1,),
    "last": lambda n: (n,),
    "bilateral": lambda n: (1, n),
}


class _Decoder(DecoderConfig):
    """Kernels of the projections out begin like all others."""

    @property
    def out_init(self) -> Callable:
        return self.kernel_init


@dataclasses.dataclass(frozen=True)
class DeconConfig:
    """A language model with attention of one kind, or of two.

    Fields:
      variant: what is taken away, see the module.
      standard_layers: those that keep standard attention, from 1, or a name in `HYBRIDS`; none is a uniform network.
      vocab_size, dim, mlp_dim, num_layers, num_heads: sizes.
      num_kv_heads: heads of keys and values; None is num_heads, as published.
      head_dim: width of a head; None is dim / num_heads.
      rope_theta: base of the rotation's frequencies.
      max_len: the most tokens of a sequence.
      skip: leave out the layers that are not standard, attention and MLP. Their parameters are ignored.
      approx_form: "taylor" or "appendix", of "approx".
      tie_embeddings: the head's matrix is the embedding's.
      qk_norm: Qwen3's network: queries and keys are normed in each head, and the projections have no bias.
      fixed_tokens: of "fixedseq", at least as many as a sequence has; none: drawn by `seed`.
      seed: of the vectors of "rndemb", and of tokens.

    Raises:
      ValueError: a value is out of range, or a name unknown.
    """

    variant: AttentionVariant = "standard"
    standard_layers: tuple[int, ...] | str = ()
    vocab_size: int = 50304
    dim: int = 896
    mlp_dim: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 1_000_000.0
    max_len: int = 2048
    skip: bool = False
    approx_form: ApproximateForm = "taylor"
    tie_embeddings: bool = True
    qk_norm: bool = False
    fixed_tokens: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if self.variant not in get_args(AttentionVariant):
            raise unknown("variant", self.variant, get_args(AttentionVariant))
        if isinstance(self.standard_layers, str):
            if self.standard_layers not in HYBRIDS:
                raise unknown("choice of standard_layers", self.standard_layers, HYBRIDS)
        elif not all(1 <= number <= self.num_layers for number in self.standard_layers):
            raise ValueError(f"standard_layers must be in 1 .. {self.num_layers}, got {self.standard_layers}")
        for token in self.fixed_tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"fixed_tokens must be in 0 .. {self.vocab_size - 1}, got {token}")
        self.decoder  # noqa: B018  raises what is wrong with the rest

    @property
    def is_standard(self) -> tuple[bool, ...]:
        """Which layers have standard attention."""
        chosen = self.standard_layers
        numbers = HYBRIDS[chosen](self.num_layers) if isinstance(chosen, str) else chosen
        return tuple(self.variant == "standard" or index + 1 in numbers for index in range(self.num_layers))

    @property
    def simple_layers(self) -> tuple[int, ...]:
        """Indices, from 0, of the layers that have not."""
        return tuple(index for index, standard in enumerate(self.is_standard) if not standard)

    @property
    def decoder(self) -> DecoderConfig:
        """The backbone."""
        attention = {"qk_norm": "rms"} if self.qk_norm else {}
        options: dict[str, dict[str, Any]] = {
            name: {} if name == "pointwise" else attention for name in _MIXERS.values()
        }
        options["approximate"] = attention | {"form": self.approx_form}
        options["fixed_map"] = attention | {"max_length": self.max_len}
        names = tuple("softmax" if standard else _MIXERS[self.variant] for standard in self.is_standard)
        return _Decoder(
            vocab_size=self.vocab_size, features=self.dim, layers=self.num_layers, heads=self.num_heads,
            key_heads=self.num_kv_heads, head_dim=self.head_dim, mlp="swiglu", mlp_features=self.mlp_dim,
            mlp_bias=False, norm="rms", norm_epsilon=1e-6, positions="rotary", rotary=Rotary(theta=self.rope_theta),
            max_length=self.max_len, qkv_bias=not self.qk_norm, out_bias=False, tie_embeddings=self.tie_embeddings,
            mixer=names, mixer_options=tuple(options[name] for name in names),
        )  # fmt: skip


LayerMap = tuple[jax.Array, jax.Array]  # queries (1, length, heads, width) and keys (1, length, key heads, width)


class DeconLM(PaperDecoder):
    """A language model: `DecoderLM`, and what brings queries and keys from elsewhere. Parameters are under `decoder`.

    In "rndemb" and "fixedseq" a second stream, of batch 1, passes through the same layers and gives the queries and
    keys of simple layers. It does not depend on the input: for generation, `precompute_maps` puts them beside the
    parameters, and no call computes them again.

    Fields:
      config: see `DeconConfig`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    config: DeconConfig

    def __call__(
        self,
        tokens: jax.Array,
        state: DecoderState | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
        stream: jax.Array | None = None,
    ) -> tuple[jax.Array, DecoderState | None]:
        """Logits of the token after each, and the next state.

        Args:
          tokens, state, valid, deterministic: as of `DecoderLM`.
          stream: where the second stream begins: of "rndemb" float (at least as many tokens, dim), of "fixedseq" int
            (at least as many tokens,). None is the config's.

        Raises:
          ValueError, TypeError: an argument's shape, dtype or range is wrong.
        """
        x, state = self.hidden(tokens, state, valid=valid, deterministic=deterministic, stream=stream)
        return self.decoder.logits(x), state

    def hidden(
        self,
        tokens: jax.Array,
        state: DecoderState | None = None,
        *,
        valid: jax.Array | None = None,
        deterministic: bool = True,
        stream: jax.Array | None = None,
    ) -> tuple[jax.Array, DecoderState | None]:
        """What the head sees, (batch, time, dim), and the next state; see `__call__`."""
        return self.decoder.hidden(
            tokens, state, valid=valid, deterministic=deterministic,
            mixer_arguments=self._mixer_arguments(tokens, state, valid, stream),
        )  # fmt: skip

    def _mixer_arguments(
        self, tokens: jax.Array, state: DecoderState | None, valid: jax.Array | None, stream: jax.Array | None
    ) -> list[dict[str, Any] | None]:
        config = self.config
        if config.skip:
            return [{} if standard else None for standard in config.is_standard]
        found: list[dict[str, Any] | None] = [{} for _ in config.is_standard]
        simple = config.simple_layers
        if config.variant in ("rndemb", "fixedseq") and simple:
            length = tokens.shape[-1] if state is None else state.layers[simple[0]].key.shape[1]
            kept = stream is None and self.has_variable("maps", "layers")
            maps = self.get_variable("maps", "layers") if kept else self.maps(length, stream)
            for index in simple:
                found[index] = {"query_key": maps[index]}
        elif config.variant == "static":
            x = self.decoder.embed(tokens)
            positions = mixers.token_positions(tokens.shape, valid, None if state is None else state.length)
            for index in simple:
                block = self.decoder.layer[index]
                found[index] = {"query_key": block.mixer.query_key(block.norm1(x), positions)}
        return found

    def maps(self, length: int, stream: jax.Array | None = None) -> tuple[LayerMap | None, ...]:
        """Queries and keys of each simple layer, for sequences of up to `length` tokens; None of standard layers.

        Args:
          length: at most max_len.
          stream: as of `__call__`.

        Raises:
          ValueError: the variant has no second stream, or it is too short.
        """
        config = self.config
        x = self._stream(length, stream)
        positions = jnp.arange(length)[None]
        found: list[LayerMap | None] = [None] * config.num_layers
        for index, block in enumerate(self.decoder.layer[: max(config.simple_layers, default=-1) + 1]):
            if config.is_standard[index]:
                x, _ = block(x, None, None, True)
            else:
                found[index] = block.mixer.query_key(block.norm1(x), positions)
                x, _ = block(x, None, None, True, query_key=found[index])
        return tuple(found)

    def _stream(self, length: int, stream: jax.Array | None) -> jax.Array:
        config = self.config
        if config.variant not in ("rndemb", "fixedseq"):
            raise ValueError(f"{config.variant!r} has no maps of its own: only rndemb and fixedseq do")
        if length > config.max_len:
            raise ValueError(f"{length} tokens are more than max_len {config.max_len}")
        if stream is None and config.variant == "rndemb":
            stream = random_vectors(config.seed, config.max_len, config.dim, 0.02)
        elif stream is None and config.fixed_tokens:
            stream = jnp.asarray(config.fixed_tokens, jnp.int32)
        elif stream is None:
            stream = jax.random.randint(jax.random.key(config.seed), (config.max_len,), 0, config.vocab_size)
        wanted = (config.dim,) if config.variant == "rndemb" else ()
        if stream.ndim != 1 + len(wanted) or stream.shape[1:] != wanted or len(stream) < length:
            raise ValueError(f"the stream must be {(f'at least {length}', *wanted)}, got {stream.shape}")
        x = stream[None, :length]
        if config.variant == "fixedseq":
            return self.decoder.embed(x)
        return x.astype(self.param_dtype if self.dtype is None else self.dtype)


def precompute_maps(
    model: DeconLM, variables: Mapping[str, Any], length: int, stream: jax.Array | None = None
) -> dict[str, Any]:
    """The variables, and beside them the queries and keys of "rndemb" or "fixedseq" for up to `length` tokens.

    They hold for these parameters, and this stream, only. Raises ValueError as `DeconLM.maps` does.
    """
    maps = model.apply(variables, length, stream, method=DeconLM.maps)
    return {**variables, "maps": {"layers": maps}}


# ----------------------------------------------------------------------------------------------- maps and indicators


class AttentionMap(NamedTuple):
    """What a layer's attention does with a batch."""

    weights: jax.Array  # float32 (batch, heads, time, time); batch 1 where all sequences share it
    largest_logit: jax.Array  # float32 scalar, the largest absolute value that enters the exponential


def attention_maps(
    model: nn.Module, variables: Mapping[str, Any], tokens: jax.Array, stream: jax.Array | None = None
) -> tuple[jax.Array, dict[int, AttentionMap]]:
    """Logits, and the map of every layer that has one, by its index from 0.

    Args:
      model, variables: the language model, a `DeconLM`.
      tokens: int (batch, time), without padding.
      stream: as of `DeconLM`.
    """
    found: dict[int, AttentionMap] = {}

    def record(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, ProjectedHeads):
            pair = options.get("query_key")
            if pair is None:
                pair = module.query_key(arguments[0], jnp.arange(tokens.shape[1])[None])
            # The second stream passes first: what stays is of the text.
            found[int(module.path[1].removeprefix("layer_"))] = _attention_map(module, *pair)
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        logits, _ = model.apply(variables, tokens, stream=stream)
    return logits, dict(sorted(found.items()))


def _attention_map(mixer: Any, query: jax.Array, key: jax.Array) -> AttentionMap:
    if isinstance(mixer, KeyOnlyAttention):
        scores = key_scores(query, key)
    else:
        grouped = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", query, grouped, preferred_element_type=jnp.float32)
        scores = jnp.tril(scores) * query.shape[-1] ** -0.5
    return AttentionMap(mixer.weights(query, key), jnp.abs(scores).max())


def attention_indicators(weights: jax.Array) -> dict[str, jax.Array]:
    """What a layer's map is like: numbers that the paper's section 4.4 defines, means over heads.

    "entropy": the sum of the rows' entropies, in nats. "concentration": the Frobenius norm. "head_diversity": the
    standard deviation over heads, the mean of the lower triangle. "sink": mean weight of the first key.
    "local_focus_N": mean weight of the key N before, N = 0 .. 3, of the rows that have one.

    Args:
      weights: float (..., heads, time, time), causal, at least 4 tokens.

    Returns:
      Float32 arrays of the leading shape.

    Raises:
      ValueError: the map is not square, or too small.
    """
    if weights.ndim < 3 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 4:
        raise ValueError(f"weights must be (..., heads, time, time) of at least 4 tokens, got {weights.shape}")
    time = weights.shape[-1]
    weights = weights.astype(jnp.float32)
    found = {
        "entropy": -jax.scipy.special.xlogy(weights, weights).sum((-1, -2)).mean(-1),
        "concentration": jnp.sqrt((weights**2).sum((-1, -2))).mean(-1),
        "head_diversity": jnp.tril(weights.std(-3)).sum((-1, -2)) * 2 / (time * (time + 1)),
        "sink": weights[..., 0].mean((-1, -2)),
    }
    for distance in range(4):
        diagonal = jnp.diagonal(weights, -distance, -2, -1)
        found[f"local_focus_{distance}"] = diagonal.mean((-1, -2))
    return found


def normalised(values: np.ndarray) -> np.ndarray:
    """Values of the layers brought to 0 .. 1, as the paper plots entropy and concentration; zeros where all are one."""
    values = np.asarray(values, np.float64)
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


class Cost(NamedTuple):
    """Of the attention of one layer."""

    prefill_flops: int
    decode_flops: int  # a token of each sequence
    cache_bytes: int  # at two bytes a number


def cost_table(variant: AttentionVariant, batch: int, length: int, dim: int, heads: int) -> Cost:
    """The paper's table of costs, by its formulas (projections of queries, keys and values counted, not the one out).

    That of decoding "rndemb" and "fixedseq" is ours, their prefill over the length; "static" costs as much as
    "standard".

    Args:
      variant: whose.
      batch, length: sequences, and tokens of each.
      dim, heads: of the network.

    Raises:
      ValueError: the variant is unknown.
    """
    projections, products = batch * dim**2, batch * length * dim
    if variant in ("standard", "static"):
        return Cost(4 * products * length + 6 * projections * length, 6 * projections + 4 * products, 4 * products)
    if variant == "approx":
        cache = 6 * batch * dim + 4 * batch * dim**2 // heads
        return Cost(14 * projections * length, 10 * projections, cache)
    if variant in ("mlp", "nonapprox"):
        cache = 0 if variant == "mlp" else 2 * batch * dim + 4 * batch * heads
        return Cost(6 * projections * length, 6 * projections, cache)
    if variant in ("rndemb", "fixedseq"):
        decode = 2 * length * dim + 2 * products + 6 * projections
        return Cost(decode * length, decode, 2 * (batch + 1) * length * dim)
    raise unknown("variant", variant, get_args(AttentionVariant))


# --------------------------------------------------------------------------------------------- loss, names, registry


def example_inputs(config: DeconConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 128, or of max_len where that is less."""
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, config.vocab_size, (batch_size, min(128, config.max_len)), dtype=np.int32)}


def weight_rules(config: DeconConfig) -> list[Rule]:
    """Names of Qwen2 and Qwen3 checkpoints, and the same for what takes attention's place."""
    skipped = "|".join(map(str, config.simple_layers))
    return [
        *([Rule(rf"model\.layers\.({skipped})\..*", None)] if config.skip and skipped else []),
        *(_below_decoder(rule) for rule in decoder_rules(config.decoder)),
        *under(
            r"model\.layers\.(\d+)\.self_attn",
            "decoder/layer_{0}/mixer",
            [
                *layer("norm", "q_norm", "query_norm"),
                *layer("norm", "k_norm", "key_norm"),
                *layer("linear", "(gate|up|down)_proj", "mlp/{0}"),
            ],
        ),
    ]


def _below_decoder(rule: Rule) -> Rule:
    if not isinstance(rule.path, str):
        return rule
    return dataclasses.replace(rule, path=rule.path.replace("params/", "params/decoder/", 1))


register(
    PAPER,
    Variant("deconattn_70m", DeconConfig(dim=512, mlp_dim=2048, num_layers=6, num_heads=8), 50_937_344),
    Variant("deconattn_160m", DeconConfig(dim=768, mlp_dim=3072, num_layers=12, num_heads=12), 151_926_528),
    Variant("deconattn_500m", DeconConfig(), 436_037_504),
    Variant(
        "deconattn_1_7b", DeconConfig(dim=2048, mlp_dim=6144, num_layers=28, num_heads=16, qk_norm=True), 1_629_873_152
    ),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=next_token_loss,
)(DeconLM)

"""SPT: fine-tuning of language models with sparse attention, routed feed-forward networks and LoRA (Gui et al. 2023).

A pretrained decoder is upgraded in place, in four stages: adapters on every projection and embedding ("lora"), a router
that sends each token through half of the blocks of each feed-forward network ("ffn"), codebooks that learn to quantise
queries and keys while attention is still dense ("mha_v1"), and attention over the T / 8 keys whose codes agree most
("mha_v2"). What is trained are adapters, norms, routers and codebooks.

    config, variables = upgrade(config, variables, "mha_v2", key)       # all stages up to it
    model = SptLM(config)
    state = init_sharded(lambda _: trained(variables), optimizer, key, mesh)         # of `zoo.train`
    step = make_train_step(loss(model), optimizer, state)

All of it comes from shared parts: `kernels.sparse_topl`, `kernels.routed_ffn`, the mixer "sparse_topl", `RoutedMLP` and
`zoo.layers.lora`, on `zoo.backbones.DecoderLM`.

The published code differs in three places, of which none is followed: after its sparse product it views an
(N H, T, d) array as (N, T, H, d), which scrambles heads and positions (its test uses ones and cannot see it); its CUDA
lookup is approximate (`mode="prototype"` of the mixer has it); its LLaMA of 13B has 32 heads in code, 40 in truth.
The paper's text was not at hand: what is here is the published code's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from zoo.backbones.checkpoints import decoder_rules
from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM, DecoderState
from zoo.errors import unknown
from zoo.layers import lora
from zoo.layers.mlp import GATED
from zoo.layers.rotary import Rotary
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="spt",
    title="SPT: Fine-Tuning Transformer-based Language Models Efficiently with Sparsification",
    authors="Yuntao Gui, Xiao Yan, Peiqi Yin, Han Yang, James Cheng",
    venue="arXiv 2312.10365",
    year=2023,
    claim="Fine-tuning with sparse attention and routed feed-forward networks halves memory and doubles speed at "
    "about the quality of LoRA.",
    code="https://github.com/ytgui/SPT-proto",
    code_license="Apache-2.0",
    fidelity="official code",
    remarks="The published layer's scrambled output layout is put right; the codebooks' published lookup is an option.",
)
STAGES = ("lora", "ffn", "mha_v1", "mha_v2")
UNROUTED = r"^(?!.*router)"  # paths of what is adapted: a router is trained itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class SptConfig(DecoderConfig):
    """A decoder and how far it is upgraded; `SptConfig.preset("spt_llama_4096")` for the published sizes.

    Fields beside those of `DecoderConfig`:
      lora_rank: of the adapters; None is a decoder without any.
    """

    lora_rank: int | None = None

    _OPT: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 50272, "max_length": 2048, "position_offset": 2, "mlp": "relu", "norm": "layer",
        "norm_epsilon": 1e-5, "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "tie_embeddings": False, "mixer": "sparse_topl", "mlp_blocks": 4, "mlp_active": 2, "lora_rank": 16,
    }  # fmt: skip
    _LLAMA: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000, "max_length": 2048, "mlp": "swiglu", "norm": "rms", "norm_epsilon": 1e-6,
        "positions": "rotary", "rotary": Rotary(), "qkv_bias": False, "out_bias": False, "mlp_bias": False,
        "tie_embeddings": False, "mixer": "sparse_topl", "mlp_blocks": 4, "mlp_active": 2, "lora_rank": 16,
    }  # fmt: skip
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "spt_opt_1024": {**_OPT, "features": 1024, "heads": 16, "mlp_features": 4096, "layers": 24},
        "spt_opt_2048": {**_OPT, "features": 2048, "heads": 32, "mlp_features": 8192, "layers": 24},
        "spt_opt_2560": {**_OPT, "features": 2560, "heads": 32, "mlp_features": 10240, "layers": 32},
        "spt_llama_2560": {**_LLAMA, "features": 2560, "heads": 20, "mlp_features": 6912, "layers": 32},
        "spt_llama_4096": {**_LLAMA, "features": 4096, "heads": 32, "mlp_features": 11008, "layers": 32},
        "spt_llama_5120": {**_LLAMA, "features": 5120, "heads": 40, "mlp_features": 13824, "layers": 40},
        "spt_opt_tiny": {**_OPT, "features": 128, "heads": 2, "mlp_features": 256, "layers": 2, "vocab_size": 101,
                         "max_length": 128, "lora_rank": 8},
        "spt_llama_tiny": {**_LLAMA, "features": 128, "heads": 2, "mlp_features": 256, "layers": 2, "vocab_size": 101,
                           "max_length": 128, "lora_rank": 8},
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be None or positive, got {self.lora_rank}")

    @property
    def adapters(self) -> lora.LoRA | None:
        """The adapters of all projections and embeddings but the routers."""
        return None if self.lora_rank is None else lora.LoRA(self.lora_rank, targets=UNROUTED)


class SptLM(DecoderLM):
    """A decoder language model with adapters; see `DecoderLM`, whose parameters it has, and `upgrade`."""

    config: SptConfig

    def hidden(self, *arguments: Any, **options: Any) -> tuple[jax.Array, DecoderState | None]:
        """See `DecoderLM`."""
        return self._adapted(lambda: super(SptLM, self).hidden(*arguments, **options))

    def logits(self, x: jax.Array) -> jax.Array:
        """See `DecoderLM`."""
        return self._adapted(lambda: super(SptLM, self).logits(x))

    @nn.nowrap
    def _adapted(self, call: Callable[[], Any]) -> Any:
        adapters = self.config.adapters
        if adapters is None:
            return call()
        with lora.adapted(adapters):
            return call()


def upgrade(
    config: DecoderConfig, variables: Mapping[str, Any], stage: str, key: jax.Array, *, rank: int = 16,
    **mixer_options: Any,
) -> tuple[SptConfig, dict[str, Any]]:  # fmt: skip
    """A decoder brought to a stage, all stages before it included; what it has learnt is kept, leaf by leaf.

    Args:
      config: of a `DecoderLM` with softmax attention, or of an earlier stage. Tied embeddings are untied: the head is
        adapted on its own.
      variables: unboxed.
      stage: one of `STAGES`.
      key: of the new parameters.
      rank: of the adapters.
      **mixer_options: of the mixer "sparse_topl" (`coefficient`, `score`, ...).

    Returns:
      The config of the `SptLM`, and its variables.

    Raises:
      ValueError: the stage is unknown, or attention is neither softmax nor "sparse_topl".
    """
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    if config.mixer not in ("softmax", "sparse_topl"):
        raise ValueError(f"sparse attention takes the place of softmax attention, got mixer {config.mixer!r}")
    if config.window is not None:
        raise ValueError(f"sparse attention has no window, the config's is {config.window}")
    at = STAGES.index(stage)
    changes: dict[str, Any] = {"lora_rank": rank, "tie_embeddings": False}
    if at >= 1 and config.mlp_blocks == 1:
        changes |= {"mlp_blocks": 4, "mlp_active": 2}
    if at >= 2:
        changes |= {"mixer": "sparse_topl", "mixer_options": {**mixer_options, "sparse": at == 3}}
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    upgraded = SptConfig(**{**fields, **changes})

    have = traverse_util.flatten_dict(dict(variables))
    if config.tie_embeddings:
        have["params", "head", "kernel"] = have["params", "embed", "embedding"].T

    # Only what is missing is made: the compiler drops the rest.
    @jax.jit
    def missing(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        fresh = nn.meta.unbox(SptLM(upgraded).init(key, jnp.zeros((1, 1), jnp.int32)))
        return {path: leaf for path, leaf in traverse_util.flatten_dict(fresh).items() if path not in have}

    return upgraded, traverse_util.unflatten_dict({**have, **missing(key)})


def is_trainable(path: tuple[str, ...]) -> bool:
    """Whether SPT trains the leaf: adapters, norms, routers and codebooks."""
    return path[0] == lora.COLLECTION or bool({"norm", "norm1", "norm2", "router", "codebook"} & set(path))


def split(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables in two trees, what is trained (to give to the optimiser) and what is frozen."""
    leaves = traverse_util.flatten_dict(dict(variables))
    parts = [{path: leaf for path, leaf in leaves.items() if is_trainable(path) == chosen} for chosen in (True, False)]
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def join(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The way back from `split`."""
    leaves = [traverse_util.flatten_dict(dict(tree)) for tree in (trainable, frozen)]
    return traverse_util.unflatten_dict({**leaves[0], **leaves[1]})


def merge(config: SptConfig, variables: Mapping[str, Any]) -> tuple[SptConfig, dict[str, Any]]:
    """The network of stage "lora" without its adapters, theirs added to its weights.

    Raises:
      ValueError: it has none, or it is routed: see `zoo.layers.lora.merge`.
    """
    if config.adapters is None:
        raise ValueError("the config has no adapters to merge")
    return dataclasses.replace(config, lora_rank=None), lora.merge(variables, config.adapters)


QUANTISATION_WEIGHT = 0.01


def losses(
    model: SptLM, variables: Mapping[str, Any], tokens: jax.Array, *, quantise: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy of tokens[:, 1:], and the quantisation losses of queries and keys, summed over layers.

    Args:
      model: an `SptLM`.
      variables: its.
      tokens: integers (batch, time + 1).
      quantise: whether to compute the second, 0 otherwise (published for one batch in 20).
    """
    mutable = ["losses"] if quantise else False
    out = model.apply(variables, tokens[:, :-1], mutable=mutable)
    (logits, _), sown = out if quantise else (out, {})
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    return entropy, sum(jax.tree.leaves(sown), jnp.zeros(()))


def trained(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables as `zoo.train` takes them: "params" is what is trained, "frozen" is state that never changes."""
    trainable, frozen = split(variables)
    return {"params": trainable, "frozen": frozen}


def loss(model: SptLM, *, quantise: bool = True) -> Callable:
    """Cross entropy + 0.01 quantisation losses of batch["tokens"] (batch, time + 1), of a state from `trained`."""

    def loss_fn(params, model_state, batch, rngs, train):
        variables = join(params, model_state["frozen"])
        entropy, quantisation = losses(model, variables, batch["tokens"], quantise=quantise)
        total = entropy + QUANTISATION_WEIGHT * quantisation
        return total, (model_state, {"perplexity": jnp.exp(entropy), "quantisation": quantisation})

    return loss_fn


def _adapted_layer(kind: str, published: str, path: str) -> list[Rule]:
    """Rules of a layer and of its adapter."""
    return [
        *layer(kind, published, path),
        Rule(rf"{published}\.lora\.left\.weight", f"lora/{path}/left"),
        Rule(rf"{published}\.lora\.right\.weight", f"lora/{path}/right"),
    ]


def weight_rules(config: SptConfig) -> list[Rule]:
    """Names of the published code, and of the OPT and LLaMA checkpoints of the transformers library."""
    projections: tuple[tuple[str, str], ...] = (("fc1", "up"), ("fc2", "down"))
    if config.mlp in GATED:
        projections = (("gate", "gate"), ("side", "up"), ("down", "down"))
    block = [
        *(
            rule
            for name, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
            for rule in _adapted_layer("linear", rf"mha\.linear_{name}", f"mixer/{ours}")
        ),
        Rule(r"mha\.attn_fn\.quantizer\.weight", "params/mixer/codebook"),
        *(rule for name, ours in projections for rule in _adapted_layer("linear", rf"ffd\.{name}", f"mlp/{ours}")),
        *layer("linear", r"ffd\.router\.0", "mlp/router"),
        *layer("norm", r"norm(1|2)", "norm{0}"),
    ]
    own = [
        *_adapted_layer("embedding", "embedding", "embed"),
        *_adapted_layer("embedding", "learned_pe", "positions"),
        *under(r"decoders\.(\d+)", "layer_{0}", block),
        *layer("norm", "final_norm", "norm"),
        *_adapted_layer("linear", "lm_output", "head"),
    ]
    return [*own, *transformers_rules(config)]


def transformers_rules(config: SptConfig) -> list[Rule]:
    """Names of the dense OPT and LLaMA checkpoints of the transformers library."""
    if config.positions == "rotary":
        return decoder_rules(config)
    prefix = r"(?:model\.)?decoder\."
    block = [
        *(
            rule
            for name, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
            for rule in layer("linear", rf"self_attn\.{name}", f"mixer/{ours}")
        ),
        *layer("norm", "self_attn_layer_norm", "norm1"),
        *layer("norm", "final_layer_norm", "norm2"),
        *layer("linear", "fc1", "mlp/up"),
        *layer("linear", "fc2", "mlp/down"),
    ]
    return [
        *layer("embedding", prefix + "embed_tokens", "embed"),
        *layer("embedding", prefix + "embed_positions", "positions"),
        *under(prefix + r"layers\.(\d+)", "layer_{0}", block),
        *layer("norm", prefix + "final_layer_norm", "norm"),
        *layer("linear", r"lm_head", "head"),
    ]


def example_inputs(config: SptConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 128, or of max_length where that is less."""
    length = min(128, config.max_length or 128)
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, config.vocab_size, (batch_size, length), dtype=np.int32)}


register(
    PAPER,
    *(Variant(name, SptConfig.preset(name)) for name in SptConfig.PRESETS),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
)(SptLM)

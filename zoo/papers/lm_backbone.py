"""The decoder language models and the sentence encoder that the papers on language build on, with published weights.

GPT-2 (Radford et al. 2019), Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), Mistral (Jiang et al. 2023),
Qwen2 (Yang et al. 2024), SmolLM2 (Ben Allal et al. 2025): one network, `zoo.backbones.DecoderLM`, by config.
MiniLM-L6 (Wang et al. 2020) as a sentence encoder (Reimers and Gurevych 2019): `zoo.backbones.SentenceEncoder`.

Two real checkpoints come inside packages of the Python index and need no download at run time:

    model, variables, tokenizer = zoo.backbones.load_smollm2()
    variables = zoo.load_weights("smollm2_135m")          # the same weights, by the registry

Numbers are checked against the transformers library (dequantised weights bit for bit those of the `gguf` package).
"""

from __future__ import annotations

import numpy as np

from zoo.backbones.checkpoints import MINILM_L6_V2, SMOLLM2_135M, decoder_rules
from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM, next_token_loss
from zoo.backbones.sentence_encoder import SentenceEncoder, SentenceEncoderConfig, sentence_encoder_rules
from zoo.registry import Paper, Variant, register
from zoo.weights import PackagedFile

PAPER = Paper(
    slug="lm_backbone",
    title="Decoder language models: GPT-2, Llama, Mistral, Qwen2, SmolLM2, and a sentence encoder",
    authors="Alec Radford et al., Hugo Touvron et al. and others",
    venue="the backbone of the papers on language",
    year=2019,
    claim="One decoder, by config, is five families of language models, and runs their published weights.",
    code="https://github.com/huggingface/transformers",
    code_license="Apache-2.0",
    fidelity="library code",
    remarks="SmolLM2-135M-Instruct and MiniLM-L6-v2 come inside packages of the Python index, 4 and 32 bits a weight.",
)
_SIZES = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_0_5b": 494_032_768,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}
_CHECKPOINTS: dict[str, str | PackagedFile] = {
    "gpt2": "hf://openai-community/gpt2/model.safetensors",
    "smollm2_135m": SMOLLM2_135M,
    "smollm2_360m": "hf://HuggingFaceTB/SmolLM2-360M-Instruct/model.safetensors",
    "smollm2_1_7b": "hf://HuggingFaceTB/SmolLM2-1.7B-Instruct/model.safetensors",
    "qwen2_0_5b": "hf://Qwen/Qwen2-0.5B-Instruct/model.safetensors",
    "mistral_7b": "hf://mistralai/Mistral-7B-v0.1/model.safetensors.index.json",
}


def example_inputs(config: DecoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 128, or of max_length where that is less."""
    length = min(128, config.max_length or 128)
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, config.vocab_size, (batch_size, length), dtype=np.int32)}


register(
    PAPER,
    *(
        Variant(name, DecoderConfig.preset(name), parameters, _CHECKPOINTS.get(name))
        for name, parameters in _SIZES.items()
    ),
    example_inputs=example_inputs,
    weight_rules=decoder_rules,
    loss=next_token_loss,
)(DecoderLM)


def _sentences(config: SentenceEncoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (batch_size, min(32, config.max_length)), dtype=np.int32)
    return {"tokens": tokens, "valid": np.ones(tokens.shape, bool)}


register(
    PAPER,
    Variant("minilm_l6_v2", SentenceEncoderConfig(), 22_565_376, MINILM_L6_V2),
    example_inputs=_sentences,
    weight_rules=sentence_encoder_rules,
)(SentenceEncoder)

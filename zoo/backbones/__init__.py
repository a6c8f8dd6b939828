"""Networks that several papers build on; each takes its mixers by name."""

from zoo.backbones.checkpoints import PretrainedLM, load_smollm2
from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM, DecoderState
from zoo.backbones.encoder import Encoder, EncoderConfig
from zoo.backbones.generation import Generated, Sampling, generate, score, stream
from zoo.backbones.sentence_encoder import SentenceEncoder, SentenceEncoderConfig
from zoo.backbones.vit import ViT, ViTConfig

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "DecoderState",
    "Encoder",
    "EncoderConfig",
    "Generated",
    "PretrainedLM",
    "Sampling",
    "SentenceEncoder",
    "SentenceEncoderConfig",
    "ViT",
    "ViTConfig",
    "generate",
    "load_smollm2",
    "score",
    "stream",
]

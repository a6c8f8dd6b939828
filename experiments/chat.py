"""Talk with SmolLM2-135M-Instruct, whose weights come inside a package.

python -m experiments.chat --prompt "What is the capital of France?"
python -m experiments.chat                          # one line after the other; an empty line ends it
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from experiments import command_line
from zoo.backbones import PretrainedLM, Sampling, load_smollm2, stream
from zoo.weights import quantize_int8


@dataclasses.dataclass(frozen=True)
class Config:
    """What to say, and how the answer is chosen."""

    # The user's message; without it, lines are read from the terminal.
    prompt: str | None = None
    # Instructions before the conversation; default those of the model's template.
    system: str | None = None
    # The most tokens of an answer.
    max_tokens: int = 256
    # 0 always takes the likeliest token.
    temperature: float = 0.0
    # Sample among the fewest tokens that together have this probability.
    top_p: float = 0.9
    # Makes tokens that have occurred less likely; 1 does not.
    repetition_penalty: float = 1.0
    # Of random choices.
    seed: int = 0
    # float32 and bfloat16 keep weights and compute so; int8 keeps weights in 8 bits and computes in float32.
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    # The checkpoint, a GGUF file; default that of the installed package.
    model: pathlib.Path | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        self.sampling  # noqa: B018  raises where a number is out of range

    @property
    def sampling(self) -> Sampling:
        """As `zoo.backbones.generation` takes it."""
        return Sampling(self.temperature, top_p=self.top_p, repetition_penalty=self.repetition_penalty)


PRESETS = {"smollm2": Config()}


def load(config: Config) -> PretrainedLM:
    """The model with its weights as asked for."""
    half = jnp.bfloat16 if config.weights == "bfloat16" else None
    pretrained = load_smollm2(config.model, dtype=half, param_dtype=half or jnp.float32)
    if config.weights == "int8":
        pretrained = pretrained._replace(variables=quantize_int8(pretrained.variables))
    return pretrained


def answer(pretrained: PretrainedLM, messages: list[dict[str, str]], config: Config) -> Iterator[str]:
    """The pieces of the assistant's next message.

    Raises ValueError where the conversation is longer than the model's context.
    """
    model, variables, tokenizer = pretrained
    prompt = tokenizer.encode(tokenizer.chat(messages))
    end = () if tokenizer.end is None else (tokenizer.end,)
    rng = jax.random.fold_in(jax.random.key(config.seed), len(messages))
    ids = stream(model, variables, prompt, config.max_tokens, sampling=config.sampling, rng=rng, stop_tokens=end)
    yield from tokenizer.stream(ids)


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> list[dict[str, str]]:
    """Answers the prompt, or the terminal's lines; nothing is written to `workdir`. Returns the conversation."""
    pretrained = load(config)
    messages = [] if config.system is None else [{"role": "system", "content": config.system}]
    lines = iter([config.prompt]) if config.prompt is not None else _lines()
    for line in lines:
        messages.append({"role": "user", "content": line})
        start, pieces = time.perf_counter(), []
        for piece in answer(pretrained, messages, config):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        text = "".join(pieces)
        tokens = len(pretrained.tokenizer.encode(text))
        seconds = time.perf_counter() - start
        print(f"[{tokens} tokens in {seconds:.1f} s, compilation included]", file=sys.stderr)
        messages.append({"role": "assistant", "content": text})
    return messages


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


if __name__ == "__main__":
    command_line.main("chat", PRESETS, run)

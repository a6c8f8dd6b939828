"""SmolLM2-135M on the CPU beside the transformers library: `python -m benchmarks.language`.

Both run the same weights in float32, at batch 1: the prompt's last logits, then greedy tokens with a cache. The two
take turns in one process on the same cores. Transformers is called as its own `generate` would, but in a bare loop, so
that what it spends on sampling options and stopping rules does not count. Ours is `zoo.backbones.generate` whole.

On a machine with other work, `taskset -c 0 python -m benchmarks.language` gives each one thread: torch's threads spin
while they wait for one another, and their CPU time then says more about the other work than about them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from zoo.backbones import DecoderLM, PretrainedLM, generate, load_smollm2
from zoo.backbones.checkpoints import decoder_rules
from zoo.weights import quantize_int8, to_published

try:
    import torch
    import transformers
except ImportError:
    raise SystemExit("torch or transformers missing: install zoo[bench]") from None


def library_model(pretrained: PretrainedLM) -> transformers.LlamaForCausalLM:
    """Transformers' own network with our weights."""
    config = pretrained.model.config
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.features,
        intermediate_size=config.mlp_features,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary.theta},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(settings).eval()
    stored = to_published(pretrained.variables, decoder_rules(config))
    state = {name: torch.from_numpy(np.array(array)) for name, array in stored.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or surplus:
        raise RuntimeError(f"transformers {transformers.__version__} names its parameters otherwise: {missing}")
    model.tie_weights()
    return model


def seconds(calls: list[Callable[[], object]], repeats: int) -> np.ndarray:
    """Of each call (calls, repeats, 2), taking turns, after one call to warm up: process CPU time and wall time."""
    for call in calls:
        call()
    measured = np.zeros((len(calls), repeats, 2))
    for repeat in range(repeats):
        for row, call in enumerate(calls):
            start = time.process_time(), time.perf_counter()
            call()
            measured[row, repeat] = time.process_time() - start[0], time.perf_counter() - start[1]
    return measured


def main(prefill: int = 512, decode: int = 128, repeats: int = 5) -> None:
    """Prints tokens a second and ratios (ours over theirs, above 1 is faster), from each one's best run.

    Args:
      prefill: tokens of the prompt.
      decode: tokens generated after it.
      repeats: runs of each.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pretrained = load_smollm2()
    model, variables, _ = pretrained
    theirs = library_model(pretrained)
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, prefill))
    ours, tensor = jnp.asarray(prompt, jnp.int32), torch.from_numpy(prompt)

    @torch.inference_mode()
    def library(length: int) -> list[int]:
        out = theirs(tensor, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(length - 1):
            out = theirs(tokens[-1], cache=out.cache, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(tokens, dim=1)[0].tolist()

    @jax.jit
    def read(variables, prompt):
        state = model.init_state(1, prefill + decode)
        hidden, state = model.apply(variables, prompt, state, method=DecoderLM.hidden)
        return model.apply(variables, hidden[:, -1], method=DecoderLM.logits), state

    def continued(variables, length: int) -> list[int]:
        return np.asarray(generate(model, variables, ours, length).tokens)[0].tolist()

    same = sum(a == b for a, b in zip(library(decode), continued(variables, decode), strict=True))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    small = quantize_int8(variables)
    calls = {
        "transformers, prefill": lambda: library(1),
        "ours, prefill": lambda: jax.block_until_ready(read(variables, ours)),
        "transformers, prefill and decode": lambda: library(decode),
        "ours, prefill and decode": lambda: continued(variables, decode),
        "ours, bfloat16": lambda: continued(half, decode),
        "ours, int8": lambda: continued(small, decode),
    }
    best = dict(zip(calls, seconds(list(calls.values()), repeats).min(axis=1), strict=True))
    # Reading a prompt gives the first token, so decode - 1 steps of decoding are left.
    steps = {
        "transformers": best["transformers, prefill and decode"] - best["transformers, prefill"],
        "ours": best["ours, prefill and decode"] - best["ours, prefill"],
        "ours, bfloat16": best["ours, bfloat16"] - best["ours, prefill"],
        "ours, int8": best["ours, int8"] - best["ours, prefill"],
    }
    table = Table("SmolLM2-135M, batch 1", "", "CPU s", "wall s", "tokens/s (wall)", "ratio CPU", "ratio wall")
    rows = [("prefill", who, best[f"{who}, prefill"], prefill) for who in ("transformers", "ours")]
    rows += [("decode", who, spent, decode - 1) for who, spent in steps.items()]
    base: dict[str, np.ndarray] = {}
    for what, who, spent, tokens in rows:
        ratio = base.setdefault(what, spent) / spent
        figures = [
            f"{spent[0]:.2f}",
            f"{spent[1]:.2f}",
            f"{tokens / spent[1]:.1f}",
            f"{ratio[0]:.2f}",
            f"{ratio[1]:.2f}",
        ]
        table.add_row(f"{what} {prefill if what == 'prefill' else decode}", who, *figures)
    Console().print(table)
    print(f"{same} of {decode} greedy tokens are the same")


if __name__ == "__main__":
    tyro.cli(main)

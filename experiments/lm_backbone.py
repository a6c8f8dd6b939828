"""The real checkpoint against what other code computes with it: losses on novels, greedy text, speed.

python -m experiments.lm_backbone --preset cpu --data-dir DIR_OF_public_domain_novels
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.backbones import DecoderConfig, DecoderLM, PretrainedLM, generate, load_smollm2
from zoo.data.tokenizers import ByteLevelTokenizer
from zoo.probing import logit_lens
from zoo.timing import median_seconds

# Mean losses of the first 1,024 tokens by the transformers library, float32, the same dequantised weights.
PUBLISHED_LOSSES = {"mohicans_1": 3.598, "dracula": 3.302}
GREEDY = (
    "Gravity is the force that",
    " holds the universe together. It's a fundamental concept that underlies everything, from the smallest particles "
    "to the largest structures.",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    # The folder of mohicans_1.txt and dracula.txt; None: greedy text, the lens and speed only.
    data_dir: pathlib.Path | None = None
    # A random network of a few features in place of the checkpoint.
    tiny: bool = False
    # Tokens of each text.
    tokens: int = 1024
    # Of a prompt, and generated, where speed is measured.
    prefill: int = 512
    decode: int = 128
    # Repetitions of each timing; the median counts.
    repetitions: int = 3

    def __post_init__(self) -> None:
        if min(self.tokens, self.prefill, self.decode, self.repetitions) < 1 or self.tokens < 2:
            raise ValueError("tokens, prefill, decode and repetitions must be positive, tokens at least 2")


PRESETS = {
    "cpu": Config(),
    "smoke": Config(tiny=True, tokens=16, prefill=8, decode=4, repetitions=1),
    "paper": Config(repetitions=9),
}


def tiny() -> PretrainedLM:
    """A random network on bytes."""
    config = DecoderConfig.preset(
        "smollm2_135m", vocab_size=256, features=16, layers=2, heads=2, key_heads=1, mlp_features=32
    )
    model = DecoderLM(config)
    variables: Any = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    alphabet = ByteLevelTokenizer.byte_alphabet()
    return PretrainedLM(model, variables, ByteLevelTokenizer(alphabet, []))


def losses(pretrained: PretrainedLM, text: str, tokens: int) -> np.ndarray:
    """Loss of each next token, nats, of the first `tokens`."""
    ids = jnp.asarray(pretrained.tokenizer.encode(text)[:tokens], jnp.int32)[None]
    logits = jax.jit(pretrained.model.apply)(pretrained.variables, ids)[0]
    log_probabilities = jax.nn.log_softmax(logits[0, :-1])
    return np.asarray(-jnp.take_along_axis(log_probabilities, ids[0, 1:, None], axis=1)[:, 0])


def fidelity(pretrained: PretrainedLM, config: Config) -> reports.Claim:
    """Losses and greedy text beside those of the transformers library."""
    measured: dict[str, Any] = {}
    differences = []
    if config.data_dir is not None:
        for name, published in PUBLISHED_LOSSES.items():
            text = (config.data_dir / f"{name}.txt").read_text()
            loss = float(losses(pretrained, text, config.tokens).mean())
            measured[f"{name}, loss a token"] = round(loss, 4)
            differences.append(abs(loss - published))
    prompt, expected = GREEDY
    ids = jnp.asarray(pretrained.tokenizer.encode(prompt), jnp.int32)[None]
    length = min(len(pretrained.tokenizer.encode(expected)), config.decode)
    text = pretrained.tokenizer.decode(
        np.asarray(generate(pretrained.model, pretrained.variables, ids, length).tokens[0])
    )
    measured[f"greedy after {prompt!r}"] = text
    verdict: reports.Verdict = "not tested"
    if not config.tiny and differences and config.tokens == 1024:
        verdict = "reproduced" if max(differences) < 2e-3 and text == expected else "not reproduced"
    return reports.Claim(
        statement="SmolLM2-135M-Instruct computes what the transformers library does with the same 4-bit weights.",
        verdict=verdict,
        measured=measured,
        published={f"{name}, loss a token": value for name, value in PUBLISHED_LOSSES.items()} | {"greedy": expected},
        remark="Texts from their beginning, without a token before; bound 0.002 nats and the same greedy text.",
    )


def speed(pretrained: PretrainedLM, config: Config) -> reports.Claim:
    """Tokens a second of reading a prompt and of continuing one."""
    model, variables, _ = pretrained
    prompt = jnp.ones((1, config.prefill), jnp.int32)
    forward = jax.jit(lambda variables, prompt: model.apply(variables, prompt, method=DecoderLM.hidden)[0][:, -1])
    reading = median_seconds(lambda: forward(variables, prompt), config.repetitions)
    both = median_seconds(lambda: generate(model, variables, prompt, config.decode).tokens, config.repetitions)
    return reports.Claim(
        statement="Prefill runs at the machine's matrix speed, decoding at its memory's.",
        verdict="not tested",
        measured={
            f"prefill of {config.prefill}, tokens a second": round(config.prefill / reading, 1),
            f"decoding of {config.decode}, tokens a second": round(config.decode / max(both - reading, 1e-9), 1),
            "parameter bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
        },
        remark="`make bench-language` holds these against the transformers library, alternating in one process.",
    )


def lens_figure(pretrained: PretrainedLM, text: str) -> Figure:
    """What each layer would say after each token: its likeliest token, coloured by probability."""
    model, variables, tokenizer = pretrained
    ids = tokenizer.encode(text)
    logits = jax.jit(lambda v, t: logit_lens(model, v, {"tokens": t}))(variables, jnp.asarray(ids, jnp.int32)[None])
    probabilities = np.asarray(jax.nn.softmax(logits[:, 0]))
    best = probabilities.argmax(-1)
    figure = Figure(figsize=(1.1 * len(ids) + 2, 0.28 * len(best) + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(probabilities.max(-1), aspect="auto", vmin=0, vmax=1, cmap="Blues", origin="lower")
    for (layer, position), token in np.ndenumerate(best):
        axes.text(position, layer, repr(tokenizer.decode([token]))[1:-1], ha="center", va="center", fontsize=6)
    axes.set(xlabel="after token", ylabel="layer", xticks=range(len(ids)))
    axes.set_xticklabels([repr(tokenizer.decode([index]))[1:-1] for index in ids], fontsize=7)
    figure.colorbar(image, ax=axes, label="probability")
    return figure


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures, and leaves result.json and the figure of the lens in `workdir`.

    Raises:
      FileNotFoundError: a text is not in data_dir.
      ModuleNotFoundError: the package with the weights is not installed.
    """
    for name in PUBLISHED_LOSSES if config.data_dir is not None else ():
        if not (config.data_dir / f"{name}.txt").is_file():  # type: ignore[operator]
            raise FileNotFoundError(f"no {name}.txt in {config.data_dir}")
    folder = train.open_run(workdir, config, resume=resume, force=force)
    pretrained = tiny() if config.tiny else load_smollm2()
    claims = fidelity(pretrained, config), speed(pretrained, config)
    for claim in claims:
        reports.show(claim)
    (folder.path / "figures").mkdir(exist_ok=True)
    lens_figure(pretrained, GREEDY[0]).savefig(folder.path / "figures" / "logit_lens.png", dpi=120)
    preset = command_line.preset_name(config, PRESETS)
    data = "public_domain_novels" if config.data_dir is not None else "none"
    result = reports.Result("lm_backbone", preset, data, claims)
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("lm_backbone", PRESETS, run)

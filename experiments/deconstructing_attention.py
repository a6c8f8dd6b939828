"""Language models without one of attention's principles, in all layers, in every other one, and without those layers.

    python -m experiments.deconstructing_attention --preset cpu --data-dir DIR_OF_tinyshakespeare

Bytes of text; every variant at one size, with the same data, steps and learning rate. Then bits a byte, by length of
context too, and what the maps are like.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.data.text import read_text
from zoo.papers import deconstructing_attention as paper

UNIFORM, HYBRID, SKIP = "uniform", "hybrid", "skip"
TARGETS = 8  # bytes of a sequence that are predicted from shorter and longer contexts


@dataclasses.dataclass(frozen=True)
class Config:
    """Which variants, of what size, and how long they are trained."""

    # A folder of .txt files; None takes the language reference that comes with Python.
    data_dir: pathlib.Path | None = None
    # What is compared, each uniform and as a hybrid; "standard" is what they are held against.
    variants: tuple[paper.AttentionVariant, ...] = get_args(paper.AttentionVariant)
    # The standard layers of hybrids, a name in `HYBRIDS`.
    hybrid: str = "even"
    # Width, MLP's width, layers and heads.
    dim: int = 48
    mlp_dim: int = 128
    layers: int = 4
    heads: int = 4
    # Bytes of a sequence, and sequences of an update.
    length: int = 64
    batch_size: int = 8
    # Updates, and the learning rate of AdamW at its highest.
    steps: int = 600
    learning_rate: float = 3e-3
    # One training of each network each.
    seeds: tuple[int, ...] = (0, 1)
    # Sequences of the evaluation.
    windows: int = 128

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "batch_size", "steps", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 16:
            raise ValueError(f"length must be at least 16, got {self.length}")
        if not self.seeds or "standard" not in self.variants:
            raise ValueError("there must be a seed, and the variant 'standard' to compare with")
        for variant in self.variants:
            self.network(variant, HYBRID, ())

    @property
    def contexts(self) -> tuple[int, ...]:
        """Lengths of context at which bytes are predicted."""
        longest = self.length - TARGETS
        return (*(2**power for power in range(12) if 2**power < longest), longest)

    def network(self, variant: paper.AttentionVariant, arrangement: str, fixed: tuple[int, ...]) -> paper.DeconConfig:
        """The network on bytes of a variant that is uniform, a hybrid, or a hybrid with its simple layers skipped."""
        return paper.DeconConfig(
            variant, () if arrangement == UNIFORM else self.hybrid, vocab_size=256, dim=self.dim, mlp_dim=self.mlp_dim,
            num_layers=self.layers, num_heads=self.heads, max_len=self.length, fixed_tokens=fixed,
            skip=arrangement == SKIP,
        )  # fmt: skip


PRESETS = {
    "cpu": Config(),
    "smoke": Config(
        variants=("standard", "nonapprox"), dim=8, mlp_dim=8, layers=2, heads=2, length=16,
        batch_size=2, steps=2, seeds=(0,), windows=2,
    ),
    "long": Config(
        dim=96, mlp_dim=256, layers=6, heads=6, length=128, batch_size=16, steps=800, learning_rate=1e-3,
        seeds=(0, 1, 2),
    ),
    "paper": Config(
        dim=896, mlp_dim=4864, layers=24, heads=14, length=2048, batch_size=256, steps=29_000, learning_rate=4e-4,
        seeds=(0,),
    ),
}  # fmt: skip


class Measured(NamedTuple):
    """One trained network."""

    mean: float  # bits a byte
    skip: float | None  # bits a byte without the simple layers, of hybrids
    context: np.ndarray | None  # bits a byte after the contexts of `Config.contexts`, of uniform networks
    indicators: dict[int, dict[str, float]]  # by layer, with "largest_logit"


def evaluate(
    model: paper.DeconLM, variables: Mapping[str, Any], tokens: jax.Array
) -> tuple[float, dict[int, dict[str, float]]]:
    """Bits a byte; indicators of each layer that has a map, and its largest logit."""

    @jax.jit
    def measure(variables, tokens):
        logits, maps = paper.attention_maps(model, variables, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        indicators = {
            index: {
                **{name: value.mean() for name, value in paper.attention_indicators(found.weights).items()},
                "largest_logit": found.largest_logit,
            }
            for index, found in maps.items()
        }
        return losses.mean() / np.log(2), indicators

    bits, found = jax.device_get(measure(variables, tokens))
    return float(bits), {index: {name: float(value) for name, value in row.items()} for index, row in found.items()}


def context_bits(
    model: paper.DeconLM, variables: Mapping[str, Any], tokens: jax.Array, contexts: tuple[int, ...]
) -> np.ndarray:
    """Bits of the same bytes, the last `TARGETS` of each sequence, when only so many are seen before the first."""

    @jax.jit
    def bits(variables, tokens, context):
        places = jnp.arange(tokens.shape[1])
        valid = jnp.broadcast_to(places >= tokens.shape[1] - TARGETS - context, tokens.shape)
        logits, _ = model.apply(variables, tokens, valid=valid)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return losses[:, -TARGETS:].mean() / np.log(2)

    return np.array([bits(variables, tokens, context) for context in contexts])


def train_all(config: Config, folder: train.Run, force: bool) -> dict[tuple[str, str], list[Measured]]:
    """Trains and measures every network: by variant and arrangement, one a seed."""
    text = read_text(config.data_dir)
    if len(text) < 20 * config.length:
        raise ValueError(f"the text has {len(text)} bytes, fewer than 20 sequences of {config.length}")
    cut = len(text) * 9 // 10
    fixed = tuple(int(byte) for byte in text[: config.length])

    def windows(part: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
        starts = rng.integers(0, len(part) - config.length, count)
        return np.stack([part[start : start + config.length] for start in starts]).astype(np.int32)

    test = jnp.asarray(windows(text[cut:], np.random.default_rng(0), config.windows))
    found: dict[tuple[str, str], list[Measured]] = {}
    for variant in config.variants:
        for arrangement in (UNIFORM,) if variant == "standard" else (UNIFORM, HYBRID):
            model = paper.DeconLM(config.network(variant, arrangement, fixed))
            for seed in config.seeds:

                def batch(step: int, seed: int = seed) -> dict[str, np.ndarray]:
                    return {"tokens": windows(text[:cut], np.random.default_rng([seed + 1, step]), config.batch_size)}

                below = folder.path / "runs" / f"{variant}_{arrangement}_seed{seed}"
                variables = train.fit_generated(
                    model, paper.next_token_loss(model), batch,
                    train.open_run(below, config, resume=folder.resume, force=force),
                    steps=config.steps, learning_rate=config.learning_rate, seed=seed,
                )  # fmt: skip
                mean, indicators = evaluate(model, variables, test)
                skip = context = None
                if arrangement == HYBRID:
                    skip, _ = evaluate(paper.DeconLM(config.network(variant, SKIP, fixed)), variables, test)
                else:
                    context = context_bits(model, variables, test, config.contexts)
                measured = Measured(mean, skip, context, indicators)
                found.setdefault((variant, arrangement), []).append(measured)
                print(f"{variant}, {arrangement}, seed {seed}: {measured.mean:.4f} bits a byte")
    return found


def _over_standard(found: Mapping[tuple[str, str], list[Measured]], variant: str, arrangement: str) -> np.ndarray:
    """Bits a byte more than standard attention, one a seed."""
    rows = zip(found[variant, arrangement], found["standard", UNIFORM], strict=True)
    return np.array([row.mean - standard.mean for row, standard in rows])


def arrangement_claim(found: Mapping[tuple[str, str], list[Measured]], config: Config) -> tuple[reports.Claim, Figure]:
    """Uniform against hybrid against skipped."""
    variants = [variant for variant in config.variants if variant != "standard"]
    measured: dict[str, Any] = {}
    more: dict[tuple[str, str], float] = {}
    for variant in variants:
        for arrangement in (UNIFORM, HYBRID):
            rows = found[variant, arrangement]
            measured[f"{variant}, {arrangement}, bits a byte"] = [round(row.mean, 4) for row in rows]
            more[variant, arrangement] = float(_over_standard(found, variant, arrangement).mean())
            measured[f"{variant}, {arrangement}, more than standard"] = round(more[variant, arrangement], 4)
        skipped = [row.skip for row in found[variant, HYBRID] if row.skip is not None]
        measured[f"{variant}, hybrid without its simple layers, bits a byte"] = [round(bits, 3) for bits in skipped]
        more[variant, SKIP] = float(np.mean(skipped) - np.mean([row.mean for row in found["standard", UNIFORM]]))
    holds = {
        "uniform mlp at least 0.5 bits worse": more.get(("mlp", UNIFORM), np.inf) >= 0.5,
        "uniform mlp the worst": all(
            more[variant, UNIFORM] <= more.get(("mlp", UNIFORM), np.inf) for variant in variants
        ),
        "uniform approx within 0.05": more.get(("approx", UNIFORM), 0.0) < 0.05,
        "every hybrid within 0.1": all(more[variant, HYBRID] <= 0.1 for variant in variants),
        "without simple layers at least 1 bit worse": all(more[variant, SKIP] > 1 for variant in variants),
        "hybrids of nonapprox and rndemb at half the distance of uniform ones, or less": all(
            more[variant, HYBRID] <= max(more[variant, UNIFORM], 0) / 2
            for variant in ("nonapprox", "rndemb")
            if variant in variants
        ),
    }
    measured |= {name: "yes" if held else "no" for name, held in holds.items()}
    verdict: reports.Verdict = "not tested"
    if _is_measured(config):
        failed = not list(holds.values())[-1]
        verdict = "not reproduced" if failed else "reproduced" if all(holds.values()) else "partly reproduced"
    standard = [row.mean for row in found["standard", UNIFORM]]
    claim = reports.Claim(
        statement="Mixing tokens is indispensable; attention's form and its dependence on the sequence may be given up "
        "in every other layer, also where they may not in all.",
        verdict=verdict,
        measured=measured,
        seeds=config.seeds,
        published={
            "500M, perplexity of WikiText, standard": 38.1,
            "uniform (mlp, approx, nonapprox, rndemb, fixedseq, static)": [993.5, 47.9, 9e4, 84.8, 79.1, 79.9],
            "hybrid (the same)": [45.8, 39.4, 39.4, 39.3, 38.5, 38.7],
        },
        baselines={"standard, bits a byte": [round(bits, 4) for bits in standard]},
        interval=f"standard's seeds: {min(standard):.4f} .. {max(standard):.4f}",
        remark=f"{config.layers} layers of width {config.dim}, {config.steps} updates of {config.batch_size} sequences "
        f"of {config.length} bytes. One learning rate for all. The claim fails where the last condition does.",
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(variants))
    for offset, arrangement in ((-0.2, UNIFORM), (0.2, HYBRID)):
        bars = np.array([_over_standard(found, variant, arrangement) for variant in variants])
        axes.bar(places + offset, bars.mean(axis=1), 0.4, yerr=bars.std(axis=1), capsize=3, label=arrangement)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xticks=places, xticklabels=variants, ylabel="bits a byte more than standard")
    axes.legend()
    return claim, figure


def indicator_claim(found: Mapping[tuple[str, str], list[Measured]], config: Config) -> tuple[reports.Claim, Figure]:
    """Late layers of uniform and hybrid nonapprox."""
    simple = config.network("nonapprox", HYBRID, ()).simple_layers
    late = simple[len(simple) // 2 :]
    measured: dict[str, Any] = {}
    values: dict[tuple[str, str], list[float]] = {}
    for arrangement in (UNIFORM, HYBRID):
        for name in ("entropy", "concentration", "head_diversity", "sink", "local_focus_0", "largest_logit"):
            rows = [np.mean([row.indicators[index][name] for index in late]) for row in found["nonapprox", arrangement]]
            values[arrangement, name] = [round(float(value), 4) for value in rows]
            measured[f"nonapprox, {arrangement}, {name} of late simple layers"] = values[arrangement, name]
    lower = np.mean(values[UNIFORM, "entropy"]) < np.mean(values[HYBRID, "entropy"])
    larger = np.mean(values[UNIFORM, "largest_logit"]) > np.mean(values[HYBRID, "largest_logit"])
    verdict: reports.Verdict = "not tested"
    if _is_measured(config):
        verdict = "reproduced" if lower and larger else "partly reproduced" if lower or larger else "not reproduced"
    claim = reports.Claim(
        statement="Scores that do not depend on the query collapse where all layers have them: lower entropy and "
        "larger logits in late layers than in the hybrid.",
        verdict=verdict,
        measured=measured,
        seeds=config.seeds,
        published={"500M, largest logits in late layers, uniform": "> 1e3", "hybrid": "< 10"},
        remark="The same layers of both: the second half of those that are simple in the hybrid.",
    )
    figure = Figure(figsize=(12, 6), layout="constrained")
    names = (
        "entropy", "concentration", "head_diversity", "sink", "local_focus_0", "local_focus_1", "local_focus_2",
        "local_focus_3", "largest_logit",
    )  # fmt: skip
    for axes, name in zip(figure.subplots(2, 5).ravel(), names, strict=False):
        for (variant, arrangement), trained in found.items():
            layers = sorted(trained[0].indicators)
            line = np.array([np.mean([row.indicators[index][name] for row in trained]) for index in layers])
            if name in ("entropy", "concentration") and len(layers):
                line = paper.normalised(line)
            style = "o-" if arrangement == UNIFORM else "s--"
            axes.plot([index + 1 for index in layers], line, style, markersize=3, label=f"{variant}, {arrangement}")
        axes.set(title=name, xlabel="layer", yscale="log" if name == "largest_logit" else "linear")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower right", fontsize="x-small")
    figure.axes[-1].set_axis_off()
    return claim, figure


def context_claim(found: Mapping[tuple[str, str], list[Measured]], config: Config) -> tuple[reports.Claim, Figure]:
    """Bits of the same bytes by the length of their context, uniform networks."""
    rows = {
        variant: np.array([row.context for row in measured])
        for (variant, arrangement), measured in found.items()
        if arrangement == UNIFORM
    }
    measured: dict[str, Any] = {
        f"{variant}, bits after {', '.join(map(str, config.contexts))} bytes": [
            round(float(bits), 4) for bits in row.mean(axis=0)
        ]
        for variant, row in rows.items()
    }
    gains = {variant: float((row[:, 0] - row[:, -1]).mean()) for variant, row in rows.items()}
    for variant, gain in gains.items():
        measured[f"{variant}, bits less after the longest than after the shortest"] = round(gain, 4)
    verdict: reports.Verdict = "not tested"
    if _is_measured(config):
        flat = abs(gains["mlp"]) < 0.01
        falling = all(gain > 0.01 for variant, gain in gains.items() if variant != "mlp")
        verdict = "reproduced" if flat and falling else "partly reproduced" if flat or falling else "not reproduced"
    claim = reports.Claim(
        statement="Without mixing, context is of no use; every other variant uses it.",
        verdict=verdict,
        measured=measured,
        seeds=config.seeds,
        remark=f"The last {TARGETS} bytes of each sequence; flat is a change below 0.01 bits, falling one above.",
    )
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for variant, row in rows.items():
        axes.errorbar(config.contexts, row.mean(axis=0), row.std(axis=0), marker="o", capsize=3, label=variant)
    axes.set(xscale="log", xlabel="bytes of context", ylabel="bits a byte")
    axes.legend()
    return claim, figure


def _is_measured(config: Config) -> bool:
    """Whether numbers mean something: all variants, trained for long enough."""
    return set(config.variants) == set(get_args(paper.AttentionVariant)) and config.steps >= 100


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims; networks are trained below `runs/`, figures lie in `figures/`, numbers in result.json.

    Raises:
      FileNotFoundError: the folder of texts is not there, or empty.
      ValueError: the text is too short.
    """
    read_text(config.data_dir)
    folder = train.open_run(workdir, config, resume=resume, force=force)
    (folder.path / "figures").mkdir(exist_ok=True)
    found = train_all(config, folder, force)
    measures = {"arrangements": arrangement_claim, "indicators": indicator_claim, "context": context_claim}
    if "nonapprox" not in config.variants:
        del measures["indicators"]
    claims = []
    for name, measure in measures.items():
        claim, figure = measure(found, config)
        claims.append(claim)
        reports.show(claim)
        figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
    data = "Python's language reference" if config.data_dir is None else f"text of {config.data_dir.name}"
    result = reports.Result("deconstructing_attention", command_line.preset_name(config, PRESETS), data, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("deconstructing_attention", PRESETS, run)

"""Sentence attention's claims in the small: gates by text at every scale, what makes the gate, what gates select.

    python -m experiments.sentence_attention --preset demo                    # scikit-learn's digits on canvases
    python -m experiments.sentence_attention --preset cpu --data-dir DIR      # bccd.npz lies below DIR

Questions are vectors by `zoo.data.grounding.hashed_sentences`, a stand-in for all-MiniLM-L6-v2: paraphrases share
words, not only meaning. Networks start from nothing, where the paper's starts from ImageNet.

The follow-up's recipe: 70 epochs of AdamW, weight decay 0.05, learning rate 1e-4 at a batch of 16 falling as a
polynomial of power 0.9 after 5 epochs of warm-up, crops of 768 pixels, RandAugment of image and mask.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import grain
import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.backbones.efficientnet import EfficientNetConfig
from zoo.data.bccd import CLASSES, bccd
from zoo.data.grounding import HELD_OUT, Questions, cell_questions, digit_questions
from zoo.data.images import folder_of
from zoo.papers import sentence_attention
from zoo.papers.sentence_attention import SentenceAttentionConfig, SentenceAttentionModel

ClaimName = Literal["scales", "gate", "selection"]
_KNOWN, _HELD_OUT = slice(None, -HELD_OUT), slice(-HELD_OUT, None)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How networks are trained: AdamW, linear warm-up, cosine."""

    epochs: int = 12
    batch_size: int = 16
    # At its highest.
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    # Shorter epochs, for a quick look; None: all questions.
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and which claims to measure."""

    # bccd needs data_dir; canvases are made of digits that come inside scikit-learn.
    data: Literal["bccd", "digits"] = "bccd"
    # A folder below which bccd.npz lies.
    data_dir: pathlib.Path | None = None
    claims: tuple[ClaimName, ...] = ("scales", "selection", "gate")
    model: SentenceAttentionConfig = SentenceAttentionConfig(
        EfficientNetConfig(0.5, 0.34), dropout=0.1, image_size=(96, 128)
    )
    training: Fit = Fit()
    seeds: tuple[int, ...] = (1, 2)
    # Canvases for training on digits, a quarter as many for testing; "gate" is always on them.
    canvases: int = 800
    # Their size in pixels.
    canvas: int = 96

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must name at least one seed")
        if self.canvases < 4:
            raise ValueError(f"canvases must be at least 4, got {self.canvases}")
        if self.data == "digits" and self.model.image_size != (self.canvas, self.canvas):
            raise ValueError(f"model.image_size must be that of the canvas, {self.canvas}, got {self.model.image_size}")


PRESETS = {
    # Minutes, without files.
    "demo": Config(
        data="digits",
        claims=("selection",),
        model=SentenceAttentionConfig(EfficientNetConfig(0.5, 0.34), dropout=0.1, image_size=(96, 96)),
        seeds=(1,),
    ),
    # Seconds.
    "smoke": Config(
        data="digits",
        claims=("selection",),
        model=SentenceAttentionConfig(EfficientNetConfig(0.25, 0.1), dropout=0.1, image_size=(24, 24)),
        training=Fit(epochs=1, batch_size=4, steps_per_epoch=2),
        seeds=(1,),
        canvases=16,
        canvas=24,
    ),
    "cpu": Config(),
    # As published but for the data, and for weights to start from.
    "paper": Config(
        model=SentenceAttentionConfig(EfficientNetConfig(2.0, 3.1), image_size=(240, 320)),
        claims=("scales",),
        training=Fit(epochs=70, learning_rate=1e-4),
        seeds=(1, 2, 3),
    ),
}  # fmt: skip

OpenRun = Callable[[str], train.Run]


def cells(config: Config) -> tuple[Questions, Questions]:
    """Questions about blood smears, for training and, in phrasings held out, for testing."""
    data = bccd(folder_of("bccd", config.data_dir))
    size = config.model.image_size
    return cell_questions(data.train, size, _KNOWN), cell_questions(data.test, size, _HELD_OUT)


def digits(config: Config, relational: bool = False) -> tuple[Questions, Questions]:
    """Likewise about canvases of digits."""
    make: Any = partial(digit_questions, relational=relational, size=config.canvas)
    return make(config.canvases, _KNOWN, 0), make(config.canvases // 4, _HELD_OUT, 1, part="test")


def batches(questions: Questions, batch_size: int, seed: int | None) -> grain.MapDataset:
    """With a seed, shuffled without end, a phrasing drawn for each; else each question in all phrasings, once."""

    def arrange(item: Any, phrasing: int) -> Any:
        return {
            "images": item["image"].astype(np.float32), "text": item["text"][phrasing],
            "labels": item["mask"].astype(np.int32), "kind": np.int32(item["kind"]),
        }  # fmt: skip

    def draw(item: Any, rng: np.random.Generator) -> Any:
        return arrange(item, int(rng.integers(len(item["text"]))))

    if seed is not None:
        dataset: Any = grain.MapDataset.source(questions).seed(seed).shuffle().repeat()
        return dataset.random_map(draw).batch(batch_size, drop_remainder=True)
    phrasings = questions.vectors.shape[1]
    each = grain.MapDataset.range(len(questions) * phrasings)
    return each.map(lambda i: arrange(questions[i // phrasings], i % phrasings)).batch(batch_size)


def fit(
    model: SentenceAttentionModel, questions: Questions, options: Fit, run: train.Run, seed: int
) -> Any:  # fmt: skip
    """Trains with cross-entropy, classes weighted by the inverse root of their frequency; the variables."""
    steps = min(max(len(questions) // options.batch_size, 1), options.steps_per_epoch or len(questions))
    share = float(questions.masks.mean())
    weights = [1 / math.sqrt(1 - share), 1 / math.sqrt(max(share, 1e-6))]
    optimizer = train.OptimizerConfig(
        learning_rate=options.learning_rate, schedule="cosine", warmup_steps=options.epochs * steps // 10,
        weight_decay=options.weight_decay, clip_norm=1.0,
    )  # fmt: skip
    result = train.fit_network(
        model, sentence_attention.loss(model, weights), sentence_attention.example_inputs(model.config, 1),
        batches(questions, options.batch_size, seed), optimizer, run, seed, epochs=options.epochs,
        steps_per_epoch=steps,
    )  # fmt: skip
    return result.state.evaluation_variables


def measure(model: SentenceAttentionModel, variables: Any, questions: Questions, batch_size: int) -> dict[str, float]:
    """Evidence's intersection over union in percent: over the set, a mean over questions, and by kind ("kind 0")."""
    apply: Callable[..., Any] = model.apply
    matrix = jax.jit(
        lambda images, text, labels: sentence_attention.confusion(apply(variables, images, text), labels)
    )  # fmt: skip
    found, kinds = [], []
    for batch in batches(questions, batch_size, None):
        found.append(np.asarray(matrix(batch["images"], batch["text"], batch["labels"])))
        kinds.append(batch["kind"])
    matrices, kind = np.concatenate(found), np.concatenate(kinds)

    def evidence(m: np.ndarray) -> Any:
        return m[..., 1, 1] / np.maximum(m[..., 1, :].sum(-1) + m[..., :, 1].sum(-1) - m[..., 1, 1], 1)

    scores = {"set": evidence(matrices.sum(0)), "questions": evidence(matrices).mean()}
    scores |= {f"kind {k}": evidence(matrices[kind == k].sum(0)) for k in np.unique(kind)}
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def compare(
    configs: dict[str, SentenceAttentionConfig], data: tuple[Questions, Questions], config: Config, open_run: OpenRun,
    by: str,
) -> dict[str, list[float]]:  # fmt: skip
    """A score of `measure` of each network, one a seed."""
    scores: dict[str, list[float]] = {name: [] for name in configs}
    for seed in config.seeds:
        for name, options in configs.items():
            model = SentenceAttentionModel(options)
            variables = fit(model, data[0], config.training, open_run(f"{name.replace(' ', '_')}_seed{seed}"), seed)
            scores[name].append(measure(model, variables, data[1], config.training.batch_size)[by])
    return scores


def scales(config: Config, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """Gates at all scales beside no text, text beside the coarsest map, and a gate at the coarsest map only."""
    model = config.model
    last = len(model.backbone.widths) - 1
    configs = {
        "all scales": model,
        "last scale": dataclasses.replace(model, scales=(last,)),
        "text beside the last map": dataclasses.replace(model, scales=(), tile_text=True),
        "no text": dataclasses.replace(model, scales=()),
    }
    scores = compare(configs, cells(config) if config.data == "bccd" else digits(config), config, open_run, "questions")
    gains = {name: reports.paired_difference(scores["all scales"], scores[name]) for name in configs}
    verdict: reports.Verdict = "not reproduced"
    if gains["no text"][0] > 2:
        best = all(gains[name][0] > 0 for name in ("last scale", "text beside the last map"))
        verdict = "reproduced" if best else "partly reproduced"
    claim = reports.Claim(
        statement="Gating channels by text at every scale finds what was asked for, best of all.",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={"all scales, mean IoU %": scores["all scales"]},
        baselines={f"{name}, mean IoU %": values for name, values in scores.items() if name != "all scales"},
        seeds=config.seeds,
        interval=_intervals("all scales", gains, config),
        remark=f"{_setting(config, config.data)}. Without text the best guess is the union of what could be asked for.",
    )
    return claim, _figure(scores)


def gate(config: Config, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """The published gate beside a sigmoid, no layer norm, and half the width in place of four times."""
    model = dataclasses.replace(config.model, image_size=(config.canvas, config.canvas))
    configs = {
        "published": model,
        "sigmoid": dataclasses.replace(model, gate="sigmoid"),
        "no layer norm": dataclasses.replace(model, gate_norm=False),
        "half as wide": dataclasses.replace(model, hidden_ratio=0.5),
    }
    scores = compare(configs, digits(config), config, open_run, "questions")
    gains = {name: reports.paired_difference(scores["published"], scores[name]) for name in configs}
    better = [gains[name][0] > 0 for name in configs if name != "published"]
    verdict: reports.Verdict = "reproduced" if all(better) else "partly reproduced" if any(better) else "not reproduced"
    hard = SentenceAttentionModel(model)
    data = digits(config, relational=True)
    relation = measure(
        hard, fit(hard, data[0], config.training, open_run("relational"), config.seeds[0]), data[1],
        config.training.batch_size,
    )  # fmt: skip
    claim = reports.Claim(
        statement="The softmax, the layer norm and the wide hidden layer of the gate each help.",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={"published, mean IoU %": scores["published"], "left of a digit, mean IoU %": relation["questions"]},
        baselines={f"{name}, mean IoU %": values for name, values in scores.items() if name != "published"},
        seeds=config.seeds,
        interval=_intervals("published", gains, config),
        remark=_setting(config, "digits on canvases"),
    )
    return claim, _figure(scores)


def selection(config: Config, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """Which channels questions select: overlap of the ten with most weight, of paraphrases and of different things."""
    data = cells(config) if config.data == "bccd" else digits(config)
    vectors = np.concatenate([data[0].vectors, data[1].vectors], axis=1)
    model = SentenceAttentionModel(config.model)
    within, between, entropies = [], [], []
    weights: list[Any] = []
    for seed in config.seeds:
        variables = fit(model, data[0], config.training, open_run(f"seed{seed}"), seed)
        text = vectors.reshape(-1, vectors.shape[-1])
        weights = [np.asarray(w) for w in model.apply(variables, text, method="channel_weights")]
        same, other = overlaps([w.reshape(*vectors.shape[:2], -1) for w in weights])
        within.append(round(same, 3))
        between.append(round(other, 3))
        entropy = [np.mean(-np.sum(w * np.log(w + 1e-12), -1) / np.log(w.shape[-1])) for w in weights]
        entropies.append([round(float(value), 3) for value in entropy])
    verdict: reports.Verdict = "not reproduced"
    if np.mean(within) > np.mean(between):
        verdict = "reproduced" if np.mean(within) > 0.6 and np.mean(between) < 0.3 else "partly reproduced"
    claim = reports.Claim(
        statement="Different questions select different channels, paraphrases the same ones.",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={
            "Jaccard overlap of paraphrases' channels": within,
            "Jaccard overlap of different questions' channels": between,
            "entropy of the weights over its maximum, scale by scale": entropies,
        },
        seeds=config.seeds,
        remark=f"{_setting(config, config.data)}. Expected above 0.6 and below 0.3, of ten channels with most weight.",
    )
    return claim, weights_figure(weights, vectors.shape[:2], config)


def overlaps(weights: list[np.ndarray], most: int = 10) -> tuple[float, float]:
    """Mean Jaccard overlap of the channels with most weight, of (kinds, phrasings, C) a scale: within kinds, between.

    Scales of fewer than twice as many channels are left out: there, any two choices overlap.
    """
    within: list[float] = []
    between: list[float] = []
    wide = [w for w in weights if w.shape[-1] >= 2 * most] or weights[-1:]
    for scale in wide:
        kinds, phrasings, _ = scale.shape
        chosen = [set(np.argsort(w)[-most:].tolist()) for w in scale.reshape(kinds * phrasings, -1)]
        for i in range(len(chosen)):
            for j in range(i):
                value = len(chosen[i] & chosen[j]) / len(chosen[i] | chosen[j])
                (within if i // phrasings == j // phrasings else between).append(value)
    return float(np.mean(within)), float(np.mean(between))


def weights_figure(weights: list[np.ndarray], shape: tuple[int, int], config: Config) -> Figure:
    """The weights of the coarsest map's channels, a row a question, paraphrases one below the other."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(weights[-1], aspect="auto")
    labels = CLASSES if config.data == "bccd" else [str(number) for number in range(10)]
    axes.set_yticks(np.arange(shape[0]) * shape[1] + (shape[1] - 1) / 2, labels)
    axes.set(xlabel="channel of the coarsest map", ylabel="question")
    return figure


def _setting(config: Config, data: str) -> str:
    height, width = config.model.image_size
    return (
        f"{data}, {height} x {width} pixels, {config.training.epochs} epochs from nothing, narrow networks, hashed "
        "sentences, phrasings held out for testing"
    )


def _intervals(first: str, gains: dict[str, tuple[float, float]], config: Config) -> str:
    if len(config.seeds) < 2:
        return ""
    return "; ".join(
        f"{first} - {name}: {m:+.2f} points, standard error {e:.2f}" for name, (m, e) in gains.items() if name != first
    )


def _figure(scores: dict[str, list[float]]) -> Figure:
    """Every training a dot, with the mean."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(scores.values()):
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot([place - 0.2, place + 0.2], [np.mean(values)] * 2, color="black")
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel("mean IoU, %")
    return figure


CLAIMS: dict[str, Callable[[Config, OpenRun], tuple[reports.Claim, Figure]]] = {
    "scales": scales, "gate": gate, "selection": selection
}  # fmt: skip


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims of a config and leaves everything in `workdir`; trainings lie below `runs/`.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
      ValueError, FileNotFoundError, ModuleNotFoundError: the data is not there.
    """
    if config.data == "bccd":  # every complaint about the data comes before the first compilation
        bccd(folder_of("bccd", config.data_dir))
    folder = train.open_run(workdir, config, resume=resume, force=force)
    (folder.path / "figures").mkdir(exist_ok=True)
    claims = []
    for name in config.claims:

        def below(run: str, name: str = name) -> train.Run:
            return train.open_run(folder.path / "runs" / name / run, config, resume=resume, force=force)

        claim, figure = CLAIMS[name](config, below)
        figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
        claims.append(claim)
        reports.show(claim)
    preset = command_line.preset_name(config, PRESETS)
    result = reports.Result("sentence_attention", preset, config.data, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("sentence_attention", PRESETS, run)

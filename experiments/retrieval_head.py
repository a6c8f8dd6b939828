"""Retrieval heads of SmolLM2-135M-Instruct: found by needles in novels, and what is lost without them.

    python -m experiments.retrieval_head --preset cpu --data-dir DIR_OF_public_domain_novels

Detection: six needles at several depths and lengths; scores of all heads over the answers that succeed.
Masking: the same needles with the strongest heads masked while answering, against heads drawn at random.
Controls: the loss on a text under the same masks.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line, lm_backbone
from zoo import reports, train
from zoo.backbones import PretrainedLM, load_smollm2
from zoo.data.text import read_text
from zoo.papers import retrieval_head
from zoo.papers.retrieval_head import SUCCESS, HeadScores, Needle
from zoo.probing import probe

NEEDLES = (
    Needle(
        "What is the best thing to do in Beijing?",
        "The best thing to do in Beijing is to take a walk in Chaoyang Park and have a cup of Espresso in the evening.",
        "take a walk in Chaoyang Park and have a cup of Espresso in the evening",
    ),
    Needle(
        "What is the best thing to do in San Francisco?",
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
        "eat a sandwich and sit in Dolores Park on a sunny day",
    ),
    Needle(
        "What is the secret ingredient of the village baker's famous soup?",
        "The secret ingredient of the village baker's famous soup is a spoon of roasted pumpkin seeds mixed with dried "
        "lavender.",
        "a spoon of roasted pumpkin seeds mixed with dried lavender",
    ),
    Needle(
        "What is the password of the observatory's blue door?",
        "The password of the observatory's blue door is silver kangaroo seven lantern.",
        "silver kangaroo seven lantern",
    ),
    Needle(
        "When and where is the annual harbour festival of Port Merrin held?",
        "The annual harbour festival of Port Merrin is held on the third Sunday of November beside the old copper "
        "lighthouse.",
        "on the third Sunday of November beside the old copper lighthouse",
    ),
    Needle(
        "Where does Doctor Alvarez keep her spare microscope?",
        "Doctor Alvarez keeps her spare microscope in a yellow cabinet behind the library staircase.",
        "in a yellow cabinet behind the library staircase",
    ),
)
# The strongest heads of a reference run in another framework, same weights, needles and depths.
REFERENCE_TOP = ((18, 6), (17, 3), (23, 2), (18, 7), (17, 4), (23, 7))
REFERENCE = {"share of heads at 0.1 or more": 0.074, "top heads": "(18,6) (17,3) (23,2) (18,7) (17,4) (23,7)"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Where needles are hidden, and what is masked."""

    # The folder of the novels; None takes the language reference that comes with Python.
    data_dir: pathlib.Path | None = None
    # A random network of a few features in place of the checkpoint.
    tiny: bool = False
    # Tokens of the text, the needle included.
    lengths: tuple[int, ...] = (256, 512, 1024)
    # Per cent of the text before the needle.
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    # How many of the needles.
    needles: int = 6
    # The most tokens of an answer.
    steps: int = 40
    # Numbers of heads that are masked.
    masked: tuple[int, ...] = (3, 5, 10, 20, 30)
    # Draws of random heads for each number.
    draws: int = 3
    # Needles (the first ones), depths, text and answer of the masking.
    masking_needles: int = 5
    masking_depths: tuple[float, ...] = (0, 50, 100)
    masking_length: int = 512
    masking_steps: int = 22
    # Tokens of the text whose loss is the control.
    control_tokens: int = 512

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= len(NEEDLES) or not 1 <= self.masking_needles <= len(NEEDLES):
            raise ValueError(f"needles must be in 1 .. {len(NEEDLES)}, got {self.needles} and {self.masking_needles}")
        for depth in (*self.depths, *self.masking_depths):
            if not 0 <= depth <= 100:
                raise ValueError(f"depths must be in 0 .. 100 per cent, got {depth}")


PRESETS = {
    "cpu": Config(),
    "smoke": Config(
        tiny=True, lengths=(200,), depths=(50,), needles=1, steps=3, masked=(1,), draws=1, masking_needles=1,
        masking_depths=(50,), masking_length=200, masking_steps=2, control_tokens=16,
    ),
    # The published lengths and depths, for a model and a machine that take them.
    "paper": Config(
        lengths=tuple(round(x) for x in np.linspace(1000, 8000, 20)),
        depths=tuple(float(round(x)) for x in np.linspace(0, 100, 10)),
        steps=50,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sample:
    """A needle of a text at a depth, and its answer."""

    needle: int
    length: int
    depth: float
    recall: float
    response: str
    score: np.ndarray  # (layers, heads)


class Laboratory:
    """A model and its texts."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pretrained: PretrainedLM = lm_backbone.tiny() if config.tiny else load_smollm2()
        self.shape = (self.pretrained.model.config.layers, self.pretrained.model.config.heads)
        if config.data_dir is None:
            texts = [bytes(read_text()[:400_000]).decode()] * 3
        else:
            texts = [(config.data_dir / f"{name}.txt").read_text() for name in ("mohicans_1", "mohicans_2", "dracula")]
        longest = max(*config.lengths, config.masking_length, config.control_tokens) + 64
        self.haystacks = [self.pretrained.tokenizer.encode(text[: 8 * longest]) for text in texts]

    def prompts(self, index: int, length: int, depths: tuple[float, ...]) -> list[retrieval_head.NeedlePrompt]:
        """A needle at all depths; prompts are of one length for all needles, so that one program serves."""
        tokenizer, haystack = self.pretrained.tokenizer, self.haystacks[index % 3]

        def around(needle: Needle) -> int:
            short = len(tokenizer.encode(f" {needle.sentence}"))
            return (
                len(retrieval_head.needle_prompt(tokenizer, haystack, needle, short, 0, buffer=0, **style).tokens)
                - short
            )

        style: dict[str, Any] = {"style": "base" if tokenizer.template is None else "chat"}
        most = max(around(needle) for needle in NEEDLES)
        length += most - around(NEEDLES[index])
        return [
            retrieval_head.needle_prompt(tokenizer, haystack, NEEDLES[index], length, depth, buffer=0, **style)
            for depth in depths
        ]

    def answers(self, index: int, length: int, depths: tuple[float, ...], steps: int) -> Answering:
        """Prompts of a needle at all depths, read once."""
        return Answering(self, index, length, depths, steps)

    def loss(self, mask: np.ndarray) -> float:
        """Mean loss of a text's tokens with heads masked everywhere."""
        model, variables, _ = self.pretrained
        tokens = jnp.asarray(self.haystacks[2][: self.config.control_tokens], jnp.int32)[None]
        return float(_masked_loss(model, variables, tokens, jnp.asarray(mask)))


@jax.jit
def _mean_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[0, :-1]), tokens[0, 1:, None], axis=1))


def _masked_loss(model: Any, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return _mean_loss(_masked_logits(model, variables, tokens, mask), tokens)


def _logits(model: Any, variables: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    def silence(layer: int) -> Any:
        return lambda query: jnp.where(mask[layer][:, None], 0, query)

    patch = {f"q.{layer}": silence(layer) for layer in range(model.config.layers)}
    return probe(model, variables, {"tokens": tokens}, patch=patch).logits


_masked_logits = jax.jit(_logits, static_argnums=0)


class Answering:
    """Prompts that were read once and can be answered under any mask."""

    def __init__(self, laboratory: Laboratory, index: int, length: int, depths: tuple[float, ...], steps: int) -> None:
        self.laboratory, self.index, self.length, self.depths, self.steps = laboratory, index, length, depths, steps
        self.prompts = laboratory.prompts(index, length, depths)
        self.tokens = jnp.asarray([prompt.tokens for prompt in self.prompts], jnp.int32)
        model, variables, _ = laboratory.pretrained
        self.state = retrieval_head.prefill(model, variables, self.tokens, steps)

    def samples(self, heads: list[tuple[int, int]]) -> Iterator[Sample]:
        """Answers with heads masked while answering."""
        model, variables, tokenizer = self.laboratory.pretrained
        mask = retrieval_head.head_mask(heads, self.laboratory.shape)
        found = retrieval_head.retrieve(
            model, variables, self.tokens, steps=self.steps, masked=jnp.asarray(mask), stop_token=tokenizer.end,
            state=self.state,
        )  # fmt: skip
        tokens, keys, lengths = (np.asarray(part) for part in (found.tokens, found.best_key, found.lengths))
        for row, (prompt, depth) in enumerate(zip(self.prompts, self.depths, strict=True)):
            generated = tokens[row, : lengths[row]]
            response = tokenizer.decode(generated)
            score = np.zeros(self.laboratory.shape, np.float32)
            if prompt.span[0] >= 0:
                score = retrieval_head.retrieval_score(keys[row, : lengths[row]], generated, prompt.tokens, prompt.span)
            recall = retrieval_head.rouge1_recall(NEEDLES[self.index].answer, response)
            yield Sample(self.index, self.length, depth, recall, response, score)


def detection(laboratory: Laboratory, folder: pathlib.Path) -> tuple[HeadScores, list[reports.Claim], list[Sample]]:
    """Scores of all heads, and what the paper says of them."""
    config = laboratory.config
    samples: list[Sample] = []
    for length in config.lengths:
        for index in range(config.needles):
            samples += laboratory.answers(index, length, config.depths, config.steps).samples([])
            print(
                f"length {length}, needle {index}: recall {[round(s.recall) for s in samples[-len(config.depths) :]]}"
            )
    good = [sample for sample in samples if sample.recall > SUCCESS]
    scores = HeadScores(np.array([sample.score for sample in good]).reshape(-1, *laboratory.shape))
    scores.save(folder / "head_scores.json")
    summary = retrieval_head.summarize(scores.mean, scores.frequency)
    top = retrieval_head.top_heads(scores.mean, 20)
    measured: dict[str, Any] = {
        f"success at {length} tokens": round(
            float(np.mean([s.recall > SUCCESS for s in samples if s.length == length])), 3
        )
        for length in config.lengths
    }
    measured |= {
        "successful samples": len(good),
        "share of heads at 0.1 or more": round(summary.retrieval, 4),
        "share in (0, 0.1)": round(summary.weak, 4),
        "share exactly 0": round(summary.zero, 4),
        "heads at 0.5 or more": summary.strong,
        "heads active in every sample": summary.always,
        "top heads": " ".join(f"({layer},{head}) {scores.mean[layer, head]:.3f}" for layer, head in top),
    }
    tested = not config.tiny and len(good) > 10
    sparse: reports.Verdict = "not tested"
    if tested:
        same = set(top[:6]) == set(REFERENCE_TOP)
        sparse = "reproduced" if 0.05 <= summary.retrieval <= 0.10 else "not reproduced"
        measured["the strongest six are those of the reference"] = same
    by_length = {}
    for length in config.lengths:
        rows = [s.score for s in good if s.length == length]
        if rows:
            by_length[length] = np.mean(rows, axis=0)
    maps = list(by_length.values())
    correlations = [
        round(retrieval_head.similarity(a, b), 4) for i, a in enumerate(maps) for b in maps[i + 1 :]
    ]  # fmt: skip
    by_needle = [np.mean([s.score for s in good if s.needle == i], axis=0) for i in {s.needle for s in good}]
    shared = [
        len(set(retrieval_head.top_heads(a, 20)) & set(retrieval_head.top_heads(b, 20)))
        for i, a in enumerate(by_needle)
        for b in by_needle[i + 1 :]
    ]
    stable: reports.Verdict = "not tested"
    if tested and correlations and shared:
        stable = "reproduced" if min(correlations) > 0.8 and np.mean(shared) >= 10 else "not reproduced"
    claims = [
        reports.Claim(
            statement="Few heads retrieve: less than one in ten copies a tenth of the needle or more.",
            verdict=sparse, measured=measured, published=dict(REFERENCE),
            remark="Held against a reference run with the same weights and needles; bounds 5 to 10 %.",
        ),
        reports.Claim(
            statement="Retrieval heads are a property of the model: other lengths and needles find the same ones.",
            verdict=stable,
            measured={
                "correlation of score maps between lengths": correlations,
                "heads that the top 20 of two needles share": shared,
            },
            published={"correlation between lengths": "0.984-0.994", "shared heads": "14-17"},
        ),
    ]  # fmt: skip
    return scores, claims, samples


def masking(laboratory: Laboratory, scores: HeadScores) -> tuple[reports.Claim, Figure]:
    """Answers without the strongest heads, and without as many others."""
    config = laboratory.config
    rng = np.random.default_rng(0)
    conditions: dict[str, list[tuple[int, int]]] = {"none": []}
    for count in config.masked:
        conditions[f"top {count}"] = retrieval_head.top_heads(scores.mean, count)
        for draw in range(config.draws):
            conditions[f"random {count}, draw {draw + 1}"] = retrieval_head.random_heads(scores.mean, count, rng)
    recalls: dict[str, list[float]] = {name: [] for name in conditions}
    for index in range(config.masking_needles):
        answering = laboratory.answers(index, config.masking_length, config.masking_depths, config.masking_steps)
        for name, heads in conditions.items():
            recalls[name] += [sample.recall for sample in answering.samples(heads)]
        print(f"masking, needle {index} done")
    success = {name: float(np.mean(np.array(values) > SUCCESS)) for name, values in recalls.items()}
    losses = {
        name: laboratory.loss(retrieval_head.head_mask(heads, laboratory.shape)) for name, heads in conditions.items()
    }
    measured: dict[str, Any] = {}
    for name in conditions:
        measured[f"{name}: success, mean recall, perplexity of a text"] = [
            round(success[name], 3), round(float(np.mean(recalls[name])), 1), round(float(np.exp(losses[name])), 1),
        ]  # fmt: skip
    counts = [count for count in config.masked if count >= 5]
    verdict: reports.Verdict = "not tested"
    interval = ""
    if counts and not config.tiny:
        top = np.concatenate([np.array(recalls[f"top {count}"]) > SUCCESS for count in counts])
        others = np.concatenate(
            [
                np.array(recalls[f"random {count}, draw {d + 1}"]) > SUCCESS
                for count in counts
                for d in range(config.draws)
            ]
        )
        draws = np.random.default_rng(1)
        differences = [
            draws.choice(others, len(others)).mean() - draws.choice(top, len(top)).mean() for _ in range(2000)
        ]
        low, high = np.quantile(differences, [0.025, 0.975])
        interval = f"95% of success with random less success with top heads masked, bootstrap: [{low:.2f}, {high:.2f}]"
        verdict = "reproduced" if low > 0.2 else "not reproduced"
    claim = reports.Claim(
        statement="Masking the retrieval heads stops retrieval; masking as many others does not.",
        verdict=verdict,
        measured=measured,
        published={
            "reference run, success: none, top 3, 5, 10, 20, 30": [0.93, 0.60, 0.27, 0.20, 0.07, 0.07],
            "reference run, random 10, 20": [0.97, 0.89],
        },
        interval=interval,
        remark="Random heads are drawn outside the strongest 15 %. Perplexity is with the same heads masked at every "
        "position, of the beginning of a novel.",
    )
    return claim, _masking_figure(config, success)


def _masking_figure(config: Config, success: dict[str, float]) -> Figure:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(success["none"], color="grey", label="no head masked")
    axes.plot(config.masked, [success[f"top {count}"] for count in config.masked], marker="o", label="strongest")
    rows = np.array([[success[f"random {n}, draw {d + 1}"] for d in range(config.draws)] for n in config.masked])
    axes.errorbar(config.masked, rows.mean(1), rows.std(1), marker="o", capsize=3, label="random")
    axes.set(xlabel="heads masked", ylabel="share of needles found", ylim=(-0.05, 1.05))
    axes.legend()
    return figure


def score_figure(scores: HeadScores) -> Figure:
    """Scores by layer and head, and their histogram."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(scores.mean.T, aspect="auto", cmap="viridis", vmin=0)
    left.set(xlabel="layer", ylabel="head", title="mean retrieval score")
    figure.colorbar(image, ax=left)
    right.hist(scores.mean.ravel(), bins=40)
    right.set(xlabel="mean retrieval score", ylabel="heads", yscale="log")
    return figure


def needle_figure(config: Config, samples: list[Sample]) -> Figure:
    """Recall by length and depth, mean of the needles."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grid = [
        [np.mean([s.recall for s in samples if (s.length, s.depth) == (length, depth)]) for length in config.lengths]
        for depth in config.depths
    ]
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(config.lengths)), map(str, config.lengths))
    axes.set_yticks(range(len(config.depths)), map(str, config.depths))
    axes.set(xlabel="tokens", ylabel="depth (%)", title="ROUGE-1 recall")
    figure.colorbar(image, ax=axes)
    return figure


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Finds the heads, masks them, and leaves result.json, head_scores.json and figures in `workdir`.

    Raises:
      FileNotFoundError: a novel is not in data_dir.
      ModuleNotFoundError: the package with the weights, or rouge-score, is not installed.
    """
    folder = train.open_run(workdir, config, resume=resume, force=force)
    laboratory = Laboratory(config)
    scores, claims, samples = detection(laboratory, folder.path)
    claim, figure = masking(laboratory, scores)
    claims.append(claim)
    for each in claims:
        reports.show(each)
    figures: dict[Literal["scores", "needles", "masking"], Figure] = {
        "scores": score_figure(scores), "needles": needle_figure(config, samples), "masking": figure,
    }  # fmt: skip
    (folder.path / "figures").mkdir(exist_ok=True)
    for name, picture in figures.items():
        picture.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
    preset = command_line.preset_name(config, PRESETS)
    data = "Python's language reference" if config.data_dir is None else "public_domain_novels"
    result = reports.Result("retrieval_head", preset, data, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("retrieval_head", PRESETS, run)

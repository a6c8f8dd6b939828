"""Based's claims in the small: recall against state size, the feature map's part in it, and decoding at one speed.

    python -m experiments.based --preset cpu      # the claims, about a quarter of an hour on two cores
    python -m experiments.based --preset paper    # lengths, widths and examples as published, for an accelerator

The task makes its own data (`zoo.data.recall`). The published recipe: AdamW, weight decay 0.1, a cosine down to 0, and
of four learning rates each model's best; `cpu` has the highest, at which small networks learn the task soonest.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from zoo import compilation, mixers, reports, train
from zoo.data.recall import IGNORED, mqar
from zoo.papers.based import Based, BasedConfig, BasedMQAR, MQARConfig
from zoo.train.recall import recall_metrics

# What the second layer is; the first is a short convolution.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"mixers": ("BaseConv", "MHA")},
    "based, f = 4": {"feature_dim": 4},
    "based, f = 8": {"feature_dim": 8},
    "based, f = 16": {"feature_dim": 16},
    "window of 8": {"mixers": ("BaseConv", "SlidingAttn"), "block_size": 7},
    "window of 16": {"mixers": ("BaseConv", "SlidingAttn"), "block_size": 15},
    "window of 32": {"mixers": ("BaseConv", "SlidingAttn"), "block_size": 31},
    "convolution": {"mixers": ("BaseConv",)},
    "gated linear attention": {"mixers": ("BaseConv", "gla")},
    "state space (Mamba-2)": {"mixers": ("BaseConv", "ssd"), "mixer_options": {"state_size": 16}},
}
# Linear attentions of as many features as Taylor's map of f = 16 has, 153 of them different.
FEATURE_MAPS: Mapping[str, Mapping[str, Any]] = {
    name: {"mixers": ("BaseConv", "linear_attention"), "mixer_options": {"feature_map": name, "feature_dim": width}}
    for name, width in (("elu", 153), ("relu", 153), ("square", 76), ("performer", 153), ("cosformer", 76))
}
TAYLOR = "based, f = 16"
CLOSE = 0.05  # Based within this of attention's accuracy
FAR = 0.6  # windows and convolutions at most this


@dataclasses.dataclass(frozen=True)
class Segment:
    """Examples of one length and number of pairs."""

    length: int
    pairs: int
    examples: int


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Decoding: a Based model and an attention model of one width and depth."""

    # Tokens of the past.
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    # Sequences at a time.
    batch_size: int = 8
    # The published pattern of layers; width and heads are halved.
    model: BasedConfig = BasedConfig(
        vocab_size=256, dim=512, num_layers=5, num_heads=8, mlp_dim=1024, linear_layers=(1,), window_layers=(2,)
    )
    # Tokens decoded in each timing.
    tokens: int = 16
    # Timings, of both models in turn; the median counts.
    repetitions: int = 7
    # An accelerator whose compiler says what a step moves, at the published width; None: not asked.
    target: str | None = "tpu-v5e"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train and to measure."""

    # recall: accuracy against state size; features: maps of one state size; throughput: tokens a second.
    claims: tuple[Literal["recall", "features", "throughput"], ...] = ("recall", "features", "throughput")
    # The task's alphabet.
    vocab_size: int = 256
    # Width of the networks.
    d_model: int = 64
    # Rows to train on.
    train: tuple[Segment, ...] = (Segment(64, 4, 10_000), Segment(64, 8, 10_000))
    # Rows to test on.
    test: tuple[Segment, ...] = (Segment(64, 4, 512), Segment(64, 8, 512))
    # Models of claim "recall", keys of MODELS.
    models: tuple[str, ...] = tuple(MODELS)
    # Maps of claim "features", keys of FEATURE_MAPS.
    feature_maps: tuple[str, ...] = tuple(FEATURE_MAPS)
    # One training each.
    seeds: tuple[int, ...] = (1, 2)
    # Passes over the examples.
    epochs: int = 2
    # Rows a step.
    batch_size: int = 64
    # At their peak: of several, a model's best counts, as published (1e-4, 4.6e-4, 2.2e-3 and 1e-2).
    learning_rates: tuple[float, ...] = (1e-2,)
    # How decoding is timed.
    throughput: Throughput = Throughput()

    def __post_init__(self) -> None:
        if not (self.seeds and self.learning_rates and self.train and self.test) or self.epochs < 1:
            raise ValueError("seeds, learning_rates, train and test must not be empty, epochs at least 1")
        for segment in (*self.train, *self.test):
            if segment.examples < self.batch_size:
                raise ValueError(f"a segment needs at least batch_size = {self.batch_size} examples: {segment}")
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"models must be of {list(MODELS)}, got {name!r}")
        for name in self.feature_maps:
            if name not in FEATURE_MAPS:
                raise ValueError(f"feature_maps must be of {list(FEATURE_MAPS)}, got {name!r}")


_PAPER_TRAIN = (
    Segment(64, 4, 100_000), Segment(128, 8, 20_000), Segment(256, 16, 20_000), Segment(256, 32, 20_000),
    Segment(256, 64, 20_000),
)  # fmt: skip
_PAPER_TEST = tuple(
    Segment(length, pairs, 1000)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
_TINY = Segment(16, 2, 64)
PRESETS = {
    "cpu": Config(
        models=(
            "attention", "based, f = 4", "based, f = 8", "based, f = 16", "window of 16", "convolution",
            "gated linear attention", "state space (Mamba-2)",
        ),
        feature_maps=("elu", "relu", "square"),
    ),
    # Seconds: every path once.
    "smoke": Config(
        vocab_size=32, d_model=8, train=(_TINY,), test=(_TINY,), models=("attention", TAYLOR),
        feature_maps=("elu",), seeds=(1,), epochs=1, batch_size=16,
        throughput=Throughput(
            lengths=(8, 16), batch_size=1, tokens=2, repetitions=1, target=None,
            model=BasedConfig(
                vocab_size=8, dim=16, num_layers=3, num_heads=2, feature_dim=4, window_size=4, mlp_dim=16,
                linear_layers=(1,), window_layers=(2,),
            ),
        ),
    ),
    "paper": Config(
        vocab_size=8192, d_model=128, train=_PAPER_TRAIN, test=_PAPER_TEST, seeds=(1, 2, 3), epochs=64, batch_size=256,
        learning_rates=tuple(float(rate) for rate in np.logspace(-4, -2, 4)),
    ),
}  # fmt: skip


def segment_batches(segments: tuple[Segment, ...], vocab_size: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """All whole batches of the segments, one after the other; rows of a batch share length and number of pairs.

    Beside the tokens a batch has the places at which something is asked, and the answers, both (rows, most pairs of any
    segment); where there are fewer pairs, answers are IGNORED.
    """
    found, most = [], max(segment.pairs for segment in segments)
    for index, segment in enumerate(segments):
        task = mqar(1000 * seed + index, segment.examples, segment.length, segment.pairs, vocab_size)
        places = np.argsort(task.labels == IGNORED, axis=1, kind="stable")[:, :most]
        arrays = {
            "tokens": task.tokens, "places": places, "answers": np.take_along_axis(task.labels, places, axis=1),
        }  # fmt: skip
        for start in range(0, segment.examples - batch_size + 1, batch_size):
            found.append({name: array[start : start + batch_size] for name, array in arrays.items()})
    return found


def loss_of_answers(model: BasedMQAR) -> Callable:
    """`zoo.train.recall.recall_loss` of the batches of `segment_batches`: logits only where something is asked."""

    def loss(params, model_state, batch, rngs, train):
        x, _ = model.apply({"params": params}, batch["tokens"], method="hidden")
        x = jnp.take_along_axis(x, batch["places"][..., None], axis=1)
        metrics = recall_metrics(model.apply({"params": params}, x, method="logits"), batch["answers"])
        return metrics.pop("loss"), (model_state, metrics)

    return loss


def fit(model: BasedMQAR, config: Config, run: train.Run, seed: int, rate: float) -> dict[str, float]:
    """Trains one network and gives its accuracy on each segment of the test, and their mean, "accuracy"."""
    data = segment_batches(config.train, config.vocab_size, config.batch_size, seed)
    tests = {
        f"{segment.length} tokens, {segment.pairs} pairs": segment_batches(
            (segment,), config.vocab_size, config.batch_size, 900 + index
        )
        for index, segment in enumerate(config.test)
    }
    steps = len(data) * config.epochs
    optimizer = train.build_optimizer(
        train.OptimizerConfig(learning_rate=rate, schedule="cosine", weight_decay=0.1), steps
    )
    mesh = train.make_mesh(train.MeshConfig(data=1))
    tokens = data[0]["tokens"]
    state = train.init_sharded(lambda rng: model.init(rng, tokens), optimizer, jax.random.key(seed), mesh)
    step = train.make_train_step(loss_of_answers(model), optimizer, state)
    evaluation_step = train.make_evaluation_step(loss_of_answers(model))

    def evaluate(state: train.TrainState) -> dict[str, float]:
        found = {name: train.evaluate(evaluation_step, state, part, mesh)["accuracy"] for name, part in tests.items()}
        return found | {"accuracy": float(np.mean(list(found.values())))}

    batches = grain.MapDataset.source(range(len(data))).shuffle(seed=seed).repeat().map(lambda index: data[index])
    result = train.fit(
        step, state, batches, train.FitConfig(steps=steps, evaluate_every=steps, log_every=min(50, steps)), run,
        mesh=mesh, evaluate=evaluate,
    )  # fmt: skip
    return result.evaluation


class Laboratory:
    """Trains each network once, whichever claims ask for it."""

    def __init__(self, config: Config, folder: train.Run, force: bool):
        self.config, self.folder, self.force = config, folder, force
        self.accuracies: dict[str, list[float]] = {}
        self.by_segment: dict[str, dict[str, float]] = {}

    def model(self, name: str) -> BasedMQAR:
        """The network of a name of MODELS or FEATURE_MAPS."""
        options = MODELS[name] if name in MODELS else FEATURE_MAPS[name]
        return BasedMQAR(MQARConfig(vocab_size=self.config.vocab_size, d_model=self.config.d_model, **options))

    def accuracy(self, name: str) -> list[float]:
        """Accuracies of all seeds, at the learning rate whose mean is best."""
        if name not in self.accuracies:
            by_rate = [
                [self._train(name, seed, rate) for seed in self.config.seeds] for rate in self.config.learning_rates
            ]
            found = max(by_rate, key=lambda runs: float(np.mean([one["accuracy"] for one in runs])))
            self.accuracies[name] = [round(one["accuracy"], 4) for one in found]
            self.by_segment[name] = {
                segment: round(float(np.mean([one[segment] for one in found])), 4)
                for segment in found[0]
                if segment != "accuracy"
            }
        return self.accuracies[name]

    def _train(self, name: str, seed: int, rate: float) -> dict[str, float]:
        slug = "".join(character if character.isalnum() else "_" for character in name)
        path = self.folder.path / "runs" / f"{slug}_rate{rate:.2g}_seed{seed}"
        run = train.open_run(path, self.config, resume=self.folder.resume, force=self.force)
        found = fit(self.model(name), self.config, run, seed, rate)
        print(f"{name}, learning rate {rate:.2g}, seed {seed}: accuracy {found['accuracy']:.3f}", flush=True)
        return found

    def state_bytes(self, name: str) -> int:
        """Of the longest test, one sequence."""
        return mixers.state_bytes(self.model(name), max(segment.length for segment in self.config.test))


def recall(laboratory: Laboratory) -> tuple[reports.Claim, Figure]:
    """Accuracy of every model against the bytes of its state."""
    config = laboratory.config
    best = {name: max(laboratory.accuracy(name)) for name in config.models}
    measured: dict[str, Any] = {}
    for name in config.models:
        measured[f"{name}: accuracy"] = laboratory.accuracies[name]
        measured[f"{name}: bytes of state"] = laboratory.state_bytes(name)
        if len(config.test) > 1:
            measured[f"{name}: accuracy by test, mean of seeds"] = ", ".join(
                f"{value} ({segment})" for segment, value in laboratory.by_segment[name].items()
            )
    based = [best[name] for name in config.models if name.startswith("based")]
    local = [best[name] for name in config.models if name.startswith(("window", "convolution"))]
    verdict: reports.Verdict = "not tested"
    if "attention" in best and len(based) > 1 and local:
        close = best["attention"] - based[-1] <= CLOSE
        helps = based[-1] > based[0]
        behind = max(local) <= FAR
        verdict = (
            "reproduced" if close and helps and behind else "partly reproduced" if close and helps else "not reproduced"
        )
    claim = reports.Claim(
        statement="Recall grows with the state: Based of f = 16 recalls as attention does, windows and convolutions do "
        "not.",
        verdict=verdict,
        measured=measured,
        seeds=config.seeds,
        remark=f"Multi-query associative recall, {config.vocab_size} tokens, width {config.d_model}, 2 layers, "
        f"{sum(segment.examples for segment in config.train)} examples, {config.epochs} epochs, learning rate "
        f"{', '.join(f'{rate:.2g}' for rate in config.learning_rates)}. Bounds: Based at most "
        f"{CLOSE} below attention and better with more features; windows and convolution at most {FAR}. "
        "A training that has not begun to recall when its learning rate runs out guesses among the values seen; as "
        "published, of each model the best training counts.",
    )
    return claim, recall_figure(laboratory)


def recall_figure(laboratory: Laboratory) -> Figure:
    """Accuracy against state: a point at each model's best training, a bar down to its worst."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in laboratory.config.models:
        values = laboratory.accuracies[name]
        best = max(values)
        size = laboratory.state_bytes(name) / 1e3
        axes.errorbar(size, best, yerr=[[best - min(values)], [0.0]], marker="o", capsize=3)
        axes.annotate(name, (size, best), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xscale="log", xlabel="state of one sequence, kB", ylabel="recall accuracy", ylim=(-0.03, 1.08))
    return figure


def features(laboratory: Laboratory) -> reports.Claim:
    """Taylor's map against others of the same state."""
    config = laboratory.config
    taylor = laboratory.accuracy(TAYLOR)
    others = {name: laboratory.accuracy(name) for name in config.feature_maps}
    best = max((max(values) for values in others.values()), default=0.0)
    return reports.Claim(
        statement="Of feature maps of one state size, Taylor's recalls best.",
        verdict="reproduced" if max(taylor) > best else "not reproduced",
        measured={"taylor: accuracy": taylor, "taylor: bytes of state": laboratory.state_bytes(TAYLOR)},
        seeds=config.seeds,
        baselines={f"{name}: accuracy": values for name, values in others.items()}
        | {f"{name}: bytes of state": laboratory.state_bytes(name) for name in others},
        remark="Linear attention with a divisor, one head, as many features a key as Taylor's map of 16 channels has. "
        "Of each map the best training counts.",
    )


def attention_like(config: BasedConfig) -> BasedConfig:
    """The attention model of the same depth and width."""
    return dataclasses.replace(
        config, linear_layers=(), window_layers=(), other_layers="attention", rotary_fraction=0.5, mlp_dim=None
    )


def filled_state(model: Based, batch_size: int, length: int, tokens: int) -> Any:
    """A state that has seen `length` tokens and holds `tokens` more: lengths are set, the arrays are zeros."""
    state = model.init_state(batch_size, length + tokens)
    return jax.tree.map(lambda leaf: leaf + length if leaf.dtype == jnp.int32 else leaf, state)


def decode_seconds(config: Throughput, length: int) -> dict[str, list[float]]:
    """Seconds of each repetition for `tokens` tokens after `length`, of both models in turn."""
    calls = {}
    for name, model in (("based", Based(config.model)), ("attention", Based(attention_like(config.model)))):
        first = np.zeros((config.batch_size, 1), np.int32)
        variables = jax.jit(model.init)(jax.random.key(0), first)

        @jax.jit
        def decode(variables, state, first=first, model=model):
            def step(carry, _):
                token, state = carry
                logits, state = model.apply(variables, token, state)
                return (jnp.argmax(logits, axis=-1).astype(jnp.int32), state), ()

            return jax.lax.scan(step, (first, state), None, length=config.tokens)[0][0]

        state = filled_state(model, config.batch_size, length, config.tokens)
        jax.block_until_ready(decode(variables, state))
        calls[name] = (decode, variables, state)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(config.repetitions):
        for name, (decode, variables, state) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(decode(variables, state))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def step_bytes(target: str, length: int, batch_size: int) -> dict[str, Any]:
    """What one token costs on an accelerator, by its compiler: five layers of published width, bfloat16."""
    published = BasedConfig(num_layers=5, linear_layers=(1,), window_layers=(2,))
    found = {}
    for name, config in (("based", published), ("attention", attention_like(published))):
        model = Based(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        token = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        variables = jax.eval_shape(lambda model=model, token=token: model.init(jax.random.key(0), token))
        state = jax.eval_shape(lambda model=model: model.init_state(batch_size, length))
        step = lambda variables, state, token, model=model: model.apply(variables, token, state)  # noqa: E731
        report = compilation.report(compilation.compile_for(target, step, variables, state, token))
        found[f"{name}: MB moved"] = round((report.bytes_accessed or 0.0) / 1e6, 1)
        found[f"{name}: MB of state"] = round(mixers.state_bytes(model, length) * batch_size / 1e6, 1)
    return found


def throughput(config: Throughput) -> tuple[reports.Claim, Figure]:
    """Tokens a second after pasts of growing length."""
    rates: dict[str, list[float]] = {"based": [], "attention": []}
    spread: dict[str, list[tuple[float, float]]] = {"based": [], "attention": []}
    for length in config.lengths:
        for name, seconds in decode_seconds(config, length).items():
            decoded = config.batch_size * config.tokens
            rates[name].append(round(decoded / float(np.median(seconds)), 1))
            spread[name].append((decoded / max(seconds), decoded / min(seconds)))
    measured: dict[str, Any] = {"tokens of the past": list(config.lengths)}
    for name, values in rates.items():
        measured[f"{name}: tokens a second"] = values
    ratios = [based / attention for based, attention in zip(rates["based"], rates["attention"], strict=True)]
    measured["based over attention"] = [round(ratio, 2) for ratio in ratios]
    faster = [length for length, ratio in zip(config.lengths, ratios, strict=True) if ratio > 1]
    measured["shortest past at which based is faster"] = faster[0] if faster else "none"
    remark = f"{config.batch_size} sequences, {config.model.num_layers} layers of {config.model.dim}, float32, CPU."
    if config.target is not None:
        for length in (config.lengths[0], config.lengths[-1]):
            for name, value in step_bytes(config.target, length, config.batch_size).items():
                measured[f"{config.target}, one token after {length}, {name}"] = value
        remark += " On the accelerator one token is compiled, not timed: decoding takes as long as moving its bytes."
    flat = min(rates["based"]) > 0.7 * max(rates["based"])
    falls = rates["attention"][-1] < 0.7 * rates["attention"][0]
    verdicts: dict[bool, reports.Verdict] = {True: "reproduced", False: "partly reproduced"}
    claim = reports.Claim(
        statement="Based decodes at one speed whatever the past; with a cache of keys and values decoding slows down.",
        verdict=verdicts[flat and falls and ratios[-1] > 1] if ratios[-1] > 1 else "not reproduced",
        measured=measured,
        published={"based over attention, 1.3B, 1024 tokens, one GPU": 24},
        remark=remark,
    )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in rates.items():
        low, high = np.array(spread[name]).T
        error = [np.maximum(np.array(values) - low, 0), np.maximum(high - np.array(values), 0)]
        axes.errorbar(config.lengths, values, yerr=error, marker="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="tokens of the past", ylabel="tokens a second", ylim=(0, None))
    axes.legend()
    return claim, figure


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Trains, measures the claims, and leaves everything in `workdir`; trainings lie below `runs/`.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
    """
    folder = train.open_run(workdir, config, resume=resume, force=force)
    laboratory = Laboratory(config, folder, force)
    claims, figures = [], {}
    if "recall" in config.claims:
        claim, figures["recall"] = recall(laboratory)
        claims.append(claim)
    if "features" in config.claims:
        claims.append(features(laboratory))
    if "throughput" in config.claims:
        claim, figures["throughput"] = throughput(config.throughput)
        claims.append(claim)
    for claim in claims:
        reports.show(claim)
    (folder.path / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
    result = reports.Result("based", command_line.preset_name(config, PRESETS), "generated", tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("based", PRESETS, run)

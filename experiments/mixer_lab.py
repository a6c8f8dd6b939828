"""The laboratory: any mixers, in one backbone with one number of parameters, on the same tasks.

    python -m experiments.mixer_lab --preset cpu                              # ten mixers, half an hour on two cores
    python -m experiments.mixer_lab --preset cpu --mixers softmax titans_mag  # any registered ones
    python -m experiments.mixer_lab --preset cpu --mixers all --data-dir ../shared/data/tinyshakespeare

A mixer is written `name`, with options `based:feature_dim=8`, and layer after layer `base_convolution+based`. Tasks:
"mqar" (recall of many pairs), "needle" (one of four pairs in a haystack), "copying", "induction", and "language" (bytes
of real text). All are trained at one length and tested at longer ones too. The run leaves one table (`table.md`,
`table.csv`, `result.json`), and in `figures/` recall against state, cost and accuracy and bits a byte against length.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments import command_line
from zoo import mixers, train
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.data.recall import IGNORED, Recall, copying, induction, mqar, needle
from zoo.data.text import read_text
from zoo.files import atomic
from zoo.timing import median_seconds

Task = Literal["mqar", "needle", "copying", "induction", "language"]
BYTES = 256  # one vocabulary for all tasks, so that a network compiles once


@dataclasses.dataclass(frozen=True)
class Cost:
    """Where speed and memory are measured, one sequence."""

    # Tokens; none: nothing is measured.
    lengths: tuple[int, ...] = (128, 512, 2048)
    # Timings of each; the median counts.
    repetitions: int = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compare, on what."""

    # Mixers as the module's docstring writes them; "all" is every registered one.
    mixers: tuple[str, ...] = (
        "softmax", "softmax:window=16", "linear_attention", "based", "retnet", "gla", "ssd", "deltanet",
        "gated_deltanet", "base_convolution+based",
    )  # fmt: skip
    # What they are trained on.
    tasks: tuple[Task, ...] = ("mqar", "needle", "copying", "induction", "language")
    # Width of the residual stream; at further widths only "mqar" is trained: more points of recall against state.
    widths: tuple[int, ...] = (64,)
    # Blocks.
    layers: int = 2
    # Of mixers that have heads.
    heads: int = 4
    # Of the whole network; MLPs are made as wide as that leaves. None: of softmax attention with MLPs of 4 widths.
    parameters: int | None = None
    # Tokens of a row in training.
    length: int = 64
    # Multiples of it at which "needle", "copying", "induction" and "language" are tested.
    test_multiples: tuple[int, ...] = (1, 2, 4, 8)
    # Rows of a test.
    test_examples: int = 128
    # Key and value pairs of "mqar", whose alphabet is two tokens larger than a row is long.
    pairs: int = 8
    # Rows a step.
    batch_size: int = 32
    # Steps of each training.
    steps: int = 400
    # At its peak, after a tenth of the steps; a cosine takes it down to 0.
    learning_rate: float = 4e-3
    # One training each.
    seeds: tuple[int, ...] = (1, 2)
    # A folder with .txt files for "language"; default the text that comes with Python.
    data_dir: pathlib.Path | None = None
    # Where speed and memory are measured.
    cost: Cost = Cost()

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "length", "pairs", "batch_size", "steps", "test_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mixers", "tasks", "widths", "test_multiples", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if "mqar" in self.tasks and (self.length % 2 or 4 * self.pairs > self.length):
            raise ValueError(f"mqar needs an even length of at least 4 pairs = {4 * self.pairs}, got {self.length}")


PRESETS = {
    "cpu": Config(),
    # Seconds: every path once.
    "smoke": Config(
        mixers=("softmax", "gla"), tasks=("mqar", "language"), widths=(16,), heads=2, length=16, pairs=2,
        test_multiples=(1, 2), test_examples=8, batch_size=8, steps=2, seeds=(1,), cost=Cost((16, 32), 1),
    ),
    # Sizes at which differences are stable, for an accelerator.
    "full": Config(
        widths=(128, 64, 256), layers=4, length=256, pairs=32, batch_size=128, steps=20_000, learning_rate=2e-3,
        test_multiples=(1, 2, 4, 8, 16), test_examples=1024, seeds=(1, 2, 3, 4, 5),
        cost=Cost((256, 1024, 4096, 16384), 11),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- mixers, networks


def parse(mixer: str) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """Names and options, layer after layer, of `name:option=value,option=value+name`.

    Raises ValueError where it cannot be read; names and options are checked by `DecoderConfig`.
    """
    names, options = [], []
    for part in mixer.split("+"):
        name, _, rest = part.partition(":")
        chosen = {}
        for pair in filter(None, rest.split(",")):
            option, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"an option of a mixer is written name=value, got {pair!r} in {mixer!r}")
            try:
                chosen[option] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                chosen[option] = value
        names.append(name)
        options.append(chosen)
    return tuple(names), tuple(options)


def count_parameters(model: DecoderLM) -> int:
    """All of a network's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def network(mixer: str, width: int, config: Config) -> DecoderLM:
    """The backbone with a mixer, its MLPs as wide as the budget leaves.

    Raises:
      ValueError: the mixer alone takes more than the budget.
    """

    def build(mixer: str, mlp_features: int) -> DecoderLM:
        names, options = parse(mixer)
        return DecoderLM(
            DecoderConfig(
                vocab_size=BYTES,
                features=width,
                layers=config.layers,
                heads=config.heads,
                mlp_features=mlp_features,
                mlp="gelu_tanh",
                norm="rms",
                positions="rotary",
                qkv_bias=False,
                out_bias=False,
                mlp_bias=False,
                mixer=names,
                mixer_options=options,
            )
        )

    budget = config.parameters or count_parameters(build("softmax", 4 * width))
    least, slope = count_parameters(build(mixer, 1)), 2 * width * config.layers
    hidden = 1 + round((budget - least) / slope)
    if hidden < 1:
        raise ValueError(f"{mixer} with the narrowest MLP has {least:,} parameters, the budget is {budget:,}")
    return build(mixer, hidden)


# ------------------------------------------------------------------------------------------------------------ tasks


class Text(NamedTuple):
    """Bytes to train on and to test on."""

    train: np.ndarray
    test: np.ndarray


def read(config: Config) -> Text:
    """The text of "language", its last tenth kept for tests. Raises ValueError where that is too short."""
    text = read_text(config.data_dir)
    cut = len(text) * 9 // 10
    longest = config.length * max(config.test_multiples)
    if len(text) - cut <= longest:
        raise ValueError(f"the text has {len(text)} bytes; its last tenth must be longer than a test of {longest}")
    return Text(text[:cut], text[cut:])


def rows(task: Task, config: Config, text: Text, seed: int, examples: int, length: int, test: bool) -> Recall:
    """Examples of a task."""
    if task == "language":
        part = text.test if test else text.train
        starts = np.random.default_rng(seed).integers(0, len(part) - length, examples)
        windows = part[starts[:, None] + np.arange(length + 1)].astype(np.int32)
        return Recall(windows[:, :-1], windows[:, 1:])
    if task == "mqar":
        return mqar(seed, examples, length, config.pairs, vocab_size=length + 2)
    generators: dict[Task, Callable[[int, int, int], Recall]] = {
        "needle": needle, "copying": copying, "induction": induction,
    }  # fmt: skip
    return generators[task](seed, examples, length)


def loss_of(model: DecoderLM) -> Callable:
    """Mean cross entropy and accuracy where `labels` are not IGNORED, for `zoo.train`."""

    def loss(params, model_state, batch, rngs, train):
        logits, _ = model.apply({"params": params}, batch["tokens"], deterministic=not train, rngs=rngs)
        asked = batch["labels"] != IGNORED
        wanted = jnp.where(asked, batch["labels"], 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        correct = jnp.argmax(logits, axis=-1) == wanted
        total = asked.sum()
        return jnp.sum(losses * asked) / total, (model_state, {"accuracy": jnp.sum(correct & asked) / total})

    return loss


# --------------------------------------------------------------------------------------------------------- training


class Trainer:
    """One network: its training step compiles once, for all tasks and seeds."""

    def __init__(self, model: DecoderLM, config: Config, text: Text):
        self.model, self.config, self.text = model, config, text
        self.optimizer = train.build_optimizer(
            train.OptimizerConfig(
                learning_rate=config.learning_rate, schedule="cosine", warmup_steps=config.steps // 10,
                weight_decay=0.1, clip_norm=1.0, b2=0.98,
            ),
            config.steps,
        )  # fmt: skip
        self.mesh = train.make_mesh(train.MeshConfig(data=1))
        self.evaluation_step = train.make_evaluation_step(loss_of(model))
        self.train_step: Callable[..., Any] | None = None

    def fit(self, task: Task, seed: int, run: train.Run) -> dict[str, float]:
        """Trains from scratch; accuracy at each test's length, and for "language" bits a byte."""
        config = self.config
        tokens = np.zeros((config.batch_size, config.length), np.int32)
        state = train.init_sharded(
            lambda rng: self.model.init(rng, tokens), self.optimizer, jax.random.key(seed), self.mesh
        )
        if self.train_step is None:
            self.train_step = train.make_train_step(loss_of(self.model), self.optimizer, state)

        def batch(index: int) -> dict[str, np.ndarray]:
            number = 1_000_000 * seed + index
            return rows(task, config, self.text, number, config.batch_size, config.length, test=False)._asdict()

        multiples = (1,) if task == "mqar" else config.test_multiples

        def evaluate(state: train.TrainState) -> dict[str, float]:
            found = {}
            for length in (config.length * multiple for multiple in multiples):
                test = rows(task, config, self.text, 0, config.test_examples, length, test=True)
                size = max(1, min(config.test_examples, config.batch_size * config.length // length))
                parts = [
                    {name: array[start : start + size] for name, array in test._asdict().items()}
                    for start in range(0, config.test_examples - size + 1, size)
                ]
                means = train.evaluate(self.evaluation_step, state, parts, self.mesh)
                found[f"accuracy_{length}"] = means["accuracy"]
                if task == "language":
                    found[f"bits_{length}"] = means["loss"] / math.log(2)
            return found

        data = grain.MapDataset.source(range(config.steps)).map(batch)
        fit_config = train.FitConfig(
            steps=config.steps, log_every=min(50, config.steps), evaluate_every=config.steps, keep_checkpoints=1
        )
        return train.fit(self.train_step, state, data, fit_config, run, mesh=self.mesh, evaluate=evaluate).evaluation


# ------------------------------------------------------------------------------------------------------------- cost


def cost_of(model: DecoderLM, cost: Cost) -> dict[str, list[float]]:
    """Microseconds a token to read a sequence at once, and to decode one more; bytes of state: a number a length."""
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
    forward = jax.jit(lambda variables, tokens: model.apply(variables, tokens)[0])
    step = jax.jit(lambda variables, tokens, state: model.apply(variables, tokens, state))
    found: dict[str, list[float]] = {"read": [], "decode": [], "bytes": []}
    for length in cost.lengths:
        tokens = np.zeros((1, length), np.int32)
        seconds = median_seconds(partial(forward, variables, tokens), cost.repetitions)
        found["read"].append(1e6 * seconds / length)
        # Zeros as a past cost what any other past does; only its length counts.
        state = model.init_state(1, length)
        state = jax.tree.map(partial(_count, length - 1), state)
        seconds = median_seconds(partial(step, variables, np.zeros((1, 1), np.int32), state), 4 * cost.repetitions)
        found["decode"].append(1e6 * seconds)
        found["bytes"].append(mixers.state_bytes(model, length))
    return found


def _count(tokens: int, leaf: jax.Array) -> jax.Array:
    """A leaf of an empty state as if it had seen tokens, if it counts them."""
    return leaf + tokens if leaf.dtype == jnp.int32 else leaf


# ---------------------------------------------------------------------------------------------------------- results


@dataclasses.dataclass
class Row:
    """What came out of one mixer at one width: of every score a number a seed."""

    mixer: str
    width: int
    parameters: int
    state_bytes: int  # of a training row
    scores: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # "needle accuracy_64" and so on
    cost: dict[str, list[float]] | None = None


def columns(config: Config) -> dict[str, str]:
    """Headings of the table's scores, and their names."""
    first, last = config.length * config.test_multiples[0], config.length * config.test_multiples[-1]
    found = {}
    for task in config.tasks:
        if task == "mqar":
            found["mqar"] = f"mqar accuracy_{config.length}"
        elif task == "language":
            found |= {f"bits/byte at {n}": f"language bits_{n}" for n in (first, last)}
        else:
            found |= {f"{task} at {n}": f"{task} accuracy_{n}" for n in (first, last)}
    return found


def table(found: list[Row], config: Config) -> list[list[str]]:
    """Heading and rows: means, and standard deviations over seeds where there are several."""
    headings = columns(config)
    lines = [["mixer", "width", "parameters", "state bytes", *headings]]
    if config.cost.lengths:
        lines[0] += [f"{what} us/token at {config.cost.lengths[-1]}" for what in ("read", "decode")]
    for row in found:
        line = [row.mixer, str(row.width), f"{row.parameters:,}", f"{row.state_bytes:,}"]
        for name in headings.values():
            line.append(spread(row.scores[name]) if name in row.scores else "")
        if config.cost.lengths:
            line += [f"{row.cost[what][-1]:.0f}" if row.cost else "" for what in ("read", "decode")]
        lines.append(line)
    return lines


def spread(values: list[float]) -> str:
    """Mean, and standard deviation of several."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def markdown(lines: list[list[str]]) -> str:
    """The table for people."""
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body]) + "\n"


def recall_figure(found: list[Row], config: Config) -> Figure:
    """Recall of many pairs against the bytes of the state; a line joins a mixer's widths."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    name = f"mqar accuracy_{config.length}"
    for mixer in dict.fromkeys(row.mixer for row in found):
        points = sorted(
            (row.state_bytes, np.mean(row.scores[name]), np.std(row.scores[name]))
            for row in found
            if row.mixer == mixer and name in row.scores
        )
        if points:
            sizes, means, errors = zip(*points, strict=True)
            axes.errorbar(sizes, means, yerr=errors, marker="o", capsize=3, label=mixer)
    axes.set(xscale="log", xlabel=f"bytes of state after {config.length} tokens", ylabel="recall", ylim=(-0.03, 1.05))
    axes.legend(fontsize=8)
    return figure


def length_figure(found: list[Row], config: Config, task: Task) -> Figure:
    """A task's score against the length of its test; the dotted line is the length of training."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    kind = "bits" if task == "language" else "accuracy"
    lengths = [config.length * multiple for multiple in config.test_multiples]
    for row in found:
        values = [row.scores.get(f"{task} {kind}_{length}", []) for length in lengths]
        if all(values):
            axes.errorbar(
                lengths, np.mean(values, axis=1), yerr=np.std(values, axis=1), marker="o", capsize=3, label=row.mixer
            )
    axes.axvline(config.length, linestyle=":", color="0.5")
    axes.set(xscale="log", xlabel="tokens of a test", ylabel="bits a byte" if kind == "bits" else f"{task}, accuracy")
    axes.legend(fontsize=8)
    return figure


def cost_figure(found: list[Row], cost: Cost) -> Figure:
    """Time a token, reading and decoding, and bytes of state, against length."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    labels = {"read": "us a token, read at once", "decode": "us a token, decoded", "bytes": "bytes of state"}
    for axes, (what, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for row in found:
            if row.cost is not None:
                axes.loglog(cost.lengths, row.cost[what], marker="o", label=row.mixer)
        axes.set(xlabel="tokens", ylabel=label)
    figure.axes[-1].legend(fontsize=7)
    return figure


def figures(found: list[Row], config: Config) -> dict[str, Figure]:
    """All figures by name."""
    drawn = {}
    if "mqar" in config.tasks:
        drawn["recall_state"] = recall_figure(found, config)
    for task in config.tasks:
        if task != "mqar":
            drawn[f"{task}_length"] = length_figure(found, config, task)
    if config.cost.lengths:
        drawn["cost_length"] = cost_figure(found, config.cost)
    return drawn


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> list[Row]:
    """Trains every mixer on every task, and leaves the table and the figures in `workdir`.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
      ValueError, TypeError, FileNotFoundError: a mixer or option is unknown, or the text is not to be had.
    """
    chosen = mixers.names() if config.mixers == ("all",) else list(config.mixers)
    networks = {
        (mixer, width): network(mixer, width, config) for mixer, width in itertools.product(chosen, config.widths)
    }
    text = read(config) if "language" in config.tasks else Text(np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    folder = train.open_run(workdir, config, resume=resume, force=force)
    found = []
    for (mixer, width), model in networks.items():
        row = Row(mixer, width, count_parameters(model), mixers.state_bytes(model, config.length))
        trainer = Trainer(model, config, text)
        is_first = width == config.widths[0]
        for task in config.tasks if is_first else [task for task in config.tasks if task == "mqar"]:
            for seed in config.seeds:
                slug = "".join(character if character.isalnum() else "_" for character in mixer)
                path = folder.path / "runs" / f"{slug}_{width}_{task}_{seed}"
                one = train.open_run(path, config, resume=resume, force=force)
                for name, value in trainer.fit(task, seed, one).items():
                    row.scores.setdefault(f"{task} {name}", []).append(value)
        if config.cost.lengths and is_first:
            row.cost = cost_of(model, config.cost)
        found.append(row)
        print(markdown(table([row], config)), flush=True)
    lines = table(found, config)
    with atomic(folder.path / "table.md") as temporary:
        temporary.write_text(markdown(lines))
    with atomic(folder.path / "table.csv") as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    (folder.path / "figures").mkdir(exist_ok=True)
    for name, figure in figures(found, config).items():
        figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
    result: Mapping[str, Any] = {
        "experiment": "mixer_lab", "preset": command_line.preset_name(config, PRESETS),
        "seeds": list(config.seeds), "rows": [dataclasses.asdict(row) for row in found],
    }  # fmt: skip
    train.write_json(folder.path / "result.json", result)
    print(markdown(lines), flush=True)
    return found


if __name__ == "__main__":
    command_line.main("mixer_lab", PRESETS, run)

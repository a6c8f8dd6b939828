"""The protein transformer's claims in the small: graphs, several tasks at once, design for asked contents, causality.

    python -m experiments.protein_gpt --preset cpu --data-dir DIR_OF_secondary_structure_csv_gz

Prompts ask for the structure of each residue, the content of structure, whether a peptide is antimicrobial, and the
inverse of the last two; sequences alone are learned too. Without --data-dir chains are simulated. Three stages are
published (unlabelled, forward tasks, forward and inverse tasks) without their lengths; here all tasks are mixed from
the start. Designs are judged by predictors, and not folded.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.backbones import graph_gpt
from zoo.data.prompts import rows
from zoo.data.proteins import Chain, Proteins, read_proteins, simulated_proteins
from zoo.papers import protein_gpt
from zoo.papers.protein_gpt import GraphGPT, GraphGPTConfig, prompts

ClaimName = Literal["graph", "synergy", "inverse", "causality"]
TARGETS = ((0.8, 0.0, 0.2), (0.0, 0.6, 0.4), (0.4, 0.2, 0.4))  # H, E, C asked of designs
ALL_TASKS = ("sequence", "content3", "residues3", "property", "from_content", "from_property")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which claims to measure, and how."""

    # The folder of the two tables; None simulates chains.
    data_dir: pathlib.Path | None = None
    claims: tuple[ClaimName, ...] = get_args(ClaimName)
    seeds: tuple[int, ...] = (0, 1)
    # The network.
    features: int = 96
    depth: int = 3
    heads: int = 6
    head_features: int = 16
    graph_layers: int = 2
    # Longest chain in residues; longer ones are left out.
    longest: int = 64
    # Updates, prompts an update, learning rate: of every network.
    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 2e-3
    # Chains of the evaluation, at most, and designs for each target.
    test_chains: int = 60
    samples: int = 50

    def __post_init__(self) -> None:
        if not self.seeds or min(self.steps, self.batch_size, self.test_chains, self.samples, self.longest) < 1:
            raise ValueError("there must be a seed, and steps, batch_size, test_chains, samples, longest at least 1")
        if self.graph_layers < 1:
            raise ValueError(f"graph_layers must be at least 1, got {self.graph_layers}")


PRESETS = {
    "cpu": Config(),
    "smoke": Config(seeds=(0,), features=16, depth=1, heads=2, head_features=8, graph_layers=1, longest=40, steps=2,
                    batch_size=2, test_chains=3, samples=2),
    "paper": Config(features=256, depth=12, heads=8, head_features=32, graph_layers=3, longest=128, steps=100_000,
                    batch_size=64, learning_rate=2e-4, test_chains=10**6),
}  # fmt: skip


def load(config: Config) -> Proteins:
    """The tables, without long chains. Raises FileNotFoundError or ValueError where there is nothing to read."""
    found = simulated_proteins() if config.data_dir is None else read_proteins(config.data_dir)
    training, test = (
        [chain for chain in part if len(chain.sequence) <= config.longest] for part in (found.training, found.test)
    )
    peptides = [row for row in found.peptides if len(row[0]) <= config.longest]
    if len(training) < 20 or len(test) < 2:
        raise ValueError(f"only {len(training)} and {len(test)} chains are at most {config.longest} residues long")
    return Proteins(found.name, training, test[: config.test_chains], peptides)


def network(config: Config, graph_layers: int) -> GraphGPT:
    """The paper's network in small, with or without a graph."""
    return GraphGPT(
        GraphGPTConfig(
            features=config.features, depth=config.depth, heads=config.heads, head_features=config.head_features,
            embedding=32, graph_layers=graph_layers,
        )
    )  # fmt: skip


def text_of(task: str, data: Proteins, rng: np.random.Generator) -> str:
    """A drawn example of a task."""
    if task.endswith("property"):
        sequence, label = data.peptides[rng.integers(len(data.peptides))]
        return prompts.example(task, sequence, value=label)
    chain = data.training[rng.integers(len(data.training))]
    return prompts.example(task, chain.sequence, structure=chain.structure)


def longest_text(config: Config) -> int:
    """Tokens of the longest prompt with its answer."""
    return 2 * config.longest + 40


def fit(
    model: GraphGPT, data: Proteins, tasks: Sequence[str], config: Config, run: train.Run, seed: int
) -> Any:  # fmt: skip
    """Trains on a mixture of tasks, each as likely."""

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, step])
        chosen = rng.integers(len(tasks), size=config.batch_size)
        return rows([text_of(tasks[index], data, rng) for index in chosen], longest_text(config), "Sequence")

    return train.fit_generated(
        model, protein_gpt.loss(model), batch, run, steps=config.steps, learning_rate=config.learning_rate, seed=seed
    )


def ask(
    model: GraphGPT, variables: Any, questions: Sequence[str], config: Config, rng: jax.Array | None = None
) -> list[str]:
    """Questions with the network's answers: the likeliest ones, or sampled ones."""
    return graph_gpt.ask(model, variables, questions, config.longest + 4, rng)


class Forward(NamedTuple):
    """Scores of the forward tasks; the first two are 0 where residues were not asked for."""

    q3: float
    exact_length: float
    content_mae: float
    content_r2: float
    failures: float  # share of contents that are not three numbers
    perplexity: float  # of answers about structure


def forward_scores(model: GraphGPT, variables: Any, data: Proteins, config: Config, residues: bool) -> Forward:
    """On test chains; an unreadable content counts as the training's mean, a residue without answer as wrong."""
    truth = np.stack([prompts.content(chain.structure) for chain in data.test])
    mean = np.mean([prompts.content(chain.structure) for chain in data.training], axis=0)
    told = ask(model, variables, [prompts.prompt("content3", chain.sequence) for chain in data.test], config)
    parsed = [prompts.parse_numbers(text, 3) for text in told]
    guess = np.stack([mean if values is None else values for values in parsed])
    r2 = 1 - ((guess - truth) ** 2).sum(0) / np.maximum(((truth - truth.mean(0)) ** 2).sum(0), 1e-9)
    right = total = exact = 0
    kinds = ["content3"]
    if residues:
        kinds.append("residues3")
        told = ask(model, variables, [prompts.prompt("residues3", chain.sequence) for chain in data.test], config)
        for text, chain in zip(told, data.test, strict=True):
            given = prompts.answer(text) or ""
            right += sum(a == b for a, b in zip(given, chain.structure, strict=False))
            total += len(chain.structure)
            exact += len(given) == len(chain.structure)
    texts = [prompts.example(kind, chain.sequence, structure=chain.structure) for kind in kinds for chain in data.test]
    batch = rows(texts, longest_text(config), "Sequence")
    value = jax.jit(lambda variables: protein_gpt.lm_loss(model, variables, **batch, ignore_padding=True))(variables)
    return Forward(
        right / max(total, 1), exact / len(data.test),
        float(np.abs(guess - truth).mean()), float(r2.mean()),
        sum(values is None for values in parsed) / len(parsed), float(np.exp(value)),
    )  # fmt: skip


def composition(sequences: Sequence[str]) -> np.ndarray:
    """Shares of the residues, (chains, 20)."""
    return np.stack([[text.count(letter) / len(text) for letter in prompts.RESIDUES] for text in sequences])


def ridge(chains: Sequence[Chain]) -> Callable[[Sequence[str]], np.ndarray]:
    """The baseline of contents: ridge regression on composition."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1e-2).fit(
        composition([chain.sequence for chain in chains]), [prompts.content(chain.structure) for chain in chains]
    )
    return lambda sequences: model.predict(composition(sequences))


def window_logistic(training: Sequence[Chain], test: Sequence[Chain], side: int = 7, most: int = 700) -> float:
    """The baseline of residues: Q3 of logistic regression on the residues of a window."""
    from sklearn.linear_model import LogisticRegression

    def windows(chains: Sequence[Chain]) -> tuple[np.ndarray, np.ndarray]:
        found, labels = [], []
        for sequence, structure in chains:
            padded = "-" * side + sequence + "-" * side
            numbers = np.array([prompts.RESIDUES.find(letter) for letter in padded])
            encoded = np.eye(21, dtype=np.float32)[numbers]  # -1, beyond the ends, is the last
            found += [encoded[i : i + 2 * side + 1].ravel() for i in range(len(sequence))]
            labels += list(structure)
        return np.stack(found), np.array(labels)

    model = LogisticRegression(max_iter=100).fit(*windows(training[:most]))
    return float(model.score(*windows(test)))


def identity(sequence: str, chains: Sequence[Chain]) -> float:
    """The largest share of residues that a training chain has in the same places."""
    return max(
        sum(a == b for a, b in zip(sequence, chain.sequence, strict=False)) / max(len(sequence), 1) for chain in chains
    )


def _verdict(config: Config, good: bool, half: bool) -> reports.Verdict:
    if config.data_dir is None or config.steps < 100 or len(config.seeds) < 2:
        return "not tested"
    return "reproduced" if good else "partly reproduced" if half else "not reproduced"


def graph(config: Config, data: Proteins, open_run: Callable[[str], train.Run]) -> reports.Claim:
    """With and without graph layers, on residues and contents."""
    found: dict[str, list[Forward]] = {"graph": [], "plain": []}
    counts = {}
    for seed in config.seeds:
        for name, layers in (("graph", config.graph_layers), ("plain", 0)):
            model = network(config, layers)
            variables = fit(model, data, ("residues3", "content3"), config, open_run(f"{name}_seed{seed}"), seed)
            found[name].append(forward_scores(model, variables, data, config, residues=True))
            counts[name] = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))

    def table(name: str) -> dict[str, Any]:
        return {
            f"{name}, {field}": [round(getattr(score, field), 4) for score in found[name]] for field in Forward._fields
        }

    better = [a.q3 - b.q3 for a, b in zip(found["graph"], found["plain"], strict=True)]
    truth = np.stack([prompts.content(chain.structure) for chain in data.test])
    told = ridge(data.training)([chain.sequence for chain in data.test])
    logistic = window_logistic(data.training, data.test)
    return reports.Claim(
        statement="Graph layers on the attention maps predict structure better than a plain transformer.",
        verdict=_verdict(
            config,
            min(better) > 0 and min(score.q3 for score in found["graph"]) > logistic,
            float(np.mean(better)) > 0,
        ),
        measured=table("graph") | {"graph, parameters": counts["graph"]},
        baselines=table("plain")
        | {
            "plain, parameters": counts["plain"],
            "window logistic, q3": round(logistic, 4),
            "ridge on composition, content_mae": round(float(np.abs(told - truth).mean()), 4),
        },
        seeds=config.seeds,
        remark=f"{config.steps} steps of {config.batch_size} prompts, {data.name}; the graph has its own parameters on "
        "top. Bounds: better Q3 at each seed, and than the window's; partly: better in the mean.",
    )


def synergy(
    config: Config, data: Proteins, open_run: Callable[[str], train.Run], keep: dict[str, Any]
) -> reports.Claim:
    """Contents learned alone and with other tasks, at equal steps."""
    found: dict[str, list[Forward]] = {"alone": [], "together": []}
    for seed in config.seeds:
        for name, tasks in (
            ("alone", ("content3",)), ("together", ("content3", "residues3", "property", "sequence")),
        ):  # fmt: skip
            model = network(config, config.graph_layers)
            variables = fit(model, data, tasks, config, open_run(f"{name}_seed{seed}"), seed)
            found[name].append(forward_scores(model, variables, data, config, residues=False))
            keep.setdefault(name, (model, variables))
    errors = {name: [round(score.content_mae, 4) for score in scores] for name, scores in found.items()}
    failures = {name: [round(score.failures, 3) for score in scores] for name, scores in found.items()}
    better = [a < b for a, b in zip(errors["together"], errors["alone"], strict=True)]
    return reports.Claim(
        statement="More tasks at once make each better: contents are told with a smaller error.",
        verdict=_verdict(config, all(better), any(better)),
        measured={"together, MAE": errors["together"], "together, unreadable answers": failures["together"]},
        baselines={"alone, MAE": errors["alone"], "alone, unreadable answers": failures["alone"]},
        seeds=config.seeds,
        remark=f"Equal steps ({config.steps}), so that each task has a quarter of the prompts when together.",
    )


def inverse(
    config: Config, data: Proteins, open_run: Callable[[str], train.Run], judge: tuple[GraphGPT, Any] | None
) -> tuple[reports.Claim, Figure]:
    """Designs for asked contents, judged by two predictors."""
    seed = config.seeds[0]
    model = network(config, config.graph_layers)
    variables = fit(model, data, ALL_TASKS, config, open_run("all_tasks"), seed)
    if judge is None:
        other = network(config, config.graph_layers)
        judge = other, fit(other, data, ("content3",), config, open_run("judge"), seed + 1)
    predict = ridge(data.training)
    asked, by_ridge, by_network, novelty = [], [], [], []
    failed = 0
    for number, target in enumerate(TARGETS):
        question = prompts.prompt("from_content", prompts.numbers(target))
        told = ask(model, variables, [question] * config.samples, config, jax.random.key(number))
        designs = [text for text in map(prompts.parse_sequence, told) if text is not None]
        failed += len(told) - len(designs)
        if not designs:
            continue
        asked += [target[0]] * len(designs)
        by_ridge += predict(designs)[:, 0].tolist()
        short = [prompts.prompt("content3", text[: config.longest]) for text in designs]
        judged = [prompts.parse_numbers(text, 3) for text in ask(*judge, short, config)]
        by_network += [float("nan") if values is None else float(values[0]) for values in judged]
        novelty += [identity(text, data.training) for text in designs]

    def spearman(values: list[float]) -> float:
        kept = np.isfinite(values)
        pair = np.array(asked)[kept], np.array(values)[kept]
        if len(pair[0]) < 3 or min(map(np.ptp, pair)) == 0:
            return 0.0
        return float(scipy.stats.spearmanr(*pair).statistic)

    scores = spearman(by_ridge), spearman(by_network)
    claim = reports.Claim(
        statement="Designs have the structure that was asked for, and are new.",
        verdict=_verdict(config, min(scores) > 0.5, max(scores) > 0.5),
        measured={
            "Spearman of asked and predicted helix, ridge": round(scores[0], 3),
            "the same, forward network": round(scores[1], 3),
            "share of answers that are no sequence": round(failed / (len(TARGETS) * config.samples), 3),
            "largest identity to a training chain, mean": round(float(np.mean(novelty)), 3) if novelty else "none",
        },
        seeds=(seed,),
        remark="Judged by predictors, not folded; the bound is 0.5 with both.",
    )
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(asked, by_ridge, "o", alpha=0.4, label="ridge")
    axes.plot(asked, by_network, "x", alpha=0.4, label="forward network")
    axes.set(xlabel="helix asked for", ylabel="helix predicted")
    axes.legend()
    return claim, figure


def causality(config: Config) -> reports.Claim:
    """What later tokens, and the first, change of a logit, through the graph layers."""
    model = network(config, config.graph_layers)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 128, (1, 24)), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    place = 11
    logits: Callable[..., Any] = partial(model.apply, variables)
    own = logits(tokens)[:, : place + 1]
    other = logits(tokens.at[:, place + 1 :].add(1))[:, : place + 1]
    earlier = logits(tokens.at[:, 0].add(1))[:, place]
    leak, reach = float(jnp.abs(own - other).max()), float(jnp.abs(own[:, place] - earlier).max())
    return reports.Claim(
        statement="Graph layers keep causality: later tokens change no earlier logit.",
        verdict="reproduced" if leak == 0 and reach > 0 else "not reproduced",
        measured={"change of logits by later tokens": leak, "by the first token": reach},
    )


def graphs_figure(model: GraphGPT, variables: Any, data: Proteins) -> Figure:
    """The graphs of the last layer, head by head, of a question."""
    text = prompts.prompt("residues3", data.test[0].sequence)
    links, _ = protein_gpt.graphs(model, variables, jnp.asarray([prompts.encode(text)], jnp.int32))
    heads = links[-1, 0]
    figure = Figure(figsize=(2.4 * len(heads), 2.6), layout="constrained")
    for axes, head in zip(np.ravel(figure.subplots(1, len(heads))), heads, strict=True):
        axes.imshow(head**0.5, cmap="magma")
        axes.set_axis_off()
    return figure


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims; networks are trained below `runs/`, figures lie in `figures/`, numbers in result.json.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: hardly any chain is short enough.
    """
    data = load(config)
    folder = train.open_run(workdir, config, resume=resume, force=force)
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)

    def below(claim: str) -> Callable[[str], train.Run]:
        return lambda name: train.open_run(folder.path / "runs" / claim / name, config, resume=resume, force=force)

    kept: dict[str, Any] = {}
    claims: list[reports.Claim] = []
    for name in config.claims:
        if name == "causality":
            claims.append(causality(config))
        elif name == "graph":
            claims.append(graph(config, data, below(name)))
        elif name == "synergy":
            claims.append(synergy(config, data, below(name), kept))
            graphs_figure(kept["together"][0], kept["together"][1], data).savefig(figures / "graphs.png", dpi=120)
        else:
            claim, figure = inverse(config, data, below(name), kept.get("alone"))
            figure.savefig(figures / "inverse.png", dpi=120)
            claims.append(claim)
        reports.show(claims[-1])
    result = reports.Result("protein_gpt", command_line.preset_name(config, PRESETS), data.name, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("protein_gpt", PRESETS, run)

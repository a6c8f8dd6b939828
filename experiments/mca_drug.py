"""PaccMann's claims in the small: attention against fingerprints, unseen cells, and what is attended to.

    python -m experiments.mca_drug --preset cpu --data-dir DIR_OF_gdsc_methylation_npz

One training of each network and seed serves all claims: some cell lines are held out whole, and of the others some
pairs. Without --data-dir the table is simulated. The published recipe: Adam at 0.01, batches of 2048 pairs, 200 epochs,
dropout 0.5, another writing of each SMILES string each epoch.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.data.drug_sensitivity import Pairs, Screen, SplitKind, read_gdsc, simulated_screen, split
from zoo.data.molecules import SmilesLanguage, canonical, draw, morgan_fingerprints, tanimoto, tokenize
from zoo.papers import mca_drug
from zoo.papers.mca_drug import MCA, BaselineConfig, FingerprintDNN, MCAConfig, SmilesBaseline

ModelName = Literal["mca", "ca", "scnn", "rnn", "sa", "dnn"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what."""

    # The folder of gdsc_methylation.npz; None simulates a screen.
    data_dir: pathlib.Path | None = None
    models: tuple[ModelName, ...] = ("mca", "ca", "scnn", "dnn")
    seeds: tuple[int, ...] = (0, 1)
    # What is held out first: whole cell lines, or whole compounds.
    unseen: Literal["cells", "compounds"] = "cells"
    unseen_part: float = 0.2
    # Of the remaining pairs, for the lenient split.
    pairs_part: float = 0.1
    # Longest SMILES, with start and stop; compounds that are longer are left out.
    length: int = 96
    # Sizes of all networks.
    embedding: int = 16
    filters: int = 16
    heads: int = 2
    hidden: int = 16
    dense: tuple[int, ...] = (128, 64)
    dropout: float = 0.1
    # Updates, pairs an update, learning rate: of every network.
    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 3e-3
    # Test pairs that are predicted, at most.
    test_pairs: int = 5000
    # Cells whose attention is compared between compounds.
    attention_cells: int = 16

    def __post_init__(self) -> None:
        if not self.seeds or "mca" not in self.models:
            raise ValueError("there must be a seed, and models must name mca")
        if min(self.steps, self.batch_size, self.test_pairs, self.attention_cells) < 1:
            raise ValueError("steps, batch_size, test_pairs and attention_cells must be at least 1")


PRESETS = {
    "cpu": Config(),
    "smoke": Config(models=get_args(ModelName), seeds=(0,), length=30, embedding=4, filters=4, heads=1, hidden=4,
                    dense=(8,), steps=2, batch_size=8, test_pairs=40, attention_cells=2),
    "paper": Config(models=get_args(ModelName), length=560, filters=64, heads=4, hidden=64, dense=(1024, 512),
                    dropout=0.5, steps=10_000, batch_size=2048, learning_rate=0.01, test_pairs=10**9,
                    attention_cells=200),
}  # fmt: skip


class Task(NamedTuple):
    """A screen, its splits, and the arrays that networks see."""

    screen: Screen
    language: SmilesLanguage
    training: Pairs
    tests: dict[str, Pairs]  # "lenient" and the unseen ones
    tokens: np.ndarray  # (C, T), canonical
    fingerprints: np.ndarray  # (C, 512)
    profiles: np.ndarray  # (N, G), standardised
    least: float
    most: float


def load(config: Config) -> Screen:
    """The screen, without compounds whose SMILES are too long. Raises FileNotFoundError where the file is missing."""
    screen = simulated_screen() if config.data_dir is None else read_gdsc(config.data_dir)
    written = [canonical(text) for text in screen.smiles]
    kept = [i for i, text in enumerate(written) if text is not None and len(tokenize(text)) + 2 <= config.length]
    if len(kept) < 3:
        raise ValueError(f"of {len(written)} compounds {len(kept)} are at most {config.length} tokens long")
    return dataclasses.replace(screen, smiles=tuple(str(written[i]) for i in kept), ln_ic50=screen.ln_ic50[kept])


def prepare(screen: Screen, config: Config, seed: int) -> Task:
    """Splits: first whole lines or compounds, then pairs of the others; scales are those of training."""
    unseen: SplitKind = config.unseen
    rest, held_out = split(screen, unseen, config.unseen_part, seed)
    own = np.random.default_rng(seed + 1).uniform(size=len(rest.cell)) < config.pairs_part
    training, lenient = (Pairs(*(array[chosen] for array in rest)) for chosen in (~own, own))
    language = SmilesLanguage.of(screen.smiles, config.length)
    cells = np.unique(training.cell)
    mean, spread = screen.profiles[cells].mean(0), screen.profiles[cells].std(0)
    return Task(
        screen, language, training, {"lenient": lenient, f"unseen {unseen}": held_out},
        np.stack([language.encode(text) for text in screen.smiles]),
        morgan_fingerprints(screen.smiles), (screen.profiles - mean) / np.where(spread > 0, spread, 1),
        float(training.ln_ic50.min()), float(training.ln_ic50.max()),
    )  # fmt: skip


def build(name: ModelName, task: Task, config: Config) -> Any:
    """A network, of sizes as near to one another as its kind allows."""
    filters, kernels = (config.filters,) * 3, (3, 5, 11)
    common: dict[str, Any] = {
        "vocabulary": len(task.language), "length": config.length, "genes": task.profiles.shape[1],
        "embedding": config.embedding, "hidden": config.hidden, "dense": config.dense, "dropout": config.dropout,
    }  # fmt: skip
    one: dict[str, Any] = {"filters": (), "kernels": (), "gene_heads": (0,)}
    if name == "mca":
        return MCA(MCAConfig(**common, filters=filters, kernels=kernels, heads=(config.heads,) * 4))
    if name == "ca":
        return MCA(MCAConfig(**common, **one, heads=(4 * config.heads,)))
    if name == "dnn":
        return FingerprintDNN(BaselineConfig(**common))
    if name == "scnn":
        return SmilesBaseline(BaselineConfig(**common, filters=filters, kernels=kernels))
    encoder: Any = {"rnn": "rnn", "sa": "self_attention"}[name]
    return SmilesBaseline(BaselineConfig(**common, **one, heads=(4 * config.heads,), encoder=encoder))


def compound_input(model: Any) -> str:
    """What a network sees of a compound."""
    return "fingerprint" if isinstance(model, FingerprintDNN) else "smiles"


def fit(model: Any, task: Task, config: Config, run: train.Run, seed: int) -> Any:
    """Trains on pairs in random order; every epoch each compound is written anew."""
    pairs, name = task.training, compound_input(model)
    epoch_steps = max(len(pairs.cell) // config.batch_size, 1)
    scaled = (pairs.ln_ic50 - task.least) / (task.most - task.least)
    written: dict[int, np.ndarray] = {}

    def compounds(epoch: int) -> np.ndarray:
        if name == "fingerprint":
            return task.fingerprints
        if epoch not in written:
            rng = np.random.default_rng([seed, epoch, 1])
            written.clear()
            written[epoch] = np.stack(
                [mca_drug.random_sequence(text, task.language, rng) for text in task.screen.smiles]
            )
        return written[epoch]

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, epoch_steps)
        order = np.random.default_rng([seed, epoch]).permutation(len(scaled))
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        return {
            name: compounds(epoch)[pairs.compound[chosen]],
            "gep": task.profiles[pairs.cell[chosen]],
            "ic50": scaled[chosen],
        }

    return train.fit_generated(
        model, mca_drug.loss(model), batch, run, steps=config.steps, learning_rate=config.learning_rate, seed=seed,
        inputs=(name, "gep"),
    )  # fmt: skip


def predict(model: Any, variables: Any, task: Task, pairs: Pairs, size: int = 500) -> np.ndarray:
    """Predicted ln IC50 of pairs."""
    name = compound_input(model)
    rows = task.fingerprints if name == "fingerprint" else task.tokens
    apply = jax.jit(lambda variables, inputs: model.apply(variables, **inputs)["ic50"][:, 0])
    found = []
    for start in range(0, len(pairs.cell), size):
        here = slice(start, start + size)
        inputs = {name: jnp.asarray(rows[pairs.compound[here]]), "gep": jnp.asarray(task.profiles[pairs.cell[here]])}
        found.append(np.asarray(apply(variables, inputs)))
    return mca_drug.log_micromolar(np.concatenate(found), task.least, task.most)


def rmse(prediction: np.ndarray, label: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((prediction - label) ** 2)))


def additive(training: Pairs, pairs: Pairs, compounds: int, cells: int) -> dict[str, np.ndarray]:
    """Baselines without a network: the mean of all, of the compound, and of the compound with the line's offset.

    Where training shows no pair of a compound or of a line, its offset is 0.
    """
    mean = float(training.ln_ic50.mean())

    def means(index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
        sums, counts = np.bincount(index, values, count), np.bincount(index, minlength=count)
        return np.where(counts > 0, sums / np.maximum(counts, 1), 0)

    by_compound = means(training.compound, training.ln_ic50 - mean, compounds)
    by_cell = means(training.cell, training.ln_ic50 - mean - by_compound[training.compound], cells)
    own = mean + by_compound[pairs.compound]
    return {
        "global mean": np.full(len(pairs.cell), mean),
        "compound mean": own,
        "compound + cell mean": own + by_cell[pairs.cell],
    }


class Likeness(NamedTuple):
    """How attention's distances follow the likeness of compounds."""

    pearson: float
    spearman: float
    shuffled: float
    padding: float  # share of attention on padding
    pairs: int
    distances: np.ndarray
    similarity: np.ndarray


def likeness(model: Any, variables: Any, task: Task, cells: int, seed: int) -> Likeness:
    """Correlation of 1 - distance with Tanimoto similarity over all pairs of compounds."""
    chosen = np.random.default_rng(seed).permutation(len(task.profiles))[:cells]
    apply = jax.jit(lambda smiles, gep: model.apply(variables, smiles, gep)["smiles_attention_heads"])
    attention = np.stack(
        [
            np.asarray(apply(np.repeat(row[None], len(chosen), axis=0), task.profiles[chosen].astype(np.float32)))
            for row in task.tokens
        ]
    )
    above = np.triu_indices(len(attention), 1)
    distances = mca_drug.attention_distances(attention)[above]
    similarity = tanimoto(task.fingerprints, task.fingerprints)[above]
    shuffled = np.random.default_rng(seed).permutation(similarity)
    padding = float((attention.mean(3) * (task.tokens == 0)[:, None]).sum(-1).mean())
    return Likeness(
        float(scipy.stats.pearsonr(-distances, similarity).statistic),
        float(scipy.stats.spearmanr(-distances, similarity).statistic),
        float(scipy.stats.pearsonr(-distances, shuffled).statistic),
        padding, len(distances), distances, similarity,
    )  # fmt: skip


def atoms_figure(model: Any, variables: Any, task: Task, count: int = 4) -> Figure:
    """Molecules with each atom as red as it is attended to, mean over some lines."""
    figure = Figure(figsize=(4 * count, 3.4), layout="constrained")
    cells = jnp.asarray(task.profiles[:16])
    step = max(len(task.tokens) // count, 1)
    for axes, index in zip(np.ravel(figure.subplots(1, count)), range(0, len(task.tokens), step), strict=False):
        smiles = np.repeat(task.tokens[index][None], len(cells), axis=0)
        attention = np.asarray(model.apply(variables, smiles, cells)["smiles_attention"]).mean(0)
        text = task.screen.smiles[index]
        axes.imshow(draw(text, mca_drug.atom_attention(text, attention)))
        axes.set_axis_off()
    return figure


def _scores(found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Trains every network and seed, measures the claims, leaves figures and result.json.

    Raises:
      FileNotFoundError: the table is missing.
      ValueError: hardly any compound is short enough.
    """
    screen = load(config)
    folder = train.open_run(workdir, config, resume=resume, force=force)
    (folder.path / "figures").mkdir(exist_ok=True)
    unseen = f"unseen {config.unseen}"
    errors: dict[str, dict[str, list[float]]] = {"lenient": {}, unseen: {}}
    correlations: dict[str, dict[str, list[float]]] = {"lenient": {}, unseen: {}}
    alike: list[Likeness] = []
    genes = []

    def note(kind: str, name: str, prediction: np.ndarray, label: np.ndarray) -> None:
        errors[kind].setdefault(name, []).append(rmse(prediction, label))
        spread = np.std(prediction) > 0
        value = float(np.corrcoef(prediction, label)[0, 1]) if spread else 0.0
        correlations[kind].setdefault(name, []).append(value)

    for seed in config.seeds:
        task = prepare(screen, config, seed)
        tests = {
            kind: Pairs(*(array[: config.test_pairs] for array in _shuffled(pairs, seed)))
            for kind, pairs in task.tests.items()
        }
        for kind, pairs in tests.items():
            for name, prediction in additive(task.training, pairs, *screen.ln_ic50.shape).items():
                note(kind, name, prediction, pairs.ln_ic50)
        for model_name in config.models:
            model = build(model_name, task, config)
            below = train.open_run(
                folder.path / "runs" / f"{model_name}_seed{seed}", config, resume=resume, force=force
            )
            variables = fit(model, task, config, below, seed)
            for kind, pairs in tests.items():
                note(kind, model_name, predict(model, variables, task, pairs), pairs.ln_ic50)
            if model_name == "mca":
                alike.append(likeness(model, variables, task, config.attention_cells, seed))
                if seed == config.seeds[0]:
                    atoms_figure(model, variables, task).savefig(folder.path / "figures" / "atoms.png", dpi=120)
                    weights = model.apply(variables, task.profiles.astype(np.float32), method="encode_genes").weights
                    best = np.argsort(-np.asarray(weights).mean(0))[:5]
                    genes = [screen.genes[index] for index in best]
    claims = _claims(config, screen, errors, correlations, alike, genes, len(task.training.cell))
    for claim in claims:
        reports.show(claim)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(errors["lenient"])
    for offset, kind in enumerate(errors):
        left.bar(np.arange(len(names)) + 0.4 * offset, [np.mean(errors[kind][n]) for n in names], 0.4, label=kind)
    left.set_xticks(np.arange(len(names)) + 0.2, names, rotation=45, ha="right")
    left.set_ylabel("RMSE, ln micromolar")
    left.legend()
    right.hexbin(alike[0].similarity, alike[0].distances, gridsize=30, bins="log")
    right.set(xlabel="Tanimoto similarity", ylabel="distance of attention")
    figure.savefig(folder.path / "figures" / "errors.png", dpi=120)
    result = reports.Result("mca_drug", command_line.preset_name(config, PRESETS), screen.name, claims)
    result.save(folder.path / "result.json")
    return result


def _shuffled(pairs: Pairs, seed: int) -> Pairs:
    order = np.random.default_rng(seed).permutation(len(pairs.cell))
    return Pairs(*(array[order] for array in pairs))


def _claims(
    config: Config, screen: Screen, errors: Mapping[str, Mapping[str, list[float]]],
    correlations: Mapping[str, Mapping[str, list[float]]], alike: list[Likeness], genes: list[str],
    training_pairs: int,
) -> tuple[reports.Claim, ...]:  # fmt: skip
    unseen = f"unseen {config.unseen}"
    cpu = dataclasses.replace(PRESETS["cpu"], data_dir=config.data_dir)
    tested = config.data_dir is not None and config in (
        cpu,
        dataclasses.replace(PRESETS["paper"], data_dir=config.data_dir),
    )
    mean = {kind: {name: float(np.mean(values)) for name, values in found.items()} for kind, found in errors.items()}
    others = [name for name in config.models if name != "mca"]
    plain = ("global mean", "compound mean", "compound + cell mean")

    def table(kind: str, names: Any) -> dict[str, Any]:
        rows = {f"RMSE, {name}": _scores(errors[kind])[name] for name in names}
        return rows | {f"Pearson, {name}": _scores(correlations[kind])[name] for name in names}

    def verdict(good: list[bool]) -> reports.Verdict:
        if not tested:
            return "not tested"
        return "reproduced" if all(good) else "partly reproduced" if any(good) else "not reproduced"

    lenient, strict = mean["lenient"], mean[unseen]
    epochs = config.steps * config.batch_size / training_pairs
    trained = f"{config.steps} steps of {config.batch_size} pairs, {epochs:.1f} epochs (published: 200); {screen.name}."
    return (
        reports.Claim(
            statement="Convolutions with contextual attention predict sensitivity better than fingerprints and than "
            "encoders without either (pairs held out at random).",
            verdict=verdict([all(lenient["mca"] <= lenient[name] for name in others),
                             lenient["mca"] < lenient["compound + cell mean"]]),
            measured=table("lenient", ["mca"]),
            baselines=table("lenient", [*others, *plain]),
            seeds=config.seeds,
            published={"MCA, lenient split: RMSE in log micromolar, R2": [0.89, 0.86]},
            remark=f"{trained} Bounds: no baseline better, and better than compound + cell mean.",
        ),
        reports.Claim(
            statement=f"On {unseen} the network beats the compound's mean.",
            verdict=verdict([strict["mca"] < strict["compound mean"], strict["mca"] <= min(strict[n] for n in others)]
                            if others else [strict["mca"] < strict["compound mean"]]),
            measured=table(unseen, ["mca"]),
            baselines=table(unseen, [*others, *plain]),
            seeds=config.seeds,
            remark=f"{trained} Bounds: better than the compound's mean, and no network better.",
        ),
        reports.Claim(
            statement="Compounds alike are attended to alike.",
            verdict=verdict([all(found.pearson > 0.1 for found in alike)]),
            measured={
                "Pearson of -distance and Tanimoto": [round(found.pearson, 3) for found in alike],
                "Spearman": [round(found.spearman, 3) for found in alike],
                "share of attention on padding": [round(found.padding, 3) for found in alike],
                "pairs of compounds": [found.pairs for found in alike],
                "most attended of the profile": ", ".join(genes),
            },
            baselines={"Pearson, similarities shuffled": [round(found.shuffled, 3) for found in alike]},
            seeds=config.seeds,
            remark="The bound is 0.1. Padding is not masked, as published, and compounds of the same length share it.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    command_line.main("mca_drug", PRESETS, run)

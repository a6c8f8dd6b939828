"""Losses, uncertainty, matrices of predictions, and what attention says: atoms, genes, likeness of compounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.molecules import SmilesLanguage, atom_positions, random_smiles, tokenize
from zoo.papers.mca_drug.model import MCA

LossKind = Literal["mse", "cc", "mse_cc"]


def pearson(prediction: jax.Array, label: jax.Array) -> jax.Array:
    """Pearson's correlation of two vectors; 0 where one is constant."""
    if prediction.shape != label.shape or prediction.ndim != 1:
        raise ValueError(f"expected two vectors of the same length, got {prediction.shape} and {label.shape}")
    a, b = prediction - prediction.mean(), label - label.mean()
    return jnp.sum(a * b) / jnp.maximum(jnp.sqrt(jnp.sum(a**2) * jnp.sum(b**2)), 1e-12)


def regression_loss(prediction: jax.Array, label: jax.Array, kind: LossKind = "mse") -> jax.Array:
    """Of vectors: the mean squared error, 1 - r^2, or the sum of both. Raises ValueError for another kind."""
    if kind not in ("mse", "cc", "mse_cc"):
        raise ValueError(f"loss must be mse, cc or mse_cc, got {kind!r}")
    total = jnp.zeros(())
    if kind != "cc":
        total += jnp.mean((prediction - label) ** 2)
    if kind != "mse":
        total += 1 - pearson(prediction, label) ** 2
    return total


def log_micromolar(ic50: Any, least: float, most: float) -> Any:
    """Predictions in [0, 1] as logarithms of micromolar, from the least and the largest of training."""
    return ic50 * (most - least) + least


def loss(model: Any, kind: LossKind = "mse") -> Callable:
    """For `zoo.train`: the batch holds the model's inputs and `ic50`, (B,) in [0, 1]."""

    def loss_function(params, model_state, batch, rngs, train):
        inputs = {name: value for name, value in batch.items() if name != "ic50"}
        outputs = model.apply(
            {"params": params, **model_state}, **inputs, train=train, rngs=rngs, mutable=list(model_state)
        )
        found, model_state = outputs
        prediction = found["ic50"][:, 0].astype(jnp.float32)
        value = regression_loss(prediction, batch["ic50"], kind)
        return value, (model_state, {"mse": jnp.mean((prediction - batch["ic50"]) ** 2)})

    return loss_function


@partial(jax.jit, static_argnums=0)
def _pairs(model: Any, variables: Any, smiles: jax.Array, streams: Any, genes: Any) -> jax.Array:
    def cells(one: Any) -> jax.Array:
        def compound(text: jax.Array, own: Any) -> jax.Array:
            repeat = partial(jax.tree.map, lambda x: x[None])
            return model.apply(variables, text[None], repeat(own), repeat(one), method="combine")["ic50"][0, 0]

        return jax.vmap(compound)(smiles, streams)

    return jax.lax.map(cells, genes)


def predict_matrix(model: MCA, variables: Any, smiles: jax.Array, gep: jax.Array, *, block: int = 64) -> np.ndarray:
    """All pairs of compounds and cell lines, equal to `model` on each: compounds and cells are encoded once.

    Args:
      model, variables: an `MCA` or `MCATF`.
      smiles: (C, T).
      gep: (N, G).
      block: compounds at a time.

    Returns:
      float32 (C, N).
    """
    genes = jax.jit(lambda gep: model.apply(variables, gep, method="encode_genes"))(gep)
    encode = jax.jit(lambda smiles: model.apply(variables, smiles, method="encode_smiles"))
    rows = []
    for start in range(0, len(smiles), block):
        part = jnp.asarray(smiles[start : start + block])
        rows.append(np.asarray(_pairs(model, variables, part, encode(part), genes)).T)
    return np.concatenate(rows)


class Confidence(NamedTuple):
    """Of repeated predictions in [0, 1]."""

    mean: jax.Array  # (B,)
    confidence: jax.Array  # (B,), 1 - std / 0.5


def _confidence(predictions: jax.Array) -> Confidence:
    return Confidence(predictions.mean(0), 1 - predictions.std(0, ddof=1) / 0.5)


def mc_dropout(
    model: Any, variables: Any, inputs: Mapping[str, jax.Array], rng: jax.Array, repetitions: int = 20
) -> Confidence:
    """Epistemic confidence: dropout on, batch norms those of evaluation (Gal and Ghahramani 2016).

    Raises ValueError for fewer than two repetitions.
    """
    if repetitions < 2:
        raise ValueError(f"repetitions must be at least 2, got {repetitions}")

    @jax.jit
    def once(rng: jax.Array) -> jax.Array:
        return model.apply(variables, **inputs, noisy=True, rngs={"dropout": rng})["ic50"][:, 0]

    return _confidence(jnp.stack([once(each) for each in jax.random.split(rng, repetitions)]))


def augment_confidence(
    predict: Callable[[np.ndarray], jax.Array],
    smiles: Sequence[str],
    language: SmilesLanguage,
    rng: np.random.Generator,
    repetitions: int = 20,
) -> Confidence:
    """Aleatoric confidence: predictions of the same compounds written otherwise.

    Args:
      predict: token sequences (B, T) to predictions (B,).
      smiles: the compounds; a random writing longer than the language's length is drawn again.
      language: makes the sequences.
      rng: of the writings.
      repetitions: at least 2.
    """
    if repetitions < 2:
        raise ValueError(f"repetitions must be at least 2, got {repetitions}")
    rows = [np.stack([random_sequence(each, language, rng) for each in smiles]) for _ in range(repetitions)]
    return _confidence(jnp.stack([predict(row) for row in rows]))


def random_sequence(smiles: str, language: SmilesLanguage, rng: np.random.Generator, tries: int = 10) -> np.ndarray:
    """A random writing as tokens; the given one where all of `tries` are too long."""
    for _ in range(tries):
        text = random_smiles(smiles, rng)
        if len(tokenize(text)) + 2 <= language.length:
            return language.encode(text)
    return language.encode(smiles)


def atom_attention(smiles: str, attention: np.ndarray) -> np.ndarray:
    """The weight of each atom, in RDKit's order, of a sequence that ends with the string's tokens and a stop.

    Args:
      smiles: the string that was encoded.
      attention: (T,) of the sequence.

    Raises:
      ValueError: the sequence is shorter than the string.
    """
    tokens = tokenize(smiles)
    if len(attention) < len(tokens) + 1:
        raise ValueError(f"{len(attention)} weights cannot be those of {len(tokens)} tokens and a stop")
    own = np.asarray(attention)[-len(tokens) - 1 : -1]
    return own[atom_positions(tokens)]


def attention_distances(attention: np.ndarray) -> np.ndarray:
    """Frobenius distances of compounds' attention over the same cells, each head's matrix of norm 1, mean over heads.

    Args:
      attention: (compounds, cells, T, heads).

    Returns:
      (compounds, compounds).
    """
    count, _, _, heads = attention.shape
    rows = np.moveaxis(attention, 3, 0).reshape(heads, count, -1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    products = np.einsum("hcx,hdx->hcd", rows, rows)
    return np.sqrt(np.maximum(2 - 2 * products, 0)).mean(axis=0)


class Enrichment(NamedTuple):
    """Of one set of genes among the most attended."""

    found: int
    expected: float
    p_value: float  # of at least as many by chance, hypergeometric


def gene_enrichment(
    attention: np.ndarray, names: Sequence[str], gene_sets: Mapping[str, Sequence[str]], top: int = 100
) -> dict[str, Enrichment]:
    """Over-representation of sets among the genes of largest mean attention.

    Args:
      attention: (cells, G).
      names: of the G genes.
      gene_sets: names of genes by the set's name; unknown ones do not count.
      top: how many genes count as attended.

    Raises:
      ValueError: names and attention do not fit, or top is not in 1 .. G.
    """
    import scipy.stats

    if attention.ndim != 2 or attention.shape[1] != len(names):
        raise ValueError(f"attention must be (cells, {len(names)}), got {attention.shape}")
    if not 1 <= top <= len(names):
        raise ValueError(f"top must be in 1 .. {len(names)}, got {top}")
    best = {names[index] for index in np.argsort(-attention.mean(0), kind="stable")[:top]}
    found = {}
    for name, members in gene_sets.items():
        known = set(members) & set(names)
        hits = len(best & known)
        p_value = float(scipy.stats.hypergeom.sf(hits - 1, len(names), len(known), top))
        found[name] = Enrichment(hits, top * len(known) / len(names), p_value)
    return found


def propagate(network: np.ndarray, targets: np.ndarray, restart: float = 0.3, tolerance: float = 1e-8) -> np.ndarray:
    """Network propagation of a compound's targets over interactions of proteins: a random walk with restart.

        p <- (1 - restart) W p + restart p_0, W the interactions with columns of sum 1

    Args:
      network: (G, G) symmetric, not negative: confidences of interactions, such as STRING's.
      targets: (G,), not negative: which genes the compound targets.
      restart: probability of going back to the targets. The paper's is not stated.
      tolerance: largest change at which the walk stops.

    Returns:
      (G,), adds up to 1.

    Raises:
      ValueError: shapes do not fit, a number is negative, or there is no target.
    """
    if network.shape != (len(targets), len(targets)) or network.min() < 0 or targets.min() < 0 or not targets.any():
        raise ValueError("expected interactions (G, G) and targets (G,), not negative, and at least one target")
    if not 0 < restart <= 1:
        raise ValueError(f"restart must be in (0, 1], got {restart}")
    degree = network.sum(0)
    walk = network / np.where(degree > 0, degree, 1)
    walk[:, degree == 0] = np.eye(len(degree))[:, degree == 0]  # who has no neighbour stays
    start = targets / targets.sum()
    state = start
    while True:
        following = (1 - restart) * walk @ state + restart * start
        if np.abs(following - state).max() < tolerance:
            return following
        state = following


def select_genes(network: np.ndarray, targets: np.ndarray, neighbours: int = 20, restart: float = 0.3) -> np.ndarray:
    """The panel of genes: for each compound its targets and the genes nearest to them by `propagate`.

    Args:
      network: (G, G).
      targets: (compounds, G); compounds without a target are left out.
      neighbours: genes a compound, its targets included.

    Returns:
      Indices of genes, sorted.
    """
    chosen: set[int] = set()
    for row in targets:
        if row.any():
            chosen.update(np.argsort(-propagate(network, row, restart), kind="stable")[:neighbours].tolist())
    return np.array(sorted(chosen), int)

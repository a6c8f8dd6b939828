"""Texts to vectors, and what vectors are worth: similarity, retrieval, classification, clustering, significance."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.tokenizers import ByteLevelTokenizer


def tokenize(
    tokenizer: ByteLevelTokenizer, texts: Sequence[str], *, instruction: str = "", max_length: int = 512
) -> list[list[int]]:
    """Tokens of each text, the end-of-text token last; what is more than max_length is cut off before it.

    Args:
      tokenizer: with an end-of-text token.
      texts: any number.
      instruction: stands before each text without a separator, as published: "Retrieve semantically similar text."
        for similarity, "Represent this sentence for searching relevant passages." for queries (not documents).
      max_length: tokens of a text.

    Raises:
      ValueError: the tokenizer has no end-of-text token, or max_length is less than 1.
    """
    if tokenizer.end is None or max_length < 1:
        raise ValueError(f"needed are an end-of-text token and max_length of at least 1, got {tokenizer.end} and "
                         f"{max_length}")  # fmt: skip
    return [[*tokenizer.encode(instruction + text)[: max_length - 1], tokenizer.end] for text in texts]


def pad(rows: Sequence[Sequence[int]], *, multiple: int = 8, left: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and valid bool, (texts, longest rounded up to a multiple), padded with 0."""
    time = -(-max(map(len, rows)) // multiple) * multiple
    tokens, valid = np.zeros((len(rows), time), np.int32), np.zeros((len(rows), time), bool)
    for row, ids in enumerate(rows):
        place = slice(time - len(ids), time) if left else slice(0, len(ids))
        tokens[row, place], valid[row, place] = ids, True
    return tokens, valid


def encode(
    embed: Callable[[Any, jax.Array, jax.Array], Any], variables: Any, rows: Sequence[Sequence[int]], *,
    batch_size: int = 64, multiple: int = 8, left: bool = True,
) -> Any:  # fmt: skip
    """`embed` of many texts, those of like length together; few shapes, so that few programs are compiled.

    Args:
      embed: of variables, tokens and valid (batch_size, time) to arrays (a pytree) whose first axis is the batch:
        `model.apply` of an `Embedder`. Compiled once for each length while it is the same function.
      variables: its first argument.
      rows: tokens of each text, from `tokenize`.
      batch_size: texts at a time.
      multiple: lengths are rounded up to one of it.
      left: padding is on the left.

    Returns:
      What `embed` gives, as numpy arrays in the order of the texts.

    Raises:
      ValueError: there is no text.
    """
    if not rows:
        raise ValueError("there is no text to encode")
    order = np.argsort([-(-len(row) // multiple) for row in rows], kind="stable")
    compiled = jax.jit(embed)
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        full = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]
        tokens, valid = pad([rows[index] for index in full], multiple=multiple, left=left)
        out = compiled(variables, jnp.asarray(tokens), jnp.asarray(valid))
        parts.append(jax.tree.map(lambda x, count=len(chosen): np.asarray(x)[:count], out))
    back = np.argsort(order)
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[back], *parts)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows: (..., n, features) twice to (..., n)."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sum(a * b, -1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-24)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties by their mean rank; 0 where one of the two is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else 0.0


def sts_spearman(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> float:
    """Spearman correlation of the pairs' cosines with the scores people gave."""
    return spearman(cosines(a, b), scores)


def layerwise_scores(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> list[float]:
    """`sts_spearman` of every layer's vectors alone, (pairs, layers, features) twice."""
    return [sts_spearman(a[:, layer], b[:, layer], scores) for layer in range(a.shape[1])]


def layer_correlation(vectors: np.ndarray) -> np.ndarray:
    """Mean correlation of layers' vectors of the same text: (texts, layers, features) to (layers, layers)."""
    centred = np.asarray(vectors, np.float64) - vectors.mean(axis=-1, keepdims=True, dtype=np.float64)
    centred /= np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-24)
    return np.einsum("nlf,nmf->lm", centred, centred) / len(vectors)


def retrieval_ndcg(
    queries: np.ndarray, documents: np.ndarray, relevant: Sequence[int] | np.ndarray, cutoff: int = 10
) -> np.ndarray:
    """nDCG@cutoff of each query that has one relevant document: 1 / log2(1 + its rank), 0 beyond the cutoff.

    Args:
      queries: (queries, features).
      documents: (documents, features), compared by their cosine; of equal ones the relevant is counted last.
      relevant: index of each query's document.
      cutoff: ranks that count.
    """
    queries, documents = (
        x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        for x in (np.asarray(queries, np.float64), np.asarray(documents, np.float64))
    )
    scores = queries @ documents.T
    own = scores[np.arange(len(queries)), np.asarray(relevant)]
    rank = np.sum(scores >= own[:, None], axis=1)
    return np.where(rank <= cutoff, 1 / np.log2(1 + rank), 0.0)


def classification_probe(
    train: np.ndarray, train_labels: Sequence[Any], test: np.ndarray, test_labels: Sequence[Any]
) -> float:
    """Accuracy of a logistic regression on the vectors (at most 100 iterations, as MTEB's)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=100).fit(train, train_labels)
    return float(probe.score(test, test_labels))


def clustering_v_measure(vectors: np.ndarray, labels: Sequence[Any], *, seed: int = 0) -> float:
    """V-measure of mini-batch k-means with as many clusters as labels."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    clusters = MiniBatchKMeans(len(set(labels)), batch_size=500, n_init=1, random_state=seed).fit_predict(vectors)
    return float(v_measure_score(labels, clusters))


class Comparison(NamedTuple):
    """Of two designs over paired scores."""

    difference: float  # mean of the first less the second
    p: float  # two-sided Wilcoxon signed-rank; 1 where no pair differs
    corrected: float  # by Holm, over all comparisons of the table
    pairs: int


def wilcoxon_table(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]
) -> dict[str, Comparison]:
    """Wilcoxon's signed-rank test of two designs, category by category, with Holm's correction over categories.

    Args:
      first, second: by category the scores of each task (and seed), paired by their order.

    Raises:
      ValueError: categories or numbers of scores differ, or there are none.
    """
    from scipy.stats import wilcoxon

    if first.keys() != second.keys() or not first:
        raise ValueError(f"categories must be the same, and some: got {sorted(first)} and {sorted(second)}")
    raw: dict[str, tuple[float, float, int]] = {}
    for category in first:
        a, b = np.asarray(first[category], float), np.asarray(second[category], float)
        if a.shape != b.shape or a.ndim != 1 or not len(a):
            raise ValueError(f"{category}: scores must be paired, got {a.shape} and {b.shape}")
        p = float(wilcoxon(a, b).pvalue) if np.any(a != b) else 1.0
        raw[category] = (float(np.mean(a - b)), p, len(a))
    corrected = holm([p for _, p, _ in raw.values()])
    return {
        category: Comparison(difference, p, fair, pairs)
        for (category, (difference, p, pairs)), fair in zip(raw.items(), corrected, strict=True)
    }


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for all of them together."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(order))
    scaled = np.asarray(p, float)[order] * (len(order) - np.arange(len(order)))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in corrected]

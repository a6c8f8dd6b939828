"""The losses: the task's, and detection of perturbed subgraphs, node by node and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.papers.pogat.model import POGAT, POGATConfig, example_inputs

_bce = optax.sigmoid_binary_cross_entropy


class Losses(NamedTuple):
    """A loss and its parts, scalars."""

    total: jax.Array
    task: jax.Array
    node: jax.Array
    graph: jax.Array


def detection_losses(
    true: tuple[jax.Array, jax.Array], false: tuple[jax.Array, jax.Array], changed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Node level and subgraph level, each half of true subgraphs and half of perturbed ones.

    Args:
      true, false: node logits (M, k) and subgraph logits (M,) of both.
      changed: bool (M, k), slots that were replaced; subgraphs in which none was are left out of `false`.
    """
    used = changed.any(axis=1).astype(jnp.float32)
    count = jnp.maximum(used.sum(), 1)
    wrong = _bce(false[0], changed.astype(jnp.float32)).mean(axis=1)
    node = (_bce(true[0], jnp.zeros_like(true[0])).mean() + jnp.sum(wrong * used) / count) / 2
    whole = jnp.sum(_bce(false[1], jnp.ones_like(false[1])) * used) / count
    return node, (_bce(true[1], jnp.zeros_like(true[1])).mean() + whole) / 2


def task_loss(config: POGATConfig, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of classes (N,), or of each class by itself for labels (N, classes)."""
    if config.multi_label:
        return _bce(logits, labels.astype(jnp.float32)).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pogat_loss(
    model: POGAT, params: Any, batch: Mapping[str, Any], rngs: Mapping[str, jax.Array], train: bool, task: bool = True
) -> Losses:
    """All losses of a batch.

    Args:
      model: the network; with a `link_type` the task is links, else the target's classes.
      params: its parameters.
      batch: "features", "sub" and "relation" as of the network; "neg" and "changed" as of `Perturbation`; and either
        "labels" (n,) or (n, classes) with "train_index" (integers, the nodes that are labelled), or "pairs" (L, 2)
        with "linked" (L,).
      rngs: {"dropout": key}.
      train: whether to drop.
      task: False leaves the task's loss out, to train without labels.
    """
    config, apply, rngs = model.config, cast(Callable[..., Any], model.apply), dict(rngs)
    graph = batch["features"], batch["sub"], batch["relation"]
    if config.link_type is not None:
        scores, slots = apply({"params": params}, *graph, batch["pairs"], train, rngs=rngs, method="score_links")
        supervised = _bce(scores, batch["linked"].astype(jnp.float32)).mean()
        true = apply({"params": params}, slots, method="detect")
    else:
        out = apply({"params": params}, *graph, train, rngs=rngs)
        chosen = batch["train_index"]
        supervised = task_loss(config, out.logits[chosen], batch["labels"][chosen])
        true = out.node_logits, out.graph_logits
    node = whole = jnp.zeros(())
    if config.perturbed != "none":
        again = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
        negative = graph[0], batch["neg"], graph[2]
        slots, _ = apply({"params": params}, *negative, train, rngs=again, method="read")
        node, whole = detection_losses(true, apply({"params": params}, slots, method="detect"), batch["changed"])
    total = config.node_weight * node + config.graph_weight * whole + (supervised if task else 0)
    return Losses(total, supervised, node, whole)


def loss(model: POGAT, task: bool = True) -> Callable:
    """`pogat_loss` for `zoo.train`. Metrics: "task", "node" and "graph"."""

    def loss_function(params, model_state, batch, rngs, train):
        found = pogat_loss(model, params, batch, rngs, train, task)
        return found.total, (model_state, {"task": found.task, "node": found.node, "graph": found.graph})

    return loss_function


def example_targets(config: POGATConfig, batch_size: int) -> dict[str, Any]:
    """What the loss reads beside the inputs."""
    random = np.random.default_rng(1)
    sub = example_inputs(config, batch_size)["sub"]
    neg = np.where(random.random(sub.shape) < 0.3, (sub + 1) % 5, sub).astype(np.int32)
    shape = (5, config.classes) if config.multi_label else (5,)
    labels = random.integers(0, 2 if config.multi_label else config.classes, shape).astype(np.int32)
    return {"neg": neg, "changed": neg != sub, "labels": labels, "train_index": np.arange(3, dtype=np.int32)}

"""The loss of tasks that ask for what came before (`zoo.data.recall`)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.data.recall import IGNORED


def recall_metrics(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Mean cross entropy ("loss") and "accuracy" over the positions of labels (batch, time) that are not IGNORED."""
    asked = labels != IGNORED
    wanted = jnp.where(asked, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    count = jnp.maximum(asked.sum(), 1)
    correct = (jnp.argmax(logits, axis=-1) == wanted) & asked
    return {"loss": jnp.where(asked, losses, 0).sum() / count, "accuracy": correct.sum() / count}


def recall_loss(model: nn.Module) -> Callable:
    """The training loss of batches of "tokens" and "labels" (batch, time), for `zoo.train`."""

    def loss(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        logits, _ = model.apply(variables, batch["tokens"], deterministic=not train, rngs=rngs)
        metrics = recall_metrics(logits, batch["labels"])
        return metrics.pop("loss"), (model_state, metrics)

    return loss

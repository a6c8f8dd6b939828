"""The contrastive loss, what is trained, and batches larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from zoo.layers.lora import COLLECTION
from zoo.papers.pooling_attention.model import Embedder, adapter_rules
from zoo.papers.pooling_attention.pooling import unit
from zoo.weights import convert
from zoo.weights.readers import Source, open_tensors

SCALE = 20.0


def hard_negative_nll(
    query: jax.Array, positive: jax.Array, negative: jax.Array | None = None, *, scale: float = SCALE,
    axis_name: str | None = None,
) -> jax.Array:  # fmt: skip
    """Cross entropy of each query's own positive among all positives and hard negatives of the batch.

    S = scale cos(q_i, [d+; d-]_j), label i; no symmetric term, no filter of false negatives.

    Args:
      query, positive, negative: (n, features), of any length; negative None is without.
      scale: 1 / temperature. (The published trainers' argument of 50 is never used.)
      axis_name: of a `shard_map` axis along which batches lie: documents of all devices are candidates. The loss is
        that of the whole batch, the same on every device, and so is its gradient when devices' are summed.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: shapes differ.
    """
    documents = [positive] if negative is None else [positive, negative]
    if query.ndim != 2 or any(part.shape != query.shape for part in documents):
        shapes = [part.shape for part in (query, *documents)]
        raise ValueError(f"queries and documents must be (n, features) alike, got shapes {shapes}")
    labels = jnp.arange(len(query))
    if axis_name is not None:
        labels += jax.lax.axis_index(axis_name) * len(query)
        documents = [jax.lax.all_gather(part, axis_name, tiled=True) for part in documents]
    candidates = jnp.concatenate([unit(part.astype(jnp.float32)) for part in documents])
    scores = scale * unit(query.astype(jnp.float32)) @ candidates.T
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
    return loss if axis_name is None else jax.lax.pmean(loss, axis_name)


def in_chunks(embed: Callable[[Any], jax.Array], inputs: Any, chunk: int) -> jax.Array:
    """`embed` of rows, chunk by chunk, whose gradient embeds each chunk once more: gradient caching (Gao et al. 2021).

    The loss of all embeddings is exact, and activations of one chunk only exist at a time.

    Args:
      embed: of a pytree of (chunk, ...) to (chunk, features); what it closes over gets its gradient.
      inputs: a pytree of (rows, ...).
      chunk: rows at a time.

    Raises:
      ValueError: it does not divide the rows.
    """
    rows = len(jax.tree.leaves(inputs)[0])
    if chunk < 1 or rows % chunk:
        raise ValueError(f"chunk must divide the {rows} rows, got {chunk}")
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), inputs)
    embeddings = jax.lax.map(jax.checkpoint(embed), chunks)
    return embeddings.reshape(rows, -1)


def contrastive_loss(model: Embedder, *, scale: float = SCALE, chunk: int | None = None) -> Callable:
    """`hard_negative_nll` for `zoo.train`, of a state from `trained`.

    A batch holds "tokens" int32 and "valid" bool (n, 3, time): queries, positives, hard negatives (or 2: no negatives).
    Contrast is within the batch that the loss sees. `OptimizerConfig.accumulation_steps` cuts it into such batches, as
    the published recipe does (256 of 8 triples: each query sees 16 candidates); `chunk` does not.

    Args:
      model: the network.
      scale: of the loss.
      chunk: texts that are embedded at a time (see `in_chunks`); None is all.
    """

    def loss_fn(params, model_state, batch, rngs, train):
        variables = join(params, model_state["frozen"])
        count, texts, time = batch["tokens"].shape

        def embed(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            tokens, valid, numbers = inputs
            # A chunk's first row tells its key from the others'.
            keys = {"dropout": jax.random.fold_in(rngs["dropout"], numbers[0])} if train else {}
            return model.apply(variables, tokens, valid, deterministic=not train, rngs=keys)  # type: ignore

        rows = count * texts
        inputs = batch["tokens"].reshape(rows, time), batch["valid"].reshape(rows, time), jnp.arange(rows)
        vectors = embed(inputs) if chunk is None else in_chunks(embed, inputs, chunk)
        parts = vectors.reshape(count, texts, -1)
        loss = hard_negative_nll(*(parts[:, text] for text in range(texts)), scale=scale)
        return loss, (model_state, {})

    return loss_fn


def adapt(model: Embedder, decoder: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """A decoder's variables with new adapters and a new pooling network; adapters change nothing at first.

    Args:
      model: whose config's decoder has these variables.
      decoder: variables of a `DecoderLM`; a head of its own is left out.
      key: of the new parameters.
    """

    # Only what is missing is made: the compiler drops the rest.
    @jax.jit
    def missing(key: jax.Array) -> dict[str, Any]:
        variables = nn.meta.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32)))
        return {"params": {**variables["params"], "decoder": {}}, COLLECTION: variables.get(COLLECTION, {})}

    made = missing(key)
    params = {name: part for name, part in nn.meta.unbox(dict(decoder["params"])).items() if name != "head"}
    rest = {COLLECTION: made[COLLECTION]} if made[COLLECTION] else {}
    return {"params": {**made["params"], "decoder": params}, **rest}


def trained(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables as `zoo.train` takes them: "params" are adapters and pooling, the decoder is state that stays."""
    params = dict(variables["params"])
    frozen = {"decoder": params.pop("decoder")}
    return {"params": {"new": params, COLLECTION: variables.get(COLLECTION, {})}, "frozen": frozen}


def join(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The way back from `trained`."""
    return {"params": {**params["new"], **frozen}, COLLECTION: params[COLLECTION]}


def load_adapter(variables: Mapping[str, Any], adapter: Source, pooling: Source | None = None) -> dict[str, Any]:
    """Puts published adapters and a published pooling network in the place of those in the variables.

    Args:
      variables: of an `Embedder`, from `adapt` say.
      adapter: `adapter_model.safetensors` or the like, with PEFT's names.
      pooling: `attn_pool.pt`, read weights-only; None where there is no pooling network, or it is in the first file.

    Raises:
      NameMapError: names left over on either side or shapes that differ, all listed.
    """
    published = dict(open_tensors(adapter))
    if pooling is not None:
        published |= open_tensors(pooling)
    parts = trained(variables)
    target = {"params": parts["params"]["new"], COLLECTION: parts["params"][COLLECTION]}
    found = jax.tree.map(jnp.asarray, convert(published, adapter_rules(), target))
    return {"params": {**variables["params"], **found.get("params", {})}, COLLECTION: found.get(COLLECTION, {})}

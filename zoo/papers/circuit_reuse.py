"""Circuits that two tasks share: path patching of attention heads, forced attention, and comparing circuits.

"Circuit Component Reuse Across Tasks in Transformer Language Models", Jack Merullo, Carsten Eickhoff, Ellie Pavlick,
ICLR 2024, arXiv 2310.08744. Code: github.com/jmerullo/circuit_reuse (MIT). An analysis, with no network of its own; it
runs on every `DecoderLM` with softmax attention.

The paper finds by path patching which heads of GPT-2 Medium solve indirect object identification (`zoo.data.ioi`) and
Colored Objects (`zoo.data.colored_objects`), reports that 78 % of the heads are the same, and repairs the second task,
at which the model is bad, by making four heads attend as their work in the first one asks for.

Path patching of a sender (a head) into receivers, at one position p, as published:
1. on clean tokens the sender's output at p is that of a corrupted run; all other heads' outputs at p are the clean
   ones, so that no path leads through another head; MLPs are computed anew, or frozen too. What the receivers are
   then (before what is frozen takes its place) is kept;
2. in a second run on clean tokens the receivers at p take these values, and all that follows is computed anew;
3. effect = (m - m_clean) / (m_corrupted - m_clean), m the mean logit difference of the right and the wrong answer at
   the last position: 0 is none, 1 as bad as the corruption. The paper's plots show -100 times that.

Only heads up to the lowest receiver's layer can be senders, and a receiver is none; their effects stay 0. (The
published code folds norms into weights and centres them first, which changes neither heads' outputs nor differences of
logits, and is not done here.)

`method="fast"` (the default) is exact: earlier positions do not depend on p, and heads at p are frozen, so run 1 is
one token's MLPs on top of a clean cache, run 2 the tokens from p on; a batch of all heads of a layer goes together.
`method="brute"` runs whole sequences sender by sender and is what the other is tested against.
`zoo.probing.path_patch` is Wang et al.'s form instead, with all positions frozen at once.

Heads that share a key head (grouped queries) share its key and value: patching "k" or "v" of one patches the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones.decoder_lm import DecoderLM, DecoderState
from zoo.errors import unknown
from zoo.probing import Patch, probe
from zoo.registry import Paper, register_analysis

PAPER = Paper(
    slug="circuit_reuse",
    title="Circuit Component Reuse Across Tasks in Transformer Language Models",
    authors="Jack Merullo et al.",
    venue="ICLR",
    year=2024,
    arxiv="2310.08744",
    claim="Two different tasks are solved by mostly the same attention heads doing the same jobs.",
    code="https://github.com/jmerullo/circuit_reuse",
    code_license="MIT",
    remarks="An analysis of language models; published for GPT-2 Medium, run here on SmolLM2-135M.",
)
register_analysis(PAPER)

Component = Literal["q", "k", "v", "z"]
Head = tuple[int, int]  # layer and head, from 0
RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
_READ_STEP = 32
_LAYERS_AT_ONCE = 10  # of senders in one program: more waste work below the sender, fewer cost compilations


class Pairs(NamedTuple):
    """Clean and corrupted prompts with their answers, all of a batch; of different lengths padded on the right."""

    clean: jax.Array  # int32 (batch, time)
    corrupted: jax.Array  # int32 (batch, time)
    answers: jax.Array  # int32 (batch, 2), the right token and the wrong one
    lengths: jax.Array  # int32 (batch,), of clean prompts
    corrupted_lengths: jax.Array  # int32 (batch,)


def make_pairs(
    clean: Sequence[Sequence[int]],
    corrupted: Sequence[Sequence[int]],
    answers: Sequence[tuple[int, int]],
    length: int | None = None,
) -> Pairs:
    """A batch of prompts.

    Args:
      clean, corrupted: tokens of each prompt.
      answers: right and wrong token of each.
      length: to pad to, so that several data sets share their compiled programs; None is the longest prompt's.

    Raises:
      ValueError: there is not one corrupted prompt and one pair of answers for each clean one, or a prompt is empty or
        too long.
    """
    if not len(clean) == len(corrupted) == len(answers) > 0:
        raise ValueError(
            f"every clean prompt has one corrupted and one pair of answers, got {len(clean)}, {len(corrupted)} and "
            f"{len(answers)}"
        )
    lengths = [[len(row) for row in rows] for rows in (clean, corrupted)]
    if min(map(min, lengths)) < 1:
        raise ValueError("a prompt has at least one token")
    longest = max(map(max, lengths))
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"the longest prompt has {longest} tokens, more than the length {length}")

    def padded(rows: Sequence[Sequence[int]]) -> jax.Array:
        return jnp.asarray([[*row, *[0] * (length - len(row))] for row in rows], jnp.int32)

    tokens = padded(clean), padded(corrupted), jnp.asarray(answers, jnp.int32).reshape(-1, 2)
    return Pairs(*tokens, *(jnp.asarray(row, jnp.int32) for row in lengths))


class Reading(NamedTuple):
    """Prompts that were read up to a position of each, and the tokens from there to their ends."""

    state: DecoderState  # the past before that position
    tokens: jax.Array  # int32 (batch, rest), the first of each row is at the position
    valid: jax.Array  # bool (batch, rest)
    position: jax.Array  # int32 (batch,)
    last: jax.Array  # int32 (batch,), index in `tokens` of the last one

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's arguments that read the rest."""
        return {"tokens": self.tokens, "valid": self.valid, "state": self.state}


def read(
    model: DecoderLM,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    position: int | Sequence[int] | jax.Array = -1,
) -> Reading:
    """Reads prompts up to a position; what is done from there on shares it.

    Args:
      model: a decoder with softmax attention in every layer, and no window shorter than the prompts.
      variables: of the model.
      tokens: int32 (batch, time), padded on the right.
      lengths: (batch,) tokens that are no padding; None is all.
      position: of each prompt, or one for all; -1 is the last.

    Raises:
      ValueError: a shape is wrong, a position is not in its prompt, or a window too short.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be (batch, time), got shape {tokens.shape}")
    batch, time = tokens.shape
    counts = np.full(batch, time) if lengths is None else np.asarray(lengths)
    places = _places(counts, time, position)
    for layer in range(model.config.layers):
        window = getattr(model.config.make_mixer(layer, parent=None), "window", None)
        if window is not None and window <= time:
            raise ValueError(f"prompts of {time} tokens are as long as layer {layer}'s window of {window}; use 'brute'")
    # Read up to a multiple of some tokens, so that prompts of nearly the same length share a program.
    before, rest = min(-(-int(places.max()) // _READ_STEP) * _READ_STEP, time), int((counts - places).max())
    state = model.init_state(batch, time)
    if before:
        state = _prefill(model, variables, tokens[:, :before], np.arange(before) < places[:, None], state)
    offset = np.arange(rest)
    column = np.minimum(places[:, None] + offset, time - 1)
    return Reading(
        state,
        jnp.take_along_axis(tokens, jnp.asarray(column), axis=1),
        jnp.asarray(offset < (counts - places)[:, None]),
        jnp.asarray(places),
        jnp.asarray(counts - places - 1),
    )


def _places(lengths: np.ndarray, time: int, position: Any) -> np.ndarray:
    """(batch,) positions from 0."""
    if lengths.ndim != 1 or not ((lengths >= 1) & (lengths <= time)).all():
        raise ValueError(f"lengths must be (batch,) in 1 .. {time}, got {lengths}")
    places = np.broadcast_to(np.asarray(position), lengths.shape)
    places = np.where(places == -1, lengths - 1, places)
    if not ((places >= 0) & (places < lengths)).all():
        raise ValueError(f"positions must be -1 or within their prompts of {lengths} tokens, got {position}")
    return places.astype(np.int32)


@partial(jax.jit, static_argnums=0)
def _prefill(model, variables, tokens, valid, state):
    return model.apply(variables, tokens, state, valid=valid, method=DecoderLM.hidden)[1]


class Patching(NamedTuple):
    """What patching each head does."""

    effect: np.ndarray  # float32 (layers, heads): 0 nothing, 1 as bad as the corrupted prompts
    clean: np.ndarray  # float32 (batch,), logit differences of right and wrong answer
    corrupted: np.ndarray  # float32 (batch,), likewise, of the same two answers


def path_patch(
    model: DecoderLM,
    variables: Mapping[str, Any],
    pairs: Pairs,
    receivers: Sequence[Head | str],
    component: Component = "z",
    *,
    position: int | Sequence[int] | jax.Array = -1,
    freeze_mlps: bool = False,
    method: Literal["fast", "brute"] = "fast",
    batch: int | None = None,
) -> Patching:
    """The effect of each head on the answer through some receivers; see the module's docstring.

    Args:
      model: a decoder with softmax attention in every layer.
      variables: of the model.
      pairs: the prompts.
      receivers: (layer, head) each, or sites of the residual stream such as "resid_post.11"; `final_stream(model)` is
        the last one, for what reaches the logits directly and through MLPs.
      component: what of receiving heads, "q", "k", "v" or "z".
      position: where, for senders and receivers: of each prompt, or one for all; -1 is the last. Any other asks for
        corrupted prompts of the clean ones' lengths.
      freeze_mlps: MLPs at the position keep their clean outputs in the first run.
      method: "fast" or "brute".
      batch: prompts that are run at a time; None is all. Means are those of all prompts in any case.

    Raises:
      ValueError: a head, site, component or method does not exist, a shape is wrong, or clean and corrupted prompts
        have the same mean logit difference.
    """
    sites = _receivers(model, receivers, component)
    if method not in ("fast", "brute"):
        raise unknown("method", method, ("fast", "brute"))
    _check_pairs(pairs, position)
    total, (layers, heads) = len(pairs.clean), (model.config.layers, model.config.heads)
    batch = total if batch is None else batch
    if batch < 1:
        raise ValueError(f"batch must be positive, got {batch}")
    lowest = min(layer for _, layer, _ in sites)
    step = layers if method == "brute" else _LAYERS_AT_ONCE
    places = np.broadcast_to(np.asarray(position), (total,))
    summed = np.zeros((layers, heads), np.float32)
    differences = []
    for first in range(0, total, batch):
        part = Pairs(*(value[first : first + batch] for value in pairs))
        run = _prepare(model, variables, part, places[first : first + batch], brute=method == "brute")
        differences.append((run.clean, run.corrupted))
        measured = np.full((layers, heads), run.clean.mean(), np.float32)
        for start in range(0, lowest + 1, step):
            chosen = jnp.arange(start, min(start + step, lowest + 1))
            options = (model, sites, freeze_mlps, None if method == "brute" else start)
            measured[start : start + len(chosen)] = _measure(*options, variables, run, part.answers, chosen)
        summed += measured * len(part.clean)
    clean, corrupted = (np.concatenate(row) for row in zip(*differences, strict=True))
    effect = _normalized(summed / total, clean, corrupted)
    for receiver in receivers:
        if not isinstance(receiver, str):
            effect[receiver] = 0
    return Patching(effect, clean, corrupted)


def final_stream(model: DecoderLM) -> list[str]:
    """The receiver that is the residual stream after the last block."""
    return [f"resid_post.{model.config.layers - 1}"]


def activation_patch(
    model: DecoderLM, variables: Mapping[str, Any], pairs: Pairs, *, position: int | Sequence[int] | jax.Array = -1
) -> Patching:
    """The effect of each head by all paths: its output at a position is that of the corrupted run, nothing is frozen.

    Arguments and errors as of `path_patch`.
    """
    _check_pairs(pairs, position)
    run = _prepare(model, variables, pairs, position, brute=False)
    measured = np.asarray(_activation(model, variables, run, pairs.answers))
    clean, corrupted = np.asarray(run.clean), np.asarray(run.corrupted)
    return Patching(_normalized(measured, clean, corrupted), clean, corrupted)


def _check_pairs(pairs: Pairs, position: int | Sequence[int] | jax.Array) -> None:
    batch = pairs.clean.shape[0]
    if pairs.clean.ndim != 2 or pairs.corrupted.shape != pairs.clean.shape or pairs.answers.shape != (batch, 2):
        raise ValueError(
            f"pairs need clean and corrupted (batch, time) and answers (batch, 2), got {pairs.clean.shape}, "
            f"{pairs.corrupted.shape} and {pairs.answers.shape}"
        )
    if (np.asarray(position) != -1).any() and (np.asarray(pairs.lengths) != np.asarray(pairs.corrupted_lengths)).any():
        raise ValueError("a position other than -1 needs corrupted prompts as long as the clean ones")


def _receivers(
    model: DecoderLM, receivers: Sequence[Head | str], component: str
) -> tuple[tuple[str, int, int | None], ...]:
    """(site's name, layer, head or None) of each."""
    if component not in get_args(Component):
        raise unknown("component", component, get_args(Component))
    if not receivers:
        raise ValueError("there must be a receiver")
    config = model.config
    found: list[tuple[str, int, int | None]] = []
    group = config.heads // (config.key_heads or config.heads) if component in ("k", "v") else 1
    for receiver in receivers:
        if isinstance(receiver, str):
            name, _, number = receiver.partition(".")
            if name not in RESIDUAL or not number.isdigit() or int(number) >= config.layers:
                raise unknown(
                    "receiver", receiver, [f"{name}.{layer}" for name in RESIDUAL for layer in range(config.layers)]
                )
            found.append((receiver, int(number), None))
            continue
        layer, head = receiver
        if not (0 <= layer < config.layers and 0 <= head < config.heads):
            raise ValueError(f"head {receiver} does not exist: there are {config.layers} layers of {config.heads}")
        found.append((f"{component}.{layer}", layer, head // group))
    return tuple(found)


class _Run(NamedTuple):
    """What was read of clean and corrupted prompts, and the arguments of further runs.

    `first` are those of a run that need not go beyond the position, `whole` those of one to the end. `place` is where
    the position is in their queries and residual streams, `slot` where in their keys and values.
    """

    first: dict[str, Any]
    whole: dict[str, Any]
    place: jax.Array
    slot: jax.Array
    last: jax.Array
    clean: jax.Array  # (batch,) logit differences
    corrupted: jax.Array
    frozen: dict[str, jax.Array]  # clean z and MLPs' outputs at the position, (batch, ...)
    stream: dict[str, jax.Array]  # clean residual streams before blocks, in `whole`
    sender: jax.Array  # corrupted z at the position, (layers, batch, heads, head_dim)


def _prepare(model: DecoderLM, variables: Mapping[str, Any], pairs: Pairs, position: Any, brute: bool) -> _Run:
    found = []
    for tokens, lengths in ((pairs.corrupted, pairs.corrupted_lengths), (pairs.clean, pairs.lengths)):
        if brute:
            place = slot = jnp.asarray(_places(np.asarray(lengths), tokens.shape[1], position))
            first = whole = {"tokens": tokens}
            last = lengths - 1
        else:
            reading = read(model, variables, tokens, lengths, position)
            place, slot, last = jnp.zeros_like(reading.position), reading.position, reading.last
            whole = reading.inputs
            first = whole | {"tokens": reading.tokens[:, :1], "valid": reading.valid[:, :1]}
        found.append(_read_sites(model, variables, whole, pairs.answers, place, last))
    (corrupted, other, _), (clean, frozen, stream) = found
    sender = jnp.stack([other[f"z.{layer}"] for layer in range(model.config.layers)])
    return _Run(first, whole, place, slot, last, clean, corrupted, frozen, stream, sender)


@partial(jax.jit, static_argnums=0)
def _read_sites(model, variables, inputs, answers, place, last):
    """Logit differences, heads' and MLPs' outputs at the position, and the residual streams before blocks."""
    names = [f"{name}.{layer}" for name in ("z", "mlp_out", "resid_pre") for layer in range(model.config.layers)]
    found = probe(model, variables, inputs, [*names, "norm_final"]).sites
    difference = _difference(model, variables, found.pop("norm_final"), answers, last)
    stream = {name: value for name, value in found.items() if name.startswith("resid")}
    at = {name: value[jnp.arange(len(place)), place] for name, value in found.items() if name not in stream}
    return difference, at, stream


def _difference(
    model: DecoderLM, variables: Mapping[str, Any], x: jax.Array, answers: jax.Array, last: jax.Array
) -> jax.Array:
    """(batch,) logit of the right less that of the wrong answer, from two columns of the head."""
    params = nn.unbox(variables)["params"]
    head = params["embed"]["embedding"] if model.config.tie_embeddings else params["head"]["kernel"].T
    x = x[jnp.arange(len(last)), last].astype(jnp.float32)
    logits = jnp.einsum("bf,baf->ba", x, head[answers].astype(jnp.float32))
    if model.config.logit_softcap is not None:
        logits = model.config.logit_softcap * jnp.tanh(logits / model.config.logit_softcap)
    return logits[:, 0] - logits[:, 1]


def _normalized(measured: np.ndarray, clean: np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    low, high = float(clean.mean()), float(corrupted.mean())
    if low == high:
        raise ValueError(f"clean and corrupted prompts have one mean logit difference, {low}: nothing to explain")
    return (measured - low) / (high - low)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measure(model, sites, freeze_mlps, start, variables, run, answers, layers):
    """Mean logit difference for each sender of some layers: (layers, heads).

    `start` is the first of these layers: the stream before it is the clean one, so that the compiler drops what is
    below. None computes all of it (brute force), and one sender after the other.
    """
    rows = jnp.arange(len(run.place))
    lowest = min(layer for _, layer, _ in sites)

    def where(name: str) -> jax.Array:
        return run.slot if name[:2] in ("k.", "v.") else run.place

    def measure(layer: jax.Array, head: jax.Array) -> jax.Array:
        kept: dict[str, jax.Array] = {}

        def freeze(name: str) -> Callable[[jax.Array], jax.Array]:
            value = run.frozen[name]
            if name.startswith("z."):
                own = (jnp.arange(value.shape[1]) == head) & (layer == int(name[2:]))
                value = jnp.where(own[:, None], run.sender[int(name[2:])], value)

            def change(x: jax.Array) -> jax.Array:
                kept[name] = x  # receivers are read before they are overwritten
                return x.at[rows, run.place].set(value)

            return change

        names = [name for name in run.frozen if freeze_mlps or name.startswith("z.")]
        patch: dict[str, Patch] = {name: freeze(name) for name in names}
        if start is not None:
            at = run.stream[f"resid_pre.{start}"][rows, run.place]
            patch[f"resid_pre.{start}"] = lambda x: x.at[rows, run.place].set(at)
        seen = probe(model, variables, run.first, {name for name, _, _ in sites}, patch).sites | kept
        values = {
            (name, receiving): seen[name][rows, where(name)] if receiving is None
            else seen[name][rows, where(name), receiving]
            for name, _, receiving in sites
        }  # fmt: skip

        def receive(name: str) -> Callable[[jax.Array], jax.Array]:
            def change(x: jax.Array) -> jax.Array:
                if start is not None and name == f"resid_pre.{lowest}":
                    x = run.stream[name]
                for (other, receiving), value in values.items():
                    if other == name:
                        place = (rows, where(name)) if receiving is None else (rows, where(name), receiving)
                        x = x.at[place].set(value)
                return x

            return change

        patch = {name: receive(name) for name, _, _ in sites}
        if start is not None:
            patch.setdefault(f"resid_pre.{lowest}", run.stream[f"resid_pre.{lowest}"])
        x = probe(model, variables, run.whole, ["norm_final"], patch).sites["norm_final"]
        return _difference(model, variables, x, answers, run.last).mean()

    heads = jnp.arange(model.config.heads)
    over_heads = (
        jax.vmap(measure, (None, 0)) if start is not None
        else lambda layer, heads: jax.lax.map(lambda head: measure(layer, head), heads)
    )  # fmt: skip
    return jax.lax.map(lambda layer: over_heads(layer, heads), layers)


@partial(jax.jit, static_argnums=0)
def _activation(model, variables, run, answers):
    rows = jnp.arange(len(run.place))

    def measure(layer: jax.Array, head: jax.Array) -> jax.Array:
        def change(index: int) -> Callable[[jax.Array], jax.Array]:
            def corrupt(z: jax.Array) -> jax.Array:
                own = (jnp.arange(z.shape[2]) == head) & (layer == index)
                return z.at[rows, run.place].set(jnp.where(own[:, None], run.sender[index], z[rows, run.place]))

            return corrupt

        patch = {f"z.{index}": change(index) for index in range(model.config.layers)}
        x = probe(model, variables, run.whole, ["norm_final"], patch).sites["norm_final"]
        return _difference(model, variables, x, answers, run.last).mean()

    heads = jnp.arange(model.config.heads)
    layers = jnp.arange(model.config.layers)
    return jax.lax.map(lambda layer: jax.vmap(measure, (None, 0))(layer, heads), layers)


class End(NamedTuple):
    """What a model does at the last token of prompts."""

    logits: jax.Array  # float32 (batch, vocabulary)
    attention: jax.Array  # float32 (batch, layers, heads, keys), of the last token


def at_end(
    model: DecoderLM, variables: Mapping[str, Any], reading: Reading, rows: Mapping[Head, jax.Array] | None = None
) -> End:
    """Logits and attention of prompts' last tokens, where some heads attend as they are told to.

    Args:
      model, variables: as of `path_patch`.
      reading: of `read`, with position -1; one serves any number of interventions.
      rows: for a head (layer, head) the weights (batch, keys) of its last query, over the first keys (more have 0).

    Raises:
      ValueError: a head does not exist, a shape is wrong, or the reading stops before the last token.
    """
    if reading.tokens.shape[1] != 1:
        raise ValueError(f"the prompts must be read up to their last token, {reading.tokens.shape[1]} are left")
    config, rows = model.config, dict(rows or {})
    batch, keys = len(reading.tokens), reading.state.layers[0].key.shape[1]
    choice = np.full((config.layers, config.heads), -1, np.int32)
    distinct: list[jax.Array] = []
    for (layer, head), weights in rows.items():
        if not (0 <= layer < config.layers and 0 <= head < config.heads):
            raise ValueError(f"head {(layer, head)} does not exist: there are {config.layers} layers of {config.heads}")
        if weights.ndim != 2 or weights.shape[0] != batch or weights.shape[1] > keys:
            raise ValueError(f"weights must be (batch, up to {keys} keys), the batch {batch}, got {weights.shape}")
        same = [index for index, other in enumerate(distinct) if other is weights]
        choice[layer, head] = same[0] if same else len(distinct)
        distinct += [] if same else [weights]
    padded = [np.pad(np.asarray(row), ((0, 0), (0, keys - row.shape[1]))) for row in distinct]
    # Which heads and what they are told are values: one program serves all interventions.
    return _at_end(model, variables, reading, choice, np.stack(padded or [np.zeros((batch, keys), np.float32)]))


@partial(jax.jit, static_argnums=0)
def _at_end(model, variables, reading, choice, rows):
    def force(layer: int) -> Callable[[jax.Array], jax.Array]:
        chosen = choice[layer]  # (heads,)
        told = jnp.moveaxis(rows[jnp.maximum(chosen, 0)], 0, 1)[:, :, None]  # (batch, heads, 1, keys)
        return lambda pattern: jnp.where((chosen >= 0)[:, None, None], told.astype(pattern.dtype), pattern)

    names = [f"pattern.{layer}" for layer in range(model.config.layers)]
    patch = {name: force(layer) for layer, name in enumerate(names)}
    found = probe(model, variables, reading.inputs, names, patch)
    return End(found.logits[:, 0], jnp.stack([found.sites[name][:, :, 0] for name in names], axis=1))


def attention_to(attention: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention (batch, layers, heads, keys) to positions (batch,), or to several (batch, any) together.

    Returns (batch, layers, heads).

    Raises ValueError where the batches differ.
    """
    if positions.shape[0] != attention.shape[0]:
        raise ValueError(f"attention has a batch of {attention.shape[0]}, positions one of {positions.shape[0]}")
    positions = positions.reshape(len(positions), 1, 1, -1)
    return jnp.take_along_axis(attention, positions, axis=-1).sum(-1)


def ov_copying(
    model: DecoderLM, variables: Mapping[str, Any], k: int = 5, tokens: Sequence[int] | None = None
) -> np.ndarray:
    """How well each head copies what it attends to, (layers, heads) in 0 .. 1.

    The share of tokens whose own logit is among the k largest of E[t] W_V W_O E^T (or the untied head's matrix), the
    embedding going through the head alone: no norm, MLP or bias.

    Args:
      tokens: those that are asked of; None is the vocabulary (its square is the cost).

    Raises:
      ValueError: k is not positive, or a token does not exist.
    """
    config, params = model.config, nn.unbox(variables)["params"]
    chosen = np.arange(config.vocab_size) if tokens is None else np.asarray(tokens)
    if k < 1 or chosen.size == 0 or chosen.min() < 0 or chosen.max() >= config.vocab_size:
        raise ValueError(f"k must be positive and tokens in 0 .. {config.vocab_size - 1}, got {k} and {chosen}")
    embedding = params["embed"]["embedding"]
    unembedding = embedding if config.tie_embeddings else params["head"]["kernel"].T
    group = config.heads // (config.key_heads or config.heads)
    mixers = [params[f"layer_{layer}"]["mixer"] for layer in range(config.layers)]

    def kernels(name: str, heads: int) -> jax.Array:
        """(layers, heads, features, head_dim)"""
        stacked = jnp.stack([mixer[name]["kernel"] for mixer in mixers])
        stacked = stacked if name == "value" else stacked.swapaxes(1, 2)
        return stacked.reshape(config.layers, config.features, heads, -1).swapaxes(1, 2)

    value = jnp.repeat(kernels("value", config.heads // group), group, axis=1)
    return np.asarray(_copying(k, embedding, unembedding, value, kernels("out", config.heads), jnp.asarray(chosen)))


@partial(jax.jit, static_argnums=0)
def _copying(k, embedding, unembedding, value, out, tokens):
    size = math.gcd(len(tokens), 128)
    chunks = tokens.reshape(-1, size)

    def of_head(kernels: tuple[jax.Array, jax.Array]) -> jax.Array:
        readout = unembedding @ kernels[1]  # (vocabulary, head_dim)

        def of_chunk(chunk: jax.Array) -> jax.Array:
            logits = (embedding[chunk] @ kernels[0]) @ readout.T
            own = jnp.take_along_axis(logits, chunk[:, None], axis=1)
            return ((logits > own).sum(1) < k).sum()

        return jax.lax.map(of_chunk, chunks).sum() / len(tokens)

    flat = value.reshape(-1, *value.shape[2:]), out.reshape(-1, *out.shape[2:])
    return jax.lax.map(of_head, flat).reshape(value.shape[:2])


class RepetitionScores(NamedTuple):
    """Attention in sequences that repeat themselves, means over the second half's tokens: (layers, heads)."""

    duplicate: np.ndarray  # to the token's first occurrence
    induction: np.ndarray  # to the token after its first occurrence


def repetition_scores(
    model: DecoderLM, variables: Mapping[str, Any], *, length: int = 25, batch: int = 8, seed: int = 0
) -> RepetitionScores:
    """Which heads look back to an earlier occurrence, on random tokens that come twice (Olsson et al. 2022).

    Args:
      length: of the half that is repeated, at least 2.
      batch: number of sequences.
      seed: of the tokens.

    Raises:
      ValueError: a size is too small.
    """
    if length < 2 or batch < 1:
        raise ValueError(f"length must be at least 2 and batch positive, got {length} and {batch}")
    half = jax.random.randint(jax.random.key(seed), (batch, length), 0, model.config.vocab_size)
    return RepetitionScores(*map(np.asarray, _repetition(model, variables, jnp.concatenate([half, half], axis=1))))


@partial(jax.jit, static_argnums=0)
def _repetition(model, variables, tokens):
    length = tokens.shape[1] // 2
    names = [f"pattern.{layer}" for layer in range(model.config.layers)]
    found = probe(model, variables, {"tokens": tokens}, names).sites
    query = jnp.arange(length, 2 * length)

    def mean(offset: int) -> jax.Array:
        return jnp.stack([found[name][:, :, query, query - length + offset].mean((0, 2)) for name in names])

    return mean(0), mean(1)


def strongest(effect: np.ndarray, top: float | int = 0.02) -> list[Head]:
    """Heads of the largest |effect|, the largest first: a share of all (rounded up), or a number of them.

    Raises ValueError for a share that is not in (0, 1], or a number that is not in 1 .. all.
    """
    count = math.ceil(top * effect.size) if isinstance(top, float) else top
    if not 1 <= count <= effect.size:
        raise ValueError(f"top must be a share in (0, 1] or a number in 1 .. {effect.size}, got {top}")
    order = np.argsort(-np.abs(effect).ravel(), kind="stable")[:count]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, effect.shape), strict=True)]


class Comparison(NamedTuple):
    """Two circuits beside each other."""

    shared: int  # heads that are among the strongest of both
    size: int  # number of the strongest
    overlap: float  # shared / size
    jaccard: float
    chance: float  # expected number that two random sets share
    pearson: float  # of the effects
    spearman: float  # of their sizes
    overlap_p: float  # share of permutations of the heads with as many shared ones, one-sided
    spearman_p: float  # likewise, with as large a correlation


def compare_circuits(
    first: np.ndarray, second: np.ndarray, top: float | int = 0.02, *, permutations: int = 10_000, seed: int = 0
) -> Comparison:
    """How much two maps of effects (layers, heads) have in common, tested by permuting the heads of one.

    Args:
      top: as of `strongest`.
      permutations: number of them; the smallest p is 1 / (permutations + 1).
      seed: of the permutations.

    Raises:
      ValueError: shapes differ, or `top` is out of range.
    """
    if first.shape != second.shape:
        raise ValueError(f"effects must have one shape, got {first.shape} and {second.shape}")
    from scipy.stats import rankdata

    sets = [{layer * first.shape[1] + head for layer, head in strongest(x, top)} for x in (first, second)]
    shared, size, heads = len(sets[0] & sets[1]), len(sets[0]), first.size
    ranks = [rankdata(np.abs(x).ravel()) for x in (first, second)]
    spearman = float(np.corrcoef(*ranks)[0, 1])
    rng = np.random.default_rng(seed)
    member = [np.isin(np.arange(heads), list(chosen)) for chosen in sets]
    centred = [(rank - rank.mean()) / max(float(rank.std()), 1e-12) for rank in ranks]
    as_many = as_large = 0
    for _ in range(permutations):
        order = rng.permutation(heads)
        as_many += int((member[0] & member[1][order]).sum() >= shared)
        as_large += int((centred[0] * centred[1][order]).mean() >= spearman)
    return Comparison(
        shared, size, shared / size, shared / len(sets[0] | sets[1]), size**2 / heads,
        float(np.corrcoef(first.ravel(), second.ravel())[0, 1]), spearman,
        (as_many + 1) / (permutations + 1), (as_large + 1) / (permutations + 1),
    )  # fmt: skip


class Stage(NamedTuple):
    """One step of the search for a circuit: which heads act on which receivers."""

    name: str  # such as "movers"
    receivers: Sequence[Head | str]
    component: str
    effect: np.ndarray  # (layers, heads)


def circuit_graph(stages: Sequence[Stage], top: float | int = 0.02) -> dict[str, Any]:
    """A circuit as a record for JSON: nodes by stage, and edges from the strongest heads to what they act on.

    Returns:
      {"nodes": [{"id", "stage"}], "edges": [{"from", "to", "component", "effect"}]}; effects are -100 times those of
      the stage, negative where the head matters. A head keeps the stage that found it first.
    """
    nodes: dict[str, str] = {}
    edges = []
    for stage in stages:
        targets = [_name(receiver) for receiver in stage.receivers]
        for target in targets:
            nodes.setdefault(target, "output")
        for head in strongest(stage.effect, top):
            nodes.setdefault(_name(head), stage.name)
            shown = round(-100 * float(stage.effect[head]), 2)
            edges += [{"from": _name(head), "to": t, "component": stage.component, "effect": shown} for t in targets]
    return {"nodes": [{"id": name, "stage": stage} for name, stage in nodes.items()], "edges": edges}


def _name(node: Head | str) -> str:
    return node if isinstance(node, str) else f"{node[0]}.{node[1]}"

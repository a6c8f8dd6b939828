"""ACT: hidden attention sinks, and a calibration of attention that takes from them without training.

"Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention
Calibration", Zhongzhi Yu, Zheng Wang, Yonggan Fu, Huihong Shi, Khalid Shaikh, Yingyan Celine Lin, ICML 2024, arXiv
2406.15765. Code: github.com/GATECH-EIC/ACT. An analysis and an edit of attention, with no network of its own; it runs
on every `DecoderLM` with softmax attention.

A key is a sink if the queries that see it attend to it by more than a threshold in the mean. The first token is one, as
is well known; others, later in the text and without content, are too. In chosen heads the later sinks' weights are
multiplied by beta and what they lose goes to the other keys in proportion.

What the published code does and is therefore done here:
- the mean of key j is over the N - j queries that see it, so that the last tokens qualify easily;
- what is spared is the *first key above the threshold*, which need not be token 0;
- the threshold is absolute (0.1); the paper's own, alpha / N, is `relative=True`.

The calibrated output never needs the edited matrix (`kernels.attention_readout.calibrated_attention`), nor the sinks
the matrix of weights: column sums are a second pass over tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention_readout import attention_received, calibrated_attention
from zoo.backbones.decoder_lm import DecoderLM
from zoo.mixers.softmax import SoftmaxAttention
from zoo.registry import Paper, register_analysis

PAPER = Paper(
    slug="act",
    title="Unveiling and Harnessing Hidden Attention Sinks: Attention Calibration",
    authors="Zhongzhi Yu et al.",
    venue="ICML",
    year=2024,
    arxiv="2406.15765",
    claim="Tokens after the first are attention sinks too; taking from them in chosen heads gains accuracy, untrained.",
    code="https://github.com/GATECH-EIC/ACT",
    remarks="An analysis of language models; the published lists of heads are for Llama-2-7B-chat and Mistral-7B.",
)
register_analysis(PAPER)

BETA, THRESHOLD, RELATIVE_THRESHOLD = 0.4, 0.1, 5.0


class Calibration(NamedTuple):
    """How attention is calibrated. Numbers may be traced."""

    heads: jax.Array  # bool (layers, batch or 1, heads)
    beta: float = BETA
    threshold: float = THRESHOLD
    relative: bool = False  # threshold / tokens, and not threshold
    spare_first: bool = True


def sinks_of(
    column_mean: jax.Array, valid: jax.Array | None = None, *, threshold: float = THRESHOLD, relative: bool = False
) -> jax.Array:
    """Which keys are sinks: bool like column_mean (..., keys).

    Args:
      column_mean: mean attention that each key receives from the queries that see it.
      valid: bool, broadcastable, False for padding, which is no sink; None is all True.
      threshold: above which a key is a sink; with `relative` it is divided by the number of (valid) keys.
      relative: see there.
    """
    bound: Any = threshold
    if relative:
        count = column_mean.shape[-1] if valid is None else jnp.sum(valid, axis=-1, keepdims=True)
        bound = threshold / count
    found = column_mean > bound
    return found if valid is None else found & valid


def spare_first(sinks: jax.Array) -> jax.Array:
    """The sinks without the first of each row."""
    return sinks & (jnp.cumsum(sinks, axis=-1) > 1)


def calibrate_attention(
    attention: jax.Array,
    heads: Sequence[int] | None = None,
    *,
    beta: float = BETA,
    threshold: float = THRESHOLD,
    relative: bool = False,
    spare: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rule on a whole map, as published: the definition that `calibrated` is held against.

    Args:
      attention: (batch, heads, tokens, tokens), causal, after the softmax.
      heads: those that change; None is all.
      beta: what is left of a sink's weight.
      threshold, relative: as of `sinks_of`.
      spare: leave the first sink of each head as it is.

    Returns:
      The calibrated map; column means and sinks (the spared one included), both (batch, heads, tokens).

    Raises:
      ValueError: the map is not square, or a head does not exist.
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(f"attention must be (batch, heads, tokens, tokens), got {attention.shape}")
    count = attention.shape[1]
    chosen = np.zeros(count, bool)
    for head in range(count) if heads is None else heads:
        if not 0 <= head < count:
            raise ValueError(f"head {head} does not exist: there are {count}")
        chosen[head] = True
    tokens = attention.shape[-1]
    column_mean = attention.sum(axis=2) / (tokens - jnp.arange(tokens))
    sinks = sinks_of(column_mean, threshold=threshold, relative=relative)
    scaled = (spare_first(sinks) if spare else sinks)[:, :, None]
    kept = jnp.where(scaled, 0, attention)
    others = kept.sum(-1, keepdims=True)
    free = (1 - beta) * jnp.where(scaled, attention, 0).sum(-1, keepdims=True)
    share = jnp.where(others > 0, free / jnp.where(others > 0, others, 1), 0)
    changed = jnp.where(scaled, beta * attention, attention) + share * kept
    changed = jnp.where(others > 0, changed, attention)  # a row that sees sinks only stays as it is
    return jnp.where(chosen[:, None, None], changed, attention), column_mean, sinks


class SinkStatistics(NamedTuple):
    """Of every layer and head."""

    column_mean: jax.Array  # float32 (layers, batch, heads, tokens)
    sinks: jax.Array  # bool, likewise

    @property
    def first_sink(self) -> jax.Array:
        """int32 (layers, batch, heads), the position of the first sink, -1 where there is none."""
        return jnp.where(self.sinks.any(-1), jnp.argmax(self.sinks, axis=-1), -1)

    @property
    def later_sinks(self) -> jax.Array:
        """bool like `sinks`, all but the first token."""
        return self.sinks.at[..., 0].set(False)


def sink_statistics(
    model: DecoderLM,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    valid: jax.Array | None = None,
    *,
    threshold: float = THRESHOLD,
    relative: bool = False,
) -> SinkStatistics:
    """Attention received by every key, and which are sinks, of the model as it is; memory linear in the tokens.

    Args:
      model: a decoder with causal softmax attention in every layer.
      variables: of the model.
      tokens: int (batch, tokens).
      valid: bool (batch, tokens), False for padding; None is all True.
      threshold, relative: as of `sinks_of`.
    """
    recorder = _Recorder(None, valid, threshold, relative)
    with nn.intercept_methods(recorder.intercept):
        model.apply(variables, tokens, valid=valid, method=DecoderLM.hidden)
    means = jnp.stack([recorder.means[layer] for layer in range(model.config.layers)])
    mask = None if valid is None else valid[:, None]
    return SinkStatistics(means, sinks_of(means, mask, threshold=threshold, relative=relative))


def calibrated(
    model: DecoderLM,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    calibration: Calibration,
    valid: jax.Array | None = None,
) -> jax.Array:
    """`DecoderLM.hidden`, (batch, tokens, features), with calibrated attention in chosen heads.

    Which keys are sinks is decided in the same pass, layer by layer, as published. Batches and padding are those of the
    model; the published code takes one prompt at a time.

    Args:
      model, variables, tokens, valid: as of `sink_statistics`.
      calibration: heads, and numbers.

    Raises:
      ValueError: `calibration.heads` has another shape.
    """
    _check_heads(model, calibration.heads, tokens.shape[0])
    recorder = _Recorder(calibration, valid, calibration.threshold, calibration.relative)
    with nn.intercept_methods(recorder.intercept):
        return model.apply(variables, tokens, valid=valid, method=DecoderLM.hidden)[0]


def _check_heads(model: DecoderLM, heads: jax.Array, batch: int) -> None:
    layers, count = model.config.layers, model.config.heads
    if heads.ndim != 3 or heads.shape[0] != layers or heads.shape[1] not in (1, batch) or heads.shape[2] != count:
        raise ValueError(f"heads must be bool ({layers}, {batch} or 1, {count}), got {heads.shape}")


class _Recorder:
    """Intercepts attention: notes the columns' means of each layer, and calibrates it."""

    def __init__(
        self, calibration: Calibration | None, valid: jax.Array | None, threshold: float, relative: bool
    ) -> None:
        self.calibration, self.valid, self.threshold, self.relative = calibration, valid, threshold, relative
        self.means: dict[int, jax.Array] = {}

    def intercept(self, call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "attend" or not isinstance(module, SoftmaxAttention):
            return call(*arguments, **options)
        layer = int(module.path[0].removeprefix("layer_"))
        query, key, value, mask = arguments
        logits = module.logits(mask)
        mean = column_mean(query, key, self.valid, **logits)
        self.means[layer] = mean
        plain = call(*arguments, **options)
        if self.calibration is None:
            return plain
        heads, beta = self.calibration.heads[layer], self.calibration.beta
        visible = None if self.valid is None else self.valid[:, None]
        sinks = sinks_of(mean, visible, threshold=self.threshold, relative=self.relative)
        scaled = spare_first(sinks) if self.calibration.spare_first else sinks
        logits.pop("sinks")
        changed = calibrated_attention(query, key, value, scaled & heads[..., None], factor=beta, **logits)
        return jnp.where(heads[:, None, :, None], changed, plain)


def column_mean(query: jax.Array, key: jax.Array, valid: jax.Array | None = None, **logits: Any) -> jax.Array:
    """Mean attention that each key receives from the queries that see it, causally: float32 (batch, heads, keys).

    Args:
      query, key: as attention compares them, (batch, tokens, heads or key heads, dim).
      valid: bool (batch, tokens), False for padding, which neither gives nor receives; None is all True.
      **logits: arguments of `kernels.attention.attention` that make the map, `causal` among them.
    """
    tokens = query.shape[1]
    there = jnp.ones((1, tokens), jnp.float32) if valid is None else valid.astype(jnp.float32)
    weights = there[:, :, None, None].astype(query.dtype)
    received = attention_received(query, key, weights, **logits)[..., 0].swapaxes(1, 2)
    later = jnp.cumsum(there[:, ::-1], axis=1)[:, ::-1]  # the number of queries from each key on
    return received / jnp.maximum(later, 1)[:, None] * there[:, None]


class HeadSearch(NamedTuple):
    """Each head's effect, alone calibrated: (layers, heads)."""

    margin_gain: np.ndarray  # mean change of the right label's logit over the best other one
    accuracy_gain: np.ndarray
    later_sinks: np.ndarray  # share of prompts in which the head has a later sink; in the others nothing changes

    def best(self, count: int) -> list[tuple[int, int]]:
        """(layer, head) of the largest gains in margin, the largest first."""
        order = np.argsort(-self.margin_gain.ravel(), kind="stable")[:count]
        return [
            (int(layer), int(head))
            for layer, head in zip(*np.unravel_index(order, self.margin_gain.shape), strict=True)
        ]


def search_heads(
    model: DecoderLM,
    variables: Mapping[str, Any],
    prompts: Sequence[np.ndarray],
    answers: Sequence[int],
    labels: Sequence[int],
    *,
    beta: float = BETA,
    threshold: float = THRESHOLD,
    relative: bool = False,
    layers: Sequence[int] | None = None,
    pad_to: int | None = None,
    progress: Callable[[int], None] = lambda prompt: None,
) -> HeadSearch:
    """Calibrates one head after the other, and sees what becomes of the right answer.

    A head leaves the layers before its own as they are, so each layer's search starts from the stored residual stream
    and runs all heads of the layer as one batch: about a quarter of the work of brute force, and exactly the same.

    Args:
      model, variables: as of `sink_statistics`.
      prompts: tokens of each, the answer's logits are those after the last.
      answers: index into `labels` of each prompt's right answer.
      labels: the token of each answer.
      beta, threshold, relative: as of `Calibration`.
      layers: to search; None is 2 .. layers - 2, as published.
      pad_to: length to which prompts are padded (on the right), so that few programs are compiled; None is the longest.
      progress: called with each prompt's number when it is done.

    Raises:
      ValueError: there is no prompt, or a number of answers that differs.
    """
    if not prompts or len(prompts) != len(answers):
        raise ValueError(f"one answer for each prompt, and at least one: got {len(prompts)} and {len(answers)}")
    config = model.config
    layers = range(2, config.layers - 1) if layers is None else layers
    length = max(map(len, prompts)) if pad_to is None else pad_to
    gain = np.zeros((len(prompts), config.layers, config.heads))
    right, sinks = gain.copy(), gain.copy()
    columns = jnp.asarray(labels, jnp.int32)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = np.zeros((1, length), np.int32)
        row[0, : len(prompt)] = prompt
        valid = jnp.arange(length)[None] < len(prompt)
        plain, residuals, found = _first_pass(model, threshold, relative, variables, jnp.asarray(row), valid, columns)
        before, was_right = _margin(np.asarray(plain), answer)
        later = np.any(np.asarray(found), axis=-1)[:, 0]  # (layers, heads)
        sinks[index] = later
        for layer in layers:
            if not later[layer].any():
                continue
            logits = _from_layer(model, layer, beta, threshold, relative, variables, residuals[layer], valid, columns)
            for head, one in enumerate(np.asarray(logits)):
                if later[layer, head]:
                    margin, is_right = _margin(one[None], answer)
                    gain[index, layer, head] = margin - before
                    right[index, layer, head] = float(is_right) - float(was_right)
        progress(index)
    # Classes count alike, however often each occurs.
    weights = np.array([1 / list(answers).count(answer) for answer in answers])
    weights /= weights.sum()
    return HeadSearch(np.einsum("n,nlh->lh", weights, gain), np.einsum("n,nlh->lh", weights, right), sinks.mean(axis=0))


def _margin(logits: np.ndarray, answer: int) -> tuple[float, bool]:
    others = np.delete(logits[0], answer)
    margin = float(logits[0, answer] - others.max())
    return margin, margin > 0


def _label_logits(
    model: DecoderLM, variables: Any, hidden: jax.Array, valid: jax.Array, labels: jax.Array
) -> jax.Array:
    """(batch, labels) after the last valid token."""
    last = hidden[jnp.arange(len(hidden)), jnp.sum(valid, axis=1) - 1]
    logits: Any = model.apply(variables, last, method=DecoderLM.logits)
    return logits[:, labels]


@partial(jax.jit, static_argnums=(0,))
def _first_pass(model, threshold, relative, variables, tokens, valid, labels):
    residuals = []

    def keep(call, arguments, options, context):
        if context.method_name == "__call__" and len(context.module.path) == 1 and context.module.name[:6] == "layer_":
            residuals.append(arguments[0])
        return call(*arguments, **options)

    recorder = _Recorder(None, valid, threshold, False)
    with nn.intercept_methods(recorder.intercept), nn.intercept_methods(keep):
        hidden, _ = model.apply(variables, tokens, valid=valid, method=DecoderLM.hidden)
    means = jnp.stack([recorder.means[layer] for layer in range(model.config.layers)])
    bound = jnp.where(relative, threshold / jnp.sum(valid), threshold)
    sinks = spare_first((means > bound) & valid[:, None])
    return _label_logits(model, variables, hidden, valid, labels), residuals, sinks


@partial(jax.jit, static_argnums=(0, 1, 4))
def _from_layer(model, layer, beta, threshold, relative, variables, residual, valid, labels):
    """Label logits (heads, labels), row h with head h of this layer calibrated."""
    heads = model.config.heads
    chosen = jnp.zeros((model.config.layers, heads, heads), bool).at[layer].set(jnp.eye(heads, dtype=bool))
    valid = jnp.broadcast_to(valid, (heads, valid.shape[1]))
    recorder = _Recorder(Calibration(chosen, beta), valid, threshold, relative)

    def rest(module: DecoderLM, x: jax.Array) -> jax.Array:
        with nn.intercept_methods(recorder.intercept):
            x, _ = module.layer[layer](x, None, valid, True)
        for block in module.layer[layer + 1 :]:
            x, _ = block(x, None, valid, True)
        return module.norm(x) if module.config.norm_position == "pre" else x

    x = jnp.broadcast_to(residual, (heads, *residual.shape[1:]))
    return _label_logits(model, variables, model.apply(variables, x, method=rest), valid, labels)

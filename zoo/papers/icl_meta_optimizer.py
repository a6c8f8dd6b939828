"""In-context learning as implicit gradient descent: the dual form, its comparison with finetuning, momentum attention.

"Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers", Damai Dai,
Yutao Sun, Li Dong, Yaru Hao, Shuming Ma, Zhifang Sui, Furu Wei, Findings of ACL 2023, arXiv 2212.10559. Code:
microsoft/LMOps, folder understand_icl (Apache-2.0). Models: fairseq's dense language models of 1.3 and 2.7 billion
parameters, whose checkpoints load here under XGLM's names. Code and checkpoints of momentum attention are not
published.

A linear layer after steps of gradient descent is the layer before them plus linear attention over the steps' errors and
inputs; read backwards, attention to demonstrations is an update of the layer that has none. So in-context learning
(ICL) is held against finetuning (FT) that trains key and value projections only, on the demonstrations, one step each,
in their order, and against neither (ZSL).

What the published code does and is therefore done here:
- the loss of finetuning is over all tokens of a demonstration, not the label only;
- what is compared is the attention's output after its projection, before the residual, of a query's last token;
- attention maps are scaled scores before mask and softmax; SimAM pads shorter ones with zeros on the left;
- hidden states are scaled to length 1 before they are subtracted;
- positions count from 2, embeddings are multiplied by sqrt(features).

The published dictionary's size is not stated: GPT-2's 50,257 tokens and four special ones are assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax.core import FrozenDict

from zoo.backbones.decoder_lm import DecoderConfig, DecoderLM
from zoo.backbones.generation import score
from zoo.mixers.momentum import MomentumAttention
from zoo.probing import probe
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

__all__ = ["MomentumAttention"]

PAPER = Paper(
    slug="icl_meta_optimizer",
    title="Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers",
    authors="Damai Dai et al.",
    venue="Findings of ACL",
    year=2023,
    arxiv="2212.10559",
    claim="Learning from demonstrations in a prompt changes a network's hidden states as finetuning on them does.",
    code="https://github.com/microsoft/LMOps/tree/main/understand_icl",
    code_license="Apache-2.0",
    remarks="Momentum attention has no published code or checkpoint; its momentum is not given, 0.5 is ours.",
)


def _config(features: int, layers: int, heads: int, momentum: float | None = None) -> DecoderConfig:
    mixer: dict[str, Any] = {}
    if momentum is not None:
        mixer = {"mixer": "momentum", "mixer_options": FrozenDict(momentum=momentum)}
    return DecoderConfig(
        features=features, layers=layers, heads=heads, mlp_features=4 * features, vocab_size=50261, max_length=2048,
        mlp="gelu", norm="layer", norm_epsilon=1e-5, positions="sinusoidal", embedding_scale=features**0.5,
        qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True, **mixer,
    )  # fmt: skip


def example_inputs(config: DecoderConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Tokens of sequences of 128."""
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, config.vocab_size, (batch_size, 128), dtype=np.int32)}


def weight_rules(config: DecoderConfig) -> list[Rule]:
    """Names of fairseq's decoder, and of XGLM with its prefix "model."."""
    rules: list[Rule] = []
    for root in (r"decoder\.", r"model\."):
        rules += [
            *layer("embedding", root + "embed_tokens", "embed"),
            *under(
                root + r"layers\.(\d+)",
                "layer_{0}",
                [
                    *(
                        rule
                        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
                        for rule in layer("linear", rf"self_attn\.{theirs}_proj", f"mixer/{ours}")
                    ),
                    *layer("norm", "self_attn_layer_norm", "norm1"),
                    *layer("norm", "final_layer_norm", "norm2"),
                    *layer("linear", "fc1", "mlp/up"),
                    *layer("linear", "fc2", "mlp/down"),
                ],
            ),
            *layer("norm", root + "layer_norm", "norm"),
            Rule(root + r"embed_positions\.(weights|_float_tensor)", None),
            Rule(root + "version", None),
        ]
    return [*rules, Rule(r"lm_head\.weight", None)]


register(
    PAPER,
    Variant("icl_gpt_125m", _config(768, 12, 12)),
    Variant("icl_gpt_350m", _config(1024, 24, 16)),
    Variant("icl_gpt_1_3b", _config(2048, 24, 32)),
    Variant("icl_gpt_2_7b", _config(2560, 32, 32)),
    Variant("icl_moattn_350m", _config(1024, 24, 16, momentum=0.5)),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
)(DecoderLM)


class Records(NamedTuple):
    """What is compared, of the last token."""

    logits: jax.Array  # float32 (batch, time, vocabulary)
    attention_out: jax.Array  # (batch, layers, features), after the projection, before the residual
    attention_map: jax.Array  # float32 (batch, layers, heads, time), scaled scores before mask and softmax
    query: jax.Array  # (batch, layers, features), scaled queries of all heads


def records(model: DecoderLM, variables: Mapping[str, Any], tokens: jax.Array) -> Records:
    """The recordings for the last token of each sequence (batch, time)."""
    layers = range(model.config.layers)
    names = [f"{name}.{layer}" for layer in layers for name in ("q", "k", "attn_out")]
    seen = probe(model, variables, {"tokens": tokens}, names)
    out, maps, queries = [], [], []
    for index in layers:
        query, key = seen.sites[f"q.{index}"], seen.sites[f"k.{index}"]
        last = query[:, -1] * query.shape[-1] ** -0.5
        maps.append(jnp.einsum("bhd,bshd->bhs", last, key, preferred_element_type=jnp.float32))
        queries.append(last.reshape(last.shape[0], -1))
        out.append(seen.sites[f"attn_out.{index}"][:, -1])
    return Records(seen.logits, *(jnp.stack(rows, axis=1) for rows in (out, maps, queries)))


class Finetuned(NamedTuple):
    """What one epoch of finetuning leaves."""

    variables: Any
    losses: jax.Array  # float32 (sequences,), before each step
    gradient_norms: jax.Array  # float32 (sequences,), of what is trained
    queries: jax.Array  # (layers, all tokens, features), scaled, of every token before its step


def kv_finetune(
    model: DecoderLM,
    variables: Mapping[str, Any],
    sequences: Sequence[Sequence[int]],
    rate: float,
    *,
    pad_to: int | None = None,
) -> Finetuned:
    """One plain step of gradient descent for each sequence, in their order, on key and value projections only.

    Args:
      model, variables: the language model.
      sequences: tokens of each demonstration, at least two; the loss is the mean over all their next tokens.
      rate: of the steps.
      pad_to: length to which sequences are padded, so that few programs are compiled; None is the longest.

    Raises:
      ValueError: there is no sequence, one has fewer than two tokens, or more than pad_to.
    """
    if not sequences or min(map(len, sequences)) < 2:
        raise ValueError("finetuning needs sequences of at least two tokens")
    longest = max(map(len, sequences)) if pad_to is None else pad_to
    if max(map(len, sequences)) > longest:
        raise ValueError(f"a sequence has {max(map(len, sequences))} tokens, more than pad_to = {longest}")
    losses, norms, queries = [], [], []
    for sequence in sequences:
        row = np.zeros((1, longest), np.int32)
        row[0, : len(sequence)] = sequence
        valid = np.arange(longest)[None] < len(sequence)
        variables, loss, norm, query = _finetune_step(model, variables, jnp.asarray(row), jnp.asarray(valid), rate)
        losses.append(loss)
        norms.append(norm)
        queries.append(query[:, : len(sequence)])
    return Finetuned(variables, jnp.stack(losses), jnp.stack(norms), jnp.concatenate(queries, axis=1))


@partial(jax.jit, static_argnums=0)
def _finetune_step(model, variables, tokens, valid, rate):
    layers = range(model.config.layers)
    params = variables["params"]
    trained = {
        f"layer_{index}": {name: params[f"layer_{index}"]["mixer"][name] for name in ("key", "value")}
        for index in layers
    }

    def with_trained(trained):
        changed = {
            name: {**params[name], "mixer": {**params[name]["mixer"], **projections}}
            for name, projections in trained.items()
        }
        return {**variables, "params": {**params, **changed}}

    def loss(trained):
        names = [f"q.{index}" for index in layers]
        seen = probe(model, with_trained(trained), {"tokens": tokens, "valid": valid}, names)
        losses = optax.softmax_cross_entropy_with_integer_labels(seen.logits[:, :-1], tokens[:, 1:])
        scale = seen.sites["q.0"].shape[-1] ** -0.5
        queries = jnp.stack([seen.sites[name][0].reshape(tokens.shape[1], -1) * scale for name in names])
        return jnp.sum(losses * valid[:, 1:]) / jnp.sum(valid[:, 1:]), queries

    (value, queries), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    trained = jax.tree.map(lambda parameter, slope: parameter - rate * slope, trained, gradient)
    return with_trained(trained), value, optax.global_norm(gradient), queries


# Metrics


def rec2ftp(zero_shot: np.ndarray, finetuned: np.ndarray, in_context: np.ndarray, gold: np.ndarray) -> float:
    """Per cent of the predictions corrected by finetuning that in-context learning corrects too; NaN if there is none.

    All arguments are labels (examples,).
    """
    corrected = (zero_shot != gold) & (finetuned == gold)
    if not corrected.any():
        return float("nan")
    return 100 * float((in_context == gold)[corrected].mean())


def _unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-20)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sum(x * y, axis=-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1) + 1e-20)


def simaou(zero_shot: np.ndarray, finetuned: np.ndarray, in_context: np.ndarray) -> np.ndarray:
    """Similarity of the updates of attention outputs, by layer: cos(ICL - ZSL, FT - ZSL) of states of length 1.

    All arguments are (examples, layers, features).
    """
    zero_shot, finetuned, in_context = map(_unit, (zero_shot, finetuned, in_context))
    return _cosine(in_context - zero_shot, finetuned - zero_shot).mean(axis=0)


def simaou_random(zero_shot: np.ndarray, in_context: np.ndarray, seed: int = 0) -> np.ndarray:
    """The baseline of `simaou`: updates drawn from U(0, 1), as in the published code. About 0."""
    zero_shot, in_context = map(_unit, (zero_shot, in_context))
    return _cosine(in_context - zero_shot, np.random.default_rng(seed).uniform(size=zero_shot.shape)).mean(axis=0)


def simam(first: np.ndarray, second: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Similarity of attention maps by layer: mean cosine over heads and examples.

    Args:
      first, second: scores on the query's tokens (examples, layers, heads, longest), the last `lengths` entries of each
        example; what is before them is taken as 0.
      lengths: (examples,).
    """
    longest = first.shape[-1]
    there = np.arange(longest) >= longest - np.asarray(lengths)[:, None, None, None]
    return _cosine(np.where(there, first, 0), np.where(there, second, 0)).mean(axis=(0, 2))


class TrainingAttention(NamedTuple):
    """How alike ICL and FT attend to the demonstrations, by layer (layers,), mean over examples."""

    kendall_token: np.ndarray
    kendall_example: np.ndarray
    recall_token: np.ndarray  # share of FT's top 100 tokens among ICL's
    recall_example: np.ndarray  # share of FT's top 5 demonstrations among ICL's


def training_attention(
    in_context_map: np.ndarray,
    training_queries: np.ndarray,
    query: np.ndarray,
    example_lengths: Sequence[int],
    *,
    top_tokens: int = 100,
    top_examples: int = 5,
) -> TrainingAttention:
    """Kendall's tau-b and recall of ICL's and FT's attention to the demonstrations' tokens.

    Args:
      in_context_map: (examples, layers, tokens), scores before the softmax, summed over heads.
      training_queries: (layers, tokens, features), recorded while finetuning.
      query: (examples, layers, features), the examples' own; FT's scores are its products with the former.
      example_lengths: tokens of each demonstration; they add up to the tokens.
      top_tokens, top_examples: see `TrainingAttention`.

    Raises:
      ValueError: the lengths do not add up.
    """
    tokens = in_context_map.shape[-1]
    if sum(example_lengths) != tokens:
        raise ValueError(f"example_lengths add up to {sum(example_lengths)}, the map has {tokens} tokens")
    finetuned_map = np.einsum("ltd,nld->nlt", training_queries, query)
    starts = np.cumsum([0, *example_lengths])[:-1]
    maps = [scipy.special.softmax(scores, axis=-1) for scores in (in_context_map, finetuned_map)]
    by_example = [np.add.reduceat(scores, starts, axis=-1) for scores in maps]

    def kendall(pair: Sequence[np.ndarray]) -> np.ndarray:
        taus = [scipy.stats.kendalltau(a, b).statistic for a, b in zip(*map(_rows, pair), strict=True)]
        return np.array(taus).reshape(pair[0].shape[:2]).mean(axis=0)

    def recall(pair: Sequence[np.ndarray], count: int) -> np.ndarray:
        count = min(count, pair[0].shape[-1])
        best = [np.argsort(-rows, axis=-1, kind="stable")[:, :count] for rows in map(_rows, pair)]
        shares = [len(set(a) & set(b)) / count for a, b in zip(*best, strict=True)]
        return np.array(shares).reshape(pair[0].shape[:2]).mean(axis=0)

    return TrainingAttention(
        kendall(maps), kendall(by_example), recall(maps, top_tokens), recall(by_example, top_examples)
    )


def _rows(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(-1, maps.shape[-1])


# The dual form


class DualForm(NamedTuple):
    """A linear layer after gradient descent, as attention over its training."""

    errors: jax.Array  # (steps, out): rate (y - W x) at each step
    update: jax.Array  # (out, in): sum of errors times inputs
    output: jax.Array  # (queries, out): W_0 q + sum_i e_i (x_i . q)


def dual_form(weight: jax.Array, inputs: jax.Array, targets: jax.Array, queries: jax.Array, rate: float) -> DualForm:
    """One step of gradient descent on |W x - y|^2 / 2 for each example, in order, and linear attention over them.

    Equations 7 to 9 of the paper: (W_0 + sum e_i x_i^T) q = W_0 q + LinearAttn(E, X, q).

    Args:
      weight: W_0 (out, in).
      inputs, targets: (steps, in) and (steps, out).
      queries: (queries, in).
      rate: of the steps.
    """

    def step(weight: jax.Array, example: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, y = example
        error = rate * (y - weight @ x)
        return weight + jnp.outer(error, x), error

    _, errors = jax.lax.scan(step, weight, (inputs, targets))
    attended = jnp.einsum("so,si,qi->qo", errors, inputs, queries)
    return DualForm(errors, jnp.einsum("so,si->oi", errors, inputs), queries @ weight.T + attended)


def implicit_update(key: jax.Array, value: jax.Array, demonstrations: jax.Array) -> jax.Array:
    """dW_ICL = W_V X' (W_K X')^T (out, inner): what demonstrations add to attention without softmax (equation 10).

    Args:
      key, value: projections W_K (inner, in) and W_V (out, in).
      demonstrations: X' as rows (tokens, in).
    """
    return (demonstrations @ value.T).T @ (demonstrations @ key.T)


# Prompts

TEMPLATES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sst2": ("Sentence: {} Label:", ("Negative", "Positive")),
    "sst5": ("Sentence: {} Label:", ("terrible", "bad", "neutral", "good", "great")),
    "mr": ("Review: {} Sentiment:", ("Negative", "Positive")),
    "subj": ("Input: {} Type:", ("objective", "subjective")),
    "agnews": ("Classify the news articles into the categories of World, Sports, Business, and Technology. {} Answer:",
               ("World", "Sports", "Business", "Technology")),
    "cb": ("Premise: {} Prediction:", ("true", "false", "neither")),
}  # fmt: skip


def demonstration(task: str, text: str, label: int | None = None) -> str:
    """A text in its task's template, with its label's word if there is one.

    Raises ValueError for an unknown task or label.
    """
    if task not in TEMPLATES:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TEMPLATES)}")
    template, words = TEMPLATES[task]
    if label is None:
        return template.format(text)
    if not 0 <= label < len(words):
        raise ValueError(f"{task} has labels 0 .. {len(words) - 1}, got {label}")
    return f"{template.format(text)} {words[label]}"


def icl_prompt(
    encode: Callable[[str], list[int]],
    demonstrations: Sequence[str],
    query: str,
    *,
    begin: int = 0,
    end: int = 2,
    max_length: int = 2048,
) -> list[int]:
    """[begin] + each demonstration and `end` + query; of demonstrations that do not fit the first ones are left out.

    Raises ValueError where the query alone is too long.
    """
    asked = encode(query)
    rows = [[*encode(text), end] for text in demonstrations]
    while rows and 1 + sum(map(len, rows)) + len(asked) > max_length:
        rows.pop(0)
    if 1 + len(asked) > max_length:
        raise ValueError(f"the query has {len(asked)} tokens, the model takes {max_length - 1}")
    return [begin, *(token for row in rows for token in row), *asked]


def classify(
    model: DecoderLM, variables: Mapping[str, Any], prompt: Sequence[int], candidates: Sequence[Sequence[int]]
) -> int:
    """The candidate of the largest mean log-probability per token, after a prompt."""
    return int(np.argmax(score(model, variables, prompt, candidates)[1]))

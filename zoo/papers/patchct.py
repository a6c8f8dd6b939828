"""PatchCT: the labels of an image are aligned with its patches by conditional transport, in both directions.

"PatchCT: Aligning Patch Set and Label Set with Conditional Transport for Multi-Label Image Classification", Miaoge Li,
Dongsheng Wang, Xinyang Liu, Zequn Zeng, Ruiying Lu, Bo Chen, Mingyuan Zhou, ICCV 2023, arXiv 2307.09066. The repository
github.com/keepgoingjkg/PatchCT holds no code: **this is a reconstruction** from the framework's figure, the abstract
and the papers and code of conditional transport (Zheng and Zhou, NeurIPS 2021).

An image is a set of patches, its labels a set of texts, both in CLIP's space. In training, each patch travels to labels
by a softmax over the labels that are there (forward navigator), and each label to patches by one over patches (backward
navigator); the mean cost of both ways is added to the loss of classification. Nothing else is learned for it, and
prediction is a dot product with the class token's. The navigators say which patches a label is found in.

What the zoo decided where the paper is not known (fields of `PatchCTConfig`, or as said):
- `tau` of the navigators, 0.07; `transport_weight`, the costs' weight in the loss, 1 (a mean over images);
- `adapter_reduction`, 4, of the adaptive layer, a residual on the class token as in CLIP-Adapter;
- `ct_layers`, the blocks whose tokens are aligned, the last; earlier ones go through the final norm and projection of
  their tower, too, and where the text tower has another number of blocks, the one as far up is taken;
- `ln_post` and the projection of the image tower are applied to patches as to the class token;
- logits are CLIP's: cosines times exp(logit_scale), learned on (`learn_scale`), with an independent sigmoid each;
- `positive_focus`, `negative_focus`, `shift` of the asymmetric loss are that loss' own defaults.

B images, N patches, M labels, D width of the shared space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from zoo.backbones import clip
from zoo.backbones.clip import CLIPConfig, ImageTower, TextTower
from zoo.layers.mlp import MLP
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, Transform, layer

__all__ = [
    "MultilabelMetrics",
    "PatchCT",
    "PatchCTConfig",
    "PatchCTOutput",
    "Plans",
    "QueryDecoder",
    "asymmetric_loss",
    "conditional_transport",
    "ct_loss",
    "loss",
    "multilabel_metrics",
    "plans",
    "sinkhorn_transport",
]

PAPER = Paper(
    slug="patchct",
    title="PatchCT: Aligning Patch Set and Label Set with Conditional Transport for Multi-Label Image Classification",
    authors="Miaoge Li et al.",
    venue="ICCV",
    year=2023,
    arxiv="2307.09066",
    claim="Patches that travel to labels and labels that travel to patches, in training only, make better classifiers.",
    code="https://github.com/keepgoingjkg/PatchCT",
    code_license=None,
    fidelity="reconstruction",
    remarks="The repository holds no code; what the paper leaves open is the zoo's decision, said so in the module.",
)


@dataclasses.dataclass(frozen=True)
class PatchCTConfig(CLIPConfig):
    """A CLIP for images of several labels. See the module for which of these are the zoo's decisions.

    Attributes beside those of `CLIPConfig`:
      adapter_reduction: D over the hidden width of the adaptive layer.
      ct_layers: blocks of the image tower, from 1, whose tokens are aligned; None is the last alone.
      tau: temperature of the navigators.
      learn_tau: whether it is a parameter, `log_tau`.
      learn_scale: whether training changes `logit_scale`.
      transport_weight: of the sum of the transport costs in the loss.
      transport: the form of `conditional_transport` that is computed; both give the same costs.
      positive_focus, negative_focus, shift: of the asymmetric loss.
      resolution: height and width in pixels of example inputs.
      labels: number of labels in example inputs.
    """

    adapter_reduction: int = 4
    ct_layers: tuple[int, ...] | None = None
    tau: float = 0.07
    learn_tau: bool = False
    learn_scale: bool = True
    transport_weight: float = 1.0
    transport: Literal["streaming", "dense"] = "streaming"
    positive_focus: float = 1.0
    negative_focus: float = 4.0
    shift: float = 0.05
    resolution: tuple[int, int] = (448, 448)
    labels: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim // self.adapter_reduction < 1:
            raise ValueError(f"adapter_reduction must leave a unit of {self.embed_dim}, got {self.adapter_reduction}")
        known = set(range(1, self.vision_layers + 1))
        if self.ct_layers is not None and not (self.ct_layers and set(self.ct_layers) <= known):
            raise ValueError(f"ct_layers must be among 1 .. {self.vision_layers}, got {self.ct_layers}")
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.transport not in ("streaming", "dense"):
            raise ValueError(f"transport must be 'streaming' or 'dense', got {self.transport!r}")
        if self.transport_weight < 0:
            raise ValueError(f"transport_weight must not be negative, got {self.transport_weight}")

    @property
    def aligned(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The blocks of the image tower and of the text tower whose tokens are aligned."""
        image = (self.vision_layers,) if self.ct_layers is None else self.ct_layers
        return image, tuple(math.ceil(number * self.text_layers / self.vision_layers) for number in image)


# --------------------------------------------------------------------------------------------------------- transport


class Plans(NamedTuple):
    """The navigators, float32 (B, N, M)."""

    label_given_patch: jax.Array  # sums to 1 over labels; exactly 0 for absent ones
    patch_given_label: jax.Array  # sums to 1 over patches


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _check(patches: jax.Array, labels: jax.Array, y: jax.Array, patch_weights: jax.Array | None) -> None:
    if patches.ndim != 3 or labels.ndim != 2 or labels.shape[-1] != patches.shape[-1]:
        raise ValueError(f"patches must be (B, N, D) and labels (M, D), got {patches.shape} and {labels.shape}")
    if y.shape != (patches.shape[0], labels.shape[0]):
        raise ValueError(f"y must be {(patches.shape[0], labels.shape[0])}, got {y.shape}")
    if patch_weights is not None and patch_weights.shape != patches.shape[:2]:
        raise ValueError(f"patch_weights must be {patches.shape[:2]}, got {patch_weights.shape}")


def _masses(y: jax.Array, patch_weights: jax.Array | None, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Weights of labels (B, M) and of patches (B, N), each row of sum 1, but for images without a label 0."""
    q = y.astype(jnp.float32)
    q = q / jnp.maximum(q.sum(axis=1, keepdims=True), 1e-12)
    if patch_weights is None:
        return q, jnp.full(shape, 1 / shape[1], jnp.float32)
    p = patch_weights.astype(jnp.float32)
    return q, p / jnp.maximum(p.sum(axis=1, keepdims=True), 1e-12)


def plans(
    patches: jax.Array, labels: jax.Array, y: jax.Array, tau: float | jax.Array = 0.07,
    patch_weights: jax.Array | None = None,
) -> Plans:  # fmt: skip
    """Both navigators, as matrices: the definition of conditional transport, and its interpretation.

        label_given_patch ~ q_m exp(cos(e_n, l_m) / tau), of sum 1 over m
        patch_given_label ~ p_n exp(cos(e_n, l_m) / tau), of sum 1 over n

    Arguments as of `conditional_transport`.
    """
    _check(patches, labels, y, patch_weights)
    q, p = _masses(y, patch_weights, (patches.shape[0], patches.shape[1]))
    return _navigate(_cosines(_unit(patches), _unit(labels)), q, p, tau)


def _cosines(e: jax.Array, own: jax.Array) -> jax.Array:
    """Of unit vectors (B, N, D) and (M, D), or (B, M, D): (B, N, M)."""
    return jnp.einsum("bnd,md->bnm" if own.ndim == 2 else "bnd,bmd->bnm", e, own, precision="highest")


def _navigate(cosine: jax.Array, q: jax.Array, p: jax.Array, tau: float | jax.Array) -> Plans:
    def weighed(weights: jax.Array) -> jax.Array:
        return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)

    there = (q > 0).any(axis=1)[:, None, None]
    forward = nn.softmax(jnp.where(there, cosine / tau + weighed(q)[:, None], 0.0), axis=2) * there
    return Plans(forward, nn.softmax(cosine / tau + weighed(p)[:, :, None], axis=1))


def conditional_transport(
    patches: jax.Array,
    labels: jax.Array,
    y: jax.Array,
    tau: float | jax.Array = 0.07,
    patch_weights: jax.Array | None = None,
    *,
    most: int | None = None,
    implementation: Literal["streaming", "dense"] = "streaming",
) -> jax.Array:
    """Costs of travelling from patches to the labels that are there, and back (Zheng and Zhou 2021, eqs. 4 to 7).

    With costs c_nm = 1 - cos(e_n, l_m), weights p of patches and q of labels, and the navigators of `plans`,

        forward = sum_n p_n sum_m label_given_patch_nm c_nm,  backward = sum_m q_m sum_n patch_given_label_nm c_nm.

    Gradients go through plans and costs. Since sum_m pi_m cos(e, l_m) = e . (sum_m pi_m l_m), both ways are softmax
    attention of unit vectors on unit vectors, of which "streaming" has two calls of the shared kernel: no (N, M) matrix
    is stored. "dense" is the definition, and with few labels faster on a CPU.

    Args:
      patches: e, (B, N, D), of any length.
      labels: l, (M, D), of any length.
      y: (B, M), which labels an image has, 1 or 0 (or weights); an image without any costs 0.
      tau: temperature, a number or a scalar array.
      patch_weights: p, (B, N), not negative, of any sum; None is uniform.
      most: no image has more labels than that; only as many are looked at. None: all.
      implementation: see above.

    Returns:
      float32 (B, 2): forward and backward.

    Raises:
      ValueError: the shapes do not fit, or `most` or the implementation is none.
    """
    _check(patches, labels, y, patch_weights)
    if implementation not in ("streaming", "dense"):
        raise ValueError(f"implementation must be 'streaming' or 'dense', got {implementation!r}")
    batch, count, _ = patches.shape
    q, p = _masses(y, patch_weights, (batch, count))
    e, own = _unit(patches), _unit(labels)
    if most is not None:
        if not 1 <= most <= labels.shape[0]:
            raise ValueError(f"most must be in 1 .. {labels.shape[0]} labels, got {most}")
        q, chosen = jax.lax.top_k(q, most)
        own = own[chosen]
    some = jnp.sum(q, axis=1)  # 1, or 0 without a label
    if implementation == "dense":
        cosine = _cosines(e, own)
        there, back = _navigate(cosine, q, p, tau)
        forward = some - jnp.einsum("bn,bnm,bnm->b", p, there, cosine)
        return jnp.stack([forward, some - jnp.einsum("bm,bnm,bnm->b", q, back, cosine)], axis=1)
    own = jnp.broadcast_to(own, (batch, *own.shape[-2:]))
    travel = _mean_cosine(e, own, q, tau), _mean_cosine(own, e, p, tau)
    return jnp.stack([some - jnp.sum(p * travel[0], axis=1) * some, some - jnp.sum(q * travel[1], axis=1)], axis=1)


def _mean_cosine(start: jax.Array, end: jax.Array, weights: jax.Array, tau: float | jax.Array) -> jax.Array:
    """The mean cosine from each start to where it travels: (B, S, D), (B, E, D) and (B, E) to (B, S)."""
    heard = (weights > 0).astype(jnp.int32)
    bias = jnp.log(jnp.where(weights > 0, weights, 1.0))[:, None, None]
    arrived: Any = attention(
        start[:, :, None] / tau, end[:, :, None], end[:, :, None], bias=bias, scale=1.0,
        query_segment_ids=jnp.ones((1, start.shape[1]), jnp.int32), key_segment_ids=heard,
    )  # fmt: skip
    return jnp.sum(start * arrived[:, :, 0], axis=-1)


def ct_loss(patches: jax.Array, labels: jax.Array, y: jax.Array, tau: float | jax.Array = 0.07, **options: Any) -> Any:
    """The mean over images of both ways' costs; see `conditional_transport`."""
    return conditional_transport(patches, labels, y, tau, **options).sum(axis=1).mean()


def sinkhorn_transport(
    patches: jax.Array, labels: jax.Array, y: jax.Array, epsilon: float = 0.07, iterations: int = 20
) -> jax.Array:
    """Cost of entropic optimal transport (Cuturi 2013) between patches and the labels that are there: the baseline.

    Both sets are weighted uniformly; the logarithms of the scalings are updated in turn. The plan is differentiated
    through the iterations.

    Args:
      patches, labels, y: as of `conditional_transport`.
      epsilon: weight of the entropy.
      iterations: of both updates.

    Returns:
      float32 (B,), of images without a label 0.
    """
    _check(patches, labels, y, None)
    cosine = jnp.einsum("bnd,md->bnm", _unit(patches), _unit(labels), precision="highest")
    q, p = _masses(y, None, (patches.shape[0], patches.shape[1]))
    some = q.sum(axis=1) > 0
    q = jnp.where(some[:, None], q, 1 / q.shape[1])
    log_q = jnp.where(q > 0, jnp.log(jnp.where(q > 0, q, 1)), -1e9)
    kernel, log_p = (cosine - 1) / epsilon, jnp.log(p)

    def update(scalings: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        f = log_p - jax.nn.logsumexp(kernel + scalings[1][:, None], axis=2)
        g = log_q - jax.nn.logsumexp(kernel + f[:, :, None], axis=1)
        return (f, g), None

    (f, g), _ = jax.lax.scan(update, (jnp.zeros_like(p), log_q), None, length=iterations)
    plan = jnp.exp(kernel + f[:, :, None] + g[:, None])
    return jnp.sum(plan * (1 - cosine), axis=(1, 2)) * some


# ----------------------------------------------------------------------------------------------------------- networks


class PatchCTOutput(NamedTuple):
    """What `PatchCT` says. `costs` are float32 (B, aligned layers, 2), forward and backward, or None without y."""

    logits: jax.Array  # (B, M)
    costs: jax.Array | None


class PatchCT(nn.Module):
    """The network. Children and parameters: `image`, `text`, `adaptive_0`, `adaptive_1`, `logit_scale`, `log_tau`."""

    config: PatchCTConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.image = ImageTower(config, **options)
        self.text = TextTower(config, **options)
        narrow = config.embed_dim // config.adapter_reduction
        self.adaptive_0 = dense(narrow, ("embed", "mlp"), **options)
        self.adaptive_1 = dense(config.embed_dim, ("mlp", "embed"), **options)
        scale = partitioned(nn.initializers.constant(math.log(1 / 0.07)))
        self.logit_scale = self.param("logit_scale", scale, (), self.param_dtype)
        if config.learn_tau:
            tau = partitioned(nn.initializers.constant(math.log(config.tau)))
            self.log_tau = self.param("log_tau", tau, (), self.param_dtype)

    def __call__(self, images: jax.Array, tokens: jax.Array, y: jax.Array | None = None) -> PatchCTOutput:
        """Logits, and in training the costs of transport.

        Args:
          images: float (B, height, width, channels), standardised as CLIP's, sides multiples of the patch's.
          tokens: int (M, T), a prompt for each label.
          y: (B, M), which labels the images have.

        Raises:
          ValueError, TypeError: a shape or dtype is wrong.
        """
        features, labels = self.features(images), self.label_vectors(tokens)
        # The last layer is always there, behind those that are aligned.
        logits = self.classify(features[-1][:, 0], labels[-1])
        costs: Any = None
        if y is not None:
            tau = self.temperature()
            costs = jnp.stack(
                [
                    conditional_transport(x[:, 1:], own, y, tau, implementation=self.config.transport)
                    for x, own in zip(features[:-1], labels[:-1], strict=True)
                ],
                axis=1,
            )
        return PatchCTOutput(logits, costs)

    def features(self, images: jax.Array) -> list[jax.Array]:
        """All tokens (B, 1 + N, D), the class token's first, of each aligned layer and of the last."""
        return self.image(images, (*self.config.aligned[0], self.config.vision_layers))

    def label_vectors(self, tokens: jax.Array) -> list[jax.Array]:
        """Labels' vectors (M, D) of each aligned layer and of the last; for inference they are made once."""
        return self.text(tokens, (*self.config.aligned[1], self.config.text_layers))

    def classify(self, class_tokens: jax.Array, labels: jax.Array) -> jax.Array:
        """Logits (B, M) of class tokens (B, D) and labels' vectors (M, D)."""
        adapted = class_tokens + self.adaptive_1(nn.relu(self.adaptive_0(class_tokens)))
        cosine = _unit(adapted) @ _unit(labels).T
        scale = self.logit_scale.astype(jnp.float32)
        return jnp.exp(scale if self.config.learn_scale else jax.lax.stop_gradient(scale)) * cosine

    def temperature(self) -> Any:
        """tau of the navigators."""
        return jnp.exp(self.log_tau) if self.config.learn_tau else self.config.tau

    def label_heatmap(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Where each label is, whether the image has it or not: the backward navigator, (B, rows, columns, M)."""
        x, labels = self.features(images)[-2][:, 1:], self.label_vectors(tokens)[-2]
        y = jnp.ones((x.shape[0], labels.shape[0]))
        found = plans(x, labels, y, self.temperature()).patch_given_label
        return found.reshape(x.shape[0], images.shape[1] // self.config.patch_size, -1, labels.shape[0])


class QueryDecoder(nn.Module):
    """The baseline: a layer of cross-attention from labels to patches (Liu et al. 2021, Query2Label), on CLIP's towers.

    Children and parameters: `towers` (a `PatchCT` that is not aligned), `query`, `key_value`, `norm_{i}`, `mlp`,
    `weights`, `bias`.
    """

    config: PatchCTConfig
    heads: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, tokens: jax.Array, y: jax.Array | None = None) -> PatchCTOutput:
        """As of `PatchCT`; costs are always None."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        towers = PatchCT(self.config, **options, name="towers")
        x, labels = towers.features(images)[-1], towers.label_vectors(tokens)[-1]
        batch, width = x.shape[0], x.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads must divide embed_dim {width}, got {self.heads}")
        own = jnp.broadcast_to(labels, (batch, *labels.shape))
        query = dense(width, ("embed", "heads"), **options, name="query")(own)
        key, value = jnp.split(dense(2 * width, ("embed", "heads"), **options, name="key_value")(x), 2, axis=-1)
        split = lambda x: x.reshape(batch, -1, self.heads, width // self.heads)  # noqa: E731
        found: Any = attention(split(query), split(key), split(value))
        normalise = lambda name: norm("layer", epsilon=1e-5, **options, name=name)  # noqa: E731
        own = normalise("norm_0")(own + found.reshape(own.shape))
        own = normalise("norm_1")(own + MLP(2 * width, "relu", **options, name="mlp")(own))
        init = partitioned(nn.initializers.lecun_normal(), None, "embed")
        weights = self.param("weights", init, (labels.shape[0], width), self.param_dtype)
        bias = self.param("bias", partitioned(nn.initializers.zeros_init(), None), labels.shape[:1], self.param_dtype)
        return PatchCTOutput(jnp.einsum("bmd,md->bm", own, weights) + bias, None)


# ------------------------------------------------------------------------------------------------- losses and measures


def asymmetric_loss(
    logits: jax.Array, y: jax.Array, positive_focus: float = 1.0, negative_focus: float = 4.0, shift: float = 0.05
) -> jax.Array:
    """Asymmetric loss (Ridnik et al. 2021), a sum over all entries.

        -sum y (1 - p)^positive_focus log p + (1 - y) (1 - r)^negative_focus log r

    with p = sigmoid(logit) and r = min(1 - p + shift, 1). Factors are differentiated, too.

    Args:
      logits, y: (B, M).
      positive_focus, negative_focus, shift: see above.
    """
    if logits.shape != y.shape:
        raise ValueError(f"y must be {logits.shape}, got {y.shape}")
    logits, y = logits.astype(jnp.float32), y.astype(jnp.float32)
    present = nn.sigmoid(logits)
    absent = jnp.minimum(1 - present + shift, 1)
    terms = y * jnp.log(jnp.maximum(present, 1e-8)) + (1 - y) * jnp.log(jnp.maximum(absent, 1e-8))
    factor = y * _power(1 - present, positive_focus) + (1 - y) * _power(1 - absent, negative_focus)
    return -jnp.sum(factor * terms)


def _power(x: jax.Array, exponent: float) -> jax.Array | float:
    return x**exponent if exponent else 1.0


def loss(model: Any) -> Callable:
    """The loss of `zoo.train`: the asymmetric loss and the weighted transport costs, both means over images.

    The batch holds `images`, `tokens` of the labels' prompts and `labels`, float (B, M). Metrics: "transport", the
    costs' sum over layers and ways, and "asymmetric".
    """
    config = model.config

    def loss_function(params, model_state, batch, rngs, train):
        y = batch["labels"]
        found = model.apply({"params": params}, batch["images"], batch["tokens"], y)
        base = asymmetric_loss(found.logits, y, config.positive_focus, config.negative_focus, config.shift) / len(y)
        transport = jnp.zeros(()) if found.costs is None else found.costs.sum(axis=(1, 2)).mean()
        value = base + config.transport_weight * transport
        return value, (model_state, {"transport": transport, "asymmetric": base})

    return loss_function


class MultilabelMetrics(NamedTuple):
    """Measures of multi-label classification, each in [0, 1]."""

    mean_average_precision: float
    class_precision: float
    class_recall: float
    class_f1: float
    overall_precision: float
    overall_recall: float
    overall_f1: float


def multilabel_metrics(
    scores: np.ndarray, y: np.ndarray, top_k: int | None = None, threshold: float = 0.5
) -> MultilabelMetrics:  # fmt: skip
    """mAP; precision, recall and F1 of classes (means over classes, then F1 of the means) and overall.

    Args:
      scores: (images, M), larger where a label is more likely.
      y: (images, M), 1 or 0.
      top_k: each image gets the labels of its k highest scores; None: those above the threshold.
      threshold: see there.

    Returns:
      Classes without a label in y do not count in mAP; ones never predicted have precision 0, never there recall 0.
    """
    scores, y = np.asarray(scores, np.float64), np.asarray(y) > 0
    if scores.shape != y.shape or scores.ndim != 2:
        raise ValueError(f"scores and y must both be (images, labels), got {scores.shape} and {y.shape}")
    if top_k is None:
        chosen = scores > threshold
    else:
        if not 1 <= top_k <= scores.shape[1]:
            raise ValueError(f"top_k must be in 1 .. {scores.shape[1]}, got {top_k}")
        chosen = np.zeros_like(y)
        np.put_along_axis(chosen, np.argsort(-scores, axis=1, kind="stable")[:, :top_k], True, axis=1)
    right, found, there = (chosen & y).sum(0), chosen.sum(0), y.sum(0)
    f1 = lambda a, b: 2 * a * b / (a + b) if a + b else 0.0  # noqa: E731
    precision, recall = float(np.mean(right / np.maximum(found, 1))), float(np.mean(right / np.maximum(there, 1)))
    overall = right.sum() / max(found.sum(), 1), right.sum() / max(there.sum(), 1)
    average = [_average_precision(scores[:, m], y[:, m]) for m in range(y.shape[1]) if there[m]]
    return MultilabelMetrics(
        float(np.mean(average)) if average else math.nan, precision, recall, f1(precision, recall),
        float(overall[0]), float(overall[1]), float(f1(*overall)),
    )  # fmt: skip


def _average_precision(scores: np.ndarray, y: np.ndarray) -> float:
    """The mean over what is there of the precision down to it, in the order of scores."""
    ordered = y[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(ordered) / np.arange(1, len(y) + 1))[ordered].mean())


# ----------------------------------------------------------------------------------------------------------- registry


def example_inputs(config: PatchCTConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values and `tokens`, prompts of `labels` labels that end with the highest id."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size - 1, (config.labels, min(8, config.context_length))).astype(np.int32)
    tokens[:, -1] = config.vocab_size - 1
    shape = (batch_size, *config.resolution, config.channels)
    return {"images": rng.standard_normal(shape, dtype=np.float32), "tokens": tokens}


def example_targets(config: PatchCTConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, float32 (B, M): about three an image."""
    rng = np.random.default_rng(1)
    return {"labels": (rng.random((batch_size, config.labels)) < 3 / config.labels).astype(np.float32)}


def _scalar(array: np.ndarray) -> np.ndarray:
    if array.size != 1:
        raise ValueError(f"expected one number, got shape {array.shape}")
    return array.reshape(())


def rules(config: PatchCTConfig) -> Sequence[Rule]:
    """OpenAI's names of CLIP, and `adaptive.{0,2}` of the adaptive layer."""
    return [
        *clip.weight_rules("image", "text"),
        *layer("linear", r"adaptive\.0", "adaptive_0"),
        *layer("linear", r"adaptive\.2", "adaptive_1"),
        Rule("logit_scale", "params/logit_scale", Transform(_scalar, lambda array: array)),
    ]


def _clip(name: str, **changes: Any) -> PatchCTConfig:
    return PatchCTConfig.preset(name, **changes)


_TINY = PatchCTConfig(
    image_size=(64, 64), patch_size=16, vision_width=64, vision_layers=3, vision_heads=2, text_width=48, text_layers=3,
    text_heads=2, context_length=12, vocab_size=50, embed_dim=32, resolution=(64, 64), labels=6,
)  # fmt: skip
register(
    PAPER,
    Variant("patchct_clip_b16", _clip("b16"), 149_752_449),
    Variant("patchct_clip_b32", _clip("b32"), 151_409_025),
    Variant("patchct_clip_l14", _clip("l14"), 427_912_385),
    Variant("patchct_tiny", _TINY, 292_537),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(PatchCT)

"""Sentence Attention Blocks: a question gates the channels of a pretrained network's maps, at every scale.

"Sentence Attention Blocks for Answer Grounding", Seyedalireza Khoshsirat, Chandra Kambhamettu, ICCV 2023, arXiv
2309.11593. Code: github.com/khoshsirat/embedding-attention-blocks (no licence); training and data are published with
the follow-up, github.com/TylerRust-1/Embedding-Attention-Blocks.

To mark the pixels that are the evidence of an answer, squeeze and excitation is given a sentence in place of the
squeezed map: an MLP four times as wide, with a layer norm, and a softmax over the channels in place of the sigmoid. Its
weights multiply each of EfficientNet's five maps, which a decoder adds up from the coarsest to the finest.

What the published code does and the paper does not say, and what is therefore done here:
- images come as pixels from 0 to 255, through a norm that is each image's own in training and a fixed one afterwards;
- the weights of C channels sum to 1, so that maps shrink by about C, which the decoder's batch norms make good;
- a map is convolved and normalised before it is resized.
The published table of channels has 24 for the first map of B0 to B2, which cannot run; it is 16. The first paper's loss
is not known: cross-entropy is the default, and the follow-up's region mutual information is there.

B batch, H x W pixels of a map, C channels, E width of a sentence's vector, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones import efficientnet
from zoo.backbones.efficientnet import FACTORS, EfficientNet, EfficientNetConfig
from zoo.layers import conv_norm
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv, torch_bias_init, torch_kernel_init
from zoo.layers.dropout import Dropout
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense
from zoo.layers.resizing import resize
from zoo.registry import Paper, Variant, register
from zoo.weights.names import Rule, layer, under

__all__ = [
    "InputNorm",
    "Merge",
    "SentenceAttention",
    "SentenceAttentionConfig",
    "SentenceAttentionModel",
    "confusion",
    "fold",
    "ground",
    "grounding_loss",
    "iou",
    "loss",
    "per_image_iou",
    "rmi_loss",
]

PAPER = Paper(
    slug="sentence_attention",
    title="Sentence Attention Blocks for Answer Grounding",
    authors="Seyedalireza Khoshsirat et al.",
    venue="ICCV",
    year=2023,
    arxiv="2309.11593",
    claim="A question that gates the channels of a pretrained network's maps, at every scale, finds the evidence.",
    code="https://github.com/khoshsirat/embedding-attention-blocks",
    code_license=None,
    remarks="Training code and data are of the follow-up; the first paper's loss is not known.",
)


@dataclasses.dataclass(frozen=True)
class SentenceAttentionConfig:
    """A network that answers a question by pixels.

    Attributes:
      backbone: an EfficientNet, unless the module is given another one.
      num_classes: background first, then evidence.
      encode_dim: E.
      scales: which maps are gated, 0 the finest; None: all.
      hidden_ratio: width of the gates' hidden layer over E.
      gate: what turns logits into weights.
      gate_norm: whether there is a layer norm in the gates.
      tile_text: the sentence is put beside the coarsest map's pixels and mixed into them: a baseline.
      dropout: before the classifier.
      image_size: height and width in pixels of example inputs; any others will do.
    """

    backbone: EfficientNetConfig = EfficientNetConfig()
    num_classes: int = 2
    encode_dim: int = 384
    scales: tuple[int, ...] | None = None
    hidden_ratio: float = 4.0
    gate: Literal["softmax", "sigmoid"] = "softmax"
    gate_norm: bool = True
    tile_text: bool = False
    dropout: float = 0.5
    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        for name in ("num_classes", "encode_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if int(self.hidden_ratio * self.encode_dim) < 1:
            raise ValueError(f"hidden_ratio must leave a hidden unit, got {self.hidden_ratio} of {self.encode_dim}")
        if self.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate must be 'softmax' or 'sigmoid', got {self.gate!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be a height and a width in pixels, got {self.image_size}")


class InputNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5): each image's own in training, the running ones otherwise.

    PyTorch's InstanceNorm2d with running statistics. These move a tenth of the way to the batch's mean of the images'
    means, and of their unbiased variances. Collection "batch_stats": `mean` (zero at first) and `var` (one).
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(B, H, W, C) to the same shape; with `train`, "batch_stats" must be mutable."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if not train:
            return (x - mean.value.astype(x.dtype)) * jax.lax.rsqrt(var.value + self.epsilon).astype(x.dtype)
        count = x.shape[1] * x.shape[2]
        if count < 2:
            raise ValueError(f"training needs more than one pixel an image, got x of shape {x.shape}")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        own_mean = wide.mean(axis=(1, 2), keepdims=True)
        own_var = jnp.square(wide - own_mean).mean(axis=(1, 2), keepdims=True)
        if not self.is_initializing():
            keep = 1 - self.momentum
            mean.value = keep * mean.value + self.momentum * own_mean.mean(axis=(0, 1, 2))
            var.value = keep * var.value + self.momentum * own_var.mean(axis=(0, 1, 2)) * (count / (count - 1))
        return ((wide - own_mean) * jax.lax.rsqrt(own_var + self.epsilon)).astype(x.dtype)


class SentenceAttention(nn.Module):
    """The gate: weights of channels from a sentence, softmax(out(relu(norm(hidden(text))))).

    Fields:
      out_dim: C.
      The others are as of `SentenceAttentionConfig`.
    """

    out_dim: int
    hidden_ratio: float = 4.0
    gate: Literal["softmax", "sigmoid"] = "softmax"
    gate_norm: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        if self.gate_norm:
            self.norm = norm("layer", epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, axis="mlp")

    @nn.compact
    def weights(self, text: jax.Array) -> jax.Array:
        """(B, E) to the channels' weights (B, C)."""
        options: dict[str, Any] = {
            "kernel_init": torch_kernel_init, "dtype": self.dtype, "param_dtype": self.param_dtype
        }  # fmt: skip
        width = int(self.hidden_ratio * text.shape[-1])
        hidden = dense(width, ("embed", "mlp"), bias_init=torch_bias_init(text.shape[-1]), **options, name="hidden")(
            text
        )
        hidden = nn.relu(self.norm(hidden) if self.gate_norm else hidden)
        logits = dense(self.out_dim, ("mlp", "embed"), bias_init=torch_bias_init(width), **options, name="out")(hidden)
        return nn.softmax(logits) if self.gate == "softmax" else nn.sigmoid(logits)

    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        """A map (B, H, W, C) and sentences (B, E) to x times the sentences' weights of its channels."""
        return x * self.weights(text)[:, None, None]


class Merge(nn.Module):
    """relu(high + resize(batch_norm(conv(low)))): the coarser map convolved and normalised first, then resized."""

    width: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, high: jax.Array, low: jax.Array, train: bool = False) -> jax.Array:
        """(B, H, W, width) and (B, rows, columns, C) to (B, H, W, width)."""
        low = ConvNorm(
            self.width, use_bias=False, axes=(None, "embed"), dtype=self.dtype, param_dtype=self.param_dtype, name="low"
        )(low, train)  # fmt: skip
        return nn.relu(high + resize(low, *high.shape[1:3]))


class SentenceAttentionModel(nn.Module):
    """The network. Children: `init_norm`, `backbone`, `gate_{i}`, `merge_{i}`, `classifier`.

    Fields:
      config: see there.
      pyramid: another backbone, (images, train) to maps from the finest to the coarsest, a child of this name; it gets
        images that `init_norm` has normalised.
      channels: of its maps.
    """

    config: SentenceAttentionConfig
    pyramid: nn.Module | None = None
    channels: tuple[int, ...] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class. Raises ValueError where pyramid and channels do not come together, or for unknown scales."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if (self.pyramid is None) != (self.channels is None):
            raise ValueError("pyramid and channels are given both or neither")
        widths = config.backbone.widths if self.channels is None else self.channels
        gated = range(len(widths)) if config.scales is None else config.scales
        if not set(gated) <= set(range(len(widths))):
            raise ValueError(f"scales must be among 0 .. {len(widths) - 1}, got {config.scales}")
        self.init_norm = InputNorm()
        self.backbone = EfficientNet(config.backbone, **options) if self.pyramid is None else self.pyramid
        self.gates = {
            str(i): SentenceAttention(
                widths[i], config.hidden_ratio, config.gate, config.gate_norm, **options, name=f"gate_{i}"
            )
            for i in gated
        }
        if config.tile_text:
            self.mix = ConvNorm(widths[-1], **options)
        self.merges = [Merge(width, **options, name=f"merge_{i}") for i, width in enumerate(widths[:-1])]
        self.dropout = Dropout(config.dropout)
        self.classifier = Conv(config.num_classes, axes=("embed", None), **options)

    def __call__(self, images: jax.Array, text: jax.Array, train: bool = False) -> jax.Array:
        """Logits of pixels.

        Args:
          images: float (B, height, width, 3) of pixels from 0 to 255, of any size.
          text: (B, E), of length 1 as sentence encoders give them.
          train: the statistics of images and batch ("batch_stats" must be mutable) and dropout (rng "dropout").

        Returns:
          (B, height, width, K).

        Raises:
          ValueError, TypeError: a shape or dtype is wrong.
        """
        self._check_text(text, images.shape[:1])
        return self.decode(self.features(images, train), text, (images.shape[1], images.shape[2]), train)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The backbone's maps, the finest first. They do not depend on the question."""
        _check_images(images, self.config.backbone.channels)
        return self.backbone(self.init_norm(images, train), train)

    def decode(
        self, maps: Sequence[jax.Array], text: jax.Array, size: tuple[int, int], train: bool = False
    ) -> jax.Array:
        """Gates and decoder: maps and sentences (B, E) to logits (B, *size, K)."""
        maps = [self.gates[str(i)](x, text) if str(i) in self.gates else x for i, x in enumerate(maps)]
        x = maps[-1]
        if self.config.tile_text:
            tiled = jnp.broadcast_to(text[:, None, None], (*x.shape[:3], text.shape[-1])).astype(x.dtype)
            x = nn.relu(self.mix(jnp.concatenate([x, tiled], axis=-1), train))
        for merge, high in zip(reversed(self.merges), reversed(maps[:-1]), strict=True):
            x = merge(high, x, train)
        return resize(self.classifier(self.dropout(x, train)), *size)

    def ground_many(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Many questions about each image, whose maps are made once: (B, H, W, 3) and (B, Q, E) to (B, Q, H, W, K)."""
        if texts.ndim != 3:
            raise ValueError(f"texts must be (batch, questions, {self.config.encode_dim}), got {texts.shape}")
        batch, questions, width = texts.shape
        self._check_text(texts.reshape(-1, width), (images.shape[0] * questions,))
        maps = [jnp.repeat(x, questions, axis=0) for x in self.features(images)]
        logits = self.decode(maps, texts.reshape(-1, width), (images.shape[1], images.shape[2]))
        return logits.reshape(batch, questions, *logits.shape[1:])

    def channel_weights(self, text: jax.Array) -> list[jax.Array]:
        """What each gate, from the finest, makes of sentences (B, E): the weights (B, C) of its channels."""
        self._check_text(text, text.shape[:1])
        return [gate.weights(text) for gate in self.gates.values()]

    def _check_text(self, text: jax.Array, batch: tuple[int, ...]) -> None:
        if text.shape != (*batch, self.config.encode_dim):
            raise ValueError(f"text must be ({', '.join(map(str, batch))}, {self.config.encode_dim}), got {text.shape}")


def _check_images(images: jax.Array, channels: int) -> None:
    if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
        raise ValueError(f"images must be (batch, height, width, {channels}), got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be floating point, pixels from 0 to 255, got {images.dtype}")


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the same network, for inference: batch norms of the backbone and the decoder are folded."""
    variables = dict(nn.meta.unbox(variables))
    parts = []
    for chosen, epsilon in ((("backbone",), efficientnet.EPSILON), (None, 1e-5)):
        tree = {
            name: {key: x for key, x in variables.get(name, {}).items() if (key == "backbone") == (chosen is not None)}
            for name in ("params", "batch_stats")
        }
        parts.append(conv_norm.fold(tree, epsilon=epsilon))
    return {
        name: {**parts[0].get(name, {}), **parts[1].get(name, {})} for name in ("params", "batch_stats")
    }  # fmt: skip


def ground(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, questions: Sequence[str],
    encode: Callable[[Sequence[str]], Any],
) -> jax.Array:  # fmt: skip
    """The evidence of a question about each image, as probabilities (B, H, W) of the last class.

    Args:
      model, variables: a trained `SentenceAttentionModel`.
      images: float (B, H, W, 3) of pixels from 0 to 255.
      questions: B of them.
      encode: sentences to vectors (B, E), the encoder that the model was trained with.
    """
    if len(questions) != len(images):
        raise ValueError(f"expected a question for each of {len(images)} images, got {len(questions)}")
    logits: Any = model.apply(variables, images, jnp.asarray(encode(questions)))
    return nn.softmax(logits)[..., -1]


# ------------------------------------------------------------------------------------------------------------- losses


def grounding_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Cross-entropy, a mean over the pixels that count.

    Args:
      logits: (B, H, W, K).
      labels: int (B, H, W), K for pixels that do not count.
      weights: of the classes, (K,); the mean is weighted. None: equal.
    """
    counted, classes = _valid(logits, labels)
    share = counted if weights is None else counted * jnp.asarray(weights)[classes]
    log = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), classes[..., None], axis=-1)[..., 0]
    return -jnp.sum(share * log) / jnp.maximum(jnp.sum(share), 1e-12)


def _valid(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which pixels count, as float, and labels that are classes everywhere."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must be {logits.shape[:-1]}, got {labels.shape}")
    counted = labels < logits.shape[-1]
    return counted.astype(jnp.float32), jnp.where(counted, labels, 0)


def rmi_loss(logits: jax.Array, labels: jax.Array, alpha: float = 5e-4, side: int = 3) -> jax.Array:
    """The mean of binary cross-entropy and region mutual information (Zhao et al. 2019), of the follow-up.

    Of each class, labels y and probabilities p of side x side neighbours are vectors; with their covariances over an
    image's pixels (sums, as published), a lower bound of their mutual information is, but for a constant,

        -log det(M) / 2,  M = S_yy - S_yp (S_pp + alpha 1)^-1 S_yp^T + alpha 1

    M is computed as R R^T + alpha (B B^T + 1) with B = S_yp (S_pp + alpha 1)^-1 and R = y - B p, which is the same and
    stays positive in float32. alpha is recalled, not checked.

    Args:
      logits: (B, H, W, K), through a sigmoid each.
      labels: int (B, H, W), K for pixels that do not count, which count as no class and as probability 0.

    Returns:
      A scalar: log det(M) / (2 side^2), summed over classes, mean over images; and BCE; half of each.
    """
    counted, _ = _valid(logits, labels)
    logits = logits.astype(jnp.float32)
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    entropy = jnp.logaddexp(logits, 0) - truth * logits
    base = jnp.sum(entropy * counted[..., None]) / jnp.maximum(jnp.sum(counted) * logits.shape[-1], 1)
    probability = nn.sigmoid(logits) * counted[..., None]

    def regions(x: jax.Array) -> jax.Array:
        """(B, H, W, K) to centred vectors (B, K, side^2, pixels)."""
        rows, columns = x.shape[1] - side + 1, x.shape[2] - side + 1
        parts = [x[:, i : i + rows, j : j + columns] for i in range(side) for j in range(side)]
        vectors = jnp.stack(parts, axis=1).reshape(x.shape[0], side**2, rows * columns, -1)
        vectors = jnp.moveaxis(vectors, -1, 1)
        return vectors - vectors.mean(axis=-1, keepdims=True)

    y, p = regions(truth), regions(probability)
    identity = alpha * jnp.eye(side**2)
    product = lambda a, b: jnp.einsum("bkin,bkjn->bkij", a, b, precision="highest")  # noqa: E731
    mixed = jnp.linalg.solve(product(p, p) + identity, product(p, y)).swapaxes(-1, -2)
    rest = y - jnp.einsum("bkij,bkjn->bkin", mixed, p, precision="highest")
    inside = product(rest, rest) + alpha * mixed @ mixed.swapaxes(-1, -2) + identity
    diagonal = jnp.diagonal(jnp.linalg.cholesky(inside), axis1=-2, axis2=-1)
    information = jnp.log(diagonal + 1e-8).sum(axis=-1) / side**2
    return (base + information.sum(axis=1).mean()) / 2


def loss(
    model: nn.Module, weights: Sequence[float] | None = None, kind: Literal["ce", "rmi"] = "ce"
) -> Callable:  # fmt: skip
    """The loss of `zoo.train`. The batch holds `images`, `text` and `labels`, int (B, H, W), K where nothing counts.

    Metrics: "accuracy" of the pixels that count.

    Args:
      model: a `SentenceAttentionModel`.
      weights: of the classes in the cross-entropy.
      kind: cross-entropy or `rmi_loss`.
    """
    if kind not in ("ce", "rmi"):
        raise ValueError(f"kind must be 'ce' or 'rmi', got {kind!r}")
    class_weights = None if weights is None else np.asarray(weights, np.float32)

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(
            variables, batch["images"], batch["text"], train, rngs=rngs, mutable=list(model_state)
        )
        labels = batch["labels"]
        value = rmi_loss(logits, labels) if kind == "rmi" else grounding_loss(logits, labels, class_weights)
        counted = _valid(logits, labels)[0]
        right = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * counted) / jnp.maximum(jnp.sum(counted), 1)
        return value, (model_state, {"accuracy": right})

    return loss_function


# ------------------------------------------------------------------------------------------------------------ measures


def confusion(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many pixels of each class (rows) were taken for each class (columns), image by image: float32 (B, K, K)."""
    counted, classes = _valid(logits, labels)
    size = logits.shape[-1]
    truth = jax.nn.one_hot(classes, size) * counted[..., None]
    return jnp.einsum("bhwi,bhwj->bij", truth, jax.nn.one_hot(jnp.argmax(logits, axis=-1), size))


def _iou(matrix: jax.Array) -> jax.Array:
    inside = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix.sum(-2) - inside
    return jnp.where(union > 0, inside / jnp.maximum(union, 1), jnp.nan)


def iou(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Intersection over union of each class, (K,), from one confusion matrix over all images; NaN without a pixel.

    Args:
      logits: (B, H, W, K).
      labels: int (B, H, W), K for pixels that do not count.
    """
    return _iou(confusion(logits, labels).sum(axis=0))


def per_image_iou(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over images of each image's own `iou`, (K,), without images that a class is neither in nor found in."""
    return jnp.nanmean(_iou(confusion(logits, labels)), axis=0)


# ------------------------------------------------------------------------------------------------------------ registry


def example_inputs(config: SentenceAttentionConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of pixels from 0 to 255 and `text` of length 1."""
    rng = np.random.default_rng(0)
    shape = (batch_size, *config.image_size, config.backbone.channels)
    text = rng.standard_normal((batch_size, config.encode_dim), dtype=np.float32)
    return {
        "images": rng.uniform(0, 255, shape).astype(np.float32),
        "text": text / np.linalg.norm(text, axis=1, keepdims=True),
    }


def example_targets(config: SentenceAttentionConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, int32 (B, height, width); the first column does not count."""
    labels = np.random.default_rng(1).integers(0, config.num_classes, (batch_size, *config.image_size))
    labels[:, :, 0] = config.num_classes
    return {"labels": labels.astype(np.int32)}


GATE = [
    *layer("linear", r"attention\.0", "hidden"),
    *layer("norm", r"attention\.1", "norm"),
    *layer("linear", r"attention\.3", "out"),
]


def rules(config: SentenceAttentionConfig) -> list[Rule]:
    """The published names."""
    return [
        Rule(r"init_norm\.running_mean", "batch_stats/init_norm/mean"),
        Rule(r"init_norm\.running_var", "batch_stats/init_norm/var"),
        Rule(r"init_norm\.num_batches_tracked", None),
        *under("backbone", "backbone", efficientnet.weight_rules()),
        *under(r"sentence_attentions\.(\d)", "gate_{0}", GATE),
        *layer("pointwise2d", r"merge_blocks\.(\d)\.low_res_conv\.0", "merge_{0}/low/conv"),
        *layer("batch_norm", r"merge_blocks\.(\d)\.low_res_conv\.1", "merge_{0}/low/norm"),
        *layer("pointwise2d", "classifier", "classifier"),
    ]


_COUNTS = {"b0": 7_396_574, "b3": 14_096_170, "b4": 20_904_810, "b5": 31_620_018, "b7": 66_856_978}
register(
    PAPER,
    *(
        Variant(f"sentence_attention_{size}", SentenceAttentionConfig(EfficientNetConfig(*factors)), _COUNTS.get(size))
        for size, factors in FACTORS.items()
    ),
    example_inputs=example_inputs,
    weight_rules=rules,
    loss=loss,
    example_targets=example_targets,
)(SentenceAttentionModel)

"""EMOv2: one block for everything, an inverted residual whose expansion is a window attention.

B batch, Y x X a map, C channels, D = C * expansion hidden channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, spanning_window_attention
from zoo.layers import conv_norm
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.drop_path import DropPath
from zoo.layers.mlp import PLAIN
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense
from zoo.train.classification import accuracy, cross_entropy

EPSILON = 1e-6  # of every norm, batch norms too
Operator = Literal["convolution", "remote", "close", "spanning"]
Norm = Literal["batch", "layer"]
_PATTERNS: dict[str, tuple[Any, ...]] = {
    "remote": ("remote",), "close": ("close",), "spanning": ("close", "remote"),
}  # fmt: skip


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the same network in evaluation, with batch norms and layer scales folded into convolutions.

    See `zoo.layers.conv_norm.fold`. Of networks on top of a backbone that is all that is folded, and everywhere the
    batch norms at the head of the first two stages' blocks stay: a convolution follows them.

    Args:
      variables: {"params": ..., "batch_stats": ...} of an EMO, of a network with one under "backbone", or Mask R-CNN.

    Returns:
      Variables without logical axis names.
    """
    variables = nn.meta.unbox(dict(variables))
    if "backbone" not in variables["params"]:
        return conv_norm.fold(variables, epsilon=EPSILON)
    inner = {name: collection["backbone"] for name, collection in variables.items() if "backbone" in collection}
    folded = conv_norm.fold(inner, epsilon=EPSILON)
    rest = {name: {k: v for k, v in tree.items() if k != "backbone"} for name, tree in variables.items()}
    return {name: {**tree, "backbone": folded.get(name, {})} for name, tree in rest.items()}


@dataclasses.dataclass(frozen=True)
class EMOv2Config:
    """An EMOv2, or with `operators=("remote",)` and kernels (3, 3, 5, 5) an EMO.

    Attributes:
      depths, widths: blocks and channels of the four stages.
      expansions: hidden channels over the input's; the first block of a stage, which halves the map, has twice that.
      head_dims: width of an attention head's queries and keys. Its values are D over the number of heads wide.
      kernels: sizes of the depthwise convolutions.
      window: side of the attention's windows; 0 or less is one window for the whole map.
      operators: what expands in the last blocks of stages 3 and 4. Of several the results are added.
      norms: at the head of each stage's blocks.
      activations: of each stage's expansion.
      drop_path_rate: of the last block; the first one's is 0, and between them it rises linearly.
      layer_scale: its initial value.
      inner_skip, scale_everywhere: as of `IRMB`; True as published, and taken away to see what they do.
      stem_stride: 2; of 1, for small images, all maps are twice as large.
      num_classes: logits.
      image_size: height and width in pixels, of example inputs; any others do.
      channels: of the images.
    """

    depths: tuple[int, int, int, int] = (3, 3, 9, 3)
    widths: tuple[int, int, int, int] = (48, 72, 160, 288)
    expansions: tuple[float, float, float, float] = (2.0, 3.0, 4.0, 4.0)
    head_dims: tuple[int, int, int, int] = (16, 24, 32, 32)
    kernels: tuple[int, int, int, int] = (5, 5, 5, 5)
    window: int = 7
    operators: tuple[Operator, ...] = ("spanning",)
    norms: tuple[Norm, Norm, Norm, Norm] = ("batch", "batch", "layer", "layer")
    activations: tuple[str, str, str, str] = ("silu", "silu", "gelu", "gelu")
    drop_path_rate: float = 0.0
    layer_scale: float = 1e-6
    inner_skip: bool = True
    scale_everywhere: bool = True
    stem_stride: int = 2
    num_classes: int = 1000
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("depths", "widths", "expansions", "head_dims", "kernels", "norms", "activations"):
            if len(getattr(self, name)) != 4:
                raise ValueError(f"{name} must have one entry a stage, four, got {getattr(self, name)}")
        if min(self.depths) < 1 or min(self.widths) < 1 or self.widths[0] % 2 or min(self.expansions) <= 0:
            raise ValueError(
                "depths, widths and expansions must be positive, and the first width even, got "
                f"{self.depths}, {self.widths}, {self.expansions}"
            )
        for name, known in (("operators", get_args(Operator)), ("norms", get_args(Norm)), ("activations", PLAIN)):
            wrong = [value for value in getattr(self, name) if value not in known]
            if wrong or not getattr(self, name):
                raise ValueError(f"{name} must be of {tuple(known)}, got {getattr(self, name)}")
        if any(size % 2 == 0 for size in self.kernels):
            raise ValueError(f"kernels must be odd, got {self.kernels}")
        if self.stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {self.stem_stride}")
        for stage in (2, 3):
            heads, rest = divmod(self.widths[stage], self.head_dims[stage])
            if self.operators != ("convolution",) and (
                rest or int(self.widths[stage] * self.expansions[stage]) % heads
            ):
                raise ValueError(
                    f"{self.widths[stage]} channels of stage {stage + 1} are no whole heads of {self.head_dims[stage]} "
                    f"whose values share {int(self.widths[stage] * self.expansions[stage])} channels"
                )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")
        if self.num_classes < 1 or self.channels < 1 or min(self.image_size) < 1:
            raise ValueError(
                f"num_classes, channels and image_size must be positive, got {self.num_classes}, {self.channels}, "
                f"{self.image_size}"
            )


class SpanningAttention(nn.Module):
    """Attention in windows, whose values are the expanded features: GELU(W_v x), D wide, for queries as wide as x.

    The map is filled up with zeros, on the right and below, to whole windows before the projections, and nothing is
    masked: what fills it has the biases for its keys and values. Children: `qk`, `value`.

    Fields:
      hidden: D.
      head_dim: of queries and keys; a head's values are D over the number of heads wide.
      window: its side; 0 or less is the whole map.
      operator: "close", "remote", or "spanning": the sum of both, of the same queries, keys and values.
      activation: of the values.
      use_bias: of the projections.
    """

    hidden: int
    head_dim: int
    window: int
    operator: Operator = "spanning"
    activation: str = "gelu"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, Y, X, C) to (B, Y, X, hidden)."""
        *size, channels = x.shape
        heads = channels // self.head_dim
        project = partial(Conv, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype)
        keys = project(2 * channels, name="qk", axes=("embed", "heads"))
        values = project(self.hidden, name="value", axes=("embed", "heads"))
        activation = PLAIN[self.activation]
        query, key = (part.reshape(*size, heads, self.head_dim) for part in jnp.split(keys(x), 2, axis=-1))
        value = activation(values(x)).reshape(*size, heads, -1)
        patterns = _PATTERNS[self.operator]
        if self.window <= 0:
            flat = (part.reshape(size[0], -1, *part.shape[3:]) for part in (query, key, value))
            out: Any = len(patterns) * attention(*flat)
            return out.reshape(*size, self.hidden)
        padding = None
        if any(length % self.window for length in size[1:]):
            nothing = jnp.zeros((1, channels), x.dtype)
            pad_key = jnp.split(keys(nothing)[0], 2)[1].reshape(heads, -1)
            padding = pad_key, activation(values(nothing)[0]).reshape(heads, -1)
        out = spanning_window_attention(query, key, value, window=self.window, patterns=patterns, padding=padding)
        return out.reshape(*size, self.hidden)


class IRMB(nn.Module):
    """The improved inverted residual mobile block: norm, expansion, depthwise convolution, projection; one residual.

        h = norm(x);  h = expand(h);  l = act(norm(depthwise(h)));  h = h + l if skip else l;
        out = x + scale * project(h) if skip else scale * project(h)

    Children: `norm`; `expand`, or `attention_0`, `attention_1`, ...; `local`; `project`.

    Fields:
      features: channels of the result.
      expansion: D over the channels of x.
      kernel_size, stride: of the depthwise convolution.
      operators: `("convolution",)`, a 1 x 1 one, or attentions, whose results are added.
      head_dim, window: of the attention.
      norm, activation: at the head, and of the expansion. The depthwise convolution has a batch norm and SiLU always.
      skip: whether there is a residual.
      drop_path_rate: of the residual.
      layer_scale: its initial value.
      inner_skip: whether a block with a residual has one around the depthwise convolution.
      scale_everywhere: whether a block without a residual has a layer scale.
      frozen_norms: batch norms use the running statistics in training, too, and leave them.
    """

    features: int
    expansion: float
    kernel_size: int = 5
    stride: int = 1
    operators: tuple[Operator, ...] = ("spanning",)
    head_dim: int = 32
    window: int = 7
    norm: Norm = "layer"
    activation: str = "gelu"
    skip: bool = True
    drop_path_rate: float = 0.0
    layer_scale: float = 1e-6
    inner_skip: bool = True
    scale_everywhere: bool = True
    frozen_norms: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(B, Y, X, C) to (B, ceil(Y / stride), ceil(X / stride), features)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = int(x.shape[-1] * self.expansion)
        statistics = train and not self.frozen_norms
        if self.norm == "batch":
            h = BatchNorm(EPSILON, **options, name="norm")(x, statistics)
        else:
            h = norm("layer", epsilon=EPSILON, **options, name="norm")(x)
        if self.operators == ("convolution",):
            expand = ConvNorm(hidden, norm=False, axes=("embed", "mlp"), **options, name="expand")
            h = PLAIN[self.activation](expand(h, statistics))
        else:
            parts = [
                SpanningAttention(
                    hidden, self.head_dim, self.window, operator, self.activation, **options, name=f"attention_{index}"
                )(h)
                for index, operator in enumerate(self.operators)
            ]
            h = sum(parts[1:], parts[0])
        local = ConvNorm(
            hidden, self.kernel_size, self.stride, groups=hidden, use_bias=False, epsilon=EPSILON, axes=(None, "mlp"),
            **options, name="local",
        )(h, statistics)  # fmt: skip
        h = h + nn.silu(local) if self.skip and self.inner_skip else nn.silu(local)
        scale = self.layer_scale if self.skip or self.scale_everywhere else None
        h = ConvNorm(
            self.features, use_bias=False, norm=False, layer_scale=scale, axes=("mlp", "embed"), **options,
            name="project",
        )(h, statistics)  # fmt: skip
        if not self.skip:
            return h
        return x + DropPath(self.drop_path_rate)(h, deterministic=not train)


class EMOv2Features(nn.Module):
    """Stem and four stages. Children: `stem_0`, `stem_1`, `stem_2`, `stage_{s}_block_{i}`, s from 1.

    Fields beside the config:
      frozen_norms: as of `IRMB`.
      frozen_stages: no gradient reaches the stem, nor so many stages; None: it reaches all.
    """

    config: EMOv2Config
    frozen_norms: bool = False
    frozen_stages: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """float (B, height, width, channels) to maps [c1, c2, c3, c4] at strides 4, 8, 16 and 32.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        config = self.config
        if images.ndim != 4 or images.shape[-1] != config.channels or 0 in images.shape:
            raise ValueError(f"images must be (batch, height, width, {config.channels}), got {images.shape}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images must be floating point and normalised, got {images.dtype}")
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = config.widths[0] // 2
        convolution: Any = partial(ConvNorm, width, epsilon=EPSILON, **options)
        statistics = train and not self.frozen_norms
        x = nn.silu(convolution(3, config.stem_stride, name="stem_0")(images, statistics))
        x = nn.silu(convolution(3, groups=width, use_bias=False, name="stem_1")(x, statistics))
        x = convolution(use_bias=False, norm=False, name="stem_2")(x, statistics)
        maps: list[jax.Array] = []
        count, last = 0, max(sum(config.depths) - 1, 1)
        for stage, depth in enumerate(config.depths):
            for index in range(depth):
                first = index == 0
                x = IRMB(
                    config.widths[stage],
                    config.expansions[stage] * (2 if first else 1),
                    config.kernels[stage],
                    stride=2 if first else 1,
                    operators=("convolution",) if first or stage < 2 else config.operators,
                    head_dim=config.head_dims[stage],
                    window=config.window,
                    norm=config.norms[stage],
                    activation=config.activations[stage],
                    skip=not first,
                    drop_path_rate=config.drop_path_rate * count / last,
                    layer_scale=config.layer_scale,
                    inner_skip=config.inner_skip,
                    scale_everywhere=config.scale_everywhere,
                    frozen_norms=self.frozen_norms,
                    **options,
                    name=f"stage_{stage + 1}_block_{index}",
                )(x, train)
                count += 1
            if stage + 1 == self.frozen_stages:
                x = jax.lax.stop_gradient(x)
            maps.append(x)
        return maps


class EMOv2(nn.Module):
    """The classifier. `apply(fold(variables), images)` is the same function with fewer operations.

    Children: those of `EMOv2Features`, `norm`, `head`.
    """

    config: EMOv2Config
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """See the class."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.stages = EMOv2Features(self.config, **options)
        nn.share_scope(self, self.stages)
        self.norm = norm("layer", epsilon=EPSILON, **options)
        init = nn.initializers.truncated_normal(0.02)
        self.head = dense(self.config.num_classes, ("embed", None), kernel_init=init, **options)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
          images: float (B, height, width, channels), of any size, standardised as the weights expect.
          train: use the batch's statistics ("batch_stats" must be mutable) and drop paths (rng "dropout").

        Returns:
          (B, num_classes), which is also what a teacher teaches.

        Raises:
          ValueError, TypeError: the images' shape or dtype is wrong.
        """
        return self.head(self.norm(self.features(images, train)[-1]).mean(axis=(1, 2)))

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """Maps [c1, c2, c3, c4] at strides 4, 8, 16 and 32, without a norm at the end."""
        return self.stages(images, train)


def example_inputs(config: EMOv2Config, batch_size: int) -> dict[str, np.ndarray]:
    """`images` of normal values."""
    rng = np.random.default_rng(0)
    return {"images": rng.standard_normal((batch_size, *config.image_size, config.channels), dtype=np.float32)}


def example_targets(config: EMOv2Config, batch_size: int) -> dict[str, np.ndarray]:
    """`labels`, (B,) int32."""
    return {"labels": np.random.default_rng(1).integers(0, config.num_classes, batch_size).astype(np.int32)}


def kd_loss(student: jax.Array, teacher: jax.Array, tau: float = 1.0) -> jax.Array:
    """tau^2 times the mean over the batch of KL(softmax(teacher / tau) || softmax(student / tau)).

    Args:
      student, teacher: logits (B, C). The published teacher is TResNet-L-v2, see `teacher_images`.
      tau: temperature; published 1.
    """
    log_student, log_teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / tau) for x in (student, teacher))
    return tau**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student)) / student.shape[0]


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def teacher_images(
    images: jax.Array,
    size: int = 224,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> jax.Array:
    """The student's images as the published teacher sees them: in [0, 1] again, and size x size pixels, bicubic.

    Args:
      images: (B, height, width, 3), standardised by `mean` and `std`.
      size: height and width of the result.
      mean, std: of the student's standardisation.
    """
    images = images * jnp.asarray(std, images.dtype) + jnp.asarray(mean, images.dtype)
    if images.shape[1:3] == (size, size):
        return images
    return jax.image.resize(images, (images.shape[0], size, size, images.shape[3]), "cubic", antialias=False)


def loss(model: EMOv2, smoothing: float = 0.1, distillation: float = 5.0) -> Callable:
    """The loss of `zoo.train`: cross-entropy with smoothed labels, plus `distillation` times `kd_loss`.

    The batch holds `images`, `labels`, (B,) integers or (B, num_classes) probabilities (smoothed already), and, where
    there is a teacher, `teacher`: its logits (B, num_classes). Metrics: "accuracy".
    """

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, batch["images"], train=train, rngs=rngs, mutable=list(model_state))
        labels = batch["labels"]
        value = cross_entropy(logits, labels)
        if labels.ndim == 1:
            value = (1 - smoothing) * value - smoothing * jax.nn.log_softmax(logits.astype(jnp.float32)).mean()
        if "teacher" in batch:
            value += distillation * kd_loss(logits, batch["teacher"])
        return value, (model_state, {"accuracy": accuracy(logits, labels)})

    return loss_function

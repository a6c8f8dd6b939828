"""DeepSNP's network: a dense trunk along the probes, a gated recurrence over what is left, two heads for each step.

B batch, W probes, T steps of the trunk's output, C channels, U units of a recurrence. Rows (B-allele frequency, log R
ratio) share all weights, and meet in the heads only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.batch_norm import BatchNorm
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense, partitioned

Stem = Literal["dilated", "strided"]
AttentionKind = Literal["none", "final", "full"]
_HE: Callable = nn.initializers.he_uniform()
_GLOROT: Callable = nn.initializers.glorot_uniform()
L2 = 1e-4


@dataclasses.dataclass(frozen=True)
class DeepSNPConfig:
    """A DeepSNP.

    Attributes:
      window: W, probes of the published recipe's windows; any others that the trunk does not shrink to nothing will do.
      margin: a quarter of the window; below 5000 (and up to 500) the first two (three) pools have a stride of one.
      stem: "dilated" (version 1, which has a ReLU behind the trunk too) or "strided" (version 2, which has none).
      attention: of the outputs ("final"), of inputs of the recurrence too ("full"), or "none", the mean over time.
      first_filter, first_dilation: places of the stem's kernel, and their distance, or its stride.
      hidden_filter, hidden_dilation: of the first two transitions: places, and the base of their dilations 1, 2, ...
      growth, layers_per_block, blocks, filters: of the dense trunk; filters are those of the stem.
      gru_units: U of each direction.
      dropout: behind each convolution of the trunk.
    """

    window: int = 40_000
    margin: int = 10_000
    stem: Stem = "dilated"
    attention: AttentionKind = "final"
    first_filter: int = 10
    first_dilation: int = 5
    hidden_filter: int = 5
    hidden_dilation: int = 2
    growth: int = 12
    layers_per_block: int = 4
    blocks: int = 6
    filters: int = 16
    gru_units: int = 128
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.stem not in get_args(Stem) or self.attention not in get_args(AttentionKind):
            raise ValueError(
                f"stem must be one of {get_args(Stem)} and attention one of {get_args(AttentionKind)}, got "
                f"{self.stem!r} and {self.attention!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        steps(self, self.window)

    def pool_stride(self, block: int) -> int:
        """Of the pool behind a block."""
        kept = 3 if self.margin <= 500 else 2 if self.margin < 5000 else 0
        return 1 if block < kept else 2


class Slide(NamedTuple):
    """An operation that slides over the probes."""

    places: int
    stride: int
    dilation: int
    same: bool

    def padding(self, length: int) -> tuple[int, int]:
        """Zeros on the left and on the right."""
        if not self.same:
            return 0, 0
        out = -(-length // self.stride)
        total = max((out - 1) * self.stride + self.dilation * (self.places - 1) + 1 - length, 0)
        return total // 2, total - total // 2

    def out(self, length: int) -> int:
        """Steps that come out."""
        return (length + sum(self.padding(length)) - self.dilation * (self.places - 1) - 1) // self.stride + 1


def stem_slide(config: DeepSNPConfig) -> Slide:
    """The stem's convolution."""
    if config.stem == "dilated":
        return Slide(config.first_filter, 1, config.first_dilation, False)
    return Slide(config.first_filter, config.first_dilation, 1, False)


def transition_slides(config: DeepSNPConfig, block: int) -> tuple[Slide, Slide]:
    """Convolution and pool behind a block."""
    if block < 2:
        convolution = Slide(config.hidden_filter, 1, config.hidden_dilation**block, True)
    else:
        convolution = Slide(2, 2, 1, True)
    return convolution, Slide(2, config.pool_stride(block), 1, False)


def slides(config: DeepSNPConfig) -> list[Slide]:
    """All of the trunk, in their order."""
    found = [stem_slide(config)]
    for block in range(config.blocks):
        found += [Slide(3, 1, 1, True)] * config.layers_per_block
        if block + 1 < config.blocks:
            found += transition_slides(config, block)
    return found


def steps(config: DeepSNPConfig, window: int) -> int:
    """T of a window. Raises ValueError where nothing is left."""
    length = window
    for slide in slides(config):
        length = slide.out(length) if length > 0 else 0
    if length < 1:
        raise ValueError(f"a window of {window} probes is too short: the trunk leaves no step of it")
    return length


def receptive_field(config: DeepSNPConfig, window: int) -> np.ndarray:
    """First and last probe (inclusive) that each step of a window sees: int (T, 2)."""
    lengths = [window]
    for slide in slides(config):
        lengths.append(slide.out(lengths[-1]))
    first = last = np.arange(lengths[-1])
    for slide, length in zip(reversed(slides(config)), reversed(lengths[:-1]), strict=True):
        left = slide.padding(length)[0]
        first = np.maximum(first * slide.stride - left, 0)
        last = np.minimum(last * slide.stride - left + slide.dilation * (slide.places - 1), length - 1)
    return np.stack([first, last], axis=1)


def slide_product(x: jax.Array, kernel: jax.Array, slide: Slide) -> jax.Array:
    """Cross-correlation along the probes, as one matrix product for each of the kernel's places.

    Products and not a convolution, for XLA's is slow on a CPU where there are few channels, dilations or strides.

    Args:
      x: (N, W, C).
      kernel: (places, C, D).
      slide: how it moves.

    Returns:
      (N, steps, D).
    """
    out = slide.out(x.shape[1])
    x = jnp.pad(x, ((0, 0), slide.padding(x.shape[1]), (0, 0)))
    span = slide.stride * (out - 1) + 1
    parts = [x[:, i * slide.dilation : i * slide.dilation + span : slide.stride] for i in range(slide.places)]
    if x.shape[-1] == 1:  # the stem: one product of all places
        return jnp.concatenate(parts, axis=-1) @ kernel[:, 0]
    total = parts[0] @ kernel[0]
    for part, weights in zip(parts[1:], kernel[1:], strict=True):
        total += part @ weights
    return total


class Convolution(nn.Module):
    """`slide_product` with its kernel, and a bias if asked."""

    features: int
    slide: Slide
    use_bias: bool = False
    kernel_init: Callable = _HE
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, W, C) to (N, steps, features)."""
        init = partitioned(self.kernel_init, None, None, "embed")
        kernel = self.param("kernel", init, (self.slide.places, x.shape[-1], self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros_init(), "embed")
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = slide_product(x, kernel, self.slide)
        return y if bias is None else y + bias


class Trunk(nn.Module):
    """The dense network over the probes."""

    config: DeepSNPConfig
    dilations: tuple[int, ...] | None = None  # of a block's convolutions; None: all one
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(N, W, 1) to (N, T, C)."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = Dropout(config.dropout)
        norm = {"epsilon": 1e-3, "momentum": 0.01, **options}
        x = Convolution(
            config.filters, stem_slide(config), use_bias=True,
            kernel_init=_HE if config.stem == "dilated" else _GLOROT, **options, name="stem",
        )(x)  # fmt: skip
        x = BatchNorm(**norm, name="stem_norm")(x, train)
        for block in range(config.blocks):
            for index in range(config.layers_per_block):
                dilation = self.dilations[index] if self.dilations else 1
                convolution = Convolution(
                    config.growth, Slide(3, 1, dilation, True), **options, name=f"block_{block}_conv_{index}"
                )
                x = jnp.concatenate([x, drop(convolution(nn.relu(x)), train)], axis=-1)
            if block + 1 == config.blocks:
                break
            slide, pool = transition_slides(config, block)
            x = drop(Convolution(x.shape[-1], slide, **options, name=f"transition_{block}_conv")(x), train)
            x = nn.avg_pool(x, (pool.places,), (pool.stride,))
            x = BatchNorm(**norm, name=f"transition_{block}_norm")(x, train)
        return nn.relu(x) if config.stem == "dilated" else x


class Recurrence(nn.Module):
    """Weights of one GRU: kernels (C, 3 U) and (U, 3 U), bias (3 U,); gates update, reset, candidate."""

    units: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The arrays."""
        width = 3 * self.units
        orthogonal, zeros = nn.initializers.orthogonal(), nn.initializers.zeros_init()
        return (
            self.param("input", partitioned(_GLOROT, "embed", "heads"), (channels, width), self.param_dtype),
            self.param("recurrent", partitioned(orthogonal, None, "heads"), (self.units, width), self.param_dtype),
            self.param("bias", partitioned(zeros, "heads"), (width,), self.param_dtype),
        )


class GatedBiGRU(nn.Module):
    """BiGRU(x) with linear candidates times BiGRU(x) with sigmoid ones, as in Keras 2.

    z, r = clip(0.2 u + 0.5, 0, 1) of their inputs u; h~ = act(W x + U (r h) + b), the reset before the product; h = z h
    + (1 - z) h~. All four recurrences (two networks, two directions) run in one scan.
    """

    units: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) to (N, T, 2 U), the forward half first."""
        names = [f"{network}_{direction}" for network in ("value", "gate") for direction in ("forward", "backward")]
        weights = [Recurrence(self.units, self.param_dtype, name=name)(x.shape[-1]) for name in names]
        inputs, recurrent, bias = (jnp.stack(arrays) for arrays in zip(*weights, strict=True))
        x, inputs, recurrent, bias = nn.dtypes.promote_dtype(x, inputs, recurrent, bias, dtype=self.dtype)
        projected = jnp.einsum("ntc,gcu->tgnu", x, inputs) + bias[:, None]
        backward = jnp.array([False, True, False, True])[:, None, None]
        projected = jnp.where(backward, projected[::-1], projected)
        units = self.units

        def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
            gates = u[..., : 2 * units] + jnp.einsum("gnu,guv->gnv", h, recurrent[..., : 2 * units])
            z, r = jnp.split(jnp.clip(0.2 * gates + 0.5, 0, 1), 2, axis=-1)
            candidate = u[..., 2 * units :] + jnp.einsum("gnu,guv->gnv", r * h, recurrent[..., 2 * units :])
            candidate = jnp.concatenate([candidate[:2], nn.sigmoid(candidate[2:])])
            h = z * h + (1 - z) * candidate
            return h, h

        _, states = jax.lax.scan(step, jnp.zeros((4, x.shape[0], units), projected.dtype), projected)
        states = jnp.where(backward, states[::-1], states)  # (T, 4, N, U)
        gated = states[:, :2] * states[:, 2:]
        return gated.transpose(2, 0, 1, 3).reshape(x.shape[0], x.shape[1], 2 * units)


def attention_pool(p: jax.Array, a: jax.Array) -> jax.Array:
    """sum_t p_t a_t / sum_t a_t, class by class, with a clipped to [1e-7, 1]: (B, T, K) twice to (B, K).

    The classes' outputs need not sum to one.
    """
    if p.shape != a.shape or p.ndim != 3:
        raise ValueError(f"expected two arrays (batch, time, classes), got {p.shape} and {a.shape}")
    a = jnp.clip(a, 1e-7, 1)
    return (p * a).sum(1) / a.sum(1)


def check_windows(window: jax.Array) -> None:
    """Raises ValueError or TypeError unless windows are float (B, 2, W, 1)."""
    if window.ndim != 4 or window.shape[1] != 2 or window.shape[3] != 1:
        raise ValueError(
            f"windows must be (batch, 2 rows: BAF and log R ratio, probes, 1), got shape {window.shape}"
        )  # fmt: skip
    if not jnp.issubdtype(window.dtype, jnp.floating):
        raise TypeError(f"windows must be floating point, got {window.dtype}")


def rows_of(window: jax.Array) -> jax.Array:
    """(B, 2, W, 1) to (2 B, W, 1)."""
    return window.reshape(-1, *window.shape[2:])


class DeepSNP(nn.Module):
    """Whether a window of probes has a breakpoint, and where."""

    config: DeepSNPConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, window: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Reads windows.

        Args:
          window: float (B, 2, W, 1), row 0 the B-allele frequency, row 1 the log R ratio, as measured.
          train: use dropout (rng collection "dropout") and the batch's statistics (mutable "batch_stats").

        Returns:
          "probs" (B, 2), no breakpoint and breakpoint, which need not sum to one; "localization" (B, T, 2), the classes
          of each step, which do; "attention" (B, T, 2), the weights of each step and class (ones without attention).

        Raises:
          ValueError, TypeError: the windows' shape or dtype is wrong, or they are too short.
        """
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_windows(window)
        steps(config, window.shape[2])
        x = Trunk(config, **options, name="trunk")(rows_of(window), train)
        if config.attention == "full":
            gate = dense(1, ("embed", None), kernel_init=_GLOROT, **options, name="input_attention")(x)
            x = x * nn.sigmoid(gate)
        x = GatedBiGRU(config.gru_units, **options, name="gru")(x)
        x = x.reshape(-1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(window.shape[0], x.shape[1], -1)
        p = nn.softmax(dense(2, ("embed", None), kernel_init=_GLOROT, **options, name="localization")(x))
        if config.attention == "none":
            return {"probs": p.mean(1), "localization": p, "attention": jnp.ones_like(p)}
        a = nn.sigmoid(dense(2, ("embed", None), kernel_init=_GLOROT, **options, name="attention")(x))
        return {"probs": attention_pool(p, a), "localization": p, "attention": a}


def loss(model: Any) -> Callable:
    """The loss of `zoo.train`: cross-entropy of the outputs scaled to sum to one, and 1e-4 of squared weights.

    The batch holds "window" (B, 2, W, 1) and "label" int (B,). Squares are of all kernels of convolutions, the gains
    and shifts of norms and, in version 1, the stem's bias. Metrics: "accuracy".
    """
    dilated = getattr(model.config, "stem", None) == "dilated"

    def penalised(path: tuple[Any, ...]) -> bool:
        names = [key.key for key in path]
        if "trunk" not in names:
            return False
        return names[-1] != "bias" or "norm" in names[-2] or (dilated and names[-2] == "stem")

    def loss_function(params, model_state, batch, rngs, train):
        out, model_state = model.apply(
            {"params": params, **model_state}, batch["window"], train=train, rngs=rngs, mutable=list(model_state)
        )
        probs = out["probs"]
        scaled = jnp.clip(probs / probs.sum(-1, keepdims=True), 1e-7, 1 - 1e-7)
        cross_entropy = -jnp.log(jnp.take_along_axis(scaled, batch["label"][:, None], axis=1)).mean()
        leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
        squares = sum(jnp.sum(jnp.square(leaf)) for path, leaf in leaves if penalised(path))
        accuracy = jnp.mean(probs.argmax(-1) == batch["label"])
        return cross_entropy + L2 * squares, (model_state, {"accuracy": accuracy})

    return loss_function

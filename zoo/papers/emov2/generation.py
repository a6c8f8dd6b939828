"""DEMO: a diffusion Transformer (DiT) whose blocks are inverted residuals with spanning attention.

Its code was not published: it is put together so that the parameter counts of the published logs come out, for S, L and
XL to the last digit. The published B has 64 parameters a block and channel more, unexplained; ours has not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.conv_norm import ConvNorm
from zoo.layers.convolution import Conv
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.papers.emov2.model import EPSILON, SpanningAttention

_FREQUENCIES = 256  # of the time embedding, sines and cosines
_ZEROS = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """A DEMO.

    Attributes:
      hidden_size, depth, num_heads: D, blocks, and heads of the attention.
      patch: side of a patch of the latent image.
      latent_size: side of the latent image; 32 for 256 pixels.
      latent_channels: of the latent image; the output has twice as many, noise and variance.
      window: side of the attention's windows, on the map of patches. Not published: 8 is assumed.
      num_classes: a further class stands for none.
      label_dropout: share of labels that training replaces by none.
    """

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch: int = 2
    latent_size: int = 32
    latent_channels: int = 4
    window: int = 8
    num_classes: int = 1000
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 and of {self.num_heads} heads, got {self.hidden_size}"
            )
        if self.latent_size % self.patch:
            raise ValueError(f"latent_size must be a multiple of the patch, {self.patch}, got {self.latent_size}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout}")


def time_features(t: jax.Array, size: int = _FREQUENCIES, longest: float = 10_000.0) -> jax.Array:
    """Cosines, then sines, of times (B,), at frequencies from 1 down to nearly 1 / longest: (B, size)."""
    half = size // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(longest) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(size: int, width: int) -> np.ndarray:
    """Fixed positions of a square map, float32 (size, size, width): the column's sines and cosines, then the row's."""

    def one(position: np.ndarray) -> np.ndarray:
        angles = position[..., None] / 10_000 ** (np.arange(width // 4) / (width // 4))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    return np.concatenate([one(x), one(y)], axis=-1).astype(np.float32)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale[:, None, None]) + shift[:, None, None]


class DemoBlock(nn.Module):
    """x + gate * irmb(norm(x) (1 + scale) + shift), with shift, scale and gate from the condition.

    Children: `norm`, `attention`, `local`, `project`, `condition`.
    """

    config: DemoConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        """(B, Y, X, D) and (B, D), activated already, to (B, Y, X, D)."""
        config, width = self.config, x.shape[-1]
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        numbers = dense(3 * width, ("embed", None), kernel_init=_ZEROS, **options, name="condition")(condition)
        shift, scale, gate = jnp.split(numbers, 3, axis=-1)
        h = _modulate(norm("layer", epsilon=EPSILON, **options, name="norm")(x), shift, scale)
        h = SpanningAttention(4 * width, width // config.num_heads, config.window, **options, name="attention")(h)
        local = ConvNorm(
            4 * width, 5, groups=4 * width, use_bias=False, epsilon=EPSILON, axes=(None, "mlp"), **options, name="local"
        )
        h = h + nn.silu(local(h, train))
        h = ConvNorm(width, use_bias=False, norm=False, axes=("mlp", "embed"), **options, name="project")(h, train)
        return x + gate[:, None, None] * h


class Demo(nn.Module):
    """Predicts the noise of a latent image, and the variance of the step back, from the image, the time and a class.

    Children: `patches`, `time_0`, `time_1`, `classes`, `block_{i}`, `final_norm`, `final_condition`, `final`.
    """

    config: DemoConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array, t: jax.Array, y: jax.Array, train: bool = False) -> jax.Array:
        """Noise and variance.

        Args:
          latent: float (B, latent_size, latent_size, latent_channels).
          t: times (B,), 0 .. 999.
          y: int classes (B,); num_classes is none.
          train: use the batch's statistics, and drop labels (rng "dropout").

        Returns:
          (B, latent_size, latent_size, 2 latent_channels), noise first.

        Raises:
          ValueError: a wrong shape.
        """
        config = self.config
        size, width, patch = config.latent_size, config.hidden_size, config.patch
        if latent.ndim != 4 or latent.shape[1:] != (size, size, config.latent_channels):
            raise ValueError(f"latent must be (batch, {size}, {size}, {config.latent_channels}), got {latent.shape}")
        if t.shape != latent.shape[:1] or y.shape != latent.shape[:1]:
            raise ValueError(f"t and y must be ({latent.shape[0]},), got {t.shape} and {y.shape}")
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Conv(width, patch, patch, padding=0, **options, name="patches")(latent)
        x = x + position_table(size // patch, width).astype(x.dtype)

        normal = nn.initializers.normal(0.02)
        h = nn.silu(dense(width, (None, "embed"), kernel_init=normal, **options, name="time_0")(time_features(t)))
        h = dense(width, ("embed", None), kernel_init=normal, **options, name="time_1")(h)
        if train and config.label_dropout:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), config.label_dropout, y.shape)
            y = jnp.where(dropped, config.num_classes, y)
        table = nn.Embed(
            config.num_classes + 1,
            width,
            embedding_init=partitioned(normal, "vocab", "embed"),
            **options,
            name="classes",
        )
        condition = nn.silu(h + table(y))
        for index in range(config.depth):
            x = DemoBlock(config, **options, name=f"block_{index}")(x, condition, train)
        numbers = dense(2 * width, ("embed", None), kernel_init=_ZEROS, **options, name="final_condition")(condition)
        x = _modulate(norm("layer", epsilon=EPSILON, **options, name="final_norm")(x), *jnp.split(numbers, 2, axis=-1))
        outputs = 2 * config.latent_channels
        x = dense(patch * patch * outputs, ("embed", None), kernel_init=_ZEROS, **options, name="final")(x)
        x = x.reshape(x.shape[0], size // patch, size // patch, patch, patch, outputs).swapaxes(2, 3)
        return x.reshape(x.shape[0], size, size, outputs)


def example_inputs(config: DemoConfig, batch_size: int) -> dict[str, np.ndarray]:
    """A `latent` of normal values, times `t` and classes `y`."""
    rng = np.random.default_rng(0)
    shape = (batch_size, config.latent_size, config.latent_size, config.latent_channels)
    return {
        "latent": rng.standard_normal(shape, dtype=np.float32),
        "t": rng.integers(0, TIMES, batch_size).astype(np.float32),
        "y": rng.integers(0, config.num_classes, batch_size).astype(np.int32),
    }


# ---------------------------------------------------------------------------------------------------------- diffusion

TIMES = 1000
_BETAS = np.linspace(1e-4, 0.02, TIMES)  # the linear schedule of Ho et al. 2020
_KEPT = np.cumprod(1 - _BETAS)  # of the image's variance, after t + 1 steps


def add_noise(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """sqrt(kept_t) clean + sqrt(1 - kept_t) noise, for times (B,)."""
    kept = jnp.asarray(_KEPT, jnp.float32)[t.astype(jnp.int32)][:, None, None, None]
    return jnp.sqrt(kept) * clean + jnp.sqrt(1 - kept) * noise


class _Steps:
    """The times that sampling visits, and the posterior of each step between them (Nichol and Dhariwal 2021)."""

    def __init__(self, count: int):
        if not 1 <= count <= TIMES:
            raise ValueError(f"steps must be in 1 .. {TIMES}, got {count}")
        self.times = np.unique(np.round(np.linspace(0, TIMES - 1, count)).astype(int))
        self.kept = _KEPT[self.times]
        before = np.append(1.0, self.kept[:-1])
        self.betas = 1 - self.kept / before
        variance = self.betas * (1 - before) / (1 - self.kept)
        self.log_least = np.log(np.append(variance[1] if count > 1 else self.betas[0], variance[1:]))
        self.log_most = np.log(self.betas)
        self.of_clean = self.betas * np.sqrt(before) / (1 - self.kept)
        self.of_noisy = (1 - before) * np.sqrt(1 - self.betas) / (1 - self.kept)


def _log_likelihood(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Of x, rounded to 256 levels in [-1, 1], under a normal distribution (Ho et al. 2020, eq. 13)."""
    scale = jnp.exp(-0.5 * log_variance)
    above = jax.scipy.special.ndtr((x - mean + 1 / 255) * scale)
    below = jax.scipy.special.ndtr((x - mean - 1 / 255) * scale)
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _split(out: jax.Array) -> tuple[jax.Array, jax.Array]:
    noise, fraction = jnp.split(out.astype(jnp.float32), 2, axis=-1)
    return noise, (fraction + 1) / 2


def loss(model: Demo) -> Callable:
    """The loss of `zoo.train`: squared error of the noise, plus the variational bound of the learned variance.

    The bound is in bits a dimension and does not move the noise (Nichol and Dhariwal 2021, as DiT trains). The batch
    holds `latent`, clean ones, `y`, and `t`; the noise is drawn from the rng "noise". Metrics: "mse", "bound".
    """
    steps = _Steps(TIMES)

    def loss_function(params, model_state, batch, rngs, train):
        rngs = dict(rngs)
        clean, t = batch["latent"], batch["t"].astype(jnp.int32)
        noise = jax.random.normal(rngs.pop("noise"), clean.shape)
        noisy = add_noise(clean, noise, t)
        variables = {"params": params, **model_state}
        out, model_state = model.apply(
            variables, noisy, t, batch["y"], train=train, rngs=rngs, mutable=list(model_state)
        )
        predicted, fraction = _split(out)
        mse = jnp.mean((noise - predicted) ** 2)

        def at(values: np.ndarray) -> jax.Array:
            return jnp.asarray(values, jnp.float32)[t][:, None, None, None]

        predicted = jax.lax.stop_gradient(predicted)
        kept = at(steps.kept)
        restored = (noisy - jnp.sqrt(1 - kept) * predicted) / jnp.sqrt(kept)
        log_variance = fraction * at(steps.log_most) + (1 - fraction) * at(steps.log_least)
        truth = at(steps.of_clean) * clean + at(steps.of_noisy) * noisy
        mean = at(steps.of_clean) * restored + at(steps.of_noisy) * noisy
        least = at(steps.log_least)
        divergence = log_variance - least + jnp.exp(least - log_variance) - 1
        divergence = 0.5 * (divergence + (truth - mean) ** 2 * jnp.exp(-log_variance)) / math.log(2)
        last = -_log_likelihood(clean, mean, log_variance) / math.log(2)
        bound = jnp.where((t == 0)[:, None, None, None], last, divergence).mean()
        return mse + bound, (model_state, {"mse": mse, "bound": bound})

    return loss_function


def sample(
    model: Demo, variables: Any, rng: jax.Array, y: jax.Array, *, steps: int = 250, guidance: float = 4.0
) -> jax.Array:
    """Draws latent images by the steps back of diffusion, with classifier-free guidance (Ho and Salimans 2022).

    Guidance acts on all channels; DiT's published script leaves the fourth out.

    Args:
      model, variables: a trained DEMO.
      rng: a PRNG key.
      y: int classes (B,).
      steps: of the 1000 times, 1 .. 1000.
      guidance: 1 is none; the noise is that without a class plus so many times the difference the class makes.

    Returns:
      float32 (B, latent_size, latent_size, latent_channels), for the autoencoder of latent diffusion.

    Raises:
      ValueError: steps out of range.
    """
    config, schedule = model.config, _Steps(steps)
    shape = (len(y), config.latent_size, config.latent_size, config.latent_channels)
    table = {
        name: jnp.asarray(getattr(schedule, name), jnp.float32)
        for name in ("kept", "log_least", "log_most", "of_clean", "of_noisy")
    }
    times = jnp.asarray(schedule.times)
    nothing = jnp.full_like(y, config.num_classes)
    apply: Callable[..., Any] = model.apply

    def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.full(len(y), t, jnp.float32)
        if guidance == 1:
            return _split(apply(variables, x, t, y))
        both = jnp.concatenate
        out = apply(variables, both([x, x]), both([t, t]), both([y, nothing]))
        noise, fraction = _split(out)
        with_class, without = jnp.split(noise, 2)
        return without + guidance * (with_class - without), jnp.split(fraction, 2)[0]

    def step(x: jax.Array, scanned: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, rng = scanned
        at = {name: values[index] for name, values in table.items()}
        noise, fraction = predict(x, times[index])
        restored = (x - jnp.sqrt(1 - at["kept"]) * noise) / jnp.sqrt(at["kept"])
        mean = at["of_clean"] * restored + at["of_noisy"] * x
        deviation = jnp.exp(0.5 * (fraction * at["log_most"] + (1 - fraction) * at["log_least"]))
        return mean + jnp.where(index > 0, deviation, 0) * jax.random.normal(rng, x.shape), None

    first, later = jax.random.split(rng)
    order = jnp.arange(len(schedule.times))[::-1]
    return jax.lax.scan(step, jax.random.normal(first, shape), (order, jax.random.split(later, len(order))))[0]

"""The networks that DeepSNP is held against, on the same windows; none of them says where a breakpoint is."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.batch_norm import BatchNorm
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense
from zoo.papers.deepsnp.model import Convolution, DeepSNPConfig, Slide, Trunk, check_windows, rows_of

_STAGES = ((64, 2, 0.4), (128, 2, 0.3), (256, 3, 0.2), (512, 3, 0.2), (512, 3, 0.1))  # features, layers, dropout


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """A baseline.

    Attributes:
      kind: "vgg" (13 convolutions), "densenet" (version 2's trunk), "dil_densenet" (with dilations 1, 3, 9, ... in each
        block) or "lstm_densenet" (with a gated bidirectional LSTM behind it).
      trunk: of all but "vgg".
      width: factor of the features of "vgg".
      lstm_units: of "lstm_densenet", for each direction.
    """

    kind: Literal["vgg", "densenet", "dil_densenet", "lstm_densenet"] = "densenet"
    trunk: DeepSNPConfig = DeepSNPConfig(stem="strided", attention="none")
    width: float = 1.0
    lstm_units: int = 128

    @property
    def window(self) -> int:
        """Probes of example windows."""
        return self.trunk.window


class Baseline(nn.Module):
    """Features of each step, two classes of each, and their mean over steps and rows."""

    config: BaselineConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, window: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """(B, 2, W, 1) to "probs" (B, 2), arguments and errors as of `DeepSNP`."""
        config, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        check_windows(window)
        x = rows_of(window)
        if config.kind == "vgg":
            x = VGG(config.width, **options, name="trunk")(x, train)
        else:
            dilations = tuple(3**index for index in range(config.trunk.layers_per_block))
            trunk = Trunk(config.trunk, dilations if config.kind == "dil_densenet" else None, **options, name="trunk")
            x = nn.relu(trunk(x, train))
            if config.kind == "lstm_densenet":
                x = GatedBiLSTM(config.lstm_units, name="lstm")(x)
            else:
                x = BatchNorm(epsilon=1.001e-5, momentum=0.01, **options, name="norm")(x, train)
        logits = dense(2, ("embed", None), **options, name="classes")(x).mean(1)
        return {"probs": nn.softmax(logits.reshape(-1, 2, 2).mean(1))}


class GatedBiLSTM(nn.Module):
    """A bidirectional LSTM times the sigmoid of another."""

    units: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, T, C) to (N, T, 2 units)."""

        def both(name: str) -> Any:
            forward, backward = (nn.RNN(nn.OptimizedLSTMCell(self.units)) for _ in range(2))
            return nn.Bidirectional(forward, backward, name=name)(x)

        return both("value") * nn.sigmoid(both("gate"))


class VGG(nn.Module):
    """Stages of convolutions of width 3 without padding, each with a norm, a pool and a dropout behind."""

    width: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, W, 1) to (N, T, C). Raises ValueError for windows of fewer than 172 probes."""
        if x.shape[1] < 172:
            raise ValueError(f"a window of {x.shape[1]} probes is too short for five stages, which need 172")
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for stage, (features, layers, rate) in enumerate(_STAGES):
            for index in range(layers):
                convolution = Convolution(
                    max(int(features * self.width), 1), Slide(3, 1, 1, False), use_bias=True, **options,
                    name=f"stage_{stage}_conv_{index}",
                )  # fmt: skip
                x = nn.relu(convolution(x))
            x = nn.max_pool(x, (2,), (2,))
            x = BatchNorm(epsilon=1e-3, momentum=0.01, **options, name=f"stage_{stage}_norm")(x, train)
            x = Dropout(rate)(x, train)
        return x

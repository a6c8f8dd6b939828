"""Latency-driven slimming: a supernet trained once, then shrunk greedily by accuracy lost per second saved.

    supernet = Supernet(EfficientFormerConfig(depths=(2, 2, 3, 2), widths=(32, 48, 64, 96), image_size=(64, 64)))
    variables = ...                                    # trained with `supernet_loss`
    table = latency_table(supernet.config)             # measured here, in seconds
    steps = slim(supernet.config, variables["params"]["alpha"], table, evaluate, target=0.6 * table.total(...))
    model = EfficientFormer(steps[-1].network.config(supernet.config))   # to be trained from scratch

Written from section 3.3 of the paper; the authors' code of it was not published. What the paper leaves open: alpha
starts at one; narrowing takes the last channels away, which the supernet evaluates by setting them to zero; the table
holds the blocks alone, since stem and downsampling are in every network.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.layers.conv_norm import ConvNorm, fold
from zoo.layers.norms import norm
from zoo.layers.partitioning import dense, partitioned
from zoo.papers.efficientformer.model import EfficientFormerConfig, Meta3D, Meta4D, Stem, check_images
from zoo.train.classification import accuracy, cross_entropy

MB4D, MB3D, IDENTITY = range(3)  # the paths of a block, in the order of alpha's columns
STEP = 16  # channels that a stage loses at a time
Action = Literal["identity", "mb4d", "narrow"]
ACTIONS: tuple[Action, ...] = ("identity", "mb4d", "narrow")


def stage_of_blocks(config: EfficientFormerConfig) -> np.ndarray:
    """The stage, 0 to 3, of each block."""
    return np.repeat(np.arange(4), config.depths)


def mixing_weights(alpha: Any, noise: Any, stage: np.ndarray, tau: float) -> jax.Array:
    """Weights of each block's paths, softmax((alpha + noise) / tau) over those it has.

    Args:
      alpha: (blocks, 3), importance of MB4D, MB3D and identity.
      noise: (blocks, 3), uniform in [0, 1), fresh at every step.
      stage: (blocks,); blocks on tokens are allowed in the last two stages, 2 and 3.
      tau: temperature, positive.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    allowed = np.ones((len(stage), 3), bool)
    allowed[:, MB3D] = np.asarray(stage) >= 2
    return jax.nn.softmax((alpha + noise) / tau, axis=-1, where=allowed)


def block_importance(alpha: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """(blocks,): alpha of the paths that compute over alpha of the identity."""
    alpha = np.asarray(alpha)
    return (alpha[:, MB4D] + np.where(np.asarray(stage) >= 2, alpha[:, MB3D], 0)) / alpha[:, IDENTITY]


def stage_importance(importance: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """(4,): sums of the stages' blocks."""
    return np.bincount(stage, weights=importance, minlength=4).astype(np.float32)


def best_action(accuracy_drop: np.ndarray, latency_saved: np.ndarray) -> int:
    """Index of the action that loses the least accuracy per second; one that saves nothing is never the best."""
    drop, saved = np.asarray(accuracy_drop, float), np.asarray(latency_saved, float)
    return int(np.argmin(np.where(saved > 0, drop / np.where(saved > 0, saved, 1), np.inf)))


class Supernet(nn.Module):
    """Every block as a weighted sum of its paths, at a single width: x' = w4D MB4D(x) + w3D MB3D(x) + wI x.

    The config's `vit_num` and `distillation` have no meaning here. Parameter `alpha`: (blocks, 3), see
    `mixing_weights`.

    Fields:
      config: depths and widths of the largest network.
      tau: temperature of the mixing.
    """

    config: EfficientFormerConfig
    tau: float = 1.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        weights: jax.Array | None = None,
        widths: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Logits (B, num_classes).

        Args:
          images: float (B, height, width, channels).
          weights: (blocks, 3) of the paths, see `SubNetwork.weights`; None mixes by alpha, in training with noise (rng
            "sample").
          widths: (4,) channels of the stages that are not zero; None is all.
          train: use the batch's statistics.
        """
        config = self.config
        check_images(images, config.channels)
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stages = stage_of_blocks(config)
        alpha = self.param(
            "alpha", partitioned(nn.initializers.ones_init(), None, None), (len(stages), 3), self.param_dtype
        )
        if weights is None:
            noise = jnp.zeros_like(alpha)
            if train:
                noise = jax.random.uniform(self.make_rng("sample"), alpha.shape)
            weights = mixing_weights(alpha, noise, stages, self.tau)

        def narrowed(x: jax.Array, stage: int) -> jax.Array:
            return x if widths is None else jnp.where(jnp.arange(x.shape[-1]) < widths[stage], x, 0)

        x = narrowed(Stem(config.widths[0], **options, name="stem")(images, train), 0)
        blocks = iter(weights)
        for stage, depth in enumerate(config.depths):
            if stage:
                down = ConvNorm(
                    config.widths[stage], 3, stride=2, axes=("embed", "mlp"), **options, name=f"down_{stage - 1}"
                )  # fmt: skip
                x = narrowed(down(x, train), stage)
            shape = x.shape
            for index in range(depth):
                weight, name = next(blocks), f"stage_{stage}_block_{index}"
                y = weight[MB4D] * Meta4D(config, **options, name=f"{name}_4d")(x, train) + weight[IDENTITY] * x
                if stage >= 2:
                    block = Meta3D(config, config.grid(stage), **options, name=f"{name}_3d")
                    tokens = block(x.reshape(shape[0], -1, shape[-1]), (shape[1], shape[2]), train)
                    y += weight[MB3D] * tokens.reshape(shape)
                x = narrowed(y, stage)
        x = norm("layer", epsilon=1e-5, **options, name="norm")(x.reshape(x.shape[0], -1, x.shape[-1])).mean(axis=1)
        return dense(config.num_classes, ("embed", None), **options, name="head")(x)


def supernet_loss(model: Supernet) -> Callable:
    """The loss of `zoo.train`: cross-entropy of batch["images"] and batch["labels"]; rng streams "sample"."""

    def loss_function(params, model_state, batch, rngs, train):
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, batch["images"], train=train, rngs=rngs, mutable=list(model_state))
        value = cross_entropy(logits, batch["labels"])
        return value, (model_state, {"accuracy": accuracy(logits, batch["labels"])})

    return loss_function


@dataclasses.dataclass(frozen=True)
class SubNetwork:
    """One path a block, and the stages' widths."""

    paths: tuple[int, ...]
    widths: tuple[int, int, int, int]

    def config(self, largest: EfficientFormerConfig) -> EfficientFormerConfig:
        """The network of its own that it is: identities left out."""
        stage, paths = stage_of_blocks(largest), np.asarray(self.paths)
        first, second, third, fourth = (int(np.sum((stage == s) & (paths != IDENTITY))) for s in range(4))
        tokens = [int(np.sum((stage == s) & (paths == MB3D))) for s in range(4)]
        return dataclasses.replace(
            largest,
            depths=(first, second, third, fourth),
            widths=self.widths,
            vit_num=tokens[3],
            stage3_vit_num=tokens[2],
        )

    def weights(self) -> np.ndarray:
        """float32 (blocks, 3): one for the path of each block, for `Supernet`."""
        return np.eye(3, dtype=np.float32)[list(self.paths)]


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Seconds of one block by (stage, path, width), measured at the stage's resolution."""

    seconds: Mapping[tuple[int, int, int], float]

    def total(self, network: SubNetwork, config: EfficientFormerConfig) -> float:
        """Seconds of all blocks of a network."""
        return sum(
            self.seconds[stage, path, network.widths[stage]]
            for stage, path in zip(stage_of_blocks(config), network.paths, strict=True)
            if path != IDENTITY
        )


def latency_table(config: EfficientFormerConfig, batch: int = 1, repeats: int = 20) -> LatencyTable:
    """Measures every block that a network within `config` may hold, folded and compiled, on this machine.

    Args:
      config: the largest network; widths are multiples of 16, and so are those measured.
      batch: images at once.
      repeats: timings of each block, of which the median counts.
    """
    if any(width % STEP for width in config.widths):
        raise ValueError(f"widths must be multiples of {STEP}, got {config.widths}")
    seconds = {}
    for stage, widest in enumerate(config.widths):
        rows, columns = config.grid(stage)
        for width in range(STEP, widest + 1, STEP):
            for path in (MB4D, MB3D) if stage >= 2 else (MB4D,):
                shape = (rows, columns) if path == MB4D else (rows * columns,)
                x = jnp.ones((batch, *shape, width))
                seconds[stage, path, width] = _measure(config, path, x, (rows, columns), repeats)
    return LatencyTable(seconds)


def _measure(config: EfficientFormerConfig, path: int, x: jax.Array, grid: tuple[int, int], repeats: int) -> float:
    if path == MB4D:
        block: nn.Module = Meta4D(config)
        arguments: tuple[Any, ...] = (x, False)
    else:
        block, arguments = Meta3D(config, grid), (x, grid, False)
    variables = fold(jax.jit(lambda rng: block.init(rng, *arguments))(jax.random.key(0)))
    forward = jax.jit(lambda variables, x: block.apply(variables, x, *arguments[1:]))
    forward(variables, x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward(variables, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def first_network(alpha: np.ndarray, config: EfficientFormerConfig) -> SubNetwork:
    """The supernet's own choice: the paths of largest alpha, of which blocks on tokens must be the last ones.

    A block takes the identity where that has the largest alpha. Of all places from which on blocks are on tokens (in
    stages 2 and 3), the one is taken at which the alphas chosen sum up to the most.
    """
    stage, alpha = stage_of_blocks(config), np.asarray(alpha)
    options = []
    for first in range(int(np.sum(stage < 2)), len(stage) + 1):
        path = np.where(np.arange(len(stage)) < first, MB4D, MB3D)
        chosen = alpha[np.arange(len(stage)), path]
        path = np.where(alpha[:, IDENTITY] > chosen, IDENTITY, path)
        options.append((float(np.maximum(chosen, alpha[:, IDENTITY]).sum()), tuple(int(p) for p in path)))
    return SubNetwork(max(options)[1], config.widths)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of slimming: what was done (None at the start) and what came out."""

    action: Action | None
    network: SubNetwork
    seconds: float
    accuracy: float


def slim(
    config: EfficientFormerConfig,
    alpha: np.ndarray,
    table: LatencyTable,
    evaluate: Callable[[SubNetwork], float],
    target: float,
) -> list[Step]:
    """Shrinks the supernet's own choice until its blocks take no longer than the target.

    Three actions compete at each step: "identity" leaves the least important block out, "mb4d" puts the first block
    that is on tokens on maps, "narrow" takes 16 channels from the least important stage.

    Args:
      config: the supernet's.
      alpha: (blocks, 3), the supernet's.
      table: latencies.
      evaluate: accuracy of a network, with the supernet's weights.
      target: seconds.

    Returns:
      The steps, the last one with at most `target` seconds.

    Raises:
      ValueError: the target is below what the three actions can reach.
    """
    stage = stage_of_blocks(config)
    importance = block_importance(alpha, stage)
    network = first_network(alpha, config)
    steps = [Step(None, network, table.total(network, config), evaluate(network))]
    while steps[-1].seconds > target:
        now = steps[-1]
        options = {}
        for action in ACTIONS:
            changed = _apply(action, now.network, importance, stage)
            if changed is not None:
                options[action] = Step(action, changed, table.total(changed, config), evaluate(changed))
        drops = [now.accuracy - option.accuracy for option in options.values()]
        saved = [now.seconds - option.seconds for option in options.values()]
        if not options or max(saved) <= 0:
            raise ValueError(
                f"the target of {target:.2e} s is out of reach: nothing more to take at {now.seconds:.2e} s"
            )
        steps.append(list(options.values())[best_action(np.array(drops), np.array(saved))])
    return steps


def _apply(action: Action, network: SubNetwork, importance: np.ndarray, stage: np.ndarray) -> SubNetwork | None:
    """The network after an action, or None where there is nothing it could act on."""
    paths = np.array(network.paths)
    present = paths != IDENTITY
    if action == "identity":
        if not present.any():
            return None
        paths[np.argmin(np.where(present, importance, math.inf))] = IDENTITY
        return dataclasses.replace(network, paths=tuple(int(p) for p in paths))
    if action == "mb4d":
        if MB3D not in paths:
            return None
        paths[np.argmax(paths == MB3D)] = MB4D
        return dataclasses.replace(network, paths=tuple(int(p) for p in paths))
    sums = stage_importance(np.where(present, importance, 0), stage)
    narrowable = [s for s in range(4) if network.widths[s] > STEP and present[stage == s].any()]
    if not narrowable:
        return None
    least = min(narrowable, key=lambda s: sums[s])
    first, second, third, fourth = (width - STEP * (s == least) for s, width in enumerate(network.widths))
    return dataclasses.replace(network, widths=(first, second, third, fourth))

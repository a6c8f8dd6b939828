"""The residual block that decoders, encoders and vision Transformers repeat, and the config that describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from zoo import mixers
from zoo.errors import unknown
from zoo.layers.drop_path import DropPath
from zoo.layers.dropout import Dropout
from zoo.layers.mlp import MLP, check_mlp
from zoo.layers.norms import NormKind, norm
from zoo.layers.partitioning import keep_batch_cut
from zoo.layers.rotary import Rotary
from zoo.layers.routed_mlp import RoutedMLP, check_blocks

NormPosition = Literal["pre", "post"]
NO_MLP = ("identity", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A stack of blocks. Hashable.

    `window`, `mixer` and `mixer_options` hold for all layers, or are tuples that layer after layer takes in turn and
    starts again.

    Fields:
      features: width of the residual stream.
      layers: number of blocks.
      heads, key_heads, head_dim, window, qkv_bias, out_bias: of mixers that have them, as in `zoo.mixers.softmax`.
      mlp_features: width inside the MLP; None is 4 features.
      mlp: its kind, a name of `zoo.layers.mlp`; "identity", whose branch adds its norm as it is; or "none", no branch.
      mlp_bias: of its projections.
      mlp_blocks, mlp_active: blocks into which its hidden units are cut, and how many a token runs through, chosen by
        a router (`zoo.layers.routed_mlp`); one block is the plain MLP.
      norm: "layer" or "rms".
      norm_epsilon: of all norms.
      norm_position: "pre" norms a branch's input (and once after the last block), "post" the sum with its output.
      positions: how tokens know their place, a name in `POSITIONS`.
      rotary: the embedding of positions = "rotary", for mixers that have it.
      mixer: names of `zoo.mixers`.
      mixer_options: options that the mixer must have; they win over those above.
      causal: a token sees no later one.
      dropout: of embeddings, attention weights and both branches' outputs.
      drop_path: stochastic depth of the last block; from 0 in the first it rises linearly.
      init_std: standard deviation of initial embeddings and kernels.
      remat: recompute a block in the backward pass instead of keeping its intermediates.

    Raises:
      ValueError, TypeError: a value is out of range, a name or an option of the mixer unknown.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("rotary", "none")
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    features: int
    layers: int
    heads: int
    mlp_features: int | None = None
    key_heads: int | None = None
    head_dim: int | None = None
    mlp: str = "gelu"
    mlp_bias: bool = True
    mlp_blocks: int = 1
    mlp_active: int = 1
    norm: NormKind = "layer"
    norm_epsilon: float = 1e-6
    norm_position: NormPosition = "pre"
    positions: str = "none"
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    qkv_bias: bool = True
    out_bias: bool = True
    window: int | tuple[int | None, ...] | None = None
    mixer: str | tuple[str, ...] = "softmax"
    mixer_options: Mapping[str, Any] | tuple[Mapping[str, Any], ...] = FrozenDict()
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    init_std: float = 0.02
    remat: bool = False

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The published config of this name (a key of `PRESETS`), with some fields changed.

        Raises:
          ValueError: the name is unknown.
        """
        if name not in cls.PRESETS:
            raise unknown(f"preset of {cls.__name__}", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name], **changes})

    def __post_init__(self):
        options = self.mixer_options
        frozen = tuple(map(FrozenDict, options)) if isinstance(options, tuple) else FrozenDict(options)
        object.__setattr__(self, "mixer_options", frozen)
        check_positive(self, "features", "layers", "heads", "mlp_features")
        for name in ("dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("window", "mixer", "mixer_options"):
            value = getattr(self, name)
            if isinstance(value, tuple) and not 1 <= len(value) <= self.layers:
                raise ValueError(f"{name} as a tuple needs 1 to layers = {self.layers} entries, got {len(value)}")
        if self.mlp not in NO_MLP:
            check_mlp(self.mlp)
            check_blocks(self.mlp_hidden, self.mlp_blocks, self.mlp_active)
        elif self.norm_position == "post":
            raise ValueError(f"mlp = {self.mlp!r} needs norm_position = 'pre'")
        for name, known in (
            ("norm", get_args(NormKind)),
            ("norm_position", get_args(NormPosition)),
            ("positions", self.POSITIONS),
        ):
            if getattr(self, name) not in known:
                raise unknown(f"choice of {name}", getattr(self, name), known)
        for layer in range(self.layers):
            self.make_mixer(layer, parent=None)

    @property
    def mlp_hidden(self) -> int:
        """Width inside the MLP."""
        return self.mlp_features or 4 * self.features

    @property
    def kernel_init(self) -> Callable:
        """Initialiser of kernels and embeddings."""
        return nn.initializers.normal(self.init_std)

    @property
    def out_init(self) -> Callable:
        """Initialiser of the kernels whose outputs the residual stream adds up."""
        return self.kernel_init

    def make_mixer(self, layer: int, **options: Any) -> mixers.Mixer:
        """The mixer of a layer; `options` are more of `zoo.mixers.create`."""
        defaults = {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "head_dim": self.head_dim,
            "window": _of_layer(self.window, layer),
            "rotary": self.rotary if self.positions == "rotary" else None,
            "qkv_bias": self.qkv_bias,
            "out_bias": self.out_bias,
            "dropout": self.dropout,
        }
        common = {"causal": self.causal, "kernel_init": self.kernel_init, "out_init": self.out_init}
        chosen = common | options | dict(_of_layer(self.mixer_options, layer))
        return mixers.create(_of_layer(self.mixer, layer), features=self.features, defaults=defaults, **chosen)

    def make_mlp(self, **options: Any) -> nn.Module:
        """The position-wise network; `options` are more of `zoo.layers.mlp.MLP`."""
        common = {"kernel_init": self.kernel_init, "out_init": self.out_init, **options}
        if self.mlp_blocks == 1:
            return MLP(self.mlp_hidden, self.mlp, self.mlp_bias, **common)
        return RoutedMLP(self.mlp_hidden, self.mlp, self.mlp_bias, self.mlp_blocks, self.mlp_active, **common)

    def make_norm(self, **options: Any) -> nn.Module:
        """A norm of the residual stream; `options` are more of `zoo.layers.norms.norm`."""
        return norm(self.norm, epsilon=self.norm_epsilon, **options)


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is neither positive nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _of_layer(choice: Any, layer: int) -> Any:
    return choice[layer % len(choice)] if isinstance(choice, tuple) else choice


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)); with norm_position "post" norm1(x + mixer(x)), norm2(x + mlp(x)).

    Fields:
      config: of the stack.
      layer: this block's number in it, from 0.
    """

    config: TransformerConfig
    layer: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self):
        """Names of parameters: norm1, mixer, norm2, mlp."""
        config = self.config
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.norm1 = config.make_norm(**options)
        self.mixer = config.make_mixer(self.layer, **options)
        if config.mlp != "none":
            self.norm2 = config.make_norm(**options)
        if config.mlp not in NO_MLP:
            self.mlp = config.make_mlp(**options)
        self.dropout = Dropout(config.dropout)
        self.drop_path = DropPath(config.drop_path * self.layer / max(config.layers - 1, 1))

    def __call__(
        self,
        x: jax.Array,
        state: mixers.State | None,
        valid: jax.Array | None,
        deterministic: bool,
        **mixer_arguments: Any,
    ) -> tuple[jax.Array, mixers.State | None]:
        """(batch, time, features) to the same, and the mixer's next state; it may take more arguments of its own."""
        x = keep_batch_cut(x)
        mix = partial(self.mixer, valid=valid, deterministic=deterministic, **mixer_arguments)

        def branch(y: jax.Array) -> jax.Array:
            return self.drop_path(self.dropout(y, train=not deterministic), deterministic=deterministic)

        if self.config.norm_position == "pre":
            y, state = mix(self.norm1(x), state)
            x = self.between(x + branch(y))
            if self.config.mlp == "none":
                return x, state
            normed = self.norm2(x)
            return x + branch(normed if self.config.mlp == "identity" else self.mlp(normed)), state
        y, state = mix(x, state)
        x = self.between(self.norm1(x + branch(y)))
        return self.norm2(x + branch(self.mlp(x))), state

    def between(self, x: jax.Array) -> jax.Array:
        """The residual stream between the two branches, as it is: a place where `zoo.probe` reads and patches."""
        return x


def make_blocks(config: TransformerConfig, dtype: Any, param_dtype: Any) -> list[Block]:
    """The stack, to be assigned in a module's `setup`."""
    block = nn.remat(Block, static_argnums=(4,)) if config.remat else Block
    return [block(config, layer, dtype, param_dtype) for layer in range(config.layers)]

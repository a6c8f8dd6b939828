"""Attention, state-space models and recurrent networks as one kind of dynamical system.

"Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural Networks",
Jerome Sieber, Carmen Amo Alonso, Alexandre Didier, Melanie N. Zeilinger, Antonio Orvieto, NeurIPS 2024, arXiv
2405.15731. Code: github.com/IntelligentControlSystems/dsf-mqar (Apache-2.0, built on zoology). No checkpoints.

Every layer is a linear system whose matrices change with the tokens, h_i = Lambda_i h_(i-1) + B_i u_i and y_i = C_i h_i
+ D_i u_i with a diagonal Lambda (`System`); so layers differ in four matrices. What linear attention lacks is a free
normaliser (`normalized_attention`), what a quasi-LSTM lacks is S6's forget gate, the reversed sigmoid.

What the published code does, and is therefore done here:
- a state mixer "identity" adds the second norm: x + norm2(x); S6 and SSD have no second branch at all;
- normalized attention is trained with an MLP, linear attention without: `state_mixer` of both is a field;
- initialisation overwrites what layers bring: N(0, 0.02) for all projections, zeros for their biases, those of S6's
  step among them; only projections out named so, and the MLP's second, are smaller by sqrt(2 layers);
- the quasi-LSTM's convolution has no activation, and its alpha is a parameter also where nothing uses it;
- SSD's step has a weight that nothing uses, and a constant matrix of ones; both are left out when weights are read.

What is not: dropout of the weights of linear and normalized attention, which have none in recurrent form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.backbones import DecoderConfig
from zoo.backbones.decoder_lm import PaperDecoder
from zoo.errors import unknown
from zoo.mixers.base import Mixer
from zoo.mixers.dynamical import NormalizedAttention, PlainSelectiveScan, QuasiLSTM, forget_gate
from zoo.mixers.linear_attention import LinearAttention
from zoo.mixers.softmax import SoftmaxAttention
from zoo.registry import Paper, Variant, register
from zoo.train.recall import recall_loss
from zoo.weights.names import Rule, layer, under

PAPER = Paper(
    slug="dsf",
    title="Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
    "Networks",
    authors="Jerome Sieber et al.",
    venue="NeurIPS",
    year=2024,
    arxiv="2405.15731",
    claim="Attention, state-space models and recurrent networks are one dynamical system; normaliser, size of the "
    "state and forget gate explain what they recall.",
    code="https://github.com/IntelligentControlSystems/dsf-mqar",
    code_license="Apache-2.0",
    remarks="The published normalized attention has an MLP that the linear attention it is compared with has not.",
)

Kind = Literal["sm_attention", "lin_attention", "norm_attention", "s6", "ssd", "qlstm", "qlstm_rev"]
StateMixer = Literal["identity", "mlp4"]


# ------------------------------------------------------------------------------------------------- dynamical systems


class System(NamedTuple):
    """h_i = transition_i h_(i-1) + enter_i u_i, y_i = leave_i h_i + skip_i u_i, h_(-1) = 0; the transition diagonal."""

    transition: jax.Array  # (..., time, states)
    enter: jax.Array  # (..., time, states, inputs)
    leave: jax.Array  # (..., time, outputs, states)
    skip: jax.Array  # (..., time, outputs, inputs)


def ltv_system(system: System, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs (..., time, outputs) and states (..., time, states) of inputs (..., time, inputs), token by token."""
    arrays = [jnp.moveaxis(array, -2 if rank == 1 else -3, 0) for array, rank in _ranks(system, inputs)]

    def token(h: jax.Array, now: list[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        transition, enter, leave, skip, u = now
        h = transition * h + jnp.einsum("...ni,...i->...n", enter, u)
        return h, (jnp.einsum("...on,...n->...o", leave, h) + jnp.einsum("...oi,...i->...o", skip, u), h)

    _, (outputs, states) = jax.lax.scan(token, jnp.zeros_like(arrays[0][0]), arrays)
    return jnp.moveaxis(outputs, 0, -2), jnp.moveaxis(states, 0, -2)


def _ranks(system: System, inputs: jax.Array) -> list[tuple[jax.Array, int]]:
    time = inputs.shape[-2]
    pairs = [(system.transition, 1), (system.enter, 2), (system.leave, 2), (system.skip, 2), (inputs, 1)]
    for (array, rank), name in zip(pairs, (*System._fields, "inputs"), strict=True):
        if array.ndim < rank + 1 or array.shape[-1 - rank] != time:
            raise ValueError(f"{name} must have time = {time} on axis {-1 - rank}, got {array.shape}")
    return pairs


def ltv_kernel(system: System) -> jax.Array:
    """The matrix of the whole map: (..., time * outputs, time * inputs), lower triangular by blocks.

    Block (i, j) is leave_i transition_i ... transition_(j+1) enter_j, plus skip_i where i = j. Products of transitions
    are multiplied out, not divided, so that a transition may be 0.
    """
    transition, enter, leave, skip = system
    time, states = transition.shape[-2:]

    def row(carried: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, factor = now  # carried: the product from each j + 1 to the token before, (..., time, states)
        here = (jnp.arange(time) == index)[:, None]
        carried = jnp.where(here, 1.0, carried * factor[..., None, :])
        return carried, carried

    start = jnp.zeros((*transition.shape[:-2], time, states))
    _, products = jax.lax.scan(row, start, (jnp.arange(time), jnp.moveaxis(transition, -2, 0)))
    blocks = jnp.einsum("...ion,i...jn,...jnx->...iojx", leave, products, enter)
    own = jnp.einsum("...iox,ij->...iojx", skip, jnp.eye(time))
    outputs, inputs = skip.shape[-2:]
    return (blocks + own).reshape(*transition.shape[:-2], time * outputs, time * inputs)


def separable_attention(query: jax.Array, key: jax.Array, divisor: jax.Array, width: int) -> System:
    """One head's sum_j (query_i . key_j) v_j / divisor_i as a system whose input is the values.

    transition = divisor_(i-1) / divisor_i, enter = key / divisor (x) I, leave = query (x) I.

    Args:
      query, key: features (..., time, F).
      divisor: (..., time), not zero.
      width: of the values.
    """
    before = jnp.concatenate([jnp.zeros_like(divisor[..., :1]), divisor[..., :-1]], axis=-1)
    states = query.shape[-1] * width
    transition = jnp.broadcast_to((before / divisor)[..., None], (*divisor.shape, states))
    eye = jnp.eye(width)
    enter = jnp.einsum("...f,xy->...fxy", key / divisor[..., None], eye).reshape(*divisor.shape, states, width)
    leave = jnp.einsum("...f,xy->...xfy", query, eye).reshape(*divisor.shape, width, states)
    return System(transition, enter, leave, jnp.zeros((*divisor.shape, width, width)))


def selective_system(step: jax.Array, rate: jax.Array, b: jax.Array, c: jax.Array, skip: jax.Array) -> System:
    """S6 and SSD: exp(step A), step b, c, skip.

    Args:
      step: (..., time, channels), after its softplus.
      rate: A, (channels, n), not positive.
      b, c: (..., time, n).
      skip: (channels,).
    """
    channels, size = rate.shape
    lead, eye = step.shape[:-1], jnp.eye(channels)
    transition = jnp.exp(step[..., None] * rate).reshape(*lead, channels * size)
    enter = jnp.einsum("...x,...n,xy->...xny", step, b, eye).reshape(*lead, channels * size, channels)
    leave = jnp.einsum("...n,xy->...xyn", c, eye).reshape(*lead, channels, channels * size)
    return System(transition, enter, leave, jnp.broadcast_to(skip * eye, (*lead, channels, channels)))


def gated_system(forget: jax.Array, enter: jax.Array, leave: jax.Array) -> System:
    """The quasi-LSTM: its gates (..., time, hidden), after their sigmoids, on three diagonals."""
    eye = jnp.eye(forget.shape[-1])
    skip = jnp.zeros((*forget.shape, forget.shape[-1]))
    return System(forget, enter[..., None] * eye, leave[..., None] * eye, skip)


class Represented(NamedTuple):
    """A layer as a system: of its core, between its projections."""

    system: System  # (batch, heads, time, ...); of S6, SSD and the quasi-LSTM heads is 1
    inputs: jax.Array  # (batch, heads, time, inputs): values; the layer's input; what the convolution gives
    outputs: jax.Array  # (batch, heads, time, outputs): what the layer's core makes of them


def to_dsf(mixer: Mixer, variables: Mapping[str, Any], x: jax.Array) -> Represented:
    """A layer on tokens as a dynamical system; analysis only, for its matrices are written out.

    Args:
      mixer: linear attention (its map "elu" or "identity"), normalized attention, S6 or SSD, or a quasi-LSTM.
      variables: its own.
      x: float (batch, time, features), its input.

    Raises:
      ValueError: there is no such system of finite size (softmax attention), or it is not known.
    """
    if isinstance(mixer, SoftmaxAttention):
        raise ValueError("softmax attention has no state of finite size: its map is `effective_attention`")
    bound = mixer.bind(variables)
    if isinstance(mixer, PlainSelectiveScan):
        step, rate, b, c = bound.system(x)
        system = selective_system(jax.nn.softplus(step + bound.step_bias), rate, b, c, bound.skip)
        return _represented(jax.tree.map(lambda part: part[:, None], system), x[:, None])
    weights = variables["params"]
    if isinstance(mixer, QuasiLSTM):
        inner = _recorded(mixer, variables, x, "convolution")[0]
        gates = [_dense(weights[name], inner) for name in ("forget", "enter", "leave")]
        forget = forget_gate(gates[0], weights.get("alpha"))
        system = gated_system(forget, jax.nn.sigmoid(gates[1]), jax.nn.sigmoid(gates[2]))
        return _represented(jax.tree.map(lambda part: part[:, None], system), inner[:, None])
    query, key, value, divisor = _separable_parts(mixer, bound, weights, x)
    return _represented(separable_attention(query, key, divisor, value.shape[-1]), value)


def _separable_parts(
    mixer: Mixer, bound: Any, weights: Mapping[str, Any], x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each head (batch, heads, time, ...): mapped queries and keys, values, divisors."""
    if isinstance(mixer, NormalizedAttention):
        query, key = bound.unrotated(x)
        value = bound.split_values(x)
        key, value = (jnp.repeat(part, mixer.heads // part.shape[2], axis=2) for part in (key, value))
        query, key, value = (part.swapaxes(1, 2) for part in (query, key, value))
        return query, key, value, jnp.exp(bound.normalizer(x)).swapaxes(1, 2)
    if isinstance(mixer, LinearAttention) and mixer.feature_map in ("elu", "identity"):

        def heads(name: str) -> jax.Array:
            return _dense(weights[name], x).reshape(*x.shape[:2], mixer.heads, -1).swapaxes(1, 2)

        query, key, value = heads("query"), heads("key"), heads("value")
        if mixer.feature_map == "elu":
            query, key = jax.nn.elu(query) + 1, jax.nn.elu(key) + 1
        else:
            key = key * key.shape[-1] ** -0.5
        divisor = jnp.ones(query.shape[:-1])
        if mixer.normalize:
            divisor = jnp.einsum("bhif,bhif->bhi", query, jnp.cumsum(key, axis=2)) + mixer.epsilon
        return query, key, value, divisor
    raise ValueError(f"no dynamical system of {type(mixer).__name__} is known")


def _represented(system: System, inputs: jax.Array) -> Represented:
    outputs, _ = ltv_system(system, inputs)
    return Represented(system, inputs, outputs)


def _dense(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    y = x @ weights["kernel"]
    return y + weights["bias"] if "bias" in weights else y


def _recorded(mixer: Mixer, variables: Mapping[str, Any], x: jax.Array, name: str) -> Any:
    """What a submodule gives when the mixer is applied."""
    _, seen = mixer.apply(variables, x, capture_intermediates=lambda module, _: module.name == name)
    return seen["intermediates"][name]["__call__"][0]


def core_outputs(mixer: Mixer, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """What the layer itself hands to its projection out, (batch, time, width): heads side by side."""
    found: list[jax.Array] = []

    def record(call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and context.module.name == "out":
            found.append(arguments[0])
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        mixer.apply(variables, x)
    return found[0]


def effective_attention(mixer: Mixer, variables: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """A layer's map from each earlier token's input to each token's output, read as a matrix of attention.

    Of attentions a head's weights; of S6, SSD and the quasi-LSTM a channel's, skip included.

    Args:
      mixer, variables, x: as of `to_dsf`; softmax attention too.

    Returns:
      float32 (batch, heads or channels, time, time), lower triangular.
    """
    if isinstance(mixer, SoftmaxAttention):
        bound = mixer.bind(variables)
        return bound.weights(*bound.query_key(x, jnp.arange(x.shape[1])[None]))
    represented = to_dsf(mixer, variables, x)
    batch, heads, time, width = represented.inputs.shape
    kernel = ltv_kernel(represented.system).reshape(batch, heads, time, width, time, width)
    if isinstance(mixer, PlainSelectiveScan | QuasiLSTM):
        return jnp.einsum("bhixjx->bxij", kernel)
    return kernel[:, :, :, 0, :, 0]  # the same for every channel of a head


# ------------------------------------------------------------------------------------------------------ the networks


@dataclasses.dataclass(frozen=True)
class DsfConfig:
    """The network of the recall study.

    Fields:
      kind: of its layers.
      d_model: width of the residual stream.
      d_qk: width of all heads' queries and keys, or of a channel's state in S6 and SSD.
      n_layers, num_heads: their numbers.
      max_position_embeddings: rows of a learned table of positions, the most tokens of a sequence; 0 is no positions.
      state_mixer: "identity" or "mlp4", a network of 4 widths; S6 and SSD have neither.
      vocab_size: token ids.
      embedding_dropout, attention_dropout: in training; the second of softmax attention only.

    Raises:
      ValueError: a value is out of range, or a name unknown.
    """

    kind: Kind = "lin_attention"
    d_model: int = 64
    d_qk: int = 32
    n_layers: int = 2
    num_heads: int = 1
    max_position_embeddings: int = 64
    state_mixer: StateMixer = "identity"
    vocab_size: int = 8192
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self):
        for name, known in (("kind", get_args(Kind)), ("state_mixer", get_args(StateMixer))):
            if getattr(self, name) not in known:
                raise unknown(name.replace("_", " "), getattr(self, name), known)
        for name in ("d_model", "d_qk", "n_layers", "num_heads", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.num_heads or self.d_qk % self.num_heads:
            raise ValueError(
                f"d_model ({self.d_model}) and d_qk ({self.d_qk}) must be multiples of num_heads ({self.num_heads})"
            )
        if self.max_position_embeddings < 0:
            raise ValueError(f"max_position_embeddings must not be negative, got {self.max_position_embeddings}")
        self.decoder  # noqa: B018  raises what is wrong with the rest

    @property
    def is_state_space(self) -> bool:
        """Whether layers are published as blocks without a second branch."""
        return self.kind in ("s6", "ssd")

    @property
    def mixer(self) -> tuple[str, dict[str, Any]]:
        """The name in `zoo.mixers`, and options."""
        query_dim = self.d_qk // self.num_heads
        known: dict[Kind, tuple[str, dict[str, Any]]] = {
            "sm_attention": ("softmax", {"query_dim": query_dim, "dropout": self.attention_dropout}),
            # The published sum has no epsilon; this one is below what float32 adds to it.
            "lin_attention": ("linear_attention", {"feature_dim": query_dim, "epsilon": 1e-30}),
            "norm_attention": ("normalized_attention", {"query_dim": query_dim}),
            "s6": ("plain_s6", {"state_size": self.d_qk, "step_bias_init": nn.initializers.zeros}),
            "ssd": ("plain_s6", {"state_size": self.d_qk, "scalar": True, "step_bias_init": nn.initializers.zeros}),
            "qlstm": ("qlstm", {"out_init": nn.initializers.normal(0.02)}),
            "qlstm_rev": ("qlstm", {"reversed": True, "out_init": nn.initializers.normal(0.02)}),
        }
        return known[self.kind]

    @property
    def decoder(self) -> DecoderConfig:
        """The backbone."""
        name, options = self.mixer
        mlp = "none" if self.is_state_space else {"identity": "identity", "mlp4": "gelu"}[self.state_mixer]
        return DecoderConfig(
            vocab_size=self.vocab_size, features=self.d_model, layers=self.n_layers, heads=self.num_heads, mlp=mlp,
            norm="layer", norm_epsilon=1e-5, positions="learned" if self.max_position_embeddings else "none",
            max_length=self.max_position_embeddings or None, tie_embeddings=True,
            embedding_dropout=self.embedding_dropout, mixer=name, mixer_options=options,
        )  # fmt: skip


class DSFLanguageModel(PaperDecoder):
    """A language model: `DecoderLM` with the layers of the study. All its parameters are under `decoder`.

    Fields:
      config: see `DsfConfig`.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    config: DsfConfig


def state_size(config: DsfConfig, length: int) -> int:
    """Numbers of all layers' states after `length` tokens: of softmax attention its cache."""
    model = DSFLanguageModel(config)
    layers = jax.eval_shape(lambda: model.init_state(1, length)).layers
    return sum(leaf.size for leaf in jax.tree.leaves(layers) if jnp.issubdtype(leaf.dtype, jnp.floating))


def example_inputs(config: DsfConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Sequences of 64 tokens, or of as many as there are positions where that is less."""
    return {"tokens": np.zeros((batch_size, min(64, config.max_position_embeddings or 64)), np.int32)}


def example_targets(config: DsfConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Labels of the task's training batches, beside the tokens."""
    return {"labels": example_inputs(config, batch_size)["tokens"]}


def weight_rules(config: DsfConfig) -> list[Rule]:
    """The published names."""
    pair = ("params/query/kernel", "params/key/kernel"), ("params/query/bias", "params/key/bias")
    attention = [
        Rule(r"Wqk\.weight", pair[0], "linear"),
        Rule(r"Wqk\.bias", pair[1]),
        *layer("linear", "Wv", "value"),
        *layer("linear", "Wn", "normalizer"),
        *layer("linear", "out_proj", "out"),
    ]
    gates = ("forget", "enter", "leave")
    quasi_lstm = [
        Rule(r"input\.weight", ("params/gate/kernel", "params/value/kernel"), "linear"),
        Rule(r"conv\.weight", "params/convolution/kernel", "depthwise1d"),
        Rule(r"conv\.bias", "params/convolution/bias"),
        Rule(r"gates\.weight", tuple(f"params/{gate}/kernel" for gate in gates), "linear"),
        Rule(r"gates\.bias", tuple(f"params/{gate}/bias" for gate in gates)),
        *layer("linear", "output", "out"),
        Rule("alpha", "params/alpha" if config.kind == "qlstm_rev" else None),
    ]
    state_space = [
        *layer("linear", "x_proj", "parameters"),
        Rule(r"dt_proj\.weight", *((None,) if config.kind == "ssd" else ("params/step/kernel", "linear"))),
        Rule(r"dt_proj\.bias", "params/step_bias"),
        Rule("A_log", "params/log_rate"),
        Rule("D", "params/skip"),
        Rule("Id", None),
        *layer("linear", "out_proj", "out"),
    ]
    mixer = quasi_lstm if config.kind.startswith("qlstm") else attention
    block = [
        *layer("norm", "(norm1|norm2)", "{0}"),
        *layer("norm", "norm", "norm1"),
        *under("sequence_mixer", "mixer", mixer),
        *under("mixer", "mixer", state_space),
        *layer("linear", r"state_mixer\.fc1", "mlp/up"),
        *layer("linear", r"state_mixer\.fc2", "mlp/down"),
    ]
    return [
        Rule(r"lm_head\.weight", None),  # the embedding
        *layer("embedding", r"backbone\.embeddings\.word_embeddings", "decoder/embed"),
        *layer("embedding", r"backbone\.embeddings\.position_embeddings", "decoder/positions"),
        *under(r"backbone\.layers\.(\d+)", "decoder/layer_{0}", block),
        *layer("norm", r"backbone\.ln_f", "decoder/norm"),
    ]


def published_config(kind: Kind, **changes: Any) -> DsfConfig:
    """The config of the published experiments, at the grid's first point unless changed.

    Positions are of models other than S6 and SSD, an MLP of normalized attention.
    """
    config = DsfConfig(
        kind,
        max_position_embeddings=0 if kind in ("s6", "ssd") else 64,
        state_mixer="mlp4" if kind == "norm_attention" else "identity",
    )
    return dataclasses.replace(config, **changes)


register(
    PAPER,
    *(Variant(f"dsf_{kind}", published_config(kind)) for kind in get_args(Kind)),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=recall_loss,
    example_targets=example_targets,
)(DSFLanguageModel)

"""A network trained while it reads, one chunk at a time: what XLA, Mosaic and Triton all run.

Gradients are taken at the weights of the last border, so those of a chunk's tokens are known at once, and each is of
rank one: u_j = d_j x_j^T, d_j the gradient at a layer's output and x_j the layer's input. A layer's weights after token
i are W_i = b_i W + f_i S - sum_{j<=i} G_ij u_j, and no W_i is ever made (the dual form of Behrouz et al. 2024, 3.2):

    W_i a = b_i W a + f_i S a - sum_{j<=i} G_ij (x_j . a) d_j,    G = R diag(live) H diag(theta)

R_ij and H_ij are what remains at i of weights and of momentum written at j: products of 1 - alpha and of eta. With a
gate for each output channel of a layer there are as many b, f and G as channels, and XLA runs the chunk.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.neural_memory.reference import NORM_EPSILON
from kernels.recurrent.layout import Inputs, State
from kernels.recurrent.tile import Arithmetic, as_column, places, product

_GELU = math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tanh form of gelu and its derivative."""
    square = x * x
    tanh = jnp.tanh(_GELU * x * (1 + _GELU_CUBE * square))
    slope = 0.5 * (1 + tanh) + 0.5 * _GELU * x * (1 - tanh * tanh) * (1 + 3 * _GELU_CUBE * square)
    return 0.5 * x * (1 + tanh), slope


def remains(factor: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Products of a row of factors (1, time), exact where a factor is 0.

    Returns:
      between (time, time): prod_{j<t<=i} factor_t, 1 on the diagonal and 0 above it.
      since_start (time, 1): prod_{t<=i} factor_t.
      until_end (1, time): prod_{t>j} factor_t.
    """
    length = factor.shape[1]
    missing = (1 << (length - 1).bit_length()) - length
    if missing:  # in XLA only: chunks of a Pallas kernel are powers of 2
        between, since, until = remains(jnp.pad(factor, ((0, 0), (0, missing)), constant_values=1.0))
        return between[:length, :length], since[:length], until[:, :length]
    # The binary tree over the chunk, leaves first: of a node, `since` multiplies from its start on, `until` to its end.
    i, j = places(length, length)
    between, since, until = (i == j).astype(factor.dtype), factor, jnp.ones_like(factor)
    _, place = places(1, length)
    shift = 0
    while 1 << shift < length:
        half = 1 << shift
        siblings = ((i >> shift) ^ (j >> shift)) == 1
        i_upper, upper = ((i >> shift) & 1) == 1, ((place >> shift) & 1) == 1
        column = as_column(since)
        between += jnp.where(siblings & i_upper, column * until, 0.0)
        # Column j receives the product of the whole sibling, which its last token i holds.
        sibling = jnp.sum(jnp.where(siblings & ((i & (half - 1)) == half - 1), column, 0.0), axis=0, keepdims=True)
        since = since * jnp.where(upper, sibling, 1.0)
        until = until * jnp.where(upper, 1.0, sibling)
        shift += 1
    return between, as_column(since), until


class _Momentum(NamedTuple):
    """The part of `_Gates` that belongs to momentum."""

    into_weights: jax.Array  # f: what the first momentum has become in the weights
    into_weights_after: jax.Array  # f after the chunk, (1, 1) or (out, 1)
    after: jax.Array  # what remains of the first momentum after the chunk, likewise
    steps: jax.Array  # what remains then of each token's gradient


class _Gates(NamedTuple):
    """What a layer's gates make of a chunk: numbers a token (time, 1), or a token and output channel (time, out)."""

    written: jax.Array  # G (time, time) or (out, time, time)
    since: jax.Array  # b: what remains of the first weights
    after: jax.Array  # b after the chunk, (1, 1) or (out, 1)
    steps: jax.Array  # the last row of G: what remains then of each token's gradient
    momentum: _Momentum | None


def _scalar_gates(
    alpha: jax.Array, eta: jax.Array | None, theta: jax.Array, live: jax.Array, arithmetic: Arithmetic
) -> _Gates:
    """Of gates (1, time), on matrices of two axes."""
    theta = jnp.where(live > 0, theta, 0.0)
    kept, since, _ = remains(jnp.where(live > 0, 1 - alpha, 1.0))
    if eta is None:
        written = kept * theta
        return _Gates(written, since, _last(since), as_column(_last(written)), None)
    pushed, pushed_since, pushed_until = remains(jnp.where(live > 0, eta, 1.0))
    written = product(kept * live, pushed, (1, 0), arithmetic) * theta
    from_past = jnp.sum(kept * live * _as_row(pushed_since), axis=1, keepdims=True)
    momentum = _Momentum(from_past, _last(from_past), _last(pushed_since), as_column(theta * pushed_until))
    return _Gates(written, since, _last(since), as_column(_last(written)), momentum)


def _channel_gates(
    alpha: jax.Array, eta: jax.Array | None, theta: jax.Array, live: jax.Array, arithmetic: Arithmetic
) -> _Gates:
    """Of gates (time, out), with arrays of three axes."""
    by_channel = jax.vmap(lambda row: remains(row[None]), in_axes=1)
    exists = as_column(live) > 0
    theta = jnp.where(exists, theta, 0.0).T[:, None]  # (out, 1, time)
    kept, since, _ = by_channel(jnp.where(exists, 1 - alpha, 1.0))
    since = since[:, :, 0].T
    if eta is None:
        written = kept * theta
        return _Gates(written, since, since[-1][:, None], written[:, -1].T, None)
    pushed, pushed_since, pushed_until = by_channel(jnp.where(exists, eta, 1.0))
    written = jnp.einsum("oij,ojk->oik", kept * live, pushed, precision=arithmetic.precision) * theta
    from_past = jnp.sum(kept * live * pushed_since.swapaxes(1, 2), axis=2).T
    momentum = _Momentum(from_past, from_past[-1][:, None], pushed_since[:, -1], (theta * pushed_until)[:, 0].T)
    return _Gates(written, since, since[-1][:, None], written[:, -1].T, momentum)


def _last(matrix: jax.Array) -> jax.Array:
    """The last row, (1, columns)."""
    row, _ = places(*matrix.shape)
    return jnp.sum(jnp.where(row == matrix.shape[0] - 1, matrix, 0.0), axis=0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`kernels.recurrent.Chunk` of the memory.

    State: W of each layer (out, in), with momentum S of each, with a norm its scale and bias (1, D), and, unless every
    chunk starts at a border, the border's weights of each layer.

    Inputs: query, key, value (time, D); alpha_l, theta_l and with momentum eta_l for each layer l, (1, time), or with
    `channels` (time, out); unless every chunk starts at a border live and complete (1, time), 1 or 0.
    """

    layers: int
    width: int  # D, without padding
    momentum: bool
    norm: bool
    aligned: bool  # every chunk starts at a border
    channels: bool  # gates are of output channels
    name: str = "neural_memory"

    @property
    def value_states(self) -> tuple[bool, ...]:
        """None: a token's error is normalised over all channels."""
        networks = 1 + self.momentum + (not self.aligned)
        return (False,) * (networks * self.layers + 2 * self.norm)

    def __call__(
        self, state: State, inputs: Inputs, tokens: jax.Array | None, arithmetic: Arithmetic
    ) -> tuple[State, jax.Array]:
        """One chunk, at most up to a border."""
        # Training amplifies what products lose: bfloat16 factors alone miss the outputs' tolerance.
        arithmetic = arithmetic._replace(fine=arithmetic.dtype == jnp.bfloat16)
        rest = list(state)

        def take(count: int) -> list[jax.Array]:
            taken, rest[:] = rest[:count], rest[count:]
            return taken

        weights = take(self.layers)
        momentum = take(self.layers if self.momentum else 0)
        norm = take(2 if self.norm else 0)
        border = take(self.layers) or weights
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        length = query.shape[0]

        _, column = places(1, length)
        live = jnp.ones((1, length), query.dtype) if self.aligned else inputs["live"]
        if tokens is not None:
            live = jnp.where(column < tokens, live, 0.0)
        layer_inputs, errors = self._gradients(border, norm, key, value, arithmetic)

        make_gates = _channel_gates if self.channels else _scalar_gates
        x, next_weights, next_momentum = query, [], []
        for layer, weight in enumerate(weights):
            if layer:
                x, _ = _gelu(x)
            gates = make_gates(
                inputs[f"alpha_{layer}"], inputs.get(f"eta_{layer}"), inputs[f"theta_{layer}"], live, arithmetic
            )
            overlap = product(x, layer_inputs[layer], (1, 1), arithmetic)
            y = gates.since * product(x, weight, (1, 1), arithmetic)
            if self.channels:
                y -= jnp.einsum("ij,oij,jo->io", overlap, gates.written, errors[layer], precision=arithmetic.precision)
            else:
                y -= product(overlap * gates.written, errors[layer], (1, 0), arithmetic)
            after = gates.after * weight
            if gates.momentum is not None:
                past, of = momentum[layer], gates.momentum
                y += of.into_weights * product(x, past, (1, 1), arithmetic)
                after += of.into_weights_after * past
                steps = product(of.steps * errors[layer], layer_inputs[layer], (0, 0), arithmetic)
                next_momentum.append(of.after * past - steps)
            steps = product(gates.steps * errors[layer], layer_inputs[layer], (0, 0), arithmetic)
            next_weights.append(after - steps)
            x = y
        out = query + self._normalised(x)[0] * norm[0] + norm[1] if norm else x
        after_border: list[jax.Array] = []
        if not self.aligned:
            complete = jnp.sum(inputs["complete"], axis=1, keepdims=True) > 0
            after_border = [jnp.where(complete, w, old) for w, old in zip(next_weights, border, strict=True)]
        return (*next_weights, *next_momentum, *norm, *after_border), out

    def _gradients(
        self, weights: list[jax.Array], norm: list[jax.Array], key: jax.Array, value: jax.Array, arithmetic: Arithmetic
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Of |M(k) - v|^2 by each layer's weights, as factors: the layer's inputs and the gradients at its outputs."""
        layer_inputs, slopes, y = [key], [], key
        for layer, weight in enumerate(weights):
            if layer:
                y, slope = _gelu(y)
                layer_inputs.append(y)
                slopes.append(slope)
            y = product(y, weight, (1, 1), arithmetic)
        if norm:
            normalised, deviation = self._normalised(y)
            error = 2 * (key + normalised * norm[0] + norm[1] - value) * norm[0]
            along = jnp.sum(error * normalised, axis=1, keepdims=True) / self.width
            error = self._centred(error) - normalised * along
            error = deviation * error
        else:
            error = 2 * (y - value)
        errors = [error]
        for weight, slope in zip(weights[:0:-1], slopes[::-1], strict=True):
            error = product(error, weight, (1, 0), arithmetic) * slope
            errors.append(error)
        return layer_inputs, errors[::-1]

    def _centred(self, x: jax.Array) -> jax.Array:
        x = x - jnp.sum(x, axis=1, keepdims=True) / self.width
        if x.shape[1] == self.width:
            return x
        return jnp.where(places(*x.shape)[1] < self.width, x, 0.0)  # what a platform padded stays zero

    def _normalised(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of mean 0 and variance 1, and one over the standard deviation."""
        x = self._centred(x)
        deviation = jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / self.width + NORM_EPSILON)
        return x * deviation, deviation


def _as_row(column: jax.Array) -> jax.Array:
    """(time, 1) -> (1, time)."""
    i, j = places(column.shape[0], column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0.0), axis=0, keepdims=True)

"""Memories of two layers with a gate for each channel, and the losses and retentions of Miras (Behrouz et al. 2025)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from kernels import recurrent
from kernels.common import Implementation, check_heads, check_implementation, on_each_device, round_up
from kernels.neural_memory.bias import GRADIENTS, check_bias
from kernels.neural_memory.chunked import remains
from kernels.neural_memory.reference import NORM_EPSILON

Retention = Literal["l2", "lq", "kl"]
Layers = tuple[jax.Array, jax.Array]
Norm = tuple[jax.Array, jax.Array]
_einsum = partial(jnp.einsum, precision="highest")


class RetainedState(NamedTuple):
    """A memory after some tokens, float32; arrays of both layers."""

    kept: Layers  # (batch, heads, out, in): what decays: weights, their unnormalised sum, or their logarithms
    learned_at: Layers  # the weights at which the next token's gradient is taken
    scale: Layers  # (batch, heads): the last border's norms, 1 where retention is not "lq"
    tokens: jax.Array  # int32 (batch,): read since the last border, 0 .. chunk_size - 1


def initial_retained(weights: Layers, batch_size: int, retention: Retention = "l2", q: float = 4.0) -> RetainedState:
    """The memory before the first token, of weights (heads, out, in); with "kl" they are made logarithms."""
    first = tuple(jnp.broadcast_to(w.astype(jnp.float32), (batch_size, *w.shape)) for w in weights)
    if retention == "kl":
        first = tuple(jax.nn.log_softmax(w.shape[-1] ** 0.5 * w, axis=-1) for w in first)
    kept, learned_at, scale = _border((first[0], first[1]), retention, q)
    return RetainedState(kept, learned_at, scale, jnp.zeros(batch_size, jnp.int32))


def retained_memory(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    alpha: jax.Array,
    eta: jax.Array,
    memory: Layers | RetainedState,
    norm: Norm,
    *,
    bias: str = "l2",
    retention: Retention = "l2",
    delta: jax.Array | None = None,
    p: float = 3.0,
    q: float = 4.0,
    chunk_size: int = 16,
    lengths: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, RetainedState]:
    """Trains M(x) = x + LN(W_2 gelu(W_1 x)) on each token, forgetting channel by channel, and reads it after each.

    With u_t the gradient of <e_t, M(k_t)> by W, e_t that of `bias` by the answer M(k_t):

        l2:  W_t = alpha_t W_(t-1) - eta_t u_t
        lq:  A_t = alpha_t A_(t-1) - eta_t u_t,  W_t = A_t / |A_t|_q^(q - 2), norms over a layer's matrix
        kl:  L_t = alpha_t L_(t-1) - eta_t u_t,  W_t = softmax(L_t) over the inputs of each output

    (Behrouz et al. 2025, sections 5.2 and 5.3.) Gates stand on the axis of D channels of each matrix: columns of W_1,
    rows of W_2. Gradients are taken at the weights of the last border, every `chunk_size` tokens; 1 is the online rule.
    Between borders "lq" divides by the last border's norm; "kl" takes the gradients of all but a chunk's first token at
    the weights after that one ("lag token"), and normalises logarithms at borders.

    Args:
      query, key, value: (batch, time, heads, D), of one dtype.
      alpha, eta: (batch, time, heads, D): what is retained, in [0, 1], and the step, >= 0.
      memory: initial weights (heads, hidden, D) and (heads, D, hidden), or the state that an earlier call returned.
      norm: scale and bias (heads, D) of the layer norm.
      bias: a name of `attentional_bias`.
      retention: "l2", "lq" or "kl".
      delta: (batch, time, heads), > 0: the threshold of biases that have one; None is 1.
      p, q: exponents of "lp" and "lq", real numbers.
      chunk_size: tokens between borders, part of the model.
      lengths: int (batch,), tokens of each sequence that exist, the first ones; None is all of them.
      implementation: "reference", "chunked", or None, which is "chunked" on every platform.

    Returns:
      out (batch, time, heads, D) in the inputs' dtype, and the state after the last token.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong, or there is no such implementation.
    """
    check_implementation(implementation)
    if implementation in ("tpu", "gpu"):
        raise ValueError(
            f"retained_memory has no Pallas kernel ({implementation!r}): with a gate for each channel what remains "
            "between two tokens of a chunk is a vector, and with softmax retention each token has weights of its own, "
            "neither of which the kernels' two-dimensional tiles hold; None and 'chunked' run on every platform"
        )
    _check(query, key, value, alpha, eta, memory, norm, bias, retention, delta, p, q, chunk_size, lengths)
    batch, time, heads, _ = query.shape
    state = memory if isinstance(memory, RetainedState) else initial_retained(memory, batch, retention, q)
    aligned = not isinstance(memory, RetainedState)
    if delta is None:
        delta = jnp.ones((batch, time, heads))
    lengths = jnp.full(batch, time, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    live = jnp.arange(time)[None] < lengths[:, None]
    of_token = [(state.tokens[:, None] + jnp.arange(time)) % chunk_size, live]
    inputs = [query, key, value, alpha, eta, delta]
    inputs += [jnp.broadcast_to(x[..., None], (batch, time, heads)) for x in of_token]
    inputs = [x.astype(jnp.float32) for x in inputs]
    rule = _Rule(bias, retention, float(p), float(q), chunk_size)
    one, size = (_tokens, time) if implementation == "reference" or time == 1 else (_chunk, chunk_size)
    if one is _chunk:  # onto a grid that starts at a border
        grid = jnp.arange(round_up(time if aligned else time + chunk_size - 1, chunk_size))
        inputs = [_take(x, grid[None] - state.tokens[:, None]) for x in inputs]
    of_layers, of_scale = ("bh..",) * 2, ("bh",) * 2
    out, (kept, learned_at, scale) = on_each_device(
        partial(_scan, rule, one, size),
        (tuple(inputs), (state.kept, state.learned_at, state.scale), norm),
        (("b.h.",) * 5 + ("b.h",) * 3, (of_layers, of_layers, of_scale), ("h.", "h.")),
        ("b.h.", (of_layers, of_layers, of_scale)),
    )
    if one is _chunk:
        out = _take(out, jnp.arange(time)[None] + state.tokens[:, None])
    out = out.astype(query.dtype)
    return out, RetainedState(kept, learned_at, scale, (state.tokens + lengths) % chunk_size)


class _Rule(NamedTuple):
    """What the memory is trained for, and how it forgets."""

    bias: str
    retention: Retention
    p: float
    q: float
    chunk_size: int


_Past = tuple[Layers, Layers, Layers]  # kept, learned_at, scale of a `RetainedState`


def _scan(
    rule: _Rule, one: Any, size: int, inputs: tuple[jax.Array, ...], past: _Past, norm: Norm
) -> tuple[jax.Array, _Past]:
    """All chunks of `size` tokens of all heads, inputs (B, time, H, ...). The gradient keeps the states between."""

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 3)  # (chunks, B, H, size, ...)

    by_head = jax.vmap(partial(one, rule), in_axes=(0, 0, 0))
    by_batch = jax.vmap(by_head, in_axes=(0, 0, None))

    @jax.checkpoint
    def step(past: _Past, now: tuple[jax.Array, ...]) -> tuple[_Past, jax.Array]:
        return by_batch(past, now, jax.tree.map(lambda x: x.astype(jnp.float32), norm))

    past, out = jax.lax.scan(step, past, tuple(map(cut, inputs)))
    out = jnp.moveaxis(jnp.moveaxis(out, 3, 2), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:]), past


# ------------------------------------------------------------------------------------------- one chunk of one head


def _read(weights: Layers, norm: Norm, x: jax.Array) -> jax.Array:
    """M(x) of (D,) or (time, D)."""
    return _finish(x, _einsum("oi,...i->...o", weights[1], _gelu(_einsum("oi,...i->...o", weights[0], x))), norm)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _finish(x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
    y = y - y.mean(axis=-1, keepdims=True)
    return x + y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPSILON) * norm[0] + norm[1]


def _factors(
    rule: _Rule, weights: Layers, norm: Norm, key: jax.Array, value: jax.Array, delta: jax.Array
) -> tuple[Layers, Layers]:
    """Gradients by each layer, as factors: a token's inputs (time, in) and gradients at its outputs (time, out)."""
    first = _einsum("oi,ti->to", weights[0], key)
    hidden, pull_gelu = jax.vjp(_gelu, first)
    answer, pull_norm = jax.vjp(lambda y: _finish(key, y, norm), _einsum("oi,ti->to", weights[1], hidden))
    (second_error,) = pull_norm(GRADIENTS[rule.bias](answer, value, delta[:, None], rule.p))
    (first_error,) = pull_gelu(_einsum("oi,to->ti", weights[1], second_error))
    return (key, hidden), (first_error, second_error)


def _border(kept: Layers, retention: Retention, q: float) -> _Past:
    """What a border makes of what was kept: (..., out, in)."""
    ones = tuple(jnp.ones(layer.shape[:-2], jnp.float32) for layer in kept)
    if retention == "lq":
        scale = tuple(_norm(layer, q) for layer in kept)
        return kept, tuple(layer / s[..., None, None] for layer, s in zip(kept, scale, strict=True)), scale  # type: ignore[return-value]
    if retention == "kl":
        kept = (jax.nn.log_softmax(kept[0], axis=-1), jax.nn.log_softmax(kept[1], axis=-1))
        return kept, (jnp.exp(kept[0]), jnp.exp(kept[1])), ones  # type: ignore[return-value]
    return kept, kept, ones  # type: ignore[return-value]


def _norm(layer: jax.Array, q: float) -> jax.Array:
    """|A|_q^(q - 2), with smooth absolutes so that it has a gradient everywhere."""
    return jnp.sum((layer * layer + 1e-12) ** (q / 2), axis=(-2, -1)) ** ((q - 2) / q)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _gates(gate: jax.Array) -> Layers:
    """Of a token's (D,), for both layers: columns of the first, rows of the second."""
    return gate[None, :], gate[:, None]


def _tokens(rule: _Rule, past: _Past, inputs: tuple[jax.Array, ...], norm: Norm) -> tuple[_Past, jax.Array]:
    """Token by token: the definition."""

    def token(past: _Past, now: Any) -> tuple[_Past, jax.Array]:
        kept, learned_at, scale = past
        query, key, value, alpha, eta, delta, place, live = now
        layer_inputs, errors = _factors(rule, learned_at, norm, key[None], value[None], delta[None])
        after: Any = tuple(
            a * w - e * jnp.outer(error[0], x[0])
            for a, e, w, x, error in zip(_gates(alpha), _gates(eta), kept, layer_inputs, errors, strict=True)
        )
        last = place == rule.chunk_size - 1
        border = _border(after, rule.retention, rule.q)
        if rule.retention == "lq":
            weights: Any = tuple(w / jnp.where(last, n, o) for w, n, o in zip(after, border[2], scale, strict=True))
        else:
            weights = border[1]
        out = _read(weights, norm, query)
        here = (after, weights if rule.retention == "kl" else learned_at, scale)
        # Of a chunk, "kl" goes on learning at the weights after its first token.
        here = (here[0], _where(place == 0, here[1], learned_at), here[2])
        return _where(live > 0, _where(last, border, here), past), out

    return jax.lax.scan(token, past, inputs)


def _chunk(rule: _Rule, past: _Past, inputs: tuple[jax.Array, ...], norm: Norm) -> tuple[_Past, jax.Array]:
    """A chunk at once. W_i = b_i W - sum_(j<=i) G_ij u_j, G_ij and b_i products of alpha, vectors over channels."""
    kept, learned_at, scale = past
    query, key, value, alpha, eta, delta, _, live = inputs
    exists = live[:, None] > 0
    alpha, eta = jnp.where(exists, alpha, 1.0), jnp.where(exists, eta, 0.0)
    between, since, _ = jax.vmap(lambda row: remains(row[None]), in_axes=1)(alpha)
    written = between.transpose(1, 2, 0) * eta[None]  # G (i, j, D)
    since = since[:, :, 0].T  # b (i, D)

    if rule.retention == "kl":
        start = _factors(rule, learned_at, norm, key[:1], value[:1], delta[:1])
        second = _logarithms(kept, start, written[:1, :1], since[:1])
        lagged: Any = tuple(jax.nn.softmax(layer[0], axis=-1) for layer in second)
        learned_at = _where(live[0] > 0, lagged, learned_at)
        rest = _factors(rule, learned_at, norm, key[1:], value[1:], delta[1:])
        factors = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), start, rest)
        logarithms = _logarithms(kept, factors, written, since)
        first, last = (jax.nn.softmax(layer, axis=-1) for layer in logarithms)
        hidden = _gelu(_einsum("toi,ti->to", first, query))
        out = _finish(query, _einsum("toi,ti->to", last, hidden), norm)
        after: Any = tuple(layer[-1] for layer in logarithms)
    else:
        (keys, hidden), (first_error, second_error) = _factors(rule, learned_at, norm, key, value, delta)
        after = (
            since[-1][None] * kept[0] - _einsum("jo,ji,ji->oi", first_error, written[-1], keys),
            since[-1][:, None] * kept[1] - _einsum("jo,jo,ji->oi", written[-1], second_error, hidden),
        )
        divisors: Any = (1.0, 1.0)
        if rule.retention == "lq":
            own = (live[-1] > 0) & (jnp.arange(rule.chunk_size) == rule.chunk_size - 1)
            divisors = tuple(jnp.where(own, _norm(w, rule.q), s)[:, None] for w, s in zip(after, scale, strict=True))
        overlap = _einsum("ti,tji,ji->tj", query, written, keys)
        z = _einsum("oi,ti->to", kept[0], since * query) - _einsum("tj,jo->to", overlap, first_error)
        a = _gelu(z / divisors[0])
        overlap = _einsum("ti,ji->tj", a, hidden)
        z = since * _einsum("oi,ti->to", kept[1], a) - _einsum("tj,tjo,jo->to", overlap, written, second_error)
        out = _finish(query, z / divisors[1], norm)
    here = (after, learned_at, scale)
    return _where(live[-1] > 0, _border(after, rule.retention, rule.q), here), out


def _logarithms(kept: Layers, factors: tuple[Layers, Layers], written: jax.Array, since: jax.Array) -> Layers:
    """L_i of both layers for each token, (time, out, in)."""
    (keys, hidden), (first_error, second_error) = factors
    first = since[:, None, :] * kept[0] - _einsum("jo,tji,ji->toi", first_error, written, keys)
    second = since[:, :, None] * kept[1] - _einsum("tjo,jo,ji->toi", written, second_error, hidden)
    return first, second


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """(B, T, ...) at times `index` (B, N), zeros where there is no such time."""
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0, wrap_negative_indices=False))(array, index)


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, alpha: jax.Array, eta: jax.Array,
    memory: Layers | RetainedState, norm: Norm, bias: str, retention: str, delta: jax.Array | None, p: float, q: float,
    chunk_size: int, lengths: jax.Array | None,
) -> None:  # fmt: skip
    check_heads(query, key, value)
    if not query.shape == key.shape == value.shape:
        raise ValueError(f"query, key and value must have one shape, got {query.shape}, {key.shape}, {value.shape}")
    batch, time, heads, width = query.shape
    check_bias(bias, p)
    if retention not in get_args(Retention):
        raise ValueError(f"retention must be one of {get_args(Retention)}, got {retention!r}")
    if not q >= 2:
        raise ValueError(f"q must be at least 2, got {q}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer and at least 1, got {chunk_size!r}")
    weights = memory.kept if isinstance(memory, RetainedState) else memory
    if len(weights) != 2:
        raise ValueError(f"memory must have two layers, got {len(weights)}")
    leading = (batch, heads) if isinstance(memory, RetainedState) else (heads,)
    hidden = weights[0].shape[-2]
    recurrent.check_array("weights of layer 0", weights[0], (*leading, hidden, width))
    recurrent.check_array("weights of layer 1", weights[1], (*leading, width, hidden))
    for name, gate in (("alpha", alpha), ("eta", eta)):
        recurrent.check_array(name, gate, (batch, time, heads, width))
    if delta is not None:
        recurrent.check_array("delta", delta, (batch, time, heads))
    for name, array in zip(("norm scale", "norm bias"), norm, strict=True):
        recurrent.check_array(name, array, (heads, width))
    if lengths is not None and (lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"lengths must be integers ({batch},), got {lengths.dtype} {lengths.shape}")

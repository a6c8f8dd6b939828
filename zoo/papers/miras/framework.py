"""The framework on a matrix memory: any attentional bias with any retention, and earlier models as pairs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels.neural_memory import attentional_bias, smooth_absolute
from zoo.errors import unknown


class RetentionOptions(NamedTuple):
    """Numbers of retentions: see `retention`."""

    q: float = 4.0
    beta: float = 4.0
    a: float = 50.0
    mass: float = 1.0
    link: Literal["printed", "exact"] = "printed"
    smooth: bool = False


class Rule(NamedTuple):
    """A retention: how a memory W (..., out, in) starts, steps and is read.

    `start` makes what is kept of first weights; `step` (kept, gradient, eta, alpha, options) is the next of it; `read`
    gives the weights of what is kept.
    """

    start: Callable[[jax.Array, RetentionOptions], jax.Array]
    step: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, RetentionOptions], jax.Array]
    read: Callable[[jax.Array, RetentionOptions], jax.Array]


def _same(weights: jax.Array, options: RetentionOptions) -> jax.Array:
    return weights


def _lq_link(kept: jax.Array, options: RetentionOptions) -> jax.Array:
    """A / |A|_q^(q - 2), as printed; or exactly sign(A) |A|^(p - 1) / |A|_p^(p - 2), p = q / (q - 1) conjugate to q."""
    if options.link == "printed":
        norm = jnp.sum(smooth_power(kept, options.q), axis=(-2, -1), keepdims=True) ** (1 / options.q)
        return kept / norm ** (options.q - 2)
    p = options.q / (options.q - 1)
    norm = jnp.sum(smooth_power(kept, p), axis=(-2, -1), keepdims=True) ** (1 / p)
    return jnp.sign(kept) * smooth_power(kept, p - 1) / norm ** (p - 2)


def smooth_power(x: jax.Array, exponent: float) -> jax.Array:
    """|x|^exponent with a gradient at 0."""
    return (x * x + 1e-12) ** (exponent / 2)


def _shrink(x: jax.Array, gamma: jax.Array, smooth: bool) -> jax.Array:
    """Soft threshold; smooth: x |atan(x / gamma)| / (pi / 2), with which training goes through it."""
    if smooth:
        return x * smooth_absolute(jnp.arctan(x / gamma)) / (jnp.pi / 2)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - gamma, 0.0)


def _elastic(
    kept: jax.Array, gradient: jax.Array, eta: jax.Array, alpha: jax.Array, options: RetentionOptions
) -> jax.Array:
    weight = options.beta / (options.beta + eta)
    gamma = eta * options.beta / (options.a * (eta + options.beta))
    return _shrink(weight * (kept - eta * gradient), gamma, options.smooth)


def _chi_square(
    kept: jax.Array, gradient: jax.Array, eta: jax.Array, alpha: jax.Array, options: RetentionOptions
) -> jax.Array:
    """f(x) = (x - 1)^2 / 2: W max(1 - zeta - eta G, 0), zeta by bisection so that each row keeps its mass."""
    push = eta * gradient

    def total(zeta: jax.Array) -> jax.Array:
        return jnp.sum(kept * jnp.maximum(1 - zeta - push, 0.0), axis=-1, keepdims=True)

    low, high = -jnp.max(push, axis=-1, keepdims=True), 1 - jnp.min(push, axis=-1, keepdims=True)

    def halve(ends: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        low, high = ends
        middle = (low + high) / 2
        more = total(middle) > options.mass
        return (jnp.where(more, middle, low), jnp.where(more, high, middle)), None

    (low, high), _ = jax.lax.scan(halve, (low, high), None, length=40)
    # One step of Newton's from the root, in which gradients of the mass constraint pass.
    zeta = jax.lax.stop_gradient((low + high) / 2)
    slope = -jnp.sum(jnp.where(1 - zeta - push > 0, kept, 0.0), axis=-1, keepdims=True)
    zeta = zeta - (total(zeta) - options.mass) / jax.lax.stop_gradient(slope)
    return kept * jnp.maximum(1 - zeta - push, 0.0)


def _softmax(x: jax.Array, mass: float) -> jax.Array:
    return mass * jax.nn.softmax(x, axis=-1)


def _row_simplex(weights: jax.Array, options: RetentionOptions) -> jax.Array:
    return options.mass * weights / weights.sum(axis=-1, keepdims=True)


RETENTIONS: Mapping[str, Rule] = {
    "none": Rule(_same, lambda w, g, eta, alpha, o: w - eta * g, _same),
    "l2": Rule(_same, lambda w, g, eta, alpha, o: alpha * w - eta * g, _same),
    "lq": Rule(_same, lambda a, g, eta, alpha, o: alpha * a - eta * g, _lq_link),
    "kl": Rule(
        lambda w, o: jnp.log(w / o.mass),
        lambda log, g, eta, alpha, o: jax.nn.log_softmax(alpha * log - eta * g, axis=-1),
        lambda log, o: o.mass * jnp.exp(log),
    ),
    "f_divergence": Rule(_row_simplex, _chi_square, _same),
    "elastic": Rule(_same, _elastic, _same),
    "elastic_ftrl": Rule(
        _same, lambda a, g, eta, alpha, o: a - eta * g, lambda a, o: a
    ),  # the threshold is of the token's eta: see `framework_scan`
    "bregman_sigmoid": Rule(
        lambda w, o: jnp.log(w) - jnp.log1p(-w),
        lambda logit, g, eta, alpha, o: logit - eta * g,
        lambda logit, o: jax.nn.sigmoid(logit),
    ),
}


def retention(
    name: str,
    weights: jax.Array,
    gradient: jax.Array,
    eta: jax.Array | float,
    alpha: jax.Array | float = 1.0,
    **options: Any,
) -> jax.Array:
    """The weights after one gradient (Behrouz et al. 2025, sections 4.3 and 5.2).

    "none" W - eta G; "l2" alpha W - eta G; "lq" the sum A = alpha A - eta G, divided by |A|_q^(q - 2); "kl" mass *
    softmax(alpha log W - eta G) over the inputs of each output; "f_divergence" (chi-square) W max(1 - zeta - eta G, 0),
    each row keeping its mass; "elastic" the soft threshold of lambda (W - eta G), lambda = beta / (beta + eta), at eta
    beta / (a (eta + beta)); "elastic_ftrl" that of the sum A - eta G at eta / a; "bregman_sigmoid" sigmoid(logit(W) -
    eta G).
    In "lq" and "elastic_ftrl" the argument is the sum and not its link.

    Args:
      name: of the retention.
      weights: float (..., out, in).
      gradient: like weights; a momentum, where the algorithm has one.
      eta, alpha: step and what is retained; broadcast to weights.
      **options: fields of `RetentionOptions`: q; beta and a of the elastic nets; the mass of simplices; link "printed"
        or "exact" of "lq"; smooth thresholds, for training.

    Returns:
      Weights after the step, like `weights`.

    Raises:
      ValueError: the name is unknown.
    """
    rule, chosen = _rule(name), RetentionOptions(**options)
    eta, alpha = jnp.asarray(eta), jnp.asarray(alpha)
    return _read(name, rule.step(rule.start(weights, chosen), gradient, eta, alpha, chosen), eta, chosen)


def _rule(name: str) -> Rule:
    if name not in RETENTIONS:
        raise unknown("retention", name, RETENTIONS)
    return RETENTIONS[name]


def _read(name: str, kept: jax.Array, eta: jax.Array, options: RetentionOptions) -> jax.Array:
    if name == "elastic_ftrl":
        return _shrink(kept, eta / options.a, options.smooth)
    return RETENTIONS[name].read(kept, options)


def framework_scan(
    bias: str,
    retention: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    eta: jax.Array,
    alpha: jax.Array | None = None,
    memory: jax.Array | None = None,
    *,
    momentum: float | None = None,
    implicit: bool = False,
    delta: jax.Array | float = 1.0,
    p: float = 3.0,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """A matrix memory trained token by token: y_t = W_t q_t, W_t after a step on (k_t, v_t).

    Args:
      bias: of `kernels.neural_memory.attentional_bias`.
      retention: of `RETENTIONS`.
      query, key: (batch, time, D).
      value: (batch, time, E).
      eta: (batch, time), the steps.
      alpha: what is retained, (batch, time), or (batch, time, D) for each column of the memory; None is 1.
      memory: first weights (E, D) or (batch, E, D); None is zeros.
      momentum: m steps on S = m S + G; None on the gradient G.
      implicit: of the l2 bias, the step's loss is that after the step (Longhorn): eta / (1 + eta |k|^2).
      delta, p: of the bias.
      **options: of `retention`.

    Returns:
      y (batch, time, E), and the last weights (batch, E, D).

    Raises:
      ValueError: a name is unknown, a shape wrong, or the step implicit with another bias than l2.
    """
    rule, chosen = _rule(retention), RetentionOptions(**options)
    if implicit and bias != "l2":
        raise ValueError(f"an implicit step has a closed form for the bias 'l2' only, got {bias!r}")
    if query.shape != key.shape or query.ndim != 3 or value.shape[:2] != key.shape[:2] or value.ndim != 3:
        raise ValueError(
            "query and key must be (batch, time, D), value (batch, time, E), "
            f"got {query.shape}, {key.shape}, {value.shape}"
        )
    batch, time, width = key.shape
    if eta.shape != (batch, time):
        raise ValueError(f"eta must be (batch, time) = {(batch, time)}, got {eta.shape}")
    alpha = jnp.ones((batch, time)) if alpha is None else alpha
    if alpha.shape not in ((batch, time), (batch, time, width)):
        raise ValueError(f"alpha must be {(batch, time)} or {(batch, time, width)}, got {alpha.shape}")
    shape = (batch, value.shape[2], width)
    memory = jnp.zeros(shape) if memory is None else jnp.broadcast_to(memory, shape)
    columns = alpha.reshape(batch, time, 1, -1)

    def token(carry: Any, now: Any) -> Any:
        kept, weights, push = carry
        query, key, value, eta, alpha = now
        answer = jnp.einsum("bed,bd->be", weights, key, precision="highest")
        _, error = attentional_bias(bias, answer, value, delta=delta, p=p)
        gradient = error[:, :, None] * key[:, None, :]
        push = gradient if momentum is None else momentum * push + gradient
        step = eta / (1 + eta * jnp.sum(key * key, axis=-1)) if implicit else eta
        step = step[:, None, None]
        kept = rule.step(kept, push, step, alpha, chosen)
        weights = _read(retention, kept, step, chosen)
        return (kept, weights, push), jnp.einsum("bed,bd->be", weights, query, precision="highest")

    kept = rule.start(memory, chosen)
    # Sums that a link turns into weights start as the weights themselves.
    first = memory if retention in ("lq", "elastic_ftrl") else rule.read(kept, chosen)
    sequence = jax.tree.map(lambda x: x.swapaxes(0, 1), (query, key, value, eta, columns))
    (_, weights, _), y = jax.lax.scan(token, (kept, first, jnp.zeros(shape)), sequence)
    return y.swapaxes(0, 1), weights


@dataclasses.dataclass(frozen=True)
class Instance:
    """An earlier model as the framework describes it (table 1).

    Attributes:
      memory: its architecture.
      bias, retention: of `framework_scan`; None where the memory is no matrix.
      algorithm: of the inner training.
      mixer: its name in `zoo.mixers`, or None.
      gates: what its gates are: alpha none, one a head "head", one a token "token", or one a column "columns".
      decay_first: the memory decays before the gradient is taken and not after, so that a step is larger by that.
      implicit: the implicit step.
    """

    memory: str
    bias: str | None
    retention: str | None
    algorithm: str = "GD"
    mixer: str | None = None
    gates: Literal["none", "head", "token", "columns"] = "none"
    decay_first: bool = False
    implicit: bool = False

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        eta: jax.Array | None = None,
        alpha: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Runs a matrix memory from zeros; see `framework_scan`.

        Args:
          query, key, value: (batch, time, width).
          eta: (batch, time); None is 1.
          alpha: as the instance's gates are: (batch,), (batch, time) or (batch, time, width).

        Raises:
          ValueError: the memory is no matrix, or alpha missing.
        """
        if self.bias is None or self.retention is None or self.memory != "matrix":
            raise ValueError(
                f"the framework runs a memory that is a matrix, got {self.memory!r}"
                + (f"; this instance is the mixer {self.mixer!r}" if self.mixer else "")
            )
        if (alpha is None) != (self.gates == "none"):
            raise ValueError(
                f"an instance with gates {self.gates!r} {'takes no' if self.gates == 'none' else 'needs'} alpha"
            )
        eta = jnp.ones(key.shape[:2]) if eta is None else eta
        if alpha is not None and self.gates == "head":
            alpha = jnp.broadcast_to(alpha[:, None], key.shape[:2])
        if self.decay_first and alpha is not None:
            # alpha W - b (alpha W k - v) k^T = alpha W - (b alpha) (W k - v / alpha) k^T
            value, eta = value / alpha[..., None], eta * alpha
        return framework_scan(self.bias, self.retention, query, key, value, eta, alpha, implicit=self.implicit)


INSTANCES: Mapping[str, Instance] = {
    "linear_attention": Instance("matrix", "dot", "none", mixer="linear_attention"),
    "retnet": Instance("matrix", "dot", "l2", mixer="retnet", gates="head"),
    "lightning": Instance("matrix", "dot", "l2", mixer="retnet", gates="head"),
    "mamba2": Instance("matrix", "dot", "l2", mixer="ssd", gates="token"),
    "gla": Instance("matrix", "dot", "l2", mixer="gla", gates="columns"),
    "s6": Instance("a row of states for each channel", "dot", "l2", mixer="s6", gates="columns"),
    "deltanet": Instance("matrix", "l2", "none", mixer="deltanet"),
    "longhorn": Instance("matrix", "l2", "none", "implicit GD", implicit=True),
    "ttt_linear": Instance("matrix", "l2", "none", mixer="titans_lmm"),
    "gated_deltanet": Instance("matrix", "l2", "l2", mixer="gated_deltanet", gates="token", decay_first=True),
    "rwkv7": Instance("matrix", "l2", "l2", gates="columns"),
    "delta_product": Instance("matrix, several keys a token", "l2", "l2", "several steps of GD", gates="token"),
    "ttt_mlp": Instance("MLP of 2 layers", "l2", "none", mixer="titans_lmm"),
    "titans_lmm": Instance("MLP", "l2", "l2", "GD with momentum", mixer="titans_lmm", gates="token"),
    "transformer": Instance("all keys and values", "l2", None, "Nadaraya-Watson's closed form", mixer="softmax"),
    "moneta": Instance("MLP of 2 layers", "lp", "lq", mixer="moneta", gates="columns"),
    "yaad": Instance("MLP of 2 layers", "huber_mix", "l2", mixer="yaad", gates="columns"),
    "memora": Instance("MLP of 2 layers", "l2", "kl", mixer="memora", gates="columns"),
}


def miras_instance(name: str) -> Instance:
    """A row of the paper's table 1 by name, a key of `INSTANCES`. Raises ValueError for an unknown one."""
    if name not in INSTANCES:
        raise unknown("instance", name, INSTANCES)
    return INSTANCES[name]

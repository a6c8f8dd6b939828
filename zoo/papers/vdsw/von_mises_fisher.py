"""The von Mises-Fisher distribution on the sphere, with samples that are differentiable in their location.

Bessel functions of any order come as integrals over the angle to the location: all integrands are positive and scaled
by exp(-kappa), so that float32 holds for kappa from 0.1 to 500 and beyond.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VonMisesFisher:
    """Density proportional to exp(kappa loc^T x) over unit vectors x.

    Attributes:
      loc: unit vectors (..., d), d at least 2.
      kappa: concentration, positive; a number.
    """

    loc: jax.Array
    kappa: jax.Array | float

    def _angles(self) -> tuple[jax.Array, jax.Array]:
        """Cosines of angles to the location, and each one's probability but for the normaliser, times exp(-kappa)."""
        kappa = jnp.asarray(self.kappa, self.loc.dtype)
        # Mass lies within some 12 / sqrt(kappa) of the location: the nodes are put there.
        most = jnp.minimum(jnp.pi, 12 / jnp.sqrt(kappa))
        half = most / 2 * jnp.asarray(_NODES + 1, self.loc.dtype) / 2  # half the angle
        # cos t - 1 = -2 sin^2(t / 2), without cancellation.
        drop = 2 * jnp.square(jnp.sin(half))
        weight = most / 2 * jnp.asarray(_WEIGHTS, self.loc.dtype)
        return drop, weight * jnp.exp(-kappa * drop) * jnp.sin(2 * half) ** (self.loc.shape[-1] - 2)

    def log_normalizer(self) -> jax.Array:
        """log C, of the density C exp(kappa loc^T x): kappa^(d/2-1) / ((2 pi)^(d/2) I_{d/2-1}(kappa))."""
        d = self.loc.shape[-1]
        # The area of the sphere around the axis; of two points, where d = 2.
        area = math.log(2) + (d - 1) / 2 * math.log(math.pi) - math.lgamma((d - 1) / 2)
        return -self.kappa - area - jnp.log(self._angles()[1].sum())

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Of unit vectors (..., d), with respect to the sphere's area."""
        return self.log_normalizer() + self.kappa * jnp.sum(self.loc * x, -1)

    def mean_length(self) -> jax.Array:
        """|mean| = I_{d/2}(kappa) / I_{d/2-1}(kappa)."""
        drop, weight = self._angles()
        return 1 - jnp.sum(drop * weight) / jnp.sum(weight)

    def mean(self) -> jax.Array:
        """(..., d)."""
        return self.loc * self.mean_length()

    def entropy(self) -> jax.Array:
        """In nats, like the location but for its last axis."""
        drop, weight = self._angles()
        # -log C - kappa A(kappa), in which kappa cancels.
        d = self.loc.shape[-1]
        area = math.log(2) + (d - 1) / 2 * math.log(math.pi) - math.lgamma((d - 1) / 2)
        value = area + jnp.log(weight.sum()) + self.kappa * jnp.sum(drop * weight) / weight.sum()
        return jnp.broadcast_to(value, self.loc.shape[:-1])

    def kl_uniform(self) -> jax.Array:
        """Divergence from the uniform distribution on the sphere, log(area) - entropy."""
        d = self.loc.shape[-1]
        return math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2) - self.entropy()

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """(count, ..., d) unit vectors; gradients flow to the location."""
        d = self.loc.shape[-1]
        if d < 2:
            raise ValueError(f"directions must have at least 2 coordinates, got {d}")
        key_w, key_v = jax.random.split(key)
        shape = (count, *self.loc.shape[:-1])
        v = jax.random.normal(key_v, (*shape, d - 1), self.loc.dtype)
        if d == 3:
            u = jax.random.uniform(key_w, (*shape, 1), self.loc.dtype, minval=1e-12)
            return self.from_noise(u, v)
        return self._turned(_wood(key_w, jnp.asarray(self.kappa, self.loc.dtype), shape, d)[..., None], v)

    def from_noise(self, u: jax.Array, v: jax.Array) -> jax.Array:
        """The samples that belong to noise, where d = 3.

        Args:
          u: uniform on (0, 1), (count, ..., 1): the quantile of the cosine to the location.
          v: normal, (count, ..., 2): the direction around it.
        """
        if self.loc.shape[-1] != 3:
            raise ValueError(f"the cosine has a closed form for 3 coordinates only, got {self.loc.shape[-1]}")
        w = 1 + jnp.logaddexp(jnp.log(u), jnp.log1p(-u) - 2 * self.kappa) / self.kappa
        return self._turned(w, v)

    def _turned(self, w: jax.Array, v: jax.Array) -> jax.Array:
        """Cosines w and directions v around the first axis, reflected so that it becomes the location."""
        v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
        x = jnp.concatenate([w, jnp.sqrt(jnp.maximum(1 - jnp.square(w), 1e-10)) * v], -1)
        first = jnp.zeros(self.loc.shape[-1], x.dtype).at[0].set(1)
        h = first - self.loc
        # A location on the axis itself: the root's gradient must not be infinite there.
        h = h / (jnp.sqrt(jnp.sum(jnp.square(h), -1, keepdims=True) + 1e-20) + 1e-5)
        return x - 2 * jnp.sum(x * h, -1, keepdims=True) * h


def _wood(key: jax.Array, kappa: jax.Array, shape: tuple[int, ...], d: int) -> jax.Array:
    """Cosines to the location by rejection (Wood 1994, with the constants of Davidson et al. 2018)."""
    root = jnp.sqrt(4 * kappa**2 + (d - 1) ** 2)
    exact = (d - 1) / (2 * kappa + root)  # (-2 kappa + root) / (d - 1) without cancellation
    b = jnp.where(kappa > 10, jnp.minimum(1.0, jnp.maximum(0.0, kappa - 10)), 0.0)
    b = b * (d - 1) / (4 * kappa) + (1 - b) * exact
    a = (d - 1 + 2 * kappa + root) / 4
    bound = 4 * a * b / (1 + b) - (d - 1) * jnp.log(d - 1.0)

    def body(carry: tuple) -> tuple:
        key, w, done = carry
        key, key_e, key_u = jax.random.split(key, 3)
        e = jax.random.beta(key_e, (d - 1) / 2, (d - 1) / 2, shape, kappa.dtype)
        u = jax.random.uniform(key_u, shape, kappa.dtype, minval=1e-12)
        proposed = (1 - (1 + b) * e) / (1 - (1 - b) * e)
        t = 2 * a * b / (1 - (1 - b) * e)
        accepted = (d - 1) * jnp.log(t) - t + bound > jnp.log(u)
        return key, jnp.where(accepted & ~done, proposed, w), done | accepted

    start = (key, jnp.zeros(shape, kappa.dtype), jnp.zeros(shape, bool))
    return jax.lax.while_loop(lambda carry: ~carry[2].all(), body, start)[1]

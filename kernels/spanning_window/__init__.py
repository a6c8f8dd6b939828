"""Window attention over a map, in close windows, remote (strided) ones, or their sum (EMOv2's spanning attention)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from kernels.common import Implementation, by_platform, check_implementation, round_up
from kernels.spanning_window import chunked, gpu, reference, tpu
from kernels.spanning_window.layout import Options, Pattern

_FORWARD: Mapping[str, Callable[..., Any]] = {"chunked": chunked.forward, "tpu": tpu.forward, "gpu": gpu.forward}
_BACKWARD: Mapping[str, Callable[..., Any]] = {"chunked": chunked.backward, "tpu": tpu.backward, "gpu": gpu.backward}
_AXES = "b..h."


def spanning_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int,
    patterns: Sequence[Pattern] = ("close", "remote"),
    padding: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The sum over patterns of softmax attention within each pattern's groups of window x window tokens.

    With N = size / window groups along an axis, token y belongs to group y // window in the pattern "close" and to
    group y mod N in "remote", whose tokens lie N apart (Zhang et al. 2024, EMOv2, arXiv 2412.06674). Queries, keys and
    values are shared; outputs are summed, not averaged. ("close",) is plain windowed attention. Where one window is the
    whole map the patterns are the same, and are computed once.

    Args:
      query: (batch, height, width, heads, dim), any float dtype; logits and sums are float32.
      key: like query.
      value: (batch, height, width, heads, value_dim).
      window: the side of a window.
      patterns: one or more of "close" and "remote".
      padding: the key (heads, dim) and value (heads, value_dim) of the positions that fill the map up, on the right and
        below, to multiples of `window`. They take part in the softmax: the published code pads before its projections
        and masks nothing. Needed where a size is no multiple.
      scale: factor of the logits, default dim ** -0.5.
      implementation: "reference", "chunked", "tpu", "gpu", or None for the platform compiled for.

    Returns:
      (batch, height, width, heads, value_dim) in the inputs' dtype.

    Raises:
      ValueError, TypeError: an argument's shape, dtype or range is wrong.
    """
    check_implementation(implementation)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim else 1.0
    options = Options(float(scale), window, tuple(patterns))
    _check(query, key, value, padding, options)
    height, width, _, dim = query.shape[1:]
    below, right = (round_up(size, window) - size for size in (height, width))
    if below or right:
        assert padding is not None
        query = _fill(query, jnp.zeros((query.shape[3], dim), query.dtype), below, right)
        key, value = (_fill(x, filler, below, right) for x, filler in zip((key, value), padding, strict=True))
    times = 1
    if query.shape[1] == query.shape[2] == window:
        times, options = len(options.patterns), Options(options.scale, window, ("close",))
    if implementation == "reference":  # the definition is differentiated by JAX itself
        out = reference.forward(query, key, value, options=options)
    else:
        out = _jitted(query, key, value, options, implementation)
    out = out[:, :height, :width]
    return out * times if times > 1 else out


def _fill(x: jax.Array, filler: jax.Array, below: int, right: int) -> jax.Array:
    """The map with `filler` in the rows below and the columns on the right."""
    batch, height, width = x.shape[:3]
    filler = filler.astype(jnp.float32)  # so that its gradient is summed in float32

    def block(*size: int) -> jax.Array:
        return jnp.broadcast_to(filler, (batch, *size, *filler.shape)).astype(x.dtype)

    x = jnp.concatenate([x, block(height, right)], axis=2)
    return jnp.concatenate([x, block(below, width + right)], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, options: Options, implementation: Implementation | None
) -> jax.Array:
    return by_platform(
        {name: partial(function, options=options) for name, function in _FORWARD.items()},
        implementation, query, key, value, axes=(_AXES,) * 3, out_axes=_AXES,
    )  # fmt: skip


def _forward(query, key, value, options, implementation):
    return _attend(query, key, value, options, implementation), (query, key, value)


def _backward(options, implementation, residuals, d_out):
    return by_platform(
        {name: partial(function, options=options) for name, function in _BACKWARD.items()},
        implementation, *residuals, d_out, axes=(_AXES,) * 4, out_axes=(_AXES,) * 3,
    )  # fmt: skip


_attend.defvjp(_forward, _backward)
_jitted = jax.jit(_attend, static_argnums=(3, 4))


def _check(query: jax.Array, key: jax.Array, value: jax.Array, padding: Any, options: Options) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 5 or 0 in array.shape:
            raise ValueError(f"{name} must be (batch, height, width, heads, dim), not empty, got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if key.shape != query.shape or value.shape[:4] != query.shape[:4]:
        raise ValueError(f"maps differ: query {query.shape}, key {key.shape}, value {value.shape}")
    if options.window < 1:
        raise ValueError(f"window must be at least 1, got {options.window}")
    unknown = set(options.patterns) - set(get_args(Pattern))
    if unknown or not options.patterns or len(set(options.patterns)) < len(options.patterns):
        raise ValueError(f"patterns must be one or more of {get_args(Pattern)}, each once, got {options.patterns}")
    if not options.scale > 0:
        raise ValueError(f"scale must be positive, got {options.scale}")
    if padding is None and any(size % options.window for size in query.shape[1:3]):
        raise ValueError(
            f"a map of {query.shape[1]} x {query.shape[2]} is no multiple of the window {options.window}: "
            "give the key and value of its padding"
        )
    if padding is not None:
        for name, array, like in zip(("key", "value"), padding, (key, value), strict=True):
            if array.shape != like.shape[3:]:
                raise ValueError(f"the padding's {name} must be {like.shape[3:]}, got shape {array.shape}")

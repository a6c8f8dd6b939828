"""Reading and patching a language model's activations by name, without changing the model or its variables.

    seen = zoo.probe(model, variables, {"tokens": tokens}, read=["resid_post.11", "pattern.3"])
    seen.sites["pattern.3"]                                     # (batch, heads, queries, keys)
    patched = zoo.probe(model, variables, inputs, patch={"z.3": set_heads([2, 5], 0.0)})

A site is "name.layer", or "norm_final" and "logits". What is not asked for costs nothing: calls are intercepted while
the model is traced (`flax.linen.intercept_methods`), so a probe may be jitted and differentiated like the model itself.
Attention stays the fused kernel, except in layers whose "pattern" or "scores" is read or patched.

| site | what | shape |
| --- | --- | --- |
| resid_pre, resid_mid, resid_post | the residual stream before, within and after a block | (B, T, D) |
| attn_norm, mlp_norm | what the mixer and the MLP see | (B, T, D) |
| q_pre_rope | queries before their rotation | (B, T, H, d) |
| q, k, v | as attention compares and adds them up | (B, T, H or key heads, d) |
| scores | q . k times the scale, before mask and softmax (read only) | (B, H, T, S) |
| pattern | attention weights | (B, H, T, S) |
| z | the heads' outputs | (B, T, H, d) |
| attn_out, mlp_out | what the branches add | (B, T, D) |
| mlp_pre, mlp_post | before the (gate's) activation, and what the last projection takes | (B, T, F) |
| norm_final | what the head sees | (B, T, D) |
| logits | | (B, T, V) |

B, T, S, D, H, d, F, V: batch, queries, keys, features, heads, their width, MLP's width, vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention_readout import attention_entries
from zoo.backbones.decoder_lm import DecoderLM
from zoo.backbones.transformer import NO_MLP
from zoo.errors import unknown
from zoo.layers.mlp import GATED
from zoo.mixers.softmax import SoftmaxAttention

Patch = Callable[[jax.Array], jax.Array] | jax.Array | float
LAYER_SITES = (
    "resid_pre", "attn_norm", "q_pre_rope", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid",
    "mlp_norm", "mlp_pre", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
_ATTENTION_SITES = ("q_pre_rope", "q", "k", "v", "scores", "pattern", "z")
_FINAL_SITES = ("norm_final", "logits")


class Probe(NamedTuple):
    """What a probed call gives."""

    logits: jax.Array  # float32 (batch, time, vocabulary)
    state: Any  # the next state, as the model gives it
    sites: dict[str, jax.Array]  # what was read, after its own patch


def sites(model: DecoderLM) -> list[str]:
    """All sites of a model: those within attention only of layers that have softmax attention, those of MLPs only where
    there are any, those within them only where they are not routed.
    """
    config = model.config
    absent: tuple[str, ...] = ()
    if config.mlp in NO_MLP or config.mlp_blocks > 1:
        absent += ("mlp_pre", "mlp_post")
    if config.mlp in NO_MLP:
        absent += ("mlp_out",)
    if config.mlp == "none":
        absent += ("mlp_norm",)
    names = []
    for layer in range(config.layers):
        softmax = isinstance(config.make_mixer(layer, parent=None), SoftmaxAttention)
        missing = absent + (() if softmax else _ATTENTION_SITES)
        names += [f"{name}.{layer}" for name in LAYER_SITES if name not in missing]
    return [*names, *_FINAL_SITES]


def probe(
    model: DecoderLM,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    read: Iterable[str] = (),
    patch: Mapping[str, Patch] | None = None,
) -> Probe:
    """Applies a model, and reads and replaces activations on the way.

    Args:
      model: a decoder language model.
      variables: of the model.
      inputs: arguments of its call by name: `tokens`, and `state`, `valid` where there are any.
      read: names of sites; see the module's table.
      patch: for a site either a function of its value, or a value that takes its place (it is broadcast). `set_heads`
        and `set_positions` make functions for a part of a site.

    Returns:
      Logits, next state, and the sites read.

    Raises:
      ValueError: a site is unknown (near ones are named) or cannot be patched, or a patch changes a shape.
    """
    patch, read = dict(patch or {}), list(read)
    known = sites(model)
    for name in (*read, *patch):
        if name not in known:
            raise unknown("site", name, known, f"{len(known)} sites; `zoo.probing.sites(model)` lists them")
    for name in patch:
        if name.startswith("scores."):
            raise ValueError(f"{name} can be read only: patch pattern, or q and k")
    recorder = _Recorder(frozenset(read), patch, gated=model.config.mlp in GATED)
    with nn.intercept_methods(recorder.intercept):
        logits, state = model.apply(variables, **inputs)
    return Probe(logits, state, {name: recorder.found[name] for name in read})


class _Recorder:
    """Intercepts the calls of one application."""

    def __init__(self, read: frozenset[str], patch: dict[str, Patch], gated: bool) -> None:
        self.read, self.patch, self.gated = read, patch, gated
        self.found: dict[str, jax.Array] = {}

    def wants(self, *names: str) -> bool:
        return any(name in self.read or name in self.patch for name in names)

    def visit(self, name: str, value: jax.Array, view: Callable = lambda x: x, back: Callable = lambda x: x) -> Any:
        """Patches and records a site that is `view(value)`; gives the value back."""
        if not self.wants(name):
            return value
        seen = view(value)
        if name in self.patch:
            change = self.patch[name]
            new = change(seen) if callable(change) else jnp.broadcast_to(jnp.asarray(change, seen.dtype), seen.shape)
            if new.shape != seen.shape:
                raise ValueError(f"the patch of {name} must keep its shape {seen.shape}, got {new.shape}")
            seen = new.astype(seen.dtype)
            value = back(seen)
        if name in self.read:
            self.found[name] = seen
        return value

    def intercept(self, call: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        path, method = context.module.path, context.method_name
        if not path:
            if method == "logits":
                out = call(self.visit("norm_final", arguments[0]), *arguments[1:], **options)
                return self.visit("logits", out)
            return call(*arguments, **options)
        match = re.fullmatch(r"layer_(\d+)", path[0])
        if match is None:
            return call(*arguments, **options)
        layer, inside = match[1], path[1:]
        if method == "__call__" and inside == ():
            x, *rest = arguments
            out, state = call(self.visit(f"resid_pre.{layer}", x), *rest, **options)
            return self.visit(f"resid_post.{layer}", out), state
        if method == "between" and inside == ():
            return self.visit(f"resid_mid.{layer}", call(*arguments, **options))
        if inside == ("mixer",):
            if method == "attend" and isinstance(context.module, SoftmaxAttention):
                return self._attend(context.module, layer, call, arguments, options)
            if method == "__call__":
                out, state = call(*arguments, **options)
                return self.visit(f"attn_out.{layer}", out), state
        if method != "__call__":
            return call(*arguments, **options)
        if inside == ("mixer", "query") and isinstance(context.module.parent, SoftmaxAttention):
            heads = context.module.parent.heads
            return self.visit(
                f"q_pre_rope.{layer}", call(*arguments, **options),
                lambda x: x.reshape(*x.shape[:2], heads, -1), lambda x: x.reshape(*x.shape[:2], -1),
            )  # fmt: skip
        if inside == ("norm1",):
            return self.visit(f"attn_norm.{layer}", call(*arguments, **options))
        if inside == ("norm2",):
            return self.visit(f"mlp_norm.{layer}", call(*arguments, **options))
        if inside == ("mlp",):
            return self.visit(f"mlp_out.{layer}", call(*arguments, **options))
        gated = inside[:1] == ("mlp",) and self.gated
        if inside == ("mlp", "gate" if gated else "up"):
            return self.visit(f"mlp_pre.{layer}", call(*arguments, **options))
        if inside == ("mlp", "down"):
            return call(self.visit(f"mlp_post.{layer}", arguments[0]), *arguments[1:], **options)
        return call(*arguments, **options)

    def _attend(self, mixer: SoftmaxAttention, layer: str, call: Callable, arguments: tuple, options: dict) -> Any:
        query, key, value, mask = arguments
        query = self.visit(f"q.{layer}", query)
        key, value = self.visit(f"k.{layer}", key), self.visit(f"v.{layer}", value)
        if self.wants(f"scores.{layer}"):
            scale = query.shape[-1] ** -0.5 if mixer.scale is None else mixer.scale
            grouped = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
            scores = jnp.einsum("bthd,bshd->bhts", query, grouped, preferred_element_type=jnp.float32) * scale
            self.visit(f"scores.{layer}", scores)
        if not self.wants(f"pattern.{layer}"):
            return self.visit(f"z.{layer}", call(query, key, value, mask, **options))
        weights = attention_entries(query, key, **mixer.logits(mask))
        weights = self.visit(f"pattern.{layer}", weights)
        if f"pattern.{layer}" not in self.patch:
            return self.visit(f"z.{layer}", call(query, key, value, mask, **options))
        grouped = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
        return self.visit(f"z.{layer}", jnp.einsum("bhts,bshd->bthd", weights, grouped).astype(query.dtype))


def set_heads(heads: Sequence[int], value: jax.Array | float) -> Callable[[jax.Array], jax.Array]:
    """A patch of "q", "k", "v" or "z" that sets some heads: to 0, to a mean, or to another run's (B, T, H, d).

    Raises (when it is applied) ValueError for a head that does not exist.
    """

    def change(x: jax.Array) -> jax.Array:
        _check_indices("head", heads, x.shape[2])
        chosen = jnp.zeros(x.shape[2], bool).at[jnp.asarray(heads, jnp.int32)].set(True)
        return jnp.where(chosen[:, None], jnp.asarray(value, x.dtype), x)

    return change


def set_positions(positions: Sequence[int], value: jax.Array | float) -> Callable[[jax.Array], jax.Array]:
    """A patch of any site with tokens on axis 1 that sets some tokens' values, such as to those of another run."""

    def change(x: jax.Array) -> jax.Array:
        _check_indices("position", positions, x.shape[1])
        chosen = jnp.zeros(x.shape[1], bool).at[jnp.asarray(positions, jnp.int32)].set(True)
        return jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 2)), jnp.asarray(value, x.dtype), x)

    return change


def _check_indices(what: str, indices: Sequence[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"{what} {index} does not exist: there are {count}")


def ablate_heads(
    model: DecoderLM,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    heads: Iterable[tuple[int, int]],
    mode: str = "zero",
    read: Iterable[str] = (),
) -> Probe:
    """Runs a model without some attention heads.

    Args:
      model, variables, inputs, read: as of `probe`.
      heads: (layer, head) each.
      mode: "zero": their outputs are 0; "mean": their mean over batch and tokens; "uniform": their queries are 0, so
        that they attend to all visible keys alike.

    Raises:
      ValueError: a layer or head does not exist, or the mode is unknown.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        _check_indices("layer", [layer], model.config.layers)
        _check_indices("head", [head], model.config.heads)
        by_layer.setdefault(layer, []).append(head)
    if mode == "zero":
        patch: dict[str, Patch] = {f"z.{layer}": set_heads(chosen, 0.0) for layer, chosen in by_layer.items()}
    elif mode == "uniform":
        patch = {f"q.{layer}": set_heads(chosen, 0.0) for layer, chosen in by_layer.items()}
    elif mode == "mean":

        def to_mean(chosen: list[int]) -> Callable[[jax.Array], jax.Array]:
            return lambda z: set_heads(chosen, z.mean(axis=(0, 1)))(z)

        patch = {f"z.{layer}": to_mean(chosen) for layer, chosen in by_layer.items()}
    else:
        raise unknown("mode", mode, ("zero", "mean", "uniform"))
    return probe(model, variables, inputs, read, patch)


def path_patch(
    model: DecoderLM,
    variables: Mapping[str, Any],
    inputs: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    senders: Iterable[tuple[int, int]],
    receivers: Iterable[str] = ("logits",),
) -> jax.Array:
    """Logits when some heads' outputs reach some sites as on corrupted inputs, and all else is as on the clean ones.

    Path patching (Wang et al. 2023, "Interpretability in the Wild", section 3.1): senders take their corrupted values,
    all other heads keep their clean ones, MLPs are computed anew; what the receivers then are is patched into a clean
    run.

    Args:
      model, variables: as of `probe`.
      inputs, corrupted: arguments of the model's call, with tokens of one shape.
      senders: (layer, head) each.
      receivers: sites such as "q.9", or "resid_post.11", or "logits" for the direct and MLP paths to the end.

    Returns:
      float32 (batch, time, vocabulary).

    Raises:
      ValueError: a layer, head or site does not exist.
    """
    receivers, senders = list(receivers), list(senders)
    layers = [layer for layer in range(model.config.layers) if f"z.{layer}" in sites(model)]
    names = [f"z.{layer}" for layer in layers]
    clean = probe(model, variables, inputs, names).sites
    other = probe(model, variables, corrupted, names).sites
    frozen: dict[str, Patch] = dict(clean)
    for layer, head in senders:
        _check_indices("layer", [layer], model.config.layers)
        name = f"z.{layer}"
        frozen[name] = set_heads([head], other[name])(jnp.asarray(frozen[name]))
    seen = probe(model, variables, inputs, receivers, frozen)
    if receivers == ["logits"]:
        return seen.logits
    return probe(model, variables, inputs, patch=dict(seen.sites)).logits


def logit_lens(model: DecoderLM, variables: Mapping[str, Any], inputs: Mapping[str, Any]) -> jax.Array:
    """What the residual stream says after each block (nostalgebraist 2020): logits (layers, batch, time, vocabulary).

    The last row is the model's own output.
    """
    names = [f"resid_post.{layer}" for layer in range(model.config.layers)]
    found = probe(model, variables, inputs, names).sites

    def read_out(module: DecoderLM, x: jax.Array) -> jax.Array:
        return module.logits(module.norm(x) if module.config.norm_position == "pre" else x)

    rows: list[Any] = [model.apply(variables, found[name], method=read_out) for name in names]
    return jnp.stack(rows)


def direct_logit_attribution(
    model: DecoderLM, variables: Mapping[str, Any], inputs: Mapping[str, Any], direction: jax.Array
) -> jax.Array:
    """What each head adds to a direction of the unembedding, with the last norm's scale as it is (layers, heads, B, T).

    Args:
      direction: (features,) of the residual stream, such as the difference of two tokens' unembeddings, or one for
        each sequence (batch, features).
    """
    layers = range(model.config.layers)
    names = [f"z.{layer}" for layer in layers]
    final = f"resid_post.{model.config.layers - 1}"
    found = probe(model, variables, inputs, [*names, final]).sites
    params = nn.unbox(variables)["params"]
    x = found[final].astype(jnp.float32)
    if model.config.norm == "layer":
        scale = jax.lax.rsqrt(jnp.var(x, axis=-1) + model.config.norm_epsilon)
    else:
        scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1) + model.config.norm_epsilon)
    gain = params["norm"]["scale"] * direction
    if model.config.norm == "layer":
        gain = gain - gain.mean(axis=-1, keepdims=True)  # the norm takes off the mean
    gain = jnp.broadcast_to(gain, (x.shape[0], x.shape[-1]))
    rows = []
    for layer in layers:
        z = found[f"z.{layer}"]
        kernel = params[f"layer_{layer}"]["mixer"]["out"]["kernel"].reshape(z.shape[2], z.shape[3], -1)
        rows.append(jnp.einsum("bthd,hdf,bf->hbt", z, kernel, gain) * scale)
    return jnp.stack(rows)

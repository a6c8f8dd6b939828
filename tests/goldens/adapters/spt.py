"""Golden cases of SPT: the quantiser, lookup, sparse attention, routed networks, whole models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from kernels import sparse_topl
from zoo.layers.lora import LoRA, adapted
from zoo.layers.rotary import Rotary, rotate
from zoo.layers.routed_mlp import RoutedMLP
from zoo.papers import spt
from zoo.weights import convert
from zoo.weights.names import Rule, layer, to_published

_FIELDS = {
    "hidden_size": "features",
    "heads": "heads",
    "layers": "layers",
    "max_positions": "max_length",
    "vocab_size": "vocab_size",
    "intermediate_size": "mlp_features",
    "lora_rank": "lora_rank",
    "blocks": "mlp_blocks",
    "active_blocks": "mlp_active",
}
_GROUPS = ("lora", "norm", "quantizer", "router")


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    if variant == "spt_pq":
        return _quantiser(arrays["z"], jnp.asarray(state_dict["weight"]))
    if variant == "spt_lookup":
        return _lookup(arrays["q_codes"], arrays["k_codes"], overrides.get("sparse_coeff", 8))
    if variant.startswith("spt_sparse_mha"):
        codebook = jnp.asarray(state_dict["quantizer.weight"])
        return _attention(arrays, codebook, overrides.get("sparse_coeff", 8), rotary=variant.endswith("rotary"))
    if variant.startswith("spt_routed_ffn"):
        return _routed(arrays, overrides, state_dict, gated=variant.endswith("llama"))
    return _model(variant, overrides, arrays["input_ids"], state_dict)


def _quantiser(z: jax.Array, codebook: jax.Array) -> dict[str, Any]:
    def loss(z, codebook):
        quantised, value = sparse_topl.quantisation_loss(z, codebook)
        return value, quantised

    (value, quantised), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(z, codebook)
    return {
        "codes": sparse_topl.encode(z, codebook), "z_q": quantised, "loss": value[None],
        "grad_z": gradients[0], "grad_weight": gradients[1],
    }  # fmt: skip


def _lookup(query_codes: jax.Array, key_codes: jax.Array, coefficient: int) -> dict[str, Any]:
    codes = query_codes[:, :, None], key_codes[:, :, None]
    keep = max(1, key_codes.shape[1] // coefficient)
    found = {
        mode: np.sort(sparse_topl.lookup(*codes, keep=keep, mode=mode)[:, :, 0], axis=-1)
        for mode in ("exact", "prototype")
        if mode == "exact" or (keep % 4 == 0 and key_codes.shape[1] % 16 == 0)
    }
    counts = np.sum(query_codes[:, :16, None] == key_codes[:, None], axis=-1)
    return {**found, "counts": counts}


def _attention(arrays, codebook, coefficient, rotary) -> dict[str, Any]:
    keep = max(1, arrays["k"].shape[1] // coefficient)

    def turned(z):
        return rotate(z, jnp.arange(z.shape[1])[None], Rotary()) if rotary else z

    def codes(q, k):
        return sparse_topl.encode(turned(q), codebook), sparse_topl.encode(turned(k), codebook)

    def exact(q, k, v):
        return sparse_topl.sparse_attention(
            turned(q), turned(k), v, *codes(q, k), keep=keep, codewords=codebook.shape[1]
        )

    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    out, pullback = jax.vjp(exact, q, k, v)
    gradients = pullback(arrays["cotangent"])
    losses = [sparse_topl.quantisation_loss(turned(z), codebook)[1] for z in (q, k)]
    outputs = {
        "y_exact": out, "pq_loss": (losses[0] + losses[1])[None],
        **{f"grad_{name}": gradient for name, gradient in zip("qkv", gradients, strict=True)},
    }  # fmt: skip
    if keep % 4 == 0 and k.shape[1] % 16 == 0:
        indices = sparse_topl.lookup(*codes(q, k), keep=keep, mode="prototype")
        outputs["y_prototype"] = sparse_topl.listed_attention(turned(q), turned(k), v, indices)
    return outputs


def _routed(arrays, overrides, state_dict, gated) -> dict[str, Any]:
    names = (("gate", "gate"), ("side", "up"), ("down", "down")) if gated else (("fc1", "up"), ("fc2", "down"))
    rules = [
        *layer("linear", r"router\.0", "router"),
        *(
            rule
            for published, ours in names
            for rule in (
                *layer("linear", published, ours),
                Rule(rf"{published}\.lora\.left\.weight", f"lora/{ours}/left"),
                Rule(rf"{published}\.lora\.right\.weight", f"lora/{ours}/right"),
            )
        ),
    ]
    module = RoutedMLP(
        overrides["intermediate_size"], "swiglu" if gated else "relu", use_bias=not gated,
        blocks=overrides.get("blocks", 4), active=overrides.get("active_blocks", 2),
    )  # fmt: skip
    with adapted(LoRA(overrides["lora_rank"], targets=spt.UNROUTED)):
        x = arrays["x"]
        variables = convert(state_dict, rules, jax.eval_shape(module.init, jax.random.key(0), x))

        def call(variables, x):
            # The router's layer is linear in published code, its bias drawn even where the others have none.
            return module.apply(variables, x)

        y, pullback = jax.vjp(call, variables, x)
        gradients, grad_x = pullback(arrays["cotangent"])
    router = variables["params"]["router"]
    outputs = {"y": y, "grad_x": grad_x, "router": jax.nn.sigmoid(x @ router["kernel"] + router["bias"])}
    published = to_published(gradients, rules)
    return outputs | {f"grad.{name}": value for name, value in published.items() if "lora" in name or "router" in name}


def _model(variant, overrides, tokens, state_dict) -> dict[str, Any]:
    options = {ours: overrides[name] for name, ours in _FIELDS.items() if name in overrides}
    if "sparse_coeff" in overrides:
        options["mixer_options"] = {"coefficient": overrides["sparse_coeff"]}
    base = "spt_llama_tiny" if "llama" in variant else "spt_opt_tiny"
    model = zoo.create(base, **options)
    variables = zoo.load_weights(base, dict(state_dict), **options)
    trainable, frozen = spt.split(variables)

    def loss(trainable):
        entropy, quantisation = spt.losses(model, spt.join(trainable, frozen), tokens)
        return entropy + spt.QUANTISATION_WEIGHT * quantisation, (entropy, quantisation)

    gradients, (entropy, quantisation) = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    logits, _ = jax.jit(model.apply)(variables, tokens[:, :-1])
    squares = dict.fromkeys(_GROUPS, 0.0)
    for name, gradient in to_published(gradients, spt.weight_rules(model.config)).items():
        (group,) = [group for group in _GROUPS if group in name]
        squares[group] += float(np.sum(np.square(gradient, dtype=np.float64)))
    norms = np.sqrt(np.asarray([squares[group] for group in _GROUPS]))
    return {"logits": logits, "loss_ce": entropy[None], "loss_aux": quantisation[None], "grad_norms": norms}

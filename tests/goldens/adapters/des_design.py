"""Golden cases: the U-Nets' outputs, loss, sampling and inpainting with given noise; the two transformers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from tests.goldens.runner import Prefix
from zoo.diffusion import guided_batch
from zoo.papers import des_design

Arrays = Mapping[str, np.ndarray]
_FIELDS = {
    "max_length": "length", "pred_dim": "features", "channels": "channels", "patch_size": "patch",
    "multipliers": "multipliers", "factors": "factors", "num_blocks": "blocks", "attentions": "attentions",
    "pre_transformer": "pre_transformer", "attention_heads": "heads", "attention_features": "head_features",
    "attention_multiplier": "mlp_ratio", "resnet_groups": "groups", "context_embedding_max_length": "conditions",
    "text_embed_dim": "condition_features", "embed_dim_position": "position_features",
    "pos_emb_fourier_add": "add_positions",
}  # fmt: skip
_INVERSE = {
    "logits_dim": "tokens", "dim": "features", "depth": "depth", "heads": "heads", "dim_head": "head_features",
    "ff_mult": "mlp_ratio", "embed_dim": "embedding", "one_kv_head": "one_key_head", "max_text_len": "conditions",
    "text_embed_dim": "condition_features", "cond_drop_prob": "drop_condition",
}  # fmt: skip
_FORWARD = {
    "max_tokens": "tokens", "max_length": "length", "logits_dim_length": "properties", "logits_dim": "channels",
    "dim": "features", "depth": "depth", "heads": "heads", "ff_mult": "mlp_ratio", "embed_dim": "embedding",
    "dropout": "dropout",
}  # fmt: skip
_GUIDANCE = 2.0  # of the U-Nets
_STEPS, _INPAINT_STEPS, _RESAMPLES = 6, 5, 2
_SCALE, _NEW = 3.0, 64  # of the decoder: guidance, and tokens at most


def adapter(variant: str, overrides: Mapping[str, Any], inputs: Arrays, state_dict: Arrays) -> dict[str, Any]:
    """The outputs that a case of this variant may hold, by name."""
    run, fields = {
        "qm_diffusion_forward": (_diffusion, _FIELDS),
        "qm_diffusion_inverse": (_diffusion, _FIELDS),
        "qm_transformer_inverse": (_inverse, _INVERSE),
        "qm_transformer_internal": (_inverse, _INVERSE),
        "qm_transformer_forward": (_forward, _FORWARD),
    }[variant]
    options = {ours: overrides[name] for name, ours in fields.items() if name in overrides}
    if "mlp_ratio" in options:
        options["mlp_ratio"] = int(options["mlp_ratio"])
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    return run(model, variables, inputs)


def _last(x: np.ndarray) -> jax.Array:
    """Channels of published arrays go last."""
    return jnp.swapaxes(jnp.asarray(x), -1, -2)


def _diffusion(model: Any, variables: Any, inputs: Arrays) -> dict[str, Any]:
    condition, sigma = jnp.asarray(inputs["cond"]), jnp.asarray(inputs["sigma"])
    x, noise = _last(inputs["x"]), _last(inputs["noise"])
    apply = partial(model.apply, variables)

    @jax.jit
    def outputs(x, noise, sigma, condition):
        noisy = x + sigma[:, None, None] * noise
        single = apply(condition, method="context")
        double = apply(condition, guided=True, method="context")
        scaled, time = noisy / jnp.sqrt(sigma**2 + model.config.sigma_data**2)[:, None, None], jnp.log(sigma) / 4
        return {
            "unet": _last(apply(scaled, time, single, method="evaluate")),
            "unet_cfg2": _last(
                guided_batch(lambda both: apply(both, jnp.tile(time, 2), double, method="evaluate"), scaled, _GUIDANCE)
            ),
            "denoised": _last(des_design.denoise(model, variables, noisy, sigma, single)),
            "loss": des_design.diffusion_loss(model, variables, x, condition, sigma=sigma, noise=noise)[None],
            "embedding": apply(condition, method="embedding"),
        }

    found = {name: np.asarray(value) for name, value in outputs(x, noise, sigma, condition).items()}
    if "step_noise" in inputs:
        steps = len(inputs["step_noise"]) + 1
        found["sigmas"] = des_design.levels(steps)
        # The start is the noise of the loss.
        found["sample"] = np.asarray(
            _last(
                des_design.sample(
                    model, variables, condition, steps=steps, start=noise, noise=_last(inputs["step_noise"])
                )
            )
        )
    if "inpaint_noise" in inputs:
        draws = _last(inputs["inpaint_noise"])
        steps = (len(draws) - 1) // (2 * _RESAMPLES) + 1
        found["inpaint"] = np.asarray(
            _last(
                des_design.inpaint(
                    model, variables, condition, x, _last(inputs["keep_mask"]) > 0.5, steps=steps,
                    resamples=_RESAMPLES, scale=_GUIDANCE, start=draws[0],
                    noise=draws[1:].reshape(steps - 1, 2 * _RESAMPLES, *x.shape),
                )
            )
        )  # fmt: skip
    return found


def _inverse(model: Any, variables: Any, inputs: Arrays) -> dict[str, Any]:
    tokens, condition = jnp.asarray(inputs["tokens"], jnp.int32), jnp.asarray(inputs["cond"])

    @jax.jit
    def outputs(tokens, condition):
        every = jnp.ones(len(tokens), bool)
        value, _ = des_design.inverse_loss(model)(variables["params"], {}, batch, {}, train=False)
        return {
            "logits": model.apply(variables, tokens, condition),
            "logits_null": model.apply(variables, tokens, condition, every),
            "logits_cfg": des_design.inverse_logits(model, variables, tokens, condition, _SCALE),
            "loss": value[None],
        }

    batch = {"tokens": tokens, "condition": condition}
    found: dict[str, Any] = {name: np.asarray(value) for name, value in outputs(tokens, condition).items()}
    greedy = des_design.generate(
        model, variables, condition, np.asarray(tokens[:, :1]), _NEW, scale=_SCALE, greedy=True
    )  # fmt: skip
    found["greedy"] = Prefix(greedy, 1)
    return found


def _forward(model: Any, variables: Any, inputs: Arrays) -> dict[str, Any]:
    return {"properties": np.asarray(jax.jit(model.apply)(variables, jnp.asarray(inputs["tokens"], jnp.int32)))}

"""Golden cases: the networks in evaluation and in training, and the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoo
from zoo.papers import mca_drug

# Published keys and ours, of the PyTorch package and of the TensorFlow transcription.
_FIELDS = {
    "smiles_embedding_size": "embedding", "filters": "filters", "multiheads": "heads", "molecule_heads": "heads",
    "gene_heads": "gene_heads", "smiles_attention_size": "hidden", "gene_attention_size": "gene_hidden",
    "stacked_dense_hidden_sizes": "dense", "gene_to_dense": "gene_to_dense", "final_activation": "sigmoid",
    "number_of_genes": "genes", "smiles_padding_length": "length", "smiles_vocabulary_size": "vocabulary",
    "dropout": "dropout", "batch_norm": "batch_norm", "gene_temperature": "gene_temperature",
    "molecule_temperature": "molecule_temperature", "activation_fn": "activation",
    "context_nonlinearity": "context_nonlinearity",
    "V": "vocabulary", "H": "embedding", "G": "genes", "heads": "heads", "A": "hidden", "dense": "dense",
    "kernels": "kernels", "num_gene_features": "gene_features", "F": "gene_features",
}  # fmt: skip
_MODULES = {
    "batch_norm": ("regressor/batch_norm/",), "context_attention_layers": ("attention_",),
    "convolutional_layers": ("convolution_",), "dense_layers": ("regressor/dense_", "regressor/batch_norm_"),
    "final_dense": ("regressor/final/",), "gene_attention_layer": ("gene_attention_0/",),
    "smiles_embedding": ("embed/",),
}  # fmt: skip
_RANGE = (-4.1, 8.2)  # of the rescaling case


def options_of(variant: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields of published keys."""
    options = {ours: overrides[name] for name, ours in _FIELDS.items() if name in overrides}
    if "kernel_sizes" in overrides:
        options["kernels"] = [size[0] for size in overrides["kernel_sizes"]]
    if "temperature" in overrides:  # of MCA's gate; the heads over tokens have none there
        options["gene_temperature"] = overrides["temperature"]
    if "heads" in options and "gene_heads" not in options and len(options["heads"]) != 4:
        options["gene_heads"] = [0] * len(options["heads"])
    return options


def adapter(
    variant: str, overrides: Mapping[str, Any], inputs: Mapping[str, np.ndarray], state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs that a case of this variant may hold, by name."""
    if variant == "mca_losses":
        return _losses(overrides, inputs)
    options = options_of(variant, overrides)
    model = zoo.create(variant, **options)
    variables = zoo.load_weights(variant, dict(state_dict), **options)
    smiles, gep = jnp.asarray(inputs["smiles"], jnp.int32), jnp.asarray(inputs["gep"])
    if "y" in inputs:
        return _train_step(model, variables, smiles, gep, jnp.asarray(inputs["y"]))
    found = {name: np.asarray(value) for name, value in jax.jit(model.apply)(variables, smiles, gep).items()}
    if variant == "mca_tf":
        found["ic50"] = found["ic50"][:, 0]
    return found


def _train_step(model, variables, smiles, gep, y) -> dict[str, np.ndarray]:
    """Batch statistics, dropout as configured: the prediction, the loss, and each module's gradient norm."""
    state = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def step(params):
        def value(params):
            found, _ = model.apply(
                {"params": params, **state}, smiles, gep, train=True, mutable=list(state),
                rngs={"dropout": jax.random.key(0)},
            )  # fmt: skip
            return mca_drug.regression_loss(found["ic50"][:, 0], y.reshape(-1)), found["ic50"]

        return jax.value_and_grad(value, has_aux=True)(params)

    (loss, prediction), gradient = step(variables["params"])
    flat = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    norms = [
        optax.global_norm([leaf for path, leaf in flat.items() if path.startswith(starts)])
        for starts in _MODULES.values()
    ]
    return {
        "pred_train_mode": np.asarray(prediction),
        "loss": np.asarray(loss)[None],
        "grad_norms": np.asarray(norms),
    }


def _losses(overrides, inputs) -> dict[str, np.ndarray]:
    prediction, label = jnp.asarray(inputs["pred"]), jnp.asarray(inputs["label"])
    least, most = overrides.get("min", _RANGE[0]), overrides.get("max", _RANGE[1])
    found = {
        "pearson": mca_drug.pearson(prediction, label)[None],
        "log_micromolar": mca_drug.log_micromolar(prediction, least, most),
        **{
            name: mca_drug.regression_loss(prediction, label, kind)[None]
            for name, kind in (("mse", "mse"), ("cc_loss", "cc"), ("mse_cc", "mse_cc"))
        },
    }
    return {name: np.asarray(value) for name, value in found.items()}

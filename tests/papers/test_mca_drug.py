"""PaccMann's networks: what they are invariant to, and what their analyses say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo.data.molecules import SmilesLanguage
from zoo.papers import mca_drug
from zoo.papers.mca_drug import MCA, MCATF, BaselineConfig, FingerprintDNN, MCAConfig, PaccMannV2, SmilesBaseline
from zoo.papers.mca_drug.model import example_inputs

SMALL = MCAConfig(
    vocabulary=12, length=20, genes=15, embedding=6, kernels=(3, 5), filters=(5, 7), heads=(2, 1, 3),
    gene_heads=(1, 0, 2), hidden=4, dense=(8,),
)  # fmt: skip


def built(kind=MCA, batch=3, **changes):
    config = dataclasses.replace(SMALL, **changes)
    model, inputs = kind(config), example_inputs(config, batch)
    return model, parameters(model, inputs), inputs


def parameters(model, inputs):
    variables = random_parameters(model, *inputs.values())
    statistics = jax.tree.map_with_path(
        lambda path, x: jnp.abs(x) + 0.5 if path[-1].key == "var" else x, variables["batch_stats"]
    )
    return {**variables, "batch_stats": statistics}


@pytest.mark.parametrize("kind", [MCA, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (MCATF, PaccMannV2))])
def test_a_batch_of_one_is_a_row_of_a_larger_batch(kind):
    model, variables, inputs = built(kind)
    whole = model.apply(variables, **inputs)
    one = model.apply(variables, **{name: value[1:2] for name, value in inputs.items()})
    for name in whole:
        np.testing.assert_allclose(one[name][0], whole[name][1], rtol=1e-4, atol=1e-5)


def test_attention_adds_up_to_one():
    model, variables, inputs = built()
    found = model.apply(variables, **inputs)
    for name in ("gene_attention", "smiles_attention", "smiles_attention_heads"):
        np.testing.assert_allclose(found[name].sum(axis=1), 1, rtol=1e-5)
    assert found["smiles_attention_heads"].shape == (3, 20, 6)


def test_padding_is_attended_to_unless_masked():
    for masked in (False, True):
        model, variables, inputs = built(mask_padding=masked)
        smiles = np.maximum(inputs["smiles"], 1)
        smiles[:, :8] = 0
        weights = model.apply(variables, smiles, inputs["gep"])["smiles_attention"][:, :8]
        assert weights.any() != masked


@pytest.mark.slow
def test_context_nonlinearity_sits_behind_each_projection():
    """Of large biases relu is the identity."""
    model, variables, inputs = built()
    for name in ("attention_0", "attention_1", "attention_2"):
        for bias in ("bias", "context_bias"):
            variables["params"][name][bias] = jnp.full_like(variables["params"][name][bias], 50.0)
            variables["params"][name]["weight"] *= 0.01
    other = MCA(dataclasses.replace(SMALL, context_nonlinearity="relu"))
    plain, positive = (m.apply(variables, **inputs)["smiles_attention"] for m in (model, other))
    np.testing.assert_allclose(plain, positive, rtol=1e-5)
    random = parameters(model, inputs)
    plain, positive = (m.apply(random, **inputs)["smiles_attention"] for m in (model, other))
    assert np.abs(plain - positive).max() > 1e-3


@pytest.mark.slow
def test_nonlinear_and_linear_sequences_of_context_agree_where_they_must():
    model, variables, inputs = built(PaccMannV2)
    other = PaccMannV2(dataclasses.replace(SMALL, context_nonlinearity="relu"))
    for name, module in variables["params"].items():
        if "attention" in name:
            for leaf in ("bias", "context_bias", "along_bias"):
                module[leaf] = jnp.full_like(module[leaf], 100.0)
            for leaf in ("weight", "context_weight", "along"):
                module[leaf] = jnp.abs(module[leaf])
            module["score"] = module["score"] * 0
    gep = np.abs(inputs["gep"])
    for name in ("smiles_attention", "ic50"):
        plain, positive = (m.apply(variables, inputs["smiles"], gep)[name] for m in (model, other))
        np.testing.assert_allclose(plain, positive, rtol=1e-4, atol=1e-5)


def test_a_low_temperature_sharpens_the_gate():
    model, variables, inputs = built()
    cold = MCA(dataclasses.replace(SMALL, gene_temperature=0.1))
    weights = [m.apply(variables, **inputs)["gene_attention"].max(axis=1) for m in (model, cold)]
    assert (weights[1] > weights[0]).all()


@pytest.mark.parametrize("kind", [MCA, pytest.param(MCATF, marks=pytest.mark.slow)])
def test_the_matrix_of_predictions_equals_the_pairs(kind):
    model, variables, inputs = built(kind, batch=4)
    smiles, gep = inputs["smiles"], inputs["gep"][:3]
    matrix = mca_drug.predict_matrix(model, variables, smiles, gep, block=3)
    pairs = model.apply(variables, np.repeat(smiles, 3, axis=0), np.tile(gep, (4, 1)))["ic50"]
    np.testing.assert_allclose(matrix, pairs.reshape(4, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_several_numbers_a_gene_collapse_to_their_mixture():
    """Equal numbers of a gene with weights that add up to one are the one number with weight one."""
    model, variables, inputs = built(MCATF)
    other = MCATF(dataclasses.replace(SMALL, gene_features=2))
    for stream in range(3):
        weights = variables["params"][f"gene_features_{stream}"]
        variables["params"][f"gene_features_{stream}"] = jnp.ones_like(weights)
    doubled = {**variables["params"]}
    for stream, heads in enumerate(SMALL.heads):
        doubled[f"gene_features_{stream}"] = jnp.array([[0.3], [0.7]]) * jnp.ones((2, heads))
    gep = np.repeat(inputs["gep"][..., None], 2, axis=2)
    first = model.apply(variables, **inputs)["ic50"]
    second = other.apply({**variables, "params": doubled}, inputs["smiles"], gep)["ic50"]
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ["cnn", pytest.param("rnn", marks=pytest.mark.slow), "self_attention"])
def test_baselines_do_not_see_padding(encoder):
    config = BaselineConfig(**{**dataclasses.asdict(SMALL), "encoder": encoder, "kernels": (), "filters": (),
                               "heads": (2,), "gene_heads": (0,)})  # fmt: skip
    model, inputs = SmilesBaseline(config), example_inputs(config, 2)
    smiles = np.maximum(inputs["smiles"], 1)
    variables = parameters(model, {"smiles": smiles, "gep": inputs["gep"]})
    longer = np.concatenate([np.zeros((2, 4), np.int32), smiles], axis=1)
    short, long = (model.apply(variables, x, inputs["gep"])["ic50"] for x in (smiles, longer))
    np.testing.assert_allclose(short, long, rtol=1e-4, atol=1e-6)


def test_the_loss_trains_and_moves_running_statistics():
    model, variables, inputs = built(batch=8)
    batch = {**inputs, "ic50": np.linspace(0, 1, 8, dtype=np.float32)}
    state = {"batch_stats": variables["batch_stats"]}
    rngs = {"dropout": jax.random.key(0)}
    value, (after, metrics) = mca_drug.loss(model, "mse_cc")(variables["params"], state, batch, rngs, train=True)
    assert value > metrics["mse"] > 0
    assert not np.array_equal(
        after["batch_stats"]["regressor"]["batch_norm"]["mean"], state["batch_stats"]["regressor"]["batch_norm"]["mean"]
    )


def test_confidence_is_full_without_dropout_and_of_one_writing():
    model, variables, inputs = built(dropout=0.0)
    sure = mca_drug.mc_dropout(model, variables, inputs, jax.random.key(0), 3)
    np.testing.assert_allclose(sure.confidence, 1, atol=1e-6)
    model, variables, inputs = built(dropout=0.5)
    assert (mca_drug.mc_dropout(model, variables, inputs, jax.random.key(0), 3).confidence < 1).all()
    language = SmilesLanguage.of(["CCO", "c1ccccc1O"], 20)
    found = mca_drug.augment_confidence(
        lambda rows: jnp.sum(rows, axis=1) / 100, ["C", "c1ccccc1O"], language, np.random.default_rng(0), 4
    )
    assert found.confidence[0] == 1 and found.mean.shape == (2,)


def test_weights_of_atoms_are_those_of_their_tokens():
    weights = np.arange(12.0)
    # ... C ( Cl ) = O stop
    np.testing.assert_array_equal(mca_drug.atom_attention("C(Cl)=O", weights), [5, 7, 10])
    with pytest.raises(ValueError, match="cannot be those of"):
        mca_drug.atom_attention("CCCCC", np.ones(3))


def test_distances_of_attention():
    rng = np.random.default_rng(0)
    attention = rng.uniform(size=(3, 4, 5, 2))
    attention[1] = 3 * attention[0]  # a scale is no difference
    distances = mca_drug.attention_distances(attention)
    np.testing.assert_allclose(distances, distances.T)
    assert distances[0, 1] < 1e-6 < distances[0, 2]


def test_enriched_genes():
    names = [f"g{i}" for i in range(50)]
    attention = np.tile(np.arange(50)[::-1], (3, 1))
    found = mca_drug.gene_enrichment(
        attention, names, {"first": names[:5], "last": [*names[-5:], "unknown"]}, top=10
    )  # fmt: skip
    assert found["first"].found == 5 and found["first"].p_value < 1e-3 and found["first"].expected == 1
    assert found["last"].found == 0 and found["last"].p_value == 1


def test_propagation_reaches_neighbours_first():
    path = np.diag(np.ones(4), 1)
    network = path + path.T
    reached = mca_drug.propagate(network, np.array([1.0, 0, 0, 0, 0]))
    np.testing.assert_allclose(reached.sum(), 1)
    assert (np.diff(reached[1:]) < 0).all() and reached[0] == reached.max()
    assert mca_drug.select_genes(network, np.eye(5)[[0]], neighbours=2).tolist() == [0, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": (2, 2)}, "one number a stream"),
        ({"kernels": (4, 5)}, "must be odd"),
        ({"dropout": 1.0}, "dropout"),
        ({"gene_temperature": 0.0}, "temperatures"),
        ({"activation": "rleu"}, "did you mean 'relu'"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_wrong_inputs_are_refused():
    model, variables, inputs = built(PaccMannV2)
    with pytest.raises(ValueError, match="padded to 20 tokens, got 19"):
        model.apply(variables, inputs["smiles"][:, 1:], inputs["gep"])
    with pytest.raises(ValueError, match="gep must be"):
        model.apply(variables, inputs["smiles"], inputs["gep"][:, 1:])
    with pytest.raises(ValueError, match="two vectors"):
        mca_drug.pearson(jnp.ones(3), jnp.ones(4))
    dnn = FingerprintDNN(BaselineConfig(genes=4, fingerprint_bits=8))
    with pytest.raises(ValueError, match=r"expected \(2, 8\)"):
        dnn.init(jax.random.key(0), jnp.ones((2, 9)), jnp.ones((2, 4)))


def test_the_published_heads_are_832_wide():
    shapes = jax.eval_shape(lambda: zoo.create("mca_torch").init(jax.random.key(0), **zoo.example_inputs("mca_torch")))
    assert shapes["batch_stats"]["regressor"]["batch_norm"]["mean"].shape == (832,)

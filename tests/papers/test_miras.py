import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels.neural_memory.bias import GRADIENTS
from tests.parameters import random_parameters
from zoo import mixers
from zoo.compilation import compile_model
from zoo.papers import miras
from zoo.papers.miras import RETENTIONS, Miras, MirasConfig, framework_scan, miras_instance, retention
from zoo.weights import names

SMALL = MirasConfig(
    kind="yaad", vocab_size=29, dim=16, num_layers=1, num_heads=2, mlp_dim=8, memory_expansion=2, chunk_size=4,
    gate_rank=4, window=3,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 10), 0, 29)


def streams(width=6, out=5, time=9):
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, time, size)), jnp.float32) for size in (width, width, out))
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    eta = jnp.asarray(rng.uniform(0.02, 0.1, (2, time)), jnp.float32)
    return query, key, value, eta, 1 - 0.5 * eta


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_any_bias_runs_with_any_retention_and_has_gradients(momentum):
    query, key, value, eta, alpha = streams()
    memory = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).standard_normal((5, 6)), jnp.float32))

    @jax.jit
    def everything(memory, value):
        found = {}
        for number, name in enumerate(RETENTIONS):
            # Every retention with two biases, every bias with a retention: in turn, one program.
            for bias in (sorted(GRADIENTS)[number % 7], sorted(GRADIENTS)[(number + 3) % 7]):

                def loss(memory, value, bias=bias, name=name):
                    y, w = framework_scan(
                        bias, name, query, key, value, eta, alpha, memory, momentum=momentum, smooth=True
                    )
                    return jnp.sum(y**2) + jnp.sum(w**2), w

                found[bias, name] = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(memory, value)
        return found

    for (bias, name), ((_, w), gradients) in jax.device_get(everything(memory, value)).items():
        assert np.isfinite(w).all(), (bias, name)
        assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients), (bias, name)
        if name in ("kl", "f_divergence"):
            np.testing.assert_allclose(w.sum(-1), 1.0, rtol=1e-4)
            assert w.min() >= 0
        if name == "bregman_sigmoid":
            assert w.min() > 0 and w.max() < 1


def test_retentions_of_one_step():
    w, g = jnp.array([[0.2, 0.8], [0.5, 0.5]]), jnp.array([[1.0, -1.0], [0.0, 2.0]])
    np.testing.assert_allclose(retention("l2", w, g, 0.1, 0.9), 0.9 * w - 0.1 * g, rtol=1e-6)
    np.testing.assert_allclose(retention("kl", w, g, 0.1), jax.nn.softmax(jnp.log(w) - 0.1 * g), rtol=1e-5)
    kept = w - 0.1 * g
    np.testing.assert_allclose(
        retention("lq", w, g, 0.1, q=3.0), kept / jnp.sum(jnp.abs(kept) ** 3) ** (1 / 3), rtol=1e-5
    )
    # The exact link inverts the gradient of |.|_q^2 / 2.
    exact = retention("lq", w, g, 0.1, q=4.0, link="exact")
    back = jax.grad(lambda x: jnp.sum(jnp.abs(x) ** 4) ** 0.5 / 2)(exact)
    np.testing.assert_allclose(back, kept, rtol=1e-4)
    sparse = retention("elastic_ftrl", w, g, 0.5, a=1.0)
    np.testing.assert_allclose(sparse, [[0.0, 0.8], [0.0, 0.0]], atol=1e-6)
    np.testing.assert_allclose(retention("elastic", w, 0 * g, 0.5, a=1e6, beta=4.0), w * 4 / 4.5, rtol=1e-4)


def test_an_implicit_step_is_longhorns():
    query, key, value, eta, _ = streams()
    y, _ = miras_instance("longhorn")(query, 2 * key, value, eta=eta)
    expected, _ = framework_scan("l2", "none", query, 2 * key, value, eta / (1 + 4 * eta))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_table_1_names_its_mixers():
    for name, instance in miras.INSTANCES.items():
        assert instance.mixer is None or instance.mixer in mixers.names(), name
    assert {"moneta", "yaad", "memora"} <= set(mixers.names())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hybrid"), [("moneta", True), ("memora", False)])
def test_a_language_model_streams_what_it_reads_at_once(kind, hybrid):
    model = Miras(dataclasses.replace(SMALL, kind=kind, hybrid=hybrid))
    variables = random_parameters(model, TOKENS)
    apply = jax.jit(model.apply)
    whole, _ = apply(variables, TOKENS)
    state, pieces = model.init_state(2, 10), []
    for t in range(10):
        logits, state = apply(variables, TOKENS[:, t : t + 1], state)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-3 * float(whole.std()))


@pytest.mark.parametrize(("kind", "hybrid"), [("yaad", False), ("moneta", True)])
def test_names_go_in_and_out(kind, hybrid):
    model = Miras(dataclasses.replace(SMALL, kind=kind, hybrid=hybrid, num_layers=2))
    variables = random_parameters(model, TOKENS)
    rules = miras.model.weight_rules(model.config)
    published = names.to_published(variables, rules)
    assert published["layers.1.mixer.alpha_proj.up.bias"].shape == (16,)
    assert ("layers.1.attn.q_proj.weight" in published) == ("layers.1.mlp2.up_proj.weight" in published) == hybrid
    assert ("layers.0.mixer.delta_proj.bias" in published) == (kind == "yaad")
    back = names.convert(published, rules, variables)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))


def test_loss_reaches_thresholds_and_gates_through_the_inner_training():
    model = Miras(SMALL)
    variables = random_parameters(model, TOKENS)
    loss = zoo.registry.model("miras_yaad_170m").loss(model)
    gradient = jax.jit(jax.grad(lambda params: loss(params, {}, {"tokens": TOKENS}, {}, True)[0]))(variables["params"])
    mixer = gradient["decoder"]["layer_0"]["mixer"]
    for part in ("memory", "alpha_down", "eta_up", "delta"):
        assert all(float(jnp.abs(leaf).max()) > 1e-7 for leaf in jax.tree.leaves(mixer[part])), part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "yad"}, "unknown kind 'yad'; did you mean 'yaad'"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ({"kind": "moneta", "q": 1.0}, "q at least 2, got 3.0 and 1.0"),
        ({"num_heads": 3}, r"must be a multiple of heads \(3\)"),
    ],
)
def test_wrong_configs_say_so(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_wrong_arguments_say_so():
    query, key, value, eta, alpha = streams()
    with pytest.raises(ValueError, match="unknown retention 'l1'"):
        framework_scan("l2", "l1", query, key, value, eta)
    with pytest.raises(ValueError, match="bias must be one of"):
        framework_scan("l1", "l2", query, key, value, eta)
    with pytest.raises(ValueError, match=r"eta must be \(batch, time\) = \(2, 9\), got \(9,\)"):
        framework_scan("l2", "l2", query, key, value, eta[0])
    with pytest.raises(ValueError, match="'l2' only, got 'lp'"):
        framework_scan("lp", "l2", query, key, value, eta, implicit=True)
    with pytest.raises(ValueError, match="gates 'token' needs alpha"):
        miras_instance("mamba2")(query, key, value)
    with pytest.raises(ValueError, match="this instance is the mixer 'moneta'"):
        miras_instance("moneta")(query, key, value, alpha=alpha)
    with pytest.raises(ValueError, match="unknown instance 'delta'"):
        miras_instance("delta")


@pytest.mark.slow
@pytest.mark.parametrize("id", ["miras_moneta_780m", "miras_yaad_1_3b_h"])
def test_published_sizes_train_on_a_slice(id):
    """A step of 4096 tokens a device, on 16 of v5p."""
    assert compile_model(id, "tpu-v5p", (16,), training=True, batch_size=16, dtype=jnp.bfloat16, remat=True).fits

import dataclasses
from functools import partial
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import zoo
from tests.parameters import random_parameters
from zoo import train
from zoo.papers import vdsw
from zoo.weights import names

ot = pytest.importorskip("ot")
KINDS = get_args(vdsw.Kind)


def clouds(*sizes, batch=2, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(batch, size, d)), jnp.float32) for size in sizes]


def test_gradients_are_those_of_differentiated_sorting():
    x, y, z = clouds(17, 17, 12)
    theta = vdsw.uniform_directions(jax.random.key(0), 2, 5, 3)

    def plain(x, y, theta):
        xs, ys = (jnp.sort(jnp.einsum("bmd,bld->blm", cloud, theta), -1) for cloud in (x, y))
        return jnp.square(xs - ys).sum(-1).mean()

    ours = jax.jit(jax.grad(lambda *a: vdsw.sliced_wasserstein(*a).mean(), argnums=(0, 1, 2)))(x, y, theta)
    for mine, theirs in zip(ours, jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(x, y, theta), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * float(theirs.std()))
    uneven = lambda x: vdsw.sliced_wasserstein(x, z, theta, 2, "mean").mean()  # noqa: E731

    def repeated(x):  # 17 * 12 points on both sides
        xs, zs = (jnp.sort(jnp.einsum("bmd,bld->blm", cloud, theta), -1) for cloud in (x, z))
        return jnp.square(jnp.repeat(xs, 12, -1) - jnp.repeat(zs, 17, -1)).mean(-1).mean()

    expected = jax.jit(jax.grad(repeated))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(uneven))(x), expected, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("sizes", [(20, 20), (20, 27), (7, 30)])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_costs_are_pot_s(sizes, p):
    x, y = clouds(*sizes)
    theta = vdsw.uniform_directions(jax.random.key(0), 2, 4, 3)
    ours = vdsw.sliced_costs(x, y, theta, p, "mean")
    for b, l in np.ndindex(2, 4):
        theirs = ot.wasserstein_1d(*(np.asarray(cloud[b] @ theta[b, l], np.float64) for cloud in (x, y)), p=p)
        assert float(ours[b, l]) == pytest.approx(float(theirs), rel=1e-4)
    distance = vdsw.sliced_wasserstein(x, y, theta, p, "mean", squared=False)
    np.testing.assert_allclose(distance, ours.mean(1) ** (1 / p), rtol=1e-5)


def distribution(d, kappa, seed=0):
    loc = vdsw.unit(jnp.asarray(np.random.default_rng(seed).normal(size=(d,)), jnp.float32))
    return vdsw.VonMisesFisher(loc, kappa)


@pytest.mark.parametrize("d", [2, 3, 5, 10])
@pytest.mark.parametrize("kappa", [0.1, 1.0, 50.0, 500.0])
def test_the_distribution_s_constants_are_bessel_functions(d, kappa):
    found, order = distribution(d, kappa), d / 2 - 1
    log_bessel = np.log(scipy.special.ive(order, kappa)) + kappa
    log_c = order * np.log(kappa) - d / 2 * np.log(2 * np.pi) - log_bessel
    length = scipy.special.ive(d / 2, kappa) / scipy.special.ive(order, kappa)
    assert float(found.log_normalizer()) == pytest.approx(log_c, abs=2e-5 * max(kappa, 1))
    assert float(found.mean_length()) == pytest.approx(length, abs=1e-6)
    entropy = -log_c - kappa * length
    assert float(found.entropy()) == pytest.approx(entropy, abs=1e-3)
    area = np.log(2) + d / 2 * np.log(np.pi) - scipy.special.gammaln(d / 2)
    assert float(found.kl_uniform()) == pytest.approx(area - entropy, abs=1e-3)


@pytest.mark.parametrize(
    "d, kappa",
    [
        (3, 0.1),
        (3, 500.0),
        (4, 1.0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 3.0), (3, 10.0), (8, 40.0))),
    ],
)
def test_samples_have_the_distribution_s_moments(d, kappa):
    found = distribution(d, kappa)
    x = jax.jit(partial(vdsw.VonMisesFisher.sample, count=20_000))(found, jax.random.key(1))
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), 1, atol=1e-4)
    np.testing.assert_allclose(x.mean(0), found.mean(), atol=0.02)
    cosine = np.asarray(x @ found.loc, np.float64)
    # E[cos^2] = 1 - (d - 1) A / kappa.
    expected = 1 - (d - 1) * float(found.mean_length()) / kappa
    assert np.mean(cosine**2) == pytest.approx(expected, abs=0.01)


def test_samples_are_differentiable_in_their_location():
    u, v = jax.random.uniform(jax.random.key(0), (6, 1)), jax.random.normal(jax.random.key(1), (6, 2))
    target = jnp.array([0.3, -0.5, 0.2])
    value = jax.jit(lambda loc: (vdsw.VonMisesFisher(loc, 5.0).from_noise(u, v) @ target).sum())
    loc, direction = vdsw.unit(jnp.array([0.2, 0.9, -0.4])), jnp.array([0.1, 0.3, -0.2])
    slope = (value(loc + 1e-2 * direction) - value(loc - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jax.grad(value)(loc) @ direction, slope, rtol=1e-2)
    first = jax.grad(value)(jnp.array([1.0, 0.0, 0.0]))  # where the reflection is none
    assert jnp.isfinite(first).all()
    wood = jax.jit(lambda loc: vdsw.VonMisesFisher(loc, 5.0).sample(jax.random.key(0), 4).sum())
    assert jnp.isfinite(jax.grad(wood)(vdsw.unit(jnp.ones(5)))).all()


def small(kind, points=12, **options):
    model = vdsw.AmortizedDirection(vdsw.AmortizedConfig(kind=kind, points=points, key_dim=8, proj_dim=5, **options))
    x, y = clouds(points, points)
    return model, random_parameters(model, x, y), x, y


def direct(kind, p, x, y):
    """The definitions, step by step, on numpy."""

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def softmax(x, axis):
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    def pointwise(x, name):
        return linear(1 / (1 + np.exp(-linear(x, p[f"{name}_0"]))), p[f"{name}_1"])

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if kind.endswith("attn"):
        a, total = p["attention"], 0
        for cloud in (x, y):
            q, k, v = (linear(cloud, a[name]) for name in ("queries", "keys", "values"))
            if kind == "eff_attn":
                out = softmax(q, -1) @ (softmax(k, 1).swapaxes(1, 2) @ v)
            else:
                if kind == "lin_attn":
                    k = linear(k.swapaxes(1, 2), a["project_keys"]).swapaxes(1, 2)
                    v = linear(v.swapaxes(1, 2), a.get("project_values", a["project_keys"])).swapaxes(1, 2)
                out = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -1) @ v
            total = total + out.mean(1) / 2
    else:
        both = np.concatenate([x, y], 1)
        both = pointwise(both, "before") if kind == "glinear" else both
        total = linear(both.swapaxes(1, 2), p["along"])[..., 0]
        total = pointwise(total, "after") if kind == "nonlinear" else total
    return total / np.linalg.norm(total, axis=-1, keepdims=True)


@pytest.mark.parametrize("kind, options", [*((kind, {}) for kind in KINDS), ("lin_attn", {"sharing": True})])
def test_streamed_directions_are_the_direct_ones(kind, options):
    model, variables, x, y = small(kind, **options)
    predict = jax.jit(model.apply)
    found = predict(variables, x, y)
    np.testing.assert_allclose(found, direct(kind, variables["params"], x, y), atol=1e-5)
    published = names.to_published(variables, vdsw.direction_rules(model.config))
    back = names.convert(published, vdsw.direction_rules(model.config), variables)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    if kind.endswith("attn"):
        np.testing.assert_allclose(predict(variables, y, x), found, atol=1e-6)
    permuted = predict(variables, x[:, ::-1], y[:, jnp.roll(jnp.arange(12), 5)])
    if kind in ("attn", "eff_attn"):
        np.testing.assert_allclose(permuted, found, atol=1e-5)
    elif kind == "lin_attn":
        assert jnp.abs(permuted - found).max() > 1e-3


@pytest.mark.parametrize("kind", ["attn", *(pytest.param(k, marks=pytest.mark.slow) for k in ("eff_attn", "lin_attn"))])
def test_no_matrix_of_points_by_points_is_made(kind):
    points = 8192
    model = vdsw.AmortizedDirection(vdsw.AmortizedConfig(kind=kind, points=points))
    x = jax.ShapeDtypeStruct((1, points, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x, x)
    variables = nn.unbox(variables)
    gradient = jax.grad(lambda variables, x, y: model.apply(variables, x, y)[0, 0])
    memory = jax.jit(gradient).lower(variables, x, x).compile().memory_analysis().temp_size_in_bytes
    assert memory < points**2  # a quarter of what one matrix of float32 takes


def test_players_move_their_own_parameters_only():
    model, variables, x, y = small("eff_attn", directions=6)
    keys = tuple(jax.random.split(jax.random.key(0)))
    losses = partial(vdsw.amortized_loss, model)

    @jax.jit
    def everything(params, y):
        gradients = [
            jax.grad(lambda q: losses(q, x, y, keys).cloud)(params),
            jax.grad(lambda y: losses(params, x, y, keys).direction)(y),
            jax.grad(lambda y: losses(params, x, y, keys).cloud)(y),
        ]
        return gradients, losses(params, x, y, (keys[0], keys[0])), losses(params, x, y, keys)

    (by_params, search_by_y, cost_by_y), same, fresh = everything(variables["params"], y)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(by_params))
    assert not jnp.any(search_by_y) and jnp.any(cost_by_y)
    np.testing.assert_allclose(same.direction, -same.cloud, rtol=1e-6)
    assert float(fresh.direction) != -float(fresh.cloud)


def test_ascent_finds_the_worst_direction():
    x = clouds(60, batch=3)[0]
    y = x + jnp.array([0.0, 2.0, 0.0])
    found = jax.jit(partial(vdsw.max_sliced_wasserstein, steps=100, lr=0.1))(x, y, jax.random.key(0))
    assert jnp.abs(found.theta[:, 1]).min() > 0.99
    np.testing.assert_allclose(found.cost, 60 * 4.0, rtol=0.02)
    assert found.trace.shape == (100, 3) and (found.trace[-1] >= found.trace[0]).all()
    options = {"steps": 40, "lr": 0.1, "directions": 20, "kappa": 50.0}
    around = jax.jit(partial(vdsw.v_dsw, **options))(x, y, jax.random.key(0))
    assert jnp.abs(around.theta[:, 1]).min() > 0.9 and (around.cost < found.cost).all()
    refined = vdsw.v_dsw(x, y, jax.random.key(1), start=found.theta, steps=0, directions=20, kappa=50.0)
    np.testing.assert_allclose(refined.theta, found.theta, atol=1e-6)
    with pytest.raises(ValueError, match="a key for random starts, or the starts"):
        vdsw.max_sliced_wasserstein(x, y)


@pytest.mark.slow
def test_learned_distributions_cost_more_than_uniform_directions():
    x = clouds(40)[0]
    y = x + jnp.array([0.0, 1.0, 0.0])
    learned = jax.jit(partial(vdsw.dsw, directions=50, steps=60, lr=0.05, penalty=0.1))(x, y, jax.random.key(0))
    uniform = vdsw.sliced_wasserstein(x, y, vdsw.uniform_directions(jax.random.key(0), 2, 500, 3))
    assert (learned > 1.5 * uniform).all()


@pytest.mark.slow
def test_adaptive_directions_are_as_many_as_needed():
    x, y = clouds(20, 20)
    _, few = vdsw.adaptive_sw(x, y, jax.random.key(0), 50.0)
    tight, many = vdsw.adaptive_sw(x, y, jax.random.key(0), 1.0)
    assert int(few) < int(many) <= 500
    exact = vdsw.sliced_wasserstein(x, y, vdsw.uniform_directions(jax.random.key(5), 2, 4000, 3))
    assert (jnp.abs(tight - exact) < 2.0).all()
    count = int(many)
    drawn = [vdsw.uniform_directions(jax.random.fold_in(jax.random.key(0), n), 2, 1, 3) for n in range(count)]
    theta = jnp.concatenate(drawn, axis=1)
    np.testing.assert_allclose(tight, vdsw.sliced_wasserstein(x, y, theta), rtol=1e-4)
    gradient = jax.grad(lambda x: vdsw.adaptive_sw(x, y, jax.random.key(0), 1.0)[0].sum())(x)
    plain = jax.grad(lambda x: vdsw.sliced_wasserstein(x, y, theta).sum())(x)
    np.testing.assert_allclose(gradient, plain, atol=1e-4 * float(plain.std()) + 1e-6)


def test_scores_of_clouds():
    x, y = clouds(12, 12)
    square = np.square(np.asarray(x)[:, :, None] - np.asarray(y)[:, None]).sum(-1)
    np.testing.assert_allclose(vdsw.chamfer(x, y), square.min(2).mean(1) + square.min(1).mean(1), rtol=1e-4)
    from scipy.optimize import linear_sum_assignment

    for b, emd in enumerate(vdsw.emd_exact(x, y)):
        cost = np.sqrt(square[b])
        assert emd == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-5)
    real = np.tanh(np.random.default_rng(0).normal(size=(6, 10, 3))).astype(np.float32)
    same = vdsw.generation_scores(real, real)
    assert same.jsd == 0 and same.coverage == 1 and same.minimum_matching == pytest.approx(0, abs=1e-5)
    far = vdsw.generation_scores(np.ones_like(real), real, "emd")
    assert far.one_neighbour == 1 and far.jsd > 0.5 and far.coverage == pytest.approx(1 / 6)


def tiny_autoencoder():
    return vdsw.PointNetAE(vdsw.PointNetConfig(points=10, code=4, widths=(6, 6, 8), hidden=8))


def test_codes_have_unit_length_and_forget_the_order():
    model, x = tiny_autoencoder(), clouds(14)[0]
    variables = random_parameters(model, x)
    variables = {**variables, "batch_stats": jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), variables["batch_stats"])}
    code, cloud = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(jnp.linalg.norm(code, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x[:, ::-1])[0], code, atol=1e-6)
    assert cloud.shape == (2, 10, 3) and jnp.abs(cloud).max() < 1
    published = names.to_published(variables, vdsw.autoencoder_rules(model.config))
    assert published["encoder.mlp2.0.weight"].shape == (8, 6, 1)


@pytest.mark.slow
def test_capsules_are_squashed_and_give_whole_clouds():
    model = vdsw.PCNCapsAE(vdsw.CapsuleConfig(points=12, primary=8, primary_size=3, latent=4, latent_size=6))
    x = clouds(9)[0]
    variables = model.init(jax.random.key(0), x)
    capsules, cloud = jax.jit(model.apply)(variables, x)
    assert capsules.shape == (2, 4, 6) and cloud.shape == (2, 12, 3)
    assert jnp.linalg.norm(capsules, axis=-1).max() < 1
    drawn = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)})
    assert drawn[0][1].shape == (2, 12, 3)


@pytest.mark.parametrize("kind, fine_tuning", [("eff_attn", 0), pytest.param("lin_attn", 2, marks=pytest.mark.slow)])
def test_two_players_move_in_turns(kind, fine_tuning):
    autoencoder, x = tiny_autoencoder(), clouds(10)[0]
    direction = vdsw.AmortizedDirection(vdsw.AmortizedConfig(kind=kind, points=10, key_dim=4, proj_dim=3, directions=4))
    optimizer = vdsw.two_players(optax.sgd(0.1), vdsw.direction_optimizer())

    def init(rng):
        variables = autoencoder.init(rng, x)
        return {"params": {"autoencoder": variables.pop("params"), "direction": direction.init(rng, x, x)["params"]},
                **variables}  # fmt: skip

    state = train.init_sharded(init, optimizer, jax.random.key(0), train.make_mesh(train.MeshConfig(data=1)))
    before = jax.tree.map(jnp.copy, state.params)
    step = vdsw.two_player_step(autoencoder, direction, optimizer, fine_tuning=fine_tuning, start=1)
    state, metrics = step(state, {"x": x})
    assert jnp.isfinite(metrics["loss"]) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params["direction"], before["direction"])  # not before `start`
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params["autoencoder"], before["autoencoder"])
    assert moved["to_points"]["kernel"]
    state, _ = step(state, {"x": x})
    kept = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.any(a != b), state.params["direction"], before["direction"]))
    assert any(kept)


def test_the_direction_s_adam_has_no_momentum():
    rule = vdsw.direction_optimizer(0.1)
    state = rule.init(jnp.zeros(1))
    _, state = rule.update(jnp.ones(1), state)
    update, _ = rule.update(-jnp.ones(1), state)
    np.testing.assert_allclose(update, 0.1, rtol=1e-5)


def test_published_networks():
    counts = {}
    for name in ("amortized_vsw_linear", "amortized_vsw_attn", "amortized_msw_lin_attn"):
        init = partial(zoo.create(name).init, jax.random.key(0), **zoo.example_inputs(name, 1))
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init)))
    assert counts == {
        "amortized_vsw_linear": 4097,
        "amortized_vsw_attn": 2 * (3 * 64 + 64) + 12,
        "amortized_msw_lin_attn": 2 * (3 * 64 + 64) + 12 + 2 * (2048 * 64 + 64),
    }


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, y, t: vdsw.sliced_costs(x[0], y, t), r"clouds must be \(batch, points, d\)"),
        (lambda x, y, t: vdsw.sliced_costs(x, y[:, :3], t), "needs clouds of equal size, got 4 and 3"),
        (lambda x, y, t: vdsw.sliced_costs(x, y, t[..., :2]), "theta must be"),
        (lambda x, y, t: vdsw.sliced_costs(x, y, t, 0.5), "p must be at least 1"),
        (lambda x, y, t: vdsw.sliced_costs(x, y, t, 2, "median"), "reduction must be 'sum' or 'mean'"),
        (lambda x, y, t: vdsw.max_sliced_wasserstein(x, y, start=t[:, 0], lr=0.0), "lr positive"),
        (lambda x, y, t: vdsw.max_sliced_wasserstein(x, y, start=t[:, 0], optimizer="lion"), "'adam' or 'sgd'"),
        (lambda x, y, t: vdsw.adaptive_sw(x, y, jax.random.key(0), 0.0), "epsilon must be positive"),
        (lambda x, y, t: vdsw.AmortizedConfig(kind="cross"), "kind must be one of"),
        (lambda x, y, t: vdsw.AmortizedConfig(kappa=0.0), "kappa must be None or positive"),
        (lambda x, y, t: vdsw.CapsuleConfig(points=100), "multiple of latent, got 100 and 64"),
        (lambda x, y, t: vdsw.generation_scores(x, y, "hausdorff"), "distance must be"),
        (lambda x, y, t: small("linear", points=5)[0].init(jax.random.key(0), x, y), "takes clouds of 5 points"),
    ],
)  # fmt: skip
def test_wrong_input_says_so(call, message):
    x, y = clouds(4, 4)
    with pytest.raises(ValueError, match=message):
        call(x, y, vdsw.uniform_directions(jax.random.key(0), 2, 3, 3))


def test_fine_tuning_needs_a_concentration():
    config = dataclasses.replace(vdsw.AmortizedConfig(), kappa=None)
    optimizer = vdsw.two_players(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="needs a network of directions with a concentration"):
        vdsw.two_player_step(tiny_autoencoder(), vdsw.AmortizedDirection(config), optimizer, fine_tuning=1)

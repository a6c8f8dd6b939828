import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import registry
from zoo.data import pde
from zoo.layers.spectral import SpectralConv, kept_rows
from zoo.papers import cape
from zoo.weights import names

LINE = cape.CAPEConfig(grid=(32,), channels=2, parameters=2, width=6, modes=(5,), widening=8, block_modes=(4,))
PLANE = dataclasses.replace(LINE, grid=(16, 32), modes=(4, 3), block_modes=(3, 4))
SMALL = {"line": LINE, "plane": PLANE}
every_grid = pytest.mark.parametrize("grid", SMALL)


def small(config):
    inputs = cape.model.example_inputs(config, 2)
    model = cape.CAPEModel(config)
    variables = random_parameters(model, *inputs.values())
    if "batch_stats" in variables:
        variables = {
            **variables,
            "batch_stats": jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), variables["batch_stats"]),
        }
    return model, variables, {name: jnp.asarray(value) for name, value in inputs.items()}


@pytest.mark.parametrize(
    "id, count",
    [("cape_fno_1d", 68_230), ("fno_1d", 72_509), ("cape_unet_1d", 2_752_262), ("cape_fno_2d", 822_428),
     ("fno_2d", 910_840), ("cape_unet_2d", 8_120_720)],
)  # fmt: skip
def test_parameters_with_complex_numbers_counted_once(id, count):
    """Both published counts; the registry holds the other one."""
    inputs = zoo.example_inputs(id, 1)
    shapes = nn.unbox(jax.eval_shape(lambda: zoo.create(id).init(jax.random.key(0), **inputs)))["params"]
    pairs = [leaf for path, leaf in jax.tree.leaves_with_path(shapes) if any("spectral" in str(key) for key in path)]
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert total - sum(leaf.size for leaf in pairs) // 2 == count


@pytest.mark.parametrize(
    "points, modes", [((12,), (4,)), ((12,), (7,)), ((9,), (5,)), ((10, 12), (3, 7)), ((8, 6), (5, 2))]
)
def test_a_spectral_layer_is_that_of_the_fourier_transform(points, modes):
    layer = SpectralConv(3, modes)
    x = np.random.default_rng(0).normal(size=(2, *points, 4)).astype(np.float32)
    variables = random_parameters(layer, x)
    kernel = np.asarray(variables["params"]["kernel"])
    weight = kernel[..., 0] + 1j * kernel[..., 1]
    axes = tuple(range(1, x.ndim - 1))
    spectrum = np.fft.rfftn(x, axes=axes)
    out = np.zeros((*spectrum.shape[:-1], 3), complex)
    if len(points) == 1:
        out[:, : modes[0]] = np.einsum("bki,kio->bko", spectrum[:, : modes[0]], weight)
    else:
        m, n = modes
        out[:, :m, :n] = np.einsum("bkli,klio->bklo", spectrum[:, :m, :n], weight[0])
        out[:, -m:, :n] = np.einsum("bkli,klio->bklo", spectrum[:, -m:, :n], weight[1])
    # A plane's inverse goes along the first direction first, and then takes the real part.
    if len(points) == 2:
        out = np.fft.ifft(out, axis=1)
    expected = np.fft.irfft(out, points[-1], axis=axes[-1])
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=2e-5)


def test_overlapping_modes_are_those_of_the_second_block():
    np.testing.assert_array_equal(kept_rows(16, 9), np.arange(16))
    layer = SpectralConv(2, (9, 9))
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 2))
    kernel = random_parameters(layer, x)["params"]["kernel"]
    gradient = jax.jit(jax.grad(lambda kernel: jnp.square(layer.apply({"params": {"kernel": kernel}}, x)).sum()))(
        kernel
    )
    used = np.abs(gradient).max((2, 3, 4, 5)) > 0
    assert used[0].tolist() == [True] * 7 + [False] * 2 and used[1].all()


def torch_solver(state, config, u, parameters):
    """Another implementation, on torch's functions and the published names."""
    torch = pytest.importorskip("torch")
    F, dims, cape_on = torch.nn.functional, config.dims, config.conditioning == "cape"
    convolve = F.conv1d if dims == 1 else F.conv2d
    s = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    gelu = F.gelu

    def conv(x, name, **options):
        weight = s[f"{name}.weight"]
        if weight.ndim == 2:
            weight = weight.reshape(*weight.shape, *(1,) * dims)
        return convolve(x, weight, s.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    def spectral(x, name):
        w = [torch.view_as_complex(s[f"{name}.weights{i}"].contiguous()) for i in range(1, dims + 1)]
        axes, m = tuple(range(2, 2 + dims)), w[0].shape[2:]
        x_hat = torch.fft.rfftn(x, dim=axes)
        out = torch.zeros(x.shape[0], w[0].shape[1], *x_hat.shape[2:], dtype=torch.cfloat)
        low = (..., *(slice(size) for size in m))
        out[low] = torch.einsum("bi...,io...->bo...", x_hat[low], w[0])
        if dims == 2:
            high = (..., slice(-m[0], None), slice(m[1]))
            out[high] = torch.einsum("bi...,io...->bo...", x_hat[high], w[1])
        return torch.fft.irfftn(out, s=x.shape[2:], dim=axes)

    x = torch.tensor(np.moveaxis(np.asarray(u), -1, 1).copy())
    p = torch.tensor(np.asarray(parameters))
    prefix, inputs, e = "", [x], None
    if cape_on:
        b, q = "PrmEmb_Pre.0.", p if dims == 1 else torch.sigmoid(torch.log(p))
        gates = [
            F.linear(gelu(F.linear(q, s[f"{b}fc{i}a.weight"], s[f"{b}fc{i}a.bias"])), s[f"{b}fc{i}b.weight"],
                     s[f"{b}fc{i}b.bias"]).reshape(len(p), -1, *(1,) * dims) for i in range(3)
        ]  # fmt: skip
        y = gelu(conv(x, f"{b}CNN_0"))
        pooled = spectral((F.avg_pool1d if dims == 1 else F.avg_pool2d)(y, 4), f"{b}CNN_SC") * gates[0]
        z = F.interpolate(pooled, scale_factor=4, mode="nearest") + conv(y, f"{b}CNN_AC") * gates[1]
        z = z + conv(y, f"{b}CNN_AD", groups=y.shape[1]) * gates[2] + conv(y, f"{b}CNN_1")
        r = F.layer_norm(conv(gelu(z), f"{b}CNN_2"), x.shape[2:], s[f"{b}LN.weight"], s[f"{b}LN.bias"])
        e = x + r if dims == 1 else x * (1 + r)
        prefix, inputs = "model.", [x, e]
    elif config.conditioning == "concatenate":
        inputs.append(p.reshape(*p.shape, *(1,) * dims).expand(*p.shape, *x.shape[2:]))
    if config.core == "fno":
        grid = torch.tensor(np.moveaxis(cape.cell_centres(config.grid), -1, 1).copy())
        h = conv(torch.cat([*inputs, grid.expand(len(p), *grid.shape[1:])], 1), f"{prefix}fc0")
        h = F.pad(h, [0, 2] * dims)
        for layer in range(4):
            h = spectral(h, f"{prefix}conv{layer}") + conv(h, f"{prefix}w{layer}")
            h = gelu(h) if layer < 3 else h
        h = h[(..., *(slice(-2) for _ in range(dims)))]
        h = conv(gelu(conv(h, f"{prefix}fc1")), f"{prefix}fc2")
    else:

        def double(h, module, short):
            for i in (1, 2):
                h, norm = conv(h, f"{prefix}{module}.{short}conv{i}"), f"{prefix}{module}.{short}norm{i}"
                names = ("running_mean", "running_var", "weight", "bias")
                h = torch.tanh(F.batch_norm(h, *(s[f"{norm}.{name}"] for name in names)))
            return h

        h, skips = torch.cat(inputs, 1), []
        for level in range(1, 5):
            skips.append(double(h, f"encoder{level}", f"enc{level}"))
            h = (F.max_pool1d if dims == 1 else F.max_pool2d)(skips[-1], 2)
        h = double(h, "bottleneck", "bottleneck")
        for level in range(4, 0, -1):
            up = f"{prefix}upconv{level}"
            h = (F.conv_transpose1d if dims == 1 else F.conv_transpose2d)(
                h, s[f"{up}.weight"], s[f"{up}.bias"], stride=2
            )
            h = double(torch.cat([h, skips[level - 1]], 1), f"decoder{level}", f"dec{level}")
        h = conv(h, f"{prefix}conv")
    h = conv(h, "mix_emb") if cape_on else h
    return np.moveaxis(h.numpy(), 1, -1), None if e is None else np.moveaxis(e.numpy(), 1, -1)


@every_grid
@pytest.mark.parametrize(
    "core, conditioning",
    [
        ("fno", "cape"),
        pytest.param("unet", "cape", marks=pytest.mark.slow),
        ("fno", "concatenate"),
        pytest.param("fno", "none", marks=pytest.mark.slow),
        ("unet", "none"),
    ],
)
def test_networks_are_those_of_another_implementation(grid, core, conditioning):
    config = dataclasses.replace(SMALL[grid], core=core, conditioning=conditioning)
    if core == "unet":
        config = dataclasses.replace(config, grid=(16,) * config.dims, block_modes=(2,) * config.dims, width=2)
    model, variables, inputs = small(config)
    published = names.to_published(variables, cape.rules(config))
    back = names.convert(published, cape.rules(config), variables)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    following, intermediate = jax.jit(model.apply)(variables, **inputs)
    expected, field = torch_solver(published, config, **inputs)
    np.testing.assert_allclose(following, expected, atol=1e-4 * expected.std() + 1e-5)
    if field is not None:
        np.testing.assert_allclose(intermediate, field, atol=1e-4 * field.std())


@every_grid
def test_the_block_adds_on_a_line_and_multiplies_on_a_plane(grid):
    block = cape.CAPEBlock(SMALL[grid])
    inputs = {name: jnp.asarray(value) for name, value in cape.model.example_inputs(SMALL[grid], 2).items()}
    params = random_parameters(block, *inputs.values())["params"]
    params = {**params, "scale": 0 * params["scale"], "bias": 0 * params["bias"] + 0.5}
    field, u = jax.jit(block.apply)({"params": params}, **inputs), inputs["u"]
    np.testing.assert_allclose(field, u + 0.5 if grid == "line" else 1.5 * u, atol=1e-6)


@every_grid
def test_gates_are_made_once_and_are_not_bounded(grid):
    model, variables, inputs = small(SMALL[grid])
    gates = model.apply(variables, 100 * inputs["parameters"], method="condition")
    assert gates.shape == (2, len(cape.GATES), 8)
    if grid == "line":
        assert jnp.abs(gates).max() > 10
    else:  # there p / (1 + p) comes in
        nearly = model.apply(variables, 1e6 * inputs["parameters"], method="condition")
        np.testing.assert_allclose(nearly, gates, atol=0.2)


def test_curriculum_goes_from_teacher_forcing_to_full_rollouts():
    border = cape.curriculum_steps(np.arange(100), 100, 3, 41)
    assert border[0] == 1 and border[-1] == 40 and (np.diff(border) >= 0).all()
    assert cape.curriculum_steps(51.5, 100, 3, 41) == 20  # half of the way
    with pytest.raises(ValueError, match="warmup must be in"):
        cape.curriculum_steps(0, 3, 3, 41)


def solution_of(config, frames=5):
    shape = (2, frames, *config.grid, config.channels)
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


def test_the_loss_is_its_definition():
    model, variables, inputs = small(LINE)
    solution, p, border, c = solution_of(LINE), inputs["parameters"], 3, 0.1
    total = running = 0.0
    u, apply = solution[:, 0], jax.jit(model.apply)
    for t in range(1, 5):
        following, e = apply(variables, u, p)
        total += cape.relative_l2(following, solution[:, t])
        if t < 4:
            running += cape.relative_l2(e, solution[:, t])
            total += c * running
        u = following if t < border else solution[:, t]
    roll = jax.jit(lambda border: cape.rollout_loss(model, variables["params"], {}, solution, p, border, coefficient=c))
    found = roll(jnp.array([border, border]))
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_allclose(found.intermediate, running, rtol=1e-5)
    np.testing.assert_array_equal(found.prediction[:, 0], solution[:, 0])
    # One border a sample: the second keeps to its own.
    each = roll(jnp.array([3, 1]))
    np.testing.assert_allclose(each.prediction[0], found.prediction[0], atol=1e-4)
    assert jnp.abs(each.prediction[1, 2] - found.prediction[1, 2]).max() > 1e-2


def test_gradients_flow_through_the_autoregressive_part():
    model, variables, inputs = small(LINE)
    solution = solution_of(LINE, 4)

    @jax.jit
    @jax.grad
    def sensitivity(u0, border):
        changed = solution.at[:, 0].set(u0)
        found = cape.rollout_loss(model, variables["params"], {}, changed, inputs["parameters"], border)
        return found.prediction[:, 3].sum()

    assert jnp.abs(sensitivity(solution[:, 0], 4)).max() > 1e-3
    assert not jnp.any(sensitivity(solution[:, 0], 1))  # teacher forcing cuts it


@pytest.mark.slow
def test_checkpointing_changes_nothing_and_a_rollout_is_the_loss_s():
    model, variables, inputs = small(LINE)
    solution, p = solution_of(LINE, 4), inputs["parameters"]

    def gradient(checkpoint):
        def loss(params):
            found = cape.rollout_loss(model, params, {}, solution, p, 4, checkpoint=checkpoint)
            return found.total, found.prediction

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (plain, prediction), (again, _) = gradient(False), gradient(True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()) + 1e-6)
    np.testing.assert_allclose(cape.rollout(model, variables, solution[:, 0], p, 3), prediction, atol=1e-4)


@pytest.mark.slow
def test_training_moves_running_statistics():
    config = dataclasses.replace(LINE, core="unet", grid=(16,), block_modes=(2,), width=2)
    model, variables, inputs = small(config)
    batch = {"solution": solution_of(config, 3), "parameters": inputs["parameters"], "border": jnp.full(2, 2)}
    state = {"batch_stats": variables["batch_stats"]}
    loss = jax.jit(cape.loss(model), static_argnums=4)
    value, (changed, metrics) = loss(variables["params"], state, batch, {"dropout": jax.random.key(0)}, True)
    assert jnp.isfinite(value) and set(metrics) == {"intermediate", "relative_l2"}
    before, after = (tree["batch_stats"]["core"]["down_1"]["norm1"]["mean"] for tree in (state, changed))
    assert jnp.abs(before - after).max() > 0


@pytest.mark.slow
def test_the_penalty_is_of_the_gradient_by_parameters():
    model, variables, inputs = small(LINE)
    key, u, p = jax.random.key(3), inputs["u"], inputs["parameters"]
    found = jax.jit(lambda u, p: cape.gradient_penalty(model, variables, u, p, key, target=2.0))(u, p)
    low, high = np.maximum(p.min(0) / 2, 0), 2 * p.max(0)
    q = low + 0.5 * (jax.random.normal(key, p.shape) + 1) * (high - low)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        u, q = (jnp.asarray(value, jnp.float64) for value in (u, q))
        total = jax.jit(lambda q: model.apply(wide, u, q)[0].sum((1, 2)))
        slopes = jnp.stack([(total(q + d) - total(q - d)) / 2e-6 for d in 1e-6 * jnp.eye(2)], -1)
    np.testing.assert_allclose(found, np.mean((np.linalg.norm(slopes, axis=-1) - 2.0) ** 2), rtol=1e-3)


def test_residuals_vanish_on_solutions():
    x, times = pde.centres(64), np.linspace(0, 2, 401)
    waves = pde.Waves(2 * np.pi * np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1)))
    wave = jnp.asarray(pde.advection_exact(waves, np.array([0.5]), x, times))
    p = jnp.array([[0.5]])
    assert cape.pino_residual(wave, p, "advection") < 1e-4 < 1 < cape.pino_residual(wave, 3 * p, "advection")
    shock = jnp.asarray(pde.burgers_cole_hopf(waves, np.array([0.5]), x, times[10:51], points=4000), jnp.float32)
    right, published = (
        cape.pino_residual(shock, p, "burgers", duration=0.2, as_published=flag) for flag in (False, True)
    )
    assert right < 1e-3 and published > 1
    with pytest.raises(ValueError, match="equation must be 'advection' or 'burgers', got 'heat'"):
        cape.pino_residual(wave, p, "heat")


def test_scores_of_known_errors():
    x = pde.centres(32)
    target = jnp.asarray(np.broadcast_to(2 * np.sin(2 * np.pi * x), (3, 4, 32)), jnp.float32)[..., None]
    error = jnp.asarray(0.1 * np.cos(2 * np.pi * 6 * x), jnp.float32)[:, None]
    scores = cape.pde_metrics(target + error, target)
    assert float(scores.rmse) == pytest.approx(0.1 / 2**0.5, rel=1e-4)
    assert float(scores.nrmse) == pytest.approx(0.05, rel=1e-4)
    assert float(scores.conserved) < 1e-6 and float(scores.middle) == pytest.approx(0.05 / 8, rel=1e-3)
    assert float(scores.low) < 1e-6 and float(scores.high) < 1e-6
    assert float(scores.maximum) == pytest.approx(float(jnp.abs(error).max()), rel=1e-4)
    shifted = cape.pde_metrics(target + 0.3, target)
    assert [float(v) for v in (shifted.conserved, shifted.boundary, shifted.low * 4)] == pytest.approx(
        [0.3] * 3, rel=1e-3
    )
    plane = jnp.zeros((1, 2, 16, 16, 2))
    wave = 0.2 * jnp.cos(2 * jnp.pi * 5 * jnp.asarray(pde.centres(16), jnp.float32))[:, None, None]
    found = cape.pde_metrics(plane + 1 + wave, plane + 1)
    assert float(found.middle) == pytest.approx(0.1 / 4, rel=1e-3) and float(found.low) < 1e-6
    with pytest.raises(ValueError, match="both must be"):
        cape.pde_metrics(plane, plane[:, :1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"core": "mlp"}, "core must be one of"),
        ({"grid": (30,)}, r"multiples of 4, got \(30,\)"),
        ({"core": "unet", "grid": (40,)}, r"multiples of 16, got \(40,\)"),
        ({"modes": (4, 4)}, "one positive number for each of"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"widening": 7}, "widening must be even"),
    ],
)
def test_wrong_configs_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LINE, **options)


def test_wrong_fields_say_so():
    model, _, inputs = small(LINE)
    with pytest.raises(ValueError, match=r"u must be \(batch, 32, 2\), got \(2, 16, 2\)"):
        model.init(jax.random.key(0), jnp.zeros((2, 16, 2)), inputs["parameters"])
    with pytest.raises(ValueError, match=r"parameters must be \(2, 2\), got \(2, 3\)"):
        model.init(jax.random.key(0), inputs["u"], jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="u must be floating point, got int32"):
        model.init(jax.random.key(0), jnp.zeros((2, 32, 2), jnp.int32), inputs["parameters"])
    with pytest.raises(ValueError, match=r"has .* modes, fewer than"):
        cape.CAPEModel(dataclasses.replace(LINE, modes=(30,))).init(jax.random.key(0), **inputs)


def test_the_zoo_has_the_paper():
    assert registry.paper("cape_fno_1d").slug == "cape"
    assert len(zoo.list_models("*fno_?d")) == 6

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tests.train import problem
from zoo import train
from zoo.train.sharding import MESH_AXES, partition_spec

SHAPES = {
    "data": train.MeshConfig(data=8),
    "fsdp": train.MeshConfig(data=1, fsdp=8),
    "tensor": train.MeshConfig(data=1, tensor=8),
    "all": train.MeshConfig(data=2, fsdp=2, tensor=2),
}


def three_steps(mesh_config, accumulation_steps=1):
    # Plain SGD: Adam divides by the root of the second moment, which blows rounding up where a gradient is nearly 0.
    config = problem.Config(
        mesh=mesh_config,
        optimizer=train.OptimizerConfig(
            "sgd", learning_rate=0.1, clip_norm=1.0, ema_decay=0.9, accumulation_steps=accumulation_steps
        ),
    )
    made = problem.setup(config)
    state, losses = made.state, []
    for index in range(3):
        state, metrics = made.step(state, train.shard_batch(problem.batches()[index], made.mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def single_device():
    return three_steps(train.MeshConfig(data=1))


@pytest.mark.parametrize("name", SHAPES)
def test_any_mesh_gives_the_numbers_of_one_device(name, single_device):
    expected_state, expected_losses = single_device
    state, losses = three_steps(SHAPES[name])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for tree in ("params", "ema_params", "model_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            getattr(state, tree),
            getattr(expected_state, tree),
        )


def test_accumulation_on_a_mesh_gives_the_numbers_of_one_device():
    expected, _ = three_steps(train.MeshConfig(data=1), accumulation_steps=2)
    state, _ = three_steps(SHAPES["all"], accumulation_steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected.params)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("data", PartitionSpec(None, None)),
        ("fsdp", PartitionSpec("fsdp", None)),
        ("tensor", PartitionSpec(None, "tensor")),
        ("all", PartitionSpec("fsdp", "tensor")),
    ],
)
def test_parameters_moments_and_averages_are_cut_as_the_table_says(name, spec):
    mesh = train.make_mesh(SHAPES[name])
    optimizer = train.build_optimizer(train.OptimizerConfig(ema_decay=0.9), total_steps=3)
    state = train.init_sharded(problem.initializer(problem.Network()), optimizer, jax.random.key(0), mesh)
    step = train.make_train_step(problem.make_loss(problem.Network()), optimizer, state)
    state, _ = step(state, train.shard_batch(problem.batches()[0], mesh))
    kernels = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(state)
        if "Dense_1" in jax.tree_util.keystr(path) and leaf.ndim == 2
    ]
    assert len(kernels) == 4  # parameters, average, two moments
    pieces = np.prod([mesh.shape[axis] for axis in spec if axis])
    for kernel in kernels:
        assert kernel.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)
        assert kernel.addressable_shards[0].data.size * pieces == kernel.size


@given(
    names=st.lists(st.sampled_from([None, *train.RULES]), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    mesh=st.sampled_from([SHAPES["fsdp"], SHAPES["all"]]).map(train.make_mesh),
)
def test_specs_cut_evenly_and_use_an_axis_once(names, lengths, mesh):
    shape = lengths[: len(names)]
    spec = partition_spec(names, shape, mesh)
    used = [axis for axis in spec if axis is not None]
    assert len(set(used)) == len(used)
    for name, length, axis in zip(names, shape, spec, strict=True):
        assert axis is None or (train.RULES[name] == axis and length % mesh.shape[axis] == 0)
    jax.NamedSharding(mesh, spec).shard_shape(tuple(shape))


def test_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match="unknown logical axis 'embedd'; did you mean 'embed'"):
        partition_spec(["embedd"], [4], train.make_mesh())


def test_mesh_has_all_devices_unless_told():
    assert dict(train.make_mesh().shape) == dict(zip(MESH_AXES, (8, 1, 1), strict=True))
    assert train.make_mesh(train.MeshConfig(fsdp=4)).shape["data"] == 2
    assert train.make_mesh(train.MeshConfig(data=1, tensor=2)).size == 2


@pytest.mark.parametrize("fields", [{"data": 16}, {"fsdp": 3}, {"data": 4, "tensor": 4}])
def test_mesh_that_does_not_fit_is_refused(fields):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        train.make_mesh(train.MeshConfig(**fields))


@pytest.mark.parametrize("fields", [{"data": 0}, {"fsdp": 0}, {"tensor": -1}])
def test_mesh_sizes_are_positive(fields):
    with pytest.raises(ValueError, match=r"must be .*at least 1, got"):
        train.MeshConfig(**fields)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": np.zeros((12, 2))},
        {"x": np.zeros((8, 2)), "y": np.zeros(16)},
        {"x": np.zeros((8, 2)), "y": np.zeros(())},
        {"x": np.zeros((0, 2))},
    ],
)
def test_batch_that_does_not_divide_is_refused_with_its_shapes(batch):
    with pytest.raises(ValueError, match="first axis of a length that 8 devices divide, got shapes"):
        train.shard_batch(batch, train.make_mesh())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "need num_processes, process_id too"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a number, got 'two'"),
    ],
)
def test_incomplete_distributed_settings_are_named(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train.initialize_distributed()


def test_without_distributed_settings_there_is_one_process():
    train.initialize_distributed()
    assert jax.process_count() == 1

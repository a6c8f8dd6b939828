"""Cores on a mesh: the numbers of one device, and no operand moves."""

import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kernels import common
from kernels.attention import attention
from kernels.attention_readout import attention_received, attention_top_k
from kernels.delta_rule import delta_rule
from kernels.linear_attention import linear_attention
from kernels.prob_sparse import prob_sparse_attention, sample_keys
from kernels.spanning_window import spanning_window_attention
from tests.kernels import attention_cases, recurrent_cases
from tests.kernels.attention_cases import Case
from tests.kernels.compile import gradient, shape
from zoo import train
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.compilation import compile_for, make_mesh
from zoo.train.sharding import BATCH_AXES

# Of an array (batch, time, heads, dim).
HEADS_CUT = PartitionSpec(BATCH_AXES, None, "tensor")
HEADS_WHOLE = PartitionSpec(BATCH_AXES)
COLLECTIVES = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"


def test_the_axes_that_cut_cores_are_those_of_training_meshes():
    assert train.sharding.BATCH_AXES == common.BATCH_AXES
    assert (*common.BATCH_AXES, *common.HEAD_AXES) == train.sharding.MESH_AXES


def simulated(data, fsdp, tensor):
    return train.make_mesh(train.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def moved(program):
    """(operation, elements of its largest array) of the collectives of a compiled program."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w\[([\d,]*)\]", match[1])
            found.append((match[2], max(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes)))
    return found


def place(case, floats, others, mesh):
    """The arguments as a network's projections would leave them; what is small is everywhere."""

    def put(name, array):
        spec = PartitionSpec()
        if name in ("query", "key", "value") and case.batch % (mesh.size // mesh.shape["tensor"]) == 0:
            spec = HEADS_WHOLE if array.shape[2] % mesh.shape["tensor"] else HEADS_CUT
        return jax.device_put(array, NamedSharding(mesh, spec))

    return [{name: put(name, array) for name, array in arrays.items()} for arrays in (floats, others)]


EVERYTHING = {
    "causal": True, "window": (20, None), "sinks": True, "positions": True, "segments": True, "prefix": True,
    "lengths": True, "dropout_rate": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "case, mesh",
    [
        (Case(batch=4, heads=4, key_heads=4, causal=True), (2, 1, 4)),
        # Grouped heads, each key head whole on a device; each cut; one for all.
        (Case(batch=4, heads=8, key_heads=4, bias=(False, True, True, True), dropout_rate=0.3), (2, 2, 2)),
        (Case(batch=4, heads=8, key_heads=2, bias=(True, False, True, True), **EVERYTHING), (1, 2, 4)),
        (Case(batch=4, heads=4, key_heads=1, bias=(False, False, False, True), shared=True, **EVERYTHING), (2, 1, 4)),
        # Heads that the mesh does not divide: it cuts the batch.
        (Case(batch=8, heads=3, key_heads=3, bias=(False, True, False, True), dropout_rate=0.3), (2, 2, 2)),
        (Case(batch=3, heads=6, key_heads=3, dropout_rate=0.3, sinks=True), (2, 2, 2)),  # nor the batch
    ],
    ids=str,
)
def test_attention_on_a_mesh_equals_one_device(case, mesh):
    floats, others = attention_cases.differentiable(case), attention_cases.integers(case)
    expected = attention_cases.values_and_gradients(case, floats, others, None)
    floats, others = place(case, floats, others, simulated(*mesh))
    actual = attention_cases.values_and_gradients(case, floats, others, None)
    for part, wanted, tolerance in zip(actual, expected, attention_cases.TOLERANCES["float32"], strict=True):
        for name, array in wanted.items():
            attention_cases.assert_close(part[name], array, tolerance, name)


def test_attention_on_a_mesh_moves_no_operand():
    mesh = simulated(2, 2, 2)
    placed = jax.ShapeDtypeStruct((8, 64, 4, 16), jnp.float32, sharding=NamedSharding(mesh, HEADS_CUT))
    program = jax.jit(gradient(partial(attention, causal=True))).lower(placed, placed, placed).compile().as_text()
    assert all(size == 1 for _, size in moved(program)), moved(program)  # the loss


def test_attention_under_vmap_remat_and_scan_on_a_mesh_equals_one_device():
    @jax.jit
    def loss(query, keys):
        @jax.checkpoint
        def layer(x, key):
            return attention(x, key, x, causal=True), None

        both = jax.vmap(lambda x: jax.lax.scan(layer, x, keys)[0])(jnp.stack([query, -query]))
        return jnp.sum(both**2)

    rng = np.random.default_rng(0)
    query, keys = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 24, 2, 8), (3, 4, 24, 2, 8)))
    function = jax.jit(jax.grad(loss, (0, 1)))
    expected = function(query, keys)
    mesh = simulated(2, 2, 2)
    query = jax.device_put(query, NamedSharding(mesh, HEADS_CUT))
    keys = jax.device_put(keys, NamedSharding(mesh, PartitionSpec(None, *HEADS_CUT)))
    for actual, wanted, name in zip(function(query, keys), expected, ("query", "keys"), strict=True):
        attention_cases.assert_close(actual, wanted, 1e-5, name)


def prob_sparse(rng, query, key, value, table):
    return prob_sparse_attention(query, key, value, table, queries=9, dropout_rate=0.3, dropout_rng=rng)


def test_prob_sparse_on_a_mesh_equals_one_device_and_moves_no_operand():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((4, 48, 4, 8)), jnp.float32) for _ in range(3))
    table = sample_keys(jax.random.key(0), 48, 48, 9)
    function = jax.jit(prob_sparse)
    expected = function(jax.random.key(1), query, key, value, table)
    mesh = simulated(2, 2, 2)
    arguments = [jax.device_put(array, NamedSharding(mesh, HEADS_CUT)) for array in (query, key, value)]
    actual = function(jax.random.key(1), *arguments, table)
    np.testing.assert_array_equal(actual.top, expected.top)
    np.testing.assert_allclose(actual.out, expected.out, rtol=1e-5, atol=1e-6)

    derive = jax.jit(gradient(lambda *a: prob_sparse(jax.random.key(1), *a).out, 3))
    assert all(size == 1 for _, size in moved(derive.lower(*arguments, table).compile().as_text()))


def readout(query, key):
    return attention_received(query, key, causal=True)[..., 0] + attention_top_k(query, key, 3)[0].sum((2, 3))[:, None]


def spanning(query, key):
    query, key = (x.reshape(x.shape[0], 6, 8, *x.shape[2:]) for x in (query, key))
    return spanning_window_attention(query, key, query, window=2)


@pytest.mark.parametrize("core", [readout, spanning])
def test_cores_that_look_at_maps_on_a_mesh_equal_one_device_and_move_no_operand(core):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((4, 48, 4, 8)), jnp.float32) for _ in range(2)]
    function = jax.jit(gradient(lambda *a: jnp.sin(core(*a))))
    expected = function(*arrays)
    placed = [jax.device_put(array, NamedSharding(simulated(2, 2, 2), HEADS_CUT)) for array in arrays]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), function(*placed), expected)
    program = function.lower(*placed).compile().as_text()
    assert all(size == 1 for _, size in moved(program)), moved(program)  # the loss


def recurrent_inputs(heads, key_heads):
    rng = np.random.default_rng(0)
    shapes = {"query": (heads, 8), "key": (key_heads, 8), "value": (key_heads, 16), "decay": (heads,)}
    arrays = {name: recurrent_cases.normal(rng, 4, 40, *shape) for name, shape in shapes.items()}
    return arrays | {"key": recurrent_cases.unit(arrays["key"]), "decay": -jnp.exp(arrays["decay"])}


def linear(arrays, implementation):
    return linear_attention(**arrays, feature_map="elu", normalize=True, implementation=implementation)


def delta(arrays, implementation):
    run = partial(delta_rule, **arrays, beta=jnp.exp(arrays["decay"]), implementation=implementation)
    return run(state=run()[1])


# Key heads cut with the heads, one for all, one repeated for each device that needs it; heads that cannot be cut.
@pytest.mark.parametrize(
    "core, heads, key_heads",
    [
        pytest.param(linear, 4, 4, marks=pytest.mark.slow),
        (linear, 4, 1),
        (delta, 4, 2),
        pytest.param(linear, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_recurrent_cores_on_a_mesh_equal_one_device(core, heads, key_heads):
    arrays = recurrent_inputs(heads, key_heads)
    expected = recurrent_cases.outputs_and_gradients(core, arrays, None, "float32")
    mesh = simulated(2, 1, 4)
    placed = {
        name: jax.device_put(array, NamedSharding(mesh, HEADS_WHOLE if array.shape[2] % 4 else HEADS_CUT))
        for name, array in arrays.items()
    }
    actual = recurrent_cases.outputs_and_gradients(core, placed, None, "float32")
    for part, wanted, tolerance in zip(actual, expected, recurrent_cases.TOLERANCES["float32"], strict=True):
        for (path, array), got in zip(jax.tree.leaves_with_path(wanted), jax.tree.leaves(part), strict=True):
            recurrent_cases.assert_close(got, array, tolerance, "float32", jax.tree_util.keystr(path))


@pytest.mark.parametrize("core", [linear, delta])
def test_recurrent_cores_on_a_mesh_move_no_operand(core):
    mesh = simulated(2, 1, 4)
    placed = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, HEADS_CUT))
        for name, array in recurrent_inputs(4, 4).items()
    }
    derive = jax.jit(gradient(lambda arrays: core(arrays, None)[0]))
    program = derive.lower(placed).compile().as_text()
    assert all(size == 1 for _, size in moved(program)), moved(program)  # the loss


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_recurrent_core_compiled_for_a_slice_holds_the_kernels_and_moves_no_operand(target):
    array, numbers = shape(8, 1024, 8, 64), shape(8, 1024, 8, dtype=jnp.float32)
    compiled = compile_for(
        target, gradient(lambda *a: delta_rule(*a)[0]), array, array, array, numbers,
        mesh=make_mesh(target, {"data": 2, "fsdp": 1, "tensor": 2}), in_shardings=(HEADS_CUT,) * 4,
    )  # fmt: skip
    for kind in ("forward", "backward"):
        assert any(name.startswith("delta_rule_") and kind in name for name in compiled.kernels), compiled.kernels
    assert all(size == 1 for _, size in moved(compiled.executable.as_text()))


@pytest.mark.parametrize("target, kernels", [("tpu-v5e", "attention_"), ("h100", "attention_gpu_")])
def test_attention_compiled_for_a_slice_holds_the_kernels_and_moves_no_operand(target, kernels):
    array = shape(8, 1024, 12, 64)
    compiled = compile_for(
        target, gradient(partial(attention, causal=True)), array, array, array,
        mesh=make_mesh(target, {"data": 2, "fsdp": 1, "tensor": 2}), in_shardings=(HEADS_CUT,) * 3,
    )  # fmt: skip
    for kind in ("forward", "backward"):
        assert any(name.startswith(kernels + kind) for name in compiled.kernels), compiled.kernels
    assert all(size == 1 for _, size in moved(compiled.executable.as_text()))


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_prob_sparse_compiled_for_a_slice_holds_the_kernel_and_moves_no_operand(target):
    array = shape(8, 96, 8, 64)
    compiled = compile_for(
        target, gradient(lambda *a: prob_sparse_attention(*a, queries=25).out, 3),
        array, array, array, shape(96, 25, dtype=jnp.int32),
        mesh=make_mesh(target, {"data": 2, "fsdp": 1, "tensor": 2}), in_shardings=(*(HEADS_CUT,) * 3, PartitionSpec()),
    )  # fmt: skip
    assert any(name.startswith("prob_sparse_measure") for name in compiled.kernels), compiled.kernels
    assert all(size == 1 for _, size in moved(compiled.executable.as_text()))


def language_loss(model):
    def loss(params, model_state, batch, rngs, train):
        logits, _ = model.apply({"params": params}, batch["tokens"], rngs=rngs, deterministic=not train)
        mean = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["tokens"][:, 1:]).mean()
        return mean, (model_state, {})

    return loss


def test_a_training_step_of_a_decoder_compiles_for_a_slice_and_holds_the_kernels():
    mesh = make_mesh("tpu-v5e", {"data": 2, "fsdp": 2, "tensor": 2})
    config = DecoderConfig.preset(
        "llama3_8b", layers=1, features=256, heads=4, key_heads=2, mlp_features=256, vocab_size=512
    )
    model = DecoderLM(config, dtype=jnp.bfloat16)
    optimizer = train.build_optimizer(train.OptimizerConfig("sgd"), total_steps=1)

    def create(key):
        return train.create_state(lambda rng: model.init(rng, jnp.zeros((1, 8), jnp.int32)), optimizer, key)

    state = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = train.sharding.state_shardings(state, mesh)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(state),
        shardings,
    )
    step = train.make_train_step(language_loss(model), optimizer, state)
    compiled = compile_for(
        "tpu-v5e", step, state, {"tokens": shape(8, 256, dtype=jnp.int32)},
        mesh=mesh, in_shardings=(jax.tree.map(lambda sharding: sharding.spec, shardings), PartitionSpec(BATCH_AXES)),
    )  # fmt: skip
    assert compiled.kernels == {"attention_forward": 1, "attention_backward": 1}

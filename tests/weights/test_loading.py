import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from zoo.weights.loading import abstract_variables, load, save
from zoo.weights.names import NameMapError, flatten, layer, to_published
from zoo.weights.readers import read


class Network(nn.Module):
    width: int = 4
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(self.width, kernel_init=kernel_init, param_dtype=self.param_dtype, name="fc")(x)
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.BatchNorm(use_running_average=not train, name="bn")(x)


RULES = [*layer("linear", "fc", "fc"), *layer("batch_norm", "bn", "bn")]
INPUTS = {"x": np.zeros((2, 3), np.float32), "mask": None, "train": False}


@pytest.fixture
def state_dict():
    rng = np.random.default_rng(0)
    shapes = {"fc.weight": (4, 3), "fc.bias": (4,)} | {
        f"bn.{leaf}": (4,) for leaf in ("weight", "bias", "running_mean", "running_var")
    }
    return {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()} | {
        "bn.num_batches_tracked": np.array(3)
    }


def test_shapes_come_without_computing():
    huge = Network(width=200_000)
    inputs = {"x": jax.ShapeDtypeStruct((1024, 100_000), jnp.float32), "train": False}
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_variables(huge, inputs)).items()}
    assert shapes["params/fc/kernel"] == (100_000, 200_000)
    assert set(path.split("/")[0] for path in shapes) == {"params", "batch_stats"}


def test_loaded_network_computes_the_published_function(tmp_path, state_dict):
    save_file(state_dict, tmp_path / "m.safetensors")
    variables = load(Network(), INPUTS, RULES, tmp_path / "m.safetensors")
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    hidden = x @ state_dict["fc.weight"].T + state_dict["fc.bias"]
    scaled = (hidden - state_dict["bn.running_mean"]) / np.sqrt(state_dict["bn.running_var"] + 1e-5)
    expected = scaled * state_dict["bn.weight"] + state_dict["bn.bias"]
    np.testing.assert_allclose(Network().apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_saved_variables_load_to_the_same_bits(tmp_path, state_dict):
    model = Network(param_dtype=jnp.bfloat16)
    variables = load(model, INPUTS, RULES, state_dict)
    assert variables["params"]["fc"]["kernel"].dtype == jnp.bfloat16
    path = save(variables, tmp_path / "new" / "ours.safetensors")
    assert [file.name for file in path.parent.iterdir()] == ["ours.safetensors"]
    again = load(model, INPUTS, RULES, path)
    assert flatten(again).keys() == flatten(variables).keys()
    for name, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flatten(again)[name], leaf)
    assert to_published(again, RULES)["fc.weight"].dtype == ml_dtypes.bfloat16


def test_boxed_variables_are_saved_too(tmp_path):
    variables = Network().init(jax.random.key(0), **INPUTS)
    path = save(variables, tmp_path / "ours.safetensors")
    np.testing.assert_array_equal(read(path)["params/fc/kernel"], variables["params"]["fc"]["kernel"].value)
    load(Network(), INPUTS, RULES, path)
    with pytest.raises(NameMapError, match=r"params/fc/bias \(4,\) -> params/fc/bias \(5,\)"):
        load(Network(width=5), INPUTS, RULES, path)


def test_saving_writes_a_whole_file_or_none(tmp_path, state_dict, monkeypatch):
    path = save(load(Network(), INPUTS, RULES, state_dict), tmp_path / "out.safetensors")
    before = path.read_bytes()
    np.testing.assert_array_equal(read(path)["params/fc/kernel"], state_dict["fc.weight"].T)

    def fail(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("zoo.weights.loading.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(load(Network(), INPUTS, RULES, path), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    with pytest.raises(ValueError, match=r"saved as \.safetensors, got 'out.npz'"):
        save({}, tmp_path / "out.npz")

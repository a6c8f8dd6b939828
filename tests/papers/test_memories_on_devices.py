"""Networks whose memories train while they read: the same training on one device and on eight."""

import jax
import numpy as np
import pytest

import zoo
from zoo import train
from zoo.papers.miras import Miras, MirasConfig
from zoo.papers.titans import Titans, TitansConfig

SIZES = {
    "vocab_size": 29,
    "dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 16,
    "memory_expansion": 2,
    "chunk_size": 4,
}
HYBRID = {"window": 4, "segment_len": 4, "num_persistent_tokens": 2}
MODELS = {
    "titans_lmm_170m": Titans(TitansConfig(kind="lmm", **SIZES)),
    "titans_mac_170m": Titans(TitansConfig(kind="mac", **SIZES, **HYBRID)),
    "titans_mag_170m": Titans(TitansConfig(kind="mag", **SIZES, **HYBRID)),
    "miras_moneta_170m": Miras(MirasConfig(kind="moneta", **SIZES, gate_rank=4)),
    "miras_yaad_170m": Miras(MirasConfig(kind="yaad", **SIZES, gate_rank=4)),
    "miras_memora_170m": Miras(MirasConfig(kind="memora", **SIZES, gate_rank=4)),
}
TOKENS = np.random.default_rng(0).integers(0, 29, (3, 8, 9), dtype=np.int32)


def losses(id, mesh_config):
    model, mesh = MODELS[id], train.make_mesh(mesh_config)
    # Plain SGD: Adam blows rounding up where a gradient is nearly 0.
    optimizer = train.build_optimizer(train.OptimizerConfig("sgd", learning_rate=0.1, clip_norm=1.0), 3)
    state = train.init_sharded(lambda rng: model.init(rng, TOKENS[0]), optimizer, jax.random.key(0), mesh)
    step = train.make_train_step(zoo.registry.model(id).loss(model), optimizer, state)
    found = []
    for tokens in TOKENS:
        state, metrics = step(state, train.shard_batch({"tokens": tokens}, mesh))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=() if id == "titans_lmm_170m" else pytest.mark.slow) for id in MODELS]
)
def test_eight_devices_train_as_one(id):
    """Batch, parameters and heads are cut in two each."""
    one, eight = losses(id, train.MeshConfig(data=1)), losses(id, train.MeshConfig(data=2, fsdp=2, tensor=2))
    assert np.ptp(one) > 1e-3
    np.testing.assert_allclose(eight, one, rtol=1e-5)

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.edge_attention import chunked, edge_attention
from tests.kernels.compile import TARGETS, assert_holds_kernel, shape
from zoo.compilation import compile_for, report


def operands(batch=2, vertices=5, channels=6, dtype="float32"):
    random = np.random.default_rng(0)
    sizes = [(batch, vertices, channels)] * 3 + [(batch, vertices, vertices, channels)]
    sizes += [(channels, channels), (channels,)] * 2
    return [jnp.asarray(random.normal(size=size) / (1 if len(size) > 2 else channels**0.5), dtype) for size in sizes]


def close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * b.std(), rtol=0)


def test_the_definition_is_the_formula():
    query, key, value, edges, kernel, bias, *_ = map(np.asarray, operands(1, 3, 2))
    nodes, changed = edge_attention(*operands(1, 3, 2), scale=0.7, implementation="reference")
    for i in range(3):
        for c in range(2):
            e = [edges[0, i, j] @ kernel[:, c] + bias[c] for j in range(3)]
            s = np.array([0.7 * query[0, i, c] * key[0, j, c] * (e[j] + 1) * e[j] for j in range(3)])
            weights = np.exp(s) / np.exp(s).sum()
            assert nodes[0, i, c] == pytest.approx(float(weights @ value[0, :, c]), abs=1e-5)
    assert changed.shape == (1, 3, 3, 2)


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
@pytest.mark.parametrize("vertices, channels", [(5, 6), (11, 40)])
def test_implementations_agree(implementation, vertices, channels, monkeypatch):
    monkeypatch.setattr(chunked, "AT_ONCE", 1)
    arrays = operands(vertices=vertices, channels=channels)
    run = jax.jit(partial(edge_attention, implementation=implementation))
    close(run(*arrays), edge_attention(*arrays, implementation="reference"), 1e-5)
    nodes, changed = run(*arrays[:6])
    assert changed is None
    close(nodes, edge_attention(*arrays, implementation="reference")[0], 1e-5)


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
def test_low_precision(implementation):
    arrays = operands(vertices=9, channels=32, dtype="bfloat16")
    wide = [x.astype("float32") for x in arrays]
    ours = edge_attention(*arrays, implementation=implementation)
    assert ours[0].dtype == ours[1].dtype == jnp.bfloat16
    close(ours, edge_attention(*wide, implementation="reference"), 4e-2)  # scores are rounded before the second product


@pytest.mark.parametrize("implementation", ["chunked", "tpu"])
def test_gradients_and_their_gradients_agree(implementation, monkeypatch):
    arrays = operands()
    monkeypatch.setattr(chunked, "AT_ONCE", 1)

    def penalty(implementation, *arrays):
        def value(edges):
            nodes, changed = edge_attention(*arrays[:3], edges, *arrays[4:], implementation=implementation)
            return jnp.sum(jnp.sin(nodes)) + jnp.sum(jnp.sin(changed))

        return value(arrays[3]) + jnp.sum(jax.grad(value)(arrays[3]) ** 2)

    found, expected = (
        jax.jit(jax.grad(partial(penalty, name), argnums=tuple(range(8))))(*arrays)
        for name in (implementation, "reference")
    )
    close(found, expected, 1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: jnp.zeros((2, 5))}, r"query must be \(batch, vertices, channels\)"),
        ({3: jnp.zeros((2, 5, 4, 6))}, r"edges must be of shape \(2, 5, 5, 6\), got \(2, 5, 4, 6\)"),
        ({7: None}, "out_kernel and out_bias are given together"),
    ],
)
def test_wrong_arguments_say_so(change, message):
    arrays = operands()
    for place, array in change.items():
        arrays[place] = array
    with pytest.raises(ValueError, match=message):
        edge_attention(*arrays)


PUBLISHED = [shape(8, 45, 128, dtype=jnp.float32)] * 3 + [shape(8, 45, 45, 128, dtype=jnp.float32)]
PUBLISHED += [shape(128, 128, dtype=jnp.float32), shape(128, dtype=jnp.float32)] * 2


@pytest.mark.slow
def test_published_sizes_hold_the_kernels():
    names = {target: "edge_attention" if target.startswith("tpu") else "edge_attention_gpu" for target in TARGETS}
    assert_holds_kernel(edge_attention, PUBLISHED, names)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_nothing_of_the_edges_size_is_written_but_the_new_edges(target):
    edges = 8 * 45 * 48 * 128 * 4
    assert report(compile_for(target, edge_attention, *PUBLISHED)).temporary_bytes < edges

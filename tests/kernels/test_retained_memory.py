"""Memories with a gate for each channel: the chunk-wise form against the definition, and its mathematics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.neural_memory import RetainedState, attentional_bias, initial_retained, neural_memory, retained_memory
from kernels.neural_memory.bias import GRADIENTS
from tests.kernels.recurrent_cases import assert_close, assert_equals_reference, normal, unit

BIASES = {"l2": "huber_mix", "lq": "lp", "kl": "l2"}  # of Yaad, Moneta, Memora


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, arrays apart."""

    retention: str = "l2"
    time: int = 11
    chunk_size: int = 4
    heads: int = 2
    width: int = 6
    hidden: int = 10
    tokens: tuple[int, ...] | None = None  # since a border; None starts at one
    lengths: tuple[int, ...] | None = None

    def __call__(self, arrays, implementation):
        arrays = dict(arrays)
        layers = [tuple(arrays.pop(f"{name}_{i}") for i in (0, 1)) for name in ("kept", "learned_at", "scale")]
        memory = layers[0]
        if self.tokens is not None:
            memory = RetainedState(*layers, jnp.asarray(self.tokens, jnp.int32))
        norm = arrays.pop("norm_scale"), arrays.pop("norm_bias")
        out, state = retained_memory(
            **arrays, memory=memory, norm=norm, bias=BIASES[self.retention], retention=self.retention,
            chunk_size=self.chunk_size, lengths=None if self.lengths is None else jnp.asarray(self.lengths),
            implementation=implementation,
        )  # fmt: skip
        if self.lengths is not None:  # the outputs of tokens that do not exist mean nothing
            exists = jnp.arange(self.time) < jnp.asarray(self.lengths)[:, None]
            out = jnp.where(exists[..., None, None], out, 0)
        return out, state

    def arrays(self):
        rng = np.random.default_rng(0)
        batch = 1 if self.tokens is None else len(self.tokens)
        shape = (batch, self.time, self.heads, self.width)
        leading = (self.heads,) if self.tokens is None else (batch, self.heads)
        arrays = {"query": unit(normal(rng, *shape)), "key": unit(normal(rng, *shape)), "value": normal(rng, *shape)}
        arrays |= {"alpha": jax.nn.sigmoid(normal(rng, *shape) + 3), "eta": 0.01 * jax.nn.sigmoid(normal(rng, *shape))}
        arrays |= {"delta": 1 + jax.nn.softplus(normal(rng, *shape[:3]))}
        arrays |= {"norm_scale": 1 + 0.1 * normal(rng, self.heads, self.width)}
        arrays |= {"norm_bias": 0.1 * normal(rng, self.heads, self.width)}
        # Logarithms far apart: of weights that are nearly equal the layer norm would amplify rounding.
        spread = 4.0 if self.retention == "kl" else 1.0
        for name in ("kept", "learned_at"):
            arrays[f"{name}_0"] = spread * normal(rng, *leading, self.hidden, self.width) / self.width**0.5
            arrays[f"{name}_1"] = spread * normal(rng, *leading, self.width, self.hidden) / self.hidden**0.5
        arrays |= {f"scale_{i}": 2 + jax.nn.sigmoid(normal(rng, *leading)) for i in (0, 1)}
        return arrays


VARIANTS = {
    "yaad": Case("l2"),
    "moneta": Case("lq"),
    "memora": Case("kl"),
    "continued": Case("l2", tokens=(0, 3, 1)),
    "moneta-continued": Case("lq", tokens=(0, 3), lengths=(9, 4)),
    "memora-continued": Case("kl", tokens=(0, 3), lengths=(9, 4)),
    "odd": Case("lq", chunk_size=3, time=7),
    "online": Case("kl", chunk_size=1, time=5),
    "decoding": Case("kl", tokens=(0, 3, 1), time=1),
}
QUICK = ("moneta", "memora-continued")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_chunked_equals_recurrent(variant):
    case = VARIANTS[variant]
    assert_equals_reference(case, case.arrays(), "chunked")


@pytest.mark.slow
@pytest.mark.parametrize("retention", BIASES)
def test_a_state_passed_on_continues_the_sequence(retention):
    case = Case(retention, time=10)
    arrays = case.arrays()
    out, state = case(arrays, None)
    of_time = ("query", "key", "value", "alpha", "eta", "delta")
    memory, outs = initial_retained((arrays["kept_0"], arrays["kept_1"]), 1, retention), []
    for start, stop in ((0, 1), (1, 6), (6, 7), (7, 10)):
        part, memory = retained_memory(
            **{name: arrays[name][:, start:stop] for name in of_time}, memory=memory,
            norm=(arrays["norm_scale"], arrays["norm_bias"]), bias=BIASES[retention], retention=retention,
            chunk_size=4,
        )  # fmt: skip
        outs.append(part)
    assert_close(jnp.concatenate(outs, 1), out, 2e-5, "float32", "out")
    for got, expected in zip(jax.tree.leaves(memory), jax.tree.leaves(state), strict=True):
        assert_close(got, expected, 2e-5, "float32", "state")


def test_one_gate_for_all_channels_is_the_memory_of_titans():
    case = Case("l2")
    arrays = case.arrays()
    norm, weights = (arrays["norm_scale"], arrays["norm_bias"]), (arrays["kept_0"], arrays["kept_1"])
    alpha, eta = arrays["alpha"][..., :1], arrays["eta"][..., :1]
    wide = {"alpha": jnp.broadcast_to(alpha, arrays["key"].shape), "eta": jnp.broadcast_to(eta, arrays["key"].shape)}
    qkv = [arrays[name] for name in ("query", "key", "value")]
    out, _ = retained_memory(*qkv, **wide, memory=weights, norm=norm, chunk_size=4)
    # Titans' loss has no half: its gradient is twice as long.
    gates = [jnp.broadcast_to(gate, (*gate.shape[:3], 2)) for gate in (1 - alpha, eta / 2)]
    expected, _ = neural_memory(*qkv, gates[0], None, gates[1], weights, norm=norm, chunk_size=4)
    assert_close(out, expected, 1e-5, "float32", "out")


@pytest.mark.slow
def test_softmax_memories_stay_on_the_simplex():
    case = Case("kl", time=10_000, chunk_size=16, heads=1)
    out, state = jax.jit(lambda arrays: case(arrays, None))(case.arrays())
    assert bool(jnp.isfinite(out).all())
    for layer in state.learned_at:
        np.testing.assert_allclose(layer.sum(-1), 1.0, rtol=1e-4)
        assert float(layer.min()) >= 0


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_biases_are_gradients_of_their_losses(name):
    rng = np.random.default_rng(1)
    prediction, target = normal(rng, 5, 4), normal(rng, 5, 4)
    options = {"delta": 1.5, "p": 3.0}
    loss, gradient = attentional_bias(name, prediction, target, **options)
    assert loss.shape == (5,) and gradient.shape == (5, 4)
    expected = jax.grad(lambda x: attentional_bias(name, x, target, **options)[0].sum())(prediction)
    # Signs are smooth in gradients, not in losses: they differ where a residual is near zero.
    far = np.abs(prediction - target) > 0.4
    np.testing.assert_allclose(gradient[far], expected[far], rtol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "tpu"}, "no Pallas kernel .*'tpu'.*a vector.*None and 'chunked' run on every platform"),
        ({"implementation": "gpu"}, "no Pallas kernel"),
        ({"alpha": jnp.ones((1, 3, 2))}, r"alpha must have shape \(1, 3, 2, 4\), got \(1, 3, 2\)"),
        ({"bias": "l1"}, "bias must be one of .*'huber_l2'.*got 'l1'"),
        ({"retention": "l1"}, "retention must be one of .*'lq'.*got 'l1'"),
        ({"q": 1.5}, "q must be at least 2, got 1.5"),
        ({"p": 0.5}, "p must be at least 1, got 0.5"),
        ({"chunk_size": 0}, "chunk_size must be an integer and at least 1, got 0"),
        ({"memory": (jnp.ones((2, 4, 4)),)}, "memory must have two layers, got 1"),
        ({"delta": jnp.ones((1, 3))}, r"delta must have shape \(1, 3, 2\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arrays = {name: jnp.zeros((1, 3, 2, 4)) for name in ("query", "key", "value", "alpha", "eta")}
    arrays |= {"memory": (jnp.zeros((2, 8, 4)), jnp.zeros((2, 4, 8))), "norm": (jnp.ones((2, 4)), jnp.zeros((2, 4)))}
    with pytest.raises(ValueError, match=message):
        retained_memory(**(arrays | changes))

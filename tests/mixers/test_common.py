"""What every mixer must do, whatever it is."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mixers.cases import CASES, FEATURES, LENGTH, Case
from tests.parameters import random_parameters
from zoo import mixers

PIECES = (1, 5)  # numbers of tokens of one call: each is compiled once
VALID = 7  # valid tokens of a padded sequence


def parameter(case: Case, *more):
    return pytest.param(case, *more, marks=[pytest.mark.slow] if case.slow else [])


every_case = pytest.mark.parametrize("case", [parameter(case) for case in CASES], ids=str)
every_bidirectional_case = pytest.mark.parametrize("case", [parameter(c) for c in CASES if c.bidirectional], ids=str)
few = settings(max_examples=6)
splits = st.lists(st.sampled_from(PIECES), min_size=LENGTH, max_size=LENGTH)


def make(case: Case, **options) -> mixers.Mixer:
    return mixers.create(case.mixer, features=FEATURES, **case.options, **options)


def tokens(seed: int = 0, batch: int = 2, length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, FEATURES))


@cache
def parameters(case: Case):
    return random_parameters(make(case), tokens())


@cache
def compiled(case: Case, **options):
    return jax.jit(make(case, **options).apply)


def parallel(case: Case, x: jax.Array, **options) -> jax.Array:
    return compiled(case, **options)(parameters(case), x)[0]


def in_pieces(case: Case, x: jax.Array, pieces: list[int], valid: jax.Array | None = None) -> jax.Array:
    """Calls with a state, of as many tokens as `pieces` says and one by one after them."""
    state = make(case).init_state(x.shape[0], x.shape[1])
    outputs, start = [], 0
    while start < x.shape[1]:
        size = pieces.pop(0) if pieces else 1
        size = size if start + size <= x.shape[1] else 1
        part = slice(start, start + size)
        mask = {} if valid is None else {"valid": valid[:, part]}
        y, state = compiled(case)(parameters(case), x[:, part], state, **mask)
        outputs.append(y)
        start += size
    return jnp.concatenate(outputs, axis=1)


def assert_close(actual, expected, tolerance=2e-5):
    scale = float(jnp.std(expected)) + 1e-12
    np.testing.assert_allclose(np.asarray(actual) / scale, np.asarray(expected) / scale, rtol=0, atol=tolerance)


def test_every_mixer_has_quick_cases():
    assert {case.mixer for case in CASES if not case.slow} == set(mixers.names())


@every_case
def test_parallel_form_has_the_shape_and_dtype_of_its_input(case):
    y, state = compiled(case)(parameters(case), tokens())
    assert (y.shape, y.dtype, state) == ((2, LENGTH, FEATURES), jnp.float32, None)


@every_case
def test_token_by_token_equals_parallel(case):
    assert_close(in_pieces(case, tokens(), []), parallel(case, tokens()), case.tolerance)


@every_case
@few
@given(pieces=splits)
def test_prefill_in_any_pieces_equals_parallel(case, pieces):
    assert_close(in_pieces(case, tokens(), pieces), parallel(case, tokens()), case.tolerance)


@every_case
def test_prefill_at_once_equals_parallel(case):
    assert_close(in_pieces(case, tokens(), [LENGTH]), parallel(case, tokens()), case.tolerance)


@every_case
def test_state_keeps_its_shape_so_that_a_scan_decodes(case):
    x, model = tokens(), make(case)

    def step(state, token):
        y, state = model.apply(parameters(case), token[:, None], state)
        return state, y[:, 0]

    _, y = jax.jit(lambda x: jax.lax.scan(step, model.init_state(2, LENGTH), x.swapaxes(0, 1)))(x)
    assert_close(y.swapaxes(0, 1), parallel(case, x), case.tolerance)


@every_case
def test_one_compilation_serves_all_positions(case):
    model, traces = make(case), []

    @jax.jit
    def step(token, state):
        traces.append(1)
        return model.apply(parameters(case), token, state)

    state = model.init_state(2, LENGTH)
    for t in range(LENGTH):
        _, state = step(tokens()[:, t : t + 1], state)
    assert len(traces) == 1


@every_case
def test_sequences_of_a_batch_do_not_meet(case):
    both = parallel(case, tokens())
    for row in range(2):
        assert_close(parallel(case, tokens()[row : row + 1])[0], both[row], case.tolerance)


@every_case
@pytest.mark.parametrize("changed", [0, 5, LENGTH - 1])
def test_a_token_changes_itself_and_later_ones_only(case, changed):
    x = tokens()
    other = x.at[:, changed].add(1.0)
    before, after = parallel(case, x), parallel(case, other)
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert float(jnp.abs(before[:, changed] - after[:, changed]).max()) > 1e-3
    if changed + 1 < LENGTH and case.mixes:
        assert float(jnp.abs(before[:, changed + 1] - after[:, changed + 1]).max()) > 1e-4


@every_bidirectional_case
@pytest.mark.parametrize(("changed", "seen_by"), [(5, 4), (5, 6)])
def test_without_causality_both_sides_are_seen(case, changed, seen_by):
    x = tokens()
    before = parallel(case, x, causal=False)
    after = parallel(case, x.at[:, changed].add(1.0), causal=False)
    assert float(jnp.abs(before[:, seen_by] - after[:, seen_by]).max()) > 1e-4


@every_case
def test_without_causality_there_is_no_state_or_no_form_at_all(case):
    if case.bidirectional:
        with pytest.raises(ValueError, match="causal=False has no state"):
            make(case, causal=False).apply(parameters(case), tokens(), make(case).init_state(2, LENGTH))
    else:
        with pytest.raises(ValueError, match="causal"):
            make(case, causal=False).apply(parameters(case), tokens())


def padded(places: list[list[int]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sequences of VALID tokens, the same with padding between them, and where they are valid."""
    x = tokens(3, len(places), VALID)
    valid = np.zeros((len(places), LENGTH), bool)
    spread = np.array(tokens(4, len(places)))  # padding holds arbitrary numbers
    for row, place in enumerate(places):
        valid[row, place] = True
        spread[row, place] = x[row]
    return x, jnp.asarray(spread), jnp.asarray(valid)


subsets = st.sets(st.integers(0, LENGTH - 1), min_size=VALID, max_size=VALID).map(sorted)
left_and_right = [list(range(LENGTH - VALID, LENGTH)), list(range(VALID))]


def assert_padding_changes_nothing(case, y, valid, expected):
    assert_close(y[valid].reshape(expected.shape), expected, case.tolerance)
    np.testing.assert_array_equal(y[~valid], 0)


@every_case
@few
@given(places=st.lists(subsets, min_size=2, max_size=2))
def test_padding_anywhere_changes_nothing(case, places):
    x, spread, valid = padded(places)
    y, _ = compiled(case)(parameters(case), spread, valid=valid)
    assert_padding_changes_nothing(case, y, valid, parallel(case, x))


@every_bidirectional_case
@few
@given(places=st.lists(subsets, min_size=2, max_size=2))
def test_padding_anywhere_changes_nothing_without_causality(case, places):
    x, spread, valid = padded(places)
    y, _ = compiled(case, causal=False)(parameters(case), spread, valid=valid)
    assert_padding_changes_nothing(case, y, valid, parallel(case, x, causal=False))


@every_case
@few
@given(places=st.lists(subsets, min_size=2, max_size=2), pieces=splits)
def test_padding_anywhere_changes_nothing_with_a_state(case, places, pieces):
    x, spread, valid = padded(places)
    assert_padding_changes_nothing(case, in_pieces(case, spread, pieces, valid), valid, parallel(case, x))


@every_case
def test_a_ragged_batch_goes_on_token_by_token(case):
    """Padding to the left or right of the prompts, then new tokens of every sequence."""
    x, spread, valid = padded(left_and_right)
    model = make(case)
    _, state = compiled(case)(parameters(case), spread, model.init_state(2, LENGTH), valid=valid)
    new = tokens(5, 2, LENGTH - VALID)
    outputs = []
    for t in range(LENGTH - VALID):
        y, state = compiled(case)(parameters(case), new[:, t : t + 1], state)
        outputs.append(y)
    expected = parallel(case, jnp.concatenate([x, new], axis=1))[:, VALID:]
    assert_close(jnp.concatenate(outputs, axis=1), expected, case.tolerance)


@every_case
def test_all_padding_gives_zeros_and_leaves_the_past_alone(case):
    x, model = tokens(), make(case)
    nothing = jnp.zeros((2, LENGTH), bool)
    y, state = compiled(case)(parameters(case), x, model.init_state(2, LENGTH), valid=nothing)
    np.testing.assert_array_equal(y, 0)
    y, _ = compiled(case)(parameters(case), x, state)
    assert_close(y, parallel(case, x), case.tolerance)


@pytest.mark.parametrize(
    ("case", "causal"),
    [parameter(case, causal) for case in CASES for causal in (True, False) if causal or case.bidirectional],
    ids=str,
)
def test_gradients_are_finite_and_reach_every_parameter(case, causal):
    x, target = tokens(), tokens(7)
    apply = make(case, causal=causal).apply

    def loss(variables, x):
        (y, _), sown = apply(variables, x, mutable=["losses"])  # some parameters learn from losses of their own
        return jnp.sum(y * target) + sum(jax.tree.leaves(sown))

    gradients, to_input = jax.jit(jax.grad(loss, argnums=(0, 1)))(parameters(case), x)
    assert bool(jnp.isfinite(to_input).all()) and float(jnp.abs(to_input).max()) > 0
    for path, gradient in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert bool(jnp.isfinite(gradient).all()), name
        assert float(jnp.abs(gradient).max()) > 1e-6, name


@every_case
def test_bfloat16_is_near_float32(case):
    x = tokens().astype(jnp.bfloat16)
    expected = parallel(case, x.astype(jnp.float32))
    y = compiled(case, dtype=jnp.bfloat16)(parameters(case), x)[0]
    assert y.dtype == jnp.bfloat16
    error = jnp.sqrt(jnp.mean((y.astype(jnp.float32) - expected) ** 2))
    assert float(error) < case.bfloat16_tolerance * float(jnp.std(expected))


@every_case
def test_every_parameter_has_logical_axis_names(case):
    variables = jax.eval_shape(make(case).init, jax.random.key(0), tokens())
    boxes = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= {"embed", "mlp", "heads", "kv_heads", "vocab", None}


@every_case
@pytest.mark.parametrize(
    ("error", "message", "x", "arguments"),
    [
        (ValueError, "x must be", jnp.zeros((2, FEATURES)), {}),
        (ValueError, r"x must be .*got \(2, 3, 17\)", jnp.zeros((2, 3, FEATURES + 1)), {}),
        (ValueError, "not empty", jnp.zeros((2, 0, FEATURES)), {}),
        (TypeError, "floating point, got int32", jnp.zeros((2, 3, FEATURES), jnp.int32), {}),
        (ValueError, "valid must be bool", jnp.zeros((2, 3, FEATURES)), {"valid": jnp.ones((2, 3))}),
        (ValueError, "valid must be bool", jnp.zeros((2, 3, FEATURES)), {"valid": jnp.ones((2, 4), bool)}),
        (ValueError, "batch of 2, its state one of", jnp.zeros((2, 3, FEATURES)), {"state": 3}),
    ],
)
def test_wrong_input_is_refused(case, error, message, x, arguments):
    model = make(case)
    if "state" in arguments:
        arguments = {"state": model.init_state(arguments["state"], LENGTH)}
    with pytest.raises(error, match=message):
        model.apply(parameters(case), x, **arguments)

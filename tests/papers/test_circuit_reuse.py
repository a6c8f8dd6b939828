import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.goldens.pretrained import smollm2
from tests.parameters import random_parameters
from zoo import probing
from zoo.backbones import DecoderConfig, DecoderLM
from zoo.data import ioi
from zoo.papers import circuit_reuse
from zoo.papers.circuit_reuse import Pairs, Stage, final_stream, path_patch, strongest

_SMALL = {"vocab_size": 31, "features": 24, "layers": 3, "heads": 4, "mlp_features": 40, "max_length": 32}
MODELS = {
    "llama": DecoderLM(DecoderConfig.preset("smollm2_135m", **_SMALL, key_heads=2)),
    "gpt2": DecoderLM(DecoderConfig.preset("gpt2", **_SMALL)),
    "untied": DecoderLM(DecoderConfig.preset("llama2_7b", **_SMALL)),
}
CLEAN = jax.random.randint(jax.random.key(0), (3, 8), 0, 31)
OTHER = jax.random.randint(jax.random.key(1), (3, 8), 0, 31)
LENGTHS = jnp.array([8, 6, 7])
PAIRS = Pairs(CLEAN, OTHER, jnp.array([[1, 2], [3, 4], [5, 6]]), LENGTHS, LENGTHS)
VARIABLES = {name: random_parameters(model, CLEAN) for name, model in MODELS.items()}


@pytest.mark.parametrize(
    "family, receivers, component, position, frozen",
    [
        pytest.param("llama", [(1, 0), (2, 3)], "k", (3, 1, 5), False, marks=pytest.mark.slow),
        ("gpt2", [(2, 0), "resid_mid.1"], "q", -1, True),
        pytest.param("llama", ["resid_post.2"], "z", -1, False, marks=pytest.mark.slow),
        pytest.param("llama", [(1, 1)], "z", 4, True, marks=pytest.mark.slow),
        pytest.param("gpt2", [(2, 1), (2, 2)], "v", 0, False, marks=pytest.mark.slow),
        pytest.param("untied", ["resid_pre.1", "resid_pre.2"], "z", (2, 5, 0), False, marks=pytest.mark.slow),
    ],
)
def test_the_fast_way_is_exact(family, receivers, component, position, frozen):
    arguments = MODELS[family], VARIABLES[family], PAIRS, receivers, component
    options = {"position": position, "freeze_mlps": frozen}
    fast = path_patch(*arguments, **options)
    brute = path_patch(*arguments, **options, method="brute")
    np.testing.assert_allclose(fast.effect, brute.effect, atol=1e-4)
    np.testing.assert_allclose(fast.clean, brute.clean, rtol=1e-4)
    assert np.abs(brute.effect).max() > 1e-4


@pytest.mark.slow
def test_the_fast_way_is_exact_in_a_real_model():
    model, variables, tokenizer = smollm2()
    prompts = ioi.generate(2, tokenizer)
    texts = [[tokenizer.encode(prompt.text) for prompt in row] for row in (prompts, map(ioi.flip, prompts))]
    answers = [tuple(tokenizer.encode(answer)[0] for answer in prompt.answers) for prompt in prompts]
    pairs = circuit_reuse.make_pairs(*texts, answers)
    for receivers, component in (([(3, 1), (4, 0)], "q"), (["resid_post.2"], "z")):
        fast, brute = (
            path_patch(model, variables, pairs, receivers, component, method=method) for method in ("fast", "brute")
        )
        np.testing.assert_allclose(fast.effect, brute.effect, atol=1e-4)
        assert np.abs(fast.effect).max() > 1e-4


def _difference(logits):
    rows = jnp.arange(3)
    last = logits[rows, LENGTHS - 1]
    return (last[rows, PAIRS.answers[:, 0]] - last[rows, PAIRS.answers[:, 1]]).mean()


def test_effects_by_hand():
    """One sender of the definition, step by step with plain probes."""
    model, variables = MODELS["llama"], VARIABLES["llama"]
    names = [f"z.{layer}" for layer in range(3)]
    clean = probing.probe(model, variables, {"tokens": CLEAN}, names)
    other = probing.probe(model, variables, {"tokens": OTHER}, names)
    rows, last = jnp.arange(3), LENGTHS - 1

    def freeze(name):
        value = clean.sites[name][rows, last]
        if name == "z.0":
            value = value.at[:, 3].set(other.sites[name][rows, last][:, 3])
        return lambda z: z.at[rows, last].set(value)

    query = probing.probe(model, variables, {"tokens": CLEAN}, ["q.2"], {n: freeze(n) for n in names}).sites["q.2"]
    received = {"q.2": lambda q: q.at[rows, last, 1].set(query[rows, last, 1])}
    patched = probing.probe(model, variables, {"tokens": CLEAN}, patch=received).logits
    base = _difference(clean.logits)
    expected = (_difference(patched) - base) / (_difference(other.logits) - base)
    found = path_patch(model, variables, PAIRS, [(2, 1)], "q")
    np.testing.assert_allclose(found.effect[0, 3], expected, rtol=1e-3)
    np.testing.assert_array_equal(found.effect[2, 1], 0)


@pytest.mark.slow
def test_heads_above_the_lowest_receiver_and_receivers_have_no_effect():
    found = path_patch(MODELS["llama"], VARIABLES["llama"], PAIRS, [(1, 0), (2, 3)], "q").effect
    assert (found[2] == 0).all() and found[1, 0] == 0 and (found[0] != 0).all()


@pytest.mark.slow
def test_batches_change_nothing():
    model, variables = MODELS["llama"], VARIABLES["llama"]
    whole = path_patch(model, variables, PAIRS, [(2, 1)], "q", position=(3, 5, 2))
    parts = path_patch(model, variables, PAIRS, [(2, 1)], "q", position=(3, 5, 2), batch=2)
    np.testing.assert_allclose(parts.effect, whole.effect, atol=1e-5)
    np.testing.assert_allclose(parts.clean, whole.clean, rtol=1e-5)


@pytest.mark.slow
def test_heads_of_a_group_share_their_key():
    effects = [path_patch(MODELS["llama"], VARIABLES["llama"], PAIRS, [(2, h)], "k").effect for h in (0, 1, 2)]
    np.testing.assert_array_equal(effects[0][:2], effects[1][:2])
    assert np.abs(effects[0] - effects[2]).max() > 1e-5


@pytest.mark.slow
def test_corrupted_prompts_may_have_another_length():
    pairs = circuit_reuse.make_pairs([[1, 2, 3], [4, 5]], [[1, 2], [4, 6]], [(7, 8), (9, 10)])
    assert pairs.lengths.tolist() == [3, 2] and pairs.corrupted_lengths.tolist() == [2, 2]
    found = path_patch(MODELS["gpt2"], VARIABLES["gpt2"], pairs, final_stream(MODELS["gpt2"]))
    brute = path_patch(MODELS["gpt2"], VARIABLES["gpt2"], pairs, final_stream(MODELS["gpt2"]), method="brute")
    np.testing.assert_allclose(found.effect, brute.effect, atol=1e-4)
    with pytest.raises(ValueError, match="as long as the clean ones"):
        path_patch(MODELS["gpt2"], VARIABLES["gpt2"], pairs, final_stream(MODELS["gpt2"]), position=0)


@pytest.mark.slow
def test_activation_patching_of_the_last_layer_is_path_patching():
    model, variables = MODELS["llama"], VARIABLES["llama"]
    paths = path_patch(model, variables, PAIRS, final_stream(model))
    whole = circuit_reuse.activation_patch(model, variables, PAIRS)
    np.testing.assert_allclose(whole.effect[2], paths.effect[2], atol=1e-4)
    assert np.abs(whole.effect[0] - paths.effect[0]).max() > 1e-4


def test_forced_attention_is_a_patched_pattern():
    model, variables = MODELS["llama"], VARIABLES["llama"]
    reading = circuit_reuse.read(model, variables, CLEAN)
    rows = jnp.zeros((3, 8)).at[:, 2].set(0.5).at[:, 5].set(0.5)
    found = circuit_reuse.at_end(model, variables, reading, {(1, 2): rows})
    patch = {"pattern.1": lambda pattern: pattern.at[:, 2, -1].set(rows)}
    expected = probing.probe(model, variables, {"tokens": CLEAN}, ["pattern.2"], patch)
    np.testing.assert_allclose(found.logits, expected.logits[:, -1], atol=1e-5)
    np.testing.assert_allclose(found.attention[:, 2], expected.sites["pattern.2"][:, :, -1], atol=1e-5)
    attention = circuit_reuse.at_end(model, variables, reading).attention
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    both = circuit_reuse.attention_to(attention, jnp.array([[0, 1]] * 3))
    np.testing.assert_allclose(both, attention[..., 0] + attention[..., 1], rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "untied"])
def test_copying_is_a_head_s_own_matrix(family):
    model, variables = MODELS[family], VARIABLES[family]
    params = variables["params"]
    mixer = params["layer_1"]["mixer"]
    embedding = params["embed"]["embedding"]
    readout = embedding.T if family == "llama" else params["head"]["kernel"]
    key_head = 1 if family == "llama" else 3
    logits = (
        embedding @ mixer["value"]["kernel"].reshape(24, -1, 6)[:, key_head] @ mixer["out"]["kernel"][18:] @ readout
    )
    expected = [(row > row[token]).sum() < 5 for token, row in enumerate(logits)]
    np.testing.assert_allclose(circuit_reuse.ov_copying(model, variables)[1, 3], np.mean(expected), rtol=1e-6)
    some = circuit_reuse.ov_copying(model, variables, tokens=[4, 9])[1, 3]
    np.testing.assert_allclose(some, np.mean([expected[4], expected[9]]))


def test_an_induction_head_is_seen():
    """Layer 0 heads attend uniformly; scores are then 1 / (tokens seen)."""
    model = MODELS["llama"]
    variables = jax.tree.map(lambda x: x, VARIABLES["llama"])
    variables["params"]["layer_0"]["mixer"]["query"]["kernel"] *= 0
    scores = circuit_reuse.repetition_scores(model, variables, length=4, batch=2)
    expected = np.mean(1 / np.arange(5, 9))
    np.testing.assert_allclose(scores.duplicate[0], expected, rtol=1e-5)
    np.testing.assert_allclose(scores.induction[0], expected, rtol=1e-5)


def test_circuits_are_compared_with_chance():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(10, 10))
    same = circuit_reuse.compare_circuits(first, -first, 0.1, permutations=200)
    assert (same.shared, same.size, same.jaccard, same.chance) == (10, 10, 1.0, 1.0)
    assert same.overlap_p == same.spearman_p == 1 / 201
    np.testing.assert_allclose([same.pearson, same.spearman], [-1, 1])
    other = circuit_reuse.compare_circuits(first, rng.normal(size=(10, 10)), 0.1, permutations=200)
    assert other.overlap_p > 0.05 and abs(other.spearman) < 0.3
    assert len(strongest(first)) == 2 and strongest(np.array([[1.0, -3.0]]), 1) == [(0, 1)]


def test_a_circuit_is_a_graph():
    effect = np.zeros((2, 2))
    effect[1, 0], effect[0, 1] = 0.5, -0.1
    stages = [Stage("movers", ["resid_post.1"], "residual", effect), Stage("before", [(1, 0)], "q", effect[::-1])]
    graph = circuit_reuse.circuit_graph(stages, 1)
    assert graph["nodes"] == [
        {"id": "resid_post.1", "stage": "output"}, {"id": "1.0", "stage": "movers"}, {"id": "0.0", "stage": "before"}
    ]  # fmt: skip
    assert graph["edges"][0] == {"from": "1.0", "to": "resid_post.1", "component": "residual", "effect": -50.0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda *a: path_patch(*a, PAIRS, [(3, 0)]), r"head \(3, 0\) does not exist: there are 3 layers of 4"),
        (lambda *a: path_patch(*a, PAIRS, ["resid_pots.2"]), "resid_post.2"),
        (lambda *a: path_patch(*a, PAIRS, []), "there must be a receiver"),
        (lambda *a: path_patch(*a, PAIRS, [(1, 0)], "x"), "component 'x'"),
        (lambda *a: path_patch(*a, PAIRS, [(1, 0)], method="quick"), "method 'quick'"),
        (lambda *a: path_patch(*a, PAIRS, [(1, 0)], position=7), "within their prompts"),
        (lambda *a: path_patch(*a, PAIRS, [(1, 0)], batch=0), "batch must be positive"),
        (lambda *a: path_patch(*a, PAIRS._replace(corrupted=CLEAN), [(1, 0)]), "nothing to explain"),
        (lambda *a: path_patch(*a, PAIRS._replace(answers=CLEAN), [(1, 0)]), r"answers \(batch, 2\)"),
        (lambda *a: circuit_reuse.read(*a, CLEAN[0]), r"must be \(batch, time\)"),
        (lambda *a: circuit_reuse.at_end(*a, circuit_reuse.read(*a, CLEAN, position=2)), "up to their last"),
        (
            lambda *a: circuit_reuse.at_end(*a, circuit_reuse.read(*a, CLEAN), {(0, 0): jnp.ones((3, 9))}),
            r"weights must be \(batch, up to 8 keys\)",
        ),
        (lambda *a: circuit_reuse.ov_copying(*a, tokens=[31]), r"in 0 \.\. 30"),
        (lambda *a: circuit_reuse.make_pairs([[1]], [[2], [3]], [(0, 1)]), "one corrupted"),
        (lambda *a: circuit_reuse.make_pairs([[1]], [[2, 3]], [(0, 1)], 1), "has 2 tokens, more than the length 1"),
        (lambda *a: strongest(np.zeros((2, 2)), 5), "top must be"),
        (lambda *a: circuit_reuse.repetition_scores(*a, length=1), "length must be at least 2"),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(MODELS["llama"], VARIABLES["llama"])


@pytest.mark.slow
def test_a_window_shorter_than_the_prompts_asks_for_brute_force():
    model = DecoderLM(DecoderConfig.preset("mistral_7b", **_SMALL | {"key_heads": 2, "window": 6}))
    variables = random_parameters(model, CLEAN)
    with pytest.raises(ValueError, match="window of 6; use 'brute'"):
        path_patch(model, variables, PAIRS, final_stream(model))
    assert np.abs(path_patch(model, variables, PAIRS, final_stream(model), method="brute").effect).max() > 0

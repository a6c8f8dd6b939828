import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parameters import random_parameters
from zoo.papers import pogat
from zoo.papers.pogat import GAT, HAN, POGAT, RGCN, BaselineConfig, POGATConfig

SMALL = POGATConfig(
    (3, 4), (0, 1, 0), relations=5, classes=3, features=8, heads=2, mlp_features=12, merge_features=5, dropout=0.0
)
RELATION = np.array([[0, 1, -1], [2, 0, 3], [-1, 4, 0]], np.int32)
FEATURES = tuple(np.random.default_rng(0).normal(size=(5, width)).astype(np.float32) for width in (3, 4))
SUB = np.array([[0, 1, 2], [2, 3, 0], [1, 1, 1], [0, 4, 3]], np.int32)


@pytest.fixture(scope="module")
def variables():
    return random_parameters(POGAT(SMALL), FEATURES, SUB, RELATION)


@pytest.fixture(scope="module")
def out(variables):
    return jax.jit(lambda v: POGAT(SMALL).apply(v, FEATURES, SUB, RELATION, maps=True))(variables)


def test_segments_sum_to_one():
    logits, segments = jnp.array([0.3, 90.0, -1.0, 88.0, 2.0]), jnp.array([0, 1, 0, 1, 3])
    weights = pogat.segment_softmax(logits, segments, 4)
    for segment in (0, 1, 3):
        chosen = segments == segment
        np.testing.assert_allclose(weights[chosen], jax.nn.softmax(logits[chosen]), atol=1e-6)


def test_attention_keeps_to_the_schema(out):
    for weights in out.attention:
        assert not np.asarray(weights)[:, :, RELATION < 0].any()
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_node_s_embedding_is_merged_over_every_slot_it_fills(out):
    assert not out.embedding[4].any()  # in no subgraph
    nodes = SUB[:, [0, 2]].T.reshape(-1)
    slots = np.asarray(out.slots)[:, [0, 2]].swapaxes(0, 1).reshape(-1, 8)
    for node in range(4):
        chosen = nodes == node
        np.testing.assert_allclose(out.merge_weights[chosen].sum(), 1, atol=1e-5)
        expected = (np.asarray(out.merge_weights)[chosen, None] * slots[chosen]).sum(0)
        np.testing.assert_allclose(out.embedding[node], expected, atol=1e-5)


def test_shared_first_projections_change_nothing(variables, out):
    naive = POGAT(SMALL, share_projections=False).apply(variables, FEATURES, SUB, RELATION)
    np.testing.assert_allclose(naive.slots, out.slots, atol=1e-5)


def test_packed_subgraphs_are_subgraphs():
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(7, 3, 2, 4)), jnp.float32) for _ in range(3))
    bias = pogat.relation_bias(jnp.asarray(random.normal(size=(5, 2)), jnp.float32), RELATION)

    def run(pack):
        return jax.value_and_grad(lambda q: jnp.sum(jnp.sin(pogat.schema_attention(q, key, value, bias, pack=pack))))

    logits = jnp.einsum("mihd,mjhd->mhij", query, key) / 2 + bias
    expected = jnp.einsum("mhij,mjhd->mihd", jax.nn.softmax(logits), value)
    np.testing.assert_allclose(pogat.schema_attention(query, key, value, bias, pack=4), expected, atol=1e-5)
    for ours, theirs in zip(run(4)(query), run(1)(query), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_mean_merge_weighs_all_places_alike(variables):
    model = POGAT(dataclasses.replace(SMALL, merge="mean"))
    weights = model.apply(variables, FEATURES, SUB, RELATION).merge_weights
    counts = np.bincount(SUB[:, [0, 2]].reshape(-1))
    np.testing.assert_allclose(weights, 1 / counts[SUB[:, [0, 2]].T.reshape(-1)], atol=1e-6)


def test_unchanged_subgraphs_are_no_negatives():
    random = np.random.default_rng(1)
    true = jnp.asarray(random.normal(size=(4, 3))), jnp.asarray(random.normal(size=4))
    false = jnp.asarray(random.normal(size=(4, 3))), jnp.asarray(random.normal(size=4))
    changed = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]], bool)
    node, whole = pogat.detection_losses(true, false, jnp.asarray(changed))
    bce, rows = optax.sigmoid_binary_cross_entropy, [0, 2]
    expected = (bce(true[0], 0.0).mean() + bce(false[0][np.array(rows)], changed[rows] * 1.0).mean()) / 2
    assert node == pytest.approx(float(expected), abs=1e-5)
    expected = (bce(true[1], 0.0).mean() + bce(false[1][np.array(rows)], 1.0).mean()) / 2
    assert whole == pytest.approx(float(expected), abs=1e-5)


def test_links_start_as_dot_products(variables):
    config = dataclasses.replace(SMALL, link_type=1)
    model = POGAT(config)
    pairs = np.array([[0, 1], [2, 4], [4, 0]], np.int32)
    with_link = {"params": {**variables["params"], "link": jnp.eye(8)}}
    scores, slots = model.apply(with_link, FEATURES, SUB, RELATION, pairs, method="score_links")
    first, second = (POGAT(SMALL).apply(variables, slots, SUB, kind, 5, method="merge")[0] for kind in (0, 1))
    np.testing.assert_allclose(scores, [float(first[a] @ second[b]) for a, b in pairs], atol=1e-5)
    batch = {"features": FEATURES, "sub": SUB, "relation": RELATION, "neg": SUB[::-1], "pairs": pairs,
             "changed": SUB[::-1] != SUB, "linked": np.array([1, 0, 0])}  # fmt: skip
    found = pogat.pogat_loss(model, with_link["params"], batch, {}, train=False)
    assert found.total == pytest.approx(float(found.task + 0.5 * found.node + 0.5 * found.graph), abs=1e-5)
    alone = pogat.pogat_loss(model, with_link["params"], batch, {}, train=False, task=False)
    assert alone.total == pytest.approx(float(0.5 * found.node + 0.5 * found.graph), abs=1e-5)
    with pytest.raises(ValueError, match="links are scored with a link_type"):
        POGAT(SMALL).apply(variables, FEATURES, SUB, RELATION, pairs, method="score_links")


def test_several_labels_are_learned_one_by_one():
    logits, labels = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[1, 0, 1]])
    found = pogat.task_loss(dataclasses.replace(SMALL, multi_label=True), logits, labels)
    assert found == pytest.approx(float(np.mean(np.log1p(np.exp([-2.0, -1.0, -0.5])))), abs=1e-5)


@pytest.mark.parametrize("kind", [GAT, RGCN, HAN])
def test_baselines_hear_from_their_neighbours_only(kind):
    model = kind(BaselineConfig(3, 8, 2, 1, 0.0))
    count = 5 if kind is HAN else 10
    loops = np.arange(count, dtype=np.int32)
    one = (np.append(loops, 3).astype(np.int32), np.append(loops, 0).astype(np.int32))  # node 0 hears from 3
    links = one if kind is GAT else (one,)
    parameters = random_parameters(model, FEATURES, links)
    moved = (FEATURES[0].copy(), FEATURES[1])
    moved[0][3] += 1
    difference = jnp.abs(model.apply(parameters, FEATURES, links) - model.apply(parameters, moved, links)).max(-1)
    assert difference[0] > 1e-4 and difference[3] > 1e-4 and not difference[np.array([1, 2, 4])].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dataclasses.replace(SMALL, heads=3), r"features \(8\) must be a multiple of heads \(3\)"),
        (lambda: dataclasses.replace(SMALL, slot_types=(0, 2)), r"slot_types must be in 0 \.\. 1"),
        (lambda: dataclasses.replace(SMALL, perturbed="hrad"), "did you mean 'hard'"),
        (lambda: dataclasses.replace(SMALL, slot_types=(0, 0), link_type=1), "link_type 1 fills no slot"),
        (
            lambda: POGAT(SMALL).init(jax.random.key(0), FEATURES, SUB[:, :2], RELATION),
            r"sub must be \(M, 3\) and relation \(3, 3\), got \(4, 2\)",
        ),
        (lambda: POGAT(SMALL).init(jax.random.key(0), FEATURES[::-1], SUB, RELATION), r"of widths \(3, 4\)"),
    ],
)
def test_wrong_calls_say_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()

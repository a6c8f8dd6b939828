"""Pooling and attention: exact rewrites, padding, designs, the loss on many devices, adapters, evaluation."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from sklearn.metrics import ndcg_score

import zoo
from kernels.attention import attention
from tests.parameters import random_parameters
from zoo.backbones import DecoderLM
from zoo.data.sentence_pairs import documented_functions, read_stsb
from zoo.data.tokenizers import ByteLevelTokenizer
from zoo.layers import lora
from zoo.papers import pooling_attention
from zoo.papers.pooling_attention import (
    DESIGNS,
    Embedder,
    EmbedderConfig,
    LatentPooling,
    PoolingConfig,
    evaluation,
    hard_negative_nll,
    in_chunks,
    pooling,
)
from zoo.papers.pooling_attention.model import adapter_rules, weight_rules
from zoo.train import MeshConfig, OptimizerConfig, build_optimizer, init_sharded, make_mesh, make_train_step
from zoo.weights import convert
from zoo.weights.names import flatten, to_published

TINY = {
    "vocab_size": 50, "features": 16, "layers": 2, "heads": 2, "key_heads": 1, "mlp_features": 32, "pool_heads": 2,
    "pool_head_dim": 4, "pool_latents": 3, "pool_layers": None, "lora_rank": 2, "lora_alpha": 4.0,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 50, (3, 7), dtype=np.int32)
LENGTHS = (7, 4, 1)


def embedder(design, **changes):
    options = TINY | DESIGNS[design] | changes
    return Embedder(EmbedderConfig.preset(f"embedder_{design}_smollm2_135m", **options))


@pytest.fixture(scope="module")
def variables():
    return {design: random_parameters(embedder(design), TOKENS) for design in DESIGNS}


def padded(time, left=True):
    """The texts of LENGTHS, padded to a length."""
    tokens, valid = np.zeros((3, time), np.int32), np.zeros((3, time), bool)
    for row, length in enumerate(LENGTHS):
        place = slice(time - length, time) if left else slice(0, length)
        tokens[row, place], valid[row, place] = TOKENS[row, :length], True
    return jnp.asarray(tokens), jnp.asarray(valid)


# ----------------------------------------------------------------- the pooling network

SIZES = PoolingConfig(dim=12, heads=3, head_dim=16, latents=20, layers=9)


def both(config, count, mask=None, **options):
    """Values and gradients (of parameters and vectors) of the definition and of the fast form."""
    model = LatentPooling(config)
    vectors = jnp.asarray(np.random.default_rng(1).normal(size=(2, count, config.dim)), jnp.float32)
    variables = random_parameters(model, vectors)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(2, config.dim)), jnp.float32)

    def run(method, variables, vectors):
        more = {name: give(variables) for name, give in options.items()} if method is None else {}
        return model.apply(variables, vectors, mask, method=method or model.__call__, **more)

    for method in (model.plain, None):
        yield _pull(partial(run, method), variables, vectors, cotangent)


@partial(jax.jit, static_argnums=0)
def _pull(run, variables, vectors, cotangent):
    value, pullback = jax.vjp(run, variables, vectors)
    return value, pullback(cotangent)


def assert_equal(found, tolerance=1e-5):
    plain, fast = found
    np.testing.assert_allclose(fast[0], plain[0], atol=tolerance)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1]):
        other = dict(jax.tree_util.tree_leaves_with_path(fast[1]))[path]
        np.testing.assert_allclose(other, leaf, atol=tolerance * scale, err_msg=str(path))


@pytest.mark.parametrize(("count", "masked"), [(2, True), (9, False), (40, True)])
def test_the_rewrites_are_exact(count, masked):
    """Queries without texts, W_o on values where they are few (2, 9) and on sums where not (40), W_2 on the mean."""
    config = dataclasses.replace(SIZES, layers=None) if count > 9 else SIZES
    assert LatentPooling(config)._few(count) == (count < 10)
    mask = jnp.asarray(np.arange(count)[None] < [[count], [(count + 1) // 2]]) if masked else None
    assert_equal(both(config, count, mask))


@pytest.mark.parametrize("count", [4, 40])
def test_folded_queries_are_exact(count):
    config = dataclasses.replace(SIZES, layers=None)
    fold = partial(LatentPooling(config).apply, method="fold")
    assert_equal(both(config, count, folded=fold))


def test_one_vector_is_exact_and_leaves_queries_and_keys_without_gradient():
    """Design 2: the softmax is 1, and W_1 is linear in the sum of a latent and the update."""
    found = list(both(dataclasses.replace(SIZES, layers=None), 1))
    assert_equal(found)
    for _, (gradient, _) in found:
        for name in ("query", "key", "norm_latents"):
            assert all(float(jnp.abs(leaf).max()) < 1e-6 for leaf in jax.tree.leaves(gradient["params"][name]))
    unused = found[1][1][0]["params"]
    for name in ("query", "key", "norm_latents"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(unused[name])), "exactly zero in the fast form"


@pytest.mark.parametrize("count", [1, 5])
def test_latents_in_chunks_are_exact(count, monkeypatch):
    monkeypatch.setattr(pooling, "_ACTIVATIONS", 2 * 2 * 8 * SIZES.dim)  # two latents of two texts
    assert_equal(both(SIZES, count))


def flops(config, count, method=None):
    """Of eight texts, by the compiler."""
    model = LatentPooling(config)
    vectors = jax.ShapeDtypeStruct((8, count, config.dim), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), vectors)
    run = jax.jit(partial(model.apply, method=method or model.__call__))
    return run.lower(variables, vectors).compile().cost_analysis()["flops"]


def test_the_rewrites_save_what_they_should():
    """A middle size of the published proportions; what is left of many vectors is W_1, which nothing saves."""
    config = PoolingConfig(dim=128, heads=4, head_dim=512, latents=192, layers=8)
    plain, fast = (flops(config, 8, method) for method in ("plain", None))
    first = 8 * 2 * config.latents * config.dim * 8 * config.dim
    assert plain > 3 * fast and first < fast < 2 * first
    one = dataclasses.replace(config, layers=None)
    assert flops(one, 1, "plain") > 15 * flops(one, 1)


def test_all_vectors_left_out_is_finite():
    model = LatentPooling(dataclasses.replace(SIZES, layers=None))
    for count in (1, 3):
        vectors = jnp.ones((1, count, 12))
        parameters = random_parameters(model, vectors)
        nothing = jnp.zeros((1, count), bool)
        plain = jax.jit(partial(model.apply, method="plain"))(parameters, vectors, nothing)
        np.testing.assert_allclose(jax.jit(model.apply)(parameters, vectors, nothing), plain, atol=1e-5)
        assert np.isfinite(plain).all()


# ----------------------------------------------------------------- the designs


def test_designs_differ_in_pooling_and_mask_alone():
    configs = [EmbedderConfig.preset(f"embedder_{n}_mistral_7b") for n in DESIGNS]
    fields = [dataclasses.asdict(config) for config in configs]
    different = {name for name in fields[0] if any(field[name] != fields[0][name] for field in fields)}
    assert different == {"causal", "pooled", "pooled_layers", "pool_latents"}


def test_published_sizes_without_memory():
    """Whole networks by `tests/test_registry.py`; here what is new in them."""
    model = zoo.create("embedder_5_mistral_7b")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **zoo.example_inputs("embedder_5_mistral_7b", 1)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["pooling"]))
    assert count == 1_278_406_656
    adapters = sum(leaf.size for leaf in jax.tree.leaves(shapes["lora"]))
    assert adapters == 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


@pytest.mark.parametrize("design", DESIGNS)
def test_a_text_is_embedded_alike_alone_and_in_any_batch(design, variables):
    apply = jax.jit(embedder(design).apply)
    alone = apply(variables[design], TOKENS[1:2, : LENGTHS[1]])[0]
    found = [apply(variables[design], *padded(time, left)) for time, left in ((8, True), (16, False))]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[0][1], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=-1), 1, atol=1e-5)


def test_design_4_as_published_depends_on_its_batch(variables):
    model, official = (jax.jit(embedder(4, mask_padding=masked).apply) for masked in (True, False))
    found = [official(variables[4], *padded(time)) for time in (7, 16)]
    right = model(variables[4], *padded(7))
    np.testing.assert_allclose(found[0][0], right[0], atol=1e-5)  # no padding in the first row
    assert np.abs(found[0][1:] - found[1][1:]).max() > 1e-2
    assert np.abs(found[0][1:] - right[1:]).max() > 1e-2


def test_every_way_to_pool_tokens():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)), jnp.float32)
    valid = jnp.asarray(np.arange(7) >= 7 - np.array(LENGTHS)[:, None])
    for row, length in enumerate(LENGTHS):
        real = np.asarray(x[row, 7 - length :])
        weights = np.arange(1, length + 1)
        expected = {
            "last": real[-1],
            "mean": real.mean(0),
            "weighted_mean": weights @ real / weights.sum(),
            "mean_without_first": real[min(1, length - 1) :].mean(0),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(pooling_attention.reduced(x, name, valid)[row], value, atol=1e-6)


def test_layers_leave_the_embedding_out_and_end_with_the_norm(variables):
    """Design 3 pools what a decoder's own hidden states say."""
    model = embedder(3)
    merged = lora.merge(variables[3], model.config.adapters)["params"]["decoder"]
    decoder = DecoderLM(model.config)
    tokens, valid = padded(8)
    final, _ = jax.jit(partial(decoder.apply, method="hidden"))({"params": merged}, tokens, valid=valid)
    vectors, mask = jax.jit(partial(model.apply, method="vectors"))(variables[3], tokens, valid)
    assert vectors.shape == (3, 2, 16) and mask is None
    np.testing.assert_allclose(vectors[:, -1], final[:, -1], atol=1e-4)
    layers = jax.jit(partial(pooling_attention.layer_vectors, decoder))({"params": merged}, tokens, valid)["last"]
    np.testing.assert_allclose(vectors, layers[:, 1:], atol=1e-4)
    np.testing.assert_allclose(layers[:, 0], merged["embed"]["embedding"][tokens[:, -1]], atol=1e-6)
    with pytest.raises(ValueError, match="which remat = True hides"):
        embedder(3, remat=True).apply(variables[3], tokens, valid)


def test_the_mask_is_the_designs_and_not_the_kernels():
    """Without causal masking all implementations see padding's complement; a window is symmetric."""
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(2, 9, 2, 8)), jnp.float32) for _ in range(3))
    ids = jnp.asarray(np.arange(9) >= [[0], [4]]).astype(jnp.int32)
    masks = {"query_segment_ids": ids, "key_segment_ids": ids, "window": (2, 2)}
    found = [
        jax.jit(partial(attention, **masks, implementation=one))(query, key, value)
        for one in ("reference", "chunked", "tpu")
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)

    def last_sees(window, causal, variables):
        model = embedder(4, layers=1, window=window, causal=causal)
        tokens = jnp.asarray(TOKENS[:1])

        def hidden(embedding):
            params = {**variables["params"]["decoder"], "embed": {"embedding": embedding}}
            return DecoderLM(model.config).apply({"params": params}, tokens, method="hidden")[0][0, 3].sum()

        gradient = jax.jit(jax.grad(hidden))(variables["params"]["decoder"]["embed"]["embedding"])
        return [bool(np.any(gradient[token])) for token in TOKENS[0]]

    variables = random_parameters(embedder(4, layers=1), TOKENS)
    assert len(set(TOKENS[0])) == 7
    assert last_sees(None, False, variables) == [True] * 7
    assert last_sees(None, True, variables) == [True] * 4 + [False] * 3
    assert last_sees(2, False, variables) == [False, False, True, True, True, False, False]  # |i - j| < 2


# ----------------------------------------------------------------- adapters and names


def test_adapters_merge_and_drop_only_in_training(variables):
    model = embedder(5)
    tokens, valid = padded(8)
    expected = jax.jit(model.apply)(variables[5], tokens, valid)
    merged = lora.merge(variables[5], model.config.adapters)
    plain = jax.jit(embedder(5, lora_rank=None).apply)
    np.testing.assert_allclose(plain(merged, tokens, valid), expected, atol=1e-5)
    rngs = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(jax.jit(model.apply)(variables[5], tokens, valid, rngs=rngs), expected)
    dropped = jax.jit(partial(model.apply, deterministic=False))(variables[5], tokens, valid, rngs=rngs)
    assert np.abs(dropped - expected).max() > 1e-3
    with pytest.raises(ValueError, match="dropout needs rngs"):
        model.apply(variables[5], tokens, valid, deterministic=False)


def test_a_decoder_is_adapted_and_published_adapters_are_loaded(variables, tmp_path):
    model = embedder(5)
    decoder = variables[5]["params"]["decoder"]
    fresh = pooling_attention.adapt(model, {"params": {**decoder, "head": {}}}, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables[5])
    tokens, valid = padded(8)
    plain = pooling_attention.layer_vectors(
        DecoderLM(model.config), {"params": decoder}, tokens, valid, pooled=["mean"]
    )
    vectors, _ = model.apply(fresh, tokens, valid, method="vectors")
    np.testing.assert_allclose(vectors, plain["mean"][:, 1:], atol=1e-5)  # B is zero at first

    new = {"params": {"pooling": variables[5]["params"]["pooling"]}, "lora": variables[5]["lora"]}
    published = to_published(new, adapter_rules())
    name = "base_model.model.layers.1.self_attn.o_proj.lora_B.weight"
    assert published[name].shape == (16, 2) and published["pos_emb.weight"].shape == (2, 16)
    torch = pytest.importorskip("torch")
    parts = [{}, {}]
    for key, value in published.items():
        parts[key.startswith("base_model")][key] = torch.from_numpy(value.copy())
    torch.save(parts[0], tmp_path / "attn_pool.pt")
    loaded = pooling_attention.load_adapter(
        fresh, {key: value.numpy() for key, value in parts[1].items()}, tmp_path / "attn_pool.pt"
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, variables[5])
    with pytest.raises(ValueError, match=r"lora_A\.weight"):
        pooling_attention.load_adapter(fresh, {"base_model.model.layers.7.mlp.up_proj.lora_A.weight": np.ones((2, 16))})


def test_names_of_the_base_model_with_and_without_prefix(variables):
    model = embedder(2)
    rules = weight_rules(model.config)
    published = to_published(variables[2], rules)
    assert "model.layers.0.mlp.gate_proj.weight" in published and "latents" in published
    bare = {name.removeprefix("model."): value for name, value in published.items()}
    for names in (published, bare | {"lm_head.weight": np.ones((50, 16))}):
        jax.tree.map(np.testing.assert_array_equal, convert(names, rules, variables[2]), variables[2])


# ----------------------------------------------------------------- the loss


def triple(count=8, features=5):
    random = np.random.default_rng(3)
    return [jnp.asarray(random.normal(size=(count, features)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("negatives", [True, False])
def test_the_loss_on_many_devices_is_that_of_one(negatives):
    parts = triple()[: 3 if negatives else 2]
    expected = jax.value_and_grad(lambda p: hard_negative_nll(*p))(parts)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = PartitionSpec("data")
    loss = jax.shard_map(
        lambda p: hard_negative_nll(*p, axis_name="data"), mesh=mesh, in_specs=(spec,), out_specs=PartitionSpec()
    )
    found = jax.jit(jax.value_and_grad(loss))(parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_chance_is_the_log_of_the_candidates():
    same = jnp.ones((8, 5))
    np.testing.assert_allclose(hard_negative_nll(same, same, same), np.log(16), rtol=1e-6)
    query, positive, negative = triple()
    scaled = hard_negative_nll(3 * query, positive / 2, 5 * negative)
    np.testing.assert_allclose(scaled, hard_negative_nll(query, positive, negative), rtol=1e-5)


@pytest.mark.slow
def test_gradient_caching_is_the_plain_gradient(variables):
    """All rows in one contrast, two embedded at a time."""
    model = embedder(1)
    state = pooling_attention.trained(variables[1])
    random = np.random.default_rng(4)
    batch = {"tokens": jnp.asarray(random.integers(1, 50, (4, 3, 6)), jnp.int32), "valid": jnp.ones((4, 3, 6), bool)}

    def gradient(chunk):
        loss = pooling_attention.contrastive_loss(model, chunk=chunk)
        return jax.jit(jax.value_and_grad(lambda p: loss(p, {"frozen": state["frozen"]}, batch, {}, False)[0]))(
            state["params"]
        )

    plain, cached = gradient(None), gradient(2)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain[1]))
    # Float32 sums in another order; `test_in_chunks_is_exact` is in float64.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), cached, plain)
    with pytest.raises(ValueError, match="chunk must divide the 12 rows, got 5"):
        gradient(5)


def test_in_chunks_is_exact():
    with jax.enable_x64(True):
        random = np.random.default_rng(8)
        weights, x = jnp.asarray(random.normal(size=(4, 5))), jnp.asarray(random.normal(size=(6, 4)))

        def loss(weights, chunk):
            def embed(part):
                return jnp.tanh(part @ weights)

            vectors = embed(x) if chunk is None else in_chunks(embed, x, chunk)
            return jnp.sum(jnp.square(vectors @ vectors.T))  # every row meets every other

        plain, cached = (jax.value_and_grad(loss)(weights, chunk) for chunk in (None, 2))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), cached, plain)


def test_accumulation_keeps_the_contrast_within_a_micro_batch(variables):
    """And a step trains adapters and pooling, and leaves the decoder."""
    model = embedder(3, lora_dropout=0.0)
    state = pooling_attention.trained(variables[3])
    random = np.random.default_rng(5)
    batch = {"tokens": jnp.asarray(random.integers(1, 50, (8, 3, 5)), jnp.int32), "valid": jnp.ones((8, 3, 5), bool)}
    loss = pooling_attention.contrastive_loss(model)
    rngs = {"dropout": jax.random.key(0)}
    one = jax.jit(partial(loss, train=True))

    def value(rows):
        part = jax.tree.map(lambda x: x[rows], batch)
        return float(one(state["params"], {"frozen": state["frozen"]}, part, rngs)[0])

    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-2, accumulation_steps=4), 10)
    start = init_sharded(lambda _: state, optimizer, jax.random.key(0), make_mesh(MeshConfig(data=1)))
    before = jax.tree.map(np.asarray, state)
    after, metrics = make_train_step(loss, optimizer, start)(start, batch)
    parts = [value(slice(first, None, 4)) for first in range(4)]
    np.testing.assert_allclose(float(metrics["loss"]), np.mean(parts), rtol=1e-5)
    assert abs(float(metrics["loss"]) - value(slice(None))) > 1e-2
    jax.tree.map(np.testing.assert_array_equal, after.model_state["frozen"], before["frozen"])
    moved = flatten(jax.tree.map(lambda new, old: bool(np.any(np.asarray(new) != old)), after.params, before["params"]))
    assert all(moved.values()), [path for path, there in moved.items() if not there]


# ----------------------------------------------------------------- texts and their evaluation


def test_texts_are_encoded_in_their_order(variables):
    tokenizer = ByteLevelTokenizer(ByteLevelTokenizer.byte_alphabet(), [], end=7)
    texts = ["a long text, longer than the others", "b", "cc", "b"]
    rows = evaluation.tokenize(tokenizer, texts, max_length=20)
    assert [len(row) for row in rows] == [20, 2, 3, 2] and all(row[-1] == 7 for row in rows)
    assert evaluation.tokenize(tokenizer, ["b"], instruction="to ")[0] == [*tokenizer.encode("to b"), 7]
    model = embedder(3, vocab_size=256)
    parameters = random_parameters(model, TOKENS)
    found = evaluation.encode(model.apply, parameters, rows, batch_size=2)
    for row, one in list(zip(rows, found, strict=True))[:2]:
        np.testing.assert_allclose(jax.jit(model.apply)(parameters, jnp.asarray([row]))[0], one, atol=1e-5)
    with pytest.raises(ValueError, match="no text"):
        evaluation.encode(model.apply, parameters, [])
    with pytest.raises(ValueError, match="end-of-text"):
        evaluation.tokenize(ByteLevelTokenizer(ByteLevelTokenizer.byte_alphabet(), []), texts)


def test_metrics_are_those_of_their_libraries():
    from scipy.stats import spearmanr

    random = np.random.default_rng(6)
    a, b, scores = random.normal(size=(30, 4)), random.normal(size=(30, 4)), random.integers(0, 5, 30)
    np.testing.assert_allclose(
        evaluation.sts_spearman(a, b, scores), spearmanr(evaluation.cosines(a, b), scores).statistic
    )
    assert evaluation.spearman(np.ones(4), np.arange(4)) == 0
    layers = evaluation.layerwise_scores(np.stack([a, b], 1), np.stack([b, b], 1), scores)
    np.testing.assert_allclose(layers[0], evaluation.sts_spearman(a, b, scores))
    relevant = random.permutation(30)[:10]
    unit_rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a[:10], b)]
    truth = np.eye(30)[relevant]
    expected = ndcg_score(truth, unit_rows[0] @ unit_rows[1].T, k=10)
    np.testing.assert_allclose(evaluation.retrieval_ndcg(a[:10], b, relevant).mean(), expected)
    correlation = evaluation.layer_correlation(np.stack([a, -a, b], axis=1))
    np.testing.assert_allclose(correlation[0, :2], [1, -1])


def test_separate_classes_are_told_apart():
    random = np.random.default_rng(7)
    labels = np.repeat([0, 1, 2], 20)
    x = 8 * np.eye(3)[labels] + random.normal(size=(60, 3))
    order = random.permutation(60)
    assert evaluation.classification_probe(x[order[:30]], labels[order[:30]], x[order[30:]], labels[order[30:]]) > 0.9
    assert evaluation.clustering_v_measure(x, labels) > 0.9


def test_significance_is_corrected():
    assert evaluation.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    first = {"similarity": np.arange(8) + 1.0, "retrieval": [1.0, 2.0]}
    second = {"similarity": np.arange(8) / 2, "retrieval": [1.0, 2.0]}
    table = evaluation.wilcoxon_table(first, second)
    assert table["similarity"].p == pytest.approx(2 / 2**8) and table["similarity"].corrected == pytest.approx(4 / 2**8)
    assert table["retrieval"] == (0.0, 1.0, 1.0, 2)
    with pytest.raises(ValueError, match="paired"):
        evaluation.wilcoxon_table(first, {**second, "retrieval": [1.0]})


def test_pairs_are_read_and_functions_described(tmp_path):
    (tmp_path / "a.csv").write_text('A cat.,"A cat, black.",3.5\nA,B,0\n')
    assert read_stsb(tmp_path / "a.csv")[0] == ("A cat.", "A cat, black.", 3.5)
    (tmp_path / "a.csv").write_text("A,B,0\nA,B\n")
    with pytest.raises(ValueError, match=r"a\.csv, row 2: expected two sentences"):
        read_stsb(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"no b\.csv"):
        read_stsb(tmp_path / "b.csv")
    functions = documented_functions(("numpy",))
    assert len({one.description for one in functions}) == len({one.summary for one in functions}) == len(functions)
    assert next(one for one in functions if one.name == "numpy.kron").summary == "Kronecker product of two arrays."


def test_bad_input_is_named(variables):
    for changes, message in (
        ({"pooled": "max"}, "choice of pooled"),
        ({"pooled": "mean", "pool_latents": None}, "all layers need a pooling network"),
        ({"pooled": "tokens"}, "tokens are pooled of the last layer"),
        ({"pool_layers": 1}, "fewer than 2 layers"),
        ({"mask_padding": False}, "is for pooled = 'tokens'"),
        ({"pool_heads": 0}, "heads must be positive"),
        ({"lora_rank": 0}, "lora_rank must be None or positive"),
    ):
        with pytest.raises(ValueError, match=message):
            embedder(3, **changes)
    model = LatentPooling(SIZES)
    parameters = random_parameters(model, jnp.ones((1, 2, 12)))
    for vectors, mask, message in (
        (jnp.ones((2, 12)), None, r"\(batch, count, 12\)"),
        (jnp.ones((1, 10, 12)), None, "matrix of layers has 9 rows"),
        (jnp.ones((1, 2, 12)), jnp.ones((1, 3), bool), "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            model.apply(parameters, vectors, mask)
    with pytest.raises(ValueError, match="queries and documents must be"):
        hard_negative_nll(jnp.ones((2, 3)), jnp.ones((3, 3)))

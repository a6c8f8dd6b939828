import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from zoo.weights.names import (
    TRANSFORMS,
    NameMapError,
    Rule,
    Transform,
    convert,
    flatten,
    layer,
    to_published,
    under,
    vector,
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def round_trip(state_dict, rules, target):
    variables = convert(state_dict, rules, target)
    back = to_published(variables, rules)
    return variables, back


def assert_equal(ours, published):
    assert ours.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


CONVOLUTIONS = {1: (torch.nn.Conv1d, torch.nn.ConvTranspose1d), 2: (torch.nn.Conv2d, torch.nn.ConvTranspose2d)}
CONVOLUTIONS[3] = (torch.nn.Conv3d, torch.nn.ConvTranspose3d)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "grouped", "depthwise", "pointwise", "conv_transpose"])
def test_layers_compute_what_torch_computes(kind, dims):
    torch.manual_seed(0)
    convolution, transposed = CONVOLUTIONS[dims]
    options = {"conv": {}, "grouped": {"groups": 2}, "depthwise": {"groups": 4}, "pointwise": {}, "conv_transpose": {}}
    size = 1 if kind == "pointwise" else 3
    inputs = draw(2, *(5, 6, 7)[:dims], 4)
    if kind == "conv_transpose":
        theirs = transposed(4, 6, size, stride=2, padding=1)
        ours = nn.ConvTranspose(6, (size,) * dims, (2,) * dims, padding=((1, 1),) * dims)
    else:
        out = 4 if kind == "depthwise" else 6
        theirs = convolution(4, out, size, padding=size // 2, **options[kind])
        ours = nn.Conv(out, (size,) * dims, padding="SAME", feature_group_count=options[kind].get("groups", 1))
        if kind == "pointwise":
            ours = nn.Dense(6)
    transform = f"{kind if kind in ('pointwise', 'conv_transpose') else 'conv'}{dims}d"
    state_dict = {f"layer.{name}": value.detach().numpy() for name, value in theirs.named_parameters()}
    target = jax.eval_shape(ours.init, jax.random.key(0), inputs)
    rules = [*layer(transform, "layer", "x")]
    variables, back = round_trip(state_dict, rules, {"params": {"x": target["params"]}})
    assert_equal(back, state_dict)
    expected = theirs(torch.from_numpy(np.moveaxis(inputs, -1, 1).copy())).detach().numpy()
    result = ours.apply({"params": variables["params"]["x"]}, inputs)
    np.testing.assert_allclose(result, np.moveaxis(expected, 1, -1), atol=1e-5)


def test_depthwise_layout_and_vectors():
    state_dict = {"short": draw(4, 1, 3), "gamma": draw(1, 5, 1, 1)}
    rules = [Rule("short", "params/short", "depthwise1d"), Rule("gamma", "params/gamma", vector(4, 1))]
    target = {"params": {"short": np.zeros((3, 4), np.float32), "gamma": np.zeros(5, np.float32)}}
    variables, back = round_trip(state_dict, rules, target)
    np.testing.assert_array_equal(variables["params"]["short"], state_dict["short"][:, 0].T)
    assert_equal(back, state_dict)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            kernel_init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            x = nn.Dense(8, name=f"layer_{i}", kernel_init=kernel_init)(x)
            x = nn.BatchNorm(use_running_average=True, name=f"norm_{i}")(x)
        return nn.Embed(7, 8, name="table").attend(x)


NETWORK_RULES = [
    *layer("linear", r"blocks\.(\d+)\.fc", "layer_{0}"),
    *layer("batch_norm", r"blocks\.(\d+)\.bn", "norm_{0}"),
    *layer("embedding", "emb", "table"),
]


def network_state(prefix=""):
    state_dict = {}
    for i in range(3):
        state_dict |= {f"blocks.{i}.fc.weight": draw(8, 8, seed=i), f"blocks.{i}.fc.bias": draw(8, seed=9 + i)}
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state_dict[f"blocks.{i}.bn.{leaf}"] = draw(8, seed=len(state_dict))
        state_dict[f"blocks.{i}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    state_dict["emb.weight"] = draw(7, 8)
    return {prefix + name: value for name, value in state_dict.items()}


@pytest.fixture(scope="module")
def target():
    return jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros((2, 8)))


def without_counts(state_dict):
    return {name: value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")}


def test_parameters_and_statistics_come_through_and_back(target):
    state_dict = network_state()
    variables, back = round_trip(state_dict, NETWORK_RULES, target)
    np.testing.assert_array_equal(variables["params"]["layer_1"]["kernel"], state_dict["blocks.1.fc.weight"].T)
    np.testing.assert_array_equal(variables["batch_stats"]["norm_2"]["var"], state_dict["blocks.2.bn.running_var"])
    assert_equal(back, without_counts(state_dict))
    assert flatten(variables).keys() == flatten(target).keys()
    Network().apply(variables, np.zeros((2, 8), np.float32))


def test_rules_of_a_part_serve_the_whole(target):
    rules = under(r"towers\.(\d)", "tower_{0}", NETWORK_RULES)
    state_dict = network_state("towers.0.") | network_state("towers.1.")
    both = {
        collection: {"tower_0": target[collection], "tower_1": target[collection]}
        for collection in ("params", "batch_stats")
    }
    variables, back = round_trip(state_dict, rules, both)
    assert_equal(back, without_counts(state_dict))
    np.testing.assert_array_equal(
        variables["params"]["tower_1"]["layer_2"]["bias"], state_dict["towers.1.blocks.2.fc.bias"]
    )


def test_fused_projections_split_and_come_back():
    state_dict = {"attn.qkv.weight": draw(24, 4), "attn.qkv.bias": draw(24)}
    names = ("query", "key", "value")
    rules = [
        Rule(r"(attn)\.qkv\.weight", tuple(f"params/{{0}}/{n}/kernel" for n in names), "linear", sections=(4, 1, 1)),
        Rule(r"(attn)\.qkv\.bias", tuple(f"params/{{0}}/{n}/bias" for n in names), sections=(4, 1, 1)),
    ]
    shapes = {"query": 16, "key": 4, "value": 4}
    target = {
        "params": {"attn": {n: {"kernel": np.zeros((4, w), "f"), "bias": np.zeros(w, "f")} for n, w in shapes.items()}}
    }
    variables, back = round_trip(state_dict, rules, target)
    np.testing.assert_array_equal(variables["params"]["attn"]["key"]["kernel"], state_dict["attn.qkv.weight"][16:20].T)
    assert_equal(back, state_dict)


def test_separate_projections_merge_and_come_back():
    state_dict = {
        f"l.{i}.{n}.weight": draw(w, 4, seed=i) for i in range(2) for n, w in zip("qkv", (8, 4, 4), strict=True)
    }
    rules = [
        Rule(tuple(rf"l\.(\d+)\.{n}\.weight" for n in "qkv"), "params/l{0}/qkv/kernel", "linear", sections=(2, 1, 1))
    ]
    target = {"params": {f"l{i}": {"qkv": {"kernel": np.zeros((4, 16), np.float32)}} for i in range(2)}}
    variables, back = round_trip(state_dict, rules, target)
    np.testing.assert_array_equal(variables["params"]["l1"]["qkv"]["kernel"][:, 8:12], state_dict["l.1.k.weight"].T)
    assert_equal(back, state_dict)
    del state_dict["l.1.k.weight"]
    with pytest.raises(
        NameMapError, match=r"made of 3 .*:\n.*l\.1\.q\.weight \(4, 8\) \+ l\.1\.v\.weight \(4, 4\) -> params/l1"
    ):
        convert(state_dict, rules, target)


def test_own_transforms_and_optional_prefixes():
    interleave = Transform(
        lambda w: w.reshape(2, -1, 2, 3).swapaxes(1, 2).reshape(-1, 3).T,
        lambda k: k.T.reshape(2, 2, -1, 3).swapaxes(1, 2).reshape(-1, 3),
    )
    rules = [Rule(r"(?:model\.)?h\.(\d+)\.w", "params/h_{0}", interleave)]
    target = {"params": {"h_0": np.zeros((3, 8), np.float32)}}
    plain = {"h.0.w": draw(8, 3)}
    assert_equal(round_trip(plain, rules, target)[1], plain)
    assert_equal(round_trip({"model.h.0.w": plain["h.0.w"]}, rules, target)[1], plain)


def test_dtypes_follow_the_model():
    rules = [Rule("w", "params/w"), Rule("n", "params/n")]
    target = {"params": {"w": jnp.zeros(3, jnp.bfloat16), "n": np.zeros((), np.int32)}}
    variables = convert({"w": draw(3), "n": np.int64(5)}, rules, target)
    assert variables["params"]["w"].dtype == ml_dtypes.bfloat16 and variables["params"]["n"].shape == ()
    with pytest.raises(NameMapError, match=r"dtypes that differ:\n    w \(3,\) int64 -> params/w bfloat16"):
        convert({"w": np.arange(3), "n": np.int64(5)}, rules, target)


def test_one_error_lists_everything_that_does_not_fit(target):
    state_dict = network_state()
    del state_dict["blocks.1.fc.bias"]
    state_dict |= {
        "head.weight": draw(3, 8),
        "blocks.7.fc.bias": draw(8),
        "emb.weight": draw(6, 8),
        "blocks.0.fc.weight": draw(8, 8, 1, 1),
    }
    with pytest.raises(NameMapError) as caught:
        convert(state_dict, NETWORK_RULES, target)
    message = str(caught.value)
    assert message.startswith("the checkpoint does not fit the model (5 problems)")
    for line in (
        "published names without a rule:\n    head.weight (3, 8)",
        "published names whose place the model does not have:\n    blocks.7.fc.bias (8,) -> params/layer_7/bias",
        "shapes that differ:\n    emb.weight (6, 8) -> params/table/embedding (7, 8)",
        "'linear' takes 2 axes, got shape (8, 8, 1, 1)",
        "the model's parameters without a published name:\n    params/layer_1/bias (8,)",
    ):
        assert line in message
    with pytest.raises(NameMapError, match=r"variables without a rule:\n    params/other \(2,\)"):
        to_published({"params": {"other": np.zeros(2)}}, NETWORK_RULES)


def test_two_names_for_one_place():
    rules = [Rule("(?:a)?b", "params/b")]
    with pytest.raises(NameMapError, match=r"names that meet in one place:\n    b \(2,\) \+ ab \(2,\) -> params/b"):
        convert({"b": draw(2), "ab": draw(2)}, rules, {"params": {"b": draw(2)}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "params/a", "transpose"), "unknown transform 'transpose'; .*an own one is a Transform"),
        (("a(", "params/a"), "not a regular expression"),
        ((r"a\.\d+", "params/a"), "cannot be read backwards"),
        ((r"a.*", "params/a"), "cannot be read backwards"),
        ((r"a\.(\d+)", "params/a"), "every group .* must occur in the path"),
        (("a", "params/{0}"), "every group .* must occur in the path"),
        ((r"a(b(c))", "params/{0}"), "must be plain"),
        ((("a", "b"), ("params/a", "params/b")), "splits or merges, not both"),
        ((("a", r"(\d)"), "params/a"), "must have the same groups"),
        (("a", ("params/a", "params/b"), "none", -1, (1, 2, 3)), "sections must be 2 positive numbers"),
        (("a", "params/{name}"), "a path's fields are"),
    ],
)
def test_wrong_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)
    with pytest.raises(ValueError, match="unknown kind of layer 'dense'"):
        layer("dense", "a", "a")


def test_thousands_of_names_take_a_moment():
    rules = [rule for k in range(40) for rule in layer("linear", rf"part{k}\.(\d+)\.(a|b)", f"part{k}_{{0}}/{{1}}")]
    state_dict, params = {}, {}
    for k in range(40):
        for i in range(25):
            params[f"part{k}_{i}"] = {n: {"kernel": draw(2, 3), "bias": draw(3)} for n in "ab"}
            for n in "ab":
                state_dict |= {f"part{k}.{i}.{n}.weight": draw(3, 2), f"part{k}.{i}.{n}.bias": draw(3)}
    start = time.perf_counter()
    _, back = round_trip(state_dict, rules, {"params": params})
    assert time.perf_counter() - start < 5 and len(back) == 4000
    assert_equal(back, state_dict)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_is_undone_by_its_inverse(name):
    transform = TRANSFORMS[name]
    array = draw(*(6, 4, 3, 2, 5)[: transform.ndim or 3])
    if name.startswith(("depthwise", "pointwise")):
        array = array.reshape(array.shape[0], -1)[:, :4]
        kernel = array.reshape(6, 1, *((4,), (2, 2), (2, 2, 1))[transform.ndim - 3])
        array = kernel if name.startswith("depthwise") else array.reshape(6, 4, *(1,) * (transform.ndim - 2))
    np.testing.assert_array_equal(transform.inverse(transform.forward(array)), array)
    assert transform.inverse(transform.forward(array)).shape == array.shape


def test_kernels_of_the_wrong_size_are_refused():
    for name, shape, message in (
        ("pointwise1d", (4, 3, 3), "a pointwise convolution's kernel is of size 1"),
        ("depthwise2d", (4, 2, 3, 3), r"a depthwise kernel is \(channels, 1, ...\)"),
    ):
        with pytest.raises(NameMapError, match=message):
            convert({"w": draw(*shape)}, [Rule("w", "params/w", name)], {"params": {"w": draw(1)}})
    with pytest.raises(NameMapError, match="expected only axis 1 to be longer than 1"):
        convert({"w": draw(2, 3, 1)}, [Rule("w", "params/w", vector(3, 1))], {"params": {"w": draw(3)}})
    with pytest.raises(NameMapError, match=r"axis -1 of shape \(7,\) does not divide into sections \(1, 1\)"):
        convert({"w": draw(7)}, [Rule("w", ("params/a", "params/b"))], {"params": {"a": draw(3), "b": draw(4)}})

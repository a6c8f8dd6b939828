"""Multiply-adds: what counts, and those that papers on vision networks publish."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import zoo
from kernels import attention
from zoo.counting import multiply_adds
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.convolution import convolve
from zoo.papers.emov2 import EMOv2
from zoo.papers.fcaformer import FcaFormer


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_count_and_elements_do_not():
    assert multiply_adds(lambda x, y: jnp.tanh(x @ y) + 1, shape(5, 2, 3), shape(3, 7)) == 5 * 2 * 3 * 7
    assert multiply_adds(lambda x: jax.lax.map(lambda y: y @ y.T, x), shape(4, 2, 3)) == 4 * 2 * 3 * 2
    both = jax.value_and_grad(lambda x, y: (x @ y).sum(), (0, 1))
    assert multiply_adds(both, shape(2, 3), shape(3, 7)) == 3 * (2 * 3 * 7)


@pytest.mark.parametrize("channels, groups", [(16, 1), (3, 1), (16, 16)], ids=["plain", "image", "depthwise"])
def test_convolutions_count_alike_whatever_their_form_on_a_cpu(channels, groups):
    call = functools.partial(convolve, stride=2, padding=1)
    found = multiply_adds(call, shape(2, 8, 6, channels), shape(3, 3, channels // groups, 16))
    assert found == 2 * 4 * 3 * 16 * 9 * channels // groups


def test_zeros_between_the_pixels_of_a_transposed_convolution_do_not_count():
    call = functools.partial(jax.lax.conv_transpose, strides=(2, 2), padding="SAME")
    assert multiply_adds(call, shape(1, 5, 6, 4), shape(2, 2, 4, 3)) == 5 * 6 * 4 * 3 * 2 * 2


def test_one_branch_counts():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    assert multiply_adds(function, shape(4, 4)) == 2 * 4**3


def test_a_kernel_counts_what_its_form_of_matrix_products_does():
    rows = shape(2, 16, 3, 8)
    assert multiply_adds(attention, rows, rows, rows) == 2 * 2 * 16 * 16 * 3 * 8


def test_devices_count_together():
    cut = jax.shard_map(
        lambda x, y: x @ y, mesh=AbstractMesh((2, 4), ("data", "tensor")),
        in_specs=(PartitionSpec("data"), PartitionSpec(None, "tensor")), out_specs=PartitionSpec("data", "tensor"),
    )  # fmt: skip
    assert multiply_adds(cut, shape(6, 3), shape(3, 8)) == 6 * 3 * 8


# ----------------------------------------------------------------------------------------------------- as published


def network(id):
    model = zoo.create(id)
    images = shape(1, *model.config.image_size, 3)
    return model, nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images)), images


def norms_as_fvcore_counts(model: EMOv2, images):
    """Two a value of a batch norm (in evaluation) and five a value of a layer norm."""
    total = 0

    def count(call, arguments, options, context):
        nonlocal total
        out = call(*arguments, **options)
        if isinstance(context.module, BatchNorm | nn.LayerNorm) and context.method_name == "__call__":
            total += (2 if isinstance(context.module, BatchNorm) else 5) * out.size
        return out

    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return total


def second_attentions(config):
    """Where a window is the whole map, the far windows are the near ones, which the published code attends to twice."""
    side, tokens = config.image_size[0] // 32, config.window**2
    hidden = int(config.widths[3] * config.expansions[3])
    return (config.depths[3] - 1) * tokens**2 * (config.widths[3] + hidden) * (side == config.window)


def queries_of_cross_tokens(model: FcaFormer):
    """The published code computes these with their keys and values, and does not use them."""
    config, total = model.config, 0
    for stage in (2, 3):
        rows, columns = config.grid(stage)
        tokens = -(-rows // 4) * -(-columns // 4)
        total += sum(min(block, 12) for block in range(config.depths[stage])) * tokens * config.widths[stage] ** 2
    return total


def cases(**billions):
    """The smallest network of a paper, and as slow ones the others."""
    first = next(iter(billions))
    return [pytest.param(id, n, marks=[] if id == first else [pytest.mark.slow]) for id, n in billions.items()]


@pytest.mark.parametrize(
    "id, millions", cases(emov2_1m=285, emov2_2m=487, emov2_5m=1035, emov2_5m_512=5627)
)  # fmt: skip
def test_emov2_counts_as_published(id, millions):
    """Published as counted by fvcore, norms included: to the last digit."""
    model, variables, images = network(id)
    ours = multiply_adds(model.apply, variables, images)
    assert ours / 1e6 == pytest.approx(millions, rel=0.035)
    published = ours + norms_as_fvcore_counts(model, images) + second_attentions(model.config)
    assert round(published / 1e6) == millions


@pytest.mark.parametrize("id, billions", cases(fcaformer_l1=1.4, fcaformer_l2=3.6, fcaformer_l3=6.7, fcaformer_l4=14.5))
def test_fcaformer_counts_as_published(id, billions):
    model, variables, images = network(id)
    published = multiply_adds(model.apply, variables, images) + queries_of_cross_tokens(model)
    assert published / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    "id, billions",
    cases(efficientformer_l1=1.3, efficientformer_l3=3.9, efficientformer_l7=10.2)
    + cases(mobilevig_ti=0.7, mobilevig_s=1.0, mobilevig_m=1.5, mobilevig_b=2.8),
)
def test_other_backbones_count_as_published(id, billions):
    """Within 2 %, or what is published is it rounded: 0.66 for 0.7."""
    model, variables, images = network(id)
    found = multiply_adds(model.apply, variables, images) / 1e9
    assert found == pytest.approx(billions, rel=0.02) or round(found, 1) == billions

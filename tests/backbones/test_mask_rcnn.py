"""Mask R-CNN and its cascade: what regions are for, which are drawn, what is lost, what is refined and found."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from tests.parameters import random_parameters
from zoo import registry, weights
from zoo.backbones import mask_rcnn
from zoo.backbones.mask_rcnn import CASCADE_MASK_RCNN, MASK_RCNN, MaskRCNN, Proposals, Sampled, regions
from zoo.layers import boxes as box
from zoo.layers.convolution import Conv
from zoo.layers.regions import crop_masks, paste_masks, roi_align
from zoo.weights import names

HEIGHT, WIDTH = 48, 64
# Compiled as a whole, which takes a fraction of the time of compiling each operation.
best_proposals = jax.jit(regions.best_proposals, static_argnums=(1, 2, 3, 4))
_proposal_losses = jax.jit(regions.proposal_losses, static_argnums=(0, 5))
sample_regions = jax.jit(regions.sample_regions, static_argnums=(0, 1))
region_losses = jax.jit(regions.region_losses, static_argnums=(0, 1))
region_mask_loss = jax.jit(regions.region_mask_loss)
assign = jax.jit(box.assign, static_argnums=(3, 4, 5, 6))
cut_masks = jax.jit(crop_masks, static_argnums=3)
put_masks = jax.jit(paste_masks, static_argnums=(2, 3))

SMALL = dataclasses.replace(MASK_RCNN, proposals=24, sampled_anchors=32, sampled_regions=32)
CASCADE = dataclasses.replace(CASCADE_MASK_RCNN, proposals=24, sampled_anchors=32, sampled_regions=32)


class Maps(nn.Module):
    """The smallest backbone there is."""

    @nn.compact
    def __call__(self, images, train=False):
        x, maps = nn.relu(Conv(8, 3, stride=2)(images)), []
        for _ in range(4):
            maps.append(x := nn.relu(Conv(8, 3, stride=2)(x)))
        return maps


@dataclasses.dataclass(frozen=True)
class Backbone:
    channels: int = 3


def random_boxes(random, *shape, height=HEIGHT, width=WIDTH):
    corner = random.uniform(0, 0.6, (*shape, 2))
    corners = np.concatenate([corner, corner + random.uniform(0.1, 0.4, (*shape, 2))], -1)
    return (corners * [width, height, width, height]).astype(np.float32)


def padded(array, rows, value):
    """More rows of a batch's boxes or labels or masks."""
    return np.concatenate([array, np.full((array.shape[0], rows, *array.shape[2:]), value, array.dtype)], axis=1)


# ---------------------------------------------------------------------------------------------------------- assignment


def assigned(anchors, boxes, positive, negative, least):
    """The definition, anchor by anchor and then box by box."""

    def overlap(a, b):
        sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
        shared = max(sides[0], 0) * max(sides[1], 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    table = np.array([[overlap(anchor, one) for one in boxes] for anchor in anchors])
    chosen = []
    for row in table:
        best = int(np.argmax(row))
        chosen.append(best if row[best] >= positive else box.NEGATIVE if row[best] < negative else box.IGNORED)
    for index in range(len(boxes)):
        if table[:, index].max() >= least:
            for anchor in np.flatnonzero(table[:, index] >= table[:, index].max() - 1e-6):
                chosen[anchor] = index
    return chosen


@pytest.mark.parametrize("positive, negative, least", [(0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.5, 0.5, math.inf)])
def test_assignment_is_its_definition(positive, negative, least):
    random = np.random.default_rng(0)
    boxes = random_boxes(random, 5)
    near = boxes[np.arange(60) % 5] + random.normal(0, 3, (60, 4))
    anchors = np.concatenate([near, near[:7], random_boxes(random, 20)]).astype(np.float32)  # some of them twice
    anchors[:, 2:] = np.maximum(anchors[:, 2:], anchors[:, :2] + 1)
    expected = assigned(anchors, boxes, positive, negative, least)
    labels = np.array([0, 1, 2, 3, 0, -1, -1])
    boxes = np.concatenate([boxes, anchors[:2]])  # what is padding may lie anywhere
    found = assign(anchors, boxes, labels, positive, negative, True, least)
    np.testing.assert_array_equal(found, expected)
    assert len({*expected} & {*range(5)}) > 2 and box.NEGATIVE in expected


@pytest.mark.parametrize("positives, negatives, expected", [(10, 30, (4, 12)), (2, 30, (2, 14)), (10, 3, (4, 3))])
def test_at_most_so_many_are_drawn(positives, negatives, expected):
    chosen = np.array([3] * positives + [box.NEGATIVE] * negatives + [box.IGNORED] * 9)
    random = np.random.default_rng(0).permutation(len(chosen))
    place, kept = box.sample(jax.random.key(0), jnp.asarray(chosen[random]), 16, 4)
    place, kept = np.asarray(place), np.asarray(kept)
    drawn = chosen[random][place[kept]]
    assert ((drawn == 3).sum(), (drawn == box.NEGATIVE).sum()) == expected and len(drawn) == sum(expected)
    assert len(set(place[kept])) == len(drawn) and (drawn[: expected[0]] == 3).all() and (np.diff(1 - kept) >= 0).all()


def test_all_are_drawn_as_often():
    chosen = jnp.where(jnp.arange(20) < 8, 0, box.NEGATIVE)
    place, kept = jax.vmap(lambda key: box.sample(key, chosen, 8, 4))(jax.random.split(jax.random.key(0), 2000))
    assert bool(kept.all())
    count = np.bincount(np.asarray(place).ravel(), minlength=20) / 2000
    np.testing.assert_allclose(count, np.where(np.arange(20) < 8, 1 / 2, 1 / 3), atol=0.05)


# ------------------------------------------------------------------------------------------------------------ proposals


def test_proposals_are_the_best_of_each_level_without_overlaps():
    anchors = np.array([[0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 30, 30], [0, 0, 10, 10], [-30, 0, -20, 9.0]])
    scores = np.array([[1.0, 2.0, 0.5, 0.0, 9.0]])
    proposals = Proposals(scores, np.zeros((1, 5, 4)), jnp.asarray(anchors, jnp.float32))
    found, valid = best_proposals(proposals, (3, 2), (HEIGHT, WIDTH), 1000, 8)
    # The first is nearly the second; the same box of another level stays; what lies outside the image is none.
    np.testing.assert_array_equal(valid, [[True, True, True, False, False]])
    np.testing.assert_array_equal(found[0, :3], anchors[[1, 2, 3]])
    one, _ = best_proposals(proposals, (3, 2), (HEIGHT, WIDTH), 1, 8)
    assert one.shape == (1, 2, 4)


def a_batch():
    """Two images with boxes, the second's last one padding, and masks that are the boxes."""
    random = np.random.default_rng(3)
    boxes, labels = random_boxes(random, 2, 3), np.array([[0, 2, 1], [1, 1, -1]], np.int32)
    x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)[..., None, None]
    y, x = np.arange(HEIGHT)[:, None] + 0.5, np.arange(WIDTH) + 0.5
    return boxes, labels, (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)


def anchors_of(strides=(8, 16)):
    cells = [box.retina_anchors(stride, octaves=1, scale=2.0) for stride in strides]
    grids = [(cell, HEIGHT // s, WIDTH // s, s) for cell, s in zip(cells, strides, strict=True)]
    return np.concatenate([box.grid_anchors(*grid) for grid in grids])


def proposal_losses(design, scores, deltas, boxes, labels, key=0):
    proposals = Proposals(scores, deltas, jnp.asarray(anchors_of()))
    return _proposal_losses(design, jax.random.key(key), proposals, boxes, labels, (HEIGHT, WIDTH))


def test_the_losses_of_proposals():
    boxes, labels, _ = a_batch()
    anchors = anchors_of()
    scores = np.zeros((2, len(anchors)), np.float32)
    coder = box.BoxCoder()
    chosen = [assign(anchors, b, n, 0.7, 0.3, True, 0.3) for b, n in zip(boxes, labels, strict=True)]
    right = np.stack([coder.targets(anchors, b, c) for b, c in zip(boxes, chosen, strict=True)])
    class_loss, box_loss = proposal_losses(SMALL, scores, right, boxes, labels)
    np.testing.assert_allclose([class_loss, box_loss], [math.log(2), 0], atol=1e-6)
    # Every fourth number is off by one half; all there are are drawn of those for a box (fewer than 16).
    positives = sum(int((c >= 0).sum()) for c in chosen)
    assert 0 < positives < 16
    class_loss, box_loss = proposal_losses(SMALL, scores, right + np.array([0, 0.5, 0, 0], np.float32), boxes, labels)
    np.testing.assert_allclose(box_loss, 0.5 * positives / 64, rtol=1e-5)
    # Right scores cost nothing.
    sure = np.stack([np.where(c >= 0, 20.0, -20.0) for c in chosen]).astype(np.float32)
    assert proposal_losses(SMALL, sure, right, boxes, labels)[0] < 1e-6


def test_anchors_beyond_the_edge_count_in_mask_rcnn_alone():
    boxes, labels, _ = a_batch()
    anchors = anchors_of()
    outside = (anchors[:, :2] < 0).any(1) | (anchors[:, 2] >= WIDTH) | (anchors[:, 3] >= HEIGHT)
    scores = np.tile(np.where(outside, 30.0, -30.0).astype(np.float32), (2, 1))  # costly wherever it is not ignored
    boxes[:] = [0, 0, 1, 1]  # that nothing overlaps
    zeros = np.zeros((2, len(anchors), 4), np.float32)
    assert proposal_losses(SMALL, scores, zeros, boxes, labels)[0] > 1
    inside = dataclasses.replace(SMALL, border_anchors=False)
    assert proposal_losses(inside, scores, zeros, boxes, labels)[0] < 1e-6


def test_padding_changes_nothing():
    boxes, labels, _ = a_batch()
    random = np.random.default_rng(0)
    number = len(anchors_of())
    scores, deltas = random.normal(size=(2, number)), random.normal(size=(2, number, 4))
    more = padded(boxes, 2, 7.0), padded(labels, 2, -1)
    design = dataclasses.replace(SMALL, sampled_anchors=8, sampled_regions=12)  # of which there are more
    losses = partial(proposal_losses, design, jnp.asarray(scores), jnp.asarray(deltas))
    np.testing.assert_array_equal(losses(*more), losses(boxes, labels))
    near = np.repeat(boxes, 6, axis=1) + random.normal(0, 2, (2, 18, 4)).astype(np.float32)
    found = jnp.asarray(np.concatenate([near, random_boxes(random, 2, 12)], 1))
    draw = partial(sample_regions, design, design.stages[0], jax.random.key(1), found, jnp.ones((2, 30), bool))
    one, other = draw(boxes, labels), draw(*more)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (one.chosen >= 0).sum() == 6 and (one.chosen == box.NEGATIVE).sum() == 18


# -------------------------------------------------------------------------------------------------------------- regions


def test_boxes_themselves_are_drawn_and_what_is_not_there_is_not():
    boxes, labels, _ = a_batch()
    found = np.stack([boxes[:, 0] + 1, boxes[:, 0] + 1, np.tile(np.float32([60, 40, 64, 48]), (2, 1))], 1)
    valid = np.array([[True, False, True], [False, False, True]])
    sampled = sample_regions(SMALL, SMALL.stages[0], jax.random.key(0), found, valid, boxes, labels)
    given = np.where(sampled.given & (sampled.chosen >= 0), sampled.chosen, -1)
    assert [sorted(row[row >= 0]) for row in given] == [[0, 1, 2], [0, 1]]
    np.testing.assert_array_equal((sampled.chosen >= 0).sum(axis=1), [4, 2])
    np.testing.assert_array_equal((sampled.chosen == box.NEGATIVE).sum(axis=1), [1, 1])
    own = np.asarray(sampled.given & (sampled.chosen >= 0))
    expected = np.take_along_axis(boxes, np.maximum(sampled.chosen, 0)[..., None], axis=1)
    np.testing.assert_array_equal(sampled.boxes[own], expected[own])


def test_the_best_region_is_a_box_s_in_mask_rcnn_though_it_overlaps_another_more():
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 18]]], np.float32)
    found, labels = np.array([[[0, 0, 10, 13]]], np.float32), np.array([[0, 1]])  # 10/13 and 13/18
    valid = np.ones((1, 1), bool)
    for design, expected in ((SMALL, 1), (CASCADE, 0)):
        sampled = sample_regions(design, design.stages[0], jax.random.key(0), found, valid, boxes, labels)
        assert sampled.chosen[~sampled.given & (sampled.chosen >= 0)].tolist() == [expected]


def hand_made():
    """One image's regions: one for box 1 (of class 2), one background, one that is not there."""
    boxes, labels = jnp.array([[[0.0, 0, 8, 8], [10, 10, 20, 30]]]), jnp.array([[0, 2]])
    sampled = Sampled(
        jnp.array([[[12.0, 12, 20, 28], [30, 30, 40, 40], [0, 0, 0, 0]]]),
        jnp.array([[1, box.NEGATIVE, box.IGNORED]]), jnp.zeros((1, 3), bool),
    )  # fmt: skip
    return boxes, labels, sampled


def test_the_losses_of_regions():
    boxes, labels, sampled = hand_made()
    stage = SMALL.stages[0]
    target = np.array([(15 - 16) / 8 / 0.1, 0, math.log(10 / 8) / 0.2, math.log(20 / 16) / 0.2])
    scores = jnp.log(jnp.array([[[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [1.0, 1, 1, 1]]]))
    deltas = np.full((1, 3, 3, 4), 100.0, np.float32)
    deltas[0, 0, 2] = target + np.array([1, 0.25, -2, 0.5])  # other classes' numbers do not count
    losses = jax.value_and_grad(
        lambda deltas: region_losses(SMALL, stage, sampled, scores, deltas, boxes, labels)[::-1], has_aux=True
    )
    (box_loss, class_loss), gradient = losses(jnp.asarray(deltas.reshape(1, 3, 12)))
    np.testing.assert_allclose(class_loss, -(math.log(0.3) + math.log(0.4)) / 2, rtol=1e-5)
    np.testing.assert_allclose(box_loss, 3.75 / 2, rtol=1e-5)
    assert np.flatnonzero(gradient).tolist() == [8, 9, 10, 11]
    # Of a cascade: one delta for all classes, errors below one by their squares.
    class_loss, box_loss = region_losses(CASCADE, stage, sampled, scores, jnp.asarray(deltas[:, :, 2]), boxes, labels)
    np.testing.assert_allclose(box_loss, (0.5 + 0.03125 + 1.5 + 0.125) / 2, rtol=1e-5)


def test_the_loss_of_masks():
    _, labels, sampled = hand_made()
    masks = np.zeros((1, 2, HEIGHT, WIDTH), bool)
    masks[0, 1, :20] = True  # the upper half of the region, from row 12 to 28
    logits = np.zeros((1, 3, 28, 28, 3), np.float32)
    loss = lambda logits: region_mask_loss(sampled, logits, labels, masks)  # noqa: E731
    np.testing.assert_allclose(loss(logits), math.log(2), rtol=1e-6)
    logits[0, 0, :, :, 2] = np.where(np.arange(28)[:, None] < 14, 30, -30)
    logits[0, :, :, :, :2] = 5.0
    assert loss(logits) < 1e-6
    np.testing.assert_allclose(loss(-logits), 30, rtol=1e-5)
    nothing = sampled._replace(chosen=jnp.full((1, 3), box.NEGATIVE))
    assert region_mask_loss(nothing, logits, labels, masks) == 0


def test_masks_are_cut_as_maps_are():
    random = np.random.default_rng(0)
    masks = random.uniform(size=(2, 30, 40)).astype(np.float32)
    found = jnp.array([[3.0, 2, 39, 25], [10, 10, 13, 12]])
    cut = cut_masks(jnp.asarray(masks), jnp.array([1, 0]), found, 7)
    read = jax.jit(roi_align, static_argnums=2)
    # RoIAlign reads the first map, of stride 4, by boxes four times as large.
    for one, region, mask in zip(cut, found, masks[::-1], strict=True):
        expected = read([jnp.asarray(mask)[..., None]], 4 * region[None], 7)[0, :, :, 0] >= 0.5
        np.testing.assert_array_equal(one, expected)


def test_cutting_and_pasting_gives_the_mask_back():
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    mask = ((x - 30) / 20) ** 2 + ((y - 24) / 14) ** 2 < 1
    found = jnp.array([[10.0, 10, 50, 38]])
    back = np.asarray(put_masks(cut_masks(jnp.asarray(mask)[None], jnp.array([0]), found, 28), found, HEIGHT, WIDTH))
    assert (back[0] & mask).sum() / (back[0] | mask).sum() > 0.95
    whole = put_masks(jnp.ones((1, 28, 28)), found, HEIGHT, WIDTH)[0]
    assert whole[10:38, 10:50].all() and int(whole.sum()) == 28 * 40


# -------------------------------------------------------------------------------------------------------------- network


def network(design=SMALL):
    model = MaskRCNN(Maps(), 3, 8, design)
    boxes, _, _ = a_batch()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, HEIGHT, WIDTH, 3)), jnp.float32)
    return model, random_parameters(model, images, jnp.asarray(boxes)), images


@pytest.fixture(scope="module")
def trained():
    """Losses and gradients of a network, compiled once: f(params, key, images, boxes, labels, masks)."""
    model, variables, images = network()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def losses(params, key, images, *targets):
        parts = model.apply({"params": params}, images, *targets, key, method="losses")
        return sum(part.sum() for part in parts), parts

    return losses, variables["params"], images


def test_no_box_at_all_gives_finite_gradients(trained):
    losses, params, images = trained
    boxes, labels, masks = a_batch()
    (total, parts), gradient = losses(params, jax.random.key(0), images, boxes, np.full_like(labels, -1), masks)
    assert np.isfinite(total) and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    assert parts.anchor_box == 0 and not parts.region_box.any() and not parts.mask.any() and parts.region_class[0] > 0


def test_every_parameter_learns_and_the_key_decides(trained):
    losses, params, images = trained
    (total, _), gradient = losses(params, jax.random.key(0), images, *a_batch())
    assert all(bool(jnp.isfinite(x).all() & jnp.any(x != 0)) for x in jax.tree.leaves(gradient))
    assert losses(params, jax.random.key(0), images, *a_batch())[0][0] == total
    assert losses(params, jax.random.key(1), images, *a_batch())[0][0] != total


def test_the_loss_falls_on_rectangles(trained):
    losses, params, _ = trained
    boxes, labels, masks = a_batch()
    colours = np.eye(3)[labels] * (labels >= 0)[..., None]
    images = jnp.asarray(np.einsum("bghw,bgc->bhwc", masks, colours), jnp.float32)
    optimizer = optax.adam(3e-3)
    state, values = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for step in range(30):
        (total, _), gradient = losses(params, jax.random.key(step), images, boxes, labels, masks)
        updates, state = update(gradient, state)
        params = jax.tree.map(jnp.add, params, updates)
        values.append(float(total))
    assert np.mean(values[-5:]) < 0.6 * np.mean(values[:5])


def test_a_cascade_refines_and_averages():
    model, variables, images = network(CASCADE)
    boxes, _, _ = a_batch()
    _, *stages = jax.jit(model.apply)(variables, images, boxes)
    assert [x.deltas.shape for x in stages] == [(2, 3, 4)] * 3
    np.testing.assert_array_equal(stages[0].boxes, boxes)
    for stage, one, following in zip(CASCADE.stages, stages, stages[1:], strict=False):
        deviations = np.array(stage.deviations, np.float32)
        size = one.boxes[..., 2:] - one.boxes[..., :2]
        centre = one.boxes[..., :2] + size / 2 + one.deltas[..., :2] * deviations[:2] * size
        size = size * np.exp(one.deltas[..., 2:] * deviations[2:])
        expected = np.clip(np.concatenate([centre - size / 2, centre + size / 2], -1), 0, [WIDTH, HEIGHT] * 2)
        np.testing.assert_allclose(following.boxes, expected, atol=1e-3)
        assert not np.allclose(following.boxes, one.boxes, atol=1e-2)


@pytest.mark.slow
def test_a_cascade_s_stages_lose_by_their_weights():
    model, variables, images = network(CASCADE)
    boxes, labels, masks = a_batch()

    @partial(jax.jit, static_argnums=0)
    def losses(model, params, *targets):
        def total(params):
            parts = model.apply({"params": params}, images, *targets, jax.random.key(0), method="losses")
            return sum(part.sum() for part in parts), parts

        return jax.grad(total, has_aux=True)(params)

    gradient, parts = losses(model, variables["params"], boxes, labels, masks)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    # Coarse levels have no anchors within so small an image; the heads have regions.
    heads = {name: part for name, part in gradient.items() if name.startswith("heads_")}
    assert len(heads) == 3 and all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(heads))
    plain = dataclasses.replace(CASCADE, stages=tuple(dataclasses.replace(x, weight=1.0) for x in CASCADE.stages))
    _, unweighted = losses(MaskRCNN(Maps(), 3, 8, plain), variables["params"], boxes, labels, masks)
    for part in ("region_class", "region_box", "mask"):
        np.testing.assert_allclose(
            getattr(parts, part), getattr(unweighted, part) * np.array([1, 0.5, 0.25]), rtol=1e-5
        )


@pytest.mark.slow
def test_what_is_trained_is_found():
    design = dataclasses.replace(MASK_RCNN, proposals=200, sampled_anchors=64, sampled_regions=128)
    model = MaskRCNN(Maps(), 3, 32, design)
    boxes, labels, masks = a_batch()
    images = jnp.asarray(np.einsum("bghw,bgc->bhwc", masks, np.eye(3)[labels] * (labels >= 0)[..., None]), jnp.float32)
    params = nn.meta.unbox(model.init(jax.random.key(0), images, jnp.asarray(boxes)))["params"]
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            parts = model.apply({"params": params}, images, boxes, labels, masks, key, method="losses")
            return sum(part.sum() for part in parts)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 600):
        params, state = step(params, state, key)
    found = jax.jit(lambda params: model.apply({"params": params}, images, method="detect"))(params)
    real, good = labels[0] >= 0, np.asarray(found.scores[0]) > 0.5  # the other image's boxes overlap
    shared = np.asarray(box.overlaps(jnp.asarray(boxes[0][real]), found.boxes[0][good]))
    same = labels[0][real][:, None] == np.asarray(found.classes[0][good])
    right = (shared > 0.5) & same
    assert right.shape == (3, 3) and (right.sum(0) == 1).all() and (right.sum(1) == 1).all()


def test_detections_are_in_order_and_inside():
    model, variables, images = network()
    found = jax.jit(lambda v: model.apply(v, images, method="detect"))(variables)
    assert found.masks.shape == (2, 100, 28, 28) and found.valid.any()
    assert ((found.boxes >= 0) & (found.boxes <= jnp.array([WIDTH, HEIGHT] * 2))).all() and (found.classes < 3).all()
    assert (jnp.diff(found.scores, axis=1) <= 0).all() and (found.scores[found.valid] > 0.05).all()
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


def test_without_masks_there_is_no_loss_of_masks():
    model, variables, images = network()
    boxes, labels, _ = a_batch()
    shapes = jax.eval_shape(
        lambda v: mask_rcnn.loss(model)(
            v["params"], {}, {"images": images, "boxes": boxes, "labels": labels}, {"dropout": jax.random.key(0)}, True
        ),
        variables,
    )
    assert set(shapes[1][1]) == {f"{name}_loss" for name in mask_rcnn.Losses._fields}
    jaxpr = str(
        jax.make_jaxpr(lambda v: model.apply(v, images, boxes, labels, None, jax.random.key(0), method="losses"))(
            variables
        )
    )
    assert "28,28" not in jaxpr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": np.zeros((2, 0, 4)), "labels": np.zeros((2, 0), int)}, "at least one an image"),
        ({"labels": np.zeros((2, 2), int)}, r"got \(2, 3, 4\) and \(2, 2\)"),
        ({"masks": np.zeros((2, 3, 8, 8))}, r"masks must be \(batch, boxes, height, width\)"),
    ],
)
def test_wrong_targets_say_so(change, message):
    model, variables, images = network()
    boxes, labels, masks = a_batch()
    targets = {"boxes": boxes, "labels": labels, "masks": masks} | change
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda v: model.apply(v, images, **targets, rng=jax.random.key(0), method="losses"), variables)


def test_wrong_designs_say_so():
    with pytest.raises(ValueError, match="stages must not be empty"):
        dataclasses.replace(SMALL, stages=())
    with pytest.raises(ValueError, match="sampled_regions must be at least 4, got 3"):
        dataclasses.replace(SMALL, sampled_regions=3)
    with pytest.raises(ValueError, match="num_classes and channels must be positive, got 0, 256"):
        mask_rcnn.DetectorConfig(Backbone(), 0)


# ------------------------------------------------------------------------------------------------------------- variants


# In millions, cut after the first digit.
PUBLISHED = {
    f"mask_rcnn_emov2_{size}": count for size, count in (("1m", 21.2), ("2m", 22.1), ("5m", 24.8), ("20m", 39.8))
}


def shapes_of(id):
    model = zoo.create(id)
    return model, jax.eval_shape(model.init, jax.random.key(0), **zoo.example_inputs(id, 1))


def assert_size(id, shapes):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert math.floor(count / 1e5) / 10 == PUBLISHED[id]


@pytest.mark.slow
@pytest.mark.parametrize("id", [id for id in PUBLISHED if id != "mask_rcnn_emov2_1m"])
def test_published_sizes(id):
    assert_size(id, shapes_of(id)[1])


@pytest.mark.parametrize("id", ["mask_rcnn_emov2_1m", "cascade_mask_rcnn_fcaformer_l2", "mask_rcnn_efficientformer_l1"])
def test_mmdetection_s_names_go_in_and_out(id):
    model, shapes = shapes_of(id)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), nn.meta.unbox(shapes))
    rules = registry.model(id).weight_rules(model.config)
    published = weights.to_published(variables, rules)
    back = names.convert(published, rules, shapes)
    assert jax.tree.structure(nn.meta.unbox(back)) == jax.tree.structure(variables)
    if id in PUBLISHED:
        assert_size(id, shapes)
    if id.startswith("cascade"):
        assert published["roi_head.bbox_head.2.fc_reg.weight"].shape == (4, 1024)
        assert published["roi_head.mask_head.1.conv_logits.weight"].shape == (80, 256, 1, 1)
    else:
        assert published["roi_head.bbox_head.fc_reg.weight"].shape == (320, 1024)
        assert published["roi_head.mask_head.convs.3.conv.weight"].shape == (256, 256, 3, 3)

"""Augmentations of images as timm's training of classifiers has them: functions of a numpy generator and an image.

Images are uint8 (height, width, 3) up to `standardise`, and float32 behind it. `Recipe` holds the published settings of
DeiT, which EfficientFormer, MobileViG and others train with; `train_batches` and `evaluation_batches` are pipelines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's pixels over 255
STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How training images are changed; the defaults are DeiT's."""

    # Least part of the image's area that is cropped out and resized; 1 leaves the whole.
    least_area: float = 0.08
    # Probability of a mirror image.
    flip: float = 0.5
    # Operations of RandAugment on an image; 0 uses colour jitter instead.
    operations: int = 2
    # RandAugment's mean strength, of 10.
    magnitude: float = 9.0
    # And its standard deviation.
    magnitude_std: float = 0.5
    # Largest change of brightness, contrast and saturation, where there is no RandAugment.
    colour_jitter: float = 0.4
    # Probability of replacing a rectangle by noise.
    erasing: float = 0.25
    # Parameter of mixup's beta distribution; 0 is no mixup.
    mixup: float = 0.8
    # Likewise of CutMix, which a batch gets instead with probability 0.5.
    cutmix: float = 1.0
    # Label smoothing.
    smoothing: float = 0.1
    # How often an epoch holds an image it holds, each time changed otherwise.
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")
        if not 0 < self.least_area <= 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"least_area must be in (0, 1] and smoothing in [0, 1), got {self}")
        if min(self.mixup, self.cutmix, self.operations) < 0 or self.repeats < 1:
            raise ValueError(f"mixup, cutmix and operations must not be negative, and repeats at least 1, got {self}")


def random_resized_crop(
    rng: np.random.Generator, image: np.ndarray, size: tuple[int, int], least_area: float = 0.08
) -> np.ndarray:
    """A crop of `least_area` to 1 of the area and 3/4 to 4/3 as wide as high, resized (bicubic) to `size`."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(least_area, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        rows, columns = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            return resize(image[top : top + rows, left : left + columns], size)
    # No crop fits: the largest one of an allowed shape, in the middle.
    columns, rows = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    top, left = (height - rows) // 2, (width - columns) // 2
    return resize(image[top : top + rows, left : left + columns], size)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic, antialiased, to (height, width)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def centre_crop(image: np.ndarray, size: tuple[int, int], part: float = 0.875) -> np.ndarray:
    """The middle of the image after its shorter side was resized to the size over `part`; for evaluation."""
    scale = max(size[0] / image.shape[0], size[1] / image.shape[1]) / part
    resized = resize(image, (round(image.shape[0] * scale), round(image.shape[1] * scale)))
    top, left = (resized.shape[0] - size[0]) // 2, (resized.shape[1] - size[1]) // 2
    return resized[top : top + size[0], left : left + size[1]]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    fill = tuple(int(255 * mean) for mean in MEAN)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, addend: int) -> Image.Image:
    return image.point([min(255, i + addend) if i < 128 else i for i in range(256)] * 3)


def _signed(rng: np.random.Generator, value: float) -> float:
    return value if rng.random() < 0.5 else -value


# Name -> (image, strength in [0, 1], rng) -> image; those of timm's "increasing" set.
OPERATIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "auto_contrast": lambda image, m, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, m, rng: ImageOps.equalize(image),
    "invert": lambda image, m, rng: ImageOps.invert(image),
    "rotate": lambda image, m, rng: image.rotate(
        _signed(rng, 30 * m), Image.Resampling.BICUBIC, fillcolor=tuple(int(255 * mean) for mean in MEAN)
    ),
    "posterize": lambda image, m, rng: ImageOps.posterize(image, max(4 - int(4 * m), 1)),
    "solarize": lambda image, m, rng: ImageOps.solarize(image, 256 - int(256 * m)),
    "solarize_add": lambda image, m, rng: _solarize_add(image, int(110 * m)),
    "colour": lambda image, m, rng: ImageEnhance.Color(image).enhance(max(0.1, 1 + _signed(rng, 0.9 * m))),
    "contrast": lambda image, m, rng: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + _signed(rng, 0.9 * m))),
    "brightness": lambda image, m, rng: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + _signed(rng, 0.9 * m))),
    "sharpness": lambda image, m, rng: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + _signed(rng, 0.9 * m))),
    "shear_x": lambda image, m, rng: _affine(image, 1, _signed(rng, 0.3 * m), 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: _affine(image, 1, 0, 0, _signed(rng, 0.3 * m), 1, 0),
    "translate_x": lambda image, m, rng: _affine(image, 1, 0, _signed(rng, 0.45 * m) * image.width, 0, 1, 0),
    "translate_y": lambda image, m, rng: _affine(image, 1, 0, 0, 0, 1, _signed(rng, 0.45 * m) * image.height),
}


def rand_augment(
    rng: np.random.Generator, image: np.ndarray, operations: int = 2, magnitude: float = 9.0, std: float = 0.5
) -> np.ndarray:
    """RandAugment (Cubuk et al. 2020) as in timm: each of the operations drawn is applied with probability one half.

    Args:
      rng: the generator.
      image: uint8 (height, width, 3).
      operations: how many are drawn, with replacement.
      magnitude: mean strength, of 10.
      std: its standard deviation.
    """
    picture = Image.fromarray(image)
    for name in rng.choice(list(OPERATIONS), operations):
        if rng.random() < 0.5:
            strength = np.clip(rng.normal(magnitude, std), 0, 10) / 10
            picture = OPERATIONS[name](picture, float(strength), rng)
    return np.asarray(picture)


def colour_jitter(rng: np.random.Generator, image: np.ndarray, strength: float = 0.4) -> np.ndarray:
    """Brightness, contrast and saturation, in random order, each times 1 - strength to 1 + strength."""
    picture = Image.fromarray(image)
    enhancements = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in rng.permutation(3):
        picture = enhancements[index](picture).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
    return np.asarray(picture)


def standardise(image: np.ndarray) -> np.ndarray:
    """uint8 to float32: (image / 255 - mean) / std of ImageNet."""
    return (image.astype(np.float32) / 255 - MEAN) / STD


def random_erasing(rng: np.random.Generator, image: np.ndarray, probability: float = 0.25) -> np.ndarray:
    """A rectangle of 2 % to a third of a standardised image replaced by normal noise (Zhong et al. 2020)."""
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
            image = image.copy()
            noise = rng.standard_normal((rows, columns, channels), dtype=np.float32)
            image[top : top + rows, left : left + columns] = noise
            return image
    return image


def mix(
    rng: np.random.Generator,
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    smoothing: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with its own reverse, one of them for all.

    Args:
      rng: the generator.
      images: float (B, height, width, channels).
      labels: (B,) classes.
      classes: how many there are.
      mixup, cutmix: parameters of the beta distributions of the share; with both, one is drawn; 0 is neither.
      smoothing: of the labels, before they are mixed.

    Returns:
      Images, and float32 probabilities (B, classes).
    """
    targets = np.full((len(labels), classes), smoothing / classes, np.float32)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    if not (mixup or cutmix):
        return images, targets
    cut = bool(cutmix) and (not mixup or rng.random() < 0.5)
    share = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
    if cut:
        height, width = images.shape[1:3]
        side = math.sqrt(1 - share)
        middle, extent = (rng.integers(height), rng.integers(width)), (int(height * side), int(width * side))
        (top, bottom), (left, right) = (
            (max(m - e // 2, 0), min(m + e // 2, n)) for m, e, n in zip(middle, extent, (height, width), strict=True)
        )
        images = images.copy()
        images[:, top:bottom, left:right] = images[::-1, top:bottom, left:right].copy()
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = (share * images + (1 - share) * images[::-1]).astype(images.dtype)
    return images, (share * targets + (1 - share) * targets[::-1]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Change(grain.transforms.RandomMap):
    recipe: Recipe
    size: tuple[int, int]

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        recipe, image = self.recipe, element["image"]
        if recipe.least_area < 1:
            image = random_resized_crop(rng, image, self.size, recipe.least_area)
        image = resize(image, self.size)
        if rng.random() < recipe.flip:
            image = image[:, ::-1]
        if recipe.operations:
            image = rand_augment(rng, image, recipe.operations, recipe.magnitude, recipe.magnitude_std)
        elif recipe.colour_jitter:
            image = colour_jitter(rng, image, recipe.colour_jitter)
        image = random_erasing(rng, standardise(image), recipe.erasing)
        return {"images": image, "labels": np.int32(element["label"])}


@dataclasses.dataclass(frozen=True)
class _Mix(grain.transforms.RandomMap):
    recipe: Recipe
    classes: int

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        recipe = self.recipe
        images, labels = mix(
            rng, element["images"], element["labels"], self.classes, recipe.mixup, recipe.cutmix, recipe.smoothing
        )
        return {**element, "images": images, "labels": labels}


class RepeatedAugmentation(grain.MapDataset):
    """Each item `repeats` times in a row (Hoffer et al. 2020), and of that the first part, as long as the parent is.

    DeiT's sampler: an epoch sees a third of the items, and shuffles before it repeats. Its length is rounded down to a
    multiple of 256 where there are as many.
    """

    def __init__(self, parent: grain.MapDataset, repeats: int = 3) -> None:
        super().__init__(parent)
        self._repeats = repeats

    def __len__(self) -> int:
        return len(self._parent) // 256 * 256 or len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[epoch * len(self._parent) + place // self._repeats]


def train_batches(
    source: Any, size: tuple[int, int], batch_size: int, classes: int, recipe: Recipe, seed: int
) -> grain.MapDataset:
    """Endless shuffled batches {"images": (B, height, width, 3), "labels": (B, classes) probabilities}.

    Args:
      source: random access to {"image": uint8 (height, width, 3), "label": int}, such as `zoo.data.images` and
        `zoo.data.tfds` give.
      size: height and width of the batches' images.
      batch_size: even, if images are mixed.
      classes: number of labels.
      recipe: what is done to them.
      seed: of everything random.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batch_size must be between 1 and the {len(source)} items, got {batch_size}")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
    if recipe.repeats > 1:
        dataset = RepeatedAugmentation(dataset, recipe.repeats)
    dataset = dataset.repeat().random_map(_Change(recipe, size)).batch(batch_size, drop_remainder=True)
    return dataset.random_map(_Mix(recipe, classes))


def evaluation_batches(source: Any, size: tuple[int, int], batch_size: int, part: float = 0.875) -> grain.MapDataset:
    """All items once, in order: {"images": (B, height, width, 3), "labels": (B,)}; the last batch may be smaller.

    Args:
      source, size, batch_size: as of `train_batches`.
      part: see `centre_crop`; of images that are of the size already, the whole is taken.
    """

    def arrange(element: Any) -> Any:
        image = element["image"]
        image = image if image.shape[:2] == size else centre_crop(image, size, part)
        return {"images": standardise(image), "labels": np.int32(element["label"])}

    return grain.MapDataset.source(source).map(arrange).batch(batch_size)

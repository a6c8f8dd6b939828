"""Small sets of real images for classification: photographs of hands from a folder, and scikit-learn's digits."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
from typing import Any, Literal

import numpy as np
from PIL import Image

from zoo.data.tfds import array_record_source

ImageSet = Literal["sign_digits", "digits", "imagenet2012"]


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Random access to {"image": uint8 (height, width, 3), "label": int}."""

    images: np.ndarray  # uint8 (N, height, width, 3)
    labels: np.ndarray  # (N,)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 (N, height, width, 3) and N labels, got {self.images.dtype} {self.images.shape} "
                f"and {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A training and a test set of `classes` classes."""

    name: str
    classes: int
    train: LabelledImages
    test: LabelledImages


def sign_digits(folder: str | pathlib.Path) -> ImageData:
    """Photographs of hands that show the digits 0 to 9: 1662 for training and 400 for testing, 64 x 64 pixels.

    "Sign Language Digits Dataset", Arda Mavi and Zeynep Dikle, Turkey Ankara Ayranci Anadolu High School, Apache-2.0.

    Args:
      folder: holds sign_digits.npz: `jpeg` (all files one after another), `offsets`, `label` and `split` (1 is test).

    Raises:
      FileNotFoundError, ValueError: the file is not there, or not what it should be.
    """
    path = pathlib.Path(folder) / "sign_digits.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of sign_digits.npz")
    with np.load(path) as file:
        missing = {"jpeg", "offsets", "label", "split"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}")
        data, offsets, labels, split = (file[name] for name in ("jpeg", "offsets", "label", "split"))
    pictures = [Image.open(io.BytesIO(data[a:b].tobytes())) for a, b in itertools.pairwise(offsets)]
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    train, test = (LabelledImages(images[split == part], labels[split == part]) for part in (0, 1))
    return ImageData("sign_digits", 10, train, test)


def handwritten_digits(size: int = 32) -> ImageData:
    """Scikit-learn's 1797 handwritten digits of 8 x 8 pixels, enlarged to `size`; the last 400 are for testing.

    "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998.

    Raises ModuleNotFoundError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come inside scikit-learn: pip install 'zoo[demo]'") from error
    digits = load_digits()
    gray = (digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in gray]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    cut = 1397
    return ImageData(
        "digits",
        10,
        LabelledImages(images[:cut], digits.target[:cut]),
        LabelledImages(images[cut:], digits.target[cut:]),
    )


def load_images(name: ImageSet, data_dir: pathlib.Path | None, size: int) -> ImageData:
    """A set by name: "digits" come inside scikit-learn, enlarged to `size`; the others lie in `folder_of`.

    Raises ValueError, FileNotFoundError or ModuleNotFoundError where they are not there.
    """
    if name == "digits":
        return handwritten_digits(size)
    folder = folder_of(name, data_dir)
    if name == "sign_digits":
        return sign_digits(folder)
    parts: Any = [array_record_source("imagenet2012", split, folder) for split in ("train", "validation")]
    return ImageData("imagenet2012", 1000, *parts)


def folder_of(name: str, data_dir: pathlib.Path | None) -> pathlib.Path:
    """Where a set's files lie: in data_dir, or in a folder of the set's name below it, but for what TFDS prepared.

    Raises ValueError without a data_dir.
    """
    if data_dir is None:
        raise ValueError(f"{name} is not part of the zoo: give --data-dir, the folder that holds it")
    below = data_dir / name
    return below if below.is_dir() and name != "imagenet2012" else data_dir

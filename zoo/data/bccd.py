"""Photographs of blood smears with boxes of cells: a small real set for detection."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

CLASSES = ("red cell", "white cell", "platelet")


@dataclasses.dataclass(frozen=True)
class LabelledBoxes:
    """Random access to {"image": uint8 (height, width, 3), "boxes": float32 (G, 4), "labels": int32 (G,)}.

    Boxes are (x0, y0, x1, y1) in pixels; all images have the same G, what is padding has label -1.
    """

    images: np.ndarray  # uint8 (N, height, width, 3)
    boxes: np.ndarray  # float32 (N, G, 4)
    labels: np.ndarray  # int32 (N, G)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "boxes": self.boxes[index], "labels": self.labels[index]}


class DetectionData(NamedTuple):
    """Images for training, validation and testing."""

    train: LabelledBoxes
    validation: LabelledBoxes
    test: LabelledBoxes


def bccd(folder: str | pathlib.Path) -> DetectionData:
    """364 photographs of blood smears, 240 x 320 pixels, with boxes of the three `CLASSES`.

    "BCCD Dataset", Shenggan and cosmicad, MIT licence. The annotators missed some cells, mostly overlapping red ones.

    Args:
      folder: holds bccd.npz: `jpeg` (all files one after another), `offsets`, `split` (0, 1, 2), `box`, `box_label` and
        `box_image`.

    Raises:
      FileNotFoundError, ValueError: the file is not there, or not what it should be.
    """
    path = pathlib.Path(folder) / "bccd.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of bccd.npz")
    with np.load(path) as file:
        missing = {"jpeg", "offsets", "split", "box", "box_label", "box_image"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}")
        data, offsets, split = (file[name] for name in ("jpeg", "offsets", "split"))
        box, label, owner = (file[name] for name in ("box", "box_label", "box_image"))
    pictures = [Image.open(io.BytesIO(data[a:b].tobytes())) for a, b in itertools.pairwise(offsets)]
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    most = int(np.bincount(owner).max())
    boxes = np.zeros((len(images), most, 4), np.float32)
    labels = np.full((len(images), most), -1, np.int32)
    for index in range(len(images)):
        own = owner == index
        boxes[index, : own.sum()], labels[index, : own.sum()] = box[own], label[own]
    parts = (split == part for part in (0, 1, 2))
    return DetectionData(*(LabelledBoxes(images[part], boxes[part], labels[part]) for part in parts))

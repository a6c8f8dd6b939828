"""Questions about pictures whose answers are pixels: cells of blood smears, and handwritten digits on a canvas.

A question is a vector: `hashed_sentences` stands in for a sentence encoder where no weights of one are at hand
(`zoo.backbones.sentence_encoder` is one, for those who have).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from zoo.data.bccd import CLASSES, LabelledBoxes
from zoo.data.images import handwritten_digits

Encoder = Callable[[Sequence[str]], np.ndarray]

# The last two of each are kept for testing.
CELL_QUESTIONS = {
    "red cell": (
        "where are the red cells?", "show the red blood cells", "mark every red cell in the picture",
        "which pixels are red blood cells?", "find all of the red cells",
    ),
    "white cell": (
        "where are the white cells?", "show the white blood cell", "mark every white cell in the picture",
        "which pixels are white blood cells?", "find all of the white cells",
    ),
    "platelet": (
        "where are the platelets?", "show the blood platelets", "mark every platelet in the picture",
        "which pixels are platelets?", "find all of the platelets",
    ),
}  # fmt: skip
HELD_OUT = 2
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_QUESTIONS = ("where is the {}?", "show every {}", "mark the {}", "which pixels are the {}?", "find the {}")
RELATIONAL_QUESTIONS = (
    "which digit is left of the {}?", "show what is left of the {}", "mark the digit left of the {}",
    "which pixels are left of the {}?", "find the digit left of the {}",
)  # fmt: skip


def hashed_sentences(sentences: Sequence[str], features: int = 384) -> np.ndarray:
    """Sentences as vectors of length 1, float32 (sentences, features): words and trigrams of letters, hashed.

    Each word, and each three letters in a row of a word with its ends marked, adds or takes 1 at a place that its
    checksum says (a trigram half as much). Sentences that share words are near each other. A stand-in for a trained
    encoder, and the same on every machine.
    """
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    vectors = np.zeros((len(sentences), features), np.float32)
    for vector, sentence in zip(vectors, sentences, strict=True):
        for word in re.findall(r"\w+", sentence.lower()):
            marked = f"<{word}>"
            parts = [(word, 1.0), *((marked[i : i + 3], 0.5) for i in range(len(marked) - 2))]
            for part, weight in parts:
                code = zlib.crc32(part.encode())
                vector[(code >> 1) % features] += weight if code & 1 else -weight
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Questions:
    """Random access to {"image": uint8 (H, W, 3), "text": float32 (phrasings, E), "mask": bool (H, W), "kind": int}.

    An item is one question about one picture, in all its phrasings.
    """

    images: np.ndarray  # uint8 (N, H, W, 3)
    masks: np.ndarray  # bool (items, H, W), the evidence
    owner: np.ndarray  # (items,), the picture of each item
    kind: np.ndarray  # (items,), what is asked for
    vectors: np.ndarray  # float32 (kinds, phrasings, E)

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        kind = int(self.kind[index])
        return {
            "image": self.images[self.owner[index]], "mask": self.masks[index], "kind": kind,
            "text": self.vectors[kind],
        }  # fmt: skip


def cell_questions(
    data: LabelledBoxes, size: tuple[int, int], phrasings: slice, encode: Encoder = hashed_sentences
) -> Questions:
    """For each picture and each kind of cell in it: where are they? The evidence are the ellipses in the boxes.

    Args:
      data: of `zoo.data.bccd.bccd`.
      size: height and width that pictures get.
      phrasings: which of `CELL_QUESTIONS`' phrasings, `slice(None, -HELD_OUT)` for training.
      encode: sentences to vectors.
    """
    height, width = size
    images = np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in data.images])
    scale = np.array([width, height, width, height]) / np.array([*data.images.shape[2:0:-1]] * 2)
    masks, owner, kind = [], [], []
    for index, (boxes, labels) in enumerate(zip(data.boxes * scale, data.labels, strict=True)):
        for number in range(len(CLASSES)):
            if (labels == number).any():
                masks.append(ellipses(boxes[labels == number], height, width))
                owner.append(index)
                kind.append(number)
    vectors = np.stack([encode(CELL_QUESTIONS[name][phrasings]) for name in CLASSES])
    return Questions(images, np.stack(masks), np.array(owner), np.array(kind), vectors)


def ellipses(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool (height, width): the pixels whose middle is inside an ellipse that touches its box's sides, (boxes, 4)."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        if x1 > x0 and y1 > y0:
            inside |= ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return inside


def digit_questions(
    count: int, phrasings: slice, seed: int, *, part: str = "train", relational: bool = False, size: int = 96,
    encode: Encoder = hashed_sentences,
) -> Questions:  # fmt: skip
    """Canvases with three to six different handwritten digits in a grid of 3 x 3 cells, and scraps of others.

    One question a canvas: where one of its digits is, or (`relational`) what is to the left of one of them. The
    evidence are the pixels of the digit's square.

    Args:
      count: canvases.
      phrasings: which of `DIGIT_QUESTIONS` or `RELATIONAL_QUESTIONS`.
      seed: of what is where.
      part: "train" or "test", whose digits differ.
      relational: see above.
      size: height and width in pixels, a multiple of 3.
      encode: sentences to vectors.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part must be 'train' or 'test', got {part!r}")
    if size % 3 or size < 24:
        raise ValueError(f"size must be a multiple of 3 and at least 24, got {size}")
    cell = size // 3
    side = cell * 3 // 4
    digits = getattr(handwritten_digits(side), part)
    rng = np.random.default_rng(seed)
    images = np.zeros((count, size, size, 3), np.uint8)
    masks, kinds = np.zeros((count, size, size), bool), np.zeros(count, int)
    for image, mask, index in zip(images, masks, range(count), strict=True):
        for _ in range(6):  # scraps: a third of a digit
            scrap = digits.images[rng.integers(len(digits))][: side // 3, : side // 3]
            top, left = rng.integers(0, size - side // 3, 2)
            image[top : top + side // 3, left : left + side // 3] = scrap
        number = rng.integers(3, 7)
        cells = np.sort(rng.permutation(9)[:number])
        if relational and not any(c + 1 in cells and c % 3 < 2 for c in cells):
            cells = np.union1d(cells[2:], [3, 4])
        named = rng.permutation(10)[: len(cells)]
        corners = {}
        for place, name in zip(cells, named, strict=True):
            top, left = np.array(divmod(place, 3)) * cell + rng.integers(0, cell - side + 1, 2)
            image[top : top + side, left : left + side] = digits.images[
                rng.choice(np.flatnonzero(digits.labels == name))
            ]
            corners[int(place)] = (top, left)
        askable = [c for c in corners if not relational or (c % 3 > 0 and c - 1 in corners)]
        asked = askable[rng.integers(len(askable))]
        top, left = corners[asked - relational]
        mask[top : top + side, left : left + side] = True
        kinds[index] = named[list(cells).index(asked)]
    templates = (RELATIONAL_QUESTIONS if relational else DIGIT_QUESTIONS)[phrasings]
    vectors = np.stack([encode([template.format(name) for template in templates]) for name in _NUMBERS])
    return Questions(images, masks, np.arange(count), kinds, vectors)

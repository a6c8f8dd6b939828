"""Colored Objects: after one solved example, which colour has the object that is asked for?

    Q: On the table, I see an orange textbook, a red puzzle, and a purple cup. What color is the textbook?
    A: Orange
    Q: On the floor, there is a blue pencil, a black necklace, and a yellow lighter. What color is the pencil?
    A:

Merullo et al. 2023 (github.com/jmerullo/circuit_reuse, MIT), after a task of BIG-bench. Answers are capitalised.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from zoo.errors import unknown

SURFACES = ("table", "desk", "floor")
STARTS = ("there is", "you see", "I see")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
OBJECTS = (
    "pencil", "notebook", "pen", "cup", "plate", "jug", "mug", "puzzle", "textbook", "leash", "necklace", "bracelet",
    "bottle", "ball", "envelope", "lighter", "bowl",
)  # fmt: skip
CHANGES = ("object", "color", "invalid")


@dataclasses.dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
      surface, start: how it begins.
      objects, colors: of the things named, each different within a question.
      query_idx: index of the object that is asked for.
      invalid_obj: an object that is asked for in its stead though it is not there, or None.

    Raises:
      ValueError: objects and colours are not as many, occur twice, or the query is not one of them.
    """

    surface: str
    start: str
    objects: tuple[str, ...]
    colors: tuple[str, ...]
    query_idx: int
    invalid_obj: str | None = None

    def __post_init__(self) -> None:
        if not len(self.objects) == len(self.colors) == len(set(self.objects)) == len(set(self.colors)) > 1:
            raise ValueError(f"objects and colours must be as many, at least two: {self.objects}, {self.colors}")
        if not 0 <= self.query_idx < len(self.objects):
            raise ValueError(f"query_idx must be in 0 .. {len(self.objects) - 1}, got {self.query_idx}")
        if self.invalid_obj in self.objects:
            raise ValueError(f"invalid_obj {self.invalid_obj!r} is there")

    @property
    def question(self) -> str:
        """The text from "Q:" to "A:"."""
        things = [f"{_article(color)} {color} {thing}" for color, thing in zip(self.colors, self.objects, strict=True)]
        listed = " and ".join(things) if len(things) == 2 else ", ".join([*things[:-1], f"and {things[-1]}"])
        asked = self.invalid_obj or self.objects[self.query_idx]
        return f"Q: On the {self.surface}, {self.start} {listed}. What color is the {asked}?\nA:"

    @property
    def label(self) -> str:
        """The answer with its space, such as " Orange"."""
        return f" {self.colors[self.query_idx].capitalize()}"

    @property
    def wrong(self) -> tuple[str, ...]:
        """The other colours of the question, as answers."""
        return tuple(f" {color.capitalize()}" for i, color in enumerate(self.colors) if i != self.query_idx)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclasses.dataclass(frozen=True)
class NShotPrompt:
    """Solved examples, and a question.

    Attributes:
      shots: the solved ones.
      test: the one to answer.
    """

    shots: tuple[Example, ...]
    test: Example

    @property
    def text(self) -> str:
        """The prompt, without an answer."""
        return "".join(f"{shot.question}{shot.label}\n" for shot in self.shots) + self.test.question

    @property
    def label(self) -> str:
        """The answer, with its space."""
        return self.test.label

    def color_positions(self, tokenizer: Any) -> list[tuple[str, int]]:
        """(answer, such as " Orange", and position of its last token) of every colour in the prompt, also of answers.

        The last ones, as many as the test question has objects, are the question's.
        """
        text, words = self.text, "|".join([*COLORS, *map(str.capitalize, COLORS)])
        return [
            (f" {match[0].capitalize()}", len(tokenizer.encode(text[: match.end()])) - 1)
            for match in re.finditer(rf"\b({words})\b", text)
        ]


def generate(count: int, *, shots: int = 1, things: int = 3, seed: int = 0) -> list[NShotPrompt]:
    """Draws prompts.

    Args:
      count: number of them.
      shots: solved examples before the question.
      things: objects a question names.
      seed: of the draws.

    Raises:
      ValueError: a number is out of range.
    """
    if count < 1 or shots < 0 or not 2 <= things <= len(COLORS):
        raise ValueError(
            f"count must be positive, shots not negative, things in 2 .. {len(COLORS)}, got {count}, {shots}, {things}"
        )
    rng = np.random.default_rng(seed)

    def draw() -> Example:
        objects = tuple(OBJECTS[i] for i in rng.choice(len(OBJECTS), things, replace=False))
        colors = tuple(COLORS[i] for i in rng.choice(len(COLORS), things, replace=False))
        start = STARTS[rng.integers(len(STARTS))]
        return Example(SURFACES[rng.integers(len(SURFACES))], start, objects, colors, int(rng.integers(things)))

    return [NShotPrompt(tuple(draw() for _ in range(shots)), draw()) for _ in range(count)]


def parse(text: str) -> NShotPrompt:
    """The prompt of a text as `NShotPrompt.text` gives it.

    Raises ValueError where it is none, or a solved example's answer is wrong.
    """
    blocks = re.findall(r"(Q: .+?\?\nA:)(?:( \w+)\n|$)", text)
    if not blocks or "".join(question + (f"{answer}\n" if answer else "") for question, answer in blocks) != text:
        raise ValueError(f"not a prompt of Colored Objects: {text!r}")
    examples = [_parse_question(question) for question, _ in blocks]
    for example, (_, answer) in zip(examples[:-1], blocks[:-1], strict=True):
        if answer != example.label:
            raise ValueError(f"the answer of {example.question!r} is {example.label!r}, the text says {answer!r}")
    if blocks[-1][1]:
        raise ValueError("a prompt ends with a question that has no answer")
    return NShotPrompt(tuple(examples[:-1]), examples[-1])


def _parse_question(question: str) -> Example:
    starts = "|".join(STARTS)
    match = re.fullmatch(rf"Q: On the (\w+), ({starts}) (.+)\. What color is the (\w+)\?\nA:", question)
    things = re.findall(r"(?:^|, and |, | and )an? (\w+) (\w+)", match[3]) if match else []
    if match is None or not things:
        raise ValueError(f"not a question of Colored Objects: {question!r}")
    colors, objects = (tuple(part) for part in zip(*things, strict=True))
    asked, known = match[4], match[4] in objects
    example = Example(
        match[1], match[2], objects, colors, objects.index(asked) if known else 0, None if known else asked
    )
    if example.question != question:
        raise ValueError(f"not a question of Colored Objects: {question!r}")
    return example


def min_pairs(
    prompt: NShotPrompt, change: Literal["object", "color", "invalid"] = "object", *, rng: np.random.Generator
) -> NShotPrompt:
    """A prompt whose test question differs in one word.

    Args:
      prompt: to change.
      change: "object" asks for another of its objects (the published "mindiff"), "color" gives the object that is asked
        for a new colour, "invalid" asks for an object that is not there.
      rng: of the draw.

    Raises:
      ValueError: the change is unknown.
    """
    test = prompt.test
    if change == "object":
        others = [index for index in range(len(test.objects)) if index != test.query_idx]
        new = dataclasses.replace(test, query_idx=others[rng.integers(len(others))])
    elif change == "color":
        free = [color for color in COLORS if color not in test.colors]
        colors = list(test.colors)
        colors[test.query_idx] = free[rng.integers(len(free))]
        new = dataclasses.replace(test, colors=tuple(colors))
    elif change == "invalid":
        absent = [thing for thing in OBJECTS if thing not in test.objects]
        new = dataclasses.replace(test, invalid_obj=absent[rng.integers(len(absent))])
    else:
        raise unknown("change", change, CHANGES)
    return dataclasses.replace(prompt, test=new)

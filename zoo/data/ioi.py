"""Indirect object identification: who is given something? (Wang et al. 2023, "Interpretability in the Wild".)

"Then, Rebecca and Amy went to the store. Rebecca gave a ring to" - Amy, the indirect object (IO), and not Rebecca, the
subject (S), whose first and second mention are S1 and S2. Sentences, names, places and things are those of the
published data set (github.com/redwoodresearch/Easy-Transformer, MIT).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from zoo.errors import unknown

# 0, 1 and 2 are the names in the order of their mention; the last is the subject's second.
TEMPLATES = (
    "Then, {0} and {1} went to the {place}. {2} gave a {object} to",
    "Then, {0} and {1} had a lot of fun at the {place}. {2} gave a {object} to",
    "Then, {0} and {1} were working at the {place}. {2} decided to give a {object} to",
    "Then, {0} and {1} were thinking about going to the {place}. {2} wanted to give a {object} to",
    "Then, {0} and {1} had a long argument, and afterwards {2} said to",
    "After {0} and {1} went to the {place}, {2} gave a {object} to",
    "When {0} and {1} got a {object} at the {place}, {2} decided to give it to",
    "When {0} and {1} got a {object} at the {place}, {2} decided to give the {object} to",
    "While {0} and {1} were working at the {place}, {2} gave a {object} to",
    "While {0} and {1} were commuting to the {place}, {2} gave a {object} to",
    "After the lunch, {0} and {1} went to the {place}. {2} gave a {object} to",
    "Afterwards, {0} and {1} went to the {place}. {2} gave a {object} to",
    "Then, {0} and {1} had a long argument. Afterwards {2} said to",
    "The {place} {0} and {1} went to had a {object}. {2} gave it to",
    "Friends {0} and {1} found a {object} at the {place}. {2} gave it to",
)
NAMES = (
    "Michael", "Christopher", "Jessica", "Matthew", "Ashley", "Jennifer", "Joshua", "Amanda", "Daniel", "David",
    "James", "Robert", "John", "Joseph", "Andrew", "Ryan", "Brandon", "Jason", "Justin", "Sarah", "William", "Jonathan",
    "Stephanie", "Brian", "Nicole", "Nicholas", "Anthony", "Heather", "Eric", "Elizabeth", "Adam", "Megan", "Melissa",
    "Kevin", "Steven", "Thomas", "Timothy", "Christina", "Kyle", "Rachel", "Laura", "Lauren", "Amber", "Brittany",
    "Danielle", "Richard", "Kimberly", "Jeffrey", "Amy", "Crystal", "Michelle", "Tiffany", "Jeremy", "Benjamin", "Mark",
    "Emily", "Aaron", "Charles", "Rebecca", "Jacob", "Stephen", "Patrick", "Sean", "Erin", "Jamie", "Kelly", "Samantha",
    "Nathan", "Sara", "Dustin", "Paul", "Angela", "Tyler", "Scott", "Katherine", "Andrea", "Gregory", "Erica", "Mary",
    "Travis", "Lisa", "Kenneth", "Bryan", "Lindsey", "Kristen", "Jose", "Alexander", "Jesse", "Katie", "Lindsay",
    "Shannon", "Vanessa", "Courtney", "Christine", "Alicia", "Cody", "Allison", "Bradley", "Samuel",
)  # fmt: skip
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")

Kind = Literal["mixed", "ABBA", "BABA"]
FLIPS = (("S2", "IO"), ("S2", "RAND"), ("IO", "RAND"), ("S1", "RAND"))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and its two answers.

    Attributes:
      template: index into `TEMPLATES`.
      names: in the order of their mention.
      io, subject: the right and the wrong answer; a flipped prompt keeps those of the prompt it was made of.
      place, object: what the template names; an entry it does not name is of no effect.
    """

    template: int
    names: tuple[str, str, str]
    io: str
    subject: str
    place: str
    object: str

    @property
    def text(self) -> str:
        """The prompt, without an answer."""
        return TEMPLATES[self.template].format(*self.names, place=self.place, object=self.object)

    @property
    def answers(self) -> tuple[str, str]:
        """Right and wrong answer as they would follow, each with its space."""
        return f" {self.io}", f" {self.subject}"

    @property
    def order(self) -> Literal["ABBA", "BABA"]:
        """Whether the first clause names the indirect object (A) or the subject (B) first."""
        return "BABA" if self.names[0] == self.subject else "ABBA"

    def token_positions(self, tokenizer: Any) -> dict[str, int]:
        """Positions of "IO", "S1" and "S2" (their last tokens) and "END" among the prompt's tokens.

        Names are taken from the places that an unflipped prompt has them at.
        """
        roles = ("S1", "IO", "S2") if self.order == "BABA" else ("IO", "S1", "S2")
        parts = re.split(r"\{[012]\}", TEMPLATES[self.template])
        found, text = {}, ""
        for role, part, name in zip(roles, parts, self.names, strict=False):
            text += part.format(place=self.place, object=self.object) + name
            found[role] = len(tokenizer.encode(text)) - 1
        return found | {"END": len(tokenizer.encode(self.text)) - 1}


def single_token(words: Iterable[str], tokenizer: Any) -> list[str]:
    """The words that are one token when a space stands before them."""
    return [word for word in words if len(tokenizer.encode(f" {word}")) == 1]


def generate(
    count: int, tokenizer: Any = None, *, kind: Kind = "mixed", seed: int = 0, names: Sequence[str] = NAMES
) -> list[Prompt]:
    """Draws prompts.

    Args:
      count: number of them.
      tokenizer: leaves out names that are not one of its tokens; None takes all.
      kind: "ABBA" or "BABA" (see `Prompt.order`), or "mixed", both in turn.
      seed: of the draws.
      names: to draw from.

    Raises:
      ValueError: the count is not positive, the kind unknown, or fewer than two names are single tokens.
    """
    if count < 1:
        raise ValueError(f"count must be positive, got {count}")
    if kind not in ("mixed", "ABBA", "BABA"):
        raise unknown("kind", kind, ("mixed", "ABBA", "BABA"))
    names = list(names) if tokenizer is None else single_token(names, tokenizer)
    if len(names) < 2:
        raise ValueError(f"two names that are single tokens are needed, there are {len(names)}")
    rng, prompts = np.random.default_rng(seed), []
    for index in range(count):
        io, subject = (names[i] for i in rng.choice(len(names), 2, replace=False))
        order = ("BABA", "ABBA")[index % 2] if kind == "mixed" else kind
        mentions = (subject, io, subject) if order == "BABA" else (io, subject, subject)
        template, place, thing = (int(rng.integers(len(choices))) for choices in (TEMPLATES, PLACES, OBJECTS))
        prompts.append(Prompt(template, mentions, io, subject, PLACES[place], OBJECTS[thing]))
    return prompts


def flip(
    prompt: Prompt, change: tuple[str, str] = ("S2", "IO"), *, rng: np.random.Generator | None = None,
    names: Sequence[str] = NAMES,
) -> Prompt:  # fmt: skip
    """A prompt with one mention of a name replaced; the answers stay.

    Args:
      prompt: not flipped yet.
      change: one of `FLIPS`: which mention, and whether the indirect object's name takes its place or another one.
      rng: draws the other name.
      names: to draw it from.

    Raises:
      ValueError: the change is unknown, or a name is to be drawn without `rng`.
    """
    if tuple(change) not in FLIPS:
        raise ValueError(f"change must be one of {FLIPS}, got {change}")
    mention, source = change
    if source == "RAND" and rng is None:
        raise ValueError(f"{change} draws a name, and needs rng")
    first = ("S1", "IO") if prompt.order == "BABA" else ("IO", "S1")
    place = (*first, "S2").index(mention)
    new = prompt.io
    if source == "RAND":
        others = [name for name in names if name not in prompt.names]
        new = others[rng.integers(len(others))]  # type: ignore[union-attr]
    replaced = [*prompt.names]
    replaced[place] = new
    return dataclasses.replace(prompt, names=(replaced[0], replaced[1], replaced[2]))


def parse(text: str) -> Prompt:
    """The prompt of a text as `Prompt.text` gives it, names being any words.

    Raises ValueError where no template fits, or the last name is not one of the first two.
    """
    for index, template in enumerate(TEMPLATES):
        pattern = re.sub(r"\\\{([012])\\\}", r"(?P<n\1>[A-Z]\\w+)", re.escape(template))
        for word in ("place", "object"):
            pattern = pattern.replace(rf"\{{{word}\}}", rf"(?P<{word}>\w+)", 1)
            pattern = pattern.replace(rf"\{{{word}\}}", rf"(?P={word})")
        match = re.fullmatch(pattern, text)
        if match is None:
            continue
        found = match.groupdict()
        names = found["n0"], found["n1"], found["n2"]
        if names[2] not in names[:2] or names[0] == names[1]:
            raise ValueError(f"the last name must be one of two different ones before it: {text!r}")
        io = names[1] if names[2] == names[0] else names[0]
        return Prompt(index, names, io, names[2], found.get("place", PLACES[0]), found.get("object", OBJECTS[0]))
    raise ValueError(f"no template of indirect object identification fits {text!r}")

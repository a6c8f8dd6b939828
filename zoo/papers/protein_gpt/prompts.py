"""Prompts of the eight tasks as text, and answers read from text.

`Task<argument> [answer]`: the paper's README shows a few of the names, the others are ours.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from zoo.data.prompts import ANSWER_END, TASK_END, answer, decode, encode, numbers, parse_numbers

__all__ = [
    "ANSWER_END",
    "RESIDUES",
    "TASKS",
    "TASK_END",
    "Task",
    "answer",
    "content",
    "decode",
    "encode",
    "example",
    "numbers",
    "parse_numbers",
    "parse_sequence",
    "prompt",
]

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: the prompt's first word.
      classes: letters of an answer (or argument) that counts or lists structure, in the order of its numbers.
      inverse: whether the answer is the sequence.
    """

    name: str
    classes: str = ""
    inverse: bool = False


# Sequencing; content and structure of each residue by 8 classes (DSSP) and by 3; a measured property; and the inverse.
TASKS: dict[str, Task] = {
    "sequence": Task("Sequence"),
    "content8": Task("CalculateSSContent", "HBEGITS~"),
    "content3": Task("CalculateSSContent3", "HEC"),
    "residues8": Task("CalculateSS", "HBEGITS~"),
    "residues3": Task("CalculateSS3", "HEC"),
    "property": Task("CalculateProperty"),
    "from_content": Task("GenerateSSContent3", "HEC", inverse=True),
    "from_property": Task("GenerateProperty", inverse=True),
}


def content(structure: str, classes: str = "HEC") -> np.ndarray:
    """Shares of the classes in a structure, float64 (classes,). Raises ValueError for an unknown letter."""
    if not structure or set(structure) - set(classes):
        raise ValueError(f"a structure is made of {classes}, got {structure!r}")
    return np.array([structure.count(letter) for letter in classes]) / len(structure)


def prompt(task: str, argument: str) -> str:
    """The question: `Name<argument>`. Raises ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return f"{TASKS[task].name}<{argument}>"


def example(task: str, sequence: str, *, structure: str = "", value: float | None = None) -> str:
    """Question and answer for a chain.

    Args:
      task: one of `TASKS`.
      sequence: residues.
      structure: a letter a residue, where the task is about it.
      value: the property, where the task is about it.

    Raises:
      ValueError: an unknown task, or what it is about is missing.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    kind = TASKS[task]
    if kind.classes and len(structure) != len(sequence):
        raise ValueError(f"{task} needs a structure of {len(sequence)} letters, got {len(structure)}")
    if task.endswith("property") and value is None:
        raise ValueError(f"{task} needs a value")
    if task == "sequence":
        return f"{prompt(task, sequence)} []"
    if task.startswith("residues"):
        told = structure
    elif kind.classes:
        told = numbers(content(structure, kind.classes))
    else:
        told = numbers([float(value if value is not None else 0)])
    question, answer = (told, sequence) if kind.inverse else (sequence, told)
    return f"{prompt(task, question)} [{answer}]"


def parse_sequence(text: str) -> str | None:
    """The answer where it is residues, at least one, else None."""
    found = answer(text)
    return found if found and not set(found) - set(RESIDUES) else None

"""Real text as bytes."""

from __future__ import annotations

import os
import pathlib

import numpy as np


def read_text(folder: str | os.PathLike[str] | None = None) -> np.ndarray:
    """uint8 (bytes,): the `.txt` files of a folder in order of their names, or what comes with Python.

    Args:
      folder: None is the prose of Python's own language reference (half a megabyte of English, with code), which every
        installation carries.

    Raises:
      FileNotFoundError: there is no such folder, or no text in it.
    """
    if folder is None:
        from pydoc_data.topics import topics

        return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    paths = sorted(pathlib.Path(folder).glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .txt file")
    return np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)

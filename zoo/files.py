"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, with its suffix; renames it to `path` if the block ends without an error.

    >>> with atomic("result.json") as temporary:          # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private; a finished one is as any other
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

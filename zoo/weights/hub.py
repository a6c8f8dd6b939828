"""Checkpoints from the Hugging Face hub: `hf://organisation/repository[@revision]/path/to/file`."""

from __future__ import annotations

import hashlib
import pathlib
import re

from zoo.weights.errors import WeightsFileError

_ADDRESS = re.compile(r"hf://(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/@\s]+))?/(?P<file>[^@\s]+)")


def parse_address(address: str) -> tuple[str, str | None, str]:
    """Splits an hf:// address into repository, revision (None: the default branch) and file.

    Raises ValueError for anything else.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or ".." in match["file"].split("/"):
        raise ValueError(f"expected hf://organisation/repository[@revision]/file, got {address!r}")
    return match["repository"], match["revision"], match["file"]


def download(address: str, *, sha256: str | None = None) -> pathlib.Path:
    """The local path of a file of the hub, downloaded unless it is in the hub's cache (HF_HOME) already.

    The hub's client writes to a temporary name and renames, so an interrupted download leaves no half file.

    Args:
      address: `hf://organisation/repository[@revision]/file`. A commit as revision pins the content.
      sha256: the file's expected hash, checked on every call.

    Raises:
      ModuleNotFoundError: huggingface_hub is not installed.
      ConnectionError: the file is not in the cache and the hub cannot be reached.
      FileNotFoundError: the hub has no such repository, revision or file, or does not give it to you.
      WeightsFileError: the file's hash is another.
    """
    repository, revision, file = parse_address(address)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise ModuleNotFoundError("hf:// addresses need huggingface_hub: pip install 'zoo[hub]'") from None
    try:
        path = pathlib.Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{address} is not in the local cache and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
            "download the file where there is a network and give its path instead"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{address}: repository {repository} has no file {file!r}") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{address}: repository {repository} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:  # a gated repository too
        raise FileNotFoundError(
            f"{address}: no repository {repository}, or not without logging in and accepting its terms"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{address} could not be downloaded: {error}") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{address}: {error}") from error
    check_sha256(path, sha256)
    return path


def check_sha256(path: pathlib.Path, sha256: str | None) -> None:
    """Raises WeightsFileError where a file's hash differs from the one expected (None: not checked)."""
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise WeightsFileError(f"{path} has sha256 {found}, expected {sha256.lower()}: damaged, or another file")

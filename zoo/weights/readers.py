"""Reads a checkpoint of any kind into {published name: numpy array}, without running anything it contains."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from zoo.weights.errors import WeightsFileError
from zoo.weights.gguf_file import GGUFTensor, open_gguf
from zoo.weights.hub import check_sha256, download

Source = str | pathlib.Path | Mapping[str, Any]

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "params")
_TORCH_BITS = {  # torch's dtypes that numpy lacks
    "torch.bfloat16": ("int16", ml_dtypes.bfloat16),
    "torch.float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
}


def read(source: Source, *, key: str | None = None, sha256: str | None = None) -> dict[str, np.ndarray]:
    """Reads a checkpoint.

    Args:
      source: a path of a file
        - torch (.pth, .pt, .bin, .ckpt, .pth.tar), loaded with `weights_only=True`: tensors, no code,
        - .safetensors, or the index (.safetensors.index.json) of a sharded one,
        - .gguf, dequantised;
        or a folder with one checkpoint; an address `hf://organisation/repository[@revision]/file`; or a state dict
        (torch tensors will do).
      key: where in a torch file the state dict is, such as "state_dict_ema" or "ema.model". By default a state dict at
        the top or in one of the usual containers ("state_dict", "model", ..., the first there is).
      sha256: the file's expected hash.

    Returns:
      {name: array}, with the stored dtypes; a prefix "module." that every name has (of torch's data-parallel wrapper)
      is taken off.

    Raises:
      FileNotFoundError, ConnectionError: there is no such file.
      ModuleNotFoundError: a package is missing; says which extra to install.
      WeightsFileError (a ValueError): the file is damaged, holds code, has another hash, or is of an unknown kind.
    """
    return dict(open_tensors(source, key=key, sha256=sha256))


def open_tensors(source: Source, *, key: str | None = None, sha256: str | None = None) -> Mapping[str, np.ndarray]:
    """Like `read`, but the arrays of a GGUF file are dequantised one by one, each time that they are asked for."""
    tensors: Mapping[str, np.ndarray]
    if isinstance(source, Mapping):
        tensors = _state_dict(source, key, "the state dict")
    elif isinstance(source, str) and source.startswith("hf://"):
        tensors = _read_file(download(source, sha256=sha256), key, lambda name: _sibling(source, name))
    elif isinstance(source, str | pathlib.Path):
        path = _locate(pathlib.Path(source))
        check_sha256(path, sha256)
        tensors = _read_file(path, key, lambda name: path.parent / name)
    else:
        raise TypeError(f"expected a path, an hf:// address or a state dict, got {type(source).__name__}")
    if not tensors:
        raise WeightsFileError(f"{_shown(source)} holds no tensors")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): array for name, array in tensors.items()}
    return tensors


def _shown(source: Source) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def _sibling(address: str, name: str) -> pathlib.Path:
    return download(f"{address.rpartition('/')[0]}/{name}")


def _locate(path: pathlib.Path) -> pathlib.Path:
    """The file itself; in a folder, the one checkpoint there."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"no such file: {path}")
    for pattern in (
        "*.safetensors.index.json",
        "*.safetensors",
        "*.gguf",
        *(f"*{suffix}" for suffix in _TORCH_SUFFIXES),
    ):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise WeightsFileError(f"{path} has several checkpoints, give one: {', '.join(f.name for f in found)}")
    raise FileNotFoundError(
        f"no checkpoint in {path}: it has {', '.join(sorted(f.name for f in path.iterdir())) or 'nothing'}"
    )


def _read_file(path: pathlib.Path, key: str | None, locate: Callable[[str], pathlib.Path]) -> Mapping[str, np.ndarray]:
    name = path.name
    if name.endswith(_TORCH_SUFFIXES):
        return _state_dict(_read_torch(path), key, str(path))
    if key is not None:
        raise ValueError(f"key is for torch files, and {path} is none")
    if name.endswith(".safetensors"):
        return _read_safetensors(path)
    if name.endswith(".index.json"):
        return _read_sharded(path, locate)
    if name.endswith(".gguf"):
        return _Dequantized(open_gguf(path)[1])
    raise WeightsFileError(
        f"{path}: unknown kind of file; expected {', '.join(_TORCH_SUFFIXES)}, .safetensors, .safetensors.index.json "
        "or .gguf"
    )


class _Dequantized(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by name, as arrays."""

    def __init__(self, stored: Mapping[str, GGUFTensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].dequantize()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        raise WeightsFileError(f"{path} is damaged, or not a safetensors file: {error}") from None


def _read_sharded(path: pathlib.Path, locate: Callable[[str], pathlib.Path]) -> dict[str, np.ndarray]:
    try:
        files = json.loads(path.read_text())["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in files.items():
            shards.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsFileError(f"{path} is not an index of a sharded checkpoint: {error!r}") from None
    result: dict[str, np.ndarray] = {}
    for file, names in sorted(shards.items()):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise WeightsFileError(f"{path} names {file!r}, which is not a .safetensors file beside it")
        shard = locate(file)
        if not shard.is_file():
            raise FileNotFoundError(f"{path} names {file}, which is not there")
        tensors = _read_safetensors(shard)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise WeightsFileError(f"{shard} lacks {len(missing)} tensors of the index: {', '.join(missing)}")
        result |= {name: tensors[name] for name in names}
    return result


def _read_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {path.name} needs torch: pip install 'zoo[torch]'") from None
    try:
        # Training scripts like to store their command line; a Namespace is a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error))
        if code:
            raise WeightsFileError(
                f"{path} is refused: besides tensors it holds {code[1]}, and building that would run code out of the "
                "file. Where you trust the file, save its state dict alone: torch.save(model.state_dict(), ...)"
            ) from None
        detail = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = detail[1] if detail else f"{type(error).__name__} {str(error).split('. ')[0]}"
        raise WeightsFileError(f"{path} is damaged, or not a torch checkpoint of tensors: {reason}") from None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or (hasattr(value, "shape") and hasattr(value, "dtype"))


def _state_dict(stored: Any, key: str | None, where: str) -> dict[str, np.ndarray]:
    """The state dict within what a file holds; its values that are not tensors are left out."""
    for part in key.split(".") if key else ():
        if not isinstance(stored, Mapping) or part not in stored:
            held = ", ".join(map(str, stored)) if isinstance(stored, Mapping) else type(stored).__name__
            raise WeightsFileError(f"{where} has no {key!r}: there is {held}")
        stored = stored[part]
    while isinstance(stored, Mapping):
        inner = next((name for name in _CONTAINERS if isinstance(stored.get(name), Mapping)), None)
        if inner is None:
            break
        stored = stored[inner]
    if not isinstance(stored, Mapping):
        raise WeightsFileError(f"{where} holds a {type(stored).__name__}, not a state dict")
    tensors = {name: value for name, value in stored.items() if _is_tensor(value)}
    nested = [str(name) for name, value in stored.items() if isinstance(value, Mapping) and value]
    if nested and not tensors:
        raise WeightsFileError(f"{where} holds several things, choose one by `key`: {', '.join(nested)}")
    bad = [name for name in tensors if not isinstance(name, str)]
    if bad:
        raise WeightsFileError(f"{where} has names that are not strings: {bad[:5]}")
    return {name: _as_numpy(name, value) for name, value in tensors.items()}


def _as_numpy(name: str, tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    try:
        if str(tensor.dtype) in _TORCH_BITS:
            import torch

            bits, dtype = _TORCH_BITS[str(tensor.dtype)]
            return tensor.view(getattr(torch, bits)).numpy().view(dtype)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise WeightsFileError(f"tensor {name!r} ({tensor.dtype}) is not a plain array: {error}") from None

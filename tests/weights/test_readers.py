import argparse
import collections
import hashlib
import json
import pickle
import sys
import time
import types

import gguf
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.numpy import save_file

from zoo.weights.errors import WeightsFileError
from zoo.weights.gguf_file import GGUFTensor, open_gguf
from zoo.weights.hub import download, parse_address
from zoo.weights.readers import read

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.half": np.linspace(-1, 1, 5).astype(np.float16),
    "a.brain": np.linspace(-1, 1, 5).astype(ml_dtypes.bfloat16),
    "steps": np.array(7, np.int64),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def as_torch(arrays):
    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(array.copy())
        for name, array in arrays.items()
    }


def write_gguf(path, arrays, quantized=()):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "</s>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("general.flag", True)
    for name, array in arrays.items():
        if array.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    for name, array, kind in quantized:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_torch_files_keep_names_values_and_dtypes(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(collections.OrderedDict(as_torch(ARRAYS)), path)
    assert_same(read(path), ARRAYS)
    torch.save(as_torch(ARRAYS), path, _use_new_zipfile_serialization=False)
    assert_same(read(str(path)), ARRAYS)


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}}, None),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3), "best": torch.tensor(0.5)}, None),
        (lambda s: {"model": {"module": s}}, None),
        (lambda s: {f"module.{name}": value for name, value in s.items()}, None),
        (lambda s: {"state_dict": {}, "state_dict_ema": s}, "state_dict_ema"),
        (lambda s: {"ema": {"model": s}}, "ema.model"),
    ],
)
def test_state_dicts_are_found_in_their_containers(tmp_path, wrap, key):
    torch.save(wrap(as_torch(ARRAYS)), tmp_path / "c.pth")
    assert_same(read(tmp_path / "c.pth", key=key), ARRAYS)
    assert_same(read(wrap(as_torch(ARRAYS)), key=key), ARRAYS)


def test_ambiguous_or_empty_torch_files(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"generator": as_torch(ARRAYS), "critic": as_torch(ARRAYS)}, path)
    with pytest.raises(WeightsFileError, match="choose one by `key`: generator, critic"):
        read(path)
    with pytest.raises(WeightsFileError, match="no 'ema': there is generator, critic"):
        read(path, key="ema")
    torch.save([torch.ones(3)], path)
    with pytest.raises(WeightsFileError, match="holds a list, not a state dict"):
        read(path)
    torch.save({}, path)
    with pytest.raises(WeightsFileError, match="holds no tensors"):
        read(path)
    torch.save({"s": torch.eye(3).to_sparse()}, path)
    with pytest.raises(WeightsFileError, match=r"tensor 's' .* is not a plain array"):
        read(path)


class Trap:
    sprung = False

    def __reduce__(self):
        return (spring, ())


def spring():
    Trap.sprung = True


def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path):
    path = tmp_path / "trap.pth"
    torch.save({"a": torch.ones(2), "b": Trap()}, path)
    with pytest.raises(WeightsFileError, match=r"refused: besides tensors it holds .*spring.* run code"):
        read(path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(WeightsFileError, match=r"refused: besides tensors it holds torch\.nn\.modules\.linear\.Linear"):
        read(path)
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"a": Trap()}, protocol))
        with pytest.raises(WeightsFileError, match=r"trap\.pth"):
            read(path)
    assert not Trap.sprung


def test_damaged_torch_files(tmp_path):
    path = tmp_path / "c.pth"
    torch.save(as_torch(ARRAYS), path)
    whole = path.read_bytes()
    for content in (whole[:300], whole[:-100], b"hello world", b"", whole[100:]):
        path.write_bytes(content)
        with pytest.raises(WeightsFileError, match="damaged, or not a torch checkpoint"):
            read(path)


def test_safetensors_files_and_folders(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    assert_same(read(tmp_path / "model.safetensors"), ARRAYS)
    assert_same(read(tmp_path), ARRAYS)
    save_file(ARRAYS, tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsFileError, match=r"several checkpoints, give one: model\.safetensors, other\.safetensors"
    ):
        read(tmp_path)


def write_sharded(folder):
    names = list(ARRAYS)
    shards = {"model-1-of-2.safetensors": names[:2], "model-2-of-2.safetensors": names[2:]}
    for file, held in shards.items():
        save_file({name: ARRAYS[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path, index


def test_sharded_safetensors(tmp_path):
    path, index = write_sharded(tmp_path)
    assert_same(read(path), ARRAYS)
    assert_same(read(tmp_path), ARRAYS)
    index["weight_map"]["more"] = "model-1-of-2.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsFileError, match="lacks 1 tensors of the index: more"):
        read(path)
    index["weight_map"]["more"] = "absent.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names absent\.safetensors, which is not there"):
        read(path)
    index["weight_map"]["more"] = "../../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsFileError, match=r"not a .safetensors file beside it"):
        read(path)
    for text in ("[1]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        path.write_text(text)
        with pytest.raises(WeightsFileError, match="not an index of a sharded checkpoint"):
            read(path)


QUANTIZED = [gguf.GGMLQuantizationType[kind] for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]


def test_gguf_metadata_and_tensors(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    plain = {"f32": values, "f16": values.astype(np.float16), "bf16": values.astype(ml_dtypes.bfloat16)}
    path = write_gguf(tmp_path / "m.gguf", plain, [(kind.name, values, kind) for kind in QUANTIZED])
    metadata, tensors = open_gguf(path)
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 2
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", "</s>"] and metadata["general.flag"] is True
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], np.float32([0.5, -1]))
    assert tensors["Q4_1"].kind == "Q4_1" and tensors["Q4_1"].data.nbytes == 6 * 64 // 32 * 20
    found = read(path)
    assert_same({name: found.pop(name) for name in plain}, plain)
    for name, array in found.items():
        assert array.shape == values.shape and array.dtype == np.float32
        assert np.abs(array - values).max() < (0.05 if name == "Q8_0" else 0.5)


def test_q4_1_blocks_by_their_definition():
    rng = np.random.default_rng(1)
    scale, offset = np.float16(0.25), np.float16(-1.5)
    nibbles = rng.integers(0, 256, 16, np.uint8)
    block = np.concatenate([np.array([scale, offset]).view(np.uint8), nibbles])
    expected = np.concatenate([nibbles & 15, nibbles >> 4]) * np.float32(scale) + np.float32(offset)
    np.testing.assert_array_equal(GGUFTensor("Q4_1", (1, 32), block).dequantize()[0], expected)


def test_every_quantized_type_of_the_package_is_read():
    rng = np.random.default_rng(2)
    for kind, traits in gguf.quants._type_traits.items():
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 60, (3, 2 * size), np.uint8)
        found = GGUFTensor(kind.name, (3, 2 * values), blocks.reshape(-1)).dequantize()
        assert found.shape == (3, 2 * values), traits
    with pytest.raises(WeightsFileError, match="does not dequantise Q8_1"):
        GGUFTensor("Q8_1", (1, 32), np.zeros(40, np.uint8)).dequantize()


def test_wrong_gguf_files(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"a": np.ones((2, 3), np.float32)})
    whole = path.read_bytes()
    cases = {
        b"": "0 bytes",
        b"GGML" + whole[4:]: "it starts with b'GGML'",
        whole[:4] + b"\x01\0\0\0" + whole[8:]: r"version 1 \(2 and 3 are read",
        whole[:4] + b"\0\0\0\x03" + whole[8:]: "version 50331648",
        whole[:8] + b"\xff" * 8 + whole[16:]: "tensors announced",
        whole[:16] + b"\xff" * 8 + whole[24:]: "metadata entries announced",
        whole[:-20]: "ends at byte",
        whole[:60]: "damaged",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(WeightsFileError, match=message):
            read(path)


def mutations(content, count, seed, head):
    """Flips, cuts, repeats and inserts bytes, mostly in the first `head` bytes, where the lengths are."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mutated = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, head if rng.random() < 0.8 else len(mutated)))
            at = min(at, len(mutated) - 1)
            kind = rng.integers(0, 5)
            if kind == 0:
                mutated[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                mutated[at : at + 8] = rng.bytes(8)
            elif kind == 2:
                mutated[at : at + 8] = b"\xff" * int(rng.integers(1, 9))
            elif kind == 3:
                del mutated[max(at, 1) :]
            else:
                mutated[at:at] = mutated[at : at + int(rng.integers(1, 40))]
        yield bytes(mutated)


def refused_of(path, contents, use):
    """How many contents of a file are refused, each with an error that names the file; the others pass `use`."""
    refused = 0
    with np.errstate(all="ignore"):
        for content in contents:
            path.write_bytes(content)
            try:
                use(path)
            except WeightsFileError as error:
                refused += 1
                assert str(path) in str(error)
    return refused


few_or_many = pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])


@few_or_many
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_mutated_files_are_read_or_refused_but_never_crash_or_hang(tmp_path, kind, count):
    path = tmp_path / f"m.{kind}"
    if kind == "gguf":
        values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
        write_gguf(path, {"plain": values}, [(q.name, values, q) for q in QUANTIZED])
        head = 700
    else:
        save_file(ARRAYS, path)
        head = 300
    start = time.perf_counter()
    refused = refused_of(path, mutations(path.read_bytes(), count, count, head), read)
    assert refused > 0.4 * count and time.perf_counter() - start < 0.15 * count


def test_wrong_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: it has nothing"):
        read(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(WeightsFileError, match=r"weights.h5: unknown kind of file; expected \.pth"):
        read(tmp_path / "weights.h5")
    with pytest.raises(TypeError, match="expected a path, an hf:// address or a state dict, got int"):
        read(3)
    save_file(ARRAYS, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="key is for torch files"):
        read(tmp_path / "m.safetensors", key="ema")
    with pytest.raises(WeightsFileError, match=r"has sha256 [0-9a-f]{64}, expected 00"):
        read(tmp_path / "m.safetensors", sha256="00" * 32)


@pytest.mark.parametrize(
    ("package", "file", "extra"),
    [("torch", "m.pth", "torch"), ("gguf", "m.gguf", "gguf"), ("huggingface_hub", "", "hub")],
)
def test_missing_packages_are_named_with_their_extra(tmp_path, monkeypatch, package, file, extra):
    monkeypatch.setitem(sys.modules, package, None)
    source = f"hf://o/r/{package}.safetensors"
    if file:
        source = tmp_path / file
        source.write_bytes(b"GGUF")
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'zoo\[{extra}\]'"):
        read(source)


class FakeHub:
    """Serves a folder as `hf_hub_download` does."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []

    def __call__(self, repo_id, filename, *, revision=None):
        self.calls.append((repo_id, filename, revision))
        path = self.folder / filename
        if not path.exists():
            raise hub_errors.EntryNotFoundError(f"no {filename}")
        return str(path)


def test_hub_addresses_are_read_with_their_shards_and_hashes(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write_sharded(tmp_path / "sub")
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert_same(read("hf://org/repo@v1.0/sub/model.safetensors.index.json"), ARRAYS)
    assert sorted(hub.calls) == sorted(
        ("org/repo", f"sub/{name}", "v1.0")
        for name in ("model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    )
    content = (tmp_path / "sub" / "model-1-of-2.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert download("hf://org/repo/sub/model-1-of-2.safetensors", sha256=digest.upper()).read_bytes() == content
    with pytest.raises(WeightsFileError, match=f"has sha256 {digest}, expected"):
        read("hf://org/repo/sub/model-1-of-2.safetensors", sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"repository org/repo has no file 'sub/absent.gguf'"):
        read("hf://org/repo/sub/absent.gguf")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (hub_errors.LocalEntryNotFoundError, ConnectionError, "not in the local cache and the hub cannot be reached"),
        (hub_errors.RevisionNotFoundError, FileNotFoundError, "has no revision 'v9'"),
        (hub_errors.RepositoryNotFoundError, FileNotFoundError, "no repository o/r, or not without logging in"),
        (hub_errors.GatedRepoError, FileNotFoundError, "no repository o/r, or not without logging in"),
        (hub_errors.HfHubHTTPError, ConnectionError, "could not be downloaded: 503"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, raised, expected, message):
    def fail(*_, **__):
        if issubclass(raised, hub_errors.HfHubHTTPError):
            raise raised("503", response=types.SimpleNamespace(headers={}, request=None, status_code=503))
        raise raised("503")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(expected, match=message):
        read("hf://o/r@v9/m.safetensors")


def test_hub_addresses():
    assert parse_address("hf://a/b/c/d.gguf") == ("a/b", None, "c/d.gguf")
    assert parse_address("hf://a/b@main/d.gguf") == ("a/b", "main", "d.gguf")
    for address in ("hf://a/b", "hf://a/b@/c", "hf://a", "a/b/c", "hf://a/b/../c"):
        with pytest.raises(ValueError, match="expected hf://organisation"):
            parse_address(address)

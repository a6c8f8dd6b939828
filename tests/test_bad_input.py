"""Wrong calls, and the messages they get: what was wrong, what was expected, before anything is compiled."""

import contextlib
import io
import pathlib
import pickle
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from kernels import attention
from zoo import cli, mixers, train
from zoo.backbones import DecoderConfig
from zoo.data.ett import read_ett
from zoo.data.time_series import read_csv

X = jnp.zeros((2, 8, 4, 16))
ONE_HEAD = jnp.zeros((2, 8, 1, 16))


def attend(query=X, key=X, value=X, **options):
    return lambda: attention(query, key, value, **options)


KERNELS = [
    ("rank", attend(query=X[0]), ValueError, r"query must be \(batch, time, heads, dim\), got shape \(8, 4, 16\)"),
    ("integers", attend(query=X.astype(jnp.int32)), TypeError, "query must be floating point, got int32"),
    ("dtypes", attend(key=X.astype(jnp.bfloat16)), TypeError, "share a dtype, got float32, bfloat16, float32"),
    ("empty", attend(key=X[:, :0], value=X[:, :0]), ValueError, r"key has an empty axis: \(2, 0, 4, 16\)"),
    ("batch", attend(key=X[:1], value=X[:1]), ValueError, "batch sizes differ: query 2, key 1, value 1"),
    ("width", attend(key=X[..., :8]), ValueError, "same width, got 16 and 8"),
    ("length", attend(value=X[:, :4]), ValueError, "key and value must have the same length and heads"),
    ("heads", attend(key=X[:, :, :3], value=X[:, :, :3]), ValueError, r"query heads \(4\) must be a multiple"),
    ("implementation", attend(implementation="flash"), ValueError, "None or one of .* got 'flash'"),
    ("window", attend(window=-1), ValueError, r"window sides must be None or not negative, got \(-1, -1\)"),
    ("softcap", attend(logit_softcap=0.0), ValueError, "logit_softcap must be positive, got 0.0"),
    ("scale", attend(scale=-1.0), ValueError, "scale must be positive, got -1.0"),
    ("dropout", attend(dropout_rate=1.0), ValueError, r"dropout_rate must be in \[0, 1\), got 1.0"),
    ("dropout rng", attend(dropout_rate=0.1), ValueError, "dropout needs dropout_rng"),
    ("prefix", attend(prefix_lengths=jnp.zeros(2, jnp.int32)), ValueError, "only with causal=True"),
    ("segments", attend(query_segment_ids=jnp.zeros((2, 8), jnp.int32)), ValueError, "are given together"),
    ("bias", attend(bias=jnp.zeros((2, 3, 8, 8))), ValueError, r"\(2, 4, 8, 8\), got \(2, 3, 8, 8\)"),
    ("sinks", attend(sinks=jnp.zeros(3)), ValueError, r"sinks must have shape \(4,\), got \(3,\)"),
    ("positions", attend(key_positions=jnp.zeros((2, 7), jnp.int32)), ValueError, r"key_positions .* \(2, 8\) or"),
    ("cache", attend(key_lengths=jnp.zeros((2, 1), jnp.int32)), ValueError, r"must have shape \(2,\), got \(2, 1\)"),
]  # fmt: skip

API = [
    ("id", lambda: zoo.create("informer_eth1_m24"), ValueError, "unknown model .* did you mean 'informer_etth1_m24'"),
    ("no such id", lambda: zoo.create("x"), ValueError, r"`zoo.list_models\(\)` lists all"),
    (
        "option",
        lambda: zoo.create("informer_etth1_m24", d_modl=3),
        ValueError,
        "unknown option .* did you mean 'd_model'",
    ),
    ("batch", lambda: zoo.example_inputs("informer_etth1_m24", 0), ValueError, "batch_size must be at least 1, got 0"),
    ("paper", lambda: zoo.paper("informr"), ValueError, "unknown paper 'informr'; did you mean 'informer'"),
    ("no checkpoint", lambda: zoo.load_weights("informer_etth1_m24"), ValueError, "no checkpoint of .* give a source"),
]

HOUR = "date,a,b\n2020-01-01 00:00:00,1,2\n"


def table(text, **options):
    """A call of `read_csv` on a file of this text."""

    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "table.csv")
            path.write_text(text)
            return read_csv(path, **options)

    return call


def checkpoint(content, suffix):
    """A call of `load_weights` on a file of this content."""

    def call():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "checkpoint" + suffix)
            path.write_bytes(content)
            return zoo.load_weights("informer_etth1_m24", path)

    return call


DATA = [
    ("no file", lambda: read_csv("nowhere.csv"), FileNotFoundError, "no such file: nowhere.csv"),
    ("no folder", lambda: read_ett("ETTh1", "nowhere"), FileNotFoundError, "ETTh1"),
    ("no rows", table("date,a,b\n"), ValueError, "has a header but no rows"),
    ("no date", table("day,a\n2020-01-01,1\n"), ValueError, "no column 'date' in the header"),
    ("no column", table(HOUR, columns=("a", "c")), ValueError, "no column 'c' in the header"),
    ("cells", table(HOUR + "2020-01-01 01:00:00,1\n"), ValueError, "line 3: 2 cells, the header has 3"),
    ("a word", table(HOUR + "2020-01-01 01:00:00,1,two\n"), ValueError, "line 3: column 'b' holds 'two', not a number"),
    (
        "a gap",
        table(HOUR + "2020-01-01 01:00:00,nan,2\n"),
        ValueError,
        "1 rows have missing or infinite values, lines 3",
    ),
    ("no day", table(HOUR + "2020-02-30 01:00:00,1,2\n"), ValueError, "'2020-02-30 01:00:00' is not a date"),
    ("twice", table(HOUR + "2020-01-01 00:00:00,1,2\n"), ValueError, "table.csv"),
]

WEIGHTS = [
    ("no file", lambda: zoo.load_weights("informer_etth1_m24", "nowhere.pth"), FileNotFoundError, "no such file"),
    ("suffix", checkpoint(b"weights", ".xyz"), ValueError, ".xyz"),
    ("not safetensors", checkpoint(b"weights", ".safetensors"), ValueError, "is damaged, or not a safetensors file"),
    ("not torch", checkpoint(b"weights", ".pth"), ValueError, "is damaged, or not a torch checkpoint"),
    ("code", checkpoint(pickle.dumps(print), ".pth"), ValueError, "checkpoint.pth"),
    ("names", lambda: zoo.load_weights("informer_etth1_m24", {"x.weight": np.zeros(3)}), ValueError, "x.weight"),
    ("source", lambda: zoo.load_weights("informer_etth1_m24", 3), TypeError, "expected a path, an hf:// address or a"),
]

NETWORKS = [
    (
        "mixer",
        lambda: mixers.create("softmx", features=8),
        ValueError,
        "unknown mixer 'softmx'; did you mean 'softmax'",
    ),
    ("heads", lambda: mixers.create("softmax", features=8, heads=3), ValueError, "heads"),
    ("option", lambda: mixers.create("softmax", features=8, head=2), TypeError, "no option 'head'; its options: "),
    ("preset", lambda: DecoderConfig.preset("gpt5"), ValueError, "gpt5"),
    ("mesh", lambda: train.make_mesh(train.MeshConfig(data=99)), ValueError, "does not fit 8 devices"),
    ("optimizer", lambda: train.OptimizerConfig(name="adamm"), ValueError, "name must be one of .* got 'adamm'"),
]
GROUPS = {"kernel": KERNELS, "api": API, "data": DATA, "weights": WEIGHTS, "network": NETWORKS}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [pytest.param(*case, id=f"{group}: {name}") for group, cases in GROUPS.items()
     for name, *case in cases],
)  # fmt: skip
def test_wrong_call_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


COMMANDS = [
    ("list nothing*", "no model matches 'nothing*'"),
    ("show informer_m24", "unknown model 'informer_m24'; did you mean"),
    ("run informr", "unknown experiment 'informr'; did you mean 'informer'"),
    ("run informer --preset cpus", "unknown preset 'cpus'; did you mean 'cpu'?"),
    ("run informer --resume --force", "give one of them"),
    ("compile informer_etth1_m24 --target tpu-v9", "unknown target 'tpu-v9'; did you mean"),
    ("compile informer_etth1_m24 --mesh 8by4", "--mesh must be one to three positive sizes joined by x"),
    ("convert informer_etth1_m24 nowhere.pth --to out.pth", "--to must name a .safetensors file"),
    ("convert informer_etth1_m24 nowhere.pth --to out.safetensors", "nowhere.pth"),
]


@pytest.mark.parametrize(("line", "message"), COMMANDS)
def test_wrong_command_ends_with_a_message(line, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert message in str(stop.value) and str(stop.value).startswith("error: ")


@pytest.mark.parametrize("line", ["", "lst", "run", "list --pattern x y", "compile --train"])
def test_wrong_usage_is_explained(line):
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream), pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2 and "zoo" in stream.getvalue()

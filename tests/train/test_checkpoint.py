import gc

import jax
import numpy as np
import pytest
import tensorstore

from tests.train import problem
from zoo import train

# When one read fails, Orbax leaves the others unawaited; they complain as they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def states():
    """The states after 0, 1, 2, ... steps, and where the iterator was."""
    made = problem.setup(problem.Config())
    iterator = iter(problem.batches())
    state = made.state
    found = [(jax.tree.map(lambda leaf: leaf.copy(), state), iterator.get_state())]
    for _ in range(6):
        state, _ = made.step(state, next(iterator))
        found.append((jax.tree.map(lambda leaf: leaf.copy(), state), iterator.get_state()))
    return found


def write(path, states, steps, best=None, keep=10):
    checkpoints = train.Checkpoints(path, keep)
    for step in steps:
        state, place = states[step]
        iterator = iter(problem.batches())
        iterator.set_state(place)
        checkpoints.save(step, state, iterator, {"step": step, "nan": float("nan")}, best)
    checkpoints.close()


def test_everything_is_restored_exactly(tmp_path, states):
    write(tmp_path / "checkpoints", states, [3])
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    iterator = iter(problem.batches())
    state, progress = checkpoints.restore(states[0][0], iterator)
    checkpoints.close()
    assert problem.bits(state) == problem.bits(states[3][0])
    assert progress["step"] == 3 and np.isnan(progress["nan"])
    expected = iter(problem.batches())
    expected.set_state(states[3][1])
    for _ in range(8):  # over the end of an epoch
        assert problem.bits(next(iterator)) == problem.bits(next(expected))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    made = problem.setup(problem.Config())
    iterator = iter(problem.batches())
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 10)
    state, expected = made.state, {}
    for step in range(1, 6):
        state, _ = made.step(state, next(iterator))
        expected[step] = problem.bits(state)
        checkpoints.save(step, state, iterator, {}, None)  # the next step reuses these buffers at once
    for step, bits in expected.items():
        assert problem.bits(checkpoints.restore_state(step, state)) == bits
    checkpoints.close()


def test_latest_and_best_are_kept(tmp_path, states):
    write(tmp_path / "checkpoints", states, [1, 2, 3, 4, 5, 6], best=2, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["2", "5", "6"]


def damage_array(folder):
    file = max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_one_bit(folder):
    """In an array's own bytes: the files also hold nodes of the index that nobody reads any more."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder / 'state'}/"}).result()
    chunk = store["params.Dense_1.kernel/0.0"]
    (file,) = (file for file in (folder / "state").rglob("d/*") if chunk in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(chunk) + len(chunk) // 2] ^= 1
    file.write_bytes(data)


def damage_progress(folder):
    next((folder / "progress").iterdir()).write_text('{"step": ')


def damage_iterator(folder):
    next((folder / "data").iterdir()).unlink()


def damage_manifest(folder):
    for file in (folder / "state").glob("manifest*"):
        file.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_array, damage_one_bit, damage_progress, damage_iterator, damage_manifest])
def test_damaged_newest_checkpoint_is_set_aside(tmp_path, states, damage, caplog):
    write(tmp_path / "checkpoints", states, [2, 4])
    damage(tmp_path / "checkpoints" / "4")
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    iterator = iter(problem.batches())
    state, progress = checkpoints.restore(states[0][0], iterator)
    assert progress["step"] == 2 and problem.bits(state) == problem.bits(states[2][0])
    assert iterator.get_state() == states[2][1]
    assert "checkpoint 4 cannot be read" in caplog.text and (tmp_path / "damaged" / "4").is_dir()
    checkpoints.save(4, states[4][0], iterator, {"step": 4}, None)
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_unfinished_checkpoint_is_ignored(tmp_path, states):
    write(tmp_path / "checkpoints", states, [2, 4])
    (tmp_path / "checkpoints" / "4").rename(tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp-1")
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    _, progress = checkpoints.restore(states[0][0], iter(problem.batches()))
    checkpoints.close()
    assert progress["step"] == 2


def test_no_readable_checkpoint_is_an_error_that_moves_nothing(tmp_path, states):
    write(tmp_path / "checkpoints", states, [2, 4])
    for step in ("2", "4"):
        damage_array(tmp_path / "checkpoints" / step)
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    with pytest.raises(train.CheckpointError, match=r"no checkpoint in .* can be read. By step: 4: .*; 2: "):
        checkpoints.restore(states[0][0], iter(problem.batches()))
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "2").is_dir() and (tmp_path / "checkpoints" / "4").is_dir()


def test_state_of_another_shape_is_refused(tmp_path, states):
    write(tmp_path / "checkpoints", states, [2])
    state = states[0][0]
    kernel = state.params["Dense_1"]["kernel"]
    params = {**state.params, "Dense_1": {**state.params["Dense_1"], "kernel": kernel[:, :8]}}
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    with pytest.raises(train.CheckpointError):
        checkpoints.restore(state.replace(params=params), iter(problem.batches()))
    checkpoints.close()


def test_empty_folder_has_nothing_to_restore(tmp_path, states):
    checkpoints = train.Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.restore(states[0][0], iter(problem.batches())) is None
    checkpoints.close()

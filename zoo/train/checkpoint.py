"""Checkpoints by Orbax: written in the background, committed by a rename, the latest few and the best kept."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from zoo.train.state import TrainState


@dataclasses.dataclass
class _LatestAndBest:
    """A preservation policy: the last `latest` checkpoints and the one of step `best`."""

    latest: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        latest = {checkpoint.step for checkpoint in checkpoints[-self.latest :]}
        return [checkpoint.step in latest or checkpoint.step == self.best for checkpoint in checkpoints]


class CheckpointError(RuntimeError):
    """There are checkpoints, and none can be restored."""


class Checkpoints:
    """The checkpoints of a run: a TrainState, the data iterator's state, and the loop's own progress as JSON.

    Args:
      path: their folder, made if needed.
      keep: how many of the latest stay, besides the best.
    """

    def __init__(self, path: pathlib.Path, keep: int) -> None:
        self._policy = _LatestAndBest(keep)
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            options=ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
            },
        )

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, progress: dict, best_step: int | None
    ) -> None:
        """Copies the state now and writes it in the background; an earlier write is waited for.

        A checkpoint of this step that is there already stays: the same steps gave the same state.
        """
        self._policy.best = best_step
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(iterator),
            progress=ocp.args.JsonSave(progress),
            checksums=ocp.args.JsonSave(_checksums(state)),
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> tuple[TrainState, dict] | None:
        """The newest checkpoint that can be read, or None where there is none; sets the iterator to its place.

        Args:
          state: shapes, dtypes and shardings to restore to, e.g. the initial state.
          iterator: is set to continue after the checkpoint's step.

        Returns:
          The state and the progress saved with it. Newer checkpoints that could not be read are moved to the folder
          `damaged` beside the checkpoints, with a warning.

        Raises:
          CheckpointError: there are checkpoints, and none can be read; nothing is moved.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(
                    step, state, data=grain.checkpoint.CheckpointRestore(iterator), progress=ocp.args.JsonRestore()
                )
            except Exception as error:  # damage shows as whatever the reader happens to raise
                if jax.process_count() > 1:
                    raise CheckpointError(f"checkpoint {step} cannot be read: {error}") from error
                damaged[step] = error
                continue
            for damaged_step, reason in damaged.items():
                self._set_aside(damaged_step, reason)
            return restored["state"], restored["progress"]
        if damaged:
            reasons = "; ".join(f"{step}: {str(reason).strip().splitlines()[0]}" for step, reason in damaged.items())
            raise CheckpointError(f"no checkpoint in {self._manager.directory} can be read. By step: {reasons}")
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        source = pathlib.Path(self._manager.directory) / str(step)
        target = source.parent.parent / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        self._manager.reload()
        logging.getLogger(__name__).warning(
            "checkpoint %d cannot be read (%s); it is now %s", step, type(error).__name__, target
        )

    def restore_state(self, step: int, state: TrainState) -> TrainState:
        """The state of one step, e.g. the best; `state` as for `restore`."""
        self._manager.wait_until_finished()
        return self._read(step, state)["state"]

    def _read(self, step: int, state: TrainState, **arguments: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        arguments |= {"state": ocp.args.StandardRestore(abstract), "checksums": ocp.args.JsonRestore()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        checksums = _checksums(restored["state"])
        wrong = [name for name, checksum in restored["checksums"].items() if checksums.get(name) != checksum]
        if wrong:
            raise CheckpointError(f"{', '.join(wrong)} are not what was saved")
        return restored

    def close(self) -> None:
        """Waits for the last write; raises what went wrong in it."""
        self._manager.wait_until_finished()
        self._manager.close()


def _checksums(state: TrainState) -> dict[str, int]:
    """The sum, modulo 2**32, of every array's words: the same however it is sharded, another if a bit differs.

    Orbax's index is protected, the arrays' own bytes are not.
    """
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)]
    return dict(zip(names, np.asarray(_word_sums(state)).tolist(), strict=True))


@jax.jit
def _word_sums(state: TrainState) -> jax.Array:
    def words(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == bool:
            return leaf.astype(jnp.uint32)
        return leaf.view(f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)

    return jnp.stack([jnp.sum(words(leaf), dtype=jnp.uint32) for leaf in jax.tree.leaves(state)])

"""Data-parallel, fully sharded (FSDP) and tensor-parallel training by the shape of one mesh.

Parameters carry logical axis names (`zoo.layers.partitioning`); RULES is the one table from names to mesh axes, XLA's
partitioner does the rest. The same script runs on one CPU, on eight simulated devices, and in several processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

import flax.linen as nn
import grain
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zoo.errors import unknown
from zoo.train.optimizer import Optimizer
from zoo.train.state import PyTree, TrainState, create_state

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # a batch is cut along both; FSDP is data parallelism whose parameters are cut too
RULES: dict[str, str] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    # Copies of the model, each with its part of the batch; -1: all devices that fsdp and tensor leave.
    data: int = -1
    # Devices that parameters and batch are cut across.
    fsdp: int = 1
    # Devices that the heads, hidden layers and vocabulary are cut across.
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data != -1 and self.data < 1:
            raise ValueError(f"data must be -1 or at least 1, got {self.data}")
        for field in ("fsdp", "tensor"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over the first devices (default `jax.devices()`).

    Raises:
      ValueError: the shape does not fit the devices; in several processes it must use all of them, and an axis
        "tensor" must lie within a process.
    """
    devices = list(jax.devices() if devices is None else devices)
    model = config.fsdp * config.tensor
    data = len(devices) // model if config.data == -1 else config.data
    size = data * model
    if size < 1 or size > len(devices) or (config.data == -1 and size != len(devices)):
        raise ValueError(f"{config} does not fit {len(devices)} devices")
    if jax.process_count() > 1:
        if size != len(devices):
            raise ValueError(f"{config} leaves {len(devices) - size} of {len(devices)} devices without work")
        if jax.local_device_count() % config.tensor:
            raise ValueError(f"tensor = {config.tensor} must divide a process's {jax.local_device_count()} devices")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, config.fsdp, config.tensor), MESH_AXES, axis_types, devices=devices[:size])


def partition_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How an array whose axes have these logical names is cut.

    An axis whose length the mesh axis does not divide, or whose mesh axis is taken already, is not cut.

    Raises:
      ValueError: a name is not in RULES.
    """
    spec: list[str | None] = []
    for name, length in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise unknown("logical axis", name, RULES)
        axis = None if name is None else RULES[name]
        spec.append(axis if axis is not None and axis not in spec and length % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*spec)


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every array of a state with logical axis names (`jax.eval_shape` of `create_state`)."""

    def is_named(leaf: PyTree) -> bool:
        return isinstance(leaf, nn.Partitioned)

    def sharding(leaf: PyTree) -> NamedSharding:
        spec = partition_spec(leaf.names, leaf.value.shape, mesh) if is_named(leaf) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, state, is_leaf=is_named)


def init_sharded(init: Callable[[jax.Array], PyTree], optimizer: Optimizer, rng: jax.Array, mesh: Mesh) -> TrainState:
    """The state before the first step, every array made where it lives, the same numbers on any mesh.

    Arguments and errors as of `create_state`; the state's arrays are plain, without their logical names.
    """

    def create(rng: jax.Array) -> TrainState:
        return create_state(init, optimizer, rng)

    shardings = state_shardings(jax.eval_shape(create, rng), mesh)
    return jax.jit(lambda rng: nn.unbox(create(rng)), out_shardings=shardings)(rng)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts this process's part of a batch (numpy arrays, axis 0 the examples) on its devices.

    Raises:
      ValueError: the arrays' lengths differ, or do not divide among the devices.
    """
    lengths = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(batch)}
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if len(lengths) != 1 or (min(lengths) * jax.process_count()) % parts or not min(lengths):
        raise ValueError(
            f"the arrays of a batch must share a first axis of a length that {parts} devices divide, "
            f"got shapes {jax.tree.map(np.shape, batch)}"
        )
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


def process_shard(dataset: grain.MapDataset) -> grain.MapDataset:
    """This process's share of the examples; apply it after shuffling and repeating, before batching.

    Batches of size B / processes are then, together, the batches of size B of a single process.
    """
    return dataset[jax.process_index() :: jax.process_count()]


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes; each field defaults to an environment variable, and without any there is one process."""

    # host:port of process 0 (JAX_COORDINATOR_ADDRESS).
    coordinator_address: str | None = None
    # Processes in all (JAX_NUM_PROCESSES).
    num_processes: int | None = None
    # This one, from 0 (JAX_PROCESS_ID).
    process_id: int | None = None


def initialize_distributed(config: DistributedConfig = DistributedConfig()) -> None:
    """Joins the processes; call it before anything else touches a device. CPUs talk by gloo.

    Raises:
      ValueError: some settings are given and others are missing.
    """

    def setting(value: int | None, variable: str) -> int | None:
        text = os.environ.get(variable)
        if value is not None or text is None:
            return value
        if not text.isdigit():
            raise ValueError(f"{variable} must be a number, got {text!r}")
        return int(text)

    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = setting(config.num_processes, "JAX_NUM_PROCESSES")
    process = setting(config.process_id, "JAX_PROCESS_ID")
    settings = {"coordinator_address": address, "num_processes": processes, "process_id": process}
    missing = [name for name, value in settings.items() if value is None]
    if len(missing) == len(settings):
        return
    if missing:
        raise ValueError(f"several processes need {', '.join(missing)} too, got {settings}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process)

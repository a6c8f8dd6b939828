"""Compile for a TPU or an NVIDIA GPU that is not there, with its real compiler, and read what the compiler says.

    compiled = compile_for("tpu-v5e", train_step, state, batch)     # arrays or jax.ShapeDtypeStruct
    print(report(compiled))                                         # memory against the device's, FLOPs, kernels
    mesh = make_mesh("tpu-v5p", {"data": 32, "model": 4})           # 128 chips that nobody has to own
    compile_for("tpu-v5p", step, state, batch, mesh=mesh, in_shardings=(PartitionSpec("model"), PartitionSpec("data")))

A TPU program comes from libtpu, a GPU program from JAX's CUDA plugin with NVIDIA's ptxas; both are in the extra
`compile`, for Linux on x86-64. They are loaded at the first compilation, not at import. What a compiler schedules is
not what a chip measures: memory stalls and clocks are not in it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import glob
import importlib.util
import math
import os
import pathlib
import platform as host
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from zoo import counting, registry, train
from zoo.errors import unknown

# ---------------------------------------------------------------------------------------------------------- targets


@dataclasses.dataclass(frozen=True)
class Target:
    """One device that programs can be compiled for. Memory in bytes, rates a second (dense bfloat16 FLOP, bytes)."""

    name: str
    platform: Literal["tpu", "cuda"]
    architecture: str  # what libtpu or ptxas calls it
    memory_bytes: int
    peak_flops: float
    bandwidth: float
    largest_slice: int  # devices that one program may span
    dimensions: int = 1  # of the grid in which the devices are wired
    description: str = ""  # of a GPU, for XLA


def _gpu_description(name: str, cores: int, float_units: int, shared: int, cache: int, memory: int, bandwidth: float,
                     clock: float, major: int) -> str:  # fmt: skip
    # `shared` is the shared memory of a core; CUDA keeps 1 KiB of it from a block.
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024} threads_per_core_limit: 2048
      core_count: {cores} fpus_per_core: {float_units} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
      cuda_compute_capability {{ major: {major} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 }}
    device_description_str: "{name}"
    """


_H100_MEMORY, _A100_MEMORY = 84_929_347_584, 85_167_243_264  # as the driver reports them
_H100 = _gpu_description("NVIDIA H100 80GB HBM3", 132, 128, 233_472, 50 << 20, _H100_MEMORY, 3.35232e12, 1.98, 9)
_A100 = _gpu_description("NVIDIA A100-SXM4-80GB", 108, 64, 167_936, 40 << 20, _A100_MEMORY, 2.039e12, 1.41, 8)

# Peak rates and sizes as published by the makers. XLA keeps a little of a TPU's memory for itself.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("tpu-v5e", "tpu", "v5e", 16 << 30, 197e12, 819e9, largest_slice=256, dimensions=2),
        Target("tpu-v5p", "tpu", "v5p", 95 << 30, 459e12, 2765e9, largest_slice=6144, dimensions=3),
        Target("tpu-v6e", "tpu", "v6e", 32 << 30, 918e12, 1640e9, largest_slice=256, dimensions=2),
        Target("h100", "cuda", "sm_90a", _H100_MEMORY, 989.4e12, 3.35232e12, largest_slice=8192, description=_H100),
        Target("a100", "cuda", "sm_80", _A100_MEMORY, 312e12, 2.039e12, largest_slice=8192, description=_A100),
    )
}


def get_target(name: str | Target) -> Target:
    """The target of that name. Raises ValueError, with the names that come near, where there is none."""
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]


# -------------------------------------------------------------------------------------------- loading the compilers


# JAX's CUDA plugin, started with JAX's first backend, would complain that cuDNN is missing, which compiles nothing.
_NO_CUDNN = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


class CompilerMissingError(RuntimeError):
    """The target's compiler is not installed, or does not exist for this machine."""


def _require(target: Target, modules: tuple[str, ...]) -> None:
    if (host.system(), host.machine()) != ("Linux", "x86_64"):
        raise CompilerMissingError(
            f"compiling for {target.name} without the device works on Linux on x86-64 only, "
            f"this is {host.system()} on {host.machine()}"
        )
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise CompilerMissingError(
                f"compiling for {target.name} needs the module {module}, which is not installed: "
                "pip install 'zoo[compile]'"
            )


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables that a compiler reads while it loads; those the user has set win."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@functools.cache
def _load_tpu_compiler() -> pathlib.Path:
    """Loads libtpu; the folder into which it will write the schedules of this process."""
    dump = pathlib.Path(tempfile.mkdtemp(prefix="zoo-schedules-"))
    atexit.register(shutil.rmtree, dump, ignore_errors=True)
    variables = {
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final"
    }
    if not glob.glob("/dev/accel[0-9]*") and not glob.glob("/dev/vfio/[0-9]*"):
        variables |= {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file lets one process at a time have the absent TPU
            "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask what host this is
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",
        }
    with _environment(**variables):
        try:
            topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                "libtpu could not be loaded for compilation. If this process used it before (a TPU backend, or JAX "
                "started without JAX_PLATFORMS=cpu), compile in a fresh process with JAX_PLATFORMS=cpu"
            ) from error
    return dump


@functools.cache
def _gpu_devices(target: Target, topology: str) -> tuple[jax.Device, ...]:
    def describe() -> tuple[jax.Device, ...]:
        return tuple(
            topologies.get_topology_desc(
                platform="cuda", topology_name=topology, topology=topology, target_config=target.description
            ).devices
        )

    with _environment(**_NO_CUDNN):
        try:
            return describe()
        except NotImplementedError:  # backends were started before, and the plugin gave up for want of cuDNN
            from jax_plugins import xla_cuda13

            xla_cuda13.initialize()
            return describe()


# ------------------------------------------------------------------------------------------------ devices and meshes


def _grid(count: int, dimensions: int) -> tuple[int, ...] | None:
    """The most cubic grid of `count` chips whose first two sides are even, as hosts of 2 x 2 chips tile it."""
    candidates: list[tuple[int, ...]] = []
    for first in range(2, math.isqrt(count) + 1, 2):
        if count % (2 * first) == 0 and dimensions == 2:
            candidates.append((first, count // first))
        if count % (2 * first) == 0 and dimensions == 3:
            rest = count // first
            candidates += [(first, second, rest // second) for second in range(2, rest + 1, 2) if rest % second == 0]
    return min(candidates, key=lambda sides: (max(sides) / min(sides), sides), default=None)


def devices(target: str | Target, count: int = 1) -> list[jax.Device]:
    """Compile-only devices: 1 or 2 chips of a host, or a whole slice of `count`.

    Raises:
      ValueError: unknown target, or a number of devices that no slice has.
      CompilerMissingError: the extra `compile` is not installed, or this is not Linux on x86-64.
    """
    target = get_target(target)
    if not 1 <= count <= target.largest_slice:
        raise ValueError(f"{target.name} programs span 1 to {target.largest_slice} devices, got {count}")
    if target.platform == "cuda":
        if count > 8 and count % 8:
            raise ValueError(f"GPUs come in hosts of 8: expected up to 8 or a multiple of 8, got {count}")
        _require(target, ("jax_plugins.xla_cuda13", "nvidia.cu13"))
        return list(_gpu_devices(target, f"1x{math.ceil(count / 8)}x{min(count, 8)}"))
    sides = (2,) * 2 + (1,) * (target.dimensions - 2) if count < 4 else _grid(count, target.dimensions)
    if count == 3 or sides is None:
        raise ValueError(f"a {target.name} slice has 1, 2 or a multiple of 4 chips, got {count}")
    _require(target, ("libtpu",))
    _load_tpu_compiler()
    name = f"{target.architecture}:{'x'.join(map(str, sides))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]


def make_mesh(target: str | Target, axes: Mapping[str, int]) -> Mesh:
    """A mesh over compile-only devices, laid along the target's wires.

    Args:
      target: a name in TARGETS.
      axes: size of each named axis, e.g. {"data": 8, "model": 4}.
    """
    if not axes or any(size < 1 for size in axes.values()):
        raise ValueError(f"mesh axes need positive sizes, got {dict(axes)}")
    target, shape = get_target(target), tuple(axes.values())
    chips = devices(target, math.prod(shape))
    if target.platform == "tpu" and len(chips) >= 4:
        return topologies.make_mesh(topologies.TopologyDescription(chips), shape, tuple(axes))
    return Mesh(np.array(chips).reshape(shape), tuple(axes))


# -------------------------------------------------------------------------------------------------------- compiling


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop of a TPU kernel as scheduled; the outermost one runs over the kernel's grid."""

    kernel: str
    depth: int  # 1 for the outermost
    bundles: int  # VLIW bundles in one pass, inner loops counted once: cycles, stalls aside
    iterations: int | None  # None where the program decides; the pipeline adds its filling to the grid's
    mxu: float  # share of the matrix units' issue slots in use
    vector_alu: float  # share of the vector ALUs' slots in use
    spills: int  # vector registers spilled and filled in one pass


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What one GPU kernel takes of a core."""

    kernel: str
    registers: int  # of each thread; 255 at most
    spill_bytes: int  # stored and loaded again by each thread


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a target, with what its compiler left behind."""

    target: Target
    executable: jax.stages.Compiled
    devices: int
    seconds: float  # of lowering and compiling, on this machine
    multiply_adds: int  # of the traced program, all devices together (`zoo.counting`)
    kernels: Mapping[str, int]  # hand-written kernels and library calls in the program: name and number of calls
    loops: tuple[Loop, ...] = ()  # of Pallas kernels on a TPU
    assembly: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # PTX of a GPU program


class DeviceMemoryError(MemoryError):
    """The program needs more memory than the target has; the message is the compiler's."""


def compile_for(
    target: str | Target,
    function: Callable[..., Any],
    *arguments: Any,
    mesh: Mesh | None = None,
    in_shardings: Any = None,
    donate_argnums: int | tuple[int, ...] = (),
) -> Compiled:
    """Compiles `function(*arguments)` with the target's compiler.

    Args:
      target: a name in TARGETS.
      function: traceable by JAX, jitted or not (a jitted one keeps its own static and donated arguments).
      *arguments: pytrees of arrays or jax.ShapeDtypeStruct, of which only shapes and dtypes count.
      mesh: from `make_mesh`; None compiles for one device.
      in_shardings: one PartitionSpec, or pytree of them, an argument; None leaves every argument whole on each device.
      donate_argnums: as in jax.jit.

    Raises:
      ValueError: unknown target.
      CompilerMissingError: as in `devices`.
      DeviceMemoryError: a TPU program does not fit. (XLA for GPUs does not check: see CompilationReport.fits.)
    """
    target = get_target(target)
    if in_shardings is not None and mesh is None:
        raise ValueError("in_shardings need a mesh")
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(devices(target)[0])
    if in_shardings is None:
        in_shardings = (PartitionSpec(),) * len(arguments)
    if len(in_shardings) != len(arguments):
        raise ValueError(f"expected one sharding an argument ({len(arguments)}), got {len(in_shardings)}")

    def place(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(mesh, spec) if mesh else everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    shapes = [
        jax.tree.map(place, spec, argument, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        for spec, argument in zip(in_shardings, arguments, strict=True)
    ]
    jitted = function if hasattr(function, "trace") else jax.jit(function, donate_argnums=donate_argnums)
    if target.platform == "tpu":
        dump = _load_tpu_compiler()
        options = None
    else:
        dump = pathlib.Path(tempfile.mkdtemp(prefix="zoo-ptx-"))
        options = {"xla_dump_to": str(dump)}
    start = time.perf_counter()
    try:
        with _environment(**_NO_CUDNN), _without_compilation_cache():
            traced = jitted.trace(*shapes)
            executable = traced.lower(lowering_platforms=(target.platform,)).compile(options)
        seconds = time.perf_counter() - start
        calls = _kernel_calls(executable.as_text())
        loops = _read_loops(dump, calls) if target.platform == "tpu" else ()
        assembly = tuple(text for path in sorted(dump.glob("*.ptx")) if (text := path.read_text()))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "HBM" in str(error).upper():
            raise DeviceMemoryError(f"{target.name}: {error}") from error
        raise
    finally:
        for path in dump.iterdir():
            path.unlink()
        if target.platform == "cuda":
            dump.rmdir()
    count = mesh.size if mesh else 1
    kernels = Counter(kernel for _, kernel in calls)
    products = counting.count(traced.jaxpr.jaxpr)
    return Compiled(target, executable, count, seconds, products, dict(sorted(kernels.items())), loops, assembly)


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    # JAX would write these executables to its persistent cache and then fail, with a warning, to read them: without a
    # device nothing can load one.
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _kernel_calls(program: str) -> list[tuple[str, str]]:
    """(instruction, kernel) of every custom call: a Pallas kernel by its own name, a library's by that of the call."""
    found = []
    for line in program.splitlines():
        call = re.match(r'\s*(?:ROOT )?%?(\S+) = .*?custom-call\(.*?custom_call_target="([^"]+)"', line)
        if call is None:
            continue
        instruction, called = call.groups()
        if called == "tpu_custom_call":
            kernel = re.sub(r"\.\d+$", "", instruction)
        elif called == "__gpu$xla.gpu.triton":
            # XLA prints the attributes in alphabetical order, `name` after the kernel's bytecode.
            kernel = re.findall(r'name = "([^"]+)", num_stages', line)[-1]
        elif re.match(r"[A-Z]", called):  # ConcatBitcast, AllocateBuffer, ...: XLA's own notes to itself
            continue
        else:
            kernel = called
        found.append((instruction, kernel))
    return found


# ---------------------------------------------------------------------------------------------- schedules, resources

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) (?:[A-Z]{2})?[ ]*:", re.MULTILINE)
_BRANCH_DELAY = 4  # bundles that still run after a branch


def _read_loops(dump: pathlib.Path, calls: list[tuple[str, str]]) -> tuple[Loop, ...]:
    found: list[Loop] = []
    for instruction, kernel in calls:
        bundles = sorted(dump.glob(f"*-{glob.escape(instruction)}-*-final_bundles.txt"))
        bundles = [path for path in bundles if "schedule-analysis" not in path.name]
        usage = sorted(dump.glob(f"*-{glob.escape(instruction)}-*-final_hlo-static-per-bundle-utilization.txt"))
        if bundles and usage:
            loops = _parse_loops(kernel, bundles[-1].read_text(), usage[-1].read_text())
            found += [loop for loop in loops if loop not in found]  # layers that are alike share one schedule
    return tuple(found)


def _parse_loops(kernel: str, bundles: str, utilization: str) -> list[Loop]:
    """The loops of a kernel in libtpu's text of final bundles, outermost first."""
    starts = [match.start() for match in _BUNDLE.finditer(bundles)]
    lines = [bundles[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    table = utilization.split("== UTILIZATION:")[1].split("\n")
    # Columns: MXU, XLU, VALU, VPOP, EUP, VLOAD, of which fills, VSTORE, of which spills, SALU.
    slots = np.array([[int(number) for number in row.split()] for row in table if row.strip()])
    limits = dict(re.findall(r"%(p\w+) = scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", bundles))
    regions: dict[str, int] = {}
    spans = []
    for index, line in enumerate(lines):
        for region in re.findall(r"Start(?:/End)? region (\d+)", line):
            regions[region] = index
        for predicate, region in re.findall(r"sbr\.rel \(!%(p\w+)\) target = \$region(\d+)", line):
            if region in regions and " LB:" in lines[regions[region]]:
                end = min(index + 1 + _BRANCH_DELAY, len(lines))
                spans.append((regions[region], end, limits.get(predicate)))
    loops = []
    for first, end, limit in sorted(spans, key=lambda span: (span[0], -span[1])):
        used = slots[first:end]
        loops.append(
            Loop(
                kernel=kernel,
                depth=sum(a <= first and end <= b for a, b, _ in spans),
                bundles=end - first,
                iterations=int(limit) if limit else None,
                mxu=float(used[:, 0].mean() / 4),
                vector_alu=float(used[:, 2].mean() / 4),
                spills=int(used[:, [6, 8]].sum()),
            )
        )
    return loops


def tpu_schedules(compiled: Compiled) -> tuple[Loop, ...]:
    """The scheduled loops of every Pallas kernel of a TPU program, grid loop first.

    Raises:
      ValueError: the program is not a TPU's.
      RuntimeError: libtpu was loaded before this module could ask it for schedules.
    """
    if compiled.target.platform != "tpu":
        raise ValueError(f"schedules are read from TPU programs, this one is for {compiled.target.name}")
    if compiled.kernels and not compiled.loops:
        raise RuntimeError(
            "libtpu left no schedules: it was loaded before zoo.compilation was first used. Compile in a fresh process "
            "with JAX_PLATFORMS=cpu and without own dump options in LIBTPU_INIT_ARGS"
        )
    return compiled.loops


def gpu_resources(compiled: Compiled) -> tuple[KernelResources, ...]:
    """Registers and spills of every Pallas-Triton kernel of a GPU program, as ptxas tells them.

    Raises ValueError where the program is not a GPU's.
    """
    if compiled.target.platform != "cuda":
        raise ValueError(f"registers are read from GPU programs, this one is for {compiled.target.name}")
    import nvidia.cu13

    assembler = pathlib.Path(next(iter(nvidia.cu13.__path__))) / "bin" / "ptxas"
    found = []
    for text in compiled.assembly:
        if not any(f".entry {kernel}(" in text for kernel in compiled.kernels):
            continue
        run = subprocess.run(
            [assembler, "-v", f"-arch={compiled.target.architecture}", "-o", os.devnull, "-"],
            input=text, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for part in run.stderr.split("Compiling entry function '")[1:]:
            kernel = part.split("'")[0]
            stored, loaded = map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
            registers = int(re.findall(r"Used (\d+) registers", part)[0])
            if kernel in compiled.kernels:
                found.append(KernelResources(kernel, registers, stored + loaded))
    return tuple(found)


# ----------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass(frozen=True)
class CompilationReport:
    """What a compiled program takes of each device. Sizes in bytes."""

    target: str
    devices: int
    seconds: float  # to compile, on this machine
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the outputs, written over donated arguments
    temporary_bytes: int
    memory_bytes: int  # of the device
    kernels: Mapping[str, int]
    multiply_adds: int  # of matrix products and convolutions, all devices together
    flops: float | None  # as the compiler counts them; None for GPUs, whose compiler does not
    bytes_accessed: float | None
    parameters: int | None = None

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs and temporaries together."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """Whether the program's memory is below the device's."""
        return self.peak_bytes <= self.memory_bytes

    @property
    def least_seconds(self) -> float | None:
        """The roofline's bound on one run: the slower of FLOPs at peak rate and bytes at full bandwidth."""
        if self.flops is None or self.bytes_accessed is None:
            return None
        target = TARGETS[self.target]
        return max(self.flops / target.peak_flops, self.bytes_accessed / target.bandwidth)

    def __str__(self) -> str:
        def gib(size: float) -> str:
            return f"{size / 2**30:.3f} GiB"

        lines = [f"target      {self.target}, {self.devices} device(s); compiled in {self.seconds:.1f} s"]
        if self.parameters is not None:
            lines.append(f"parameters  {self.parameters:,}")
        lines.append(
            f"memory      {gib(self.peak_bytes)} of {gib(self.memory_bytes)} a device"
            f"{'' if self.fits else ': DOES NOT FIT'} (arguments {gib(self.argument_bytes)}, outputs "
            f"{gib(self.output_bytes)}, of which donated {gib(self.alias_bytes)}, temporaries "
            f"{gib(self.temporary_bytes)})"
        )
        lines.append(f"products    {self.multiply_adds:.4e} multiply-adds of all devices' matrices and convolutions")
        if self.flops is not None and self.bytes_accessed is not None:
            lines.append(
                f"cost        {self.flops:.3e} FLOP, {self.bytes_accessed:.3e} bytes a device: "
                f"{1e3 * (self.least_seconds or 0):.3f} ms at least"
            )
        calls = ", ".join(f"{name} x{count}" for name, count in self.kernels.items())
        lines.append(f"kernels     {calls or 'none by hand'}")
        return "\n".join(lines)


def report(compiled: Compiled, parameters: int | None = None) -> CompilationReport:
    """Reads memory, cost and kernels off a compiled program; `parameters` is the caller's count, passed on."""
    memory: Any = compiled.executable.memory_analysis()
    cost = compiled.executable.cost_analysis() or {}
    return CompilationReport(
        target=compiled.target.name,
        devices=compiled.devices,
        seconds=compiled.seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        memory_bytes=compiled.target.memory_bytes,
        kernels=compiled.kernels,
        multiply_adds=compiled.multiply_adds,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        parameters=parameters,
    )


# ----------------------------------------------------------------------------------------------------------- models


def compile_model(
    id: str,
    target: str | Target,
    mesh: tuple[int, ...] = (1,),
    *,
    training: bool = False,
    batch_size: int = 8,
    **overrides: Any,
) -> CompilationReport:
    """Compiles a registered model for a device, or for a slice over which it is sharded.

    Args:
      id: one of `zoo.list_models()`.
      target: a name in TARGETS.
      mesh: devices along fsdp; fsdp and tensor; or data, fsdp and tensor (`zoo.train.sharding`).
      training: the training step (forward, backward, Adam; state donated), not the forward pass.
      batch_size: examples in the whole batch.
      **overrides: fields of the model's config, or dtype and param_dtype.

    Raises:
      ValueError: unknown id, target or option; a batch that the mesh does not divide; a model without a loss.
      CompilerMissingError, DeviceMemoryError: as of `compile_for`.
    """
    with _environment(**_NO_CUDNN):  # backends start with the first shape that is evaluated
        entry = registry.model(id)
        target = get_target(target)
        axes = train.sharding.MESH_AXES
        if not 1 <= len(mesh) <= len(axes):
            raise ValueError(f"a mesh has 1 to {len(axes)} axes ({', '.join(axes)}), got {mesh}")
        sizes = dict(zip(axes, {1: (1, *mesh, 1), 2: (1, *mesh), 3: mesh}[len(mesh)], strict=True))
        parts = math.prod(sizes[axis] for axis in train.sharding.BATCH_AXES)
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"batch_size must be a multiple of the {parts} parts of the batch in mesh {mesh}, got {batch_size}"
            )
        if training and entry.loss is None:
            raise ValueError(f"{id} has no training loss to compile")
        module = entry.build(overrides)
        inputs = entry.example_inputs(module.config, batch_size)
        device_mesh = make_mesh(target, sizes)
        batch_spec = PartitionSpec(train.sharding.BATCH_AXES)
        key = jax.eval_shape(lambda: jax.random.key(0))
        optimizer = train.build_optimizer(train.OptimizerConfig(name="adam"), total_steps=1)

        def create(key: jax.Array) -> train.TrainState:
            return train.create_state(lambda rng: module.init(rng, **inputs), optimizer, key)

        state = jax.eval_shape(create, key)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        shardings = train.sharding.state_shardings(state, device_mesh)
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            nn.unbox(state),
            shardings,
        )
        if training and entry.loss is not None:
            batch = inputs | (entry.example_targets(module.config, batch_size) if entry.example_targets else {})
            step: Callable[..., Any] = train.make_train_step(
                entry.loss(module), optimizer, state, rng_streams=("dropout", "sample")
            )
            arguments: tuple[Any, ...] = (state, batch)
        else:
            step = functools.partial(_apply, module)
            arguments = (state.evaluation_variables, inputs, state.rng)
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, arguments[0])
        compiled = compile_for(
            target,
            step,
            *arguments,
            mesh=device_mesh,
            in_shardings=(specs, batch_spec, PartitionSpec())[: len(arguments)],
        )
        return report(compiled, parameters)


def _apply(module: nn.Module, variables: Any, inputs: Mapping[str, Any], key: jax.Array) -> Any:
    return module.apply(variables, **inputs, rngs={"sample": key})

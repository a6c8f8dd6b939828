"""The device-free compiler: real programs, real kernels, several processes at once."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from zoo import compilation
from zoo.compilation import TARGETS, compile_for, devices, gpu_resources, make_mesh, report, tpu_schedules


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_matmul_compiles_for_every_target(target):
    found = report(compile_for(target, lambda a, b: a @ b, shape(1024, 512), shape(512, 256)), parameters=3)
    assert found.argument_bytes == 2 * (1024 * 512 + 512 * 256)
    assert found.output_bytes == 2 * 1024 * 256
    assert found.peak_bytes >= found.argument_bytes + found.output_bytes and found.fits
    assert found.multiply_adds == 1024 * 512 * 256
    assert found.kernels == {} if target.startswith("tpu") else "__triton" not in found.kernels
    if target.startswith("tpu"):
        assert found.flops == pytest.approx(2 * 1024 * 512 * 256, rel=0.01)
        assert found.least_seconds == found.bytes_accessed / TARGETS[target].bandwidth  # memory bound
    text = str(found)
    assert target in text and "parameters  3" in text and "1.3422e+08 multiply-adds" in text and "none by hand" in text


@pytest.mark.parametrize("target, axes", [("tpu-v5e", {"data": 4, "model": 2}), ("tpu-v5p", {"data": 32, "model": 4}),
                                          ("tpu-v6e", {"data": 2}), ("h100", {"data": 4, "model": 4})])  # fmt: skip
def test_sharded_program_holds_a_shard_of_each_argument(target, axes):
    mesh = make_mesh(target, axes)
    assert dict(mesh.shape) == axes
    compiled = compile_for(
        target, lambda weights, x: jnp.sum(x @ weights["w"]), {"w": shape(256, 512)}, shape(2048, 256),
        mesh=mesh, in_shardings=({"w": PartitionSpec(None, mesh.axis_names[-1])}, PartitionSpec("data")),
    )  # fmt: skip
    split = axes.get("model", axes["data"])
    assert report(compiled).argument_bytes == 2 * (256 * 512 // split + 2048 * 256 // axes["data"])
    assert "all-reduce" in compiled.executable.as_text()
    assert compiled.devices == mesh.size


def test_donated_arguments_are_not_counted_twice():
    compiled = compile_for("tpu-v5e", lambda x: x + 1, shape(1024, 1024), donate_argnums=0)
    assert report(compiled).peak_bytes == 2 * 1024 * 1024


def test_program_larger_than_the_device_is_told():
    with pytest.raises(compilation.DeviceMemoryError, match="tpu-v5e"):
        compile_for("tpu-v5e", lambda x: jnp.sin(x) + 1, shape(2**17, 2**16))
    assert not report(compile_for("h100", lambda x: jnp.sin(x) + 1, shape(2**19, 2**16))).fits


def tpu_kernel(x_ref, count_ref, out_ref):
    def body(i, total):
        return total + jnp.dot(x_ref[pl.ds(i * 128, 128)], x_ref[...].T, preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, 4, body, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = jax.lax.fori_loop(0, count_ref[0], lambda _, y: jnp.tanh(y), total)


def test_schedule_of_a_tpu_kernel():
    def function(x, count):
        return pl.pallas_call(
            tpu_kernel, grid=(16,), name="squares", out_shape=shape(16 * 128, 512, dtype=jnp.float32),
            in_specs=[pl.BlockSpec((512, 128), lambda i: (i, 0)), pl.BlockSpec(memory_space=pltpu.SMEM)],
            out_specs=pl.BlockSpec((128, 512), lambda i: (i, 0)),
        )(x, count)  # fmt: skip

    compiled = compile_for("tpu-v5e", function, shape(16 * 512, 128), shape(1, dtype=jnp.int32))
    assert compiled.kernels == {"squares": 1}
    grid, *inner = tpu_schedules(compiled)
    assert {loop.kernel for loop in (grid, *inner)} == {"squares"}
    assert grid.depth == 1 and grid.iterations == 18  # 16 steps and two to fill and drain the pipeline
    assert all(loop.depth == 2 and loop.bundles < grid.bundles for loop in inner)
    assert any(loop.mxu > 0 for loop in inner) or grid.mxu > 0
    assert any(loop.iterations is None for loop in inner)  # `count` is known to the program only
    with pytest.raises(ValueError, match="tpu-v5e"):
        gpu_resources(compiled)


def test_resources_of_a_gpu_kernel():
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.exp(x_ref[...])

    def function(x):
        return jnp.sum(pl.pallas_call(
            kernel, grid=(8,), name="exponential", out_shape=x, compiler_params=plgpu.CompilerParams(num_warps=4),
            in_specs=[pl.BlockSpec((128,), lambda i: (i,))], out_specs=pl.BlockSpec((128,), lambda i: (i,)),
        )(x))  # fmt: skip

    compiled = compile_for("h100", function, shape(1024, dtype=jnp.float32))
    assert compiled.kernels == {"exponential": 1}
    (resources,) = gpu_resources(compiled)
    assert resources.kernel == "exponential" and 4 <= resources.registers <= 64 and resources.spill_bytes == 0
    with pytest.raises(ValueError, match="h100"):
        tpu_schedules(compiled)


@pytest.mark.parametrize("call, message", [
    (lambda: devices("tpu-v5"), "unknown target 'tpu-v5'; did you mean 'tpu-v5"),
    (lambda: devices("cray"), "unknown target 'cray'; known: a100, h100, tpu-v5e"),
    (lambda: devices("tpu-v5e", 3), "multiple of 4 chips, got 3"),
    (lambda: devices("tpu-v5e", 512), "1 to 256 devices, got 512"),
    (lambda: devices("h100", 12), "multiple of 8, got 12"),
    (lambda: make_mesh("h100", {"data": 0}), "positive sizes, got {'data': 0}"),
    (lambda: compile_for("h100", jnp.sin, shape(8), in_shardings=(PartitionSpec("data"),)), "need a mesh"),
    (lambda: compile_for("h100", jnp.sin, shape(8), mesh=make_mesh("h100", {"data": 2}), in_shardings=()), "got 0"),
])  # fmt: skip
def test_wrong_calls_are_told(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compilation.CompilerMissingError, match=r"module libtpu.*zoo\[compile\]"):
        devices("tpu-v5e")
    monkeypatch.setattr(compilation.host, "machine", lambda: "arm64")
    with pytest.raises(compilation.CompilerMissingError, match="Linux on x86-64 only, this is Linux on arm64"):
        devices("h100")


CHILD = """
import os, jax, jax.numpy as jnp
before = dict(os.environ)
import zoo.compilation as c
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
jax.block_until_ready(jnp.ones(3) + 1)
print("first", flush=True); input()
assert c.compile_for("tpu-v6e", lambda a: a @ a, x).devices == c.compile_for("h100", lambda a: a @ a, x).devices
assert {k: os.environ[k] for k in os.environ if k not in before} == {}, "the environment is left as it was"
print("done", flush=True); input()
"""


def test_processes_compile_at_the_same_time(tmp_path):
    # Each holds its compilers until the other has used its own; the cache must neither be written nor warn.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-W", "error", "-c", CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(subprocess.Popen(command, **pipes))
        # The second starts with a cache that is there: JAX writes entries in place, and warns of one half written.
        assert one.stdout.readline() == "first\n"
        two = stack.enter_context(subprocess.Popen(command, **pipes))
        assert two.stdout.readline() == "first\n"
        written = set(os.listdir(tmp_path / "cache"))
        for process in (one, two):
            process.stdin.write("\n")
            process.stdin.flush()
        for process in (one, two):
            assert process.stdout.readline() == "done\n"
        for process in (one, two):
            process.communicate("\n")
            assert process.returncode == 0
    assert {name for name in os.listdir(tmp_path / "cache")} == written

"""Settings of every test: CPU, eight simulated devices, one compilation cache for all processes."""

import ctypes
import gc
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# A test compiles thousands of small programs and runs each once or twice: without LLVM's optimisations and with plain
# loops for fusions it takes a third less time. XLA's own passes over the program are all there.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

import jax
import pytest
from hypothesis import settings

LINUX = sys.platform == "linux"
# Gives freed memory back to the system, where the C library is glibc.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if LINUX else None

settings.register_profile("zoo", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("zoo")


def _resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if LINUX else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Gives a module's tests to one worker, or those of one `case` where they have cases.

    What a test has compiled and kept, the next one finds. Dealt out one by one, the tests of a module would have nearly
    every program traced and compiled by both workers.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            case = getattr(item, "callspec", None) and item.callspec.params.get("case")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{case}" if case else item.path.stem))


_bound = [5e9]


@pytest.fixture(autouse=True)
def bounded_memory():
    """JAX keeps every program that it has compiled; those of thousands of tests would fill the machine."""
    yield
    if _resident_bytes() > _bound[0]:
        jax.clear_caches()
        gc.collect()
        if _trim is not None:
            _trim(0)
        _bound[0] = max(5e9, _resident_bytes() + 1e9)

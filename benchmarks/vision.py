"""Latency of vision backbones on the CPU beside PyTorch: `python -m benchmarks.vision`.

Ours are folded and compiled, PyTorch's are timm's, in evaluation, eager. The two take turns in one process on the same
two threads, so that what else the machine does falls on both. Where timm does not have a network, another one of its
own of about equal multiply-adds is the yardstick, and the table names it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import zoo
from zoo.layers.conv_norm import fold

try:
    import torch
except ImportError:
    raise SystemExit("torch missing: install zoo[bench]") from None


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo and what it is held against."""

    id: str
    yardstick: str  # of timm


CASES = (
    Case("efficientformer_l1", "efficientformer_l1"),
    Case("efficientformer_l3", "efficientformer_l3"),
    Case("efficientformer_l7", "efficientformer_l7"),
)


def import_timm() -> object:
    """The module timm.

    torchvision, which it imports, does not load beside a PyTorch of another build (its wheels are for CUDA): then its
    two operators that are missed at import are declared. No network uses them.
    """
    try:
        import timm
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        import timm
    return timm


def ours(id: str, images: np.ndarray) -> Callable[[], object]:
    """A call of our network on images (B, height, width, 3)."""
    model = zoo.create(id)
    variables = fold(jax.jit(model.init)(jax.random.key(0), images[:1]))
    forward, on_device = jax.jit(model.apply), jax.device_put(images)
    return lambda: jax.block_until_ready(forward(variables, on_device))


def theirs(name: str, images: np.ndarray) -> Callable[[], object]:
    """A call of timm's network on the same images."""
    model = import_timm().create_model(name).eval()  # type: ignore[attr-defined]
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def forward() -> object:
        with torch.inference_mode():
            return model(tensor)

    return forward


def alternate(one: Callable[[], object], other: Callable[[], object], repeats: int) -> np.ndarray:
    """(2, 2, repeats): milliseconds of the clock and of the processor, of either, taking turns after a warm-up."""
    times = np.zeros((2, 2, repeats))
    for function in (one, other):
        function()
        function()
    for repeat in range(repeats):
        for row, function in enumerate((one, other)):
            clock, processor = time.perf_counter(), time.process_time()
            function()
            times[0, row, repeat] = 1e3 * (time.perf_counter() - clock)
            times[1, row, repeat] = 1e3 * (time.process_time() - processor)
    return times


def main(pattern: str = "", batches: tuple[int, ...] = (1, 8), repeats: int = 20, threads: int = 2) -> None:
    """Prints medians in milliseconds and their ratio; below 1 is faster than PyTorch.

    Args:
      pattern: only models whose id holds it.
      batches: images at once.
      repeats: timings of each.
      threads: of PyTorch.
    """
    torch.set_num_threads(threads)
    table = Table("model", "yardstick (timm)", "batch", "torch ms", "ours ms", "ratio", "of the fastest", "of CPU time")
    for case in (case for case in CASES if pattern in case.id):
        height, width = zoo.create(case.id).config.image_size
        for batch in batches:
            images = np.random.default_rng(0).standard_normal((batch, height, width, 3)).astype(np.float32)
            clock, processor = alternate(theirs(case.yardstick, images), ours(case.id, images), repeats)
            medians = np.median(clock, axis=1)
            table.add_row(
                case.id,
                case.yardstick,
                str(batch),
                f"{medians[0]:.1f}",
                f"{medians[1]:.1f}",
                f"{medians[1] / medians[0]:.2f}",
                f"{clock[1].min() / clock[0].min():.2f}",
                f"{np.median(processor[1]) / np.median(processor[0]):.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    tyro.cli(main)

"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def median_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median duration of a call that gives JAX arrays, after one call that does not count."""
    jax.block_until_ready(call())
    durations = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(call())
        durations.append(time.perf_counter() - start)
    return float(np.median(durations))

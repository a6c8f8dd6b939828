"""Temporary memory of every core grows linearly with time: the programs of `benchmarks.memory`, planned and not run."""

import pytest

from benchmarks.memory import PROGRAMS, temporary_bytes

# Tested beside their other properties.
ELSEWHERE = {"attention", "prob_sparse_attention", "sparse_attention"}
QUICK = {"linear_attention", "delta_rule", "attention_received", "spanning_window_attention", "contextual_attention"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PROGRAMS if n not in ELSEWHERE],
)
def test_temporary_memory_is_linear_in_time(name):
    short, long = (temporary_bytes(name, length) for length in (1024, 16384))
    assert long <= 1.1 * 16 * short  # a map of all pairs would be 256 times as large

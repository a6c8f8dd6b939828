"""Temporary memory of every core grows linearly with time: the programs of `benchmarks.memory`, planned and not run."""

import itertools

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
    sizes = [temporary_bytes(name, length) for length in (1024, 4096, 16384)]
    assert all(after <= 4.4 * before for before, after in itertools.pairwise(sizes)), sizes

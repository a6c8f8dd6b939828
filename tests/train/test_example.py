import doctest

import pytest

import zoo.train
import zoo.train.metrics


@pytest.mark.parametrize("module", [zoo.train, zoo.train.metrics])
def test_docstring_example_runs(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0

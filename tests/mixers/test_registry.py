"""Mixers by name."""

import pytest

from zoo import mixers


def test_created_by_name_with_options():
    model = mixers.create("softmax", features=16, heads=2, causal=False)
    assert (model.features, model.heads, model.causal) == (16, 2, False)


def test_defaults_are_for_mixers_that_have_them():
    model = mixers.create("softmax", features=16, defaults={"heads": 2, "memory_depth": 3})
    assert model.heads == 2
    assert mixers.create("softmax", features=16, defaults={"heads": 2}, heads=4).heads == 4


def test_names_and_options_are_listed():
    assert "softmax" in mixers.names()
    assert {"causal", "dtype", "heads", "window"} <= set(mixers.options("softmax"))
    assert not {"features", "parent", "name"} & set(mixers.options("softmax"))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "unknown mixer 'sofmax'; did you mean 'softmax'", lambda: mixers.create("sofmax", features=8)),
        (ValueError, "unknown mixer 'qqq'; known: .*softmax", lambda: mixers.options("qqq")),
        (TypeError, "'softmax' has no option 'head'; .*heads", lambda: mixers.create("softmax", features=8, head=2)),
        (ValueError, "registered already", lambda: mixers.register("softmax")(mixers.Mixer)),
    ],
)
def test_wrong_calls_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()

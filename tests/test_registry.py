import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

import zoo
from zoo import registry
from zoo.registry import Paper, Variant


@dataclasses.dataclass(frozen=True)
class LineConfig:
    slopes: tuple[float, ...] = (1.0,)


class Line(nn.Module):
    config: LineConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        return x * sum(self.config.slopes) + self.param("offset", nn.initializers.zeros, ())


@pytest.fixture
def line(monkeypatch):
    """A paper with one model, registered for one test only."""
    zoo.list_models()  # papers load once, into the real tables
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "_PAPERS", dict(registry._PAPERS))
    paper = Paper("line", "Lines", "Euclid", "Elements", -300, "Two points suffice.")
    add = registry.register(
        paper, Variant("line_steep", LineConfig((3.0,)), parameters=1),
        example_inputs=lambda config, batch: {"x": np.ones((batch, len(config.slopes)), np.float32)},
    )  # fmt: skip
    add(Line)
    return add


def test_models_are_found_by_pattern_and_papers_by_either_name(line):
    assert zoo.list_models("line_*") == ["line_steep"]
    assert zoo.paper("line") is zoo.paper("line_steep")


def test_create_init_apply(line):
    model = zoo.create("line_steep", slopes=[1.0, 2.0], dtype="bfloat16")
    assert model.config == LineConfig((1.0, 2.0)) and model.dtype == "bfloat16"  # lists become hashable tuples
    inputs = zoo.example_inputs("line_steep", batch_size=4, slopes=[1.0, 2.0])
    assert inputs["x"].shape == (4, 2)
    variables = model.init(jax.random.key(0), **inputs)
    np.testing.assert_array_equal(model.apply(variables, **inputs), 3.0 * inputs["x"])


def test_an_id_is_registered_once(line):
    with pytest.raises(ValueError, match="'line_steep' is registered twice"):
        line(Line)


def ids():
    """All, those slow that train a memory in each of many layers and have a smaller sibling: tracing takes seconds."""
    for id in zoo.list_models():
        slow = id.startswith(("titans_", "miras_")) and "_170m" not in id
        yield pytest.param(id, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("id", ids())
def test_published_variants_have_the_published_number_of_parameters(id):
    expected = registry.model(id).variant.parameters
    inputs = zoo.example_inputs(id, 1)
    shapes = jax.eval_shape(lambda: zoo.create(id).init(jax.random.key(0), **inputs))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert expected is None or count == expected


def test_every_paper_has_a_module_an_adapter_and_an_experiment():
    from pathlib import Path

    root = Path(__file__).parents[1]
    for slug in registry.papers():
        assert any((root / "zoo/papers" / name).exists() for name in (f"{slug}.py", slug))
        assert (root / f"tests/goldens/adapters/{slug}.py").exists()
        assert (root / f"experiments/{slug}.py").exists()

"""Records of papers and their published variants, and the functions that find them by name.

A paper's module registers its networks when it is imported; nothing is imported before the first question:

    PAPER = Paper(slug="informer", title="...", ...)

    @register(PAPER, Variant("informer_etth1_m24", InformerConfig(...), parameters=11_330_055), ...,
              example_inputs=example_inputs, weight_rules=weight_rules)
    class Informer(nn.Module):
        config: InformerConfig
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from zoo.errors import unknown

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.weights import PackagedFile, Rule

Fidelity = Literal["official code", "library code", "reconstruction"]
ModuleClass = TypeVar("ModuleClass", bound=type)


@dataclasses.dataclass(frozen=True)
class Paper:
    """What a paper is and where its facts come from.

    Attributes:
      slug: its module's name in `zoo.papers`.
      title, authors, venue, year: the citation; `authors` as "First Author et al.".
      arxiv: identifier such as "2012.07436", or None.
      claim: one sentence, what the paper says its idea buys.
      code: address of the published code, or None.
      code_license: its licence, or None where it has none.
      fidelity: what the numbers are checked against. "reconstruction": no code was published for (some of) it.
      remarks: what a user must know of the sources, in a sentence or two.
    """

    slug: str
    title: str
    authors: str
    venue: str
    year: int
    claim: str
    arxiv: str | None = None
    code: str | None = None
    code_license: str | None = None
    fidelity: Fidelity = "official code"
    remarks: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published configuration.

    Attributes:
      id: the name users say.
      config: a frozen dataclass.
      parameters: number of trainable parameters of the published code, or None where it is not known.
      checkpoint: where the authors' weights are: "hf://organisation/repository/file", a file inside a package, or None.
    """

    id: str
    config: Any
    parameters: int | None = None
    checkpoint: str | PackagedFile | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A variant with the network that is built from it, as `register` keeps it."""

    paper: Paper
    variant: Variant
    module: type
    example_inputs: Callable[[Any, int], dict[str, Any]]
    weight_rules: Callable[[Any], Sequence[Rule]] | None
    loss: Callable[[Any], Callable] | None
    example_targets: Callable[[Any, int], dict[str, Any]] | None

    def config(self, overrides: Mapping[str, Any]) -> Any:
        """The variant's config with fields replaced; ValueError for a field it does not have."""
        known = [field.name for field in dataclasses.fields(self.variant.config)]
        for name in overrides:
            if name not in known:
                raise unknown(f"option of {self.variant.id}", name, known)
        values = {name: _hashable(value) for name, value in overrides.items()}
        return dataclasses.replace(self.variant.config, **values)

    def build(self, overrides: Mapping[str, Any]) -> nn.Module:
        """The Flax module; overrides are fields of the config, or of the module (dtype, param_dtype)."""
        own = {field.name for field in dataclasses.fields(self.module)} - {"config", "name", "parent"}
        options = {name: value for name, value in overrides.items() if name in own}
        rest = {name: value for name, value in overrides.items() if name not in own}
        return self.module(config=self.config(rest), **options)


_MODELS: dict[str, Model] = {}
_PAPERS: dict[str, Paper] = {}


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def register(
    paper: Paper,
    *variants: Variant,
    example_inputs: Callable[[Any, int], dict[str, Any]],
    weight_rules: Callable[[Any], Sequence[Rule]] | None = None,
    loss: Callable[[Any], Callable] | None = None,
    example_targets: Callable[[Any, int], dict[str, Any]] | None = None,
) -> Callable[[ModuleClass], ModuleClass]:
    """Registers a Flax module with one field `config` under the ids of its variants.

    Args:
      paper: the record of the paper; may be shared by several modules.
      *variants: the published configurations this module is built from.
      example_inputs: (config, batch size) -> keyword arguments of the module's `__call__`, numpy arrays.
      weight_rules: config -> table of rules from the published parameter names to ours.
      loss: module -> loss function of `zoo.train`, (params, model_state, batch, rngs, train) -> (loss, (model_state,
        metrics)); what `zoo compile --train` compiles and the experiment trains.
      example_targets: (config, batch size) -> the entries that `loss` reads from its batch beside the inputs.
    """

    def add(module: ModuleClass) -> ModuleClass:
        register_analysis(paper)
        for variant in variants:
            if variant.id in _MODELS:
                raise ValueError(f"model id {variant.id!r} is registered twice")
            _MODELS[variant.id] = Model(paper, variant, module, example_inputs, weight_rules, loss, example_targets)
        return module

    return add


def register_analysis(paper: Paper) -> None:
    """Registers a paper that studies networks of others and has none of its own."""
    if _PAPERS.setdefault(paper.slug, paper) != paper:
        raise ValueError(f"two records for the paper {paper.slug!r}")


@functools.cache
def _load_papers() -> None:
    import zoo.papers

    for module in pkgutil.iter_modules(zoo.papers.__path__):
        importlib.import_module(f"zoo.papers.{module.name}")


def model(id: str) -> Model:
    """The registered model of that id. Raises ValueError, naming near ids, for an unknown one."""
    _load_papers()
    if id not in _MODELS:
        raise unknown("model", id, _MODELS, "`zoo.list_models()` lists all")
    return _MODELS[id]


def models() -> dict[str, Model]:
    """All registered models by id."""
    _load_papers()
    return dict(sorted(_MODELS.items()))


def papers() -> dict[str, Paper]:
    """All papers by slug."""
    _load_papers()
    return dict(sorted(_PAPERS.items()))


def list_models(pattern: str = "*") -> list[str]:
    """Ids of all models that match a shell-style pattern, sorted.

    >>> import zoo
    >>> zoo.list_models("informer_etth1_m2*")
    ['informer_etth1_m24']
    """
    return fnmatch.filter(models(), pattern)


def paper(name: str) -> Paper:
    """The record of a paper, by its slug or by a model's id. Raises ValueError for an unknown name."""
    known = papers()
    if name in known:
        return known[name]
    if name in _MODELS:
        return _MODELS[name].paper
    raise unknown("paper", name, [*known, *_MODELS])


def create(id: str, **overrides: Any) -> nn.Module:
    """Builds a model as a plain Flax module.

    Args:
      id: one of `list_models()`.
      **overrides: fields of the variant's config (or `dtype`, `param_dtype`) to change.

    Returns:
      A module for `module.init(rng, **zoo.example_inputs(id))` and `module.apply(variables, ...)`.

    Raises:
      ValueError: unknown id or option (near ones are named), or a value the config refuses.
    """
    return model(id).build(overrides)


def example_inputs(id: str, batch_size: int = 2, **overrides: Any) -> dict[str, Any]:
    """Arrays of the right shapes and dtypes for a model, as keyword arguments of its `init` and `apply`.

    Args:
      id: one of `list_models()`.
      batch_size: at least 1.
      **overrides: as for `create`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    entry = model(id)
    return entry.example_inputs(entry.build(overrides).config, batch_size)


def load_weights(id: str, source: Any = None, **overrides: Any) -> dict[str, Any]:
    """Reads published weights into the variables of a model.

    Args:
      id: one of `list_models()`.
      source: a state dict {published name: array}, the path of a .safetensors, .pth (read weights-only) or .gguf file,
        or "hf://organisation/repository/file"; None for the checkpoint its authors published.
      **overrides: as for `create`.

    Returns:
      Flax variables, {"params": ..., and further collections}.

    Raises:
      ValueError: unknown id; no source; a name left over on either side or a wrong shape, all listed.
    """
    from zoo import weights

    entry = model(id)
    source = entry.variant.checkpoint if source is None else source
    if source is None:
        raise ValueError(f"no checkpoint of {id} is published; give a source")
    if isinstance(source, weights.PackagedFile):
        source = source.path()
    if entry.weight_rules is None:
        raise ValueError(f"{id} has no published parameter names to load from")
    module = entry.build(overrides)
    inputs = entry.example_inputs(module.config, 1)
    return weights.load(module, inputs, entry.weight_rules(module.config), source)

r"""Maps published parameter names to the zoo's: a table of rules, read forwards to import and backwards to export.

A rule pairs a regular expression of the published name, matched as a whole, with a path of the Flax variables. What
its groups matched is put into the path, and a named transform changes the layout:

    RULES = [
        Rule(r"encoder\.layers\.(\d+)\.fc1\.weight", "params/encoder/layer_{0}/fc1/kernel", "linear"),
        Rule(r"encoder\.layers\.(\d+)\.fc1\.bias", "params/encoder/layer_{0}/fc1/bias"),
        *layer("batch_norm", r"encoder\.norm", "encoder/norm"),  # weight, bias, running statistics
        Rule(r"attn\.qkv\.weight", ("params/q/kernel", "params/k/kernel", "params/v/kernel"), "linear"),  # split
        Rule((r"q\.bias", r"k\.bias", r"v\.bias"), "params/qkv/bias"),  # merge
        Rule(r".*\.position_ids", None),  # left out
    ]
    variables = convert(state_dict, RULES, jax.eval_shape(model.init, key, x))
    state_dict = to_published(variables, RULES)

The first rule that matches a name decides. Nothing is guessed: a name left over on either side is an error.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from zoo.errors import unknown


class NameMapError(ValueError):
    """A checkpoint and a model that do not fit; the message lists every name and both shapes."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, both functions of one array.

    Attributes:
      forward: published array to ours.
      inverse: ours to the published one.
      ndim: the number of axes `forward` expects; None where any number will do.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    ndim: int | None = None


def _permutation(*axes: int) -> Transform:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(lambda array: array.transpose(axes), lambda array: array.transpose(back), len(axes))


def _pointwise(dims: int) -> Transform:
    ones = (1,) * dims

    def forward(array: np.ndarray) -> np.ndarray:
        if array.shape[2:] != ones:
            raise ValueError(f"a pointwise convolution's kernel is of size 1, got shape {array.shape}")
        return array.reshape(array.shape[:2]).T

    return Transform(forward, lambda array: array.T.reshape(array.shape[::-1] + ones), 2 + dims)


def _depthwise(dims: int) -> Transform:
    def forward(array: np.ndarray) -> np.ndarray:
        if array.shape[1] != 1:
            raise ValueError(f"a depthwise kernel is (channels, 1, ...), got shape {array.shape}")
        return np.moveaxis(array[:, 0], 0, -1)

    return Transform(forward, lambda array: np.moveaxis(array, -1, 0)[:, None], 2 + dims)


def _conv_transpose(dims: int) -> Transform:
    # torch's transposed convolution is the gradient of a convolution, Flax's is a convolution of the dilated input: the
    # same kernel read backwards.
    spatial = tuple(range(dims))
    order = (*range(2, 2 + dims), 0, 1)
    back = (dims, dims + 1, *spatial)
    return Transform(
        lambda array: np.flip(array.transpose(order), spatial),
        lambda array: np.flip(array, spatial).transpose(back),
        2 + dims,
    )


def vector(ndim: int, axis: int) -> Transform:
    """The transform of a published vector that was given unit axes: `vector(4, 1)` takes (1, C, 1, 1) to (C,)."""
    shape = tuple(-1 if i == axis else 1 for i in range(ndim))

    def forward(array: np.ndarray) -> np.ndarray:
        if array.size != array.shape[axis]:
            raise ValueError(f"expected only axis {axis} to be longer than 1, got shape {array.shape}")
        return array.reshape(-1)

    return Transform(forward, lambda array: array.reshape(shape), ndim)


_NONE = Transform(lambda array: array, lambda array: array)

TRANSFORMS: dict[str, Transform] = {
    "none": _NONE,
    "embedding": Transform(_NONE.forward, _NONE.inverse, 2),
    "linear": _permutation(1, 0),  # (out, in) -> (in, out)
}
for _dims in (1, 2, 3):
    # (out, in / groups, *kernel) -> (*kernel, in / groups, out), for grouped and depthwise `nn.Conv` too.
    TRANSFORMS[f"conv{_dims}d"] = _permutation(*range(2, 2 + _dims), 1, 0)
    # (out, in, 1, ...) -> (in, out): a convolution of size 1 that is an `nn.Dense` here.
    TRANSFORMS[f"pointwise{_dims}d"] = _pointwise(_dims)
    # (channels, 1, *kernel) -> (*kernel, channels).
    TRANSFORMS[f"depthwise{_dims}d"] = _depthwise(_dims)
    # (in, out, *kernel) -> (*kernel reversed, in, out), for `nn.ConvTranspose`.
    TRANSFORMS[f"conv_transpose{_dims}d"] = _conv_transpose(_dims)


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What becomes of the published parameters whose names match.

    Attributes:
      published: a regular expression of the whole published name. It must be readable backwards: literals (dots
        escaped), groups `(...)`, and `(?:...)?` for what an export leaves out. A tuple of them, with the same groups,
        names arrays that are merged: transformed, then concatenated along `axis`.
      path: "collection/module/.../name" with `{0}`, `{1}`, ... for the groups, each of which must occur. A tuple of
        paths splits the transformed array along `axis`. None leaves the parameter out (buffers that are recomputed).
      transform: one of `TRANSFORMS` by name, or a `Transform`.
      axis: of our layout, along which to split or merge.
      sections: relative sizes of the parts; equal by default. A merge needs them for the way back only.

    Raises ValueError for a rule that cannot be read in both directions.
    """

    published: str | tuple[str, ...]
    path: str | tuple[str, ...] | None
    transform: str | Transform = "none"
    axis: int = -1
    sections: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.transform, str) and self.transform not in TRANSFORMS:
            raise unknown("transform", self.transform, TRANSFORMS, "an own one is a Transform")
        if isinstance(self.published, tuple) and isinstance(self.path, tuple):
            raise ValueError(f"a rule splits or merges, not both: {self.published} -> {self.path}")
        parts = max(len(self.patterns), len(self.paths))
        if self.sections is not None and (len(self.sections) != parts or min(self.sections) < 1):
            raise ValueError(f"sections must be {parts} positive numbers, one a part, got {self.sections}")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if self.path is None:
            return
        groups = [group for pattern in self.patterns for group in _read_pattern(pattern)[1]]
        if groups != _read_pattern(self.patterns[0])[1] * len(self.patterns):
            raise ValueError(f"merged names must have the same groups: {self.published}")
        for path in self.paths:
            fields = {part for part in _read_path(path) if isinstance(part, int)}
            if fields != set(range(len(groups) // len(self.patterns))):
                raise ValueError(f"every group of {self.published!r} must occur in the path, and no other: {path!r}")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The published patterns, one or more."""
        return (self.published,) if isinstance(self.published, str) else self.published

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, none, one or more."""
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path

    @property
    def layout(self) -> Transform:
        """The transform itself."""
        return TRANSFORMS[self.transform] if isinstance(self.transform, str) else self.transform


_Template = tuple[str | int, ...]  # literals and group numbers


def _closing(pattern: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth, i = 0, start
    while i < len(pattern):
        if pattern[i] == "\\":
            i += 1
        elif pattern[i] == "[":
            i = pattern.index("]", i + 2)
        else:
            depth += {"(": 1, ")": -1}.get(pattern[i], 0)
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unbalanced parentheses in {pattern!r}")


def _read_pattern(pattern: str) -> tuple[_Template, list[str]]:
    """A published pattern as a template of the name it stands for, and the sub-patterns of its groups."""
    template: list[str | int] = []
    groups: list[str] = []
    i = 0
    while i < len(pattern):
        character = pattern[i]
        following = pattern[i + 1 : i + 2]
        if character == "\\" and not following.isalnum():
            template.append(following)
            i += 2
        elif character == "(":
            end = _closing(pattern, i)
            inside = pattern[i + 1 : end]
            if inside.startswith("?:") and pattern[end + 1 : end + 2] == "?" and "(" not in inside:
                i = end + 2
                continue
            if "(" in inside or inside.startswith("?"):
                raise ValueError(f"groups of {pattern!r} must be plain, and optional parts '(?:...)?'")
            template.append(len(groups))
            groups.append(inside)
            i = end + 1
        elif character in r"\[]*+?{}|^$)":
            raise ValueError(f"{pattern!r} cannot be read backwards because of {character!r}; put it into a group")
        else:
            template.append(character)
            i += 1
    return tuple(template), groups


def _read_path(path: str) -> _Template:
    parts: list[str | int] = []
    for literal, field, specification, conversion in string.Formatter().parse(path):
        parts.append(literal)
        if field is None:
            continue
        if not field.isdigit() or specification or conversion:
            raise ValueError(f"a path's fields are {{0}}, {{1}}, ...: {path!r}")
        parts.append(int(field))
    return tuple(parts)


def _fill(template: _Template, groups: Sequence[str]) -> str:
    return "".join(part if isinstance(part, str) else groups[part] for part in template)


def _path_expression(path: str, groups: Sequence[str]) -> re.Pattern[str]:
    """The regular expression of the paths that a template makes, with group k named gk."""
    seen: set[int] = set()
    expression = ""
    for part in _read_path(path):
        if isinstance(part, str):
            expression += re.escape(part)
        elif part in seen:
            expression += f"(?P=g{part})"
        else:
            seen.add(part)
            expression += f"(?P<g{part}>{groups[part]})"
    return re.compile(expression)


_LAYERS: dict[str, dict[str, tuple[str, str]]] = {  # published leaf -> our collection and leaf
    "norm": {"weight": ("params", "scale"), "bias": ("params", "bias")},
    "embedding": {"weight": ("params", "embedding")},
    "batch_norm": {
        "weight": ("params", "scale"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    },
}


def layer(kind: str, published: str, path: str) -> list[Rule]:
    r"""The rules of one layer: `layer("linear", r"blocks\.(\d+)\.fc", "block_{0}/fc")` is its kernel and its bias.

    Args:
      kind: "norm" (weight and bias, where there), "batch_norm" (with running statistics), "embedding", or the name of a
        transform of kernels: "linear", "conv2d", ...
      published: a pattern of the layer's name.
      path: the module's path, without a collection.
    """
    if kind in _LAYERS:
        rules = [
            Rule(rf"{published}\.{leaf}", f"{collection}/{path}/{ours}")
            for leaf, (collection, ours) in _LAYERS[kind].items()
        ]
        return rules + ([Rule(rf"{published}\.num_batches_tracked", None)] if kind == "batch_norm" else [])
    if kind not in TRANSFORMS:
        raise unknown("kind of layer", kind, [*_LAYERS, *TRANSFORMS])
    return [
        Rule(rf"{published}\.weight", f"params/{path}/kernel", kind),
        Rule(rf"{published}\.bias", f"params/{path}/bias"),
    ]


def under(published: str, path: str, rules: Iterable[Rule]) -> list[Rule]:
    r"""The same rules for a part of a larger network: `under(r"text\.(\d+)", "text_{0}", RULES)`.

    A dot joins the names and a slash the paths, behind the collection; the groups of `published` count first.
    """
    shift = re.compile(published).groups

    def deeper(template: str) -> str:
        collection, _, rest = template.partition("/")
        rest = re.sub(r"\{(\d+)\}", lambda field: f"{{{int(field[1]) + shift}}}", rest)
        return f"{collection}/{path}/{rest}"

    placed = []
    for rule in rules:
        patterns = tuple(rf"{published}\.{pattern}" for pattern in rule.patterns)
        paths = tuple(deeper(template) for template in rule.paths)
        placed.append(
            dataclasses.replace(
                rule,
                published=patterns[0] if isinstance(rule.published, str) else patterns,
                path=None if rule.path is None else paths[0] if isinstance(rule.path, str) else paths,
            )
        )
    return placed


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Nested variables as {"collection/module/.../name": leaf}; boxes with logical axis names are taken off."""
    return traverse_util.flatten_dict(nn.meta.unbox(dict(variables)), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


class _Problems:
    """What does not fit, gathered by kind."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, line: str) -> None:
        self.lines[kind].append(line)

    def report(self, what: str) -> None:
        if not self.lines:
            return
        count = sum(map(len, self.lines.values()))
        sections = [f"  {kind}:\n    " + "\n    ".join(lines) for kind, lines in self.lines.items()]
        raise NameMapError(f"{what} ({count} problem{'s' * (count > 1)})\n" + "\n".join(sections))


def _kind(dtype: Any) -> str:
    for kind in (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_):
        if jnp.issubdtype(dtype, kind):
            return kind.__name__
    return str(dtype)


def _split(array: np.ndarray, rule: Rule, parts: int) -> list[np.ndarray]:
    """Cuts an array into a rule's parts. Raises ValueError for a size that the sections do not divide."""
    if parts == 1:
        return [array]
    sections = rule.sections or (1,) * parts
    if not -array.ndim <= rule.axis < array.ndim or array.shape[rule.axis] % sum(sections):
        raise ValueError(f"axis {rule.axis} of shape {array.shape} does not divide into sections {sections}")
    unit = array.shape[rule.axis] // sum(sections)
    return np.split(array, [int(cut) * unit for cut in np.cumsum(sections)[:-1]], rule.axis)


_ALIGNMENT = 64  # bytes: what JAX on a CPU asks of an array that it takes as it is, without a copy of its own


def _aligned(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array, contiguous and aligned; itself where it is."""
    if array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    size = array.size * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    out = buffer[start : start + size].view(dtype).reshape(array.shape)
    out[...] = array
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class _Piece:
    """What one source gives to one destination: part `part` of the `count` that `rule` makes it of."""

    rule: Rule
    part: int
    count: int
    source: str
    array: np.ndarray


def _assemble(destination: str, pieces: list[_Piece], problems: _Problems) -> np.ndarray | None:
    """One array of all pieces of a destination, or None and a line in `problems`."""
    pieces = sorted(pieces, key=lambda piece: piece.part)
    first = pieces[0]
    sources = " + ".join(f"{piece.source} {piece.array.shape}" for piece in pieces)
    if len({piece.part for piece in pieces}) < len(pieces):
        problems.add("names that meet in one place", f"{sources} -> {destination}")
    elif len(pieces) < first.count:
        problems.add(f"arrays made of {first.count} of which some are missing", f"{sources} -> {destination}")
    elif first.count == 1:
        return first.array
    else:
        try:
            return np.concatenate([piece.array for piece in pieces], first.rule.axis)
        except ValueError:
            problems.add("arrays whose parts do not fit together", f"{sources} -> {destination}")
    return None


def _first_match(name: str, table: list[tuple[re.Pattern[str], Rule, int]]) -> tuple[re.Match[str], Rule, int] | None:
    for expression, rule, part in table:
        match = expression.fullmatch(name)
        if match is not None:
            return match, rule, part
    return None


def convert(state_dict: Mapping[str, np.ndarray], rules: Iterable[Rule], target: Mapping[str, Any]) -> dict[str, Any]:
    """Published parameters as Flax variables.

    Args:
      state_dict: {published name: array}.
      rules: the table; the first rule that matches a name decides.
      target: the variables' shapes and dtypes, as `jax.eval_shape(model.init, ...)` gives them (arrays will do);
        logical axis names are ignored.

    Returns:
      Nested numpy arrays of exactly the target's structure, shapes and dtypes.

    Raises:
      NameMapError: names left over on either side, names that meet in one place, shapes that differ. Lists them all.
    """
    expected = flatten(target)
    table = [(re.compile(pattern), rule, part) for rule in rules for part, pattern in enumerate(rule.patterns)]
    problems = _Problems()
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    refused: set[str] = set()
    for name, published in state_dict.items():
        array = np.asarray(published)
        found = _first_match(name, table)
        if found is None:
            problems.add("published names without a rule", f"{name} {array.shape}")
            continue
        match, rule, part = found
        paths = [_fill(_read_path(path), match.groups()) for path in rule.paths]
        if not paths:
            continue
        try:
            if rule.layout.ndim not in (None, array.ndim):
                raise ValueError(f"{rule.transform!r} takes {rule.layout.ndim} axes, got shape {array.shape}")
            sections = _split(rule.layout.forward(array), rule, len(paths))
        except (ValueError, IndexError) as error:
            problems.add("arrays that their rule does not take", f"{name} -> {', '.join(paths)}: {error}")
            refused.update(paths)
            continue
        for path, section in zip(paths, sections, strict=True):
            want = expected.get(path)
            if want is not None and _kind(section.dtype) == _kind(want.dtype):
                # Here already, so that no transposed view keeps the published array in memory.
                section = _aligned(section, want.dtype)
            pieces[path].append(_Piece(rule, part, len(rule.patterns), name, section))

    result = {}
    for path, given in pieces.items():
        sources = " + ".join(f"{piece.source} {piece.array.shape}" for piece in given)
        if path not in expected:
            problems.add("published names whose place the model does not have", f"{sources} -> {path}")
            continue
        want = expected[path]
        ours = _assemble(path, given, problems)
        if ours is None:
            continue
        if ours.shape != tuple(want.shape):
            problems.add("shapes that differ", f"{sources} -> {path} {tuple(want.shape)}")
        elif _kind(ours.dtype) != _kind(want.dtype):
            problems.add("dtypes that differ", f"{sources} {ours.dtype} -> {path} {want.dtype}")
        else:
            result[path] = _aligned(ours, want.dtype)
    for path, want in expected.items():
        if path not in pieces and path not in refused:
            problems.add("the model's parameters without a published name", f"{path} {tuple(want.shape)}")
    problems.report("the checkpoint does not fit the model")
    return unflatten({path: result[path] for path in expected})


def to_published(variables: Mapping[str, Any], rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Flax variables under their published names and in their published layout: `convert` backwards.

    What `convert` leaves out stays out; of names with an optional part, the one without it is given.

    Raises NameMapError for variables that no rule leads to, and for splits of which a part is missing.
    """
    table, templates = [], {}
    for rule in rules:
        if rule.paths:
            read = [_read_pattern(pattern) for pattern in rule.patterns]
            templates[rule] = [template for template, _ in read]
            table += [(_path_expression(path, read[0][1]), rule, part) for part, path in enumerate(rule.paths)]
    problems = _Problems()
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    for path, leaf in flatten(variables).items():
        ours = np.asarray(leaf)
        found = _first_match(path, table)
        if found is None:
            problems.add("variables without a rule", f"{path} {ours.shape}")
            continue
        match, rule, part = found
        groups = [match[f"g{k}"] for k in range(len(match.groups()))]
        names = [_fill(template, groups) for template in templates[rule]]
        try:
            sections = _split(ours, rule, len(names))
        except ValueError as error:
            problems.add("variables that their rule does not take", f"{path} -> {', '.join(names)}: {error}")
            continue
        for name, section in zip(names, sections, strict=True):
            pieces[name].append(_Piece(rule, part, len(rule.paths), path, section))

    published = {}
    for name, given in pieces.items():
        whole = _assemble(name, given, problems)
        if whole is None:
            continue
        try:
            array = given[0].rule.layout.inverse(whole)
        except (ValueError, IndexError) as error:
            problems.add(
                "variables that their rule does not take", f"{given[0].source} {whole.shape} -> {name}: {error}"
            )
            continue
        published[name] = np.ascontiguousarray(array).reshape(array.shape)
    problems.report("the variables do not fit the rules")
    return published

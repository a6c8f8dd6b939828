"""Published parameter names of the block, the two cores and what holds them together."""

from __future__ import annotations

import numpy as np

from zoo.papers.cape.model import CAPEConfig
from zoo.weights.names import Rule, Transform, layer, under


def _pairs(array: np.ndarray) -> np.ndarray:
    """A complex array as floats with a last axis (re, im); one that is so already stays."""
    return np.stack([array.real, array.imag], -1) if np.iscomplexobj(array) else array


def _spectral(dims: int) -> Transform:
    """(in, out, *modes), complex or with pairs, to (*modes, in, out, 2), and back to pairs."""
    order = (*range(2, 2 + dims), 0, 1, 2 + dims)
    back = tuple(int(axis) for axis in np.argsort(order))

    def forward(array: np.ndarray) -> np.ndarray:
        pairs = _pairs(array)
        if pairs.ndim != 3 + dims:
            raise ValueError(f"a spectral kernel has {2 + dims} axes and (re, im), got shape {array.shape}")
        return pairs.transpose(order)[None] if dims == 2 else pairs.transpose(order)

    return Transform(forward, lambda array: (array[0] if dims == 2 else array).transpose(back))


def _spectral_rule(published: str, path: str, dims: int) -> Rule:
    names = rf"{published}\.weights1" if dims == 1 else (rf"{published}\.weights1", rf"{published}\.weights2")
    return Rule(names, f"params/{path}/kernel", _spectral(dims), axis=0)


def _transposed(dims: int) -> Transform:
    """(in, out, *size) to (*size, in, out)."""
    order = (*range(2, 2 + dims), 0, 1)
    back = tuple(int(axis) for axis in np.argsort(order))
    return Transform(lambda array: array.transpose(order), lambda array: array.transpose(back), 2 + dims)


def block_rules(config: CAPEConfig) -> list[Rule]:
    """Names of the block."""
    dims = config.dims
    point = f"pointwise{dims}d"
    table = [
        *layer(f"conv{dims}d", r"CNN_0", "enter"),
        _spectral_rule(r"CNN_SC", "spectral", dims),
        *layer(point, r"CNN_AC", "pointwise"),
        Rule(r"CNN_AD\.weight", "params/depthwise", f"depthwise{dims}d"),
        *layer(point, r"CNN_1", "residual"),
        *layer(point, r"CNN_2", "leave"),
        Rule(r"LN\.weight", "params/scale"),
        Rule(r"LN\.bias", "params/bias"),
    ]
    for index in range(3):
        table += layer("linear", rf"fc{index}a", f"gate_hidden_{index}")
        table += layer("linear", rf"fc{index}b", f"gate_out_{index}")
    return table


def _fno(dims: int, path: str) -> list[Rule]:
    return [
        *layer("linear", r"fc0", f"{path}enter"),
        _spectral_rule(r"conv(\d)", path + "spectral_{0}", dims),
        *layer(f"pointwise{dims}d", r"w(\d)", path + "pointwise_{0}"),
        *layer("linear", r"fc1", f"{path}hidden"),
        *layer("linear", r"fc2", f"{path}leave"),
    ]


def _unet(dims: int, path: str) -> list[Rule]:
    places = {"bottleneck": (r"bottleneck\.bottleneck", f"{path}bottleneck")}
    for level in range(1, 5):
        places[f"encoder {level}"] = (rf"encoder{level}\.enc{level}", f"{path}down_{level}")
        places[f"decoder {level}"] = (rf"decoder{level}\.dec{level}", f"{path}up_{level}")
    table = []
    for published, ours in places.values():
        for index in (1, 2):
            table += layer(f"conv{dims}d", rf"{published}conv{index}", f"{ours}/conv{index}")
            table += layer("batch_norm", rf"{published}norm{index}", f"{ours}/norm{index}")
    return [
        *table,
        Rule(r"upconv(\d)\.weight", f"params/{path}" + "widen_{0}/kernel", _transposed(dims)),
        Rule(r"upconv(\d)\.bias", f"params/{path}" + "widen_{0}/bias"),
        *layer(f"pointwise{dims}d", r"conv", f"{path}leave"),
    ]


def rules(config: CAPEConfig) -> list[Rule]:
    """Names of a solver; those of one without the block are the core's own."""
    core = _fno if config.core == "fno" else _unet
    if config.conditioning != "cape":
        return core(config.dims, "core/")
    return [
        *under("model", "core", core(config.dims, "")),
        *under(r"PrmEmb_Pre\.0", "block", block_rules(config)),
        *layer(f"pointwise{config.dims}d", r"mix_emb", "mix"),
    ]

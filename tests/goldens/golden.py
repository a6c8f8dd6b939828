"""Golden cases: what a paper's own published code computes, small enough to keep.

A case is one safetensors file.  It holds inputs (`in.*`) and outputs (`out.*`), and its metadata
holds the names and shapes of the published model's parameters; the parameter values themselves
are not stored, because both sides draw them again with `philox_tensor`.  So a case at a
published size (tens of millions of parameters) is still a few kilobytes.

    case = load_case("tests/goldens/informer/m24_prob.safetensors")
    case.variant          # the zoo's model id the case is for
    case.overrides        # config fields that differ from that variant's, or {}
    case.state_dict()     # {published parameter name: float32 array}, torch layout
    case.inputs, case.outputs   # {name: array}; images are NHWC, sequences are (batch, time, ...)

Needs only numpy and safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib

import numpy as np
from safetensors import safe_open


def philox_tensor(name: str, shape: tuple[int, ...], seed: int = 0, gain: float = 1.0) -> np.ndarray:
    """Draws the float32 value of the parameter or buffer `name`: same name, shape, seed -> same bits.

    1-D: norms' weights near 1, running variances positive, everything else small.
    2-D and up: scaled by 1/sqrt(fan_in) with torch's (out, in, ...) layout; a leading axis of 1
    (positional tables, tokens) gets 0.1 instead.
    """
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()) + (seed << 32)))
    x = rng.standard_normal(tuple(shape), dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if name.startswith("in."):  # an input of a case: plain standard normal
        return x
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if x.ndim <= 1:
        return (1.0 + 0.1 * x) if leaf in ("weight", "gamma", "scale") else 0.1 * x
    if x.shape[0] == 1:
        return 0.1 * x
    return (gain / np.sqrt(np.prod(x.shape[1:]))).astype(np.float32) * x


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case. `params` maps each published name to its shape; `stored` are values kept as is."""

    name: str
    variant: str
    overrides: dict
    params: dict[str, tuple[int, ...]]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    stored: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seed: int = 0
    gain: float = 1.0
    tolerance: float = 1e-3  # max |ours - golden| over the golden's standard deviation
    note: str = ""

    def state_dict(self) -> dict[str, np.ndarray]:
        drawn = {n: philox_tensor(n, s, self.seed, self.gain) for n, s in self.params.items()}
        return drawn | self.stored

    def error(self, outputs: dict[str, np.ndarray]) -> float:
        """The worst output's max |ours - golden| / std(golden); inf where one is missing or misshapen."""
        worst = 0.0
        for name, want in self.outputs.items():
            got = outputs.get(name)
            if got is None or np.shape(got) != want.shape:
                return float("inf")
            got = np.asarray(got, np.float64)
            if not np.isfinite(got).all():
                return float("inf")
            scale = float(np.std(want.astype(np.float64))) or 1.0
            worst = max(worst, float(np.abs(got - want).max()) / scale)
        return worst


def load_case(path) -> Case:
    with safe_open(str(path), framework="numpy") as f:
        meta = f.metadata()
        group = {"in": {}, "out": {}, "stored": {}}
        for key in f.keys():  # noqa: SIM118 (a safe_open is no mapping)
            kind, name = key.split(".", 1)
            group[kind][name] = f.get_tensor(key)
    for name, shape in json.loads(meta.get("drawn", "{}")).items():
        group["in"][name] = philox_tensor(f"in.{name}", tuple(shape), int(meta["seed"]))
    return Case(
        name=pathlib.Path(path).stem,
        variant=meta["variant"],
        overrides=json.loads(meta["overrides"]),
        params={k: tuple(v) for k, v in json.loads(meta["params"]).items()},
        inputs=group["in"],
        outputs=group["out"],
        stored=group["stored"],
        seed=int(meta["seed"]),
        gain=float(meta["gain"]),
        tolerance=float(meta["tolerance"]),
        note=meta["note"],
    )

"""MobileViG's claims in the small: a fixed graph against nearest neighbours and against none, and the hop.

    python -m experiments.mobilevig --preset demo                                    # scikit-learn's digits
    python -m experiments.mobilevig --preset cpu --data-dir DIR_OF_SIGN_DIGITS_NPZ   # the claims in the small
    python -m experiments.mobilevig --preset paper --data-dir DIR_OF_TFDS            # ImageNet, as published

The published recipe: 300 epochs of AdamW, weight decay 0.05, learning rate 2e-3 at a batch of 1024, cosine after 20
epochs of warm-up, an average of parameters (0.99996), RandAugment, mixup and CutMix, random erasing, label smoothing
and repeated augmentation; the second head learns the decisions of a RegNetY-16GF.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.data.augmentation import Recipe
from zoo.data.images import ImageData, ImageSet, LabelledImages, handwritten_digits, load_images
from zoo.layers.convolution import Conv
from zoo.papers.mobilevig import Grapher, KNNGrapher, MobileViG, MobileViGConfig, loss, neighbours_of
from zoo.train.classifier import ClassifierConfig, compare, fit_classifier

Claim = Literal["training", "graph", "layout", "hop"]
LIGHT = Recipe(
    least_area=0.5, flip=0.0, operations=0, colour_jitter=0.2, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1,
    repeats=1,
)  # fmt: skip
# The canvas of two digits is not cropped: what is where is what matters.
WHOLE = dataclasses.replace(LIGHT, least_area=1.0, colour_jitter=0.0, smoothing=0.0)
# At 128 pixels the graph's map has 4 x 4 pixels.
_NARROW = MobileViGConfig(
    (1, 1, 2), (16, 32, 48), 2, 96, 128, num_classes=10, distillation=False, layer_scale=0.1, image_size=(128, 128)
)
_QUICK = ClassifierConfig(
    epochs=25, batch_size=64, learning_rate=2e-3, warmup_epochs=2, weight_decay=0.05, recipe=LIGHT
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and which claims to measure."""

    # sign_digits and imagenet2012 need data_dir; digits come inside scikit-learn.
    data: ImageSet = "sign_digits"
    # The folder of sign_digits.npz, or the one below which TFDS prepared ImageNet.
    data_dir: pathlib.Path | None = None
    claims: tuple[Claim, ...] = ("graph", "layout", "hop")
    # The network of all claims; of "layout" with two classes.
    model: MobileViGConfig = _NARROW
    training: ClassifierConfig = _QUICK
    seed: int = 0
    # Of the claims that compare networks.
    seeds: tuple[int, ...] = (1, 2, 3)
    hops: tuple[int, ...] = (1, 2, 3, 4)
    # Sides of the maps on which the graphs are timed, and their channels.
    sides: tuple[int, ...] = (7, 14, 28)
    width: int = 256
    # Timings of each, taking turns; the median counts.
    repeats: int = 15
    # Canvases of two digits for training; a quarter as many for testing.
    pairs: int = 4000

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must name at least one seed")
        if self.pairs < 4:
            raise ValueError(f"pairs must be at least 4, got {self.pairs}")


_TINY = dataclasses.replace(_NARROW, depths=(1, 0, 0), widths=(8, 8, 16), global_depth=1, global_width=16,
                            embedding=16, image_size=(64, 64))  # fmt: skip
PRESETS = {
    # A minute or two, without files.
    "demo": Config(
        data="digits",
        claims=("training",),
        model=dataclasses.replace(_NARROW, image_size=(64, 64)),
        training=dataclasses.replace(_QUICK, epochs=6, warmup_epochs=1),
    ),
    # Seconds: every path once.
    "smoke": Config(
        data="digits",
        claims=("training", "graph", "layout", "hop"),
        model=_TINY,
        training=dataclasses.replace(_QUICK, epochs=2, batch_size=16, warmup_epochs=0, steps_per_epoch=2),
        seeds=(1,),
        hops=(1, 2),
        sides=(7,),
        width=16,
        repeats=2,
        pairs=64,
    ),
    "cpu": Config(),
    "paper": Config(
        data="imagenet2012",
        claims=("training",),
        model=MobileViGConfig(),
        training=ClassifierConfig(learning_rate=2e-3, warmup_epochs=20, weight_decay=0.05, ema_decay=0.99996),
    ),
}


class NoGrapher(Grapher):
    """Nothing in the place of the differences to neighbours."""

    @nn.nowrap
    def aggregate(self, y: jax.Array) -> jax.Array:
        """(B, H, W, C) to zeros of the same shape."""
        return jnp.zeros_like(y)


class ConvolutionGrapher(Grapher):
    """A 3 x 3 depthwise convolution in the place of the differences to neighbours."""

    def aggregate(self, y: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same shape."""
        return Conv(y.shape[-1], 3, groups=y.shape[-1], axes=(None, "mlp"), name="aggregate")(y)


def pairs_of_digits(count: int, size: int = 64, digit: int = 16, seed: int = 0) -> ImageData:
    """Canvases with two handwritten digits in opposite corners; the class is whether they are the same digit.

    Half of the pairs are of the same digit. Test canvases show digits that training canvases do not.
    """
    digits = handwritten_digits(digit)

    def draw(source: LabelledImages, count: int, rng: np.random.Generator) -> LabelledImages:
        labels = rng.integers(0, 2, count)
        images = np.zeros((count, size, size, 3), np.uint8)
        for image, same in zip(images, labels, strict=True):
            first = rng.integers(len(source))
            others = np.flatnonzero((source.labels == source.labels[first]) == same)
            second = rng.choice(others)
            jitter = rng.integers(0, digit // 2, 4)
            far = size - digit - jitter[2:]
            image[jitter[0] : jitter[0] + digit, jitter[1] : jitter[1] + digit] = source.images[first]
            image[far[0] : far[0] + digit, far[1] : far[1] + digit] = source.images[second]
        return LabelledImages(images, labels)

    rng = np.random.default_rng(seed)
    return ImageData("pairs of digits", 2, draw(digits.train, count, rng), draw(digits.test, count // 4, rng))


def milliseconds(modules: Mapping[str, nn.Module], shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Median time of each module on a map, taking turns, after one call to warm up."""
    x = jax.random.normal(jax.random.key(0), shape)
    functions = {
        name: partial(jax.jit(m.apply), jax.jit(m.init)(jax.random.key(0), x), x) for name, m in modules.items()
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def _verdict(config: Config, good: bool, half: bool) -> reports.Verdict:
    if len(config.seeds) < 2:
        return "not tested"
    return "reproduced" if good else "partly reproduced" if half else "not reproduced"


def graph(config: Config, data: ImageData, open_run: Callable[[str], train.Run]) -> tuple[reports.Claim, Figure]:
    """The fixed graph against nearest neighbours: accuracy and time."""
    kinds: dict[str, Any] = {"SVGA": Grapher, "KNN": KNNGrapher}
    models = {name: MobileViG(config.model, kind) for name, kind in kinds.items()}
    scores, _ = compare(models, loss, data, config.model.image_size, config.training, config.seeds, open_run)
    mean, error = reports.paired_difference(scores["SVGA"], scores["KNN"])
    measured: dict[str, Any] = {f"accuracy with {name}, %": values for name, values in scores.items()}
    times = {
        side: milliseconds(
            {name: kind() for name, kind in kinds.items()}, (1, side, side, config.width), config.repeats
        )
        for side in config.sides
    }
    for side, of in times.items():
        for name, value in of.items():
            measured[f"{name} block, {side} x {side}, ms"] = round(value, 3)
    faster = times[max(times)]["KNN"] / times[max(times)]["SVGA"]
    as_good = mean >= -2 * error
    claim = reports.Claim(
        statement="A fixed sparse graph is far cheaper than nearest neighbours, and no worse.",
        verdict=_verdict(config, as_good and faster >= 3, as_good and faster > 1),
        measured=measured,
        seeds=config.seeds,
        interval=f"SVGA - KNN: {mean:+.2f} points (standard error {error:.2f}); {faster:.2f} times as fast on the "
        "largest map",
        remark=f"{data.name}, {config.training.epochs} epochs, a narrow network.",
    )
    figure = Figure(figsize=(4 * len(times), 3.4), layout="constrained")
    for axes, side in zip(np.ravel(figure.subplots(1, len(times))), times, strict=True):
        axes.imshow(neighbours_of(side // 2, side // 2, side, side, config.model.hop), cmap="Greys")
        axes.set_title(", ".join(f"{name} {value:.2f} ms" for name, value in times[side].items()))
    return claim, figure


def layout(config: Config, open_run: Callable[[str], train.Run]) -> reports.Claim:
    """The graph against nothing and against a convolution, where the class depends on things far apart."""
    data = pairs_of_digits(config.pairs)
    narrow = dataclasses.replace(config.model, num_classes=2)
    kinds = {"SVGA": Grapher, "nothing": NoGrapher, "convolution": ConvolutionGrapher}
    models = {name: MobileViG(narrow, kind) for name, kind in kinds.items()}
    training = dataclasses.replace(config.training, recipe=WHOLE)
    scores, _ = compare(models, loss, data, narrow.image_size, training, config.seeds, open_run)
    gains = {name: reports.paired_difference(scores["SVGA"], scores[name]) for name in ("nothing", "convolution")}
    better = [mean > 2 * error for mean, error in gains.values()]
    return reports.Claim(
        statement="Where the class depends on things far apart, the graph beats no neighbours and near ones.",
        verdict=_verdict(config, all(better), any(better)),
        measured={"accuracy with SVGA, %": scores["SVGA"]},
        baselines={f"accuracy with {name}, %": scores[name] for name in gains},
        seeds=config.seeds,
        interval="; ".join(f"SVGA - {name}: {m:+.2f} (standard error {e:.2f})" for name, (m, e) in gains.items()),
        remark="Two handwritten digits in opposite corners, the same or not; chance is 50 %.",
    )


def hop(config: Config, data: ImageData, open_run: Callable[[str], train.Run]) -> reports.Claim:
    """Accuracy and the loop's time for several hops."""
    models = {f"K = {k}": MobileViG(dataclasses.replace(config.model, hop=k)) for k in config.hops}
    scores, _ = compare(models, loss, data, config.model.image_size, config.training, config.seeds, open_run)
    side = max(config.sides)
    times = milliseconds(
        {f"K = {k}": Grapher(hop=k) for k in config.hops}, (1, side, side, config.width), config.repeats
    )
    first = f"K = {config.hops[0]}"
    changes = [reports.paired_difference(scores[name], scores[first]) for name in models if name != first]
    flat = [mean >= -2 * error for mean, error in changes]
    return reports.Claim(
        statement="Sparser graphs are nearly as good: accuracy hardly depends on the hop.",
        verdict=_verdict(config, all(flat), any(flat)),
        measured={
            **{f"accuracy with {name}, %": values for name, values in scores.items()},
            **{f"block with {name}, {side} x {side}, ms": round(value, 3) for name, value in times.items()},
        },
        seeds=config.seeds,
        interval="; ".join(f"{mean:+.2f} (standard error {error:.2f})" for mean, error in changes),
        remark="Minima of whole residue classes cost the same whatever the hop; it is the published loop that gains.",
    )


def training(config: Config, data: ImageData, run: train.Run) -> reports.Claim:
    """Trains the config's network by its recipe."""
    model = MobileViG(config.model)
    result = fit_classifier(model, loss(model), data, config.model.image_size, config.training, run, config.seed)
    score = 100 * result.evaluation["test_accuracy"]
    whole = config.data == "imagenet2012" and config.training.steps_per_epoch is None
    verdict: reports.Verdict = "not tested"
    if whole:
        verdict = "reproduced" if score > 75.2 else "not reproduced"
    return reports.Claim(
        statement="MobileViG-Ti learns ImageNet to 75.7 % in 300 epochs.",
        verdict=verdict,
        measured={"test accuracy, %": round(score, 2)},
        published={"top-1 of Ti, %": 75.7},
        seeds=(config.seed,),
        remark="Without a teacher."
        if whole
        else f"Trained on {data.name} only; the number shows that training works, not the claim.",
    )


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims of a config and leaves everything in `workdir`.

    "training" is the folder's own run; the other claims' trainings lie below `runs/`. result.json holds the claims.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
      ValueError, FileNotFoundError, ModuleNotFoundError: the data is not there.
    """
    data = load_images(
        config.data, config.data_dir, config.model.image_size[0]
    )  # every complaint about the data comes before the first compilation
    folder = train.open_run(workdir, config, resume=resume, force=force)

    def below(claim: str) -> Callable[[str], train.Run]:
        return lambda name: train.open_run(folder.path / "runs" / claim / name, config, resume=resume, force=force)

    claims = []
    for name in config.claims:
        if name == "training":
            claim = training(config, data, folder)
        elif name == "graph":
            claim, figure = graph(config, data, below(name))
            (folder.path / "figures").mkdir(exist_ok=True)
            figure.savefig(folder.path / "figures/graph.png", dpi=120)
        else:
            claim = layout(config, below(name)) if name == "layout" else hop(config, data, below(name))
        claims.append(claim)
        reports.show(claim)
    result = reports.Result("mobilevig", command_line.preset_name(config, PRESETS), data.name, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("mobilevig", PRESETS, run)

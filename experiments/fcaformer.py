"""FcaFormer's claims in the small: cross tokens, the plain network, and what becomes of the factors.

    python -m experiments.fcaformer --preset demo                                    # scikit-learn's digits
    python -m experiments.fcaformer --preset cpu --data-dir DIR_OF_SIGN_DIGITS_NPZ   # the claims in the small
    python -m experiments.fcaformer --preset paper --data-dir DIR_OF_TFDS            # ImageNet, as published

The published recipe: 300 epochs of AdamW, weight decay 0.05, learning rate 2e-3 at a batch of 1024, cosine to 1e-6
after 20 epochs of warm-up, an average of parameters (0.9999), RandAugment, mixup and CutMix, random erasing and label
smoothing; no teacher.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import command_line
from zoo import reports, train
from zoo.data.augmentation import Recipe, evaluation_batches
from zoo.data.images import ImageData, ImageSet, load_images
from zoo.papers import fcaformer
from zoo.papers.fcaformer import FcaFormer, FcaFormerConfig, PlainConfig, PlainFcaFormer, loss
from zoo.train.classifier import ClassifierConfig, compare, fit_classifier

ClaimName = Literal["training", "cross", "plain", "factors"]
LIGHT = Recipe(
    least_area=0.5, flip=0.5, operations=0, colour_jitter=0.2, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1,
    repeats=1,
)  # fmt: skip
_QUICK = ClassifierConfig(
    epochs=15, batch_size=64, learning_rate=2e-3, warmup_epochs=2, weight_decay=0.05, recipe=LIGHT
)
# With 64 pixels and a stem of stride 2 the third stage's map has 8 x 8 tokens, and a block leaves four. A short
# training does not open branches that start at 1e-6.
_NARROW = FcaFormerConfig(
    depths=(1, 1, 4, 1), widths=(16, 24, 48, 64), heads=(3, 4), num_classes=10, image_size=(64, 64), stem_stride=2,
    layer_scale=0.1,
)  # fmt: skip
_PLAIN = PlainConfig(
    depth=4, width=64, heads=2, patch=8, num_classes=10, image_size=(64, 64), layer_scale=0.1
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and which claims to measure."""

    # sign_digits and imagenet2012 need data_dir; digits come inside scikit-learn.
    data: ImageSet = "sign_digits"
    # The folder of sign_digits.npz (or of its folder), or the one below which TFDS prepared ImageNet.
    data_dir: pathlib.Path | None = None
    claims: tuple[ClaimName, ...] = ("cross", "plain", "factors")
    # The network of all claims but "plain".
    model: FcaFormerConfig = _NARROW
    # The network of "plain".
    plain: PlainConfig = _PLAIN
    training: ClassifierConfig = _QUICK
    seed: int = 0
    # Of the claims that compare networks.
    seeds: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must name at least one seed")


_TINY = dataclasses.replace(
    _NARROW, depths=(0, 0, 2, 0), widths=(8, 8, 12, 16), heads=(2, 2), image_size=(32, 32)
)  # fmt: skip
PRESETS = {
    # A minute or two, without files.
    "demo": Config(
        data="digits",
        claims=("training",),
        training=dataclasses.replace(_QUICK, epochs=6, warmup_epochs=1, recipe=dataclasses.replace(LIGHT, flip=0.0)),
    ),
    # Seconds.
    "smoke": Config(
        data="digits",
        claims=("training", "factors"),
        model=_TINY,
        plain=dataclasses.replace(_PLAIN, depth=2, width=16, image_size=(32, 32)),
        training=dataclasses.replace(_QUICK, epochs=1, batch_size=16, warmup_epochs=0, steps_per_epoch=2),
        seeds=(1,),
    ),
    "cpu": Config(),
    # As the claims are meant to be measured, for those who have an hour or an accelerator.
    "full": Config(
        model=dataclasses.replace(_NARROW, depths=(1, 1, 6, 2), widths=(24, 40, 64, 96), heads=(4, 6)),
        plain=dataclasses.replace(_PLAIN, depth=8, width=96, heads=3),
        training=dataclasses.replace(_QUICK, epochs=30),
        seeds=(1, 2, 3, 4, 5),
    ),
    "paper": Config(
        data="imagenet2012",
        claims=("training",),
        model=FcaFormerConfig(),
        training=ClassifierConfig(
            learning_rate=2e-3, warmup_epochs=20, weight_decay=0.05, final_fraction=5e-4, ema_decay=0.9999,
            recipe=Recipe(repeats=1),
        ),
    ),
}  # fmt: skip

OpenRun = Callable[[str], train.Run]


def cross(config: Config, data: ImageData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """The hybrid beside itself without cross tokens, without the enhancement, and without both."""
    model = config.model
    configs = {
        "whole": model,
        "no cross tokens": dataclasses.replace(model, cross_depth=0),
        "no enhancement": dataclasses.replace(model, enhance=False),
        "neither": dataclasses.replace(model, cross_depth=0, enhance=False),
    }
    networks = {name: FcaFormer(options) for name, options in configs.items()}
    scores, losses = compare(networks, loss, data, model.image_size, config.training, config.seeds, open_run)
    rest = [name for name in networks if name != "whole"]
    gains = {name: reports.paired_difference(scores["whole"], scores[name]) for name in rest}
    mean, error = gains["no cross tokens"]
    verdict: reports.Verdict = "not reproduced"
    if mean >= -error:
        verdict = "reproduced" if mean > error else "partly reproduced"
    claim = reports.Claim(
        statement="Cross tokens of earlier blocks help, at equal depth and nearly equal cost.",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={"whole, accuracy %": scores["whole"], "whole, test loss": losses["whole"]},
        baselines={f"{name}, accuracy %": scores[name] for name in rest}
        | {f"{name}, test loss": losses[name] for name in rest},
        published={"top-1 of DeiT-Ti without and with both parts, %": [72.2, 74.3]},
        seeds=config.seeds,
        interval=_intervals("whole", gains, config),
        remark=f"{_setting(config, data)}. Reproduced: the gain is more than a standard error; partly: not less than "
        "minus one.",
    )
    return claim, _figure(scores)


def plain(config: Config, data: ImageData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """A plain Transformer with both parts and with neither."""
    configs = {"both parts": config.plain, "neither": dataclasses.replace(config.plain, cross_depth=0, enhance=False)}
    networks = {name: PlainFcaFormer(options) for name, options in configs.items()}
    scores, losses = compare(
        networks, loss, data, config.plain.image_size, config.training, config.seeds, open_run
    )  # fmt: skip
    mean, error = reports.paired_difference(scores["both parts"], scores["neither"])
    verdict: reports.Verdict = "not reproduced"
    if mean > error:
        verdict = "reproduced" if mean > 1 else "partly reproduced"
    claim = reports.Claim(
        statement="A plain Transformer gains more than a point by cross tokens and enhancement (L0).",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={"both parts, accuracy %": scores["both parts"], "both parts, test loss": losses["both parts"]},
        baselines={"neither, accuracy %": scores["neither"], "neither, test loss": losses["neither"]},
        published={"top-1 of DeiT-Ti without and with both parts, %": [72.2, 74.3]},
        seeds=config.seeds,
        interval=_intervals("both parts", {"neither": (mean, error)}, config),
        remark=f"{_setting(config, data)}. The plain network is a reconstruction; the enhancement adds convolutions.",
    )
    return claim, _figure(scores)


def learned_factors(config: Config, data: ImageData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """Factors before the norm, as published, and behind it: what they become, and what that is good for."""
    configs = {
        "before the norm": config.model,
        "behind the norm": dataclasses.replace(config.model, factors_after_norm=True),
    }
    scores: dict[str, list[float]] = {name: [] for name in configs}
    spreads: dict[str, list[float]] = {name: [] for name in configs}
    shares: dict[str, list[float]] = {name: [] for name in configs}
    learned: dict[str, np.ndarray] = {}
    images = jnp.asarray(evaluation_batches(data.test, config.model.image_size, min(32, len(data.test)))[0]["images"])
    for seed in config.seeds:
        for name, options in configs.items():
            model = FcaFormer(options)
            run = open_run(f"{name.replace(' ', '_')}_seed{seed}")
            result = fit_classifier(model, loss(model), data, options.image_size, config.training, run, seed)
            variables = result.state.evaluation_variables
            values = np.concatenate([np.asarray(x) for x in fcaformer.factors(variables).values()])
            found = jax.jit(lambda variables, model=model: fcaformer.cross_shares(model, variables, images))(variables)
            scores[name].append(round(100 * result.evaluation["test_accuracy"], 2))
            spreads[name].append(round(float(np.sqrt(np.mean((values - 1) ** 2))), 5))
            shares[name].append(round(100 * float(np.mean([np.mean(x) for x in found.values()])), 2))
            learned.setdefault(name, values)
    gain = reports.paired_difference(scores["behind the norm"], scores["before the norm"])
    before, behind = (float(np.mean(spreads[name])) for name in configs)
    verdict: reports.Verdict = "reproduced" if behind > 3 * before else "not reproduced"
    claim = reports.Claim(
        statement="Factors before a layer norm, as published, stay near 1; behind it they are learned. (Ours, not the "
        "paper's.)",
        verdict=verdict if len(config.seeds) > 1 else "not tested",
        measured={f"distance of factors {name} from 1, root mean square": values for name, values in spreads.items()}
        | {f"attention to cross tokens, factors {name}, %": values for name, values in shares.items()}
        | {f"factors {name}, accuracy %": values for name, values in scores.items()},
        seeds=config.seeds,
        interval=_intervals("behind the norm", {"before the norm": gain}, config),
        remark=f"{_setting(config, data)}. Reproduced: those behind move three times as far.",
    )
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(learned.values()), bins=30, label=[f"{name} (seed {config.seeds[0]})" for name in learned])
    axes.set(xlabel="learned factor", ylabel="cross tokens")
    axes.legend()
    return claim, figure


def training(config: Config, data: ImageData, run: train.Run) -> reports.Claim:
    """Trains the config's network by its recipe."""
    model = FcaFormer(config.model)
    result = fit_classifier(model, loss(model), data, config.model.image_size, config.training, run, config.seed)
    score = 100 * result.evaluation["test_accuracy"]
    whole = config.data == "imagenet2012" and config.training.steps_per_epoch is None
    verdict: reports.Verdict = "not tested"
    if whole:
        verdict = "reproduced" if score > 79.8 else "not reproduced"
    return reports.Claim(
        statement="FcaFormer-L1 learns ImageNet to 80.3 % in 300 epochs, without a teacher.",
        verdict=verdict,
        measured={"test accuracy, %": round(score, 2)},
        published={"top-1 of L1, %": 80.3},
        seeds=(config.seed,),
        remark="" if whole else f"Trained on {data.name} only; the number shows that training works, not the claim.",
    )


def _setting(config: Config, data: ImageData) -> str:
    return f"{data.name}, {config.model.image_size[0]} pixels, {config.training.epochs} epochs, narrow networks"


def _intervals(first: str, gains: dict[str, tuple[float, float]], config: Config) -> str:
    if len(config.seeds) < 2:
        return ""
    return "; ".join(f"{first} - {name}: {m:+.2f} points, standard error {e:.2f}" for name, (m, e) in gains.items())


def _figure(scores: dict[str, list[float]]) -> Figure:
    """Every training a dot, with the mean."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(scores.values()):
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot([place - 0.2, place + 0.2], [np.mean(values)] * 2, color="black")
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel("test accuracy, %")
    return figure


CLAIMS: dict[str, Any] = {"cross": cross, "plain": plain, "factors": learned_factors}


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims of a config and leaves everything in `workdir`.

    "training" is the folder's own run; the other claims' trainings lie below `runs/`. result.json holds the claims.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
      ValueError, FileNotFoundError, ModuleNotFoundError: the data is not there.
    """
    # Every complaint about the data comes before the first compilation.
    data = load_images(config.data, config.data_dir, config.model.image_size[0])
    folder = train.open_run(workdir, config, resume=resume, force=force)

    def below(claim: str) -> OpenRun:
        return lambda name: train.open_run(folder.path / "runs" / claim / name, config, resume=resume, force=force)

    claims = []
    for name in config.claims:
        if name == "training":
            claim = training(config, data, folder)
        else:
            claim, figure = CLAIMS[name](config, data, below(name))
            (folder.path / "figures").mkdir(exist_ok=True)
            figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
        claims.append(claim)
        reports.show(claim)
    result = reports.Result("fcaformer", command_line.preset_name(config, PRESETS), data.name, tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("fcaformer", PRESETS, run)

"""EMOv2's claims in the small: near and far windows together, what makes the block, detection.

    python -m experiments.emov2 --preset demo                        # scikit-learn's digits
    python -m experiments.emov2 --preset cpu --data-dir DIR          # sign_digits.npz and bccd.npz lie below DIR
    python -m experiments.emov2 --preset paper --data-dir TFDS_DIR   # ImageNet, as published

The published recipe: AdamW, weight decay 0.05 (not of vectors), learning rate 1.5e-3 for 512 images a step, that is
3e-3 at 1024, 20 epochs of warm-up and cosine over 300, gradients' norm clipped to 5, an average of parameters (0.9998),
RandAugment, colour jitter, flips and crops, label smoothing 0.1, and neither mixup nor CutMix nor erasing. With a
teacher (TResNet-L-v2) 5 KL is added to the loss.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import command_line
from zoo import reports, train
from zoo.data.augmentation import Recipe, standardise
from zoo.data.bccd import CLASSES, DetectionData, LabelledBoxes, bccd
from zoo.data.images import ImageData, ImageSet, folder_of, load_images
from zoo.layers import boxes
from zoo.papers.emov2 import DetectorConfig, EMOv2, EMOv2Config, RetinaNet, detection, loss, teacher_images
from zoo.train.classifier import ClassifierConfig, compare, fit_classifier

ClaimName = Literal["training", "patterns", "block", "detection"]
LIGHT = Recipe(
    least_area=0.6, flip=0.5, operations=0, colour_jitter=0.2, erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1,
    repeats=1,
)  # fmt: skip
_QUICK = ClassifierConfig(
    epochs=15, batch_size=64, learning_rate=2e-3, warmup_epochs=2, weight_decay=0.05, clip_norm=5.0, recipe=LIGHT
)
# Half of EMOv2-1M's width. 32 pixels: with a stem of stride 1 stage 3 has 4 x 4 tokens, four windows.
NARROW = EMOv2Config(
    depths=(1, 1, 3, 2), widths=(16, 24, 40, 80), expansions=(2, 2.5, 3, 3.5), head_dims=(8, 8, 10, 20), window=2,
    stem_stride=1, num_classes=10, image_size=(32, 32),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Networks that differ in one thing, trained alike."""

    model: EMOv2Config = NARROW
    training: ClassifierConfig = _QUICK
    seeds: tuple[int, ...] = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Detection:
    """A RetinaNet from nothing on photographs of blood cells, and one whose backbone has no attention."""

    model: DetectorConfig = DetectorConfig(
        dataclasses.replace(NARROW, window=10, stem_stride=2, depths=(1, 1, 2, 2)), num_classes=3, channels=48,
        pretrained=False, image_size=(240, 320),
    )  # fmt: skip
    epochs: int = 30
    batch_size: int = 8
    learning_rate: float = 1e-3
    seeds: tuple[int, ...] = (1,)
    # Shorter epochs, and fewer test images, for a quick look; None: all.
    steps_per_epoch: int | None = None
    test_images: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and which claims to measure."""

    # sign_digits and imagenet2012 need data_dir; digits come inside scikit-learn.
    data: ImageSet = "sign_digits"
    # A folder below which sign_digits.npz and bccd.npz lie, or where TFDS prepared ImageNet.
    data_dir: pathlib.Path | None = None
    claims: tuple[ClaimName, ...] = ("patterns", "block", "detection")
    # The network of "training".
    model: EMOv2Config = NARROW
    training: ClassifierConfig = _QUICK
    # A model of timm (needs PyTorch and its weights) that teaches it.
    teacher: str | None = None
    seed: int = 0
    patterns: Comparison = Comparison()
    block: Comparison = Comparison(training=dataclasses.replace(_QUICK, epochs=10))
    detection: Detection = Detection()

    def __post_init__(self) -> None:
        if not (self.patterns.seeds and self.block.seeds and self.detection.seeds):
            raise ValueError("seeds must name at least one seed")
        for name in ("epochs", "batch_size"):
            if getattr(self.detection, name) < 1:
                raise ValueError(f"detection.{name} must be at least 1, got {getattr(self.detection, name)}")


def learning_rate(batch_size: int) -> float:
    """The published one: 1.5e-3 for 512 images a step, in proportion."""
    return 1.5e-3 * batch_size / 512


_TINY = dataclasses.replace(NARROW, depths=(1, 1, 2, 1), widths=(8, 8, 10, 20), head_dims=(4, 4, 5, 10))
_BRIEF = dataclasses.replace(_QUICK, epochs=2, batch_size=16, warmup_epochs=0, steps_per_epoch=2)
PRESETS = {
    # A minute or two, without files.
    "demo": Config(
        data="digits",
        claims=("training",),
        model=NARROW,
        training=dataclasses.replace(_QUICK, epochs=6, warmup_epochs=1, recipe=dataclasses.replace(LIGHT, flip=0.0)),
    ),
    # Short. "block" compares as "patterns" does, and the photographs of "detection" are not part of the zoo.
    "smoke": Config(
        data="digits",
        claims=("training", "patterns"),
        model=_TINY,
        training=_BRIEF,
        patterns=Comparison(_TINY, _BRIEF, (1,)),
        block=Comparison(_TINY, _BRIEF, (1,)),
    ),
    "cpu": Config(),
    "paper": Config(
        data="imagenet2012",
        claims=("training",),
        model=EMOv2Config(drop_path_rate=0.05),
        training=ClassifierConfig(
            learning_rate=learning_rate(1024), warmup_epochs=20, weight_decay=0.05, clip_norm=5.0, ema_decay=0.9998,
            final_fraction=5e-7 / learning_rate(1024),
            recipe=Recipe(erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.1, repeats=1),
        ),
    ),
}  # fmt: skip


def timm_teacher(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of a pretrained model of timm, for images (B, height, width, 3) standardised as ours are."""
    try:
        import timm
        import torch
    except ImportError as error:
        raise ModuleNotFoundError("a teacher needs timm and PyTorch: pip install 'zoo[bench]'") from error
    model = timm.create_model(name, pretrained=True).eval()

    def logits(images: np.ndarray) -> np.ndarray:
        pixels = np.asarray(teacher_images(jnp.asarray(images)))
        with torch.inference_mode():
            return model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()

    return logits


def accuracy_of(result: train.FitResult) -> float:
    """Test accuracy after the last epoch, in percent."""
    return 100 * result.evaluation["test_accuracy"]


OpenRun = Callable[[str], train.Run]


def measure(
    networks: dict[str, EMOv2Config], options: Comparison, data: ImageData, open_run: OpenRun
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Test accuracies in percent and test losses of networks, one a seed."""
    models = {name: EMOv2(config) for name, config in networks.items()}
    return compare(models, loss, data, options.model.image_size, options.training, options.seeds, open_run)


PATTERNS: dict[str, Any] = {
    "spanning": ("spanning",),
    "remote": ("remote",),
    "close": ("close",),
    "none": ("convolution",),
}


def patterns(options: Comparison, data: ImageData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """Spanning attention beside each of its halves, and no attention."""
    networks = {name: dataclasses.replace(options.model, operators=kind) for name, kind in PATTERNS.items()}
    scores, _ = measure(networks, options, data, lambda name: open_run(f"patterns_{name}"))
    differences = {
        name: reports.paired_difference(scores["spanning"], scores[name]) for name in PATTERNS if name != "spanning"
    }
    below = [mean < -error for mean, error in (differences["remote"], differences["close"])]
    above = all(mean >= 0 for mean, _ in differences.values())
    verdict: reports.Verdict = "reproduced" if above else "partly reproduced"
    if all(below):
        verdict = "not reproduced"
    if len(options.seeds) < 2:
        verdict = "not tested"
    claim = reports.Claim(
        statement="Near and far windows together are better than either, for no parameter more.",
        verdict=verdict,
        measured={"spanning, accuracy %": scores["spanning"]},
        published={"RetinaNet on COCO, mAP of EMOv2-5M and EMO-5M (remote only)": [41.5, 38.9]},
        baselines={f"{name}, accuracy %": scores[name] for name in differences},
        seeds=options.seeds,
        interval="; ".join(
            f"spanning - {name}: {mean:.2f} points, standard error {error:.2f}"
            for name, (mean, error) in differences.items() if math.isfinite(error)
        ),
        remark=f"{data.name}, {options.model.image_size[0]} pixels, {options.training.epochs} epochs, half of the 1M "
        "network's width. Without attention stages 3 and 4 have 1 x 1 convolutions, and fewer parameters.",
    )  # fmt: skip
    return claim, scores_figure(scores, "test accuracy, %")


def block(options: Comparison, data: ImageData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """The published block beside one without the inner skip, without some scales, with a smaller kernel."""
    model = options.model
    networks = {
        "published": model,
        "no inner skip": dataclasses.replace(model, inner_skip=False),
        "no scale without residual": dataclasses.replace(model, scale_everywhere=False),
        "kernels of 3": dataclasses.replace(model, kernels=(3, 3, 3, 3)),
    }
    scores, losses = measure(networks, options, data, lambda name: open_run(f"block_{name}"))
    rest = [name for name in networks if name != "published"]
    gains = {name: reports.paired_difference(losses[name], losses["published"]) for name in rest}
    expected = [gains[name][0] > 0 for name in ("no inner skip", "kernels of 3")]
    verdict: reports.Verdict = "reproduced" if all(expected) else "partly reproduced"
    if not any(expected):
        verdict = "not reproduced"
    if len(options.seeds) < 2:
        verdict = "not tested"
    claim = reports.Claim(
        statement="The skip around the depthwise convolution and its 5 x 5 kernel help.",
        verdict=verdict,
        measured={"published, test loss": losses["published"], "published, accuracy %": scores["published"]},
        baselines={f"{name}, test loss": losses[name] for name in rest}
        | {f"{name}, accuracy %": scores[name] for name in rest},
        seeds=options.seeds,
        interval="; ".join(
            f"{name} - published: {mean:.4f} of loss, standard error {error:.4f}"
            for name, (mean, error) in gains.items() if math.isfinite(error)
        ),
        remark=f"{data.name}, {options.training.epochs} epochs. Kernels of 3 x 3 have fewer parameters, too.",
    )  # fmt: skip
    return claim, scores_figure(losses, "test loss")


def scores_figure(scores: dict[str, list[float]], label: str) -> Figure:
    """Every training a dot, with the mean."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(scores.values()):
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot([place - 0.2, place + 0.2], [np.mean(values)] * 2, color="black")
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set_ylabel(label)
    return figure


# ----------------------------------------------------------------------------------------------------------- detection


def detection_batches(data: LabelledBoxes, batch_size: int, seed: int | None) -> grain.MapDataset:
    """Batches for a detector: shuffled and mirrored without end if there is a seed, else once in order."""

    def prepare(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"images": standardise(example["image"]), "boxes": example["boxes"], "labels": example["labels"]}

    def mirror(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if rng.random() < 0.5:
            return example
        found = example["boxes"].copy()
        found[:, [0, 2]] = example["image"].shape[1] - example["boxes"][:, [2, 0]]
        return {**example, "image": example["image"][:, ::-1], "boxes": found}

    dataset: Any = grain.MapDataset.source(data)
    if seed is not None:
        dataset = dataset.seed(seed).shuffle().repeat().random_map(mirror)
    return dataset.map(prepare).batch(batch_size, drop_remainder=seed is not None)


def precisions(model: RetinaNet, variables: Any, data: LabelledBoxes, batch_size: int) -> list[float]:
    """Average precision at an overlap of one half, of each class."""
    height, width = model.config.image_size
    apply: Callable[..., Any] = model.apply
    detect = jax.jit(lambda images: model.detect(apply(variables, images), height, width))
    found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in CLASSES]
    truth: list[list[np.ndarray]] = [[] for _ in CLASSES]
    for batch in detection_batches(data, batch_size, None):
        results = jax.device_get(detect(batch["images"]))
        for image in range(len(batch["images"])):
            for kind in range(len(CLASSES)):
                mine = results.valid[image] & (results.classes[image] == kind)
                found[kind].append((results.boxes[image][mine], results.scores[image][mine]))
                truth[kind].append(batch["boxes"][image][batch["labels"][image] == kind])
    return [boxes.average_precision(f, t) for f, t in zip(found, truth, strict=True)]


def fit_detector(
    config: DetectorConfig, options: Detection, data: LabelledBoxes, run: train.Run, seed: int
) -> tuple[RetinaNet, Any]:
    """Trains from nothing; the model and its variables."""
    model = RetinaNet(config)
    steps = min(len(data) // options.batch_size, options.steps_per_epoch or len(data))
    optimizer = train.OptimizerConfig(
        learning_rate=options.learning_rate, schedule="cosine", warmup_steps=min(options.epochs * steps // 10, 50),
        weight_decay=0.05, clip_norm=1.0,
    )  # fmt: skip
    result = train.fit_network(
        model, detection.loss(model), {"images": np.zeros((1, *config.image_size, 3), np.float32)},
        detection_batches(data, options.batch_size, seed), optimizer, run, seed, epochs=options.epochs,
        steps_per_epoch=steps,
    )  # fmt: skip
    return model, result.state.evaluation_variables


def detect_cells(options: Detection, data: DetectionData, open_run: OpenRun) -> tuple[reports.Claim, Figure]:
    """RetinaNet with spanning attention in its backbone, and with convolutions alone."""
    backbones = {
        "spanning": options.model.backbone,
        "convolutions": dataclasses.replace(options.model.backbone, operators=("convolution",)),
    }
    test = data.test
    if options.test_images is not None:
        test = LabelledBoxes(*(x[: options.test_images] for x in (test.images, test.boxes, test.labels)))
    scores: dict[str, list[list[float]]] = {name: [] for name in backbones}
    shown: Any = None
    for seed in options.seeds:
        for name, backbone in backbones.items():
            config = dataclasses.replace(options.model, backbone=backbone)
            model, variables = fit_detector(config, options, data.train, open_run(f"detection_{name}_seed{seed}"), seed)
            found = precisions(model, variables, test, options.batch_size)
            scores[name].append([round(100 * x, 1) if not math.isnan(x) else -1.0 for x in found])
            shown = (model, variables) if shown is None else shown
    white = float(np.mean([row[1] for row in scores["spanning"]]))
    verdict: reports.Verdict = "reproduced" if white > 80 else "not reproduced"
    if options.steps_per_epoch is not None:
        verdict = "not tested"
    claim = reports.Claim(
        statement="As a detector's backbone it finds white blood cells with an AP50 above 80.",
        verdict=verdict,
        measured={f"spanning, AP50 of {CLASSES}, a seed": scores["spanning"]},
        baselines={f"convolutions, AP50 of {CLASSES}, a seed": scores["convolutions"]},
        published={"RetinaNet on COCO, mAP of EMOv2-1M / 5M": [36.9, 41.5]},
        seeds=options.seeds,
        remark=f"{len(data.train)} photographs, {options.epochs} epochs from nothing, narrow network.",
    )
    model, variables = shown
    return claim, boxes_figure(model, variables, test)


def boxes_figure(model: RetinaNet, variables: Any, data: LabelledBoxes) -> Figure:
    """Four test photographs with the boxes found."""
    number = min(4, len(data))
    images = np.stack([standardise(data.images[index]) for index in range(number)])
    found = jax.device_get(model.detect(jax.jit(model.apply)(variables, images), *model.config.image_size))
    figure = Figure(figsize=(3.2 * number, 2.6), layout="constrained")
    for index, axes in enumerate(np.ravel(figure.subplots(1, number))):
        axes.imshow(data.images[index])
        axes.axis("off")
        for box, score, kind in zip(found.boxes[index], found.scores[index], found.classes[index], strict=True):
            if score > 0.4:
                corner, size = (box[0], box[1]), box[2:] - box[:2]
                axes.add_patch(Rectangle(corner, *size, fill=False, color=("red", "cyan", "yellow")[kind]))
    return figure


def training(config: Config, data: ImageData, run: train.Run) -> reports.Claim:
    """Trains the config's network by its recipe."""
    model = EMOv2(config.model)
    teacher = timm_teacher(config.teacher) if config.teacher is not None else None
    result = fit_classifier(
        model, loss(model), data, config.model.image_size, config.training, run, config.seed, teacher=teacher
    )
    score = accuracy_of(result)
    whole = config.data == "imagenet2012" and config.training.steps_per_epoch is None
    verdict: reports.Verdict = "not tested"
    if whole:
        verdict = "reproduced" if score > 78.9 else "not reproduced"
    return reports.Claim(
        statement="EMOv2-5M learns ImageNet to 79.4 % in 300 epochs.",
        verdict=verdict,
        measured={"test accuracy, %": round(score, 2)},
        published={"top-1 of EMOv2-5M, %": 79.4, "with a teacher, %": 80.9},
        seeds=(config.seed,),
        remark="" if whole else f"Trained on {data.name} only; the number shows that training works, not the claim.",
    )


def run(config: Config, workdir: pathlib.Path, resume: bool = False, force: bool = False) -> reports.Result:
    """Measures the claims of a config and leaves everything in `workdir`.

    "training" is the folder's own run; the other claims' trainings lie below `runs/`. result.json holds the claims.

    Raises:
      FileExistsError: the folder holds a run, and neither resume nor force is given.
      ValueError, FileNotFoundError, ModuleNotFoundError: the data is not there.
    """
    # Every complaint about the data comes before the first compilation.
    images = (
        load_images(config.data, config.data_dir, config.model.image_size[0])
        if set(config.claims) - {"detection"}
        else None
    )
    cells = bccd(folder_of("bccd", config.data_dir)) if "detection" in config.claims else None
    folder = train.open_run(workdir, config, resume=resume, force=force)
    (folder.path / "figures").mkdir(exist_ok=True)

    def open_run(name: str) -> train.Run:
        return train.open_run(folder.path / "runs" / name, config, resume=resume, force=force)

    claims = []
    for name in config.claims:
        figure = None
        if name == "detection":
            assert cells is not None
            claim, figure = detect_cells(config.detection, cells, open_run)
        else:
            assert images is not None
            if name == "training":
                claim = training(config, images, folder)
            elif name == "patterns":
                claim, figure = patterns(config.patterns, images, open_run)
            else:
                claim, figure = block(config.block, images, open_run)
        if figure is not None:
            figure.savefig(folder.path / "figures" / f"{name}.png", dpi=120)
        claims.append(claim)
        reports.show(claim)
    names = [part.name for part in (images,) if part is not None] + ["bccd"] * (cells is not None)
    result = reports.Result("emov2", command_line.preset_name(config, PRESETS), ", ".join(names), tuple(claims))
    result.save(folder.path / "result.json")
    return result


if __name__ == "__main__":
    command_line.main("emov2", PRESETS, run)

"""DeepSNP: breakpoints of copy number in SNP arrays, found and localised from one label for 40,000 probes.

"Deep SNP: An End-to-end Deep Neural Network with Attention-based Localization for Break-point Detection in SNP Array
Genomic data", Hamid Eghbal-zadeh, Lukas Fischer, Niko Popitsch et al., ICML / IJCAI workshop on computational biology
2018, arXiv 1806.08840; J. Comput. Biol. 26(6), 2019. Code: github.com/eghbalz/deepsnp (licence file MIT; headers of
files say otherwise; no weights, no data).

A window of probes has one label: is there a breakpoint. A dense network shortens it, a gated bidirectional GRU reads
what is left, one head classifies each step, another weighs each step and class, and the weighted mean is the answer.
The change of the first head's output along time marks where breakpoints are, which nobody told it.

What the published code does and is therefore done here:
- blocks have ReLUs only, no norm and no bottleneck; rows share all weights and never mix before the heads;
- the GRU is that of Keras 2: hard sigmoids, the reset before the product, one bias;
- the two outputs are normalised class by class and need not sum to one; the loss scales them so;
- what the training generator standardises is thrown away: the network sees what the array measured;
- the learning rate is lr / (1 + 0.1 t) with t counted in steps (`published_rate`).

The published runner cannot build version 2 (two arguments are missing); its graph can be built and is followed.
Baselines follow the sheet of their names; how exactly some of them end is ours, so that no counts are claimed for them.
"""

from __future__ import annotations

import numpy as np

from zoo.papers.deepsnp.analysis import (
    SequenceCalls,
    localization_delta,
    middle_of_largest,
    predict_sequence,
    to_probes,
    window_metrics,
)
from zoo.papers.deepsnp.baselines import Baseline, BaselineConfig
from zoo.papers.deepsnp.model import (
    AttentionKind,
    DeepSNP,
    DeepSNPConfig,
    GatedBiGRU,
    Stem,
    attention_pool,
    loss,
    receptive_field,
    steps,
)
from zoo.registry import Paper, Variant, register
from zoo.weights import Rule, Transform, layer

__all__ = [
    "Baseline",
    "BaselineConfig",
    "DeepSNP",
    "DeepSNPConfig",
    "GatedBiGRU",
    "SequenceCalls",
    "attention_pool",
    "localization_delta",
    "loss",
    "middle_of_largest",
    "predict_sequence",
    "published_rate",
    "receptive_field",
    "steps",
    "to_probes",
    "window_metrics",
]

PAPER = Paper(
    slug="deepsnp",
    title="Deep SNP: An End-to-end Deep Neural Network with Attention-based Localization for Break-point Detection in "
    "SNP Array Genomic data",
    authors="Hamid Eghbal-zadeh et al.",
    venue="ICML workshop",
    year=2018,
    arxiv="1806.08840",
    claim="A network told only whether a window has a breakpoint finds it better than VGG and DenseNet, and says "
    "where.",
    code="https://github.com/eghbalz/deepsnp",
    code_license="MIT",
    remarks="The licence file says MIT, headers of files proprietary; no weights and no patients' data are published.",
)


def published_rate(step: int, rate: float = 1e-3) -> float:
    """The learning rate of Adam (amsgrad) at a step in the published recipe: rate / (1 + 0.1 step)."""
    return rate / (1 + 0.1 * step)


def example_inputs(config: DeepSNPConfig | BaselineConfig, batch_size: int) -> dict[str, np.ndarray]:
    """Normal values for `DeepSNP.__call__`."""
    return {"window": np.random.default_rng(0).standard_normal((batch_size, 2, config.window, 1), dtype=np.float32)}


def example_targets(config: DeepSNPConfig | BaselineConfig, batch_size: int) -> dict[str, np.ndarray]:
    """What the loss reads beside the inputs."""
    return {"label": (np.arange(batch_size) % 2).astype(np.int32)}


def _row(kernel: np.ndarray) -> np.ndarray:
    return kernel[:, :, 0].transpose(2, 1, 0)


# (out, in, 1, places) -> (places, in, out).
_ROW_KERNEL = Transform(_row, lambda kernel: kernel.transpose(2, 1, 0)[:, :, None], 4)
GRU_RULES = [
    Rule(r"gru_(value|gate)\.(forward|backward)\.weight_ih", "params/{0}_{1}/input", "linear"),
    Rule(r"gru_(value|gate)\.(forward|backward)\.weight_hh", "params/{0}_{1}/recurrent", "linear"),
    Rule(r"gru_(value|gate)\.(forward|backward)\.bias", "params/{0}_{1}/bias"),
]


def weight_rules(config: DeepSNPConfig) -> list[Rule]:
    """Names of the published layers in the order of their making, kernels as in PyTorch."""
    return [
        Rule(r"initial_conv2D\.weight", "params/trunk/stem/kernel", _ROW_KERNEL),
        Rule(r"initial_conv2D\.bias", "params/trunk/stem/bias"),
        *layer("batch_norm", "initial_bn", "trunk/stem_norm"),
        Rule(r"dense(\d+)\.conv(\d+)\.weight", "params/trunk/block_{0}_conv_{1}/kernel", _ROW_KERNEL),
        Rule(r"transition(\d+)\.conv\.weight", "params/trunk/transition_{0}_conv/kernel", _ROW_KERNEL),
        *layer("batch_norm", r"transition(\d+)\.bn", "trunk/transition_{0}_norm"),
        *(
            Rule(rule.published, rule.path.replace("params/", "params/gru/"), rule.transform)
            for rule in GRU_RULES
            if isinstance(rule.path, str)
        ),
        *layer("linear", "input_attention_layer", "input_attention"),
        *layer("linear", "(localization|attention)_layer", "{0}"),
    ]


# Trainable parameters; the published counts hold the norms' statistics too.
_STATISTICS = 2 * (16 + 64 + 112 + 160 + 208 + 256)
_ATTENTIONS: dict[str, tuple[AttentionKind, int]] = {
    "no_att": ("none", 1_154_610),
    "final_att": ("final", 1_155_636),
    "full_att": ("full", 1_155_941),
}
_STEMS: dict[str, Stem] = {"v1": "dilated", "v2": "strided"}
register(
    PAPER,
    *(
        Variant(f"deepsnp_{version}_{name}", DeepSNPConfig(stem=stem, attention=attention), count - _STATISTICS)
        for version, stem in _STEMS.items()
        for name, (attention, count) in _ATTENTIONS.items()
    ),
    example_inputs=example_inputs,
    weight_rules=weight_rules,
    loss=loss,
    example_targets=example_targets,
)(DeepSNP)
register(
    PAPER,
    *(
        Variant(f"deepsnp_bl_{kind}", BaselineConfig(kind=kind))
        for kind in ("vgg", "densenet", "dil_densenet", "lstm_densenet")
    ),
    example_inputs=example_inputs,
    loss=loss,
    example_targets=example_targets,
)(Baseline)

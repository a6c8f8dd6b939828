"""Informer: forecasting long sequences in one pass, with attention for the few queries that need it.

"Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting", Haoyi Zhou, Shanghang Zhang, Jieqi
Peng, Shuai Zhang, Jianxin Li, Hui Xiong, Wancai Zhang, AAAI 2021 (best paper), arXiv 2012.07436. Code:
github.com/zhouhaoyi/Informer2020 (Apache-2.0); second implementation: `InformerForPrediction` of the transformers
library.

Three parts carry the claim: ProbSparse self-attention, in which only the u ~ c ln L queries of most peaked scores
attend and the lazy ones get the mean of the values; distilling, a convolution and max-pooling that halve the time axis
between encoder layers; and a generative decoder, which gets known steps followed by placeholders and forecasts all of
them at once.

What the published code does and the paper does not say, and what is therefore done here:
- the sparsity measure uses unscaled scores, and divides the sum over the sampled keys by the number of *all* keys;
- keys are drawn anew at every call, in evaluation too, one table for all heads and batch items;
- lazy queries of the causal decoder get the cumulative sum of the values, not their mean;
- the decoder's self-attention output is reinterpreted with heads and time exchanged (`mix`);
- distilling has a batch norm;
- the ETTm1 scripts give the network hourly marks, so that its time features are four, although its data are of 15
  minutes (freq="t" gives five).
"""

from __future__ import annotations

from typing import Any

from zoo.papers.informer.config import ForecasterConfig, InformerConfig
from zoo.papers.informer.forecaster import (
    Forecast,
    InformerForecaster,
    forecast_loss,
    forecaster_example_inputs,
    forecaster_loss,
    forecaster_sample_tables,
    negative_log_likelihood,
    sample_paths,
)
from zoo.papers.informer.layers import AttentionMap
from zoo.papers.informer.model import (
    Informer,
    InformerStack,
    decoder_input,
    example_inputs,
    example_targets,
    forecast,
    loss,
    sample_tables,
    targets,
)
from zoo.papers.informer.weights import forecaster_rules, informer_rules, stack_rules
from zoo.registry import Paper, Variant, register

__all__ = [
    "AttentionMap",
    "Forecast",
    "ForecasterConfig",
    "Informer",
    "InformerConfig",
    "InformerForecaster",
    "InformerStack",
    "decoder_input",
    "forecast",
    "forecast_loss",
    "forecaster_sample_tables",
    "negative_log_likelihood",
    "sample_paths",
    "sample_tables",
    "targets",
]

PAPER = Paper(
    slug="informer",
    title="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
    authors="Haoyi Zhou et al.",
    venue="AAAI",
    year=2021,
    arxiv="2012.07436",
    claim="Attention of only the most peaked queries forecasts as well as full attention does, at L log L cost.",
    code="https://github.com/zhouhaoyi/Informer2020",
    code_license="Apache-2.0",
    remarks="The authors published no forecasting checkpoints; informer_hf is the transformers library's other model.",
)


def _multivariate(name: str, lengths: tuple[int, int, int], parameters: int, **options: Any) -> Variant:
    seq_len, label_len, pred_len = lengths
    config = InformerConfig(seq_len=seq_len, label_len=label_len, pred_len=pred_len, **options)
    return Variant(f"informer_{name}_m{pred_len}", config, parameters)


def _univariate(name: str, lengths: tuple[int, int, int], parameters: int) -> Variant:
    seq_len, label_len, pred_len = lengths
    config = InformerConfig(
        seq_len=seq_len, label_len=label_len, pred_len=pred_len, features="S", enc_in=1, dec_in=1, c_out=1
    )
    return Variant(f"informer_{name}_s{pred_len}", config, parameters)


# Of 2 encoder and 1 decoder layers with 7 channels and with 1, and of 3 and 2 layers with 7 channels.
_SMALL, _SMALL_UNIVARIATE, _LARGE = 11_330_055, 11_308_545, 19_474_439
register(
    PAPER,
    _multivariate("etth1", (48, 48, 24), _SMALL, factor=3),
    _multivariate("etth1", (96, 48, 48), _SMALL),
    _multivariate("etth1", (168, 168, 168), _SMALL),
    _multivariate("etth1", (168, 168, 336), _SMALL),
    _multivariate("etth1", (336, 336, 720), _SMALL),
    _univariate("etth1", (720, 168, 24), _SMALL_UNIVARIATE),
    _univariate("etth1", (720, 168, 48), _SMALL_UNIVARIATE),
    _univariate("etth1", (720, 336, 168), _SMALL_UNIVARIATE),
    _univariate("etth1", (720, 336, 336), _SMALL_UNIVARIATE),
    _univariate("etth1", (720, 336, 720), _SMALL_UNIVARIATE),
    _multivariate("etth2", (48, 48, 24), _SMALL),
    _multivariate("etth2", (96, 96, 48), _SMALL),
    _multivariate("etth2", (336, 336, 168), _LARGE, e_layers=3, d_layers=2),
    _multivariate("etth2", (336, 168, 336), _LARGE, e_layers=3, d_layers=2),
    _multivariate("etth2", (720, 336, 720), _LARGE, e_layers=3, d_layers=2),
    _multivariate("ettm1", (672, 96, 24), _SMALL),
    _multivariate("ettm1", (96, 48, 48), _SMALL),
    _multivariate("ettm1", (384, 384, 96), _SMALL),
    _multivariate("wth", (168, 168, 24), 19_492_364, e_layers=3, d_layers=2, enc_in=12, dec_in=12, c_out=12),
    example_inputs=example_inputs,
    weight_rules=informer_rules,
    loss=loss,
    example_targets=example_targets,
)(Informer)
register(
    PAPER,
    Variant("informer_stack_321", InformerConfig(d_layers=2, d_ff=512), 17_126_407),
    example_inputs=example_inputs,
    weight_rules=stack_rules,
    loss=loss,
    example_targets=example_targets,
)(InformerStack)
register(
    PAPER,
    Variant("informer_hf", ForecasterConfig(), 131_971),
    example_inputs=forecaster_example_inputs,
    weight_rules=forecaster_rules,
    loss=forecaster_loss,
)(InformerForecaster)

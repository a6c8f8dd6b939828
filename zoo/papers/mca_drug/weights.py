"""Names of the PyTorch package's parameters, and of the TensorFlow original's as they are kept here."""

from __future__ import annotations

from zoo.papers.mca_drug.model import MCAConfig
from zoo.weights.names import Rule, Transform, layer

_CONVOLUTION = Transform(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[:, None], 4)
# One head's arrays get an axis of heads, along which they are merged.
_TO_HIDDEN = Transform(lambda a: a.T[None], lambda a: a[0].T, 2)  # (A, W) -> (1, W, A)
_CONTEXT = Transform(lambda a: a.T[:, None], lambda a: a[:, 0].T, 2)  # (A, C) -> (C, 1, A)
_VECTOR = Transform(lambda a: a[None], lambda a: a[0], 1)
_COLUMN = Transform(lambda a: a[:, None], lambda a: a[:, 0], 1)
_ALONG = Transform(lambda a: a.T[..., None], lambda a: a[..., 0].T, 2)  # (positions, C') -> (C', positions, 1)


def _regressor(config: MCAConfig) -> list[Rule]:
    final = r"final_dense(?:\.projection)?" if config.sigmoid else "final_dense"
    return [
        *layer("batch_norm", "batch_norm", "regressor/batch_norm"),
        *layer("linear", r"dense_layers\.dense_(\d+)\.projection", "regressor/dense_{0}"),
        *layer("batch_norm", r"dense_layers\.dense_(\d+)\.batch_norm", "regressor/batch_norm_{0}"),
        Rule(rf"{final}\.weight", "params/regressor/final/kernel", "linear"),
        Rule(rf"{final}\.bias", "params/regressor/final/bias"),
    ]


def _streams() -> list[Rule]:
    return [
        *layer("embedding", "smiles_embedding", "embed"),
        Rule(
            r"convolutional_layers\.convolutional_(\d+)\.convolve\.weight",
            "params/convolution_{0}/convolve/kernel", _CONVOLUTION,
        ),
        Rule(r"convolutional_layers\.convolutional_(\d+)\.convolve\.bias", "params/convolution_{0}/convolve/bias"),
        *layer("batch_norm", r"convolutional_layers\.convolutional_(\d+)\.batch_norm", "convolution_{0}/batch_norm"),
    ]  # fmt: skip


def _heads(published: str, path: str, heads: int, along: bool = False) -> list[Rule]:
    """The rules of all heads of a stream; `published` ends where a head's number follows."""

    def names(rest: str) -> tuple[str, ...]:
        return tuple(rf"{published}{head}\.{rest}" for head in range(heads))

    def rule(rest: str, ours: str, transform: Transform | str, axis: int = 0) -> Rule:
        return Rule(names(rest), f"params/{path}/{ours}", transform, axis)

    return [
        rule(r"reference_projection\.projection\.weight", "weight", _TO_HIDDEN),
        rule(r"reference_projection\.projection\.bias", "bias", _VECTOR),
        rule(r"context_projection\.projection\.weight", "context_weight", _CONTEXT, 1),
        rule(r"context_projection\.projection\.bias", "context_bias", _VECTOR),
        rule(r"alpha_projection\.projection\.weight", "score", "none"),
        *(
            [
                rule(r"context_hidden_projection\.projection\.weight", "along", _ALONG, 2),
                rule(r"context_hidden_projection\.projection\.bias", "along_bias", _COLUMN, 1),
            ]
            if along
            else []
        ),
    ]


def rules(config: MCAConfig) -> list[Rule]:
    """Of `MCA`."""
    table = [
        *_streams(),
        *layer("linear", r"gene_attention_layer\.dense", "gene_attention_0/dense"),
        *_regressor(config),
    ]
    for stream, heads in enumerate(config.heads):
        name = rf"context_attention_layers\.context_attention_{stream}_head_"
        table += _heads(name, f"attention_{stream}", heads)
    return table


def v2_rules(config: MCAConfig) -> list[Rule]:
    """Of `PaccMannV2`."""
    table = [*_streams(), *_regressor(config)]
    for stream, heads in enumerate(config.heads):
        name = rf"molecule_attention_layers\.molecule_attention_{stream}_head_"
        table += _heads(name, f"attention_{stream}", heads, along=True)
    for stream, heads in enumerate(config.gene_heads):
        if heads:
            name = rf"gene_attention_layers\.gene_attention_{stream}_head_"
            table += _heads(name, f"gene_attention_{stream}", heads, along=True)
    return table


def tf_rules(config: MCAConfig) -> list[Rule]:
    """Of `MCATF`: heads are numbered through all streams; vectors of the transcription stand for variables."""
    table = [
        *layer("embedding", "smiles_embedding", "embed"),
        *layer("linear", r"gene_attention\.(\d+)", "gene_attention_{0}/dense"),
        Rule(r"pad\.(\d+)", "params/convolution_{0}/pad"),
        Rule(r"conv\.(\d+)\.weight", "params/convolution_{0}/convolve/kernel", _CONVOLUTION),
        Rule(r"conv\.(\d+)\.bias", "params/convolution_{0}/convolve/bias"),
        *layer("batch_norm", r"conv_bn\.(\d+)", "convolution_{0}/batch_norm"),
        *layer("batch_norm", "input_bn", "regressor/batch_norm"),
        *layer("linear", r"dense_hidden\.(\d+)", "regressor/dense_{0}"),
        *layer("batch_norm", r"dense_bn\.(\d+)", "regressor/batch_norm_{0}"),
        *layer("linear", "logits", "regressor/final"),
    ]
    first = 0
    for stream, heads in enumerate(config.heads):

        def names(rest: str, heads: int = heads, first: int = first) -> tuple[str, ...]:
            return tuple(rf"context\.{first + head}\.{rest}" for head in range(heads))

        path = f"params/attention_{stream}"
        table += [
            Rule(names("w_num_gene_features"), f"params/gene_features_{stream}", _COLUMN, 1),
            Rule(names("w_genes"), f"{path}/context_weight", _CONTEXT, 1),
            Rule(names("b_genes"), f"{path}/context_bias", _VECTOR, 0),
            Rule(names("w_smiles"), f"{path}/weight", _TO_HIDDEN, 0),
            Rule(names("b_smiles"), f"{path}/bias", _VECTOR, 0),
            Rule(names("v"), f"{path}/score", _VECTOR, 0),
        ]
        first += heads
    return table

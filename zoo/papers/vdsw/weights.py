"""Published parameter names of the networks of directions and of PointNet's autoencoder."""

from __future__ import annotations

from zoo.papers.vdsw.amortized import AmortizedConfig
from zoo.papers.vdsw.autoencoder import PointNetConfig
from zoo.weights.names import Rule, layer


def direction_rules(config: AmortizedConfig) -> list[Rule]:
    """Names of a network of directions."""
    if config.kind in ("attn", "eff_attn", "lin_attn"):
        table = []
        for name in ("queries", "keys", "values"):
            table += layer("linear", rf"attn\.to{name}", f"attention/{name}")
        if config.kind == "lin_attn":
            table += layer("linear", r"attn\.Kproj", "attention/project_keys")
        if config.kind == "lin_attn" and not config.sharing:
            table += layer("linear", r"attn\.Vproj", "attention/project_values")
        return table
    table = layer("linear", r"f\.0", "along")
    for published, ours in {"glinear": {"g": "before"}, "nonlinear": {"h": "after"}}.get(config.kind, {}).items():
        table += layer("linear", rf"{published}\.0", f"{ours}_0") + layer("linear", rf"{published}\.2", f"{ours}_1")
    return table


def autoencoder_rules(config: PointNetConfig) -> list[Rule]:
    """Names of PointNet's autoencoder, whose encoder's layers are two sequences, of two and of the rest."""
    table = []
    for index in range(len(config.widths)):
        sequence, place = ("mlp1", index) if index < 2 else ("mlp2", index - 2)
        table += layer("pointwise1d", rf"encoder\.{sequence}\.{3 * place}", f"layers_{index}")
        table += layer("batch_norm", rf"encoder\.{sequence}\.{3 * place + 1}", f"norms_{index}")
    table += layer("linear", r"encoder\.fc_mu", "to_code")
    for index in range(2):
        table += layer("linear", rf"decoder\.fc{index + 1}", f"fc_{index}")
        table += layer("batch_norm", rf"decoder\.bn{index + 1}", f"fc_norms_{index}")
    return table + layer("linear", r"decoder\.fc3", "to_points")

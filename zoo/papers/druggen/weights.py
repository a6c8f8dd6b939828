"""The published names of parameters."""

from __future__ import annotations

from zoo.weights import Rule, layer

_ATTENTION = {"q": "query", "k": "key", "v": "value", "e": "edge", "out_e": "out_edge", "out_n": "out_node"}
ATTENTION = [
    rule for theirs, ours in _ATTENTION.items() for rule in layer("linear", theirs, ours)
]  # fmt: skip


def _body() -> list[Rule]:
    block, ours = r"TransformerEncoder\.Encoder_Blocks\.(\d+)", "body/block_{0}"
    rules: list[Rule] = []
    for kind in ("node", "edge"):
        for index in (0, 1):
            rules += layer("linear", rf"{kind}_layers\.{2 * index}", f"body/embed_{kind}s_{index}")
    for number in (1, 3, 4, 5, 6):
        rules += layer("norm", rf"{block}\.ln{number}", f"{ours}/norm_{number}")
    for name, part in _ATTENTION.items():
        rules += layer("linear", rf"{block}\.attn\.{name}", f"{ours}/attention/{part}")
    for name, part in (("mlp", "mlp"), ("mlp2", "edge_mlp")):
        rules += layer("linear", rf"{block}\.{name}\.fc1", f"{ours}/{part}/expand")
        rules += layer("linear", rf"{block}\.{name}\.fc2", f"{ours}/{part}/project")
    return rules


def generator_rules(config: object) -> list[Rule]:
    """Of the generator."""
    read = layer("linear", "readout_n", "read_nodes") + layer("linear", "readout_e", "read_edges")
    return _body() + read


def critic_rules(config: object) -> list[Rule]:
    """Of the critic."""
    head = [rule for index in range(4) for rule in layer("linear", rf"node_mlp\.{2 * index}", f"head_{index}")]
    return _body() + head

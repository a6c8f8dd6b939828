"""A decoder of bytes for prompts of many tasks (Buehler 2023), whose attention maps may be graphs of the values."""

from zoo.backbones.graph_gpt.language import ask, decode_step, generate, graphs, lm_loss, loss
from zoo.backbones.graph_gpt.model import Graph, GraphGPT, GraphGPTConfig, example_inputs, graph_attention
from zoo.backbones.graph_gpt.weights import graph_rules, weight_rules

__all__ = [
    "Graph",
    "GraphGPT",
    "GraphGPTConfig",
    "ask",
    "decode_step",
    "example_inputs",
    "generate",
    "graph_attention",
    "graph_rules",
    "graphs",
    "lm_loss",
    "loss",
    "weight_rules",
]

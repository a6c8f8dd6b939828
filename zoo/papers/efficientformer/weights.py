"""Published parameter names of EfficientFormer and of its dense backbone."""

from __future__ import annotations

from zoo.backbones import mask_rcnn
from zoo.papers.efficientformer.model import DenseConfig, EfficientFormerConfig
from zoo.weights.names import Rule, layer, under

META4D = [
    Rule("layer_scale_1", "params/pool_scale/scale"),
    Rule("layer_scale_2", "params/project/layer_scale/scale"),
    *layer("pointwise2d", r"mlp\.fc1", "expand/conv"),
    *layer("batch_norm", r"mlp\.norm1", "expand/norm"),
    *layer("pointwise2d", r"mlp\.fc2", "project/conv"),
    *layer("batch_norm", r"mlp\.norm2", "project/norm"),
]


def meta3d(dense: bool = False) -> list[Rule]:
    """A block on tokens; the dense backbone's keeps the classifier's table unused beside its own."""
    unused = [Rule(r"token_mixer\.attention_bias_idxs_seg", None), Rule(r"token_mixer\.attention_biases", None)]
    return [
        Rule("layer_scale_1", "params/out/layer_scale/scale"),
        Rule("layer_scale_2", "params/project/layer_scale/scale"),
        *layer("norm", "(norm1|norm2)", "{0}"),
        *layer("linear", r"token_mixer\.qkv", "attention/qkv"),
        *layer("linear", r"token_mixer\.proj", "out/conv"),
        Rule(rf"token_mixer\.attention_biases{'_seg' * dense}", "params/attention/bias/table", "linear"),
        Rule(r"token_mixer\.attention_bias_idxs", None),
        *(unused if dense else []),
        *layer("linear", r"mlp\.fc1", "expand/conv"),
        *layer("linear", r"mlp\.fc2", "project/conv"),
    ]


def rules(config: EfficientFormerConfig) -> list[Rule]:
    """The names of `snap-research/EfficientFormer`, of the classifier or, for a `DenseConfig`, of the backbone."""
    dense = isinstance(config, DenseConfig)
    table = []
    for index, place in ((0, 0), (1, 3)):
        table += layer("conv2d", rf"patch_embed\.{place}", f"trunk/stem/conv_{index}/conv")
        table += layer("batch_norm", rf"patch_embed\.{place + 1}", f"trunk/stem/conv_{index}/norm")
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            on_tokens = index >= depth - config.token_blocks(stage)
            # The flattening of the map is an entry of its own, before the first block on tokens.
            table += under(
                rf"network\.{2 * stage}\.{index + on_tokens}",
                f"trunk/stage_{stage}_block_{index}",
                meta3d(dense) if on_tokens else META4D,
            )
        if stage < 3:
            table += layer("conv2d", rf"network\.{2 * stage + 1}\.proj", f"trunk/down_{stage}/conv")
            table += layer("batch_norm", rf"network\.{2 * stage + 1}\.norm", f"trunk/down_{stage}/norm")
    if dense:
        return table + [rule for stage in range(4) for rule in layer("norm", f"norm{2 * stage}", f"norm_{stage}")]
    table += layer("norm", "norm", "norm") + layer("linear", "head", "head")
    return table + (layer("linear", "dist_head", "dist_head") if config.distillation else [])


def detector_rules(config: mask_rcnn.DetectorConfig) -> list[Rule]:
    """MMDetection's names of a Mask R-CNN."""
    return mask_rcnn.weight_rules(config, rules(config.backbone))

"""PaccMann's networks: SMILES streams pooled under the context of gated genes, and a dense regressor.

B pairs of compound and cell line, T SMILES tokens (padded on the left), G genes, W the width of a stream, A hidden
numbers of an attention head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.contextual_attention import contextual_attention
from zoo.errors import unknown
from zoo.layers.batch_norm import BatchNorm
from zoo.layers.convolution import torch_bias_init, torch_kernel_init
from zoo.layers.dropout import Dropout
from zoo.layers.partitioning import dense, partitioned

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "relu": nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "selu": nn.selu,
    "lrelu": nn.leaky_relu,
    "elu": nn.elu,
}


@dataclasses.dataclass(frozen=True)
class MCAConfig:
    """A network of the PyTorch package; of `MCATF` and `PaccMannV2` too, but for what they say.

    Attributes:
      vocabulary: SMILES tokens, padding (0) among them.
      length: T of the published recipe; `PaccMannV2` takes no other.
      genes: G.
      gene_features: numbers a gene; more than one in `MCATF` only.
      embedding: width of the embedding, the first stream.
      kernels, filters: widths and channels of the parallel convolutions; none leaves the embedding alone ("ca").
      heads: attention heads of each stream, the embedding's first.
      gene_heads: of `PaccMannV2`: heads over genes of each stream.
      hidden, gene_hidden: A of the heads over tokens, and of those over genes.
      dense: widths of the dense layers.
      dropout: of gene scores, convolutions and dense layers.
      batch_norm: whether there are batch norms.
      activation: of convolutions and dense layers, one of `ACTIVATIONS`.
      context_nonlinearity: behind each projection of the attention heads.
      gene_temperature, molecule_temperature: divide the scores of genes and of tokens.
      gene_to_dense: whether the genes, not gated, join the pooled heads.
      sigmoid: whether the output is one.
      mask_padding: whether padding takes no part in the attention. As published it does take part.
    """

    vocabulary: int = 28
    length: int = 560
    genes: int = 2128
    gene_features: int = 1
    embedding: int = 16
    kernels: tuple[int, ...] = (3, 5, 11)
    filters: tuple[int, ...] = (64, 64, 64)
    heads: tuple[int, ...] = (4, 4, 4, 4)
    gene_heads: tuple[int, ...] = (2, 2, 2, 2)
    hidden: int = 64
    gene_hidden: int = 1
    dense: tuple[int, ...] = (1024, 512)
    dropout: float = 0.5
    batch_norm: bool = True
    activation: str = "relu"
    context_nonlinearity: str = "identity"
    gene_temperature: float = 1.0
    molecule_temperature: float = 1.0
    gene_to_dense: bool = False
    sigmoid: bool = True
    mask_padding: bool = False

    def __post_init__(self) -> None:
        if len(self.kernels) != len(self.filters):
            raise ValueError(f"kernels and filters must be as many, got {self.kernels} and {self.filters}")
        for name in ("heads", "gene_heads"):
            if len(getattr(self, name)) != len(self.filters) + 1:
                raise ValueError(f"{name} must be one number a stream, {len(self.filters) + 1}: {getattr(self, name)}")
        if any(size % 2 == 0 or size < 1 for size in self.kernels):
            raise ValueError(f"kernels must be odd and positive, got {self.kernels}")
        if min(self.heads) < 1 or min(self.filters, default=1) < 1 or min(self.dense, default=1) < 1:
            raise ValueError("heads, filters and dense must be positive")
        for name in ("vocabulary", "length", "genes", "gene_features", "embedding", "hidden", "gene_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("activation", "context_nonlinearity"):
            if getattr(self, name) not in ACTIVATIONS:
                raise unknown(name, getattr(self, name), ACTIVATIONS)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if min(self.gene_temperature, self.molecule_temperature) <= 0:
            raise ValueError("temperatures must be positive")

    @property
    def widths(self) -> tuple[int, ...]:
        """W of each stream."""
        return (self.embedding, *self.filters)


def example_inputs(config: MCAConfig, batch_size: int) -> dict[str, np.ndarray]:
    """`smiles`, int32 (B, T), and `gep`, float32 (B, G)."""
    rng = np.random.default_rng(0)
    shape = (batch_size, config.genes) + ((config.gene_features,) if config.gene_features > 1 else ())
    return {
        "smiles": rng.integers(0, config.vocabulary, (batch_size, config.length), dtype=np.int32),
        "gep": rng.standard_normal(shape, dtype=np.float32),
    }


def example_targets(config: Any, batch_size: int) -> dict[str, np.ndarray]:
    """`ic50`, float32 (B,) in [0, 1]."""
    return {"ic50": np.random.default_rng(1).uniform(size=batch_size).astype(np.float32)}


def check_inputs(config: MCAConfig, smiles: jax.Array, gep: jax.Array, fixed: bool = False) -> None:
    """Raises ValueError unless smiles are integers (B, T) and gep (B, genes), `fixed`: with T the config's length."""
    if smiles.ndim != 2 or not jnp.issubdtype(smiles.dtype, jnp.integer):
        raise ValueError(f"smiles must be integers (batch, length), got {smiles.dtype} {smiles.shape}")
    if fixed and smiles.shape[1] != config.length:
        raise ValueError(f"smiles must be padded to {config.length} tokens, got {smiles.shape[1]}")
    wanted = (smiles.shape[0], config.genes) + ((config.gene_features,) if config.gene_features > 1 else ())
    if gep.shape != wanted:
        raise ValueError(f"gep must be {wanted}, got {gep.shape}")


def linear(
    features: int, inputs: int, axes: tuple[str | None, str | None], name: str | None = None, **options: Any
) -> nn.Dense:
    """A linear layer with PyTorch's initial values."""
    return dense(features, axes, kernel_init=torch_kernel_init, bias_init=torch_bias_init(inputs), name=name, **options)


class Convolution(nn.Module):
    """A convolution along the tokens; activation, dropout, batch norm, in this order."""

    features: int
    size: int
    config: MCAConfig
    pad_row: bool = False  # a trained embedding is the padding, and not zeros
    epsilon: float = 1e-5
    momentum: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, noisy: bool) -> jax.Array:
        """(B, T, embedding) to (B, T, features)."""
        width, side = x.shape[-1], self.size // 2
        if self.pad_row:
            row = self.param("pad", partitioned(nn.initializers.normal(1.0), None, "embed"), (1, width),
                             self.param_dtype)  # fmt: skip
            rows = jnp.broadcast_to(row.astype(x.dtype), (x.shape[0], side, width))
            x = jnp.concatenate([rows, x, rows], axis=1)
        convolution = nn.Conv(
            self.features, (self.size,), padding="VALID" if self.pad_row else [(side, side)], dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=partitioned(torch_kernel_init, None, "embed", "mlp"),
            bias_init=partitioned(torch_bias_init(self.size * width), "mlp"), name="convolve",
        )  # fmt: skip
        x = ACTIVATIONS[self.config.activation](convolution(x))
        x = Dropout(self.config.dropout)(x, noisy)
        if self.config.batch_norm:
            x = BatchNorm(self.epsilon, self.momentum, self.dtype, self.param_dtype, "mlp", name="batch_norm")(x, train)
        return x


class Regressor(nn.Module):
    """A batch norm, dense layers (linear, batch norm, activation, dropout), one output."""

    config: MCAConfig
    norm_input: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, noisy: bool) -> jax.Array:
        """(B, features) to (B, 1)."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(BatchNorm, self.epsilon, self.momentum, **options)
        if self.config.batch_norm and self.norm_input:
            x = norm(axis="embed", name="batch_norm")(x, train)
        for index, width in enumerate(self.config.dense):
            x = linear(width, x.shape[-1], ("embed", "mlp"), f"dense_{index}", **options)(x)
            if self.config.batch_norm:
                x = norm(axis="mlp", name=f"batch_norm_{index}")(x, train)
            x = Dropout(self.config.dropout)(ACTIVATIONS[self.config.activation](x), noisy)
        x = linear(1, x.shape[-1], ("mlp", None), "final", **options)(x)
        return nn.sigmoid(x) if self.config.sigmoid else x


class GeneGate(nn.Module):
    """softmax(dropout(W g + b) / temperature) over genes."""

    config: MCAConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, genes: jax.Array, noisy: bool) -> jax.Array:
        """(B, G) to weights (B, G), float32."""
        count = genes.shape[-1]
        scores = linear(count, count, ("embed", "mlp"), "dense", dtype=self.dtype, param_dtype=self.param_dtype)(genes)
        scores = Dropout(self.config.dropout)(scores, noisy).astype(jnp.float32)
        return jax.nn.softmax(scores / self.config.gene_temperature)


class ContextHeads(nn.Module):
    """All attention heads of a stream at once.

    Parameters: `weight` (heads, W, A) and `bias` (heads, A) of the tokens' projection, `context_weight` (C, heads, A)
    and `context_bias` (heads, A) of the context's, `score` (heads, A). With `positions`, the context is a sequence of
    C' numbers or vectors, projected to A and then along the sequence to one row a token: `along` (C', positions, heads)
    and `along_bias` (positions, heads).
    """

    heads: int
    hidden: int
    width: int
    context_width: int
    config: MCAConfig
    temperature: float = 1.0
    context_length: int | None = None
    positions: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """The parameters."""

        def parameter(name: str, fan_in: int, axes: tuple[str | None, ...], *shape: int) -> jax.Array:
            return self.param(name, partitioned(torch_bias_init(fan_in), *axes), shape, self.param_dtype)

        hidden = (self.heads, self.hidden)
        self.weight = parameter("weight", self.width, ("heads", "embed", None), self.heads, self.width, self.hidden)
        self.bias = parameter("bias", self.width, ("heads", None), *hidden)
        self.context_weight = parameter(
            "context_weight", self.context_width, ("embed", "heads", None), self.context_width, *hidden
        )
        self.context_bias = parameter("context_bias", self.context_width, ("heads", None), *hidden)
        self.score = parameter("score", self.hidden, ("heads", None), *hidden)
        if self.positions is not None:
            length = self.context_length
            assert length is not None
            self.along = parameter("along", length, ("embed", None, "heads"), length, self.positions, self.heads)
            self.along_bias = parameter("along_bias", length, (None, "heads"), self.positions, self.heads)

    def context(self, context: jax.Array) -> jax.Array:
        """(B, C), or a sequence (B, C', C), to (B, 1 or positions, heads, A): all that needs no token."""
        f = ACTIVATIONS[self.config.context_nonlinearity]
        weight, bias = (x.astype(context.dtype) for x in (self.context_weight, self.context_bias))
        if self.positions is None:
            return f(jnp.einsum("bc,cha->bha", context, weight) + bias)[:, None]
        along, along_bias = (x.astype(context.dtype) for x in (self.along, self.along_bias))
        if self.config.context_nonlinearity != "identity":
            rows = f(jnp.einsum("bnc,cha->bnha", context, weight) + bias)
            return f(jnp.einsum("bnha,nph->bpha", rows, along) + along_bias[..., None])
        # Two linear maps one after the other, along the sequence first: no (C', heads, A) for every pair.
        rows = jnp.einsum("bnc,nph->bphc", context, along)
        shift = along.sum(0)[..., None] * bias + along_bias[..., None]
        return jnp.einsum("bphc,cha->bpha", rows, weight) + shift

    def __call__(
        self, tokens: jax.Array, context: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens (B, T, W) under what `context` gave: pooled (B, heads W), weights (B, T, heads)."""
        dtype = tokens.dtype
        weight, bias, score = (x.astype(dtype) for x in (self.weight, self.bias, self.score))
        f = ACTIVATIONS[self.config.context_nonlinearity]
        if self.config.context_nonlinearity == "identity":
            context = context + bias
        else:
            context = context + f(jnp.einsum("btw,hwa->btha", tokens, weight) + bias)
            weight = jnp.zeros_like(weight)
        pooled, weights = contextual_attention(
            tokens, weight, context.astype(dtype), score, valid=valid, temperature=self.temperature
        )
        return pooled.reshape(pooled.shape[0], -1), weights


class Genes(NamedTuple):
    """What of a cell line needs no compound."""

    weights: jax.Array  # (B, G)
    contexts: tuple[jax.Array, ...]  # of each stream, (B, 1, heads, A)
    dense: jax.Array | None  # (B, G) for the dense layers


class MCA(nn.Module):
    """Multiscale convolutional encoders with contextual attention.

    The network is three functions of a compound, of a cell line, and of both, so that a matrix of many compounds and
    cells costs the first two once each (`predict_matrix`).
    """

    config: MCAConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32
    # Of the TensorFlow original: a gate for each stream, trained padding of convolutions.
    original: bool = dataclasses.field(default=False, kw_only=True)

    def setup(self) -> None:
        """The parts."""
        config = self.config
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # TensorFlow's batch norms.
        norms: dict[str, Any] = {"epsilon": 1e-3, "momentum": 0.01} if self.original else {}
        self.embed = nn.Embed(
            config.vocabulary, config.embedding, **options,
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
        )  # fmt: skip
        self.convolutions = [
            Convolution(features, size, config, self.original, **norms, **options, name=f"convolution_{index}")
            for index, (features, size) in enumerate(zip(config.filters, config.kernels, strict=True))
        ]
        gates = len(config.heads) if self.original else 1
        self.gates = [GeneGate(config, **options, name=f"gene_attention_{index}") for index in range(gates)]
        if self.original:
            self.gene_weights = [
                self.param(
                    f"gene_features_{index}", partitioned(nn.initializers.normal(0.1), "embed", "heads"),
                    (config.gene_features, heads), self.param_dtype,
                )
                for index, heads in enumerate(config.heads)
            ]  # fmt: skip
        self.attention = [
            ContextHeads(
                heads, config.hidden, width, config.genes, config, config.molecule_temperature, **options,
                name=f"attention_{index}",
            )
            for index, (heads, width) in enumerate(zip(config.heads, config.widths, strict=True))
        ]  # fmt: skip
        self.regressor = Regressor(config, **norms, **options)

    def encode_smiles(self, smiles: jax.Array, train: bool = False, noisy: bool = False) -> tuple[jax.Array, ...]:
        """(B, T) to the streams, (B, T, W) each."""
        embedded = self.embed(smiles)
        return (embedded, *(convolution(embedded, train, noisy) for convolution in self.convolutions))

    def encode_genes(self, gep: jax.Array, noisy: bool = False) -> Genes:
        """(B, G) to the gate and every head's context."""
        if self.dtype is not None:
            gep = gep.astype(self.dtype)
        if not self.original:
            weights = self.gates[0](gep, noisy)
            gated = weights.astype(gep.dtype) * gep
            contexts = tuple(heads.context(gated) for heads in self.attention)
            return Genes(weights, contexts, gep if self.config.gene_to_dense else None)
        features = gep if gep.ndim == 3 else gep[..., None]
        means = features.mean(axis=-1)
        gates, contexts_ = [], []
        for gate, mix, heads in zip(self.gates, self.gene_weights, self.attention, strict=True):
            gates.append(gate(means, noisy))
            gated = gates[-1].astype(gep.dtype)[..., None] * features
            # Each head's own mixture of a gene's numbers: (B, heads, G), its own weights on top.
            genes = jnp.einsum("bgf,fh->bhg", gated, mix.astype(gep.dtype))
            projected = jnp.einsum("bhg,gha->bha", genes, heads.context_weight.astype(gep.dtype))
            contexts_.append((projected + heads.context_bias.astype(gep.dtype))[:, None])
        average = jnp.mean(jnp.stack(gates), axis=0)
        return Genes(average, tuple(contexts_), means if self.config.gene_to_dense else None)

    def combine(
        self, smiles: jax.Array, streams: tuple[jax.Array, ...], genes: Genes, train: bool = False, noisy: bool = False
    ) -> dict[str, jax.Array]:
        """The outputs of pairs, from what `encode_smiles` and `encode_genes` gave for them."""
        valid = smiles != 0 if self.config.mask_padding else None
        found = [
            heads(stream, context, valid)
            for heads, stream, context in zip(self.attention, streams, genes.contexts, strict=True)
        ]
        pooled = [x for x, _ in found] + ([] if genes.dense is None else [genes.dense])
        per_head = jnp.concatenate([weights for _, weights in found], axis=-1)
        return {
            "ic50": self.regressor(jnp.concatenate(pooled, axis=-1), train, noisy),
            "gene_attention": genes.weights,
            "smiles_attention": per_head.mean(axis=-1),
            "smiles_attention_heads": per_head,
        }

    def __call__(
        self, smiles: jax.Array, gep: jax.Array, train: bool = False, noisy: bool | None = None
    ) -> dict[str, jax.Array]:
        """Sensitivities and where they come from.

        Args:
          smiles: integers (B, T), padding is 0.
          gep: (B, G), of `MCATF` also (B, G, features): expression and more, standardised.
          train: batch statistics; "batch_stats" must be mutable.
          noisy: dropout; None is `train`. On alone it is Monte-Carlo dropout.

        Returns:
          "ic50" (B, 1), "gene_attention" (B, G), "smiles_attention" (B, T), the mean of the heads', and
          "smiles_attention_heads" (B, T, all heads), stream by stream.

        Raises:
          ValueError: a shape or dtype is wrong.
        """
        check_inputs(self.config, smiles, gep)
        noisy = train if noisy is None else noisy
        return self.combine(
            smiles, self.encode_smiles(smiles, train, noisy), self.encode_genes(gep, noisy), train, noisy
        )


class MCATF(MCA):
    """The authors' first network, in TensorFlow: four gates, trained padding of convolutions, no sigmoid."""

    original: bool = dataclasses.field(default=True, kw_only=True)


class PaccMannV2(nn.Module):
    """The later model: heads over tokens in the context of genes, and heads over genes in the context of tokens."""

    config: MCAConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, smiles: jax.Array, gep: jax.Array, train: bool = False, noisy: bool | None = None
    ) -> dict[str, jax.Array]:
        """As of `MCA`, for T = the config's length; "gene_attention" is (B, G, all heads over genes).

        "smiles_attention" is that of each head, (B, T, heads).
        """
        config = self.config
        check_inputs(config, smiles, gep, fixed=True)
        noisy = train if noisy is None else noisy
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedded = nn.Embed(
            config.vocabulary, config.embedding, **options, name="embed",
            embedding_init=partitioned(nn.initializers.normal(1.0), "vocab", "embed"),
        )(smiles)  # fmt: skip
        genes = gep.astype(embedded.dtype)[..., None]
        streams = [embedded] + [
            Convolution(features, size, config, **options, name=f"convolution_{index}")(embedded, train, noisy)
            for index, (features, size) in enumerate(zip(config.filters, config.kernels, strict=True))
        ]
        valid = smiles != 0 if config.mask_padding else None
        pooled, by_token, by_gene, gated = [], [], [], []
        for index, stream in enumerate(streams):
            width = stream.shape[-1]
            heads = ContextHeads(
                config.heads[index], config.hidden, width, 1, config, config.molecule_temperature, config.genes,
                config.length, **options, name=f"attention_{index}",
            )  # fmt: skip
            vectors, weights = heads(stream, heads.context(genes), valid)
            pooled.append(vectors)
            by_token.append(weights)
            if config.gene_heads[index]:
                heads = ContextHeads(
                    config.gene_heads[index], config.gene_hidden, 1, width, config, config.gene_temperature,
                    config.length, config.genes, **options, name=f"gene_attention_{index}",
                )  # fmt: skip
                _, weights = heads(genes, heads.context(stream))
                by_gene.append(weights)
                products = (weights * gep[..., None]).swapaxes(1, 2)
                gated.append(products.reshape(gep.shape[0], -1).astype(embedded.dtype))
        together = [*pooled, *gated] + ([genes[..., 0]] if config.gene_to_dense else [])
        regressor = Regressor(config, **options, name="regressor")
        return {
            "ic50": regressor(jnp.concatenate(together, axis=-1), train, noisy),
            "gene_attention": jnp.concatenate(by_gene, axis=-1) if by_gene else jnp.zeros((*gep.shape, 0)),
            "smiles_attention": jnp.concatenate(by_token, axis=-1),
        }

"""Gated short convolutions: the cheap layers between the attentions of Based."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax

from zoo.mixers.base import register
from zoo.mixers.recurrent import RecurrentMixer, check_batch_size


class ConvolutionState(NamedTuple):
    """The last inputs of a short convolution."""

    past: jax.Array  # (batch, kernel_size - 1, width)


@register("gated_convolution")
class GatedConvolution(RecurrentMixer):
    """out(silu(convolution(u_1)) u_2), [u_1, u_2] = in(x): Based's language models (Arora et al. 2024).

    Fields beside those of `Mixer`:
      expand: width of u_1 and u_2, as a multiple of features.
      kernel_size: of the convolution, which has no bias; the projections have.
    """

    expand: int = 2
    kernel_size: int = 3

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        width = self.expand * self.features
        first = self.project(width, "in", use_bias=True)(x)
        second = self.project(width, "gate", use_bias=True)(x)
        convolve = self.convolution(width, "convolution", kernel_size=self.kernel_size)
        convolved, past = convolve(first, None if state is None else state.past, count)
        y = self.project_out(use_bias=True)(convolved * second)
        return y, None if state is None else ConvolutionState(past)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        return ConvolutionState(self.empty_convolution(batch_size, self.kernel_size, self.expand * self.features))


@register("base_convolution")
class BaseConvolution(RecurrentMixer):
    """convolution(x) (W x + b) + x: the layer of the recall study (Arora et al. 2023, "Zoology", BaseConv).

    Fields beside those of `Mixer`:
      kernel_size: of the convolution, which has a bias.
    """

    kernel_size: int = 3

    @nn.compact
    def mix(self, x, state, count):
        """See `RecurrentMixer`."""
        convolve = self.convolution(
            self.features, "convolution", kernel_size=self.kernel_size, use_bias=True, activation=None, axis="embed"
        )
        convolved, past = convolve(x, None if state is None else state.past, count)
        y = convolved * self.project(self.features, "projection", "embed", use_bias=True)(x) + x
        return y, None if state is None else ConvolutionState(past)

    @nn.nowrap
    def init_state(self, batch_size, length):
        """See `Mixer`."""
        check_batch_size(batch_size)
        return ConvolutionState(self.empty_convolution(batch_size, self.kernel_size, self.features))

"""`mondeq-conv`: a convolutional monotone operator equilibrium network, one circular convolution over one grid.

    z* = relu(W z* + u),   u = conv(normalise(x)),   W = (1 - m) I - A^T A + B - B^T,   A, B circular convolutions

The Fourier transform over the grid turns W into one small matrix for each frequency, and with it the inverse that
Peaceman-Rachford splitting asks for (`models.splitting`).

Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.models.base import add_family
from robustbench_deq.models.splitting import InverseSplittingConfig, SpectralDEQ


class MonDEQConvConfig(InverseSplittingConfig):
    monotonicity: float = Field(1.0, gt=0, description="m, the strong monotonicity of I - W")
    channels: int = Field(32, ge=1, le=4096, description="channels of the state")
    stride: int = Field(2, ge=1, description="stride of the injection's convolution")


@add_family("mondeq-conv", MonDEQConvConfig)
class MonDEQConv(SpectralDEQ):
    """State `(batch, channels, rows, columns)`: the image's sides divided by the stride, rounded up."""

    def __init__(self, config: MonDEQConvConfig) -> None:
        super().__init__(config)
        colours, height, width = config.input_shape
        channels = config.channels
        self.grid = (channels, -(-height // config.stride), -(-width // config.stride))
        self.injection = nn.Conv2d(colours, channels, 5, stride=config.stride, padding=2)
        self.a = nn.Parameter(circular_kernel(channels, channels))
        self.b = nn.Parameter(circular_kernel(channels, channels))
        self.readout = nn.Linear(channels * self.grid[1] * self.grid[2], config.num_classes)

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(self.normalise(x))

    def symmetric_part(self, z: Tensor) -> Tensor:
        return circular_conv(z, self.a)

    def skew_part(self, z: Tensor) -> Tensor:
        return circular_conv(z, self.b)


def circular_kernel(inputs: int, outputs: int) -> Tensor:
    """Random 3x3 weights `(outputs, inputs, 3, 3)` of a map whose gain is about a half."""
    return torch.randn(outputs, inputs, 3, 3) * 0.5 * (9 * inputs) ** -0.5


def circular_conv(z: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """A 3x3 convolution whose borders wrap around."""
    return F.conv2d(F.pad(z, (1, 1, 1, 1), mode="circular"), kernel, stride=stride)

"""`mondeq-multi`: a monotone operator equilibrium network of several tiers, each at half the resolution of the last.

    z* = relu(W z* + u),   W = (1 - m) I - A^T A + B - B^T

A holds a circular convolution within each tier and one of stride 2 from each tier to the next; B one within each tier.
So `A^T A` couples neighbouring tiers in both directions. The image is injected into the finest tier.

The tiers are packed on the grid of the coarsest: space-to-depth turns 2 x 2 places of a tier into four channels. On
that grid strided convolutions, too, commute with circular shifts, so the whole W is one matrix for each frequency
(`models.splitting.SpectralDEQ`), and its inverse is exact.

Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020, section 4.2 and appendix
(multi-tier networks). Departures: the packing, which replaces their block elimination.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustbench_deq.models.base import Size, add_family
from robustbench_deq.models.mondeq_conv import circular_conv, circular_kernel
from robustbench_deq.models.splitting import InverseSplittingConfig, SpectralDEQ


class MonDEQMultiConfig(InverseSplittingConfig):
    monotonicity: float = Field(1.0, gt=0, description="m, the strong monotonicity of I - W")
    channels: tuple[Size, ...] = Field((16, 32), min_length=1, description="channels of each tier")
    stride: int = Field(2, ge=1, description="stride of the injection's convolution")

    def finest(self) -> tuple[int, int]:
        """Rows and columns of the finest tier."""
        return tuple(-(-side // self.stride) for side in self.input_shape[1:])

    @model_validator(mode="after")
    def _check_sides(self) -> MonDEQMultiConfig:
        factor = 2 ** (len(self.channels) - 1)
        if any(side % factor for side in self.finest()):
            raise ValueError(f"sides after the injection ({self.finest()}) that {factor} divides")
        return self


@add_family("mondeq-multi", MonDEQMultiConfig)
class MonDEQMulti(SpectralDEQ):
    """State `(batch, packed channels, rows, columns)` on the grid of the coarsest tier."""

    def __init__(self, config: MonDEQMultiConfig) -> None:
        super().__init__(config)
        colours = config.input_shape[0]
        channels = config.channels
        rows, columns = config.finest()
        self.factors = [2 ** (len(channels) - 1 - tier) for tier in range(len(channels))]
        self.packed = [count * factor**2 for count, factor in zip(channels, self.factors, strict=True)]
        self.grid = (sum(self.packed), rows // self.factors[0], columns // self.factors[0])
        self.injection = nn.Conv2d(colours, channels[0], 5, stride=config.stride, padding=2)
        self.a_within = nn.ParameterList(circular_kernel(count, count) for count in channels)
        self.a_down = nn.ParameterList(circular_kernel(fine, coarse) for fine, coarse in itertools.pairwise(channels))
        self.b_within = nn.ParameterList(circular_kernel(count, count) for count in channels)
        size = self.grid[0] * self.grid[1] * self.grid[2]
        self.readout = nn.Linear(size, config.num_classes)

    def inject(self, x: Tensor) -> Tensor:
        first = F.pixel_unshuffle(self.injection(self.normalise(x)), self.factors[0])
        return F.pad(first, (0, 0, 0, 0, 0, self.grid[0] - first.shape[1]))

    def tiers(self, z: Tensor) -> list[Tensor]:
        """The packed state's tiers, `(batch, channels, rows, columns)` each, finest first."""
        parts = z.split(self.packed, dim=1)
        return [F.pixel_shuffle(part, factor) for part, factor in zip(parts, self.factors, strict=True)]

    def pack(self, tiers: list[Tensor]) -> Tensor:
        """The inverse of `tiers`."""
        parts = [F.pixel_unshuffle(tier, factor) for tier, factor in zip(tiers, self.factors, strict=True)]
        return torch.cat(parts, dim=1)

    def symmetric_part(self, z: Tensor) -> Tensor:
        tiers = self.tiers(z)
        images = [circular_conv(tier, kernel) for tier, kernel in zip(tiers, self.a_within, strict=True)]
        for index, kernel in enumerate(self.a_down):
            images[index + 1] = images[index + 1] + circular_conv(tiers[index], kernel, stride=2)
        return self.pack(images)

    def skew_part(self, z: Tensor) -> Tensor:
        return self.pack(
            [circular_conv(tier, kernel) for tier, kernel in zip(self.tiers(z), self.b_within, strict=True)]
        )

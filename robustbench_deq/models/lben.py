"""`lben`: a Lipschitz-bounded equilibrium network. The logits change by at most gamma times the image's L2 change.

    z* = relu(W z* + u),   u = U normalise(x) + b,   logits = V z* + c
    W  = I - (V^T V / (2 gamma) + U' U'^T / (2 gamma) + A^T A + margin I + S - S^T)

with `U' = U / pixel_std`, the injection by the pixels. Then the theorem's condition

    2 Lambda - Lambda W - W^T Lambda - V^T V / gamma - Lambda U' U'^T Lambda / gamma  >=  2 margin I

holds with Lambda = I, which gives the bound gamma and a unique equilibrium, and W is that of a monotone operator. The
cell is a step of a splitting (`models.splitting`).

Departure: the paper learns the positive diagonal Lambda too. A rectified equilibrium does not change when the rows of
`(I - W) z - u` are scaled by positive numbers, so that a Lambda only rescales U and b, which are learnt anyway; and the
splittings converge in the plain metric for Lambda = I alone.

Source: Revay, Wang, Manchester, "Lipschitz bounded equilibrium networks", arXiv 2010.01732, Theorem 2 and Eq. 15.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.models.base import add_family
from robustbench_deq.models.monotone_bounds import MonotoneBounds
from robustbench_deq.models.splitting import DenseConfig, DenseDEQ, InverseSplittingConfig


class LBENConfig(InverseSplittingConfig, DenseConfig):
    lipschitz: float = Field(5.0, gt=0, description="gamma, the L2 Lipschitz bound from pixels in [0, 1] to logits")
    margin: float = Field(0.01, gt=0, description="strict positivity in the theorem's condition")


@add_family("lben", LBENConfig)
class LBEN(DenseDEQ):
    """State `(batch, hidden)`."""

    def __init__(self, config: LBENConfig) -> None:
        super().__init__(config)
        colours, height, width = config.input_shape
        self.injection = nn.Linear(colours * height * width, config.hidden)
        self.readout = nn.Linear(config.hidden, config.num_classes)
        scale = 0.5 * config.hidden**-0.5
        self.a = nn.Parameter(scale * torch.randn(config.hidden, config.hidden))
        self.s = nn.Parameter(scale * torch.randn(config.hidden, config.hidden))

    def operator(self) -> Tensor:
        gamma = self.config.lipschitz
        injection = self.injection.weight / self.config.pixel_std
        gap = (self.readout.weight.mT @ self.readout.weight + injection @ injection.mT) / (2 * gamma)
        gap = gap + self.a.mT @ self.a + self.s - self.s.mT
        return (1.0 - self.config.margin) * torch.eye(len(gap), device=gap.device, dtype=gap.dtype) - gap

    def certificates(self) -> dict[str, float]:
        """The monotonicity as measured, and the bound that the operator is built for."""
        return {"monotonicity": self.monotonicity(), "lipschitz": self.config.lipschitz}

    def _measure_bounds(self) -> MonotoneBounds:
        """A difference of two logits moves by at most sqrt(2) gamma, too: the smaller of both bounds holds."""
        bounds = super()._measure_bounds()
        return bounds._replace(gain=bounds.gain.clamp_max(math.sqrt(2) * self.config.lipschitz))

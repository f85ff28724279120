"""`test-linear`: an affine cell with a closed-form equilibrium, for tests and CI.

    f(z, u) = A z + u,   u = U x + b,   z* = (I - A)^-1 (U x + b),   logits = V z*

A has spectral norm `contraction`, so Picard converges at that rate. The logits are affine in x, so the strongest
perturbation of a margin is known: `eps g / ||g||_2` for L2 and `eps sign(g)` for Linf (before the pixel box).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.models.base import FamilyModel, ModelConfig, add_family


class LinearConfig(ModelConfig):
    hidden: int = Field(12, ge=1, le=16384, description="size of the state")
    contraction: float = Field(0.6, gt=0, lt=1, description="spectral norm of A")
    seed: int = Field(0, ge=0, description="of the weights, which are fixed")


@add_family("test-linear", LinearConfig)
class Linear(FamilyModel):
    """State `(batch, hidden)`."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        colours, height, width = config.input_shape
        stream = torch.Generator().manual_seed(config.seed)
        a = torch.randn(config.hidden, config.hidden, generator=stream)
        self.a = nn.Parameter(a * config.contraction / torch.linalg.matrix_norm(a, ord=2))
        self.injection = nn.Linear(colours * height * width, config.hidden)
        self.readout = nn.Linear(config.hidden, config.num_classes, bias=False)
        for parameter in (self.injection.weight, self.injection.bias, self.readout.weight):
            parameter.data = torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(x.flatten(1))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return z @ self.a.mT + u

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)

    def input_matrix(self) -> Tensor:
        """`V (I - A)^-1 U` `(num_classes, pixels)`: the logits' derivative with respect to the input."""
        eye = torch.eye(self.config.hidden, dtype=self.a.dtype, device=self.a.device)
        return self.readout.weight @ torch.linalg.solve(eye - self.a, self.injection.weight)

"""`mondeq-fc`: a fully connected monotone operator equilibrium network; its equilibrium exists and is unique.

    z* = relu(W z* + u),   u = U normalise(x) + b,   W = (1 - m) I - A^T A + B - B^T,   so  sym(I - W) >= m I.

The cell is one forward-backward step, which has the same fixed point:

    f(z, u) = relu((1 - a) z + a (W z + u))

Plain iteration of it surely converges for `0 < a < 2m / ||I - W||_2^2`. The shipped operators have grown beyond that
bound by a factor of 3 to 20; for them holds what the diagnostics measure on data.

Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020, Proposition 1 and section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models.base import ModelConfig, add_family


class MonDEQFCConfig(ModelConfig):
    hidden: int = Field(128, ge=1, description="size of the state")
    monotonicity: float = Field(1.0, gt=0, description="m, the strong monotonicity of I - W")
    splitting_step: float = Field(0.3, gt=0, description="a, the step of the forward-backward splitting")


@add_family("mondeq-fc", MonDEQFCConfig)
class MonDEQFC(EquilibriumModel):
    """State `(batch, hidden)`."""

    def __init__(self, config: MonDEQFCConfig) -> None:
        super().__init__()
        self.config = config
        self.input_shape, self.num_classes = config.input_shape, config.num_classes
        colours, height, width = config.input_shape
        self.injection = nn.Linear(colours * height * width, config.hidden)
        scale = config.hidden**-0.5
        self.a = nn.Parameter(torch.randn(config.hidden, config.hidden) * 0.5 * scale)
        self.b = nn.Parameter(torch.randn(config.hidden, config.hidden) * 0.5 * scale)
        self.readout = nn.Linear(config.hidden, config.num_classes)
        self._cached: tuple[object, Tensor] | None = None

    def operator(self) -> Tensor:
        """W `(hidden, hidden)`."""
        eye = torch.eye(self.config.hidden, device=self.a.device, dtype=self.a.dtype)
        return (1.0 - self.config.monotonicity) * eye - self.a.mT @ self.a + self.b - self.b.mT

    def _step_matrix(self) -> Tensor:
        """`(1 - a) I + a W`; built anew only when a parameter has changed or its gradient is wanted."""
        step = self.config.splitting_step
        eye = torch.eye(self.config.hidden, device=self.a.device, dtype=self.a.dtype)
        if torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad):
            return (1.0 - step) * eye + step * self.operator()
        key = (self.a.data_ptr(), self.b.data_ptr(), self.a._version, self.b._version, self.a.dtype)
        if self._cached is None or self._cached[0] != key:
            with torch.no_grad():
                self._cached = (key, (1.0 - step) * eye + step * self.operator())
        return self._cached[1]

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(((x - self.config.pixel_mean) / self.config.pixel_std).flatten(1))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return F.relu(F.linear(z, self._step_matrix()) + self.config.splitting_step * u)

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)

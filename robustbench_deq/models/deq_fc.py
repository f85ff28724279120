"""`deq-fc`: the textbook DEQ, a weight-tied, input-injected fully connected layer.

    f(z, u) = phi(W z + u),   u = U normalise(x) + b,   phi = tanh or ReLU,   logits = V z + c

W is initialised with a spectral norm below one, so that an untrained model has a unique equilibrium.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019; El Ghaoui et al., "Implicit deep learning", 2021.
"""

from __future__ import annotations

import enum

import torch
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models.base import ModelConfig, add_family


class Activation(enum.Enum):
    TANH = "tanh"
    RELU = "relu"


class DEQFCConfig(ModelConfig):
    hidden: int = Field(128, ge=1, description="size of the state")
    activation: Activation = Field(Activation.TANH, description="tanh or relu")
    init_norm: float = Field(0.7, gt=0, description="spectral norm of W at initialisation")


@add_family("deq-fc", DEQFCConfig)
class DEQFC(EquilibriumModel):
    """State `(batch, hidden)`."""

    def __init__(self, config: DEQFCConfig) -> None:
        super().__init__()
        self.config = config
        self.input_shape, self.num_classes = config.input_shape, config.num_classes
        colours, height, width = config.input_shape
        self.injection = nn.Linear(colours * height * width, config.hidden)
        self.recurrence = nn.Linear(config.hidden, config.hidden, bias=False)
        self.readout = nn.Linear(config.hidden, config.num_classes)
        self.activation = {Activation.TANH: torch.tanh, Activation.RELU: torch.relu}[config.activation]
        weight = self.recurrence.weight.data
        weight.mul_(config.init_norm / torch.linalg.matrix_norm(weight, ord=2))

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(((x - self.config.pixel_mean) / self.config.pixel_std).flatten(1))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.activation(self.recurrence(z) + u)

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)

"""`deq-fc`: the textbook DEQ, a weight-tied, input-injected fully connected layer.

    f(z, u) = phi(W z + u),   u = U normalise(x) + b,   phi = tanh or ReLU,   logits = V z + c

W is initialised with a spectral norm below one, so that an untrained model has a unique equilibrium. As options, W as
norms and directions of its rows, and a group norm of each sample's new state, f(z, u) = GN(phi(W z + u)); that rescales
the state, so that the untrained cell need not contract.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019; El Ghaoui et al., "Implicit deep learning", 2021.
"""

from __future__ import annotations

import enum
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robustbench_deq.models.base import FamilyModel, SizedConfig, Sizes, add_family, group_norm


class Activation(enum.Enum):
    TANH = "tanh"
    RELU = "relu"


class DEQFCConfig(SizedConfig):
    sizes: ClassVar[Sizes] = {
        "tiny": {"hidden": 32},
        "small": {"hidden": 128},
        "base": {"hidden": 512},
    }

    hidden: int = Field(128, ge=1, le=16384, description="size of the state")
    activation: Activation = Field(Activation.TANH, description="tanh or relu")
    init_norm: float = Field(0.7, gt=0, description="spectral norm of W at initialisation")
    groups: int = Field(0, ge=0, description="groups of the group norm, which divide hidden; 0: no group norm")
    has_weight_norm: bool = Field(False, description="reparametrise W by norm and direction")

    @model_validator(mode="after")
    def _check_groups(self) -> DEQFCConfig:
        if self.groups and self.hidden % self.groups:
            raise ValueError(f"hidden ({self.hidden}) that is a multiple of groups ({self.groups})")
        if self.groups == self.hidden:  # a single value has no spread
            raise ValueError(f"fewer groups than hidden ({self.hidden})")
        return self


@add_family("deq-fc", DEQFCConfig)
class DEQFC(FamilyModel):
    """State `(batch, hidden)`."""

    def __init__(self, config: DEQFCConfig) -> None:
        super().__init__(config)
        colours, height, width = config.input_shape
        self.injection = nn.Linear(colours * height * width, config.hidden)
        self.recurrence = nn.Linear(config.hidden, config.hidden, bias=False)
        self.readout = nn.Linear(config.hidden, config.num_classes)
        self.activation = {Activation.TANH: torch.tanh, Activation.RELU: torch.relu}[config.activation]
        self.norm = group_norm(config.groups, config.hidden)
        weight = self.recurrence.weight.data
        weight.mul_(config.init_norm / torch.linalg.matrix_norm(weight, ord=2))
        if config.has_weight_norm:
            weight_norm(self.recurrence)

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(self.normalise(x).flatten(1))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(self.activation(self.recurrence(z) + u))

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)

"""An example of one's own DEQ: a gated fully connected cell on 8x8 digits, untrained.

Attack it with `robustbench-deq attack configs/models/own_model.py:build --epsilon 0.5 --data digits`.
"""

import torch
from torch import Tensor, nn

from robustbench_deq import EquilibriumModel


class OwnDEQ(EquilibriumModel):
    """`f(z, u) = tanh(W z + u) / 2`, a contraction while the spectral norm of W is below two."""

    input_shape, num_classes = (1, 8, 8), 10

    def __init__(self) -> None:
        super().__init__()
        self.injection, self.recurrence, self.readout = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(x.flatten(1) - 0.3)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.recurrence(z) + u) / 2

    def head(self, z: Tensor) -> Tensor:
        return self.readout(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)


def build() -> EquilibriumModel:
    torch.manual_seed(0)
    return OwnDEQ()

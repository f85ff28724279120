"""An example of one's own network of the torchdeq library, which the extra `peers` installs. Untrained.

Ask what is wrong with it by `robustbench-deq models configs/models/own_torchdeq.py:build --check digits`, and attack it
by `robustbench-deq attack configs/models/own_torchdeq.py:build --epsilon 0.5 --data digits`.
"""

import torch
from torch import Tensor, nn
from torchdeq import get_deq

from robustbench_deq import EquilibriumModel
from robustbench_deq.models import from_torchdeq


class Network(nn.Module):
    """`f(z, u) = tanh(conv(z) / 2 + u)` on 8x8 digits, with 8 channels at half their resolution, solved by torchdeq."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.readout = nn.Linear(128, 10)
        self.deq = get_deq(f_solver="anderson", f_tol=1e-4, f_max_iter=60, b_solver="anderson", b_tol=1e-4, ift=True)

    def encode(self, x: Tensor) -> Tensor:
        return self.stem((x - 0.3) / 0.4)

    def layer(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.conv(z) / 2 + u)

    def decode(self, z: Tensor) -> Tensor:
        return self.readout(z.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        u = self.encode(x)
        states, _ = self.deq(lambda z: self.layer(z, u), torch.zeros_like(u))
        return self.decode(states[-1])


def build() -> EquilibriumModel:
    torch.manual_seed(0)
    return from_torchdeq(Network(), inject="encode", cell="layer", head="decode", input_shape=(1, 8, 8), num_classes=10)

"""Shared by the tests of the doctor and the panel: a sound model, and how to spoil it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel


class Sound(EquilibriumModel):
    """`f(z, u) = A z + u` with `||A|| = 0.5`: state `(batch, 6)`, images 1x4x4, three classes."""

    input_shape, num_classes = (1, 4, 4), 3

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(0.5 * torch.linalg.qr(torch.randn(6, 6, generator=draw))[0])
        self.b = nn.Parameter(torch.randn(16, 6, generator=draw) / 4)
        self.c = nn.Parameter(torch.randn(6, 3, generator=draw))
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6, affine=False)
        self.calls = 0
        self.eval()

    def inject(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.b

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return z @ self.a + u

    def head(self, z: Tensor) -> Tensor:
        return z @ self.c

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)


def labelled(model: EquilibriumModel, n: int = 40, shape: tuple[int, int, int] = (1, 4, 4)) -> Split:
    """Random images of a few contrasts, with the classes that `model` gives them."""
    draw = torch.Generator().manual_seed(1)
    x = (0.5 + 1.5 * (torch.rand(n, *shape, generator=draw) - 0.5)).clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Split("mine", SplitName.VALIDATION, x, y, torch.arange(n), "")


def having(base: type[EquilibriumModel] = Sound, **methods: Callable) -> EquilibriumModel:
    """A sound model with some methods replaced."""
    return type("Patient", (base,), methods)()

"""Models in hard dress: the same equilibria from a slower cell, in other coordinates, or at another scale of the
logits; and linear cells that are not normal.

    Damped        z + w (f(z, u) - z): the equilibria of f, 1 / w times slower
    Coordinates   T^-1 f(T z, u), read out at T z: the same model, whose cell is not normal where T is not orthogonal
    Shifted       the origin of the state elsewhere
    Scaled        logits times a constant
    nonnormal     z <- A z + U x with a given spectral radius and norm of A, and a linear readout fitted by ridge

Used by `benchmarks.cells` and by the tests of what an attack must not depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_deq.data import Split
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models.defences import Wrapped


class Damped(Wrapped):
    """weight: w in (0, 1]."""

    def __init__(self, model: EquilibriumModel, weight: float) -> None:
        super().__init__(model)
        self.weight = weight

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.lerp(z, self.model.cell(z, u), self.weight)


class Coordinates(Wrapped):
    """condition: of T, whose singular values are spread evenly on a logarithmic scale; 1 is a rotation."""

    def __init__(self, model: EquilibriumModel, condition: float, seed: int = 0) -> None:
        super().__init__(model)
        with torch.no_grad():
            like = model.initial_state(model.inject(torch.zeros(1, *model.input_shape, dtype=dtype_of(model))))
        generator, size = torch.Generator().manual_seed(seed), like[0].numel()
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
        )
        spread = torch.logspace(0.0, 1.0, size, base=condition, dtype=torch.float64) / condition**0.5
        self.there, self.back = ((left * spread) @ right).to(like), ((right.mT / spread) @ left.mT).to(like)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self._map(self.back, self.model.cell(self._map(self.there, z), u))

    def head(self, z: Tensor) -> Tensor:
        return self.model.head(self._map(self.there, z))

    def initial_state(self, u: Tensor) -> Tensor:
        return self._map(self.back, self.model.initial_state(u))

    @staticmethod
    def _map(matrix: Tensor, z: Tensor) -> Tensor:
        return (z.flatten(1) @ matrix.mT).view_as(z)


class Shifted(Wrapped):
    """shift: added to every component of the state."""

    def __init__(self, model: EquilibriumModel, shift: float) -> None:
        super().__init__(model)
        self.shift = shift

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.model.cell(z - self.shift, u) + self.shift

    def head(self, z: Tensor) -> Tensor:
        return self.model.head(z - self.shift)

    def initial_state(self, u: Tensor) -> Tensor:
        return self.model.initial_state(u) + self.shift


class Scaled(Wrapped):
    """factor: of the logits."""

    def __init__(self, model: EquilibriumModel, factor: float) -> None:
        super().__init__(model)
        self.factor = factor

    def head(self, z: Tensor) -> Tensor:
        return self.factor * self.model.head(z)


def dtype_of(model: EquilibriumModel) -> torch.dtype:
    return next(model.parameters()).dtype


def nonnormal(norm: float, train: Split, size: int = 40, radius: float = 0.7, seed: int = 0) -> EquilibriumModel:
    """A linear cell of spectral radius `radius` and spectral norm `norm`, with a readout fitted to `train`.

    The matrix is Q (D + c N) Q^T with D diagonal, N strictly upper triangular, and c such that the norm is reached.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = train.x.flatten(1).double()
    injection = normal(size, x.shape[1]) / x.shape[1] ** 0.5
    basis = torch.linalg.qr(normal(size, size))[0]
    values = radius * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    values[0] = radius
    upper, low, high = torch.triu(normal(size, size), 1), 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        is_below = bool(torch.linalg.matrix_norm(torch.diag(values) + middle * upper, 2) < norm)
        low, high = (middle, high) if is_below else (low, middle)
    matrix = basis @ (torch.diag(values) + low * upper) @ basis.mT
    z = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix, injection @ x.mT).mT
    mean, deviation = z.mean(0), z.std(0)
    design = torch.cat([(z - mean) / deviation, torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
    num_classes = int(train.y.max()) + 1
    target = torch.nn.functional.one_hot(train.y, num_classes).double() - 1 / num_classes
    eye = torch.eye(size + 1, dtype=torch.float64)
    weights = 10 * torch.linalg.solve(design.mT @ design + eye, design.mT @ target)
    readout, bias = weights[:-1] / deviation[:, None], weights[-1] - (mean / deviation) @ weights[:-1]
    a, u, r, b = (part.float() for part in (matrix, injection, readout, bias))
    return EquilibriumModel.from_callables(
        lambda images: images.flatten(1) @ u.mT,
        lambda z, injected: z @ a.mT + injected,
        lambda z: z @ r + b,
        input_shape=tuple(train.x.shape[1:]),
        num_classes=num_classes,
    )

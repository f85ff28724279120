"""Equilibria of monotone operators by operator splitting: what `mondeq-*` and `lben` share.

The equilibrium `z* = relu(W z* + u)` is a zero of the sum of an affine monotone operator and the normal cone of the
positive orthant. The model's cell is one step of a splitting, so that every solver, the adjoint and the joint iteration
run on it as they are, the adjoint thus by the same splitting with transposed matrices:

    forward-backward     f(z, u) = relu((1 - a) z + a (W z + u))
    Peaceman-Rachford    z = relu(v),  v' = 2 z - v,  f(v, u) = 2 (I + a (I - W))^-1 (v' + a u) - v'

The state of the second is v, and its equilibrium is z = relu(v). If `sym(I - W) >= m I`, forward-backward surely
converges for `0 < a < 2 m / ||I - W||_2^2` and Peaceman-Rachford for every a > 0. Both find the same z, so that the
splitting may be chosen on a model that has its weights: `model.choose_splitting("forward-backward", 0.1)`.

W is a matrix, or, for a circular convolution, one matrix for every frequency (`SpectralDEQ`).

Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020, Algorithms 1 and 2, and section 4.2
for convolutions by the discrete Fourier transform.
"""

from __future__ import annotations

import abc
import copy
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.configs import validate
from robustbench_deq.models.base import FamilyModel, ModelConfig
from robustbench_deq.models.monotone_bounds import MonotoneBounds, measure_bounds

T = TypeVar("T")


class Splitting(enum.Enum):
    FORWARD_BACKWARD = "forward-backward"
    PEACEMAN_RACHFORD = "peaceman-rachford"


class SplittingConfig(ModelConfig):
    splitting: Splitting = Field(Splitting.FORWARD_BACKWARD, description="forward-backward or peaceman-rachford")
    splitting_step: float = Field(0.3, gt=0, description="a, the step of the splitting")


class InverseSplittingConfig(SplittingConfig):
    """For families whose operators grow beyond forward-backward's bound."""

    splitting: Splitting = Field(Splitting.PEACEMAN_RACHFORD, description="forward-backward or peaceman-rachford")
    splitting_step: float = Field(1.0, gt=0, description="a, the step of the splitting")


class SplittingDEQ(FamilyModel):
    """Subclasses say what W is and how a matrix of its kind acts on a state; `inject` is affine.

    Attributes:
        readout: V, the linear layer from the flattened equilibrium to the logits.
    """

    readout: nn.Linear

    def __init__(self, config: SplittingConfig) -> None:
        super().__init__(config)
        self._cached: dict[str, tuple[object, Any]] = {}

    def choose_splitting(self, splitting: Splitting | str, step: float) -> None:
        """Iterate by another splitting or step; the equilibrium stays. The config says so too, and is saved.

        States of the one splitting are none of the other: what was kept for a warm start is void.

        Args:
            splitting: a `Splitting` or its value.
            step: a > 0, within the module's bound for forward-backward.

        Raises:
            UsageError: for an unknown splitting, or a step that is not positive.
        """
        values = {**self.config.model_dump(), "splitting": splitting, "splitting_step": step}
        self.config = validate(type(self.config), values, "choose_splitting")
        self._cached = {}

    @abc.abstractmethod
    def operator(self) -> Tensor:
        """W `(..., n, n)`."""

    @abc.abstractmethod
    def multiply(self, matrix: Tensor, z: Tensor) -> Tensor:
        """The matrix `(..., n, n)` times every state of the batch; shaped like `z`."""

    @abc.abstractmethod
    def read_out(self, z: Tensor) -> Tensor:
        """Logits of the equilibrium `z` of `z = relu(W z + u)`."""

    def _build_matrix(self) -> Tensor:
        operator, step = self.operator(), self.config.splitting_step
        eye = torch.eye(operator.shape[-1], device=operator.device, dtype=operator.dtype)
        if self.config.splitting is Splitting.FORWARD_BACKWARD:
            return (1.0 - step) * eye + step * operator
        return torch.linalg.inv((1.0 + step) * eye - step * operator)

    def matrix(self) -> Tensor:
        """The step's matrix; built again only when a parameter has changed or its gradient is wanted."""
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return self._build_matrix()
        return self._kept("matrix", self._build_matrix, parameters)

    def _kept(self, name: str, build: Callable[[], T], parameters: Sequence[Tensor]) -> T:
        """What `build` makes of the parameters, built again only when one of them has changed.

        A parameter that is written to through `.data`, in place, looks unchanged to torch and so to this. Parameters
        made in inference mode report no change at all; for them nothing is kept.
        """
        if any(parameter.is_inference() for parameter in parameters):
            return build()
        key = tuple((part.data_ptr(), part._version, part.dtype) for part in parameters)
        known = self._cached.get(name)
        if known is None or known[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a gradient later
                known = self._cached[name] = key, build()
        return known[1]

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        step = self.config.splitting_step
        if self.config.splitting is Splitting.FORWARD_BACKWARD:
            return F.relu(self.multiply(self.matrix(), z) + step * u)
        reflected = 2 * F.relu(z) - z
        return 2 * self.multiply(self.matrix(), reflected + step * u) - reflected

    def head(self, z: Tensor) -> Tensor:
        return self.read_out(z if self.config.splitting is Splitting.FORWARD_BACKWARD else F.relu(z))

    def initial_state(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape)

    @torch.no_grad()
    def monotonicity(self) -> float:
        """The smallest eigenvalue of `sym(I - W)`: m, measured on the weights."""
        operator = self.operator()
        operator = operator.to(torch.complex128 if operator.is_complex() else torch.float64)
        gap = torch.eye(operator.shape[-1], device=operator.device, dtype=operator.dtype) - operator
        return float(torch.linalg.eigvalsh((gap + gap.mH) / 2).min())

    @torch.no_grad()
    def certificates(self) -> dict[str, float]:
        """m, and the bound `||V||_2 ||U||_2 / m` on the logits' L2 change by the image's, in pixel units.

        Source: Pabbaraju, Winston, Kolter, "Estimating Lipschitz constants of monotone deep equilibrium models", ICLR
        2021, Theorem 1.
        """
        margin = self.monotonicity()
        return {
            "monotonicity": margin,
            "lipschitz": _gain(self._columns().flatten(1)) * _gain(self.readout.weight) / margin,
        }

    def _columns(self) -> Tensor:
        """U, the state's change by each pixel, `(pixels, ...)`."""
        weight = self.readout.weight
        impulses = torch.eye(math.prod(self.input_shape), device=weight.device, dtype=weight.dtype)
        images = impulses.unflatten(1, self.input_shape)
        return self.inject(images) - self.inject(torch.zeros_like(images[:1]))

    @torch.no_grad()
    def certified_radii(self, z: Tensor, y: Tensor) -> Tensor | None:
        """By `models.monotone_bounds`, which is measured once for the weights as they are; None for a subclass of a
        registered family, whose injection, step or readout may be others than the bounds are of."""
        if "family" not in vars(type(self)):
            return None
        bounds = self._kept("bounds", self._measure_bounds, list(self.parameters()))
        active = z.flatten(1).double()
        sizes = torch.linalg.vector_norm(active, dim=1)
        logits = F.linear(active.relu(), self.readout.weight.double(), self.readout.bias.double())
        return bounds.radii(logits, sizes, y.to(z.device))

    @torch.no_grad()
    def _measure_bounds(self) -> MonotoneBounds:
        exact, weight = copy.deepcopy(self).double(), self.readout.weight
        operator, columns = exact.operator(), exact._columns()
        return measure_bounds(
            torch.eye(operator.shape[-1], device=operator.device, dtype=operator.dtype) - operator,
            exact.multiply,
            columns,
            weight.double().unflatten(1, columns.shape[1:]),
            self.config.splitting_step,
            self.config.splitting is Splitting.PEACEMAN_RACHFORD,
            torch.finfo(weight.dtype).eps,
        )


def _gain(matrix: Tensor) -> float:
    """`||matrix||_2` by the smaller of its Gram matrices."""
    matrix = matrix.double() if len(matrix) <= matrix.shape[1] else matrix.double().mT
    return float(torch.linalg.eigvalsh(matrix @ matrix.mT).max().sqrt())


class DenseConfig(SplittingConfig):
    hidden: int = Field(128, ge=1, le=16384, description="size of the state")


class DenseDEQ(SplittingDEQ):
    """State `(batch, hidden)`; W is `(hidden, hidden)`. Subclasses have `injection` and `readout`, linear layers."""

    def multiply(self, matrix: Tensor, z: Tensor) -> Tensor:
        return F.linear(z, matrix)

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(self.normalise(x).flatten(1))

    def read_out(self, z: Tensor) -> Tensor:
        return self.readout(z)


class SpectralDEQ(SplittingDEQ):
    """State `(batch, channels, rows, columns)`; W commutes with circular shifts of the grid.

    Under the discrete Fourier transform over the grid such a map is one `(channels, channels)` matrix for each
    frequency, so that its inverse costs one small inverse for each. W is `(rows, columns // 2 + 1, channels,
    channels)`, complex: real states need half of the frequencies.

    Attributes:
        grid: `(channels, rows, columns)` of the state.
    """

    grid: tuple[int, int, int]

    @abc.abstractmethod
    def symmetric_part(self, z: Tensor) -> Tensor:
        """A z, for states `z` of a batch; W = (1 - m) I - A^T A + B - B^T."""

    @abc.abstractmethod
    def skew_part(self, z: Tensor) -> Tensor:
        """B z."""

    def operator(self) -> Tensor:
        channels, _, _ = self.grid
        reference = next(self.parameters())
        impulses = torch.zeros(channels, *self.grid, device=reference.device, dtype=reference.dtype)
        impulses[torch.arange(channels), torch.arange(channels), 0, 0] = 1.0
        a, b = (torch.fft.rfft2(part(impulses)).permute(2, 3, 1, 0) for part in (self.symmetric_part, self.skew_part))
        eye = torch.eye(channels, device=a.device, dtype=a.dtype)
        return (1.0 - self.config.monotonicity) * eye - a.mH @ a + b - b.mH

    def multiply(self, matrix: Tensor, z: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(z).permute(2, 3, 1, 0)
        return torch.fft.irfft2((matrix @ frequencies).permute(3, 2, 0, 1), s=z.shape[-2:])

    def read_out(self, z: Tensor) -> Tensor:
        return self.readout(z.flatten(1))

"""Norms of perturbations, and what a ball of each needs. A norm is a file here; `NORMS` names them.

A perturbation delta of an image x in the pixel box [0, 1] is feasible when `||delta||_p <= radius` and
`0 <= x + delta <= 1`.
"""

from __future__ import annotations

import abc
import numbers
from typing import ClassVar

import numpy as np
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.registry import Registry

TINY = 1e-12


class Norm(abc.ABC):
    """A norm of `(rows, ...)`; a radius or length is `(rows,)` or one number, in pixel units of [0, 1]."""

    L1: ClassVar[Norm]
    L2: ClassVar[Norm]
    LINF: ClassVar[Norm]
    name: ClassVar[str]

    @abc.abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """The norm of each row, `(rows,)`."""

    @abc.abstractmethod
    def dual_size(self, gradient: Tensor) -> Tensor:
        """The dual norm of each row: the most that a linear function rises within a ball of radius 1."""

    @abc.abstractmethod
    def project(self, delta: Tensor, radius: Tensor | float, x: Tensor) -> Tensor:
        """A feasible perturbation near `delta`; the identity on feasible ones."""

    @abc.abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """`gradient` brought to unit size, row by row; zero where it is zero."""

    def steepest(self, gradient: Tensor, length: Tensor | float, delta: Tensor, x: Tensor) -> Tensor:
        """The displacement of `length` from `delta` along which `gradient` rises most."""
        return scaled(self.direction(gradient), length)

    @abc.abstractmethod
    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray:
        """A point of `count` entries drawn uniformly from the unit ball."""

    def l2_reach(self, count: int) -> float | None:
        """The largest L2 norm of `count` entries of norm 1, or an upper bound; None: unknown, so that no certificate in
        L2 says anything of this norm."""
        return None

    @classmethod
    def parse(cls, name: str | float | Norm) -> Norm:
        """A norm, or the one of that name, in any case, or of that order, such as 2. Raises `UsageError` for others."""
        if isinstance(name, Norm):
            return name
        text: object = name
        if isinstance(name, numbers.Real) and not isinstance(name, bool) and float(f"{float(name):g}") == name:
            text = f"l{float(name):g}"
        if isinstance(text, str) and text.lower() in NORMS:
            return NORMS.get(text.lower())
        known = list(NORMS)
        raise UsageError.of(
            "norm",
            expected=f"{', '.join(known[:-1])} or {known[-1]}",
            got=repr(name),
            fix=f"pass for example --norm {known[0]}",
        )

    def __repr__(self) -> str:
        return f"Norm.{self.name.upper()}"

    def __reduce__(self) -> tuple[object, ...]:
        return Norm.parse, (self.name,)


NORMS: Registry[Norm] = Registry("norm")


def add_norm(kind: type[Norm]) -> type[Norm]:
    """Class decorator: registers the one norm of a class under its name, and as an attribute of `Norm`."""
    norm = NORMS.register(kind.name)(kind())
    setattr(Norm, kind.name.upper(), norm)
    return kind


def scaled(direction: Tensor, length: Tensor | float) -> Tensor:
    """`direction`, which is overwritten, times `length`, row by row."""
    if isinstance(length, Tensor):
        length = length.view(-1, *[1] * (direction.dim() - 1))
    return direction.mul_(length)


def into_box(delta: Tensor, x: Tensor) -> Tensor:
    """`delta` with `x + delta` clipped to [0, 1]: moves every entry towards zero, so that no norm grows."""
    return (x + delta).clamp_(0.0, 1.0).sub_(x)

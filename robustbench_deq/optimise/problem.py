"""Problems: which variable is optimised, how it enters an equilibrium model, and what is maximised.

    z* = f(z*, inject(d)),      maximise the loss of head(z*) and d, summed over the rows of d

A row of the variable d has one row of the state, or several (`Shared`). Losses are maximised; what is to be minimised
enters with a minus.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise.objectives import Objective
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown


@briefly_shown
class Losses(NamedTuple):
    """Per row of the variable, `(rows,)`: what is ascended now, and by what iterates are compared. One tensor where
    they are the same."""

    ascended: Tensor
    compared: Tensor


class Problem(abc.ABC):
    """One optimisation problem a row of the variable."""

    model: EquilibriumModel

    @abc.abstractmethod
    def inject(self, variable: Tensor) -> Tensor:
        """The injections of all rows of the state."""

    @abc.abstractmethod
    def losses(self, output: Tensor, variable: Tensor, progress: float) -> Losses:
        """The losses at the readout `head(z)` and the variable.

        Args:
            progress: of the run, from 0 to 1, for problems that ascend one loss after another.
        """

    def is_success(self, output: Tensor) -> Tensor:
        """Rows of the variable `(rows,)` that want no more optimisation once their state has settled."""
        raise NotImplementedError(f"{type(self).__name__} has no success, only a loss")

    @abc.abstractmethod
    def take(self, rows: Tensor) -> Self:
        """The same problem for the rows `rows` `(kept,)` of the variable."""

    def state_rows(self, rows: Tensor) -> Tensor:
        """The rows of the state that belong to the rows `rows` of the variable."""
        return rows

    def worst(self, values: Tensor) -> Tensor:
        """The largest of `values`, one a row of the state, for each row of the variable."""
        return values

    def spread(self, values: Tensor) -> Tensor:
        """`values`, one a row of the variable, for each row of the state."""
        return values


@briefly_shown
@dataclass(frozen=True)
class Classification(Problem):
    """A perturbation of images that is to raise a loss of the logits.

    Args:
        model: a classifier.
        x: the images `(rows, channels, height, width)` in [0, 1].
        objective: the loss, with the labels or the targets.
    """

    model: EquilibriumModel
    x: Tensor
    objective: Objective

    def inject(self, variable: Tensor) -> Tensor:
        return self.model.inject(self.x + variable)

    def losses(self, output: Tensor, variable: Tensor, progress: float) -> Losses:
        ascended = self.objective.at(progress)
        loss = ascended(output)
        return Losses(loss, loss if ascended is self.objective else self.objective(output.detach()))

    def is_success(self, output: Tensor) -> Tensor:
        return self.objective.is_reached(output)

    def take(self, rows: Tensor) -> Self:
        return replace(self, x=self.x[rows], objective=self.objective.take(rows))


@dataclass(frozen=True)
class Reconstruction(Problem):
    """A latent variable whose readout is to meet a target: maximise `-||head(z*) - target||^2 - prior ||d||^2`.

    Args:
        model: a decoder: `inject` takes the latent, `head` gives what is compared with the target.
        target: `(rows, ...)`, of the readout's shape.
        prior: weight of the squared norm of the latent.
    """

    model: EquilibriumModel
    target: Tensor
    prior: float = 0.0

    def inject(self, variable: Tensor) -> Tensor:
        return self.model.inject(variable)

    def losses(self, output: Tensor, variable: Tensor, progress: float) -> Losses:
        loss = -(output - self.target).square().flatten(1).sum(1)
        if self.prior:
            loss = loss - self.prior * variable.square().flatten(1).sum(1)
        return Losses(loss, loss)

    def take(self, rows: Tensor) -> Self:
        return replace(self, target=self.target[rows])


@dataclass(frozen=True)
class Shared(Problem):
    """One variable for several rows of another problem, such as a task's variable for all of its samples.

    The loss of a row of the variable is the sum over the rows that it serves.

    Args:
        inner: the problem of a variable a row.
        owner: for each row of `inner` the row of the variable that it uses, `(rows of inner,)`; every row serves some.
    """

    inner: Problem
    owner: Tensor

    @property
    def model(self) -> EquilibriumModel:  # type: ignore[override]
        return self.inner.model

    @property
    def _num_rows(self) -> int:
        return int(self.owner.max()) + 1 if len(self.owner) else 0

    def inject(self, variable: Tensor) -> Tensor:
        return self.inner.inject(variable[self.owner])

    def losses(self, output: Tensor, variable: Tensor, progress: float) -> Losses:
        each = self.inner.losses(output, variable[self.owner], progress)
        zeros = each.ascended.new_zeros(len(variable))
        ascended = zeros.index_add(0, self.owner, each.ascended)
        if each.compared is each.ascended:
            return Losses(ascended, ascended)
        return Losses(ascended, zeros.index_add(0, self.owner, each.compared))

    def is_success(self, output: Tensor) -> Tensor:
        return self.worst((~self.inner.is_success(output)).to(output.dtype)) == 0

    def take(self, rows: Tensor) -> Self:
        kept = self.state_rows(rows)
        position = torch.full((self._num_rows,), -1, dtype=torch.int64, device=rows.device)
        position[rows] = torch.arange(len(rows), device=rows.device)
        return replace(self, inner=self.inner.take(kept), owner=position[self.owner[kept]])

    def state_rows(self, rows: Tensor) -> Tensor:
        return torch.isin(self.owner, rows).nonzero()[:, 0]

    def worst(self, values: Tensor) -> Tensor:
        low = values.new_full((self._num_rows,), -torch.inf)
        return low.scatter_reduce(0, self.owner, values, "amax")

    def spread(self, values: Tensor) -> Tensor:
        return values[self.owner]


def where_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows of `mask` `(rows,)`, `old` in the others."""
    return torch.where(per_sample(mask, new), new, old)

"""What an input is optimised for: per-sample losses of the logits that an attack **maximises**.

`CrossEntropy`   log-loss of the true class.
`Margin`         largest wrong logit minus the true one (Carlini and Wagner, 2017); positive means fooled.
`DLR`            the margin divided by the spread of the three largest logits (Croce and Hein, 2020, Eq. 6), which
                 does not change when all logits are scaled or shifted; at least three classes.
`Targeted`       minus any of these at a wanted class.

`CrossEntropyThenMargin` ascends the cross-entropy in the first half of a run and the margin in the second; iterates are
compared by the margin. The log-loss leads away from the true class from anywhere, the margin finishes at the boundary.

Each maps logits `(batch, classes)` to `(batch,)`. Reductions over the batch are sums, everywhere: then the gradient of
one sample does not depend on how many others there are.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.registry import Registry

Objective = Callable[[Tensor], Tensor]
"""Logits `(batch, classes)` to losses `(batch,)`, the labels already bound."""

OBJECTIVES: Registry[Callable[[Tensor], Objective]] = Registry("objective")


class Labelled(abc.ABC):
    """An objective that knows the labels `(batch,)`. Calling it gives the losses by which iterates are compared."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    @abc.abstractmethod
    def __call__(self, logits: Tensor) -> Tensor: ...

    def select(self, index: Tensor) -> Labelled:
        """The same objective for the samples in `index`."""
        return type(self)(self.labels[index])

    def at(self, progress: float) -> Labelled:
        """What is ascended at `progress` of a run, from 0 to 1."""
        return self


def objective_at(objective: Objective, progress: float) -> Objective:
    """What is ascended at `progress` of a run; a plain function ascends itself throughout."""
    return objective.at(progress) if isinstance(objective, Labelled) else objective


@OBJECTIVES.register("cross-entropy")
class CrossEntropy(Labelled):
    def __call__(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels, reduction="none")


@OBJECTIVES.register("margin")
class Margin(Labelled):
    def __call__(self, logits: Tensor) -> Tensor:
        true = logits.gather(1, self.labels[:, None])[:, 0]
        wrong = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        return wrong - true


@OBJECTIVES.register("dlr")
class DLR(Labelled):
    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise UsageError.of(
                "objective dlr", expected="at least three classes", got=logits.shape[1], fix="choose margin"
            )
        ordered = logits.topk(3, dim=1).values
        spread = (ordered[:, 0] - ordered[:, -1]).clamp_min(1e-12)
        return Margin(self.labels)(logits) / spread


@OBJECTIVES.register("ce-then-margin")
class CrossEntropyThenMargin(Labelled):
    def __call__(self, logits: Tensor) -> Tensor:
        return Margin(self.labels)(logits)

    def at(self, progress: float) -> Labelled:
        return (CrossEntropy if progress < 0.5 else Margin)(self.labels)


class Targeted(Labelled):
    """Minus an objective whose labels are the classes to be reached."""

    def __init__(self, objective: Labelled) -> None:
        super().__init__(objective.labels)
        self.objective = objective

    def select(self, index: Tensor) -> Targeted:
        return Targeted(self.objective.select(index))

    def at(self, progress: float) -> Targeted:
        return Targeted(self.objective.at(progress))

    def __call__(self, logits: Tensor) -> Tensor:
        return -self.objective(logits)

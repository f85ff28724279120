"""What a classifier's input is optimised for: losses of the logits that an attack **maximises**.

`CrossEntropy`   log-odds against the true class at a temperature, `T log sum_{j != y} exp(h_j / T) - h_y`, with T a
                 third of the logits' own spread. The log-loss at that temperature is an increasing function of it, so
                 that both point the same way; but the log-loss of a classifier whose logits are large has a gradient
                 of exactly zero in floating point, and this has not.
`Margin`         largest wrong logit minus the true one (Carlini and Wagner, 2017); positive means fooled.
`DLR`            the margin divided by the spread of the three largest logits (Croce and Hein, 2020, Eq. 6), which
                 does not change when all logits are scaled or shifted; at least three classes.
`Targeted`       minus any of these at a wanted class.
`Toward`         the lead of a given class over the true one; any wrong class will do.
`TowardDLR`      lead of a wanted class over the true one, divided by that of the largest logit over the mean of the
                 third and the fourth (Croce and Hein, 2020, Eq. 7), or over those of them that there are.

`CrossEntropyThenMargin` ascends the cross-entropy in the first half of a run and the margin in the second; iterates are
compared by the margin. The first leads away from the true class from anywhere, the margin finishes at the boundary.

When all logits are multiplied by a constant, no direction of ascent changes. A logit of -infinity masks its class: the
losses are those of the others.

Each maps logits `(batch, classes)` to `(batch,)`. Reductions over the batch are sums, everywhere: then the gradient of
one sample does not depend on how many others there are.
"""

from __future__ import annotations

import abc
from typing import Self

import torch
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.registry import Registry


class Objective(abc.ABC):
    """A loss that knows the labels `(batch,)`. Calling it gives the losses by which iterates are compared."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    @abc.abstractmethod
    def __call__(self, logits: Tensor) -> Tensor: ...

    @property
    def title(self) -> str:
        """Tells losses apart that differ on the same labels and targets."""
        return type(self).__name__

    def take(self, rows: Tensor) -> Self:
        """The same objective for the samples `rows`."""
        return type(self)(self.labels[rows])

    def at(self, progress: float) -> Objective:
        """What is ascended at `progress` of a run, from 0 to 1."""
        return self

    def is_reached(self, logits: Tensor) -> Tensor:
        """Samples `(batch,)` of another class than the label's: fooled."""
        return logits.argmax(1) != self.labels


SPREAD = 3.0
"""Standard deviation over the classes that the cross-entropy brings the logits to; those of the shipped models have
between 2.9 and 5.3 on clean images."""

OBJECTIVES: Registry[type[Objective]] = Registry("objective")


@OBJECTIVES.register("cross-entropy")
class CrossEntropy(Objective):
    def __call__(self, logits: Tensor) -> Tensor:
        spread = _spread(logits.detach())
        temperature = (spread / SPREAD).clamp_min(torch.finfo(logits.dtype).tiny)
        leads = logits - logits.gather(1, self.labels[:, None])  # before they are scaled: equal logits lead by nothing
        wrong = (leads / temperature).scatter(1, self.labels[:, None], -torch.inf)
        return temperature[:, 0] * wrong.logsumexp(1)


def _spread(logits: Tensor) -> Tensor:
    """Standard deviation `(batch, 1)` over the classes that are not masked."""
    is_masked = logits.isneginf()
    share = (~is_masked).to(logits.dtype).mean(1, keepdim=True)
    mean = logits.masked_fill(is_masked, 0.0).mean(1, keepdim=True) / share
    return torch.where(is_masked, mean, logits).std(1, correction=0, keepdim=True) / share.sqrt()


@OBJECTIVES.register("margin")
class Margin(Objective):
    def __call__(self, logits: Tensor) -> Tensor:
        true = logits.gather(1, self.labels[:, None])[:, 0]
        wrong = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
        return wrong - true


@OBJECTIVES.register("dlr")
class DLR(Objective):
    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise UsageError.of(
                "objective dlr", expected="at least three classes", got=logits.shape[1], fix="choose margin"
            )
        ordered = logits.topk(3, dim=1).values
        spread = (ordered[:, 0] - ordered[:, -1]).clamp_min(1e-12)
        spread = torch.where(ordered[:, -1].isneginf(), 1.0, spread)  # of two classes there is only the margin
        return Margin(self.labels)(logits) / spread


@OBJECTIVES.register("ce-then-margin")
class CrossEntropyThenMargin(Objective):
    def __call__(self, logits: Tensor) -> Tensor:
        return Margin(self.labels)(logits)

    def at(self, progress: float) -> Objective:
        return (CrossEntropy if progress < 0.5 else Margin)(self.labels)


class Targeted(Objective):
    """Minus an objective whose labels are the classes to be reached."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.labels)
        self.objective = objective

    @property
    def title(self) -> str:
        return f"Targeted{self.objective.title}"

    def take(self, rows: Tensor) -> Targeted:
        return Targeted(self.objective.take(rows))

    def at(self, progress: float) -> Targeted:
        ascended = self.objective.at(progress)
        return self if ascended is self.objective else Targeted(ascended)

    def __call__(self, logits: Tensor) -> Tensor:
        return -self.objective(logits)

    def is_reached(self, logits: Tensor) -> Tensor:
        """Samples of the wanted class."""
        return logits.argmax(1) == self.labels


class Toward(Objective):
    """Ascends the logit of the classes `headings` `(batch,)` minus that of the labels. Any wrong class counts, and so
    iterates are compared by the margin."""

    def __init__(self, labels: Tensor, headings: Tensor) -> None:
        super().__init__(labels)
        self.headings = headings

    def take(self, rows: Tensor) -> Toward:
        return Toward(self.labels[rows], self.headings[rows])

    def __call__(self, logits: Tensor) -> Tensor:
        return Margin(self.labels)(logits)

    def at(self, progress: float) -> Objective:
        return _Lead(self.labels, self.headings)


class _Lead(Toward):
    def __call__(self, logits: Tensor) -> Tensor:
        ends = logits.gather(1, torch.stack([self.headings, self.labels], 1))
        return ends[:, 0] - ends[:, 1]

    def at(self, progress: float) -> Objective:
        return self


class TowardDLR(Objective):
    """Heads for the classes `classes` `(batch,)`.

    Args:
        is_aimed: whether only that class counts; else any wrong one does.
    """

    def __init__(self, labels: Tensor, classes: Tensor, is_aimed: bool = False) -> None:
        super().__init__(labels)
        self.classes, self.is_aimed = classes, is_aimed

    def take(self, rows: Tensor) -> TowardDLR:
        return TowardDLR(self.labels[rows], self.classes[rows], self.is_aimed)

    def __call__(self, logits: Tensor) -> Tensor:
        true, wanted = (logits.gather(1, classes[:, None])[:, 0] for classes in (self.labels, self.classes))
        ordered = logits.topk(min(4, logits.shape[1]), dim=1).values
        behind = ordered[:, 2:]
        is_there = ~behind.isneginf()
        count = is_there.sum(1)
        mean = torch.where(is_there, behind, 0.0).sum(1) / count.clamp_min(1)
        spread = (ordered[:, 0] - mean).clamp_min(1e-12)
        return (wanted - true) / torch.where(count > 0, spread, 1.0)  # of two classes there is only the lead

    def is_reached(self, logits: Tensor) -> Tensor:
        found = logits.argmax(1)
        return found == self.classes if self.is_aimed else found != self.labels

"""What an attack is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from robustbench_deq.optimise import Optimum, Settled
from robustbench_deq.shown import briefly_shown


@briefly_shown
class Clean(NamedTuple):
    """What is known of the clean images before an attack: their equilibria, and which are classified correctly there,
    `(batch,)`."""

    settled: Settled
    is_correct: Tensor


@briefly_shown
@dataclass(frozen=True)
class Batch:
    """What an attack is given; rows are samples.

    images   `(rows, channels, height, width)` in [0, 1]
    labels   true classes `(rows,)`
    targets  classes to be reached `(rows,)`; None is untargeted
    ids      what a sample's randomness is keyed by `(rows,)`, with `seed`
    headings classes to head for `(rows,)`, where any wrong class will do; None: none in particular
    start    perturbation to begin with, like the images
    settled  the equilibrium at the clean images, if it is known
    leaves   whether samples that are done leave the batch
    is_again whether the judge has refuted what the attack called fooled, so that all of these are attacked again
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    ids: Tensor
    seed: int
    start: Tensor
    settled: Settled | None = None
    leaves: bool = False
    is_again: bool = False
    headings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> Batch:
        """The same for the rows `rows`."""
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            headings=None if self.headings is None else self.headings[rows],
            ids=self.ids[rows.to(self.ids.device)],
            start=self.start[rows],
            settled=None if self.settled is None else self.settled.take(rows),
        )


@briefly_shown
@dataclass(frozen=True)
class Proposal:
    """What `run` returns.

    delta        perturbation, like the images
    loss         the attack's own estimate `(rows,)`; chooses between restarts, nothing else
    is_done      samples `(rows,)` that are fooled at a settled state, so that no more need be tried; None: none
    is_lagging   samples `(rows,)` whose state is behind its equilibrium to the end, full solves or not; None: unknown
    is_flat      samples `(rows,)` that have no slope to climb, a gradient of exactly zero or NaN; None: unknown
    z, mu        state and adjoint at the end, if the attack has them: training starts from these
    diagnostics  counts and means worth recording, such as samples that were attacked again
    """

    delta: Tensor
    loss: Tensor
    is_done: Tensor | None = None
    is_lagging: Tensor | None = None
    is_flat: Tensor | None = None
    z: Tensor | None = None
    mu: Tensor | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Optimum) -> Proposal:
        """What one run of `optimise` has found, with its source's counts, summed over the rows."""
        return cls(
            delta=found.variable,
            loss=found.loss,
            is_done=found.is_done,
            is_flat=found.is_flat,
            z=found.z,
            mu=found.mu,
            diagnostics={name: float(counts.sum()) for name, counts in found.tally.items()},
        )

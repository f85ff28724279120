"""The judge of one batch: of what the attack calls fooled, of what it returns, and of the snapshots on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.judge import LADDER, Verdict, judge
from robustbench_deq.solvers import Solve


class BatchJudge:
    """The judge of one batch, and the seconds it took. It judges no image twice.

    A sample that is wrong or without an equilibrium at its clean image is not robust whatever comes: no snapshot of it
    is judged, and where there was no equilibrium, only the first solver looks for one at the end.
    """

    def __init__(self, model: EquilibriumModel, x: Tensor, y: Tensor, clean: Verdict) -> None:
        self.model, self.x, self.y, self.clean, self.seconds = model, x, y, clean, 0.0
        self._known = [(x, clean)]

    def confirm(self, rows: Tensor, images: Tensor) -> Tensor:
        """Which of `images`, of the samples `rows`, are not classified correctly."""
        verdict = self._judged(rows, images, self.clean, LADDER)
        self._known.append((self.x.index_copy(0, rows, images), verdict))
        return ~verdict.is_correct[rows.cpu()]

    def final(self, images: Tensor) -> Verdict:
        """The verdict on the images of the whole batch that the attack returns."""
        found, missing = self._recalled(images)
        has_clean = self.clean.is_converged[missing.cpu()].to(missing.device)
        for rows, ladder in ((missing[has_clean], LADDER), (missing[~has_clean], LADDER[:1])):
            found = self._judged(rows, images[rows], found, ladder)
        self._known.append((images, found))
        return found

    def num_unbroken(self, deltas: Sequence[Tensor], final: Verdict) -> Tensor:
        """How many of the perturbations `deltas`, from the first, leave each sample robust, `(batch,)`.

        What is robust at the end counts as robust before, and what is broken as broken from then on. The first
        perturbation that breaks a sample is found by bisection, with the first solver alone.
        """
        end = len(deltas)
        is_robust = self.clean.is_correct & final.is_correct
        first = torch.where(is_robust, end, 0)  # no earlier than this, and no later than the last
        last = torch.where(self.clean.is_correct, end, 0)
        while bool((is_open := first < last).any()):
            middle, images = (first + last) // 2, self.x.clone()
            for number, delta in enumerate(deltas):
                rows = (is_open & (middle == number)).nonzero()[:, 0].to(images.device)
                images[rows] = (self.x[rows] + delta[rows]).clamp_(0, 1)
            found, missing = self._recalled(images)
            found = self._judged(missing, images[missing], found, LADDER[:1])
            self._known.append((images, found))
            last = torch.where(is_open & ~found.is_correct, middle, last)
            first = torch.where(is_open & found.is_correct, middle + 1, first)
        return first

    def _recalled(self, images: Tensor) -> tuple[Verdict, Tensor]:
        """Verdicts on those of `images`, of the whole batch, that have been judged, and the rows of the others."""
        found, is_known = self.clean, torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for others, verdict in self._known:
            is_same = (images == others).flatten(1).all(1) & ~is_known
            rows = is_same.nonzero()[:, 0].cpu()
            found, is_known = found.put(rows, verdict.take(rows)), is_known | is_same
        return found, (~is_known).nonzero()[:, 0]

    def _judged(self, rows: Tensor, images: Tensor, found: Verdict, ladder: Sequence[Solve]) -> Verdict:
        if len(rows) == 0:
            return found
        start = time.perf_counter()
        verdict = judge(self.model, images, self.y[rows], ladder)  # hands over on the CPU, so the device is done
        self.seconds += time.perf_counter() - start
        return found.put(rows.cpu(), verdict)

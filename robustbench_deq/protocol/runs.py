"""All runs of an attack on a batch: restarts, and again on samples that the judge has refuted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.meter import BudgetSpent, Cost, Meter
from robustbench_deq.protocol.batch import Batch, Proposal
from robustbench_deq.protocol.recorder import Best, Recorder, Snapshot
from robustbench_deq.protocol.settings import AttackConfig
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown
from robustbench_deq.threats import Threat


class StageResult(NamedTuple):
    """A stage of a cascade on a batch: what it was left, what of that the judge confirmed broken, and what it cost."""

    name: str
    num_attacked: int
    num_broken: int
    cost: Cost


@briefly_shown
@dataclass(frozen=True)
class AttackResult:
    """Perturbed images in ball and box, and how they were found. No verdict in it: see `evaluate.judge`.

    loss         the attack's own estimate `(batch,)`
    is_failed    samples `(batch,)` whose perturbation came back not finite; it was replaced by zero
    is_attacked  samples `(batch,)` that were attacked at all
    snapshots    for the curve, if asked for
    residuals    mean relative residual of the state after each solver step, if snapshots were asked for
    z, mu        of the last run, where it was of the whole batch
    diagnostics  summed over all runs
    cost         of all of it
    stages       of a cascade, in their order
    stage_of     the stage that broke each sample of a cascade `(batch,)`; -1: none has
    is_certified samples `(batch,)` of a cascade that a certificate shows robust; None: there is none
    """

    x_adv: Tensor
    delta: Tensor
    loss: Tensor
    is_failed: Tensor
    is_attacked: Tensor
    cost: Cost
    snapshots: tuple[Snapshot, ...]
    residuals: tuple[float, ...]
    z: Tensor | None
    mu: Tensor | None
    diagnostics: dict[str, float]
    stages: tuple[StageResult, ...] = ()
    stage_of: Tensor | None = None
    is_certified: Tensor | None = None


Confirm = Callable[[Tensor, Tensor], Tensor]
"""Asked with the rows `(k,)` of samples that an attack left because they are fooled, and their perturbed images, in
ball and box; says which of them are, `(k,)`."""

Run = Callable[[Batch, Recorder], Proposal]
"""One run of an attack."""


class Runs:
    """All runs on one batch: restarts, on the rows that are left, and again on rows that were refuted."""

    def __init__(
        self,
        threat: Threat,
        batch: Batch,
        meter: Meter,
        num_snapshots: int,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self.threat, self.batch, self.meter = threat, batch, meter
        self.ball = threat.ball(batch.images)
        self.record = Recorder(meter, self.ball, num_snapshots, progress)
        x = batch.images
        self.best = Best(torch.zeros_like(x), x.new_full((len(x),), torch.nan))
        self.is_done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.marks: dict[str, Tensor] = {}
        self.diagnostics: dict[str, float] = {}
        self.last: Proposal | None = None
        self.is_certified: Tensor | None = None
        self.is_spared, self.is_refuted = torch.zeros_like(self.is_done), torch.zeros_like(self.is_done)
        self.stages: list[StageResult] = []
        self.stage_of = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)

    def attack(self, run: Run, config: AttackConfig, rows: Tensor | None) -> None:
        """All restarts on `rows` (None: all), those of samples that are not done by then."""
        self._attack(run, config, self.batch, rows)

    def _attack(self, run: Run, config: AttackConfig, batch: Batch, rows: Tensor | None) -> None:
        for restart in range(config.restarts):
            if (rows is not None and len(rows) == 0) or self.meter.is_spent:
                return
            part = batch if rows is None else batch.take(rows)
            if restart or config.random_start:
                start = self.threat.ball(part.images).random_start(part.seed, part.ids, restart)
                part = replace(part, start=start)
            self.record.begin(rows, self.best)
            try:
                proposal = run(part, self.record)
            except BudgetSpent:  # outside of `optimise`, which returns what it has
                return
            self.record.end(proposal, self.meter.is_spent)
            self._note(rows, proposal)
            if part.leaves and proposal.is_done is not None and config.restarts > 1:
                rows = self._left(rows, proposal.is_done)

    def attack_on(self, run: Run, config: AttackConfig, rows: Tensor | None, confirm: Confirm) -> Tensor:
        """Attack those of `rows` (None: all) again that are called done and are not fooled, to the end and for the
        highest loss. Returns them."""
        is_claimed = self.is_done if rows is None else torch.zeros_like(self.is_done).index_fill(0, rows, True)
        claimed = (is_claimed & self.is_done).nonzero()[:, 0]
        refuted = self._refuted(confirm, claimed)
        if len(claimed):  # samples, each once: a cascade may claim one again and again
            self.is_refuted = self.is_refuted.index_fill(0, refuted, True)
            self.diagnostics["num_refuted"] = float(self.is_refuted.sum())
        if len(refuted):
            self.best = Best(self.best.delta, self.best.loss.index_fill(0, refuted, torch.nan))
            self._attack(run, config, replace(self.batch, leaves=False, is_again=True), refuted)
        return refuted

    def _refuted(self, confirm: Confirm, claimed: Tensor) -> Tensor:
        """Those of the rows `claimed` that are not fooled, or whose perturbation is not finite: the judge finds no
        equilibrium there, which says nothing of the model. They are not done any more."""
        if len(claimed) == 0:
            return claimed
        with self.meter.paused(), torch.no_grad():
            delta = self.best.delta[claimed]
            is_finite = torch.isfinite(delta.flatten(1)).all(1)
            delta, images = delta.masked_fill(per_sample(~is_finite, delta), 0.0), self.batch.images[claimed]
            is_fooled = confirm(claimed, (images + self.threat.ball(images).project(delta)).clamp_(0.0, 1.0))
        refuted = claimed[~(is_fooled.to(claimed.device) & is_finite)]
        self.is_done = self.is_done.index_fill(0, refuted, False)
        return refuted

    def attack_left(self, run: Run, config: AttackConfig, rows: Tensor, confirm: Confirm | None) -> Tensor:
        """An attack of a cascade on `rows`; those that it has not broken, as `confirm` says.

        It is asked of all whose loss is not negative, too: some of these are fooled without the attack's being sure.
        Losses of different attacks are not compared: a sample keeps the perturbation of the last that was at it.
        """
        self.best = Best(self.best.delta, self.best.loss.index_fill(0, rows, torch.nan))
        self.attack(run, config, rows)
        if confirm is not None:
            is_open = ~self.is_done
            is_open = is_open.index_fill(0, self.attack_on(run, config, rows, confirm), True)
            likely = rows[is_open[rows] & (self.is_done[rows] | (self.best.loss[rows] >= 0))]
            self.is_done = self.is_done.index_fill(0, likely, True)
            self._refuted(confirm, likely)
        return rows[~self.is_done[rows]]

    def spent(self) -> Cost:
        """So far."""
        return self.meter.cost(len(self.batch))

    def end_stage(self, name: str, rows: Tensor, before: Cost) -> None:
        """A stage of a cascade on `rows` has ended; `before` is what had been spent when it began."""
        broken = rows[self.is_done[rows]]
        self.stage_of = self.stage_of.index_fill(0, broken, len(self.stages))
        self.stages.append(StageResult(name, len(rows), len(broken), self.spent().since(before)))

    def _note(self, rows: Tensor | None, proposal: Proposal) -> None:
        self.best, self.last = self.best.merged(rows, proposal.delta, proposal.loss, proposal.is_done), proposal
        for key, value in proposal.diagnostics.items():
            self.diagnostics[key] = self.diagnostics.get(key, 0.0) + value
        if proposal.is_done is not None:
            done = proposal.is_done
            self.is_done = self.is_done | done if rows is None else self.is_done.index_put((rows,), done)
        if proposal.is_lagging is not None:
            self._mark("num_lagging", rows, proposal.is_lagging)
        elif "num_lagging" in self.marks and proposal.is_done is not None:  # by an earlier attack of a cascade, with
            self._mark("num_lagging", rows, torch.zeros_like(proposal.is_done))  # full solves this time
        if proposal.is_flat is not None:  # in every run: one gradient is enough
            known = self.marks.get("num_zero_gradient")
            is_known_flat = True if known is None else known if rows is None else known[rows]
            self._mark("num_zero_gradient", rows, proposal.is_flat & is_known_flat)

    def _mark(self, name: str, rows: Tensor | None, mark: Tensor) -> None:
        known = self.marks.get(name, torch.zeros_like(self.is_done))
        self.marks[name] = mark if rows is None else known.index_put((rows,), mark)

    @staticmethod
    def _left(rows: Tensor | None, is_done: Tensor) -> Tensor:
        left = (~is_done).nonzero()[:, 0]
        return left if rows is None else rows[left]

    def result(self, rows: Tensor | None) -> AttackResult:
        x, delta, last = self.batch.images, self.best.delta.detach(), self.last
        is_failed = ~torch.isfinite(delta.flatten(1)).all(1)
        delta = self.ball.project(delta.masked_fill(per_sample(is_failed, delta), 0.0))
        is_attacked = torch.ones_like(is_failed)
        if rows is not None:
            is_attacked = torch.zeros_like(is_failed).index_fill(0, rows, True)
        z, mu = (last.z, last.mu) if last is not None and len(last.delta) == len(x) else (None, None)
        self.diagnostics |= {name: float((mark & ~self.is_done).sum()) for name, mark in self.marks.items()}
        if self.meter.has_budget:
            self.diagnostics["stopped_by_budget"] = float(self.meter.is_spent)
        return AttackResult(
            x_adv=(x + delta).clamp_(0.0, 1.0),
            delta=delta,
            loss=self.best.loss,
            is_failed=is_failed,
            is_attacked=is_attacked & ~self.is_spared,
            cost=self.meter.cost(len(x)),
            snapshots=tuple(self.record.snapshots),
            residuals=self.record.residuals,
            z=z,
            mu=mu,
            diagnostics=self.diagnostics,
            stages=tuple(self.stages),
            stage_of=self.stage_of if self.stages else None,
            is_certified=self.is_certified,
        )

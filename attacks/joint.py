"""Joint attacks, and what is done where the joint iteration is not to be believed.

    search   the joint iteration on all samples
    climb    again, twice as long, from where it ended, on those that are not fooled and have come most of the way
    lagging  a sample whose state is behind its equilibrium at the end is attacked again with full solves, unless the
             smallest norm was looked for and found; so is one that was called fooled and is not, as the judge says:
             its loss was seen at another equilibrium
    audit    of those that would be called robust, a few steps with full solves from where the search ended: all that
             are hard (`optimise.contraction`), all whose states have gone astray, and a keyed share of the others
    finish   where the audit fools more than `ALARM` of those it has looked at, the others of their kind (suspects, or
             not) are attacked again with full solves

The audit's verdict on some samples of a batch decides how the others of that batch are finished: the one place where a
sample's batch mates matter. It can only add successes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks.settings import JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import HighestLoss, Keep, Optimum, ProjectedAscent, SmallestNorm, Solved, Step
from robustbench_deq.protocol import Batch, ObjectiveAttack, Proposal, Recorder
from robustbench_deq.randomness import keyed_uniform
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Solve

REACH = 0.5
"""A sample climbs while what it has gained is at least `1 / REACH` times what is missing."""
FULL_STEPS = 20
FULL_RTOL = 1e-4
AUDIT_STEPS = 3
AUDIT_STEP_SIZE = 0.5
AUDITED_SHARE = 1 / 16
ALARM = 0.15
"""The share of the audited samples of a kind that the audit may fool, and one more, before the others of that kind are
finished with full solves."""

J = TypeVar("J", bound=JointConfig)


class JointAttack(ObjectiveAttack[J]):
    """An attack inside the augmented iteration, with full solves behind it."""

    def climb(
        self, model: EquilibriumModel, batch: Batch, step: Step, keep: Keep, record: Recorder, full_step: Step
    ) -> Proposal:
        """Search with the config's source; then attack again where that is not to be believed.

        Args:
            full_step: of the attack with full solves.
        """
        config = self.config
        record.plan(config.steps)
        if config.is_cold:
            batch = replace(batch, settled=None)
        source = config.source()
        found = self.search(model, batch, source, step, keep, config.steps, record)
        moves = found.tally.get("perturbation_steps")
        counts = {"perturbation_steps": 0.0 if moves is None else float(moves.float().mean())}
        num_steps, gain, climbing = config.steps, found.gain, torch.arange(len(batch), device=found.loss.device)
        for _ in range(config.rounds - 1 if batch.leaves else 0):
            num_steps *= 2
            climbs = ~(-found.loss[climbing] > REACH * gain)
            climbing = climbing[climbs & ~found.is_done[climbing]]
            if len(climbing) == 0 or found.is_stopped:
                break
            part = replace(batch.take(climbing), start=found.variable[climbing])
            if part.settled is not None and found.z is not None and found.mu is not None:
                part = replace(part, settled=part.settled._replace(z=found.z[climbing], mu=found.mu[climbing]))
            further = self.search(model, part, source, step, keep, num_steps)
            found, gain = _merged(found, climbing, further, isinstance(keep, HighestLoss)), further.gain
        if not config.has_fallback or found.is_stopped:
            return _proposal(found, None, counts)
        solve = Solve(Anderson(), rtol=FULL_RTOL, max_steps=100)
        again = _Again(self, model, batch, Solved(solve, Implicit(solve.with_(compact_below=0.5))), full_step)

        is_lagging = ~(found.residual <= config.failure_residual) & ~found.is_done
        if isinstance(keep, SmallestNorm):  # a trusted success is what was looked for, wherever the state is now
            is_lagging &= ~(found.loss > 0)
        lagging = (is_lagging | batch.is_again).nonzero()[:, 0]
        found, is_behind = again.finish(found, lagging, isinstance(keep, HighestLoss) and not batch.is_again)
        counts["num_finished"] = float(len(lagging))
        if batch.leaves and not found.is_stopped:
            left = (~found.is_done).index_fill(0, lagging, False)
            is_suspect, is_drawn = self._suspects(batch, found), self._drawn(batch, found)
            audited = (left & (is_suspect | is_drawn)).nonzero()[:, 0]
            found = again.audit(found, audited)
            counts |= {"num_audited": float(len(audited)), "num_audit_fooled": float(found.is_done[audited].sum())}
            for kind, looked_at in ((is_suspect, left & is_suspect), (~is_suspect, left & is_drawn & ~is_suspect)):
                num_fooled, num_looked_at = int((found.is_done & looked_at).sum()), int(looked_at.sum())
                if num_fooled > 1 + ALARM * num_looked_at and not found.is_stopped:
                    rest = (left & kind & ~found.is_done).nonzero()[:, 0]
                    found, behind = again.finish(found, rest, True)
                    is_behind, counts["num_finished"] = is_behind | behind, counts["num_finished"] + len(rest)
        return _proposal(found, is_behind, counts)

    def _suspects(self, batch: Batch, found: Optimum) -> Tensor:
        """Samples `(rows,)` that are hard, or whose states have gone astray."""
        is_suspect = found.tally.get("is_astray", torch.zeros_like(found.is_done))
        if batch.settled is None or batch.settled.contraction is None:
            return is_suspect
        return is_suspect | batch.settled.contraction.is_hard

    def _drawn(self, batch: Batch, found: Optimum) -> Tensor:
        """Samples `(rows,)` of the keyed share."""
        return keyed_uniform(batch.ids.to(found.loss.device), batch.seed, AUDIT_KEY) < AUDITED_SHARE


AUDIT_KEY = 0x0A0D17
"""Tells the audit's draws from others of the same seed and sample."""


class _Again(NamedTuple):
    """Attacks some samples of a batch again with full solves; the better perturbation stays, unless the new one
    fools."""

    attack: JointAttack  # type: ignore[type-arg]  # any of them
    model: EquilibriumModel
    batch: Batch
    source: Solved
    step: Step

    def finish(self, found: Optimum, rows: Tensor, has_trusted_losses: bool) -> tuple[Optimum, Tensor]:
        """From the start, with all steps, and cold solves, which find the equilibrium that the judge finds where there
        are several; where these reach none, again with warm ones. Also the samples of the batch that are left behind.

        Args:
            has_trusted_losses: whether the losses of `found` mean anything: only trusted ones were kept.
        """
        is_behind = torch.zeros_like(found.is_done)
        for is_warm in (False, True):
            if len(rows) == 0:
                break
            part = self.batch.take(rows)
            again = self._search(part, replace(self.source, is_warm=is_warm), self.step, FULL_STEPS)
            missed = ~(again.residual <= FULL_RTOL) & ~again.is_done
            is_behind = is_behind.index_put((rows,), missed)
            found, rows = _merged(found, rows, again, has_trusted_losses), rows[missed]
        return found, is_behind

    def audit(self, found: Optimum, rows: Tensor) -> Optimum:
        """From where `found` ended, a few steps."""
        if len(rows) == 0:
            return found
        part = replace(self.batch.take(rows), start=found.variable[rows])
        again = self._search(part, self.source, ProjectedAscent(AUDIT_STEP_SIZE), AUDIT_STEPS)
        return _merged(found, rows, again, True)

    def _search(self, part: Batch, source: Solved, step: Step, num_steps: int) -> Optimum:
        return self.attack.search(self.model, part, source, step, HighestLoss(FULL_RTOL, FULL_RTOL), num_steps)


def _proposal(found: Optimum, is_lagging: Tensor | None, counts: dict[str, float]) -> Proposal:
    return Proposal(
        delta=found.variable,
        loss=found.loss,
        is_done=found.is_done,
        is_lagging=is_lagging,
        is_flat=found.is_flat,
        z=found.z,
        mu=found.mu,
        diagnostics=counts,
    )


def _merged(found: Optimum, rows: Tensor, again: Optimum, has_trusted_losses: bool) -> Optimum:
    old = found.loss[rows] if has_trusted_losses else torch.full_like(again.loss, -torch.inf)
    wins = (again.loss > old) | again.is_done
    variable = torch.where(per_sample(wins, again.variable), again.variable, found.variable[rows])
    z, mu = found.z, found.mu
    if z is not None and again.z is not None:
        z = z.index_copy(0, rows, again.z)
    if mu is not None and again.mu is not None:
        mu = mu.index_copy(0, rows, again.mu)
    return Optimum(
        variable=found.variable.index_copy(0, rows, variable),
        loss=found.loss.index_copy(0, rows, torch.where(wins, again.loss, old)),
        gain=found.gain.index_copy(0, rows, torch.where(wins, again.loss, old) - found.loss[rows] + found.gain[rows]),
        residual=found.residual.index_copy(0, rows, again.residual),
        z=z,
        mu=mu,
        is_done=found.is_done.index_copy(0, rows, again.is_done),
        is_flat=found.is_flat.index_copy(0, rows, found.is_flat[rows] & again.is_flat),
        is_stopped=found.is_stopped or again.is_stopped,
        tally=found.tally | {"is_astray": _astray(found, rows, again)},
    )


def _astray(found: Optimum, rows: Tensor, again: Optimum) -> Tensor:
    """Rows whose state has gone astray in either; a source with full solves knows of none."""
    known = found.tally.get("is_astray", torch.zeros_like(found.is_done))
    return known.index_put((rows,), known[rows] | again.tally.get("is_astray", torch.zeros_like(again.is_done)))


def full_ascent() -> ProjectedAscent:
    """The step of attacks with full solves: that of `pgd` by default."""
    return ProjectedAscent(1.0)

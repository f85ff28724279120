"""The ladder of joint attacks: what is done for samples whose state does not follow its equilibrium.

A cell need not be contractive. A sample whose relative residual is above `failure_residual` at the end, or not finite,
is attacked again, alone with its likes, on the next rung: damping, then Anderson acceleration, both with three times
the steps, then full solves. The diagnostics say how many samples needed each rung.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks.settings import JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import HighestLoss, Keep, Mixing, Optimum, ProjectedAscent, Solved, Step
from robustbench_deq.protocol import Batch, ObjectiveAttack, Proposal, Recorder
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Solve

RUNG_STEPS = 3
"""A rung takes this many times `steps`: its samples are few, and their states slow."""
FULL_STEPS = 20
FULL_RTOL = 1e-3

J = TypeVar("J", bound=JointConfig)


class JointAttack(ObjectiveAttack[J]):
    """An attack inside the augmented iteration, with the ladder behind it."""

    def climb(
        self, model: EquilibriumModel, batch: Batch, step: Step, keep: Keep, record: Recorder, full_step: Step
    ) -> Proposal:
        """Search with the config's source; then, rung by rung, again where that failed.

        Args:
            full_step: of the last rung, which has full solves.
        """
        config, source = self.config, self.config.source()
        record.plan(config.steps)
        if config.is_cold:
            batch = replace(batch, settled=None)
        found = self.search(model, batch, source, step, keep, config.steps, record)
        moves = found.tally.get("perturbation_steps")
        diagnostics = {"perturbation_steps": 0.0 if moves is None else float(moves.float().mean())}
        if config.has_fallback:
            slower = replace(source, damping_z=0.5, damping_mu=0.5, accelerator=None, warmup=config.warmup(0.5))
            faster = replace(source, accelerator=Anderson(), mixing=Mixing.STATE, inner_steps=None)
            solve = Solve(Anderson(), rtol=FULL_RTOL)
            full = Solved(solve, Implicit(solve.with_(compact_below=0.5)))
            rungs = {
                "damped": (slower, step, keep, RUNG_STEPS * config.steps),
                "accelerated": (faster, step, keep, RUNG_STEPS * config.steps),
                "full_solve": (full, full_step, HighestLoss(FULL_RTOL, FULL_RTOL), FULL_STEPS),
            }
            for name, (other, its_step, its_keep, num_steps) in rungs.items():
                failed = self._failed(found)
                diagnostics[f"num_{name}"] = float(len(failed))
                if len(failed):
                    again = self.search(model, batch.take(failed), other, its_step, its_keep, num_steps)
                    found = _merged(found, failed, again, isinstance(keep, HighestLoss))
        return Proposal(found.variable, found.loss, found.is_done, found.z, found.mu, diagnostics)

    def _failed(self, found: Optimum) -> Tensor:
        """Rows whose state does not follow its equilibrium; those of a run that its budget ended stay as they are."""
        if found.is_stopped:
            return torch.zeros(0, dtype=torch.int64, device=found.loss.device)
        return (~(found.residual <= self.config.failure_residual) & ~found.is_done).nonzero()[:, 0]


def _merged(found: Optimum, rows: Tensor, again: Optimum, has_trusted_losses: bool) -> Optimum:
    """`found` with `rows` run again: all is the rerun's, but the better perturbation stays, unless the rerun's fools.

    Args:
        has_trusted_losses: whether the losses of failed rows mean anything: only trusted ones were kept.
    """
    old = found.loss[rows] if has_trusted_losses else torch.full_like(again.loss, -torch.inf)
    wins = ~(old > again.loss) | again.is_done
    variable = torch.where(per_sample(wins, again.variable), again.variable, found.variable[rows])
    z, mu = found.z, found.mu
    if z is not None and again.z is not None:
        z = z.index_copy(0, rows, again.z)
    if mu is not None and again.mu is not None:
        mu = mu.index_copy(0, rows, again.mu)
    return Optimum(
        variable=found.variable.index_copy(0, rows, variable),
        loss=found.loss.index_copy(0, rows, torch.where(wins, again.loss, old)),
        residual=found.residual.index_copy(0, rows, again.residual),
        z=z,
        mu=mu,
        is_done=found.is_done.index_copy(0, rows, again.is_done),
        is_stopped=found.is_stopped or again.is_stopped,
        tally=found.tally,
    )


def full_ascent() -> ProjectedAscent:
    """The step of the last rung of ascents: that of `pgd` by default."""
    return ProjectedAscent(1.0)

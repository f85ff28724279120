"""`pgd`: projected gradient ascent with a forward and an adjoint solve per gradient step; the baseline.

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, on a DEQ (Bai et al.,
2019).
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field
from torch import Tensor

from robustbench_deq.attacks.settings import SolvedConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import Keep, Objective, ProjectedAscent, Schedule, Step
from robustbench_deq.protocol import ATTACKS, Batch, ObjectiveAttack, Proposal, Recorder

S = TypeVar("S", bound=SolvedConfig)


class SequentialPGDConfig(SolvedConfig):
    """Settings of `pgd`."""

    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the perturbation's direction")


class SolvedAttack(ObjectiveAttack[S]):
    """An attack with full solves."""

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """A cold attack is one that knows nothing; other adjoints than the implicit one are not solved."""
        is_of_use = self.config.warm_start and self.config.adjoint == "implicit"
        return super().first_objective(labels, targets) if is_of_use else None

    def climb(
        self, model: EquilibriumModel, batch: Batch, step: Step, record: Recorder, keep: Keep | None = None
    ) -> Proposal:
        """A run with the given step; by default the highest loss is kept."""
        config = self.config
        record.plan(config.steps)
        source = config.source(has_trace=record.num_snapshots > 0)
        found = self.search(model, batch, source, step, keep or config.highest_loss(), config.steps, record)
        return Proposal.of(found)


@ATTACKS.register("pgd")
class SequentialPGD(SolvedAttack[SequentialPGDConfig]):
    name = "pgd"
    summary = "PGD with a forward and an adjoint solve per gradient step, warm or cold"
    config_type = SequentialPGDConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        step = ProjectedAscent(config.step_size, config.schedule, config.momentum)
        return self.climb(model, batch, step, record)

"""`intermediate-pgd`: PGD along the gradients of states on the way to the equilibrium, one or several.

An equilibrium whose own gradient says little, because the adjoint's solve is not what is scored, has still passed
states whose gradients do. What is compared, and may leave, is the loss at the equilibrium, which is solved for from the
last one; only the direction is that of the states (`optimise.Intermediate`).

`states` and `steps_after` span the grid of the source: a suite writes `grid: {states: [[0], [2], [4]], steps_after:
[1, 3]}`. The network that stops after K evaluations is `states=[0] steps_after=K`; with the loss at its own last state,
and leaving where that has settled, it is `pgd` with `adjoint=unrolled adjoint_steps=K warm_start=false`.

Source: Yang, Pang, Liu, NeurIPS 2022, section 4.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from robustbench_deq.configs import named_in
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import HighestLoss, Intermediate, Objective, ProjectedAscent, Schedule
from robustbench_deq.protocol import ATTACKS, Batch, ObjectiveAttack, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.solvers import SOLVERS, Solve

MOST_STATES = 1000


def _distinct(states: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(states)) < len(states) or not all(0 <= state <= MOST_STATES for state in states):
        raise ValueError(f"every state once, from 0 to {MOST_STATES}")
    return states


class IntermediatePGDConfig(ObjectiveConfig):
    """Settings of `intermediate-pgd`."""

    steps: int = Field(20, ge=1, description="gradient steps")
    step_size: float = Field(1.0, gt=0, le=1e6, description="first step as a fraction of epsilon")
    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    states: Annotated[tuple[int, ...], AfterValidator(_distinct)] = Field(
        (2, 4, 8), min_length=1, description="states of the plain iteration, from 0, whose gradients are summed"
    )
    steps_after: int = Field(6, ge=1, le=1000, description="evaluations after each state, which its gradient passes")
    damping: float = Field(1.0, gt=0, le=1, description="of these evaluations; 1 is none")
    solver: Annotated[str, named_in(SOLVERS)] = Field("anderson", description="of the equilibrium that is compared")
    tolerance: float = Field(1e-3, gt=0, description="relative residual of that solve")
    max_steps: int = Field(100, ge=1, description="most steps of that solve")


@ATTACKS.register("intermediate-pgd")
class IntermediatePGD(ObjectiveAttack[IntermediatePGDConfig]):
    name = "intermediate-pgd"
    summary = "PGD along the gradients of states on the way to the equilibrium"
    config_type = IntermediatePGDConfig

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """No adjoint is solved."""
        return None

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        record.plan(config.steps)
        forward = Solve(SOLVERS.get(config.solver)(), rtol=config.tolerance, max_steps=config.max_steps)
        found = self.search(
            model,
            batch,
            source=Intermediate(config.steps_after, config.states, config.damping, forward),
            step=ProjectedAscent(config.step_size, config.schedule),
            keep=HighestLoss(config.tolerance, last_residual=config.tolerance),
            num_steps=config.steps,
            record=record,
        )
        return Proposal.of(found)

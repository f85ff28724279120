"""`yopo`: PGD that solves for state and adjoint once in a few ascents, and freezes both in between (YOPO-m-n).

    m times:   z = f(z, u(d)),  mu = J_z^T mu + dL/dz        solved, from the last ones
    n times:   d = Project(d + a direction(grad_d <mu, f(z, u(d))>))

It lies between PGD, which is n = 1, and the joint attacks, whose state and adjoint advance with every step.

Source: Zhang et al., NeurIPS 2019, Algorithm 1 (YOPO-5-3: steps of a quarter of epsilon, constant).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from robustbench_deq.configs import named_in
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import Frozen, HighestLoss, ProjectedAscent, Schedule
from robustbench_deq.protocol import ATTACKS, Batch, ObjectiveAttack, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.solvers import SOLVERS, Solve


class YOPOConfig(ObjectiveConfig):
    """Settings of `yopo`."""

    steps: int = Field(10, ge=1, description="m, solves for state and adjoint")
    ascents: int = Field(3, ge=1, le=1000, description="n, steps of the perturbation to each")
    step_size: float = Field(1.0, gt=0, le=1e6, description="first step as a fraction of epsilon")
    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    solver: Annotated[str, named_in(SOLVERS)] = Field("anderson", description="forward and adjoint solver")
    tolerance: float = Field(1e-3, gt=0, description="relative residual of both solves")
    max_steps: int = Field(100, ge=1, description="most steps of each solve")


@ATTACKS.register("yopo")
class YOPO(ObjectiveAttack[YOPOConfig]):
    name = "yopo"
    summary = "PGD that solves once in a few steps, with state and adjoint frozen in between"
    config_type = YOPOConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        num_steps = config.steps * config.ascents
        record.plan(num_steps)
        forward = Solve(SOLVERS.get(config.solver)(), rtol=config.tolerance, max_steps=config.max_steps)
        found = self.search(
            model,
            batch,
            source=Frozen(forward, forward.with_(compact_below=0.5), config.ascents),
            step=ProjectedAscent(config.step_size, config.schedule),
            keep=HighestLoss(config.tolerance, last_residual=config.tolerance),
            num_steps=num_steps,
            record=record,
        )
        return Proposal.of(found)

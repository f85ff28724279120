"""`fgsm`: one step of length epsilon along the gradient at the clean equilibrium.

Where an evaluation knows that equilibrium and its adjoint, the gradient costs an evaluation or two and as many
products; what is left is the solve at the moved image. There is no joint form: at an equilibrium the joint iteration
has this gradient too.

Source: Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples", ICLR 2015, section 4.
"""

from __future__ import annotations

from pydantic import Field

from robustbench_deq.adjoints import Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import Last, ProjectedAscent, Schedule, Solved
from robustbench_deq.protocol import ATTACKS, Batch, ObjectiveAttack, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.solvers import Anderson, Solve


class FGSMConfig(ObjectiveConfig):
    """Settings of `fgsm`."""

    tolerance: float = Field(1e-3, gt=0, description="relative residual of the forward and the adjoint solve")


@ATTACKS.register("fgsm")
class FGSM(ObjectiveAttack[FGSMConfig]):
    name = "fgsm"
    summary = "one step of length epsilon along the gradient"
    config_type = FGSMConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        record.plan(1)
        solve = Solve(Anderson(), rtol=self.config.tolerance, max_steps=100)
        found = self.search(
            model,
            batch,
            source=Solved(solve, Implicit(solve.with_(compact_below=0.5))),
            step=ProjectedAscent(1.0, Schedule.CONSTANT),
            keep=Last(),
            num_steps=1,
            record=record,
        )
        return Proposal.of(found)

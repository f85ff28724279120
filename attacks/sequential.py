"""`pgd`: projected gradient ascent with a forward and an adjoint solve per gradient step; the baseline.

    z_t  = solve(f(., inject(x + delta_t)))     from the last state (warm) or from the initial state (cold)
    g_t  = gradient of the loss through z_t     by the chosen adjoint; the implicit one may start from the last mu
    delta_{t+1} = Project(delta_t + a_t * direction(g_t))

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, on a DEQ (Bai et al.,
2019).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustbench_deq.adjoints import ADJOINTS, AdjointTrace, Implicit
from robustbench_deq.configs import named_in
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.joint import ProjectedAscent, Schedule, keep_better
from robustbench_deq.objectives import objective_at
from robustbench_deq.protocol import ATTACKS, Attack, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.solvers import SOLVERS, Solve


class SequentialPGDConfig(ObjectiveConfig):
    """Settings of `pgd`. The adjoint's solver, tolerance and most steps default to the forward ones."""

    steps: int = Field(20, ge=1, description="gradient steps")
    step_size: float = Field(1.0, gt=0, description="first step as a fraction of epsilon")
    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the perturbation's direction")
    warm_start: bool = Field(True, description="start each solve from the last state and adjoint")
    solver: Annotated[str, named_in(SOLVERS)] = Field("anderson", description="forward solver")
    tolerance: float = Field(1e-3, gt=0, description="relative residual of the forward solve")
    max_steps: int = Field(100, ge=1, description="most steps of the forward solve")
    adjoint: Annotated[str, named_in(ADJOINTS)] = Field(
        "implicit", description="implicit, neumann, phantom, jacobian-free or unrolled"
    )
    adjoint_solver: Annotated[str | None, named_in(SOLVERS)] = Field(None, description="solver of the implicit adjoint")
    adjoint_tolerance: float | None = Field(None, gt=0, description="relative residual of the adjoint solve")
    adjoint_max_steps: int | None = Field(None, ge=1, description="most steps of the adjoint solve")
    adjoint_steps: int | None = Field(None, ge=1, description="terms or steps of neumann, phantom, unrolled")

    @model_validator(mode="after")
    def _check_adjoint(self) -> SequentialPGDConfig:
        solves = self.adjoint == "implicit"
        unused = ("adjoint_steps",) if solves else ("adjoint_solver", "adjoint_tolerance", "adjoint_max_steps")
        if self.adjoint == "jacobian-free":
            unused += ("adjoint_steps",)
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"no {name} with adjoint={self.adjoint}, which does not use it")
        return self

    def forward_solve(self, has_trace: bool) -> Solve:
        solver = SOLVERS.get(self.solver)()
        return Solve(solver, rtol=self.tolerance, max_steps=self.max_steps, has_trace=has_trace)

    def backward_solve(self) -> Solve:
        return Solve(
            SOLVERS.get(self.adjoint_solver or self.solver)(),
            rtol=self.adjoint_tolerance or self.tolerance,
            max_steps=self.adjoint_max_steps or self.max_steps,
            compact_below=0.5,  # compacting rebuilds the graph, which costs an evaluation
        )


@ATTACKS.register("pgd")
class SequentialPGD(Attack[SequentialPGDConfig]):
    name = "pgd"
    summary = "PGD with a forward and an adjoint solve per gradient step, warm or cold"
    config_type = SequentialPGDConfig

    def run(
        self,
        model: EquilibriumModel,
        x: Tensor,
        y: Tensor,
        targets: Tensor | None,
        start: Tensor,
        record: Recorder,
    ) -> Proposal:
        config = self.config
        objective = config.bind(y, targets)
        forward = config.forward_solve(has_trace=record.num_snapshots > 0)
        adjoint = ADJOINTS.get(config.adjoint)(config.backward_solve(), config.adjoint_steps)
        ascent = ProjectedAscent(self.threat, x, config.step_size, config.schedule, config.momentum)
        record.plan(config.steps)
        delta, z, mu = start, None, None
        velocity = ascent.init(delta)
        kept, kept_loss = delta, x.new_full((len(x),), -torch.inf)
        unconverged_forward = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        unconverged_adjoint = torch.zeros_like(unconverged_forward)
        for step in range(config.steps + 1):
            is_last = step == config.steps
            trace = AdjointTrace()
            with torch.set_grad_enabled(not is_last):
                leaf = delta.detach().requires_grad_(not is_last)
                if config.warm_start and isinstance(adjoint, Implicit):
                    adjoint = adjoint.warm_started(mu)
                solution = model.equilibrium(x + leaf, z, solve=forward, adjoint=adjoint, trace=trace)
                logits = model.head(solution.value)
                loss = objective(logits.detach())
            if solution.trace is not None:
                record.follow(solution.trace)
            unconverged_forward += ~solution.is_converged
            kept, kept_loss = keep_better(
                kept, kept_loss, delta, loss, solution.is_converged, torch.isfinite(solution.residual)
            )
            record(step, kept, kept_loss)
            if is_last:
                break
            ascended = objective_at(objective, step / config.steps)(logits)
            gradient = torch.autograd.grad(ascended.sum(), leaf)[0]
            if trace.solution is not None:
                unconverged_adjoint += ~trace.solution.is_converged
            delta, velocity = ascent.step(delta, gradient, velocity, step / config.steps)
            if config.warm_start:
                z, mu = solution.value.detach(), trace.mu
        diagnostics = {
            "unconverged_forward_solves": float(unconverged_forward.sum()),
            "unconverged_adjoint_solves": float(unconverged_adjoint.sum()),
        }
        return Proposal(kept, kept_loss, solution.value.detach(), mu, diagnostics)

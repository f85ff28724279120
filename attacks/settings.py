"""Settings that several attacks have: those of the two sources of a gradient, and how they are built."""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from robustbench_deq.adjoints import ADJOINTS
from robustbench_deq.configs import named_in
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import AdaptivePace, HighestLoss, Joint, Mixing, Solved
from robustbench_deq.protocol import ObjectiveConfig
from robustbench_deq.solvers import SOLVERS, Picard, Solve, Solver


class AdjointStart(enum.Enum):
    """Where the adjoint starts. From zero the first step has no gradient, and nothing moves."""

    LOSS = "loss"
    ZERO = "zero"


def _without_jvp(name: str | None) -> str | None:
    if name is not None and SOLVERS.get(name)().needs_jvp:
        raise UsageError.of(
            "accelerator", expected="a solver that needs no Jacobian-vector products", got=name, fix="use anderson"
        )
    return name


class JointConfig(ObjectiveConfig):
    """Settings of attacks whose perturbation moves inside the augmented iteration."""

    steps: int = Field(20, ge=1, description="augmented iterations of the first run")
    rounds: int = Field(3, ge=1, description="runs, each twice as long, of samples on their way to being fooled")
    inner_steps: int | None = Field(1, ge=1, description="iterations of (z, mu) per perturbation step; null adapts")
    max_lag: float = Field(4.0, gt=0, description="adaptive: perturbation steps the state may be behind")
    max_inner_steps: int = Field(20, ge=1, description="adaptive: most iterations per perturbation step")
    step_size: float = Field(2.0, gt=0, le=1e6, description="first step as a fraction of epsilon")
    damping_z: float = Field(1.0, gt=0, le=1, description="damping of the state; 1 is none")
    damping_mu: float = Field(1.0, gt=0, le=1, description="damping of the adjoint; 1 is none")
    accelerator: Annotated[str | None, named_in(SOLVERS), AfterValidator(_without_jvp)] = Field(
        None, description="a solver for the inner iteration; null is the plain one"
    )
    history_size: int = Field(5, ge=1, description="history of the accelerator")
    mixing: Mixing = Field(Mixing.STATE, description="what the accelerator mixes: state or all")
    keep_residual: float = Field(0.005, gt=0, description="residual up to which a loss is trusted")
    warmup_steps: int = Field(20, ge=0, description="most evaluations of the cell before the first joint step")
    warmup_tolerance: float = Field(0.03, gt=0, description="relative residual at which the warm-up ends")
    adjoint_start: AdjointStart = Field(
        AdjointStart.LOSS, description="the loss's gradient with respect to the state, or zero"
    )
    failure_residual: float = Field(0.1, gt=0, description="final residual above which full solves finish")
    has_fallback: bool = Field(
        True, description="relax slow samples, audit, and finish with full solves; training does without"
    )

    @model_validator(mode="after")
    def _check_joint(self) -> JointConfig:
        if self.inner_steps is not None and self.inner_steps > self.steps:
            raise ValueError(f"inner_steps of at most steps ({self.steps}): the perturbation never moves")
        if self.accelerator is not None and self.inner_steps == 1 and self.mixing is Mixing.STATE:
            raise ValueError("inner_steps above 1 or null, or mixing=all, with an accelerator: it has nothing to mix")
        defaults = self.defaults()
        for reason, names in self.unused().items():
            for name in names:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"no {name} with {reason}, which does not use it")
        return self

    def defaults(self) -> dict[str, Any]:
        """What each setting is where nobody sets it."""
        return {name: info.default for name, info in type(self).model_fields.items()}

    def unused(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect, by the setting that makes them so."""
        return {
            "inner_steps, which is fixed": ("max_lag", "max_inner_steps") if self.inner_steps is not None else (),
            "accelerator, which is null": ("mixing",) if self.accelerator is None else (),
            f"accelerator={self.accelerator}": () if self._has_history() else ("history_size",),
            "warmup_steps=0": ("warmup_tolerance",) if not self.warmup_steps else (),
        }

    @property
    def is_cold(self) -> bool:
        """Whether state and adjoint start where nothing is known of the model, as published."""
        return not self.warmup_steps and self.adjoint_start is AdjointStart.ZERO

    def _has_history(self) -> bool:
        return self.accelerator is not None and hasattr(SOLVERS.get(self.accelerator)(), "history_size")

    def source(self) -> Joint:
        accelerator: Any = None
        if self.accelerator is not None:
            accelerator = SOLVERS.get(self.accelerator)()
            if self._has_history():
                accelerator = replace(accelerator, history_size=self.history_size)
        return Joint(
            inner_steps=self.inner_steps,
            pace=AdaptivePace(self.max_lag, self.max_inner_steps),
            damping_z=self.damping_z,
            damping_mu=self.damping_mu,
            accelerator=accelerator,
            mixing=self.mixing,
            warmup=self.warmup(self.damping_z),
            has_loss_start=self.adjoint_start is AdjointStart.LOSS,
            relaxes=self.has_fallback and not self.is_cold,
        )

    def warmup(self, damping: float) -> Solve | None:
        if not self.warmup_steps:
            return None
        return Solve(Picard(damping), rtol=self.warmup_tolerance, max_steps=self.warmup_steps)

    def highest_loss(self) -> HighestLoss:
        return HighestLoss(self.keep_residual, last_residual=self.failure_residual)


class SolvedConfig(ObjectiveConfig):
    """Settings of attacks with full solves. The adjoint's solver, tolerance and most steps default to the forward
    ones."""

    steps: int = Field(20, ge=1, description="gradient steps")
    step_size: float = Field(1.0, gt=0, le=1e6, description="first step as a fraction of epsilon")
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
    def _check_adjoint(self) -> SolvedConfig:
        solves = self.adjoint == "implicit"
        unused: tuple[str, ...] = ("adjoint_solver", "adjoint_tolerance", "adjoint_max_steps")
        if solves:
            unused = ("adjoint_steps",)
        if self.adjoint == "jacobian-free":
            unused += ("adjoint_steps",)
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"no {name} with adjoint={self.adjoint}, which does not use it")
        return self

    def source(self, has_trace: bool = False) -> Solved:
        """has_trace: keep the residuals of every step of the forward solves."""
        solver: Solver = SOLVERS.get(self.solver)()
        backward = Solve(
            SOLVERS.get(self.adjoint_solver or self.solver)(),
            rtol=self.adjoint_tolerance or self.tolerance,
            max_steps=self.adjoint_max_steps or self.max_steps,
            compact_below=0.5,  # compacting rebuilds the graph, which costs an evaluation
        )
        return Solved(
            forward=Solve(solver, rtol=self.tolerance, max_steps=self.max_steps, has_trace=has_trace),
            adjoint=ADJOINTS.get(self.adjoint)(backward, self.adjoint_steps),
            is_warm=self.warm_start,
        )

    def highest_loss(self) -> HighestLoss:
        return HighestLoss(self.tolerance, last_residual=self.tolerance)

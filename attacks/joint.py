"""`joint-pgd`: PGD whose perturbation steps run inside the augmented fixed-point iteration.

The state, the adjoint and the perturbation advance together (`robustbench_deq.joint`); a step costs one evaluation of
the cell and one vector-Jacobian product, where PGD solves two fixed points.

A cell need not be contractive. A sample whose state does not follow its equilibrium at the end (its relative residual
is above `failure_residual`, or not finite) is attacked again, alone with its likes, on the next rung of a ladder:
damping, then Anderson acceleration, both with three times the steps, then PGD with full solves. The diagnostics say how
many samples needed each rung.

Source: Gurumurthy, Bai, Manchester, Kolter, NeurIPS 2021. Departures: projection after mixing, the pixel box,
per-sample acceptance, the adjoint's start, and the ladder.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from robustbench_deq.attacks.sequential import SequentialPGD, SequentialPGDConfig
from robustbench_deq.configs import named_in
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.joint import (
    AugmentedMap,
    JointResult,
    JointSettings,
    Keep,
    Mixing,
    ProjectedAscent,
    Schedule,
    Watcher,
    ascend,
)
from robustbench_deq.objectives import Objective
from robustbench_deq.protocol import ATTACKS, Attack, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import SOLVERS, Anderson, CellMap, Picard, Solve


class Preset(enum.Enum):
    DEFAULT = "default"
    JIIO_2021 = "jiio-2021"


class AdjointStart(enum.Enum):
    """Where the adjoint starts. From zero the first step has no gradient, and nothing moves."""

    LOSS = "loss"
    ZERO = "zero"


JIIO_2021 = {
    "objective": "cross-entropy",
    "steps": 80,
    "inner_steps": 1,
    "step_size": 0.6,
    "schedule": Schedule.DROP,
    "damping_z": 0.8,
    "damping_mu": 0.6,
    "accelerator": "anderson-1",
    "history_size": 20,
    "mixing": Mixing.ALL,
    "keep": Keep.JIIO,
    "warmup_steps": 0,
    "adjoint_start": AdjointStart.ZERO,
}
"""The published settings for MNIST: `step_size` 0.6 falls to 0.2 after 5/8 of the steps; all variables start at 0."""


RUNG_STEPS = 3
"""A rung of the ladder takes this many times `steps`: its samples are few, and their states slow."""


def _without_jvp(name: str | None) -> str | None:
    if name is not None and SOLVERS.get(name)().needs_jvp:
        raise UsageError.of(
            "accelerator", expected="a solver that needs no Jacobian-vector products", got=name, fix="use anderson"
        )
    return name


class JointPGDConfig(ObjectiveConfig):
    """Settings of `joint-pgd`; `preset=jiio-2021` gives the published ones, and other keys override it."""

    preset: Preset = Field(Preset.DEFAULT, description="default or jiio-2021")
    steps: int = Field(32, ge=1, description="augmented iterations")
    inner_steps: int | None = Field(1, ge=1, description="iterations of (z, mu) per perturbation step; null adapts")
    max_lag: float = Field(4.0, gt=0, description="adaptive: perturbation steps the state may be behind")
    max_inner_steps: int = Field(20, ge=1, description="adaptive: most iterations per perturbation step")
    step_size: float = Field(2.0, gt=0, description="first step as a fraction of epsilon")
    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the perturbation's direction")
    damping_z: float = Field(1.0, gt=0, le=1, description="damping of the state; 1 is none")
    damping_mu: float = Field(1.0, gt=0, le=1, description="damping of the adjoint; 1 is none")
    accelerator: Annotated[str | None, named_in(SOLVERS), AfterValidator(_without_jvp)] = Field(
        None, description="a solver for the inner iteration; null is the plain one"
    )
    history_size: int = Field(5, ge=1, description="history of the accelerator")
    mixing: Mixing = Field(Mixing.STATE, description="what the accelerator mixes: state or all")
    keep: Keep = Field(Keep.LOSS, description="which iterate is returned: loss, jiio or last")
    keep_residual: float = Field(0.005, gt=0, description="keep=loss: residual up to which a loss is trusted")
    warmup_steps: int = Field(20, ge=0, description="most evaluations of the cell before the first joint step")
    warmup_tolerance: float = Field(0.03, gt=0, description="relative residual at which the warm-up ends")
    adjoint_start: AdjointStart = Field(AdjointStart.LOSS, description="the loss's gradient by the state, or zero")
    failure_residual: float = Field(0.1, gt=0, description="final residual above which a sample falls back")
    has_fallback: bool = Field(True, description="attack such samples again; training does without")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("preset") in (Preset.JIIO_2021, Preset.JIIO_2021.value):
            return {**JIIO_2021, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> JointPGDConfig:
        if self.inner_steps is not None and self.inner_steps > self.steps:
            raise ValueError(f"inner_steps of at most steps ({self.steps}): the perturbation never moves")
        if self.accelerator is not None and self.inner_steps == 1 and self.mixing is Mixing.STATE:
            raise ValueError("inner_steps above 1 or null, or mixing=all, with an accelerator: it has nothing to mix")
        unused = {
            "inner_steps, which is fixed": ("max_lag", "max_inner_steps") if self.inner_steps is not None else (),
            "accelerator, which is null": ("mixing",) if self.accelerator is None else (),
            f"accelerator={self.accelerator}": () if self._has_history() else ("history_size",),
            f"keep={self.keep.value}": ("keep_residual",) if self.keep is not Keep.LOSS else (),
            "warmup_steps=0": ("warmup_tolerance",) if not self.warmup_steps else (),
        }
        preset = JIIO_2021 if self.preset is Preset.JIIO_2021 else {}
        for reason, names in unused.items():
            for name in names:
                if getattr(self, name) != preset.get(name, type(self).model_fields[name].default):
                    raise ValueError(f"no {name} with {reason}, which does not use it")
        return self

    def _has_history(self) -> bool:
        return self.accelerator is not None and hasattr(SOLVERS.get(self.accelerator)(), "history_size")

    def settings(self) -> JointSettings:
        accelerator = None
        if self.accelerator is not None:
            accelerator = SOLVERS.get(self.accelerator)()
            if self._has_history():
                accelerator = replace(accelerator, history_size=self.history_size)
        return JointSettings(
            num_steps=self.steps,
            inner_steps=self.inner_steps,
            max_lag=self.max_lag,
            max_inner_steps=self.max_inner_steps,
            damping_z=self.damping_z,
            damping_mu=self.damping_mu,
            accelerator=accelerator,
            mixing=self.mixing,
            keep=self.keep,
            keep_residual=self.keep_residual,
            last_residual=self.failure_residual,
        )


@ATTACKS.register("joint-pgd")
class JointPGD(Attack[JointPGDConfig]):
    name = "joint-pgd"
    summary = "PGD inside the augmented fixed-point iteration (JIIO)"
    config_type = JointPGDConfig

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
        settings = config.settings()
        record.plan(config.steps)
        result = self._ascend(model, x, objective, start, settings, _watcher(record, config.steps))
        diagnostics = {"perturbation_steps": float(result.num_moves.float().mean())}
        if not config.has_fallback:
            record(config.steps, result.variable, result.loss)
            return Proposal(result.variable, result.loss, result.z, result.mu, diagnostics)
        failed = ~(result.residual <= config.failure_residual)
        longer = replace(settings, num_steps=RUNG_STEPS * config.steps)
        rungs = {
            "damped": replace(longer, damping_z=0.5, damping_mu=0.5, accelerator=None),
            "accelerated": replace(longer, accelerator=Anderson(), mixing=Mixing.STATE, inner_steps=None),
        }
        for rung, changed in rungs.items():
            index = failed.nonzero()[:, 0]
            diagnostics[f"num_{rung}"] = float(len(index))
            if len(index) == 0:
                continue
            again = self._ascend(model, x[index], objective.select(index), start[index], changed, None)
            record.meter.count_steps(changed.num_steps * len(index))
            result = _merge(_without_lost_claims(result, failed, config.keep), index, again)
            failed = ~(result.residual <= config.failure_residual)
        index = failed.nonzero()[:, 0]
        diagnostics["num_full_solve"] = float(len(index))
        if len(index):
            full = SequentialPGD(self.threat, SequentialPGDConfig(steps=20, objective=config.objective, tolerance=1e-3))
            picked = None if targets is None else targets[index]
            last = full.run(model, x[index], y[index], picked, start[index], _silent(record))
            again = JointResult(last.delta, last.loss, last.z, last.mu, result.residual[index], result.num_moves[index])
            result = _merge(_without_lost_claims(result, failed, config.keep), index, again)
        record(config.steps, result.variable, result.loss)
        return Proposal(result.variable, result.loss, result.z, result.mu, diagnostics)

    def _ascend(
        self,
        model: EquilibriumModel,
        x: Tensor,
        objective: Objective,
        start: Tensor,
        settings: JointSettings,
        watch: Watcher | None,
    ) -> JointResult:
        with torch.no_grad():
            u = model.inject(x + start)
            z = model.initial_state(u)
            if self.config.warmup_steps:
                warmup = Solve(
                    Picard(settings.damping_z), rtol=self.config.warmup_tolerance, max_steps=self.config.warmup_steps
                )
                solution = warmup(CellMap(model.evaluate, u), z)
                model.report(solution)
                z = solution.value
        augmented = AugmentedMap(model, lambda delta: model.inject(x + delta), objective)
        ascent = ProjectedAscent(self.threat, x, self.config.step_size, self.config.schedule, self.config.momentum)
        starts_at_loss = self.config.adjoint_start is AdjointStart.LOSS
        mu = augmented.loss_gradient(z) if starts_at_loss else torch.zeros_like(z)
        return ascend(augmented, ascent, settings, z, mu, start, watch)


def _without_lost_claims(result: JointResult, failed: Tensor, keep: Keep) -> JointResult:
    """`result` without the losses of failed rows, which mean nothing; `Keep.LOSS` has kept trusted ones only."""
    if keep is Keep.LOSS:
        return result
    return result._replace(loss=result.loss.masked_fill(failed, -torch.inf))


def _merge(result: JointResult, index: Tensor, again: JointResult) -> JointResult:
    """`result` with the rows `index` run again: all is the rerun's, but the better perturbation stays."""
    wins = ~(result.loss[index] > again.loss)
    variable = torch.where(per_sample(wins, again.variable), again.variable, result.variable[index])
    again = again._replace(variable=variable, loss=torch.where(wins, again.loss, result.loss[index]))
    return JointResult(*(whole.index_copy(0, index, rows) for whole, rows in zip(result, again, strict=True)))


def _watcher(record: Recorder, num_steps: int) -> Watcher:
    """Counts every step, and hands all but the last to the recorder; the ladder may still change what that returns."""

    def watch(step: int, delta: Tensor, loss: Tensor, residual: Tensor) -> None:
        if step:  # at 0 nothing has been done yet
            record.meter.count_steps(len(delta))
        record.follow(residual)
        if step < num_steps:
            record(step, delta, loss)

    return watch


def _silent(record: Recorder) -> Recorder:
    """A recorder of the same run that takes no snapshots."""
    return Recorder(record.meter, record.threat, record.x, 0)

"""One batch: clean verdict -> attack (metered) -> adversarial verdict -> verdicts of the snapshots -> `Part`. The first
batch of a run may end with the sanity panel.

A part is plain data, so that batches may be attacked anywhere and joined later (`evaluate.summary`). An attack has
failed on a sample when its perturbation was not finite, or when the image that it returned lies outside the threat's
ball: attacks project, but no attack is trusted with that.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from robustbench_deq.data import Split
from robustbench_deq.equilibrium import EquilibriumModel, check_labels
from robustbench_deq.errors import RunError, UsageError, kind_of
from robustbench_deq.evaluate.batch_judge import BatchJudge
from robustbench_deq.evaluate.clean import CleanBatch, judge_clean
from robustbench_deq.evaluate.judge import Verdict
from robustbench_deq.evaluate.panel import probe
from robustbench_deq.inputs import as_ids, as_labels
from robustbench_deq.protocol import BATCH_SIZE, SEED, Attack, AttackResult, RunConfig, frozen
from robustbench_deq.records.record import CostRecord, CurvePoint, StageRecord
from robustbench_deq.shown import briefly_shown

Watch = Callable[[str, float], None]
"""Told the stage that a batch is in, and what share of that is done."""


@briefly_shown
@dataclass(frozen=True)
class Part:
    """What one batch gave: per-sample rows, its cost, its curve, the mean residuals, the attack's diagnostics, and what
    the sanity panel measured; None: it did not look at this batch."""

    samples: pd.DataFrame
    cost: CostRecord
    curve: list[CurvePoint]
    residuals: list[float]
    diagnostics: dict[str, float]
    stages: list[StageRecord] = field(default_factory=list)
    probes: dict[str, float] | None = None


class Task(RunConfig):
    """What is done to every batch, and what the record says of it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    attack: Attack[Any]
    model_name: str = Field("own", description="of the model, in tables")
    label: str | None = Field(None, description="display name of the attack; its registry name when null")
    batch_size: int = Field(128, ge=1, description="samples attacked at a time")
    is_targeted: bool = Field(False, description="the class to be reached is the one after the true class")
    has_panel: bool = Field(False, description="the sanity panel looks at the first batch")
    model_sha256: str | None = None
    file_sha256: str | None = None

    @property
    def is_standard(self) -> bool:
        """Whether it is a standard evaluation, in all that is fixed of it."""
        return self.attack.version is not None and (self.batch_size, self.seed) == (BATCH_SIZE, SEED)


def check_split(data: object) -> None:
    """Raise `UsageError` for anything but a `Split`."""
    if not isinstance(data, Split):
        fix = 'pass for example load("digits", limit=256)'
        raise UsageError.of("data", expected="a Split", got=kind_of(data), fix=fix)


def check_data(model: EquilibriumModel, data: Split, needs_gradient: bool = False) -> None:
    """Raise `UsageError` unless `data` fits the model, the labels of its source that were not chosen too, and the model
    returns what it should on it (`EquilibriumModel.check_parts`) and, where that is needed, gives a gradient."""
    model.check_images(data.x)
    check_labels(data.y, len(data), model.num_classes)
    as_ids(data.sample_ids, len(data))
    place = next(itertools.chain(model.parameters(), model.buffers()), data.x)
    (model.check_gradient if needs_gradient else model.check_parts)(data.x[:2].to(place.device))
    if data.largest_label >= model.num_classes:
        raise UsageError.of(
            f"labels of {data.name}",
            expected=f"classes 0 to {model.num_classes - 1}",
            got=f"{data.largest_label} beyond the chosen samples",
            fix="choose a model with that many classes, or correct the labels",
        )


def batch_of(data: Split, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and classes of a range of samples, as attacks and judge take them: clipped to [0, 1] and int64."""
    x = data.x[rows].to(device).clamp(0.0, 1.0).contiguous()
    return x, as_labels(data.y[rows], len(x)).to(device, copy=True)


def evaluate_batch(
    model: EquilibriumModel,
    task: Task,
    data: Split,
    rows: slice,
    device: torch.device,
    clean: CleanBatch | None = None,
    watch: Watch | None = None,
) -> tuple[Part, Tensor]:
    """Attack and judge one batch, and have the panel look at the first; its part, and its perturbed images on the CPU.

    Args:
        clean: what the judge has found on the clean images of this batch, if it has; it gains what the attack asks for.
        watch: told how far the batch is.
    """
    watch = watch or (lambda stage, share: None)
    watch("clean equilibria", 0.0)
    x, y = batch_of(data, rows, device)
    targets = (y + 1) % model.num_classes if task.is_targeted else None
    sample_ids = as_ids(data.sample_ids[rows], len(x))
    clean = clean or judge_clean(model, x, y)
    with frozen(model):
        known = clean.known(model, x, task.attack.first_objective(y, targets))
    batch_judge = BatchJudge(model, x, y, clean.verdict)
    result = task.attack(
        model,
        x,
        y,
        targets=targets,
        sample_ids=sample_ids,
        seed=task.seed,
        num_snapshots=0 if task.attack.version else task.num_snapshots,  # it has stages instead
        clean=known,
        confirm=batch_judge.confirm,
        progress=lambda share, stage: watch(f"attack: {stage}" if stage else "attack", share),
    )
    watch("judge", 0.0)
    adversarial = batch_judge.final(result.x_adv)
    watch("judge", 0.5)
    num_unbroken = batch_judge.num_unbroken([snapshot.delta for snapshot in result.snapshots], adversarial)
    curve = [
        CurvePoint(
            step=snapshot.step,
            cell_evals=snapshot.cell_evals,
            cell_vjps=snapshot.cell_vjps,
            solver_steps=snapshot.solver_steps,
            wall_seconds=snapshot.wall_seconds,
            robust_accuracy=float((num_unbroken > number).double().mean()),
        )
        for number, snapshot in enumerate(result.snapshots)
    ]
    perturbation = task.attack.threat.norm.size(result.x_adv - x)
    is_failed = result.is_failed | ~task.attack.threat.allows(perturbation)
    samples = sample_rows(sample_ids, y, clean.verdict, adversarial, perturbation, result.is_attacked, is_failed)
    if result.stage_of is not None:
        names = np.array([*(stage.name for stage in result.stages), ""], dtype=object)
        samples["broken_by"] = names[result.stage_of.cpu().numpy()]
    if result.is_certified is not None:
        is_certified = result.is_certified.cpu() & clean.verdict.is_correct
        is_broken = is_certified & adversarial.is_converged & ~adversarial.is_correct
        if bool(is_broken.any()):
            raise RunError(
                f"{int(is_broken.sum())} certified samples are broken, the first with id "
                f"{int(sample_ids[is_broken.to(sample_ids.device)][0])}: the model's certificate does not hold"
            )
        samples["is_certified"] = is_certified.numpy() & samples["is_robust"].to_numpy()
    judge_seconds = clean.seconds + batch_judge.seconds
    cost = CostRecord(**dataclasses.asdict(result.cost), judge_seconds=judge_seconds)
    probes = None
    if (task.has_panel or task.attack.version is not None) and rows.start == 0:
        watch("panel", 0.0)
        left = None if task.is_targeted else torch.from_numpy(samples["is_robust"].to_numpy(copy=True))
        probes = probe(model, task.attack.threat, x, y, sample_ids, task.seed, clean, left)
    stages, residuals = _stage_records(result), list(result.residuals)
    return Part(samples, cost, curve, residuals, result.diagnostics, stages, probes), result.x_adv.cpu()


def _stage_records(result: AttackResult) -> list[StageRecord]:
    return [
        StageRecord(
            name=stage.name,
            num_attacked=stage.num_attacked,
            num_broken=stage.num_broken,
            cell_evals=stage.cost.cell_evals,
            cell_vjps=stage.cost.cell_vjps,
            wall_seconds=stage.cost.wall_seconds,
        )
        for stage in result.stages
    ]


def sample_rows(
    sample_ids: Tensor,
    y: Tensor,
    clean: Verdict,
    adversarial: Verdict,
    perturbation: Tensor,
    is_attacked: Tensor,
    is_failed: Tensor,
) -> pd.DataFrame:
    """The rows of a batch, a tensor a column, all `(batch,)`; see `SAMPLE_COLUMNS`."""
    columns = {
        "sample_id": sample_ids,
        "label": y,
        "clean_prediction": clean.prediction,
        "clean_loss": clean.loss,
        "clean_residual": clean.residual,
        "adversarial_prediction": adversarial.prediction,
        "adversarial_loss": adversarial.loss,
        "adversarial_residual": adversarial.residual,
        "perturbation": perturbation,
        "is_clean_correct": clean.is_correct,
        "is_attacked": is_attacked,
        "is_converged": clean.is_converged & adversarial.is_converged,
        "is_readable": clean.is_readable & adversarial.is_readable,
        "is_failed": is_failed,
        "is_robust": clean.is_correct & adversarial.is_correct & ~is_failed.cpu(),
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

"""All batches of a run to one record and its per-sample rows.

Robust accuracy is over all samples. A sample that is misclassified, unconverged or without finite logits (at the clean
or the perturbed image) or failed is not robust. The interval is Wilson's at 95 %.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from robustbench_deq.evaluate.batch import Part, Task
from robustbench_deq.evaluate.judge import MAX_STEPS
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.records.record import (
    SCHEMA_VERSION,
    CostRecord,
    CurvePoint,
    DataRecord,
    Record,
    StageRecord,
    ThreatRecord,
)


def summarise(
    parts: Sequence[Part], task: Task, data: DataRecord, environment: dict[str, Any]
) -> tuple[Record, pd.DataFrame]:
    """One record, and its per-sample rows, from the parts of all batches in their order."""
    samples = pd.concat([part.samples for part in parts], ignore_index=True)
    count, attack, label = len(samples), task.attack, task.label or task.attack.name
    losses = samples.loc[samples["is_attacked"], "adversarial_loss"].to_numpy(dtype=np.float64)
    losses = losses[np.isfinite(losses)]
    config = attack.config.model_dump(mode="json") | {"targeted": task.is_targeted}
    threat = ThreatRecord(norm=attack.threat.norm.name, epsilon=attack.threat.epsilon)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    names = (task.model_name, task.model_sha256 or task.file_sha256, attack.name, label)
    diagnostics = _sum_diagnostics(parts, count)
    marks = {name: int(diagnostics.pop(name)) for name in ("num_lagging", "num_zero_gradient") if name in diagnostics}
    num_finished = diagnostics.get("num_finished")
    finished_by = None  # of a cascade, many have
    if num_finished is not None and attack.version is None:
        finished_by = "sequential" if num_finished else "joint"
    has_readable = all("is_readable" in part.samples for part in parts)  # shards of an earlier version have not
    is_readable = samples["is_readable"].astype(bool) if has_readable else None
    key = json.dumps([*names, config, threat.model_dump(), data.digest, task.seed, created], sort_keys=True)
    record = Record(
        schema_version=SCHEMA_VERSION,
        record_id=hashlib.sha256(key.encode()).hexdigest()[:16],
        created=created,
        model=task.model_name,
        model_sha256=task.model_sha256,
        file_sha256=task.file_sha256,
        attack=attack.name,
        label=label,
        attack_config=config,
        threat=threat,
        data=data,
        clean_accuracy=float(samples["is_clean_correct"].mean()),
        robust_accuracy=float(samples["is_robust"].mean()),
        robust_accuracy_ci=wilson_interval(int(samples["is_robust"].sum()), count),
        adversarial_loss=float(losses.mean()) if len(losses) else None,
        num_unconverged=int((~samples["is_converged"]).sum()),
        num_failed=int(samples["is_failed"].sum()),
        num_nonfinite=None if is_readable is None else int((~is_readable).sum()),
        num_attacked=int(samples["is_attacked"].sum()),
        judge_max_steps=MAX_STEPS,
        **marks,
        finished_by=finished_by,
        max_perturbation=float(samples["perturbation"].max()),
        cost=_mean_cost(parts, count),
        curve=_curve(parts, count),
        residuals=_mean_residuals(parts),
        diagnostics=diagnostics,
        protocol=f"{attack.version} {attack.name}" if task.is_standard else None,
        stages=None if attack.version is None else _stages(parts, count),
        num_certified=int(samples["is_certified"].sum()) if "is_certified" in samples else None,
        probes=next((part.probes for part in parts if part.probes is not None), None),
        seed=task.seed,
        batch_size=task.batch_size,
        environment=environment,
    )
    return record, samples


def _mean_cost(parts: Sequence[Part], count: int) -> CostRecord:
    """Means per sample; seconds are summed over the parts, memory is the largest."""

    def mean(name: str) -> float:
        return sum(getattr(part.cost, name) * len(part.samples) for part in parts) / count

    return CostRecord(
        cell_evals=mean("cell_evals"),
        cell_vjps=mean("cell_vjps"),
        solver_steps=mean("solver_steps"),
        wall_seconds=sum(part.cost.wall_seconds for part in parts),
        peak_memory_mb=max(part.cost.peak_memory_mb for part in parts),
        judge_seconds=sum(part.cost.judge_seconds or 0.0 for part in parts),
    )


def _stages(parts: Sequence[Part], count: int) -> list[StageRecord]:
    """Counts and seconds add up over the parts, which have the same stages; evaluations and VJPs are means."""

    def mean(number: int, name: str) -> float:
        return sum(getattr(part.stages[number], name) * len(part.samples) for part in parts) / count

    return [
        StageRecord(
            name=stage.name,
            num_attacked=sum(part.stages[number].num_attacked for part in parts),
            num_broken=sum(part.stages[number].num_broken for part in parts),
            cell_evals=mean(number, "cell_evals"),
            cell_vjps=mean(number, "cell_vjps"),
            wall_seconds=sum(part.stages[number].wall_seconds for part in parts),
        )
        for number, stage in enumerate(parts[0].stages)
    ]


def _curve(parts: Sequence[Part], count: int) -> list[CurvePoint]:
    """Accuracy and cost at each snapshot, over all parts; one that a budget ended before stays as it ended."""
    rows, ends = [len(part.samples) for part in parts], [_end(part) for part in parts]
    points = []
    for number in range(max(len(part.curve) for part in parts)):
        taken = [part.curve[number] if number < len(part.curve) else end for part, end in zip(parts, ends, strict=True)]

        def mean(name: str, taken: Sequence[CurvePoint] = taken) -> float:
            return sum(getattr(point, name) * n for point, n in zip(taken, rows, strict=True)) / count

        points.append(
            CurvePoint(
                step=max(point.step for point in taken),
                cell_evals=mean("cell_evals"),
                cell_vjps=mean("cell_vjps"),
                # Shards of an earlier version have none.
                solver_steps=None if any(point.solver_steps is None for point in taken) else mean("solver_steps"),
                wall_seconds=sum(point.wall_seconds for point in taken),
                robust_accuracy=mean("robust_accuracy"),
            )
        )
    return points


def _end(part: Part) -> CurvePoint:
    """How a part ended, as a point of the curve before its first step."""
    return CurvePoint(
        step=0,
        robust_accuracy=float(part.samples["is_robust"].mean()),
        **part.cost.model_dump(include={"cell_evals", "cell_vjps", "solver_steps", "wall_seconds"}),
    )


def _mean_residuals(parts: Sequence[Part]) -> list[float]:
    """Mean over the parts, step by step; a part that needed fewer steps counts until its end."""
    longest = max(len(part.residuals) for part in parts)
    table = np.full((len(parts), longest), np.nan)
    for row, part in enumerate(parts):
        table[row, : len(part.residuals)] = part.residuals
    weights = np.where(np.isfinite(table), [[len(part.samples)] for part in parts], 0)
    sums = (np.nan_to_num(table) * weights).sum(0)
    return [float(value) for value in sums[weights.sum(0) > 0] / weights.sum(0)[weights.sum(0) > 0]]


def _sum_diagnostics(parts: Sequence[Part], count: int) -> dict[str, float]:
    """Names that begin with `num_` or `unconverged_` are counts and add up; the rest are means per sample."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.diagnostics.items():
            is_count = name.startswith(("num_", "unconverged_"))
            total[name] = total.get(name, 0.0) + (value if is_count else value * len(part.samples) / count)
    return total

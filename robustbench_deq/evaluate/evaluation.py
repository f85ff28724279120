"""Evaluate a model under an attack: attack batch by batch, stop the clock, judge, and make one record.

    a batch: clean verdict -> attack (metered) -> adversarial verdict -> verdicts of the snapshots -> `Part`
    all parts -> `summarise` -> record and per-sample rows

A part is plain data, so that batches may be attacked anywhere and joined later. Robust accuracy is over all samples. A
sample that is misclassified, unconverged or without finite logits (at the clean or the perturbed image) or failed is
not robust. An attack has failed on a sample when its perturbation was not finite, or when the image that it returned
lies outside the threat's ball: attacks project, but no attack is trusted with that. The interval is Wilson's at 95 %.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from robustbench_deq.configs import validate
from robustbench_deq.data import Split
from robustbench_deq.devices import choose_device
from robustbench_deq.equilibrium import EquilibriumModel, check_labels, check_model
from robustbench_deq.errors import UsageError, kind_of
from robustbench_deq.evaluate.clean import CleanBatch, judge_clean
from robustbench_deq.evaluate.judge import LADDER, MAX_STEPS, Verdict, judge
from robustbench_deq.inputs import as_ids, as_labels
from robustbench_deq.memory import release_freed_memory
from robustbench_deq.models import Origin, origin_of
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.protocol import Attack, RunConfig, frozen
from robustbench_deq.records.environment import describe_environment
from robustbench_deq.records.record import SCHEMA_VERSION, CostRecord, CurvePoint, DataRecord, Record, ThreatRecord
from robustbench_deq.shown import briefly_shown
from robustbench_deq.solvers import Solve

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far an evaluation is.

    done             samples, of the batch in progress the share of its time that has passed
    total            samples
    robust_accuracy  of the batches that are done; None before the first
    stage            what is done to the batch in progress: "clean equilibria", "attack" or "judge"; "" between batches
    """

    done: float
    total: int
    robust_accuracy: float | None
    stage: str


Watch = Callable[[str, float], None]
"""Told the stage that a batch is in, and what share of that is done."""


@briefly_shown
class Evaluation(NamedTuple):
    """A record, its per-sample rows, and the perturbed images `(n, channels, height, width)` on the CPU."""

    record: Record
    samples: pd.DataFrame
    x_adv: Tensor


@briefly_shown
@dataclass(frozen=True)
class Part:
    """What one batch gave: per-sample rows, its cost, its curve, the mean residuals, and the attack's diagnostics."""

    samples: pd.DataFrame
    cost: CostRecord
    curve: list[CurvePoint]
    residuals: list[float]
    diagnostics: dict[str, float]


class Task(RunConfig):
    """What is done to every batch, and what the record says of it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    attack: Attack[Any]
    model_name: str = Field("own", description="of the model, in tables")
    label: str | None = Field(None, description="display name of the attack; its registry name when null")
    batch_size: int = Field(128, ge=1, description="samples attacked at a time")
    is_targeted: bool = Field(False, description="the class to be reached is the one after the true class")
    model_sha256: str | None = None
    file_sha256: str | None = None


def evaluate(
    model: EquilibriumModel,
    attack: Attack[Any],
    data: Split,
    *,
    label: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    is_targeted: bool = False,
    num_snapshots: int = 0,
    device: torch.device | str | None = None,
    model_name: str | os.PathLike[str] | None = None,
    model_sha256: str | None = None,
    file_sha256: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Attack and judge every sample of `data`, with `model` in evaluation mode and moved to `device`, where it stays.

    All arguments are checked before the first batch. Within `torch.inference_mode` too.

    Args:
        attack: such as `JointPGD(Threat("l2", 0.5))`.
        data: such as `load("digits", limit=256)`.
        label: display name of the attack; None is its registry name.
        batch_size: samples attacked at a time.
        seed: of all randomness, which is keyed by the samples' ids too; an integer >= 0.
        is_targeted: the class to be reached is the one after the true class.
        num_snapshots: points of the accuracy-against-cost curve.
        device: `cpu`, `cuda` or `cuda:N`; None is the CPU.
        model_name, model_sha256, file_sha256: what the record calls the model, and the digest of its weights or its
            file. None is what `load_model` loaded, as long as the weights are still those, else "own" and no digest.
        progress: called after each batch and, more often, within.

    Returns:
        The record, its per-sample rows and the perturbed images.

    Raises:
        UsageError: for an argument of another kind, an object that is not an `EquilibriumModel`, data that does not
            fit it, or what the attack refuses.
    """
    check_model(model)
    if not isinstance(attack, Attack):
        fix = 'pass for example JointPGD(Threat("l2", 0.5))'
        raise UsageError.of("attack", expected="an attack", got=kind_of(attack), fix=fix)
    if not isinstance(data, Split):
        fix = 'pass for example load("digits", limit=256)'
        raise UsageError.of("data", expected="a Split", got=kind_of(data), fix=fix)
    if progress is not None and not callable(progress):
        fix = "pass what is called with a Progress"
        raise UsageError.of("progress", expected="a function", got=kind_of(progress), fix=fix)
    origin = origin_of(model) or Origin("own")
    given = {
        "attack": attack,
        "label": label,
        "batch_size": batch_size,
        "seed": seed,
        "is_targeted": is_targeted,
        "num_snapshots": num_snapshots,
        "model_name": origin.name if model_name is None else model_name,
        "model_sha256": origin.model_sha256 if model_sha256 is None else model_sha256,
        "file_sha256": origin.file_sha256 if file_sha256 is None else file_sha256,
    }
    task, place = validate(Task, given, "evaluate"), choose_device("cpu" if device is None else device)
    with torch.inference_mode(False):
        return _evaluate(model.to(place).eval(), task, data, place, progress)


def _evaluate(
    model: EquilibriumModel,
    task: Task,
    data: Split,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
) -> Evaluation:
    check_data(model, data)
    if doubt := task.attack.threat.doubt(data.x[0].numel()):
        logger.warning(doubt)
    source = {"name": data.name, "split": getattr(data.split, "value", data.split), "digest": data.digest}
    described = validate(DataRecord, {**source, "num_samples": len(data)}, "data")
    parts, images, num_robust = [], [], 0
    release_freed_memory()
    for begin in range(0, len(data), task.batch_size):
        end = min(begin + task.batch_size, len(data))
        accuracy = num_robust / begin if begin else None
        watch = None if progress is None else _watch(progress, begin, end, len(data), accuracy, _attack_share(parts))
        part, x_adv = evaluate_batch(model, task, data, slice(begin, end), device, watch=watch)
        parts.append(part)
        images.append(x_adv)
        num_robust += int(part.samples["is_robust"].sum())
        if progress is not None:
            progress(Progress(end, len(data), num_robust / end, ""))
    record, samples = summarise(parts, task, described, describe_environment(device))
    return Evaluation(record, samples, torch.cat(images))


def _attack_share(parts: Sequence[Part]) -> float:
    """The share of the time that the attack has taken so far; half before anything is known."""
    attack = sum(part.cost.wall_seconds for part in parts)
    whole = attack + sum(part.cost.judge_seconds or 0.0 for part in parts)
    return attack / whole if whole else 0.5


def _watch(
    progress: Callable[[Progress], None], begin: int, end: int, total: int, accuracy: float | None, attack: float
) -> Watch:
    """Places the stages of a batch between its first and last sample, as long as they are expected to take."""
    places = {"clean equilibria": (0.0, (1 - attack) / 2), "attack": ((1 - attack) / 2, attack)}
    furthest = 0.0  # a restart begins its steps again

    def watch(stage: str, share: float) -> None:
        nonlocal furthest
        start, length = places.get(stage, ((1 + attack) / 2, (1 - attack) / 2))
        furthest = max(furthest, start + length * share)
        progress(Progress(begin + (end - begin) * furthest, total, accuracy, stage))

    return watch


def check_data(model: EquilibriumModel, data: Split) -> None:
    """Raise `UsageError` unless `data` fits the model, the labels of its source that were not chosen too, and the model
    returns what it should on it (`EquilibriumModel.check_parts`)."""
    model.check_images(data.x)
    check_labels(data.y, len(data), model.num_classes)
    as_ids(data.sample_ids, len(data))
    place = next(itertools.chain(model.parameters(), model.buffers()), data.x)
    model.check_parts(data.x[:2].to(place.device))
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
    """Attack and judge one batch; its part, and its perturbed images on the CPU.

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
    bench = _Bench(model, x, y, clean.verdict)
    result = task.attack(
        model,
        x,
        y,
        targets=targets,
        sample_ids=sample_ids,
        seed=task.seed,
        num_snapshots=task.num_snapshots,
        clean=known,
        confirm=bench.confirm,
        progress=lambda share: watch("attack", share),
    )
    watch("judge", 0.0)
    adversarial = bench.final(result.x_adv)
    watch("judge", 0.5)
    num_unbroken = bench.num_unbroken([snapshot.delta for snapshot in result.snapshots], adversarial)
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
    is_failed = (result.is_failed | ~task.attack.threat.allows(perturbation)).cpu()
    samples = pd.DataFrame(
        {
            "sample_id": sample_ids.cpu().numpy(),
            "label": y.cpu().numpy(),
            "clean_prediction": clean.verdict.prediction.numpy(),
            "clean_loss": clean.verdict.loss.numpy(),
            "clean_residual": clean.verdict.residual.numpy(),
            "adversarial_prediction": adversarial.prediction.numpy(),
            "adversarial_loss": adversarial.loss.numpy(),
            "adversarial_residual": adversarial.residual.numpy(),
            "perturbation": perturbation.cpu().numpy(),
            "is_clean_correct": clean.verdict.is_correct.numpy(),
            "is_attacked": result.is_attacked.cpu().numpy(),
            "is_converged": (clean.verdict.is_converged & adversarial.is_converged).numpy(),
            "is_readable": (clean.verdict.is_readable & adversarial.is_readable).numpy(),
            "is_failed": is_failed.numpy(),
            "is_robust": (clean.verdict.is_correct & adversarial.is_correct & ~is_failed).numpy(),
        }
    )
    judge_seconds = clean.seconds + bench.seconds
    cost = CostRecord(**dataclasses.asdict(result.cost), judge_seconds=judge_seconds)
    return Part(samples, cost, curve, list(result.residuals), result.diagnostics), result.x_adv.cpu()


class _Bench:
    """The judge of one batch, and the seconds it took. It judges no image twice.

    A sample that is wrong or without an equilibrium at its clean image is not robust whatever comes: no snapshot of it
    is judged, and where there was no equilibrium, only the first solver looks for one at the end.
    """

    def __init__(self, model: EquilibriumModel, x: Tensor, y: Tensor, clean: Verdict) -> None:
        self.model, self.x, self.y, self.clean, self.seconds = model, x, y, clean, 0.0
        self._known = [(x, clean)]

    def confirm(self, rows: Tensor, images: Tensor) -> Tensor:
        """Which of `images`, of the samples `rows`, are not classified correctly."""
        verdict = self._judged(rows, images, self.clean, LADDER)
        self._known.append((self.x.index_copy(0, rows, images), verdict))
        return ~verdict.is_correct[rows.cpu()]

    def final(self, images: Tensor) -> Verdict:
        """The verdict on the images of the whole batch that the attack returns."""
        found, missing = self._recalled(images)
        has_clean = self.clean.is_converged[missing.cpu()].to(missing.device)
        for rows, ladder in ((missing[has_clean], LADDER), (missing[~has_clean], LADDER[:1])):
            found = self._judged(rows, images[rows], found, ladder)
        self._known.append((images, found))
        return found

    def num_unbroken(self, deltas: Sequence[Tensor], final: Verdict) -> Tensor:
        """How many of the perturbations `deltas`, from the first, leave each sample robust, `(batch,)`.

        What is robust at the end counts as robust before, and what is broken as broken from then on. The first
        perturbation that breaks a sample is found by bisection, with the first solver alone.
        """
        end = len(deltas)
        is_robust = self.clean.is_correct & final.is_correct
        first = torch.where(is_robust, end, 0)  # no earlier than this, and no later than the last
        last = torch.where(self.clean.is_correct, end, 0)
        while bool((is_open := first < last).any()):
            middle, images = (first + last) // 2, self.x.clone()
            for number, delta in enumerate(deltas):
                rows = (is_open & (middle == number)).nonzero()[:, 0].to(images.device)
                images[rows] = (self.x[rows] + delta[rows]).clamp_(0, 1)
            found, missing = self._recalled(images)
            found = self._judged(missing, images[missing], found, LADDER[:1])
            self._known.append((images, found))
            last = torch.where(is_open & ~found.is_correct, middle, last)
            first = torch.where(is_open & found.is_correct, middle + 1, first)
        return first

    def _recalled(self, images: Tensor) -> tuple[Verdict, Tensor]:
        """Verdicts on those of `images`, of the whole batch, that have been judged, and the rows of the others."""
        found, is_known = self.clean, torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for others, verdict in self._known:
            is_same = (images == others).flatten(1).all(1) & ~is_known
            rows = is_same.nonzero()[:, 0].cpu()
            found, is_known = found.put(rows, verdict.take(rows)), is_known | is_same
        return found, (~is_known).nonzero()[:, 0]

    def _judged(self, rows: Tensor, images: Tensor, found: Verdict, ladder: Sequence[Solve]) -> Verdict:
        if len(rows) == 0:
            return found
        start = time.perf_counter()
        verdict = judge(self.model, images, self.y[rows], ladder)  # hands over on the CPU, so the device is done
        self.seconds += time.perf_counter() - start
        return found.put(rows.cpu(), verdict)


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
        finished_by=None if num_finished is None else "sequential" if num_finished else "joint",
        max_perturbation=float(samples["perturbation"].max()),
        cost=_mean_cost(parts, count),
        curve=_curve(parts, count),
        residuals=_mean_residuals(parts),
        diagnostics=diagnostics,
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

"""Evaluate a model under an attack: attack and judge it batch by batch, and make one record."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from robustbench_deq.configs import validate
from robustbench_deq.data import Split
from robustbench_deq.devices import choose_device
from robustbench_deq.equilibrium import EquilibriumModel, check_model
from robustbench_deq.errors import UsageError, kind_of
from robustbench_deq.evaluate.batch import Part, Task, Watch, check_data, check_split, evaluate_batch
from robustbench_deq.evaluate.summary import summarise
from robustbench_deq.memory import release_freed_memory
from robustbench_deq.models import Origin, origin_of
from robustbench_deq.protocol import Attack
from robustbench_deq.records.environment import describe_environment
from robustbench_deq.records.record import DataRecord, Record
from robustbench_deq.shown import briefly_shown

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far an evaluation is.

    done             samples, of the batch in progress the share of its time that has passed
    total            samples
    robust_accuracy  of the batches that are done; None before the first
    stage            what is done to the batch in progress: "clean equilibria", "attack" (of a cascade with its stage,
                     "attack: toward"), "judge" or "panel"; "" between batches
    """

    done: float
    total: int
    robust_accuracy: float | None
    stage: str


@briefly_shown
class Evaluation(NamedTuple):
    """A record, its per-sample rows, and the perturbed images `(n, channels, height, width)` on the CPU."""

    record: Record
    samples: pd.DataFrame
    x_adv: Tensor


def evaluate(
    model: EquilibriumModel,
    attack: Attack[Any],
    data: Split,
    *,
    label: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    is_targeted: bool = False,
    has_panel: bool = False,
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
        has_panel: the sanity panel looks at the first images, for `records.flags`.
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
    check_split(data)
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
        "has_panel": has_panel,
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
    check_data(model, data, task.attack.is_gradient_based)
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
        start, length = places.get(stage.partition(":")[0], ((1 + attack) / 2, (1 - attack) / 2))
        furthest = max(furthest, start + length * share)
        progress(Progress(begin + (end - begin) * furthest, total, accuracy, stage))

    return watch

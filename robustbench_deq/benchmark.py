"""The standard evaluation in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import torch

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.attacks.standard import AUDIT
from robustbench_deq.data import Split, SplitName, load, split_sizes
from robustbench_deq.equilibrium import EquilibriumModel, check_model
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import Evaluation, Progress, evaluate
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import BATCH_SIZE, SEED
from robustbench_deq.records.record import Record
from robustbench_deq.registry import choice
from robustbench_deq.threats import Threat

VERSIONS = ("fast", "standard")
DEFAULT_LIMIT = 256


def benchmark(
    model: EquilibriumModel | str,
    data: Split | str,
    norm: Norm | str,
    epsilon: float | str,
    *,
    version: Literal["fast", "standard"] = "standard",
    limit: int | None = None,
    device: torch.device | str | None = None,
    model_name: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """The robust accuracy of `model` by a fixed sequence of attacks, each judged; see `docs/standard.md`.

    Where the audit without gradients breaks what gradients have left, it is done again, and audits all survivors.

    Args:
        model: an `EquilibriumModel`, or what `load_model` takes.
        data: a `Split`, or the name of a dataset or `npz:FILE`, whose test split is used.
        norm, epsilon: of the perturbations, in pixel units; `"8/255"` is a radius too.
        version: `fast` is the joint stages alone.
        limit: samples, the first of the test split; None is 256 or all, if they are fewer.
        device: `cpu`, `cuda` or `cuda:N`; None is the CPU.
        model_name: what the record calls the model.
        progress: called after each batch and, more often, within.

    Returns:
        The record, its per-sample rows and the perturbed images. `record.stages` tells what each stage broke.

    Raises:
        UsageError: for an argument of another kind, and data that does not fit the model.
    """
    if version not in VERSIONS:
        raise UsageError.of(
            "version", expected=choice(str(version), VERSIONS, "a version"), got=repr(version), fix="correct it"
        )
    threat = Threat(norm, epsilon)
    loaded = load_model(model) if isinstance(model, str) else model
    check_model(loaded)
    if not isinstance(data, Split):
        if limit is None:
            limit = min(DEFAULT_LIMIT, split_sizes(str(data), SplitName.TEST)[0])
        data = load(data, SplitName.TEST, limit)
    elif limit is not None:
        raise UsageError.of("limit", expected="None with a Split", got=limit, fix="pass it to load")
    options = {"device": device, "model_name": model_name, "progress": progress, "batch_size": BATCH_SIZE, "seed": SEED}
    result = evaluate(loaded, ATTACKS.get(version)(threat), data, **options)
    if needs_black_box(result.record):
        again = evaluate(loaded, ATTACKS.get(version)(threat, black_box="all"), data, **options)
        result = again._replace(record=with_cost_of(again.record, result.record))
    return result


def with_cost_of(record: Record, before: Record) -> Record:
    """`record` at what both have cost: of the same samples, one after the other."""
    names = ("cell_evals", "cell_vjps", "solver_steps", "wall_seconds")
    both = {name: getattr(record.cost, name) + getattr(before.cost, name) for name in names}
    both["judge_seconds"] = (record.cost.judge_seconds or 0.0) + (before.cost.judge_seconds or 0.0)
    return record.model_copy(update={"cost": record.cost.model_copy(update=both)})


def needs_black_box(record: Record) -> bool:
    """Whether the audit of a standard evaluation has broken what gradients had left, so that all survivors are to be
    attacked without gradients."""
    return any(stage.name == AUDIT and stage.num_broken for stage in record.stages or ())

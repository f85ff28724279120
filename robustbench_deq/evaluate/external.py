"""Images that somebody else's attack made: found among the samples of a data set, checked, judged, recorded.

The record is over all samples that are asked for, as an attack's is, so that it joins those of attacks on the same
samples in the union and on the leaderboard. A sample that the file has no image of, or one outside the threat's ball,
is left as it is: nobody has shown anything of it. So the record's robust accuracy is what these images leave of the
clean one, and `num_attacked` says how many samples they were made for. What they cost is unknown; its fields are 0.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustbench_deq.configs import Config, validate
from robustbench_deq.data import Split
from robustbench_deq.data.sources import as_pixels, read_arrays, to_unit
from robustbench_deq.devices import choose_device
from robustbench_deq.equilibrium import EquilibriumModel, check_model
from robustbench_deq.errors import UsageError, kind_of, shortened
from robustbench_deq.evaluate.batch import Part, Task, batch_of, check_data, sample_rows
from robustbench_deq.evaluate.batch_judge import BatchJudge
from robustbench_deq.evaluate.evaluation import Evaluation, Progress
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.evaluate.summary import summarise
from robustbench_deq.files import sha256_of
from robustbench_deq.inputs import PIXEL_SLACK, as_ids, as_labels, shape_fix
from robustbench_deq.models import Origin, origin_of
from robustbench_deq.protocol import frozen
from robustbench_deq.records.environment import describe_environment
from robustbench_deq.records.record import EXTERNAL, CostRecord, DataRecord
from robustbench_deq.shown import briefly_shown
from robustbench_deq.threats import Threat

logger = logging.getLogger(__name__)

NO_COST = {"cell_evals": 0.0, "cell_vjps": 0.0, "solver_steps": 0.0, "wall_seconds": 0.0, "peak_memory_mb": 0.0}
EXPECTED = "a .npz file with a plain array 'x_adv', and 'sample_ids' or 'x'"


@briefly_shown
@dataclass(frozen=True)
class ExternalImages:
    """Perturbed images, and what says which samples they are of. Arrays, or tensors.

    x_adv       `(n, channels, height, width)`, uint8 or numbers in [0, 1] up to rounding, which is clipped
    sample_ids  positions in the data set `(n,)`, as `Split` and the rows of records have them
    x           the clean images, like `x_adv`: where there are no ids, samples are found by them, else compared
    labels      true classes `(n,)`: compared
    attack      what made them, in words
    file, file_sha256    where they are from
    """

    x_adv: Any
    sample_ids: Any = None
    x: Any = None
    labels: Any = None
    attack: str | None = None
    file: str | None = None
    file_sha256: str | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ExternalImages:
        """From an npz with arrays of these names; nothing is unpickled. Raises `UsageError` for an unusable file."""
        path = Path(path)
        found = read_arrays(path, str(path), EXPECTED, ("x_adv",), ("sample_ids", "x", "labels", "attack"))
        words = found.pop("attack", None)
        if words is not None and (words.shape or words.dtype.kind != "U"):
            got = f"{words.dtype} {words.shape}"
            raise UsageError.of(f"{path}: attack", expected="one text", got=got, fix="leave it out, or save a string")
        about = None if words is None else shortened(" ".join(str(words).split()))
        return cls(**found, attack=about, file=path.name, file_sha256=sha256_of(path))

    def placed(self, data: Split) -> tuple[Tensor, Tensor]:
        """The rows of `data` that the images are of, `(n,)`, and the images as float32.

        Raises:
            UsageError: for images that are none of the data's shape, ids or clean images that are not among the data,
                a sample that comes twice, and clean images or labels that are not those of the data.
        """
        images = self._pixels("x_adv", data)
        clean = None if self.x is None else self._pixels("x", data)
        count = len(images)
        if clean is not None and len(clean) != count:
            raise self._refusal("x", f"{count} clean images", str(len(clean)), "save one for each perturbed image")
        if self.sample_ids is not None:
            rows = self._rows_of_ids(data, count)
        elif clean is not None:
            parts, whole = torch.split(clean.flatten(1).double(), 512), data.x.flatten(1).double()
            rows = torch.cat([torch.cdist(part, whole).argmin(1) for part in parts])
        else:
            raise self._refusal("samples", "'sample_ids' or the clean images 'x'", "neither", "save one of them")
        samples = _words(data)
        if clean is not None:
            apart = (clean - data.x[rows].clamp(0, 1)).abs().flatten(1).amax(1)
            self._check("x", apart <= PIXEL_SLACK, f"clean images of {samples}", "check data, split, limit and order")
        values, counts = torch.unique(rows, return_counts=True)
        if len(values) < count:
            twice = data.sample_ids[values[counts > 1]]
            got = f"several of {len(twice)} samples, such as {int(twice[0])}"
            raise self._refusal("samples", "one image a sample", got, "keep one of each, or make a file for the others")
        if self.labels is not None:
            labels = as_labels(_array(self.labels), count, self._named("labels"))
            self._check(
                "labels", labels == data.y[rows], f"those of {samples}", "check data and order, or leave them out"
            )
        return rows, images

    def _rows_of_ids(self, data: Split, count: int) -> Tensor:
        ids = as_ids(_array(self.sample_ids), count, self._named("sample_ids"))
        known, order = data.sample_ids.sort()
        places = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        fix = "check data and split, raise the limit, or leave them out"
        self._check("sample_ids", known[places] == ids, f"ids of {_words(data)}", fix)
        return order[places]

    def _check(self, name: str, is_good: Tensor, expected: str, fix: str) -> None:
        bad = (~is_good).nonzero()[:, 0]
        if len(bad):
            got = f"{len(bad)} of {len(is_good)} that are not, the first at index {int(bad[0])}"
            raise self._refusal(name, expected, got, fix)

    def _pixels(self, name: str, data: Split) -> Tensor:
        images, shape = _array(getattr(self, name)), tuple(data.x.shape[1:])
        if images.shape[1:] != shape or not len(images):
            expected, fix = f"images (n, {', '.join(map(str, shape))})", shape_fix(images.shape[1:], shape)
            raise self._refusal(name, expected, f"{images.dtype} {images.shape}", fix or "reshape the images")
        return to_unit(as_pixels(images, self._named(name)))

    def _named(self, name: str) -> str:
        return f"{self.file}: {name}" if self.file else name

    def _refusal(self, name: str, expected: str, got: str, fix: str) -> UsageError:
        return UsageError.of(self._named(name), expected=expected, got=got, fix=fix)


def _words(data: Split) -> str:
    return f"the first {len(data)} samples of {data.name} {getattr(data.split, 'value', data.split)}"


def _array(values: Any) -> np.ndarray:
    """An array, or a tensor wherever it is, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


class ExternalConfig(Config):
    """What a record knows of the images that were judged."""

    file: str | None = Field(description="name of the file")
    file_sha256: str | None = Field(description="of the file")
    attack: str | None = Field(description="what made the images, in the file's own words")


class _Made(NamedTuple):
    """Stands where an attack does in a record."""

    name: str
    threat: Threat
    config: ExternalConfig


class _ExternalTask(Task):
    attack: Any = Field(description="what stands where an attack does")


def judge_images(
    model: EquilibriumModel,
    images: ExternalImages | str | os.PathLike[str],
    data: Split,
    threat: Threat,
    *,
    label: str | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    model_name: str | os.PathLike[str] | None = None,
    model_sha256: str | None = None,
    file_sha256: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Judge images that somebody else's attack made, with `model` in evaluation mode and moved to `device`.

    Everything is checked before the first batch. An image outside the ball proves nothing: its sample is left as it
    is, and `diagnostics["num_outside"]` counts it.

    Args:
        images: or the path of an npz, see `ExternalImages.read`.
        data: all samples that the record is over, such as `load("digits", limit=256)`.
        threat: such as `Threat("l2", 0.5)`.
        label: name of the row in reports; None is the file's name, else "external".

    The other arguments and the result are as those of `evaluate`.

    Raises:
        UsageError: for arguments that do not fit each other, and as `ExternalImages.placed`.
    """
    check_model(model)
    if not isinstance(data, Split):
        fix = 'pass for example load("digits", limit=256)'
        raise UsageError.of("data", expected="a Split", got=kind_of(data), fix=fix)
    if not isinstance(threat, Threat):
        fix = 'pass for example Threat("l2", 0.5)'
        raise UsageError.of("threat", expected="a Threat", got=kind_of(threat), fix=fix)
    if not isinstance(images, ExternalImages):
        images = ExternalImages.read(images)
    origin, given = origin_of(model) or Origin("own"), (images.file, images.file_sha256, images.attack)
    config = ExternalConfig(**dict(zip(ExternalConfig.model_fields, given, strict=True)))
    values = {
        "attack": _Made(EXTERNAL, threat, config),
        "label": label or (images.file and Path(images.file).stem),
        "batch_size": batch_size,
        "model_name": origin.name if model_name is None else model_name,
        "model_sha256": origin.model_sha256 if model_sha256 is None else model_sha256,
        "file_sha256": origin.file_sha256 if file_sha256 is None else file_sha256,
    }
    task, place = validate(_ExternalTask, values, "judge_images"), choose_device("cpu" if device is None else device)
    with torch.inference_mode(False):
        check_data(model, data)
        rows, found = images.placed(data)
        if doubt := threat.doubt(data.x[0].numel()):
            logger.warning(doubt)
        return _judge_all(model.to(place).eval(), task, data, rows, found, place, progress)


def _judge_all(
    model: EquilibriumModel,
    task: _ExternalTask,
    data: Split,
    rows: Tensor,
    images: Tensor,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
) -> Evaluation:
    threat: Threat = task.attack.threat
    whole = data.x.clamp(0, 1)
    whole[rows] = images.to(whole)
    sizes = threat.norm.size(whole - data.x.clamp(0, 1))
    is_given = torch.zeros(len(data), dtype=torch.bool).index_fill(0, rows, True)
    is_outside = is_given & ~threat.allows(sizes)
    whole[is_outside], sizes[is_outside] = data.x[is_outside].clamp(0, 1), 0.0
    source = {"name": data.name, "split": getattr(data.split, "value", data.split), "digest": data.digest}
    described = validate(DataRecord, {**source, "num_samples": len(data)}, "data")
    parts, num_robust = [], 0
    for begin in range(0, len(data), task.batch_size):
        batch, start = slice(begin, begin + task.batch_size), time.perf_counter()
        x, y = batch_of(data, batch, device)
        with frozen(model):
            clean = judge(model, x, y)
            adversarial = BatchJudge(model, x, y, clean).final(whole[batch].to(device))
        is_attacked, is_failed = (is_given & ~is_outside)[batch], torch.zeros(len(x), dtype=torch.bool)
        ids = as_ids(data.sample_ids[batch], len(x))
        samples = sample_rows(ids, y, clean, adversarial, sizes[batch], is_attacked, is_failed)
        cost = CostRecord(**NO_COST, judge_seconds=time.perf_counter() - start)
        counts = {"num_given": float(is_given[batch].sum()), "num_outside": float(is_outside[batch].sum())}
        parts.append(Part(samples, cost, [], [], counts))
        num_robust += int(samples["is_robust"].sum())
        if progress is not None:
            end = begin + len(x)
            progress(Progress(end, len(data), num_robust / end, "judge"))
    record, samples = summarise(parts, task, described, describe_environment(device))
    return Evaluation(record, samples, whole)

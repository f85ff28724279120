"""Comparison of two runs: what changed beyond noise.

Records are matched by model, threat, data and the attack's label, the closest first: the same samples, seed and
settings. Where the samples' digests agree and both runs kept their verdicts, McNemar's exact test compares the robust
and the clean accuracies sample by sample; else Fisher's exact test compares them as two independent proportions. The
p-values of all rows together, those of robust and of clean accuracy apart, are adjusted by Benjamini and Hochberg
(1995), so that many rows do not yield a change by their number.

Unconverged and failed samples are faults and no draws: on the same samples every change of their number counts, on
others one whose 95 % interval (Newcombe's, of the difference of the shares) leaves 0 out.

Costs are compared as ratios of counts, which do not depend on the machine; seconds are not compared.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control

from robustbench_deq.errors import UsageError
from robustbench_deq.proportions import fisher_p_value, mcnemar_p_value, newcombe_interval
from robustbench_deq.records.record import Record
from robustbench_deq.report.supplements import SampleVerdicts

SIGNIFICANCE = 0.05
COST_TOLERANCE = 0.01


class Change(enum.Enum):
    """From the first run to the second. A lower robust accuracy is a weaker model or a stronger attack."""

    LOWER = "lower"
    HIGHER = "higher"
    NONE = "within noise"


@dataclass(frozen=True)
class Difference:
    """Of an accuracy, from the first run to the second.

    Attributes:
        before, after: fractions.
        num_lost, num_gained: samples that were right only before, only after; None when not paired.
        interval: Newcombe's, at 95 %, of the difference of two independent proportions; None when paired.
        p_value: of no difference, by itself.
        adjusted_p_value: the same among all rows.
    """

    before: float
    after: float
    num_lost: int | None
    num_gained: int | None
    interval: tuple[float, float] | None
    p_value: float
    adjusted_p_value: float = math.nan

    @property
    def value(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def change(self) -> Change:
        if self.adjusted_p_value >= SIGNIFICANCE or self.value == 0:
            return Change.NONE
        return Change.LOWER if self.value < 0 else Change.HIGHER


@dataclass(frozen=True)
class Comparison:
    """One attack on one model in both runs.

    Attributes:
        unconverged, failed: of the number of such samples.
        notes: what else is not the same in the two.
    """

    before: Record
    after: Record
    robust: Difference
    clean: Difference
    unconverged: Change
    failed: Change
    notes: tuple[str, ...]

    @property
    def is_changed(self) -> bool:
        """Whether anything but the cost is."""
        return {self.robust.change, self.clean.change, self.unconverged, self.failed} != {Change.NONE}

    def ratio(self, cost: str) -> float:
        """After over before of a cost, which `CostRecord` names; NaN when there was none before."""
        before, after = getattr(self.before.cost, cost), getattr(self.after.cost, cost)
        return after / before if before else math.nan

    @property
    def has_other_cost(self) -> bool:
        """Whether cell evaluations or VJPs, which no clock disturbs, differ by more than `COST_TOLERANCE`."""
        costs = [
            (getattr(self.before.cost, name), getattr(self.after.cost, name)) for name in ("cell_evals", "cell_vjps")
        ]
        return any(abs(after - before) > COST_TOLERANCE * before for before, after in costs)


@dataclass(frozen=True)
class RunComparison:
    """Rows in the order of the first run's settings; records that only one run has."""

    rows: tuple[Comparison, ...]
    only_before: tuple[Record, ...]
    only_after: tuple[Record, ...]


def compare_runs(
    before: Sequence[Record],
    after: Sequence[Record],
    verdicts_before: Mapping[str, SampleVerdicts],
    verdicts_after: Mapping[str, SampleVerdicts],
) -> RunComparison:
    """Match and compare the records of two runs.

    Args:
        verdicts_before, verdicts_after: by record id; may lack some.

    Raises:
        UsageError: when no record of one matches any of the other.
    """
    pairs, only_before, only_after = _match(before, after)
    if not pairs:
        raise UsageError.of(
            "comparison",
            expected="two runs with an attack in common (model, threat, data and label)",
            got="none",
            fix="compare runs of one suite",
        )
    rows = [
        _compare(old, new, verdicts_before.get(old.record_id), verdicts_after.get(new.record_id)) for old, new in pairs
    ]
    robust, clean = _adjusted([row.robust for row in rows]), _adjusted([row.clean for row in rows])
    rows = [
        dataclasses.replace(row, robust=one, clean=other) for row, one, other in zip(rows, robust, clean, strict=True)
    ]
    return RunComparison(tuple(rows), tuple(only_before), tuple(only_after))


def _adjusted(found: Sequence[Difference]) -> list[Difference]:
    p_values = false_discovery_control([difference.p_value for difference in found], method="bh")
    return [
        dataclasses.replace(difference, adjusted_p_value=float(p_value))
        for difference, p_value in zip(found, p_values, strict=True)
    ]


def _key(record: Record) -> tuple[Hashable, ...]:
    return (
        record.model,
        record.data.name,
        record.data.split,
        record.threat.norm,
        record.threat.epsilon,
        record.label,
        record.attack,
    )


def _settings(record: Record) -> str:
    return json.dumps(record.attack_config, sort_keys=True)


_KEYS: tuple[Callable[[Record], tuple[Hashable, ...]], ...] = (
    lambda record: (*_key(record), record.data.digest, record.seed, _settings(record)),
    lambda record: (*_key(record), record.data.digest, record.seed),
    lambda record: (*_key(record), record.data.digest),
    _key,
)
"""What two records must share to be a pair, the strictest first."""


def _match(
    before: Sequence[Record], after: Sequence[Record]
) -> tuple[list[tuple[Record, Record]], list[Record], list[Record]]:
    """Pairs, each record in one at most, and what is left of both."""

    def order(record: Record) -> tuple[Hashable, ...]:
        return (*_key(record), record.seed, record.created, record.record_id)

    left, right = sorted(before, key=order), sorted(after, key=order)
    pairs: list[tuple[Record, Record]] = []
    for key in _KEYS:
        waiting: dict[Hashable, list[Record]] = defaultdict(list)
        for record in right:
            waiting[key(record)].append(record)
        unmatched = []
        for record in left:
            found = waiting[key(record)]
            if found:
                pairs.append((record, found.pop(0)))
            else:
                unmatched.append(record)
        left, right = unmatched, sorted((record for rest in waiting.values() for record in rest), key=order)
    return sorted(pairs, key=lambda pair: order(pair[0])), left, right


def _compare(before: Record, after: Record, old: SampleVerdicts | None, new: SampleVerdicts | None) -> Comparison:
    notes = _notes(before, after)
    if _is_same_data(before, after) and old is not None and new is not None:
        robust = _paired(before.robust_accuracy, after.robust_accuracy, old.is_robust, new.is_robust)
        clean = _paired(before.clean_accuracy, after.clean_accuracy, old.is_clean, new.is_clean)
    else:
        robust = _unpaired(before, after, "robust_accuracy")
        clean = _unpaired(before, after, "clean_accuracy")
        notes = (*notes, *(["no verdicts"] if _is_same_data(before, after) else []))
    return Comparison(
        before,
        after,
        robust,
        clean,
        _change_of_faults(before, after, "num_unconverged"),
        _change_of_faults(before, after, "num_failed"),
        notes,
    )


def _is_same_data(before: Record, after: Record) -> bool:
    return before.data.digest == after.data.digest


def _paired(before: float, after: float, old: np.ndarray, new: np.ndarray) -> Difference:
    """From the verdicts `(samples,)` of both runs."""
    num_lost, num_gained = int(np.sum(old & ~new)), int(np.sum(~old & new))
    return Difference(before, after, num_lost, num_gained, None, mcnemar_p_value(num_lost, num_gained))


def _unpaired(before: Record, after: Record, accuracy: str) -> Difference:
    fractions = getattr(before, accuracy), getattr(after, accuracy)
    sizes = before.data.num_samples, after.data.num_samples
    old, new = (round(fraction * size) for fraction, size in zip(fractions, sizes, strict=True))
    counts = old, sizes[0], new, sizes[1]
    return Difference(*fractions, None, None, newcombe_interval(*counts), fisher_p_value(*counts))


def _change_of_faults(before: Record, after: Record, count: str) -> Change:
    old, new = getattr(before, count), getattr(after, count)
    low = high = float(new - old)
    if not _is_same_data(before, after):
        low, high = newcombe_interval(old, before.data.num_samples, new, after.data.num_samples)
    return Change.HIGHER if low > 0 else Change.LOWER if high < 0 else Change.NONE


def _notes(before: Record, after: Record) -> tuple[str, ...]:
    differs = {
        "other samples": not _is_same_data(before, after),
        "other weights": before.model_sha256 != after.model_sha256,
        "another file": None not in (files := {before.file_sha256, after.file_sha256}) and len(files) > 1,
        "other settings": before.attack_config != after.attack_config,
        "other seed": before.seed != after.seed,
    }
    return tuple(note for note, is_so in differs.items() if is_so)

"""Comparison of two runs: what changed beyond noise.

Records are matched by model, threat, data and the attack's label, the closest first: the same samples, seed and
settings. Where the samples' digests agree and both runs kept their verdicts, McNemar's exact test compares the robust
accuracies sample by sample; else Fisher's exact test compares them as two independent proportions. The p-values of all
rows together are adjusted by Benjamini and Hochberg (1995), so that many rows do not yield a change by their number.

Costs are compared as ratios of counts, which do not depend on the machine; seconds are not compared.
"""

from __future__ import annotations

import enum
import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

from robustbench_deq.bench.records import Record
from robustbench_deq.errors import UsageError
from robustbench_deq.proportions import fisher_p_value, mcnemar_p_value, newcombe_interval
from robustbench_deq.report.supplements import Verdicts, num_robust

SIGNIFICANCE = 0.05
COST_TOLERANCE = 0.01


class Change(enum.Enum):
    """Of the robust accuracy from the first run to the second. Lower is a weaker model or a stronger attack."""

    LOWER = "lower"
    HIGHER = "higher"
    NONE = "within noise"


@dataclass(frozen=True)
class Comparison:
    """One attack on one model in both runs.

    Attributes:
        num_lost, num_gained: samples that were robust only before, only after; None when not paired.
        interval: Newcombe's, at 95 %, of the difference of two independent proportions; None when paired.
        p_value: of no difference, by itself.
        adjusted_p_value: the same among all rows.
        notes: what else is not the same in the two.
    """

    before: Record
    after: Record
    num_lost: int | None
    num_gained: int | None
    interval: tuple[float, float] | None
    p_value: float
    adjusted_p_value: float
    notes: tuple[str, ...]

    @property
    def difference(self) -> float:
        """Of the robust accuracies, after less before."""
        return self.after.robust_accuracy - self.before.robust_accuracy

    @property
    def change(self) -> Change:
        if self.adjusted_p_value >= SIGNIFICANCE or self.difference == 0:
            return Change.NONE
        return Change.LOWER if self.difference < 0 else Change.HIGHER

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
    verdicts_before: Mapping[str, Verdicts],
    verdicts_after: Mapping[str, Verdicts],
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
    adjusted = false_discovery_control([row["p_value"] for row in rows], method="bh")
    return RunComparison(
        tuple(Comparison(**row, adjusted_p_value=float(p_value)) for row, p_value in zip(rows, adjusted, strict=True)),
        tuple(only_before),
        tuple(only_after),
    )


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


def _compare(before: Record, after: Record, old: Verdicts | None, new: Verdicts | None) -> dict[str, Any]:
    is_same_data = before.data.digest == after.data.digest
    notes = _notes(before, after)
    values = {"before": before, "after": after}
    if is_same_data and old is not None and new is not None:
        num_lost = int(np.sum(old.is_robust & ~new.is_robust))
        num_gained = int(np.sum(~old.is_robust & new.is_robust))
        return values | {
            "num_lost": num_lost,
            "num_gained": num_gained,
            "interval": None,
            "p_value": mcnemar_p_value(num_lost, num_gained),
            "notes": notes,
        }
    counts = (num_robust(before), before.data.num_samples, num_robust(after), after.data.num_samples)
    return values | {
        "num_lost": None,
        "num_gained": None,
        "interval": newcombe_interval(*counts),
        "p_value": fisher_p_value(*counts),
        "notes": (*notes, *(["no verdicts"] if is_same_data else [])),
    }


def _notes(before: Record, after: Record) -> tuple[str, ...]:
    differs = {
        "other samples": before.data.digest != after.data.digest,
        "other weights": before.model_sha256 != after.model_sha256,
        "other settings": before.attack_config != after.attack_config,
        "other seed": before.seed != after.seed,
    }
    return tuple(note for note, is_so in differs.items() if is_so)

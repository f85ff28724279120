"""The gate: do the records of a run still say what a baseline says?

Records are paired by model, attack, label, threat, data and seed, and compared field by field. A run is deterministic
but for rounding, which threads, batch sizes and processors change a little, and for the clock. So most tolerances are
narrow, and the baseline itself names them (`baseline.Tolerances`):

    weights        their digests: equal, where both are known
    settings       of the attack: equal; one that is null counts as absent
    clean, robust  on the same samples (their digests agree): how many verdicts are no longer the same, either way;
                   on other samples: Newcombe's 95 % interval of the difference holds 0, which by chance alone one such
                   row in twenty does not
    unconverged,   samples: not more than so many above the baseline's; fewer are fine, for what they change in the
    failed         verdicts is seen there
    evaluations,   of the cell, and vector-Jacobian products: means per sample, within a share, up or down; a wider one
    VJPs           on other samples
    seconds        beside those of the other attacks on the same model in the same run, never absolute, within a factor,
                   up or down: the median over an attack's records. What a busy machine makes of one record is shown
                   but not judged. Not compared where an attack is alone, or in batches of another size

A better accuracy or a lower cost is as much a failure as a worse one: fewer lost samples may well be a weaker attack.
What got better on purpose is made the baseline, with a reason. A record that the run lacks is a failure too; one that
the baseline lacks passes.
"""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as tree
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robustbench_deq.proportions import mcnemar_p_value, newcombe_interval
from robustbench_deq.runner.baseline import Baseline, BaselineEntry, Tolerances, from_hex

NOT_COMPARED = "not compared"

Pair = tuple[BaselineEntry, BaselineEntry]


class Check(NamedTuple):
    """One row of the gate's table."""

    record: str
    field: str
    baseline: str
    now: str
    tolerance: str
    is_good: bool


def compare(baseline: Baseline, now: Sequence[BaselineEntry]) -> list[Check]:
    """Every field of every record of the baseline, in its order; seconds; then the records it does not know."""
    found = {entry.identity: entry for entry in now}
    pairs: list[Pair] = []
    checks: list[Check] = []
    for old in baseline.entries:
        new = found.pop(old.identity, None)
        if new is None:
            checks.append(Check(old.title, "record", "there", "missing", "must be there", False))
        else:
            pairs.append((old, new))
            checks += _compare(old, new, baseline)
    checks += _seconds(pairs, baseline.tolerances.seconds)
    return checks + [Check(entry.title, "record", "not there", "new", "any", True) for entry in found.values()]


def _compare(old: BaselineEntry, new: BaselineEntry, baseline: Baseline) -> list[Check]:
    allowed = baseline.tolerances
    return [
        *_weights(old, new),
        _settings(old, new),
        _verdicts("clean", old, new, old.is_clean, new.is_clean, allowed.flips),
        _verdicts("robust", old, new, old.is_robust, new.is_robust, allowed.flips),
        _lost("unconverged", old, new, old.num_unconverged, new.num_unconverged, allowed.more_unconverged),
        _lost("failed", old, new, old.num_failed, new.num_failed, allowed.more_failed),
        _count("evaluations", old, new, old.cell_evals, new.cell_evals, allowed),
        _count("VJPs", old, new, old.cell_vjps, new.cell_vjps, allowed),
    ]


def _weights(old: BaselineEntry, new: BaselineEntry) -> list[Check]:
    """None where a model has no file of weights."""
    digests = old.model_sha256, new.model_sha256
    if None in digests:
        return []
    before, after = (str(digest)[:12] for digest in digests)
    return [Check(old.title, "weights", before, after, "equal", digests[0] == digests[1])]


def _settings(old: BaselineEntry, new: BaselineEntry) -> Check:
    keys = [key for key in {**old.settings, **new.settings} if old.settings.get(key) != new.settings.get(key)]
    before, after = (", ".join(f"{key}={entry.settings.get(key)}" for key in keys) for entry in (old, new))
    return Check(old.title, "settings", before or "as now", after or "the same", "equal", not keys)


def _verdicts(field: str, old: BaselineEntry, new: BaselineEntry, old_bits: str, new_bits: str, share: float) -> Check:
    before, after = from_hex(old_bits, old.num_samples), from_hex(new_bits, new.num_samples)
    if old.digest != new.digest:
        return _proportions(field, old, before, after)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    allowed = max(1, int(share * len(before)))
    now = f"{after.mean():.2%}"
    if lost or gained:
        now += f" (-{lost} +{gained}, p {mcnemar_p_value(lost, gained):.2g})"
    return Check(old.title, field, f"{before.mean():.2%}", now, f"{allowed} differ", lost + gained <= allowed)


def _proportions(field: str, old: BaselineEntry, before: np.ndarray, after: np.ndarray) -> Check:
    """Of verdicts `(samples,)` on other samples."""
    low, high = newcombe_interval(int(before.sum()), len(before), int(after.sum()), len(after))
    now = f"{after.mean():.1%} (difference {100 * low:+.1f} to {100 * high:+.1f})"
    return Check(old.title, field, f"{before.mean():.1%}", now, "interval holds 0", low <= 0 <= high)


def _lost(field: str, old: BaselineEntry, new: BaselineEntry, before: int, after: int, allowed: int) -> Check:
    """Samples without an equilibrium or a perturbation; the baseline's as a share, for runs of another size."""
    expected = before * new.num_samples / old.num_samples
    texts = f"{before} of {old.num_samples}", f"{after} of {new.num_samples}"
    return Check(old.title, field, *texts, f"{allowed} more", after <= expected + allowed)


def _count(
    field: str, old: BaselineEntry, new: BaselineEntry, before: float, after: float, allowed: Tolerances
) -> Check:
    is_same_data = old.digest == new.digest
    share = allowed.count if is_same_data else allowed.count_elsewhere
    tolerance = f"{share:.0%}" if is_same_data else f"{share:.0%} (other samples)"
    is_good = abs(after - before) <= share * before
    return Check(old.title, field, f"{before:.2f}", f"{after:.2f}", tolerance, is_good)


def _seconds(pairs: Sequence[Pair], allowed: float) -> list[Check]:
    """Of every attack, over its records."""
    known, sizes_differ = (
        seconds_by_attack(pairs),
        {old.label for old, new in pairs if old.batch_size != new.batch_size},
    )
    checks = []
    for label in dict.fromkeys(old.label for old, _ in pairs):
        now, tolerance, is_good = "-", f"{NOT_COMPARED}: no other attack beside it", True
        if label in known:
            middle, least, most = statistics.median_low(known[label]), min(known[label]), max(known[label])
            now, tolerance = f"x {middle:.2f} ({least:.2f} to {most:.2f})", f"factor {allowed:g}"
            is_good = 1 / allowed <= middle <= allowed
        elif label in sizes_differ:
            tolerance = f"{NOT_COMPARED}: other batch size"
        checks.append(Check(f"all records, {label}", "seconds", "x 1.00", now, tolerance, is_good))
    return checks


def seconds_by_attack(pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """How many times more seconds each record of an attack took than before, beside the other attacks on its model.

    The unit is the lower median over those attacks, so that neither one of them that has changed, nor what else the
    machine did meanwhile, which makes a few of them slower, moves it. Of records that can be compared, by label.
    """
    ratios = [
        (old, new.seconds / old.seconds)
        for old, new in pairs
        if old.batch_size == new.batch_size and old.seconds and new.seconds
    ]
    at_place: dict[tuple[str | float, ...], list[float]] = {}
    for old, ratio in ratios:
        at_place.setdefault(old.place, []).append(ratio)
    found: dict[str, list[float]] = {}
    for old, ratio in ratios:
        if len(at_place[old.place]) > 1:
            found.setdefault(old.label, []).append(ratio / statistics.median_low(at_place[old.place]))
    return found


def to_junit(checks: Sequence[Check]) -> str:
    """JUnit XML, a test case a check."""
    num_bad = sum(not check.is_good for check in checks)
    suite = tree.Element("testsuite", name="robustbench-deq check", tests=str(len(checks)), failures=str(num_bad))
    for check in checks:
        case = tree.SubElement(suite, "testcase", classname=check.record, name=check.field)
        if not check.is_good:
            text = f"baseline {check.baseline}, now {check.now}, tolerance {check.tolerance}"
            tree.SubElement(case, "failure", message=text)
    return tree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

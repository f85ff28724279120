"""The gate: do the records of a run still say what a baseline says?

Everything is compared field by field, record by record, with a tolerance that the baseline itself names:

    clean, robust      the same samples in both: how many verdicts were lost and gained (exact McNemar test beside it);
                       other samples: whether the Wilson intervals overlap
    unconverged,       counts; more than `more_failures` above the baseline's is a failure
    failed
    evaluations, VJPs  means per sample, within the factor `count`
    seconds            as a multiple of the run's reference attack on the same model, within the factor `seconds`; never
                       absolute

A record of the baseline that the run lacks is a failure; one that the baseline lacks is named and passes.

A baseline keeps the verdict of every sample, as hexadecimal digits of the bits, and the reasons of all its updates.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from robustbench_deq.bench.records import Record
from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import UsageError
from robustbench_deq.files import write_json
from robustbench_deq.proportions import mcnemar_p_value, wilson_interval

SCHEMA_VERSION = 1


class Tolerances(Config):
    """What may change between two runs of the same code on other machines, threads and batch sizes."""

    net_flips: float = Field(
        0.005, ge=0, le=1, description="net change of a count of samples, as a share; at least one"
    )
    more_failures: int = Field(1, ge=0, description="unconverged or failed samples beyond the baseline's")
    count: float = Field(0.02, ge=0, description="relative change of evaluations and VJPs")
    seconds: float = Field(2.0, ge=1, description="factor on a ratio of seconds within one run")


class Entry(Config):
    """One record of the baseline."""

    key: str
    digest: str
    num_samples: int = Field(ge=1)
    is_clean: str = Field(description="bits of the clean verdicts, hexadecimal")
    is_robust: str = Field(description="bits of the robust verdicts, hexadecimal")
    num_unconverged: int = Field(ge=0)
    num_failed: int = Field(ge=0)
    cell_evals: float = Field(ge=0)
    cell_vjps: float = Field(ge=0)
    relative_seconds: float | None = Field(ge=0, description="over the reference attack's, on the same model")


class Update(Config):
    date: str
    reason: str = Field(min_length=1)
    commit: str | None = None


class Baseline(Config):
    schema_version: Literal[1] = SCHEMA_VERSION
    reference: str = Field(description="label of the attack whose seconds are the unit")
    tolerances: Tolerances = Tolerances()
    updates: list[Update] = Field(min_length=1)
    entries: list[Entry]


class Check(NamedTuple):
    """One row of the gate's table."""

    record: str
    field: str
    baseline: str
    now: str
    tolerance: str
    is_good: bool


def key_of(record: Record) -> str:
    """What identifies a record across runs: model, attack and settings, threat, data, seed."""
    settings = json.dumps(record.attack_config, sort_keys=True, separators=(",", ":"))
    threat = f"{record.threat.norm} {record.threat.epsilon:g}"
    data = f"{record.data.name} {record.data.split} {record.data.num_samples}"
    return " | ".join([record.model, record.label, record.attack, settings, threat, data, str(record.seed)])


def to_entries(runs: Sequence[tuple[Record, pd.DataFrame]], reference: str) -> list[Entry]:
    """Records with their samples, as a baseline keeps them.

    Raises:
        UsageError: for two records with the same key.
    """
    seconds = {
        (record.model, record.threat, record.data.digest, record.seed): record.cost.wall_seconds
        for record, _ in runs
        if record.label == reference
    }
    entries: dict[str, Entry] = {}
    for record, samples in runs:
        key = key_of(record)
        if key in entries:
            raise UsageError.of("records", expected="one of each", got=f"two of {_short(key)}", fix="check one run")
        unit = seconds.get((record.model, record.threat, record.data.digest, record.seed))
        ordered = samples.sort_values("sample_id")
        entries[key] = Entry(
            key=key,
            digest=record.data.digest,
            num_samples=record.data.num_samples,
            is_clean=_to_hex(ordered["is_clean_correct"]),
            is_robust=_to_hex(ordered["is_robust"]),
            num_unconverged=record.num_unconverged,
            num_failed=record.num_failed,
            cell_evals=record.cost.cell_evals,
            cell_vjps=record.cost.cell_vjps,
            relative_seconds=None if not unit or record.label == reference else record.cost.wall_seconds / unit,
        )
    return list(entries.values())


def compare(baseline: Baseline, now: Sequence[Entry]) -> list[Check]:
    """Every field of every record of the baseline, in its order; then the records it does not know."""
    found = {entry.key: entry for entry in now}
    checks: list[Check] = []
    for entry in baseline.entries:
        name, other = _short(entry.key), found.pop(entry.key, None)
        if other is None:
            checks.append(Check(name, "record", "there", "missing", "none", False))
            continue
        checks += [
            _verdicts(name, "clean", entry, other, "is_clean", baseline.tolerances),
            _verdicts(name, "robust", entry, other, "is_robust", baseline.tolerances),
            *_failures(name, entry, other, baseline.tolerances.more_failures),
            *_counts(name, entry, other, baseline.tolerances.count),
            *_seconds(name, entry, other, baseline.tolerances.seconds),
        ]
    return checks + [Check(_short(key), "record", "not there", "new", "any", True) for key in found]


def _verdicts(name: str, field: str, old: Entry, new: Entry, attribute: str, tolerances: Tolerances) -> Check:
    before, after = (_from_hex(getattr(entry, attribute), entry.num_samples) for entry in (old, new))
    shares = f"{before.mean():.2%}", f"{after.mean():.2%}"
    if old.digest != new.digest:
        low, high = wilson_interval(int(before.sum()), len(before))
        other_low, other_high = wilson_interval(int(after.sum()), len(after))
        return Check(name, field, *shares, "intervals that overlap", low <= other_high and other_low <= high)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    allowed = max(1, int(tolerances.net_flips * len(before)))
    now = f"{shares[1]} (-{lost} +{gained}, p {mcnemar_p_value(lost, gained):.2g})"
    return Check(name, field, shares[0], now, f"net {allowed} of {len(before)}", abs(gained - lost) <= allowed)


def _failures(name: str, old: Entry, new: Entry, allowed: int) -> list[Check]:
    pairs = (("unconverged", old.num_unconverged, new.num_unconverged), ("failed", old.num_failed, new.num_failed))
    return [
        Check(name, field, str(before), str(after), f"+{allowed}", after <= before + allowed)
        for field, before, after in pairs
    ]


def _counts(name: str, old: Entry, new: Entry, allowed: float) -> list[Check]:
    pairs = (("evaluations", old.cell_evals, new.cell_evals), ("VJPs", old.cell_vjps, new.cell_vjps))
    return [
        Check(name, field, f"{before:.2f}", f"{after:.2f}", f"{allowed:.0%}", abs(after - before) <= allowed * before)
        for field, before, after in pairs
    ]


def _seconds(name: str, old: Entry, new: Entry, factor: float) -> list[Check]:
    if old.relative_seconds is None or new.relative_seconds is None:
        return []
    before, after = old.relative_seconds, new.relative_seconds
    is_good = after <= factor * before
    return [Check(name, "seconds / reference", f"{before:.2f}", f"{after:.2f}", f"times {factor:g}", is_good)]


def read_baseline(path: Path) -> Baseline:
    """Raises `UsageError` for a missing or malformed file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError.of(str(path), expected="a baseline", got="no such file", fix="write one by --update") from None
    except ValueError:
        raise UsageError.of(str(path), expected="a baseline", got="not JSON", fix="restore the file") from None
    return validate(Baseline, content, str(path))


def update_baseline(path: Path, entries: list[Entry], reference: str, reason: str, commit: str | None) -> Baseline:
    """Write the baseline anew, with the reasons of all its updates and the tolerances that it had."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    update = Update(date=date, reason=reason, commit=commit)
    old = read_baseline(path) if path.exists() else None
    baseline = Baseline(
        reference=reference,
        tolerances=old.tolerances if old else Tolerances(),
        updates=[*(old.updates if old else []), update],
        entries=entries,
    )
    write_json(path, baseline.model_dump(mode="json"))
    return baseline


def to_junit(checks: Sequence[Check]) -> str:
    """JUnit XML, a test case a check."""
    import xml.etree.ElementTree as tree

    bad = sum(not check.is_good for check in checks)
    suite = tree.Element("testsuite", name="robustbench-deq check", tests=str(len(checks)), failures=str(bad))
    for check in checks:
        case = tree.SubElement(suite, "testcase", classname=check.record, name=check.field)
        if not check.is_good:
            text = f"baseline {check.baseline}, now {check.now}, tolerance {check.tolerance}"
            tree.SubElement(case, "failure", message=text)
    return tree.tostring(suite, encoding="unicode", xml_declaration=True)


def _to_hex(bits: Any) -> str:
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes().hex()


def _from_hex(text: str, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8)).astype(bool)
    if len(bits) < count:
        raise UsageError.of("baseline", expected=f"verdicts of {count} samples", got=len(bits), fix="restore the file")
    return bits[:count]


def _short(key: str) -> str:
    model, label, _, _, threat, *_ = key.split(" | ")
    return f"{model}, {label}, {threat}"

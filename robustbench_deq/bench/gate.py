"""The gate: do the records of a run still say what a baseline says?

Records are paired by model, attack, label, threat, data and seed, and compared field by field. A run is deterministic
but for rounding, which threads, batch sizes and processors change a little, and for the clock. So most tolerances are
narrow, and the baseline itself names them (`Tolerances`):

    settings       of the attack: equal; one that is null counts as absent
    clean, robust  on the same samples (their digests agree): how many verdicts are no longer the same, either way;
                   on other samples: the 95 % intervals overlap
    unconverged,   samples: not more than so many above the baseline's
    failed
    evaluations,   of the cell, and vector-Jacobian products: means per sample, within a share
    VJPs
    seconds        as a multiple of a reference attack's on the same model in the same run, never absolute; of every
                   attack the median over its records, within a factor, up or down; batches of another size, which
                   cost another multiple, are not compared

Better is as much a failure as worse: fewer lost samples may well be a weaker attack. What got better on purpose is made
the baseline, with a reason. A record that the run lacks is a failure too; one that the baseline lacks passes.
"""

from __future__ import annotations

import datetime
import json
import statistics
import xml.etree.ElementTree as tree
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, JsonValue, model_validator

from robustbench_deq.bench.records import Record, RecordStore, load_records
from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import UsageError
from robustbench_deq.files import write_json
from robustbench_deq.proportions import mcnemar_p_value, wilson_interval

SCHEMA_VERSION = 1
REFERENCE = "joint-pgd"
"""Label of the attack whose seconds are the unit, unless a baseline says otherwise."""


class Tolerances(Config):
    """What may change between two runs of the same code on other machines, threads and batch sizes.

    The defaults are meant to leave room for that (`benchmarks/gate_alarms.py` counts), and none for a fifth more steps.
    """

    flips: float = Field(0.01, ge=0, le=1, description="share of the samples whose verdict may differ; at least one")
    more_unconverged: int = Field(1, ge=0, description="unconverged samples above the baseline's")
    more_failed: int = Field(0, ge=0, description="failed samples above the baseline's")
    count: float = Field(0.05, ge=0, description="relative change of evaluations and VJPs")
    seconds: float = Field(3.0, ge=1, description="factor on an attack's seconds over the reference's")


Verdicts = Annotated[str, Field(pattern="^([0-9a-f]{2})*$", description="a bit a sample, by sample id, hexadecimal")]


class Entry(Config):
    """One record as a baseline keeps it: what it is of, and what it says."""

    model: str
    attack: str
    label: str
    norm: str
    epsilon: float = Field(ge=0)
    data: str
    split: str
    seed: int
    settings: dict[str, JsonValue]
    digest: str = Field(description="of the samples")
    num_samples: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    is_clean: Verdicts
    is_robust: Verdicts
    num_unconverged: int = Field(ge=0)
    num_failed: int = Field(ge=0)
    cell_evals: float = Field(ge=0)
    cell_vjps: float = Field(ge=0)
    relative_seconds: float | None = Field(ge=0, description="over the reference's; null: it is the reference")

    @model_validator(mode="after")
    def _check_verdicts(self) -> Entry:
        digits = 2 * -(-self.num_samples // 8)
        if not len(self.is_clean) == len(self.is_robust) == digits:
            raise ValueError(f"verdicts of {self.num_samples} samples as {digits} digits")
        return self

    @property
    def identity(self) -> tuple[str | float, ...]:
        """What two records of a pair share."""
        return self.model, self.attack, self.label, self.norm, self.epsilon, self.data, self.split, self.seed

    @property
    def title(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model}, {self.label}, {self.norm} {self.epsilon:g}{seed}"


class Update(Config):
    date: str
    reason: str
    commit: str | None = None


class Baseline(Config):
    schema_version: Literal[1] = SCHEMA_VERSION
    reference: str = Field(description="label of the attack whose seconds are the unit")
    tolerances: Tolerances = Tolerances()
    updates: list[Update] = Field(min_length=1, description="why it is what it is, the oldest first")
    entries: list[Entry]


class Check(NamedTuple):
    """One row of the gate's table."""

    record: str
    field: str
    baseline: str
    now: str
    tolerance: str
    is_good: bool


def to_entries(runs: Sequence[tuple[Record, pd.DataFrame]], reference: str) -> list[Entry]:
    """Records with their samples, as a baseline keeps them.

    Raises:
        UsageError: for two records that nothing tells apart.
    """
    units = {_place(record): record.cost.wall_seconds for record, _ in runs if record.label == reference}
    entries = [_to_entry(record, samples, units.get(_place(record)), reference) for record, samples in runs]
    known = set()
    for entry in entries:
        if entry.identity in known:
            raise UsageError.of(
                "records", expected="one of each", got=f"two of {entry.title}", fix="give the attacks labels"
            )
        known.add(entry.identity)
    return entries


def _place(record: Record) -> tuple[Any, ...]:
    """What a record shares with the reference whose seconds are its unit."""
    return record.model, record.threat, record.data, record.seed


def _to_entry(record: Record, samples: pd.DataFrame, unit: float | None, reference: str) -> Entry:
    ordered = samples.sort_values("sample_id")
    return Entry(
        model=record.model,
        attack=record.attack,
        label=record.label,
        norm=record.threat.norm,
        epsilon=record.threat.epsilon,
        data=record.data.name,
        split=record.data.split,
        seed=record.seed,
        settings=record.attack_config,
        digest=record.data.digest,
        num_samples=record.data.num_samples,
        batch_size=record.batch_size,
        is_clean=_to_hex(ordered["is_clean_correct"]),
        is_robust=_to_hex(ordered["is_robust"]),
        num_unconverged=record.num_unconverged,
        num_failed=record.num_failed,
        cell_evals=record.cost.cell_evals,
        cell_vjps=record.cost.cell_vjps,
        relative_seconds=record.cost.wall_seconds / unit if unit and record.label != reference else None,
    )


def compare(baseline: Baseline, now: Sequence[Entry]) -> list[Check]:
    """Every field of every record of the baseline, in its order; seconds; then the records it does not know."""
    found = {entry.identity: entry for entry in now}
    pairs = [(old, found.pop(old.identity, None)) for old in baseline.entries]
    checks: list[Check] = []
    for old, new in pairs:
        if new is None:
            checks.append(Check(old.title, "record", "there", "missing", "must be there", False))
        else:
            checks += _compare(old, new, baseline.tolerances)
    checks += _seconds(pairs, baseline.reference, baseline.tolerances.seconds)
    return checks + [Check(entry.title, "record", "not there", "new", "any", True) for entry in found.values()]


def _compare(old: Entry, new: Entry, allowed: Tolerances) -> list[Check]:
    return [
        _settings(old, new),
        _verdicts("clean", old, new, old.is_clean, new.is_clean, allowed.flips),
        _verdicts("robust", old, new, old.is_robust, new.is_robust, allowed.flips),
        _lost("unconverged", old, new, old.num_unconverged, new.num_unconverged, allowed.more_unconverged),
        _lost("failed", old, new, old.num_failed, new.num_failed, allowed.more_failed),
        _count("evaluations", old, old.cell_evals, new.cell_evals, allowed.count),
        _count("VJPs", old, old.cell_vjps, new.cell_vjps, allowed.count),
    ]


def _settings(old: Entry, new: Entry) -> Check:
    keys = [key for key in {**old.settings, **new.settings} if old.settings.get(key) != new.settings.get(key)]
    before, after = (", ".join(f"{key}={entry.settings.get(key)}" for key in keys) for entry in (old, new))
    return Check(old.title, "settings", before or "as now", after or "the same", "equal", not keys)


def _verdicts(field: str, old: Entry, new: Entry, old_bits: str, new_bits: str, share: float) -> Check:
    before, after = _from_hex(old_bits, old.num_samples), _from_hex(new_bits, new.num_samples)
    if old.digest != new.digest:
        return _proportions(field, old, before, after)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    allowed = max(1, int(share * len(before)))
    now = f"{after.mean():.2%}"
    if lost or gained:
        now += f" (-{lost} +{gained}, p {mcnemar_p_value(lost, gained):.2g})"
    return Check(old.title, field, f"{before.mean():.2%}", now, f"{allowed} differ", lost + gained <= allowed)


def _proportions(field: str, old: Entry, before: np.ndarray, after: np.ndarray) -> Check:
    """Of verdicts `(samples,)` on other samples."""
    (low, high), (new_low, new_high) = (wilson_interval(int(bits.sum()), len(bits)) for bits in (before, after))
    texts = f"{before.mean():.1%} [{low:.1%}, {high:.1%}]", f"{after.mean():.1%} [{new_low:.1%}, {new_high:.1%}]"
    return Check(old.title, field, *texts, "intervals overlap", low <= new_high and new_low <= high)


def _lost(field: str, old: Entry, new: Entry, before: int, after: int, allowed: int) -> Check:
    """Samples without an equilibrium or a perturbation; the baseline's as a share, for runs of another size."""
    expected = before * new.num_samples / old.num_samples
    texts = f"{before} of {old.num_samples}", f"{after} of {new.num_samples}"
    return Check(old.title, field, *texts, f"{allowed} more", after <= expected + allowed)


def _count(field: str, old: Entry, before: float, after: float, share: float) -> Check:
    is_good = abs(after - before) <= share * before
    return Check(old.title, field, f"{before:.2f}", f"{after:.2f}", f"{share:.0%}", is_good)


def _seconds(pairs: Sequence[tuple[Entry, Entry | None]], reference: str, factor: float) -> list[Check]:
    checks = []
    for label, (before, after) in seconds_by_attack(pairs).items():
        texts = f"{before:.2f} x {reference}", f"{after:.2f} x {reference}"
        is_good = before / factor <= after <= before * factor
        checks.append(Check(f"all records, {label}", "seconds", *texts, f"factor {factor:g}", is_good))
    return checks


def seconds_by_attack(pairs: Sequence[tuple[Entry, Entry | None]]) -> dict[str, tuple[float, float]]:
    """Of each label the medians, before and after, of the relative seconds that can be compared.

    What else a machine does spoils one short record, but not several.
    """
    known: dict[str, list[tuple[float, float]]] = {}
    for old, new in pairs:
        if new and old.batch_size == new.batch_size and old.relative_seconds and new.relative_seconds:
            known.setdefault(old.label, []).append((old.relative_seconds, new.relative_seconds))
    return {
        label: (statistics.median(old for old, _ in values), statistics.median(new for _, new in values))
        for label, values in known.items()
    }


def read_baseline(path: Path) -> Baseline:
    """Raises `UsageError` for a missing or malformed file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError.of(
            str(path), expected="a baseline", got="no file that can be read", fix="write one with --update REASON"
        ) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError.of(str(path), expected="a baseline", got="not one JSON object", fix="restore the file")
    return validate(Baseline, content, str(path))


def read_run(folder: Path) -> list[tuple[Record, pd.DataFrame]]:
    """The records of a folder, each with its samples. Raises `UsageError` where there are none."""
    store = RecordStore(folder)
    return [(record, store.load_samples(record.record_id)) for record in load_records(folder)]


def update_baseline(
    path: Path, runs: Sequence[tuple[Record, pd.DataFrame]], reason: str, reference: str | None = None
) -> Baseline:
    """Write the baseline anew from records with their samples; reasons and tolerances that the file holds stay.

    Args:
        reference: label of the attack whose seconds are the unit; None keeps the file's, or is `REFERENCE`.

    Raises:
        UsageError: without a reason, for a reference that no record has, or for a malformed file.
    """
    if not reason.strip():
        raise UsageError.of("--update", expected="a reason", got="none", fix="say why the baseline changes")
    old = read_baseline(path) if path.exists() else None
    reference = reference or (old.reference if old else REFERENCE)
    labels = dict.fromkeys(record.label for record, _ in runs)
    if reference not in labels:
        raise UsageError.of(
            "--reference", expected=f"a label of these records ({', '.join(labels)})", got=reference, fix="name one"
        )
    commits = [record.environment.get("commit") for record, _ in runs]
    update = Update(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        reason=" ".join(reason.split()),
        commit=str(commits[-1]) if commits[-1] else None,
    )
    baseline = Baseline(
        reference=reference,
        tolerances=old.tolerances if old else Tolerances(),
        updates=[*(old.updates if old else []), update],
        entries=to_entries(runs, reference),
    )
    write_json(path, baseline.model_dump(mode="json"))
    return baseline


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


def _to_hex(bits: Any) -> str:
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes().hex()


def _from_hex(text: str, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)

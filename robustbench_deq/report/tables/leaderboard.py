"""Leaderboard: models ranked by what is left of their accuracy after all attacks of a setting together.

    a board    one threat, one set of samples and one version of the standard evaluation, or none: the models on it are
               comparable
    an entry   one model on a board, with all its records; its robust accuracy counts the samples that no attack broke,
               the union of the attacks taken sample by sample

A record whose verdicts are not at hand takes part with its accuracy alone: the union can be no higher than that.
Entries with the same number of robust samples share a rank. One with a red flag is unreliable: it stands below the
others and has no rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from robustbench_deq.proportions import wilson_interval
from robustbench_deq.records.flags import flags
from robustbench_deq.records.record import Record
from robustbench_deq.report.settings import Setting, SettingNames, format_threat, group_by_setting, setting_names
from robustbench_deq.report.supplements import GalleryRow, ModelFacts, SampleVerdicts, Supplements, num_robust

UNKNOWN = "unknown"


class Board(NamedTuple):
    """What entries must share to be ranked together. Sorts by data, then threat."""

    data: str
    split: str
    num_samples: int
    digest: str
    norm: str
    epsilon: float
    protocol: str

    @classmethod
    def of(cls, setting: Setting, protocol: str = "") -> Board:
        """
        Args:
            protocol: of the standard evaluations on it, such as "v1 standard"; empty: of other attacks.
        """
        return cls(*(getattr(setting, name) for name in cls._fields[:-1]), protocol)


@dataclass(frozen=True)
class Entry:
    """One model on a board.

    Attributes:
        names: of the setting, such that no other one of the leaderboard has them.
        rank: None where it is unreliable.
        records: strongest attack first, then cheapest.
        num_robust: samples that no attack broke; at most that, where `num_in_union` is less than the records.
        num_in_union: records whose verdicts were at hand.
        sole_breaks: for each record, samples that it alone broke; None without its verdicts.
        num_unconverged, num_failed: samples, under any of the attacks; without verdicts, the most of any record.
        card: of these very weights, or None.
    """

    setting: Setting
    names: SettingNames
    rank: int | None
    records: tuple[Record, ...]
    num_robust: int
    num_in_union: int
    sole_breaks: tuple[int | None, ...]
    num_unconverged: int
    num_failed: int
    card: ModelFacts | None
    gallery: Sequence[GalleryRow]

    @property
    def protocol(self) -> str:
        """Of its standard evaluation, the fullest and newest of several; empty: it has none."""
        return max((record.protocol or "" for record in self.records), key=_fullness)

    @property
    def board(self) -> Board:
        return Board.of(self.setting, self.protocol)

    @property
    def is_unreliable(self) -> bool:
        """Whether one of its records raises a red flag."""
        return any(flag.is_red for record in self.records for flag in flags(record))

    @property
    def clean_accuracy(self) -> float:
        """Fraction; the lowest, should the records differ."""
        return min(record.clean_accuracy for record in self.records)

    @property
    def robust_accuracy(self) -> float:
        return self.num_robust / self.setting.num_samples

    @property
    def robust_accuracy_ci(self) -> tuple[float, float]:
        """Wilson's interval at 95 %."""
        return wilson_interval(self.num_robust, self.setting.num_samples)

    @property
    def family(self) -> str:
        """As on the card; without one, what a registered name begins with."""
        if self.card is not None:
            return str(self.card["family"])
        head, dot, _ = self.setting.model.partition(".")
        return head if dot and not set(self.setting.model) & set("/:\\") else UNKNOWN

    @property
    def trained_against(self) -> str:
        """The threat in words, "nothing" for standard training, or "unknown"."""
        if self.card is None:
            return UNKNOWN
        threat = self.card["card"].get("threat")
        return format_threat(threat["norm"], threat["epsilon"]) if threat else "nothing"

    @property
    def training(self) -> str:
        """Standard, adversarial or unknown."""
        return {UNKNOWN: UNKNOWN, "nothing": "standard"}.get(self.trained_against, "adversarial")

    def total(self, cost: str) -> float:
        """Of a cost over all attacks; see `CostRecord` for the names."""
        return sum(getattr(record.cost, cost) for record in self.records)


def _fullness(protocol: str) -> tuple[bool, int]:
    """Of "v1 standard" and the like: a whole evaluation before its first stages, then the newer version."""
    version, _, kind = protocol.partition(" ")
    return kind == "standard", int(version.removeprefix("v") or 0)


def make_leaderboard(records: Sequence[Record], supplements: Supplements) -> list[Entry]:
    """Entries board by board, the most robust first, unreliable ones last; those of the same rank by clean accuracy,
    then name.

    Raises:
        UsageError: when there are no records.
    """
    groups = group_by_setting(records)
    names = setting_names(groups)
    entries = [_entry(setting, names[setting], group, supplements) for setting, group in groups.items()]

    def order(entry: Entry) -> tuple[Any, ...]:
        return entry.board, entry.is_unreliable, -entry.num_robust, -entry.clean_accuracy, entry.setting

    ranked: list[Entry] = []
    for _, group in itertools.groupby(sorted(entries, key=order), key=lambda entry: entry.board):
        together = list(group)
        reliable = [entry for entry in together if not entry.is_unreliable]
        ranks = rankdata([-entry.num_robust for entry in reliable], method="min")
        ranked += [dataclasses.replace(entry, rank=int(rank)) for entry, rank in zip(reliable, ranks, strict=True)]
        ranked += together[len(reliable) :]
    return ranked


def _entry(setting: Setting, names: SettingNames, records: Sequence[Record], supplements: Supplements) -> Entry:
    found = [supplements.verdicts.get(record.record_id) for record in records]
    known = [verdicts for verdicts in found if verdicts is not None]
    limits = [num_robust(record) for record, verdicts in zip(records, found, strict=True) if verdicts is None]
    if known:
        limits.append(int(np.logical_and.reduce([verdicts.is_robust for verdicts in known]).sum()))
    return Entry(
        setting=setting,
        names=names,
        rank=None,
        records=tuple(records),
        num_robust=min(limits),
        num_in_union=len(known),
        sole_breaks=_sole_breaks(found),
        num_unconverged=_under_any(
            [~verdicts.is_converged for verdicts in known], [record.num_unconverged for record in records]
        ),
        num_failed=_under_any([verdicts.is_failed for verdicts in known], [record.num_failed for record in records]),
        card=_card_of(setting, supplements.cards),
        gallery=next(filter(None, (supplements.galleries.get(record.record_id) for record in records)), ()),
    )


def _sole_breaks(found: Sequence[SampleVerdicts | None]) -> tuple[int | None, ...]:
    """Samples that are clean under every attack and robust under all but this one."""
    known = [verdicts for verdicts in found if verdicts is not None]
    if len(known) < 2:
        return (None,) * len(found)
    is_clean = np.logical_and.reduce([verdicts.is_clean for verdicts in known])
    num_broken = np.sum([~verdicts.is_robust for verdicts in known], axis=0)
    is_sole = is_clean & (num_broken == 1)
    return tuple(None if verdicts is None else int((is_sole & ~verdicts.is_robust).sum()) for verdicts in found)


def _under_any(flags: Sequence[np.ndarray], counts: Sequence[int]) -> int:
    return max([*counts, int(np.logical_or.reduce(flags).sum())] if flags else counts)


def _card_of(setting: Setting, cards: Mapping[str, ModelFacts]) -> ModelFacts | None:
    """The card by the model's name, unless it is that of other weights."""
    card = cards.get(setting.model)
    return card if card is not None and (card["sha256"] or "") == setting.sha256 else None

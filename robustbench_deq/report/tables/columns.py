"""Columns of the leaderboard: what each is called, means, shows and sorts by. One more line here is one more column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robustbench_deq.report.tables import doubts
from robustbench_deq.report.tables.leaderboard import Entry
from robustbench_deq.report.tables.summary import COLUMN_MEANINGS
from robustbench_deq.report.tables.text import MISSING, amount, percent, percent_interval

UNRANKED = 1e9
"""What rows without a rank sort by: the end."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        text: what a cell reads.
        number: what it sorts by; None sorts by the text.
        is_descending: whether the first sort puts the largest on top.
    """

    title: str
    meaning: str
    text: Callable[[Entry], str]
    number: Callable[[Entry], float] | None = None
    is_descending: bool = False


COLUMNS = (
    Column(
        "Rank",
        "place by robust accuracy among the models with the same data and threat; equal counts share it; a row with a "
        "red flag is unreliable and has none",
        lambda entry: "unreliable" if entry.rank is None else str(entry.rank),
        lambda entry: UNRANKED if entry.rank is None else entry.rank,
    ),
    Column("Model", COLUMN_MEANINGS["Model"], lambda entry: entry.names.model),
    Column(
        "Robust %",
        "samples that no attack of this row broke, with Wilson's 95 % interval; ≤ where verdicts of single samples are "
        "missing, so that the attacks could not be joined and the strongest one counts",
        lambda entry: (
            ("" if entry.num_in_union == len(entry.records) or len(entry.records) == 1 else "≤ ")
            + percent_interval(entry.robust_accuracy, *entry.robust_accuracy_ci)
        ),
        lambda entry: entry.robust_accuracy,
        is_descending=True,
    ),
    Column(
        "Clean %",
        "samples classified correctly without an attack; where records differ, the fewest",
        lambda entry: percent(entry.clean_accuracy),
        lambda entry: entry.clean_accuracy,
        is_descending=True,
    ),
    Column(doubts.COLUMN, doubts.COLUMN_MEANING, lambda entry: doubts.names_text(entry.records)),
    Column("Family", "the architecture, as on the model's card", lambda entry: entry.family),
    Column(
        "Trained against",
        "the threat of its adversarial training, as on the model's card; nothing is standard training",
        lambda entry: entry.trained_against,
    ),
    Column("Data", COLUMN_MEANINGS["Data"], lambda entry: entry.names.data),
    Column("Threat", COLUMN_MEANINGS["Threat"], lambda entry: entry.names.threat),
    Column(
        "n",
        COLUMN_MEANINGS["n"],
        lambda entry: f"{entry.setting.num_samples:,}",
        lambda entry: entry.setting.num_samples,
        is_descending=True,
    ),
    Column(
        "Evaluation",
        "the standard evaluation among the row's records; only rows of the same one, and version, are ranked together",
        lambda entry: entry.protocol or MISSING,
    ),
    Column(
        "Attacks",
        "how many records the row joins; a model that was attacked less is not the more robust for it",
        lambda entry: str(len(entry.records)),
        lambda entry: len(entry.records),
        is_descending=True,
    ),
    Column(
        "Cell evals",
        "evaluations of the cell per sample, over all attacks of the row; external images count 0",
        lambda entry: amount(entry.total("cell_evals")),
        lambda entry: entry.total("cell_evals"),
    ),
    Column(
        "VJPs",
        "vector-Jacobian products through the cell per sample, over all attacks of the row",
        lambda entry: amount(entry.total("cell_vjps")),
        lambda entry: entry.total("cell_vjps"),
    ),
    Column(
        "Seconds",
        "wall-clock of all attacks of the row, without judging; compare only rows from the same environment",
        lambda entry: amount(entry.total("wall_seconds")),
        lambda entry: entry.total("wall_seconds"),
    ),
    Column(
        "Unconverged",
        "samples whose equilibrium the judge could not find under one of the attacks; never counted as robust",
        lambda entry: str(entry.num_unconverged),
        lambda entry: entry.num_unconverged,
        is_descending=True,
    ),
    Column(
        "Failed",
        "samples on which one of the attacks failed; never counted as robust",
        lambda entry: str(entry.num_failed),
        lambda entry: entry.num_failed,
        is_descending=True,
    ),
)

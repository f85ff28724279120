"""Standings: the leaderboard in print.

standings_markdown   a table a board; columns that say the same in all its rows are one sentence above it
standings_csv        every number as it is
standings_latex      booktabs, all boards in one
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pandas as pd

from robustbench_deq.report.tables import doubts
from robustbench_deq.report.tables.columns import COLUMNS
from robustbench_deq.report.tables.leaderboard import Board, Entry
from robustbench_deq.report.tables.text import csv_table, latex_table, markdown_table, markdown_text

TITLE = "Leaderboard"
_TEXTS = [column.title for column in COLUMNS if column.number is None]


def by_board(entries: Sequence[Entry]) -> dict[Board, list[Entry]]:
    """Entries of `make_leaderboard` by board, in its order."""
    groups = itertools.groupby(entries, key=lambda entry: entry.board)
    return {board: list(group) for board, group in groups}


def standings_markdown(entries: Sequence[Entry], warning: str = "") -> str:
    """Ends with a newline.

    Args:
        warning: a sentence about what the entries lack.
    """
    parts = [f"# {TITLE}", *([f"**{markdown_text(warning)}**"] if warning else [])]
    for group in by_board(entries).values():
        names = group[0].names
        table = _texts(group)
        shared = [name for name in table if len(group) > 1 and table[name].nunique() == 1]
        evaluation = f", {group[0].protocol}" if group[0].protocol else ""
        parts.append(f"## {markdown_text(f'{names.data}, {names.threat}{evaluation}')}")
        if shared:
            facts = (f"{name} {markdown_text(table[name].iloc[0])}" for name in shared)
            parts.append(f"The same in all {len(group)} rows: {'; '.join(facts)}.")
        for name in _TEXTS:
            table[name] = [markdown_text(text) for text in table[name]]
        parts.append(markdown_table(table.drop(columns=shared), _TEXTS).rstrip())
    parts.append("\n".join(f"- **{column.title}**: {markdown_text(column.meaning)}" for column in COLUMNS))
    return "\n\n".join(parts) + "\n"


def standings_latex(entries: Sequence[Entry]) -> str:
    return latex_table(_texts(entries), _TEXTS)


def standings_csv(entries: Sequence[Entry]) -> str:
    return csv_table(pd.DataFrame([_numbers(entry) for entry in entries]))


def _texts(entries: Sequence[Entry]) -> pd.DataFrame:
    return pd.DataFrame({column.title: [column.text(entry) for entry in entries] for column in COLUMNS})


def _numbers(entry: Entry) -> dict[str, object]:
    low, high = entry.robust_accuracy_ci
    return {
        **entry.setting._asdict(),
        "family": entry.family,
        "training": entry.training,
        "rank": entry.rank,
        "clean_accuracy": entry.clean_accuracy,
        "robust_accuracy": entry.robust_accuracy,
        "robust_accuracy_low": low,
        "robust_accuracy_high": high,
        "num_attacks": len(entry.records),
        "num_in_union": entry.num_in_union,
        "cell_evals": entry.total("cell_evals"),
        "cell_vjps": entry.total("cell_vjps"),
        "wall_seconds": entry.total("wall_seconds"),
        "num_unconverged": entry.num_unconverged,
        "num_failed": entry.num_failed,
        "flags": doubts.names_text(entry.records),
    }

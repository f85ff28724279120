"""A comparison of two runs as Markdown and as one HTML file that loads nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from robustbench_deq.records.record import Record
from robustbench_deq.report.pages.templates import render_template
from robustbench_deq.report.settings import format_threat
from robustbench_deq.report.tables.comparison import (
    COST_TOLERANCE,
    SIGNIFICANCE,
    Change,
    Comparison,
    Difference,
    RunComparison,
)
from robustbench_deq.report.tables.text import MISSING, markdown_table, markdown_text, percent

TITLE = "Comparison of two runs"
TEXTS = ("Model", "Threat", "Data", "Attack", "Verdict", "Clean verdict", "Notes")
MEANINGS = {
    "Robust %, Clean %": "accuracy before and after the attack, in the first run and in the second",
    "Difference, Clean difference": "second less first, in points; on the same samples with how many were right only "
    "in the first (-) and only in the second (+), on others with Newcombe's 95 % interval",
    "p, Clean p": "of no difference, among all rows (Benjamini and Hochberg): McNemar's exact test on the same "
    "samples, else Fisher's",
    "Verdict, Clean verdict": f"lower or higher where p is below {SIGNIFICANCE:g}; a lower robust accuracy is a weaker "
    "model or a stronger attack",
    "Cell evals, VJPs": "second over first, per sample",
    "Unconverged, Failed": "samples; more or fewer is any change on the same samples, on others one of which the 95 % "
    "interval leaves 0 out",
}


def comparison_markdown(found: RunComparison) -> str:
    """Headline, table, and what only one run has. Ends with a newline."""
    table = pd.DataFrame([_row(row) for row in found.rows])
    for name in TEXTS:
        table[name] = [markdown_text(text) for text in table[name]]
    parts = [f"# {TITLE}", headline(found), markdown_table(table, TEXTS).rstrip()]
    parts.append("\n".join(f"- **{markdown_text(name)}**: {text}" for name, text in MEANINGS.items()))
    for title, names in _leftovers(found).items():
        parts.append(f"{title}:\n\n" + "\n".join(f"- {markdown_text(name)}" for name in names))
    return "\n\n".join(parts) + "\n"


def comparison_html(found: RunComparison) -> str:
    """The page."""
    rows = [(row.is_changed, _row(row)) for row in found.rows]
    return render_template(
        "comparison.html.jinja",
        title=TITLE,
        headline=headline(found),
        rows=rows,
        texts=TEXTS,
        meanings=MEANINGS,
        leftovers=_leftovers(found),
    )


def headline(found: RunComparison) -> str:
    """How many rows changed, which way, and in what."""
    robust, clean, unconverged, failed = (
        Counter(changes)
        for changes in zip(
            *((row.robust.change, row.clean.change, row.unconverged, row.failed) for row in found.rows), strict=True
        )
    )
    accuracy, faults = ("lower", "higher", "within noise"), ("fewer", "more", "as many")
    return (
        f"Of {len(found.rows)} attacks in both runs, robust accuracy is {_in_words(robust, *accuracy)}; clean accuracy "
        f"is {_in_words(clean, *accuracy)}. Unconverged samples are {_in_words(unconverged, *faults)}; failed ones are "
        f"{_in_words(failed, *faults)}. Cell evaluations or VJPs differ by more than {COST_TOLERANCE:.0%} in "
        f"{sum(row.has_other_cost for row in found.rows)}."
    )


def _in_words(counts: Counter[Change], lower: str, higher: str, none: str) -> str:
    return f"{lower} in {counts[Change.LOWER]}, {higher} in {counts[Change.HIGHER]} and {none} in {counts[Change.NONE]}"


def _leftovers(found: RunComparison) -> dict[str, list[str]]:
    sides = {"Only in the first run": found.only_before, "Only in the second run": found.only_after}
    return {title: _names(records) for title, records in sides.items() if records}


def _names(records: Sequence[Record]) -> list[str]:
    return [
        f"{record.model}, {format_threat(record.threat.norm, record.threat.epsilon)}, "
        f"{record.data.name} {record.data.split}, {record.label}, seed {record.seed}"
        for record in records
    ]


def _row(row: Comparison) -> dict[str, str]:
    before, after = row.before, row.after
    return {
        "Model": before.model,
        "Threat": format_threat(before.threat.norm, before.threat.epsilon),
        "Data": f"{before.data.name} {before.data.split}",
        "Attack": before.label,
        "Robust %": _before_and_after(row.robust),
        "Difference": _difference(row.robust),
        "p": f"{row.robust.adjusted_p_value:.2g}",
        "Verdict": row.robust.change.value,
        "Clean %": _before_and_after(row.clean),
        "Clean difference": _difference(row.clean),
        "Clean p": f"{row.clean.adjusted_p_value:.2g}",
        "Clean verdict": row.clean.change.value,
        "Cell evals": _ratio(row.ratio("cell_evals")),
        "VJPs": _ratio(row.ratio("cell_vjps")),
        "Unconverged": _faults(before.num_unconverged, after.num_unconverged, row.unconverged),
        "Failed": _faults(before.num_failed, after.num_failed, row.failed),
        "Notes": ", ".join((*row.notes, *(["other cost"] if row.has_other_cost else []))) or MISSING,
    }


def _before_and_after(difference: Difference) -> str:
    return f"{percent(difference.before)} → {percent(difference.after)}"


def _difference(difference: Difference) -> str:
    text = f"{100 * difference.value:+.1f}"
    if difference.interval is None:
        return f"{text} (-{difference.num_lost} +{difference.num_gained})"
    low, high = difference.interval
    return f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _faults(before: int, after: int, change: Change) -> str:
    word = {Change.LOWER: " (fewer)", Change.HIGHER: " (more)", Change.NONE: ""}[change]
    return f"{before} → {after}{word}"


def _ratio(value: float) -> str:
    return MISSING if math.isnan(value) else f"× {value:.3f}"

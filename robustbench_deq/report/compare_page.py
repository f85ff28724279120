"""A comparison of two runs as Markdown and as one HTML file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from robustbench_deq.bench.records import Record
from robustbench_deq.report.compare import COST_TOLERANCE, SIGNIFICANCE, Change, Comparison, RunComparison
from robustbench_deq.report.settings import format_threat
from robustbench_deq.report.tables import MISSING, markdown_table, markdown_text, percent
from robustbench_deq.report.templates import render_template

TITLE = "Comparison of two runs"
TEXTS = ("Model", "Threat", "Data", "Attack", "Verdict", "Notes")
MEANINGS = {
    "Robust %": "robust accuracy before and after",
    "Difference": "after less before, in points; on other samples with Newcombe's 95 % interval",
    "Lost, gained": "samples that were robust only before, and only after, on the same samples",
    "p": "of no difference, among all rows (Benjamini and Hochberg): McNemar's exact test on the same samples, else "
    "Fisher's",
    "Verdict": f"lower or higher where p is below {SIGNIFICANCE:g}; lower is a weaker model or a stronger attack",
    "Cell evals, VJPs": "after over before, per sample",
    "Unconverged, Failed": "samples, before and after",
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
    rows = [(row.change is not Change.NONE, _row(row)) for row in found.rows]
    return render_template(
        "compare.html.jinja",
        title=TITLE,
        headline=headline(found),
        rows=rows,
        texts=TEXTS,
        meanings=MEANINGS,
        leftovers=_leftovers(found),
    )


def headline(found: RunComparison) -> str:
    """Two sentences: how many rows changed, and which way."""
    counts = {change: sum(row.change is change for row in found.rows) for change in Change}
    return (
        f"Of {len(found.rows)} attacks in both runs, robust accuracy is lower in {counts[Change.LOWER]}, "
        f"higher in {counts[Change.HIGHER]}, and within noise in {counts[Change.NONE]}. Cell evaluations or VJPs "
        f"differ by more than {COST_TOLERANCE:.0%} in {sum(row.has_other_cost for row in found.rows)}."
    )


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
        "Robust %": f"{percent(before.robust_accuracy)} → {percent(after.robust_accuracy)}",
        "Difference": _difference(row),
        "Lost, gained": MISSING if row.num_lost is None else f"-{row.num_lost} +{row.num_gained}",
        "p": f"{row.adjusted_p_value:.2g}",
        "Verdict": row.change.value,
        "Cell evals": _ratio(row.ratio("cell_evals")),
        "VJPs": _ratio(row.ratio("cell_vjps")),
        "Unconverged": f"{before.num_unconverged} → {after.num_unconverged}",
        "Failed": f"{before.num_failed} → {after.num_failed}",
        "Notes": ", ".join((*row.notes, *(["other cost"] if row.has_other_cost else []))) or MISSING,
    }


def _difference(row: Comparison) -> str:
    text = f"{100 * row.difference:+.1f}"
    return text if row.interval is None else f"{text} [{100 * row.interval[0]:+.1f}, {100 * row.interval[1]:+.1f}]"


def _ratio(value: float) -> str:
    return MISSING if math.isnan(value) else f"× {value:.3f}"

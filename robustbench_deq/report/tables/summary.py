"""Summary: one row a record, as a frame of plain numbers and as Markdown, CSV, LaTeX or HTML.

`summary_table` keeps raw values (fractions, counts, means per sample), and CSV writes them as they are. The other
formats are for reading: percentages with their interval, "68.4 [64.3, 72.3]", and few digits.
"""

from __future__ import annotations

import enum
import html
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
from scipy.stats import rankdata

from robustbench_deq.proportions import wilson_interval
from robustbench_deq.records.record import Record
from robustbench_deq.report.settings import Setting, group_by_setting, setting_names
from robustbench_deq.report.tables import doubts
from robustbench_deq.report.tables.text import (
    MISSING,
    amount,
    count,
    csv_table,
    decimals,
    latex_table,
    markdown_table,
    markdown_text,
    percent_interval,
)

SETTING_COLUMNS = ["Model", "Threat", "Data"]
TEXT_COLUMNS = [*SETTING_COLUMNS, "Attack", doubts.COLUMN]

COLUMN_MEANINGS = {
    "Model": "the classifier, by its name in the registry or its file",
    "Threat": "the norm ball of allowed perturbations, in pixel units of [0, 1]",
    "Data": "the data set and the split the samples come from",
    "Attack": "the label of the attack; its settings stand with the run",
    "Rank": "place of the attack among those on the same model, threat and data, the strongest first; equal robust "
    "accuracies share it",
    "Seed": "the seed of all randomness of the run",
    "n": "how many samples there are; every accuracy is over all of them",
    "Clean %": "samples classified correctly without an attack, with Wilson's 95 % interval",
    "Robust %": "samples still classified correctly after it, with the same interval; lower is a stronger attack",
    doubts.COLUMN: doubts.COLUMN_MEANING,
    "Adv. loss": "mean cross-entropy of the true class at the perturbed images, over the samples that were attacked",
    "Cell evals": "evaluations of the cell per sample: the cost that does not depend on the machine",
    "VJPs": "vector-Jacobian products through the cell per sample",
    "Seconds": "wall-clock of the whole attack, without judging; compare only rows from the same environment",
    "Unconverged": "samples whose equilibrium the judge could not find; never counted as robust",
    "Failed": "samples on which the attack itself failed; never counted as robust",
    "Non-finite": "samples with NaN or infinite logits (-infinity masks a class); never counted as robust",
    "Lagging": "samples whose state the attack has left behind its equilibrium, full solves or not: where they are "
    "counted as robust, that is not to be believed",
    "Zero gradient": "samples on which the attack has met only gradients of zero or NaN: nothing to climb there",
}


class Format(enum.Enum):
    """What a table can be written as."""

    MARKDOWN = enum.auto()
    CSV = enum.auto()
    LATEX = enum.auto()
    HTML = enum.auto()


def summary_table(records: Sequence[Record]) -> pd.DataFrame:
    """Raw numbers, one row a record: by model, threat and data, the strongest attack first, then the cheapest.

    Raises:
        UsageError: when there are no records.
    """
    return pd.DataFrame([row for group in group_by_setting(records).values() for row in _rows(group)])


def _rows(group: Sequence[Record]) -> Iterator[dict[str, object]]:
    """Of one setting, with ranks."""
    ranks = rankdata([record.robust_accuracy for record in group], method="min")
    yield from (_row(record, int(rank)) for record, rank in zip(group, ranks, strict=True))


def _row(record: Record, rank: int) -> dict[str, object]:
    low, high = record.robust_accuracy_ci
    num_samples = record.data.num_samples
    clean_low, clean_high = wilson_interval(round(record.clean_accuracy * num_samples), num_samples)
    return {
        **Setting.of(record)._asdict(),
        "attack": record.label,
        "rank": rank,
        "seed": record.seed,
        "clean_accuracy": record.clean_accuracy,
        "clean_accuracy_low": clean_low,
        "clean_accuracy_high": clean_high,
        "robust_accuracy": record.robust_accuracy,
        "robust_accuracy_low": low,
        "robust_accuracy_high": high,
        "adversarial_loss": math.nan if record.adversarial_loss is None else record.adversarial_loss,
        "cell_evals": math.nan if record.is_external else record.cost.cell_evals,
        "cell_vjps": math.nan if record.is_external else record.cost.cell_vjps,
        "wall_seconds": math.nan if record.is_external else record.cost.wall_seconds,
        "num_unconverged": record.num_unconverged,
        "num_failed": record.num_failed,
        "num_nonfinite": math.nan if record.num_nonfinite is None else record.num_nonfinite,
        "num_lagging": math.nan if record.num_lagging is None else record.num_lagging,
        "num_zero_gradient": math.nan if record.num_zero_gradient is None else record.num_zero_gradient,
        "flags": doubts.names_text([record]),
        "record_id": record.record_id,
    }


def render(frame: pd.DataFrame, fmt: Format) -> str:
    """A summary table as text that ends with a newline.

    Args:
        frame: from `summary_table`.
        fmt: LaTeX needs the package booktabs, for many rows longtable too; HTML is a `<table>`, not a page.
    """
    return _RENDERERS[fmt](frame)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A summary table as the text that people read. The seed is shown where rows differ in it, flags where a
    panel has looked for some."""
    settings = _settings(frame)
    names = setting_names(settings)
    columns = {
        "Model": [names[setting].model for setting in settings],
        "Threat": [names[setting].threat for setting in settings],
        "Data": [names[setting].data for setting in settings],
        "Attack": frame["attack"],
        "Rank": _each(frame, str, "rank"),
        "Seed": _each(frame, str, "seed"),
        "n": _each(frame, "{:,}".format, "num_samples"),
        "Clean %": _each(frame, percent_interval, "clean_accuracy", "clean_accuracy_low", "clean_accuracy_high"),
        "Robust %": _each(frame, percent_interval, "robust_accuracy", "robust_accuracy_low", "robust_accuracy_high"),
        "Adv. loss": _each(frame, decimals, "adversarial_loss"),
        "Cell evals": _each(frame, amount, "cell_evals"),
        "VJPs": _each(frame, amount, "cell_vjps"),
        "Seconds": _each(frame, amount, "wall_seconds"),
        "Unconverged": _each(frame, str, "num_unconverged"),
        "Failed": _each(frame, str, "num_failed"),
        "Non-finite": _each(frame, count, "num_nonfinite"),
        "Lagging": _each(frame, count, "num_lagging"),
        "Zero gradient": _each(frame, count, "num_zero_gradient"),
        doubts.COLUMN: frame["flags"],
    }
    return pd.DataFrame({name: columns[name] for name in meanings(frame)})


def meanings(frame: pd.DataFrame) -> dict[str, str]:
    """What the columns of the readable table mean, in their order."""
    is_shown = {"Seed": frame["seed"].nunique() > 1, doubts.COLUMN: bool((frame["flags"] != MISSING).any())}
    return {name: text for name, text in COLUMN_MEANINGS.items() if is_shown.get(name, True)}


def _settings(frame: pd.DataFrame) -> list[Setting]:
    return [Setting(*values) for values in frame[list(Setting._fields)].itertuples(index=False)]


def _each(frame: pd.DataFrame, write: Callable[..., str], *names: str) -> list[str]:
    return [write(*values) for values in zip(*(frame[name] for name in names), strict=True)]


def _markdown(frame: pd.DataFrame) -> str:
    table = readable(frame)
    for name in table.columns.intersection(TEXT_COLUMNS):
        table[name] = [markdown_text(text) for text in table[name]]
    return markdown_table(table, TEXT_COLUMNS)


def _latex(frame: pd.DataFrame) -> str:
    return latex_table(readable(frame), TEXT_COLUMNS)


def _html(frame: pd.DataFrame) -> str:
    """Rows of one setting stand together under a heading that names it once."""
    table = readable(frame).drop(columns=SETTING_COLUMNS)
    settings = _settings(frame)
    names = setting_names(settings)
    out = io.StringIO()
    out.write("<table>\n<thead><tr>")
    out.writelines(f"<th scope='col'>{html.escape(name)}</th>" for name in table.columns)
    out.write("</tr></thead>\n")
    rows = zip(settings, table.to_numpy().tolist(), strict=True)
    for setting, group in itertools.groupby(rows, key=lambda row: row[0]):
        model, threat, data = map(html.escape, names[setting])
        heading = f"<span><b>{model}</b> · {threat} · {data}</span>"
        out.write(f"<tbody>\n<tr><th scope='rowgroup' colspan='{len(table.columns)}'>{heading}</th></tr>\n")
        for _, cells in group:
            label, *numbers = map(html.escape, cells)
            out.write(f"<tr><th scope='row'>{label}</th>{''.join(f'<td>{number}</td>' for number in numbers)}</tr>\n")
        out.write("</tbody>\n")
    out.write("</table>\n")
    return out.getvalue()


_RENDERERS: dict[Format, Callable[[pd.DataFrame], str]] = {
    Format.MARKDOWN: _markdown,
    Format.CSV: csv_table,
    Format.LATEX: _latex,
    Format.HTML: _html,
}

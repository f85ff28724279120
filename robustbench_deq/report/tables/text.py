"""Text: numbers as people read them, and any table as Markdown, CSV or LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import pandas as pd
from pandas.api.types import is_numeric_dtype

MISSING = "–"
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
ROWS_OF_A_PAGE = 45
"""In print, at most; a LaTeX table of more is broken over pages."""
_LATEX_SYMBOLS = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde ", "^": r"\textasciicircum ", "\\": r"\textbackslash "}
    | {"ε": r"$\varepsilon$", "≤": r"$\le$", "∞": r"$_\infty$", "·": r"$\cdot$", MISSING: "--"}
)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def percent_interval(value: float, low: float, high: float) -> str:
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


def decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else MISSING


def count(value: float) -> str:
    """A whole number, or that it is missing."""
    return f"{value:.0f}" if math.isfinite(value) else MISSING


def amount(value: float) -> str:
    """Three digits or all before the point: 0.0123, 1.70, 41.0, 1,234; or that it is missing."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def markdown_text(text: str) -> str:
    """`text` such that Markdown shows it literally and on one line."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(frame: pd.DataFrame, text_columns: Collection[str] = ()) -> str:
    """Any table as aligned Markdown; columns other than the first and `text_columns` are set to the right."""
    rows = [[str(name) for name in frame.columns], *([str(cell) for cell in row] for row in frame.to_numpy(object))]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [index == 0 or name in text_columns for index, name in enumerate(frame.columns)]
    lines = [
        [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        for row in rows
    ]
    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, is_text, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def csv_table(frame: pd.DataFrame) -> str:
    """Any table as CSV. Texts that a spreadsheet would take for formulas get an apostrophe; numbers stay."""
    shown = frame.copy()
    for name, column in frame.items():
        if not is_numeric_dtype(column):
            shown[name] = pd.Series(map(_csv_cell, column), column.index, column.dtype)
    return shown.to_csv(index=False, lineterminator="\n")


def _csv_cell(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS) else cell


def latex_table(frame: pd.DataFrame, text_columns: Collection[str] = ()) -> str:
    """Any table of texts with booktabs; columns other than these are set to the right.

    One that is longer than a page needs the package longtable too, and repeats its head. Written here, as pandas takes
    a millisecond for each row.
    """
    column_format = "".join("l" if name in text_columns else "r" for name in frame.columns)
    head, *rows = [
        " & ".join(" ".join(cell.split()).translate(_LATEX_SYMBOLS) for cell in row) + r" \\"
        for row in [list(frame.columns), *frame.to_numpy().tolist()]
    ]
    is_long = len(rows) > ROWS_OF_A_PAGE
    kind = "longtable" if is_long else "tabular"
    top = [r"\toprule", head, r"\midrule", *([r"\endhead"] if is_long else [])]
    lines = [rf"\begin{{{kind}}}{{{column_format}}}", *top, *rows, r"\bottomrule", rf"\end{{{kind}}}"]
    return "\n".join(lines) + "\n"

"""Pages: everything a set of records says, in one folder.

    report.md, report.csv, report.tex    the table, for reading, for computing and for papers
    index.html                           one file with table, figures and how each row was made; loads nothing else
    leaderboard.html                     one file that ranks the models by the union of the attacks; loads nothing
    leaderboard.md, .csv, .tex           the same ranks as tables
    figures/*.png, figures/*.svg         the figures

The folder is a pure function of the records (and of the gallery and the supplements): it holds no date and no path.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from robustbench_deq.errors import UsageError
from robustbench_deq.files import write_text
from robustbench_deq.records.record import Record
from robustbench_deq.report.figures import overview, plots
from robustbench_deq.report.figures.gallery import draw_gallery
from robustbench_deq.report.figures.spending import time_spent
from robustbench_deq.report.figures.standings import choose_ranked, draw_standings
from robustbench_deq.report.pages.commands import command_of
from robustbench_deq.report.pages.leaderboard import leaderboard_html
from robustbench_deq.report.pages.templates import definitions, render_template
from robustbench_deq.report.settings import Setting, format_threat, group_by_setting, setting_names
from robustbench_deq.report.supplements import GalleryRow, Supplements
from robustbench_deq.report.tables.doubts import Doubt, find_doubts
from robustbench_deq.report.tables.leaderboard import Entry, make_leaderboard
from robustbench_deq.report.tables.standings import standings_csv, standings_latex, standings_markdown
from robustbench_deq.report.tables.summary import Format, meanings, render, summary_table
from robustbench_deq.report.tables.text import markdown_text

TITLE = "Adversarial robustness of deep equilibrium models"
CAPTIONS = {
    "standings": "What all attacks together leave of each model's accuracy, sample by sample, with Wilson's 95 % "
    "interval; the upright stroke is the clean accuracy. Models stand by threat, the most robust on top.",
    "accuracy_against_solver_steps": "Robust accuracy against solver steps per sample: iterations of all solves, joint "
    "or not. The large marker is the end of the attack, with its confidence interval; the dashed line is the clean "
    "accuracy. Lower and further left is a stronger attack.",
    "accuracy_against_cell_evals": "The same against cell evaluations per sample.",
    "accuracy_against_wall_clock": "The same against the wall-clock of the attack, judging excluded.",
    "accuracy_against_epsilon": "Robust accuracy against the radius of the ball, with confidence intervals; the dashed "
    "line is the clean accuracy.",
    "pareto_front": "Each attack at its cost. The line is the front: no attack that costs less gets as low. Attacks on "
    "it have their confidence interval.",
    "residual_against_step": "Mean relative residual of the state during the attack: how far from an equilibrium it "
    "was when the perturbation was changed. Left out are attacks that solve again at each of their steps and ran in "
    "several batches, whose solves differ in length.",
    "time_spent": "Where the time went, over all records. Left: seconds of the attacks, and of the judge that checked "
    "them. Right: calls of the cell per sample, the mean over records.",
    "gallery": "Samples before and after the attack. Perturbations are stretched to the full scale; bold marks a wrong "
    "class.",
}


@dataclass(frozen=True)
class _Plot:
    name: str
    caption: str
    svg_base64: str


def write_report(
    records: Sequence[Record],
    folder: Path,
    gallery: Sequence[GalleryRow] = (),
    supplements: Supplements | None = None,
) -> list[Path]:
    """Write the report of `records` into `folder`, replacing files of an earlier one.

    Args:
        gallery: samples to show; none leaves the gallery out.
        supplements: for the leaderboard; without verdicts the strongest attack of a row stands for their union.

    Returns:
        The files written, tables and page first.

    Raises:
        UsageError: when there are no records or the folder cannot be written.
    """
    table = summary_table(records)
    try:
        return _write(records, table, Path(folder), gallery, supplements or Supplements())
    except OSError as error:
        raise UsageError.of(
            f"report folder {folder}",
            expected="a folder that can be written",
            got=error.strerror or error,
            fix="name another",
        ) from None


def _write(
    records: Sequence[Record],
    table: pd.DataFrame,
    folder: Path,
    gallery: Sequence[GalleryRow],
    supplements: Supplements,
) -> list[Path]:
    entries, warning = make_leaderboard(records, supplements), supplements.warning
    shown, figure_paths = _draw(records, entries, gallery, folder / "figures")
    words = _words(records, table)
    texts = {
        "report.md": _markdown(records, table, shown, warning),
        "index.html": render_template("report.html.jinja", title=TITLE, warning=warning, plots=shown, **words),
        "report.csv": render(table, Format.CSV),
        "report.tex": render(table, Format.LATEX),
        "leaderboard.html": leaderboard_html(entries, warning),
        "leaderboard.md": standings_markdown(entries, warning),
        "leaderboard.csv": standings_csv(entries),
        "leaderboard.tex": standings_latex(entries),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *figure_paths]


def _draw(
    records: Sequence[Record], entries: Sequence[Entry], gallery: Sequence[GalleryRow], folder: Path
) -> tuple[list[_Plot], list[Path]]:
    """The figures for the page, and their files."""
    shown, paths = [], []
    for name, (figure, note) in _figures(records, entries, gallery).items():
        png, svg = plots.save(figure, folder / name)
        paths += [png, svg]
        caption = f"{CAPTIONS[name]} {note}".rstrip()
        shown.append(_Plot(name, caption, base64.b64encode(svg.read_bytes()).decode("ascii")))
    return shown, paths


def _figures(
    records: Sequence[Record], entries: Sequence[Entry], gallery: Sequence[GalleryRow]
) -> dict[str, tuple[Figure, str]]:
    """Figures by name, each with a note of what had no room in it."""
    ranked, note = choose_ranked(entries)
    figures = {"standings": (draw_standings(ranked), note)}
    paid = [record for record in records if not record.is_external] or records  # of the others nobody knows the cost
    lines, note = overview.choose_drawn(paid, overview.MAX_ATTACKS)
    figures["accuracy_against_solver_steps"] = plots.accuracy_against_solver_steps(lines), note
    figures["accuracy_against_cell_evals"] = plots.accuracy_against_cell_evals(lines), note
    figures["accuracy_against_wall_clock"] = plots.accuracy_against_wall_clock(lines), note
    radii, radii_note = overview.choose_drawn(records, overview.MAX_ATTACKS, overview.by_radius)
    if overview.has_several_epsilons(radii):
        figures["accuracy_against_epsilon"] = overview.accuracy_against_epsilon(radii), radii_note
    if overview.has_choice(paid):
        points, points_note = overview.choose_drawn(paid, overview.MAX_POINTS)
        figures["pareto_front"] = overview.pareto_plot(points), points_note
    if any(map(plots.has_residuals, lines)):
        figures["residual_against_step"] = plots.residual_against_step(lines), note
    figures["time_spent"] = time_spent(paid), ""
    if gallery:
        figures["gallery"] = draw_gallery(gallery), ""
    return figures


def _markdown(records: Sequence[Record], table: pd.DataFrame, shown: Sequence[_Plot], warning: str) -> str:
    parts = [f"# {TITLE}", *([f"**{markdown_text(warning)}**"] if warning else [])]
    parts += [_image(plot) for plot in shown[:1]]
    parts += [render(table, Format.MARKDOWN).rstrip()]
    if found := find_doubts(records):
        lines = (f"- **{doubt.title}**: {doubt.text} On {markdown_text(_raisers(doubt))}." for doubt in found)
        parts += ["## Flags", "\n".join(lines)]
    parts.append("\n".join(f"- **{markdown_text(name)}**: {text}" for name, text in meanings(table).items()))
    parts += [_image(plot) for plot in shown[1:]]
    return "\n\n".join(parts) + "\n"


def _image(plot: _Plot) -> str:
    return f"![{plot.name}](figures/{plot.name}.png)\n\n{plot.caption}"


def _words(records: Sequence[Record], table: pd.DataFrame) -> dict[str, Any]:
    """What the page says, but for the figures."""
    ordered = [record for group in group_by_setting(records).values() for record in group]
    names = setting_names(map(Setting.of, ordered))
    environments: list[dict[str, Any]] = []
    for record in ordered:
        if record.environment not in environments:
            environments.append(record.environment)
    runs = [
        {
            "title": record.label,
            "subtitle": " · ".join(names[Setting.of(record)]),
            "facts": definitions(_facts(record) | {"Environment": environments.index(record.environment) + 1}),
            "command": command_of(record),
        }
        for record in ordered
    ]
    return {
        "table": render(table, Format.HTML),
        "meanings": meanings(table),
        "doubts": [(doubt, _raisers(doubt)) for doubt in find_doubts(ordered)],
        "runs": runs,
        "environments": environments,
    }


def _raisers(doubt: Doubt) -> str:
    return "; ".join(f"{record.model}, {record.label}" for record in doubt.records)


def _facts(record: Record) -> dict[str, object]:
    facts = {
        "Attack": record.attack,
        "Settings": json.dumps(record.attack_config),
        "Threat": format_threat(record.threat.norm, record.threat.epsilon),
        "Largest perturbation": _short(record.max_perturbation),
        "Data": f"{record.data.name} {record.data.split}, n = {record.data.num_samples:,}",
        "Data digest": record.data.digest,
        "Weights or file (sha256)": record.model_sha256 or record.file_sha256 or "unknown",
        "Seed": record.seed,
        "Batch size": record.batch_size,
        "Solver steps": _short(record.cost.solver_steps),
        "Peak memory (MB)": _short(record.cost.peak_memory_mb),
        "Created": record.created,
        "Record": record.record_id,
    }
    facts |= {f"Diagnostic {name}": _short(value) for name, value in record.diagnostics.items()}
    return facts | {f"Panel {name}": _short(value) for name, value in (record.probes or {}).items()}


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"

"""`report`: tables, figures, pages, and what changed between two runs."""

from __future__ import annotations

from pathlib import Path

import click

from robustbench_deq.commands.options import WEIGHTS_FOLDER
from robustbench_deq.errors import UsageError
from robustbench_deq.files import own_path, whole_folder, write_text
from robustbench_deq.memory import no_collection
from robustbench_deq.records.store import load_folders, load_records
from robustbench_deq.report.pages.comparison import comparison_html, comparison_markdown, headline
from robustbench_deq.report.pages.report import write_report
from robustbench_deq.report.supplements import read_model_facts, read_supplements
from robustbench_deq.report.tables.comparison import compare_runs


def report(folders: tuple[Path, ...], out: Path | None, compared: tuple[Path, Path] | None) -> None:
    """Tables, figures, a page and a leaderboard from the records in FOLDERS."""
    if bool(folders) == (compared is not None):
        got = "both" if folders else "none"
        raise UsageError.of("report", expected="FOLDERS of records, or --compare A B", got=got, fix="name one of them")
    with no_collection():
        if compared is not None:
            _compare_runs(*compared, out)
        else:
            _report_on(folders, out or own_path(folders[0] / "report"))


def _report_on(folders: tuple[Path, ...], out: Path) -> None:
    found = load_folders(folders)
    records = [record for part in found.values() for record in part]
    cards = read_model_facts({record.model for record in records}, WEIGHTS_FOLDER)
    supplements = read_supplements(found, cards)
    with whole_folder(out) as folder:
        written = write_report(records, folder, supplements=supplements)
    click.echo(f"{len(records)} records, {len(written)} files in {out}; open {out / 'index.html'}")


def _compare_runs(before: Path, after: Path, out: Path | None) -> None:
    runs = [(folder, load_records(folder)) for folder in (before, after)]
    verdicts = [read_supplements({folder: records}).verdicts for folder, records in runs]
    found = compare_runs(runs[0][1], runs[1][1], *verdicts)
    if out is None:
        click.echo(comparison_markdown(found), nl=False)
        return
    with whole_folder(out) as folder:
        write_text(folder / "compare.md", comparison_markdown(found))
        write_text(folder / "compare.html", comparison_html(found))
    click.echo(f"{headline(found)} Open {out / 'compare.html'}")

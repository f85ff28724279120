"""The report folder is complete, loads nothing from elsewhere, and is a function of the records alone."""

from __future__ import annotations

import html
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.report.figures.gallery import draw_gallery
from robustbench_deq.report.pages.commands import command_of
from robustbench_deq.report.pages.report import write_report
from robustbench_deq.report.supplements import GalleryRow

FIGURES = [
    "standings",
    "accuracy_against_solver_steps",
    "accuracy_against_cell_evals",
    "accuracy_against_wall_clock",
    "residual_against_step",
    "time_spent",
]
VOID = {"meta", "img"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "a":  # a link is followed by who wants to; it loads nothing
            self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def gallery_row(channels: int = 1, **changes: object) -> GalleryRow:
    clean = np.linspace(0, 1, channels * 64).reshape(channels, 8, 8)
    delta = np.where(clean > 0.5, -0.125, 0.125)
    names = {"label": "Shirt", "clean_prediction": "Shirt", "adversarial_prediction": "Coat"}
    return GalleryRow(**({"clean": clean, "perturbation": delta, "adversarial": clean + delta} | names | changes))


def test_all_files_are_written_and_listed(make_record, tmp_path: Path) -> None:
    paths = write_report([make_record()], tmp_path / "report", gallery=[gallery_row()])
    names = [path.relative_to(tmp_path / "report").as_posix() for path in paths]
    figures = [f"figures/{name}.{kind}" for name in [*FIGURES, "gallery"] for kind in ("png", "svg")]
    boards = [f"leaderboard.{kind}" for kind in ("html", "md", "csv", "tex")]
    assert names == ["report.md", "index.html", "report.csv", "report.tex", *boards, *figures]
    assert sorted(path for path in (tmp_path / "report").rglob("*") if path.is_file()) == sorted(paths)
    assert all(path.stat().st_size > 0 for path in paths)
    assert pd.read_csv(paths[2])["robust_accuracy"].tolist() == [0.6875]


def test_page_loads_nothing_and_shows_numbers_settings_and_environment(make_record, tmp_path: Path) -> None:
    record = make_record()
    write_report([record], tmp_path)
    page = outline(tmp_path / "index.html")
    assert len(page.sources) == len(FIGURES)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & page.tags
    policies = {
        re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', (tmp_path / name).read_text())[1]
        for name in ("index.html", "leaderboard.html")
    }
    assert len(policies) == 1 and policies.pop().startswith("default-src 'none'; ")
    assert not re.search(r"url\(|@import", (tmp_path / "index.html").read_text())
    for shown in ("68.8 [63.7, 73.8]", "87.5", "feedc0de99", "0123456789abcdef", "2.9.0", "num_audited"):
        assert shown in page.text
    assert command_of(record) in page.text
    assert "prefers-color-scheme: dark" in page.text


def test_strings_from_records_are_escaped_everywhere(make_record, tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    data = {"name": bad, "split": bad, "num_samples": 256, "digest": bad}
    record = make_record(
        bad,
        bad,
        attack=bad,
        attack_config={bad: bad},
        data=data,
        model_sha256=bad,
        threat={"norm": bad, "epsilon": 1.0},
        diagnostics={bad: 1.0},
        environment={bad: bad},
    )
    write_report([record], tmp_path)
    page = outline(tmp_path / "index.html")
    assert "script" not in page.tags
    assert page.text.count(bad) >= 12
    assert html.escape(bad) in (tmp_path / "index.html").read_text()
    assert bad not in (tmp_path / "report.md").read_text()


def test_report_depends_on_the_records_alone(make_record, tmp_path: Path) -> None:
    records = [make_record(), make_record("warm PGD-20", robust=0.7, environment={"torch": "2.8.0"})]
    once, again = write_report(records, tmp_path / "once"), write_report(records[::-1], tmp_path / "again")
    for first, second in zip(once, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    write_report(records, tmp_path / "once")
    assert once[0].read_bytes() == again[0].read_bytes()


def test_each_environment_is_shown_once(make_record, tmp_path: Path) -> None:
    other = {"torch": "9.9.9"}
    write_report([make_record("a"), make_record("b"), make_record("c", environment=other)], tmp_path)
    page = outline(tmp_path / "index.html")
    assert page.text.count("2.9.0") == 1
    assert page.text.count("9.9.9") == 1


def test_no_residuals_leaves_their_figure_out(make_record, tmp_path: Path) -> None:
    write_report([make_record(residuals=[])], tmp_path)
    assert not (tmp_path / "figures" / "residual_against_step.png").exists()
    assert "residual_against_step" not in (tmp_path / "report.md").read_text()


def test_markdown_report_points_to_its_figures(make_record, tmp_path: Path) -> None:
    write_report([make_record()], tmp_path)
    links = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text())
    assert len(links) == len(FIGURES)
    assert all((tmp_path / link).is_file() for link in links)


def test_command_makes_the_run_again(make_record) -> None:
    record = make_record(
        model="my model.py:build", attack_config={"steps": 40, "warm": False, "solver": {"rtol": 1e-3}}
    )
    assert shlex.split(command_of(record)) == [
        *(
            "robustbench-deq",
            "attack",
            "my model.py:build",
            "--attack",
            "joint-pgd",
            "--norm",
            "l2",
            "--epsilon",
            "1.0",
        ),
        *("--data", "digits", "--split", "test", "--limit", "256", "--batch-size", "128", "--seed", "0"),
        *("--label", record.label),
        *("--set", "steps=40", "--set", "warm=false", "--set", "solver.rtol=0.001"),
    ]


def test_no_records_or_no_folder_is_refused(make_record, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one record"):
        write_report([], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can be written"):
        write_report([make_record()], tmp_path / "file")


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_shows_images_and_predictions(channels: int) -> None:
    rows = [gallery_row(channels), gallery_row(channels, adversarial_prediction="Shirt"), gallery_row(channels)]
    axes = [axes for part in draw_gallery(rows).subfigs for axes in part.axes]
    assert len(axes) == 9
    titles = [part.get_title() for part in axes[:3]]
    assert titles == ["true Shirt\nread as Shirt", "perturbation\nlargest 0.125", "adversarial\nread as Coat"]
    assert [axes[i].title.get_fontweight() for i in (2, 5, 8)] == ["bold", "normal", "bold"]
    shape = (8, 8) if channels == 1 else (8, 8, 3)
    assert axes[0].images[0].get_array().shape == shape
    perturbation = np.asarray(axes[1].images[0].get_array())
    assert (perturbation.min(), perturbation.max()) == (0.0, 1.0)


def test_gallery_of_no_perturbation_is_grey() -> None:
    zero = np.zeros((1, 4, 4))
    axes = draw_gallery([gallery_row(clean=zero, perturbation=zero, adversarial=zero)]).subfigs[0].axes[1]
    assert np.all(axes.images[0].get_array() == 0.5)


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8), (1, 4, 8)])
def test_gallery_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="three images of one shape"):
        gallery_row(clean=np.zeros(shape))
    with pytest.raises(UsageError, match="at least one sample"):
        draw_gallery([])


def test_raised_flags_are_listed_with_what_they_mean_and_who_raises_them(make_record, tmp_path: Path) -> None:
    records = [make_record("sound", probes={}), make_record("masked", probes={"noise_wins": 0.5}, num_unconverged=200)]
    write_report(records, tmp_path)
    page, text = outline(tmp_path / "index.html").text, (tmp_path / "report.md").read_text(encoding="utf-8")
    for shown in (page, text):
        assert "noise beats gradients (unreliable)" in shown and "gradients show a worse way than chance" in shown
        assert "Raised when noise raises the loss of more than 10%" in shown and "On deq-conv, masked." in shown
        assert "unconverged" in shown and "unconverged (unreliable)" not in shown
    write_report(records[:1], tmp_path)
    assert "Raised when" not in outline(tmp_path / "index.html").text

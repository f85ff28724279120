"""Tables order rows, keep the numbers, and let no text break out of its cell."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.report.settings import format_threat
from robustbench_deq.report.tables.summary import COLUMN_MEANINGS, Format, readable, render, summary_table
from robustbench_deq.report.tables.text import ROWS_OF_A_PAGE, csv_table

NASTY = "<script>alert('1')</script> a_b 50% | $x$ & \\cmd"


def test_rows_go_by_model_then_threat_then_strength_then_cost(make_record) -> None:
    ball = {"norm": "l2", "epsilon": 0.5}
    records = [
        make_record("weak", "b", robust=0.7),
        make_record("strong but dear", "b", robust=0.5, cell_evals=200.0),
        make_record("strong and cheap", "b", robust=0.5, cell_evals=20.0),
        make_record("small ball", "b", robust=0.8, threat=ball),
        make_record("other model", "a", robust=0.9),
    ]
    order = ["other model", "small ball", "strong and cheap", "strong but dear", "weak"]
    assert summary_table(records)["attack"].tolist() == order
    assert summary_table(records)["rank"].tolist() == [1, 1, 1, 1, 3]
    assert summary_table(records[::-1])["attack"].tolist() == order


def test_csv_holds_the_same_numbers(make_record) -> None:
    records = [make_record(robust=1 / 3), make_record(NASTY, adversarial_loss=None, cell_evals=12345.678)]
    table = summary_table(records)
    again = pd.read_csv(io.StringIO(render(table, Format.CSV)))
    pd.testing.assert_frame_equal(again, table, check_dtype=False, check_exact=True)
    assert again["robust_accuracy"].tolist() == [1 / 3, 0.6875]


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"], ids=repr)
def test_no_cell_of_a_csv_is_a_formula(sign: str, make_record) -> None:
    text = f"{sign}HYPERLINK(1,2)"
    table = summary_table([make_record(text, adversarial_loss=-1.25)])
    (row,) = csv.DictReader(io.StringIO(render(table, Format.CSV), newline=""))
    assert row["attack"] == f"'{text}" and row["adversarial_loss"] == "-1.25"
    (row,) = csv.DictReader(io.StringIO(csv_table(pd.DataFrame({"a": [text], "b": [-1], "c": [None]})), newline=""))
    assert row == {"a": f"'{text}", "b": "-1", "c": ""}


def test_readable_cells(make_record) -> None:
    record = make_record(robust=0.684, robust_accuracy_ci=[0.643, 0.723], cell_evals=1234.5, adversarial_loss=None)
    row = readable(summary_table([record])).iloc[0]
    assert row.to_dict() == {
        "Model": "deq-conv",
        "Threat": "L2, ε = 1",
        "Data": "digits test",
        "Attack": "joint PGD-40",
        "Rank": "1",
        "n": "256",
        "Clean %": "87.5 [82.9, 91.0]",
        "Robust %": "68.4 [64.3, 72.3]",
        "Adv. loss": "–",
        "Cell evals": "1,234",
        "VJPs": "1,234",
        "Seconds": "123",
        "Unconverged": "3",
        "Failed": "0",
        "Non-finite": "–",
        "Lagging": "–",
        "Zero gradient": "–",
    }


@pytest.mark.parametrize(
    ("field", "column"),
    [("num_nonfinite", "Non-finite"), ("num_lagging", "Lagging"), ("num_zero_gradient", "Zero gradient")],
)
@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0"), (12, "12")])
def test_nothing_looked_at_is_not_nothing_found(field: str, column: str, value: int | None, text: str, make_record):
    others = [make_record("other", **{field: 3})]  # a column of both kinds holds no whole numbers
    rows = readable(summary_table([make_record("mine", **{field: value}), *others]))
    assert rows.set_index("Attack")[column].to_dict() == {"mine": text, "other": "3"}


def test_flags_are_shown_where_a_panel_has_looked(make_record) -> None:
    plain = summary_table([make_record()])
    assert "Flags" not in readable(plain) and list(plain["flags"]) == ["–"]
    records = [make_record("a"), make_record("b", probes={}), make_record("c", probes={"noise_wins": 1, "missed": 1})]
    texts = readable(summary_table(records)).set_index("Attack")["Flags"].to_dict()
    assert texts == {"a": "–", "b": "none", "c": "noise beats gradients, weak attack"}


@pytest.mark.parametrize(
    ("norm", "epsilon", "text"),
    [
        ("l2", 0.5, "L2, ε = 0.5"),
        ("linf", 8 / 255, "L∞, ε = 8/255"),
        ("linf", 0.03, "L∞, ε = 0.03"),
        ("l2", 1.0, "L2, ε = 1"),
        ("l2", 0.0, "L2, ε = 0"),
        ("l1", 12.0, "L1, ε = 12"),
        ("l3", 2.0, "L3, ε = 2"),
    ],
)
def test_threats_read_as_in_papers(norm: str, epsilon: float, text: str) -> None:
    assert format_threat(norm, epsilon) == text


def test_seeds_and_digests_show_only_where_rows_differ_in_them(make_record) -> None:
    plain = readable(summary_table([make_record()]))
    assert "Seed" not in plain.columns
    data = {"name": "digits", "split": "test", "num_samples": 256, "digest": "0ther5amples"}
    mixed = readable(
        summary_table([make_record(seed=1), make_record(seed=2, model_sha256="ffff0000ffff"), make_record(data=data)])
    )
    assert sorted(mixed["Seed"]) == ["0", "1", "2"]
    assert set(mixed["Model"]) == {"deq-conv (01234567)", "deq-conv (ffff0000)"}
    assert set(mixed["Data"]) == {"digits test (feedc0de)", "digits test (0ther5am)"}


def test_every_column_is_explained(make_record) -> None:
    table = readable(summary_table([make_record(seed=1), make_record(seed=2, probes={})]))
    assert list(table.columns) == list(COLUMN_MEANINGS)


def test_markdown_is_one_table(make_record) -> None:
    text = render(
        summary_table([make_record(NASTY), make_record("line\nbreak", robust=0.7, probes={})]), Format.MARKDOWN
    )
    lines = text.splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert len(lines) == 4
    assert {len(row) for row in cells} == {len(COLUMN_MEANINGS) - 1 + 2}
    assert len({len(line) for line in lines}) == 1
    assert r"\<script\>" in lines[2]
    assert r"50% \| $x$" in lines[2]
    assert re.fullmatch(r"\| ---+ \| ---+ .* -+: \|", lines[1])


def test_latex_is_a_booktabs_table_with_escapes(make_record) -> None:
    text = render(
        summary_table([make_record(NASTY, threat={"norm": "linf", "epsilon": 8 / 255}, probes={})]), Format.LATEX
    )
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"a\_b 50\%" in text
    assert r"\$x\$ \& \textbackslash cmd" in text
    assert r"Robust \%" in text
    assert r"L$_\infty$, $\varepsilon$ = 8/255" in text
    assert text.isascii()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(COLUMN_MEANINGS) - 1}


def test_latex_table_longer_than_a_page_goes_over_pages(make_record) -> None:
    short = render(summary_table([make_record(f"a {number}") for number in range(ROWS_OF_A_PAGE)]), Format.LATEX)
    long = render(summary_table([make_record(f"a {number}") for number in range(ROWS_OF_A_PAGE + 1)]), Format.LATEX)
    assert short.startswith(r"\begin{tabular}") and r"\endhead" not in short
    assert long.startswith(r"\begin{longtable}") and long.endswith("\\bottomrule\n\\end{longtable}\n")
    assert long.index(r"\midrule") < long.index(r"\endhead") < long.index("a 0 ")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("count", [1, ROWS_OF_A_PAGE + 1])
def test_latex_compiles(count: int, make_record, tmp_path: Path) -> None:
    threat = {"norm": "linf", "epsilon": 8 / 255}
    records = [make_record(f"{NASTY} {number}", threat=threat) for number in range(count)]
    table = render(summary_table(records), Format.LATEX)
    page = r"\documentclass{article}\usepackage{booktabs,longtable}\begin{document}" + table + r"\end{document}"
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:]
    assert "Overfull \\vbox" not in answer.stdout


def test_html_escapes_and_names_each_setting_once(make_record) -> None:
    records = [make_record(NASTY, "a<b>"), make_record("x", "a<b>"), make_record("y", "c")]
    text = render(summary_table(records), Format.HTML)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; a_b 50% | $x$ &amp; \\cmd" in text
    assert text.count("<b>a&lt;b&gt;</b> · L2, ε = 1 · digits test") == 1
    assert text.count("<tbody>") == 2
    assert text.count("<th scope='row'>") == 3


def test_settings_of_other_weights_do_not_share_a_heading(make_record) -> None:
    text = render(summary_table([make_record(), make_record(model_sha256="ffff0000ffff")]), Format.HTML)
    assert text.count("<tbody>") == 2


def test_no_records_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one record"):
        summary_table([])

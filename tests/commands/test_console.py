"""Names are shown as they are, whatever rich would read in them, on a terminal and in a log."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from robustbench_deq.commands import main as cli
from robustbench_deq.commands.check import _echo_checks
from robustbench_deq.commands.display import bar, suite_display
from robustbench_deq.commands.rows import echo_listing
from robustbench_deq.runner.gate import Check
from robustbench_deq.runner.progress import SuiteProgress

NAMES = ["[/x]", "[warm]", "[bold]b[/bold]", ":smile:", "[link=x"]


@pytest.fixture(params=[False, True], ids=["log", "terminal"])
def _place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    if request.param:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as on a terminal


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_place")
def test_names_in_tables_and_in_progress_are_shown_as_they_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _echo_checks([Check(name, "record", name, name, "equal", True)])
    echo_listing([{"name": name, "note": name}], "models", is_json=False)
    assert capsys.readouterr().out.count(name) == 5
    with bar(name, 2, name + " {:.1f}") as advance:
        advance(1, 0.5)
    with suite_display(name, SuiteProgress([], tmp_path)):
        pass
    assert capsys.readouterr().err.count(name) >= 2


def test_a_plan_shows_the_labels_of_its_suite(tmp_path: Path) -> None:
    attacks = [{"name": "noise", "label": name} for name in NAMES]
    threats = [{"norm": "l2", "epsilons": [0.5]}]
    suite = {"name": "small", "models": ["test-linear.tiny"], "data": "digits", "threats": threats, "attacks": attacks}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    words = ["bench", str(tmp_path / "suite.yaml"), "--dry-run", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert all(f"  {name}  " in result.stdout for name in NAMES)

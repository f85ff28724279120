"""The command `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from robustbench_deq.attacks import ATTACKS, standard
from robustbench_deq.commands import evaluate as command
from robustbench_deq.commands import main as cli
from robustbench_deq.records.flags import flags
from robustbench_deq.records.store import load_records

MODEL = "test-linear.tiny"
FAST = ("--data", "digits", "--norm", "l2", "--epsilon", "0.5", "--limit", "12", "--version", "fast")


def run(*words: Any) -> Result:
    return CliRunner().invoke(cli.main, ["evaluate", *map(str, words)])


def test_a_person_reads_the_number_its_interval_the_flags_and_the_stages() -> None:
    result = run(MODEL, *FAST)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{MODEL}  v1 fast  l2 0.5  digits test, 12 images"
    heads = [line.split("  ")[0] for line in lines[1:] if line]
    for head in ("clean accuracy", "robust accuracy", "unconverged", "cost per image", "seconds in all", "stage"):
        assert head in heads
    assert any(line.startswith(("flag", "red flag")) for line in lines)
    names = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert names == [stage.name for stage in ATTACKS.get("fast")(command_threat()).stages(10, (1, 8, 8))]


def command_threat() -> Any:
    from robustbench_deq.threats import Threat

    return Threat("l2", 0.5)


def test_json_is_the_record_and_out_keeps_it(tmp_path: Path) -> None:
    result = run(MODEL, *FAST, "--json", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    (record,) = load_records(tmp_path / "new")
    shown = json.loads(result.stdout)
    assert shown.pop("flags") == [flag.name for flag in flags(record)]
    assert shown == json.loads(record.model_dump_json())
    assert record.protocol == "v1 fast" and record.batch_size == 128 and record.probes
    again = run(MODEL, *FAST, "--out", tmp_path / "new")
    assert again.exit_code == 2 and "add --resume" in again.stderr
    assert run(MODEL, *FAST, "--json", "--out", tmp_path / "new", "--resume").stdout == result.stdout


def test_an_audit_that_breaks_something_has_all_survivors_attacked(tmp_path: Path, monkeypatch) -> None:
    def quick(kind: str) -> None:
        class Quick(ATTACKS.get(kind)):  # type: ignore[misc]  # a class that the registry knows
            def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> Any:
                first, *_, last = super().stages(num_classes, input_shape)
                return first, last

        monkeypatch.setitem(ATTACKS._entries, kind, Quick)

    quick("standard")
    monkeypatch.setattr(standard, "NUM_QUERIES", 10)
    monkeypatch.setattr(standard, "FAB_STEPS", 2)
    asked: list[str] = []
    monkeypatch.setattr(command, "needs_black_box", lambda record: asked.append(record.record_id) or True)
    words = [word if word != "fast" else "standard" for word in FAST]
    result = run(MODEL, *words, "--json", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    first, second = load_records(tmp_path / "new")
    assert asked == [first.record_id]
    assert (first.stages[-1].name, second.stages[-1].name) == ("square-audit", "fab-t")
    assert second.stages[-1].num_attacked >= first.stages[-1].num_attacked
    shown = json.loads(result.stdout)
    assert shown["record_id"] == second.record_id
    assert shown["cost"]["cell_evals"] == pytest.approx(first.cost.cell_evals + second.cost.cell_evals)
    assert shown["cost"]["judge_seconds"] == pytest.approx(first.cost.judge_seconds + second.cost.judge_seconds)
    assert "now on all survivors" in result.stderr
    lines = (tmp_path / "new" / "records.jsonl").read_text().splitlines()
    (tmp_path / "new" / "records.jsonl").write_text(lines[1] + "\n")  # the first record is lost, and written again
    again = run(MODEL, *words, "--json", "--out", tmp_path / "new", "--resume")
    assert asked == [first.record_id] * 2 and json.loads(again.stdout)["record_id"] == second.record_id


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody", *FAST], "unknown model"),
        (["test-*", *FAST], "unknown model"),
        ([MODEL, *FAST, "--resume"], "--out"),
        ([MODEL, "--norm", "l2"], "add --epsilon"),
        ([MODEL, *FAST[:4], "--epsilon", "nan"], "epsilon"),
        ([MODEL, "--norm", "l3x", "--epsilon", "0.5"], "norm"),
        ([MODEL, "--norm", "l2", "--epsilon", "much", "--data", "digits"], "epsilon"),
        ([MODEL, *FAST[:-2], "--version", "quick"], "fast"),
        ([MODEL, *FAST, "--workers", "2", "--address", "here:1"], "--executor ray"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(words: list[str], said: str, tmp_path: Path) -> None:
    result = run(*words)
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[-1]

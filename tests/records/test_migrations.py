"""Old records stay readable; newer ones are refused; the schema's description is that of the code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.schema import README, schema_text
from robustbench_deq.errors import UsageError
from robustbench_deq.records.migrations import SCHEMA_VERSION, migrate
from robustbench_deq.records.records import load_records, to_json

FIRST = Path(__file__).with_name("records_v1.jsonl")
"""Two records as the first version of the program wrote them."""


def rename(values: dict[str, Any]) -> dict[str, Any]:
    values["nickname"] = values.pop("label")
    return values


def shout(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"nickname": values["nickname"].upper()}


def test_records_of_the_first_version_are_read(tmp_path: Path) -> None:
    shutil.copy(FIRST, tmp_path / "records.jsonl")
    joint, noise = load_records(tmp_path)
    assert (joint.label, noise.label, joint.robust_accuracy) == ("joint-pgd", "noise", 0.71484375)
    assert (joint.cost.cell_evals, joint.cost.judge_seconds) == (64.2578125, None)
    assert [point.solver_steps for point in joint.curve] == [None] * 8
    assert {to_json(record)["schema_version"] for record in (joint, noise)} == {SCHEMA_VERSION}


@pytest.mark.parametrize(
    ("version", "label"), [(1, ("nickname", "PGD")), (2, ("nickname", "PGD")), (3, ("label", "pgd"))]
)
def test_all_missing_steps_are_applied_in_turn(version: int, label: tuple[str, str]) -> None:
    values = {"schema_version": version, "label": "pgd"}
    if version == 2:
        values = {"schema_version": 2, "nickname": "pgd"}
    assert migrate(values, "here", [rename, shout]) == {"schema_version": 3, label[0]: label[1]}


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, -1, True, "1", 1.0, None])
def test_other_versions_are_refused_in_one_line(version: object) -> None:
    with pytest.raises(UsageError, match=r"^here: expected schema_version") as caught:
        migrate({"schema_version": version}, "here")
    assert "\n" not in str(caught.value)
    assert ("install the newer" in str(caught.value)) is (version == SCHEMA_VERSION + 1)


def test_the_readme_describes_these_very_fields() -> None:
    assert schema_text() in README.read_text(encoding="utf-8"), "run 'python -m benchmarks.schema'"

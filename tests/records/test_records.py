"""Records survive their file unchanged, and a damaged file is never read as something else."""

from __future__ import annotations

import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.schema import README, schema_text
from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError
from robustbench_deq.records import store
from robustbench_deq.records.frames import to_frame
from robustbench_deq.records.images import Images, images_path, load_images
from robustbench_deq.records.record import Record, to_json
from robustbench_deq.records.store import RecordStore, load_folders, load_records


def values(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "schema_version": 1,
        "record_id": "run-1",
        "created": "2025-01-31T12:00:00+00:00",
        "model": "deq-conv",
        "model_sha256": None,
        "file_sha256": None,
        "attack": "joint-pgd",
        "label": "joint PGD-40",
        "attack_config": {"steps": 40, "solver": {"name": "anderson"}},
        "threat": {"norm": "l2", "epsilon": 1.0},
        "data": {"name": "digits", "split": "test", "num_samples": 3, "digest": "ab12"},
        "clean_accuracy": 0.83,
        "robust_accuracy": 0.69,
        "robust_accuracy_ci": [0.63, 0.75],
        "adversarial_loss": 0.78,
        "num_unconverged": 0,
        "num_failed": 0,
        "num_nonfinite": 0,
        "num_lagging": 2,
        "num_zero_gradient": None,
        "judge_max_steps": None,
        "finished_by": "sequential",
        "max_perturbation": 1.0,
        "cost": {
            "cell_evals": 41.0,
            "cell_vjps": 40.0,
            "solver_steps": 80.0,
            "wall_seconds": 1.7,
            "peak_memory_mb": 500.0,
            "judge_seconds": 0.9,
        },
        "curve": [
            {
                "step": 10,
                "cell_evals": 10.0,
                "cell_vjps": 10.0,
                "solver_steps": 20.0,
                "wall_seconds": 0.4,
                "robust_accuracy": 0.75,
            }
        ],
        "num_attacked": None,
        "residuals": [0.5, 0.25],
        "diagnostics": {"num_audited": 1.0},
        "protocol": "v1 standard",
        "stages": [
            {
                "name": "joint-pgd",
                "num_attacked": 3,
                "num_broken": 1,
                "cell_evals": 10.0,
                "cell_vjps": 10.0,
                "wall_seconds": 0.4,
            }
        ],
        "num_certified": 0,
        "probes": {"noise": 0.5},
        "seed": 0,
        "batch_size": 128,
        "environment": {"torch": "2.9.0", "threads": 2, "commit": None, "load": 0.5},
    }
    return base | changes


def samples() -> pd.DataFrame:
    return pd.DataFrame({"sample_id": [4, 7, 9], "is_robust": [True, False, True], "loss": [0.1, math.nan, 2.5]})


def store_with(folder: Path, *identifiers: str) -> RecordStore:
    store = RecordStore(folder)
    for identifier in identifiers:
        store.append(Record(**values(record_id=identifier)), samples())
    return store


def test_json_has_exactly_the_documented_fields() -> None:
    assert to_json(Record(**values())) == values()


def test_the_readme_describes_these_very_fields() -> None:
    assert schema_text() in README.read_text(encoding="utf-8"), "run 'python -m benchmarks.schema'"


def test_round_trip_keeps_records_order_and_samples(tmp_path: Path) -> None:
    first, second = Record(**values(record_id="b")), Record(**values(record_id="a", robust_accuracy=1 / 3, seed=7))
    store = RecordStore(tmp_path / "new")
    store.append(first, samples())
    store.append(second, samples().iloc[::-1])
    assert load_records(tmp_path / "new") == [first, second]
    pd.testing.assert_frame_equal(store.load_samples("b"), samples())
    assert store.load_samples("a")["sample_id"].tolist() == [9, 7, 4]


@given(
    accuracy=st.floats(0, 1),
    loss=st.none() | st.floats(),
    residuals=st.lists(st.floats(min_value=0)),
    label=st.text(),
)
def test_any_record_is_strict_json_and_comes_back(accuracy: float, loss: float, residuals: list, label: str) -> None:
    record = Record(**values(robust_accuracy=accuracy, adversarial_loss=loss, residuals=residuals, label=label))
    text = json.dumps(to_json(record), allow_nan=False)
    assert Record(**json.loads(text)) == record


def test_numbers_that_are_not_finite_become_null() -> None:
    record = Record(
        **values(
            adversarial_loss=math.inf,
            residuals=[0.5, math.nan],
            diagnostics={"ratio": math.nan},
            attack_config={"bounds": [-math.inf, 1.0]},
        )
    )
    found = to_json(record)
    assert found["adversarial_loss"] is None
    assert found["residuals"] == [0.5, None]
    assert found["diagnostics"] == {"ratio": None}
    assert found["attack_config"] == {"bounds": [None, 1.0]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"robust_acuracy": 0.5}, "robust_accuracy"),
        ({"threat": {"norm": "l2", "epsilon": 1.0, "radius": 2.0}}, "threat.radius"),
        ({"robust_accuracy": 69.0}, "robust_accuracy"),
        ({"robust_accuracy": math.nan}, "robust_accuracy"),
        ({"robust_accuracy_ci": [0.75, 0.63]}, "lower end"),
        ({"num_failed": -1}, "num_failed"),
        ({"num_lagging": -1}, "num_lagging"),
        ({"num_zero_gradient": 0.5}, "num_zero_gradient"),
        ({"finished_by": "luck"}, "finished_by"),
        ({"record_id": "../../etc/passwd"}, "record_id"),
        ({"created": "yesterday"}, "2025-01-31T12:00:00+00:00"),
        ({"created": "2025-01-31T12:00:00+02:00"}, "2025-01-31T12:00:00+00:00"),
    ],
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)^here: ") as caught:
        validate(Record, values(**changes), "here")
    assert named in str(caught.value)


@pytest.mark.parametrize("field", ["num_nonfinite", "num_lagging", "num_zero_gradient", "finished_by", "num_certified"])
def test_a_line_from_before_a_field_has_it_missing(field: str, tmp_path: Path) -> None:
    store_with(tmp_path, "a")
    path = tmp_path / "records.jsonl"
    older = json.loads(path.read_text())
    del older[field]
    path.write_text(json.dumps(older) + "\n")
    (record,) = load_records(tmp_path)
    assert getattr(record, field) is None
    newer = Record(**values(record_id="b", **{field: "joint" if field == "finished_by" else 5}))
    assert to_frame([record, newer])[field].isna().tolist() == [True, False]


def test_records_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Record(**values()).robust_accuracy = 1.0


def test_torn_last_line_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_with(tmp_path, "a", "b")
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        assert [record.record_id for record in load_records(tmp_path)] == ["a"]
    assert "line 2 is torn" in caplog.text


def test_append_after_a_torn_line_leaves_a_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = store_with(tmp_path, "a", "b")
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    store.append(Record(**values(record_id="b")), samples())
    assert [record.record_id for record in load_records(tmp_path)] == ["a", "b"]
    assert "torn" not in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"schema_version": 1, "record', "one JSON object"),
        (b"[]", "one JSON object"),
        (b"\xff\xfe", "one JSON object"),
        (b"", "one JSON object"),
        (b'{"schema_version": NaN}', "one JSON object"),
        (b'{"schema_version": 1, "label": "\\udcff"}', "one JSON object"),
        (b'{"schema_version": 2}', "expected schema_version 1, got 2; install the newer robustbench-deq"),
        (b'{"schema_version": 0}', "expected schema_version 1, got 0; remove the line"),
        (b'{"schema_version": true}', "expected schema_version 1, got True; remove the line"),
        (b'{"schema_version": "1"}', "expected schema_version 1, got '1'; remove the line"),
        (b'{"schema_version": 1.0}', "expected schema_version 1, got 1.0; remove the line"),
        (b"{}", "expected schema_version 1, got None"),
        (b'{"schema_version": 1}', "record_id: expected"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    store_with(tmp_path, "a")
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(UsageError) as caught:
        load_records(tmp_path)
    assert f"{path}, line 2" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b'{"torn'])
def test_a_folder_without_records_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="robustbench-deq attack"):
        load_records(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        load_records(tmp_path / "missing")


def test_an_identifier_is_used_once(tmp_path: Path) -> None:
    store = store_with(tmp_path, "a")
    before = (tmp_path / "records.jsonl").read_bytes(), store.samples_path("a").read_bytes()
    with pytest.raises(UsageError, match="new identifier"):
        store.append(Record(**values(record_id="a", seed=1)), samples())
    assert ((tmp_path / "records.jsonl").read_bytes(), store.samples_path("a").read_bytes()) == before


def test_samples_must_be_those_of_the_record(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected 3 rows, got 2"):
        RecordStore(tmp_path).append(Record(**values()), samples().head(2))
    assert list(tmp_path.iterdir()) == []


def test_no_line_without_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="No space left on device"):
        store_with(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


def test_no_half_line_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_with(tmp_path, "a")
    before, write = (tmp_path / "records.jsonl").read_bytes(), os.write

    def full(handle: int, line: bytes) -> int:
        if len(line) < 100:
            raise OSError(28, "No space left on device")
        return write(handle, line[:-50])

    monkeypatch.setattr(store.os, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        store_with(tmp_path, "b")
    assert (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("place", ["records.jsonl", "samples"])
def test_links_are_not_followed(place: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "run", tmp_path / "mine"
    folder.mkdir()
    target.write_text("mine, and no line of it is torn")
    if place == "samples":
        target = tmp_path / "folder"
        target.mkdir()
    (folder / place).symlink_to(target)
    with pytest.raises(UsageError, match=rf"{place}: expected a file or folder of the run's own, got a symbolic link"):
        store_with(folder, "a")
    assert (tmp_path / "mine").read_text() == "mine, and no line of it is torn"
    assert place != "samples" or not any(target.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="one that can be written"):
        store_with(tmp_path / "file", "a")


def test_missing_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="check the record_id"):
        RecordStore(tmp_path).load_samples("a")


def test_writers_may_share_a_folder(tmp_path: Path) -> None:
    def append_some(writer: int) -> None:
        store_with(tmp_path, *(f"{writer}-{number}" for number in range(5)))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append_some, range(3)))
    found = [record.record_id for record in load_records(tmp_path)]
    assert sorted(found) == [f"{writer}-{number}" for writer in range(3) for number in range(5)]


def test_appending_parses_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    read = store._parse
    monkeypatch.setattr(store, "_parse", lambda line, where: parsed.append(line) or read(line, where))
    mine, other = RecordStore(tmp_path), RecordStore(tmp_path)
    for number in range(20):
        writer = other if number % 5 == 0 else mine
        writer.append(Record(**values(record_id=f"{number}")), samples())
    assert len(parsed) < 2 * 20  # each line once by either store
    with pytest.raises(UsageError, match="new identifier"):
        mine.append(Record(**values(record_id="15")), samples())


def test_a_record_lies_in_one_folder_only(tmp_path: Path) -> None:
    first, second, again = (tmp_path / name for name in ("first", "second", "again"))
    for folder, name in ((first, "a"), (second, "b"), (again, "a")):
        store_with(folder, name)
    found = load_folders([first, second, first])
    assert [(folder, [record.record_id for record in records]) for folder, records in found.items()] == [
        (first, ["a"]),
        (second, ["b"]),
    ]
    with pytest.raises(
        UsageError, match=r"record a: expected in one folder only, got in .*first and .*again; .*--compare"
    ):
        load_folders([first, second, again])


def test_frame_is_flat_with_a_row_for_each_record() -> None:
    frame = to_frame([Record(**values()), Record(**values(record_id="run-2", diagnostics={}))])
    assert frame["record_id"].tolist() == ["run-1", "run-2"]
    assert frame["threat.epsilon"].tolist() == [1.0, 1.0]
    assert frame["cost.cell_evals"].tolist() == [41.0, 41.0]
    assert frame["robust_accuracy_low"].tolist() == [0.63, 0.63]
    assert frame["robust_accuracy_high"].tolist() == [0.75, 0.75]
    assert frame["attack_config.solver.name"].tolist() == ["anderson", "anderson"]
    assert frame["diagnostics.num_audited"].isna().tolist() == [False, True]
    assert not {"curve", "residuals", "diagnostics"} & set(frame.columns)


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1", b"PAR1"])
def test_samples_that_are_damaged_are_told(content: bytes, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.samples_path("one").parent.mkdir()
    store.samples_path("one").write_bytes(content)
    with pytest.raises(UsageError, match=r"one\.parquet: expected the samples of a record, got a damaged file"):
        store.load_samples("one")


def test_images_that_are_empty_damaged_or_foreign_are_left_out(tmp_path: Path) -> None:
    path = images_path(tmp_path, "one")
    path.parent.mkdir()
    good = np.zeros((2, 1, 4, 4), np.float32)
    whole = dict(zip(Images._fields, (good, good, *[np.zeros(2, int)] * 3), strict=True))
    for changes in (
        {},
        {"clean": good[0]},
        {"labels": good},
        {"adversarial": good.astype(str)},
        {"labels": np.array(3)},
    ):
        np.savez(path, **whole | changes)
        assert (load_images(tmp_path, "one") is None) == bool(changes)
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY", path.read_bytes()[:300]):
        path.write_bytes(content)
        assert load_images(tmp_path, "one") is None


def test_a_line_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UsageError, match="expected a record as one JSON object"):
        load_records(tmp_path)

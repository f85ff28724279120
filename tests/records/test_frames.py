"""`read_frames` gives what was recorded, in long form; DuckDB and Polars read the files themselves to the same end."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest

from robustbench_deq import Norm, Threat
from robustbench_deq import load as load_data
from robustbench_deq.attacks import JointPGD
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import load_model
from robustbench_deq.records import read_frames
from robustbench_deq.records.record import SAMPLE_COLUMNS
from robustbench_deq.records.store import RecordStore

NUM_SAMPLES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records as a run writes them: with a curve, and without."""
    folder = tmp_path_factory.mktemp("run")
    model, data = load_model("test-linear.tiny"), load_data("digits", limit=NUM_SAMPLES)
    for epsilon, num_snapshots in ((0.25, 3), (1.0, 0)):
        attack = JointPGD(Threat(Norm.L2, epsilon))
        found = evaluate(model, attack, data, model_name="tiny", num_snapshots=num_snapshots)
        RecordStore(folder).append(found.record, found.samples)
    return folder


def test_frames_hold_what_was_recorded(folder: Path) -> None:
    frames = read_frames(folder)
    assert frames.records["threat.epsilon"].tolist() == [0.25, 1.0]
    assert set(frames.records["folder"]) == {str(folder)}
    first, second = frames.records["record_id"]
    curve = frames.curve
    assert set(curve["record_id"]) == {first} and curve["step"].is_monotonic_increasing and len(curve) == 3
    assert (curve["solver_steps"].diff().dropna() > 0).all()
    last = frames.records.iloc[0]
    assert curve["solver_steps"].iloc[-1] <= last["cost.solver_steps"]
    assert curve["robust_accuracy"].iloc[-1] == last["robust_accuracy"]
    assert frames.residuals["step"].tolist() == list(range(1, len(frames.residuals) + 1))
    assert frames.samples.columns.tolist() == ["folder", "record_id", *SAMPLE_COLUMNS]
    shares = frames.samples.groupby("record_id", observed=True)["is_robust"].mean()
    assert shares.to_dict() == dict(zip((first, second), frames.records["robust_accuracy"], strict=True))


def test_several_folders_are_told_apart(folder: Path) -> None:
    frames = read_frames(folder, folder / ".." / folder.name)
    assert len(frames.records) == 4
    assert frames.samples.groupby(["folder", "record_id"], observed=True).size().tolist() == [NUM_SAMPLES] * 4


def test_missing_samples_are_left_out_and_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    with caplog.at_level(logging.WARNING):
        frames = read_frames(tmp_path)
    assert len(frames.records) == 2 and len(frames.samples) == 0
    assert caplog.text.count("were left out") == 2


def test_nothing_to_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name one"):
        read_frames()
    with pytest.raises(UsageError, match=r"no records\.jsonl"):
        read_frames(tmp_path)


def test_duckdb_reads_the_files_as_they_lie(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    files = f"read_parquet('{folder}/samples/*.parquet', filename = true)"
    found = duckdb.sql(
        f"SELECT r.threat.epsilon, avg(s.is_robust::INT) AS robust, r.cost.cell_evals "
        f"FROM (SELECT *, parse_filename(filename, true) AS record_id FROM {files}) s "
        f"JOIN '{folder}/records.jsonl' r USING (record_id) GROUP BY ALL ORDER BY 1"
    ).fetchall()
    records = read_frames(folder).records
    assert found == list(
        zip(records["threat.epsilon"], records["robust_accuracy"], records["cost.cell_evals"], strict=True)
    )


def test_polars_reads_the_files_as_they_lie(folder: Path) -> None:
    polars = pytest.importorskip("polars")
    frames = read_frames(folder)
    records = polars.read_ndjson(folder / "records.jsonl", infer_schema_length=None).unnest("threat", "cost")
    assert records["epsilon"].to_list() == frames.records["threat.epsilon"].tolist()
    assert records["cell_evals"].to_list() == frames.records["cost.cell_evals"].tolist()
    points = records.select("record_id", "curve").explode("curve").drop_nulls().unnest("curve")
    assert points["robust_accuracy"].to_list() == frames.curve["robust_accuracy"].tolist()
    samples = polars.read_parquet(folder / "samples" / "*.parquet")
    assert sorted(samples["sample_id"].to_list()) == sorted(frames.samples["sample_id"])
    assert samples.schema["is_robust"] == polars.Boolean and pd.api.types.is_bool_dtype(frames.samples["is_robust"])

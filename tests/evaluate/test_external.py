"""Images that somebody else made: found, checked, judged as an attack's are, and joined with those of attacks."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.text import Text

from robustbench_deq import ExternalImages, evaluate, judge_images, load, load_model
from robustbench_deq.attacks import JointPGD, Noise
from robustbench_deq.commands import main as cli
from robustbench_deq.data import Split
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import Evaluation
from robustbench_deq.models import Linear
from robustbench_deq.records.store import RecordStore, load_records
from robustbench_deq.report.pages.commands import command_of
from robustbench_deq.report.pages.leaderboard import leaderboard_html
from robustbench_deq.report.pages.report import _figures
from robustbench_deq.report.supplements import Supplements, read_supplements
from robustbench_deq.report.tables.leaderboard import Entry, make_leaderboard
from robustbench_deq.report.tables.summary import Format, render, summary_table
from robustbench_deq.threats import Threat

MODEL, THREAT, NUM = "test-linear.tiny", Threat("l2", 0.5), 24


@pytest.fixture(scope="module")
def setup() -> tuple[Linear, Split, Evaluation]:
    """A model, samples that it gets right but for one, and an attack on them that breaks some."""
    model, data = load_model(MODEL), load("digits", limit=NUM)
    y = model(data.x).argmax(1)  # the model is untrained
    y[3] = (y[3] + 1) % 10
    data = Split(data.name, data.split, data.x, y, data.sample_ids, "ab12")
    found = evaluate(model, JointPGD(THREAT, steps=8), data)
    assert 3 < found.samples["is_robust"].sum() < NUM - 3
    return model, data, found


def broken(found: Evaluation) -> np.ndarray:
    return (found.samples["is_clean_correct"] & ~found.samples["is_robust"]).to_numpy().nonzero()[0]


def board(folder: Path, *found: Evaluation) -> tuple[Entry, Supplements]:
    for each in found:
        RecordStore(folder).append(each.record, each.samples)
    records = [each.record for each in found]
    supplements = read_supplements({folder: records})
    (entry,) = make_leaderboard(records, supplements)
    return entry, supplements


def test_images_of_an_attack_get_the_verdicts_that_the_attack_got(setup) -> None:
    model, data, found = setup
    mine = judge_images(model, ExternalImages(found.x_adv, sample_ids=data.sample_ids), data, THREAT, label="theirs")
    same = [
        "sample_id",
        "label",
        "is_clean_correct",
        "is_robust",
        "is_converged",
        "is_failed",
        "adversarial_prediction",
    ]
    assert mine.samples[same].equals(found.samples[same])
    np.testing.assert_allclose(mine.samples["perturbation"], found.samples["perturbation"], atol=1e-6)
    record = mine.record
    assert (record.attack, record.label, record.robust_accuracy) == ("external", "theirs", found.record.robust_accuracy)
    assert (record.model, record.model_sha256) == (found.record.model, found.record.model_sha256)
    assert (record.data, record.threat) == (found.record.data, found.record.threat)
    assert record.num_attacked == NUM and record.cost.cell_evals == 0 < record.cost.judge_seconds


def test_samples_without_an_image_are_left_as_they_are(setup) -> None:
    model, data, found = setup
    rows = broken(found)[::-1].copy()
    for given in (
        {"sample_ids": data.sample_ids[rows]},
        {"sample_ids": data.sample_ids[rows].numpy().astype(np.uint16), "labels": data.y[rows].tolist()},
        {"x": data.x[rows]},
        {"x": (data.x[rows] * 255).round().to(torch.uint8), "labels": data.y[rows]},
        {"x": data.x[rows].double().numpy(), "sample_ids": data.sample_ids[rows]},
    ):
        mine = judge_images(model, ExternalImages(found.x_adv[rows].numpy(), **given), data, THREAT, batch_size=7)
        assert mine.samples["is_robust"].equals(found.samples["is_robust"])
        assert mine.samples["is_attacked"].to_numpy().nonzero()[0].tolist() == sorted(rows)
        assert torch.equal(mine.x_adv[rows], found.x_adv[rows])
        assert (mine.record.num_attacked, mine.record.diagnostics["num_given"]) == (len(rows), len(rows))


def test_an_image_outside_the_ball_proves_nothing(setup, tmp_path: Path) -> None:
    model, data, found = setup
    rows = broken(found)
    small = Threat("l2", 0.4)  # of the attack's images, those on the boundary of the larger ball are outside
    mine = judge_images(model, ExternalImages(found.x_adv[rows], data.sample_ids[rows]), data, small)
    sizes = found.samples["perturbation"][rows]
    assert mine.record.diagnostics["num_outside"] == (sizes > 0.4).sum() > 0
    assert mine.record.max_perturbation <= 0.4 * (1 + 2e-5) + 1e-5
    outside = rows[sizes > 0.4]
    assert mine.samples["is_robust"][outside].all() and not mine.samples["is_attacked"][outside].any()
    noise = evaluate(model, Noise(small), data)
    entry, _ = board(tmp_path, noise, mine)
    assert (entry.num_robust, entry.num_failed) == ((noise.samples.is_robust & mine.samples.is_robust).sum(), 0)


def test_external_images_join_the_union_and_the_leaderboard(setup, tmp_path: Path) -> None:
    model, data, found = setup
    rows = broken(found)
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 - 1 :]
    halves = [
        judge_images(model, ExternalImages(found.x_adv[part], data.sample_ids[part]), data, THREAT, label=label)
        for part, label in ((first, "one"), (second, "two"))
    ]
    noise = evaluate(model, Noise(THREAT), data)
    entry, _ = board(tmp_path, noise, *halves)
    assert entry.num_robust == found.samples["is_robust"].sum() < min(each.samples.is_robust.sum() for each in halves)
    assert (entry.num_in_union, len(entry.records)) == (3, 3)
    assert entry.total("cell_evals") == noise.record.cost.cell_evals
    records = [noise.record, *(each.record for each in halves)]
    table = summary_table(records).set_index("attack")
    assert math.isnan(table.loc["one", "cell_evals"]) and table.loc["noise", "cell_evals"] > 0
    (line,) = (line for line in render(summary_table(records), Format.MARKDOWN).splitlines() if "| one" in line)
    assert line.count(" – |") >= 3
    assert "judge test-linear.tiny" in leaderboard_html([entry])


def test_figures_of_cost_leave_external_images_out_unless_there_is_nothing_else(setup) -> None:
    model, data, found = setup
    mine = judge_images(model, ExternalImages(found.x_adv, data.sample_ids), data, THREAT, label="theirs")
    for records, is_drawn in (([mine.record], True), ([mine.record, found.record], False)):
        figure, _ = _figures(records, make_leaderboard(records, Supplements()), ())["accuracy_against_cell_evals"]
        assert ("theirs" in [text.get_text() for text in figure.findobj(Text)]) == is_drawn


GOOD = np.zeros((2, 1, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "expected a .npz file with a plain array 'x_adv', and 'sample_ids' or 'x'"),
        ({"x_adv": GOOD}, "expected 'sample_ids' or the clean images 'x', got neither"),
        ({"x_adv": GOOD[:, 0], "sample_ids": [0, 1]}, "add the axis of the channel"),
        ({"x_adv": GOOD[:0], "sample_ids": []}, "expected images (n, 1, 8, 8)"),
        ({"x_adv": GOOD + 2, "sample_ids": [0, 1]}, "expected uint8 or finite floats in [0, 1]"),
        ({"x_adv": GOOD * np.nan, "sample_ids": [0, 1]}, "NaN or infinite values in 2 of 2 images"),
        ({"x_adv": GOOD.astype(complex), "sample_ids": [0, 1]}, "images of type complex128"),
        ({"x_adv": GOOD, "sample_ids": [0.0, 1.0]}, "sample_ids: expected 2 integers >= 0"),
        ({"x_adv": GOOD, "sample_ids": [5, 10**9]}, "sample_ids: expected ids of the first 24 samples of digits test"),
        ({"x_adv": GOOD, "sample_ids": "twice"}, "one image a sample, got several of 1 samples, such as"),
        (
            {"x_adv": GOOD, "x": GOOD},
            "x: expected clean images of the first 24 samples of digits test, got 2 of 2 that are not",
        ),
        ({"x_adv": GOOD, "x": GOOD[:1]}, "x: expected 2 clean images, got 1"),
        ({"x_adv": GOOD, "x": GOOD, "sample_ids": "known"}, "got 2 of 2 that are not, the first at index 0"),
        (
            {"x_adv": GOOD, "labels": [10, 10], "sample_ids": "known"},
            "labels: expected those of the first 24 samples of digits test",
        ),
        ({"x_adv": GOOD, "labels": [[1], [1]], "sample_ids": "known"}, "labels: expected an integer tensor (2,)"),
        ({"x_adv": GOOD, "attack": [1, 2], "sample_ids": "known"}, "attack: expected one text, got int64 (2,)"),
    ],
)
def test_files_that_cannot_be_judged_are_refused_in_one_line(
    setup, arrays: dict[str, Any], said: str, tmp_path
) -> None:
    model, data, _ = setup
    ids = {"known": data.sample_ids[:2].numpy(), "twice": data.sample_ids[[0, 0]].numpy()}
    given = arrays.get("sample_ids")
    np.savez(tmp_path / "theirs.npz", **arrays | ({"sample_ids": ids[given]} if isinstance(given, str) else {}))
    with pytest.raises(UsageError) as caught:
        judge_images(model, tmp_path / "theirs.npz", data, THREAT)
    assert said in str(caught.value) and "theirs.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_unpickled(setup, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return pytest.fail, ("unpickled",)

    objects = np.empty((2, 1, 8, 8), dtype=object)
    objects[:] = Canary()
    for name in ("x_adv", "sample_ids", "attack"):
        np.savez(tmp_path / "theirs.npz", **{"x_adv": GOOD, "sample_ids": np.arange(2), name: objects})
        with pytest.raises(UsageError, match="an unusable file"):
            judge_images(setup[0], tmp_path / "theirs.npz", setup[1], THREAT)


# ---------------------------------------------------------------- the command line


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cli.main, ["judge", MODEL, *map(str, words)])


def test_the_command_judges_a_file_and_leaves_a_record(setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = setup[0], load("digits", limit=NUM)  # with its own labels: the untrained model is mostly wrong
    found = evaluate(model, JointPGD(THREAT, steps=8), data)
    keep = found.samples["is_attacked"].to_numpy().nonzero()[0][:3]
    np.savez("theirs.npz", x_adv=found.x_adv[keep].numpy(), sample_ids=data.sample_ids[keep].numpy(), attack="PGD\n 8")
    words = ("theirs.npz", "--epsilon", "0.5", "--data", "digits", "--limit", NUM)
    said = invoke(*words, "--out", "run")
    assert said.exit_code == 0 and "images given      3 of 24; the other samples are left" in said.stdout
    assert "unknown" in said.stdout and "cell evaluations" not in said.stdout
    (record,) = load_records(tmp_path / "run")
    assert (record.label, record.data) == ("theirs", found.record.data)
    assert record.attack_config["attack"] == "PGD 8" and len(record.attack_config["file_sha256"]) == 64
    assert (tmp_path / "run" / "images" / f"{record.record_id}.npz").is_file()
    again = CliRunner().invoke(cli.main, [*shlex.split(command_of(record))[1:], "--json"])
    assert again.exit_code == 0
    told = json.loads(again.stdout)
    assert (told["robust_accuracy"], told["label"]) == (record.robust_accuracy, "theirs")
    outside = invoke("theirs.npz", "--epsilon", "0.001", "--data", "digits", "--limit", NUM)
    assert "outside the ball  3: left as they are" in outside.stdout


def test_the_command_refuses_before_it_makes_a_folder(setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("theirs.npz", x_adv=GOOD, sample_ids=setup[1].sample_ids[[0, 20]].numpy())
    for words, said in (
        (("theirs.npz", "--epsilon", "1", "--limit", 8), "got 1 of 2 that are not, the first at index 1"),
        (("missing.npz", "--epsilon", "1"), "got no such file"),
        (("theirs.npz",), "--epsilon: expected a radius"),
        (("theirs.npz", "--epsilon", "1", "--norm", "l7"), "norm: expected"),
    ):
        answer = invoke(*words, "--out", "run")
        assert answer.exit_code == 2 and said in answer.stderr and len(answer.stderr.splitlines()) == 1
        assert not (tmp_path / "run").exists()

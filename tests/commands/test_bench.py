"""`bench` as it is called: exit codes, what it refuses, and what it says on standard error."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from benchmarks.kills import contents
from robustbench_deq.commands import main as cli
from robustbench_deq.commands import suite_run
from robustbench_deq.records.missing import read_missing
from robustbench_deq.records.store import RecordStore, load_records
from robustbench_deq.report.settings import Setting, group_by_setting, setting_names
from robustbench_deq.runner.executors import Ray
from robustbench_deq.runner.shards import ShardStore
from robustbench_deq.runner.suite import SuiteConfig
from tests.runner.small_suite import runs_of, suite

ROOT = Path(__file__).parents[2]
CUDA_IS_MISSING = ("RuntimeError: Found no NVIDIA driver", "AssertionError: Torch not compiled with CUDA")
FAILING_MODEL = """
from robustbench_deq.models import load_model
def build():
    {line}
    return load_model("test-linear.tiny")
"""


def bench(path: Path, *words: object) -> Result:
    return CliRunner().invoke(cli.main, ["bench", str(path), *map(str, words)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "small.yaml")


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(suite(**changes).model_dump(mode="json")))  # JSON is YAML
    return path


def test_suite_leaves_its_records(path: Path, undisturbed: Path, tmp_path: Path) -> None:
    result = bench(path, "--out", tmp_path / "new")
    assert result.exit_code == 0
    said = r"small  0/12 shards\n\d+ s; attack and judge took \d+ s, all workers together\n"
    assert re.fullmatch(said, result.stderr)
    assert (
        result.stdout
        == f"4 of 4 records in {tmp_path / 'new'}; 'robustbench-deq report {tmp_path / 'new'}' shows them\n"
    )
    assert contents(tmp_path / "new") == contents(undisturbed)


def readme_suite() -> dict[str, Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return yaml.safe_load(next(block for block in blocks if block.startswith("name: gate")))


def test_suite_of_the_readme_runs_on_a_model_of_ones_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "gate.yaml"
    path.write_text(json.dumps(readme_suite()))
    result = bench(path, "--set", "limit=8", "--set", "attacks=[{name: noise}]", "--out", tmp_path / "new")
    assert result.exit_code == 0 and result.stdout.startswith("2 of 2 records")
    assert bench(path, "--dry-run").exit_code == 0


def test_readme_names_every_key_of_a_suite() -> None:
    text = (ROOT / "README.md").read_text()
    keys = text[text.index("- **Keys**") : text.index("- **Budgets**")]
    assert [key for key in SuiteConfig.model_fields if f"`{key}`" not in keys] == []


def test_part_of_a_file_of_ones_own_is_named(tmp_path: Path) -> None:
    data = f"npz:{tmp_path / 'mine.npz'}"
    np.savez(tmp_path / "mine.npz", images=np.zeros((12, 1, 8, 8), np.uint8), labels=np.arange(12) % 3)
    path = write(tmp_path / "small.yaml", data=data)
    said = f"{data}: test split: 3 of 12 images; split: all with limit: 12 takes all\n"
    assert bench(path, "--dry-run").stderr == said
    assert bench(path, "--dry-run", "--set", "split=all").stderr == ""


def test_interrupted_suite_says_how_to_go_on(path: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite_run, "run_suite", interrupt)
    result = bench(path, "--out", tmp_path / "new")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[1:] == [
        "Error: interrupted; 0 of 12 shards are done and kept, go on with --resume"
    ]
    words = "report", str(tmp_path / "new")
    assert "got no records.jsonl in it" in CliRunner().invoke(cli.main, words).stderr
    again = bench(path, "--out", tmp_path / "new")
    assert again.exit_code == 2 and "got that of a suite; add --resume, or name another" in again.stderr


def test_a_folder_that_is_removed_meanwhile_is_exit_code_1_and_can_be_resumed(
    path: Path, undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
    save, folder, calls = ShardStore.save, tmp_path / "new", []

    def remove_at_the_fifth(self: ShardStore, *args: Any) -> None:
        save(self, *args)
        calls.append(1)
        if len(calls) == 5:
            shutil.rmtree(folder)

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "save", remove_at_the_fifth)
        result = bench(path, "--out", folder)
    assert result.exit_code == 1 and result.stdout.startswith("2 of 4 records")
    said = (
        f"Error: 2 of 4 records are missing: files were removed from {folder} while the suite ran; go on with --resume"
    )
    assert result.stderr.splitlines()[-1] == said
    assert bench(path, "--out", folder, "--resume").exit_code == 0
    assert sorted(contents(folder), key=str) == sorted(contents(undisturbed), key=str)


def test_a_link_in_the_folder_is_refused_before_anything_is_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".a.partial").touch()
    (tmp_path / "new" / "shards").symlink_to(tmp_path / "mine")
    result = bench(path, "--out", tmp_path / "new", "--resume")
    assert result.exit_code == 2 and "new/shards: expected a file or folder of the run's own" in result.stderr
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == [".a.partial"]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["shards"]


@pytest.mark.parametrize("name", ["../mine", "/tmp/mine", "..", ".", "", "a/b", "a\0b", "a\nb", "x" * 300])
def test_the_name_of_a_suite_is_that_of_one_folder(name: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite().model_dump(mode="json") | {"name": name}))
    monkeypatch.chdir(tmp_path)
    result = bench(path)
    assert result.exit_code == 2 and "name: expected a name of one folder: no /" in result.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize("is_first", [True, False], ids=["suite.json", "records.jsonl"])
def test_a_full_disk_names_resume_and_keeps_what_there_is(
    is_first: bool, path: Path, undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*(suite_run, "claim_folder") if is_first else (RecordStore, "append"), full)
        result = bench(path, "--out", tmp_path / "new")
    assert result.exit_code == 1 and result.stdout == ""
    said = "Error: no space left on the disk; finished shards are kept: make room, and go on with --resume"
    assert result.stderr.splitlines()[-1] == said
    assert len(list((tmp_path / "new" / "shards").glob("*.parquet"))) == (0 if is_first else 12)
    assert bench(path, "--out", tmp_path / "new", "--resume").exit_code == 0
    assert contents(tmp_path / "new") == contents(undisturbed)


def test_records_without_a_gradient_are_told_of(tmp_path: Path) -> None:
    hard = "return EquilibriumModel.from_callables(lambda x: net.inject(x.round()), net.cell, net.head, **sizes)"
    (tmp_path / "rounded.py").write_text(
        "from robustbench_deq import EquilibriumModel, load_model\ndef build():\n"
        "    net, sizes = load_model('deq-fc.digits-joint-l2'), {'input_shape': (1, 8, 8), 'num_classes': 10}\n"
        f"    {hard}\n"
    )
    attacks = [{"name": "pgd", "label": "mine", "config": {"steps": 2}}]
    threats = [{"norm": "l2", "epsilons": [0.1]}]
    models = [f"{tmp_path / 'rounded.py'}:build"]
    path = write(tmp_path / "small.yaml", models=models, attacks=attacks, threats=threats, limit=8)
    result = bench(path, "--out", tmp_path / "new")
    assert result.exit_code == 0
    records = load_records(tmp_path / "new")
    assert all(record.num_zero_gradient == record.num_attacked > 0 for record in records)
    told = (
        f"{len(records)} of {len(records)} robust accuracies may be too high: mine on {models[0]} met a zero gradient"
    )
    assert told in result.stderr


IN_BATCHES = """
    model = load_model("test-linear.tiny")
    cell = model.cell
    def failing(z, u):
        if len(z) > 2:
            raise RuntimeError('no luck')
        return cell(z, u)
    model.cell = failing
    return model
"""
"""Code of a model that is well on the two images that are tried beforehand."""


def test_failed_shards_are_named_the_rest_is_done_and_the_exit_code_is_one(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FAILING_MODEL.format(line=IN_BATCHES))
    models = ["test-linear.tiny", f"{tmp_path / 'model.py'}:build"]
    path = write(tmp_path / "small.yaml", models=models, attacks=[{"name": "noise"}], limit=8)
    result = bench(path, "--out", tmp_path / "new")
    assert result.exit_code == 1
    _, *named, _, last = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in named] == ["small  failed"] * 2
    assert all(f"{models[1]}, noise, l2 0." in line and "no luck" in line for line in named)
    assert last.startswith("Error: 2 of 4 shards failed: 2 x ") and last.endswith("try them again with --resume")
    assert "2 of 4 records" in result.stdout and len(load_records(tmp_path / "new")) == 2
    assert read_missing(tmp_path / "new", known(tmp_path / "new")).failed.total() == 2
    (tmp_path / "model.py").write_text(FAILING_MODEL.format(line="pass"))
    assert bench(path, "--out", tmp_path / "new", "--resume").exit_code == 0
    assert len(load_records(tmp_path / "new")) == 4  # of a model that is another one, so the old failures tell of none
    assert not read_missing(tmp_path / "new", known(tmp_path / "new"))


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise RuntimeError('no luck')", "expected a model, got RuntimeError: no luck, in "),
        ("return 5", "got int"),
        ("return load_model('deq-conv.fashion-standard')", "images"),
        (
            "m = load_model('test-linear.tiny'); m.inject = lambda x: type(m).inject(m, x.detach()); return m",
            "a gradient",
        ),
    ],
    ids=["raises", "no-model", "shape", "no-gradient"],
)
def test_a_bad_model_of_a_file_is_refused_before_any_work(
    line: str, said: str, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(FAILING_MODEL.format(line=line))
    models = ["test-linear.tiny", f"{tmp_path / 'model.py'}:build"]
    path = write(tmp_path / "small.yaml", models=models, attacks=[{"name": "pgd"}], limit=8)
    result = bench(path, "--out", tmp_path / "new", *words)
    assert result.exit_code == 2 and result.stdout == "" and not (tmp_path / "new").exists()
    assert said in result.stderr.splitlines()[-1]


def known(folder: Path) -> set[str]:
    return {record.record_id for record in load_records(folder)}


def test_two_versions_of_a_file_are_two_models(tmp_path: Path) -> None:
    file, path = tmp_path / "model.py", tmp_path / "small.yaml"
    write(path, models=[f"{file}:build"], attacks=[{"name": "noise"}], limit=8, threats=[{"epsilons": [0.3]}])
    records = []
    for version in ("pass", "print('the second')"):
        file.write_text(FAILING_MODEL.format(line=version))
        assert bench(path, "--out", tmp_path / version[:5]).exit_code == 0
        records += load_records(tmp_path / version[:5])
    first, second = records
    assert first.model == second.model and None not in (digests := {first.file_sha256, second.file_sha256})
    assert len(digests) == len(group_by_setting(records)) == 2
    names = setting_names(map(Setting.of, records))
    assert {name.model for name in names.values()} == {f"{file}:build ({digest[:8]})" for digest in digests}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attacks": [{"name": "pgd", "grid": {"steps": list(range(1, 200)), "max_steps": list(range(1, 200))}}]},
            "10000 runs",
        ),
        ({"attacks": [{"name": "pgd", "grid": {key: list(range(1000)) for key in "abcdefgh"}}]}, "10000 runs"),
        ({"limit": 500, "batch_size": 1, "seeds": list(range(101))}, "100000 shards"),
    ],
)
def test_lists_that_multiply_out_to_too_much_are_refused_before(changes: dict, said: str, tmp_path: Path) -> None:
    result = bench(write(tmp_path / "large.yaml", **changes), "--dry-run")
    assert result.exit_code == 2 and f"suite: expected at most {said}" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("threats: [{norm: linf, epsilons: [0.1, 0.10]}]", "threats.0.epsilons: expected every value once"),
        ("threats: [{epsilons: [1]}, {epsilons: [1.0]}]", "threats: expected every threat once"),
        ("seeds: [1, 1]", "seeds: expected every value once"),
        ("data: [digits, digits]", "data: expected every value once"),
        ("models: []", "models: expected at least 1 item, got []"),
        ("limit: 2.5", "limit: expected a valid integer, got 2.5"),
        ("name: " + "x" * 300, "name: expected"),
        ("limit: 2024-13-45", "limit: expected a valid integer, got '2024-13-45'"),
        ("limit: 1e400", "limit: expected a valid integer"),
    ],
)
def test_values_that_no_suite_has_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    whole = json.loads(write(tmp_path / "small.yaml").read_text()) | yaml.safe_load(
        text.replace("2024-13-45", "'2024-13-45'")
    )
    key = text.partition(":")[0]
    lines = [text if name == key else f"{name}: {json.dumps(value)}" for name, value in whole.items()]
    (tmp_path / "small.yaml").write_text("\n".join(lines))
    result = bench(tmp_path / "small.yaml", "--dry-run")
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_folder_with_something_is_refused_without_resume(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    result = bench(path, "--out", folder)
    assert result.exit_code == 2 and "expected an empty or new folder" in result.stderr
    result = bench(path, "--out", folder, "--resume")
    assert result.exit_code == 2 and "expected the suite.json of an earlier run, got none" in result.stderr
    assert [entry.name for entry in folder.iterdir()] == ["thesis.tex"]


def test_resume_does_what_is_missing(path: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert bench(path, "--out", folder).exit_code == 0
    lost = runs_of(suite())[2][1][1]
    (folder / "shards" / f"{lost.key}.json").unlink()
    before = {entry.name: entry.stat().st_mtime_ns for entry in (folder / "shards").glob("*.json")}
    (folder / "records.jsonl").unlink()
    result = bench(path, "--out", folder, "--resume")
    assert result.exit_code == 0 and "4 of 4 records" in result.stdout
    after = {entry.name: entry.stat().st_mtime_ns for entry in (folder / "shards").glob("*.json")}
    assert after == before | {f"{lost.key}.json": after[f"{lost.key}.json"]}
    assert contents(folder) == contents(undisturbed)


def test_device_of_this_machine_is_checked_here(path: Path, tmp_path: Path) -> None:
    result = bench(path, "--out", tmp_path / "new", "--device", "abacus")
    assert result.exit_code == 2 and "--device: expected cpu, cuda" in result.stderr and not (tmp_path / "new").exists()
    if not torch.cuda.is_available():
        assert bench(path, "--out", tmp_path / "new", "--device", "cuda").exit_code == 2


def test_folder_is_checked_before_a_cluster_is_started(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Ray, "__init__", lambda *_: pytest.fail("a cluster was started"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for more in ([], ["--resume"]):
        assert bench(path, "--out", tmp_path / "other", "--executor", "ray", *more).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_worker_without_a_name_of_a_device_looks_for_itself(path: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = bench(path, "--out", tmp_path / "new")  # where there is none, CUDA says why in every shard
    assert result.exit_code == 1
    assert ShardStore(tmp_path / "new").reason(runs_of(suite())[0][1][0]).startswith(CUDA_IS_MISSING)

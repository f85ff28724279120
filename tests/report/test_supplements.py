"""What lies beside records: descriptions of their models, read without torch, say what the loader of models says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustbench_deq.commands.report import WEIGHTS_FOLDER
from robustbench_deq.models import MODELS, describe_model, load_model, save_model, zoo
from robustbench_deq.report.supplements import read_model_facts


def test_facts_of_all_registered_models_are_those_of_the_zoo() -> None:
    assert WEIGHTS_FOLDER == zoo.WEIGHTS_FOLDER
    saved = [name for name in MODELS if MODELS.get(name).folder is not None]
    found = read_model_facts(MODELS, WEIGHTS_FOLDER)
    assert len(saved) > 20 and list(found) == sorted(saved)
    for name in saved:
        described = describe_model(name).model_dump(mode="json")
        assert found[name].items() >= {key: described[key] for key in described if key != "card"}.items()
        assert {key: found[name]["card"].get(key, value) for key, value in described["card"].items()} == described[
            "card"
        ]


def test_facts_of_a_folder_and_of_no_model(tmp_path: Path) -> None:
    folder = str(tmp_path / "mine")
    described = save_model(load_model("test-linear.tiny"), folder, "mine")
    names = [folder, "mine.py:build", "../weights", "", str(tmp_path / "none")]
    assert read_model_facts(names, WEIGHTS_FOLDER) == {folder: described.model_dump(mode="json")}


@pytest.mark.parametrize("change", [{"card": None}, {"sha256": 3}, {"family": None}, None])
def test_facts_that_are_damaged_are_left_out_with_a_warning(change: dict | None, tmp_path: Path, caplog) -> None:
    save_model(load_model("test-linear.tiny"), tmp_path, "mine")
    path = tmp_path / "model.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert read_model_facts([str(tmp_path)], WEIGHTS_FOLDER) == {}
    assert str(path) in caplog.text

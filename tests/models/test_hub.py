"""Models to and from the hub's folders and cache, without a network: the same bits, the digest checked."""

from __future__ import annotations

import builtins
import importlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from robustbench_deq.errors import UsageError
from robustbench_deq.models import Card, load_folder, load_model

huggingface_hub = pytest.importorskip("huggingface_hub")
from robustbench_deq.models.hub import HubModel  # noqa: E402

COMMIT = "0" * 40
CARD = Card(
    data="digits", threat={"norm": "l2", "epsilon": 0.5}, robust_accuracy=0.625, evaluation={"norm": "l2", "config": {}}
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub_model(make_model) -> HubModel:
    return HubModel(make_model("deq-fc", dtype=torch.float32, seed=4), "deq-fc.mine", CARD)


def in_cache(folder: Path, cache: Path, repo: str) -> None:
    """Lay `folder` into a cache of the hub's as if `repo` had been downloaded."""
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


def is_same(one: HubModel, other: HubModel) -> bool:
    states = one.model.state_dict(), other.model.state_dict()
    return (one.name, one.card, one.model.config) == (other.name, other.card, other.model.config) and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


def test_a_folder_of_the_hub_is_a_saved_model_and_comes_back(hub_model: HubModel, tmp_path: Path) -> None:
    hub_model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.json", "model.safetensors", "README.md"} <= names <= {
        "model.json", "model.safetensors", "README.md", "config.json",
    }  # fmt: skip
    again = HubModel.from_pretrained(tmp_path / "saved")
    assert is_same(again, hub_model) and not again.model.training
    assert torch.equal(load_folder(tmp_path / "saved").readout.weight, hub_model.model.readout.weight)


def test_what_is_pushed_can_be_pulled(hub_model: HubModel, tmp_path: Path, monkeypatch) -> None:
    def upload(self: object, *, repo_id: str, folder_path: Path, **_: object) -> str:
        in_cache(Path(folder_path), tmp_path, repo_id)
        return "pushed"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert hub_model.push_to_hub("me/mine") == "pushed"
    assert is_same(HubModel.from_pretrained("me/mine", cache_dir=tmp_path, local_files_only=True), hub_model)


def test_a_registered_model_goes_with_its_card(tmp_path: Path) -> None:
    HubModel.of("deq-fc.digits-standard").save_pretrained(tmp_path / "saved")
    again = HubModel.from_pretrained(tmp_path / "saved")
    assert again.name == "deq-fc.digits-standard" and again.card.test_samples == 513
    assert torch.equal(again.model.readout.weight, load_model("deq-fc.digits-standard").readout.weight)


def test_the_readme_says_what_the_card_does(hub_model: HubModel, tmp_path: Path) -> None:
    hub_model.save_pretrained(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("---\n") and "library_name: robustbench-deq" in readme
    assert "# deq-fc.mine" in readme and "| robust accuracy | 0.625 |" in readme and "command" not in readme


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_flipped_byte_is_refused(place: str, hub_model: HubModel, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    hub_model.save_pretrained(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    in_cache(folder, tmp_path / "cache", "me/mine")
    with pytest.raises(UsageError, match="expected sha256"):
        if place == "folder":
            HubModel.from_pretrained(folder)
        else:
            HubModel.from_pretrained("me/mine", cache_dir=tmp_path / "cache", local_files_only=True)


def test_pickled_weights_are_not_looked_at(hub_model: HubModel, tmp_path: Path) -> None:
    hub_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"model\.safetensors: expected the weights, got No such file"):
        HubModel.from_pretrained(tmp_path)


def test_config_json_decides_nothing(hub_model: HubModel, tmp_path: Path) -> None:
    hub_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"name": "another", "card": {}, "model": 3, "surplus": 4}))
    assert is_same(HubModel.from_pretrained(tmp_path), hub_model)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "robustbench_deq.models.hub")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"expected the package huggingface_hub, got none; pip install .*\[hub\]"):
        importlib.import_module("robustbench_deq.models.hub")


def test_the_package_is_not_imported_unless_used() -> None:
    code = "import robustbench_deq.models, sys; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120).returncode == 0

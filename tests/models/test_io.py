"""Saved models come back bit by bit, and nothing damaged, foreign or unknown is taken for a model."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attacks import ATTACKS
from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError
from robustbench_deq.files import sha256_of
from robustbench_deq.models import FAMILIES, MODELS, Card, describe_model, load_folder, load_model, save_model
from robustbench_deq.models.zoo import WEIGHTS_FOLDER

ROOT = Path(__file__).parents[2]
SOURCE = """
import torch
from robustbench_deq.models import Linear, LinearConfig

def build():
    return Linear(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).train()

def other():
    return torch.nn.Linear(3, 3)

def fails():
    raise RuntimeError("no weights here\\nsecond line")

def needs(argument):
    return build()

constant = 3
"""


@pytest.fixture
def saved(make_model, tmp_path: Path) -> Callable[[str], Path]:
    """`saved(family)`: the folder of a small untrained model."""

    def save(family: str) -> Path:
        folder = tmp_path / family
        save_model(make_model(family, dtype=torch.float32), folder, f"{family}.mine")
        return folder

    return save


def change(folder: Path, **values: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Spoil the tensors of a folder whose digest stays right."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    spoil(tensors)
    save_file(tensors, path)
    change(folder, sha256=sha256_of(path))


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_saved_model_comes_back_bit_by_bit(family: str, make_model, make_images, tmp_path: Path) -> None:
    model, x = make_model(family, dtype=torch.float32, seed=3), make_images(4, torch.float32)
    card = Card(data="mine", clean_accuracy=0.5, threat={"norm": "l2", "epsilon": 1.0}, robust_accuracy_ci=(0.1, 0.2))
    description = save_model(model.train(), tmp_path / "new" / "folder", "mine", card)
    assert model.training
    for load in (load_folder, lambda folder: load_model(str(folder))):
        again = load(tmp_path / "new" / "folder")
        assert type(again) is type(model) and again.config == model.config and not again.training
        again.solve, again.adjoint = model.solve, model.adjoint
        with torch.no_grad():
            assert torch.equal(again(x), model.eval()(x))
    assert describe_model(str(tmp_path / "new" / "folder")) == description
    assert description.card == card
    assert description.num_parameters == sum(p.numel() for p in model.parameters())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_again_replaces_both_files(make_model, make_images, tmp_path: Path) -> None:
    first, second = (make_model("deq-fc", dtype=torch.float32, seed=seed) for seed in (1, 2))
    one = save_model(first, tmp_path, "mine")
    two = save_model(second, tmp_path, "mine")
    assert one.sha256 != two.sha256 and describe_model(str(tmp_path)) == two
    assert torch.equal(load_folder(tmp_path).readout.weight, second.readout.weight)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_flipped_byte_is_refused_by_its_digest(share: float, saved) -> None:
    folder = saved("deq-fc")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors: expected sha256 [0-9a-f]{12}\.\.\., got [0-9a-f]{12}"):
        load_folder(folder)


def test_a_missing_file_is_named(saved) -> None:
    folder = saved("deq-fc")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors: expected the weights, got No such file"):
        load_folder(folder)
    (folder / "model.json").unlink()
    with pytest.raises(UsageError, match=r"model\.json: expected a model description, got no such file"):
        load_model(str(folder))


def test_a_missing_surplus_or_misshapen_tensor_is_named(saved) -> None:
    folder = saved("deq-fc")
    whole = (folder / "model.safetensors").read_bytes()
    for spoil, said in (
        (lambda tensors: tensors.pop("readout.bias"), "readout.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "extra"),
        (lambda tensors: tensors.update({"readout.bias": torch.zeros(7)}), "readout.bias"),
    ):
        (folder / "model.safetensors").write_bytes(whole)
        change_tensors(folder, spoil)
        with pytest.raises(UsageError, match=r"expected this family's tensors, got .*" + said):
            load_folder(folder)


def test_weights_that_are_no_safetensors_are_refused(saved) -> None:
    folder = saved("deq-fc")
    (folder / "model.safetensors").write_bytes(b"\x80\x04not weights")
    change(folder, sha256=sha256_of(folder / "model.safetensors"))
    with pytest.raises(UsageError, match="expected this family's tensors"):
        load_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"schema_version": 1}', "\x00"])
def test_a_description_that_is_none_is_refused(content: str, saved) -> None:
    folder = saved("deq-fc")
    (folder / "model.json").write_text(content)
    with pytest.raises(UsageError, match=r"model\.json"):
        load_folder(folder)


def test_config_or_name_of_another_family_is_refused(saved) -> None:
    folder = saved("deq-fc")
    change(folder, family="mondeq-fc")
    with pytest.raises(UsageError, match="unknown key 'activation'"):
        load_folder(folder)
    change(folder, family="deq-fk")
    with pytest.raises(UsageError, match="unknown family: expected one of deq-fc"):
        load_folder(folder)
    change(folder, family="deq-fc", config={"input_shape": [1, 4, 4], "num_classes": 3, "hidden": 7})
    with pytest.raises(UsageError, match="expected this family's tensors"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"config": {"input_shape": [1, 4, 4], "hiden": 6}}, "unknown key 'hiden': expected one of hidden"),
        ({"config": {"input_shape": [1, 4, 4], "hidden": "six"}}, "hidden: expected"),
        ({"config": {"hidden": 6}}, "input_shape: expected"),
        ({"config": 3}, "config: expected"),
        ({"surplus": 1}, "unknown key 'surplus'"),
        ({"card": {"clean_acuracy": 0.5}}, "unknown key 'card.clean_acuracy': expected one of clean_accuracy"),
    ],
)
def test_keys_and_types_of_the_description_are_checked(values: dict, said: str, saved) -> None:
    folder = saved("deq-fc")
    change(folder, **values)
    with pytest.raises(UsageError) as caught:
        load_folder(folder)
    assert said in str(caught.value) and "model.json" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- names and files


def test_an_unknown_name_lists_the_close_ones() -> None:
    for load in (load_model, describe_model):
        with pytest.raises(UsageError) as caught:
            load("test-linear.tini")
        assert "test-linear.tiny" in str(caught.value) and "robustbench-deq models" in str(caught.value)


def test_a_function_in_a_file_builds_a_model(tmp_path: Path, make_images) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    model = load_model(f"{path}:build")
    assert not model.training
    assert model(make_images(2, torch.float32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", "expected a model, got RuntimeError: no weights here; correct the file"),
        ("missing", "expected a function 'missing' in the file, got none"),
        ("constant", "expected a function 'constant' in the file, got none"),
        ("other", "expected an EquilibriumModel, got Linear"),
        ("needs", "expected a model, got TypeError"),
        ("", "expected a function '' in the file"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(function: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    with pytest.raises(UsageError) as caught:
        load_model(f"{path}:{function}")
    assert said in str(caught.value)


@pytest.mark.parametrize("source", ["1 / 0", "def build(:", "import no_such_module", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_run_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UsageError, match="expected a model, got"):
        load_model(f"{path}:build")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected file\.py:function, got no such file"):
        load_model(f"{tmp_path}/none.py:build")


# ---------------------------------------------------------------- the zoo


@pytest.mark.parametrize("name", list(MODELS))
def test_registered_model_loads_and_fits_its_card(name: str) -> None:
    model, described = load_model(name), describe_model(name)
    assert not model.training
    assert described.name == name and described.family == model.family == name.split(".")[0]
    assert described.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    x = torch.rand(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (2, model.num_classes) and bool(torch.isfinite(logits).all())
    card = described.card
    if name.startswith("test-"):
        return
    assert described.sha256 == sha256_of(MODELS.get(name).folder / "model.safetensors")
    assert card.data and card.command.startswith("robustbench-deq train ")
    assert card.test_samples >= 100 and card.train_minutes > 0
    assert 0.5 < card.clean_accuracy <= 1
    assert 0 <= card.robust_accuracy < card.clean_accuracy
    assert card.robust_accuracy_ci[0] <= card.robust_accuracy <= card.robust_accuracy_ci[1]
    assert {"norm", "epsilon", "attack", "config"} <= card.evaluation.keys()
    assert (card.threat is None) == name.endswith("-standard")
    assert card.spectral_radius is not None and card.mean_solver_steps is not None
    configs = [part for part in shlex.split(card.command) if part.endswith(".yaml")]
    assert configs and all((ROOT / path).is_file() for path in configs)
    kind = ATTACKS.get(card.evaluation["attack"])
    settings = {key: value for key, value in card.evaluation["config"].items() if key != "targeted"}
    assert validate(kind.config_type, settings, name).model_dump(mode="json") == settings


def test_shipped_weights_are_small_and_all_registered() -> None:
    files = [path for path in WEIGHTS_FOLDER.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) < 20e6
    folders = {MODELS.get(name).folder for name in MODELS} - {None}
    assert {path.parent for path in files} == folders
    assert {path.name for path in files} == {"model.json", "model.safetensors"}

"""Saved models come back bit by bit, and nothing damaged, foreign or unknown is taken for a model."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.configs import validate
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.files import sha256_of
from robustbench_deq.models import (
    FAMILIES,
    MODELS,
    Card,
    cards,
    describe_model,
    io,
    list_models,
    load_folder,
    load_model,
    save_model,
)
from robustbench_deq.models.zoo import WEIGHTS_FOLDER, ModelEntry
from robustbench_deq.optimise import Norm
from robustbench_deq.registry import Registry

ROOT = Path(__file__).parents[2]


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


class Interrupt(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The next save ends before it replaces the file named `at`."""
    replace = os.replace

    def stop(source: object, target: object) -> None:
        if Path(str(target)).name == at:
            raise Interrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)


@pytest.mark.parametrize(("at", "kept"), [("model.next.safetensors", 0), ("model.json", 0), ("model.safetensors", 1)])
def test_an_interrupted_save_leaves_a_whole_model(at: str, kept: int, make_model, tmp_path: Path, monkeypatch) -> None:
    """The old one until `model.json` is replaced, the new one from then on; also through a second interrupted save."""
    models = [make_model("deq-fc", dtype=torch.float32, seed=seed) for seed in range(4)]

    def holds() -> list[bool]:
        found = load_folder(tmp_path).readout.weight
        return [torch.equal(found, model.readout.weight) for model in models]

    save_model(models[0], tmp_path, "mine")
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        with pytest.raises(Interrupt):
            save_model(models[1], tmp_path, "mine")
    assert holds() == [index == kept for index in range(4)]
    with monkeypatch.context() as patch:
        interrupt(patch, "model.json")
        with pytest.raises(Interrupt):
            save_model(models[2], tmp_path, "mine")
    assert holds() == [index == kept for index in range(4)]
    save_model(models[3], tmp_path, "mine")
    assert holds() == [False, False, False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_first_save_that_is_interrupted_is_done_again(make_model, tmp_path: Path, monkeypatch) -> None:
    model = make_model("deq-fc", dtype=torch.float32)
    with monkeypatch.context() as patch:
        interrupt(patch, "model.json")
        with pytest.raises(Interrupt):
            save_model(model, tmp_path, "mine")
    with pytest.raises(UsageError, match="expected a model description, got no such file"):
        load_folder(tmp_path)
    save_model(model, tmp_path, "mine")
    assert torch.equal(load_folder(tmp_path).readout.weight, model.readout.weight)


def test_a_damaged_model_can_be_saved_over(saved, make_model) -> None:
    folder = saved("deq-fc")
    (folder / "model.safetensors").write_bytes(b"damaged")
    save_model(make_model("deq-fc", dtype=torch.float32), folder, "mine")
    assert load_folder(folder).family == "deq-fc"


def test_a_model_of_no_family_is_not_saved(make_model, tmp_path: Path) -> None:
    own = EquilibriumModel.from_callables(
        torch.nn.Identity(), lambda z, u: u, torch.nn.Flatten(), input_shape=(1, 2, 2), num_classes=4
    )
    with pytest.raises(UsageError, match="expected one of a registered family, got one of the family 'own'"):
        save_model(own, tmp_path / "new", "mine")
    assert not (tmp_path / "new").exists()


def test_a_subclass_of_a_family_is_not_saved_as_the_family(make_model, tmp_path: Path) -> None:
    model = make_model("deq-fc", dtype=torch.float32)
    model.__class__ = type("Mine", (type(model),), {"cell": lambda self, z, u: torch.tanh(u)})
    with pytest.raises(UsageError, match=r"expected a DEQFC itself, .*, got its subclass Mine; register") as caught:
        save_model(model, tmp_path / "new", "mine")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loading_leaves_the_random_state_as_it_was(family: str, saved) -> None:
    folder, before = saved(family), torch.get_rng_state()
    load_model(str(folder))
    load_model("test-linear.tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_loaded_in_inference_mode_takes_gradients_later(saved, make_images) -> None:
    with torch.inference_mode():
        model = load_model(str(saved("deq-fc")))
    model(make_images(2, torch.float32)).sum().backward()
    assert float(model.readout.weight.grad.abs().max()) > 0


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
        (lambda tensors: tensors.pop("readout.bias"), "no 'readout.bias'; save"),
        (lambda tensors: tensors.update(extra=torch.zeros(2)), "a surplus 'extra'; save"),
        (
            lambda tensors: tensors.update({"readout.bias": torch.zeros(7)}),
            r"'readout.bias' of shape \(7,\) instead of \(3,\); save",
        ),
    ):
        (folder / "model.safetensors").write_bytes(whole)
        change_tensors(folder, spoil)
        with pytest.raises(UsageError, match=r"expected this family's tensors, got " + said) as caught:
            load_folder(folder)
        assert "\n" not in str(caught.value)


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
    with pytest.raises(UsageError, match=r"model\.json \(family mondeq-fc\): unknown key 'size'"):
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
        ({"schema_version": 2, "surplus": 1}, "expected schema version 1 at most, got 2; read it with the newer"),
        ({"schema_version": 0}, "schema_version: expected greater than or equal to 1"),
        (
            {"card": {"clean_acuracy": 0.5}},
            "unknown key 'card.clean_acuracy': expected another key, closest clean_accuracy",
        ),
    ],
)
def test_keys_and_types_of_the_description_are_checked(values: dict, said: str, saved) -> None:
    folder = saved("deq-fc")
    change(folder, **values)
    with pytest.raises(UsageError) as caught:
        load_folder(folder)
    assert said in str(caught.value) and "model.json" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- names


def test_an_unknown_name_lists_the_close_ones() -> None:
    for load in (load_model, describe_model):
        with pytest.raises(UsageError) as caught:
            load("test-linear.tini")
        assert "test-linear.tiny" in str(caught.value) and "robustbench-deq models" in str(caught.value)


# ---------------------------------------------------------------- RobustBench's call


L2, LINF = {"norm": "l2", "epsilon": 0.5}, {"norm": "linf", "epsilon": 0.03}
CARDS = {
    "deq-fc.digits-standard": Card(data="digits"),
    "deq-fc.digits-joint-l2": Card(data="digits", threat=L2),
    "deq-fc.digits-pgd-at-linf": Card(data="digits", threat=LINF),
    "deq-fc.mnist-joint-l2": Card(data="mnist", threat=L2),
    "mondeq-fc.digits-joint-l2": Card(data="digits", threat=L2),
    "mondeq-fc.digits-pgd-at-l2": Card(data="digits", threat=L2),
}


@pytest.fixture
def small_zoo(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of six untrained models that differ in their cards."""
    models: Registry[ModelEntry] = Registry("model")
    for name, card in CARDS.items():
        family = name.split(".")[0]
        save_model(make_model(family, dtype=torch.float32), tmp_path / name, name, card)
        models.register(name)(ModelEntry(name, family, tmp_path / name, {}))
    for module in (io, cards):
        monkeypatch.setattr(module, "MODELS", models)
    monkeypatch.setattr(io, "load_folder", lambda folder: folder.name)


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize(
    ("model_name", "dataset", "threat_model", "name"),
    [
        ("deq-fc", "digits", "L2", "deq-fc.digits-joint-l2"),
        ("deq-fc", "digits", "Linf", "deq-fc.digits-pgd-at-linf"),
        ("deq-fc", "digits", Norm.LINF, "deq-fc.digits-pgd-at-linf"),
        ("deq-fc", "mnist", "l2", "deq-fc.mnist-joint-l2"),
        ("deq-fc", "mnist", None, "deq-fc.mnist-joint-l2"),
        ("deq-fc", None, "Linf", "deq-fc.digits-pgd-at-linf"),
        ("mondeq*at*", "digits", "L2", "mondeq-fc.digits-pgd-at-l2"),
        ("mondeq-fc.digits-joint-l2", "digits", "L2", "mondeq-fc.digits-joint-l2"),
        ("deq-fc.digits-standard", "digits", "L2", "deq-fc.digits-standard"),
        ("deq-fc.digits-standard", "digits", "Linf", "deq-fc.digits-standard"),
        ("deq-fc.digits-standard", "digits", None, "deq-fc.digits-standard"),
        ("deq-fc.digits-standard", None, None, "deq-fc.digits-standard"),
    ],
)
def test_robustbenchs_three_words_mean_one_model(model_name, dataset, threat_model, name: str) -> None:
    assert load_model(model_name=model_name, dataset=dataset, threat_model=threat_model) == name


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize(
    ("model_name", "dataset", "threat_model", "said"),
    [
        ("mondeq-fc", "digits", "Linf", "expected one registered model, got none; list them with 'robustbench-deq"),
        ("deq-fc", "cifar10", "L2", "'deq-fc' for dataset cifar10, threat_model L2: expected one registered model"),
        ("Standard", "digits", "L2", "got none"),
        ("deq-fc.digits-joint-l2", "mnist", "L2", "got none"),
        ("deq-fc.digits-joint-l2", "digits", "Linf", "got none"),
        ("mondeq-fc", "digits", "L2", "got mondeq-fc.digits-joint-l2, mondeq-fc.digits-pgd-at-l2; name one of them"),
        ("deq-fc.digits-*", "digits", None, "-standard, deq-fc.digits-joint-l2, deq-fc.digits-pgd-at-linf; name one"),
        ("deq-fc", "digits", "corruptions", "threat_model: expected L2 or Linf, got 'corruptions'"),
        ("deq-fc", "digits", 2, "threat_model: expected L2 or Linf, got 2"),
        (None, None, None, "model: expected a registered name, a folder with a saved model, or file.py:function"),
    ],
)
def test_none_or_several_models_are_one_line(model_name, dataset, threat_model, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_model(model_name, dataset, threat_model)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("small_zoo")
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"family": "mondeq-fc"}, [4, 5]),
        ({"data": "mnist"}, [3]),
        ({"threat": "l2"}, [1, 3, 4, 5]),
        ({"threat": "linf"}, [2]),
        ({"threat": "none"}, [0]),
        ({"pattern": "*joint*", "family": "deq-fc", "data": "digits", "threat": "l2"}, [1]),
        ({"pattern": "*joint*", "threat": "none"}, []),
    ],
)
def test_listing_filters_by_name_family_data_and_threat(options: dict[str, str], kept: list[int]) -> None:
    assert [found.name for found in list_models(**options)] == [list(CARDS)[index] for index in kept]


# ---------------------------------------------------------------- precision


def test_a_model_in_another_precision_is_not_saved(tmp_path: Path, make_model) -> None:
    with pytest.raises(UsageError, match=r"expected one in float32, got another; call model\.float"):
        save_model(make_model("deq-fc"), tmp_path, "mine")
    assert not list(tmp_path.iterdir())


def test_weights_in_another_precision_are_refused(tmp_path: Path, make_model) -> None:
    described = save_model(make_model("deq-fc", dtype=torch.float32), tmp_path, "mine")
    path = tmp_path / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    changed = described.model_copy(update={"sha256": sha256_of(path)})
    (tmp_path / "model.json").write_text(changed.model_dump_json(), encoding="utf-8")
    with pytest.raises(UsageError, match=r"as torch.float16 instead of torch.float32; save the model again"):
        load_folder(tmp_path)


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
    found = validate(kind.config_type, settings, name).model_dump(mode="json")
    since = {"stop_at_success": True, "max_evaluations": None, "max_seconds": None, "heading": None}
    assert found == {name: value for name, value in since.items() if name in found} | settings  # newer than the cards


def test_shipped_weights_are_small_and_all_registered() -> None:
    files = [path for path in WEIGHTS_FOLDER.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) < 20e6
    folders = {MODELS.get(name).folder for name in MODELS} - {None}
    assert {path.parent for path in files} == folders
    assert {path.name for path in files} == {"model.json", "model.safetensors"}

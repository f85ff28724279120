"""What is called from Python: every argument is taken in any sensible form, or refused in one line before any work."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import robustbench_deq
from robustbench_deq.attacks import JointPGD, JointPGDConfig, Noise, SequentialPGD, SequentialPGDConfig, build_attack
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import ATTACKS, Cascade
from robustbench_deq.threats import Threat

THREAT, Y = Threat("l2", 0.3), torch.tensor([0, 1, 2, 0])
NAMES = [name for name in ATTACKS if name not in ("torchattacks-pgd", "standard")]  # of the other norm; of many parts


def attack_of(name: str, threat: Threat = THREAT) -> Any:
    has_steps = "steps" in ATTACKS.get(name).config_type.model_fields
    return build_attack(name, threat, {"steps": 5} if has_steps else {})


@pytest.fixture
def make(make_model: Callable[..., EquilibriumModel], make_images: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def both(family: str = "test-linear") -> tuple[EquilibriumModel, torch.Tensor]:
        return make_model(family, dtype=torch.float32, rtol=1e-5), make_images(4, dtype=torch.float32)

    return both


@pytest.fixture
def setup(make: Callable[..., Any]) -> tuple[EquilibriumModel, Split]:
    model, x = make()
    return model, Split("mine", SplitName.TEST, x, Y, torch.arange(4), "ab12")


# ---------------------------------------------------------------- settings of attacks


def test_settings_of_an_attack_come_as_a_config_a_mapping_or_keywords() -> None:
    expected = JointPGD(THREAT, JointPGDConfig(steps=3)).config
    for attack in (
        JointPGD(THREAT, steps=3),
        JointPGD(THREAT, {"steps": 3}),
        JointPGD(THREAT, {"steps": 9}, steps=np.int64(3)),
        JointPGD(THREAT, JointPGDConfig(steps=9), steps=torch.tensor(3)),
        JointPGD(THREAT).with_(steps=3),
    ):
        assert attack.config == expected and type(attack.config.steps) is int


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: JointPGD(THREAT, steps=0), "attack joint-pgd: steps: expected greater than or equal to 1, got 0"),
        (lambda: JointPGD(THREAT, stepz=3), "attack joint-pgd: unknown key 'stepz'"),
        (lambda: JointPGD(THREAT, {"steps": "many"}), "attack joint-pgd: steps: expected a valid integer"),
        (lambda: JointPGD(THREAT).with_(steps=-1), "attack joint-pgd: steps: expected greater than"),
        (lambda: JointPGD(THREAT, SequentialPGDConfig()), "expected a JointPGDConfig, got SequentialPGDConfig; pass"),
        (lambda: JointPGD(THREAT, 3), "attack joint-pgd: expected a JointPGDConfig, got int; pass settings by name"),
        (lambda: JointPGD("l2"), r"joint-pgd: expected a Threat, got 'l2'; pass for example Threat\(.l2., 0.5\)"),
        (lambda: Noise(Threat), "attack noise: expected a Threat, got the class Threat; pass"),
    ],
)
def test_settings_that_do_not_fit_are_refused_where_they_are_given(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=f"^[^\n]*{said}[^\n]*$"):
        call()


# ---------------------------------------------------------------- evaluate


def test_arguments_of_evaluate_come_in_any_sensible_form(setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    plain = evaluate(model, Noise(THREAT), data, label="a/b", batch_size=3, seed=2, model_name="m", device="cpu")
    other = evaluate(
        model,
        Noise(THREAT),
        data,
        label=Path("a/b"),
        batch_size=np.int64(3),
        seed=torch.tensor(2),
        num_snapshots=np.uint8(0),
        is_targeted=np.bool_(False),
        model_name=Path("m"),
        device=torch.device("cpu"),
    )
    kept = ("label", "batch_size", "seed", "model", "robust_accuracy", "attack_config")
    assert [getattr(plain.record, key) for key in kept] == [getattr(other.record, key) for key in kept]
    assert torch.equal(plain.x_adv, other.x_adv)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "batch size of none": ({"batch_size": 0}, "evaluate: batch_size: expected greater than or equal to 1, got 0"),
    "negative batch size": ({"batch_size": -1}, "evaluate: batch_size: expected greater than"),
    "half a batch": ({"batch_size": 2.5}, "evaluate: batch_size: expected a valid integer, got 2.5; correct it"),
    "negative seed": ({"seed": -1}, "evaluate: seed: expected greater than"),
    "seed beyond 31 bits": ({"seed": 2**31}, "evaluate: seed: expected"),
    "snapshots": ({"num_snapshots": -1}, "evaluate: num_snapshots: expected"),
    "label": ({"label": 3}, "evaluate: label: expected a valid string, got 3"),
    "device": ({"device": "gpu0"}, "device: expected cpu, cuda or cuda:N of this machine, got 'gpu0'"),
    "device without numbers": ({"device": "meta"}, "device: expected cpu, cuda or cuda:N of this machine, got 'meta'"),
    "device of another kind": ({"device": 1.5}, "device: expected cpu, cuda"),
    "progress": ({"progress": "yes"}, "progress: expected a function, got 'yes'"),
    "name of an attack": ({"attack": "joint-pgd"}, "attack: expected an attack, got 'joint-pgd'; pass for example"),
    "class of an attack": (
        {"attack": JointPGD},
        "attack: expected an attack, got the class JointPGD; pass for example",
    ),
    "name of data": ({"data": "digits"}, "data: expected a Split, got 'digits'; pass for example load"),
    "name of a model": ({"model": "deq-fc"}, r"model: expected an EquilibriumModel, got 'deq-fc'; pass load_model\("),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_refused_before_any_work(
    changes: dict[str, Any], said: str, setup: tuple[EquilibriumModel, Split]
) -> None:
    model, data = setup
    attack = Noise(THREAT)
    attack.run = lambda *_: pytest.fail("it attacks")  # type: ignore[method-assign]
    arguments: dict[str, Any] = {"model": model, "attack": attack, "data": data, **changes}
    with pytest.raises(UsageError, match=f"^{said}[^\n]*$"):
        evaluate(**arguments)
    with pytest.raises(TypeError):
        evaluate(model, attack, data, batchsize=3)  # type: ignore[call-arg]


def test_a_split_of_ones_own_is_read_before_any_work(setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    attack = Noise(THREAT)
    assert evaluate(model, attack, dataclasses.replace(data, split="test")).record.data.split == "test"  # type: ignore[arg-type]
    attack.run = lambda *_: pytest.fail("it attacks")  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"^data: digest: expected a valid string, got None; correct it$"):
        evaluate(model, attack, dataclasses.replace(data, digest=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"confirm": 3}, "confirm: expected a function, got int; pass what is called"),
        ({"progress": 3}, "progress: expected a function, got int; pass what is called"),
        ({"clean": 3}, "clean: expected a Clean, got int; pass judge_clean"),
    ],
)
def test_what_an_attack_calls_later_is_looked_at_first(
    changes: dict[str, Any], said: str, setup: tuple[EquilibriumModel, Split]
) -> None:
    model, data = setup
    with pytest.raises(UsageError, match=f"^{said}"):
        Noise(THREAT)(model, data.x, data.y, **changes)


@pytest.mark.parametrize(
    "code",
    [
        "from robustbench_deq import Evaluation, evaluate",
        "import robustbench_deq.evaluate.doctor; from robustbench_deq import evaluate",
        "from robustbench_deq import *",
    ],
)
def test_evaluate_is_the_function_whatever_was_imported_before(code: str) -> None:
    check = "; assert callable(evaluate), evaluate; from robustbench_deq.evaluate.doctor import examine"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code + check], check=True, timeout=60)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: load_model(None), "model: expected a registered name, .*got NoneType; "),  # type: ignore[arg-type]
        (lambda: load_model("deq-conv", "digits", 2), "threat_model: expected L2 or Linf, got 2; "),  # type: ignore[arg-type]
    ],
)
def test_names_of_models_that_are_none_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        call()


def test_a_norm_is_as_good_as_its_name_in_the_call_of_robustbench() -> None:
    by_norm, by_name = (load_model("deq-conv", "digits", norm) for norm in (Norm.L2, "L2"))
    assert all(map(torch.equal, by_norm.parameters(), by_name.parameters()))


@pytest.mark.parametrize(("split", "said"), [("tset", "'train', 'validation', 'test' or 'all', got 'tset'"), (3, "")])
def test_splits_go_by_name(split: object, said: str) -> None:
    assert load("digits", "validation", np.int64(5)).digest == load("digits", SplitName.VALIDATION, 5).digest
    with pytest.raises(UsageError, match=f"^load: split: expected {said}[^\n]*$"):
        load("digits", split)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what a record calls the model


def test_a_loaded_model_is_recorded_by_name_and_digest_until_it_changes(tmp_path: Path) -> None:
    data, attack = load("digits", limit=2), Noise(THREAT)

    def recorded(model: EquilibriumModel, **settings: Any) -> tuple[Any, ...]:
        record = evaluate(model, attack, data, **settings).record
        return record.model, record.model_sha256, record.file_sha256

    model = load_model("deq-fc.digits-joint-l2")
    name, digest, _ = recorded(model)
    assert name == "deq-fc.digits-joint-l2" and len(digest) == 64
    assert recorded(model, model_name="mine") == ("mine", digest, None)
    robustbench_deq.save_model(model, tmp_path / "saved", "mine")
    assert recorded(load_model(tmp_path / "saved")) == (str(tmp_path / "saved"), digest, None)
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    assert recorded(model) == ("own", None, None)
    file = tmp_path / "file.py"
    file.write_text(
        "from robustbench_deq import load_model\n\n\ndef build():\n    return load_model('test-linear.tiny')\n"
    )
    name, digest, of_file = recorded(load_model(f"{file}:build"))
    assert name == f"{file}:build" and digest is None and len(of_file) == 64


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8, torch.bool])
def test_labels_of_any_integer_type_are_taken(name: str, dtype: torch.dtype, make: Callable[..., Any]) -> None:
    model, x = make()
    y, attack = (Y > 0).to(dtype), attack_of(name)
    targets = {} if isinstance(attack, Cascade) else {"targets": Y.to(torch.int16)}
    expected = attack(model, x, y.long(), **{key: Y for key in targets})
    assert torch.equal(attack(model, x, y, **targets).x_adv, expected.x_adv)


def test_labels_of_a_split_and_of_numpy_are_taken(setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    expected = evaluate(model, Noise(THREAT), data)
    odd = Split("mine", SplitName.TEST, data.x, Y.to(torch.uint8), data.sample_ids.int(), "ab12")
    assert torch.equal(evaluate(model, Noise(THREAT), odd).x_adv, expected.x_adv)
    assert torch.equal(Noise(THREAT)(model, data.x, Y.numpy()).x_adv, Noise(THREAT)(model, data.x, Y.tolist()).x_adv)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (torch.eye(4)[:, :3], r"got float32 \(4, 3\); pass one class index per image: labels.argmax\(1\) of one-hot"),
        (torch.eye(4).long(), r"got int64 \(4, 4\); pass one class index per image: labels.argmax\(1\) of one-hot"),
        (Y[:, None], r"got int64 \(4, 1\); .*: labels.ravel\(\)"),
        (Y.float(), r"got float32 \(4,\); .*: labels.long\(\) of a tensor"),
        (np.array(list("abcd")), r"got <U1; pass one class index per image"),
    ],
)
def test_labels_of_other_kinds_are_refused_with_the_fix(y: object, said: str, make: Callable[..., Any]) -> None:
    model, x = make()
    with pytest.raises(UsageError, match=rf"^labels: expected an integer tensor \(4,\), {said}[^\n]*$"):
        Noise(THREAT)(model, x, y)


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(5), [0], torch.rand(4), -torch.arange(4), "ids"])
def test_ids_that_do_not_fit_the_batch_are_refused(ids: object, setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    with pytest.raises(UsageError, match=r"^sample_ids: expected 4 integers >= 0, got "):
        Noise(THREAT)(model, data.x, Y, sample_ids=ids)
    with pytest.raises(UsageError, match=r"^sample_ids: expected 4 integers >= 0, got "):
        evaluate(model, Noise(THREAT), Split("mine", SplitName.TEST, data.x, Y, ids, "ab12"))


def test_a_random_start_takes_an_id_a_row() -> None:
    with pytest.raises(ValueError, match="zip"):
        THREAT.ball(torch.rand(4, 1, 2, 2)).random_start(0, torch.arange(3))


def test_a_rounding_error_beyond_white_and_black_is_clipped(setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    x = torch.linspace(-1e-6, 1 + 1e-6, 64).view(4, 1, 4, 4)
    for attack in map(attack_of, NAMES):
        assert torch.equal(attack(model, x, Y).x_adv, attack(model, x.clamp(0, 1), Y).x_adv)
    found = evaluate(model, Noise(THREAT), Split("mine", SplitName.TEST, x, Y, data.sample_ids, "ab12"))
    assert found.record.num_failed == 0 and float(found.x_adv.max()) <= 1.0
    with pytest.raises(UsageError, match=r"pixels in \[0, 1\], got \[-0.01, 0.99\]"):
        Noise(THREAT)(model, x - 0.01, Y)


def test_images_with_the_channels_last_are_told_how_to_be_turned(make: Callable[..., Any]) -> None:
    model, x = make()
    for images, said in (
        (x.permute(0, 2, 3, 1), r"images.transpose\(0, 3, 1, 2\) of an array"),
        (x[:, 0], "add the axis of the channel"),
    ):
        with pytest.raises(UsageError, match=rf"^images: expected a float tensor .*{said}"):
            model.check_images(images)
    with pytest.raises(UsageError, match=r"^images: expected a float tensor, got ndarray; pass torch.as_tensor"):
        model.check_images(x.numpy())


# ---------------------------------------------------------------- how things are shown


def test_everything_is_shown_in_one_short_telling_line(setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    attack = JointPGD(THREAT, steps=5)
    found, result = evaluate(model, attack, data, num_snapshots=2), attack(model, data.x, Y, num_snapshots=2)
    clean = judge_clean(model, data.x, Y)
    for thing, said in (
        (data, "x=float32 (4, 1, 4, 4)"),
        (found, " columns, x_adv="),
        (found.record, "own, joint-pgd, l2 0.3, mine: clean "),
        (result, "x_adv=float32 (4, 1, 4, 4)"),
        (result.snapshots[0], "step="),
        (clean, "z=float32 (4, 5)"),
        (clean.verdict, "prediction=int64 (4,)"),
        (model.equilibrium(data.x), "num_steps=int32 (4,)"),
        (THREAT.ball(data.x), "radius=0.3"),
    ):
        assert said in repr(thing) and str(thing) == repr(thing), repr(thing)
        assert repr(thing).startswith(f"{type(thing).__name__}(") and len(repr(thing)) < 800 and "\n" not in repr(thing)
    assert repr(attack) == "JointPGD(Threat(norm=Norm.L2, epsilon=0.3), steps=5)"


def test_the_version_is_that_of_the_package() -> None:
    assert robustbench_deq.__version__ == importlib.metadata.version("robustbench-deq")
    assert "__version__" in dir(robustbench_deq)


def test_evaluate_is_the_function_even_after_its_folder_was_imported() -> None:
    vars(robustbench_deq).pop("evaluate", None)
    robustbench_deq.evaluate = sys.modules["robustbench_deq.evaluate"]  # as the import of a folder ends
    assert robustbench_deq.evaluate is evaluate


# ---------------------------------------------------------------- modes and layouts


@pytest.mark.parametrize("name", NAMES)
def test_inference_mode_changes_nothing(name: str, setup: tuple[EquilibriumModel, Split]) -> None:
    model, data = setup
    attack = attack_of(name)
    plain = evaluate(model, attack, data, num_snapshots=1)
    with torch.inference_mode():
        inner = Split("mine", SplitName.TEST, data.x.clone(), data.y.clone(), data.sample_ids.clone(), "ab12")
        found = evaluate(model, attack, inner, num_snapshots=1)
        alone = attack(model, inner.x, inner.y)
        assert torch.is_inference_mode_enabled()
    assert inner.x.is_inference() and torch.equal(found.x_adv, plain.x_adv)
    curves = [[point.robust_accuracy for point in each.record.curve] for each in (found, plain)]
    assert curves[0] == curves[1] and bool(curves[0]) is not isinstance(attack, Cascade)
    assert torch.equal(alone.x_adv, attack(model, data.x, Y).x_adv)


def test_weights_of_inference_mode_are_refused(make: Callable[..., Any]) -> None:
    model, x = make()
    with torch.inference_mode():
        model.head_shift = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(
        UsageError, match=r"^model: expected weights that gradients can pass, got some made in torch.inf"
    ):
        SequentialPGD(THREAT)(model, x, Y)


@pytest.mark.parametrize("name", [*ATTACKS])
def test_layout_of_images_and_model_does_not_matter(name: str, make_model: Any, make_images: Any) -> None:
    shape = (3, 4, 4)
    model, x = (
        make_model("deq-conv", torch.float32, rtol=1e-5, input_shape=shape),
        make_images(4, torch.float32, shape=shape),
    )
    threat = Threat(Norm.LINF, 0.05) if name == "torchattacks-pgd" else THREAT
    attack = attack_of(name, threat)
    plain = attack(model, x, Y).x_adv
    other = attack(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), Y).x_adv
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-4)

"""The command line: listings, one JSON object, files that are whole or absent, exit codes, and errors of one line."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import yaml

from robustbench_deq.adjoints import ADJOINTS
from robustbench_deq.attacks import ATTACKS, JointPGD, build_attack
from robustbench_deq.commands import attack as attack_command
from robustbench_deq.commands import display, options
from robustbench_deq.commands import main as cli
from robustbench_deq.commands import report as report_command
from robustbench_deq.configs import MAX_COUNT, read_yaml, validate
from robustbench_deq.data import DATASETS, SplitName, load, sources, splits
from robustbench_deq.errors import RunError
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.files import alone_in
from robustbench_deq.models import FAMILIES, MODELS, describe_model, list_models, load_folder, load_model, save_model
from robustbench_deq.optimise import NORMS, OBJECTIVES, Norm
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import load_records
from robustbench_deq.report.pages.commands import command_of
from robustbench_deq.solvers import SOLVERS
from robustbench_deq.threats import Threat
from robustbench_deq.training import checkpoint
from robustbench_deq.training.checkpoint import Checkpoint
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import Trainer

ROOT = Path(__file__).parents[2]
QUICK = ("attack", "test-linear.tiny", "--data", "digits", "--limit", "8", "--steps", "3", "--epsilon", "0.5")
CONFIG = ROOT / "configs" / "training" / "digits-deq-fc-standard.yaml"
TINY = (
    "--set", "epochs=1", "--set", "train_limit=128", "--set", "model.config.hidden=8", "--set", "validation.limit=16",
    "--set", "evaluation.limit=16", "--set", "evaluation.attack.config.steps=2", "--set", "ema_decay=0",
)  # fmt: skip

EXAMPLES = pytest.mark.parametrize(
    "example",
    [
        "own_model",
        "own_callables",
        pytest.param(
            "own_torchdeq", marks=pytest.mark.skipif(find_spec("torchdeq") is None, reason="the extra peers is missing")
        ),
    ],
)

Result = click.testing.Result


def invoke(*args: object) -> Result:
    return click.testing.CliRunner().invoke(cli.main, [str(arg) for arg in args])


def succeeds(*args: object) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return result.stdout


def refused(*args: object, code: int = 2) -> str:
    """The one line on standard error of a call that must fail with `code`."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert before == ([] if code == 2 else before[:1]), result.stderr  # what has begun has said so
    assert all(re.search("  0/[0-9]+$", line) for line in before), result.stderr
    assert last.startswith("Error: ")
    return last


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)


def write_npz(
    path: Path, shape: tuple[int, ...] = (12, 1, 8, 8), spoil: Callable[[np.ndarray], Any] | None = None
) -> str:
    images = np.random.default_rng(0).random(shape, dtype=np.float32)
    images = images if spoil is None else spoil(images)
    np.savez(path, images=images, labels=np.arange(shape[0]) % 3)
    return f"npz:{path}"


# ---------------------------------------------------------------- listings


@pytest.mark.parametrize(("command", "names"), [("models", MODELS), ("attacks", ATTACKS), ("datasets", DATASETS)])
def test_listing_names_everything_as_text_and_as_json(command: str, names) -> None:
    text = succeeds(command)
    assert all(any(name in line.split() for line in text.splitlines()) for name in names)
    content = json.loads(succeeds(command, "--json"))
    assert content["schema_version"] == 1
    assert [row["name"] for row in content[command]] == list(names)


def test_everything_that_settings_name_is_listed() -> None:
    for command, kind, names in (
        ("attacks", "solvers", SOLVERS),
        ("attacks", "adjoints", ADJOINTS),
        ("attacks", "objectives", OBJECTIVES),
        ("models", "families", FAMILIES),
    ):
        assert f"\n{kind}: {', '.join(names)}\n" in succeeds(command)
        assert json.loads(succeeds(command, "--json"))[kind] == list(names)


def test_models_may_be_picked_by_a_wildcard() -> None:
    content = json.loads(succeeds("models", "test-*", "--json"))
    assert [row["name"] for row in content["models"]] == MODELS.list("test-*")
    parameters = sum(p.numel() for p in load_model("test-linear.tiny").parameters())
    assert content["models"][0]["parameters"] == parameters
    assert "test-linear.tiny" in refused("models", "test-liner*")


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("--family", "deq-fc"), {"family": "deq-fc"}),
        (("--data", "fashion-mnist", "--threat", "l2"), {"data": "fashion-mnist", "threat": "l2"}),
        (("deq-*digits*", "--threat", "none"), {"pattern": "deq-*digits*", "threat": "none"}),
    ],
)
def test_models_may_be_picked_by_family_data_and_threat(options: tuple[str, ...], chosen: dict[str, str]) -> None:
    names = [described.name for described in list_models(**chosen)]
    assert 0 < len(names) < len(MODELS)
    assert [row["name"] for row in json.loads(succeeds("models", *options, "--json"))["models"]] == names
    text = succeeds("models", *options)
    assert [name for name in MODELS if name in text.split()] == names


def test_models_shows_what_the_cards_say() -> None:
    card = describe_model("mondeq-fc.fashion-joint-l2").card
    row = json.loads(succeeds("models", "mondeq-fc.fashion-joint-l2", "--json"))["models"][0]
    assert (row["family"], row["data"], row["seed"], row["command"]) == (
        "mondeq-fc",
        card.data,
        card.seed,
        card.command,
    )
    assert (row["trained_against"], row["robust_at"]) == ("l2 1", "l2 1")
    assert (row["monotonicity"], row["lipschitz"]) == (card.monotonicity, card.lipschitz)
    assert 0.99 < card.monotonicity <= 1.0 < card.lipschitz
    assert row["hours"] == pytest.approx(card.train_minutes / 60, abs=0.005)
    assert row["robust_ci"] == list(card.robust_accuracy_ci)
    assert row["clean_ci"][0] < card.clean_accuracy < row["clean_ci"][1] < card.clean_accuracy + 0.03
    assert (row["spectral_radius"], row["picard_steps"]) == (round(card.spectral_radius, 2), card.mean_solver_steps)
    low, high = card.robust_accuracy_ci
    text = succeeds("models", "mondeq-fc.fashion-joint-l2")
    assert f"  {100 * card.robust_accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]  l2 1  " in text
    assert f"  {100 * card.clean_accuracy:.1f} [" in text
    assert f"  {card.command.removeprefix('robustbench-deq ')}  " in text
    assert f"monotonicity {card.monotonicity:g}, lipschitz {card.lipschitz:g}" in text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--family", "deq-fk"), "expected at least one that fits --family deq-fk, got none"),
        (("deq-fc*", "--data", "mnist", "--threat", "linf"), "fits --data mnist, --threat linf, got none"),
        (("test-liner*", "--threat", "none"), "test-linear.tiny"),
        (("--threat", "l7"), "l7"),
        (("mine.py:build",), "got the model mine.py:build; add --check DATA"),
        (("mine.py",), "write mine.py:FUNCTION"),
        (("zzz*",), "list the names with 'robustbench-deq models'"),
    ],
)
def test_models_that_are_none_are_one_line(args: tuple[str, ...], said: str) -> None:
    line = refused("models", *args)
    assert said in line and len(line) < 300


@pytest.mark.parametrize(("num_lagging", "num_flat"), [(None, None), (0, 0), (2, 0), (0, 3)])
def test_attack_shows_what_its_record_warns_of(num_lagging: int | None, num_flat: int | None, capsys) -> None:
    threat = Threat(Norm.L2, 0.1)
    found = evaluate(load_model("test-linear.tiny"), build_attack("noise", threat, {}), load("digits", limit=4))
    changes = {"num_lagging": num_lagging, "num_zero_gradient": num_flat, "diagnostics": {"num_audited": 4.0}}
    attack_command._echo(found._replace(record=found.record.model_copy(update=changes)), False)
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert ("at most: zero gradient on 3 of " in shown["robust"]) == bool(num_flat)
    assert ("lagging" in shown) == bool(num_lagging) and ("zero" in shown) == bool(num_flat)
    assert not num_lagging or shown["lagging"].startswith(f"{num_lagging}: ")
    assert not num_flat or shown["zero"].startswith(f"gradient     {num_flat}: ")
    assert shown["full"].endswith("audited 4")


def test_attacks_lists_every_setting_with_its_default() -> None:
    text = succeeds("attacks")
    settings = {row["name"]: row["settings"] for row in json.loads(succeeds("attacks", "--json"))["attacks"]}
    for name in ATTACKS:
        kind = ATTACKS.get(name).config_type
        defaults = kind().model_dump(mode="json")
        assert settings[name].keys() == kind.model_fields.keys() >= defaults.keys()
        for key in kind.model_fields:
            assert f"  {key}={json.dumps(defaults.get(key))}  " in text


def test_json_of_the_attacks_stands_alone() -> None:
    """A setting that is one of several values says which; nothing refers to a place that is not there."""
    text = succeeds("attacks", "--json")
    assert "$ref" not in text
    assert '"cosine"' in text and '"jiio-2021"' in text


def test_help_and_version() -> None:
    assert "attack" in succeeds("--help") and "--epsilon" in succeeds("attack", "--help")
    assert "version" in succeeds("--version")


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "attack" in result.output and len(result.output.splitlines()) > 5


# ---------------------------------------------------------------- models --check


@pytest.fixture
def unsound(tmp_path: Path) -> str:
    """A model file whose head detaches the state."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom robustbench_deq import EquilibriumModel\n"
        "def build():\n"
        "    return EquilibriumModel.from_callables(lambda x: x.flatten(1), lambda z, u: z / 2 + u,\n"
        "        lambda z: z[:, :10].detach(), input_shape=(1, 8, 8), num_classes=10)\n"
    )
    return f"{tmp_path / 'mine.py'}:build"


@EXAMPLES
def test_check_of_the_examples_is_a_line_a_finding_as_in_the_json(example: str) -> None:
    model = f"{ROOT}/configs/models/{example}.py:build"
    found = json.loads(succeeds("models", model, "--check", "digits", "--json"))
    assert (found["schema_version"], found["model"]) == (1, model)
    assert {finding["verdict"] for finding in found["findings"]} <= {"good", "note"}
    lines = succeeds("models", model, "--check", "digits").splitlines()
    for line, finding in zip(lines, found["findings"], strict=True):
        assert finding.keys() == {"check", "verdict", "found", "fix"}
        assert line.split()[:2] == [finding["check"], finding["verdict"]]
        assert finding["found"] in line and finding["fix"] in line


def test_check_of_an_unsound_model_is_exit_code_1(unsound: str) -> None:
    for more in ((), ("--json",)):
        result = invoke("models", unsound, "--check", "digits", *more)
        assert result.exit_code == 1 and result.stderr == ""
    verdicts = {finding["check"]: finding["verdict"] for finding in json.loads(result.stdout)["findings"]}
    assert [check for check, verdict in verdicts.items() if verdict == "bad"] == ["gradient"]


def test_a_model_without_a_gradient_is_refused_by_attacks_that_need_one(unsound: str) -> None:
    on_digits = ("--data", "digits", "--epsilon", "0.5", "--limit", "4")
    for attack in ("joint-pgd", "pgd"):
        said = refused("attack", unsound, "--attack", attack, *on_digits)
        assert "expected a gradient with respect to the image from inject, cell and head, got none" in said
    succeeds("attack", unsound, "--attack", "noise", *on_digits)


def test_check_takes_a_folder_and_images_of_ones_own(tmp_path: Path) -> None:
    save_model(load_model("test-linear.tiny"), str(tmp_path / "saved"), "mine")
    data = write_npz(tmp_path / "mine.npz", (240, 1, 8, 8))
    found = json.loads(succeeds("models", tmp_path / "saved", "--check", data, "--json"))
    assert found["findings"][0]["found"] == "state (20, 12), logits (20, 10)"  # a twelfth of 240


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--check", "digits"), "models --check: expected a MODEL, got none"),
        (("test-linear.tini", "--check", "digits"), "test-linear.tiny"),
        (("test-*", "--check", "digits"), "test-linear.tiny"),
        (("nowhere.py:build", "--check", "digits"), "no such file"),
        (("test-linear.tiny", "--check", "digitz"), "digits"),
        (("test-linear.tiny", "--check", "npz:nowhere.npz"), "no such file"),
        (("test-linear.tiny", "--check"), "--check"),
    ],
)
def test_wrong_usage_of_check_is_one_line(args: tuple, said: str) -> None:
    assert said in refused("models", *args)


def test_check_on_images_of_another_shape_is_one_line(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "mine.npz", (24, 1, 9, 9))
    assert "float tensor (batch, 1, 8, 8)" in refused("models", "test-linear.tiny", "--check", data)


# ---------------------------------------------------------------- attack


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "standard"])  # of the parts of others
def test_json_is_one_object_with_all_fields(name: str) -> None:
    norm = "linf" if name == "torchattacks-pgd" else "l2"
    steps = () if "steps" not in ATTACKS.get(name).config_type.model_fields else ("--steps", "3")
    args = (
        "attack",
        "test-linear.tiny",
        "--attack",
        name,
        "--norm",
        norm,
        "--epsilon",
        "8/255",
        "--limit",
        "8",
        *steps,
    )
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{name} on test-linear.tiny  0/8\n"
    assert len(result.stdout.splitlines()) == 1
    found = json.loads(result.stdout)
    assert (found["schema_version"], found["model"], found["attack"]) == (1, "test-linear.tiny", name)
    assert found["threat"] == {"norm": norm, "epsilon": 8 / 255}
    data = found["data"]
    assert (data["name"], data["split"], data["num_samples"]) == ("digits", "test", 8) and len(data["digest"]) == 64
    low, high = found["robust_accuracy_ci"]
    assert 0 <= low <= found["robust_accuracy"] <= high <= 1
    assert 0 <= found["robust_accuracy"] <= found["clean_accuracy"] <= 1
    for key in ("adversarial_loss", "num_unconverged", "num_failed", "max_perturbation", "seed"):
        assert is_number(found[key]), key
    assert found["num_failed"] == found["num_unconverged"] == 0
    assert found["max_perturbation"] <= 8 / 255 * (1 + 1e-5)
    for key in ("cell_evals", "cell_vjps", "solver_steps", "wall_seconds", "peak_memory_mb"):
        assert is_number(found["cost"][key]), key
    assert found["curve"] or name == "fast"  # which has stages instead
    for point in found["curve"]:
        assert all(
            is_number(point[key]) for key in ("step", "cell_evals", "cell_vjps", "wall_seconds", "robust_accuracy")
        )
    assert isinstance(found["environment"], dict) and found["environment"]["torch"]
    config = ATTACKS.get(name).config_type(**({"steps": 3} if steps else {}))
    assert found["attack_config"] == config.model_dump(mode="json") | {"targeted": False}


@pytest.mark.parametrize(("options", "is_shown"), [((), False), (("--json",), True), (("--out",), True)])
def test_snapshots_are_judged_only_where_a_curve_is_shown(
    options: tuple[str, ...], is_shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*args: Any, **settings: Any) -> Any:
        asked.append(settings["num_snapshots"])
        return evaluate(*args, **settings)

    monkeypatch.setattr(attack_command, "evaluate", watched)
    options = (*options, str(tmp_path / "new")) if options == ("--out",) else options
    assert invoke(*QUICK, *options).exit_code == 0
    assert [count > 0 for count in asked] == [is_shown]


def test_options_reach_the_attack() -> None:
    found = json.loads(succeeds(*QUICK, "--attack", "pgd", "--set", "warm_start=false", "--set", "tolerance=1e-2",
                                "--set", "solver=broyden", "--seed", "4", "--batch-size", "3", "--label", "cold",
                                "--targeted", "--split", "validation", "--json"))  # fmt: skip
    config = found["attack_config"]
    assert (config["steps"], config["warm_start"], config["tolerance"], config["solver"]) == (3, False, 0.01, "broyden")
    assert config["targeted"] is True
    assert (found["seed"], found["batch_size"], found["label"], found["data"]["split"]) == (4, 3, "cold", "validation")
    assert json.loads(succeeds(*QUICK, "--attack", "pgd", "--set", "steps=2", "--json"))["attack_config"]["steps"] == 3


@pytest.mark.parametrize(
    "more",
    [
        ("--attack", "joint-pgd", "--set", "preset=jiio-2021", "--label", "JIIO, as published"),
        ("--attack", "pgd", "--set", "adjoint=phantom", "--targeted", "--seed", "3", "--batch-size", "5"),
        ("--attack", "noise", "--split", "validation"),
    ],
)
def test_command_of_a_record_makes_the_run_again(more: tuple[str, ...], tmp_path: Path) -> None:
    quick = [word for word in QUICK if word not in ("--steps", "3")] if "noise" in more else QUICK
    succeeds(*quick, *more, "--out", tmp_path)
    record = load_records(tmp_path)[0]
    again = json.loads(succeeds(*shlex.split(command_of(record))[1:], "--json"))
    for key in ("label", "attack_config", "robust_accuracy", "adversarial_loss", "seed", "batch_size"):
        assert again[key] == getattr(record, key), key
    assert (again["data"]["digest"], again["data"]["split"]) == (record.data.digest, record.data.split)


def test_same_call_same_numbers_whatever_the_batch() -> None:
    args = (*QUICK, "--attack", "pgd", "--set", "random_start=true", "--json")
    one, again, split = (json.loads(succeeds(*args, *more)) for more in ((), (), ("--batch-size", "3")))
    for key in ("robust_accuracy", "adversarial_loss", "max_perturbation", "data"):
        assert one[key] == again[key]
    assert split["robust_accuracy"] == one["robust_accuracy"] and split["data"] == one["data"]
    assert split["adversarial_loss"] == pytest.approx(one["adversarial_loss"], rel=1e-3)
    assert json.loads(succeeds(*args, "--seed", "1"))["adversarial_loss"] != one["adversarial_loss"]


def test_text_says_the_same_as_the_record(tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = succeeds(*QUICK, "--out", out)
    record = load_records(out)[0]
    assert f"{record.cost.wall_seconds:.2f} attack, {record.cost.judge_seconds:.2f} judge" in text
    assert f"{record.clean_accuracy:.1%}" in text and f"{record.robust_accuracy:.1%}" in text
    assert "test-linear.tiny" in text and "l2 0.5" in text and "8 images" in text


def test_out_holds_a_record_and_its_samples(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    found = json.loads(succeeds(*QUICK, "--out", out, "--json"))
    assert json.loads((out / "records.jsonl").read_text()) == found
    rows = pd.read_parquet(out / "samples" / f"{found['record_id']}.parquet")
    assert len(rows) == 8 and rows["is_robust"].mean() == found["robust_accuracy"]
    assert sorted(path.name for path in out.iterdir()) == ["images", "records.jsonl", "samples"]
    assert [path.name for path in (out / "images").iterdir()] == [f"{found['record_id']}.npz"]
    assert [path.name for path in (out / "samples").iterdir()] == [f"{found['record_id']}.parquet"]


def test_own_images_own_model_file_and_saved_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from robustbench_deq.models import Linear, LinearConfig\n"
        "def build():\n    return Linear(LinearConfig(input_shape=(1, 8, 8), num_classes=3))\n"
    )
    data = write_npz(tmp_path / "mine.npz")
    args = ("--data", data, "--steps", "3", "--epsilon", "0.5", "--json")
    found = json.loads(succeeds("attack", f"{tmp_path / 'mine.py'}:build", *args))
    assert found["data"]["num_samples"] == 3  # two sevenths of twelve
    assert found["model_sha256"] is None
    description = save_model(load_model(f"{tmp_path / 'mine.py'}:build"), tmp_path / "saved", "mine")
    again = json.loads(succeeds("attack", tmp_path / "saved", *args))
    assert again["model_sha256"] == description.sha256
    assert again["robust_accuracy"] == found["robust_accuracy"] and again["data"] == found["data"]


# ---------------------------------------------------------------- attack: wrong usage


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("attack", "test-linear.tini", "--epsilon", "1"), "test-linear.tiny"),
        (("attack", "nowhere.py:build", "--epsilon", "1"), "no such file"),
        (("attack", "mine.py", "--epsilon", "1"), "expected file.py:function, got no function; write mine.py:FUNCTION"),
        (
            ("attack", "runs/none", "--epsilon", "1"),
            "a folder with a saved model, or file.py:function, got 'runs/none'",
        ),
        ((*QUICK, "--attack", "joint-pgt"), "joint-pgd"),
        ((*QUICK, "--data", "digitz"), "digits"),
        ((*QUICK, "--norm", "l3"), "expected l1, l2 or linf, got 'l3'"),
        ((*QUICK, "--attack", "pgd", "--set", "solver=andersen"), "anderson"),
        ((*QUICK, "--attack", "pgd", "--set", "adjoint=implizit"), "implicit"),
        ((*QUICK, "--set", "objective=crossentropy"), "cross-entropy"),
        ((*QUICK, "--set", "accelerator=andersen"), "anderson"),
        ((*QUICK, "--attack", "torchattacks-pgdl2", "--norm", "linf"), "pass --norm l2"),
        ((*QUICK, "--epsilon", "-0.1"), "epsilon: expected a finite number >= 0"),
        ((*QUICK, "--epsilon", "inf"), "epsilon: expected a finite number"),
        ((*QUICK, "--epsilon", "nan"), "epsilon: expected a finite number"),
        ((*QUICK, "--epsilon", "wide"), "--epsilon: expected a number or a fraction, got 'wide'"),
        ((*QUICK, "--epsilon", "8/0"), "expected a number or a fraction"),
        ((*QUICK, "--epsilon", ""), "expected a number or a fraction"),
        (("attack", "test-linear.tiny"), "--epsilon: expected a radius, got none"),
        ((*QUICK, "--steps", "0"), "steps: expected"),
        ((*QUICK, "--steps", "-3"), "steps: expected"),
        ((*QUICK, "--steps", "many"), "many"),
        ((*QUICK, "--limit", "0"), "limit: expected 1 to"),
        ((*QUICK, "--limit", "-1"), "limit: expected 1 to"),
        ((*QUICK, "--limit", "100000"), "limit: expected 1 to 513"),
        ((*QUICK, "--batch-size", "0"), "batch-size"),
        ((*QUICK, "--seed", "-1"), "seed"),
        ((*QUICK, "--split", "tets"), "test"),
        ((*QUICK, "--device", "tpu9"), "--device: expected cpu, cuda"),
        ((*QUICK, "--set", "stepsize=0.1"), "unknown key 'stepsize': expected another key, closest step_size"),
        ((*QUICK, "--set", "step_size=big"), "step_size: expected"),
        ((*QUICK, "--set", "step_size=nan"), "step_size: expected"),
        ((*QUICK, "--set", "step_size=-1"), "step_size: expected"),
        ((*QUICK, "--set", "schedule=cosin"), "cosine"),
        ((*QUICK, "--set", "restarts=2.5"), "restarts: expected"),
        ((*QUICK, "--set", "restarts"), "--set: expected key=value"),
        ((*QUICK, "--set", "step_size=0.5", "--set", "step_size.deep=1"), "step_size"),
        ((*QUICK, "--set", "step_size.deep=1"), "step_size"),
        ((*QUICK, "--attack", "torchattacks-pgdl2", "--set", "restarts=2"), "restarts: expected"),
        ((*QUICK, "--attack", "torchattacks-pgdl2", "--set", "random_start=true"), "random_start"),
        ((*QUICK, "--attack", "noise"), "unknown key 'steps'"),
        ((*QUICK, "--no-such-option"), "--no-such-option"),
        (("attack",), "MODEL"),
        (("atack", "test-linear.tiny"), "atack"),
    ],
)
def test_wrong_usage_of_attack_is_one_line(args: tuple, said: str, tmp_path: Path) -> None:
    assert said in refused(*args, *(("--out", tmp_path / "run") if args[0] == "attack" else ()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "spoil", "said"),
    [
        ((12, 1, 8, 8), lambda images: images * 255, "finite floats in [0, 1]"),
        ((12, 1, 8, 8), lambda images: images - 1, "finite floats in [0, 1]"),
        ((12, 1, 8, 8), lambda images: np.where(images > 0.99, np.nan, images), "finite floats in [0, 1]"),
        ((12, 1, 9, 9), None, "float tensor (batch, 1, 8, 8), got float32 (3, 1, 9, 9)"),
        ((12, 3, 8, 8), None, "float tensor (batch, 1, 8, 8)"),
        ((12, 8, 8), None, "images (n, channels, height, width)"),
        ((12, 1, 8, 8), lambda images: images.astype(object), "plain arrays"),
    ],
)
def test_own_images_that_do_not_fit_are_one_line(shape: tuple, spoil, said: str, tmp_path: Path) -> None:
    data = write_npz(tmp_path / "mine.npz", shape, spoil)
    assert said in refused("attack", "test-linear.tiny", "--epsilon", "1", "--data", data, "--out", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


def test_own_images_that_are_not_there_or_no_archive_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    for name, said in (("none.npz", "no such file"), ("text.npz", "unusable file")):
        assert said in refused("attack", "test-linear.tiny", "--epsilon", "1", "--data", f"npz:{tmp_path / name}")


def test_labels_beyond_the_model_are_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.zeros((12, 1, 8, 8), np.uint8), labels=np.full(12, 10))
    args = ("attack", "test-linear.tiny", "--epsilon", "1", "--data", f"npz:{tmp_path / 'mine.npz'}")
    assert "labels: expected classes 0 to 9, got 10 to 10" in refused(*args)
    labels = np.zeros(12, int)
    labels[load(f"npz:{tmp_path / 'mine.npz'}", SplitName.TRAIN).sample_ids[0]] = 10
    np.savez(tmp_path / "more.npz", images=np.zeros((12, 1, 8, 8), np.uint8), labels=labels)
    said = refused(*args[:-1], f"npz:{tmp_path / 'more.npz'}")
    assert "more.npz: expected classes 0 to 9, got 10 beyond the chosen samples" in said


def test_own_images_are_taken_whole_and_a_part_of_them_is_named(tmp_path: Path) -> None:
    data = write_npz(tmp_path / "mine.npz")
    args = ("attack", "test-linear.tiny", "--epsilon", "0.5", "--steps", "2", "--json", "--data", data)
    part, whole = invoke(*args), invoke(*args, "--split", "all")
    assert part.stderr.splitlines()[0] == f"{data}: test split: 3 of 12 images; --split all takes all"
    assert len(whole.stderr.splitlines()) == 1
    found = json.loads(whole.stdout)["data"]
    assert (found["split"], found["num_samples"]) == ("all", 12)
    assert "expected train, validation or test" in refused(*QUICK, "--split", "all")


def test_a_flipped_byte_in_the_weights_is_one_line(tmp_path: Path) -> None:
    save_model(load_model("test-linear.tiny"), tmp_path / "saved", "mine")
    path = tmp_path / "saved" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "expected sha256" in refused("attack", tmp_path / "saved", *QUICK[2:], "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def build():\n    raise ValueError('first\\nsecond')", "got ValueError: first"),
        ("1 / 0", "got ZeroDivisionError: division by zero"),
        ("def other():\n    pass", "expected a function 'build'"),
        ("def build():\n    return 3", "expected an EquilibriumModel, got int"),
        ("raise SystemExit(7)", "expected a model, got SystemExit"),
    ],
)
def test_a_model_file_that_gives_no_model_is_one_line(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    assert said in refused("attack", f"{tmp_path / 'mine.py'}:build", *QUICK[2:], "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_downloaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    for name in ("MNIST", "FashionMNIST", "CIFAR10", "SVHN"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", refuse)
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(sources.DATA_VARIABLE, str(tmp_path / "data"))
    splits._kept.cache_clear()
    for name in ("fashion-mnist", "mnist", "cifar10", "svhn"):
        said = refused("attack", "test-linear.tiny", "--epsilon", "1", "--data", name, "--out", tmp_path / "run")
        assert f"dataset {name}" in said and sources.DATA_VARIABLE in said and "npz:FILE" in said
        assert not (tmp_path / "run").exists()


def test_an_output_folder_with_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "expected an empty or new folder" in refused(*QUICK, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_every_command_is_there_and_no_other() -> None:
    listed = succeeds("--help")
    for name in cli.COMMANDS:
        assert f"\n  {name} " in listed and "Usage: " in succeeds(name, "--help")
    assert "No such command 'atack'" in refused("atack")


@pytest.mark.parametrize("name", ["attack", "models"])
def test_help_says_that_model_files_are_run(name: str) -> None:
    assert re.search(r"file\.py:function[^:]* is\s+run as code", succeeds(name, "--help"))


def test_listings_are_made_and_records_read_reported_and_checked_without_torch(tmp_path: Path) -> None:
    """Torch takes longer to import than a report to be made."""
    kept = (ROOT / "results" / "radii" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(kept[:2]))
    calls = (["report", str(tmp_path)], ["report", "--compare", str(tmp_path), str(tmp_path)], ["check", "--help"])
    for words in (*calls, ["models"], ["models", "--json"], ["datasets"]):
        code = (
            "import sys; from robustbench_deq.commands.main import main; "
            f"main({words!r}, prog_name='x'); sys.exit('torch' in sys.modules)"
        )
        answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, answer.stderr


SLOW_MODULE = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:  # as code within imports does
    pass
"""


@pytest.mark.parametrize("module", ["click", "torch"])
def test_ctrl_c_during_any_import_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW_MODULE)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "attacks"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "Error: interrupted\n")
    assert process.returncode == 1


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler], ids=["ignored", "default"])
def test_ctrl_c_is_handled_as_before_once_modules_are_imported(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        succeeds("datasets", "--help")
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


HELP = [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
COMPLETED = {
    "robustbench-deq ": list(cli.COMMANDS),
    "robustbench-deq attack deq-conv.digits-": MODELS.list("deq-conv.digits-*"),
    "robustbench-deq attack no-such-": ["no-such-"],  # left to the shell's completion of paths
    "robustbench-deq models test-": ["test-linear.tiny"],
    "robustbench-deq attack own --attack ": [*ATTACKS.list(), *(f"{prefix}:" for prefix in ATTACKS.prefixed())],
    "robustbench-deq attack own --norm ": NORMS.list(),
    "robustbench-deq attack own --data ": [*DATASETS.list(), "npz:"],
    "robustbench-deq models own --check ": [*DATASETS.list(), "npz:"],
    "robustbench-deq attack own --split t": ["train", "test"],
    "robustbench-deq bench --exec": ["--executor"],
}


def test_help_version_and_completion_do_without_torch() -> None:
    """In one process: what the first call imports, the others would hide, but none may import it."""
    code = (
        "import os, sys\nfrom click.shell_completion import BashComplete\n"
        "from robustbench_deq.commands.main import main\n"
        f"for words in {HELP!r}:\n    main.main(words, prog_name='x', standalone_mode=True)\n"
        f"for line in {list(COMPLETED)!r}:\n"
        "    os.environ['COMP_WORDS'], os.environ['COMP_CWORD'] = line, str(line.count(' '))\n"
        "    print('#', BashComplete(main, {}, 'x', '_X').complete().replace(chr(10), ' '))\n"
        "sys.exit(bool({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    lines = [line[2:] for line in answer.stdout.splitlines() if line.startswith("# ")]
    found = [[item.split(",")[1] for item in line.split()] for line in lines]
    assert dict(zip(COMPLETED, found, strict=True)) == COMPLETED


def test_choices_and_completed_names_are_those_of_the_registries() -> None:
    assert options.model_names() == MODELS.list()
    assert [*options.ATTACK_PREFIXES] == [f"{prefix}:" for prefix in ATTACKS.prefixed()]
    assert [*options.ATTACK_NAMES] == ATTACKS.list() and [*options.DATASET_NAMES] == DATASETS.list()
    assert [*options.FAMILY_NAMES] == FAMILIES.list()
    assert [*options.NORM_NAMES] == NORMS.list() and [*options.SPLIT_NAMES] == [name.value for name in SplitName]
    assert f"at most {attack_command.DEFAULT_LIMIT}" in succeeds("attack", "--help") and options.MAX_COUNT == MAX_COUNT


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_is_declared_of_a_command_is_what_it_takes(name: str) -> None:
    named = {"judge": "judge_file", "evaluate": "evaluate_by_standard"}.get(name, name)
    function = getattr(importlib.import_module(f"robustbench_deq.commands.{name}"), named)
    assert {option.name for option in cli.COMMANDS[name].params} == set(inspect.signature(function).parameters)


def test_an_interrupt_while_a_command_is_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib, "import_module", fails_with(KeyboardInterrupt()))
    interrupted("models")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_way_of_the_output_folder_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "expected a folder that can be written" in refused(*QUICK, "--out", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- runs that fail


def fails_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of\nmemory"), "RuntimeError: CUDA out of memory"),
        (RunError("the loss is not finite"), "Error: the loss is not finite"),
        (AssertionError(), "AssertionError: no message"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_run_is_exit_code_1_and_one_line(error, said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attack_command, "evaluate", fails_with(error))
    assert said in refused(*QUICK, "--out", tmp_path / "run", "--json", code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_command, "evaluate", fails_with(RuntimeError("mine")))
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    result = invoke(*QUICK)
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


def test_the_traceback_of_a_models_file_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def build():\n    raise ValueError('mine')\n")
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    result = invoke("attack", f"{tmp_path / 'mine.py'}:build", *QUICK[2:])
    assert result.exit_code == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("got ValueError: mine, in mine.py line 2; correct the file")


LATE = """
import itertools
from torch.nn.functional import layer_norm
from robustbench_deq import load_model

def build():
    model, calls = load_model("test-linear.tiny"), itertools.count()
    whole = model.cell
    model.cell = lambda z, u: whole(z, u) if next(calls) < 3 else layer_norm(z, (3,))
    return model
"""


def test_what_a_model_raises_in_a_run_is_told_with_its_own_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    said = refused("attack", f"{tmp_path / 'late.py'}:build", *QUICK[2:], code=1)
    assert re.search(r"the run failed with \w+: .*, in \S*late\.py line 9; set ROBUSTBENCH_DEQ_DEBUG=1", said), said


def test_the_end_of_a_file_is_no_interrupt_and_a_line_is_short_and_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_command, "evaluate", fails_with(EOFError("no data left")))
    assert "the run failed with EOFError: no data left" in refused(*QUICK, code=1)
    monkeypatch.setattr(attack_command, "evaluate", fails_with(RunError("x" * 10**6 + "\x1b[31m")))
    said = refused(*QUICK, code=1)
    assert len(said) < 2000 and said.isprintable()


def test_a_refused_training_leaves_no_folder(tmp_path: Path) -> None:
    model = "{family: deq-fc, config: {hidden: 100000}}"
    (tmp_path / "mine.yaml").write_text(f"name: mine\nmodel: {model}\nvalidation: {{limit: 8}}\n")
    assert "hidden: expected less than or equal to 16384" in refused("train", tmp_path / "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def interrupted(*args: object) -> None:
    """The call must end with code 1 and one line (after the one that ^C leaves on a terminal)."""
    result = invoke(*args)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line and not re.search("  0/[0-9]+$", line)]
    assert len(lines) == 1 and lines[0].startswith("Error: interrupted"), result.stderr


def test_an_interrupt_in_a_later_batch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = JointPGD.run, []

    def run_once(self, *args: object):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(JointPGD, "run", run_once)
    interrupted(*QUICK, "--batch-size", "4", "--out", tmp_path / "run", "--json")
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_an_interrupt_while_writing_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
    interrupted(*QUICK, "--out", tmp_path / "run")
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    succeeds(*QUICK, "--out", tmp_path / "run")  # and the same call can be made again
    assert len(load_records(tmp_path / "run")) == 1


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["append", "save_images"])
@pytest.mark.parametrize("words", [(), ("--json",)], ids=["text", "json"])
def test_the_result_is_printed_even_on_a_full_disk(place: str, words: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(attack_command.RecordStore if place == "append" else attack_command, place, full_disk)
    result = invoke(*QUICK, "--out", tmp_path / "run", *words)
    assert result.exit_code == 1
    said = f"Error: no space left on the disk; the result is printed, but {tmp_path / 'run'} does not hold all of it"
    assert result.stderr.splitlines()[-1] == said
    if words:
        Record.model_validate(json.loads(result.stdout))
    else:
        assert "robust accuracy" in result.stdout and "record   " not in result.stdout
    assert (tmp_path / "run").exists() == (place == "save_images")


def test_a_full_disk_elsewhere_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_command, "evaluate", full_disk)
    assert "Error: no space left on the disk; make room" in refused(*QUICK, code=1)


# ---------------------------------------------------------------- train


def test_training_makes_a_folder_that_attack_accepts(tmp_path: Path) -> None:
    out = tmp_path / "trained"
    text = succeeds("train", CONFIG, *TINY, "--out", out)
    assert "saved in" in text and "clean accuracy" in text and "robust accuracy" in text
    described = describe_model(str(out))
    assert described.card.data == "digits" and described.card.test_samples == 16
    assert described.card.command.startswith(f"robustbench-deq train {CONFIG} --set epochs=1 --set train_limit=128")
    model = load_folder(out)
    assert model.num_classes == 10 and model.config.hidden == 8
    history = pd.read_csv(out / "history.csv")
    assert history["epoch"].tolist() == [1] and math.isfinite(history["train_loss"][0])
    assert (out / "history.png").stat().st_size > 0
    # Threat and data come from the card.
    found = json.loads(succeeds("attack", out, "--limit", "8", "--steps", "3", "--json"))
    assert found["threat"] == {key: described.card.evaluation[key] for key in ("norm", "epsilon")}
    assert found["data"]["name"] == "digits" and found["model_sha256"] == described.sha256


def test_resumed_training_ends_where_the_undisturbed_one_does(tmp_path: Path, monkeypatch) -> None:
    args = ("train", CONFIG, *TINY, "--set", "epochs=3")
    succeeds(*args, "--out", tmp_path / "whole")
    validate, calls = Trainer._validate, []

    def interrupt_the_second(self: Trainer):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validate", interrupt_the_second)
        interrupted(*args, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut" / "model.json").exists()
    assert "saved in" in succeeds(*args, "--resume", tmp_path / "cut")
    one, other = load_folder(tmp_path / "whole"), load_folder(tmp_path / "cut")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert pd.read_csv(tmp_path / "cut" / "history.csv")["epoch"].tolist() == [1, 2, 3]


def test_an_interrupted_checkpoint_leaves_the_last_one(tmp_path: Path, monkeypatch) -> None:
    args = ("train", CONFIG, *TINY, "--set", "epochs=2")
    save, calls = Checkpoint.save, []

    def save_once(self: Checkpoint, *rest: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_once)
        interrupted(*args, "--out", tmp_path / "cut")
    succeeds(*args, "--resume", tmp_path / "cut")
    assert pd.read_csv(tmp_path / "cut" / "history.csv")["epoch"].tolist() == [1, 2]


@pytest.mark.parametrize("name", ["write_sealed", "write_tensors"])
def test_a_full_disk_during_training_names_resume(name: str, tmp_path: Path, monkeypatch) -> None:
    args, write, calls = ("train", CONFIG, *TINY, "--set", "epochs=2"), getattr(checkpoint, name), []

    def full_at_the_second(*rest: Any) -> Any:
        calls.append(1)
        return full_disk() if len(calls) == 2 else write(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, full_at_the_second)
        said = refused(*args, "--out", tmp_path / "run", code=1)
    assert (
        f"no space left on the disk; what is finished is kept: make room, and continue with --resume {tmp_path}" in said
    )
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    succeeds(*args, "--resume", tmp_path / "run")
    assert pd.read_csv(tmp_path / "run" / "history.csv")["epoch"].tolist() == [1, 2]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_folder_that_is_removed_during_training_is_exit_code_1(epoch: int, tmp_path: Path, monkeypatch) -> None:
    validate, calls = Trainer._validate, []

    def remove(self: Trainer):
        calls.append(1)
        if len(calls) == epoch:
            shutil.rmtree(tmp_path / "run")
        return validate(self)

    monkeypatch.setattr(Trainer, "_validate", remove)
    said = refused("train", CONFIG, *TINY, "--set", "epochs=2", "--out", tmp_path / "run", code=1)
    assert f"{tmp_path / 'run' / 'config.json'} was removed while the training ran; train again with --out" in said
    assert len(calls) == epoch  # not an epoch more than it takes to see it


def test_training_that_diverges_is_exit_code_1_and_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "run", fails_with(RunError("training diverged in epoch 1")))
    assert "training diverged in epoch 1" in refused("train", CONFIG, *TINY, "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run" / "model.json").exists()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("epoch=1", "unknown key 'epoch': expected another key, closest epochs"),
        ("forward.solvr=picard", "unknown key 'forward.solvr': expected one of solver"),
        ("name=../run", "name: expected a name of one folder"),
        ("epochs=many", "epochs: expected"),
        ("epochs=0", "epochs: expected"),
        ("learning_rate=inf", "learning_rate: expected"),
        ("model.family=deq-fk", "deq-fc"),
        ("model.config.hiden=3", "hidden"),
        ("data=digitz", "digits"),
        ("train_limit=1000000", "limit: expected 1 to"),
        ("validation.limit=1000000", "limit: expected 1 to"),
        ("forward.solver=andersen", "anderson"),
        ("backward.solver=andersen", "anderson"),
        ("evaluation.attack.name=joint", "joint-pgd"),
        ("evaluation.attack.config.stepz=3", "unknown key 'stepz': expected another key, closest steps"),
        ("evaluation.attack.threat.norm=l7", "expected l1, l2 or linf"),
        ("evaluation.attack.threat.epsilon=-1", "epsilon: expected"),
        ("epochs", "--set: expected key=value"),
        ("initial=deq-fc.digits-standard", "initial deq-fc.digits-standard: expected hidden 8 as in `model`, got"),
        ("initial=deq-conv.digits-standard", "expected family 'deq-fc' as in `model`, got 'deq-conv'"),
        ("initial=configs/models/own_model.py:build", "unknown model"),
    ],
)
def test_wrong_usage_of_train_is_one_line(assignment: str, said: str, tmp_path: Path) -> None:
    assert said in refused("train", CONFIG, *TINY, "--set", assignment, "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "extra.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"extra": 1}))
    before = sorted(tmp_path.iterdir())
    for name, said in (
        ("none.yaml", "No such file"),
        ("list.yaml", "expected a mapping"),
        ("broken.yaml", "syntax error"),
        ("empty.yaml", "expected a mapping"),
        ("binary.yaml", "not UTF-8"),
        ("extra.yaml", "unknown key 'extra'"),
    ):
        assert said in refused("train", tmp_path / name, "--out", tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == before


def test_resuming_what_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    (tmp_path / "other" / "link").symlink_to("mine.txt")
    assert "got a symbolic link" in refused("train", CONFIG, *TINY, "--resume", tmp_path / "other")
    (tmp_path / "other" / "link").unlink()
    assert "config.json" in refused("train", CONFIG, *TINY, "--resume", tmp_path / "other")
    both = ("--resume", tmp_path / "other", "--out", tmp_path / "run")
    assert "--out or --resume" in refused("train", CONFIG, *TINY, *both)
    assert [path.name for path in tmp_path.rglob("*")] == ["other", "mine.txt"]
    assert "folder that can be written" in refused("train", CONFIG, *TINY, "--resume", tmp_path / "other" / "mine.txt")
    succeeds("train", CONFIG, *TINY, "--out", tmp_path / "run")
    said = refused("train", CONFIG, *TINY, "--set", "learning_rate=0.5", "--resume", tmp_path / "run")
    assert "another learning_rate" in said


@pytest.mark.parametrize("left", [None, (), (".config.json.abc.partial", ".lock")], ids=str)
def test_resuming_begins_where_nothing_is_yet(left: tuple[str, ...] | None, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in left or ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{")  # by a run that was killed before it had a config
    if left == ():
        folder.mkdir()
    assert "saved in" in succeeds("train", CONFIG, *TINY, "--resume", folder)
    assert describe_model(str(folder)).card.data == "digits"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_two_trainers_do_not_share_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        said = refused("train", CONFIG, *TINY, "--resume", tmp_path)
        assert f"folder {tmp_path}: expected one that no other run is writing, got one in use" in said
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_with_files_is_refused_by_train(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert "expected an empty or new folder" in refused("train", CONFIG, *TINY, "--out", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


# ---------------------------------------------------------------- report


def test_report_makes_a_page_of_all_records(tmp_path: Path) -> None:
    succeeds(*QUICK, "--out", tmp_path / "one", "--label", "joint run")
    succeeds(*QUICK, "--attack", "pgd", "--out", tmp_path / "two", "--label", "sequential run")
    assert "2 records" in succeeds("report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert "joint run" in page and "sequential run" in page and "test-linear.tiny" in page
    assert len(pd.read_csv(tmp_path / "page" / "report.csv")) == 2
    (tmp_path / "one" / "shards").mkdir()
    failed = {"reason": "no memory", "shard": {"run": {"model": "m", "label": "cold PGD"}}}
    (tmp_path / "one" / "shards" / "key.failed.json").write_text(json.dumps(failed))
    succeeds("report", tmp_path / "one")
    assert "got one with files; remove it, or name another with --out" in refused("report", tmp_path / "one")
    assert "m, cold PGD (1)" in (tmp_path / "one" / "report" / "index.html").read_text()
    board = (tmp_path / "page" / "leaderboard.html").read_text()
    assert "withstood all 2 attacks, each judged sample by sample" in board
    assert board.count("data:image/png;base64,") == 8 * 3


def test_two_runs_are_compared(tmp_path: Path) -> None:
    succeeds(*QUICK, "--out", tmp_path / "one", "--label", "PGD")
    succeeds(*QUICK[:-1], "0.25", "--out", tmp_path / "other", "--label", "PGD")
    both = ("report", "--compare", tmp_path / "one", tmp_path / "one")
    text = succeeds(*both)
    assert "Of 1 attacks in both runs" in text and "| within noise |" in text and "-0 +0" in text
    assert not (tmp_path / "one" / "report").exists()
    assert "within noise in 1" in succeeds(*both, "--out", tmp_path / "diff")
    assert (tmp_path / "diff" / "compare.md").read_text() == text
    assert "<table>" in (tmp_path / "diff" / "compare.html").read_text()
    other = ("report", "--compare", tmp_path / "one", tmp_path / "other")
    assert "an attack in common" in refused(*other)
    assert "no such folder" in refused("report", "--compare", tmp_path / "one", tmp_path / "none")
    assert "got both" in refused(*both, tmp_path / "one")
    assert "2 arguments" in refused("report", "--compare", tmp_path / "one")
    assert "expected an empty or new folder" in refused(*both, "--out", tmp_path / "diff")


def test_a_report_of_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "records.jsonl").write_text('{"schema_version": 1}\n')
    out = ("--out", tmp_path / "page")
    assert "no records.jsonl" in refused("report", tmp_path / "empty", *out)
    assert "no such folder" in refused("report", tmp_path / "none", *out)
    assert "no such folder" in refused("report", "x" * 300)
    assert "records.jsonl, line 1" in refused("report", tmp_path / "broken", *out)
    assert "FOLDERS" in refused("report", *out)
    assert not (tmp_path / "page").exists()


def test_a_report_into_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    succeeds(*QUICK, "--out", tmp_path / "one")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("mine")
    assert "expected an empty or new folder" in refused("report", tmp_path / "one", "--out", tmp_path / "page")
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["mine.txt"]


# As users start it


INSTALLED = Path(sys.executable).parent / "robustbench-deq"


@pytest.mark.parametrize(
    "command",
    [
        pytest.param((sys.executable, "cli.py"), id="checkout"),
        pytest.param(
            (str(INSTALLED),),
            id="installed",
            marks=pytest.mark.skipif(not INSTALLED.exists(), reason="the package is not installed here"),
        ),
    ],
)
def test_starts_from_a_checkout_and_as_installed(command: tuple[str, ...]) -> None:
    answer = subprocess.run([*command, "datasets", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["datasets"][0]["name"] == "digits"


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "cli.py", *QUICK[:-4], "--steps", "200000", "--epsilon", "0.5", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A CI system may run the tests in the background, where Ctrl-C is ignored and the child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:  # the folder is made when the attack begins
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == ""
    assert stderr.split("\n") == ["joint-pgd on test-linear.tiny  0/8", "", "Error: interrupted", ""]
    assert not out.exists()


def test_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    succeeds(*QUICK, "--out", tmp_path / "run")
    real = report_command.write_report

    def half(records: Any, folder: Path, **rest: Any) -> Any:
        (folder / "report.md").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(report_command, "write_report", half)
    interrupted("report", tmp_path / "run", "--out", tmp_path / "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    monkeypatch.setattr(report_command, "write_report", real)
    succeeds("report", tmp_path / "run", "--out", tmp_path / "page")
    assert (tmp_path / "page" / "index.html").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "the current one" in refused("report", tmp_path / "run", "--out", ".")


def test_demo_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 2 and "an empty or new folder" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "training").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_config_is_sound(path: Path) -> None:
    config = validate(TrainingConfig, read_yaml(path), path.name)
    for spec in (config.attack, config.validation.attack, config.evaluation.attack):
        if spec is not None:
            build_attack(spec.name, Threat(Norm.parse(spec.threat.norm), spec.threat.epsilon), spec.config)
    family = FAMILIES.get(config.model.family)
    info = DATASETS.get(config.data)
    values = {"input_shape": info.input_shape, "num_classes": info.num_classes, **config.model.config}
    family.build(validate(family.config_type, values, path.name))


@EXAMPLES
def test_models_of_the_readme_are_attacked(example: str) -> None:
    found = json.loads(succeeds("attack", f"{ROOT}/configs/models/{example}.py:build", *QUICK[2:], "--json"))
    assert 0 <= found["robust_accuracy"] <= found["clean_accuracy"]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SECONDS_A_LINE", 0)
    result = invoke(*QUICK, "--batch-size", "2", "--json")
    lines = result.stderr.splitlines()
    assert lines[0] == "joint-pgd on test-linear.tiny  0/8"
    within = [line for line in lines[1:] if re.search("  (clean equilibria|attack|judge)  left", line)]
    ends = [line for line in lines[1:] if line not in within]
    assert [line.split()[-5] for line in ends] == ["2/8", "4/8", "6/8", "8/8"], lines
    assert all("robust" in line for line in ends)
    assert all("left 0:0" in line for line in lines[1:])
    assert {"attack", "judge"} <= {line.split()[-3] for line in within}
    assert json.loads(result.stdout)["model"] == "test-linear.tiny"

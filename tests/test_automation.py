"""What runs by itself, for continuous integration and before commits: every name that it uses is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands import main as cli
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.runner.baseline import read_baseline
from robustbench_deq.runner.suite import plan, read_suite
from robustbench_deq.threats import Threat

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
HOOK_KEYS = {"id", "name", "entry", "language", "types_or", "pass_filenames", "always_run", "verbose", "stages"}
"""Those of pre-commit's schema that are used here."""


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def made(text: str) -> list[str]:
    """The make targets of a script."""
    return re.findall(r"^(?:- run: )?make (\S+)", text, re.MULTILINE)


def test_ci_runs_the_tests_and_then_the_gate() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert made(script.read_text()) == ["test", "gate"]
    assert {"test", "gate", "lint"} <= TARGETS


def test_workflow_makes_targets_that_exist_and_keeps_what_the_gate_writes() -> None:
    path = ".github/workflows/ci.yml"
    workflow = read(path)
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"} and "secrets." not in (ROOT / path).read_text()
    steps = workflow["jobs"]["ci"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert [step["run"] for step in steps if "run" in step] == [
        "google-chrome --version",
        "make lint",
        "make test",
        "make gate",
    ]
    used = {step["uses"].split("@")[0]: step.get("with", {}) for step in steps if "uses" in step}
    assert (ROOT / used["actions/setup-python"]["cache-dependency-path"]).is_file()
    assert used["actions/upload-artifact"]["path"].rstrip("/") == folder_of_the_gate()


JUDGE = ".github/workflows/judge.yml"
INPUTS = {"model": "test-linear.tiny", "url": "-", "norm": "l1", "epsilon": "8/255", "data": "digits", "limit": "64"}


def test_workflow_that_judges_is_started_by_hand_and_takes_what_is_typed_as_values() -> None:
    workflow, text = read(JUDGE), (ROOT / JUDGE).read_text()
    assert set(workflow[True]) == {"workflow_dispatch"} and workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]["workflow_dispatch"]["inputs"]) == set(INPUTS)
    assert "secrets." not in text and "GITHUB_TOKEN" not in text
    job = workflow["jobs"]["judge"]
    assert job["env"] == {name.upper(): f"${{{{ inputs.{name} }}}}" for name in INPUTS}
    assert text.count("${{") == len(INPUTS)  # no script, no name of an action has any of it in its text
    checkout = next(step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"] == {"persist-credentials": False}


def test_workflow_that_judges_calls_the_command_as_it_is_and_keeps_its_record() -> None:
    steps = read(JUDGE)["jobs"]["judge"]["steps"]
    make, fetch, judge = (shlex.split(step["run"]) for step in steps if "run" in step)
    assert make == ["make", ".venv/.ready"] and "\n$(VENV)/.ready:" in (ROOT / "Makefile").read_text()
    assert fetch[0] == "curl" and fetch[-2:] == ["--", "$URL"]
    assert fetch[fetch.index("--proto") + 1] == fetch[fetch.index("--proto-redir") + 1] == "=https"
    script, command, *words = judge
    assert script == ".venv/bin/robustbench-deq"
    words = [INPUTS[word[1:].lower()] if word.startswith("$") else word for word in words]
    given = cli.main.get_command(None, command).make_context(command, words).params
    assert (given["model"], given["file"]) == ("test-linear.tiny", Path(fetch[fetch.index("--output") + 1]))
    assert [given[name] for name in ("norm", "epsilon", "data", "limit")] == ["l1", "8/255", "digits", 64]
    upload = next(step for step in steps if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert Path(upload["with"]["path"]) == given["out"]


FORMS = sorted(path.name for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
COMMAND = re.compile(r"robustbench-deq ([a-z]+)((?: [A-Za-z0-9./_-]+)*)")


def test_there_is_a_form_for_models_and_one_for_results() -> None:
    assert FORMS == ["new-attack-result.yml", "new-model.yml"]


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_ask_for_what_is_judged(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "title", "labels", "body"} == set(form)
    kinds = {"markdown": {"value"}, "input": {"label"}, "textarea": {"label"}, "dropdown": {"label", "options"}}
    assert all(kinds[field["type"]] <= set(field["attributes"]) for field in form["body"])
    asked = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert all(field["validations"] == {"required": True} for field in asked.values())
    wanted = {"norm", "epsilon", "data", "file", "verdict"} | ({"model", "limit"} if "attack" in name else {"check"})
    assert wanted <= set(asked)
    assert [
        norm for norm in asked["norm"]["attributes"]["options"] if norm != "no attack"
    ] == NORMS.list()  # GitHub refuses "none"


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_show_commands_as_they_are(name: str) -> None:
    shown = COMMAND.findall((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert len(shown) > 2
    for command, rest in shown:
        known = {option for param in cli.main.get_command(None, command).params for option in param.opts}
        assert {word for word in rest.split() if word.startswith("--")} <= known


def commands_of_the_gate() -> list[list[str]]:
    """The words of each call of the command line that `make gate` makes, whatever a `make test ARGS=...` was told."""
    own = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    output = subprocess.run(
        ["make", "--dry-run", "gate"], cwd=ROOT, env=own, capture_output=True, text=True, check=True
    ).stdout
    lines = [shlex.split(line) for line in output.splitlines() if " cli.py " in line]
    return [words[words.index("cli.py") + 1 :] for words in lines]


def folder_of_the_gate() -> str:
    bench, _ = commands_of_the_gate()
    return bench[bench.index("--out") + 1]


@pytest.mark.parametrize("flags", ["", " -- ARGS=-k\\ gate GATE=elsewhere"])
def test_gate_calls_commands_as_they_are(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKEFLAGS", flags)  # as `make test ARGS='-k gate'` sets it for what it runs
    (bench, *bench_words), (check, *check_words) = commands_of_the_gate()
    assert (bench, check) == ("bench", "check")
    made_by = cli.main.get_command(None, bench).make_context(bench, bench_words).params
    looked_at = cli.main.get_command(None, check).make_context(check, check_words).params
    assert made_by["suite"] == Path("configs/suites/quick.yaml") and not made_by["resume"]
    assert looked_at["folder"] == made_by["out"] and looked_at["folder"] in looked_at["junit"].parents
    assert looked_at["baseline"] == Path("results/baselines/quick.json") and looked_at["reason"] is None


def test_baseline_is_of_the_suite_as_it_stands() -> None:
    baseline = read_baseline(ROOT / "results" / "baselines" / "quick.json")
    planned = plan(read_suite(ROOT / "configs" / "suites" / "quick.yaml"))
    for entry, run in zip(baseline.entries, planned, strict=True):
        assert (entry.model, entry.label, entry.norm, entry.epsilon) == (run.model, run.label, run.norm, run.epsilon)
        attack = build_attack(run.attack, Threat(Norm.parse(run.norm), run.epsilon), run.config)
        settings = attack.config.model_dump(mode="json", exclude_none=True) | {"targeted": False}
        assert {key: value for key, value in entry.settings.items() if value is not None} == settings
        for field in ("attack", "data", "split", "digest", "num_samples", "batch_size", "seed"):
            assert getattr(entry, field) == getattr(run, field)


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".pre-commit-hooks.yaml"])
def test_hooks_have_keys_that_pre_commit_knows(name: str) -> None:
    content = read(name)
    hooks = content if isinstance(content, list) else content["repos"][0]["hooks"]
    assert all({"id", "name", "entry", "language"} <= set(hook) <= HOOK_KEYS | {"description"} for hook in hooks)
    assert all(set(hook.get("stages", [])) <= {"pre-commit", "pre-push"} for hook in hooks)


def test_own_hooks_run_ruff_at_commits_and_the_gate_at_pushes() -> None:
    content = read(".pre-commit-config.yaml")
    assert set(content) == {"default_install_hook_types", "default_stages", "repos"}
    (local,) = content["repos"]
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert local["repo"] == "local" and set(hooks) == {"ruff-check", "ruff-format", "gate"}
    assert hooks["gate"]["entry"] == "make gate" and hooks["gate"]["stages"] == ["pre-push"]
    for name in ("check", "format"):
        assert hooks[f"ruff-{name}"]["entry"].startswith(f".venv/bin/python -m ruff {name}")


def test_hook_for_other_repositories_is_an_installed_command() -> None:
    (hook,) = read(".pre-commit-hooks.yaml")
    script, command = hook["entry"].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"][script] == "robustbench_deq.commands.start:start" and command in cli.main.list_commands(
        None
    )
    assert hook["pass_filenames"] is False

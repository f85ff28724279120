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
from robustbench_deq.optimise import Norm
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

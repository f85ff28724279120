"""A small suite for tests of the runner, and what its records must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustbench_deq.attacks import build_attack
from robustbench_deq.configs import validate
from robustbench_deq.runner.executors import Serial
from robustbench_deq.runner.run import Outcome, run_suite
from robustbench_deq.runner.suite import SuiteConfig, cut, plan


def suite(**changes: Any) -> SuiteConfig:
    values = {
        "name": "small",
        "models": ["test-linear.tiny"],
        "data": "digits",
        "threats": [{"norm": "l2", "epsilons": [0.3, "1/2"]}],
        "attacks": [{"name": "joint-pgd", "config": {"steps": 4}}, {"name": "noise"}],
        "limit": 20,
        "batch_size": 8,
        "num_snapshots": 2,
    }
    return validate(SuiteConfig, values | changes, "suite")


def runs_of(config: SuiteConfig) -> list:
    return [(run, cut(run, config.batches_per_shard)) for run in plan(config)]


def do(folder: Path, config: SuiteConfig | None = None, executor=None, build=build_attack, watch=None) -> Outcome:
    config = config or suite()
    return run_suite(runs_of(config), folder, build, executor or Serial(), watch=watch)

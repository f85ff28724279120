"""A small suite for tests of the runner, and what its records must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attacks import build_attack
from robustbench_deq.bench.executors import Serial
from robustbench_deq.bench.runner import Outcome, run_suite
from robustbench_deq.bench.suite import SuiteConfig, cut, plan
from robustbench_deq.configs import validate


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

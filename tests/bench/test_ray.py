"""The same shards on a real Ray cluster of two workers on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from robustbench_deq.attack import Attack
from robustbench_deq.bench.executors import WORKER_DIED, Ray
from robustbench_deq.bench.shards import ShardStore
from robustbench_deq.errors import RunError
from robustbench_deq.threats import Threat
from tests.bench.small_suite import content, do, runs_of, suite

ray = pytest.importorskip("ray", reason="the extra cluster is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    try:
        started = Ray(None, num_workers=2)
    except RunError:  # Ray gives itself thirty seconds, which a machine that is busy with other tests may exceed
        started = Ray(None, num_workers=2)
    yield started
    ray.shutdown()


def deadly(is_deadly: Callable[[Threat], bool]) -> Callable[..., Attack]:
    """Builds attacks that kill the process they are in. Ray pickles closures by value: workers need not have them."""

    def build(name: str, threat: Threat, settings: dict[str, Any]) -> Attack:
        attack = cli.build_attack(name, threat, settings)
        run = attack.run

        def run_or_die(*args: Any) -> Any:
            if is_deadly(threat):
                os.kill(os.getpid(), signal.SIGKILL)
            return run(*args)

        attack.run = run_or_die
        return attack

    return build


def test_two_workers_give_the_records_of_one_process(cluster: Ray, undisturbed: Path, tmp_path: Path) -> None:
    outcome = do(tmp_path, executor=cluster)
    assert not outcome.failures
    assert content(tmp_path) == content(undisturbed)


def test_worker_killed_in_the_middle_loses_nothing(cluster: Ray, undisturbed: Path, tmp_path: Path) -> None:
    marker = str(tmp_path / "killed")

    def kills_once(threat: Threat) -> bool:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    outcome = do(tmp_path / "suite", executor=cluster, build=deadly(kills_once))
    assert Path(marker).exists()
    assert not outcome.failures
    assert content(tmp_path / "suite") == content(undisturbed)


def test_shard_that_kills_every_worker_fails_and_the_rest_goes_on(cluster: Ray, tmp_path: Path) -> None:
    small = suite(limit=8, attacks=[{"name": "noise"}])
    (_, [fine]), (_, [lost]) = runs_of(small)
    outcome = do(tmp_path, small, cluster, deadly(lambda threat: threat.epsilon == 0.5))
    assert outcome.failures == {lost.key: WORKER_DIED}
    store = ShardStore(tmp_path)
    assert store.reason(lost) == WORKER_DIED
    assert store.is_done(fine) and outcome.num_records == 1


@pytest.mark.parametrize(("address", "said"), [("127.0.0.1:1", "refused"), ("nonsense", "no host:port")])
def test_cluster_that_does_not_answer_is_one_line(address: str, said: str, tmp_path: Path) -> None:
    words = ["bench", "configs/suites/quick.yaml", "--out", str(tmp_path / "new"), "--executor", "ray"]
    result = CliRunner().invoke(cli.main, [*words, "--address", address])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and said in result.stderr and f"--address {address}" in result.stderr
    assert not (tmp_path / "new").exists()

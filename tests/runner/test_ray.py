"""The same shards on a real Ray cluster of two workers on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.kills import contents
from robustbench_deq.attacks import build_attack
from robustbench_deq.commands import main as cli
from robustbench_deq.errors import RunError
from robustbench_deq.protocol import Attack
from robustbench_deq.records.store import load_records
from robustbench_deq.runner.executors import WORKER_DIED, Ray
from robustbench_deq.runner.shards import ShardStore
from robustbench_deq.runner.suite import Resources
from robustbench_deq.threats import Threat
from tests.runner.small_suite import do, runs_of, suite

if os.environ.get("CI"):
    import ray
else:
    ray = pytest.importorskip("ray", reason="the extra cluster is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def equal_priority() -> Iterator[None]:
    """Ray's workers give way to every other process (nice 15): beside tests that compute, they would hardly run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def cluster(equal_priority: None) -> Iterator[Ray]:
    try:
        started = Ray(None, num_workers=2)
    except RunError:  # Ray gives itself thirty seconds, which a machine that is busy with other tests may exceed
        started = Ray(None, num_workers=2)
    yield started
    ray.shutdown()


def deadly(is_deadly: Callable[[Threat], bool]) -> Callable[..., Attack]:
    """Builds attacks that kill the process they are in. Ray pickles closures by value: workers need not have them."""

    def build(name: str, threat: Threat, settings: dict[str, Any]) -> Attack:
        attack = build_attack(name, threat, settings)
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
    assert contents(tmp_path) == contents(undisturbed)


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
    assert contents(tmp_path / "suite") == contents(undisturbed)


def test_shard_that_kills_every_worker_fails_and_the_rest_goes_on(cluster: Ray, tmp_path: Path) -> None:
    small = suite(limit=8, attacks=[{"name": "noise"}])
    (_, [fine]), (_, [lost]) = runs_of(small)
    outcome = do(tmp_path, small, cluster, deadly(lambda threat: threat.epsilon == 0.5))
    assert outcome.failures == {lost.key: WORKER_DIED}
    store = ShardStore(tmp_path)
    assert store.reason(lost) == WORKER_DIED
    assert store.is_done(fine) and outcome.num_records == 1


def bench(folder: Path, *words: str, **changes: Any) -> Result:
    path = folder / "small.yaml"
    path.write_text(json.dumps(suite(**changes).model_dump(mode="json")))  # JSON is YAML
    return CliRunner().invoke(cli.main, ["bench", str(path), "--out", str(folder / "new"), "--executor", "ray", *words])


def test_command_line_joins_a_cluster_and_gives_shards_their_resources(
    cluster: Ray, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, remote = [], ray.remote
    monkeypatch.setattr(ray, "remote", lambda **options: asked.append(options) or remote(**options))
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))  # this process has joined it already
    address = ray.get_runtime_context().gcs_address
    result = bench(tmp_path, "--address", address, resources={"num_cpus": 2, "num_gpus": 0})
    assert result.exit_code == 0, result.stderr
    joined, options = asked
    assert joined["address"] == address
    assert (options["num_cpus"], options["num_gpus"]) == (2, 0)
    records = load_records(tmp_path / "new")
    assert {record.environment["num_threads"] for record in records} == {2}
    assert contents(tmp_path / "new") == contents(undisturbed)


def test_device_is_that_of_the_cluster(cluster: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: None)
    address = ray.get_runtime_context().gcs_address
    result = bench(tmp_path, "--address", address, "--device", "cuda")
    assert result.exit_code == 2 and "--device cuda: expected a Ray cluster with GPUs, got one without" in result.stderr
    assert not (tmp_path / "new").exists()

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    shares = [Ray(address, device=device).num_gpus for device in ("cuda", None, "cpu")]
    assert shares == [1, 1, 0]
    assert Ray(address, resources=Resources(num_gpus=0.5), device="cuda").num_gpus == 0.5


def test_command_line_starts_a_cluster(undisturbed: Path, tmp_path: Path) -> None:
    """In a process of its own, as this one has a cluster."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite().model_dump(mode="json")))
    words = ["bench", str(path), "--out", str(tmp_path / "new"), "--executor", "ray", "--workers", "1"]
    answer = subprocess.run([sys.executable, "cli.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert "4 of 4 records" in answer.stdout
    assert contents(tmp_path / "new") == contents(undisturbed)


@pytest.mark.parametrize(("address", "said"), [("127.0.0.1:1", "refused"), ("nonsense", "no host:port")])
def test_cluster_that_does_not_answer_is_one_line(address: str, said: str, tmp_path: Path) -> None:
    words = ["bench", "configs/suites/quick.yaml", "--out", str(tmp_path / "new"), "--executor", "ray"]
    result = CliRunner().invoke(cli.main, [*words, "--address", address])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and said in result.stderr and f"--address {address}" in result.stderr
    assert not (tmp_path / "new").exists()

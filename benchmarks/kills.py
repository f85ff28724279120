"""Kill a suite again and again, at random moments, and see whether its records come out as if nothing had happened.

    python -m benchmarks.kills --kills 100

A round is one folder: `bench` is killed with SIGKILL and started again with `--resume` until it ends by itself; then
records and samples must be those of an undisturbed run, timings aside. The moments are drawn uniformly over the life
of an undisturbed process. Some processes have two workers; of those the whole group, the runner alone or one worker
is killed. (A runner that has lost a worker goes on, and may be killed later.)

Starting Python takes longer than the suite. So this process imports everything once and forks each runner, which then
does what the command line does; the workers of a runner start in full.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from benchmarks.timing import keep, say
from robustbench_deq.commands import main as cli
from robustbench_deq.files import write_text
from robustbench_deq.records.record import Record, to_json
from robustbench_deq.records.store import SHARDS_FOLDER, RecordStore, load_records

SUITE = {
    "name": "kills",
    "models": ["test-linear.tiny"],
    "data": "digits",
    "threats": [{"norm": "l2", "epsilons": [0.3, 0.5]}],
    "attacks": [
        {"name": "joint-pgd", "config": {"steps": 4}},
        {"name": "pgd", "config": {"steps": 2}},
        {"name": "noise", "config": {"restarts": 2}},
    ],
    "limit": 32,
    "batch_size": 4,
    "num_snapshots": 1,
}
WITH_WORKERS = 0.2
"""Share of the processes that have two workers."""


def without_circumstances(record: Record) -> dict[str, Any]:
    """As `to_json`, without what differs between two runs of the same thing: times, memory, and where it was."""
    values = to_json(record)
    del values["created"], values["environment"]
    for part in (values["cost"], *values["curve"]):
        for key in ("wall_seconds", "judge_seconds", "peak_memory_mb"):
            part.pop(key, None)
    return values


def contents(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Records and samples of a folder, timings aside."""
    store = RecordStore(folder)
    return [
        (without_circumstances(record), store.load_samples(record.record_id).to_csv())
        for record in load_records(folder)
    ]


class Process(NamedTuple):
    """A living process of this machine, and the leader of its group."""

    pid: int
    parent: int
    group: int
    command: str


def processes() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, group = path.read_text().rpartition(")")[2].split()[:3]
            if state != "Z":
                command = path.with_name("cmdline").read_bytes().decode(errors="replace")
                yield Process(int(path.parent.name), int(parent), int(group), command)


class Runner:
    """A process, forked from this one, at the suite in `path`; the leader of a group that its workers are in."""

    def __init__(self, path: Path, folder: Path, num_workers: int, is_resumed: bool) -> None:
        self.num_workers, self.log = num_workers, folder.with_suffix(".log")
        words = ["bench", str(path), "--out", str(folder), "--workers", str(num_workers), "--device", "cpu"]
        self.pid = os.fork()
        if not self.pid:
            self._be(words + ["--resume"] * is_resumed)
        self._handle = os.pidfd_open(self.pid)

    def _be(self, words: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            cli.main(words)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)

    def wait(self, seconds: float | None) -> bool:
        """Whether it has ended within `seconds`; `RuntimeError` when it has failed."""
        if not select.select([self._handle], [], [], seconds)[0]:
            return False
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._handle)
        if code > 0:
            raise RuntimeError(f"a runner ended with code {code}: {self.log.read_text()[-300:]}")
        return True

    def workers(self) -> list[int]:
        return [one.pid for one in processes() if one.parent == self.pid and "spawn_main" in one.command]

    def kill(self, kind: str, rng: random.Random) -> str | None:
        """Kill by SIGKILL; what was killed, None when there was nothing of that kind."""
        if kind == "one of two workers":
            workers = self.workers()
            if not workers:
                return None
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
            return kind
        if kind == "the runner of two workers":
            os.kill(self.pid, signal.SIGKILL)
        else:
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(None)
        return kind


def kinds(num_workers: int) -> list[str]:
    return (
        ["the runner"]
        if num_workers == 1
        else ["the runner and both workers", "the runner of two workers", "one of two workers"]
    )


def num_done(folder: Path) -> int:
    """Shards that count."""
    return sum(not path.name.endswith(".failed.json") for path in (folder / SHARDS_FOLDER).glob("*.json"))


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--no-keep", "is_check", is_flag=True, help="Only check: write no table.")
def main(kills: int, seed: int, is_check: bool) -> None:
    torch.set_num_threads(1)  # so that torch begins no pool of threads, which a fork would lack; Arrow makes a new one
    rng, start = random.Random(seed), time.perf_counter()
    counts: collections.Counter[str] = collections.Counter()
    standings: dict[str, list[int]] = collections.defaultdict(list)
    num_rounds = num_different = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        suite = place / "kills.yaml"
        write_text(suite, json.dumps(SUITE))  # JSON is YAML
        lives: dict[int, float] = {}
        for num_workers in (1, 2):
            begin = time.perf_counter()
            Runner(suite, place / f"undisturbed-{num_workers}", num_workers, is_resumed=False).wait(None)
            lives[num_workers] = time.perf_counter() - begin
        expected = contents(place / "undisturbed-1")
        num_different += contents(place / "undisturbed-2") != expected
        num_shards = num_done(place / "undisturbed-1")
        say(f"undisturbed: {lives[1]:.1f} s, with two workers {lives[2]:.1f} s")
        while counts.total() < kills:
            folder, is_resumed, is_whole = place / f"round-{num_rounds}", False, False
            while not is_whole:
                runner = Runner(suite, folder, 2 if rng.random() < WITH_WORKERS else 1, is_resumed)
                is_resumed, is_alive = True, True
                while is_alive:
                    if counts.total() >= kills or runner.wait(rng.uniform(0, lives[runner.num_workers])):
                        is_whole = counts.total() < kills or runner.wait(None)
                        break
                    killed = runner.kill(rng.choice(kinds(runner.num_workers)), rng)
                    is_alive = killed in (None, "one of two workers")
                    if killed is not None:
                        counts[killed] += 1
                        standings[killed].append(num_done(folder))
            num_rounds += 1
            is_same = contents(folder) == expected
            num_different += not is_same
            say(f"{counts.total()}/{kills} kills, {num_rounds} rounds, {num_different} different")
    rows = [
        {
            "killed": kind,
            "times": count,
            f"shards done by then, of {num_shards}": f"{min(standings[kind])} to {max(standings[kind])}",
        }
        for kind, count in sorted(counts.items())
    ]
    facts = {
        "folders compared with the undisturbed one": num_rounds + 1,
        "different from it": num_different,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if is_check:
        say(json.dumps({"rows": rows, "facts": facts}))
    else:
        keep("kills", f"{kills} SIGKILLs at random moments of a suite of {len(expected)} records", rows, facts)
    if num_different:
        raise SystemExit("records differ from those of the undisturbed run")


if __name__ == "__main__":
    main()

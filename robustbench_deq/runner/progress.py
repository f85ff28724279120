"""How far a suite is and how long the rest takes: from its own shards while it runs, from earlier records before.

    time left = sum over missing shards of (samples x seconds per sample - seconds so far)
                x (elapsed seconds / seconds of all shards so far)

The last factor is one over the shards that were in progress at a time. Seconds per sample are those of the shards that
ended in this session: of the same model and attack where there are some, else of all. So what an earlier session had
done makes nothing look faster. A shard that takes longer than was expected adds nothing, so that the time left falls
until it ends.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from robustbench_deq.errors import UsageError
from robustbench_deq.records.store import RECORDS_FILE, load_records
from robustbench_deq.runner.shards import ShardStore, Standing
from robustbench_deq.runner.suite import Run, Shard


class SuiteProgress:
    """Counts the shards that end, in this session and before. One thread may tell it so while another asks.

    Args:
        runs: of the suite, each with its shards.
        folder: of the suite.
        clock: seconds since 1970.
    """

    def __init__(
        self, runs: Sequence[tuple[Run, list[Shard]]], folder: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._clock, self._start = ShardStore(folder), clock, clock()
        self._lock = threading.Lock()
        self._missing: dict[str, Shard] = {}
        self._robust: collections.Counter[str] = collections.Counter()
        self._done: collections.Counter[str] = collections.Counter()
        self._seconds: collections.Counter[tuple[str, str]] = collections.Counter()
        self._samples: collections.Counter[tuple[str, str]] = collections.Counter()
        self.num_shards = sum(len(shards) for _, shards in runs)
        self.num_failed = 0
        for shard in (shard for _, shards in runs for shard in shards):
            if self._store.is_done(shard):
                self._count(shard)
            else:
                self._missing[shard.key] = shard

    @property
    def num_done(self) -> int:
        """Shards that have ended, the failed ones too."""
        return self.num_shards - len(self._missing)

    def end(self, shard: Shard, reason: str | None) -> None:
        """A shard has ended in this session, with a reason if it failed."""
        with self._lock:
            del self._missing[shard.key]
            if reason is not None:
                self.num_failed += 1
                return
            self._count(shard)
            self._seconds[_kind(shard)] += self._store.times(shard).seconds
            self._samples[_kind(shard)] += shard.end - shard.begin

    def robust_accuracy(self, run: Run) -> float | None:
        """Of the samples that are done; None before the first."""
        return self._robust[run.key] / self._done[run.key] if self._done[run.key] else None

    def num_samples(self, run: Run) -> int:
        """Samples that are done."""
        return self._done[run.key]

    def seconds_left(self) -> float | None:
        """None before anything of this session is known to be done."""
        elapsed, running = self._clock() - self._start, self.running()
        spent = {shard.key: self._seconds_at(standing) for shard, standing in running}
        with self._lock:
            ended = self._seconds.total()
            if not ended:  # samples of the shards in progress are all that there is to go by
                done = sum(_num_done(shard, standing) for shard, standing in running)
                whole = sum(shard.end - shard.begin for shard in self._missing.values())
                return elapsed * (whole - done) / done if done else None
            mean = ended / self._samples.total()
            work = 0.0
            for shard in self._missing.values():
                kind = _kind(shard)
                pace = self._seconds[kind] / self._samples[kind] if self._samples[kind] else mean
                work += max(0.0, pace * (shard.end - shard.begin) - spent.get(shard.key, 0.0))
            return work * elapsed / (ended + sum(spent.values()))

    def _seconds_at(self, standing: Standing) -> float:
        """At a shard in this session; another machine's clock may be wrong."""
        now = self._clock()
        return min(max(0.0, now - standing.began), now - self._start)

    def running(self) -> list[tuple[Shard, Standing]]:
        """Shards in progress, whoever is at them, the oldest first."""
        begun = self._store.begun()
        with self._lock:
            shards = [self._missing[key] for key in begun & self._missing.keys()]
        found = [(shard, self._store.standing(shard)) for shard in shards]
        return sorted(((shard, at) for shard, at in found if at is not None), key=lambda pair: pair[1].began)

    def _count(self, shard: Shard) -> None:
        self._robust[shard.run.key] += self._store.num_robust(shard)
        self._done[shard.run.key] += shard.end - shard.begin


def _num_done(shard: Shard, standing: Standing) -> float:
    """Samples, those of the batch in progress by the share of its attack."""
    left = shard.end - shard.begin - standing.num_done
    return standing.num_done + standing.share * min(shard.run.batch_size, left)


def _kind(shard: Shard) -> tuple[str, str]:
    return shard.run.model, shard.run.label


class Pace(NamedTuple):
    """Seconds of attack and judge per sample, with how many threads, and the folder of the record that says so."""

    seconds: float
    num_threads: int | str | None
    source: Path


class EarlierPaces:
    """What the records anywhere below some folders let expect.

    Args:
        device: "cpu", or a GPU, on which they were made; None: any.
    """

    def __init__(self, folders: Iterable[Path], device: str | None = None) -> None:
        self._found: dict[tuple[str, str], list[tuple[dict[str, Any], Pace]]] = collections.defaultdict(list)
        paths = {path.resolve(): path for folder in folders for path in folder.rglob(RECORDS_FILE)}
        for path in sorted(paths.values(), key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(UsageError):  # of another version, or not ours
                for record in reversed(load_records(path.parent)):
                    made = record.environment
                    if device is not None and (made.get("device") == "cpu") != (device == "cpu"):
                        continue
                    seconds = record.cost.wall_seconds + (record.cost.judge_seconds or 0.0)
                    pace = Pace(seconds / record.data.num_samples, made.get("num_threads"), path.parent)
                    self._found[record.model, record.attack].append((record.attack_config, pace))

    def of(self, run: Run) -> Pace | None:
        """The newest of a record of the same model, attack and settings, under whatever threat; None without one."""
        for known, pace in self._found.get((run.model, run.attack), ()):
            if all(known.get(key, value) == value for key, value in run.config.items()):
                return pace
        return None

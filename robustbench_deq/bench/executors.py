"""Where shards are done: in this process, in several, or on a Ray cluster. Each hands back results as they come.

A worker that dies takes nothing with it but the shard it was at, which is given to another; a shard that has killed
`MAX_ATTEMPTS` workers is a failure.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import torch

from robustbench_deq.bench.suite import Shard
from robustbench_deq.errors import UsageError
from robustbench_deq.memory import keep_freed_memory

Work = Callable[[Shard], str | None]
"""Does a shard; the reason when it failed."""
MAX_ATTEMPTS = 3
WORKER_DIED = "the worker died (out of memory, or killed)"


class Executor(abc.ABC):
    @abc.abstractmethod
    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        """Do every shard; pairs of shard and reason, in the order in which they end."""


class Serial(Executor):
    """One after another, here, with all threads."""

    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        for shard in shards:
            yield shard, work(shard)


class Processes(Executor):
    """`num_workers` processes on this machine, which share its cores evenly."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.num_threads = max(1, (os.cpu_count() or 1) // num_workers)

    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        attempts: collections.Counter[str] = collections.Counter()
        waiting = list(shards)
        while waiting:
            ended: set[str] = set()
            with self._pool() as pool:
                futures = {pool.submit(work, shard): shard for shard in waiting}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        shard, reason = futures[future], future.result()
                        ended.add(shard.key)
                        yield shard, reason
                except BrokenProcessPool:  # which shard it was is not told: all that were running are suspects
                    running = [shard for shard in waiting if shard.key not in ended][: self.num_workers]
                    attempts.update(shard.key for shard in running)
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
            waiting = [shard for shard in waiting if shard.key not in ended]
            for shard in [shard for shard in waiting if attempts[shard.key] >= MAX_ATTEMPTS]:
                waiting.remove(shard)
                yield shard, WORKER_DIED

    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            self.num_workers, multiprocessing.get_context("spawn"), _begin_worker, (self.num_threads,)
        )


def _begin_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    keep_freed_memory()


class Ray(Executor):
    """A Ray cluster; one shard takes `num_cpus` and `num_gpus` of it.

    Args:
        address: of a running cluster; None starts one on this machine.

    Raises:
        UsageError: when Ray is not installed or no cluster answers.
    """

    def __init__(self, address: str | None, num_cpus: float = 1.0, num_gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError.of(
                "--executor ray", expected="the package ray", got="none", fix="pip install 'robustbench-deq[cluster]'"
            ) from None
        self._ray, self.num_cpus, self.num_gpus = ray, num_cpus, num_gpus
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError.of(
                    "--address", expected="a Ray cluster that answers", got=str(error).splitlines()[0], fix="start one"
                ) from None

    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        ray = self._ray
        remote = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=MAX_ATTEMPTS - 1)(_in_ray)
        futures = {remote.remote(work, shard, max(1, int(self.num_cpus))): shard for shard in shards}
        while futures:
            for future in ray.wait(list(futures), num_returns=1)[0]:
                shard = futures.pop(future)
                try:
                    yield shard, ray.get(future)
                except ray.exceptions.WorkerCrashedError:
                    yield shard, WORKER_DIED


def _in_ray(work: Work, shard: Shard, num_threads: int) -> str | None:
    _begin_worker(num_threads)
    return work(shard)

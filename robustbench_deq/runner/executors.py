"""Where shards are done: in this process, in several, or on a Ray cluster. Each hands back results as they come.

A worker that dies takes nothing with it but the shard it was at, which is given to another; a shard that has killed
`MAX_ATTEMPTS` workers is a failure.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_disk_full
from robustbench_deq.memory import keep_freed_memory
from robustbench_deq.quiet import ignore_torch_deprecations
from robustbench_deq.records.environment import num_cpus
from robustbench_deq.runner.suite import Resources, Shard

Work = Callable[[Shard], str | None]
"""Does a shard; the reason when it failed. Raises `OSError` when the disk is full, which ends all."""
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
    """`num_workers` processes here, which share the CPUs of this one evenly unless `num_threads` of each is given."""

    def __init__(self, num_workers: int, num_threads: int | None = None) -> None:
        self.num_workers = num_workers
        self.num_threads = num_threads or max(1, num_cpus() // num_workers)

    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        attempts: collections.Counter[str] = collections.Counter()
        waiting = {shard.key: shard for shard in shards}
        while waiting:
            # Which shard broke a pool is unknown: all that were running are suspects, and the last attempt is alone.
            suspects = [shard for key, shard in waiting.items() if attempts[key] == MAX_ATTEMPTS - 1]
            batch = suspects[:1] or list(waiting.values())
            with self._pool() as pool:
                try:
                    with _interrupts_held():
                        futures = {pool.submit(work, shard): shard for shard in batch}
                    for future in concurrent.futures.as_completed(futures):
                        shard, reason = futures[future], future.result()
                        del waiting[shard.key]
                        yield shard, reason
                except BrokenProcessPool:
                    running = [shard for shard in batch if shard.key in waiting][: self.num_workers]
                    attempts.update(shard.key for shard in running)
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
            for shard in [shard for key, shard in waiting.items() if attempts[key] == MAX_ATTEMPTS]:
                del waiting[shard.key]
                yield shard, WORKER_DIED

    def _pool(self) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            self.num_workers, multiprocessing.get_context("spawn"), _begin_process, (self.num_threads,)
        )


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Within, Ctrl-C waits. Processes that are started leave it to this one, even while they import their modules."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process(num_threads: int) -> None:
    """A worker ends with its parent, which may have been killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _begin_worker(num_threads)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _begin_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    ignore_torch_deprecations()


class Ray(Executor):
    """A Ray cluster, whose machines share the suite's folder.

    Args:
        address: of a running cluster; None starts one on this machine, which ends with this process.
        num_workers: shards at a time on a cluster that is started here; None: as many as it has room for.
        resources: of one shard. Where they do not say how many GPUs, one on a cluster that has any, else none.
        device: where shards are to be done; None: on a GPU where a worker sees one.

    Raises:
        UsageError: when Ray is not installed, no cluster answers, or it has no GPU and `device` is one.
        RunError: when none can be started here.
    """

    def __init__(
        self,
        address: str | None,
        num_workers: int | None = None,
        resources: Resources | None = None,
        device: str | None = "cpu",
    ) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError.of(
                "--executor ray", expected="the package ray", got="none", fix="pip install 'robustbench-deq[cluster]'"
            ) from None
        resources = resources or Resources()
        self._ray, self.num_cpus = ray, resources.num_cpus
        if address is not None:
            self._join(address)
        else:
            self._start(num_cpus() if num_workers is None else max(1, math.ceil(num_workers * self.num_cpus)))
        self.num_gpus = self._gpus_of_a_shard(resources.num_gpus, device)

    def _gpus_of_a_shard(self, asked: float | None, device: str | None) -> float:
        if asked is not None:
            return asked
        is_there = self._ray.cluster_resources().get("GPU", 0) > 0
        if device is not None and device.startswith("cuda") and not is_there:
            raise UsageError.of(
                f"--device {device}",
                expected="a Ray cluster with GPUs",
                got="one without",
                fix="set resources.num_gpus in the suite if it will have some, or omit --device",
            )
        return float(is_there and device != "cpu")

    def _start(self, room: int) -> None:
        ray = self._ray
        try:
            ray.init(address="local", include_dashboard=False, num_cpus=room, **QUIET)
        except Exception as error:  # of no common kind: a busy machine's bare Exception among them
            ray.shutdown()
            raise RunError(f"Ray did not start: {' '.join(str(error).split())[:300]}") from None

    def _join(self, address: str) -> None:
        try:
            _ask(address)
            self._ray.init(address=address, **QUIET)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError.of(
                f"--address {address}",
                expected="a Ray cluster that answers",
                got=(str(error).splitlines() or [type(error).__name__])[0],
                fix="start one with 'ray start --head'",
            ) from None

    def map(self, work: Work, shards: Sequence[Shard]) -> Iterator[tuple[Shard, str | None]]:
        ray = self._ray
        remote = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=MAX_ATTEMPTS - 1)(_in_ray)
        futures = {remote.remote(work, shard, max(1, int(self.num_cpus)), os.getcwd()): shard for shard in shards}
        while futures:
            for future in ray.wait(list(futures), num_returns=1)[0]:
                shard = futures.pop(future)
                try:
                    reason = ray.get(future)
                except ray.exceptions.WorkerCrashedError:
                    reason = WORKER_DIED
                except ray.exceptions.RayError as error:
                    if is_disk_full(cause := getattr(error, "cause", error)):
                        for other in futures:
                            ray.cancel(other)
                        raise cause from None
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                yield shard, reason


QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}
ANSWER_SECONDS = 5.0


def _ask(address: str) -> None:
    """Ray itself waits a minute for a cluster. Raises `OSError` when nothing listens at `host:port`."""
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if sign and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    elif address != "auto":
        raise ValueError("no host:port")


def _in_ray(work: Work, shard: Shard, num_threads: int, folder: str) -> str | None:
    if Path(folder).is_dir():  # models and data may be named by paths
        os.chdir(folder)
    _begin_worker(num_threads)
    return work(shard)

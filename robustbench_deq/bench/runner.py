"""The runner: shards of a suite to records.

    DIR/suite.json              the resolved suite; a folder holds one suite
    DIR/shards/                 what is done, has failed, and is in progress (see `bench.shards`)
    DIR/records.jsonl, samples/ written when everything has been tried

A run that was killed is continued by doing what is missing, and two runners on one folder share the work.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robustbench_deq.attack import Attack
from robustbench_deq.bench.environment import describe_environment
from robustbench_deq.bench.evaluate import Part, Task, evaluate_batch, summarise
from robustbench_deq.bench.executors import WORKER_DIED, Executor
from robustbench_deq.bench.images import choose_images, save_images
from robustbench_deq.bench.records import DataRecord, RecordStore
from robustbench_deq.bench.shards import Claim, ShardStore
from robustbench_deq.bench.suite import Run, Shard, SuiteConfig
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel, check_labels
from robustbench_deq.errors import UsageError
from robustbench_deq.files import write_json
from robustbench_deq.models import load_model
from robustbench_deq.threats import Norm, Threat

log = logging.getLogger(__name__)

BuildAttack = Callable[[str, Threat, dict[str, Any]], Attack]
SUITE_FILE = "suite.json"
POLL_SECONDS = 1.0


@functools.lru_cache(maxsize=4)
def _model(name: str, device: str) -> EquilibriumModel:
    return load_model(name).to(device).eval()


@functools.lru_cache(maxsize=4)
def _data(name: str, split: str, num_samples: int) -> Split:
    return load(name, SplitName(split), num_samples)


@functools.lru_cache(maxsize=1)
def _environment(device: str) -> dict[str, Any]:
    return describe_environment(torch.device(device))  # asks git, which takes longer than a small shard


@functools.lru_cache(maxsize=4)
def _warm_up(name: str, device: str, data: str, split: str, num_samples: int) -> None:
    """One gradient, once: what a process does for the first time must not count as the time of its first attack."""
    x = _data(data, split, num_samples).x[:2].to(device).requires_grad_()
    torch.autograd.grad(_model(name, device)(x).sum(), x)


def run_shard(shard: Shard, folder: Path, build_attack: BuildAttack, device: str = "cpu") -> str | None:
    """Do a shard unless it is done or another process is at it; the reason when it failed.

    What the models, the data or the attack raise is a failure of this shard, kept with its reason, and no exception.
    """
    store = ShardStore(folder)
    with store.claim(shard) as claim:
        if claim is None:
            return None
        start = time.perf_counter()
        try:
            parts = _attack(shard, folder, build_attack, device, claim)
        except Exception as error:
            log.debug("shard %s", shard.key, exc_info=True)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            store.fail(shard, reason)
            return reason
        seconds = time.perf_counter() - start
        store.save(shard, parts, _environment(device), claim.began, seconds)
    return None


def _attack(shard: Shard, folder: Path, build_attack: BuildAttack, device: str, claim: Claim) -> list[Part]:
    """The parts of a shard; the first one of a run also leaves some of its images in the folder."""
    run = shard.run
    model, data = _model(run.model, device), _data(run.data, run.split, run.num_samples)
    if data.digest != run.digest:
        raise UsageError.of(f"data {run.data}", expected="those of the plan", got="others", fix="start the suite anew")
    model.check_images(data.x)
    check_labels(data.y, len(data), model.num_classes)
    _warm_up(run.model, device, run.data, run.split, run.num_samples)
    task = task_of(run, build_attack)
    batches = [
        slice(begin, min(begin + run.batch_size, shard.end)) for begin in range(shard.begin, shard.end, run.batch_size)
    ]
    parts, num_robust = [], 0
    for rows in batches:
        part, x_adv = evaluate_batch(model, task, data, rows, torch.device(device))
        parts.append(part)
        num_robust += int(part.samples["is_robust"].sum())
        claim.note(rows.stop - shard.begin, num_robust)
        if rows.start == 0:
            save_images(folder, run.key, choose_images(part.samples, data.x[rows].numpy(), x_adv.numpy()))
    return parts


def task_of(run: Run, build_attack: BuildAttack) -> Task:
    return Task(
        build_attack(run.attack, Threat(Norm.parse(run.norm), run.epsilon), run.config),
        model_name=run.model,
        label=run.label,
        batch_size=run.batch_size,
        seed=run.seed,
        num_snapshots=run.num_snapshots,
        model_sha256=run.model_sha256,
    )


def assemble(runs: Sequence[tuple[Run, list[Shard]]], folder: Path, build_attack: BuildAttack) -> int:
    """Records of all runs whose shards are done and that have none yet, in the order of the plan; how many are new."""
    store, records = ShardStore(folder), RecordStore(folder)
    count = 0
    with store.alone():  # or two runners that end together would both write a record
        known = records.identifiers()
        for run, shards in runs:
            if run.key in known or not all(store.is_done(shard) for shard in shards):
                continue
            loaded = [store.load(shard) for shard in shards]
            parts = [part for found, _ in loaded for part in found]
            data = DataRecord(name=run.data, split=run.split, num_samples=run.num_samples, digest=run.digest)
            record, samples = summarise(parts, task_of(run, build_attack), data, loaded[0][1])
            records.append(record.model_copy(update={"record_id": run.key}), samples)
            count += 1
        if all(store.is_done(shard) for _, shards in runs for shard in shards):
            store.tidy()
    return count


class Outcome(NamedTuple):
    """What `run_suite` did: shards done by now, reasons by the key of the shards that failed, and new records."""

    num_done: int
    failures: dict[str, str]
    num_records: int


def run_suite(
    runs: Sequence[tuple[Run, list[Shard]]],
    folder: Path,
    build_attack: BuildAttack,
    executor: Executor,
    device: str = "cpu",
    watch: Callable[[Shard, str | None], None] | None = None,
) -> Outcome:
    """Do what is missing, then write the records of all runs that are whole.

    A shard that failed before is tried again. One that another runner has claimed is waited for.

    Args:
        executor: where shards are done.
        watch: called after each shard, with the reason if it failed.
    """
    folder = folder.resolve()  # workers may have another current folder
    store = ShardStore(folder)
    shards = [shard for _, cut in runs for shard in cut]
    missing = {shard.key: shard for shard in shards if not store.is_done(shard)}
    failures: dict[str, str] = {}
    work = functools.partial(run_shard, folder=folder, build_attack=build_attack, device=device)
    try:
        while missing:
            free = [shard for shard in missing.values() if not store.is_claimed(shard)]
            if not free:
                time.sleep(POLL_SECONDS)
            for shard, reason in executor.map(work, free):
                if reason is None and not store.is_done(shard):
                    continue  # another runner has claimed it
                del missing[shard.key]
                if reason is not None:
                    failures[shard.key] = reason
                if reason == WORKER_DIED:  # and could not write it down
                    store.fail(shard, reason)
                if watch is not None:
                    watch(shard, reason)
    finally:
        num_records = assemble(runs, folder, build_attack)
    return Outcome(sum(store.is_done(shard) for shard in shards), failures, num_records)


def claim_folder(folder: Path, suite: SuiteConfig, is_resumed: bool) -> None:
    """Make `folder` that of `suite`. One that was killed before it had a suite is begun.

    Raises:
        UsageError: when a resumed folder holds something but no suite, or another one.
    """
    path, content = folder / SUITE_FILE, suite.model_dump(mode="json")
    is_empty = not any(not entry.name.startswith(".") for entry in folder.glob("*"))
    if not is_resumed or is_empty:
        write_json(path, content)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError.of(
            f"folder {folder}", expected=f"{SUITE_FILE} of an earlier run", got="none", fix="drop --resume"
        ) from None
    changed = [key for key in content if key != "resources" and earlier.get(key) != content[key]]
    if changed:
        raise UsageError.of(
            f"folder {folder}", expected="the suite it was made from", got=f"another {changed[0]}", fix="use --out"
        )


def missing_shards(runs: Sequence[tuple[Run, list[Shard]]], folder: Path) -> list[Shard]:
    store = ShardStore(folder)
    return [shard for _, shards in runs for shard in shards if not store.is_done(shard)]

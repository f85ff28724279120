"""The runner: shards of a suite to records.

    DIR/suite.json, plan.json   the resolved suite, and its runs; a folder holds one suite
    DIR/clean/                  equilibria that attacks share, until all is done (see `runner.clean`)
    DIR/shards/                 what is done, has failed, and is in progress (see `runner.shards`)
    DIR/records.jsonl, samples/ written when everything has been tried

A run that was killed is continued by doing what is missing, and two runners on one folder share the work.
"""

from __future__ import annotations

import datetime
import functools
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.batch import Part, Task, batch_of, check_data, evaluate_batch
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.summary import summarise
from robustbench_deq.files import check_json, is_blank, is_disk_full, refuse_links, remove_temporaries, write_json
from robustbench_deq.models import load_model
from robustbench_deq.models.cards import names_function
from robustbench_deq.protocol import ATTACKS, Attack
from robustbench_deq.records.environment import describe_environment, merge_environments
from robustbench_deq.records.images import choose_images, save_images
from robustbench_deq.records.missing import write_plan
from robustbench_deq.records.record import DataRecord
from robustbench_deq.records.store import RecordStore
from robustbench_deq.runner.clean import CleanStore
from robustbench_deq.runner.executors import Executor
from robustbench_deq.runner.shards import Claim, ShardStore
from robustbench_deq.runner.suite import Run, Shard, SuiteConfig, digest_of_model
from robustbench_deq.threat_spec import ThreatSpec
from robustbench_deq.threats import Threat

BuildAttack = Callable[[str, Threat, dict[str, Any]], Attack]
SUITE_FILE = "suite.json"
POLL_SECONDS = 1.0


@functools.lru_cache(maxsize=4)
def _model(name: str, digest: str, device: str) -> EquilibriumModel:
    """The model of the plan. Raises `UsageError` when it has become another one."""
    model = load_model(name).to(device).eval()
    if digest_of_model(name) != digest:
        raise UsageError.of(
            f"model {name}", expected="the model that was planned", got="a changed one", fix="use a new output folder"
        )
    return model


@functools.lru_cache(maxsize=4)
def _data(name: str, split: str, num_samples: int, digest: str) -> Split:
    """The samples of the plan. Raises `UsageError` when they have become others."""
    data = load(name, SplitName(split), num_samples)
    if data.digest != digest:
        raise UsageError.of(
            f"data {name}",
            expected="the samples that were planned",
            got="changed ones",
            fix="use a new output folder",
        )
    return data


@functools.lru_cache(maxsize=4)
def _warm_up(name: str, model_digest: str, device: str, data: tuple[str, str, int, str]) -> None:
    """One gradient, once: what a process does for the first time must not count as the time of its first attack."""
    x = _data(*data).x[:2].to(device).requires_grad_()
    logits = _model(name, model_digest, device)(x)
    if logits.requires_grad:  # a model without a gradient is refused by the attacks that need one
        torch.autograd.grad(logits.sum(), x, allow_unused=True)


def run_shard(shard: Shard, folder: Path, build_attack: BuildAttack, device: str | None = "cpu") -> str | None:
    """Do a shard unless it is done or another process is at it; the reason when it failed.

    What the models, the data, the attack or the disk raise is a failure of this shard, kept with its reason, and no
    exception.

    Args:
        device: None: a GPU where this process sees one, else the CPU.

    Raises:
        OSError: when the disk is full, where no other shard would find room.
    """
    store, device = ShardStore(folder), device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with store.claim(shard) as claim:
            if claim is not None:
                start = time.perf_counter()
                parts = _attack(shard, folder, build_attack, device, claim)
                environment = describe_environment(torch.device(device))
                store.save(shard, parts, environment, claim.began, time.perf_counter() - start)
    except Exception as error:
        if store.is_done(shard):  # by another runner, which had no use for what was in progress here
            return None
        if is_disk_full(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        store.fail(shard, reason, traceback.format_exc())
        return reason
    return None


def _attack(shard: Shard, folder: Path, build_attack: BuildAttack, device: str, claim: Claim) -> list[Part]:
    """The parts of a shard; the first one of a run also leaves some of its images in the folder."""
    run = shard.run
    named = run.data, run.split, run.num_samples, run.digest
    model, data = _model(run.model, run.model_digest, device), _data(*named)
    check_data(model, data)
    _warm_up(run.model, run.model_digest, device, named)
    task = task_of(run, build_attack)
    batches = [
        slice(begin, min(begin + run.batch_size, shard.end)) for begin in range(shard.begin, shard.end, run.batch_size)
    ]
    parts, num_robust, store, place = [], 0, CleanStore(folder), torch.device(device)
    for rows in batches:
        watch = _Stages(claim, rows.start - shard.begin, num_robust)
        watch("clean equilibria", 0.0)
        x, y = batch_of(data, rows, place)
        with store.batch(run, rows, place, lambda x=x, y=y: judge_clean(model, x, y)) as clean:
            part, x_adv = evaluate_batch(model, task, data, rows, place, clean, watch)
        parts.append(part)
        num_robust += int(part.samples["is_robust"].sum())
        claim.note(rows.stop - shard.begin, num_robust)
        if rows.start == 0:
            save_images(folder, run.key, choose_images(part.samples, data.x[rows].numpy(), x_adv.numpy()))
    return parts


def check_models(runs: Sequence[Run]) -> None:
    """Build the models of files, and see that they fit the data and have a gradient where an attack needs one. Of the
    others the plan has read as much in their descriptions.

    Raises:
        UsageError: for the first one that does not.
    """
    needs: dict[tuple[str, str, tuple[str, str, int, str]], bool] = {}
    for run in filter(lambda run: names_function(run.model), runs):
        key = run.model, run.model_digest, (run.data, run.split, run.num_samples, run.digest)
        needs[key] = needs.get(key, False) or ATTACKS.get(run.attack).is_gradient_based
    for (name, digest, named), needs_gradient in needs.items():
        check_data(_model(name, digest, "cpu"), _data(*named), needs_gradient)


NOTED_SHARE = 0.02
"""What an attack has to go on to be noted again: notes are files."""


class _Stages:
    """Notes every new stage of a batch, and how far its attack is now and then."""

    def __init__(self, claim: Claim, num_done: int, num_robust: int) -> None:
        self._claim, self._num_done, self._num_robust, self._stage, self._share = claim, num_done, num_robust, "", 0.0

    def __call__(self, stage: str, share: float) -> None:
        is_attack = stage.startswith("attack")
        if stage != self._stage or (is_attack and share >= self._share + NOTED_SHARE):
            self._stage, self._share = stage, share if is_attack else self._share
            self._claim.note(self._num_done, self._num_robust, stage, self._share)


def task_of(run: Run, build_attack: BuildAttack) -> Task:
    return Task(
        attack=build_attack(run.attack, ThreatSpec(norm=run.norm, epsilon=run.epsilon).build(), run.config),
        model_name=run.model,
        label=run.label,
        batch_size=run.batch_size,
        seed=run.seed,
        num_snapshots=run.num_snapshots,
        model_sha256=run.model_sha256,
        file_sha256=run.file_sha256,
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
            sample_ids = _data(run.data, run.split, run.num_samples, run.digest).sample_ids.numpy()
            loaded = [store.load(shard, sample_ids[shard.begin : shard.end]) for shard in shards]
            began = datetime.datetime.fromtimestamp(min(store.times(shard).began for shard in shards), datetime.UTC)
            parts = [part for found, _ in loaded for part in found]
            data = DataRecord(name=run.data, split=run.split, num_samples=run.num_samples, digest=run.digest)
            environment = merge_environments([found for _, found in loaded])
            record, samples = summarise(parts, task_of(run, build_attack), data, environment)
            created = began.isoformat(timespec="seconds")
            records.append(record.model_copy(update={"record_id": run.key, "created": created}), samples)
            count += 1
        if all(store.is_done(shard) for _, shards in runs for shard in shards):
            store.tidy()
            CleanStore(folder).clear()
    return count


class Outcome(NamedTuple):
    """What `run_suite` did.

    num_done         shards done by now
    failures         reasons, by the key of the shards that failed
    num_records      new records
    busy_seconds     of attack and judge, over the shards done meanwhile
    """

    num_done: int
    failures: dict[str, str]
    num_records: int
    busy_seconds: float


def run_suite(
    runs: Sequence[tuple[Run, list[Shard]]],
    folder: Path,
    build_attack: BuildAttack,
    executor: Executor,
    device: str | None = "cpu",
    watch: Callable[[Shard, str | None], None] | None = None,
) -> Outcome:
    """Do what is missing, then write the records of all runs that are whole.

    A shard that failed before is tried again. One that another runner has claimed is waited for.

    Args:
        executor: where shards are done.
        device: None: a GPU where the process that does a shard sees one, else the CPU.
        watch: called after each shard, with the reason if it failed.

    Raises:
        OSError: when the disk is full; what is done is kept.
    """
    folder = folder.resolve()  # workers may have another current folder
    remove_temporaries(folder)
    store = ShardStore(folder)
    shards = [shard for _, cut in runs for shard in cut]
    missing = {shard.key: shard for shard in shards if not store.is_done(shard)}
    failures: dict[str, str] = {}
    busy_seconds = 0.0
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
                    if store.reason(shard) != reason:  # a worker that died could not write it down
                        store.fail(shard, reason)
                else:
                    busy_seconds += store.times(shard).busy_seconds
                if watch is not None:
                    watch(shard, reason)
    finally:
        num_records = assemble(runs, folder, build_attack)
    return Outcome(sum(store.is_done(shard) for shard in shards), failures, num_records, busy_seconds)


def check_folder(folder: Path, suite: SuiteConfig, runs: Sequence[Run]) -> None:
    """See that `folder` is that of `suite`, or empty, as when it was killed before it had a suite.

    Raises:
        UsageError: when it holds something but no suite, or another one, or records of models, data or defaults that
            are others by now, or symbolic links.
    """
    refuse_links(folder)
    if is_blank(folder):
        return
    check_json(folder / SUITE_FILE, suite.model_dump(mode="json"), but=["resources"])
    strange = RecordStore(folder).identifiers() - {run.key for run in runs}
    if strange:
        raise UsageError.of(
            f"folder {folder}",
            expected="records of the models, data and settings of today",
            got=f"{len(strange)} of earlier ones",
            fix="name a new folder",
        )


def claim_folder(folder: Path, suite: SuiteConfig, runs: Sequence[Run]) -> None:
    """Make `folder`, which has been checked, that of `suite`, whose plan are `runs`."""
    write_json(folder / SUITE_FILE, suite.model_dump(mode="json"))  # first: without it there is no going on
    write_plan(folder, {run.key: (run.model, run.label) for run in runs})


def missing_shards(runs: Sequence[tuple[Run, list[Shard]]], folder: Path) -> list[Shard]:
    store = ShardStore(folder)
    return [shard for _, shards in runs for shard in shards if not store.is_done(shard)]

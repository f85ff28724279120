"""The runner: shards of a suite to records.

    DIR/suite.json              the resolved suite; a folder holds one suite
    DIR/shards/KEY.parquet      a finished shard's samples, and KEY.json, written last: the rest of its parts
    DIR/shards/KEY.failed.json  why a shard failed
    DIR/records.jsonl, samples/ written when everything has been tried

A shard is done when its JSON file is there, whoever made it. So a run that was killed is continued by doing what is
missing, and two runners on one folder share the work: a shard in progress is locked by its file KEY.lock, which the
system releases when its process dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from robustbench_deq.attack import Attack
from robustbench_deq.bench.environment import describe_environment
from robustbench_deq.bench.evaluate import Part, Task, evaluate_batch, summarise
from robustbench_deq.bench.executors import Executor
from robustbench_deq.bench.images import choose_images, save_images
from robustbench_deq.bench.records import CostRecord, CurvePoint, DataRecord, RecordStore, load_records
from robustbench_deq.bench.suite import Run, Shard, SuiteConfig
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel, check_labels
from robustbench_deq.errors import UsageError
from robustbench_deq.files import replacing, write_json
from robustbench_deq.models import load_model
from robustbench_deq.threats import Norm, Threat

log = logging.getLogger(__name__)

BuildAttack = Callable[[str, Threat, dict[str, Any]], Attack]
SHARDS_FOLDER = "shards"
SUITE_FILE = "suite.json"
ASSEMBLY_LOCK = "assembly.lock"
POLL_SECONDS = 1.0


class ShardStore:
    """Finished and failed shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / SHARDS_FOLDER

    def is_done(self, shard: Shard) -> bool:
        return self._path(shard, ".json").is_file()

    def save(self, shard: Shard, parts: Sequence[Part], environment: dict[str, Any]) -> None:
        """Keep the parts of a shard; the JSON file, which makes it count, comes last."""
        sizes = [len(part.samples) for part in parts]
        with replacing(self._path(shard, ".parquet")) as temporary:
            pd.concat([part.samples for part in parts], ignore_index=True).to_parquet(temporary, index=False)
        content = [
            {
                "num_samples": size,
                "cost": part.cost.model_dump(mode="json"),
                "curve": [point.model_dump(mode="json") for point in part.curve],
                "residuals": part.residuals,
                "diagnostics": part.diagnostics,
            }
            for size, part in zip(sizes, parts, strict=True)
        ]
        write_json(self._path(shard, ".json"), {"parts": content, "environment": environment})
        self._path(shard, ".failed.json").unlink(missing_ok=True)

    def load(self, shard: Shard) -> tuple[list[Part], dict[str, Any]]:
        content = json.loads(self._path(shard, ".json").read_text(encoding="utf-8"))
        samples, parts, begin = pd.read_parquet(self._path(shard, ".parquet")), [], 0
        for part in content["parts"]:
            rows = samples.iloc[begin : begin + part["num_samples"]]
            begin += part["num_samples"]
            cost, curve = CostRecord(**part["cost"]), [CurvePoint(**point) for point in part["curve"]]
            parts.append(Part(rows, cost, curve, part["residuals"], part["diagnostics"]))
        return parts, content["environment"]

    def fail(self, shard: Shard, reason: str) -> None:
        write_json(self._path(shard, ".failed.json"), {"reason": reason, "shard": shard.model_dump(mode="json")})

    def reason(self, shard: Shard) -> str | None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(self._path(shard, ".failed.json").read_text(encoding="utf-8"))["reason"]
        return None

    @contextlib.contextmanager
    def claim(self, shard: Shard) -> Iterator[bool]:
        """Whether this process may do the shard; the claim ends with the block, or with the process."""
        path = self._path(shard, ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.is_done(shard)
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is in such a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ASSEMBLY_LOCK).open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{shard.key}{suffix}"


@functools.lru_cache(maxsize=4)
def _model(name: str, device: str) -> EquilibriumModel:
    return load_model(name).to(device).eval()


@functools.lru_cache(maxsize=4)
def _data(name: str, split: str, num_samples: int) -> Split:
    return load(name, SplitName(split), num_samples)


def run_shard(shard: Shard, folder: Path, build_attack: BuildAttack, device: str = "cpu") -> str | None:
    """Do a shard unless it is done or another process is at it; the reason when it failed.

    What the models, the data or the attack raise is a failure of this shard, kept with its reason, and no exception.
    """
    store = ShardStore(folder)
    with store.claim(shard) as is_mine:
        if not is_mine:
            return None
        try:
            parts = _attack(shard, folder, build_attack, device)
        except Exception as error:
            log.debug("shard %s", shard.key, exc_info=True)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            store.fail(shard, reason)
            return reason
        store.save(shard, parts, describe_environment(torch.device(device)))
    return None


def _attack(shard: Shard, folder: Path, build_attack: BuildAttack, device: str) -> list[Part]:
    """The parts of a shard; the first one of a run also leaves some of its images in the folder."""
    run = shard.run
    model, data = _model(run.model, device), _data(run.data, run.split, run.num_samples)
    if data.digest != run.digest:
        raise UsageError.of(f"data {run.data}", expected="those of the plan", got="others", fix="start the suite anew")
    model.check_images(data.x)
    check_labels(data.y, len(data), model.num_classes)
    task = task_of(run, build_attack)
    batches = [
        slice(begin, min(begin + run.batch_size, shard.end)) for begin in range(shard.begin, shard.end, run.batch_size)
    ]
    parts = []
    for rows in batches:
        part, x_adv = evaluate_batch(model, task, data, rows, torch.device(device))
        parts.append(part)
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
    store = ShardStore(folder)
    shards = [shard for _, cut in runs for shard in cut]
    failures: dict[str, str] = {}
    work = functools.partial(run_shard, folder=folder, build_attack=build_attack, device=device)
    try:
        while missing := [shard for shard in shards if shard.key not in failures and not store.is_done(shard)]:
            before = len(missing)
            for shard, reason in executor.map(work, missing):
                if reason is not None:
                    failures[shard.key] = reason
                if watch is not None and (reason is not None or store.is_done(shard)):
                    watch(shard, reason)
            after = sum(shard.key not in failures and not store.is_done(shard) for shard in missing)
            if after == before:
                time.sleep(POLL_SECONDS)  # all that is missing is another runner's
    finally:
        num_records = assemble(runs, folder, build_attack)
    return Outcome(sum(store.is_done(shard) for shard in shards), failures, num_records)


def claim_folder(folder: Path, suite: SuiteConfig, is_resumed: bool) -> None:
    """Make `folder` that of `suite`.

    Raises:
        UsageError: when a resumed folder holds none, or another one.
    """
    path, content = folder / SUITE_FILE, suite.model_dump(mode="json")
    if not is_resumed:
        write_json(path, content)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError.of(
            f"folder {folder}", expected=f"{SUITE_FILE} of an earlier run", got="none", fix="drop --resume"
        ) from None
    changed = [key for key in content if earlier.get(key) != content[key]]
    if changed:
        raise UsageError.of(
            f"folder {folder}", expected="the suite it was made from", got=f"another {changed[0]}", fix="use --out"
        )


def missing_shards(runs: Sequence[tuple[Run, list[Shard]]], folder: Path) -> list[Shard]:
    store = ShardStore(folder)
    return [shard for _, shards in runs for shard in shards if not store.is_done(shard)]


def seconds_per_sample(folder: Path) -> dict[tuple[str, str, str], float]:
    """Of the records below `folder`, by model, attack and label; the newest counts."""
    found: dict[tuple[str, str, str], float] = {}
    for path in sorted(folder.rglob("records.jsonl"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(UsageError):  # of another version, or not ours
            for record in load_records(path.parent):
                pace = record.cost.wall_seconds / record.data.num_samples
                found[record.model, record.attack, record.label] = pace
    return found

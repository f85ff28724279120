"""Shards of a folder: which are done, which have failed, and who is at which.

    DIR/shards/KEY.parquet      a finished shard's samples
    DIR/shards/KEY.json         written last: the rest of its parts, with its key and the digests of both files
    DIR/shards/KEY.failed.json  why a shard failed, with the traceback
    DIR/shards/KEY.lock         a shard in progress; the system releases the lock when the process that holds it dies

A shard is done when its JSON file is there, whoever made it. One that has changed by a bit since is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow

from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.evaluate.batch import Part
from robustbench_deq.files import (
    is_file,
    lock,
    open_own,
    read_json,
    read_sealed,
    remove_temporaries,
    replacing,
    sha256_of,
    write_json,
    write_sealed,
)
from robustbench_deq.records.record import CostRecord, CurvePoint, StageRecord
from robustbench_deq.records.store import SHARDS_FOLDER
from robustbench_deq.runner.suite import Shard

LOCK_SUFFIX = ".lock"
ASSEMBLY_LOCK = f"assembly{LOCK_SUFFIX}"


class ShardTimes(NamedTuple):
    """When a shard was begun (seconds since 1970), and its seconds: in all, in the attack and in the judge."""

    began: float
    seconds: float
    attack_seconds: float
    judge_seconds: float

    @property
    def busy_seconds(self) -> float:
        """Of attack and judge: what is not the runner's own."""
        return self.attack_seconds + self.judge_seconds


class Standing(NamedTuple):
    """How far a shard is; `stage` is that of the batch in progress, `share` what is done of its attack."""

    began: float
    num_done: int
    num_robust: int
    stage: str = ""
    share: float = 0.0


class Claim:
    """The right to do a shard. Its lock file says how far it is, for whoever watches the folder."""

    def __init__(self, handle: int) -> None:
        self._handle, self.began = handle, time.time()
        self.note(0, 0)

    def note(self, num_done: int, num_robust: int, stage: str = "", share: float = 0.0) -> None:
        content = json.dumps(Standing(self.began, num_done, num_robust, stage, share)._asdict()).encode()
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, content, 0)


class ShardStore:
    """Finished, failed and running shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self.root = Path(folder)
        self.folder = self.root / SHARDS_FOLDER

    def is_done(self, shard: Shard) -> bool:
        return is_file(self._path(shard, ".json"))

    def save(
        self, shard: Shard, parts: Sequence[Part], environment: dict[str, Any], began: float, seconds: float
    ) -> None:
        """Keep the parts of a shard; the JSON file, which makes it count, comes last."""
        with replacing(self._path(shard, ".parquet")) as temporary:
            pd.concat([part.samples for part in parts], ignore_index=True).to_parquet(temporary, index=False)
            digest = sha256_of(temporary)
        content = [
            {
                "num_samples": len(part.samples),
                "num_robust": int(part.samples["is_robust"].sum()),
                "cost": part.cost.model_dump(mode="json"),
                "curve": [point.model_dump(mode="json") for point in part.curve],
                "residuals": part.residuals,
                "diagnostics": part.diagnostics,
                "stages": [stage.model_dump(mode="json") for stage in part.stages],
                "probes": part.probes,
            }
            for part in parts
        ]
        whole = {"shard": shard.key, "samples_sha256": digest, "began": began, "seconds": seconds}
        write_sealed(self._path(shard, ".json"), whole | {"environment": environment, "parts": content})
        self._path(shard, ".failed.json").unlink(missing_ok=True)

    def load(self, shard: Shard, sample_ids: np.ndarray) -> tuple[list[Part], dict[str, Any]]:
        """The parts of a finished shard, and the environment it was done in.

        Args:
            sample_ids: of the samples that the plan gives it, in their order.

        Raises:
            UsageError: where it is damaged, or of other samples.
        """
        content, path = self._read(shard), self._path(shard, ".parquet")
        try:
            samples, parts, begin = pd.read_parquet(path), [], 0
            if not np.array_equal(samples["sample_id"], sample_ids):
                raise ValueError("other samples")
            for part in content["parts"]:
                rows = samples.iloc[begin : begin + part["num_samples"]]
                begin += part["num_samples"]
                cost, curve = CostRecord(**part["cost"]), [CurvePoint(**point) for point in part["curve"]]
                stages = [StageRecord(**stage) for stage in part.get("stages", ())]
                probes = part.get("probes")  # shards of an earlier version have none, and no stages
                parts.append(Part(rows, cost, curve, part["residuals"], part["diagnostics"], stages, probes))
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError):
            raise self._damaged(shard, path) from None
        return parts, content["environment"]

    def times(self, shard: Shard) -> ShardTimes:
        """Of a finished shard."""
        content = self._read(shard)
        costs = [part["cost"] for part in content["parts"]]
        attack, judge = (sum(cost[key] for cost in costs) for key in ("wall_seconds", "judge_seconds"))
        return ShardTimes(content["began"], content["seconds"], attack, judge)

    def num_robust(self, shard: Shard) -> int:
        """Of a finished shard's samples."""
        return sum(part["num_robust"] for part in self._read(shard)["parts"])

    def fail(self, shard: Shard, reason: str, trace: str | None = None) -> None:
        """Keep why a shard failed, with the traceback where there is one. A full disk keeps nothing."""
        content = {"reason": reason, "traceback": trace, "record_id": shard.run.key}
        content["shard"] = shard.model_dump(mode="json")
        with contextlib.suppress(OSError):
            write_json(self._path(shard, ".failed.json"), content)

    def reason(self, shard: Shard) -> str | None:
        """Why the shard failed; None when it did not."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return read_json(self._path(shard, ".failed.json"))["reason"]
        return None

    @contextlib.contextmanager
    def claim(self, shard: Shard) -> Iterator[Claim | None]:
        """The right to do the shard, None when it is done or another process has it. Ends with the block or process."""
        path = self._path(shard, LOCK_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_own(path)
        try:
            if not lock(handle, waits=False):
                yield None
                return
            try:
                yield None if self.is_done(shard) else Claim(handle)
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def is_claimed(self, shard: Shard) -> bool:
        """Whether a process is at the shard right now."""
        try:
            handle = os.open(self._path(shard, LOCK_SUFFIX), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not lock(handle, waits=False)
        finally:
            os.close(handle)

    def begun(self) -> set[str]:
        """Keys of the shards that have a lock file: in progress, or left by a process that was killed."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return {entry.name.removesuffix(LOCK_SUFFIX) for entry in entries if entry.name.endswith(LOCK_SUFFIX)}
        return set()

    def standing(self, shard: Shard) -> Standing | None:
        """What the process at the shard has noted; None when there is none."""
        if not self.is_claimed(shard):
            return None
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Standing(**read_json(self._path(shard, LOCK_SUFFIX)))
        return None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is in such a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = open_own(self.folder / ASSEMBLY_LOCK)
        try:
            lock(handle)
            yield
        finally:
            os.close(handle)

    def tidy(self) -> None:
        """Remove what killed processes have left: temporary files and locks. Only once all shards are done."""
        remove_temporaries(self.root)
        for path in self.folder.glob(f"*{LOCK_SUFFIX}"):
            if path.name != ASSEMBLY_LOCK and path.is_file():
                path.unlink(missing_ok=True)

    def _read(self, shard: Shard) -> dict[str, Any]:
        """What the JSON file of a finished shard says, once both files are as they were written."""
        path, samples = self._path(shard, ".json"), self._path(shard, ".parquet")
        try:
            content = read_sealed(path)
        except FileNotFoundError:
            raise RunError(f"{path} was removed while the suite ran; go on with --resume") from None
        except OSError:
            content = None
        if content is None or content.get("shard") != shard.key:
            raise self._damaged(shard, path)
        if not samples.is_file() or sha256_of(samples) != content.get("samples_sha256"):
            raise self._damaged(shard, samples)
        return content

    def _damaged(self, shard: Shard, path: Path) -> UsageError:
        done = self._path(shard, ".json").name
        return UsageError.of(
            str(path), expected="a finished shard", got="a damaged one", fix=f"remove {done} and go on with --resume"
        )

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.folder / f"{shard.key}{suffix}"

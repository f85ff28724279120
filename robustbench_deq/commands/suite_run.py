"""Running the plan of a suite in a folder: what `bench` and `evaluate` have in common."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands.display import suite_display
from robustbench_deq.data import SplitName, load
from robustbench_deq.devices import choose_device, named_device
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_file, needing_space, output_folder
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import RECORDS_FILE, load_records
from robustbench_deq.runner.executors import Executor, Processes, Ray, Serial
from robustbench_deq.runner.progress import SuiteProgress
from robustbench_deq.runner.run import SUITE_FILE, check_folder, claim_folder, run_suite
from robustbench_deq.runner.suite import Run, Shard, SuiteConfig
from robustbench_deq.specs import ThreatSpec

Plan = Sequence[tuple[Run, list[Shard]]]


class Where(NamedTuple):
    """Where shards are done, as the options say it."""

    workers: int | None
    kind: str
    address: str | None
    device: str | None

    def checked(self) -> Where:
        """With the device's full name.

        Raises:
            UsageError: for options that do not go together, and a device that is not there.
        """
        if self.address is not None and self.kind != "ray":
            raise UsageError.of(
                "--address", expected="--executor ray", got=f"--executor {self.kind}", fix="add or drop it"
            )
        if self.address is not None and self.workers is not None:
            raise UsageError.of(
                "--workers", expected="none with --address", got=self.workers, fix="set resources in the suite"
            )
        if self.device is None:  # every worker looks for itself
            return self
        name = choose_device if self.address is None else named_device  # of another machine, perhaps
        return self._replace(device=str(name(self.device, "--device")))

    def executor(self, suite: SuiteConfig) -> Executor:
        if self.kind == "ray":
            return Ray(self.address, self.workers, suite.resources, self.device)
        return Processes(self.workers) if self.workers is not None and self.workers > 1 else Serial()


def check_target(suite: SuiteConfig, runs: Plan, target: Path, resume: bool) -> None:
    """Raise `UsageError` for a folder that holds another suite, or, without `resume`, any."""
    if resume:
        check_folder(target, suite, [run for run, _ in runs])
    elif is_file(target / SUITE_FILE):
        raise UsageError.of(
            f"output folder {target}", expected="a new one", got="that of a suite", fix="add --resume, or name another"
        )


def run_in(
    suite: SuiteConfig,
    runs: Plan,
    target: Path,
    resume: bool,
    where: Where,
    show: Callable[[list[Record]], None],
    stays: bool = True,
) -> None:
    """Do what is missing of `runs` in `target`, which has been checked, with progress.

    Args:
        show: told the records that there are at the end, also where some are missing.
        stays: whether there is any going on in `target` afterwards.

    Raises:
        RunError: when it was interrupted, or some shards failed, or files were removed meanwhile.
    """
    going_on = "go on with --resume" if stays else "name a folder with --out to go on in"
    with output_folder(target, resume) as folder, needing_space(f"finished shards are kept: make room, and {going_on}"):
        executor = where.executor(suite)
        claim_folder(folder, suite, [run for run, _ in runs])
        progress, start = SuiteProgress(runs, folder), time.monotonic()
        with suite_display(suite.name, progress) as watch:
            try:
                outcome = run_suite(runs, folder, build_attack, executor, where.device, watch)
            except KeyboardInterrupt:
                done = f"{progress.num_done} of {progress.num_shards} shards are"
                raise RunError(f"interrupted; {done} done and kept, {going_on}" if stays else "interrupted") from None
        seconds = time.monotonic() - start
        if not is_file(folder / SUITE_FILE):  # somebody has removed it; without it there is no going on
            claim_folder(folder, suite, [run for run, _ in runs])
    records = load_records(target) if is_file(target / RECORDS_FILE) else []
    show(records)
    click.echo(f"{seconds:.0f} s; attack and judge took {outcome.busy_seconds:.0f} s, all workers together", err=True)
    if outcome.failures:
        reasons = collections.Counter(outcome.failures.values()).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        again = "try them again with --resume" if stays else going_on
        raise RunError(f"{len(outcome.failures)} of {progress.num_shards} shards failed: {listed}; {again}")
    if len(records) < len(runs):
        raise RunError(
            f"{len(runs) - len(records)} of {len(runs)} records are missing: files were removed from {target} while "
            f"the suite ran; {going_on}"
        )


def tell_doubts(runs: Plan) -> None:
    """Say what is odd about the radii of a suite, each once."""
    sources = dict.fromkeys((run.data, run.split) for run, _ in runs)
    num_pixels = {data: load(data, SplitName(split), 1).x[0].numel() for data, split in sources}
    asked = dict.fromkeys((run.norm, run.epsilon, num_pixels[run.data]) for run, _ in runs)
    found = (ThreatSpec(norm=norm, epsilon=epsilon).build().doubt(size) for norm, epsilon, size in asked)
    for doubt in dict.fromkeys(filter(None, found)):
        click.echo(doubt, err=True)

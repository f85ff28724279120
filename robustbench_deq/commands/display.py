"""Progress on standard error: bars on a terminal, else a line now and then for a log."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from robustbench_deq.commands.console import plain_console
from robustbench_deq.runner.progress import SuiteProgress
from robustbench_deq.runner.suite import Run, Shard

SECONDS_A_LINE = 30


@contextlib.contextmanager
def bar(title: str, total: int, note: str) -> Iterator[Callable[..., Any]]:
    """Progress of one thing; yields `advance(done, value, stage="")`, where a value may be None.

    Args:
        note: what is said of the value, such as `loss {:.4f}`.
    """
    console = plain_console(is_error=True)
    if not console.is_terminal:
        yield _line_by_line(console, title, total, note)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, value, stage="": progress.update(task, completed=done, note=_note(note, value, stage))


def _note(note: str, value: float | None, stage: str) -> str:
    return "  ".join(filter(None, ("" if value is None else note.format(value), stage)))


def _line_by_line(console: Console, title: str, total: int, note: str) -> Callable[..., None]:
    """A line at the start, then one every `SECONDS_A_LINE` seconds, with the time left."""
    _say(console, f"{title}  0/{total}")
    start = last = time.monotonic()
    first: float | None = None

    def advance(done: float, value: float | None, stage: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first
        if now - last < SECONDS_A_LINE or done == first:
            return
        last = now
        left = datetime.timedelta(seconds=round((now - start) / (done - first) * (total - done)))
        _say(console, f"{title}  {int(done)}/{total}  {_note(note, value, stage)}  left {left}")

    return advance


@contextlib.contextmanager
def suite_display(name: str, progress: SuiteProgress) -> Iterator[Callable[[Shard, str | None], None]]:
    """Progress of a suite; yields what is to be called when a shard ends, with the reason if it failed.

    On a terminal a bar of all shards, with a line for every shard in progress; else a line now and then. A shard that
    has failed gets a line of its own at once.
    """
    console = plain_console(is_error=True)
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            stack.enter_context(
                Live(get_renderable=lambda: suite_table(name, progress), console=console, transient=True)
            )
        else:
            _say(console, _suite_line(name, progress))
        last = time.monotonic()

        def watch(shard: Shard, reason: str | None) -> None:
            nonlocal last
            progress.end(shard, reason)
            if reason is not None:
                _say(console, f"{name}  failed: {shard.run.model}, {shard.run.label}, {_place(shard)}: {reason}")
            if not console.is_terminal and time.monotonic() - last >= SECONDS_A_LINE:
                last = time.monotonic()
                _say(console, f"{_suite_line(name, progress)}  {_run_words(progress, shard.run)}")

        yield watch


def suite_table(name: str, progress: SuiteProgress) -> Table:
    """A bar of all shards, and a row for each that is in progress."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(_suite_line(name, progress)), ProgressBar(progress.num_shards, progress.num_done, width=40))
    for shard, at in progress.running():
        size = shard.end - shard.begin
        elapsed = datetime.timedelta(seconds=round(time.time() - at.began))
        of_shard = f", robust {at.num_robust / at.num_done:.1%}" if at.num_done else ""
        stage = f", {at.stage}" if at.stage else ""
        standing = f"{at.num_done}/{size}{of_shard}{stage}{f' {at.share:.0%}' if at.share else ''}  {elapsed}"
        table.add_row(Text(f"  {_run_words(progress, shard.run)}"), Text(f"{_place(shard)}: {standing}"))
    return table


def _suite_line(name: str, progress: SuiteProgress) -> str:
    left = progress.seconds_left()
    words = [name, f"{progress.num_done}/{progress.num_shards} shards"]
    words += [f"{progress.num_failed} failed"] if progress.num_failed else []
    words += [] if left is None else [f"left {datetime.timedelta(seconds=round(left))}"]
    return "  ".join(words)


def _run_words(progress: SuiteProgress, run: Run) -> str:
    accuracy = progress.robust_accuracy(run)
    so_far = "" if accuracy is None else f": robust {accuracy:.1%} of {progress.num_samples(run)}"
    return f"{run.model}, {run.label}{so_far}"


def _place(shard: Shard) -> str:
    return f"{shard.run.norm} {shard.run.epsilon:g}, samples {shard.begin} to {shard.end}"


def _say(console: Console, line: str) -> None:
    """One line, not wrapped."""
    console.print(line, soft_wrap=True)

"""`evaluate`: the standard evaluation of one model."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from robustbench_deq.benchmark import DEFAULT_LIMIT, needs_black_box, with_cost_of
from robustbench_deq.commands.attack import read_setting
from robustbench_deq.commands.shared import tell_split
from robustbench_deq.commands.suite_run import Where, check_target, run_in, tell_doubts
from robustbench_deq.commands.verdicts import echo_stages, flag_lines
from robustbench_deq.configs import validate
from robustbench_deq.devices import choose_device
from robustbench_deq.errors import UsageError
from robustbench_deq.protocol import BATCH_SIZE, SEED
from robustbench_deq.records.environment import num_cpus
from robustbench_deq.records.flags import flags
from robustbench_deq.records.record import Record, to_json
from robustbench_deq.runner.run import check_models
from robustbench_deq.runner.suite import Run, SuiteConfig, cut, plan
from robustbench_deq.threats import Threat


def evaluate_by_standard(
    model: str,
    norm: str | None,
    epsilon: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    kind: str,
    out: Path | None,
    resume: bool,
    workers: int | None,
    executor: str,
    address: str | None,
    device: str | None,
    is_json: bool,
) -> None:
    """The standard evaluation of MODEL."""
    if resume and out is None:
        raise UsageError.of("--resume", expected="--out", got="none", fix="name the folder to go on in")
    if norm is not None and epsilon is None:  # the card's may be a radius of another norm
        raise UsageError.of("--norm", expected="--epsilon beside it", got="none", fix="add --epsilon")
    _, threat, name, samples = read_setting(model, norm, epsilon, data, split, limit)
    suite = suite_of(model, threat, name, split, min(limit or DEFAULT_LIMIT, len(samples)), kind)
    runs = [(run, cut(run, 1)) for run in plan(suite)]
    tell_doubts(runs)
    tell_split(runs[0][0].data, split, "--split all takes all")
    where = Where(workers, executor, address, device).checked()
    if workers is None and executor == "local" and kind == "standard" and choose_device(where.device).type == "cpu":
        where = where._replace(workers=min(num_cpus(), len(runs[0][1])))  # it takes minutes, their start seconds
    if out is not None:
        check_target(suite, runs, out, resume)
    if address is None:  # what a cluster runs need not run here
        check_models([run for run, _ in runs])
    found: list[Record] = []
    with _folder(out) as target:
        run_in(suite, runs[:1], target, resume, where, found.extend, out is not None)
        record = _record_of(runs[0][0], found)
        if len(runs) > 1 and needs_black_box(record):
            click.echo("the audit without gradients broke what gradients had left: now on all survivors", err=True)
            run_in(suite, runs, target, True, where, found.extend, out is not None)
            record = with_cost_of(_record_of(runs[1][0], found), record)
    _echo(record, is_json)
    if out is not None and not is_json:
        click.echo(f"record            {out}")


def suite_of(model: str, threat: Threat, data: str, split: str, limit: int, kind: str) -> SuiteConfig:
    """The evaluation as a suite of a run and, for `standard`, of what follows if its audit breaks anything."""
    further = [{"name": kind, "label": f"{kind}, black box on all", "config": {"black_box": "all"}}]
    asked = {
        "name": kind,
        "models": [model],
        "attacks": [{"name": kind}, *(further if kind == "standard" else [])],
        "threats": [{"norm": threat.norm.name, "epsilons": [threat.epsilon]}],
        "data": data,
        "split": split,
        "limit": limit,
        "batch_size": BATCH_SIZE,
        "seeds": [SEED],
        "num_snapshots": 0,
    }
    return validate(SuiteConfig, asked, "evaluate")


def _record_of(run: Run, found: list[Record]) -> Record:
    """A folder may hold them in any order: what was lost is written again, behind the others."""
    return next(record for record in found if record.record_id == run.key)


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where the evaluation works: `out`, or a folder that is removed."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _echo(record: Record, is_json: bool) -> None:
    if is_json:
        click.echo(json.dumps(to_json(record) | {"flags": [flag.name for flag in flags(record)]}))
        return
    low, high = record.robust_accuracy_ci
    click.echo(
        f"{record.model}  {record.protocol}  {record.threat.norm} {record.threat.epsilon:g}  "
        f"{record.data.name} {record.data.split}, {record.data.num_samples} images"
    )
    click.echo(f"clean accuracy    {record.clean_accuracy:.1%}")
    click.echo(f"robust accuracy   {record.robust_accuracy:.1%}  [{low:.1%}, {high:.1%}]")
    if record.num_certified is not None:
        click.echo(f"certified         {record.num_certified / record.data.num_samples:.1%}")
    lost = f"unconverged       {record.num_unconverged}   failed {record.num_failed}"
    click.echo(f"{lost}   non-finite logits {record.num_nonfinite}" if record.num_nonfinite else lost)
    for line in flag_lines(record):
        click.echo(line)
    cost = record.cost
    click.echo(f"cost per image    {cost.cell_evals:.1f} cell evaluations, {cost.cell_vjps:.1f} VJPs")
    click.echo(f"seconds in all    {cost.wall_seconds:.2f} attack, {cost.judge_seconds or 0.0:.2f} judge")
    echo_stages(record)

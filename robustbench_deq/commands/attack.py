"""`attack`: one attack on one model, judged."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands.display import bar
from robustbench_deq.commands.shared import tell_split
from robustbench_deq.commands.verdicts import echo_stages, flag_lines
from robustbench_deq.configs import parse_assignments, parse_fraction
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.devices import choose_device
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.batch import check_data
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.files import needing_space, output_folder
from robustbench_deq.models import Card, describe_model, load_model
from robustbench_deq.models.cards import names_function
from robustbench_deq.optimise import Norm
from robustbench_deq.records.images import choose_images, save_images
from robustbench_deq.records.record import Record, to_json
from robustbench_deq.records.store import RecordStore
from robustbench_deq.threat_spec import ThreatSpec
from robustbench_deq.threats import Threat

DEFAULT_LIMIT = 1000
NUM_SNAPSHOTS = 8


def attack(
    model: str,
    attack_name: str,
    norm: str | None,
    epsilon: str | None,
    data: str | None,
    split: str,
    limit: int | None,
    steps: int | None,
    batch_size: int,
    seed: int,
    is_targeted: bool,
    assignments: tuple[str, ...],
    label: str | None,
    device: str | None,
    out: Path | None,
    is_json: bool,
) -> None:
    """Attack MODEL and judge the result."""
    settings = parse_assignments(assignments)
    if steps is not None:
        settings["steps"] = steps
    loaded, threat, name, samples = read_setting(model, norm, epsilon, data, split, limit)
    chosen = build_attack(attack_name, threat, settings)
    check_data(loaded, samples, chosen.is_gradient_based)
    target = choose_device(device, "--device")
    tell_split(name, split, "--split all takes all")
    with output_folder(out) as folder:
        with bar(f"{attack_name} on {model}", len(samples), "robust {:.1%}") as advance:
            result = evaluate(
                loaded,
                chosen,
                samples,
                label=label,
                batch_size=batch_size,
                seed=seed,
                is_targeted=is_targeted,
                num_snapshots=NUM_SNAPSHOTS if is_json or folder is not None else 0,  # else nobody sees the curve
                device=target,
                progress=lambda at: advance(at.done, at.robust_accuracy, at.stage),
            )
        finish(result, samples, folder, is_json)
    if out is not None and not is_json:
        click.echo(f"record            {out}")


def read_setting(
    model: str, norm: str | None, epsilon: str | None, data: str | None, split: str, limit: int | None
) -> tuple[EquilibriumModel, Threat, str, Split]:
    """The model, the threat, and the data set's name and samples; what is not given is that of the model's card.

    Raises:
        UsageError: for anything of it that cannot be had, and where neither says the radius.
    """
    loaded, card = load_model(model), _card_of(model)
    known = card.evaluated_under if card else None
    if epsilon is None and known is None:
        raise UsageError.of("--epsilon", expected="a radius", got="none", fix="this model's card names none: pass one")
    known = known or ThreatSpec()
    radius = parse_fraction(epsilon, "--epsilon") if epsilon is not None else known.epsilon
    threat = Threat(Norm.parse(norm or known.norm), radius)
    name = data or (card.data if card and card.data else "digits")
    samples = load(name, SplitName(split), limit)
    if limit is None and len(samples) > DEFAULT_LIMIT and samples.split is not SplitName.ALL:
        samples = load(name, SplitName(split), DEFAULT_LIMIT)
    return loaded, threat, name, samples


def _card_of(model: str) -> Card | None:
    """None for a model of a file, which has no card."""
    return None if names_function(model) else describe_model(model).card


def finish(result: Evaluation, samples: Split, folder: Path | None, is_json: bool) -> None:
    """Keep the record in a folder, if there is one, and print it: it is printed even where it cannot be kept."""
    if folder is not None:
        try:
            with needing_space(f"the result is printed, but {folder} does not hold all of it"):
                RecordStore(folder).append(result.record, result.samples)
                images = choose_images(result.samples, samples.x.numpy(), result.x_adv.numpy())
                save_images(folder, result.record.record_id, images)
        except Exception:
            _echo(result, is_json)
            raise
    _echo(result, is_json)


def _echo(result: Evaluation, is_json: bool) -> None:
    record = result.record
    if is_json:
        click.echo(json.dumps(to_json(record)))
        return
    low, high = record.robust_accuracy_ci
    click.echo(
        f"{record.model}  {record.attack}  {record.threat.norm} {record.threat.epsilon:g}  "
        f"{record.data.name} {record.data.split}, {record.data.num_samples} images"
    )
    click.echo(f"clean accuracy    {record.clean_accuracy:.1%}")
    doubt = f"  at most: {record.zero_gradient}" if record.zero_gradient else ""
    click.echo(f"robust accuracy   {record.robust_accuracy:.1%}  [{low:.1%}, {high:.1%}]{doubt}")
    lost = f"unconverged       {record.num_unconverged}   failed {record.num_failed}"
    click.echo(f"{lost}   non-finite logits {record.num_nonfinite}" if record.num_nonfinite else lost)
    if record.is_external:
        _echo_coverage(record)
        return
    cost = record.cost
    click.echo(f"cost per image    {cost.cell_evals:.1f} cell evaluations, {cost.cell_vjps:.1f} VJPs")
    click.echo(f"seconds in all    {cost.wall_seconds:.2f} attack, {cost.judge_seconds or 0.0:.2f} judge")
    if record.num_lagging:
        click.echo(f"lagging           {record.num_lagging}: their states are behind their equilibria, robust or not")
    if record.num_zero_gradient:
        click.echo(f"zero gradient     {record.num_zero_gradient}: nothing to climb, robust accuracy may be too high")
    counts = {key: int(value) for key, value in record.diagnostics.items() if key.startswith("num_") and value}
    refuted = counts.pop("num_refuted", 0)
    if refuted:
        click.echo(f"refuted           {refuted} by the judge: called fooled and not so, attacked on")
    if counts:
        click.echo("full solves       " + ", ".join(f"{key.removeprefix('num_')} {n}" for key, n in counts.items()))
    for line in flag_lines(record):
        click.echo(line)
    echo_stages(record)


def _echo_coverage(record: Record) -> None:
    given, outside = (int(record.diagnostics[name] or 0) for name in ("num_given", "num_outside"))
    note = "; the other samples are left as they are" if given < record.data.num_samples else ""
    click.echo(f"images given      {given} of {record.data.num_samples}{note}")
    if outside:
        click.echo(f"outside the ball  {outside}: left as they are, since such an image proves nothing")
    click.echo(f"seconds           {record.cost.judge_seconds or 0.0:.2f} judge; what the attack cost is unknown")

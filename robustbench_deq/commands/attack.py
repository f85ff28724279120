"""`attack`: one attack on one model, judged."""

from __future__ import annotations

import json
from pathlib import Path

import click

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands.display import bar
from robustbench_deq.commands.shared import choose_device, tell_split
from robustbench_deq.configs import parse_assignments, parse_fraction
from robustbench_deq.data import SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import Evaluation, check_data, evaluate
from robustbench_deq.files import output_folder
from robustbench_deq.models import Card, describe_model, load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.records.images import choose_images, save_images
from robustbench_deq.records.record import to_json
from robustbench_deq.records.store import RecordStore
from robustbench_deq.runner.suite import digest_of_model
from robustbench_deq.specs import ThreatSpec
from robustbench_deq.threats import Threat

DEFAULT_LIMIT = 1000
NUM_SNAPSHOTS = 8


@click.command()
@click.argument("model")
@click.option("--attack", "attack_name", default="joint-pgd", show_default=True, help="A name from 'attacks'.")
@click.option("--norm", default=None, help="l1, l2 or linf.  [default: the model card's, else l2]")
@click.option("--epsilon", default=None, help="Radius in pixel units of [0, 1], such as 1.0 or 8/255.")
@click.option("--data", default=None, help="A name from 'datasets' or npz:FILE.  [default: the model card's]")
@click.option(
    "--split",
    default="test",
    type=click.Choice([name.value for name in SplitName]),
    show_default=True,
    help="all: every image of npz:FILE.",
)
@click.option(
    "--limit", type=int, default=None, help=f"Images.  [default: at most {DEFAULT_LIMIT}; all of --split all]"
)
@click.option("--steps", type=int, default=None, help="The same as --set steps=K.")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--targeted", "is_targeted", is_flag=True, help="Aim at the class after the true one.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the attack.")
@click.option("--label", default=None, help="Name of the row in reports.  [default: the attack's]")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder for the record.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
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
    """Attack MODEL and judge the result.

    MODEL is a name from 'models', a folder with a saved model, or file.py:function.
    """
    settings = parse_assignments(assignments)
    if steps is not None:
        settings["steps"] = steps
    loaded, card, digests = _load(model)
    known = card.evaluated_under if card else None
    if epsilon is None and known is None:
        raise UsageError.of("--epsilon", expected="a radius", got="none", fix="this model's card names none: pass one")
    known = known or ThreatSpec()
    radius = parse_fraction(epsilon, "--epsilon") if epsilon is not None else known.epsilon
    threat = Threat(Norm.parse(norm or known.norm), radius)
    chosen = build_attack(attack_name, threat, settings)
    name = data or (card.data if card and card.data else "digits")
    samples = load(name, SplitName(split), limit)
    if limit is None and len(samples) > DEFAULT_LIMIT and samples.split is not SplitName.ALL:
        samples = load(name, SplitName(split), DEFAULT_LIMIT)
    check_data(loaded, samples)
    if chosen.is_gradient_based:
        loaded.check_gradient(samples.x)
    target = choose_device(device)
    tell_split(name, split, "--split all takes all")
    with output_folder(out) as folder, bar(f"{attack_name} on {model}", len(samples), "robust {:.1%}") as advance:
        result = evaluate(
            loaded,
            chosen,
            samples,
            model_name=model,
            label=label,
            batch_size=batch_size,
            seed=seed,
            is_targeted=is_targeted,
            num_snapshots=NUM_SNAPSHOTS if is_json or folder is not None else 0,  # else nobody sees the curve
            device=target,
            **digests,
            progress=lambda at: advance(at.done, at.robust_accuracy, at.stage),
        )
        if folder is not None:
            RecordStore(folder).append(result.record, result.samples)
            images = choose_images(result.samples, samples.x.numpy(), result.x_adv.numpy())
            save_images(folder, result.record.record_id, images)
    if is_json:
        click.echo(json.dumps(to_json(result.record)))
    else:
        _echo_result(result, out)


def _load(model: str) -> tuple[EquilibriumModel, Card | None, dict[str, str | None]]:
    """The model, its card where it has one, and the digest of its weights or its file."""
    loaded = load_model(model)
    if ".py:" in model:
        return loaded, None, {"file_sha256": digest_of_model(model)}
    described = describe_model(model)
    return loaded, described.card, {"model_sha256": described.sha256 or None}


def _echo_result(result: Evaluation, out: Path | None) -> None:
    record = result.record
    low, high = record.robust_accuracy_ci
    click.echo(
        f"{record.model}  {record.attack}  {record.threat.norm} {record.threat.epsilon:g}  "
        f"{record.data.name} {record.data.split}, {record.data.num_samples} images"
    )
    click.echo(f"clean accuracy    {record.clean_accuracy:.1%}")
    click.echo(f"robust accuracy   {record.robust_accuracy:.1%}  [{low:.1%}, {high:.1%}]")
    click.echo(f"unconverged       {record.num_unconverged}   failed {record.num_failed}")
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
    if out is not None:
        click.echo(f"record            {out}")

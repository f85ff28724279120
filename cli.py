"""The command line: parse, compose, call, echo. No numerics live here.

Exit codes: 0 done, 1 a run failed, 2 wrong usage. Results go to standard output, progress and errors to standard error,
and an error is one line.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.table import Table

from attacks import build_attack
from robustbench_deq.attack import ATTACKS, Attack
from robustbench_deq.bench.baseline import read_baseline, read_run, to_entries, update_baseline
from robustbench_deq.bench.doctor import Verdict, examine
from robustbench_deq.bench.evaluate import Evaluation, check_data, evaluate
from robustbench_deq.bench.executors import Executor, Processes, Ray, Serial
from robustbench_deq.bench.failures import read_failures
from robustbench_deq.bench.gate import Check, compare, to_junit
from robustbench_deq.bench.images import choose_images, save_images
from robustbench_deq.bench.progress import EarlierPaces, SuiteProgress
from robustbench_deq.bench.records import RECORDS_FILE, Record, RecordStore, load_folders, load_records, to_json
from robustbench_deq.bench.runner import check_folder, claim_folder, missing_shards, run_suite
from robustbench_deq.bench.suite import Run, Shard, SuiteConfig, cut, plan
from robustbench_deq.configs import merge, parse_assignments, parse_fraction, read_yaml, validate
from robustbench_deq.data import DATASETS, SplitName, is_own_file, load, split_sizes
from robustbench_deq.display import bar, suite_display
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import output_folder, whole_folder, write_text
from robustbench_deq.memory import keep_freed_memory, no_collection
from robustbench_deq.models import MODELS, ModelDescription, describe_model, list_models, load_model
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.quiet import ignore_torch_deprecations
from robustbench_deq.report.compare import compare_runs
from robustbench_deq.report.compare_page import comparison_html, comparison_markdown, headline
from robustbench_deq.report.history import plot_history
from robustbench_deq.report.page import write_report
from robustbench_deq.report.supplements import Card, read_supplements
from robustbench_deq.threats import Norm, Threat
from robustbench_deq.training.config import AttackSpec, TrainingConfig
from robustbench_deq.training.session import TrainingSession

DEBUG_VARIABLE = "ROBUSTBENCH_DEQ_DEBUG"
DEFAULT_LIMIT = 1000
NUM_SNAPSHOTS = 8


class Commands(click.Group):
    """A group that turns every failure into one line and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        ignore_torch_deprecations()
        try:
            return super().main(*args, standalone_mode=False, **kwargs)
        except getattr(click.exceptions, "NoArgsIsHelpError", ()) as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except (UsageError, click.UsageError) as error:
            _fail(2, str(error) if isinstance(error, UsageError) else error.format_message())
        except (KeyboardInterrupt, click.Abort):
            _fail(1, "interrupted")
        except RunError as error:
            _fail(1, str(error))
        except click.ClickException as error:
            _fail(1, error.format_message())
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            reason = " ".join(str(error).split())[:300] or "no message"
            _fail(1, f"the run failed with {type(error).__name__}: {reason}; set {DEBUG_VARIABLE}=1 for the traceback")


def _fail(code: int, message: str) -> None:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _version() -> str:
    try:
        return importlib.metadata.version("robustbench-deq")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="robustbench-deq")
def main() -> None:
    """Adversarial robustness of deep equilibrium models: attack, train, report."""
    keep_freed_memory()


T = TypeVar("T")


def _choose_device(name: str | None) -> torch.device:
    device = _named_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise _unknown_device(name) from None
    return device


def _named_device(name: str) -> torch.device:
    """One that some machine may have."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise _unknown_device(name) from None


def _unknown_device(name: str | None) -> UsageError:
    return UsageError.of("--device", expected="cpu, cuda or cuda:N of this machine", got=repr(name), fix="omit it")


def _listing(rows: list[dict[str, Any]], kind: str, is_json: bool) -> None:
    """A line a row, or one JSON object. On a terminal too narrow for that, a paragraph a row."""
    if is_json:
        click.echo(json.dumps({"schema_version": 1, kind: rows}))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ["name"]:
        table.add_column(column.replace("_", " "), no_wrap=True)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    unlimited = Console(file=sys.stdout, width=1000)
    if not sys.stdout.isatty() or unlimited.measure(table).maximum <= shutil.get_terminal_size().columns:
        unlimited.print(table)
        return
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  ")
    for (_, name), *facts in (row.items() for row in rows):
        click.echo(name)
        known = (f"{key.replace('_', ' ')} {value}" for key, value in facts if value is not None)
        click.echo(wrapper.fill("; ".join(known)))


@main.command()
@click.argument("pattern", default="*")
@click.option("--family", default=None, help="Models of this family only.")
@click.option("--data", "dataset", default=None, help="Models trained on this dataset only.")
@click.option("--threat", type=click.Choice(["l2", "linf", "none"]), default=None, help="The norm trained against.")
@click.option("--check", "checked", default=None, metavar="DATA", help="Examine one model on a dataset or npz:FILE.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
def models(
    pattern: str, family: str | None, dataset: str | None, threat: str | None, checked: str | None, is_json: bool
) -> None:
    """List registered models; PATTERN may hold wildcards.

    With --check, PATTERN is a model as for 'attack': a name, a folder or file.py:function. Exit code 1 means that a
    finding is bad.
    """
    if checked is not None:
        if family or dataset or threat:
            raise UsageError.of("models --check", expected="no filters", got="one", fix="name the model alone")
        _check_model(pattern, checked, is_json)
        return
    _list_models(pattern, family, dataset, threat, is_json)


def _list_models(pattern: str, family: str | None, data: str | None, threat: str | None, is_json: bool) -> None:
    """What the cards say; the table leaves out what is long."""
    found = list_models(pattern, family=family, data=data, threat=threat)
    if not found:
        if ".py:" in pattern or Path(pattern).is_dir():
            raise UsageError.of(
                "models", expected="registered names", got=f"the model {pattern}", fix="add --check DATA to examine it"
            )
        if not MODELS.list(pattern):
            describe_model(pattern)
        asked = {"--family": family, "--data": data, "--threat": threat}
        raise UsageError.of(
            "models",
            expected="at least one that fits " + ", ".join(f"{key} {value}" for key, value in asked.items() if value),
            got="none",
            fix="drop an option",
        )
    _listing([_model_facts(row) if is_json else _model_columns(row) for row in found], "models", is_json)


def _model_facts(described: ModelDescription) -> dict[str, Any]:
    card = described.card
    hours = None if card.train_minutes is None else round(card.train_minutes / 60, 2)
    clean_ci = None
    if card.clean_accuracy is not None and card.test_samples:
        clean_ci = wilson_interval(round(card.clean_accuracy * card.test_samples), card.test_samples)
    return {
        "name": described.name,
        "family": described.family,
        "data": card.data or None,
        "trained_against": _threat_text(card.threat and card.threat.model_dump()),
        "parameters": described.num_parameters,
        "seed": card.seed,
        "command": card.command or None,
        "hours": hours,
        "device": card.device,
        "test_samples": card.test_samples,
        "clean": _rounded(card.clean_accuracy, 3),
        "clean_ci": clean_ci and [round(end, 4) for end in clean_ci],
        "robust": _rounded(card.robust_accuracy, 3),
        "robust_ci": card.robust_accuracy_ci,
        "robust_at": _threat_text(card.evaluation),
        "spectral_radius": _rounded(card.spectral_radius, 2),
        "picard_steps": card.mean_solver_steps,
        "monotonicity": card.monotonicity,
        "lipschitz": card.lipschitz,
        "unconverged": card.num_unconverged,
        "failed": card.num_failed,
    }


def _model_columns(described: ModelDescription) -> dict[str, Any]:
    facts = _model_facts(described)
    bounds = [f"{key} {facts[key]:g}" for key in ("monotonicity", "lipschitz") if facts[key] is not None]
    kept = ("name", "data", "trained_against", "parameters", "seed", "hours", "device")
    lost = [f"{facts[key]} {key}" for key in ("unconverged", "failed") if facts[key]]
    return {key: facts[key] for key in kept} | {
        "command": (facts["command"] or "").replace("robustbench-deq ", "") or None,
        "clean": _accuracy_text(facts["clean"], facts["clean_ci"]),
        "robust": ", ".join(filter(None, [_accuracy_text(facts["robust"], facts["robust_ci"]), *lost])) or None,
        "robust_at": facts["robust_at"],
        "radius": facts["spectral_radius"],
        "steps": facts["picard_steps"],
        "bound": ", ".join(bounds) or None,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _threat_text(threat: dict[str, Any] | None) -> str | None:
    return f"{threat['norm']} {threat['epsilon']:g}" if threat else None


def _accuracy_text(accuracy: float | None, interval: tuple[float, float] | None) -> str | None:
    """In percent, such as `71.1 [68.2, 73.8]`."""
    if accuracy is None or interval is None:
        return None if accuracy is None else f"{100 * accuracy:.1f}"
    return f"{100 * accuracy:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _check_model(model: str, data: str, is_json: bool) -> None:
    """A finding a line; exits with 1 when one is bad. What recommends a solver leaves the test split alone."""
    if model == "*":
        raise UsageError.of("models --check", expected="a MODEL", got="none", fix="name one: models MODEL --check DATA")
    findings = examine(load_model(model), load(data, SplitName.VALIDATION))
    if is_json:
        rows = [{**finding._asdict(), "verdict": finding.verdict.value} for finding in findings]
        click.echo(json.dumps({"schema_version": 1, "model": model, "findings": rows}))
    else:
        for finding in findings:
            fix = f"  ->  {finding.fix}" if finding.fix else ""
            click.echo(f"{finding.check:<15}{finding.verdict.value:<6}{finding.found}{fix}")
    if any(finding.verdict is Verdict.BAD for finding in findings):
        sys.exit(1)


@main.command(name="attacks")
@click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
def list_attacks(is_json: bool) -> None:
    """List attacks and what --set reaches in each."""
    rows = []
    for name in ATTACKS:
        kind = ATTACKS.get(name)
        fields = kind.config_type.model_fields
        if is_json:
            schema = kind.config_type.model_json_schema()
            settings = _without_references(schema["properties"], schema.get("$defs", {}))
            rows.append({"name": name, "summary": kind.summary, "settings": settings})
        else:
            rows.append({"name": name, "summary": kind.summary, "settings": len(fields)})
    _listing(rows, "attacks", is_json)
    if not is_json:
        click.echo("\nSettings with their defaults, for --set key=value:")
        for name in ATTACKS:
            kind = ATTACKS.get(name)
            defaults = kind.config_type().model_dump(mode="json")
            click.echo(f"\n{name}")
            for key, info in kind.config_type.model_fields.items():
                click.echo(f"  {key}={json.dumps(defaults.get(key))}  {info.description or ''}")


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON schema with every `$ref` replaced by what it refers to."""
    if isinstance(schema, list):
        return [_without_references(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    named = definitions[schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else {}
    own = {key: value for key, value in schema.items() if key != "$ref"}
    return {key: _without_references(value, definitions) for key, value in {**named, **own}.items()}


@main.command()
@click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
def datasets(is_json: bool) -> None:
    """List datasets. Your own: npz:FILE with arrays 'images' and 'labels'."""
    rows = [
        {
            "name": info.name,
            "shape": "x".join(map(str, info.input_shape)),
            "classes": info.num_classes,
            "summary": info.summary,
        }
        for info in map(DATASETS.get, DATASETS)
    ]
    _listing(rows, "datasets", is_json)


def _attack_of(spec: AttackSpec | None) -> Attack | None:
    if spec is None:
        return None
    return build_attack(spec.name, Threat(Norm.parse(spec.threat.norm), spec.threat.epsilon), spec.config)


@main.command()
@click.argument("model")
@click.option("--attack", "attack_name", default="joint-pgd", show_default=True, help="A name from 'attacks'.")
@click.option("--norm", default=None, help="l2 or linf.  [default: the model card's, else l2]")
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
    loaded, card, sha256 = _load(model)
    known = card.evaluation if card else {}
    if epsilon is None and "epsilon" not in known:
        raise UsageError.of("--epsilon", expected="a radius", got="none", fix="this model's card names none: pass one")
    radius = parse_fraction(epsilon, "--epsilon") if epsilon is not None else float(known["epsilon"])
    threat = Threat(Norm.parse(norm or known.get("norm", "l2")), radius)
    chosen = build_attack(attack_name, threat, settings)
    name = data or (card.data if card and card.data else "digits")
    samples = load(name, SplitName(split), limit)
    if limit is None and len(samples) > DEFAULT_LIMIT and samples.split is not SplitName.ALL:
        samples = load(name, SplitName(split), DEFAULT_LIMIT)
    check_data(loaded, samples)
    if chosen.is_gradient_based:
        loaded.check_gradient(samples.x)
    target = _choose_device(device)
    _tell_split(name, split, "--split all takes all")
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
            num_snapshots=NUM_SNAPSHOTS,
            device=target,
            model_sha256=sha256,
            progress=lambda done, total, accuracy: advance(done, accuracy),
        )
        if folder is not None:
            RecordStore(folder).append(result.record, result.samples)
            images = choose_images(result.samples, samples.x.numpy(), result.x_adv.numpy())
            save_images(folder, result.record.record_id, images)
    if is_json:
        click.echo(json.dumps(to_json(result.record)))
    else:
        _echo_result(result, out)


def _tell_split(data: str, split: str, whole: str) -> None:
    """Say that a split leaves out a part of one's own file, which may be a test set as it is.

    Args:
        whole: what takes all of it, with a place for how many.
    """
    if is_own_file(data) and split != SplitName.ALL.value:
        size, num_samples = split_sizes(data, SplitName(split))
        click.echo(f"{data}: {split} split: {size} of {num_samples} images; {whole.format(num_samples)}", err=True)


def _load(model: str) -> tuple[EquilibriumModel, Any, str | None]:
    """The model, its card and its digest; the last two are None for a file's model."""
    loaded = load_model(model)
    if ".py:" in model:
        return loaded, None, None
    described = describe_model(model)
    return loaded, described.card, described.sha256 or None


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
    fallbacks = {key: int(value) for key, value in record.diagnostics.items() if key.startswith("num_") and value}
    if fallbacks:
        click.echo("fallbacks         " + ", ".join(f"{key.removeprefix('num_')} {n}" for key, n in fallbacks.items()))
    if out is not None:
        click.echo(f"record            {out}")


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any key of the config, dotted.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: results/runs/NAME]")
@click.option("--resume", type=click.Path(path_type=Path), default=None, help="Folder of an interrupted run.")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
def train(
    config: Path, assignments: tuple[str, ...], out: Path | None, resume: Path | None, device: str | None
) -> None:
    """Train the model that CONFIG describes, evaluate it on the test split, and save it with its card."""
    values = merge(read_yaml(config), parse_assignments(assignments))
    parsed = validate(TrainingConfig, values, str(config))
    target = _choose_device(device)
    if resume is not None and out is not None:
        raise UsageError.of("train", expected="--out or --resume", got="both", fix="--resume writes to its own folder")
    command = "robustbench-deq train " + " ".join(
        [shlex.quote(config.as_posix())] + [f"--set {shlex.quote(text)}" for text in assignments]
    )
    session = TrainingSession(
        config=parsed,
        command=command,
        attack=_attack_of(parsed.attack),
        validation_attack=_attack_of(parsed.validation.attack or parsed.attack),
        evaluation_attack=_attack_of(parsed.evaluation.attack or parsed.validation.attack or parsed.attack),
        device=target,
        plot_history=plot_history,
    )
    place = contextlib.nullcontext(resume) if resume else output_folder(out or Path("results/runs") / parsed.name)
    with place as folder:
        session.prepare(folder, is_resumed=resume is not None)
        try:
            with bar(parsed.name, session.num_batches, "loss {:.4f}") as advance:
                described = session.run(lambda done, loss: advance(done, loss))
        except KeyboardInterrupt:
            done = len(session.trainer.history)
            raise RunError(f"interrupted after epoch {done}; continue with --resume {folder}") from None
    card = described.card
    click.echo(f"{described.name}  saved in {folder}")
    click.echo(f"clean accuracy    {card.clean_accuracy:.1%} on {card.test_samples} test images")
    if card.robust_accuracy is not None:
        low, high = card.robust_accuracy_ci
        at = f"{card.evaluation['norm']} {card.evaluation['epsilon']:g}, {card.evaluation['attack']}"
        click.echo(f"robust accuracy   {card.robust_accuracy:.1%}  [{low:.1%}, {high:.1%}]  {at}")


@main.command()
@click.argument("suite", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any key of the suite, dotted.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: results/runs/NAME]")
@click.option("--resume", is_flag=True, help="Go on in the folder: do what is missing. Begins where nothing is yet.")
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Shards at a time.  [default: 1; Ray: all]")
@click.option("--executor", "kind", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default=None, help="Of a Ray cluster, such as HOST:6379.  [default: one on this machine]")
@click.option("--dry-run", "is_dry", is_flag=True, help="Print the plan, with times from earlier records.")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda where a worker sees one]")
def bench(
    suite: Path,
    assignments: tuple[str, ...],
    out: Path | None,
    resume: bool,
    workers: int | None,
    kind: str,
    address: str | None,
    is_dry: bool,
    device: str | None,
) -> None:
    """Run SUITE, a YAML file of models, attacks and threats, and leave a folder of records.

    A run that was stopped, however, goes on with --resume. Several commands may work on one folder at a time.
    """
    parsed = validate(SuiteConfig, merge(read_yaml(suite), parse_assignments(assignments)), str(suite))
    runs = [(run, cut(run, parsed.batches_per_shard)) for run in plan(parsed)]
    for data in dict.fromkeys(run.data for run, _ in runs):
        _tell_split(data, parsed.split, "split: all with limit: {} takes all")
    target = out or Path("results/runs") / parsed.name
    _check_executor(kind, address, workers)
    if device is not None:  # of another machine, perhaps; without a name every worker looks for itself
        device = str(_choose_device(device) if address is None else _named_device(device))
    if is_dry:
        missing = missing_shards(runs, target) if resume else [shard for _, shards in runs for shard in shards]
        _echo_plan(runs, missing, EarlierPaces([Path("results"), target], device), workers or 1)
        return
    place = contextlib.nullcontext(target) if resume else output_folder(target)
    with place as folder:
        check_folder(folder, parsed, [run for run, _ in runs])
        executor = _make_executor(parsed, kind, address, workers, device)
        claim_folder(folder, parsed)
        progress, start = SuiteProgress(runs, folder), time.monotonic()
        with suite_display(parsed.name, progress) as watch:
            try:
                outcome = run_suite(runs, folder, build_attack, executor, device, watch)
            except KeyboardInterrupt:
                raise RunError("interrupted; finished shards are kept, go on with --resume") from None
        seconds = time.monotonic() - start
    records = load_records(target) if (target / RECORDS_FILE).exists() else []
    click.echo(f"{len(records)} of {len(runs)} records in {target}; 'robustbench-deq report {target}' shows them")
    click.echo(f"{seconds:.0f} s; attack and judge took {outcome.busy_seconds:.0f} s, all workers together", err=True)
    if outcome.failures:
        reasons = collections.Counter(outcome.failures.values()).most_common(3)
        told = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise RunError(
            f"{len(outcome.failures)} of {progress.num_shards} shards failed: {told}; try them again with --resume"
        )


def _check_executor(kind: str, address: str | None, workers: int | None) -> None:
    if address is not None and kind != "ray":
        raise UsageError.of("--address", expected="--executor ray", got=f"--executor {kind}", fix="add or drop it")
    if address is not None and workers is not None:
        raise UsageError.of("--workers", expected="none with --address", got=workers, fix="set resources in the suite")


def _make_executor(
    suite: SuiteConfig, kind: str, address: str | None, workers: int | None, device: str | None
) -> Executor:
    if kind == "ray":
        return Ray(address, workers, suite.resources, device)
    return Processes(workers) if workers is not None and workers > 1 else Serial()


def _echo_plan(
    runs: list[tuple[Run, list[Shard]]], missing: list[Shard], paces: EarlierPaces, num_workers: int
) -> None:
    """The runs of a suite, with the seconds that earlier records let expect for what is missing."""
    samples = collections.Counter[str]()
    for shard in missing:
        samples[shard.run.key] += shard.end - shard.begin
    table = Table(box=None, pad_edge=False)
    columns = ("model", "attack", "threat", "data", "samples", "shards", "to do", "expected (s)", "threads", "as in")
    for column in columns:
        table.add_column(column, overflow="fold")
    whole, num_unknown = 0.0, 0
    for run, shards in runs:
        pace, num_samples = paces.of(run), samples[run.key]
        whole += (pace.seconds if pace else 0.0) * num_samples
        num_unknown += pace is None and num_samples > 0
        expected = ("-", "-", "-")
        if pace is not None:
            expected = (f"{pace.seconds * num_samples:.1f}", str(pace.num_threads or "-"), str(pace.source))
        counts = (str(run.num_samples), str(len(shards)), str(num_samples))
        table.add_row(run.model, run.label, f"{run.norm} {run.epsilon:g}", run.data, *counts, *expected)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240).print(table)
    click.echo(f"{len(runs)} runs, {sum(len(shards) for _, shards in runs)} shards, {len(missing)} of them to do")
    shared = f" ({whole / num_workers:.0f} s if {num_workers} workers did {num_workers} times as much)"
    click.echo(
        f"expected: {whole:.0f} s of attack and judge with one worker{shared if num_workers > 1 else ''}, "
        "with the device and threads of the earlier records; "
        f"{num_unknown} of {sum(count > 0 for count in samples.values())} runs to do have none"
    )


@main.command()
@click.option("--baseline", type=click.Path(path_type=Path), required=True, help="JSON file of the baseline.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/runs/quick"))
@click.option("--update", "reason", default=None, metavar="REASON", help="Make FOLDER the baseline, for this reason.")
@click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--junit", type=click.Path(path_type=Path), default=None, help="JUnit XML file to write.")
def check(baseline: Path, folder: Path, reason: str | None, is_json: bool, junit: Path | None) -> None:
    """Compare the records in FOLDER with a baseline: exit code 0 when they agree, 1 when they do not.

    The tolerances stand in the baseline. It changes only by --update, which keeps the reason in it.
    """
    if reason is not None and (is_json or junit):
        raise UsageError.of("check", expected="--update or --json, --junit", got="both", fix="check after the update")
    runs = read_run(folder)
    if reason is not None:
        updated = update_baseline(baseline, runs, reason)
        click.echo(f"{len(updated.entries)} records written to {baseline}, update {len(updated.updates)}")
        return
    checks = compare(read_baseline(baseline), to_entries(runs))
    if junit is not None:
        write_text(junit, to_junit(checks))
    bad = [row for row in checks if not row.is_good]
    if is_json:
        rows = [row._asdict() for row in checks]
        click.echo(json.dumps({"schema_version": 1, "is_good": not bad, "checks": rows}))
    else:
        _echo_checks(checks)
    if bad:
        raise RunError(f"{len(bad)} of {len(checks)} checks failed: {bad[0].record}, {bad[0].field} first")


def _echo_checks(checks: list[Check]) -> None:
    """A row a check; what failed comes last, where a log ends."""
    table = Table(box=None, pad_edge=False)
    for column in ("record", "field", "baseline", "now", "tolerance", "verdict"):
        table.add_column(column, overflow="fold")
    for row in sorted(checks, key=lambda row: not row.is_good):
        table.add_row(*row[:5], "good" if row.is_good else "BAD")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)
    click.echo(f"{sum(row.is_good for row in checks)} of {len(checks)} checks are good")


@main.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: FOLDER/report]")
@click.option(
    "--compare",
    "compared",
    nargs=2,
    default=None,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="What changed from the records in A to those in B, as Markdown; with --out as Markdown and HTML files.",
)
def report(folders: tuple[Path, ...], out: Path | None, compared: tuple[Path, Path] | None) -> None:
    """Tables, figures, a page and a leaderboard from the records in FOLDERS."""
    if bool(folders) == (compared is not None):
        got = "both" if folders else "none"
        raise UsageError.of("report", expected="FOLDERS of records, or --compare A B", got=got, fix="name one of them")
    with no_collection():
        if compared is not None:
            _compare_runs(*compared, out)
        else:
            _report_on(folders, out or folders[0] / "report")


def _report_on(folders: tuple[Path, ...], out: Path) -> None:
    found = load_folders(folders)
    records = [record for part in found.values() for record in part]
    failures = sum((read_failures(folder) for folder in found), collections.Counter())
    supplements = read_supplements(found, _cards_of(records), failures)
    with whole_folder(out) as folder:
        written = write_report(records, folder, supplements=supplements)
    click.echo(f"{len(records)} records, {len(written)} files in {out}; open {out / 'index.html'}")


def _compare_runs(before: Path, after: Path, out: Path | None) -> None:
    runs = [(folder, load_records(folder)) for folder in (before, after)]
    verdicts = [read_supplements({folder: records}).verdicts for folder, records in runs]
    found = compare_runs(runs[0][1], runs[1][1], *verdicts)
    if out is None:
        click.echo(comparison_markdown(found), nl=False)
        return
    with whole_folder(out) as folder:
        write_text(folder / "compare.md", comparison_markdown(found))
        write_text(folder / "compare.html", comparison_html(found))
    click.echo(f"{headline(found)} Open {out / 'compare.html'}")


def _cards_of(records: list[Record]) -> dict[str, Card]:
    """What is known of the records' models; nothing of those that are files or no longer there."""
    cards = {}
    for model in dict.fromkeys(record.model for record in records):
        with contextlib.suppress(UsageError):
            cards[model] = describe_model(model).model_dump(mode="json")
    return cards


if __name__ == "__main__":
    main()

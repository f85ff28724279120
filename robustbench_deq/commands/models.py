"""`models`: what is registered, and the doctor for one model."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from robustbench_deq.commands.options import FAMILY_NAMES
from robustbench_deq.commands.rows import echo_listing
from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_folder
from robustbench_deq.models import MODELS, ModelDescription, describe_model, list_models
from robustbench_deq.models.cards import names_function
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.threat_spec import ThreatSpec


def models(
    pattern: str, family: str | None, dataset: str | None, threat: str | None, checked: str | None, is_json: bool
) -> None:
    """List registered models, and the families to train; PATTERN may hold wildcards."""
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
        if names_function(pattern) or is_folder(pattern):
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
    rows = [_model_facts(row) if is_json else _model_columns(row) for row in found]
    echo_listing(rows, "models", is_json, {"families": FAMILY_NAMES})


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
        "trained_against": _text_of(card.threat),
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
        "robust_at": _text_of(card.evaluated_under),
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


def _text_of(threat: ThreatSpec | None) -> str | None:
    return None if threat is None else str(threat)


def _accuracy_text(accuracy: float | None, interval: tuple[float, float] | None) -> str | None:
    """In percent, such as `71.1 [68.2, 73.8]`."""
    if accuracy is None or interval is None:
        return None if accuracy is None else f"{100 * accuracy:.1f}"
    return f"{100 * accuracy:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _check_model(model: str, data: str, is_json: bool) -> None:
    """A finding a line; exits with 1 when one is bad. What recommends a solver leaves the test split alone."""
    if model == "*":
        raise UsageError.of("models --check", expected="a MODEL", got="none", fix="name one: models MODEL --check DATA")
    from robustbench_deq.data import SplitName, load  # which import torch: a listing does without
    from robustbench_deq.evaluate.doctor import examine
    from robustbench_deq.models import load_model

    findings = examine(load_model(model), load(data, SplitName.VALIDATION))
    if is_json:
        rows = [
            {"check": found.check, "verdict": found.grade.value, "found": found.found, "fix": found.fix}
            for found in findings
        ]
        click.echo(json.dumps({"schema_version": 1, "model": model, "findings": rows}))
    else:
        for finding in findings:
            fix = f"  ->  {finding.fix}" if finding.fix else ""
            click.echo(f"{finding.check:<15}{finding.grade.value:<6}{finding.found}{fix}")
    if any(finding.is_bad for finding in findings):
        sys.exit(1)

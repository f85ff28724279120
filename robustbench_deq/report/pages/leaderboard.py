"""The leaderboard as one HTML file that loads nothing: a table to sort and filter, and behind each row its evidence.

Everything is in the markup, so the page can be read without its script, which only sorts, filters and folds.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from robustbench_deq.records.record import Record
from robustbench_deq.report.figures.gallery import stretched
from robustbench_deq.report.pages.commands import command_of, flatten
from robustbench_deq.report.pages.templates import render_template
from robustbench_deq.report.settings import format_threat
from robustbench_deq.report.supplements import GalleryRow, ModelFacts
from robustbench_deq.report.tables.columns import COLUMNS
from robustbench_deq.report.tables.doubts import find_doubts
from robustbench_deq.report.tables.leaderboard import UNKNOWN, Entry
from robustbench_deq.report.tables.stages import stage_frame
from robustbench_deq.report.tables.text import MISSING, amount, decimals, percent, percent_interval

TITLE = "Leaderboard: adversarial robustness of deep equilibrium models"
FILTERS = {"family": "Family", "training": "Training", "data": "Data", "threat": "Threat", "attack": "Attack"}
IN_PERCENT = ("clean_accuracy", "robust_accuracy")


def leaderboard_html(entries: Sequence[Entry], warning: str = "") -> str:
    """The page.

    Args:
        warning: a sentence about what the entries lack; none where nothing is.
    """
    rows = [_row(entry, index) for index, entry in enumerate(entries)]
    return render_template(
        "leaderboard.html.jinja",
        title=TITLE,
        warning=warning,
        columns=COLUMNS,
        rows=rows,
        filters={key: (title, _options(rows, key)) for key, title in FILTERS.items()},
    )


def _options(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    return sorted({value for row in rows for value in row["facets"][key]})


def _row(entry: Entry, index: int) -> dict[str, Any]:
    return {
        "index": index,
        "cells": [
            (column, column.text(entry), None if column.number is None else repr(column.number(entry)))
            for column in COLUMNS
        ],
        "facets": {
            "family": [entry.family],
            "training": [entry.training],
            "data": [entry.names.data],
            "threat": [entry.names.threat],
            "attack": sorted({record.attack for record in entry.records}),
        },
        "labels": " ".join(sorted({record.label for record in entry.records})),
        "name": entry.names.model,
        "summary": _summary(entry),
        "doubts": [(doubt.title, doubt.text) for doubt in find_doubts(entry.records)],
        "is_unreliable": entry.is_unreliable,
        "attacks": [_attack(record, broken) for record, broken in zip(entry.records, entry.sole_breaks, strict=True)],
        "card": _card_facts(entry.card),
        "facts": {
            "Data digest": entry.setting.digest,
            "Weights or file (sha256)": entry.setting.sha256 or UNKNOWN,
        },
        "gallery": [_images(row) for row in entry.gallery],
    }


def _summary(entry: Entry) -> str:
    doubtful = [f"{record.label}: {record.zero_gradient}" for record in entry.records if record.zero_gradient]
    return " ".join([_withstood(entry), *([f"That may be too many ({'; '.join(doubtful)})."] if doubtful else [])])


def _withstood(entry: Entry) -> str:
    count, total = entry.num_in_union, len(entry.records)
    shown = f"{entry.num_robust:,} of {entry.setting.num_samples:,} samples"
    if total == 1:
        return f"{shown} withstood the one attack."
    if count == total:
        return f"{shown} withstood all {total} attacks, each judged sample by sample."
    return (
        f"At most {shown} withstood all {total} attacks: verdicts of single samples are there for {count} of them, "
        "and the others count with their accuracy alone."
    )


def _attack(record: Record, sole_breaks: int | None) -> dict[str, Any]:
    cost = record.cost
    return {
        "label": record.label,
        "numbers": {
            "Robust %": percent_interval(record.robust_accuracy, *record.robust_accuracy_ci),
            "Broke alone": MISSING if sole_breaks is None else f"{sole_breaks:,}",
            "Adv. loss": MISSING if record.adversarial_loss is None else decimals(record.adversarial_loss),
            "Cell evals": MISSING if record.is_external else amount(cost.cell_evals),
            "VJPs": MISSING if record.is_external else amount(cost.cell_vjps),
            "Solver steps": MISSING if record.is_external else amount(cost.solver_steps),
            "Seconds": MISSING if record.is_external else amount(cost.wall_seconds),
            "Unconverged": str(record.num_unconverged),
            "Failed": str(record.num_failed),
            "Non-finite": MISSING if record.num_nonfinite is None else str(record.num_nonfinite),
            "Lagging": MISSING if record.num_lagging is None else str(record.num_lagging),
            "Zero gradient": MISSING if record.num_zero_gradient is None else str(record.num_zero_gradient),
            "Finished by": record.finished_by or MISSING,
            "Seed": str(record.seed),
        },
        "command": command_of(record),
        "stages": stage_frame(record).to_dict("records"),
    }


def _card_facts(described: ModelFacts | None) -> dict[str, str]:
    """What the card says, in words; what it leaves open is left out."""
    if described is None:
        return {}
    card = dict(described["card"])
    interval = card.pop("robust_accuracy_ci", None)
    against = card.pop("threat", None)
    card["evaluation"] = _setting_text(flatten(card.get("evaluation", {})))
    facts = {"parameters": f"{described['num_parameters']:,}"}
    facts["trained against"] = format_threat(against["norm"], against["epsilon"]) if against else "nothing"
    for key, value in card.items():
        if value is None or value == "":
            continue
        text = percent(value) + " %" if key in IN_PERCENT else value if isinstance(value, str) else json.dumps(value)
        if key == "robust_accuracy" and interval:
            text = percent_interval(value, *interval) + " %"
        facts[key.replace("_", " ")] = text
    return facts | {"config": _setting_text(flatten(described["config"]))}


def _setting_text(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in config.items())


def _images(row: GalleryRow) -> dict[str, str]:
    scale = float(np.abs(row.perturbation).max())
    return {
        "label": row.label,
        "clean_prediction": row.clean_prediction,
        "adversarial_prediction": row.adversarial_prediction,
        "scale": f"{scale:.3f}",
        "clean": _png(row.clean),
        "perturbation": _png(stretched(row.perturbation)),
        "adversarial": _png(row.adversarial),
    }


def _png(image: np.ndarray) -> str:
    """A `(channels, height, width)` image in [0, 1] as a base64 PNG."""
    pixels = np.clip(np.moveaxis(np.asarray(image, dtype=float), 0, -1), 0.0, 1.0)
    pixels = np.round(255 * (pixels[..., 0] if pixels.shape[-1] == 1 else pixels)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""Certified <= robust <= clean, for the families with a certificate.

    python -m benchmarks.certified

Certified is what `certified` says of the samples that the judge finds right, robust is what joint PGD leaves of them,
by the judge. That the attack breaks a certified sample is an error. For comparison, what follows from the Lipschitz
bound on the model's card: the margin of the two largest logits over sqrt(2) times that bound, as an L2 radius.
"""

from __future__ import annotations

import math
from typing import Any

import click
import torch

from benchmarks.timing import keep, make_attack, say
from robustbench_deq.certificates import certified
from robustbench_deq.data import Split, load
from robustbench_deq.errors import RunError
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import FamilyModel, describe_model, load_model
from robustbench_deq.report.settings import format_threat
from robustbench_deq.threats import Threat

MODELS = (
    "lben.fashion-joint-l2",
    "mondeq-fc.fashion-joint-l2",
    "mondeq-conv.fashion-joint-l2",
    "mondeq-multi.fashion-joint-l2",
)
THREATS = (Threat("l2", 0.1), Threat("l2", 0.25), Threat("linf", "1/255"))


def measure(name: str, model: FamilyModel, data: Split, threat: Threat, steps: int) -> dict[str, Any]:
    clean = judge_clean(model, data.x, data.y)
    is_certified = certified(model, threat, clean.z, data.y)
    if is_certified is None:
        raise RunError(f"{name} has no certificate")
    is_certified = is_certified & clean.verdict.is_correct
    with torch.no_grad():
        best, second = model.head(clean.z).topk(2, dim=1).values.T
    radius = threat.l2_radius(data.x[0].numel()) or math.inf
    by_card = (best - second > math.sqrt(2) * model.certificates()["lipschitz"] * radius) & clean.verdict.is_correct
    found = evaluate(model, make_attack("joint-pgd", threat, steps=steps), data)
    is_robust = torch.tensor(found.samples["is_robust"].tolist())
    if bool((is_certified & ~is_robust).any()):
        raise RunError(f"{name} under {threat}: a certified sample was broken")
    ball = format_threat(threat.norm.name, threat.epsilon)
    say(f"{name}, {ball}: certified {int(is_certified.sum())}, robust {int(is_robust.sum())} of {len(data)}")
    shares = {"by the card %": by_card, "certified %": is_certified, "robust %": is_robust}
    return {
        "model": name,
        "threat": ball,
        **{title: round(100 * float(part.double().mean()), 1) for title, part in shares.items()},
        "clean %": round(100 * found.record.clean_accuracy, 1),
    }


@click.command()
@click.option("--limit", default=256, show_default=True)
@click.option("--steps", default=32, show_default=True)
def main(limit: int, steps: int) -> None:
    rows = []
    for name in MODELS:
        data = load(describe_model(name).card.data or "fashion-mnist", limit=limit)
        rows += [measure(name, load_model(name), data, threat, steps) for threat in THREATS]
    facts = {"test images": limit, "attack": f"joint-pgd, {steps} steps", "certified samples that it broke": 0}
    keep("certified", "Certified, robust and clean accuracy of the families with a certificate", rows, facts)


if __name__ == "__main__":
    main()

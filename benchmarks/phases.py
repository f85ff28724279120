"""Where the seconds of the default joint attack go: its parts, batch by batch, on every shipped DEQ.

    python -m benchmarks.phases

Parts of `joint-pgd`: the search of 20 steps on all samples, the further rounds on those that climb, the audit, and
full solves of what lags or was refuted. Beside them PGD with 10 warm steps on the same samples, in the same run.
Processor seconds of this process, without the judge.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any
from unittest import mock

import click

from benchmarks.timing import keep, make_attack, say
from robustbench_deq.attacks import JointPGDConfig
from robustbench_deq.attacks.joint import AUDIT_STEPS
from robustbench_deq.data import SplitName, load
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.optimise import Joint, Optimum
from robustbench_deq.protocol import Attack, ObjectiveAttack

STEPS = JointPGDConfig().steps
EXPLICIT = ("unrolled", "resnet", "test")


class Spent:
    """Stands in for `ObjectiveAttack.search`, and adds up its seconds and samples by part."""

    def __init__(self) -> None:
        self.seconds, self.samples, self._search = Counter[str](), Counter[str](), ObjectiveAttack.search

    def __call__(
        self, attack: Attack, model: Any, batch: Any, source: Any, step: Any, rule: Any, steps: int, *more: Any
    ) -> Optimum:
        begin = time.process_time()
        found = self._search(attack, model, batch, source, step, rule, steps, *more)
        part = _part(source, steps)
        self.seconds[part] += time.process_time() - begin
        self.samples[part] += len(batch)
        return found


def _part(source: Any, steps: int) -> str:
    if isinstance(source, Joint):
        return "search" if steps == STEPS else "rounds"
    return "audit" if steps == AUDIT_STEPS else "full solves"


@click.command()
@click.option("--models", "pattern", default="*", show_default=True)
@click.option("--limit", default=256, show_default=True, help="validation images of each model")
def main(pattern: str, limit: int) -> None:
    rows = []
    for name in MODELS.list(pattern):
        if name.startswith(EXPLICIT):
            continue
        card = describe_model(name).card
        threat, model = card.evaluated_under.build(), load_model(name)
        data = load(card.data, SplitName.VALIDATION, limit=min(limit, 150) if card.data == "digits" else limit)
        row: dict[str, Any] = {"model": name}
        for label, settings in (("joint-pgd", {}), ("pgd", {"steps": 10})):
            attack, spent = make_attack(label, threat, **settings), Spent()
            evaluate(model, attack, load(card.data, SplitName.VALIDATION, limit=16))  # what is done once
            with mock.patch.object(ObjectiveAttack, "search", lambda self, *given, spent=spent: spent(self, *given)):
                record = evaluate(model, attack, data).record
            row |= {f"{label} robust %": round(100 * record.robust_accuracy, 1)}
            if label == "pgd":
                row |= {"PGD-10 s": round(sum(spent.seconds.values()), 2)}
                break
            row |= {"joint s": round(sum(spent.seconds.values()), 2)}
            for part in ("search", "rounds", "audit", "full solves"):
                row |= {f"{part} s": round(spent.seconds[part], 2), f"{part} samples": spent.samples[part]}
        row["PGD-10 over search"] = round(row["PGD-10 s"] / row["search s"], 2)
        row["PGD-10 over joint"] = round(row["PGD-10 s"] / row["joint s"], 2)
        rows.append(row)
        say(f"{name}: joint {row['joint s']} s, of them search {row['search s']}; PGD-10 {row['PGD-10 s']} s")
    keep("phases", f"Where joint-pgd's seconds go, {limit} validation images", rows, {"batch size": 128})


if __name__ == "__main__":
    main()

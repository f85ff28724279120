"""Measures the shipped weights again and writes what is found into their cards.

    python -m benchmarks.cards

For each model the evaluation that the config in its card's command names is run with today's attacks and judge.
Weights, digests and training times stay as they are.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import torch

from benchmarks.timing import make_attack, say
from robustbench_deq.configs import read_yaml, validate
from robustbench_deq.data import SplitName, load
from robustbench_deq.files import write_json
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.models.cards import DESCRIPTION_NAME
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.session import measure


def config_of(command: str) -> TrainingConfig:
    """The last training config that a card's command names."""
    path = [part for part in shlex.split(command) if part.endswith(".yaml")][-1]
    return validate(TrainingConfig, read_yaml(Path(path)), path)


@click.command()
@click.option("--models", "pattern", default="*", show_default=True, help="which registered models")
def main(pattern: str) -> None:
    for name in MODELS.list(pattern):
        folder = MODELS.get(name).folder
        if folder is None:
            continue
        described = describe_model(name)
        evaluation = config_of(described.card.command).evaluation
        if (spec := evaluation.attack) is None:
            say(f"{name}: its config names no attack for the evaluation, left as it is")
            continue
        attack = make_attack(spec.name, Threat(Norm.parse(spec.threat.norm), spec.threat.epsilon), **spec.config)
        limit = min(evaluation.limit, len(load(described.card.data, SplitName.TEST)))
        test = load(described.card.data, SplitName.TEST, limit)
        found = measure(load_model(name), attack, test, torch.device("cpu"))
        card = described.card.model_copy(update=found)
        write_json(folder / DESCRIPTION_NAME, described.model_copy(update={"card": card}).model_dump(mode="json"))
        say(f"{name}: clean {card.clean_accuracy:.1%}, robust {card.robust_accuracy:.1%}")


if __name__ == "__main__":
    main()

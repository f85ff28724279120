"""Seconds of an epoch: joint adversarial training beside standard training and PGD-AT.

    python -m benchmarks.training_cost

All four start from the shipped adversarially trained weights, take the same batches, and run in turn. Target: joint at
most 2.5 times standard.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import torch

from attacks import JointPGDConfig
from benchmarks.timing import keep, make_attack, say
from robustbench_deq.attack import Attack
from robustbench_deq.configs import read_yaml, validate
from robustbench_deq.data import SplitName, load
from robustbench_deq.models import load_model
from robustbench_deq.threats import Norm, Threat
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import Trainer

MODEL = "deq-conv.fashion-joint-l2"
CONFIG = Path("configs/training/fashion-deq-conv-joint-l2.yaml")


@click.command()
@click.option("--batches", default=3, show_default=True, help="batches a round")
@click.option("--repeats", default=3, show_default=True)
def main(batches: int, repeats: int) -> None:
    joint = validate(TrainingConfig, read_yaml(CONFIG), str(CONFIG))
    standard_file = Path("configs/training/fashion-deq-conv-standard.yaml")
    standard = validate(TrainingConfig, read_yaml(standard_file), str(standard_file))
    train = load(joint.data, SplitName.TRAIN, batches * joint.batch_size)
    validation = load(joint.data, SplitName.VALIDATION, 1)
    threat = Threat(Norm.L2, 1.0)
    attack = joint.attack.config
    kinds: dict[str, tuple[TrainingConfig, Attack | None]] = {
        "standard": (standard, None),
        "joint": (joint, make_attack("joint-pgd", threat, **JointPGDConfig(**attack).model_dump(exclude_unset=True))),
        "PGD-AT, 20 steps, warm": (joint, make_attack("pgd", threat, tolerance=1e-2, random_start=True)),
        "PGD-AT, 20 steps, cold": (
            joint,
            make_attack("pgd", threat, tolerance=1e-2, random_start=True, warm_start=False),
        ),
    }
    seconds: dict[str, list[float]] = {label: [] for label in kinds}
    for turn in range(repeats + 1):  # the first round warms up
        for label, (config, adversary) in kinds.items():
            config = config.model_copy(update={"attack_warmup_epochs": 0.0, "epochs": 1, "learning_rate": 1e-6})
            trainer = Trainer(config, load_model(MODEL), train, validation, adversary, None)
            torch.manual_seed(0)
            start = time.perf_counter()
            trainer._epoch(turn, None)
            if turn:
                seconds[label].append(time.perf_counter() - start)
                say(f"round {turn}/{repeats}  {label}: {seconds[label][-1]:.2f} s")
    rows = [
        {
            "training": label,
            "seconds a batch": round(statistics.median(times) / batches, 4),
            "times standard": round(
                statistics.median(a / b for a, b in zip(times, seconds["standard"], strict=True)), 2
            ),
        }
        for label, times in seconds.items()
    ]
    facts = {"batch size": joint.batch_size, "batches a round": batches, "rounds": repeats, "joint attack": attack}
    keep("training_cost", "Cost of training", rows, facts)


if __name__ == "__main__":
    main()

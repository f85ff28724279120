"""Seconds of an epoch: joint adversarial training beside standard training and PGD-AT.

    python -m benchmarks.training_cost

All rows have the architecture of the shipped adversarially trained conv DEQ and take the same batches in turn. A cell's
solves cost what its weights make them cost, so standard training is timed on weights that it has trained itself for
`--warmup` batches; the others start from the shipped weights. Target: joint at most 2.0 times standard with the same
solves.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.timing import keep, make_attack, say
from robustbench_deq.attacks import JointPGDConfig
from robustbench_deq.configs import read_yaml, validate
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import Attack
from robustbench_deq.threats import Threat
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import Trainer
from robustbench_deq.training.session import TrainingSession

MODEL = "deq-conv.fashion-joint-l2"
JOINT = Path("configs/training/fashion-deq-conv-joint-l2.yaml")
STANDARD = Path("configs/training/fashion-deq-conv-standard.yaml")
FEW = {"steps": 7, "step_size": 1.0, "warmup_steps": 4}
"""Fewer and longer steps of the adversary than those that the shipped weights were trained against."""


class Kind(NamedTuple):
    config: TrainingConfig
    model: EquilibriumModel
    attack: Attack | None


def read(path: Path) -> TrainingConfig:
    return validate(TrainingConfig, read_yaml(path), str(path))


def train_standard(config: TrainingConfig, batches: int) -> EquilibriumModel:
    """A model from the seed after `batches` batches of standard training, on the schedule of one epoch."""
    session = TrainingSession(config, "", None, None, None, device=None)
    train = load(config.data, SplitName.TRAIN, batches * config.batch_size)
    one = config.model_copy(update={"epochs": 1})
    return Trainer(one, session.build_model(), train, load(config.data, SplitName.VALIDATION, 1), None, None).run()


def seconds_of(kind: Kind, train: Split, validation: Split, turn: int) -> float:
    """One pass over `train` at a learning rate that leaves the weights what they are."""
    config = kind.config.model_copy(update={"attack_warmup_epochs": 0.0, "epochs": 1, "learning_rate": 1e-6})
    trainer = Trainer(config, copy.deepcopy(kind.model), train, validation, kind.attack, None)
    start = time.perf_counter()
    trainer._epoch(turn, None)
    return time.perf_counter() - start


@click.command()
@click.option("--batches", default=4, show_default=True, help="batches a round")
@click.option("--repeats", default=3, show_default=True)
@click.option("--warmup", default=400, show_default=True, help="batches that the standard weights are trained for")
def main(batches: int, repeats: int, warmup: int) -> None:
    joint = read(JOINT)
    standard = read(STANDARD).model_copy(update={"model": joint.model})
    loose = standard.model_copy(update={"forward": joint.forward, "backward": joint.backward})
    own, shipped = train_standard(standard, warmup), load_model(MODEL)
    say(f"trained standard weights for {warmup} batches")
    train = load(joint.data, SplitName.TRAIN, batches * joint.batch_size)
    validation = load(joint.data, SplitName.VALIDATION, 1)
    threat, settings = Threat(Norm.L2, joint.attack.threat.epsilon), joint.attack.config
    adversary = make_attack("joint-pgd", threat, **JointPGDConfig(**settings).model_dump(exclude_unset=True))
    pgd = {"tolerance": 1e-2, "random_start": True}
    kinds = {
        "standard, its own config": Kind(standard, own, None),
        "standard, the joint run's solves": Kind(loose, own, None),
        "joint": Kind(joint, shipped, adversary),
        "joint, few steps": Kind(joint, shipped, adversary.with_(**FEW)),
        "PGD-AT, 20 steps, warm": Kind(joint, shipped, make_attack("pgd", threat, **pgd)),
        "PGD-AT, 20 steps, cold": Kind(joint, shipped, make_attack("pgd", threat, warm_start=False, **pgd)),
    }
    seconds: dict[str, list[float]] = {label: [] for label in kinds}
    for turn in range(repeats + 1):  # the first round warms up
        for label, kind in kinds.items():
            taken = seconds_of(kind, train, validation, turn)
            if turn:
                seconds[label].append(taken)
                say(f"round {turn}/{repeats}  {label}: {taken:.2f} s")
    base, cheap = list(seconds)[:2]
    rows = [
        {
            "training": label,
            "seconds a batch": round(statistics.median(times) / batches, 4),
            "times standard": ratio(times, seconds[base]),
            "times standard with the same solves": ratio(times, seconds[cheap]),
        }
        for label, times in seconds.items()
    ]
    facts = {
        "batch size": joint.batch_size,
        "batches a round": batches,
        "rounds": repeats,
        "joint attack": settings,
        "few steps": FEW,
    }
    keep("training_cost", "Cost of training", rows, facts)


def ratio(times: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 2)


if __name__ == "__main__":
    main()

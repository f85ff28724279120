"""A training session: everything between a checked config and a saved model with its card.

FOLDER/config.json        the resolved config
FOLDER/checkpoint.*       after every epoch
FOLDER/history.csv        a row an epoch, and the plot history.png / history.svg
FOLDER/model.*            the trained model and its card
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from robustbench_deq.attack import Attack
from robustbench_deq.bench.evaluate import evaluate
from robustbench_deq.bench.judge import judge, tight_solve
from robustbench_deq.configs import merge, validate
from robustbench_deq.data import DATASETS, Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel, check_labels
from robustbench_deq.errors import UsageError
from robustbench_deq.files import replacing, write_json
from robustbench_deq.models import FAMILIES, Card, ModelDescription, describe_model, load_model, save_model
from robustbench_deq.models.diagnostics import picard_solution, spectral_radius
from robustbench_deq.report.history import plot_history
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import EpochRow, Trainer

NUM_DIAGNOSED = 64


@dataclass
class TrainingSession:
    """One run of `train`.

    Args:
        command: what made it, for the card.
        attack, validation_attack, evaluation_attack: built from the config's specs by the caller; None where there is
        none.
    """

    config: TrainingConfig
    command: str
    attack: Attack | None
    validation_attack: Attack | None
    evaluation_attack: Attack | None
    device: torch.device

    def __post_init__(self) -> None:
        self._train = load(self.config.data, SplitName.TRAIN, self.config.train_limit)
        self.num_batches = self.config.epochs * max(1, len(self._train) // self.config.batch_size)

    def build_model(self) -> EquilibriumModel:
        """The model to be trained: from the config's seed, or the one it names as `initial`."""
        if self.config.initial is not None:
            return load_model(self.config.initial)
        spec = self.config.model
        family = FAMILIES.get(spec.family)
        shape: dict[str, object] = {"input_shape": tuple(self._train.x.shape[1:])}
        if self.config.data in DATASETS:
            shape["num_classes"] = DATASETS.get(self.config.data).num_classes
        else:
            shape["num_classes"] = max(2, int(self._train.y.max()) + 1)
        torch.manual_seed(self.config.seed)
        return family.build(validate(family.config_type, merge(shape, spec.config), f"model {spec.family}"))

    def prepare(self, folder: Path, is_resumed: bool) -> None:
        """Write the config to `folder`, or load the checkpoint that lies there.

        Raises:
            UsageError: when a resumed folder is not one of `train`, or was made from another config.
        """
        self.folder = folder
        validation = load(self.config.data, SplitName.VALIDATION, self.config.validation.limit)
        model = self.build_model()
        for split in (self._train, validation, load(self.config.data, SplitName.TEST)):
            model.check_images(split.x)
            check_labels(split.y, len(split), model.num_classes)
        self.trainer = Trainer(
            self.config,
            model,
            self._train,
            validation,
            self.attack,
            self.validation_attack,
            folder,
            self.device,
        )
        path, content = folder / "config.json", self.config.model_dump(mode="json")
        if not is_resumed:
            write_json(path, content)
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError.of(
                f"folder {folder}", expected="config.json of a run", got="none", fix="use --out"
            ) from None
        if earlier != content:
            changed = [key for key in content if earlier.get(key) != content[key]]
            raise UsageError.of(
                f"folder {folder}",
                expected="the config it was made from",
                got=f"another {changed[0]}",
                fix="use that one",
            )
        if self.trainer.has_checkpoint:  # a run that was interrupted in its first epoch has none
            self.trainer.resume()

    def run(self, progress: Callable[[int, float], None] | None = None) -> ModelDescription:
        """Train, evaluate on the test split, save. `progress` gets (batches done, running loss)."""

        def watch(epoch: int, done: int, batches: int, loss: float) -> None:
            if done == 1 and self.trainer.history:
                self._write_history()
            if progress is not None:
                progress(epoch * batches + done, loss)

        model = self.trainer.run(watch)
        self._write_history()
        description = save_model(model, self.folder, self.config.name, self.make_card(model))
        return description

    def _write_history(self) -> None:
        write_history(self.trainer.history, self.folder)

    def make_card(self, model: EquilibriumModel) -> Card:
        """Clean and robust accuracy on the test split, and how the cell behaves there."""
        config = self.config
        size = len(load(config.data, SplitName.TEST))
        test = load(config.data, SplitName.TEST, min(config.evaluation.limit, size))
        minutes = self.trainer.history[-1].total_seconds / 60 if self.trainer.history else 0.0
        command = self.command
        if config.initial is not None:  # an earlier stage is part of how the weights were made
            earlier = describe_model(config.initial).card
            minutes += earlier.train_minutes or 0.0
            command = " && ".join(filter(None, (earlier.command, command)))
        card = Card(
            data=config.data,
            threat=config.attack.threat.model_dump() if config.attack else None,
            command=command,
            seed=config.seed,
            train_minutes=round(minutes, 1),
            test_samples=len(test),
            **_diagnose(model, test, self.device),
        )
        if self.evaluation_attack is None:
            verdict = judge(model, test.x.to(self.device), test.y.to(self.device))
            return card.model_copy(update={"clean_accuracy": float(verdict.is_correct.double().mean())})
        record = evaluate(model, self.evaluation_attack, test, model_name=config.name, device=self.device).record
        return card.model_copy(
            update={
                "clean_accuracy": record.clean_accuracy,
                "robust_accuracy": record.robust_accuracy,
                "robust_accuracy_ci": tuple(round(end, 4) for end in record.robust_accuracy_ci),
                "evaluation": record.threat.model_dump() | {"attack": record.attack, "config": record.attack_config},
            }
        )


def _diagnose(model: EquilibriumModel, test: Split, device: torch.device) -> dict[str, float]:
    x = test.x[:NUM_DIAGNOSED].to(device)
    with torch.no_grad():
        u = model.inject(x)
        z = tight_solve(model, u).value
    return {
        "spectral_radius": round(float(spectral_radius(model, z, u).mean()), 4),
        "mean_solver_steps": round(float(picard_solution(model, x).num_steps.float().mean()), 1),
    }


def write_history(history: list[EpochRow], folder: Path) -> None:
    """`history.csv` and its plot."""
    frame = pd.DataFrame([dataclasses.asdict(row) for row in history])
    with replacing(folder / "history.csv") as temporary:
        frame.to_csv(temporary, index=False)
    plot_history(frame, folder)

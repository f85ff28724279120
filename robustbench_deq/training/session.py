"""A training session: everything between a checked config and a saved model with its card.

FOLDER/config.json        the resolved config
FOLDER/checkpoint.*       after every epoch
FOLDER/history.csv        a row an epoch, and the plot history.png / history.svg
FOLDER/model.*            the trained model and its card
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from robustbench_deq.configs import merge
from robustbench_deq.data import DATASETS, Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.evaluate.batch import check_data
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.evaluate.judge import judge, tight_solve
from robustbench_deq.files import check_json, is_blank, refuse_links, remove_temporaries, replacing, write_json
from robustbench_deq.models import (
    FAMILIES,
    Card,
    FamilyModel,
    ModelDescription,
    describe_model,
    load_model,
    save_model,
)
from robustbench_deq.models.diagnostics import picard_solution, spectral_radius
from robustbench_deq.protocol import Attack
from robustbench_deq.training.config import ModelSpec, TrainingConfig
from robustbench_deq.training.loop import Trainer

NUM_DIAGNOSED = 64
CONFIG_FILE = "config.json"


@dataclass
class TrainingSession:
    """One run of `train`.

    Args:
        command: what made it, for the card.
        plot_history: draws the history, a row an epoch, into a folder; None draws nothing.
        attack, validation_attack, evaluation_attack: built from the config's specs by the caller; None where there is
        none.
    """

    config: TrainingConfig
    command: str
    attack: Attack | None
    validation_attack: Attack | None
    evaluation_attack: Attack | None
    device: torch.device
    plot_history: Callable[[pd.DataFrame, Path], object] | None = None

    def __post_init__(self) -> None:
        self._train = load(self.config.data, SplitName.TRAIN, self.config.train_limit)
        self.num_batches = self.config.epochs * max(1, len(self._train) // self.config.batch_size)

    def build_model(self) -> EquilibriumModel:
        """The model to be trained: from the config's seed, or the one it names as `initial`."""
        spec = self.config.model
        if self.config.initial is not None:
            return self._load_initial(self.config.initial, spec)
        family = FAMILIES.get(spec.family)
        shape: dict[str, object] = {"input_shape": tuple(self._train.x.shape[1:])}
        if self.config.data in DATASETS:
            shape["num_classes"] = DATASETS.get(self.config.data).num_classes
        else:
            shape["num_classes"] = max(2, int(self._train.y.max()) + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return family.make(merge(shape, spec.config), f"model {spec.family}")

    def _load_initial(self, initial: str, spec: ModelSpec) -> EquilibriumModel:
        described = describe_model(initial)  # refuses a file.py:function, which has no card
        wanted = {"family": spec.family, **spec.config}
        found = {"family": described.family, **described.config}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise UsageError.of(
                    f"initial {initial}",
                    expected=f"{key} {value!r} as in `model`",
                    got=repr(found.get(key)),
                    fix="correct one",
                )
        return load_model(initial)

    def prepare(self, folder: Path) -> None:
        """Write the config to `folder` where nothing is yet, else load the checkpoint that lies there.

        Raises:
            UsageError: when the folder is not one of `train`, was made from another config, or has symbolic links.
        """
        self.folder = folder
        validation = load(self.config.data, SplitName.VALIDATION, self.config.validation.limit)
        model = self.build_model()
        for split in (self._train, validation, load(self.config.data, SplitName.TEST)):
            check_data(model, split)
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
        refuse_links(folder)
        remove_temporaries(folder)
        path, content = folder / CONFIG_FILE, self.config.model_dump(mode="json")
        if is_blank(folder):
            write_json(path, content)
            return
        check_json(path, content)
        if self.trainer.has_checkpoint:  # a run that was interrupted in its first epoch has none
            self.trainer.resume()

    def run(self, progress: Callable[[int, float], None] | None = None) -> ModelDescription:
        """Train, evaluate on the test split, save. `progress` gets (batches done, running loss).

        Raises:
            RunError: when training diverges, or files are removed from the folder meanwhile.
        """

        def watch(epoch: int, done: int, batches: int, loss: float) -> None:
            if done == 1 and self.trainer.history:
                self._check_files()
                self._write_history()
            if progress is not None:
                progress(epoch * batches + done, loss)

        model = self.trainer.run(watch)
        self._write_history()
        description = save_model(model, self.folder, self.config.name, self.make_card(model))
        self._check_files()
        return description

    def _check_files(self) -> None:
        """See that nobody has removed what an earlier step has written."""
        for path in (self.folder / CONFIG_FILE, self.trainer.checkpoint.meta_path):
            if not path.is_file():
                raise RunError(f"{path} was removed while the training ran; train again with --out NEW_FOLDER")

    def _write_history(self) -> None:
        frame = pd.DataFrame([dataclasses.asdict(row) for row in self.trainer.history])
        with replacing(self.folder / "history.csv") as temporary:
            frame.to_csv(temporary, index=False)
        if self.plot_history is not None:
            self.plot_history(frame, self.folder)

    def make_card(self, model: FamilyModel) -> Card:
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
            threat=config.attack.threat if config.attack else None,
            command=command,
            seed=config.seed,
            train_minutes=round(minutes, 1),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        )
        return card.model_copy(update=measure(model, self.evaluation_attack, test, self.device))


def measure(model: FamilyModel, attack: Attack | None, test: Split, device: torch.device) -> dict[str, object]:
    """What a card says of weights: accuracies on `test`, robust ones under `attack`, and how the cell behaves there."""
    x = test.x[:NUM_DIAGNOSED].to(device)
    with torch.no_grad():
        u = model.inject(x)
        z = tight_solve(model, u).value
    found: dict[str, object] = {
        "test_samples": len(test),
        "spectral_radius": round(float(spectral_radius(model, z, u).mean()), 4),
        "mean_solver_steps": round(float(picard_solution(model, x).num_steps.float().mean()), 1),
    }
    rounding = {"monotonicity": math.floor, "lipschitz": math.ceil}  # to the safe side
    found |= {name: rounding[name](1e4 * value) / 1e4 for name, value in model.certificates().items()}
    if attack is None:
        verdict = judge(model, test.x.to(device), test.y.to(device))
        return found | {"clean_accuracy": float(verdict.is_correct.double().mean())}
    record = evaluate(model, attack, test, device=device).record
    return found | {
        "clean_accuracy": record.clean_accuracy,
        "robust_accuracy": record.robust_accuracy,
        "robust_accuracy_ci": tuple(round(end, 4) for end in record.robust_accuracy_ci),
        "num_unconverged": record.num_unconverged,
        "num_failed": record.num_failed,
        "evaluation": record.threat.model_dump() | {"attack": record.attack, "config": record.attack_config},
    }

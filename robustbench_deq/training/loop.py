"""The training loop: epochs, schedule, averaged weights, validation, checkpoints.

Everything random (order, shifts, probes, attacks) is keyed by (seed, epoch, batch), so a resumed run continues as the
undisturbed one would.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.data import Split
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.protocol import Attack
from robustbench_deq.rows import per_sample
from robustbench_deq.threats import Threat
from robustbench_deq.training.checkpoint import Checkpoint
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loss import batch_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochRow:
    """One line of `history.csv`.

    `forward_failures` and `adjoint_failures` are the shares of the training samples whose solve missed its tolerance;
    `num_unconverged` counts the validation samples for which the judge finds no equilibrium.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    clean_accuracy: float
    robust_accuracy: float | None
    num_unconverged: int
    forward_failures: float
    adjoint_failures: float
    learning_rate: float
    train_seconds: float
    total_seconds: float


Progress = Callable[[int, int, int, float], None]
"""Called after each batch with (epoch, batches done, batches, running loss)."""


class Trainer:
    """Trains `model` in place.

    Args:
        attack: the adversary, or None.
        validation_attack: for the robust accuracy of the validation split, or None.
        folder: where checkpoints go; None keeps nothing.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: EquilibriumModel,
        train: Split,
        validation: Split,
        attack: Attack | None,
        validation_attack: Attack | None,
        folder: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.train, self.validation = config, train, validation
        # Training is for the loss: no sample leaves the adversary early.
        self.attack = None if attack is None else attack.with_(stop_at_success=False)
        self.validation_attack = validation_attack
        if attack is not None and (doubt := attack.threat.doubt(train.x[0].numel())):
            log.warning(doubt)
        self.device = device or torch.device("cpu")
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.checkpoint = Checkpoint(folder) if folder is not None else None
        self.history: list[EpochRow] = []
        self.num_batches = max(1, len(train) // config.batch_size)
        self.step = 0

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.meta_path.exists()

    def resume(self) -> int:
        """Load the last checkpoint and return the number of finished epochs."""
        meta = self.checkpoint.load(self.model, self.average, self.optimizer)
        self.history = [EpochRow(**row) for row in meta["history"]]
        self.step = meta["step"]
        return len(self.history)

    def run(self, progress: Progress | None = None) -> EquilibriumModel:
        """Train to the last epoch and return the model with its averaged weights loaded.

        Raises:
            RunError: when the loss leaves the finite numbers; the last checkpoint stays.
        """
        began = time.perf_counter() - (self.history[-1].total_seconds if self.history else 0.0)
        for epoch in range(len(self.history), self.config.epochs):
            start = time.perf_counter()
            loss, accuracy, unsolved, failures = self._epoch(epoch, progress)
            seconds = time.perf_counter() - start
            clean, robust, unconverged = self._validate()
            row = EpochRow(
                epoch=epoch + 1,
                train_loss=loss,
                train_accuracy=accuracy,
                clean_accuracy=clean,
                robust_accuracy=robust,
                num_unconverged=unconverged,
                forward_failures=unsolved,
                adjoint_failures=failures,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                train_seconds=seconds,
                total_seconds=time.perf_counter() - began,
            )
            self.history.append(row)
            log.info("epoch %s", row)
            if self.checkpoint is not None:
                meta = {"step": self.step, "history": [dataclasses.asdict(row) for row in self.history]}
                self.checkpoint.save(self.model, self.average, self.optimizer, meta)
        self.model.load_state_dict(self.average)
        return self.model.eval()

    def _epoch(self, epoch: int, progress: Progress | None) -> tuple[float, float, float, float]:
        config = self.config
        generator = torch.Generator().manual_seed(_key(config.seed, epoch))
        order = torch.randperm(len(self.train), generator=generator)
        total_loss = torch.zeros((), device=self.device)
        total_correct = torch.zeros((), device=self.device)
        unsolved = torch.zeros((), device=self.device)
        failures = torch.zeros((), device=self.device)
        self.model.train()
        seen = 0
        for batch in range(self.num_batches):
            rows = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            x, y = self.train.x[rows], self.train.y[rows]
            x = random_shift(x, config.random_shift, generator)
            if config.random_flip:
                x = random_flip(x, generator)
            x = x.to(self.device)
            y = y.to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * self._learning_rate_factor()
            has_jacobian = bool(torch.rand((), generator=generator) < config.jacobian_frequency)
            result = batch_loss(
                self.model,
                x,
                y,
                forward=config.forward.build(),
                backward=config.backward.build(),
                attack=self._adversary(),
                sample_ids=self.train.sample_ids[rows],
                seed=_key(config.seed, self.step),
                label_smoothing=config.label_smoothing,
                jacobian_weight=config.jacobian_weight if has_jacobian else 0.0,
                jacobian_rows=max(1, int(config.jacobian_rows * len(x))),
                generator=generator,
            )
            self.optimizer.zero_grad(set_to_none=True)
            result.total.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            if not math.isfinite(float(norm)):
                raise RunError(
                    f"training diverged in epoch {epoch + 1}, batch {batch + 1}: the gradient is not finite; "
                    "start again with a lower learning_rate or a higher jacobian_weight"
                )
            self.optimizer.step()
            self.step += 1
            self._update_average()
            seen += len(x)
            total_loss += result.cross_entropy * len(x)
            total_correct += result.num_correct
            unsolved += result.num_unsolved
            if result.trace.solution is not None:
                failures += (~result.trace.solution.is_converged).sum()
            if progress is not None:
                progress(epoch, batch + 1, self.num_batches, float(total_loss) / seen)
        return tuple(float(total) / seen for total in (total_loss, total_correct, unsolved, failures))

    def _learning_rate_factor(self) -> float:
        total = self.num_batches * self.config.epochs
        warmup = self.config.warmup_fraction * total
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1.0, total - warmup)))

    def _adversary(self) -> Attack | None:
        """The attack, with its radius grown over the warm-up epochs."""
        if self.attack is None:
            return None
        growth = self.config.attack_warmup_epochs * self.num_batches
        if self.step >= growth:
            return self.attack
        full = self.attack.threat
        return self.attack.with_(Threat(full.norm, full.epsilon * (self.step + 1) / growth))

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay grows from 0, so that early weights are forgotten.
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def _validate(self) -> tuple[float, float | None, int]:
        """Clean and robust accuracy of the averaged weights, judged; and how many samples did not converge."""
        current = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        clean = robust = unconverged = 0
        size = 256
        for begin in range(0, len(self.validation), size):
            part = slice(begin, begin + size)
            x, y = self.validation.x[part].to(self.device), self.validation.y[part].to(self.device)
            known = judge_clean(self.model, x, y)
            verdict = known.verdict
            clean += int(verdict.is_correct.sum())
            unconverged += int((~verdict.is_converged).sum())
            if self.validation_attack is not None:
                ids = self.validation.sample_ids[part]
                objective = self.validation_attack.first_objective(y, None)
                start = known.known(self.model, x, objective)
                result = self.validation_attack(self.model, x, y, sample_ids=ids, clean=start)
                is_correct = judge(self.model, result.x_adv, y).is_correct & verdict.is_correct
                robust += int((is_correct & ~result.is_failed).sum())
        self.model.load_state_dict(current)
        count = len(self.validation)
        return clean / count, (robust / count if self.validation_attack is not None else None), unconverged


def random_shift(x: Tensor, largest: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `largest` pixels along both axes; zeros move in."""
    if largest == 0:
        return x
    height, width = x.shape[-2:]
    padded = F.pad(x, [largest] * 4)
    down, right = torch.randint(0, 2 * largest + 1, (2, len(x)), generator=generator)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(len(x))[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None], rows, columns
    ]


def random_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image, left to right, with probability one half."""
    is_flipped = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(per_sample(is_flipped, x), x.flip(-1), x)


def _key(seed: int, counter: int) -> int:
    return (seed * 1_000_003 + counter * 7919 + 17) % 2**31

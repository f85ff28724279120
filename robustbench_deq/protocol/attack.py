"""The protocol every attack keeps: the attack proposes a perturbation, nothing here judges it.

Subclasses write `run`. The final `__call__` checks the input, freezes the model, counts the cost and enforces the
budget, runs restarts, lets samples leave that are done, does not trust the subclass with the threat model (it projects
the result itself), and leaves mode, buffers, `requires_grad` and `.grad` of the model as they were.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar, final

import torch
from torch import Tensor

from robustbench_deq.configs import validate
from robustbench_deq.equilibrium import EquilibriumModel, check_labels, check_model
from robustbench_deq.meter import Meter
from robustbench_deq.optimise import Classification, Keep, Objective, Optimum, Source, Step, optimise
from robustbench_deq.protocol.batch import Batch, Clean, Proposal
from robustbench_deq.protocol.recorder import Recorder
from robustbench_deq.protocol.runs import AttackResult, Confirm, Runs
from robustbench_deq.protocol.settings import AttackConfig, ObjectiveConfig
from robustbench_deq.registry import Registry
from robustbench_deq.threats import Threat

A = TypeVar("A", bound=AttackConfig)
M = TypeVar("M", bound=ObjectiveConfig)


class Attack(abc.ABC, Generic[A]):
    """An attack with its threat model and settings.

    Attributes:
        name: in the registry.
        summary: one line for listings.
        config_type: the typed settings.
        is_gradient_based: False where it never asks for a gradient, and so attacks models that have none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config_type: ClassVar[type[AttackConfig]] = AttackConfig
    is_gradient_based: ClassVar[bool] = True

    def __init__(self, threat: Threat, config: A | None = None) -> None:
        self.threat = threat
        self.config: A = config if config is not None else self.config_type()  # type: ignore[assignment]  # its own

    def with_(self, threat: Threat | None = None, **settings: Any) -> Self:
        """The same attack with another threat, or other settings."""
        config = self.config.model_copy(update=settings) if settings else self.config
        return type(self)(threat or self.threat, config)

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """The loss that a run ascends first, if its adjoint at the clean equilibrium is of use; None: it is not."""
        return None

    @abc.abstractmethod
    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        """Perturb the images of `batch`. Gradients with respect to parameters are off."""

    @final
    def __call__(
        self,
        model: EquilibriumModel,
        x: Tensor,
        y: Tensor,
        *,
        targets: Tensor | None = None,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        num_snapshots: int = 0,
        clean: Clean | None = None,
        confirm: Confirm | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: left as it was found.
            x: images `(batch, channels, height, width)` in [0, 1].
            y: true classes `(batch,)`.
            targets: classes to be reached `(batch,)`; None is untargeted.
            sample_ids: what a sample's randomness is keyed by `(batch,)`; None numbers the batch.
            num_snapshots: points of the accuracy-against-cost curve.
            clean: what is known of the clean images: solves start there, and unless `stop_at_success` is off, samples
                that are misclassified there are not attacked.
            confirm: who has the last word on samples that leave because they are fooled; those that it refutes are
                attacked on, without leaving. None believes the attack.
            progress: told after each step what share of the present run is done; the clock goes on meanwhile.

        Raises:
            UsageError: for an object that is not an `EquilibriumModel`, a model without a gradient, and images or
                labels that do not fit it.
        """
        check_model(model)
        x = x.detach()
        model.check_images(x)
        check_labels(y, len(x), model.num_classes)
        if targets is not None:
            check_labels(targets, len(x), model.num_classes)
        ids = torch.arange(len(x)) if sample_ids is None else sample_ids
        if self.is_gradient_based:
            with frozen(model):
                model.check_gradient(x)
        settled = None if clean is None else clean.settled
        batch = Batch(x, y, targets, ids, seed, torch.zeros_like(x), settled, self.config.stop_at_success)
        with torch.enable_grad(), frozen(model), self._meter(model, len(x)) as meter:
            runs = Runs(partial(self.run, model), self.config, self.threat, batch, meter, num_snapshots, progress)
            rows = None
            if clean is not None and self.config.stop_at_success:
                rows = clean.is_correct.nonzero()[:, 0]
            runs.attack(rows)
            if confirm is not None:
                runs.attack_on(confirm)
        return runs.result(rows)

    def _meter(self, model: EquilibriumModel, num_rows: int) -> Meter:
        evaluations, seconds = self.config.max_evaluations, self.config.max_seconds
        return Meter(
            model,
            max_rows=None if evaluations is None else evaluations * num_rows * (1 + 1e-9),
            max_seconds=None if seconds is None else seconds * num_rows,
        )


class ObjectiveAttack(Attack[M]):
    """An attack whose `run` is a run of `optimise` on the classification problem, or several."""

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        return self.config.bind(labels, targets).at(0.0)

    def search(
        self,
        model: EquilibriumModel,
        batch: Batch,
        source: Source,
        step: Step,
        keep: Keep,
        num_steps: int,
        record: Recorder | None = None,
    ) -> Optimum:
        """Optimise the perturbation of `batch` within the threat's ball, for the config's objective.

        Args:
            record: takes the snapshots of this run; None takes none.
        """
        return optimise(
            Classification(model, batch.images, self.config.bind(batch.labels, batch.targets)),
            source,
            self.threat.ball(batch.images),
            step,
            keep,
            batch.start,
            num_steps=num_steps,
            settled=batch.settled,
            leaves=batch.leaves,
            seed=batch.seed,
            ids=batch.ids,
            watch=None if record is None else record.watch,
        )


@contextlib.contextmanager
def frozen(model: EquilibriumModel) -> Iterator[None]:
    """Evaluation mode, and no gradients with respect to parameters; on leaving, everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


ATTACKS: Registry[type[Attack[Any]]] = Registry("attack")


def make_attack(name: str, threat: Threat, settings: dict[str, Any], where: str | None = None) -> Attack[Any]:
    """A registered attack with settings that are checked.

    Args:
        where: what the settings are from, for the message.

    Raises:
        UsageError: for an unknown name, or settings or a threat that the attack refuses.
    """
    kind = ATTACKS.get(name)
    return kind(threat, validate(kind.config_type, settings, where or f"attack {name}"))

"""Attacks of other libraries on equilibrium models, through the attack protocol: by name as `LIBRARY:NAME`.

A library sees an ordinary network: it calls `forward` in evaluation mode and differentiates it, so that every gradient
costs a cold forward and a cold adjoint solve with the model's own settings. The cost is metered, the result projected
and judged, as that of any attack. Radius, norm, number of classes and seed are the threat's, the model's and the
run's; everything else is the library's own default, or what `settings` says under the library's own names.

Randomness is not keyed by the sample here: a library draws from the global generators, which are seeded with the run's
seed and put back afterwards. What a sample gets from an attack that draws depends on its batch.
"""

from __future__ import annotations

import abc
import contextlib
import io
import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import RunError, UsageError, told
from robustbench_deq.meter import BudgetSpent
from robustbench_deq.optimise import has_slope
from robustbench_deq.protocol import Attack, AttackConfig, Batch, Proposal, Recorder
from robustbench_deq.registry import choice
from robustbench_deq.threats import Threat


class BridgeConfig(AttackConfig):
    """Settings of all attacks of other libraries."""

    restarts: int = Field(1, ge=1, le=1, description="always 1: the library has no keyed random start")
    random_start: Literal[False] = Field(False, description="always false: see the module's docstring")
    max_evaluations: None = Field(None, description="always null: the library shows no iterate before its end")
    max_seconds: None = Field(None, description="always null, for the same reason")


class NamedConfig(BridgeConfig):
    """Settings of an attack that is asked for as `LIBRARY:NAME`."""

    settings: dict[str, JsonValue] = Field(default_factory=dict, description="of the library's attack, by its names")


C = TypeVar("C", bound=BridgeConfig)


class Foreign(NamedTuple):
    """What is known of a library's attack before it runs.

    norms          names of those it has
    settings       names of those it has, without what the bridge sets
    is_gradient_based  whether it asks for gradients
    takes_mean     whether its loss is the mean over the batch, of which it divides the gradient by its size
    """

    norms: tuple[str, ...]
    settings: tuple[str, ...]
    is_gradient_based: bool = True
    takes_mean: bool = False


class Network(nn.Module):
    """What a library sees of a model.

    Attributes:
        is_flat: samples whose image has had a gradient of zero or NaN at every step, `(batch,)`; None: nobody asked.

    Args:
        num_rows: samples of the batch.
        takes_mean: multiply the logits' gradient by the batch size, so that it is that of a sum: then neither the
            adjoint's tolerance nor the library's own `1e-10` beside a gradient's norm sees how many samples there are.
    """

    def __init__(self, model: EquilibriumModel, num_rows: int, takes_mean: bool) -> None:
        super().__init__()
        self.model, self.num_rows, self.takes_mean = model, num_rows, takes_mean
        self.is_flat: Tensor | None = None
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._note)  # type: ignore[no-untyped-call]  # torch has no type for it
        logits = self.model(x)
        if logits.requires_grad and self.takes_mean:
            logits.register_hook(lambda gradient: gradient * len(gradient))
        return logits

    def _note(self, gradient: Tensor) -> Tensor:
        """Of a model in another layout the gradient is too, and a library would fail to view it."""
        if self.takes_mean and len(gradient) == self.num_rows:  # others ask for parts of the batch
            is_flat = ~has_slope(gradient)
            self.is_flat = is_flat if self.is_flat is None else self.is_flat & is_flat
        return gradient.contiguous()


class BridgedAttack(Attack[C]):
    """An attack of another library. Subclasses say how to call it.

    Attributes:
        foreign: what is known of it.
    """

    foreign: ClassVar[Foreign]

    def __init__(self, threat: Threat, config: C | Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(threat, config, **settings)
        norms, chosen = self.foreign.norms, threat.norm.name
        if chosen not in norms:
            raise UsageError.of(
                self.name, expected=f"norm {' or '.join(norms)}", got=chosen, fix=f"pass --norm {norms[0]}"
            )
        for key in self.own_settings(1.0):
            if key not in self.foreign.settings:
                raise UsageError.of(
                    f"{self.name}: settings",
                    expected=choice(key, self.foreign.settings, "a setting of the library's attack"),
                    got=repr(key),
                    fix="remove or correct it; the threat sets norm and radius",
                )

    def own_settings(self, epsilon: float) -> dict[str, Any]:
        """Settings of the library's attack at a radius, by its names."""
        return self.config.settings if isinstance(self.config, NamedConfig) else {}

    @abc.abstractmethod
    def perturbed(self, network: Network, batch: Batch, settings: dict[str, Any], epsilon: float) -> Tensor:
        """What the library makes of the images of `batch`."""

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        record.plan(1)
        x, epsilon = batch.images, float(self.threat.ball(batch.images).radius)
        if epsilon == 0.0:  # libraries would divide zero by zero
            return Proposal(torch.zeros_like(x), x.new_full((len(x),), -torch.inf))
        network = Network(model, len(x), self.foreign.takes_mean)
        with seeded(batch.seed), torch.set_grad_enabled(self.foreign.is_gradient_based):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    x_adv = self.perturbed(network, batch, self.own_settings(epsilon), epsilon)
            except (BudgetSpent, UsageError, RunError):
                raise
            except Exception as error:
                raise RunError(f"attack {self.name}: {told(error)}") from error
        # The loss chooses between restarts; there is one.
        return Proposal((x_adv.detach().to(x) - x), x.new_zeros(len(x)), is_flat=network.is_flat)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and torch begin at `seed`; on leaving they are where they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def unknown(library: str, name: str, names: list[str], reason: str | None = None) -> UsageError:
    """That a library has no attack of that name, or (`reason`) that it cannot run here.

    Args:
        names: of those that can.
    """
    return UsageError.of(
        f"attack {library}:{name}",
        expected=choice(name, names, f"an attack of {library} on one model within a ball"),
        got=reason or f"none that {library} has",
        fix="list them with 'robustbench-deq attacks'",
    )


def missing(library: str, fix: str) -> UsageError:
    return UsageError.of(f"attack {library}:NAME", expected=f"the package {library}", got="none", fix=fix)

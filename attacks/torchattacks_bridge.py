"""torchattacks' `PGD` and `PGDL2` on equilibrium models, through the attack protocol.

The library sees an ordinary network: it calls `forward` in evaluation mode and differentiates it, so every gradient
step costs a cold forward and a cold adjoint solve with the model's own settings. Its random start draws from the global
generator, which would make a sample depend on its batch, so it is off. It takes the mean of the cross-entropy over the
batch; the logits' gradient is scaled back to that of a sum, so that neither the adjoint's tolerance nor the library's
own `1e-10` in the gradient's norm sees the batch size.

Source: Kim, "Torchattacks: a PyTorch repository for adversarial attacks", arXiv 2010.01950.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import Norm, has_slope
from robustbench_deq.protocol import ATTACKS, Attack, AttackConfig, Batch, Proposal, Recorder
from robustbench_deq.threats import Threat


class TorchattacksConfig(AttackConfig):
    restarts: int = Field(1, ge=1, le=1, description="always 1: the library has no keyed random start")
    random_start: Literal[False] = Field(False, description="always false: see the module's docstring")
    max_evaluations: None = Field(None, description="always null: the library shows no iterate before its end")
    max_seconds: None = Field(None, description="always null, for the same reason")
    steps: int = Field(20, ge=1, description="gradient steps")
    step_size: float = Field(0.25, gt=0, le=1e6, description="step as a fraction of epsilon")


class _Summed(nn.Module):
    """The model, but its logits' gradient is multiplied by the batch size; `is_flat`: samples whose image has had a
    gradient of zero or NaN at every step, `(batch,)`."""

    def __init__(self, model: EquilibriumModel) -> None:
        super().__init__()
        self.model = model
        self.is_flat: Tensor | None = None
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._note)  # type: ignore[no-untyped-call]  # torch has no type for it
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * len(gradient))
        return logits

    def _note(self, gradient: Tensor) -> Tensor:
        """Of a model in another layout the gradient is too, and the library would fail to view it."""
        is_flat = ~has_slope(gradient)
        self.is_flat = is_flat if self.is_flat is None else self.is_flat & is_flat
        return gradient.contiguous()


class _TorchattacksPGD(Attack[TorchattacksConfig]):
    """What both have in common; subclasses name the library's class and the norm it is for. The library brings SciPy's
    statistics and half a second of imports along, and is imported when an attack runs."""

    config_type = TorchattacksConfig
    norm: Norm
    library_name: ClassVar[str]

    def __init__(
        self, threat: Threat, config: TorchattacksConfig | Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(threat, config, **settings)
        if threat.norm is not self.norm:
            raise UsageError.of(
                self.name,
                expected=f"norm {self.norm.name}",
                got=threat.norm.name,
                fix=f"pass --norm {self.norm.name}",
            )

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config, epsilon, x = self.config, self.threat.ball(batch.images).radius, batch.images
        record.plan(config.steps)
        if epsilon == 0.0:  # the library would divide zero by zero
            return Proposal(torch.zeros_like(x), x.new_full((len(x),), -torch.inf))
        import torchattacks  # type: ignore[import-untyped]  # the library ships no types

        summed = _Summed(model)
        library = getattr(torchattacks, self.library_name)(
            summed, eps=epsilon, alpha=config.step_size * epsilon, steps=config.steps, random_start=False
        )
        if batch.targets is not None:
            library.set_mode_targeted_by_label(quiet=True)
        x_adv = library(x, batch.labels if batch.targets is None else batch.targets)
        # The loss chooses between restarts; there is one.
        return Proposal((x_adv - x).detach(), x.new_zeros(len(x)), is_flat=summed.is_flat)


@ATTACKS.register("torchattacks-pgd")
class TorchattacksPGD(_TorchattacksPGD):
    name = "torchattacks-pgd"
    summary = "torchattacks' PGD (Linf) through forward and autograd"
    norm = Norm.LINF
    library_name = "PGD"


@ATTACKS.register("torchattacks-pgdl2")
class TorchattacksPGDL2(_TorchattacksPGD):
    name = "torchattacks-pgdl2"
    summary = "torchattacks' PGDL2 (L2) through forward and autograd"
    norm = Norm.L2
    library_name = "PGDL2"

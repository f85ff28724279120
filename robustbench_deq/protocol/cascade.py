"""Cascades: attacks one after another, each on the samples that those before have left robust.

    a stage   attacks of one kind on the survivors; the judge confirms what each has broken before the next begins
    audit     a stage on a keyed share of the survivors, to see whether another kind of attack finds anything

A sample that a certificate shows robust is attacked only if it belongs to a keyed share: there the certificate is put
to the test.
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from robustbench_deq.certificates import certified
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import Objective
from robustbench_deq.protocol.attack import Attack
from robustbench_deq.protocol.batch import Batch, Proposal
from robustbench_deq.protocol.recorder import Recorder
from robustbench_deq.protocol.runs import Confirm, Runs
from robustbench_deq.protocol.settings import AttackConfig
from robustbench_deq.randomness import keyed_uniform

A = TypeVar("A", bound=AttackConfig)
BATCH_SIZE, SEED = 128, 0
"""Of a standard evaluation: attacks of other libraries depend on them."""
CERTIFIED_SHARE = 1 / 16
"""Of the certified samples, those that are attacked nevertheless."""
CERTIFIED_KEY, SHARE_KEY = 0x0CE27, 0x05A6E
"""Tell the draws apart from others of the same seed and sample."""


class Stage(NamedTuple):
    """Attacks of one kind.

    name     in records
    attacks  with the cascade's threat, each on what those before have left
    share    of the survivors, by a draw for each; 1 is all
    """

    name: str
    attacks: tuple[Attack[Any], ...]
    share: float = 1.0


class Cascade(Attack[A]):
    """An attack that is a sequence of others."""

    @abc.abstractmethod
    def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
        """The stages, in their order, for a model of that many classes and images (channels, height, width)."""

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        return self.stages(2, (1, 8, 8))[0].attacks[0].first_objective(labels, targets)

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        raise NotImplementedError("a cascade has stages, and no run of its own")

    def carry_out(self, model: EquilibriumModel, runs: Runs, rows: Tensor | None, confirm: Confirm | None) -> None:
        batch, device = runs.batch, runs.batch.images.device
        if batch.targets is not None:
            raise UsageError.of(self.name, expected="no targets", got="targets", fix="attack with joint-pgd instead")
        left = torch.arange(len(batch), device=device) if rows is None else rows
        if batch.settled is not None:
            runs.is_certified = certified(model, self.threat, batch.settled.z, batch.labels)
        if runs.is_certified is not None:
            is_drawn = keyed_uniform(batch.ids.to(device), batch.seed, CERTIFIED_KEY) < CERTIFIED_SHARE
            runs.is_spared = runs.is_certified & ~is_drawn
            left = left[~runs.is_spared[left]]
        draws = keyed_uniform(batch.ids.to(device), batch.seed, SHARE_KEY)
        stages, done = self.stages(model.num_classes, model.input_shape), 0.0
        whole = sum(stage.share * _length(attack) for stage in stages for attack in stage.attacks)
        for stage in stages:
            before, part, rest = runs.spent(), left, left[:0]
            if stage.share < 1.0:
                is_drawn = draws[left] < stage.share
                part, rest = left[is_drawn], left[~is_drawn]
            survivors = part
            for attack in stage.attacks:
                length = stage.share * _length(attack) / whole
                runs.record.within(done, length, stage.name)
                done += length
                survivors = runs.attack_left(attack.runner(model), attack.config, survivors, confirm)
            runs.end_stage(stage.name, part, before)
            left = torch.cat([survivors, rest]).sort().values


def _length(attack: Attack[Any]) -> float:
    """About how long an attack takes beside others: its steps, over all classes that it heads for."""
    config = attack.config
    settings = getattr(config, "settings", {})  # of another library's
    steps = settings.get("n_queries", settings.get("steps", getattr(config, "steps", 1)))
    return float(steps) * getattr(config, "num_targets", 1)

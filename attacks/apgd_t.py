"""`apgd-t`: APGD toward one wrong class after another, the most likely first, with full solves.

A run a class on the samples that nothing has fooled yet, each along the targeted DLR loss (`optimise.TowardDLR`). Any
wrong class counts, whichever a run heads for. Given targets, there is one run, toward them, and only they count. Of all
runs a sample keeps the one with the highest loss, which is positive where it is fooled.

Source: Croce and Hein, ICML 2020, section 5 and Eq. 7, where the nine most likely wrong classes are taken.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustbench_deq.attacks.apgd import SolvedAPGDConfig
from robustbench_deq.attacks.pgd import SolvedAttack
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import APGD, Objective, TowardDLR
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder, likely_classes
from robustbench_deq.rows import per_sample


class TargetedAPGDConfig(SolvedAPGDConfig):
    objective: Literal["dlr"] = Field("dlr", description="always dlr, toward a class")
    heading: None = Field(None, description="always null: it heads for several classes")
    num_targets: int = Field(9, ge=1, description="wrong classes, the most likely first; all where there are fewer")


@ATTACKS.register("apgd-t")
class TargetedAPGD(SolvedAttack[TargetedAPGDConfig]):
    name = "apgd-t"
    summary = "APGD toward the most likely wrong classes, one after another"
    config_type = TargetedAPGDConfig

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """Which class comes first is known only at the equilibrium."""
        return None

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config, is_aimed = self.config, batch.targets is not None
        record.plan(config.steps)
        targets = batch.targets
        classes = likely_classes(model, batch, config.num_targets) if targets is None else targets[:, None]
        source = config.source(has_trace=record.num_snapshots > 0)
        delta, loss = batch.start.clone(), batch.images.new_full((len(batch),), -torch.inf)
        is_done, is_flat = torch.zeros_like(loss, dtype=torch.bool), torch.ones_like(loss, dtype=torch.bool)
        rows, diagnostics = torch.arange(len(batch), device=loss.device), dict[str, float]()
        for number in range(classes.shape[1]):
            part = batch.take(rows)
            objective = TowardDLR(part.labels, classes[rows, number], is_aimed)
            found = self.search(
                model,
                part,
                source,
                APGD(config.step_size),
                config.highest_loss(),
                config.steps,
                record if number == 0 else None,
                objective,
            )
            wins = (found.loss >= loss[rows]) | found.is_done
            delta[rows] = torch.where(per_sample(wins, found.variable), found.variable, delta[rows])
            loss[rows] = torch.where(wins, found.loss, loss[rows])
            is_done[rows], is_flat[rows] = found.is_done, is_flat[rows] & found.is_flat
            for name, counts in found.tally.items():
                diagnostics[name] = diagnostics.get(name, 0.0) + float(counts.sum())
            rows = rows[~found.is_done] if batch.leaves else rows
            if found.is_stopped or len(rows) == 0:
                break
        return Proposal(delta, loss, is_done, is_flat=is_flat, diagnostics=diagnostics)

"""The loss of one batch, differentiable by the parameters through the equilibrium.

    L = mean cross-entropy at the (perturbed) images + weight * estimate of ||J_z||_F^2 / state size

After a joint attack the state and the adjoint are already close to their fixed points, so both solves start from there;
that is what makes joint adversarial training nearly as cheap as the attack alone (Gurumurthy et al., NeurIPS 2021,
section 3.3). The adjoint is that of the loss which the attack ascends, whatever its objective is: its direction is kept
and its size fitted to the cross-entropy's, sample by sample. The Jacobian term is Hutchinson's estimate with one
Rademacher probe (Bai, Koltun, Kolter, "Stabilizing equilibrium models by Jacobian regularization", ICML 2021, Eq. 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.adjoints import AdjointTrace, Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.protocol import Attack
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Solve


class BatchLoss(NamedTuple):
    """`total` carries gradients; the rest is for the log: `num_unsolved` counts forward solves that missed their
    tolerance."""

    total: Tensor
    cross_entropy: Tensor
    num_correct: Tensor
    num_unsolved: Tensor
    trace: AdjointTrace


def batch_loss(
    model: EquilibriumModel,
    x: Tensor,
    y: Tensor,
    *,
    forward: Solve,
    backward: Solve,
    attack: Attack | None,
    sample_ids: Tensor,
    seed: int,
    label_smoothing: float,
    jacobian_weight: float,
    jacobian_rows: int,
    generator: torch.Generator,
) -> BatchLoss:
    """Loss of images `x` with classes `y`.

    Args:
        attack: perturbs the batch first; None is standard training.
        jacobian_weight: 0 skips the estimate on this batch.
        jacobian_rows: rows of the batch that the estimate uses.
        generator: of the probe.
    """
    z0, mu0 = None, None
    if attack is not None:
        result = attack(model, x, y, sample_ids=sample_ids, seed=seed)
        x = result.x_adv
        z0, mu0 = _usable_start(model, x, result.z, result.mu)
    trace = AdjointTrace()
    solution = model.equilibrium(x, z0, solve=forward, adjoint=Implicit(backward, mu0, fits_start=True), trace=trace)
    logits = model.head(solution.value)
    cross_entropy = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    total = cross_entropy
    if jacobian_weight:
        rows = slice(0, jacobian_rows)
        total = total + jacobian_weight * jacobian_norm(model, x[rows], solution.value[rows].detach(), generator)
    return BatchLoss(
        total, cross_entropy.detach(), (logits.detach().argmax(1) == y).sum(), (~solution.is_converged).sum(), trace
    )


def _usable_start(
    model: EquilibriumModel, x: Tensor, z0: Tensor | None, mu0: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The starts, but cold for samples whose state or adjoint the attack has lost to infinity or NaN."""
    if z0 is not None and bool((is_lost := _is_lost(z0)).any()):
        with torch.no_grad():
            z0 = torch.where(per_sample(is_lost, z0), model.initial_state(model.inject(x)), z0)
    if mu0 is not None:
        mu0 = mu0.masked_fill(per_sample(_is_lost(mu0), mu0), 0.0)
    return z0, mu0


def _is_lost(start: Tensor) -> Tensor:
    return ~torch.isfinite(start.flatten(1)).all(1)


def jacobian_norm(model: EquilibriumModel, x: Tensor, z: Tensor, generator: torch.Generator) -> Tensor:
    """Hutchinson's estimate of `||J_z||_F^2` per state entry, differentiable by the parameters."""
    z = z.requires_grad_()
    f = model.evaluate(z, model.inject(x))
    probe = torch.randint(0, 2, f.shape, generator=generator).to(f) * 2 - 1
    product = torch.autograd.grad(f, z, probe, create_graph=True)[0]
    return product.square().mean()

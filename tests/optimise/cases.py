"""Shared by the tests of the heart: closed forms of the affine model, and the ways to drive the joint iteration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.models import Linear
from robustbench_deq.optimise import (
    Classification,
    Domain,
    Frozen,
    HighestLoss,
    Intermediate,
    Joint,
    Keep,
    Mixing,
    Norm,
    Objective,
    Optimum,
    Settled,
    Solved,
    Step,
    optimise,
)
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Picard, Solve

LABELS = torch.tensor([0, 1, 2, 0])
TIGHT = Solve(Anderson(), rtol=1e-10, max_steps=300)
TIGHTLY = Solved(TIGHT, Implicit(TIGHT))

DRIVERS = {
    "k=1": {},
    "k=3": {"inner_steps": 3},
    "adaptive": {"inner_steps": None},
    "damped": {"damping_z": 0.7, "damping_mu": 0.6},
    "k=3, Anderson on the state": {"inner_steps": 3, "accelerator": Anderson()},
    "adaptive, Anderson on the state": {"inner_steps": None, "accelerator": Anderson()},
    "Anderson of type I on all": {"accelerator": Anderson(kind=1), "mixing": Mixing.ALL},
    "Anderson of type II on all": {"accelerator": Anderson(), "mixing": Mixing.ALL},
}

SOURCES = {
    **{name: Joint(warmup=Solve(Picard(), rtol=0.01, max_steps=30), **driver) for name, driver in DRIVERS.items()},
    "solved, warm": TIGHTLY,
    "solved, cold": Solved(TIGHT, Implicit(TIGHT), is_warm=False),
    "intermediate": Intermediate(60),
    "intermediate, solved": Intermediate(40, (5, 20), forward=TIGHT),
    "frozen": Frozen(TIGHT, TIGHT, 3),
}


def log_odds(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The scale-free cross-entropy and its gradient with respect to the logits, by hand: at a temperature T the loss is
    `-T log(p_y / (1 - p_y))`, and its gradient the odds of the wrong classes among themselves, minus one at the true
    class."""
    temperature = logits.std(1, correction=0, keepdim=True) / 3.0
    p = (logits / temperature).softmax(1)
    true = F.one_hot(y, logits.shape[1]).to(p)
    p_true = (p * true).sum(1)
    loss = -temperature[:, 0] * (p_true / (1 - p_true)).log()
    return loss, p * (1 - true) / (1 - p_true)[:, None] - true


def exact(model: Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Equilibrium `(I - A)^-1 u` and adjoint `(I - A^T)^-1 dL/dz*` of the cross-entropy."""
    with torch.no_grad():
        matrix = torch.eye(len(model.a), dtype=x.dtype) - model.a
        z = torch.linalg.solve(matrix, model.inject(x).mT).mT
        slope = log_odds(model.head(z), y)[1]
        return z, torch.linalg.solve(matrix.mT, (slope @ model.readout.weight).mT).mT


def slope(model: Linear, x: Tensor, y: Tensor) -> Tensor:
    """The margin's gradient with respect to the image, of two classes."""
    matrix = model.input_matrix().detach()
    return (matrix[1 - y] - matrix[y]).view_as(x)


def best_of_linear(gradient: Tensor, norm: Norm, radius: Tensor | float) -> Tensor:
    """Where a linear function is highest in a norm ball that no box cuts."""
    flat = gradient.flatten(1)
    if norm is Norm.L2:
        best = flat / flat.norm(dim=1, keepdim=True)
    elif norm is Norm.LINF:
        best = flat.sign()
    else:
        best = F.one_hot(flat.abs().argmax(1), flat.shape[1]) * flat.sign()
    radius = radius if isinstance(radius, Tensor) else torch.full((len(flat),), radius, dtype=flat.dtype)
    return best.view_as(gradient) * per_sample(radius, gradient)


def run(
    model: EquilibriumModel,
    x: Tensor,
    objective: Objective,
    domain: Domain,
    step: Step,
    num_steps: int,
    *,
    keep: Keep | None = None,
    is_settled: bool = False,
    watch=None,
    **driver: object,
) -> Optimum:
    """The joint iteration from the initial state (or the equilibrium), a zero adjoint and the clean images."""
    settled = None
    if is_settled:
        z = model.equilibrium(x).value.detach()
        settled = Settled(z, torch.zeros_like(z), torch.ones_like(z[:, 0]))
    return optimise(
        Classification(model, x, objective),
        Joint(has_loss_start=False, **driver),
        domain,
        step,
        keep or HighestLoss(0.005, 0.1),
        torch.zeros_like(x),
        num_steps=num_steps,
        settled=settled,
        watch=watch,
    )

"""What a model does on a few images, as numbers: the doctor grades them, the sanity panel records them.

repeat    how far a second call is from the first
batch     how far an image's part in a batch is from what it gets among others
gradient  how far the implicit gradient is from central finite differences
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.adjoints import AdjointTrace, Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.judge import JUDGE_RTOL
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Solution, Solve

NUM_DIFFERENTIATED = 8
STEP = 3e-3
"""Half the L2 length, in pixel units, of a finite difference: on the shipped models, in float32, it is then right to
0.6 %. Shorter ones drown in rounding, longer ones cross the kinks of relu."""
FINE = Solve(Anderson(ridge=1e-8), rtol=1e-6, max_steps=200)


class Case(NamedTuple):
    """A model, images `x` and classes `y` `(batch,)`, their injections `u`, and states `z` to look at."""

    model: EquilibriumModel
    x: Tensor
    y: Tensor
    u: Tensor
    z: Tensor

    @classmethod
    def near_the_start(cls, model: EquilibriumModel, x: Tensor, y: Tensor) -> Case:
        """At the states after the first evaluation of the cell."""
        u = model.inject(x)
        return cls(model, x, y, u, model.cell(model.initial_state(u), u))

    def at(self, rows: Tensor) -> Case:
        return Case(self.model, *(part[rows] for part in self[1:]))


class Gap(NamedTuple):
    """The part that differs most, and by how much relative to its largest value."""

    part: str
    size: float


def outputs(case: Case) -> dict[str, Tensor]:
    """Of every part of the model."""
    model, x, _, u, z = case
    return {
        "inject": model.inject(x),
        "initial_state": model.initial_state(u),
        "cell": model.cell(z, u),
        "head": model.head(z),
    }


def worst_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> Gap:
    return max((Gap(name, relative_gap(one[name], other[name])) for name in one), key=lambda gap: gap.size)


def relative_gap(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest value; two NaNs do not differ, a NaN and a number do infinitely."""
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs()).max() / one.abs().nan_to_num(posinf=0.0).max().clamp_min(1e-12)
    return float(gap.nan_to_num(nan=torch.inf))


def repeat_gap(case: Case) -> Gap:
    """Of a second call of every part, and of `forward`, which has seen other images in between."""
    parts, forward_gap = outputs(case), 0.0
    with contextlib.suppress(Exception):  # whatever a foreign forward raises
        logits = case.model(case.x)
        case.model(1 - case.x)
        forward_gap = relative_gap(logits, case.model(case.x))
    gap = worst_gap(parts, outputs(case))
    return gap if gap.size else Gap("forward", forward_gap)


def batch_gap(case: Case) -> Gap:
    """Of half of the images, in another order, from the same ones among all; there are at least two."""
    rows = torch.arange(len(case.x), device=case.x.device).flip(0)[: len(case.x) // 2]
    whole = {name: output[rows] for name, output in outputs(case).items()}
    return worst_gap(whole, outputs(case.at(rows)))


def score(logits: Tensor) -> Tensor:
    """One number a sample `(batch,)` whose gradient does not saturate: the logits with weights from -1 to 1. Masked
    classes count for nothing."""
    logits = logits.masked_fill(logits.isneginf(), 0.0)
    return logits @ torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype, device=logits.device)


def implicit_score(
    case: Case, x: Tensor, solves: list[Solution] | None = None, trace: AdjointTrace | None = None
) -> Tensor:
    """`score` at the equilibrium of images near the case's own, with the implicit gradient; both solves are tight.

    The forward solve is appended to `solves`, and the backward pass fills in `trace`.
    """
    solution = case.model.equilibrium(x, case.z, solve=FINE, adjoint=Implicit(FINE), trace=trace)
    if solves is not None:
        solves.append(solution)
    return score(case.model.head(solution.value))


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """With respect to the image, `(batch, ...)`; zero where the function is attached to nothing."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        total = function(leaf).sum()
        if not total.requires_grad:
            return torch.zeros_like(x)
        return torch.autograd.grad(total, leaf, materialize_grads=True)[0]


class GradientGap(NamedTuple):
    """The implicit gradient of `score` against central finite differences, along a direction near it.

    is_missing  it is zero on all images
    size        median relative difference over the images whose solves were found; NaN: on none
    num_found   images whose equilibria and adjoint were found to the judge's tolerance
    num_images  that were looked at
    """

    is_missing: bool
    size: float
    num_found: int
    num_images: int


def gradient_gap(case: Case) -> GradientGap:
    """On the first images of a case at its equilibria."""
    case = case.at(torch.arange(len(case.x), device=case.x.device)[:NUM_DIFFERENTIATED])
    x = case.x.clamp(STEP, 1 - STEP)  # the pixels that are compared stay in [0, 1]
    solves: list[Solution] = []
    trace = AdjointTrace()
    gradient = gradient_of(lambda images: implicit_score(case, images, solves, trace), x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    direction = _unit(_unit(gradient) + _unit(noise))
    ahead, behind = (implicit_score(case, x + sign * STEP * direction, solves) for sign in (1, -1))
    slope = (ahead - behind) / (2 * STEP)
    product = (gradient * direction).flatten(1).sum(1)
    if trace.solution is not None:  # a head that ignores the state has no adjoint
        solves.append(trace.solution)
    is_found = torch.stack([solution.residual <= JUDGE_RTOL for solution in solves]).all(0)
    gaps = (product - slope).abs() / torch.maximum(product.abs(), slope.abs()).clamp_min(1e-12)
    size = float(gaps[is_found].median()) if bool(is_found.any()) else float("nan")
    return GradientGap(not bool(gradient.any()), size, int(is_found.sum()), len(x))


def _unit(v: Tensor) -> Tensor:
    return v / per_sample(torch.linalg.vector_norm(v.flatten(1), dim=1).clamp_min(1e-30), v)

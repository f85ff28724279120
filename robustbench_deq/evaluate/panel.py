"""The sanity panel: a few numbers, on a few images, that say whether gradients can be believed on a model.

They are measured with exact gradients, from solves that are tighter than an attack's, and are what they are: which of
them cast doubt on a result is said by `records.flags`. A number that cannot be measured is left out, as are those of
searches where epsilon is 0. The names and what they mean stand in `records.flags.PROBES`.

    search   ascent of the cross-entropy within the threat's ball, in one step of length epsilon or in many shorter
             ones; images that are fooled at a settled state leave it
    huge     the same in the whole pixel box, where any image can become any other
    noise    the best of a few random points on the boundary of the ball

Source of what to look at: Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
section 3.1; Carlini et al., "On evaluating adversarial robustness", 2019; Pintor et al., "Indicators of attack
failure", NeurIPS 2022. Two starts, batch mates and finite differences are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.clean import CleanBatch
from robustbench_deq.evaluate.judge import judge, tight_solve
from robustbench_deq.evaluate.measures import Case, batch_gap, gradient_gap, repeat_gap
from robustbench_deq.optimise import (
    Ball,
    Classification,
    Last,
    Optimum,
    ProjectedAscent,
    Schedule,
    Settled,
    Solved,
    optimise,
)
from robustbench_deq.optimise.objectives import CrossEntropy
from robustbench_deq.protocol import frozen
from robustbench_deq.randomness import keyed_normal
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Solve
from robustbench_deq.threats import Threat

NUM_IMAGES = 32
NUM_REPEATED, NUM_RESTARTED = 8, 16
"""Of them, those that are called again and solved from a second start."""
NUM_STEPS = 10
STEP_SIZE = 0.5
"""First of the many steps as a fraction of the radius; they shrink by half a cosine, and reach 2.75 radii in all."""
NUM_DRAWS = 4
SEARCH = Solve(Anderson(), rtol=1e-3, max_steps=60)
WINS_BY = 1.2
"""Times the rise of many steps that one step or noise has to reach to beat them."""
LEAST_RISE = 1e-2
"""What it has to reach at least, in standard deviations of the logits over the classes."""
START_SCALES = (1.0, 10.0)
"""Root mean squares of the random states, in that of the equilibrium."""
MOST = 1e9
"""What stands for infinity, which records do not hold."""
SAME_STATE = 0.02
"""Relative difference up to which two states are the same equilibrium: the judge's tolerance on a slow cell."""


@torch.no_grad()
def probe(
    model: EquilibriumModel,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    seed: int,
    clean: CleanBatch,
    is_robust: Tensor | None,
) -> dict[str, float]:
    """The panel's numbers on the first `NUM_IMAGES` images of a batch; the model is left as it was.

    Args:
        x, y: clean images `(batch, channels, height, width)` in [0, 1] and their classes `(batch,)`.
        ids: what randomness is keyed by, with `seed`; `(batch,)`.
        clean: what the judge has found on these images.
        is_robust: which of them the attack has left robust, `(batch,)`; None: it aimed at something else.
    """
    rows = torch.arange(min(len(x), NUM_IMAGES), device=x.device)
    devices = [x.device] if x.is_cuda else []
    with frozen(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        near = Case.near_the_start(model, x[rows], y[rows])
        found = {"num_probed": float(len(rows)), "repeat_gap": repeat_gap(near.at(rows[:NUM_REPEATED])).size}
        if len(rows) > 1:
            found["batch_gap"] = batch_gap(near).size
        rows = rows[clean.verdict.is_converged[: len(rows)].to(rows.device)]
        if len(rows):
            settled = Case(model, x[rows], y[rows], model.inject(x[rows]), clean.z[rows])
            few = torch.arange(len(rows), device=x.device)[:NUM_RESTARTED]
            found["gradient_gap"] = gradient_gap(settled).size
            found |= _second_start(settled.at(few), ids[rows[few].cpu()], seed)
        rows = rows[clean.verdict.is_correct[rows.cpu()].to(rows.device)]
        if len(rows) and not _has_gradient(model, x):
            found["zero_gradient"] = 1.0
        elif len(rows) and threat.epsilon:
            known = clean.known(model, x, CrossEntropy(y)).settled.take(rows)
            left = None if is_robust is None else is_robust.to(rows.device)[rows]
            found |= _searches(model, threat, x[rows], y[rows], known, ids[rows.cpu()], seed, left)
    return {name: min(value, MOST) for name, value in found.items() if not math.isnan(value)}


def _has_gradient(model: EquilibriumModel, x: Tensor) -> bool:
    """Whether autograd leads back to the images; attacks that need a gradient refuse models where it does not."""
    try:
        model.check_gradient(x)
    except UsageError:
        return False
    return True


def _second_start(case: Case, ids: Tensor, seed: int) -> dict[str, float]:
    """Equilibria from random states, as far out as those that are known and farther, beside these."""
    model, prediction = case.model, case.model.head(case.z).argmax(1)
    is_other, is_other_class = (torch.zeros_like(case.y, dtype=torch.bool) for _ in range(2))
    is_found = torch.zeros_like(is_other)
    size = case.z.flatten(1).square().mean(1).sqrt()
    for number, scale in enumerate(START_SCALES):
        start = keyed_normal(case.z, seed, ids, number) * per_sample(scale * size, case.z)
        solution = tight_solve(model, case.u, z0=start)
        is_far = _length(solution.value - case.z) > SAME_STATE * _length(case.z)
        is_found |= solution.is_converged
        is_other |= solution.is_converged & is_far
        is_other_class |= solution.is_converged & (model.head(solution.value).argmax(1) != prediction)
    marks = {"other_equilibrium": is_other, "other_prediction": is_other_class}
    return {name: float(mark.sum() / is_found.sum()) for name, mark in marks.items()}


def _length(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z.flatten(1), dim=1)


def _searches(
    model: EquilibriumModel,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    known: Settled,
    ids: Tensor,
    seed: int,
    is_robust: Tensor | None,
) -> dict[str, float]:
    """On images that are classified correctly."""
    problem, ball = Classification(model, x, CrossEntropy(y)), threat.ball(x)
    one = _ascend(problem, ball, known, 1, ProjectedAscent(1.0, Schedule.CONSTANT))
    many = _ascend(problem, ball, known, NUM_STEPS, ProjectedAscent(STEP_SIZE))
    box = Ball(ball.norm, float(ball.norm.size(torch.ones_like(x[:1]))), x)
    huge = _ascend(problem, box, known, NUM_STEPS, ProjectedAscent(STEP_SIZE))
    noise = _noise_loss(problem, ball, known, ids, seed) - (one.loss - one.gain)
    least = LEAST_RISE * model.head(known.z).std(1)
    needed = torch.where(many.is_done, torch.inf, WINS_BY * many.gain.clamp_min(0.0) + least)
    shares = {
        "zero_gradient": one.is_flat,
        "no_rise": ~many.is_done & ~(many.gain > 0),
        "one_step_wins": one.gain > needed,
        "noise_wins": noise > needed,
        "huge_accuracy": ~huge.is_done & (huge.residual <= SEARCH.rtol),
    }
    if is_robust is not None:
        shares["missed"] = _missed(problem, many, is_robust)
    return {name: float(share.double().mean()) for name, share in shares.items()}


def _missed(problem: Classification, many: Optimum, is_robust: Tensor) -> Tensor:
    """Rows that the attack has left robust and `many` fools, as the judge confirms."""
    is_missed = is_robust & many.is_done
    rows = is_missed.nonzero()[:, 0]
    if not len(rows):
        return is_missed
    images = (problem.x + many.variable)[rows].clamp_(0.0, 1.0)
    verdict = judge(problem.model, images, problem.objective.labels[rows])
    return is_missed.index_put((rows,), ~verdict.is_correct.to(rows.device))


def _ascend(problem: Classification, ball: Ball, known: Settled, num_steps: int, step: ProjectedAscent) -> Optimum:
    source = Solved(forward=SEARCH, adjoint=Implicit(SEARCH))
    start = torch.zeros_like(problem.x)
    return optimise(problem, source, ball, step, Last(), start, num_steps=num_steps, settled=known, leaves=True)


def _noise_loss(problem: Classification, ball: Ball, known: Settled, ids: Tensor, seed: int) -> Tensor:
    """The highest loss at `NUM_DRAWS` random points on the boundary, `(rows,)`."""
    starts = torch.cat([ball.random_start(seed, ids, draw) for draw in range(NUM_DRAWS)])
    rows = torch.arange(len(problem.x), device=starts.device).repeat(NUM_DRAWS)
    problem, ball = problem.take(rows), ball.take(rows)
    delta = ball.project(ball.radius * ball.direction(starts))
    solution = problem.model.settle(problem.inject(delta), known.z[rows], solve=SEARCH)
    loss = problem.losses(problem.model.head(solution.value), delta, 1.0).compared
    return loss.view(NUM_DRAWS, -1).nan_to_num(nan=-torch.inf).amax(0)

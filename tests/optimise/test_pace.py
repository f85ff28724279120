"""The adaptive pace: between never waiting and the most it may, on slow cells and fast ones."""

from __future__ import annotations

import pytest
import torch

from robustbench_deq.attacks import JointPGD, JointPGDConfig
from robustbench_deq.optimise import AdaptivePace, Classification, Last, Norm, ProjectedAscent, Schedule
from robustbench_deq.optimise.objectives import CrossEntropy
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.sources.joint import augmented
from robustbench_deq.optimise.steps import At
from robustbench_deq.threats import Threat
from tests.optimise.cases import LABELS, run


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(("max_lag", "k"), [(1e300, 1), (1e-300, 3)])
def test_adaptive_pace_lies_between_never_waiting_and_the_most_it_may(
    max_lag: float, k: int, momentum: float, make_model, make_images
) -> None:
    """Either end by hand: the variable moves in the first step, then in every k-th one, and its momentum with it."""
    model, x, objective = make_model("deq-fc"), make_images(4), CrossEntropy(LABELS)
    ball, step = Threat(Norm.L2, 0.3).ball(x), ProjectedAscent(0.4, momentum=momentum)
    pace = AdaptivePace(max_lag, max_inner_steps=3)
    found = run(model, x, objective, ball, step, 24, inner_steps=None, pace=pace, keep=Last())
    problem = Classification(model, x, objective)
    z, delta = model.initial_state(model.inject(x)).detach(), torch.zeros_like(x)
    mu, velocity = torch.zeros_like(z), step.init(delta, ball)
    for count in range(24):
        now = augmented(problem, z, mu, delta)
        z, mu = now.f, now.g
        if count == 0 or (count - 1) % k == 0:  # the adjoint starts at zero, so the first step is none
            at = At(delta, now.gradient, now.loss, now.residual, None, Moment(count, 24), 0, None)
            delta, velocity = step.step(at, ball, velocity)
    assert found.tally["perturbation_steps"].tolist() == [1 + len(range(1, 24, k))] * 4
    torch.testing.assert_close(found.variable, delta)


def test_adaptive_pace_holds_back_slow_cells_and_never_fast_ones(make_model, make_images) -> None:
    x = make_images(4)
    ball, step = Threat(Norm.L2, 0.3).ball(x), ProjectedAscent(0.05, Schedule.CONSTANT)  # off the boundary for long
    moves, final = {}, {}
    for contraction in (0.3, 0.97):  # their states lag 1.4 and 33 steps behind a variable that never waits
        model = make_model("test-linear", contraction=contraction)
        model.a.data = contraction * torch.eye(len(model.a), dtype=model.a.dtype)  # a norm alone does not make it slow
        found = {
            k: run(
                model, x, CrossEntropy(LABELS), ball, step, 40, inner_steps=k, pace=AdaptivePace(1.5), is_settled=True
            )
            for k in (1, None)
        }
        moves[contraction] = found[None].tally["perturbation_steps"].tolist()
        final[contraction] = found
    assert moves[0.3] == [40] * 4
    assert max(moves[0.97]) < 40 and min(moves[0.97]) >= 40 // 20
    assert torch.equal(final[0.3][None].variable, final[0.3][1].variable)


@pytest.mark.parametrize("warmup_tolerance", [0.03, 1e-3, 1e-9])
def test_adaptive_pace_is_not_held_back_by_a_well_settled_start(
    warmup_tolerance: float, make_model, make_images
) -> None:
    """With an adjoint that starts at zero the first step is none: the residual after it says nothing about a step."""
    settings = {"steps": 60, "inner_steps": None, "warmup_steps": 100, "warmup_tolerance": warmup_tolerance}
    model = make_model("test-linear", contraction=0.3)
    for start in ("zero", "loss"):
        config = JointPGDConfig(**settings, adjoint_start=start, stop_at_success=False)
        result = JointPGD(Threat(Norm.L2, 0.3), config)(model, make_images(4), LABELS)
        assert result.diagnostics["perturbation_steps"] >= 50


def test_pace_learns_from_the_residual_right_after_the_first_move() -> None:
    pace, like = AdaptivePace(max_lag=2.0, max_inner_steps=4), torch.zeros(3, 1)
    state = pace.init(3, like)
    ready, state = pace.decide(state, torch.tensor([1.0, 1.0, 1.0]), 1.0)
    assert ready.tolist() == [True] * 3  # nothing has moved yet
    state = pace.note(state, torch.tensor([[0.1], [0.1], [0.0]]))
    assert state.has_moved.tolist() == [True, True, False]
    ready, state = pace.decide(state, torch.tensor([0.3, 0.6, 9.0]), 0.5)
    assert state.per_length.tolist()[:2] == pytest.approx([0.3, 0.6]) and torch.isnan(state.per_length[2])
    assert ready.tolist() == [True, True, True]  # 0.3 <= 2 * 0.3 * 0.5, just; the last has not moved
    waits = []
    for _ in range(4):
        ready, state = pace.decide(state, torch.tensor([0.299, 0.601, 9.0]), 0.5)
        waits.append(ready.tolist())
    # the second waits, though no longer than max_inner_steps
    assert waits == [[True, False, True]] * 3 + [[True, True, True]]

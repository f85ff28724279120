"""Test-time defences: what each computes, and that its gradient is not masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.errors import UsageError
from robustbench_deq.meter import Meter
from robustbench_deq.models.defences import EarlyState, EntropyReduction, StateEnsemble
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat


def states_of(model, x, count: int) -> list[torch.Tensor]:
    u = model.inject(x)
    states = [model.initial_state(u)]
    for _ in range(count):
        states.append(model.cell(states[-1], u))
    return states


@pytest.mark.parametrize("steps", [1, 3])
def test_early_state_reads_the_iterate(steps: int, make_model, make_images) -> None:
    model, x = make_model("deq-conv"), make_images(3)
    with torch.no_grad():
        expected = model.head(states_of(model, x, steps)[steps])
        torch.testing.assert_close(EarlyState(model, steps)(x), expected)


def test_ensemble_reads_out_the_mean_of_its_iterates(make_model, make_images) -> None:
    model, x = make_model("mdeq"), make_images(3)  # its head is not linear
    with torch.no_grad():
        states = states_of(model, x, 4)
        expected = model.head(sum(states[2:5]) / 3)
        torch.testing.assert_close(StateEnsemble(model, 2, 4)(x), expected)


@pytest.mark.parametrize("build", [lambda m: EarlyState(m, 3), lambda m: StateEnsemble(m, 1, 4)])
def test_gradient_passes_through_all_iterates(build, make_model, make_images) -> None:
    model, x = build(make_model("deq-conv")), make_images(2)
    leaf = x.clone().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    slope = (torch.autograd.grad(model(leaf).square().sum(), leaf)[0] * direction).sum()
    step = 1e-5
    with torch.no_grad():
        values = [model(x + sign * step * direction).square().sum() for sign in (1, -1)]
    assert float(slope) == pytest.approx(float((values[0] - values[1]) / (2 * step)), rel=1e-4)


def test_entropy_falls_within_the_radius_and_the_box(make_model, make_images) -> None:
    model, x = make_model("deq-conv"), make_images(4)
    defence = EntropyReduction(model, num_steps=6, step_size=0.02, radius=0.05)
    moved = defence._reduce(x)
    assert float((moved - x).abs().max()) == pytest.approx(0.05)
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1

    def entropy(x: torch.Tensor) -> torch.Tensor:
        log_p = model.head(states_of(model, x, defence.num_states)[-1]).log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)

    with torch.no_grad():
        assert bool((entropy(moved) < entropy(x)).all())
        torch.testing.assert_close(defence(x), model(moved))


def test_gradient_of_entropy_reduction_is_that_at_the_moved_image(make_model, make_images) -> None:
    model, x = make_model("deq-conv"), make_images(2)
    defence = EntropyReduction(model, num_steps=2)
    here, there = x.clone().requires_grad_(), defence._reduce(x).requires_grad_()
    ours = torch.autograd.grad(defence(here).square().sum(), here)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(model(there).square().sum(), there)[0])


def test_entropy_reduction_pays_for_what_it_evaluates(make_model, make_images) -> None:
    defence, x = EntropyReduction(make_model("deq-fc"), num_steps=3, num_states=4), make_images(2)
    with Meter(defence) as meter, torch.no_grad():
        defence.inject(x)
    cost = meter.cost(len(x))
    assert (cost.cell_evals, cost.cell_vjps) == (12, 12)


@pytest.mark.parametrize("family", ["deq-conv", "mondeq-fc"])
def test_entropy_reduction_moves_alike_in_inference_mode(family: str, make_model, make_images) -> None:
    defence, x = EntropyReduction(make_model(family), num_steps=2), make_images(3)
    with torch.no_grad():
        expected = defence(x)
    with torch.inference_mode():
        torch.testing.assert_close(defence(x), expected)


@pytest.mark.parametrize(("attack", "steps"), [("joint-pgd", 10), ("pgd", 5), ("torchattacks-pgdl2", 5)])
@pytest.mark.parametrize(
    "build",
    [lambda m: EarlyState(m, 3), lambda m: StateEnsemble(m, 2, 4), lambda m: EntropyReduction(m, num_steps=2)],
    ids=["early-state", "ensemble", "entropy"],
)
def test_attack_raises_the_loss_of_a_defended_model(build, attack: str, steps: int, make_model, make_images) -> None:
    model, x = build(make_model("deq-conv", pixel_std=0.1)), make_images(4)
    y = model(x).argmax(1).detach()
    attack_type = ATTACKS.get(attack)
    result = attack_type(Threat(Norm.L2, 0.5), attack_type.config_type(steps=steps))(model, x, y)
    with torch.no_grad():
        assert bool((F.cross_entropy(model(result.x_adv), y) > F.cross_entropy(model(x), y)).all())
    assert not bool(result.is_failed.any())


@pytest.mark.parametrize("ends", [(0, 2), (3, 2)])
def test_iterates_out_of_order_are_refused(ends: tuple[int, int], make_model) -> None:
    with pytest.raises(UsageError, match="1 <= first <= last"):
        StateEnsemble(make_model("deq-fc"), *ends)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"radius": 0.0}, {"step_size": float("nan")}])
def test_useless_entropy_reduction_is_refused(settings: dict, make_model) -> None:
    with pytest.raises(UsageError, match="positive num_steps"):
        EntropyReduction(make_model("deq-fc"), **settings)

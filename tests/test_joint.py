"""The augmented iteration: closed forms on the affine model, costs, rules of keeping, and independence of batch
mates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from robustbench_deq.attacks.joint import JointPGD, JointPGDConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.joint import (
    AugmentedMap,
    Evaluation,
    JointResult,
    JointSettings,
    Keep,
    Mixing,
    ProjectedAscent,
    Schedule,
    ascend,
)
from robustbench_deq.meter import Meter
from robustbench_deq.models import Linear, LinearConfig
from robustbench_deq.objectives import CrossEntropy, CrossEntropyThenMargin, Margin, Objective
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.solvers import SOLVERS, Anderson
from robustbench_deq.solvers.base import residual_norms
from robustbench_deq.threats import Threat

LABELS = torch.tensor([0, 1, 2, 0])


def exact(model: Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Equilibrium `(I - A)^-1 u` and adjoint `(I - A^T)^-1 dL/dz*` of the cross-entropy."""
    with torch.no_grad():
        matrix = torch.eye(len(model.a), dtype=x.dtype) - model.a
        z = torch.linalg.solve(matrix, model.inject(x).mT).mT
        wrong = model.head(z).softmax(1) - F.one_hot(y, model.num_classes)
        return z, torch.linalg.solve(matrix.mT, (wrong @ model.readout.weight).mT).mT


def run(
    model: EquilibriumModel,
    x: Tensor,
    objective: Objective,
    ascent: ProjectedAscent,
    settings: JointSettings,
    is_settled: bool = False,
    **options: object,
) -> JointResult:
    """`ascend` from the initial state (or the equilibrium), a zero adjoint and the clean images."""
    with torch.no_grad():
        z = model.equilibrium(x).value if is_settled else model.initial_state(model.inject(x))
    augmented = AugmentedMap(model, lambda delta: model.inject(x + delta), objective)
    return ascend(augmented, ascent, settings, z, torch.zeros_like(z), torch.zeros_like(x), **options)


# ---------------------------------------------------------------- the map


def test_one_look_gives_all_three_right_hand_sides(make_model, make_images) -> None:
    model, x, delta = make_model("test-linear"), make_images(4), 0.1 * make_images(4, seed=2)
    z, mu = torch.randn(2, 4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    augmented = AugmentedMap(model, lambda d: model.inject(x + d), CrossEntropy(LABELS))
    found = augmented.evaluate(z, mu, delta)
    with torch.no_grad():
        wrong = model.head(z).softmax(1) - F.one_hot(LABELS, 3)
        torch.testing.assert_close(found.f, z @ model.a.mT + model.inject(x + delta))
        torch.testing.assert_close(found.g, mu @ model.a + wrong @ model.readout.weight)
        torch.testing.assert_close(found.gradient, (mu @ model.injection.weight).view_as(x))
        torch.testing.assert_close(found.loss, -model.head(z).log_softmax(1)[torch.arange(4), LABELS])
    assert not any(part.requires_grad for part in found)


def test_staged_objective_ascends_one_loss_after_the_other_and_compares_by_the_last(make_model, make_images) -> None:
    model, x, delta = make_model("test-linear"), make_images(4), 0.1 * make_images(4, seed=2)
    z, mu = torch.randn(2, 4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def look(objective: Objective, progress: float) -> Evaluation:
        return AugmentedMap(model, lambda d: model.inject(x + d), objective).evaluate(z, mu, delta, progress)

    log_loss, margin = look(CrossEntropy(LABELS), 0.0), look(Margin(LABELS), 0.0)
    for progress, ascended in ((0.0, log_loss), (0.49, log_loss), (0.5, margin), (0.9, margin)):
        found = look(CrossEntropyThenMargin(LABELS), progress)
        torch.testing.assert_close(found.g, ascended.g)
        torch.testing.assert_close(found.loss, margin.loss)
    assert not torch.allclose(log_loss.g, margin.g)


def test_gradient_of_the_loss_by_the_state_costs_no_evaluation(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    z = torch.randn(4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    augmented = AugmentedMap(model, lambda d: model.inject(x + d), CrossEntropy(LABELS))
    with Meter(model) as meter:
        found = augmented.loss_gradient(z)
    with torch.no_grad():
        wrong = model.head(z).softmax(1) - F.one_hot(LABELS, 3)
        torch.testing.assert_close(found, wrong @ model.readout.weight)
    assert (meter.eval_rows, meter.vjp_rows) == (0, 0)


@pytest.mark.parametrize(("start", "moves"), [("loss", True), ("zero", False)])
def test_only_an_adjoint_that_starts_at_the_loss_moves_in_the_first_step(
    start: str, moves: bool, make_model, make_images
) -> None:
    model, x = make_model("test-linear"), make_images(4)
    config = JointPGDConfig(steps=1, keep="last", adjoint_start=start)
    delta = JointPGD(Threat(Norm.L2, 0.1), config)(model, x, LABELS).delta
    assert bool((norm_of(delta, Norm.L2) > 1e-3).all()) is moves and bool((delta != 0).any()) is moves


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_inner_look_is_the_same_without_the_gradient_by_the_variable(family: str, make_model, make_images) -> None:
    model, x = make_model(family), make_images(4)
    with torch.no_grad():
        u = model.inject(x)
        z = model.cell(model.initial_state(u), u)
    mu = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(3))
    augmented = AugmentedMap(model, lambda d: model.inject(x + d), CrossEntropy(LABELS))
    whole, inner = augmented.evaluate(z, mu, torch.zeros_like(x)), augmented.evaluate_state(z, mu, u)
    assert inner.gradient is None
    for name in ("f", "g", "loss"):
        torch.testing.assert_close(getattr(inner, name), getattr(whole, name))


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_one_variable_may_serve_many_rows(family: str, make_model, make_images) -> None:
    model, x, task = make_model(family), make_images(4), torch.tensor([0, 1, 1, 0])
    variable = 0.05 * make_images(2, seed=7)
    objective = CrossEntropy(LABELS)
    augmented = AugmentedMap(model, lambda d: model.inject(x + d[task]), objective)
    leaf = variable.clone().requires_grad_()
    expected = torch.autograd.grad(objective(model(x + leaf[task])).sum(), leaf)[0]
    with torch.no_grad():
        z = model.equilibrium(x + variable[task]).value
    mu = torch.zeros_like(z)
    for _ in range(400):
        now = augmented.evaluate(z, mu, variable)
        z, mu = now.f, now.g
    assert now.gradient.shape == variable.shape
    assert float(expected.flatten(1).norm(dim=1).min()) > 1e-4
    torch.testing.assert_close(now.gradient, expected, rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------- the iteration

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
every_driver = pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)


@every_driver
def test_state_and_adjoint_reach_their_closed_forms(driver: dict, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    ascent = ProjectedAscent(Threat(Norm.L2, 0.0), x, 0.5)
    found = run(model, x, CrossEntropy(LABELS), ascent, JointSettings(num_steps=200, **driver))
    z, mu = exact(model, x, LABELS)
    torch.testing.assert_close(found.z, z, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.mu, mu, rtol=0, atol=1e-7)
    assert float(found.residual.max()) < 1e-7
    assert torch.equal(found.variable, torch.zeros_like(x))


@every_driver
@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_every_driver_reaches_the_known_optimum(driver: dict, norm: Norm, make_model, make_images) -> None:
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    y = torch.tensor([0, 1, 1, 0])
    matrix = model.input_matrix().detach()
    gradient = (matrix[1 - y] - matrix[y]).view_as(x)
    optimum = 0.2 * (gradient / norm_of(gradient, Norm.L2)[:, None, None, None] if norm is Norm.L2 else gradient.sign())
    ascent = ProjectedAscent(Threat(norm, 0.2), x, 0.5)

    def margin(delta: Tensor) -> Tensor:
        return Margin(y)(model.head(exact(model, x + delta, y)[0])).detach()

    found = run(model, x, Margin(y), ascent, JointSettings(num_steps=300, keep=Keep.LAST, **driver))
    torch.testing.assert_close(found.variable, optimum, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.loss, margin(optimum), rtol=1e-3, atol=1e-4)
    assert bool((found.num_moves > 10).all())
    # The highest loss may have been seen a little earlier, through a state that had not settled.
    kept = run(model, x, Margin(y), ascent, JointSettings(num_steps=300, keep=Keep.LOSS, **driver))
    gain = (margin(kept.variable) - margin(torch.zeros_like(x))) / (margin(optimum) - margin(torch.zeros_like(x)))
    assert bool((gain > 0.99).all()), gain


@pytest.mark.parametrize("driver", [{}, {"inner_steps": 3}, {"inner_steps": None}, {"accelerator": Anderson()}])
def test_a_step_costs_one_evaluation_and_one_product(driver: dict, make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    ascent = ProjectedAscent(Threat(Norm.L2, 0.3), x, 0.5)
    model.requires_grad_(False)
    with Meter(model) as meter:
        run(model, x, CrossEntropy(LABELS), ascent, JointSettings(num_steps=12, **driver))
    assert meter.vjp_rows == 12 * 4
    assert meter.eval_rows == (12 + 1) * 4  # the last variable is looked at once, without a product


@pytest.mark.parametrize(("inner_steps", "injections"), [(1, 12 + 1), (3, 2 * 4 + 1), (6, 2 * 2 + 1)])
def test_injection_is_computed_when_the_variable_has_moved(
    inner_steps: int, injections: int, make_model, make_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice a move where there are inner steps: for them, and with a graph for the next move. Once at the end."""
    model, x = make_model("deq-fc"), make_images(4)
    inject, calls = model.inject, []
    augmented = AugmentedMap(model, lambda d: calls.append(1) or inject(x + d), CrossEntropy(LABELS))
    with torch.no_grad():
        z = model.initial_state(inject(x))
    ascent = ProjectedAscent(Threat(Norm.L2, 0.3), x, 0.5)
    settings = JointSettings(num_steps=12, inner_steps=inner_steps)
    found = ascend(augmented, ascent, settings, z, torch.zeros_like(z), torch.zeros_like(x))
    assert len(calls) == injections
    assert found.num_moves.tolist() == [12 // inner_steps] * 4


def test_inner_steps_see_the_variable_that_has_just_moved(make_model, make_images) -> None:
    """k inner steps by hand: a stale cached injection would show."""
    model, x, k = make_model("deq-fc"), make_images(4), 3
    objective, ascent = CrossEntropy(LABELS), ProjectedAscent(Threat(Norm.L2, 0.3), x, 0.5)
    found = run(model, x, objective, ascent, JointSettings(num_steps=12, inner_steps=k, keep=Keep.LAST))
    augmented = AugmentedMap(model, lambda d: model.inject(x + d), objective)
    z, delta = model.initial_state(model.inject(x)).detach(), torch.zeros_like(x)
    mu = torch.zeros_like(z)
    for step in range(12):
        now = augmented.evaluate(z, mu, delta)
        z, mu = now.f, now.g
        if (step + 1) % k == 0:
            delta, _ = ascent.step(delta, now.gradient, None, step / 12)
    torch.testing.assert_close(found.variable, delta)
    torch.testing.assert_close(found.mu, mu)
    torch.testing.assert_close(found.z, model.cell(z, model.inject(x + delta)).detach())


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(("max_lag", "k"), [(1e300, 1), (1e-300, 3)])
def test_adaptive_pace_lies_between_never_waiting_and_the_most_it_may(
    max_lag: float, k: int, momentum: float, make_model, make_images
) -> None:
    """Either end by hand: the variable moves in the first step, then in every k-th one, and its momentum with it."""
    model, x, objective = make_model("deq-fc"), make_images(4), CrossEntropy(LABELS)
    ascent = ProjectedAscent(Threat(Norm.L2, 0.3), x, 0.4, momentum=momentum)
    settings = JointSettings(num_steps=24, inner_steps=None, max_lag=max_lag, max_inner_steps=3, keep=Keep.LAST)
    found = run(model, x, objective, ascent, settings)
    augmented = AugmentedMap(model, lambda d: model.inject(x + d), objective)
    z, delta = model.initial_state(model.inject(x)).detach(), torch.zeros_like(x)
    mu, velocity = torch.zeros_like(z), ascent.init(delta)
    for step in range(24):
        now = augmented.evaluate(z, mu, delta)
        z, mu = now.f, now.g
        if step == 0 or (step - 1) % k == 0:  # the adjoint starts at zero, so the first step is none
            delta, velocity = ascent.step(delta, now.gradient, velocity, step / 24)
    assert found.num_moves.tolist() == [1 + len(range(1, 24, k))] * 4
    torch.testing.assert_close(found.variable, delta)


def test_adaptive_pace_holds_back_slow_cells_and_never_fast_ones(make_model, make_images) -> None:
    x = make_images(4)
    ascent = ProjectedAscent(Threat(Norm.L2, 0.3), x, 0.05, Schedule.CONSTANT)  # stays off the boundary for long
    moves, final = {}, {}
    for contraction in (0.3, 0.97):  # their states lag 1.4 and 33 steps behind a variable that never waits
        model = make_model("test-linear", contraction=contraction)
        model.a.data = contraction * torch.eye(len(model.a), dtype=model.a.dtype)  # a norm alone does not make it slow
        found = {
            k: run(
                model,
                x,
                CrossEntropy(LABELS),
                ascent,
                JointSettings(40, inner_steps=k, max_lag=1.5),
                is_settled=True,
            )
            for k in (1, None)
        }
        moves[contraction] = found[None].num_moves.tolist()
        final[contraction] = found
    assert moves[0.3] == [40] * 4
    assert max(moves[0.97]) < 40 and min(moves[0.97]) >= 40 // 20
    assert torch.equal(final[0.3][None].variable, final[0.3][1].variable)


@pytest.mark.parametrize("warmup_tolerance", [0.03, 1e-3, 1e-9])
def test_adaptive_pace_is_not_held_back_by_a_well_settled_start(
    warmup_tolerance: float, make_model, make_images
) -> None:
    """The adjoint starts at zero, so the first step is none: the residual after it says nothing about a step."""
    config = JointPGDConfig(steps=60, inner_steps=None, warmup_steps=100, warmup_tolerance=warmup_tolerance)
    model = make_model("test-linear", contraction=0.3)
    result = JointPGD(Threat(Norm.L2, 0.3), config)(model, make_images(4), LABELS)
    assert result.diagnostics["perturbation_steps"] >= 50


# ---------------------------------------------------------------- steps of the variable


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_ascent_step_follows_its_equation(norm: Norm, make_images) -> None:
    x, delta, gradient = (make_images(3, seed=seed) for seed in (1, 2, 3))
    threat = Threat(norm, 0.4)
    delta, gradient = threat.project(0.1 * (delta - 0.5), x), gradient - 0.5
    ascent = ProjectedAscent(threat, x, 0.5, Schedule.DROP, momentum=0.9)
    velocity = gradient.roll(1, 0)
    moved, new_velocity = ascent.step(delta, gradient, velocity, 0.7)
    torch.testing.assert_close(new_velocity, 0.9 * velocity + threat.direction(gradient))
    expected = threat.project(delta + 0.4 * 0.5 / 3 * threat.direction(new_velocity), x)
    torch.testing.assert_close(moved, expected)


def test_schedules_begin_at_one_and_do_not_rise() -> None:
    points = [index / 40 for index in range(40)]
    for schedule in Schedule:
        factors = [schedule.factor(point) for point in points]
        assert factors[0] == 1.0 and factors == sorted(factors, reverse=True) and factors[-1] > 0
    assert Schedule.DROP.factor(0.624) == 1.0 and Schedule.DROP.factor(0.625) == pytest.approx(1 / 3)
    assert Schedule.COSINE.factor(0.5) == pytest.approx(0.5)
    assert Schedule.CONSTANT.factor(0.99) == 1.0


# ---------------------------------------------------------------- what is kept


class Recording(AugmentedMap):
    """Remembers every look: `(z, mu, variable, evaluation)`."""

    def evaluate(self, z: Tensor, mu: Tensor, variable: Tensor, progress: float = 0.0) -> Evaluation:
        found = super().evaluate(z, mu, variable, progress)
        self.objective.looks.append((z, mu, variable, found))
        return found


class Logged(CrossEntropy):
    def __init__(self, labels: Tensor) -> None:
        super().__init__(labels)
        self.looks: list[tuple[Tensor, Tensor, Tensor, Evaluation]] = []


def kept_by_hand(rule: Keep, limit: float, offers: list[tuple[Tensor, Tensor, Tensor, Tensor]], row: int) -> int:
    """Which of the offers `(variable, loss, residual, residual of mu)` the rule returns for a row, one by one."""
    best, best_loss, best_joint = -1, -torch.inf, torch.inf
    for index, (_, loss, residual, residual_mu) in enumerate(offers):
        loss, residual, joint = float(loss[row]), float(residual[row]), float(residual[row] + residual_mu[row])
        if rule is Keep.LAST:
            best = index
        elif rule is Keep.JIIO:
            if index < 10 or joint < best_joint or (loss > best_loss and joint < 1.3 * best_joint):
                best, best_loss, best_joint = index, loss, joint
        elif residual <= limit and loss > best_loss:
            best, best_loss = index, loss
        elif best_loss == -torch.inf:
            best = index
    return best


@pytest.mark.parametrize("limit", [0.1, 0.05, -1.0])
@pytest.mark.parametrize("rule", Keep)
def test_kept_iterate_is_the_one_of_the_rule(rule: Keep, limit: float, make_model, make_images) -> None:
    model, x = make_model("deq-fc", hidden=8), make_images(6)
    objective = Logged(torch.tensor([0, 1, 2, 0, 1, 2]))
    ascent = ProjectedAscent(Threat(Norm.LINF, 0.4), x, 1.5, Schedule.CONSTANT)  # long steps that oscillate
    augmented = Recording(model, lambda d: model.inject(x + d), objective)
    with torch.no_grad():
        z = model.initial_state(model.inject(x))
    settings = JointSettings(num_steps=25, keep=rule, keep_residual=limit, last_residual=limit)
    found = ascend(augmented, ascent, settings, z, torch.zeros_like(z), torch.zeros_like(x))

    offers = [
        (variable, now.loss, residual_norms(z, now.f)[1], residual_norms(mu, now.g)[1])
        for z, mu, variable, now in objective.looks
    ]
    _, _, variable, now = objective.looks[-1]
    if rule is not Keep.JIIO:  # which has no joint residual for the variable after the last step
        last, _ = ascent.step(variable, now.gradient, None, 24 / 25)
        with torch.no_grad():
            f = model.cell(now.f, model.inject(x + last))
            offers.append((last, objective(model.head(f)), residual_norms(now.f, f)[1], torch.zeros(6)))
    chosen = [kept_by_hand(rule, limit, offers, row) for row in range(6)]
    expected = torch.stack([offers[index][0][row] for row, index in enumerate(chosen)])
    torch.testing.assert_close(found.variable, expected)
    if rule is Keep.LOSS and limit == 0.05:  # the case tells the rules apart
        assert len(set(chosen)) > 1 and min(chosen) < 25
    if rule is Keep.LOSS and limit < 0:  # nothing can be trusted: the last one, and no loss
        assert set(chosen) == {25} and bool(torch.isneginf(found.loss).all())


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_mixed_variables_are_back_in_ball_and_box_before_they_are_used(norm: Norm, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4).round()  # half of the pixels on the limits
    threat, seen = Threat(norm, 0.3), []
    settings = JointSettings(num_steps=12, accelerator=Anderson(), mixing=Mixing.ALL, keep=Keep.LAST)
    objective, ascent = CrossEntropy(LABELS), ProjectedAscent(threat, x, 0.8)
    run(model, x, objective, ascent, settings, watch=lambda step, delta, loss, residual: seen.append(delta))
    assert len(seen) == 13
    for delta in seen:
        assert float(norm_of(delta, norm).max()) <= 0.3 * (1 + 1e-9)
        assert float((x + delta).min()) >= 0.0 and float((x + delta).max()) <= 1.0


def test_watcher_sees_every_step_and_a_kept_loss_that_never_falls(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    ascent = ProjectedAscent(Threat(Norm.L2, 0.4), x, 0.8)
    seen = []
    found = run(
        model,
        x,
        CrossEntropy(LABELS),
        ascent,
        JointSettings(num_steps=20),
        watch=lambda step, delta, loss, residual: seen.append((step, delta, loss, residual)),
    )
    assert [step for step, *_ in seen] == list(range(21))
    losses = torch.stack([loss for _, _, loss, _ in seen])
    assert bool((losses[1:] >= losses[:-1]).all()) and bool((losses[-1] > losses[5]).all())
    assert torch.equal(losses[-1], found.loss) and torch.equal(seen[-1][1], found.variable)
    for _, delta, _, residual in seen:
        assert delta.shape == x.shape and residual.shape == (4,)


# ---------------------------------------------------------------- batch mates


@every_driver
@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "deq-conv"])
def test_batch_mates_do_not_matter(family: str, driver: dict, make_model, make_images) -> None:
    model, x, y = make_model(family), make_images(6), torch.arange(6) % 3
    threat, settings = Threat(Norm.L2, 0.4), JointSettings(num_steps=25, **driver)
    whole = run(model, x, CrossEntropy(y), ProjectedAscent(threat, x, 0.6), settings)
    for index in (torch.tensor([4]), torch.tensor([5, 0, 2])):
        part = run(model, x[index], CrossEntropy(y[index]), ProjectedAscent(threat, x[index], 0.6), settings)
        for mine, other in zip(part, whole, strict=True):
            torch.testing.assert_close(mine, other[index], rtol=1e-6, atol=1e-7)


class Switched(Linear):
    """`f(z, u) = c z + u` with c = 0.4, but `factor` for images whose first pixel is above one half."""

    factor = -4.0

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([torch.where(x.flatten(1)[:, :1] > 0.5, self.factor, 0.4), super().inject(x)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u[:, :1] * z + u[:, 1:]

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


@pytest.fixture
def switched(make_images) -> Callable[[float], tuple[Switched, Tensor, Tensor, Tensor]]:
    """`switched(factor)`: model, images, labels, and which images are on the other side of the switch."""

    def make(factor: float) -> tuple[Switched, Tensor, Tensor, Tensor]:
        model = Switched(LinearConfig(input_shape=(1, 4, 4), num_classes=2, hidden=5)).double().eval()
        model.factor = factor
        x = 0.4 + 0.2 * make_images(6)
        is_hard = torch.tensor([False, True, False, True, True, False])
        x[:, 0, 0, 0] = is_hard.double()
        return model, x, torch.tensor([0, 1, 0, 1, 0, 1]), is_hard

    return make


def optimum_of(model: Switched, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The strongest L2 perturbation of the margin, for a first pixel on the limit of the box."""
    factor = torch.where(x[:, 0, 0, 0] > 0.5, model.factor, 0.4)[:, None]
    matrix = (model.readout.weight @ model.injection.weight).detach()
    gradient = ((matrix[1 - y] - matrix[y]) / (1 - factor)).view_as(x)
    points_out = (gradient[:, 0, 0, 0] > 0) == (x[:, 0, 0, 0] > 0.5)
    gradient[:, 0, 0, 0] = torch.where(points_out, 0.0, gradient[:, 0, 0, 0])
    return threat.epsilon * threat.direction(gradient)


@pytest.mark.parametrize(
    ("factor", "steps", "rungs"),
    [
        (-1.3, 80, {"num_damped": 3, "num_accelerated": 0, "num_full_solve": 0}),
        (-4.0, 80, {"num_damped": 3, "num_accelerated": 3, "num_full_solve": 0}),
        (-4.0, 3, {"num_damped": 3, "num_accelerated": 3, "num_full_solve": 3}),
    ],
)
def test_states_that_run_away_fall_back_and_are_judged_all_the_same(
    factor: float, steps: int, rungs: dict, switched
) -> None:
    model, x, y, is_hard = switched(factor)
    threat, config = Threat(Norm.L2, 0.2), JointPGDConfig(steps=steps, step_size=1.0, objective="margin")
    result = JointPGD(threat, config)(model, x, y)
    assert {key: result.diagnostics[key] for key in rungs} == rungs
    assert not bool(result.is_failed.any())
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    assert bool(clean.is_converged.all()) and bool(verdict.is_converged.all())
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain > 0.97).all()), gain
    # The others are what they are alone.
    alone = JointPGD(threat, config)(model, x[~is_hard], y[~is_hard])
    assert alone.diagnostics["num_damped"] == 0
    torch.testing.assert_close(result.x_adv[~is_hard], alone.x_adv, rtol=0, atol=1e-9)


def test_contractive_models_never_fall_back(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    result = JointPGD(Threat(Norm.L2, 0.3))(model, x, LABELS)
    counts = {key: value for key, value in result.diagnostics.items() if key.startswith("num_")}
    assert counts == {"num_damped": 0, "num_accelerated": 0, "num_full_solve": 0}
    assert result.diagnostics["perturbation_steps"] > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"inner_steps": 3}, {"inner_steps": None}, {"inner_steps": None, "accelerator": "anderson"}],
    ids=str,
)
def test_a_state_of_nans_does_not_disturb_the_others(settings: dict, switched) -> None:
    model, x, y, is_lost = switched(torch.nan)
    attack = JointPGD(Threat(Norm.L2, 0.2), JointPGDConfig(steps=20, **settings))
    result, alone = attack(model, x, y), attack(model, x[~is_lost], y[~is_lost])
    torch.testing.assert_close(result.x_adv[~is_lost], alone.x_adv, rtol=0, atol=1e-9)
    assert bool(torch.isfinite(result.x_adv).all())
    verdict = judge(model, result.x_adv, y)
    assert verdict.is_converged.tolist() == (~is_lost).tolist()
    assert not bool(verdict.is_correct[is_lost].any())


def test_published_preset_runs_and_yields_to_other_keys(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    config = JointPGDConfig(preset="jiio-2021", steps=40)
    assert config.settings().num_steps == 40 and config.keep is Keep.JIIO and config.schedule is Schedule.DROP
    assert config.settings().accelerator.history_size == 20
    result = JointPGD(Threat(Norm.L2, 0.5), config)(model, x, LABELS)
    clean, verdict = judge(model, x, LABELS), judge(model, result.x_adv, LABELS)
    assert bool((verdict.loss > clean.loss).all())


# ---------------------------------------------------------------- settings that would do nothing, or fail late


@pytest.mark.parametrize("mixing", ["state", "all"])
@pytest.mark.parametrize("inner_steps", [2, None])
@pytest.mark.parametrize("accelerator", [name for name in SOLVERS if not SOLVERS.get(name)().needs_jvp])
def test_every_solver_without_jvps_accelerates(
    accelerator: str, inner_steps: int | None, mixing: str, make_model, make_images
) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    config = JointPGDConfig(accelerator=accelerator, inner_steps=inner_steps, mixing=mixing, steps=40)
    result = JointPGD(Threat(Norm.L2, 0.3), config)(model, x, LABELS)
    plain = JointPGD(Threat(Norm.L2, 0.3), JointPGDConfig(steps=40))(model, x, LABELS)
    assert not bool(result.is_failed.any())
    losses = [judge(model, found.x_adv, LABELS).loss for found in (result, plain)]
    clean = judge(model, x, LABELS).loss
    assert bool((losses[0] > clean).all())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.2, atol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 4, "inner_steps": 5}, r"inner_steps of at most steps \(4\): the perturbation never moves"),
        ({"accelerator": "anderson"}, "inner_steps above 1 or null, or mixing=all, with an accelerator"),
        ({"max_lag": 2.0}, "no max_lag with inner_steps, which is fixed, which does not use it"),
        ({"max_inner_steps": 3}, "no max_inner_steps with inner_steps"),
        ({"history_size": 3}, "no history_size with accelerator=None"),
        ({"history_size": 3, "accelerator": "picard", "inner_steps": 2}, "no history_size with accelerator=picard"),
        ({"mixing": "all"}, "no mixing with accelerator, which is null"),
        ({"keep": "last", "keep_residual": 0.1}, "no keep_residual with keep=last"),
        ({"warmup_steps": 0, "warmup_tolerance": 0.1}, "no warmup_tolerance with warmup_steps=0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JointPGDConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "jiio-2021"},
        {"preset": "jiio-2021", "accelerator": None},
        {"inner_steps": None, "max_lag": 2.0},
    ],
)
def test_resolved_settings_are_accepted_again(values: dict) -> None:
    config = JointPGDConfig(**values)
    assert JointPGDConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("keep", ["last", "jiio", "loss"])
def test_a_lost_state_has_no_say_in_what_the_ladder_returns(keep: str, switched) -> None:
    """Far from its equilibrium a state can show any loss; the rung that finds the equilibrium must win."""
    model, x, y, is_hard = switched(-4.0)
    threat = Threat(Norm.L2, 0.2)
    config = JointPGDConfig(steps=80, step_size=1.0, objective="margin", keep=keep)
    result = JointPGD(threat, config)(model, x, y)
    assert result.diagnostics["num_accelerated"] == 3
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain[is_hard] > 0.9).all()), gain
    torch.testing.assert_close(result.loss[is_hard], margin_of(model, result.x_adv, y)[is_hard], rtol=0.05, atol=0.05)


def margin_of(model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return Margin(y)(model(x))

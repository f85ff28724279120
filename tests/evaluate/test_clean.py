"""What is known of clean images: the judge's own verdict, the error a unit of residual, adjoints; each solved once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate import clean as clean_module
from robustbench_deq.evaluate import judge as judge_module
from robustbench_deq.evaluate.clean import judge_clean, solve_adjoint
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.meter import Meter
from robustbench_deq.models import FAMILIES, Linear, LinearConfig
from robustbench_deq.optimise import Norm
from robustbench_deq.optimise.objectives import CrossEntropy, Margin, Targeted
from robustbench_deq.protocol import Attack
from robustbench_deq.threats import Threat

NUM = 12
THREAT = Threat(Norm.L2, 0.4)
ATTACKS = ["joint-pgd", "joint-apgd", "joint-fmn", "pgd", "apgd", "noise", "torchattacks-pgdl2"]


class Damped(Linear):
    """`z + weight (f(z, u) - z)`: the equilibrium of `f`, at residuals that are smaller by `weight`."""

    weight = 0.125

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.lerp(z, super().cell(z, u), self.weight)


class Escaping(Linear):
    """Images whose first pixel is at least 0.9 have no equilibrium: their state moves on by one with every
    evaluation."""

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([(x.flatten(1)[:, :1] >= 0.9).to(x), super().inject(x)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] == 1, z + 1, super().cell(z, u[:, 1:]))

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


@pytest.fixture
def build(make_images):
    """`build(kind)`: a model of that kind, its images, and labels of which every fourth is wrong."""

    def make(kind: type[Linear] = Linear) -> tuple[Linear, Tensor, Tensor]:
        model, x = kind(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).double().eval(), make_images(NUM)
        y = judge(model, x, torch.zeros(NUM, dtype=torch.int64)).prediction
        y[::4] = (y[::4] + 1) % 3
        return model, x, y

    return make


def split_of(x: Tensor, y: Tensor) -> Split:
    return Split("mine", SplitName.TEST, x, y, 100 + torch.arange(len(x)), "ab12")


def attack_of(name: str, **settings: Any) -> Attack:
    return build_attack(name, THREAT, settings)


# ---------------------------------------------------------------- what is known


@pytest.mark.parametrize("family", list(FAMILIES))
def test_verdict_is_the_judges(family: str, make_model, make_images) -> None:
    model, x, y = make_model(family), make_images(6), torch.arange(6) % 3
    expected, found = judge(model, x, y), judge_clean(model, x, y).verdict
    for mine, its in zip(found.parts(), expected.parts(), strict=True):
        assert torch.equal(mine, its)


def exact(model: Linear, x: Tensor) -> Tensor:
    eye = torch.eye(len(model.a), dtype=x.dtype)
    return torch.linalg.solve(eye - model.a, Linear.inject(model, x).mT).mT.detach()


def test_state_and_amplification_have_their_closed_form(build) -> None:
    """From zero, `f(z0) - z0 = u`."""
    model, x, y = build()
    found, z = judge_clean(model, x, y), exact(model, x)
    torch.testing.assert_close(found.z, z, rtol=1e-4, atol=1e-5)
    expected = (z.norm(dim=1) / model.inject(x).norm(dim=1)).detach()
    assert float(expected.min()) > 1.1
    torch.testing.assert_close(found.amplification, expected, rtol=1e-3, atol=0)


def test_no_amplification_is_below_one(build) -> None:
    """`z* = u / 1.5` is nearer than the first step goes."""
    model, x, y = build()
    with torch.no_grad():
        model.a.copy_(-0.5 * torch.eye(5))
    assert judge_clean(model, x, y).amplification.tolist() == [1.0] * NUM


def test_a_damped_cell_has_the_same_equilibrium_at_a_larger_amplification(build) -> None:
    (plain, x, y), (damped, _, _) = build(), build(Damped)
    one, other = judge_clean(plain, x, y), judge_clean(damped, x, y)
    torch.testing.assert_close(other.z, one.z, rtol=1e-3, atol=1e-4)
    expected = exact(plain, x).norm(dim=1) / (damped.weight * plain.inject(x).norm(dim=1))
    torch.testing.assert_close(other.amplification, expected.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [CrossEntropy, Margin, lambda y: Targeted(CrossEntropy((y + 1) % 3))])
def test_adjoint_has_its_closed_form(make, build) -> None:
    """`mu = (I - A^T)^-1 V^T dL/dlogits`."""
    model, x, y = build()
    objective, z = make(y), exact(model, x)
    logits = (z @ model.readout.weight.mT).detach().requires_grad_()
    (by_logits,) = torch.autograd.grad(objective(logits).sum(), logits)
    v = by_logits @ model.readout.weight.detach()
    expected = torch.linalg.solve(torch.eye(5, dtype=x.dtype) - model.a.mT, v.mT).mT.detach()
    found = solve_adjoint(model, x, judge_clean(model, x, y).z, objective)
    assert not found.requires_grad and float((found - v).norm()) > 0.1 * float(v.norm())
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * float(expected.norm(dim=1).max()))


def test_adjoint_that_no_solve_finds_is_the_losss_own_gradient(build) -> None:
    model, x, y = build(Escaping)
    x, y = x[:2], y[:2]
    x[:, 0, 0, 0] = 0.95
    z = judge_clean(model, x, y).z
    found = solve_adjoint(model, x, z, CrossEntropy(y))
    leaf = z.clone().requires_grad_()
    (v,) = torch.autograd.grad(CrossEntropy(y)(model.head(leaf)).sum(), leaf)
    torch.testing.assert_close(found, v)


def test_adjoints_are_solved_once_a_loss(build) -> None:
    model, x, y = build()
    clean = judge_clean(model, x, y)

    def spent(objective: Any) -> int:
        with Meter(model) as meter:
            known = clean.known(model, x, objective)
        assert torch.equal(known.settled.z, clean.z) and torch.equal(known.is_correct, clean.verdict.is_correct)
        assert (known.settled.mu is None) == (objective is None)
        return meter.vjp_rows

    assert spent(None) == 0 and clean.adjoints == {}
    assert spent(CrossEntropy(y)) >= NUM and spent(CrossEntropy(y)) == 0
    assert spent(Margin(y)) >= NUM and spent(Targeted(Margin((y + 1) % 3))) >= NUM and spent(Margin(y)) == 0
    assert len(clean.adjoints) == 3
    different = clean.known(model, x, Margin(y)).settled.mu
    assert different is not None and not torch.equal(different, clean.adjoints["CrossEntropy"])


# ---------------------------------------------------------------- each image once


class Solves:
    """Counts the rows of the judge's cold solves, and keeps the injections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Tensor] = []
        tight_solve = judge_module.tight_solve

        def watched(model: EquilibriumModel, u: Tensor) -> Any:
            self.calls.append(u.detach().clone())
            return tight_solve(model, u)

        monkeypatch.setattr(judge_module, "tight_solve", watched)
        monkeypatch.setattr(clean_module, "tight_solve", watched)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.calls)

    def counts(self, u: Tensor) -> list[int]:
        """How often each of the injections `u` was solved; what rounding makes of them depends on the batch."""
        return [int(((self.rows - row).abs().amax(1) < 1e-12).sum()) for row in u]


@pytest.mark.parametrize("settings", [{}, {"stop_at_success": False}], ids=["leave", "stay"])
@pytest.mark.parametrize("num_snapshots", [0, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_image_is_solved_once(name: str, num_snapshots: int, settings: dict, build, monkeypatch) -> None:
    model, x, y = build()
    solves = Solves(monkeypatch)
    found = evaluate(model, attack_of(name, **settings), split_of(x, y), batch_size=5, num_snapshots=num_snapshots)
    with torch.no_grad():
        clean, adversarial = model.inject(x), model.inject(found.x_adv)
    assert set(solves.counts(solves.rows)) == set(solves.counts(clean)) == set(solves.counts(adversarial)) == {1}
    moved = int((found.x_adv != x).flatten(1).any(1).sum())
    if not num_snapshots:
        assert len(solves.rows) == NUM + moved
    else:
        assert len(solves.rows) <= NUM + moved * num_snapshots


def test_points_of_a_curve_are_judged_where_they_matter(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a sample is lost at its clean image, whatever the attack does there."""
    model, x, y = build()
    solves = Solves(monkeypatch)
    evaluate(model, attack_of("pgd", stop_at_success=False, steps=8), split_of(x, y), num_snapshots=4)
    num_lost = int((~judge_clean(model, x, y).verdict.is_correct).sum())
    assert num_lost == 3
    assert len(solves.rows) - NUM <= NUM + NUM + 3 * (NUM - num_lost)


@pytest.mark.parametrize("name", ["joint-pgd", "pgd", "joint-fmn"])
@pytest.mark.parametrize("settings", [{}, {"stop_at_success": False}], ids=["leave", "stay"])
def test_looking_at_a_curve_changes_no_row(name: str, settings: dict, build) -> None:
    model, x, y = build()
    attack = attack_of(name, **settings)
    plain, seen = (evaluate(model, attack, split_of(x, y), num_snapshots=count) for count in (0, 3))
    assert torch.equal(plain.x_adv, seen.x_adv)
    expected = judge(model, plain.x_adv, y)
    for found in (plain, seen):
        rows = found.samples
        assert rows["adversarial_prediction"].tolist() == expected.prediction.tolist()
        torch.testing.assert_close(torch.tensor(rows["adversarial_loss"].values), expected.loss, rtol=1e-6, atol=1e-9)
        assert rows["is_converged"].tolist() == expected.is_converged.tolist()
    assert plain.record.adversarial_loss == pytest.approx(seen.record.adversarial_loss, rel=1e-9)
    assert seen.record.curve[-1].robust_accuracy == seen.record.robust_accuracy == plain.record.robust_accuracy


# ---------------------------------------------------------------- what the attack pays


@pytest.mark.parametrize("name", ATTACKS)
def test_cost_is_the_attacks_alone(name: str, build) -> None:
    model, x, y = build()
    attack, clean = attack_of(name), judge_clean(model, x, y)
    ids = 100 + torch.arange(NUM)
    known = clean.known(model, x, attack.first_objective(y, None))

    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        return ~judge(model, images, y[rows]).is_correct

    alone = attack(model, x, y, sample_ids=ids, clean=known, confirm=confirm).cost
    whole = evaluate(model, attack, split_of(x, y)).record.cost
    for field in ("cell_evals", "cell_vjps", "solver_steps"):
        assert getattr(whole, field) == pytest.approx(getattr(alone, field))


def counted(model: EquilibriumModel, attack: Attack, x: Tensor, y: Tensor, monkeypatch: pytest.MonkeyPatch) -> list:
    """The solutions of the attack's own solves in an evaluation."""
    solutions = []
    count_solve = Meter.count_solve

    def watched(meter: Meter, solution: Any) -> None:
        solutions.append(solution)
        count_solve(meter, solution)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "count_solve", watched)
        evaluate(model, attack, split_of(x, y))
    return solutions


def test_a_warm_attack_starts_at_the_clean_equilibrium(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    forward, adjoint, *_ = counted(model, attack_of("pgd", steps=2), x, y, monkeypatch)
    assert forward.num_steps.tolist() == adjoint.num_steps.tolist() == [1] * (NUM - 3)


def test_a_cold_attack_knows_nothing(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    attack = attack_of("pgd", steps=2, warm_start=False)
    forward, adjoint, *_ = counted(model, attack, x, y, monkeypatch)
    with torch.no_grad():
        rows = judge(model, x, y).is_correct.nonzero()[:, 0]
        cold = attack.config.source().forward(
            judge_module.CellMap(model.cell, model.inject(x[rows])), 0 * exact(model, x[rows])
        )
    assert torch.equal(forward.num_steps, cold.num_steps) and int(forward.num_steps.min()) > 3
    assert int(adjoint.num_steps.min()) > 3
    assert attack.first_objective(y, None) is None


@pytest.mark.parametrize(("name", "settings"), [("pgd", {}), ("apgd", {}), ("joint-pgd", {"steps": 12})])
def test_what_is_known_saves_evaluations(name: str, settings: dict, build) -> None:
    model, x, y = build()
    attack, clean = attack_of(name, stop_at_success=False, **settings), judge_clean(model, x, y)
    known = clean.known(model, x, attack.first_objective(y, None))
    with_it, without = attack(model, x, y, clean=known).cost, attack(model, x, y).cost
    assert with_it.cell_evals < without.cell_evals


# ---------------------------------------------------------------- lost at the clean image


@pytest.mark.parametrize("name", ["joint-pgd", "pgd", "noise"])
def test_a_sample_without_a_clean_equilibrium_is_neither_attacked_nor_robust(name: str, build) -> None:
    model, x, _ = build(Escaping)
    is_lost = torch.arange(NUM) % 4 == 1
    x[:, 0, 0, 0] = torch.where(is_lost, 0.95, 0.1)
    y = judge(model, x, torch.zeros(NUM, dtype=torch.int64)).prediction
    y[is_lost] = torch.arange(3)  # one of them is right by chance
    found = evaluate(model, build_attack(name, Threat(Norm.L2, 0.02), {}), split_of(x, y), num_snapshots=2)
    assert found.samples["is_attacked"].tolist() == (~is_lost).tolist()
    assert torch.equal(found.x_adv[is_lost], x[is_lost])
    assert not found.samples["is_robust"][is_lost.numpy()].any() and found.samples["is_robust"].any()
    assert found.record.num_unconverged == 3 and found.record.num_attacked == NUM - 3
    assert found.record.curve[-1].robust_accuracy == found.record.robust_accuracy


NO_GRADIENT = {
    "head": lambda model: lambda z: model.readout(z.detach()).detach(),
    "inject": lambda model: lambda x: model.injection(x.detach().flatten(1)),
}


@pytest.mark.parametrize("part", NO_GRADIENT)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_without_a_gradient_is_refused_by_name(name: str, part: str, build) -> None:
    model, x, y = build()
    setattr(model, part, NO_GRADIENT[part](model))
    if name == "noise":
        assert evaluate(model, attack_of(name), split_of(x, y)).record.num_attacked == NUM - 3
    else:
        with pytest.raises(UsageError, match="expected a gradient with respect to the image"):
            evaluate(model, attack_of(name), split_of(x, y))

"""What is known of clean images: the judge's verdict, sizes, how the cell contracts, adjoints; each solved once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate import batch_judge as batch_judge_module
from robustbench_deq.evaluate import clean as clean_module
from robustbench_deq.evaluate import judge as judge_module
from robustbench_deq.evaluate.clean import judge_clean, solve_adjoint
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.evaluate.judge import LADDER, judge
from robustbench_deq.meter import Meter
from robustbench_deq.models import FAMILIES, Linear, LinearConfig
from robustbench_deq.optimise import Norm, estimate_contraction
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


def test_what_is_known_of_a_state_has_its_closed_form(build) -> None:
    """From zero, `f(z0) - z0 = u` and the way to the equilibrium is the equilibrium."""
    model, x, y = build()
    found, z = judge_clean(model, x, y), exact(model, x)
    first = model.inject(x).norm(dim=1).detach()
    for mine in (found.z, found.distance):
        torch.testing.assert_close(mine, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.first, first)
    settled = found.known(model, x, None).settled
    assert settled.size is not None and settled.contraction is None and found.contraction is None
    torch.testing.assert_close(settled.size, z.norm(dim=1), rtol=1e-4, atol=0)
    expected = z.norm(dim=1) / first
    assert float(expected.min()) > 1.1
    torch.testing.assert_close(settled.amplification, expected, rtol=1e-3, atol=0)


def test_no_amplification_is_below_one(build) -> None:
    """`z* = u / 1.5` is nearer than the first step goes."""
    model, x, y = build()
    with torch.no_grad():
        model.a.copy_(-0.5 * torch.eye(5))
    for objective in (None, CrossEntropy(y)):
        known = judge_clean(model, x, y).known(model, x, objective)
        assert known.settled.amplification.tolist() == [1.0] * NUM


@pytest.mark.parametrize("power", [83, -66])
def test_joint_attacks_and_their_adjoints_do_not_depend_on_the_scale_of_the_logits(build, power: int) -> None:
    """1e25 and 1e-20: squares of float32 overflow, and residuals are below what is added to sizes."""
    plain, x, y = build()
    plain, scaled, x = plain.float(), build()[0].float(), x.float()
    with torch.no_grad():
        scaled.readout.weight.mul_(2.0**power)
    found = []
    for model in (plain, scaled):
        clean = judge_clean(model, x, y).known(model, x, CrossEntropy(y))
        attack = attack_of("joint-pgd", steps=10, stop_at_success=False)
        found.append((clean.settled.mu, attack(model, x, y).delta, attack(model, x, y, clean=clean).delta))
    (mu, *deltas), (scaled_mu, *scaled_deltas) = found
    torch.testing.assert_close(scaled_mu * 2.0**-power, mu, rtol=1e-4, atol=1e-6)
    for mine, its in zip(scaled_deltas, deltas, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


SPECTRUM = torch.tensor([0.1, 0.25, 0.4, 0.55, 0.7], dtype=torch.float64)
"""Eigenvalues of a cell that is itself slow: those of `I - J` go up to 0.9, so that it is relaxed by 1 / 0.9."""


@pytest.fixture
def spectra(build):
    """A cell of `SPECTRUM`, its damped copy, their images and labels, and an orthogonal matrix of eigenvectors."""
    (plain, x, y), (damped, _, _) = build(), build(Damped)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    for model in (plain, damped):
        with torch.no_grad():
            model.a.copy_(basis @ torch.diag(SPECTRUM) @ basis.mT)
    return plain, damped, x, y


def test_a_damped_cell_has_the_same_amplification(spectra) -> None:
    """Its residuals are smaller by the damping, its relaxation larger by it."""
    plain, damped, x, y = spectra
    one, other = (judge_clean(model, x, y).known(model, x, Margin(y)).settled for model in (plain, damped))
    torch.testing.assert_close(other.z, one.z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.size, one.size, rtol=1e-4, atol=0)
    torch.testing.assert_close(other.amplification, one.amplification, rtol=1e-3, atol=0)
    relaxation = 1 / (1 - SPECTRUM.min())
    for settled, weight in ((one, 1.0), (other, damped.weight)):
        torch.testing.assert_close(settled.contraction.relaxation, (relaxation / weight).expand(NUM), rtol=1e-6, atol=0)
    expected = one.z.norm(dim=1) / plain.inject(x).norm(dim=1) / relaxation
    torch.testing.assert_close(one.amplification, expected.detach(), rtol=1e-3, atol=0)


def test_an_attack_without_a_gradient_sees_the_damped_cell_as_it_is(spectra) -> None:
    plain, damped, x, y = spectra
    one, other = (judge_clean(model, x, y).known(model, x, None).settled for model in (plain, damped))
    torch.testing.assert_close(other.amplification, one.amplification / damped.weight, rtol=1e-3, atol=0)


def test_contraction_has_its_closed_form(spectra) -> None:
    """Five products span all of the state, so that every eigenvalue is known: the slowest is left of an error."""
    plain, damped, x, y = spectra
    for model, weight in ((plain, 1.0), (damped, damped.weight)):
        found = judge_clean(model, x, y)
        found.known(model, x, CrossEntropy(y))
        assert found.contraction is not None
        slowest = 1 - (1 - SPECTRUM.max()) / (1 - SPECTRUM.min())
        torch.testing.assert_close(found.contraction.rate, slowest.expand(NUM), rtol=1e-6, atol=1e-9, msg=str(weight))
        torch.testing.assert_close(found.contraction.left, (slowest**16).expand(NUM), rtol=1e-6, atol=1e-9)
        assert not found.contraction.is_hard.any()


class Shifted(Linear):
    """The state of `Linear` plus a constant: another origin of the same coordinates."""

    shift = 100.0

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return super().cell(z - self.shift, u) + self.shift

    def head(self, z: Tensor) -> Tensor:
        return super().head(z - self.shift)

    def initial_state(self, u: Tensor) -> Tensor:
        return super().initial_state(u) + self.shift


class Started(Linear):
    """Its iteration starts within rounding of the equilibrium."""

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(5, dtype=u.dtype) - self.a, u.mT).mT


def test_sizes_do_not_change_with_the_origin(build) -> None:
    (plain, x, y), (shifted, _, _) = build(), build(Shifted)
    one, other = (judge_clean(model, x, y).known(model, x, None).settled for model in (plain, shifted))
    torch.testing.assert_close(other.size, one.size, rtol=1e-2, atol=0)  # the judge's tolerance is of the whole state


def test_a_start_at_the_equilibrium_takes_the_size_of_the_state(build) -> None:
    model, x, y = build(Started)
    settled = judge_clean(model, x, y).known(model, x, CrossEntropy(y)).settled
    torch.testing.assert_close(settled.size, exact(model, x).norm(dim=1), rtol=1e-4, atol=0)
    assert bool(torch.isfinite(settled.amplification).all())


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
    assert bool((v != 0).any(1).all())
    torch.testing.assert_close(found, v)


def test_adjoint_of_a_slow_cell_is_found_for_all_its_size(spectra) -> None:
    """It is 80 times the plain cell's, so that a residual of 1e-3 is much beside the loss's own gradient."""
    _, damped, x, y = spectra
    damped.weight = 0.0125
    z = exact(damped, x)
    found, leaf = solve_adjoint(damped, x, z, Margin(y)), z.clone().requires_grad_()
    (v,) = torch.autograd.grad(Margin(y)(damped.head(leaf)).sum(), leaf)
    expected = torch.linalg.solve(torch.eye(5, dtype=x.dtype) - damped.a.mT, v.mT).mT.detach() / damped.weight
    assert bool((expected.norm(dim=1) > 80 * v.norm(dim=1)).all())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.norm(dim=1).min()))


def test_adjoints_are_solved_once_a_loss(build) -> None:
    model, x, y = build()
    clean = judge_clean(model, x, y)

    def spent(objective: Any) -> int:
        with Meter(model) as meter:
            known = clean.known(model, x, objective)
        assert torch.equal(known.settled.z, clean.z) and torch.equal(known.is_correct, clean.verdict.is_correct)
        assert (known.settled.mu is None) == (objective is None)
        return meter.vjp_rows

    assert spent(None) == 0 and clean.adjoints == {} and clean.contraction is None
    assert spent(CrossEntropy(y)) >= NUM and spent(CrossEntropy(y)) == 0
    contraction = clean.contraction
    assert spent(Margin(y)) >= NUM and spent(Targeted(Margin((y + 1) % 3))) >= NUM and spent(Margin(y)) == 0
    assert len(clean.adjoints) == 3 and contraction is not None and clean.contraction is contraction
    different = clean.known(model, x, Margin(y)).settled.mu
    assert different is not None and not torch.equal(different, clean.adjoints["CrossEntropy"])


def test_contraction_is_estimated_once_a_batch_at_the_judges_cost(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build()
    calls: list[int] = []

    def watched(model: EquilibriumModel, z: Tensor, *rest: Tensor) -> Any:
        calls.append(len(z))
        return estimate_contraction(model, z, *rest)

    monkeypatch.setattr(clean_module, "estimate_contraction", watched)
    clean = judge_clean(model, x, y)
    seconds = [clean.seconds]
    for objective in (None, CrossEntropy(y), Margin(y), Margin(y), CrossEntropy(y)):
        with Meter(model) as meter:
            clean.known(model, x, objective)
        seconds.append(clean.seconds)
        assert calls == [] if objective is None else calls == [NUM]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3] == seconds[4] == seconds[5]
    assert meter.eval_rows == meter.vjp_rows == 0


def test_batch_mates_do_not_change_what_is_known(build) -> None:
    model, x, y = build()
    whole = judge_clean(model, x, y).known(model, x, CrossEntropy(y)).settled.take(torch.tensor([7, 2]))
    alone = judge_clean(model, x[[7, 2]], y[[7, 2]]).known(model, x[[7, 2]], CrossEntropy(y[[7, 2]])).settled
    for mine, its in ((whole.size, alone.size), (whole.amplification, alone.amplification)):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=0)
    for mine, its in zip(whole.contraction, alone.contraction, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- each image once


class Solves:
    """Counts the rows of the judge's cold solves, and keeps the injections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Tensor] = []
        tight_solve = judge_module.tight_solve

        def watched(model: EquilibriumModel, u: Tensor, *rest: Any) -> Any:
            self.calls.append(u.detach().clone())
            return tight_solve(model, u, *rest)

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


def test_only_samples_that_break_are_judged_on_the_way(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where they broke is found in three solves among eight points, all of them in agreement with judging all."""
    model, x, y = build()
    attack = build_attack("pgd", Threat(Norm.L2, 0.3), {"stop_at_success": False, "steps": 8})
    clean = judge_clean(model, x, y).verdict
    deltas = [snapshot.delta for snapshot in attack(model, x, y, num_snapshots=8).snapshots]
    robust = [clean.is_correct & judge(model, (x + delta).clamp(0, 1), y).is_correct for delta in deltas]
    solves = Solves(monkeypatch)
    found = evaluate(model, attack, split_of(x, y), num_snapshots=8)
    num_broken = int((clean.is_correct & ~robust[-1]).sum())
    assert 0 < num_broken < int(clean.is_correct.sum())
    assert len(solves.rows) <= 2 * NUM + 3 * num_broken
    assert [point.robust_accuracy for point in found.record.curve] == [float(at.double().mean()) for at in robust]


def test_what_had_no_equilibrium_at_its_clean_image_is_given_up_sooner(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its final image by the first solver alone, and at no snapshot; the others are judged as ever."""
    model, x, y = build()
    verdict = judge_clean(model, x, y).verdict
    verdict.is_converged[0] = verdict.is_correct[0] = False
    asked: list[tuple[int, int]] = []

    def watched(model: EquilibriumModel, images: Tensor, y: Tensor, ladder: Any) -> Any:
        asked.append((len(images), len(ladder)))
        return judge(model, images, y, ladder)

    monkeypatch.setattr(batch_judge_module, "judge", watched)
    bench = batch_judge_module.BatchJudge(model, x, y, verdict)
    final = bench.final(0.9 * x)
    assert asked == [(NUM - 1, len(LADDER)), (1, 1)]
    assert int(bench.num_unbroken([0.1 * x, -0.1 * x], final)[0]) == 0


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

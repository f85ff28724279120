"""Who is attacked and who leaves early: a contract over every registered attack, beside that of `test_contract`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from robustbench_deq.attacks.joint import _merged
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.clean import CleanBatch, judge_clean
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.optimise import Norm, Optimum
from robustbench_deq.protocol import Attack, AttackResult, Batch, Clean, Proposal, Recorder, frozen
from robustbench_deq.training import loss
from robustbench_deq.training.config import ModelSpec, TrainingConfig
from robustbench_deq.training.loop import Trainer
from tests.attacks.test_contract import FULL_CASES, GRADIENT_FREE, WITH_RANDOM_START, WITH_RESTARTS, Case

NUM = 10
WRONG = [1, 6]
"""Samples whose label is not what the model says of the clean image."""
NEVER_LEAVES = {"fmn", "joint-fmn", "torchattacks-pgd", "torchattacks-pgdl2"}
LIKE_PGD = {"fgsm", "fmn"}
"""Of the parts of `pgd`, but for the step."""
LEAVING = [case for case in FULL_CASES if case.name not in NEVER_LEAVES | LIKE_PGD]


def named(case: Case) -> str:
    return f"{case.name}-{case.norm.name}"


every_case = pytest.mark.parametrize("case", FULL_CASES, ids=named)
every_case_that_leaves = pytest.mark.parametrize("case", LEAVING, ids=named)
RESTARTING = pytest.mark.parametrize("case", [case for case in LEAVING if case in WITH_RESTARTS], ids=named)


class Setting(NamedTuple):
    """A model, samples with labels of which those in `WRONG` are wrong, and what the judge knows of the clean images.
    The radius fools some of the samples, not all."""

    model: EquilibriumModel
    x: Tensor
    y: Tensor
    batch: CleanBatch

    def clean(self, attack: Attack, rows: Tensor | slice = slice(None)) -> Clean:
        """What is known of the rows `rows`."""
        with frozen(self.model):
            known = self.batch.known(self.model, self.x, attack.first_objective(self.y, None))
        return Clean(known.settled.take(torch.arange(NUM)[rows]), known.is_correct[rows])

    def run(self, attack: Attack, rows: Tensor | slice = slice(None), **options: Any) -> AttackResult:
        ids = options.pop("sample_ids", torch.arange(NUM) + 40)
        return attack(
            self.model, self.x[rows], self.y[rows], sample_ids=ids[rows], clean=self.clean(attack, rows), **options
        )

    def is_fooled(self, x_adv: Tensor) -> Tensor:
        """By the judge, from cold."""
        return ~judge(self.model, x_adv, self.y).is_correct


def radius_of(case: Case) -> float:
    """Noise needs more."""
    return {Norm.L1: 0.5, Norm.L2: 0.2, Norm.LINF: 0.05}[case.norm] * (2.5 if case.name in GRADIENT_FREE else 1.0)


@pytest.fixture(scope="module")
def setting(make_model, make_images) -> Setting:
    model, x = make_model("deq-fc", rtol=1e-8), (1.4 * make_images(NUM) - 0.2).clamp(0, 1)
    with torch.no_grad():
        logits = model(x)
        # Decision boundaries between the samples: none of these is far from one.
        model.readout.bias.sub_(logits.mean(0))
        model.readout.weight.mul_(4.0)
        y = model(x).argmax(1)
    y[WRONG] = (y[WRONG] + 1) % 3
    return Setting(model, x, y, judge_clean(model, x, y))


def attack_of(case: Case, **settings: Any) -> Attack:
    return case.attack(**{"epsilon": radius_of(case), "stop_at_success": True, "steps": 12, **settings})


ONE_SEARCH = {"rounds": 1, "has_fallback": False}
"""Joint attacks go on with samples that are left, which those without anybody leaving do not."""


def refuses(rows: Tensor, images: Tensor) -> Tensor:
    return torch.zeros(len(rows), dtype=torch.bool)


def agrees(rows: Tensor, images: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


# ---------------------------------------------------------------- who is attacked


def cost_of(result: AttackResult, num_samples: int = NUM) -> Tensor:
    """Evaluations, vector-Jacobian products and solver steps, of all samples."""
    cost = result.cost
    return num_samples * torch.tensor([cost.cell_evals, cost.cell_vjps, cost.solver_steps])


@every_case
def test_misclassified_samples_are_left_alone_and_cost_nothing(case: Case, setting: Setting) -> None:
    right = setting.batch.verdict.is_correct.nonzero()[:, 0]
    assert right.tolist() == [row for row in range(NUM) if row not in WRONG]
    whole, part = setting.run(attack_of(case)), setting.run(attack_of(case), right)
    assert whole.is_attacked.nonzero()[:, 0].tolist() == right.tolist() and bool(part.is_attacked.all())
    assert not bool(whole.delta[WRONG].any()) and torch.equal(whole.x_adv[WRONG], setting.x[WRONG])
    torch.testing.assert_close(whole.delta[right], part.delta, rtol=0, atol=1e-9)
    torch.testing.assert_close(cost_of(whole), cost_of(part, len(right)))
    assert not bool(whole.is_failed.any())


@every_case
def test_a_batch_of_misclassified_samples_costs_nothing_at_all(case: Case, setting: Setting) -> None:
    result = setting.run(attack_of(case), torch.tensor(WRONG), num_snapshots=2, confirm=refuses)
    assert not bool(result.is_attacked.any()) and not bool(result.delta.any())
    assert not bool(cost_of(result).any()) and result.z is None and result.snapshots == ()


@every_case
def test_all_are_attacked_where_none_may_leave_or_nothing_is_known(case: Case, setting: Setting) -> None:
    stay = setting.run(attack_of(case, stop_at_success=False))
    unknown = attack_of(case)(setting.model, setting.x, setting.y)
    for result in (stay, unknown):
        assert bool(result.is_attacked.all())
    assert bool(stay.delta[WRONG].flatten(1).any(1).all()) or "fmn" in case.name  # which finds that zero will do


@every_case
def test_leaving_saves_cost_and_loses_no_success(case: Case, setting: Setting) -> None:
    right = setting.batch.verdict.is_correct.nonzero()[:, 0]
    stay = setting.run(attack_of(case, stop_at_success=False, **ONE_SEARCH), right)
    leave = setting.run(attack_of(case, **ONE_SEARCH), right)
    if case in LEAVING and (case.has_steps or case.name in GRADIENT_FREE):  # nobody leaves before an only step
        assert float(cost_of(leave, len(right))[0]) < float(cost_of(stay, len(right))[0])
    else:
        assert torch.equal(cost_of(leave), cost_of(stay)) and torch.equal(leave.delta, stay.delta)
    fooled = setting.is_fooled(setting.x.index_copy(0, right, stay.x_adv))
    assert torch.equal(setting.is_fooled(setting.x.index_copy(0, right, leave.x_adv)), fooled)
    assert len(WRONG) < int(fooled.sum()) < NUM, "the radius must fool some of the samples, not all"


@pytest.mark.parametrize("case", [case for case in LEAVING if case.name == "joint-pgd"], ids=named)
def test_samples_that_are_left_are_attacked_further(case: Case, setting: Setting) -> None:
    """Rounds, audit and full solves only add successes, and only those that are left pay for them."""
    right = setting.batch.verdict.is_correct.nonzero()[:, 0]
    whole, once = (setting.run(attack_of(case, **settings), right) for settings in ({}, {"rounds": 1}))
    search = setting.run(attack_of(case, **ONE_SEARCH), right)
    stay = setting.run(attack_of(case, stop_at_success=False), right)
    fooled = [setting.is_fooled(setting.x.index_copy(0, right, found.x_adv)) for found in (search, once, whole, stay)]
    for weaker, stronger in ((fooled[0], fooled[1]), (fooled[1], fooled[2]), (fooled[3], fooled[2])):
        assert bool((stronger | ~weaker).all())
    is_left = ~fooled[0][right]
    assert torch.equal(whole.delta[~is_left], search.delta[~is_left]) and bool(is_left.any())
    # Rounds of 24 and of 48 steps, on samples that are left alone: an evaluation and a product a step, one look more.
    climbs = cost_of(whole, len(right)) - cost_of(once, len(right))
    assert 0 < float(climbs[0]) <= int(is_left.sum()) * (24 + 1 + 48 + 1)


# ---------------------------------------------------------------- who has the last word


class Asked:
    """A `confirm` that keeps what it was asked, and answers as `answer` does."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.answer, self.rows, self.images = answer, [], []

    def __call__(self, rows: Tensor, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.rows.append(rows)
        self.images.append(images)
        return self.answer(rows, images)


VARIANTS = pytest.mark.parametrize(
    "settings", [{}, {"restarts": 3, "random_start": True}], ids=["one run", "three random starts"]
)


@VARIANTS
@every_case_that_leaves
def test_samples_that_leave_are_fooled_and_are_what_is_returned(case: Case, settings: dict, setting: Setting) -> None:
    asked = Asked(agrees)
    result = setting.run(attack_of(case, **settings), confirm=asked)
    (rows,), (images,) = asked.rows, asked.images
    assert 0 < len(rows) < NUM - len(WRONG) and not set(rows.tolist()) & set(WRONG)
    assert bool(setting.is_fooled(result.x_adv)[rows].all())
    assert torch.equal(result.x_adv[rows], images)
    assert float(case.norm.size(images - setting.x[rows]).max()) <= radius_of(case) * (1 + 1e-9)
    assert result.diagnostics["num_refuted"] == 0


@VARIANTS
@every_case_that_leaves
def test_samples_that_are_refuted_are_attacked_to_the_end(case: Case, settings: dict, setting: Setting) -> None:
    """A judge that believes nothing: all is as without leaving, at the cost of both."""
    asked, settings = Asked(refuses), settings | ONE_SEARCH
    refuted = setting.run(attack_of(case, **settings), confirm=asked)
    leave, stay = (setting.run(attack_of(case, stop_at_success=leaves, **settings)) for leaves in (True, False))
    (rows,) = asked.rows
    again = setting.run(attack_of(case, stop_at_success=False, **settings), rows)
    attacked = refuted.is_attacked
    torch.testing.assert_close(refuted.delta[attacked], stay.delta[attacked], rtol=0, atol=1e-8)
    torch.testing.assert_close(refuted.loss[attacked], stay.loss[attacked], rtol=0, atol=1e-8)
    torch.testing.assert_close(cost_of(refuted), cost_of(leave) + cost_of(again, len(rows)))
    assert refuted.diagnostics["num_refuted"] == len(rows)


@every_case_that_leaves
def test_only_samples_that_are_refuted_are_attacked_again(case: Case, setting: Setting) -> None:
    asked = Asked(lambda rows, images: torch.arange(len(rows)) != 1)
    attack = attack_of(case, **ONE_SEARCH)
    mixed, leave = setting.run(attack, confirm=asked), setting.run(attack)
    stay = setting.run(attack_of(case, stop_at_success=False, **ONE_SEARCH))
    row = int(asked.rows[0][1])
    others = torch.arange(NUM) != row
    assert torch.equal(mixed.delta[others], leave.delta[others])
    torch.testing.assert_close(mixed.delta[row], stay.delta[row], rtol=0, atol=1e-8)
    assert mixed.diagnostics["num_refuted"] == 1 and len(asked.rows) == 1


def test_what_the_judge_does_meanwhile_is_not_counted(setting: Setting) -> None:
    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        return ~judge(setting.model, images, setting.y[rows]).is_correct

    attack = attack_of(Case("pgd", Norm.L2))
    assert torch.equal(cost_of(setting.run(attack, confirm=confirm)), cost_of(setting.run(attack)))


@pytest.mark.parametrize("case", [case for case in FULL_CASES if case.name in NEVER_LEAVES], ids=named)
def test_attacks_that_need_all_their_steps_never_leave(case: Case, setting: Setting) -> None:
    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        pytest.fail("nobody has left")

    leave, stay = setting.run(attack_of(case), confirm=confirm), setting.run(attack_of(case, stop_at_success=False))
    torch.testing.assert_close(leave.delta[leave.is_attacked], stay.delta[leave.is_attacked], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- batches and restarts


@VARIANTS
@every_case_that_leaves
def test_batch_mates_and_their_order_do_not_matter(case: Case, settings: dict, setting: Setting) -> None:
    attack = attack_of(case, **settings)
    whole = setting.run(attack, confirm=agrees)
    for rows in ([5], [9, 7, 0, 6, 3], list(range(NUM))[::-1]):
        part = setting.run(attack, torch.tensor(rows), confirm=agrees)
        torch.testing.assert_close(part.delta, whole.delta[rows], rtol=0, atol=1e-6)
        assert torch.equal(part.is_attacked, whole.is_attacked[rows])


@RESTARTING
def test_restarts_are_of_samples_that_are_left(case: Case, setting: Setting) -> None:
    attack, seen = attack_of(case, restarts=5, random_start=True), []
    run = attack.run

    def watched(model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        proposal = run(model, batch, record)
        seen.append((batch.ids.tolist(), proposal.is_done))
        return proposal

    attack.run = watched
    setting.run(attack)
    ids = [row + 40 for row in range(NUM) if row not in WRONG]
    assert len(seen) == 5 and any(bool(is_done.any()) for _, is_done in seen[:-1])
    for found, is_done in seen:
        assert found == ids
        ids = [one for one, done in zip(ids, is_done.tolist(), strict=True) if not done]


def test_no_restart_of_nobody(setting: Setting) -> None:
    attack = attack_of(Case("pgd", Norm.L2), restarts=5, epsilon=50.0)
    runs, run = [], attack.run
    attack.run = lambda model, batch, record: runs.append(len(batch)) or run(model, batch, record)
    result = setting.run(attack)
    assert runs == [NUM - len(WRONG)] and bool(setting.is_fooled(result.x_adv).all())


class Scripted(Attack):
    """Returns one proposal after the other; of a loss that does not tell who is fooled, as cross-entropy does not."""

    name, summary = "scripted", "test"
    is_gradient_based = False
    proposals: list[Proposal]

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        record.plan(1)
        return self.proposals.pop(0)


def test_a_success_beats_a_higher_loss_of_an_earlier_restart(setting: Setting) -> None:
    attack = Scripted(attack_of(Case("pgd", Norm.L2)).threat, attack_of(Case("pgd", Norm.L2), restarts=2).config)
    point = torch.full_like(setting.x, 1e-3)
    no, yes = torch.zeros(NUM, dtype=torch.bool), torch.arange(NUM) % 2 == 0
    attack.proposals = [
        Proposal(point, torch.full((NUM,), 2.0).double(), no),
        Proposal(2 * point, torch.ones(NUM).double(), yes),
    ]
    result = attack(setting.model, 0.5 * setting.x, setting.y, num_snapshots=1)
    expected = torch.where(yes[:, None, None, None], 2 * point, point)
    torch.testing.assert_close(result.delta, expected, rtol=0, atol=1e-12)
    assert torch.equal(result.loss, torch.where(yes, 1.0, 2.0).double())
    torch.testing.assert_close(result.snapshots[-1].delta, result.delta)


def test_what_was_refuted_is_forgotten_though_its_loss_was_higher(setting: Setting) -> None:
    attack = Scripted(attack_of(Case("pgd", Norm.L2)).threat, attack_of(Case("pgd", Norm.L2)).config)
    point, asked = torch.full_like(setting.x, 1e-3), Asked(lambda rows, images: rows != 3)
    attack.proposals = [
        Proposal(point, torch.full((NUM,), 5.0).double(), torch.ones(NUM, dtype=torch.bool)),
        Proposal(2 * point[:1], torch.ones(1).double()),
    ]
    result = attack(setting.model, 0.5 * setting.x, setting.y, confirm=asked)
    assert [rows.tolist() for rows in asked.rows] == [list(range(NUM))]
    point[3] *= 2
    torch.testing.assert_close(result.delta, point, rtol=0, atol=1e-12)
    assert result.loss.tolist() == [5.0] * 3 + [1.0] + [5.0] * 6


def test_a_success_with_full_solves_beats_a_higher_loss_without() -> None:
    no = torch.zeros(2, dtype=torch.bool)
    below = Optimum(
        variable=torch.zeros(2, 3),
        loss=torch.full((2,), 2.0),
        gain=torch.ones(2),
        residual=torch.ones(2),
        z=None,
        mu=None,
        is_done=no,
        is_flat=no,
        is_stopped=False,
        tally={},
    )
    again = below._replace(
        variable=torch.ones(2, 3), loss=torch.ones(2), residual=torch.zeros(2), is_done=torch.tensor([True, False])
    )
    found = _merged(below, torch.arange(2), again, has_trusted_losses=True)
    assert found.variable[:, 0].tolist() == [1.0, 0.0]
    assert found.loss.tolist() == [1.0, 2.0] and found.is_done.tolist() == [True, False]


# ---------------------------------------------------------------- the curve


@VARIANTS
@pytest.mark.parametrize("answer", [agrees, refuses], ids=["agreed", "refuted"])
@every_case
def test_the_last_point_of_a_curve_is_the_result(case: Case, answer, settings: dict, setting: Setting) -> None:
    if settings and (case not in WITH_RESTARTS or case not in WITH_RANDOM_START):
        pytest.skip(f"{case.name} has no random starts")
    attack = attack_of(case, **settings)
    result, plain = setting.run(attack, num_snapshots=3, confirm=answer), setting.run(attack, confirm=answer)
    torch.testing.assert_close(result.delta, plain.delta, rtol=0, atol=1e-12)
    torch.testing.assert_close(cost_of(result)[:2], cost_of(plain)[:2])
    assert len(result.snapshots) >= 1
    torch.testing.assert_close(result.snapshots[-1].delta, result.delta, rtol=0, atol=1e-12)
    assert result.snapshots[-1].cell_evals == result.cost.cell_evals
    for name in ("step", "cell_evals", "cell_vjps", "solver_steps"):
        values = [getattr(point, name) for point in result.snapshots]
        assert values == sorted(values)
    for point in result.snapshots:
        assert not bool(point.delta[WRONG].any())
        assert float(case.norm.size(point.delta).max()) <= radius_of(case) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["pgd", "joint-pgd", "apgd", "joint-apgd"])
def test_a_run_that_all_have_left_shows_the_residuals_of_its_own_steps(name: str, setting: Setting) -> None:
    attack = attack_of(Case(name, Norm.L2), epsilon=50.0, steps=30)
    right = setting.batch.verdict.is_correct.nonzero()[:, 0]
    result = setting.run(attack, right, num_snapshots=3)
    assert bool(setting.is_fooled(setting.x.index_copy(0, right, result.x_adv)).all())
    assert [point.step for point in result.snapshots] == [10, 20, 30]
    assert len(result.residuals) * len(right) <= 1.5 * float(cost_of(result, len(right))[0])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["joint-pgd", "joint-apgd"])
def test_the_adversary_of_training_never_leaves(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state and adjoint of the whole batch are where training's solves start."""
    model, starts = copy.deepcopy(setting.model), []
    attack = attack_of(Case(name, Norm.L2), epsilon=0.01)
    assert attack(model, setting.x, setting.y).z is None, "without training some must leave"

    def kept(model: EquilibriumModel, x: Tensor, z0: Tensor | None, mu0: Tensor | None) -> Any:
        starts.append((z0, mu0))
        return z0, mu0

    monkeypatch.setattr(loss, "_usable_start", kept)
    data = Split("mine", SplitName.TRAIN, setting.x, setting.y, torch.arange(NUM), "ab12")
    config = TrainingConfig(name="mine", model=ModelSpec(family="deq-fc"), epochs=1, batch_size=5)
    trainer = Trainer(config, model, data, data, attack, None)
    trainer.run()
    assert len(starts) == 2
    for z0, mu0 in starts:
        assert z0 is not None and mu0 is not None and len(z0) == len(mu0) == 5
        assert bool((mu0 != 0).any(1).all())

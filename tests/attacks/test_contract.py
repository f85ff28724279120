"""One contract over every registered attack, on a tiny model of every family, in every norm that the attack has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.models import FAMILIES
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.optimise.contraction import NUM_PRODUCTS
from robustbench_deq.protocol import Attack, AttackResult, Batch, Cascade, ObjectiveConfig, Proposal, Recorder
from robustbench_deq.threats import Threat

EPSILON = {Norm.L1: 1.0, Norm.L2: 0.5, Norm.LINF: 0.06}
GRADIENT_FREE = {"noise"}
Y = torch.tensor([0, 1, 2, 1, 0])
SINGLE = [name for name in ATTACKS if not issubclass(ATTACKS.get(name), Cascade)]
"""Attacks with runs of their own; for sequences of them see `test_cascade`."""


class Case(NamedTuple):
    name: str
    norm: Norm

    def attack(self, epsilon: float | None = None, **settings: Any) -> Attack:
        """The attack with few steps, for all samples to the end, unless told otherwise; settings that it does not have
        are left out."""
        kind = ATTACKS.get(self.name)
        settings = {"steps": 6, "stop_at_success": False, **settings}
        known = {key: value for key, value in settings.items() if key in kind.config_type.model_fields}
        return kind(Threat(self.norm, EPSILON[self.norm] if epsilon is None else epsilon), kind.config_type(**known))

    @property
    def has_steps(self) -> bool:
        """Whether its steps can be set; else it has one, or none."""
        return "steps" in ATTACKS.get(self.name).config_type.model_fields


def supports(name: str, norm: Norm) -> bool:
    try:
        Case(name, norm).attack()
    except UsageError:
        return False
    return True


def accepts(name: str, **settings: Any) -> bool:
    try:
        Case(name, next(norm for norm in NORMS.values() if supports(name, norm))).attack(**settings)
    except (UsageError, pydantic.ValidationError):
        return False
    return True


CASES = [Case(name, norm) for name in SINGLE for norm in NORMS.values() if supports(name, norm)]
FULL_NORM = {name: Norm.L2 if supports(name, Norm.L2) else Norm.LINF for name in SINGLE}
FULL_CASES = [case for case in CASES if case.norm is FULL_NORM[case.name]]
"""Every attack in one norm."""
ALIKE = {"apgd", "apgd-t", "fgsm", "fmn", "joint-apgd", "joint-fmn"}
"""Attacks of the same parts as others, but for the step: other norms and families are left to those."""
OF_ONE_NORM = {"intermediate-pgd", "yopo"}
"""Attacks with a source of their own, which knows no norm: one does, on families of three kinds."""
KINDS = {"deq-fc", "mdeq", "mondeq-conv"}
EVERYWHERE = [
    case
    for case in CASES
    if case.name not in ALIKE and case.norm is not Norm.L1 and (case in FULL_CASES or case.name not in OF_ONE_NORM)
]
"""What is run on all families; the rest on one."""


def runs_on(case: Case, family: str) -> bool:
    if case in EVERYWHERE and (case.name not in OF_ONE_NORM or family in KINDS):
        return True
    return family == "deq-fc" and (case in FULL_CASES or case.name not in ALIKE)


FAMILY_CASES = [(case, family) for case in CASES for family in FAMILIES if runs_on(case, family)]
every_norm = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.norm.name}")
every_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case in FULL_CASES or case in EVERYWHERE],
    ids=lambda case: f"{case.name}-{case.norm.name}",
)
every_family_and_case = pytest.mark.parametrize(
    ("case", "family"), FAMILY_CASES, ids=[f"{case.name}-{case.norm.name}-{family}" for case, family in FAMILY_CASES]
)
every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_attack = pytest.mark.parametrize("name", SINGLE)
WITH_RESTARTS = [case for case in CASES if accepts(case.name, restarts=2)]
WITH_RANDOM_START = [case for case in CASES if accepts(case.name, random_start=True)]


LOSS_CASES = [(case, family) for case, family in FAMILY_CASES if case.name not in {"apgd-t", "fmn", "joint-fmn"}]
"""Without those that go for the smallest norm, at the boundary, where the loss is small, and the one whose loss is of
classes that it chooses itself."""
every_family_with_a_loss = pytest.mark.parametrize(
    ("case", "family"), LOSS_CASES, ids=[f"{case.name}-{case.norm.name}-{family}" for case, family in LOSS_CASES]
)
RESTART_CASES = [(case, family) for case, family in LOSS_CASES if case in WITH_RESTARTS]
every_family_with_restarts = pytest.mark.parametrize(
    ("case", "family"), RESTART_CASES, ids=[f"{case.name}-{case.norm.name}-{family}" for case, family in RESTART_CASES]
)


@pytest.fixture(scope="module")
def make(make_model, make_images) -> Callable[..., tuple[EquilibriumModel, Tensor]]:
    """`make(family)`: a model solved to 1e-8, and five images of which some pixels lie on the limits of the box."""

    def build(family: str, rtol: float = 1e-8) -> tuple[EquilibriumModel, Tensor]:
        return make_model(family, rtol=rtol), (1.4 * make_images(5) - 0.2).clamp(0, 1)

    return build


@pytest.fixture(scope="module")
def plain_run(make) -> Callable[[Case, str], AttackResult]:
    """`plain_run(case, family)`: ten steps with three snapshots, run once for all tests that look at them."""

    @functools.cache
    def run(case: Case, family: str) -> AttackResult:
        return case.attack(steps=10)(*make(family), Y, num_snapshots=3)

    return run


def test_every_attack_has_a_norm_and_a_line_for_the_listing() -> None:
    assert {case.name for case in CASES} == set(SINGLE)
    for name in ATTACKS:
        kind = ATTACKS.get(name)
        assert kind.name == name
        assert kind.summary and "\n" not in kind.summary
        assert all(info.description for info in kind.config_type.model_fields.values()), name


def test_a_norm_that_an_attack_does_not_have_is_refused_by_name() -> None:
    missing = [(name, norm) for name in SINGLE for norm in NORMS.values() if not supports(name, norm)]
    assert missing
    for name, norm in missing:
        with pytest.raises(UsageError, match=rf"{name}: expected norm .*got {norm.name}"):
            Case(name, norm).attack()


# ---------------------------------------------------------------- ball and box


@every_family_and_case
def test_result_and_every_snapshot_are_in_ball_and_box(case: Case, family: str, make, plain_run) -> None:
    model, x = make(family)
    result = plain_run(case, family)
    assert len(result.snapshots) >= 1
    for delta in (result.delta, *(snapshot.delta for snapshot in result.snapshots)):
        assert delta.shape == x.shape and delta.dtype == x.dtype and not delta.requires_grad
        assert float(case.norm.size(delta).max()) <= EPSILON[case.norm] * (1 + 1e-9)
        assert float((x + delta).min()) >= 0 and float((x + delta).max()) <= 1
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1
    torch.testing.assert_close(result.x_adv, x + result.delta, rtol=0, atol=1e-12)
    assert not result.x_adv.requires_grad
    has_moved = case.norm.size(result.delta) > 0
    if case.name in {"apgd-t", "fmn", "joint-fmn"}:  # what is wrong already needs no perturbation
        has_moved |= model(x).argmax(1) != Y
    assert bool(has_moved.all())
    assert not bool(result.is_failed.any())


@every_norm
def test_float32_images_stay_in_the_box_and_in_the_ball_to_rounding(case: Case, make) -> None:
    model, x = make("deq-fc", rtol=1e-5)  # what single precision reaches
    model, x = model.float(), x.float()
    result = case.attack()(model, x, Y)
    assert result.x_adv.dtype == torch.float32
    assert float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1
    assert float(case.norm.size(result.x_adv - x).max()) <= EPSILON[case.norm] * (1 + 1e-5)


@every_family_and_case
def test_no_radius_changes_nothing(case: Case, family: str, make) -> None:
    model, x = make(family)
    result = case.attack(epsilon=0.0)(model, x, Y, num_snapshots=2)
    assert not bool(result.is_failed.any())
    assert torch.equal(result.x_adv, x)
    assert all(not bool(snapshot.delta.any()) for snapshot in result.snapshots)


@every_case
def test_a_subclass_is_not_trusted_with_the_threat(case: Case, make) -> None:
    model, x = make("deq-fc")
    attack = case.attack()
    attack.run = lambda model, batch, record: Proposal(torch.full_like(batch.images, 100.0), torch.zeros(len(batch)))
    result = attack(model, x, Y)
    assert float(case.norm.size(result.delta).max()) <= EPSILON[case.norm] * (1 + 1e-9)
    assert float(result.x_adv.max()) <= 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_case
def test_a_perturbation_that_is_not_finite_fails_and_becomes_zero(case: Case, value: float, make) -> None:
    model, x = make("deq-fc")
    attack = case.attack()

    def run(model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        delta = torch.full_like(batch.images, 0.01)
        delta[1], delta[3, 0, 0, 0] = value, value
        return Proposal(delta, torch.zeros(len(batch)))

    attack.run = run
    result = attack(model, x, Y)
    assert result.is_failed.tolist() == [False, True, False, True, False]
    assert not bool(result.delta[result.is_failed].any())
    assert bool((result.delta[~result.is_failed] > 0).any())


# ---------------------------------------------------------------- randomness and batches


@every_family_and_case
def test_same_seed_same_bits(case: Case, family: str, make) -> None:
    model, x = make(family)
    attack = case.attack(random_start=True) if case in WITH_RANDOM_START else case.attack()
    torch.manual_seed(1)
    one = attack(model, x, Y, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = attack(model, x, Y, seed=3)
    assert torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global generator


@pytest.mark.parametrize("case", WITH_RANDOM_START, ids=lambda case: f"{case.name}-{case.norm.name}")
def test_another_seed_and_another_sample_id_give_another_start(case: Case, make) -> None:
    model, x = make("deq-fc")
    starts: list[Tensor] = []
    attack = case.attack(random_start=True, restarts=1)
    attack.run = lambda model, batch, record: (
        starts.append(batch.start) or Proposal(batch.start, batch.start.sum((1, 2, 3)))
    )
    ids = torch.arange(5)
    attack(model, x, Y, seed=3, sample_ids=ids)
    attack(model, x, Y, seed=4, sample_ids=ids)
    attack(model, x, Y, seed=3, sample_ids=ids + 1)
    differs = [(starts[0] != start).flatten(1).any(1) for start in starts]
    assert not bool(differs[0].any()) and bool(differs[1].all()) and bool(differs[2].all())
    same_image = x[:1].expand(5, -1, -1, -1)
    attack(model, same_image, Y, seed=3, sample_ids=torch.tensor([0, 1, 2, 3, 0]))
    assert torch.equal(starts[3][0], starts[3][4]) and not torch.equal(starts[3][0], starts[3][1])
    assert torch.equal(starts[3][0], starts[0][0])


@every_family_and_case
def test_batch_mates_do_not_matter(case: Case, family: str, make) -> None:
    model, x = make(family)
    attack = case.attack(restarts=2) if case in WITH_RESTARTS else case.attack()
    ids = torch.tensor([7, 3, 9, 1, 4])
    whole = attack(model, x, Y, seed=3, sample_ids=ids)
    for rows in (torch.tensor([0, 1]), torch.tensor([4, 2, 3])):
        part = attack(model, x[rows], Y[rows], seed=3, sample_ids=ids[rows])
        torch.testing.assert_close(part.x_adv, whole.x_adv[rows], rtol=0, atol=1e-5)


@every_case
def test_batch_mates_do_not_matter_to_samples_whose_gradient_nearly_vanishes(case: Case, make) -> None:
    """A tolerance that sees the mean over the batch would see the batch size here."""
    model, x = make("deq-fc")
    with torch.no_grad():
        model.readout.weight.mul_(120.0)
        y = model(x).argmax(1)
        assert float(F.cross_entropy(model(x), y, reduction="none").median()) < 1e-6
    whole, alone = case.attack()(model, x, y), [case.attack()(model, x[i : i + 1], y[i : i + 1]) for i in range(5)]
    if case.name in GRADIENT_FREE:  # keyed by the sample, whose id is its place in the batch
        alone = alone[:1]
    for row, single in enumerate(alone):
        torch.testing.assert_close(single.x_adv[0], whole.x_adv[row], rtol=0, atol=1e-4)


@every_case
def test_an_empty_batch_is_refused(case: Case, make) -> None:
    model, x = make("deq-fc")
    with pytest.raises(UsageError, match="images: expected at least one image, got an empty batch"):
        case.attack()(model, x[:0], Y[:0])


# ---------------------------------------------------------------- the model is left as it was


class Footprint:
    """Everything about a model that an attack could change."""

    def __init__(self, model: EquilibriumModel) -> None:
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.flags = [p.requires_grad for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.solve, self.adjoint, self.meter = model.solve, model.adjoint, model.meter

    def check(self, model: EquilibriumModel) -> None:
        state = model.state_dict()
        assert state.keys() == self.values.keys()
        assert all(torch.equal(state[name], value) for name, value in self.values.items())
        for parameter, (gradient, saved) in zip(model.parameters(), self.gradients, strict=True):
            assert parameter.grad is gradient
            assert gradient is None or torch.equal(gradient, saved)
        assert [p.requires_grad for p in model.parameters()] == self.flags
        assert [module.training for module in model.modules()] == self.modes
        assert (model.solve, model.adjoint, model.meter) == (self.solve, self.adjoint, self.meter)


def unusual(model: EquilibriumModel) -> Footprint:
    """Give the model a mode, gradients, flags and a buffer that an attack could spoil."""
    model.register_buffer("seen", torch.zeros(()))
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.5) if index % 2 else None
        parameter.requires_grad_(index != 1)
    model.train()
    list(model.children())[-1].eval()
    return Footprint(model)


@every_family_and_case
def test_model_images_and_labels_are_left_alone(case: Case, family: str, make) -> None:
    model, x = make(family)
    footprint = unusual(model)
    head = model.head

    def counting_head(z: Tensor) -> Tensor:
        model.seen += 1  # a buffer that every call changes
        assert not any(module.training for module in model.modules())
        return head(z)

    model.head = counting_head
    x_before, y_before = x.clone(), Y.clone()
    case.attack()(model, x, Y, num_snapshots=2)
    footprint.check(model)
    assert torch.equal(x, x_before) and torch.equal(Y, y_before) and x.grad is None
    assert torch.is_grad_enabled()


@every_family_and_case
def test_model_is_left_alone_when_the_attack_raises(case: Case, family: str, make) -> None:
    model, x = make(family)
    footprint = unusual(model)
    cell, calls = model.cell, []

    def failing_cell(z: Tensor, u: Tensor) -> Tensor:
        calls.append(len(z))
        model.seen += 1
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return cell(z, u)

    model.cell = failing_cell
    with pytest.raises(RuntimeError, match="out of memory"):
        case.attack()(model, x, Y)
    footprint.check(model)
    assert torch.is_grad_enabled()


@every_case
def test_gradients_by_the_images_and_no_grad_do_not_matter(case: Case, make) -> None:
    model, x = make("deq-fc")
    attack = case.attack()
    plain = attack(model, x, Y).x_adv
    leaf = x.clone().requires_grad_()
    assert torch.equal(attack(model, leaf, Y).x_adv, plain)
    assert leaf.grad is None
    with torch.no_grad():
        assert torch.equal(attack(model, x, Y).x_adv, plain)
        assert not torch.is_grad_enabled()


# ---------------------------------------------------------------- cost


@every_family_and_case
def test_costs_are_counted_and_grow_along_the_curve(case: Case, family: str, plain_run) -> None:
    result = plain_run(case, family)
    cost = result.cost
    assert cost.cell_evals > 0 and cost.wall_seconds > 0 and cost.peak_memory_mb > 0 and cost.solver_steps > 0
    assert (cost.cell_vjps == 0) == (case.name in GRADIENT_FREE)
    steps = [snapshot.step for snapshot in result.snapshots]
    assert steps == sorted(set(steps)) and steps[0] >= 1
    for name in ("cell_evals", "cell_vjps", "wall_seconds"):
        values = [getattr(snapshot, name) for snapshot in result.snapshots] + [getattr(cost, name)]
        assert values == sorted(values)


@every_case
def test_counts_are_those_of_the_cells_that_ran(case: Case, make) -> None:
    model, x = make("deq-fc")
    cell, rows = model.cell, []
    model.cell = lambda z, u: rows.append(len(z)) or cell(z, u)
    result = case.attack()(model, x, Y)
    num_unmetered = 2  # rows that show what the parts return, and whether there is a gradient
    assert result.cost.cell_evals == pytest.approx((sum(rows) - num_unmetered) / len(x))


@every_family
@pytest.mark.parametrize("steps", [5, 9])
@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_joint_step_costs_one_product_whatever_else_is_set(norm: Norm, steps: int, family: str, make) -> None:
    model, x = make(family)
    settings = {"steps": steps, "failure_residual": 1e6, "warmup_steps": 3}
    with torch.no_grad():
        size = model.initial_state(model.inject(x[:1])).numel()
    products = 0 if model.is_explicit else min(NUM_PRODUCTS, size)
    for changes, runs in (({}, 1), ({"inner_steps": 2}, 1), ({"inner_steps": None}, 1), ({"restarts": 3}, 3)):
        cost = Case("joint-pgd", norm).attack(**settings, **changes)(model, x, Y).cost
        if model.is_explicit and "inner_steps" in changes:  # no state, no adjoint: only moves of delta take a product
            assert runs <= cost.cell_vjps <= runs * steps
        else:
            assert cost.cell_vjps == runs * (steps + products)
        # the warm-up, where the contraction is estimated, every step, and the last look
        assert runs * (1 + 1 + steps + 1) <= cost.cell_evals <= runs * (3 + 1 + steps + 1)


@every_case
def test_more_steps_cost_more(case: Case, make) -> None:
    model, x = make("deq-fc")
    more = {"steps": 12} if case.has_steps else {"restarts": 20}
    alone = {"failure_residual": 1e6}  # what falls back costs more than what runs long
    few, many = (case.attack(**alone, **settings)(model, x, Y).cost for settings in ({}, more))
    assert many.cell_evals > few.cell_evals
    assert many.cell_vjps > few.cell_vjps or case.name in GRADIENT_FREE


@every_attack
def test_no_snapshots_unless_asked_for(name: str, make) -> None:
    model, x = make("deq-fc")
    case = next(case for case in CASES if case.name == name)
    plain, followed = case.attack()(model, x, Y), case.attack()(model, x, Y, num_snapshots=2)
    assert plain.snapshots == () and plain.residuals == ()
    assert 1 <= len(followed.snapshots) <= 2 * case.attack().config.restarts
    assert torch.equal(plain.x_adv, followed.x_adv)
    assert (plain.cost.cell_evals, plain.cost.cell_vjps) == (followed.cost.cell_evals, followed.cost.cell_vjps)


# ---------------------------------------------------------------- what it is for


def log_loss(model: EquilibriumModel, x: Tensor, classes: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), classes, reduction="none")


def loss_of(attack: Attack, model: EquilibriumModel, x: Tensor, classes: Tensor) -> Tensor:
    """By which the attack compares; the log-loss where it has none of ours."""
    if not isinstance(attack.config, ObjectiveConfig):
        return log_loss(model, x, classes)
    with torch.no_grad():
        return attack.config.bind(classes, None)(model(x))


@every_family_with_a_loss
def test_untargeted_runs_raise_the_loss(case: Case, family: str, make, plain_run) -> None:
    model, x = make(family)
    attack = case.attack()
    gain = loss_of(attack, model, plain_run(case, family).x_adv, Y) - loss_of(attack, model, x, Y)
    if case.name in GRADIENT_FREE:
        assert float(gain.mean()) > 0
    else:
        assert bool((gain > 0).all()), gain


@every_family_with_a_loss
def test_targeted_runs_lower_the_loss_of_the_target(case: Case, family: str, make, plain_run) -> None:
    model, x = make(family)
    targets = (Y + 1) % 3
    attack, blind = case.attack(steps=10, objective="cross-entropy"), plain_run(case, family).x_adv
    if not case.has_steps and case.name not in GRADIENT_FREE:  # one step, which goes down hill where the loss is linear
        attack = case.attack(EPSILON[case.norm] / 10, objective="cross-entropy")
        blind = attack(model, x, Y).x_adv
    aimed = attack(model, x, Y, targets=targets).x_adv
    found, unaimed = loss_of(attack, model, aimed, targets), loss_of(attack, model, blind, targets)
    assert float(found.mean()) < float(unaimed.mean())
    if case.name in GRADIENT_FREE:  # the same draws, of which it picks the best
        assert bool((found <= unaimed + 1e-6).all())
    else:
        assert bool((found < loss_of(attack, model, x, targets)).all())


@every_family_with_restarts
def test_restarts_keep_the_highest_loss(case: Case, family: str, make) -> None:
    model, x = make(family)
    attack, proposals = case.attack(restarts=3, random_start=True, steps=2, step_size=0.1), []  # none meet in a corner
    run = attack.run
    attack.run = lambda *arguments: proposals.append(run(*arguments)) or proposals[-1]
    result = attack(model, x, Y, num_snapshots=2)
    losses = torch.stack([proposal.loss for proposal in proposals])
    assert len(proposals) == 3 and len(set(losses[:, 0].tolist())) == 3  # the starts differ
    best = losses.argmax(0)
    expected = torch.stack([proposals[index].delta[row] for row, index in enumerate(best.tolist())])
    torch.testing.assert_close(result.delta, expected, rtol=0, atol=1e-12)
    steps = [snapshot.step for snapshot in result.snapshots]
    assert steps == sorted(set(steps))


@every_family_with_restarts
def test_restarts_never_lower_the_loss(case: Case, family: str, make) -> None:
    """The attack's own estimates choose; a state that has nearly settled makes them good to a hundredth. That of a
    joint attack takes its steps to settle, those of others are solved at each."""
    model, x = make(family)
    settings: dict[str, Any] = {"failure_residual": 1e-3, "tolerance": 1e-5, "objective": "cross-entropy"}
    if case.name.startswith("joint"):
        settings["steps"] = 40
    attacks = [case.attack(restarts=restarts, **settings) for restarts in (1, 4)]
    once, often = (loss_of(attack, model, attack(model, x, Y, seed=5).x_adv, Y) for attack in attacks)
    clean = loss_of(attacks[0], model, x, Y)
    assert bool((often - once >= -0.01 * (once - clean).abs().clamp_min(1.0)).all()), often - once


def test_a_restart_with_a_loss_of_nan_never_wins(make) -> None:
    model, x = make("deq-fc")
    attack, losses = Case("pgd", Norm.L2).attack(restarts=3), iter([torch.nan, 1.0, torch.nan])

    def run(model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        loss = next(losses)
        delta = torch.full_like(batch.images, 0.01 if loss == 1.0 else -0.01)
        return Proposal(delta, torch.full((len(batch),), loss))

    attack.run = run
    assert bool((attack(model, x, Y).delta >= 0).all())


# ---------------------------------------------------------------- what is refused

BAD = {
    "pixel above 1": (lambda x: x + 0.5, lambda y: y, "pixels in"),
    "pixel below 0": (lambda x: x - 0.5, lambda y: y, "pixels in"),
    "0 to 255": (lambda x: x * 255, lambda y: y, "divide by 255"),
    "NaN": (lambda x: x.where(x > 0.5, torch.nan), lambda y: y, "finite pixels"),
    "infinity": (lambda x: x.where(x > 0.5, torch.inf), lambda y: y, "finite pixels"),
    "one image": (lambda x: x[0], lambda y: y[:1], r"float tensor \(batch, 1, 4, 4\)"),
    "larger image": (lambda x: torch.nn.functional.pad(x, [1] * 4), lambda y: y, r"got float64 \(5, 1, 6, 6\)"),
    "three colours": (lambda x: x.expand(-1, 3, -1, -1), lambda y: y, r"got float64 \(5, 3, 4, 4\)"),
    "integers": (lambda x: (x > 0.5).long(), lambda y: y, "float tensor"),
    "too few labels": (lambda x: x, lambda y: y[:3], r"integer tensor \(5,\)"),
    "labels in a column": (lambda x: x, lambda y: y[:, None], r"integer tensor \(5,\)"),
    "float labels": (lambda x: x, lambda y: y.double(), "integer tensor"),
    "label too high": (lambda x: x, lambda y: y + 1, "classes 0 to 2"),
    "negative label": (lambda x: x, lambda y: y - 1, "classes 0 to 2"),
}


@every_attack
@pytest.mark.parametrize(("spoil_x", "spoil_y", "said"), BAD.values(), ids=BAD)
def test_input_that_does_not_fit_is_refused(name: str, spoil_x, spoil_y, said: str, make) -> None:
    model, x = make("deq-fc")
    footprint = Footprint(model)
    attack = next(case for case in CASES if case.name == name).attack()
    with pytest.raises(UsageError, match=said):
        attack(model, spoil_x(x), spoil_y(Y))
    footprint.check(model)


NO_GRADIENT = {
    "inject under no_grad": {"inject": torch.no_grad()},
    "state detached by the head": {"head": lambda head: lambda z: head(z.detach())},
    "cell that ignores the injection": {"cell": lambda cell: lambda z, u: cell(z, u.detach())},
    "everything under no_grad": {name: torch.no_grad() for name in ("inject", "cell", "head")},
}


@every_attack
@pytest.mark.parametrize("spoil", NO_GRADIENT.values(), ids=NO_GRADIENT)
def test_a_model_without_a_gradient_is_refused_but_by_attacks_that_need_none(name: str, spoil: dict, make) -> None:
    model, x = make("deq-fc")
    for part, change in spoil.items():
        setattr(model, part, change(getattr(model, part)))
    footprint = Footprint(model)
    attack = next(case for case in CASES if case.name == name).attack()
    if name in GRADIENT_FREE:
        assert bool(attack(model, x, Y).delta.any())
    else:
        said = r"model: expected a gradient with respect to the image .*, got none; run models MODEL"
        with pytest.raises(UsageError, match=said):
            attack(model, x, Y)
    footprint.check(model)


@every_attack
def test_a_thing_that_is_no_equilibrium_model_is_refused(name: str) -> None:
    attack = next(case for case in CASES if case.name == name).attack()
    with pytest.raises(UsageError, match="model: expected an EquilibriumModel, got Linear"):
        attack(torch.nn.Linear(3, 3), torch.rand(5, 1, 4, 4), Y)


@every_attack
def test_targets_that_do_not_fit_are_refused(name: str, make) -> None:
    model, x = make("deq-fc")
    attack = next(case for case in CASES if case.name == name).attack()
    for targets in (Y + 1, Y[:2], Y.double()):
        with pytest.raises(UsageError, match="labels: expected"):
            attack(model, x, Y, targets=targets)


@every_attack
def test_settings_are_typed_and_closed(name: str) -> None:
    kind = ATTACKS.get(name).config_type
    for bad in ({"restarts": 0}, {"restarts": "many"}, {"no_such_setting": 1}):
        with pytest.raises(pydantic.ValidationError):
            kind(**bad)
    if "steps" in kind.model_fields:
        for steps in (0, -1, 2.5):
            with pytest.raises(pydantic.ValidationError):
                kind(steps=steps)
    if "step_size" in kind.model_fields:
        for size in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(pydantic.ValidationError):
                kind(step_size=size)

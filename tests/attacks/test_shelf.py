"""Attacks of the shelf against what they are defined by, and against the same attacks of other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from robustbench_deq.adjoints import Unrolled, jacobian_free
from robustbench_deq.attacks import ATTACKS, build_attack
from robustbench_deq.attacks.apgd_t import TargetedAPGD
from robustbench_deq.attacks.pgd import SequentialPGDConfig
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.meter import Meter
from robustbench_deq.models import Linear
from robustbench_deq.models.explicit import ResNet
from robustbench_deq.optimise import (
    APGD,
    NORMS,
    Ball,
    Classification,
    Frozen,
    HighestLoss,
    Intermediate,
    Last,
    Norm,
    ProjectedAscent,
    Schedule,
    Solved,
    TowardDLR,
    optimise,
)
from robustbench_deq.optimise.objectives import CrossEntropy, Margin
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.solvers import Anderson, Picard, Solve
from robustbench_deq.threats import Threat
from tests.optimise.cases import LABELS, TIGHT, TIGHTLY, best_of_linear, slope

every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
TO_THE_END = {"stop_at_success": False}


@pytest.fixture
def affine(make_model, make_images) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """A model of two classes, images away from the box, their labels, and the margin's gradient."""
    model, x = make_model("test-linear", num_classes=2, rtol=1e-8), 0.4 + 0.2 * make_images(4)
    with torch.no_grad():
        y = model(x).argmax(1)
        return model, x, y, slope(model, x, y)


# ---------------------------------------------------------------- closed forms


CLIMBING = ["fgsm", "pgd", "apgd", "apgd-t", "yopo", "intermediate-pgd", "joint-pgd", "joint-apgd"]


@every_norm
@pytest.mark.parametrize("is_aimed", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", CLIMBING)
def test_the_optimum_of_a_linear_model_is_reached(name: str, is_aimed: bool, norm: Norm, affine) -> None:
    model, x, y, gradient = affine
    radius = {Norm.L1: 0.35, Norm.L2: 0.2, Norm.LINF: 0.05}[norm]
    kind = ATTACKS.get(name).config_type
    wanted = {"tolerance": 1e-8, "max_steps": 300, "objective": "margin", "steps": 120 if "joint" in name else 40}
    wanted |= {"steps_after": 40, "states": (2, 5), "ascents": 2, "failure_residual": 1e-3} | TO_THE_END
    if name == "apgd-t":
        del wanted["objective"]  # of two classes it is the margin
    settings = {key: value for key, value in wanted.items() if key in kind.model_fields}
    result = build_attack(name, Threat(norm, radius), settings)(model, x, y, targets=1 - y if is_aimed else None)
    best = best_of_linear(gradient, norm, radius)
    share = (gradient * result.delta).sum((1, 2, 3)) / (gradient * best).sum((1, 2, 3))
    assert bool((share > 0.999).all()) and bool((share <= 1 + 1e-6).all()), share


@every_norm
@pytest.mark.parametrize("is_aimed", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", ["fmn", "joint-fmn"])
def test_smallest_norms_are_within_two_percent(name: str, is_aimed: bool, norm: Norm, affine) -> None:
    model, x, y, gradient = affine
    with torch.no_grad():
        distance = -Margin(y)(model(x)) / norm.dual_size(gradient)
        share = (0.25 / distance.amax()).clamp_max(1.0) if norm is not Norm.LINF else torch.tensor(1.0)
        x = x + best_of_linear(gradient, norm, distance * (1 - share))  # nearer, where no box is in the way
        distance = -Margin(y)(model(x)) / norm.dual_size(gradient)
    threat, settings = Threat(norm, float(1.2 * distance.amax())), {"steps": 300 if "joint" in name else 100}
    result = build_attack(name, threat, settings)(model, x, y, targets=1 - y if is_aimed else None)
    with torch.no_grad():
        assert bool((model(result.x_adv).argmax(1) == 1 - y).all())
    ratio = norm.size(result.delta) / distance
    assert bool((ratio >= 1 - 1e-3).all()) and bool((ratio <= 1.02).all()), ratio


# ---------------------------------------------------------------- intermediate states


def gradient_of(source, model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and residual of the first look, in the middle of the ball."""
    problem = Classification(model, x, CrossEntropy(LABELS))
    look, _ = source.look(problem, source.start(problem, torch.zeros_like(x), None), torch.zeros_like(x), Moment(0, 1))
    return look.gradient, look.residual


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_gradient_is_that_of_the_states_by_hand(damping: float, make_model, make_images) -> None:
    model, x = make_model("deq-conv"), make_images(4)
    expected = torch.zeros_like(x)
    for state in (1, 3):
        leaf = x.clone().requires_grad_()
        u = model.inject(leaf)
        z = model.initial_state(u)
        for _ in range(state):
            z = model.cell(z, u)
        w = z.detach()
        for _ in range(2):
            w = (1 - damping) * w + damping * model.cell(w, u)
        expected += torch.autograd.grad(CrossEntropy(LABELS)(model.head(w)).sum(), leaf)[0]
    found, _ = gradient_of(Intermediate(2, (3, 1), damping), model, x)
    torch.testing.assert_close(found, expected)


def test_from_the_first_state_it_is_the_unrolled_network(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    cold = Solved(Solve(Picard(), rtol=1e-9, max_steps=5), Unrolled(5), is_warm=False)
    torch.testing.assert_close(gradient_of(Intermediate(5), model, x)[0], gradient_of(cold, model, x)[0])


def test_late_states_have_the_gradient_of_the_equilibrium(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    found = gradient_of(Intermediate(60, (40,), forward=TIGHT), model, x)[0]
    torch.testing.assert_close(found, gradient_of(TIGHTLY, model, x)[0], rtol=1e-6, atol=1e-8)


def test_what_is_compared_is_the_equilibrium_not_the_state(make_model, make_images) -> None:
    """An early state has another loss, and says so by its residual."""
    model, x = make_model("deq-conv"), make_images(4)
    problem, zero = Classification(model, x, Margin(LABELS)), torch.zeros_like(x)
    looks = []
    for forward in (None, TIGHT):
        source = Intermediate(1, (0, 1), forward=forward)
        look, state = source.look(problem, source.start(problem, zero, None), zero, Moment(0, 1))
        looks += [look, source.close(problem, state, zero)[0]]
    with torch.no_grad():
        true = Margin(LABELS)(model(x))
    for early, settled in zip(looks[:2], looks[2:], strict=True):
        assert bool((early.residual > 0.01).all()) and float((early.loss - true).abs().max()) > 1e-3
        assert bool((settled.residual <= TIGHT.rtol).all())
        torch.testing.assert_close(settled.loss, true, rtol=1e-6, atol=1e-8)


def test_only_the_evaluations_that_ran_are_counted(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    model.requires_grad_(False)
    with Meter(model) as meter:
        gradient_of(Intermediate(3, (2, 5), damping=0.5), model, x)
    assert (meter.eval_rows, meter.vjp_rows, meter.num_steps) == (4 * (5 + 2 * 3), 4 * 2 * 3, 4 * (5 + 2 * 3))


@pytest.mark.parametrize("states", [[], [1, 1], [-1], [5000]])
def test_states_that_make_no_sense_are_refused(states: list[int]) -> None:
    with pytest.raises(UsageError, match=r"attack intermediate-pgd: states"):
        build_attack("intermediate-pgd", Threat("l2", 0.5), {"states": states})


# ---------------------------------------------------------------- frozen states


def frozen(model, x: Tensor, num_looks: int) -> list[Tensor]:
    """The gradients of four looks along the way of small steps."""
    source, problem = Frozen(TIGHT, TIGHT, num_looks), Classification(model, x, Margin(LABELS))
    variable, gradients = torch.zeros_like(x), []
    state = source.start(problem, variable, None)
    for number in range(4):
        look, state = source.look(problem, state, variable, Moment(number, 4))
        gradients.append(look.gradient)
        variable = variable + 0.1 * look.gradient / look.gradient.flatten(1).norm(dim=1)[:, None, None, None]
    return gradients


def test_more_than_one_ascent_differs_from_one_where_the_cell_is_not_linear(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    first, second, third, _ = frozen(model, x, 2)
    exact = frozen(model, x, 1)
    torch.testing.assert_close(first, exact[0])
    assert float((second - first).abs().max()) > 1e-4  # df/dd is that of the moved image
    assert float((second - exact[1]).abs().max()) > 1e-4  # mu is not
    torch.testing.assert_close(third, gradient_at(model, x, [first, second]))


def gradient_at(model, x: Tensor, steps: list[Tensor]) -> Tensor:
    moved = sum(0.1 * step / step.flatten(1).norm(dim=1)[:, None, None, None] for step in steps)
    leaf = (x + moved).requires_grad_()
    return torch.autograd.grad(Margin(LABELS)(model(leaf)).sum(), leaf)[0]


def test_frozen_gradient_is_mu_times_the_derivative_of_the_cell(make_model, make_images) -> None:
    """By finite differences of `<mu, f(z, u(d))>`; on a cell that is linear in the input it does not move at all."""
    linear, x = make_model("test-linear"), make_images(4)
    first, second, *_ = frozen(linear, x, 4)
    torch.testing.assert_close(second, first)
    model = make_model("deq-fc")
    source, problem = Frozen(TIGHT, TIGHT, 4), Classification(model, x, Margin(LABELS))
    look, state = source.look(problem, source.start(problem, 0 * x, None), 0 * x, Moment(0, 4))
    at = 0.05 * look.gradient.sign()
    gradient = source.look(problem, state, at, Moment(1, 4))[0].gradient
    way = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        up, down = (
            (state.mu * model.cell(state.z, model.inject(x + at + sign * 1e-6 * way))).sum(1) for sign in (1, -1)
        )
    torch.testing.assert_close((gradient * way).sum((1, 2, 3)), (up - down) / 2e-6, rtol=1e-5, atol=1e-8)


def test_frozen_looks_cost_one_evaluation_and_one_product(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    model.requires_grad_(False)

    def cost(num_steps: int) -> tuple[int, int]:
        problem = Classification(model, x, Margin(LABELS))
        source, step = Frozen(TIGHT, TIGHT, 8), ProjectedAscent(0.1, Schedule.CONSTANT)
        with Meter(model) as meter:
            optimise(problem, source, Ball(Norm.L2, 0.1, x), step, Last(), 0 * x, num_steps=num_steps, settles=False)
        return meter.eval_rows, meter.vjp_rows

    once, often = cost(1), cost(8)
    assert (often[0] - once[0], often[1] - once[1]) == (7 * 4, 7 * 4)


# ---------------------------------------------------------------- apgd-t


def test_only_samples_that_are_left_go_on_to_the_next_class(make_model, make_images) -> None:
    """Every run is toward the next most likely class of the clean logits, on those that nothing has fooled."""
    model, x = make_model("deq-fc", rtol=1e-8, num_classes=4), make_images(12)
    with torch.no_grad():
        model.readout.bias.sub_(model(x).mean(0))
        logits = model(x)
    y = logits.argmax(1)
    attack = TargetedAPGD(Threat("l2", 0.25), steps=8, tolerance=1e-6)
    search, runs = attack.search, []

    def spied(model: Any, batch: Any, *rest: Any) -> Any:
        found = search(model, batch, *rest)
        runs.append((batch.ids.tolist(), rest[-1].classes.tolist(), found.is_done.tolist()))
        return found

    attack.search = spied
    clean = judge_clean(model, x, y).known(model, x, None)
    result = attack(model, x, y, clean=clean)
    order = logits.argsort(1, descending=True)[:, 1:]
    left = list(range(12))
    assert 1 < len(runs) <= 3
    for number, (ids, classes, is_done) in enumerate(runs):
        assert ids == left and classes == order[left, number].tolist()
        left = [sample for sample, done in zip(ids, is_done, strict=True) if not done]
    assert 0 < len(left) < 12
    with torch.no_grad():
        is_fooled = model(result.x_adv).argmax(1) != y
    assert not bool(is_fooled[left].any()) and int(is_fooled.sum()) == 12 - len(left)


def test_given_targets_there_is_one_run_and_only_they_count(make_model, make_images) -> None:
    model, x = make_model("deq-fc", rtol=1e-8), make_images(8)
    with torch.no_grad():
        model.readout.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    attack = TargetedAPGD(Threat("l2", 0.4), steps=10)
    runs, search = [], attack.search
    attack.search = lambda model, batch, *rest: runs.append(search(model, batch, *rest)) or runs[-1]
    result = attack(model, x, y, targets=(y + 1) % 3)
    assert len(runs) == 1
    with torch.no_grad():
        has_arrived = model(result.x_adv).argmax(1) == (y + 1) % 3
    assert torch.equal(runs[0].is_done, has_arrived) and 0 < int(has_arrived.sum()) < 8


# ---------------------------------------------------------------- parity with other libraries


@pytest.fixture(scope="module")
def explicit(make_model, make_images) -> tuple[ResNet, nn.Module, Tensor, Tensor]:
    """A residual network as a model, itself as what libraries take, images and labels."""
    model, x = make_model("resnet", rtol=1e-8), make_images(6)
    with torch.no_grad():
        model.readout.weight.mul_(20.0)
        y = model(x).argmax(1)

    class ScaleFree(nn.Module):
        """Logits at the temperature at which our cross-entropy takes them."""

        def forward(self, x: Tensor) -> Tensor:
            logits = model(x)
            return logits / (logits.detach().std(1, correction=0, keepdim=True) / 3.0)

    model.requires_grad_(False)
    return model, nn.Sequential(ScaleFree()).eval(), x, y


def ours(name: str, threat: Threat, case, **settings: Any) -> Tensor:
    model, _, x, y = case
    plain = {"objective": "cross-entropy", "tolerance": 1e-8} | TO_THE_END
    return build_attack(name, threat, plain | settings)(model, x, y).x_adv


def on(network: nn.Module) -> nn.Module:
    """With a parameter, which tells a library its device."""
    network.register_parameter("marker", nn.Parameter(torch.zeros(1)))
    return network


PGD_SETTINGS = {"steps": 10, "schedule": "constant"}


@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "settings", "theirs"),
    [
        ("fgsm", "linf", 0.05, {}, lambda n: torchattacks.FGSM(n, eps=0.05)),
        ("pgd", "linf", 0.05, PGD_SETTINGS | {"step_size": 0.2}, lambda n: torchattacks.PGD(n, 0.05, 0.01, 10, False)),
        ("pgd", "l2", 0.5, PGD_SETTINGS | {"step_size": 0.2}, lambda n: torchattacks.PGDL2(n, 0.5, 0.1, 10, False)),
    ],
    ids=["FGSM", "PGD", "PGDL2"],
)
def test_the_same_steps_as_torchattacks(
    name: str, norm: str, epsilon: float, settings: dict, theirs, explicit, monkeypatch
) -> None:
    """They return the last point, as ours is told to here; else it returns the one of the highest loss."""
    _, network, x, y = explicit
    monkeypatch.setattr(SequentialPGDConfig, "highest_loss", lambda self: Last())
    expected = theirs(on(network))(x, y)
    torch.testing.assert_close(ours(name, Threat(norm, epsilon), explicit, **settings), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "settings", "attack"),
    [
        ("fgsm", "linf", 0.05, {}, ("LinfFastGradientAttack", {})),
        ("fgsm", "l2", 0.5, {}, ("L2FastGradientAttack", {})),
        *(
            ("pgd", norm, epsilon, PGD_SETTINGS | {"step_size": 0.2}, (f"{kind}BasicIterativeAttack", {"steps": 10}))
            for norm, epsilon, kind in (("linf", 0.05, "Linf"), ("l2", 0.5, "L2"))
        ),
    ],
    ids=["FGSM", "FGM", "BIM", "L2BIM"],
)
def test_the_same_steps_as_foolbox(
    name: str, norm: str, epsilon: float, settings: dict, attack, explicit, monkeypatch
) -> None:
    foolbox = pytest.importorskip("foolbox", reason="the extra peers is missing")
    _, network, x, y = explicit
    monkeypatch.setattr(SequentialPGDConfig, "highest_loss", lambda self: Last())
    model = foolbox.PyTorchModel(on(network), bounds=(0, 1))
    kind, options = attack
    expected = getattr(foolbox.attacks, kind)(**options)(model, x, y, epsilons=epsilon)[1]
    torch.testing.assert_close(ours(name, Threat(norm, epsilon), explicit, **settings), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.5)])
def test_apgd_is_that_of_torchattacks_up_to_the_first_return(norm: str, epsilon: float, explicit) -> None:
    """From the point that theirs has drawn, both take the same steps up to the first checkpoint.

    From there on they differ on purpose: a row of ours that goes back to its best point has no momentum in its next
    step, while theirs keeps what has led away from it; and theirs halves at exactly three quarters of rises too.
    """
    model, network, x, y = explicit
    theirs, num_steps = torchattacks.APGD(on(network), norm=norm.capitalize(), eps=epsilon, steps=100), 100
    theirs_seen: list[Tensor] = []
    logits = theirs.get_logits
    theirs.get_logits = lambda images: theirs_seen.append(images.detach().clone()) or logits(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs.attack_single_run(x, y)
    ours_seen: list[Tensor] = []

    class Spied(Solved):
        def look(self, problem: Any, state: Any, variable: Tensor, moment: Moment) -> Any:
            ours_seen.append(x + variable)
            return super().look(problem, state, variable, moment)

    solve = Solve(Anderson(), rtol=1e-8, max_steps=10)
    ball, start = Ball(Norm.parse(norm), epsilon, x), theirs_seen[0] - x
    problem, keep = Classification(model, x, CrossEntropy(y)), HighestLoss(1e-6, 1e-6)
    found = optimise(problem, Spied(solve, jacobian_free()), ball, APGD(2.0), keep, start, num_steps=num_steps)
    first_checkpoint = 22
    for number in range(first_checkpoint + 1):
        torch.testing.assert_close(ours_seen[number], theirs_seen[number], rtol=0, atol=1e-6)
    assert float((ours_seen[22] - ours_seen[0]).abs().max()) > 0.3 * epsilon / (1 if norm == "linf" else 4)
    best = torch.stack([CrossEntropy(y)(model(point)) for point in theirs_seen]).amax(0)
    assert float(found.loss.mean()) > float(best.mean()) - 0.02 and float((found.loss - best).abs().max()) < 0.2


def test_targeted_dlr_is_that_of_torchattacks() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels, classes = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([6, 5, 4, 0, 1])
    attack = torchattacks.APGDT(nn.Linear(1, 1))
    torch.testing.assert_close(TowardDLR(labels, classes)(logits), attack.dlr_loss_targeted(logits, labels, classes))


def test_fooling_the_network_takes_what_cross_entropy_takes(explicit) -> None:
    """The parity above is of attacks that do something."""
    model, _, x, y = explicit
    before, after = (F.cross_entropy(model(images), y) for images in (x, ours("pgd", Threat("linf", 0.05), explicit)))
    assert float(after) > float(before) + 0.1

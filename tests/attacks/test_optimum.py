"""Attacks against what is known: closed forms on the affine model, other implementations, and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import Linear
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.optimise.objectives import CrossEntropy
from robustbench_deq.protocol import Attack, AttackResult
from robustbench_deq.threats import Threat
from tests.attacks.test_contract import SINGLE

EPSILON = {Norm.L1: 0.35, Norm.L2: 0.2, Norm.LINF: 0.05}
Y = torch.tensor([0, 1, 1, 0])


def build(name: str, norm: Norm, epsilon: float, **settings: Any) -> Attack:
    """Where nothing else is asked for, all samples are attacked to the end: the loss is looked at here."""
    kind = ATTACKS.get(name)
    return kind(Threat(norm, epsilon), kind.config_type(**{"stop_at_success": False, **settings}))


@pytest.fixture
def affine(make_model, make_images) -> tuple[Linear, Tensor]:
    """Two classes, so that the gradient of every loss has one direction; and images away from the limits of the box."""
    return make_model("test-linear", num_classes=2, rtol=1e-8), 0.4 + 0.2 * make_images(4)


def slope(model: Linear, y: Tensor, x: Tensor) -> Tensor:
    """The margin's gradient with respect to the image."""
    matrix = model.input_matrix().detach()
    return (matrix[1 - y] - matrix[y]).view_as(x)


def optimum(model: Linear, x: Tensor, norm: Norm) -> Tensor:
    gradient = slope(model, Y, x)
    if norm is Norm.LINF:
        return EPSILON[norm] * gradient.sign()
    if norm is Norm.L1:  # all of it on the pixel of the largest gradient, which has the room
        best = F.one_hot(gradient.flatten(1).abs().argmax(1), gradient[0].numel()).to(gradient)
        return EPSILON[norm] * best.view_as(gradient) * gradient.sign()
    return EPSILON[norm] * gradient / Norm.L2.size(gradient)[:, None, None, None]


def share_of_optimum(model: Linear, x: Tensor, result: AttackResult, norm: Norm) -> Tensor:
    """The margin gained, as a fraction of the most that can be gained."""
    gradient = slope(model, Y, x)
    return (gradient * result.delta).sum((1, 2, 3)) / (gradient * optimum(model, x, norm)).sum((1, 2, 3))


def loss_of(model: EquilibriumModel, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy that attacks ascend."""
    with torch.no_grad():
        return CrossEntropy(y)(model(x))


# ---------------------------------------------------------------- closed form


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("objective", ["margin", "cross-entropy"])
@pytest.mark.parametrize("inner_steps", [1, 3, None])
def test_joint_reaches_the_known_optimum(inner_steps: int | None, objective: str, norm: Norm, affine) -> None:
    model, x = affine
    settings = {"steps": 120, "inner_steps": inner_steps, "objective": objective, "failure_residual": 1e-3}
    result = build("joint-pgd", norm, EPSILON[norm], **settings)(model, x, Y)
    assert result.diagnostics["num_finished"] == result.diagnostics["num_lagging"] == 0
    share = share_of_optimum(model, x, result, norm)
    assert bool((share > 0.999).all()) and bool((share <= 1 + 1e-9).all()), share


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("solver", ["picard", "damped-picard", "anderson", "anderson-1", "broyden", "newton-krylov"])
def test_pgd_reaches_the_known_optimum_with_every_solver(solver: str, is_warm: bool, norm: Norm, affine) -> None:
    model, x = affine
    settings = {"objective": "margin", "solver": solver, "warm_start": is_warm, "tolerance": 1e-8, "max_steps": 300}
    result = build("pgd", norm, EPSILON[norm], **settings)(model, x, Y)
    torch.testing.assert_close(result.delta, optimum(model, x, norm), rtol=0, atol=1e-6)
    none = dict.fromkeys(("unconverged_forward_solves", "unconverged_adjoint_solves", "num_zero_gradient"), 0)
    assert result.diagnostics == none


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize(
    ("adjoint", "least"), [("unrolled", 1 - 1e-6), ("neumann", 0.9999), ("phantom", 0.8), ("jacobian-free", 0.7)]
)
def test_pgd_with_other_adjoints_comes_as_near_as_its_gradient(adjoint: str, least: float, norm: Norm, affine) -> None:
    model, x = affine
    settings = {"objective": "margin", "adjoint": adjoint, "tolerance": 1e-8, "max_steps": 300, "steps": 40}
    result = build("pgd", norm, EPSILON[norm], **settings)(model, x, Y)
    share = share_of_optimum(model, x, result, norm)
    if norm is Norm.L2 or adjoint in ("unrolled", "neumann"):
        assert bool((share > least).all()), share
    else:
        assert bool((share > 0).all()), share
    assert bool((share <= 1 + 1e-9).all())
    if adjoint == "jacobian-free" and norm is Norm.L2:  # a biased gradient shows
        assert float(share.max()) < 0.999


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_pgd_moves_samples_whose_solves_never_converge(norm: Norm, affine) -> None:
    model, x = affine
    settings = {"tolerance": 1e-12, "max_steps": 3, "solver": "picard", "warm_start": False, "objective": "margin"}
    result = build("pgd", norm, EPSILON[norm], **settings)(model, x, Y)
    assert result.diagnostics["unconverged_forward_solves"] > 0
    assert bool(torch.isneginf(result.loss).all())
    share = share_of_optimum(model, x, result, norm)
    assert bool((share > 0.9).all()), share


def test_adjoint_has_a_solver_and_a_tolerance_of_its_own(affine) -> None:
    model, x = affine
    settings = {"tolerance": 1e-8, "max_steps": 300, "steps": 3, "warm_start": False, "solver": "picard"}
    cheap = {"adjoint_solver": "anderson", "adjoint_tolerance": 0.5, "adjoint_max_steps": 2}
    full, short = (build("pgd", Norm.L2, 0.2, **settings, **more)(model, x, Y) for more in ({}, cheap))
    assert short.cost.cell_vjps == pytest.approx(3 * (2 + 1), abs=3.001)
    assert full.cost.cell_vjps > 3 * short.cost.cell_vjps
    assert full.cost.cell_evals == pytest.approx(short.cost.cell_evals, rel=0.2)
    stopped = build("pgd", Norm.L2, 0.2, **settings, adjoint_max_steps=2)(model, x, Y)
    assert stopped.diagnostics["unconverged_adjoint_solves"] == 3 * 4
    assert stopped.diagnostics["unconverged_forward_solves"] == 0


@pytest.mark.parametrize(("name", "norm"), [("torchattacks-pgd", Norm.LINF), ("torchattacks-pgdl2", Norm.L2)])
def test_torchattacks_reaches_the_known_optimum(name: str, norm: Norm, affine) -> None:
    model, x = affine
    result = build(name, norm, EPSILON[norm])(model, x, Y)
    torch.testing.assert_close(result.delta, optimum(model, x, norm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_noise_stays_below_the_known_optimum(norm: Norm, affine) -> None:
    model, x = affine
    result = build("noise", norm, EPSILON[norm], objective="margin")(model, x, Y)
    share = share_of_optimum(model, x, result, norm)
    assert bool((share > 0).all()) and bool((share < 0.95).all()), share
    size = norm.size(result.delta)
    torch.testing.assert_close(size, torch.full_like(size, EPSILON[norm]))  # on the boundary of the ball


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_targeted_optimum_is_the_opposite_one(name: str, affine) -> None:
    model, x = affine
    result = build(name, Norm.L2, 0.2, steps=120)(model, x, Y, targets=Y)
    share = share_of_optimum(model, x, result, Norm.L2)
    assert bool((share < -0.99).all()), share


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_optimum_in_a_corner_of_the_box_is_cut(name: str, make_model, make_images) -> None:
    """Linf with half of the pixels on the limits: the optimum is the clipped one."""
    model = make_model("test-linear", num_classes=2, rtol=1e-8)
    x = make_images(4).round()
    result = build(name, Norm.LINF, 0.05, objective="margin", steps=120)(model, x, Y)
    best = (x + 0.05 * slope(model, Y, x).sign()).clamp(0, 1) - x
    gained, most = ((slope(model, Y, x) * delta).sum((1, 2, 3)) for delta in (result.delta, best))
    assert bool((gained > 0.99 * most).all())


# ---------------------------------------------------------------- each other


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("family", ["deq-fc", "mondeq-fc"])
def test_joint_and_sequential_agree_after_long_runs(family: str, norm: Norm, make_model, make_images) -> None:
    model, x, y = make_model(family, rtol=1e-8), make_images(4), torch.tensor([0, 1, 2, 0])
    epsilon = {Norm.L1: 0.6, Norm.L2: 0.3, Norm.LINF: 0.05}[norm]
    joint = build("joint-pgd", norm, epsilon, steps=200, failure_residual=1e-3, objective="cross-entropy")
    settings = {"steps": 100, "step_size": 0.5, "tolerance": 1e-7, "max_steps": 300, "objective": "cross-entropy"}
    sequential = build("pgd", norm, epsilon, **settings)
    clean, one, other = (
        loss_of(model, images, y) for images in (x, joint(model, x, y).x_adv, sequential(model, x, y).x_adv)
    )
    assert bool((other > clean).all())
    torch.testing.assert_close((one - clean) / (other - clean), torch.ones_like(clean), rtol=0, atol=0.01)


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_noise_is_weaker_than_gradients(family: str, norm: Norm, make_model, make_images) -> None:
    model, x, y = make_model(family, rtol=1e-8), make_images(4), torch.tensor([0, 1, 2, 0])
    epsilon = {Norm.L1: 1.0, Norm.L2: 0.5, Norm.LINF: 0.06}[norm]
    names = ("noise", "pgd", "joint-pgd")
    attacks = {name: build(name, norm, epsilon, objective="cross-entropy") for name in names}
    loss = {name: loss_of(model, attack(model, x, y).x_adv, y) for name, attack in attacks.items()}
    assert bool((loss["noise"] < loss["pgd"]).all()) and bool((loss["noise"] < loss["joint-pgd"]).all())


@pytest.mark.parametrize("name", SINGLE)
def test_attacked_accuracy_is_at_most_the_clean_one(name: str, make_model, make_images) -> None:
    model, x = make_model("deq-fc", dtype=torch.float32, rtol=1e-4), make_images(24, torch.float32)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::4] = (y[::4] + 1) % 3
    norm = Norm.LINF if name == "torchattacks-pgd" else Norm.L2
    data = Split("mine", SplitName.TEST, x, y, torch.arange(24), "digest")
    accuracy = [evaluate(model, build(name, norm, epsilon), data).record for epsilon in (0.0, 0.1, 1.0)]
    assert accuracy[0].clean_accuracy == 0.75
    assert [record.clean_accuracy for record in accuracy] == [0.75] * 3
    assert accuracy[0].robust_accuracy == 0.75
    assert accuracy[0].robust_accuracy >= accuracy[1].robust_accuracy >= accuracy[2].robust_accuracy
    assert accuracy[2].robust_accuracy < 0.75


# ---------------------------------------------------------------- torchattacks


def input_gradient(model: EquilibriumModel, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_gradient_that_torchattacks_follows_is_that_of_finite_differences(family: str, make_model, make_images) -> None:
    model, x, y = make_model(family, seed=4), make_images(3), torch.tensor([0, 1, 2])
    library = torchattacks.PGDL2(model, eps=1.0, alpha=1e-3, steps=1, random_start=False)
    inside = 0.1 + 0.8 * x
    step = (library(inside, y) - inside) / 1e-3  # g / ||g||, as long as no limit is met
    assert not model.training
    numeric = torch.zeros_like(x)
    with torch.no_grad():
        for pixel in range(16):
            shift = torch.zeros(16, dtype=x.dtype)
            shift[pixel] = 1e-5
            up, down = (
                F.cross_entropy(model(inside + sign * shift.view(1, 1, 4, 4)), y, reduction="none") for sign in (1, -1)
            )
            numeric.view(3, 16)[:, pixel] = (up - down) / 2e-5
    numeric /= Norm.L2.size(numeric)[:, None, None, None]
    torch.testing.assert_close(step, numeric, rtol=0, atol=1e-4)


def test_torchattacks_on_an_equilibrium_is_the_loop_written_by_hand(make_model, make_images) -> None:
    """By hand with the affine model's closed-form logits, images on the limits of the box included."""
    model, x, y = make_model("test-linear", rtol=1e-10), make_images(4), torch.tensor([0, 1, 2, 0])
    x[:, :, 0] = x[:, :, 0].round()
    epsilon, alpha, steps = 0.5, 0.2, 6
    matrix = model.input_matrix().detach()
    with torch.no_grad():
        offset = model(torch.zeros_like(x[:1]))
    delta = torch.zeros_like(x)
    for _ in range(steps):
        logits = (x + delta).flatten(1) @ matrix.mT + offset
        gradient = ((logits.softmax(1) - F.one_hot(y, 3)) @ matrix).view_as(x)
        delta = delta + alpha * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        delta = delta * (epsilon / delta.flatten(1).norm(dim=1)).clamp_max(1.0)[:, None, None, None]
        delta = (x + delta).clamp(0, 1) - x
    expected = x + delta
    library = torchattacks.PGDL2(model, eps=epsilon, alpha=alpha, steps=steps, random_start=False)
    torch.testing.assert_close(library(x, y), expected, rtol=0, atol=1e-6)
    ours = build("torchattacks-pgdl2", Norm.L2, epsilon, steps=steps, step_size=alpha / epsilon)(model, x, y)
    torch.testing.assert_close(ours.x_adv, expected, rtol=0, atol=1e-6)


class Explicit(EquilibriumModel):
    """An ordinary network of one hidden layer as a model whose cell is constant: `f(z, u) = u`."""

    input_shape, num_classes = (1, 4, 4), 3

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, hidden), nn.Linear(hidden, 3)

    def inject(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x.flatten(1)))

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u

    def head(self, z: Tensor) -> Tensor:
        return self.last(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


class ExplicitWithState(Explicit):
    """The same, with a cell that names the state."""

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u + 0 * z


@pytest.fixture
def explicit() -> tuple[Explicit, nn.Module]:
    """`(model, network)`: the same function as an equilibrium model and as a plain network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExplicitWithState().double().eval()
    network = nn.Sequential(nn.Flatten(), model.first, nn.Tanh(), model.last)
    return model, network


class ScaleFree(nn.Module):
    """Divides logits by a third of their own spread: the log-loss of these points where our cross-entropy does."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits / (logits.detach().std(1, correction=0, keepdim=True) / 3.0)


@pytest.mark.parametrize("norm", [Norm.L2, Norm.LINF], ids=repr)  # the library has no L1
@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "cold"])
def test_pgd_on_an_explicit_network_agrees_with_torchattacks(is_warm: bool, norm: Norm, explicit, make_images) -> None:
    model, network = explicit
    x, y = 0.2 + 0.6 * make_images(4), torch.tensor([0, 1, 2, 0])
    epsilon, alpha = {Norm.L2: (0.4, 0.06), Norm.LINF: (0.08, 0.011)}[norm]
    kind = {Norm.L2: torchattacks.PGDL2, Norm.LINF: torchattacks.PGD}[norm]
    scale_free = nn.Sequential(network, ScaleFree())
    expected = kind(scale_free, eps=epsilon, alpha=alpha, steps=10, random_start=False)(x, y)
    settings = {
        "steps": 10,
        "step_size": alpha / epsilon,
        "schedule": "constant",
        "warm_start": is_warm,
        "tolerance": 1e-8,
        "objective": "cross-entropy",
    }
    result = build("pgd", norm, epsilon, **settings)(model, x, y)
    torch.testing.assert_close(result.x_adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SINGLE)
def test_a_cell_that_does_not_look_at_its_state_is_a_cell(name: str, explicit, make_images) -> None:
    """`f(z, u) = u`: autograd finds no path from the state to the cell."""
    other, _ = explicit
    model = Explicit().double().eval()
    model.load_state_dict(other.state_dict())
    x, y = make_images(4), torch.tensor([0, 1, 2, 0])
    norm = Norm.LINF if name == "torchattacks-pgd" else Norm.L2
    for settings in ({}, {"inner_steps": 3}) if name == "joint-pgd" else ({},):
        one, expected = (build(name, norm, 0.1, **settings)(each, x, y).x_adv for each in (model, other))
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-9)


def test_gradient_is_not_lost_in_eval_mode(make_model, make_images) -> None:
    model, x, y = make_model("deq-conv"), make_images(3), torch.tensor([0, 1, 2])
    in_eval = input_gradient(model.eval(), x, y)
    in_train = input_gradient(model.train(), x, y)
    assert float(in_eval.abs().max()) > 1e-5
    torch.testing.assert_close(in_eval, in_train)

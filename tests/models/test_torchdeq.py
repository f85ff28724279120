"""Models of the torchdeq library itself, and what `from_torchdeq` makes of them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.models import from_torchdeq
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import frozen
from robustbench_deq.solvers import Anderson, Broyden, Picard
from robustbench_deq.threats import Threat

torchdeq = pytest.importorskip("torchdeq")

SHAPE, NUM_CLASSES = (1, 4, 4), 3
TIGHT = {"f_max_iter": 300, "b_max_iter": 300, "f_tol": 1e-13, "b_tol": 1e-13, "f_stop_mode": "rel"}
TIGHT |= {"b_stop_mode": "rel", "ift": True}


class Layer(nn.Module):
    """`tanh(conv(z) + u) / 2`, a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.conv(z) + u)


class ConvNet(nn.Module):
    """One convolutional state, written as torchdeq's users write it."""

    def __init__(self, norm_type: str = "none", **settings: object) -> None:
        super().__init__()
        self.encode, self.layer = nn.Conv2d(1, 3, 3, padding=1), Layer()
        self.decode = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, NUM_CLASSES))
        self.deq = torchdeq.get_deq(**{**TIGHT, **settings})
        torchdeq.apply_norm(self.layer, norm_type=norm_type)

    def forward(self, x: Tensor) -> Tensor:
        torchdeq.reset_deq(self)
        u = self.encode(x)
        states, _ = self.deq(lambda z: self.layer(z, u), torch.zeros_like(u))
        return self.decode(states[-1])


class ListNet(nn.Module):
    """Two states of different sizes that look at each other, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 5)
        self.first, self.second = nn.Linear(2, 5), nn.Linear(5, 2)
        self.readout = nn.Linear(2, NUM_CLASSES)
        self.deq = torchdeq.get_deq(**TIGHT)

    def encode(self, x: Tensor) -> list[Tensor]:
        u = self.stem(x.flatten(1))
        return [u, u[:, :2] * 0.5]

    def mix(self, z: tuple[Tensor, Tensor], u: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [0.5 * torch.tanh(self.first(z[1]) + u[0]), 0.5 * torch.sin(self.second(z[0]) + u[1])]

    def decode(self, z: tuple[Tensor, Tensor]) -> Tensor:
        return self.readout(z[1]) + z[0][:, :NUM_CLASSES]

    def forward(self, x: Tensor) -> Tensor:
        torchdeq.reset_deq(self)
        u = self.encode(x)
        states, _ = self.deq(lambda *z: self.mix(z, u), [torch.zeros_like(part) for part in u])
        return self.decode(states[-1])


def conv_net(norm_type: str = "none", **settings: object) -> ConvNet:
    return seeded(lambda: ConvNet(norm_type, **settings))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build().double().train()
    for _ in range(500):  # spectral normalisation takes one power iteration at each reset
        torchdeq.reset_deq(module)
    return module


def adapt(module: nn.Module, **parts: object) -> EquilibriumModel:
    names = {"inject": "encode", "cell": "mix" if isinstance(module, ListNet) else "layer", "head": "decode"}
    return from_torchdeq(module, **{**names, "input_shape": SHAPE, "num_classes": NUM_CLASSES, **parts})


NETS = {
    "plain": conv_net,
    "weight-norm": lambda: conv_net("weight_norm"),
    "spectral-norm": lambda: conv_net("spectral_norm"),
    "list": lambda: seeded(ListNet),
}
every_net = pytest.mark.parametrize("net", list(NETS))


@every_net
def test_logits_are_those_of_torchdeq(net: str, make_images) -> None:
    module, x = NETS[net](), make_images(5)
    model = adapt(module)
    with torch.no_grad():
        solution = model.equilibrium(x)
        theirs = module(x)
    assert bool(solution.is_converged.all())
    torch.testing.assert_close(model(x).detach(), theirs, rtol=1e-10, atol=1e-10)


@every_net
def test_gradients_are_those_of_torchdeq(net: str, make_images) -> None:
    module, x = NETS[net](), make_images(5)
    y = torch.tensor([0, 1, 2, 1, 0])
    leaf = x.clone().requires_grad_()
    F.cross_entropy(module(leaf), y).backward()  # in training mode: in evaluation theirs is cut off
    theirs = {"x": leaf.grad} | {name: part.grad.clone() for name, part in module.named_parameters()}
    module.zero_grad()
    model, leaf = adapt(module), x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y).backward()
    ours = {"x": leaf.grad} | {name: part.grad for name, part in module.named_parameters()}
    assert float(ours["x"].abs().max()) > 1e-3
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10)


@every_net
@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_attacks_run_on_it(net: str, name: str, make_images) -> None:
    model, x, y = adapt(NETS[net]()), make_images(6), torch.tensor([0, 1, 2, 1, 0, 2])
    threat = Threat(Norm.L2, 0.5)
    kind = ATTACKS.get(name)
    result = kind(threat, kind.config_type(steps=10, stop_at_success=False))(model, x, y, seed=0)
    size = torch.linalg.vector_norm((result.x_adv - x).flatten(1), dim=1)
    assert float(size.max()) <= 0.5 + 1e-9 and 0.0 <= float(result.x_adv.min()) <= float(result.x_adv.max()) <= 1.0
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(model(images), y, reduction="none") for images in (x, result.x_adv))
    assert bool((attacked > clean).all())


def test_normalised_weights_follow_their_parameters(make_images) -> None:
    model, x = adapt(conv_net("weight_norm")), make_images(2)
    with torch.no_grad():
        before = model(x)
        model.module.layer.conv.weight_g.mul_(0.1)
        assert float((model(x) - before).abs().max()) > 1e-3


def test_parts_may_be_functions_of_the_module(make_images) -> None:
    module, x = conv_net(), make_images(3)
    parts = {"cell": lambda net, z, u: net.layer(z, u), "initial_state": lambda net, u: torch.ones_like(u)}
    named, given = adapt(module), adapt(module, **parts)
    with torch.no_grad():
        assert bool((given.initial_state(given.inject(x)) == 1).all())
        torch.testing.assert_close(given(x), named(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_type", ["none", "weight_norm", "spectral_norm"])
def test_a_copy_is_independent(norm_type: str, make_images) -> None:
    model, x = adapt(conv_net(norm_type)), make_images(2)
    logits = model(x)  # with gradients: the normalised weights now have a graph
    twin = copy.deepcopy(model).float()
    torch.testing.assert_close(twin(x.float()), logits.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(x), logits, rtol=1e-10, atol=1e-10)


def test_samples_do_not_interact(make_images) -> None:
    model, x = adapt(seeded(ListNet)), make_images(5)
    with torch.no_grad(), frozen(model):
        torch.testing.assert_close(model(x[2:3]), model(x)[2:3], rtol=1e-10, atol=1e-10)


def test_settings_are_those_of_the_module() -> None:
    settings = {"f_solver": "anderson", "b_solver": "broyden", "f_tol": 1e-2, "b_tol": 1e-3, "eval_factor": 2.0}
    model = adapt(conv_net(**settings))
    assert model.solve.solver == Anderson() and model.adjoint.backward.solver == Broyden()
    assert (model.solve.rtol, model.solve.max_steps) == (1e-2, 600)
    assert (model.adjoint.backward.rtol, model.adjoint.backward.max_steps) == (1e-3, 300)
    absolute = adapt(conv_net(f_stop_mode="abs", f_tol=1e-2, b_stop_mode="abs", b_tol=1e-6))
    assert absolute.solve.solver == Picard()
    assert (absolute.solve.rtol, absolute.adjoint.backward.rtol) == (EquilibriumModel.solve.rtol, 1e-6)


class Nothing(nn.Module):
    encode = decode = layer = staticmethod(torch.sigmoid)


def own_solver(func: Callable, x0: Tensor, **settings: object) -> tuple:
    raise NotImplementedError


def with_own_solver() -> nn.Module:
    module = conv_net()
    module.deq.f_solver = own_solver
    return module


@pytest.mark.parametrize(
    ("build", "parts", "message"),
    [
        (Nothing, {}, "from_torchdeq: expected a module that holds one torchdeq DEQ object, got 0 of them; "),
        (
            lambda: nn.ModuleDict({"a": conv_net(), "b": conv_net()}),
            {},
            "from_torchdeq: expected a module that holds one torchdeq DEQ object, got 2 of them; ",
        ),
        (lambda: torch.tanh, {}, "from_torchdeq: expected a torch.nn.Module, got builtin_function_or_method; "),
        (conv_net, {"cell": "lyer"}, "from_torchdeq: cell: expected a method or submodule, got 'lyer'; "),
        (conv_net, {"head": 3}, "from_torchdeq: head: expected a method or submodule, got 3; "),
        (
            conv_net,
            {"cell": lambda net, z, u: z[:, :1]},
            "from_torchdeq: cell: expected as initial_state, a tensor (2, 3, 4, 4), got a tensor (2, 1, 4, 4); ",
        ),
        (
            conv_net,
            {"cell": lambda net, z, u: [z]},
            "from_torchdeq: cell: expected as initial_state, a tensor (2, 3, 4, 4), got a list of (2, 3, 4, 4); ",
        ),
        (
            conv_net,
            {"num_classes": 7},
            "from_torchdeq: head: expected a tensor (2, 7) for a batch of 2, got a tensor (2, 3); ",
        ),
        (
            conv_net,
            {"input_shape": (1, 5, 5)},
            "from_torchdeq: head: expected a part that takes a batch of images (1, 5, 5) and what comes of them, ",
        ),
        (with_own_solver, {}, "from_torchdeq: f_solver: expected one of fixed_point_iter, "),
        (lambda: conv_net(f_tol=0.0), {}, "tolerance: expected a number > 0, got 0.0; "),
    ],
    ids=[
        "no-deq",
        "two-deqs",
        "no-module",
        "name",
        "number",
        "cell-shape",
        "cell-list",
        "classes",
        "images",
        "solver",
        "tolerance",
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], nn.Module], parts: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        adapt(build(), **parts)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_missing_torchdeq_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = conv_net()
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(UsageError, match=r"expected the package torchdeq, got none; pip install .*\[peers\]"):
        adapt(module)

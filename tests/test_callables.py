"""Models from functions: modules that hide behind them are found, and states of several tensors are packed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustbench_deq.attacks import build_attack
from robustbench_deq.callables import Packing, modules_behind
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat

SIZES = {"input_shape": (1, 4, 4), "num_classes": 3}
GLOBAL = nn.Linear(2, 2)


class Holder:
    """An object that is no module and has one."""

    def __init__(self, net: nn.Module) -> None:
        self.nets = {"one": [net]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.nets["one"][0](x)

    def call(self, x: Tensor) -> Tensor:
        return self(x)


def with_default(x: Tensor, net: nn.Module = GLOBAL) -> Tensor:
    return net(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


def calls_another(x: Tensor) -> list[Tensor]:
    return [uses_a_global(row) for row in x]


def uses_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


@pytest.mark.parametrize(
    "hide",
    [
        lambda net: net,
        lambda net: net.forward,
        lambda net: lambda x: net(x),
        lambda net: lambda x: (lambda y: net(y))(x),
        lambda net: functools.partial(lambda part, x: part(x), net),
        lambda net: Holder(net),
        lambda net: Holder(net).call,
        lambda net: (lambda holder: lambda x: holder(x))(Holder(net)),
        lambda net: (lambda nets: lambda x: nets[0][0](x))([(net,)]),
        lambda net: type("OfClass", (), {"net": net, "call": lambda self, x: self.net(x)})().call,
        lambda net: type("OfClass", (), {"net": net, "call": classmethod(lambda cls, x: cls.net(x))}).call,
        lambda net: type("Called", (), {"__call__": lambda self, x: net(x)})(),
        lambda net: Slotted(net),
    ],
)
def test_a_module_is_found_wherever_a_function_keeps_it(hide: Callable) -> None:
    net = nn.Linear(2, 2)
    assert modules_behind(hide(net), hide(net)) == [net]


@pytest.mark.parametrize("function", [with_default, uses_a_global, calls_another])
def test_globals_and_defaults_are_looked_at(function: Callable) -> None:
    assert modules_behind(function) == [GLOBAL]


def test_a_function_that_uses_none_hides_none() -> None:
    empty: list[object] = []
    empty.append(empty)
    assert modules_behind(lambda x: torch.nn.functional.relu(x), torch.tanh, empty, None, 3, nn.Linear) == []


class Net(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.w, self.r = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.norm = nn.Dropout(drop), nn.BatchNorm1d(6)


def test_hidden_modules_are_in_evaluation_mode_and_the_models_own(make_images) -> None:
    net, x = Net(0.5), make_images(4, torch.float32)
    model = EquilibriumModel.from_callables(
        lambda x: net.a(x.flatten(1)),
        lambda z, u: torch.tanh(net.drop(net.w(z)) / 2 + u),
        lambda z: net.r(net.norm(z)),
        **SIZES,
    )
    assert not net.drop.training and set(model.parameters()) == set(net.parameters())
    net.train()
    before = net.norm.running_mean.clone()
    y = judge(model.eval(), x, torch.zeros(4, dtype=torch.int64)).prediction
    build_attack("pgd", Threat(Norm.L2, 0.1), {"steps": 2})(model.train(), x, y)
    assert torch.equal(net.norm.running_mean, before)


class Hides(EquilibriumModel):
    """Its cell uses a module that it does not hold."""

    input_shape, num_classes = SIZES["input_shape"], SIZES["num_classes"]

    def __init__(self, net: Net, is_listed: bool) -> None:
        super().__init__()
        self.nets = [net] if is_listed else None
        self.drop = lambda z: net.drop(z)

    def inject(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :6]

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.drop(z) / 2 + u)

    def head(self, z: Tensor) -> Tensor:
        return z[:, :3]

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_module_that_stays_in_train_mode_is_refused_with_the_cure(is_listed: bool, make_images) -> None:
    net, x = Net(0.5), make_images(4, torch.float32)
    model, y = Hides(net, is_listed).eval(), torch.zeros(4, dtype=torch.int64)
    attack = build_attack("noise", Threat(Norm.L2, 0.1), {})
    with pytest.raises(UsageError, match=r"model: expected every module .* got a Net in train mode .*eval\(\)"):
        attack(model, x, y)
    net.eval()
    attack(model, x, y)


def branches(a: nn.Module, w: nn.Module, r: nn.Module, is_packed: bool) -> EquilibriumModel:
    """Two branches of five and four entries, as a tuple of tensors, or packed by hand."""

    def inject(x: Tensor) -> tuple[Tensor, Tensor]:
        return a(x.flatten(1)), x.flatten(2)[:, :, :4].transpose(1, 2)

    def cell(z: tuple[Tensor, Tensor], u: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        one, other = torch.tanh(w(torch.cat([z[0], z[1].flatten(1)], 1))).split([5, 4], 1)
        return one / 2 + u[0], other[:, :, None] / 2 + u[1]

    def head(z: tuple[Tensor, Tensor]) -> Tensor:
        return r(torch.cat([z[0], z[1].flatten(1)], 1))

    if not is_packed:
        return EquilibriumModel.from_callables(inject, cell, head, **SIZES)
    join = lambda parts: torch.cat([parts[0], parts[1].flatten(1)], 1)  # noqa: E731
    cut = lambda z: (z[:, :5], z[:, 5:, None])  # noqa: E731
    return EquilibriumModel.from_callables(
        lambda x: join(inject(x)), lambda z, u: join(cell(cut(z), cut(u))), lambda z: head(cut(z)), **SIZES
    )


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_a_state_of_several_tensors_is_that_packed_by_hand(name: str, make_images) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(16, 5).double(), nn.Linear(9, 9).double(), nn.Linear(9, 3).double()
    ours, other, x = branches(*layers, False), branches(*layers, True), make_images(5)
    y = judge(other, x, torch.zeros(5, dtype=torch.int64)).prediction
    attack = build_attack(name, Threat(Norm.L2, 0.2), {"steps": 5})
    results = [attack(model, x, y) for model in (ours, other)]
    assert torch.equal(results[0].x_adv, results[1].x_adv) and bool(results[0].delta.any())
    assert all(map(torch.equal, judge(ours, x, y).parts(), judge(other, x, y).parts()))


def test_the_shapes_of_a_state_are_known_before_a_part_is_called(make_images) -> None:
    layers = nn.Linear(16, 5), nn.Linear(9, 9), nn.Linear(9, 3)
    z, u = torch.randn(2, 3, 9)
    expected = branches(*layers, True)
    for call in (lambda model: model.head(z), lambda model: model.cell(z, u), lambda model: model.initial_state(u)):
        with torch.no_grad():
            assert torch.equal(call(branches(*layers, False)), call(expected))


def test_a_cell_that_mixes_its_tensors_up_is_refused(make_images) -> None:
    model = EquilibriumModel.from_callables(
        lambda x: (x.flatten(1)[:, :5], x.flatten(1)[:, :3]),
        lambda z, u: (z[1] + u[1], z[0] + u[0]),
        lambda z: z[1],
        **SIZES,
    )
    with pytest.raises(UsageError, match=r"cell: .*shapes \[\(5,\), \(3,\)\], got \[\(3,\), \(5,\)\]"):
        model.check_parts(make_images(1))


def test_what_is_not_several_tensors_stays_as_it_is() -> None:
    for value in (torch.ones(2, 3), {"a": 1}, [], [1, 2], None):
        assert Packing(value).pack(value) is value and Packing(value).unpack(value) is value

"""Specs: what users write becomes the object that it names, or one clear line."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from robustbench_deq.adjoints import Implicit, Neumann, Phantom, Unrolled
from robustbench_deq.attacks import ATTACKS, JointPGD
from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import Norm
from robustbench_deq.runner.suite import ThreatGrid
from robustbench_deq.solvers import SOLVERS, Anderson, Broyden, Solve
from robustbench_deq.solvers.base import FixedPointMap, Iterate, Solver, State
from robustbench_deq.specs import AdjointSpec, AttackSpec, SolveSpec
from robustbench_deq.threat_spec import ThreatSpec
from robustbench_deq.threats import Threat


@pytest.mark.parametrize("written", ["l2", "L2", "linf", "Linf"])
def test_a_threat_is_built_as_it_is_written(written: str) -> None:
    spec = ThreatSpec.model_validate({"norm": written, "epsilon": "8/255"})
    assert spec.model_dump(mode="json") == {"norm": written.lower(), "epsilon": 8 / 255}
    assert spec.build() == Threat(Norm.parse(written), 8 / 255)
    assert str(spec) == f"{written.lower()} 0.0313725"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"norm": "l7"}, "here: norm: norm: expected l1, l2"),
        ({"epsilon": "8/0"}, "here: epsilon: number: expected a number or a fraction, got '8/0'"),
        ({"epsilon": "wide"}, "expected a number or a fraction, got 'wide'"),
        ({"epsilon": True}, "here: epsilon: expected a valid number, got True"),
        ({"epsilon": -1}, "here: epsilon: expected greater than or equal to 0, got -1"),
        ({"epsilon": float("inf")}, "here: epsilon: expected a finite number, got inf"),
        ({"radius": 1}, "here: unknown key 'radius'"),
    ],
)
def test_threats_that_are_none_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(ThreatSpec, values, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"norm": "l7", "epsilons": [1]}, "here: norm: norm: expected l1, l2"),
        ({"epsilons": [1, "8/0"]}, "here: epsilons.1: number: expected a number or a fraction, got '8/0'"),
        ({"epsilons": [True]}, "here: epsilons.0: expected a valid number, got True"),
        ({"epsilons": [-1]}, "here: epsilons.0: expected greater than or equal to 0, got -1"),
        ({"epsilons": [float("inf")]}, "here: epsilons.0: expected a finite number, got inf"),
        ({"epsilons": []}, "here: epsilons: expected "),
        ({"epsilons": 1}, "here: epsilons: expected a valid list, got 1"),
    ],
)
def test_grids_of_radii_that_are_none_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(ThreatGrid, values, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_of_radii_is_one_threat_a_radius() -> None:
    grid = ThreatGrid.model_validate({"norm": "linf", "epsilons": ["8/255", 0]})
    assert grid.specs() == [ThreatSpec(norm="linf", epsilon=8 / 255), ThreatSpec(norm="linf", epsilon=0)]


def test_an_attack_is_built_with_its_threat_and_settings() -> None:
    attack = AttackSpec(threat=ThreatSpec(epsilon=0.5), config={"steps": 3}).build()
    assert isinstance(attack, JointPGD)
    assert attack.threat == Threat(Norm.parse("l2"), 0.5) and attack.config.steps == 3


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_is_built_by_name(name: str) -> None:
    norm = "linf" if name == "torchattacks-pgd" else "l2"
    assert AttackSpec(name=name, threat=ThreatSpec(norm=norm)).build().name == name


def test_attacks_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown attack: expected a registered attack, closest joint-pgd"):
        AttackSpec(name="joint-pdg").build()
    with pytest.raises(UsageError, match="unknown key 'stepz'"):
        AttackSpec(config={"stepz": 3}).build()
    with pytest.raises(UsageError, match="my suite: steps: expected greater than or equal to"):
        AttackSpec(config={"steps": -1}).build("my suite")


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solves_are_built_as_they_are_named(name: str) -> None:
    spec = SolveSpec(solver=name, tolerance=1e-3, max_steps=9)
    assert spec.build() == Solve(SOLVERS.get(name)(), rtol=1e-3, max_steps=9)


def test_a_solve_sets_its_solver_up() -> None:
    spec = SolveSpec(solver="anderson-1", settings={"history_size": 3, "damping": 0.8})
    assert spec.build().solver == Anderson(kind=1, history_size=3, damping=0.8)
    assert SolveSpec(solver="broyden", settings={"history_size": 4}).build().solver == Broyden(history_size=4)


def test_adjoints_are_built_as_they_are_named() -> None:
    solve = SolveSpec(solver="broyden", tolerance=1e-3, max_steps=9)
    assert AdjointSpec(solve=solve).build() == Implicit(solve.build())
    assert AdjointSpec(name="neumann", num_steps=4).build() == Neumann(4)
    assert AdjointSpec(name="unrolled", num_steps=4).build() == Unrolled(4)
    assert AdjointSpec(name="unrolled", damping=0.7).build() == Unrolled(damping=0.7)
    assert AdjointSpec(name="phantom", num_steps=2, damping=0.25).build() == Phantom(2, 0.25)


def test_a_solver_that_is_no_dataclass_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Solver):
        def __init__(self) -> None:
            self.pace = 1.0

        def init(self, z: Tensor) -> State:
            return ()

        def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]:
            return at.f, state

    monkeypatch.setitem(SOLVERS._entries, "plain", Plain)
    assert isinstance(SolveSpec(solver="plain").build().solver, Plain)
    with pytest.raises(UsageError, match="settings of plain among none, and no 'pace'"):
        validate(SolveSpec, {"solver": "plain", "settings": {"pace": 2}}, "here")

"""The modules that README and CONTRIBUTING show run as they stand, and what they register works.

A block of Python whose first line is a comment with a file's name, such as `# attacks/mi_fgsm.py`, is a module. What it
registers is taken out again.
"""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from robustbench_deq.configs import validate
from robustbench_deq.data import Split, SplitName
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.meter import Meter
from robustbench_deq.models import FAMILIES, Linear
from robustbench_deq.optimise import (
    NORMS,
    Ball,
    Classification,
    Free,
    HighestLoss,
    Joint,
    Norm,
    Optimum,
    ProjectedAscent,
    Source,
    Step,
    optimise,
)
from robustbench_deq.optimise.objectives import Margin
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.steps import At
from robustbench_deq.registry import Registry
from robustbench_deq.solvers import FixedPointMap, Solve, Solver, Status
from robustbench_deq.specs import AttackSpec, ThreatSpec
from tests.optimise.cases import TIGHTLY, best_of_linear, slope

ROOT = Path(__file__).parents[1]
EPSILON = {Norm.L1: 0.35, Norm.L2: 0.2, Norm.LINF: 0.05}
BLOCK = re.compile(r"^```python\n(# (\S+\.py)\n.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = {
    name: source
    for document in ("README.md", "CONTRIBUTING.md")
    for source, name in BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
}


def registries() -> list[Registry]:
    """Every registry that a module of the package has a name for."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("robustbench_deq")]
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Registry)}
    return list(found.values())


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], tuple[types.ModuleType, dict[str, set[str]]]]]:
    """`execute(name)`: the module of a block, and what it has registered, by the kind of registry."""
    before = [(registry, dict(registry._entries)) for registry in registries()]
    attributes = set(vars(Norm))

    def run(name: str) -> tuple[types.ModuleType, dict[str, set[str]]]:
        module = types.ModuleType(f"documents.{Path(name).stem}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(compile(MODULES[name], name, "exec"), vars(module))
        return module, {registry.kind: set(registry) - set(entries) for registry, entries in before}

    yield run
    for registry, entries in before:
        registry._entries.clear()
        registry._entries.update(entries)
    for attribute in set(vars(Norm)) - attributes:  # `add_norm` sets one beside the registry
        delattr(Norm, attribute)


class Affine(FixedPointMap):
    """`z -> z / 2 + b`, whose fixed point is `2 b`."""

    def __init__(self, b: torch.Tensor) -> None:
        self.b = b

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return z / 2 + self.b

    def restrict(self, index: torch.Tensor) -> Affine:
        return Affine(self.b[index])

    def jvp(self, z: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return tangent / 2


KINDS = {
    "attacks": "attack",
    "robustbench_deq/models": "family",
    "robustbench_deq/optimise/domains": "norm",
    "robustbench_deq/optimise/sources": None,
    "robustbench_deq/optimise/steps": None,
    "robustbench_deq/solvers": None,
}
"""What the modules of each folder register."""


def modules_of(folder: str) -> pytest.MarkDecorator:
    names = [name for name in MODULES if str(Path(name).parent) == folder]
    return pytest.mark.parametrize("name", names)


def defined(module: types.ModuleType, base: type) -> list[type]:
    """Subclasses of `base` that the module itself defines."""
    values = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return [value for value in values if value.__module__ == module.__name__]


@pytest.fixture
def affine(make_model, make_images) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """Two classes, so that the gradient of every loss has one direction; images away from the limits of the box."""
    return make_model("test-linear", num_classes=2, rtol=1e-8), 0.4 + 0.2 * make_images(4), torch.tensor([0, 1, 1, 0])


def test_the_documents_show_one_of_everything_that_can_be_added() -> None:
    folders = {str(Path(name).parent) for name in MODULES}
    assert folders - {"."} == set(KINDS)


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_of_the_documents_run_and_register_what_they_should(name: str, execute) -> None:
    _, registered = execute(name)
    kind = KINDS.get(str(Path(name).parent))
    assert {key for key, names in registered.items() if names} == ({kind} if kind else set())


@pytest.mark.parametrize("norm", list(NORMS.values()), ids=repr)
@modules_of("attacks")
def test_attack_reaches_the_known_optimum_in_every_norm(name: str, norm: Norm, execute, affine) -> None:
    _, registered = execute(name)
    model, x, y = affine
    threat = ThreatSpec(norm=norm.name, epsilon=EPSILON[norm])
    best = best_of_linear(slope(*affine), norm, EPSILON[norm])
    for attack_name in registered["attack"]:
        for settings in ({}, {"stop_at_success": False}):
            config = {"tolerance": 1e-9, **settings}
            result = AttackSpec(name=attack_name, threat=threat, config=config).build()(model, x, y)
            assert not bool(result.is_failed.any())
            stays = torch.full_like(y, bool(settings), dtype=torch.bool) | (model(x).argmax(1) == y)
            assert bool(stays.any())  # those that are misclassified leave with the clean image
            torch.testing.assert_close(result.delta[stays], best[stays], rtol=0, atol=1e-6)


@modules_of("attacks")
def test_attack_is_evaluated_and_its_budget_is_kept(name: str, execute, affine) -> None:
    _, registered = execute(name)
    model, x, y = affine
    data = Split("mine", SplitName.TEST, x, y, torch.arange(4), "digest", 1)
    for attack_name in registered["attack"]:
        threat = ThreatSpec(norm="l2", epsilon=3.0)
        record = evaluate(model, AttackSpec(name=attack_name, threat=threat).build(), data).record
        assert record.clean_accuracy > 0.0 == record.robust_accuracy and record.num_failed == 0
        # The clean equilibrium is known and not charged: one evaluation checks it, and more are refused.
        attack = AttackSpec(name=attack_name, threat=threat, config={"max_evaluations": 1}).build()
        record = evaluate(model, attack, data).record
        assert record.diagnostics["stopped_by_budget"] == 1.0 and record.cost.cell_evals <= 1.0


@pytest.mark.parametrize("attack", ["joint-pgd", "pgd"])
@modules_of("robustbench_deq/optimise/domains")
def test_norm_works_end_to_end(name: str, attack: str, execute, affine) -> None:
    """From the name in a spec to a record: the attack gains what the dual norm says can be gained."""
    _, registered = execute(name)
    model, x, y = affine
    data, gradient = Split("mine", SplitName.TEST, x, y, torch.arange(4), "digest", 1), slope(*affine)
    for norm_name in registered["norm"]:
        norm, settings = Norm.parse(norm_name), {"steps": 120, "stop_at_success": False}
        spec = AttackSpec(name=attack, threat=ThreatSpec(norm=norm_name, epsilon=0.1), config=settings)
        found = evaluate(model, spec.build(), data)
        assert (found.record.threat.norm, found.record.num_failed) == (norm_name, 0)
        gained = (gradient * (found.x_adv - x)).flatten(1).sum(1)
        share = gained / (0.1 * norm.dual_size(gradient))
        assert bool((share > 0.999).all()) and bool((share <= 1 + 1e-6).all()), share


@modules_of("robustbench_deq/optimise/domains")
def test_norm_is_one(name: str, execute, make_images) -> None:
    _, registered = execute(name)
    x, gradient = make_images(5), make_images(5, seed=2) - 0.5
    for norm in map(Norm.parse, registered["norm"]):
        direction = norm.direction(1e-30 * gradient)
        torch.testing.assert_close(norm.size(direction), torch.ones_like(x[:, 0, 0, 0]))
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), norm.dual_size(gradient))
        assert not bool(norm.direction(torch.zeros_like(x)).any())
        projected = norm.project(10 * gradient, 0.3, x)
        assert bool((norm.size(projected) <= 0.3 * (1 + 1e-9)).all())
        assert float((x + projected).min()) >= 0 and float((x + projected).max()) <= 1
        torch.testing.assert_close(norm.project(projected, 0.3, x), projected)
        stream = np.random.Generator(np.random.Philox(key=3))
        draws = torch.from_numpy(np.stack([norm.draw(stream, 4) for _ in range(4000)]))
        # Uniform in the ball: the volume within a draw's size is uniform in [0, 1].
        volume = norm.size(draws) ** 4
        torch.testing.assert_close(volume.sort().values, torch.linspace(0, 1, 4000).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("source", [TIGHTLY, Joint()], ids=["solved", "joint"])
@pytest.mark.parametrize("norm", list(NORMS.values()), ids=repr)
@modules_of("robustbench_deq/optimise/steps")
def test_step_reaches_the_known_optimum(name: str, norm: Norm, source: Source, execute, affine) -> None:
    module, _ = execute(name)
    model, x, y = affine
    for kind in defined(module, Step):
        problem, ball, keep = Classification(model, x, Margin(y)), Ball(norm, EPSILON[norm], x), HighestLoss(1e-3, 1e-3)
        found = optimise(problem, source, ball, kind(0.5), keep, torch.zeros_like(x), num_steps=150)
        gradient = slope(*affine)
        gained = (gradient * found.variable).flatten(1).sum(1)
        share = gained / (EPSILON[norm] * norm.dual_size(gradient))
        assert bool((share > 0.999).all()) and bool((share <= 1 + 1e-6).all()), share


@modules_of("robustbench_deq/optimise/steps")
def test_step_is_that_of_its_equation(name: str, execute, make_images) -> None:
    """Two steps in free space: the second repeats half of the first move."""
    module, _ = execute(name)
    start, gradient = make_images(3), make_images(3, seed=2) - 0.5
    unit = Norm.L2.direction(gradient)
    for kind in defined(module, Step):
        step = kind(0.2, momentum=0.5)
        state, variable = step.init(start, Free()), start
        for number in range(2):
            zeros = torch.zeros(3)
            at = At(variable, gradient, zeros, zeros, None, Moment(number, 4), 0, None)
            variable, state = step.step(at, Free(), state)
        second = 0.2 * (1 + 0.5**0.5) / 2  # cosine
        torch.testing.assert_close(variable, start + (0.2 + second + 0.5 * 0.2) * unit)


@modules_of("robustbench_deq/optimise/sources")
def test_source_sees_the_exact_gradient_and_reaches_the_known_optimum(name: str, execute, affine) -> None:
    module, _ = execute(name)
    model, x, y = affine
    problem, zeros = Classification(model, x, Margin(y)), torch.zeros_like(x)
    for kind in defined(module, Source):
        source = kind(80)
        with Meter(model) as meter:
            look, _ = source.look(problem, source.start(problem, zeros, None), zeros, Moment(0, 1))
        assert (meter.eval_rows, meter.vjp_rows, meter.num_steps) == (80 * 4, 80 * 4, 80 * 4)
        torch.testing.assert_close(look.gradient, slope(*affine), rtol=0, atol=1e-9)
        ball, keep = Ball(Norm.L2, 0.2, x), HighestLoss(1e-3, 1e-3)
        found = optimise(problem, source, ball, ProjectedAscent(1.0), keep, zeros, num_steps=10)
        torch.testing.assert_close(found.variable, best_of_linear(slope(*affine), Norm.L2, 0.2), rtol=0, atol=1e-6)
        few = optimise(problem, kind(2), ball, ProjectedAscent(1.0), keep, zeros, num_steps=3)
        assert bool(torch.isneginf(few.loss).all())  # no state has settled, and no loss is trusted


@modules_of("robustbench_deq/optimise/sources")
def test_rows_of_a_source_leave_and_others_do_not_notice(name: str, execute, affine) -> None:
    module, _ = execute(name)
    model, x, _ = affine
    y = model(x).argmax(1)
    matrix = model.input_matrix().detach()
    distance = (-Margin(y)(model(x)) / (matrix[1 - y] - matrix[y]).norm(dim=1)).detach()
    radius = distance * torch.tensor([3.0, 0.5, 1.5, 0.5])

    def run(source: Source, rows: torch.Tensor) -> Optimum:
        problem, ball = Classification(model, x[rows], Margin(y[rows])), Ball(Norm.L2, radius[rows], x[rows])
        keep, start = HighestLoss(1e-3, 1e-3), torch.zeros_like(x[rows])
        return optimise(problem, source, ball, ProjectedAscent(0.2), keep, start, num_steps=20, leaves=True)

    for kind in defined(module, Source):
        together = run(kind(80), torch.arange(4))
        assert together.is_done.tolist() == [True, False, True, False]
        for row in range(4):
            alone = run(kind(80), torch.tensor([row]))
            torch.testing.assert_close(alone.variable[0], together.variable[row])
            torch.testing.assert_close(alone.loss[0], together.loss[row])


@modules_of("robustbench_deq/models")
def test_family_is_built_and_solved(name: str, execute, make_images) -> None:
    _, registered = execute(name)
    x = make_images(3)
    for family_name in registered["family"]:
        family = FAMILIES.get(family_name)
        config = validate(family.config_type, {"input_shape": tuple(x.shape[1:]), "num_classes": 3}, family_name)
        model = family.build(config).double().eval()
        assert model(x).shape == (3, 3) and bool(model.equilibrium(x).is_converged.all())


@modules_of("robustbench_deq/solvers")
def test_solver_solves(name: str, execute, make_images) -> None:
    module, _ = execute(name)
    x = make_images(3)
    assert defined(module, Solver)
    for solver in defined(module, Solver):
        solution = Solve(solver(), rtol=1e-9)(Affine(x), torch.zeros_like(x))
        assert set(solution.status.tolist()) == {Status.CONVERGED}
        torch.testing.assert_close(solution.value, 2 * x, rtol=1e-7, atol=1e-7)


def test_examples_keep_the_contract_of_what_they_are_examples_of() -> None:
    """In a process of its own, since the contract's cases are made of what is registered; on two families of ten."""
    others = ("deq-fc", "mdeq", "mondeq", "lben", "linear", "resnet")
    chosen = f"(mi-fgsm-l2 and not {' and not '.join(others)}) or heavy-ball"
    words = [sys.executable, "-m", "tests.pasted", "-k", chosen]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-1000:]
    assert (
        answer.stdout.startswith("pasted: mi-fgsm heavy-ball\n")
        and int(re.search(r"(\d+) passed", answer.stdout)[1]) > 50
    )


@pytest.mark.parametrize("name", list(MODULES) * 2)
def test_what_a_module_registers_is_taken_out_again(name: str, execute) -> None:
    """A second module that registers the same name is refused: the second run of each finds none."""
    execute(name)
    assert len(registries()) >= 6

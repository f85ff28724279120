"""The modules that README and CONTRIBUTING show run as they stand, and what they register works.

A block of Python whose first line is a comment with a file's name, such as `# attacks/fgsm.py`, is a module. What it
registers is taken out again.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from robustbench_deq.configs import validate
from robustbench_deq.models import FAMILIES
from robustbench_deq.registry import Registry
from robustbench_deq.solvers import FixedPointMap, Solve, Solver, Status
from robustbench_deq.specs import AttackSpec, ThreatSpec

ROOT = Path(__file__).parents[1]
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

    def run(name: str) -> tuple[types.ModuleType, dict[str, set[str]]]:
        module = types.ModuleType(f"documents.{Path(name).stem}")
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
        exec(compile(MODULES[name], name, "exec"), vars(module))
        return module, {registry.kind: set(registry) - set(entries) for registry, entries in before}

    yield run
    for registry, entries in before:
        registry._entries.clear()
        registry._entries.update(entries)


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


def test_the_documents_show_a_model_an_attack_and_a_solver() -> None:
    folders = {str(Path(name).parent) for name in MODULES}
    assert {"attacks", "robustbench_deq/models", "robustbench_deq/solvers"} <= folders


@pytest.mark.parametrize("name", list(MODULES))
def test_modules_of_the_documents_run_and_what_they_register_works(name: str, execute, make_model, make_images) -> None:
    module, registered = execute(name)
    kinds = {"attacks": "attack", "robustbench_deq/models": "family"}
    kind = kinds.get(str(Path(name).parent))
    assert {key for key, names in registered.items() if names} == ({kind} if kind else set())
    x, y = make_images(3), torch.tensor([0, 1, 2])
    for attack_name in registered["attack"]:
        attack = AttackSpec(name=attack_name, threat=ThreatSpec(norm="linf", epsilon=0.1)).build()
        result = attack(make_model("test-linear"), x, y)
        assert not bool(result.is_failed.any())
        assert 0.0 < float(result.delta.abs().max()) <= 0.1 + 1e-9
    for family_name in registered["family"]:
        family = FAMILIES.get(family_name)
        config = validate(family.config_type, {"input_shape": tuple(x.shape[1:]), "num_classes": 3}, family_name)
        model = family.build(config).double().eval()
        assert model(x).shape == (3, 3) and bool(model.equilibrium(x).is_converged.all())
    solvers = [
        value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
    ]
    for solver in (value for value in solvers if issubclass(value, Solver)):
        solution = Solve(solver(), rtol=1e-9)(Affine(x), torch.zeros_like(x))
        assert set(solution.status.tolist()) == {Status.CONVERGED}
        torch.testing.assert_close(solution.value, 2 * x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", list(MODULES) * 2)
def test_what_a_module_registers_is_taken_out_again(name: str, execute) -> None:
    """A second module that registers the same name is refused: the second run of each finds none."""
    execute(name)
    assert len(registries()) >= 6

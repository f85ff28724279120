"""Imports point one way; the library keeps quiet and unpickles nothing. Read from the source, not from what runs."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "robustbench_deq"
ATTACKS = sorted((ROOT / "attacks").rglob("*.py"))
LIBRARY = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = LIBRARY + ATTACKS

MAY_IMPORT = {
    "errors": "",
    "lazy": "",
    "norm_names": "",
    "fixes": "",
    "rows": "",
    "callables": "",
    "trial": "callables errors",
    "proportions": "",
    "memory": "",
    "peak_memory": "",
    "quiet": "",
    "shown": "",
    "files": "errors",
    "registry": "errors",
    "tensor_files": "files",
    "devices": "errors",
    "inputs": "errors fixes",
    "plain_yaml": "",
    "configs": "errors plain_yaml registry",
    "solvers": "errors registry rows shown",
    "meter": "errors peak_memory solvers",
    "adjoints": "errors registry rows solvers",
    "equilibrium": "callables errors adjoints fixes inputs meter solvers trial",
    "randomness": "",
    "optimise": "adjoints equilibrium errors meter randomness registry rows solvers shown",
    "threats": "configs errors optimise",
    "threat_spec": "configs norm_names optimise threats",
    "certificates": "equilibrium threats",
    "protocol": "certificates configs equilibrium errors inputs meter optimise randomness registry rows threats shown",
    "specs": "adjoints configs protocol solvers threat_spec",
    "models": "adjoints callables configs equilibrium errors files lazy optimise registry rows solvers specs "
    "tensor_files threat_spec trial",
    "data": "configs errors files fixes lazy registry shown",
    "records": "configs errors files shown",
    "evaluate": "adjoints configs data devices equilibrium errors files fixes inputs memory meter models optimise "
    "proportions protocol randomness records rows solvers shown threats trial",
    "runner": "configs data equilibrium errors evaluate files fixes memory models optimise proportions protocol quiet "
    "records solvers specs tensor_files threat_spec threats",
    "training": "adjoints configs data equilibrium errors evaluate files models protocol registry rows solvers specs "
    "tensor_files threats",
    "report": "configs errors files proportions records",
    "attacks": "adjoints configs equilibrium errors meter optimise protocol randomness registry rows solvers threats",
    "benchmark": "attacks data equilibrium errors evaluate models optimise protocol records registry threats",
    "commands": "*",
}
"""For each part of the package (a module or a folder), the other parts that it may import, as seen from the source
alone: imports within functions and under TYPE_CHECKING count. A part that is not listed fails."""


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def package_of(path: Path) -> str:
    """The dotted name of the package that a file is in."""
    parent = path.relative_to(ROOT).parent.parts
    return ".".join(parent if parent[0] == PACKAGE else (PACKAGE, *parent))


def imports_of(source: str, package: str = "") -> set[str]:
    """Dotted names of everything a source imports, wherever it stands; `from a import b` gives `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parents = package.split(".")
                module = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    return imports_of(path.read_text(encoding="utf-8"), package_of(path))


def parts_imported(path: Path) -> set[str]:
    """Other parts of the package that a file imports; "" where it imports a name from the package's root."""
    known = {part_of(module) for module in MODULES} - {"__init__"}
    inner = {name.split(".")[1] for name in imports(path) if name.startswith(f"{PACKAGE}.")}
    return {name if name in known else "" for name in inner} - {part_of(path)}


def calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def test_the_reader_of_imports_sees_all_kinds() -> None:
    source = "import a.b\nfrom c import d, e\nfrom . import f\nfrom ..g import h\ndef i():\n    import j\n"
    source += "if TYPE_CHECKING:\n    import k\nif x:\n    import l\n"
    assert imports_of(source, "p.q") == {"a.b", "c.d", "c.e", "p.q.f", "p.g.h", "j", "k", "l"}


def test_the_rules_are_of_the_parts_that_there_are() -> None:
    assert set(MAY_IMPORT) == {part_of(path) for path in MODULES} - {"__init__"}
    assert len(LIBRARY) > 20 and len(ATTACKS) > 2


@named([path for path in MODULES if part_of(path) != "__init__"])
def test_imports_point_one_way(path: Path) -> None:
    allowed = MAY_IMPORT[part_of(path)]
    if allowed != "*":
        assert parts_imported(path) <= set(allowed.split()), f"{part_of(path)} may import {allowed or 'nothing'}"


def test_the_rules_allow_no_cycle() -> None:
    rules = {part: allowed.split() for part, allowed in MAY_IMPORT.items() if allowed != "*"}
    tuple(graphlib.TopologicalSorter(rules).static_order())  # raises CycleError


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=lambda path: path.name)
def test_modules_and_folders_of_a_folder_import_each_other_one_way(folder: Path) -> None:
    children = {path.stem: [path] for path in folder.glob("*.py") if path.stem != "__init__"}
    children |= {
        inner.name: sorted(inner.rglob("*.py")) for inner in folder.iterdir() if (inner / "__init__.py").exists()
    }
    package = package_of(folder / "__init__.py")
    rules = {}
    for name, paths in children.items():
        inner = {
            found.removeprefix(f"{package}.").split(".")[0]
            for path in paths
            for found in imports(path)
            if found.startswith(f"{package}.")
        }
        rules[name] = inner & set(children) - {name}
    tuple(graphlib.TopologicalSorter(rules).static_order())


def public_names(kinds: tuple[type, ...]) -> Counter[str]:
    """How many modules define each public class or function at their top."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES]
    defined = [{node.name for node in tree.body if isinstance(node, kinds)} for tree in trees]
    return Counter(name for names in defined for name in names if not name.startswith("_"))


def test_a_class_or_function_has_its_name_to_itself() -> None:
    shared = {name for name, count in public_names((ast.ClassDef, ast.FunctionDef)).items() if count > 1}
    assert not shared


@named([path for path in LIBRARY if part_of(path) != "commands"])
def test_library_imports_neither_attacks_nor_the_command_line(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"attacks", "cli", "click", "tests"}


@named(MODULES)
def test_nothing_is_printed_unpickled_or_evaluated(path: Path) -> None:
    assert not calls(path) & {"print", "eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads"}
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "shelve")}
    assert not names & {"torch.load", "torch.save"}


SEEDS_FOR_OTHERS = {ROOT / "attacks" / "bridge.py"}  # whose attacks draw from the global generators


@named([path for path in MODULES if path not in SEEDS_FOR_OTHERS])
def test_numpy_and_python_draw_from_generators_of_their_own(path: Path) -> None:
    allowed = ("np.random.Generator", "np.random.Philox", "np.random.PCG64", "np.random.SeedSequence")
    used = {name for name in calls(path) if name.startswith(("np.random.", "numpy.random.", "random."))}
    assert not {name for name in used if not name.startswith(allowed)}


LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TAKES_GRADIENTS_IN_LOOPS = {ROOT / PACKAGE / "training" / "loop.py"}  # with respect to the parameters


def calls_in_loops(source: str) -> set[str]:
    """Last names of everything that a source calls within a loop, functions that it defines there included."""
    found = set()
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, LOOPS):
            calls = (node.func for node in ast.walk(loop) if isinstance(node, ast.Call))
            found |= {ast.unparse(function).rpartition(".")[2] for function in calls}
    return found


def test_the_reader_of_loops_sees_all_kinds() -> None:
    source = "a()\nfor x in y:\n    b.project(x)\nwhile True:\n    if x:\n        c.d.grad(x)\n[e(x) for x in y]\n"
    assert calls_in_loops(source) == {"project", "grad", "e"}


@named([path for path in MODULES if part_of(path) != "optimise"])
def test_inputs_are_optimised_by_the_one_loop(path: Path) -> None:
    """`optimise.loop` is the only loop that ascends: elsewhere no loop projects, steps or takes gradients."""
    looped = calls_in_loops(path.read_text(encoding="utf-8"))
    assert not looped & {"project", "steepest"}
    assert bool(looped & {"grad", "backward"}) == (path in TAKES_GRADIENTS_IN_LOOPS)


@named(MODULES)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

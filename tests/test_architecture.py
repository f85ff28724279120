"""Imports point one way; the library keeps quiet and unpickles nothing. Read from the source, not from what runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "robustbench_deq").rglob("*.py"))
ATTACKS = sorted((ROOT / "attacks").rglob("*.py"))
COMMANDS = sorted((ROOT / "commands").rglob("*.py"))

BASE = {"errors"}
NUMERICS = BASE | {
    "registry",
    "threats",
    "solvers",
    "adjoints",
    "memory",
    "peak_memory",
    "meter",
    "equilibrium",
    "objectives",
    "configs",
}
MAY_IMPORT = {
    "errors": set(),
    "files": BASE,
    "proportions": set(),
    "memory": set(),
    "peak_memory": set(),
    "quiet": set(),
    "registry": BASE,
    "configs": BASE | {"registry"},
    "threats": BASE,
    "objectives": BASE | {"registry"},
    "solvers": BASE | {"registry", "threats"},
    "meter": BASE | {"registry", "threats", "solvers", "peak_memory"},
    "adjoints": BASE | {"registry", "threats", "solvers"},
    "equilibrium": NUMERICS - {"equilibrium"},
    "joint": NUMERICS,
    "models": NUMERICS | {"files"},
    "data": BASE | {"registry", "configs", "files"},
    "attack": NUMERICS | {"joint"},
    "display": BASE | {"bench"},
    "report": BASE | {"files", "configs", "proportions", "bench.records", "bench.images", "bench.missing"},
    "bench": NUMERICS | {"files", "models", "data", "attack", "proportions", "quiet"},
    "training": NUMERICS | {"files", "models", "data", "attack", "bench"},
}
"""For each part of the package, all that it may import of the others."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "robustbench_deq").with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes_that_run(child)


def imports_of(source: str, package: str = "") -> set[str]:
    """Dotted names of everything a source imports; `from a import b` gives `a.b`."""
    found = set()
    for node in nodes_that_run(ast.parse(source)):
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
    return imports_of(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts))


def calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


def test_the_reader_of_imports_sees_all_kinds() -> None:
    source = "import a.b\nfrom c import d, e\nfrom . import f\nfrom ..g import h\ndef i():\n    import j\n"
    source += "if TYPE_CHECKING:\n    import k\nif x:\n    import l\n"
    assert imports_of(source, "p.q") == {"a.b", "c.d", "c.e", "p.q.f", "p.g.h", "j", "l"}


def test_every_named_part_exists() -> None:
    parts = {part_of(path) for path in LIBRARY}
    assert set(MAY_IMPORT) <= parts
    assert len(LIBRARY) > 20 and len(ATTACKS) > 2


@named([path for path in LIBRARY if part_of(path) in MAY_IMPORT])
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    own = {name.removeprefix("robustbench_deq.") for name in imports(path) if name.startswith("robustbench_deq.")}
    stray = {name for name in own if not any(name == root or name.startswith(f"{root}.") for root in allowed)}
    assert not stray, f"{part} may import {sorted(allowed)}"


@named(LIBRARY)
def test_library_imports_neither_attacks_nor_the_command_line(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"attacks", "cli", "click", "commands", "tests"}


@named(ATTACKS)
def test_attacks_import_no_judge_report_training_or_command_line(path: Path) -> None:
    names = imports(path)
    forbidden = (
        "cli",
        "click",
        "commands",
        "tests",
        *(f"robustbench_deq.{part}" for part in ("bench", "report", "training")),
    )
    assert not {name for name in names if name.startswith(forbidden)}


@named(LIBRARY + ATTACKS + COMMANDS)
def test_nothing_is_printed_unpickled_or_evaluated(path: Path) -> None:
    assert not calls(path) & {"print", "eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads"}
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle", "shelve")}
    assert not names & {"torch.load", "torch.save"}


@named(LIBRARY + ATTACKS + COMMANDS)
def test_numpy_and_python_draw_from_generators_of_their_own(path: Path) -> None:
    allowed = ("np.random.Generator", "np.random.Philox", "np.random.PCG64", "np.random.SeedSequence")
    used = {name for name in calls(path) if name.startswith(("np.random.", "numpy.random.", "random."))}
    assert not {name for name in used if not name.startswith(allowed)}


@named(LIBRARY + ATTACKS + COMMANDS)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

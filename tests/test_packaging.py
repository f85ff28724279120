"""What a wheel of this checkout holds, and that it works where there is no checkout.

The wheel is built and installed offline, into an environment that sees the packages of the present one, and is used
from an empty folder.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
HOMES = {"robustbench_deq": "robustbench_deq", "attacks": "robustbench_deq.attacks"}
"""Folders of the checkout to the packages that they become."""


def in_wheel(path: Path) -> str:
    """Where a file of the checkout lies in the wheel."""
    home, *rest = path.relative_to(ROOT).parts
    return "/".join([*HOMES[home].split("."), *rest])


def python_blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def imports_of(source: str) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)}


def run(*words: object, cwd: Path) -> str:
    """What a command says. It knows neither the checkout nor its test run."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from links to the sources, so that nothing is left in the checkout or taken from an earlier build there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*HOMES, "pyproject.toml", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = ("build", "--wheel", "--quiet", "--offline", "--no-build-isolation", "--python", sys.executable)
    run(sys.executable, "-m", "uv", *build, "--out-dir", folder / "dist", source, cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`installed(command, ...)`: what a command of an environment with the wheel prints, called in an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    install = ("pip", "install", "--quiet", "--offline", "--no-deps", "--python", folder / "env" / "bin" / "python")
    run(sys.executable, "-m", "uv", *install, wheel, cwd=folder)
    empty = folder / "empty"
    empty.mkdir()
    return lambda command, *words: run(folder / "env" / "bin" / command, *words, cwd=empty)


def test_every_package_is_listed() -> None:
    found = {Path(in_wheel(path)).parent for home in HOMES for path in (ROOT / home).rglob("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(".".join(folder.parts) for folder in found)


def test_every_module_is_in_a_package() -> None:
    modules = [path for home in HOMES for path in (ROOT / home).rglob("*.py")]
    assert not [path for path in modules if not (path.parent / "__init__.py").is_file()]


def test_what_the_type_checker_is_to_look_at_is_there() -> None:
    names = PROJECT["tool"]["mypy"]["files"]
    places = {ROOT / home: package.replace(".", "/") for home, package in HOMES.items()}
    for name in names:
        assert any(
            (home / Path(name).relative_to(place)).exists() for home, place in places.items() if name.startswith(place)
        ), name


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    top = {name.split("/")[0] for name in names}
    version = PROJECT["project"]["version"]
    assert top == {"robustbench_deq", f"robustbench_deq-{version}.dist-info"}
    files = {path for home in HOMES for path in (ROOT / home).rglob("*") if path.is_file()}
    expected = {in_wheel(path) for path in files if "__pycache__" not in path.parts}
    assert {name for name in names if name.startswith("robustbench_deq/")} == expected


def test_imports_of_the_documents_work_where_it_is_installed(installed: Callable[..., str]) -> None:
    blocks = [block for name in ("README.md", "CONTRIBUTING.md") for block in python_blocks(name)]
    lines = set[str]().union(*map(imports_of, blocks)) - {"from __future__ import annotations"}
    assert len(lines) > 10
    places = "import robustbench_deq, robustbench_deq.attacks as a; print(robustbench_deq.__file__, a.__file__)"
    others = "import importlib.util as u; print(*map(u.find_spec, ['attacks', 'cli', 'configs']))"
    *found, attacks, cli, configs = installed("python", "-c", "\n".join([*sorted(lines), places, others])).split()
    assert len(found) == 2 and all("/env/lib/" in place for place in found)
    assert attacks == cli == configs == "None"


def test_five_lines_of_the_readme_run(installed: Callable[..., str]) -> None:
    example = python_blocks("README.md")[0]
    assert len([line for line in example.splitlines() if line]) == 5 and "robust_accuracy" in example
    accuracy = float(installed("python", "-c", example).split()[0])
    assert 0.5 < accuracy < 0.9


def test_command_runs(installed: Callable[..., str]) -> None:
    assert PROJECT["project"]["version"] in installed("robustbench-deq", "--version")
    assert "joint-pgd" in installed("robustbench-deq", "attacks")

"""Models of one's own as `file.py:function`: the file is run, and the function called without arguments.

Meanwhile the modules that lie beside the file can be imported by their plain names, as if Python ran it. Afterwards
they are forgotten: the file of another folder may have neighbours of the same names. What the file or the function
prints goes to standard error, since standard output belongs to results.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from robustbench_deq.equilibrium import EquilibriumModel, check_model
from robustbench_deq.errors import UsageError, told
from robustbench_deq.files import is_file, sha256_of


def model_from_file(source: str) -> EquilibriumModel:
    """What the function of `file.py:function` returns, in evaluation mode. The global random state is left as it was.

    Raises:
        UsageError: for a file or function that is not there, whatever they raise, or a result that is no
            `EquilibriumModel`.
    """
    file, _, function = source.rpartition(":")
    if not is_file(file):
        raise UsageError.of(f"model {source}", expected="file.py:function", got="no such file", fix="check the path")
    path = Path(file).resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]  # two files of one stem are two modules
    spec = importlib.util.spec_from_file_location(f"_robustbench_deq_user_{path.stem}_{digest}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # to stay: pickle and annotations look up its classes there
    try:
        with (
            _importable(path.parent),
            contextlib.redirect_stdout(sys.stderr),
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
        ):
            spec.loader.exec_module(module)
            build = getattr(module, function, None)
            if not callable(build):
                raise UsageError.of(
                    f"model {source}", expected=f"a function {function!r} in the file", got="none", fix="check the name"
                )
            model = build()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UsageError.of(
            f"model {source}", expected="a model", got=told(error, path.parent), fix="correct the file"
        ) from error
    check_model(model, f"model {source}")
    return model.eval()


def digest_of_file(path: Path) -> str:
    """The sha256 of a model's file; where it imports modules that lie beside it, one of it and all of these.

    Imports are read from the text, since nothing may be run to plan a suite: a computed name is not seen, nor are the
    files that the code reads. Raises `OSError` where the file cannot be read.
    """
    path = path.resolve()
    digest, found, waiting = sha256_of(path), {path}, [path]
    while waiting:
        places = {place for name in _imports(waiting.pop(), path.parent) for place in _places(name, path.parent)}
        new = {place for place in places - found if place.is_file()}
        found |= new
        waiting += new
    if found == {path}:
        return digest
    listed = sorted((file.relative_to(path.parent).as_posix(), sha256_of(file)) for file in found)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _imports(path: Path, folder: Path) -> set[str]:
    """Dotted names that a file below `folder` imports, absolute ones as they are seen from there."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):  # running it will say what is wrong
        return set()
    package, names = path.relative_to(folder).parent.parts, set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
    return {name for name in names if isinstance(name, str) and all(map(str.isidentifier, name.split(".")))}


def _places(name: str, folder: Path) -> set[Path]:
    """Where a module of `folder` and the packages that it is in may lie."""
    parts = name.split(".")
    stems = [folder.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    return {place for stem in stems for place in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")}


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Within, the modules in `folder` can be imported by their names; afterwards these are free for others' again."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))
        names = sys.modules.keys() - known
        roots = {name.partition(".")[0] for name in names} - known
        beside = {root for root in roots if root in sys.modules and _lies_in(sys.modules[root], folder)}
        for name in names:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Whether the module's file, or the package's folder, is an entry of `folder`."""
    place = next(iter(getattr(module, "__path__", ())), None) or getattr(module, "__file__", None)
    return place is not None and Path(place).parent == folder
